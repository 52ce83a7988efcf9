//! What a closure receives, and what became of the action.

use serde::Deserialize;

use crate::client::Error;
use crate::protocol::{self, Action, Closed, Decision, Payload, RequestId};

/// What a closure may run: an action that was approved, and that this call has claimed.
#[derive(Debug)]
pub struct Approved {
    pub(super) payload: Option<Payload>,
    pub(super) action: Action,
    pub(super) claim: protocol::Claim,
}

impl Approved {
    /// Returns what to run: the payload as it was submitted, or as the reviewer edited it.
    pub fn payload(&self) -> Option<&Payload> {
        self.payload.as_ref()
    }

    /// Deserializes what to run. Without a payload it is `{}`.
    ///
    /// # Errors
    ///
    /// If the payload does not have the shape of a `T`.
    pub fn parse<'de, T: Deserialize<'de>>(&'de self) -> Result<T, serde_json::Error> {
        match &self.payload {
            Some(payload) => payload.parse(),
            None => serde_json::from_str("{}"),
        }
    }

    /// Returns the server's id for the action. Systems that deduplicate should do so by it.
    pub fn request_id(&self) -> &RequestId {
        &self.action.request_id
    }

    /// Returns a number that grows with every claim of the action, for systems that refuse an older
    /// one.
    pub fn fence(&self) -> u64 {
        self.claim.fence
    }

    /// Returns the claim, as it was granted.
    pub fn claim(&self) -> &protocol::Claim {
        &self.claim
    }

    /// Returns the action, as it was claimed.
    pub fn action(&self) -> &Action {
        &self.action
    }
}

/// What became of an action that was to be run once.
#[derive(Debug)]
#[non_exhaustive]
pub enum RunOutcome<T, E> {
    /// The closure succeeded, and that is on record.
    Completed {
        /// What the closure returned.
        value: T,
        /// The action on record. If `value` does not serialize to JSON of up to 64 KiB that every
        /// parser reads as the same value, it has no result.
        action: Box<Action>,
    },
    /// The closure failed, and that is on record. A human decides again.
    Failed {
        /// What the closure returned.
        error: E,
        /// The action on record.
        action: Box<Action>,
    },
    /// The closure ended, but the server did not confirm the report of its outcome. It may be on
    /// record, or the execution may be on record as unknown.
    Unreported {
        /// What the closure returned.
        outcome: Result<T, E>,
        /// Why the report is not confirmed.
        error: Error,
    },
    /// The claim was lost while the closure ran: it could not be renewed before its lease ended.
    /// The closure was dropped in the middle, because a human may now decide that somebody else
    /// runs the action. What it did until then is unknown, and on record as unknown.
    Interrupted {
        /// The action, as it was claimed.
        action: Box<Action>,
        /// Why the claim could not be renewed.
        error: Error,
    },
    /// A reviewer rejected the action. Nothing was run.
    Rejected(Box<Action>),
    /// Nobody decided before the action expired. Nothing was run.
    Expired(Box<Action>),
    /// The action was cancelled. Nothing was run.
    Cancelled(Box<Action>),
    /// Another call spent the approval. Nothing was run by this one.
    ///
    /// The action's [`execution`](Action::execution) tells how it stands: it may still run, or have
    /// completed with a [`result`](Action::result), or failed, or its outcome may be unknown. In
    /// the latter two cases a human decides again. An action that the server has removed since, as
    /// its retention was over, has no result.
    AlreadyRun(Box<Action>),
    /// The action was approved, nobody ran it, and the server removed it, as its retention was
    /// over. Nothing was run, and nothing ever is under this key: what is still to be done takes
    /// another key.
    Removed(Box<Action>),
}

impl<T, E> RunOutcome<T, E> {
    /// Returns the outcome of an action that is not to be run any more, or else the action.
    pub(super) fn settled(action: Box<Action>) -> Result<Self, Box<Action>> {
        if action.execution.is_some() {
            return Ok(Self::AlreadyRun(action));
        }
        match (action.decision, action.closed) {
            (Some(Decision::Reject), Some(Closed::Expired)) => Ok(Self::Expired(action)),
            (Some(Decision::Reject), Some(Closed::Cancelled)) => Ok(Self::Cancelled(action)),
            (Some(Decision::Reject), _) => Ok(Self::Rejected(action)),
            _ => Err(action),
        }
    }
}
