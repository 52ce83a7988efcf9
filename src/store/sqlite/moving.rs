//! A database that is moved into another one, held for as long as that takes.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use rusqlite::Connection;
use tokio::sync::mpsc::{self, Receiver, Sender};

use super::fault::Fault;
use super::lock::{self, Location, Lock};
pub(in crate::store) use super::moved::{Mark, Stage};
use super::repeats::Repeats;
use super::{StoreError, connection, moved, sweep, verify};
use crate::store::migrate::line;
use crate::store::migrate::table::Table;

/// The most rows that are handed over at once.
const MAX_ROWS: u64 = 10_000;

/// The most bytes that are handed over at once, but for one row.
const MAX_BYTES: usize = 4 * 1024 * 1024;

/// A database that no server has open, and that none can open while this lives.
#[derive(Debug)]
pub(in crate::store) struct Moving {
    writer: Mutex<Connection>,
    location: Arc<Location>,
    _lock: Lock,
}

/// Rows of a table, each a line, in the order of its key.
#[derive(Debug, Default)]
pub(in crate::store) struct Rows {
    pub(in crate::store) lines: Vec<u8>,
    pub(in crate::store) count: u64,
}

impl Moving {
    /// Takes the database from every server. This blocks.
    pub(in crate::store) fn open(path: &Path) -> Result<Self, StoreError> {
        if !path.is_file() {
            return Err(StoreError::incompatible(format!(
                "there is no file {}; allowed is a database that aegis made",
                path.display()
            )));
        }
        let (location, lock) = lock::acquire(path)?;
        let writer = connection::sound_writer(&location)?;
        let moving = Self {
            writer: Mutex::new(writer),
            location: Arc::new(location),
            _lock: lock,
        };
        if moving.mark()?.is_none() {
            moving.write(|writer| connection::release(writer, &Repeats::default()))?;
        }
        Ok(moving)
    }

    /// The path of the database, free of symbolic links.
    pub(in crate::store) fn path(&self) -> &Path {
        &self.location.path
    }

    /// Checks all of the database. This blocks.
    pub(in crate::store) fn verify(&self) -> Result<(), StoreError> {
        let verified = verify::verify(self.path())?;
        match verified.faults.first() {
            None => Ok(()),
            Some(fault) => Err(StoreError::unavailable(format!(
                "the database {} is not sound: {fault}; see 'aegis check'",
                self.path().display()
            ))),
        }
    }

    /// Writes down which events sweeps removed before they wrote that down themselves: those of the
    /// chain that are not there. This blocks.
    pub(in crate::store) fn name_all_swept(&self) -> Result<(), StoreError> {
        self.write(|writer| {
            writer.execute_batch("BEGIN IMMEDIATE")?;
            let named = sweep::name_unmarked(writer);
            // An error leaves everything as it was.
            writer.execute_batch(if named.is_ok() { "COMMIT" } else { "ROLLBACK" })?;
            Ok(named?)
        })
    }

    pub(in crate::store) fn mark(&self) -> Result<Option<Mark>, StoreError> {
        self.read(moved::read)
    }

    /// Writes the mark, or removes it. It is durable then. This blocks.
    pub(in crate::store) fn set_mark(&self, mark: Option<&Mark>) -> Result<(), StoreError> {
        self.write(|writer| Ok(moved::write(writer, mark)?))
    }

    /// Counts the rows that a table gets. This blocks.
    pub(in crate::store) fn count(&self, table: &Table) -> Result<u64, StoreError> {
        self.number(table.count)
    }

    /// Reads one number. This blocks.
    pub(in crate::store) fn number(&self, sql: &str) -> Result<u64, StoreError> {
        self.read(|connection| {
            connection.query_row(sql, [], |row| Ok(row.get::<_, i64>(0)?.unsigned_abs()))
        })
    }

    /// Reads one column of text. This blocks.
    pub(in crate::store) fn texts(&self, sql: &str) -> Result<Vec<String>, StoreError> {
        self.read(|connection| {
            let mut read = connection.prepare(sql)?;
            let texts = read.query_map([], |row| row.get(0))?;
            texts.collect()
        })
    }

    /// Reads the rows of a table behind the first `skip` ones, on a thread of its own. It ends when
    /// nobody receives.
    pub(in crate::store) fn rows(
        &self,
        table: &'static Table,
        skip: u64,
    ) -> Result<Receiver<Result<Rows, StoreError>>, StoreError> {
        let (sender, receiver) = mpsc::channel(1);
        let location = self.location.clone();
        thread::Builder::new()
            .name("aegis-move".to_owned())
            .spawn(move || {
                if let Err(error) = send(&location, table, skip, &sender) {
                    let _ = sender.blocking_send(Err(error));
                }
            })
            .map_err(|error| {
                StoreError::unavailable("the thread that reads cannot be started")
                    .with_source(error)
            })?;
        Ok(receiver)
    }

    /// Empties the log, so that the database is one file. This blocks.
    pub(in crate::store) fn close(self) -> Result<(), StoreError> {
        let path = self.path().to_owned();
        let writer = self.writer.into_inner();
        let writer = writer.unwrap_or_else(PoisonError::into_inner);
        connection::close(writer).map_err(|fault| failed(&path, fault))
    }

    fn read<T>(
        &self,
        read: impl FnOnce(&Connection) -> rusqlite::Result<T>,
    ) -> Result<T, StoreError> {
        self.write(|writer| Ok(read(writer)?))
    }

    fn write<T>(
        &self,
        write: impl FnOnce(&Connection) -> Result<T, Fault>,
    ) -> Result<T, StoreError> {
        let writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        write(&writer).map_err(|fault| failed(self.path(), fault))
    }
}

fn failed(path: &Path, fault: Fault) -> StoreError {
    StoreError::unavailable(format!("the database {} cannot be moved", path.display()))
        .with_source(fault.cause())
}

fn send(
    location: &Location,
    table: &Table,
    skip: u64,
    sender: &Sender<Result<Rows, StoreError>>,
) -> Result<(), StoreError> {
    let unread = |error: rusqlite::Error| failed(&location.path, error.into());
    let connection = connection::reader(location).map_err(unread)?;
    let mut read = connection
        .prepare(&format!("{} LIMIT -1 OFFSET ?1", table.rows))
        .map_err(unread)?;
    let skip = i64::try_from(skip).unwrap_or(i64::MAX);
    let mut found = read.query([skip]).map_err(unread)?;
    let mut rows = Rows::default();
    while let Some(row) = found.next().map_err(unread)? {
        let before = rows.lines.len();
        line::write(&mut rows.lines, row, table.columns).map_err(|column| {
            let line = rows.lines.get(before..).unwrap_or_default();
            StoreError::unavailable(format!(
                "the database {} cannot be moved: {} {}: PostgreSQL cannot keep its {column}",
                location.path.display(),
                table.name,
                table.key_of(line)
            ))
        })?;
        rows.count += 1;
        let is_full = rows.count >= MAX_ROWS || rows.lines.len() >= MAX_BYTES;
        if is_full && sender.blocking_send(Ok(std::mem::take(&mut rows))).is_err() {
            return Ok(());
        }
    }
    if rows.count > 0 {
        let _ = sender.blocking_send(Ok(rows));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use crate::store::migrate::table::TABLES;
    use crate::store::sqlite::schema;

    /// What is sorted first has to fit somewhere, and takes long before the first row comes.
    #[test]
    fn the_rows_of_each_table_come_in_the_order_of_an_index() {
        let connection = schema::built_in().unwrap();
        for table in TABLES {
            let explain = format!("EXPLAIN QUERY PLAN {}", table.rows);
            let mut plan = connection.prepare(&explain).unwrap();
            let steps = plan.query_map([], |row| row.get::<_, String>(3)).unwrap();
            let steps: Vec<_> = steps.map(Result::unwrap).collect();
            let sorts = steps.iter().any(|step| step.contains("TEMP B-TREE"));
            assert!(!sorts, "{}: {steps:?}", table.name);
            assert_eq!(plan.column_count(), 4);
            let columns = connection.prepare(table.rows).unwrap().column_count();
            assert_eq!(columns, table.columns.len(), "{}", table.name);
        }
    }
}
