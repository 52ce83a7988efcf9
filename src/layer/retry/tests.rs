use std::collections::VecDeque;
use std::convert::Infallible;
use std::io;
use std::pin::Pin;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

use bytes::Bytes;
use http::{HeaderValue, Method, StatusCode};
use http_body::Frame;
use http_body_util::{BodyExt, Full};
use tokio::time::Instant;
use tower::ServiceExt;

use super::*;
use crate::layer::{Exchange, Failure, ReplayBody, ReplayBodyLayer};

/// The peer's act for one attempt.
#[derive(Debug, Clone)]
pub(super) enum Act {
    Answer(u16),
    AnswerAfter(u16, Duration),
    RetryAfter(u16, &'static str),
    Reset,
    Refuse,
    Hang,
    /// Answers 503 with a body that comes this late, or never.
    LateBody(Option<Duration>),
}

pub(super) type Sent = (Instant, Request<Full<Bytes>>);

/// A scripted peer that records what it receives. It repeats the last act.
#[derive(Clone)]
pub(super) struct Peer {
    script: Arc<Mutex<VecDeque<Act>>>,
    pub(super) sent: Arc<Mutex<Vec<Sent>>>,
    ready: Arc<AtomicU32>,
    bodies_ended: Arc<AtomicUsize>,
}

impl Peer {
    pub(super) fn new(script: impl IntoIterator<Item = Act>) -> Self {
        Self {
            script: Arc::new(Mutex::new(script.into_iter().collect())),
            sent: Arc::default(),
            ready: Arc::default(),
            bodies_ended: Arc::default(),
        }
    }

    pub(super) fn count(&self) -> usize {
        self.sent.lock().unwrap().len()
    }

    /// When each attempt arrived, in milliseconds after `start`.
    pub(super) fn times(&self, start: Instant) -> Vec<u128> {
        let sent = self.sent.lock().unwrap();
        sent.iter()
            .map(|(at, _)| (*at - start).as_millis())
            .collect()
    }
}

pub(super) struct TestBody {
    wait: Option<Pin<Box<tokio::time::Sleep>>>,
    never: bool,
    ended: Arc<AtomicUsize>,
}

impl Body for TestBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        if self.never {
            return Poll::Pending;
        }
        if let Some(wait) = &mut self.wait {
            std::task::ready!(wait.as_mut().poll(cx));
            self.wait = None;
            return Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(b"late")))));
        }
        self.ended.fetch_add(1, Ordering::SeqCst);
        Poll::Ready(None)
    }
}

impl Service<Request<Full<Bytes>>> for Peer {
    type Response = Response<TestBody>;
    type Error = Box<dyn StdError + Send + Sync>;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.ready.fetch_add(1, Ordering::SeqCst);
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Full<Bytes>>) -> Self::Future {
        self.sent.lock().unwrap().push((Instant::now(), request));
        let mut script = self.script.lock().unwrap();
        let act = if script.len() > 1 {
            script.pop_front().unwrap()
        } else {
            script[0].clone()
        };
        let ended = self.bodies_ended.clone();
        let exchange = Exchange::begin();
        Box::pin(async move {
            let mut body = TestBody {
                wait: None,
                never: false,
                ended,
            };
            let mut response = Response::builder();
            match act {
                Act::Answer(status) => response = response.status(status),
                Act::AnswerAfter(status, after) => {
                    tokio::time::sleep(after).await;
                    response = response.status(status);
                }
                Act::RetryAfter(status, value) => {
                    response = response.status(status).header("retry-after", value);
                }
                Act::Reset => return Err(io::Error::from(io::ErrorKind::ConnectionReset).into()),
                Act::Refuse => {
                    exchange.failed(Failure::NeverSent);
                    return Err("connection refused".into());
                }
                Act::Hang => std::future::pending().await,
                Act::LateBody(after) => {
                    body.never = after.is_none();
                    body.wait = after.map(|after| Box::pin(tokio::time::sleep(after)));
                    response = response.status(503);
                }
            }
            Ok(response.body(body).unwrap())
        })
    }
}

pub(super) fn request(method: Method) -> Request<Full<Bytes>> {
    Request::builder()
        .method(method)
        .uri("http://peer/path")
        .header("x-request-id", "r-1")
        .body(Full::from("body"))
        .unwrap()
}

pub(super) fn post() -> Request<Full<Bytes>> {
    request(Method::POST)
}

pub(super) fn keyed() -> Request<Full<Bytes>> {
    let mut request = post();
    request
        .headers_mut()
        .insert("idempotency-key", HeaderValue::from_static("k-1"));
    request
}

pub(super) fn seed_layer() -> RetryLayer {
    RetryLayer::new().backoff(Backoff::python_sdk())
}

pub(super) async fn run(
    layer: &RetryLayer,
    peer: &Peer,
    request: Request<Full<Bytes>>,
) -> Result<Response<TestBody>, RetryError> {
    layer.layer(peer.clone()).oneshot(request).await
}

#[tokio::test(start_paused = true)]
async fn a_post_without_a_key_is_sent_once_whatever_happens_after_the_first_byte() {
    for act in [
        Act::Answer(503),
        Act::RetryAfter(503, "1"),
        Act::RetryAfter(429, "1"),
        Act::RetryAfter(409, "1"),
        Act::Reset,
        Act::Hang,
    ] {
        let peer = Peer::new([act.clone()]);
        let _ = run(&seed_layer(), &peer, post()).await;
        assert_eq!(peer.count(), 1, "{act:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn no_classifier_can_open_the_gate() {
    let layer = seed_layer().classify(|_: &Attempt<'_>| Verdict::Retry);
    for act in [Act::Answer(200), Act::Answer(503), Act::Reset, Act::Hang] {
        let peer = Peer::new([act]);
        let _ = run(&layer, &peer, post()).await;
        assert_eq!(peer.count(), 1);
    }
}

#[tokio::test(start_paused = true)]
async fn what_was_never_sent_is_retried_for_any_method() {
    for method in [Method::POST, Method::PATCH, Method::GET] {
        let peer = Peer::new([Act::Refuse, Act::Answer(200)]);
        let response = run(&seed_layer(), &peer, request(method)).await.unwrap();
        assert_eq!((response.status().as_u16(), peer.count()), (200, 2));
    }
}

#[tokio::test(start_paused = true)]
async fn the_gate_looks_at_every_attempt_anew() {
    let peer = Peer::new([Act::Refuse, Act::Refuse, Act::Reset, Act::Answer(200)]);
    let error = run(&seed_layer(), &peer, post()).await.err().unwrap();
    assert_eq!(peer.count(), 3);
    assert_eq!(error.attempts(), 3);
    assert_eq!(error.delivery(), Delivery::Unknown);
}

#[tokio::test(start_paused = true)]
async fn delivery_is_never_sent_only_if_that_holds_for_all_attempts() {
    let refused = Peer::new([Act::Refuse]);
    let error = run(&seed_layer(), &refused, keyed()).await.err().unwrap();
    assert_eq!(
        (error.attempts(), error.delivery()),
        (4, Delivery::NeverSent)
    );
    for (first, delivery) in [
        (Act::Reset, Delivery::Unknown),
        (Act::Answer(503), Delivery::Answered),
        (Act::Hang, Delivery::Unknown),
    ] {
        let peer = Peer::new([first, Act::Refuse]);
        let error = run(&seed_layer(), &peer, keyed()).await.err().unwrap();
        assert_eq!((error.attempts(), error.delivery()), (4, delivery));
    }
}

#[tokio::test(start_paused = true)]
async fn all_attempts_are_byte_identical() {
    let peer = Peer::new([Act::Answer(500), Act::Reset, Act::Hang, Act::Answer(200)]);
    run(&seed_layer(), &peer, keyed()).await.unwrap();
    let sent = std::mem::take(&mut *peer.sent.lock().unwrap());
    assert_eq!(sent.len(), 4);
    for (_, request) in sent {
        let (parts, body) = request.into_parts();
        let (expected, expected_body) = keyed().into_parts();
        assert_eq!(parts.method, expected.method);
        assert_eq!(parts.uri, expected.uri);
        assert_eq!(parts.headers, expected.headers);
        let body = body.collect().await.unwrap().to_bytes();
        assert_eq!(body, expected_body.collect().await.unwrap().to_bytes());
    }
}

#[tokio::test(start_paused = true)]
async fn the_waits_are_the_seeds() {
    let start = Instant::now();
    let peer = Peer::new([Act::Answer(503)]);
    let response = run(&seed_layer(), &peer, keyed()).await.unwrap();
    assert_eq!(peer.times(start), [0, 500, 1500, 3500]);
    assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(Attempts::of(&response), 4);
}

#[tokio::test(start_paused = true)]
async fn retry_after_is_a_floor_under_the_backoff() {
    let start = Instant::now();
    let peer = Peer::new([
        Act::RetryAfter(503, "3"),
        Act::RetryAfter(503, "0"),
        Act::RetryAfter(503, "nonsense"),
        Act::Answer(200),
    ]);
    let layer = seed_layer();
    run(&layer, &peer, keyed()).await.unwrap();
    let times = peer.times(start);
    let waits: Vec<_> = times.windows(2).map(|pair| pair[1] - pair[0]).collect();
    assert!((3000..=3751).contains(&waits[0]), "{waits:?}");
    // The backoff is longer, and a malformed value counts as none.
    assert_eq!(waits[1..], [1000, 2000]);
}

// guzzle_retry_middleware#36 clamps it and retries early.
#[tokio::test(start_paused = true)]
async fn a_retry_after_above_the_cap_ends_the_call_with_the_real_answer() {
    for value in [
        "31",
        "99999999999999999999",
        "Fri, 31 Dec 9999 23:59:59 GMT",
    ] {
        let peer = Peer::new([Act::RetryAfter(429, value)]);
        let response = run(&seed_layer(), &peer, keyed()).await.unwrap();
        assert_eq!((response.status().as_u16(), peer.count()), (429, 1));
    }
}

// smithy-rs#2825 did.
#[tokio::test(start_paused = true)]
async fn an_attempt_timeout_does_not_count_the_backoff() {
    let start = Instant::now();
    let peer = Peer::new([Act::Hang]);
    let layer = seed_layer().attempt_timeout(Duration::from_secs(1));
    let error = run(&layer, &peer, keyed()).await.err().unwrap();
    assert_eq!(peer.times(start), [0, 1500, 3500, 6500]);
    assert!(error.is_timeout() && !error.is_deadline_exceeded());
    assert_eq!(
        error.to_string(),
        "no answer within 1s (attempts: 4, delivery: unknown, not tried again: no attempts left)"
    );
}

#[tokio::test(start_paused = true)]
async fn a_slow_answer_within_the_attempt_timeout_is_taken() {
    let peer = Peer::new([Act::AnswerAfter(200, Duration::from_secs(9))]);
    let response = run(&seed_layer(), &peer, keyed()).await.unwrap();
    assert_eq!(
        (response.status().as_u16(), Attempts::of(&response)),
        (200, 1)
    );
    // One attempt needs no record, and a record would cost three allocations.
    assert!(response.extensions().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_retry_that_would_pass_the_deadline_is_not_waited_for() {
    let start = Instant::now();
    let peer = Peer::new([Act::Answer(503)]);
    let layer = seed_layer().deadline(Duration::from_secs(1));
    let response = run(&layer, &peer, keyed()).await.unwrap();
    assert_eq!(response.status(), 503);
    assert_eq!(peer.times(start), [0, 500]);
    assert_eq!(start.elapsed().as_millis(), 500);
}

#[tokio::test(start_paused = true)]
async fn the_deadline_cuts_the_attempt_that_runs() {
    let start = Instant::now();
    let peer = Peer::new([Act::Hang]);
    let mut request = keyed();
    request
        .extensions_mut()
        .insert(Deadline(Some(Duration::from_secs(3))));
    let error = run(&seed_layer(), &peer, request).await.err().unwrap();
    assert!(error.is_deadline_exceeded() && error.is_timeout());
    assert_eq!(start.elapsed(), Duration::from_secs(3));
    assert_eq!((peer.count(), error.delivery()), (1, Delivery::Unknown));
}

#[tokio::test(start_paused = true)]
async fn a_request_may_set_its_own_retries() {
    for (extension, count) in [(MaxRetries(0), 1), (MaxRetries(1), 2), (MaxRetries(5), 6)] {
        let peer = Peer::new([Act::Answer(503)]);
        let mut request = keyed();
        request.extensions_mut().insert(extension);
        run(&seed_layer(), &peer, request).await.unwrap();
        assert_eq!(peer.count(), count);
    }
}

#[tokio::test(start_paused = true)]
async fn a_sender_may_say_that_a_post_is_safe() {
    let peer = Peer::new([Act::Answer(503), Act::Answer(200)]);
    let mut request = post();
    request.extensions_mut().insert(SafeToRetry);
    run(&seed_layer(), &peer, request).await.unwrap();
    assert_eq!(peer.count(), 2);
}

#[tokio::test(start_paused = true)]
async fn the_key_may_be_in_another_header() {
    let layer = seed_layer().idempotency_header(HeaderName::from_static("x-key"));
    let peer = Peer::new([Act::Answer(503), Act::Answer(200)]);
    run(&layer, &peer, keyed()).await.unwrap();
    assert_eq!(peer.count(), 1);
    let mut request = post();
    request
        .headers_mut()
        .insert("x-key", HeaderValue::from_static("k"));
    run(&layer, &peer, request).await.unwrap();
    assert_eq!(peer.count(), 2);
}

#[tokio::test(start_paused = true)]
async fn the_budget_binds_and_returns_the_real_answer() {
    let budget = Budget::new(0.5);
    let layer = seed_layer().budget(budget);
    let peer = Peer::new([Act::Answer(503)]);
    let service = layer.layer(peer.clone());
    for _ in 0..100 {
        let response = service.clone().oneshot(keyed()).await.unwrap();
        assert_eq!(response.status(), 503);
    }
    assert_eq!(peer.count(), 150);
}

#[tokio::test(start_paused = true)]
async fn a_retry_that_is_cancelled_in_its_wait_sends_nothing_and_costs_nothing() {
    let budget = Budget::new(1.0);
    let peer = Peer::new([Act::Answer(503)]);
    let service = seed_layer().budget(budget.clone()).layer(peer.clone());
    let call = tokio::time::timeout(Duration::from_millis(100), service.oneshot(keyed()));
    assert!(call.await.is_err());
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(peer.count(), 1);
    assert!(budget.withdraw().is_some());
}

#[tokio::test(start_paused = true)]
async fn the_service_is_polled_ready_before_every_attempt() {
    let peer = Peer::new([Act::Answer(503)]);
    run(&seed_layer(), &peer, keyed()).await.unwrap();
    assert_eq!((peer.count(), peer.ready.load(Ordering::SeqCst)), (4, 4));
}

#[tokio::test(start_paused = true)]
async fn a_late_body_is_drained_within_the_backoff() {
    let start = Instant::now();
    let peer = Peer::new([
        Act::LateBody(Some(Duration::from_millis(20))),
        Act::Answer(200),
    ]);
    run(&seed_layer(), &peer, keyed()).await.unwrap();
    assert_eq!(peer.bodies_ended.load(Ordering::SeqCst), 1);
    assert_eq!(peer.times(start), [0, 500]);
}

#[tokio::test(start_paused = true)]
async fn a_body_that_never_ends_does_not_hang_the_call() {
    let start = Instant::now();
    let peer = Peer::new([Act::LateBody(None), Act::Answer(200)]);
    let layer = RetryLayer::new().backoff(Backoff::none());
    run(&layer, &peer, keyed()).await.unwrap();
    assert_eq!(peer.times(start), [0, 250]);
}

#[tokio::test(start_paused = true)]
async fn draining_does_not_pass_the_deadline() {
    let start = Instant::now();
    let peer = Peer::new([Act::LateBody(None), Act::Answer(200)]);
    let layer = RetryLayer::new()
        .backoff(Backoff::none())
        .deadline(Duration::from_millis(100));
    let error = run(&layer, &peer, keyed()).await.err().unwrap();
    assert!(error.is_deadline_exceeded());
    assert_eq!((start.elapsed().as_millis(), peer.count()), (100, 1));
}

#[tokio::test(start_paused = true)]
async fn a_success_or_a_refusal_is_returned_at_once() {
    for status in [200, 202, 301, 400, 401, 404, 409, 422, 429] {
        let peer = Peer::new([Act::Answer(status)]);
        let response = run(&seed_layer(), &peer, keyed()).await.unwrap();
        assert_eq!((response.status().as_u16(), peer.count()), (status, 1));
    }
}

#[tokio::test(start_paused = true)]
async fn a_409_with_retry_after_is_retried_with_the_same_key() {
    let peer = Peer::new([Act::RetryAfter(409, "1"), Act::Answer(200)]);
    let response = run(&seed_layer(), &peer, keyed()).await.unwrap();
    assert_eq!((response.status().as_u16(), peer.count()), (200, 2));
}

#[tokio::test]
async fn with_retries_off_the_service_is_not_cloned() {
    struct CountsClones(Arc<AtomicU32>);
    impl Clone for CountsClones {
        fn clone(&self) -> Self {
            self.0.fetch_add(1, Ordering::SeqCst);
            Self(self.0.clone())
        }
    }
    impl Service<Request<Full<Bytes>>> for CountsClones {
        type Response = Response<Full<Bytes>>;
        type Error = Infallible;
        type Future = std::future::Ready<Result<Self::Response, Infallible>>;
        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
            Poll::Ready(Ok(()))
        }
        fn call(&mut self, _: Request<Full<Bytes>>) -> Self::Future {
            std::future::ready(Ok(Response::default()))
        }
    }
    for (retries, clones) in [(0, 0), (3, 1)] {
        let count = Arc::new(AtomicU32::new(0));
        let mut service = RetryLayer::new()
            .max_retries(retries)
            .layer(CountsClones(count.clone()));
        service.ready().await.unwrap().call(keyed()).await.unwrap();
        assert_eq!(count.load(Ordering::SeqCst), clones);
    }
}

#[tokio::test(start_paused = true)]
async fn the_inner_error_is_kept_as_the_source() {
    let peer = Peer::new([Act::Reset]);
    let error = run(&seed_layer(), &peer, post()).await.err().unwrap();
    let source = error.source().unwrap().downcast_ref::<io::Error>().unwrap();
    assert_eq!(source.kind(), io::ErrorKind::ConnectionReset);
    assert!(!error.is_timeout() && !error.is_deadline_exceeded());
    assert_eq!(
        error.to_string(),
        "the request failed (attempt: 1, delivery: unknown, not tried again: not safe)"
    );
    assert!(error.into_inner().unwrap().is::<io::Error>());
}

#[tokio::test(start_paused = true)]
async fn an_observer_is_told_of_every_attempt() {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let sink = seen.clone();
    let layer = seed_layer().observe(move |event: &AttemptEvent<'_>| {
        let outcome = match event.outcome {
            AttemptOutcome::Answered(head) => head.status.to_string(),
            AttemptOutcome::Failed(error) => error.to_string(),
            AttemptOutcome::TimedOut => "timed out".to_owned(),
        };
        let wait = event.retry_in.map(|wait| wait.as_millis());
        sink.lock().unwrap().push((event.attempt, outcome, wait));
    });
    let peer = Peer::new([Act::Answer(503), Act::Hang, Act::Refuse, Act::Answer(202)]);
    run(&layer, &peer, keyed()).await.unwrap();
    let expected = [
        (1, "503 Service Unavailable".to_owned(), Some(500)),
        (2, "timed out".to_owned(), Some(1000)),
        (3, "connection refused".to_owned(), Some(2000)),
        (4, "202 Accepted".to_owned(), None),
    ];
    assert_eq!(*seen.lock().unwrap(), expected);
}

#[tokio::test(start_paused = true)]
async fn the_attempt_header_is_all_that_differs_between_attempts() {
    let layer = seed_layer().attempt_header(HeaderName::from_static("x-attempt"));
    let peer = Peer::new([Act::Answer(503)]);
    run(&layer, &peer, keyed()).await.unwrap();
    let sent = std::mem::take(&mut *peer.sent.lock().unwrap());
    assert_eq!(sent.len(), 4);
    for (i, (_, mut request)) in sent.into_iter().enumerate() {
        let number = request.headers_mut().remove("x-attempt").unwrap();
        assert_eq!(number, (i + 1).to_string());
        assert_eq!(request.headers(), keyed().headers());
    }
    let once = Peer::new([Act::Answer(200)]);
    run(&layer.max_retries(0), &once, keyed()).await.unwrap();
    assert_eq!(once.sent.lock().unwrap()[0].1.headers()["x-attempt"], "1");
}

#[tokio::test(start_paused = true)]
async fn a_streaming_body_is_replayed_byte_for_byte_and_past_its_cap_not_retried() {
    type Streaming = http_body_util::combinators::UnsyncBoxBody<Bytes, Infallible>;
    for (cap, attempts) in [(11, 4), (10, 1)] {
        let bodies = Arc::new(Mutex::new(Vec::new()));
        let sink = bodies.clone();
        let peer = tower::service_fn(move |request: Request<ReplayBody<Streaming>>| {
            let sink = sink.clone();
            async move {
                let body = request.into_body().collect().await.unwrap().to_bytes();
                sink.lock().unwrap().push(body);
                Ok::<_, Infallible>(
                    Response::builder()
                        .status(503)
                        .body(Full::<Bytes>::default())
                        .unwrap(),
                )
            }
        });
        let service = tower::ServiceBuilder::new()
            .layer(ReplayBodyLayer::new().max_bytes(cap))
            .layer(seed_layer())
            .service(peer);
        // The length is unknown, so the cap is reached on the way.
        let chunks = ["hello", " ", "world"].map(|chunk| Ok(Frame::data(Bytes::from(chunk))));
        let stream = futures_util::stream::iter(chunks);
        let body = http_body_util::StreamBody::new(stream).boxed_unsync();
        let response = service
            .oneshot(Request::put("/").body(body).unwrap())
            .await
            .unwrap();
        assert_eq!(response.status(), 503);
        assert_eq!(*bodies.lock().unwrap(), vec!["hello world"; attempts]);
    }
}

#[tokio::test(start_paused = true)]
async fn a_body_that_an_abandoned_attempt_reads_past_its_cap_is_not_sent_again() {
    type Streaming = http_body_util::combinators::UnsyncBoxBody<Bytes, Infallible>;
    let attempts = Arc::new(AtomicUsize::new(0));
    let counter = attempts.clone();
    let peer = tower::service_fn(move |request: Request<ReplayBody<Streaming>>| {
        counter.fetch_add(1, Ordering::SeqCst);
        // Answers before it reads, like a peer that sheds load.
        tokio::spawn(request.into_body().collect());
        std::future::ready(Ok::<_, Infallible>(
            Response::builder()
                .status(503)
                .body(Full::<Bytes>::default())
                .unwrap(),
        ))
    });
    let service = tower::ServiceBuilder::new()
        .layer(ReplayBodyLayer::new().max_bytes(10))
        .layer(seed_layer())
        .service(peer);
    let chunks = ["hello", " ", "world"].map(|chunk| Ok(Frame::data(Bytes::from(chunk))));
    let stream = futures_util::stream::iter(chunks);
    let body = http_body_util::StreamBody::new(stream).boxed_unsync();
    let error = service
        .oneshot(Request::put("/").body(body).unwrap())
        .await
        .unwrap_err();
    assert_eq!(attempts.load(Ordering::SeqCst), 1);
    assert_eq!(error.attempts(), 1);
    assert_eq!(error.not_retried(), Some(NotRetried::Body));
    assert_eq!(error.delivery(), Delivery::Answered);
}

/// The rule, written once more in other words than the code's.
fn is_sent_again(keyed_or_idempotent: bool, status: u16, retry_after: bool) -> bool {
    keyed_or_idempotent
        && match status {
            408 | 500..=599 => true,
            409 | 429 => retry_after,
            _ => false,
        }
}

#[tokio::test(start_paused = true)]
async fn every_status_with_every_kind_of_request_follows_the_rule() {
    let requests = [
        (keyed(), true),
        (post(), false),
        (request(Method::GET), true),
        (request(Method::PUT), true),
        (request(Method::PATCH), false),
        (request(Method::DELETE), true),
    ];
    for status in 100..=599 {
        for retry_after in [false, true] {
            for (request, safe) in &requests {
                let act = if retry_after {
                    Act::RetryAfter(status, "1")
                } else {
                    Act::Answer(status)
                };
                let peer = Peer::new([act, Act::Answer(200)]);
                let response = run(&seed_layer(), &peer, request.clone()).await.unwrap();
                let again = is_sent_again(*safe, status, retry_after);
                let case = format!("{} {status} {retry_after}", request.method());
                assert_eq!(peer.count(), if again { 2 } else { 1 }, "{case}");
                let expected = if again { 200 } else { status };
                assert_eq!(response.status().as_u16(), expected, "{case}");
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_classifier_decides_what_is_worth_it() {
    let layer = seed_layer().classify(|attempt: &Attempt<'_>| match attempt.outcome {
        AttemptOutcome::Answered(head) if head.status == 404 => Verdict::Retry,
        AttemptOutcome::Answered(head) if head.status == 503 => Verdict::Stop,
        _ => Standard.classify(attempt),
    });
    for (status, count) in [(404, 4), (503, 1), (502, 4), (400, 1)] {
        let peer = Peer::new([Act::Answer(status)]);
        run(&layer, &peer, keyed()).await.unwrap();
        assert_eq!(peer.count(), count, "{status}");
    }
}

#[tokio::test(start_paused = true)]
async fn the_longest_retry_after_can_be_set() {
    for (longest, count) in [(4, 1), (5, 4)] {
        let layer = seed_layer().max_retry_after(Duration::from_secs(longest));
        let peer = Peer::new([Act::RetryAfter(503, "5")]);
        run(&layer, &peer, keyed()).await.unwrap();
        assert_eq!(peer.count(), count);
    }
}

#[tokio::test(start_paused = true)]
async fn the_bounds_of_draining_can_be_set() {
    // In time: the wait for an endless body is bounded.
    let start = Instant::now();
    let layer = RetryLayer::new()
        .backoff(Backoff::none())
        .drain(1024, Duration::from_millis(40));
    let peer = Peer::new([Act::LateBody(None), Act::Answer(200)]);
    run(&layer, &peer, keyed()).await.unwrap();
    assert_eq!(peer.times(start), [0, 40]);
    // In bytes: a body of 4 is read to its end or abandoned.
    for (bytes, ended) in [(4, 1), (3, 0), (0, 0)] {
        let layer = RetryLayer::new()
            .backoff(Backoff::none())
            .drain(bytes, Duration::from_secs(1));
        let peer = Peer::new([
            Act::LateBody(Some(Duration::from_millis(1))),
            Act::Answer(200),
        ]);
        run(&layer, &peer, keyed()).await.unwrap();
        assert_eq!(peer.bodies_ended.load(Ordering::SeqCst), ended, "{bytes}");
    }
}

#[tokio::test(start_paused = true)]
async fn the_same_seed_gives_the_same_waits_and_another_gives_others() {
    async fn times(seed: u64) -> Vec<u128> {
        let start = Instant::now();
        let peer = Peer::new([Act::Answer(503)]);
        let layer = RetryLayer::new().seed(seed);
        run(&layer, &peer, keyed()).await.unwrap();
        peer.times(start)
    }
    assert_eq!(times(1).await, times(1).await);
    assert_ne!(times(1).await, times(2).await);
}
