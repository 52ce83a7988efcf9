//! Measures what the human loop costs, on the embedded store over HTTP.
//!
//! - the whole way of an action (submit, decide, claim, complete), as a ratio to a bare decision
//! - a page of pending actions, as JSON and of the inbox, among a thousand and among a million
//!   (`--million`)
//! - how long after a decision those who wait for it are answered, with 1,000 waiters
//! - how long after a decision the last of 1,000 who wait for it, or who follow the events of its
//!   tenant, has it
//! - what each of those takes of the server's resident memory
//!
//! `--waiting` measures only those who wait, `--pages` only the pages.

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
#[path = "support/results.rs"]
mod results;

use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use aegis_hitl::server::{HitlService, Inbox, Server};
use aegis_hitl::store::{Actor, Identity, SqliteStore, Store, Submission, Submit, Submitted};
use aegis_hitl::{IdempotencyKey, TenantId, ThreadId};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use uuid::Uuid;

use child::Peer;
use latency::{Sample, Summary};

const ROUNDS: usize = 5;
const EACH: Duration = Duration::from_secs(2);
const CONNECTIONS: usize = 64;
const WAITERS: usize = 1000;
const DECISIONS: usize = 20;
/// The header in which a proxy would name the reviewer.
const USER: &str = "x-forwarded-user";
const BODY: &str = r#"{"payload":{"to":"a@b.c","amount":12.5,"currency":"EUR"}}"#;

fn run_server(path: &str) {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let store = SqliteStore::open(path).unwrap();
        let server = Server::bind("127.0.0.1:0").await.unwrap();
        let server = server.max_connections(4096);
        let address = server.local_addr().unwrap();
        let user = http::HeaderName::from_static(USER);
        let inbox = Inbox::new().trust_user_header(user, [address.ip()]);
        let service = HitlService::builder(store.clone()).inbox(inbox);
        let ended = server.serve(service.build().unwrap(), child::announce(address));
        assert!(ended.await.unwrap().is_drained());
        store.close().await;
    });
}

/// A kept connection.
struct Client {
    stream: TcpStream,
    answer: Vec<u8>,
    thread: String,
}

impl Client {
    async fn open(address: SocketAddr, number: usize) -> Self {
        let stream = TcpStream::connect(address).await.unwrap();
        stream.set_nodelay(true).unwrap();
        Self {
            stream,
            answer: Vec::with_capacity(16 * 1024),
            thread: format!("run-{number:04}"),
        }
    }

    async fn send(&mut self, method: &str, path: &str, more: &str, body: &str) {
        let request = format!(
            "{method} /api/v1/hitl/{path} HTTP/1.1\r\nhost: localhost\r\ntenant-id: acme\r\n\
             thread-id: {}\r\nidempotency-key: {}\r\nx-request-id: {}\r\n{more}\
             content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            self.thread,
            Uuid::new_v4(),
            Uuid::now_v7(),
            body.len()
        );
        self.stream.write_all(request.as_bytes()).await.unwrap();
    }

    async fn answer(&mut self) -> Value {
        serde_json::from_slice(self.answer_text().await).unwrap()
    }

    /// A page of the inbox.
    async fn page(&mut self, tenant: &str) -> &[u8] {
        let request = format!("GET / HTTP/1.1\r\nhost: localhost\r\n{USER}: alice\r\n{tenant}\r\n");
        self.stream.write_all(request.as_bytes()).await.unwrap();
        self.answer_text().await
    }

    async fn answer_text(&mut self) -> &[u8] {
        self.answer.clear();
        loop {
            assert!(self.stream.read_buf(&mut self.answer).await.unwrap() > 0);
            let Some(head) = self.answer.windows(4).position(|four| four == b"\r\n\r\n") else {
                continue;
            };
            let text = std::str::from_utf8(&self.answer[..head]).unwrap();
            let length = text.split_once("content-length: ").unwrap().1;
            let length: usize = length.lines().next().unwrap().parse().unwrap();
            if self.answer.len() >= head + 4 + length {
                assert!(text.starts_with("HTTP/1.1 20"), "{text}");
                return &self.answer[head + 4..];
            }
        }
    }

    /// Reads on until a text has passed.
    async fn passes(&mut self, text: &[u8]) {
        loop {
            let found = self
                .answer
                .windows(text.len())
                .position(|part| part == text);
            if let Some(at) = found {
                self.answer.drain(..at + text.len());
                return;
            }
            assert!(self.stream.read_buf(&mut self.answer).await.unwrap() > 0);
        }
    }

    async fn call(&mut self, method: &str, path: &str, body: &str) -> Value {
        self.send(method, path, "", body).await;
        self.answer().await
    }

    /// Takes an action the whole way.
    async fn whole_way(&mut self) {
        let action = self.call("POST", "actions", BODY).await;
        let id = action["request_id"].as_str().unwrap();
        let digest = json!({ "digest": action["digest"] }).to_string();
        self.call("POST", &format!("actions/{id}/approve"), &digest)
            .await;
        let claimed = self
            .call("POST", &format!("actions/{id}/claim"), &digest)
            .await;
        let token = json!({ "token": claimed["claim"]["token"] }).to_string();
        self.call("POST", &format!("actions/{id}/complete"), &token)
            .await;
    }
}

/// Load on all connections for a while.
async fn load(address: SocketAddr, whole: bool) -> Sample {
    let mut clients = Vec::new();
    for number in 0..CONNECTIONS {
        clients.push(Client::open(address, number).await);
    }
    let begun = Instant::now();
    let tasks: Vec<_> = clients
        .into_iter()
        .map(|mut client| {
            tokio::spawn(async move {
                let mut latencies = Vec::new();
                while begun.elapsed() < EACH {
                    let now = Instant::now();
                    if whole {
                        client.whole_way().await;
                    } else {
                        client.call("POST", "approve", BODY).await;
                    }
                    latencies.push(now.elapsed().as_nanos() as u32);
                }
                latencies
            })
        })
        .collect();
    let mut all = Vec::new();
    for task in tasks {
        all.extend(task.await.unwrap());
    }
    Sample::of(all, begun.elapsed())
}

/// The microseconds that a page of pending actions takes.
async fn page(address: SocketAddr) -> f64 {
    let mut client = Client::open(address, 0).await;
    let mut times = Vec::new();
    for _ in 0..500 {
        let now = Instant::now();
        client
            .call("GET", "actions?status=PENDING&limit=50", "")
            .await;
        times.push(now.elapsed().as_secs_f64() * 1e6);
    }
    results::median(&mut times)
}

/// The microseconds that a page of the inbox takes.
async fn inbox_page(address: SocketAddr, tenant: &str) -> f64 {
    let mut client = Client::open(address, 0).await;
    let mut times = Vec::new();
    for _ in 0..500 {
        let now = Instant::now();
        let page = client.page(tenant).await;
        times.push(now.elapsed().as_secs_f64() * 1e6);
        let page = std::str::from_utf8(page).unwrap();
        assert!(page.matches("href=\"/actions/").count() >= 50, "{page}");
    }
    results::median(&mut times)
}

/// How long after a decision each of those who wait for it is answered.
async fn wake_ups(address: SocketAddr) -> Sample {
    let mut reviewer = Client::open(address, 0).await;
    let mut waiters = Vec::new();
    for number in 0..WAITERS {
        let action = reviewer.call("POST", "actions", BODY).await;
        let id = action["request_id"].as_str().unwrap().to_owned();
        let mut waiter = Client::open(address, number).await;
        let path = format!("status/{id}");
        waiter.send("GET", &path, "prefer: wait=55\r\n", "").await;
        let answered = tokio::spawn(async move {
            let action = waiter.answer().await;
            (Instant::now(), action["decision"] == "approve")
        });
        waiters.push((
            id,
            json!({ "digest": action["digest"] }).to_string(),
            answered,
        ));
    }
    let mut latencies = Vec::new();
    let begun = Instant::now();
    for (id, digest, answered) in waiters {
        // From the answer to the reviewer on: the decision is then committed.
        reviewer
            .call("POST", &format!("actions/{id}/approve"), &digest)
            .await;
        let committed = Instant::now();
        let (at, approved) = answered.await.unwrap();
        assert!(approved);
        latencies.push(at.saturating_duration_since(committed).as_nanos() as u32);
    }
    Sample::of(latencies, begun.elapsed())
}

/// A decision, and how long after it the last of many has learned of it.
async fn last_of_all(
    reviewer: &mut Client,
    id: &str,
    digest: &Value,
    learned: &mut mpsc::UnboundedReceiver<Instant>,
) -> u32 {
    let body = json!({ "digest": digest }).to_string();
    reviewer
        .call("POST", &format!("actions/{id}/approve"), &body)
        .await;
    // From the answer to the reviewer on: the decision is then committed.
    let committed = Instant::now();
    let mut last = committed;
    for _ in 0..WAITERS {
        last = last.max(learned.recv().await.unwrap());
    }
    last.duration_since(committed).as_nanos() as u32
}

/// How long after a decision the last of those who follow the tenant's events has it on its socket,
/// and the bytes that each takes of the server's memory.
async fn followers(peer: &Peer) -> (Sample, f64) {
    let mut reviewer = Client::open(peer.address, 0).await;
    let mut actions = Vec::new();
    for _ in 0..DECISIONS {
        actions.push(reviewer.call("POST", "actions", BODY).await);
    }
    let before = peer.resident();
    let (learns, mut learned) = mpsc::unbounded_channel();
    let mut tasks = Vec::new();
    for number in 0..WAITERS {
        let mut follower = Client::open(peer.address, number).await;
        follower.send("GET", "events", "", "").await;
        follower.passes(b"id: ").await;
        let learns = learns.clone();
        tasks.push(tokio::spawn(async move {
            for _ in 0..DECISIONS {
                follower.passes(b"event: approved").await;
                learns.send(Instant::now()).unwrap();
            }
        }));
    }
    let each = (peer.resident() as f64 - before as f64) / WAITERS as f64;
    let begun = Instant::now();
    let mut latencies = Vec::new();
    for action in actions {
        let id = action["request_id"].as_str().unwrap();
        latencies.push(last_of_all(&mut reviewer, id, &action["digest"], &mut learned).await);
    }
    for task in tasks {
        task.await.unwrap();
    }
    (Sample::of(latencies, begun.elapsed()), each)
}

/// How long after a decision the last of those who wait for it is answered, and the bytes that each
/// takes of the server's memory.
async fn waits_for_one(peer: &Peer) -> (Sample, f64) {
    let mut reviewer = Client::open(peer.address, 0).await;
    let before = peer.resident();
    let mut waiters = Vec::new();
    for number in 0..WAITERS {
        waiters.push(Client::open(peer.address, number).await);
    }
    let (mut latencies, mut each) = (Vec::new(), 0.0);
    let begun = Instant::now();
    for round in 0..DECISIONS {
        let action = reviewer.call("POST", "actions", BODY).await;
        let id = action["request_id"].as_str().unwrap();
        let path = format!("status/{id}");
        let (learns, mut learned) = mpsc::unbounded_channel();
        let mut tasks = Vec::new();
        for mut waiter in std::mem::take(&mut waiters) {
            waiter.send("GET", &path, "prefer: wait=55\r\n", "").await;
            let learns = learns.clone();
            tasks.push(tokio::spawn(async move {
                let action = waiter.answer().await;
                learns.send(Instant::now()).unwrap();
                assert_eq!(action["decision"], "approve");
                waiter
            }));
        }
        // The server has read them all.
        tokio::time::sleep(Duration::from_millis(200)).await;
        if round == 0 {
            each = (peer.resident() as f64 - before as f64) / WAITERS as f64;
        }
        latencies.push(last_of_all(&mut reviewer, id, &action["digest"], &mut learned).await);
        for task in tasks {
            waiters.push(task.await.unwrap());
        }
    }
    (Sample::of(latencies, begun.elapsed()), each)
}

async fn fill(path: &Path, actions: usize) {
    let store = SqliteStore::open(path).unwrap();
    let tasks: Vec<_> = (0..1024)
        .map(|task| {
            let store = store.clone();
            tokio::spawn(async move {
                for _ in 0..actions.div_ceil(1024) {
                    let submit = Submit {
                        identity: Identity {
                            tenant_id: TenantId::new("acme").unwrap(),
                            thread_id: ThreadId::new(format!("run-{task:04}")).unwrap(),
                            idempotency_key: IdempotencyKey::mint(),
                        },
                        call_id: None,
                        payload: None,
                        submission: Submission::default(),
                        only_existing: false,
                        actor: Actor::new("anonymous"),
                    };
                    let submitted = store.submit(submit).await.unwrap();
                    assert!(matches!(submitted, Submitted::Recorded(_)));
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    store.close().await;
}

/// Measures pages among few and among many actions.
fn pages(runtime: &tokio::runtime::Runtime, folder: &Path, arguments: &[String]) -> Vec<Value> {
    let filling = tokio::runtime::Runtime::new().unwrap();
    let mut pages = Vec::new();
    let sizes: &[usize] = if arguments.iter().any(|argument| argument == "--million") {
        &[1000, 1_000_000]
    } else {
        &[1000, 100_000]
    };
    for actions in sizes {
        let name = format!("list-{actions}.db");
        filling.block_on(fill(&folder.join(&name), *actions));
        let peer = Peer::spawn(&[folder.join(&name).to_str().unwrap()]);
        let time = runtime.block_on(page(peer.address));
        let of_tenant = runtime.block_on(inbox_page(peer.address, "tenant-id: acme\r\n"));
        let of_all = runtime.block_on(inbox_page(peer.address, ""));
        println!(
            "page of 50 pending among {actions}, us: JSON {time:.0}, inbox of one tenant \
             {of_tenant:.0}, inbox of all tenants {of_all:.0}"
        );
        pages.push(json!({
            "actions": actions, "us": time, "inbox_us": of_tenant, "inbox_of_all_us": of_all,
        }));
        peer.stop();
    }
    pages
}

fn main() {
    let arguments: Vec<_> = std::env::args().collect();
    if let Some(at) = arguments
        .iter()
        .position(|argument| argument == child::SERVE)
    {
        return run_server(&arguments[at + 1]);
    }
    if !results::is_asked_for() {
        return;
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let folder = tempfile::TempDir::new_in(results::folder()).unwrap();
    let serve = |name: &str| {
        let path = folder.path().join(name);
        Peer::spawn(&[path.to_str().unwrap()])
    };
    if arguments.iter().any(|argument| argument == "--pages") {
        pages(&runtime, folder.path(), &arguments);
        return;
    }
    let (mut wake, mut follow, mut one) = (Vec::new(), Vec::new(), Vec::new());
    let (mut of_follower, mut of_wait) = (Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        let peer = serve(&format!("wake-{round}.db"));
        wake.push(runtime.block_on(wake_ups(peer.address)));
        peer.stop();
        let peer = serve(&format!("follow-{round}.db"));
        let (sample, bytes) = runtime.block_on(followers(&peer));
        follow.push(sample);
        of_follower.push(bytes);
        peer.stop();
        let peer = serve(&format!("one-{round}.db"));
        let (sample, bytes) = runtime.block_on(waits_for_one(&peer));
        one.push(sample);
        of_wait.push(bytes);
        peer.stop();
    }
    let [wake, follow, one] = [&wake, &follow, &one].map(|samples| Summary::of(samples));
    println!(
        "wake-up with {WAITERS} waiters, us: p50 {:.0}, p99 {:.0}",
        wake.p50, wake.p99
    );
    println!(
        "{WAITERS} who follow one tenant, commit to the last socket, us: p50 {:.0}, p99 {:.0}",
        follow.p50, follow.p99
    );
    println!(
        "{WAITERS} who wait for one action, commit to the last answer, us: p50 {:.0}, p99 {:.0}",
        one.p50, one.p99
    );
    let [of_follower, of_wait] =
        [&mut of_follower, &mut of_wait].map(|bytes| results::median(bytes));
    println!(
        "resident memory of a connection: {of_follower:.0} bytes following, {of_wait:.0} waiting"
    );
    if arguments.iter().any(|argument| argument == "--waiting") {
        return;
    }
    let (mut bare, mut whole) = (Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        let peer = serve(&format!("bare-{round}.db"));
        bare.push(runtime.block_on(load(peer.address, false)));
        peer.stop();
        let peer = serve(&format!("whole-{round}.db"));
        whole.push(runtime.block_on(load(peer.address, true)));
        peer.stop();
    }
    let [bare, whole] = [&bare, &whole].map(|samples| Summary::of(samples));
    println!("bare decisions/s: {:.0}", bare.rate);
    println!(
        "whole ways/s: {:.0} ({:.2} of a bare decision)",
        whole.rate,
        whole.rate / bare.rate
    );
    let pages = pages(&runtime, folder.path(), &arguments);
    results::save(
        "human_loop",
        &json!({
            "bare": bare, "whole": whole, "pages": pages,
            "wake": wake, "follow": follow, "one": one,
            "follower_bytes": of_follower, "wait_bytes": of_wait,
        }),
    );
}
