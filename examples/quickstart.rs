//! Sends fifty approvals at once through a network that fails. Each is decided exactly once.
//!
//! The server runs in this process, on a temporary folder. A small TCP hop stands between it and
//! the clients. At first the hop is down and connections are refused. Later it loses replies that
//! the server has committed, and answers 503 by itself.
//!
//! ```text
//! cargo run --example quickstart --features server
//! ```

#![allow(clippy::print_stdout)]

use std::collections::HashMap;
use std::error::Error;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use aegis_hitl::server::{HitlService, Server};
use aegis_hitl::store::{SqliteStore, Store};
use aegis_hitl::{AegisService, IdempotencyKey, Outcome, Receipt};
use serde_json::json;
use tokio::io::{self, AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;

const APPROVALS: usize = 50;

type BoxError = Box<dyn Error + Send + Sync>;

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let folder = tempfile::tempdir()?;
    let store = SqliteStore::open(folder.path().join("aegis.db"))?;
    let server = Server::bind("127.0.0.1:0").await?;
    let server_address = server.local_addr()?;
    let (stop, stopped) = oneshot::channel::<()>();
    let service = HitlService::new(store.clone());
    let serving = tokio::spawn(server.serve(service, async {
        let _ = stopped.await;
    }));

    // Nothing listens on this address yet.
    let hop_address = TcpListener::bind("127.0.0.1:0").await?.local_addr()?;
    let aegis = AegisService::builder()
        .base_url(format!("http://{hop_address}"))
        .tenant_id("acme")
        .thread_id("run-7")
        .build()?;

    println!(
        "{APPROVALS} approvals at once, through a hop that refuses, loses replies and answers 503 ..."
    );
    let first_round = tokio::spawn(approve_all(aegis.clone()));
    tokio::time::sleep(Duration::from_millis(100)).await;
    let hop = Hop::new(server_address);
    tokio::spawn(hop.clone().run(TcpListener::bind(hop_address).await?));
    let first = first_round.await??;

    println!("... and once more, as an agent that crashed and does not know how far it came.\n");
    let second = approve_all(aegis).await?;

    println!("  #  on the way                    attempts  first asked  asked again");
    let faults = hop.faults();
    for (i, (first, second)) in first.iter().zip(&second).enumerate() {
        let met = faults.get(key(i).as_str()).cloned().unwrap_or_default();
        // An attempt that the hop did not see met a closed port.
        let refused = usize::try_from(first.attempts())? - met.len() - 1;
        let way: Vec<_> = std::iter::repeat_n("refused", refused).chain(met).collect();
        println!(
            "{:>3}  {:<28}  {:>8}  {:<11}  {}",
            i + 1,
            way.join(", "),
            first.attempts(),
            word(first),
            word(second),
        );
    }

    let totals = store.totals().await?;
    println!("\nthe hop passed {} requests on", hop.passed());
    println!(
        "the server's own count: {} decisions, {} events",
        totals.decisions, totals.events
    );

    // If the receiver is gone, the server has ended already.
    let _ = stop.send(());
    let _ = serving.await??;
    store.close().await;
    let expected = u64::try_from(APPROVALS)?;
    if (totals.decisions, totals.events) != (expected, expected) {
        return Err(format!("expected {expected} decisions and {expected} events").into());
    }
    Ok(())
}

/// Derives the key of an approval from its subject, so that a repeated request has the same key.
fn key(i: usize) -> IdempotencyKey {
    IdempotencyKey::derive(["run-7", "send-email", &format!("user-{i}@example.com")])
}

async fn approve_all(aegis: AegisService) -> Result<Vec<Receipt>, BoxError> {
    let mut calls = Vec::new();
    for i in 0..APPROVALS {
        let aegis = aegis.clone();
        calls.push(tokio::spawn(async move {
            aegis
                .approve(key(i))
                .payload(&json!({"action": "send-email", "to": format!("user-{i}@example.com")}))
                .await
        }));
        if i == 9 {
            // The first ten find no hop. The others start later and find it.
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }
    let mut receipts = Vec::new();
    for call in calls {
        receipts.push(call.await??);
    }
    Ok(receipts)
}

fn word(receipt: &Receipt) -> &'static str {
    match receipt.outcome() {
        Outcome::Accepted => "fresh",
        Outcome::Duplicate => "duplicate",
    }
}

/// A TCP hop that mistreats the first attempts of most keys, so that every run meets every fault.
#[derive(Clone)]
struct Hop {
    server: SocketAddr,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    /// The faults that each key's attempts have met.
    faults: HashMap<String, Vec<&'static str>>,
    attempts: HashMap<String, usize>,
    passed: usize,
}

#[derive(Clone, Copy)]
enum Fate {
    Pass,
    LoseReply,
    Answer503,
}

impl Hop {
    fn new(server: SocketAddr) -> Self {
        Self {
            server,
            state: Arc::default(),
        }
    }

    async fn run(self, listener: TcpListener) {
        while let Ok((client, _)) = listener.accept().await {
            let hop = self.clone();
            // Broken connections are the purpose of this hop.
            tokio::spawn(async move { hop.relay(client).await.ok() });
        }
    }

    async fn relay(self, mut client: TcpStream) -> io::Result<()> {
        let mut server = TcpStream::connect(self.server).await?;
        while let Some(request) = read_message(&mut client).await? {
            match self.fate(&request) {
                Fate::Answer503 => {
                    let answer = b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n";
                    client.write_all(answer).await?;
                }
                fate => {
                    server.write_all(&request).await?;
                    // The server answers once it has committed.
                    let Some(reply) = read_message(&mut server).await? else {
                        break;
                    };
                    if matches!(fate, Fate::LoseReply) {
                        break;
                    }
                    client.write_all(&reply).await?;
                }
            }
        }
        Ok(())
    }

    /// Chooses a fate by the last digit of the key and the number of the attempt.
    fn fate(&self, request: &[u8]) -> Fate {
        let key = header(request, "idempotency-key").unwrap_or_default();
        let mut state = self
            .state
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        let attempts = state.attempts.entry(key.clone()).or_default();
        *attempts += 1;
        let attempt = *attempts;
        let fate = match (attempt, key.bytes().last().unwrap_or_default() % 4) {
            (1, 0 | 1) | (2, 2) => Fate::LoseReply,
            (1, 2) | (2, 1) => Fate::Answer503,
            _ => Fate::Pass,
        };
        let met = match fate {
            Fate::Pass => None,
            Fate::LoseReply => Some("lost reply"),
            Fate::Answer503 => Some("503"),
        };
        if let Some(met) = met {
            state.faults.entry(key).or_default().push(met);
        }
        if !matches!(fate, Fate::Answer503) {
            state.passed += 1;
        }
        fate
    }

    fn faults(&self) -> HashMap<String, Vec<&'static str>> {
        self.state
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
            .faults
            .clone()
    }

    fn passed(&self) -> usize {
        self.state
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
            .passed
    }
}

/// Reads one HTTP/1.1 message with a `Content-Length`. Returns `None` at the end of the connection.
async fn read_message(stream: &mut TcpStream) -> io::Result<Option<Vec<u8>>> {
    let mut message = Vec::new();
    loop {
        if let Some(head) = message.windows(4).position(|window| window == b"\r\n\r\n") {
            let body: usize = header(&message, "content-length")
                .and_then(|length| length.parse().ok())
                .unwrap_or_default();
            if message.len() >= head + 4 + body {
                return Ok(Some(message));
            }
        }
        if stream.read_buf(&mut message).await? == 0 {
            return Ok(None);
        }
    }
}

fn header(message: &[u8], name: &str) -> Option<String> {
    let text = String::from_utf8_lossy(message);
    let head = text.split("\r\n\r\n").next()?;
    head.lines().skip(1).find_map(|line| {
        let (found, value) = line.split_once(':')?;
        found
            .eq_ignore_ascii_case(name)
            .then(|| value.trim().to_owned())
    })
}
