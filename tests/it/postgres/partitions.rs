//! Partitions of months that are over.

use std::time::Duration;

use aegis_hitl::store::{PostgresStore, Store, Sweep};
use tokio_postgres::Client;

use super::record;
use crate::support::HANG;
use crate::support::postgres::{Postgres, connect};

/// Makes the partition of a month, such as `2001_02`.
async fn make(client: &Client, month: &str) {
    let first = format!("{}-01 00:00:00+00", month.replace('_', "-"));
    let make = format!(
        "DO $$ BEGIN EXECUTE format('CREATE TABLE event_{month} PARTITION OF event FOR VALUES FROM (%L) TO (%L)', \
         timestamptz '{first}', timestamptz '{first}' + interval '1 month'); END $$"
    );
    client.batch_execute(&make).await.unwrap();
}

/// Appends an event at that time.
async fn append(client: &Client, time: &str) {
    let append = format!(
        "INSERT INTO event (tenant_id, request_id, number, at, event_id, actor, kind, to_status, epoch) \
         VALUES ('acme', gen_random_uuid(), 1, '{time}', gen_random_uuid(), 'reviewer', 'approved', 'COMMITTED', 1)"
    );
    client.batch_execute(&append).await.unwrap();
}

/// The partitions of the year 2001, and how many others there are.
async fn partitions(client: &Client) -> (Vec<String>, usize) {
    let found = client
        .query(
            "SELECT c.relname::text FROM pg_inherits JOIN pg_class c ON c.oid = inhrelid \
             WHERE inhparent = 'event'::regclass ORDER BY c.relname",
            &[],
        )
        .await
        .unwrap();
    let (past, others): (Vec<String>, Vec<String>) = found
        .iter()
        .map(|row| row.get(0))
        .partition(|name: &String| name.contains("2001"));
    (past, others.len())
}

/// Removes nothing, as nothing is as old as that.
const NOTHING: Sweep = Sweep {
    retention: Duration::from_secs(100 * 365 * 24 * 3600),
    limit: 1024,
};

/// A server looks for empty partitions with its first sweep, and then each hour.
async fn sweep(url: &str) {
    let store = PostgresStore::connect(url).await.unwrap();
    assert_eq!(store.sweep(NOTHING).await.unwrap().removed, 0);
    store.close().await;
}

/// Sweeps until these are the partitions of 2001. Whoever reads at that moment keeps dead rows.
async fn sweep_until(url: &str, client: &Client, expected: &[&str]) {
    let deadline = tokio::time::Instant::now() + HANG;
    loop {
        sweep(url).await;
        let (past, others) = partitions(client).await;
        // This month, two to come, and the default.
        assert_eq!(others, 4);
        if past == expected {
            break;
        }
        assert!(tokio::time::Instant::now() < deadline, "{past:?}");
    }
}

/// A database with partitions of 2001: one that was never used, one with an event, one whose event was
/// removed, and one that somebody made for a reason of their own.
async fn database() -> (String, Client) {
    let url = Postgres::shared().database().await;
    PostgresStore::connect(&url).await.unwrap().close().await;
    let client = connect(&url).await;
    for month in ["2001_01", "2001_02", "2001_03", "2001_04"] {
        make(&client, month).await;
    }
    let rename = "ALTER TABLE event_2001_04 RENAME TO event_by_hand_2001_04";
    client.batch_execute(rename).await.unwrap();
    append(&client, "2001-02-14 12:00:00+00").await;
    append(&client, "2001-03-31 23:59:59+00").await;
    (url, client)
}

const REMOVE: &str =
    "DELETE FROM event WHERE at >= '2001-03-01 00:00:00+00' AND at < '2001-04-01 00:00:00+00'";

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_partition_of_the_past_goes_once_it_is_empty_and_later_events_are_kept() {
    let (url, client) = database().await;
    sweep_until(
        &url,
        &client,
        &["event_2001_02", "event_2001_03", "event_by_hand_2001_04"],
    )
    .await;
    client.batch_execute(REMOVE).await.unwrap();
    sweep_until(&url, &client, &["event_2001_02", "event_by_hand_2001_04"]).await;
    append(&client, "2001-01-01 00:00:00+00").await;
    append(&client, "2001-03-01 00:00:00+00").await;
    let found = client
        .query_one(
            "SELECT count(*), count(*) FILTER (WHERE tableoid = 'event_default'::regclass) FROM event",
            &[],
        )
        .await
        .unwrap();
    assert_eq!((found.get::<_, i64>(0), found.get::<_, i64>(1)), (3, 2));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn an_empty_partition_stays_while_somebody_reads_and_decisions_go_on() {
    let (url, client) = database().await;
    let reader = connect(&url).await;
    reader
        .batch_execute("BEGIN; SELECT count(*) FROM event")
        .await
        .unwrap();
    let store = PostgresStore::connect(&url).await.unwrap();
    let sweeping = {
        let store = store.clone();
        tokio::spawn(async move { store.sweep(NOTHING).await })
    };
    for number in 0..50 {
        record(&store, &format!("k-{number}")).await;
    }
    assert_eq!(sweeping.await.unwrap().unwrap().removed, 0);
    assert_eq!(partitions(&client).await.0.len(), 4);
    reader.batch_execute("COMMIT").await.unwrap();
    store.close().await;
    sweep_until(
        &url,
        &client,
        &["event_2001_02", "event_2001_03", "event_by_hand_2001_04"],
    )
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn an_empty_partition_stays_while_a_snapshot_sees_what_was_in_it() {
    let (url, client) = database().await;
    let reader = connect(&url).await;
    // It has not come to the events yet, and so no lock on them.
    reader
        .batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM action")
        .await
        .unwrap();
    client.batch_execute(REMOVE).await.unwrap();
    sweep(&url).await;
    let seen = reader.query_one("SELECT count(*) FROM event", &[]).await;
    assert_eq!(seen.unwrap().get::<_, i64>(0), 2);
    reader.batch_execute("COMMIT").await.unwrap();
    sweep_until(&url, &client, &["event_2001_02", "event_by_hand_2001_04"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_user_who_does_not_own_the_partitions_leaves_them_to_the_owner() {
    let (url, client) = database().await;
    let grant = "CREATE ROLE no_owner LOGIN; GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO no_owner";
    client.batch_execute(grant).await.unwrap();
    let before = partitions(&client).await.0;
    sweep(&url.replace("aegis@", "no_owner@")).await;
    assert_eq!(partitions(&client).await.0, before);
    // The owner does with each migration what servers may not do.
    PostgresStore::builder(&url).migrate_schema().await.unwrap();
    let expected = ["event_2001_02", "event_2001_03", "event_by_hand_2001_04"];
    assert_eq!(partitions(&client).await.0, expected);
}
