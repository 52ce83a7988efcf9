//! Waiting for a decision.

use aegis_hitl::Decision;
use aegis_hitl::testing::{Act, ClosedPort, Peer};
use serde_json::Value;

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
    for url in [hanging.url(), undecided.url(), away.url(), closed.url()] {
        let wait = service(&url).wait_for_decision(ID, SHORT);
        let error = ends(wait.into_future()).await.unwrap_err();
        assert!(
            error.is_timeout() && !error.is_outcome_unknown(),
            "{error:?}"
        );
        assert_eq!(error.to_string(), "the action was not decided in time");
    }
    for peer in [hanging, undecided, away] {
        assert!(
            peer.requests()
                .iter()
                .all(|request| request.method == "GET")
        );
    }
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
