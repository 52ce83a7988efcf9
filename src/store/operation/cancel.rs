//! Withdrawing an action that nobody has decided.

use uuid::Uuid;

use super::{Ledger, Operation, Verdict, settle};
use crate::protocol::{Action, Closed, Decision, RequestId, Status, TenantId};
use crate::store::Actor;
use crate::store::rule::is_replay;

/// A request to withdraw an action.
#[derive(Debug, Clone)]
#[allow(clippy::exhaustive_structs)]
pub struct Cancel {
    /// The id that the store gave the action.
    pub id: Uuid,
    /// The tenant that the action belongs to.
    pub tenant_id: TenantId,
    /// The `X-Request-Id` of the call, which tells the call's own retry from a duplicate.
    pub call_id: Option<RequestId>,
    /// The credential that made the request.
    pub actor: Actor,
    /// Whether the credential may cancel what others submitted.
    pub may_cancel_all: bool,
}

/// The outcome of a [`Cancel`].
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(clippy::exhaustive_enums)]
pub enum Cancelled {
    /// The action is closed as cancelled.
    Recorded(Action),
    /// This same call cancelled the action before.
    Replayed(Action),
    /// Another call cancelled the action before.
    Duplicate(Action),
    /// The action is decided or has expired.
    Decided(Action),
    /// Another credential's owner submitted the action.
    Forbidden,
    /// The tenant has no such action.
    NotFound,
}

impl Operation for Cancel {
    type Outcome = Cancelled;

    fn size(&self) -> usize {
        0
    }

    fn apply<L: Ledger>(&self, ledger: &mut L) -> Result<Cancelled, L::Error> {
        let Some(record) = ledger.find_by_id(self.id, &self.tenant_id)? else {
            return Ok(Cancelled::NotFound);
        };
        let mut record = settle(record, ledger)?;
        let is_own = record.submitted_by.as_deref() == Some(self.actor.as_str());
        if !is_own && !self.may_cancel_all {
            return Ok(Cancelled::Forbidden);
        }
        if record.action.status == Status::Pending {
            let verdict = Verdict {
                decision: Decision::Reject,
                closed: Some(Closed::Cancelled),
                actor: self.actor.as_str(),
                comment: None,
                call_id: self.call_id.as_ref(),
            };
            record.decide(verdict, ledger)?;
            return Ok(Cancelled::Recorded(record.action));
        }
        Ok(if record.action.closed != Some(Closed::Cancelled) {
            Cancelled::Decided(record.action)
        } else if is_replay(
            &record,
            Decision::Reject,
            self.call_id.as_ref(),
            &self.actor,
        ) {
            record.action.replayed = true;
            Cancelled::Replayed(record.action)
        } else {
            ledger.remember(&record, self.call_id.as_ref());
            Cancelled::Duplicate(record.action)
        })
    }
}
