//! Checkpoints: they copy the write-ahead log into the database file, off the writer's path.
//!
//! A log starts again from its beginning only when all of it is copied at the moment of a commit. Under constant load a
//! checkpoint beside the writer never catches up with it, and the log would grow without bound. So the thread here does
//! the bulk of the work, and when little is left the writer does the rest itself, between two batches.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use rusqlite::Connection;

use super::connection;
use super::fault::{Cause, Fault};
use super::lock::Location;

/// Pages (of 4 KiB) in the log from which on it is copied. The more, the more often a page that changes all the time is
/// copied once for many changes, and the fewer requests wait while a copy is synced: with so many it is less than one in a
/// hundred. Unit tests see the whole cycle with little to write.
const BULK: u32 = if cfg!(test) { 64 } else { 16_384 };

/// Pages in the log from which on the writer itself copies what is left, be it ever so much.
pub(super) const LIMIT: u32 = 4 * BULK;

/// As many pages left are little: the writer copies and syncs them in about the time of a commit.
const REST: u32 = if cfg!(test) { 8 } else { 256 };

/// The thread that copies the bulk. Dropping this ends and joins it.
#[derive(Debug)]
pub(super) struct Checkpointer {
    kick: Option<SyncSender<()>>,
    thread: Option<JoinHandle<()>>,
    shared: Arc<Shared>,
    /// Pages in the log from which on the next step is taken; more than [`BULK`] after one that came to nothing.
    due: u32,
    /// Pages in the log when it was last looked at.
    seen: u32,
    /// Pages that were copied when the last pass was begun, if one was since the log started.
    done_before: Option<u32>,
}

#[derive(Debug, Default)]
struct Shared {
    is_running: AtomicBool,
    /// What put the disk in doubt.
    broken: Mutex<Option<Cause>>,
    /// Pages of the log that are copied and synced.
    done: AtomicU32,
}

/// What the writer is to do.
#[derive(Debug)]
pub(super) enum Step {
    Nothing,
    CopyTheRest,
    Fail(Cause),
}

impl Checkpointer {
    pub(super) fn spawn(location: Arc<Location>) -> Result<Self, Fault> {
        let connection = connection::checkpointer(&location)?;
        let (kick, kicks) = mpsc::sync_channel(1);
        let shared = Arc::new(Shared::default());
        let thread = thread::Builder::new()
            .name("aegis-checkpoint".to_owned())
            .spawn({
                let shared = shared.clone();
                move || shared.run(&kicks, &connection, &location)
            })
            .map_err(|error| Fault::Passing(Cause::Thread(error)))?;
        Ok(Self {
            kick: Some(kick),
            thread: Some(thread),
            shared,
            due: BULK,
            seen: 0,
            done_before: None,
        })
    }

    /// Says what to do when `log` pages are in the log.
    pub(super) fn step(&mut self, log: u32) -> Step {
        if log < self.seen {
            // A commit found all of it copied.
            self.start_over();
        }
        self.seen = log;
        if let Some(cause) = self.shared.broken().take() {
            return Step::Fail(cause);
        }
        // It panicked: only dropping the sender ends it otherwise.
        if self.thread.as_ref().is_none_or(JoinHandle::is_finished) {
            let ended = io::Error::other("the checkpoint thread has failed");
            return Step::Fail(Cause::Thread(ended));
        }
        if log < self.due || self.shared.is_running.load(Ordering::Acquire) {
            return Step::Nothing;
        }
        let done = self.shared.done.load(Ordering::Acquire);
        match self.done_before {
            Some(before) if done <= before => {
                self.put_off(log);
                return Step::Nothing;
            }
            Some(_) if log.saturating_sub(done) <= REST || log >= LIMIT => {
                return Step::CopyTheRest;
            }
            _ => self.done_before = Some(done),
        }
        self.shared.is_running.store(true, Ordering::Release);
        if self
            .kick
            .as_ref()
            .is_none_or(|kick| kick.try_send(()).is_err())
        {
            self.shared.is_running.store(false, Ordering::Release);
        }
        Step::Nothing
    }

    /// The log starts again from its beginning.
    pub(super) fn start_over(&mut self) {
        self.due = BULK;
        self.seen = 0;
        self.done_before = None;
        self.shared.done.store(0, Ordering::Release);
    }

    /// Something is in the way, such as a reader or a full disk; it is tried again when the log has grown some more.
    pub(super) fn put_off(&mut self, log: u32) {
        self.due = log.saturating_add(BULK);
        self.done_before = None;
    }
}

impl Drop for Checkpointer {
    fn drop(&mut self) {
        self.join();
    }
}

impl Checkpointer {
    /// Ends the thread, and returns what put the disk in doubt, if anything did.
    pub(super) fn end(mut self) -> Option<Cause> {
        self.join();
        self.shared.broken().take()
    }

    fn join(&mut self) {
        self.kick = None;
        if let Some(thread) = self.thread.take() {
            // A panic there has ended the thread; what it held is released.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn run(&self, kicks: &Receiver<()>, connection: &Connection, location: &Location) {
        for () in kicks {
            match pass(connection, location) {
                Ok(done) => self.done.store(done, Ordering::Release),
                Err(Fault::Passing(_)) => {}
                Err(Fault::Full(error)) => {
                    // The log has what was acknowledged, and takes more for as long as it finds room.
                    let path = location.path.display();
                    tracing::warn!(%path, %error, "a checkpoint found no room");
                }
                Err(fault) => *self.broken() = Some(fault.cause()),
            }
            self.is_running.store(false, Ordering::Release);
        }
    }

    fn broken(&self) -> MutexGuard<'_, Option<Cause>> {
        self.broken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Copies what is in the log, and syncs it, so that little is left to sync for the writer.
fn pass(connection: &Connection, location: &Location) -> Result<u32, Fault> {
    let progress = connection::checkpoint(connection, "PASSIVE")?;
    let synced = location.file.sync();
    synced.map_err(|error| Fault::Broken(Cause::Sync(error)))?;
    Ok(progress.done)
}
