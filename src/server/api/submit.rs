//! `POST /hitl/actions`.

use http::{HeaderMap, StatusCode};
use http_body::Body;

use super::{Shared, receipt};
use crate::server::http::{Answer, Refusal, Upload};
use crate::store::{Store, Submit, Submitted};

impl<St: Store> Shared<St> {
    pub(crate) async fn submit<B: Body>(
        &self,
        headers: &HeaderMap,
        upload: &mut Upload<'_, B>,
    ) -> Result<Answer, Refusal> {
        let asked = self.asked(headers, upload).await?;
        if asked.body.comment.is_some() {
            return Err(Refusal::invalid(
                "a submission has no comment; the member 'aegis' belongs to a decision",
            ));
        }
        let submit = Submit {
            identity: asked.identity,
            call_id: asked.call_id,
            payload: asked.body.payload.map(Into::into),
            actor: asked.actor,
        };
        match self.ask(self.store.submit(submit)).await? {
            Submitted::Recorded(action) => Ok(self.recorded(StatusCode::CREATED, &receipt(action))),
            Submitted::Existing(action) => Ok(self.recorded(StatusCode::OK, &receipt(action))),
            Submitted::PayloadMismatch(action) => Err(self.payload_mismatch(action)),
        }
    }
}
