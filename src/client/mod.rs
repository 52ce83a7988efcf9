//! [`AegisService`]: the layers around an HTTP client, for the four endpoints of an approvals API.

mod answer;
mod builder;
mod connector;
mod endpoints;
mod error;
mod proxy;
mod read;
mod receipt;
mod request;
mod service;
#[cfg(feature = "tls")]
mod tls;
mod url;
mod view;

pub use self::builder::Builder;
pub use self::connector::{HttpBody, HttpClient, HttpClientError, HttpClientFuture};
pub use self::error::Error;
pub use self::receipt::{Outcome, Receipt};
pub use self::request::{DecisionCall, DecisionRequest, StatusCall};
pub use self::service::{AegisService, OnDuplicate};
