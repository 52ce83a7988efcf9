//! Reads a server's answer. The status alone is not trusted where the body says more.

use std::error::Error as StdError;
use std::time::Duration;

use bytes::{Buf, Bytes};
use http::header::RETRY_AFTER;
use http::{Response, StatusCode};
use http_body::Body;
use http_body_util::{BodyExt, Limited};
use serde::Deserialize;

use super::{Error, Outcome, Receipt};
use crate::layer::{Attempts, Confirmation};
use crate::protocol::{Action, Code, Decision, Problem, RequestId};

/// The most bytes of an answer that are read.
const MAX_ANSWER: usize = 1024 * 1024;

/// A 202 of a server that does not answer with a whole action.
#[derive(Deserialize)]
struct Named {
    request_id: Option<String>,
}

/// Turns the answer to a decision into a receipt or an error.
pub(super) async fn receipt<R>(
    response: Response<R>,
    decision: Decision,
    call_id: RequestId,
    timeout: Duration,
) -> Result<Receipt, Error>
where
    R: Body,
    R::Error: Into<Box<dyn StdError + Send + Sync>>,
{
    let attempts = Attempts::of(&response);
    let status = response.status();
    let duplicate = Confirmation::of(&response) == Some(Confirmation::Duplicate)
        && !response.headers().contains_key(RETRY_AFTER);
    let body = read(response.into_body(), timeout).await;
    let outcome = match status {
        // A layer of the caller's may have turned the 409 into a success already; it left the mark.
        _ if duplicate => Outcome::Duplicate,
        StatusCode::ACCEPTED => Outcome::Accepted,
        _ => return Err(refusal(status, attempts, body)),
    };
    let action = match (outcome, &body) {
        // The head says it: what the body would add is lost, the decision is not.
        (Outcome::Accepted, Err(_)) => None,
        (Outcome::Accepted, Ok(body)) => serde_json::from_slice::<Action>(body).ok(),
        (Outcome::Duplicate, Err(_)) => {
            let detail =
                "the answer to a duplicate broke off, so which decision it confirms is unknown";
            return Err(Error::protocol(detail, status, attempts));
        }
        (Outcome::Duplicate, Ok(body)) => {
            let problem = serde_json::from_slice::<Problem>(body).ok();
            match problem.as_ref().map(|problem| problem.code) {
                // Without a code of ours the status speaks: the seed's server says no more.
                None | Some(Code::Duplicate | Code::Unknown) => {}
                Some(_) => return Err(Error::status(problem, status, attempts)),
            }
            problem
                .and_then(|problem| problem.action)
                .map(|action| *action)
        }
    };
    if let Some(action) = &action {
        agrees(action, decision, status, attempts)?;
    }
    let request_id = match (&action, &body) {
        (Some(action), _) => Some(action.request_id.clone()),
        (None, Ok(body)) => serde_json::from_slice::<Named>(body)
            .ok()
            .and_then(|named| named.request_id)
            .and_then(|id| RequestId::new(id).ok()),
        (None, Err(_)) => None,
    };
    Ok(Receipt {
        outcome,
        decision,
        status,
        attempts,
        call_id,
        request_id,
        action,
    })
}

/// Completes the receipt of a bare 409 with what the status endpoint told.
pub(super) fn verified(receipt: Receipt, action: Action) -> Result<Receipt, Error> {
    if action.decision.is_none() {
        return Err(Error::unverified(&receipt));
    }
    agrees(&action, receipt.decision, receipt.status, receipt.attempts)?;
    Ok(Receipt {
        request_id: Some(action.request_id.clone()),
        action: Some(action),
        ..receipt
    })
}

/// Whatever the status says, a recorded opposite is no success.
fn agrees(
    action: &Action,
    decision: Decision,
    status: StatusCode,
    attempts: u32,
) -> Result<(), Error> {
    if action.decision != Some(decision.opposite()) {
        return Ok(());
    }
    let code = Code::DecisionConflict;
    let problem = Problem::new(code, status.as_u16(), "Decision conflict", "");
    let problem = problem.with_action(action.clone());
    Err(Error::conflict(problem, status, attempts))
}

/// Turns the answer to a status question into the action or an error.
pub(super) async fn action<R>(response: Response<R>, timeout: Duration) -> Result<Action, Error>
where
    R: Body,
    R::Error: Into<Box<dyn StdError + Send + Sync>>,
{
    let attempts = Attempts::of(&response);
    let status = response.status();
    let body = read(response.into_body(), timeout).await;
    if status != StatusCode::OK {
        return Err(refusal(status, attempts, body));
    }
    let broken = "the status answer is not of the protocol";
    let body = body.map_err(|error| Error::protocol_caused(broken, status, attempts, error))?;
    serde_json::from_slice(&body)
        .map_err(|error| Error::protocol_caused(broken, status, attempts, error))
}

fn refusal(status: StatusCode, attempts: u32, body: Result<Bytes, ReadError>) -> Error {
    let problem = body
        .ok()
        .and_then(|body| serde_json::from_slice::<Problem>(&body).ok());
    Error::status(problem, status, attempts)
}

type ReadError = Box<dyn StdError + Send + Sync>;

async fn read<R>(body: R, timeout: Duration) -> Result<Bytes, ReadError>
where
    R: Body,
    R::Error: Into<ReadError>,
{
    let collected = Limited::new(body, MAX_ANSWER).collect();
    let collected = tokio::time::timeout(timeout, collected).await??;
    let mut collected = collected.aggregate();
    Ok(collected.copy_to_bytes(collected.remaining()))
}
