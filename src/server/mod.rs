//! The server: [`HitlService`] answers the endpoints, and [`Server`] puts it on the network.
//!
//! [`HitlService`] is a plain [`tower_service::Service`] over hyper's types, without a framework.
//! It stands alone, mounts in any router, and sits inside tower layers. [`Server`] is an accept
//! loop with timeouts, limits and a graceful shutdown that has a deadline. It also answers `GET
//! /livez`, `GET /readyz` and `GET /metrics`.
//!
//! ```no_run
//! use aegis_hitl::server::{HitlService, Server};
//! use aegis_hitl::store::Store;
//!
//! # async fn example(store: impl Store) -> Result<(), Box<dyn std::error::Error>> {
//! let server = Server::bind("127.0.0.1:8000").await?;
//! let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
//! let ended = server
//!     .serve(HitlService::new(store), async { _ = stopped.await })
//!     .await?;
//! assert!(ended.is_drained());
//! # drop(stop);
//! # Ok(())
//! # }
//! ```
//!
//! The server logs no key, no payload and no tenant.

// The rooms, from the socket to the store:
//
//   serve, builder   what a user sets: an address, limits, a service
//   net              accepts connections, limits them, and closes the slow and the idle ones
//   ops              wraps the service with health checks and metrics; reports outages in the log
//   service          matches a request to its endpoint, and completes the response
//   api              the endpoints, one file each, and the steps they share
//   inbox            the web page on which reviewers decide
//   auth             authenticates the caller by an API key or the tenant header
//   http             checks heads, headers and hosts; reads bodies; writes responses
//   reloads          counts reloads, for metrics
//   retention        removes actions that are over, beside everything else
//   drain            the signal that the server is shutting down
//
// A request goes through net (one connection), ops (a well-formed head, a health check or a scrape), service
// (host, drain, route), and api (caller, headers, body, store). Its response goes back through
// service and is watched by net until its last byte is sent.

mod api;
mod auth;
mod builder;
mod drain;
mod http;
mod inbox;
mod net;
mod ops;
mod reloads;
mod retention;
mod serve;
mod service;

pub use self::{
    auth::{Auth, Keys, KeysError, Scope},
    builder::HitlServiceBuilder,
    drain::Shutdown,
    http::{Host, InvalidHost, InvalidRate, Rate, ResponseBody},
    inbox::Inbox,
    reloads::Reloads,
    retention::{InvalidRetention, Retention},
    serve::{ServeError, Server},
    service::{HitlService, ResponseFuture},
};

#[cfg(feature = "tls")]
pub use self::net::{InvalidTls, Tls};

pub use crate::protocol::InvalidPrefix;
