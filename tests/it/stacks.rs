//! The layers among tower's and tower-http's own: which go above, which below, and what happens otherwise.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use aegis_hitl::layer::{AegisLayer, Attempts, Backoff, Delivery, RetryError, RetryLayer};
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use tower::buffer::BufferLayer;
use tower::limit::ConcurrencyLimitLayer;
use tower::{Service, ServiceBuilder, ServiceExt, service_fn};
use tower_http::trace::TraceLayer;

type Body = Full<Bytes>;

/// A peer that answers 503 to every odd request and 200 to every even one, a second later.
fn flaky() -> (
    impl Service<Request<Body>, Response = Response<Body>, Error = Infallible, Future: Send>
    + Clone
    + Send,
    Arc<AtomicUsize>,
) {
    let count = Arc::new(AtomicUsize::new(0));
    let counter = count.clone();
    let service = service_fn(move |_: Request<Body>| {
        let odd = counter.fetch_add(1, Ordering::SeqCst).is_multiple_of(2);
        async move {
            tokio::time::sleep(Duration::from_secs(1)).await;
            let status = if odd { 503 } else { 200 };
            Ok(Response::builder()
                .status(status)
                .body(Body::default())
                .unwrap())
        }
    });
    (service, count)
}

fn keyed() -> Request<Body> {
    let request = Request::post("/").header("idempotency-key", "k-1");
    request.body(Body::from("body")).unwrap()
}

fn stack() -> AegisLayer {
    AegisLayer::new().retry(RetryLayer::new().backoff(Backoff::constant(Duration::from_secs(1))))
}

const LONG: Duration = Duration::from_secs(3600);

#[tokio::test(start_paused = true)]
async fn a_concurrency_limit_above_lets_a_retry_through_while_the_caller_waits_for_the_next_turn() {
    let (peer, count) = flaky();
    let mut service = ServiceBuilder::new()
        .concurrency_limit(1)
        .layer(stack())
        .service(peer);
    let call = service.ready().await.unwrap().call(keyed());
    // The caller asks for the next turn before it waits for this one.
    let next = tokio::spawn(async move { service.ready().await.map(|_| ()) });
    let response = tokio::time::timeout(LONG, call).await.unwrap().unwrap();
    assert_eq!(
        (response.status().as_u16(), Attempts::of(&response)),
        (200, 2)
    );
    assert_eq!(count.load(Ordering::SeqCst), 2);
    tokio::time::timeout(LONG, next)
        .await
        .unwrap()
        .unwrap()
        .unwrap();
}

// The one stack that is known to hang; the module doc of `layer` warns of it.
#[tokio::test(start_paused = true)]
async fn a_concurrency_limit_below_can_hang_and_only_a_deadline_ends_it() {
    for (deadline, hangs) in [(None, true), (Some(Duration::from_secs(60)), false)] {
        let (peer, count) = flaky();
        let retry = RetryLayer::new()
            .backoff(Backoff::constant(Duration::from_secs(1)))
            .deadline(deadline);
        let mut service = ServiceBuilder::new()
            .layer(retry)
            .layer(ConcurrencyLimitLayer::new(1))
            .service(peer);
        let call = service.ready().await.unwrap().call(keyed());
        // The caller's own turn takes the only permit as the first attempt lets go of it, and the retry waits for ever.
        let holding = tokio::spawn(async move {
            service.ready().await.unwrap();
            tokio::time::sleep(LONG * 2).await;
        });
        let result = tokio::time::timeout(LONG, call).await;
        assert_eq!(result.is_err(), hangs);
        if let Ok(result) = result {
            let error = result.unwrap_err();
            assert!(error.is_deadline_exceeded());
            assert_eq!(
                (error.attempts(), error.delivery()),
                (1, Delivery::Answered)
            );
        }
        assert_eq!(count.load(Ordering::SeqCst), 1);
        holding.abort();
    }
}

#[tokio::test(start_paused = true)]
async fn a_buffer_above_serves_many_callers() {
    let (peer, count) = flaky();
    let service = ServiceBuilder::new()
        .layer(BufferLayer::<Request<Body>>::new(4))
        .layer(stack())
        .service(peer);
    let calls: Vec<_> = (0..20)
        .map(|_| tokio::spawn(service.clone().oneshot(keyed())))
        .collect();
    for call in calls {
        // Whatever the answer: each call has to end.
        tokio::time::timeout(LONG, call)
            .await
            .unwrap()
            .unwrap()
            .unwrap();
    }
    assert!(count.load(Ordering::SeqCst) > 20);
}

#[tokio::test(start_paused = true)]
async fn a_timeout_above_bounds_the_call_and_sends_nothing_later() {
    let (peer, count) = flaky();
    let service = ServiceBuilder::new()
        .timeout(Duration::from_millis(1500))
        .layer(stack())
        .service(peer);
    let error = service.oneshot(keyed()).await.unwrap_err();
    assert!(error.is::<tower::timeout::error::Elapsed>());
    tokio::time::sleep(LONG).await;
    assert_eq!(count.load(Ordering::SeqCst), 1);
}

#[tokio::test(start_paused = true)]
async fn a_timeout_below_is_an_attempts_and_proves_no_delivery() {
    let (peer, count) = flaky();
    let retry = RetryLayer::new().backoff(Backoff::none());
    let service = ServiceBuilder::new()
        .layer(retry)
        .timeout(Duration::from_millis(500))
        .service(peer);
    let error: RetryError = service.clone().oneshot(keyed()).await.unwrap_err();
    assert_eq!((error.attempts(), error.delivery()), (4, Delivery::Unknown));
    assert!(
        error
            .into_inner()
            .unwrap()
            .is::<tower::timeout::error::Elapsed>()
    );
    assert_eq!(count.load(Ordering::SeqCst), 4);
    let mut plain = keyed();
    plain.headers_mut().clear();
    let error = service.oneshot(plain).await.unwrap_err();
    assert_eq!(error.attempts(), 1);
}

#[tokio::test(start_paused = true)]
async fn tracing_above_sees_calls_and_below_sees_attempts() {
    let (peer, _) = flaky();
    let (calls, attempts) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let counting = |count: &Arc<AtomicUsize>| {
        let count = count.clone();
        TraceLayer::new_for_http().on_request(move |_: &Request<Body>, _: &tracing::Span| {
            count.fetch_add(1, Ordering::SeqCst);
        })
    };
    let service = ServiceBuilder::new()
        .layer(counting(&calls))
        .layer(stack())
        .layer(counting(&attempts))
        .service(peer);
    service.oneshot(keyed()).await.unwrap();
    assert_eq!(calls.load(Ordering::SeqCst), 1);
    assert_eq!(attempts.load(Ordering::SeqCst), 2);
}

#[tokio::test(start_paused = true)]
async fn nothing_of_the_stack_asks_for_send() {
    // Neither the service, nor its future, nor its body can leave this thread.
    #[derive(Clone)]
    struct Local(std::rc::Rc<()>);
    impl Service<Request<Body>> for Local {
        type Response = Response<Body>;
        type Error = Infallible;
        type Future = std::pin::Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>>>>;
        fn poll_ready(
            &mut self,
            _: &mut std::task::Context<'_>,
        ) -> std::task::Poll<Result<(), Infallible>> {
            std::task::Poll::Ready(Ok(()))
        }
        fn call(&mut self, _: Request<Body>) -> Self::Future {
            let held = self.0.clone();
            Box::pin(async move {
                tokio::task::yield_now().await;
                drop(held);
                Ok(Response::default())
            })
        }
    }
    let service = ServiceBuilder::new()
        .layer(stack())
        .service(Local(std::rc::Rc::new(())));
    assert_eq!(service.oneshot(keyed()).await.unwrap().status(), 200);
}
