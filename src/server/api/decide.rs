//! `POST /hitl/approve` and `POST /hitl/reject`.

use http::{HeaderMap, HeaderValue, StatusCode};
use http_body::Body;

use super::{Api, summary};
use crate::protocol::{Action, Code, Decision, IDEMPOTENCY_REPLAYED};
use crate::server::http::{Rejection, RequestBody, Response};
use crate::store::{Decide, Decided, Store};

impl<St: Store> Api<St> {
    pub(crate) async fn decide<B: Body>(
        &self,
        decision: Decision,
        headers: &HeaderMap,
        body: &mut RequestBody<'_, B>,
    ) -> Result<Response, Rejection> {
        let request = self.action_request(headers, body).await?;
        let decide = Decide {
            identity: request.identity,
            decision,
            call_id: request.call_id,
            payload: request.body.payload.map(Into::into),
            comment: request.body.metadata.comment,
            actor: request.actor,
            require_submission: self.settings.require_submission,
            allow_self_approval: true,
        };
        match self.await_store(self.store.decide(decide)).await? {
            Decided::Recorded(action) => {
                Ok(self.action_response(StatusCode::ACCEPTED, &summary(action)))
            }
            Decided::Replayed(action) => {
                let mut action = summary(action);
                action.replayed = true;
                let mut response = self.action_response(StatusCode::ACCEPTED, &action);
                response
                    .headers_mut()
                    .insert(IDEMPOTENCY_REPLAYED, HeaderValue::from_static("true"));
                Ok(response)
            }
            Decided::Duplicate(action) => Err(self.reject(
                Code::Duplicate,
                format!("another call had '{decision}' recorded before; there is nothing to do"),
                action,
            )),
            Decided::Conflict(action) => Err(self.reject(
                Code::DecisionConflict,
                format!(
                    "'{}' is on record for this key, so '{decision}' was not recorded",
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
            Decided::SelfApproval(_) | Decided::DigestMissing(_) | Decided::EditNotAllowed(_) => {
                Err(Rejection::new(Code::Forbidden, "not allowed"))
            }
            Decided::NotFound => Err(Rejection::not_found(
                "no such action was submitted, and this server decides submitted actions only",
            )),
        }
    }

    pub(crate) fn payload_mismatch(&self, action: Action) -> Rejection {
        self.reject(
            Code::PayloadMismatch,
            "this key stands for an action with another payload; a new action needs a new key",
            action,
        )
    }

    fn reject(
        &self,
        code: Code,
        detail: impl Into<std::borrow::Cow<'static, str>>,
        action: Action,
    ) -> Rejection {
        let location = self.location(&action.request_id);
        Rejection::new(code, detail).with_action(summary(action), location)
    }
}
