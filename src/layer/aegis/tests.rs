use std::convert::Infallible;
use std::future::{Ready, ready};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use http::{HeaderMap, HeaderValue, StatusCode};
use tower::{ServiceBuilder, ServiceExt, service_fn};

use super::*;
use crate::layer::{Attempts, Backoff, Confirmation, ReplayBodyLayer};
use crate::protocol::{IdempotencyKey, RequestId, TENANT_ID};

type Seen = Arc<Mutex<Vec<HeaderMap>>>;

/// A peer that answers with these statuses in turn and records the headers that it received.
fn peer(
    statuses: &'static [u16],
) -> (
    impl Service<Request<()>, Response = Response<String>, Error = Infallible> + Clone,
    Seen,
) {
    let seen = Seen::default();
    let noted = seen.clone();
    let service = service_fn(move |request: Request<()>| {
        let mut seen = noted.lock().unwrap();
        seen.push(request.headers().clone());
        let status = statuses[(seen.len() - 1) % statuses.len()];
        let status = StatusCode::from_u16(status).unwrap();
        let response = Response::builder().status(status).body(String::new());
        async { Ok(response.unwrap()) }
    });
    (service, seen)
}

fn layer() -> AegisLayer {
    AegisLayer::new()
        .tenant(TenantId::new("acme").unwrap())
        .thread(ThreadId::new("run-7").unwrap())
        .retry(RetryLayer::new().backoff(Backoff::none()))
}

fn lines(headers: &HeaderMap) -> Vec<(String, Vec<u8>)> {
    let lines = headers.iter();
    lines
        .map(|(name, value)| (name.to_string(), value.as_bytes().to_vec()))
        .collect()
}

#[tokio::test]
async fn all_attempts_carry_the_same_headers_in_the_same_order() {
    let minting = layer().mint_idempotency_key();
    let quoting = layer().set_idempotency_key(SetIdempotencyKeyLayer::mint().quoted());
    let key = IdempotencyKey::new("k-1").unwrap();
    for (layer, key) in [(minting, None), (quoting, None), (layer(), Some(key))] {
        let (peer, seen) = peer(&[503, 503, 200]);
        let mut request = Request::post("/")
            .header("x-own", "1")
            .header("thread-id", "mine")
            .header("x-own", "2")
            .body(())
            .unwrap();
        request
            .extensions_mut()
            .insert(TenantId::new("other").unwrap());
        if let Some(key) = key {
            request.extensions_mut().insert(key);
        }
        let response = layer.layer(peer).oneshot(request).await.unwrap();
        assert_eq!(Attempts::of(&response), 3);
        let seen = seen.lock().unwrap();
        assert_eq!(seen.len(), 3);
        assert_eq!(seen[0]["tenant-id"], "other");
        assert_eq!(seen[0]["thread-id"], "mine");
        assert!(seen[0]["x-request-id"].len() == 36);
        assert!(!seen[0]["idempotency-key"].is_empty());
        assert_eq!(seen[0].get_all("x-own").iter().count(), 2);
        for again in &seen[1..] {
            assert_eq!(lines(again), lines(&seen[0]));
        }
    }
}

#[tokio::test]
async fn it_sends_what_its_layers_send_around_one_another() {
    let other = HeaderName::from_static("x-other");
    let shared = HeaderName::from_static("x-shared");
    let usual = layer();
    let of_one_header = layer()
        .set_thread(layer().thread.header(shared.clone()))
        .set_tenant(layer().tenant.header(shared));
    let key_elsewhere = layer().set_idempotency_key(layer().key.header(other.clone()));
    let confirm_elsewhere = layer().confirm(layer().confirm.idempotency_header(other.clone()));
    let retry_elsewhere = layer().retry(layer().retry.idempotency_header(other));
    let retry_by_tenant = layer().retry(layer().retry.idempotency_header(TENANT_ID));
    // Whether it is retried, and whether the answer is confirmed.
    for (layer, retried, confirmed) in [
        (usual, true, true),
        (of_one_header, true, true),
        (key_elsewhere, false, false),
        (confirm_elsewhere, true, false),
        (retry_elsewhere, false, false),
        (retry_by_tenant, true, true),
    ] {
        let request = || {
            let request = Request::post("/").header("x-own", "1");
            let request = request.header("x-request-id", "id-1");
            let key = IdempotencyKey::new("k-1").unwrap();
            request.extension(key).body(()).unwrap()
        };
        let (one, in_one) = peer(&[503, 409]);
        let answer = layer.layer(one).oneshot(request()).await.unwrap();
        let (many, in_many) = peer(&[503, 409]);
        let service = ServiceBuilder::new()
            .layer(layer.tenant)
            .layer(layer.thread)
            .layer(layer.key)
            .layer(layer.request_id)
            .layer(layer.confirm)
            .layer(layer.retry)
            .service(many);
        let other = service.oneshot(request()).await.unwrap();
        assert_eq!(answer.status(), other.status());
        assert_eq!(answer.status() == StatusCode::OK, confirmed);
        assert_eq!(Confirmation::of(&answer), Confirmation::of(&other));
        assert_eq!(Attempts::of(&answer), 1 + u32::from(retried));
        let (in_one, in_many) = (in_one.lock().unwrap(), in_many.lock().unwrap());
        let all = |seen: &[HeaderMap]| seen.iter().map(lines).collect::<Vec<_>>();
        assert_eq!(all(&in_one), all(&in_many));
        assert_eq!(in_one.len(), 1 + usize::from(retried));
    }
}

#[tokio::test]
async fn what_a_request_names_itself_is_left_as_it_is() {
    let names = ["tenant-id", "thread-id", "idempotency-key", "x-request-id"];
    for own in [
        &names[..1],
        &names[1..2],
        &names[2..3],
        &names[3..],
        &names[..],
    ] {
        // A blank first value counts as no key, but is still the request's own.
        for values in [&["own"][..], &["own", "again"], &["", "again"]] {
            let (service, seen) = peer(&[503, 409]);
            let mut request = Request::post("/");
            for name in own {
                for value in values {
                    request = request.header(*name, *value);
                }
            }
            let service = layer().mint_idempotency_key().layer(service);
            let answer = service.oneshot(request.body(()).unwrap()).await.unwrap();
            let is_keyed = !(own.contains(&"idempotency-key") && values[0].is_empty());
            assert_eq!(answer.status() == StatusCode::OK, is_keyed);
            let seen = seen.lock().unwrap();
            assert_eq!(seen.len(), 1 + usize::from(is_keyed));
            for headers in &*seen {
                for name in names {
                    let sent = headers.get_all(name).iter();
                    if own.contains(&name) {
                        assert!(sent.eq(values.iter().copied()), "{name}: {values:?}");
                    } else {
                        assert_eq!(sent.count(), 1, "{name}");
                    }
                }
            }
        }
    }
}

#[tokio::test]
async fn a_key_in_another_header_is_seen_by_all_layers_and_a_blank_one_by_none() {
    let name = HeaderName::from_static("x-once");
    let renamed = layer()
        .mint_idempotency_key()
        .idempotency_header(name.clone());
    let (service, seen) = peer(&[503, 409]);
    let request = Request::post("/").body(()).unwrap();
    let answer = renamed.clone().layer(service).oneshot(request).await;
    assert_eq!(answer.unwrap().status(), StatusCode::OK);
    {
        let seen = seen.lock().unwrap();
        assert_eq!(seen.len(), 2);
        assert_eq!(seen[0]["x-once"], seen[1]["x-once"]);
    }

    for status in [&[503], &[409]] {
        let (service, seen) = peer(status);
        let mut request = Request::post("/").body(()).unwrap();
        request
            .headers_mut()
            .insert(name.clone(), HeaderValue::from_static(" "));
        let answer = renamed.clone().layer(service).oneshot(request).await;
        assert_eq!(answer.unwrap().status().as_u16(), status[0]);
        assert_eq!(seen.lock().unwrap().len(), 1);
    }

    // The gate expects the key in another header than the one it is written to, and sees none.
    let apart = layer()
        .mint_idempotency_key()
        .retry(RetryLayer::new().idempotency_header(name))
        .confirm(ConfirmDuplicateLayer::new());
    let (service, seen) = peer(&[503]);
    let request = Request::post("/").body(()).unwrap();
    let answer = apart.layer(service).oneshot(request).await.unwrap();
    assert_eq!(answer.status().as_u16(), 503);
    assert_eq!(seen.lock().unwrap().len(), 1);
}

type Payload = http_body_util::Full<bytes::Bytes>;

/// Answers with the status in `x-status` and with the headers that it received. It is ready only
/// when told so.
#[derive(Clone)]
struct Echo {
    is_ready: bool,
}

impl<B> Service<Request<B>> for Echo {
    type Response = Response<Payload>;
    type Error = Infallible;
    type Future = Ready<Result<Response<Payload>, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        if self.is_ready {
            Poll::Ready(Ok(()))
        } else {
            Poll::Pending
        }
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let mut response = Response::new(Payload::default());
        *response.headers_mut() = request.headers().clone();
        let status = request.headers().get("x-status");
        let status = status.and_then(|status| status.to_str().ok()?.parse().ok());
        *response.status_mut() =
            StatusCode::from_u16(status.unwrap_or(200)).unwrap_or(StatusCode::OK);
        ready(Ok(response))
    }
}

async fn answer(layer: &AegisLayer, status: &'static str) -> Response<Payload> {
    answer_to(layer, status, Request::post("/")).await
}

/// Like `answer`, for a request that has a key.
async fn keyed_answer(layer: &AegisLayer, status: &'static str) -> Response<Payload> {
    let key = IdempotencyKey::new("k-1").unwrap();
    answer_to(layer, status, Request::post("/").extension(key)).await
}

async fn answer_to(
    layer: &AegisLayer,
    status: &'static str,
    request: http::request::Builder,
) -> Response<Payload> {
    let mut request = request.body(Payload::default()).unwrap();
    let asked = HeaderValue::from_static(status);
    request.headers_mut().insert("x-status", asked);
    layer
        .layer(Echo { is_ready: true })
        .oneshot(request)
        .await
        .unwrap()
}

async fn sent(layer: &AegisLayer) -> HeaderMap {
    answer(layer, "200").await.headers().clone()
}

#[tokio::test]
async fn by_default_only_the_request_id_is_minted() {
    let headers = sent(&AegisLayer::new()).await;
    assert_eq!(headers.len(), 2);
    let id = RequestId::new(headers["x-request-id"].to_str().unwrap()).unwrap();
    assert!(id.as_uuid().is_some());
}

#[tokio::test]
async fn every_setting_takes_effect_beside_the_others() {
    let layer = AegisLayer::new()
        .tenant(TenantId::new("t").unwrap())
        .thread(ThreadId::new("h").unwrap())
        .mint_idempotency_key();
    let headers = sent(&layer).await;
    assert_eq!(
        (&headers["tenant-id"], &headers["thread-id"]),
        (&"t".parse().unwrap(), &"h".parse().unwrap())
    );
    assert!(IdempotencyKey::from_header(&headers["idempotency-key"]).is_ok());

    let named = HeaderName::from_static;
    let layer = layer
        .set_tenant(SetTenantLayer::new(TenantId::new("t2").unwrap()).header(named("x-tenant")))
        .set_thread(SetThreadLayer::new(ThreadId::new("h2").unwrap()).header(named("x-thread")))
        .set_idempotency_key(SetIdempotencyKeyLayer::mint().quoted())
        .set_request_id(SetRequestIdLayer::mint().header(named("x-call")));
    let headers = sent(&layer).await;
    assert_eq!(
        (&headers["x-tenant"], &headers["x-thread"]),
        (&"t2".parse().unwrap(), &"h2".parse().unwrap())
    );
    assert!(headers["idempotency-key"].as_bytes().starts_with(b"\""));
    assert_eq!(headers["x-call"].len(), 36);
    assert_eq!(headers.len(), 5);
}

#[tokio::test(start_paused = true)]
async fn retry_and_confirmation_are_the_ones_that_were_set() {
    let layer = AegisLayer::new()
        .tenant(TenantId::new("t").unwrap())
        .mint_idempotency_key()
        .confirm(ConfirmDuplicateLayer::new().status(StatusCode::ACCEPTED))
        .retry(RetryLayer::new().max_retries(1).backoff(Backoff::none()));
    let response = answer(&layer, "409").await;
    assert_eq!(response.status(), 409);
    let response = keyed_answer(&layer, "409").await;
    assert_eq!(response.status(), 202);
    assert_eq!(Confirmation::of(&response), Some(Confirmation::Duplicate));
    let response = answer(&layer, "503").await;
    assert_eq!(Attempts::of(&response), 2);
    assert_eq!(response.headers()["tenant-id"], "t");

    let moved = layer.idempotency_header(HeaderName::from_static("x-key"));
    let response = keyed_answer(&moved, "409").await;
    assert_eq!(response.status(), 202);
    assert!(response.headers().contains_key("x-key"));
    assert!(!response.headers().contains_key("idempotency-key"));
    assert_eq!(response.headers()["tenant-id"], "t");
    assert_eq!(Attempts::of(&answer(&moved, "503").await), 2);
}

#[derive(Debug, Clone, Copy)]
enum Key {
    Minted,
    Extension,
    Header,
}

#[derive(Debug, Clone, Copy)]
enum Before {
    Nothing,
    NeverSent,
    LostReply,
    Unavailable,
}

/// Answers 409 after the given acts.
fn conflicting(
    before: Before,
) -> impl Service<
    Request<Payload>,
    Response = Response<Payload>,
    Error = Box<dyn StdError + Send + Sync>,
    Future: Send,
> + Clone {
    let first = Arc::new(std::sync::atomic::AtomicBool::new(true));
    tower::service_fn(move |_: Request<Payload>| {
        let is_first = first.swap(false, std::sync::atomic::Ordering::SeqCst);
        let exchange = crate::layer::Exchange::begin();
        async move {
            let mut response = Response::new(Payload::default());
            *response.status_mut() = StatusCode::CONFLICT;
            match before {
                _ if !is_first => {}
                Before::Nothing => {}
                Before::NeverSent => {
                    exchange.failed(crate::layer::Failure::NeverSent);
                    return Err("refused".into());
                }
                Before::LostReply => return Err("reset".into()),
                Before::Unavailable => *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE,
            }
            Ok(response)
        }
    })
}

// Under a minted key, a name already taken or a conflicting edit was once reported as done.
#[tokio::test]
async fn a_409_confirms_only_where_an_earlier_request_can_have_used_the_key() {
    for before in [
        Before::Nothing,
        Before::NeverSent,
        Before::LostReply,
        Before::Unavailable,
    ] {
        for key in [Key::Minted, Key::Extension, Key::Header] {
            let layer = AegisLayer::new()
                .mint_idempotency_key()
                .retry(RetryLayer::new().backoff(Backoff::none()));
            let request = || {
                let mut request = Request::post("/").body(Payload::default()).unwrap();
                let given = IdempotencyKey::new("k-1").unwrap();
                match key {
                    Key::Minted => {}
                    Key::Extension => {
                        request.extensions_mut().insert(given);
                    }
                    Key::Header => {
                        let name = crate::protocol::IDEMPOTENCY_KEY;
                        request.headers_mut().insert(name, given.header_value());
                    }
                }
                request
            };
            let may_be_a_duplicate = !matches!(key, Key::Minted)
                || matches!(before, Before::LostReply | Before::Unavailable);
            let fused = layer.layer(conflicting(before)).oneshot(request()).await;
            let stacked = ServiceBuilder::new()
                .layer(layer.key)
                .layer(layer.confirm)
                .layer(layer.retry)
                .service(conflicting(before));
            for response in [fused.unwrap(), stacked.oneshot(request()).await.unwrap()] {
                let expected = if may_be_a_duplicate { 200 } else { 409 };
                assert_eq!(response.status(), expected, "{key:?} after {before:?}");
                let confirmation = may_be_a_duplicate.then_some(Confirmation::Duplicate);
                assert_eq!(Confirmation::of(&response), confirmation);
            }
        }
    }
}

#[tokio::test]
async fn a_predicate_sees_the_request_as_it_was_sent() {
    for (path, status) in [("/charge", 200), ("/rename", 409)] {
        let confirm = ConfirmDuplicateLayer::new().when(|request, response| {
            request.method == http::Method::POST
                && request.uri.path() == "/charge"
                && request.headers["idempotency-key"] == "k-1"
                && response.status == 409
        });
        let layer = AegisLayer::new().confirm(confirm);
        let request = || {
            let request = Request::post(path).extension(IdempotencyKey::new("k-1").unwrap());
            request.body(Payload::default()).unwrap()
        };
        let fused = layer
            .layer(conflicting(Before::Nothing))
            .oneshot(request())
            .await;
        let stacked = ServiceBuilder::new()
            .layer(layer.key)
            .layer(layer.confirm)
            .service(conflicting(Before::Nothing));
        let stacked = stacked.oneshot(request()).await;
        assert_eq!(fused.unwrap().status(), status);
        assert_eq!(stacked.unwrap().status(), status);
    }
}

#[tokio::test(start_paused = true)]
async fn no_layer_is_ready_before_the_service_is() {
    async fn is_ready<S: Service<Request<Payload>>>(mut service: S) -> bool {
        let ready = tokio::time::timeout(Duration::from_secs(1), service.ready());
        ready.await.is_ok_and(|ready| ready.is_ok())
    }
    for expected in [false, true] {
        let echo = Echo { is_ready: expected };
        let tenant = SetTenantLayer::from_extension();
        let thread = SetThreadLayer::from_extension();
        assert_eq!(is_ready(tenant.layer(echo.clone())).await, expected);
        assert_eq!(is_ready(thread.layer(echo.clone())).await, expected);
        let key = SetIdempotencyKeyLayer::mint();
        assert_eq!(is_ready(key.layer(echo.clone())).await, expected);
        let id = SetRequestIdLayer::mint();
        assert_eq!(is_ready(id.layer(echo.clone())).await, expected);
        let confirm = ConfirmDuplicateLayer::new();
        assert_eq!(is_ready(confirm.layer(echo.clone())).await, expected);
        assert_eq!(
            is_ready(RetryLayer::new().layer(echo.clone())).await,
            expected
        );
        let replay = ReplayBodyLayer::new();
        assert_eq!(is_ready(replay.layer(echo.clone())).await, expected);
        assert_eq!(is_ready(AegisLayer::new().layer(echo)).await, expected);
    }
}
