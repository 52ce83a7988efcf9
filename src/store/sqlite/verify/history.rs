//! The history of an action, as the file has it.

use rusqlite::Row;

use crate::protocol::Digest;
use crate::store::audit::history::{Event, Shown};
use crate::store::operation::Record;
use crate::store::sqlite::rows::{self, event_digest};

/// Selects the columns that [`event`] reads, in the order in which events are folded.
pub(super) const EVENTS: &str = concat!(
    "SELECT event.action, seq, at, kind, from_status, to_status, event.decision, event.execution, \
     event.call_id, actor, event.tenant_id, ",
    event_digest!(),
    " FROM event LEFT JOIN action ON action.id = event.action ORDER BY event.action, seq"
);

/// Reads an event, and the number of its action.
pub(super) fn event(row: &Row<'_>) -> rusqlite::Result<(i64, Event)> {
    let event = Event {
        number: row.get(1)?,
        at: row.get(2)?,
        kind: row.get(3)?,
        from: row.get(4)?,
        to: row.get(5)?,
        decision: row.get(6)?,
        execution: row.get(7)?,
        call_id: rows::call_id(row, 8)?,
        actor: row.get(9)?,
        tenant: row.get(10)?,
        digest: row.get::<_, Option<[u8; 32]>>(11)?.map(Into::into),
    };
    Ok((row.get(0)?, event))
}

/// What a record says that its events say, too.
pub(super) fn shown(record: &Record) -> Shown<'_> {
    let action = &record.action;
    let is_edited = action.edited_payload.is_some();
    let edited = action.digest.as_ref().filter(|_| is_edited);
    Shown {
        tenant: action.tenant_id.as_ref().map(|tenant| tenant.as_str()),
        status: action.status.as_str(),
        decision: action.decision.map(|decision| decision.as_str()),
        execution: action.execution.map(|execution| execution.as_str()),
        closed: action.closed.map(|closed| closed.as_str()),
        created_at: action.created_at.map(rows::micros),
        decided_at: action.decided_at.map(rows::micros),
        call_id: record.call_id.as_deref(),
        submitted_by: record.submitted_by.as_deref(),
        decided_by: action.decided_by.as_deref(),
        digest: record.submitted_digest.as_ref().map(bytes),
        edited_digest: edited.map(bytes),
    }
}

fn bytes(digest: &Digest) -> &[u8] {
    digest.as_bytes()
}
