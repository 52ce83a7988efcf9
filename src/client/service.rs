//! The service and its calls, from the request to the receipt.

use std::error::Error as StdError;
use std::fmt;
use std::future::{Future, poll_fn};
use std::mem;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body::Body;
use http_body_util::Full;
use tokio::time::Instant;
use tower_service::Service;

use super::answer::{self, Answer};
use super::endpoints::{Endpoints, MAX_WAIT};
use super::operation::{Operation, Sent, Settings};
use super::read::ReadAnswers;
use super::request::{DecisionCall, DecisionRequest, Limits, Question, StatusCall};
use super::{Builder, Error, HttpClient, Receipt};
use crate::layer::{Aegis, after};
use crate::protocol::{Action, Decision, IdempotencyKey, InvalidValue, RequestId, Status};

/// How to treat a 409 that does not say which decision is on record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum OnDuplicate {
    /// As confirmation of the decision that was asked for. Right for servers that do not answer the
    /// opposite decision with 409.
    #[default]
    Confirm,
    /// As nothing, until the status endpoint has named the decision. A recorded opposite is a
    /// conflict. A pending action is waited for as long as one attempt may take. If the decision
    /// cannot be determined, the call is an error.
    Verify,
}

/// The pause between two status requests for a pending action, if the server does not wait by
/// itself.
const VERIFY_PAUSE: Duration = Duration::from_millis(500);

/// A client for an approvals API: every decision goes on record exactly once.
///
/// It is cheap to clone and to share. Every call carries tenant, thread, key and one request id
/// across its attempts. It is retried when that is safe. A 409 means *already on record*, after a
/// check of the body. A recorded opposite decision is never a success.
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
/// It is also a [`Service`] of [`DecisionRequest`], so that other layers stack on it.
pub struct AegisService<S = HttpClient> {
    stack: Aegis<ReadAnswers<S>>,
    endpoints: Arc<Endpoints>,
    on_duplicate: OnDuplicate,
}

impl AegisService {
    /// Starts building a service, with the defaults.
    pub fn builder() -> Builder {
        Builder::new()
    }
}

impl<S> AegisService<S> {
    pub(super) fn new(
        stack: Aegis<ReadAnswers<S>>,
        endpoints: Arc<Endpoints>,
        on_duplicate: OnDuplicate,
    ) -> Self {
        Self {
            stack,
            endpoints,
            on_duplicate,
        }
    }

    /// Takes the HTTP service out of the layers, for an answer that is read as it comes.
    pub(super) fn into_parts(self) -> (S, Arc<Endpoints>) {
        let endpoints = self.endpoints.clone();
        (self.into_inner(), endpoints)
    }

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
    // Not an `async fn`: its arguments would be kept twice, before and after the first poll.
    #[expect(clippy::manual_async_fn)]
    pub(super) fn decide(
        mut self,
        mut request: DecisionRequest,
    ) -> impl Future<Output = Result<Receipt, Error>> {
        async move {
            let deadline = self.endpoints.deadline(request.limits);
            self.ready(deadline).await?;
            let call_id = request.call_id.take().unwrap_or_else(RequestId::mint);
            let (sent, body) = self.endpoints.decision(&mut request, &call_id, deadline)?;
            let key = &request.key;
            let named = |error: Error| error.named(Some(key), Some(&call_id));
            let answer = Answer::of(self.stack.call(sent).await).map_err(named)?;
            let told = answer.told;
            let expected = self.endpoints.expected(&request, &body)?;
            let (receipt, is_told) = answer::receipt(answer, &expected, call_id.clone())
                .map_err(|error| named(error.told(told)))?;
            match self.on_duplicate {
                // Boxed, because this rare case would make the future of every call larger.
                OnDuplicate::Verify if receipt.is_duplicate() && !is_told => {
                    let verifying = self.verify(receipt, &request, &body, deadline);
                    let verified = Box::pin(verifying).await;
                    verified.map_err(|error| named(error.told(told)))
                }
                _ => Ok(receipt),
            }
        }
    }

    /// Waits until the service is ready, within the call's deadline.
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

    /// Determines which decision a bare 409 confirms.
    async fn verify(
        &mut self,
        receipt: Receipt,
        request: &DecisionRequest,
        body: &[u8],
        deadline: Option<Instant>,
    ) -> Result<Receipt, Error> {
        let limits = request.limits;
        let timeout = limits.timeout.unwrap_or(self.endpoints.timeout);
        // Replaces the call's own limit, from which the elapsed time was already taken.
        let until = earlier(after(timeout), deadline);
        let id = receipt.request_id().unwrap_or(&receipt.call_id).clone();
        let left = || until.map(|until| until.saturating_duration_since(Instant::now()));
        let pending = async {
            loop {
                let question = Question {
                    tenant: request.tenant.clone(),
                    wait: Some(left().unwrap_or(MAX_WAIT)),
                    limits: Limits {
                        deadline: left(),
                        max_retries: limits.max_retries,
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
            Ok(action) => {
                answer::verified(receipt, &self.endpoints.expected(request, body)?, action)
            }
            Err(error) => Err(Error::unverified(&receipt).with_source(error)),
        }
    }

    /// Makes one call of the human loop.
    pub(super) async fn perform<O: Operation>(
        mut self,
        mut operation: O,
        settings: Settings,
    ) -> Result<O::Output, Error> {
        let deadline = self.endpoints.deadline(settings.limits);
        self.ready(deadline).await?;
        let call_id = settings.call_id.clone().unwrap_or_else(RequestId::mint);
        let wire = operation.wire(&self.endpoints)?;
        let key = wire.key.clone();
        let sent = Sent {
            tenant: self.endpoints.tenant(settings.tenant.as_ref()).cloned(),
            call_id: call_id.clone(),
        };
        let request = self
            .endpoints
            .operation(wire, &settings, &call_id, deadline)?;
        let named = |error: Error| error.named(key.as_ref(), Some(&call_id));
        let answer = Answer::of(self.stack.call(request).await).map_err(named)?;
        let told = answer.told;
        operation
            .read(answer, sent)
            .map_err(|error| named(error.told(told)))
    }

    pub(super) async fn ask(&mut self, id: RequestId, question: Question) -> Result<Action, Error> {
        let deadline = self.endpoints.deadline(question.limits);
        self.ready(deadline).await?;
        let tenant = self.endpoints.tenant(question.tenant.as_ref()).cloned();
        let request = self.endpoints.question(&id, question, deadline)?;
        let answer = Answer::of(self.stack.call(request).await)?;
        let told = answer.told;
        answer::action(answer, tenant.as_ref()).map_err(|error| error.told(told))
    }
}

fn earlier(one: Option<Instant>, other: Option<Instant>) -> Option<Instant> {
    one.into_iter().chain(other).min()
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
        // The instance that was polled ready makes the call; the clone stays behind.
        let clone = self.clone();
        let ready = mem::replace(self, clone);
        Box::pin(ready.decide(request))
    }
}

impl<S: Clone> Clone for AegisService<S> {
    fn clone(&self) -> Self {
        Self {
            stack: self.stack.clone(),
            endpoints: self.endpoints.clone(),
            on_duplicate: self.on_duplicate,
        }
    }
}

impl<S> fmt::Debug for AegisService<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AegisService")
            .field("approve", &self.endpoints.approve)
            .field("thread", &self.endpoints.thread)
            .finish_non_exhaustive()
    }
}
