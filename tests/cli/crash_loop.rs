//! The human loop on a server that is killed again and again: nothing acknowledged is lost, and no
//! approval is spent twice.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use aegis_hitl::Payload;
use aegis_hitl::protocol::Digest;
use rusqlite::Connection;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use uuid::Uuid;

use super::crash::start;
use crate::support::process::port;
use crate::support::rows::{integrity, look_at};
use crate::support::{HANG, alone};

const KILLS: usize = 10;
const AGENTS: usize = 12;

/// What becomes of an action, by its number.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fate {
    Completes,
    Fails,
    /// Its claimant is not heard of again.
    Lapses,
    Expires,
    Cancelled,
}

fn fate(number: usize) -> Fate {
    match number % 8 {
        0 | 1 => Fate::Completes,
        2 | 3 => Fate::Fails,
        4 => Fate::Lapses,
        5 | 6 => Fate::Expires,
        _ => Fate::Cancelled,
    }
}

/// What was acknowledged.
#[derive(Default)]
struct Acknowledged {
    /// The events that each action must have, in order.
    events: HashMap<String, Vec<&'static str>>,
    /// The token of each claim that was won, by action and fence.
    tokens: HashMap<(String, u64), String>,
}

struct Agent {
    client: reqwest::Client,
    url: String,
    acknowledged: Mutex<Acknowledged>,
    count: watch::Sender<usize>,
}

impl Agent {
    /// Asks until there is an answer, with the same call id. It is safe to ask again.
    async fn ask(&self, path: &str, key: Option<&str>, body: &Value) -> (u16, Value) {
        let call_id = Uuid::now_v7().to_string();
        let asking = async {
            loop {
                let request = self.client.post(format!("{}/api/v1/hitl/{path}", self.url));
                let mut request = request
                    .header("Tenant-Id", "acme")
                    .header("Thread-Id", "run-7")
                    .header("X-Request-Id", &call_id)
                    .header("Content-Type", "application/json");
                if let Some(key) = key {
                    request = request.header("Idempotency-Key", key);
                }
                let answered = async {
                    let reply = request.body(body.to_string()).send().await?;
                    let status = reply.status().as_u16();
                    Ok::<_, reqwest::Error>((status, reply.bytes().await?))
                };
                match answered.await {
                    Ok((503, _)) | Err(_) => sleep(Duration::from_millis(10)).await,
                    Ok((status, body)) => return (status, serde_json::from_slice(&body).unwrap()),
                }
            }
        };
        timeout(HANG, asking).await.expect("no answer")
    }

    async fn about(&self, id: &str, verb: &str, body: &Value) -> (u16, Value) {
        self.ask(&format!("actions/{id}/{verb}"), None, body).await
    }

    fn acknowledge(&self, key: &str, event: &'static str) {
        let mut acknowledged = self.acknowledged.lock().unwrap();
        let events = acknowledged.events.entry(key.to_owned()).or_default();
        events.push(event);
        self.count.send_modify(|count| *count += 1);
    }

    async fn approve(&self, key: &str, id: &str, digest: &str) {
        let seen = json!({ "digest": digest });
        let (status, body) = self.about(id, "approve", &seen).await;
        assert_eq!(status, 202, "{key}: {body}");
        self.acknowledge(key, "approved");
    }

    /// Claims by three calls at once. Returns the token of the one that won.
    async fn claim(&self, key: &str, id: &str, digest: &str, lease: u64) -> Option<String> {
        let body = json!({ "digest": digest, "lease": lease });
        let calls = [(); 3].map(|()| self.about(id, "claim", &body));
        let answers = futures_util::future::join_all(calls).await;
        let mut token = None;
        for (status, body) in answers {
            match status {
                200 => {
                    let won = body["claim"]["token"].as_str().unwrap().to_owned();
                    let fence = body["claim"]["fence"].as_u64().unwrap();
                    assert_eq!(token, None, "{key} was claimed twice");
                    token = Some(won.clone());
                    let mut acknowledged = self.acknowledged.lock().unwrap();
                    let other = acknowledged.tokens.insert((key.to_owned(), fence), won);
                    assert_eq!(other, None, "{key}: a fence was given twice");
                }
                409 => assert_eq!(body["code"], "already-claimed", "{key}"),
                // The lease ended before the server was back.
                422 if lease < 10 => assert_eq!(body["code"], "not-approved", "{key}"),
                _ => panic!("{key}: {status} {body}"),
            }
        }
        if token.is_some() {
            self.acknowledge(key, "claimed");
        }
        token
    }

    async fn finish(&self, key: &str, id: &str, token: &str, verb: &'static str) {
        let body = json!({ "token": token });
        let (status, body) = self.about(id, verb, &body).await;
        assert_eq!(status, 200, "{key}: {body}");
        let event = match verb {
            "complete" => "completed",
            _ => "failed",
        };
        self.acknowledge(key, event);
    }

    /// Waits until time alone has changed an action.
    async fn await_state(&self, id: &str, member: &str, word: &str) {
        let waiting = async {
            loop {
                let url = format!("{}/api/v1/hitl/status/{id}", self.url);
                let answered = async {
                    let reply = self.client.get(url).send().await?;
                    reply.bytes().await
                };
                let shown = answered.await.ok();
                let shown = shown.and_then(|body| serde_json::from_slice::<Value>(&body).ok());
                if shown.is_some_and(|shown| shown[member] == word) {
                    return;
                }
                sleep(Duration::from_millis(50)).await;
            }
        };
        timeout(HANG, waiting).await.expect("it stays as it was");
    }

    async fn carry_out(&self, number: usize) {
        let key = format!("key-{number}");
        let fate = fate(number);
        let payload = json!({ "number": number }).to_string();
        let digest = Digest::of(&Payload::from_json(&payload).unwrap()).unwrap();
        let digest = digest.to_string();
        let mut body = json!({ "number": number });
        if fate == Fate::Expires {
            let end = SystemTime::now() + Duration::from_millis(1500);
            let end = jiff::Timestamp::try_from(end).unwrap().to_string();
            body["aegis"] = json!({ "expires_at": end });
        }
        let (status, answer) = self.ask("actions", Some(&key), &body).await;
        match (status, fate) {
            (200 | 201, _) => {}
            // The end came while no server was there.
            (400, Fate::Expires) => return,
            _ => panic!("{key}: {status} {answer}"),
        }
        self.acknowledge(&key, "submitted");
        let id = answer["request_id"].as_str().unwrap().to_owned();
        match fate {
            Fate::Expires => return self.await_state(&id, "closed", "expired").await,
            Fate::Cancelled => {
                let (status, answer) = self.about(&id, "cancel", &json!({})).await;
                assert_eq!(status, 202, "{key}: {answer}");
                return self.acknowledge(&key, "cancelled");
            }
            Fate::Completes | Fate::Fails | Fate::Lapses => {}
        }
        self.approve(&key, &id, &digest).await;
        if fate == Fate::Lapses {
            self.claim(&key, &id, &digest, 1).await;
            self.await_state(&id, "execution", "unknown").await;
            self.approve(&key, &id, &digest).await;
        }
        let token = self.claim(&key, &id, &digest, 300).await;
        let mut token = token.expect("an approval was spent by nobody");
        if fate == Fate::Fails {
            self.finish(&key, &id, &token, "fail").await;
            self.approve(&key, &id, &digest).await;
            let again = self.claim(&key, &id, &digest, 300).await;
            token = again.expect("an approval was spent by nobody");
        }
        self.finish(&key, &id, &token, "complete").await;
    }
}

/// Whether one event may follow another.
fn may_follow(before: Option<&str>, event: &str) -> bool {
    matches!(
        (before, event),
        (None, "submitted")
            | (Some("submitted"), "approved" | "expired" | "cancelled")
            | (Some("approved"), "claimed")
            | (Some("claimed"), "completed" | "failed" | "claim-lost")
            | (Some("failed" | "claim-lost"), "approved")
    )
}

/// Asserts that the database is sound, holds all that was acknowledged, and nothing impossible.
fn assert_on_record(database: &Connection, acknowledged: &Acknowledged) -> usize {
    assert_eq!(integrity(database), "ok");
    // One moment for all that follows.
    database.execute_batch("BEGIN").unwrap();
    let mut rows = database
        .prepare(
            "SELECT idempotency_key, kind, \
             to_status = status AND event.decision IS action.decision \
             AND event.execution IS action.execution AS is_present \
             FROM event JOIN action ON action.id = event.action ORDER BY seq",
        )
        .unwrap();
    let mut found: HashMap<String, (Vec<String>, bool)> = HashMap::new();
    let mut rows = rows.query([]).unwrap();
    while let Some(row) = rows.next().unwrap() {
        let (key, kind): (String, String) = (row.get(0).unwrap(), row.get(1).unwrap());
        let (events, is_present) = found.entry(key.clone()).or_default();
        let before = events.last().map(String::as_str);
        assert!(may_follow(before, &kind), "{key}: {events:?} and {kind}");
        events.push(kind);
        *is_present = row.get(2).unwrap();
    }
    for (key, (events, is_present)) in &found {
        assert!(
            is_present,
            "{key} is not as its last event left it: {events:?}"
        );
    }
    let count = "SELECT count(*) FROM action";
    let actions: u32 = database.query_row(count, [], |row| row.get(0)).unwrap();
    let actions = actions as usize;
    assert_eq!(actions, found.len(), "an action without an event");
    for (key, expected) in &acknowledged.events {
        let (events, _) = found.get(key).unwrap_or_else(|| panic!("{key} is lost"));
        let mut rest = events.iter();
        for event in expected {
            let is_there = rest.any(|found| found == event);
            assert!(is_there, "{key} lost {event}: {expected:?} {events:?}");
        }
    }
    let live = "SELECT count(*) FROM action LEFT JOIN claim ON claim.action = action.id \
                WHERE (execution IS 'claimed') <> (claim.until IS NOT NULL)";
    let wrong: u32 = database.query_row(live, [], |row| row.get(0)).unwrap();
    assert_eq!(wrong, 0, "a claim that is live on one side only");
    let mut claims = database
        .prepare(
            "SELECT idempotency_key, fence, token FROM claim JOIN action ON action.id = claim.action",
        )
        .unwrap();
    let mut claims = claims.query([]).unwrap();
    while let Some(row) = claims.next().unwrap() {
        let key: String = row.get(0).unwrap();
        let fence = row.get::<_, i64>(1).unwrap().unsigned_abs();
        let events = &found[&key].0;
        let claimed = events.iter().filter(|event| *event == "claimed").count();
        assert_eq!(fence, claimed as u64, "{key}: {events:?}");
        if let Some(token) = acknowledged.tokens.get(&(key.clone(), fence)) {
            let found = Uuid::from_bytes(row.get(2).unwrap()).to_string();
            assert_eq!(&found, token, "{key}");
        }
    }
    database.execute_batch("COMMIT").unwrap();
    actions
}

fn check(store: &Path, agent: &Agent) -> usize {
    // Held while the database is read: what is acknowledged meanwhile is in neither.
    let acknowledged = agent.acknowledged.lock().unwrap();
    assert_on_record(&look_at(store), &acknowledged)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn no_approval_is_spent_twice_and_nothing_acknowledged_is_lost_by_sigkill() {
    let _alone = alone().await;
    let folder = TempDir::new().unwrap();
    let store = folder.path().join("aegis.db");
    let port = port();
    let mut server = start(port, &store);
    let agent = Arc::new(Agent {
        client: reqwest::Client::builder().timeout(HANG).build().unwrap(),
        url: server.url(),
        acknowledged: Mutex::default(),
        count: watch::Sender::new(0),
    });
    let (is_over, over) = watch::channel(false);
    let mut agents = JoinSet::new();
    for first in 0..AGENTS {
        let (agent, over) = (agent.clone(), over.clone());
        agents.spawn(async move {
            for number in (first..).step_by(AGENTS) {
                if *over.borrow() {
                    break;
                }
                agent.carry_out(number).await;
            }
        });
    }
    for kill in 0..KILLS {
        let mut count = agent.count.subscribe();
        let enough = *count.borrow() + 20 + kill * 37 % 100;
        let reached = timeout(HANG, count.wait_for(|count| *count >= enough));
        reached.await.unwrap().unwrap();
        server.kill();
        server = start(port, &store);
        check(&store, &agent);
    }
    is_over.send_replace(true);
    timeout(HANG, agents.join_all()).await.unwrap();
    let actions = check(&store, &agent);
    let kinds = "SELECT count(DISTINCT kind) FROM event WHERE kind <> 'rejected'";
    let kinds: u32 = look_at(&store)
        .query_row(kinds, [], |row| row.get(0))
        .unwrap();
    assert_eq!(kinds, 8, "not every transition came about");
    let events: usize = {
        let acknowledged = agent.acknowledged.lock().unwrap();
        acknowledged.events.values().map(Vec::len).sum()
    };
    server.stop().expect(0);
    let verified = aegis_hitl::store::SqliteStore::verify(&store).unwrap();
    assert_eq!(verified.faults, Vec::<String>::new());
    println!("{actions} actions, {events} acknowledged transitions over {KILLS} kills");
}
