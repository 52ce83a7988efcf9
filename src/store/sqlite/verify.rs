//! Verification: whether a database file is sound for SQLite, and keeps the store's promises.

mod history;
mod log;
mod tombstones;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::config::DbConfig;
use rusqlite::{Connection, OpenFlags, Row, Rows};

use super::lock::beside;
use super::schema::{self, Version};
use super::{StoreError, audit, rows};
use crate::protocol::{Digest, Payload};
use crate::store::audit::Faults;
use crate::store::audit::history::{Event, History};
use crate::store::operation::Record;
use crate::store::{Identity, Totals};

/// How long the connection waits for another program's lock.
const BUSY_TIMEOUT: Duration = Duration::from_secs(10);

/// The result of checking a whole database file.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Verified {
    /// What is on record.
    pub totals: Totals,
    /// The first 100 faults, in words. Empty if the file is sound.
    pub faults: Vec<String>,
}

/// Checks all of a database.
pub(super) fn verify(path: &Path) -> Result<Verified, StoreError> {
    let connection = open(path)?;
    let log = log_fault(path)?;
    let read = || -> rusqlite::Result<Verified> {
        // A transaction sees one state of the database, whatever a server does meanwhile.
        connection.execute_batch("BEGIN")?;
        let mut faults = Faults::default();
        if let Some(log) = log {
            faults.add(log);
        }
        integrity(&connection, &mut faults)?;
        schema(&connection, &mut faults)?;
        // If the file is damaged or has another shape, no other check means anything.
        let mut totals = Totals::default();
        if faults.is_empty() {
            totals = super::totals(&connection)?;
            identities(&connection, &mut faults)?;
            histories(&connection, &mut faults)?;
            event_ids(&connection, &mut faults)?;
            tombstones::check(&connection, &mut faults)?;
            audit::check(&connection, &mut faults)?;
        }
        Ok(Verified {
            totals,
            faults: faults.into_vec(),
        })
    };
    match read() {
        Err(error) if is_damage(&error) => Ok(Verified {
            totals: Totals::default(),
            faults: vec![error.to_string()],
        }),
        read => read.map_err(|error| schema::unreadable(path, error)),
    }
}

/// Returns what is wrong with the log of a database that is [open](open), in words.
///
/// SQLite locks other files than the log, so closing this descriptor drops no lock.
pub(super) fn log_fault(path: &Path) -> Result<Option<String>, StoreError> {
    log::fault(&log_of(path)).map_err(|error| {
        StoreError::unavailable(format!("the log of {} cannot be read", path.display()))
            .with_source(error)
    })
}

/// Opens a database for reading and leaves it unchanged. A server may have it open, too.
pub(super) fn open(path: &Path) -> Result<Connection, StoreError> {
    let refused = |fault: &str| {
        StoreError::incompatible(format!(
            "{} {fault}; allowed is a database that aegis made",
            path.display()
        ))
    };
    match fs::metadata(path) {
        Ok(metadata) if !metadata.is_file() => return Err(refused("is no regular file")),
        Ok(metadata) if metadata.len() == 0 && log_is_empty(path) => {
            return Err(refused("is empty"));
        }
        Ok(_) => {}
        Err(error) => {
            let fault = format!("cannot be read, there is no file: {error}");
            return Err(refused(&fault).with_source(error));
        }
    }
    let unreadable = |error| schema::unreadable(path, error);
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let had_no_log = log_is_empty(path);
    let connection = Connection::open_with_flags(path, flags).map_err(unreadable)?;
    let set_up = || -> rusqlite::Result<()> {
        connection.busy_timeout(BUSY_TIMEOUT)?;
        // A log that a server left is for the next server to recover. A log that only this
        // connection made is removed.
        connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, !had_no_log)?;
        connection.pragma_update(None, "trusted_schema", false)
    };
    set_up().map_err(unreadable)?;
    match schema::version(&connection, path)? {
        Version::Current => Ok(connection),
        Version::Older(0) => Err(refused("is empty")),
        Version::Older(version) => Err(refused(&format!(
            "has the older schema version {version}, which the next 'aegis serve' brings up to date"
        ))),
    }
}

/// The log that SQLite uses: it follows symbolic links.
fn log_of(database: &Path) -> PathBuf {
    let database = fs::canonicalize(database).unwrap_or_else(|_| database.to_owned());
    beside(&database, "-wal")
}

fn log_is_empty(database: &Path) -> bool {
    fs::metadata(log_of(database)).map_or(true, |metadata| metadata.len() == 0)
}

fn is_damage(error: &rusqlite::Error) -> bool {
    matches!(
        error.sqlite_error_code(),
        Some(rusqlite::ErrorCode::DatabaseCorrupt)
    )
}

fn integrity(connection: &Connection, faults: &mut Faults) -> rusqlite::Result<()> {
    let mut check = connection.prepare("PRAGMA integrity_check")?;
    let lines = check.query_map([], |row| row.get::<_, String>(0))?;
    for line in lines {
        let line = line?;
        if line != "ok" {
            faults.add(line);
        }
    }
    Ok(())
}

/// Compares the schema with the one that this release makes. A trigger changes what a server
/// records from now on.
fn schema(connection: &Connection, faults: &mut Faults) -> rusqlite::Result<()> {
    // The statistics of ANALYZE are SQLite's own.
    let read = |connection: &Connection| -> rusqlite::Result<BTreeMap<String, Option<String>>> {
        let mut objects = connection.prepare(
            "SELECT type || ' ' || name, sql FROM sqlite_schema WHERE name NOT GLOB 'sqlite_stat*'",
        )?;
        let objects = objects.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?;
        objects.collect()
    };
    let mut built_in = read(&schema::built_in()?)?;
    for (name, sql) in read(connection)? {
        match built_in.remove(&name) {
            Some(ours) if ours == sql => {}
            Some(_) => faults.add(format!("{name}: it is not as this application makes it")),
            None => faults.add(format!("{name}: it is not of this application")),
        }
    }
    for name in built_in.into_keys() {
        faults.add(format!("{name}: it is missing"));
    }
    Ok(())
}

fn identities(connection: &Connection, faults: &mut Faults) -> rusqlite::Result<()> {
    let mut actions = connection
        .prepare("SELECT id, identity, tenant_id, thread_id, idempotency_key FROM action")?;
    let mut actions = actions.query([])?;
    while let Some(row) = actions.next()? {
        let id: i64 = row.get(0)?;
        let identity = identity(row).ok().flatten();
        if identity.map(|identity| identity.digest()) != Some(row.get(1)?) {
            faults.add(format!(
                "action {id}: the identity is not that of its tenant, thread and key"
            ));
        }
    }
    Ok(())
}

fn identity(row: &Row<'_>) -> rusqlite::Result<Option<Identity>> {
    let text = |column| row.get::<_, String>(column);
    let (tenant, thread, key) = (text(2)?, text(3)?, text(4)?);
    let (Ok(tenant_id), Ok(thread_id), Ok(idempotency_key)) =
        (tenant.parse(), thread.parse(), key.parse())
    else {
        return Ok(None);
    };
    Ok(Some(Identity {
        tenant_id,
        thread_id,
        idempotency_key,
    }))
}

/// Checks each action by itself and against its events. Both are read in the order of actions.
fn histories(connection: &Connection, faults: &mut Faults) -> rusqlite::Result<()> {
    let mut events = connection.prepare(history::EVENTS)?;
    let mut events = events.query([])?;
    let mut event = next_event(&mut events, faults)?;
    let mut actions = connection.prepare(rows::ALL)?;
    let mut actions = actions.query([])?;
    while let Some(row) = actions.next()? {
        let id: i64 = row.get(0)?;
        while let Some((_, lost)) = event.take_if(|(action, _)| *action < id) {
            faults.add(no_action(&lost));
            event = next_event(&mut events, faults)?;
        }
        let mut history = History::default();
        while let Some((_, next)) = event.take_if(|(action, _)| *action == id) {
            history.add(&next);
            event = next_event(&mut events, faults)?;
        }
        let record = match rows::record(row) {
            Ok(record) => record,
            // The error may quote the value.
            Err(error) => {
                let column = column(row, &error);
                faults.add(format!("action {id}: {column} cannot be read"));
                continue;
            }
        };
        if let Some(fault) = own_fault(&record) {
            faults.add(format!("action {id}: {fault}"));
        }
        if let Some(fault) = history.fault(&history::shown(&record)) {
            faults.add(format!("action {id}: {fault}"));
        }
    }
    while let Some((_, lost)) = event {
        faults.add(no_action(&lost));
        event = next_event(&mut events, faults)?;
    }
    Ok(())
}

/// Returns the next event that can be read, and the number of its action.
fn next_event(
    events: &mut Rows<'_>,
    faults: &mut Faults,
) -> rusqlite::Result<Option<(i64, Event)>> {
    while let Some(row) = events.next()? {
        match history::event(row) {
            Ok(event) => return Ok(Some(event)),
            Err(error) => {
                let column = column(row, &error);
                let seq: i64 = row.get(1)?;
                faults.add(format!("event {seq}: {column} cannot be read"));
            }
        }
    }
    Ok(None)
}

fn no_action(event: &Event) -> String {
    format!("event {}: there is no action of its number", event.number)
}

/// Names the column whose value cannot be read.
fn column(row: &Row<'_>, error: &rusqlite::Error) -> String {
    use rusqlite::Error::{FromSqlConversionFailure, IntegralValueOutOfRange, InvalidColumnType};

    let column = match error {
        FromSqlConversionFailure(column, ..)
        | InvalidColumnType(column, ..)
        | IntegralValueOutOfRange(column, _) => row.as_ref().column_name(*column),
        _ => Ok("a value"),
    };
    column.unwrap_or("a value").to_owned()
}

/// Returns what is wrong with an action, whatever its events say.
fn own_fault(record: &Record) -> Option<&'static str> {
    let action = &record.action;
    let differs = |payload: &Option<Payload>, digest: Option<Digest>| {
        let payload = payload.as_ref();
        payload.is_some_and(|payload| Digest::of(payload).ok() != digest)
    };
    if differs(&action.payload, record.submitted_digest) {
        return Some("the digest is not the payload's");
    }
    if differs(&action.edited_payload, action.digest) {
        return Some("the digest is not the edited payload's");
    }
    // RFC 3339 has years of four digits.
    let is_shown = serde_json::to_writer(std::io::sink(), action).is_ok();
    (!is_shown).then_some("its times cannot be written")
}

fn event_ids(connection: &Connection, faults: &mut Faults) -> rusqlite::Result<()> {
    let mut check = connection
        .prepare("SELECT max(seq) FROM event GROUP BY event_id HAVING count(*) > 1 ORDER BY 1")?;
    let wrong = check.query_map([], |row| row.get::<_, i64>(0))?;
    for seq in wrong {
        faults.add(format!("event {}: another event has its id", seq?));
    }
    Ok(())
}
