//! The events of the feature `tracing`.

use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use aegis_hitl::AegisService;
use aegis_hitl::layer::{Backoff, RetryLayer};
use aegis_hitl::testing::{Act, Peer};
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use tower::{Layer, ServiceExt, service_fn};
use tracing::Level;

use crate::support::Log;

/// What is logged at `level` of a call that takes four attempts: 503, an error, a timeout, and `last`.
async fn logged(level: Level, last: u16) -> String {
    let log = Log::capture(level);
    let attempts = Arc::new(Mutex::new(0));
    let peer = service_fn(move |_: Request<Full<Bytes>>| {
        let attempts = attempts.clone();
        async move {
            let attempt = {
                let mut attempts = attempts.lock().unwrap();
                *attempts += 1;
                *attempts
            };
            let status = match attempt {
                1 => 503,
                2 => return Err(io::Error::other("http://user:secret-url@host")),
                3 => std::future::pending().await,
                _ => last,
            };
            Ok(Response::builder()
                .status(status)
                .body(Full::<Bytes>::default())
                .unwrap())
        }
    });
    let layer = RetryLayer::new()
        .backoff(Backoff::constant(Duration::from_secs(2)))
        .attempt_timeout(Duration::from_secs(1));
    let request = Request::post("http://secret:secret@host:80/path?secret=1")
        .header("idempotency-key", "secret-key")
        .body(Full::from("secret-payload"));
    layer.layer(peer).oneshot(request.unwrap()).await.unwrap();
    log.text()
}

#[tokio::test(start_paused = true)]
async fn every_attempt_that_failed_is_an_event_with_its_cause_and_the_wait() {
    let log = logged(Level::DEBUG, 202).await;
    let lines: Vec<_> = log.lines().map(str::trim).collect();
    let to = "method=POST host=\"host\" path=\"/path\"";
    let prefix = "DEBUG aegis_hitl::retry: attempt failed, another follows";
    assert_eq!(
        lines,
        [
            format!(
                "{prefix} attempt=1 cause=\"answered\" status=503 delivery=answered {to} elapsed=0ns delay=2s"
            ),
            format!(
                "{prefix} attempt=2 cause=\"failed\" delivery=unknown {to} elapsed=2s delay=2s"
            ),
            format!(
                "{prefix} attempt=3 cause=\"timed out\" delivery=unknown {to} elapsed=5s delay=2s"
            ),
        ]
    );
}

#[tokio::test(start_paused = true)]
async fn the_last_attempt_is_told_by_what_came_of_it() {
    let log = logged(Level::TRACE, 202).await;
    let last = log.lines().last().unwrap().trim();
    assert_eq!(
        last,
        "TRACE aegis_hitl::retry: attempt succeeded attempt=4 cause=\"answered\" status=202 method=POST host=\"host\" path=\"/path\""
    );
    for (status, reason) in [(400, "not worth it"), (500, "no attempts left")] {
        let log = logged(Level::DEBUG, status).await;
        let last = log.lines().last().unwrap().trim();
        assert_eq!(
            last,
            format!(
                "DEBUG aegis_hitl::retry: last attempt failed attempt=4 cause=\"answered\" status={status} delivery=answered method=POST host=\"host\" path=\"/path\" elapsed=7s reason={reason}"
            )
        );
    }
}

#[tokio::test(start_paused = true)]
async fn no_event_holds_a_key_a_payload_a_user_a_query_or_an_error_text() {
    let log = logged(Level::TRACE, 500).await;
    assert!(!log.is_empty());
    assert!(!log.contains("secret"), "{log}");
}

#[tokio::test]
async fn no_event_of_the_client_or_below_it_shows_a_secret() {
    let log = Log::capture(Level::TRACE);
    for is_h2 in [false, true] {
        let peer = Peer::start([
            Act::answer(503).body("{}"),
            Act::answer(202).body(r#"{"request_id":"r"}"#),
        ])
        .await;
        let keyed = AegisService::builder()
            .base_url(peer.url())
            .api_key("secret-key")
            .thread_id("run-7")
            .backoff(Backoff::none());
        let named = AegisService::builder()
            .base_url(peer.url())
            .tenant_id("secret-tenant")
            .thread_id("run-7")
            .backoff(Backoff::none());
        for service in [keyed, named] {
            let service = if is_h2 {
                service.http2_prior_knowledge()
            } else {
                service
            };
            let call = service.build().unwrap().approve("secret-idempotency");
            let payload = serde_json::json!({"card": "secret-payload"});
            call.payload(&payload).await.unwrap();
        }
    }
    let log = log.text();
    assert!(log.contains("aegis_hitl::retry"));
    let shown: Vec<_> = log.lines().filter(|line| line.contains("secret")).collect();
    assert!(shown.is_empty(), "{}", shown.join("\n"));
}
