//! What every attempt has in common. Each answer is read to its end within its attempt, so that
//! timeout, deadline and retries cover the body too.

use std::convert::Infallible;
use std::error::Error as StdError;
use std::fmt;
use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use http::header::{ACCEPT, ACCEPT_ENCODING, CONTENT_LENGTH, RETRY_AFTER, USER_AGENT};
use http::response::Parts;
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode};
use http_body::{Body, Frame};
use http_body_util::Full;
use pin_project_lite::pin_project;
use tokio::time::Sleep;
use tower_service::Service;

use super::endpoints::Endpoints;
use crate::layer::{AttemptTimeout, Deadline};
use crate::protocol::BoxError;

/// The maximum number of bytes read from an answer.
const MAX_ANSWER: usize = 1024 * 1024;

/// The same for an answer that another attempt will probably follow. Its status says nearly
/// everything.
const MAX_FAILURE: usize = 64 * 1024;

/// The time limit for the body of such an answer.
const FAILURE_PATIENCE: Duration = Duration::from_millis(250);

/// The longest time for the body of a 202. It only adds an action to what the head says.
const ACCEPTED_PATIENCE: Duration = Duration::from_secs(1);

/// The HTTP service under the layers, with answers read to their end.
///
/// It also writes the headers that are the same in all requests. Above the retry, each of them
/// would be copied for another attempt.
#[derive(Clone)]
pub(super) struct ReadAnswers<S> {
    inner: S,
    endpoints: Arc<Endpoints>,
}

impl<S> ReadAnswers<S> {
    /// Reads the answers of `inner`. The limits of `endpoints` are for calls whose request names
    /// none.
    pub(super) fn new(inner: S, endpoints: Arc<Endpoints>) -> Self {
        Self { inner, endpoints }
    }

    pub(super) fn get_ref(&self) -> &S {
        &self.inner
    }

    pub(super) fn into_inner(self) -> S {
        self.inner
    }
}

impl<S, R> Service<Request<Full<Bytes>>> for ReadAnswers<S>
where
    S: Service<Request<Full<Bytes>>, Response = Response<R>>,
    S::Error: Into<BoxError>,
    R: Body,
    R::Error: Into<BoxError>,
{
    type Response = Response<AnswerBody>;
    type Error = BoxError;
    type Future = ReadAnswer<S::Future, R>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, mut request: Request<Full<Bytes>>) -> Self::Future {
        let headers = request.headers_mut();
        headers.insert(ACCEPT, HeaderValue::from_static("application/json"));
        // No content coding, because what an answer confirms is in its body.
        headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        headers.insert(USER_AGENT, self.endpoints.user_agent.clone());
        let extensions = request.extensions();
        let timeout = extensions
            .get::<AttemptTimeout>()
            .map_or(Some(self.endpoints.timeout), |timeout| timeout.0)
            .unwrap_or(Duration::MAX);
        let deadline = extensions
            .get::<Deadline>()
            .map_or(self.endpoints.deadline, |deadline| deadline.0);
        // A quarter, so that a 202 with a dripping body becomes a receipt before the attempt or the
        // call ends.
        let whole = deadline.map_or(timeout, |deadline| deadline.min(timeout));
        ReadAnswer {
            state: State::Head {
                head: self.inner.call(request),
            },
            patience: (whole / 4).min(ACCEPTED_PATIENCE),
        }
    }
}

/// The body of an answer, already read.
#[derive(Debug)]
pub(super) struct AnswerBody {
    pub(super) read: Bytes,
    pub(super) end: End,
}

/// How reading a body ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    Whole,
    /// More may have been sent, but not in time.
    Late,
    /// It broke off, and the head alone says enough.
    BrokenOff,
    TooLong,
}

/// For the retry, which drains what it gives up. There is nothing left to read.
impl Body for AnswerBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Poll::Ready(None)
    }
}

/// An answer whose body broke off.
///
/// The cause is not a [`source`](StdError::source). It says how the body ended. As the cause of the
/// whole exchange, it could be mistaken for proof that the request was never sent.
pub(super) struct BrokenOff {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    /// What arrived before it broke off.
    pub(super) read: Bytes,
    pub(super) cause: BoxError,
}

impl fmt::Display for BrokenOff {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the answer ({}) broke off", self.status)
    }
}

impl fmt::Debug for BrokenOff {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // What was read must not be logged.
        f.debug_struct("BrokenOff")
            .field("status", &self.status)
            .field("cause", &self.cause)
            .finish_non_exhaustive()
    }
}

impl StdError for BrokenOff {}

pin_project! {
    /// The future of [`ReadAnswers`].
    #[must_use = "futures do nothing unless polled"]
    pub(super) struct ReadAnswer<F, R> {
        #[pin]
        state: State<F, R>,
        // The time limit for the body of a 202.
        patience: Duration,
    }
}

pin_project! {
    #[project = StateProj]
    enum State<F, R> {
        Head { #[pin] head: F },
        Body {
            // Taken with the answer.
            head: Option<Parts>,
            #[pin]
            body: R,
            read: Read,
            // Started when the body first has to be waited for.
            #[pin]
            timer: Option<Sleep>,
            bounds: Bounds,
        },
    }
}

/// How much of a body is read, and what an incomplete one means.
#[derive(Clone, Copy)]
struct Bounds {
    bytes: usize,
    /// The length announced in the head.
    announced: Option<u64>,
    /// `None` if only the attempt's timeout and the deadline limit it.
    patience: Option<Duration>,
    /// Whether the head alone is enough if the body breaks off.
    is_optional: bool,
}

impl Bounds {
    fn of(head: &Parts, patience: Duration) -> Self {
        let is_failure = match head.status {
            StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS => true,
            StatusCode::CONFLICT => head.headers.contains_key(RETRY_AFTER),
            status => status.is_server_error(),
        };
        let announced = head
            .headers
            .get(CONTENT_LENGTH)
            .and_then(|length| length.to_str().ok()?.parse().ok());
        if is_failure {
            return Self {
                bytes: MAX_FAILURE,
                announced,
                patience: Some(FAILURE_PATIENCE),
                is_optional: true,
            };
        }
        Self {
            bytes: MAX_ANSWER,
            announced,
            patience: (head.status == StatusCode::ACCEPTED).then_some(patience),
            is_optional: false,
        }
    }
}

/// What was read so far. A single piece, the usual case, is not copied.
#[derive(Default)]
struct Read {
    first: Bytes,
    all: BytesMut,
    /// What counts towards the limit. Each frame counts as at least one byte, so that a flood of
    /// empty ones ends.
    counted: usize,
    length: usize,
}

impl Read {
    fn push(&mut self, mut data: impl Buf) {
        if self.first.is_empty() {
            self.first = data.copy_to_bytes(data.remaining());
            return;
        }
        if self.all.is_empty() {
            self.all.extend_from_slice(&self.first);
        }
        while data.has_remaining() {
            let chunk = data.chunk();
            self.all.extend_from_slice(chunk);
            let length = chunk.len();
            data.advance(length);
        }
    }

    fn take(&mut self) -> Bytes {
        if self.all.is_empty() {
            std::mem::take(&mut self.first)
        } else {
            self.all.split().freeze()
        }
    }

    /// Reads to the end, or to the limit.
    fn poll<R>(
        &mut self,
        mut body: Pin<&mut R>,
        bounds: Bounds,
        cx: &mut Context<'_>,
    ) -> Poll<Result<End, BoxError>>
    where
        R: Body,
        R::Error: Into<BoxError>,
    {
        loop {
            // With an announced length the end is known with the last byte, and there is no need to
            // wait until the client says so.
            let next = if body.is_end_stream() {
                None
            } else {
                ready!(body.as_mut().poll_frame(cx))
            };
            let frame = match next {
                Some(Ok(frame)) => frame,
                Some(Err(error)) => return Poll::Ready(Err(error.into())),
                // Not every client notices that a body ended early.
                None if bounds
                    .announced
                    .is_some_and(|length| length > self.length as u64) =>
                {
                    return Poll::Ready(Err("the body is shorter than announced".into()));
                }
                None => return Poll::Ready(Ok(End::Whole)),
            };
            let data = frame.into_data().ok();
            let length = data.as_ref().map_or(0, Buf::remaining);
            self.counted = self.counted.saturating_add(length.max(1));
            if self.counted > bounds.bytes {
                return Poll::Ready(Ok(End::TooLong));
            }
            if let Some(data) = data {
                self.length += length;
                self.push(data);
            }
        }
    }
}

impl<F, R, E> Future for ReadAnswer<F, R>
where
    F: Future<Output = Result<Response<R>, E>>,
    E: Into<BoxError>,
    R: Body,
    R::Error: Into<BoxError>,
{
    type Output = Result<Response<AnswerBody>, BoxError>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut this = self.project();
        loop {
            match this.state.as_mut().project() {
                StateProj::Head { head } => {
                    let (head, body) = ready!(head.poll(cx)).map_err(Into::into)?.into_parts();
                    let bounds = Bounds::of(&head, *this.patience);
                    this.state.set(State::Body {
                        head: Some(head),
                        body,
                        read: Read::default(),
                        timer: None,
                        bounds,
                    });
                }
                StateProj::Body {
                    head,
                    body,
                    read,
                    mut timer,
                    bounds,
                } => {
                    let end = match read.poll(body, *bounds, cx) {
                        Poll::Ready(end) => end,
                        Poll::Pending => {
                            let Some(patience) = bounds.patience else {
                                return Poll::Pending;
                            };
                            if timer.is_none() {
                                timer.set(Some(tokio::time::sleep(patience)));
                            }
                            if let Some(timer) = timer.as_pin_mut() {
                                // Otherwise a body that is always busy would keep it from firing.
                                ready!(pin!(tokio::task::unconstrained(timer)).poll(cx));
                            }
                            Ok(End::Late)
                        }
                    };
                    let Some(head) = head.take() else {
                        // It has already ended and must not be polled again.
                        return Poll::Pending;
                    };
                    let read = read.take();
                    let end = match end {
                        Ok(end) => end,
                        Err(_) if bounds.is_optional => End::BrokenOff,
                        Err(cause) => {
                            return Poll::Ready(Err(Box::new(BrokenOff {
                                status: head.status,
                                headers: head.headers,
                                read,
                                cause,
                            })));
                        }
                    };
                    let body = AnswerBody { read, end };
                    return Poll::Ready(Ok(Response::from_parts(head, body)));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::task::Waker;

    use futures_util::stream;
    use http_body_util::StreamBody;

    use super::*;

    fn read_within(bounds: Bounds, frames: &[&str]) -> End {
        let frames = frames.iter().map(|frame| {
            let data = Bytes::copy_from_slice(frame.as_bytes());
            Ok::<_, Infallible>(Frame::data(data))
        });
        let body = pin!(StreamBody::new(stream::iter(frames)));
        let mut cx = Context::from_waker(Waker::noop());
        match Read::default().poll(body, bounds, &mut cx) {
            Poll::Ready(end) => end.unwrap(),
            Poll::Pending => panic!("the body is all there"),
        }
    }

    #[test]
    fn a_body_is_read_up_to_its_limit() {
        let bounds = Bounds {
            bytes: 4,
            announced: None,
            patience: None,
            is_optional: false,
        };
        assert_eq!(read_within(bounds, &["1234"]), End::Whole);
        assert_eq!(read_within(bounds, &["12", "", "3"]), End::Whole);
        assert_eq!(read_within(bounds, &["12345"]), End::TooLong);
        assert_eq!(read_within(bounds, &["12", "345"]), End::TooLong);
        // An empty frame counts as a byte.
        assert_eq!(read_within(bounds, &["123", "", ""]), End::TooLong);
    }

    #[test]
    fn an_answer_has_up_to_1_mib_and_one_that_is_asked_for_again_64_kib() {
        for (status, limit) in [(200, 1_048_576), (409, 1_048_576), (503, 65_536)] {
            let response = Response::builder().status(status).body(()).unwrap();
            let bounds = Bounds::of(&response.into_parts().0, Duration::ZERO);
            let text = "x".repeat(limit + 1);
            assert_eq!(read_within(bounds, &[&text[1..]]), End::Whole, "{status}");
            assert_eq!(read_within(bounds, &[&text]), End::TooLong, "{status}");
        }
    }

    #[test]
    fn an_answer_that_broke_off_is_shown_by_its_status_and_cause_alone() {
        let broken = BrokenOff {
            status: StatusCode::CONFLICT,
            headers: HeaderMap::new(),
            read: Bytes::from_static(b"secret"),
            cause: "reset".into(),
        };
        assert_eq!(broken.to_string(), "the answer (409 Conflict) broke off");
        assert_eq!(
            format!("{broken:?}"),
            r#"BrokenOff { status: 409, cause: "reset", .. }"#
        );
    }
}
