//! The stack on every client, over real sockets, with requests counted at the peer.

use std::collections::VecDeque;
use std::error::Error;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use aegis_hitl::adapter::{ReqwestClient, ReqwestError};
use aegis_hitl::layer::{
    AegisLayer, Attempts, Backoff, ClassifyGrpc, Confirmation, Delivery, Failure, RetryError,
    RetryLayer, TrackDeliveryLayer, judge_hyper,
};
use aegis_hitl::testing::{Act, ClosedPort, Peer};
use aegis_hitl::{AegisService, IdempotencyKey, TenantId, ThreadId};
use axum::extract::State;
use axum::{Router, routing};
use bytes::Bytes;
use http::{HeaderMap, Request, Response, StatusCode};
use http_body::Frame;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full};
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use tonic::transport::Endpoint;
use tower::util::{BoxCloneService, MapRequestLayer};
use tower::{ServiceBuilder, ServiceExt};

use crate::support::SHORT;

type BoxError = Box<dyn Error + Send + Sync>;
type Body = UnsyncBoxBody<Bytes, BoxError>;
type Stack = BoxCloneService<Request<Full<Bytes>>, Response<Body>, RetryError>;

#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
    HyperUtil,
    HyperUtilHttp2,
    Reqwest,
    ReqwestHttp2,
    Tonic,
}

const ALL: [Kind; 5] = [
    Kind::HyperUtil,
    Kind::HyperUtilHttp2,
    Kind::Reqwest,
    Kind::ReqwestHttp2,
    Kind::Tonic,
];

fn layer() -> AegisLayer {
    AegisLayer::new()
        .tenant(TenantId::new("acme").unwrap())
        .thread(ThreadId::new("run-7").unwrap())
        .retry(retry())
}

fn retry() -> RetryLayer {
    RetryLayer::new()
        .backoff(Backoff::none())
        .attempt_timeout(SHORT)
}

/// The stack on a client of this kind, that is set up as the docs recommend.
fn stack(kind: Kind, url: &str, layer: AegisLayer) -> Stack {
    let builder = ServiceBuilder::new().layer(layer);
    match kind {
        Kind::HyperUtil | Kind::HyperUtilHttp2 => {
            let client = Client::builder(TokioExecutor::new())
                .http2_only(kind == Kind::HyperUtilHttp2)
                .build_http::<Full<Bytes>>();
            builder
                .layer(TrackDeliveryLayer::hyper_util())
                .service(client.map_response(boxed))
                .boxed_clone()
        }
        Kind::Reqwest | Kind::ReqwestHttp2 => {
            let mut client = reqwest::Client::builder();
            if kind == Kind::ReqwestHttp2 {
                client = client.http2_prior_knowledge();
            }
            let client = ReqwestClient::from_builder(client).unwrap();
            builder
                .service(ServiceExt::<Request<Full<Bytes>>>::map_response(
                    client, boxed,
                ))
                .boxed_clone()
        }
        Kind::Tonic => {
            let channel = Endpoint::from_shared(url.to_owned())
                .unwrap()
                .connect_lazy();
            builder
                .layer(MapRequestLayer::new(|request: Request<Full<Bytes>>| {
                    request.map(tonic::body::Body::new)
                }))
                .layer(TrackDeliveryLayer::new(judge))
                .service(channel.map_response(boxed))
                .boxed_clone()
        }
    }
}

fn boxed<B>(response: Response<B>) -> Response<Body>
where
    B: http_body::Body<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
{
    response.map(|body| body.map_err(Into::into).boxed_unsync())
}

/// tonic says of a connect that failed that it did, in a type of its own.
fn judge(error: &tonic::transport::Error) -> Failure {
    let mut source = error.source();
    while let Some(error_below) = source {
        if error_below.is::<tonic::ConnectError>() {
            return Failure::NeverSent;
        }
        source = error_below.source();
    }
    judge_hyper(error)
}

async fn send(
    kind: Kind,
    layer: AegisLayer,
    url: &str,
    key: Option<&str>,
) -> Result<Response<Body>, RetryError> {
    let mut request = Request::post(format!("{url}/pay"))
        .body(Full::from("body"))
        .unwrap();
    if let Some(key) = key {
        let key = IdempotencyKey::new(key).unwrap();
        request.extensions_mut().insert(key);
    }
    stack(kind, url, layer).oneshot(request).await
}

#[tokio::test]
async fn a_post_without_a_key_is_sent_once_when_its_reply_is_lost() {
    for kind in ALL {
        for act in [Act::lose_reply(), Act::hang()] {
            let peer = Peer::start([act, Act::answer(200)]).await;
            let error = send(kind, layer(), &peer.url(), None).await.unwrap_err();
            assert_eq!(
                (error.attempts(), error.delivery(), peer.count()),
                (1, Delivery::Unknown, 1),
                "{kind:?}"
            );
        }
    }
}

#[tokio::test]
async fn with_a_key_all_attempts_carry_the_same_bytes() {
    for kind in ALL {
        let peer = Peer::start([
            Act::lose_reply(),
            Act::answer(503),
            Act::answer(409).header("retry-after", "0"),
            Act::answer(200).body("done"),
        ])
        .await;
        let response = send(kind, layer(), &peer.url(), Some("k-1")).await.unwrap();
        assert_eq!(Attempts::of(&response), 4, "{kind:?}");
        let body = response.into_body().collect().await.unwrap().to_bytes();
        assert_eq!(body, "done");
        let requests = peer.requests();
        assert_eq!(requests.len(), 4);
        for attempt in &requests {
            assert_eq!(attempt.headers, requests[0].headers);
            assert_eq!((attempt.path(), &attempt.body[..]), ("/pay", &b"body"[..]));
            assert_eq!(attempt.header("idempotency-key"), Some("k-1"));
            assert_eq!(attempt.header("tenant-id"), Some("acme"));
            assert_eq!(attempt.header("thread-id"), Some("run-7"));
            assert!(attempt.header("x-request-id").is_some());
        }
    }
}

#[tokio::test]
async fn a_refused_connect_is_retried_without_a_key() {
    for kind in ALL {
        let port = ClosedPort::new();
        let error = send(kind, layer(), &port.url(), None).await.unwrap_err();
        assert_eq!(
            (error.attempts(), error.delivery()),
            (4, Delivery::NeverSent),
            "{kind:?} {error:?}"
        );

        let port = ClosedPort::new();
        let url = port.url();
        let patient = retry()
            .max_retries(1000)
            .backoff(Backoff::constant(Duration::from_millis(10)));
        let call =
            tokio::spawn(async move { send(kind, layer().retry(patient), &url, None).await });
        tokio::time::sleep(SHORT / 4).await;
        let peer = port.open([Act::answer(200)]);
        let response = call.await.unwrap().unwrap();
        assert!(Attempts::of(&response) > 1, "{kind:?}");
        assert_eq!(peer.count(), 1);
    }
}

#[tokio::test]
async fn a_409_to_a_keyed_request_is_confirmed() {
    for kind in ALL {
        let peer = Peer::start([Act::answer(409)]).await;
        let response = send(kind, layer(), &peer.url(), Some("k-1")).await.unwrap();
        assert_eq!(response.status(), 200, "{kind:?}");
        assert_eq!(Confirmation::of(&response), Some(Confirmation::Duplicate));
        let response = send(kind, layer(), &peer.url(), None).await.unwrap();
        assert_eq!(response.status(), 409);
        assert_eq!(peer.count(), 2);
    }
}

#[tokio::test]
async fn redirects_are_not_followed() {
    for kind in ALL {
        for status in [301, 302, 303, 307, 308] {
            let other = Peer::start([Act::answer(200)]).await;
            let redirect = Act::answer(status).header("location", &other.url());
            let peer = Peer::start([redirect]).await;
            let response = send(kind, layer(), &peer.url(), Some("k-1")).await.unwrap();
            assert_eq!(response.status(), status, "{kind:?}");
            assert_eq!((peer.count(), other.count()), (1, 0));
        }
    }
}

#[tokio::test]
async fn a_refused_stream_is_sent_again_without_a_key() {
    for kind in [Kind::HyperUtilHttp2, Kind::ReqwestHttp2, Kind::Tonic] {
        let peer = Peer::start([Act::refuse_stream(), Act::answer(200)]).await;
        let response = send(kind, layer(), &peer.url(), None).await.unwrap();
        assert_eq!((Attempts::of(&response), peer.count()), (2, 2), "{kind:?}");
    }
}

#[tokio::test]
async fn the_clients_own_retries_do_not_multiply_ours() {
    for kind in [Kind::HyperUtilHttp2, Kind::ReqwestHttp2, Kind::Tonic] {
        for act in [Act::refuse_stream(), Act::go_away_before()] {
            let peer = Peer::start([act]).await;
            let error = send(kind, layer(), &peer.url(), Some("k-1"))
                .await
                .unwrap_err();
            assert_eq!((error.attempts(), peer.count()), (4, 4), "{kind:?}");
        }
    }
}

#[tokio::test]
async fn a_reqwest_client_of_another_set_up_proves_nothing() {
    let client = reqwest::Client::builder()
        .http2_prior_knowledge()
        .build()
        .unwrap();
    let service = ServiceBuilder::new()
        .layer(retry())
        .service(ReqwestClient::from(client));
    let post = |url: String| {
        Request::post(url)
            .body(Full::<Bytes>::from("body"))
            .unwrap()
    };

    // Its redirects: the connect that fails is not the first.
    let port = ClosedPort::new();
    let peer = Peer::start([Act::answer(302).header("location", &port.url())]).await;
    let error = service.clone().oneshot(post(peer.url())).await.unwrap_err();
    assert_eq!((error.attempts(), error.delivery()), (1, Delivery::Unknown));
    assert_eq!(peer.count(), 1);

    // Its retries: it cannot copy the bodies that it is given, so there are none, but nothing holds it to that.
    let peer = Peer::start([Act::refuse_stream()]).await;
    let error = service.clone().oneshot(post(peer.url())).await.unwrap_err();
    assert_eq!((error.attempts(), error.delivery()), (1, Delivery::Unknown));
    assert_eq!(peer.count(), 1);

    // What happened is told all the same.
    let error = service.oneshot(post(port.url())).await.unwrap_err();
    let inner = error.into_inner().unwrap();
    let error = inner.downcast_ref::<ReqwestError>().unwrap();
    assert!(error.get_ref().is_connect());
    let mut messages = Vec::new();
    let mut source = error.source();
    while let Some(error) = source {
        messages.push(error.to_string());
        source = error.source();
    }
    assert!(messages.last().unwrap().contains("refused"), "{messages:?}");
}

#[tokio::test]
async fn a_reqwest_error_is_found_in_the_chain() {
    let port = ClosedPort::new();
    let error = send(Kind::Reqwest, layer(), &port.url(), None)
        .await
        .unwrap_err();
    let inner = error.into_inner().unwrap();
    let error = inner.downcast_ref::<ReqwestError>().unwrap();
    assert_eq!(error.to_string(), "no connection");
    assert!(error.get_ref().is_connect());
    assert!(error.source().unwrap().is::<reqwest::Error>());
}

#[tokio::test]
async fn reqwests_own_timeout_is_no_proof_but_of_the_connect() {
    let peer = Peer::start([Act::hang()]).await;
    let builder = reqwest::Client::builder().timeout(SHORT / 2);
    let service = ServiceBuilder::new()
        .layer(retry().attempt_timeout(None))
        .service(ReqwestClient::from_builder(builder).unwrap());
    let request = Request::post(peer.url()).body(Full::<Bytes>::default());
    let error = service.oneshot(request.unwrap()).await.unwrap_err();
    assert_eq!(
        (error.attempts(), error.delivery(), peer.count()),
        (1, Delivery::Unknown, 1)
    );
}

/// As of a body that is passed on from another exchange.
#[tokio::test]
async fn what_a_body_fails_of_proves_nothing_of_the_request() {
    #[derive(Clone)]
    struct Broken {
        port: SocketAddr,
    }

    impl http_body::Body for Broken {
        type Data = Bytes;
        type Error = BoxError;

        fn poll_frame(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
            let refused = std::net::TcpStream::connect(self.port).unwrap_err();
            Poll::Ready(Some(Err(refused.into())))
        }
    }

    let port = ClosedPort::new();
    for http2 in [false, true] {
        let peer = Peer::start([Act::hang().early()]).await;
        let mut client = reqwest::Client::builder();
        if http2 {
            client = client.http2_prior_knowledge();
        }
        let service = ServiceBuilder::new()
            .layer(retry())
            .service(ReqwestClient::from_builder(client).unwrap());
        let body = Broken {
            port: port.address(),
        };
        let request = Request::post(peer.url()).body(body).unwrap();
        let error = service.oneshot(request).await.unwrap_err();
        assert_eq!((error.attempts(), error.delivery()), (1, Delivery::Unknown));
    }
}

#[tokio::test]
async fn a_request_that_reqwest_cannot_send_is_an_error() {
    let service = ReqwestClient::from_builder(reqwest::Client::builder()).unwrap();
    for uri in ["/no/host", "ftp://localhost/"] {
        let request = Request::get(uri).body(Full::<Bytes>::default()).unwrap();
        let error = service.clone().oneshot(request).await.unwrap_err();
        assert!(error.get_ref().is_builder(), "{uri}");
    }
}

#[tokio::test]
async fn aegis_service_runs_on_reqwest() {
    let peer = Peer::start([Act::lose_reply(), Act::answer(409)]).await;
    let aegis = AegisService::builder()
        .base_url(peer.url())
        .tenant_id("acme")
        .thread_id("run-7")
        .backoff(Backoff::none())
        .build_with(ReqwestClient::from_builder(reqwest::Client::builder()).unwrap())
        .unwrap();
    let receipt = aegis.approve("k-1").await.unwrap();
    assert_eq!(
        (receipt.outcome(), receipt.attempts(), peer.count()),
        (aegis_hitl::Outcome::Duplicate, 2, 2)
    );

    let port = ClosedPort::new();
    let aegis = AegisService::builder()
        .base_url(port.url())
        .tenant_id("acme")
        .thread_id("run-7")
        .backoff(Backoff::none())
        .build_with(ReqwestClient::from_builder(reqwest::Client::builder()).unwrap())
        .unwrap();
    let error = aegis.approve("k-1").await.unwrap_err();
    assert_eq!(error.delivery(), Delivery::NeverSent);
}

/// A router that plays these statuses in turn and then 200, and notes the requests' keys and bodies.
#[derive(Clone)]
struct Handler {
    script: Arc<Mutex<VecDeque<u16>>>,
    seen: Arc<Mutex<Vec<(HeaderMap, Bytes)>>>,
}

impl Handler {
    fn new(script: impl IntoIterator<Item = u16>) -> Self {
        Self {
            script: Arc::new(Mutex::new(script.into_iter().collect())),
            seen: Arc::default(),
        }
    }

    async fn handle(State(this): State<Self>, headers: HeaderMap, body: Bytes) -> StatusCode {
        this.seen.lock().unwrap().push((headers, body));
        let status = this.script.lock().unwrap().pop_front();
        StatusCode::from_u16(status.unwrap_or(200)).unwrap()
    }

    async fn send(&self, key: Option<&'static str>) -> Response<axum::body::Body> {
        let router = Router::new()
            .route("/pay", routing::post(Self::handle))
            .with_state(self.clone());
        let service = ServiceBuilder::new()
            .layer(layer())
            .map_request(|request: Request<Full<Bytes>>| request.map(axum::body::Body::new))
            .service(router);
        let mut request = Request::post("/pay").body(Full::from("body")).unwrap();
        if let Some(key) = key {
            request
                .extensions_mut()
                .insert(IdempotencyKey::new(key).unwrap());
        }
        service.oneshot(request).await.unwrap()
    }
}

#[tokio::test]
async fn an_axum_router_is_called_in_process_by_the_same_rules() {
    let handler = Handler::new([503, 408]);
    let response = handler.send(Some("k-1")).await;
    assert_eq!(
        (response.status().as_u16(), Attempts::of(&response)),
        (200, 3)
    );
    let seen = std::mem::take(&mut *handler.seen.lock().unwrap());
    assert_eq!(seen.len(), 3);
    for (headers, body) in &seen {
        assert_eq!((headers, body), (&seen[0].0, &Bytes::from("body")));
        assert_eq!(headers["idempotency-key"], "k-1");
    }

    let handler = Handler::new([503]);
    assert_eq!(handler.send(None).await.status(), 503);
    assert_eq!(handler.seen.lock().unwrap().len(), 1);

    let handler = Handler::new([409, 409]);
    let response = handler.send(Some("k-1")).await;
    assert_eq!(Confirmation::of(&response), Some(Confirmation::Duplicate));
    assert_eq!(handler.send(None).await.status(), 409);
}

/// What an HTTP layer can and cannot tell of gRPC.
#[tokio::test]
async fn a_grpc_status_is_in_the_trailers_where_no_retry_sees_it() {
    let grpc = || Act::answer(200).header("content-type", "application/grpc");
    let message = [0; 5].as_slice();
    let peer = Peer::start([
        grpc().body(message).trailer("grpc-status", "14"),
        grpc().body(message).trailer("grpc-status", "0"),
    ])
    .await;
    let response = send(Kind::Tonic, layer(), &peer.url(), Some("k-1"))
        .await
        .unwrap();
    assert_eq!((response.status().as_u16(), peer.count()), (200, 1));
    let body = response.into_body().collect().await.unwrap();
    assert_eq!(body.trailers().unwrap()["grpc-status"], "14");

    // A server that fails at once says so in the head, where a classifier finds it.
    let peer = Peer::start([
        grpc().header("grpc-status", "14"),
        grpc().body(message).trailer("grpc-status", "0"),
    ])
    .await;
    let retry = retry().classify(ClassifyGrpc);
    let layer = layer().retry(retry);
    let response = send(Kind::Tonic, layer, &peer.url(), Some("k-1"))
        .await
        .unwrap();
    assert_eq!((Attempts::of(&response), peer.count()), (2, 2));
}
