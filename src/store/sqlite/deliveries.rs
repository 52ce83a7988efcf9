//! Webhook endpoints, and what they have not received.

use std::path::Path;
use std::time::{Duration, SystemTime};

use rusqlite::{Connection, OptionalExtension, Row, params};
use uuid::Uuid;

use super::fault::Fault;
use super::list;
use super::repeats::Repeats;
use super::rows::{from_micros, micros};
use super::transaction::Transaction;
use super::{connection, lock, moved, verify};
use crate::store::delivery::COUNTED;
use crate::store::operation::{Endpoint, Operation, Standing, Undelivered};
use crate::store::{Clock, DeadLetter, DueDeliveries, DueDelivery, EndpointState, StoreError};

/// Ends the rights of servers that are gone.
pub(super) const RELEASE: &str = "UPDATE endpoint SET holder = NULL, held_until = NULL, \
     left_at = min(held_until, CAST(unixepoch('subsec') * 1000000 AS INTEGER)) \
     WHERE holder IS NOT NULL";

pub(super) fn endpoint(connection: &Connection, name: &str) -> rusqlite::Result<Option<Endpoint>> {
    connection
        .prepare_cached(
            "SELECT id, position, holder, held_until, stopped_at, left_at FROM endpoint \
             WHERE name = ?1",
        )?
        .query_row([name], endpoint_in)
        .optional()
}

/// Reads all endpoints.
pub(super) fn all_endpoints(connection: &Connection) -> rusqlite::Result<Vec<Endpoint>> {
    let mut read = connection.prepare_cached(
        "SELECT id, position, holder, held_until, stopped_at, left_at FROM endpoint",
    )?;
    read.query_map([], endpoint_in)?.collect()
}

fn endpoint_in(row: &Row<'_>) -> rusqlite::Result<Endpoint> {
    let holder = row.get::<_, Option<[u8; 16]>>(2)?.map(Uuid::from_bytes);
    Ok(Endpoint {
        row: row.get(0)?,
        position: row.get::<_, i64>(1)?.unsigned_abs(),
        held: holder.zip(time(row, 3)?),
        stopped_at: time(row, 4)?,
        left_at: time(row, 5)?,
    })
}

fn time(row: &Row<'_>, column: usize) -> rusqlite::Result<Option<SystemTime>> {
    Ok(row.get::<_, Option<i64>>(column)?.map(from_micros))
}

/// A position as the database has it.
pub(super) fn seq(position: u64) -> i64 {
    i64::try_from(position).unwrap_or(i64::MAX)
}

pub(super) fn insert_endpoint(
    connection: &Connection,
    name: &str,
    position: u64,
) -> rusqlite::Result<Endpoint> {
    connection
        .prepare_cached("INSERT INTO endpoint (name, position) VALUES (?1, ?2)")?
        .execute(params![name, seq(position)])?;
    Ok(Endpoint {
        row: connection.last_insert_rowid(),
        position,
        held: None,
        stopped_at: None,
        left_at: None,
    })
}

pub(super) fn update_endpoint(
    connection: &Connection,
    endpoint: &Endpoint,
) -> rusqlite::Result<()> {
    connection
        .prepare_cached(
            "UPDATE endpoint SET position = ?2, holder = ?3, held_until = ?4, stopped_at = ?5, \
             left_at = ?6 WHERE id = ?1",
        )?
        .execute(params![
            endpoint.row,
            seq(endpoint.position),
            endpoint.held.map(|(holder, _)| holder.into_bytes()),
            endpoint.held.map(|(_, until)| micros(until)),
            endpoint.stopped_at.map(micros),
            endpoint.left_at.map(micros),
        ])?;
    Ok(())
}

pub(super) fn remove_endpoint(
    connection: &Connection,
    endpoint: &Endpoint,
) -> rusqlite::Result<()> {
    for statement in [
        "DELETE FROM undelivered WHERE endpoint = ?1",
        "DELETE FROM endpoint WHERE id = ?1",
    ] {
        connection
            .prepare_cached(statement)?
            .execute([endpoint.row])?;
    }
    Ok(())
}

pub(super) const PARKED: &str = "SELECT event, request_id FROM undelivered \
     JOIN action ON action.id = undelivered.action \
     WHERE endpoint = ?1 AND given_up_at IS NULL ORDER BY event";

const DEAD: &str = "SELECT event, event_id FROM undelivered \
     JOIN event ON event.seq = undelivered.event \
     WHERE endpoint = ?1 AND given_up_at IS NOT NULL ORDER BY event";

fn positions(
    connection: &Connection,
    sql: &str,
    endpoint: &Endpoint,
) -> rusqlite::Result<Vec<(u64, Uuid)>> {
    let mut read = connection.prepare_cached(sql)?;
    let found = read.query_map([endpoint.row], |row| {
        let position = row.get::<_, i64>(0)?.unsigned_abs();
        Ok((position, Uuid::from_bytes(row.get(1)?)))
    })?;
    found.collect()
}

pub(super) fn parked(
    connection: &Connection,
    endpoint: &Endpoint,
) -> rusqlite::Result<Vec<(u64, Uuid)>> {
    positions(connection, PARKED, endpoint)
}

pub(super) fn dead(
    connection: &Connection,
    endpoint: &Endpoint,
) -> rusqlite::Result<Vec<(u64, Uuid)>> {
    positions(connection, DEAD, endpoint)
}

/// Selects the columns that [`undelivered`] reads, in its order.
macro_rules! select {
    ($rest:literal) => {
        concat!(
            "SELECT event, parked_at, attempts, due, given_up_at, failure FROM undelivered WHERE ",
            $rest
        )
    };
}

/// SQLite would go through all that is parked to avoid a sort that this index does not need either.
pub(super) const FIRST_PARKED: &str = "SELECT event, parked_at, attempts, due, given_up_at, failure \
     FROM undelivered INDEXED BY undelivered_action \
     WHERE endpoint = ?1 AND action = (SELECT action FROM event WHERE seq = ?2) \
     AND given_up_at IS NULL ORDER BY event LIMIT 1";

fn undelivered(row: &Row<'_>) -> rusqlite::Result<Undelivered> {
    Ok(Undelivered {
        position: row.get::<_, i64>(0)?.unsigned_abs(),
        since: from_micros(row.get(1)?),
        attempts: row.get(2)?,
        standing: match (time(row, 3)?, time(row, 4)?) {
            (_, Some(given_up_at)) => Standing::Dead(given_up_at),
            (Some(due), None) => Standing::Due(due),
            (None, None) => Standing::Behind,
        },
        failure: row.get(5)?,
    })
}

pub(super) fn undelivered_at(
    connection: &Connection,
    endpoint: &Endpoint,
    position: u64,
) -> rusqlite::Result<Option<Undelivered>> {
    connection
        .prepare_cached(select!("endpoint = ?1 AND event = ?2"))?
        .query_row(params![endpoint.row, seq(position)], undelivered)
        .optional()
}

pub(super) fn first_parked(
    connection: &Connection,
    endpoint: &Endpoint,
    position: u64,
) -> rusqlite::Result<Option<Undelivered>> {
    connection
        .prepare_cached(FIRST_PARKED)?
        .query_row(params![endpoint.row, seq(position)], undelivered)
        .optional()
}

pub(super) fn set_undelivered(
    connection: &Connection,
    endpoint: &Endpoint,
    undelivered: &Undelivered,
) -> rusqlite::Result<()> {
    let (due, given_up_at) = match undelivered.standing {
        Standing::Due(due) => (Some(due), None),
        Standing::Behind => (None, None),
        Standing::Dead(given_up_at) => (None, Some(given_up_at)),
    };
    connection
        .prepare_cached(
            "INSERT OR REPLACE INTO undelivered \
             (endpoint, event, action, parked_at, attempts, due, given_up_at, failure) \
             SELECT ?1, seq, action, ?3, ?4, ?5, ?6, ?7 FROM event WHERE seq = ?2",
        )?
        .execute(params![
            endpoint.row,
            seq(undelivered.position),
            micros(undelivered.since),
            undelivered.attempts,
            due.map(micros),
            given_up_at.map(micros),
            undelivered.failure,
        ])?;
    Ok(())
}

pub(super) fn remove_undelivered(
    connection: &Connection,
    endpoint: &Endpoint,
    position: u64,
) -> rusqlite::Result<()> {
    connection
        .prepare_cached("DELETE FROM undelivered WHERE endpoint = ?1 AND event = ?2")?
        .execute(params![endpoint.row, seq(position)])?;
    Ok(())
}

pub(super) const DUE: &str = "SELECT event, attempts FROM undelivered \
     WHERE endpoint = (SELECT id FROM endpoint WHERE name = ?1) AND due IS NOT NULL AND due <= ?2 \
     ORDER BY due LIMIT ?3";

/// What is due later than any wait takes.
pub(super) const TOO_LATE: &str = "SELECT event, attempts FROM undelivered \
     WHERE endpoint = (SELECT id FROM endpoint WHERE name = ?1) AND due IS NOT NULL AND due > ?2 \
     ORDER BY due LIMIT ?3";

pub(super) const NEXT: &str = "SELECT due FROM undelivered \
     WHERE endpoint = (SELECT id FROM endpoint WHERE name = ?1) AND due IS NOT NULL \
     AND due > ?2 AND due <= ?3 ORDER BY due LIMIT 1";

/// Reads what is to be attempted now.
pub(super) fn due(
    connection: &Connection,
    endpoint: &str,
    now: SystemTime,
    longest_wait: Duration,
    limit: usize,
) -> rusqlite::Result<DueDeliveries> {
    let connection = &list::snapshot(connection)?;
    let latest = now.checked_add(longest_wait).map_or(i64::MAX, micros);
    let mut deliveries = Vec::new();
    for (sql, time) in [(DUE, micros(now)), (TOO_LATE, latest)] {
        let limit = i64::try_from(limit - deliveries.len()).unwrap_or(i64::MAX);
        let mut read = connection.prepare_cached(sql)?;
        let mut found = read.query(params![endpoint, time, limit])?;
        while let Some(row) = found.next()? {
            let position = row.get::<_, i64>(0)?;
            if let Some(event) = list::event_at(connection, position)? {
                deliveries.push(DueDelivery {
                    position: position.unsigned_abs(),
                    event,
                    attempts: row.get(1)?,
                });
            }
        }
    }
    let next = connection
        .prepare_cached(NEXT)?
        .query_row(params![endpoint, micros(now), latest], |row| row.get(0))
        .optional()?;
    let next = next.and_then(|due| from_micros(due).duration_since(now).ok());
    Ok(DueDeliveries { deliveries, next })
}

/// Nothing is counted without a bound. The events behind a position have positions without a gap,
/// unless some were removed.
const STATES: &str = "SELECT name, position, stopped_at, held_until, \
     max((SELECT coalesce(max(seq), 0) FROM event) - position, 0), \
     (SELECT count(*) FROM (SELECT 1 FROM undelivered INDEXED BY undelivered_action \
     WHERE endpoint = endpoint.id AND given_up_at IS NULL LIMIT ?1)), \
     (SELECT count(*) FROM (SELECT 1 FROM undelivered INDEXED BY undelivered_dead \
     WHERE endpoint = endpoint.id AND given_up_at IS NOT NULL LIMIT ?1)), \
     (SELECT at FROM event WHERE seq > position ORDER BY seq LIMIT 1) \
     FROM endpoint ORDER BY name";

pub(super) fn endpoints(connection: &Connection) -> rusqlite::Result<Vec<EndpointState>> {
    let connection = &list::snapshot(connection)?;
    let mut read = connection.prepare_cached(STATES)?;
    let counted = i64::try_from(COUNTED).unwrap_or(i64::MAX);
    let found = read.query_map([counted], |row| {
        let count = |column| row.get(column).map(i64::unsigned_abs);
        Ok(EndpointState {
            name: row.get(0)?,
            position: count(1)?,
            stopped_at: time(row, 2)?,
            held_until: time(row, 3)?,
            behind: count(4)?,
            parked: count(5)?,
            dead: count(6)?,
            behind_since: time(row, 7)?,
        })
    })?;
    found.collect()
}

pub(super) fn dead_letters(
    connection: &Connection,
    endpoint: &str,
    limit: usize,
) -> rusqlite::Result<Vec<DeadLetter>> {
    let connection = &list::snapshot(connection)?;
    let limit = i64::try_from(limit).unwrap_or(i64::MAX);
    let mut read = connection.prepare_cached(select!(
        "endpoint = (SELECT id FROM endpoint WHERE name = ?1) AND given_up_at IS NOT NULL \
         ORDER BY event LIMIT ?2"
    ))?;
    let mut found = read.query(params![endpoint, limit])?;
    let mut letters = Vec::new();
    while let Some(row) = found.next()? {
        let dead = undelivered(row)?;
        let Standing::Dead(given_up_at) = dead.standing else {
            continue;
        };
        if let Some(event) = list::event_at(connection, seq(dead.position))? {
            letters.push(DeadLetter {
                position: dead.position,
                event,
                attempts: dead.attempts,
                parked_at: dead.since,
                given_up_at,
                failure: dead.failure.unwrap_or_default(),
            });
        }
    }
    Ok(letters)
}

/// Reads a database that a server may have open.
pub(super) fn read_beside<T>(
    path: &Path,
    read: impl FnOnce(&Connection) -> rusqlite::Result<T>,
) -> Result<T, StoreError> {
    let connection = verify::open(path)?;
    read(&connection).map_err(|error| {
        StoreError::unavailable(format!("the database {} cannot be read", path.display()))
            .with_source(error)
    })
}

/// Runs an operation on a database that a server may have open. That server learns of it when it
/// next looks.
pub(super) fn run_beside<O: Operation>(
    path: &Path,
    operation: &O,
) -> Result<O::Outcome, StoreError> {
    // Refuses what is no database, which the store would create.
    let beside = verify::open(path)?;
    let failed = |fault: Fault| {
        StoreError::unavailable(format!("the database {} takes no writes", path.display()))
            .with_source(fault.cause())
    };
    match lock::acquire(path) {
        Ok((location, _lock)) => {
            drop(beside);
            let writer = connection::first_writer(&location, &Repeats::default())?;
            let outcome = run(&writer, operation).map_err(failed)?;
            connection::close(writer).map_err(failed)?;
            Ok(outcome)
        }
        Err(error) if error.is_in_use() => {
            connection::set_up_beside(&beside).map_err(|error| failed(error.into()))?;
            // Whoever holds it may be moving it.
            match moved::read(&beside).map_err(|error| failed(error.into()))? {
                Some(mark) => Err(mark.refusal(path)),
                None => run(&beside, operation).map_err(failed),
            }
        }
        Err(error) => Err(error),
    }
}

fn run<O: Operation>(connection: &Connection, operation: &O) -> Result<O::Outcome, Fault> {
    let (repeats, clock) = (Repeats::default(), Clock::new());
    let mut transaction = Transaction::begin(connection, &repeats, &clock)?;
    let outcome = operation.apply(&mut transaction)?;
    transaction.commit()?;
    Ok(outcome)
}

#[cfg(test)]
mod tests {
    use rusqlite::StatementStatus;

    use super::*;
    use crate::store::sqlite::schema;

    /// How many steps it takes to read how endpoints stand, and how the first one does.
    fn steps(connection: &Connection) -> (i32, EndpointState) {
        let states = endpoints(connection).unwrap();
        let mut read = connection.prepare(STATES).unwrap();
        let mut rows = read.query([COUNTED as i64]).unwrap();
        while rows.next().unwrap().is_some() {}
        drop(rows);
        let steps = read.get_status(StatementStatus::VmStep);
        (steps, states.into_iter().next().unwrap())
    }

    #[test]
    fn reading_how_an_endpoint_stands_costs_little_however_much_it_has_not_received() {
        let connection = schema::built_in().unwrap();
        connection
            .execute_batch(
                "PRAGMA foreign_keys = OFF;
                 INSERT INTO endpoint (name, position) VALUES ('a', 0), ('b', 7);",
            )
            .unwrap();
        let add = |from: i64, to: i64| {
            let sql = "WITH RECURSIVE n (n) AS (SELECT ?1 UNION ALL SELECT n + 1 FROM n WHERE n < ?2) \
                 INSERT INTO event (seq, event_id, at, actor, kind, tenant_id, action, to_status) \
                 SELECT n, randomblob(16), n, 'alice', 'approved', 't', n, 'COMMITTED' FROM n";
            connection.execute(sql, [from, to]).unwrap();
        };
        let park = |from: i64, to: i64, given_up_at: Option<i64>| {
            let sql = "INSERT INTO undelivered (endpoint, event, action, parked_at, attempts, given_up_at) \
                 SELECT 1, seq, action, 1, 1, ?3 FROM event WHERE seq BETWEEN ?1 AND ?2";
            connection
                .execute(sql, params![from, to, given_up_at])
                .unwrap();
        };
        add(1, 100);
        let (few, state) = steps(&connection);
        assert_eq!((state.behind, state.parked, state.dead), (100, 0, 0));
        assert_eq!(state.behind_since, Some(from_micros(1)));
        add(101, 50_000);
        let (many, state) = steps(&connection);
        assert_eq!(state.behind, 50_000);
        assert!(many <= few, "{many} {few}");

        park(1, 9_000, None);
        park(9_001, 19_000, Some(1));
        let (most, state) = steps(&connection);
        assert_eq!((state.parked, state.dead), (9_000, 10_000));
        park(19_001, 30_000, None);
        park(30_001, 50_000, Some(1));
        let (more, state) = steps(&connection);
        assert_eq!((state.parked, state.dead), (10_000, 10_000));
        // Each of the 1,000 that are counted in addition takes a few.
        assert!(more - most < 20_000, "{more} {most}");
    }
}
