//! The audit trail of a PostgreSQL database: whatever is changed by hand is found.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use aegis_hitl::Payload;
use aegis_hitl::store::{PostgresAuditTrail, PostgresStore, SqliteStore, Store};
use serde_json::Value;

use super::{name_of, record};
use crate::audit::teller::{STEPS, TITLE, Teller, verify};
use crate::support::ends;
use crate::support::postgres::{Postgres, connect};

/// The event at a position of the feed, which stands at the end of a statement on `event`.
fn at(position: i64) -> String {
    format!("event_id = (SELECT event_id FROM feed WHERE position = {position})")
}

/// What a tenant's longest action is.
const LOOP: &str = "request_id = (SELECT request_id FROM action \
                    WHERE tenant_id = 'acme' AND idempotency_key = 'loop')";

/// What a sweep writes into the row of an action that it removes.
const REMOVED: &str = "removed_at = now(), payload = NULL, edited_payload = NULL, comment = NULL, \
    title = NULL, expires_at = NULL, allow_edit = NULL, submitted_by = NULL, decided_by = NULL, result = NULL, \
    reason = NULL, call_id = NULL";

async fn trail(url: &str) -> PostgresAuditTrail {
    PostgresStore::builder(url).audit_trail().await.unwrap()
}

async fn faults(url: &str) -> Vec<String> {
    trail(url).await.verify(None).await.unwrap().faults
}

async fn export(url: &str, tenant: &str, from: u64, limit: usize) -> Vec<String> {
    let trail = trail(url).await;
    let head = trail.head(tenant).await.unwrap();
    let mut after = from - 1;
    let mut lines = vec![trail.first_line(tenant, after).await.unwrap().unwrap()];
    while let Some(page) = trail.page(tenant, after, head.seq, limit).await.unwrap() {
        assert!(page.lines.len() <= limit);
        lines.extend(page.lines);
        after = page.seq;
    }
    lines.push(head.line());
    lines
}

/// Runs a statement that changes rows by hand. Returns their number.
async fn edit(url: &str, sql: &str) -> u64 {
    let edited = connect(url).await.execute(sql, &[]).await;
    edited.unwrap_or_else(|error| panic!("{sql}: {error:?}"))
}

/// Waits until servers have chained all events of a tenant.
async fn chained(url: &str, tenant: &str, seq: u64) {
    let trail = trail(url).await;
    until(async || {
        let head = trail.head(tenant).await.unwrap();
        (head.seq, head.unchained) == (seq, 0)
    })
    .await;
}

/// Waits until something is so.
async fn until(mut is_so: impl AsyncFnMut() -> bool) {
    ends(async {
        while !is_so().await {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
}

async fn tell<S: Store + Clone>(store: &S) {
    for step in 0..STEPS {
        for tenant in ["acme", "other"] {
            let (store, tenant) = (store.clone(), tenant.parse().unwrap());
            Teller { store, tenant }.tell(step).await;
        }
    }
}

/// A database that no server uses, with the same story of two tenants.
async fn told() -> String {
    let url = Postgres::shared().database().await;
    let store = PostgresStore::connect(&url).await.unwrap();
    tell(&store).await;
    for tenant in ["acme", "other"] {
        chained(&url, tenant, 12).await;
    }
    store.close().await;
    url
}

/// A copy of a database that nobody uses.
async fn copy(url: &str) -> String {
    static COPIES: AtomicUsize = AtomicUsize::new(0);
    let server = Postgres::shared();
    let client = server.client("postgres").await;
    let (from, number) = (name_of(url), COPIES.fetch_add(1, Ordering::SeqCst));
    let name = format!("{from}_copy_{number}");
    // Connections end a little after their clients.
    let end =
        format!("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{from}'");
    let create = format!("CREATE DATABASE {name} TEMPLATE {from}");
    until(async || {
        client.batch_execute(&end).await.unwrap();
        client.batch_execute(&create).await.is_ok()
    })
    .await;
    server.url(&name)
}

fn events(lines: &[String]) -> Vec<Value> {
    let lines = lines.iter().map(|line| serde_json::from_str(line).unwrap());
    lines.collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_nobody_changed_is_verified_whole_and_in_parts() {
    let url = told().await;
    assert_eq!(faults(&url).await, Vec::<String>::new());
    let trail = trail(&url).await;
    assert_eq!(trail.tenants().await.unwrap(), ["acme", "other"]);
    for tenant in ["acme", "other"] {
        let whole = export(&url, tenant, 1, 1000).await;
        let chain = verify(&whole).unwrap();
        let head = trail.head(tenant).await.unwrap();
        assert_eq!((chain.head.seq, chain.head.hash), (head.seq, head.hash));
        assert_eq!((head.unchained, chain.after, chain.removed), (0, 0, 0));
        assert_eq!(head.seq, 12);
        for limit in [1, 3, 12] {
            assert_eq!(export(&url, tenant, 1, limit).await, whole);
        }
        for from in [2, 7, 13] {
            let part = export(&url, tenant, from, 3).await;
            assert_eq!(part[1..], whole[from as usize..]);
            let chain = verify(&part).unwrap();
            assert_eq!((chain.after, chain.head.seq), (from - 1, 12));
        }
        assert_eq!(trail.first_line(tenant, 13).await.unwrap(), None);
        assert!(trail.has_hash(None, &head.hash).await.unwrap());
        assert!(!trail.has_hash(None, &[7; 32]).await.unwrap());
    }
    let acme = trail.head("acme").await.unwrap().hash;
    assert!(!trail.has_hash(Some("other"), &acme).await.unwrap());
    let lines = events(&export(&url, "acme", 1, 100).await);
    assert_eq!(lines[3]["event"]["title"], TITLE);
    // Each decision has the digest of what it was on, though the action's changed since.
    let of = |json: &str| {
        let payload = Payload::from_json(json).unwrap();
        aegis_hitl::protocol::Digest::of(&payload)
            .unwrap()
            .to_string()
    };
    for (at, json) in [(3, r#"{"n":1}"#), (4, r#"{"n":3}"#), (7, r#"{"n":4}"#)] {
        assert_eq!(lines[at]["event"]["digest"], of(json));
    }
    // A tenant without events has a chain of none.
    let empty = export(&url, "nobody", 1, 10).await;
    assert_eq!((empty.len(), verify(&empty).unwrap().head.seq), (2, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn both_stores_write_the_same_lines() {
    let url = told().await;
    let folder = tempfile::TempDir::new().unwrap();
    let path = folder.path().join("aegis.db");
    let store = SqliteStore::open(&path).unwrap();
    tell(&store).await;
    store.close().await;
    let trail = aegis_hitl::store::AuditTrail::open(&path).unwrap();
    // What differs from one telling to the next.
    let told = |line: &String| {
        let mut line: Value = serde_json::from_str(line).unwrap();
        line.as_object_mut().unwrap().remove("hash");
        for member in ["at", "call_id", "expires_at", "id", "request_id"] {
            if let Some(value) = line["event"].get_mut(member)
                && value != "call-1"
            {
                let text = value.as_str().unwrap();
                let shape = text.replace(|letter: char| letter.is_ascii_hexdigit(), "0");
                *value = shape.into();
            }
        }
        line
    };
    for tenant in ["acme", "other"] {
        let in_file = trail.page(tenant, 0, 12, 100).unwrap().unwrap().lines;
        let in_postgres = export(&url, tenant, 1, 100).await;
        assert_eq!(in_file.len(), 12);
        for (one, other) in in_file.iter().zip(&in_postgres[1..13]) {
            assert_eq!(told(one), told(other));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn any_text_is_chained_as_it_was_given() {
    let url = Postgres::shared().database().await;
    let store = PostgresStore::connect(&url).await.unwrap();
    let teller = Teller {
        store: store.clone(),
        tenant: "acme".parse().unwrap(),
    };
    let actor = "a\0b\u{2400}c\u{2400}0";
    teller.submit_by(actor, "k-1", None).await;
    chained(&url, "acme", 1).await;
    store.close().await;
    let lines = export(&url, "acme", 1, 10).await;
    verify(&lines).unwrap();
    assert_eq!(events(&lines)[1]["event"]["actor"], actor);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_edit_of_any_column_by_hand_is_found_and_named() {
    let url = told().await;
    let uuid = "'01020304-0506-0708-090a-0b0c0d0e0f10'";
    let digest = r"'\x000102030405060708090a0b0c0d0e0f000102030405060708090a0b0c0d0e0f'";
    let mut edits = Vec::new();
    // The submission and the first decision in the loop of acme.
    for (event, columns) in [
        (
            5,
            vec![
                ("event_id", uuid),
                ("at", "at + interval '1 microsecond'"),
                ("at", "'infinity'"),
                ("at", "'-infinity'"),
                ("actor", "'mallory'"),
                ("kind", "'approved'"),
                ("request_id", uuid),
                ("number", "number + 100"),
                ("from_status", "'PENDING'"),
                ("to_status", "'COMMITTED'"),
                ("decision", "'approve'"),
                ("execution", "'claimed'"),
                ("call_id", "'call'"),
                ("call_id", "NULL"),
                ("digest", digest),
                ("digest", r"'\x00'"),
                ("digest", "NULL"),
                ("tenant_id", "'other'"),
                ("tenant_id", "'third'"),
                ("tenant_id", "''"),
            ],
        ),
        (
            6,
            vec![
                ("decision", "'reject'"),
                ("actor", "''"),
                ("digest", digest),
            ],
        ),
    ] {
        for (column, value) in columns {
            let sql = format!("UPDATE event SET {column} = {value} WHERE {}", at(event));
            edits.push((sql, event));
        }
    }
    for (column, value) in [
        ("thread_id", "'run-8'"),
        ("idempotency_key", "'k'"),
        ("title", "'harmless'"),
        ("title", "NULL"),
        ("expires_at", "'infinity'"),
        ("allow_edit", "false"),
    ] {
        let sql =
            format!("UPDATE action SET {column} = {value} WHERE tenant_id = 'acme' AND {LOOP}");
        edits.push((sql, 5));
    }
    // Of the feed, which has the positions.
    for (column, value) in [
        ("position", "1000"),
        ("position", "-1"),
        ("tenant_id", "'other'"),
        ("tenant_id", "'third'"),
        ("request_id", uuid),
        ("number", "number + 100"),
        ("at", "'infinity'"),
    ] {
        let sql = format!("UPDATE feed SET {column} = {value} WHERE position = 5");
        edits.push((sql, 5));
    }
    edits.push((format!("DELETE FROM event WHERE {}", at(5)), 5));
    edits.push(("DELETE FROM feed WHERE position = 5".to_owned(), 5));
    for (sql, event) in edits {
        let url = copy(&url).await;
        assert_eq!(edit(&url, &sql).await, 1, "{sql}");
        let found = faults(&url).await;
        let name = format!("event {event}:");
        assert!(
            found.iter().any(|fault| fault.starts_with(&name)),
            "{sql}: {found:?}"
        );
        let lines = export(&url, "acme", 1, 100).await;
        let fault = verify(&lines).unwrap_err();
        assert!(
            fault.contains("its event is missing") || fault.contains("its hash is not that"),
            "{sql}: {fault}"
        );
    }
}

/// The same for what an action says of its state, which the chain does not have.
#[tokio::test(flavor = "multi_thread")]
async fn an_edit_of_any_column_of_an_action_by_hand_is_found_and_named() {
    let url = told().await;
    let digest = r"'\x000102030405060708090a0b0c0d0e0f000102030405060708090a0b0c0d0e0f'";
    let edited = format!("{digest}, edited_payload = '{{}}'");
    let (at, infinity) = ("now() + interval '1 microsecond'", "'infinity'");
    for (key, column, value) in [
        ("bare", "status", "'FAILED'"),
        (
            "waits",
            "status",
            "'COMMITTED', decision = 'approve', decided_at = now(), decided_by = 'mallory'",
        ),
        ("bare", "decision", "'reject'"),
        ("cancelled", "decision", "'approve', closed = NULL"),
        ("bare", "execution", "'claimed'"),
        ("loop", "execution", "NULL"),
        ("bare", "closed", "'expired', decision = 'reject'"),
        ("cancelled", "closed", "'expired'"),
        ("cancelled", "closed", "NULL"),
        ("bare", "created_at", at),
        ("bare", "created_at", infinity),
        ("loop", "created_at", "'-infinity'"),
        ("bare", "decided_at", at),
        ("loop", "decided_at", infinity),
        ("bare", "call_id", "'call'"),
        ("bare", "call_id", "NULL"),
        ("waits", "call_id", "'call'"),
        ("loop", "submitted_by", "'mallory'"),
        ("loop", "submitted_by", "NULL"),
        ("bare", "submitted_by", "'mallory'"),
        ("bare", "decided_by", "'mallory'"),
        ("loop", "decided_by", "NULL"),
        ("waits", "decided_by", "'mallory'"),
        ("bare", "digest", digest),
        ("bare", "digest", "NULL, payload = NULL"),
        ("loop", "digest", digest),
        ("loop", "edited_digest", digest),
        ("bare", "edited_digest", &edited),
        ("loop", "events", "events - 1"),
        ("waits", "events", "0"),
    ] {
        let sql = format!(
            "UPDATE action SET {column} = {value} WHERE tenant_id = 'acme' AND idempotency_key = '{key}'"
        );
        // Of two columns that a constraint ties together, the first is named.
        let what = match column {
            "closed" if value.contains("decision") => "decision",
            "events" => "events is not the number",
            column => column,
        };
        let url = copy(&url).await;
        assert_eq!(edit(&url, &sql).await, 1, "{sql}");
        let (id, found) = (id_of(&url, key).await, faults(&url).await);
        let fault = format!("the action with the id {id}, of tenant acme: its {what} ");
        assert_eq!(found.len(), 1, "{sql}: {found:?}");
        assert!(found[0].starts_with(&fault), "{sql}: {found:?}");
        verify(&export(&url, "acme", 1, 100).await).unwrap();
    }
}

/// The id of an action of acme.
async fn id_of(url: &str, key: &str) -> String {
    let of =
        "SELECT request_id::text FROM action WHERE tenant_id = 'acme' AND idempotency_key = $1";
    let found = connect(url).await.query_one(of, &[&key]).await;
    found.unwrap().get(0)
}

#[tokio::test(flavor = "multi_thread")]
async fn actions_and_events_that_are_not_of_each_other_are_found_and_named() {
    let url = told().await;
    let id = id_of(&url, "loop").await;
    let completed = format!("tenant_id = 'acme' AND number = 7 AND {LOOP}");
    for (sql, fault) in [
        (
            "INSERT INTO action (tenant_id, request_id, thread_id, idempotency_key, status, decision, decided_at, \
             decided_by, created_at, events) VALUES ('third', '01020304-0506-0708-090a-0b0c0d0e0f10', 'run-7', \
             'forged', 'COMMITTED', 'approve', now(), 'reviewer', now(), 0)"
                .to_owned(),
            "the action with the id 01020304-0506-0708-090a-0b0c0d0e0f10, of tenant third: it has no event".to_owned(),
        ),
        (
            format!("DELETE FROM action WHERE tenant_id = 'acme' AND {LOOP}"),
            format!(
                "the action with the id {id}, of tenant acme: it is not on record, and event 1 of it is"
            ),
        ),
        (
            format!("UPDATE action SET {REMOVED} WHERE tenant_id = 'acme' AND {LOOP}"),
            format!(
                "the action with the id {id}, of tenant acme: retention removed it, and events of it are on record"
            ),
        ),
        // As if a sweep had removed the last event, and only that.
        (
            format!(
                "WITH e AS (DELETE FROM event WHERE {completed}), f AS (DELETE FROM feed \
                 WHERE {completed} RETURNING position) INSERT INTO swept SELECT position FROM f"
            ),
            format!(
                "the action with the id {id}, of tenant acme: its execution is not the one of its events"
            ),
        ),
        (
            format!("DELETE FROM event WHERE tenant_id = 'acme' AND number = 3 AND {LOOP}"),
            format!(
                "the action with the id {id}, of tenant acme: event 4 does not follow from those before it"
            ),
        ),
        (
            format!("UPDATE event SET number = 8 WHERE tenant_id = 'acme' AND number = 7 AND {LOOP}"),
            format!(
                "the action with the id {id}, of tenant acme: event 8 does not follow from those before it"
            ),
        ),
    ] {
        let url = copy(&url).await;
        assert_eq!(edit(&url, &sql).await, 1, "{sql}");
        let found = faults(&url).await;
        assert!(found.contains(&fault), "{sql}: {found:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_published_twice_is_found_and_named() {
    let url = told().await;
    let forgotten = "UPDATE publisher SET snapshot = '1:1:'";
    assert_eq!(edit(&url, forgotten).await, 1);
    let found = faults(&url).await;
    assert_eq!(found.len(), 24, "{found:?}");
    let fault = "event 5: it is published, and the row of publisher has it as one of tenant acme to publish";
    assert!(found.iter().any(|found| found == fault), "{found:?}");
    let store = PostgresStore::connect(&url).await.unwrap();
    for tenant in ["acme", "other"] {
        chained(&url, tenant, 24).await;
    }
    store.close().await;
    let found = faults(&url).await;
    assert_eq!(found.len(), 24, "{found:?}");
    for (tenant, first) in [("acme", 1), ("other", 24)] {
        let fault = format!(" it is event {first} of tenant {tenant} once more");
        assert!(
            found.iter().any(|found| found.ends_with(&fault)),
            "{found:?}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_of_one_row_without_its_row_is_found_and_named() {
    let url = super::migrated().await;
    assert_eq!(faults(&url).await, Vec::<String>::new());
    for table in ["publisher", "cluster", "chainer"] {
        let url = copy(&url).await;
        assert_eq!(edit(&url, &format!("DELETE FROM {table}")).await, 1);
        let fault = format!("the table {table}: its row is missing");
        assert_eq!(faults(&url).await, [fault]);
    }
}

/// More than is read at once.
#[tokio::test(flavor = "multi_thread")]
async fn many_actions_are_all_compared_with_their_events() {
    let url = told().await;
    // Each but the first is a copy of what was submitted and is pending, with its event.
    let many = "WITH a AS (INSERT INTO action (tenant_id, request_id, thread_id, idempotency_key, status, digest, \
         payload, title, expires_at, allow_edit, submitted_by, created_at, events) \
         SELECT tenant_id, gen_random_uuid(), thread_id, 'k-' || n, status, digest, payload, title, expires_at, \
         allow_edit, submitted_by, created_at, events FROM action, generate_series(1, 3000) n \
         WHERE tenant_id = 'acme' AND idempotency_key = 'waits' RETURNING *) \
         INSERT INTO event (tenant_id, request_id, number, at, event_id, actor, kind, to_status, digest, epoch) \
         SELECT tenant_id, request_id, 1, created_at, gen_random_uuid(), submitted_by, 'submitted', 'PENDING', digest, \
         epoch FROM a, cluster";
    assert_eq!(edit(&url, many).await, 3000);
    assert_eq!(faults(&url).await, Vec::<String>::new());
    let flipped =
        "UPDATE action SET decided_by = 'mallory' WHERE idempotency_key IN ('k-7', 'k-2900')";
    assert_eq!(edit(&url, flipped).await, 2);
    assert_eq!(faults(&url).await.len(), 2);
    // One action has no event then, and one event no action.
    let moved = "UPDATE event SET request_id = gen_random_uuid() WHERE actor = 'agent é' AND kind = 'submitted' \
         AND request_id = (SELECT request_id FROM action WHERE idempotency_key = 'k-1500')";
    assert_eq!(edit(&url, moved).await, 1);
    assert_eq!(faults(&url).await.len(), 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_edit_of_the_chain_itself_is_found() {
    let url = told().await;
    let zeros = r"decode(repeat('00', 32), 'hex')";
    for sql in [
        format!("UPDATE chain SET hash = {zeros} WHERE tenant_id = 'acme'"),
        "UPDATE chain SET seq = seq + 100 WHERE tenant_id = 'acme'".to_owned(),
        "UPDATE chain SET tenant_id = 'third' WHERE tenant_id = 'acme'".to_owned(),
        "UPDATE chain SET position = position + 1000 WHERE tenant_id = 'acme'".to_owned(),
        format!("UPDATE chain SET links = substr(links, 1, 8) || {zeros} || substr(links, 41)"),
        "UPDATE chain SET links = substr(links, 41) || substr(links, 1, 40) WHERE length(links) > 40".to_owned(),
        "UPDATE chain SET links = substr(links, 1, length(links) - 40) WHERE length(links) > 40".to_owned(),
        "UPDATE chain SET links = substr(links, 41) WHERE length(links) > 40".to_owned(),
        "DELETE FROM chain WHERE tenant_id = 'acme'".to_owned(),
        "DELETE FROM chain WHERE (tenant_id, seq) IN (SELECT tenant_id, max(seq) FROM chain GROUP BY tenant_id)"
            .to_owned(),
        "UPDATE chainer SET position = position - 1".to_owned(),
        "UPDATE chainer SET position = 0".to_owned(),
        "DELETE FROM chainer".to_owned(),
    ] {
        let url = copy(&url).await;
        assert!(edit(&url, &sql).await > 0, "{sql}");
        assert_ne!(faults(&url).await, Vec::<String>::new(), "{sql}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_added_by_hand_is_found() {
    let url = told().await;
    let columns = "tenant_id, request_id, number, at, event_id, actor, kind, to_status, epoch, xid";
    // Where no pass looks any more, in front of what was chained, and where no position was given.
    for (sql, faults_of_it) in [
        (
            format!(
                "INSERT INTO event ({columns}) SELECT tenant_id, request_id, 100, at, \
                 '01020304-0506-0708-090a-0b0c0d0e0f10', 'mallory', 'approved', 'COMMITTED', epoch, xid \
                 FROM event WHERE {}",
                at(5)
            ),
            [
                "the event with the id 01020304-0506-0708-090a-0b0c0d0e0f10, of tenant acme, has no position",
                "the action with the id ",
            ],
        ),
        (
            "INSERT INTO feed SELECT 0, tenant_id, request_id, number, at, event_id FROM feed \
             WHERE position = 5"
                .to_owned(),
            [
                "event 0: the audit chain of tenant acme does not have it",
                "event 5: it is event 0 of tenant acme once more",
            ],
        ),
        (
            "INSERT INTO feed SELECT 1000, tenant_id, request_id, number, at, event_id FROM feed \
             WHERE position = 5"
                .to_owned(),
            [
                "event 1000: no position as high was given",
                "event 1000: it is event 5 of tenant acme once more",
            ],
        ),
    ] {
        let url = copy(&url).await;
        assert_eq!(edit(&url, &sql).await, 1, "{sql}");
        let found = faults(&url).await;
        assert_eq!(found.len(), 2, "{sql}: {found:?}");
        for (found, fault) in found.iter().zip(faults_of_it) {
            assert!(found.starts_with(fault), "{sql}: {found:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_deleted_by_hand_is_told_from_what_retention_removed() {
    let url = told().await;
    let before = export(&url, "acme", 1, 100).await;
    let by_hand = [
        format!("DELETE FROM event WHERE tenant_id = 'acme' AND {LOOP}"),
        format!("DELETE FROM feed WHERE tenant_id = 'acme' AND {LOOP}"),
    ];
    for is_marked in [false, true] {
        let url = copy(&url).await;
        if is_marked {
            // As a sweep does it.
            let mark = format!(
                "INSERT INTO swept SELECT position FROM feed WHERE tenant_id = 'acme' AND {LOOP}"
            );
            assert_eq!(edit(&url, &mark).await, 7);
            let strip = format!("UPDATE action SET {REMOVED} WHERE tenant_id = 'acme' AND {LOOP}");
            assert_eq!(edit(&url, &strip).await, 1);
        }
        for sql in &by_hand {
            assert_eq!(edit(&url, sql).await, 7);
        }
        let report = trail(&url).await.verify(None).await.unwrap();
        let after = export(&url, "acme", 1, 100).await;
        if is_marked {
            assert_eq!((report.faults, report.removed), (Vec::new(), 7));
            let chain = verify(&after).unwrap();
            assert_eq!((chain.removed, chain.head.seq), (7, 12));
            for (at, (before, after)) in before.iter().zip(&after).enumerate() {
                assert_eq!(before != after, (3..=9).contains(&at), "{after}");
            }
        } else {
            let shown = "retention did not remove it";
            assert_eq!((report.faults.len(), report.removed), (8, 0));
            let (action, events) = report.faults.split_last().unwrap();
            assert!(events.iter().all(|fault| fault.contains(shown)));
            assert!(action.ends_with("it has no event"), "{action}");
            assert!(verify(&after).unwrap_err().contains(shown));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_of_the_version_before_is_chained_from_its_first_event() {
    let url = told().await;
    let before = export(&url, "acme", 1, 100).await;
    // What version 3 did not have.
    for sql in [
        "DROP TABLE chain",
        "DROP TABLE chainer",
        "ALTER TABLE event DROP COLUMN digest",
        "DROP TABLE import",
        "DROP TABLE tombstone",
        "DROP FUNCTION aegis_record",
        "DROP FUNCTION aegis_insert",
        "DROP POLICY aegis_tenants ON action",
        "DROP POLICY aegis_tenants ON claim",
        "DROP POLICY aegis_tenants ON event",
        "DROP POLICY aegis_tenants ON feed",
        "DELETE FROM aegis_schema WHERE version > 3",
    ] {
        edit(&url, sql).await;
    }
    let refused = PostgresStore::builder(&url).audit_trail().await;
    let refused = refused.unwrap_err();
    assert!(refused.is_incompatible());
    assert!(refused.to_string().contains("older schema version 3"));
    let store = PostgresStore::connect(&url).await.unwrap();
    chained(&url, "acme", 12).await;
    chained(&url, "other", 12).await;
    // A server of that version goes on appending beside this one, without digests.
    let append = format!(
        "WITH e AS (INSERT INTO event (tenant_id, request_id, number, at, event_id, actor, kind, from_status, \
         to_status, decision, epoch) SELECT tenant_id, request_id, 2, at, gen_random_uuid(), 'old', 'approved', \
         'PENDING', 'COMMITTED', 'approve', epoch FROM event WHERE {} RETURNING *) \
         UPDATE action a SET status = 'COMMITTED', decision = 'approve', decided_at = e.at, decided_by = e.actor, \
         events = 2 FROM e WHERE a.tenant_id = e.tenant_id AND a.request_id = e.request_id",
        at(23)
    );
    assert_eq!(edit(&url, &append).await, 1);
    chained(&url, "acme", 13).await;
    store.close().await;
    assert_eq!(faults(&url).await, Vec::<String>::new());
    let without = |lines: &[String]| -> Vec<Value> {
        let mut lines = events(lines);
        for line in &mut lines[1..13] {
            line["event"].as_object_mut().unwrap().remove("digest");
        }
        lines[1..13]
            .iter()
            .map(|line| line["event"].clone())
            .collect()
    };
    let after = export(&url, "acme", 1, 100).await;
    assert_eq!(without(&after), without(&before));
    assert!(!after.concat().contains("\"digest\""));
    verify(&after).unwrap();
    // An empty database has no trail, either.
    let empty = Postgres::shared().database().await;
    let refused = PostgresStore::builder(&empty).audit_trail().await;
    assert!(refused.unwrap_err().to_string().contains("is empty"));
}

#[tokio::test(flavor = "multi_thread")]
async fn events_are_chained_while_the_store_is_open_and_before_it_is_closed() {
    let url = Postgres::shared().database().await;
    let store = PostgresStore::connect(&url).await.unwrap();
    for count in 1..=3 {
        record(&store, &format!("k-{count}")).await;
        chained(&url, "acme", count).await;
    }
    until(async || store.backlog().await.unwrap().unchained == Some(0)).await;
    record(&store, "k-4").await;
    store.close().await;
    let head = trail(&url).await.head("acme").await.unwrap();
    assert_eq!((head.seq, head.unchained), (4, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chain_of_many_rows_is_read_whole() {
    const ROWS: usize = 70;
    let url = Postgres::shared().database().await;
    for row in 0..ROWS {
        let store = PostgresStore::connect(&url).await.unwrap();
        record(&store, &format!("k-{row}")).await;
        store.close().await;
    }
    let count = "SELECT count(*) FROM chain";
    let rows = connect(&url).await.query_one(count, &[]).await.unwrap();
    // On a machine that is slow, what one store leaves is chained by the next.
    assert!(rows.get::<_, i64>(0) > 64);
    let store = PostgresStore::connect(&url).await.unwrap();
    chained(&url, "acme", ROWS as u64).await;
    store.close().await;
    assert_eq!(faults(&url).await, Vec::<String>::new());
    let lines = export(&url, "acme", 1, 30).await;
    assert_eq!(verify(&lines).unwrap().head.seq, ROWS as u64);
    let last = export(&url, "acme", ROWS as u64, 30).await;
    assert_eq!(last[1..], lines[ROWS..]);
    let trail = trail(&url).await;
    let head = trail.head("acme").await.unwrap();
    assert!(trail.has_hash(None, &head.hash).await.unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_waits_to_be_chained_is_counted() {
    let url = Postgres::shared().database().await;
    let store = PostgresStore::connect(&url).await.unwrap();
    record(&store, "k-1").await;
    chained(&url, "acme", 1).await;
    // A server that hangs while it chains keeps the others from it.
    let client = connect(&url).await;
    let hang = "BEGIN; SELECT FROM chainer FOR UPDATE";
    client.batch_execute(hang).await.unwrap();
    for count in 2..=5 {
        record(&store, &format!("k-{count}")).await;
        // It counts before and after it is published.
        let head = trail(&url).await.head("acme").await.unwrap();
        assert_eq!((head.seq, head.unchained), (1, count - 1));
        store.newest_event().await.unwrap();
        let head = trail(&url).await.head("acme").await.unwrap();
        assert_eq!((head.seq, head.unchained), (1, count - 1));
        let backlog = store.backlog().await.unwrap();
        assert_eq!(backlog.unchained, Some(count - 1));
    }
    client.batch_execute("ROLLBACK").await.unwrap();
    chained(&url, "acme", 5).await;
    store.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn servers_that_chain_at_once_make_the_chain_that_one_makes() {
    const TENANTS: u64 = 3;
    const EVENTS: u64 = 2000;
    let url = Postgres::shared().database().await;
    let store = PostgresStore::connect(&url).await.unwrap();
    let mut deciding = Vec::new();
    for task in 0..50 {
        let store = store.clone();
        deciding.push(tokio::spawn(async move {
            for number in 0..TENANTS * EVENTS / 50 {
                let mut decide = super::decision(&format!("k-{task}-{number}"));
                decide.identity.tenant_id = format!("t-{}", number % TENANTS).parse().unwrap();
                store.decide(decide).await.unwrap();
            }
        }));
    }
    for deciding in deciding {
        deciding.await.unwrap();
    }
    let tenants: Vec<_> = (0..TENANTS).map(|tenant| format!("t-{tenant}")).collect();
    let all_chained = async || {
        for tenant in &tenants {
            chained(&url, tenant, EVENTS).await;
        }
    };
    all_chained().await;
    let heads = async || trail(&url).await.verify(None).await.unwrap();
    let one = heads().await;
    assert_eq!(one.faults, Vec::<String>::new());
    let others = [
        PostgresStore::connect(&url).await.unwrap(),
        PostgresStore::connect(&url).await.unwrap(),
    ];
    for _ in 0..3 {
        let client = connect(&url).await;
        let anew = "BEGIN; UPDATE chainer SET position = 0; DELETE FROM chain; COMMIT";
        client.batch_execute(anew).await.unwrap();
        all_chained().await;
        assert_eq!(heads().await, one);
    }
    for store in others.into_iter().chain([store]) {
        store.close().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chain_stays_whole_in_another_cluster() {
    let url = told().await;
    let heads = trail(&url).await.verify(None).await.unwrap().heads;
    // As after a restore into another cluster, whose transactions have lower numbers. One event
    // was not published when the database was copied.
    let client = connect(&url).await;
    let restored = format!(
        "BEGIN; UPDATE event SET xid = '900000000'; \
         INSERT INTO event (tenant_id, request_id, number, at, event_id, actor, kind, from_status, to_status, \
         decision, execution, epoch, xid) \
         SELECT tenant_id, request_id, 2, now(), gen_random_uuid(), 'unpublished', 'claimed', 'COMMITTED', \
         'COMMITTED', 'approve', 'claimed', epoch, '900000001' FROM event WHERE {}; \
         UPDATE action SET execution = 'claimed', events = 2 \
         WHERE tenant_id = 'acme' AND idempotency_key = 'bare'; \
         UPDATE publisher SET snapshot = '900000001:900000001:'; \
         UPDATE cluster SET identifier = identifier - 1; COMMIT",
        at(1)
    );
    client.batch_execute(&restored).await.unwrap();
    assert_eq!(faults(&url).await, Vec::<String>::new());
    let head = trail(&url).await.head("acme").await.unwrap();
    assert_eq!((head.seq, head.unchained), (12, 1));
    let store = PostgresStore::connect(&url).await.unwrap();
    record(&store, "later").await;
    chained(&url, "acme", 14).await;
    store.close().await;
    let report = trail(&url).await.verify(None).await.unwrap();
    assert_eq!(report.faults, Vec::<String>::new());
    for head in heads {
        let has = trail(&url).await.has_hash(None, &head.hash).await;
        assert!(has.unwrap(), "{head:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_auditor_needs_no_right_but_to_read() {
    let url = told().await;
    let client = connect(&url).await;
    let role = format!("auditor_of_{}", name_of(&url));
    let grant = format!(
        "CREATE ROLE {role} LOGIN; \
         GRANT SELECT ON event, feed, chain, chainer, publisher, cluster, swept, import, aegis_schema TO {role}; \
         GRANT SELECT (tenant_id, request_id, thread_id, idempotency_key, title, expires_at, allow_edit, status, \
         decision, execution, closed, digest, edited_digest, submitted_by, decided_by, call_id, created_at, \
         decided_at, events, removed_at) ON action TO {role}"
    );
    client.batch_execute(&grant).await.unwrap();
    let trail = trail(&url.replace("aegis@", &format!("{role}@"))).await;
    let report = trail.verify(None).await.unwrap();
    assert_eq!((report.faults, report.heads.len()), (Vec::new(), 2));
    let page = trail.page("acme", 0, 12, 100).await.unwrap().unwrap();
    assert_eq!(page.lines.len(), 12);
}

/// Nothing that an operator reads as one line may be broken by a name.
#[tokio::test(flavor = "multi_thread")]
async fn a_name_that_was_forged_is_escaped() {
    let url = told().await;
    let forged = format!(
        "UPDATE event SET tenant_id = E'x\\n\\u202e' WHERE {}",
        at(5)
    );
    assert_eq!(edit(&url, &forged).await, 1);
    let tenants = trail(&url).await.tenants().await.unwrap();
    assert_eq!(tenants, ["acme", "other", "x\n\u{202e}"]);
    let found = faults(&url).await;
    assert!(found.len() >= 2, "{found:?}");
    for fault in found {
        assert!(!fault.contains(['\n', '\u{202e}']), "{fault:?}");
    }
}
