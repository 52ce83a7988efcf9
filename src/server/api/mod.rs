//! The endpoints, one file each, and the steps they share.
//!
//! A request that changes something is authenticated, its headers and body are read, and the store
//! is awaited. Each endpoint turns the outcome of the store into a response.

mod cancel;
mod claim;
mod decide;
mod events;
mod feed;
mod list;
mod look_up;
mod route;
mod status;
mod submit;

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use http::request::Parts;
use http::{HeaderValue, StatusCode};
use http_body::Body;
use serde::de::DeserializeOwned;
use tokio::time::timeout;
use uuid::Uuid;

use crate::outbox::Tally;
use crate::protocol::{
    Action, Body as JsonBody, Code, ErrorChain, Escaped, IDEMPOTENCY_REPLAYED, Prefix, RequestId,
    TenantId,
};
use crate::server::auth::{Auth, Caller, Scope};
use crate::server::drain::Drain;
use crate::server::http::headers;
use crate::server::http::response;
use crate::server::http::room::Room;
use crate::server::http::{
    Arrival, HeldBytes, HeldText, Host, HostGuard, Peer, Rate, RateLimiter, Rejection, RequestBody,
    Response,
};
use crate::server::ops::metrics::Metrics;
use crate::server::ops::outage::Outage;
use crate::server::reloads::Reloads;
use crate::store::{Actor, Identity, Store, StoreError};

pub(crate) use self::claim::{LEASE, MAX_LEASE, MAX_REASON};
pub(crate) use self::events::event_stream;
use self::feed::Feeds;

pub(crate) use self::list::{LIMIT, MAX_LIMIT};
pub(crate) use self::route::Route;
pub(crate) use self::status::MAX_WAIT;
pub(crate) use crate::protocol::entry;

/// The default limit of a request body, in bytes.
const BODY_LIMIT: usize = 256 * 1024;

/// The limit of a form, beyond what it holds of a body, in bytes.
const FORM_LIMIT: usize = 64 * 1024;

/// The room for all large bodies that arrive, and the room for all that are sent, in bytes.
const ROOM: usize = 64 * 1024 * 1024;

#[derive(Debug, Clone)]
pub(crate) struct Settings {
    pub(crate) prefix: Prefix,
    pub(crate) auth: Auth,
    pub(crate) hosts: Vec<Host>,
    pub(crate) require_submission: bool,
    pub(crate) allow_self_approval: bool,
    pub(crate) body_limit: usize,
    pub(crate) body_timeout: Duration,
    pub(crate) store_timeout: Duration,
    pub(crate) poll_interval: Duration,
    pub(crate) max_rate_per_peer: Option<Rate>,
    pub(crate) max_rate_per_tenant: Option<Rate>,
    /// What the metrics show besides the server and its store.
    pub(crate) webhooks: Option<Tally>,
    pub(crate) reloads: Option<Reloads>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            prefix: Prefix::default(),
            auth: Auth::default(),
            hosts: Vec::new(),
            require_submission: false,
            allow_self_approval: false,
            body_limit: BODY_LIMIT,
            body_timeout: Duration::from_secs(10),
            store_timeout: Duration::from_secs(2),
            poll_interval: Duration::from_secs(3),
            max_rate_per_peer: None,
            max_rate_per_tenant: None,
            webhooks: None,
            reloads: None,
        }
    }
}

pub(crate) struct Api<St> {
    pub(crate) store: St,
    pub(crate) settings: Settings,
    pub(crate) drain: Drain,
    /// For the large bodies of requests.
    arriving: Room,
    /// For those of responses. Who reads slowly keeps nobody from sending.
    pub(crate) leaving: Room,
    pub(crate) metrics: Arc<Metrics>,
    peers: Option<RateLimiter<Peer>>,
    tenants: Option<RateLimiter<TenantId>>,
    outage: Outage,
    feeds: Arc<Feeds>,
}

impl<St: Store> Api<St> {
    pub(crate) fn new(store: St, settings: Settings) -> Self {
        // The largest body finds room at least alone.
        let room = || Room::new(ROOM.max(3 * settings.body_limit + FORM_LIMIT));
        Self {
            store,
            arriving: room(),
            leaving: room(),
            peers: settings.max_rate_per_peer.map(RateLimiter::new),
            tenants: settings.max_rate_per_tenant.map(RateLimiter::new),
            settings,
            drain: Drain::new(),
            metrics: Arc::new(Metrics::new()),
            outage: Outage::default(),
            feeds: Arc::default(),
        }
    }

    /// Rejects requests for foreign hosts, and requests that foreign web pages send.
    pub(crate) fn admit(&self, parts: &Parts, arrival: Arrival) -> Result<(), Rejection> {
        let Settings { auth, hosts, .. } = &self.settings;
        if auth.trusts_tenant_header() || !hosts.is_empty() {
            HostGuard::new(hosts, arrival).admit(parts)
        } else {
            Ok(())
        }
    }

    /// Counts a request of a peer, and rejects it if there were too many.
    pub(crate) fn count_peer(&self, peer: Option<IpAddr>) -> Result<(), Rejection> {
        match (&self.peers, peer) {
            (Some(peers), Some(peer)) => peers
                .count(Peer::of(peer))
                .map_err(|wait| Rejection::too_often("an address", peers.rate(), wait)),
            _ => Ok(()),
        }
    }

    /// Returns the caller, and counts the request for the caller's tenant.
    pub(crate) fn authenticate(&self, headers: &http::HeaderMap) -> Result<Caller, Rejection> {
        let caller = self.settings.auth.authenticate(headers)?;
        self.count_tenant(&caller.tenant_id)?;
        Ok(caller)
    }

    /// Returns the caller, or `None` for an anonymous request, and counts the request for the
    /// caller's tenant.
    pub(crate) fn authenticate_if_present(
        &self,
        headers: &http::HeaderMap,
    ) -> Result<Option<Caller>, Rejection> {
        let caller = self.settings.auth.authenticate_if_present(headers)?;
        if let Some(caller) = &caller {
            self.count_tenant(&caller.tenant_id)?;
        }
        Ok(caller)
    }

    fn count_tenant(&self, tenant: &TenantId) -> Result<(), Rejection> {
        self.tenants.as_ref().map_or(Ok(()), |tenants| {
            tenants
                .count(tenant.clone())
                .map_err(|wait| Rejection::too_often("a tenant", tenants.rate(), wait))
        })
    }

    /// Reads the parts that every request that changes something has: the caller, the action, the
    /// call id and the body.
    pub(crate) async fn action_request<B: Body>(
        &self,
        scope: Scope,
        headers: &http::HeaderMap,
        body: &mut RequestBody<'_, B>,
    ) -> Result<ActionRequest, Rejection> {
        let caller = self.authenticate(headers)?.with(scope)?;
        let allow_self_approval = self.allows_self_approval(&caller);
        Ok(ActionRequest {
            identity: Identity {
                tenant_id: caller.tenant_id,
                thread_id: headers::thread_id(headers)?,
                idempotency_key: headers::idempotency_key(headers)?,
            },
            call_id: headers::call_id(headers)?,
            allow_self_approval,
            actor: caller.actor,
            body: self.read(headers, body).await?,
        })
    }

    /// Whether a caller may decide on what it submitted.
    pub(crate) fn allows_self_approval(&self, caller: &Caller) -> bool {
        self.settings.allow_self_approval || !caller.is_known()
    }

    /// Reads the parts of a request about the action with an id: the caller, the id, the call id
    /// and the body, a JSON object with the members of a `T`.
    pub(crate) async fn request_by_id<B: Body, T: DeserializeOwned>(
        &self,
        scope: Scope,
        id: &str,
        headers: &http::HeaderMap,
        body: &mut RequestBody<'_, B>,
    ) -> Result<RequestById<T>, Rejection> {
        let caller = self.authenticate(headers)?.with(scope)?;
        Ok(RequestById {
            id: uuid_of(id)?,
            call_id: headers::call_id(headers)?,
            body: self.read_members(headers, body).await?,
            caller,
        })
    }

    /// Reads a JSON object with the members of a `T`. No body is an object without members.
    async fn read_members<B: Body, T: DeserializeOwned>(
        &self,
        headers: &http::HeaderMap,
        body: &mut RequestBody<'_, B>,
    ) -> Result<T, Rejection> {
        let bytes = self.read_bytes(headers, body).await?;
        let bytes = bytes.trim_ascii();
        let json = if bytes.is_empty() { b"{}" } else { bytes };
        if !json.starts_with(b"{") {
            return Err(Rejection::invalid("the body is not a JSON object"));
        }
        serde_json::from_slice(json)
            .map_err(|error| Rejection::invalid(format!("the body: {error}")))
    }

    /// Reads a JSON body.
    async fn read<B: Body>(
        &self,
        headers: &http::HeaderMap,
        body: &mut RequestBody<'_, B>,
    ) -> Result<JsonBody, Rejection> {
        let bytes = self.read_bytes(headers, body).await?;
        JsonBody::parse(&bytes).map_err(Rejection::invalid)
    }

    async fn read_bytes<B: Body>(
        &self,
        headers: &http::HeaderMap,
        body: &mut RequestBody<'_, B>,
    ) -> Result<HeldBytes, Rejection> {
        let bytes = self
            .read_up_to(self.settings.body_limit, headers, body)
            .await?;
        if !bytes.is_empty() {
            headers::reject_other_than_json(headers)?;
        }
        Ok(bytes)
    }

    /// Reads a body of at most `limit` bytes.
    async fn read_up_to<B: Body>(
        &self,
        limit: usize,
        headers: &http::HeaderMap,
        body: &mut RequestBody<'_, B>,
    ) -> Result<HeldBytes, Rejection> {
        headers::reject_encoded(headers)?;
        tokio::select! {
            biased;
            bytes = body.read(limit, self.settings.body_timeout, &self.arriving) => bytes,
            () = self.drain.grace_is_over() => Err(shutting_down()),
        }
    }

    /// Reads a form of a web page with a payload.
    pub(crate) async fn read_form<B: Body>(
        &self,
        headers: &http::HeaderMap,
        body: &mut RequestBody<'_, B>,
    ) -> Result<HeldText, Rejection> {
        // In a form each byte may take three.
        let limit = 3 * self.settings.body_limit + FORM_LIMIT;
        self.read_form_up_to(limit, headers, body).await
    }

    /// Reads a form of at most `limit` bytes.
    pub(crate) async fn read_form_up_to<B: Body>(
        &self,
        limit: usize,
        headers: &http::HeaderMap,
        body: &mut RequestBody<'_, B>,
    ) -> Result<HeldText, Rejection> {
        headers::reject_other_than_form(headers)?;
        let bytes = self.read_up_to(limit, headers, body).await?;
        bytes
            .into_text()
            .map_err(|_| Rejection::invalid("the form is not UTF-8"))
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

    /// Returns the response to a call's own retry: that of the call, marked as recorded earlier.
    pub(crate) fn replayed_response(&self, status: StatusCode, mut action: Action) -> Response {
        action.replayed = true;
        replayed(self.action_response(status, &action))
    }

    /// Returns a rejection that shows the action on record.
    pub(crate) fn reject(
        &self,
        code: Code,
        detail: impl Into<std::borrow::Cow<'static, str>>,
        action: Action,
    ) -> Rejection {
        let location = self.location(&action.request_id);
        Rejection::new(code, detail).with_action(summary(action), location)
    }
}

/// A request for a decision or a submission, read and checked.
pub(crate) struct ActionRequest {
    pub(crate) identity: Identity,
    pub(crate) call_id: Option<RequestId>,
    pub(crate) actor: Actor,
    pub(crate) allow_self_approval: bool,
    pub(crate) body: JsonBody,
}

/// A request about the action with an id, read and checked.
pub(crate) struct RequestById<T> {
    pub(crate) caller: Caller,
    pub(crate) id: Uuid,
    pub(crate) call_id: Option<RequestId>,
    pub(crate) body: T,
}

/// Reads the id of an action. A text that is no UUID is the id of nothing.
pub(crate) fn uuid_of(id: &str) -> Result<Uuid, Rejection> {
    let id = RequestId::new(id).ok().and_then(|id| id.as_uuid());
    id.ok_or_else(no_such_action)
}

/// An unknown, a malformed and another tenant's id get the same response, which does not reveal
/// what exists.
pub(crate) fn no_such_action() -> Rejection {
    Rejection::not_found("there is no such action")
}

pub(crate) fn shutting_down() -> Rejection {
    Rejection::unavailable("the server is shutting down")
}

/// Leaves out what the response to a decision does not repeat.
pub(crate) fn summary(action: Action) -> Action {
    let mut action = entry(action);
    action.title = None;
    action.expires_at = None;
    action.allow_edit = None;
    action
}

/// Marks a response as one recorded earlier.
pub(crate) fn replayed(mut response: Response) -> Response {
    response
        .headers_mut()
        .insert(IDEMPOTENCY_REPLAYED, HeaderValue::from_static("true"));
    response
}
