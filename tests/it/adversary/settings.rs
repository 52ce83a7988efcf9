//! Settings, keys and clones that are used in odd ways.

use std::convert::Infallible;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use aegis_hitl::layer::{AegisLayer, Backoff, Delivery, RetryLayer};
use aegis_hitl::testing::{Act, Peer};
use aegis_hitl::{Decision, DecisionRequest, IdempotencyKey};
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use tower::{Layer, ServiceExt, service_fn};

use super::{approve, builder};
use crate::support::ends;

#[tokio::test]
async fn the_delivery_that_an_error_tells_is_that_of_all_attempts() {
    let peer = Peer::start([Act::lose_reply(), Act::answer(401)]).await;
    let error = approve(&peer.url()).await.unwrap_err();
    assert_eq!(error.attempts(), 2);
    assert!(error.is_outcome_unknown());
    // "What is known of the delivery, over all attempts": the first may have been acted upon, unanswered.
    assert_eq!(error.delivery(), Delivery::Unknown);
}

#[tokio::test]
async fn the_number_of_an_attempt_does_not_take_the_place_of_the_key() {
    let keys = Arc::new(Mutex::new(Vec::new()));
    let log = keys.clone();
    let client = service_fn(move |request: Request<Full<Bytes>>| {
        log.lock()
            .unwrap()
            .push(request.headers()["idempotency-key"].clone());
        async {
            Ok::<_, Infallible>(
                Response::builder()
                    .status(503)
                    .body(Full::<Bytes>::default())
                    .unwrap(),
            )
        }
    });
    let layer = RetryLayer::new()
        .backoff(Backoff::none())
        .attempt_header(http::HeaderName::from_static("idempotency-key"));
    let request = Request::post("/").header("idempotency-key", "k-1");
    layer
        .layer(client)
        .oneshot(request.body(Full::default()).unwrap())
        .await
        .unwrap();
    let keys = keys.lock().unwrap();
    assert!(keys.iter().all(|key| key == keys[0]), "{keys:?}");
}

#[tokio::test]
async fn clones_are_used_at_once_and_readiness_is_asked_any_number_of_times() {
    use tower::Service as _;

    let peer = Peer::start([Act::answer(202)]).await;
    let mut service = builder(&peer.url()).build().unwrap();
    let request = |n: usize| {
        DecisionRequest::new(
            Decision::Approve,
            IdempotencyKey::new(format!("k-{n}")).unwrap(),
        )
    };
    // Never asked.
    let mut calls = vec![service.call(request(0))];
    for n in 1..50 {
        for _ in 0..n % 3 {
            std::future::poll_fn(|cx| {
                tower::Service::<DecisionRequest>::poll_ready(&mut service, cx)
            })
            .await
            .unwrap();
        }
        calls.push(service.clone().call(request(n)));
        calls.push(service.call(request(n + 100)));
    }
    for call in calls {
        ends(call).await.unwrap();
    }
    assert_eq!(peer.count(), 99);
}

#[tokio::test]
async fn a_reqwest_client_with_features_of_its_own_still_sends_what_is_unsafe_once() {
    use aegis_hitl::adapter::ReqwestClient;

    let redirect = Act::answer(307).header("location", "/again");
    let peer = Peer::start([redirect]).await;
    let again = reqwest::retry::for_host("127.0.0.1")
        .no_budget()
        .max_retries_per_request(5)
        .classify_fn(|attempt| attempt.retryable());
    let set = reqwest::Client::builder()
        .redirect(reqwest::redirect::Policy::limited(5))
        .retry(again);
    let client = ReqwestClient::from_builder(set).unwrap();
    let service = RetryLayer::new().backoff(Backoff::none()).layer(client);
    let request = Request::post(peer.url())
        .body(Full::<Bytes>::default())
        .unwrap();
    let response = ends(service.oneshot(request)).await.unwrap();
    assert_eq!((response.status().as_u16(), peer.count()), (307, 1));
}

#[test]
fn a_path_that_servers_read_differently_is_a_wrong_setting() {
    let mut taken = Vec::new();
    for path in [
        "\u{e9}",
        "%zz",
        "a\\..\\b",
        "..%2fb",
        "a%2f..%2fb",
        "%2e%2e%2f",
        "a|b",
        "\"",
    ] {
        if builder(&format!("http://host/{path}")).build().is_ok() {
            taken.push(path);
        }
    }
    assert!(taken.is_empty(), "{taken:?}");
}

#[tokio::test]
async fn a_key_that_is_quoted_and_blank_is_no_key() {
    for key in ["\"\"", "\" \"", "\"", "\"unclosed"] {
        for status in [503, 409] {
            let sent = Arc::new(AtomicUsize::new(0));
            let counter = sent.clone();
            let client = service_fn(move |_: Request<Full<Bytes>>| {
                counter.fetch_add(1, Ordering::SeqCst);
                let response = Response::builder().status(status);
                async move { Ok::<_, Infallible>(response.body(Full::<Bytes>::default()).unwrap()) }
            });
            let service = AegisLayer::new()
                .retry(RetryLayer::new().backoff(Backoff::none()))
                .layer(client);
            let request = Request::post("/").header("idempotency-key", key);
            let request = request.body(Full::default()).unwrap();
            let response = service.oneshot(request).await.unwrap();
            let seen = (response.status().as_u16(), sent.load(Ordering::SeqCst));
            assert_eq!(seen, (status, 1), "{key}");
        }
    }
}
