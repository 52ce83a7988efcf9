//! Requests that wait for the database, and what they keep from others meanwhile.

use std::time::Duration;

use aegis_hitl::TenantId;
use aegis_hitl::store::{Decide, Decided, Identity, PostgresStore, Store};
use tokio_postgres::Client;

use super::standby::{WAITING, cut_off_standbys, set_standbys, until};
use super::{decision, identity, list, record};
use crate::support::HANG;
use crate::support::postgres::{Postgres, connect};

/// The sessions that wait for a lock.
const LOCKED: &str = "FROM pg_stat_activity WHERE wait_event_type = 'Lock'";

async fn count(operator: &Client, sessions: &str) -> i64 {
    let sql = format!("SELECT count(*) {sessions}");
    operator.query_one(&sql, &[]).await.unwrap().get(0)
}

fn of_another_tenant(key: &str) -> Decide {
    let tenant_id: TenantId = "other".parse().unwrap();
    Decide {
        identity: Identity {
            tenant_id,
            ..identity(key)
        },
        ..decision(key)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_key_that_many_ask_for_keeps_one_connection_and_nobody_else() {
    let server = Postgres::start(&[]);
    let url = server.database().await;
    let store = PostgresStore::builder(&url).connections(4).connect().await;
    let store = store.unwrap();
    record(&store, "hot").await;
    let (operator, locker) = (connect(&url).await, connect(&url).await);
    locker
        .batch_execute("BEGIN; SELECT FROM action FOR UPDATE")
        .await
        .unwrap();
    let asking: Vec<_> = (0..40)
        .map(|_| {
            let store = store.clone();
            tokio::spawn(async move { store.decide(decision("hot")).await })
        })
        .collect();
    until(&operator, &format!("SELECT count(*) {LOCKED}")).await;
    for number in 0..20 {
        let decided = store
            .decide(of_another_tenant(&format!("k-{number}")))
            .await;
        assert!(matches!(decided.unwrap(), Decided::Recorded(_)));
        assert!(count(&operator, LOCKED).await <= 1);
    }
    locker.batch_execute("ROLLBACK").await.unwrap();
    for asked in asking {
        let decided = asked.await.unwrap().unwrap();
        assert!(matches!(decided, Decided::Duplicate(_)), "{decided:?}");
    }
    store.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn reads_that_nobody_waits_for_any_more_leave_no_sessions_behind() {
    const CONNECTIONS: usize = 4;
    let server = Postgres::start(&[]);
    let url = server.database().await;
    let store = PostgresStore::builder(&url)
        .connections(CONNECTIONS)
        .connect()
        .await;
    let store = store.unwrap();
    record(&store, "k").await;
    let (operator, locker) = (connect(&url).await, connect(&url).await);
    locker
        .batch_execute("BEGIN; LOCK TABLE action IN ACCESS EXCLUSIVE MODE")
        .await
        .unwrap();
    for _ in 0..40 {
        let list = list(&identity("k").tenant_id);
        let given_up = tokio::time::timeout(Duration::from_millis(50), store.list(list)).await;
        assert!(given_up.is_err(), "the table is locked");
        let waiting = count(&operator, LOCKED).await;
        assert!(waiting <= CONNECTIONS as i64, "{waiting} sessions wait");
    }
    locker.batch_execute("ROLLBACK").await.unwrap();
    record(&store, "k-2").await;
    store.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn commits_that_nobody_waits_for_any_more_leave_no_sessions_behind() {
    const CONNECTIONS: usize = 4;
    let server = Postgres::start(&[]);
    let url = server.database().await;
    let store = PostgresStore::builder(&url)
        .connections(CONNECTIONS)
        .connect()
        .await;
    let store = store.unwrap();
    let operator = connect(&url).await;
    cut_off_standbys(&operator).await;
    let soon = Duration::from_millis(50);
    // A write of a moment ago is enough for it.
    while matches!(tokio::time::timeout(soon, store.check()).await, Ok(Ok(()))) {
        tokio::time::sleep(soon).await;
    }
    for _ in 0..40 {
        let given_up = tokio::time::timeout(soon, store.check()).await;
        assert!(!matches!(given_up, Ok(Ok(()))), "no standby is there");
        let waiting = count(&operator, WAITING).await;
        assert!(waiting <= CONNECTIONS as i64, "{waiting} sessions wait");
    }
    set_standbys(&operator, "").await;
    let deadline = tokio::time::Instant::now() + HANG;
    while store.check().await.is_err() {
        assert!(tokio::time::Instant::now() < deadline);
    }
    store.close().await;
}
