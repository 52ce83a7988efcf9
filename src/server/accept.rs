//! Accepts connections, and ends each that keeps the server waiting.

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use http::{Request, Response};
use http_body::Body;
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::{JoinError, JoinSet};
use tokio::time::{sleep, timeout};
use tower_service::Service;

use super::drain::Drain;
use super::patience::Patience;
use super::serve::Shutdown;

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// The most bytes of headers that a request may have, over HTTP/1.1 with its first line.
const MAX_HEADER_BYTES: u32 = 32 * 1024;

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

/// The pause after the first failure to accept, doubled up to the longest one.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    pub(super) header_timeout: Duration,
    pub(super) write_timeout: Duration,
    pub(super) max_connections: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            header_timeout: Duration::from_secs(8),
            write_timeout: Duration::from_secs(30),
            max_connections: 4096,
        }
    }
}

/// Accepts connections until `shutdown` completes, and then starts to drain. Returns the connections that are left.
pub(super) async fn run<S, B>(
    listener: TcpListener,
    limits: Limits,
    service: S,
    drain: Drain,
    shutdown: impl Future<Output = ()>,
) -> Connections
where
    S: Service<Request<Incoming>, Response = Response<B>, Error = Infallible>,
    S: Clone + Send + 'static,
    S::Future: Send + 'static,
    B: Body<Error: Into<BoxError>, Data: Send> + Send + 'static,
{
    let mut shutdown = pin!(shutdown);
    let places = limits.max_connections.clamp(1, Semaphore::MAX_PERMITS);
    let places = Arc::new(Semaphore::new(places));
    let http = Arc::new(http(&limits));
    let mut connections = Connections(JoinSet::new());
    let mut pause = FIRST_PAUSE;
    loop {
        let place = Arc::clone(&places).acquire_owned();
        let next = async {
            // The semaphore is never closed.
            let place = place.await.ok();
            (listener.accept().await, place)
        };
        let (accepted, place) = tokio::select! {
            biased;
            () = &mut shutdown => break,
            Some(ended) = connections.0.join_next() => {
                note(ended);
                continue;
            }
            next = next => next,
        };
        match accepted {
            Ok((stream, _)) => {
                pause = FIRST_PAUSE;
                let connection = Connection {
                    stream,
                    http: Arc::clone(&http),
                    limits,
                    drain: drain.clone(),
                };
                let service = service.clone();
                connections.0.spawn(async move {
                    connection.serve(service).await;
                    drop(place);
                });
            }
            Err(error) if is_of_one_connection(&error) => {}
            Err(error) => {
                // Most often there are no file descriptors left: connections have to end before it can get better.
                tracing::warn!("cannot accept connections: {error}");
                tokio::select! {
                    () = &mut shutdown => break,
                    () = sleep(pause) => {}
                }
                pause = (pause * 2).min(LONGEST_PAUSE);
            }
        }
    }
    drain.start();
    connections
}

fn http(limits: &Limits) -> auto::Builder<TokioExecutor> {
    let mut http = auto::Builder::new(TokioExecutor::new());
    // The number of headers stays at hyper's own limit of 100: to set it would cost an allocation for each request.
    http.http1()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.header_timeout)
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

/// Whether the error says something of the connection that was to be accepted, and nothing of the listener.
fn is_of_one_connection(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionRefused
            | io::ErrorKind::Interrupted
    )
}

/// A panic ends its own connection. The hook that printed it is the process's business; that it happened is logged here.
fn note(ended: Result<(), JoinError>) {
    if ended.is_err_and(|error| error.is_panic()) {
        tracing::error!("a connection was closed by a panic");
    }
}

/// The connections that are open.
pub(super) struct Connections(JoinSet<()>);

impl Connections {
    /// Waits for them to end, and cuts those that have not at the deadline.
    pub(super) async fn end(mut self, deadline: Duration) -> Shutdown {
        let all = async {
            while let Some(ended) = self.0.join_next().await {
                note(ended);
            }
        };
        if timeout(deadline, all).await.is_ok() {
            return Shutdown::Drained;
        }
        let connections = self.0.len();
        self.0.shutdown().await;
        tracing::warn!(
            connections,
            "the drain timeout is over; connections were cut"
        );
        Shutdown::Aborted { connections }
    }
}

struct Connection {
    stream: TcpStream,
    http: Arc<auto::Builder<TokioExecutor>>,
    limits: Limits,
    drain: Drain,
}

impl Connection {
    async fn serve<S, B>(self, service: S)
    where
        S: Service<Request<Incoming>, Response = Response<B>, Error = Infallible>,
        S: Clone + Send + 'static,
        S::Future: Send + 'static,
        B: Body<Error: Into<BoxError>, Data: Send> + Send + 'static,
    {
        // Answers are small and complete: there is nothing to wait for.
        _ = self.stream.set_nodelay(true);
        let asked = Arc::new(AtomicBool::new(false));
        let service = Noting {
            service: TowerToHyperService::new(service),
            asked: Arc::clone(&asked),
        };
        let io = Patience::new(TokioIo::new(self.stream), self.limits.write_timeout);
        let mut connection = pin!(self.http.serve_connection(io, service));
        // hyper's own timeout begins once the version is known, and HTTP/2 has none.
        let mut first_request = pin!(sleep(self.limits.header_timeout));
        let mut is_watched = true;
        let mut drain = pin!(self.drain.started());
        let mut is_draining = false;
        loop {
            tokio::select! {
                biased;
                () = &mut drain, if !is_draining => {
                    is_draining = true;
                    connection.as_mut().graceful_shutdown();
                }
                ended = &mut connection => {
                    if let Err(error) = ended {
                        tracing::debug!("a connection ended early: {error}");
                    }
                    return;
                }
                () = &mut first_request, if is_watched => {
                    if !asked.load(Ordering::Relaxed) {
                        tracing::debug!("a connection sent no request in time");
                        return;
                    }
                    is_watched = false;
                }
            }
        }
    }
}

/// Notes that a request has started.
struct Noting<S> {
    service: S,
    asked: Arc<AtomicBool>,
}

impl<S, R> hyper::service::Service<R> for Noting<S>
where
    S: hyper::service::Service<R>,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn call(&self, request: R) -> S::Future {
        self.asked.store(true, Ordering::Relaxed);
        self.service.call(request)
    }
}
