//! Why a call under the retry layer failed, and what is known about its delivery.

use std::error::Error as StdError;
use std::fmt;
use std::time::Duration;

use http::Response;

use super::Delivery;
use crate::protocol::{BoxError, IdempotencyKey, RequestId};

/// Why a call was not retried.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum NotRetried {
    /// The classifier considered the outcome final.
    Verdict,
    /// The client reported that no attempt can succeed.
    Permanent,
    /// The request may have been acted upon, and is neither idempotent, keyed, nor declared safe.
    Unsafe,
    /// All attempts were used.
    Attempts,
    /// The body cannot be sent again.
    Body,
    /// The service requested a longer wait than allowed.
    RetryAfter,
    /// The next attempt would have come after the deadline, or the deadline passed.
    Deadline,
    /// The budget of retries was exhausted.
    Budget,
}

impl fmt::Display for NotRetried {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Verdict => "not worth it",
            Self::Permanent => "permanent",
            Self::Unsafe => "not safe",
            Self::Attempts => "no attempts left",
            Self::Body => "body not replayable",
            Self::RetryAfter => "asked to wait too long",
            Self::Deadline => "deadline",
            Self::Budget => "budget spent",
        })
    }
}

impl NotRetried {
    /// Returns why a response that reports a failure is the last one. `None` if it is a success, or
    /// if no classifier would have requested another attempt.
    pub fn of<B>(response: &Response<B>) -> Option<Self> {
        response.extensions().get::<Attempts>()?.not_retried
    }
}

/// Why a call failed, after how many attempts, and what is known about its delivery.
///
/// The inner service's error is the [`source`](StdError::source). To repeat *this very call*, send
/// it with the same [`idempotency_key`](Self::idempotency_key) and
/// [`request_id`](Self::request_id).
pub struct RetryError {
    inner: Box<Inner>,
}

struct Inner {
    kind: Kind,
    report: Report,
}

/// What is reported about a failed call besides its error.
#[derive(Debug)]
pub(super) struct Report {
    pub(super) attempts: u32,
    pub(super) delivery: Delivery,
    pub(super) not_retried: Option<NotRetried>,
    pub(super) key: Option<IdempotencyKey>,
    pub(super) request_id: Option<RequestId>,
}

enum Kind {
    Failed(BoxError),
    AttemptTimedOut(Duration),
    DeadlineExceeded,
}

impl RetryError {
    fn new(kind: Kind, report: Report) -> Self {
        let inner = Box::new(Inner { kind, report });
        Self { inner }
    }

    /// The service was not ready for a first attempt.
    pub(super) fn not_ready(error: BoxError) -> Self {
        Self::failed(
            error,
            Report {
                attempts: 0,
                delivery: Delivery::NeverSent,
                not_retried: None,
                key: None,
                request_id: None,
            },
        )
    }

    pub(super) fn failed(error: BoxError, report: Report) -> Self {
        Self::new(Kind::Failed(error), report)
    }

    pub(super) fn attempt_timed_out(after: Duration, report: Report) -> Self {
        Self::new(Kind::AttemptTimedOut(after), report)
    }

    pub(super) fn deadline_exceeded(report: Report) -> Self {
        Self::new(Kind::DeadlineExceeded, report)
    }

    /// Returns the number of attempts started, including those of retries below. It is 0 if the
    /// service was never ready.
    pub fn attempts(&self) -> u32 {
        self.inner.report.attempts
    }

    /// Returns the worst that is known about the delivery of all attempts.
    ///
    /// [`Delivery::Answered`] means that every attempt was answered or never sent, and that the
    /// call then ran out of time, or lost its service, before the next one.
    pub fn delivery(&self) -> Delivery {
        self.inner.report.delivery
    }

    /// Returns why no other attempt was made. `None` if the service failed to become ready for it.
    pub fn not_retried(&self) -> Option<NotRetried> {
        self.inner.report.not_retried
    }

    /// Returns the idempotency key of the attempts, given or minted, if there was one.
    pub fn idempotency_key(&self) -> Option<&IdempotencyKey> {
        self.inner.report.key.as_ref()
    }

    /// Returns the `X-Request-Id` of the attempts, given or minted, if there was one.
    pub fn request_id(&self) -> Option<&RequestId> {
        self.inner.report.request_id.as_ref()
    }

    /// Whether the last attempt or the whole call ran out of time.
    pub fn is_timeout(&self) -> bool {
        !matches!(self.inner.kind, Kind::Failed(_))
    }

    /// Whether the whole call ran out of time.
    pub fn is_deadline_exceeded(&self) -> bool {
        matches!(self.inner.kind, Kind::DeadlineExceeded)
    }

    /// Returns the inner service's error, or `None` if the call ran out of time.
    pub fn into_inner(self) -> Option<BoxError> {
        match self.inner.kind {
            Kind::Failed(error) => Some(error),
            Kind::AttemptTimedOut(_) | Kind::DeadlineExceeded => None,
        }
    }
}

impl fmt::Display for RetryError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.inner.kind {
            Kind::Failed(_) => f.write_str("the request failed")?,
            Kind::AttemptTimedOut(after) => write!(f, "no answer within {after:?}")?,
            Kind::DeadlineExceeded => f.write_str("the deadline passed")?,
        }
        let (attempts, delivery) = (self.attempts(), self.delivery());
        let plural = if attempts == 1 { "" } else { "s" };
        write!(f, " (attempt{plural}: {attempts}, delivery: {delivery}")?;
        if let Some(reason) = self.not_retried() {
            write!(f, ", not tried again: {reason}")?;
        }
        f.write_str(")")
    }
}

impl fmt::Debug for RetryError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut f = f.debug_struct("RetryError");
        match &self.inner.kind {
            Kind::Failed(error) => f.field("source", error),
            Kind::AttemptTimedOut(after) => f.field("attempt_timed_out", after),
            Kind::DeadlineExceeded => f.field("deadline_exceeded", &true),
        };
        f.field("attempts", &self.attempts())
            .field("delivery", &self.delivery())
            .field("not_retried", &self.not_retried())
            .field("request_id", &self.request_id())
            .finish_non_exhaustive()
    }
}

impl StdError for RetryError {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        match &self.inner.kind {
            Kind::Failed(error) => Some(&**error),
            Kind::AttemptTimedOut(_) | Kind::DeadlineExceeded => None,
        }
    }
}

/// The attempts of a call. It is in the extensions of a response whose call took more than one
/// attempt, or failed and was worth another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Attempts {
    count: u32,
    earlier: Delivery,
    not_retried: Option<NotRetried>,
}

impl Attempts {
    pub(super) fn new(count: u32, earlier: Delivery, not_retried: Option<NotRetried>) -> Self {
        Self {
            count,
            earlier,
            not_retried,
        }
    }

    /// Returns the number of attempts that a response took, including those of retries below. It is
    /// 1 if the response has no record.
    pub fn of<B>(response: &Response<B>) -> u32 {
        response
            .extensions()
            .get::<Self>()
            .map_or(1, |attempts| attempts.count)
    }

    /// Returns what is known about the attempts before the one that was answered:
    /// [`Delivery::NeverSent`] if there were none, or if none can have reached the service.
    pub fn earlier<B>(response: &Response<B>) -> Delivery {
        response
            .extensions()
            .get::<Self>()
            .map_or(Delivery::NeverSent, |attempts| attempts.earlier)
    }
}
