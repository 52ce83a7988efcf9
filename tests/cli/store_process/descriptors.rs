//! A process without a descriptor to spare.

use std::collections::HashSet;
use std::fs::File;

use aegis_hitl::store::{Decided, SqliteStore, Store};
use tempfile::TempDir;
use uuid::Uuid;

use super::other::Other;
use super::{approval, large, verify};

/// Uses up all descriptors, and decides until the log has been copied.
pub(crate) async fn starve(store: SqliteStore) {
    let mut taken = Vec::new();
    while let Ok(file) = File::open("/dev/null") {
        taken.push(file);
    }
    for count in 0..900 {
        let key = format!("k-{count}");
        let mut request = approval(&key);
        request.payload = Some(large());
        let decided = store.decide(request).await;
        assert!(matches!(decided, Ok(Decided::Recorded(_))), "{decided:?}");
        let reads: Vec<_> = (0..8)
            .map(|_| {
                let store = store.clone();
                tokio::spawn(async move { store.find(Uuid::new_v4(), None).await })
            })
            .collect();
        for read in reads {
            assert_eq!(read.await.unwrap().unwrap(), None);
        }
    }
    store.check().await.unwrap();
    eprintln!("done");
    drop(taken);
    store.close().await;
}

#[tokio::test]
async fn a_store_needs_no_further_descriptor_once_it_is_open() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("aegis.db");
    let script = "ulimit -n 64; exec \"$0\" \"$@\"";
    let mut other = Other::under(&["sh", "-c", script], "starve", &path);
    assert_eq!(other.line(), "done");
    other.end();
    let keys: HashSet<_> = (0..900).map(|count| format!("k-{count}")).collect();
    verify(&path, &keys).await;
}
