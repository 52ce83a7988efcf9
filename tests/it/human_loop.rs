//! The human loop over HTTP: every row of its table, by what goes over the wire.

use std::collections::HashSet;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use aegis_hitl::server::{Auth, Keys};
use aegis_hitl::{ApiKey, Payload, protocol::Digest};
use http_body_util::BodyExt;
use serde_json::{Value, json};
use tokio::time::timeout;

use super::support::{Call, Disk, HANG, Reply, Running, start, start_with};

const PAYLOAD: &str = r#"{"to":"a@b.c","amount":12.5}"#;

fn digest(json: &str) -> String {
    let payload = Payload::from_json(json).unwrap();
    Digest::of(&payload).unwrap().to_string()
}

/// A `POST` about the action with an id.
fn about(server: &Running, id: &str, verb: &str, body: &Value) -> Call {
    let path = format!("/api/v1/hitl/actions/{id}/{verb}");
    let call = Call::new(server.addr, "POST", path).header("Tenant-Id", "t");
    call.json(body.to_string())
}

async fn submitted(server: &Running, key: &str, body: &str) -> String {
    let reply = server.submit(key).json(body.to_owned()).send().await;
    assert_eq!(reply.status, 201, "{reply:?}");
    reply.request_id()
}

/// An approved action with [`PAYLOAD`].
async fn approved(server: &Running, key: &str) -> String {
    let id = submitted(server, key, PAYLOAD).await;
    let seen = json!({ "digest": digest(PAYLOAD) });
    let reply = about(server, &id, "approve", &seen).send().await;
    assert_eq!(reply.status, 202, "{reply:?}");
    id
}

fn claim() -> Value {
    json!({ "digest": digest(PAYLOAD) })
}

async fn look(server: &Running, id: &str) -> Value {
    let call = server.get(&format!("/api/v1/hitl/actions/{id}"));
    let reply = call.header("Tenant-Id", "t").send().await;
    assert_eq!(reply.status, 200, "{reply:?}");
    reply.json()
}

fn code(reply: &Reply) -> String {
    assert_eq!(
        reply.header("content-type"),
        Some("application/problem+json"),
        "{reply:?}"
    );
    reply.text("code")
}

/// A time some way from now, in RFC 3339.
fn in_time(offset: Duration) -> String {
    let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap() + offset;
    let time = jiff::Timestamp::from_microsecond(unix.as_micros() as i64).unwrap();
    time.to_string()
}

#[tokio::test]
async fn an_action_goes_the_whole_way() {
    let server = start(Disk::default()).await;
    let body = r#"{"to":"a@b.c","amount":12.5,"aegis":{"title":"Pay a","allow_edit":true}}"#;
    let id = submitted(&server, "k", body).await;
    let shown = look(&server, &id).await;
    assert_eq!(shown["title"], "Pay a");
    assert_eq!(shown["payload"]["to"], "a@b.c");
    assert_eq!(shown["allow_edit"], true);
    assert_eq!(shown["digest"], digest(PAYLOAD));

    let edit = r#"{"to":"a@b.c","amount":10}"#;
    let seen = json!({
        "digest": shown["digest"],
        "comment": "less",
        "payload": serde_json::from_str::<Value>(edit).unwrap(),
    });
    let reply = about(&server, &id, "approve", &seen).send().await;
    assert_eq!(reply.status, 202, "{reply:?}");
    assert_eq!(reply.text("digest"), digest(edit));
    assert_eq!(reply.text("decided_by"), "anonymous");

    // What is claimed is what was approved, and nothing else.
    let reply = about(&server, &id, "claim", &claim()).send().await;
    assert_eq!((reply.status, &*code(&reply)), (422, "payload-mismatch"));
    let reply = about(&server, &id, "claim", &json!({ "digest": digest(edit) }));
    let reply = reply.send().await;
    assert_eq!(reply.status, 200, "{reply:?}");
    let claimed = reply.json();
    assert_eq!(claimed["action"]["edited_payload"]["amount"], 10);
    assert_eq!(claimed["action"]["execution"], "claimed");
    assert_eq!(claimed["claim"]["fence"], 1);
    let token = claimed["claim"]["token"].clone();

    let renew = json!({ "token": token, "lease": 600 });
    let reply = about(&server, &id, "renew", &renew).send().await;
    assert_eq!(reply.status, 200, "{reply:?}");
    assert_eq!(reply.json()["claim"]["token"], token);

    let done = json!({ "token": token, "result": [1, null] });
    let reply = about(&server, &id, "complete", &done).send().await;
    assert_eq!(reply.status, 200, "{reply:?}");
    let again = about(&server, &id, "complete", &done).send().await;
    assert_eq!(again.status, 200, "{again:?}");
    assert_eq!(again.header("idempotency-replayed"), Some("true"));

    let shown = look(&server, &id).await;
    assert_eq!(shown["payload"]["amount"], 12.5);
    assert_eq!(shown["edited_payload"]["amount"], 10);
    assert_eq!(shown["result"], json!([1, null]));
    assert_eq!(shown["comment"], "less");
    let history = shown["history"].as_array().unwrap();
    let kinds: Vec<_> = history.iter().map(|event| &event["type"]).collect();
    assert_eq!(
        kinds,
        [
            "action.submitted",
            "action.approved",
            "action.claimed",
            "action.completed"
        ]
    );
    let mut ids: Vec<_> = history
        .iter()
        .map(|event| event["id"].to_string())
        .collect();
    ids.dedup();
    assert_eq!(ids.len(), 4);
    assert!(history.iter().all(|event| event.get("action").is_none()));
}

#[tokio::test]
async fn a_submission_is_answered_with_what_the_first_one_said() {
    let server = start(Disk::default()).await;
    let end = in_time(Duration::from_secs(3600));
    let body =
        |title: &str| format!(r#"{{"n":1,"aegis":{{"title":"{title}","expires_at":"{end}"}}}}"#);
    let id = submitted(&server, "k", &body("one")).await;
    let again = server.submit("k").json(body("two")).send().await;
    assert_eq!((again.status, again.request_id()), (200, id.clone()));
    assert_eq!(again.text("title"), "one");
    let other = server.submit("k").json(r#"{"n":2}"#).send().await;
    assert_eq!((other.status, &*code(&other)), (422, "payload-mismatch"));

    let past = r#"{"aegis":{"expires_at":"2001-02-03T04:05:06Z"}}"#;
    let reply = server.submit("past").json(past).send().await;
    assert_eq!((reply.status, &*code(&reply)), (400, "invalid-request"));
    assert!(
        reply.text("detail").contains("not in the future"),
        "{reply:?}"
    );
    // A retry may come after the end of what was submitted in time.
    let late = r#"{"n":1,"aegis":{"expires_at":"2001-02-03T04:05:06Z"}}"#;
    let reply = server.submit("k").json(late).send().await;
    assert_eq!((reply.status, reply.request_id()), (200, id));
    for wrong in [r#"{"aegis":{"comment":"no"}}"#, r#"{"aegis":{"who":1}}"#] {
        assert_eq!(server.submit("w").json(wrong).send().await.status, 400);
    }
    let titled = r#"{"aegis":{"title":"no"}}"#;
    assert_eq!(server.approve("w").json(titled).send().await.status, 400);
}

#[cfg(feature = "test-util")]
#[tokio::test]
async fn the_clock_of_the_store_judges_whether_a_submission_is_too_late() {
    use aegis_hitl::store::{Clock, SqliteStore};

    const HOUR: Duration = Duration::from_secs(3600);
    let (clock, folder) = (Clock::new(), tempfile::TempDir::new().unwrap());
    let store = SqliteStore::open_with(folder.path().join("aegis.db"), clock.clone()).unwrap();
    let server = start(store.clone()).await;
    let body = |end: &str| format!(r#"{{"aegis":{{"expires_at":"{end}"}}}}"#);
    clock.advance(2 * HOUR);
    let late = server.submit("late").json(body(&in_time(HOUR)));
    let late = late.send().await;
    assert_eq!((late.status, &*code(&late)), (400, "invalid-request"));
    clock.set_back(4 * HOUR);
    submitted(&server, "k", &body(&in_time(Duration::ZERO))).await;
    store.close().await;
}

#[tokio::test]
async fn a_decision_by_id_is_on_what_was_seen() {
    let server = start(Disk::default()).await;
    let id = submitted(&server, "k", PAYLOAD).await;
    let other = digest(r#"{"to":"a@b.c"}"#);
    for (body, status, is) in [
        (json!({}), 400, "invalid-request"),
        (json!({ "digest": other }), 422, "payload-mismatch"),
        (json!({ "digest": "short" }), 400, "invalid-request"),
        (json!({ "digst": digest(PAYLOAD) }), 400, "invalid-request"),
        (json!([]), 400, "invalid-request"),
        (
            json!({ "digest": digest(PAYLOAD), "payload": {"n": 1} }),
            403,
            "edit-not-allowed",
        ),
    ] {
        let reply = about(&server, &id, "approve", &body).send().await;
        assert_eq!((reply.status, &*code(&reply)), (status, is), "{body}");
    }
    assert_eq!(look(&server, &id).await["status"], "PENDING");
    let seen = claim();
    let call = about(&server, &id, "reject", &seen).header("X-Request-Id", "call-1");
    assert_eq!(call.clone().send().await.status, 202);
    let replayed = call.send().await;
    assert_eq!(replayed.status, 202);
    assert_eq!(replayed.header("idempotency-replayed"), Some("true"));
    let second = about(&server, &id, "reject", &seen).send().await;
    assert_eq!((second.status, &*code(&second)), (409, "duplicate"));
    assert_eq!(second.json()["action"]["decided_by"], "anonymous");
    assert!(second.json()["action"]["decided_at"].is_string());
    let opposite = about(&server, &id, "approve", &seen).send().await;
    assert_eq!(
        (opposite.status, &*code(&opposite)),
        (422, "decision-conflict")
    );
    // By key, what is on record is the same.
    assert_eq!(server.reject("k").send().await.status, 409);
    for id in ["nonsense", "c1f4c3a9-2c9e-4a57-8c2f-6a4f106f9b2c", "call-1"] {
        let reply = about(&server, id, "approve", &seen).send().await;
        assert_eq!((reply.status, &*code(&reply)), (404, "not-found"), "{id}");
    }
    let foreign = about(&server, &id, "approve", &seen).without("Tenant-Id");
    let foreign = foreign.header("Tenant-Id", "other").send().await;
    assert_eq!(foreign.status, 404);
}

#[tokio::test]
async fn what_was_edited_is_what_later_decisions_are_compared_with() {
    let server = start(Disk::default()).await;
    let body = r#"{"n":1,"aegis":{"allow_edit":true}}"#;
    let id = submitted(&server, "k", body).await;
    let call = json!({ "digest": digest(r#"{"n":1}"#), "payload": {"n": 2} });
    let approve = about(&server, &id, "approve", &call).header("X-Request-Id", "call-1");
    assert_eq!(approve.clone().send().await.status, 202);
    assert_eq!(approve.send().await.status, 202);
    let by_key = |json: &'static str| server.approve("k").json(json).send();
    assert_eq!(by_key(r#"{"n":2}"#).await.status, 409);
    let original = by_key(r#"{"n":1}"#).await;
    assert_eq!(
        (original.status, &*code(&original)),
        (422, "payload-mismatch")
    );
    assert_eq!(by_key("{}").await.status, 409);
    let submit = |json: &'static str| server.submit("k").json(json).send();
    assert_eq!(submit(r#"{"n":1}"#).await.status, 200);
    assert_eq!(submit(r#"{"n":2}"#).await.status, 422);
    let twice =
        r#"{"digest":"DIGEST","payload":{"n":1,"n":2}}"#.replace("DIGEST", &digest(r#"{"n":2}"#));
    let path = format!("/api/v1/hitl/actions/{id}/approve");
    let reply = Call::new(server.addr, "POST", path).header("Tenant-Id", "t");
    assert_eq!(reply.json(twice).send().await.status, 400);
}

#[tokio::test]
async fn a_pending_action_is_cancelled_and_then_closed() {
    let server = start(Disk::default()).await;
    let id = submitted(&server, "k", PAYLOAD).await;
    let cancel = |id: &str| about(&server, id, "cancel", &json!({}));
    let call = cancel(&id).header("X-Request-Id", "call-1");
    let reply = call.clone().send().await;
    assert_eq!(reply.status, 202, "{reply:?}");
    assert_eq!(
        (reply.text("decision"), reply.text("closed")),
        ("reject".to_owned(), "cancelled".to_owned())
    );
    assert_eq!(call.send().await.status, 202);
    let again = cancel(&id).send().await;
    assert_eq!((again.status, &*code(&again)), (409, "duplicate"));
    assert_eq!(server.reject("k").send().await.status, 409);
    let approve = server.approve("k").send().await;
    assert_eq!((approve.status, &*code(&approve)), (422, "action-closed"));
    let decided = approved(&server, "decided").await;
    let reply = cancel(&decided).send().await;
    assert_eq!((reply.status, &*code(&reply)), (422, "action-closed"));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_action_expires_and_whoever_waits_for_it_is_told() {
    let server = start(Disk::default()).await;
    let end = in_time(Duration::from_millis(700));
    let body = format!(r#"{{"aegis":{{"expires_at":"{end}"}}}}"#);
    let id = submitted(&server, "k", &body).await;
    let wait = server.status(&id).header("Prefer", "wait=50");
    let shown = wait.send().await.json();
    assert_eq!(shown["decision"], "reject", "{shown}");
    assert_eq!(shown["closed"], "expired");
    let shown = look(&server, &id).await;
    assert_eq!(shown["decided_by"], "system:expiry");
    assert!(shown["decided_at"].as_str() >= Some(&*end), "{shown}");
    let approve = server.approve("k").send().await;
    assert_eq!((approve.status, &*code(&approve)), (422, "action-closed"));
    assert_eq!(server.reject("k").send().await.status, 409);
}

#[tokio::test]
async fn an_approval_is_spent_once() {
    let server = start(Disk::default()).await;
    let id = submitted(&server, "pending", PAYLOAD).await;
    let reply = about(&server, &id, "claim", &claim()).send().await;
    assert_eq!((reply.status, &*code(&reply)), (422, "not-approved"));
    let id = approved(&server, "k").await;
    let missing = about(&server, &id, "claim", &json!({})).send().await;
    assert_eq!((missing.status, &*code(&missing)), (400, "invalid-request"));
    for lease in [json!(0), json!(86_401), json!(-1), json!("5"), json!(1.5)] {
        let body = json!({ "digest": digest(PAYLOAD), "lease": lease });
        let reply = about(&server, &id, "claim", &body).send().await;
        assert_eq!(reply.status, 400, "{lease}");
    }
    let call = about(&server, &id, "claim", &claim()).header("X-Request-Id", "call-1");
    let first = call.clone().send().await;
    assert_eq!(first.status, 200, "{first:?}");
    let retry = call.send().await;
    assert_eq!(retry.header("idempotency-replayed"), Some("true"));
    let token = |reply: &Reply| reply.json()["claim"]["token"].clone();
    assert_eq!(token(&retry), token(&first));
    for other in [Some("call-2"), None] {
        let call = about(&server, &id, "claim", &claim());
        let call = match other {
            Some(other) => call.header("X-Request-Id", other),
            None => call,
        };
        let reply = call.send().await;
        assert_eq!((reply.status, &*code(&reply)), (409, "already-claimed"));
        assert_eq!(reply.json()["action"]["execution"], "claimed");
        assert!(!String::from_utf8_lossy(&reply.body).contains(token(&first).as_str().unwrap()));
    }
    // An action that was decided without a submission can be claimed, too.
    let bare = server.approve("bare").send().await.request_id();
    assert_eq!(
        about(&server, &bare, "claim", &json!({}))
            .send()
            .await
            .status,
        200
    );
}

#[tokio::test]
async fn a_failed_action_is_decided_and_claimed_again_under_a_greater_fence() {
    let server = start(Disk::default()).await;
    let id = approved(&server, "k").await;
    let first = about(&server, &id, "claim", &claim()).send().await.json();
    let fail = json!({ "token": first["claim"]["token"], "reason": "card declined" });
    assert_eq!(about(&server, &id, "fail", &fail).send().await.status, 200);
    let again = about(&server, &id, "fail", &fail).send().await;
    assert_eq!(again.header("idempotency-replayed"), Some("true"));
    let shown = look(&server, &id).await;
    assert_eq!(
        (&shown["status"], &shown["execution"]),
        (&json!("FAILED"), &json!("failed"))
    );
    assert_eq!(shown["reason"], "card declined");
    let reply = about(&server, &id, "claim", &claim()).send().await;
    assert_eq!((reply.status, &*code(&reply)), (422, "not-approved"));
    assert_eq!(
        about(&server, &id, "approve", &claim()).send().await.status,
        202
    );
    let second = about(&server, &id, "claim", &claim()).send().await.json();
    assert_eq!(second["claim"]["fence"], 2);
    // The old token does nothing any more.
    for (verb, body) in [
        ("renew", json!({ "token": first["claim"]["token"] })),
        ("complete", json!({ "token": first["claim"]["token"] })),
        ("fail", fail.clone()),
        ("complete", json!({ "token": "nonsense" })),
    ] {
        let reply = about(&server, &id, verb, &body).send().await;
        assert_eq!(
            (reply.status, &*code(&reply)),
            (422, "claim-lost"),
            "{verb}"
        );
    }
    let done = json!({ "token": second["claim"]["token"], "result": null });
    assert_eq!(
        about(&server, &id, "complete", &done).send().await.status,
        200
    );
    assert_eq!(look(&server, &id).await["result"], Value::Null);
    let other = json!({ "token": second["claim"]["token"], "reason": "no" });
    let reply = about(&server, &id, "fail", &other).send().await;
    assert_eq!((reply.status, &*code(&reply)), (422, "claim-lost"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_that_ends_leaves_an_unknown_outcome_for_a_human() {
    let server = start(Disk::default()).await;
    let id = approved(&server, "k").await;
    let body = json!({ "digest": digest(PAYLOAD), "lease": 1 });
    let claim = about(&server, &id, "claim", &body).header("X-Request-Id", "call-1");
    let claimed = claim.clone().send().await.json();
    let events = follow(&server, Some("0")).await;
    timeout(
        HANG,
        events.until(|event| event["type"] == "action.claim-lost"),
    )
    .await
    .unwrap();
    let shown = look(&server, &id).await;
    assert_eq!(
        (&shown["status"], &shown["execution"]),
        (&json!("FAILED"), &json!("unknown"))
    );
    let late = json!({ "token": claimed["claim"]["token"] });
    for verb in ["renew", "complete", "fail"] {
        let reply = about(&server, &id, verb, &late).send().await;
        assert_eq!(
            (reply.status, &*code(&reply)),
            (422, "claim-lost"),
            "{verb}"
        );
    }
    let reply = claim.send().await;
    assert_eq!((reply.status, &*code(&reply)), (422, "not-approved"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_check_follows_every_kind_of_event() {
    let disk = Disk::default();
    let server = start(disk.clone()).await;
    let failed = approved(&server, "failed").await;
    let claimed = about(&server, &failed, "claim", &claim())
        .send()
        .await
        .json();
    let fail = json!({ "token": claimed["claim"]["token"], "reason": "no" });
    about(&server, &failed, "fail", &fail).send().await;
    about(&server, &failed, "reject", &claim()).send().await;
    let lost = approved(&server, "lost").await;
    let short = json!({ "digest": digest(PAYLOAD), "lease": 1 });
    about(&server, &lost, "claim", &short).send().await;
    let done = approved(&server, "done").await;
    let claimed = about(&server, &done, "claim", &claim()).send().await.json();
    let complete = json!({ "token": claimed["claim"]["token"], "result": 1 });
    about(&server, &done, "complete", &complete).send().await;
    let cancelled = submitted(&server, "cancelled", "{}").await;
    about(&server, &cancelled, "cancel", &json!({}))
        .send()
        .await;
    let end = in_time(Duration::from_millis(300));
    let expires = format!(r#"{{"aegis":{{"expires_at":"{end}"}}}}"#);
    submitted(&server, "expired", &expires).await;
    let body = r#"{"n":1,"aegis":{"allow_edit":true}}"#;
    let edited = submitted(&server, "edited", body).await;
    let edit = json!({ "digest": digest(r#"{"n":1}"#), "payload": {"n": 2} });
    about(&server, &edited, "approve", &edit).send().await;
    let mut events = follow(&server, Some("0")).await;
    let mut kinds = HashSet::new();
    while kinds.len() < 9 {
        let (_, event) = timeout(HANG, events.next()).await.unwrap().unwrap();
        kinds.insert(event["type"].to_string());
    }
    let verified = aegis_hitl::store::SqliteStore::verify(disk.path()).unwrap();
    assert!(verified.faults.is_empty(), "{verified:?}");
    assert_eq!(verified.totals.actions, 6);
}

#[tokio::test]
async fn a_result_that_is_too_large_leaves_the_claim_alive() {
    let server = start(Disk::default()).await;
    let id = approved(&server, "k").await;
    let claimed = about(&server, &id, "claim", &claim()).send().await.json();
    let token = &claimed["claim"]["token"];
    let large = json!({ "token": token, "result": "x".repeat(64 * 1024 - 1) });
    let reply = about(&server, &id, "complete", &large).send().await;
    assert_eq!((reply.status, &*code(&reply)), (413, "payload-too-large"));
    let fits = json!({ "token": token, "result": "x".repeat(64 * 1024 - 2) });
    assert_eq!(
        about(&server, &id, "complete", &fits).send().await.status,
        200
    );
}

#[tokio::test]
async fn pages_stay_right_while_actions_are_added_and_decided() {
    let server = start(Disk::default()).await;
    let mut all = Vec::new();
    for number in 0..10 {
        all.push(submitted(&server, &format!("k-{number}"), "{}").await);
    }
    let list = |query: String| {
        let call = server.get(&format!("/api/v1/hitl/actions?{query}"));
        async move {
            let reply = call.header("Tenant-Id", "t").send().await;
            assert_eq!(reply.status, 200, "{reply:?}");
            let page = reply.json();
            let ids = page["actions"].as_array().unwrap().iter();
            let ids: Vec<_> = ids
                .map(|action| action["request_id"].as_str().unwrap().to_owned())
                .collect();
            (ids, page["next_cursor"].as_str().map(str::to_owned))
        }
    };
    // Pending: the oldest first. What is decided leaves the list, what is new comes last.
    let (page, cursor) = list("status=PENDING&limit=4".to_owned()).await;
    assert_eq!(page, all[..4]);
    server.approve("k-4").send().await;
    all.push(submitted(&server, "k-10", "{}").await);
    let cursor = cursor.unwrap();
    let (page, cursor) = list(format!("status=PENDING&limit=4&cursor={cursor}")).await;
    assert_eq!(page, all[5..9]);
    let cursor = cursor.unwrap();
    let (page, cursor) = list(format!("status=PENDING&limit=4&cursor={cursor}")).await;
    assert_eq!((page, cursor), (all[9..].to_vec(), None));
    // Any other list: the newest first.
    let (page, _) = list("limit=3".to_owned()).await;
    let newest: Vec<_> = all.iter().rev().take(3).cloned().collect();
    assert_eq!(page, newest);
    let (page, _) = list("decision=approve".to_owned()).await;
    assert_eq!(page, [all[4].clone()]);
    assert!(list("execution=claimed".to_owned()).await.0.is_empty());
    assert!(list("thread_id=other".to_owned()).await.0.is_empty());
    assert_eq!(
        list("thread_id=h&status=COMMITTED".to_owned())
            .await
            .0
            .len(),
        1
    );
    for wrong in ["status=pending", "limit=0", "cursor=x", "what=1"] {
        let call = server.get(&format!("/api/v1/hitl/actions?{wrong}"));
        let reply = call.header("Tenant-Id", "t").send().await;
        assert_eq!(
            (reply.status, &*code(&reply)),
            (400, "invalid-request"),
            "{wrong}"
        );
    }
    let reply = server
        .get("/api/v1/hitl/actions")
        .header("Tenant-Id", "other");
    assert_eq!(reply.send().await.json()["actions"], json!([]));
}

/// A client of the events.
struct Events {
    body: hyper::body::Incoming,
    text: String,
}

async fn follow(server: &Running, last: Option<&str>) -> Events {
    follow_at(server.addr, last).await
}

async fn follow_at(addr: std::net::SocketAddr, last: Option<&str>) -> Events {
    let io = tokio::net::TcpStream::connect(addr).await.unwrap();
    let io = hyper_util::rt::TokioIo::new(io);
    let (mut sender, connection) = hyper::client::conn::http1::handshake(io).await.unwrap();
    tokio::spawn(connection);
    let mut request = http::Request::get("/api/v1/hitl/events")
        .header("host", addr.to_string())
        .header("tenant-id", "t");
    if let Some(last) = last {
        request = request.header("last-event-id", last);
    }
    let request = request
        .body(http_body_util::Empty::<bytes::Bytes>::new())
        .unwrap();
    let response = sender.send_request(request).await.unwrap();
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers()["content-type"], "text/event-stream");
    let mut events = Events {
        body: response.into_body(),
        text: String::new(),
    };
    // The comment at the beginning: the subscription is there.
    if last.is_none() {
        assert!(events.more().await);
        assert!(events.text.starts_with("id: "), "{}", events.text);
    }
    events
}

impl Events {
    /// Reads on. `false` at the end.
    async fn more(&mut self) -> bool {
        match timeout(HANG, self.body.frame()).await.unwrap() {
            Some(frame) => {
                let data = frame.unwrap().into_data().unwrap();
                self.text.push_str(std::str::from_utf8(&data).unwrap());
                true
            }
            None => false,
        }
    }

    /// The next event with its position. `None` at the end.
    async fn next(&mut self) -> Option<(u64, Value)> {
        loop {
            while let Some((block, rest)) = self.text.split_once("\n\n") {
                let fields: Vec<_> = block
                    .lines()
                    .filter_map(|line| line.split_once(": "))
                    .collect();
                let read = fields
                    .iter()
                    .find(|(name, _)| *name == "data")
                    .map(|(_, data)| {
                        let event: Value = serde_json::from_str(data).unwrap();
                        assert_eq!(format!("action.{}", fields[1].1), event["type"]);
                        (fields[0].1.parse().unwrap(), event)
                    });
                self.text = rest.to_owned();
                if read.is_some() {
                    return read;
                }
            }
            if !self.more().await {
                return None;
            }
        }
    }

    async fn until(mut self, found: impl Fn(&Value) -> bool) -> (u64, Value) {
        loop {
            let (position, event) = self.next().await.unwrap();
            if found(&event) {
                return (position, event);
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_event_comes_once_and_in_order_over_reconnects() {
    let server = start(Disk::default()).await;
    let mut live = follow(&server, None).await;
    let mut expected = Vec::new();
    for number in 0..20 {
        let id = approved(&server, &format!("k-{number}")).await;
        expected.push((id.clone(), "action.submitted"));
        expected.push((id, "action.approved"));
    }
    // Another tenant's are not among them.
    let call = server.submit("k").without("Tenant-Id");
    assert_eq!(call.header("Tenant-Id", "u").send().await.status, 201);
    let mut last = String::from("0");
    let mut seen = Vec::new();
    for _ in 0..8 {
        let mut events = follow(&server, Some(&last)).await;
        for _ in 0..5 {
            let (position, event) = events.next().await.unwrap();
            last = position.to_string();
            assert_eq!((position, &event), (live.next().await.unwrap().0, &event));
            let status = match &event["type"] {
                kind if kind == "action.submitted" => "PENDING",
                _ => "COMMITTED",
            };
            assert_eq!(event["action"]["status"], status, "{event}");
            let id = event["action"]["request_id"].as_str().unwrap().to_owned();
            seen.push((id, event["type"].as_str().unwrap().to_owned()));
        }
    }
    let seen: Vec<_> = seen
        .iter()
        .map(|(id, kind)| (id.clone(), &**kind))
        .collect();
    assert_eq!(seen, expected);
    for wrong in ["-1", "x", "", "+1", "999999999", "99999999999999999999999"] {
        let call = server.get("/api/v1/hitl/events").header("Tenant-Id", "t");
        let reply = call.header("Last-Event-ID", wrong).send().await;
        assert_eq!(
            (reply.status, &*code(&reply)),
            (400, "invalid-request"),
            "{wrong}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shutdown_ends_the_events_and_they_resume_elsewhere() {
    let disk = Disk::default();
    let server = start(disk.clone()).await;
    let addr = server.addr;
    let mut events = follow_at(addr, None).await;
    approved(&server, "k-1").await;
    let (first, _) = events.next().await.unwrap();
    assert!(server.stop().await.is_drained());
    while events.next().await.is_some() {}
    let server = start(disk).await;
    let mut events = follow(&server, Some(&first.to_string())).await;
    assert_eq!(events.next().await.unwrap().1["type"], "action.approved");
}

#[tokio::test(flavor = "multi_thread")]
async fn of_64_claimants_one_gets_each_of_100_approvals() {
    let server = start(Disk::default()).await;
    let mut ids = Vec::new();
    for number in 0..100 {
        let reply = server.approve(&format!("k-{number}")).send().await;
        ids.push(reply.request_id());
    }
    let claimants: Vec<_> = (0..64)
        .map(|_| {
            let (addr, ids) = (server.addr, ids.clone());
            tokio::spawn(async move {
                let mut claimed = Vec::new();
                for id in ids {
                    let path = format!("/api/v1/hitl/actions/{id}/claim");
                    let call = Call::new(addr, "POST", path).header("Tenant-Id", "t");
                    let reply = call.json("{}").send().await;
                    match reply.status {
                        200 => claimed.push(id),
                        status => assert_eq!((status, &*code(&reply)), (409, "already-claimed")),
                    }
                }
                claimed
            })
        })
        .collect();
    let mut claimed = Vec::new();
    for claimant in claimants {
        claimed.extend(claimant.await.unwrap());
    }
    assert_eq!(claimed.len(), 100);
    assert_eq!(claimed.into_iter().collect::<HashSet<_>>().len(), 100);
}

fn with_keys(lines: &[(&str, &str, &str)]) -> Auth {
    let text: String = lines
        .iter()
        .map(|(secret, owner, scopes)| {
            let digest = Keys::digest(&ApiKey::new(*secret).unwrap());
            format!("{digest} t {owner} {scopes}\n")
        })
        .collect();
    Auth::keys(Keys::parse(&text).unwrap())
}

#[tokio::test]
async fn a_key_does_what_its_scopes_say_and_nothing_else() {
    let auth = with_keys(&[
        ("s", "agent", "submit"),
        ("d", "alice", "decide"),
        ("c", "agent", "claim"),
        ("r", "board", "read"),
        ("a", "root", "admin"),
        ("old", "agent", "admin 2001-02-03T04:05:06Z"),
    ]);
    let server = start_with(
        Disk::default(),
        |service| service.auth(auth),
        |server| server,
    )
    .await;
    let ask = |key: &str, method: &str, path: &str, body: &str| {
        let call = Call::new(server.addr, method, format!("/api/v1/hitl/{path}"));
        let call = call.header("Authorization", format!("Bearer {key}"));
        let call = call.header("Thread-Id", "h").header("Idempotency-Key", "k");
        match method {
            "POST" => call.json(body.to_owned()).send(),
            _ => call.send(),
        }
    };
    let id = ask("s", "POST", "actions", "{}").await.request_id();
    let actions = [
        ("s", "POST", "actions".to_owned()),
        ("d", "POST", "approve".to_owned()),
        ("d", "POST", format!("actions/{id}/approve")),
        ("s", "POST", format!("actions/{id}/cancel")),
        ("c", "POST", format!("actions/{id}/claim")),
        ("c", "POST", format!("actions/{id}/renew")),
        ("c", "POST", format!("actions/{id}/complete")),
        ("c", "POST", format!("actions/{id}/fail")),
        ("r", "GET", "actions".to_owned()),
        ("r", "GET", format!("actions/{id}")),
        ("r", "GET", "events".to_owned()),
    ];
    for (needed, method, path) in &actions {
        for key in ["s", "d", "c", "r"] {
            if key != *needed {
                let reply = ask(key, method, path, "{}").await;
                assert_eq!(
                    (reply.status, &*code(&reply)),
                    (403, "forbidden"),
                    "{key} {path}"
                );
            }
        }
        let expired = ask("old", method, path, "{}").await;
        assert_eq!((expired.status, &*code(&expired)), (401, "unauthorized"));
    }
    // Any key of the tenant may ask for a status.
    for key in ["s", "d", "c", "r", "a"] {
        assert_eq!(
            ask(key, "GET", &format!("status/{id}"), "").await.status,
            200
        );
    }
    assert_eq!(ask("a", "GET", "actions", "").await.status, 200);
    assert_eq!(
        ask("a", "POST", &format!("actions/{id}/approve"), "{}")
            .await
            .status,
        202
    );
    let claimed = ask("a", "POST", &format!("actions/{id}/claim"), "{}").await;
    assert_eq!(claimed.status, 200);
}

#[tokio::test]
async fn who_submitted_does_not_decide() {
    let lines = [
        ("one", "alice", "submit,decide,read"),
        ("two", "alice", "decide"),
        ("bob", "bob", "decide,submit"),
        ("root", "root", "admin"),
    ];
    let auth = with_keys(&lines);
    let server = start_with(
        Disk::default(),
        |service| service.auth(auth),
        |server| server,
    )
    .await;
    let ask = |addr, key: &str, path: &str| {
        let call = Call::new(addr, "POST", format!("/api/v1/hitl/{path}"));
        let call = call.header("Authorization", format!("Bearer {key}"));
        let call = call.header("Thread-Id", "h").header("Idempotency-Key", "k");
        call.json("{}").send()
    };
    let id = ask(server.addr, "one", "actions").await.request_id();
    let by_id = format!("actions/{id}/approve");
    // By the owner, not by the key.
    for key in ["one", "two"] {
        for path in ["approve", "reject", &by_id] {
            let reply = ask(server.addr, key, path).await;
            assert_eq!(
                (reply.status, &*code(&reply)),
                (403, "self-approval"),
                "{key} {path}"
            );
        }
    }
    let cancel = format!("actions/{id}/cancel");
    let reply = ask(server.addr, "bob", &cancel).await;
    assert_eq!((reply.status, &*code(&reply)), (403, "forbidden"));
    let reply = ask(server.addr, "bob", &by_id).await;
    assert_eq!(
        (reply.status, reply.text("decided_by")),
        (202, "bob".to_owned())
    );
    // What is on record is told to anyone who may ask.
    assert_eq!(ask(server.addr, "one", "approve").await.status, 409);

    let auth = with_keys(&lines);
    let service = |service: aegis_hitl::server::HitlServiceBuilder<Disk>| {
        service.auth(auth).allow_self_approval(true)
    };
    let server = start_with(Disk::default(), service, |server| server).await;
    ask(server.addr, "one", "actions").await;
    assert_eq!(ask(server.addr, "one", "approve").await.status, 202);
}

/// What an agent did outside, by its key.
type Ledger = std::sync::Arc<std::sync::Mutex<Vec<String>>>;

/// An agent that is dropped when it is polled for the n-th time. `None` if it was.
async fn agent(
    addr: std::net::SocketAddr,
    key: &str,
    ledger: &Ledger,
    polls: usize,
) -> Option<aegis_hitl::client::RunOutcome<usize, std::io::Error>> {
    let aegis = aegis_hitl::AegisService::builder()
        .base_url(format!("http://{addr}"))
        .tenant_id("t")
        .thread_id("h")
        .build()
        .unwrap();
    let run = aegis
        .action(key)
        .payload(&json!({ "amount": 12.5 }))
        .lease(Duration::from_secs(1))
        .run_once(|approved| {
            let (ledger, key) = (ledger.clone(), key.to_owned());
            async move {
                tokio::task::yield_now().await;
                assert_eq!(approved.parse::<Value>().unwrap()["amount"], 12.5);
                ledger.lock().unwrap().push(key);
                tokio::task::yield_now().await;
                Ok(1)
            }
        });
    let mut run = Box::pin(run);
    let mut left = polls;
    std::future::poll_fn(move |cx| {
        left -= 1;
        if left == 0 {
            return std::task::Poll::Ready(None);
        }
        run.as_mut().poll(cx).map(|outcome| Some(outcome.unwrap()))
    })
    .await
}

/// Drops an agent at its n-th poll, and starts it again until there is nothing left to do. Returns
/// whether it ended before.
async fn dropped_at(addr: std::net::SocketAddr, polls: usize, ledger: Ledger) -> bool {
    use aegis_hitl::client::RunOutcome;

    let key = format!("k-{polls}");
    let rows = || {
        ledger
            .lock()
            .unwrap()
            .iter()
            .filter(|row| **row == key)
            .count()
    };
    let mut outcome = agent(addr, &key, &ledger, polls).await;
    let has_ended = outcome.is_some();
    for _ in 0..50 {
        assert!(rows() <= 1, "{polls}: twice");
        match outcome {
            Some(RunOutcome::Completed { .. }) => break,
            Some(RunOutcome::Rejected(_)) => break,
            Some(RunOutcome::AlreadyRun(action)) => {
                let execution = action.execution.unwrap().as_str();
                match execution {
                    "completed" => break,
                    // The lease of the agent that is gone has to end.
                    "claimed" => tokio::time::sleep(Duration::from_millis(300)).await,
                    // A human decides where nobody knows.
                    "unknown" => {
                        let verb = ["approve", "reject"][rows()];
                        decide_as_shown(addr, action.request_id.as_str(), verb).await;
                    }
                    other => panic!("{polls}: {other}"),
                }
            }
            Some(other) => panic!("{polls}: {other:?}"),
            None => {}
        }
        outcome = agent(addr, &key, &ledger, usize::MAX).await;
    }
    assert_eq!(rows(), 1, "{polls}");
    has_ended
}

async fn decide_as_shown(addr: std::net::SocketAddr, id: &str, verb: &str) {
    let call = |method: &str, path: String| Call::new(addr, method, path).header("Tenant-Id", "t");
    let path = format!("/api/v1/hitl/actions/{id}");
    let shown = call("GET", path.clone()).send().await.json();
    let seen = json!({ "digest": shown["digest"] }).to_string();
    let reply = call("POST", format!("{path}/{verb}"))
        .json(seen)
        .send()
        .await;
    assert!(matches!(reply.status, 202 | 409), "{reply:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_is_dropped_at_any_poll_never_runs_its_action_twice() {
    let server = start(Disk::default()).await;
    let addr = server.addr;
    let reviewer = tokio::spawn(async move {
        loop {
            let pending = Call::new(addr, "GET", "/api/v1/hitl/actions?status=PENDING");
            let pending = pending.header("Tenant-Id", "t").send().await.json();
            for action in pending["actions"].as_array().unwrap() {
                let id = action["request_id"].as_str().unwrap();
                decide_as_shown(addr, id, "approve").await;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    let ledger = Ledger::default();
    let mut polls = 1;
    let mut has_ended = false;
    while !has_ended {
        let batch: Vec<_> = (polls..polls + 8)
            .map(|polls| tokio::spawn(dropped_at(addr, polls, ledger.clone())))
            .collect();
        polls += 8;
        for one in batch {
            has_ended |= one.await.unwrap();
        }
    }
    // It does not only seem to be polled.
    assert!(polls > 9, "{polls}");
    reviewer.abort();
}
