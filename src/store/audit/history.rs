//! The history of an action: its events in order, and the state that they lead to.

use crate::protocol::{Closed, Decision, EventKind, Execution, Status};

/// An event as far as it changes the state, in the words of the database. Times are microseconds
/// since 1970.
#[derive(Debug)]
pub(crate) struct Event {
    /// What a fault names it by.
    pub(crate) number: i64,
    pub(crate) at: i64,
    pub(crate) kind: String,
    pub(crate) from: Option<String>,
    pub(crate) to: String,
    pub(crate) decision: Option<String>,
    pub(crate) execution: Option<String>,
    pub(crate) call_id: Option<String>,
    pub(crate) actor: String,
    pub(crate) tenant: String,
    pub(crate) digest: Option<Vec<u8>>,
}

/// The row of an action as far as its events say the same, in the words of the database.
#[derive(Debug)]
pub(crate) struct Shown<'a> {
    pub(crate) tenant: Option<&'a str>,
    pub(crate) status: &'a str,
    pub(crate) decision: Option<&'a str>,
    pub(crate) execution: Option<&'a str>,
    pub(crate) closed: Option<&'a str>,
    pub(crate) created_at: Option<i64>,
    pub(crate) decided_at: Option<i64>,
    pub(crate) call_id: Option<&'a str>,
    pub(crate) submitted_by: Option<&'a str>,
    pub(crate) decided_by: Option<&'a str>,
    /// The digest of the payload as it was submitted, and as the reviewer edited it.
    pub(crate) digest: Option<&'a [u8]>,
    pub(crate) edited_digest: Option<&'a [u8]>,
}

/// The events of an action so far.
#[derive(Debug, Default)]
pub(crate) struct History {
    state: Option<State>,
    /// The first event that does not follow from those before it.
    broken: Option<i64>,
}

impl History {
    /// Takes the next event.
    pub(crate) fn add(&mut self, event: &Event) {
        if self.broken.is_none() {
            self.state = fold(self.state.take(), event);
            if self.state.is_none() {
                self.break_off(event.number);
            }
        }
    }

    /// Notes that an event does not follow from those before it.
    pub(crate) fn break_off(&mut self, number: i64) {
        self.broken = self.broken.or(Some(number));
    }

    /// Returns what is wrong with the action whose events these are.
    pub(crate) fn fault(&self, shown: &Shown<'_>) -> Option<String> {
        if let Some(number) = self.broken {
            return Some(format!(
                "event {number} does not follow from those before it"
            ));
        }
        let Some(state) = &self.state else {
            return Some("it has no event".to_owned());
        };
        let what = state.contradicted_by(shown)?;
        Some(format!("its {what} is not the one of its events"))
    }
}

/// The state of an action after an event.
#[derive(Debug)]
struct State {
    created_at: i64,
    tenant: String,
    submitted_by: Option<String>,
    status: Status,
    decided: Option<Decided>,
    execution: Option<Execution>,
    /// What was submitted or decided on first and last. Events from before there was a chain do
    /// not say.
    first_digest: Option<Vec<u8>>,
    digest: Option<Vec<u8>>,
}

/// The decision in force: what, when, by whom and by which call.
#[derive(Debug)]
struct Decided {
    decision: Decision,
    closed: Option<Closed>,
    at: i64,
    by: String,
    call_id: Option<String>,
}

/// Takes a state to the next one. `None` if the event does not follow from the state.
fn fold(state: Option<State>, event: &Event) -> Option<State> {
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
        first_digest: event.digest.clone(),
        digest: event.digest.clone(),
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
                digest: event.digest.clone().or(state.digest),
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

    /// Returns the column in which an action's row says otherwise than its events.
    fn contradicted_by(&self, shown: &Shown<'_>) -> Option<&'static str> {
        let decided = self.decided.as_ref();
        let closed = decided.and_then(|decided| decided.closed);
        let (run, what_is_run) = match shown.edited_digest {
            Some(edited) => (Some(edited), "edited_digest"),
            None => (shown.digest, "digest"),
        };
        let is = |digest: &Option<Vec<u8>>, shown| digest.is_none() || digest.as_deref() == shown;
        [
            ("status", shown.status == self.status.as_str()),
            (
                "decision",
                shown.decision == self.decision().map(Decision::as_str),
            ),
            (
                "execution",
                shown.execution == self.execution.map(Execution::as_str),
            ),
            ("closed", shown.closed == closed.map(Closed::as_str)),
            ("created_at", shown.created_at == Some(self.created_at)),
            (
                "decided_at",
                shown.decided_at == decided.map(|decided| decided.at),
            ),
            (
                "call_id",
                shown.call_id == decided.and_then(|decided| decided.call_id.as_deref()),
            ),
            (
                "submitted_by",
                shown.submitted_by == self.submitted_by.as_deref(),
            ),
            (
                "decided_by",
                shown.decided_by == decided.map(|decided| decided.by.as_str()),
            ),
            ("tenant_id", shown.tenant == Some(&*self.tenant)),
            ("digest", is(&self.first_digest, shown.digest)),
            (what_is_run, is(&self.digest, run)),
        ]
        .into_iter()
        .find_map(|(what, agrees)| (!agrees).then_some(what))
    }
}
