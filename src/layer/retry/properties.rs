//! What holds for every script of outcomes.

use proptest::prelude::*;
use tokio::time::Instant;
use tower::ServiceExt;

use super::tests::{Act, Peer, keyed, request};
use super::*;
use http::{Method, StatusCode};

fn act() -> impl Strategy<Value = Act> {
    let status = prop_oneof![
        Just(200_u16),
        Just(202),
        Just(404),
        Just(408),
        Just(409),
        Just(422),
        Just(429),
        Just(500),
        Just(503),
        200..=599_u16,
    ];
    let after = prop_oneof![Just("0"), Just("1"), Just("7"), Just("31"), Just("junk")];
    prop_oneof![
        3 => status.clone().prop_map(Act::Answer),
        2 => (status.clone(), 0..3000_u64)
            .prop_map(|(status, ms)| Act::AnswerAfter(status, Duration::from_millis(ms))),
        2 => (status, after).prop_map(|(status, after)| Act::RetryAfter(status, after)),
        2 => Just(Act::Reset),
        2 => Just(Act::Refuse),
        1 => Just(Act::Hang),
        1 => prop_oneof![Just(None), (0..500_u64).prop_map(Some)]
            .prop_map(|ms| Act::LateBody(ms.map(Duration::from_millis))),
    ]
}

fn backoff() -> impl Strategy<Value = Backoff> {
    let (base, max) = (Duration::from_millis(100), Duration::from_secs(2));
    prop_oneof![
        Just(Backoff::none()),
        Just(Backoff::default()),
        Just(Backoff::exponential(base, max)),
        Just(Backoff::exponential(base, max).equal_jitter()),
        Just(Backoff::decorrelated(base, max)),
    ]
}

#[derive(Debug, Clone)]
struct Case {
    script: Vec<Act>,
    method: Method,
    has_key: bool,
    retries: u32,
    backoff: Backoff,
    timeout: Option<Duration>,
    deadline: Option<Duration>,
    seed: u64,
}

fn case() -> impl Strategy<Value = Case> {
    let method = prop_oneof![
        3 => Just(Method::POST),
        1 => Just(Method::GET),
        1 => Just(Method::PATCH),
        1 => Just(Method::PUT),
    ];
    let millis = |range| proptest::option::of(range).prop_map(|ms| ms.map(Duration::from_millis));
    (
        proptest::collection::vec(act(), 1..8),
        method,
        any::<bool>(),
        0..6_u32,
        backoff(),
        millis(50..2000_u64),
        millis(1..5000_u64),
        any::<u64>(),
    )
        .prop_map(
            |(script, method, has_key, retries, backoff, timeout, deadline, seed)| Case {
                script,
                method,
                has_key,
                retries,
                backoff,
                timeout,
                deadline,
                seed,
            },
        )
}

impl Case {
    fn layer(&self) -> RetryLayer {
        RetryLayer::new()
            .max_retries(self.retries)
            .backoff(self.backoff.clone())
            // A script may hang, and then only a timeout ends the call.
            .attempt_timeout(self.timeout.unwrap_or(Duration::from_secs(3)))
            .deadline(self.deadline)
            .seed(self.seed)
    }

    fn request(&self) -> Request<http_body_util::Full<bytes::Bytes>> {
        let mut request = if self.has_key {
            keyed()
        } else {
            request(Method::POST)
        };
        *request.method_mut() = self.method.clone();
        request
    }

    fn is_safe(&self) -> bool {
        self.has_key || matches!(self.method, Method::GET | Method::PUT)
    }

    /// Returns the peer's act for its `n`th request.
    fn played(&self, n: usize) -> &Act {
        &self.script[n.min(self.script.len() - 1)]
    }
}

fn run_paused<F: Future>(future: F) -> F::Output {
    tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .unwrap()
        .block_on(future)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_script_keeps_the_promises(case in case()) {
        run_paused(async {
            let peer = Peer::new(case.script.clone());
            let start = Instant::now();
            let result = case.layer().layer(peer.clone()).oneshot(case.request()).await;
            let took = start.elapsed();
            let sent = peer.count();

            // (a) An unsafe request is never delivered twice.
            let delivered = (0..sent).filter(|n| !matches!(case.played(*n), Act::Refuse)).count();
            prop_assert!(case.is_safe() || delivered <= 1);
            // (b) Attempts never exceed the limit.
            prop_assert!(sent <= case.retries as usize + 1);
            // (c) The deadline holds, to the timer's millisecond.
            if let Some(deadline) = case.deadline {
                prop_assert!(took <= deadline + Duration::from_millis(1), "{took:?}");
            }
            // (d) All deliveries are byte-identical.
            let expected = case.request();
            for (_, request) in peer.sent.lock().unwrap().iter() {
                prop_assert_eq!(request.headers(), expected.headers());
                prop_assert_eq!(request.method(), &case.method);
            }
            // (f) The caller gets the peer's last outcome unchanged.
            match (&result, case.played(sent - 1)) {
                (Ok(response), Act::Answer(status) | Act::AnswerAfter(status, _) | Act::RetryAfter(status, _)) => {
                    prop_assert_eq!(response.status().as_u16(), *status);
                    prop_assert_eq!(Attempts::of(response) as usize, sent);
                }
                (Ok(response), Act::LateBody(_)) => prop_assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE),
                (Ok(_), act) => prop_assert!(false, "a success came of {act:?}"),
                (Err(error), act) => {
                    prop_assert_eq!(error.attempts() as usize, sent);
                    prop_assert_eq!(error.delivery() == Delivery::NeverSent, delivered == 0);
                    let answered = matches!(act, Act::Answer(status) | Act::RetryAfter(status, _) if *status < 400);
                    prop_assert!(!answered, "{error} came of {act:?}");
                    prop_assert!(error.is_timeout() || matches!(act, Act::Reset | Act::Refuse));
                }
            }
            Ok(())
        })?;
    }

    #[test]
    fn a_call_that_is_cancelled_sends_nothing_more_and_costs_no_budget(case in case(), after in 0..6000_u64) {
        run_paused(async {
            let peer = Peer::new(case.script.clone());
            let budget = Budget::new(1.0);
            let service = case.layer().budget(budget.clone()).layer(peer.clone());
            let call = tokio::time::timeout(Duration::from_millis(after), service.oneshot(case.request()));
            let _ = call.await;
            let sent = peer.count();
            tokio::time::sleep(Duration::from_secs(60)).await;
            prop_assert_eq!(peer.count(), sent);
            // One call earned one retry, and each retry sent cost one.
            let left = std::iter::from_fn(|| budget.withdraw().map(budget::Withdrawal::spend)).count();
            prop_assert_eq!(left, 1_usize.saturating_sub(sent.saturating_sub(1)));
            Ok(())
        })?;
    }

    // As with redirects, backup requests, token fetches or other retries below.
    #[test]
    fn exchanges_below_never_make_an_unsafe_request_be_acted_upon_again(case in case(), turns in 1..4_usize) {
        run_paused(async {
            let peer = Peer::new(case.script.clone());
            // After how many exchanges each attempt began.
            let begins = Arc::new(std::sync::Mutex::new(Vec::new()));
            let (below, log) = (peer.clone(), begins.clone());
            let service = tower::service_fn(move |request: Request<http_body_util::Full<bytes::Bytes>>| {
                let peer = below.clone();
                log.lock().unwrap().push(peer.count());
                async move {
                    let mut last = peer.clone().oneshot(request.clone()).await;
                    for _ in 1..turns {
                        last = peer.clone().oneshot(request.clone()).await;
                    }
                    last
                }
            });
            let result = case.layer().layer(service).oneshot(case.request()).await;
            let begins = begins.lock().unwrap().clone();
            let delivered = |attempt: usize| {
                let until = begins.get(attempt + 1).copied().unwrap_or(peer.count());
                (begins[attempt]..until).any(|n| !matches!(case.played(n), Act::Refuse))
            };
            let attempts = begins.len();
            for attempt in 0..attempts - 1 {
                prop_assert!(case.is_safe() || !delivered(attempt), "attempt {attempt} of {attempts}");
            }
            if let Err(error) = result {
                let any = (0..attempts).any(delivered);
                prop_assert_eq!(error.delivery() == Delivery::NeverSent, !any);
                prop_assert_eq!(error.attempts() as usize, attempts);
            }
            Ok(())
        })?;
    }

    #[test]
    fn a_409_confirms_only_under_a_key_that_may_have_been_used(case in case(), is_minted in any::<bool>()) {
        use crate::layer::{AegisLayer, Confirmation};

        run_paused(async {
            let peer = Peer::new(case.script.clone());
            let layer = AegisLayer::new().mint_idempotency_key().retry(case.layer());
            let mut request = case.request();
            request.headers_mut().remove("idempotency-key");
            if !is_minted {
                let key = crate::protocol::IdempotencyKey::new("k-1").unwrap();
                request.extensions_mut().insert(key);
            }
            let Ok(response) = layer.layer(peer.clone()).oneshot(request).await else {
                return Ok(());
            };
            let sent = peer.count();
            let is_conflict = matches!(case.played(sent - 1), Act::Answer(409) | Act::AnswerAfter(409, _));
            let is_used = (0..sent - 1).any(|n| !matches!(case.played(n), Act::Refuse));
            let is_confirmed = Confirmation::of(&response) == Some(Confirmation::Duplicate);
            prop_assert_eq!(is_confirmed, is_conflict && (!is_minted || is_used));
            prop_assert_eq!(response.status() == StatusCode::CONFLICT && !is_confirmed,
                !is_confirmed && matches!(case.played(sent - 1), Act::Answer(409) | Act::AnswerAfter(409, _) | Act::RetryAfter(409, _)));
            Ok(())
        })?;
    }
}
