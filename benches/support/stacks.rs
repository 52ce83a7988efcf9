//! The stacks under comparison, over a service that answers at once.

use std::convert::Infallible;
use std::future::{Ready, ready};
use std::sync::atomic::{AtomicU32, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use aegis_hitl::layer::{
    AegisLayer, Backoff, Budget, ConfirmDuplicateLayer, RetryLayer, SetIdempotencyKeyLayer,
    SetRequestIdLayer, SetTenantLayer, SetThreadLayer,
};
use aegis_hitl::{TenantId, ThreadId};
use bytes::Bytes;
use http::header::{ACCEPT, CONTENT_TYPE};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Uri};
use http_body_util::Full;
use tower::retry::Policy;
use tower::{Layer, Service, ServiceBuilder};
use tower_http::request_id::{MakeRequestUuid, SetRequestIdLayer as TowerRequestIdLayer};
use tower_http::set_header::SetRequestHeaderLayer;
use uuid::Uuid;

pub(crate) type Body = Full<Bytes>;

pub(crate) const TENANT: HeaderName = HeaderName::from_static("tenant-id");
pub(crate) const THREAD: HeaderName = HeaderName::from_static("thread-id");
pub(crate) const KEY: HeaderName = HeaderName::from_static("idempotency-key");
pub(crate) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// 57 bytes.
pub(crate) const BODY: &[u8] = br#"{"payload":{"to":"a@b.c","amount":12.5,"currency":"EUR"}}"#;

/// A service that answers at once: 503 for a set number of times, then 200. Cloning it costs
/// nothing.
#[derive(Clone, Copy)]
pub(crate) struct Peer {
    failures: &'static AtomicU32,
}

impl Peer {
    pub(crate) fn new() -> Self {
        Self {
            failures: Box::leak(Box::default()),
        }
    }

    pub(crate) fn fail(self, times: u32) {
        self.failures.store(times, Ordering::Relaxed);
    }

    fn status(self) -> StatusCode {
        match self.failures.load(Ordering::Relaxed) {
            0 => StatusCode::OK,
            left => {
                self.failures.store(left - 1, Ordering::Relaxed);
                StatusCode::SERVICE_UNAVAILABLE
            }
        }
    }
}

impl Service<Request<Body>> for Peer {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Ready<Result<Response<Body>, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        std::hint::black_box(&request);
        let mut response = Response::new(Full::default());
        *response.status_mut() = self.status();
        ready(Ok(response))
    }
}

/// The template of every request.
#[derive(Clone)]
pub(crate) struct Template {
    uri: Uri,
    key: Option<HeaderValue>,
}

impl Template {
    pub(crate) fn new() -> Self {
        let uri = Uri::from_static("http://localhost:8000/api/v1/hitl/approve");
        Self { uri, key: None }
    }

    /// A template whose requests already carry a key.
    pub(crate) fn keyed() -> Self {
        Self {
            key: Some(HeaderValue::from_static("key-1")),
            ..Self::new()
        }
    }

    pub(crate) fn request(&self) -> Request<Body> {
        let mut headers = HeaderMap::with_capacity(8);
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        headers.insert(ACCEPT, HeaderValue::from_static("application/json"));
        if let Some(key) = &self.key {
            headers.insert(KEY, key.clone());
        }
        let mut request = Request::new(Full::new(Bytes::from_static(BODY)));
        *request.method_mut() = Method::POST;
        *request.uri_mut() = self.uri.clone();
        *request.headers_mut() = headers;
        request
    }
}

/// The floor: a service that sets the four headers and cannot send a request again.
///
/// It shares the values that never change. Each id is formatted on the stack and takes one
/// allocation.
#[derive(Clone)]
pub(crate) struct Floor<S> {
    inner: S,
    tenant: HeaderValue,
    thread: HeaderValue,
}

impl<S> Floor<S> {
    pub(crate) fn new(inner: S) -> Self {
        Self {
            inner,
            tenant: HeaderValue::from_static("acme"),
            thread: HeaderValue::from_static("run-7"),
        }
    }
}

fn uuid() -> HeaderValue {
    let mut text = [0; uuid::fmt::Hyphenated::LENGTH];
    let text = Uuid::new_v4().hyphenated().encode_lower(&mut text);
    HeaderValue::from_str(text).unwrap()
}

impl<S: Service<Request<Body>>> Service<Request<Body>> for Floor<S> {
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        let headers = request.headers_mut();
        headers.insert(TENANT, self.tenant.clone());
        headers.insert(THREAD, self.thread.clone());
        headers.insert(KEY, uuid());
        headers.insert(REQUEST_ID, uuid());
        self.inner.call(request)
    }
}

fn tenant() -> TenantId {
    TenantId::new("acme").unwrap()
}

fn thread() -> ThreadId {
    ThreadId::new("run-7").unwrap()
}

pub(crate) trait Stack:
    Service<Request<Body>, Response = Response<Body>, Error: std::fmt::Debug> + Clone
{
}

impl<S> Stack for S where
    S: Service<Request<Body>, Response = Response<Body>, Error: std::fmt::Debug> + Clone
{
}

pub(crate) fn aegis(peer: Peer) -> impl Stack {
    AegisLayer::new()
        .tenant(tenant())
        .thread(thread())
        .mint_idempotency_key()
        .retry(retry_layer())
        .layer(peer)
}

fn retry_layer() -> RetryLayer {
    // Every call pays for a budget, so this stack has one. It never runs out.
    let budget = Budget::new(1.0).burst(u32::MAX);
    RetryLayer::new().backoff(Backoff::none()).budget(budget)
}

pub(crate) fn set_tenant(peer: Peer) -> impl Stack {
    SetTenantLayer::new(tenant()).layer(peer)
}

pub(crate) fn set_thread(peer: Peer) -> impl Stack {
    SetThreadLayer::new(thread()).layer(peer)
}

pub(crate) fn set_key(peer: Peer) -> impl Stack {
    SetIdempotencyKeyLayer::mint().layer(peer)
}

pub(crate) fn set_request_id(peer: Peer) -> impl Stack {
    SetRequestIdLayer::mint().layer(peer)
}

pub(crate) fn confirm(peer: Peer) -> impl Stack {
    ConfirmDuplicateLayer::new().layer(peer)
}

pub(crate) fn retry(peer: Peer) -> impl Stack {
    retry_layer().layer(peer)
}

/// The usual policy of `tower::retry`: clone the request, count down, check the status.
#[derive(Clone)]
struct CountDown(u32);

impl<E> Policy<Request<Body>, Response<Body>, E> for CountDown {
    type Future = Ready<()>;

    fn retry(
        &mut self,
        _: &mut Request<Body>,
        result: &mut Result<Response<Body>, E>,
    ) -> Option<Self::Future> {
        let failed = match result {
            Ok(response) => response.status().is_server_error(),
            Err(_) => true,
        };
        if !failed || self.0 == 0 {
            return None;
        }
        self.0 -= 1;
        Some(ready(()))
    }

    fn clone_request(&mut self, request: &Request<Body>) -> Option<Request<Body>> {
        Some(request.clone())
    }
}

pub(crate) fn tower_retry(peer: Peer) -> impl Stack {
    tower::retry::RetryLayer::new(CountDown(3)).layer(peer)
}

pub(crate) fn tower_http(peer: Peer) -> impl Stack {
    let mint = |_: &Request<Body>| Some(HeaderValue::try_from(Uuid::new_v4().to_string()).unwrap());
    ServiceBuilder::new()
        .layer(SetRequestHeaderLayer::if_not_present(
            TENANT,
            HeaderValue::from_static("acme"),
        ))
        .layer(SetRequestHeaderLayer::if_not_present(
            THREAD,
            HeaderValue::from_static("run-7"),
        ))
        .layer(SetRequestHeaderLayer::if_not_present(KEY, mint))
        .layer(TowerRequestIdLayer::x_request_id(MakeRequestUuid))
        .layer(tower::retry::RetryLayer::new(CountDown(3)))
        .service(peer)
}

pub(crate) fn tower_resilience(peer: Peer) -> impl Stack {
    tower_resilience_retry::RetryLayer::<Request<Body>, Response<Body>, Infallible>::builder()
        .max_attempts(4)
        .fixed_backoff(Duration::ZERO)
        .retry_on_response(|response: &Response<Body>| response.status().is_server_error())
        .build()
        .layer(peer)
}

/// reqwest with middleware. A middleware answers, without a network.
pub(crate) mod with_reqwest {
    use reqwest_middleware::{ClientBuilder, ClientWithMiddleware, Next};
    use reqwest_retry::{Jitter, RetryTransientMiddleware, policies::ExponentialBackoff};

    use super::*;

    type Answer<'a> = std::pin::Pin<
        Box<dyn Future<Output = reqwest_middleware::Result<reqwest::Response>> + Send + 'a>,
    >;

    fn headers<'a>(
        mut request: reqwest::Request,
        extensions: &'a mut http::Extensions,
        next: Next<'a>,
    ) -> Answer<'a> {
        let headers = request.headers_mut();
        headers.insert(TENANT, HeaderValue::from_static("acme"));
        headers.insert(THREAD, HeaderValue::from_static("run-7"));
        headers.insert(KEY, uuid());
        headers.insert(REQUEST_ID, uuid());
        Box::pin(next.run(request, extensions))
    }

    pub(crate) fn retries() -> RetryTransientMiddleware<ExponentialBackoff> {
        RetryTransientMiddleware::new_with_policy(
            ExponentialBackoff::builder()
                .retry_bounds(Duration::ZERO, Duration::ZERO)
                .jitter(Jitter::None)
                .build_with_max_retries(3),
        )
    }

    /// Gives a closure the signature of a middleware.
    fn middleware<F>(middleware: F) -> F
    where
        F: for<'a> Fn(reqwest::Request, &'a mut http::Extensions, Next<'a>) -> Answer<'a>,
    {
        middleware
    }

    fn answer(peer: Peer, client: ClientBuilder) -> ClientWithMiddleware {
        let answer = middleware(move |request, _, _| {
            std::hint::black_box(&request);
            let mut response = http::Response::new(Bytes::new());
            *response.status_mut() = peer.status();
            Box::pin(ready(Ok(reqwest::Response::from(response))))
        });
        client.with(answer).build()
    }

    /// A client whose only middleware answers: the base of this client's stacks.
    pub(crate) fn bare(peer: Peer) -> ClientWithMiddleware {
        answer(peer, ClientBuilder::new(reqwest::Client::new()))
    }

    pub(crate) fn with_retries(peer: Peer) -> ClientWithMiddleware {
        let client = ClientBuilder::new(reqwest::Client::new());
        answer(peer, client.with(headers).with(retries()))
    }

    pub(crate) fn request(url: &reqwest::Url) -> reqwest::Request {
        let mut request = reqwest::Request::new(Method::POST, url.clone());
        let json = HeaderValue::from_static("application/json");
        request.headers_mut().reserve(8);
        request.headers_mut().insert(CONTENT_TYPE, json.clone());
        request.headers_mut().insert(ACCEPT, json);
        *request.body_mut() = Some(Bytes::from_static(BODY).into());
        request
    }
}
