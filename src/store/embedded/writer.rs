//! The writer: one thread, one connection, group commit.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use rusqlite::Connection;
use tokio::sync::oneshot;

use super::calls::Calls;
use super::checkpoint::{Checkpointer, Step};
use super::fault::{Fault, is_fatal};
use super::lock::{Location, Lock};
use super::read::Readers;
use super::state::{self, State};
use super::transition::Transaction;
use super::{StoreError, connection};
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
    Decide(Box<Call<Decide, Decided>>),
    Submit(Box<Call<Submit, Submitted>>),
    Check(Reply<()>),
    /// Look at the state.
    Wake,
}

/// A request, and its answer, which is held back until the commit.
#[derive(Debug)]
pub(super) struct Call<Q, A> {
    request: Q,
    answer: Option<A>,
    reply: Reply<A>,
}

impl<Q, A> Call<Q, A> {
    pub(super) fn new(request: Q, reply: Reply<A>) -> Box<Self> {
        Box::new(Self {
            request,
            answer: None,
            reply,
        })
    }
}

#[derive(Debug)]
pub(super) struct Writer {
    commands: Receiver<Command>,
    connection: Option<Connection>,
    calls: Arc<Calls>,
    checkpointer: Option<Checkpointer>,
    /// Pages in the log, as of the last commit.
    log: Arc<AtomicU32>,
    state: Arc<State>,
    readers: Arc<Readers>,
    watchers: Watchers,
    recover_at: Instant,
    /// Why the last recovery came to nothing, as far as the log has it.
    obstacle: Option<String>,
    location: Arc<Location>,
    /// Last: released when everything else is closed.
    lock: Option<Lock>,
}

/// What a writer is made of.
pub(super) struct Parts {
    pub(super) commands: Receiver<Command>,
    pub(super) connection: Connection,
    pub(super) calls: Arc<Calls>,
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
            calls: parts.calls,
            checkpointer: Some(parts.checkpointer),
            log: Arc::default(),
            state: parts.state,
            readers: parts.readers,
            watchers: parts.watchers,
            recover_at: Instant::now(),
            obstacle: None,
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
        let calls = self.calls.clone();
        let Some(connection) = self.ready() else {
            refuse(batch.drain(..), &unready());
            return;
        };
        let begun = Instant::now();
        match transact(connection, &calls, batch) {
            Ok(()) => {
                if batch.iter().any(Command::has_written) {
                    self.state.set_written(begun);
                }
                for command in batch.drain(..) {
                    command.answer(&self.watchers);
                }
                self.tend();
            }
            Err(Stop::Request(error)) if batch.len() == 1 => {
                tracing::warn!(%error, "a request cannot be recorded");
                let error =
                    StoreError::unavailable("the request cannot be recorded").with_source(error);
                refuse(batch.drain(..), &error);
            }
            // Nothing of the batch is recorded. Which request it was shows when each has a transaction of its own. That this
            // happens next to never is why no request has a savepoint, which copies every page that the request changes.
            Err(Stop::Request(_)) => {
                for command in batch.drain(..) {
                    self.serve(&mut vec![command]);
                }
            }
            Err(Stop::Fault(fault)) => {
                let error = self.fail(fault);
                refuse(batch.drain(..), &error);
            }
        }
    }

    /// The connection, opened again if that is due and possible.
    fn ready(&mut self) -> Option<&Connection> {
        if self.connection.is_none() && self.recover_at <= Instant::now() {
            let begun = Instant::now();
            match self.recover() {
                Ok(()) => {
                    tracing::info!(path = %self.path().display(), "the store is ready again");
                    self.obstacle = None;
                    self.state.set_ready();
                }
                Err(obstacle) => {
                    // Once for each obstacle, not four times a second.
                    if self.obstacle.as_ref() != Some(&obstacle) {
                        tracing::warn!(path = %self.path().display(), obstacle, "the store is still unready");
                        self.obstacle = Some(obstacle);
                    }
                    self.checkpointer = None;
                    self.connection = None;
                }
            }
            // It may have read a long log.
            self.recover_at = Instant::now() + RECOVERY_PAUSE.max(begun.elapsed());
        }
        self.connection.as_ref()
    }

    /// Opens the database again, or says what is in the way.
    fn recover(&mut self) -> Result<(), String> {
        self.readers.clear();
        if !self.readers.is_empty() {
            return Err("a read is not finished".to_owned());
        }
        let connection = connection::recovered_writer(&self.location, &self.calls)
            .map_err(|fault| fault.cause().to_string())?;
        self.install(connection)
            .map_err(|error| error.to_string())?;
        let checkpointer = Checkpointer::spawn(self.location.clone());
        self.checkpointer = Some(checkpointer.map_err(|error| error.to_string())?);
        Ok(())
    }

    /// Takes note of a fault, and returns what to answer.
    fn fail(&mut self, fault: Fault) -> StoreError {
        if let Fault::Busy(error) = fault {
            tracing::warn!(path = %self.path().display(), %error, "another program holds the database");
            let error =
                StoreError::unavailable("another program holds the database").with_source(error);
            // Who waited behind this batch has waited as long, and would wait once more.
            refuse(self.commands.try_iter().take(super::QUEUE), &error);
            return error;
        }
        let error = fault.cause();
        tracing::warn!(path = %self.path().display(), %error, "the store is unready");
        self.state.set_unready();
        self.abandon();
        self.recover_at = Instant::now() + RECOVERY_PAUSE;
        StoreError::unavailable("the database takes no writes").with_source(error)
    }

    /// Closes everything after a fault, and keeps other programs from relying on what is in doubt. If a read is still under way,
    /// the recovery does that.
    fn abandon(&mut self) {
        self.readers.clear();
        self.checkpointer = None;
        self.connection = None;
        if self.readers.is_empty()
            && let Err(fault) = connection::forget_index(&self.location)
        {
            let error = fault.cause();
            tracing::warn!(path = %self.path().display(), %error, "the wal-index is left as it is");
        }
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
        let broken = self.checkpointer.take().and_then(Checkpointer::end);
        let closed = match (broken, self.connection.take()) {
            (Some(cause), connection) => {
                drop(connection);
                Err(Fault::Broken(cause))
            }
            (None, Some(connection)) => connection::close(connection),
            (None, None) => Ok(()),
        };
        if let Err(fault) = closed {
            let error = fault.cause();
            tracing::info!(path = %self.path().display(), %error, "the log is left for the next start");
            self.abandon();
        }
        self.lock = None;
        self.state.set_closed();
    }
}

/// Why nothing of a batch was recorded.
#[derive(Debug)]
enum Stop {
    /// A request cannot be recorded, and that is its own fault.
    Request(rusqlite::Error),
    Fault(Fault),
}

impl From<Fault> for Stop {
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}

/// Runs a batch in one transaction. On success everything that its answers say is durable.
fn transact(connection: &Connection, calls: &Calls, batch: &mut [Command]) -> Result<(), Stop> {
    let done = attempt(connection, calls, batch);
    if done.is_err() && !connection.is_autocommit() {
        let undone = connection.execute_batch("ROLLBACK");
        // After a fault the connection is dropped, which rolls back.
        if let (Err(Stop::Request(_)), Err(error)) = (&done, undone) {
            return Err(Stop::Fault(error.into()));
        }
    }
    done
}

fn attempt(connection: &Connection, calls: &Calls, batch: &mut [Command]) -> Result<(), Stop> {
    let mut transaction = Transaction::begin(connection, calls).map_err(Fault::of)?;
    let mut has_beaten = false;
    for command in batch {
        let done = match command {
            Command::Decide(call) => transaction
                .decide(&call.request)
                .map(|decided| call.answer = Some(decided)),
            Command::Submit(call) => transaction
                .submit(&call.request)
                .map(|submitted| call.answer = Some(submitted)),
            Command::Check(_) if has_beaten => Ok(()),
            Command::Check(_) => {
                has_beaten = true;
                transaction.beat()
            }
            Command::Wake => Ok(()),
        };
        done.map_err(|error| {
            if is_fatal(&error) {
                Stop::Fault(Fault::of(error))
            } else {
                Stop::Request(error)
            }
        })?;
    }
    transaction.commit().map_err(Fault::of)?;
    Ok(())
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
            Command::Decide(call) => drop(call.reply.send(Err(error.clone()))),
            Command::Submit(call) => drop(call.reply.send(Err(error.clone()))),
            Command::Check(reply) => drop(reply.send(Err(error.clone()))),
            Command::Wake => {}
        }
    }
}

impl Command {
    fn has_written(&self) -> bool {
        match self {
            Self::Decide(call) => matches!(call.answer, Some(Decided::Recorded(_))),
            Self::Submit(call) => matches!(call.answer, Some(Submitted::Recorded(_))),
            Self::Check(_) => true,
            Self::Wake => false,
        }
    }

    /// Answers, and wakes those who wait for the action. Nobody may listen any more.
    fn answer(self, watchers: &Watchers) {
        match self {
            Self::Decide(call) => {
                if let Some(Decided::Recorded(action)) = &call.answer {
                    wake(watchers, action);
                }
                drop(call.reply.send(call.answer.ok_or_else(unready)));
            }
            Self::Submit(call) => {
                if let Some(Submitted::Recorded(action)) = &call.answer {
                    wake(watchers, action);
                }
                drop(call.reply.send(call.answer.ok_or_else(unready)));
            }
            Self::Check(reply) => drop(reply.send(Ok(()))),
            Self::Wake => {}
        }
    }
}

fn wake(watchers: &Watchers, action: &Action) {
    if let Some(id) = action.request_id.as_uuid_v4() {
        watchers.wake(id);
    }
}
