//! All layers in the right order.

use std::error::Error as StdError;
use std::fmt;
use std::task::{Context, Poll};

use http::{HeaderName, Request, Response};
use http_body::Body;
use tower_layer::Layer;
use tower_service::Service;

use super::envelope::{Envelope, Names};
use super::{
    ConfirmDuplicateLayer, Replay, Retry, RetryError, RetryFuture, RetryLayer,
    SetIdempotencyKeyLayer, SetRequestIdLayer, SetTenantLayer, SetThreadLayer,
};
use crate::protocol::{TenantId, ThreadId};

/// Runs a call once: sets the headers that name it, retries it when that is safe, and treats 409 as
/// success.
///
/// It combines, from the outside in, [`SetTenantLayer`], [`SetThreadLayer`],
/// [`SetIdempotencyKeyLayer`], [`SetRequestIdLayer`], [`ConfirmDuplicateLayer`] and [`RetryLayer`].
/// See [the module](super) for an example and for the place of other layers.
///
/// By default, tenant, thread and key come from the request only (its headers or its extensions),
/// each call gets a new request id, and retry and confirmation have their defaults.
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

    /// Sets `tenant` on every request that names none.
    #[must_use]
    pub fn tenant(self, tenant: TenantId) -> Self {
        self.set_tenant(SetTenantLayer::new(tenant))
    }

    /// Sets `thread` on every request that names none.
    #[must_use]
    pub fn thread(self, thread: ThreadId) -> Self {
        self.set_thread(SetThreadLayer::new(thread))
    }

    /// Mints a key for every request without one; see [`SetIdempotencyKeyLayer::mint`].
    #[must_use]
    pub fn mint_idempotency_key(self) -> Self {
        self.set_idempotency_key(SetIdempotencyKeyLayer::mint())
    }

    /// Replaces the layer that sets the tenant.
    #[must_use]
    pub fn set_tenant(mut self, layer: SetTenantLayer) -> Self {
        self.tenant = layer;
        self
    }

    /// Replaces the layer that sets the thread.
    #[must_use]
    pub fn set_thread(mut self, layer: SetThreadLayer) -> Self {
        self.thread = layer;
        self
    }

    /// Replaces the layer that sets the idempotency key.
    #[must_use]
    pub fn set_idempotency_key(mut self, layer: SetIdempotencyKeyLayer) -> Self {
        self.key = layer;
        self
    }

    /// Replaces the layer that sets the request id.
    #[must_use]
    pub fn set_request_id(mut self, layer: SetRequestIdLayer) -> Self {
        self.request_id = layer;
        self
    }

    /// Replaces the confirmation layer.
    #[must_use]
    pub fn confirm(mut self, layer: ConfirmDuplicateLayer) -> Self {
        self.confirm = layer;
        self
    }

    /// Replaces the retry layer.
    #[must_use]
    pub fn retry(mut self, layer: RetryLayer) -> Self {
        self.retry = layer;
        self
    }

    /// Uses another header than `Idempotency-Key` for the key, in all layers. Call it after the
    /// layers are set.
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
        let envelope = Envelope::new(names, self.confirm.clone(), self.retry.key_header());
        Aegis {
            retry: self.retry.within(envelope).layer(inner),
        }
    }
}

/// The whole stack, made by [`AegisLayer`].
///
/// It behaves like its layers stacked around one another. The retry writes the headers into each
/// attempt, so they need not be kept beside the caller's own. Ids are minted once per call.
#[derive(Clone)]
pub struct Aegis<S> {
    retry: Retry<S>,
}

impl<S> Aegis<S> {
    /// Borrows the inner service.
    pub fn get_ref(&self) -> &S {
        self.retry.get_ref()
    }

    /// Borrows the inner service mutably.
    pub fn get_mut(&mut self) -> &mut S {
        self.retry.get_mut()
    }

    /// Returns the inner service.
    pub fn into_inner(self) -> S {
        self.retry.into_inner()
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
    type Future = RetryFuture<S, B, R>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.retry.poll_ready(cx)
    }

    #[inline]
    fn call(&mut self, request: Request<B>) -> Self::Future {
        self.retry.call(request)
    }
}

#[cfg(test)]
mod tests;
