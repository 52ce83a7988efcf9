//! What a hostile peer, proxy, setting or stack can make the client side do, against what it promises.
//!
//! The peers here write their bytes by hand, so that they can say what no HTTP library lets them say.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    unreachable_pub
)]

use std::convert::Infallible;
use std::error::Error as StdError;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use aegis_hitl::client::{Builder, OnDuplicate};
use aegis_hitl::layer::{
    AegisLayer, AttemptEvent, Backoff, Delivery, ReplayBodyLayer, RetryLayer,
    SetIdempotencyKeyLayer,
};
use aegis_hitl::protocol::Payload;
use aegis_hitl::testing::{Act, Peer};
use aegis_hitl::{AegisService, Decision, DecisionRequest, Error, IdempotencyKey, Receipt};
use bytes::Bytes;
use http::{Request, Response};
use http_body::{Body, Frame, SizeHint};
use http_body_util::Full;
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::AbortHandle;
use tower::{Layer, ServiceBuilder, ServiceExt, service_fn};

/// Longer than any call here may take. What takes longer hangs.
const HANG: Duration = Duration::from_secs(20);

async fn ends<F: Future>(call: F) -> F::Output {
    let ended = tokio::time::timeout(HANG, call).await;
    ended.expect("it hangs")
}

/// A peer that is a function of the number of the connection and its stream.
struct Raw {
    address: SocketAddr,
    connections: Arc<AtomicUsize>,
    task: AbortHandle,
}

impl Drop for Raw {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Raw {
    async fn start<F, Fut>(serve: F) -> Self
    where
        F: Fn(usize, TcpStream) -> Fut + Send + 'static,
        Fut: Future<Output = ()> + Send + 'static,
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let connections = Arc::new(AtomicUsize::new(0));
        let counter = connections.clone();
        let task = tokio::spawn(async move {
            let mut open = tokio::task::JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let _ = stream.set_nodelay(true);
                open.spawn(serve(counter.fetch_add(1, Ordering::SeqCst), stream));
            }
        });
        Self {
            address,
            connections,
            task: task.abort_handle(),
        }
    }

    /// Reads one request on each connection, writes these bytes and closes.
    async fn says(bytes: impl Into<Vec<u8>>) -> Self {
        let bytes: Arc<[u8]> = bytes.into().into();
        Self::start(move |_, mut stream| {
            let bytes = bytes.clone();
            async move {
                if read_request(&mut stream).await.is_some() {
                    let _ = stream.write_all(&bytes).await;
                    let _ = stream.shutdown().await;
                    // Until the client has closed too, so that nothing of the answer is reset away.
                    let _ = stream.read(&mut [0; 1]).await;
                }
            }
        })
        .await
    }

    fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    fn count(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }
}

/// Reads a request of HTTP/1.1 with a `Content-Length` or none. `None` if it broke off.
async fn read_request(stream: &mut TcpStream) -> Option<(String, Vec<u8>)> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.ok()?);
    }
    let head = String::from_utf8_lossy(&head).to_lowercase();
    let length = head
        .lines()
        .find_map(|line| line.strip_prefix("content-length: ")?.parse().ok())
        .unwrap_or(0_usize);
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await.ok()?;
    Some((head, body))
}

fn builder(url: &str) -> Builder {
    AegisService::builder()
        .base_url(url)
        .tenant_id("acme")
        .thread_id("run-7")
        .timeout(Duration::from_secs(2))
        .backoff(Backoff::none())
}

fn action(decision: &str) -> Value {
    json!({
        "request_id": "r-1", "tenant_id": "acme", "thread_id": "run-7", "idempotency_key": "k-1",
        "status": "COMMITTED", "decision": decision,
    })
}

fn answer_with(status: u16, body: &Value) -> Act {
    Act::answer(status).body(body.to_string())
}

/// All that an error and its sources say, in both forms.
fn said(error: &(dyn StdError + 'static)) -> String {
    let mut said = String::new();
    let mut next = Some(error);
    while let Some(error) = next {
        said.push_str(&format!("{error} {error:?} {error:#?}\n"));
        next = error.source();
    }
    said
}

async fn approve(url: &str) -> Result<Receipt, Error> {
    ends(builder(url).build().unwrap().approve("k-1").into_future()).await
}

// ---------------------------------------------------------------------------------------------------------------------
// Deadlines

#[tokio::test]
async fn a_calls_own_deadline_takes_the_place_of_the_services_however_long_it_is() {
    let late = Act::answer(202).after(Duration::from_millis(600));
    let peer = Peer::start([late]).await;
    let service = builder(&peer.url())
        .deadline(Duration::from_millis(200))
        .build()
        .unwrap();
    let year = service
        .approve("k-1")
        .deadline(Duration::from_secs(31_536_000));
    assert!(ends(year.into_future()).await.is_ok());
    let unlimited = service.approve("k-1").deadline(Duration::MAX);
    let receipt = ends(unlimited.into_future()).await;
    assert!(receipt.is_ok(), "{receipt:?}");
}

/// Something that is never ready and always about to be: it uses up what one poll may do, each time.
async fn busy() {
    loop {
        tokio::task::consume_budget().await;
    }
}

#[tokio::test]
async fn an_attempt_that_is_always_busy_is_cut_by_its_timeout_and_by_the_deadline() {
    let client = service_fn(|_: Request<Full<Bytes>>| async {
        busy().await;
        Ok::<_, Infallible>(Response::new(Full::<Bytes>::default()))
    });
    for layer in [
        RetryLayer::new().attempt_timeout(Duration::from_millis(50)),
        RetryLayer::new().deadline(Duration::from_millis(50)),
    ] {
        let call = layer
            .max_retries(0)
            .layer(client)
            .oneshot(Request::new(Full::default()));
        let ended = tokio::time::timeout(Duration::from_secs(3), call).await;
        assert!(ended.expect("no timer ends it").unwrap_err().is_timeout());
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// HTTP/2

#[tokio::test]
async fn a_connection_that_falls_silent_in_the_body_is_not_used_for_the_next_attempt() {
    // On the first connection every answer stops after its head.
    let peer = Raw::start(|connection, stream| async move {
        let mut io = h2::server::handshake(stream).await.unwrap();
        let mut kept = Vec::new();
        while let Some(Ok((_, mut respond))) = io.accept().await {
            let head = Response::builder().status(409).body(()).unwrap();
            let mut body = respond.send_response(head, false).unwrap();
            if connection == 0 {
                kept.push(body);
            } else {
                body.send_data(Bytes::from_static(b"{}"), true).unwrap();
            }
        }
    })
    .await;
    let service = builder(&peer.url())
        .http2_prior_knowledge()
        .timeout(Duration::from_millis(300))
        .build()
        .unwrap();
    let receipt = ends(service.approve("k-1").into_future()).await;
    assert!(
        receipt.is_ok(),
        "{receipt:?}, connections: {}",
        peer.count()
    );
    assert_eq!((receipt.unwrap().attempts(), peer.count()), (2, 2));
}

#[tokio::test]
async fn a_refused_stream_was_never_sent_like_a_failed_connect() {
    let peer = Peer::start([Act::refuse_stream()]).await;
    let service = builder(&peer.url())
        .http2_prior_knowledge()
        .max_retries(0)
        .build()
        .unwrap();
    let error = ends(service.approve("k-1").into_future())
        .await
        .unwrap_err();
    assert_eq!(error.delivery(), Delivery::NeverSent, "{error:?}");
    assert!(
        error.is_connect() && !error.is_outcome_unknown(),
        "{error:?}"
    );
    assert_eq!(error.to_string(), "the request could not be sent");
}

// ---------------------------------------------------------------------------------------------------------------------
// What an answer confirms

#[tokio::test]
async fn an_answer_beyond_the_bound_is_judged_by_what_was_read_of_it() {
    let pad = "x".repeat(2 * 1024 * 1024);
    let opposite = format!(r#"{{"decision":"reject","status":"COMMITTED","pad":"{pad}"}}"#);
    let peer = Peer::start([Act::answer(202).body(opposite)]).await;
    let receipt = approve(&peer.url()).await;
    assert!(receipt.is_err(), "an opposite decision: {receipt:?}");
}

#[tokio::test]
async fn a_page_is_no_receipt_however_long_or_slow_it_is() {
    let page = "<html><body>Accepted for scanning</body></html>";
    let long = page.repeat(40_000);
    for act in [
        Act::answer(202).body(page),
        Act::answer(202).body(long),
        Act::answer(202).body(page).body_never_ends(),
        Act::answer(202).body(page).body_breaks_off(),
    ] {
        let shown = format!("{act:.200?}").len();
        let peer = Peer::start([act]).await;
        let receipt = approve(&peer.url()).await;
        assert!(receipt.is_err(), "{shown}: {receipt:?}");
    }
}

async fn verified(script: Vec<Act>) -> (Result<Receipt, Error>, Peer) {
    let peer = Peer::start(script).await;
    let service = builder(&peer.url())
        .on_duplicate(OnDuplicate::Verify)
        .build()
        .unwrap();
    (ends(service.approve("k-1").into_future()).await, peer)
}

#[tokio::test]
async fn the_status_of_another_id_verifies_nothing() {
    // What a caller without credentials is told names no tenant, no thread and no key: the id is all there is.
    let duplicate = answer_with(409, &json!({"request_id": "r-1"}));
    let other = json!({"request_id": "r-2", "status": "COMMITTED", "decision": "approve"});
    let (receipt, _) = verified(vec![duplicate, answer_with(200, &other)]).await;
    assert!(receipt.is_err(), "{receipt:?}");
}

#[tokio::test]
async fn a_status_that_is_an_array_verifies_nothing() {
    let members = json!([
        "r-1",
        "acme",
        "run-7",
        "k-1",
        "COMMITTED",
        "approve",
        null,
        null,
        null,
        false,
        null,
        null
    ]);
    let (receipt, peer) = verified(vec![Act::answer(409), answer_with(200, &members)]).await;
    assert!(receipt.is_err(), "{receipt:?}");
    let status = builder(&peer.url()).build().unwrap().status("r-1").await;
    assert!(status.is_err(), "{status:?}");
}

#[tokio::test]
async fn a_status_page_or_a_coded_status_verifies_nothing() {
    let json = action("approve");
    for (name, value) in [("content-type", "text/html"), ("content-encoding", "gzip")] {
        let status = answer_with(200, &json).header(name, value);
        let (receipt, _) = verified(vec![Act::answer(409), status]).await;
        assert!(receipt.is_err(), "{name}: {receipt:?}");
    }
}

#[tokio::test]
async fn a_recorded_action_without_a_decision_does_not_agree() {
    // "The action in the body, where there is one, is of this identity and this decision."
    for status in [202, 409] {
        for word in ["COMMITTED", "FAILED", "QUEUED", "pending"] {
            let body = json!({
                "request_id": "r-1", "tenant_id": "acme", "thread_id": "run-7",
                "idempotency_key": "k-1", "status": word, "decision": null,
            });
            let peer = Peer::start([answer_with(status, &body)]).await;
            let receipt = approve(&peer.url()).await;
            assert!(receipt.is_err(), "{status} {word}: {receipt:?}");
        }
    }
}

#[tokio::test]
async fn a_key_that_was_minted_by_a_layer_above_the_stack_is_a_minted_one_to_the_stack() {
    let taken = service_fn(|_: Request<Full<Bytes>>| async {
        Ok::<_, Infallible>(
            Response::builder()
                .status(409)
                .body(Full::<Bytes>::default())
                .unwrap(),
        )
    });
    // "Nobody can have used the key before, so that a 409 to the first attempt is a plain conflict."
    let above = SetIdempotencyKeyLayer::mint().layer(AegisLayer::new().layer(taken));
    let response = above
        .oneshot(Request::post("/").body(Full::default()).unwrap())
        .await
        .unwrap();
    assert_eq!(response.status(), 409, "below SetIdempotencyKeyLayer");
}

// ---------------------------------------------------------------------------------------------------------------------
// What errors tell

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
async fn no_debug_form_of_an_action_shows_its_payload() {
    let mut json = action("approve");
    json["payload"] = json!({"card": "secret-4111"});
    json["comment"] = json!("secret-comment");
    let problem = json!({"code": "decision-conflict", "action": json});
    let peer = Peer::start([answer_with(202, &json), answer_with(422, &problem)]).await;
    let receipt = approve(&peer.url()).await.unwrap();
    let error = approve(&peer.url()).await.unwrap_err();
    let payload = Payload::new(&json!({"card": "secret-4111"})).unwrap();
    let request = DecisionRequest::new(Decision::Approve, IdempotencyKey::new("secret").unwrap())
        .payload(payload.clone())
        .comment("secret");
    for (what, shown) in [
        ("receipt", format!("{receipt:?}")),
        ("request", format!("{request:?}")),
        ("error", said(&error)),
        ("payload", format!("{payload:?}")),
        ("action", format!("{:?}", receipt.action())),
        ("problem", format!("{:?}", error.problem())),
    ] {
        assert!(!shown.contains("secret"), "{what}: {shown}");
    }
}

#[tokio::test]
async fn no_error_repeats_what_a_foreign_answer_holds() {
    for body in [
        r#""secret-token""#,
        r#"{"request_id":"r-1","status":"COMMITTED","replayed":"secret-token"}"#,
        r#"{"request_id":"r-1","status":"COMMITTED","comment":{"secret-token":1},"tenant_id":{}}"#,
    ] {
        let peer = Peer::start([Act::answer(200).body(body)]).await;
        let status = builder(&peer.url()).build().unwrap().status("r-1").await;
        if let Err(error) = status {
            let said = said(&error);
            assert!(!said.contains("secret"), "{said}");
        }
    }
}

#[test]
fn no_debug_form_of_the_builder_shows_what_a_url_hides() {
    for url in [
        "http://user:secret@host",
        "http://host/?token=secret",
        "http://host/#secret",
        "http://user:secret%40host",
    ] {
        let builder = AegisService::builder().base_url(url);
        assert!(!format!("{builder:?}").contains("secret"), "{builder:?}");
        let error = builder.build().map(|_| ()).unwrap_err();
        assert!(error.is_config() && !said(&error).contains("secret"));
    }
    let builder = AegisService::builder()
        .proxy("http://user:secret@host:1")
        .api_key("secret")
        .tenant_id("secret");
    assert!(!format!("{builder:?} {builder:#?}").contains("secret"));
}

#[tokio::test]
async fn no_debug_form_of_an_event_shows_what_a_url_hides() {
    let shown = Arc::new(Mutex::new(String::new()));
    let log = shown.clone();
    let layer = RetryLayer::new()
        .max_retries(0)
        .observe(move |event: &AttemptEvent<'_>| {
            log.lock().unwrap().push_str(&format!("{event:?}"));
        });
    let client = service_fn(|_: Request<Full<Bytes>>| async {
        Ok::<_, Infallible>(Response::new(Full::<Bytes>::default()))
    });
    let request = Request::get("http://user:secret@host/?token=secret");
    let request = request.body(Full::default()).unwrap();
    layer.layer(client).oneshot(request).await.unwrap();
    let shown = shown.lock().unwrap();
    assert!(!shown.contains("secret"), "{shown}");
}

// ---------------------------------------------------------------------------------------------------------------------
// What is sent

#[tokio::test]
async fn a_payload_is_an_object_also_when_it_is_deserialized() {
    for text in ["[1]", "\"pay 5\"", "7", "null"] {
        assert!(serde_json::from_str::<Payload>(text).is_err(), "{text}");
    }
}

#[tokio::test]
async fn a_comment_does_not_take_the_place_of_a_payload() {
    let Ok(payload) = serde_json::from_str::<Payload>("[\"pay 5\"]") else {
        return;
    };
    let peer = Peer::start([Act::answer(202)]).await;
    let request = DecisionRequest::new(Decision::Approve, IdempotencyKey::new("k-1").unwrap())
        .payload(payload)
        .comment("fine");
    let sent = builder(&peer.url()).build().unwrap().oneshot(request).await;
    let bodies: Vec<_> = peer
        .requests()
        .iter()
        .map(|seen| seen.body.clone())
        .collect();
    let whole = bodies
        .iter()
        .all(|body| String::from_utf8_lossy(body).contains("pay 5"));
    assert!(sent.is_err() || whole, "{bodies:?}");
}

#[tokio::test]
async fn the_reserved_member_is_found_beside_any_other() {
    let payload = Payload::from_json(r#"{"\ud800":1,"aegis":{"comment":"mine"}}"#);
    let Ok(payload) = payload else { return };
    let peer = Peer::start([Act::answer(202)]).await;
    let request = DecisionRequest::new(Decision::Approve, IdempotencyKey::new("k-1").unwrap())
        .payload(payload)
        .comment("other");
    let sent = builder(&peer.url()).build().unwrap().oneshot(request).await;
    assert!(
        sent.is_err_and(|error| error.is_request()),
        "{:?}",
        peer.requests()
    );
}

/// A body that says how long it is, and is not.
struct Lying {
    frames: std::collections::VecDeque<Bytes>,
    said: u64,
}

impl Lying {
    fn new(frames: &[&'static str], said: u64) -> Self {
        let frames = frames
            .iter()
            .map(|frame| Bytes::from_static(frame.as_bytes()));
        Self {
            frames: frames.collect(),
            said,
        }
    }
}

impl Body for Lying {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let frame = self.frames.pop_front();
        if let Some(frame) = &frame {
            self.said = self.said.saturating_sub(frame.len() as u64);
        }
        Poll::Ready(frame.map(|frame| Ok(Frame::data(frame))))
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.said)
    }
}

/// The bodies that a peer takes for whole requests, of a keyed POST that is answered 503 each time.
async fn whole_bodies(body: Lying) -> Vec<String> {
    let whole = Arc::new(Mutex::new(Vec::new()));
    let taken = whole.clone();
    let peer = Raw::start(move |_, mut stream| {
        let taken = taken.clone();
        async move {
            while let Some((_, body)) = read_request(&mut stream).await {
                taken.lock().unwrap().push(String::from_utf8(body).unwrap());
                let answer = b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n";
                let _ = stream.write_all(answer).await;
            }
        }
    })
    .await;
    let client = Client::builder(TokioExecutor::new()).build_http();
    let service = ServiceBuilder::new()
        .layer(ReplayBodyLayer::new())
        .layer(RetryLayer::new().backoff(Backoff::none()).max_retries(2))
        .service(client);
    let request = Request::post(peer.url()).header("idempotency-key", "k-1");
    let _ = ends(service.oneshot(request.body(body).unwrap())).await;
    let whole = whole.lock().unwrap();
    whole.clone()
}

#[tokio::test]
async fn a_body_that_ends_before_its_length_is_never_sent_as_whole() {
    assert_eq!(whole_bodies(Lying::new(&["12345"], 10)).await, [""; 0]);
}

#[tokio::test]
async fn a_body_that_goes_beyond_its_length_is_not_longer_in_a_later_attempt() {
    let bodies = whole_bodies(Lying::new(&["1234567890"], 5)).await;
    assert!(bodies.iter().all(|body| body == &bodies[0]), "{bodies:?}");
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

// ---------------------------------------------------------------------------------------------------------------------
// Settings

#[test]
fn each_part_of_a_proxys_url_is_checked() {
    let mut taken = Vec::new();
    for url in [
        "",
        "*",
        "http://",
        "http://host:99999",
        "http://host:0",
        "http://host:",
        "http://[fe80::1%25eth0]:3128",
        "http://user:p@ss@host:3128",
        "socks5://host:1080",
        "https://host:3128",
        "ftp://host",
        "http://host:3128/path",
        "http://host:3128?query",
    ] {
        let built = builder("http://example.com").proxy(url).build();
        match built {
            Ok(_) => taken.push(url),
            Err(error) => assert!(error.is_config() && !said(&error).contains("p@ss"), "{url}"),
        }
    }
    assert!(taken.is_empty(), "{taken:?}");
}

// ---------------------------------------------------------------------------------------------------------------------
// Bytes by hand

fn head(rest: &str) -> Vec<u8> {
    format!("HTTP/1.1 {rest}").into_bytes()
}

fn sized(status: &str, body: &[u8]) -> Vec<u8> {
    let mut answer = head(&format!(
        "{status}\r\nContent-Length: {}\r\n\r\n",
        body.len()
    ));
    answer.extend_from_slice(body);
    answer
}

#[tokio::test]
async fn no_malformed_answer_is_a_receipt() {
    let ok = br#"{"code":"duplicate"}"#;
    let utf16: Vec<u8> = "{\"a\":1}"
        .encode_utf16()
        .flat_map(u16::to_le_bytes)
        .collect();
    let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    let deep_action = format!(r#"{{"action":{deep}}}"#);
    let deep_decision = format!(r#"{{"decision":{deep}}}"#);
    let many_headers = format!(
        "409 C\r\n{}Content-Length: 0\r\n\r\n",
        "x: y\r\n".repeat(20_000)
    );
    let long_header = format!(
        "409 C\r\nx: {}\r\nContent-Length: 0\r\n\r\n",
        "y".repeat(2_000_000)
    );
    let long_reason = format!("409 {}\r\nContent-Length: 0\r\n\r\n", "y".repeat(2_000_000));
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("nothing", vec![]),
        ("noise", vec![0xff; 1000]),
        ("a TLS alert", b"\x15\x03\x03\x00\x02\x02\x28".to_vec()),
        ("an HTTP/2 preface", b"\0\0\0\x04\0\0\0\0\0".to_vec()),
        ("HTTP/0.9", b"{\"code\":\"duplicate\"}".to_vec()),
        ("ICY", b"ICY 202 OK\r\n\r\n".to_vec()),
        (
            "HTTP/2.0",
            b"HTTP/2.0 202 OK\r\nContent-Length: 0\r\n\r\n".to_vec(),
        ),
        (
            "HTTP/1.2",
            b"HTTP/1.2 202 OK\r\nContent-Length: 0\r\n\r\n".to_vec(),
        ),
        (
            "a status of 000",
            head("000 X\r\nContent-Length: 0\r\n\r\n"),
        ),
        ("a status of 99", head("99 X\r\nContent-Length: 0\r\n\r\n")),
        (
            "a status of 2020",
            head("2020 X\r\nContent-Length: 0\r\n\r\n"),
        ),
        ("a status of 999", sized("999 X", ok)),
        ("200", sized("200 OK", ok)),
        ("201", sized("201 OK", ok)),
        ("203", sized("203 OK", ok)),
        ("204", head("204 X\r\n\r\n")),
        ("205", sized("205 X", b"")),
        ("206", sized("206 X", ok)),
        ("304", head("304 X\r\n\r\n")),
        ("300", sized("300 X", ok)),
        (
            "101",
            head("101 X\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n"),
        ),
        (
            "a negative length",
            head("409 C\r\nContent-Length: -1\r\n\r\n{}"),
        ),
        (
            "a signed length",
            head("409 C\r\nContent-Length: +2\r\n\r\n{}"),
        ),
        (
            "two lengths",
            head("409 C\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}x"),
        ),
        (
            "a length too large",
            head("409 C\r\nContent-Length: 20000\r\n\r\n{}"),
        ),
        (
            "a length that overflows",
            head("409 C\r\nContent-Length: 18446744073709551616\r\n\r\n{}"),
        ),
        (
            "a length too small",
            head("409 C\r\nContent-Length: 5\r\n\r\n{\"code\":\"duplicate\"}"),
        ),
        (
            "a chunk that is cut",
            head("409 C\r\nTransfer-Encoding: chunked\r\n\r\n14\r\n{\"code\""),
        ),
        (
            "a chunk without an end",
            head("409 C\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n"),
        ),
        (
            "a chunk that overflows",
            head("409 C\r\nTransfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\n{}"),
        ),
        (
            "a chunk of no number",
            head("409 C\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n"),
        ),
        ("endless chunk extensions", {
            let mut answer = head("409 C\r\nTransfer-Encoding: chunked\r\n\r\n2;");
            answer.extend(vec![b'x'; 2_000_000]);
            answer
        }),
        ("endless trailers", {
            let mut answer = head("409 C\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n");
            answer.extend(b"x: y\r\n".repeat(300_000));
            answer
        }),
        (
            "another coding last",
            head("409 C\r\nTransfer-Encoding: chunked, gzip\r\n\r\n2\r\n{}\r\n0\r\n\r\n"),
        ),
        ("many headers", head(&many_headers)),
        ("a long header", head(&long_header)),
        ("a long reason", head(&long_reason)),
        (
            "NUL in a header",
            head("409 C\r\nx: a\0b\r\nContent-Length: 0\r\n\r\n"),
        ),
        (
            "a header without a name",
            head("409 C\r\n: b\r\nContent-Length: 0\r\n\r\n"),
        ),
        (
            "BOM",
            sized("409 C", b"\xef\xbb\xbf{\"code\":\"duplicate\"}"),
        ),
        ("UTF-16", sized("409 C", &utf16)),
        ("NUL", sized("409 C", b"\0")),
        ("NUL at the end", sized("409 C", b"{}\0")),
        ("no UTF-8", sized("409 C", b"{\"code\":\"dupl\xffcate\"}")),
        ("two objects", sized("409 C", b"{}{}")),
        ("a comment", sized("409 C", b"{} // yes")),
        (
            "two codes",
            sized("409 C", br#"{"code":"x","code":"duplicate"}"#),
        ),
        (
            "two codes, escaped",
            sized("409 C", br#"{"code":"x","c\u006fde":"duplicate"}"#),
        ),
        (
            "two actions",
            sized(
                "409 C",
                br#"{"action":{"decision":"reject"},"action":{"decision":"approve"}}"#,
            ),
        ),
        (
            "two decisions in an action",
            sized(
                "409 C",
                br#"{"action":{"decision":"reject","decision":"approve"}}"#,
            ),
        ),
        (
            "a code and another type",
            sized(
                "409 C",
                br#"{"code":"payload-mismatch","type":"urn:aegis:problem:duplicate"}"#,
            ),
        ),
        (
            "the opposite, escaped",
            sized("409 C", br#"{"code":"duplicate","decision":"rej\u0065ct"}"#),
        ),
        (
            "the opposite in capitals",
            sized("409 C", br#"{"code":"duplicate","decision":"REJECT"}"#),
        ),
        (
            "a decision with a space",
            sized("409 C", br#"{"code":"duplicate","decision":"approve "}"#),
        ),
        (
            "a decision in a list",
            sized("409 C", br#"{"code":"duplicate","decision":["approve"]}"#),
        ),
        (
            "a decision that is true",
            sized("409 C", br#"{"code":"duplicate","decision":true}"#),
        ),
        (
            "a lone surrogate",
            sized("409 C", br#"{"code":"duplicate\ud800"}"#),
        ),
        ("deep nesting", sized("409 C", deep_action.as_bytes())),
        ("deep nesting", sized("202 A", deep_decision.as_bytes())),
        (
            "a 202 of another thread",
            sized("202 A", br#"{"thread_id":"run-8"}"#),
        ),
        (
            "a 202 in gzip",
            head("202 A\r\nContent-Encoding: gzip\r\nContent-Length: 0\r\n\r\n"),
        ),
        (
            "a 202 in two codings",
            head(
                "202 A\r\nContent-Encoding: identity\r\nContent-Encoding: br\r\nContent-Length: 0\r\n\r\n",
            ),
        ),
        (
            "a 202 of two types",
            head(
                "202 A\r\nContent-Type: application/json\r\nContent-Type: text/html\r\nContent-Length: 2\r\n\r\n{}",
            ),
        ),
        (
            "in flight",
            head("409 C\r\nRetry-After: 99999\r\nContent-Length: 2\r\n\r\n{}"),
        ),
        (
            "in flight till yesterday",
            head(
                "409 C\r\nRetry-After: Sun, 06 Nov 1994 08:49:37 GMT\r\nContent-Length: 2\r\n\r\n{}",
            ),
        ),
        (
            "in flight, blank",
            head("409 C\r\nRetry-After:\r\nContent-Length: 2\r\n\r\n{}"),
        ),
    ];
    let mut wrong = Vec::new();
    for (name, bytes) in cases {
        let peer = Raw::says(bytes).await;
        let service = builder(&peer.url())
            .timeout(Duration::from_secs(5))
            .max_retries(1)
            .build()
            .unwrap();
        let start = Instant::now();
        match ends(service.approve("k-1").into_future()).await {
            Ok(receipt) => wrong.push(format!("{name}: {receipt:?}")),
            Err(error) => {
                let said = said(&error);
                if !error.is_outcome_unknown() && !error.is_conflict() && !error.is_refused() {
                    wrong.push(format!("{name}: {said}"));
                }
            }
        }
        if start.elapsed() > Duration::from_secs(4) {
            wrong.push(format!("{name}: took {:?}", start.elapsed()));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[tokio::test]
async fn what_is_odd_but_whole_is_a_receipt() {
    let deep = "[".repeat(100_000) + &"]".repeat(100_000);
    let deep = format!(
        r#"{{"code":"duplicate","action":{{"request_id":"r-1","status":"COMMITTED","decision":"approve","payload":{deep},"created_at":{deep},"execution":1e999}}}}"#
    );
    let interim = "HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n".repeat(100_000);
    let mut hinted = interim.into_bytes();
    hinted.extend_from_slice(b"HTTP/1.1 100 Continue\r\n\r\n");
    hinted.extend_from_slice(&sized("202 A", b""));
    let cases: Vec<(&str, Vec<u8>)> = vec![
        (
            "HTTP/1.0 to its end",
            b"HTTP/1.0 409 C\r\n\r\n{\"code\":\"duplicate\"}".to_vec(),
        ),
        ("HTTP/1.0 202", b"HTTP/1.0 202 A\r\n\r\n".to_vec()),
        ("100,000 interim answers", hinted),
        (
            "trailers",
            head(
                "409 C\r\nTransfer-Encoding: chunked\r\nTrailer: x\r\n\r\n2\r\n{}\r\n0\r\nx: y\r\ncontent-type: text/html\r\n\r\n",
            ),
        ),
        (
            "chunks of one byte",
            head("409 C\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n1\r\n}\r\n0\r\n\r\n"),
        ),
        ("deep nesting", sized("409 C", deep.as_bytes())),
        (
            "a location elsewhere",
            head(
                "202 A\r\nLocation: http://evil.invalid/hitl/status/r-9\r\nContent-Length: 0\r\n\r\n",
            ),
        ),
        ("white space", sized("409 C", b" \r\n\t {} \n")),
    ];
    let mut wrong = Vec::new();
    for (name, bytes) in cases {
        let peer = Raw::says(bytes).await;
        match approve(&peer.url()).await {
            Err(error) => wrong.push(format!("{name}: {error:?}")),
            Ok(receipt) => {
                let _ = receipt.action();
                if receipt.request_id().is_some_and(|id| id.as_str() != "r-1") {
                    wrong.push(format!("{name}: {receipt:?}"));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[tokio::test]
async fn an_answer_before_its_request_is_no_answer_to_it() {
    let asked = Arc::new(AtomicUsize::new(0));
    let counter = asked.clone();
    // Two answers to one request, and never another one.
    let peer = Raw::start(move |_, mut stream| {
        let counter = counter.clone();
        async move {
            if read_request(&mut stream).await.is_none() {
                return;
            }
            counter.fetch_add(1, Ordering::SeqCst);
            let mut both = sized("503 Busy", b"");
            both.extend(sized("202 Accepted", b""));
            let _ = stream.write_all(&both).await;
            std::future::pending::<()>().await;
        }
    })
    .await;
    let service = builder(&peer.url())
        .timeout(Duration::from_millis(500))
        .build()
        .unwrap();
    let receipt = ends(service.approve("k-1").into_future()).await;
    assert!(receipt.is_err(), "{receipt:?} after {asked:?} requests");
    assert_eq!(asked.load(Ordering::SeqCst), peer.count());
}

#[tokio::test]
async fn a_drip_is_bounded_by_the_deadline_wherever_it_is() {
    let head_only = "HTTP/1.1 409 C\r\nx: ".to_owned();
    let interim = String::new();
    for (name, first, drop) in [
        ("head", head_only, "y"),
        ("interim answers", interim, "HTTP/1.1 103 Early\r\n\r\n"),
        (
            "409",
            "HTTP/1.1 409 C\r\nContent-Length: 100000\r\n\r\n{".to_owned(),
            " ",
        ),
        (
            "422",
            "HTTP/1.1 422 C\r\nContent-Length: 100000\r\n\r\n{".to_owned(),
            " ",
        ),
        (
            "503",
            "HTTP/1.1 503 C\r\nContent-Length: 100000\r\n\r\n{".to_owned(),
            " ",
        ),
        (
            "200",
            "HTTP/1.1 200 C\r\nContent-Length: 100000\r\n\r\n{".to_owned(),
            " ",
        ),
        (
            "trailers",
            "HTTP/1.1 409 C\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nx: ".to_owned(),
            "y",
        ),
    ] {
        let peer = Raw::start(move |_, mut stream| {
            let first = first.clone();
            async move {
                if read_request(&mut stream).await.is_none() {
                    return;
                }
                let _ = stream.write_all(first.as_bytes()).await;
                while stream.write_all(drop.as_bytes()).await.is_ok() {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            }
        })
        .await;
        let service = builder(&peer.url())
            .timeout(Duration::from_secs(30))
            .build()
            .unwrap();
        let start = Instant::now();
        let limit = Duration::from_millis(500);
        let result = ends(service.approve("k-1").deadline(limit).into_future()).await;
        assert!(result.is_err(), "{name}: {result:?}");
        let status = ends(service.status("r-1").deadline(limit).into_future()).await;
        assert!(status.is_err(), "{name}: {status:?}");
        assert!(
            start.elapsed() < Duration::from_secs(3),
            "{name}: {:?}",
            start.elapsed()
        );
    }
}

#[tokio::test]
async fn a_flood_of_interim_answers_does_not_outlast_the_deadline() {
    let peer = Raw::start(|_, mut stream| async move {
        if read_request(&mut stream).await.is_none() {
            return;
        }
        let flood = "HTTP/1.1 103 Early\r\n\r\n".repeat(1000);
        while stream.write_all(flood.as_bytes()).await.is_ok() {}
    })
    .await;
    let service = builder(&peer.url()).build().unwrap();
    let start = Instant::now();
    let call = service.approve("k-1").deadline(Duration::from_millis(500));
    assert!(ends(call.into_future()).await.is_err());
    assert!(
        start.elapsed() < Duration::from_secs(3),
        "{:?}",
        start.elapsed()
    );
}

// ---------------------------------------------------------------------------------------------------------------------
// HTTP/2 by hand

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    let mut frame = length[1..].to_vec();
    frame.extend([kind, flags]);
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;

/// A head with this status, uncompressed.
fn status(code: &str) -> Vec<u8> {
    let mut block = vec![0x08, 3];
    block.extend_from_slice(code.as_bytes());
    block
}

/// Greets as an HTTP/2 server and reads until the first request is there, or 100 ms of silence.
async fn greet(stream: &mut TcpStream) {
    let _ = stream.write_all(&frame(SETTINGS, 0, 0, &[])).await;
    let _ = stream.write_all(&frame(SETTINGS, 1, 0, &[])).await;
    let mut buffer = [0; 4096];
    let silence = Duration::from_millis(100);
    while let Ok(Ok(1..)) = tokio::time::timeout(silence, stream.read(&mut buffer)).await {}
}

/// Plays these bytes on each connection again and again, or once, and then keeps it open.
async fn h2_peer(bytes: Vec<u8>, repeat: bool) -> Raw {
    let bytes: Arc<[u8]> = bytes.into();
    Raw::start(move |_, mut stream| {
        let bytes = bytes.clone();
        async move {
            greet(&mut stream).await;
            let (mut reader, mut writer) = stream.into_split();
            let reading = async move {
                let mut buffer = [0; 4096];
                while let Ok(1..) = reader.read(&mut buffer).await {}
            };
            let writing = async move {
                while writer.write_all(&bytes).await.is_ok() && repeat {}
                std::future::pending::<()>().await;
            };
            tokio::select! { () = reading => {}, () = writing => {} }
        }
    })
    .await
}

fn h2_service(peer: &Raw) -> AegisService {
    builder(&peer.url())
        .http2_prior_knowledge()
        .timeout(Duration::from_millis(700))
        .max_retries(1)
        .build()
        .unwrap()
}

/// How much memory the process has, where the system tells it.
fn resident() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages = statm.split(' ').nth(1).and_then(|pages| pages.parse().ok());
    pages.unwrap_or(0_usize) * 4096
}

#[tokio::test]
async fn a_flood_of_frames_of_any_kind_is_bounded_in_time_and_memory() {
    let early = frame(HEADERS, END_HEADERS, 1, &status("103"));
    for (name, bytes) in [
        ("ping", frame(PING, 0, 0, &[7; 8])),
        ("settings", frame(SETTINGS, 0, 0, &[])),
        ("interim answers", early),
        ("empty data", frame(DATA, 0, 1, &[])),
        ("unknown frames", frame(200, 0, 0, &[0; 100])),
        ("resets", frame(RST_STREAM, 0, 1, &[0, 0, 0, 8])),
    ] {
        let mut flood = bytes.repeat(500);
        if name == "empty data" {
            flood.splice(0..0, frame(HEADERS, END_HEADERS, 1, &status("409")));
        }
        let repeat = name != "empty data";
        let peer = h2_peer(if repeat { flood } else { flood.repeat(1) }, repeat).await;
        let before = resident();
        let start = Instant::now();
        let result = ends(h2_service(&peer).approve("k-1").into_future()).await;
        assert!(result.is_err(), "{name}: {result:?}");
        assert!(
            start.elapsed() < Duration::from_secs(5),
            "{name}: {:?}",
            start.elapsed()
        );
        let grown = resident().saturating_sub(before);
        assert!(grown < 200 << 20, "{name}: {grown} bytes");
    }
}

#[tokio::test]
async fn an_answer_on_http_2_ends_as_its_frames_say() {
    let ok = frame(HEADERS, END_HEADERS | END_STREAM, 1, &status("202"));
    let duplicate = |rest: Vec<u8>| {
        let mut bytes = frame(HEADERS, END_HEADERS, 1, &status("409"));
        bytes.extend(rest);
        bytes
    };
    let whole = frame(DATA, END_STREAM, 1, b"{}");
    let half = frame(DATA, 0, 1, b"{}");
    let reset = |code: u8| frame(RST_STREAM, 0, 1, &[0, 0, 0, code]);
    let away = |code: u8| frame(GOAWAY, 0, 0, &[0, 0, 0, 1, 0, 0, 0, code]);
    for (name, bytes, is_receipt) in [
        (
            "reset without error after a whole answer",
            [duplicate(whole.clone()), reset(0)].concat(),
            true,
        ),
        (
            "reset after a whole answer",
            [ok.clone(), reset(8)].concat(),
            true,
        ),
        (
            "goaway with a whole answer",
            [away(0), duplicate(whole.clone())].concat(),
            true,
        ),
        (
            "reset in the body",
            duplicate([half.clone(), reset(7)].concat()),
            false,
        ),
        (
            "goaway in the body",
            duplicate([half.clone(), away(11)].concat()),
            false,
        ),
        ("reset without error and no answer", reset(0), false),
        (
            "trailers",
            duplicate(
                [
                    half.clone(),
                    frame(HEADERS, END_HEADERS | END_STREAM, 1, &[0, 1, b'x', 1, b'y']),
                ]
                .concat(),
            ),
            true,
        ),
        (
            "a status of no digits",
            frame(HEADERS, END_HEADERS | END_STREAM, 1, &status("2x2")),
            false,
        ),
        (
            "a 101",
            frame(HEADERS, END_HEADERS | END_STREAM, 1, &status("101")),
            false,
        ),
        (
            "a 100 that ends the stream",
            frame(HEADERS, END_HEADERS | END_STREAM, 1, &status("100")),
            false,
        ),
        (
            "a head without a status",
            frame(HEADERS, END_HEADERS | END_STREAM, 1, &[0, 1, b'x', 1, b'y']),
            false,
        ),
        (
            "another stream",
            frame(HEADERS, END_HEADERS | END_STREAM, 3, &status("202")),
            false,
        ),
        (
            "a pushed stream",
            frame(HEADERS, END_HEADERS | END_STREAM, 2, &status("202")),
            false,
        ),
        (
            "broken compression",
            frame(HEADERS, END_HEADERS | END_STREAM, 1, &[0xff; 20]),
            false,
        ),
        (
            "a frame too large",
            frame(DATA, 0, 1, &vec![0; 20_000]),
            false,
        ),
    ] {
        let peer = h2_peer(bytes, false).await;
        let result = ends(h2_service(&peer).approve("k-1").into_future()).await;
        assert_eq!(result.is_ok(), is_receipt, "{name}: {result:?}");
    }
}

#[tokio::test]
async fn an_answer_that_is_reset_before_its_end_confirms_nothing() {
    // Of the opposite decision, say; nobody will know, as the body never comes.
    let mut head = status("409");
    head.extend([0x0f, 28 - 15, 3, b'2', b'0', b'0']);
    let reset = |code| frame(RST_STREAM, 0, 1, &[0, 0, 0, code]);
    let away = |last| frame(GOAWAY, 0, 0, &[0, 0, 0, last, 0, 0, 0, 0]);
    let mut wrong = Vec::new();
    for (name, end) in [
        ("CANCEL", reset(8)),
        ("NO_ERROR", reset(0)),
        ("GOAWAY of this stream, NO_ERROR", away(0)),
    ] {
        for sent in ["", "{}"] {
            let mut bytes = frame(HEADERS, END_HEADERS, 1, &head);
            if !sent.is_empty() {
                bytes.extend(frame(DATA, 0, 1, sent.as_bytes()));
            }
            bytes.extend_from_slice(&end);
            let peer = h2_peer(bytes, false).await;
            if let Ok(receipt) = ends(h2_service(&peer).approve("k-1").into_future()).await {
                wrong.push(format!("{name} after '{sent}': {receipt:?}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[tokio::test]
async fn an_answer_that_is_reset_confirms_nothing_over_reqwest_either() {
    use aegis_hitl::adapter::ReqwestClient;

    let mut head = status("409");
    head.extend([0x0f, 28 - 15, 3, b'2', b'0', b'0']);
    let mut bytes = frame(HEADERS, END_HEADERS, 1, &head);
    bytes.extend(frame(RST_STREAM, 0, 1, &[0; 4]));
    let peer = h2_peer(bytes, false).await;
    let set = reqwest::Client::builder().http2_prior_knowledge();
    let service = builder(&peer.url())
        .timeout(Duration::from_millis(700))
        .max_retries(0)
        .build_with(ReqwestClient::from_builder(set).unwrap())
        .unwrap();
    let result = ends(service.approve("k-1").into_future()).await;
    assert!(result.is_err(), "{result:?}");
}

#[tokio::test]
async fn a_body_that_is_no_utf_8_is_no_json() {
    let peer = Raw::says(sized("409 C", b"{\"code\":\"duplicate\",\"x\":\"\xff\"}")).await;
    let result = approve(&peer.url()).await;
    assert!(result.is_err(), "{result:?}");
}

#[tokio::test]
async fn a_length_that_data_on_http_2_does_not_have_breaks_the_answer() {
    // content-length: 20
    let mut block = status("409");
    block.extend([0x0f, 28 - 15, 2, b'2', b'0']);
    let mut bytes = frame(HEADERS, END_HEADERS, 1, &block);
    bytes.extend(frame(DATA, END_STREAM, 1, b"{}"));
    let peer = h2_peer(bytes, false).await;
    let result = ends(h2_service(&peer).approve("k-1").into_future()).await;
    assert!(result.is_err(), "{result:?}");
}

// ---------------------------------------------------------------------------------------------------------------------
// TLS and proxies

mod tls {
    use aegis_hitl::layer::NotRetried;
    use rcgen::{CertificateParams, KeyPair};
    use tokio_rustls::TlsAcceptor;
    use tokio_rustls::rustls::ServerConfig;
    use tokio_rustls::rustls::pki_types::PrivateKeyDer;

    use super::*;

    async fn server(params: CertificateParams) -> (Peer, String) {
        let key = KeyPair::generate().unwrap();
        let cert = params.self_signed(&key).unwrap();
        let provider = Arc::new(tokio_rustls::rustls::crypto::ring::default_provider());
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(
                vec![cert.der().clone()],
                PrivateKeyDer::try_from(key.serialize_der()).unwrap(),
            )
            .unwrap();
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let accept = move |stream| acceptor.accept(stream);
        (
            Peer::start_over([Act::answer(202)], accept).await,
            cert.pem(),
        )
    }

    fn for_name(name: &str) -> CertificateParams {
        CertificateParams::new([name.to_owned()]).unwrap()
    }

    fn secure(port: u16, pem: &str) -> Builder {
        builder(&format!("https://localhost:{port}")).root_certificate_pem(pem)
    }

    #[tokio::test]
    async fn a_certificate_of_another_name_or_time_is_refused_at_once() {
        let mut expired = for_name("localhost");
        expired.not_after = rcgen::date_time_ymd(2001, 1, 1);
        let mut future = for_name("localhost");
        future.not_before = rcgen::date_time_ymd(3000, 1, 1);
        for (what, params) in [
            ("another name", for_name("elsewhere.test")),
            ("expired", expired),
            ("not yet valid", future),
        ] {
            let (peer, pem) = server(params).await;
            let service = secure(peer.address().port(), &pem).build().unwrap();
            let error = ends(service.approve("k-1").into_future())
                .await
                .unwrap_err();
            assert!(
                error.is_connect() && !error.is_outcome_unknown(),
                "{what}: {error:?}"
            );
            assert_eq!(error.not_retried(), Some(NotRetried::Permanent), "{what}");
            assert_eq!((error.attempts(), peer.count()), (1, 0), "{what}");
        }
    }

    #[tokio::test]
    async fn a_proxy_that_stalls_or_lies_in_the_tunnel_is_sent_no_request() {
        let (_, pem) = server(for_name("localhost")).await;
        let flood = format!("HTTP/1.1 200 OK\r\n{}", "x: y\r\n".repeat(10_000));
        let cases: [(&str, Vec<u8>); 9] = [
            ("silence", vec![]),
            ("half a head", b"HTTP/1.1 200 OK\r\n".to_vec()),
            ("endless headers", flood.into_bytes()),
            (
                "an open tunnel to nowhere",
                b"HTTP/1.1 200 OK\r\n\r\n".to_vec(),
            ),
            (
                "its own answer",
                sized("202 Accepted", b"{\"status\":\"COMMITTED\"}"),
            ),
            (
                "its own answer for a tunnel",
                sized("200 OK", b"HTTP/1.1 202 Accepted\r\n\r\n"),
            ),
            (
                "a demand",
                head("407 Who\r\nProxy-Authenticate: Basic\r\n\r\n"),
            ),
            ("a refusal", head("403 No\r\n\r\n")),
            ("noise", vec![0xff; 10_000]),
        ];
        for (what, bytes) in cases {
            let heard = Arc::new(Mutex::new(Vec::new()));
            let log = heard.clone();
            let proxy = Raw::start(move |_, mut stream| {
                let (bytes, log) = (bytes.clone(), log.clone());
                async move {
                    let _ = read_request(&mut stream).await;
                    let _ = stream.write_all(&bytes).await;
                    let mut buffer = [0; 4096];
                    while let Ok(read @ 1..) = stream.read(&mut buffer).await {
                        log.lock().unwrap().extend_from_slice(&buffer[..read]);
                    }
                }
            })
            .await;
            let service = secure(1, &pem)
                .proxy(format!("http://user:secret@{}", proxy.address))
                .timeout(Duration::from_millis(600))
                .max_retries(1)
                .build()
                .unwrap();
            let start = Instant::now();
            let error = ends(service.approve("k-1").into_future())
                .await
                .unwrap_err();
            assert!(
                error.is_connect() && !error.is_outcome_unknown(),
                "{what}: {error:?}"
            );
            assert!(start.elapsed() < Duration::from_secs(5), "{what}");
            let said = said(&error);
            assert!(
                !said.contains("secret") && !said.contains("dXNlcjpzZWNyZXQ"),
                "{said}"
            );
            let heard = String::from_utf8_lossy(&heard.lock().unwrap()).to_lowercase();
            assert!(
                !heard.contains("k-1") && !heard.contains("acme"),
                "{what}: {heard}"
            );
        }
    }

    #[test]
    fn a_client_identity_of_another_key_is_a_wrong_setting() {
        let key = KeyPair::generate().unwrap();
        let other = KeyPair::generate().unwrap();
        let pem = for_name("agent").self_signed(&key).unwrap().pem();
        let identity = format!("{pem}{}", other.serialize_pem());
        let error = builder("https://localhost:1")
            .client_identity_pem(identity)
            .build()
            .unwrap_err();
        assert!(error.is_config(), "{error:?}");
        assert!(!said(&error).contains("PRIVATE"), "{error:?}");
    }
}

#[tokio::test]
async fn a_proxy_that_answers_by_itself_confirms_nothing() {
    for (status, kind, body) in [
        (200, "text/html", "<html>portal</html>"),
        (202, "text/html", "<html>portal</html>"),
        (302, "text/html", ""),
        (407, "text/html", "who?"),
        (409, "text/html", "<html>conflict</html>"),
        (502, "text/html", "bad"),
    ] {
        let act = Act::answer(status)
            .header("content-type", kind)
            .header("location", "http://portal.invalid/")
            .header("proxy-authenticate", "Basic")
            .body(body);
        let proxy = Peer::start([act]).await;
        let service = builder("http://server.test")
            .proxy(proxy.url().replace("http://", "http://user:secret@"))
            .build()
            .unwrap();
        let error = ends(service.approve("k-1").into_future())
            .await
            .unwrap_err();
        let said = said(&error);
        assert!(
            !said.contains("secret") && !said.contains("dXNlcjpzZWNyZXQ"),
            "{said}"
        );
        let sent = if status == 502 { 4 } else { 1 };
        assert_eq!(proxy.count(), sent, "{status}: {error:?}");
    }
}

// The environment of a process is not to be changed while it runs, so another process has it.
async fn under(environment: &[(&str, &str)], proxied: bool) -> bool {
    let proxy = Peer::start([Act::answer(202)]).await;
    let mut command = tokio::process::Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "one_call_to_another_host", "--ignored"]);
    for name in [
        "HTTP_PROXY",
        "http_proxy",
        "ALL_PROXY",
        "all_proxy",
        "NO_PROXY",
        "no_proxy",
    ] {
        command.env_remove(name);
    }
    for (name, value) in environment {
        command.env(name, value.replace("PROXY", &proxy.address().to_string()));
    }
    let output = command.kill_on_drop(true).output().await.unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(!said.contains("secret"), "{said}");
    (proxy.count() == 1) == proxied
}

#[tokio::test]
#[ignore = "run by others"]
async fn one_call_to_another_host() {
    let result =
        builder(&std::env::var("ADVERSARY_URL").unwrap_or("http://server.invalid".to_owned()))
            .max_retries(0)
            .build();
    match result {
        Ok(service) => println!(
            "sent: {:?}",
            ends(service.approve("k-1").into_future()).await
        ),
        Err(error) => println!("refused: {}", said(&error)),
    }
}

#[tokio::test]
async fn the_environments_proxy_is_taken_as_curl_takes_it() {
    let proxy = "http://user:secret@PROXY";
    for (environment, proxied) in [
        (&[("HTTP_PROXY", proxy)][..], true),
        (&[("http_proxy", proxy)], true),
        (&[("ALL_PROXY", proxy)], true),
        (&[("HTTPS_PROXY", proxy)], false),
        (&[("HTTP_PROXY", "PROXY")], true),
        (&[("HTTP_PROXY", proxy), ("NO_PROXY", "*")], false),
        (
            &[("HTTP_PROXY", proxy), ("NO_PROXY", "a, .invalid ,b")],
            false,
        ),
        (&[("HTTP_PROXY", proxy), ("NO_PROXY", "invalid")], false),
        (
            &[("HTTP_PROXY", proxy), ("NO_PROXY", "SERVER.invalid")],
            false,
        ),
        (
            &[("HTTP_PROXY", proxy), ("NO_PROXY", "erver.invalid")],
            true,
        ),
        (&[("HTTP_PROXY", proxy), ("NO_PROXY", ",,,")], true),
        // httpoxy: a header of a CGI request.
        (&[("HTTP_PROXY", proxy), ("REQUEST_METHOD", "GET")], false),
        (&[("HTTP_PROXY", "socks5://user:secret@PROXY")], false),
    ] {
        assert!(under(environment, proxied).await, "{environment:?}");
    }
}

#[tokio::test]
async fn an_unusable_proxy_of_the_environment_is_not_passed_by() {
    // Whoever sets one may have to keep requests from going out directly.
    let proxy = Peer::start([Act::answer(202)]).await;
    let output = tokio::process::Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "one_call_to_another_host",
            "--ignored",
            "--nocapture",
        ])
        .env("HTTP_PROXY", format!("http://us er@{}", proxy.address()))
        .kill_on_drop(true)
        .output()
        .await
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(said.contains("refused: "), "{said}");
}

// ---------------------------------------------------------------------------------------------------------------------
// Times

#[tokio::test]
async fn no_time_is_too_long_or_too_short() {
    let times = [Duration::ZERO, Duration::from_nanos(1), Duration::MAX];
    for timeout in times {
        for deadline in times {
            let peer = Peer::start([Act::answer(202)]).await;
            let service = AegisService::builder()
                .base_url(peer.url())
                .tenant_id("acme")
                .thread_id("run-7")
                .backoff(Backoff::constant(Duration::MAX))
                .timeout(timeout)
                .deadline(deadline)
                .on_duplicate(OnDuplicate::Verify)
                .max_retries(u32::MAX)
                .build();
            let is_none = timeout.is_zero() || deadline.is_zero();
            assert_eq!(service.is_err(), is_none);
            let other = builder(&peer.url()).build().unwrap();
            for service in service.into_iter().chain([other]) {
                let call = service
                    .approve("k-1")
                    .timeout(timeout)
                    .deadline(deadline)
                    .max_retries(0);
                let _ = ends(call.into_future()).await;
                let call = service
                    .status("r-1")
                    .timeout(timeout)
                    .deadline(deadline)
                    .wait(Duration::MAX);
                let _ = ends(call.max_retries(0).into_future()).await;
            }
        }
    }
}

#[tokio::test]
async fn no_retry_after_makes_a_call_hang_or_come_early() {
    for (value, attempts) in [
        ("-5", 2),
        ("1e9", 2),
        ("0x10", 2),
        ("NaN", 2),
        ("inf", 2),
        ("0", 2),
        ("00000000000000000000", 2),
        ("0.0", 2),
        (" 0 ", 2),
        ("Sun, 06 Nov 1994 08:49:37 GMT", 2),
        ("Sunday, 06-Nov-94 08:49:37 GMT", 2),
        ("Sun Nov  6 08:49:37 1994", 2),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 1),
        ("99999999999999999999999999", 1),
        ("99999999999999999999999999.5", 1),
        ("30.000000001", 1),
        ("31", 1),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 2),
        ("Thu, 99 Jan 1970 99:99:99 GMT", 2),
        ("Mon, 01 Jan 0000 00:00:00 GMT", 2),
        ("\u{e9}", 2),
    ] {
        let answer = format!("503 Busy\r\nContent-Length: 0\r\nRetry-After: {value}\r\n\r\n");
        let peer = Raw::says(head(&answer)).await;
        let service = builder(&peer.url()).max_retries(1).build().unwrap();
        let error = ends(service.approve("k-1").into_future())
            .await
            .unwrap_err();
        assert_eq!(error.attempts(), attempts, "{value}: {error:?}");
    }
}

#[tokio::test]
async fn a_call_that_is_dropped_anywhere_costs_no_budget_and_harms_no_other() {
    let budget = aegis_hitl::layer::Budget::new(0.0).burst(50);
    let before = format!("{budget:?}");
    let peer = Peer::start([Act::answer(503).body("{}")]).await;
    let service = builder(&peer.url())
        .backoff(Backoff::constant(Duration::from_secs(60)))
        .budget(budget.clone())
        .build()
        .unwrap();
    for polls in 0..40 {
        let mut call = service.approve("k-1").into_future();
        let mut left = polls;
        let dropped = std::future::poll_fn(|cx| {
            if left == 0 {
                return Poll::Ready(());
            }
            left -= 1;
            if call.as_mut().poll(cx).is_ready() {
                return Poll::Ready(());
            }
            cx.waker().wake_by_ref();
            Poll::Pending
        });
        ends(dropped).await;
        drop(call);
        tokio::task::yield_now().await;
    }
    assert_eq!(format!("{budget:?}"), before);
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

// ---------------------------------------------------------------------------------------------------------------------
// Secrets

#[tokio::test]
async fn no_error_of_the_reqwest_adapter_shows_what_a_url_hides() {
    use aegis_hitl::adapter::ReqwestClient;
    use aegis_hitl::testing::ClosedPort;

    let closed = ClosedPort::new();
    let client = ReqwestClient::from_builder(reqwest::Client::builder()).unwrap();
    let mut wrong = Vec::new();
    for url in [
        format!("http://user:secret@{}/", closed.address()),
        format!("http://{}/?token=secret", closed.address()),
        "ftp://user:secret@host/".to_owned(),
    ] {
        let request = Request::post(&url).body(Full::<Bytes>::default()).unwrap();
        let service = RetryLayer::new().max_retries(0).layer(client.clone());
        let error = ends(service.oneshot(request)).await.unwrap_err();
        let said = said(&error);
        if said.contains("secret") {
            wrong.push(format!("{url}: {said:.300}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
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

// ---------------------------------------------------------------------------------------------------------------------
// Second look

#[tokio::test]
async fn a_body_that_is_always_busy_does_not_outlast_its_patience() {
    struct Busy(Pin<Box<dyn Future<Output = ()> + Send>>);

    impl Body for Busy {
        type Data = Bytes;
        type Error = Infallible;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
            self.0.as_mut().poll(cx).map(|()| None)
        }
    }

    for status in [202, 503] {
        let client = service_fn(move |_: Request<Full<Bytes>>| async move {
            let body = Busy(Box::pin(busy()));
            Ok::<_, Infallible>(Response::builder().status(status).body(body).unwrap())
        });
        let service = AegisService::builder()
            .tenant_id("acme")
            .thread_id("run-7")
            .timeout(Duration::from_secs(2))
            .max_retries(0)
            .build_with(client)
            .unwrap();
        let call = service.approve("k-1").deadline(Duration::from_secs(2));
        let ended = tokio::time::timeout(Duration::from_secs(5), call.into_future()).await;
        assert!(ended.is_ok(), "no timer ends the body of a {status}");
    }
}

#[tokio::test]
async fn an_empty_body_that_says_it_is_a_problem_confirms_nothing() {
    // Nothing tells it from one that was cut off behind the head.
    let peer = Raw::says(head(
        "409 C\r\nContent-Type: application/problem+json\r\n\r\n",
    ))
    .await;
    let result = approve(&peer.url()).await;
    assert!(result.is_err(), "{result:?}");
}

#[tokio::test]
async fn a_body_shorter_than_its_length_is_cut_off_whatever_the_client() {
    let client = service_fn(|_: Request<Full<Bytes>>| async {
        let head = Response::builder()
            .status(409)
            .header("content-length", "200");
        Ok::<_, Infallible>(head.body(Full::<Bytes>::default()).unwrap())
    });
    let service = AegisService::builder()
        .tenant_id("acme")
        .thread_id("run-7")
        .max_retries(0)
        .build_with(client)
        .unwrap();
    let result = service.approve("k-1").await;
    assert!(result.is_err(), "{result:?}");
}

#[tokio::test]
async fn the_status_of_another_tenants_action_is_no_answer() {
    let mut json = action("approve");
    json["tenant_id"] = json!("other");
    let peer = Peer::start([answer_with(200, &json)]).await;
    let status = builder(&peer.url()).build().unwrap().status("r-1").await;
    assert!(status.is_err(), "{status:?}");
}

#[tokio::test]
async fn a_call_without_retries_asks_for_a_status_once() {
    let peer = Peer::start([Act::answer(409), Act::answer(503)]).await;
    let service = builder(&peer.url())
        .on_duplicate(OnDuplicate::Verify)
        .build()
        .unwrap();
    let call = service.approve("k-1").max_retries(0);
    assert!(ends(call.into_future()).await.is_err());
    assert_eq!(peer.count(), 2);
}

#[tokio::test]
async fn a_flood_of_continuations_is_bounded() {
    let peer = Raw::start(|_, mut stream| async move {
        greet(&mut stream).await;
        let mut bytes = frame(HEADERS, 0, 1, &status("409"));
        let more = frame(9, 0, 1, &[&[0, 1, b'x', 100][..], &[b'y'; 100]].concat()).repeat(100);
        bytes.extend_from_slice(&more);
        while stream.write_all(&bytes).await.is_ok() {
            bytes.clone_from(&more);
        }
    })
    .await;
    let before = resident();
    let result = ends(h2_service(&peer).approve("k-1").into_future()).await;
    assert!(result.is_err(), "{result:?}");
    assert!(resident().saturating_sub(before) < 200 << 20);
}

#[tokio::test]
async fn a_server_on_any_loopback_address_is_reached_past_the_environments_proxy() {
    let proxy = Peer::start([Act::answer(202)]).await;
    for url in [
        "http://localhost.:1",
        "http://[::ffff:127.0.0.1]:1",
        "http://127.1:1",
        "http://127.9.9.9:1",
    ] {
        let output = tokio::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "one_call_to_another_host", "--ignored"])
            .env("HTTP_PROXY", proxy.url())
            .env("ADVERSARY_URL", url)
            .kill_on_drop(true)
            .output()
            .await
            .unwrap();
        assert!(output.status.success());
        assert_eq!(proxy.count(), 0, "{url}");
    }
}

/// A source of frames, some of which come late.
struct Script(std::collections::VecDeque<Option<Result<Frame<Bytes>, &'static str>>>);

impl Body for Script {
    type Data = Bytes;
    type Error = &'static str;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, &'static str>>> {
        match self.0.pop_front() {
            None => Poll::Ready(None),
            Some(None) => {
                cx.waker().wake_by_ref();
                Poll::Pending
            }
            Some(Some(frame)) => Poll::Ready(Some(frame)),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.0.is_empty()
    }
}

// Copies made and read in any order: each is the whole body or an error, and says nothing else of itself before.
#[test]
fn every_copy_of_a_body_is_the_whole_of_it_or_an_error() {
    use aegis_hitl::layer::{Replay, ReplayBody};

    let mut seed = 7_u64;
    let mut next = move |below: u64| {
        seed = seed
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) % below
    };
    for round in 0..20_000 {
        let mut whole = Vec::new();
        let mut frames = std::collections::VecDeque::new();
        let mut failed = false;
        for _ in 0..next(6) {
            match next(8) {
                0 => frames.push_back(None),
                1 => frames.push_back(Some(Ok(Frame::data(Bytes::new())))),
                2 if next(4) == 0 => {
                    failed = true;
                    frames.push_back(Some(Err("broken")));
                    break;
                }
                _ => {
                    let byte = u8::try_from(next(26)).unwrap() + b'a';
                    let data = vec![byte; usize::try_from(next(5)).unwrap()];
                    whole.extend_from_slice(&data);
                    frames.push_back(Some(Ok(Frame::data(data.into()))));
                }
            }
        }
        let has_trailers = !failed && next(3) == 0;
        if has_trailers {
            let mut trailers = http::HeaderMap::new();
            trailers.insert("x", http::HeaderValue::from_static("y"));
            frames.push_back(Some(Ok(Frame::trailers(trailers))));
        }
        let cap = usize::try_from(next(12)).unwrap();
        let mut copies = vec![(
            ReplayBody::new(Script(frames), cap),
            Vec::new(),
            false,
            false,
        )];
        let mut cx = Context::from_waker(std::task::Waker::noop());
        for _ in 0..40 {
            let at = usize::try_from(next(copies.len() as u64 + 1)).unwrap();
            let Some((body, read, trailed, ended)) = copies.get_mut(at) else {
                let from = usize::try_from(next(copies.len() as u64)).unwrap();
                if let Some(copy) = copies[from].0.replay() {
                    copies.push((copy, Vec::new(), false, false));
                }
                continue;
            };
            if *ended {
                continue;
            }
            let left = (whole.len() - read.len()) as u64;
            if !failed && body.is_end_stream() {
                assert_eq!((left, *trailed), (0, has_trailers), "round {round}");
            }
            assert!(
                !failed || !body.is_end_stream() || left == 0,
                "round {round}"
            );
            let hint = body.size_hint();
            if !failed && hint.lower() > 0 {
                assert!(hint.lower() <= left, "round {round}: {hint:?} of {left}");
            }
            match Pin::new(body).poll_frame(&mut cx) {
                Poll::Pending => {}
                Poll::Ready(None) => {
                    assert!(!failed, "round {round}: a failed body ended as whole");
                    assert_eq!((&*read, *trailed), (&whole, has_trailers), "round {round}");
                    *ended = true;
                }
                Poll::Ready(Some(Err(_))) => *ended = true,
                Poll::Ready(Some(Ok(frame))) => match frame.into_data() {
                    Ok(data) => {
                        assert!(!*trailed || data.is_empty());
                        read.extend_from_slice(&data);
                        assert!(whole.starts_with(read), "round {round}");
                    }
                    Err(_) => *trailed = true,
                },
            }
        }
    }
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
async fn a_connection_that_takes_no_streams_or_no_data_is_not_used_for_the_next_attempt() {
    // SETTINGS_MAX_CONCURRENT_STREAMS and SETTINGS_INITIAL_WINDOW_SIZE, both 0.
    for setting in [3, 4] {
        let peer = Raw::start(move |connection, mut stream| async move {
            if connection == 0 {
                let none = [0, setting, 0, 0, 0, 0];
                let _ = stream.write_all(&frame(SETTINGS, 0, 0, &none)).await;
                let mut buffer = [0; 4096];
                while let Ok(1..) = stream.read(&mut buffer).await {}
            } else {
                greet(&mut stream).await;
                let ok = frame(HEADERS, END_HEADERS | END_STREAM, 1, &status("202"));
                let _ = stream.write_all(&ok).await;
                std::future::pending::<()>().await;
            }
        })
        .await;
        let receipt = ends(h2_service(&peer).approve("k-1").into_future()).await;
        assert!(receipt.is_ok(), "{setting}: {receipt:?}");
        assert_eq!(receipt.unwrap().attempts(), 2, "{setting}");
    }
}

#[tokio::test]
async fn a_call_that_fails_at_once_lets_others_run_between_its_attempts() {
    let client = service_fn(|_: Request<Full<Bytes>>| async {
        Err::<Response<Full<Bytes>>, _>(std::io::Error::other("shed"))
    });
    let service = RetryLayer::new()
        .backoff(Backoff::none())
        .budget(None)
        .max_retries(1_000_000)
        .layer(client);
    let request = Request::put("/").body(Full::default()).unwrap();
    let start = Instant::now();
    let limit = Duration::from_millis(50);
    let result = tokio::time::timeout(limit, service.oneshot(request)).await;
    let elapsed = start.elapsed();
    assert!(
        elapsed < Duration::from_secs(1),
        "{elapsed:?}: {:?}",
        result.is_err()
    );
}

// Whatever is changed in an answer: no panic, and no receipt that the answer itself contradicts.
#[tokio::test]
async fn no_changed_answer_panics_or_confirms_what_it_contradicts() {
    let whole = [
        action("approve").to_string(),
        action("reject").to_string(),
        json!({"type": "urn:aegis:problem:duplicate", "status": 409, "code": "duplicate",
               "action": action("approve")})
        .to_string(),
        json!({"type": "urn:aegis:problem:decision-conflict", "status": 422, "code": "decision-conflict",
               "detail": "d", "action": action("reject")})
        .to_string(),
        json!({"action": action("reject"), "request_id": "r-2", "decision": null}).to_string(),
    ];
    let words = [
        "null",
        "1e999",
        "-0",
        "\"reject\"",
        "\"approve\"",
        "{",
        "}",
        "[",
        "]",
        ",",
        ":",
        "\"",
        "\\u0000",
        "\\ud800",
        "\"decision\":",
        "\"action\":{",
        "\u{feff}",
        "\u{2028}",
        "99999999999999999999",
        "true",
        "PENDING",
    ];
    let mut seed = 11_u64;
    let mut next = move |below: usize| {
        seed = seed
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(seed >> 33).unwrap() % below
    };
    for _ in 0..20_000 {
        let mut body = whole[next(whole.len())].clone().into_bytes();
        for _ in 0..=next(3) {
            let at = next(body.len() + 1);
            let to = (at + next(12)).min(body.len());
            match next(4) {
                0 => drop(body.splice(at..to, words[next(words.len())].bytes())),
                1 => drop(body.splice(at..at, words[next(words.len())].bytes())),
                2 => drop(body.drain(at..to)),
                _ if at < body.len() => body[at] = u8::try_from(next(256)).unwrap(),
                _ => body.truncate(at),
            }
        }
        let status = [200, 202, 409, 409, 422, 503, 404][next(7)];
        let sent = Bytes::from(body);
        let answer = sent.clone();
        let client = service_fn(move |_: Request<Full<Bytes>>| {
            let response = Response::builder()
                .status(status)
                .body(Full::<Bytes>::from(answer.clone()));
            async move { Ok::<_, Infallible>(response.unwrap()) }
        });
        let service = AegisService::builder()
            .tenant_id("acme")
            .thread_id("run-7")
            .max_retries(0)
            .build_with(client)
            .unwrap();
        let receipt = service.approve("k-1").await;
        let _ = service.status("r-1").await;
        if let Err(error) = &receipt {
            let _ = (said(error), error.recorded(), error.is_outcome_unknown());
            continue;
        }
        let receipt = receipt.unwrap();
        let _ = (format!("{receipt:?}"), receipt.action());
        let shown = String::from_utf8_lossy(&sent);
        assert!(matches!(status, 202 | 409), "{status} {shown}");
        let Ok(told) = serde_json::from_slice::<Value>(&sent) else {
            // Of what serde skips it knows less; see the test of UTF-8.
            assert!(
                sent.is_empty() || sent.trim_ascii().starts_with(b"{"),
                "{shown}"
            );
            continue;
        };
        for told in [&told, &told["action"]] {
            for (member, expected) in [
                ("decision", "approve"),
                ("tenant_id", "acme"),
                ("thread_id", "run-7"),
                ("idempotency_key", "k-1"),
            ] {
                let agrees = told[member].is_null() || told[member] == expected;
                assert!(agrees, "{status} {shown}");
            }
            assert_ne!(told["status"], "PENDING", "{shown}");
        }
    }
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

mod truncation {
    use rcgen::{CertifiedKey, generate_simple_self_signed};
    use tokio_rustls::TlsAcceptor;
    use tokio_rustls::rustls::ServerConfig;
    use tokio_rustls::rustls::pki_types::PrivateKeyDer;

    use super::*;

    // Whoever sits on the path can close the connection of TLS below, but not say so within it.
    #[tokio::test]
    async fn an_answer_to_the_end_of_a_tls_connection_needs_that_end() {
        let CertifiedKey { cert, signing_key } =
            generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let provider = Arc::new(tokio_rustls::rustls::crypto::ring::default_provider());
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(
                vec![cert.der().clone()],
                PrivateKeyDer::try_from(signing_key.serialize_der()).unwrap(),
            )
            .unwrap();
        let acceptor = TlsAcceptor::from(Arc::new(config));
        for (is_notified, bytes) in [
            (true, "HTTP/1.1 409 C\r\n\r\n{}"),
            (false, "HTTP/1.1 409 C\r\n\r\n{}"),
            (false, "HTTP/1.1 409 C\r\n\r\n"),
        ] {
            let acceptor = acceptor.clone();
            let peer = Raw::start(move |_, stream| {
                let accepted = acceptor.accept(stream);
                async move {
                    let Ok(mut stream) = accepted.await else {
                        return;
                    };
                    let mut head = Vec::new();
                    while !head.ends_with(b"{}") {
                        let Ok(byte) = stream.read_u8().await else {
                            return;
                        };
                        head.push(byte);
                    }
                    stream.write_all(bytes.as_bytes()).await.unwrap();
                    stream.flush().await.unwrap();
                    if is_notified {
                        stream.shutdown().await.unwrap();
                    } else {
                        stream.get_mut().0.shutdown().await.unwrap();
                    }
                    let _ = stream.get_mut().0.read(&mut [0; 1]).await;
                }
            })
            .await;
            let service = builder(&format!("https://localhost:{}", peer.address.port()))
                .root_certificate_pem(cert.pem())
                .max_retries(0)
                .build()
                .unwrap();
            let result = ends(service.approve("k-1").into_future()).await;
            assert_eq!(result.is_ok(), is_notified, "{bytes:?}: {result:?}");
        }
    }
}

/// The longest time that can be added to what a clock says now.
fn longest() -> Duration {
    let now = tokio::time::Instant::now();
    let mut longest = Duration::ZERO;
    for bit in (0..94).rev() {
        let nanos = 1_u128 << bit;
        let more = Duration::new(
            u64::try_from(nanos / 1_000_000_000).unwrap_or(u64::MAX),
            u32::try_from(nanos % 1_000_000_000).unwrap(),
        );
        if let Some(longer) = longest.checked_add(more)
            && now.checked_add(longer).is_some()
        {
            longest = longer;
        }
    }
    longest
}

// A clock can hold it, but nothing can be added to it.
#[tokio::test(start_paused = true)]
async fn the_last_instant_that_a_clock_can_hold_is_no_panic() {
    let set: [fn(RetryLayer) -> RetryLayer; 4] = [
        |layer| layer.attempt_timeout(None).deadline(longest()),
        |layer| layer.attempt_timeout(longest()),
        |layer| layer.backoff(Backoff::constant(longest())),
        |layer| layer.drain(1, longest()),
    ];
    let mut panicked = Vec::new();
    for (at, set) in set.into_iter().enumerate() {
        for status in [None, Some(503)] {
            let client = service_fn(move |_: Request<Full<Bytes>>| async move {
                let Some(status) = status else {
                    return std::future::pending().await;
                };
                let never = futures_util::stream::pending::<Result<Frame<Bytes>, Infallible>>();
                let body = http_body_util::StreamBody::new(never);
                Ok::<_, Infallible>(Response::builder().status(status).body(body).unwrap())
            });
            let request = Request::put("/").body(Full::default()).unwrap();
            let call = set(RetryLayer::new()).layer(client).oneshot(request);
            let call = tokio::time::timeout(Duration::from_secs(3600), call);
            if tokio::spawn(async move { drop(call.await) }).await.is_err() {
                panicked.push((at, status));
            }
        }
    }
    assert!(panicked.is_empty(), "{panicked:?}");
}
