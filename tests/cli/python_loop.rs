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
