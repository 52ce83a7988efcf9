//! Which failures are worth another attempt. Whether another attempt is *safe* is not decided here.

use std::error::Error;
use std::time::{Duration, SystemTime};

use http::header::RETRY_AFTER;
use http::{HeaderMap, StatusCode};

use crate::layer::ResponseHead;

/// How one attempt ended.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub enum AttemptOutcome<'a> {
    /// The service answered.
    Answered(ResponseHead<'a>),
    /// The service failed.
    Failed(&'a (dyn Error + 'static)),
    /// The attempt timeout passed.
    TimedOut,
}

/// What a classifier says of an outcome.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(clippy::exhaustive_enums)]
pub enum Verdict {
    /// Another attempt may do better.
    Retry,
    /// The outcome stands.
    Stop,
}

/// Says which outcomes are worth another attempt.
///
/// A classifier can only ask for a retry. The layer sends again only what is safe to send again, whatever the classifier
/// says. Any `Fn(&AttemptOutcome<'_>) -> Verdict` is a classifier.
///
/// ```
/// use aegis_hitl::layer::{Classify, AttemptOutcome, RetryLayer, Standard, Verdict};
///
/// // As the standard, but this service's 500 is final.
/// let layer = RetryLayer::new().classify(|outcome: &AttemptOutcome<'_>| match outcome {
///     AttemptOutcome::Answered(head) if head.status == 500 => Verdict::Stop,
///     _ => Standard.classify(outcome),
/// });
/// ```
pub trait Classify: Send + Sync {
    /// Judges one outcome.
    fn classify(&self, outcome: &AttemptOutcome<'_>) -> Verdict;
}

impl<F> Classify for F
where
    F: Fn(&AttemptOutcome<'_>) -> Verdict + Send + Sync,
{
    fn classify(&self, outcome: &AttemptOutcome<'_>) -> Verdict {
        self(outcome)
    }
}

/// The default: retries 5xx and 408, 409 and 429 with a `Retry-After`, transport errors, and attempt timeouts.
///
/// A 409 with `Retry-After` says that the first call with this key is still in flight ([IETF draft], section 2.7); one
/// without says that it is done.
///
/// [IETF draft]: https://datatracker.ietf.org/doc/draft-ietf-httpapi-idempotency-key-header/
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
#[allow(clippy::exhaustive_structs)]
pub struct Standard;

impl Classify for Standard {
    fn classify(&self, outcome: &AttemptOutcome<'_>) -> Verdict {
        let worth_it = match outcome {
            AttemptOutcome::Answered(head) => match head.status {
                StatusCode::REQUEST_TIMEOUT => true,
                StatusCode::CONFLICT | StatusCode::TOO_MANY_REQUESTS => {
                    head.headers.contains_key(RETRY_AFTER)
                }
                status => status.is_server_error(),
            },
            AttemptOutcome::Failed(_) | AttemptOutcome::TimedOut => true,
        };
        if worth_it {
            Verdict::Retry
        } else {
            Verdict::Stop
        }
    }
}

/// Reads `Retry-After` (RFC 9110, section 10.2.3): seconds, or a date, which if past means now. A malformed value is `None`.
pub(super) fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let value = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    if !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_digit()) {
        // More digits than fit are a wait beyond every cap.
        return Some(Duration::from_secs(value.parse().unwrap_or(u64::MAX)));
    }
    let date = httpdate::parse_http_date(value).ok()?;
    Some(
        date.duration_since(SystemTime::now())
            .unwrap_or(Duration::ZERO),
    )
}

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
            "1.5",
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
                let verdict =
                    Standard.classify(&AttemptOutcome::Answered(ResponseHead { status, headers }));
                assert_eq!(verdict == Verdict::Retry, expected, "{code} {headers:?}");
            }
        }
    }
}
