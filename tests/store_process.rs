//! The embedded store when processes die and disks are full.
#![cfg(all(feature = "test-util", target_os = "linux"))]
#![allow(clippy::panic, clippy::print_stderr, clippy::unwrap_used)]

use std::collections::HashSet;
use std::env;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Child, ChildStderr, ChildStdin, Command, Stdio};
use std::thread;
use std::time::Duration;

use aegis_hitl::store::{Actor, Decide, Decided, Embedded, Fingerprinted, Identity, Store};
use aegis_hitl::{Decision, Payload};
use rusqlite::Connection;
use tempfile::TempDir;

const ROLE: &str = "AEGIS_TEST_ROLE";
const DATABASE: &str = "AEGIS_TEST_DATABASE";

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
    }
}

/// What the other process does. It speaks on stderr, as the test harness writes to stdout.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "the other tests run it in a process of its own"]
async fn child() {
    let role = env::var(ROLE).unwrap();
    let store = Embedded::open(env::var(DATABASE).unwrap()).unwrap();
    eprintln!("open");
    match &*role {
        "hold" => drop(std::io::stdin().read_to_end(&mut Vec::new())),
        "load" => load(store).await,
        "obey" => obey(store).await,
        other => panic!("unknown role {other}"),
    }
}

/// Decides for ever, and names each key after its decision was acknowledged.
async fn load(store: Embedded) {
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

/// Does what each line says, with payloads that fill a small disk soon.
async fn obey(store: Embedded) {
    let payload = Payload::from_json(&format!(r#"{{"text": "{}"}}"#, "x".repeat(100_000)));
    let payload = Fingerprinted::new(payload.unwrap()).unwrap();
    for line in std::io::stdin().lines() {
        let line = line.unwrap();
        let done = match &*line {
            "check" => store.check().await,
            "totals" => store.totals().await.map(drop),
            key => {
                let mut request = approval(key);
                request.payload = Some(payload.clone());
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

struct Other {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStderr>,
}

impl Other {
    fn run(mut command: Command, role: &str, database: &Path) -> Self {
        let mut child = command
            .args(["--ignored", "--exact", "child", "--nocapture"])
            .env(ROLE, role)
            .env(DATABASE, database)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut other = Self {
            input: child.stdin.take(),
            output: BufReader::new(child.stderr.take().unwrap()),
            child,
        };
        assert_eq!(other.line(), "open");
        other
    }

    fn start(role: &str, database: &Path) -> Self {
        Self::run(Command::new(env::current_exe().unwrap()), role, database)
    }

    /// The next line, or "" at the end.
    fn line(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    fn ask(&mut self, line: &str) -> String {
        writeln!(self.input.as_mut().unwrap(), "{line}").unwrap();
        self.line()
    }

    fn end(mut self) {
        drop(self.input.take());
        assert!(self.child.wait().unwrap().success());
    }
}

#[tokio::test]
async fn a_second_process_is_refused_and_told_who_holds_the_database() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("aegis.db");
    let other = Other::start("hold", &path);
    let error = Embedded::open(&path).unwrap_err();
    assert!(error.is_in_use(), "{error}");
    let holder = format!("held by process {}", other.child.id());
    assert!(error.to_string().contains(&holder), "{error}");
    other.end();
    Embedded::open(&path).unwrap().check().await.unwrap();
}

/// Every acknowledged key is on record, and every decision has its one event.
async fn verify(path: &Path, acknowledged: &HashSet<String>) {
    let store = Embedded::open(path).unwrap();
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
        other.child.kill().unwrap();
        // What it said before it died counts too.
        let mut rest = String::new();
        other.output.read_to_string(&mut rest).unwrap();
        let whole = rest
            .split_inclusive('\n')
            .filter_map(|line| line.strip_suffix('\n'));
        acknowledged.extend(whole.filter_map(|line| Some(line.strip_prefix("ack ")?.to_owned())));
        other.child.wait().unwrap();
    }
    verify(&path, &acknowledged).await;
}

#[tokio::test]
async fn a_full_disk_acknowledges_nothing_and_is_recovered_from() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("aegis.db");
    let mut limited = Command::new("sh");
    // No file may grow beyond some MiB (the unit differs by shell). The signal is ignored, so that the write fails.
    limited
        .args(["-c", "trap '' XFSZ; ulimit -S -f 4096; exec \"$0\" \"$@\""])
        .arg(env::current_exe().unwrap());
    let mut other = Other::run(limited, "obey", &path);
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
