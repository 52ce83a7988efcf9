//! Bodies that can be sent again: those that clone, and any other within a cap.

use std::error::Error as StdError;
use std::fmt;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use bytes::{Buf, Bytes};
use http::{HeaderMap, Request};
use http_body::{Body, Frame, SizeHint};
use tower_layer::Layer;
use tower_service::Service;

/// A request body of which another copy can be sent.
///
/// Every `Clone` body is one. A body that streams becomes one by [`ReplayBodyLayer`].
pub trait Replay: Sized {
    /// Returns a copy that sends the same bytes from the start, or `None` if there can be none (any more).
    fn replay(&self) -> Option<Self>;
}

impl<B: Clone> Replay for B {
    fn replay(&self) -> Option<Self> {
        Some(self.clone())
    }
}

/// Makes streaming request bodies replayable, up to a cap: 64 KiB by default.
///
/// It stands above [`RetryLayer`](super::RetryLayer), and the client below takes [`ReplayBody`]. A body that turns out longer
/// than the cap is streamed on to its end, and its request is not retried.
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
///             Ok::<_, &str>(Response::builder().status(status).body(Empty::<Bytes>::new()).unwrap())
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

/// Makes request bodies replayable; made by [`ReplayBodyLayer`].
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
/// Only the latest copy reads on from the source. An earlier one that is still being sent then ends with an error, as it would
/// otherwise take bytes that the later one needs.
pub struct ReplayBody<B> {
    shared: Arc<Mutex<Shared<B>>>,
    /// Which copy this is; `None` until it is first read.
    copy: Option<u64>,
    /// How many of the kept frames this copy has sent.
    sent: usize,
}

/// What reading a frame brings.
type Read<B> = Result<Frame<Bytes>, ReplayBodyError<<B as Body>::Error>>;

struct Shared<B> {
    /// `None` once it has ended or failed.
    source: Option<Pin<Box<B>>>,
    kept: Vec<Kept>,
    /// How many more bytes may be kept; `None` once there were too many, and nothing is kept.
    room: Option<usize>,
    /// Which copy reads from the source.
    reader: u64,
    /// Who waits for the source.
    waker: Option<Waker>,
}

#[derive(Clone)]
enum Kept {
    Data(Bytes),
    Trailers(HeaderMap),
}

impl<B: Body> ReplayBody<B> {
    /// Keeps up to `max_bytes` of `body`.
    pub fn new(body: B, max_bytes: usize) -> Self {
        let least = usize::try_from(body.size_hint().lower()).unwrap_or(usize::MAX);
        Self {
            shared: Arc::new(Mutex::new(Shared {
                source: Some(Box::pin(body)),
                kept: Vec::new(),
                // A body that is known to be too long is not kept at all.
                room: (least <= max_bytes).then_some(max_bytes),
                reader: 0,
                waker: None,
            })),
            copy: None,
            sent: 0,
        }
    }
}

impl<B> ReplayBody<B> {
    fn lock(&self) -> MutexGuard<'_, Shared<B>> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// Not `Clone`: whether there can be another copy is only known when it is asked for.
impl<B> Replay for ReplayBody<B> {
    fn replay(&self) -> Option<Self> {
        self.lock().room?;
        Some(Self {
            shared: self.shared.clone(),
            copy: None,
            sent: 0,
        })
    }
}

impl<B: Body> Shared<B> {
    /// Makes room for a frame, or gives up keeping.
    fn keep(&mut self, frame: Kept) {
        let length = match &frame {
            Kept::Data(data) => data.len(),
            Kept::Trailers(_) => 0,
        };
        self.room = self.room.and_then(|room| room.checked_sub(length));
        match self.room {
            Some(_) => self.kept.push(frame),
            None => self.kept = Vec::new(),
        }
    }

    fn poll_source(&mut self, cx: &mut Context<'_>) -> Poll<Option<Read<B>>> {
        let Some(source) = &mut self.source else {
            return Poll::Ready(None);
        };
        let frame = match source.as_mut().poll_frame(cx) {
            Poll::Pending => {
                self.waker = Some(cx.waker().clone());
                return Poll::Pending;
            }
            Poll::Ready(None) => {
                self.source = None;
                return Poll::Ready(None);
            }
            Poll::Ready(Some(Err(error))) => {
                // What was kept is not the whole body, and never will be.
                self.source = None;
                self.room = None;
                self.kept = Vec::new();
                return Poll::Ready(Some(Err(ReplayBodyError(Fault::Source(error)))));
            }
            Poll::Ready(Some(Ok(frame))) => frame,
        };
        let frame = match frame.into_data() {
            Ok(mut data) => Kept::Data(data.copy_to_bytes(data.remaining())),
            Err(frame) => match frame.into_trailers() {
                Ok(trailers) => Kept::Trailers(trailers),
                // There are no other frames.
                Err(_) => return Poll::Ready(None),
            },
        };
        self.keep(frame.clone());
        Poll::Ready(Some(Ok(frame.into())))
    }
}

impl From<Kept> for Frame<Bytes> {
    fn from(kept: Kept) -> Self {
        match kept {
            Kept::Data(data) => Frame::data(data),
            Kept::Trailers(trailers) => Frame::trailers(trailers),
        }
    }
}

impl<B: Body> Body for ReplayBody<B> {
    type Data = Bytes;
    type Error = ReplayBodyError<B::Error>;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let this = &mut *self;
        let mut shared = this.shared.lock().unwrap_or_else(PoisonError::into_inner);
        let copy = *this.copy.get_or_insert_with(|| {
            shared.reader += 1;
            if let Some(earlier) = shared.waker.take() {
                earlier.wake();
            }
            shared.reader
        });
        if copy != shared.reader {
            return Poll::Ready(Some(Err(ReplayBodyError(Fault::Superseded))));
        }
        if let Some(kept) = shared.kept.get(this.sent) {
            this.sent += 1;
            return Poll::Ready(Some(Ok(kept.clone().into())));
        }
        let frame = shared.poll_source(cx);
        this.sent = shared.kept.len();
        frame
    }

    fn is_end_stream(&self) -> bool {
        let shared = self.lock();
        let ended = shared
            .source
            .as_ref()
            .is_none_or(|source| source.is_end_stream());
        // A copy of a body that was not kept to its end has no end to speak of.
        ended && self.sent >= shared.kept.len() && (shared.room.is_some() || self.copy.is_some())
    }

    fn size_hint(&self) -> SizeHint {
        let shared = self.lock();
        let kept = shared.kept.iter().skip(self.sent).map(|kept| match kept {
            Kept::Data(data) => data.len() as u64,
            Kept::Trailers(_) => 0,
        });
        let kept: u64 = kept.sum();
        let source = match &shared.source {
            Some(source) => source.size_hint(),
            None => SizeHint::with_exact(0),
        };
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
            .field("copy", &self.copy)
            .finish_non_exhaustive()
    }
}

/// Why a [`ReplayBody`] ended early.
#[derive(Debug)]
pub struct ReplayBodyError<E>(Fault<E>);

#[derive(Debug)]
enum Fault<E> {
    Source(E),
    Superseded,
}

impl<E> ReplayBodyError<E> {
    /// Whether a later attempt took over.
    pub fn is_superseded(&self) -> bool {
        matches!(self.0, Fault::Superseded)
    }

    /// Returns the source's own error, or `None` if a later attempt took over.
    pub fn into_inner(self) -> Option<E> {
        match self.0 {
            Fault::Source(error) => Some(error),
            Fault::Superseded => None,
        }
    }
}

impl<E> fmt::Display for ReplayBodyError<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            Fault::Source(_) => "the request body failed",
            Fault::Superseded => "a later attempt sends this body",
        })
    }
}

impl<E: StdError + 'static> StdError for ReplayBodyError<E> {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        match &self.0 {
            Fault::Source(error) => Some(error),
            Fault::Superseded => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::convert::Infallible;

    use http_body_util::BodyExt;
    use tokio::sync::mpsc;

    use super::*;

    /// A body of chunks that come when they are sent, and does not clone.
    struct Chunks {
        chunks: mpsc::UnboundedReceiver<Result<Frame<Bytes>, &'static str>>,
        length: Option<u64>,
    }

    impl Body for Chunks {
        type Data = Bytes;
        type Error = &'static str;
        fn poll_frame(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, &'static str>>> {
            self.chunks.poll_recv(cx)
        }
        fn size_hint(&self) -> SizeHint {
            self.length.map_or_else(SizeHint::new, SizeHint::with_exact)
        }
    }

    type Sender = mpsc::UnboundedSender<Result<Frame<Bytes>, &'static str>>;

    fn body(max_bytes: usize) -> (Sender, ReplayBody<Chunks>) {
        let (sender, chunks) = mpsc::unbounded_channel();
        (
            sender,
            ReplayBody::new(
                Chunks {
                    chunks,
                    length: None,
                },
                max_bytes,
            ),
        )
    }

    fn data(text: &'static str) -> Result<Frame<Bytes>, &'static str> {
        Ok(Frame::data(Bytes::from_static(text.as_bytes())))
    }

    async fn read(body: ReplayBody<Chunks>) -> (Bytes, Option<HeaderMap>) {
        let collected = body.collect().await.unwrap();
        let trailers = collected.trailers().cloned();
        (collected.to_bytes(), trailers)
    }

    #[tokio::test]
    async fn every_copy_sends_the_same_bytes_and_trailers() {
        let (sender, body) = body(100);
        let mut trailers = HeaderMap::new();
        trailers.insert("checksum", http::HeaderValue::from_static("1"));
        sender.send(data("hel")).unwrap();
        sender.send(data("lo")).unwrap();
        sender.send(Ok(Frame::trailers(trailers.clone()))).unwrap();
        drop(sender);
        let (one, two) = (body.replay().unwrap(), body.replay().unwrap());
        for body in [body, one, two] {
            let again = body.replay();
            assert_eq!(
                read(body).await,
                (Bytes::from("hello"), Some(trailers.clone()))
            );
            assert!(again.is_some());
        }
    }

    #[tokio::test]
    async fn a_copy_taken_before_any_data_doubles_no_bytes() {
        // linkerd2#15649: a retry before the first DATA frame doubled the body.
        let (sender, mut first) = body(100);
        let template = first.replay().unwrap();
        let early = futures_poll(&mut first).await;
        assert!(early.is_pending());
        let second = template.replay().unwrap();
        sender.send(data("abc")).unwrap();
        drop(sender);
        assert_eq!(read(second).await.0, "abc");
        assert_eq!(read(template.replay().unwrap()).await.0, "abc");
    }

    async fn futures_poll(
        body: &mut ReplayBody<Chunks>,
    ) -> Poll<Option<Result<Frame<Bytes>, ReplayBodyError<&'static str>>>> {
        std::future::poll_fn(|cx| Poll::Ready(Pin::new(&mut *body).poll_frame(cx))).await
    }

    #[tokio::test]
    async fn a_retry_in_the_middle_goes_on_where_the_first_attempt_stopped() {
        let (sender, mut first) = body(100);
        let template = first.replay().unwrap();
        sender.send(data("one,")).unwrap();
        first.frame().await.unwrap().unwrap();
        drop(first);
        sender.send(data("two")).unwrap();
        drop(sender);
        assert_eq!(read(template.replay().unwrap()).await.0, "one,two");
    }

    #[tokio::test]
    async fn an_attempt_that_still_sends_is_ended_by_a_later_one() {
        let (sender, mut first) = body(100);
        let template = first.replay().unwrap();
        sender.send(data("one,")).unwrap();
        first.frame().await.unwrap().unwrap();
        // The first attempt now waits for more, in the client's own task.
        let waiting = tokio::spawn(async move { first.frame().await });
        tokio::task::yield_now().await;
        let mut second = template.replay().unwrap();
        second.frame().await.unwrap().unwrap();
        assert!(waiting.await.unwrap().unwrap().unwrap_err().is_superseded());
        sender.send(data("two")).unwrap();
        drop(sender);
        assert_eq!(second.collect().await.unwrap().to_bytes(), "two");
    }

    #[tokio::test]
    async fn past_the_cap_the_attempt_goes_on_and_there_is_no_copy() {
        let (sender, first) = body(5);
        let template = first.replay().unwrap();
        for chunk in ["123", "45", "6", "789"] {
            sender.send(data(chunk)).unwrap();
        }
        drop(sender);
        assert_eq!(read(first).await.0, "123456789");
        assert!(template.replay().is_none());
    }

    #[tokio::test]
    async fn up_to_the_cap_there_is_a_copy() {
        let (sender, first) = body(5);
        let template = first.replay().unwrap();
        sender.send(data("123")).unwrap();
        sender.send(data("45")).unwrap();
        drop(sender);
        assert_eq!(read(first).await.0, "12345");
        assert_eq!(read(template.replay().unwrap()).await.0, "12345");
    }

    #[tokio::test]
    async fn a_body_known_to_be_too_long_is_not_kept() {
        let (_sender, chunks) = mpsc::unbounded_channel();
        let body = ReplayBody::new(
            Chunks {
                chunks,
                length: Some(6),
            },
            5,
        );
        assert!(body.replay().is_none());
    }

    #[tokio::test]
    async fn a_body_that_failed_is_not_sent_again() {
        let (sender, first) = body(100);
        let template = first.replay().unwrap();
        sender.send(data("one")).unwrap();
        sender.send(Err("disk")).unwrap();
        let error = first.collect().await.unwrap_err();
        assert!(!error.is_superseded());
        assert_eq!(error.to_string(), "the request body failed");
        assert_eq!(error.into_inner(), Some("disk"));
        assert!(template.replay().is_none());
    }

    #[test]
    fn an_error_of_the_source_is_kept_as_the_source() {
        let error = ReplayBodyError(Fault::Source(std::io::Error::other("disk")));
        assert_eq!(error.source().unwrap().to_string(), "disk");
        let error = ReplayBodyError::<std::io::Error>(Fault::Superseded);
        assert!(error.source().is_none() && error.is_superseded());
    }

    #[tokio::test]
    async fn size_and_end_are_known_as_far_as_the_source_knows_them() {
        let whole = ReplayBody::new(http_body_util::Full::<Bytes>::from("hello"), 100);
        let template = whole.replay().unwrap();
        assert_eq!(whole.size_hint().exact(), Some(5));
        assert_eq!(whole.collect().await.unwrap().to_bytes(), "hello");
        let again = template.replay().unwrap();
        assert_eq!(again.size_hint().exact(), Some(5));
        assert!(!again.is_end_stream());
        let empty = ReplayBody::new(http_body_util::Empty::<Bytes>::new(), 100);
        assert!(empty.is_end_stream());
        assert_eq!(empty.size_hint().exact(), Some(0));
        let (_sender, unknown) = body(100);
        assert_eq!(
            (unknown.size_hint().lower(), unknown.size_hint().upper()),
            (0, None)
        );
    }

    #[tokio::test]
    async fn data_that_is_not_bytes_is_kept_too() {
        struct Deque(Option<VecDeque<u8>>);
        impl Body for Deque {
            type Data = VecDeque<u8>;
            type Error = Infallible;
            fn poll_frame(
                mut self: Pin<&mut Self>,
                _: &mut Context<'_>,
            ) -> Poll<Option<Result<Frame<VecDeque<u8>>, Infallible>>> {
                Poll::Ready(self.0.take().map(|data| Ok(Frame::data(data))))
            }
        }
        let body = ReplayBody::new(Deque(Some(VecDeque::from(*b"abc"))), 100);
        let again = body.replay().unwrap();
        assert_eq!(body.collect().await.unwrap().to_bytes(), "abc");
        assert_eq!(again.collect().await.unwrap().to_bytes(), "abc");
    }
}
