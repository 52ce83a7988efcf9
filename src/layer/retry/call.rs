//! One call: what is counted over its attempts, and whether another one follows.

use std::sync::Arc;
use std::time::Duration;

use http::{HeaderName, HeaderValue, Request};
use tokio::time::Instant;

use super::budget::Withdrawal;
use super::classify::retry_after;
use super::delivery::{self, Proof};
use super::kept::Kept;
use super::{AttemptEvent, AttemptOutcome, Delivery, Policy, Replay, Verdict};
use crate::layer::set::Minted;

/// What is decided and counted over one call.
pub(super) struct Call {
    pub(super) policy: Arc<Policy>,
    pub(super) max_retries: u32,
    pub(super) attempt_timeout: Option<Duration>,
    pub(super) deadline: Option<Instant>,
    /// Whether the request may be sent again although it may have been acted upon.
    safe: bool,
    /// Whether the key that it carries was written here.
    has_named_key: bool,
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
    pub(super) fn new(
        policy: Arc<Policy>,
        max_retries: u32,
        attempt_timeout: Option<Duration>,
        deadline: Option<Instant>,
    ) -> Self {
        Self {
            policy,
            max_retries,
            attempt_timeout,
            deadline,
            safe: false,
            has_named_key: false,
            attempts: 1,
            reached: false,
            refused: false,
            wait: Duration::ZERO,
            due: None,
            withdrawal: None,
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

    /// Names the first attempt, and finds out whether it may be sent again whatever becomes of it.
    pub(super) fn name<B>(&mut self, request: &mut Request<B>, minted: &mut Minted) {
        if let Some(names) = &self.policy.names {
            self.has_named_key = names.write(request, minted);
        }
        self.safe = delivery::safe_to_send_again(request, &self.policy.key_header);
    }

    /// The header of the key that was written here; such a key is never blank.
    pub(super) fn named_key(&self) -> Option<&HeaderName> {
        let names = self.policy.names.as_ref()?;
        self.has_named_key.then(|| names.key_header())
    }

    /// Writes the attempt's number into its request, if that is asked for.
    pub(super) fn number<B>(&self, request: &mut Request<B>) {
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
