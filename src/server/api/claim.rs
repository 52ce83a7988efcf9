//! `POST /hitl/actions/{id}/claim`, `/renew`, `/complete` and `/fail`.

use std::time::Duration;

use http::{HeaderMap, StatusCode};
use http_body::Body;
use serde::{Deserialize, Serialize};

use super::{Api, entry, no_such_action, replayed};
use crate::protocol::{Action, Claim, ClaimToken, Code, Digest, JsonText, check_json};
use crate::server::auth::Scope;
use crate::server::http::{Rejection, RequestBody, Response, response};
use crate::store::{Acquire, Acquired, Finish, Finished, Renew, Renewed, Report, Store};

/// The default lease, in seconds.
pub(crate) const LEASE: u64 = 300;

/// The longest lease, in seconds: a day.
pub(crate) const MAX_LEASE: u64 = 86_400;

/// The largest result, in bytes.
const MAX_RESULT: usize = 64 * 1024;

/// The most characters of a reason.
pub(crate) const MAX_REASON: usize = 4096;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ClaimBody {
    digest: Option<Digest>,
    lease: Option<u64>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RenewBody {
    token: ClaimToken,
    lease: Option<u64>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct CompleteBody {
    token: ClaimToken,
    #[serde(default, deserialize_with = "present")]
    result: Option<JsonText>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FailBody {
    token: ClaimToken,
    reason: Option<String>,
}

/// Reads a member that is present, whatever its value: `null` is a result too.
fn present<'de, D: serde::Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<JsonText>, D::Error> {
    JsonText::deserialize(deserializer).map(Some)
}

#[derive(Serialize)]
struct Claimed<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    action: Option<&'a Action>,
    claim: &'a Claim,
}

fn lease(seconds: Option<u64>) -> Result<Duration, Rejection> {
    let seconds = seconds.unwrap_or(LEASE);
    if (1..=MAX_LEASE).contains(&seconds) {
        Ok(Duration::from_secs(seconds))
    } else {
        Err(Rejection::invalid(format!(
            "the member 'lease' is {seconds}; allowed are 1 to {MAX_LEASE} seconds"
        )))
    }
}

impl<St: Store> Api<St> {
    pub(crate) async fn claim<B: Body>(
        &self,
        id: &str,
        headers: &HeaderMap,
        body: &mut RequestBody<'_, B>,
    ) -> Result<Response, Rejection> {
        let request = self
            .request_by_id::<_, ClaimBody>(Scope::Claim, id, headers, body)
            .await?;
        let acquire = Acquire {
            id: request.id,
            tenant_id: request.caller.tenant_id,
            digest: request.body.digest,
            lease: lease(request.body.lease)?,
            call_id: request.call_id,
            actor: request.caller.actor,
        };
        match self.await_store(self.store.acquire(acquire)).await? {
            Acquired::Claimed(action, claim) => Ok(self.claimed(&action, &claim)),
            Acquired::Replayed(action, claim) => Ok(replayed(self.claimed(&action, &claim))),
            Acquired::AlreadyClaimed(action) => Err(self.reject(
                Code::AlreadyClaimed,
                "another call has claimed the action; its 'execution' tells how it stands",
                action,
            )),
            Acquired::NotApproved(action) => Err(self.reject(
                Code::NotApproved,
                "the action is not approved, or its execution failed and nobody has decided again",
                action,
            )),
            Acquired::PayloadMismatch(action) => Err(self.reject(
                Code::PayloadMismatch,
                "what was approved has another digest than what is about to be run",
                action,
            )),
            Acquired::DigestMissing(action) => Err(self.digest_missing(action)),
            Acquired::Lost(action) => Err(self.reject(
                Code::ClaimLost,
                "the claim that this same call made has ended; a new claim is a new call",
                action,
            )),
            Acquired::NotFound => Err(no_such_action()),
        }
    }

    /// Shows a claim with what is to be run.
    fn claimed(&self, action: &Action, claim: &Claim) -> Response {
        let action = Some(action);
        response::json(StatusCode::OK, &Claimed { action, claim })
    }

    pub(crate) async fn renew<B: Body>(
        &self,
        id: &str,
        headers: &HeaderMap,
        body: &mut RequestBody<'_, B>,
    ) -> Result<Response, Rejection> {
        let request = self
            .request_by_id::<_, RenewBody>(Scope::Claim, id, headers, body)
            .await?;
        let renew = Renew {
            id: request.id,
            tenant_id: request.caller.tenant_id,
            token: request.body.token,
            lease: lease(request.body.lease)?,
        };
        match self.await_store(self.store.renew(renew)).await? {
            Renewed::Extended(claim) => {
                let claim = Claimed {
                    action: None,
                    claim: &claim,
                };
                Ok(response::json(StatusCode::OK, &claim))
            }
            Renewed::Lost(action) => Err(self.claim_lost(action)),
            Renewed::NotFound => Err(no_such_action()),
        }
    }

    pub(crate) async fn complete<B: Body>(
        &self,
        id: &str,
        headers: &HeaderMap,
        body: &mut RequestBody<'_, B>,
    ) -> Result<Response, Rejection> {
        let request = self
            .request_by_id::<_, CompleteBody>(Scope::Claim, id, headers, body)
            .await?;
        let result = request.body.result;
        if let Some(result) = &result
            && result.as_str().len() > MAX_RESULT
        {
            return Err(Rejection::new(
                Code::PayloadTooLarge,
                format!(
                    "the result has {} bytes; allowed are {MAX_RESULT}",
                    result.as_str().len()
                ),
            ));
        }
        if let Some(result) = &result {
            check_json(result.as_str())
                .map_err(|error| Rejection::invalid(format!("the member 'result': {error}")))?;
        }
        self.finish(Finish {
            id: request.id,
            tenant_id: request.caller.tenant_id,
            token: request.body.token,
            report: Report::Completed(result),
            call_id: request.call_id,
            actor: request.caller.actor,
        })
        .await
    }

    pub(crate) async fn fail<B: Body>(
        &self,
        id: &str,
        headers: &HeaderMap,
        body: &mut RequestBody<'_, B>,
    ) -> Result<Response, Rejection> {
        let request = self
            .request_by_id::<_, FailBody>(Scope::Claim, id, headers, body)
            .await?;
        let reason = request.body.reason;
        if let Some(reason) = &reason
            && reason.chars().count() > MAX_REASON
        {
            return Err(Rejection::invalid(format!(
                "the member 'reason' has more than {MAX_REASON} characters"
            )));
        }
        self.finish(Finish {
            id: request.id,
            tenant_id: request.caller.tenant_id,
            token: request.body.token,
            report: Report::Failed(reason),
            call_id: request.call_id,
            actor: request.caller.actor,
        })
        .await
    }

    async fn finish(&self, finish: Finish) -> Result<Response, Rejection> {
        match self.await_store(self.store.finish(finish)).await? {
            Finished::Recorded(action) => Ok(self.action_response(StatusCode::OK, &entry(action))),
            Finished::Replayed(action) => Ok(self.replayed_response(StatusCode::OK, entry(action))),
            Finished::Lost(action) => Err(self.claim_lost(action)),
            Finished::NotFound => Err(no_such_action()),
        }
    }

    fn claim_lost(&self, action: Action) -> Rejection {
        self.reject(
            Code::ClaimLost,
            "the token is not that of a live claim on this action: its lease has ended, or another \
             outcome is on record",
            action,
        )
    }
}
