//! Claiming an approved action, so that one executor runs it.

use std::time::Duration;

use uuid::Uuid;

use super::{Lease, Ledger, Operation, settle};
use crate::protocol::{
    Action, Claim, Decision, Digest, EventKind, Execution, RequestId, Status, TenantId,
};
use crate::store::Actor;
use crate::store::rule::canonical_call;

/// A request for a claim on an approved action.
#[derive(Debug, Clone)]
#[allow(clippy::exhaustive_structs)]
pub struct Acquire {
    /// The id that the store gave the action.
    pub id: Uuid,
    /// The tenant that the action belongs to.
    pub tenant_id: TenantId,
    /// The digest of what is about to be run. It must be given if the action has a payload.
    pub digest: Option<Digest>,
    /// How long the claim lasts, unless it is renewed.
    pub lease: Duration,
    /// The `X-Request-Id` of the call, which tells the call's own retry from another claimant.
    pub call_id: Option<RequestId>,
    /// The credential that made the request.
    pub actor: Actor,
}

/// The outcome of an [`Acquire`].
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(clippy::exhaustive_enums)]
pub enum Acquired {
    /// The claim is the caller's. The approval is spent.
    Claimed(Action, Claim),
    /// This same call acquired the claim before, and its lease lasts.
    Replayed(Action, Claim),
    /// Another call has spent the approval.
    AlreadyClaimed(Action),
    /// The action is pending, rejected, or has failed.
    NotApproved(Action),
    /// What was approved has another digest.
    PayloadMismatch(Action),
    /// The action has a payload, and the request does not say which one is about to be run.
    DigestMissing(Action),
    /// This same call made a claim that has ended. It does not spend the approval that came after.
    Lost(Action),
    /// The tenant has no such action.
    NotFound,
}

impl Operation for Acquire {
    type Outcome = Acquired;

    fn size(&self) -> usize {
        0
    }

    fn apply<L: Ledger>(&self, ledger: &mut L) -> Result<Acquired, L::Error> {
        let Some(record) = ledger.find_by_id(self.id, &self.tenant_id)? else {
            return Ok(Acquired::NotFound);
        };
        let mut record = settle(record, ledger)?;
        let action = &record.action;
        if action.status != Status::Committed || action.decision != Some(Decision::Approve) {
            return Ok(Acquired::NotApproved(record.action));
        }
        let last = ledger.lease(record.row)?;
        let call_id = self
            .call_id
            .as_ref()
            .map(|id| canonical_call(id).into_owned());
        let is_own = |lease: &Lease| {
            call_id.is_some()
                && lease.call_id == call_id
                && lease.actor == self.actor.as_str()
                && action.execution == Some(Execution::Claimed)
        };
        if action.execution.is_some() && !last.as_ref().is_some_and(is_own) {
            return Ok(Acquired::AlreadyClaimed(record.action));
        }
        if action.digest != self.digest {
            return Ok(match (action.digest, self.digest) {
                (Some(_), None) => Acquired::DigestMissing(record.action),
                _ => Acquired::PayloadMismatch(record.action),
            });
        }
        if let (Some(_), Some(lease)) = (action.execution, &last) {
            record.action.replayed = true;
            return Ok(Acquired::Replayed(record.action, lease.claim()));
        }
        // A retry of a claim that has ended is no new claim: its caller may be long gone.
        if let (Some(_), Some(call_id)) = (&last, &self.call_id)
            && ledger.has_made(record.row, EventKind::Claimed, call_id)?
        {
            return Ok(Acquired::Lost(record.action));
        }
        let lease = Lease {
            token: Uuid::new_v4(),
            fence: last.map_or(0, |last| last.fence).saturating_add(1),
            until: Some(Lease::end(ledger.now(), self.lease)),
            actor: self.actor.as_str().to_owned(),
            call_id,
        };
        ledger.set_lease(record.row, &lease)?;
        record.execute(
            Execution::Claimed,
            self.actor.as_str(),
            self.call_id.as_ref(),
            ledger,
        )?;
        Ok(Acquired::Claimed(record.action, lease.claim()))
    }
}
