//! Why a call under the retry layer failed, and what is known of its delivery.

use std::error::Error as StdError;
use std::fmt;
use std::time::Duration;

use http::Response;

use super::Delivery;

type BoxError = Box<dyn StdError + Send + Sync>;

/// Why a call failed, after how many attempts, and what is known of its delivery.
///
/// The inner service's own error is its [`source`](StdError::source).
pub struct RetryError {
    kind: Kind,
    attempts: u32,
    delivery: Delivery,
}

enum Kind {
    Failed(BoxError),
    AttemptTimedOut(Duration),
    DeadlineExceeded,
}

impl RetryError {
    pub(super) fn failed(error: BoxError, attempts: u32, delivery: Delivery) -> Self {
        Self {
            kind: Kind::Failed(error),
            attempts,
            delivery,
        }
    }

    pub(super) fn attempt_timed_out(after: Duration, attempts: u32, delivery: Delivery) -> Self {
        Self {
            kind: Kind::AttemptTimedOut(after),
            attempts,
            delivery,
        }
    }

    pub(super) fn deadline_exceeded(attempts: u32, delivery: Delivery) -> Self {
        Self {
            kind: Kind::DeadlineExceeded,
            attempts,
            delivery,
        }
    }

    /// Returns how many attempts were started; 0 if the service was never ready.
    pub fn attempts(&self) -> u32 {
        self.attempts
    }

    /// Returns what is known of the delivery, over all attempts.
    pub fn delivery(&self) -> Delivery {
        self.delivery
    }

    /// Whether the last attempt or the whole call ran out of time.
    pub fn is_timeout(&self) -> bool {
        !matches!(self.kind, Kind::Failed(_))
    }

    /// Whether the whole call ran out of time.
    pub fn is_deadline_exceeded(&self) -> bool {
        matches!(self.kind, Kind::DeadlineExceeded)
    }

    /// Returns the inner service's error, or `None` if the call ran out of time.
    pub fn into_inner(self) -> Option<BoxError> {
        match self.kind {
            Kind::Failed(error) => Some(error),
            Kind::AttemptTimedOut(_) | Kind::DeadlineExceeded => None,
        }
    }
}

impl fmt::Display for RetryError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.kind {
            Kind::Failed(_) => f.write_str("the request failed")?,
            Kind::AttemptTimedOut(after) => write!(f, "no answer within {after:?}")?,
            Kind::DeadlineExceeded => f.write_str("the deadline passed")?,
        }
        let plural = if self.attempts == 1 { "" } else { "s" };
        write!(
            f,
            " (attempt{plural}: {}, delivery: {})",
            self.attempts, self.delivery
        )
    }
}

impl fmt::Debug for RetryError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut f = f.debug_struct("RetryError");
        match &self.kind {
            Kind::Failed(error) => f.field("source", error),
            Kind::AttemptTimedOut(after) => f.field("attempt_timed_out", after),
            Kind::DeadlineExceeded => f.field("deadline_exceeded", &true),
        };
        f.field("attempts", &self.attempts)
            .field("delivery", &self.delivery)
            .finish()
    }
}

impl StdError for RetryError {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        match &self.kind {
            Kind::Failed(error) => Some(&**error),
            Kind::AttemptTimedOut(_) | Kind::DeadlineExceeded => None,
        }
    }
}

/// How many attempts a call took, in the extensions of the response to a call that took more than one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Attempts(u32);

impl Attempts {
    pub(super) fn new(attempts: u32) -> Self {
        Self(attempts)
    }

    /// Returns the attempts that a response took: 1 if nothing else is noted on it.
    pub fn of<B>(response: &Response<B>) -> u32 {
        response
            .extensions()
            .get::<Self>()
            .map_or(1, |attempts| attempts.0)
    }
}
