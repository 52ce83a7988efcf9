//! The server: [`HitlService`], which answers the endpoints, and [`Server`], which puts it on the network.
//!
//! [`HitlService`] is a plain [`tower_service::Service`] over hyper's types and no framework: it stands alone, mounts in
//! any router, and sits inside tower layers. [`Server`] is an accept loop with timeouts, limits and a graceful shutdown
//! that has a deadline; it also answers `GET /livez` and `GET /readyz`.
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
//! Nothing here logs a key, a payload or a tenant.

mod api;
mod auth;
mod builder;
mod drain;
mod http;
mod net;
mod ops;
mod serve;
mod service;

pub use self::{
    auth::{Auth, Keys, KeysError, Scope},
    builder::HitlServiceBuilder,
    drain::Shutdown,
    http::{Host, InvalidHost, ResponseBody},
    serve::{ServeError, Server},
    service::{HitlService, ResponseFuture},
};

pub use crate::protocol::InvalidPrefix;
