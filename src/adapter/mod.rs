//! HTTP clients under the layers.
//!
//! The layers work on any tower service of HTTP requests.
//! [`TrackDeliveryLayer`](crate::layer::TrackDeliveryLayer) belongs directly around the client,
//! whose errors it knows. Only it can report to the retry which requests never reached the service.
//! Everything on this page runs in `examples/`.
//!
//! # hyper-util
//!
//! hyper-util's client is such a service. `TrackDeliveryLayer::hyper_util` (feature `hyper-util`)
//! knows its errors. For HTTP/2, set `http2_keep_alive_interval` and a timer; otherwise a
//! connection whose peer is gone is used forever.
//!
//! # reqwest
//!
//! `ReqwestClient` (feature `reqwest`) makes reqwest's client such a service, and switches off its
//! redirects and retries.
//!
//! # tonic
//!
//! A `Channel` takes tonic's own body, which cannot be copied for a retry. The layers work on a
//! body that can, here `Full<Bytes>`, which is converted below them. The channel's `ConnectError`
//! proves that a request was never sent:
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
//! A generated client sends a tonic body into the stack. Read it into `Full<Bytes>` above the
//! layers, as in `examples/tonic_channel.rs`. This is for calls with one message. A stream of
//! messages is not replayed.
//!
//! With the feature `hyper-util`, `judge_hyper` instead of `Failure::Unknown` also recognizes a
//! stream that the server refused.
//!
//! The layers work on HTTP, which limits what they can do for gRPC:
//!
//! - gRPC's status is in the trailers, after the body. A response with head 200 and then
//!   `UNAVAILABLE` is a success to the retry. Only if a server fails immediately, without a body
//!   (*Trailers-Only*), is `grpc-status` in the head, where
//!   [`ClassifyGrpc`](crate::layer::ClassifyGrpc) reads it and the server's pushback. Waiting for
//!   later trailers would delay the head of every streaming response until its end.
//! - There is no 409. A service reports `ALREADY_EXISTS` in `grpc-status`, and no duplicate is
//!   confirmed.
//! - All calls are POST. Without an idempotency key (which is sent as metadata) or
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
//! Requests may have a body of the client's own, or another one that streams.
//! [`ReplayBodyLayer`](crate::layer::ReplayBodyLayer) above the stack makes it replayable, and
//! `map_request` below converts `ReplayBody` into what the client takes.
//!
//! As layers, `tower::util::MapRequestLayer` or tower-http's `MapRequestBodyLayer` do the same.

#[cfg(feature = "reqwest")]
mod reqwest;

#[cfg(feature = "reqwest")]
pub use self::reqwest::{ReqwestClient, ReqwestError, ReqwestFuture};
