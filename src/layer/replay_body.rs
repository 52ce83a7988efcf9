//! Bodies that can be sent again: those that clone, and any other up to a cap.

use std::error::Error as StdError;
use std::fmt;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use bytes::{Buf, Bytes};
use http::{HeaderMap, HeaderName, HeaderValue, Request};
use http_body::{Body, Frame, SizeHint};
use tower_layer::Layer;
use tower_service::Service;

use crate::protocol::BoxError;

/// A request body that can be copied for another attempt.
///
/// Every `Clone` body is one. [`ReplayBodyLayer`] makes one of a body that streams.
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot be sent again, as it does not clone",
    note = "a body that is at hand can be a `http_body_util::Full<Bytes>`",
    note = "for one that streams put a `ReplayBodyLayer` above the retry, so that it becomes a `ReplayBody`"
)]
pub trait Replay: Sized {
    /// Returns a copy that sends the same bytes from the start, or `None` if that is not possible,
    /// or no longer.
    fn replay(&self) -> Option<Self>;
}

impl<B: Clone> Replay for B {
    fn replay(&self) -> Option<Self> {
        Some(self.clone())
    }
}

/// Makes streaming request bodies replayable, up to a cap of 64 KiB by default.
///
/// Place it above [`RetryLayer`](super::RetryLayer); the client below receives [`ReplayBody`]. A
/// body longer than the cap is streamed to its end, and its request is not retried.
///
/// On HTTP/2, many simultaneous uploads that are answered early (503 before the body was read) may
/// end in broken pipes. The rest of their bodies is still being sent to streams that the server has
/// closed. Some servers, among them those on h2, then close the whole connection with `GOAWAY` and
/// `ENHANCE_YOUR_CALM`, because of too many small frames. What became of the connection's other
/// requests is unknown, so only those that are safe are sent again. Larger chunks help.
///
/// ```
/// use aegis_hitl::layer::{Backoff, ReplayBody, ReplayBodyLayer, RetryLayer};
/// use bytes::Bytes;
/// use http::{Request, Response};
/// use http_body_util::{BodyExt, Empty, Full, combinators::UnsyncBoxBody};
/// use tower::{ServiceBuilder, ServiceExt, service_fn};
///
/// // A body that does not clone.
/// type Streaming = UnsyncBoxBody<Bytes, std::convert::Infallible>;
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let flaky = tower::util::BoxCloneService::new(service_fn({
///     let seen = std::sync::Arc::new(std::sync::Mutex::new(0));
///     move |request: Request<ReplayBody<Streaming>>| {
///         let seen = seen.clone();
///         async move {
///             let body = request.into_body().collect().await.map_err(|_| "broken body")?;
///             assert_eq!(body.to_bytes(), "hello");
///             let mut seen = seen.lock().map_err(|_| "poisoned")?;
///             *seen += 1;
///             let status = if *seen == 1 { 503 } else { 200 };
///             let response = Response::builder().status(status);
///             Ok::<_, &str>(response.body(Empty::<Bytes>::new()).unwrap())
///         }
///     }
/// }));
/// let service = ServiceBuilder::new()
///     .layer(ReplayBodyLayer::new())
///     .layer(RetryLayer::new().backoff(Backoff::none()))
///     .service(flaky);
/// let request = Request::put("/").body(Full::from("hello").boxed_unsync())?;
/// assert_eq!(service.oneshot(request).await?.status(), 200);
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, Copy)]
pub struct ReplayBodyLayer {
    max_bytes: usize,
}

impl ReplayBodyLayer {
    /// Keeps up to 64 KiB of each body.
    pub fn new() -> Self {
        Self {
            max_bytes: 64 * 1024,
        }
    }

    /// Keeps up to `bytes` of each body.
    #[must_use]
    pub fn max_bytes(mut self, bytes: usize) -> Self {
        self.max_bytes = bytes;
        self
    }
}

impl Default for ReplayBodyLayer {
    fn default() -> Self {
        Self::new()
    }
}

impl<S> Layer<S> for ReplayBodyLayer {
    type Service = ReplayBodies<S>;

    fn layer(&self, inner: S) -> Self::Service {
        ReplayBodies {
            inner,
            max_bytes: self.max_bytes,
        }
    }
}

/// Makes request bodies replayable. Made by [`ReplayBodyLayer`].
#[derive(Debug, Clone)]
pub struct ReplayBodies<S> {
    inner: S,
    max_bytes: usize,
}

impl<S> ReplayBodies<S> {
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

impl<S, B> Service<Request<B>> for ReplayBodies<S>
where
    S: Service<Request<ReplayBody<B>>>,
    B: Body,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let (parts, body) = request.into_parts();
        let body = ReplayBody::new(body, self.max_bytes);
        self.inner.call(Request::from_parts(parts, body))
    }
}

/// A body that keeps what was sent of it, up to a cap, so that it can be sent again from the start.
///
/// A copy sends the whole body, byte for byte, or fails. Copies are numbered in the order in which
/// they are made. Reading one supersedes all earlier ones, which then end with an error, because
/// they would take bytes that the later one needs. A copy that is first read after the body has
/// passed the cap, or after its source has failed, also ends with an error.
pub struct ReplayBody<B> {
    shared: Arc<Mutex<Shared<B>>>,
    at: Position,
}

/// Which copy this is, and how much of it was sent.
#[derive(Debug)]
struct Position {
    /// The copy's number; the original is 0.
    number: u64,
    /// Bytes sent.
    sent: u64,
    /// Whether the trailers were sent.
    sent_trailers: bool,
}

impl Position {
    fn start(number: u64) -> Self {
        Self {
            number,
            sent: 0,
            sent_trailers: false,
        }
    }

    /// Whether everything read from the source was sent.
    fn is_level_with<B>(&self, shared: &Shared<B>) -> bool {
        self.sent == shared.read && self.sent_trailers == shared.read_trailers
    }

    /// Returns why the copy cannot be sent completely, if that is already known.
    fn fault<B>(&self, shared: &Shared<B>) -> Option<Fault> {
        if self.number < shared.reader {
            Some(Fault::Superseded)
        } else if matches!(shared.source, Source::Failed) {
            Some(Fault::FailedBefore)
        } else if shared.room.is_none() && !self.is_level_with(shared) {
            Some(Fault::TooLong)
        } else {
            None
        }
    }
}

/// The state that all copies share.
struct Shared<B> {
    source: Source<B>,
    /// What was read from the source so far. Empty once the body is too long to keep.
    kept: Vec<u8>,
    trailers: Option<HeaderMap>,
    /// How many more bytes may be kept. `None` once the body is too long or its source has failed.
    room: Option<usize>,
    /// Bytes read from the source.
    read: u64,
    /// Whether trailers were read from the source.
    read_trailers: bool,
    /// The length that the source announced at first.
    announced: SizeHint,
    /// How many copies exist, including the original.
    copies: u64,
    /// The latest copy that was read.
    reader: u64,
    /// The task that waits for the source.
    waker: Option<Waker>,
}

/// Trailers end a body. One that continues is not a valid HTTP body and could not be replayed as it
/// was.
const AFTER_TRAILERS: &str = "the body goes on after its trailers";

/// The first attempt trusts the announced length. A later one has seen the real end, so the two
/// would send different bodies.
const OTHER_LENGTH: &str = "the body is not as long as it says";

enum Source<B> {
    Open(Pin<Box<B>>),
    Ended,
    Failed,
}

impl<B: Body> ReplayBody<B> {
    /// Keeps up to `max_bytes` of `body`, including trailers.
    pub fn new(body: B, max_bytes: usize) -> Self {
        let announced = body.size_hint();
        let least = usize::try_from(announced.lower()).unwrap_or(usize::MAX);
        Self {
            shared: Arc::new(Mutex::new(Shared {
                source: Source::Open(Box::pin(body)),
                kept: Vec::new(),
                trailers: None,
                // A body that is known to be too long is not kept at all.
                room: (least <= max_bytes).then_some(max_bytes),
                read: 0,
                read_trailers: false,
                announced,
                copies: 1,
                reader: 0,
                waker: None,
            })),
            at: Position::start(0),
        }
    }
}

impl<B> ReplayBody<B> {
    fn lock(&self) -> MutexGuard<'_, Shared<B>> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// Not `Clone`: whether another copy is possible is only known when one is needed.
impl<B> Replay for ReplayBody<B> {
    fn replay(&self) -> Option<Self> {
        let mut shared = self.lock();
        shared.room?;
        let number = shared.copies;
        shared.copies += 1;
        Some(Self {
            shared: self.shared.clone(),
            at: Position::start(number),
        })
    }
}

impl<B> Shared<B> {
    /// Keeps a piece, if there is room. The bytes are copied, because a small slice may hold on to
    /// a large buffer.
    fn keep(&mut self, data: &[u8]) {
        let most = self.kept.len() + self.room.unwrap_or_default();
        if self.make_room(data.len()) {
            // Doubles like a vector, but never beyond the cap.
            let needed = self.kept.len() + data.len();
            if needed > self.kept.capacity() {
                let capacity = needed.max(most.min(self.kept.capacity() * 2));
                self.kept.reserve_exact(capacity - self.kept.len());
            }
            self.kept.extend_from_slice(data);
        }
    }

    /// Makes room, or stops keeping the body.
    fn make_room(&mut self, length: usize) -> bool {
        self.room = self.room.and_then(|room| room.checked_sub(length));
        if self.room.is_none() {
            self.kept = Vec::new();
            self.trailers = None;
        }
        self.room.is_some()
    }

    /// Ends the body with an error from its source. What was kept will never be the whole body.
    fn fail(&mut self, error: BoxError) -> ReplayBodyError {
        self.source = Source::Failed;
        self.room = None;
        self.kept = Vec::new();
        self.trailers = None;
        ReplayBodyError(Fault::Source(error))
    }
}

impl<B> Shared<B>
where
    B: Body<Error: Into<BoxError>>,
{
    /// Reads the source's next frame and keeps it if there is room.
    fn poll_source(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, ReplayBodyError>>> {
        let Source::Open(source) = &mut self.source else {
            return Poll::Ready(None);
        };
        let frame = match source.as_mut().poll_frame(cx) {
            Poll::Pending => {
                self.waker = Some(cx.waker().clone());
                return Poll::Pending;
            }
            Poll::Ready(None) if self.read < self.announced.lower() => {
                return Poll::Ready(Some(Err(self.fail(OTHER_LENGTH.into()))));
            }
            Poll::Ready(None) => {
                self.source = Source::Ended;
                return Poll::Ready(None);
            }
            Poll::Ready(Some(Err(error))) => {
                return Poll::Ready(Some(Err(self.fail(error.into()))));
            }
            Poll::Ready(Some(Ok(frame))) => frame,
        };
        Poll::Ready(Some(match frame.into_data() {
            Ok(mut data) => {
                let data = data.copy_to_bytes(data.remaining());
                // An empty frame passes through and takes no room: a body may have any number of
                // them.
                if self.read_trailers && !data.is_empty() {
                    return Poll::Ready(Some(Err(self.fail(AFTER_TRAILERS.into()))));
                }
                let read = self.read.saturating_add(data.len() as u64);
                if self.announced.upper().is_some_and(|most| read > most) {
                    return Poll::Ready(Some(Err(self.fail(OTHER_LENGTH.into()))));
                }
                if !data.is_empty() {
                    self.keep(&data);
                    self.read = read;
                }
                Ok(Frame::data(data))
            }
            Err(frame) => match frame.into_trailers() {
                Ok(_) if self.read_trailers => Err(self.fail(AFTER_TRAILERS.into())),
                Ok(trailers) => {
                    let length = |(name, value): (&HeaderName, &HeaderValue)| {
                        name.as_str().len() + value.len()
                    };
                    if self.make_room(trailers.iter().map(length).sum()) {
                        self.trailers = Some(trailers.clone());
                    }
                    self.read_trailers = true;
                    Ok(Frame::trailers(trailers))
                }
                // Leaving out what cannot be kept would send another body.
                Err(_) => Err(self.fail("the body has a frame of an unknown kind".into())),
            },
        }))
    }
}

impl<B> Body for ReplayBody<B>
where
    B: Body<Error: Into<BoxError>>,
{
    type Data = Bytes;
    type Error = ReplayBodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, ReplayBodyError>>> {
        let this = &mut *self;
        let mut shared = this.shared.lock().unwrap_or_else(PoisonError::into_inner);
        if this.at.number > shared.reader {
            shared.reader = this.at.number;
            // Tells an earlier, waiting copy that it is superseded. The lock is released first,
            // because the waker may poll at once.
            if let Some(earlier) = shared.waker.take() {
                drop(shared);
                earlier.wake();
                shared = this.shared.lock().unwrap_or_else(PoisonError::into_inner);
            }
        }
        let shared = &mut *shared;
        if let Some(fault) = this.at.fault(shared) {
            return Poll::Ready(Some(Err(ReplayBodyError(fault))));
        }
        if this.at.sent < shared.read {
            let from = usize::try_from(this.at.sent).unwrap_or(usize::MAX);
            let rest = shared.kept.get(from..).unwrap_or_default();
            this.at.sent = shared.read;
            return Poll::Ready(Some(Ok(Frame::data(Bytes::copy_from_slice(rest)))));
        }
        if let (false, Some(trailers)) = (this.at.sent_trailers, &shared.trailers) {
            this.at.sent_trailers = true;
            return Poll::Ready(Some(Ok(Frame::trailers(trailers.clone()))));
        }
        let frame = shared.poll_source(cx);
        this.at.sent = shared.read;
        this.at.sent_trailers = shared.read_trailers;
        frame
    }

    fn is_end_stream(&self) -> bool {
        let shared = self.lock();
        let ended = match &shared.source {
            Source::Open(source) => source.is_end_stream(),
            Source::Ended => true,
            Source::Failed => false,
        };
        // A copy that cannot be sent completely must be read to obtain its error.
        ended && self.at.fault(&shared).is_none() && self.at.is_level_with(&shared)
    }

    fn size_hint(&self) -> SizeHint {
        let shared = self.lock();
        let source = match &shared.source {
            _ if self.at.fault(&shared).is_some() => return SizeHint::default(),
            Source::Open(source) => source.size_hint(),
            Source::Ended | Source::Failed => SizeHint::with_exact(0),
        };
        let kept = shared.read - self.at.sent;
        let mut hint = SizeHint::new();
        if let Some(upper) = source.upper().and_then(|upper| upper.checked_add(kept)) {
            hint.set_upper(upper);
        }
        hint.set_lower(
            source
                .lower()
                .saturating_add(kept)
                .min(hint.upper().unwrap_or(u64::MAX)),
        );
        hint
    }
}

impl<B> fmt::Debug for ReplayBody<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReplayBody")
            .field("at", &self.at)
            .finish_non_exhaustive()
    }
}

/// Why a [`ReplayBody`] ended early.
#[derive(Debug)]
pub struct ReplayBodyError(Fault);

#[derive(Debug)]
enum Fault {
    Source(BoxError),
    FailedBefore,
    TooLong,
    Superseded,
}

impl ReplayBodyError {
    /// Whether a later attempt took over.
    pub fn is_superseded(&self) -> bool {
        matches!(self.0, Fault::Superseded)
    }

    /// Whether the body turned out to be longer than the cap, so this attempt cannot send it from
    /// the start.
    pub fn is_too_long(&self) -> bool {
        matches!(self.0, Fault::TooLong)
    }

    /// Returns the source's own error, or `None` if the body failed for another reason or in an
    /// earlier attempt.
    pub fn into_inner(self) -> Option<BoxError> {
        match self.0 {
            Fault::Source(error) => Some(error),
            Fault::FailedBefore | Fault::TooLong | Fault::Superseded => None,
        }
    }
}

impl fmt::Display for ReplayBodyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            Fault::Source(_) => "the request body failed",
            Fault::FailedBefore => "the request body failed before",
            Fault::TooLong => "the request body is longer than what is kept for a replay",
            Fault::Superseded => "a later attempt sends this body",
        })
    }
}

impl StdError for ReplayBodyError {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        match &self.0 {
            Fault::Source(error) => Some(&**error),
            Fault::FailedBefore | Fault::TooLong | Fault::Superseded => None,
        }
    }
}

#[cfg(test)]
mod tests;
