//! Deciding on an action by its id.

use std::fmt;

use serde::Serialize;

use super::{Operation, OperationCall, Sent, Wire, digest_of_edit, path, payload_of};
use crate::client::answer::{Answer, Decided, Expected, receipt_by_id};
use crate::client::endpoints::Endpoints;
use crate::client::request::has_reserved_member;
use crate::client::{Error, Receipt};
use crate::protocol::{Decision, Digest, Payload, RequestId};

/// A reviewer's decision on an action by its id; see
/// [`AegisService::approve_action`](crate::AegisService::approve_action).
#[derive(Clone)]
pub struct DecideById {
    id: RequestId,
    decision: Decision,
    digest: Option<Digest>,
    comment: Option<String>,
    payload: Option<Payload>,
}

impl DecideById {
    pub(in crate::client) fn new(id: RequestId, decision: Decision) -> Self {
        Self {
            id,
            decision,
            digest: None,
            comment: None,
            payload: None,
        }
    }
}

impl fmt::Debug for DecideById {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Without what people or agents wrote, because requests get logged.
        f.debug_struct("DecideById")
            .field("id", &self.id)
            .field("decision", &self.decision)
            .field("digest", &self.digest)
            .finish_non_exhaustive()
    }
}

/// The parts of a decision by id.
impl<S> OperationCall<S, DecideById> {
    /// Sets the digest of what the reviewer saw. It is required where the action has a payload.
    /// Another one than on record is a [payload mismatch](Error::is_payload_mismatch).
    pub fn digest(self, digest: impl Into<Option<Digest>>) -> Self {
        self.with(Ok(digest.into()), |decide, digest| decide.digest = digest)
    }

    /// Sends a comment on the decision: up to 4096 characters.
    pub fn comment(self, comment: impl Into<String>) -> Self {
        self.with(Ok(comment.into()), |decide, comment| {
            decide.comment = Some(comment);
        })
    }

    /// Approves this payload instead of the one that was submitted. Only with an approval, and only
    /// if the submission allowed it.
    pub fn edited_payload<T: Serialize + ?Sized>(self, payload: &T) -> Self {
        self.with(payload_of(payload), |decide, payload| {
            decide.payload = Some(payload);
        })
    }
}

#[derive(Serialize)]
struct Body<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    digest: Option<Digest>,
    #[serde(skip_serializing_if = "Option::is_none")]
    comment: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    payload: Option<&'a Payload>,
}

impl Operation for DecideById {
    type Output = Receipt;

    fn wire(&mut self, _: &Endpoints) -> Result<Wire, Error> {
        if self.decision == Decision::Reject && self.payload.is_some() {
            return Err(Error::request(
                "a rejection has an edited payload; only an approval may have one",
            ));
        }
        if self.payload.as_ref().is_some_and(has_reserved_member) {
            return Err(Error::request(
                "the edited payload has the reserved member 'aegis'",
            ));
        }
        let body = Body {
            digest: self.digest,
            comment: self.comment.as_deref(),
            payload: self.payload.as_ref(),
        };
        Wire::post(path(&self.id, self.decision.as_str()), &body)
    }

    fn read(self, answer: Answer, sent: Sent) -> Result<Receipt, Error> {
        let digest = match &self.payload {
            Some(payload) => Some(digest_of_edit(payload)?),
            None => self.digest,
        };
        let expected = Expected {
            subject: sent.about(&self.id),
            decision: self.decision,
            payload: Decided::Digest(digest),
        };
        let (receipt, _) = receipt_by_id(answer, &expected, sent.call_id.clone())?;
        Ok(receipt)
    }
}
