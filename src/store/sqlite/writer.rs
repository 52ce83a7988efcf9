//! The writer: one thread, one connection, group commit.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use rusqlite::Connection;

use super::chain;
use super::chainer::Chainer;
use super::checkpoint::{Checkpointer, Step};
use super::fault::{Cause, Fault, is_fatal};
use super::job::{Command, Extend, Job, Settle};
use super::lock::{Location, Lock, Log};
use super::read::Readers;
use super::repeats::Repeats;
use super::state::State;
use super::transaction::{Transaction, Written};
use super::{StoreError, connection, unready};
use crate::store::{Clock, Watchers};

/// The most requests in one transaction.
const MAX_BATCH: usize = 512;

/// The shortest pause between two attempts to recover.
const RECOVERY_PAUSE: Duration = Duration::from_millis(250);

/// How long the writer waits for readers that keep the log from starting over.
const REST_TIMEOUT: Duration = Duration::from_millis(50);

/// The shortest wait for a request.
const MIN_PAUSE: Duration = Duration::from_millis(10);

/// How often records that are due are looked for.
const SETTLE_EACH: Duration = Duration::from_millis(500);

/// How often an idle writer checks that its files are in place.
const LOOK_AROUND: Duration = Duration::from_secs(1);

/// The most links that are computed when the store is closed.
const LAST_LINKS: usize = 4096;

pub(super) struct Writer {
    commands: Receiver<Command>,
    connection: Option<Connection>,
    /// The connection's log.
    log_file: Option<Log>,
    /// The reason why this store will never write again.
    uprooted: Option<StoreError>,
    repeats: Arc<Repeats>,
    clock: Clock,
    /// When records that are due are looked for again.
    settle_at: Instant,
    checkpointer: Option<Checkpointer>,
    chainer: Option<Chainer>,
    /// Pages in the log at the last commit.
    log: Arc<AtomicU32>,
    state: Arc<State>,
    readers: Arc<Readers>,
    watchers: Watchers,
    recover_at: Instant,
    /// The obstacle to the last recovery, as it was logged.
    obstacle: Option<String>,
    location: Arc<Location>,
    /// The last field: the lock is released when everything else is closed.
    lock: Option<Lock>,
}

/// The parts of a writer.
pub(super) struct Parts {
    pub(super) commands: Receiver<Command>,
    pub(super) connection: Connection,
    pub(super) repeats: Arc<Repeats>,
    pub(super) clock: Clock,
    pub(super) checkpointer: Checkpointer,
    pub(super) state: Arc<State>,
    pub(super) readers: Arc<Readers>,
    pub(super) watchers: Watchers,
    pub(super) location: Arc<Location>,
    pub(super) lock: Lock,
}

impl Writer {
    pub(super) fn new(parts: Parts) -> Result<Self, StoreError> {
        let mut writer = Self {
            commands: parts.commands,
            connection: None,
            log_file: None,
            uprooted: None,
            repeats: parts.repeats,
            clock: parts.clock,
            settle_at: Instant::now(),
            checkpointer: Some(parts.checkpointer),
            chainer: None,
            log: Arc::default(),
            state: parts.state,
            readers: parts.readers,
            watchers: parts.watchers,
            recover_at: Instant::now(),
            obstacle: None,
            location: parts.location,
            lock: Some(parts.lock),
        };
        let unopened = |fault: Fault| {
            StoreError::unavailable("the database cannot be opened").with_source(fault.cause())
        };
        writer.install(parts.connection).map_err(unopened)?;
        writer.chainer = Some(Chainer::spawn(writer.readers.clone()).map_err(unopened)?);
        Ok(writer)
    }

    fn install(&mut self, mut connection: Connection) -> Result<(), Fault> {
        let log = self.log.clone();
        log.store(0, Ordering::Relaxed);
        connection.wal_hook(Some(move |_: &mut _, pages| {
            log.store(u32::try_from(pages).unwrap_or(0), Ordering::Relaxed);
            Ok(())
        }))?;
        let page_size = connection.pragma_query_value(None, "page_size", |row| row.get(0))?;
        self.connection = Some(connection);
        self.log_file = Some(Log::of(&self.location, page_size).map_err(missed)?);
        // SQLite opened its files by path, and what it found there may not be the right ones.
        self.look_around()
    }

    /// Checks that the paths lead to the open files, and that nobody else has written to the log.
    fn look_around(&self) -> Result<(), Fault> {
        let moved = |how| Fault::Uprooted {
            how,
            log_is_whole: true,
        };
        if !self.location.is_in_place().map_err(missed)? {
            return Err(moved(
                "the database file was renamed, removed or replaced while it was open",
            ));
        }
        let Some(log) = &self.log_file else {
            return Ok(());
        };
        if !log.is_in_place().map_err(missed)? {
            return Err(moved(
                "the database's log was renamed, removed or replaced while it was open",
            ));
        }
        if !log
            .is_whole(self.log.load(Ordering::Relaxed))
            .map_err(missed)?
        {
            return Err(Fault::Uprooted {
                how: "the database's log was emptied, or its index replaced, while it was open",
                log_is_whole: false,
            });
        }
        Ok(())
    }

    /// Serves until the store is closed or dropped.
    pub(super) fn run(mut self) {
        let mut batch: Vec<Box<dyn Job>> = Vec::with_capacity(MAX_BATCH);
        while !self.state.is_closing() {
            if self.settle_at <= Instant::now() {
                self.settle_at = Instant::now() + SETTLE_EACH;
                if self.connection.is_some() {
                    batch.push(Box::new(Settle));
                    self.serve(&mut batch);
                }
            }
            let is_busy = self.state.counters.queued.load(Ordering::Relaxed) > 0;
            let chainer = self.chainer.as_mut();
            if let Some(extension) = chainer.and_then(|chainer| chainer.step(is_busy)) {
                // It shares a transaction with the requests that wait.
                batch.push(Box::new(Extend(extension)));
                self.fill(&mut batch);
                self.serve(&mut batch);
            }
            let pause = self.settle_at.saturating_duration_since(Instant::now());
            let pause = match self.chainer.as_ref().and_then(Chainer::pause) {
                Some(sooner) => pause.min(sooner),
                None => pause,
            };
            match self
                .commands
                .recv_timeout(pause.clamp(MIN_PAUSE, LOOK_AROUND))
            {
                Ok(Command::Run(first)) => batch.push(self.taken(first)),
                Ok(Command::Wake) => continue,
                Err(RecvTimeoutError::Timeout) => {
                    if self.uprooted.is_none()
                        && let Err(fault @ Fault::Uprooted { .. }) = self.look_around()
                    {
                        self.fail(fault);
                    }
                    continue;
                }
                // All handles are dropped, and the queue is empty.
                Err(RecvTimeoutError::Disconnected) => break,
            }
            self.fill(&mut batch);
            self.serve(&mut batch);
        }
        loop {
            self.fill(&mut batch);
            if batch.is_empty() {
                break;
            }
            self.serve(&mut batch);
        }
        self.chain_the_rest(&mut batch);
    }

    /// Chains what the last requests left, so that a store that was closed has no events but chained
    /// ones. After a long backlog, the next start goes on.
    fn chain_the_rest(&mut self, batch: &mut Vec<Box<dyn Job>>) {
        self.chainer = None;
        let rest = self.connection.as_ref();
        let rest = rest.map(|connection| chain::extension(connection, LAST_LINKS));
        match rest {
            Some(Ok(extension)) if !extension.is_empty() => {
                batch.push(Box::new(Extend(extension)));
                self.serve(batch);
            }
            Some(Err(error)) => tracing::debug!(%error, "the audit chain is not extended now"),
            Some(Ok(_)) | None => {}
        }
    }

    fn fill(&self, batch: &mut Vec<Box<dyn Job>>) {
        batch.extend(self.waiting().take(MAX_BATCH - batch.len()));
    }

    /// The jobs that are in the queue now.
    fn waiting(&self) -> impl Iterator<Item = Box<dyn Job>> {
        self.commands
            .try_iter()
            .filter_map(|command| match command {
                Command::Run(job) => Some(self.taken(job)),
                Command::Wake => None,
            })
    }

    /// Notes that a job has left the queue.
    fn taken(&self, job: Box<dyn Job>) -> Box<dyn Job> {
        self.state.counters.queued.fetch_sub(1, Ordering::Relaxed);
        job
    }

    fn serve(&mut self, batch: &mut Vec<Box<dyn Job>>) {
        let repeats = self.repeats.clone();
        // Before anything is written, too: a commit to a log that was emptied would hide it.
        if self.ready().is_some()
            && let Err(fault) = self.look_around()
        {
            self.fail(fault);
        }
        let Some(connection) = &self.connection else {
            let error = self.uprooted.clone().unwrap_or_else(unready);
            refuse(batch.drain(..), &error);
            return;
        };
        let begun = Instant::now();
        let queued = &self.state.counters.queued;
        let done = transact(connection, &repeats, &self.clock, queued, batch);
        // This check comes before any acknowledgement: the next start might not find the files that
        // the batch was written to.
        let done = done.and_then(|written| match self.look_around() {
            Ok(()) => Ok(written),
            Err(fault) => Err(Stop::Fault(fault)),
        });
        match done {
            Ok(written) => {
                let counters = &self.state.counters;
                written.changes.count(&counters.events);
                counters
                    .removed
                    .fetch_add(written.removed, Ordering::Relaxed);
                if !written.changes.is_empty()
                    && let Some(chainer) = &mut self.chainer
                {
                    chainer.note();
                }
                if written.has_written {
                    self.state.set_written(begun);
                    counters.commits.add(written.took);
                    let requests = batch.len() as u64;
                    counters.requests.fetch_add(requests, Ordering::Relaxed);
                }
                if written.is_behind {
                    self.settle_at = Instant::now();
                }
                // First of all, so that whoever is answered has caused no wake-up still to come.
                written.changes.wake(&self.watchers);
                for job in batch.drain(..) {
                    job.answer();
                }
                self.tend();
            }
            Err(Stop::Request(error)) if batch.len() == 1 => {
                // Whoever asked reports it. A row that cannot be read fails every request for it.
                tracing::debug!(%error, "a request cannot be recorded");
                let error =
                    StoreError::unavailable("the request cannot be recorded").with_source(error);
                refuse(batch.drain(..), &error);
            }
            // Nothing of the batch is recorded. To find the faulty request, each runs in a
            // transaction of its own. This is so rare that no request gets a savepoint, which would
            // copy every page that the request changes.
            Err(Stop::Request(_)) => {
                for job in batch.drain(..) {
                    self.serve(&mut vec![job]);
                }
            }
            Err(Stop::Fault(fault)) => {
                let error = self.fail(fault);
                refuse(batch.drain(..), &error);
            }
        }
    }

    /// The connection. It is opened again if that is due and possible.
    fn ready(&mut self) -> Option<&Connection> {
        let is_due = self.recover_at <= Instant::now();
        if self.connection.is_none() && self.uprooted.is_none() && is_due {
            let begun = Instant::now();
            match self.recover() {
                Ok(()) => {
                    tracing::info!(path = %self.path().display(), "the store is ready again");
                    self.obstacle = None;
                    self.state.set_ready();
                }
                Err(fault @ Fault::Uprooted { .. }) => {
                    self.fail(fault);
                }
                Err(fault) => {
                    let obstacle = fault.cause().to_string();
                    // Once per obstacle, not four times a second.
                    if self.obstacle.as_ref() != Some(&obstacle) {
                        tracing::warn!(path = %self.path().display(), obstacle, "the store is still unready");
                        self.obstacle = Some(obstacle);
                    }
                    self.close_all();
                }
            }
            // The recovery may have read a long log.
            self.recover_at = Instant::now() + RECOVERY_PAUSE.max(begun.elapsed());
        }
        self.connection.as_ref()
    }

    fn recover(&mut self) -> Result<(), Fault> {
        self.look_around()?;
        self.readers.clear();
        if !self.readers.is_empty() {
            return Err(Fault::Passing(Cause::Reader));
        }
        let connection = connection::recovered_writer(&self.location, &self.repeats)?;
        self.install(connection)?;
        self.checkpointer = Some(Checkpointer::spawn(self.location.clone())?);
        self.readers.fill()?;
        self.chainer = Some(Chainer::spawn(self.readers.clone())?);
        Ok(())
    }

    /// Handles a fault, and returns the error for the callers.
    fn fail(&mut self, fault: Fault) -> StoreError {
        if let Fault::Passing(error) = fault {
            tracing::warn!(path = %self.path().display(), %error, "the database takes no writes now");
            let error =
                StoreError::unavailable("the database takes no writes now").with_source(error);
            // Requests behind this batch have waited as long, and would have to wait once more.
            refuse(self.waiting().take(super::QUEUE), &error);
            return error;
        }
        self.state.set_unready();
        if let Fault::Uprooted { how, log_is_whole } = fault {
            tracing::error!(
                path = %self.path().display(),
                "{how}; the store takes nothing any more until it is opened again"
            );
            let error = StoreError::unavailable(how);
            self.uprooted = Some(error.clone());
            if log_is_whole {
                self.give_up();
            } else {
                self.close_all();
            }
            return error;
        }
        let error = fault.cause();
        tracing::warn!(path = %self.path().display(), %error, "the store is unready");
        self.abandon();
        self.recover_at = Instant::now() + RECOVERY_PAUSE;
        StoreError::unavailable("the database takes no writes").with_source(error)
    }

    /// Closes everything after a fault, and keeps other programs from relying on data that is in
    /// doubt. If a read is still running, the recovery does the latter.
    fn abandon(&mut self) {
        self.close_all();
        if self.readers.is_empty()
            && let Err(fault) = connection::forget_index(&self.location)
        {
            let error = fault.cause();
            tracing::warn!(path = %self.path().display(), %error, "the wal-index is left as it is");
        }
    }

    /// Closes the connection so that only the database file remains.
    fn close(&mut self) -> Result<(), Fault> {
        if self.connection.is_some() {
            self.look_around()?;
        }
        self.connection.take().map_or(Ok(()), connection::close)
    }

    fn close_all(&mut self) {
        self.chainer = None;
        self.readers.clear();
        self.checkpointer = None;
        self.connection = None;
        self.log_file = None;
    }

    /// Copies what was acknowledged from the log into the database file, wherever both are now,
    /// without touching their names.
    fn give_up(&mut self) {
        if let Some(connection) = &self.connection
            && let Err(fault) = connection::checkpoint(connection, "TRUNCATE")
        {
            let error = fault.cause();
            tracing::warn!(path = %self.path().display(), %error, "the log was not copied");
        }
        self.close_all();
    }

    /// Keeps the log bounded.
    fn tend(&mut self) {
        let log = self.log.load(Ordering::Relaxed);
        let (Some(connection), Some(checkpointer)) = (&self.connection, &mut self.checkpointer)
        else {
            return;
        };
        let fault = match checkpointer.step(log) {
            Step::Nothing => return,
            Step::CopyTheRest => match copy_the_rest(connection) {
                Ok(true) => {
                    checkpointer.start_over();
                    self.log.store(0, Ordering::Relaxed);
                    return;
                }
                Ok(false) | Err(Fault::Passing(_) | Fault::Full(_)) => {
                    checkpointer.put_off(log);
                    return;
                }
                Err(fault) => fault,
            },
            Step::Fail(cause) => Fault::Broken(cause),
        };
        self.fail(fault);
    }

    fn path(&self) -> &Path {
        &self.location.path
    }
}

impl Drop for Writer {
    /// Runs on a panic of the thread, too: callers always get an answer, and the lock is always
    /// released.
    fn drop(&mut self) {
        if thread::panicking() {
            tracing::error!(path = %self.path().display(), "the store's writer has failed");
            self.state.set_failed();
        }
        self.state.set_closing();
        self.chainer = None;
        refuse(self.waiting(), &self.state.closed_error());
        self.readers.clear();
        let broken = self.checkpointer.take().and_then(Checkpointer::end);
        let closed = match broken {
            Some(cause) => Err(Fault::Broken(cause)),
            None => self.close(),
        };
        match closed {
            Ok(()) => {}
            Err(Fault::Uprooted { log_is_whole, .. }) if log_is_whole => self.give_up(),
            Err(Fault::Uprooted { .. }) => self.close_all(),
            Err(fault) => {
                let error = fault.cause();
                tracing::info!(path = %self.path().display(), %error, "the log is left for the next start");
                self.abandon();
            }
        }
        self.lock = None;
        self.state.set_closed();
    }
}

/// The reason why nothing of a batch was recorded.
#[derive(Debug)]
enum Stop {
    /// A request cannot be recorded because of a fault of its own.
    Request(rusqlite::Error),
    Fault(Fault),
}

impl From<Fault> for Stop {
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}

/// Runs a batch in one transaction. On success everything in its answers is durable.
fn transact(
    connection: &Connection,
    repeats: &Repeats,
    clock: &Clock,
    queued: &AtomicU64,
    batch: &mut [Box<dyn Job>],
) -> Result<Written, Stop> {
    let done = attempt(connection, repeats, clock, queued, batch);
    if done.is_err() && !connection.is_autocommit() {
        let undone = connection.execute_batch("ROLLBACK");
        // After a fault the connection is dropped, which rolls back.
        if let (Err(Stop::Request(_)), Err(error)) = (&done, undone) {
            return Err(Stop::Fault(error.into()));
        }
    }
    done
}

fn attempt(
    connection: &Connection,
    repeats: &Repeats,
    clock: &Clock,
    queued: &AtomicU64,
    batch: &mut [Box<dyn Job>],
) -> Result<Written, Stop> {
    let mut transaction = Transaction::begin(connection, repeats, clock).map_err(Fault::of)?;
    if batch.len() == 1 {
        transaction.set_alone(queued);
    }
    for job in batch {
        job.run(&mut transaction).map_err(|error| {
            if is_fatal(&error) {
                Stop::Fault(Fault::of(error))
            } else {
                Stop::Request(error)
            }
        })?;
    }
    Ok(transaction.commit().map_err(Fault::of)?)
}

/// Copies what is left in the log, so that the next commit starts it over. Returns `false` if a
/// reader is in the way.
fn copy_the_rest(connection: &Connection) -> Result<bool, Fault> {
    let progress = connection::with_busy_timeout(connection, REST_TIMEOUT, |connection| {
        connection::checkpoint(connection, "RESTART")
    })?;
    Ok(!progress.is_held_up)
}

fn missed(error: io::Error) -> Fault {
    Fault::Broken(Cause::Place(error))
}

fn refuse(jobs: impl Iterator<Item = Box<dyn Job>>, error: &StoreError) {
    for job in jobs {
        job.refuse(error);
    }
}
