//! The stores: what every one of them must do.

use std::sync::Mutex;

use aegis_hitl::store::{Embedded, Memory, conformance};
use tempfile::TempDir;

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn the_memory_store_conforms() {
    conformance::run(|| async { Memory::new() }).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn the_embedded_store_conforms() {
    let folders = Mutex::new(Vec::new());
    conformance::run(|| async {
        let folder = TempDir::new().unwrap();
        let store = Embedded::open(folder.path().join("aegis.db")).unwrap();
        folders.lock().unwrap().push(folder);
        store
    })
    .await;
}

#[tokio::test]
async fn the_embedded_store_conforms_on_one_thread() {
    let folder = TempDir::new().unwrap();
    let count = std::cell::Cell::new(0);
    conformance::run_together(|| async {
        count.set(count.get() + 1);
        let store = Embedded::open(folder.path().join(format!("{}.db", count.get()))).unwrap();
        vec![store.clone(), store]
    })
    .await;
}
