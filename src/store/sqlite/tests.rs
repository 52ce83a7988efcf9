use std::collections::HashSet;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use rusqlite::Connection;
use tempfile::TempDir;
use tokio::task::JoinSet;

use super::checkpoint::LIMIT;
use super::repeats::MOST;
use super::*;
use crate::protocol::{Decision, IdempotencyKey, Payload, RequestId, Status};
use crate::store::{Actor, Fingerprinted, Identity, Submission};

fn approval(payload: Option<Fingerprinted>) -> Decide {
    Decide {
        identity: Identity {
            tenant_id: "my-tenant".parse().unwrap(),
            thread_id: "my-thread".parse().unwrap(),
            idempotency_key: IdempotencyKey::mint(),
        },
        decision: Decision::Approve,
        call_id: None,
        payload,
        comment: None,
        actor: Actor::new("anonymous"),
        require_submission: false,
        allow_self_approval: true,
    }
}

fn log_bytes(path: &Path) -> u64 {
    fs::metadata(path.with_extension("db-wal")).unwrap().len()
}

/// Makes decisions from many tasks without a pause, and returns the greatest size of the log.
async fn load(store: &SqliteStore, path: &Path, decisions: usize) -> u64 {
    let text = format!(r#"{{"text": "{}"}}"#, "x".repeat(10_000));
    let payload = Fingerprinted::new(Payload::from_json(&text).unwrap()).unwrap();
    let tasks: Vec<_> = (0..16)
        .map(|_| {
            let (store, payload) = (store.clone(), payload.clone());
            tokio::spawn(async move {
                for _ in 0..decisions / 16 {
                    let decided = store.decide(approval(Some(payload.clone()))).await.unwrap();
                    assert!(matches!(decided, Decided::Recorded(_)), "{decided:?}");
                }
            })
        })
        .collect();
    let mut greatest = 0;
    for task in tasks {
        task.await.unwrap();
        // The file never shrinks, so this is its greatest size so far.
        greatest = greatest.max(log_bytes(path));
    }
    greatest
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_log_stays_bounded_under_constant_load() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("aegis.db");
    let store = SqliteStore::open(&path).unwrap();
    let reads = tokio::spawn({
        let store = store.clone();
        async move {
            loop {
                store.find(Uuid::new_v4(), None).await.unwrap();
            }
        }
    });
    let greatest = load(&store, &path, 6400).await;
    reads.abort();
    let limit = u64::from(LIMIT) * 4096;
    let written = fs::metadata(&path).unwrap().len() + greatest;
    assert!(written > 40 * limit, "{written} bytes are too few to tell");
    // Usually twice the limit. On a busy machine the checkpointer's thread may not run for a while.
    assert!(greatest <= 16 * limit, "the log grew to {greatest} bytes");
    store.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_long_read_stops_no_writes_and_the_log_is_reused_after_it() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("aegis.db");
    let store = SqliteStore::open(&path).unwrap();
    load(&store, &path, 160).await;
    let operator = Connection::open(&path).unwrap();
    operator.execute_batch("BEGIN").unwrap();
    let count = || -> i64 {
        operator
            .query_row("SELECT count(*) FROM action", [], |row| row.get(0))
            .unwrap()
    };
    assert_eq!(count(), 160);
    let held = load(&store, &path, 1600).await;
    assert_eq!(count(), 160, "the read still sees what it saw");
    operator.execute_batch("COMMIT").unwrap();
    assert_eq!(count(), 1760);
    // The first writes are slow: how much the log grows while the backlog is copied depends on
    // their rate.
    for _ in 0..100 {
        store.decide(approval(None)).await.unwrap();
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    let after = load(&store, &path, 6400).await;
    assert!(
        after <= held + 4 * u64::from(LIMIT) * 4096,
        "{held} {after}"
    );
    store.close().await;
}

/// A store that cannot record the request of [`refused`]. The event comes after the action's row,
/// so that row is rolled back with the batch. The rest of the batch is then recorded.
fn refusing() -> (TempDir, SqliteStore) {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("aegis.db");
    let store = SqliteStore::open(&path).unwrap();
    let operator = Connection::open(&path).unwrap();
    operator
        .execute_batch(
            "CREATE TRIGGER refuse BEFORE INSERT ON event WHEN new.actor = 'refused'
             BEGIN SELECT raise(ABORT, 'refused'); END",
        )
        .unwrap();
    (folder, store)
}

fn refused(request: Decide) -> Decide {
    Decide {
        actor: Actor::new("refused"),
        ..request
    }
}

#[tokio::test]
async fn a_request_that_cannot_be_recorded_fails_alone() {
    let (folder, store) = refusing();
    let refused = refused(approval(None));
    let (one, error, other) = tokio::join!(
        store.decide(approval(None)),
        store.decide(refused.clone()),
        store.decide(approval(None)),
    );
    assert!(matches!(one, Ok(Decided::Recorded(_))), "{one:?}");
    assert!(matches!(other, Ok(Decided::Recorded(_))), "{other:?}");
    assert!(error.unwrap_err().is_unavailable());
    let totals = store.totals().await.unwrap();
    assert_eq!((totals.actions, totals.events), (2, 2));
    store.check().await.unwrap();
    let operator = Connection::open(folder.path().join("aegis.db")).unwrap();
    operator.execute_batch("DROP TRIGGER refuse").unwrap();
    let decided = store.decide(refused).await.unwrap();
    assert!(matches!(decided, Decided::Recorded(_)), "{decided:?}");
}

/// An approval by a call with its own id.
fn named(call: Uuid) -> Decide {
    Decide {
        call_id: Some(RequestId::from(call)),
        ..approval(None)
    }
}

#[tokio::test]
async fn ids_are_looked_up_in_an_index() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("aegis.db");
    let store = SqliteStore::open(&path).unwrap();
    store.decide(named(Uuid::new_v4())).await.unwrap();
    store.close().await;
    let connection = Connection::open(&path).unwrap();
    for (sql, index) in [
        (
            "SELECT id FROM action WHERE request_id = x'00'",
            "sqlite_autoindex_action",
        ),
        (
            "SELECT action FROM event WHERE call_id = ?1 AND typeof(call_id) = 'blob'",
            "event_call",
        ),
    ] {
        let mut plan = connection
            .prepare(&format!("EXPLAIN QUERY PLAN {sql}"))
            .unwrap();
        let plan: String = plan
            .raw_query()
            .next()
            .unwrap()
            .map(|row| row.get(3).unwrap())
            .unwrap();
        assert!(plan.contains(index), "{plan}");
    }
}

#[tokio::test]
async fn the_newest_calls_that_changed_nothing_are_remembered() {
    let folder = TempDir::new().unwrap();
    let store = SqliteStore::open(folder.path().join("aegis.db")).unwrap();
    let request = approval(None);
    store.decide(request.clone()).await.unwrap();
    let calls: Vec<_> = (0..=MOST).map(|_| Uuid::new_v4()).collect();
    // A repeated call takes no other call's place.
    for call in calls.iter().flat_map(|call| [call, call]) {
        let again = Decide {
            call_id: Some(RequestId::from(*call)),
            ..request.clone()
        };
        let decided = store.decide(again).await.unwrap();
        assert!(matches!(decided, Decided::Duplicate(_)), "{decided:?}");
    }
    assert_eq!(store.find(calls[0], None).await.unwrap(), None);
    for call in &calls[1..] {
        assert!(store.find(*call, None).await.unwrap().is_some());
    }
    let totals = store.totals().await.unwrap();
    assert_eq!((totals.actions, totals.events), (1, 1));
}

#[tokio::test]
async fn a_call_of_a_batch_that_was_taken_back_is_not_found() {
    let (_folder, store) = refusing();
    let calls = [Uuid::new_v4(), Uuid::new_v4()];
    let refused = refused(named(calls[1]));
    let (one, other) = tokio::join!(store.decide(named(calls[0])), store.decide(refused));
    assert!(other.is_err());
    let Decided::Recorded(action) = one.unwrap() else {
        panic!("a new key is recorded");
    };
    assert_eq!(store.find(calls[0], None).await.unwrap(), Some(action));
    assert_eq!(store.find(calls[1], None).await.unwrap(), None);
}

#[tokio::test]
async fn an_identity_that_meets_another_one_of_its_digest_is_refused_and_not_answered_for_it() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("aegis.db");
    let store = SqliteStore::open(&path).unwrap();
    let request = approval(None);
    store.decide(request.clone()).await.unwrap();
    // Nobody can find two identities with one digest, but an edit by hand can make them.
    let operator = Connection::open(&path).unwrap();
    operator
        .execute("UPDATE action SET tenant_id = 'another'", [])
        .unwrap();
    let error = store.decide(request).await.unwrap_err();
    assert!(error.is_unavailable(), "{error}");
    assert_eq!(store.totals().await.unwrap().decisions, 1);
}

fn submission(expires_at: Option<SystemTime>) -> Submit {
    Submit {
        identity: approval(None).identity,
        call_id: None,
        payload: None,
        submission: Submission {
            expires_at,
            ..Submission::default()
        },
        actor: Actor::new("agent"),
        only_existing: false,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn however_many_actions_expire_at_once_none_is_late() {
    const ACTIONS: usize = 8_000;
    let folder = TempDir::new().unwrap();
    let clock = Clock::new();
    let path = folder.path().join("aegis.db");
    let store = SqliteStore::open_with(path, clock.clone()).unwrap();
    let end = clock.now() + Duration::from_secs(3600);
    let tasks: Vec<_> = (0..16)
        .map(|_| {
            let store = store.clone();
            tokio::spawn(async move {
                for _ in 0..ACTIONS / 16 {
                    store.submit(submission(Some(end))).await.unwrap();
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    clock.advance(Duration::from_secs(3601));
    // At 256 actions each half second they would take 16 s.
    let begun = Instant::now();
    while store.totals().await.unwrap().decisions < ACTIONS as u64 {
        assert!(begun.elapsed() < Duration::from_secs(10), "still pending");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn large_actions_that_expire_at_once_take_turns_with_other_requests() {
    const BYTES: usize = 250 * 1024;
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("aegis.db");
    let store = SqliteStore::open(&path).unwrap();
    let clock = Clock::new();
    let end = clock.now() + Duration::from_secs(3600);
    let text = format!("{{\"text\":\"{}\"}}", "x".repeat(BYTES));
    let payload = Fingerprinted::new(Payload::from_json(&text).unwrap()).unwrap();
    for _ in 0..8 {
        let submit = Submit {
            payload: Some(payload.clone()),
            ..submission(Some(end))
        };
        store.submit(submit).await.unwrap();
    }
    store.close().await;
    clock.advance(Duration::from_secs(3601));
    let connection = Connection::open(&path).unwrap();
    let repeats = Repeats::default();
    let expired = "SELECT count(*) FROM action WHERE closed = 'expired'";
    for (total, is_behind) in [(3, true), (6, true), (8, false)] {
        let mut transaction =
            transaction::Transaction::begin(&connection, &repeats, &clock).unwrap();
        transaction.settle_due(256, 2 * BYTES + 1024).unwrap();
        let found: i64 = connection.query_row(expired, [], |row| row.get(0)).unwrap();
        assert_eq!(found, total);
        assert_eq!(transaction.commit().unwrap().is_behind, is_behind);
    }
}

#[tokio::test]
async fn a_row_that_cannot_be_read_keeps_no_other_from_expiring() {
    let folder = TempDir::new().unwrap();
    let clock = Clock::new();
    let path = folder.path().join("aegis.db");
    let store = SqliteStore::open_with(&path, clock.clone()).unwrap();
    for seconds in [10, 20] {
        let end = clock.now() + Duration::from_secs(seconds);
        store.submit(submission(Some(end))).await.unwrap();
    }
    let operator = Connection::open(&path).unwrap();
    let edit = "UPDATE action SET payload = 'no JSON', digest = zeroblob(32) WHERE id = 1";
    operator.execute(edit, []).unwrap();
    clock.advance(Duration::from_secs(30));
    let begun = Instant::now();
    while store.totals().await.unwrap().decisions == 0 {
        assert!(begun.elapsed() < Duration::from_secs(20), "still pending");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_read_shows_its_rows_as_of_one_moment() {
    const ACTIONS: usize = 200;
    let folder = TempDir::new().unwrap();
    let store = SqliteStore::open(folder.path().join("aegis.db")).unwrap();
    let mut pending = Vec::new();
    for _ in 0..ACTIONS {
        let submit = submission(None);
        store.submit(submit.clone()).await.unwrap();
        pending.push(submit.identity);
    }
    let mut deciding = JoinSet::new();
    for identities in pending.chunks(ACTIONS / 8) {
        let (store, identities) = (store.clone(), identities.to_vec());
        deciding.spawn(async move {
            for identity in identities {
                let decide = Decide {
                    identity,
                    ..approval(None)
                };
                store.decide(decide).await.unwrap();
            }
        });
    }
    let mut list = List {
        tenant_id: "my-tenant".parse().unwrap(),
        status: None,
        decision: None,
        execution: None,
        not_picked_up: false,
        thread_id: None,
        after: None,
        limit: 200,
    };
    while deciding.try_join_next().is_some() || !deciding.is_empty() {
        list.status = None;
        let all = store.list(list.clone()).await.unwrap().actions;
        let ids: HashSet<_> = all.iter().map(|action| &action.request_id).collect();
        assert_eq!((all.len(), ids.len()), (ACTIONS, ACTIONS));
        list.status = Some(Status::Pending);
        for action in store.list(list.clone()).await.unwrap().actions {
            assert_eq!(action.status, Status::Pending, "on a page of pending ones");
            let id = action.request_id.as_uuid().unwrap();
            let action = store.look_up(id, &list.tenant_id).await.unwrap().unwrap();
            let events = 1 + usize::from(action.decision.is_some());
            assert_eq!(action.history.unwrap().len(), events, "a history");
        }
    }
}

#[tokio::test]
async fn a_database_of_the_version_before_is_brought_up_to_date() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("aegis.db");
    let store = SqliteStore::open(&path).unwrap();
    store.decide(approval(None)).await.unwrap();
    store.close().await;
    let operator = Connection::open(&path).unwrap();
    operator
        .execute_batch(
            "DROP TABLE chain; ALTER TABLE event DROP COLUMN digest;
             DROP INDEX action_pending; DROP INDEX action_unclaimed;
             DROP TABLE undelivered; DROP TABLE endpoint;
             DROP TABLE tombstone; DROP TABLE sweep; DROP TABLE postponed;
             DROP TABLE swept; DROP TABLE moved; PRAGMA user_version = 3;
             PRAGMA wal_checkpoint(TRUNCATE);",
        )
        .unwrap();
    drop(operator);
    let error = SqliteStore::read_endpoints(&path).unwrap_err();
    assert!(
        error.to_string().contains("older schema version 3"),
        "{error}"
    );
    let store = SqliteStore::open(&path).unwrap();
    assert_eq!(store.totals().await.unwrap().events, 1);
    assert_eq!(store.endpoints().await.unwrap(), []);
    store.close().await;
    let verified = SqliteStore::verify(&path).unwrap();
    assert_eq!(verified.faults, Vec::<String>::new());
}

#[tokio::test]
async fn an_operator_resends_beside_a_server_and_without_one() {
    use crate::store::{DeliveryResult, MarkDeliveries, Resend, Resent, Start, TakeEndpoint};

    let folder = TempDir::new().unwrap();
    let path = folder.path().join("aegis.db");
    let store = SqliteStore::open(&path).unwrap();
    store.decide(approval(None)).await.unwrap();
    let holder = Uuid::new_v4();
    let take = TakeEndpoint {
        endpoint: "a".to_owned(),
        start: Start::Oldest,
        holder,
        lease: Duration::from_secs(600),
    };
    store.take_endpoint(take.clone()).await.unwrap();
    let failed = |attempts| MarkDeliveries {
        endpoint: "a".to_owned(),
        holder,
        lease: Duration::from_secs(600),
        position: 1,
        results: vec![(
            1,
            DeliveryResult::Failed {
                attempts,
                wait: Duration::ZERO,
                failure: "status 500".to_owned(),
            },
        )],
        give_up_after: Duration::ZERO,
        stop: false,
    };
    let resend = Resend {
        endpoint: "a".to_owned(),
        events: None,
    };
    for attempts in [1, 2] {
        store.mark_deliveries(failed(attempts)).await.unwrap();
    }
    assert_eq!(SqliteStore::read_endpoints(&path).unwrap()[0].dead, 1);
    let letters = SqliteStore::read_dead_letters(&path, "a", 10).unwrap();
    assert_eq!(letters[0].failure, "status 500");
    let resent = SqliteStore::resend_beside(&path, &resend).unwrap();
    assert_eq!(resent, Resent::Parked(1));
    // The server sees it, and goes on writing.
    let due = store
        .due_deliveries("a", 10, Duration::from_secs(3600))
        .await
        .unwrap();
    assert_eq!(due.deliveries.len(), 1);
    store.mark_deliveries(failed(1)).await.unwrap();
    store.decide(approval(None)).await.unwrap();
    assert_eq!(store.endpoints().await.unwrap()[0].dead, 1);
    store.close().await;

    let resent = SqliteStore::resend_beside(&path, &resend).unwrap();
    assert_eq!(resent, Resent::Parked(1));
    let missing = folder.path().join("missing.db");
    assert!(SqliteStore::resend_beside(&missing, &resend).is_err());
    assert!(!missing.exists());
    // The lease of a server that is gone keeps no other one out.
    let store = SqliteStore::open(&path).unwrap();
    let other = TakeEndpoint {
        holder: Uuid::new_v4(),
        ..take
    };
    let taken = store.take_endpoint(other).await.unwrap();
    assert!(
        matches!(taken, EndpointTaken::Taken { position: 1, .. }),
        "{taken:?}"
    );
    store.close().await;
    let verified = SqliteStore::verify(&path).unwrap();
    assert_eq!(verified.faults, Vec::<String>::new());
}

#[tokio::test]
async fn a_decision_without_a_submission_enters_no_index_of_those_that_wait() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("aegis.db");
    let store = SqliteStore::open(&path).unwrap();
    store.decide(approval(None)).await.unwrap();
    store.close().await;
    let connection = Connection::open(&path).unwrap();
    for (index, condition) in [
        ("action_pending", "status = 'PENDING'"),
        (
            "action_unclaimed",
            "status = 'COMMITTED' AND decision = 'approve' AND execution IS NULL \
             AND submitted_by IS NOT NULL",
        ),
    ] {
        let sql = format!("SELECT count(*) FROM action INDEXED BY {index} WHERE {condition}");
        let entries: i64 = connection.query_row(&sql, [], |row| row.get(0)).unwrap();
        assert_eq!(entries, 0, "{index}");
    }
}

#[tokio::test]
async fn a_check_finds_tombstones_that_are_wrong_or_missing() {
    use crate::store::Sweep;

    let folder = TempDir::new().unwrap();
    let path = folder.path().join("aegis.db");
    let store = SqliteStore::open(&path).unwrap();
    for key in ["k-1", "k-2", "k-3"] {
        let mut decide = approval(None);
        decide.identity.idempotency_key = key.parse().unwrap();
        store.decide(decide).await.unwrap();
    }
    let sweep = Sweep {
        retention: Duration::ZERO,
        limit: 10,
    };
    // The newest action stays.
    while store.sweep(sweep.clone()).await.unwrap().has_more {}
    store.close().await;
    let faults = || SqliteStore::verify(&path).unwrap().faults.join("\n");
    assert_eq!(faults(), "");
    for (edit, fault) in [
        (
            "UPDATE tombstone SET identity = (SELECT identity FROM action) \
             WHERE identity = (SELECT min(identity) FROM tombstone)",
            "its action is on record as well",
        ),
        (
            "UPDATE tombstone SET request_id = (SELECT request_id FROM action)",
            "another action has its id",
        ),
        (
            "UPDATE tombstone SET decided_at = created_at - 1",
            "it was decided before it came on record",
        ),
        (
            "DELETE FROM tombstone WHERE identity = (SELECT min(identity) FROM tombstone)",
            "there are not as many tombstones as actions that were removed",
        ),
        (
            "UPDATE sweep SET position = 4",
            "the sweeps have come further than the events",
        ),
        (
            "INSERT INTO swept SELECT max(seq) FROM event",
            "an event that a sweep removed is on record",
        ),
    ] {
        let operator = Connection::open(&path).unwrap();
        operator.execute_batch("BEGIN").unwrap();
        operator.execute(edit, []).unwrap();
        operator.execute_batch("COMMIT").unwrap();
        assert!(faults().contains(fault), "{edit}: {}", faults());
        drop(operator);
    }
}

#[test]
fn others_wait_unless_a_transaction_is_alone_and_the_queue_is_empty() {
    use std::sync::atomic::{AtomicU64, Ordering};

    use crate::store::operation::Ledger;

    let connection = Connection::open_in_memory().unwrap();
    let (repeats, clock, queued) = (Repeats::default(), Clock::new(), AtomicU64::new(0));
    let mut transaction = transaction::Transaction::begin(&connection, &repeats, &clock).unwrap();
    assert!(transaction.others_wait());
    transaction.set_alone(&queued);
    assert!(!transaction.others_wait());
    queued.store(1, Ordering::Relaxed);
    assert!(transaction.others_wait());
}
