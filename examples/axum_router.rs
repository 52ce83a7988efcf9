//! The layers on an axum `Router`, in process: the same rules, without a socket.
//!
//! ```text
//! cargo run --example axum_router
//! ```

#![allow(clippy::print_stdout)]

use std::collections::HashSet;
use std::error::Error;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use aegis_hitl::IdempotencyKey;
use aegis_hitl::layer::{AegisLayer, Attempts, Backoff, Confirmation, RetryLayer};
use axum::Router;
use axum::extract::State;
use axum::routing::post;
use bytes::Bytes;
use http::{HeaderMap, Request, StatusCode};
use http_body_util::Full;
use tower::{ServiceBuilder, ServiceExt};

/// The accepted keys, and the number of requests.
#[derive(Clone, Default)]
struct Ledger(Arc<Mutex<(HashSet<String>, usize)>>);

/// Accepts every key once, but fails the very first request.
async fn pay(State(ledger): State<Ledger>, headers: HeaderMap) -> StatusCode {
    let Some(key) = headers
        .get("idempotency-key")
        .and_then(|key| key.to_str().ok())
    else {
        return StatusCode::BAD_REQUEST;
    };
    let mut ledger = ledger.0.lock().unwrap_or_else(PoisonError::into_inner);
    ledger.1 += 1;
    if ledger.1 == 1 {
        return StatusCode::SERVICE_UNAVAILABLE;
    }
    if ledger.0.insert(key.to_owned()) {
        StatusCode::CREATED
    } else {
        StatusCode::CONFLICT
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error + Send + Sync>> {
    let ledger = Ledger::default();
    let router = Router::new()
        .route("/pay", post(pay))
        .with_state(ledger.clone());
    let retry = RetryLayer::new().backoff(Backoff::constant(Duration::from_millis(20)));
    let service = ServiceBuilder::new()
        .layer(AegisLayer::new().retry(retry))
        // An axum body cannot be sent twice. This body can.
        .map_request(|request: Request<Full<Bytes>>| request.map(axum::body::Body::new))
        .service(router);

    for asked in ["first", "again"] {
        let request = Request::post("/pay")
            .extension(IdempotencyKey::derive(["run-7", "pay", "invoice-12"]))
            .body(Full::from(r#"{"amount":10}"#))?;
        let response = service.clone().oneshot(request).await?;
        println!(
            "{asked}: {} after {} attempts, {:?}",
            response.status(),
            Attempts::of(&response),
            Confirmation::of(&response),
        );
    }
    let ledger = ledger.0.lock().unwrap_or_else(PoisonError::into_inner);
    println!("{} payment in {} requests", ledger.0.len(), ledger.1);
    Ok(())
}
