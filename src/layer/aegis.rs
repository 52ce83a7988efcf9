//! All layers in the right order.

use std::error::Error as StdError;
use std::fmt;
use std::task::{Context, Poll};

use http::{HeaderName, Request, Response};
use http_body::Body;
use tower_layer::Layer;
use tower_service::Service;

use super::{
    ConfirmDuplicate, ConfirmDuplicateLayer, ConfirmFuture, Replay, Retry, RetryError, RetryFuture,
    RetryLayer, SetIdempotencyKey, SetIdempotencyKeyLayer, SetRequestId, SetRequestIdLayer,
    SetTenant, SetTenantLayer, SetThread, SetThreadLayer,
};
use crate::protocol::{TenantId, ThreadId};

/// Makes a call happen once: sets the headers that name it, retries it when that is safe, and takes 409 as done.
///
/// These are, from the outside in, [`SetTenantLayer`], [`SetThreadLayer`], [`SetIdempotencyKeyLayer`],
/// [`SetRequestIdLayer`], [`ConfirmDuplicateLayer`] and [`RetryLayer`]; see [the module](super) for an example and for where
/// other layers go.
///
/// Without further settings, tenant, thread and key come from the request alone (its headers or its extensions), a request
/// id is minted for each call, and retry and confirmation have their defaults.
///
/// ```
/// use aegis_hitl::layer::{AegisLayer, Backoff, RetryLayer, SetIdempotencyKeyLayer};
/// use aegis_hitl::{TenantId, ThreadId};
/// use std::time::Duration;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let layer = AegisLayer::new()
///     .tenant(TenantId::new("acme")?)
///     .thread(ThreadId::new("run-7")?)
///     // The IETF draft's form of the key.
///     .set_idempotency_key(SetIdempotencyKeyLayer::mint().quoted())
///     .retry(
///         RetryLayer::new()
///             .backoff(Backoff::exponential(Duration::from_millis(100), Duration::from_secs(5)))
///             .deadline(Duration::from_secs(30)),
///     );
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct AegisLayer {
    tenant: SetTenantLayer,
    thread: SetThreadLayer,
    key: SetIdempotencyKeyLayer,
    request_id: SetRequestIdLayer,
    confirm: ConfirmDuplicateLayer,
    retry: RetryLayer,
}

impl AegisLayer {
    /// Makes the stack with its defaults.
    pub fn new() -> Self {
        Self {
            tenant: SetTenantLayer::from_extension(),
            thread: SetThreadLayer::from_extension(),
            key: SetIdempotencyKeyLayer::from_extension(),
            request_id: SetRequestIdLayer::mint(),
            confirm: ConfirmDuplicateLayer::new(),
            retry: RetryLayer::new(),
        }
    }

    /// Gives `tenant` to every request that names none itself.
    #[must_use]
    pub fn tenant(self, tenant: TenantId) -> Self {
        self.set_tenant(SetTenantLayer::new(tenant))
    }

    /// Gives `thread` to every request that names none itself.
    #[must_use]
    pub fn thread(self, thread: ThreadId) -> Self {
        self.set_thread(SetThreadLayer::new(thread))
    }

    /// Mints a key for every request that has none; see [`SetIdempotencyKeyLayer::mint`].
    #[must_use]
    pub fn mint_idempotency_key(self) -> Self {
        self.set_idempotency_key(SetIdempotencyKeyLayer::mint())
    }

    /// Replaces how the tenant is set.
    #[must_use]
    pub fn set_tenant(mut self, layer: SetTenantLayer) -> Self {
        self.tenant = layer;
        self
    }

    /// Replaces how the thread is set.
    #[must_use]
    pub fn set_thread(mut self, layer: SetThreadLayer) -> Self {
        self.thread = layer;
        self
    }

    /// Replaces how the idempotency key is set.
    #[must_use]
    pub fn set_idempotency_key(mut self, layer: SetIdempotencyKeyLayer) -> Self {
        self.key = layer;
        self
    }

    /// Replaces how the request id is set.
    #[must_use]
    pub fn set_request_id(mut self, layer: SetRequestIdLayer) -> Self {
        self.request_id = layer;
        self
    }

    /// Replaces the confirmation.
    #[must_use]
    pub fn confirm(mut self, layer: ConfirmDuplicateLayer) -> Self {
        self.confirm = layer;
        self
    }

    /// Replaces the retry.
    #[must_use]
    pub fn retry(mut self, layer: RetryLayer) -> Self {
        self.retry = layer;
        self
    }

    /// Carries the key in another header than `Idempotency-Key`, in all layers. Call it after the layers are set.
    #[must_use]
    pub fn idempotency_header(mut self, name: HeaderName) -> Self {
        self.key = self.key.header(name.clone());
        self.confirm = self.confirm.idempotency_header(name.clone());
        self.retry = self.retry.idempotency_header(name);
        self
    }
}

impl Default for AegisLayer {
    fn default() -> Self {
        Self::new()
    }
}

impl<S> Layer<S> for AegisLayer {
    type Service = Aegis<S>;

    fn layer(&self, inner: S) -> Self::Service {
        let retry = self.retry.layer(inner);
        let confirm = self.confirm.layer(retry);
        let named = self.key.layer(self.request_id.layer(confirm));
        Aegis {
            stack: self.tenant.layer(self.thread.layer(named)),
        }
    }
}

type Stack<S> = SetTenant<SetThread<SetIdempotencyKey<SetRequestId<ConfirmDuplicate<Retry<S>>>>>>;

/// The whole stack; made by [`AegisLayer`].
#[derive(Clone)]
pub struct Aegis<S> {
    stack: Stack<S>,
}

impl<S> Aegis<S> {
    /// Borrows the inner service.
    pub fn get_ref(&self) -> &S {
        let confirm = self.stack.get_ref().get_ref().get_ref().get_ref();
        confirm.get_ref().get_ref()
    }
}

impl<S: fmt::Debug> fmt::Debug for Aegis<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Aegis").field(self.get_ref()).finish()
    }
}

impl<S, B, R> Service<Request<B>> for Aegis<S>
where
    S: Service<Request<B>, Response = Response<R>> + Clone,
    S::Error: Into<Box<dyn StdError + Send + Sync>>,
    B: Replay,
    R: Body,
{
    type Response = Response<R>;
    type Error = RetryError;
    type Future = ConfirmFuture<RetryFuture<S, B, R>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.stack.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        self.stack.call(request)
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::future::{Ready, ready};
    use std::time::Duration;

    use http::{HeaderMap, HeaderValue, StatusCode};
    use tower::ServiceExt;

    use super::*;
    use crate::layer::{Attempts, Backoff, Confirmation, ReplayBodyLayer, SetIdempotencyKeyLayer};
    use crate::protocol::{IdempotencyKey, RequestId};

    type Body = http_body_util::Full<bytes::Bytes>;

    /// Answers with the status that `x-status` asks for, and with the headers that it was sent; ready only if it is told so.
    #[derive(Clone)]
    struct Echo {
        is_ready: bool,
    }

    impl<B> Service<Request<B>> for Echo {
        type Response = Response<Body>;
        type Error = Infallible;
        type Future = Ready<Result<Response<Body>, Infallible>>;

        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
            if self.is_ready {
                Poll::Ready(Ok(()))
            } else {
                Poll::Pending
            }
        }

        fn call(&mut self, request: Request<B>) -> Self::Future {
            let mut response = Response::new(Body::default());
            *response.headers_mut() = request.headers().clone();
            let status = request.headers().get("x-status");
            let status = status.and_then(|status| status.to_str().ok()?.parse().ok());
            *response.status_mut() =
                StatusCode::from_u16(status.unwrap_or(200)).unwrap_or(StatusCode::OK);
            ready(Ok(response))
        }
    }

    async fn answer(layer: &AegisLayer, status: &'static str) -> Response<Body> {
        let mut request = Request::post("/").body(Body::default()).unwrap();
        let asked = HeaderValue::from_static(status);
        request.headers_mut().insert("x-status", asked);
        layer
            .layer(Echo { is_ready: true })
            .oneshot(request)
            .await
            .unwrap()
    }

    async fn sent(layer: &AegisLayer) -> HeaderMap {
        answer(layer, "200").await.headers().clone()
    }

    #[tokio::test]
    async fn by_default_only_the_request_id_is_minted() {
        let headers = sent(&AegisLayer::new()).await;
        assert_eq!(headers.len(), 2);
        let id = RequestId::new(headers["x-request-id"].to_str().unwrap()).unwrap();
        assert!(id.as_uuid_v4().is_some());
    }

    #[tokio::test]
    async fn every_setting_takes_effect_beside_the_others() {
        let layer = AegisLayer::new()
            .tenant(TenantId::new("t").unwrap())
            .thread(ThreadId::new("h").unwrap())
            .mint_idempotency_key();
        let headers = sent(&layer).await;
        assert_eq!(
            (&headers["tenant-id"], &headers["thread-id"]),
            (&"t".parse().unwrap(), &"h".parse().unwrap())
        );
        assert!(IdempotencyKey::from_header(&headers["idempotency-key"]).is_ok());

        let named = HeaderName::from_static;
        let layer = layer
            .set_tenant(SetTenantLayer::new(TenantId::new("t2").unwrap()).header(named("x-tenant")))
            .set_thread(SetThreadLayer::new(ThreadId::new("h2").unwrap()).header(named("x-thread")))
            .set_idempotency_key(SetIdempotencyKeyLayer::mint().quoted())
            .set_request_id(SetRequestIdLayer::mint().header(named("x-call")));
        let headers = sent(&layer).await;
        assert_eq!(
            (&headers["x-tenant"], &headers["x-thread"]),
            (&"t2".parse().unwrap(), &"h2".parse().unwrap())
        );
        assert!(headers["idempotency-key"].as_bytes().starts_with(b"\""));
        assert_eq!(headers["x-call"].len(), 36);
        assert_eq!(headers.len(), 5);
    }

    #[tokio::test(start_paused = true)]
    async fn retry_and_confirmation_are_the_ones_that_were_set() {
        let layer = AegisLayer::new()
            .tenant(TenantId::new("t").unwrap())
            .mint_idempotency_key()
            .confirm(ConfirmDuplicateLayer::new().status(StatusCode::ACCEPTED))
            .retry(RetryLayer::new().max_retries(1).backoff(Backoff::none()));
        let response = answer(&layer, "409").await;
        assert_eq!(response.status(), 202);
        assert_eq!(Confirmation::of(&response), Some(Confirmation::Duplicate));
        let response = answer(&layer, "503").await;
        assert_eq!(Attempts::of(&response), 2);
        assert_eq!(response.headers()["tenant-id"], "t");

        let moved = layer.idempotency_header(HeaderName::from_static("x-key"));
        let response = answer(&moved, "409").await;
        assert_eq!(response.status(), 202);
        assert!(response.headers().contains_key("x-key"));
        assert!(!response.headers().contains_key("idempotency-key"));
        assert_eq!(response.headers()["tenant-id"], "t");
        assert_eq!(Attempts::of(&answer(&moved, "503").await), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn no_layer_is_ready_before_the_service_is() {
        async fn is_ready<S: Service<Request<Body>>>(mut service: S) -> bool {
            let ready = tokio::time::timeout(Duration::from_secs(1), service.ready());
            ready.await.is_ok_and(|ready| ready.is_ok())
        }
        for expected in [false, true] {
            let echo = Echo { is_ready: expected };
            let tenant = SetTenantLayer::from_extension();
            let thread = SetThreadLayer::from_extension();
            assert_eq!(is_ready(tenant.layer(echo.clone())).await, expected);
            assert_eq!(is_ready(thread.layer(echo.clone())).await, expected);
            let key = SetIdempotencyKeyLayer::mint();
            assert_eq!(is_ready(key.layer(echo.clone())).await, expected);
            let id = SetRequestIdLayer::mint();
            assert_eq!(is_ready(id.layer(echo.clone())).await, expected);
            let confirm = ConfirmDuplicateLayer::new();
            assert_eq!(is_ready(confirm.layer(echo.clone())).await, expected);
            assert_eq!(
                is_ready(RetryLayer::new().layer(echo.clone())).await,
                expected
            );
            let replay = ReplayBodyLayer::new();
            assert_eq!(is_ready(replay.layer(echo.clone())).await, expected);
            assert_eq!(is_ready(AegisLayer::new().layer(echo)).await, expected);
        }
    }
}
