//! Listing actions, page by page.

use crate::protocol::{Action, Decision, Execution, Status, TenantId, ThreadId};

/// A request for a page of a tenant's actions.
#[derive(Debug, Clone)]
#[allow(clippy::exhaustive_structs)]
pub struct List {
    /// The tenant that the actions belong to.
    pub tenant_id: TenantId,
    /// Only actions in this state.
    pub status: Option<Status>,
    /// Only actions with this decision.
    pub decision: Option<Decision>,
    /// Only actions whose execution has come this far.
    pub execution: Option<Execution>,
    /// Only approved actions that nobody has claimed since.
    pub not_picked_up: bool,
    /// Only actions of this thread.
    pub thread_id: Option<ThreadId>,
    /// Where the page before this one ended.
    pub after: Option<Cursor>,
    /// The most actions of the page.
    pub limit: usize,
}

/// A page of actions. A list of pending actions begins with the oldest, any other with the newest.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(clippy::exhaustive_structs)]
pub struct Page {
    /// The actions, without what can be large: their payloads, comments, results and histories.
    pub actions: Vec<Action>,
    /// Where the next page begins. `None` if there are no more actions now.
    pub next: Option<Cursor>,
}

/// The position of an action in a list. Actions that are added later, or leave the list, do not
/// move it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cursor(u128);

impl Cursor {
    /// Makes a cursor from a store's own number for a position.
    pub const fn new(position: u128) -> Self {
        Self(position)
    }

    /// Returns the store's own number.
    pub const fn position(self) -> u128 {
        self.0
    }

    /// Writes the position into a link.
    pub(crate) fn to_text(self) -> String {
        format!("{:x}", self.0)
    }

    /// Reads a position of a link. `None` if it is none.
    pub(crate) fn of_text(text: &str) -> Option<Self> {
        // The parser would take a sign too.
        let is_hex = text.bytes().all(|digit| digit.is_ascii_hexdigit());
        let position = is_hex.then(|| u128::from_str_radix(text, 16).ok())?;
        position.map(Self)
    }
}

/// The direction of a list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Order {
    OldestFirst,
    NewestFirst,
}

/// All that the filters of a list tell apart. An index on this number serves any combination of
/// filters: each state is read in order, and the results are merged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct State {
    pub(crate) number: i64,
    status: Status,
    decision: Option<Decision>,
    execution: Option<Execution>,
}

impl State {
    /// Every state that an action can be in. The numbers are on disk.
    pub(crate) const ALL: [Self; 7] = {
        const fn state(
            number: i64,
            status: Status,
            decision: Option<Decision>,
            execution: Option<Execution>,
        ) -> State {
            State {
                number,
                status,
                decision,
                execution,
            }
        }
        use Decision::{Approve, Reject};
        use Execution::{Claimed, Completed, Failed, Unknown};
        [
            state(1, Status::Pending, None, None),
            state(2, Status::Committed, Some(Approve), None),
            state(3, Status::Committed, Some(Approve), Some(Claimed)),
            state(4, Status::Committed, Some(Approve), Some(Completed)),
            state(5, Status::Committed, Some(Reject), None),
            state(6, Status::Failed, Some(Approve), Some(Failed)),
            state(7, Status::Failed, Some(Approve), Some(Unknown)),
        ]
    };

    pub(crate) fn is_not_picked_up(self) -> bool {
        self.decision == Some(Decision::Approve) && self.execution.is_none()
    }

    /// The state of an action.
    #[cfg(feature = "test-util")]
    pub(crate) fn of(action: &Action) -> Option<Self> {
        Self::ALL.into_iter().find(|state| {
            state.status == action.status
                && state.decision == action.decision
                && state.execution == action.execution
        })
    }
}

impl List {
    /// The states that the filters let through.
    pub(crate) fn states(&self) -> impl Iterator<Item = State> {
        State::ALL.into_iter().filter(|state| {
            self.status.is_none_or(|status| status == state.status)
                && self
                    .decision
                    .is_none_or(|decision| Some(decision) == state.decision)
                && self
                    .execution
                    .is_none_or(|execution| Some(execution) == state.execution)
                && (!self.not_picked_up || state.is_not_picked_up())
        })
    }

    pub(crate) fn order(&self) -> Order {
        match self.status {
            Some(Status::Pending) => Order::OldestFirst,
            _ => Order::NewestFirst,
        }
    }
}
