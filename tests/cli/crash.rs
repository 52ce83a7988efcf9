//! A server that is killed again and again under load loses nothing that it acknowledged, and its clients finish the rest.

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use aegis_hitl::layer::Backoff;
use aegis_hitl::{AegisService, Decision, Outcome, Receipt};
use rusqlite::Connection;
use serde_json::json;
use tempfile::TempDir;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use uuid::Uuid;

use crate::binary::{Served, aegis};
use crate::support::process::port;
use crate::support::rows::{counts, integrity, look_at};
use crate::support::{HANG, alone};

const KILLS: usize = 20;
const CLIENTS: usize = 32;

/// How many acknowledgements a server lives for.
fn lifetime(kill: usize) -> usize {
    20 + kill * 37 % 100
}

/// What was started, and what was acknowledged.
struct Ledger {
    started: AtomicUsize,
    acknowledged: Mutex<HashMap<String, Receipt>>,
    count: watch::Sender<usize>,
    retried: AtomicUsize,
    /// How many more calls may be started: enough that a server dies under load, and no more.
    permits: Semaphore,
}

/// One client after the other decision, until it is over; a call that was started is brought to its end.
async fn keep_deciding(service: AegisService, ledger: Arc<Ledger>) {
    // Closed once it is over.
    while let Ok(permit) = ledger.permits.acquire().await {
        permit.forget();
        let number = ledger.started.fetch_add(1, Ordering::SeqCst);
        let key = key(number);
        let call = service.execute(decision(number), key.as_str());
        let receipt = call.payload(&json!({ "number": number })).await;
        let receipt = receipt.unwrap_or_else(|error| panic!("{key}: {error:?}"));
        ledger
            .retried
            .fetch_add(usize::from(receipt.attempts() > 1), Ordering::SeqCst);
        let mut acknowledged = ledger.acknowledged.lock().unwrap();
        acknowledged.insert(key, receipt);
        ledger.count.send_replace(acknowledged.len());
    }
}

fn key(number: usize) -> String {
    format!("key-{number}")
}

fn decision(number: usize) -> Decision {
    match number % 2 {
        0 => Decision::Approve,
        _ => Decision::Reject,
    }
}

pub(super) fn start(port: u16, store: &Path) -> Served {
    let listen = format!("127.0.0.1:{port}");
    let mut command = aegis(&["serve", "--listen", &listen, "--store"]);
    command.arg(store).env("AEGIS_LOG", "warn");
    Served::start(command)
}

/// Asserts that the database is sound and holds every one of these receipts, each once.
fn assert_on_record(database: &Connection, receipts: &HashMap<String, Receipt>) {
    assert_eq!(integrity(database), "ok");
    let [decisions, events] = counts(database);
    assert_eq!(decisions, events);
    let mut rows = database
        .prepare(
            "SELECT idempotency_key, request_id, action.decision, payload, event.decision, \
             CASE kind WHEN 'approved' THEN 'approve' WHEN 'rejected' THEN 'reject' END FROM action \
             JOIN event ON event.action = action.id",
        )
        .unwrap();
    let mut found = HashMap::new();
    let mut rows = rows.query([]).unwrap();
    while let Some(row) = rows.next().unwrap() {
        let text = |at| row.get::<_, String>(at).unwrap();
        let id = Uuid::from_bytes(row.get(1).unwrap()).to_string();
        let before = found.insert(text(0), [id, text(2), text(3), text(4), text(5)]);
        assert_eq!(before, None, "more than one row or event");
    }
    for (key, receipt) in receipts {
        let number: usize = key.strip_prefix("key-").unwrap().parse().unwrap();
        let row = found.get(key).unwrap_or_else(|| panic!("{key} is lost"));
        let decided = decision(number);
        assert_eq!(receipt.decision(), decided, "{key}");
        let expected = [
            receipt.request_id().unwrap().as_str(),
            decided.as_str(),
            &format!("{{\"number\":{number}}}"),
            decided.as_str(),
            decided.as_str(),
        ];
        assert_eq!(row, &expected, "{key}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn what_was_acknowledged_outlives_sigkill_and_retries_finish_the_rest() {
    let _alone = alone().await;
    let folder = TempDir::new().unwrap();
    let store = folder.path().join("aegis.db");
    let port = port();
    let mut server = start(port, &store);
    let service = AegisService::builder()
        .base_url(server.url())
        .tenant_id("acme")
        .thread_id("run-7")
        .max_retries(10_000)
        // Every call is to be brought to its end, whatever the load.
        .budget(None)
        .backoff(Backoff::constant(Duration::from_millis(10)))
        .deadline(HANG)
        .build()
        .unwrap();
    let ledger = Arc::new(Ledger {
        started: AtomicUsize::new(0),
        acknowledged: Mutex::default(),
        count: watch::Sender::new(0),
        retried: AtomicUsize::new(0),
        permits: Semaphore::new(0),
    });
    let mut clients = JoinSet::new();
    for _ in 0..CLIENTS {
        clients.spawn(keep_deciding(service.clone(), ledger.clone()));
    }

    for kill in 0..KILLS {
        let mut count = ledger.count.subscribe();
        let enough = *count.borrow() + lifetime(kill);
        ledger.permits.add_permits(lifetime(kill) + 2 * CLIENTS);
        let reached = tokio::time::timeout(HANG, count.wait_for(|count| *count >= enough));
        reached.await.unwrap().unwrap();
        server.kill();
        let acknowledged = ledger.acknowledged.lock().unwrap().clone();
        assert!(acknowledged.len() >= enough);

        server = start(port, &store);
        assert_on_record(&look_at(&store), &acknowledged);
        for (key, receipt) in acknowledged.iter().take(5) {
            let action = service.status(receipt.request_id().unwrap().clone());
            let action = action.await.unwrap();
            assert_eq!(action.idempotency_key.unwrap().as_str(), key);
            assert_eq!(action.decision, Some(receipt.decision()));
        }
    }

    ledger.permits.close();
    clients.join_all().await;
    let acknowledged = ledger.acknowledged.lock().unwrap().clone();
    let started = ledger.started.load(Ordering::SeqCst);
    assert_eq!(acknowledged.len(), started);
    // A call's own retry is told from a duplicate even after the server that took its first attempt is gone.
    for (key, receipt) in &acknowledged {
        assert_eq!(receipt.outcome(), Outcome::Accepted, "{key}");
    }
    assert!(ledger.retried.load(Ordering::SeqCst) > 0);
    let database = look_at(&store);
    assert_on_record(&database, &acknowledged);
    assert_eq!(counts(&database), [started as u64; 2]);
    drop(database);
    server.stop().expect(0);
    println!(
        "{started} calls over {KILLS} kills, {} of them retried",
        ledger.retried.load(Ordering::SeqCst)
    );
}
