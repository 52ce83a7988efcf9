//! Tower middleware for safe retries with idempotency keys, and a client and server for
//! human-in-the-loop approvals of AI-agent actions.
//!
//! A request times out. Sending it again may run it twice; not sending it may lose it. This crate
//! covers both sides of that question:
//!
//! - The **layers** name each call (tenant, thread, idempotency key, request id), retry it only
//!   when a retry cannot run it twice, and treat the server's `409` to a known key as success. They
//!   work on any HTTP client that is a [`tower_service::Service`].
//! - **`AegisService`** (feature `client`) puts the layers around a hyper client and speaks an
//!   approvals API: an agent submits an action, waits, and runs it once; a reviewer decides.
//! - The **server** (feature `server`; binary `aegis`, feature `cli`) records each decision once,
//!   in an embedded SQLite database, and answers only after the commit is durable.
//!
//! The wire protocol is that of the Python SDK `aegis-idempotency`, which works against this server
//! unmodified.
//!
//! # Rooms
//!
//! | module | what is in it | feature |
//! | --- | --- | --- |
//! | [`layer`] | the tower layers: headers, confirmation, retry, replayable bodies | |
//! | [`protocol`] | identifiers, header names, the action, problems; no I/O | |
//! | [`adapter`] | the layers on hyper-util, reqwest, tonic and axum | |
//! | `client` | `AegisService`, its builder, receipts and errors | `client` |
//! | `server` | `HitlService`, a tower service, and `Server`, an accept loop | `server` |
//! | `outbox` | webhooks and notifications: delivers what a store records | `server` |
//! | `store` | the trait `Store`, the embedded store and the PostgreSQL store | `server`, `postgres` |
//! | `testing` | a scripted HTTP peer for tests | `test-util` |
//!
//! # Where to begin
//!
//! | you want to | begin with |
//! | --- | --- |
//! | retry calls of your own HTTP client safely | [`layer`] and [`AegisLayer`], then [`adapter`] |
//! | ask for approvals from a Rust agent | `AegisService` |
//! | run the server | the manual's page on operating; `aegis serve --help` |
//! | mount the approvals API in an application of your own | `server::HitlService` |
//! | know what holds when something fails | the manual's page on guarantees |
//! | write a store | `store::Store` and `store::conformance` |
//! | test code against lost replies and refused streams | `testing::Peer` |
//! | change this crate | the manual's pages on architecture and contributing |
//!
//! The manual is the module `manual` in the documentation on docs.rs, and `src/manual/` in the
//! repository.
//!
//! # Example
//!
//! The layers around hyper-util's client:
//!
//! ```no_run
//! # #[cfg(feature = "hyper-util")]
//! # mod example {
//! use aegis_hitl::layer::{AegisLayer, Attempts, Confirmation, TrackDeliveryLayer};
//! use aegis_hitl::{IdempotencyKey, TenantId, ThreadId};
//! use bytes::Bytes;
//! use http::Request;
//! use http_body_util::Full;
//! use hyper_util::{client::legacy::Client, rt::TokioExecutor};
//! use tower::{ServiceBuilder, ServiceExt};
//!
//! #[tokio::main]
//! async fn main() -> Result<(), Box<dyn std::error::Error>> {
//!     let client = Client::builder(TokioExecutor::new()).build_http::<Full<Bytes>>();
//!     let service = ServiceBuilder::new()
//!         .layer(
//!             AegisLayer::new()
//!                 .tenant(TenantId::new("acme")?)
//!                 .thread(ThreadId::new("run-7")?),
//!         )
//!         // Directly around the client: reports which requests never reached the service.
//!         .layer(TrackDeliveryLayer::hyper_util())
//!         .service(client);
//!
//!     // The key is derived from what names the action, so an agent that restarts uses it again.
//!     let key = IdempotencyKey::derive(["run-7", "charge", "order-42"]);
//!     let mut request = Request::post("http://localhost:9000/charges").body(Full::from("{}"))?;
//!     request.extensions_mut().insert(key);
//!
//!     let response = service.oneshot(request).await?;
//!     match Confirmation::of(&response) {
//!         Some(Confirmation::Fresh) => println!("done in {} attempts", Attempts::of(&response)),
//!         Some(Confirmation::Duplicate) => println!("was done before"),
//!         None => println!("refused: {}", response.status()),
//!     }
//!     Ok(())
//! }
//! # }
//! ```
//!
//! # Features
//!
//! | feature | default | brings |
//! | --- | --- | --- |
//! | (none) | | `layer`, `protocol`, `adapter` |
//! | `client` | yes | `AegisService` |
//! | `tls` | yes | https for `AegisService`, with the platform's roots; with `server` also for `Server` and webhooks |
//! | `server` | | `server`, `store` and `outbox` |
//! | `postgres` | with `cli` | `PostgresStore` |
//! | `cli` | | the binary `aegis` |
//! | `hyper-util` | with `client` | what errors of hyper and hyper-util say about delivery |
//! | `reqwest` | | reqwest's client under the layers |
//! | `tracing` | with `server` | an event for each attempt of a retry |
//! | `test-util` | | `testing`; with `server` also the in-memory store and the conformance suite |
//! | `full` | | all of these |
//!
//! # Stability
//!
//! Types of these crates are part of the public interface: `bytes`, `futures-core` (`Stream`),
//! `http`, `http-body`, `http-body-util` (`Full`), `hyper` (`Incoming`), `serde`, `serde_json`
//! (errors of payloads), `tower-layer` and `tower-service`; with `reqwest` its `Client`,
//! `ClientBuilder`, `Body` and `Error`; with `tls` rustls's `ClientConfig`, and with `server`
//! its `ServerConfig`; with `server` `tokio` and `rusqlite`.
//!
//! The minimum supported Rust version is 1.89. Unsafe code is forbidden.

#![cfg_attr(docsrs, feature(doc_cfg))]

pub mod adapter;
pub mod layer;
pub mod protocol;

#[doc(inline)]
pub use crate::layer::AegisLayer;

#[doc(inline)]
pub use crate::protocol::{ApiKey, IdempotencyKey, RequestId, TenantId, ThreadId};

#[cfg(any(feature = "client", feature = "server"))]
#[doc(inline)]
pub use crate::protocol::{Action, Decision, Execution, Payload, Status};

#[cfg(feature = "server")]
pub mod outbox;
#[cfg(feature = "server")]
pub mod server;
#[cfg(feature = "server")]
pub mod store;

#[cfg(feature = "client")]
pub mod client;

#[cfg(feature = "client")]
#[doc(inline)]
pub use crate::client::{AegisService, DecisionRequest, Error, Outcome, Receipt};

#[cfg(feature = "test-util")]
pub mod testing;

#[cfg(doc)]
pub mod manual;

/// The README's examples, as tests.
#[cfg(all(doctest, feature = "client"))]
#[doc = include_str!("../README.md")]
struct Readme;
