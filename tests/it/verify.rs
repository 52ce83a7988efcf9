//! `OnDuplicate::Verify`: what a bare 409 of a server that is not ours stands for.

use std::time::Duration;

use aegis_hitl::client::OnDuplicate;
use aegis_hitl::layer::Backoff;
use aegis_hitl::testing::{Act, Peer};
use aegis_hitl::{Decision, Error, Outcome, Receipt};
use serde_json::json;

use crate::support::service::{answer, answer_with, builder};
use crate::support::{HANG, SHORT, ends};

async fn approve(on_duplicate: OnDuplicate, script: Vec<Act>) -> (Result<Receipt, Error>, Peer) {
    let peer = Peer::start(script).await;
    let service = builder(&peer.url())
        .timeout(Duration::from_secs(2))
        .on_duplicate(on_duplicate)
        .build()
        .unwrap();
    (service.approve("k-1").await, peer)
}

fn status(status: &str, decision: Option<&str>) -> Act {
    answer_with(
        200,
        &json!({"request_id": "r-1", "status": status, "decision": decision}),
    )
}

fn named() -> Act {
    answer_with(409, &json!({"detail": "duplicate", "request_id": "r-1"}))
}

#[tokio::test]
async fn by_default_a_bare_409_is_confirmed_without_another_request() {
    let (receipt, peer) = approve(OnDuplicate::Confirm, vec![named()]).await;
    assert_eq!(receipt.unwrap().outcome(), Outcome::Duplicate);
    assert_eq!(peer.count(), 1);
}

#[tokio::test]
async fn verify_asks_the_status_endpoint_for_the_decision() {
    let (receipt, peer) = approve(
        OnDuplicate::Verify,
        vec![named(), status("COMMITTED", Some("approve"))],
    )
    .await;
    let receipt = receipt.unwrap();
    assert_eq!(receipt.outcome(), Outcome::Duplicate);
    assert_eq!(receipt.action().unwrap().decision, Some(Decision::Approve));
    let seen = peer.requests();
    assert_eq!((seen.len(), seen[1].path()), (2, "/api/v1/hitl/status/r-1"));
}

#[tokio::test]
async fn without_an_id_in_the_409_the_calls_own_id_is_asked_for() {
    let (receipt, peer) = approve(
        OnDuplicate::Verify,
        vec![answer(409), status("COMMITTED", Some("approve"))],
    )
    .await;
    let receipt = receipt.unwrap();
    let path = format!("/api/v1/hitl/status/{}", receipt.call_id());
    assert_eq!(peer.requests()[1].path(), path);
    // The status tells the id that the 409 did not.
    assert_eq!(receipt.request_id().unwrap().as_str(), "r-1");
}

#[tokio::test]
async fn verify_turns_a_recorded_opposite_into_a_conflict() {
    let (result, _) = approve(
        OnDuplicate::Verify,
        vec![named(), status("COMMITTED", Some("reject"))],
    )
    .await;
    let error = result.unwrap_err();
    assert!(error.is_conflict());
    assert_eq!(error.recorded().unwrap().decision, Some(Decision::Reject));
}

#[tokio::test]
async fn verify_waits_for_a_pending_action() {
    let script = vec![
        named(),
        status("PENDING", None),
        status("PENDING", None),
        status("COMMITTED", Some("approve")),
    ];
    let (receipt, peer) = approve(OnDuplicate::Verify, script).await;
    assert_eq!(receipt.unwrap().outcome(), Outcome::Duplicate);
    assert_eq!(peer.count(), 4);
}

#[tokio::test]
async fn what_cannot_be_verified_is_an_error_and_not_a_success() {
    for (script, count) in [
        (vec![named(), status("PENDING", None)], None),
        (vec![named(), status("COMMITTED", None)], Some(2)),
        (vec![named(), status("PENDING", Some("approve"))], Some(2)),
        (vec![named(), answer(404)], Some(2)),
        (vec![named(), answer(503)], None),
        (vec![named(), answer(200)], Some(2)),
    ] {
        let (result, peer) = approve(OnDuplicate::Verify, script).await;
        if let Some(count) = count {
            assert_eq!(peer.count(), count);
        }
        let error = result.unwrap_err();
        assert!(error.is_outcome_unknown(), "{error:?}");
        assert!(
            error.to_string().contains("could not be verified"),
            "{error}"
        );
    }
}

#[tokio::test]
async fn a_409_that_tells_the_decision_needs_no_question() {
    let told = json!({"code": "duplicate", "action": {"request_id": "r-1", "status": "COMMITTED", "decision": "approve"}});
    let (receipt, peer) = approve(OnDuplicate::Verify, vec![answer_with(409, &told)]).await;
    assert_eq!(receipt.unwrap().outcome(), Outcome::Duplicate);
    assert_eq!(peer.count(), 1);
}

#[tokio::test]
async fn the_status_of_another_action_verifies_nothing() {
    for (member, value) in [
        ("tenant_id", "other"),
        ("thread_id", "other"),
        ("idempotency_key", "k-2"),
        ("status", "PENDING"),
    ] {
        let mut action = json!({"request_id": "r-1", "tenant_id": "acme", "thread_id": "run-7",
            "idempotency_key": "k-1", "status": "COMMITTED", "decision": "approve"});
        action[member] = json!(value);
        let script = vec![named(), answer_with(200, &action)];
        let (result, _) = approve(OnDuplicate::Verify, script).await;
        let error = result.unwrap_err();
        assert!(error.is_outcome_unknown(), "{member}: {error:?}");
    }
}

#[tokio::test]
async fn an_id_verifies_in_any_spelling_of_a_uuid() {
    let id = "0197f1a0-7d5e-7c3b-a1b2-c3d4e5f60718";
    let refused = json!({"detail": "duplicate", "request_id": id.to_uppercase()});
    let action = json!({"request_id": id, "status": "COMMITTED", "decision": "approve"});
    let script = vec![answer_with(409, &refused), answer_with(200, &action)];
    let (receipt, _) = approve(OnDuplicate::Verify, script).await;
    assert_eq!(receipt.unwrap().outcome(), Outcome::Duplicate);
}

#[tokio::test]
async fn the_deadline_bounds_the_verification_too() {
    let peer = Peer::start([answer(409), status("PENDING", None)]).await;
    let service = builder(&peer.url())
        .backoff(Backoff::constant(SHORT))
        .max_retries(u32::MAX)
        .timeout(2 * HANG)
        .deadline(Duration::from_millis(300))
        .on_duplicate(OnDuplicate::Verify)
        .build()
        .unwrap();
    let error = ends(service.approve("k-1").into_future()).await;
    let error = error.unwrap_err();
    assert!(error.is_outcome_unknown(), "{error:?}");
}
