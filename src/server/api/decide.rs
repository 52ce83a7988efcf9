//! `POST /hitl/approve` and `POST /hitl/reject`.

use http::{HeaderMap, HeaderValue, StatusCode};
use http_body::Body;

use super::{Shared, receipt};
use crate::protocol::{Action, Code, Decision, IDEMPOTENCY_REPLAYED};
use crate::server::http::{Answer, Refusal, Upload};
use crate::store::{Decide, Decided, Store};

impl<St: Store> Shared<St> {
    pub(crate) async fn decide<B: Body>(
        &self,
        decision: Decision,
        headers: &HeaderMap,
        upload: &mut Upload<'_, B>,
    ) -> Result<Answer, Refusal> {
        let asked = self.asked(headers, upload).await?;
        let asked = Decide {
            identity: asked.identity,
            decision,
            call_id: asked.call_id,
            payload: asked.body.payload.map(Into::into),
            comment: asked.body.comment,
            actor: asked.actor,
            require_submission: self.settings.require_submission,
        };
        match self.ask(self.store.decide(asked)).await? {
            Decided::Recorded(action) => Ok(self.recorded(StatusCode::ACCEPTED, &receipt(action))),
            Decided::Replayed(action) => {
                let mut action = receipt(action);
                action.replayed = true;
                let mut answer = self.recorded(StatusCode::ACCEPTED, &action);
                answer
                    .headers_mut()
                    .insert(IDEMPOTENCY_REPLAYED, HeaderValue::from_static("true"));
                Ok(answer)
            }
            Decided::Duplicate(action) => Err(self.refused(
                Code::Duplicate,
                format!("another call had '{decision}' recorded before; there is nothing to do"),
                action,
            )),
            Decided::Conflict(action) => Err(self.refused(
                Code::DecisionConflict,
                format!(
                    "'{}' is on record for this key, so '{decision}' was not recorded",
                    decision.opposite()
                ),
                action,
            )),
            Decided::PayloadMismatch(action) => Err(self.payload_mismatch(action)),
            Decided::Closed(action) => Err(self.refused(
                Code::ActionClosed,
                format!("the action expired or was cancelled, so '{decision}' was not recorded"),
                action,
            )),
            Decided::NotFound => Err(Refusal::not_found(
                "no such action was submitted, and this server decides submitted actions only",
            )),
        }
    }

    pub(crate) fn payload_mismatch(&self, action: Action) -> Refusal {
        self.refused(
            Code::PayloadMismatch,
            "this key stands for an action with another payload; a new action needs a new key",
            action,
        )
    }

    fn refused(
        &self,
        code: Code,
        detail: impl Into<std::borrow::Cow<'static, str>>,
        action: Action,
    ) -> Refusal {
        let location = self.location(&action.request_id);
        Refusal::new(code, detail).with_action(receipt(action), location)
    }
}
