//! An embedded database that is moved into this one, as the database sees it.
//!
//! Rows come in steps. Each step is one transaction, which also writes how far the move has come, so
//! that a move that was cut off goes on behind the last step that is durable. Until all rows are here
//! and compared, servers of this database record nothing, and none starts.

use std::pin::Pin;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::StreamExt as _;
use tokio_postgres::types::Type;
use tokio_postgres::{CopyOutStream, Row};
use uuid::Uuid;

use super::address::Address;
use super::fault::Fault;
use super::rows::{self, get};
use super::schema;
use super::session::{Pool, Session};
use super::state::State;
use super::wall::Scope;
use super::{PostgresBuilder, connected};
use crate::store::StoreError;
use crate::store::migrate::table::Table;

/// The connections of a move: one that writes or reads, and one to spare.
const CONNECTIONS: usize = 2;

/// The tables that servers change.
const GUARDED: [&str; 14] = [
    "action",
    "claim",
    "event",
    "feed",
    "endpoint",
    "undelivered",
    "tombstone",
    "swept",
    "postponed",
    "chain",
    // These have one row, or one of each server.
    "publisher",
    "sweep",
    "chainer",
    "heartbeat",
];

/// How many of them a move fills.
const FILLED: usize = 10;

/// Follows the beginning of a transaction of a move: it may take long, it writes text in one form,
/// and passes the guards.
const SETTINGS: &str = "SET LOCAL statement_timeout = 0; SET LOCAL lock_timeout = '60s'; \
     SET LOCAL idle_in_transaction_session_timeout = '5min'; SET LOCAL timezone = 'UTC'; \
     SET LOCAL datestyle = 'ISO'; SET LOCAL bytea_output = 'hex'; SET LOCAL aegis.import = 'on'";

/// Raises an error in every statement that is not of a move. Its class tells servers that trying
/// again does not help.
const GUARD: &str = "CREATE OR REPLACE FUNCTION aegis_import_guard() RETURNS trigger LANGUAGE plpgsql AS $do$ BEGIN \
       IF current_setting('aegis.import', true) IS DISTINCT FROM 'on' THEN \
         RAISE EXCEPTION 'a database is being moved here' USING ERRCODE = 'insufficient_privilege'; \
       END IF; \
       RETURN NULL; \
     END $do$";

/// The row of a move.
#[derive(Debug, Clone)]
pub(in crate::store) struct Import {
    pub(in crate::store) id: Uuid,
    /// The path of the embedded database.
    pub(in crate::store) source: String,
    /// The number of the table that is being filled.
    pub(in crate::store) stage: usize,
    /// How many of its rows are here.
    pub(in crate::store) copied: u64,
    pub(in crate::store) is_finished: bool,
}

/// Refuses a database that is not complete.
pub(super) async fn check(pool: &Pool, place: &str) -> Result<(), Fault> {
    let mut session = Session::open(pool, Scope::Nobody).await?;
    let found = session.query(SELECT, &[]).await?;
    session.release();
    match found.first().map(parse).transpose()? {
        Some(import) if !import.is_finished => {
            Err(Fault::Refused(StoreError::incompatible(format!(
                "the database {} is being moved to PostgreSQL at {place}, which is not complete; go on with the same \
                 'aegis migrate --from … --to …'",
                import.source
            ))))
        }
        _ => Ok(()),
    }
}

const SELECT: &str = "SELECT move, source, stage, copied, finished_at IS NOT NULL AS is_finished FROM import WHERE id = 1";

fn parse(row: &Row) -> Result<Import, StoreError> {
    Ok(Import {
        id: get(row, "move")?,
        source: get(row, "source")?,
        stage: get::<i32>(row, "stage")?.unsigned_abs() as usize,
        copied: rows::count(row, "copied")?,
        is_finished: get(row, "is_finished")?,
    })
}

/// The database that is moved into.
#[derive(Debug)]
pub(in crate::store) struct Target {
    pool: Pool,
    place: String,
}

impl Target {
    /// Connects, and brings the schema up to date.
    pub(in crate::store) async fn connect(settings: PostgresBuilder) -> Result<Self, StoreError> {
        let url = settings.direct.as_ref().unwrap_or(&settings.url);
        let address = Address::parse(&url.0)?;
        let place = address.place();
        let state = Arc::new(State::new(settings.clock));
        let pool = connected(&address, &state, CONNECTIONS).await?;
        schema::check(&pool, &place)
            .await
            .map_err(Fault::into_error)?;
        schema::migrate(&pool, &place, true)
            .await
            .map_err(Fault::into_error)?;
        Ok(Self { pool, place })
    }

    /// The server and the database, without user and password.
    pub(in crate::store) fn place(&self) -> &str {
        &self.place
    }

    /// Begins a transaction of the move.
    async fn begin(&self) -> Result<Session, Fault> {
        let session = Session::open(&self.pool, Scope::All).await?;
        session.begin().await?;
        session.run(SETTINGS).await?;
        Ok(session)
    }

    /// Reads the row of a move, and locks it until the transaction ends. This waits for what a
    /// process that was killed has sent last.
    pub(in crate::store) async fn lock(&self) -> Result<Locked, StoreError> {
        let locking = async {
            let session = self.begin().await?;
            let import = locked(&session).await?;
            Ok(Locked { session, import })
        };
        locking.await.map_err(|fault| self.explain(fault))
    }

    /// Refuses a database that has anything on record.
    pub(in crate::store) async fn check_empty(&self) -> Result<(), StoreError> {
        let checking = async {
            let session = self.begin().await?;
            self.must_be_empty(&session).await?;
            session.roll_back().await;
            Ok(())
        };
        checking.await.map_err(|fault| self.explain(fault))
    }

    async fn must_be_empty(&self, session: &Session) -> Result<(), Fault> {
        const EMPTY: &str = "SELECT EXISTS (SELECT FROM action) OR EXISTS (SELECT FROM event) \
             OR (SELECT position > 0 FROM publisher) AS has_actions, EXISTS (SELECT FROM endpoint) AS has_endpoints";
        let found = session.query(EMPTY, &[]).await?;
        let row = found
            .first()
            .ok_or_else(|| Fault::again("the database has no answer"))?;
        let has = if get(row, "has_actions")? {
            "actions"
        } else if get(row, "has_endpoints")? {
            "webhook endpoints"
        } else {
            return Ok(());
        };
        Err(Fault::Refused(StoreError::incompatible(format!(
            "the database at {} has {has} on record already; allowed is an empty database",
            self.place
        ))))
    }

    /// Begins a move: from now on no server records anything here.
    pub(in crate::store) async fn begin_import(
        &self,
        id: Uuid,
        source: &str,
        months: &[String],
    ) -> Result<(), StoreError> {
        let beginning = async {
            let session = self.begin().await?;
            // Whoever records just now ends first, and whoever comes then meets the guards.
            let tables = GUARDED.join(", ");
            session
                .run(&format!("LOCK TABLE {tables} IN SHARE ROW EXCLUSIVE MODE"))
                .await?;
            self.must_be_empty(&session).await?;
            session.run(GUARD).await?;
            for table in GUARDED {
                session
                    .run(&format!(
                        "CREATE TRIGGER aegis_import BEFORE INSERT OR UPDATE OR DELETE ON {table} \
                         FOR EACH STATEMENT EXECUTE FUNCTION aegis_import_guard()"
                    ))
                    .await?;
            }
            for month in months {
                session.run(&partition(month)).await?;
            }
            session
                .execute(
                    "INSERT INTO import (id, move, source) VALUES (1, $1, $2)",
                    &[(&id, Type::UUID), (&source, Type::TEXT)],
                )
                .await?;
            session.finish().await
        };
        beginning.await.map_err(|fault| self.explain(fault))
    }

    /// Writes rows behind those that are here, in one transaction.
    pub(in crate::store) async fn append(
        &self,
        at: &Import,
        table: &Table,
        lines: Vec<u8>,
        count: u64,
    ) -> Result<(), StoreError> {
        let appending = async {
            let session = self.begin().await?;
            self.must_be_at(&session, at).await?;
            let copy = format!("COPY {} ({}) FROM STDIN", table.name, table.names());
            session.copy_in(&copy, Bytes::from(lines)).await?;
            let copied = rows::number(at.copied + count);
            session
                .execute("UPDATE import SET copied = $1", &[(&copied, Type::INT8)])
                .await?;
            session.finish().await
        };
        appending.await.map_err(|fault| self.explain(fault))
    }

    /// Goes on with the next table.
    pub(in crate::store) async fn begin_next(&self, at: &Import) -> Result<(), StoreError> {
        let going_on = async {
            let session = self.begin().await?;
            self.must_be_at(&session, at).await?;
            session
                .run("UPDATE import SET stage = stage + 1, copied = 0")
                .await?;
            session.finish().await
        };
        going_on.await.map_err(|fault| self.explain(fault))
    }

    /// No other process may move anything here.
    async fn must_be_at(&self, session: &Session, at: &Import) -> Result<(), Fault> {
        let found = locked(session).await?;
        let is_here = found.is_some_and(|found| {
            (found.id, found.stage, found.copied) == (at.id, at.stage, at.copied)
                && !found.is_finished
        });
        if is_here {
            return Ok(());
        }
        Err(Fault::Refused(StoreError::unavailable(format!(
            "another process has moved rows into the database at {} just now",
            self.place
        ))))
    }

    /// Reads the rows of a table in the order of its key.
    pub(in crate::store) async fn lines(&self, table: &Table) -> Result<Lines, StoreError> {
        let reading = async {
            let session = self.begin().await?;
            let copy = format!(
                "COPY (SELECT {} FROM {} ORDER BY {}) TO STDOUT",
                table.names(),
                table.name,
                table.order()
            );
            let stream = session.copy_out(&copy).await?;
            Ok(Lines {
                stream: Box::pin(stream),
                rest: Bytes::new(),
                _session: session,
            })
        };
        reading.await.map_err(|fault| self.explain(fault))
    }

    /// Ends the move: from now on servers may serve from here. Sweeps have come to the position
    /// `swept`.
    pub(in crate::store) async fn finish(&self, at: &Import, swept: u64) -> Result<(), StoreError> {
        let finishing = async {
            let session = self.begin().await?;
            self.must_be_at(&session, at).await?;
            session
                .run(&format!(
                    "ANALYZE {}; \
                     UPDATE publisher SET position = (SELECT coalesce(max(position), 0) FROM feed); \
                     UPDATE chainer SET position = (SELECT coalesce(max(position), 0) FROM chain); \
                     UPDATE sweep SET position = {swept}, tombstones = (SELECT count(*) FROM tombstone); {}; \
                     UPDATE import SET finished_at = clock_timestamp()",
                    GUARDED.join(", "),
                    unguard()
                ))
                .await?;
            session.finish().await
        };
        finishing.await.map_err(|fault| self.explain(fault))
    }

    fn explain(&self, fault: Fault) -> StoreError {
        schema::explain(fault, &self.place).into_error()
    }
}

/// The row of a move, locked.
pub(in crate::store) struct Locked {
    session: Session,
    pub(in crate::store) import: Option<Import>,
}

impl Locked {
    /// Leaves everything as it is.
    pub(in crate::store) async fn release(self) {
        self.session.roll_back().await;
    }

    /// Removes the move, and all rows that it brought.
    pub(in crate::store) async fn remove(self) -> Result<(), StoreError> {
        let removing = async {
            let filled: Vec<_> = GUARDED.into_iter().take(FILLED).collect();
            self.session
                .run(&format!(
                    "{}; TRUNCATE {}; DELETE FROM import",
                    unguard(),
                    filled.join(", ")
                ))
                .await?;
            self.session.finish().await
        };
        removing.await.map_err(Fault::into_error)
    }
}

async fn locked(session: &Session) -> Result<Option<Import>, Fault> {
    let found = session.query(&format!("{SELECT} FOR UPDATE"), &[]).await?;
    Ok(found.first().map(parse).transpose()?)
}

/// The statements that let servers record again.
fn unguard() -> String {
    let mut sql = String::new();
    for table in GUARDED {
        sql.push_str(&format!("DROP TRIGGER aegis_import ON {table}; "));
    }
    sql.push_str("DROP FUNCTION aegis_import_guard()");
    sql
}

/// Makes the partition of a month, such as `2026-11`. Rows that have one do not stand in the way of
/// the partitions of the months to come.
fn partition(month: &str) -> String {
    format!(
        "DO $do$ DECLARE month timestamptz := '{month}-01 00:00:00+00'; name text; BEGIN \
           name := 'event_' || to_char(month AT TIME ZONE 'UTC', 'YYYY_MM'); \
           IF to_regclass(name) IS NULL THEN \
             EXECUTE format('CREATE TABLE %I PARTITION OF event FOR VALUES FROM (%L) TO (%L)', \
               name, month, (month AT TIME ZONE 'UTC' + interval '1 month') AT TIME ZONE 'UTC'); \
           END IF; \
         END $do$"
    )
}

/// Rows of a table as lines.
pub(in crate::store) struct Lines {
    stream: Pin<Box<CopyOutStream>>,
    rest: Bytes,
    _session: Session,
}

impl Lines {
    /// Reads the next line.
    pub(in crate::store) async fn next(&mut self) -> Result<Option<Bytes>, StoreError> {
        loop {
            if let Some(end) = self.rest.iter().position(|byte| *byte == b'\n') {
                return Ok(Some(self.rest.split_to(end + 1)));
            }
            let Some(read) = self.stream.next().await else {
                return Ok(None);
            };
            let read = read.map_err(|error| Fault::from(error).into_error())?;
            self.rest = match self.rest.is_empty() {
                true => read,
                false => [&self.rest[..], &read].concat().into(),
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::migrate::table::TABLES;

    #[test]
    fn each_table_that_a_move_fills_is_guarded_and_emptied_when_it_is_given_up() {
        let mut filled: Vec<_> = TABLES.iter().map(|table| table.name).collect();
        let mut emptied = GUARDED[..FILLED].to_vec();
        filled.sort_unstable();
        emptied.sort_unstable();
        assert_eq!(filled, emptied);
    }
}
