//! The positions of events, whatever order transactions commit in.

use std::collections::BTreeSet;

use aegis_hitl::store::{PostgresStore, Store};
use tokio_postgres::Client;

use super::record;
use crate::support::postgres::{Postgres, connect};

async fn store() -> (PostgresStore, String) {
    let url = Postgres::shared().database().await;
    let store = PostgresStore::connect(&url).await.unwrap();
    (store, url)
}

/// Appends an event in a transaction that stays open.
async fn append(client: &Client) {
    let append = "BEGIN; INSERT INTO event (tenant_id, request_id, number, at, event_id, actor, kind, \
                  to_status, epoch) SELECT tenant_id, request_id, 2, now(), gen_random_uuid(), 'slow', 'claimed', \
                  'COMMITTED', epoch FROM event ORDER BY event_id LIMIT 1";
    client.batch_execute(append).await.unwrap();
}

/// The positions and actors of all events, which must be 1 and up.
async fn feed(store: &PostgresStore) -> Vec<String> {
    let events = store.all_events(0, 1000).await.unwrap();
    let positions: Vec<_> = events.iter().map(|(position, _)| *position).collect();
    assert_eq!(positions, (1..=events.len() as u64).collect::<Vec<_>>());
    let ids: BTreeSet<_> = events
        .iter()
        .map(|(_, event)| event.id.to_string())
        .collect();
    assert_eq!(ids.len(), events.len(), "an event has two positions");
    events.into_iter().map(|(_, event)| event.actor).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_that_commits_late_appears_behind_those_that_were_read() {
    let (store, url) = store().await;
    record(&store, "k-1").await;
    let [slow, gone] = [connect(&url).await, connect(&url).await];
    append(&slow).await;
    append(&gone).await;
    // Many passes while both are open.
    for number in 2..10 {
        record(&store, &format!("k-{number}")).await;
        let read = feed(&store).await;
        assert_eq!(read.len(), number, "{read:?}");
    }
    slow.batch_execute("COMMIT").await.unwrap();
    gone.batch_execute("ROLLBACK").await.unwrap();
    record(&store, "k-10").await;
    let read = feed(&store).await;
    assert_eq!(read.len(), 11);
    assert_eq!(
        read.iter().position(|actor| actor == "slow"),
        Some(9),
        "{read:?}"
    );
    assert_eq!(store.newest_event().await.unwrap(), 11);
    store.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn events_of_a_database_that_was_restored_elsewhere_are_all_there_once() {
    for is_open in [false, true] {
        let (store, url) = store().await;
        let client = connect(&url).await;
        record(&store, "k-1").await;
        assert_eq!(feed(&store).await.len(), 1);
        if !is_open {
            store.close().await;
        }
        // As after a restore into another cluster, whose transactions have lower numbers. One event
        // was not published when the database was copied.
        let restored = "BEGIN; UPDATE event SET xid = '900000000'; \
             INSERT INTO event (tenant_id, request_id, number, at, event_id, actor, kind, to_status, epoch, xid) \
             SELECT tenant_id, request_id, 2, now(), gen_random_uuid(), 'unpublished', 'claimed', 'COMMITTED', \
             epoch, '900000001' FROM event; \
             UPDATE publisher SET snapshot = '900000001:900000001:'; \
             UPDATE cluster SET identifier = identifier - 1; COMMIT";
        client.batch_execute(restored).await.unwrap();
        for number in 2..5 {
            let other = PostgresStore::connect(&url).await.unwrap();
            let recording = if is_open { &store } else { &other };
            record(recording, &format!("k-{number}")).await;
            let read = feed(recording).await;
            assert_eq!(read.len(), number + 1, "{read:?}");
            assert_eq!(read[1], "unpublished");
            other.close().await;
        }
        let epoch = client
            .query_one("SELECT epoch FROM cluster", &[])
            .await
            .unwrap();
        assert_eq!(epoch.get::<_, i32>(0), 2);
        store.close().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn events_go_to_the_partition_of_their_month() {
    let (store, url) = store().await;
    record(&store, "k-1").await;
    let client = connect(&url).await;
    let count = "SELECT (SELECT count(*) FROM event_default), \
                 (SELECT count(*) FROM pg_inherits WHERE inhparent = 'event'::regclass)";
    let row = client.query_one(count, &[]).await.unwrap();
    assert_eq!((row.get::<_, i64>(0), row.get::<_, i64>(1)), (0, 4));
    store.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn another_server_wakes_who_waits_here() {
    let url = Postgres::shared().database().await;
    let here = PostgresStore::connect(&url).await.unwrap();
    let elsewhere = PostgresStore::connect(&url).await.unwrap();
    let mut all = here.watch_all();
    let mut tenant = here.watch_tenant(&"acme".parse().unwrap());
    let mut other = here.watch_tenant(&"globex".parse().unwrap());
    record(&elsewhere, "k-1").await;
    crate::support::ends(all.changed()).await;
    crate::support::ends(tenant.changed()).await;
    let woken = tokio::time::timeout(crate::support::SHORT, other.changed()).await;
    assert!(woken.is_err(), "a tenant was woken by another's events");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backlog_that_takes_longer_than_a_statement_may_is_published() {
    let (store, url) = store().await;
    let client = connect(&url).await;
    // As with a million events.
    let slow = "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS \
                $$ BEGIN PERFORM pg_sleep(5.5); RETURN NULL; END $$; \
                CREATE TRIGGER slow AFTER INSERT ON feed FOR EACH STATEMENT EXECUTE FUNCTION slow()";
    client.batch_execute(slow).await.unwrap();
    record(&store, "k-1").await;
    assert_eq!(feed(&store).await.len(), 1);
    store.close().await;
}
