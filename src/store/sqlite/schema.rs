//! The schema: how a database is recognized, and how it gets from one version to the next.

use std::path::Path;

use rusqlite::{Connection, TransactionBehavior};

use super::StoreError;
use super::fault::{Fault, is_not_a_database};

/// `AEGI`, which marks a file as ours, for this code and for `file(1)`.
const APPLICATION_ID: i32 = 0x4145_4749;

/// The version that the first of the [`MIGRATIONS`] leads to. The versions before it were never
/// released.
const FIRST: usize = 3;

/// Each entry takes the schema to the next version. A released entry never changes.
const MIGRATIONS: [&str; 7] = [
    include_str!("schema/3.sql"),
    include_str!("schema/4.sql"),
    include_str!("schema/5.sql"),
    include_str!("schema/6.sql"),
    include_str!("schema/7.sql"),
    include_str!("schema/8.sql"),
    include_str!("schema/9.sql"),
];

/// The version that the last entry leads to.
const CURRENT: usize = FIRST + MIGRATIONS.len() - 1;

/// The version of a database that this release can use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Version {
    Current,
    Older(usize),
}

/// The length of the header of a SQLite file up to its application id.
const HEADER: usize = 72;

/// Whether the header of a database file, as it is on disk, says that the file is ours.
pub(super) fn is_marked(header: &[u8; HEADER]) -> bool {
    // https://sqlite.org/fileformat.html, "The Database Header".
    header.starts_with(b"SQLite format 3\0") && header[68..] == APPLICATION_ID.to_be_bytes()
}

/// Marks an empty file as ours. It happens without a log, so that the mark is on disk before
/// anything else is.
pub(super) fn mark(connection: &Connection) -> rusqlite::Result<()> {
    connection.pragma_update(None, "application_id", APPLICATION_ID)
}

/// Reads the version without changing the file.
pub(super) fn version(connection: &Connection, path: &Path) -> Result<Version, StoreError> {
    let read = |pragma: &str| -> Result<i32, StoreError> {
        connection
            .pragma_query_value(None, pragma, |row| row.get(0))
            .map_err(|error| unreadable(path, error))
    };
    let (application, version) = (read("application_id")?, read("user_version")?);
    if application == APPLICATION_ID {
        return match usize::try_from(version) {
            // The start that marked the file was cut off behind the mark.
            Ok(0) => Ok(Version::Older(0)),
            Ok(CURRENT) => Ok(Version::Current),
            Ok(version) if (FIRST..CURRENT).contains(&version) => Ok(Version::Older(version)),
            _ => Err(StoreError::incompatible(format!(
                "the database {} has schema version {version}; this release reads versions {FIRST} to {CURRENT}",
                path.display(),
            ))),
        };
    }
    let is_empty = connection
        .query_row("SELECT count(*) = 0 FROM sqlite_schema", [], |row| {
            row.get(0)
        })
        .map_err(|error| unreadable(path, error))?;
    if application == 0 && version == 0 && is_empty {
        return Ok(Version::Older(0));
    }
    Err(StoreError::incompatible(format!(
        "{} is a database of another application; allowed are a new file and a database that aegis made",
        path.display()
    )))
}

/// The error of a file that could not be read: it is another kind of file, or out of reach for now.
pub(super) fn unreadable(path: &Path, error: rusqlite::Error) -> StoreError {
    if is_not_a_database(&error) {
        return StoreError::incompatible(format!(
            "{} is not a SQLite database; allowed are a new file and a database that aegis made",
            path.display()
        ))
        .with_source(error);
    }
    StoreError::unavailable(format!("the database {} cannot be read", path.display()))
        .with_source(error)
}

/// Takes the schema to the current version, with all steps in one transaction.
pub(super) fn migrate(connection: &mut Connection, from: usize) -> Result<(), Fault> {
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    for step in MIGRATIONS.iter().skip((from + 1).saturating_sub(FIRST)) {
        transaction.execute_batch(step)?;
    }
    mark(&transaction)?;
    transaction.pragma_update(None, "user_version", CURRENT as i64)?;
    transaction.commit()?;
    Ok(())
}

/// Makes an empty database of the current schema, in memory.
pub(super) fn built_in() -> rusqlite::Result<Connection> {
    let connection = Connection::open_in_memory()?;
    for step in MIGRATIONS {
        connection.execute_batch(step)?;
    }
    Ok(connection)
}
