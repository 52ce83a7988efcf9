//! Accepts connections, and ends each that keeps the server waiting.

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use http::{Request, Response};
use http_body::Body;
use hyper::body::Incoming;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::task::{JoinError, JoinSet};
use tokio::time::{sleep, timeout};
use tower_service::Service;

use super::activity::{Activity, Patience};
use super::connection::{self, BoxError, Connection};
use super::drain::Drain;
use super::serve::Shutdown;

/// The pause after the first failure to accept, doubled up to the longest one.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    pub(super) patience: Patience,
    pub(super) max_connections: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            patience: Patience {
                idle: Duration::from_secs(8),
                write: Duration::from_secs(30),
            },
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
    let http = Arc::new(connection::http(limits.patience));
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
                    patience: limits.patience,
                    activity: Arc::new(Activity::new()),
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
