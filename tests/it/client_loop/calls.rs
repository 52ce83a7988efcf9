//! What the calls send, and what their own retries send.

use std::time::{Duration, UNIX_EPOCH};

use aegis_hitl::testing::{Act, Peer};
use aegis_hitl::{AegisService, ApiKey, Decision, Error, Execution, Status};
use serde_json::{Value, json};

use super::{
    ID, PAYLOAD, TOKEN, approved, claim, claimed, digest, executed, payload, pending, rejected,
    service, with,
};
use crate::support::service::answer_with;

fn token() -> aegis_hitl::protocol::ClaimToken {
    TOKEN.parse().unwrap()
}

/// Each call that changes something: its name, the path and the body that it sends, and an answer.
fn changes() -> Vec<(&'static str, String, Value, Act)> {
    let at = |verb: &str| format!("/api/v1/hitl/actions/{ID}/{verb}");
    let cancelled = with(&rejected(), json!({"closed": "cancelled"}));
    vec![
        (
            "submit",
            "/api/v1/hitl/actions".into(),
            payload(),
            answer_with(201, &pending()),
        ),
        (
            "approve",
            at("approve"),
            json!({"digest": digest()}),
            answer_with(202, &approved()),
        ),
        (
            "reject",
            at("reject"),
            json!({"digest": digest()}),
            answer_with(202, &rejected()),
        ),
        (
            "cancel",
            at("cancel"),
            json!({}),
            answer_with(202, &cancelled),
        ),
        (
            "claim",
            at("claim"),
            json!({"digest": digest(), "lease": 30}),
            answer_with(200, &claimed()),
        ),
        (
            "renew",
            at("renew"),
            json!({"token": TOKEN}),
            answer_with(200, &json!({"claim": claim()})),
        ),
        (
            "complete",
            at("complete"),
            json!({"token": TOKEN, "result": [1]}),
            answer_with(200, &executed("completed")),
        ),
        (
            "fail",
            at("fail"),
            json!({"token": TOKEN, "reason": "no"}),
            answer_with(200, &executed("failed")),
        ),
    ]
}

async fn call(aegis: &AegisService, name: &str) -> Result<(), Error> {
    match name {
        "submit" => aegis.submit("k-1").payload(&payload()).await.map(drop),
        "approve" => aegis.approve_action(ID).digest(digest()).await.map(drop),
        "reject" => aegis.reject_action(ID).digest(digest()).await.map(drop),
        "cancel" => aegis.cancel(ID).await.map(drop),
        "claim" => {
            let lease = Duration::from_millis(29_500);
            aegis
                .claim(ID)
                .digest(digest())
                .lease(lease)
                .await
                .map(drop)
        }
        "renew" => aegis.renew(ID, &token()).await.map(drop),
        "complete" => aegis.complete(ID, &token()).result(&[1]).await.map(drop),
        "fail" => aegis.fail(ID, &token()).reason("no").await.map(drop),
        _ => unreachable!(),
    }
}

#[tokio::test]
async fn every_change_goes_out_as_the_protocol_has_it() {
    for (name, path, body, answer) in changes() {
        let peer = Peer::start([answer]).await;
        call(&service(&peer.url()), name).await.unwrap();
        let seen = &peer.requests()[0];
        assert_eq!(
            (seen.method.as_str(), seen.path()),
            ("POST", &*path),
            "{name}"
        );
        let sent: Value = serde_json::from_slice(&seen.body).unwrap();
        assert_eq!(sent, body, "{name}");
        assert_eq!(seen.header("content-type"), Some("application/json"));
        assert_eq!(seen.header("accept-encoding"), Some("identity"));
        assert_eq!(seen.header("tenant-id"), Some("acme"));
        // Thread and key belong to submissions alone.
        let (thread, key) = match name {
            "submit" => (Some("run-7"), Some("k-1")),
            _ => (None, None),
        };
        assert_eq!(seen.header("thread-id"), thread, "{name}");
        assert_eq!(seen.header("idempotency-key"), key, "{name}");
        let id = uuid::Uuid::parse_str(seen.header("x-request-id").unwrap()).unwrap();
        assert_eq!(id.get_version_num(), 7);
    }
}

#[tokio::test]
async fn every_change_is_sent_again_as_the_same_call() {
    for (name, _, _, answer) in changes() {
        let script = [
            Act::lose_reply(),
            Act::answer(503),
            Act::answer(409).header("retry-after", "0"),
            answer,
        ];
        let peer = Peer::start(script).await;
        call(&service(&peer.url()), name).await.unwrap();
        let seen = peer.requests();
        assert_eq!(seen.len(), 4, "{name}");
        for attempt in &seen {
            assert_eq!(attempt.headers, seen[0].headers, "{name}");
            assert_eq!(attempt.body, seen[0].body, "{name}");
        }
    }
}

#[tokio::test]
async fn two_calls_carry_different_call_ids_unless_they_are_told() {
    let peer = Peer::start([answer_with(200, &claimed())]).await;
    let aegis = service(&peer.url());
    for _ in 0..2 {
        aegis.claim(ID).digest(digest()).await.unwrap();
        aegis
            .claim(ID)
            .digest(digest())
            .call_id("call-1")
            .await
            .unwrap();
    }
    let ids: Vec<_> = peer
        .requests()
        .iter()
        .map(|request| request.header("x-request-id").unwrap().to_owned())
        .collect();
    assert_ne!(ids[0], ids[2]);
    assert_eq!((&*ids[1], &*ids[3]), ("call-1", "call-1"));
}

#[tokio::test]
async fn a_call_that_stays_unanswered_fails_with_an_unknown_outcome_and_its_id() {
    for (name, ..) in changes() {
        let peer = Peer::start([Act::answer(503)]).await;
        let error = call(&service(&peer.url()), name).await.unwrap_err();
        assert!(
            error.is_unavailable() && error.is_outcome_unknown(),
            "{name}"
        );
        assert_eq!((error.attempts(), peer.count()), (4, 4), "{name}");
        let seen = &peer.requests()[0];
        assert_eq!(
            error.call_id().unwrap().as_str(),
            seen.header("x-request-id").unwrap()
        );
        assert_eq!(error.idempotency_key().is_some(), name == "submit");
    }
}

#[tokio::test]
async fn the_metadata_of_a_submission_goes_beside_the_payload() {
    let peer = Peer::start([answer_with(201, &pending())]).await;
    let aegis = service(&peer.url());
    let end = UNIX_EPOCH + Duration::from_secs(1_893_553_445);
    aegis
        .submit("k-1")
        .payload(&aegis_hitl::Payload::from_json(PAYLOAD).unwrap())
        .title("Pay \"a\"")
        .expires_at(end)
        .allow_edit(true)
        .await
        .unwrap();
    let body = String::from_utf8(peer.requests()[0].body.to_vec()).unwrap();
    let sent: Value = serde_json::from_str(&body).unwrap();
    let metadata =
        json!({"title": "Pay \"a\"", "expires_at": "2030-01-02T03:04:05Z", "allow_edit": true});
    assert_eq!(sent, with(&payload(), json!({ "aegis": metadata })));
    // The text of the payload is not written anew.
    assert!(body.starts_with(&PAYLOAD[..PAYLOAD.len() - 1]), "{body}");
}

#[tokio::test]
async fn what_cannot_be_sent_is_refused_before_anything_is_sent() {
    let peer = Peer::start([Act::answer(200)]).await;
    let aegis = service(&peer.url());
    let second = Duration::from_secs(1);
    let day = Duration::from_secs(86_400);
    let errors = [
        aegis.submit("").await.unwrap_err(),
        aegis.submit("k").payload(&7).await.unwrap_err(),
        aegis
            .submit("k")
            .payload(&json!({"aegis": 1}))
            .await
            .unwrap_err(),
        aegis.cancel("a b").await.unwrap_err(),
        aegis
            .reject_action(ID)
            .edited_payload(&payload())
            .await
            .unwrap_err(),
        aegis.claim(ID).lease(Duration::ZERO).await.unwrap_err(),
        aegis.claim(ID).lease(day + second).await.unwrap_err(),
        aegis
            .renew(ID, &token())
            .lease(day + second)
            .await
            .unwrap_err(),
        aegis.list().tenant_id("").await.unwrap_err(),
        aegis.wait_for_decision("", second).await.unwrap_err(),
        aegis
            .action("k")
            .lease(Duration::ZERO)
            .run_once(|_| async { Ok::<_, Error>(()) })
            .await
            .unwrap_err(),
    ];
    for error in errors {
        assert!(
            error.is_request() && !error.is_outcome_unknown(),
            "{error:?}"
        );
    }
    assert_eq!(peer.count(), 0);
}

#[tokio::test]
async fn with_an_api_key_no_tenant_is_sent_and_any_is_taken() {
    let peer = Peer::start([answer_with(200, &claimed())]).await;
    let aegis = AegisService::builder()
        .base_url(peer.url())
        .api_key(ApiKey::new("sk_live_1").unwrap())
        .build()
        .unwrap();
    aegis.claim(ID).digest(digest()).await.unwrap();
    let seen = &peer.requests()[0];
    assert_eq!(seen.header("authorization"), Some("Bearer sk_live_1"));
    assert_eq!(seen.header("tenant-id"), None);
    assert!(
        aegis
            .claim(ID)
            .tenant_id("t")
            .await
            .unwrap_err()
            .is_request()
    );
}

#[tokio::test]
async fn a_list_is_asked_for_with_its_filters_and_read_page_by_page() {
    let page = json!({"actions": [pending()], "next_cursor": "o1f", "future": 1});
    let last = json!({"actions": []});
    let peer = Peer::start([answer_with(200, &page), answer_with(200, &last)]).await;
    let aegis = service(&peer.url());
    let page = aegis
        .list()
        .status(Status::Pending)
        .decision(Decision::Approve)
        .execution(Execution::Claimed)
        .thread_id("run-7")
        .limit(200)
        .await
        .unwrap();
    assert_eq!(page.actions.len(), 1);
    let cursor = page.next_cursor.unwrap();
    let last = aegis.list().cursor(cursor + "&x=1").await.unwrap();
    assert_eq!((last.actions.len(), last.next_cursor), (0, None));
    let seen = peer.requests();
    assert_eq!(seen[0].method, "GET");
    assert_eq!(
        seen[0].uri.path_and_query().unwrap(),
        "/api/v1/hitl/actions?status=PENDING&decision=approve&execution=claimed&thread_id=run-7&limit=200"
    );
    assert_eq!(seen[0].header("tenant-id"), Some("acme"));
    assert_eq!(seen[1].uri.query(), Some("cursor=o1f%26x%3D1"));
}

#[tokio::test]
async fn a_look_returns_all_that_is_on_record() {
    let all = with(
        &approved(),
        json!({
            "title": "t", "payload": payload(), "comment": "c", "result": [1], "allow_edit": true,
            "edited_payload": {"n": 1}, "digest": super::digest_of(&json!({"n": 1})),
            "history": [{"id": "e-1", "type": "action.submitted", "at": "2026-01-02T03:04:05Z", "actor": "a"}],
        }),
    );
    let peer = Peer::start([answer_with(200, &all)]).await;
    let action = service(&peer.url()).look(ID).await.unwrap();
    assert_eq!(action.effective_payload().unwrap().as_str(), r#"{"n":1}"#);
    assert_eq!(action.result.unwrap().as_str(), "[1]");
    assert_eq!(action.history.unwrap().len(), 1);
    assert_eq!(
        peer.requests()[0].path(),
        format!("/api/v1/hitl/actions/{ID}")
    );
}
