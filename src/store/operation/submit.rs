//! Submitting an action, to be decided later.

use std::time::SystemTime;

use super::{Inserted, Ledger, New, Operation, Origin, Record, Tombstone, Transition, settle};
use crate::protocol::{Action, Digest, EventKind, RequestId};
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
    /// What the submission says beside the payload. A later submission of the same action changes
    /// nothing of it.
    pub submission: Submission,
    /// The credential that made the request.
    pub actor: Actor,
    /// Whether nothing new is recorded: the request may only be the repetition of another, as it may
    /// where its [end](Submission::expires_at) has passed.
    pub only_existing: bool,
}

/// What a submission says beside the payload.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[allow(clippy::exhaustive_structs)]
pub struct Submission {
    /// What the action is about, in a line for people.
    pub title: Option<String>,
    /// When the action is rejected as expired, if nobody has decided by then. `None` waits for
    /// ever. The store's clock judges it.
    pub expires_at: Option<SystemTime>,
    /// Whether the reviewer may edit the payload.
    pub allow_edit: bool,
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
    /// There is no such action, and the [end](Submission::expires_at) of this one has passed or
    /// [`Submit::only_existing`] was set.
    NotFound,
}

impl Operation for Submit {
    type Outcome = Submitted;

    fn size(&self) -> usize {
        let payload = self.payload.as_ref().map_or(0, Fingerprinted::len);
        payload + self.submission.title.as_ref().map_or(0, String::len)
    }

    fn apply<L: Ledger>(&self, ledger: &mut L) -> Result<Submitted, L::Error> {
        let now = ledger.now();
        // A retry may come after the end of what was submitted in time.
        let has_passed = self.submission.expires_at.is_some_and(|end| end <= now);
        if self.only_existing || has_passed {
            return match ledger.find(&self.identity)? {
                Some(record) => self.submit_again(record, ledger),
                None => Ok(ledger
                    .tombstone(&self.identity)?
                    .map_or(Submitted::NotFound, |of_it| self.submit_removed(&of_it))),
            };
        }
        let new = New {
            identity: &self.identity,
            at: now,
            payload: self.payload.as_ref(),
            actor: &self.actor,
            origin: Origin::Submitted(&self.submission),
        };
        match ledger.insert(new)? {
            Inserted::New(record) => {
                ledger.append(
                    &record,
                    Transition {
                        kind: EventKind::Submitted,
                        at: new.at,
                        actor: self.actor.as_str(),
                        from: None,
                        call_id: self.call_id.as_ref(),
                    },
                )?;
                Ok(Submitted::Recorded(record.action))
            }
            Inserted::Existing(record) => self.submit_again(record, ledger),
            Inserted::Removed(tombstone) => Ok(self.submit_removed(&tombstone)),
        }
    }
}

impl Submit {
    /// Answers the submission of an action that was removed.
    fn submit_removed(&self, tombstone: &Tombstone) -> Submitted {
        let digest = self.payload.as_ref().map(Fingerprinted::digest);
        let submitted = tombstone.submitted_digest.as_ref().map(Digest::as_bytes);
        let action = tombstone.action(&self.identity);
        if payloads_differ(submitted, digest) {
            Submitted::PayloadMismatch(action)
        } else {
            Submitted::Existing(action)
        }
    }

    /// Answers the submission of an action that is on record.
    fn submit_again<L: Ledger>(
        &self,
        record: Record,
        ledger: &mut L,
    ) -> Result<Submitted, L::Error> {
        let record = settle(record, ledger)?;
        let digest = self.payload.as_ref().map(Fingerprinted::digest);
        let submitted = record.submitted_digest.as_ref().map(Digest::as_bytes);
        Ok(if payloads_differ(submitted, digest) {
            Submitted::PayloadMismatch(record.action)
        } else {
            ledger.remember(&record, self.call_id.as_ref());
            Submitted::Existing(record.action)
        })
    }
}
