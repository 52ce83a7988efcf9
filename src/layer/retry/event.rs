//! What observers are told.

use std::time::Duration;

use super::AttemptOutcome;

/// The end of one attempt.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct AttemptEvent<'a> {
    /// The attempt's number; the first is 1.
    pub attempt: u32,
    /// How it ended.
    pub outcome: AttemptOutcome<'a>,
    /// How long until the next attempt; `None` if this was the last.
    pub retry_in: Option<Duration>,
}

impl AttemptEvent<'_> {
    /// Emits the event. The cause is a word or a status: an error's own text may hold a URL, and that a secret.
    #[cfg(feature = "tracing")]
    pub(super) fn trace(&self) {
        const TARGET: &str = "aegis_hitl::retry";

        let Self {
            attempt,
            outcome,
            retry_in,
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
        match retry_in {
            Some(delay) => {
                tracing::debug!(target: TARGET, attempt, cause, status, ?delay, "attempt failed, another follows");
            }
            None if status.is_none_or(|status| status >= 400) => {
                tracing::debug!(target: TARGET, attempt, cause, status, "last attempt failed");
            }
            None => tracing::trace!(target: TARGET, attempt, cause, status, "attempt succeeded"),
        }
    }

    #[cfg(not(feature = "tracing"))]
    #[allow(clippy::unused_self)]
    pub(super) fn trace(&self) {}
}
