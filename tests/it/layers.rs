//! The layers on hyper-util's own client over real sockets, with requests counted at the peer.

use std::convert::Infallible;
use std::time::Duration;

use aegis_hitl::layer::{
    AegisLayer, Attempts, Backoff, Confirmation, Delivery, HyperErrors, ReplayBody,
    ReplayBodyLayer, RetryError, RetryLayer, TrackDelivery, TrackDeliveryLayer,
};
use aegis_hitl::testing::{Act, ClosedPort, Peer};
use aegis_hitl::{IdempotencyKey, TenantId, ThreadId};
use bytes::Bytes;
use http::{Request, Response};
use http_body::Frame;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::Incoming;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use tower::{Layer, ServiceExt};

use crate::support::service::{answer, answer_after};
use crate::support::{HANG, SHORT};

type Tracked<B> = TrackDelivery<Client<HttpConnector, B>, HyperErrors>;

fn client() -> Tracked<Full<Bytes>> {
    TrackDeliveryLayer::hyper_util().layer(Client::builder(TokioExecutor::new()).build_http())
}

fn layer() -> AegisLayer {
    AegisLayer::new()
        .tenant(TenantId::new("acme").unwrap())
        .thread(ThreadId::new("run-7").unwrap())
        .retry(RetryLayer::new().backoff(Backoff::none()))
}

async fn send(
    layer: AegisLayer,
    url: String,
    key: Option<&str>,
) -> Result<Response<Incoming>, RetryError> {
    let mut request = Request::post(url).body(Full::from("body")).unwrap();
    if let Some(key) = key {
        let key = IdempotencyKey::new(key).unwrap();
        request.extensions_mut().insert(key);
    }
    layer.layer(client()).oneshot(request).await
}

// reqwest 0.13.5 sends such a request twice, reqwest-retry replays it by default (kittycad.rs#1042) and takes the lost reply
// (`IncompleteMessage`) for safe.
#[tokio::test]
async fn a_post_without_a_key_is_sent_once_whatever_happens_after_the_first_byte() {
    for act in [
        Act::lose_reply(),
        Act::hang(),
        answer(500),
        answer_after(503, "0"),
        answer_after(429, "0"),
        answer_after(409, "0"),
    ] {
        let peer = Peer::start([act.clone(), answer(200)]).await;
        let retry = RetryLayer::new()
            .backoff(Backoff::none())
            .attempt_timeout(SHORT);
        let result = send(layer().retry(retry), peer.url(), None).await;
        assert_eq!(peer.count(), 1, "{act:?}");
        if let Err(error) = result {
            assert_eq!((error.attempts(), error.delivery()), (1, Delivery::Unknown));
        }
    }
}

// gocardless-pro-python#12 made a new key for each attempt.
#[tokio::test]
async fn with_a_key_all_attempts_carry_the_same_bytes() {
    let peer = Peer::start([
        Act::lose_reply(),
        answer(503),
        answer_after(409, "0"),
        answer(200),
    ])
    .await;
    let response = send(layer(), peer.url(), Some("k-1")).await.unwrap();
    assert_eq!(Attempts::of(&response), 4);
    let seen = peer.requests();
    assert_eq!(seen.len(), 4);
    for attempt in &seen {
        assert_eq!(attempt.headers, seen[0].headers);
        assert_eq!(attempt.body, "body");
        assert_eq!(attempt.header("idempotency-key"), Some("k-1"));
        assert_eq!(attempt.header("tenant-id"), Some("acme"));
        assert_eq!(attempt.header("thread-id"), Some("run-7"));
        assert!(attempt.header("x-request-id").is_some());
    }
}

#[tokio::test]
async fn a_connect_error_is_retried_for_any_method() {
    let port = ClosedPort::new();
    let error = send(layer(), port.url(), None).await.unwrap_err();
    assert_eq!(
        (error.attempts(), error.delivery()),
        (4, Delivery::NeverSent)
    );
}

#[tokio::test]
async fn a_409_to_a_keyed_request_is_a_success_and_to_another_a_conflict() {
    let peer = Peer::start([answer(409)]).await;
    let response = send(layer(), peer.url(), Some("k-1")).await.unwrap();
    assert_eq!(response.status(), 200);
    assert_eq!(Confirmation::of(&response), Some(Confirmation::Duplicate));
    let response = send(layer(), peer.url(), None).await.unwrap();
    assert_eq!(
        (response.status().as_u16(), Confirmation::of(&response)),
        (409, None)
    );
    assert_eq!(peer.count(), 2);
}

#[tokio::test]
async fn the_key_may_travel_in_another_header() {
    let peer = Peer::start([Act::lose_reply(), answer(409)]).await;
    let layer = layer().idempotency_header(http::HeaderName::from_static("x-key"));
    let response = send(layer, peer.url(), Some("k-1")).await.unwrap();
    assert_eq!(response.status(), 200);
    let seen = peer.requests();
    assert_eq!(seen.len(), 2);
    assert_eq!(seen[1].header("x-key"), Some("k-1"));
    assert_eq!(seen[1].header("idempotency-key"), None);
}

#[tokio::test]
async fn a_limit_above_the_stack_cannot_hang_it() {
    let peer = Peer::start([answer(503), answer(200)]).await;
    let service = tower::ServiceBuilder::new()
        .concurrency_limit(1)
        .layer(layer())
        .service(client());
    let request = || {
        let request = Request::post(peer.url()).header("idempotency-key", "k");
        request.body(Full::<Bytes>::default()).unwrap()
    };
    // The clone holds the only permit's place in the queue while the other retries.
    let mut held = service.clone();
    let _ = tokio::time::timeout(SHORT, service.clone().oneshot(request()))
        .await
        .unwrap()
        .unwrap();
    let ready = tokio::time::timeout(HANG, held.ready()).await;
    assert!(ready.unwrap().is_ok());
}

#[tokio::test]
async fn five_failures_whose_body_comes_late_use_one_connection() {
    // Undrained, five 503s with a body 20 ms late cost five connections.
    let late = || {
        Act::answer(503)
            .body("x".repeat(10_000))
            .body_after(Duration::from_millis(20))
    };
    let peer = Peer::start([late(), late(), late(), late(), late(), answer(200)]).await;
    let retry = RetryLayer::new().backoff(Backoff::none()).max_retries(5);
    let response = send(layer().retry(retry), peer.url(), Some("k-1"))
        .await
        .unwrap();
    assert_eq!(
        (response.status().as_u16(), Attempts::of(&response)),
        (200, 6)
    );
    assert_eq!(peer.connections(), 1);
}

#[tokio::test]
async fn a_failure_whose_body_never_ends_does_not_hang() {
    let endless = Act::answer(503).body("x").body_never_ends();
    let peer = Peer::start([endless, answer(200)]).await;
    let response = send(layer(), peer.url(), Some("k-1")).await.unwrap();
    assert_eq!(
        (response.status().as_u16(), Attempts::of(&response)),
        (200, 2)
    );
    assert_eq!(peer.connections(), 2);
}

/// A body that does not clone and comes chunk by chunk.
fn streaming() -> Streaming {
    let chunks = ["one,", "two,", "three"].map(|chunk| Ok(Frame::data(Bytes::from(chunk))));
    StreamBody::new(futures_util::stream::iter(chunks)).boxed_unsync()
}

type Streaming = UnsyncBoxBody<Bytes, Infallible>;

async fn stream(peer: &Peer, http2: bool) -> Response<Incoming> {
    let client: Client<HttpConnector, ReplayBody<Streaming>> =
        Client::builder(TokioExecutor::new())
            .http2_only(http2)
            .build_http();
    let client = TrackDeliveryLayer::hyper_util().layer(client);
    let service = tower::ServiceBuilder::new()
        .layer(ReplayBodyLayer::new())
        .layer(RetryLayer::new().backoff(Backoff::none()))
        .service(client);
    let request = Request::post(peer.url()).header("idempotency-key", "k-1");
    service
        .oneshot(request.body(streaming()).unwrap())
        .await
        .unwrap()
}

#[tokio::test]
async fn a_streaming_body_arrives_byte_for_byte_in_every_attempt() {
    // linkerd2#15649: bytes were doubled when a retry came before the body was read.
    for http2 in [false, true] {
        let peer = Peer::start([
            answer(503),
            Act::answer(503).early(),
            Act::lose_reply(),
            answer(200),
        ])
        .await;
        let response = stream(&peer, http2).await;
        assert_eq!(
            (response.status().as_u16(), Attempts::of(&response)),
            (200, 4)
        );
        let requests = peer.requests();
        assert_eq!(requests.len(), 4);
        for (n, request) in requests.iter().enumerate() {
            // The peer that answers early leaves the rest unread.
            if n != 1 {
                assert_eq!(
                    request.body,
                    "one,two,three",
                    "attempt {} http2 {http2}",
                    n + 1
                );
            }
        }
    }
}

#[tokio::test]
async fn a_streaming_body_arrives_whole_after_a_refused_stream() {
    let peer = Peer::start([Act::refuse_stream(), answer(200)]).await;
    let response = stream(&peer, true).await;
    assert_eq!(
        (response.status().as_u16(), Attempts::of(&response)),
        (200, 2)
    );
    assert_eq!(peer.requests()[1].body, "one,two,three");
}

type BoxError = Box<dyn std::error::Error + Send + Sync>;
type Chunk = Result<Frame<Bytes>, BoxError>;

/// A body whose chunks come as they are sent, and whose errors are boxed.
fn channel() -> (
    tokio::sync::mpsc::UnboundedSender<Chunk>,
    UnsyncBoxBody<Bytes, BoxError>,
) {
    let (sender, mut chunks) = tokio::sync::mpsc::unbounded_channel::<Chunk>();
    let stream = futures_util::stream::poll_fn(move |cx| chunks.poll_recv(cx));
    (sender, StreamBody::new(stream).boxed_unsync())
}

// A part of the body, or nothing, arrived as a complete request, and the call ended 200.
#[tokio::test]
async fn a_body_that_cannot_be_sent_whole_again_never_arrives_as_if_it_were() {
    #[derive(Debug, Clone, Copy)]
    enum Meanwhile {
        PassesTheCap,
        Fails,
    }
    for http2 in [false, true] {
        for meanwhile in [Meanwhile::PassesTheCap, Meanwhile::Fails] {
            let retry_after = Act::answer(503).header("retry-after", "1").early();
            let peer = Peer::start([retry_after, answer(200)]).await;
            let client = Client::builder(TokioExecutor::new())
                .http2_only(http2)
                .build_http();
            let service = tower::ServiceBuilder::new()
                .layer(ReplayBodyLayer::new().max_bytes(8))
                .layer(RetryLayer::new().max_retries(1).backoff(Backoff::none()))
                .service(client);
            let (sender, body) = channel();
            sender.send(Ok(Frame::data("head".into()))).unwrap();
            let request = Request::post(peer.url())
                .header("idempotency-key", "k-1")
                .body(body);
            let call = tokio::spawn(service.oneshot(request.unwrap()));
            // The early answer has been read, and the next attempt's copy is made.
            tokio::time::sleep(SHORT).await;
            match meanwhile {
                Meanwhile::PassesTheCap => {
                    sender.send(Ok(Frame::data("too long".into()))).unwrap();
                    tokio::time::sleep(SHORT).await;
                    sender.send(Ok(Frame::data("TAIL".into()))).unwrap();
                }
                Meanwhile::Fails => sender.send(Err("disk".into())).unwrap(),
            }
            drop(sender);
            let outcome = call.await.unwrap();
            let case = format!("http2 {http2}, {meanwhile:?}");
            // Where the client had stopped reading, nothing was lost, and the next attempt sends all of it.
            let whole = ["headtoo longTAIL"];
            match outcome {
                Ok(response) => {
                    assert_eq!(response.status(), 200, "{case}");
                    let last = peer.requests().last().unwrap().body.clone();
                    assert!(whole.iter().any(|whole| last == *whole), "{case}: {last:?}");
                }
                Err(error) => assert_eq!(error.delivery(), Delivery::Unknown, "{case}"),
            }
        }
    }
}
