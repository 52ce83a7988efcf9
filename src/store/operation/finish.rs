//! Reporting the outcome of a claimed action.

use uuid::Uuid;

use super::renew::held;
use super::{Ledger, Operation, settle};
use crate::protocol::{Action, ClaimToken, Execution, JsonText, RequestId, TenantId};
use crate::store::Actor;

/// A report of the outcome of a claimed action.
#[derive(Debug, Clone)]
#[allow(clippy::exhaustive_structs)]
pub struct Finish {
    /// The id that the store gave the action.
    pub id: Uuid,
    /// The tenant that the action belongs to.
    pub tenant_id: TenantId,
    /// The claim's token.
    pub token: ClaimToken,
    /// The outcome.
    pub report: Report,
    /// The `X-Request-Id` of the call.
    pub call_id: Option<RequestId>,
    /// The credential that made the request.
    pub actor: Actor,
}

/// The outcome of an execution, as the claimant reports it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(clippy::exhaustive_enums)]
pub enum Report {
    /// The action was carried out, with this result.
    Completed(Option<JsonText>),
    /// Carrying out the action failed, for this reason. A human decides again.
    Failed(Option<String>),
}

impl Report {
    fn execution(&self) -> Execution {
        match self {
            Self::Completed(_) => Execution::Completed,
            Self::Failed(_) => Execution::Failed,
        }
    }
}

/// The outcome of a [`Finish`].
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(clippy::exhaustive_enums)]
pub enum Finished {
    /// The report is on record.
    Recorded(Action),
    /// The same outcome was reported with this token before.
    Replayed(Action),
    /// The token is not that of a live claim on the action, or another outcome is on record.
    Lost(Action),
    /// The tenant has no such action.
    NotFound,
}

impl Operation for Finish {
    type Outcome = Finished;

    fn size(&self) -> usize {
        match &self.report {
            Report::Completed(result) => result.as_ref().map_or(0, |result| result.as_str().len()),
            Report::Failed(reason) => reason.as_ref().map_or(0, String::len),
        }
    }

    fn apply<L: Ledger>(&self, ledger: &mut L) -> Result<Finished, L::Error> {
        let Some(record) = ledger.find_by_id(self.id, &self.tenant_id)? else {
            return Ok(Finished::NotFound);
        };
        let mut record = settle(record, ledger)?;
        let execution = self.report.execution();
        if held(&record, &self.token, ledger)?.is_none() {
            return Ok(Finished::Lost(record.action));
        }
        match record.action.execution {
            Some(Execution::Claimed) => {}
            Some(recorded) if recorded == execution => {
                record.action.replayed = true;
                return Ok(Finished::Replayed(record.action));
            }
            _ => return Ok(Finished::Lost(record.action)),
        }
        match &self.report {
            Report::Completed(result) => record.action.result.clone_from(result),
            Report::Failed(reason) => record.action.reason.clone_from(reason),
        }
        record.execute(
            execution,
            self.actor.as_str(),
            self.call_id.as_ref(),
            ledger,
        )?;
        Ok(Finished::Recorded(record.action))
    }
}
