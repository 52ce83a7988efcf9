//! The operations of a store. Each file holds one: its request, its outcome, and what it does to
//! the records.
//!
//! A new operation is a new file here, a line in this one, and a method of [`Store`](super::Store).
//! Stores that implement [`Ledger`] need nothing else.

mod decide;
mod submit;

use std::time::SystemTime;

use crate::protocol::{Action, Decision, RequestId, Status};
use crate::store::{Actor, Fingerprinted, Identity};

pub use self::decide::{Decide, Decided};
pub use self::submit::{Submit, Submitted};

/// A request that may change records, and the way it is carried out in one transaction.
pub(crate) trait Operation: Send + 'static {
    /// The result for the caller.
    type Outcome: Send + 'static;

    /// The size of the request in bytes, without its names, which have a limit of their own.
    fn size(&self) -> usize;

    /// Carries out the request.
    fn apply<L: Ledger>(&self, ledger: &mut L) -> Result<Self::Outcome, L::Error>;

    /// The action that was changed, if the outcome is a change. Whoever waits for that action is
    /// woken.
    fn changed(outcome: &Self::Outcome) -> Option<&Action>;
}

/// The records of a store within one transaction.
pub(crate) trait Ledger {
    type Error;

    /// The current time, in the resolution in which times are kept.
    fn now(&self) -> SystemTime;

    /// Finds the record of an identity.
    fn find(&self, identity: &Identity) -> Result<Option<Record>, Self::Error>;

    /// Inserts an action, unless its identity is on record.
    fn insert(&mut self, new: New<'_>) -> Result<Inserted, Self::Error>;

    /// Writes all of a record except its identity and its creation time.
    fn update(&mut self, record: &Record) -> Result<(), Self::Error>;

    /// Appends an event.
    fn append(&mut self, event: Event<'_>) -> Result<(), Self::Error>;

    /// Remembers a call that changed nothing, with the record it was answered with.
    fn remember(&mut self, record: &Record, call_id: Option<&RequestId>);
}

/// An action as it is on record.
#[derive(Debug, Clone)]
pub(crate) struct Record {
    /// The number of the action's row.
    pub(crate) row: i64,
    pub(crate) action: Action,
    /// Whether the action expired or was cancelled.
    pub(crate) closed: bool,
    pub(crate) digest: Option<[u8; 32]>,
    /// The call that made the recorded decision, in the form of
    /// [`canonical_call`](super::rule::canonical_call).
    pub(crate) call_id: Option<String>,
}

/// An action that is not on record yet.
#[derive(Debug, Clone, Copy)]
pub(crate) struct New<'a> {
    pub(crate) identity: &'a Identity,
    pub(crate) at: SystemTime,
    pub(crate) payload: Option<&'a Fingerprinted>,
    pub(crate) decision: Option<Decision>,
    /// The call that made the decision.
    pub(crate) call_id: Option<&'a RequestId>,
    pub(crate) comment: Option<&'a str>,
}

impl New<'_> {
    pub(crate) fn status(&self) -> Status {
        match self.decision {
            Some(_) => Status::Committed,
            None => Status::Pending,
        }
    }

    /// The record of the action, with its row and its id.
    pub(crate) fn record(&self, row: i64, id: RequestId) -> Record {
        let mut action = Action::new(id, self.status());
        action.tenant_id = Some(self.identity.tenant_id.clone());
        action.thread_id = Some(self.identity.thread_id.clone());
        action.idempotency_key = Some(self.identity.idempotency_key.clone());
        action.decision = self.decision;
        action.created_at = Some(self.at);
        action.decided_at = self.decision.map(|_| self.at);
        action.payload = self.payload.map(|payload| payload.payload().clone());
        action.comment = self.comment.map(str::to_owned);
        Record {
            row,
            action,
            closed: false,
            digest: self.payload.map(|payload| *payload.digest()),
            call_id: self
                .call_id
                .map(|id| super::rule::canonical_call(id).into()),
        }
    }
}

#[derive(Debug)]
pub(crate) enum Inserted {
    New(Record),
    /// The record that was there before.
    Existing(Record),
}

/// The event of one transition.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Event<'a> {
    /// The action's row.
    pub(crate) row: i64,
    pub(crate) at: SystemTime,
    pub(crate) actor: &'a Actor,
    /// The requested operation: `submit`, `approve` or `reject`.
    pub(crate) verb: &'static str,
    pub(crate) from: Option<Status>,
    pub(crate) to: Status,
    pub(crate) decision: Option<Decision>,
    pub(crate) call_id: Option<&'a RequestId>,
}
