//! The table `chain`: the events of each tenant as a hash chain.
//!
//! The chain is extended behind the decisions: events are read and hashed on a reader's connection,
//! and the writer only inserts the result.

use std::borrow::Cow;
use std::collections::BTreeMap;

use rusqlite::types::ValueRef;
use rusqlite::{Connection, OptionalExtension, Row, params};
use uuid::Uuid;

use super::list::snapshot;
use super::rows::event_digest;
use crate::protocol::hex;
use crate::store::audit::{Entry, Hash, Run, origin};

/// Selects the columns that [`entry`] reads, in its order. What a submission says stands behind the
/// payload in the action's row, so it is read for the event of the submission alone.
macro_rules! select {
    ($rest:literal) => {
        concat!(
            "SELECT seq, event.tenant_id, event_id, kind, at, actor, event.call_id, from_status, to_status, \
             event.decision, event.execution, ", event_digest!(), ", request_id, thread_id, idempotency_key, \
             CASE kind WHEN 'submitted' THEN title END, CASE kind WHEN 'submitted' THEN expires_at END, \
             CASE kind WHEN 'submitted' THEN allow_edit END \
             FROM event LEFT JOIN action ON action.id = event.action WHERE ",
            $rest
        )
    };
}

pub(super) const NEXT: &str = select!("seq > ?1 ORDER BY seq LIMIT ?2");

/// The events of a tenant up to a position.
pub(super) const OF_TENANT: &str = select!("event.tenant_id = ?1 AND seq <= ?2 ORDER BY seq");

/// The event of a tenant at a position.
pub(super) const AT: &str = select!("seq = ?1 AND event.tenant_id = ?2");

/// The last run of a tenant's chain.
pub(super) const TIP: &str =
    "SELECT seq, hash FROM chain WHERE tenant_id = ?1 ORDER BY seq DESC LIMIT 1";

pub(super) const REACHED: &str = "SELECT max(event) FROM chain";

/// Returns the position up to which all events are chained, or 0. Only these may be removed.
///
/// This is one search of an index. In a transaction of the writer it stays true until the commit.
pub(super) fn reached(connection: &Connection) -> rusqlite::Result<i64> {
    connection
        .prepare_cached(REACHED)?
        .query_row([], |row| row.get::<_, Option<i64>>(0))
        .map(Option::unwrap_or_default)
}

/// The number and the hash of the last link of a tenant's chain.
pub(super) fn tip(connection: &Connection, tenant: &str) -> rusqlite::Result<(u64, Hash)> {
    let tip = connection
        .prepare_cached(TIP)?
        .query_row([tenant], |row| {
            Ok((row.get::<_, i64>(0)?.unsigned_abs(), row.get(1)?))
        })
        .optional()?;
    Ok(tip.unwrap_or_else(|| (0, origin(tenant))))
}

/// Links for the events behind a position.
#[derive(Debug)]
pub(super) struct Extension {
    /// Up to here the events were chained before.
    after: i64,
    runs: Vec<Run>,
    /// Whether more events may follow.
    pub(super) is_full: bool,
}

/// Chains some events in the writer's own transaction, if those up to `position` are not chained.
/// Returns the position up to which all are.
///
/// A sweep needs this where the retention is shorter than the chain is behind: after the upgrade of
/// a large database, and in tests.
pub(super) fn extend_towards(connection: &Connection, position: i64) -> rusqlite::Result<i64> {
    /// About a millisecond.
    const MOST: usize = 128;

    let reached_before = reached(connection)?;
    if reached_before >= position {
        return Ok(reached_before);
    }
    links_behind(connection, MOST)?.insert(connection)?;
    reached(connection)
}

/// Computes the links of up to `limit` events that are not chained.
pub(super) fn extension(connection: &Connection, limit: usize) -> rusqlite::Result<Extension> {
    links_behind(&*snapshot(connection)?, limit)
}

fn links_behind(connection: &Connection, limit: usize) -> rusqlite::Result<Extension> {
    let after = reached(connection)?;
    let mut runs: BTreeMap<String, Run> = BTreeMap::new();
    let mut read = connection.prepare_cached(NEXT)?;
    let most = i64::try_from(limit).unwrap_or(i64::MAX);
    let mut rows = read.query([after, most])?;
    let mut text = String::new();
    let mut count = 0;
    while let Some(row) = rows.next()? {
        count += 1;
        let mut entry = entry(row)?;
        let run = match runs.get_mut(&*entry.tenant_id) {
            Some(run) => run,
            None => {
                let tenant = entry.tenant_id.clone().into_owned();
                let tip = tip(connection, &tenant)?;
                runs.entry(tenant.clone())
                    .or_insert_with(|| Run::behind(tenant, tip))
            }
        };
        run.add(row.get(0)?, &mut entry, &mut text);
    }
    Ok(Extension {
        after,
        runs: runs.into_values().collect(),
        is_full: count >= limit,
    })
}

impl Extension {
    pub(super) fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// Inserts the links, unless others were inserted since they were computed.
    pub(super) fn insert(&self, connection: &Connection) -> rusqlite::Result<()> {
        if self.is_empty() || reached(connection)? != self.after {
            return Ok(());
        }
        let mut insert = connection.prepare_cached(
            "INSERT INTO chain (event, tenant_id, seq, links, hash) VALUES (?1, ?2, ?3, ?4, ?5)",
        )?;
        for run in &self.runs {
            let seq = i64::try_from(run.seq).unwrap_or(i64::MAX);
            insert.execute(params![run.position, run.tenant, seq, run.links, run.hash])?;
        }
        Ok(())
    }
}

/// Reads an event as an entry, whose number is still 0. Whatever an edit by hand has written into
/// the row, there is an entry: one row must not keep the others from being chained.
pub(super) fn entry<'a>(row: &'a Row<'_>) -> rusqlite::Result<Entry<'a>> {
    let must = |column| Ok::<_, rusqlite::Error>(text(row, column)?.unwrap_or_default());
    Ok(Entry {
        seq: 0,
        tenant_id: must(1)?,
        id: bytes(row, 2)?.unwrap_or_default(),
        kind: must(3)?,
        at: row.get(4)?,
        actor: must(5)?,
        call_id: text(row, 6)?,
        from_status: text(row, 7)?,
        to_status: must(8)?,
        decision: text(row, 9)?,
        execution: text(row, 10)?,
        digest: bytes(row, 11)?,
        request_id: bytes(row, 12)?,
        thread_id: text(row, 13)?,
        idempotency_key: text(row, 14)?,
        title: text(row, 15)?,
        expires_at: row.get(16)?,
        allow_edit: row.get(17)?,
    })
}

/// A column as text; a UUID in its usual form.
fn text<'a>(row: &'a Row<'_>, column: usize) -> rusqlite::Result<Option<Cow<'a, str>>> {
    Ok(match row.get_ref(column)? {
        ValueRef::Null => None,
        ValueRef::Text(text) => Some(String::from_utf8_lossy(text)),
        ValueRef::Blob(bytes) => Some(match Uuid::from_slice(bytes) {
            Ok(id) => id.to_string().into(),
            Err(_) => hex(bytes).into(),
        }),
        ValueRef::Integer(number) => Some(number.to_string().into()),
        ValueRef::Real(number) => Some(number.to_string().into()),
    })
}

fn bytes<'a>(row: &'a Row<'_>, column: usize) -> rusqlite::Result<Option<Cow<'a, [u8]>>> {
    Ok(match row.get_ref(column)? {
        ValueRef::Blob(bytes) => Some(bytes.into()),
        _ => None,
    })
}
