//! The requests: a decision, or a status.

use std::fmt;
use std::future::{Future, IntoFuture};
use std::pin::Pin;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body::Body;
use http_body_util::Full;
use serde::Serialize;
use tower_service::Service;

use super::{AegisService, Error, Receipt};
use crate::protocol::{
    Action, Decision, IdempotencyKey, InvalidValue, Payload, RESERVED, RequestId, TenantId,
    ThreadId,
};

pub(super) type BoxFuture<T> = Pin<Box<dyn Future<Output = Result<T, Error>> + Send>>;

/// The limits of one call, in place of the service's.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Limits {
    pub(super) deadline: Option<Duration>,
    pub(super) max_retries: Option<u32>,
    pub(super) timeout: Option<Duration>,
}

/// Defines the setters for a call's own limits.
macro_rules! limit_setters {
    ($(#[$attribute:meta])*) => {
        /// Sets the time limit for this call as a whole, in place of the service's deadline.
        $(#[$attribute])*
        pub fn deadline(self, deadline: Duration) -> Self {
            self.with_limits(|limits| limits.deadline = Some(deadline))
        }

        /// Sets the maximum number of retries for this call, in place of the service's.
        $(#[$attribute])*
        pub fn max_retries(self, retries: u32) -> Self {
            self.with_limits(|limits| limits.max_retries = Some(retries))
        }

        /// Sets the time limit for one attempt of this call, in place of the service's timeout. If
        /// the call waits for a decision, that wait is added.
        $(#[$attribute])*
        pub fn timeout(self, timeout: Duration) -> Self {
            self.with_limits(|limits| limits.timeout = Some(timeout))
        }
    };
}

/// A decision to put on record. The request type of [`AegisService`] as a [`Service`].
///
/// A layer on the service reads it with the methods ending in `_ref`; the plain names are setters.
#[derive(Clone)]
pub struct DecisionRequest {
    pub(super) decision: Decision,
    pub(super) key: IdempotencyKey,
    pub(super) tenant: Option<TenantId>,
    pub(super) thread: Option<ThreadId>,
    pub(super) call_id: Option<RequestId>,
    pub(super) payload: Option<Payload>,
    pub(super) comment: Option<String>,
    pub(super) limits: Limits,
}

pub(super) use limit_setters;

impl DecisionRequest {
    /// Makes a request for `decision` under `key`.
    pub fn new(decision: Decision, key: IdempotencyKey) -> Self {
        Self {
            decision,
            key,
            tenant: None,
            thread: None,
            call_id: None,
            payload: None,
            comment: None,
            limits: Limits::default(),
        }
    }

    /// Sets the tenant, in place of the service's.
    #[must_use]
    pub fn tenant_id(mut self, tenant: TenantId) -> Self {
        self.tenant = Some(tenant);
        self
    }

    /// Sets the thread, in place of the service's.
    #[must_use]
    pub fn thread_id(mut self, thread: ThreadId) -> Self {
        self.thread = Some(thread);
        self
    }

    /// Sends this `X-Request-Id` instead of a minted one, so that a repeated call counts as the
    /// same call.
    #[must_use]
    pub fn call_id(mut self, id: RequestId) -> Self {
        self.call_id = Some(id);
        self
    }

    /// Sends a payload: what the action is about.
    #[must_use]
    pub fn payload(mut self, payload: Payload) -> Self {
        self.payload = Some(payload);
        self
    }

    /// Sends a comment on the decision, beside the payload.
    #[must_use]
    pub fn comment(mut self, comment: impl Into<String>) -> Self {
        self.comment = Some(comment.into());
        self
    }

    limit_setters!(#[must_use]);

    fn with_limits(mut self, set: impl FnOnce(&mut Limits)) -> Self {
        set(&mut self.limits);
        self
    }

    /// Returns the decision to put on record.
    pub fn decision(&self) -> Decision {
        self.decision
    }

    /// Returns the key.
    pub fn key(&self) -> &IdempotencyKey {
        &self.key
    }

    /// Returns the tenant, if the request sets its own.
    pub fn tenant_id_ref(&self) -> Option<&TenantId> {
        self.tenant.as_ref()
    }

    /// Returns the thread, if the request sets its own.
    pub fn thread_id_ref(&self) -> Option<&ThreadId> {
        self.thread.as_ref()
    }

    /// Returns the call id, if the request sets one.
    pub fn call_id_ref(&self) -> Option<&RequestId> {
        self.call_id.as_ref()
    }

    /// Returns the payload.
    pub fn payload_ref(&self) -> Option<&Payload> {
        self.payload.as_ref()
    }

    /// Returns the comment.
    pub fn comment_ref(&self) -> Option<&str> {
        self.comment.as_deref()
    }

    /// Takes the JSON body: the payload's text unchanged, and the comment in the reserved member.
    pub(super) fn take_body(&mut self) -> Result<Bytes, Error> {
        let Some(comment) = &self.comment else {
            let payload = self.payload.take();
            return Ok(payload.map_or(Bytes::from_static(b"{}"), Payload::into_bytes));
        };
        if self.payload.as_ref().is_some_and(has_reserved_member) {
            return Err(Error::request(
                "the payload has the reserved member 'aegis' and a comment is given; allowed is one of the two",
            ));
        }
        let comment = serde_json::json!({ "comment": comment });
        Ok(with_metadata(self.payload.as_ref(), &comment))
    }
}

/// Whether a payload has the member that is kept for metadata.
pub(super) fn has_reserved_member(payload: &Payload) -> bool {
    let members = payload.parse::<std::collections::HashMap<String, serde::de::IgnoredAny>>();
    // A name that cannot be read might be the reserved one.
    members.map_or(true, |members| members.contains_key(RESERVED))
}

/// Writes a payload's text, unchanged, and the metadata in the reserved member.
pub(super) fn with_metadata(payload: Option<&Payload>, metadata: &serde_json::Value) -> Bytes {
    // A payload is always an object. Between its braces there is nothing, or a list of members.
    let members = payload
        .and_then(|payload| payload.as_str().strip_prefix('{')?.strip_suffix('}'))
        .map(str::trim)
        .unwrap_or_default();
    let comma = if members.is_empty() { "" } else { "," };
    Bytes::from(format!("{{{members}{comma}\"aegis\":{metadata}}}"))
}

impl fmt::Debug for DecisionRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Without key and payload, because requests get logged.
        f.debug_struct("DecisionRequest")
            .field("decision", &self.decision)
            .field("thread", &self.thread)
            .field("call_id", &self.call_id)
            .finish_non_exhaustive()
    }
}

/// A decision that is sent when awaited. Made by [`AegisService::approve`], `reject` and `execute`.
#[must_use = "a decision is sent when it is awaited"]
pub struct DecisionCall<S> {
    service: AegisService<S>,
    request: Result<DecisionRequest, Error>,
}

impl<S> DecisionCall<S> {
    pub(super) fn new<K>(service: AegisService<S>, decision: Decision, key: K) -> Self
    where
        K: TryInto<IdempotencyKey, Error: Into<InvalidValue>>,
    {
        let request = key
            .try_into()
            .map(|key| DecisionRequest::new(decision, key))
            .map_err(|error| Error::invalid(error.into()));
        Self { service, request }
    }

    fn with<T>(
        mut self,
        value: Result<T, Error>,
        set: impl FnOnce(&mut DecisionRequest, T),
    ) -> Self {
        // The first fault is the one reported.
        if let Ok(request) = &mut self.request {
            match value {
                Ok(value) => set(request, value),
                Err(error) => self.request = Err(error),
            }
        }
        self
    }

    /// Sets the tenant, in place of the service's.
    pub fn tenant_id<T>(self, tenant: T) -> Self
    where
        T: TryInto<TenantId, Error: Into<InvalidValue>>,
    {
        let tenant = tenant
            .try_into()
            .map_err(|error| Error::invalid(error.into()));
        self.with(tenant, |request, tenant| request.tenant = Some(tenant))
    }

    /// Sets the thread, in place of the service's.
    pub fn thread_id<T>(self, thread: T) -> Self
    where
        T: TryInto<ThreadId, Error: Into<InvalidValue>>,
    {
        let thread = thread
            .try_into()
            .map_err(|error| Error::invalid(error.into()));
        self.with(thread, |request, thread| request.thread = Some(thread))
    }

    /// Sends this `X-Request-Id` instead of a minted one, so that a repeated call counts as the
    /// same call.
    pub fn call_id<T>(self, id: T) -> Self
    where
        T: TryInto<RequestId, Error: Into<InvalidValue>>,
    {
        let id = id.try_into().map_err(|error| Error::invalid(error.into()));
        self.with(id, |request, id| request.call_id = Some(id))
    }

    /// Sends a payload: anything that serializes to a JSON object.
    pub fn payload<T: Serialize + ?Sized>(self, payload: &T) -> Self {
        let payload = Payload::new(payload)
            .map_err(|error| Error::request(format!("the payload is unusable: {error}")));
        self.with(payload, |request, payload| request.payload = Some(payload))
    }

    /// Sends a comment on the decision, beside the payload.
    pub fn comment(self, comment: impl Into<String>) -> Self {
        self.with(Ok(comment.into()), |request, comment| {
            request.comment = Some(comment)
        })
    }

    limit_setters!();

    fn with_limits(self, set: impl FnOnce(&mut Limits)) -> Self {
        self.with(Ok(()), |request, ()| set(&mut request.limits))
    }
}

impl<S> fmt::Debug for DecisionCall<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("DecisionCall").field(&self.request).finish()
    }
}

impl<S, R> IntoFuture for DecisionCall<S>
where
    S: Service<Request<Full<Bytes>>, Response = Response<R>> + Clone + Send + 'static,
    S::Future: Send,
    S::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    R: Body + Send + 'static,
    R::Data: Send,
    R::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    type Output = Result<Receipt, Error>;
    type IntoFuture = BoxFuture<Receipt>;

    fn into_future(self) -> Self::IntoFuture {
        match self.request {
            Ok(request) => Box::pin(self.service.decide(request)),
            Err(error) => Box::pin(std::future::ready(Err(error))),
        }
    }
}

/// The parts of a status request besides the id.
#[derive(Debug, Default)]
pub(super) struct Question {
    pub(super) tenant: Option<TenantId>,
    pub(super) wait: Option<Duration>,
    pub(super) limits: Limits,
}

/// A status request that is sent when awaited. Made by [`AegisService::status`].
#[must_use = "the status is asked for when it is awaited"]
pub struct StatusCall<S> {
    service: AegisService<S>,
    id: Result<RequestId, Error>,
    question: Question,
}

impl<S> StatusCall<S> {
    pub(super) fn new<T>(service: AegisService<S>, id: T) -> Self
    where
        T: TryInto<RequestId, Error: Into<InvalidValue>>,
    {
        Self {
            service,
            id: id.try_into().map_err(|error| Error::invalid(error.into())),
            question: Question::default(),
        }
    }

    /// Sets the tenant, in place of the service's.
    pub fn tenant_id<T>(mut self, tenant: T) -> Self
    where
        T: TryInto<TenantId, Error: Into<InvalidValue>>,
    {
        match tenant.try_into() {
            Ok(tenant) => self.question.tenant = Some(tenant),
            Err(error) => self.id = self.id.and(Err(Error::invalid(error.into()))),
        }
        self
    }

    /// Waits on the server until the action is decided, or until `wait` is over (`Prefer: wait`,
    /// RFC 7240).
    ///
    /// The wait is rounded up to whole seconds. Servers wait for 55 at most.
    pub fn wait(mut self, wait: Duration) -> Self {
        self.question.wait = Some(wait);
        self
    }

    limit_setters!();

    fn with_limits(mut self, set: impl FnOnce(&mut Limits)) -> Self {
        set(&mut self.question.limits);
        self
    }
}

impl<S> fmt::Debug for StatusCall<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StatusCall")
            .field("id", &self.id)
            .field("wait", &self.question.wait)
            .finish_non_exhaustive()
    }
}

impl<S, R> IntoFuture for StatusCall<S>
where
    S: Service<Request<Full<Bytes>>, Response = Response<R>> + Clone + Send + 'static,
    S::Future: Send,
    S::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    R: Body + Send + 'static,
    R::Data: Send,
    R::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    type Output = Result<Action, Error>;
    type IntoFuture = BoxFuture<Action>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(async move {
            let Self {
                mut service,
                id,
                question,
            } = self;
            service.ask(id?, question).await
        })
    }
}
