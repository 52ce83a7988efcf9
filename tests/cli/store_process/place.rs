//! One server to a database, whatever it is called, and wherever it goes.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use aegis_hitl::store::{Decided, SqliteStore, Store};
use tempfile::TempDir;

use super::approval;
use super::other::Other;

/// The locks on a file that SQLite takes.
fn locks(path: &Path) -> Vec<String> {
    let inode = format!(":{} ", fs::metadata(path).unwrap().ino());
    let locks = fs::read_to_string("/proc/locks").unwrap();
    let posix = locks.lines().filter(|line| line.contains("POSIX"));
    posix
        .filter(|line| line.contains(&inode))
        .map(|line| line.split_once(": ").unwrap().1.to_owned())
        .collect()
}

#[tokio::test]
async fn a_hard_link_is_the_same_database() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("aegis.db");
    let link = folder.path().join("link.db");
    let other = Other::start("hold", &path);
    fs::hard_link(&path, &link).unwrap();
    let error = SqliteStore::open(&link).unwrap_err();
    assert!(error.is_in_use(), "{error}");
    other.end();

    let store = SqliteStore::open(&link).unwrap();
    store.decide(approval("k")).await.unwrap();
    let before = locks(&path);
    assert!(!before.is_empty());
    let error = SqliteStore::open(&path).unwrap_err();
    assert!(error.is_in_use(), "{error}");
    // To close a descriptor of the file would have dropped them.
    assert_eq!(locks(&path), before);
    store.close().await;
    // A process that another test is starting has the lock, too, until it is replaced by its program.
    let store = loop {
        match SqliteStore::open(&path) {
            Ok(store) => break store,
            Err(error) => assert!(error.is_in_use(), "{error}"),
        }
        tokio::task::yield_now().await;
    };
    store.close().await;
}

#[tokio::test]
async fn a_file_that_is_mounted_in_two_folders_is_the_same_database() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("aegis.db");
    let mounted = folder.path().join("elsewhere").join("aegis.db");
    fs::create_dir(mounted.parent().unwrap()).unwrap();
    fs::write(&path, "").unwrap();
    fs::write(&mounted, "").unwrap();
    let unshare = ["unshare", "-rm", "sh", "-ec"];
    match Command::new("unshare").args(["-rm", "true"]).status() {
        Ok(status) if status.success() => {}
        why => return eprintln!("skipped: a mount needs a namespace of its own: {why:?}"),
    }
    let [from, to] = [&path, &mounted].map(|path| path.to_str().unwrap());
    let script = "mount --bind \"$1\" \"$2\"; shift 2; exec \"$@\"";
    let prefix = [&unshare[..], &[script, "sh", from, to]].concat();
    let other = Other::under(&prefix, "hold", &mounted);
    let error = SqliteStore::open(&path).unwrap_err();
    assert!(error.is_in_use(), "{error}");
    other.end();
}

/// Does something to a store's files, after which it acknowledges nothing, for good. What it had acknowledged is in the file
/// that `left` then names.
async fn uproot(change: impl Fn(&Path), left: impl Fn(&Path) -> std::path::PathBuf) {
    for idle in [false, true] {
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("aegis.db");
        let store = SqliteStore::open(&path).unwrap();
        store.decide(approval("before")).await.unwrap();
        change(&path);
        let since = Instant::now();
        while idle && store.totals().await.is_ok() {
            assert!(since.elapsed() < Duration::from_secs(30), "it reads on");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        for key in ["before", "after"] {
            let error = store.decide(approval(key)).await.unwrap_err();
            assert!(error.is_unavailable(), "{error}");
        }
        assert!(store.check().await.is_err());
        assert!(store.totals().await.is_err());
        store.close().await;

        let store = SqliteStore::open(left(&path)).unwrap();
        let decided = store.decide(approval("before")).await.unwrap();
        assert!(matches!(decided, Decided::Duplicate(_)), "{decided:?}");
        store.close().await;
    }
}

#[tokio::test]
async fn a_store_whose_database_is_renamed_acknowledges_nothing_any_more() {
    let elsewhere = |path: &Path| path.with_extension("elsewhere");
    uproot(|path| fs::rename(path, elsewhere(path)).unwrap(), elsewhere).await;
}

#[tokio::test]
async fn a_store_whose_database_is_replaced_by_a_copy_acknowledges_nothing_any_more() {
    let kept = |path: &Path| path.with_extension("kept");
    let replace = |path: &Path| {
        fs::hard_link(path, kept(path)).unwrap();
        let copy = path.with_extension("copy");
        fs::copy(path, &copy).unwrap();
        fs::rename(&copy, path).unwrap();
    };
    uproot(replace, kept).await;
}

#[tokio::test]
async fn a_store_whose_log_is_removed_acknowledges_nothing_any_more() {
    let remove = |path: &Path| fs::remove_file(path.with_extension("db-wal")).unwrap();
    uproot(remove, Path::to_path_buf).await;
}

#[tokio::test]
async fn a_database_that_is_back_in_its_place_stays_refused() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("aegis.db");
    let away = folder.path().join("away.db");
    let store = SqliteStore::open(&path).unwrap();
    store.decide(approval("k")).await.unwrap();
    fs::rename(&path, &away).unwrap();
    assert!(store.check().await.is_err() || store.decide(approval("k")).await.is_err());
    fs::rename(&away, &path).unwrap();
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(store.decide(approval("k")).await.is_err());
    assert!(store.check().await.is_err());
}
