//! `AegisService` against scripted peers on real sockets, with requests counted at the peer.

use std::convert::Infallible;
use std::error::Error as _;
use std::future::{Ready, poll_fn, ready};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use aegis_hitl::layer::{Backoff, Delivery, NotRetried};
use aegis_hitl::testing::{Act, ClosedPort, Peer};
use aegis_hitl::{
    AegisService, ApiKey, Decision, DecisionRequest, Error, IdempotencyKey, Outcome, Status,
    TenantId,
};
use bytes::Bytes;
use http::Request;
use http_body::{Body, Frame};
use http_body_util::{BodyExt, Full};
use serde_json::{Value, json};
use tower::{Service, ServiceExt};

use crate::support::service::{action, answer, answer_after, answer_with, builder};
use crate::support::{HANG, SHORT, ends};

fn service(peer: &Peer) -> AegisService {
    builder(&peer.url()).build().unwrap()
}

fn problem(status: u16, code: &str, decision: &str) -> Act {
    answer_with(
        status,
        &json!({"type": format!("urn:aegis:problem:{code}"), "title": "t", "status": status,
               "detail": "d", "code": code, "action": action(decision)}),
    )
}

async fn failure(act: Act) -> (Error, usize) {
    let peer = Peer::start([act]).await;
    let error = service(&peer).approve("k-1").await.unwrap_err();
    (error, peer.count())
}

#[tokio::test]
async fn an_approval_goes_out_as_the_protocol_has_it() {
    let peer = Peer::start([answer_with(202, &action("approve"))]).await;
    let receipt = service(&peer)
        .approve("k-1")
        .payload(&json!({"to": "a@b.c"}))
        .await
        .unwrap();
    assert_eq!(receipt.outcome(), Outcome::Accepted);
    assert_eq!(receipt.decision(), Decision::Approve);
    assert_eq!(receipt.attempts(), 1);
    assert_eq!(receipt.status_code(), 202);
    let id = receipt.request_id().unwrap();
    assert_eq!(id.as_str(), "r-1");
    assert_eq!(receipt.action().unwrap().status, Status::Committed);

    let seen = &peer.requests()[0];
    assert_eq!(
        (seen.method.as_str(), seen.path()),
        ("POST", "/api/v1/hitl/approve")
    );
    assert_eq!(seen.header("tenant-id"), Some("acme"));
    assert_eq!(seen.header("thread-id"), Some("run-7"));
    assert_eq!(seen.header("idempotency-key"), Some("k-1"));
    assert_eq!(
        seen.header("x-request-id"),
        Some(receipt.call_id().as_str())
    );
    assert!(receipt.call_id().as_uuid().is_some());
    assert_eq!(seen.header("content-type"), Some("application/json"));
    assert_eq!(seen.header("authorization"), None);
    assert_eq!(seen.header("accept-encoding"), Some("identity"));
    assert_eq!(&seen.body[..], br#"{"to":"a@b.c"}"#);
}

#[tokio::test]
async fn a_call_may_name_its_own_tenant_thread_and_call_id() {
    let peer = Peer::start([answer(202)]).await;
    let service = AegisService::builder()
        .base_url(peer.url())
        .build()
        .unwrap();
    service
        .execute(Decision::Reject, "k-2")
        .tenant_id("other")
        .thread_id("t-9")
        .call_id("call-1")
        .comment("too \"risky\"")
        .await
        .unwrap();
    let seen = &peer.requests()[0];
    assert_eq!(seen.path(), "/api/v1/hitl/reject");
    assert_eq!(seen.header("tenant-id"), Some("other"));
    assert_eq!(seen.header("thread-id"), Some("t-9"));
    assert_eq!(seen.header("x-request-id"), Some("call-1"));
    let body: Value = serde_json::from_slice(&seen.body).unwrap();
    assert_eq!(body, json!({"aegis": {"comment": "too \"risky\""}}));
}

#[tokio::test]
async fn a_comment_goes_beside_the_payload() {
    let peer = Peer::start([answer(202)]).await;
    service(&peer)
        .approve("k-1")
        .payload(&json!({"n": 1}))
        .comment("ok")
        .await
        .unwrap();
    let body: Value = serde_json::from_slice(&peer.requests()[0].body).unwrap();
    assert_eq!(body, json!({"n": 1, "aegis": {"comment": "ok"}}));
    let both = service(&peer)
        .approve("k-1")
        .payload(&json!({"aegis": {"comment": "a"}}))
        .comment("b")
        .await;
    assert!(both.unwrap_err().is_request());
    assert_eq!(peer.count(), 1);
}

#[tokio::test]
async fn with_an_api_key_no_tenant_is_sent() {
    let peer = Peer::start([answer(202)]).await;
    let service = AegisService::builder()
        .base_url(peer.url())
        .api_key("sk_live_1")
        .thread_id("run-7")
        .build()
        .unwrap();
    service.approve("k-1").await.unwrap();
    let seen = &peer.requests()[0];
    assert_eq!(seen.header("authorization"), Some("Bearer sk_live_1"));
    assert_eq!(seen.header("tenant-id"), None);
    let error = service.approve("k-1").tenant_id("acme").await.unwrap_err();
    assert!(error.is_request());
    assert_eq!(peer.count(), 1);
}

#[tokio::test]
async fn all_attempts_of_a_call_are_byte_identical() {
    let peer = Peer::start([
        Act::lose_reply(),
        answer(503),
        Act::lose_reply(),
        answer_with(202, &action("approve")),
    ])
    .await;
    let receipt = service(&peer)
        .approve("k-1")
        .payload(&json!({"b": 1, "a": [1.50]}))
        .await
        .unwrap();
    assert_eq!(receipt.attempts(), 4);
    let seen = peer.requests();
    assert_eq!(seen.len(), 4);
    for attempt in &seen {
        assert_eq!(attempt.headers, seen[0].headers);
        assert_eq!(attempt.body, seen[0].body);
        assert_eq!(attempt.path(), seen[0].path());
    }
}

#[tokio::test]
async fn two_calls_carry_different_call_ids() {
    let peer = Peer::start([answer(202)]).await;
    let service = service(&peer);
    service.approve("k-1").await.unwrap();
    service.approve("k-1").await.unwrap();
    let seen = peer.requests();
    assert_ne!(
        seen[0].header("x-request-id"),
        seen[1].header("x-request-id")
    );
}

#[tokio::test]
async fn a_409_is_a_confirmed_duplicate() {
    let bare = answer(409);
    let seed = answer_with(409, &json!({"detail": "Duplicate request"}));
    for act in [bare, seed, problem(409, "duplicate", "approve")] {
        let peer = Peer::start([act]).await;
        let receipt = service(&peer).approve("k-1").await.unwrap();
        assert_eq!(receipt.outcome(), Outcome::Duplicate);
        assert!(receipt.is_duplicate());
        assert_eq!((receipt.status_code().as_u16(), peer.count()), (409, 1));
    }
}

#[tokio::test]
async fn a_recorded_opposite_is_a_conflict_whatever_the_status_says() {
    for act in [
        problem(409, "duplicate", "reject"),
        problem(422, "decision-conflict", "reject"),
        answer_with(202, &action("reject")),
    ] {
        let (error, count) = failure(act).await;
        assert!(error.is_conflict(), "{error:?}");
        assert!(!error.is_outcome_unknown());
        assert_eq!(error.recorded().unwrap().decision, Some(Decision::Reject));
        assert_eq!(error.to_string(), "the decision on record is 'reject'");
        assert_eq!(count, 1);
    }
}

/// What an answer may stand for.
#[derive(Debug, PartialEq)]
enum Conclusion {
    Accepted,
    Duplicate,
    /// The opposite decision is on record, and the error holds it.
    Conflict,
    /// A conflict of which nothing more can be read.
    BareConflict,
    /// Not of the protocol, so the outcome is unknown.
    Unconfirmed,
}

fn concluded(result: Result<aegis_hitl::Receipt, Error>) -> Conclusion {
    match result {
        Ok(receipt) if receipt.is_duplicate() => Conclusion::Duplicate,
        Ok(_) => Conclusion::Accepted,
        Err(error) if error.is_conflict() => {
            assert!(!error.is_outcome_unknown(), "{error:?}");
            match error.recorded() {
                Some(action) => {
                    assert_eq!(action.decision, Some(Decision::Reject));
                    Conclusion::Conflict
                }
                None => Conclusion::BareConflict,
            }
        }
        Err(error) => {
            assert!(
                error.is_protocol() && error.is_outcome_unknown(),
                "{error:?}"
            );
            Conclusion::Unconfirmed
        }
    }
}

/// The recorded approval, with one member changed.
fn changed(member: &str, value: impl Into<Value>) -> Value {
    let mut action = action("approve");
    action[member] = value.into();
    action
}

fn duplicate_of(action: Value) -> Value {
    json!({"type": "urn:aegis:problem:duplicate", "status": 409, "code": "duplicate", "action": action})
}

// PROTOCOL.md, "What a client may conclude".
#[tokio::test]
async fn a_receipt_takes_an_answer_that_agrees_with_what_was_asked() {
    use Conclusion::{Accepted, BareConflict, Conflict, Duplicate, Unconfirmed};
    let json = |status, body: Value| {
        answer_with(status, &body).header("content-type", "application/json; charset=utf-8")
    };
    let problem = |status, body: Value| {
        answer_with(status, &body).header("content-type", "application/problem+json")
    };
    let typed = |kind: &str| answer(409).body("{}").header("content-type", kind);
    let mut zoneless = action("reject");
    zoneless["decided_at"] = json!("2026-01-02T03:04:05");
    let mut unknown_words = action("reject");
    unknown_words["status"] = json!("SEALED");
    let conflict = |action: &Value| json!({"code": "decision-conflict", "action": action});
    let whole = duplicate_of(action("approve")).to_string();
    let page = "<html><body>Conflict</body></html>";

    let cases = [
        ("empty 202", answer(202), Accepted),
        (
            "202 with the action",
            json(202, action("approve")),
            Accepted,
        ),
        (
            "202 with nothing of ours",
            json(202, json!({"message": "ok", "status": 1})),
            Accepted,
        ),
        (
            "202 with a new status",
            json(202, changed("status", "SEALED")),
            Accepted,
        ),
        (
            "202 with a new member",
            json(202, changed("mood", "fine")),
            Accepted,
        ),
        (
            "202 with a strange time",
            json(202, changed("decided_at", 7)),
            Accepted,
        ),
        (
            "202 in identity coding",
            answer(202).header("content-encoding", "Identity"),
            Accepted,
        ),
        (
            "202 with the opposite",
            json(202, action("reject")),
            Conflict,
        ),
        (
            "202 with the opposite, zone-less",
            json(202, zoneless.clone()),
            Conflict,
        ),
        (
            "202 with the opposite nested",
            json(202, json!({"action": action("reject")})),
            Conflict,
        ),
        (
            "202 of another tenant",
            json(202, changed("tenant_id", "other")),
            Unconfirmed,
        ),
        (
            "202 of another thread",
            json(202, changed("thread_id", "other")),
            Unconfirmed,
        ),
        (
            "202 of another key",
            json(202, changed("idempotency_key", "k-2")),
            Unconfirmed,
        ),
        (
            "202 of a key that is a number",
            json(202, changed("idempotency_key", 1)),
            Unconfirmed,
        ),
        (
            "202 that is pending",
            json(202, json!({"request_id": "r", "status": "PENDING"})),
            Unconfirmed,
        ),
        (
            "202 with a new decision",
            json(202, changed("decision", "defer")),
            Unconfirmed,
        ),
        (
            "202 page",
            answer(202).body(page).header("content-type", "text/html"),
            Unconfirmed,
        ),
        (
            "202 page without a type",
            answer(202).body(page),
            Unconfirmed,
        ),
        (
            "202 in gzip",
            json(202, action("approve")).header("content-encoding", "gzip"),
            Unconfirmed,
        ),
        (
            "202 that is an array",
            json(202, json!([action("approve")])),
            Unconfirmed,
        ),
        (
            "202 that is cut",
            answer(202).body("{\"decision\":"),
            Unconfirmed,
        ),
        ("empty 409", answer(409), Duplicate),
        (
            "409 of the seed",
            json(409, json!({"detail": "Duplicate request"})),
            Duplicate,
        ),
        (
            "409 of another server",
            problem(409, json!({"type": "about:blank", "status": 409})),
            Duplicate,
        ),
        (
            "409 by code",
            problem(409, duplicate_of(action("approve"))),
            Duplicate,
        ),
        (
            "409 by type",
            problem(409, json!({"type": "urn:aegis:problem:duplicate"})),
            Duplicate,
        ),
        (
            "409 with the action itself",
            json(409, action("approve")),
            Duplicate,
        ),
        (
            "409 with a new status",
            problem(409, duplicate_of(changed("status", "SEALED"))),
            Duplicate,
        ),
        (
            "409 with the opposite itself",
            json(409, action("reject")),
            Conflict,
        ),
        (
            "409 with the opposite",
            problem(409, duplicate_of(action("reject"))),
            Conflict,
        ),
        (
            "409 conflict",
            problem(409, conflict(&action("reject"))),
            Conflict,
        ),
        (
            "409 conflict, zone-less",
            problem(409, conflict(&zoneless)),
            Conflict,
        ),
        (
            "409 conflict in new words",
            problem(409, conflict(&unknown_words)),
            Conflict,
        ),
        (
            "409 conflict by type",
            problem(409, json!({"type": "urn:aegis:problem:decision-conflict"})),
            BareConflict,
        ),
        (
            "409 other payload in new words",
            problem(
                409,
                json!({"code": "payload-mismatch", "action": unknown_words}),
            ),
            Conflict,
        ),
        (
            "422 conflict in new words",
            problem(422, conflict(&unknown_words)),
            Conflict,
        ),
        (
            "422 conflict, zone-less",
            problem(422, conflict(&zoneless)),
            Conflict,
        ),
        (
            "409 that is pending",
            problem(
                409,
                duplicate_of(json!({"request_id": "r", "status": "PENDING", "decision": null})),
            ),
            Unconfirmed,
        ),
        (
            "409 pending itself",
            json(409, json!({"request_id": "r", "status": "PENDING"})),
            Unconfirmed,
        ),
        (
            "409 with a new decision",
            problem(409, duplicate_of(changed("decision", "defer"))),
            Unconfirmed,
        ),
        (
            "409 of another tenant",
            problem(409, duplicate_of(changed("tenant_id", "other"))),
            Unconfirmed,
        ),
        (
            "409 of another thread",
            problem(409, duplicate_of(changed("thread_id", "other"))),
            Unconfirmed,
        ),
        (
            "409 of another key",
            problem(409, duplicate_of(changed("idempotency_key", "k-2"))),
            Unconfirmed,
        ),
        (
            "409 of another code",
            problem(
                409,
                json!({"code": "already-claimed", "action": action("approve")}),
            ),
            Unconfirmed,
        ),
        (
            "409 of another type",
            problem(409, json!({"type": "urn:aegis:problem:in-flight"})),
            Unconfirmed,
        ),
        (
            "409 with a code that is a number",
            json(409, json!({"code": 17})),
            Unconfirmed,
        ),
        (
            "409 whose action is text",
            problem(409, duplicate_of(json!("approve"))),
            Unconfirmed,
        ),
        (
            "409 with two decisions",
            answer(409).body(r#"{"decision":"approve","decision":"reject"}"#),
            Unconfirmed,
        ),
        (
            "409 page",
            answer(409).body(page).header("content-type", "text/html"),
            Unconfirmed,
        ),
        (
            "409 page without a type",
            answer(409).body(page),
            Unconfirmed,
        ),
        ("409 JSON as text", typed("text/plain"), Unconfirmed),
        ("blank 409", answer(409).body(" "), Unconfirmed),
        (
            "blank 409 problem",
            answer(409)
                .body("\r\n")
                .header("content-type", "application/problem+json"),
            Unconfirmed,
        ),
        (
            "409 in gzip",
            problem(409, duplicate_of(action("approve"))).header("content-encoding", "gzip"),
            Unconfirmed,
        ),
        (
            "409 that is cut",
            answer(409)
                .body(whole[..whole.len() / 2].to_owned())
                .header("content-type", "application/problem+json"),
            Unconfirmed,
        ),
    ];
    let mut wrong = Vec::new();
    for (name, act, expected) in cases {
        let peer = Peer::start([act]).await;
        let concluded = concluded(service(&peer).approve("k-1").await);
        if (&concluded, peer.count()) != (&expected, 1) {
            wrong.push(format!("{name}: {concluded:?}, not {expected:?}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[tokio::test]
async fn the_tenant_of_an_api_key_is_the_servers_to_name() {
    let peer = Peer::start([answer_with(202, &action("approve"))]).await;
    let service = AegisService::builder()
        .base_url(peer.url())
        .api_key("sk_live_1")
        .thread_id("run-7")
        .build()
        .unwrap();
    assert!(service.approve("k-1").await.is_ok());
}

#[tokio::test]
async fn another_payload_is_a_conflict() {
    for status in [409, 422] {
        let (error, count) = failure(problem(status, "payload-mismatch", "approve")).await;
        assert!(error.is_conflict());
        assert_eq!(
            error.to_string(),
            "the key is on record with another payload"
        );
        assert_eq!(count, 1);
    }
}

#[tokio::test]
async fn a_closed_action_is_told_apart() {
    let (error, _) = failure(problem(422, "action-closed", "reject")).await;
    assert!(error.is_closed() && !error.is_conflict() && !error.is_outcome_unknown());
}

#[tokio::test]
async fn a_409_with_retry_after_is_asked_again() {
    let peer = Peer::start([answer_after(409, "0"), answer_with(202, &action("approve"))]).await;
    let receipt = service(&peer).approve("k-1").await.unwrap();
    assert_eq!(
        (receipt.outcome(), receipt.attempts()),
        (Outcome::Accepted, 2)
    );

    let (error, count) = failure(answer_after(409, "0")).await;
    assert!(error.is_unavailable() && error.is_outcome_unknown());
    assert_eq!(count, 4);
}

#[tokio::test]
async fn each_refusal_has_its_predicate() {
    for (status, count) in [
        (400, 1),
        (401, 1),
        (403, 1),
        (404, 1),
        (413, 1),
        (415, 1),
        (422, 1),
        (429, 1),
    ] {
        let (error, seen) = failure(answer(status)).await;
        assert!(error.is_refused(), "{status}: {error:?}");
        assert_eq!(error.is_unauthorized(), matches!(status, 401 | 403));
        assert_eq!(error.is_rate_limited(), status == 429);
        assert_eq!(error.is_not_found(), status == 404);
        assert_eq!(error.status_code().unwrap(), status);
        assert!(!error.is_conflict() && !error.is_outcome_unknown());
        assert_eq!(seen, count);
    }
    for status in [408, 500, 502, 503, 504] {
        let (error, seen) = failure(answer(status)).await;
        assert!(
            error.is_unavailable() && error.is_outcome_unknown(),
            "{status}"
        );
        assert_eq!((error.attempts(), seen), (4, 4));
    }
}

#[tokio::test]
async fn a_refusal_after_a_lost_reply_leaves_the_outcome_unknown() {
    let peer = Peer::start([Act::lose_reply(), answer(429)]).await;
    let error = service(&peer).approve("k-1").await.unwrap_err();
    assert!(error.is_rate_limited() && error.is_outcome_unknown());
}

#[tokio::test]
async fn a_success_of_another_kind_is_not_taken_for_a_decision() {
    for status in [200, 201, 204, 206] {
        let (error, count) = failure(answer(status)).await;
        assert!(error.is_protocol() && error.is_outcome_unknown());
        assert_eq!(count, 1);
    }
}

// Redirects re-send keys and tenants to another origin.
#[tokio::test]
async fn a_redirect_is_not_followed() {
    let other = Peer::start([answer(202)]).await;
    for status in [301, 302, 303, 307, 308] {
        let to_other = answer(status).header("location", &other.url());
        let (error, count) = failure(to_other).await;
        assert!(error.is_protocol());
        assert_eq!(count, 1);
    }
    assert_eq!(other.count(), 0);
}

#[tokio::test]
async fn what_the_call_lacks_is_told_before_anything_is_sent() {
    let peer = Peer::start([answer(202)]).await;
    let bare = AegisService::builder()
        .base_url(peer.url())
        .build()
        .unwrap();
    let cases = [
        (bare.approve("k").tenant_id("t").await, "no thread id"),
        (bare.approve("k").thread_id("h").await, "no tenant id"),
        (
            bare.approve("").tenant_id("t").thread_id("h").await,
            "invalid value",
        ),
        (
            bare.approve("k").tenant_id("t t").thread_id("h").await,
            "invalid value",
        ),
        (
            bare.approve("k")
                .tenant_id("t")
                .thread_id("h")
                .payload(&[1])
                .await,
            "not a JSON object",
        ),
    ];
    for (result, message) in cases {
        let error = result.unwrap_err();
        assert!(error.is_request(), "{error:?}");
        assert!(error.to_string().contains(message), "{error}");
        assert_eq!(
            (error.attempts(), error.delivery()),
            (0, Delivery::NeverSent)
        );
    }
    assert_eq!((peer.count(), peer.connections()), (0, 0));
}

#[tokio::test]
async fn a_wrong_setting_is_named_when_the_service_is_built() {
    let url = |url: &str| AegisService::builder().base_url(url).build();
    let cases = [
        (url("localhost:8000"), "the base URL"),
        (url("ftp://host"), "has no scheme http or https"),
        (url("/api"), "has no scheme http or https"),
        (url("http://user:secret@host"), "has a user or a password"),
        (url("http://host/?q=1"), "has a query or a fragment"),
        (url("http://ho st"), "the base URL is malformed"),
        (
            AegisService::builder().api_prefix("api").build(),
            "the API prefix",
        ),
        (
            AegisService::builder().api_prefix("/a?b").build(),
            "the API prefix",
        ),
        (
            AegisService::builder().timeout(Duration::ZERO).build(),
            "the timeout is zero",
        ),
        (
            AegisService::builder().deadline(Duration::ZERO).build(),
            "the deadline is zero",
        ),
        (
            AegisService::builder().tenant_id("").build(),
            "a setting has an invalid value",
        ),
        (
            AegisService::builder().tenant_id("t").api_key("k").build(),
            "both a tenant id and an API key",
        ),
    ];
    for (result, message) in cases {
        let error = result.unwrap_err();
        assert!(error.is_config(), "{error:?}");
        assert!(error.to_string().contains(message), "{error}");
        assert!(!format!("{error:?} {error}").contains("secret"));
    }
}

#[tokio::test]
async fn each_part_of_the_base_url_is_checked() {
    for (url, part) in [
        ("http://secret:99999", "port"),
        ("http://secret:0", "port"),
        ("http://secret:", "port"),
        ("http://secret:/path", "port"),
        ("http://secret:+80", "port"),
        ("http://secret:80a", "port"),
        ("http://secret:80:80", "port"),
        ("http://[::1]:99999", "port"),
        ("http://[::1]80", "port"),
        ("http://[::1", "IPv6"),
        ("http://[secret]", "IPv6"),
        ("http://", "no host"),
        ("http:///secret", "no host"),
        ("http://:80", "no host"),
        ("http://@secret", "user"),
        ("http://a:secret@host:99999", "user"),
        ("http://secret?", "query"),
        ("http://secret#", "fragment"),
        ("http://secret/a?b", "query"),
        ("http://secret//", "path"),
        ("http://secret//b", "path"),
        ("http://secret/./b", "path"),
        ("http://secret/a/..", "path"),
        ("http://secret/%2E%2e/b", "path"),
        ("http://sec ret", "malformed"),
        ("http://sec\\ret", "malformed"),
        ("secret", "scheme"),
    ] {
        let builder = AegisService::builder().base_url(url);
        let error = builder.build().unwrap_err();
        assert!(error.is_config(), "{url}");
        let said = format!("{error} {error:?}");
        assert!(error.to_string().contains(part), "{url}: {error}");
        assert!(said.contains("allowed"), "{url}: {error}");
        assert!(!said.contains("secret"), "{url}: {said}");
    }
    for url in [
        "http://localhost",
        "http://localhost/",
        "HTTP://localhost:65535/a/b/",
        "http://[::1]:1/a",
        "http://[::1]",
        "http://a_b.example:8000/v1.0/..a",
    ] {
        let built = AegisService::builder().base_url(url).build();
        assert!(built.is_ok(), "{url}: {built:?}");
    }
    let builder = AegisService::builder().base_url("http://user:secret@host");
    assert!(!format!("{builder:?}").contains("secret"));
}

#[tokio::test]
async fn base_url_and_prefix_may_have_a_path_and_a_slash() {
    let peer = Peer::start([answer(202)]).await;
    for (base, prefix, path) in [
        ("", "/api/v1", "/api/v1/hitl/approve"),
        ("/", "/api/v1/", "/api/v1/hitl/approve"),
        ("/base/", "", "/base/hitl/approve"),
        ("/base", "/v2", "/base/v2/hitl/approve"),
    ] {
        let service = builder(&format!("{}{base}", peer.url()))
            .api_prefix(prefix)
            .build()
            .unwrap();
        service.approve("k").await.unwrap();
        assert_eq!(peer.requests().last().unwrap().path(), path);
    }
}

#[tokio::test]
async fn a_server_that_cannot_be_reached_was_never_sent_anything() {
    let port = ClosedPort::new();
    let service = builder(&port.url()).build().unwrap();
    let error = service.approve("k-1").await.unwrap_err();
    assert!(error.is_connect() && error.is_transport());
    assert!(!error.is_outcome_unknown());
    assert_eq!(
        (error.attempts(), error.delivery()),
        (4, Delivery::NeverSent)
    );
    let exchange = error.source().unwrap();
    assert_eq!(exchange.to_string(), "no connection");
    assert!(
        exchange
            .source()
            .unwrap()
            .is::<hyper_util::client::legacy::Error>()
    );
}

#[tokio::test]
async fn the_body_of_the_http_client_knows_its_length_and_its_end() {
    let peer = Peer::start([answer(202).body("{}")]).await;
    let mut client = service(&peer).into_inner();
    let request = Request::get(peer.url()).body(Full::<Bytes>::default());
    let mut response = client.call(request.unwrap()).await.unwrap();
    let body = response.body_mut();
    assert_eq!(
        (body.size_hint().exact(), body.is_end_stream()),
        (Some(2), false)
    );
    body.frame().await.unwrap().unwrap();
    assert!(body.is_end_stream());
}

#[tokio::test]
async fn a_server_that_comes_up_late_is_reached_by_a_retry() {
    let port = ClosedPort::new();
    let service = builder(&port.url())
        .backoff(Backoff::constant(Duration::from_millis(20)))
        .max_retries(1000)
        .build()
        .unwrap();
    let call = tokio::spawn(service.approve("k-1").into_future());
    tokio::time::sleep(SHORT).await;
    let peer = port.open([answer(202)]);
    let receipt = call.await.unwrap().unwrap();
    assert!(receipt.attempts() > 1);
    assert_eq!(peer.count(), 1);
}

#[tokio::test]
async fn lost_replies_to_every_attempt_leave_the_outcome_unknown() {
    let (error, count) = failure(Act::lose_reply()).await;
    assert!(error.is_transport() && !error.is_connect());
    assert!(error.is_outcome_unknown());
    assert_eq!(
        (error.attempts(), error.delivery(), count),
        (4, Delivery::Unknown, 4)
    );
}

#[tokio::test]
async fn a_server_that_hangs_is_a_timeout_with_unknown_outcome() {
    let peer = Peer::start([Act::hang()]).await;
    let service = builder(&peer.url())
        .timeout(SHORT)
        .max_retries(1)
        .build()
        .unwrap();
    let error = service.approve("k-1").await.unwrap_err();
    assert!(error.is_timeout() && error.is_outcome_unknown());
    assert_eq!((error.attempts(), peer.count()), (2, 2));
}

#[tokio::test]
async fn a_call_may_set_its_own_deadline_and_retries() {
    let peer = Peer::start([Act::hang()]).await;
    let error = service(&peer)
        .approve("k-1")
        .deadline(SHORT)
        .await
        .unwrap_err();
    assert!(error.is_timeout());
    assert_eq!(peer.count(), 1);
    let peer = Peer::start([answer(503)]).await;
    let error = service(&peer)
        .approve("k-1")
        .max_retries(0)
        .await
        .unwrap_err();
    assert_eq!((error.attempts(), peer.count()), (1, 1));
}

#[tokio::test]
async fn an_answer_that_breaks_off_is_read_by_its_head() {
    let peer = Peer::start([answer(202).body("{\"request_id\":").body_breaks_off()]).await;
    let receipt = service(&peer).approve("k-1").await.unwrap();
    assert_eq!(
        (receipt.outcome(), receipt.request_id()),
        (Outcome::Accepted, None)
    );
    // A 409 confirms only with its body, which may tell of the opposite.
    let (error, _) = failure(answer(409).body("{\"request_id\":").body_breaks_off()).await;
    assert!(error.is_protocol() && error.is_outcome_unknown());
}

#[tokio::test]
async fn the_head_of_a_202_confirms_nothing_that_the_rest_contradicts() {
    for cut in [
        r#"{"title":"x","decision":"rejec"#,
        r#"{"decision":"#,
        r#"{"status":"PENDING","deci"#,
        r#"{"status":"PEND"#,
        r#"{"idempotency_key":"k-"#,
        r#"{"action":{"decision":"reject"}"#,
        r#"{"action":{"decision":"reject""#,
        r#"{"decision":"approve","digest":"00"#,
        r#"{"action":{"decision":"reject","digest":"#,
        r#"{"idempotency_key":"k-2:"#,
    ] {
        let says_nothing = cut == r#"{"decision":"#;
        for act in [
            answer(202).body(cut.to_owned()).body_breaks_off(),
            answer(202).body(cut.to_owned()).body_never_ends(),
        ] {
            let peer = Peer::start([act]).await;
            let call = service(&peer).approve("k-1").deadline(HANG / 4);
            let result = ends(call.into_future()).await;
            match result {
                Ok(receipt) => assert!(says_nothing, "{cut}: {receipt:?}"),
                Err(error) if error.is_conflict() => assert!(cut.contains("reject"), "{cut}"),
                Err(error) => {
                    assert!(!says_nothing, "{cut}: {error:?}");
                    assert!(error.is_protocol() && error.is_outcome_unknown(), "{cut}");
                }
            }
        }
    }
    // What is asked again and then answered whole decides.
    let cut = answer(202).body(r#"{"deci"#).body_breaks_off();
    let peer = Peer::start([cut, answer_with(202, &action("reject"))]).await;
    let error = service(&peer).approve("k-1").await.unwrap_err();
    assert!(error.is_conflict(), "{error:?}");
    assert_eq!(peer.count(), 2);
}

#[tokio::test]
async fn a_decision_is_not_confirmed_by_an_answer_about_another_payload() {
    use aegis_hitl::Payload;
    use aegis_hitl::protocol::Digest;

    let payload = json!({"to": "a@b.c"});
    let own = Digest::of(&Payload::new(&payload).unwrap()).unwrap();
    for status in [202, 409] {
        for (digest, is_confirmed) in [
            (json!(own), true),
            (Value::Null, true),
            (json!("0".repeat(64)), false),
            (json!("0".repeat(63)), false),
            (json!(5), false),
        ] {
            let peer = Peer::start([answer_with(status, &changed("digest", digest.clone()))]).await;
            for comment in [None, Some("ok")] {
                let mut call = service(&peer).approve("k-1").payload(&payload);
                if let Some(comment) = comment {
                    call = call.comment(comment);
                }
                match call.await {
                    Ok(receipt) => assert!(is_confirmed, "{digest}: {receipt:?}"),
                    Err(error) => {
                        assert!(!is_confirmed && error.is_protocol(), "{digest}: {error:?}");
                        assert!(error.is_outcome_unknown());
                    }
                }
            }
            // Without a payload there is nothing to compare.
            service(&peer).approve("k-1").comment("ok").await.unwrap();
            service(&peer)
                .approve("k-1")
                .payload(&json!({}))
                .await
                .unwrap();
        }
    }
}

#[tokio::test]
async fn a_code_counts_with_its_status_and_about_this_action_alone() {
    for code in ["decision-conflict", "payload-mismatch", "action-closed"] {
        for status in [502, 503, 407, 200] {
            let (error, _) = failure(problem(status, code, "reject")).await;
            assert!(!error.is_conflict() && !error.is_closed(), "{error:?}");
            assert!(!error.is_payload_mismatch(), "{error:?}");
            assert_eq!(error.is_outcome_unknown(), status != 407, "{error:?}");
        }
        for status in [409, 422] {
            let page = problem(status, code, "reject").header("content-type", "text/html");
            let (error, _) = failure(page).await;
            assert!(!error.is_conflict() && !error.is_closed(), "{error:?}");
            let other = json!({"code": code, "action": changed("idempotency_key", "k-2")});
            let (error, _) = failure(answer_with(status, &other)).await;
            assert!(
                error.is_protocol() && error.is_outcome_unknown(),
                "{code} {status}: {error:?}"
            );
        }
    }
}

#[tokio::test]
async fn an_answer_that_breaks_off_is_asked_for_again() {
    for status in [202, 409] {
        let whole = answer_with(status, &action("approve"));
        let peer = Peer::start([whole.clone().body_breaks_off(), whole]).await;
        let receipt = service(&peer).approve("k-1").await.unwrap();
        assert_eq!((receipt.attempts(), peer.count()), (2, 2));
        assert!(receipt.action().is_some());
    }
    let whole = answer_with(200, &action("approve"));
    let peer = Peer::start([whole.clone().body_breaks_off(), whole]).await;
    let found = service(&peer).status("r-1").await.unwrap();
    assert_eq!(found.decision, Some(Decision::Approve));
    assert_eq!(peer.count(), 2);
}

#[tokio::test]
async fn a_refusal_that_breaks_off_leaves_the_outcome_of_earlier_attempts_alone_unknown() {
    for retries in [0, 1] {
        let peer = Peer::start([answer(404).body("{").body_breaks_off()]).await;
        let call = service(&peer).approve("k-1").max_retries(retries);
        let error = call.await.unwrap_err();
        assert!(error.is_not_found() && error.is_refused(), "{error:?}");
        assert_eq!(error.attempts(), retries + 1);
        assert_eq!(error.is_outcome_unknown(), retries > 0, "{error:?}");
    }
}

#[tokio::test]
async fn a_duplicate_of_an_action_without_a_decision_is_told_as_such() {
    let (error, _) = failure(answer_with(409, &changed("decision", Value::Null))).await;
    assert!(error.is_protocol());
    assert!(error.to_string().contains("has no decision"), "{error}");
}

#[tokio::test]
async fn a_failed_answer_that_breaks_off_still_says_when_to_come_again() {
    let late = answer_after(503, "31").body("{").body_breaks_off();
    let (error, count) = failure(late).await;
    assert!(error.is_unavailable(), "{error:?}");
    assert_eq!(error.retry_after(), Some(Duration::from_secs(31)));
    assert_eq!(error.not_retried(), Some(NotRetried::RetryAfter));
    assert_eq!(count, 1);
}

#[tokio::test]
async fn the_deadline_bounds_the_reading_too() {
    let deadline = Duration::from_millis(300);
    let patient = |peer: &Peer| builder(&peer.url()).timeout(2 * HANG).build().unwrap();
    for status in [400, 409, 503] {
        let endless = answer(status).body("{").body_never_ends();
        let peer = Peer::start([endless]).await;
        let call = patient(&peer).approve("k-1").deadline(deadline);
        let error = ends(call.into_future()).await.unwrap_err();
        assert!(error.is_timeout() || status == 503, "{status}: {error:?}");
    }
    let peer = Peer::start([answer(200).body("{").body_never_ends()]).await;
    let status = patient(&peer).status("r-1").deadline(deadline);
    let error = ends(status.into_future()).await.unwrap_err();
    assert!(error.is_timeout());
}

#[tokio::test]
async fn a_202_whose_body_drips_is_read_by_its_head_before_the_time_is_up() {
    let peer = Peer::start([answer(202).body("{").body_never_ends()]).await;
    // Past the deadline it would be a timeout.
    let limited = service(&peer).approve("k-1").deadline(5 * SHORT);
    assert!(limited.await.unwrap().action().is_none());
    let receipt = ends(service(&peer).approve("k-1").into_future()).await;
    assert_eq!(receipt.unwrap().outcome(), Outcome::Accepted);
    assert_eq!(peer.count(), 2);
}

#[tokio::test]
async fn a_failed_answer_without_an_end_does_not_hold_up_the_retry() {
    let endless = answer(503).body("x").body_never_ends();
    let peer = Peer::start([endless, answer(202)]).await;
    let receipt = ends(service(&peer).approve("k-1").into_future()).await;
    assert_eq!(receipt.unwrap().attempts(), 2);
}

#[tokio::test]
async fn empty_frames_without_an_end_are_read_to_a_bound() {
    let service = tower::service_fn(|_| async {
        let empty = || Ok::<_, Infallible>(Frame::data(Bytes::new()));
        let frames = futures_util::stream::repeat_with(empty);
        let answer = http::Response::new(http_body_util::StreamBody::new(frames));
        Ok::<_, Infallible>(answer)
    });
    let service = AegisService::builder().build_with(service).unwrap();
    assert!(service.status("r-1").await.unwrap_err().is_protocol());
}

#[tokio::test]
async fn each_call_may_set_its_own_limits() {
    let peer = Peer::start([Act::hang()]).await;
    let request = service(&peer).approve("k-1").timeout(SHORT).max_retries(1);
    assert!(request.await.unwrap_err().is_timeout());
    let question = service(&peer).status("r-1").timeout(SHORT).max_retries(0);
    assert!(question.await.unwrap_err().is_timeout());
    assert_eq!(peer.count(), 3);
}

#[tokio::test]
async fn the_status_is_asked_for_by_id() {
    let peer = Peer::start([answer_with(200, &action("approve"))]).await;
    let found = service(&peer)
        .status("a/b?c")
        .wait(Duration::from_millis(1500))
        .await
        .unwrap();
    assert_eq!(found.decision, Some(Decision::Approve));
    let seen = &peer.requests()[0];
    assert_eq!(seen.method, "GET");
    assert_eq!(seen.path(), "/api/v1/hitl/status/a%2Fb%3Fc");
    assert_eq!(seen.header("prefer"), Some("wait=2"));
    assert_eq!(seen.header("tenant-id"), Some("acme"));

    let bare = AegisService::builder()
        .base_url(peer.url())
        .build()
        .unwrap();
    bare.status("r-1").await.unwrap();
    assert_eq!(peer.requests()[1].header("tenant-id"), None);

    let missing = Peer::start([answer(404)]).await;
    assert!(
        service(&missing)
            .status("r-1")
            .await
            .unwrap_err()
            .is_not_found()
    );
    let strange = Peer::start([answer_with(200, &json!({"hello": 1}))]).await;
    assert!(
        service(&strange)
            .status("r-1")
            .await
            .unwrap_err()
            .is_protocol()
    );
}

#[tokio::test]
async fn a_status_wait_outlasts_the_attempt_timeout() {
    let peer = Peer::start([Act::hang()]).await;
    let service = builder(&peer.url())
        .timeout(SHORT)
        .max_retries(0)
        .build()
        .unwrap();
    let start = std::time::Instant::now();
    let error = service
        .status("r-1")
        .wait(Duration::from_secs(1))
        .await
        .unwrap_err();
    assert!(error.is_timeout());
    assert!(start.elapsed() >= Duration::from_secs(1));
}

// hyper-util re-sends what it never started. That is left on, on purpose, and must not multiply attempts.
#[tokio::test]
async fn a_connection_that_was_closed_while_idle_costs_no_attempt() {
    let close = answer(202).header("connection", "close");
    let peer = Peer::start([close]).await;
    let service = service(&peer);
    for _ in 0..20 {
        assert_eq!(service.approve("k-1").await.unwrap().attempts(), 1);
    }
    assert_eq!(peer.count(), 20);
}

#[tokio::test]
async fn five_failures_with_a_body_use_one_connection() {
    let failing = answer(503).body("x".repeat(10_000));
    let peer = Peer::start([
        failing.clone(),
        failing.clone(),
        failing.clone(),
        failing.clone(),
        failing,
        answer(202),
    ])
    .await;
    let service = builder(&peer.url()).max_retries(5).build().unwrap();
    assert_eq!(service.approve("k-1").await.unwrap().attempts(), 6);
    assert_eq!(peer.connections(), 1);
}

#[tokio::test]
async fn it_is_a_tower_service_of_decision_requests() {
    let peer = Peer::start([answer(202)]).await;
    let service = tower::ServiceBuilder::new()
        .concurrency_limit(1)
        .service(service(&peer));
    let request = DecisionRequest::new(Decision::Approve, IdempotencyKey::new("k-1").unwrap())
        .tenant_id(TenantId::new("other").unwrap());
    let receipt = service.oneshot(request).await.unwrap();
    assert_eq!(receipt.outcome(), Outcome::Accepted);
    assert_eq!(peer.requests()[0].header("tenant-id"), Some("other"));
}

/// A client that is ready only if it was asked often enough.
#[derive(Clone)]
struct Hesitant {
    asked: Arc<AtomicUsize>,
    ready_at: usize,
}

impl Service<Request<Full<Bytes>>> for Hesitant {
    type Response = http::Response<Full<Bytes>>;
    type Error = Infallible;
    type Future = Ready<Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        if self.asked.fetch_add(1, Ordering::SeqCst) + 1 < self.ready_at {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Request<Full<Bytes>>) -> Self::Future {
        assert!(self.asked.load(Ordering::SeqCst) >= self.ready_at);
        let response = http::Response::builder().status(202);
        ready(Ok(response.body(Full::default()).unwrap()))
    }
}

#[tokio::test]
async fn it_is_ready_when_the_http_service_is() {
    let client = Hesitant {
        asked: Arc::default(),
        ready_at: 3,
    };
    let mut service = builder("http://server.test").build_with(client).unwrap();
    let polled = poll_fn(|cx| Poll::Ready(service.poll_ready(cx).is_ready())).await;
    assert!(!polled);
    service.approve("k-1").await.unwrap();
    let polled = poll_fn(|cx| Poll::Ready(service.poll_ready(cx).is_ready())).await;
    assert!(polled);
}

#[test]
fn a_layer_can_read_the_request_and_reach_the_service() {
    let bare = DecisionRequest::new(Decision::Reject, IdempotencyKey::new("k-1").unwrap());
    assert_eq!(
        (bare.decision(), bare.key().as_str()),
        (Decision::Reject, "k-1")
    );
    assert!(bare.tenant_id_ref().is_none() && bare.thread_id_ref().is_none());
    assert!(bare.call_id_ref().is_none() && bare.payload_ref().is_none());
    let full = bare
        .tenant_id(TenantId::new("acme").unwrap())
        .thread_id("run-7".parse().unwrap())
        .call_id("call-1".parse().unwrap())
        .payload(aegis_hitl::Payload::from_json("{}").unwrap())
        .comment("no");
    assert_eq!(full.tenant_id_ref().unwrap().as_str(), "acme");
    assert_eq!(full.thread_id_ref().unwrap().as_str(), "run-7");
    assert_eq!(full.call_id_ref().unwrap().as_str(), "call-1");
    assert_eq!(full.payload_ref().unwrap().as_str(), "{}");
    assert_eq!(full.comment_ref(), Some("no"));
    let service = AegisService::builder().build_with("any service").unwrap();
    assert_eq!(*service.get_ref(), "any service");
}

#[test]
fn it_is_cheap_to_share() {
    fn shared<T: Clone + Send + Sync + 'static>() {}
    shared::<AegisService>();
    let key = ApiKey::new("sk_live_1").unwrap();
    let service = AegisService::builder()
        .api_key(&key)
        .thread_id("h")
        .build()
        .unwrap();
    assert!(!format!("{service:?}").contains("sk_live"));
}

// A refused connect and then a 403: the decision cannot be on record.
#[tokio::test]
async fn a_refusal_after_attempts_that_were_never_sent_leaves_nothing_unknown() {
    let port = ClosedPort::new();
    let service = builder(&port.url())
        .backoff(Backoff::constant(Duration::from_millis(20)))
        .max_retries(1000)
        .budget(None)
        .build()
        .unwrap();
    let call = tokio::spawn(service.approve("k-1").into_future());
    tokio::time::sleep(SHORT).await;
    let _peer = port.open([answer(403)]);
    let error = call.await.unwrap().unwrap_err();
    assert!(error.attempts() > 1 && error.is_refused());
    assert!(!error.is_outcome_unknown());
}

#[tokio::test]
async fn an_error_tells_what_is_needed_to_make_the_call_again() {
    let peer = Peer::start([answer_after(429, "31")]).await;
    let call = service(&peer).approve("k-1").call_id("call-1");
    let error = call.await.unwrap_err();
    assert_eq!(error.idempotency_key().unwrap().as_str(), "k-1");
    assert_eq!(error.call_id().unwrap().as_str(), "call-1");
    assert_eq!(error.retry_after(), Some(Duration::from_secs(31)));
    assert_eq!(error.not_retried(), Some(NotRetried::RetryAfter));
    assert!(!format!("{error:?}").contains("k-1"));

    let peer = Peer::start([Act::lose_reply()]).await;
    let error = service(&peer).approve("k-1").await.unwrap_err();
    assert_eq!(error.idempotency_key().unwrap().as_str(), "k-1");
    let sent = peer.requests()[0]
        .header("x-request-id")
        .unwrap()
        .to_owned();
    assert_eq!(error.call_id().unwrap().as_str(), sent);
    assert_eq!(error.not_retried(), Some(NotRetried::Attempts));
}

#[tokio::test]
async fn an_outage_is_observed_and_bound_by_the_services_budget() {
    let attempts = Arc::new(AtomicUsize::new(0));
    let counter = attempts.clone();
    let peer = Peer::start([answer(503)]).await;
    let service = builder(&peer.url())
        .observe(move |_| {
            counter.fetch_add(1, Ordering::SeqCst);
        })
        .build()
        .unwrap();
    for n in 0..100 {
        service.clone().approve(format!("k-{n}")).await.unwrap_err();
    }
    // 100 at once, one for ten calls, and one or two a second.
    assert!((200..=220).contains(&peer.count()), "{}", peer.count());
    assert_eq!(attempts.load(Ordering::SeqCst), peer.count());
}

// What a server accepts, a client reaches.
#[tokio::test]
async fn a_prefix_is_any_path_that_a_server_takes() {
    let peer = Peer::start([answer(202)]).await;
    let prefix = "/a-._~!$&'()*+,;=:@b";
    let service = builder(&peer.url()).api_prefix(prefix).build().unwrap();
    service.approve("k-1").await.unwrap();
    assert_eq!(peer.requests()[0].path(), format!("{prefix}/hitl/approve"));
    for prefix in ["/a//b", "/a/../b", "/%61"] {
        let built = builder(&peer.url()).api_prefix(prefix).build();
        assert!(built.unwrap_err().is_config(), "{prefix}");
    }
}

#[tokio::test]
async fn a_status_in_words_and_times_of_another_server_is_read() {
    let mut told = action("approve");
    told["status"] = json!("QUEUED");
    told["execution"] = json!("paused");
    told["created_at"] = json!("2026-01-02T03:04:05");
    told["decided_at"] = json!(1_700_000_000);
    let peer = Peer::start([answer_with(200, &told)]).await;
    let found = service(&peer).status("r-1").await.unwrap();
    assert_eq!(found.status, Status::Other);
    assert_eq!(found.decision, Some(Decision::Approve));
    assert!(found.created_at.is_some() && found.decided_at.is_none());
}

#[tokio::test]
async fn a_gateways_own_problem_confirms_nothing() {
    let gateway =
        json!({"type": "https://gateway.example/errors/1001", "title": "Conflict", "status": 409});
    let (error, _) = failure(answer_with(409, &gateway)).await;
    assert!(error.is_protocol() && error.is_outcome_unknown());
}
