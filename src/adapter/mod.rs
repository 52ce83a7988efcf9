//! HTTP clients that are no tower services of HTTP requests by themselves, made such, so that the layers stack on them.
//!
//! hyper-util's client, tonic's `Channel` and axum's `Router` need no adapter: they are such services already.

mod reqwest;

pub use self::reqwest::{ReqwestClient, ReqwestError, ReqwestFuture};
