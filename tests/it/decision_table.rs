//! Every row of the protocol's decision table, over real sockets.

use std::time::Duration;

use aegis_hitl::ApiKey;
use aegis_hitl::server::{Auth, Keys};
use aegis_hitl::store::Store;

use crate::support::{Call, Disk, Faulty, Mood, Reply, Running, start, start_with};

/// One row: what came before, what is asked, and what is answered.
struct Row {
    situation: &'static str,
    before: Vec<Call>,
    /// What happens to the action between the calls.
    then: fn(&Disk),
    asked: Call,
    status: u16,
    code: Option<&'static str>,
    /// The decision on record in the answer.
    on_record: Option<&'static str>,
    replayed: bool,
}

impl Row {
    fn new(situation: &'static str, before: Vec<Call>, asked: Call) -> Self {
        Self {
            situation,
            before,
            then: |_| {},
            asked,
            status: 202,
            code: None,
            on_record: None,
            replayed: false,
        }
    }

    fn then(mut self, then: fn(&Disk)) -> Self {
        self.then = then;
        self
    }

    fn accepted(mut self, decision: &'static str) -> Self {
        self.on_record = Some(decision);
        self
    }

    fn replayed(mut self, decision: &'static str) -> Self {
        self.replayed = true;
        self.accepted(decision)
    }

    fn refused(mut self, status: u16, code: &'static str) -> Self {
        (self.status, self.code) = (status, Some(code));
        self
    }

    fn on_record(mut self, decision: &'static str) -> Self {
        self.on_record = Some(decision);
        self
    }
}

#[rustfmt::skip]
fn table(s: &Running) -> Vec<Row> {
    let one = |call: Call| call.header("X-Request-Id", "call-1");
    let two = |call: Call| call.header("X-Request-Id", "call-2");
    let big = format!("{{\"a\":\"{}\"}}", "x".repeat(256 * 1024));
    vec![
        Row::new("first decision", vec![], s.approve("k1")).accepted("approve"),
        Row::new("first rejection", vec![], s.reject("k2").json("{}")).accepted("reject"),
        Row::new("the action is FAILED", vec![s.approve("k3")], s.reject("k3"))
            .then(|store| store.fail("k3")).accepted("reject"),
        Row::new("its own retry", vec![one(s.approve("k4"))], one(s.approve("k4"))).replayed("approve"),
        Row::new("its own retry with its payload", vec![one(s.approve("k5").json(r#"{"a":1,"b":2}"#))],
            one(s.approve("k5").json(r#"{ "b": 2.0, "a": 1 }"#))).replayed("approve"),
        Row::new("same decision, other call", vec![one(s.approve("k6"))], two(s.approve("k6")))
            .refused(409, "duplicate").on_record("approve"),
        Row::new("same decision, no call id", vec![s.approve("k7")], s.approve("k7"))
            .refused(409, "duplicate").on_record("approve"),
        Row::new("a quoted key is the same key", vec![s.reject("k8")], s.reject("\"k8\""))
            .refused(409, "duplicate").on_record("reject"),
        Row::new("no payload matches any", vec![s.approve("k9").json(r#"{"a":1}"#)], s.approve("k9").json("{}"))
            .refused(409, "duplicate").on_record("approve"),
        Row::new("opposite decision", vec![s.approve("k10")], s.reject("k10"))
            .refused(422, "decision-conflict").on_record("approve"),
        Row::new("opposite decision of the same call", vec![one(s.reject("k11"))], one(s.approve("k11")))
            .refused(422, "decision-conflict").on_record("reject"),
        Row::new("another payload", vec![s.approve("k12").json(r#"{"a":1}"#)], s.approve("k12").json(r#"{"a":2}"#))
            .refused(422, "payload-mismatch").on_record("approve"),
        Row::new("closed", vec![s.reject("k13")], s.approve("k13"))
            .then(|store| store.close("k13")).refused(422, "action-closed").on_record("reject"),
        Row::new("closed as asked for", vec![s.reject("k14")], s.reject("k14"))
            .then(|store| store.close("k14")).refused(409, "duplicate").on_record("reject"),
        Row::new("a comment is no payload", vec![s.approve("k15").json(r#"{"a":1}"#)],
            s.approve("k15").json(r#"{"a":1,"aegis":{"comment":"fine"}}"#))
            .refused(409, "duplicate").on_record("approve"),
        Row::new("another tenant's key is another action", vec![s.approve("k16")],
            s.reject("k16").without("tenant-id").header("Tenant-Id", "u")).accepted("reject"),
        Row::new("another thread's key is another action", vec![s.approve("k17")],
            s.reject("k17").without("thread-id").header("Thread-Id", "i")).accepted("reject"),
        Row::new("over HTTP/2", vec![s.approve("k18")], s.approve("k18").http2())
            .refused(409, "duplicate").on_record("approve"),
        Row::new("submitted before", vec![s.submit("k19").json(r#"{"a":1}"#)], s.approve("k19")).accepted("approve"),
        Row::new("no tenant", vec![], s.approve("k20").without("tenant-id")).refused(400, "invalid-request"),
        Row::new("no thread", vec![], s.approve("k20").without("thread-id")).refused(400, "invalid-request"),
        Row::new("no key", vec![], s.approve("k20").without("idempotency-key")).refused(400, "invalid-request"),
        Row::new("malformed key", vec![], s.approve("k 20")).refused(400, "invalid-request"),
        Row::new("repeated key", vec![], s.approve("k20").header("Idempotency-Key", "k20")).refused(400, "invalid-request"),
        Row::new("no object", vec![], s.approve("k20").json("[]")).refused(400, "invalid-request"),
        Row::new("bad credentials", vec![], s.approve("k20").header("Authorization", "Bearer x")).refused(401, "unauthorized"),
        Row::new("body over 256 KiB", vec![], s.approve("k20").json(big)).refused(413, "payload-too-large"),
        Row::new("no JSON media type", vec![], s.approve("k20").body("{}").header("Content-Type", "text/plain"))
            .refused(415, "unsupported-media-type"),
        Row::new("unknown action", vec![], s.post("aprove", "k20")).refused(404, "not-found"),
        // 429 has no row: no quota or rate exists yet that could be spent.
    ]
}

#[tokio::test]
async fn every_situation_has_the_answer_of_the_protocol() {
    let store = Disk::default();
    let server = start(store.clone()).await;
    for row in table(&server) {
        for call in row.before {
            let reply = call.send().await;
            assert!(
                matches!(reply.status, 201 | 202),
                "{}: {reply:?}",
                row.situation
            );
        }
        (row.then)(&store);
        let before = store.totals().await.unwrap();
        let reply = row.asked.send().await;
        let what = format!("{}: {reply:?}", row.situation);
        assert_eq!(reply.status, row.status, "{what}");
        assert_common(&reply);
        let body = reply.json();
        let action = match row.code {
            None => &body,
            Some(code) => {
                assert_eq!(body["code"], code, "{what}");
                &body["action"]
            }
        };
        match row.on_record {
            None => assert!(action.is_null(), "{what}"),
            Some(decision) => {
                assert_eq!(action["decision"], decision, "{what}");
                assert_eq!(action["status"], "COMMITTED", "{what}");
                assert_eq!(action["replayed"], row.replayed, "{what}");
                let id = action["request_id"].as_str().unwrap();
                let location = format!("/api/v1/hitl/status/{id}");
                assert_eq!(reply.header("location"), Some(&*location), "{what}");
            }
        }
        let replayed = row.replayed.then_some("true");
        assert_eq!(reply.header("idempotency-replayed"), replayed, "{what}");
        if row.status != 202 || row.replayed {
            let after = store.totals().await.unwrap();
            assert_eq!(after.decisions, before.decisions, "{what}");
        }
    }
}

/// What holds of every answer.
fn assert_common(reply: &Reply) {
    let media_type = if reply.status < 400 {
        "application/json"
    } else {
        "application/problem+json"
    };
    assert_eq!(reply.header("content-type"), Some(media_type), "{reply:?}");
    assert_eq!(reply.header("cache-control"), Some("no-store"), "{reply:?}");
    assert_eq!(
        reply.header("x-content-type-options"),
        Some("nosniff"),
        "{reply:?}"
    );
    let retry_after = matches!(reply.status, 429 | 503).then_some("1");
    assert_eq!(reply.header("retry-after"), retry_after, "{reply:?}");
    let challenge = (reply.status == 401).then_some("Bearer");
    assert_eq!(reply.header("www-authenticate"), challenge, "{reply:?}");
    if reply.status >= 400 {
        let problem = reply.json();
        assert_eq!(problem["status"], reply.status, "{reply:?}");
        assert_eq!(
            problem["type"],
            format!("urn:aegis:problem:{}", problem["code"].as_str().unwrap())
        );
        for member in ["title", "detail"] {
            assert!(!problem[member].as_str().unwrap().is_empty(), "{reply:?}");
        }
    }
}

#[tokio::test]
async fn a_receipt_has_the_members_of_the_protocol_and_no_others() {
    let server = start(Disk::default()).await;
    let call = server
        .approve("k")
        .json(r#"{"to":"a@b.c","aegis":{"comment":"fine"}}"#)
        .header("X-Request-Id", "call-1");
    let reply = call.send().await;
    assert_eq!(reply.header("x-request-id"), Some("call-1"));
    let body = reply.json();
    let members: Vec<_> = body.as_object().unwrap().keys().collect();
    assert_eq!(
        members,
        [
            "closed",
            "created_at",
            "decided_at",
            "decided_by",
            "decision",
            "digest",
            "execution",
            "idempotency_key",
            "replayed",
            "request_id",
            "status",
            "tenant_id",
            "thread_id"
        ]
    );
}

#[tokio::test]
async fn a_submission_is_recorded_once() {
    let server = start(Disk::default()).await;
    let submit = |payload: &'static str| server.submit("k").json(payload).send();
    let first = submit(r#"{"a":1}"#).await;
    assert_eq!(first.status, 201);
    assert_eq!(first.text("status"), "PENDING");
    let location = format!("/api/v1/hitl/status/{}", first.request_id());
    assert_eq!(first.header("location"), Some(&*location));
    assert_eq!(server.get(&location).send().await.status, 200);

    let again = submit(r#"{ "a": 1.0 }"#).await;
    assert_eq!(again.status, 200);
    assert_eq!(again.request_id(), first.request_id());

    let other = submit(r#"{"a":2}"#).await;
    assert_eq!(other.status, 422);
    assert_eq!(other.text("code"), "payload-mismatch");
    assert_eq!(other.json()["action"]["request_id"], first.request_id());

    let commented = submit(r#"{"aegis":{"comment":"mine"}}"#).await;
    assert_eq!(commented.status, 400);
}

#[tokio::test]
async fn strict_mode_decides_submitted_actions_only() {
    let store = Disk::default();
    let server = start_with(
        store.clone(),
        |service| service.require_submission(true),
        |server| server,
    )
    .await;
    let unknown = server.approve("k").send().await;
    assert_eq!((unknown.status, &*unknown.text("code")), (404, "not-found"));
    assert_eq!(store.totals().await.unwrap().actions, 0);
    assert_eq!(server.submit("k").send().await.status, 201);
    assert_eq!(server.approve("k").send().await.status, 202);
}

#[tokio::test]
async fn a_store_that_fails_is_503_and_shows_no_internals() {
    let store = Faulty::new(Disk::default(), Mood::Fails);
    let server = start(store.clone()).await;
    let id = uuid::Uuid::new_v4().to_string();
    for call in [
        server.approve("k"),
        server.reject("k"),
        server.submit("k"),
        server.status(&id),
    ] {
        let reply = call.header("X-Request-Id", "call-1").send().await;
        assert_eq!(reply.status, 503);
        assert_eq!(reply.text("code"), "unavailable");
        assert_eq!(reply.header("x-request-id"), Some("call-1"));
        assert!(!reply.text("detail").contains("secret"), "{reply:?}");
        assert_common(&reply);
    }
    store.set(Mood::Well);
    server.still_answers().await;
}

#[tokio::test]
async fn a_decision_that_takes_too_long_is_503_and_not_lost() {
    let store = Faulty::new(Disk::default(), Mood::Hangs);
    let server = start_with(
        store.clone(),
        |service| service.store_timeout(Duration::from_millis(50)),
        |server| server,
    )
    .await;
    let call = server.approve("k").header("X-Request-Id", "call-1");
    let reply = call.clone().send().await;
    assert_eq!(reply.status, 503);
    assert_eq!(reply.text("code"), "unavailable");
    assert_common(&reply);
    store.set(Mood::Well);
    assert_eq!(call.clone().send().await.status, 202);
    assert_eq!(
        call.send().await.header("idempotency-replayed"),
        Some("true")
    );
    assert_eq!(store.totals().await.unwrap().decisions, 1);
}

#[tokio::test(start_paused = true)]
async fn a_decision_may_take_two_seconds_unless_set_otherwise() {
    use aegis_hitl::server::HitlService;
    use http_body_util::Empty;
    use tower::ServiceExt;

    let store = Faulty::new(Disk::default(), Mood::Hangs);
    let request = http::Request::post("/api/v1/hitl/approve")
        .header("Tenant-Id", "t")
        .header("Thread-Id", "h")
        .header("Idempotency-Key", "k")
        .body(Empty::<bytes::Bytes>::new())
        .unwrap();
    let since = tokio::time::Instant::now();
    let answer = HitlService::new(store).oneshot(request).await.unwrap();
    assert_eq!(answer.status(), 503);
    let took = since.elapsed();
    assert!((Duration::from_secs(2)..Duration::from_millis(2100)).contains(&took));
}

fn keys() -> Auth {
    let line =
        |key: &str, rest: &str| format!("{} {rest}\n", Keys::digest(&ApiKey::new(key).unwrap()));
    let text = line("sk-acme", "acme alice decide")
        + &line("sk-read", "acme dashboard read")
        + &line("sk-other", "other bob decide");
    Auth::keys(Keys::parse(&text).unwrap())
}

#[tokio::test]
async fn with_keys_the_tenant_is_the_keys_own() {
    let store = Disk::default();
    let server = start_with(
        store.clone(),
        |service| service.auth(keys()),
        |server| server,
    )
    .await;
    let ask = |key: &'static str| {
        let call = server.approve("k").without("tenant-id");
        call.header("Authorization", format!("Bearer {key}"))
    };

    let reply = ask("sk-acme").send().await;
    assert_eq!(reply.status, 202);
    assert_eq!(reply.text("tenant_id"), "acme");
    // The same key of another tenant is another action.
    assert_eq!(ask("sk-other").send().await.text("tenant_id"), "other");
    let named = ask("sk-acme").header("Tenant-Id", "acme").send().await;
    assert_eq!(named.status, 409);

    let refused = [
        (
            ask("sk-acme").header("Tenant-Id", "other"),
            403,
            "forbidden",
        ),
        (
            ask("sk-acme").header("Tenant-Id", "a b"),
            400,
            "invalid-request",
        ),
        (ask("sk-read"), 403, "forbidden"),
        (
            server
                .submit("k2")
                .without("tenant-id")
                .header("Authorization", "Bearer sk-read"),
            403,
            "forbidden",
        ),
        (ask("sk-unknown"), 401, "unauthorized"),
        (ask("sk acme"), 401, "unauthorized"),
        (ask(""), 401, "unauthorized"),
        (server.approve("k"), 401, "unauthorized"),
        (
            server
                .approve("k")
                .header("Authorization", "Basic c2stYWNtZQ=="),
            401,
            "unauthorized",
        ),
        (
            ask("sk-acme").header("Authorization", "Bearer sk-acme"),
            400,
            "invalid-request",
        ),
    ];
    for (call, status, code) in refused {
        let reply = call.send().await;
        assert_eq!(
            (reply.status, &*reply.text("code")),
            (status, code),
            "{reply:?}"
        );
        assert_common(&reply);
        assert!(!reply.text("detail").contains("sk-"), "{reply:?}");
    }
    assert_eq!(store.totals().await.unwrap().decisions, 2);

    let id = reply.request_id();
    let look = |key: &'static str| {
        let call = server.status(&id);
        call.header("Authorization", format!("Bearer {key}"))
    };
    assert_eq!(look("sk-read").send().await.text("tenant_id"), "acme");
    assert_eq!(look("sk-other").send().await.status, 404);
    assert_eq!(look("sk-unknown").send().await.status, 401);
    let public = server.status(&id).send().await;
    assert_eq!(public.status, 200);
    assert_eq!(public.json().get("tenant_id"), None);
}

#[tokio::test]
async fn without_keys_a_credential_is_refused_and_not_ignored() {
    let server = start(Disk::default()).await;
    let reply = server
        .approve("k")
        .header("Authorization", "Bearer sk-1")
        .send()
        .await;
    assert_eq!(reply.status, 401);
    assert!(reply.text("detail").contains("no API keys configured"));
}

#[tokio::test]
async fn of_many_calls_at_once_one_is_recorded() {
    let store = Disk::default();
    let server = start(store.clone()).await;
    let calls: Vec<_> = (0..16)
        .map(|i| {
            let call = server
                .approve("k")
                .header("X-Request-Id", format!("call-{i}"));
            tokio::spawn(call.send())
        })
        .collect();
    let mut accepted = 0;
    for call in calls {
        match call.await.unwrap().status {
            202 => accepted += 1,
            status => assert_eq!(status, 409),
        }
    }
    assert_eq!(accepted, 1);
    assert_eq!(store.totals().await.unwrap().decisions, 1);
}
