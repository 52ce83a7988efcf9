//! What observers receive.

use std::fmt;
use std::time::Duration;

use http::{Method, Uri};

use super::{AttemptOutcome, Delivery, NotRetried};
use crate::layer::Shown;

/// The end of one attempt.
#[derive(Clone, Copy)]
#[non_exhaustive]
pub struct AttemptEvent<'a> {
    /// The attempt's number; the first is 1.
    pub attempt: u32,
    /// The request's method.
    pub method: &'a Method,
    /// The request's URI. Its query may contain secrets; do not log it.
    pub uri: &'a Uri,
    /// How it ended.
    pub outcome: AttemptOutcome<'a>,
    /// What is known about the delivery of this attempt.
    pub delivery: Delivery,
    /// The time until the next attempt, or `None` if this was the last one.
    pub retry_in: Option<Duration>,
    /// Why no other attempt follows, or `None` if one does.
    pub not_retried: Option<NotRetried>,
    /// The time that the call has taken so far.
    pub elapsed: Duration,
}

impl fmt::Debug for AttemptEvent<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AttemptEvent")
            .field("attempt", &self.attempt)
            .field("method", self.method)
            .field("uri", &Shown(self.uri))
            .field("outcome", &self.outcome)
            .field("delivery", &self.delivery)
            .field("retry_in", &self.retry_in)
            .field("not_retried", &self.not_retried)
            .field("elapsed", &self.elapsed)
            .finish()
    }
}

#[cfg(feature = "tracing")]
const TARGET: &str = "aegis_hitl::retry";

/// Whether anything listens to the failures that [`AttemptEvent::trace`] emits.
#[cfg(feature = "tracing")]
pub(super) fn is_traced() -> bool {
    tracing::enabled!(target: TARGET, tracing::Level::DEBUG)
}

#[cfg(not(feature = "tracing"))]
pub(super) fn is_traced() -> bool {
    false
}

impl AttemptEvent<'_> {
    /// Emits the event. The cause is a word or a status, because an error's text may contain a URL,
    /// and that a secret. For the same reason user, query and key are left out.
    #[cfg(feature = "tracing")]
    pub(super) fn trace(&self) {
        let Self {
            attempt,
            method,
            uri,
            outcome,
            delivery,
            retry_in,
            not_retried,
            elapsed,
        } = self;
        let status = match outcome {
            AttemptOutcome::Answered(head) => Some(head.status.as_u16()),
            AttemptOutcome::Failed(_) | AttemptOutcome::TimedOut => None,
        };
        let cause = match outcome {
            AttemptOutcome::Answered(_) => "answered",
            AttemptOutcome::Failed(_) => "failed",
            AttemptOutcome::TimedOut => "timed out",
        };
        let (host, path) = (uri.host(), uri.path());
        match (retry_in, not_retried) {
            (Some(delay), _) => {
                tracing::debug!(target: TARGET, attempt, cause, status, %delivery, %method, host, path, ?elapsed, ?delay, "attempt failed, another follows");
            }
            (None, reason) if status.is_none_or(|status| status >= 400) => {
                let reason = reason.map(tracing::field::display);
                tracing::debug!(target: TARGET, attempt, cause, status, %delivery, %method, host, path, ?elapsed, reason, "last attempt failed");
            }
            (None, _) => {
                tracing::trace!(target: TARGET, attempt, cause, status, %method, host, path, "attempt succeeded");
            }
        }
    }

    #[cfg(not(feature = "tracing"))]
    #[allow(clippy::unused_self)]
    pub(super) fn trace(&self) {}
}
