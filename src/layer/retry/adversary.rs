//! Whatever below a retry, or in place of the service, could make it conclude too much.

use std::convert::Infallible;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};

use bytes::Bytes;
use http::header::RETRY_AFTER;
use http::{Method, StatusCode};
use http_body::Frame;
use http_body_util::Full;
use tokio::time::Instant;
use tower::{ServiceExt, service_fn};

use super::tests::{Act, Peer, keyed, post, request, run, seed_layer};
use super::*;
use crate::layer::{Exchange, Failure};
use crate::protocol::BoxError;

fn quick() -> RetryLayer {
    RetryLayer::new().backoff(Backoff::none())
}

/// Sends each request to `peer` once per turn, as a redirect, a hedge or another retry does, and
/// returns the last result.
async fn through(turns: u32, layer: &RetryLayer, peer: &Peer) -> Result<(), RetryError> {
    let below = peer.clone();
    let service = service_fn(move |request: Request<Full<Bytes>>| {
        let peer = below.clone();
        async move {
            let mut last = Err("no turn".into());
            for _ in 0..turns {
                last = peer.clone().oneshot(request.clone()).await;
            }
            last
        }
    });
    layer.layer(service).oneshot(post()).await.map(drop)
}

// With `tower_http::follow_redirect` below, the refused connect of the second hop once caused a
// POST to be acted upon four times.
#[tokio::test(start_paused = true)]
async fn the_error_of_a_later_exchange_proves_nothing_of_an_earlier_one() {
    for first in [Act::Answer(303), Act::Reset] {
        let peer = Peer::new([first, Act::Refuse]);
        let error = through(2, &quick(), &peer).await.unwrap_err();
        assert_eq!(peer.count(), 2);
        assert_eq!((error.attempts(), error.delivery()), (1, Delivery::Unknown));
        assert_eq!(error.not_retried(), Some(NotRetried::Unsafe));
    }
}

#[tokio::test(start_paused = true)]
async fn an_attempt_all_of_whose_exchanges_were_refused_was_never_sent() {
    let peer = Peer::new([Act::Refuse]);
    let error = through(2, &quick(), &peer).await.unwrap_err();
    assert_eq!(peer.count(), 8);
    assert_eq!(
        (error.attempts(), error.delivery()),
        (4, Delivery::NeverSent)
    );
}

// A backup request: the second one is refused while the first one may be acted upon.
#[tokio::test(start_paused = true)]
async fn an_exchange_that_is_given_up_may_have_been_acted_upon() {
    let hanging = Peer::new([Act::Hang]);
    let refused = Peer::new([Act::Refuse]);
    let (first, second) = (hanging.clone(), refused.clone());
    let service = service_fn(move |request: Request<Full<Bytes>>| {
        let first = first.clone().oneshot(request.clone());
        let second = second.clone().oneshot(request);
        async move {
            tokio::select! {
                biased;
                result = first => result,
                result = second => result,
            }
        }
    });
    let error = quick().layer(service).oneshot(post()).await.err().unwrap();
    assert_eq!(error.delivery(), Delivery::Unknown);
    assert_eq!((hanging.count(), refused.count()), (1, 1));
}

#[tokio::test(start_paused = true)]
async fn a_client_that_is_not_tracked_proves_nothing() {
    let count = Arc::new(AtomicU32::new(0));
    let counter = count.clone();
    let service = service_fn(move |_: Request<Full<Bytes>>| {
        counter.fetch_add(1, Ordering::SeqCst);
        let refused = std::io::Error::from(std::io::ErrorKind::ConnectionRefused);
        std::future::ready(Err::<Response<Full<Bytes>>, _>(refused))
    });
    let error = quick().layer(service).oneshot(post()).await.err().unwrap();
    assert_eq!((error.attempts(), error.delivery()), (1, Delivery::Unknown));
    assert_eq!(count.load(Ordering::SeqCst), 1);
}

#[tokio::test(start_paused = true)]
async fn what_can_never_succeed_is_not_tried_again() {
    let service = service_fn(|_: Request<Full<Bytes>>| {
        let exchange = Exchange::begin();
        async move {
            exchange.failed(Failure::Permanent);
            Err::<Response<Full<Bytes>>, BoxError>("unsupported scheme".into())
        }
    });
    let error = quick().layer(service).oneshot(keyed()).await.err().unwrap();
    assert_eq!(
        (error.attempts(), error.delivery()),
        (1, Delivery::NeverSent)
    );
    assert_eq!(error.not_retried(), Some(NotRetried::Permanent));
}

#[tokio::test(start_paused = true)]
async fn retries_below_are_counted() {
    let peer = Peer::new([Act::Answer(503)]);
    let nested = quick()
        .max_retries(1)
        .layer(quick().max_retries(1).layer(peer.clone()));
    let response = nested.oneshot(keyed()).await.unwrap();
    assert_eq!((Attempts::of(&response), peer.count()), (4, 4));

    for (act, delivery) in [
        (Act::Reset, Delivery::Unknown),
        (Act::Refuse, Delivery::NeverSent),
    ] {
        let peer = Peer::new([act]);
        let nested = quick()
            .max_retries(1)
            .layer(quick().max_retries(1).layer(peer.clone()));
        let error = nested.oneshot(keyed()).await.err().unwrap();
        assert_eq!((error.attempts(), peer.count()), (4, 4));
        assert_eq!(error.delivery(), delivery);
    }
}

// The outer retry's first attempt was answered, but the inner one's may have been acted upon.
#[tokio::test(start_paused = true)]
async fn what_is_known_of_attempts_below_is_not_forgotten_above() {
    use crate::layer::{AegisLayer, Confirmation};

    let peer = Peer::new([Act::Reset, Act::Answer(409)]);
    let service = AegisLayer::new().mint_idempotency_key().retry(quick());
    let service = service.layer(quick().layer(peer.clone()));
    let response = service.oneshot(post()).await.unwrap();
    assert_eq!(Attempts::earlier(&response), Delivery::Unknown);
    assert_eq!(Confirmation::of(&response), Some(Confirmation::Duplicate));

    let peer = Peer::new([Act::Reset, Act::Answer(503), Act::Refuse]);
    let nested = quick().layer(quick().max_retries(1).layer(peer));
    let error = nested.oneshot(keyed()).await.err().unwrap();
    assert_eq!(error.delivery(), Delivery::Unknown);
}

// The timer wakes up to a millisecond late, and the answer would have been given up for nothing.
#[tokio::test(start_paused = true)]
async fn an_answer_is_not_given_up_for_a_retry_that_the_deadline_forbids() {
    for micros in [1_000_100, 1_000_500, 1_000_900, 1_001_000] {
        let peer = Peer::new([Act::RetryAfter(503, "1")]);
        let layer = quick().deadline(Duration::from_micros(micros));
        let response = run(&layer, &peer, keyed()).await.unwrap();
        assert_eq!(response.status(), 503, "{micros}");
    }
}

/// Ready for the first attempt, and then as configured.
#[derive(Clone)]
struct Unready {
    peer: Peer,
    polls: Arc<AtomicU32>,
    then: Result<Duration, &'static str>,
    until: Arc<Mutex<Option<Pin<Box<tokio::time::Sleep>>>>>,
}

use std::pin::Pin;

impl Service<Request<Full<Bytes>>> for Unready {
    type Response = <Peer as Service<Request<Full<Bytes>>>>::Response;
    type Error = BoxError;
    type Future = <Peer as Service<Request<Full<Bytes>>>>::Future;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        if self.polls.fetch_add(1, Ordering::SeqCst) == 0 {
            return Poll::Ready(Ok(()));
        }
        let wait = match self.then {
            Ok(wait) => wait,
            Err(error) => return Poll::Ready(Err(error.into())),
        };
        let mut until = self.until.lock().unwrap();
        let sleep = until.get_or_insert_with(|| Box::pin(tokio::time::sleep(wait)));
        sleep.as_mut().poll(cx).map(Ok)
    }

    fn call(&mut self, request: Request<Full<Bytes>>) -> Self::Future {
        self.peer.call(request)
    }
}

fn unready(peer: &Peer, then: Result<Duration, &'static str>) -> Unready {
    Unready {
        peer: peer.clone(),
        polls: Arc::default(),
        then,
        until: Arc::default(),
    }
}

#[tokio::test(start_paused = true)]
async fn a_service_that_is_not_ready_between_attempts_is_waited_for() {
    let start = Instant::now();
    let peer = Peer::new([Act::Answer(503), Act::Answer(200)]);
    let service = quick().layer(unready(&peer, Ok(Duration::from_secs(3))));
    let response = service.oneshot(keyed()).await.unwrap();
    assert_eq!(
        (response.status().as_u16(), peer.times(start)),
        (200, vec![0, 3000])
    );
}

#[tokio::test(start_paused = true)]
async fn a_service_that_does_not_get_ready_again_ends_the_call_at_its_deadline() {
    let start = Instant::now();
    let peer = Peer::new([Act::Answer(503)]);
    let layer = quick().deadline(Duration::from_secs(2));
    let service = layer.layer(unready(&peer, Ok(Duration::from_secs(3))));
    let error = service.oneshot(keyed()).await.err().unwrap();
    assert!(error.is_deadline_exceeded());
    assert_eq!(start.elapsed(), Duration::from_secs(2));
    // The only attempt was answered, so its delivery is known.
    assert_eq!(
        (error.attempts(), error.delivery()),
        (1, Delivery::Answered)
    );
    assert_eq!(peer.count(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_service_that_fails_to_get_ready_again_ends_the_call() {
    let peer = Peer::new([Act::Reset]);
    let service = quick().layer(unready(&peer, Err("closed")));
    let error = service.oneshot(keyed()).await.err().unwrap();
    assert_eq!((error.attempts(), error.delivery()), (1, Delivery::Unknown));
    assert_eq!(error.not_retried(), None);
    assert_eq!(error.source().unwrap().to_string(), "closed");
    assert_eq!(error.idempotency_key().unwrap().as_str(), "k-1");
}

#[tokio::test(start_paused = true)]
async fn clients_that_are_told_the_same_wait_do_not_come_back_together() {
    let mut waits = Vec::new();
    for seed in 0..300 {
        let start = Instant::now();
        let peer = Peer::new([Act::RetryAfter(503, "20"), Act::Answer(200)]);
        run(&seed_layer().seed(seed), &peer, keyed()).await.unwrap();
        waits.push(peer.times(start)[1]);
    }
    assert!(waits.iter().all(|wait| (20_000..=25_000).contains(wait)));
    for quarter in 0..4 {
        let from = 20_000 + quarter * 1250;
        let there = waits
            .iter()
            .filter(|wait| (from..from + 1250).contains(*wait));
        assert!(there.count() > 40, "{quarter}: {waits:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn the_spread_of_a_retry_after_leaves_room_before_the_deadline() {
    for seed in 0..50 {
        let peer = Peer::new([Act::RetryAfter(503, "20"), Act::Answer(200)]);
        let layer = seed_layer().seed(seed).deadline(Duration::from_secs(21));
        let response = run(&layer, &peer, keyed()).await.unwrap();
        assert_eq!(response.status(), 200, "{seed}");
    }
}

#[tokio::test(start_paused = true)]
async fn no_retry_after_and_no_verdict_makes_a_call_panic() {
    let huge = "18446744073709551615.999999999999";
    for deadline in [None, Some(Duration::from_secs(5))] {
        let layer = quick().max_retry_after(Duration::MAX).deadline(deadline);
        let peer = Peer::new([Act::RetryAfter(503, huge)]);
        let response = run(&layer, &peer, keyed()).await.unwrap();
        assert_eq!(NotRetried::of(&response), Some(NotRetried::Deadline));
        let layer = layer.classify(|_: &Attempt<'_>| Verdict::RetryAfter(Duration::MAX));
        let response = run(&layer, &peer, keyed()).await.unwrap();
        assert_eq!(NotRetried::of(&response), Some(NotRetried::Deadline));
    }
}

#[tokio::test(start_paused = true)]
async fn a_fraction_in_retry_after_is_not_undercut() {
    let start = Instant::now();
    let peer = Peer::new([Act::RetryAfter(503, "1.5"), Act::Answer(200)]);
    run(&quick(), &peer, keyed()).await.unwrap();
    assert!((1500..=1876).contains(&peer.times(start)[1]));
}

#[tokio::test(start_paused = true)]
async fn a_retry_that_is_due_at_the_deadline_is_too_late() {
    for (deadline, count) in [(499, 1), (500, 1), (501, 1), (502, 2)] {
        let peer = Peer::new([Act::Answer(503), Act::Answer(200)]);
        let layer = seed_layer().deadline(Duration::from_millis(deadline));
        let response = run(&layer, &peer, keyed()).await.unwrap();
        assert_eq!(peer.count(), count, "{deadline}");
        let reason = (count == 1).then_some(NotRetried::Deadline);
        assert_eq!(NotRetried::of(&response), reason);
    }
}

#[tokio::test(start_paused = true)]
async fn a_classifier_may_name_the_wait() {
    let start = Instant::now();
    let layer = seed_layer().classify(|attempt: &Attempt<'_>| match attempt.outcome {
        AttemptOutcome::Answered(head) if head.status == 503 => {
            Verdict::RetryAfter(Duration::from_millis(40))
        }
        _ => Verdict::Stop,
    });
    let peer = Peer::new([Act::RetryAfter(503, "7"), Act::Answer(200)]);
    run(&layer, &peer, keyed()).await.unwrap();
    assert!((40..=51).contains(&peer.times(start)[1]));
    let layer = layer.max_retry_after(Duration::from_millis(39));
    let response = run(&layer, &Peer::new([Act::Answer(503)]), keyed())
        .await
        .unwrap();
    assert_eq!(NotRetried::of(&response), Some(NotRetried::RetryAfter));
}

#[tokio::test(start_paused = true)]
async fn a_classifier_sees_the_request_and_the_attempts_number() {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let log = seen.clone();
    let layer = quick().classify(move |attempt: &Attempt<'_>| {
        log.lock().unwrap().push((
            attempt.number,
            attempt.method.clone(),
            attempt.uri.to_string(),
            attempt.delivery,
        ));
        Standard.classify(attempt)
    });
    let peer = Peer::new([Act::Refuse, Act::Answer(200)]);
    run(&layer, &peer, request(Method::PUT)).await.unwrap();
    let uri = "http://peer/path".to_owned();
    assert_eq!(
        *seen.lock().unwrap(),
        [
            (1, Method::PUT, uri.clone(), Delivery::NeverSent),
            (2, Method::PUT, uri, Delivery::Answered)
        ]
    );
}

#[tokio::test(start_paused = true)]
async fn an_attempt_that_the_deadline_cuts_is_observed() {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let log = seen.clone();
    let layer = quick()
        .deadline(Duration::from_secs(2))
        .observe(move |event| {
            let event = (
                event.attempt,
                event.not_retried,
                event.elapsed,
                event.uri.path().to_owned(),
            );
            log.lock().unwrap().push(event);
        });
    let peer = Peer::new([Act::Hang]);
    run(&layer, &peer, keyed()).await.err().unwrap();
    let expected = (
        1,
        Some(NotRetried::Deadline),
        Duration::from_secs(2),
        "/path".to_owned(),
    );
    assert_eq!(*seen.lock().unwrap(), [expected]);
}

#[tokio::test(start_paused = true)]
async fn what_ended_a_call_is_told_with_its_names() {
    let spent = Budget::new(0.0);
    let cases = [
        (quick().max_retries(1), keyed(), NotRetried::Attempts),
        (quick().max_retries(0), keyed(), NotRetried::Attempts),
        (quick(), post(), NotRetried::Unsafe),
        (quick().budget(spent), keyed(), NotRetried::Budget),
        (
            seed_layer().deadline(Duration::from_millis(100)),
            keyed(),
            NotRetried::Deadline,
        ),
        (
            quick().classify(|_: &Attempt<'_>| Verdict::Stop),
            keyed(),
            NotRetried::Verdict,
        ),
    ];
    for (layer, request, reason) in cases {
        let is_keyed = request.headers().contains_key("idempotency-key");
        let error = run(&layer, &Peer::new([Act::Reset]), request.clone())
            .await
            .err()
            .unwrap();
        assert_eq!(error.not_retried(), Some(reason));
        assert!(error.to_string().contains(&reason.to_string()), "{error}");
        assert_eq!(
            error.idempotency_key().map(|key| key.as_str()),
            is_keyed.then_some("k-1")
        );
        assert_eq!(error.request_id().unwrap().as_str(), "r-1");
        assert!(!format!("{error:?}").contains("k-1"));

        let response = run(&layer, &Peer::new([Act::Answer(503)]), request)
            .await
            .unwrap();
        let told = Some(reason).filter(|reason| *reason != NotRetried::Verdict);
        assert_eq!(NotRetried::of(&response), told);
    }
    let longer = Peer::new([Act::RetryAfter(503, "31")]);
    let response = run(&quick(), &longer, keyed()).await.unwrap();
    assert_eq!(NotRetried::of(&response), Some(NotRetried::RetryAfter));
    let success = run(&quick(), &Peer::new([Act::Answer(200)]), keyed())
        .await
        .unwrap();
    assert_eq!(NotRetried::of(&success), None);
}

#[tokio::test(start_paused = true)]
async fn a_request_may_say_that_it_has_no_deadline_and_no_attempt_timeout() {
    let layer = quick()
        .deadline(Duration::from_secs(1))
        .attempt_timeout(Duration::from_secs(1));
    let peer = Peer::new([Act::AnswerAfter(200, Duration::from_secs(60))]);
    let mut request = keyed();
    request.extensions_mut().insert(Deadline(None));
    request.extensions_mut().insert(AttemptTimeout(None));
    assert_eq!(run(&layer, &peer, request).await.unwrap().status(), 200);
    assert!(run(&layer, &peer, keyed()).await.is_err());
}

/// A body of empty frames that are always ready.
struct Endless;

impl Body for Endless {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Poll::Ready(Some(Ok(Frame::data(Bytes::new()))))
    }
}

#[tokio::test(start_paused = true)]
async fn draining_endless_empty_frames_does_not_hang_the_thread() {
    let service = service_fn(|_: Request<Full<Bytes>>| async {
        let mut response = Response::new(Endless);
        *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
        response
            .headers_mut()
            .insert(RETRY_AFTER, http::HeaderValue::from_static("0"));
        Ok::<_, Infallible>(response)
    });
    let response = quick().layer(service).oneshot(keyed()).await.unwrap();
    assert_eq!(Attempts::of(&response), 4);
}

// Without a budget an outage causes four times the load.
#[tokio::test(start_paused = true)]
async fn an_outage_does_not_multiply_the_load() {
    let peer = Peer::new([Act::Answer(503)]);
    let service = RetryLayer::new().layer(peer.clone());
    let mut calls = tokio::task::JoinSet::new();
    for _ in 0..1000 {
        calls.spawn(service.clone().oneshot(keyed()));
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    while calls.join_next().await.is_some() {}
    assert!((1050..=1300).contains(&peer.count()), "{}", peer.count());

    // A burst gets through, another service has its own budget, and a budget can be switched off.
    for (layer, calls, attempts) in [
        (RetryLayer::new(), 30, 120),
        (RetryLayer::new(), 30, 120),
        (RetryLayer::new().budget(None), 200, 800),
    ] {
        let peer = Peer::new([Act::Answer(503)]);
        let service = layer.layer(peer.clone());
        for _ in 0..calls {
            service.clone().oneshot(keyed()).await.unwrap();
        }
        assert_eq!(peer.count(), attempts);
    }
}
