//! Servers that are replaced one after the other, under load.
//!
//! Each request has a connection of its own: one that is kept may be closed while a request is on its way.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use reqwest::Client;
use serde_json::Value;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::cluster::{Cluster, SERVERS};
use crate::support::random::Random;
use crate::support::{HANG, alone};

const CLIENTS: usize = 24;

struct Rolling {
    client: Client,
    servers: Vec<SocketAddr>,
    is_over: AtomicBool,
    decided: AtomicUsize,
    refused: AtomicUsize,
    turned_away: AtomicUsize,
    unknown: AtomicUsize,
}

impl Rolling {
    /// Makes decisions, each on an action of its own. What was not begun is sent to another server.
    async fn decide(self: Arc<Self>, client: usize, mut random: Random) {
        for number in 0.. {
            if self.is_over.load(Ordering::SeqCst) {
                return;
            }
            let key = format!("{client}-{number}");
            while !self.try_once(&key, random.pick(&self.servers)).await {
                sleep(random.millis(1, 10)).await;
            }
            self.decided.fetch_add(1, Ordering::SeqCst);
        }
    }

    /// Returns whether the decision is on record.
    async fn try_once(&self, key: &str, server: SocketAddr) -> bool {
        let request = self
            .client
            .post(format!("http://{server}/api/v1/hitl/approve"))
            .header("Tenant-Id", "acme")
            .header("Thread-Id", "run-1")
            .header("Idempotency-Key", key)
            .header("X-Request-Id", key);
        let reply = match request.send().await {
            Ok(reply) => reply,
            Err(error) if error.is_connect() => {
                self.refused.fetch_add(1, Ordering::SeqCst);
                return false;
            }
            Err(error) => {
                println!("{key}: the outcome is unknown: {error:?}");
                self.unknown.fetch_add(1, Ordering::SeqCst);
                return false;
            }
        };
        let status = reply.status().as_u16();
        let body = reply
            .bytes()
            .await
            .unwrap_or_else(|error| panic!("{key}: {error:?}"));
        let body: Value = serde_json::from_slice(&body).unwrap();
        if status == 503 && body["detail"] == "the server is shutting down" {
            self.turned_away.fetch_add(1, Ordering::SeqCst);
            return false;
        }
        assert_eq!(status, 202, "{key}: {body}");
        true
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn no_decision_fails_and_no_outcome_is_unknown_while_servers_are_replaced() {
    let _alone = alone().await;
    let mut cluster = Cluster::start().await;
    let rolling = Arc::new(Rolling {
        client: Client::builder()
            .retry(reqwest::retry::never())
            .pool_max_idle_per_host(0)
            .timeout(HANG)
            .build()
            .unwrap(),
        servers: cluster.addrs().to_vec(),
        is_over: AtomicBool::new(false),
        decided: AtomicUsize::new(0),
        refused: AtomicUsize::new(0),
        turned_away: AtomicUsize::new(0),
        unknown: AtomicUsize::new(0),
    });
    let mut clients = JoinSet::new();
    for client in 0..CLIENTS {
        let random = Random::new(client as u64, 1);
        clients.spawn(rolling.clone().decide(client, random));
    }
    for round in 0..2 * SERVERS {
        let enough = rolling.decided.load(Ordering::SeqCst) + 100;
        let reaching = async {
            while rolling.decided.load(Ordering::SeqCst) < enough {
                assert!(clients.try_join_next().is_none(), "a client ended");
                sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(HANG, reaching).await.expect("decisions go on");
        cluster.stop(round % SERVERS);
        cluster.run(round % SERVERS);
    }
    rolling.is_over.store(true, Ordering::SeqCst);
    timeout(HANG, clients.join_all())
        .await
        .expect("the clients end");
    let decided = rolling.decided.load(Ordering::SeqCst);
    let client = cluster.client().await;
    let sql = "SELECT (SELECT count(*) FROM action WHERE decision = 'approve'), (SELECT count(*) FROM event)";
    let row = client.query_one(sql, &[]).await.unwrap();
    let decided = i64::try_from(decided).unwrap();
    assert_eq!(
        (row.get::<_, i64>(0), row.get::<_, i64>(1)),
        (decided, decided)
    );
    // The system resets a connection that comes between the last look for one and the close.
    let unknown = rolling.unknown.load(Ordering::SeqCst);
    assert!(unknown <= 1, "{unknown} outcomes were unknown");
    let refused = rolling.refused.load(Ordering::SeqCst);
    assert!(refused > 0, "no client met a server that was gone");
    println!(
        "{decided} decisions, {refused} connections refused, {} turned away",
        rolling.turned_away.load(Ordering::SeqCst)
    );
}
