//! What time alone does to an action.

use super::{Ledger, Record, Verdict};
use crate::protocol::{Closed, Decision, Execution, Status};

/// The actor of an expiry.
const EXPIRY: &str = "system:expiry";

/// The actor of a lease's end.
const LEASE: &str = "system:lease";

/// Brings a record up to the present. A pending action whose time is over is rejected as expired. A
/// claimed action whose lease has ended has an unknown outcome.
///
/// Every operation starts with this, so that it never depends on when the store last looked for
/// records that are due.
pub(crate) fn settle<L: Ledger>(mut record: Record, ledger: &mut L) -> Result<Record, L::Error> {
    let now = ledger.now();
    let action = &record.action;
    if action.status == Status::Pending && action.expires_at.is_some_and(|end| end <= now) {
        let verdict = Verdict {
            decision: Decision::Reject,
            closed: Some(Closed::Expired),
            actor: EXPIRY,
            comment: None,
            call_id: None,
        };
        record.decide(verdict, ledger)?;
    } else if action.execution == Some(Execution::Claimed) {
        // Without its claim, which only an edit by hand removes, nobody can report an outcome.
        let until = ledger.lease(record.row)?.and_then(|lease| lease.until);
        if until.is_none_or(|until| until <= now) {
            record.execute(Execution::Unknown, LEASE, None, ledger)?;
        }
    }
    Ok(record)
}
