//! Looking at one action with all that is on record.

use http::StatusCode;

use super::{Operation, Sent, Wire, digest_shown, path};
use crate::client::Error;
use crate::client::answer::{Answer, Object, action_of};
use crate::client::endpoints::Endpoints;
use crate::protocol::{Action, RequestId};

/// A look at one action; see [`AegisService::look`](crate::AegisService::look).
#[derive(Debug, Clone)]
pub struct Look {
    id: RequestId,
}

impl Look {
    pub(in crate::client) fn new(id: RequestId) -> Self {
        Self { id }
    }
}

impl Operation for Look {
    type Output = Action;

    fn wire(&mut self, _: &Endpoints) -> Result<Wire, Error> {
        Ok(Wire::get(path(&self.id, "")))
    }

    fn read(self, answer: Answer, sent: Sent) -> Result<Action, Error> {
        let Object(action, head) = action_of(answer, &[StatusCode::OK], &sent.about(&self.id))?;
        // The digest stands for what is seen, so it must be that of what is shown.
        let shown = digest_shown(&action).map_err(|_| head.fault("its payload has no digest"))?;
        if action.digest.is_some() && shown.is_some_and(|shown| shown != action.digest) {
            return Err(head.fault("its digest is not that of its payload"));
        }
        Ok(action)
    }
}
