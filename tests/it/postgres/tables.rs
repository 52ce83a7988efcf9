//! How the tables fare that are written again and again.

use std::time::Duration;

use aegis_hitl::store::{PostgresStore, Store};

use super::record;
use crate::support::HANG;
use crate::support::postgres::{Postgres, connect};

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn rows_that_are_written_again_and_again_stay_in_their_page() {
    const ROUNDS: i64 = 100;
    let url = Postgres::shared().database().await;
    let store = PostgresStore::connect(&url).await.unwrap();
    for round in 0..ROUNDS {
        record(&store, &format!("k-{round}")).await;
        // The publisher's row, and the heartbeat.
        assert_eq!(store.newest_event().await.unwrap(), round as u64 + 1);
    }
    store.close().await;
    let client = connect(&url).await;
    let deadline = tokio::time::Instant::now() + HANG;
    loop {
        // A session reports what it did a while after, and at its end.
        let found = client
            .query_one(
                "SELECT n_tup_upd, n_tup_hot_upd, pg_relation_size(relid) FROM pg_stat_user_tables \
                 WHERE relname = 'publisher'",
                &[],
            )
            .await
            .unwrap();
        let (updated, hot, bytes): (i64, i64, i64) = (found.get(0), found.get(1), found.get(2));
        if updated >= ROUNDS {
            assert_eq!(hot, updated, "updates that touch the index");
            assert!(bytes <= 2 * 8192, "{bytes} bytes");
            break;
        }
        assert!(tokio::time::Instant::now() < deadline, "{updated} updates");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}
