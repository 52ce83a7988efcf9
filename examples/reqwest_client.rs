//! The layers on reqwest's client.
//!
//! ```text
//! cargo run --example reqwest_client --features reqwest,test-util
//! ```

#![allow(clippy::print_stdout)]

use std::error::Error;
use std::time::Duration;

use aegis_hitl::adapter::ReqwestClient;
use aegis_hitl::layer::{AegisLayer, Attempts, Backoff, RetryLayer};
use aegis_hitl::testing::{Act, Peer};
use bytes::Bytes;
use http::Request;
use http_body_util::Full;
use tower::{ServiceBuilder, ServiceExt};

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error + Send + Sync>> {
    // All other settings of reqwest's builder apply. Redirects and reqwest's own retries are
    // switched off.
    let client = ReqwestClient::from_builder(
        reqwest::Client::builder()
            .user_agent("payments/1.0")
            .connect_timeout(Duration::from_secs(2)),
    )?;
    let retry = RetryLayer::new().backoff(Backoff::constant(Duration::from_millis(20)));
    let service = ServiceBuilder::new()
        .layer(AegisLayer::new().mint_idempotency_key().retry(retry))
        .service(client);

    let peer = Peer::start([
        Act::lose_reply(),
        Act::answer(503).header("retry-after", "0"),
        Act::answer(201).body(r#"{"paid":true}"#),
    ])
    .await;
    let request = Request::post(format!("{}/pay", peer.url()))
        .body(Full::<Bytes>::from(r#"{"amount":10}"#))?;
    let response = service.clone().oneshot(request).await?;
    let attempts = Attempts::of(&response);
    // The rest is plain reqwest.
    let response = reqwest::Response::from(response);
    println!(
        "{} after {attempts} attempts: {}",
        response.status(),
        response.text().await?
    );
    for request in peer.requests() {
        println!(
            "  the peer saw key {} from {}",
            request.header("idempotency-key").unwrap_or("(none)"),
            request.header("user-agent").unwrap_or("(nobody)"),
        );
    }

    let elsewhere = Peer::start([Act::answer(200)]).await;
    let moved = Act::answer(307).header("location", &elsewhere.url());
    let peer = Peer::start([moved]).await;
    let request = Request::post(peer.url()).body(Full::<Bytes>::default())?;
    let response = service.oneshot(request).await?;
    println!(
        "a redirect comes back as {}; the other address saw {} requests",
        response.status(),
        elsewhere.count()
    );
    Ok(())
}
