//! [`AegisService`]: the layers around an HTTP client, for the four endpoints of an approvals API.

mod answer;
mod builder;
mod connector;
mod error;
mod proxy;
mod read;
mod receipt;
mod request;
mod url;

use std::error::Error as StdError;
use std::fmt;
use std::future::{Future, poll_fn};
use std::mem;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::header::{ACCEPT, ACCEPT_ENCODING, AUTHORIZATION, CONTENT_TYPE, USER_AGENT};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, Uri};
use http_body::Body;
use http_body_util::Full;
use tokio::time::Instant;
use tower_service::Service;

use crate::layer::{Aegis, AttemptTimeout, Deadline, MaxRetries, after};
use crate::protocol::{
    Action, Decision, IDEMPOTENCY_KEY, IdempotencyKey, InvalidValue, RequestId, Status, TENANT_ID,
    THREAD_ID, TenantId, ThreadId, X_REQUEST_ID,
};

use self::answer::{Answer, Expected};
use self::read::ReadAnswers;
use self::request::{Limits, Question};

pub use self::builder::Builder;
pub use self::connector::{HttpBody, HttpClient, HttpClientError, HttpClientFuture};
pub use self::error::Error;
pub use self::receipt::{Outcome, Receipt};
pub use self::request::{DecisionCall, DecisionRequest, StatusCall};

const PREFER: HeaderName = HeaderName::from_static("prefer");

/// What a 409 is taken for that does not say which decision is on record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum OnDuplicate {
    /// For the decision that was asked for. Right for servers on which the opposite decision is not answered with 409.
    #[default]
    Confirm,
    /// For nothing, until the status endpoint has told the decision: a recorded opposite is a conflict, a pending action is
    /// waited for as long as one attempt may take, and what cannot be found out is an error.
    Verify,
}

/// The pause between two questions for a pending action, where the server does not wait by itself.
const VERIFY_PAUSE: Duration = Duration::from_millis(500);

/// The longest wait that a server grants.
const MAX_WAIT: Duration = Duration::from_secs(55);

/// A client for an approvals API: every decision goes on record exactly once.
///
/// It is cheap to clone and to share. Every call carries tenant, thread, key and one request id over all of its attempts; is
/// retried when that is safe; takes 409 as *on record already*, after a look at the body; and never takes a recorded opposite
/// decision for a success.
///
/// ```no_run
/// use aegis_hitl::{AegisService, Outcome};
/// use serde_json::json;
///
/// # async fn run() -> Result<(), aegis_hitl::Error> {
/// let aegis = AegisService::builder()
///     .base_url("http://localhost:8000")
///     .tenant_id("my-tenant")
///     .thread_id("my-thread")
///     .build()?;
///
/// let receipt = aegis
///     .approve("idempotency-key-001")
///     .payload(&json!({"to": "a@b.c"}))
///     .await?;
/// assert!(matches!(receipt.outcome(), Outcome::Accepted | Outcome::Duplicate));
/// # Ok(())
/// # }
/// ```
///
/// It is itself a [`Service`] of [`DecisionRequest`], so that other layers stack on it.
pub struct AegisService<S = HttpClient> {
    stack: Aegis<ReadAnswers<S>>,
    shared: Arc<Shared>,
}

struct Shared {
    approve: Uri,
    reject: Uri,
    /// The status URL without the id.
    status: String,
    tenant: Option<TenantId>,
    thread: Option<ThreadId>,
    authorization: Option<HeaderValue>,
    user_agent: HeaderValue,
    on_duplicate: OnDuplicate,
    /// How long one attempt may take.
    timeout: Duration,
    deadline: Option<Duration>,
}

impl AegisService {
    /// Starts with the defaults.
    pub fn builder() -> Builder {
        Builder::new()
    }
}

impl<S> AegisService<S> {
    /// Borrows the HTTP service under the layers.
    pub fn get_ref(&self) -> &S {
        self.stack.get_ref().get_ref()
    }

    /// Returns the HTTP service under the layers.
    pub fn into_inner(self) -> S {
        self.stack.into_inner().into_inner()
    }
}

impl<S: Clone> AegisService<S> {
    /// Approves under `key`.
    pub fn approve<K>(&self, key: K) -> DecisionCall<S>
    where
        K: TryInto<IdempotencyKey, Error: Into<InvalidValue>>,
    {
        self.execute(Decision::Approve, key)
    }

    /// Rejects under `key`.
    pub fn reject<K>(&self, key: K) -> DecisionCall<S>
    where
        K: TryInto<IdempotencyKey, Error: Into<InvalidValue>>,
    {
        self.execute(Decision::Reject, key)
    }

    /// Approves or rejects under `key`.
    pub fn execute<K>(&self, decision: Decision, key: K) -> DecisionCall<S>
    where
        K: TryInto<IdempotencyKey, Error: Into<InvalidValue>>,
    {
        DecisionCall::new(self.clone(), decision, key)
    }

    /// Asks for the status of an action, by the server's id or by a call's id.
    pub fn status<T>(&self, id: T) -> StatusCall<S>
    where
        T: TryInto<RequestId, Error: Into<InvalidValue>>,
    {
        StatusCall::new(self.clone(), id)
    }
}

impl<S, R> AegisService<S>
where
    S: Service<Request<Full<Bytes>>, Response = Response<R>> + Clone,
    S::Error: Into<Box<dyn StdError + Send + Sync>>,
    R: Body,
    R::Error: Into<Box<dyn StdError + Send + Sync>>,
{
    async fn decide(mut self, request: DecisionRequest) -> Result<Receipt, Error> {
        let deadline = self.shared.deadline(request.limits);
        self.ready(deadline).await?;
        let call_id = request.call_id.clone().unwrap_or_else(RequestId::mint);
        let expected = self.shared.expected(&request)?;
        let key = expected.key.clone();
        let (tenant, limits) = (request.tenant.clone(), request.limits);
        let request = self.shared.decision(request, &call_id, deadline)?;
        let named = |error: Error| error.named(Some(&key), Some(&call_id));
        let answer = Answer::of(self.stack.call(request).await).map_err(named)?;
        let told = answer.told;
        let (receipt, is_told) = answer::receipt(answer, &expected, call_id.clone())
            .map_err(|error| named(error.told(told)))?;
        match self.shared.on_duplicate {
            // Boxed, as the rare case would otherwise make the future of every call larger.
            OnDuplicate::Verify if receipt.is_duplicate() && !is_told => {
                let timeout = limits.timeout.unwrap_or(self.shared.timeout);
                // In place of the call's own, which the time so far was taken from already.
                let until = earlier(after(timeout), deadline);
                let retries = limits.max_retries;
                let verified =
                    Box::pin(self.verify(receipt, expected, tenant, retries, until)).await;
                verified.map_err(|error| named(error.told(told)))
            }
            _ => Ok(receipt),
        }
    }

    /// Waits until the service is ready, but no longer than the call may take.
    async fn ready(&mut self, deadline: Option<Instant>) -> Result<(), Error> {
        let now = poll_fn(|cx| Poll::Ready(self.stack.poll_ready(cx))).await;
        if let Poll::Ready(ready) = now {
            return ready.map_err(Error::failed);
        }
        let ready = poll_fn(|cx| self.stack.poll_ready(cx));
        match deadline {
            None => ready.await,
            Some(deadline) => tokio::time::timeout_at(deadline, ready)
                .await
                .map_err(|_| Error::never_ready())?,
        }
        .map_err(Error::failed)
    }

    /// Finds out which decision a bare 409 confirms.
    async fn verify(
        &mut self,
        receipt: Receipt,
        expected: Expected,
        tenant: Option<TenantId>,
        max_retries: Option<u32>,
        until: Option<Instant>,
    ) -> Result<Receipt, Error> {
        let id = receipt
            .request_id
            .clone()
            .unwrap_or_else(|| receipt.call_id.clone());
        let left = || until.map(|until| until.saturating_duration_since(Instant::now()));
        let pending = async {
            loop {
                let question = Question {
                    tenant: tenant.clone(),
                    wait: Some(left().unwrap_or(MAX_WAIT)),
                    limits: Limits {
                        deadline: left(),
                        max_retries,
                        timeout: None,
                    },
                };
                let action = self.ask(id.clone(), question).await?;
                if action.decision.is_some() || action.status != Status::Pending {
                    return Ok::<_, Error>(action);
                }
                tokio::time::sleep(VERIFY_PAUSE).await;
            }
        };
        let action = match until {
            Some(until) => tokio::time::timeout_at(until, pending)
                .await
                .map_err(|_| Error::unverified(&receipt))?,
            None => pending.await,
        };
        match action {
            Ok(action) => answer::verified(receipt, &expected, action),
            Err(error) => Err(Error::unverified(&receipt).with_source(error)),
        }
    }

    async fn ask(&mut self, id: RequestId, question: Question) -> Result<Action, Error> {
        let deadline = self.shared.deadline(question.limits);
        self.ready(deadline).await?;
        let tenant = match self.shared.authorization {
            // The key names it.
            Some(_) => None,
            None => question.tenant.clone().or(self.shared.tenant.clone()),
        };
        let request = self.shared.question(&id, question, deadline)?;
        let answer = Answer::of(self.stack.call(request).await)?;
        let told = answer.told;
        answer::action(answer, tenant.as_ref()).map_err(|error| error.told(told))
    }
}

fn earlier(one: Option<Instant>, other: Option<Instant>) -> Option<Instant> {
    one.into_iter().chain(other).min()
}

impl Shared {
    /// When a call that begins now has to be over. A deadline beyond what a clock can hold is none.
    fn deadline(&self, limits: Limits) -> Option<Instant> {
        after(limits.deadline.or(self.deadline)?)
    }

    /// What the answer to `request` has to agree with.
    fn expected(&self, request: &DecisionRequest) -> Result<Expected, Error> {
        let tenant = match self.authorization {
            Some(_) => None,
            None => request.tenant.as_ref().or(self.tenant.as_ref()).cloned(),
        };
        Ok(Expected {
            tenant,
            thread: self.thread(request)?.clone(),
            key: request.key.clone(),
            decision: request.decision,
        })
    }

    fn thread<'a>(&'a self, request: &'a DecisionRequest) -> Result<&'a ThreadId, Error> {
        request
            .thread
            .as_ref()
            .or(self.thread.as_ref())
            .ok_or_else(|| Error::request("no thread id; set one on the builder or on the call"))
    }

    fn decision(
        &self,
        mut request: DecisionRequest,
        call_id: &RequestId,
        deadline: Option<Instant>,
    ) -> Result<Request<Full<Bytes>>, Error> {
        let body = request.take_body()?;
        let thread = self.thread(&request)?;
        let uri = match request.decision {
            Decision::Approve => &self.approve,
            Decision::Reject => &self.reject,
        };
        let mut http = Request::new(Full::new(body));
        *http.method_mut() = Method::POST;
        *http.uri_mut() = uri.clone();
        *http.headers_mut() = self.common_headers();
        self.credentials(&mut http, request.tenant.as_ref())?;
        let headers = http.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        headers.insert(THREAD_ID, thread.header_value());
        headers.insert(IDEMPOTENCY_KEY, request.key.header_value());
        headers.insert(X_REQUEST_ID, call_id.header_value());
        limit(&mut http, request.limits, deadline);
        Ok(http)
    }

    fn question(
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
        *http.headers_mut() = self.common_headers();
        // A public answer is better than none: without tenant and credentials the question goes out bare, as the SDK's does.
        if tenant.is_some() || self.tenant.is_some() || self.authorization.is_some() {
            self.credentials(&mut http, tenant.as_ref())?;
        }
        if let Some(wait) = wait {
            let wait = wait.min(MAX_WAIT);
            let seconds = wait.as_secs() + u64::from(wait.subsec_nanos() > 0);
            let prefer = HeaderValue::try_from(format!("wait={seconds}"))
                .map_err(|_| Error::request("the wait cannot be sent"))?;
            http.headers_mut().insert(PREFER, prefer);
            // The attempt has to outlast the wait that it asks for.
            let own = limits.timeout.unwrap_or(self.timeout);
            limits.timeout = Some(own.saturating_add(Duration::from_secs(seconds)));
        }
        limit(&mut http, limits, deadline);
        Ok(http)
    }

    /// The headers that every request has, with room for those of a call, as a map that grows is hashed anew. Made each
    /// time, as a clone of one costs more.
    ///
    /// No content coding is read, as what an answer confirms is in its body.
    fn common_headers(&self) -> HeaderMap {
        let mut headers = HeaderMap::with_capacity(8);
        headers.insert(ACCEPT, HeaderValue::from_static("application/json"));
        headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        headers.insert(USER_AGENT, self.user_agent.clone());
        headers
    }

    /// Says who asks: the API key, or else the tenant.
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
    // A call's own deadline may be none, and then takes the place of the service's.
    if deadline.is_some() || limits.deadline.is_some() {
        let left = |deadline: Instant| deadline.saturating_duration_since(Instant::now());
        extensions.insert(Deadline(deadline.map(left)));
    }
}

fn percent_encoded(text: &str) -> String {
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

impl<S, R> Service<DecisionRequest> for AegisService<S>
where
    S: Service<Request<Full<Bytes>>, Response = Response<R>> + Clone + Send + 'static,
    S::Future: Send,
    S::Error: Into<Box<dyn StdError + Send + Sync>>,
    R: Body + Send + 'static,
    R::Data: Send,
    R::Error: Into<Box<dyn StdError + Send + Sync>>,
{
    type Response = Receipt;
    type Error = Error;
    type Future = Pin<Box<dyn Future<Output = Result<Receipt, Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.stack.poll_ready(cx).map_err(Error::failed)
    }

    fn call(&mut self, request: DecisionRequest) -> Self::Future {
        // The instance that was polled ready makes the call; the clone stays.
        let clone = self.clone();
        let ready = mem::replace(self, clone);
        Box::pin(ready.decide(request))
    }
}

impl<S: Clone> Clone for AegisService<S> {
    fn clone(&self) -> Self {
        Self {
            stack: self.stack.clone(),
            shared: self.shared.clone(),
        }
    }
}

impl<S> fmt::Debug for AegisService<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AegisService")
            .field("approve", &self.shared.approve)
            .field("thread", &self.shared.thread)
            .finish_non_exhaustive()
    }
}
