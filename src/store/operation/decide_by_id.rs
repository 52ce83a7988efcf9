//! Deciding on an action by its id, on what the reviewer saw.

use uuid::Uuid;

use super::decide::{Request, decide_again};
use super::{Decided, Ledger, Operation, settle};
use crate::protocol::{Action, Decision, Digest, RequestId, TenantId};
use crate::store::rule::is_replay;
use crate::store::{Actor, Fingerprinted};

/// A request for a decision on the action with an id.
#[derive(Debug, Clone)]
#[allow(clippy::exhaustive_structs)]
pub struct DecideById {
    /// The id that the store gave the action.
    pub id: Uuid,
    /// The tenant that the action belongs to.
    pub tenant_id: TenantId,
    /// The decision.
    pub decision: Decision,
    /// The `X-Request-Id` of the call, which tells the call's own retry from a duplicate.
    pub call_id: Option<RequestId>,
    /// The digest of what the reviewer saw. It must be given if the action has a payload.
    pub digest: Option<Digest>,
    /// The payload as the reviewer edited it.
    pub edited: Option<Fingerprinted>,
    /// The reviewer's comment.
    pub comment: Option<String>,
    /// The credential that made the request.
    pub actor: Actor,
    /// Whether the owner of the credential that submitted the action may decide on it.
    pub allow_self_approval: bool,
}

impl Operation for DecideById {
    type Outcome = Decided;

    fn size(&self) -> usize {
        let edited = self.edited.as_ref().map_or(0, Fingerprinted::len);
        edited + self.comment.as_ref().map_or(0, String::len)
    }

    fn apply<L: Ledger>(&self, ledger: &mut L) -> Result<Decided, L::Error> {
        let Some(record) = ledger.find_by_id(self.id, &self.tenant_id)? else {
            return Ok(Decided::NotFound);
        };
        let mut record = settle(record, ledger)?;
        let is_own = is_replay(&record, self.decision, self.call_id.as_ref(), &self.actor);
        if is_own && record.action.closed.is_none() {
            // The form that is sent a second time with another edit asks for something else.
            if !self.asks_for(&record.action) {
                return Ok(Decided::PayloadMismatch(record.action));
            }
            record.action.replayed = true;
            return Ok(Decided::Replayed(record.action));
        }
        if record.action.digest != self.digest {
            return Ok(match (record.action.digest, self.digest) {
                (Some(_), None) => Decided::DigestMissing(record.action),
                _ => Decided::PayloadMismatch(record.action),
            });
        }
        if self.edited.is_some() && record.action.allow_edit != Some(true) {
            return Ok(Decided::EditNotAllowed(record.action));
        }
        let edited = self.edited.as_ref().map(Fingerprinted::digest);
        // An edit of what is decided already asks for something that is not on record.
        if record.action.status == crate::protocol::Status::Committed
            && record.action.decision == Some(self.decision)
            && edited.is_some_and(|edited| record.action.digest != Some(Digest::from(*edited)))
        {
            return Ok(Decided::PayloadMismatch(record.action));
        }
        let request = Request {
            decision: self.decision,
            digest: None,
            call_id: self.call_id.as_ref(),
            comment: self.comment.as_deref(),
            actor: &self.actor,
            allow_self_approval: self.allow_self_approval,
        };
        let decided = decide_again(record, request, ledger, |record| {
            if let Some(edited) = &self.edited {
                record.action.digest = Some(Digest::from(*edited.digest()));
                record.action.edited_payload = Some(edited.payload().clone());
            }
        })?;
        Ok(match decided {
            // A call of an earlier round.
            Decided::Replayed(mut action) if !self.asks_for(&action) => {
                action.replayed = false;
                Decided::PayloadMismatch(action)
            }
            decided => decided,
        })
    }
}

impl DecideById {
    /// Whether the payload on record is the one that this request decides on. A call's own retry
    /// may have seen any digest, as its edit changed it.
    fn asks_for(&self, action: &Action) -> bool {
        match &self.edited {
            Some(edited) => action.digest == Some(Digest::from(*edited.digest())),
            None => action.edited_payload.is_none() || action.digest == self.digest,
        }
    }
}
