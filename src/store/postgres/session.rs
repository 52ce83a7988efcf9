//! Connections, and the transactions on them.
//!
//! Nothing that a session keeps is used: no named statements, no types of the schema, settings for
//! one transaction alone. So a pooler may give each transaction another connection.

use std::borrow::Cow;
use std::future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use deadpool::managed::{self, Metrics, Object, RecycleError, RecycleResult};
use futures_util::SinkExt as _;
use tokio_postgres::error::{Severity, SqlState};
use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{AsyncMessage, Client, CopyOutStream, Error, Row};

use super::address::Address;
use super::fault::Fault;
use super::state::State;
use super::wall::Scope;

pub(super) type Pool = managed::Pool<Manager>;

/// The parameters of a statement, each with its type, so that the server need not be asked for it.
pub(super) type Values<'a> = [(&'a (dyn ToSql + Sync), Type)];

/// Begins a transaction. Each setting ends with it.
///
/// A wait for a lock, for the disk or for a standby ends here and not in the caller's patience, and
/// a server that hangs in a transaction does not hold its locks. A commit is durable and warns of what
/// it is not, whatever the defaults are. These can change at any time, and behind a pooler whoever had
/// the connection before may have left others: so each transaction says it for itself.
macro_rules! begin {
    () => {
        "BEGIN ISOLATION LEVEL READ COMMITTED; \
         SET LOCAL lock_timeout = '3s'; SET LOCAL statement_timeout = '5s'; \
         SET LOCAL idle_in_transaction_session_timeout = '10s'; SET LOCAL client_min_messages = warning; \
         SELECT set_config('synchronous_commit', 'on', true) WHERE current_setting('synchronous_commit') = 'off'"
    };
}

const BEGIN: &str = begin!();

/// Begins a transaction of many actions. All of them wait for what one of them waits for, so it is
/// given up before their callers give up, and each of them has a transaction of its own then.
const BEGIN_BATCH: &str = concat!(begin!(), "; SET LOCAL lock_timeout = '500ms'");

/// Follows [`BEGIN`] where no table must be read as a whole, however few rows there are. That makes the
/// rest look expensive, which would be compiled each time.
pub(super) const PLAIN: &str = "SET LOCAL enable_seqscan = off; SET LOCAL jit = off";

/// Begins a transaction of one statement that reads. It locks nothing that others wait for.
const BEGIN_ONE: &str = "BEGIN ISOLATION LEVEL READ COMMITTED READ ONLY";

/// Begins a transaction that reads one state of the database, however long that takes. Each read has
/// an index.
const BEGIN_READ: &str = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; \
     SET LOCAL statement_timeout = 0; SET LOCAL idle_in_transaction_session_timeout = '60s'; \
     SET LOCAL enable_seqscan = off; SET LOCAL jit = off";

#[derive(Debug)]
pub(super) struct Manager {
    pub(super) address: Address,
    pub(super) state: Arc<State>,
}

/// A connection with the number of warnings that came over it.
#[derive(Debug)]
pub(super) struct Connection {
    client: Client,
    warnings: Arc<AtomicU64>,
}

impl managed::Manager for Manager {
    type Type = Connection;
    type Error = Error;

    async fn create(&self) -> Result<Connection, Error> {
        let connection = connect(&self.address).await?;
        // What it leads to may be another server than before.
        self.state.set_unsure();
        Ok(connection)
    }

    async fn recycle(&self, connection: &mut Connection, _: &Metrics) -> RecycleResult<Error> {
        if connection.client.is_closed() {
            return Err(RecycleError::message("closed"));
        }
        Ok(())
    }
}

/// Makes a connection, and drives it on a task of its own for as long as it is in use.
pub(super) async fn connect(address: &Address) -> Result<Connection, Error> {
    let (client, mut connection) = address.config.connect(address.tls.clone()).await?;
    let warnings = Arc::new(AtomicU64::new(0));
    let counter = warnings.clone();
    tokio::spawn(async move {
        loop {
            match future::poll_fn(|context| connection.poll_message(context)).await {
                // It arrives before the answer that it belongs to.
                Some(Ok(AsyncMessage::Notice(notice))) => {
                    if notice.parsed_severity() == Some(Severity::Warning) {
                        counter.fetch_add(1, Ordering::SeqCst);
                        // Whether a transaction is open when it is given up is not known.
                        if *notice.code() != SqlState::NO_ACTIVE_SQL_TRANSACTION {
                            tracing::warn!(
                                code = notice.code().code(),
                                "the database warns: {}",
                                notice.message()
                            );
                        }
                    }
                }
                Some(Ok(_)) => {}
                Some(Err(error)) => {
                    tracing::debug!(%error, "a connection to the database is lost");
                    break;
                }
                None => break,
            }
        }
    });
    Ok(Connection { client, warnings })
}

/// A connection in use. Unless it is [released](Self::release), it is closed after this, so that no
/// transaction is left open on a connection that others use. Its place in the pool is not free before
/// the database has ended what was sent to it.
pub(super) struct Session {
    connection: Option<Object<Manager>>,
    state: Arc<State>,
    /// Whether its transactions say which tenants they are about.
    is_walled: bool,
    /// How they say it.
    scope: Option<Cow<'static, str>>,
    warnings: u64,
    /// Whether a commit was sent.
    is_committing: AtomicBool,
}

impl Session {
    /// Takes a connection for work on the records of some tenants.
    ///
    /// Their tables are for [transactions](Self::begin) and [reads](Self::read) alone. What is run
    /// outside of these has no scope, and fails on them where the wall stands.
    pub(super) async fn open(pool: &Pool, scope: Scope<'_>) -> Result<Self, Fault> {
        let connection = pool.get().await?;
        let warnings = connection.warnings.load(Ordering::SeqCst);
        let state = pool.manager().state.clone();
        let is_walled = state.is_walled();
        Ok(Self {
            connection: Some(connection),
            state,
            is_walled,
            scope: is_walled.then(|| scope.statement()).flatten(),
            warnings,
            is_committing: AtomicBool::new(false),
        })
    }

    fn client(&self) -> Result<&Client, Fault> {
        let connection = self.connection.as_ref();
        let connection = connection.ok_or_else(|| Fault::again("the connection is gone"))?;
        Ok(&connection.client)
    }

    /// Begins a transaction. The statements that follow may be sent before it is answered.
    pub(super) async fn begin(&self) -> Result<(), Fault> {
        self.run(&self.scoped(BEGIN)).await
    }

    /// The same for many actions at once.
    pub(super) async fn begin_batch(&self) -> Result<(), Fault> {
        self.run(&self.scoped(BEGIN_BATCH)).await
    }

    /// The same for many reads of one state. It ends with a [rollback](Self::roll_back).
    pub(super) async fn begin_read(&self) -> Result<(), Fault> {
        self.run(&self.scoped(BEGIN_READ)).await
    }

    fn scoped<'a>(&self, begin: &'a str) -> Cow<'a, str> {
        match &self.scope {
            Some(scope) => format!("{begin}; {scope}").into(),
            None => begin.into(),
        }
    }

    /// Runs one statement that reads, in a transaction of its own if it is about tenants. It takes
    /// one round trip either way.
    pub(super) async fn read(&self, sql: &str, values: &Values<'_>) -> Result<Vec<Row>, Fault> {
        if self.scope.is_none() {
            return self.query(sql, values).await;
        }
        let begin = self.scoped(BEGIN_ONE);
        let (begun, found, ended) = tokio::join!(
            biased;
            self.run(&begin),
            self.query(sql, values),
            self.run("COMMIT"),
        );
        begun?;
        let found = found?;
        ended?;
        Ok(found)
    }

    pub(super) async fn query(&self, sql: &str, values: &Values<'_>) -> Result<Vec<Row>, Fault> {
        let found = self.client()?.query_typed(sql, values).await;
        found.map_err(|error| self.fault(error))
    }

    pub(super) async fn execute(&self, sql: &str, values: &Values<'_>) -> Result<u64, Fault> {
        let done = self.client()?.execute_typed(sql, values).await;
        done.map_err(|error| self.fault(error))
    }

    /// Runs statements without parameters.
    pub(super) async fn run(&self, sql: &str) -> Result<(), Fault> {
        let done = self.client()?.batch_execute(sql).await;
        done.map_err(|error| self.fault(error))
    }

    /// What went wrong with a statement. If it is that the wall was put up, the next attempt says which
    /// tenants it is about.
    fn fault(&self, error: Error) -> Fault {
        // The setting is not there, or it is empty, which is no array.
        let is_of_wall = error.code().is_some_and(|code| {
            *code == SqlState::UNDEFINED_OBJECT || *code == SqlState::INVALID_TEXT_REPRESENTATION
        });
        if is_of_wall && !self.is_walled {
            self.state.set_walled(true);
            return Fault::lost(error);
        }
        error.into()
    }

    /// Writes rows in the text format of `COPY`.
    pub(super) async fn copy_in(&self, sql: &str, rows: Bytes) -> Result<(), Fault> {
        let sink = self.client()?.copy_in(sql).await?;
        let mut sink = std::pin::pin!(sink);
        sink.send(rows).await?;
        sink.finish().await?;
        Ok(())
    }

    /// Reads rows in the text format of `COPY`.
    pub(super) async fn copy_out(&self, sql: &str) -> Result<CopyOutStream, Fault> {
        Ok(self.client()?.copy_out(sql).await?)
    }

    /// Sends the commit. [`is_sure`](Self::is_sure) tells whether it means what it says.
    pub(super) async fn commit(&self) -> Result<(), Fault> {
        let client = self.client()?;
        self.is_committing.store(true, Ordering::SeqCst);
        let committed = client.batch_execute("COMMIT").await;
        committed.map_err(Fault::of_commit)
    }

    /// Whether no warning came with the transaction. A commit whose wait for a standby was cancelled
    /// succeeds with a warning, and a failover may still lose it.
    pub(super) fn is_sure(&self) -> bool {
        let warnings = self
            .connection
            .as_ref()
            .map(|connection| &connection.warnings);
        warnings.is_some_and(|warnings| warnings.load(Ordering::SeqCst) == self.warnings)
    }

    /// Commits, and says so only if it is sure.
    pub(super) async fn finish(mut self) -> Result<(), Fault> {
        self.commit().await?;
        let is_sure = self.is_sure();
        self.release();
        if is_sure {
            Ok(())
        } else {
            Err(Fault::unknown("the database committed with a warning"))
        }
    }

    /// Ends a transaction that records nothing.
    pub(super) async fn roll_back(mut self) {
        if self.run("ROLLBACK").await.is_ok() {
            self.release();
        }
    }

    /// Gives the connection to others. No transaction may be open on it.
    pub(super) fn release(&mut self) {
        drop(self.connection.take());
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let Some(connection) = self.connection.take() else {
            return;
        };
        let given_up = GivenUp(Some(connection));
        // Without a runtime nothing can be sent any more.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(given_up.end(self.is_committing.load(Ordering::SeqCst)));
        }
    }
}

/// How long the database is given to end what was given up before it is told to: a rollback takes
/// next to nothing, and a commit that waits for a standby may yet be replicated.
const ROLLBACK_PATIENCE: Duration = Duration::from_millis(50);
const COMMIT_PATIENCE: Duration = Duration::from_secs(2);

/// How long it takes at most to tell it, and then to end. A database that does not answer at all is
/// not waited for longer.
const CANCEL_PATIENCE: Duration = Duration::from_secs(2);

/// A connection that nobody waits for, on which something may still run. It is closed with this.
///
/// PostgreSQL does not look whether a client is still there while it waits for a lock or for a
/// standby. Were the connection closed at once, its place in the pool would be free, and the next
/// request would make another: one for each that is given up, until the database takes no more.
struct GivenUp(Option<Object<Manager>>);

impl GivenUp {
    async fn end(self, is_committing: bool) {
        let Some(connection) = &self.0 else {
            return;
        };
        // It is answered behind all that was sent before.
        let ended = connection.client.batch_execute("ROLLBACK");
        let mut ended = std::pin::pin!(ended);
        let patience = match is_committing {
            true => COMMIT_PATIENCE,
            false => ROLLBACK_PATIENCE,
        };
        if tokio::time::timeout(patience, &mut ended).await.is_ok() {
            return;
        }
        // What waited for a standby is then committed without it, as with any cut-off wait. It has
        // waited for longer than `standby::COVERS`, so nobody shows it before a standby has it.
        let tls = Object::pool(connection).map(|pool| pool.manager().address.tls.clone());
        if let Some(tls) = tls {
            let cancel = connection.client.cancel_token();
            let _ = tokio::time::timeout(CANCEL_PATIENCE, cancel.cancel_query(tls)).await;
        }
        let _ = tokio::time::timeout(CANCEL_PATIENCE, ended).await;
    }
}

impl Drop for GivenUp {
    fn drop(&mut self) {
        if let Some(connection) = self.0.take() {
            drop(Object::take(connection));
        }
    }
}
