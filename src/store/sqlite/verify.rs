//! Verification: whether a database file is sound for SQLite, and keeps the store's promises.

use std::fs;
use std::path::Path;
use std::time::Duration;

use rusqlite::config::DbConfig;
use rusqlite::{Connection, OpenFlags, Row};

use super::schema::{self, Version};
use super::{StoreError, rows};
use crate::protocol::{Fingerprint, Payload};
use crate::store::{Identity, Totals};

/// The most faults that are listed.
const MAX_FAULTS: usize = 100;

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

struct Faults(Vec<String>);

impl Faults {
    fn add(&mut self, fault: String) {
        if self.0.len() < MAX_FAULTS {
            self.0.push(fault);
        }
    }
}

/// Checks all of a database.
pub(super) fn verify(path: &Path) -> Result<Verified, StoreError> {
    let connection = open(path)?;
    let read = || -> rusqlite::Result<Verified> {
        // A transaction sees one state of the database, whatever a server does meanwhile.
        connection.execute_batch("BEGIN")?;
        let mut faults = Faults(Vec::new());
        integrity(&connection, &mut faults)?;
        let totals = super::totals(&connection)?;
        // If the file is damaged, no other check means anything.
        if faults.0.is_empty() {
            references(&connection, &mut faults)?;
            actions(&connection, &mut faults)?;
            events(&connection, &mut faults)?;
        }
        let faults = faults.0;
        Ok(Verified { totals, faults })
    };
    match read() {
        Err(error) if is_damage(&error) => Ok(Verified {
            totals: Totals::default(),
            faults: vec![error.to_string()],
        }),
        read => read.map_err(|error| schema::unreadable(path, error)),
    }
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

fn log_is_empty(database: &Path) -> bool {
    let mut log = database.as_os_str().to_owned();
    log.push("-wal");
    fs::metadata(log).map_or(true, |metadata| metadata.len() == 0)
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

fn references(connection: &Connection, faults: &mut Faults) -> rusqlite::Result<()> {
    let mut check = connection.prepare(
        "SELECT seq FROM event WHERE NOT EXISTS (SELECT 1 FROM action WHERE id = event.action)",
    )?;
    let lost = check.query_map([], |row| row.get::<_, i64>(0))?;
    for seq in lost {
        faults.add(format!("event {}: there is no action of its number", seq?));
    }
    Ok(())
}

/// Checks each row by itself.
fn actions(connection: &Connection, faults: &mut Faults) -> rusqlite::Result<()> {
    let mut actions = connection.prepare(
        "SELECT id, identity, tenant_id, thread_id, idempotency_key, digest, payload FROM action",
    )?;
    let mut actions = actions.query([])?;
    while let Some(row) = actions.next()? {
        let id: i64 = row.get(0)?;
        let identity = identity(row)?;
        if identity.map(|identity| rows::digest(&identity)) != Some(row.get(1)?) {
            faults.add(format!(
                "action {id}: the identity is not that of its tenant, thread and key"
            ));
        }
        let payload: Option<String> = row.get(6)?;
        let digest = payload.map(|json| {
            let payload = Payload::from_json(&json).ok()?;
            Some(Fingerprint::of_payload(&payload).ok()?.0)
        });
        // An unreadable payload has no digest. A row without a payload has none to compare.
        if digest.is_some_and(|digest| digest.is_none() || row.get(5).ok() != digest) {
            faults.add(format!("action {id}: the digest is not the payload's"));
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

/// Checks each action against its events.
fn events(connection: &Connection, faults: &mut Faults) -> rusqlite::Result<()> {
    for (sql, fault) in [
        (
            "SELECT id FROM action WHERE id NOT IN (SELECT action FROM event)",
            "it has no event",
        ),
        (
            "SELECT id FROM action JOIN (SELECT action, max(seq), to_status FROM event GROUP BY action) \
             ON action = id WHERE to_status <> status",
            "its status is not the one of its last event",
        ),
        (
            "SELECT id FROM action JOIN (SELECT action, max(seq), event.decision AS made FROM event \
             WHERE event.decision IS NOT NULL GROUP BY action) ON action = id WHERE made IS NOT decision",
            "its decision is not the one of its events",
        ),
    ] {
        let mut check = connection.prepare(sql)?;
        let wrong = check.query_map([], |row| row.get::<_, i64>(0))?;
        for id in wrong {
            faults.add(format!("action {}: {fault}", id?));
        }
    }
    Ok(())
}
