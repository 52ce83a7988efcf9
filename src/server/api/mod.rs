//! The endpoints, one file each, and the steps they share.
//!
//! A request that changes something is authenticated, its headers and body are read, and the store
//! is awaited. Each endpoint turns the outcome of the store into a response.

mod decide;
mod route;
mod status;
mod submit;

use std::net::IpAddr;
use std::time::Duration;

use http::request::Parts;
use http::{HeaderValue, StatusCode};
use http_body::Body;
use tokio::time::timeout;

use crate::protocol::{Action, Body as JsonBody, ErrorChain, Escaped, Prefix, RequestId};
use crate::server::auth::Auth;
use crate::server::drain::Drain;
use crate::server::http::headers;
use crate::server::http::response;
use crate::server::http::{Host, HostGuard, Rejection, RequestBody, Response};
use crate::server::ops::outage::Outage;
use crate::store::{Actor, Identity, Store, StoreError};

pub(crate) use self::route::Route;

/// The default limit of a request body, in bytes.
const BODY_LIMIT: usize = 256 * 1024;

#[derive(Debug, Clone)]
pub(crate) struct Settings {
    pub(crate) prefix: Prefix,
    pub(crate) auth: Auth,
    pub(crate) hosts: Vec<Host>,
    pub(crate) require_submission: bool,
    pub(crate) body_limit: usize,
    pub(crate) body_timeout: Duration,
    pub(crate) store_timeout: Duration,
    pub(crate) poll_interval: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            prefix: Prefix::default(),
            auth: Auth::default(),
            hosts: Vec::new(),
            require_submission: false,
            body_limit: BODY_LIMIT,
            body_timeout: Duration::from_secs(10),
            store_timeout: Duration::from_secs(2),
            poll_interval: Duration::from_secs(3),
        }
    }
}

pub(crate) struct Api<St> {
    pub(crate) store: St,
    pub(crate) settings: Settings,
    pub(crate) drain: Drain,
    outage: Outage,
}

impl<St: Store> Api<St> {
    pub(crate) fn new(store: St, settings: Settings) -> Self {
        Self {
            store,
            settings,
            drain: Drain::new(),
            outage: Outage::default(),
        }
    }

    /// Rejects requests for foreign hosts, and requests that foreign web pages send.
    pub(crate) fn admit(&self, parts: &Parts, listening: Option<IpAddr>) -> Result<(), Rejection> {
        let Settings { auth, hosts, .. } = &self.settings;
        if auth.trusts_tenant_header() || !hosts.is_empty() {
            HostGuard { hosts, listening }.admit(parts)
        } else {
            Ok(())
        }
    }

    /// Reads the parts that every request that changes something has: the caller, the action, the
    /// call id and the body.
    pub(crate) async fn action_request<B: Body>(
        &self,
        headers: &http::HeaderMap,
        body: &mut RequestBody<'_, B>,
    ) -> Result<ActionRequest, Rejection> {
        let caller = self.settings.auth.authenticate(headers)?.may_decide()?;
        Ok(ActionRequest {
            identity: Identity {
                tenant_id: caller.tenant_id,
                thread_id: headers::thread_id(headers)?,
                idempotency_key: headers::idempotency_key(headers)?,
            },
            call_id: headers::call_id(headers)?,
            actor: caller.actor,
            body: self.read(headers, body).await?,
        })
    }

    /// Reads a JSON body.
    async fn read<B: Body>(
        &self,
        headers: &http::HeaderMap,
        body: &mut RequestBody<'_, B>,
    ) -> Result<JsonBody, Rejection> {
        headers::reject_encoded(headers)?;
        let settings = &self.settings;
        let bytes = tokio::select! {
            biased;
            bytes = body.read(settings.body_limit, settings.body_timeout) => bytes?,
            () = self.drain.grace_is_over() => return Err(shutting_down()),
        };
        if bytes.is_empty() {
            return Ok(JsonBody::default());
        }
        headers::reject_other_than_json(headers)?;
        JsonBody::parse(&bytes).map_err(Rejection::invalid)
    }

    /// Waits for the store, up to the store timeout.
    pub(crate) async fn await_store<T>(
        &self,
        future: impl Future<Output = Result<T, StoreError>>,
    ) -> Result<T, Rejection> {
        match timeout(self.settings.store_timeout, future).await {
            Ok(Ok(value)) => {
                self.store_answers();
                Ok(value)
            }
            Ok(Err(error)) => {
                self.store_failed(&error);
                Err(Rejection::unavailable(
                    "the store cannot answer now, and whether it recorded this request is unknown; \
                     send it again with the same key",
                ))
            }
            Err(_) => {
                self.store_is_late(self.settings.store_timeout);
                Err(Rejection::unavailable(
                    "this request, or another for the same action, is still being recorded; send \
                     it again with the same key",
                ))
            }
        }
    }

    /// Logs a store error and its causes if it is the first of an outage. During an outage every
    /// request meets one.
    pub(crate) fn store_failed(&self, error: &StoreError) {
        if !self.outage.failed() {
            return;
        }
        let chain = ErrorChain(error).to_string();
        tracing::warn!("the store cannot answer: {}", Escaped::line(&chain));
    }

    /// Logs that the store exceeded `limit`, if this is the first failure of an outage.
    pub(crate) fn store_is_late(&self, limit: Duration) {
        if self.outage.failed() {
            tracing::warn!(?limit, "the store did not answer in time");
        }
    }

    /// Logs the end of an outage, if the store has just recovered.
    pub(crate) fn store_answers(&self) {
        if let Some(failures) = self.outage.succeeded() {
            tracing::info!(failures, "the store answers again");
        }
    }

    /// Returns the path of an action's status.
    pub(crate) fn location(&self, request_id: &RequestId) -> Option<HeaderValue> {
        HeaderValue::try_from(format!("{}/hitl/status/{request_id}", self.settings.prefix)).ok()
    }

    /// Returns a response that shows an action, with the path of its status.
    pub(crate) fn action_response(&self, status: StatusCode, action: &Action) -> Response {
        let mut response = response::json(status, action);
        if let Some(location) = self.location(&action.request_id) {
            response
                .headers_mut()
                .insert(http::header::LOCATION, location);
        }
        response
    }
}

/// A request for a decision or a submission, read and checked.
pub(crate) struct ActionRequest {
    pub(crate) identity: Identity,
    pub(crate) call_id: Option<RequestId>,
    pub(crate) actor: Actor,
    pub(crate) body: JsonBody,
}

pub(crate) fn shutting_down() -> Rejection {
    Rejection::unavailable("the server is shutting down")
}

/// Leaves out what the response to a decision does not repeat: the payload and the comment.
pub(crate) fn summary(mut action: Action) -> Action {
    action.payload = None;
    action.comment = None;
    action.replayed = false;
    action
}
