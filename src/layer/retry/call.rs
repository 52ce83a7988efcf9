//! One call: what is counted across its attempts, and whether another attempt follows.

use std::sync::Arc;
use std::time::Duration;

use http::{Extensions, HeaderValue, Request, Response};
use tokio::time::Instant;

use super::budget::Withdrawal;
use super::classify::retry_after;
use super::error::Report;
use super::event::is_traced;
use super::kept::{Kept, KeptHeaders};
use super::{
    Attempt, AttemptEvent, AttemptOutcome, AttemptTimeout, Attempts, Deadline, Delivery,
    MaxRetries, NotRetried, Policy, Replay, Verdict,
};
use crate::layer::delivery::{self, Failure, Track};
use crate::layer::envelope::Contents;
use crate::layer::{after, carries_key, first_value};
use crate::protocol::{IdempotencyKey, RequestId, X_REQUEST_ID};

/// The decisions and counts of one call.
pub(super) struct Call {
    pub(super) policy: Arc<Policy>,
    pub(super) max_retries: u32,
    pub(super) attempt_timeout: Option<Duration>,
    pub(super) deadline: Option<Instant>,
    /// When the call began, if an observer or a trace needs it.
    started: Option<Instant>,
    /// Whether the request may be sent again even if it may have been acted upon.
    safe: bool,
    /// What the policy's envelope keeps for the call.
    contents: Contents,
    /// Attempts started.
    pub(super) attempts: u32,
    /// Attempts ended, including those of retries below.
    total: u32,
    /// What happens within the current attempt.
    pub(super) track: Track,
    /// What is known about the delivery of the last attempt that ended.
    last: Delivery,
    /// The worst that is known about the delivery of the attempts before it.
    earlier: Delivery,
    /// Whether a refused stream was already believed.
    refused: bool,
    /// The wait before the last attempt.
    pub(super) wait: Duration,
    /// When the next attempt is due.
    pub(super) due: Option<Instant>,
    /// Pays for the next attempt. It returns to the budget if the call is dropped first.
    withdrawal: Option<Withdrawal>,
}

impl Call {
    /// Makes a call from the policy and the request's extensions, which override it.
    #[inline(always)]
    pub(super) fn new(policy: Arc<Policy>, extensions: &Extensions) -> Self {
        let max_retries = extensions
            .get::<MaxRetries>()
            .map_or(policy.max_retries, |max| max.0);
        let attempt_timeout = extensions
            .get::<AttemptTimeout>()
            .map_or(policy.attempt_timeout, |timeout| timeout.0);
        let deadline = extensions
            .get::<Deadline>()
            .map_or(policy.deadline, |deadline| deadline.0)
            .and_then(after);
        // Without an observer the clock is not read.
        let started = (policy.observer.is_some() || is_traced()).then(Instant::now);
        Self {
            policy,
            max_retries,
            attempt_timeout,
            deadline,
            started,
            safe: false,
            contents: Contents::default(),
            attempts: 1,
            total: 0,
            track: Track::new(),
            last: Delivery::NeverSent,
            earlier: Delivery::NeverSent,
            refused: false,
            wait: Duration::ZERO,
            due: None,
            withdrawal: None,
        }
    }

    /// Begins the first attempt: keeps the headers of its request, names it, and determines whether
    /// it is safe to send again.
    #[inline]
    pub(super) fn begin<B>(&mut self, request: &mut Request<B>, kept: &mut KeptHeaders) {
        let policy = &*self.policy;
        kept.reserve(request.headers());
        let mut keep = |name: &_, value: &_| kept.keep(name, value);
        let is_keyed = match &policy.envelope {
            Some(envelope) => envelope.open(&mut self.contents, request, &policy.key_header, keep),
            None => {
                for (name, value) in request.headers() {
                    keep(name, value);
                }
                carries_key(request.headers(), &policy.key_header)
            }
        };
        self.safe = delivery::safe_to_send_again(request, is_keyed);
        self.number(request);
    }

    /// Begins another attempt with a copy of the first request from before it was named.
    pub(super) fn begin_again<B>(&mut self, request: &mut Request<B>) {
        self.attempts += 1;
        self.track = Track::new();
        self.earlier = self.delivery();
        self.last = Delivery::NeverSent;
        if let Some(withdrawal) = self.withdrawal.take() {
            withdrawal.spend();
        }
        self.name(request);
        self.number(request);
    }

    /// Names a copy of the first request.
    fn name<B>(&mut self, request: &mut Request<B>) {
        if let Some(envelope) = &self.policy.envelope {
            envelope.reopen(&mut self.contents, request);
        }
    }

    /// Ends the call with a response. Records on it what the call took, unless that is the usual,
    /// and what it confirms.
    #[inline]
    pub(super) fn end<B, R>(
        &self,
        kept: &Kept<B>,
        response: &mut Response<R>,
        not_retried: NotRetried,
    ) {
        let not_retried = Some(not_retried).filter(|reason| *reason != NotRetried::Verdict);
        if self.total > 1 || not_retried.is_some() {
            let attempts = Attempts::new(self.total, self.earlier, not_retried);
            response.extensions_mut().insert(attempts);
        }
        if let Some(envelope) = &self.policy.envelope {
            envelope.close(&self.contents, response, kept.extensions(), self.earlier);
        }
    }

    /// Records what is known about the attempts of a retry below, before the one that was answered.
    #[inline]
    pub(super) fn answered_after(&mut self, earlier: Delivery) {
        self.earlier = self.earlier.max(earlier);
    }

    /// Records the end of an attempt. Returns what is known about its delivery, and whether it can
    /// never succeed.
    fn settle(&mut self, answered: bool) -> (Delivery, bool) {
        self.total += self.track.attempts();
        let (delivery, permanent) = if answered {
            (Delivery::Answered, false)
        } else {
            match self.track.failure(&mut self.refused) {
                Failure::Unknown => (Delivery::Unknown, false),
                Failure::NeverSent | Failure::Refused => (Delivery::NeverSent, false),
                Failure::Permanent => (Delivery::NeverSent, true),
            }
        };
        self.last = delivery;
        (delivery, permanent)
    }

    /// Whether the deadline has passed. Without a deadline the clock is not read.
    pub(super) fn is_past_deadline(&self) -> bool {
        self.deadline
            .is_some_and(|deadline| Instant::now() >= deadline)
    }

    /// Returns the instant `limit` from now or the deadline, whichever is sooner. `None` means
    /// never.
    pub(super) fn no_later_than_deadline(&self, limit: Duration) -> Option<Instant> {
        match (after(limit), self.deadline) {
            (Some(limit), Some(deadline)) => Some(limit.min(deadline)),
            (limit, deadline) => limit.or(deadline),
        }
    }

    /// Writes the attempt's number into its request, if configured.
    fn number<B>(&self, request: &mut Request<B>) {
        if let Some(name) = &self.policy.attempt_header
            && *name != self.policy.key_header
        {
            // A full map takes no more headers. The request matters more than its number.
            let _ = request
                .headers_mut()
                .try_insert(name.clone(), HeaderValue::from(self.attempts));
        }
    }

    /// Returns the worst that is known about the delivery of all attempts that ended.
    fn delivery(&self) -> Delivery {
        self.earlier.max(self.last)
    }

    /// Makes the report for a call that failed. The names are written once more, because they are
    /// kept nowhere else.
    pub(super) fn report<B>(
        &mut self,
        kept: &Kept<B>,
        headers: &KeptHeaders,
        not_retried: Option<NotRetried>,
    ) -> Report {
        let mut request = kept.request(headers, ());
        self.name(&mut request);
        let id_header = match &self.policy.envelope {
            Some(envelope) => envelope.request_id_header(),
            None => &X_REQUEST_ID,
        };
        let headers = request.headers();
        Report {
            attempts: self.total,
            delivery: self.delivery(),
            not_retried,
            key: first_value(headers, &self.policy.key_header)
                .and_then(|key| IdempotencyKey::from_header(key).ok()),
            request_id: first_value(headers, id_header)
                .and_then(|id| RequestId::new(id.to_str().ok()?).ok()),
        }
    }

    /// Decides whether another attempt follows `outcome`, and if so, sets when it is due.
    ///
    /// # Errors
    ///
    /// Returns why no other attempt follows.
    pub(super) fn next<B: Replay>(
        &mut self,
        kept: &Kept<B>,
        outcome: &AttemptOutcome<'_>,
    ) -> Result<(), NotRetried> {
        let answered = matches!(outcome, AttemptOutcome::Answered(_));
        let (delivery, permanent) = self.settle(answered);
        let next = self.decide(
            kept,
            &Attempt {
                number: self.attempts,
                method: kept.method(),
                uri: kept.uri(),
                outcome: *outcome,
                delivery,
                permanent,
            },
        );
        let not_retried = next.as_ref().err().copied();
        self.observe(kept, outcome, not_retried);
        next
    }

    /// Ends the call at its deadline, in the middle of an attempt.
    pub(super) fn cut<B>(&mut self, kept: &Kept<B>) {
        self.settle(false);
        self.observe(kept, &AttemptOutcome::TimedOut, Some(NotRetried::Deadline));
    }

    #[inline]
    fn observe<B>(
        &self,
        kept: &Kept<B>,
        outcome: &AttemptOutcome<'_>,
        not_retried: Option<NotRetried>,
    ) {
        let Some(started) = self.started else { return };
        let event = AttemptEvent {
            attempt: self.attempts,
            method: kept.method(),
            uri: kept.uri(),
            outcome: *outcome,
            delivery: self.last,
            retry_in: not_retried.is_none().then_some(self.wait),
            not_retried,
            elapsed: started.elapsed(),
        };
        event.trace();
        if let Some(observer) = &self.policy.observer {
            observer(&event);
        }
    }

    fn decide<B: Replay>(
        &mut self,
        kept: &Kept<B>,
        attempt: &Attempt<'_>,
    ) -> Result<(), NotRetried> {
        let verdict = self.policy.classify(attempt);
        if verdict == Verdict::Stop {
            return Err(if attempt.permanent {
                NotRetried::Permanent
            } else {
                NotRetried::Verdict
            });
        }
        // The gate. Nothing but `delivery` can open it.
        if !(self.safe || attempt.delivery == Delivery::NeverSent) {
            return Err(NotRetried::Unsafe);
        }
        if self.attempts > self.max_retries {
            return Err(NotRetried::Attempts);
        }
        let now = Instant::now();
        let wait = self.wait_after(verdict, &attempt.outcome, now)?;
        let due = after(wait).ok_or(NotRetried::Deadline)?;
        // Timers have a resolution of a millisecond. A retry due within the last one before the
        // deadline might miss it.
        let latest = due.checked_add(Duration::from_millis(1));
        if self
            .deadline
            .is_some_and(|deadline| latest.is_none_or(|latest| latest >= deadline))
        {
            return Err(NotRetried::Deadline);
        }
        if kept.body().is_none() {
            return Err(NotRetried::Body);
        }
        // Taken here, so that a response is given up only for a retry that will be sent.
        if let Some(budget) = &self.policy.budget {
            self.withdrawal = Some(budget.withdraw().ok_or(NotRetried::Budget)?);
        }
        self.wait = wait;
        self.due = Some(due);
        Ok(())
    }

    /// Returns the wait before the next attempt.
    fn wait_after(
        &self,
        verdict: Verdict,
        outcome: &AttemptOutcome<'_>,
        now: Instant,
    ) -> Result<Duration, NotRetried> {
        let Policy {
            backoff,
            random,
            max_retry_after,
            ..
        } = &*self.policy;
        let backoff = || backoff.wait(self.attempts - 1, self.wait, random);
        let (floor, wait) = match (verdict, outcome) {
            (Verdict::RetryAfter(wait), _) => (wait, Duration::ZERO),
            (_, AttemptOutcome::Answered(head)) => match retry_after(head.headers) {
                Some(floor) => (floor, backoff()),
                None => return Ok(backoff()),
            },
            (_, AttemptOutcome::Failed(_) | AttemptOutcome::TimedOut) => return Ok(backoff()),
        };
        if floor > *max_retry_after {
            return Err(NotRetried::RetryAfter);
        }
        // Jitter only adds, and leaves half of the remaining time to the attempt.
        let limit = self.deadline.map_or(Duration::MAX, |deadline| {
            let left = deadline.saturating_duration_since(now);
            left.saturating_sub(floor) / 2
        });
        Ok(random.at_least(floor, wait, limit))
    }
}
