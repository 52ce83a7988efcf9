//! Measures what the removal of old actions takes from those who decide.
//!
//! Two servers on copies of one store that holds a million actions (`--millions 10`: that many)
//! take turns. One keeps everything. The other removes what is older than a second, which is all of
//! it. This process generates the load on one thread.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout
)]

#[path = "support/asked.rs"]
mod asked;
#[path = "support/child.rs"]
mod child;
#[path = "support/latency.rs"]
mod latency;
#[path = "support/load.rs"]
#[allow(dead_code, reason = "here every key is new")]
mod load;
#[path = "support/results.rs"]
mod results;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use aegis_hitl::server::{HitlService, Retention, Server};
use aegis_hitl::store::{Decide, Decided, SqliteStore, Store, Submission, Submit};
use serde_json::json;

use asked::asked;
use child::Peer;
use latency::{Sample, Summary};
use load::Keys;

const ROUNDS: usize = 7;
const EACH: Duration = Duration::from_secs(5);
const WARM_UP: Duration = Duration::from_millis(300);
const CONNECTIONS: usize = 64;

/// The argument of a server that removes what is old.
const REMOVES: &str = "--removes";

fn run_server(path: &str, removes: bool) {
    // As many threads as in the `aegis` binary.
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let store = SqliteStore::open(path).unwrap();
        let server = Server::bind("127.0.0.1:0").await.unwrap();
        let address = server.local_addr().unwrap();
        let sweeping = removes.then(|| {
            let retention = Retention::new(Duration::from_secs(1)).unwrap();
            let store = store.clone();
            tokio::spawn(async move { retention.run(store).await })
        });
        let service = HitlService::new(store.clone());
        let ended = server
            .serve(service, child::announce(address))
            .await
            .unwrap();
        assert!(ended.is_drained());
        if let Some(sweeping) = sweeping {
            sweeping.abort();
        }
        store.close().await;
    });
}

/// One number of a database.
fn number(path: &Path, sql: &str) -> i64 {
    let connection = rusqlite::Connection::open(path).unwrap();
    connection.query_row(sql, [], |row| row.get(0)).unwrap()
}

/// The number of actions of one event each that were looked at, which is that of those that went.
fn swept(path: &Path) -> i64 {
    number(path, "SELECT position FROM sweep")
}

/// Fills a store up to `target` actions: decided in a thousand threads, and one that is pending.
async fn fill(path: &Path, target: i64) {
    const TASKS: i64 = 1024;
    let store = SqliteStore::open(path).unwrap();
    let missing = target - number(path, "SELECT coalesce(max(id), 0) FROM action");
    println!("filling up to {target} actions");
    let tasks: Vec<_> = (0..TASKS)
        .map(|task| {
            let store = store.clone();
            tokio::spawn(async move {
                for _ in 0..(missing / TASKS).max(0) {
                    let decided = store.decide(asked(task)).await.unwrap();
                    assert!(matches!(decided, Decided::Recorded(_)));
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    let Decide {
        identity, actor, ..
    } = asked(0);
    let pending = Submit {
        identity,
        call_id: None,
        payload: None,
        submission: Submission::default(),
        actor,
        only_existing: false,
    };
    store.submit(pending).await.unwrap();
    store.close().await;
}

/// The argument of `--millions`.
fn millions() -> i64 {
    let mut arguments = std::env::args().skip_while(|argument| argument != "--millions");
    arguments.nth(1).map_or(1, |number| number.parse().unwrap())
}

struct Contender {
    name: &'static str,
    path: PathBuf,
    removes: bool,
    samples: Vec<Sample>,
    /// Actions a second that were removed.
    removed: Vec<f64>,
}

impl Contender {
    fn peer(&self) -> Peer {
        let path = self.path.to_str().unwrap();
        match self.removes {
            true => Peer::spawn(&[path, REMOVES]),
            false => Peer::spawn(&[path]),
        }
    }

    async fn round(&mut self) {
        let (before, begun) = (swept(&self.path), Instant::now());
        let peer = self.peer();
        load::run(peer.address, CONNECTIONS, Keys::New, WARM_UP).await;
        let sample = load::run(peer.address, CONNECTIONS, Keys::New, EACH).await;
        peer.stop();
        let removed = (swept(&self.path) - before) as f64 / begun.elapsed().as_secs_f64();
        println!(
            "{}: {:.0} decisions/s, p50 {:.0} us, p99 {:.0} us, {removed:.0} removed/s",
            self.name, sample.rate, sample.p50, sample.p99
        );
        self.removed.push(removed);
        self.samples.push(sample);
    }

    /// Removes without any load, and returns how many actions a second go.
    fn alone(&self) -> f64 {
        let (before, begun) = (swept(&self.path), Instant::now());
        let peer = self.peer();
        std::thread::sleep(EACH);
        peer.stop();
        (swept(&self.path) - before) as f64 / begun.elapsed().as_secs_f64()
    }
}

fn main() {
    let arguments: Vec<_> = std::env::args().collect();
    if let Some(at) = arguments
        .iter()
        .position(|argument| argument == child::SERVE)
    {
        let removes = arguments.iter().any(|argument| argument == REMOVES);
        return run_server(&arguments[at + 1], removes);
    }
    if !results::is_asked_for() {
        return;
    }
    let folder = results::folder();
    let millions = millions();
    let [all, one, other] = ["all", "kept", "removed"]
        .map(|name| folder.join(format!("retention-{millions}-{name}.db")));
    let filling = tokio::runtime::Runtime::new().unwrap();
    filling.block_on(fill(&all, millions * 1_000_000));
    drop(filling);
    for copy in [&one, &other] {
        std::fs::copy(&all, copy).unwrap();
    }
    let contender = |name, path: &PathBuf, removes| Contender {
        name,
        path: path.clone(),
        removes,
        samples: Vec::new(),
        removed: Vec::new(),
    };
    let mut contenders = [
        contender("everything is kept", &one, false),
        contender("old actions are removed", &other, true),
    ];
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    for _ in 0..ROUNDS {
        for contender in &mut contenders {
            runtime.block_on(contender.round());
        }
    }
    let alone = contenders[1].alone();
    report(&mut contenders, alone);
    for path in [&one, &other] {
        std::fs::remove_file(path).unwrap();
    }
}

fn report(contenders: &mut [Contender], alone: f64) {
    println!("| store | decisions/s | p50, us | p99, us | removed/s |");
    println!("| --- | ---: | ---: | ---: | ---: |");
    let mut rows = Vec::new();
    for contender in contenders {
        let summary = Summary::of(&contender.samples);
        let removed = results::median(&mut contender.removed);
        println!(
            "| {} | {:.0} | {:.0} | {:.0} | {removed:.0} |",
            contender.name, summary.rate, summary.p50, summary.p99
        );
        rows.push(json!({ "name": contender.name, "summary": summary, "removed": removed }));
    }
    println!("Without load, {alone:.0} are removed a second.");
    rows.push(json!({ "name": "without load", "removed": alone }));
    results::save("retention", &json!(rows));
}
