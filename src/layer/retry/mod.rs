//! Sends again what is safe to send again.
//!
//! Two questions are separate. *Is it safe?* is answered in one place that nothing overrides: the
//! attempt was never sent, or the method is idempotent, or the request carries an idempotency key,
//! or its sender declares it safe ([`SafeToRetry`]). *Is it worth it?* is the classifier's decision
//! ([`Classify`]). Besides, there must be attempts, time and budget left, and a body that can be
//! sent again.

mod backoff;
mod budget;
mod call;
mod classify;
mod drain;
mod error;
mod event;
mod future;
mod kept;
mod timer;

use std::error::Error as StdError;
use std::fmt;
use std::mem;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use http::{HeaderName, Request, Response};
use http_body::Body;
use tower_layer::Layer;
use tower_service::Service;

use self::call::Call;
use self::kept::{Kept, KeptHeaders};
use crate::layer::Replay;
use crate::layer::delivery::Delivery;
use crate::layer::envelope::Envelope;
use crate::protocol::IDEMPOTENCY_KEY;

pub(super) use self::classify::retry_after;

pub(crate) use self::backoff::Random;

pub use self::backoff::Backoff;
pub use self::budget::Budget;
pub use self::classify::{Attempt, AttemptOutcome, Classify, ClassifyGrpc, Standard, Verdict};
pub use self::error::{Attempts, NotRetried, RetryError};
pub use self::event::AttemptEvent;
pub use self::future::RetryFuture;

/// In a request's extensions: declares that the request may be sent again although it is neither
/// idempotent nor keyed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(clippy::exhaustive_structs)]
pub struct SafeToRetry;

/// In a request's extensions: the maximum number of retries for this call, instead of the layer's.
/// 0 means none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(clippy::exhaustive_structs)]
pub struct MaxRetries(pub u32);

/// In a request's extensions: the time limit for this call as a whole, instead of the layer's
/// deadline. `None` means no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(clippy::exhaustive_structs)]
pub struct Deadline(pub Option<Duration>);

/// In a request's extensions: the time limit for each attempt of this call, instead of the layer's.
/// `None` means no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(clippy::exhaustive_structs)]
pub struct AttemptTimeout(pub Option<Duration>);

/// Sends a request again when that is safe and worth it.
///
/// The defaults are the Python SDK's: 3 retries after 0.5, 1 and 2 seconds (here with up to a
/// quarter of jitter on top), 10 seconds for each attempt, no deadline for the whole call. Each
/// service has a [`Budget`].
///
/// Only the HTTP client knows whether an attempt was never sent, and
/// [`TrackDeliveryLayer`](crate::layer::TrackDeliveryLayer) reports it. Without that layer, every
/// error counts as *may have been acted upon*.
///
/// When it gives up, it returns the last response or error unchanged. A response carries
/// [`Attempts`] and [`NotRetried`]. An error is a [`RetryError`] with attempts, [`Delivery`], key
/// and request id.
///
/// A response that is given up for a retry is drained within limits on bytes and time
/// ([`drain`](Self::drain)), so that its connection can be reused. The inner service is polled
/// ready before every attempt.
///
/// # Panics
///
/// A call panics if it has to wait outside of a tokio runtime with time enabled.
///
/// ```
/// use std::sync::atomic::{AtomicU32, Ordering};
/// use std::sync::Arc;
///
/// use aegis_hitl::layer::{Attempts, Backoff, RetryLayer};
/// use bytes::Bytes;
/// use http::{Request, Response};
/// use http_body_util::Full;
/// use tower::{Layer, ServiceExt, service_fn};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let seen = Arc::new(AtomicU32::new(0));
/// let counter = seen.clone();
/// // Answers 503 once, then 200.
/// let flaky = service_fn(move |_: Request<Full<Bytes>>| {
///     let status = if counter.fetch_add(1, Ordering::SeqCst) == 0 { 503 } else { 200 };
///     async move { Response::builder().status(status).body(Full::<Bytes>::default()) }
/// });
/// let service = RetryLayer::new().backoff(Backoff::none()).layer(flaky);
///
/// let keyed = Request::post("/").header("idempotency-key", "k-1").body(Full::default())?;
/// let response = service.clone().oneshot(keyed).await?;
/// assert_eq!((response.status().as_u16(), Attempts::of(&response)), (200, 2));
///
/// // Without a key, a POST that may have been acted upon is not sent again.
/// seen.store(0, Ordering::SeqCst);
/// let plain = Request::post("/").body(Full::default())?;
/// assert_eq!(service.oneshot(plain).await?.status(), 503);
/// assert_eq!(seen.load(Ordering::SeqCst), 1);
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct RetryLayer {
    policy: Policy,
}

type Observer = Arc<dyn Fn(&AttemptEvent<'_>) + Send + Sync>;

#[derive(Clone)]
struct Policy {
    max_retries: u32,
    attempt_timeout: Option<Duration>,
    deadline: Option<Duration>,
    backoff: Backoff,
    max_retry_after: Duration,
    budget: Option<Budget>,
    /// Whether each service gets its own budget.
    has_standard_budget: bool,
    /// `None` is [`Standard`], without the indirection.
    classify: Option<Arc<dyn Classify>>,
    key_header: HeaderName,
    attempt_header: Option<HeaderName>,
    observer: Option<Observer>,
    drain_bytes: usize,
    drain_time: Duration,
    random: Random,
    /// The layers around the retry, which it runs itself within
    /// [`AegisLayer`](crate::layer::AegisLayer).
    envelope: Option<Envelope>,
}

impl RetryLayer {
    /// Makes a layer with the defaults.
    pub fn new() -> Self {
        Self {
            policy: Policy {
                max_retries: 3,
                attempt_timeout: Some(Duration::from_secs(10)),
                deadline: None,
                backoff: Backoff::default(),
                max_retry_after: Duration::from_secs(30),
                budget: None,
                has_standard_budget: true,
                classify: None,
                key_header: IDEMPOTENCY_KEY,
                attempt_header: None,
                observer: None,
                drain_bytes: 64 * 1024,
                drain_time: Duration::from_millis(250),
                random: Random::new(),
                envelope: None,
            },
        }
    }

    /// Sets the maximum number of retries per call; 0 switches them off. The default is 3.
    #[must_use]
    pub fn max_retries(mut self, retries: u32) -> Self {
        self.policy.max_retries = retries;
        self
    }

    /// Sets the time limit for one attempt, until its response head arrives; `None` means no limit.
    /// The default is 10 seconds.
    ///
    /// An attempt that times out may have been acted upon, so it is retried only if that is safe.
    #[must_use]
    pub fn attempt_timeout(mut self, timeout: impl Into<Option<Duration>>) -> Self {
        self.policy.attempt_timeout = timeout.into();
        self
    }

    /// Sets the time limit for a call as a whole, including waits. `None`, the default, means no
    /// limit.
    ///
    /// If the wait before a retry would pass the deadline, the last outcome is returned at once.
    #[must_use]
    pub fn deadline(mut self, deadline: impl Into<Option<Duration>>) -> Self {
        self.policy.deadline = deadline.into();
        self
    }

    /// Sets the waits before retries.
    #[must_use]
    pub fn backoff(mut self, backoff: Backoff) -> Self {
        self.policy.backoff = backoff;
        self
    }

    /// Sets the longest `Retry-After` to wait for. The default is 30 seconds.
    ///
    /// `Retry-After` is a floor under the backoff. If a service requests a longer wait, it is not
    /// retried early: the call ends with its answer.
    #[must_use]
    pub fn max_retry_after(mut self, longest: Duration) -> Self {
        self.policy.max_retry_after = longest;
        self
    }

    /// Limits the retries of all calls together. `None` removes the limit.
    ///
    /// By default each service has its own [`Budget::default`], shared by its clones, so that an
    /// outage does not multiply the load.
    #[must_use]
    pub fn budget(mut self, budget: impl Into<Option<Budget>>) -> Self {
        self.policy.budget = budget.into();
        self.policy.has_standard_budget = false;
        self
    }

    /// Sets which outcomes are worth a retry. The default is [`Standard`]. A classifier cannot make
    /// an unsafe retry safe.
    #[must_use]
    pub fn classify<C>(mut self, classify: C) -> Self
    where
        C: Classify + 'static,
    {
        self.policy.classify = Some(Arc::new(classify));
        self
    }

    /// Expects the idempotency key in another header than `Idempotency-Key`.
    #[must_use]
    pub fn idempotency_header(mut self, name: HeaderName) -> Self {
        self.policy.key_header = name;
        self
    }

    /// Sends the number of each attempt in this header, starting with 1. By default all attempts
    /// are byte-identical.
    ///
    /// A header of this name set by the caller is replaced. The header that carries the key is left
    /// alone, because all attempts have to carry the same key.
    #[must_use]
    pub fn attempt_header(mut self, name: HeaderName) -> Self {
        self.policy.attempt_header = Some(name);
        self
    }

    /// Calls `observer` at the end of every attempt, before the wait that may follow. For metrics
    /// and logs.
    ///
    /// With the feature `tracing`, the same is emitted as events with the target
    /// `aegis_hitl::retry`. Attempts followed by another one, and last ones that failed, have the
    /// level debug; others have the level trace.
    ///
    /// ```
    /// use aegis_hitl::layer::{AttemptEvent, RetryLayer};
    /// use std::sync::Arc;
    /// use std::sync::atomic::{AtomicU32, Ordering};
    ///
    /// let retries = Arc::new(AtomicU32::new(0));
    /// let counter = retries.clone();
    /// let layer = RetryLayer::new().observe(move |event: &AttemptEvent<'_>| {
    ///     if event.retry_in.is_some() {
    ///         counter.fetch_add(1, Ordering::Relaxed);
    ///     }
    /// });
    /// ```
    #[must_use]
    pub fn observe<F>(mut self, observer: F) -> Self
    where
        F: Fn(&AttemptEvent<'_>) + Send + Sync + 'static,
    {
        self.policy.observer = Some(Arc::new(observer));
        self
    }

    /// Sets the limits for draining a response before a retry. The defaults are 64 KiB and 250
    /// milliseconds.
    ///
    /// The time runs in parallel with the backoff. A response that has not ended by then is
    /// dropped, which closes its connection on HTTP/1.
    #[must_use]
    pub fn drain(mut self, bytes: usize, time: Duration) -> Self {
        self.policy.drain_bytes = bytes;
        self.policy.drain_time = time;
        self
    }

    /// Names each attempt and confirms the answer, as if the envelope's layers stood around the
    /// retry.
    pub(super) fn within(&self, envelope: Envelope) -> Self {
        let mut layer = self.clone();
        layer.policy.envelope = Some(envelope);
        layer
    }

    /// Returns the header that carries the key.
    pub(super) fn key_header(&self) -> &HeaderName {
        &self.policy.key_header
    }

    /// Seeds the jitter, so that the same calls wait the same times. For tests.
    #[must_use]
    pub fn seed(mut self, seed: u64) -> Self {
        self.policy.random = Random::seeded(seed);
        self
    }
}

impl Default for RetryLayer {
    fn default() -> Self {
        Self::new()
    }
}

impl Policy {
    fn classify(&self, attempt: &Attempt<'_>) -> Verdict {
        match &self.classify {
            Some(classify) => classify.classify(attempt),
            None => Standard.classify(attempt),
        }
    }
}

impl fmt::Debug for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Policy")
            .field("max_retries", &self.max_retries)
            .field("attempt_timeout", &self.attempt_timeout)
            .field("deadline", &self.deadline)
            .field("backoff", &self.backoff)
            .field("max_retry_after", &self.max_retry_after)
            .field("budget", &self.budget)
            .field("key_header", &self.key_header)
            .finish_non_exhaustive()
    }
}

impl<S> Layer<S> for RetryLayer {
    type Service = Retry<S>;

    fn layer(&self, inner: S) -> Self::Service {
        let mut policy = self.policy.clone();
        if policy.has_standard_budget {
            policy.budget = Some(Budget::default());
        }
        Retry {
            inner,
            policy: Arc::new(policy),
        }
    }
}

/// Retries calls. Made by [`RetryLayer`].
#[derive(Debug, Clone)]
pub struct Retry<S> {
    inner: S,
    policy: Arc<Policy>,
}

impl<S> Retry<S> {
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

impl<S, B, R> Service<Request<B>> for Retry<S>
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
        self.inner
            .poll_ready(cx)
            .map_err(|error| RetryError::not_ready(error.into()))
    }

    #[inline]
    fn call(&mut self, mut request: Request<B>) -> Self::Future {
        let mut call = Call::new(self.policy.clone(), request.extensions());
        if let Some(budget) = &self.policy.budget {
            budget.deposit();
        }
        let kept = Kept::of(&request, call.max_retries > 0);
        let mut headers = KeptHeaders::default();
        call.begin(&mut request, &mut headers);
        if !kept.is_replayable() {
            let attempt = {
                let _scope = call.track.enter();
                self.inner.call(request)
            };
            return RetryFuture::new(call, attempt, None, kept, headers);
        }
        // The instance that was polled ready must be the one called. It moves into the future for
        // later attempts; the clone that stays behind has to be polled ready again.
        let clone = self.inner.clone();
        let mut service = mem::replace(&mut self.inner, clone);
        let attempt = {
            let _scope = call.track.enter();
            service.call(request)
        };
        RetryFuture::new(call, attempt, Some(service), kept, headers)
    }
}

#[cfg(test)]
mod adversary;
#[cfg(test)]
mod properties;
#[cfg(test)]
mod tests;
