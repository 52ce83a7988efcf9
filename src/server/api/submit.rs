//! `POST /hitl/actions`.

use http::{HeaderMap, StatusCode};
use http_body::Body;

use super::{Api, entry};
use crate::server::auth::Scope;
use crate::server::http::{Rejection, RequestBody, Response};
use crate::store::{Store, Submission, Submit, Submitted};

impl<St: Store> Api<St> {
    pub(crate) async fn submit<B: Body>(
        &self,
        headers: &HeaderMap,
        body: &mut RequestBody<'_, B>,
    ) -> Result<Response, Rejection> {
        let request = self.action_request(Scope::Submit, headers, body).await?;
        let metadata = request.body.metadata;
        if metadata.comment.is_some() {
            return Err(Rejection::invalid(
                "a submission has no 'comment'; in the member 'aegis' it may have a 'title', an \
                 'expires_at' and an 'allow_edit'",
            ));
        }
        let submit = Submit {
            identity: request.identity,
            call_id: request.call_id,
            payload: request.body.payload.map(Into::into),
            submission: Submission {
                title: metadata.title,
                expires_at: metadata.expires_at,
                allow_edit: metadata.allow_edit.unwrap_or(false),
            },
            actor: request.actor,
            only_existing: false,
        };
        match self.await_store(self.store.submit(submit)).await? {
            Submitted::Recorded(action) => {
                Ok(self.action_response(StatusCode::CREATED, &entry(action)))
            }
            Submitted::Existing(action) => Ok(self.action_response(StatusCode::OK, &entry(action))),
            Submitted::PayloadMismatch(action) => Err(self.payload_mismatch(action)),
            Submitted::NotFound => Err(Rejection::invalid(
                "the 'expires_at' of the member 'aegis' is not in the future",
            )),
        }
    }
}
