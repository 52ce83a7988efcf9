//! Submitting an action, to be decided later.

use super::{Event, Inserted, Ledger, New, Operation};
use crate::protocol::{Action, RequestId, Status};
use crate::store::rule::payloads_differ;
use crate::store::{Actor, Fingerprinted, Identity};

/// A request to submit an action for a decision.
#[derive(Debug, Clone)]
#[allow(clippy::exhaustive_structs)]
pub struct Submit {
    /// The action.
    pub identity: Identity,
    /// The `X-Request-Id` of the call.
    pub call_id: Option<RequestId>,
    /// The payload of the action.
    pub payload: Option<Fingerprinted>,
    /// The credential that made the request.
    pub actor: Actor,
}

/// The outcome of a [`Submit`].
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(clippy::exhaustive_enums)]
pub enum Submitted {
    /// The action is new and pending.
    Recorded(Action),
    /// The action was on record before. Its state may be any.
    Existing(Action),
    /// The key is on record with another payload.
    PayloadMismatch(Action),
}

impl Operation for Submit {
    type Outcome = Submitted;

    fn size(&self) -> usize {
        self.payload.as_ref().map_or(0, Fingerprinted::len)
    }

    fn apply<L: Ledger>(&self, ledger: &mut L) -> Result<Submitted, L::Error> {
        let new = New {
            identity: &self.identity,
            at: ledger.now(),
            payload: self.payload.as_ref(),
            decision: None,
            call_id: None,
            comment: None,
        };
        let record = match ledger.insert(new)? {
            Inserted::New(record) => {
                ledger.append(Event {
                    row: record.row,
                    at: new.at,
                    actor: &self.actor,
                    verb: "submit",
                    from: None,
                    to: Status::Pending,
                    decision: None,
                    call_id: self.call_id.as_ref(),
                })?;
                return Ok(Submitted::Recorded(record.action));
            }
            Inserted::Existing(record) => record,
        };
        let digest = self.payload.as_ref().map(Fingerprinted::digest);
        Ok(if payloads_differ(record.digest.as_ref(), digest) {
            Submitted::PayloadMismatch(record.action)
        } else {
            ledger.remember(&record, self.call_id.as_ref());
            Submitted::Existing(record.action)
        })
    }

    fn changed(outcome: &Submitted) -> Option<&Action> {
        match outcome {
            Submitted::Recorded(action) => Some(action),
            _ => None,
        }
    }
}
