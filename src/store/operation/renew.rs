//! Extending the lease of a claim.

use std::time::Duration;

use uuid::Uuid;

use super::{Lease, Ledger, Operation, Record, settle};
use crate::protocol::{Action, Claim, ClaimToken, Execution, TenantId};

/// A request to extend a claim.
#[derive(Debug, Clone)]
#[allow(clippy::exhaustive_structs)]
pub struct Renew {
    /// The id that the store gave the action.
    pub id: Uuid,
    /// The tenant that the action belongs to.
    pub tenant_id: TenantId,
    /// The claim's token.
    pub token: ClaimToken,
    /// How long the claim lasts from now on, unless it is renewed again.
    pub lease: Duration,
}

/// The outcome of a [`Renew`].
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(clippy::exhaustive_enums, clippy::large_enum_variant)]
pub enum Renewed {
    /// The claim lasts until its new end.
    Extended(Claim),
    /// The token is not that of a live claim on the action.
    Lost(Action),
    /// The tenant has no such action.
    NotFound,
}

impl Operation for Renew {
    type Outcome = Renewed;

    fn size(&self) -> usize {
        0
    }

    fn apply<L: Ledger>(&self, ledger: &mut L) -> Result<Renewed, L::Error> {
        let Some(record) = ledger.find_by_id(self.id, &self.tenant_id)? else {
            return Ok(Renewed::NotFound);
        };
        let record = settle(record, ledger)?;
        let lease = held(&record, &self.token, ledger)?;
        let Some(mut lease) = lease.filter(|_| record.action.execution == Some(Execution::Claimed))
        else {
            return Ok(Renewed::Lost(record.action));
        };
        lease.until = Some(Lease::end(ledger.now(), self.lease));
        ledger.set_lease(record.row, &lease)?;
        Ok(Renewed::Extended(lease.claim()))
    }
}

/// The newest claim on an action, if this is its token.
pub(super) fn held<L: Ledger>(
    record: &Record,
    token: &ClaimToken,
    ledger: &L,
) -> Result<Option<Lease>, L::Error> {
    let lease = ledger.lease(record.row)?;
    Ok(lease.filter(|lease| ClaimToken::from(lease.token) == *token))
}
