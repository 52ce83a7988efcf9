//! The service that answers the endpoints.

use std::convert::Infallible;
use std::fmt;
use std::future::Future;
use std::net::IpAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use http::{HeaderValue, Method, Request, Response, StatusCode, Version, request::Parts};
use http_body::Body;
use tokio::time::timeout;
use tower_service::Service;

use super::api::Route;
use super::auth::Auth;
use super::builder::{HitlServiceBuilder, Settings};
use super::drain::Drain;
use super::http::headers as request;
use super::http::response as answer;
use super::http::{Answer, Guard, Refusal, ResponseBody, Upload};
use super::ops::Outage;
use crate::protocol::{Action, Body as JsonBody, ErrorChain, Escaped, RequestId};
use crate::store::{Actor, Identity, Store, StoreError};

/// Answers the four endpoints over a [`Store`]: approve, reject, status and submit.
///
/// It is always ready, never fails, and is cheap to clone. Every answer is JSON, and every error a problem of RFC 9457.
///
/// ```
/// use aegis_hitl::server::HitlService;
/// use aegis_hitl::store::Store;
///
/// # fn example(store: impl Store) -> Result<(), Box<dyn std::error::Error>> {
/// let service = HitlService::builder(store)
///     .prefix("/api/v1")
///     .require_submission(true)
///     .build()?;
/// # Ok(())
/// # }
/// ```
///
/// Dropping the future of a request does not take back a decision that the store was asked to record.
pub struct HitlService<St> {
    shared: Arc<Shared<St>>,
}

pub(crate) struct Shared<St> {
    pub(crate) store: St,
    pub(crate) settings: Settings,
    pub(crate) drain: Drain,
    outage: Outage,
}

impl<St> Clone for HitlService<St> {
    fn clone(&self) -> Self {
        Self {
            shared: Arc::clone(&self.shared),
        }
    }
}

impl<St> fmt::Debug for HitlService<St> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HitlService")
            .field("settings", &self.shared.settings)
            .finish_non_exhaustive()
    }
}

impl<St: Store> HitlService<St> {
    /// Makes a service with the default settings: the tenant header is trusted.
    pub fn new(store: St) -> Self {
        Self::with_settings(store, Settings::default())
    }

    /// Starts to build a service with other settings.
    pub fn builder(store: St) -> HitlServiceBuilder<St> {
        HitlServiceBuilder::new(store)
    }

    pub(crate) fn with_settings(store: St, settings: Settings) -> Self {
        Self {
            shared: Arc::new(Shared {
                store,
                settings,
                drain: Drain::new(),
                outage: Outage::default(),
            }),
        }
    }

    /// Ends every wait for a decision and answers 503 to new requests, for good, on all clones.
    ///
    /// [`Server`](super::Server) does this when it shuts down; call it where the service is mounted elsewhere.
    pub fn drain(&self) {
        self.shared.drain.start();
    }

    /// Returns how the service knows who asks.
    pub fn auth(&self) -> &Auth {
        &self.shared.settings.auth
    }

    /// Answers a request that came in at this address, if that is known.
    pub(crate) fn answer<B>(&self, request: Request<B>, listening: Option<IpAddr>) -> ResponseFuture
    where
        B: Body + Send + 'static,
    {
        let shared = Arc::clone(&self.shared);
        ResponseFuture(Box::pin(
            async move { shared.answer(request, listening).await },
        ))
    }

    pub(crate) fn shared(&self) -> &Shared<St> {
        &self.shared
    }
}

impl<St, B> Service<Request<B>> for HitlService<St>
where
    St: Store,
    B: Body + Send + 'static,
{
    type Response = Response<ResponseBody>;
    type Error = Infallible;
    type Future = ResponseFuture;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> ResponseFuture {
        self.answer(request, None)
    }
}

/// The future of an answer.
pub struct ResponseFuture(Pin<Box<dyn Future<Output = Answer> + Send>>);

impl Future for ResponseFuture {
    type Output = Result<Response<ResponseBody>, Infallible>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.0.as_mut().poll(cx).map(Ok)
    }
}

impl fmt::Debug for ResponseFuture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResponseFuture").finish_non_exhaustive()
    }
}

impl<St: Store> Shared<St> {
    async fn answer<B: Body>(&self, request: Request<B>, listening: Option<IpAddr>) -> Answer {
        let (parts, body) = request.into_parts();
        let body = pin!(body);
        let mut upload = Upload::new(body, &parts.headers);
        let mut answer = self
            .dispatch(&parts, &mut upload, listening)
            .await
            .unwrap_or_else(Refusal::into_answer);
        // HTTP/2 has streams to reset in place of a connection to close.
        if !upload.discard().await && parts.version < Version::HTTP_2 {
            answer::close_after(&mut answer);
        }
        if let Some(call_id) = request::echo(&parts.headers) {
            answer
                .headers_mut()
                .insert(crate::protocol::X_REQUEST_ID, call_id);
        }
        if parts.method == Method::HEAD {
            answer::without_body(&mut answer);
        }
        answer
    }

    async fn dispatch<B: Body>(
        &self,
        parts: &Parts,
        upload: &mut Upload<'_, B>,
        listening: Option<IpAddr>,
    ) -> Result<Answer, Refusal> {
        self.admit(parts, listening)?;
        if self.drain.has_started() {
            return Err(shutting_down());
        }
        let route = Route::of(
            self.settings.prefix.as_str(),
            &parts.method,
            parts.uri.path(),
        )?;
        request::refuse_repeated(&parts.headers)?;
        match route {
            Route::Decide(decision) => self.decide(decision, &parts.headers, upload).await,
            Route::Submit => self.submit(&parts.headers, upload).await,
            Route::Status(id) => self.status(id, &parts.headers).await,
        }
    }

    /// Refuses requests for foreign hosts, and of foreign web pages.
    pub(crate) fn admit(&self, parts: &Parts, listening: Option<IpAddr>) -> Result<(), Refusal> {
        let Settings { auth, hosts, .. } = &self.settings;
        if auth.trusts_tenant_header() || !hosts.is_empty() {
            Guard { hosts, listening }.admit(parts)
        } else {
            Ok(())
        }
    }

    /// Reads what every request that changes something has: who asks, for which action, in which call, and the body.
    pub(crate) async fn asked<B: Body>(
        &self,
        headers: &http::HeaderMap,
        upload: &mut Upload<'_, B>,
    ) -> Result<Asked, Refusal> {
        let caller = self.settings.auth.caller(headers)?.may_decide()?;
        Ok(Asked {
            identity: Identity {
                tenant_id: caller.tenant_id,
                thread_id: request::thread_id(headers)?,
                idempotency_key: request::idempotency_key(headers)?,
            },
            call_id: request::call_id(headers)?,
            actor: caller.actor,
            body: self.read(headers, upload).await?,
        })
    }

    /// Reads a JSON body.
    async fn read<B: Body>(
        &self,
        headers: &http::HeaderMap,
        upload: &mut Upload<'_, B>,
    ) -> Result<JsonBody, Refusal> {
        request::refuse_encoded(headers)?;
        let settings = &self.settings;
        let bytes = tokio::select! {
            biased;
            bytes = upload.read(settings.body_limit, settings.body_timeout) => bytes?,
            () = self.drain.has_waited() => return Err(shutting_down()),
        };
        if bytes.is_empty() {
            return Ok(JsonBody::default());
        }
        request::refuse_other_than_json(headers)?;
        JsonBody::parse(&bytes).map_err(Refusal::invalid)
    }

    /// Waits for the store, within the bounds of time.
    pub(crate) async fn ask<T>(
        &self,
        future: impl Future<Output = Result<T, StoreError>>,
    ) -> Result<T, Refusal> {
        match timeout(self.settings.store_timeout, future).await {
            Ok(Ok(answer)) => {
                self.store_answers();
                Ok(answer)
            }
            Ok(Err(error)) => {
                self.store_failed(&error);
                Err(Refusal::unavailable(
                    "the store cannot answer now, and whether it recorded this request is unknown; send it again with \
                     the same key",
                ))
            }
            Err(_) => {
                self.store_is_late(self.settings.store_timeout);
                Err(Refusal::unavailable(
                    "this request, or another for the same action, is still being recorded; send it again with the \
                     same key",
                ))
            }
        }
    }

    /// Logs a store's error and what caused it, if it is the first of an outage: every request that comes now has one.
    pub(crate) fn store_failed(&self, error: &StoreError) {
        if !self.outage.failed() {
            return;
        }
        let chain = ErrorChain(error).to_string();
        tracing::warn!("the store cannot answer: {}", Escaped::line(&chain));
    }

    /// Logs that the store did not answer within the limit, if it is the first time in an outage.
    pub(crate) fn store_is_late(&self, limit: Duration) {
        if self.outage.failed() {
            tracing::warn!(?limit, "the store did not answer in time");
        }
    }

    /// Logs that the store answers, if that is news.
    pub(crate) fn store_answers(&self) {
        if let Some(failures) = self.outage.succeeded() {
            tracing::info!(failures, "the store answers again");
        }
    }

    /// Where an action can be looked at.
    pub(crate) fn location(&self, request_id: &RequestId) -> Option<HeaderValue> {
        HeaderValue::try_from(format!("{}/hitl/status/{request_id}", self.settings.prefix)).ok()
    }

    /// An answer with an action, and where to look at it.
    pub(crate) fn recorded(&self, status: StatusCode, action: &Action) -> Answer {
        let mut answer = answer::success(status, action);
        if let Some(location) = self.location(&action.request_id) {
            answer
                .headers_mut()
                .insert(http::header::LOCATION, location);
        }
        answer
    }
}

/// What is asked for, but for the verb.
pub(crate) struct Asked {
    pub(crate) identity: Identity,
    pub(crate) call_id: Option<RequestId>,
    pub(crate) actor: Actor,
    pub(crate) body: JsonBody,
}

pub(crate) fn shutting_down() -> Refusal {
    Refusal::unavailable("the server is shutting down")
}

/// An action in the shape of an answer to a decision, which repeats neither the payload nor the comment.
pub(crate) fn receipt(mut action: Action) -> Action {
    action.payload = None;
    action.comment = None;
    action.replayed = false;
    action
}
