//! Opening the database and making sure that it is durable.

use std::fs::OpenOptions;
use std::io::{self, ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::time::Duration;

use rusqlite::config::DbConfig;
use rusqlite::{Connection, OpenFlags};

use super::StoreError;
use super::deliveries;
use super::fault::{Cause, Fault};
use super::lock::Location;
use super::moved;
use super::repeats::Repeats;
use super::schema::{self, Version};
use super::transaction::Transaction;
use crate::store::Clock;

/// How long a connection waits for another program's lock.
const BUSY_TIMEOUT: Duration = Duration::from_secs(2);

/// The start of the wal-index, in bytes: its header, twice, and the number of frames that are in
/// the database file (<https://sqlite.org/walformat.html>, "WAL-Index File Format").
const INDEX_HEADER: usize = 100;

/// How long a recovery waits for other programs. It is short, because requests wait for the
/// recovery.
const RECOVERY_TIMEOUT: Duration = Duration::from_millis(100);

/// In KiB. Every new action touches an arbitrary page of the index of identities. A larger cache
/// would hold more of these pages. But SQLite looks through the whole cache at the end of every
/// transaction that split a page, which costs more than reading pages again.
const WRITER_CACHE: i64 = 16 * 1024;
const READER_CACHE: i64 = 4 * 1024;

/// Opens the database for writing. It must be in WAL mode, or empty.
fn writer(location: &Location) -> rusqlite::Result<Connection> {
    let connection = open(location, OpenFlags::SQLITE_OPEN_READ_WRITE)?;
    connection.pragma_update(None, "cache_size", -WRITER_CACHE)?;
    connection.set_prepared_statement_cache_capacity(64);
    Ok(connection)
}

/// Opens the database for reading.
pub(super) fn reader(location: &Location) -> rusqlite::Result<Connection> {
    let connection = open(location, OpenFlags::SQLITE_OPEN_READ_ONLY)?;
    connection.pragma_update(None, "query_only", true)?;
    connection.pragma_update(None, "cache_size", -READER_CACHE)?;
    Ok(connection)
}

/// Opens the database for checkpoints.
pub(super) fn checkpointer(location: &Location) -> rusqlite::Result<Connection> {
    open(location, OpenFlags::SQLITE_OPEN_READ_WRITE)
}

fn open(location: &Location, mode: OpenFlags) -> rusqlite::Result<Connection> {
    // Without SQLITE_OPEN_URI, so that a path is a path, whatever characters it contains.
    let flags = mode | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(&location.path, flags)?;
    connection.busy_timeout(BUSY_TIMEOUT)?;
    // A checkpoint on close would count pages as written although a failed fsync lost them. See
    // `settle`.
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true)?;
    connection.pragma_update(None, "foreign_keys", true)?;
    connection.pragma_update(None, "trusted_schema", false)?;
    connection.pragma_update(None, "synchronous", "FULL")?;
    // A statement's own journal must not need room in a folder for temporary files.
    connection.pragma_update(None, "temp_store", "MEMORY")?;
    // For macOS, where fsync leaves data in the drive's cache.
    connection.pragma_update(None, "fullfsync", true)?;
    connection.pragma_update(None, "checkpoint_fullfsync", true)?;
    // The checkpointer runs the checkpoints.
    let _: i64 =
        connection.pragma_update_and_check(None, "wal_autocheckpoint", 0, |row| row.get(0))?;
    // The first read opens the log. After that the connection needs no further descriptor.
    let _: i64 =
        connection.query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get(0))?;
    Ok(connection)
}

/// Opens the database for writing for the first time. Checks what the file is, and brings its
/// schema up to date. A database that was moved, or is being moved, is refused.
pub(super) fn first_writer(
    location: &Location,
    repeats: &Repeats,
) -> Result<Connection, StoreError> {
    let connection = sound_writer(location)?;
    let mark = moved::read(&connection).map_err(|error| unopened(location, error.into()))?;
    if let Some(mark) = mark {
        return Err(mark.refusal(&location.path));
    }
    release(&connection, repeats).map_err(|fault| unopened(location, fault))?;
    Ok(connection)
}

/// Ends the deliveries of the process before, and makes a durable write.
///
/// This process has the lock, so no other one delivers.
pub(super) fn release(connection: &Connection, repeats: &Repeats) -> Result<(), Fault> {
    connection.execute_batch(deliveries::RELEASE)?;
    probe(connection, repeats)
}

fn unopened(location: &Location, fault: Fault) -> StoreError {
    StoreError::unavailable(format!(
        "the database {} cannot be opened",
        location.path.display()
    ))
    .with_source(fault.cause())
}

/// Opens the database for writing for the first time, with its log recovered and its schema up to
/// date, whether or not it was moved.
pub(super) fn sound_writer(location: &Location) -> Result<Connection, StoreError> {
    let path = &location.path;
    let failed = |fault: Fault| unopened(location, fault);
    // A server that was killed may have left an index that counts pages as written which a failed
    // fsync has lost. Where another program keeps that index alive, nothing can be read by it.
    if location
        .file
        .start()
        .is_some_and(|header| schema::is_marked(&header))
    {
        forget_index(location).map_err(failed)?;
    }
    // The file may belong to another application, so nothing else is written before this check.
    let version = {
        let connection = writer(location).map_err(|error| schema::unreadable(path, error))?;
        if connection
            .is_readonly("main")
            .map_err(|error| failed(error.into()))?
        {
            return Err(StoreError::incompatible(format!(
                "the database {} is read-only; allowed is a file that this user may write",
                path.display()
            )));
        }
        schema::version(&connection, path)?
    };
    forget_index(location).map_err(failed)?;
    let mut connection = writer(location).map_err(|error| failed(error.into()))?;
    if version == Version::Older(0) {
        schema::mark(&connection).map_err(|error| failed(error.into()))?;
    }
    let mode: String = connection
        .pragma_update_and_check(None, "journal_mode", "WAL", |row| row.get(0))
        .map_err(|error| failed(error.into()))?;
    if mode != "wal" {
        return Err(StoreError::incompatible(format!(
            "the database {} cannot have a write-ahead log; allowed is a local file system",
            path.display()
        )));
    }
    settle(location, &connection).map_err(failed)?;
    if let Version::Older(version) = version {
        schema::migrate(&mut connection, version).map_err(failed)?;
    }
    Ok(connection)
}

/// Prepares a connection to a database that a server has open for one short write.
pub(super) fn set_up_beside(connection: &Connection) -> rusqlite::Result<()> {
    connection.pragma_update(None, "foreign_keys", true)?;
    connection.pragma_update(None, "synchronous", "FULL")?;
    connection.pragma_update(None, "fullfsync", true)?;
    // The server runs the checkpoints.
    connection.pragma_update_and_check(None, "wal_autocheckpoint", 0, |_| Ok(()))
}

/// Opens the database for writing again after a fault.
pub(super) fn recovered_writer(
    location: &Location,
    repeats: &Repeats,
) -> Result<Connection, Fault> {
    forget_index(location)?;
    let connection = writer(location)?;
    with_busy_timeout(&connection, RECOVERY_TIMEOUT, |connection| {
        settle(location, connection)
    })?;
    probe(&connection, repeats)?;
    Ok(connection)
}

/// Makes every program that uses the database next read its log again from the start.
///
/// After a failed fsync the kernel marks the pages it could not write as clean, and the next fsync
/// reports success (<https://wiki.postgresql.org/wiki/Fsync_Errors>). So no page that a checkpoint
/// copied into the database file since the last good fsync can be relied on. The log still has all
/// of these pages. But the wal-index, which other programs share, counts them as copied: the next
/// checkpoint, which may be another program's as it closes the database, would leave them out and
/// give up the log.
///
/// With its header erased, the wal-index is rebuilt from the log, and the count starts at zero.
/// SQLite does the same after a program died in the middle of a commit, so concurrent readers are
/// safe.
///
/// No connection of this process may be open: POSIX drops all of a process's locks on a file when
/// it closes any descriptor of that file.
pub(super) fn forget_index(location: &Location) -> Result<(), Fault> {
    let forget = || -> io::Result<()> {
        let mut file = match OpenOptions::new().write(true).open(location.beside("-shm")) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            opened => opened?,
        };
        if file.metadata()?.len() >= INDEX_HEADER as u64 {
            file.write_all(&[0; INDEX_HEADER])?;
        }
        Ok(())
    };
    forget().map_err(|error| Fault::Broken(Cause::Index(error)))
}

/// Makes all of the log durable. Copies it into the database file, syncs that file, and empties the
/// log. If a reader in another program keeps the log from being emptied, writes the log again
/// instead.
///
/// The log may end with transactions that were never fsynced, because a server was killed or the
/// fsync failed. The next records stand behind them in the log, and would be lost with them.
fn settle(location: &Location, connection: &Connection) -> Result<(), Fault> {
    if checkpoint(connection, "TRUNCATE")?.is_held_up {
        // Keeps other programs from writing meanwhile.
        connection.execute_batch("BEGIN IMMEDIATE")?;
        let written = write_again(&location.beside("-wal"));
        connection.execute_batch("ROLLBACK")?;
        written.map_err(|error| Fault::Broken(Cause::Sync(error)))?;
    }
    Ok(())
}

/// Writes a file's own bytes over it, so that the kernel marks its pages as dirty, and syncs the
/// file.
fn write_again(path: &Path) -> io::Result<()> {
    let mut file = OpenOptions::new().read(true).write(true).open(path)?;
    let mut bytes = vec![0; 1 << 20];
    let mut at = 0;
    loop {
        file.seek(SeekFrom::Start(at))?;
        let length = file.read(&mut bytes)?;
        if length == 0 {
            return file.sync_data();
        }
        file.seek(SeekFrom::Start(at))?;
        file.write_all(&bytes[..length])?;
        at += length as u64;
    }
}

/// Makes a durable write.
fn probe(connection: &Connection, repeats: &Repeats) -> Result<(), Fault> {
    let clock = Clock::new();
    let mut transaction = Transaction::begin(connection, repeats, &clock)?;
    transaction.beat()?;
    transaction.commit()?;
    Ok(())
}

/// The progress of a checkpoint.
#[derive(Debug, Clone, Copy)]
pub(super) struct Progress {
    /// Whether readers or another checkpoint kept this one from finishing.
    pub(super) is_held_up: bool,
    /// Pages of the log that are in the database file.
    pub(super) done: u32,
}

/// Runs a checkpoint. `mode` is a mode of `PRAGMA wal_checkpoint`.
pub(super) fn checkpoint(connection: &Connection, mode: &str) -> Result<Progress, Fault> {
    let progress = connection.query_row(&format!("PRAGMA wal_checkpoint({mode})"), [], |row| {
        Ok(Progress {
            is_held_up: row.get(0)?,
            // -1 if there is no log.
            done: u32::try_from(row.get::<_, i64>(2)?).unwrap_or(0),
        })
    })?;
    Ok(progress)
}

/// Empties the log and closes the connection, so that only the database file remains.
pub(super) fn close(connection: Connection) -> Result<(), Fault> {
    checkpoint(&connection, "TRUNCATE")?;
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, false)?;
    connection.close().map_err(|(_, error)| error)?;
    Ok(())
}

/// Runs `work` with another busy timeout than usual.
pub(super) fn with_busy_timeout<T>(
    connection: &Connection,
    timeout: Duration,
    work: impl FnOnce(&Connection) -> Result<T, Fault>,
) -> Result<T, Fault> {
    connection.busy_timeout(timeout)?;
    let done = work(connection);
    connection.busy_timeout(BUSY_TIMEOUT)?;
    done
}
