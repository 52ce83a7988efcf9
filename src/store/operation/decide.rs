//! Deciding on an action.

use super::{
    Inserted, Ledger, New, Operation, Origin, Record, Tombstone, Transition, Verdict, settle,
};
use crate::protocol::{Action, Decision, Digest, RequestId, Status};
use crate::store::rule::{Asked, Recorded, Ruling, canonical_call, is_same_call, rule};
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
    /// Whether the owner of the credential that submitted the action may decide on it.
    pub allow_self_approval: bool,
}

/// The outcome of a [`Decide`] or a [`DecideById`](super::DecideById). Every variant except `NotFound` holds the action as it is on record
/// now.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(clippy::exhaustive_enums)]
pub enum Decided {
    /// The decision was recorded, with its event.
    Recorded(Action),
    /// This same call recorded the decision before, in this round or an earlier one: the request is
    /// its own retry.
    Replayed(Action),
    /// Another call recorded the same decision before.
    Duplicate(Action),
    /// The opposite decision is on record.
    Conflict(Action),
    /// The key is on record with another payload.
    PayloadMismatch(Action),
    /// The action expired or was cancelled, and the requested decision is not the one on record.
    Closed(Action),
    /// The credential's owner submitted the action, and so may not decide on it.
    SelfApproval(Action),
    /// By id only: the action has a payload, and the request does not say which one was seen.
    DigestMissing(Action),
    /// By id only: the submission does not allow the reviewer to edit the payload.
    EditNotAllowed(Action),
    /// There is no such action. Without an id: none was submitted, and
    /// [`Decide::require_submission`] was set.
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
                actor: &self.actor,
                origin: Origin::Decided {
                    decision: self.decision,
                    call_id: self.call_id.as_ref(),
                    comment: self.comment.as_deref(),
                },
            };
            match ledger.insert(new)? {
                Inserted::New(record) => {
                    ledger.append(
                        &record,
                        Transition {
                            kind: self.decision.into(),
                            at: new.at,
                            actor: self.actor.as_str(),
                            from: None,
                            call_id: self.call_id.as_ref(),
                        },
                    )?;
                    return Ok(Decided::Recorded(record.action));
                }
                Inserted::Existing(record) => Some(record),
                Inserted::Removed(tombstone) => return Ok(self.decide_removed(&tombstone)),
            }
        };
        let Some(record) = existing else {
            let tombstone = ledger.tombstone(&self.identity)?;
            return Ok(tombstone.map_or(Decided::NotFound, |of_it| self.decide_removed(&of_it)));
        };
        let record = settle(record, ledger)?;
        let asked = Request {
            decision: self.decision,
            digest: self.payload.as_ref().map(Fingerprinted::digest),
            call_id: self.call_id.as_ref(),
            comment: self.comment.as_deref(),
            actor: &self.actor,
            allow_self_approval: self.allow_self_approval,
        };
        decide_again(record, asked, ledger, |record| {
            if let (None, Some(payload)) = (record.action.digest, &self.payload) {
                let digest = Some(Digest::from(*payload.digest()));
                record.submitted_digest = digest;
                record.action.digest = digest;
                record.action.payload = Some(payload.payload().clone());
            }
        })
    }
}

impl Decide {
    /// Answers a decision on an action that was removed. Its decision holds for ever.
    fn decide_removed(&self, tombstone: &Tombstone) -> Decided {
        let action = tombstone.action(&self.identity);
        let ruling = rule(
            Recorded {
                status: action.status,
                decision: action.decision,
                closed: action.closed.is_some(),
                digest: action.digest.as_ref().map(Digest::as_bytes),
                call_id: None,
            },
            Asked {
                decision: self.decision,
                digest: self.payload.as_ref().map(Fingerprinted::digest),
                call_id: None,
            },
        );
        match ruling {
            Ruling::PayloadMismatch => Decided::PayloadMismatch(action),
            Ruling::Conflict => Decided::Conflict(action),
            Ruling::Closed => Decided::Closed(action),
            // What was removed was decided, and which call decided is not known any more.
            Ruling::Duplicate | Ruling::Replay | Ruling::Record => Decided::Duplicate(action),
        }
    }
}

/// The part of a request for a decision that does not depend on how the action was found.
#[derive(Debug, Clone, Copy)]
pub(super) struct Request<'a> {
    pub(super) decision: Decision,
    pub(super) digest: Option<&'a [u8; 32]>,
    pub(super) call_id: Option<&'a RequestId>,
    pub(super) comment: Option<&'a str>,
    pub(super) actor: &'a Actor,
    pub(super) allow_self_approval: bool,
}

/// Decides on an action that is on record and [settled](settle). `amend` changes the record if the
/// decision is recorded.
pub(super) fn decide_again<L: Ledger>(
    mut record: Record,
    request: Request<'_>,
    ledger: &mut L,
    amend: impl FnOnce(&mut Record),
) -> Result<Decided, L::Error> {
    let is_same_call = is_same_call(&record, request.call_id, request.actor);
    let call_id = request.call_id.filter(|_| is_same_call).map(canonical_call);
    let ruling = rule(
        Recorded {
            status: record.action.status,
            decision: record.action.decision,
            closed: record.action.closed.is_some(),
            digest: record.action.digest.as_ref().map(Digest::as_bytes),
            call_id: record.call_id.as_deref(),
        },
        Asked {
            decision: request.decision,
            digest: request.digest,
            call_id: call_id.as_deref(),
        },
    );
    Ok(match ruling {
        Ruling::Record => {
            // A call of an earlier round: whoever made it knew nothing of what has failed since.
            if let Some(call_id) = request.call_id
                && record.action.status == Status::Failed
                && ledger.has_made(record.row, request.decision.into(), call_id)?
            {
                record.action.replayed = true;
                return Ok(Decided::Replayed(record.action));
            }
            let is_own = record.submitted_by.as_deref() == Some(request.actor.as_str());
            if is_own && !request.allow_self_approval {
                return Ok(Decided::SelfApproval(record.action));
            }
            amend(&mut record);
            let verdict = Verdict {
                decision: request.decision,
                closed: None,
                actor: request.actor.as_str(),
                comment: request.comment,
                call_id: request.call_id,
            };
            record.decide(verdict, ledger)?;
            Decided::Recorded(record.action)
        }
        Ruling::Replay => {
            record.action.replayed = true;
            Decided::Replayed(record.action)
        }
        Ruling::Duplicate => {
            ledger.remember(&record, request.call_id);
            Decided::Duplicate(record.action)
        }
        Ruling::Conflict => Decided::Conflict(record.action),
        Ruling::PayloadMismatch => Decided::PayloadMismatch(record.action),
        Ruling::Closed => Decided::Closed(record.action),
    })
}
