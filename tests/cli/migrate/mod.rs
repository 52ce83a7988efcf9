//! `aegis migrate`: a database file moves into PostgreSQL, and nothing is decided twice.

mod file;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use aegis_hitl::store::{Decide, Decided, List, PostgresStore, SqliteStore, Store, Sweep};
use aegis_hitl::{Action, Decision, RequestId, TenantId};
use rusqlite::Connection;
use tempfile::TempDir;
use tokio::sync::Mutex;
use uuid::Uuid;

use self::file::{REMOVED, TENANTS, call, decision, fill, payload};
use crate::binary::{Ended, Served, aegis, run, serve};
use crate::manual::{commands_of, shell};
use crate::support::postgres::{Postgres, connect};
use crate::support::process::{Process, bound};
use crate::support::rows::look_at;
use crate::support::{Call, HANG, alone};

fn migrate(from: &Path, to: &str) -> Command {
    let mut command = aegis(&["migrate", "--to", to, "--from"]);
    command.arg(from);
    command
}

fn abandon(from: &Path, to: &str) -> Ended {
    let mut command = migrate(from, to);
    command.arg("--abandon");
    run(command)
}

/// A folder with a database that has everything, and a copy of it. Filling one takes longer than most
/// of what is done with it, so tests with as many large actions share what was written.
async fn told(large: usize) -> (TempDir, PathBuf, PathBuf) {
    static FILLED: Mutex<BTreeMap<usize, [Vec<u8>; 2]>> = Mutex::const_new(BTreeMap::new());
    let folder = TempDir::new().unwrap();
    let paths = ["aegis.db", "copy.db"].map(|name| folder.path().join(name));
    let mut filled = FILLED.lock().await;
    match filled.get(&large) {
        Some(files) => {
            for (path, file) in paths.iter().zip(files) {
                fs::write(path, file).unwrap();
            }
        }
        None => {
            fill(&paths[0], large).await;
            assert!(!folder.path().join("aegis.db-wal").exists());
            SqliteStore::back_up(&paths[0], &paths[1]).unwrap();
            let files = paths.each_ref().map(|path| fs::read(path).unwrap());
            filled.insert(large, files);
        }
    }
    let [path, copy] = paths;
    (folder, path, copy)
}

/// All actions of a tenant, each with all that is on record of it, by key.
async fn actions<S: Store>(store: &S, tenant: &TenantId) -> Vec<Action> {
    let mut actions = Vec::new();
    let mut list = List {
        tenant_id: tenant.clone(),
        status: None,
        decision: None,
        execution: None,
        not_picked_up: false,
        thread_id: None,
        after: None,
        limit: 7,
    };
    loop {
        let page = store.list(list.clone()).await.unwrap();
        for action in page.actions {
            let id = action.request_id.as_uuid().unwrap();
            actions.push(store.look_up(id, tenant).await.unwrap().unwrap());
        }
        match page.next {
            Some(next) => list.after = Some(next),
            None => break,
        }
    }
    actions.sort_by_key(|action| action.idempotency_key.clone().unwrap().to_string());
    actions
}

/// Asserts that a store has what another one has.
async fn assert_same<S: Store, T: Store>(old: &S, new: &T) {
    let tenants = old.tenants(None, 100).await.unwrap();
    assert_eq!(new.tenants(None, 100).await.unwrap(), tenants);
    for tenant in &tenants {
        let (one, other) = (actions(old, tenant).await, actions(new, tenant).await);
        assert_eq!(one.len(), other.len());
        for (one, other) in one.into_iter().zip(other) {
            assert_eq!(one, other);
        }
        let mut after = 0;
        loop {
            let events = old.events(tenant, after, 100).await.unwrap();
            assert_eq!(new.events(tenant, after, 100).await.unwrap(), events);
            let Some((last, _)) = events.last() else {
                break;
            };
            after = *last;
        }
        for key in ["decided", "rejected", "claims", "edits", "submits"] {
            let id = call(key).as_uuid().unwrap();
            let found = old.find(id, Some(tenant)).await.unwrap();
            assert_eq!(new.find(id, Some(tenant)).await.unwrap(), found, "{key}");
        }
    }
    assert_eq!(
        new.newest_event().await.unwrap(),
        old.newest_event().await.unwrap()
    );
    assert_eq!(
        new.endpoints().await.unwrap(),
        old.endpoints().await.unwrap()
    );
    for endpoint in ["hook", "stopped"] {
        let dead = old.dead_letters(endpoint, 100).await.unwrap();
        assert_eq!(new.dead_letters(endpoint, 100).await.unwrap(), dead);
    }
    assert_eq!(new.totals().await.unwrap(), old.totals().await.unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_that_is_on_record_is_there_after_a_move() {
    let (_folder, path, copy) = told(30).await;
    let url = Postgres::shared().database().await;
    let mut command = migrate(&path, &url);
    command.arg("--json");
    let moved = run(command).expect(0);
    let json = moved.json();
    assert_eq!(json["moved"], true);
    let old = SqliteStore::open(&copy).unwrap();
    let totals = old.totals().await.unwrap();
    assert_eq!(json["tables"]["action"]["rows"], totals.actions);
    assert_eq!(json["tables"]["event"]["rows"], totals.events);
    assert!(moved.stderr.contains("copying action"), "{moved:?}");
    let new = PostgresStore::connect(&url).await.unwrap();
    assert_same(&old, &new).await;
    new.close().await;
    old.close().await;
    let copy = copy.to_str().unwrap();
    let audit = |command: &str, store: &str| run(aegis(&["audit", command, "--store", store]));
    // A server chains the newest event when it closes, the file's next one when it starts.
    let verified = audit("verify", &url).expect(0);
    assert!(
        verified.stdout.contains("removed events: 8"),
        "{verified:?}"
    );
    let (one, other) = (
        audit("export", copy).expect(0),
        audit("export", &url).expect(0),
    );
    assert_eq!(one.stdout, other.stdout);
    assert!(one.stdout.lines().count() > 80, "{one:?}");
}

/// What a store answers to calls that were answered before: the call's own retry, another one like it
/// and one that contradicts it.
async fn answers<S: Store>(store: &S, tenant: &str, key: &str) -> Vec<Decided> {
    let of = |own: bool, asked| Decide {
        call_id: Some(if own { call(key) } else { RequestId::mint() }),
        ..decision(tenant, key, asked)
    };
    let mut answers = Vec::new();
    for request in [
        of(true, Decision::Approve),
        of(true, Decision::Reject),
        of(false, Decision::Approve),
        of(false, Decision::Reject),
        Decide {
            payload: payload(r#"{"another":1}"#),
            ..of(false, Decision::Approve)
        },
        Decide {
            payload: payload(&format!(r#"{{"key":"{key}"}}"#)),
            ..of(false, Decision::Approve)
        },
    ] {
        answers.push(store.decide(request).await.unwrap());
    }
    answers
}

/// The action of an answer, if it was not decided before the move.
fn changed(decided: &mut Decided) -> Option<&mut Action> {
    let (Decided::Recorded(action)
    | Decided::Replayed(action)
    | Decided::Duplicate(action)
    | Decided::Conflict(action)
    | Decided::PayloadMismatch(action)) = decided
    else {
        return None;
    };
    let failed = ["failed", "unknown"];
    let key = action.idempotency_key.as_ref()?.as_str();
    failed.contains(&key).then_some(action)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_decided_before_a_move_is_answered_as_before() {
    let (_folder, path, copy) = told(0).await;
    let url = Postgres::shared().database().await;
    run(migrate(&path, &url)).expect(0);
    let old = SqliteStore::open(&copy).unwrap();
    let new = PostgresStore::connect(&url).await.unwrap();
    let kinds = [
        "decided",
        "rejected",
        "edited",
        "claimed",
        "completed",
        "failed",
        "unknown",
        "expired",
        "cancelled",
        "set-back",
        "removed-expired",
    ];
    for tenant in TENANTS {
        for key in kinds.into_iter().chain(REMOVED) {
            let (mut one, mut other) = (
                answers(&old, tenant, key).await,
                answers(&new, tenant, key).await,
            );
            for decided in one.iter_mut().chain(&mut other) {
                if let Some(action) = changed(decided) {
                    action.decided_at = None;
                }
            }
            assert_eq!(one, other, "{tenant} {key}");
        }
        let pending = file::decided(&new, decision(tenant, "pending", Decision::Approve)).await;
        assert_eq!(
            pending
                .title
                .unwrap()
                .chars()
                .filter(|letter| *letter == '\0')
                .count(),
            1
        );
        file::decided(&new, decision(tenant, "new", Decision::Reject)).await;
    }
    old.close().await;
    new.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_was_moved_is_not_served_or_changed_and_can_be_read() {
    let (folder, path, _) = told(0).await;
    let url = Postgres::shared().database().await;
    run(migrate(&path, &url)).expect(0);
    let place = url.rsplit('/').next().unwrap();
    let file = path.to_str().unwrap();
    for command in [
        serve(&path),
        migrate(&path, &url),
        migrate(&path, &Postgres::shared().database().await),
        aegis(&["webhooks", "resend", "hook", "--all", "--store", file]),
        aegis(&["migrate", "--store", file]),
    ] {
        let ended = run(command).expect(1);
        assert!(
            ended.stderr.contains("was moved to PostgreSQL at"),
            "{ended:?}"
        );
        assert!(ended.stderr.contains(place), "{ended:?}");
    }
    abandon(&path, &url).expect(1);
    run(aegis(&["migrate", "--abandon", "--from", file])).expect(1);
    run(aegis(&["check", file])).expect(0);
    run(aegis(&["audit", "export", "--store", file])).expect(0);
    run(aegis(&["webhooks", "list", "hook", "--store", file])).expect(0);
    let backup = folder.path().join("backup.db");
    run(aegis(&[
        "backup",
        "--store",
        file,
        backup.to_str().unwrap(),
    ]))
    .expect(0);
    assert!(Served::try_start(serve(&backup)).is_err());
    // The log is in the file.
    assert!(!folder.path().join("aegis.db-wal").exists());
}

/// All rows of a database as text, by table. What differs between two moves is left out.
async fn rows(url: &str) -> BTreeMap<String, Vec<String>> {
    let client = connect(url).await;
    let tables = client
        .query(
            "SELECT c.relname::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
             WHERE n.nspname = 'public' AND c.relkind IN ('r', 'p') AND NOT c.relispartition \
             AND c.relname NOT IN ('heartbeat', 'import', 'cluster', 'publisher', 'aegis_schema')",
            &[],
        )
        .await
        .unwrap();
    let mut all = BTreeMap::new();
    for table in tables {
        let table: String = table.get(0);
        let sql = format!("SELECT (to_jsonb(t) - 'xid')::text FROM {table} t ORDER BY 1");
        let rows = client.query(&sql, &[]).await.unwrap();
        all.insert(table, rows.iter().map(|row| row.get(0)).collect());
    }
    all
}

/// Starts a move, and kills it after a time, unless it ends before. Returns whether it was killed.
fn killed(from: &Path, to: &str, after: Duration) -> bool {
    let mut command = bound(&migrate(from, to));
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    let mut moving = Process::start(command);
    let begun = Instant::now();
    while begun.elapsed() < after {
        if moving.try_wait().unwrap().is_some() {
            return false;
        }
        thread::sleep(Duration::from_millis(1));
    }
    moving.kill().unwrap();
    moving.wait().unwrap();
    true
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_move_that_is_killed_again_and_again_loses_and_doubles_nothing() {
    const KILLS: usize = 10;
    let _alone = alone().await;
    let (folder, path, copy) = told(60).await;
    let whole = Postgres::shared().database().await;
    let begun = Instant::now();
    run(migrate(&path, &whole)).expect(0);
    let takes = begun.elapsed();
    let whole = rows(&whole).await;

    let (mut kills, mut rounds, mut in_part) = (0, 0, 0);
    let mut url = String::new();
    while kills < KILLS {
        let path = folder.path().join(format!("round-{rounds}.db"));
        fs::copy(&copy, &path).unwrap();
        url = Postgres::shared().database().await;
        rounds += 1;
        loop {
            let part = f64::from(Uuid::new_v4().as_fields().0) / f64::from(u32::MAX);
            if !killed(&path, &url, takes.mul_f64(part)) {
                break;
            }
            kills += 1;
            // It may have been killed before the mark, or behind the end.
            match Served::try_start(serve(Path::new(&url))) {
                Ok(server) => drop(server.stop()),
                Err(ended) => {
                    assert!(ended.stderr.contains("is being moved"), "{ended:?}");
                    in_part += 1;
                    assert!(Served::try_start(serve(&path)).is_err());
                }
            }
        }
        let ended = run(migrate(&path, &url)).expect(1);
        assert!(ended.stderr.contains("was moved"), "{ended:?}");
        let moved = rows(&url).await;
        assert!(whole.keys().eq(moved.keys()));
        for (table, rows) in &whole {
            assert!(*rows == moved[table], "{table}");
        }
    }
    println!("{kills} kills in {rounds} moves, {in_part} of them in the middle; {takes:?} for one");
    assert!(in_part > 0);
    let new = Served::start(serve(Path::new(&url)));
    let ready = Call::new(new.addr, "GET", "/readyz").send().await;
    assert_eq!(ready.status, 200);
    new.stop().expect(0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_move_goes_on_when_the_target_is_back_after_a_crash() {
    let _alone = alone().await;
    let (_folder, path, copy) = told(100).await;
    let server = Postgres::start(&[]);
    let url = server.database().await;
    let mut command = bound(&migrate(&path, &url));
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    let mut moving = Process::start(command);
    let looking = server.client(url.rsplit('/').next().unwrap()).await;
    let begun = Instant::now();
    loop {
        assert!(begun.elapsed() < HANG, "nothing comes");
        let copied = looking.query_one("SELECT copied FROM import", &[]).await;
        if copied.is_ok_and(|row| row.get::<_, i64>(0) > 20) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    server.stop();
    let status = moving.wait().unwrap();
    assert_eq!(status.code(), Some(1));
    let ended = run(migrate(&path, &url)).expect(1);
    assert!(ended.stderr.contains("cannot be reached"), "{ended:?}");
    server.run();
    run(migrate(&path, &url)).expect(0);
    let old = SqliteStore::open(&copy).unwrap();
    let new = PostgresStore::connect(&url).await.unwrap();
    assert_same(&old, &new).await;
    old.close().await;
    new.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_move_that_is_given_up_leaves_both_sides_as_they_were() {
    let (_folder, path, copy) = told(100).await;
    let url = Postgres::shared().database().await;
    let ended = abandon(&path, &url).expect(1);
    assert!(ended.stderr.contains("is not being moved"), "{ended:?}");
    // A row in the way stops it behind the first steps.
    let client = connect(&url).await;
    run(aegis(&["migrate", "--store", &url])).expect(0);
    client
        .batch_execute("ALTER TABLE claim ADD CONSTRAINT stop CHECK (fence < 0)")
        .await
        .unwrap();
    run(migrate(&path, &url)).expect(1);
    let ended = run(serve(&path)).expect(1);
    assert!(ended.stderr.contains("--abandon"), "{ended:?}");
    let ended = run(serve(Path::new(&url))).expect(1);
    assert!(ended.stderr.contains("is not complete"), "{ended:?}");
    let other = Postgres::shared().database().await;
    let ended = run(migrate(&path, &other)).expect(1);
    assert!(
        ended.stderr.contains("is being moved to PostgreSQL at"),
        "{ended:?}"
    );
    abandon(&path, &url).expect(0);
    let empty = rows(&url).await;
    for table in ["action", "event", "feed", "claim"] {
        assert_eq!(empty[table], Vec::<String>::new());
    }
    Served::start(serve(Path::new(&url))).stop().expect(0);
    let (before, after) = (
        SqliteStore::open(&copy).unwrap(),
        SqliteStore::open(&path).unwrap(),
    );
    assert_same(&before, &after).await;
    file::decided(&after, decision("acme", "pending", Decision::Approve)).await;
    before.close().await;
    after.close().await;

    // The target is gone.
    run(migrate(&path, &url)).expect(1);
    run(aegis(&[
        "migrate",
        "--abandon",
        "--from",
        path.to_str().unwrap(),
    ]))
    .expect(0);
    Served::start(serve(&path)).stop().expect(0);
    // What is left of the move there is in the way of another one.
    let ended = run(migrate(&path, &url)).expect(1);
    assert!(ended.stderr.contains("by another move"), "{ended:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_move_is_not_given_up_at_another_database_than_its_own() {
    let (_folder, path, _) = told(0).await;
    let url = Postgres::shared().database().await;
    let client = connect(&url).await;
    run(aegis(&["migrate", "--store", &url])).expect(0);
    client
        .batch_execute("ALTER TABLE claim ADD CONSTRAINT stop CHECK (fence < 0)")
        .await
        .unwrap();
    run(migrate(&path, &url)).expect(1);
    let other = Postgres::shared().database().await;
    let names = [&url, &other].map(|url| url.rsplit('/').next().unwrap());
    let ended = abandon(&path, &other).expect(1);
    for part in ["is being moved to PostgreSQL at", names[0], names[1]] {
        assert!(ended.stderr.contains(part), "no {part:?} in {ended:?}");
    }
    // Both sides are as they were.
    let ended = run(serve(&path)).expect(1);
    assert!(ended.stderr.contains("--abandon"), "{ended:?}");
    abandon(&path, &url).expect(0);
    Served::start(serve(Path::new(&url))).stop().expect(0);
    Served::start(serve(&path)).stop().expect(0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_move_that_finds_records_behind_its_mark_says_how_to_go_back() {
    let (_folder, path, copy) = told(0).await;
    let url = Postgres::shared().database().await;
    run(aegis(&["migrate", "--store", &url])).expect(0);
    // The database is empty when the move looks, and not any more when it has marked the file.
    let (client, other) = (connect(&url).await, connect(&url).await);
    client
        .batch_execute("BEGIN; INSERT INTO endpoint (name, position) VALUES ('hook', 0)")
        .await
        .unwrap();
    let command = migrate(&path, &url);
    let moving = tokio::task::spawn_blocking(move || run(command));
    let begun = Instant::now();
    loop {
        const WAITS: &str =
            "SELECT count(*) FROM pg_locks WHERE relation = 'endpoint'::regclass AND NOT granted";
        let waits = other.query_one(WAITS, &[]).await.unwrap();
        if waits.get::<_, i64>(0) > 0 {
            break;
        }
        assert!(begun.elapsed() < HANG, "it does not come to the end");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    client.batch_execute("COMMIT").await.unwrap();
    let says = |ended: Ended| {
        for part in [
            "webhook endpoints on record already",
            "allowed is an empty database",
            "--abandon",
            path.to_str().unwrap(),
        ] {
            assert!(ended.stderr.contains(part), "no {part:?} in {ended:?}");
        }
    };
    says(moving.await.unwrap().expect(1));
    let ended = run(serve(&path)).expect(1);
    assert!(ended.stderr.contains("--abandon"), "{ended:?}");
    says(run(migrate(&path, &url)).expect(1));

    abandon(&path, &url).expect(0);
    let before = SqliteStore::open(&copy).unwrap();
    let after = SqliteStore::open(&path).unwrap();
    assert_same(&before, &after).await;
    before.close().await;
    after.close().await;
    Served::start(serve(&path)).stop().expect(0);
    // What somebody else recorded there stays.
    let hooks = client.query_one("SELECT count(*) FROM endpoint", &[]).await;
    assert_eq!(hooks.unwrap().get::<_, i64>(0), 1);
    // A database that is not empty from the start leaves no mark.
    let ended = run(migrate(&path, &url)).expect(1);
    assert!(!ended.stderr.contains("--abandon"), "{ended:?}");
    Served::start(serve(&path)).stop().expect(0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_move_that_may_be_finished_is_not_given_up() {
    let (_folder, path, copy) = told(0).await;
    let url = Postgres::shared().database().await;
    run(migrate(&path, &url)).expect(0);
    // As a process that was killed between the two sides has left it.
    let edit = |sql: &str| Connection::open(&path).unwrap().execute_batch(sql).unwrap();
    edit("UPDATE moved SET state = 'finishing', finished_at = NULL");
    let file = path.to_str().unwrap();
    let ended = run(aegis(&["migrate", "--abandon", "--from", file])).expect(1);
    assert!(ended.stderr.contains("may be finished"), "{ended:?}");
    let other = Postgres::shared().database().await;
    let ended = abandon(&path, &other).expect(1);
    assert!(ended.stderr.contains("may be finished"), "{ended:?}");
    assert!(Served::try_start(serve(&path)).is_err());
    // The target was served from since.
    let served = Served::start(serve(Path::new(&url)));
    let approve = Call::new(served.addr, "POST", "/api/v1/hitl/approve")
        .header("Tenant-Id", "acme")
        .header("Thread-Id", "run-9")
        .header("Idempotency-Key", "since")
        .json("{}");
    assert_eq!(approve.send().await.status, 202);
    run(migrate(&path, &url)).expect(0);
    let ended = run(serve(&path)).expect(1);
    assert!(ended.stderr.contains("was moved"), "{ended:?}");
    served.stop().expect(0);

    edit("UPDATE moved SET state = 'finishing', finished_at = NULL");
    let ended = abandon(&path, &url).expect(1);
    assert!(ended.stderr.contains("is finished"), "{ended:?}");
    let ended = run(serve(&path)).expect(1);
    assert!(ended.stderr.contains("was moved"), "{ended:?}");
    drop(copy);
}

#[tokio::test(flavor = "multi_thread")]
async fn servers_of_the_target_record_nothing_while_a_move_lasts() {
    let (_folder, path, _) = told(0).await;
    let url = Postgres::shared().database().await;
    let served = Served::start(serve(Path::new(&url)));
    let client = connect(&url).await;
    client
        .batch_execute("ALTER TABLE claim ADD CONSTRAINT stop CHECK (fence < 0)")
        .await
        .unwrap();
    run(migrate(&path, &url)).expect(1);
    let approve = |key: &str| {
        Call::new(served.addr, "POST", "/api/v1/hitl/approve")
            .header("Tenant-Id", "acme")
            .header("Thread-Id", "run-7")
            .header("Idempotency-Key", key)
            .json("{}")
    };
    for key in ["removed-1", "new"] {
        assert_eq!(approve(key).send().await.status, 503);
    }
    let ready = Call::new(served.addr, "GET", "/readyz").send().await;
    assert_eq!(ready.status, 503);
    client
        .batch_execute("ALTER TABLE claim DROP CONSTRAINT stop")
        .await
        .unwrap();
    run(migrate(&path, &url)).expect(0);
    // The same server goes on, with all that was moved.
    for (key, status) in [
        ("removed-1", 409),
        ("decided", 409),
        ("rejected", 422),
        ("new", 202),
    ] {
        let reply = approve(key).send().await;
        assert_eq!(reply.status, status, "{key}");
    }
    served.stop().expect(0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_moved_is_refused_in_words_and_not_marked() {
    let (folder, path, _) = told(0).await;
    let server = Postgres::shared();
    let used = server.database().await;
    let store = PostgresStore::connect(&used).await.unwrap();
    file::decided(&store, decision("acme", "there", Decision::Approve)).await;
    store.close().await;
    let empty = server.database().await;
    let admin = server.client("postgres").await;
    admin
        .batch_execute(
            "CREATE USER migrate_guest; GRANT CONNECT ON DATABASE postgres TO migrate_guest",
        )
        .await
        .unwrap();
    let guest = empty.replace("aegis@", "migrate_guest@");
    let secret = "postgres://aegis:s3cret@127.0.0.1:1/aegis";
    let text = folder.path().join("text");
    fs::write(
        &text,
        "this is no database, it is a text that is long enough to be one",
    )
    .unwrap();
    let missing = folder.path().join("missing.db");
    let gone = server.url("gone");
    for (from, to, code, says) in [
        (
            &path,
            &*used,
            1,
            "has actions on record already; allowed is an empty database",
        ),
        (&path, &*guest, 1, "may not make the tables"),
        (&path, &*gone, 1, "there is no database"),
        (&path, secret, 1, "cannot be reached"),
        (&path, "mysql://aegis:s3cret@host/aegis", 2, "mysql://…"),
        (
            &path,
            "other.db",
            2,
            "allowed is postgres://user@host:5432/database",
        ),
        (&missing, &*empty, 1, "there is no file"),
        (&text, &*empty, 1, "is not a SQLite database"),
    ] {
        let ended = run(migrate(from, to)).expect(code);
        assert!(ended.stderr.contains(says), "{says}: {ended:?}");
        assert!(!ended.stderr.contains("s3cret"), "{ended:?}");
        assert!(!missing.exists());
    }
    let file = path.to_str().unwrap();
    for arguments in [
        &["migrate", "--from", file][..],
        &["migrate", "--to", &empty],
        &["migrate", "--abandon"],
        &["migrate", "--from", &empty, "--to", &empty],
    ] {
        let ended = run(aegis(arguments)).expect(2);
        assert!(
            ended.stderr.contains("allowed") || ended.stderr.contains("alone"),
            "{ended:?}"
        );
    }
    // Nothing has marked it.
    let served = Served::start(serve(&path));
    let ended = run(migrate(&path, &empty)).expect(1);
    assert!(ended.stderr.contains("is held by process"), "{ended:?}");
    served.stop().expect(0);
    run(migrate(&path, &empty)).expect(0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_is_not_sound_is_not_moved() {
    let (_folder, path, _) = told(0).await;
    let sql = "UPDATE event SET kind = 'rejected' WHERE seq = (SELECT max(seq) FROM event)";
    Connection::open(&path).unwrap().execute_batch(sql).unwrap();
    let url = Postgres::shared().database().await;
    let ended = run(migrate(&path, &url)).expect(1);
    assert!(ended.stderr.contains("is not sound"), "{ended:?}");
    assert!(rows(&url).await["action"].is_empty());
    Served::start(serve(&path)).stop().expect(0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_differs_ends_a_move_before_it_is_finished() {
    let (_folder, path, _) = told(0).await;
    let url = Postgres::shared().database().await;
    run(aegis(&["migrate", "--store", &url])).expect(0);
    let client = connect(&url).await;
    // What is copied changes on the way.
    client
        .batch_execute(
            "CREATE FUNCTION spoil() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN \
             IF NEW.idempotency_key = 'decided' THEN NEW.comment := 'another'; END IF; RETURN NEW; END $$; \
             CREATE TRIGGER spoil BEFORE INSERT ON action FOR EACH ROW EXECUTE FUNCTION spoil()",
        )
        .await
        .unwrap();
    let ended = run(migrate(&path, &url)).expect(1);
    let id: Uuid = client
        .query_one(
            "SELECT min(request_id::text)::uuid FROM action WHERE idempotency_key = 'decided'",
            &[],
        )
        .await
        .unwrap()
        .get(0);
    assert!(
        ended
            .stderr
            .contains(&format!("action {id} is another one")),
        "{ended:?}"
    );
    run(serve(Path::new(&url))).expect(1);
    run(serve(&path)).expect(1);
    client
        .batch_execute("DROP TRIGGER spoil ON action")
        .await
        .unwrap();
    abandon(&path, &url).expect(0);
    run(migrate(&path, &url)).expect(0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_over_is_removed_after_a_move_as_before() {
    let (_folder, path, copy) = told(0).await;
    let url = Postgres::shared().database().await;
    run(migrate(&path, &url)).expect(0);
    let old = SqliteStore::open(&copy).unwrap();
    let new = PostgresStore::connect(&url).await.unwrap();
    let mut removed = [0, 0];
    let sweep = Sweep {
        retention: Duration::from_secs(10 * 24 * 3600),
        limit: 100,
    };
    loop {
        let (one, other) = (old.sweep(sweep.clone()), new.sweep(sweep.clone()));
        let (one, other) = (one.await.unwrap(), other.await.unwrap());
        removed[0] += one.removed;
        removed[1] += other.removed;
        if !one.has_more && !other.has_more {
            break;
        }
    }
    assert!(removed[0] > 8, "{removed:?}");
    assert_eq!(removed[0], removed[1]);
    assert_same(&old, &new).await;
    for tenant in TENANTS {
        let approve = |key| decision(tenant, key, Decision::Approve);
        for key in ["decided", "completed", "removed-1"] {
            let (one, other) = (old.decide(approve(key)), new.decide(approve(key)));
            assert_eq!(one.await.unwrap(), other.await.unwrap(), "{key}");
        }
    }
    let backlog = new.backlog().await.unwrap();
    assert_eq!(backlog.tombstones, old.backlog().await.unwrap().tombstones);
    new.close().await;
    old.close().await;
    run(aegis(&["audit", "verify", "--store", &url])).expect(0);
}

/// Releases before schema version 8 did not write down which events they removed.
#[tokio::test(flavor = "multi_thread")]
async fn what_an_earlier_release_removed_counts_as_removed_after_a_move() {
    let (_folder, path, _) = told(0).await;
    Connection::open(&path)
        .unwrap()
        .execute_batch(
            "UPDATE sweep SET unmarked = (SELECT max(event) FROM swept); DELETE FROM swept",
        )
        .unwrap();
    let url = Postgres::shared().database().await;
    run(migrate(&path, &url)).expect(0);
    let verified = run(aegis(&["audit", "verify", "--store", &url])).expect(0);
    assert!(
        verified.stdout.contains("removed events: 8"),
        "{verified:?}"
    );
    run(aegis(&["check", path.to_str().unwrap()])).expect(0);
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_changes_a_file_while_it_is_moved() {
    let (_folder, path, _) = told(0).await;
    let url = Postgres::shared().database().await;
    run(aegis(&["migrate", "--store", &url])).expect(0);
    // Whoever writes there keeps the move from going on behind the mark.
    let writer = connect(&url).await;
    writer
        .batch_execute("BEGIN; LOCK TABLE action IN ROW EXCLUSIVE MODE")
        .await
        .unwrap();
    let mut command = bound(&migrate(&path, &url));
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let mut moving = Process::start(command);
    let file = path.to_str().unwrap();
    let begun = Instant::now();
    let marked = "SELECT count(*) FROM moved";
    while look_at(&path).query_row(marked, [], |row| row.get::<_, i64>(0)) != Ok(1) {
        assert!(begun.elapsed() < HANG, "it is not marked");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let refused = run(aegis(&[
        "webhooks", "resend", "hook", "--all", "--store", file,
    ]))
    .expect(1);
    assert!(refused.stderr.contains("is being moved"), "{refused:?}");
    let ended = run(serve(&path)).expect(1);
    assert!(ended.stderr.contains("is held by process"), "{ended:?}");
    let ended = abandon(&path, &url).expect(1);
    assert!(ended.stderr.contains("is held by process"), "{ended:?}");
    writer.batch_execute("ROLLBACK").await.unwrap();
    assert!(moving.wait().unwrap().success());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_commands_of_a_move_run_as_written() {
    let (folder, path, _) = told(0).await;
    let url = Postgres::shared().database().await;
    let written = commands_of("scaling.md", "Move a database file");
    let script = written.replace("postgres:///aegis?host=/var/run/postgresql", &url);
    assert!(script.contains(&url), "{written}");
    let ended = run(shell(&script, folder.path())).expect(0);
    assert!(
        ended.stdout.contains("is moved to PostgreSQL at"),
        "{ended:?}"
    );
    assert!(ended.stderr.contains("comparing event"), "{ended:?}");
    // The backup was taken before.
    let backup = folder.path().join("before-the-move.db");
    Served::start(serve(&backup)).stop().expect(0);
    run(serve(&path)).expect(1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_schema_is_brought_up_to_date_for_servers_that_may_not() {
    let url = Postgres::shared().database().await;
    let mut refused = serve(Path::new(&url));
    refused.arg("--no-migrate");
    run(refused).expect(1);
    let ended = run(aegis(&["migrate", "--json", "--store", &url])).expect(0);
    assert_eq!(ended.json()["migrated"], true);
    run(aegis(&["migrate", "--store", &url])).expect(0);
    let mut served = serve(Path::new(&url));
    served.arg("--no-migrate");
    Served::start(served).stop().expect(0);

    let folder = TempDir::new().unwrap();
    let file = folder.path().join("aegis.db");
    let file = file.to_str().unwrap();
    run(aegis(&["migrate", "--store", file])).expect(1);
    assert!(!Path::new(file).exists());
    Served::start(serve(Path::new(file))).stop().expect(0);
    run(aegis(&["migrate", "--store", file])).expect(0);
}
