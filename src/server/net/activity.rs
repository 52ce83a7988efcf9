//! What goes on on a connection: which requests are in flight, and whether their answers are being taken.
//!
//! Neither version of HTTP has limits for all of this in hyper. Both are judged here, by one rule each: how long no request
//! may be in flight, and how long an answer may lie unsent without progress.

use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, Bytes};
use futures_util::future::{Either, Pending, pending};
use http::Response;
use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;
use tokio::time::Instant;

use crate::server::drain::CLOSE_GRACE;

/// How patient the server is with a connection.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Timeouts {
    /// How long there may be no request in flight.
    pub(crate) idle: Duration,
    /// How long an answer may lie unsent without progress.
    pub(crate) write: Duration,
}

/// What to do with a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Next {
    /// Nothing before this moment.
    CheckAt(Instant),
    /// Ask the client to go: no request is lost, whenever it comes.
    Close,
    /// Cut it off.
    Abort,
}

/// The requests of one connection that are in flight: from their headers to the last byte of the answer.
#[derive(Debug)]
pub(crate) struct Activity(Mutex<State>);

#[derive(Debug)]
struct State {
    exchanges: Vec<Exchange>,
    /// How many requests there have been, which also names the exchanges.
    requests: u64,
    /// Since when there have been no exchanges, if there are none.
    idle_since: Instant,
    evicted: bool,
}

/// A request and its answer.
#[derive(Debug)]
struct Exchange {
    id: u64,
    /// How many pieces of the answer are with hyper.
    unsent: usize,
    /// When a piece came to hyper, or a part of one left it; of no meaning while there is none.
    progress: Instant,
}

impl Activity {
    pub(crate) fn new() -> Self {
        Self(Mutex::new(State {
            exchanges: Vec::new(),
            requests: 0,
            idle_since: Instant::now(),
            evicted: false,
        }))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Since when the connection has been idle, if it is.
    pub(crate) fn idle_since(&self) -> Option<Instant> {
        let state = self.state();
        (state.exchanges.is_empty() && !state.evicted).then_some(state.idle_since)
    }

    /// Lets no further request begin, if none is in flight. Returns whether that is so.
    pub(crate) fn evict(&self) -> bool {
        let mut state = self.state();
        if !state.exchanges.is_empty() {
            return false;
        }
        state.evicted = true;
        true
    }

    /// Judges the connection, which has been asked to close since `closing`.
    pub(crate) fn check(&self, timeouts: Timeouts, closing: Option<Instant>) -> Next {
        let (idle, write) = match closing {
            Some(_) => (
                timeouts.idle.min(CLOSE_GRACE),
                timeouts.write.min(CLOSE_GRACE),
            ),
            None => (timeouts.idle, timeouts.write),
        };
        let now = Instant::now();
        let state = self.state();
        let unsent = state.exchanges.iter().filter(|one| one.unsent > 0);
        let unsent = unsent.map(|one| (one.progress, write)).min();
        let idle_since = state
            .exchanges
            .is_empty()
            .then_some((state.idle_since, idle));
        // Whatever begins from now on is not due before that.
        let mut next = after(now, idle.min(write));
        for (since, limit) in unsent.into_iter().chain(idle_since) {
            let since = closing.map_or(since, |closing| closing.max(since));
            let due = after(since, limit);
            if due <= now {
                // Whoever never sent a request has none to lose.
                return match closing {
                    None if state.requests > 0 => Next::Close,
                    _ => Next::Abort,
                };
            }
            next = next.min(due);
        }
        Next::CheckAt(next)
    }

    /// Begins an exchange, unless the connection was evicted.
    fn begin(self: &Arc<Self>) -> Option<Arc<InFlight>> {
        let mut state = self.state();
        if state.evicted {
            return None;
        }
        state.requests += 1;
        let id = state.requests;
        let progress = state.idle_since;
        state.exchanges.push(Exchange {
            id,
            unsent: 0,
            progress,
        });
        Some(Arc::new(InFlight {
            activity: Arc::clone(self),
            id,
        }))
    }
}

/// A moment that much later, or as good as never.
fn after(moment: Instant, duration: Duration) -> Instant {
    const NEVER: Duration = Duration::from_secs(86_400 * 365 * 30);
    moment + duration.min(NEVER)
}

/// Holds an exchange open.
#[derive(Debug)]
struct InFlight {
    activity: Arc<Activity>,
    id: u64,
}

impl InFlight {
    fn update(&self, change: impl FnOnce(&mut Exchange)) {
        let mut state = self.activity.state();
        if let Some(exchange) = state.exchanges.iter_mut().find(|one| one.id == self.id) {
            change(exchange);
        }
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        let mut state = self.activity.state();
        state.exchanges.retain(|one| one.id != self.id);
        if state.exchanges.is_empty() {
            state.idle_since = Instant::now();
        }
    }
}

/// A service whose requests count as activity.
pub(crate) struct Observed<S> {
    pub(crate) service: S,
    pub(crate) activity: Arc<Activity>,
}

impl<S, R, B> hyper::service::Service<R> for Observed<S>
where
    S: hyper::service::Service<R, Response = Response<B>>,
{
    type Response = Response<ObservedBody<B>>;
    type Error = S::Error;
    // A connection that was evicted is gone before it could learn more.
    type Future = Either<ObservedFuture<S::Future>, Pending<Result<Self::Response, S::Error>>>;

    fn call(&self, request: R) -> Self::Future {
        match self.activity.begin() {
            Some(in_flight) => Either::Left(ObservedFuture {
                future: self.service.call(request),
                in_flight,
            }),
            None => Either::Right(pending()),
        }
    }
}

pin_project! {
    pub(crate) struct ObservedFuture<F> {
        #[pin]
        future: F,
        in_flight: Arc<InFlight>,
    }
}

impl<F, B, E> Future for ObservedFuture<F>
where
    F: Future<Output = Result<Response<B>, E>>,
{
    type Output = Result<Response<ObservedBody<B>>, E>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let response = ready!(this.future.poll(cx))?;
        let in_flight = Arc::clone(this.in_flight);
        Poll::Ready(Ok(response.map(|body| ObservedBody { body, in_flight })))
    }
}

pin_project! {
    pub(crate) struct ObservedBody<B> {
        #[pin]
        body: B,
        in_flight: Arc<InFlight>,
    }
}

impl<B: Body> Body for ObservedBody<B> {
    type Data = Unsent<B::Data>;
    type Error = B::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, B::Error>>> {
        let this = self.project();
        let in_flight = this.in_flight;
        this.body.poll_frame(cx).map_ok(|frame| {
            frame.map_data(|data| {
                in_flight.update(|exchange| {
                    exchange.unsent += 1;
                    exchange.progress = Instant::now();
                });
                Unsent {
                    data,
                    in_flight: Arc::clone(in_flight),
                }
            })
        })
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// A piece of an answer. hyper and h2 keep it until it is sent, wherever it has to wait: for room in the socket, or for a
/// window of HTTP/2.
pub(crate) struct Unsent<D> {
    data: D,
    in_flight: Arc<InFlight>,
}

impl<D> Unsent<D> {
    fn progress(&self) {
        self.in_flight
            .update(|exchange| exchange.progress = Instant::now());
    }
}

impl<D: Buf> Buf for Unsent<D> {
    fn remaining(&self) -> usize {
        self.data.remaining()
    }

    fn chunk(&self) -> &[u8] {
        self.data.chunk()
    }

    fn chunks_vectored<'a>(&'a self, slices: &mut [std::io::IoSlice<'a>]) -> usize {
        self.data.chunks_vectored(slices)
    }

    fn advance(&mut self, len: usize) {
        self.data.advance(len);
        // Of a piece that is sent the end is noted, which is near.
        if self.data.has_remaining() {
            self.progress();
        }
    }

    fn copy_to_bytes(&mut self, len: usize) -> Bytes {
        let bytes = self.data.copy_to_bytes(len);
        self.progress();
        bytes
    }
}

impl<D> Drop for Unsent<D> {
    fn drop(&mut self) {
        self.in_flight.update(|exchange| {
            exchange.unsent -= 1;
            if exchange.unsent > 0 {
                exchange.progress = Instant::now();
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMEOUTS: Timeouts = Timeouts {
        idle: Duration::from_secs(8),
        write: Duration::from_secs(30),
    };

    fn seconds(count: u64) -> Duration {
        Duration::from_secs(count)
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_without_requests_is_closed_when_it_has_been_idle() {
        let start = Instant::now();
        let activity = Arc::new(Activity::new());
        let check = |closing| activity.check(TIMEOUTS, closing);
        assert_eq!(check(None), Next::CheckAt(start + seconds(8)));
        tokio::time::advance(seconds(8)).await;
        assert!(matches!(check(None), Next::Abort));

        drop(activity.begin());
        let idle = Instant::now();
        assert_eq!(check(None), Next::CheckAt(idle + seconds(8)));
        tokio::time::advance(seconds(8)).await;
        assert_eq!(check(None), Next::Close);
        let closing = Some(Instant::now());
        let due = Instant::now() + CLOSE_GRACE;
        assert_eq!(check(closing), Next::CheckAt(due));
        tokio::time::advance(CLOSE_GRACE).await;
        assert!(matches!(check(closing), Next::Abort));
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_with_a_request_is_judged_by_the_slowest_answer() {
        let activity = Arc::new(Activity::new());
        let check = |closing| activity.check(TIMEOUTS, closing);
        let body = |activity: &Arc<Activity>| ObservedBody {
            body: http_body_util::Full::new(Bytes::from_static(b"ab")),
            in_flight: activity.begin().unwrap(),
        };
        let mut slow = body(&activity);
        let mut quick = body(&activity);
        // However long the answer takes to be made: that is the service's matter.
        tokio::time::advance(seconds(600)).await;
        assert!(matches!(check(None), Next::CheckAt(_)));
        assert!(!activity.evict());
        let mut data = [
            http_body_util::BodyExt::frame(&mut slow).await,
            http_body_util::BodyExt::frame(&mut quick).await,
        ]
        .map(|frame| {
            frame
                .unwrap()
                .unwrap()
                .into_data()
                .unwrap_or_else(|_| panic!())
        });
        drop((slow, quick));
        tokio::time::advance(seconds(29)).await;
        data[1].advance(1);
        assert!(matches!(check(None), Next::CheckAt(_)));
        tokio::time::advance(seconds(1)).await;
        // The requests beside it have the time to end.
        assert_eq!(check(None), Next::Close);
        let closing = Some(Instant::now());
        let due = Instant::now() + CLOSE_GRACE;
        assert_eq!(check(closing), Next::CheckAt(due));
        tokio::time::advance(CLOSE_GRACE).await;
        assert_eq!(check(closing), Next::Abort);
        // With the slow one gone, the other still has its time.
        let [slow, _quick] = data;
        drop(slow);
        assert!(matches!(check(None), Next::CheckAt(_)));
        assert_eq!(activity.idle_since(), None);
    }

    #[tokio::test]
    async fn an_evicted_connection_starts_no_request() {
        let activity = Arc::new(Activity::new());
        let idle = activity.idle_since();
        assert!(idle.is_some() && activity.evict());
        assert!(activity.begin().is_none());
        assert!(activity.idle_since().is_none());
    }

    #[tokio::test]
    async fn a_limit_without_end_is_none() {
        let timeouts = Timeouts {
            idle: Duration::MAX,
            write: Duration::MAX,
        };
        let next = Activity::new().check(timeouts, None);
        assert!(matches!(next, Next::CheckAt(_)));
    }
}
