//! `POST /hitl/actions/{id}/cancel`.

use http::{HeaderMap, StatusCode};
use http_body::Body;
use serde::Deserialize;

use super::{Api, no_such_action, summary};
use crate::protocol::Code;
use crate::server::auth::Scope;
use crate::server::http::{Rejection, RequestBody, Response};
use crate::store::{Cancel, Cancelled, Store};

/// The body of a cancellation, which has no members.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Nothing {}

impl<St: Store> Api<St> {
    pub(crate) async fn cancel<B: Body>(
        &self,
        id: &str,
        headers: &HeaderMap,
        body: &mut RequestBody<'_, B>,
    ) -> Result<Response, Rejection> {
        let request = self
            .request_by_id::<_, Nothing>(Scope::Submit, id, headers, body)
            .await?;
        let caller = request.caller;
        let cancel = Cancel {
            id: request.id,
            call_id: request.call_id,
            may_cancel_all: !caller.is_known() || caller.may(Scope::Admin),
            tenant_id: caller.tenant_id,
            actor: caller.actor,
        };
        match self.await_store(self.store.cancel(cancel)).await? {
            Cancelled::Recorded(action) => {
                Ok(self.action_response(StatusCode::ACCEPTED, &summary(action)))
            }
            Cancelled::Replayed(action) => {
                Ok(self.replayed_response(StatusCode::ACCEPTED, summary(action)))
            }
            Cancelled::Duplicate(action) => Err(self.reject(
                Code::Duplicate,
                "another call cancelled the action before; there is nothing to do",
                action,
            )),
            Cancelled::Decided(action) => Err(self.reject(
                Code::ActionClosed,
                "the action is decided or has expired, so it was not cancelled",
                action,
            )),
            Cancelled::Forbidden => Err(Rejection::new(
                Code::Forbidden,
                "another owner submitted this action; to cancel it needs the scope 'admin'",
            )),
            Cancelled::NotFound => Err(no_such_action()),
        }
    }
}
