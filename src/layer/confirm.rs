//! Turns a 409 to a request with an idempotency key into a confirmed success.

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use http::header::RETRY_AFTER;
use http::{HeaderMap, HeaderName, Method, Request, Response, StatusCode, Uri};
use pin_project_lite::pin_project;
use tower_layer::Layer;
use tower_service::Service;

use super::retry::Attempts;
use super::set::MintedKey;
use super::{Delivery, RequestHead, ResponseHead, carries_key};
use crate::protocol::IDEMPOTENCY_KEY;

/// Whether this call did the work, or an earlier call with the same key did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(clippy::exhaustive_enums)]
pub enum Confirmation {
    /// The service accepted this call.
    Fresh,
    /// The service answered 409: it had accepted an earlier call with this key.
    Duplicate,
}

impl Confirmation {
    /// Returns how a response confirms its call, or `None` if it is not a success.
    ///
    /// `Duplicate` is also in the response's extensions. `Fresh` is not, because that would cost
    /// every success three allocations. This method returns either.
    pub fn of<B>(response: &Response<B>) -> Option<Self> {
        match response.extensions().get::<Self>() {
            Some(confirmation) => Some(*confirmation),
            None => response.status().is_success().then_some(Self::Fresh),
        }
    }
}

type Predicate = Arc<dyn Fn(&RequestHead<'_>, &ResponseHead<'_>) -> bool + Send + Sync>;

/// Turns a 409 to a request with an idempotency key into a success, marked
/// [`Confirmation::Duplicate`].
///
/// Use it for services on which 409 to a keyed request means *done before, under this key*. Three
/// kinds of 409 pass through unchanged:
///
/// - To a request without a key. It is a plain conflict.
/// - To a first attempt under a key that [was minted](super::SetIdempotencyKeyLayer::mint) for this
///   call. Nobody can have used the key before, so this is a plain conflict too.
///   [`RetryLayer`](super::RetryLayer) reports whether an earlier attempt may have reached the
///   service; under another retry, every attempt counts as the first.
/// - With `Retry-After`. The first call is still in flight ([IETF draft], section 2.7), so nothing
///   is confirmed, and the retry layer tries again.
///
/// The layer judges a call's last answer, so it belongs outside of the retry.
/// [`AegisLayer`](super::AegisLayer) includes it in the right place. A second one below would know
/// neither the number of the attempt nor that the key was minted.
///
/// Body and headers stay as the service sent them. They may differ from the first call's.
///
/// [IETF draft]: https://datatracker.ietf.org/doc/draft-ietf-httpapi-idempotency-key-header/
///
/// ```
/// use aegis_hitl::layer::{ConfirmDuplicateLayer, Confirmation};
/// use http::{Request, Response, StatusCode};
/// use tower::{Layer, ServiceExt, service_fn};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let taken = service_fn(|_: Request<()>| async {
///     Ok::<_, std::convert::Infallible>(Response::builder().status(409).body(()).unwrap())
/// });
/// let service = ConfirmDuplicateLayer::new().layer(taken);
///
/// let keyed = Request::post("/charge").header("idempotency-key", "k-1").body(())?;
/// let response = service.clone().oneshot(keyed).await?;
/// assert_eq!(response.status(), StatusCode::OK);
/// assert_eq!(Confirmation::of(&response), Some(Confirmation::Duplicate));
///
/// let plain = Request::post("/charge").body(())?;
/// assert_eq!(service.oneshot(plain).await?.status(), StatusCode::CONFLICT);
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct ConfirmDuplicateLayer {
    key_header: HeaderName,
    confirm: Confirm,
}

/// How to judge the answer to a request with a key.
#[derive(Clone)]
struct Confirm {
    /// The status to replace 409 with, or `None` to keep it.
    status: Option<StatusCode>,
    predicate: Option<Predicate>,
}

impl ConfirmDuplicateLayer {
    /// Turns a confirmed 409 into 200.
    pub fn new() -> Self {
        Self {
            key_header: IDEMPOTENCY_KEY,
            confirm: Confirm {
                status: Some(StatusCode::OK),
                predicate: None,
            },
        }
    }

    /// Turns a confirmed 409 into `status` instead of 200.
    ///
    /// # Panics
    ///
    /// If `status` is not in 200 to 299.
    #[must_use]
    pub fn status(mut self, status: StatusCode) -> Self {
        assert!(
            status.is_success(),
            "a confirmed duplicate is a success; allowed are 200 to 299, not {status}"
        );
        self.confirm.status = Some(status);
        self
    }

    /// Keeps the status 409 and only adds [`Confirmation::Duplicate`] to the extensions.
    #[must_use]
    pub fn annotate_only(mut self) -> Self {
        self.confirm.status = None;
        self
    }

    /// Confirms only the 409s that `predicate` accepts, for services that say more in a header or
    /// deduplicate on some paths only. The request's method, URI and headers are copied for the
    /// predicate.
    ///
    /// ```
    /// use aegis_hitl::layer::ConfirmDuplicateLayer;
    ///
    /// let layer = ConfirmDuplicateLayer::new()
    ///     .when(|request, response| {
    ///         request.uri.path() == "/charge" && !response.headers.contains_key("cf-ray")
    ///     });
    /// ```
    #[must_use]
    pub fn when<P>(mut self, predicate: P) -> Self
    where
        P: Fn(&RequestHead<'_>, &ResponseHead<'_>) -> bool + Send + Sync + 'static,
    {
        self.confirm.predicate = Some(Arc::new(predicate));
        self
    }

    /// Expects the key in another header than `Idempotency-Key`.
    #[must_use]
    pub fn idempotency_header(mut self, name: HeaderName) -> Self {
        self.key_header = name;
        self
    }

    /// Returns the header that carries the key.
    pub(super) fn key_header(&self) -> &HeaderName {
        &self.key_header
    }

    /// Whether the predicate needs a copy of the request's head.
    #[inline]
    pub(super) fn looks_at_the_request(&self) -> bool {
        self.confirm.predicate.is_some()
    }

    /// Confirms the answer to a request with a key, if it can be confirmed.
    #[inline]
    pub(super) fn confirm<R>(&self, response: &mut Response<R>, request: Option<&SentHead>) {
        self.confirm.confirm(response, request);
    }
}

impl Default for ConfirmDuplicateLayer {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for ConfirmDuplicateLayer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConfirmDuplicate")
            .field("key_header", &self.key_header)
            .field("status", &self.confirm.status)
            .field("predicate", &self.confirm.predicate.is_some())
            .finish()
    }
}

impl<S> Layer<S> for ConfirmDuplicateLayer {
    type Service = ConfirmDuplicate<S>;

    fn layer(&self, inner: S) -> Self::Service {
        ConfirmDuplicate {
            inner,
            layer: self.clone(),
        }
    }
}

/// Confirms duplicates. Made by [`ConfirmDuplicateLayer`].
#[derive(Debug, Clone)]
pub struct ConfirmDuplicate<S> {
    inner: S,
    layer: ConfirmDuplicateLayer,
}

impl<S> ConfirmDuplicate<S> {
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

impl<S, B, R> Service<Request<B>> for ConfirmDuplicate<S>
where
    S: Service<Request<B>, Response = Response<R>>,
{
    type Response = Response<R>;
    type Error = S::Error;
    type Future = ConfirmFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let is_keyed = carries_key(request.headers(), &self.layer.key_header);
        let is_minted = request.extensions().get::<MintedKey>().is_some();
        let head = (is_keyed && self.layer.looks_at_the_request())
            .then(|| Box::new(SentHead::of(&request)));
        ConfirmFuture {
            inner: self.inner.call(request),
            confirm: is_keyed.then(|| self.layer.confirm.clone()),
            is_minted,
            head,
        }
    }
}

pin_project! {
    /// The future of [`ConfirmDuplicate`].
    #[must_use = "futures do nothing unless polled"]
    pub struct ConfirmFuture<F> {
        #[pin]
        inner: F,
        // `None` if the request has no key.
        confirm: Option<Confirm>,
        // Whether the key was minted for this call.
        is_minted: bool,
        head: Option<Box<SentHead>>,
    }
}

/// The head of the request as it was sent, for the predicate.
#[derive(Debug)]
pub(super) struct SentHead {
    method: Method,
    uri: Uri,
    headers: HeaderMap,
}

impl SentHead {
    pub(super) fn of<B>(request: &Request<B>) -> Self {
        Self {
            method: request.method().clone(),
            uri: request.uri().clone(),
            headers: request.headers().clone(),
        }
    }

    fn head(&self) -> RequestHead<'_> {
        RequestHead {
            method: &self.method,
            uri: &self.uri,
            headers: &self.headers,
        }
    }
}

impl Confirm {
    #[inline]
    fn confirm<R>(&self, response: &mut Response<R>, request: Option<&SentHead>) {
        if response.status() != StatusCode::CONFLICT
            || !self.accepts(request, &ResponseHead::of(response))
        {
            return;
        }
        if let Some(status) = self.status {
            *response.status_mut() = status;
        }
        response.extensions_mut().insert(Confirmation::Duplicate);
    }

    fn accepts(&self, request: Option<&SentHead>, head: &ResponseHead<'_>) -> bool {
        if head.headers.contains_key(RETRY_AFTER) {
            return false;
        }
        match &self.predicate {
            Some(accepts) => request.is_some_and(|request| accepts(&request.head(), head)),
            None => true,
        }
    }
}

impl<F> fmt::Debug for ConfirmFuture<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConfirmFuture")
            .field("keyed", &self.confirm.is_some())
            .finish_non_exhaustive()
    }
}

impl<F, R, E> Future for ConfirmFuture<F>
where
    F: Future<Output = Result<Response<R>, E>>,
{
    type Output = Result<Response<R>, E>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let mut response = ready!(this.inner.poll(cx))?;
        if let Some(confirm) = this.confirm
            && !(*this.is_minted && Attempts::earlier(&response) == Delivery::NeverSent)
        {
            confirm.confirm(&mut response, this.head.as_deref());
        }
        Poll::Ready(Ok(response))
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use tower::{ServiceExt, service_fn};

    use super::*;

    async fn answer(
        layer: ConfirmDuplicateLayer,
        keyed: bool,
        status: u16,
        retry_after: bool,
    ) -> Response<()> {
        let peer = service_fn(move |_: Request<()>| async move {
            let mut response = Response::builder().status(status);
            if retry_after {
                response = response.header(RETRY_AFTER, "1");
            }
            Ok::<_, Infallible>(response.body(()).unwrap())
        });
        let mut request = Request::post("/");
        if keyed {
            request = request.header(IDEMPOTENCY_KEY, "k");
        }
        layer
            .layer(peer)
            .oneshot(request.body(()).unwrap())
            .await
            .unwrap()
    }

    // gocardless-pro-ruby#39 swallows the 409, so callers cannot tell; gocardless-nodejs#91 parses
    // its body as the first call's.
    #[tokio::test]
    async fn a_409_to_a_keyed_request_is_a_success_marked_duplicate() {
        let response = answer(ConfirmDuplicateLayer::new(), true, 409, false).await;
        assert_eq!(response.status(), 200);
        assert_eq!(Confirmation::of(&response), Some(Confirmation::Duplicate));
    }

    #[tokio::test]
    async fn a_409_to_a_request_without_a_key_stays_a_conflict() {
        let response = answer(ConfirmDuplicateLayer::new(), false, 409, false).await;
        assert_eq!(response.status(), 409);
        assert_eq!(Confirmation::of(&response), None);
    }

    // The IETF draft and stripe-node use 409 for "the first one is still running".
    #[tokio::test]
    async fn a_409_with_retry_after_is_in_flight_and_confirms_nothing() {
        let response = answer(ConfirmDuplicateLayer::new(), true, 409, true).await;
        assert_eq!(response.status(), 409);
        assert_eq!(Confirmation::of(&response), None);
    }

    #[tokio::test]
    async fn every_other_status_is_left_as_it_is() {
        for status in (100..600).filter(|status| *status != 409) {
            let response = answer(ConfirmDuplicateLayer::new(), true, status, false).await;
            assert_eq!(response.status(), status);
            let fresh = (200..300).contains(&status).then_some(Confirmation::Fresh);
            assert_eq!(Confirmation::of(&response), fresh);
        }
    }

    #[tokio::test]
    async fn the_status_can_be_chosen_or_left() {
        let accepted = ConfirmDuplicateLayer::new().status(StatusCode::ACCEPTED);
        assert_eq!(answer(accepted, true, 409, false).await.status(), 202);
        let response = answer(
            ConfirmDuplicateLayer::new().annotate_only(),
            true,
            409,
            false,
        )
        .await;
        assert_eq!(response.status(), 409);
        assert_eq!(Confirmation::of(&response), Some(Confirmation::Duplicate));
    }

    #[tokio::test]
    async fn a_predicate_may_refuse_by_the_head() {
        let layer =
            ConfirmDuplicateLayer::new().when(|_, head| head.headers.contains_key("x-replayed"));
        assert_eq!(answer(layer, true, 409, false).await.status(), 409);
    }

    #[tokio::test]
    async fn the_key_may_be_in_another_header() {
        let layer =
            ConfirmDuplicateLayer::new().idempotency_header(HeaderName::from_static("x-key"));
        assert_eq!(answer(layer, true, 409, false).await.status(), 409);
    }

    #[test]
    #[should_panic(expected = "allowed are 200 to 299")]
    fn a_status_that_is_no_success_is_refused() {
        let _ = ConfirmDuplicateLayer::new().status(StatusCode::CONFLICT);
    }
}
