//! Waiting for a decision.

use std::convert::Infallible;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use aegis_hitl::testing::{Act, ClosedPort, Peer};
use aegis_hitl::{Decision, Status};
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use serde_json::{Value, json};
use tokio::time::Instant;
use tower::service_fn;

use super::{ID, approved, pending, problem, rejected, service, with};
use crate::support::service::{answer_with, builder};
use crate::support::{HANG, SHORT, ends};

#[tokio::test]
async fn a_wait_asks_the_server_to_wait_and_goes_on_until_a_decision() {
    let script = [
        answer_with(200, &pending()),
        Act::lose_reply(),
        answer_with(200, &rejected()),
    ];
    let peer = Peer::start(script).await;
    let wait = service(&peer.url()).wait_for_decision(ID, HANG);
    let action = ends(wait.into_future()).await.unwrap();
    assert_eq!(action.decision, Some(Decision::Reject));
    let seen = peer.requests();
    assert_eq!(seen.len(), 3);
    for request in &seen {
        assert_eq!(request.path(), format!("/api/v1/hitl/status/{ID}"));
        let wait = request.header("prefer").unwrap();
        let seconds: u64 = wait.strip_prefix("wait=").unwrap().parse().unwrap();
        assert!((30..=55).contains(&seconds), "{wait}");
    }
}

#[tokio::test]
async fn a_wait_outlives_an_outage_longer_than_a_calls_retries() {
    // Five calls' worth of attempts without retries.
    let mut script = vec![
        Act::answer(503),
        Act::lose_reply(),
        Act::answer(429),
        Act::answer(502),
    ];
    script.push(answer_with(200, &approved()));
    let peer = Peer::start(script).await;
    let aegis = builder(&peer.url()).max_retries(0).build().unwrap();
    let wait = aegis.wait_for_decision(ID, HANG);
    let action = ends(wait.into_future()).await.unwrap();
    assert_eq!(
        (action.decision, peer.count()),
        (Some(Decision::Approve), 5)
    );
}

#[tokio::test]
async fn a_wait_is_not_cut_by_the_timeout_of_an_attempt() {
    let late = answer_with(200, &approved()).after(SHORT * 3);
    let peer = Peer::start([late]).await;
    let aegis = builder(&peer.url()).timeout(SHORT).build().unwrap();
    let wait = aegis.wait_for_decision(ID, HANG);
    ends(wait.into_future()).await.unwrap();
    assert_eq!(peer.count(), 1);
}

#[tokio::test]
async fn a_wait_without_a_decision_is_a_timeout_that_changes_nothing() {
    let hanging = Peer::start([Act::hang()]).await;
    let undecided = Peer::start([answer_with(200, &pending())]).await;
    let away = Peer::start([Act::answer(503)]).await;
    let closed = ClosedPort::new();
    for (url, limit, is_answered) in [
        (hanging.url(), SHORT, false),
        (undecided.url(), SHORT * 10, true),
        (away.url(), SHORT, false),
        (closed.url(), SHORT, false),
    ] {
        let wait = service(&url).wait_for_decision(ID, limit);
        let error = ends(wait.into_future()).await.unwrap_err();
        assert!(
            error.is_timeout() && !error.is_outcome_unknown(),
            "{error:?}"
        );
        assert_eq!(error.to_string(), "the action was not decided in time");
        // The source tells why the server could not be asked.
        let source = std::error::Error::source(&error);
        assert_eq!(source.is_none(), is_answered, "{error:?}");
    }
    for peer in [hanging, undecided, away] {
        assert!(
            peer.requests()
                .iter()
                .all(|request| request.method == "GET")
        );
    }
}

/// Waits for a server that decides nothing. It answers each question after a time and with a status,
/// which depend on how long it was asked to wait and on how often it was asked before. Returns the
/// source of the error.
async fn why_undecided(answer: fn(Duration, usize) -> (Duration, u16)) -> Option<String> {
    let asked = Arc::new(AtomicUsize::new(0));
    let double = service_fn(move |request: Request<Full<Bytes>>| {
        let wait = request.headers()["prefer"].to_str().unwrap();
        let wait = wait.strip_prefix("wait=").unwrap().parse().unwrap();
        let wait = Duration::from_secs(wait);
        let asked = asked.fetch_add(1, Ordering::Relaxed);
        assert!(asked < 1000, "it is asked without a pause");
        let (takes, status) = answer(wait, asked);
        async move {
            tokio::time::sleep(takes).await;
            let mut response = Response::new(Full::<Bytes>::from(pending().to_string()));
            *response.status_mut() = status.try_into().unwrap();
            Ok::<_, Infallible>(response)
        }
    });
    let aegis = builder("http://server.test").build_with(double).unwrap();
    let wait = aegis.wait_for_decision(ID, Duration::from_millis(600_500));
    let error = wait.await.unwrap_err();
    assert!(error.is_timeout(), "{error:?}");
    std::error::Error::source(&error).map(ToString::to_string)
}

#[tokio::test(start_paused = true)]
async fn an_undecided_wait_tells_what_failed_since_the_last_answer() {
    assert_eq!(why_undecided(|wait, _| (wait, 200)).await, None);
    let away = why_undecided(|wait, asked| match asked {
        0 => (wait, 200),
        _ => (Duration::ZERO, 503),
    });
    let away = away.await;
    assert!(away.is_some_and(|why| why.contains("503")));
    let silent = why_undecided(|wait, asked| match asked {
        0 => (wait, 200),
        _ => (Duration::MAX, 200),
    });
    let silent = silent.await;
    assert!(silent.is_some_and(|why| why.contains("in time")));
}

#[tokio::test]
async fn a_wait_that_cannot_succeed_fails_at_once() {
    let foreign = with(&approved(), serde_json::json!({"tenant_id": "x"}));
    for act in [
        problem(404, "not-found", Value::Null),
        problem(401, "unauthorized", Value::Null),
        answer_with(200, &foreign),
        Act::answer(200).body("<html>"),
    ] {
        let peer = Peer::start([act]).await;
        let wait = service(&peer.url()).wait_for_decision(ID, HANG);
        let error = ends(wait.into_future()).await.unwrap_err();
        assert!(!error.is_timeout(), "{error:?}");
        assert_eq!(peer.count(), 1);
    }
}

#[tokio::test]
async fn a_status_without_a_decision_or_of_another_action_ends_no_wait_well() {
    let other = "0190a1b2-0000-7000-8000-000000000002";
    for members in [
        json!({"status": "COMMITTED", "decision": null}),
        json!({"status": "COMMITTED", "decision": "escalate"}),
        json!({"status": "FAILED", "decision": null}),
        json!({ "request_id": other }),
    ] {
        let peer = Peer::start([answer_with(200, &with(&approved(), members.clone()))]).await;
        let wait = service(&peer.url()).wait_for_decision(ID, HANG);
        let error = ends(wait.into_future()).await.unwrap_err();
        assert!(error.is_protocol(), "{members}: {error:?}");
        assert_eq!(peer.count(), 1, "{members}");
    }
}

#[tokio::test]
async fn a_state_that_this_version_does_not_know_is_waited_out() {
    let queued = with(&pending(), json!({"status": "QUEUED"}));
    let contradictory = with(&pending(), json!({"decision": "approve"}));
    let sealed = with(
        &approved(),
        json!({"status": "SEALED", "request_id": ID.to_uppercase()}),
    );
    let script = [queued, contradictory, sealed].map(|action| answer_with(200, &action));
    let peer = Peer::start(script).await;
    let wait = service(&peer.url()).wait_for_decision(ID, HANG);
    let action = ends(wait.into_future()).await.unwrap();
    assert_eq!(
        (action.status, action.decision, peer.count()),
        (Status::Other, Some(Decision::Approve), 3)
    );
}

/// Waits for a server that answers this long after it was asked, the third time with a decision.
/// Returns when it was asked.
async fn asked_at(takes: Duration) -> Vec<Duration> {
    let begun = Instant::now();
    let asked = Arc::new(Mutex::new(Vec::new()));
    let seen = asked.clone();
    let double = service_fn(move |_: Request<Full<Bytes>>| {
        let mut seen = seen.lock().unwrap();
        seen.push(begun.elapsed());
        let action = if seen.len() < 3 {
            pending()
        } else {
            approved()
        };
        async move {
            tokio::time::sleep(takes).await;
            Ok::<_, Infallible>(Response::new(Full::<Bytes>::from(action.to_string())))
        }
    });
    // The service's deadline is not for waits.
    let aegis = builder("http://server.test").deadline(Duration::from_secs(1));
    let aegis = aegis.build_with(double).unwrap();
    let wait = aegis.wait_for_decision(ID, Duration::from_secs(3600));
    assert!(wait.await.unwrap().decision.is_some());
    asked.lock().unwrap().clone()
}

#[tokio::test(start_paused = true)]
async fn only_a_server_that_does_not_wait_is_asked_again_after_a_pause() {
    let times = |millis: [u64; 3]| millis.map(Duration::from_millis).to_vec();
    assert_eq!(asked_at(Duration::ZERO).await, times([0, 500, 1000]));
    let waited = asked_at(Duration::from_secs(55)).await;
    assert_eq!(waited, times([0, 55_000, 110_000]));
}
