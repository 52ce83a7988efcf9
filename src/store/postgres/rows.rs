//! Actions as rows.

use std::borrow::Cow;
use std::error::Error as StdError;
use std::fmt;
use std::str::FromStr;
use std::time::{Duration, SystemTime};

use tokio_postgres::Row;
use tokio_postgres::types::FromSql;
use uuid::Uuid;

use super::fault::unreadable;
use crate::protocol::{Action, Digest, Event, JsonText, Payload, RequestId};
use crate::store::StoreError;
use crate::store::operation::{Lease, LeftIn, Record, Tombstone};

/// The columns that [`record`] reads, of a table or alias `a`.
macro_rules! columns {
    () => {
        concat!(
            "a.request_id, a.tenant_id, a.thread_id, a.idempotency_key, a.status, a.decision, a.execution, a.closed, \
             a.digest, a.edited_digest, a.title, a.expires_at, a.allow_edit, a.submitted_by, a.decided_by, a.call_id, \
             a.created_at, a.decided_at, a.events, a.removed_at, a.payload, a.edited_payload, a.comment, a.result, a.reason"
        )
    };
    // Without what can be large: a page must not read it.
    (listed) => {
        concat!(
            "a.request_id, a.tenant_id, a.thread_id, a.idempotency_key, a.status, a.decision, a.execution, a.closed, \
             a.digest, a.edited_digest, a.title, a.expires_at, a.allow_edit, a.submitted_by, a.decided_by, a.call_id, \
             a.created_at, a.decided_at, a.events"
        )
    };
}

pub(super) use columns;

/// The columns that [`event`] reads, of an alias `e`.
pub(super) const EVENT: &str = "e.event_id, e.kind, e.at, e.actor, e.to_status, \
     e.decision AS event_decision, e.execution AS event_execution";

/// Marks U+0000 in text, which PostgreSQL cannot keep.
const MARK: char = '\u{2400}';

/// Free text in the form of the database.
pub(in crate::store) fn kept(text: &str) -> Cow<'_, str> {
    if !text.contains(['\0', MARK]) {
        return Cow::Borrowed(text);
    }
    let mut kept = String::with_capacity(text.len() + 3);
    for letter in text.chars() {
        match letter {
            '\0' => kept.extend([MARK, '0']),
            MARK => kept.extend([MARK, MARK]),
            letter => kept.push(letter),
        }
    }
    Cow::Owned(kept)
}

/// Free text as it was before it was [kept].
pub(super) fn given(kept: String) -> String {
    if !kept.contains(MARK) {
        return kept;
    }
    let mut given = String::with_capacity(kept.len());
    let mut letters = kept.chars();
    while let Some(letter) = letters.next() {
        given.push(match letter {
            MARK => match letters.next() {
                Some('0') => '\0',
                _ => MARK,
            },
            letter => letter,
        });
    }
    given
}

/// The end of the year 9999, in seconds since 1970.
const LAST: u64 = 253_402_300_799;

/// A time in the range of the database. No later time is over any sooner.
pub(super) fn kept_time(time: SystemTime) -> SystemTime {
    time.min(SystemTime::UNIX_EPOCH + Duration::from_secs(LAST))
}

pub(super) fn get<'a, T: FromSql<'a>>(row: &'a Row, name: &str) -> Result<T, StoreError> {
    row.try_get(name).map_err(unreadable)
}

/// Reads a column of free text.
pub(super) fn free_text(row: &Row, name: &str) -> Result<Option<String>, StoreError> {
    Ok(get::<Option<String>>(row, name)?.map(given))
}

/// The same without a copy, where it is kept as it was.
pub(super) fn free<'a>(row: &'a Row, name: &str) -> Result<Option<Cow<'a, str>>, StoreError> {
    let text: Option<&str> = get(row, name)?;
    Ok(text.map(|text| match text.contains(MARK) {
        true => given(text.to_owned()).into(),
        false => text.into(),
    }))
}

/// Reads a column of words or names.
pub(super) fn word<T>(row: &Row, name: &str) -> Result<T, StoreError>
where
    T: FromStr<Err: StdError + Send + Sync + 'static>,
{
    get::<&str>(row, name)?.parse().map_err(unreadable)
}

pub(super) fn optional_word<T>(row: &Row, name: &str) -> Result<Option<T>, StoreError>
where
    T: FromStr<Err: StdError + Send + Sync + 'static>,
{
    let word: Option<&str> = get(row, name)?;
    word.map(|word| word.parse().map_err(unreadable))
        .transpose()
}

fn digest(row: &Row, name: &str) -> Result<Option<Digest>, StoreError> {
    let bytes: Option<&[u8]> = get(row, name)?;
    let bytes = bytes.map(<[u8; 32]>::try_from).transpose();
    Ok(bytes.map_err(unreadable)?.map(Digest::from))
}

/// Reads a column of JSON, which a row of a list does not have.
fn json<T>(
    row: &Row,
    name: &str,
    parse: fn(&str) -> Result<T, serde_json::Error>,
) -> Result<Option<T>, StoreError> {
    let text: Option<&str> = get(row, name)?;
    text.map(parse).transpose().map_err(unreadable)
}

/// A number of a count, which is never negative.
pub(super) fn count(row: &Row, name: &str) -> Result<u64, StoreError> {
    Ok(get::<i64>(row, name)?.unsigned_abs())
}

/// Reads a record, and the number of its events. `number` becomes the number of its row.
pub(super) fn record(row: &Row, number: i64) -> Result<(Record, i32), StoreError> {
    let (mut record, events) = listed_record(row, number)?;
    let action = &mut record.action;
    action.payload = json(row, "payload", Payload::from_json)?;
    action.edited_payload = json(row, "edited_payload", Payload::from_json)?;
    action.comment = free_text(row, "comment")?;
    action.result = json(row, "result", JsonText::from_json)?;
    action.reason = free_text(row, "reason")?;
    Ok((record, events))
}

pub(super) fn action(row: &Row) -> Result<Action, StoreError> {
    Ok(record(row, 0)?.0.action)
}

/// Reads an action as [`Action::listed`] leaves it.
pub(super) fn listed(row: &Row) -> Result<Action, StoreError> {
    Ok(listed_record(row, 0)?.0.action)
}

/// Reads a record without what can be large.
pub(super) fn listed_record(row: &Row, number: i64) -> Result<(Record, i32), StoreError> {
    let request_id: Uuid = get(row, "request_id")?;
    let submitted_digest = digest(row, "digest")?;
    let edited_digest = digest(row, "edited_digest")?;
    let mut action = Action::new(RequestId::from(request_id), word(row, "status")?);
    action.tenant_id = Some(word(row, "tenant_id")?);
    action.thread_id = Some(word(row, "thread_id")?);
    action.idempotency_key = Some(word(row, "idempotency_key")?);
    action.decision = optional_word(row, "decision")?;
    action.execution = optional_word(row, "execution")?;
    action.closed = optional_word(row, "closed")?;
    action.digest = edited_digest.or(submitted_digest);
    action.title = free_text(row, "title")?;
    action.expires_at = get(row, "expires_at")?;
    action.allow_edit = get(row, "allow_edit")?;
    action.decided_by = free_text(row, "decided_by")?;
    action.created_at = get(row, "created_at")?;
    action.decided_at = get(row, "decided_at")?;
    let record = Record {
        row: number,
        action,
        submitted_digest,
        submitted_by: free_text(row, "submitted_by")?,
        call_id: get(row, "call_id")?,
    };
    Ok((record, get(row, "events")?))
}

/// Reads what stayed of an action, if it was removed.
pub(super) fn tombstone(row: &Row) -> Result<Option<Tombstone>, StoreError> {
    let removed_at: Option<SystemTime> = get(row, "removed_at")?;
    if removed_at.is_none() {
        return Ok(None);
    }
    Ok(Some(Tombstone {
        request_id: get(row, "request_id")?,
        decision: word(row, "decision")?,
        execution: optional_word(row, "execution")?,
        closed: optional_word(row, "closed")?,
        submitted_digest: digest(row, "digest")?,
        edited_digest: digest(row, "edited_digest")?,
        created_at: get(row, "created_at")?,
        decided_at: get(row, "decided_at")?,
    }))
}

/// Reads the newest claim on an action.
pub(super) fn lease(row: &Row) -> Result<Lease, StoreError> {
    Ok(Lease {
        token: get(row, "token")?,
        fence: get(row, "fence")?,
        until: get(row, "until")?,
        actor: free_text(row, "actor")?.unwrap_or_default(),
        call_id: get(row, "call_id")?,
    })
}

/// Reads an event without its action.
pub(super) fn event(row: &Row) -> Result<Event, StoreError> {
    let id: Uuid = get(row, "event_id")?;
    let at: SystemTime = get(row, "at")?;
    let actor = free_text(row, "actor")?.unwrap_or_default();
    Ok(Event::new(
        RequestId::from(id),
        word(row, "kind")?,
        at,
        actor,
    ))
}

/// Reads an event with its action, as the event left it.
pub(super) fn shown_event(row: &Row) -> Result<Event, StoreError> {
    let mut event = event(row)?;
    let left_in = LeftIn {
        status: word(row, "to_status")?,
        decision: optional_word(row, "event_decision")?,
        execution: optional_word(row, "event_execution")?,
    };
    event.action = Some(Box::new(left_in.shown(listed(row)?, &event)));
    Ok(event)
}

/// A position, or a number of rows, as the database has it.
pub(super) fn number(number: impl TryInto<i64>) -> i64 {
    number.try_into().unwrap_or(i64::MAX)
}

/// A display for the plan of a statement in errors.
#[derive(Debug)]
pub(super) struct Bug(pub(super) &'static str);

impl fmt::Display for Bug {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the operation needs what was not read: {}", self.0)
    }
}

impl StdError for Bug {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_text_is_given_back_as_it_was() {
        for text in [
            "",
            "plain",
            "\0",
            "a\0b",
            "\u{2400}",
            "\u{2400}0",
            "\0\u{2400}\u{2400}0\0",
        ] {
            let kept = kept(text);
            assert!(!kept.contains('\0'));
            assert_eq!(given(kept.into_owned()), text);
        }
    }
}
