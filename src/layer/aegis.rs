//! All layers in the right order.

use std::error::Error as StdError;
use std::fmt;
use std::task::{Context, Poll};

use http::{HeaderName, Request, Response};
use http_body::Body;
use tower_layer::Layer;
use tower_service::Service;

use super::set::Names;
use super::{
    ConfirmDuplicate, ConfirmDuplicateLayer, ConfirmFuture, Replay, Retry, RetryError, RetryFuture,
    RetryLayer, SetIdempotencyKeyLayer, SetRequestIdLayer, SetTenantLayer, SetThreadLayer,
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
        let names = Names {
            tenant: self.tenant.clone(),
            thread: self.thread.clone(),
            key: self.key.clone(),
            request_id: self.request_id.clone(),
        };
        Aegis {
            stack: self.confirm.layer(self.retry.named(names).layer(inner)),
        }
    }
}

/// The whole stack; made by [`AegisLayer`].
///
/// It behaves as its layers do around one another. The headers are written by the retry, into each attempt, so that they
/// need not be kept beside the caller's own; what is minted is minted once a call.
#[derive(Clone)]
pub struct Aegis<S> {
    stack: ConfirmDuplicate<Retry<S>>,
}

impl<S> Aegis<S> {
    /// Borrows the inner service.
    pub fn get_ref(&self) -> &S {
        self.stack.get_ref().get_ref()
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

    #[inline]
    fn call(&mut self, request: Request<B>) -> Self::Future {
        self.stack.call_named(request)
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::sync::{Arc, Mutex};

    use http::{HeaderMap, HeaderValue, StatusCode};
    use tower::{ServiceBuilder, ServiceExt, service_fn};

    use super::*;
    use crate::layer::{Attempts, Backoff};
    use crate::protocol::IdempotencyKey;

    type Seen = Arc<Mutex<Vec<HeaderMap>>>;

    /// A peer that answers with these statuses, one after the other, and notes the headers that it saw.
    fn peer(
        statuses: &'static [u16],
    ) -> (
        impl Service<Request<()>, Response = Response<String>, Error = Infallible> + Clone,
        Seen,
    ) {
        let seen = Seen::default();
        let noted = seen.clone();
        let service = service_fn(move |request: Request<()>| {
            let mut seen = noted.lock().unwrap();
            seen.push(request.headers().clone());
            let status = statuses[(seen.len() - 1) % statuses.len()];
            let status = StatusCode::from_u16(status).unwrap();
            let response = Response::builder().status(status).body(String::new());
            async { Ok(response.unwrap()) }
        });
        (service, seen)
    }

    fn layer() -> AegisLayer {
        AegisLayer::new()
            .tenant(TenantId::new("acme").unwrap())
            .thread(ThreadId::new("run-7").unwrap())
            .retry(RetryLayer::new().backoff(Backoff::none()))
    }

    fn lines(headers: &HeaderMap) -> Vec<(String, Vec<u8>)> {
        let lines = headers.iter();
        lines
            .map(|(name, value)| (name.to_string(), value.as_bytes().to_vec()))
            .collect()
    }

    #[tokio::test]
    async fn all_attempts_carry_the_same_headers_in_the_same_order() {
        let minting = layer().mint_idempotency_key();
        let quoting = layer().set_idempotency_key(SetIdempotencyKeyLayer::mint().quoted());
        let key = IdempotencyKey::new("k-1").unwrap();
        for (layer, key) in [(minting, None), (quoting, None), (layer(), Some(key))] {
            let (peer, seen) = peer(&[503, 503, 200]);
            let mut request = Request::post("/")
                .header("x-own", "1")
                .header("thread-id", "mine")
                .header("x-own", "2")
                .body(())
                .unwrap();
            request
                .extensions_mut()
                .insert(TenantId::new("other").unwrap());
            if let Some(key) = key {
                request.extensions_mut().insert(key);
            }
            let response = layer.layer(peer).oneshot(request).await.unwrap();
            assert_eq!(Attempts::of(&response), 3);
            let seen = seen.lock().unwrap();
            assert_eq!(seen.len(), 3);
            assert_eq!(seen[0]["tenant-id"], "other");
            assert_eq!(seen[0]["thread-id"], "mine");
            assert!(seen[0]["x-request-id"].len() == 36);
            assert!(!seen[0]["idempotency-key"].is_empty());
            assert_eq!(seen[0].get_all("x-own").iter().count(), 2);
            for again in &seen[1..] {
                assert_eq!(lines(again), lines(&seen[0]));
            }
        }
    }

    #[tokio::test]
    async fn it_sends_what_its_layers_send_around_one_another() {
        let request = || {
            let request = Request::post("/").header("x-own", "1");
            let request = request.header("x-request-id", "id-1");
            let key = IdempotencyKey::new("k-1").unwrap();
            request.extension(key).body(()).unwrap()
        };
        let (one, in_one) = peer(&[503, 409]);
        let answer = layer().layer(one).oneshot(request()).await.unwrap();
        let (many, in_many) = peer(&[503, 409]);
        let service = ServiceBuilder::new()
            .layer(layer().tenant)
            .layer(layer().thread)
            .layer(layer().key)
            .layer(layer().request_id)
            .layer(layer().confirm)
            .layer(layer().retry)
            .service(many);
        let other = service.oneshot(request()).await.unwrap();
        assert_eq!(
            (answer.status(), other.status()),
            (StatusCode::OK, StatusCode::OK)
        );
        let (in_one, in_many) = (in_one.lock().unwrap(), in_many.lock().unwrap());
        let all = |seen: &[HeaderMap]| seen.iter().map(lines).collect::<Vec<_>>();
        assert_eq!(all(&in_one), all(&in_many));
        assert_eq!(in_one.len(), 2);
    }

    #[tokio::test]
    async fn a_key_in_another_header_is_seen_by_all_layers_and_a_blank_one_by_none() {
        let name = HeaderName::from_static("x-once");
        let renamed = layer()
            .mint_idempotency_key()
            .idempotency_header(name.clone());
        let (service, seen) = peer(&[503, 409]);
        let request = Request::post("/").body(()).unwrap();
        let answer = renamed.clone().layer(service).oneshot(request).await;
        assert_eq!(answer.unwrap().status(), StatusCode::OK);
        {
            let seen = seen.lock().unwrap();
            assert_eq!(seen.len(), 2);
            assert_eq!(seen[0]["x-once"], seen[1]["x-once"]);
        }

        for status in [&[503], &[409]] {
            let (service, seen) = peer(status);
            let mut request = Request::post("/").body(()).unwrap();
            request
                .headers_mut()
                .insert(name.clone(), HeaderValue::from_static(" "));
            let answer = renamed.clone().layer(service).oneshot(request).await;
            assert_eq!(answer.unwrap().status().as_u16(), status[0]);
            assert_eq!(seen.lock().unwrap().len(), 1);
        }

        // The gate looks at another header than the key is written to: it sees none.
        let apart = layer()
            .mint_idempotency_key()
            .retry(RetryLayer::new().idempotency_header(name))
            .confirm(ConfirmDuplicateLayer::new());
        let (service, seen) = peer(&[503]);
        let request = Request::post("/").body(()).unwrap();
        let answer = apart.layer(service).oneshot(request).await.unwrap();
        assert_eq!(answer.status().as_u16(), 503);
        assert_eq!(seen.lock().unwrap().len(), 1);
    }
}
