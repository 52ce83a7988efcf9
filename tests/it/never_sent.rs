//! What proves that a request was never sent and what does not, by real peers on HTTP/1.1 and HTTP/2.

use std::error::Error;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};

use aegis_hitl::layer::{
    AegisLayer, Attempts, Backoff, Delivery, Failure, NotRetried, RetryError, RetryLayer,
    TrackDeliveryLayer, judge_hyper,
};
use aegis_hitl::testing::{Act, ClosedPort, Peer};
use bytes::Bytes;
use http::{Request, Response};
use http_body::{Body, Frame};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpStream;
use tower::{Layer, ServiceExt, service_fn};

use crate::support::{SHORT, ends};

type BoxError = Box<dyn Error + Send + Sync>;

// RFC 9113, section 7.
const PROTOCOL_ERROR: u32 = 1;
const INTERNAL_ERROR: u32 = 2;
const REFUSED_STREAM: u32 = 7;
const CANCEL: u32 = 8;
const ENHANCE_YOUR_CALM: u32 = 11;

const BOTH: [Version; 2] = [Version::Http1, Version::Http2];

#[derive(Debug, Clone, Copy, PartialEq)]
enum Version {
    Http1,
    Http2,
}

fn client(version: Version) -> Client<HttpConnector, Full<Bytes>> {
    let mut connector = HttpConnector::new();
    connector.set_nodelay(true);
    Client::builder(TokioExecutor::new())
        .http2_only(version == Version::Http2)
        .build(connector)
}

fn layer() -> RetryLayer {
    RetryLayer::new()
        .backoff(Backoff::none())
        .attempt_timeout(SHORT)
}

fn post(url: &str) -> Request<Full<Bytes>> {
    Request::post(url).body(Full::from("body")).unwrap()
}

fn keyed(url: &str) -> Request<Full<Bytes>> {
    let mut request = post(url);
    let key = http::HeaderValue::from_static("k-1");
    request.headers_mut().insert("idempotency-key", key);
    request
}

async fn send(
    version: Version,
    request: Request<Full<Bytes>>,
) -> Result<Response<Incoming>, RetryError> {
    let client = TrackDeliveryLayer::hyper_util().layer(client(version));
    layer().layer(client).oneshot(request).await
}

#[tokio::test]
async fn a_refused_connect_was_never_sent() {
    let port = ClosedPort::new();
    for version in BOTH {
        let error = send(version, post(&port.url())).await.unwrap_err();
        assert_eq!(
            (error.attempts(), error.delivery()),
            (4, Delivery::NeverSent)
        );
    }
}

// Downcasts of hyper's errors broke silently across its majors elsewhere (hiero-sdk-rust#840): here each proof is provoked by a
// real peer, so that an update that breaks one fails.
#[tokio::test]
async fn a_request_that_hyper_hands_back_was_never_sent() {
    for version in BOTH {
        let peer = Peer::start([Act::answer(200)]).await;
        let calls = Arc::new(AtomicUsize::new(0));
        let counter = calls.clone();
        let address = peer.address();
        // The first attempt is queued on a connection that ends before it takes the request up.
        let service = service_fn(move |request: Request<Full<Bytes>>| {
            let first = counter.fetch_add(1, Ordering::SeqCst) == 0;
            async move {
                if !first {
                    return Ok(client(version).request(request).await?);
                }
                let io = TokioIo::new(TcpStream::connect(address).await?);
                match version {
                    Version::Http1 => {
                        let (mut sender, connection) =
                            hyper::client::conn::http1::handshake(io).await?;
                        let answer = sender.send_request(request);
                        drop(connection);
                        Ok::<_, Box<dyn Error + Send + Sync>>(answer.await?)
                    }
                    Version::Http2 => {
                        let (mut sender, connection) =
                            hyper::client::conn::http2::handshake(TokioExecutor::new(), io).await?;
                        let answer = sender.send_request(request);
                        drop(connection);
                        Ok(answer.await?)
                    }
                }
            }
        });
        let track = TrackDeliveryLayer::new(|error: &BoxError| judge_hyper(&**error));
        let response = layer()
            .layer(track.layer(service))
            .oneshot(post(&peer.url()))
            .await
            .unwrap();
        assert_eq!(
            (response.status().as_u16(), Attempts::of(&response)),
            (200, 2)
        );
        assert_eq!((calls.load(Ordering::SeqCst), peer.count()), (2, 1));
    }
}

#[tokio::test]
async fn a_refused_stream_is_sent_again_without_a_key() {
    let peer = Peer::start([Act::refuse_stream(), Act::answer(200)]).await;
    let response = send(Version::Http2, post(&peer.url())).await.unwrap();
    assert_eq!(
        (response.status().as_u16(), Attempts::of(&response)),
        (200, 2)
    );
    let requests = peer.requests();
    assert_eq!(requests.len(), 2);
    assert_eq!(requests[1].body, "body");
}

#[tokio::test]
async fn a_refused_stream_is_believed_once() {
    let peer = Peer::start([Act::refuse_stream()]).await;
    let error = send(Version::Http2, post(&peer.url())).await.unwrap_err();
    assert_eq!((error.attempts(), error.delivery()), (2, Delivery::Unknown));
    assert_eq!(peer.count(), 2);
}

#[tokio::test]
async fn a_refused_stream_after_its_body_was_read_is_refused_all_the_same() {
    let peer = Peer::start([Act::reset_stream(REFUSED_STREAM), Act::answer(200)]).await;
    let response = send(Version::Http2, post(&peer.url())).await.unwrap();
    assert_eq!((response.status().as_u16(), peer.count()), (200, 2));
}

/// A peer that goes away tells which streams it left alone, but hyper gives the same error to a stream that it queued at
/// that moment and that the peer may have taken up.
#[tokio::test]
async fn what_a_connection_that_goes_away_did_is_unknown() {
    for act in [
        Act::go_away_before(),
        Act::go_away_before().code(ENHANCE_YOUR_CALM),
        Act::go_away_after(),
        Act::go_away_after().code(ENHANCE_YOUR_CALM),
    ] {
        let peer = Peer::start([act.clone(), Act::answer(200)]).await;
        let error = send(Version::Http2, post(&peer.url())).await.unwrap_err();
        assert_eq!(
            (error.attempts(), error.delivery()),
            (1, Delivery::Unknown),
            "{act:?}"
        );
        assert_eq!(peer.count(), 1);

        let peer = Peer::start([act.clone(), Act::answer(200)]).await;
        let response = send(Version::Http2, keyed(&peer.url())).await.unwrap();
        assert_eq!((response.status().as_u16(), peer.count()), (200, 2));
        assert_eq!(peer.connections(), 2);
    }
}

/// Graceful shutdowns are when hyper tells nothing apart: it gives the error of the `GOAWAY` also to streams that the peer
/// takes up.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn nothing_is_sent_twice_without_a_key_while_connections_shut_down() {
    const REQUESTS: usize = 4000;
    let script = (0..REQUESTS).map(|i| match i % 25 {
        24 => Act::answer(200).then_go_away(),
        _ => Act::answer(200),
    });
    let peer = Peer::start(script).await;
    let track = TrackDeliveryLayer::hyper_util();
    let service = layer().layer(track.layer(client(Version::Http2)));
    let mut callers = tokio::task::JoinSet::new();
    for caller in 0..8 {
        let service = service.clone();
        let url = peer.url();
        callers.spawn(async move {
            for call in 0..REQUESTS / 8 {
                let request = post(&format!("{url}/{caller}/{call}"));
                // A call that fails is not the matter here.
                let _ = service.clone().oneshot(request).await;
            }
        });
    }
    callers.join_all().await;
    assert!(peer.connections() > 100);
    let mut seen = std::collections::HashSet::new();
    for request in peer.requests() {
        let path = request.path().to_owned();
        assert!(seen.insert(path.clone()), "{path} came twice");
    }
}

#[tokio::test]
async fn what_may_have_been_acted_upon_is_sent_once_without_a_key() {
    let cases = [
        (Version::Http1, Act::lose_reply()),
        (Version::Http2, Act::lose_reply()),
        (Version::Http1, Act::lose_reply().early()),
        (Version::Http1, Act::hang()),
        (Version::Http2, Act::hang()),
        (Version::Http2, Act::reset_stream(PROTOCOL_ERROR)),
        (Version::Http2, Act::reset_stream(INTERNAL_ERROR)),
        (Version::Http2, Act::reset_stream(CANCEL)),
        (Version::Http2, Act::reset_stream(CANCEL).early()),
    ];
    for (version, act) in cases {
        let peer = Peer::start([act.clone(), Act::answer(200)]).await;
        let error = send(version, post(&peer.url())).await.unwrap_err();
        assert_eq!(
            (error.attempts(), error.delivery()),
            (1, Delivery::Unknown),
            "{version:?} {act:?}"
        );
        assert_eq!(peer.count(), 1);

        // The same with a key is sent again.
        let peer = Peer::start([act.clone(), Act::answer(200)]).await;
        let response = send(version, keyed(&peer.url())).await.unwrap();
        assert_eq!(
            (response.status().as_u16(), Attempts::of(&response)),
            (200, 2)
        );
        assert_eq!(peer.count(), 2);
    }
}

#[tokio::test]
async fn an_answer_that_breaks_off_is_an_answer() {
    for version in BOTH {
        for status in [200, 503] {
            let act = Act::answer(status).body("begun").body_breaks_off();
            let peer = Peer::start([act, Act::answer(200)]).await;
            let response = send(version, post(&peer.url())).await.unwrap();
            assert_eq!(response.status(), status);
            assert!(response.into_body().collect().await.is_err());
            assert_eq!(peer.count(), 1, "{version:?} {status}");
        }
    }
}

#[tokio::test]
async fn a_late_or_endless_body_delays_a_retry_within_bounds() {
    for version in BOTH {
        for act in [
            Act::answer(503).body("late").body_after(SHORT / 10),
            Act::answer(503).body("begun").body_never_ends(),
        ] {
            let peer = Peer::start([act, Act::answer(200)]).await;
            let response = ends(send(version, keyed(&peer.url()))).await.unwrap();
            assert_eq!((response.status().as_u16(), peer.count()), (200, 2));
        }
    }
}

/// A body that fails of what failed elsewhere, as one that is passed on does.
#[derive(Clone)]
struct Broken(Arc<dyn Fn() -> BoxError + Send + Sync>);

impl Body for Broken {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        Poll::Ready(Some(Err((self.0)())))
    }
}

#[tokio::test]
async fn what_a_body_fails_of_proves_nothing_of_the_request() {
    let refusing = Peer::start([Act::refuse_stream()]).await;
    let mut elsewhere = Vec::new();
    for _ in 0..2 {
        let client = client(Version::Http2);
        elsewhere.push(client.request(post(&refusing.url())).await.unwrap_err());
    }
    let elsewhere = Arc::new(std::sync::Mutex::new(elsewhere));
    let closed = ClosedPort::new();
    let mut refused = Vec::new();
    for _ in 0..2 {
        let client = client(Version::Http1);
        refused.push(client.request(post(&closed.url())).await.unwrap_err());
    }
    let refused = Arc::new(std::sync::Mutex::new(refused));
    let causes: [Arc<dyn Fn() -> BoxError + Send + Sync>; 2] = [
        Arc::new(move || refused.lock().unwrap().pop().unwrap().into()),
        Arc::new(move || elsewhere.lock().unwrap().pop().unwrap().into()),
    ];
    for cause in causes {
        for version in BOTH {
            let peer = Peer::start([Act::hang().early()]).await;
            let client = Client::builder(TokioExecutor::new())
                .http2_only(version == Version::Http2)
                .build_http();
            let request = Request::post(peer.url())
                .body(Broken(cause.clone()))
                .unwrap();
            let client = TrackDeliveryLayer::hyper_util().layer(client);
            let error = layer().layer(client).oneshot(request).await.unwrap_err();
            assert_eq!((error.attempts(), error.delivery()), (1, Delivery::Unknown));
        }
    }
}

// A POST that was answered 303 and whose next hop refused was acted upon four times, and reported as never sent.
#[tokio::test]
async fn a_redirect_whose_next_hop_refuses_is_not_taken_for_never_sent() {
    for status in [301, 302, 303] {
        let closed = ClosedPort::new();
        let moved = Act::answer(status).header("location", &closed.url());
        let peer = Peer::start([moved]).await;
        let service = tower::ServiceBuilder::new()
            .layer(AegisLayer::new().retry(layer()))
            .layer(tower_http::follow_redirect::FollowRedirectLayer::new())
            .layer(TrackDeliveryLayer::hyper_util())
            .service(client(Version::Http1));
        let error = service.oneshot(post(&peer.url())).await.unwrap_err();
        assert_eq!((error.attempts(), error.delivery()), (1, Delivery::Unknown));
        assert_eq!(peer.count(), 1, "{status}");
    }
}

#[tokio::test]
async fn a_request_that_the_client_cannot_send_is_not_tried_again() {
    for uri in ["/no/host", "ftp://localhost/", "unknown://localhost:1/"] {
        let error = send(Version::Http1, keyed(uri)).await.unwrap_err();
        assert_eq!(
            (error.attempts(), error.delivery()),
            (1, Delivery::NeverSent)
        );
        assert_eq!(error.not_retried(), Some(NotRetried::Permanent), "{uri}");
    }
}

#[tokio::test]
async fn a_retry_below_speaks_for_all_of_its_attempts() {
    let attempts = Arc::new(AtomicUsize::new(0));
    let counter = attempts.clone();
    // The first attempt may have been acted upon, the second was never sent.
    let service = service_fn(move |_: Request<Full<Bytes>>| {
        let first = counter.fetch_add(1, Ordering::SeqCst) == 0;
        let error = if first { "reset" } else { "refused" };
        std::future::ready(Err::<Response<Full<Bytes>>, BoxError>(error.into()))
    });
    let track = TrackDeliveryLayer::new(|error: &BoxError| match error.to_string().as_str() {
        "refused" => Failure::NeverSent,
        _ => Failure::Unknown,
    });
    let below = layer().max_retries(1).layer(track.layer(service));
    let above = layer().max_retries(0).layer(below);
    let error = above.oneshot(keyed("/")).await.unwrap_err();
    assert_eq!((error.attempts(), error.delivery()), (2, Delivery::Unknown));
    assert_eq!(attempts.load(Ordering::SeqCst), 2);
}
