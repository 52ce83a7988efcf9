//! The accept loop.

use std::convert::Infallible;
use std::future::Future;
use std::net::IpAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use http::{Request, Response};
use http_body::Body;
use hyper::body::Incoming;
use tokio::time::sleep;
use tower_service::Service;

use super::activity::{Activity, Timeouts};
use super::connection::{self, Connection};
use super::places::Places;
use super::socket::{Listener, is_of_one_connection};
use super::tls::Acceptor;
use crate::protocol::BoxError;
use crate::server::drain::Drain;
use crate::server::http::Peer;
use crate::server::ops::outage::Outage;

/// The pause after the first failure to accept. It doubles with each further failure, up to
/// `LONGEST_PAUSE`.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// The most waiting connections that are still accepted when the drain starts, as more may come
/// meanwhile.
const MAX_WAITING: usize = 4096;

/// Accepts connections until `shutdown` completes, and then starts the drain. Those that wait to be
/// accepted then are served too: a reset would not tell their clients what became of a request. Each is served by a
/// service for the address of its peer, which a peer on a Unix socket does not have. Returns the
/// connections still open.
pub(crate) async fn run<S, B>(
    listener: Listener,
    tls: Option<Acceptor>,
    mut places: Places,
    timeouts: Timeouts,
    service_for: impl Fn(Option<IpAddr>) -> S,
    drain: Drain,
    shutdown: impl Future<Output = ()>,
) -> Places
where
    S: Service<Request<Incoming>, Response = Response<B>, Error = Infallible>,
    S: Clone + Send + 'static,
    S::Future: Send + 'static,
    B: Body<Error: Into<BoxError>, Data: Send> + Send + 'static,
{
    let mut shutdown = pin!(shutdown);
    let http = Arc::new(connection::http(timeouts));
    let outage = Outage::default();
    let mut pause = FIRST_PAUSE;
    let spawn = |places: &mut Places, socket, address: Option<IpAddr>| {
        let activity = Arc::new(Activity::new());
        let connection = Connection {
            socket,
            tls: tls.clone(),
            http: Arc::clone(&http),
            timeouts,
            activity: Arc::clone(&activity),
            drain: drain.clone(),
        };
        let service = service_for(address);
        places.spawn(address.map(Peer::of), activity, connection.serve(service));
    };
    loop {
        let accepted = tokio::select! {
            biased;
            () = &mut shutdown => break,
            () = places.join_next() => continue,
            accepted = listener.accept() => accepted,
        };
        let (socket, address) = match accepted {
            Ok(accepted) => accepted,
            Err(error) if is_of_one_connection(&error) => continue,
            Err(error) => {
                // The usual cause is a lack of file descriptors, so a connection has to end first.
                if outage.failed() {
                    tracing::warn!("cannot accept connections: {error}");
                }
                places.evict_idlest(None);
                tokio::select! {
                    () = &mut shutdown => break,
                    () = sleep(pause) => {}
                }
                pause = (pause * 2).min(LONGEST_PAUSE);
                continue;
            }
        };
        pause = FIRST_PAUSE;
        if let Some(failures) = outage.succeeded() {
            tracing::info!(failures, "connections are accepted again");
        }
        let has_room = tokio::select! {
            biased;
            has_room = places.room_for(address.map(Peer::of)) => has_room,
            () = &mut shutdown => break,
        };
        if has_room {
            spawn(&mut places, socket, address);
        }
    }
    drain.start();
    match listener.into_waiting() {
        Ok(waiting) => {
            for (socket, address) in waiting.take(MAX_WAITING) {
                let has_room = tokio::select! {
                    biased;
                    has_room = places.room_for(address.map(Peer::of)) => has_room,
                    () = std::future::ready(()) => false,
                };
                if has_room {
                    spawn(&mut places, socket, address);
                }
            }
        }
        Err(error) => tracing::debug!("waiting connections are not accepted: {error}"),
    }
    places
}
