//! The examples in Python: the loop with the standard library alone, and the LangGraph node.

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::binary::{Ended, Served, run, serve};
use crate::python::{environment, interpreter, python, script};
use crate::support::Call;

/// How often the agent exits at once.
const AT_ONCE: usize = 6;

const KILLED: i32 = 99;

async fn decide(server: std::net::SocketAddr, action: &Value, verb: &str) {
    let id = action["request_id"].as_str().unwrap();
    let call = Call::new(server, "POST", format!("/api/v1/hitl/actions/{id}/{verb}"));
    let body = json!({ "digest": action["digest"] });
    let reply = call
        .header("Tenant-Id", "acme")
        .json(body.to_string())
        .send()
        .await;
    assert!(matches!(reply.status, 202 | 409), "{reply:?}");
}

/// Approves what is pending, until the guard is dropped.
struct Reviewer(Arc<AtomicBool>);

impl Drop for Reviewer {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

fn reviewer(server: std::net::SocketAddr) -> Reviewer {
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = stop.clone();
    tokio::spawn(async move {
        while !stopped.load(Ordering::SeqCst) {
            let pending = Call::new(server, "GET", "/api/v1/hitl/actions?status=PENDING");
            let Ok(pending) = pending.header("Tenant-Id", "acme").try_send().await else {
                return;
            };
            for action in pending.json()["actions"].as_array().unwrap() {
                decide(server, action, "approve").await;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    Reviewer(stop)
}

/// One agent with a key of its own.
struct Agent {
    url: String,
    ledger: std::path::PathBuf,
    key: String,
}

impl Agent {
    /// Runs the agent to its end, or to its n-th line.
    async fn run(&self, line: usize) -> Ended {
        let ledger = self.ledger.to_str().unwrap();
        let mut command = python(
            interpreter(),
            &[
                &script("tests/cli/python_loop.py"),
                &script("examples/python"),
                ledger,
                &self.key,
                &line.to_string(),
            ],
        );
        command
            .env("AEGIS_URL", &self.url)
            .env("AEGIS_TENANT", "acme");
        command.env("PYTHONDONTWRITEBYTECODE", "1");
        tokio::task::spawn_blocking(|| run(command)).await.unwrap()
    }

    fn rows(&self) -> usize {
        let ledger = fs::read_to_string(&self.ledger).unwrap_or_default();
        let line = format!("{} 12.5", self.key);
        ledger.lines().filter(|row| *row == line).count()
    }
}

/// Whether the agent ends before its n-th line.
async fn killed_at(agent: Agent, server: std::net::SocketAddr, line: usize) -> bool {
    let first = agent.run(line).await;
    let ends = first.code() != KILLED;
    let mut action = if ends {
        first.expect(0).json()
    } else {
        Value::Null
    };
    // Restarted until there is nothing left to do. A human decides where nobody knows.
    for _ in 0..20 {
        assert!(agent.rows() <= 1, "{line}: twice");
        match (action["status"].as_str(), action["execution"].as_str()) {
            (Some("COMMITTED"), Some("completed")) => break,
            (Some("COMMITTED"), None) if action["decision"] == "reject" => break,
            (Some("FAILED"), Some("unknown")) => {
                let verb = ["approve", "reject"][agent.rows()];
                decide(server, &action, verb).await;
            }
            (None, _) => {}
            // The lease of the agent that is gone has to end.
            (Some("COMMITTED"), Some("claimed")) => {
                tokio::time::sleep(Duration::from_millis(300)).await;
            }
            other => panic!("{line}: {other:?}"),
        }
        action = agent.run(0).await.expect(0).json();
    }
    let decision = action["decision"].as_str();
    assert_eq!(agent.rows(), 1, "{line}: {action}");
    assert!(
        decision == Some("reject") || action["execution"] == "completed",
        "{line}: {action}"
    );
    ends
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_is_killed_at_any_line_never_runs_its_action_twice() {
    let folder = TempDir::new().unwrap();
    let server = Served::start(serve(&folder.path().join("aegis.db")));
    let _reviewer = reviewer(server.addr);
    let mut running = HashMap::new();
    let mut next = 1;
    let mut ended = None;
    while ended.is_none() || !running.is_empty() {
        while ended.is_none() && running.len() < AT_ONCE {
            let agent = Agent {
                url: server.url(),
                ledger: folder.path().join(format!("ledger-{next}")),
                key: format!("key-{next}"),
            };
            running.insert(next, tokio::spawn(killed_at(agent, server.addr, next)));
            next += 1;
        }
        let oldest = *running.keys().min().unwrap();
        let has_ended = running.remove(&oldest).unwrap().await.unwrap();
        if has_ended {
            ended = Some(oldest);
        }
    }
    // It does not only seem to have lines.
    assert!(ended > Some(40), "{ended:?}");
    server.stop().expect(0);
}

#[test]
fn a_langgraph_node_stops_resumes_and_runs_once() {
    let packages = ["langgraph==1.2.24", "langgraph-checkpoint-sqlite==3.1.2"];
    let import = "import langgraph.checkpoint.sqlite, langgraph.graph";
    let interpreter = environment("langgraph-1", &packages, import);
    let folder = TempDir::new().unwrap();
    let server = Served::start(serve(&folder.path().join("aegis.db")));
    let checkpoints = folder.path().join("checkpoints.db");
    let mut command = python(
        &interpreter,
        &[
            &script("tests/cli/langgraph_loop.py"),
            &script("examples/python"),
            checkpoints.to_str().unwrap(),
        ],
    );
    command
        .env("AEGIS_URL", server.url())
        .env("AEGIS_TENANT", "acme");
    command.env("LANGSMITH_TRACING", "false");
    command.env("PYTHONDONTWRITEBYTECODE", "1");
    let ended = run(command).expect(0);
    assert!(ended.stdout.ends_with("all is well\n"), "{ended:?}");
    server.stop().expect(0);
}

#[test]
fn the_example_is_one_short_file() {
    let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/python/aegis_loop.py");
    let lines = fs::read_to_string(example).unwrap().lines().count();
    assert!(lines <= 150, "{lines}");
}

/// Runs Python that has the example as `aegis`.
fn driven(url: &str, code: &str) -> Ended {
    let start = "import json, sys; sys.path.insert(0, sys.argv[1]); import aegis_loop; \
                 aegis = aegis_loop.Aegis(patience=2)\n";
    let program = format!("{start}{code}");
    let examples = script("examples/python");
    let arguments = ["-c", &program, &*examples];
    let mut command = python(interpreter(), &arguments);
    command.env("AEGIS_URL", url).env("AEGIS_TENANT", "acme");
    command.env("PYTHONDONTWRITEBYTECODE", "1");
    run(command)
}

#[test]
fn an_edit_to_nothing_is_run_as_nothing() {
    let folder = TempDir::new().unwrap();
    let server = Served::start(serve(&folder.path().join("aegis.db")));
    let ended = driven(
        &server.url(),
        r#"
action = aegis.submit("k", {"amount": 12.5}, allow_edit=True)
seen = {"digest": action["digest"], "payload": {}}
aegis.call("POST", f"actions/{action['request_id']}/approve", seen)
action = aegis.wait(action["request_id"])
aegis.run_once(action, lambda payload, id: print("ran", payload))
"#,
    );
    assert_eq!(ended.expect(0).stdout, "ran {}\n");
    server.stop().expect(0);
}

#[test]
fn an_outcome_that_cannot_be_told_whole_is_on_record_all_the_same() {
    let folder = TempDir::new().unwrap();
    let server = Served::start(serve(&folder.path().join("aegis.db")));
    let ended = driven(
        &server.url(),
        r#"
def fail(text):
    raise OSError(text)

deep = []
for _ in range(100000):
    deep = [deep]
outcomes = {
    "set": lambda *_: {1}, "nan": lambda *_: float("nan"), "long": lambda *_: "x" * 70000,
    "twice": lambda *_: {1: 1, "1": 2}, "deep": lambda *_: deep, "text": lambda *_: "\udc80",
    "fails": lambda *_: fail("no file \udc80"),
}
for key, run in outcomes.items():
    action = aegis.submit(key, {})
    aegis.call("POST", f"actions/{action['request_id']}/approve", {})
    action = aegis.wait(action["request_id"])
    try:
        aegis.run_once(action, run)
    except OSError:
        pass
    print(key, aegis.call("GET", f"status/{action['request_id']}")["execution"])
"#,
    );
    let ended = ended.expect(0);
    let lines: Vec<_> = ended.stdout.lines().collect();
    let completed = ["set", "nan", "long", "twice", "deep", "text"];
    let mut expected: Vec<_> = completed.map(|key| format!("{key} completed")).into();
    expected.push("fails failed".to_owned());
    assert_eq!(lines, expected);
    server.stop().expect(0);
}

const RUN: &str = r#"
action = {"request_id": "r-1", "digest": None, "status": "COMMITTED", "decision": "approve"}
try:
    aegis.run_once(action, lambda payload, id: print("ran", payload), lease=1)
except Exception as error:
    print(type(error).__name__)
"#;

fn claimed(id: &str, digest: &Value) -> aegis_hitl::testing::Act {
    let action = json!({
        "request_id": id, "status": "COMMITTED", "decision": "approve", "execution": "claimed",
        "digest": digest,
    });
    let claim = json!({ "token": "t", "fence": 1 });
    let body = json!({ "action": action, "claim": claim });
    aegis_hitl::testing::Act::answer(200).body(body.to_string())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_claim_that_came_too_late_or_is_on_something_else_runs_nothing() {
    use aegis_hitl::testing::{Act, Peer};

    let lost = json!({ "code": "claim-lost", "status": 422 }).to_string();
    let late = claimed("r-1", &Value::Null).after(Duration::from_millis(1500));
    for script in [
        vec![late, Act::answer(422).body(lost.clone())],
        vec![claimed("r-2", &Value::Null), Act::answer(422).body(lost)],
        vec![claimed("r-1", &json!("f".repeat(64)))],
        vec![Act::answer(200).body("{}")],
        vec![Act::answer(200).body("[]")],
        vec![Act::answer(409).body("{\"code\":\"already-claimed\"}")],
    ] {
        let peer = Peer::start(script).await;
        let ended = driven(&peer.url(), RUN).expect(0);
        assert!(!ended.stdout.contains("ran"), "{ended:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redirect_takes_no_credentials_elsewhere() {
    use aegis_hitl::testing::{Act, Peer};

    let elsewhere = Peer::start([claimed("r-1", &Value::Null)]).await;
    for status in [301, 302, 303, 307, 308] {
        let act = Act::answer(status).header("location", &elsewhere.url());
        let peer = Peer::start([act]).await;
        let ended = driven(&peer.url(), RUN).expect(0);
        assert_eq!(ended.stdout, "Refused\n", "{status}");
    }
    assert_eq!(elsewhere.count(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_does_not_wait_is_not_hammered() {
    use aegis_hitl::testing::{Act, Peer};

    let pending = json!({ "request_id": "r-1", "status": "PENDING" }).to_string();
    let peer = Peer::start([Act::answer(200).body(pending)]).await;
    let ended = driven(
        &peer.url(),
        r#"
import time
try:
    aegis.wait("r-1", time.monotonic() + 3)
except TimeoutError:
    print("late")
"#,
    );
    assert_eq!(ended.expect(0).stdout, "late\n");
    assert!(peer.count() < 20, "{}", peer.count());
}
