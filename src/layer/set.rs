//! Layers that set the headers that name a call: tenant, thread, idempotency key, request id.
//!
//! Each sets one header, once per call. The request's own header wins over its typed extension, and
//! that over the layer's value.

use std::task::{Context, Poll};

use http::{HeaderMap, HeaderName, HeaderValue, Request};
use tower_layer::Layer;
use tower_service::Service;
use uuid::Uuid;

use super::first_value;
use crate::protocol::{
    IDEMPOTENCY_KEY, IdempotencyKey, RequestId, TENANT_ID, THREAD_ID, TenantId, ThreadId,
    X_REQUEST_ID, uuid_value,
};

/// The source of a layer's own value.
#[derive(Debug, Clone)]
enum Source {
    /// None: only the request's header and extension count.
    Absent,
    /// The same value for every call.
    Given(HeaderValue),
    /// A new UUIDv4 for every call.
    Minted { sensitive: bool },
}

#[derive(Debug, Clone)]
struct Setting {
    header: HeaderName,
    /// Whether `header` differs from the layer's usual one.
    renamed: bool,
    source: Source,
    /// Whether a value that is not a header yet is written as a quoted string.
    quoted: bool,
}

impl Setting {
    const fn new(header: HeaderName, source: Source) -> Self {
        Self {
            header,
            renamed: false,
            source,
            quoted: false,
        }
    }

    /// Whether this mints keys. Only keys are minted as secrets.
    fn mints_keys(&self) -> bool {
        matches!(self.source, Source::Minted { sensitive: true })
    }

    /// Sets the header on a request that lacks it. Returns whether there was a value. A minted id
    /// is stored in `minted`; an id stored there before is written again.
    #[inline(always)]
    fn fill(
        &self,
        headers: &mut HeaderMap,
        extension: Option<HeaderValue>,
        minted: &mut Option<u128>,
        usual: HeaderName,
    ) -> bool {
        // Each value goes straight into the map. Collecting them in a variable would cost a move
        // for each.
        match (extension, &self.source) {
            (Some(value), _) => self.write(headers, usual, value),
            (None, Source::Given(value)) => self.write(headers, usual, value.clone()),
            (None, Source::Minted { sensitive }) => {
                let id = match *minted {
                    Some(id) => id,
                    None => {
                        let id = Uuid::new_v4().as_u128();
                        *minted = Some(id);
                        id
                    }
                };
                let id = Uuid::from_u128(id);
                self.write(headers, usual, uuid_value(id, self.quoted, *sensitive))
            }
            (None, Source::Absent) => false,
        }
    }

    #[inline(always)]
    fn write(&self, headers: &mut HeaderMap, usual: HeaderName, value: HeaderValue) -> bool {
        // Fails only if the map is full (32,768 headers). The header is then missing, and the
        // layers below see a request without it.
        let written = if self.renamed {
            headers.try_insert(self.header.clone(), value)
        } else {
            // A constant has no reference count to update.
            headers.try_insert(usual, value)
        };
        written.is_ok()
    }
}

/// In a request's extensions: the key was minted for this call, so nobody can have used it before.
#[derive(Debug, Clone, Copy)]
pub(super) struct MintedKey;

macro_rules! set_header {
    ($layer:ident, $service:ident, $type:ident, $header:ident, $name:literal, $value:expr) => {
        impl $layer {
            /// Sets another header than
            #[doc = concat!("`", $name, "`.")]
            #[must_use]
            pub fn header(mut self, name: HeaderName) -> Self {
                self.setting.header = name;
                self.setting.renamed = true;
                self
            }
        }

        impl $layer {
            /// Returns the header that is set.
            pub(super) fn header_name(&self) -> &HeaderName {
                &self.setting.header
            }

            /// Sets the header, unless the request has its own or there is no value.
            pub(super) fn set<B>(&self, request: &mut Request<B>, minted: &mut Option<u128>) {
                if first_value(request.headers(), &self.setting.header).is_none() {
                    self.fill(request, minted);
                }
            }

            /// Sets the header on a request that lacks it. Returns whether there was a value.
            #[inline]
            pub(super) fn fill<B>(
                &self,
                request: &mut Request<B>,
                minted: &mut Option<u128>,
            ) -> bool {
                let value: fn(&$type, bool) -> HeaderValue = $value;
                let extension = request
                    .extensions()
                    .get::<$type>()
                    .map(|id| value(id, self.setting.quoted));
                let headers = request.headers_mut();
                self.setting.fill(headers, extension, minted, $header)
            }
        }

        impl<S> Layer<S> for $layer {
            type Service = $service<S>;

            fn layer(&self, inner: S) -> Self::Service {
                $service {
                    inner,
                    layer: self.clone(),
                }
            }
        }

        #[doc = concat!("Sets `", $name, "`; made by [`", stringify!($layer), "`].")]
        #[derive(Debug, Clone)]
        pub struct $service<S> {
            inner: S,
            layer: $layer,
        }

        impl<S> $service<S> {
            /// Borrows the inner service.
            pub fn get_ref(&self) -> &S {
                &self.inner
            }

            /// Borrows the inner service mutably.
            pub fn get_mut(&mut self) -> &mut S {
                &mut self.inner
            }

            /// Returns the inner service.
            pub fn into_inner(self) -> S {
                self.inner
            }
        }

        impl<S, B> Service<Request<B>> for $service<S>
        where
            S: Service<Request<B>>,
        {
            type Response = S::Response;
            type Error = S::Error;
            type Future = S::Future;

            fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
                self.inner.poll_ready(cx)
            }

            fn call(&mut self, mut request: Request<B>) -> Self::Future {
                let mut minted = None;
                self.layer.set(&mut request, &mut minted);
                if minted.is_some() && self.layer.setting.mints_keys() {
                    request.extensions_mut().insert(MintedKey);
                }
                self.inner.call(request)
            }
        }
    };
}

/// Sets `Tenant-Id`. The request's own header wins, then a [`TenantId`] in its extensions, then the
/// layer's value.
///
/// ```
/// use aegis_hitl::TenantId;
/// use aegis_hitl::layer::SetTenantLayer;
/// use http::{Request, Response};
/// use tower::{Layer, ServiceExt, service_fn};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let echo = service_fn(|request: Request<()>| async move {
///     Ok::<_, std::convert::Infallible>(Response::new(request.headers()["tenant-id"].clone()))
/// });
/// let service = SetTenantLayer::new(TenantId::new("acme")?).layer(echo);
/// let response = service.oneshot(Request::new(())).await?;
/// assert_eq!(response.body(), "acme");
/// // Middleware that logs headers knows not to log this one.
/// assert!(response.body().is_sensitive());
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct SetTenantLayer {
    setting: Setting,
}

impl SetTenantLayer {
    /// Sets `tenant` on every request that names none.
    pub fn new(tenant: TenantId) -> Self {
        Self {
            setting: Setting::new(TENANT_ID, Source::Given(tenant.header_value())),
        }
    }

    /// Takes the tenant only from a [`TenantId`] in the request's extensions. A request without one
    /// is left alone.
    pub fn from_extension() -> Self {
        Self {
            setting: Setting::new(TENANT_ID, Source::Absent),
        }
    }
}

set_header!(
    SetTenantLayer,
    SetTenant,
    TenantId,
    TENANT_ID,
    "Tenant-Id",
    |id, _| { id.header_value() }
);

/// Sets `Thread-Id`. The request's own header wins, then a [`ThreadId`] in its extensions, then the
/// layer's value.
///
/// ```
/// use aegis_hitl::layer::SetThreadLayer;
/// use aegis_hitl::ThreadId;
/// use http::{Request, Response};
/// use tower::{Layer, ServiceExt, service_fn};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let echo = service_fn(|request: Request<()>| async move {
///     Ok::<_, std::convert::Infallible>(Response::new(request.headers()["thread-id"].clone()))
/// });
/// let service = SetThreadLayer::new(ThreadId::new("run-7")?).layer(echo);
///
/// let plain = Request::new(());
/// assert_eq!(service.clone().oneshot(plain).await?.body(), "run-7");
///
/// let mut typed = Request::new(());
/// typed.extensions_mut().insert(ThreadId::new("run-8")?);
/// assert_eq!(service.oneshot(typed).await?.body(), "run-8");
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct SetThreadLayer {
    setting: Setting,
}

impl SetThreadLayer {
    /// Sets `thread` on every request that names none.
    pub fn new(thread: ThreadId) -> Self {
        Self {
            setting: Setting::new(THREAD_ID, Source::Given(thread.header_value())),
        }
    }

    /// Takes the thread only from a [`ThreadId`] in the request's extensions. A request without one
    /// is left alone.
    pub fn from_extension() -> Self {
        Self {
            setting: Setting::new(THREAD_ID, Source::Absent),
        }
    }
}

set_header!(
    SetThreadLayer,
    SetThread,
    ThreadId,
    THREAD_ID,
    "Thread-Id",
    |id, _| { id.header_value() }
);

/// Sets `Idempotency-Key`. The request's own header wins, then an [`IdempotencyKey`] in its
/// extensions, then a minted key.
///
/// A minted key makes the attempts of one call the same call. It cannot make two calls the same. An
/// agent that may crash and ask again needs a key that it can derive again
/// ([`IdempotencyKey::derive`]).
///
/// A server that expects the key in another header needs [`header`](Self::header) here and
/// `idempotency_header` on the retry and confirmation layers. [`AegisLayer`](super::AegisLayer)
/// sets all three.
///
/// ```
/// use aegis_hitl::IdempotencyKey;
/// use aegis_hitl::layer::SetIdempotencyKeyLayer;
/// use http::{Request, Response};
/// use tower::{Layer, ServiceExt, service_fn};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let echo = service_fn(|request: Request<()>| async move {
///     let key = request.headers().get("idempotency-key").cloned();
///     Ok::<_, std::convert::Infallible>(Response::new(key))
/// });
/// let service = SetIdempotencyKeyLayer::from_extension().layer(echo);
///
/// let mut keyed = Request::new(());
/// keyed.extensions_mut().insert(IdempotencyKey::derive(["run-7", "charge", "order-42"]));
/// assert!(service.clone().oneshot(keyed).await?.body().is_some());
/// assert!(service.oneshot(Request::new(())).await?.body().is_none());
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct SetIdempotencyKeyLayer {
    setting: Setting,
}

impl SetIdempotencyKeyLayer {
    /// Mints a key for every request without one.
    ///
    /// Nobody can have used the key before, so a 409 to the first attempt is a plain conflict. The
    /// request's extensions record that the key was minted, for
    /// [`ConfirmDuplicateLayer`](super::ConfirmDuplicateLayer) below.
    ///
    /// This makes a POST retryable that could otherwise be sent only once. Use it where the server
    /// deduplicates.
    pub fn mint() -> Self {
        Self {
            setting: Setting::new(IDEMPOTENCY_KEY, Source::Minted { sensitive: true }),
        }
    }

    /// Takes the key only from an [`IdempotencyKey`] in the request's extensions. A request without
    /// one is left alone.
    pub fn from_extension() -> Self {
        Self {
            setting: Setting::new(IDEMPOTENCY_KEY, Source::Absent),
        }
    }

    /// Sends the [IETF draft]'s quoted string instead of the bare key. A request's own header stays
    /// as it is.
    ///
    /// [IETF draft]: https://datatracker.ietf.org/doc/draft-ietf-httpapi-idempotency-key-header/
    #[must_use]
    pub fn quoted(mut self) -> Self {
        self.setting.quoted = true;
        self
    }
}

set_header!(
    SetIdempotencyKeyLayer,
    SetIdempotencyKey,
    IdempotencyKey,
    IDEMPOTENCY_KEY,
    "Idempotency-Key",
    |id, quoted| if quoted {
        id.quoted_header_value()
    } else {
        id.header_value()
    }
);

/// Sets `X-Request-Id`. The request's own header wins, then a [`RequestId`] in its extensions, then
/// a minted id.
///
/// ```
/// use aegis_hitl::RequestId;
/// use aegis_hitl::layer::SetRequestIdLayer;
/// use http::{Request, Response};
/// use tower::{Layer, ServiceExt, service_fn};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let echo = service_fn(|request: Request<()>| async move {
///     Ok::<_, std::convert::Infallible>(Response::new(request.headers()["x-request-id"].clone()))
/// });
/// let response = SetRequestIdLayer::mint().layer(echo).oneshot(Request::new(())).await?;
/// let id = RequestId::new(response.body().to_str()?)?;
/// assert!(id.as_uuid().is_some());
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct SetRequestIdLayer {
    setting: Setting,
}

impl SetRequestIdLayer {
    /// Mints an id, a UUIDv4, for every request without one.
    pub fn mint() -> Self {
        Self {
            setting: Setting::new(X_REQUEST_ID, Source::Minted { sensitive: false }),
        }
    }

    /// Takes the id only from a [`RequestId`] in the request's extensions. A request without one is
    /// left alone.
    pub fn from_extension() -> Self {
        Self {
            setting: Setting::new(X_REQUEST_ID, Source::Absent),
        }
    }
}

impl Default for SetRequestIdLayer {
    fn default() -> Self {
        Self::mint()
    }
}

set_header!(
    SetRequestIdLayer,
    SetRequestId,
    RequestId,
    X_REQUEST_ID,
    "X-Request-Id",
    |id, _| { id.header_value() }
);

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use http::Response;
    use tower::{ServiceExt, service_fn};

    use super::*;

    async fn sent<L, S>(layer: L, request: Request<()>) -> HeaderMap
    where
        L: Layer<
                tower::util::BoxCloneService<Request<()>, Response<HeaderMap>, Infallible>,
                Service = S,
            >,
        S: Service<Request<()>, Response = Response<HeaderMap>, Error = Infallible>,
    {
        let echo = service_fn(|request: Request<()>| async move {
            Ok(Response::new(request.headers().clone()))
        });
        let service = layer.layer(tower::util::BoxCloneService::new(echo));
        service.oneshot(request).await.unwrap().into_body()
    }

    #[tokio::test]
    async fn the_header_wins_over_the_extension_and_the_extension_over_the_layer() {
        let layer = SetTenantLayer::new(TenantId::new("layer").unwrap());
        let mut request = Request::new(());
        assert_eq!(
            sent(layer.clone(), request.clone()).await["tenant-id"],
            "layer"
        );
        request
            .extensions_mut()
            .insert(TenantId::new("extension").unwrap());
        assert_eq!(
            sent(layer.clone(), request.clone()).await["tenant-id"],
            "extension"
        );
        request
            .headers_mut()
            .insert("tenant-id", HeaderValue::from_static("header"));
        let headers = sent(layer, request).await;
        assert_eq!(headers.get_all("tenant-id").iter().count(), 1);
        assert_eq!(headers["tenant-id"], "header");
    }

    #[tokio::test]
    async fn without_a_value_no_header_is_sent() {
        assert!(
            sent(SetTenantLayer::from_extension(), Request::new(()))
                .await
                .is_empty()
        );
        assert!(
            sent(SetThreadLayer::from_extension(), Request::new(()))
                .await
                .is_empty()
        );
        assert!(
            sent(SetIdempotencyKeyLayer::from_extension(), Request::new(()))
                .await
                .is_empty()
        );
        assert!(
            sent(SetRequestIdLayer::from_extension(), Request::new(()))
                .await
                .is_empty()
        );
    }

    #[tokio::test]
    async fn only_a_minted_key_is_marked_as_minted() {
        let mark = service_fn(|request: Request<()>| async move {
            let is_marked = request.extensions().get::<MintedKey>().is_some();
            Ok::<_, Infallible>(Response::new(is_marked))
        });
        let key = SetIdempotencyKeyLayer::mint().layer(mark);
        let response = key.oneshot(Request::new(())).await.unwrap();
        assert!(response.into_body());
        let id = SetRequestIdLayer::mint().layer(mark);
        let response = id.oneshot(Request::new(())).await.unwrap();
        assert!(!response.into_body());
    }

    #[tokio::test]
    async fn tenant_and_key_are_marked_sensitive() {
        let headers = sent(
            SetTenantLayer::new(TenantId::new("t").unwrap()),
            Request::new(()),
        )
        .await;
        assert!(headers["tenant-id"].is_sensitive());
        let headers = sent(SetIdempotencyKeyLayer::mint(), Request::new(())).await;
        assert!(headers["idempotency-key"].is_sensitive());
    }

    #[tokio::test]
    async fn a_key_goes_out_bare_unless_quoting_is_asked_for() {
        let mut request = Request::new(());
        request
            .extensions_mut()
            .insert(IdempotencyKey::new("k-1").unwrap());
        let layer = SetIdempotencyKeyLayer::mint();
        assert_eq!(
            sent(layer.clone(), request.clone()).await["idempotency-key"],
            "k-1"
        );
        assert_eq!(
            sent(layer.clone().quoted(), request).await["idempotency-key"],
            "\"k-1\""
        );
        let minted = sent(layer.quoted(), Request::new(())).await["idempotency-key"].clone();
        assert_eq!(minted.len(), 38);
        assert!(IdempotencyKey::from_header(&minted).unwrap().as_str().len() == 36);
    }

    #[tokio::test]
    async fn each_call_gets_its_own_minted_values() {
        let first = sent(SetRequestIdLayer::mint(), Request::new(())).await;
        let second = sent(SetRequestIdLayer::mint(), Request::new(())).await;
        assert_ne!(first["x-request-id"], second["x-request-id"]);
    }

    #[tokio::test]
    async fn the_header_name_can_be_changed() {
        let layer = SetThreadLayer::new(ThreadId::new("h").unwrap())
            .header(HeaderName::from_static("x-thread"));
        let headers = sent(layer, Request::new(())).await;
        assert_eq!(headers["x-thread"], "h");
        assert_eq!(headers.len(), 1);
    }
}
