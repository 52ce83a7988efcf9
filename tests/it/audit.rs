//! The audit trail: whatever is changed by hand is found.

pub(crate) mod teller;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use aegis_hitl::store::{AuditTrail, Clock, SqliteStore, Store, Sweep};
use aegis_hitl::{Payload, TenantId};
use rusqlite::Connection;
use tempfile::TempDir;

use self::teller::{STEPS, TITLE, Teller, verify};

/// A closed database with the same story of two tenants.
async fn told() -> (TempDir, PathBuf) {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("aegis.db");
    let store = SqliteStore::open(&path).unwrap();
    for step in 0..STEPS {
        for tenant in ["acme", "other"] {
            let tenant = tenant.parse().unwrap();
            let store = store.clone();
            Teller { store, tenant }.tell(step).await;
        }
    }
    store.close().await;
    (folder, path)
}

fn faults(path: &Path) -> Vec<String> {
    AuditTrail::open(path).unwrap().verify(None).unwrap().faults
}

fn export(path: &Path, tenant: &str, from: u64, limit: usize) -> Vec<String> {
    let trail = AuditTrail::open(path).unwrap();
    let head = trail.head(tenant).unwrap();
    let mut after = from - 1;
    let mut lines = vec![trail.first_line(tenant, after).unwrap().unwrap()];
    while let Some(page) = trail.page(tenant, after, head.seq, limit).unwrap() {
        assert!(page.lines.len() <= limit);
        lines.extend(page.lines);
        after = page.seq;
    }
    lines.push(head.line());
    lines
}

fn edit(path: &Path, sql: &str) -> usize {
    let connection = Connection::open(path).unwrap();
    connection
        .pragma_update(None, "foreign_keys", false)
        .unwrap();
    connection
        .pragma_update(None, "ignore_check_constraints", true)
        .unwrap();
    connection
        .execute(sql, [])
        .unwrap_or_else(|error| panic!("{sql}: {error}"))
}

#[tokio::test]
async fn what_nobody_changed_is_verified_whole_and_in_parts() {
    let (_folder, path) = told().await;
    assert_eq!(faults(&path), Vec::<String>::new());
    assert_eq!(
        SqliteStore::verify(&path).unwrap().faults,
        Vec::<String>::new()
    );
    let trail = AuditTrail::open(&path).unwrap();
    assert_eq!(trail.tenants().unwrap(), ["acme", "other"]);
    for tenant in ["acme", "other"] {
        let whole = export(&path, tenant, 1, 1000);
        let chain = verify(&whole).unwrap();
        let head = trail.head(tenant).unwrap();
        assert_eq!((chain.head.seq, chain.head.hash), (head.seq, head.hash));
        assert_eq!((head.unchained, chain.after, chain.removed), (0, 0, 0));
        assert_eq!(head.seq, 12);
        for limit in 1..5 {
            assert_eq!(export(&path, tenant, 1, limit), whole);
        }
        for from in 2..=13 {
            let part = export(&path, tenant, from, 3);
            assert_eq!(part[1..], whole[from as usize..]);
            let chain = verify(&part).unwrap();
            assert_eq!((chain.after, chain.head.seq), (from - 1, 12));
        }
        assert_eq!(trail.first_line(tenant, 13).unwrap(), None);
        assert!(trail.has_hash(None, &head.hash).unwrap());
        assert!(!trail.has_hash(None, &[7; 32]).unwrap());
    }
    let acme = trail.head("acme").unwrap().hash;
    assert!(!trail.has_hash(Some("other"), &acme).unwrap());
    let events: Vec<serde_json::Value> = export(&path, "acme", 1, 100)
        .iter()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let kinds: Vec<_> = events[1..13]
        .iter()
        .map(|line| line["event"]["type"].as_str().unwrap())
        .map(|kind| kind.strip_prefix("action.").unwrap())
        .collect();
    assert_eq!(
        kinds,
        [
            "approved",
            "approved",
            "submitted",
            "approved",
            "claimed",
            "failed",
            "approved",
            "claimed",
            "completed",
            "submitted",
            "cancelled",
            "submitted"
        ]
    );
    assert_eq!(events[3]["event"]["title"], TITLE);
    // Each decision has the digest of what it was on, though the action's changed since.
    let digest = |at: usize| events[at]["event"]["digest"].as_str().unwrap().to_owned();
    let of = |json: &str| {
        let payload = Payload::from_json(json).unwrap();
        aegis_hitl::protocol::Digest::of(&payload)
            .unwrap()
            .to_string()
    };
    assert_eq!(
        [digest(3), digest(4), digest(7)],
        [of(r#"{"n":1}"#), of(r#"{"n":3}"#), of(r#"{"n":4}"#)]
    );
}

#[tokio::test]
async fn a_line_never_changes_after_its_event() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("aegis.db");
    let clock = Clock::new();
    let mut before = vec![export_or_empty(&path)];
    for step in 0..STEPS {
        let store = SqliteStore::open_with(&path, clock.clone()).unwrap();
        let tenant: TenantId = "acme".parse().unwrap();
        Teller {
            store: store.clone(),
            tenant,
        }
        .tell(step)
        .await;
        store.close().await;
        before.push(export_or_empty(&path));
    }
    // An expiry is an event of an action that was chained as pending.
    clock.advance(Duration::from_secs(7200));
    let store = SqliteStore::open_with(&path, clock).unwrap();
    while store.totals().await.unwrap().events < 13 {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    store.close().await;
    let last = export_or_empty(&path);
    assert_eq!(last.len(), 13);
    assert!(last[12].contains("action.expired"), "{}", last[12]);
    for lines in before {
        assert_eq!(last[..lines.len()], lines);
    }
    assert_eq!(faults(&path), Vec::<String>::new());
}

/// The lines of the events of a tenant.
fn export_or_empty(path: &Path) -> Vec<String> {
    if !path.exists() {
        return Vec::new();
    }
    let mut lines = export(path, "acme", 1, 100);
    lines.pop();
    lines.remove(0);
    lines
}

#[tokio::test]
async fn an_edit_of_any_column_by_hand_is_found_and_named() {
    let (folder, path) = told().await;
    let copy = folder.path().join("copy.db");
    let uuid = "x'0102030405060708090a0b0c0d0e0f10'";
    let digest = "x'000102030405060708090a0b0c0d0e0f000102030405060708090a0b0c0d0e0f'";
    let mut edits = Vec::new();
    // The submission and the first decision in the loop of acme.
    for (event, columns) in [
        (
            5,
            vec![
                ("event_id", uuid),
                ("at", "at + 1"),
                ("at", "9223372036854775807"),
                ("actor", "'mallory'"),
                ("actor", "cast(x'ff' AS TEXT)"),
                ("kind", "'approved'"),
                ("action", "1"),
                ("from_status", "'PENDING'"),
                ("to_status", "'COMMITTED'"),
                ("decision", "'approve'"),
                ("execution", "'claimed'"),
                ("call_id", "'call'"),
                ("call_id", "7"),
                ("call_id", "NULL"),
                ("digest", digest),
                ("digest", "NULL"),
                ("tenant_id", "'other'"),
                ("tenant_id", "'third'"),
                ("tenant_id", "''"),
                ("tenant_id", "cast(x'ff' AS TEXT)"),
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
            let sql = format!("UPDATE event SET {column} = {value} WHERE seq = {event}");
            edits.push((sql, event));
        }
    }
    for (column, value) in [
        ("request_id", uuid),
        ("thread_id", "'run-8'"),
        ("idempotency_key", "'k'"),
        ("title", "'harmless'"),
        ("title", "NULL"),
        ("expires_at", "1"),
        ("allow_edit", "0"),
    ] {
        let row = "id = (SELECT action FROM event WHERE seq = 5)";
        edits.push((
            format!("UPDATE action SET {column} = {value} WHERE {row}"),
            5,
        ));
    }
    for (sql, event) in edits {
        fs::copy(&path, &copy).unwrap();
        assert_eq!(edit(&copy, &sql), 1, "{sql}");
        let found = faults(&copy);
        let name = format!("event {event}:");
        assert!(
            found.iter().any(|fault| fault.starts_with(&name)),
            "{sql}: {found:?}"
        );
        let shown = match sql.contains("SET tenant_id") {
            true => "its event is missing",
            false => "its hash is not that",
        };
        let fault = verify(&export(&copy, "acme", 1, 100)).unwrap_err();
        assert!(fault.contains(shown), "{sql}: {fault}");
        let checked = SqliteStore::verify(&copy).unwrap().faults;
        assert!(
            checked.iter().any(|fault| fault.contains(&name)),
            "{sql}: {checked:?}"
        );
    }
}

#[tokio::test]
async fn an_edit_of_the_chain_itself_is_found() {
    let (folder, path) = told().await;
    let copy = folder.path().join("copy.db");
    let zeros = "zeroblob(32)";
    for sql in [
        format!("UPDATE chain SET hash = {zeros} WHERE tenant_id = 'acme'"),
        "UPDATE chain SET seq = seq + 1 WHERE tenant_id = 'acme'".to_owned(),
        "UPDATE chain SET tenant_id = 'third' WHERE tenant_id = 'acme'".to_owned(),
        "UPDATE chain SET event = event + 1000 WHERE tenant_id = 'acme'".to_owned(),
        format!(
            "UPDATE chain SET links = CAST(substr(links, 1, 8) || {zeros} || substr(links, 41) AS BLOB)"
        ),
        "UPDATE chain SET links = CAST(substr(links, 41) || substr(links, 1, 40) AS BLOB)"
            .to_owned(),
        "UPDATE chain SET links = substr(links, 1, length(links) - 40)".to_owned(),
        "UPDATE chain SET links = substr(links, 41)".to_owned(),
        "DELETE FROM chain WHERE tenant_id = 'acme'".to_owned(),
    ] {
        fs::copy(&path, &copy).unwrap();
        assert!(edit(&copy, &sql) > 0, "{sql}");
        assert_ne!(faults(&copy), Vec::<String>::new(), "{sql}");
    }
}

/// Removes the action with seven events from the database.
const BY_HAND: [&str; 3] = [
    "DELETE FROM event WHERE action = (SELECT id FROM action WHERE idempotency_key = 'loop' AND tenant_id = 'acme')",
    "DELETE FROM claim WHERE action = (SELECT id FROM action WHERE idempotency_key = 'loop' AND tenant_id = 'acme')",
    "DELETE FROM action WHERE idempotency_key = 'loop' AND tenant_id = 'acme'",
];

#[tokio::test]
async fn a_removed_action_leaves_its_leaves_and_an_added_event_is_found() {
    let (_folder, path) = told().await;
    let before = export(&path, "acme", 1, 100);
    // As a sweep does it.
    edit(
        &path,
        "INSERT INTO swept SELECT event.seq FROM event JOIN action ON action.id = event.action \
         WHERE idempotency_key = 'loop' AND event.tenant_id = 'acme'",
    );
    for sql in BY_HAND {
        edit(&path, sql);
    }
    let report = AuditTrail::open(&path).unwrap().verify(None).unwrap();
    assert_eq!((report.faults, report.removed), (Vec::new(), 7));
    assert_eq!(
        SqliteStore::verify(&path).unwrap().faults,
        Vec::<String>::new()
    );
    let after = export(&path, "acme", 1, 100);
    let chain = verify(&after).unwrap();
    assert_eq!((chain.removed, chain.head.seq), (7, 12));
    for (at, (before, after)) in before.iter().zip(&after).enumerate() {
        assert_eq!(before != after, (3..=9).contains(&at), "{after}");
        assert_eq!(
            after.starts_with("{\"hash\":"),
            (3..=9).contains(&at),
            "{after}"
        );
    }
    // The place of a removed event is no place for another one.
    edit(
        &path,
        "INSERT INTO event (seq, event_id, at, actor, kind, tenant_id, action, to_status) \
         VALUES (5, zeroblob(16), 1, 'mallory', 'approved', 'other', 1, 'COMMITTED')",
    );
    let found = faults(&path);
    assert_eq!(
        found,
        ["event 5: the audit chain of tenant other does not have it"]
    );
}

#[tokio::test]
async fn what_was_deleted_by_hand_is_told_from_what_retention_removed() {
    let (_folder, path) = told().await;
    for sql in BY_HAND {
        edit(&path, sql);
    }
    let report = AuditTrail::open(&path).unwrap().verify(None).unwrap();
    assert_eq!((report.faults.len(), report.removed), (7, 0));
    let (first, shown) = (&report.faults[0], "retention did not remove it");
    assert!(
        first.starts_with("event ") && first.contains(shown),
        "{first}"
    );
    let checked = SqliteStore::verify(&path).unwrap().faults;
    assert!(
        checked.iter().any(|fault| fault.contains(shown)),
        "{checked:?}"
    );
    let after = export(&path, "acme", 1, 100);
    let fault = verify(&after).unwrap_err();
    assert!(fault.contains(shown) && fault.contains("seq "), "{fault}");
    let missing = after
        .iter()
        .filter(|line| line.contains("\"missing\":true"));
    assert_eq!(missing.count(), 7);
}

#[tokio::test]
async fn a_sweep_marks_what_it_removes() {
    let (clock, folder) = (Clock::new(), TempDir::new().unwrap());
    let path = folder.path().join("aegis.db");
    let store = SqliteStore::open_with(&path, clock.clone()).unwrap();
    let tenant: TenantId = "acme".parse().unwrap();
    let teller = Teller {
        store: store.clone(),
        tenant,
    };
    for count in 1..=3 {
        teller.decide(&format!("k-{count}"), None).await;
    }
    chained(&path, "acme", 3).await;
    clock.advance(Duration::from_secs(7200));
    let sweep = Sweep {
        retention: Duration::from_secs(3600),
        limit: 10,
    };
    while store.sweep(sweep.clone()).await.unwrap().has_more {}
    assert_eq!(store.totals().await.unwrap().removed, 2);
    store.close().await;
    let report = AuditTrail::open(&path).unwrap().verify(None).unwrap();
    assert_eq!((report.faults, report.removed), (Vec::new(), 2));
    let lines = export(&path, "acme", 1, 10);
    assert!(!lines.concat().contains("missing"), "{lines:?}");
    assert_eq!(verify(&lines).unwrap().removed, 2);
    assert_eq!(
        SqliteStore::verify(&path).unwrap().faults,
        Vec::<String>::new()
    );

    // The version before did not mark anything: what it may have removed counts as removed.
    for sql in [
        "DROP TABLE moved",
        "DROP TABLE swept",
        "ALTER TABLE sweep DROP COLUMN unmarked",
        "DROP INDEX undelivered_dead",
    ] {
        edit(&path, sql);
    }
    let connection = Connection::open(&path).unwrap();
    connection.pragma_update(None, "user_version", 7).unwrap();
    drop(connection);
    let store = SqliteStore::open_with(&path, clock).unwrap();
    let report = AuditTrail::open(&path).unwrap().verify(None).unwrap();
    assert_eq!((report.faults, report.removed), (Vec::new(), 2));
    let teller = Teller { store, ..teller };
    teller.decide("k-4", None).await;
    teller.decide("k-5", None).await;
    chained(&path, "acme", 5).await;
    teller.store.close().await;
    edit(&path, "DELETE FROM event WHERE seq = 4");
    assert_eq!(faults(&path).len(), 1, "{:?}", faults(&path));
}

/// Waits until the server's own thread has chained all events of a tenant.
async fn chained(path: &Path, tenant: &str, seq: u64) {
    loop {
        let head = AuditTrail::open(path).unwrap().head(tenant).unwrap();
        if (head.seq, head.unchained) == (seq, 0) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn events_are_chained_while_the_store_is_open() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("aegis.db");
    let store = SqliteStore::open(&path).unwrap();
    let tenant: TenantId = "acme".parse().unwrap();
    let teller = Teller {
        store: store.clone(),
        tenant,
    };
    assert_eq!(
        AuditTrail::open(&path).unwrap().tenants().unwrap(),
        Vec::<String>::new()
    );
    for count in 1..=3 {
        teller.decide(&format!("k-{count}"), None).await;
        chained(&path, "acme", count).await;
    }
    // A tenant without events has a chain of none.
    let empty = export(&path, "nobody", 1, 10);
    assert_eq!((empty.len(), verify(&empty).unwrap().head.seq), (2, 0));
    store.close().await;
}

#[tokio::test]
async fn a_database_of_the_version_before_is_chained_from_its_first_event() {
    let (_folder, path) = told().await;
    let before = export(&path, "acme", 1, 100);
    // What version 6 did not have.
    for sql in [
        "DROP TABLE moved",
        "DROP INDEX undelivered_dead",
        "DROP TABLE swept",
        "ALTER TABLE sweep DROP COLUMN unmarked",
        "DROP TABLE chain",
        "ALTER TABLE event DROP COLUMN digest",
    ] {
        edit(&path, sql);
    }
    let connection = Connection::open(&path).unwrap();
    connection.pragma_update(None, "user_version", 6).unwrap();
    drop(connection);
    assert!(AuditTrail::open(&path).is_err());
    let store = SqliteStore::open(&path).unwrap();
    chained(&path, "acme", 12).await;
    chained(&path, "other", 12).await;
    store.close().await;
    assert_eq!(
        SqliteStore::verify(&path).unwrap().faults,
        Vec::<String>::new()
    );
    // The events of that version do not say what they were on.
    let without = |lines: &[String]| -> Vec<serde_json::Value> {
        lines[1..13]
            .iter()
            .map(|line| {
                let mut line: serde_json::Value = serde_json::from_str(line).unwrap();
                line["event"].as_object_mut().unwrap().remove("digest");
                line["event"].take()
            })
            .collect()
    };
    let after = export(&path, "acme", 1, 100);
    assert_eq!(without(&after), without(&before));
    assert!(!after.concat().contains("\"digest\""));
    verify(&after).unwrap();
}
