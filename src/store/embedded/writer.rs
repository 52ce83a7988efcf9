//! The writer: one thread, one connection, group commit.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use rusqlite::Connection;
use tokio::sync::oneshot;

use super::checkpoint::{Checkpointer, Step};
use super::fault::{Cause, Fault, is_fatal};
use super::lock::{Location, Lock};
use super::read::Readers;
use super::state::{self, State};
use super::{StoreError, connection, transition};
use crate::protocol::Action;
use crate::store::{Decide, Decided, Submit, Submitted, Watchers};

/// The most requests in one transaction.
const MAX_BATCH: usize = 512;

/// The least time between two attempts to recover.
const RECOVERY_PAUSE: Duration = Duration::from_millis(250);

/// How long the writer waits for readers that keep the log from starting again.
const REST_TIMEOUT: Duration = Duration::from_millis(50);

type Reply<T> = oneshot::Sender<Result<T, StoreError>>;

/// What the writer is asked to do.
#[derive(Debug)]
pub(super) enum Command {
    Decide(Box<Decide>, Reply<Decided>),
    Submit(Box<Submit>, Reply<Submitted>),
    Check(Reply<()>),
    /// Look at the state.
    Wake,
}

/// An answer that is held back until the commit.
#[derive(Debug)]
enum Answer {
    Decide(Result<Decided, StoreError>, Reply<Decided>),
    Submit(Result<Submitted, StoreError>, Reply<Submitted>),
    Check(Reply<()>),
}

#[derive(Debug)]
pub(super) struct Writer {
    commands: Receiver<Command>,
    connection: Option<Connection>,
    checkpointer: Option<Checkpointer>,
    /// Pages in the log, as of the last commit.
    log: Arc<AtomicU32>,
    state: Arc<State>,
    readers: Arc<Readers>,
    watchers: Watchers,
    /// Whether a fault left doubt about what is on the disk.
    in_doubt: bool,
    recover_at: Instant,
    location: Arc<Location>,
    /// Last: released when everything else is closed.
    lock: Option<Lock>,
}

/// What a writer is made of.
pub(super) struct Parts {
    pub(super) commands: Receiver<Command>,
    pub(super) connection: Connection,
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
            checkpointer: Some(parts.checkpointer),
            log: Arc::default(),
            state: parts.state,
            readers: parts.readers,
            watchers: parts.watchers,
            in_doubt: false,
            recover_at: Instant::now(),
            location: parts.location,
            lock: Some(parts.lock),
        };
        writer.install(parts.connection).map_err(|error| {
            StoreError::unavailable("the database cannot be opened").with_source(error)
        })?;
        Ok(writer)
    }

    fn install(&mut self, mut connection: Connection) -> rusqlite::Result<()> {
        let log = self.log.clone();
        log.store(0, Ordering::Relaxed);
        connection.wal_hook(Some(move |_: &mut _, pages| {
            log.store(u32::try_from(pages).unwrap_or(0), Ordering::Relaxed);
            Ok(())
        }))?;
        self.connection = Some(connection);
        Ok(())
    }

    /// Serves until the store is closed or dropped.
    pub(super) fn run(mut self) {
        let mut batch = Vec::with_capacity(MAX_BATCH);
        while !self.state.is_closing() {
            // An error means that all handles are gone and the queue is empty.
            let Ok(first) = self.commands.recv() else {
                break;
            };
            batch.push(first);
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
    }

    fn fill(&self, batch: &mut Vec<Command>) {
        batch.extend(self.commands.try_iter().take(MAX_BATCH - batch.len()));
    }

    fn serve(&mut self, batch: &mut Vec<Command>) {
        batch.retain(|command| !matches!(command, Command::Wake));
        if batch.is_empty() {
            return;
        }
        let Some(connection) = self.ready() else {
            refuse(batch.drain(..), &unready());
            return;
        };
        let begun = Instant::now();
        let mut answers = Vec::with_capacity(batch.len());
        match transact(connection, batch, &mut answers) {
            Ok(has_written) => {
                if has_written {
                    self.state.set_written(begun);
                }
                for answer in answers {
                    answer.send(&self.watchers);
                }
                self.tend();
            }
            Err(fault) => {
                let error = self.fail(fault);
                for answer in answers {
                    answer.refuse(&error);
                }
                refuse(batch.drain(..), &error);
            }
        }
    }

    /// The connection, opened again if that is due and possible.
    fn ready(&mut self) -> Option<&Connection> {
        if self.connection.is_none() && self.recover_at <= Instant::now() {
            match self.recover() {
                Ok(()) => {
                    tracing::info!(path = %self.path().display(), "the store is ready again");
                    self.in_doubt = false;
                    self.state.set_ready();
                }
                Err(error) => {
                    tracing::debug!(path = %self.path().display(), %error, "the store is still unready");
                    self.connection = None;
                    self.checkpointer = None;
                }
            }
            self.recover_at = Instant::now() + RECOVERY_PAUSE;
        }
        self.connection.as_ref()
    }

    fn recover(&mut self) -> Result<(), StoreError> {
        let failed = |cause: Cause| {
            StoreError::unavailable("the database cannot be opened again").with_source(cause)
        };
        self.readers.clear();
        if !self.readers.is_empty() {
            return Err(StoreError::unavailable("a read is not finished"));
        }
        let connection = connection::recovered_writer(&self.location, self.in_doubt)
            .map_err(|fault| failed(fault.cause()))?;
        self.install(connection)
            .map_err(|error| failed(Cause::Database(error)))?;
        self.checkpointer = Some(Checkpointer::spawn(self.location.clone())?);
        Ok(())
    }

    /// Takes note of a fault, and returns what to answer.
    fn fail(&mut self, fault: Fault) -> StoreError {
        let in_doubt = match fault {
            Fault::Busy(error) => {
                tracing::warn!(path = %self.path().display(), %error, "another program holds the database");
                let error = StoreError::unavailable("another program holds the database")
                    .with_source(error);
                // Who waited behind this batch has waited as long, and would wait once more.
                refuse(self.commands.try_iter().take(super::QUEUE), &error);
                return error;
            }
            Fault::Full(_) => false,
            Fault::Broken(_) => true,
        };
        let error = fault.cause();
        tracing::warn!(path = %self.path().display(), %error, "the store is unready");
        self.in_doubt |= in_doubt;
        self.state.set_unready();
        self.readers.clear();
        self.connection = None;
        self.checkpointer = None;
        self.recover_at = Instant::now() + RECOVERY_PAUSE;
        StoreError::unavailable("the database takes no writes").with_source(error)
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
                Ok(false) | Err(Fault::Busy(_) | Fault::Full(_)) => {
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
    /// Also runs if the thread panics: whatever happens, callers are told and the lock is released.
    fn drop(&mut self) {
        self.state.set_closing();
        refuse(self.commands.try_iter(), &state::closed());
        self.readers.clear();
        self.checkpointer = None;
        if let Some(connection) = self.connection.take()
            && let Err(fault) = connection::close(connection)
        {
            let error = fault.cause();
            tracing::info!(path = %self.path().display(), %error, "the log is left for the next start");
        }
        self.lock = None;
        self.state.set_closed();
    }
}

/// Runs a batch in one transaction. On success everything that `answers` say is durable, and whether it was written now
/// is returned.
fn transact(
    connection: &Connection,
    batch: &mut Vec<Command>,
    answers: &mut Vec<Answer>,
) -> Result<bool, Fault> {
    // Immediate: a transaction that reads first and writes later fails if another program wrote in between.
    transition::run(connection, "BEGIN IMMEDIATE")?;
    let done =
        apply(connection, batch, answers).and_then(|()| Ok(transition::run(connection, "COMMIT")?));
    if done.is_err() && !connection.is_autocommit() {
        // If this fails too the connection is dropped, which rolls back.
        let _ = transition::run(connection, "ROLLBACK");
    }
    done.map(|()| answers.iter().any(Answer::has_written))
}

/// Runs a batch's statements. An error is one that ends the transaction.
fn apply(
    connection: &Connection,
    batch: &mut Vec<Command>,
    answers: &mut Vec<Answer>,
) -> Result<(), Fault> {
    let mut has_beaten = false;
    for command in batch.drain(..) {
        let (answer, failed) = match command {
            Command::Decide(request, reply) => {
                let (outcome, failed) = own(transition::decide(connection, &request));
                (Answer::Decide(outcome, reply), failed)
            }
            Command::Submit(request, reply) => {
                let (outcome, failed) = own(transition::submit(connection, &request));
                (Answer::Submit(outcome, reply), failed)
            }
            Command::Check(reply) => {
                let failed = if has_beaten {
                    None
                } else {
                    has_beaten = true;
                    transition::beat(connection).err()
                };
                (Answer::Check(reply), failed)
            }
            Command::Wake => continue,
        };
        answers.push(answer);
        if let Some(error) = failed {
            return Err(Fault::of(error));
        }
        // SQLite rolls back by itself after some errors; then nothing of the batch is left to commit.
        if connection.is_autocommit() {
            return Err(Fault::Broken(Cause::RolledBack));
        }
    }
    Ok(())
}

/// Splits an outcome into what its own request is answered, and the error that ends the whole batch.
fn own<T>(outcome: rusqlite::Result<T>) -> (Result<T, StoreError>, Option<rusqlite::Error>) {
    match outcome {
        Ok(outcome) => (Ok(outcome), None),
        Err(error) if is_fatal(&error) => (Err(unready()), Some(error)),
        Err(error) => {
            tracing::warn!(%error, "a request cannot be recorded");
            let error =
                StoreError::unavailable("the request cannot be recorded").with_source(error);
            (Err(error), None)
        }
    }
}

/// Copies what is left in the log, so that the next commit starts it again. `false` if a reader is in the way.
fn copy_the_rest(connection: &Connection) -> Result<bool, Fault> {
    let progress = connection::with_busy_timeout(connection, REST_TIMEOUT, |connection| {
        connection::checkpoint(connection, "RESTART")
    })?;
    Ok(!progress.is_held_up)
}

fn unready() -> StoreError {
    StoreError::unavailable("the database takes no writes")
}

fn refuse(commands: impl Iterator<Item = Command>, error: &StoreError) {
    for command in commands {
        match command {
            Command::Decide(_, reply) => drop(reply.send(Err(error.clone()))),
            Command::Submit(_, reply) => drop(reply.send(Err(error.clone()))),
            Command::Check(reply) => drop(reply.send(Err(error.clone()))),
            Command::Wake => {}
        }
    }
}

impl Answer {
    fn has_written(&self) -> bool {
        match self {
            Self::Decide(outcome, _) => matches!(outcome, Ok(Decided::Recorded(_))),
            Self::Submit(outcome, _) => matches!(outcome, Ok(Submitted::Recorded(_))),
            Self::Check(_) => true,
        }
    }

    /// Answers, and wakes those who wait for the action. Nobody may listen any more.
    fn send(self, watchers: &Watchers) {
        match self {
            Self::Decide(outcome, reply) => {
                if let Ok(Decided::Recorded(action)) = &outcome {
                    wake(watchers, action);
                }
                drop(reply.send(outcome));
            }
            Self::Submit(outcome, reply) => {
                if let Ok(Submitted::Recorded(action)) = &outcome {
                    wake(watchers, action);
                }
                drop(reply.send(outcome));
            }
            Self::Check(reply) => drop(reply.send(Ok(()))),
        }
    }

    fn refuse(self, error: &StoreError) {
        match self {
            Self::Decide(_, reply) => drop(reply.send(Err(error.clone()))),
            Self::Submit(_, reply) => drop(reply.send(Err(error.clone()))),
            Self::Check(reply) => drop(reply.send(Err(error.clone()))),
        }
    }
}

fn wake(watchers: &Watchers, action: &Action) {
    if let Some(id) = action.request_id.as_uuid_v4() {
        watchers.wake(id);
    }
}
