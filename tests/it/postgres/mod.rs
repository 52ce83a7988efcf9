//! The PostgreSQL store.

use std::sync::Mutex;

use aegis_hitl::store::{PostgresStore, conformance};

use crate::support::postgres::Postgres;

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn the_postgres_store_conforms() {
    let last = Mutex::new(None::<PostgresStore>);
    conformance::run(|| async {
        let url = Postgres::shared().database().await;
        let store = PostgresStore::builder(url)
            .connections(8)
            .connect()
            .await
            .unwrap();
        let before = last.lock().unwrap().replace(store.clone());
        if let Some(before) = before {
            before.close().await;
        }
        store
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn servers_on_one_postgres_conform_together() {
    let last = Mutex::new(Vec::<PostgresStore>::new());
    conformance::run_together(|| async {
        let url = Postgres::shared().database().await;
        let mut stores = Vec::new();
        for _ in 0..3 {
            let store = PostgresStore::builder(&url).connections(8).connect().await;
            stores.push(store.unwrap());
        }
        let before = std::mem::replace(&mut *last.lock().unwrap(), stores.clone());
        for store in before {
            store.close().await;
        }
        stores
    })
    .await;
}
