//! What is known about a request's delivery, and whether it is safe to send again.
//!
//! An error alone proves nothing. A redirect, a token fetch, a backup request or another retry may
//! stand below a retry, and the error that surfaces belongs to the last exchange only. The proof is
//! therefore counted where exchanges are made. The retry opens a scope for each attempt.
//! [`TrackDelivery`], around the HTTP client, counts the exchanges that begin in the scope and
//! those that provably never reached the service. An attempt was never sent if that holds for all
//! of its exchanges.

use std::cell::Cell;
use std::fmt;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};

use http::Method;
use pin_project_lite::pin_project;
use tower_layer::Layer;
use tower_service::Service;

use super::retry::SafeToRetry;

/// What is known about a request's delivery.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[allow(clippy::exhaustive_enums)]
pub enum Delivery {
    /// No byte of the request reached the service, so it has not been acted upon.
    NeverSent,
    /// The service answered.
    Answered,
    /// The request may have been acted upon, and there was no answer.
    Unknown,
}

impl fmt::Display for Delivery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::NeverSent => "never sent",
            Self::Answered => "answered",
            Self::Unknown => "unknown",
        })
    }
}

/// What the error of one exchange proves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Failure {
    /// Nothing: the request may have been acted upon. This includes timeouts, except those of the
    /// connect.
    Unknown,
    /// No byte of the request reached the service.
    NeverSent,
    /// The peer refused the stream before any processing (RFC 9113, section 8.7). Believed once per
    /// call.
    Refused,
    /// No byte of the request reached the service, and no further attempt can: the client cannot
    /// use the URI, or does not trust the certificate.
    Permanent,
}

/// The exchanges of one attempt, or of everything within one.
#[derive(Debug, Clone, Copy, Default)]
struct Tally {
    /// Exchanges begun.
    begun: u32,
    /// Exchanges that provably never reached the service.
    never_sent: u32,
    /// Exchanges that the peer refused.
    refused: u32,
    /// Exchanges that can never succeed.
    permanent: u32,
    /// Attempts made by retries below.
    attempts: u32,
}

impl Tally {
    /// Returns what was added since `earlier`.
    fn since(self, earlier: Self) -> Self {
        Self {
            begun: self.begun - earlier.begun,
            never_sent: self.never_sent - earlier.never_sent,
            refused: self.refused - earlier.refused,
            permanent: self.permanent - earlier.permanent,
            attempts: 0,
        }
    }

    fn plus(self, more: Self) -> Self {
        Self {
            begun: self.begun + more.begun,
            never_sent: self.never_sent + more.never_sent,
            refused: self.refused + more.refused,
            permanent: self.permanent + more.permanent,
            attempts: self.attempts,
        }
    }
}

/// Identifies the attempt that exchanges are counted for. Zero means none.
type Id = u64;

#[derive(Debug, Clone, Copy)]
struct Scope {
    id: Id,
    tally: Tally,
}

thread_local! {
    /// The attempt whose service is being called or polled on this thread.
    static SCOPE: Cell<Scope> = const { Cell::new(Scope { id: 0, tally: Tally { begun: 0, never_sent: 0, refused: 0, permanent: 0, attempts: 0 } }) };
    /// The next attempt's id on this thread.
    static NEXT: Cell<Id> = const { Cell::new(0) };
}

/// Threads take ids in blocks, so that they do not contend for one counter. The first id of a block
/// is skipped, so that no id is zero.
static BLOCKS: AtomicU64 = AtomicU64::new(1);

fn next_id() -> Id {
    const BLOCK: u64 = 1 << 32;
    let mut id = NEXT.get();
    if id.is_multiple_of(BLOCK) {
        id = BLOCKS.fetch_add(BLOCK, Ordering::Relaxed);
    }
    NEXT.set(id + 1);
    id
}

/// What happened within one attempt.
#[derive(Debug)]
pub(super) struct Track {
    id: Id,
    tally: Tally,
    /// How many attempts were reported to the enclosing scope.
    counted: u32,
}

impl Track {
    pub(super) fn new() -> Self {
        Self {
            id: next_id(),
            tally: Tally::default(),
            counted: 0,
        }
    }

    /// Opens the attempt's scope until the guard is dropped. Hold the guard whenever the service is
    /// called or polled.
    #[inline]
    pub(super) fn enter(&mut self) -> Entered<'_> {
        let outer = SCOPE.replace(Scope {
            id: self.id,
            tally: self.tally,
        });
        Entered { outer, track: self }
    }

    /// Returns how many attempts this one was: those of retries below, or one.
    pub(super) fn attempts(&self) -> u32 {
        self.tally.attempts.max(1)
    }

    /// Returns what everything within the attempt proves. `refused` says whether this call has
    /// believed a refusal before.
    pub(super) fn failure(&self, refused: &mut bool) -> Failure {
        let Tally {
            begun,
            never_sent,
            refused: refusals,
            permanent,
            ..
        } = self.tally;
        if begun == 0 || never_sent + refusals < begun {
            return Failure::Unknown;
        }
        if refusals > 0 {
            let believed = refusals == 1 && !std::mem::replace(refused, true);
            return if believed {
                Failure::Refused
            } else {
                Failure::Unknown
            };
        }
        if permanent == begun {
            Failure::Permanent
        } else {
            Failure::NeverSent
        }
    }
}

/// An attempt's open scope.
pub(super) struct Entered<'a> {
    outer: Scope,
    track: &'a mut Track,
}

impl Drop for Entered<'_> {
    #[inline]
    fn drop(&mut self) {
        let inner = SCOPE.get().tally;
        // If this retry stands below another one, all of this also happened within the outer
        // attempt.
        if self.outer.id != 0 {
            let attempts = inner.attempts.max(1);
            let outer = &mut self.outer.tally;
            *outer = outer.plus(inner.since(self.track.tally));
            outer.attempts += attempts - self.track.counted;
            self.track.counted = attempts;
        }
        self.track.tally = inner;
        SCOPE.set(self.outer);
    }
}

/// One exchange with a service, reported to the retry above.
///
/// For HTTP clients that are services themselves: begin an exchange in `Service::call`, and when it
/// fails, report what the error proves. [`TrackDeliveryLayer`] does this around any other client.
///
/// An exchange about which nothing is proven may have been acted upon. An exchange begun outside of
/// an attempt, as in a spawned task, is not counted and proves nothing.
#[derive(Debug)]
#[must_use = "an exchange of which nothing is said may have been acted upon"]
pub struct Exchange {
    id: Id,
}

impl Exchange {
    /// Begins an exchange in the attempt that is being called on this thread.
    #[inline]
    pub fn begin() -> Self {
        let mut scope = SCOPE.get();
        if scope.id != 0 {
            scope.tally.begun += 1;
            SCOPE.set(scope);
        }
        Self { id: scope.id }
    }

    /// Reports what the exchange's error proves. Call it while the attempt is being polled.
    pub fn failed(self, failure: Failure) {
        let mut scope = SCOPE.get();
        // The exchange belongs to another attempt. Whoever shares its future may be polling it, and
        // it proves nothing to them.
        if scope.id == 0 || scope.id != self.id {
            return;
        }
        match failure {
            Failure::Unknown => return,
            Failure::NeverSent => scope.tally.never_sent += 1,
            Failure::Refused => scope.tally.refused += 1,
            Failure::Permanent => {
                scope.tally.never_sent += 1;
                scope.tally.permanent += 1;
            }
        }
        SCOPE.set(scope);
    }
}

/// Judges what an error of an HTTP client proves. Any `Fn(&E) -> Failure` is a judge.
pub trait Judge<E> {
    /// Judges the error of one exchange.
    fn judge(&self, error: &E) -> Failure;
}

impl<E, F> Judge<E> for F
where
    F: Fn(&E) -> Failure,
{
    fn judge(&self, error: &E) -> Failure {
        self(error)
    }
}

/// Reports to the retry above which requests never reached the service.
///
/// Place it directly around the HTTP client. Without it a retry assumes that every error *may have
/// been acted upon* and sends again only what is idempotent, keyed, or declared safe. With it, a
/// request that was never sent is sent again whatever its method, and errors report
/// [`Delivery::NeverSent`].
///
/// Redirects, backup requests, token fetches and other retries between this layer and the retry may
/// send a request more than once. An attempt was never sent only if that is proven for every
/// exchange begun for it. Exchanges in a spawned task are not counted, so nothing is proven about
/// them. A service must not send the same request both directly and from such a task, or from a
/// future that it shares with another call.
///
/// ```
/// use std::io;
///
/// use aegis_hitl::layer::{Backoff, Delivery, Failure, RetryLayer, TrackDeliveryLayer};
/// use http::{Request, Response};
/// use tower::{ServiceBuilder, ServiceExt, service_fn};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let client = service_fn(|_: Request<String>| async {
///     Err::<Response<String>, _>(io::Error::from(io::ErrorKind::ConnectionRefused))
/// });
/// let service = ServiceBuilder::new()
///     .layer(RetryLayer::new().backoff(Backoff::none()))
///     .layer(TrackDeliveryLayer::new(|error: &io::Error| match error.kind() {
///         io::ErrorKind::ConnectionRefused => Failure::NeverSent,
///         _ => Failure::Unknown,
///     }))
///     .service(client);
///
/// // Neither idempotent nor keyed, but never sent.
/// let error = service.oneshot(Request::post("/").body(String::new())?).await.unwrap_err();
/// assert_eq!((error.attempts(), error.delivery()), (4, Delivery::NeverSent));
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct TrackDeliveryLayer<J> {
    judge: J,
}

impl<J> TrackDeliveryLayer<J> {
    /// Judges the client's errors with a function.
    pub fn new<E>(judge: J) -> Self
    where
        J: Fn(&E) -> Failure,
    {
        Self { judge }
    }
}

impl<J> fmt::Debug for TrackDeliveryLayer<J> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TrackDeliveryLayer").finish_non_exhaustive()
    }
}

impl<S, J: Clone> Layer<S> for TrackDeliveryLayer<J> {
    type Service = TrackDelivery<S, J>;

    fn layer(&self, inner: S) -> Self::Service {
        TrackDelivery {
            inner,
            judge: self.judge.clone(),
        }
    }
}

/// Tracks the exchanges of an HTTP client. Made by [`TrackDeliveryLayer`].
#[derive(Clone)]
pub struct TrackDelivery<S, J> {
    inner: S,
    judge: J,
}

impl<S, J> TrackDelivery<S, J> {
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

impl<S: fmt::Debug, J> fmt::Debug for TrackDelivery<S, J> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("TrackDelivery").field(&self.inner).finish()
    }
}

impl<S, J, Request> Service<Request> for TrackDelivery<S, J>
where
    S: Service<Request>,
    J: Judge<S::Error> + Clone,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = TrackDeliveryFuture<S::Future, J>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request) -> Self::Future {
        let exchange = Exchange::begin();
        TrackDeliveryFuture {
            inner: self.inner.call(request),
            exchange: Some(exchange),
            judge: self.judge.clone(),
        }
    }
}

pin_project! {
    /// The future of [`TrackDelivery`].
    #[must_use = "futures do nothing unless polled"]
    pub struct TrackDeliveryFuture<F, J> {
        #[pin]
        inner: F,
        exchange: Option<Exchange>,
        judge: J,
    }
}

impl<F, J> fmt::Debug for TrackDeliveryFuture<F, J> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TrackDeliveryFuture")
            .finish_non_exhaustive()
    }
}

impl<F, J, T, E> Future for TrackDeliveryFuture<F, J>
where
    F: Future<Output = Result<T, E>>,
    J: Judge<E>,
{
    type Output = Result<T, E>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let result = ready!(this.inner.poll(cx));
        if let (Err(error), Some(exchange)) = (&result, this.exchange.take()) {
            exchange.failed(this.judge.judge(error));
        }
        Poll::Ready(result)
    }
}

#[cfg(feature = "hyper-util")]
mod hyper_util;
#[cfg(feature = "hyper-util")]
pub use self::hyper_util::{HyperErrors, judge_hyper};

/// Whether a request that may have been acted upon may be sent again. No classifier can bypass this
/// gate.
///
/// It may if its method is idempotent (RFC 9110, section 9.2.2), if it carries an idempotency key,
/// or if its sender declares it safe.
pub(super) fn safe_to_send_again<B>(request: &http::Request<B>, is_keyed: bool) -> bool {
    is_keyed
        || is_idempotent(request.method())
        || request.extensions().get::<SafeToRetry>().is_some()
}

fn is_idempotent(method: &Method) -> bool {
    matches!(
        *method,
        Method::GET | Method::HEAD | Method::OPTIONS | Method::TRACE | Method::PUT | Method::DELETE
    )
}

#[cfg(test)]
mod tests {
    use http::Request;

    use super::*;
    use crate::layer::carries_key;
    use crate::protocol::IDEMPOTENCY_KEY;

    fn safe(request: http::request::Builder) -> bool {
        let request = request.body(()).unwrap();
        safe_to_send_again(&request, carries_key(request.headers(), &IDEMPOTENCY_KEY))
    }

    #[test]
    fn only_idempotent_methods_are_safe_by_themselves() {
        for method in ["GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE"] {
            assert!(safe(Request::builder().method(method)), "{method}");
        }
        for method in ["POST", "PATCH", "CONNECT", "LOCK", "get"] {
            assert!(!safe(Request::builder().method(method)), "{method}");
        }
    }

    #[test]
    fn a_key_or_the_senders_word_makes_any_method_safe() {
        assert!(safe(Request::post("/").header("idempotency-key", "k")));
        assert!(safe(Request::post("/").extension(SafeToRetry)));
        assert!(!safe(Request::post("/").header("idempotency-key", " ")));
        assert!(!safe(Request::post("/").header("x-other-key", "k")));
    }

    #[test]
    fn no_two_attempts_have_one_id_whatever_thread_they_are_made_on() {
        let ids = || {
            std::thread::spawn(|| [next_id(), next_id()])
                .join()
                .unwrap()
        };
        let all = [ids(), ids(), ids()];
        // One block serves a thread for long.
        assert!(all.iter().all(|[first, second]| first + 1 == *second));
        let mut all = all.concat();
        assert!(!all.contains(&0));
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), 6);
    }

    fn counted(n: u32) -> Tally {
        Tally {
            begun: n,
            never_sent: n,
            refused: n,
            permanent: n,
            attempts: 0,
        }
    }

    fn counts(tally: Tally) -> [u32; 4] {
        [
            tally.begun,
            tally.never_sent,
            tally.refused,
            tally.permanent,
        ]
    }

    #[test]
    fn what_was_counted_before_does_not_count_again() {
        assert_eq!(counts(counted(5).since(counted(2))), [3; 4]);
    }

    #[test]
    fn everything_counted_below_is_added_to_what_was_counted_above() {
        assert_eq!(counts(counted(5).plus(counted(3))), [8; 4]);
    }

    fn judged(within: impl FnOnce()) -> Failure {
        let mut track = Track::new();
        let entered = track.enter();
        within();
        drop(entered);
        track.failure(&mut false)
    }

    #[test]
    fn an_attempt_was_never_sent_only_if_that_is_proven_of_all_its_exchanges() {
        use Failure::{NeverSent, Permanent, Refused, Unknown};
        for (failures, expected) in [
            (&[][..], Unknown),
            (&[NeverSent], NeverSent),
            (&[NeverSent, NeverSent], NeverSent),
            (&[Unknown, NeverSent], Unknown),
            (&[NeverSent, Unknown], Unknown),
            (&[Permanent], Permanent),
            (&[Permanent, NeverSent], NeverSent),
            (&[Refused], Refused),
            (&[Refused, NeverSent], Refused),
            (&[Refused, Refused], Unknown),
            (&[Refused, Unknown], Unknown),
        ] {
            let judged = judged(|| {
                for failure in failures {
                    Exchange::begin().failed(*failure);
                }
            });
            assert_eq!(judged, expected, "{failures:?}");
        }
        // An exchange in progress or dropped may have been acted upon.
        assert_eq!(
            judged(|| {
                let _dropped = Exchange::begin();
                Exchange::begin().failed(NeverSent);
            }),
            Unknown
        );
    }

    #[test]
    fn a_refusal_is_believed_once_a_call() {
        let mut refused = false;
        for expected in [Failure::Refused, Failure::Unknown] {
            let mut track = Track::new();
            let entered = track.enter();
            Exchange::begin().failed(Failure::Refused);
            drop(entered);
            assert_eq!(track.failure(&mut refused), expected);
        }
    }

    #[test]
    fn an_exchange_proves_nothing_to_another_attempt() {
        let outside = Exchange::begin();
        assert_eq!(
            judged(|| {
                let _own = Exchange::begin();
                outside.failed(Failure::NeverSent);
            }),
            Failure::Unknown
        );
        let mut first = Track::new();
        let entered = first.enter();
        let exchange = Exchange::begin();
        drop(entered);
        assert_eq!(
            judged(|| {
                let _lost = Exchange::begin();
                exchange.failed(Failure::NeverSent);
            }),
            Failure::Unknown
        );
        assert_eq!(first.failure(&mut false), Failure::Unknown);
    }

    #[test]
    fn what_happens_in_an_attempt_below_happens_in_the_one_above() {
        for (second, expected) in [
            (Failure::NeverSent, Failure::NeverSent),
            (Failure::Unknown, Failure::Unknown),
        ] {
            let mut outer = Track::new();
            let entered = outer.enter();
            for failure in [Failure::NeverSent, second] {
                let mut inner = Track::new();
                // The call and the poll are two visits to one attempt.
                let visit = inner.enter();
                let exchange = Exchange::begin();
                drop(visit);
                let visit = inner.enter();
                exchange.failed(failure);
                drop(visit);
            }
            drop(entered);
            assert_eq!(outer.failure(&mut false), expected);
            assert_eq!(outer.attempts(), 2);
        }
    }
}
