//! Which failures are worth another attempt. Whether one is *safe* is not decided here.

use std::error::Error;
use std::fmt;
use std::time::{Duration, SystemTime};

use http::header::RETRY_AFTER;
use http::{HeaderMap, Method, StatusCode, Uri};

use super::Delivery;
use crate::layer::{ResponseHead, Shown};

/// How one attempt ended.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub enum AttemptOutcome<'a> {
    /// The service answered.
    Answered(ResponseHead<'a>),
    /// The service failed with an error.
    Failed(&'a (dyn Error + 'static)),
    /// The attempt timeout passed.
    TimedOut,
}

/// An attempt that ended, as a classifier sees it.
#[derive(Clone, Copy)]
#[non_exhaustive]
pub struct Attempt<'a> {
    /// The attempt's number within the call; the first is 1.
    pub number: u32,
    /// The request's method.
    pub method: &'a Method,
    /// The request's URI, as the retry layer received it.
    pub uri: &'a Uri,
    /// How it ended.
    pub outcome: AttemptOutcome<'a>,
    /// What is known about its delivery.
    pub delivery: Delivery,
    /// Whether the client reports that no attempt can succeed; see
    /// [`Failure::Permanent`](crate::layer::Failure::Permanent).
    pub permanent: bool,
}

impl fmt::Debug for Attempt<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Attempt")
            .field("number", &self.number)
            .field("method", self.method)
            .field("uri", &Shown(self.uri))
            .field("outcome", &self.outcome)
            .field("delivery", &self.delivery)
            .field("permanent", &self.permanent)
            .finish()
    }
}

/// A classifier's judgement of an attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Verdict {
    /// Another attempt may succeed.
    Retry,
    /// Another attempt may succeed, but not before this time. It replaces `Retry-After` and the
    /// backoff. Like `Retry-After` it is a floor: up to a quarter of it is added, and a wait above
    /// [`max_retry_after`](super::RetryLayer::max_retry_after) ends the call.
    RetryAfter(Duration),
    /// The outcome is final.
    Stop,
}

/// Decides which outcomes are worth another attempt.
///
/// A classifier can only request a retry. The layer sends again only what is safe to send again.
/// Any `Fn(&Attempt<'_>) -> Verdict` is a classifier.
///
/// ```
/// use std::time::Duration;
///
/// use aegis_hitl::layer::{Attempt, AttemptOutcome, Classify, RetryLayer, Standard, Verdict};
///
/// // Like the standard, but 500 is final for uploads, and this service sends its wait in
/// // milliseconds.
/// let layer = RetryLayer::new().classify(|attempt: &Attempt<'_>| match attempt.outcome {
///     AttemptOutcome::Answered(head) if head.status == 500 && attempt.uri.path() == "/upload" => {
///         Verdict::Stop
///     }
///     AttemptOutcome::Answered(head) if head.status == 429 => {
///         let wait = head.headers.get("retry-after-ms");
///         let wait = wait.and_then(|wait| wait.to_str().ok()?.parse().ok());
///         wait.map_or(Verdict::Stop, |wait| Verdict::RetryAfter(Duration::from_millis(wait)))
///     }
///     _ => Standard.classify(attempt),
/// });
/// ```
pub trait Classify: Send + Sync {
    /// Judges one attempt.
    fn classify(&self, attempt: &Attempt<'_>) -> Verdict;
}

impl<F> Classify for F
where
    F: Fn(&Attempt<'_>) -> Verdict + Send + Sync,
{
    fn classify(&self, attempt: &Attempt<'_>) -> Verdict {
        self(attempt)
    }
}

/// The default. Retries 5xx and 408; 409 and 429 with a `Retry-After`; transport errors that are
/// not permanent; and attempt timeouts.
///
/// A 409 with `Retry-After` means that the first call with this key is still in flight ([IETF
/// draft], section 2.7). Without it, the call is done.
///
/// [IETF draft]: https://datatracker.ietf.org/doc/draft-ietf-httpapi-idempotency-key-header/
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
#[allow(clippy::exhaustive_structs)]
pub struct Standard;

impl Classify for Standard {
    fn classify(&self, attempt: &Attempt<'_>) -> Verdict {
        let worth_it = match &attempt.outcome {
            AttemptOutcome::Answered(head) => match head.status {
                StatusCode::REQUEST_TIMEOUT => true,
                StatusCode::CONFLICT | StatusCode::TOO_MANY_REQUESTS => {
                    head.headers.contains_key(RETRY_AFTER)
                }
                status => status.is_server_error(),
            },
            AttemptOutcome::Failed(_) | AttemptOutcome::TimedOut => !attempt.permanent,
        };
        if worth_it {
            Verdict::Retry
        } else {
            Verdict::Stop
        }
    }
}

/// For gRPC. Retries calls that fail immediately with `UNAVAILABLE`, and everything that
/// [`Standard`] retries.
///
/// A server that fails immediately sends the status in the head, without a body (*Trailers-Only*).
/// `grpc-retry-pushback-ms` follows [gRFC A6]: a number is the wait, anything else forbids a retry.
/// A status in trailers after a body is not seen. By then the answer has been passed on, and
/// waiting for its end would delay every streaming response.
///
/// gRPC calls are POST. Without a key or [`SafeToRetry`](super::SafeToRetry), only what was never
/// sent is sent again.
///
/// ```
/// use aegis_hitl::layer::{AegisLayer, ClassifyGrpc, RetryLayer};
///
/// let layer = AegisLayer::new().retry(RetryLayer::new().classify(ClassifyGrpc));
/// ```
///
/// [gRFC A6]: https://github.com/grpc/proposal/blob/master/A6-client-retries.md
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
#[allow(clippy::exhaustive_structs)]
pub struct ClassifyGrpc;

impl Classify for ClassifyGrpc {
    fn classify(&self, attempt: &Attempt<'_>) -> Verdict {
        const UNAVAILABLE: &[u8] = b"14";
        let AttemptOutcome::Answered(head) = &attempt.outcome else {
            return Standard.classify(attempt);
        };
        let Some(status) = head.headers.get("grpc-status") else {
            return Standard.classify(attempt);
        };
        if status.as_bytes() != UNAVAILABLE {
            return Verdict::Stop;
        }
        let Some(pushback) = head.headers.get("grpc-retry-pushback-ms") else {
            return Verdict::Retry;
        };
        match pushback.to_str().ok().and_then(|wait| wait.parse().ok()) {
            Some(wait) => Verdict::RetryAfter(Duration::from_millis(wait)),
            None => Verdict::Stop,
        }
    }
}

/// Reads `Retry-After` (RFC 9110, section 10.2.3): seconds or a date. A date in the past means now.
/// Some services send a fraction of a second; it is read too, so that a wait is not cut short. A
/// malformed value is `None`.
pub(in crate::layer) fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let value = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    let (whole, fraction) = value.split_once('.').unwrap_or((value, "0"));
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    if is_number(whole) && is_number(fraction) {
        // More digits than fit mean a wait beyond every cap.
        let whole = Duration::from_secs(whole.parse().unwrap_or(u64::MAX));
        let fraction = format!("0.{fraction}").parse().unwrap_or_default();
        return Some(whole.saturating_add(Duration::from_secs_f64(fraction)));
    }
    let date = httpdate::parse_http_date(value).ok()?;
    Some(
        date.duration_since(SystemTime::now())
            .unwrap_or(Duration::ZERO),
    )
}

#[cfg(test)]
mod properties;

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn parsed(value: &str) -> Option<Duration> {
        let mut headers = HeaderMap::new();
        headers.insert(RETRY_AFTER, HeaderValue::from_str(value).unwrap());
        retry_after(&headers)
    }

    #[test]
    fn seconds_are_read_however_many() {
        assert_eq!(parsed("0"), Some(Duration::ZERO));
        assert_eq!(parsed("120"), Some(Duration::from_secs(120)));
        assert_eq!(
            parsed("99999999999999999999999"),
            Some(Duration::from_secs(u64::MAX))
        );
    }

    #[test]
    fn a_fraction_of_a_second_is_a_floor_too() {
        assert_eq!(parsed("1.5"), Some(Duration::from_millis(1500)));
        assert_eq!(parsed("0.25"), Some(Duration::from_millis(250)));
        let long = format!("{}.{}", "9".repeat(40), "9".repeat(40));
        assert!(parsed(&long) >= Some(Duration::from_secs(u64::MAX)));
    }

    #[test]
    fn a_past_date_means_now_and_a_future_one_its_distance() {
        assert_eq!(
            parsed("Sun, 06 Nov 1994 08:49:37 GMT"),
            Some(Duration::ZERO)
        );
        let date = httpdate::fmt_http_date(SystemTime::now() + Duration::from_secs(100));
        let wait = parsed(&date).unwrap();
        assert!(
            wait > Duration::from_secs(90) && wait <= Duration::from_secs(100),
            "{wait:?}"
        );
    }

    #[test]
    fn a_malformed_value_is_no_wait() {
        for value in [
            "",
            "-1",
            ".5",
            "1.",
            "1.5.2",
            "1s",
            "soon",
            "+3",
            "Sun, 99 Nov 1994 08:49:37 GMT",
        ] {
            assert_eq!(parsed(value), None, "{value}");
        }
        assert_eq!(retry_after(&HeaderMap::new()), None);
    }

    #[test]
    fn the_standard_retries_what_its_doc_says() {
        let plain = HeaderMap::new();
        let mut waiting = HeaderMap::new();
        waiting.insert(RETRY_AFTER, HeaderValue::from_static("1"));
        for code in 100..600 {
            let status = StatusCode::from_u16(code).unwrap();
            for headers in [&plain, &waiting] {
                let expected = code >= 500
                    || code == 408
                    || (matches!(code, 409 | 429) && !headers.is_empty());
                let verdict = Standard.classify(&answered(status, headers));
                assert_eq!(verdict == Verdict::Retry, expected, "{code} {headers:?}");
            }
        }
    }

    fn attempt<'a>(outcome: AttemptOutcome<'a>, uri: &'a Uri) -> Attempt<'a> {
        Attempt {
            number: 1,
            method: &Method::POST,
            uri,
            outcome,
            delivery: Delivery::Answered,
            permanent: false,
        }
    }

    fn answered(status: StatusCode, headers: &HeaderMap) -> Attempt<'_> {
        static ANY: std::sync::LazyLock<Uri> = std::sync::LazyLock::new(Uri::default);
        let head = ResponseHead { status, headers };
        attempt(AttemptOutcome::Answered(head), &ANY)
    }

    #[test]
    fn the_standard_does_not_try_again_what_can_never_succeed() {
        let uri = Uri::default();
        let mut failed = attempt(AttemptOutcome::Failed(&std::fmt::Error), &uri);
        assert_eq!(Standard.classify(&failed), Verdict::Retry);
        failed.permanent = true;
        assert_eq!(Standard.classify(&failed), Verdict::Stop);
        assert_eq!(ClassifyGrpc.classify(&failed), Verdict::Stop);
    }

    #[test]
    fn grpc_retries_unavailable_in_the_head_and_heeds_pushback() {
        for (status, pushback, expected) in [
            (None, None, Verdict::Stop),
            (Some("0"), None, Verdict::Stop),
            (Some("14"), None, Verdict::Retry),
            (
                Some("14"),
                Some("1500"),
                Verdict::RetryAfter(Duration::from_millis(1500)),
            ),
            (Some("14"), Some("0"), Verdict::RetryAfter(Duration::ZERO)),
            (Some("14"), Some("-1"), Verdict::Stop),
            (Some("14"), Some("soon"), Verdict::Stop),
            (Some("13"), Some("10"), Verdict::Stop),
        ] {
            let mut headers = HeaderMap::new();
            for (name, value) in [
                ("grpc-status", status),
                ("grpc-retry-pushback-ms", pushback),
            ] {
                if let Some(value) = value {
                    headers.insert(name, HeaderValue::from_static(value));
                }
            }
            let verdict = ClassifyGrpc.classify(&answered(StatusCode::OK, &headers));
            assert_eq!(verdict, expected, "{status:?} {pushback:?}");
        }
    }
}
