//! The embedded store when processes die, disks are full and syncs fail, and beside other programs.

mod backup;
mod descriptors;
mod other;
mod panic;
mod place;
mod server;
mod sync;

use std::collections::HashSet;
use std::env;
use std::io::Read;
use std::path::Path;
use std::process::Command;
use std::sync::LazyLock;
use std::thread;
use std::time::Duration;

use aegis_hitl::store::{Actor, Decide, Decided, Fingerprinted, Identity, SqliteStore, Store};
use aegis_hitl::{Decision, Payload};
use rusqlite::Connection;
use tempfile::TempDir;

use self::other::{DATABASE, Other, ROLE};
use crate::support::alone;

fn approval(key: &str) -> Decide {
    Decide {
        identity: Identity {
            tenant_id: "my-tenant".parse().unwrap(),
            thread_id: "my-thread".parse().unwrap(),
            idempotency_key: key.parse().unwrap(),
        },
        decision: Decision::Approve,
        call_id: None,
        payload: None,
        comment: None,
        actor: Actor::new("anonymous"),
        require_submission: false,
        allow_self_approval: true,
    }
}

/// What the other process does. It speaks on stderr, as the test harness writes to stdout.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "the other tests run it in a process of its own"]
async fn child() {
    let role = env::var(ROLE).unwrap();
    let path = env::var(DATABASE).unwrap();
    if let "look" | "read" = &*role {
        return look(&path, role == "read");
    }
    let store = SqliteStore::open(path).unwrap();
    eprintln!("open");
    match &*role {
        "hold" => {
            until_told();
            // Else the process could end first and leave the log, by the name that it has here.
            store.close().await;
        }
        "load" => load(store).await,
        "insist" => insist(store).await,
        "mourn" => mourn(store).await,
        "obey" => obey(store).await,
        "starve" => descriptors::starve(store).await,
        other => panic!("unknown role {other}"),
    }
}

fn until_told() {
    drop(std::io::stdin().read_to_end(&mut Vec::new()));
}

/// Another program, which has the database open, and may be in the middle of a read.
fn look(path: &str, reads: bool) {
    let database = Connection::open(path).unwrap();
    if reads {
        database.execute_batch("BEGIN").unwrap();
    }
    let sql = "SELECT count(*) FROM action";
    let _: i64 = database.query_row(sql, [], |row| row.get(0)).unwrap();
    eprintln!("open");
    until_told();
    // It reads what it has seen before, whatever has become of the rest.
    let _: i64 = database.query_row(sql, [], |row| row.get(0)).unwrap();
    drop(database);
}

/// Decides for ever, names each key after its decision was acknowledged, and asks again for as long as it is not.
async fn insist(store: SqliteStore) {
    let tasks: Vec<_> = (0..16)
        .map(|task| {
            let store = store.clone();
            tokio::spawn(async move {
                for count in 0.. {
                    let key = format!("k-{}-{task}-{count}", std::process::id());
                    let mut request = approval(&key);
                    request.payload = Some(large());
                    while let Err(error) = store.decide(request.clone()).await {
                        assert!(error.is_unavailable(), "{error}");
                        eprintln!("unavailable");
                        tokio::time::sleep(Duration::from_millis(20)).await;
                    }
                    eprintln!("ack {key}");
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
}

/// Decides until the store has failed, which is then all it says.
async fn mourn(store: SqliteStore) {
    for count in 0.. {
        match store.decide(approval(&format!("k-{count}"))).await {
            Ok(_) => eprintln!("ack k-{count}"),
            Err(error) => {
                assert!(error.is_unavailable(), "{error}");
                break;
            }
        }
    }
    store.failed().await;
    for error in [
        store.check().await.unwrap_err(),
        store.decide(approval("k")).await.unwrap_err(),
        store.totals().await.unwrap_err(),
    ] {
        assert_eq!(error.to_string(), "the store's writer has failed");
    }
    store.close().await;
    eprintln!("failed");
}

/// A payload that fills a small disk soon.
fn large() -> Fingerprinted {
    static LARGE: LazyLock<Fingerprinted> = LazyLock::new(|| {
        let payload = Payload::from_json(&format!(r#"{{"text": "{}"}}"#, "x".repeat(100_000)));
        Fingerprinted::new(payload.unwrap()).unwrap()
    });
    LARGE.clone()
}

/// Decides for ever, and names each key after its decision was acknowledged.
async fn load(store: SqliteStore) {
    let tasks: Vec<_> = (0..32)
        .map(|task| {
            let store = store.clone();
            tokio::spawn(async move {
                for count in 0.. {
                    let key = format!("k-{}-{task}-{count}", std::process::id());
                    let decided = store.decide(approval(&key)).await.unwrap();
                    assert!(matches!(decided, Decided::Recorded(_)), "{decided:?}");
                    eprintln!("ack {key}");
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
}

/// Does what each line says.
async fn obey(store: SqliteStore) {
    for line in std::io::stdin().lines() {
        let line = line.unwrap();
        let done = match &*line {
            "check" => store.check().await,
            "totals" => store.totals().await.map(drop),
            key => {
                let mut request = approval(key);
                request.payload = Some(large());
                store.decide(request).await.map(drop)
            }
        };
        match done {
            Ok(()) => eprintln!("ok"),
            Err(error) => {
                assert!(error.is_unavailable(), "{error}");
                eprintln!("unavailable");
            }
        }
    }
    store.close().await;
}

#[tokio::test]
async fn a_second_process_is_refused_and_told_who_holds_the_database() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("aegis.db");
    let other = Other::start("hold", &path);
    let error = SqliteStore::open(&path).unwrap_err();
    assert!(error.is_in_use(), "{error}");
    let holder = format!("held by process {}", other.child.id());
    assert!(error.to_string().contains(&holder), "{error}");
    other.end();
    SqliteStore::open(&path).unwrap().check().await.unwrap();
}

/// Every acknowledged key is on record, and every decision has its one event.
async fn verify(path: &Path, acknowledged: &HashSet<String>) {
    let store = SqliteStore::open(path).unwrap();
    let totals = store.totals().await.unwrap();
    assert_eq!(totals.decisions, totals.events);
    for key in acknowledged {
        let decided = store.decide(approval(key)).await.unwrap();
        assert!(
            matches!(decided, Decided::Duplicate(_)),
            "{key}: {decided:?}"
        );
    }
    assert_eq!(store.totals().await.unwrap(), totals);
    store.close().await;
    let database = Connection::open(path).unwrap();
    let (check, unmatched): (String, i64) = database
        .query_row(
            "SELECT (SELECT integrity_check FROM pragma_integrity_check), \
             (SELECT count(*) FROM action WHERE (SELECT count(*) FROM event WHERE action = action.id) <> 1)",
            [],
            |row| Ok((row.get(0)?, row.get(1)?)),
        )
        .unwrap();
    assert_eq!((&*check, unmatched), ("ok", 0));
}

#[tokio::test]
async fn a_killed_process_loses_nothing_that_it_acknowledged() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("aegis.db");
    let mut acknowledged = HashSet::new();
    // Each life finds what the one before left in the log.
    for _ in 0..3 {
        let mut other = Other::start("load", &path);
        for _ in 0..500 {
            let line = other.line();
            acknowledged.insert(line.strip_prefix("ack ").unwrap().to_owned());
        }
        // What it said before it died counts too.
        let rest = other.kill();
        acknowledged.extend(
            rest.iter()
                .filter_map(|line| line.strip_prefix("ack ").map(str::to_owned)),
        );
    }
    verify(&path, &acknowledged).await;
}

#[tokio::test]
async fn a_full_disk_acknowledges_nothing_and_is_recovered_from() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("aegis.db");
    // No file may grow beyond some MiB (the unit differs by shell). The signal is ignored, so that the write fails.
    let script = "trap '' XFSZ; ulimit -S -f 4096; exec \"$0\" \"$@\"";
    let _alone = alone().await;
    let mut other = Other::under(&["sh", "-c", script], "obey", &path);
    let mut acknowledged = HashSet::new();
    let mut answers = Vec::new();
    for count in 0..200 {
        let key = format!("k-{count}");
        let answer = other.ask(&key);
        if answer == "ok" {
            acknowledged.insert(key);
        }
        answers.push(answer);
    }
    assert_eq!(answers.first().unwrap(), "ok");
    assert_eq!(answers.last().unwrap(), "unavailable");
    assert_eq!(other.ask("check"), "unavailable");
    assert_eq!(other.ask("totals"), "unavailable");

    let raised = Command::new("prlimit")
        .args(["--fsize=unlimited:", "--pid"])
        .arg(other.child.id().to_string())
        .status();
    assert!(raised.unwrap().success());
    while other.ask("check") == "unavailable" {
        thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(other.ask("totals"), "ok");
    for count in 200..220 {
        let key = format!("k-{count}");
        assert_eq!(other.ask(&key), "ok");
        acknowledged.insert(key);
    }
    other.end();
    verify(&path, &acknowledged).await;
}
