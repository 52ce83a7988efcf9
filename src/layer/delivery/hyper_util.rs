//! What the errors of hyper and hyper-util prove.

use std::error::Error;

use hyper_util::client::legacy;

use super::{Failure, Judge, TrackDeliveryLayer};

/// Judges errors as [`judge_hyper`] does.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
#[allow(clippy::exhaustive_structs)]
pub struct HyperErrors;

impl<E: Error + 'static> Judge<E> for HyperErrors {
    fn judge(&self, error: &E) -> Failure {
        judge_hyper(error)
    }
}

impl TrackDeliveryLayer<HyperErrors> {
    /// Judges the errors of hyper-util's client.
    ///
    /// ```
    /// use aegis_hitl::layer::{AegisLayer, TrackDeliveryLayer};
    /// use bytes::Bytes;
    /// use http_body_util::Full;
    /// use hyper_util::{client::legacy::Client, rt::TokioExecutor};
    /// use tower::ServiceBuilder;
    ///
    /// let client = Client::builder(TokioExecutor::new()).build_http::<Full<Bytes>>();
    /// let service = ServiceBuilder::new()
    ///     .layer(AegisLayer::new())
    ///     .layer(TrackDeliveryLayer::hyper_util())
    ///     .service(client);
    /// # fn is_service<S: tower::Service<http::Request<Full<Bytes>>>>(_: S) {}
    /// # is_service(service);
    /// ```
    pub fn hyper_util() -> Self {
        Self { judge: HyperErrors }
    }
}

/// Says what an error of hyper or hyper-util proves of its own exchange.
///
/// Never sent are: a connect that failed, a request that hyper hands back unstarted, a stream that the peer refused
/// (`REFUSED_STREAM`). Everything else may have been acted upon, a lost reply (`IncompleteMessage`) and a stream above a
/// `GOAWAY`'s last id included.
///
/// Downcasts need the very versions of hyper and h2 that this crate uses, and fail silently with others. That errs on the safe
/// side, and the tests provoke each of these with a real peer.
pub fn judge_hyper(error: &(dyn Error + 'static)) -> Failure {
    let mut next = Some(error);
    // Chains are short; the bound keeps one that loops from hanging the call.
    for _ in 0..32 {
        let Some(error) = next else { break };
        if let Some(error) = error.downcast_ref::<legacy::Error>() {
            if is_unusable(error) {
                return Failure::Permanent;
            }
            if error.is_connect() {
                return Failure::NeverSent;
            }
        } else if let Some(error) = error.downcast_ref::<hyper::Error>() {
            // hyper says canceled only of a request that it hands back unstarted.
            if error.is_canceled() {
                return Failure::NeverSent;
            }
            // What lies under an error of the request's own body is another exchange's, as of a body that is passed on.
            if error.is_user() {
                return Failure::Unknown;
            }
        } else if let Some(error) = error.downcast_ref::<h2::Error>() {
            let refused = error.is_reset()
                && error.is_remote()
                && error.reason() == Some(h2::Reason::REFUSED_STREAM);
            return if refused {
                Failure::Refused
            } else {
                Failure::Unknown
            };
        }
        next = error.source();
    }
    Failure::Unknown
}

/// Whether the client cannot use the URI: it has no scheme or host, or a scheme that the connector does not know. hyper-util
/// says so in words only; if they change, the request is tried again, and a test fails.
fn is_unusable(error: &legacy::Error) -> bool {
    let cause = error.source().map(ToString::to_string).unwrap_or_default();
    (error.is_connect() && cause.starts_with("invalid URL"))
        || error.to_string().contains("UserAbsoluteUriRequired")
}
