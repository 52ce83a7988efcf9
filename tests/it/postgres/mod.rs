//! The PostgreSQL store.

mod audit;
mod batches;
mod feed;
#[cfg(feature = "server")]
mod obstacle;
mod partitions;
mod pooler;
mod proxy;
mod refusals;
mod retention;
mod standby;
mod strain;
mod tables;
mod tls;
mod unknown;
mod wall;

use std::sync::Mutex;
use std::time::{Duration, SystemTime};

use aegis_hitl::store::{
    Acquire, Acquired, Actor, Decide, Decided, Identity, List, PostgresStore, Store, Submission,
    Submit, Submitted, conformance,
};
use aegis_hitl::{Action, Decision, RequestId, TenantId};
use tokio::sync::OnceCell;
use uuid::Uuid;

use crate::support::postgres::{Postgres, connect};

fn identity(key: &str) -> Identity {
    Identity {
        tenant_id: "acme".parse().unwrap(),
        thread_id: "run-1".parse().unwrap(),
        idempotency_key: key.parse().unwrap(),
    }
}

fn actor() -> Actor {
    Actor::new("reviewer")
}

fn decision(key: &str) -> Decide {
    Decide {
        identity: identity(key),
        decision: Decision::Approve,
        call_id: Some(RequestId::mint()),
        payload: None,
        comment: None,
        actor: actor(),
        require_submission: false,
        allow_self_approval: true,
    }
}

fn id(action: &Action) -> Uuid {
    action.request_id.as_uuid().unwrap()
}

/// A list of all actions of a tenant.
fn list(tenant: &TenantId) -> List {
    List {
        tenant_id: tenant.clone(),
        status: None,
        decision: None,
        execution: None,
        not_picked_up: false,
        thread_id: None,
        after: None,
        limit: 10,
    }
}

/// The name of the database in a URL.
fn name_of(url: &str) -> &str {
    url.rsplit('/').next().unwrap()
}

async fn record(store: &PostgresStore, key: &str) -> Action {
    match store.decide(decision(key)).await.unwrap() {
        Decided::Recorded(action) => action,
        other => panic!("not recorded: {other:?}"),
    }
}

/// Makes a database that a store was opened in and closed again, and returns its URL. A copy takes a
/// third of the time that the schema does.
async fn migrated() -> String {
    static MADE: OnceCell<String> = OnceCell::const_new();
    let server = Postgres::shared();
    let made = MADE.get_or_init(async || {
        let url = server.database().await;
        PostgresStore::connect(&url).await.unwrap().close().await;
        let client = connect(&url).await;
        client.batch_execute("DELETE FROM heartbeat").await.unwrap();
        name_of(&url).to_owned()
    });
    server.database_from(made.await).await
}

/// The servers that were opened last, and the URL of their database.
type Last = Mutex<Option<(String, Vec<PostgresStore>)>>;

/// Opens servers on a database of their own, and closes those that were opened before. Each batches
/// or does not.
async fn servers(batching: &[bool], last: &Last) -> Vec<PostgresStore> {
    let url = migrated().await;
    let mut stores = Vec::new();
    for batching in batching {
        let builder = PostgresStore::builder(&url).connections(8);
        let store = builder.batching(*batching).connect().await;
        stores.push(store.unwrap());
    }
    Box::pin(close(last)).await;
    *last.lock().unwrap() = Some((url, stores.clone()));
    stores
}

/// Closes the servers that were opened last. Whatever they did, verification finds no fault.
async fn close(last: &Last) {
    let Some((url, stores)) = last.lock().unwrap().take() else {
        return;
    };
    for store in stores {
        store.close().await;
    }
    let trail = PostgresStore::builder(&url).audit_trail().await.unwrap();
    let report = trail.verify(None).await.unwrap();
    assert_eq!(report.faults, Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn the_postgres_store_conforms() {
    let last = Mutex::default();
    conformance::run_together(|| servers(&[true], &last)).await;
    Box::pin(close(&last)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn the_postgres_store_conforms_without_batches() {
    let last = Mutex::default();
    conformance::run_together(|| servers(&[false], &last)).await;
    Box::pin(close(&last)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn servers_on_one_postgres_conform_together() {
    let last = Mutex::default();
    conformance::run_together(|| servers(&[true, false, true], &last)).await;
    Box::pin(close(&last)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn what_is_over_goes_from_a_postgres_store_as_from_any() {
    let last = Mutex::default();
    for batching in [&[true][..], &[true, false, true]] {
        conformance::run_retention(|| servers(batching, &last)).await;
    }
    Box::pin(close(&last)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn any_text_is_kept_as_it_was_given() {
    let url = Postgres::shared().database().await;
    let store = PostgresStore::connect(url).await.unwrap();
    for (number, text) in ["a\0b", "\u{2400}", "\u{2400}0\0", "plain"]
        .into_iter()
        .enumerate()
    {
        let request = Decide {
            comment: Some(text.to_owned()),
            actor: Actor::new(text),
            ..decision(&format!("k-{number}"))
        };
        let Decided::Recorded(action) = store.decide(request).await.unwrap() else {
            panic!("it is new");
        };
        let found = store.find(id(&action), None).await.unwrap();
        assert_eq!(found.as_ref(), Some(&action));
        assert_eq!(action.comment.as_deref(), Some(text));
        let events = store.all_events(0, 10).await.unwrap();
        assert_eq!(events[number].1.actor, text);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn many_callers_on_two_servers_decide_each_action_once() {
    const KEYS: usize = 400;
    let url = Postgres::shared().database().await;
    let stores = [
        PostgresStore::connect(&url).await.unwrap(),
        PostgresStore::connect(&url).await.unwrap(),
    ];
    let mut deciding = Vec::new();
    for key in 0..KEYS {
        // In another order at each server, which must not make the two wait for each other.
        for (store, key) in stores.iter().zip([key, KEYS - 1 - key]) {
            let (store, request) = (store.clone(), decision(&format!("k-{key}")));
            deciding.push(tokio::spawn(
                async move { store.decide(request).await.unwrap() },
            ));
        }
    }
    let mut recorded = 0;
    for decided in deciding {
        match decided.await.unwrap() {
            Decided::Recorded(_) => recorded += 1,
            Decided::Duplicate(_) => {}
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(recorded, KEYS);
    let totals = stores[0].totals().await.unwrap();
    assert_eq!((totals.actions, totals.events), (KEYS as u64, KEYS as u64));
    let counted: u64 = stores
        .iter()
        .flat_map(|store| store.statistics().events)
        .map(|(_, count)| count)
        .sum();
    assert_eq!(counted, KEYS as u64);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_time_beyond_the_databases_range_is_kept_as_its_end() {
    let url = Postgres::shared().database().await;
    let store = PostgresStore::connect(url).await.unwrap();
    let far = Duration::from_secs(1 << 61);
    let submit = Submit {
        identity: identity("k"),
        call_id: None,
        payload: None,
        submission: Submission {
            expires_at: Some(SystemTime::now() + far),
            ..Submission::default()
        },
        only_existing: false,
        actor: actor(),
    };
    let submitted = store.submit(submit).await.unwrap();
    assert!(matches!(submitted, Submitted::Recorded(_)), "{submitted:?}");
    let Decided::Recorded(action) = store.decide(decision("k")).await.unwrap() else {
        panic!("it has not expired");
    };
    let acquire = Acquire {
        id: id(&action),
        tenant_id: identity("k").tenant_id,
        digest: None,
        lease: far,
        call_id: None,
        actor: actor(),
    };
    let acquired = store.acquire(acquire).await.unwrap();
    assert!(matches!(acquired, Acquired::Claimed(..)), "{acquired:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn reads_succeed_while_connections_are_made() {
    let url = Postgres::shared().database().await;
    for _ in 0..4 {
        let store = PostgresStore::connect(&url).await.unwrap();
        let reading = (0..64).map(|_| store.find(Uuid::new_v4(), None));
        for found in futures_util::future::join_all(reading).await {
            assert!(found.unwrap().is_none());
        }
        store.close().await;
    }
}
