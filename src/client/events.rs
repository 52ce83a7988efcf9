//! The tenant's events, as a stream that outlives its connections.

use std::collections::VecDeque;
use std::error::Error as StdError;
use std::fmt;
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::str::FromStr;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use futures_core::Stream;
use http::{HeaderValue, Request, Response, StatusCode};
use http_body::Body;
use http_body_util::Full;
use tokio::time::timeout;
use tower_service::Service;

use super::answer::{Answer, Head, Subject, is_event_stream, refusal};
use super::endpoints::Endpoints;
use super::operation::checked;
use super::read::{AnswerBody, End};
use super::sse::{Message, Parser};
use super::wait::Pauses;
use super::{AegisService, Error};
use crate::protocol::{Event, EventKind, InvalidValue, TenantId};

/// A stream without a byte for this long is dead. Servers send a comment every 15 seconds.
const SILENCE: Duration = Duration::from_secs(45);

/// The most that is read of an answer that is no stream, and for how long.
const MAX_FAILURE: usize = 64 * 1024;
const FAILURE_PATIENCE: Duration = Duration::from_secs(1);

/// A place in the tenant's events, to resume at. It comes with each event.
///
/// To resume after a restart, keep the cursor of the last event that was dealt with.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct EventCursor(HeaderValue);

/// A text that is no [`EventCursor`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InvalidCursor(());

impl fmt::Display for InvalidCursor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("it is not a cursor; allowed are 1 to 255 visible ASCII characters")
    }
}

impl StdError for InvalidCursor {}

impl EventCursor {
    /// The place before the oldest event that the server retains.
    pub fn oldest() -> Self {
        Self(HeaderValue::from_static("0"))
    }

    /// Returns the cursor as text.
    pub fn as_str(&self) -> &str {
        // Made of visible ASCII alone.
        self.0.to_str().unwrap_or_default()
    }

    pub(super) fn header_value(&self) -> HeaderValue {
        self.0.clone()
    }
}

impl FromStr for EventCursor {
    type Err = InvalidCursor;

    fn from_str(text: &str) -> Result<Self, InvalidCursor> {
        let is_allowed =
            (1..=255).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic());
        let value = HeaderValue::from_str(text).ok().filter(|_| is_allowed);
        value.map(Self).ok_or(InvalidCursor(()))
    }
}

impl fmt::Display for EventCursor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl fmt::Debug for EventCursor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("EventCursor").field(&self.as_str()).finish()
    }
}

/// An event, and where it stands among the tenant's.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct StreamedEvent {
    /// The event's place. `None` if the server named none.
    pub cursor: Option<EventCursor>,
    /// The event. The same one may come twice, with the same [`id`](Event::id).
    pub event: Event,
}

/// A request for events. Made by [`AegisService::events`].
///
/// By default the events begin when the server answers first. [`after`](Self::after) resumes.
///
/// ```no_run
/// # async fn run(aegis: aegis_hitl::AegisService) -> Result<(), aegis_hitl::Error> {
/// use aegis_hitl::client::EventCursor;
/// use futures_util::StreamExt;
///
/// let mut events = aegis.events().after(EventCursor::oldest()).stream();
/// while let Some(event) = events.next().await {
///     let event = event?;
///     println!("{}: {:?}", event.event.kind, event.event.action);
///     // Keep `event.cursor`, to resume after a restart.
/// }
/// # Ok(())
/// # }
/// ```
#[must_use = "nothing is sent before the stream is polled"]
pub struct EventsCall<S> {
    service: AegisService<S>,
    after: Option<EventCursor>,
    tenant: Result<Option<TenantId>, Error>,
}

impl<S> EventsCall<S> {
    pub(super) fn new(service: AegisService<S>) -> Self {
        Self {
            service,
            after: None,
            tenant: Ok(None),
        }
    }

    /// Begins after this event.
    pub fn after(mut self, cursor: impl Into<Option<EventCursor>>) -> Self {
        self.after = cursor.into();
        self
    }

    /// Sets the tenant, in place of the service's.
    pub fn tenant_id<T>(mut self, tenant: T) -> Self
    where
        T: TryInto<TenantId, Error: Into<InvalidValue>>,
    {
        self.tenant = self.tenant.and(checked(tenant).map(Some));
        self
    }
}

impl<S, R> EventsCall<S>
where
    S: Service<Request<Full<Bytes>>, Response = Response<R>> + Send + 'static,
    S::Future: Send,
    S::Error: Into<Box<dyn StdError + Send + Sync>>,
    R: Body + Send + 'static,
    R::Data: Send,
    R::Error: Into<Box<dyn StdError + Send + Sync>>,
{
    /// Makes the stream.
    pub fn stream(self) -> Events {
        let (service, endpoints) = self.service.into_parts();
        let (tenant, ready) = match self.tenant {
            Ok(tenant) => (tenant, VecDeque::new()),
            Err(error) => (None, VecDeque::from([Err(error)])),
        };
        let follower = Follower {
            service,
            endpoints,
            tenant,
            cursor: self.after,
            ready,
            open: None,
            pauses: Pauses::default(),
        };
        Events(Box::pin(Unfold::Idle(Some(Box::new(follower)))))
    }
}

impl<S> fmt::Debug for EventsCall<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EventsCall")
            .field("after", &self.after)
            .finish_non_exhaustive()
    }
}

/// The tenant's events. Made by [`EventsCall::stream`].
///
/// If the connection is lost, or silent for 45 seconds, it connects again and resumes after the
/// last event, for as long as it takes, with growing pauses. It ends only after an error that
/// another attempt would meet again: a refusal, or an answer that is not of the protocol.
///
/// Events that happen before the first one was received, while the connection is lost, are missed,
/// because there is no place to resume at yet. With [`EventsCall::after`] none are.
#[must_use = "streams do nothing unless polled"]
pub struct Events(Pin<Box<dyn Stream<Item = Result<StreamedEvent, Error>> + Send>>);

impl Stream for Events {
    type Item = Result<StreamedEvent, Error>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.as_mut().poll_next(cx)
    }
}

impl fmt::Debug for Events {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Events").finish_non_exhaustive()
    }
}

type Next<S, R> = (Box<Follower<S, R>>, Result<StreamedEvent, Error>);

/// A stream of what a follower finds.
enum Unfold<S, R> {
    /// `None` after the last item.
    Idle(Option<Box<Follower<S, R>>>),
    Busy(Pin<Box<dyn Future<Output = Next<S, R>> + Send>>),
}

// The body is in a box, and nothing else is pinned.
impl<S, R> Unpin for Unfold<S, R> {}

impl<S, R> Stream for Unfold<S, R>
where
    S: Service<Request<Full<Bytes>>, Response = Response<R>> + Send + 'static,
    S::Future: Send,
    S::Error: Into<Box<dyn StdError + Send + Sync>>,
    R: Body + Send + 'static,
    R::Data: Send,
    R::Error: Into<Box<dyn StdError + Send + Sync>>,
{
    type Item = Result<StreamedEvent, Error>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            match &mut *self {
                Self::Idle(follower) => {
                    let Some(mut follower) = follower.take() else {
                        return Poll::Ready(None);
                    };
                    *self = Self::Busy(Box::pin(async move {
                        let next = follower.next().await;
                        (follower, next)
                    }));
                }
                Self::Busy(next) => {
                    let (follower, next) = ready!(next.as_mut().poll(cx));
                    *self = Self::Idle(next.is_ok().then_some(follower));
                    return Poll::Ready(Some(next));
                }
            }
        }
    }
}

/// Follows the events over one connection after another.
struct Follower<S, R> {
    service: S,
    endpoints: Arc<Endpoints>,
    tenant: Option<TenantId>,
    /// Where to resume.
    cursor: Option<EventCursor>,
    ready: VecDeque<Result<StreamedEvent, Error>>,
    open: Option<Open<R>>,
    pauses: Pauses,
}

/// A connection that events come over.
struct Open<R> {
    body: Pin<Box<R>>,
    parser: Parser,
    head: Head,
}

/// Why there is no next event yet.
enum Trouble {
    /// Another connection may do better.
    Passing(Error),
    Final(Error),
}

impl<S, R> Follower<S, R>
where
    S: Service<Request<Full<Bytes>>, Response = Response<R>>,
    S::Error: Into<Box<dyn StdError + Send + Sync>>,
    R: Body,
    R::Error: Into<Box<dyn StdError + Send + Sync>>,
{
    /// Returns the next event, or the error that ends the stream.
    async fn next(&mut self) -> Result<StreamedEvent, Error> {
        loop {
            if let Some(next) = self.ready.pop_front() {
                if let Ok(StreamedEvent {
                    cursor: Some(cursor),
                    ..
                }) = &next
                {
                    self.cursor = Some(cursor.clone());
                }
                return next;
            }
            let step = match self.open.take() {
                None => self.connect().await,
                Some(open) => self.read(open).await,
            };
            match step {
                Ok(open) => self.open = Some(open),
                Err(Trouble::Final(error)) => return Err(error),
                Err(Trouble::Passing(error)) => {
                    let pause = self.pauses.next_after(&error);
                    tokio::time::sleep(pause).await;
                }
            }
        }
    }

    async fn connect(&mut self) -> Result<Open<R>, Trouble> {
        let request = self
            .endpoints
            .events(self.tenant.as_ref(), self.cursor.as_ref())
            .map_err(Trouble::Final)?;
        let answered = timeout(self.endpoints.timeout, async {
            poll_fn(|cx| self.service.poll_ready(cx)).await?;
            self.service.call(request).await
        });
        let broke_off = |error| Trouble::Passing(Error::disconnected(error));
        let response = match answered.await {
            Ok(answered) => answered.map_err(|error| broke_off(error.into()))?,
            Err(elapsed) => return Err(broke_off(elapsed.into())),
        };
        if response.status() != StatusCode::OK {
            return Err(refused(response).await);
        }
        let head = Head::of(&response);
        if let Err(what) = is_event_stream(response.headers()) {
            return Err(Trouble::Final(head.fault(what)));
        }
        Ok(Open {
            body: Box::pin(response.into_body()),
            parser: Parser::default(),
            head,
        })
    }

    /// Reads one piece of the body.
    async fn read(&mut self, mut open: Open<R>) -> Result<Open<R>, Trouble> {
        let frame = poll_fn(|cx| open.body.as_mut().poll_frame(cx));
        let frame = match timeout(SILENCE, frame).await {
            Err(_) => return Err(Trouble::Passing(Error::silent())),
            Ok(None) => return Err(Trouble::Passing(Error::disconnected("it ended"))),
            Ok(Some(Err(error))) => {
                return Err(Trouble::Passing(Error::disconnected(error)));
            }
            Ok(Some(Ok(frame))) => frame,
        };
        let Ok(mut data) = frame.into_data() else {
            return Ok(open);
        };
        self.pauses = Pauses::default();
        let subject = Subject {
            tenant: self.endpoints.tenant(self.tenant.as_ref()),
            ..Subject::default()
        };
        while data.has_remaining() {
            let length = data.chunk().len();
            let ready = &mut self.ready;
            let head = open.head;
            let pushed = open.parser.push(data.chunk(), |message| {
                if let Some(event) = streamed(message, &subject, head) {
                    ready.push_back(event);
                }
            });
            if pushed.is_err() {
                let error = head.fault("an event is too long");
                self.ready.push_back(Err(error));
            }
            data.advance(length);
        }
        // A place that comes without an event, once those before it are taken.
        if self.ready.is_empty()
            && let Ok(cursor) = open.parser.last_id().parse()
        {
            self.cursor = Some(cursor);
        }
        Ok(open)
    }
}

/// Reads one event. `None` if it is of a kind that this version does not know and cannot read.
fn streamed(
    message: Message,
    subject: &Subject<'_>,
    head: Head,
) -> Option<Result<StreamedEvent, Error>> {
    let is_object = message.data.trim_start().starts_with('{');
    let event = serde_json::from_str::<Event>(&message.data).ok();
    let Some(event) = event.filter(|_| is_object) else {
        let is_ours = message.name.parse::<EventKind>().is_ok();
        return is_ours.then(|| Err(head.fault("an event is malformed")));
    };
    if let Some(action) = &event.action
        && !subject.is_of(action)
    {
        return Some(Err(head.fault("an event is about another tenant")));
    }
    let cursor = message.id.parse().ok();
    Some(Ok(StreamedEvent { cursor, event }))
}

/// Reads an answer that is no stream.
async fn refused<R>(response: Response<R>) -> Trouble
where
    R: Body,
    R::Error: Into<Box<dyn StdError + Send + Sync>>,
{
    let (head, body) = response.into_parts();
    let mut body = Box::pin(body);
    let mut read = BytesMut::new();
    let reading = async {
        while let Some(frame) = poll_fn(|cx| body.as_mut().poll_frame(cx)).await {
            let Ok(frame) = frame else {
                return End::BrokenOff;
            };
            if let Ok(mut data) = frame.into_data() {
                if read.len() + data.remaining() > MAX_FAILURE {
                    return End::TooLong;
                }
                read.extend_from_slice(&data.copy_to_bytes(data.remaining()));
            }
        }
        End::Whole
    };
    let end = timeout(FAILURE_PATIENCE, reading).await;
    let end = end.unwrap_or(End::Late);
    let is_passing = head.status.is_server_error()
        || head.status == StatusCode::REQUEST_TIMEOUT
        || head.status == StatusCode::TOO_MANY_REQUESTS;
    let body = AnswerBody {
        read: read.freeze(),
        end,
    };
    let answer = Answer::read(Response::from_parts(head, body));
    let told = answer.told;
    let error = refusal(answer, &Subject::default()).told(told);
    if is_passing {
        Trouble::Passing(error)
    } else {
        Trouble::Final(error)
    }
}

#[cfg(test)]
mod tests {
    use futures_util::{StreamExt, stream};
    use http_body::Frame;
    use http_body_util::StreamBody;

    use super::*;
    use crate::protocol::Problem;

    #[test]
    fn a_cursor_is_1_to_255_visible_ascii_characters() {
        let longest = "x".repeat(255);
        for text in ["0", "!", "~", &longest] {
            assert_eq!(text.parse::<EventCursor>().unwrap().as_str(), text);
        }
        let too_long = "x".repeat(256);
        for text in ["", " ", "a b", "a\n", "\u{e9}", &too_long] {
            let error = text.parse::<EventCursor>().unwrap_err();
            assert!(error.to_string().contains("1 to 255 visible ASCII"));
        }
    }

    async fn refused_with(status: u16, pieces: Vec<String>) -> Trouble {
        let frames = pieces.into_iter().map(|piece| {
            let data = Bytes::from(piece);
            Ok::<_, std::convert::Infallible>(Frame::data(data))
        });
        let response = Response::builder().status(status);
        let body = StreamBody::new(stream::iter(frames).boxed());
        refused(response.body(body).unwrap()).await
    }

    #[tokio::test]
    async fn only_what_may_go_away_by_itself_is_waited_for() {
        for (status, is_passing) in [
            (401, false),
            (404, false),
            (408, true),
            (429, true),
            (500, true),
            (503, true),
        ] {
            let trouble = refused_with(status, Vec::new()).await;
            assert_eq!(
                matches!(trouble, Trouble::Passing(_)),
                is_passing,
                "{status}"
            );
        }
    }

    async fn problem_in(pieces: Vec<String>) -> Option<Problem> {
        match refused_with(404, pieces).await {
            Trouble::Final(error) | Trouble::Passing(error) => error.problem().cloned(),
        }
    }

    #[tokio::test]
    async fn a_refusal_is_read_up_to_64_kib() {
        let problem = r#"{"code":"not-found"}"#;
        let padded = |length: usize| problem.to_owned() + &" ".repeat(length - problem.len());
        let whole = padded(65_536);
        assert!(problem_in(vec![whole.clone()]).await.is_some());
        let (first, rest) = whole.split_at(1);
        let halves = vec![first.to_owned(), rest.to_owned()];
        assert!(problem_in(halves).await.is_some());
        let too_long = vec![padded(65_537)];
        assert!(problem_in(too_long).await.is_none());
        let too_long = vec![whole, " ".to_owned()];
        assert!(problem_in(too_long).await.is_none());
    }
}
