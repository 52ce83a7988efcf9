//! Removing what is over: what callers are answered afterwards, and what keeps an action.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use aegis_hitl::client::RunOutcome;
use aegis_hitl::layer::Backoff;
use aegis_hitl::outbox::{Endpoint, Outbox, Start};
use aegis_hitl::server::Retention;
use aegis_hitl::store::{
    Actor, AuditTrail, AuditVerifier, Clock, Decide, Decided, Identity, MemoryStore, SqliteStore,
    Store, Submission, Submit, Sweep, Swept,
};
use aegis_hitl::{AegisService, Decision, Execution, Outcome};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::time::sleep;
use uuid::Uuid;

use crate::support::receiver::{Receiver, Reply};
use crate::support::{Running, ends, start, start_with};

pub(super) const HOUR: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(24 * 3600);

const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";

fn identity(key: &str) -> Identity {
    Identity {
        tenant_id: "t".parse().unwrap(),
        thread_id: "h".parse().unwrap(),
        idempotency_key: key.parse().unwrap(),
    }
}

pub(super) async fn approve<St: Store>(store: &St, key: &str) -> Uuid {
    let decide = Decide {
        identity: identity(key),
        decision: Decision::Approve,
        call_id: None,
        payload: None,
        comment: None,
        actor: Actor::new("reviewer"),
        require_submission: false,
        allow_self_approval: true,
    };
    let Decided::Recorded(action) = store.decide(decide).await.unwrap() else {
        panic!("{key} is not new");
    };
    action.request_id.as_uuid().unwrap()
}

fn client_of(server: &Running) -> AegisService {
    AegisService::builder()
        .base_url(format!("http://{}", server.addr))
        .tenant_id("t")
        .thread_id("h")
        .build()
        .unwrap()
}

/// Puts a pending action on record, as the newest one always stays.
pub(super) async fn submit<St: Store>(store: &St) {
    let submit = Submit {
        identity: identity(&Uuid::new_v4().to_string()),
        call_id: None,
        payload: None,
        submission: Submission::default(),
        actor: Actor::new("agent"),
        only_existing: false,
    };
    store.submit(submit).await.unwrap();
}

/// Removes all that has been over for this long, and returns how many went.
pub(super) async fn sweep<St: Store>(store: &St, retention: Duration) -> usize {
    let mut removed = 0;
    loop {
        let sweep = Sweep {
            retention,
            limit: 5,
        };
        let swept = store.sweep(sweep).await.unwrap();
        removed += swept.removed;
        if !swept.has_more {
            return removed;
        }
    }
}

pub(super) async fn is_there<St: Store>(store: &St, id: Uuid) -> bool {
    store.find(id, None).await.unwrap().is_some()
}

pub(super) async fn until<F: Future<Output = bool>>(is: impl Fn() -> F) {
    let waiting = async {
        while !is().await {
            sleep(Duration::from_millis(20)).await;
        }
    };
    ends(waiting).await;
}

/// The actions that these tests ask about, as they were answered when they were decided.
async fn decided(server: &Running) -> [Value; 3] {
    let approved = server.approve("approved").json(r#"{"n": 1}"#).send().await;
    let rejected = server.reject("rejected").json(r#"{"n": 1}"#).send().await;
    let submitted = server.submit("cancelled").json(r#"{"n": 1}"#).send().await;
    let id = submitted.request_id();
    let cancel = format!("/api/v1/hitl/actions/{id}/cancel");
    let cancelled = server.get(&cancel).method("POST").header("Tenant-Id", "t");
    let cancelled = cancelled.json("{}").send().await;
    for reply in [&approved, &rejected, &cancelled] {
        assert_eq!(reply.status, 202, "{reply:?}");
    }
    [approved.json(), rejected.json(), cancelled.json()]
}

#[tokio::test]
async fn what_was_removed_is_answered_by_key_and_unknown_by_id() {
    let folder = TempDir::new().unwrap();
    let embedded = SqliteStore::open(folder.path().join("aegis.db")).unwrap();
    table(embedded.clone()).await;
    table(MemoryStore::new()).await;
    embedded.close().await;
}

pub(super) async fn table<St: Store>(store: St) {
    let server = start(store.clone()).await;
    let actions = decided(&server).await;
    submit(&store).await;
    assert_eq!(sweep(&store, Duration::ZERO).await, 3);

    let rows = [
        ("approve", "approved", r#"{"n": 1}"#, 409, "duplicate"),
        ("approve", "approved", "{}", 409, "duplicate"),
        (
            "reject",
            "approved",
            r#"{"n": 1}"#,
            422,
            "decision-conflict",
        ),
        (
            "approve",
            "approved",
            r#"{"n": 2}"#,
            422,
            "payload-mismatch",
        ),
        ("reject", "approved", r#"{"n": 2}"#, 422, "payload-mismatch"),
        ("reject", "rejected", r#"{"n": 1}"#, 409, "duplicate"),
        ("approve", "rejected", "{}", 422, "decision-conflict"),
        ("reject", "rejected", r#"{"n": 2}"#, 422, "payload-mismatch"),
        ("reject", "cancelled", r#"{"n": 1}"#, 409, "duplicate"),
        ("approve", "cancelled", r#"{"n": 1}"#, 422, "action-closed"),
        (
            "approve",
            "cancelled",
            r#"{"n": 2}"#,
            422,
            "payload-mismatch",
        ),
        (
            "actions",
            "approved",
            r#"{"n": 2}"#,
            422,
            "payload-mismatch",
        ),
        ("actions", "approved", r#"{"n": 1}"#, 200, ""),
        ("actions", "rejected", "{}", 200, ""),
        ("actions", "cancelled", r#"{"n": 1}"#, 200, ""),
    ];
    let strict = start_with(
        store.clone(),
        |service| service.require_submission(true),
        |server| server,
    )
    .await;
    for (verb, key, body, status, code) in rows {
        let known = actions
            .iter()
            .find(|action| action["idempotency_key"] == key)
            .unwrap();
        for server in [&server, &strict] {
            let reply = server.post(verb, key).json(body).send().await;
            assert_eq!(reply.status, status, "{verb} {key} {body}: {reply:?}");
            assert_eq!(reply.text("code"), code, "{verb} {key} {body}");
            let json = reply.json();
            let action = if code.is_empty() {
                &json
            } else {
                &json["action"]
            };
            for member in [
                "request_id",
                "tenant_id",
                "thread_id",
                "idempotency_key",
                "status",
                "decision",
                "closed",
                "execution",
                "digest",
                "created_at",
                "decided_at",
            ] {
                assert_eq!(action[member], known[member], "{verb} {key}: {member}");
            }
            assert_eq!(action["decided_by"], Value::Null, "{action}");
            assert_eq!(action["replayed"], false);
        }
    }
    for action in &actions {
        let id = action["request_id"].as_str().unwrap();
        let at = |path: &str| server.get(&format!("/api/v1/hitl/{path}"));
        let of_tenant = |path: &str| at(path).header("Tenant-Id", "t");
        let body = json!({ "digest": action["digest"] }).to_string();
        let post = |verb: &str| {
            let call = of_tenant(&format!("actions/{id}/{verb}")).method("POST");
            call.json(body.clone())
        };
        for call in [
            at(&format!("status/{id}")),
            of_tenant(&format!("status/{id}")),
            of_tenant(&format!("actions/{id}")),
            post("approve"),
            post("reject"),
            post("claim"),
            of_tenant(&format!("actions/{id}/cancel"))
                .method("POST")
                .json("{}"),
        ] {
            let reply = call.send().await;
            assert_eq!(reply.status, 404, "{reply:?}");
        }
    }
    let list = server.get("/api/v1/hitl/actions").header("Tenant-Id", "t");
    let list = list.send().await.json();
    assert_eq!(list["actions"].as_array().unwrap().len(), 1, "{list}");
    assert_eq!(store.totals().await.unwrap().decisions, 0);
    assert!(server.stop().await.is_drained());
    assert!(strict.stop().await.is_drained());
}

#[tokio::test]
async fn a_client_takes_what_was_removed_for_a_confirmed_duplicate() {
    let store = MemoryStore::new();
    let server = start(store.clone()).await;
    let aegis = client_of(&server);
    let first = aegis.approve("k").await.unwrap();
    submit(&store).await;
    assert_eq!(sweep(&store, Duration::ZERO).await, 1);
    let again = aegis.approve("k").await.unwrap();
    assert_eq!(again.outcome(), Outcome::Duplicate);
    assert_eq!(again.request_id(), first.request_id());
    assert!(aegis.reject("k").await.unwrap_err().is_conflict());
    assert!(server.stop().await.is_drained());
}

#[tokio::test]
async fn a_stream_of_events_resumes_behind_an_event_that_was_removed() {
    let store = MemoryStore::new();
    let server = start(store.clone()).await;
    approve(&store, "k-1").await;
    let position = store.newest_event().await.unwrap();
    approve(&store, "k-2").await;
    submit(&store).await;
    assert_eq!(sweep(&store, Duration::ZERO).await, 2);
    let url = format!("http://{}/api/v1/hitl/events", server.addr);
    for last in ["0".to_owned(), position.to_string()] {
        let request = reqwest::Client::new().get(&url).header("Tenant-Id", "t");
        let mut reply = request.header("Last-Event-ID", last).send().await.unwrap();
        assert_eq!(reply.status(), 200);
        let mut text = String::new();
        while !text.contains("event:") {
            let chunk = ends(reply.chunk()).await.unwrap().unwrap();
            text.push_str(std::str::from_utf8(&chunk).unwrap());
        }
        assert!(text.contains("event: submitted"), "{text}");
    }
    server.begin_stop().abort();
}

#[tokio::test]
async fn a_retention_removes_what_is_older_and_nothing_else() {
    let folder = TempDir::new().unwrap();
    let clock = Clock::new();
    let path = folder.path().join("aegis.db");
    let store = SqliteStore::open_with(&path, clock.clone()).unwrap();
    let mut old = Vec::new();
    for number in 0..300 {
        old.push(approve(&store, &format!("old-{number}")).await);
    }
    clock.advance(2 * HOUR);
    let new = approve(&store, "new").await;
    submit(&store).await;
    let retention = Retention::new(HOUR).unwrap();
    let sweeping = tokio::spawn({
        let store = store.clone();
        async move { retention.run(store).await }
    });
    until(|| async { store.statistics().removed == 300 }).await;
    sweeping.abort();
    assert!(!is_there(&store, old[0]).await);
    assert!(is_there(&store, new).await);
    store.close().await;
    let verified = SqliteStore::verify(&path).unwrap();
    assert_eq!(verified.faults, Vec::<String>::new());
    assert_eq!(verified.totals.removed, 300);
    assert_eq!(verified.totals.actions, 2);
}

#[test]
fn a_retention_of_less_than_a_second_is_refused() {
    let error = Retention::new(Duration::from_millis(999)).unwrap_err();
    assert!(error.to_string().contains("999ms"), "{error}");
    assert!(error.to_string().contains("1s or more"), "{error}");
}

#[tokio::test]
async fn a_clock_that_steps_back_delays_a_removal_and_hastens_none() {
    let folder = TempDir::new().unwrap();
    for embedded in [true, false] {
        let clock = Clock::standing_at(std::time::SystemTime::now());
        if embedded {
            let path = folder.path().join("aegis.db");
            let store = SqliteStore::open_with(&path, clock.clone()).unwrap();
            steps(&store, &clock).await;
            store.close().await;
            let verified = SqliteStore::verify(&path).unwrap();
            assert_eq!(verified.faults, Vec::<String>::new());
        } else {
            steps(&MemoryStore::with_clock(clock.clone()), &clock).await;
        }
    }
}

pub(super) async fn steps<St: Store>(store: &St, clock: &Clock) {
    let before = approve(store, "before").await;
    clock.advance(10 * DAY);
    let ahead = approve(store, "ahead").await;
    clock.set_back(10 * DAY);
    let after = approve(store, "after").await;
    submit(store).await;
    assert_eq!(sweep(store, HOUR).await, 0);
    clock.advance(2 * HOUR);
    submit(store).await;
    // What was decided by the wrong clock keeps nothing else, and stays until its time.
    assert_eq!(sweep(store, HOUR).await, 2);
    assert!(!is_there(store, before).await && !is_there(store, after).await);
    assert!(is_there(store, ahead).await);
    clock.advance(9 * DAY);
    assert_eq!(sweep(store, HOUR).await, 0);
    // Far behind everything on record, nothing goes, whether something new comes or not.
    let last = approve(store, "last").await;
    clock.set_back(300 * DAY);
    assert_eq!(sweep(store, HOUR).await, 0);
    submit(store).await;
    assert_eq!(sweep(store, HOUR).await, 0);
    assert!(is_there(store, ahead).await && is_there(store, last).await);
    clock.advance(300 * DAY);
    clock.advance(2 * DAY);
    submit(store).await;
    assert_eq!(sweep(store, HOUR).await, 2);
    assert!(!is_there(store, ahead).await && !is_there(store, last).await);
}

#[tokio::test]
async fn an_action_goes_only_once_its_webhook_has_had_its_events() {
    let folder = TempDir::new().unwrap();
    let store = SqliteStore::open(folder.path().join("aegis.db")).unwrap();
    goes_once_delivered(&store).await;
    store.close().await;
}

pub(super) async fn goes_once_delivered<St: Store>(store: &St) {
    let is_up = Arc::new(AtomicBool::new(false));
    let up = is_up.clone();
    let receiver =
        Receiver::start(move |_| Reply::Status(if up.load(Ordering::SeqCst) { 204 } else { 500 }))
            .await;
    let secrets = vec![SECRET.parse().unwrap()];
    let endpoint = Endpoint::standard("a", &receiver.url(), secrets).unwrap();
    let deliveries = Outbox::new(vec![endpoint.start(Start::Oldest)])
        .backoff(Backoff::constant(Duration::from_millis(30)))
        .poll_interval(Duration::from_millis(50))
        .start(store.clone())
        .await
        .unwrap();
    ends(deliveries.taken()).await;
    let id = approve(store, "k").await;
    submit(store).await;
    // Not offered yet, or parked: either keeps it.
    for _ in 0..5 {
        assert_eq!(sweep(store, Duration::ZERO).await, 0);
        sleep(Duration::from_millis(20)).await;
    }
    receiver.until(|received| received.len() >= 3).await;
    assert_eq!(sweep(store, Duration::ZERO).await, 0);
    assert!(is_there(store, id).await);
    is_up.store(true, Ordering::SeqCst);
    receiver.until_accepted(2).await;
    until(|| async { sweep(store, Duration::ZERO).await == 1 }).await;
    assert!(!is_there(store, id).await);
    deliveries.stop(Duration::from_secs(5)).await;
}

#[tokio::test]
async fn endpoints_are_taken_once_the_store_has_said_so() {
    let store = MemoryStore::new();
    store.set_unavailable(true);
    let receiver = Receiver::accepting().await;
    let secrets = vec![SECRET.parse().unwrap()];
    let endpoint = Endpoint::standard("a", &receiver.url(), secrets).unwrap();
    let deliveries = Outbox::new(vec![endpoint])
        .poll_interval(Duration::from_millis(20))
        .start(store.clone())
        .await
        .unwrap();
    let taken = deliveries.taken();
    let mut taken = std::pin::pin!(taken);
    let early = tokio::time::timeout(Duration::from_millis(100), &mut taken).await;
    assert!(early.is_err(), "taken from a store that answers nothing");
    store.set_unavailable(false);
    ends(taken).await;
    assert_eq!(store.endpoints().await.unwrap().len(), 1);
    deliveries.stop(Duration::from_secs(1)).await;
    // Nobody has to be waited for without endpoints.
    let none = Outbox::new(Vec::new()).start(store).await.unwrap();
    ends(none.taken()).await;
}

#[tokio::test]
async fn a_sweep_of_a_store_with_nothing_to_remove_writes_nothing() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("aegis.db");
    let store = SqliteStore::open(&path).unwrap();
    approve(&store, "k").await;
    let log = || std::fs::metadata(folder.path().join("aegis.db-wal")).unwrap();
    let before = log().len();
    let sweep = Sweep {
        retention: HOUR,
        limit: 10,
    };
    let nothing = Swept {
        removed: 0,
        has_more: false,
    };
    for _ in 0..50 {
        assert_eq!(store.sweep(sweep.clone()).await.unwrap(), nothing);
    }
    assert_eq!(log().len(), before);
    store.close().await;
}

#[tokio::test]
async fn a_large_action_goes_in_a_step_of_its_own() {
    let folder = TempDir::new().unwrap();
    let store = SqliteStore::open(folder.path().join("aegis.db")).unwrap();
    let server = start_with(
        store.clone(),
        |service| service.body_limit(4 << 20),
        |server| server,
    )
    .await;
    let body = json!({ "text": "a".repeat(3 << 20) }).to_string();
    for key in ["k-1", "k-2", "k-3"] {
        let reply = server.approve(key).json(body.clone()).send().await;
        assert_eq!(reply.status, 202, "{reply:?}");
    }
    submit(&store).await;
    let sweep = Sweep {
        retention: Duration::ZERO,
        limit: 100,
    };
    let mut steps = 0;
    loop {
        let swept = store.sweep(sweep.clone()).await.unwrap();
        assert!(swept.removed <= 1, "{swept:?}");
        steps += swept.removed;
        if !swept.has_more {
            break;
        }
    }
    assert_eq!(steps, 3);
    assert!(server.stop().await.is_drained());
    store.close().await;
}

#[tokio::test]
async fn a_row_that_an_edit_has_spoilt_stays_and_keeps_nothing_else() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("aegis.db");
    let store = SqliteStore::open(&path).unwrap();
    for key in ["k-1", "k-2", "k-3"] {
        approve(&store, key).await;
    }
    submit(&store).await;
    crate::support::rows::edit(&path, "thread_id = ''", "k-2");
    assert_eq!(sweep(&store, Duration::ZERO).await, 2);
    assert_eq!(store.totals().await.unwrap().decisions, 1);
    store.close().await;
}

#[tokio::test]
async fn an_agent_never_runs_again_what_was_removed() {
    let store = MemoryStore::new();
    let server = start(store.clone()).await;
    let aegis = client_of(&server);
    let ran = AtomicUsize::new(0);
    let run = |key: &'static str| {
        aegis.action(key).run_once(|_| async {
            ran.fetch_add(1, Ordering::SeqCst);
            Ok::<_, std::io::Error>(7)
        })
    };
    // It runs once it is on record and approved.
    let approving = async {
        until(|| async { store.totals().await.unwrap().actions == 1 }).await;
        assert_eq!(server.approve("completed").send().await.status, 202);
    };
    let (first, ()) = tokio::join!(run("completed"), approving);
    first.unwrap();
    assert_eq!(ran.load(Ordering::SeqCst), 1);
    approve(&store, "unclaimed").await;
    assert_eq!(server.reject("rejected").send().await.status, 202);
    submit(&store).await;
    assert_eq!(sweep(&store, Duration::ZERO).await, 3);
    let RunOutcome::AlreadyRun(action) = ends(run("completed")).await.unwrap() else {
        panic!("the completion is not known");
    };
    assert_eq!(action.execution, Some(Execution::Completed));
    let RunOutcome::Removed(action) = ends(run("unclaimed")).await.unwrap() else {
        panic!("the approval is not known");
    };
    assert_eq!(action.decision, Some(Decision::Approve));
    let rejected = ends(run("rejected")).await.unwrap();
    assert!(matches!(rejected, RunOutcome::Rejected(_)), "{rejected:?}");
    assert_eq!(ran.load(Ordering::SeqCst), 1, "it ran again");
    assert!(server.stop().await.is_drained());
}

/// The lines of a tenant's whole trail.
fn exported(trail: &AuditTrail, tenant: &str) -> Vec<String> {
    let mut lines = Vec::from([trail.first_line(tenant, 0).unwrap().unwrap()]);
    let head = trail.head(tenant).unwrap();
    let mut seq = 0;
    while let Some(page) = trail.page(tenant, seq, u64::MAX, 50).unwrap() {
        lines.extend(page.lines);
        seq = page.seq;
    }
    lines.push(head.line());
    lines
}

#[tokio::test]
async fn what_was_removed_leaves_its_links_in_the_audit_chain() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("aegis.db");
    let store = SqliteStore::open(&path).unwrap();
    // More than a sweep chains at a time, and sooner than anything else chains them.
    for number in 0..300 {
        approve(&store, &format!("k-{number}")).await;
    }
    submit(&store).await;
    assert_eq!(sweep(&store, Duration::ZERO).await, 300);
    approve(&store, "later").await;
    let trail = AuditTrail::open(&path).unwrap();
    until(async || trail.head("t").unwrap().unchained == 0).await;
    let report = trail.verify(None).unwrap();
    assert_eq!(
        (report.removed, report.faults.len()),
        (300, 0),
        "{report:?}"
    );
    let lines = exported(&trail, "t");
    let mut verifier = AuditVerifier::new();
    for line in &lines {
        verifier.line(line).unwrap();
    }
    assert_eq!(verifier.finish().unwrap().len(), 1);
    // A removed event leaves no more than its hash.
    assert!(!lines.concat().contains("k-299") && lines.concat().contains("later"));
    store.close().await;
    assert_eq!(SqliteStore::verify(&path).unwrap().faults, [""; 0]);
}
