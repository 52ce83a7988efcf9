//! One connection, from its first byte to its last.

use std::convert::Infallible;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use http::{Request, Response};
use http_body::Body;
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep_until};
use tower_service::Service;

use super::activity::{Activity, Next, Observed, Timeouts};
use crate::protocol::BoxError;
use crate::server::drain::Drain;
use crate::server::http::head;

/// The most bytes of headers that hyper takes, over HTTP/1.1 with the first line. What is larger than a request may be, but
/// not that large, is refused in words.
const MAX_HEADER_BYTES: u32 = 2 * head::MAX_BYTES as u32;

/// The most requests at a time on one HTTP/2 connection.
const MAX_STREAMS: u32 = 128;

/// How much of one HTTP/2 body may be under way: a whole one of the usual limit.
const STREAM_WINDOW: u32 = 256 * 1024;

/// How much of all bodies of one HTTP/2 connection may be under way.
const CONNECTION_WINDOW: u32 = 1024 * 1024;

/// How often a silent HTTP/2 connection is asked for a sign of life, and how long that may take. A peer that stops in the
/// middle of a frame cannot give one.
const PING_INTERVAL: Duration = Duration::from_secs(10);
const PING_TIMEOUT: Duration = Duration::from_secs(10);

/// hyper's settings, the same for all connections.
pub(super) fn http(timeouts: Timeouts) -> auto::Builder<TokioExecutor> {
    let mut http = auto::Builder::new(TokioExecutor::new());
    // The number of headers stays at hyper's own limit of 100: to set it would cost an allocation for each request.
    http.http1()
        .timer(TokioTimer::new())
        .header_read_timeout(timeouts.idle)
        .max_buf_size(MAX_HEADER_BYTES as usize);
    http.http2()
        .timer(TokioTimer::new())
        .max_header_list_size(MAX_HEADER_BYTES)
        .max_concurrent_streams(MAX_STREAMS)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .keep_alive_interval(PING_INTERVAL)
        .keep_alive_timeout(PING_TIMEOUT);
    http
}

pub(super) struct Connection {
    pub(super) stream: TcpStream,
    pub(super) http: Arc<auto::Builder<TokioExecutor>>,
    pub(super) timeouts: Timeouts,
    pub(super) activity: Arc<Activity>,
    pub(super) drain: Drain,
}

impl Connection {
    pub(super) async fn serve<S, B>(self, service: S)
    where
        S: Service<Request<Incoming>, Response = Response<B>, Error = Infallible>,
        S: Clone + Send + 'static,
        S::Future: Send + 'static,
        B: Body<Error: Into<BoxError>, Data: Send> + Send + 'static,
    {
        // Answers are small and complete: there is nothing to wait for.
        _ = self.stream.set_nodelay(true);
        let activity = self.activity;
        let service = Observed {
            service: TowerToHyperService::new(service),
            activity: Arc::clone(&activity),
        };
        let io = TokioIo::new(self.stream);
        let mut connection = pin!(self.http.serve_connection(io, service));
        let mut drain = pin!(self.drain.started());
        let mut timer = pin!(sleep_until(Instant::now()));
        let mut closing = None;
        loop {
            match activity.check(self.timeouts, closing) {
                Next::CheckAt(moment) => timer.as_mut().reset(moment),
                Next::Close => {
                    closing = Some(Instant::now());
                    connection.as_mut().graceful_shutdown();
                    continue;
                }
                Next::Abort => {
                    tracing::debug!("a connection without progress was cut off");
                    return;
                }
            }
            tokio::select! {
                biased;
                () = &mut drain, if closing.is_none() => {
                    closing = Some(Instant::now());
                    connection.as_mut().graceful_shutdown();
                }
                ended = &mut connection => {
                    if let Err(error) = ended {
                        tracing::debug!("a connection ended early: {error}");
                    }
                    return;
                }
                () = &mut timer => {}
            }
        }
    }
}
