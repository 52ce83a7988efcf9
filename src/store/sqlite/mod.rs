//! The embedded store: SQLite in this process.

mod audit;
mod backup;
mod chain;
mod chainer;
mod checkpoint;
mod connection;
mod deliveries;
mod fault;
mod job;
mod list;
mod lock;
mod moved;
#[cfg(feature = "postgres")]
pub(super) mod moving;
mod read;
mod rows;
mod schema;
mod state;
mod sweep;
mod transaction;
mod verify;
mod writer;

#[cfg(test)]
mod tests;

use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{self, SyncSender, TrySendError};
use std::thread;
use std::time::Duration;

use rusqlite::Connection;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use uuid::Uuid;

pub use self::audit::AuditTrail;
use self::checkpoint::Checkpointer;
use self::fault::Fault;
use self::job::{Beat, Command, Job, Run};
use self::lock::Location;
use self::read::Readers;
use self::repeats::Repeats;
use self::state::State;
pub use self::verify::Verified;
use self::writer::{Parts, Writer};
use super::operation::Operation;
use super::repeats;
use super::{
    Acquire, Acquired, Backlog, Cancel, Cancelled, Clock, DeadLetter, Decide, DecideById, Decided,
    DueDeliveries, EndpointState, EndpointTaken, Finish, Finished, Forget, Forgotten, List,
    MarkDeliveries, Marked, Page, Renew, Renewed, Resend, Resent, Resume, Resumed, Statistics,
    Store, StoreError, Submit, Submitted, Sweep, Swept, TakeEndpoint, Totals, Watch, Watchers,
    WriterStatistics,
};
use crate::protocol::{Action, Event, TenantId};

/// The most requests that may wait for the writer.
const QUEUE: usize = 4096;

/// The room for unanswered requests, in KiB. Each takes its payload and comment, and [`OVERHEAD`].
const ROOM: usize = 64 * 1024;

/// The most that a request takes beside its payload and comment, in bytes. Its names are bounded.
const OVERHEAD: usize = 1024;

/// A store in one SQLite file, in this process.
///
/// Requests that arrive during a commit share the next one, which spreads the cost of an fsync over
/// them. At most 4096 requests may wait, and at most 64 MiB of them. Any more are refused as
/// unavailable, and nothing of them is recorded.
///
/// The file is in WAL mode, without an exclusive lock: `sqlite3` can query it and back it up
/// (`.backup`, `VACUUM INTO`) while the store is open. The view `readable_action` shows ids and
/// times as text. A long write transaction of another program makes requests fail. A long read
/// transaction makes the log (`-wal`) grow for as long as it lasts.
///
/// A file `.lock` beside the database keeps a second server out. It stays when the store is closed,
/// because removing it would let two servers lock two different files. On Linux the database file
/// itself is locked too, so a second server cannot get in by another name for it (a hard link, a
/// mount). If the file or its log (`-wal`) is renamed, removed or replaced while the store is open,
/// the store refuses every further request: the next start would not find what it recorded.
///
/// When the disk is full or fails, every request is answered with an error and nothing is
/// acknowledged. The store tries to recover when requests or [checks](Store::check) come in, at
/// most four times a second. After a failed sync it relies on nothing written since the last good
/// one, and writes all of that again from the log. Other programs may keep the database open and
/// read it meanwhile. They must be other processes: POSIX drops a process's locks on a file when it
/// closes any descriptor of that file, and the store closes some when it opens, recovers and
/// closes.
///
/// A thread chains the events of each tenant by their hashes, about a second after they are recorded;
/// see [`AuditTrail`].
///
/// The store remembers the ids of the newest 16,384 calls that changed nothing (duplicates), until
/// it is closed.
///
/// Dropping the last handle closes the store in the background. Requests that were sent before are
/// still recorded. [`close`](Self::close) waits for that. Reads run on tokio's blocking threads, so
/// the store must be used within a tokio runtime.
#[derive(Clone)]
pub struct SqliteStore {
    commands: SyncSender<Command>,
    room: Arc<Semaphore>,
    readers: Arc<Readers>,
    watchers: Watchers,
    state: Arc<State>,
    location: Arc<Location>,
    repeats: Arc<Repeats>,
    clock: Clock,
}

impl SqliteStore {
    /// Opens the database at `path`, or creates it, readable by this user alone. The folder must
    /// exist.
    ///
    /// This blocks until the file is recovered and migrated.
    ///
    /// # Errors
    ///
    /// - [In use](StoreError::is_in_use), if another process holds the database, or this process
    ///   already does.
    /// - [Incompatible](StoreError::is_incompatible), if the path is not a writable file, or the
    ///   file is not a database of this application, or is one of a newer version.
    /// - [Unavailable](StoreError::is_unavailable), if the disk is full or fails, or another
    ///   program's write does not end within 2 s.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, StoreError> {
        Self::open_with(path, Clock::new())
    }

    /// Opens the database at `path` as [`open`](Self::open) does, with a clock that may show
    /// another time than the system's.
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open).
    pub fn open_with(path: impl AsRef<Path>, clock: Clock) -> Result<Self, StoreError> {
        let (location, lock) = lock::acquire(path.as_ref())?;
        let location = Arc::new(location);
        let repeats = Arc::new(Repeats::default());
        let connection = connection::first_writer(&location, &repeats)?;
        let (commands, queue) = mpsc::sync_channel(QUEUE);
        let state = Arc::new(State::new());
        let readers = Arc::new(Readers::new(location.clone(), state.clone()));
        let unopened = |fault: Fault| {
            StoreError::unavailable("the database cannot be opened").with_source(fault.cause())
        };
        readers.fill().map_err(|error| unopened(error.into()))?;
        let checkpointer = Checkpointer::spawn(location.clone()).map_err(unopened)?;
        let watchers = Watchers::new();
        let writer = Writer::new(Parts {
            commands: queue,
            connection,
            repeats: repeats.clone(),
            clock: clock.clone(),
            checkpointer,
            state: state.clone(),
            readers: readers.clone(),
            watchers: watchers.clone(),
            location: location.clone(),
            lock,
        })?;
        thread::Builder::new()
            .name("aegis-writer".to_owned())
            .spawn(move || writer.run())
            .map_err(|error| {
                StoreError::unavailable("the writer thread cannot be started").with_source(error)
            })?;
        Ok(Self {
            commands,
            room: Arc::new(Semaphore::new(ROOM)),
            readers,
            watchers,
            state,
            location,
            repeats,
            clock,
        })
    }

    /// Copies the database at `database`, as it is at one moment, to the new file `to`.
    ///
    /// A server may have the database open and keep writing. Its log grows for as long as the copy
    /// takes.
    ///
    /// The copy is one file, readable by this user alone, and opens like any database. It gets its
    /// name only once it is [verified](Self::verify) and synced, so a file of that name is
    /// complete. This blocks.
    ///
    /// # Errors
    ///
    /// - [Incompatible](StoreError::is_incompatible), if there is no database of this application,
    ///   or if `to` or a log of that name exists.
    /// - [Unavailable](StoreError::is_unavailable), if the disk is full or fails, or the database
    ///   is not sound.
    pub fn back_up(
        database: impl AsRef<Path>,
        to: impl AsRef<Path>,
    ) -> Result<Verified, StoreError> {
        backup::back_up(database.as_ref(), to.as_ref())
    }

    /// Returns the version of SQLite, which is compiled in, such as `3.50.4`.
    pub fn engine_version() -> &'static str {
        rusqlite::version()
    }

    /// Checks all of the database at `database` without changing it. A server may have it open.
    ///
    /// SQLite checks the structure. Then each action must agree with its ids, its digest and its
    /// events. This blocks, and reads every row.
    ///
    /// # Errors
    ///
    /// - [Incompatible](StoreError::is_incompatible), if there is no database of this application,
    ///   or it is one of another version.
    /// - [Unavailable](StoreError::is_unavailable), if it cannot be read.
    pub fn verify(database: impl AsRef<Path>) -> Result<Verified, StoreError> {
        verify::verify(database.as_ref())
    }

    /// Reads the state of every webhook endpoint in the database at `database`, by name. A server
    /// may have it open. This blocks.
    ///
    /// # Errors
    ///
    /// As [`verify`](Self::verify).
    pub fn read_endpoints(database: impl AsRef<Path>) -> Result<Vec<EndpointState>, StoreError> {
        deliveries::read_beside(database.as_ref(), deliveries::endpoints)
    }

    /// Reads up to `limit` dead letters of a webhook endpoint in the database at `database`, oldest
    /// event first. A server may have it open. This blocks.
    ///
    /// # Errors
    ///
    /// As [`verify`](Self::verify).
    pub fn read_dead_letters(
        database: impl AsRef<Path>,
        endpoint: &str,
        limit: usize,
    ) -> Result<Vec<DeadLetter>, StoreError> {
        deliveries::read_beside(database.as_ref(), |connection| {
            deliveries::dead_letters(connection, endpoint, limit)
        })
    }

    /// Runs [`resend`](Store::resend) on the database at `database`. A server may have it open, and
    /// then sends the dead letters when it next looks. This blocks.
    ///
    /// # Errors
    ///
    /// As [`verify`](Self::verify), or [unavailable](StoreError::is_unavailable), if the database
    /// cannot be written.
    pub fn resend_beside(
        database: impl AsRef<Path>,
        request: &Resend,
    ) -> Result<Resent, StoreError> {
        deliveries::run_beside(database.as_ref(), request)
    }

    /// Runs [`resume`](Store::resume) on the database at `database`, as
    /// [`resend_beside`](Self::resend_beside) does.
    ///
    /// # Errors
    ///
    /// As [`resend_beside`](Self::resend_beside).
    pub fn resume_beside(
        database: impl AsRef<Path>,
        request: &Resume,
    ) -> Result<Resumed, StoreError> {
        deliveries::run_beside(database.as_ref(), request)
    }

    /// Runs [`forget`](Store::forget_endpoint) on the database at `database`, as
    /// [`resend_beside`](Self::resend_beside) does.
    ///
    /// # Errors
    ///
    /// As [`resend_beside`](Self::resend_beside).
    pub fn forget_beside(
        database: impl AsRef<Path>,
        request: &Forget,
    ) -> Result<Forgotten, StoreError> {
        deliveries::run_beside(database.as_ref(), request)
    }

    /// Closes the store for all of its handles. Returns when every request sent before is durable
    /// and the lock is released. Later requests are refused as unavailable.
    pub async fn close(&self) {
        self.state.set_closing();
        // A full queue wakes the writer as well.
        let _ = self.commands.try_send(Command::Wake);
        self.state.closed().await;
    }

    /// Completes if the store's writer panicked, so that the store can never answer again.
    ///
    /// All requests are then refused as unavailable, and the way out is a new process: whatever
    /// ended the writer may have left other threads in an unknown state.
    ///
    /// This future stays pending while the store is open, and after it was [closed](Self::close).
    pub async fn failed(&self) {
        self.state.failed().await;
    }

    /// Sends an operation to the writer, and waits for its outcome.
    ///
    /// An operation is large, and it is copied for each future around this one. So there are none,
    /// and none of the operation is left in this one while it waits.
    async fn run<O: Operation>(&self, operation: O) -> Result<O::Outcome, StoreError> {
        let room = self.room_for(operation.size())?;
        let (reply, answer) = oneshot::channel();
        self.send(Box::new(Run::new(operation, room, reply)))?;
        self.answered(answer.await)
    }

    fn room_for(&self, operation: usize) -> Result<OwnedSemaphorePermit, StoreError> {
        // A request larger than all of the room is let in alone.
        let room = (operation + OVERHEAD).div_ceil(1024).min(ROOM) as u32;
        let room = self.room.clone().try_acquire_many_owned(room);
        room.map_err(|_| {
            StoreError::unavailable(format!(
                "{} MiB of requests are waiting for the store already",
                ROOM / 1024
            ))
        })
    }

    /// Sends a job to the writer.
    fn send(&self, job: Box<dyn Job>) -> Result<(), StoreError> {
        if self.state.is_closing() {
            return Err(self.state.closed_error());
        }
        let queued = &self.state.counters.queued;
        queued.fetch_add(1, Ordering::Relaxed);
        let sent = self.commands.try_send(Command::Run(job));
        sent.map_err(|unsent| {
            queued.fetch_sub(1, Ordering::Relaxed);
            match unsent {
                TrySendError::Full(_) => StoreError::unavailable(format!(
                    "{QUEUE} requests are waiting for the store already"
                )),
                TrySendError::Disconnected(_) => self.state.closed_error(),
            }
        })
    }

    /// The answer to a job. A writer that was closed drops it.
    fn answered<T>(
        &self,
        answer: Result<Result<T, StoreError>, oneshot::error::RecvError>,
    ) -> Result<T, StoreError> {
        answer.unwrap_or_else(|_| Err(self.state.closed_error()))
    }
}

impl Store for SqliteStore {
    fn decide(&self, request: Decide) -> impl Future<Output = Result<Decided, StoreError>> + Send {
        self.run(request)
    }

    fn submit(
        &self,
        request: Submit,
    ) -> impl Future<Output = Result<Submitted, StoreError>> + Send {
        self.run(request)
    }

    fn decide_by_id(
        &self,
        request: DecideById,
    ) -> impl Future<Output = Result<Decided, StoreError>> + Send {
        self.run(request)
    }

    fn cancel(
        &self,
        request: Cancel,
    ) -> impl Future<Output = Result<Cancelled, StoreError>> + Send {
        self.run(request)
    }

    fn acquire(
        &self,
        request: Acquire,
    ) -> impl Future<Output = Result<Acquired, StoreError>> + Send {
        self.run(request)
    }

    fn renew(&self, request: Renew) -> impl Future<Output = Result<Renewed, StoreError>> + Send {
        self.run(request)
    }

    fn finish(&self, request: Finish) -> impl Future<Output = Result<Finished, StoreError>> + Send {
        self.run(request)
    }

    fn sweep(&self, request: Sweep) -> impl Future<Output = Result<Swept, StoreError>> + Send {
        self.run(request)
    }

    async fn list(&self, request: List) -> Result<Page, StoreError> {
        let read = move |connection: &Connection| list::page(connection, &request);
        self.readers.read(read).await
    }

    async fn tenants(
        &self,
        after: Option<&TenantId>,
        limit: usize,
    ) -> Result<Vec<TenantId>, StoreError> {
        let after = after.cloned();
        let read = move |connection: &Connection| list::tenants(connection, after, limit);
        self.readers.read(read).await
    }

    async fn look_up(&self, id: Uuid, tenant: &TenantId) -> Result<Option<Action>, StoreError> {
        let tenant = tenant.clone();
        let read = move |connection: &Connection| list::with_history(connection, id, &tenant);
        self.readers.read(read).await
    }

    async fn events(
        &self,
        tenant: &TenantId,
        after: u64,
        limit: usize,
    ) -> Result<Vec<(u64, Event)>, StoreError> {
        let tenant = tenant.clone();
        self.readers
            .read(move |connection| list::events(connection, Some(&tenant), after, limit))
            .await
    }

    async fn all_events(&self, after: u64, limit: usize) -> Result<Vec<(u64, Event)>, StoreError> {
        self.readers
            .read(move |connection| list::events(connection, None, after, limit))
            .await
    }

    fn take_endpoint(
        &self,
        request: TakeEndpoint,
    ) -> impl Future<Output = Result<EndpointTaken, StoreError>> + Send {
        self.run(request)
    }

    async fn due_deliveries(
        &self,
        endpoint: &str,
        limit: usize,
        longest_wait: Duration,
    ) -> Result<DueDeliveries, StoreError> {
        let (endpoint, now) = (endpoint.to_owned(), self.clock.now());
        let read = move |connection: &Connection| {
            deliveries::due(connection, &endpoint, now, longest_wait, limit)
        };
        self.readers.read(read).await
    }

    fn mark_deliveries(
        &self,
        request: MarkDeliveries,
    ) -> impl Future<Output = Result<Marked, StoreError>> + Send {
        self.run(request)
    }

    fn resend(&self, request: Resend) -> impl Future<Output = Result<Resent, StoreError>> + Send {
        self.run(request)
    }

    fn resume(&self, request: Resume) -> impl Future<Output = Result<Resumed, StoreError>> + Send {
        self.run(request)
    }

    fn forget_endpoint(
        &self,
        request: Forget,
    ) -> impl Future<Output = Result<Forgotten, StoreError>> + Send {
        self.run(request)
    }

    async fn endpoints(&self) -> Result<Vec<EndpointState>, StoreError> {
        self.readers.read(deliveries::endpoints).await
    }

    async fn dead_letters(
        &self,
        endpoint: &str,
        limit: usize,
    ) -> Result<Vec<DeadLetter>, StoreError> {
        let endpoint = endpoint.to_owned();
        let read =
            move |connection: &Connection| deliveries::dead_letters(connection, &endpoint, limit);
        self.readers.read(read).await
    }

    async fn newest_event(&self) -> Result<u64, StoreError> {
        self.readers.read(list::newest_event).await
    }

    async fn find(
        &self,
        id: Uuid,
        tenant: Option<&TenantId>,
    ) -> Result<Option<Action>, StoreError> {
        let repeats = self.repeats.clone();
        let tenant = tenant.cloned();
        let record = self
            .readers
            .read(move |connection| rows::by_id(connection, &repeats, id, tenant.as_ref()))
            .await?;
        Ok(record.map(|record| record.action))
    }

    fn watch(&self, id: Uuid) -> Watch {
        self.watchers.watch(id)
    }

    fn watch_tenant(&self, tenant: &TenantId) -> Watch {
        self.watchers.watch_tenant(tenant)
    }

    fn watch_all(&self) -> Watch {
        self.watchers.watch_all()
    }

    async fn check(&self) -> Result<(), StoreError> {
        if self.state.epoch().is_ok() && self.state.was_just_written() {
            return Ok(());
        }
        let (reply, answer) = oneshot::channel();
        self.send(Box::new(Beat(reply)))?;
        self.answered(answer.await)
    }

    async fn backlog(&self) -> Result<Backlog, StoreError> {
        let now = self.clock.now();
        let read = move |connection: &Connection| list::backlog(connection, now);
        self.readers.read(read).await
    }

    fn statistics(&self) -> Statistics {
        let counters = &self.state.counters;
        Statistics {
            events: counters.events.read(),
            removed: counters.removed.load(Ordering::Relaxed),
            writer: Some(WriterStatistics {
                is_ready: self.state.epoch().is_ok(),
                queued: counters.queued.load(Ordering::Relaxed),
                requests: counters.requests.load(Ordering::Relaxed),
                commits: counters.commits.read(),
            }),
            connections: None,
        }
    }

    async fn totals(&self) -> Result<Totals, StoreError> {
        self.readers.read(totals).await
    }
}

fn unready() -> StoreError {
    StoreError::unavailable("the database takes no writes")
}

fn totals(connection: &Connection) -> rusqlite::Result<Totals> {
    connection
        .prepare_cached(
            "SELECT (SELECT count(*) FROM action), (SELECT count(decision) FROM action), \
             (SELECT count(*) FROM event), (SELECT count(*) FROM tombstone)",
        )?
        .query_row([], |row| {
            Ok(Totals {
                actions: row.get::<_, i64>(0)?.unsigned_abs(),
                decisions: row.get::<_, i64>(1)?.unsigned_abs(),
                events: row.get::<_, i64>(2)?.unsigned_abs(),
                removed: row.get::<_, i64>(3)?.unsigned_abs(),
            })
        })
}

impl fmt::Debug for SqliteStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SqliteStore")
            .field("path", &self.location.path)
            .finish_non_exhaustive()
    }
}
