//! What errors of hyper and hyper-util prove.

use std::error::Error;

use hyper_util::client::legacy;

use super::{Failure, Judge, TrackDeliveryLayer};

/// Judges errors with [`judge_hyper`].
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

/// Judges what an error of hyper or hyper-util proves about its own exchange.
///
/// Proven to be never sent are: a failed connect, a request that hyper hands back unstarted, and a
/// stream that the peer refused (`REFUSED_STREAM`). Everything else may have been acted upon,
/// including a lost reply (`IncompleteMessage`) and a stream above a `GOAWAY`'s last id.
///
/// Downcasts need the same versions of hyper and h2 that this crate uses, and fail silently with
/// others. That errs on the safe side. The tests provoke each of these errors with a real peer.
pub fn judge_hyper(error: &(dyn Error + 'static)) -> Failure {
    let mut next = Some(error);
    // Chains are short. The bound keeps a cyclic one from hanging the call.
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
            // hyper reports canceled only for a request that it hands back unstarted.
            if error.is_canceled() {
                return Failure::NeverSent;
            }
            // Below an error of the request's own body lies another exchange's, if that body is
            // passed on from one.
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

/// Whether the client cannot use the URI: it lacks a scheme or host, or the connector does not know
/// the scheme. hyper-util reports this in words only. If the words change, the request is retried
/// and a test fails.
fn is_unusable(error: &legacy::Error) -> bool {
    let cause = error.source().map(ToString::to_string).unwrap_or_default();
    (error.is_connect() && cause.starts_with("invalid URL"))
        || error.to_string().contains("UserAbsoluteUriRequired")
}
