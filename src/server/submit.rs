//! `POST /hitl/actions`.

use http::{HeaderMap, StatusCode};
use http_body::Body;

use super::answer::{Answer, Refusal};
use super::body::Upload;
use super::request;
use super::service::{Shared, receipt};
use crate::store::{Identity, Store, Submit, Submitted};

impl<St: Store> Shared<St> {
    pub(super) async fn submit<B: Body>(
        &self,
        headers: &HeaderMap,
        upload: &mut Upload<'_, B>,
    ) -> Result<Answer, Refusal> {
        let caller = self.settings.auth.caller(headers)?.may_decide()?;
        let identity = Identity {
            tenant_id: caller.tenant_id,
            thread_id: request::thread_id(headers)?,
            idempotency_key: request::idempotency_key(headers)?,
        };
        let call_id = request::call_id(headers)?;
        let body = self.read(headers, upload).await?;
        if body.comment.is_some() {
            return Err(Refusal::invalid(
                "a submission has no comment; the member 'aegis' belongs to a decision",
            ));
        }
        let submit = Submit {
            identity,
            call_id,
            payload: body.payload.map(Into::into),
            actor: caller.actor,
        };
        match self.ask(self.store.submit(submit)).await? {
            Submitted::Recorded(action) => Ok(self.recorded(StatusCode::CREATED, &receipt(action))),
            Submitted::Existing(action) => Ok(self.recorded(StatusCode::OK, &receipt(action))),
            Submitted::PayloadMismatch(action) => Err(self.payload_mismatch(action)),
        }
    }
}
