//! `GET /hitl/actions/{id}`.

use http::{HeaderMap, StatusCode};

use super::{Api, no_such_action, uuid_of};
use crate::server::auth::Scope;
use crate::server::http::{Rejection, Response, headers, response};
use crate::store::Store;

impl<St: Store> Api<St> {
    pub(crate) async fn look_up(
        &self,
        id: &str,
        headers: &HeaderMap,
    ) -> Result<Response, Rejection> {
        let caller = self.authenticate(headers)?;
        let caller = caller.with(Scope::Read)?;
        headers::call_id(headers)?;
        let id = uuid_of(id)?;
        let found = self.store.look_up(id, &caller.tenant_id);
        let action = self.await_store(found).await?;
        let action = action.ok_or_else(no_such_action)?;
        Ok(response::json(StatusCode::OK, &action))
    }
}
