//! The layers on hyper-util's client: one payment in spite of a lost reply, a 503 and a duplicate.
//!
//! ```text
//! cargo run --example hyper_util_client --features test-util
//! ```

#![allow(clippy::print_stdout)]

use std::error::Error;
use std::time::Duration;

use aegis_hitl::layer::{
    AegisLayer, Attempts, Backoff, Confirmation, RetryLayer, TrackDeliveryLayer,
};
use aegis_hitl::testing::{Act, ClosedPort, Peer};
use aegis_hitl::{IdempotencyKey, TenantId, ThreadId};
use bytes::Bytes;
use http::Request;
use http_body_util::Full;
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use tower::{ServiceBuilder, ServiceExt};

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error + Send + Sync>> {
    let client = Client::builder(TokioExecutor::new()).build_http::<Full<Bytes>>();
    let retry = RetryLayer::new().backoff(Backoff::constant(Duration::from_millis(20)));
    let service = ServiceBuilder::new()
        .layer(
            AegisLayer::new()
                .tenant(TenantId::new("acme")?)
                .thread(ThreadId::new("run-7")?)
                .retry(retry),
        )
        .layer(TrackDeliveryLayer::hyper_util())
        .service(client);

    // The peer loses its first reply after reading the request, then is busy, then knows the key.
    let peer = Peer::start([Act::lose_reply(), Act::answer(503), Act::answer(409)]).await;
    let request = Request::post(format!("{}/pay", peer.url()))
        .extension(IdempotencyKey::derive(["run-7", "pay", "invoice-12"]))
        .body(Full::from(r#"{"amount":10}"#))?;
    let response = service.clone().oneshot(request).await?;
    println!(
        "with a key: {} after {} attempts, {:?}",
        response.status(),
        Attempts::of(&response),
        Confirmation::of(&response),
    );
    for request in peer.requests() {
        println!(
            "  the peer saw {} {} with key {}",
            request.method,
            request.path(),
            request.header("idempotency-key").unwrap_or("(none)"),
        );
    }

    let peer = Peer::start([Act::lose_reply(), Act::answer(200)]).await;
    let request = Request::post(peer.url()).body(Full::default())?;
    match service.clone().oneshot(request).await {
        Ok(response) => println!("without a key: {}", response.status()),
        Err(error) => println!("without a key: {error}; the peer saw {}", peer.count()),
    }

    let port = ClosedPort::new();
    let request = Request::post(port.url()).body(Full::default())?;
    match service.oneshot(request).await {
        Ok(response) => println!("nobody listens: {}", response.status()),
        Err(error) => println!("nobody listens: {error}"),
    }
    Ok(())
}
