//! The tower service: a match over the routes.

use std::convert::Infallible;
use std::fmt;
use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use http::{Method, Request, Version, request::Parts};
use http_body::Body;
use tower_service::Service;

use super::api::{Api, Route, Settings, shutting_down};
use super::auth::Auth;
use super::builder::HitlServiceBuilder;
use super::http::headers;
use super::http::response;
use super::http::{Arrival, Rejection, RequestBody, Response, ResponseBody};
use super::inbox::{self, Desk, Inbox};
use super::ops::openapi::{self, Reference};
use crate::store::Store;

/// Answers the endpoints over a [`Store`]: approve, reject, status, and the human loop from
/// submission to the outcome of a claim.
///
/// The service is always ready, never fails, and is cheap to clone. Every response is JSON, and
/// every error is a problem of RFC 9457.
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
/// Dropping a response future does not undo a decision that was passed to the store.
pub struct HitlService<St> {
    api: Arc<Api<St>>,
    inbox: Option<Arc<Desk>>,
    reference: Arc<Reference>,
}

impl<St> Clone for HitlService<St> {
    fn clone(&self) -> Self {
        Self {
            api: Arc::clone(&self.api),
            inbox: self.inbox.clone(),
            reference: Arc::clone(&self.reference),
        }
    }
}

impl<St> fmt::Debug for HitlService<St> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HitlService")
            .field("settings", &self.api.settings)
            .finish_non_exhaustive()
    }
}

impl<St: Store> HitlService<St> {
    /// Creates a service with the default settings: it trusts the `Tenant-Id` header.
    pub fn new(store: St) -> Self {
        Self::with_settings(store, Settings::default(), None)
    }

    /// Starts to build a service with other settings.
    pub fn builder(store: St) -> HitlServiceBuilder<St> {
        HitlServiceBuilder::new(store)
    }

    pub(crate) fn with_settings(store: St, settings: Settings, inbox: Option<Inbox>) -> Self {
        let has_keys = !settings.auth.trusts_tenant_header();
        Self {
            reference: Arc::new(Reference::new(settings.prefix.clone(), has_keys)),
            api: Arc::new(Api::new(store, settings)),
            inbox: inbox.map(Desk::new).map(Arc::new),
        }
    }

    /// Ends every wait for a decision and answers 503 to new requests, permanently and on all
    /// clones.
    ///
    /// [`Server`](super::Server) calls this when it shuts down. Call it yourself where the service
    /// is mounted elsewhere.
    pub fn drain(&self) {
        self.api.drain.start();
    }

    /// Returns how the service authenticates its callers.
    pub fn auth(&self) -> &Auth {
        &self.api.settings.auth
    }

    /// Makes a one-time link to the [inbox](Inbox) of a server without API keys, and returns its
    /// path and query. `None` if there is no inbox, or one has to sign in by API key.
    ///
    /// Whoever opens the link sees the actions of all tenants, and decides on them. An earlier link
    /// is no longer valid.
    pub fn issue_sign_in_path(&self) -> Option<String> {
        let inbox = self.inbox.as_ref();
        let inbox = inbox.filter(|_| self.auth().trusts_tenant_header())?;
        Some(format!("/sign-in?code={}", inbox.code.issue().as_str()))
    }

    /// Responds to a request.
    pub(crate) fn respond<B>(&self, request: Request<B>, arrival: Arrival) -> ResponseFuture
    where
        B: Body + Send + 'static,
    {
        ResponseFuture(Box::pin(self.clone().complete(request, arrival)))
    }

    pub(crate) fn api(&self) -> &Arc<Api<St>> {
        &self.api
    }
}

impl<St, B> Service<Request<B>> for HitlService<St>
where
    St: Store,
    B: Body + Send + 'static,
{
    type Response = http::Response<ResponseBody>;
    type Error = Infallible;
    type Future = ResponseFuture;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> ResponseFuture {
        self.respond(request, Arrival::default())
    }
}

/// The future of a response.
pub struct ResponseFuture(Pin<Box<dyn Future<Output = Response> + Send>>);

impl Future for ResponseFuture {
    type Output = Result<http::Response<ResponseBody>, Infallible>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.0.as_mut().poll(cx).map(Ok)
    }
}

impl fmt::Debug for ResponseFuture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResponseFuture").finish_non_exhaustive()
    }
}

impl<St: Store> HitlService<St> {
    async fn complete<B: Body>(self, request: Request<B>, arrival: Arrival) -> Response {
        let (parts, body) = request.into_parts();
        let began = Instant::now();
        let target = self.target(&parts);
        let endpoint = target.as_ref().map_or("none", Target::name);
        let body = pin!(body);
        let mut body = RequestBody::new(body, &parts.headers, arrival.holder());
        let mut response = self
            .dispatch(target, &parts, &mut body, arrival)
            .await
            .unwrap_or_else(Rejection::into_response);
        response = response::within(&self.api.leaving, arrival.holder(), response);
        // HTTP/2 resets the stream; HTTP/1 has only the connection to close.
        let is_last = !body.discard().await || self.api.drain.has_started();
        if is_last && parts.version < Version::HTTP_2 {
            response::close_after(&mut response);
        }
        if let Some(call_id) = headers::call_id_to_echo(&parts.headers) {
            response
                .headers_mut()
                .insert(crate::protocol::X_REQUEST_ID, call_id);
        }
        if parts.method == Method::HEAD {
            response::without_body(&mut response);
        }
        let elapsed = began.elapsed();
        let metrics = &self.api.metrics;
        metrics.answered(endpoint, response.status(), elapsed);
        // Paths hold ids, and queries hold more, so neither is logged.
        tracing::debug!(
            target: "aegis_hitl::access",
            method = %method_name(&parts.method),
            endpoint,
            status = response.status().as_u16(),
            ?elapsed,
            peer = arrival.peer.map(tracing::field::display),
            "answered"
        );
        response
    }

    async fn dispatch<B: Body>(
        &self,
        target: Result<Target<'_>, Rejection>,
        parts: &Parts,
        body: &mut RequestBody<'_, B>,
        arrival: Arrival,
    ) -> Result<Response, Rejection> {
        let api = self.api();
        api.admit(parts, arrival)?;
        if api.drain.has_started() {
            return Err(shutting_down());
        }
        if let Err(rejection) = api.count_peer(arrival.peer) {
            return match target {
                Ok(Target::Page(..)) => Ok(inbox::rejected(rejection)),
                _ => Err(rejection),
            };
        }
        let route = match target? {
            Target::Reference(form) => return self.reference.respond(form, &parts.method),
            // In a box, as every other request would have room for it too.
            Target::Page(desk, page) => {
                return Ok(Box::pin(inbox::respond(api, desk, page, parts, body, arrival)).await);
            }
            Target::Endpoint(route) => route,
        };
        headers::reject_repeated(&parts.headers)?;
        match route {
            Route::Decide(decision) => api.decide(decision, &parts.headers, body).await,
            Route::Submit => api.submit(&parts.headers, body).await,
            Route::Status(id) => api.status(id, &parts.headers).await,
            Route::List => api.list(parts.uri.query(), &parts.headers).await,
            Route::LookUp(id) => api.look_up(id, &parts.headers).await,
            Route::DecideById(decision, id) => {
                api.decide_by_id(decision, id, &parts.headers, body).await
            }
            Route::Cancel(id) => api.cancel(id, &parts.headers, body).await,
            Route::Claim(id) => api.claim(id, &parts.headers, body).await,
            Route::Renew(id) => api.renew(id, &parts.headers, body).await,
            Route::Complete(id) => api.complete(id, &parts.headers, body).await,
            Route::Fail(id) => api.fail(id, &parts.headers, body).await,
            Route::Events => api.events(&parts.headers).await,
        }
    }

    /// What a request is for.
    fn target<'a>(&'a self, parts: &'a Parts) -> Result<Target<'a>, Rejection> {
        let path = parts.uri.path();
        if let Some(form) = openapi::Form::of(path) {
            return Ok(Target::Reference(form));
        }
        if let Some(desk) = &self.inbox
            && let Some(page) = inbox::Route::of(path)
        {
            return Ok(Target::Page(desk, page));
        }
        let prefix = self.api.settings.prefix.as_str();
        Route::of(prefix, &parts.method, path).map(Target::Endpoint)
    }
}

/// The method in the log. A client can write anything in its place.
fn method_name(method: &Method) -> &str {
    let known = [
        Method::GET,
        Method::HEAD,
        Method::POST,
        Method::PUT,
        Method::PATCH,
        Method::DELETE,
        Method::OPTIONS,
        Method::TRACE,
        Method::CONNECT,
    ];
    if known.contains(method) {
        method.as_str()
    } else {
        "other"
    }
}

/// What a request is for.
enum Target<'a> {
    Reference(openapi::Form),
    Page(&'a Desk, inbox::Route<'a>),
    Endpoint(Route<'a>),
}

impl Target<'_> {
    /// The name in the log and in the metrics.
    fn name(&self) -> &'static str {
        match self {
            Self::Reference(form) => form.name(),
            Self::Page(_, page) => page.name(),
            Self::Endpoint(route) => route.name(),
        }
    }
}
