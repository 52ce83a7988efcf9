//! Whoever follows the events: at one server after the other, from where it was.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use reqwest::Client;
use serde_json::Value;
use tokio::time::{sleep, timeout};

use super::load::{TENANT, client};
use crate::support::HANG;
use crate::support::random::Random;

/// An event as it was received.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Received {
    pub position: u64,
    pub id: String,
    pub kind: String,
    pub request_id: String,
}

/// A follower of all events. Clones share what was received.
#[derive(Clone)]
pub struct Follower {
    client: Client,
    servers: Vec<SocketAddr>,
    received: Arc<Mutex<Vec<Received>>>,
}

impl Follower {
    pub fn new(servers: &[SocketAddr]) -> Self {
        Self {
            client: client(),
            servers: servers.to_vec(),
            received: Arc::default(),
        }
    }

    pub fn received(&self) -> Vec<Received> {
        self.received.lock().unwrap().clone()
    }

    /// Follows for as long as it is polled.
    pub async fn follow(self, mut random: Random) {
        loop {
            let server = random.pick(&self.servers);
            // Whatever ends it, the next begins behind what was received.
            let _ = self.follow_at(server).await;
            sleep(random.millis(5, 50)).await;
        }
    }

    async fn follow_at(&self, server: SocketAddr) -> reqwest::Result<()> {
        let last = self.received().last().map_or(0, |last| last.position);
        let request = self
            .client
            .get(format!("http://{server}/api/v1/hitl/events"))
            .header("Tenant-Id", TENANT)
            .header("Last-Event-ID", last.to_string());
        let mut response = request.send().await?.error_for_status()?;
        let mut text = String::new();
        while let Some(bytes) = response.chunk().await? {
            text.push_str(std::str::from_utf8(&bytes).expect("events in ASCII"));
            while let Some((block, rest)) = text.split_once("\n\n") {
                if let Some(event) = event(block) {
                    self.received.lock().unwrap().push(event);
                }
                text = rest.to_owned();
            }
        }
        Ok(())
    }

    /// Waits until this many events were received.
    pub async fn reach(&self, count: usize) {
        let reaching = async {
            while self.received.lock().unwrap().len() < count {
                sleep(Duration::from_millis(20)).await;
            }
        };
        let reached = timeout(HANG, reaching).await;
        let received = self.received.lock().unwrap().len();
        assert!(
            reached.is_ok(),
            "{received} of {count} events were received"
        );
    }
}

/// Reads an event. A block without data is none.
fn event(block: &str) -> Option<Received> {
    let field = |name: &str| block.lines().find_map(|line| line.strip_prefix(name));
    let data: Value = serde_json::from_str(field("data: ")?).unwrap();
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    Some(Received {
        position: field("id: ").unwrap().parse().unwrap(),
        id: text(&data["id"]),
        kind: field("event: ").unwrap().to_owned(),
        request_id: text(&data["action"]["request_id"]),
    })
}
