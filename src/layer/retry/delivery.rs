//! What is known of a request's delivery, and whether it is safe to send again. Both are decided here and nowhere else.

use std::error::Error;
use std::fmt;

use http::Method;

use super::{RetryError, SafeToRetry};

/// What is known of a request's delivery.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(clippy::exhaustive_enums)]
pub enum Delivery {
    /// No byte of the request reached the service in any attempt: it has certainly not been acted upon.
    NeverSent,
    /// The request may have been acted upon.
    Unknown,
    /// The service answered.
    Answered,
}

impl fmt::Display for Delivery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::NeverSent => "never sent",
            Self::Unknown => "unknown",
            Self::Answered => "answered",
        })
    }
}

/// Marks an error as proof that the request was never sent.
///
/// The layer knows the errors of hyper and hyper-util (feature `client`). An adapter to another client wraps the errors that
/// prove it there: a connect that failed, a request handed back unstarted. A timeout is no proof, unless of the connect.
#[derive(Debug)]
pub struct NeverSent {
    source: Box<dyn Error + Send + Sync>,
}

impl NeverSent {
    /// Wraps an error that proves that no byte of the request was sent.
    pub fn new(error: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self {
            source: error.into(),
        }
    }
}

impl fmt::Display for NeverSent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the request was never sent")
    }
}

impl Error for NeverSent {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        Some(&*self.source)
    }
}

/// What an error proves of one attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Proof {
    /// Nothing: the request may have been acted upon.
    Nothing,
    /// The request was never sent.
    NeverSent,
    #[cfg_attr(not(feature = "client"), expect(dead_code))]
    /// The peer refused the stream before any processing (RFC 9113, section 8.7). It is believed once a call.
    Refused,
}

/// Looks through an error and its sources for a proof.
///
/// Downcasts need the very versions of hyper and h2 that this crate uses, and fail silently with others. That errs on the
/// safe side, and the tests provoke each of these with a real peer.
pub(super) fn proof(error: &(dyn Error + 'static)) -> Proof {
    let mut next = Some(error);
    // Chains are short; the bound keeps one that loops from hanging the call.
    for _ in 0..32 {
        let Some(error) = next else { break };
        if error.is::<NeverSent>() {
            return Proof::NeverSent;
        }
        // A retry below this one speaks for all of its attempts; its source is the last one's error only.
        if let Some(error) = error.downcast_ref::<RetryError>() {
            return match error.delivery() {
                Delivery::NeverSent => Proof::NeverSent,
                Delivery::Unknown | Delivery::Answered => Proof::Nothing,
            };
        }
        #[cfg(feature = "client")]
        if let Some(proof) = proof_of_hyper(error) {
            return proof;
        }
        next = error.source();
    }
    Proof::Nothing
}

#[cfg(feature = "client")]
fn proof_of_hyper(error: &(dyn Error + 'static)) -> Option<Proof> {
    if let Some(error) = error.downcast_ref::<hyper_util::client::legacy::Error>() {
        return error.is_connect().then_some(Proof::NeverSent);
    }
    if let Some(error) = error.downcast_ref::<hyper::Error>() {
        // hyper says canceled only of a request that it hands back unstarted. `IncompleteMessage` is no proof: the request
        // was written and the service may have acted upon it.
        if error.is_canceled() {
            return Some(Proof::NeverSent);
        }
        // What lies under an error of the request's own body is another exchange's, as of a body that is passed on.
        return error.is_user().then_some(Proof::Nothing);
    }
    if let Some(error) = error.downcast_ref::<h2::Error>() {
        let refused = error.is_reset()
            && error.is_remote()
            && error.reason() == Some(h2::Reason::REFUSED_STREAM);
        return refused.then_some(Proof::Refused);
    }
    None
}

/// Whether a request may be sent again although it may have been acted upon: the one gate that no classifier can bypass.
///
/// It may if its method is idempotent (RFC 9110, section 9.2.2), if it carries an idempotency key, or if its sender says so.
pub(super) fn safe_to_send_again<B>(request: &http::Request<B>, is_keyed: bool) -> bool {
    is_keyed
        || is_idempotent(request.method())
        || request.extensions().get::<SafeToRetry>().is_some()
}

fn is_idempotent(method: &Method) -> bool {
    matches!(
        *method,
        Method::GET | Method::HEAD | Method::OPTIONS | Method::TRACE | Method::PUT | Method::DELETE
    )
}

#[cfg(test)]
mod tests {
    use http::Request;

    use super::*;
    use crate::layer::carries_key;
    use crate::protocol::IDEMPOTENCY_KEY;

    fn safe(request: http::request::Builder) -> bool {
        let request = request.body(()).unwrap();
        safe_to_send_again(&request, carries_key(request.headers(), &IDEMPOTENCY_KEY))
    }

    #[test]
    fn only_idempotent_methods_are_safe_by_themselves() {
        for method in ["GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE"] {
            assert!(safe(Request::builder().method(method)), "{method}");
        }
        for method in ["POST", "PATCH", "CONNECT", "LOCK", "get"] {
            assert!(!safe(Request::builder().method(method)), "{method}");
        }
    }

    #[test]
    fn a_key_or_the_senders_word_makes_any_method_safe() {
        assert!(safe(Request::post("/").header("idempotency-key", "k")));
        assert!(safe(Request::post("/").extension(SafeToRetry)));
        assert!(!safe(Request::post("/").header("idempotency-key", " ")));
        assert!(!safe(Request::post("/").header("x-other-key", "k")));
    }

    #[test]
    fn the_marker_is_found_anywhere_in_the_chain() {
        #[derive(Debug)]
        struct Outer(NeverSent);
        impl fmt::Display for Outer {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("outer")
            }
        }
        impl Error for Outer {
            fn source(&self) -> Option<&(dyn Error + 'static)> {
                Some(&self.0)
            }
        }
        assert_eq!(proof(&Outer(NeverSent::new("refused"))), Proof::NeverSent);
        let marked = NeverSent::new("refused");
        assert_eq!(marked.source().unwrap().to_string(), "refused");
        assert_eq!(
            proof(&std::io::Error::from(std::io::ErrorKind::ConnectionRefused)),
            Proof::Nothing
        );
    }
}
