//! Measures the outbox, on the embedded store and loopback.
//!
//! - how many events per second one endpoint receives
//! - what an endpoint costs those who decide: decisions/s with one, as a ratio to none

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout
)]

#[path = "support/results.rs"]
mod results;

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use aegis_hitl::outbox::{Deliveries, Endpoint, Outbox, Start};
use aegis_hitl::store::{Actor, Decide, Identity, SqliteStore, Store};
use aegis_hitl::{Decision, IdempotencyKey, RequestId, TenantId, ThreadId};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

const ROUNDS: usize = 5;
const EVENTS: usize = 20_000;
const DECIDERS: usize = 64;
const EACH: Duration = Duration::from_secs(3);

/// Answers 204 to everything, and counts.
async fn receive(mut stream: TcpStream, received: Arc<AtomicUsize>) {
    let _ = stream.set_nodelay(true);
    let mut bytes = Vec::with_capacity(16 * 1024);
    loop {
        let head = bytes.windows(4).position(|four| four == b"\r\n\r\n");
        let end = head.map(|head| {
            let text = std::str::from_utf8(&bytes[..head]).unwrap();
            let length = text.split_once("content-length: ").unwrap().1;
            let length: usize = length.lines().next().unwrap().parse().unwrap();
            head + 4 + length
        });
        match end.filter(|end| bytes.len() >= *end) {
            Some(end) => {
                bytes.drain(..end);
                received.fetch_add(1, Ordering::Relaxed);
                let answer = b"HTTP/1.1 204 No Content\r\n\r\n";
                if stream.write_all(answer).await.is_err() {
                    return;
                }
            }
            None => match stream.read_buf(&mut bytes).await {
                Ok(1..) => {}
                _ => return,
            },
        }
    }
}

/// A receiver on a thread of its own.
fn receiver() -> (SocketAddr, Arc<AtomicUsize>) {
    let received = Arc::new(AtomicUsize::new(0));
    let counter = received.clone();
    let (sender, address) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            sender.send(listener.local_addr().unwrap()).unwrap();
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(receive(stream, counter.clone()));
            }
        });
    });
    (address.recv().unwrap(), received)
}

fn decision(number: usize) -> Decide {
    Decide {
        identity: Identity {
            tenant_id: TenantId::new("acme").unwrap(),
            thread_id: ThreadId::new(format!("run-{number:04}")).unwrap(),
            idempotency_key: IdempotencyKey::mint(),
        },
        decision: Decision::Approve,
        call_id: Some(RequestId::mint()),
        payload: None,
        comment: None,
        actor: Actor::new("anonymous"),
        require_submission: false,
        allow_self_approval: true,
    }
}

/// Decides on many tasks, until there are as many as wanted or the time is over. Returns how many
/// there were each second.
async fn decide(store: &SqliteStore, most: usize, time: Duration) -> f64 {
    let begun = Instant::now();
    let tasks: Vec<_> = (0..DECIDERS)
        .map(|number| {
            let store = store.clone();
            tokio::spawn(async move {
                let mut decided = 0;
                while decided < most.div_ceil(DECIDERS) && begun.elapsed() < time {
                    store.decide(decision(number)).await.unwrap();
                    decided += 1;
                }
                decided
            })
        })
        .collect();
    let mut decided = 0;
    for task in tasks {
        decided += task.await.unwrap();
    }
    decided as f64 / begun.elapsed().as_secs_f64()
}

async fn deliver(store: &SqliteStore, address: SocketAddr) -> Deliveries {
    let secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw".parse().unwrap();
    let endpoint = Endpoint::standard("bench", &format!("http://{address}/"), vec![secret]);
    let endpoint = endpoint.unwrap().start(Start::Oldest);
    let outbox = Outbox::new(vec![endpoint]);
    outbox.start(store.clone()).await.unwrap()
}

/// The events per second that an endpoint receives which has fallen behind.
async fn catch_up(path: &Path) -> f64 {
    let store = SqliteStore::open(path).unwrap();
    decide(&store, EVENTS, Duration::MAX).await;
    let (address, received) = receiver();
    let begun = Instant::now();
    let deliveries = deliver(&store, address).await;
    while received.load(Ordering::Relaxed) < EVENTS {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let rate = EVENTS as f64 / begun.elapsed().as_secs_f64();
    deliveries.stop(Duration::from_secs(10)).await;
    store.close().await;
    rate
}

/// Decisions per second, with or without an endpoint, and the events per second that it received.
async fn beside(path: &Path, with_endpoint: bool) -> (f64, f64) {
    let store = SqliteStore::open(path).unwrap();
    let (address, received) = receiver();
    let deliveries = match with_endpoint {
        true => Some(deliver(&store, address).await),
        false => None,
    };
    let begun = Instant::now();
    let decided = decide(&store, usize::MAX, EACH).await;
    let events = received.load(Ordering::Relaxed) as f64 / begun.elapsed().as_secs_f64();
    if let Some(deliveries) = deliveries {
        deliveries.stop(Duration::from_secs(10)).await;
    }
    store.close().await;
    (decided, events)
}

fn main() {
    if !results::is_asked_for() {
        return;
    }
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let folder = tempfile::TempDir::new_in(results::folder()).unwrap();
    let path = |name: &str, round: usize| folder.path().join(format!("{name}-{round}.db"));
    let (mut alone, mut none, mut with, mut meanwhile) = (vec![], vec![], vec![], vec![]);
    for round in 0..ROUNDS {
        alone.push(runtime.block_on(catch_up(&path("alone", round))));
        none.push(runtime.block_on(beside(&path("none", round), false)).0);
        let (decided, events) = runtime.block_on(beside(&path("with", round), true));
        with.push(decided);
        meanwhile.push(events);
    }
    let [alone, none, with, meanwhile] =
        [alone, none, with, meanwhile].map(|mut rates| results::median(&mut rates));
    println!("events/s to one endpoint: {alone:.0}");
    println!(
        "decisions/s: {none:.0} without an endpoint, {with:.0} with one ({:.2}), which received \
         {meanwhile:.0} events/s meanwhile",
        with / none
    );
    results::save(
        "outbox",
        &json!({
            "events": alone,
            "decisions_without": none,
            "decisions_with": with,
            "events_meanwhile": meanwhile,
        }),
    );
}
