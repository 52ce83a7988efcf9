//! The endpoints of the API as requests: URIs, credentials and limits.

use std::time::Duration;

use bytes::Bytes;
use http::header::{
    ACCEPT, ACCEPT_ENCODING, AUTHORIZATION, CACHE_CONTROL, CONTENT_TYPE, USER_AGENT,
};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Uri};
use http_body_util::Full;
use tokio::time::Instant;

use super::answer::{Decided, Expected, Subject};
use super::operation::{Settings, Wire};
use super::request::{DecisionRequest, Limits, Question};
use super::{Error, EventCursor};
use crate::layer::{AttemptTimeout, Deadline, MaxRetries, SafeToRetry, after};
use crate::protocol::{
    Decision, IDEMPOTENCY_KEY, RequestId, TENANT_ID, THREAD_ID, TenantId, ThreadId, X_REQUEST_ID,
};

const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");
const PREFER: HeaderName = HeaderName::from_static("prefer");

/// Room for the headers of a request, including those that each attempt adds, because growing a map
/// rehashes it.
const HEADERS: usize = 8;

/// The longest wait that servers grant.
pub(super) const MAX_WAIT: Duration = Duration::from_secs(55);

/// What all requests of a service have in common.
pub(super) struct Endpoints {
    pub(super) approve: Uri,
    pub(super) reject: Uri,
    /// The status URL without the id.
    pub(super) status: String,
    /// The URL of all actions, without a slash at its end.
    pub(super) actions: String,
    pub(super) events: Uri,
    pub(super) tenant: Option<TenantId>,
    pub(super) thread: Option<ThreadId>,
    pub(super) authorization: Option<HeaderValue>,
    pub(super) user_agent: HeaderValue,
    /// The time limit for one attempt.
    pub(super) timeout: Duration,
    pub(super) deadline: Option<Duration>,
}

impl Endpoints {
    /// Returns when a call that begins now must end. A deadline beyond a clock's range is none.
    pub(super) fn deadline(&self, limits: Limits) -> Option<Instant> {
        after(limits.deadline.or(self.deadline)?)
    }

    /// Returns what the answer to `request` has to agree with.
    pub(super) fn expected<'a>(
        &'a self,
        request: &'a DecisionRequest,
        body: &'a [u8],
    ) -> Result<Expected<'a>, Error> {
        Ok(Expected {
            subject: Subject {
                tenant: self.tenant(request.tenant.as_ref()),
                thread: Some(self.thread(request.thread.as_ref())?),
                key: Some(&request.key),
                id: None,
            },
            decision: request.decision,
            payload: Decided::Body(body),
        })
    }

    /// Returns the thread of a call, its own or the service's.
    pub(super) fn thread<'a>(&'a self, own: Option<&'a ThreadId>) -> Result<&'a ThreadId, Error> {
        own.or(self.thread.as_ref())
            .ok_or_else(|| Error::request("no thread id; set one on the builder or on the call"))
    }

    /// Makes the request for a decision. Its body is taken, and returned too.
    pub(super) fn decision(
        &self,
        request: &mut DecisionRequest,
        call_id: &RequestId,
        deadline: Option<Instant>,
    ) -> Result<(Request<Full<Bytes>>, Bytes), Error> {
        let body = request.take_body()?;
        let thread = self.thread(request.thread.as_ref())?;
        let uri = match request.decision {
            Decision::Approve => &self.approve,
            Decision::Reject => &self.reject,
        };
        let mut http = Request::new(Full::new(body.clone()));
        *http.method_mut() = Method::POST;
        *http.uri_mut() = uri.clone();
        *http.headers_mut() = HeaderMap::with_capacity(HEADERS);
        self.credentials(&mut http, request.tenant.as_ref())?;
        let headers = http.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        headers.insert(THREAD_ID, thread.header_value());
        headers.insert(IDEMPOTENCY_KEY, request.key.header_value());
        headers.insert(X_REQUEST_ID, call_id.header_value());
        limit(&mut http, request.limits, deadline);
        Ok((http, body))
    }

    pub(super) fn question(
        &self,
        id: &RequestId,
        question: Question,
        deadline: Option<Instant>,
    ) -> Result<Request<Full<Bytes>>, Error> {
        let Question {
            tenant,
            wait,
            mut limits,
        } = question;
        let uri = format!("{}{}", self.status, percent_encoded(id.as_str()))
            .parse::<Uri>()
            .map_err(|_| Error::request("the request id is too long for a URL"))?;
        let mut http = Request::new(Full::default());
        *http.uri_mut() = uri;
        *http.headers_mut() = HeaderMap::with_capacity(HEADERS);
        // A public answer is better than none. Without tenant and credentials the request goes out
        // bare, as the SDK's does.
        if tenant.is_some() || self.tenant.is_some() || self.authorization.is_some() {
            self.credentials(&mut http, tenant.as_ref())?;
        }
        if let Some(wait) = wait {
            let wait = wait.min(MAX_WAIT);
            let seconds = wait.as_secs() + u64::from(wait.subsec_nanos() > 0);
            let prefer = HeaderValue::try_from(format!("wait={seconds}"))
                .map_err(|_| Error::request("the wait cannot be sent"))?;
            http.headers_mut().insert(PREFER, prefer);
            // The attempt has to outlast the wait that it requests.
            let own = limits.timeout.unwrap_or(self.timeout);
            limits.timeout = Some(own.saturating_add(Duration::from_secs(seconds)));
        }
        limit(&mut http, limits, deadline);
        Ok(http)
    }

    pub(super) fn operation(
        &self,
        wire: Wire,
        settings: &Settings,
        call_id: &RequestId,
        deadline: Option<Instant>,
    ) -> Result<Request<Full<Bytes>>, Error> {
        let uri = format!("{}{}", self.actions, wire.path)
            .parse::<Uri>()
            .map_err(|_| Error::request("the request is too long for a URL"))?;
        let mut http = Request::new(Full::new(wire.body.clone().unwrap_or_default()));
        *http.uri_mut() = uri;
        *http.headers_mut() = HeaderMap::with_capacity(HEADERS);
        self.credentials(&mut http, settings.tenant.as_ref())?;
        let headers = http.headers_mut();
        headers.insert(X_REQUEST_ID, call_id.header_value());
        if let Some(thread) = wire.thread {
            headers.insert(THREAD_ID, thread.header_value());
        }
        if let Some(key) = wire.key {
            headers.insert(IDEMPOTENCY_KEY, key.header_value());
        }
        if wire.body.is_some() {
            headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
            *http.method_mut() = Method::POST;
            // The server tells a call's own retries by its `X-Request-Id`, or by its token, and
            // answers them as it answered the call.
            http.extensions_mut().insert(SafeToRetry);
        }
        limit(&mut http, settings.limits, deadline);
        Ok(http)
    }

    /// A request for the events after `cursor`, or from now on.
    pub(super) fn events(
        &self,
        tenant: Option<&TenantId>,
        cursor: Option<&EventCursor>,
    ) -> Result<Request<Full<Bytes>>, Error> {
        let mut http = Request::new(Full::default());
        *http.uri_mut() = self.events.clone();
        *http.headers_mut() = HeaderMap::with_capacity(HEADERS);
        self.credentials(&mut http, tenant)?;
        let headers = http.headers_mut();
        headers.insert(ACCEPT, HeaderValue::from_static("text/event-stream"));
        headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        headers.insert(USER_AGENT, self.user_agent.clone());
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        if let Some(cursor) = cursor {
            headers.insert(LAST_EVENT_ID, cursor.header_value());
        }
        Ok(http)
    }

    /// Returns the tenant of a call. `None` if the API key names it, or nothing does.
    pub(super) fn tenant<'a>(&'a self, own: Option<&'a TenantId>) -> Option<&'a TenantId> {
        match self.authorization {
            Some(_) => None,
            None => own.or(self.tenant.as_ref()),
        }
    }

    /// Sets the API key, or else the tenant.
    fn credentials(
        &self,
        request: &mut Request<Full<Bytes>>,
        tenant: Option<&TenantId>,
    ) -> Result<(), Error> {
        let headers = request.headers_mut();
        match (&self.authorization, tenant) {
            (Some(_), Some(_)) => {
                return Err(Error::request(
                    "the call names a tenant and the service has an API key; the key names the tenant",
                ));
            }
            (Some(authorization), None) => {
                headers.insert(AUTHORIZATION, authorization.clone());
            }
            (None, tenant) => {
                let tenant = tenant.or(self.tenant.as_ref()).ok_or_else(|| {
                    Error::request("no tenant id and no API key; set one on the builder, or a tenant on the call")
                })?;
                headers.insert(TENANT_ID, tenant.header_value());
            }
        }
        Ok(())
    }
}

/// Gives a request its own limits, in place of the layers'.
fn limit<B>(http: &mut Request<B>, limits: Limits, deadline: Option<Instant>) {
    let extensions = http.extensions_mut();
    if let Some(retries) = limits.max_retries {
        extensions.insert(MaxRetries(retries));
    }
    if let Some(timeout) = limits.timeout {
        extensions.insert(AttemptTimeout(Some(timeout)));
    }
    // A call's own deadline may mean no limit, and still replaces the service's.
    if deadline.is_some() || limits.deadline.is_some() {
        let left = |deadline: Instant| deadline.saturating_duration_since(Instant::now());
        extensions.insert(Deadline(deadline.map(left)));
    }
}

pub(super) fn percent_encoded(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-_~".contains(&byte) {
            encoded.push(char::from(byte));
        } else {
            encoded.push_str(&format!("%{byte:02X}"));
        }
    }
    encoded
}
