//! The PostgreSQL store: any number of servers on one database.
//!
//! Every operation runs in one transaction. What it may change is read with a lock, the rules of all
//! stores run on that in memory, and what they changed is written and committed. An action that is
//! new is taken for new at once, and recorded in one transaction with others.

mod address;
mod audit;
mod batch;
mod chain;
mod deliveries;
mod fault;
mod ids;
pub(super) mod import;
mod load;
mod loaded;
mod partitions;
mod publish;
mod read;
mod rights;
mod rows;
mod schema;
mod session;
mod standby;
mod state;
mod sweep;
mod tend;
mod tls;
mod transact;
mod turn;
mod wall;
mod write;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use deadpool::Runtime;
use deadpool::managed::{PoolError, QueueMode};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use uuid::Uuid;

use self::address::Address;
pub use self::audit::PostgresAuditTrail;
use self::fault::Fault;
use self::load::Located;
use self::loaded::{Happened, Key};
use self::publish::{Follower, Publisher};
pub(super) use self::rows::kept;
use self::session::{Manager, Pool, Session};
use self::state::State;
use self::tend::Bells;
use self::turn::{Topic, Turn, Turns};
use self::wall::Scope;
use super::operation::Start;
use super::repeats::Repeats;
use super::{
    Acquire, Acquired, Backlog, Cancel, Cancelled, Clock, ConnectionStatistics, DeadLetter, Decide,
    DecideById, Decided, DueDeliveries, EndpointState, EndpointTaken, Finish, Finished, Forget,
    Forgotten, List, MarkDeliveries, Marked, Page, Renew, Renewed, Resend, Resent, Resume, Resumed,
    Statistics, Store, StoreError, Submit, Submitted, Sweep, Swept, TakeEndpoint, Totals, Watch,
    Watchers, WriterStatistics,
};
use crate::protocol::{Action, Event, EventKind, TenantId};

/// The connections of a store, unless it is told otherwise.
const CONNECTIONS: usize = 16;

/// How long a request waits for a connection.
const WAIT: Duration = Duration::from_secs(5);

/// The requests that may wait for the database.
const QUEUE: u64 = 8192;

/// The room for unanswered requests, in KiB. Each takes its payload and comment, and [`OVERHEAD`].
const ROOM: usize = 64 * 1024;

/// The most that a request takes beside its payload and comment, in bytes. Its names are bounded.
const OVERHEAD: usize = 1024;

/// A store in a PostgreSQL database, which any number of servers share.
///
/// It needs PostgreSQL 14 or later, with the encoding UTF8. There is no leader: servers come and go,
/// and what one of them leaves behind, the others go on with. One clock judges what is over: that of
/// the database. A server's [clock](Clock) can only shift it, for tests.
///
/// An answer rests on a durable commit. If a commit is not known to be one, because the connection
/// was lost or because its wait for a synchronous standby was cut off, the store looks it up with
/// the action locked before it answers. Until a durable write has succeeded after that, it reads
/// nothing.
///
/// Any of the servers chains the events of each tenant by their hashes, about a second after they are
/// recorded; [`PostgresAuditTrail`] reads the chains.
///
/// The store remembers the ids of the newest 16,384 calls that changed nothing (duplicates), until
/// it is closed.
///
/// It must be used within the tokio runtime in which it was made. Dropping the last handle closes
/// it.
#[derive(Clone)]
pub struct PostgresStore {
    inner: Arc<Inner>,
}

struct Inner {
    pool: Pool,
    place: String,
    /// The row of this store in the table of heartbeats.
    server: Uuid,
    state: Arc<State>,
    room: Arc<Semaphore>,
    watchers: Watchers,
    repeats: Repeats<Key>,
    turns: Turns,
    /// `None` if each action has a transaction of its own.
    queue: Option<Arc<batch::Queue>>,
    publisher: Publisher,
    follower: Follower,
    /// Held by whoever writes for those who read. See [`standby`].
    covering: tokio::sync::Mutex<()>,
    partitions: partitions::Looked,
    bells: Arc<Bells>,
}

/// The settings of a [`PostgresStore`].
#[derive(Debug, Clone)]
pub struct PostgresBuilder {
    url: Url,
    direct: Option<Url>,
    clock: Clock,
    connections: usize,
    migrate: bool,
    batching: bool,
}

/// The URL of a database. Its password is not shown.
#[derive(Clone)]
struct Url(String);

impl fmt::Debug for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("…")
    }
}

impl PostgresBuilder {
    /// Sets the URL of the same database without a pooler before it, such as pgbouncer, which runs each
    /// transaction on another connection. Migrations use it, and the connection that listens for what
    /// other servers record.
    #[must_use]
    pub fn direct(mut self, url: impl Into<String>) -> Self {
        self.direct = Some(Url(url.into()));
        self
    }

    /// Takes another clock, which shifts that of the database, for a test.
    #[must_use]
    pub fn clock(mut self, clock: Clock) -> Self {
        self.clock = clock;
        self
    }

    /// Sets the most connections beside the one that listens: at least 2, and 16 by default.
    #[must_use]
    pub fn connections(mut self, connections: usize) -> Self {
        self.connections = connections.max(2);
        self
    }

    /// Sets whether the store may make or migrate the schema, which it may by default.
    #[must_use]
    pub fn migrate(mut self, migrate: bool) -> Self {
        self.migrate = migrate;
        self
    }

    /// Sets whether new actions share transactions, which they do by default.
    ///
    /// One statement then records actions of several tenants, and all of them wait for its slowest. An
    /// engine that keeps tenants on different machines commits it in two phases; there, a transaction
    /// for each action may be quicker.
    #[must_use]
    pub fn batching(mut self, batching: bool) -> Self {
        self.batching = batching;
        self
    }

    /// Checks the URLs, without a connection.
    ///
    /// # Errors
    ///
    /// If one of them is [wrong](StoreError::is_incompatible).
    pub fn check(&self) -> Result<(), StoreError> {
        Address::parse(&self.url.0)?;
        if let Some(direct) = &self.direct {
            Address::parse(&direct.0)?;
        }
        Ok(())
    }

    /// Makes or migrates the schema, makes the partitions of the months to come, drops those of past
    /// months that retention has emptied, and returns the server and the database. It is for operators whose servers may not ([`migrate`](Self::migrate)).
    ///
    /// # Errors
    ///
    /// As [`connect`](Self::connect).
    pub async fn migrate_schema(self) -> Result<String, StoreError> {
        let address = Address::parse(&self.direct.as_ref().unwrap_or(&self.url).0)?;
        let place = address.place();
        let state = Arc::new(State::new(self.clock));
        let migrating = async {
            let pool = connected(&address, &state, 1).await?;
            schema::check(&pool, &place).await?;
            schema::migrate(&pool, &place, true).await?;
            tend::make_partitions(&pool).await?;
            partitions::drop_empty(&pool).await
        };
        // It is large, and callers need not be.
        match Box::pin(migrating).await {
            Ok(()) => Ok(place),
            Err(fault) => Err(fault.into_error()),
        }
    }

    /// Connects to the database.
    ///
    /// # Errors
    ///
    /// - [Incompatible](StoreError::is_incompatible), if the URL is wrong, the server is too old, does
    ///   not let the user in or has no such database, the user lacks a right, or the schema is of a newer
    ///   release or may not be made.
    /// - [Unavailable](StoreError::is_unavailable), if the server cannot be reached.
    pub async fn connect(self) -> Result<PostgresStore, StoreError> {
        // It is large, and callers need not be.
        Box::pin(self.open()).await
    }

    async fn open(self) -> Result<PostgresStore, StoreError> {
        let address = Address::parse(&self.url.0)?;
        let direct = match &self.direct {
            Some(url) => Address::parse(&url.0)?,
            None => address.clone(),
        };
        let place = address.place();
        let state = Arc::new(State::new(self.clock));
        let pool = connected(&address, &state, self.connections).await?;
        let migrating = match self.direct {
            Some(_) => connected(&direct, &state, 1).await?,
            None => pool.clone(),
        };
        schema::check(&pool, &place)
            .await
            .map_err(Fault::into_error)?;
        rights::check(&pool, &place)
            .await
            .map_err(Fault::into_error)?;
        schema::migrate(&migrating, &place, self.migrate)
            .await
            .map_err(Fault::into_error)?;
        import::check(&pool, &place)
            .await
            .map_err(Fault::into_error)?;
        wall::look(&pool, &place).await.map_err(Fault::into_error)?;
        let inner = Arc::new(Inner {
            pool,
            place,
            server: Uuid::new_v4(),
            state,
            room: Arc::new(Semaphore::new(ROOM)),
            watchers: Watchers::new(),
            repeats: Repeats::default(),
            turns: Turns::default(),
            queue: self.batching.then(Arc::default),
            publisher: Publisher::default(),
            follower: Follower::default(),
            covering: tokio::sync::Mutex::default(),
            partitions: partitions::Looked::default(),
            bells: Arc::default(),
        });
        inner.check_cluster().await.map_err(Fault::into_error)?;
        if let Err(fault) = tend::make_partitions(&inner.pool).await {
            tracing::warn!(error = %fault.into_error(), "the partitions of the months to come cannot be made");
        }
        let session = Session::open(&inner.pool, Scope::Nobody)
            .await
            .map_err(Fault::into_error)?;
        inner.beat(session).await.map_err(Fault::into_error)?;
        let newest = inner.newest_position().await?;
        inner.follower.begin_behind(newest);
        inner.start_tasks(direct);
        Ok(PostgresStore { inner })
    }
}

/// Makes a pool, and its first connection.
async fn connected(
    address: &Address,
    state: &Arc<State>,
    connections: usize,
) -> Result<Pool, StoreError> {
    let manager = Manager {
        address: address.clone(),
        state: state.clone(),
    };
    let pool = Pool::builder(manager)
        .max_size(connections)
        // The few that are in use stay warm on both sides, and the others cost nothing.
        .queue_mode(QueueMode::Lifo)
        .runtime(Runtime::Tokio1)
        .wait_timeout(Some(WAIT))
        .create_timeout(Some(WAIT * 2))
        .build()
        .map_err(|error| {
            StoreError::unavailable("the connections cannot be pooled").with_source(error)
        })?;
    match pool.get().await {
        Ok(_) => {}
        Err(PoolError::Backend(error)) => {
            return Err(fault::of_connect(error, &address.place(), address.user()));
        }
        Err(error) => return Err(Fault::from(error).into_error()),
    }
    Ok(pool)
}

impl PostgresStore {
    /// Sets up a store in the database at a URL: `postgres://user@host:5432/database`.
    ///
    /// The parameters of libpq `sslmode`, `sslrootcert`, `sslcert`, `sslkey`, `channel_binding`,
    /// `connect_timeout`, `keepalives_idle`, `options`, `application_name` and `target_session_attrs` can
    /// follow. With `sslmode=require` and `verify-full` alike, the certificate must be valid for the host,
    /// and of an authority in the file `sslrootcert`, or else one that the system trusts; `prefer`, the
    /// default, takes any certificate, and goes on without TLS if the server offers none.
    /// Without a password in the URL, that in `PGPASSWORD` is taken.
    pub fn builder(url: impl Into<String>) -> PostgresBuilder {
        PostgresBuilder {
            url: Url(url.into()),
            direct: None,
            clock: Clock::new(),
            connections: CONNECTIONS,
            migrate: true,
            batching: true,
        }
    }

    /// Connects to the database at a URL, and makes or migrates its schema.
    ///
    /// # Errors
    ///
    /// As [`PostgresBuilder::connect`].
    pub async fn connect(url: impl Into<String>) -> Result<Self, StoreError> {
        Self::builder(url).connect().await
    }

    /// The server and the database, without user and password.
    pub fn place(&self) -> &str {
        &self.inner.place
    }

    /// Closes the store for all of its handles. Returns when every request sent before is answered.
    /// Later requests are refused as unavailable.
    pub async fn close(&self) {
        self.inner.state.set_closing();
        self.inner.bells.close();
        while self.inner.state.running.load(Ordering::SeqCst) > 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        Box::pin(self.inner.chain_the_rest()).await;
        self.inner.pool.close();
    }

    /// Runs an operation that changes what is on record. Once it is its turn, it goes on if this
    /// future is dropped.
    async fn transact<O: Located>(&self, operation: O) -> Result<O::Outcome, StoreError> {
        let (running, turn) = self.begin(&operation).await?;
        let inner = self.inner.clone();
        Self::spawn(Box::pin(async move {
            let _kept = (running, turn);
            inner.transact(&operation, Vec::new()).await
        }))
        .await
    }

    /// Runs an operation that may record a new action.
    async fn record<O: Located>(&self, operation: O) -> Result<O::Outcome, StoreError> {
        let (running, turn) = self.begin(&operation).await?;
        let inner = self.inner.clone();
        Self::spawn(Box::pin(async move {
            let _running = running;
            match turn {
                // Whoever was before it has recorded the action.
                Some(turn) if turn.has_waited => inner.transact(&operation, Vec::new()).await,
                _ => inner.record(&operation).await,
            }
        }))
        .await
    }

    /// Waits until an operation may run.
    async fn begin<O: Located>(
        &self,
        operation: &O,
    ) -> Result<(Running, Option<Turn>), StoreError> {
        let running = Running::begin(&self.inner, operation.size())?;
        let turn = match Topic::of(operation.subject()) {
            Some(topic) => Some(self.inner.turns.take(topic).await?),
            None => None,
        };
        Ok((running, turn))
    }

    async fn spawn<T, F>(run: F) -> Result<T, StoreError>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, StoreError>> + Send + 'static,
    {
        tokio::spawn(run).await.unwrap_or_else(|error| {
            Err(StoreError::unavailable("the request was not finished").with_source(error))
        })
    }
}

/// A request that is not answered yet.
struct Running {
    state: Arc<State>,
    _room: OwnedSemaphorePermit,
}

impl Running {
    fn begin(store: &Inner, size: usize) -> Result<Self, StoreError> {
        if store.state.is_closing() {
            return Err(StoreError::unavailable("the store is closed"));
        }
        // A request larger than all of the room is let in alone.
        let room = (size + OVERHEAD).div_ceil(1024).min(ROOM) as u32;
        let room = store.room.clone().try_acquire_many_owned(room);
        let room = room.map_err(|_| {
            StoreError::unavailable(format!(
                "{} MiB of requests are waiting for the store already",
                ROOM / 1024
            ))
        })?;
        let waiting = store.state.running.fetch_add(1, Ordering::SeqCst);
        let running = Self {
            state: store.state.clone(),
            _room: room,
        };
        if waiting >= QUEUE {
            return Err(StoreError::unavailable(format!(
                "{QUEUE} requests are waiting for the store already"
            )));
        }
        Ok(running)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.state.running.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Inner {
    /// Counts events that are on record, and wakes whoever waits for them.
    fn recorded(&self, events: &[Happened]) {
        self.count(events.iter().map(|event| event.kind));
        if !events.is_empty() {
            self.state.set_recorded();
        }
        self.wake(events);
    }

    fn count(&self, kinds: impl IntoIterator<Item = EventKind>) {
        self.state.requests.fetch_add(1, Ordering::Relaxed);
        for kind in kinds {
            self.state.events.add(kind);
        }
    }

    fn wake(&self, events: &[Happened]) {
        for event in events {
            self.watchers.wake(event.key.1, &event.key.0);
        }
        if !events.is_empty() {
            self.bells.recorded.notify_one();
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.bells.close();
        if let Some(queue) = &self.queue {
            queue.stop();
        }
    }
}

// The futures of a statement with many parameters are large, so callers get them boxed.
impl Store for PostgresStore {
    async fn decide(&self, request: Decide) -> Result<Decided, StoreError> {
        self.record(request).await
    }

    async fn submit(&self, request: Submit) -> Result<Submitted, StoreError> {
        self.record(request).await
    }

    async fn decide_by_id(&self, request: DecideById) -> Result<Decided, StoreError> {
        self.transact(request).await
    }

    async fn cancel(&self, request: Cancel) -> Result<Cancelled, StoreError> {
        self.transact(request).await
    }

    async fn acquire(&self, request: Acquire) -> Result<Acquired, StoreError> {
        self.transact(request).await
    }

    async fn renew(&self, request: Renew) -> Result<Renewed, StoreError> {
        self.transact(request).await
    }

    async fn finish(&self, request: Finish) -> Result<Finished, StoreError> {
        self.transact(request).await
    }

    async fn sweep(&self, request: Sweep) -> Result<Swept, StoreError> {
        let running = Running::begin(&self.inner, 0)?;
        let inner = self.inner.clone();
        Self::spawn(Box::pin(async move {
            let _running = running;
            inner.sweep(&request).await
        }))
        .await
    }

    async fn list(&self, request: List) -> Result<Page, StoreError> {
        Box::pin(self.inner.page(&request)).await
    }

    async fn tenants(
        &self,
        after: Option<&TenantId>,
        limit: usize,
    ) -> Result<Vec<TenantId>, StoreError> {
        Box::pin(self.inner.tenants_after(after, limit)).await
    }

    async fn look_up(&self, id: Uuid, tenant: &TenantId) -> Result<Option<Action>, StoreError> {
        Box::pin(self.inner.with_history(id, tenant)).await
    }

    async fn events(
        &self,
        tenant: &TenantId,
        after: u64,
        limit: usize,
    ) -> Result<Vec<(u64, Event)>, StoreError> {
        Box::pin(self.inner.events_after(Some(tenant), after, limit)).await
    }

    async fn all_events(&self, after: u64, limit: usize) -> Result<Vec<(u64, Event)>, StoreError> {
        Box::pin(self.inner.events_after(None, after, limit)).await
    }

    async fn take_endpoint(&self, request: TakeEndpoint) -> Result<EndpointTaken, StoreError> {
        if request.start == Start::Now {
            // A new endpoint begins behind everything that was recorded before.
            Box::pin(self.inner.publish()).await?;
        }
        self.transact(request).await
    }

    async fn due_deliveries(
        &self,
        endpoint: &str,
        limit: usize,
        longest_wait: Duration,
    ) -> Result<DueDeliveries, StoreError> {
        Box::pin(self.inner.due(endpoint, limit, longest_wait)).await
    }

    async fn mark_deliveries(&self, request: MarkDeliveries) -> Result<Marked, StoreError> {
        self.transact(request).await
    }

    async fn resend(&self, request: Resend) -> Result<Resent, StoreError> {
        self.transact(request).await
    }

    async fn resume(&self, request: Resume) -> Result<Resumed, StoreError> {
        self.transact(request).await
    }

    async fn forget_endpoint(&self, request: Forget) -> Result<Forgotten, StoreError> {
        self.transact(request).await
    }

    async fn endpoints(&self) -> Result<Vec<EndpointState>, StoreError> {
        Box::pin(self.inner.all_endpoints()).await
    }

    async fn dead_letters(
        &self,
        endpoint: &str,
        limit: usize,
    ) -> Result<Vec<DeadLetter>, StoreError> {
        Box::pin(self.inner.letters(endpoint, limit)).await
    }

    async fn newest_event(&self) -> Result<u64, StoreError> {
        Box::pin(self.inner.publish()).await?;
        Box::pin(self.inner.newest_position()).await
    }

    async fn find(
        &self,
        id: Uuid,
        tenant: Option<&TenantId>,
    ) -> Result<Option<Action>, StoreError> {
        Box::pin(self.inner.find(id, tenant)).await
    }

    fn watch(&self, id: Uuid) -> Watch {
        self.inner.watchers.watch(id)
    }

    fn watch_tenant(&self, tenant: &TenantId) -> Watch {
        self.inner.watchers.watch_tenant(tenant)
    }

    fn watch_all(&self) -> Watch {
        self.inner.watchers.watch_all()
    }

    async fn check(&self) -> Result<(), StoreError> {
        if self.inner.state.is_closing() {
            return Err(StoreError::unavailable("the store is closed"));
        }
        if let Some(obstacle) = self.inner.state.obstacle() {
            return Err(obstacle);
        }
        if self.inner.state.was_just_written() {
            return Ok(());
        }
        let beating = Box::pin(async {
            let mut attempts = 0;
            loop {
                let beaten = match Session::open(&self.inner.pool, Scope::Nobody).await {
                    Ok(session) => self.inner.beat(session).await,
                    Err(fault) => Err(fault),
                };
                match beaten {
                    Ok(()) => return Ok(()),
                    // One connection may have been lost long ago.
                    Err(fault) if attempts == 2 => return Err(fault.into_error()),
                    Err(_) => attempts += 1,
                }
            }
        });
        let beaten = tokio::time::timeout(WAIT, beating).await;
        beaten.unwrap_or_else(|_| {
            Err(StoreError::unavailable(
                "the database did not answer in time",
            ))
        })
    }

    async fn backlog(&self) -> Result<Backlog, StoreError> {
        Box::pin(self.inner.waits()).await
    }

    fn statistics(&self) -> Statistics {
        let state = &self.inner.state;
        let pool = self.inner.pool.status();
        Statistics {
            connections: Some(ConnectionStatistics {
                limit: pool.max_size as u64,
                idle: pool.available as u64,
                busy: pool.size.saturating_sub(pool.available) as u64,
                waiting: pool.waiting as u64,
            }),
            removed: state.removed.load(Ordering::Relaxed),
            events: state.events.read(),
            writer: Some(WriterStatistics {
                is_ready: state.is_sure() && state.obstacle().is_none(),
                queued: state.running.load(Ordering::Relaxed),
                requests: state.requests.load(Ordering::Relaxed),
                commits: state.commits.read(),
            }),
        }
    }

    async fn totals(&self) -> Result<Totals, StoreError> {
        Box::pin(self.inner.count_rows()).await
    }
}

impl fmt::Debug for PostgresStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PostgresStore")
            .field("place", &self.inner.place)
            .finish_non_exhaustive()
    }
}
