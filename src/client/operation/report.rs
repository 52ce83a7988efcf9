//! Reporting the outcome of a claimed action.

use std::fmt;

use http::StatusCode;
use serde::Serialize;

use super::{Operation, OperationCall, Sent, Wire, path};
use crate::client::Error;
use crate::client::answer::{Answer, Object, action_of};
use crate::client::endpoints::Endpoints;
use crate::protocol::{Action, ClaimToken, Decision, Execution, JsonText, RequestId, Status};

/// The report of a success; see [`AegisService::complete`](crate::AegisService::complete).
#[derive(Debug, Clone)]
pub struct Complete {
    id: RequestId,
    token: ClaimToken,
    pub(in crate::client) result: Option<JsonText>,
}

impl Complete {
    pub(in crate::client) fn new(id: RequestId, token: ClaimToken) -> Self {
        Self {
            id,
            token,
            result: None,
        }
    }
}

/// The report of a failure; see [`AegisService::fail`](crate::AegisService::fail).
#[derive(Clone)]
pub struct Fail {
    id: RequestId,
    token: ClaimToken,
    pub(in crate::client) reason: Option<String>,
}

impl Fail {
    pub(in crate::client) fn new(id: RequestId, token: ClaimToken) -> Self {
        Self {
            id,
            token,
            reason: None,
        }
    }
}

impl fmt::Debug for Fail {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Without what people or agents wrote, because requests get logged.
        f.debug_struct("Fail")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

/// The parts of a success.
impl<S> OperationCall<S, Complete> {
    /// Sets the result: anything that serializes to JSON of up to 64 KiB.
    pub fn result<T: Serialize + ?Sized>(self, result: &T) -> Self {
        let result = JsonText::new(result)
            .map_err(|error| Error::request(format!("the result is unusable: {error}")));
        self.with(result, |complete, result| complete.result = Some(result))
    }
}

/// The parts of a failure.
impl<S> OperationCall<S, Fail> {
    /// Sets why it failed, for people: up to 4096 characters.
    pub fn reason(self, reason: impl Into<String>) -> Self {
        self.with(Ok(reason.into()), |fail, reason| fail.reason = Some(reason))
    }
}

#[derive(Serialize)]
struct Body<'a> {
    token: &'a ClaimToken,
    #[serde(skip_serializing_if = "Option::is_none")]
    result: Option<&'a JsonText>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<&'a str>,
}

impl Operation for Complete {
    type Output = Action;

    fn wire(&mut self, _: &Endpoints) -> Result<Wire, Error> {
        let body = Body {
            token: &self.token,
            result: self.result.as_ref(),
            reason: None,
        };
        Wire::post(path(&self.id, "complete"), &body)
    }

    fn read(self, answer: Answer, sent: Sent) -> Result<Action, Error> {
        recorded(answer, &sent, &self.id, Execution::Completed)
    }
}

impl Operation for Fail {
    type Output = Action;

    fn wire(&mut self, _: &Endpoints) -> Result<Wire, Error> {
        let body = Body {
            token: &self.token,
            result: None,
            reason: self.reason.as_deref(),
        };
        Wire::post(path(&self.id, "fail"), &body)
    }

    fn read(self, answer: Answer, sent: Sent) -> Result<Action, Error> {
        recorded(answer, &sent, &self.id, Execution::Failed)
    }
}

/// Reads an answer that has to say that this outcome is on record.
fn recorded(
    answer: Answer,
    sent: &Sent,
    id: &RequestId,
    execution: Execution,
) -> Result<Action, Error> {
    let Object(action, head) = action_of(answer, &[StatusCode::OK], &sent.about(id))?;
    if action.execution != Some(execution) {
        return Err(head.fault("another outcome is on record"));
    }
    let was_approved = action.status != Status::Pending
        && action.decision != Some(Decision::Reject)
        && action.closed.is_none();
    if !was_approved {
        return Err(head.fault("its action was not approved"));
    }
    Ok(action)
}
