//! Withdrawing an action that nobody has decided.

use super::{Operation, Sent, Wire, path};
use crate::client::answer::{Answer, Decided, Expected, receipt_by_id};
use crate::client::endpoints::Endpoints;
use crate::client::{Error, Receipt};
use crate::protocol::{Closed, Decision, RequestId};

/// The cancellation of an action; see [`AegisService::cancel`](crate::AegisService::cancel).
#[derive(Debug, Clone)]
pub struct Cancel {
    id: RequestId,
}

impl Cancel {
    pub(in crate::client) fn new(id: RequestId) -> Self {
        Self { id }
    }
}

impl Operation for Cancel {
    type Output = Receipt;

    fn wire(&mut self, _: &Endpoints) -> Result<Wire, Error> {
        Wire::post(path(&self.id, "cancel"), &serde_json::Map::new())
    }

    fn read(self, answer: Answer, sent: Sent) -> Result<Receipt, Error> {
        let expected = Expected {
            subject: sent.about(&self.id),
            decision: Decision::Reject,
            payload: Decided::Digest(None),
        };
        let is_whole = answer.is_whole();
        let (receipt, head) = receipt_by_id(answer, &expected, sent.call_id.clone())?;
        let is_cancelled = match receipt.action() {
            Some(action) => action.closed == Some(Closed::Cancelled),
            // A body that was cut off may have said that it expired.
            None => is_whole && !receipt.is_duplicate(),
        };
        if !is_cancelled {
            return Err(head.fault("the action on record is not cancelled"));
        }
        Ok(receipt)
    }
}
