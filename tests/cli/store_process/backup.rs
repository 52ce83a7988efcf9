//! `aegis backup` and `aegis check`, beside a server that writes all the time.

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use rusqlite::Connection;
use tempfile::TempDir;

use super::other::Other;
use super::sync::library;
use super::verify;
use crate::binary::{Ended, aegis, run};

fn backup_command(store: &Path, to: &Path) -> Command {
    let mut command = aegis(&["backup", "--store"]);
    command.arg(store).arg(to);
    command
}

fn backup(store: &Path, to: &Path) -> Ended {
    run(backup_command(store, to))
}

fn check(file: &Path) -> Ended {
    let mut command = aegis(&["check"]);
    command.arg(file);
    run(command)
}

fn names(folder: &Path) -> HashSet<String> {
    let entries = fs::read_dir(folder).unwrap();
    entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect()
}

/// A folder with a store of some decisions, of a server that is gone.
async fn stored() -> (TempDir, PathBuf) {
    use aegis_hitl::store::{SqliteStore, Store};

    let folder = TempDir::new().unwrap();
    let path = folder.path().join("aegis.db");
    let store = SqliteStore::open(&path).unwrap();
    for key in 0..20 {
        let mut request = super::approval(&format!("k-{key}"));
        request.payload = Some(super::large());
        store.decide(request).await.unwrap();
    }
    store.close().await;
    (folder, path)
}

#[tokio::test]
async fn a_backup_beside_a_busy_server_has_all_that_was_acknowledged_before_it() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("aegis.db");
    let copies = TempDir::new().unwrap();
    let copy = copies.path().join("copy.db");
    let mut server = Other::start("load", &path);
    let mut acknowledged = HashSet::new();
    for _ in 0..2_000 {
        let line = server.line();
        acknowledged.insert(line.strip_prefix("ack ").unwrap().to_owned());
    }
    server.read_on();
    let ended = backup(&path, &copy).expect(0);
    assert!(ended.stdout.contains("backed up"), "{ended:?}");
    check(&copy).expect(0);
    check(&path).expect(0);
    server.kill();
    assert_eq!(names(copies.path()), HashSet::from(["copy.db".to_owned()]));
    let mode = fs::metadata(&copy).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    verify(&copy, &acknowledged).await;
}

#[tokio::test]
async fn a_backup_replaces_nothing() {
    let (folder, path) = stored().await;
    let copy = folder.path().join("copy.db");
    fs::write(&copy, "dear to somebody").unwrap();
    for to in [&copy, &path] {
        let ended = backup(&path, to).expect(1);
        assert!(ended.stderr.contains("is there already"), "{ended:?}");
    }
    assert_eq!(fs::read_to_string(&copy).unwrap(), "dear to somebody");
    // A log that waits for a database of this name would be taken for its own.
    let late = folder.path().join("late.db");
    fs::write(folder.path().join("late.db-wal"), "").unwrap();
    let ended = backup(&path, &late).expect(1);
    assert!(ended.stderr.contains("late.db-wal"), "{ended:?}");
    assert!(!late.exists());
    check(&path).expect(0);
}

#[tokio::test]
async fn a_backup_that_fails_leaves_nothing_behind() {
    let (folder, path) = stored().await;
    let copies = TempDir::new().unwrap();
    let copy = copies.path().join("aegis.db-copy");
    let mut limited = Command::new("sh");
    let command = backup_command(&path, &copy);
    limited
        .args(["-c", "trap '' XFSZ; ulimit -f 100; exec \"$0\" \"$@\""])
        .arg(command.get_program())
        .args(command.get_args());
    let ended = run(limited).expect(1);
    assert!(ended.stderr.contains("cannot be backed up"), "{ended:?}");
    assert_eq!(names(copies.path()), HashSet::new());

    // The name is given after the sync, and only then.
    if let Some(library) = library(folder.path()) {
        let order = folder.path().join("order");
        fs::write(&order, "drop .tmp").unwrap();
        let mut command = backup_command(&path, &copy);
        command
            .env("LD_PRELOAD", library)
            .env("AEGIS_TEST_ORDER", &order);
        let ended = run(command).expect(1);
        assert!(ended.stderr.contains("cannot be backed up"), "{ended:?}");
        assert_eq!(names(copies.path()), HashSet::new());
        assert!(!order.exists(), "nothing was synced");
    }
    backup(&path, &copy).expect(0);
}

#[tokio::test]
async fn what_is_no_store_is_neither_checked_nor_backed_up() {
    let folder = TempDir::new().unwrap();
    let copy = folder.path().join("copy.db");
    let text = folder.path().join("notes.txt");
    fs::write(&text, "no database ".repeat(1_000)).unwrap();
    let other = folder.path().join("other.db");
    let database = Connection::open(&other).unwrap();
    database.execute_batch("CREATE TABLE t (x)").unwrap();
    drop(database);
    let empty = folder.path().join("empty.db");
    fs::write(&empty, "").unwrap();
    for (file, why) in [
        (folder.path().join("missing.db"), "there is no file"),
        (folder.path().to_owned(), "is no regular file"),
        (text, "is not a SQLite database"),
        (other, "another application"),
        (empty, "is empty"),
    ] {
        let before = names(folder.path());
        for ended in [check(&file), backup(&file, &copy)] {
            let ended = ended.expect(1);
            assert!(ended.stderr.contains(why), "{ended:?}");
        }
        assert_eq!(names(folder.path()), before);
    }
}

#[tokio::test]
async fn a_check_says_how_much_there_is_and_changes_nothing() {
    let (folder, path) = stored().await;
    let (before, bytes) = (names(folder.path()), fs::read(&path).unwrap());
    let ended = check(&path).expect(0);
    assert!(
        ended
            .stdout
            .contains("is sound: 20 actions, 20 decisions, 20 events"),
        "{ended:?}"
    );
    let mut json = aegis(&["check", "--json"]);
    json.arg(&path);
    let json = run(json).expect(0).json();
    assert_eq!(json["sound"], true);
    assert_eq!(json["actions"], 20);
    assert_eq!(
        (names(folder.path()), fs::read(&path).unwrap()),
        (before, bytes)
    );
}

#[tokio::test]
async fn a_check_finds_damage_and_edits() {
    let (folder, path) = stored().await;
    for (edit, fault) in [
        (
            "UPDATE action SET payload = replace(payload, 'xx', 'xy') WHERE id = 3",
            "action 3: the digest is not the payload's",
        ),
        (
            "UPDATE action SET tenant_id = 'another' WHERE id = 4; \
             UPDATE event SET tenant_id = 'another' WHERE action = 4",
            "action 4: the identity is not that of its tenant, thread and key",
        ),
        (
            "UPDATE action SET decision = 'reject' WHERE id = 6",
            "action 6: its decision is not the one of its events",
        ),
        (
            "UPDATE action SET status = 'FAILED' WHERE id = 7",
            "action 7: its status is not the one of its events",
        ),
        (
            "DELETE FROM event WHERE action = 8",
            "action 8: it has no event",
        ),
        (
            "PRAGMA foreign_keys = off; DELETE FROM action WHERE id = 9",
            "event 9: there is no action of its number",
        ),
    ] {
        let copy = folder.path().join("copy.db");
        fs::copy(&path, &copy).unwrap();
        let database = Connection::open(&copy).unwrap();
        database.execute_batch(edit).unwrap();
        drop(database);
        let ended = check(&copy).expect(1);
        // Where an event is no longer what was chained, the audit chain says so, too.
        let mut faults = ended.stdout.lines();
        assert_eq!(faults.next(), Some(fault));
        assert!(faults.all(|fault| fault.contains("chain")), "{ended:?}");
        assert!(ended.stderr.contains("is not sound"), "{ended:?}");
        // A copy of what is not sound is no backup.
        let ended = backup(&copy, &folder.path().join("never.db")).expect(1);
        assert!(ended.stderr.contains(fault), "{ended:?}");
        assert!(!folder.path().join("never.db").exists());
    }

    let file = fs::File::options().write(true).open(&path).unwrap();
    let middle = fs::metadata(&path).unwrap().len() / 2 / 4096 * 4096;
    file.write_all_at(&[0x5a; 8192], middle).unwrap();
    let ended = check(&path).expect(1);
    assert!(ended.stderr.contains("is not sound"), "{ended:?}");
}
