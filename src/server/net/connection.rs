//! One connection, from its first byte to its last.

use std::convert::Infallible;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use http::{Request, Response};
use http_body::Body;
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::service::TowerToHyperService;
use tokio::time::{Instant, sleep_until, timeout};
use tower_service::Service;

use super::activity::{Activity, Next, Observed, Timeouts};
use super::socket::Socket;
use super::stream::Stream;
use super::tls::Acceptor;
use crate::protocol::BoxError;
use crate::server::drain::{Drain, READ_GRACE};
use crate::server::http::head;

/// The largest head that hyper accepts, in bytes; over HTTP/1.1 this includes the request line. It
/// is above the limit of `head::check`, so that a somewhat larger head gets a response that says
/// so.
const MAX_HEADER_BYTES: u32 = 2 * head::MAX_BYTES as u32;

/// The maximum number of concurrent requests on one HTTP/2 connection.
const MAX_STREAMS: u32 = 128;

/// The HTTP/2 flow-control window of one request, in bytes: a whole body of the default limit.
const STREAM_WINDOW: u32 = 256 * 1024;

/// The HTTP/2 flow-control window of one connection, in bytes.
const CONNECTION_WINDOW: u32 = 1024 * 1024;

/// The interval of HTTP/2 pings, and the time to answer one. A peer that stops within a frame
/// cannot answer.
const PING_INTERVAL: Duration = Duration::from_secs(10);
const PING_TIMEOUT: Duration = Duration::from_secs(10);

/// Returns hyper's settings, which all connections share.
pub(super) fn http(timeouts: Timeouts) -> auto::Builder<TokioExecutor> {
    let mut http = auto::Builder::new(TokioExecutor::new());
    // The number of headers stays at hyper's default limit of 100. Setting it costs an allocation
    // for each request.
    http.http1()
        .timer(TokioTimer::new())
        // A client may close its side behind its request and still wait for the response.
        .half_close(true)
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
    pub(super) socket: Socket,
    pub(super) tls: Option<Acceptor>,
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
        let Self {
            socket,
            tls,
            http,
            timeouts,
            activity,
            drain,
        } = self;
        socket.set_nodelay();
        let stream = match tls {
            None => Stream::Plain(socket),
            Some(tls) => {
                // In a box, as a connection without TLS would have room for it too.
                let shaking = Box::pin(tls.accept(socket, &activity));
                let Some(stream) = handshake(shaking, timeouts.idle, &drain).await else {
                    return;
                };
                stream
            }
        };
        let service = Observed {
            service: TowerToHyperService::new(service),
            activity: Arc::clone(&activity),
        };
        let io = TokioIo::new(stream);
        let mut connection = pin!(http.serve_connection(io, service));
        let mut drain = pin!(drain.started());
        let mut timer = pin!(sleep_until(Instant::now()));
        let mut closing = None;
        // Until when the close waits for requests that are on their way.
        let mut kept_until: Option<Instant> = None;
        loop {
            if kept_until.is_some_and(|moment| moment <= Instant::now()) {
                kept_until = None;
                connection.as_mut().graceful_shutdown();
            }
            match activity.check(timeouts, closing) {
                Next::CheckAt(moment) => {
                    let moment = kept_until.map_or(moment, |until| until.min(moment));
                    timer.as_mut().reset(moment);
                }
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
                // First, so that a request that has arrived already is served.
                biased;
                ended = &mut connection => {
                    if let Err(error) = ended {
                        tracing::debug!("a connection ended early: {error}");
                    }
                    return;
                }
                () = &mut drain, if closing.is_none() => {
                    let now = Instant::now();
                    closing = Some(now);
                    let soon = now + READ_GRACE;
                    let first = activity.expects_first_until();
                    kept_until = Some(first.map_or(soon, |first| first.max(soon)));
                }
                () = &mut timer => {}
            }
        }
    }
}

/// Waits for a TLS handshake. When the drain starts, a client within one is cut off: it has sent no
/// request yet.
async fn handshake(
    handshake: impl Future<Output = io::Result<Stream>>,
    limit: Duration,
    drain: &Drain,
) -> Option<Stream> {
    let shaken = tokio::select! {
        biased;
        () = drain.started() => return None,
        shaken = timeout(limit, handshake) => shaken,
    };
    match shaken {
        Ok(Ok(stream)) => return Some(stream),
        Ok(Err(error)) => tracing::debug!("a TLS handshake failed: {error}"),
        Err(_) => tracing::debug!("a TLS handshake took too long"),
    }
    None
}
