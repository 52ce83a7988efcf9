//! Actions as rows.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rusqlite::types::{ToSql, ToSqlOutput, Type, ValueRef};
use rusqlite::{Connection, OptionalExtension, Row, params};
use uuid::Uuid;

use super::repeats::Repeats;
use crate::protocol::{Action, Digest, JsonText, Payload, RequestId, TenantId};
use crate::store::Identity;
use crate::store::operation::{Lease, Record};

/// Selects the columns that [`record`] reads, in its order.
macro_rules! select {
    ($rest:literal) => {
        select!($rest, "payload", "edited_payload", "comment", "result", "reason")
    };
    ($rest:literal, $payload:literal, $edited:literal, $comment:literal, $result:literal, $reason:literal) => {
        concat!(
            "SELECT id, request_id, tenant_id, thread_id, idempotency_key, status, decision, execution, closed, \
             digest, ", $payload, ", edited_digest, ", $edited, ", ", $comment, ", title, expires_at, allow_edit, \
             submitted_by, decided_by, ", $result, ", ", $reason, ", call_id, created_at, decided_at \
             FROM action WHERE ",
            $rest
        )
    };
}

/// What `event.digest` holds instead of a copy of the digest of the submitted payload, which the
/// action has for good.
pub(super) const AS_SUBMITTED: &[u8] = &[];

/// Selects the digest of an event that is joined with its action.
macro_rules! event_digest {
    () => {
        "CASE event.digest WHEN x'' THEN action.digest ELSE event.digest END"
    };
}

pub(super) use event_digest;

/// Selects all actions, for [`record`].
pub(super) const ALL: &str = select!("true ORDER BY id");

pub(super) fn by_identity(
    connection: &Connection,
    identity: &Identity,
) -> rusqlite::Result<Option<Record>> {
    connection
        .prepare_cached(select!(
            "identity = ?1 AND tenant_id = ?2 AND thread_id = ?3 AND idempotency_key = ?4"
        ))?
        .query_row(
            params![
                identity.digest(),
                identity.tenant_id.as_str(),
                identity.thread_id.as_str(),
                identity.idempotency_key.as_str()
            ],
            record,
        )
        .optional()
}

/// Finds a tenant's record by the store's id.
pub(super) fn by_request_id(
    connection: &Connection,
    id: Uuid,
    tenant: &TenantId,
) -> rusqlite::Result<Option<Record>> {
    connection
        .prepare_cached(select!("request_id = ?1 AND tenant_id = ?2"))?
        .query_row(params![id.as_bytes(), tenant.as_str()], record)
        .optional()
}

/// Reads the record in a row of the table.
pub(super) fn by_row(connection: &Connection, row: i64) -> rusqlite::Result<Option<Record>> {
    connection
        .prepare_cached(select!("id = ?1"))?
        .query_row([row], record)
        .optional()
}

/// Reads the newest claim on the action in a row.
pub(super) fn lease(connection: &Connection, row: i64) -> rusqlite::Result<Option<Lease>> {
    connection
        .prepare_cached("SELECT token, fence, until, actor, call_id FROM claim WHERE action = ?1")?
        .query_row([row], |row| {
            Ok(Lease {
                token: Uuid::from_bytes(row.get(0)?),
                fence: row.get(1)?,
                until: row.get::<_, Option<i64>>(2)?.map(from_micros),
                actor: row.get(3)?,
                call_id: call_id(row, 4)?,
            })
        })
        .optional()
}

pub(super) const DUE: &str = "SELECT id FROM (SELECT id FROM action WHERE status = 'PENDING' \
     AND expires_at IS NOT NULL AND expires_at <= ?1 ORDER BY expires_at LIMIT ?2) \
     UNION ALL \
     SELECT action FROM (SELECT action FROM claim WHERE until IS NOT NULL AND until <= ?1 \
     ORDER BY until LIMIT ?2)";

/// The condition on the type lets SQLite use the partial index.
pub(super) const BY_CALL: &str = "SELECT action FROM event WHERE call_id = ?1 \
     AND typeof(call_id) = 'blob' AND (?2 IS NULL OR tenant_id = ?2)";

/// Whether a call made a transition of a kind, of the action in a row.
pub(super) const HAS_MADE: &str =
    "SELECT 1 FROM event WHERE action = ?1 AND kind = ?2 AND call_id = ?3 LIMIT 1";

/// Finds the rows of up to `limit` actions that are due: pending and over, or claimed beyond the
/// lease.
pub(super) fn due(
    connection: &Connection,
    now: SystemTime,
    limit: usize,
) -> rusqlite::Result<Vec<i64>> {
    let limit = i64::try_from(limit).unwrap_or(i64::MAX);
    let mut over = connection.prepare_cached(DUE)?;
    let rows = over.query_map([micros(now), limit], |row| row.get(0))?;
    rows.collect()
}

/// Finds a record by the store's id, or else by a call id that names exactly one action, within a
/// tenant or among all.
pub(super) fn by_id(
    connection: &Connection,
    repeats: &Repeats,
    id: Uuid,
    tenant: Option<&TenantId>,
) -> rusqlite::Result<Option<Record>> {
    let tenant = tenant.map(TenantId::as_str);
    let found = connection
        .prepare_cached(select!(
            "request_id = ?1 AND (?2 IS NULL OR tenant_id = ?2)"
        ))?
        .query_row(params![id.as_bytes(), tenant], record)
        .optional()?;
    if found.is_some() {
        return Ok(found);
    }
    let named = match by_call(connection, id, tenant)? {
        // Calls on record come first, so that no repeated call can hide them.
        Named::Nothing => by_repeat(connection, repeats, id, tenant)?,
        named => named,
    };
    let Named::One(row) = named else {
        return Ok(None);
    };
    by_row(connection, row)
}

/// The rows that a call id names.
enum Named {
    Nothing,
    One(i64),
    Several,
}

impl Named {
    fn of(mut rows: impl Iterator<Item = rusqlite::Result<i64>>) -> rusqlite::Result<Self> {
        let Some(one) = rows.next().transpose()? else {
            return Ok(Self::Nothing);
        };
        for other in rows {
            if other? != one {
                return Ok(Self::Several);
            }
        }
        Ok(Self::One(one))
    }
}

/// Looks among the calls that made a transition.
fn by_call(connection: &Connection, call: Uuid, tenant: Option<&str>) -> rusqlite::Result<Named> {
    let mut rows = connection.prepare_cached(BY_CALL)?;
    Named::of(rows.query_map(params![call.as_bytes(), tenant], |row| row.get(0))?)
}

/// Looks among the calls that changed nothing.
fn by_repeat(
    connection: &Connection,
    repeats: &Repeats,
    call: Uuid,
    tenant: Option<&str>,
) -> rusqlite::Result<Named> {
    let mut is_of = connection
        .prepare_cached("SELECT id FROM action WHERE id = ?1 AND (?2 IS NULL OR tenant_id = ?2)")?;
    let rows = repeats.of(call).into_iter();
    let rows = rows.filter_map(|row| {
        let row = is_of.query_row(params![row, tenant], |row| row.get(0));
        row.optional().transpose()
    });
    Named::of(rows)
}

pub(super) fn record(row: &Row<'_>) -> rusqlite::Result<Record> {
    let request_id = Uuid::from_bytes(row.get(1)?);
    let submitted_digest = row.get::<_, Option<[u8; 32]>>(9)?.map(Digest::from);
    let edited_digest = row.get::<_, Option<[u8; 32]>>(11)?.map(Digest::from);
    let mut action = Action::new(RequestId::from(request_id), text(row, 5)?);
    action.tenant_id = Some(text(row, 2)?);
    action.thread_id = Some(text(row, 3)?);
    action.idempotency_key = Some(text(row, 4)?);
    action.decision = optional_text(row, 6)?;
    action.execution = optional_text(row, 7)?;
    action.closed = optional_text(row, 8)?;
    action.digest = edited_digest.or(submitted_digest);
    action.payload = json(row, 10, Payload::from_json)?;
    action.edited_payload = json(row, 12, Payload::from_json)?;
    action.comment = row.get(13)?;
    action.title = row.get(14)?;
    action.expires_at = row.get::<_, Option<i64>>(15)?.map(from_micros);
    action.allow_edit = row.get(16)?;
    action.decided_by = row.get(18)?;
    action.result = json(row, 19, JsonText::from_json)?;
    action.reason = row.get(20)?;
    action.created_at = Some(from_micros(row.get(22)?));
    action.decided_at = row.get::<_, Option<i64>>(23)?.map(from_micros);
    Ok(Record {
        row: row.get(0)?,
        action,
        submitted_digest,
        submitted_by: row.get(17)?,
        call_id: call_id(row, 21)?,
    })
}

/// Reads an action as [`Action::listed`] leaves it. A page of them must not read what it leaves
/// out, which is up to half a megabyte for each.
pub(super) fn listed(connection: &Connection, row: i64) -> rusqlite::Result<Option<Action>> {
    Ok(outline(connection, row)?.map(|record| record.action))
}

/// Reads the record in a row of the table as [`listed`] reads its action.
pub(super) fn outline(connection: &Connection, row: i64) -> rusqlite::Result<Option<Record>> {
    connection
        .prepare_cached(select!("id = ?1", "NULL", "NULL", "NULL", "NULL", "NULL"))?
        .query_row([row], record)
        .optional()
}

/// Reads a column of JSON.
fn json<T>(
    row: &Row<'_>,
    column: usize,
    parse: fn(&str) -> Result<T, serde_json::Error>,
) -> rusqlite::Result<Option<T>> {
    match row.get_ref(column)? {
        ValueRef::Null => Ok(None),
        json => parse(json.as_str()?)
            .map(Some)
            .map_err(|error| unreadable(column, error)),
    }
}

pub(super) fn text<T>(row: &Row<'_>, column: usize) -> rusqlite::Result<T>
where
    T: std::str::FromStr<Err: std::error::Error + Send + Sync + 'static>,
{
    row.get_ref(column)?
        .as_str()?
        .parse()
        .map_err(|error| unreadable(column, error))
}

pub(super) fn optional_text<T>(row: &Row<'_>, column: usize) -> rusqlite::Result<Option<T>>
where
    T: std::str::FromStr<Err: std::error::Error + Send + Sync + 'static>,
{
    match row.get_ref(column)? {
        ValueRef::Null => Ok(None),
        _ => text(row, column).map(Some),
    }
}

pub(super) fn call_id(row: &Row<'_>, column: usize) -> rusqlite::Result<Option<String>> {
    match row.get_ref(column)? {
        ValueRef::Null => Ok(None),
        ValueRef::Blob(bytes) => {
            let uuid = Uuid::from_slice(bytes).map_err(|error| unreadable(column, error))?;
            Ok(Some(uuid.to_string()))
        }
        other => Ok(Some(other.as_str()?.to_owned())),
    }
}

/// The error of a value that only an edit by hand can have written.
fn unreadable(
    column: usize,
    error: impl std::error::Error + Send + Sync + 'static,
) -> rusqlite::Error {
    rusqlite::Error::FromSqlConversionFailure(column, Type::Text, Box::new(error))
}

/// A call id as a column: a UUID as 16 bytes instead of its 36 characters, any other id as text.
pub(super) enum CallId<'a> {
    None,
    Uuid(Uuid),
    Text(&'a str),
}

impl<'a> CallId<'a> {
    pub(super) fn of(id: Option<&'a str>) -> Self {
        id.map_or(Self::None, |id| {
            Uuid::try_parse(id).map_or(Self::Text(id), Self::Uuid)
        })
    }
}

impl ToSql for CallId<'_> {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        Ok(ToSqlOutput::Borrowed(match self {
            Self::None => ValueRef::Null,
            Self::Uuid(id) => ValueRef::Blob(id.as_bytes()),
            Self::Text(id) => ValueRef::Text(id.as_bytes()),
        }))
    }
}

/// A time in the form of the database: microseconds since 1970.
pub(super) fn micros(time: SystemTime) -> i64 {
    match time.duration_since(UNIX_EPOCH) {
        Ok(since) => i64::try_from(since.as_micros()).unwrap_or(i64::MAX),
        Err(before) => {
            i64::try_from(before.duration().as_micros()).map_or(i64::MIN, i64::wrapping_neg)
        }
    }
}

pub(super) fn from_micros(micros: i64) -> SystemTime {
    let distance = Duration::from_micros(micros.unsigned_abs());
    let time = if micros < 0 {
        UNIX_EPOCH.checked_sub(distance)
    } else {
        UNIX_EPOCH.checked_add(distance)
    };
    time.unwrap_or(UNIX_EPOCH)
}
