//! A sync fails, and the kernel drops the pages that it could not write.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use super::other::Other;
use super::verify;
use crate::support::again::again;

/// So many refusals, some ms apart, are more than a recovery takes.
const PATIENCE: usize = 20_000;

/// A process whose syncs fail on order.
pub(crate) struct Faulty {
    pub(crate) other: Other,
    order: PathBuf,
    acknowledged: HashSet<String>,
}

/// The library that makes them fail. `None`, with a word why, where there is no compiler.
pub(crate) fn library(folder: &Path) -> Option<PathBuf> {
    let library = folder.join("fault.so");
    let source = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/tests/cli/store_process/fault.c"
    );
    let compiled = Command::new("cc")
        .args(["-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o"])
        .arg(&library)
        .args([source, "-ldl", "-pthread"])
        .output();
    match compiled {
        Ok(compiled) => {
            let errors = String::from_utf8_lossy(&compiled.stderr);
            assert!(compiled.status.success(), "{errors}");
            Some(library)
        }
        Err(error) => {
            eprintln!("skipped: a failing sync needs a C compiler, and cc: {error}");
            None
        }
    }
}

impl Faulty {
    pub(crate) fn start(folder: &Path, role: &str, database: &Path) -> Option<Self> {
        let order = folder.join("order");
        let mut command = again(super::child);
        command
            .env("LD_PRELOAD", library(folder)?)
            .env("AEGIS_TEST_ORDER", &order);
        Some(Self {
            other: Other::run(command, role, database),
            order,
            acknowledged: HashSet::new(),
        })
    }

    pub(crate) fn order(&self, order: &str) {
        // In one piece: the other process may read at any time.
        let draft = self.order.with_extension("draft");
        fs::write(&draft, order).unwrap();
        fs::rename(&draft, &self.order).unwrap();
    }

    /// Reads what it says until it has said so often that the store acknowledges nothing, or the end.
    fn until_unavailable(&mut self, times: usize) {
        let (mut seen, before) = (0, self.acknowledged.len());
        while seen < times {
            match &*self.other.line() {
                "" => break,
                "unavailable" => seen += 1,
                line => self.note(line),
            }
            let since = self.acknowledged.len() - before;
            assert!(since < 5_000, "it acknowledges all the same");
        }
    }

    pub(crate) fn until_acknowledged(&mut self, times: usize) {
        let enough = self.acknowledged.len() + times;
        let mut refused = 0;
        while self.acknowledged.len() < enough {
            let line = self.other.line();
            assert_ne!(line, "", "it ended: {}", self.other.last_words());
            self.note(&line);
            refused += usize::from(line == "unavailable");
            assert!(refused < PATIENCE, "it does not recover");
        }
    }

    fn note(&mut self, line: &str) {
        if let Some(key) = line.strip_prefix("ack ") {
            self.acknowledged.insert(key.to_owned());
        }
    }

    /// Kills it, and returns what it acknowledged.
    pub(crate) fn kill(mut self) -> HashSet<String> {
        let acknowledged = &mut self.acknowledged;
        for line in self.other.kill() {
            if let Some(key) = line.strip_prefix("ack ") {
                acknowledged.insert(key.to_owned());
            }
        }
        self.acknowledged
    }
}

#[tokio::test]
async fn a_failed_sync_loses_nothing_beside_another_program_that_has_the_database_open() {
    for file in ["aegis.db", "aegis.db-wal"] {
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("aegis.db");
        let Some(mut store) = Faulty::start(folder.path(), "insist", &path) else {
            return;
        };
        let program = Other::start("look", &path);
        store.until_acknowledged(10);
        store.order(&format!("drop {file}"));
        store.until_unavailable(1);
        store.until_acknowledged(200);
        let acknowledged = store.kill();
        program.end();
        verify(&path, &acknowledged).await;
    }
}

#[tokio::test]
async fn a_program_that_closes_the_database_last_loses_nothing_that_was_in_doubt() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("aegis.db");
    let Some(mut store) = Faulty::start(folder.path(), "insist", &path) else {
        return;
    };
    let program = Other::start("look", &path);
    store.order("stuck aegis.db");
    store.until_unavailable(40);
    let order = store.order.clone();
    let acknowledged = store.kill();
    fs::remove_file(order).unwrap();
    program.end();
    verify(&path, &acknowledged).await;
}

#[tokio::test]
async fn a_server_that_died_of_a_failed_sync_is_followed_by_one_that_loses_nothing() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("aegis.db");
    let Some(mut store) = Faulty::start(folder.path(), "insist", &path) else {
        return;
    };
    let program = Other::start("look", &path);
    store.order("kill aegis.db");
    store.until_unavailable(1);
    let acknowledged = store.kill();
    assert!(!acknowledged.is_empty());
    verify(&path, &acknowledged).await;
    program.end();
}

#[tokio::test]
async fn nothing_is_acknowledged_behind_pages_of_the_log_that_are_in_memory_alone() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("aegis.db");
    let Some(mut store) = Faulty::start(folder.path(), "insist", &path) else {
        return;
    };
    store.until_acknowledged(10);
    // It keeps the log from being emptied, so what is recorded next is behind those pages.
    let program = Other::start("read", &path);
    store.until_acknowledged(10);
    store.order("late aegis.db-wal");
    store.until_unavailable(1);
    store.until_acknowledged(200);
    store.order("evict aegis.db-wal");
    while store.order.exists() {
        store.until_acknowledged(1);
    }
    // The power goes.
    let acknowledged = store.kill();
    program.kill();
    verify(&path, &acknowledged).await;
}

#[tokio::test]
async fn a_store_is_opened_beside_another_programs_read() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("aegis.db");
    let mut store = Other::start("insist", &path);
    let mut acknowledged = HashSet::new();
    while acknowledged.len() < 10 {
        let line = store.line();
        acknowledged.insert(line.strip_prefix("ack ").unwrap().to_owned());
    }
    let program = Other::start("read", &path);
    for _ in 0..10 {
        let line = store.line();
        acknowledged.insert(line.strip_prefix("ack ").unwrap().to_owned());
    }
    store.kill();
    verify(&path, &acknowledged).await;
    program.end();
}
