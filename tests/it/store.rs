//! The stores: the suite that all of them pass, and what is the embedded store's own.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use aegis_hitl::store::{
    Actor, Decide, Decided, Fingerprinted, Identity, MemoryStore, SqliteStore, Store, StoreError,
    Submission, Submit, conformance,
};
use aegis_hitl::{Action, Decision, Execution, IdempotencyKey, Payload, RequestId, Status};
use rusqlite::Connection;
use tempfile::TempDir;
use uuid::Uuid;

fn decision(key: &str, decision: Decision) -> Decide {
    Decide {
        identity: Identity {
            tenant_id: "my-tenant".parse().unwrap(),
            thread_id: "my-thread".parse().unwrap(),
            idempotency_key: key.parse().unwrap(),
        },
        decision,
        call_id: Some(RequestId::mint()),
        payload: None,
        comment: None,
        actor: Actor::new("anonymous"),
        require_submission: false,
        allow_self_approval: true,
    }
}

fn approval(key: &str) -> Decide {
    decision(key, Decision::Approve)
}

async fn record(store: &SqliteStore, request: Decide) -> Action {
    match store.decide(request).await.unwrap() {
        Decided::Recorded(action) => action,
        other => panic!("not recorded: {other:?}"),
    }
}

fn id(action: &Action) -> Uuid {
    action.request_id.as_uuid().unwrap()
}

fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn the_memory_store_conforms() {
    conformance::run(|| async { MemoryStore::new() }).await;
    conformance::run_retention(|| async { vec![MemoryStore::new()] }).await;
}

/// Opens embedded stores, each in a folder that is kept with it.
fn embedded(folders: &Mutex<Vec<TempDir>>) -> SqliteStore {
    let folder = TempDir::new().unwrap();
    let store = SqliteStore::open(folder.path().join("aegis.db")).unwrap();
    folders.lock().unwrap().push(folder);
    store
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn the_embedded_store_conforms() {
    let folders = Mutex::new(Vec::new());
    conformance::run(|| async { embedded(&folders) }).await;
    conformance::run_retention(|| async { vec![embedded(&folders)] }).await;
}

#[tokio::test]
async fn handles_of_the_embedded_store_conform_together_on_one_thread() {
    let folders = Mutex::new(Vec::new());
    let two = async || {
        let store = embedded(&folders);
        vec![store.clone(), store]
    };
    conformance::run_together(&two).await;
    conformance::run_retention(&two).await;
}

#[tokio::test]
async fn the_memory_store_fails_on_demand() {
    let store = MemoryStore::new();
    store.set_unavailable(true);
    assert!(store.check().await.unwrap_err().is_unavailable());
    assert!(store.decide(approval("k")).await.is_err());
    store.set_unavailable(false);
    let decided = store.decide(approval("k")).await.unwrap();
    assert!(matches!(decided, Decided::Recorded(_)), "{decided:?}");
}

#[tokio::test]
async fn what_was_recorded_is_there_after_reopening() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("aegis.db");
    let mut request = approval("k");
    request.payload = Some(Fingerprinted::new(Payload::from_json(r#"{"n": 1}"#).unwrap()).unwrap());
    request.comment = Some("fine".to_owned());
    let store = SqliteStore::open(&path).unwrap();
    let recorded = record(&store, request.clone()).await;
    store.close().await;

    let store = SqliteStore::open(&path).unwrap();
    assert_eq!(
        store.find(id(&recorded), None).await.unwrap(),
        Some(recorded)
    );
    let decided = store.decide(request).await.unwrap();
    assert!(matches!(decided, Decided::Replayed(_)), "{decided:?}");
}

#[tokio::test]
async fn a_closed_store_refuses_and_leaves_one_file_and_its_lock() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("aegis.db");
    let store = SqliteStore::open(&path).unwrap();
    record(&store, approval("k")).await;
    let other_handle = store.clone();
    store.close().await;
    store.close().await;
    for error in [
        other_handle.decide(approval("k")).await.unwrap_err(),
        other_handle.find(Uuid::new_v4(), None).await.unwrap_err(),
        other_handle.totals().await.unwrap_err(),
        other_handle.check().await.unwrap_err(),
    ] {
        assert!(error.is_unavailable(), "{error}");
    }
    let mut names: Vec<_> = fs::read_dir(folder.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    names.sort();
    assert_eq!(names, ["aegis.db", "aegis.db.lock"]);
}

#[tokio::test]
async fn dropping_the_last_handle_still_records_what_was_asked_for() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("aegis.db");
    let store = SqliteStore::open(&path).unwrap();
    for key in 0..100 {
        let mut asked = tokio_test::task::spawn(store.decide(approval(&format!("k-{key}"))));
        let _ = asked.poll();
    }
    drop(store);
    // Closing goes on in the background, and ends when the lock is released.
    let store = loop {
        match SqliteStore::open(&path) {
            Ok(store) => break store,
            Err(error) => assert!(error.is_in_use(), "{error}"),
        }
        std::thread::yield_now();
    };
    assert_eq!(store.totals().await.unwrap().decisions, 100);
}

#[tokio::test]
async fn a_second_open_in_one_process_is_refused_by_any_path() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("aegis.db");
    let store = SqliteStore::open(&path).unwrap();
    let mut paths = vec![path.clone(), folder.path().join(".").join("aegis.db")];
    #[cfg(unix)]
    {
        let link = folder.path().join("link.db");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        paths.push(link);
    }
    for other in paths {
        let error = SqliteStore::open(&other).unwrap_err();
        assert!(error.is_in_use(), "{error}");
        let path = fs::canonicalize(&path).unwrap();
        assert_eq!(
            error.to_string(),
            format!(
                "the database {} is held by this process; one server at a time may hold it",
                path.display()
            )
        );
    }
    record(&store, approval("k")).await;
}

#[cfg(unix)]
#[tokio::test]
async fn its_files_are_readable_by_the_owner_alone() {
    use std::os::unix::fs::PermissionsExt;

    let folder = TempDir::new().unwrap();
    let path = folder.path().join("aegis.db");
    let store = SqliteStore::open(&path).unwrap();
    record(&store, approval("k")).await;
    for suffix in ["", "-wal", "-shm", ".lock"] {
        let metadata = fs::metadata(beside(&path, suffix)).unwrap();
        assert_eq!(metadata.permissions().mode() & 0o777, 0o600, "{suffix}");
    }
}

fn refused(path: &Path) -> String {
    let error: StoreError = SqliteStore::open(path).unwrap_err();
    assert!(error.is_incompatible(), "{error}");
    let message = error.to_string();
    assert!(message.contains(&*path.to_string_lossy()), "{message}");
    message
}

#[test]
fn a_path_that_cannot_be_a_database_is_refused() {
    let folder = TempDir::new().unwrap();
    let folder = fs::canonicalize(folder.path()).unwrap();
    refused(&folder);
    refused(&folder.join("missing").join("aegis.db"));
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink(folder.join("missing").join("x"), folder.join("link")).unwrap();
        refused(&folder.join("link"));
    }
    let text = folder.join("notes.txt");
    fs::write(
        &text,
        "not a database, but long enough to be read as one ".repeat(50),
    )
    .unwrap();
    let before = fs::read(&text).unwrap();
    let message = refused(&text);
    assert!(message.contains("is not a SQLite database"), "{message}");
    assert_eq!(fs::read(&text).unwrap(), before);
}

#[test]
fn another_applications_database_is_refused_and_left_as_it_was() {
    let folder = TempDir::new().unwrap();
    let path = fs::canonicalize(folder.path()).unwrap().join("other.db");
    let other = Connection::open(&path).unwrap();
    other.execute_batch("CREATE TABLE t (x)").unwrap();
    other.close().unwrap();
    let before = fs::read(&path).unwrap();
    let message = refused(&path);
    assert!(message.contains("another application"), "{message}");
    assert_eq!(fs::read(&path).unwrap(), before);
}

#[tokio::test]
async fn a_newer_schema_is_refused() {
    let folder = TempDir::new().unwrap();
    let path = fs::canonicalize(folder.path()).unwrap().join("aegis.db");
    SqliteStore::open(&path).unwrap().close().await;
    let other = Connection::open(&path).unwrap();
    other.pragma_update(None, "user_version", 99).unwrap();
    drop(other);
    let message = refused(&path);
    assert!(message.contains("schema version 99"), "{message}");
}

#[tokio::test]
async fn a_failed_action_is_decided_again_with_its_own_event() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("aegis.db");
    let store = SqliteStore::open(&path).unwrap();
    let first = approval("k");
    let approved = record(&store, first.clone()).await;
    let operator = Connection::open(&path).unwrap();
    operator
        .execute(
            "UPDATE action SET status = 'FAILED', execution = 'unknown'",
            [],
        )
        .unwrap();
    let failed = store.find(id(&approved), None).await.unwrap().unwrap();
    assert_eq!(failed.status, Status::Failed);
    assert_eq!(failed.execution, Some(Execution::Unknown));

    let again = record(&store, decision("k", Decision::Reject)).await;
    assert_eq!(again.request_id, approved.request_id);
    assert_eq!(again.decision, Some(Decision::Reject));
    assert_eq!(again.execution, None);
    assert_eq!(store.find(id(&approved), None).await.unwrap(), Some(again));
    // Both calls made a transition of this action, so both name it.
    let call = first.call_id.as_ref().unwrap().as_uuid().unwrap();
    assert!(store.find(call, None).await.unwrap().is_some());
    let decided = store.decide(first).await.unwrap();
    assert!(matches!(decided, Decided::Conflict(_)), "{decided:?}");

    let totals = store.totals().await.unwrap();
    assert_eq!((totals.decisions, totals.events), (1, 2));
    let trail: String = operator
        .query_row(
            "SELECT group_concat(concat(kind, ':', from_status, '>', to_status), ' ') FROM event",
            [],
            |row| row.get(0),
        )
        .unwrap();
    assert_eq!(trail, "approved:>COMMITTED rejected:FAILED>COMMITTED");
}

#[tokio::test]
async fn a_closed_action_answers_closed_to_the_opposite_decision_alone() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("aegis.db");
    let store = SqliteStore::open(&path).unwrap();
    for closed in ["expired", "cancelled"] {
        let request = decision(closed, Decision::Reject);
        let mut rejected = record(&store, request.clone()).await;
        rejected.closed = Some(closed.parse().unwrap());
        let operator = Connection::open(&path).unwrap();
        operator
            .execute(
                "UPDATE action SET closed = ?1 WHERE idempotency_key = ?1",
                [closed],
            )
            .unwrap();
        assert_eq!(
            store.decide(approval(closed)).await.unwrap(),
            Decided::Closed(rejected.clone())
        );
        assert_eq!(
            store
                .decide(decision(closed, Decision::Reject))
                .await
                .unwrap(),
            Decided::Duplicate(rejected.clone())
        );
        // The call that closed it was no decision, so this is no retry.
        let again = store.decide(request).await.unwrap();
        assert_eq!(again, Decided::Duplicate(rejected));
    }
    assert_eq!(store.totals().await.unwrap().events, 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_operators_lock_makes_requests_fail_and_reads_go_on() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("aegis.db");
    let store = SqliteStore::open(&path).unwrap();
    let recorded = record(&store, approval("k")).await;
    let operator = Connection::open(&path).unwrap();
    operator.execute_batch("BEGIN IMMEDIATE").unwrap();
    // More than the queue holds: the rest is refused at once.
    let asked: Vec<_> = (0..6000)
        .map(|key| {
            let store = store.clone();
            tokio::spawn(async move { store.decide(approval(&format!("k-{key}"))).await })
        })
        .collect();
    assert!(store.find(id(&recorded), None).await.unwrap().is_some());
    let mut errors = 0;
    let mut decided = 1;
    for asked in asked {
        match asked.await.unwrap() {
            Ok(Decided::Recorded(_)) => decided += 1,
            Ok(other) => panic!("{other:?}"),
            Err(error) => {
                assert!(error.is_unavailable(), "{error}");
                errors += 1;
            }
        }
    }
    assert!(errors > 0);
    operator.execute_batch("ROLLBACK").unwrap();
    store.check().await.unwrap();
    let totals = store.totals().await.unwrap();
    assert_eq!((totals.decisions, totals.events), (decided, decided));
    record(&store, approval("k-0")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_that_wait_take_no_more_than_64_mib() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("aegis.db");
    let store = SqliteStore::open(&path).unwrap();
    record(&store, approval("k")).await;
    let operator = Connection::open(&path).unwrap();
    operator.execute_batch("BEGIN IMMEDIATE").unwrap();
    let text = format!(r#"{{"text": "{}"}}"#, "x".repeat(255 * 1024));
    let payload = Fingerprinted::new(Payload::from_json(&text).unwrap()).unwrap();
    let large = |key: usize| Decide {
        payload: Some(payload.clone()),
        ..approval(&format!("k-{key}"))
    };
    let mut waiting = Vec::new();
    let mut refused = Vec::new();
    for key in 0..400 {
        let mut asked = tokio_test::task::spawn({
            let (store, request) = (store.clone(), large(key));
            async move { store.decide(request).await }
        });
        match asked.poll() {
            std::task::Poll::Pending => waiting.push(asked),
            std::task::Poll::Ready(answer) => refused.push((key, answer.unwrap_err())),
        }
    }
    operator.execute_batch("ROLLBACK").unwrap();
    assert!((200..=256).contains(&waiting.len()), "{}", waiting.len());
    for (_, error) in &refused {
        assert!(error.is_unavailable(), "{error}");
        assert!(error.to_string().contains("64 MiB"), "{error}");
    }
    let mut recorded = 1;
    for asked in waiting {
        // One that the operator kept waiting for too long may be refused, but each has its answer.
        recorded += u64::from(asked.await.is_ok());
    }
    assert_eq!(store.totals().await.unwrap().decisions, recorded);
    // There is room again, and what was refused is on record nowhere.
    for (key, _) in refused {
        record(&store, large(key)).await;
    }
}

#[tokio::test]
async fn a_decision_is_not_before_its_action_where_the_clock_steps_back() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("aegis.db");
    let store = SqliteStore::open(&path).unwrap();
    let request = approval("k");
    let submit = Submit {
        identity: request.identity.clone(),
        call_id: None,
        payload: None,
        submission: Submission::default(),
        only_existing: false,
        actor: Actor::new("agent"),
    };
    store.submit(submit).await.unwrap();
    // As if the clock had been an hour ahead.
    let operator = Connection::open(&path).unwrap();
    let ahead = "UPDATE action SET created_at = created_at + 3600000000";
    operator.execute(ahead, []).unwrap();
    let action = record(&store, request).await;
    assert!(action.decided_at.unwrap() >= action.created_at.unwrap());
    assert_eq!(store.find(id(&action), None).await.unwrap(), Some(action));
    let is_after = "SELECT max(at) >= (SELECT created_at FROM action) FROM event";
    let is_after: bool = operator.query_row(is_after, [], |row| row.get(0)).unwrap();
    assert!(is_after);
}

#[tokio::test]
async fn an_operator_reads_while_it_runs() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("aegis.db");
    let store = SqliteStore::open(&path).unwrap();
    let recorded = record(&store, approval("k")).await;
    let operator = Connection::open(&path).unwrap();
    let (request_id, decided_at): (String, String) = operator
        .query_row(
            "SELECT request_id, decided_at FROM readable_action WHERE idempotency_key = 'k'",
            [],
            |row| Ok((row.get(0)?, row.get(1)?)),
        )
        .unwrap();
    assert_eq!(request_id, recorded.request_id.as_str());
    // The wire leaves out zeros at the end of the fraction.
    let decided_at = decided_at.trim_end_matches('Z').trim_end_matches('0');
    let json = serde_json::to_string(&recorded).unwrap();
    assert!(json.contains(decided_at), "{json} {decided_at}");
    let check: String = operator
        .query_row("PRAGMA integrity_check", [], |row| row.get(0))
        .unwrap();
    assert_eq!(check, "ok");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_action_takes_at_most_700_bytes_on_disk() {
    const ACTIONS: u64 = 20_000;
    const TASKS: u64 = 100;
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("aegis.db");
    let store = SqliteStore::open(&path).unwrap();
    let payload = r#"{"to":"someone@example.com","subject":"hello","amount":12}"#;
    let payload = Fingerprinted::new(Payload::from_json(payload).unwrap()).unwrap();
    let tasks: Vec<_> = (0..TASKS)
        .map(|_| {
            let (store, payload) = (store.clone(), payload.clone());
            tokio::spawn(async move {
                for _ in 0..ACTIONS / TASKS {
                    let mut request = approval(IdempotencyKey::mint().as_str());
                    request.payload = Some(payload.clone());
                    record(&store, request).await;
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    store.close().await;
    let bytes = fs::metadata(&path).unwrap().len() / ACTIONS;
    assert!(bytes <= 700, "{bytes} bytes an action");
}
