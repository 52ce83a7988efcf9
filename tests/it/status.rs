//! `GET /hitl/status/{request_id}`: its two views, its one 404, and waiting for a decision.

use std::time::Duration;

use tokio::time::timeout;
use uuid::Uuid;

use crate::support::{Call, Disk, Faulty, HANG, Mood, Running, start, start_with};

/// Submits an action and returns its id.
async fn submitted(server: &Running, key: &str) -> String {
    let reply = server.submit(key).json(r#"{"to":"a@b.c"}"#).send().await;
    assert_eq!(reply.status, 201);
    reply.request_id()
}

#[tokio::test]
async fn without_credentials_only_the_state_is_shown() {
    let server = start(Disk::default()).await;
    let id = submitted(&server, "k").await;
    let reply = server.status(&id).send().await;
    assert_eq!(reply.status, 200);
    assert_eq!(reply.header("cache-control"), Some("no-store"));
    let body = reply.json();
    let members: Vec<_> = body.as_object().unwrap().keys().collect();
    assert_eq!(
        members,
        [
            "closed",
            "created_at",
            "decided_at",
            "decision",
            "execution",
            "request_id",
            "status"
        ]
    );
    assert_eq!(body["status"], "PENDING");
    assert!(body["decided_at"].is_null() && body["created_at"].is_string());
}

#[tokio::test]
async fn with_credentials_everything_is_shown() {
    let server = start(Disk::default()).await;
    let id = submitted(&server, "k").await;
    let decide = server.approve("k").json(r#"{"aegis":{"comment":"fine"}}"#);
    assert_eq!(decide.send().await.status, 202);
    let body = server
        .status(&id)
        .header("Tenant-Id", "t")
        .send()
        .await
        .json();
    assert_eq!(body["payload"]["to"], "a@b.c");
    assert_eq!(body["comment"], "fine");
    assert_eq!(body["decision"], "approve");
    assert_eq!(body["idempotency_key"], "k");
    assert!(body["decided_at"].is_string());
}

#[tokio::test]
async fn unknown_malformed_and_another_tenants_are_one_404() {
    let server = start(Disk::default()).await;
    let id = submitted(&server, "k").await;
    let unknown = server.status(&Uuid::new_v4().to_string()).send().await;
    assert_eq!(unknown.status, 404);
    for id in [
        "x",
        "no-uuid",
        "c232ab00-9414-11ec-b3c8-9f6bdeced846",
        "%2e%2e",
        &id.replace('-', "%2d"),
        &"x".repeat(300),
    ] {
        let reply = server.status(id).send().await;
        assert_eq!(reply.without_date(), unknown.without_date(), "{id}");
    }
    let other = server.status(&id).header("Tenant-Id", "u").send().await;
    assert_eq!(other.without_date(), unknown.without_date());
}

#[tokio::test]
async fn an_action_is_found_by_the_x_request_id_of_a_call() {
    let server = start(Disk::default()).await;
    let call_id = Uuid::new_v4().to_string();
    let call = server.approve("k").header("X-Request-Id", &call_id);
    let id = call.send().await.request_id();
    assert_ne!(id, call_id);
    assert_eq!(server.status(&call_id).send().await.request_id(), id);

    // Once it names two actions it names none.
    let call = server.approve("k2").header("X-Request-Id", &call_id);
    assert_eq!(call.send().await.status, 202);
    assert_eq!(server.status(&call_id).send().await.status, 404);
}

#[tokio::test]
async fn a_head_has_the_headers_of_a_get_and_no_body() {
    let server = start(Disk::default()).await;
    let id = submitted(&server, "k").await;
    let get = server.status(&id).send().await;
    for call in [server.status(&id), server.status(&id).http2()] {
        let head = call.method("HEAD").send().await;
        assert!(head.body.is_empty());
        assert_eq!(head.status, 200);
        assert_eq!(head.header("content-length"), get.header("content-length"));
        assert_eq!(head.header("content-type"), get.header("content-type"));
    }
}

#[tokio::test]
async fn a_decision_ends_the_wait() {
    let store = Faulty::new(Disk::default(), Mood::Well);
    let server = start_with(
        store.clone(),
        // Only a wake-up can end it in time.
        |service| service.poll_interval(Duration::from_secs(3600)),
        |server| server,
    )
    .await;
    let id = submitted(&server, "k").await;
    let before = store.asked();
    let wait = server.status(&id).header("Prefer", "wait=55");
    let wait = tokio::spawn(wait.send());
    // The first look resolves the id, the second one is the last before the wait.
    while store.asked() < before + 2 {
        store.arrived().await;
    }
    assert_eq!(server.reject("k").send().await.status, 202);
    let reply = timeout(HANG, wait).await.unwrap().unwrap();
    assert_eq!(reply.status, 200);
    assert_eq!(reply.text("decision"), "reject");
    assert_eq!(reply.header("preference-applied"), Some("wait=55"));
}

#[tokio::test]
async fn a_poll_finds_the_decision_when_the_wake_up_is_lost() {
    // The second store shares nothing with the first one but the records.
    let store = Disk::default();
    let server = start_with(
        store.without_wake_ups(),
        |service| service.poll_interval(Duration::from_millis(20)),
        |server| server,
    )
    .await;
    let decider = start(store).await;
    let id = submitted(&server, "k").await;
    let wait = server.status(&id).header("Prefer", "wait=55");
    let wait = tokio::spawn(wait.send());
    assert_eq!(decider.approve("k").send().await.status, 202);
    let reply = timeout(HANG, wait).await.unwrap().unwrap();
    assert_eq!(reply.text("decision"), "approve");
}

#[tokio::test]
async fn a_wait_that_is_over_shows_the_present_state() {
    let server = start(Disk::default()).await;
    let id = submitted(&server, "k").await;
    for seconds in ["0", "1"] {
        let wait = server
            .status(&id)
            .header("Prefer", format!("wait={seconds}"));
        let reply = wait.send().await;
        assert_eq!(reply.status, 200);
        assert_eq!(reply.text("status"), "PENDING");
        let applied = format!("wait={seconds}");
        assert_eq!(reply.header("preference-applied"), Some(&*applied));
    }
}

#[tokio::test(start_paused = true)]
async fn a_wait_takes_55_seconds_at_most() {
    use aegis_hitl::server::HitlService;
    use aegis_hitl::store::{Actor, Identity, Store, Submission, Submit, Submitted};
    use aegis_hitl::{IdempotencyKey, TenantId, ThreadId};
    use tower::ServiceExt;

    let store = Disk::default();
    let submit = Submit {
        identity: Identity {
            tenant_id: TenantId::new("t").unwrap(),
            thread_id: ThreadId::new("h").unwrap(),
            idempotency_key: IdempotencyKey::new("k").unwrap(),
        },
        call_id: None,
        payload: None,
        submission: Submission::default(),
        only_existing: false,
        actor: Actor::new("test"),
    };
    let Submitted::Recorded(action) = store.submit(submit).await.unwrap() else {
        panic!("it is new");
    };
    let request = http::Request::get(format!("/api/v1/hitl/status/{}", action.request_id))
        .header("Prefer", "wait=999")
        .body(http_body_util::Empty::<bytes::Bytes>::new())
        .unwrap();
    let since = tokio::time::Instant::now();
    let answer = HitlService::new(store).oneshot(request).await.unwrap();
    assert_eq!(answer.status(), 200);
    assert_eq!(answer.headers()["preference-applied"], "wait=55");
    let took = since.elapsed();
    assert!((Duration::from_secs(55)..Duration::from_secs(56)).contains(&took));
}

#[tokio::test]
async fn a_decided_action_is_not_waited_for() {
    let server = start(Disk::default()).await;
    let id = server.approve("k").send().await.request_id();
    let wait = server.status(&id).header("Prefer", "wait=55").send();
    let reply = timeout(HANG, wait).await.unwrap();
    assert_eq!(reply.text("status"), "COMMITTED");
}

#[tokio::test]
async fn a_malformed_preference_is_ignored() {
    let server = start(Disk::default()).await;
    let id = submitted(&server, "k").await;
    for prefer in ["wait=soon", "wait", "wait=-1", "respond-async", "é"] {
        let ask = server.status(&id).header("Prefer", prefer).send();
        let reply = timeout(HANG, ask).await.unwrap();
        assert_eq!(reply.status, 200, "{prefer}");
        assert_eq!(reply.header("preference-applied"), None, "{prefer}");
    }
}

#[tokio::test]
async fn malformed_headers_of_a_status_request_are_refused() {
    let server = start(Disk::default()).await;
    let id = submitted(&server, "k").await;
    let cases = [
        server.status(&id).header("Tenant-Id", "a b"),
        server
            .status(&id)
            .header("Tenant-Id", "t")
            .header("Tenant-Id", "t"),
        server.status(&id).header("X-Request-Id", ""),
    ];
    for call in cases {
        assert_eq!(call.send().await.status, 400);
    }
    let credential = server.status(&id).header("Authorization", "Bearer x");
    assert_eq!(credential.send().await.status, 401);
}

#[tokio::test]
async fn a_tenant_finds_its_action_whatever_other_tenants_call_theirs() {
    let server = start(Disk::default()).await;
    let call_id = Uuid::new_v4().to_string();
    let mut ids = Vec::new();
    for tenant in ["t", "u"] {
        let call = Call::new(server.addr, "POST", "/api/v1/hitl/approve")
            .header("Tenant-Id", tenant)
            .header("Thread-Id", "r")
            .header("Idempotency-Key", "k")
            .header("X-Request-Id", &call_id);
        ids.push(call.send().await.request_id());
    }
    for (tenant, id) in ["t", "u"].iter().zip(&ids) {
        let status = server.status(&call_id).header("Tenant-Id", tenant);
        let reply = status.send().await;
        assert_eq!((reply.status, &reply.request_id()), (200, id));
    }
    // Without a tenant nobody can tell which of the two is meant.
    assert_eq!(server.status(&call_id).send().await.status, 404);
}

#[tokio::test]
async fn a_duplicates_call_id_finds_the_action_that_it_was_answered_with() {
    let server = start(Disk::default()).await;
    let id = server.approve("k").send().await.request_id();
    let call_id = Uuid::new_v4().to_string();
    let call = server.approve("k").header("X-Request-Id", &call_id);
    assert_eq!(call.send().await.status, 409);
    assert_eq!(server.status(&call_id).send().await.request_id(), id);
}
