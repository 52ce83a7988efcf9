//! Tower layers that make retries safe. They need no feature and depend on no HTTP client.
//!
//! From the outside in, as [`AegisLayer`] stacks them:
//!
//! 1. [`SetTenantLayer`], [`SetThreadLayer`], [`SetIdempotencyKeyLayer`] and [`SetRequestIdLayer`]
//!    write the headers that name the call. They stand outside of the retry, so that all attempts
//!    of a call carry the same values.
//! 2. [`ConfirmDuplicateLayer`] turns a 409 to a request with a key into a success. It stands
//!    inside the headers, because it must see the key, and outside of the retry, because it judges
//!    the last answer only.
//! 3. [`RetryLayer`] sends again what is safe to send again.
//! 4. [`TrackDeliveryLayer`], directly around the HTTP client, reports which requests never reached
//!    the service. It depends on the client, so it is not part of `AegisLayer`.
//! 5. The HTTP client.
//!
//! ```
//! use aegis_hitl::layer::{AegisLayer, Confirmation};
//! use aegis_hitl::{IdempotencyKey, TenantId, ThreadId};
//! use bytes::Bytes;
//! use http::{Request, Response};
//! use http_body_util::Full;
//! use tower::{ServiceBuilder, ServiceExt, service_fn};
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! // Any HTTP client that is a tower service stands here.
//! // This one has seen the key before.
//! let client = service_fn(|request: Request<Full<Bytes>>| async move {
//!     assert_eq!(request.headers()["idempotency-key"], "charge-order-42");
//!     Response::builder().status(409).body(Full::<Bytes>::default())
//! });
//!
//! let service = ServiceBuilder::new()
//!     .layer(
//!         AegisLayer::new()
//!             .tenant(TenantId::new("acme")?)
//!             .thread(ThreadId::new("run-7")?),
//!     )
//!     .service(client);
//!
//! let mut request = Request::post("http://localhost/charge").body(Full::default())?;
//! // A key that names the action. Under a minted one, a 409 to the first attempt is a conflict.
//! request.extensions_mut().insert(IdempotencyKey::new("charge-order-42")?);
//! let response = service.oneshot(request).await?;
//! assert!(response.status().is_success());
//! assert_eq!(Confirmation::of(&response), Some(Confirmation::Duplicate));
//! # Ok(())
//! # }
//! ```
//!
//! # Where other layers go
//!
//! - Limits (`tower::limit`, `tower::buffer`, load shedding) go **above** these layers. A
//!   concurrency limit below a retry can deadlock: the retry waits for a second permit while its
//!   caller holds the first one in a service that is ready.
//! - A timeout above bounds the whole call. [`RetryLayer::deadline`] does the same and also reports
//!   what is known about the delivery. [`RetryLayer::attempt_timeout`] bounds each attempt.
//! - Tracing above sees calls. Tracing below sees attempts.

mod aegis;
mod confirm;
mod delivery;
mod envelope;
mod replay_body;
mod retry;
mod set;

pub use self::aegis::{Aegis, AegisLayer};
pub use self::confirm::{ConfirmDuplicate, ConfirmDuplicateLayer, ConfirmFuture, Confirmation};
pub use self::delivery::{
    Delivery, Exchange, Failure, Judge, TrackDelivery, TrackDeliveryFuture, TrackDeliveryLayer,
};
#[cfg(feature = "hyper-util")]
pub use self::delivery::{HyperErrors, judge_hyper};
pub use self::replay_body::{Replay, ReplayBodies, ReplayBody, ReplayBodyError, ReplayBodyLayer};
pub use self::retry::{
    Attempt, AttemptEvent, AttemptOutcome, AttemptTimeout, Attempts, Backoff, Budget, Classify,
    ClassifyGrpc, Deadline, MaxRetries, NotRetried, Retry, RetryError, RetryFuture, RetryLayer,
    SafeToRetry, Standard, Verdict,
};
pub use self::set::{
    SetIdempotencyKey, SetIdempotencyKeyLayer, SetRequestId, SetRequestIdLayer, SetTenant,
    SetTenantLayer, SetThread, SetThreadLayer,
};

#[cfg(feature = "server")]
pub(crate) use self::retry::Random;

use std::fmt;
use std::time::Duration;

use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri};
use tokio::time::Instant;

/// The head of a request, for predicates and classifiers.
#[derive(Clone, Copy)]
#[non_exhaustive]
pub struct RequestHead<'a> {
    /// The method.
    pub method: &'a Method,
    /// The URI.
    pub uri: &'a Uri,
    /// The headers.
    pub headers: &'a HeaderMap,
}

/// The head of a response, for predicates and classifiers.
#[derive(Clone, Copy)]
#[non_exhaustive]
pub struct ResponseHead<'a> {
    /// The status.
    pub status: StatusCode,
    /// The headers.
    pub headers: &'a HeaderMap,
}

/// A URI in the form that may be logged: without user, password and query.
struct Shown<'a>(&'a Uri);

impl fmt::Debug for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let (Some(scheme), Some(host)) = (self.0.scheme_str(), self.0.host()) {
            write!(f, "{scheme}://{host}")?;
        }
        if let Some(port) = self.0.port() {
            write!(f, ":{port}")?;
        }
        f.write_str(self.0.path())
    }
}

impl fmt::Debug for RequestHead<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Headers are left out, as for responses: not every secret one is marked sensitive.
        f.debug_struct("RequestHead")
            .field("method", self.method)
            .field("uri", &Shown(self.uri))
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for ResponseHead<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResponseHead")
            .field("status", &self.status)
            .finish_non_exhaustive()
    }
}

impl<'a> ResponseHead<'a> {
    /// Borrows the head of a response.
    pub fn of<B>(response: &'a http::Response<B>) -> Self {
        Self {
            status: response.status(),
            headers: response.headers(),
        }
    }

    /// Reads `Retry-After` (RFC 9110, section 10.2.3): seconds, with an optional fraction, or a
    /// date. A date in the past means now. Returns `None` if the header is missing or malformed.
    pub fn retry_after(&self) -> Option<Duration> {
        retry::retry_after(self.headers)
    }
}

/// Returns the instant `limit` from now, or `None`, meaning never, if clocks and timers cannot
/// represent it.
pub(crate) fn after(limit: Duration) -> Option<Instant> {
    // Timers round up, so a clock's last instant is out of their range. Nobody waits for a century.
    const LONGEST: Duration = Duration::from_secs(100 * 365 * 24 * 3600);
    if limit > LONGEST {
        return None;
    }
    Instant::now().checked_add(limit)
}

/// Returns a header's first value. Comparing the name with a few others is faster than hashing it.
fn first_value<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a HeaderValue> {
    if headers.len() > 16 {
        return headers.get(name);
    }
    let mut lines = headers.iter();
    lines
        .find(|(other, _)| *other == name)
        .map(|(_, value)| value)
}

/// Whether a key is blank, which counts as no key. A key that begins as a quoted string but does
/// not end as one counts as blank too: a server that follows the IETF draft refuses it.
fn is_blank(key: &HeaderValue) -> bool {
    let key = key.as_bytes().trim_ascii();
    match key.strip_prefix(b"\"") {
        Some(rest) => rest
            .strip_suffix(b"\"")
            .is_none_or(|key| key.trim_ascii().is_empty()),
        None => key.is_empty(),
    }
}

/// Whether `headers` contain an idempotency key.
fn carries_key(headers: &HeaderMap, key_header: &HeaderName) -> bool {
    first_value(headers, key_header).is_some_and(|key| !is_blank(key))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_limit_of_more_than_a_century_is_none() {
        let century = Duration::from_secs(100 * 365 * 24 * 3600);
        for limit in [Duration::ZERO, Duration::from_secs(7), century] {
            assert_eq!(after(limit), Some(Instant::now() + limit), "{limit:?}");
        }
        for limit in [century + Duration::from_nanos(1), Duration::MAX] {
            assert_eq!(after(limit), None, "{limit:?}");
        }
    }

    #[test]
    fn heads_are_shown_without_what_may_be_secret() {
        let request = http::Request::post("https://user:secret@h:81/a?secret=1");
        let request = request.header("x-secret", "secret").body(()).unwrap();
        let head = RequestHead {
            method: request.method(),
            uri: request.uri(),
            headers: request.headers(),
        };
        assert_eq!(
            format!("{head:?}"),
            "RequestHead { method: POST, uri: https://h:81/a, .. }"
        );
        let response = http::Response::builder().status(503);
        let response = response.header("set-cookie", "secret").body(()).unwrap();
        let head = ResponseHead::of(&response);
        assert_eq!(format!("{head:?}"), "ResponseHead { status: 503, .. }");
    }

    #[test]
    fn a_classifier_reads_retry_after_from_the_head() {
        let response = |value: &'static str| {
            let response = http::Response::builder().header("retry-after", value);
            response.body(()).unwrap()
        };
        for (value, expected) in [("7", Some(Duration::from_secs(7))), ("soon", None)] {
            let response = response(value);
            assert_eq!(ResponseHead::of(&response).retry_after(), expected);
        }
    }
}
