//! Submitting an action for a decision.

use std::fmt;
use std::time::SystemTime;

use http::StatusCode;
use jiff::Timestamp;
use serde::Serialize;
use serde_json::{Map, Value};

use super::{Operation, OperationCall, Sent, Wire, checked, digest_of, payload_of};
use crate::client::Error;
use crate::client::answer::{Answer, Object, Subject, action_of};
use crate::client::endpoints::Endpoints;
use crate::client::request::{has_reserved_member, with_metadata};
use crate::protocol::{Action, IdempotencyKey, InvalidValue, Payload, Status, ThreadId};

/// The submission of an action; see [`AegisService::submit`](crate::AegisService::submit).
#[derive(Clone)]
pub struct Submit {
    key: IdempotencyKey,
    pub(in crate::client) thread: Option<ThreadId>,
    pub(in crate::client) payload: Option<Payload>,
    title: Option<String>,
    expires_at: Option<SystemTime>,
    allow_edit: Option<bool>,
}

impl Submit {
    pub(in crate::client) fn new(key: IdempotencyKey) -> Self {
        Self {
            key,
            thread: None,
            payload: None,
            title: None,
            expires_at: None,
            allow_edit: None,
        }
    }

    fn metadata(&self) -> Result<Map<String, Value>, Error> {
        let mut metadata = Map::new();
        if let Some(title) = &self.title {
            metadata.insert("title".to_owned(), title.as_str().into());
        }
        if let Some(end) = self.expires_at {
            let end = Timestamp::try_from(end)
                .map_err(|error| Error::request(format!("'expires_at' is unusable: {error}")))?;
            metadata.insert("expires_at".to_owned(), end.to_string().into());
        }
        if let Some(allow) = self.allow_edit {
            metadata.insert("allow_edit".to_owned(), allow.into());
        }
        Ok(metadata)
    }
}

impl fmt::Debug for Submit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Without what people or agents wrote, because requests get logged.
        f.debug_struct("Submit")
            .field("thread", &self.thread)
            .field("expires_at", &self.expires_at)
            .field("allow_edit", &self.allow_edit)
            .finish_non_exhaustive()
    }
}

/// The parts of a submission.
impl<S> OperationCall<S, Submit> {
    /// Sets the thread, in place of the service's.
    pub fn thread_id<T>(self, thread: T) -> Self
    where
        T: TryInto<ThreadId, Error: Into<InvalidValue>>,
    {
        self.with(checked(thread), |submit, thread| {
            submit.thread = Some(thread)
        })
    }

    /// Sets what the action is about: anything that serializes to a JSON object. Its member
    /// `aegis` is reserved.
    pub fn payload<T: Serialize + ?Sized>(self, payload: &T) -> Self {
        self.with(payload_of(payload), |submit, payload| {
            submit.payload = Some(payload);
        })
    }

    /// Sets what the action is about in a line for people: 1 to 256 characters.
    pub fn title(self, title: impl Into<String>) -> Self {
        self.with(Ok(title.into()), |submit, title| submit.title = Some(title))
    }

    /// Sets when the action is rejected as expired, if nobody has decided by then. It must be in
    /// the future. By default it waits for as long as it takes.
    pub fn expires_at(self, end: SystemTime) -> Self {
        self.with(Ok(end), |submit, end| submit.expires_at = Some(end))
    }

    /// Sets whether the reviewer may edit the payload. The default is no.
    pub fn allow_edit(self, allow: bool) -> Self {
        self.with(Ok(allow), |submit, allow| submit.allow_edit = Some(allow))
    }
}

impl Operation for Submit {
    type Output = Action;

    fn wire(&mut self, endpoints: &Endpoints) -> Result<Wire, Error> {
        if self.payload.as_ref().is_some_and(has_reserved_member) {
            return Err(Error::request(
                "the payload has the reserved member 'aegis'",
            ));
        }
        let thread = endpoints.thread(self.thread.as_ref())?.clone();
        self.thread = Some(thread.clone());
        let metadata = self.metadata()?;
        let body = if metadata.is_empty() {
            let payload = self.payload.clone();
            payload.map_or("{}".into(), Payload::into_bytes)
        } else {
            with_metadata(self.payload.as_ref(), &metadata.into())
        };
        Ok(Wire {
            path: String::new(),
            body: Some(body),
            thread: Some(thread),
            key: Some(self.key.clone()),
        })
    }

    fn read(self, answer: Answer, sent: Sent) -> Result<Action, Error> {
        let subject = Subject {
            tenant: sent.tenant.as_ref(),
            thread: self.thread.as_ref(),
            key: Some(&self.key),
            id: None,
        };
        let statuses = [StatusCode::CREATED, StatusCode::OK];
        let Object(action, head) = action_of(answer, &statuses, &subject)?;
        // Once it is decided, the digest may be that of what the reviewer edited.
        let is_new = head.status == StatusCode::CREATED || action.status == Status::Pending;
        if is_new
            && let Some(recorded) = action.digest
            && let Some(payload) = &self.payload
            && digest_of(payload)?.is_some_and(|sent| sent != recorded)
        {
            return Err(head.fault("it is about another payload"));
        }
        Ok(action)
    }
}
