//! Deciding on an action.

use super::{Event, Inserted, Ledger, New, Operation, Record};
use crate::protocol::{Action, Decision, RequestId, Status};
use crate::store::rule::{Asked, Recorded, Ruling, canonical_call, rule};
use crate::store::{Actor, Fingerprinted, Identity};

/// A request for a decision on an action.
#[derive(Debug, Clone)]
#[allow(clippy::exhaustive_structs)]
pub struct Decide {
    /// The action.
    pub identity: Identity,
    /// The decision.
    pub decision: Decision,
    /// The `X-Request-Id` of the call, which tells the call's own retry from a duplicate.
    pub call_id: Option<RequestId>,
    /// The payload of the action. `None` matches any payload on record.
    pub payload: Option<Fingerprinted>,
    /// The reviewer's comment.
    pub comment: Option<String>,
    /// The credential that made the request.
    pub actor: Actor,
    /// Whether the action must have been submitted before.
    pub require_submission: bool,
}

/// The outcome of a [`Decide`]. Every variant except `NotFound` holds the action as it is on record
/// now.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(clippy::exhaustive_enums)]
pub enum Decided {
    /// The decision was recorded, with its event.
    Recorded(Action),
    /// This same call recorded the decision before: the request is its own retry.
    Replayed(Action),
    /// Another call recorded the same decision before.
    Duplicate(Action),
    /// The opposite decision is on record.
    Conflict(Action),
    /// The key is on record with another payload.
    PayloadMismatch(Action),
    /// The action expired or was cancelled, and the requested decision is not the one on record.
    Closed(Action),
    /// No such action was submitted, and [`Decide::require_submission`] was set.
    NotFound,
}

impl Operation for Decide {
    type Outcome = Decided;

    fn size(&self) -> usize {
        let payload = self.payload.as_ref().map_or(0, Fingerprinted::len);
        payload + self.comment.as_ref().map_or(0, String::len)
    }

    fn apply<L: Ledger>(&self, ledger: &mut L) -> Result<Decided, L::Error> {
        let existing = if self.require_submission {
            ledger.find(&self.identity)?
        } else {
            // Most actions are new, so no look-up comes first.
            let new = New {
                identity: &self.identity,
                at: ledger.now(),
                payload: self.payload.as_ref(),
                decision: Some(self.decision),
                call_id: self.call_id.as_ref(),
                comment: self.comment.as_deref(),
            };
            match ledger.insert(new)? {
                Inserted::New(record) => {
                    ledger.append(self.event(&record, None, new.at))?;
                    return Ok(Decided::Recorded(record.action));
                }
                Inserted::Existing(record) => Some(record),
            }
        };
        match existing {
            Some(record) => self.decide_again(record, ledger),
            None => Ok(Decided::NotFound),
        }
    }

    fn changed(outcome: &Decided) -> Option<&Action> {
        match outcome {
            Decided::Recorded(action) => Some(action),
            _ => None,
        }
    }
}

impl Decide {
    /// Decides on an action that is on record.
    fn decide_again<L: Ledger>(
        &self,
        mut record: Record,
        ledger: &mut L,
    ) -> Result<Decided, L::Error> {
        let call_id = self.call_id.as_ref().map(canonical_call);
        let ruling = rule(
            Recorded {
                status: record.action.status,
                decision: record.action.decision,
                closed: record.closed,
                digest: record.digest.as_ref(),
                call_id: record.call_id.as_deref(),
            },
            Asked {
                decision: self.decision,
                digest: self.payload.as_ref().map(Fingerprinted::digest),
                call_id: call_id.as_deref(),
            },
        );
        Ok(match ruling {
            Ruling::Record => {
                let from = record.action.status;
                // If the clock was set back, the decision still does not come before the creation.
                let at = Some(ledger.now()).max(record.action.created_at);
                record.action.status = Status::Committed;
                record.action.decision = Some(self.decision);
                record.action.execution = None;
                record.action.decided_at = at;
                record.action.comment.clone_from(&self.comment);
                record.closed = false;
                record.call_id = call_id.map(Into::into);
                if let (None, Some(payload)) = (&record.digest, &self.payload) {
                    record.digest = Some(*payload.digest());
                    record.action.payload = Some(payload.payload().clone());
                }
                ledger.update(&record)?;
                let at = at.unwrap_or_else(|| ledger.now());
                ledger.append(self.event(&record, Some(from), at))?;
                Decided::Recorded(record.action)
            }
            Ruling::Replay => {
                record.action.replayed = true;
                Decided::Replayed(record.action)
            }
            Ruling::Duplicate => {
                ledger.remember(&record, self.call_id.as_ref());
                Decided::Duplicate(record.action)
            }
            Ruling::Conflict => Decided::Conflict(record.action),
            Ruling::PayloadMismatch => Decided::PayloadMismatch(record.action),
            Ruling::Closed => Decided::Closed(record.action),
        })
    }

    fn event(&self, record: &Record, from: Option<Status>, at: std::time::SystemTime) -> Event<'_> {
        Event {
            row: record.row,
            at,
            actor: &self.actor,
            verb: self.decision.as_str(),
            from,
            to: Status::Committed,
            decision: Some(self.decision),
            call_id: self.call_id.as_ref(),
        }
    }
}
