//! Checkpoints, which copy the write-ahead log into the database file, mostly off the writer's
//! path.
//!
//! SQLite starts the log over only if all of it is copied at the moment of a commit. Under constant
//! load a checkpoint beside the writer never catches up, and the log would grow without bound. So a
//! thread copies the bulk of the log. When little is left, the writer copies the rest itself,
//! between two batches.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use rusqlite::Connection;

use super::connection;
use super::fault::{Cause, Fault};
use super::lock::Location;

/// The log is copied once it holds this many pages (of 4 KiB).
///
/// A high value saves work: a page that changes all the time is copied once for more of its
/// changes. It also makes fewer requests wait while a copy is synced: at 16,384 pages, less than
/// one in a hundred. The small value shows unit tests the whole cycle after few writes.
const BULK: u32 = if cfg!(test) { 64 } else { 16_384 };

/// Once the log holds this many pages, the writer itself copies what is left, however much it is.
pub(super) const LIMIT: u32 = 4 * BULK;

/// The rest that the writer copies by itself, in pages. It copies and syncs that many in about the
/// time of a commit.
const REST: u32 = if cfg!(test) { 8 } else { 256 };

/// The thread that copies the bulk. Dropping this ends the thread and joins it.
#[derive(Debug)]
pub(super) struct Checkpointer {
    kick: Option<SyncSender<()>>,
    thread: Option<JoinHandle<()>>,
    shared: Arc<Shared>,
    /// The next step is taken when the log holds this many pages: [`BULK`], or more after a step
    /// that made no progress.
    due: u32,
    /// Pages in the log at the last step.
    seen: u32,
    /// Pages that were copied when the last pass began. `None` if no pass has begun since the log
    /// started over or a step was put off.
    done_before: Option<u32>,
}

#[derive(Debug, Default)]
struct Shared {
    is_running: AtomicBool,
    /// The cause that put the disk in doubt.
    broken: Mutex<Option<Cause>>,
    /// Pages of the log that are copied and synced.
    done: AtomicU32,
}

/// What the writer must do next.
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

    /// Decides what to do when the log holds `log` pages.
    pub(super) fn step(&mut self, log: u32) -> Step {
        if log < self.seen {
            // The log got shorter: a commit found all of it copied.
            self.start_over();
        }
        self.seen = log;
        if let Some(cause) = self.shared.broken().take() {
            return Step::Fail(cause);
        }
        // The thread panicked. Otherwise it ends only when the sender is dropped.
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

    /// Notes that the log starts over.
    pub(super) fn start_over(&mut self) {
        self.due = BULK;
        self.seen = 0;
        self.done_before = None;
        self.shared.done.store(0, Ordering::Release);
    }

    /// Notes that something is in the way, such as a reader or a full disk. The next step waits
    /// until the log has grown further.
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
    /// Ends the thread. Returns the cause that put the disk in doubt, if there was one.
    pub(super) fn end(mut self) -> Option<Cause> {
        self.join();
        self.shared.broken().take()
    }

    fn join(&mut self) {
        self.kick = None;
        if let Some(thread) = self.thread.take() {
            // A panic has already ended the thread and released what it held.
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
                    // The log holds what was acknowledged, and takes more for as long as it has
                    // room.
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

/// Copies the log and syncs the copy, so that little is left for the writer to sync.
fn pass(connection: &Connection, location: &Location) -> Result<u32, Fault> {
    let progress = connection::checkpoint(connection, "PASSIVE")?;
    let synced = location.file.sync();
    synced.map_err(|error| Fault::Broken(Cause::Sync(error)))?;
    Ok(progress.done)
}
