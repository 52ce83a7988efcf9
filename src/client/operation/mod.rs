//! The calls of the human loop, one file each, and what they share.

mod cancel;
mod claim;
mod decide;
mod list;
mod look;
mod report;
mod submit;

use std::fmt;
use std::future::IntoFuture;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body::Body;
use http_body_util::Full;
use serde::Serialize;
use tower_service::Service;

use super::answer::{Answer, Subject};
use super::endpoints::{Endpoints, percent_encoded};
use super::request::{BoxFuture, Limits, limit_setters};
use super::{AegisService, Error};
use crate::protocol::{
    Action, Digest, IdempotencyKey, InvalidValue, Payload, RequestId, TenantId, ThreadId,
};

pub use self::cancel::Cancel;
pub(super) use self::claim::seconds as lease_in_seconds;
pub use self::claim::{Claim, Claimed, Renew};
pub use self::decide::DecideById;
pub use self::list::{ActionPage, List};
pub use self::look::Look;
pub use self::report::{Complete, Fail};
pub use self::submit::Submit;

/// What a request is, besides the parts that all requests have.
pub(super) struct Wire {
    /// What follows `/hitl/actions`.
    pub(super) path: String,
    /// The JSON body of a `POST`. Without one it is a `GET`.
    pub(super) body: Option<Bytes>,
    pub(super) thread: Option<ThreadId>,
    pub(super) key: Option<IdempotencyKey>,
}

impl Wire {
    fn get(path: String) -> Self {
        Self {
            path,
            body: None,
            thread: None,
            key: None,
        }
    }

    fn post(path: String, body: &impl Serialize) -> Result<Self, Error> {
        let body = serde_json::to_vec(body)
            .map_err(|error| Error::request(format!("the request is unusable: {error}")))?;
        Ok(Self {
            body: Some(body.into()),
            ..Self::get(path)
        })
    }
}

/// The path of an action, or of something about it, after `/hitl/actions`.
fn path(id: &RequestId, verb: &str) -> String {
    let slash = if verb.is_empty() { "" } else { "/" };
    format!("/{}{slash}{verb}", percent_encoded(id.as_str()))
}

/// What a call may set for itself.
#[derive(Debug, Clone, Default)]
pub(super) struct Settings {
    pub(super) tenant: Option<TenantId>,
    pub(super) call_id: Option<RequestId>,
    pub(super) limits: Limits,
}

/// What was sent, for the comparison with the answer.
pub(super) struct Sent {
    /// `None` if the API key names it.
    pub(super) tenant: Option<TenantId>,
    pub(super) call_id: RequestId,
}

impl Sent {
    fn about<'a>(&'a self, id: &'a RequestId) -> Subject<'a> {
        Subject {
            tenant: self.tenant.as_ref(),
            id: Some(id),
            ..Subject::default()
        }
    }
}

/// One call of the human loop: its request, and what its answer means.
pub(super) trait Operation {
    type Output;

    fn wire(&mut self, endpoints: &Endpoints) -> Result<Wire, Error>;

    fn read(self, answer: Answer, sent: Sent) -> Result<Self::Output, Error>;
}

/// A call that is sent when awaited.
///
/// All attempts of a call carry the same `X-Request-Id`, so the server knows a call's own retries.
/// They are safe, whatever the call does, and follow the service's rules for retries, timeouts and
/// deadlines.
///
/// Its methods depend on the operation: see [`Submit`], [`List`], [`Look`], [`DecideById`],
/// [`Cancel`], [`Claim`], [`Renew`], [`Complete`] and [`Fail`].
#[must_use = "a call is sent when it is awaited"]
pub struct OperationCall<S, O> {
    service: AegisService<S>,
    operation: Result<O, Error>,
    settings: Settings,
}

impl<S, O> OperationCall<S, O> {
    pub(super) fn new(service: AegisService<S>, operation: Result<O, Error>) -> Self {
        Self {
            service,
            operation,
            settings: Settings::default(),
        }
    }

    /// Makes a call about the action with an id.
    pub(super) fn about<T>(
        service: AegisService<S>,
        id: T,
        make: impl FnOnce(RequestId) -> O,
    ) -> Self
    where
        T: TryInto<RequestId, Error: Into<InvalidValue>>,
    {
        Self::new(service, checked(id).map(make))
    }

    /// Sets a part of the operation. The first fault is the one reported.
    fn with<T>(mut self, value: Result<T, Error>, set: impl FnOnce(&mut O, T)) -> Self {
        self.operation = self.operation.and_then(|mut operation| {
            set(&mut operation, value?);
            Ok(operation)
        });
        self
    }

    /// Sets the tenant, in place of the service's.
    pub fn tenant_id<T>(mut self, tenant: T) -> Self
    where
        T: TryInto<TenantId, Error: Into<InvalidValue>>,
    {
        match checked(tenant) {
            Ok(tenant) => self.settings.tenant = Some(tenant),
            Err(error) => self.operation = self.operation.and(Err(error)),
        }
        self
    }

    /// Sends this `X-Request-Id` instead of a minted one, so that a repeated call counts as the
    /// same call.
    pub fn call_id<T>(mut self, id: T) -> Self
    where
        T: TryInto<RequestId, Error: Into<InvalidValue>>,
    {
        match checked(id) {
            Ok(id) => self.settings.call_id = Some(id),
            Err(error) => self.operation = self.operation.and(Err(error)),
        }
        self
    }

    limit_setters!();

    fn with_limits(mut self, set: impl FnOnce(&mut Limits)) -> Self {
        set(&mut self.settings.limits);
        self
    }

    /// Takes the call apart, for the one that runs an action as a whole.
    pub(super) fn into_parts(self) -> (AegisService<S>, Result<O, Error>, Settings) {
        (self.service, self.operation, self.settings)
    }
}

/// Parses a value that a call names.
pub(super) fn checked<T, V>(value: T) -> Result<V, Error>
where
    T: TryInto<V, Error: Into<InvalidValue>>,
{
    value
        .try_into()
        .map_err(|error| Error::invalid(error.into()))
}

/// Serializes what a call sends as a payload.
pub(super) fn payload_of<T: Serialize + ?Sized>(payload: &T) -> Result<Payload, Error> {
    Payload::new(payload)
        .map_err(|error| Error::request(format!("the payload is unusable: {error}")))
}

/// The digest that a server has on record for a payload. `{}` is no payload.
pub(super) fn digest_of(payload: &Payload) -> Result<Option<Digest>, Error> {
    let is_empty = payload
        .as_str()
        .bytes()
        .filter(|byte| !byte.is_ascii_whitespace());
    if is_empty.eq(*b"{}") {
        return Ok(None);
    }
    Digest::of(payload)
        .map(Some)
        .map_err(|error| Error::request(format!("the payload has no digest: {error}")))
}

/// The digest of what a reviewer edited. Unlike a payload that is submitted, an edit has one even
/// if it is `{}`.
pub(super) fn digest_of_edit(edited: &Payload) -> Result<Digest, Error> {
    Digest::of(edited)
        .map_err(|error| Error::request(format!("the edited payload has no digest: {error}")))
}

/// The digest of what an action shows that is to be run. `None` if it shows no payload.
pub(super) fn digest_shown(action: &Action) -> Result<Option<Option<Digest>>, Error> {
    match &action.edited_payload {
        Some(edited) => digest_of_edit(edited).map(Some).map(Some),
        None => action.payload.as_ref().map(digest_of).transpose(),
    }
}

impl<S, O> fmt::Debug for OperationCall<S, O> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Without the operation: it may contain a key, a payload or a token.
        f.debug_struct("OperationCall")
            .field("call_id", &self.settings.call_id)
            .field("limits", &self.settings.limits)
            .finish_non_exhaustive()
    }
}

/// Makes the calls of these operations futures. One for all would need the operations' trait in
/// public.
macro_rules! awaited {
    ($($operation:ty => $output:ty),+ $(,)?) => {$(
        impl<S, R> IntoFuture for OperationCall<S, $operation>
        where
            S: Service<Request<Full<Bytes>>, Response = Response<R>> + Clone + Send + 'static,
            S::Future: Send,
            S::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
            R: Body + Send + 'static,
            R::Data: Send,
            R::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
        {
            type Output = Result<$output, Error>;
            type IntoFuture = BoxFuture<$output>;

            fn into_future(self) -> Self::IntoFuture {
                Box::pin(async move {
                    self.service.perform(self.operation?, self.settings).await
                })
            }
        }
    )+};
}

awaited! {
    Submit => crate::protocol::Action,
    List => ActionPage,
    Look => crate::protocol::Action,
    DecideById => super::Receipt,
    Cancel => super::Receipt,
    Claim => Claimed,
    Renew => crate::protocol::Claim,
    Complete => crate::protocol::Action,
    Fail => crate::protocol::Action,
}
