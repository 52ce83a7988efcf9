//! Actions that are over: finding them, removing them, and what stays.

use std::time::SystemTime;

use rusqlite::{Connection, OptionalExtension, Row, params};
use uuid::Uuid;

use super::deliveries::seq;
use super::fault::is_fatal;
use super::rows::{self, from_micros, micros, optional_text, text};
use crate::protocol::Digest;
use crate::store::Identity;
#[cfg(feature = "postgres")]
use crate::store::audit::links;
use crate::store::operation::{Aged, Record, Tombstone};

pub(super) fn tombstone(
    connection: &Connection,
    identity: &Identity,
) -> rusqlite::Result<Option<Tombstone>> {
    connection
        .prepare_cached(
            "SELECT request_id, decision, execution, closed, digest, edited_digest, created_at, \
             decided_at FROM tombstone WHERE identity = ?1",
        )?
        .query_row([identity.digest()], |row| {
            Ok(Tombstone {
                request_id: Uuid::from_bytes(row.get(0)?),
                decision: text(row, 1)?,
                execution: optional_text(row, 2)?,
                closed: optional_text(row, 3)?,
                submitted_digest: digest(row, 4)?,
                edited_digest: digest(row, 5)?,
                created_at: from_micros(row.get(6)?),
                decided_at: from_micros(row.get(7)?),
            })
        })
        .optional()
}

pub(super) fn has_tombstones(connection: &Connection) -> rusqlite::Result<bool> {
    let mut read = connection.prepare_cached("SELECT EXISTS (SELECT 1 FROM tombstone)")?;
    read.query_row([], |row| row.get(0))
}

/// Removes the row of an action that came on record in this transaction, and has no event yet.
pub(super) fn take_back(connection: &Connection, row: i64) -> rusqlite::Result<()> {
    let mut delete = connection.prepare_cached("DELETE FROM action WHERE id = ?1")?;
    delete.execute([row])?;
    Ok(())
}

fn digest(row: &Row<'_>, column: usize) -> rusqlite::Result<Option<Digest>> {
    Ok(row.get::<_, Option<[u8; 32]>>(column)?.map(Digest::from))
}

/// The statements that remove the action in a row. What endpoints have not received goes with the
/// events.
pub(super) const REMOVE: [&str; 5] = [
    "INSERT INTO tombstone (identity, request_id, decision, execution, closed, digest, \
     edited_digest, created_at, decided_at) \
     SELECT identity, request_id, decision, execution, closed, digest, edited_digest, created_at, \
     decided_at FROM action WHERE id = ?1",
    "DELETE FROM claim WHERE action = ?1",
    "INSERT OR IGNORE INTO swept (event) SELECT seq FROM event WHERE action = ?1",
    "DELETE FROM event WHERE action = ?1",
    "DELETE FROM action WHERE id = ?1",
];

pub(super) fn remove(connection: &Connection, row: i64) -> rusqlite::Result<()> {
    for statement in REMOVE {
        connection.prepare_cached(statement)?.execute([row])?;
    }
    Ok(())
}

pub(super) const NEWEST_ACTION: &str = "SELECT max(id) FROM action";

pub(super) fn newest_action(connection: &Connection) -> rusqlite::Result<Option<i64>> {
    let mut read = connection.prepare_cached(NEWEST_ACTION)?;
    read.query_row([], |row| row.get(0))
}

pub(super) const BETWEEN: &str =
    "SELECT seq, at FROM event WHERE seq > ?1 AND seq <= ?2 ORDER BY seq LIMIT ?3";

pub(super) fn events_between(
    connection: &Connection,
    after: u64,
    last: u64,
    limit: usize,
) -> rusqlite::Result<Vec<(u64, SystemTime)>> {
    let limit = i64::try_from(limit).unwrap_or(i64::MAX);
    let mut read = connection.prepare_cached(BETWEEN)?;
    let found = read.query_map([seq(after), seq(last), limit], |row| {
        let position = row.get::<_, i64>(0)?.unsigned_abs();
        Ok((position, from_micros(row.get(1)?)))
    })?;
    found.collect()
}

/// The lengths are in the rows, so what is large is not read.
pub(super) const AGED: &str = "SELECT action.id, \
     coalesce(octet_length(payload), 0) + coalesce(octet_length(edited_payload), 0) \
     + coalesce(octet_length(result), 0) \
     FROM event JOIN action ON action.id = event.action WHERE event.seq = ?1 \
     AND NOT EXISTS (SELECT 1 FROM event AS later WHERE later.action = action.id AND later.seq > ?1)";

pub(super) fn aged(connection: &Connection, position: u64) -> rusqlite::Result<Option<Aged>> {
    connection
        .prepare_cached(AGED)?
        .query_row([seq(position)], |row| {
            let size: i64 = row.get(1)?;
            Ok(Aged::Free {
                row: row.get(0)?,
                size: usize::try_from(size).unwrap_or(usize::MAX),
            })
        })
        .optional()
}

/// A row that an edit by hand has spoilt stays, and keeps nothing else from being removed.
pub(super) fn outline(connection: &Connection, row: i64) -> rusqlite::Result<Option<Record>> {
    match rows::outline(connection, row) {
        Err(error) if !is_fatal(&error) => {
            tracing::warn!(row, %error, "an action that may be over cannot be read");
            Ok(None)
        }
        read => read,
    }
}

pub(super) fn swept(connection: &Connection) -> rusqlite::Result<u64> {
    let mut read = connection.prepare_cached("SELECT position FROM sweep WHERE id = 1")?;
    let position = read.query_row([], |row| row.get::<_, i64>(0)).optional()?;
    Ok(position.unwrap_or(0).unsigned_abs())
}

pub(super) const IS_SWEPT: &str = "SELECT 1 FROM swept WHERE event = ?1 \
     UNION ALL SELECT 1 FROM sweep WHERE id = 1 AND unmarked >= ?1";

/// Whether a sweep removed the event at a position, as far as is known.
pub(super) fn is_swept(connection: &Connection, position: i64) -> rusqlite::Result<bool> {
    connection.prepare_cached(IS_SWEPT)?.exists([position])
}

/// Marks what the version before has removed without a mark: the events of the chain, up to
/// `unmarked`, that are not there.
#[cfg(feature = "postgres")]
pub(super) fn name_unmarked(connection: &Connection) -> rusqlite::Result<()> {
    let unmarked: i64 = connection
        .query_row("SELECT unmarked FROM sweep WHERE id = 1", [], |row| {
            row.get(0)
        })
        .optional()?
        .unwrap_or(0);
    if unmarked == 0 {
        return Ok(());
    }
    let mut mark = connection.prepare(
        "INSERT OR IGNORE INTO swept (event) SELECT ?1 \
         WHERE NOT EXISTS (SELECT 1 FROM event WHERE seq = ?1)",
    )?;
    let mut read = connection.prepare("SELECT links FROM chain")?;
    let mut rows = read.query([])?;
    while let Some(row) = rows.next()? {
        for (position, _) in links(row.get_ref(0)?.as_blob()?) {
            if position <= unmarked {
                mark.execute([position])?;
            }
        }
    }
    connection.execute("UPDATE sweep SET unmarked = 0", [])?;
    Ok(())
}

/// The number of tombstones, as sweeps count them.
pub(super) fn tombstones(connection: &Connection) -> rusqlite::Result<u64> {
    let mut read = connection.prepare_cached("SELECT tombstones FROM sweep WHERE id = 1")?;
    let tombstones = read.query_row([], |row| row.get::<_, i64>(0)).optional()?;
    Ok(tombstones.unwrap_or(0).unsigned_abs())
}

/// Writes how far sweeps have come, and that there are so many more tombstones.
pub(super) fn set_swept(
    connection: &Connection,
    position: u64,
    removed: i64,
) -> rusqlite::Result<()> {
    connection
        .prepare_cached(
            "UPDATE sweep SET position = ?1, tombstones = tombstones + ?2 WHERE id = 1",
        )?
        .execute([seq(position), removed])?;
    Ok(())
}

pub(super) fn postpone(
    connection: &Connection,
    position: u64,
    until: SystemTime,
) -> rusqlite::Result<()> {
    connection
        .prepare_cached("INSERT OR IGNORE INTO postponed (until, event) VALUES (?1, ?2)")?
        .execute(params![micros(until), seq(position)])?;
    Ok(())
}

pub(super) const POSTPONED: &str =
    "SELECT until, event FROM postponed WHERE until <= ?1 ORDER BY until LIMIT ?2";

pub(super) fn postponed(
    connection: &Connection,
    time: SystemTime,
    limit: usize,
) -> rusqlite::Result<Vec<(SystemTime, u64)>> {
    let limit = i64::try_from(limit).unwrap_or(i64::MAX);
    let mut read = connection.prepare_cached(POSTPONED)?;
    let found = read.query_map([micros(time), limit], |row| {
        let position = row.get::<_, i64>(1)?.unsigned_abs();
        Ok((from_micros(row.get(0)?), position))
    })?;
    found.collect()
}

pub(super) fn remove_postponed(
    connection: &Connection,
    until: SystemTime,
    position: u64,
) -> rusqlite::Result<()> {
    connection
        .prepare_cached("DELETE FROM postponed WHERE until = ?1 AND event = ?2")?
        .execute(params![micros(until), seq(position)])?;
    Ok(())
}
