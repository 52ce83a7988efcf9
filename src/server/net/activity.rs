//! The activity of a connection: its requests in flight, and whether the client reads the
//! responses.
//!
//! hyper has no such limits for both versions of HTTP. Three rules cover both here: how long a
//! connection may have no request in flight, how long a response may stay unsent without progress,
//! and how long its bytes may take in all.

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

use crate::server::drain::{CLOSE_GRACE, FIRST_GRACE};

/// How long a whole response may take: some write timeouts, and a second for this many bytes. A
/// client that takes a byte now and then would keep its place for ever.
const WRITE_TIMEOUTS: u32 = 4;
const MIN_RATE: u64 = 1024;

/// The timeouts of a connection.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Timeouts {
    /// How long there may be no request in flight, and how long a TLS handshake may take.
    pub(crate) idle: Duration,
    /// How long a response may stay unsent without progress.
    pub(crate) write: Duration,
}

/// What to do next with a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Next {
    /// Check again at this moment.
    CheckAt(Instant),
    /// Close gracefully. No request is lost, whenever it arrives.
    Close,
    /// Drop the connection.
    Abort,
}

/// The requests of one connection that are in flight, from their headers to the last byte of the
/// response.
#[derive(Debug)]
pub(crate) struct Activity(Mutex<State>);

#[derive(Debug)]
struct State {
    exchanges: Vec<Exchange>,
    /// The number of requests so far. It is also the id of the latest exchange.
    requests: u64,
    /// What TLS holds of responses that hyper takes for sent.
    unflushed: Option<Exchange>,
    /// Since when there has been nothing of these. It is valid while there is nothing.
    idle_since: Instant,
    evicted: bool,
}

impl State {
    fn is_idle(&self) -> bool {
        self.exchanges.is_empty() && self.unflushed.is_none()
    }
}

/// A request and its response.
#[derive(Debug)]
struct Exchange {
    id: u64,
    /// The number of pieces of the response that hyper holds.
    unsent: usize,
    /// When hyper last took a piece or sent a part of one. It is valid while `unsent` is not 0.
    progress: Instant,
    /// When `unsent` last rose from 0.
    began: Instant,
    /// The bytes that hyper took since then.
    bytes: u64,
}

impl Exchange {
    /// Notes that hyper takes a piece.
    fn take(&mut self, bytes: usize) {
        let now = Instant::now();
        if self.unsent == 0 {
            self.began = now;
            self.bytes = 0;
        }
        self.unsent += 1;
        self.bytes = self.bytes.saturating_add(bytes as u64);
        self.progress = now;
    }

    /// Since when the response may last for how long.
    fn limits(&self, write: Duration) -> [(Instant, Duration); 2] {
        let in_all = write
            .saturating_mul(WRITE_TIMEOUTS)
            .saturating_add(Duration::from_secs(self.bytes / MIN_RATE));
        [(self.progress, write), (self.began, in_all)]
    }
}

impl Activity {
    pub(crate) fn new() -> Self {
        Self(Mutex::new(State {
            exchanges: Vec::new(),
            requests: 0,
            unflushed: None,
            idle_since: Instant::now(),
            evicted: false,
        }))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns since when the connection has been idle, if it is.
    pub(crate) fn idle_since(&self) -> Option<Instant> {
        let state = self.state();
        (state.is_idle() && !state.evicted).then_some(state.idle_since)
    }

    /// Prevents further requests if none is in flight. Returns whether it did.
    pub(crate) fn evict(&self) -> bool {
        let mut state = self.state();
        if !state.is_idle() {
            return false;
        }
        state.evicted = true;
        true
    }

    /// Returns until when the first request may be on its way, if none has come yet.
    pub(crate) fn expects_first_until(&self) -> Option<Instant> {
        let state = self.state();
        (state.requests == 0).then(|| state.idle_since + FIRST_GRACE)
    }

    /// Checks the connection against its timeouts. `closing` is when its graceful close began.
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
        let unsent = unsent.chain(&state.unflushed);
        let unsent = unsent.flat_map(|one| one.limits(write));
        let idle_since = state.is_idle().then_some((state.idle_since, idle));
        // Anything that begins later is due no earlier than this.
        let mut next = after(now, idle.min(write));
        for (since, limit) in unsent.into_iter().chain(idle_since) {
            let since = closing.map_or(since, |closing| closing.max(since));
            let due = after(since, limit);
            if due <= now {
                // A client that never sent a request has none to lose.
                return match closing {
                    None if state.requests > 0 => Next::Close,
                    _ => Next::Abort,
                };
            }
            next = next.min(due);
        }
        Next::CheckAt(next)
    }

    /// Notes that the socket took `bytes`, and whether TLS holds more for it.
    #[cfg(feature = "tls")]
    pub(super) fn flushed(&self, bytes: u64, holds_more: bool) {
        let now = Instant::now();
        let mut state = self.state();
        match (&mut state.unflushed, holds_more) {
            (Some(unflushed), true) if bytes > 0 => {
                unflushed.progress = now;
                unflushed.bytes = unflushed.bytes.saturating_add(bytes);
            }
            (None, true) => {
                state.unflushed = Some(Exchange {
                    id: 0,
                    unsent: 1,
                    progress: now,
                    began: now,
                    bytes: 0,
                });
            }
            (Some(_), false) => {
                state.unflushed = None;
                state.idle_since = now;
            }
            (Some(_), true) | (None, false) => {}
        }
    }

    /// Begins an exchange, unless the connection was evicted.
    fn begin(self: &Arc<Self>) -> Option<Arc<InFlight>> {
        let mut state = self.state();
        if state.evicted {
            return None;
        }
        state.requests += 1;
        let id = state.requests;
        let now = state.idle_since;
        state.exchanges.push(Exchange {
            id,
            unsent: 0,
            progress: now,
            began: now,
            bytes: 0,
        });
        Some(Arc::new(InFlight {
            activity: Arc::clone(self),
            id,
        }))
    }
}

/// Adds `duration` to `moment`, capped at about 30 years to prevent an overflow.
fn after(moment: Instant, duration: Duration) -> Instant {
    const NEVER: Duration = Duration::from_secs(86_400 * 365 * 30);
    moment + duration.min(NEVER)
}

/// Keeps an exchange in flight until it is dropped.
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

/// Wraps a service to record its requests as activity.
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
    // An evicted connection is dropped before its request could get a response.
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
                in_flight.update(|exchange| exchange.take(data.remaining()));
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

/// A piece of a response. hyper and h2 hold it until it is sent, whether it waits for room in the
/// socket or for an HTTP/2 window.
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
        // The drop of the piece, which follows at once, records its end.
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
        // The time that the service takes to respond does not count.
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
        // Other requests on the connection have time to end.
        assert_eq!(check(None), Next::Close);
        let closing = Some(Instant::now());
        let due = Instant::now() + CLOSE_GRACE;
        assert_eq!(check(closing), Next::CheckAt(due));
        tokio::time::advance(CLOSE_GRACE).await;
        assert_eq!(check(closing), Next::Abort);
        // Without the slow response, the other one still has time.
        let [slow, _quick] = data;
        drop(slow);
        assert!(matches!(check(None), Next::CheckAt(_)));
        assert_eq!(activity.idle_since(), None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_response_that_goes_out_byte_by_byte_is_cut_off() {
        const KIB: usize = 100;
        let activity = Arc::new(Activity::new());
        let mut body = ObservedBody {
            body: http_body_util::Full::new(Bytes::from(vec![b'x'; KIB * 1024])),
            in_flight: activity.begin().unwrap(),
        };
        let frame = http_body_util::BodyExt::frame(&mut body).await;
        let Ok(mut data) = frame.unwrap().unwrap().into_data() else {
            panic!("it is no data");
        };
        let check = || activity.check(TIMEOUTS, None);
        for _ in 0..4 * 30 + KIB {
            assert!(matches!(check(), Next::CheckAt(_)));
            data.advance(1);
            tokio::time::advance(seconds(1)).await;
        }
        assert_eq!(check(), Next::Close);
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
