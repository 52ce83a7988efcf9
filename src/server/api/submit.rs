//! `POST /hitl/actions`.

use http::{HeaderMap, StatusCode};
use http_body::Body;

use super::{Api, summary};
use crate::server::http::{Rejection, RequestBody, Response};
use crate::store::{Store, Submission, Submit, Submitted};

impl<St: Store> Api<St> {
    pub(crate) async fn submit<B: Body>(
        &self,
        headers: &HeaderMap,
        body: &mut RequestBody<'_, B>,
    ) -> Result<Response, Rejection> {
        let request = self.action_request(headers, body).await?;
        if request.body.metadata.comment.is_some() {
            return Err(Rejection::invalid(
                "a submission has no comment; the member 'aegis' belongs to a decision",
            ));
        }
        let submit = Submit {
            identity: request.identity,
            call_id: request.call_id,
            payload: request.body.payload.map(Into::into),
            submission: Submission::default(),
            actor: request.actor,
        };
        match self.await_store(self.store.submit(submit)).await? {
            Submitted::Recorded(action) => {
                Ok(self.action_response(StatusCode::CREATED, &summary(action)))
            }
            Submitted::Existing(action) => {
                Ok(self.action_response(StatusCode::OK, &summary(action)))
            }
            Submitted::PayloadMismatch(action) => Err(self.payload_mismatch(action)),
        }
    }
}
