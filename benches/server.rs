//! Measures how many decisions per second the server makes durable, and how long each takes.
//!
//! The server runs on the in-memory store, which sets the limit, and on the embedded store. It is a
//! second process; this process generates the load on one thread. `--millions 1,10` adds stores
//! that already hold that many million actions.
//!
//! `--against BINARY` compares something else: the embedded store of this build and of another one,
//! whose bench `server` is that binary. They take turns, under the load of this process.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout
)]

#[path = "support/child.rs"]
mod child;
#[path = "support/latency.rs"]
mod latency;
#[path = "support/load.rs"]
mod load;
#[path = "support/results.rs"]
mod results;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use aegis_hitl::protocol::Payload;
use aegis_hitl::server::{HitlService, Server};
use aegis_hitl::store::{
    Actor, Decide, Decided, Fingerprinted, Identity, MemoryStore, SqliteStore, Store,
};
use aegis_hitl::{Decision, IdempotencyKey, RequestId, TenantId, ThreadId};
use serde_json::json;

use child::Peer;
use latency::{Sample, Summary};
use load::Keys;

const ROUNDS: usize = 5;
const EACH: Duration = Duration::from_secs(2);
const WARM_UP: Duration = Duration::from_millis(300);
const LOADS: [(usize, Keys); 4] = [
    (1, Keys::New),
    (64, Keys::New),
    (256, Keys::New),
    (64, Keys::Repeated),
];

async fn serve<St: Store>(store: St) {
    let server = Server::bind("127.0.0.1:0").await.unwrap();
    let address = server.local_addr().unwrap();
    let ended = server
        .serve(HitlService::new(store), child::announce(address))
        .await
        .unwrap();
    assert!(ended.is_drained());
}

fn run_server(path: Option<&str>) {
    // As many threads as in the `aegis` binary.
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        match path {
            None => serve(MemoryStore::new()).await,
            Some(path) => {
                let store = SqliteStore::open(path).unwrap();
                serve(store.clone()).await;
                store.close().await;
            }
        }
    });
}

struct Contender {
    name: String,
    /// `None` for the in-memory store.
    path: Option<PathBuf>,
    /// Whether every round starts with an empty store.
    is_empty: bool,
    samples: [Vec<Sample>; LOADS.len()],
    /// The server's memory after a round, in bytes.
    resident: Vec<f64>,
    /// The size of an action on disk, in bytes.
    disk: Vec<f64>,
}

impl Contender {
    fn new(name: impl Into<String>, path: Option<PathBuf>, is_empty: bool) -> Self {
        Self {
            name: name.into(),
            path,
            is_empty,
            samples: Default::default(),
            resident: Vec::new(),
            disk: Vec::new(),
        }
    }

    /// Removes the files of a store that must start empty.
    fn clear(path: Option<&PathBuf>, is_empty: bool) {
        let Some(path) = path.filter(|_| is_empty) else {
            return;
        };
        for suffix in ["", "-wal", "-shm", ".lock"] {
            let mut file = path.clone().into_os_string();
            file.push(suffix);
            let _ = std::fs::remove_file(file);
        }
    }

    async fn round(&mut self) {
        for (samples, (connections, keys)) in self.samples.iter_mut().zip(LOADS) {
            // A store that holds millions answers only one question: does it slow down?
            if !self.is_empty && (connections, keys) != (64, Keys::New) {
                continue;
            }
            let peer = match &self.path {
                Some(path) => Peer::spawn(&[path.to_str().unwrap()]),
                None => Peer::spawn(&[]),
            };
            load::run(peer.address, connections, keys, WARM_UP).await;
            samples.push(load::run(peer.address, connections, keys, EACH).await);
            if (connections, keys) == (64, Keys::New) {
                self.resident.push(peer.resident() as f64);
            }
            peer.stop();
            if let Some(path) = &self.path
                && (connections, keys) == (64, Keys::New)
            {
                let length = std::fs::metadata(path).unwrap().len() as f64;
                self.disk.push(length / actions(path) as f64);
            }
            Self::clear(self.path.as_ref(), self.is_empty);
        }
    }
}

/// The number of actions in a database.
fn actions(path: &Path) -> i64 {
    let connection = rusqlite::Connection::open(path).unwrap();
    connection
        .query_row("SELECT coalesce(max(id), 0) FROM action", [], |row| {
            row.get(0)
        })
        .unwrap()
}

/// Fills a store up to `target` actions.
async fn fill(path: &Path, target: i64) {
    let store = SqliteStore::open(path).unwrap();
    let missing = target - actions(path);
    println!(
        "filling up to {target} actions: {} are missing",
        missing.max(0)
    );
    const TASKS: i64 = 1024;
    let tasks: Vec<_> = (0..TASKS)
        .map(|task| {
            let store = store.clone();
            tokio::spawn(async move {
                for _ in 0..missing / TASKS + i64::from(task < missing % TASKS) {
                    let decided = store.decide(asked(task)).await.unwrap();
                    assert!(matches!(decided, Decided::Recorded(_)));
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    store.close().await;
}

fn asked(thread: i64) -> Decide {
    let json = std::str::from_utf8(load::BODY).unwrap();
    let payload = Payload::from_json(json).unwrap();
    Decide {
        identity: Identity {
            tenant_id: TenantId::new("acme").unwrap(),
            thread_id: ThreadId::new(format!("run-{thread:04}")).unwrap(),
            idempotency_key: IdempotencyKey::mint(),
        },
        decision: Decision::Approve,
        call_id: Some(RequestId::mint()),
        payload: Some(Fingerprinted::new(payload).unwrap()),
        comment: None,
        actor: Actor::new("acme"),
        require_submission: false,
        allow_self_approval: true,
    }
}

/// The argument of `--millions`: the sizes to measure, in millions of actions.
fn millions() -> Vec<i64> {
    let mut arguments = std::env::args().skip_while(|argument| argument != "--millions");
    let Some(list) = arguments.nth(1) else {
        return Vec::new();
    };
    list.split(',')
        .map(|number| number.parse().unwrap())
        .collect()
}

/// The argument of `--against`: the bench of another build.
fn other_build() -> Option<PathBuf> {
    let mut arguments = std::env::args().skip_while(|argument| argument != "--against");
    arguments.nth(1).map(PathBuf::from)
}

/// How a build did in one round.
struct Turn {
    sample: Sample,
    /// Microseconds of processor time that the server took for a decision.
    processor: f64,
}

async fn turn(binary: &Path, store: &PathBuf) -> Turn {
    let peer = Peer::spawn_of(binary, &[store.to_str().unwrap()]);
    load::run(peer.address, 64, Keys::New, WARM_UP).await;
    let (before, begun) = (peer.processor_time(), Instant::now());
    let sample = load::run(peer.address, 64, Keys::New, EACH).await;
    let used = peer.processor_time() - before;
    let decisions = sample.rate * begun.elapsed().as_secs_f64();
    peer.stop();
    Contender::clear(Some(store), true);
    Turn {
        sample,
        processor: used.as_secs_f64() * 1e6 / decisions,
    }
}

/// Compares this build with another one: in each round both take a turn, in changing order, and what
/// counts is the median of the rounds' ratios.
async fn compare(other: &Path) {
    const PAIRS: usize = 21;
    let this = std::env::current_exe().unwrap();
    let store = results::folder().join("compared.db");
    Contender::clear(Some(&store), true);
    let (mut rates, mut processor) = (Vec::new(), Vec::new());
    for round in 0..PAIRS {
        let (ours, theirs);
        if round % 2 == 0 {
            ours = turn(&this, &store).await;
            theirs = turn(other, &store).await;
        } else {
            theirs = turn(other, &store).await;
            ours = turn(&this, &store).await;
        }
        println!(
            "{:.0} decisions/s of {:.0}, {:.1} us of processor time of {:.1}",
            ours.sample.rate, theirs.sample.rate, ours.processor, theirs.processor
        );
        rates.push(ours.sample.rate / theirs.sample.rate);
        processor.push(ours.processor / theirs.processor);
    }
    for (name, mut ratios) in [("rate", rates), ("processor time", processor)] {
        let median = results::median(&mut ratios);
        println!(
            "{name}: {median:.3} of the other build's, half of the rounds between {:.3} and {:.3}",
            ratios[PAIRS / 4],
            ratios[PAIRS - 1 - PAIRS / 4]
        );
    }
}

fn main() {
    let arguments: Vec<_> = std::env::args().collect();
    if let Some(at) = arguments
        .iter()
        .position(|argument| argument == child::SERVE)
    {
        return run_server(arguments.get(at + 1).map(String::as_str));
    }
    if !results::is_asked_for() {
        return;
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    if let Some(other) = other_build() {
        return runtime.block_on(compare(&other));
    }
    let folder = results::folder();
    let mut contenders = vec![
        Contender::new("in-memory store", None, true),
        Contender::new("embedded store", Some(folder.join("empty.db")), true),
    ];
    let filling = tokio::runtime::Runtime::new().unwrap();
    for millions in millions() {
        let path = folder.join(format!("{millions}-million.db"));
        filling.block_on(fill(&path, millions * 1_000_000));
        let name = format!("embedded store, {millions} million actions");
        contenders.push(Contender::new(name, Some(path), false));
    }
    drop(filling);

    for contender in &contenders {
        Contender::clear(contender.path.as_ref(), contender.is_empty);
    }
    for _ in 0..ROUNDS {
        for contender in &mut contenders {
            runtime.block_on(contender.round());
        }
    }
    report(&mut contenders);
}

fn report(contenders: &mut [Contender]) {
    println!(
        "| store | load | decisions/s | p50, us | p99, us | memory, MiB | disk, bytes an action |"
    );
    println!("| --- | --- | ---: | ---: | ---: | ---: | ---: |");
    let mut rows = Vec::new();
    for (at, (connections, keys)) in LOADS.into_iter().enumerate() {
        for contender in &mut *contenders {
            if contender.samples[at].is_empty() {
                continue;
            }
            let summary = Summary::of(&contender.samples[at]);
            let is_usual = (connections, keys) == (64, Keys::New);
            let figure = |values: &mut Vec<f64>| {
                (is_usual && !values.is_empty()).then(|| results::median(values))
            };
            let resident = figure(&mut contender.resident);
            let disk = figure(&mut contender.disk);
            let text = |value: Option<f64>, unit: f64| {
                value.map_or(String::from("-"), |value| format!("{:.0}", value / unit))
            };
            println!(
                "| {} | {connections} connections, {keys:?} keys | {:.0} | {:.0} | {:.0} | {} | {} |",
                contender.name,
                summary.rate,
                summary.p50,
                summary.p99,
                text(resident, 1024.0 * 1024.0),
                text(disk, 1.0)
            );
            rows.push(json!({
                "name": contender.name,
                "connections": connections,
                "repeated": keys == Keys::Repeated,
                "summary": summary,
                "resident": resident,
                "disk": disk,
            }));
        }
    }
    results::save("server", &json!(rows));
}
