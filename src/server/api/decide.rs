//! `POST /hitl/approve` and `POST /hitl/reject`, by key, and `POST /hitl/actions/{id}/approve` and
//! `/reject`, on what was seen.

use http::{HeaderMap, StatusCode};
use http_body::Body;
use serde::Deserialize;

use super::{Api, no_such_action, summary};
use crate::protocol::{Action, Code, Decision, Digest, Payload, edited, limited_comment};
use crate::server::auth::Scope;
use crate::server::http::{Rejection, RequestBody, Response};
use crate::store::{Decide, DecideById, Decided, Fingerprinted, Store};

/// The body of a decision by id.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Seen {
    digest: Option<Digest>,
    comment: Option<String>,
    payload: Option<Payload>,
}

impl<St: Store> Api<St> {
    pub(crate) async fn decide<B: Body>(
        &self,
        decision: Decision,
        headers: &HeaderMap,
        body: &mut RequestBody<'_, B>,
    ) -> Result<Response, Rejection> {
        let request = self.action_request(Scope::Decide, headers, body).await?;
        if request.body.metadata.is_of_a_submission() {
            return Err(Rejection::invalid(
                "a decision has no 'title', 'expires_at' or 'allow_edit'; in the member 'aegis' it \
                 may have a 'comment'",
            ));
        }
        let decide = Decide {
            identity: request.identity,
            decision,
            call_id: request.call_id,
            payload: request.body.payload.map(Into::into),
            comment: request.body.metadata.comment,
            actor: request.actor,
            require_submission: self.settings.require_submission,
            allow_self_approval: request.allow_self_approval,
        };
        match self.await_store(self.store.decide(decide)).await? {
            Decided::NotFound => Err(Rejection::not_found(
                "no such action was submitted, and this server decides submitted actions only",
            )),
            decided => self.decided(decision, decided),
        }
    }

    pub(crate) async fn decide_by_id<B: Body>(
        &self,
        decision: Decision,
        id: &str,
        headers: &HeaderMap,
        body: &mut RequestBody<'_, B>,
    ) -> Result<Response, Rejection> {
        let request = self
            .request_by_id::<_, Seen>(Scope::Decide, id, headers, body)
            .await?;
        let Seen {
            digest,
            comment,
            payload,
        } = request.body;
        if let Some(comment) = &comment {
            limited_comment(comment)
                .map_err(|what| Rejection::invalid(format!("the body {what}")))?;
        }
        if payload.is_some() && decision == Decision::Reject {
            return Err(Rejection::invalid(
                "a rejection has no 'payload'; only what is approved can be edited",
            ));
        }
        let edited = payload
            .map(edited)
            .transpose()
            .map_err(|what| Rejection::invalid(format!("the member 'payload': {what}")))?
            .map(Fingerprinted::from);
        let decide = DecideById {
            id: request.id,
            decision,
            call_id: request.call_id,
            digest,
            edited,
            comment,
            allow_self_approval: self.allows_self_approval(&request.caller),
            tenant_id: request.caller.tenant_id,
            actor: request.caller.actor,
        };
        let decided = self.await_store(self.store.decide_by_id(decide)).await?;
        self.decided(decision, decided)
    }

    fn decided(&self, decision: Decision, decided: Decided) -> Result<Response, Rejection> {
        match decided {
            Decided::Recorded(action) => {
                Ok(self.action_response(StatusCode::ACCEPTED, &summary(action)))
            }
            Decided::Replayed(action) => {
                Ok(self.replayed_response(StatusCode::ACCEPTED, summary(action)))
            }
            Decided::Duplicate(action) => Err(self.reject(
                Code::Duplicate,
                format!("another call had '{decision}' recorded before; there is nothing to do"),
                action,
            )),
            Decided::Conflict(action) => Err(self.reject(
                Code::DecisionConflict,
                format!(
                    "'{}' is on record for this action, so '{decision}' was not recorded",
                    decision.opposite()
                ),
                action,
            )),
            Decided::PayloadMismatch(action) => Err(self.payload_mismatch(action)),
            Decided::Closed(action) => Err(self.reject(
                Code::ActionClosed,
                format!("the action expired or was cancelled, so '{decision}' was not recorded"),
                action,
            )),
            Decided::SelfApproval(action) => Err(self.reject(
                Code::SelfApproval,
                "the owner of this API key submitted the action; another must decide",
                action,
            )),
            Decided::DigestMissing(action) => Err(self.digest_missing(action)),
            Decided::EditNotAllowed(action) => Err(self.reject(
                Code::EditNotAllowed,
                "the submission of this action does not allow the reviewer to edit the payload",
                action,
            )),
            Decided::NotFound => Err(no_such_action()),
        }
    }

    pub(crate) fn payload_mismatch(&self, action: Action) -> Rejection {
        self.reject(
            Code::PayloadMismatch,
            "the action on record has another payload; look at it again, or use a new key for a \
             new action",
            action,
        )
    }

    pub(crate) fn digest_missing(&self, action: Action) -> Rejection {
        self.reject(
            Code::InvalidRequest,
            "the action has a payload, so the body must have the member 'digest', that of the \
             payload which was seen",
            action,
        )
    }
}
