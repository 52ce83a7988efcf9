//! One call: what is counted over its attempts, and whether another one follows.

use std::sync::Arc;
use std::time::Duration;

use http::{Extensions, HeaderValue, Request, Response};
use tokio::time::Instant;

use super::budget::Withdrawal;
use super::classify::retry_after;
use super::delivery::{self, Proof};
use super::kept::{Kept, KeptHeaders};
use super::{
    AttemptEvent, AttemptOutcome, AttemptTimeout, Attempts, Deadline, Delivery, MaxRetries, Policy,
    Replay, Verdict,
};
use crate::layer::carries_key;
use crate::layer::set::{Minted, Own};

/// What is decided and counted over one call.
pub(super) struct Call {
    pub(super) policy: Arc<Policy>,
    pub(super) max_retries: u32,
    pub(super) attempt_timeout: Option<Duration>,
    pub(super) deadline: Option<Instant>,
    /// Whether the request may be sent again although it may have been acted upon.
    safe: bool,
    /// Whether the request carries the key that a confirmation needs.
    is_keyed: bool,
    /// Which of its names the request had as it came.
    own: Own,
    minted: Minted,
    /// Attempts started.
    pub(super) attempts: u32,
    /// Whether any attempt may have reached the service.
    pub(super) reached: bool,
    /// Whether a refused stream was believed already.
    refused: bool,
    /// The wait before the last attempt.
    pub(super) wait: Duration,
    /// When the next attempt is due.
    pub(super) due: Option<Instant>,
    /// What pays for the next attempt. It returns to the budget if the call is dropped first.
    pub(super) withdrawal: Option<Withdrawal>,
}

impl Call {
    /// A call that was not begun yet, by a policy and what the request's extensions put in its place.
    #[inline(always)]
    pub(super) fn new(policy: Arc<Policy>, extensions: &Extensions) -> Self {
        let max_retries = extensions
            .get::<MaxRetries>()
            .map_or(policy.max_retries, |max| max.0);
        let attempt_timeout = extensions
            .get::<AttemptTimeout>()
            .map(|timeout| timeout.0)
            .or(policy.attempt_timeout);
        let deadline = extensions
            .get::<Deadline>()
            .map(|deadline| deadline.0)
            .or(policy.deadline)
            // A deadline beyond what a clock can hold is none.
            .and_then(|deadline| Instant::now().checked_add(deadline));
        Self {
            policy,
            max_retries,
            attempt_timeout,
            deadline,
            safe: false,
            is_keyed: false,
            own: Own::default(),
            minted: Minted::default(),
            attempts: 1,
            reached: false,
            refused: false,
            wait: Duration::ZERO,
            due: None,
            withdrawal: None,
        }
    }

    /// Begins the first attempt: keeps the headers of its request, names it, and finds out whether it may be sent again
    /// whatever becomes of it.
    #[inline]
    pub(super) fn begin<B>(
        &mut self,
        request: &mut Request<B>,
        mut kept: Option<&mut KeptHeaders>,
    ) {
        let policy = &*self.policy;
        if let Some(kept) = &mut kept {
            kept.reserve(request.headers());
        }
        let is_keyed = match &policy.around {
            // The usual case, in one look at each header.
            Some(around) if around.is_usual => {
                for (name, value) in request.headers() {
                    self.own.note(&around.names, name, value);
                    if let Some(kept) = &mut kept {
                        kept.keep(name, value);
                    }
                }
                let is_written = around.names.fill(request, self.own, &mut self.minted);
                // A key that is written here is never blank.
                self.is_keyed = is_written || self.own.is_keyed;
                self.is_keyed
            }
            around => {
                if let Some(kept) = kept {
                    for (name, value) in request.headers() {
                        kept.keep(name, value);
                    }
                }
                if let Some(around) = around {
                    around.names.set(request, &mut self.minted);
                    self.is_keyed = carries_key(request.headers(), around.confirm.key_header());
                }
                carries_key(request.headers(), &policy.key_header)
            }
        };
        self.safe = delivery::safe_to_send_again(request, is_keyed);
        self.number(request);
    }

    /// Begins a further attempt, with a request that is as the first one was before it was named.
    pub(super) fn begin_again<B>(&mut self, request: &mut Request<B>) {
        self.attempts += 1;
        if let Some(withdrawal) = self.withdrawal.take() {
            withdrawal.spend();
        }
        match &self.policy.around {
            Some(around) if around.is_usual => {
                around.names.fill(request, self.own, &mut self.minted);
            }
            Some(around) => around.names.set(request, &mut self.minted),
            None => {}
        }
        self.number(request);
    }

    /// Ends the call with a response: notes the attempts on it, if there was more than one, and what it confirms.
    #[inline]
    pub(super) fn end<R>(&self, response: &mut Response<R>) {
        if self.attempts > 1 {
            response
                .extensions_mut()
                .insert(Attempts::new(self.attempts));
        }
        if self.is_keyed
            && let Some(around) = &self.policy.around
        {
            around.confirm.confirm(response);
        }
    }

    /// Takes note of what an attempt's error proves, and tells whether it proves that the attempt was never sent.
    pub(super) fn never_sent(&mut self, proof: Proof) -> bool {
        let never_sent = match proof {
            Proof::NeverSent => true,
            Proof::Refused => !std::mem::replace(&mut self.refused, true),
            Proof::Nothing => false,
        };
        self.reached |= !never_sent;
        never_sent
    }

    /// Whether the whole call is out of time. Without a deadline the clock is not asked.
    pub(super) fn is_past_deadline(&self) -> bool {
        self.deadline
            .is_some_and(|deadline| Instant::now() >= deadline)
    }

    /// Returns when `limit` from now, or the deadline if that is sooner, is reached; `None` is never.
    pub(super) fn no_later_than_deadline(&self, limit: Duration) -> Option<Instant> {
        match (Instant::now().checked_add(limit), self.deadline) {
            (Some(limit), Some(deadline)) => Some(limit.min(deadline)),
            (limit, deadline) => limit.or(deadline),
        }
    }

    /// Writes the attempt's number into its request, if that is asked for.
    fn number<B>(&self, request: &mut Request<B>) {
        if let Some(name) = &self.policy.attempt_header {
            // A map that is full takes no more headers; the request is more important than its number.
            let _ = request
                .headers_mut()
                .try_insert(name.clone(), HeaderValue::from(self.attempts));
        }
    }

    pub(super) fn delivery(&self) -> Delivery {
        if self.reached {
            Delivery::Unknown
        } else {
            Delivery::NeverSent
        }
    }

    /// Decides whether another attempt follows `outcome`, and if so sets when it is due and returns its body.
    pub(super) fn next<B: Replay>(
        &mut self,
        kept: Option<&Kept<B>>,
        outcome: &AttemptOutcome<'_>,
        never_sent: bool,
    ) -> Option<B> {
        let next = self.decide(kept, outcome, never_sent);
        let event = AttemptEvent {
            attempt: self.attempts,
            outcome: *outcome,
            retry_in: next.as_ref().map(|_| self.wait),
        };
        event.trace();
        if let Some(observer) = &self.policy.observer {
            observer(&event);
        }
        next
    }

    fn decide<B: Replay>(
        &mut self,
        kept: Option<&Kept<B>>,
        outcome: &AttemptOutcome<'_>,
        never_sent: bool,
    ) -> Option<B> {
        // The gate. Nothing below can open it.
        if !(self.safe || never_sent) {
            return None;
        }
        if self.attempts > self.max_retries || self.policy.classify(outcome) == Verdict::Stop {
            return None;
        }
        let wait = self.wait_after(outcome)?;
        let due = Instant::now().checked_add(wait)?;
        if self.deadline.is_some_and(|deadline| due >= deadline) {
            return None;
        }
        let body = kept?.body()?;
        // Taken now, so that the response is given up only for a retry that will be sent.
        if let Some(budget) = &self.policy.budget {
            self.withdrawal = Some(budget.withdraw()?);
        }
        self.wait = wait;
        self.due = Some(due);
        Some(body)
    }

    /// Returns the wait before the next attempt; `None` if the service asks for a longer one than is allowed.
    fn wait_after(&self, outcome: &AttemptOutcome<'_>) -> Option<Duration> {
        let Policy {
            backoff,
            random,
            max_retry_after,
            ..
        } = &*self.policy;
        let wait = backoff.wait(self.attempts - 1, self.wait, random);
        let floor = match outcome {
            AttemptOutcome::Answered(head) => retry_after(head.headers),
            AttemptOutcome::Failed(_) | AttemptOutcome::TimedOut => None,
        };
        match floor {
            Some(floor) if floor > *max_retry_after => None,
            // Jitter only adds to what the service asks for.
            Some(floor) => Some(wait.max(floor.saturating_add(random.up_to(wait / 4)))),
            None => Some(wait),
        }
    }
}
