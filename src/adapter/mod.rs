//! HTTP clients under the layers.
//!
//! The layers stand on any tower service of HTTP requests. Directly around the client belongs
//! [`TrackDeliveryLayer`](crate::layer::TrackDeliveryLayer), which knows its errors: only by it does the retry know which requests
//! never reached the service. All of these run in `examples/`.
//!
//! # hyper-util
//!
//! Its client is such a service as it comes; `TrackDeliveryLayer::hyper_util` (feature `hyper-util`) knows its errors. On HTTP/2 set
//! `http2_keep_alive_interval` and a timer, or a connection whose peer is gone is used for ever.
//!
//! # reqwest
//!
//! `ReqwestClient` (feature `reqwest`) makes reqwest's client such a service, and switches off the redirects and retries of
//! its own.
//!
//! # tonic
//!
//! A `Channel` takes a body of tonic's own, which cannot be copied for a retry. The layers work on a body that can, here
//! `Full<Bytes>`, and below them it becomes tonic's. What proves that a request was never sent is the channel's
//! `ConnectError`:
//!
//! ```
//! use std::error::Error;
//!
//! use aegis_hitl::layer::{AegisLayer, ClassifyGrpc, Failure, RetryLayer, TrackDeliveryLayer};
//! use bytes::Bytes;
//! use http::Request;
//! use http_body_util::Full;
//! use tonic::transport::Endpoint;
//! use tower::ServiceBuilder;
//!
//! fn judge(error: &tonic::transport::Error) -> Failure {
//!     let mut source = error.source();
//!     while let Some(cause) = source {
//!         if cause.is::<tonic::ConnectError>() {
//!             return Failure::NeverSent;
//!         }
//!         source = cause.source();
//!     }
//!     Failure::Unknown
//! }
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn Error>> {
//! let channel = Endpoint::from_static("http://localhost:50051").connect_lazy();
//! let service = ServiceBuilder::new()
//!     .layer(AegisLayer::new().retry(RetryLayer::new().classify(ClassifyGrpc)))
//!     .layer(TrackDeliveryLayer::new(judge))
//!     .map_request(|request: Request<Full<Bytes>>| request.map(tonic::body::Body::new))
//!     .service(channel);
//! # fn is_service<S: tower::Service<Request<Full<Bytes>>>>(_: S) {}
//! # is_service(service);
//! # Ok(())
//! # }
//! ```
//!
//! A generated client sends a tonic body into the stack, so that above the layers it is read into `Full<Bytes>`: see
//! `examples/tonic_channel.rs`. That is for calls with one message; a stream of messages is not repeated.
//!
//! With the feature `hyper-util`, `judge_hyper` in place of `Failure::Unknown` also knows a stream that the server refused.
//!
//! What these layers cannot do for gRPC, since they work on HTTP:
//!
//! - gRPC's status stands in the trailers, behind the body. A response with head 200 and then `UNAVAILABLE` is a success to
//!   the retry. Only where a server fails at once, with no body (*Trailers-Only*), is `grpc-status` in the head, where
//!   [`ClassifyGrpc`](crate::layer::ClassifyGrpc) reads it and the server's pushback. Later trailers are not waited for: that would
//!   hold back the head of every streaming response until its end.
//! - There is no 409. A service that says `ALREADY_EXISTS` says so in `grpc-status`; no duplicate is confirmed.
//! - All calls are POST. Without an idempotency key (it goes out as metadata) or
//!   [`SafeToRetry`](crate::layer::SafeToRetry), only what was never sent is sent again.
//!
//! # axum
//!
//! A `Router` takes axum's body, which cannot be copied either:
//!
//! ```
//! use aegis_hitl::layer::AegisLayer;
//! use axum::Router;
//! use axum::routing::post;
//! use bytes::Bytes;
//! use http::Request;
//! use http_body_util::Full;
//! use tower::{ServiceBuilder, ServiceExt};
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let router: Router = Router::new().route("/pay", post(async || "paid"));
//! let service = ServiceBuilder::new()
//!     .layer(AegisLayer::new().mint_idempotency_key())
//!     .map_request(|request: Request<Full<Bytes>>| request.map(axum::body::Body::new))
//!     .service(router);
//!
//! let request = Request::post("/pay").body(Full::default())?;
//! assert_eq!(service.oneshot(request).await?.status(), 200);
//! # Ok(())
//! # }
//! ```
//!
//! A request that comes with a body of the client's own, or any other that streams, is made replayable by
//! [`ReplayBodyLayer`](crate::layer::ReplayBodyLayer) above the stack; `map_request` below then turns `ReplayBody` into what the
//! client takes.
//!
//! A layer does the same where a stack is all layers: `tower::util::MapRequestLayer`, or `MapRequestBodyLayer` of
//! `tower-http`.

#[cfg(feature = "reqwest")]
mod reqwest;

#[cfg(feature = "reqwest")]
pub use self::reqwest::{ReqwestClient, ReqwestError, ReqwestFuture};
