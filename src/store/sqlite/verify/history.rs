//! The history of an action: its events in order, and the state that they lead to.

use rusqlite::Row;

use crate::protocol::{Closed, Decision, EventKind, Execution, Status};
use crate::store::operation::Record;
use crate::store::sqlite::rows::{self, event_digest};

/// Selects the columns that [`Event::of`] reads, in the order in which events are folded.
pub(super) const EVENTS: &str = concat!(
    "SELECT event.action, seq, at, kind, from_status, to_status, event.decision, event.execution, \
     event.call_id, actor, event.tenant_id, ",
    event_digest!(),
    " FROM event LEFT JOIN action ON action.id = event.action ORDER BY event.action, seq"
);

/// An event as far as it changes the state.
pub(super) struct Event {
    pub(super) action: i64,
    pub(super) seq: i64,
    at: i64,
    kind: String,
    from: Option<String>,
    to: String,
    decision: Option<String>,
    execution: Option<String>,
    call_id: Option<String>,
    actor: String,
    tenant: String,
    digest: Option<[u8; 32]>,
}

impl Event {
    pub(super) fn of(row: &Row<'_>) -> rusqlite::Result<Self> {
        Ok(Self {
            action: row.get(0)?,
            seq: row.get(1)?,
            at: row.get(2)?,
            kind: row.get(3)?,
            from: row.get(4)?,
            to: row.get(5)?,
            decision: row.get(6)?,
            execution: row.get(7)?,
            call_id: rows::call_id(row, 8)?,
            actor: row.get(9)?,
            tenant: row.get(10)?,
            digest: row.get(11)?,
        })
    }
}

/// The state of an action after an event.
#[derive(Debug, Clone)]
pub(super) struct State {
    created_at: i64,
    tenant: String,
    submitted_by: Option<String>,
    status: Status,
    decided: Option<Decided>,
    execution: Option<Execution>,
    /// What was submitted or decided on last. Events of schema version 5 do not say.
    digest: Option<[u8; 32]>,
}

/// The decision in force: what, when, by whom and by which call.
#[derive(Debug, Clone)]
struct Decided {
    decision: Decision,
    closed: Option<Closed>,
    at: i64,
    by: String,
    call_id: Option<String>,
}

/// Takes a state to the next one. `None` if the event does not follow from the state.
pub(super) fn fold(state: Option<State>, event: &Event) -> Option<State> {
    let from = state.as_ref().map(|state| state.status);
    if event.from.as_deref() != from.map(Status::as_str) {
        return None;
    }
    let kind = event.kind.parse::<EventKind>().ok()?;
    let decided = |decision, closed| Decided {
        decision,
        closed,
        at: event.at,
        by: event.actor.clone(),
        call_id: event.call_id.clone(),
    };
    let first = || State {
        created_at: event.at,
        tenant: event.tenant.clone(),
        submitted_by: None,
        status: Status::Pending,
        decided: None,
        execution: None,
        digest: event.digest,
    };
    let next = match (kind, from, state) {
        (EventKind::Submitted, None, None) => State {
            submitted_by: Some(event.actor.clone()),
            ..first()
        },
        (
            EventKind::Approved | EventKind::Rejected,
            None | Some(Status::Pending | Status::Failed),
            state,
        ) => {
            let decision = match kind {
                EventKind::Approved => Decision::Approve,
                _ => Decision::Reject,
            };
            let state = state.unwrap_or_else(first);
            State {
                status: Status::Committed,
                decided: Some(decided(decision, None)),
                execution: None,
                digest: event.digest.or(state.digest),
                ..state
            }
        }
        (EventKind::Expired | EventKind::Cancelled, Some(Status::Pending), Some(state)) => {
            let closed = match kind {
                EventKind::Expired => Closed::Expired,
                _ => Closed::Cancelled,
            };
            State {
                status: Status::Committed,
                decided: Some(decided(Decision::Reject, Some(closed))),
                ..state
            }
        }
        (EventKind::Claimed, Some(Status::Committed), Some(state))
            if state.decision() == Some(Decision::Approve) && state.execution.is_none() =>
        {
            State {
                execution: Some(Execution::Claimed),
                ..state
            }
        }
        (
            EventKind::Completed | EventKind::Failed | EventKind::ClaimLost,
            Some(Status::Committed),
            Some(state),
        ) if state.execution == Some(Execution::Claimed) => {
            let (status, execution) = match kind {
                EventKind::Completed => (Status::Committed, Execution::Completed),
                EventKind::Failed => (Status::Failed, Execution::Failed),
                _ => (Status::Failed, Execution::Unknown),
            };
            State {
                status,
                execution: Some(execution),
                ..state
            }
        }
        _ => return None,
    };
    let says_so = event.to == next.status.as_str()
        && event.decision.as_deref() == next.decision().map(Decision::as_str)
        && event.execution.as_deref() == next.execution.map(Execution::as_str)
        && event.tenant == next.tenant
        && event.at >= next.created_at;
    says_so.then_some(next)
}

impl State {
    fn decision(&self) -> Option<Decision> {
        self.decided.as_ref().map(|decided| decided.decision)
    }

    /// Returns what an action's row says otherwise than its events.
    pub(super) fn contradicted_by(&self, record: &Record) -> Option<&'static str> {
        let action = &record.action;
        let decided = self.decided.as_ref();
        let call_id = decided.and_then(|decided| decided.call_id.as_deref());
        let by = decided.map(|decided| decided.by.as_str());
        let tenant = action.tenant_id.as_ref().map(|tenant| tenant.as_str());
        [
            ("status", action.status == self.status),
            ("decision", action.decision == self.decision()),
            ("execution", action.execution == self.execution),
            (
                "closing",
                action.closed == decided.and_then(|decided| decided.closed),
            ),
            (
                "creation time",
                action.created_at.map(rows::micros) == Some(self.created_at),
            ),
            (
                "decision time",
                action.decided_at.map(rows::micros) == decided.map(|decided| decided.at),
            ),
            ("call id", record.call_id.as_deref() == call_id),
            ("submitter", record.submitted_by == self.submitted_by),
            ("reviewer", action.decided_by.as_deref() == by),
            ("tenant", tenant == Some(&*self.tenant)),
            (
                "digest",
                self.digest.is_none_or(|digest| {
                    action.digest.map(|digest| *digest.as_bytes()) == Some(digest)
                }),
            ),
        ]
        .into_iter()
        .find_map(|(what, agrees)| (!agrees).then_some(what))
    }
}
