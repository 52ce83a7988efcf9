//! A writer that panics.

use tempfile::TempDir;

use super::sync::Faulty;
use super::verify;

#[tokio::test]
async fn a_store_whose_writer_panics_says_so_to_all() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("aegis.db");
    let Some(mut store) = Faulty::start(folder.path(), "mourn", &path) else {
        return;
    };
    store.until_acknowledged(10);
    store.order("clock aegis-writer");
    // What Rust says of a panic has empty lines, too.
    let said = (0..10_000).any(|_| store.other.line() == "failed");
    assert!(said, "the store did not say that it failed");
    verify(&path, &store.kill()).await;
}
