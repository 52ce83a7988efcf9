//! The history of an action: its events in order, and the state that they lead to.

use rusqlite::Row;

use crate::protocol::{Decision, Status};
use crate::store::operation::Record;
use crate::store::sqlite::rows;

/// Selects the columns that [`Event::of`] reads, in the order in which events are folded.
pub(super) const EVENTS: &str = "SELECT action, seq, at, verb, from_status, to_status, decision, \
                                 execution, call_id FROM event ORDER BY action, seq";

/// An event as far as it changes the state.
pub(super) struct Event {
    pub(super) action: i64,
    pub(super) seq: i64,
    at: i64,
    verb: String,
    from: Option<String>,
    to: String,
    decision: Option<String>,
    execution: Option<String>,
    call_id: Option<String>,
}

impl Event {
    pub(super) fn of(row: &Row<'_>) -> rusqlite::Result<Self> {
        Ok(Self {
            action: row.get(0)?,
            seq: row.get(1)?,
            at: row.get(2)?,
            verb: row.get(3)?,
            from: row.get(4)?,
            to: row.get(5)?,
            decision: row.get(6)?,
            execution: row.get(7)?,
            call_id: rows::call_id(row, 8)?,
        })
    }
}

/// The state of an action after its first event.
#[derive(Debug, Clone)]
pub(super) struct State {
    created_at: i64,
    status: Status,
    /// The decision, when it was made, and by which call.
    decided: Option<(Decision, i64, Option<String>)>,
}

/// Takes a state to the next one. `None` if the event does not follow from the state.
pub(super) fn fold(state: Option<State>, event: &Event) -> Option<State> {
    let from = state.as_ref().map(|state| state.status);
    if event.from.as_deref() != from.map(Status::as_str) {
        return None;
    }
    let created_at = state.as_ref().map_or(event.at, |state| state.created_at);
    let (status, decided) = match (event.verb.parse::<Decision>(), from) {
        (Err(_), None) if event.verb == "submit" => (Status::Pending, None),
        (Ok(decision), None | Some(Status::Pending | Status::Failed)) => {
            let decided = (decision, event.at, event.call_id.clone());
            (Status::Committed, Some(decided))
        }
        _ => return None,
    };
    let decision = decided.as_ref().map(|(decision, ..)| decision.as_str());
    let says_so = event.to == status.as_str()
        && event.decision.as_deref() == decision
        && event.execution.is_none()
        && event.at >= created_at;
    says_so.then_some(State {
        created_at,
        status,
        decided,
    })
}

impl State {
    /// Returns what an action's row says otherwise than its events.
    pub(super) fn contradicted_by(&self, record: &Record) -> Option<&'static str> {
        let action = &record.action;
        let decision = self.decided.as_ref().map(|(decision, ..)| *decision);
        let decided_at = self.decided.as_ref().map(|(_, at, _)| *at);
        let call_id = self.decided.as_ref().and_then(|(.., call)| call.as_deref());
        [
            ("status", action.status == self.status),
            ("decision", action.decision == decision),
            ("execution", action.execution.is_none()),
            ("closing", !record.closed),
            (
                "creation time",
                action.created_at.map(rows::micros) == Some(self.created_at),
            ),
            (
                "decision time",
                action.decided_at.map(rows::micros) == decided_at,
            ),
            ("call id", record.call_id.as_deref() == call_id),
        ]
        .into_iter()
        .find_map(|(what, agrees)| (!agrees).then_some(what))
    }
}
