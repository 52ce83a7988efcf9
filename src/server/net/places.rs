//! The places for connections: how many there are, who holds them, and who is evicted for a
//! newcomer.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::task::{AbortHandle, Id, JoinError, JoinSet};
use tokio::time::{sleep, timeout};

use super::activity::Activity;
use crate::server::drain::Shutdown;
use crate::server::http::Peer;
use crate::server::ops::outage::Outage;

/// The default maximum of connections.
const CONNECTIONS: usize = 4096;

/// How often a newcomer looks for an idle connection while all of them have requests in flight.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// The configured limits of connections; `None` stands for the default.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct ConnectionLimits {
    pub(crate) connections: Option<usize>,
    pub(crate) per_peer: Option<usize>,
}

impl ConnectionLimits {
    /// Returns the maximum number of connections, given that the process has room for `room`.
    fn connections(self, room: usize) -> usize {
        self.connections.unwrap_or(CONNECTIONS).min(room).max(1)
    }
}

#[derive(Debug)]
struct Place {
    /// `None` for a peer on a Unix socket.
    peer: Option<Peer>,
    activity: Arc<Activity>,
    task: AbortHandle,
}

/// The open connections.
pub(crate) struct Places {
    tasks: JoinSet<()>,
    taken: HashMap<Id, Place>,
    by_peer: HashMap<Peer, usize>,
    connections: usize,
    per_peer: usize,
    /// Whether the limit for a peer applies to loopback. By default it does not: a local proxy
    /// speaks for many clients.
    loopback_counts: bool,
    crowded: Outage,
    panicked: Outage,
    /// The number of connections, for others to read.
    count: Arc<AtomicUsize>,
}

impl Places {
    pub(crate) fn new(limits: ConnectionLimits, room: usize, count: Arc<AtomicUsize>) -> Self {
        let connections = limits.connections(room);
        if let Some(wanted) = limits.connections
            && wanted > connections
        {
            tracing::warn!(
                wanted,
                connections,
                "there may be fewer connections than configured, by the limit of open files"
            );
        }
        Self {
            tasks: JoinSet::new(),
            taken: HashMap::new(),
            by_peer: HashMap::new(),
            connections,
            per_peer: limits.per_peer.unwrap_or(connections / 4).max(1),
            loopback_counts: limits.per_peer.is_some(),
            crowded: Outage::default(),
            panicked: Outage::default(),
            count,
        }
    }

    /// Waits for room for one more connection of `peer`. Returns `false` if the peer holds as many
    /// places as it may, each with a request in flight. A peer on a Unix socket, which has no
    /// address, has no limit of its own.
    pub(crate) async fn room_for(&mut self, peer: Option<Peer>) -> bool {
        let mut counted = false;
        loop {
            let bounded = peer.filter(|peer| self.loopback_counts || !peer.is_loopback());
            let theirs = peer.and_then(|peer| self.by_peer.get(&peer).copied());
            let theirs = theirs.unwrap_or_default();
            let whose = if bounded.is_some() && theirs >= self.per_peer {
                bounded
            } else if self.taken.len() >= self.connections {
                None
            } else {
                if !counted && let Some(newcomers) = self.crowded.succeeded() {
                    tracing::info!(newcomers, "there is room for connections again");
                }
                return true;
            };
            if !std::mem::replace(&mut counted, true) && self.crowded.failed() {
                tracing::warn!(
                    connections = self.taken.len(),
                    peer = peer.map(tracing::field::display),
                    peers_connections = theirs,
                    "there is no room for a connection; idle ones are closed for new ones"
                );
            }
            match self.evict_idlest(whose) {
                // The task ends in a moment.
                Some(evicted) => {
                    while self.taken.contains_key(&evicted) {
                        self.join_next().await;
                    }
                }
                None if whose.is_some() => return false,
                None => tokio::select! {
                    () = self.join_next() => {}
                    () = sleep(POLL_INTERVAL) => {}
                },
            }
        }
    }

    /// Evicts the connection that has been idle longest, among those of `of` or among all. Returns
    /// its task, if one was idle.
    pub(crate) fn evict_idlest(&self, of: Option<Peer>) -> Option<Id> {
        let places = self.taken.values();
        let candidates = places.filter(|place| of.is_none_or(|peer| place.peer == Some(peer)));
        let (_, idlest) = candidates
            .filter_map(|place| Some((place.activity.idle_since()?, place)))
            .min_by_key(|(since, _)| *since)?;
        // A request may have begun in the meantime, and must not be lost.
        if !idlest.activity.evict() {
            return None;
        }
        tracing::debug!("an idle connection was closed for a new one");
        idlest.task.abort();
        Some(idlest.task.id())
    }

    /// Serves a connection in a place of its own.
    pub(crate) fn spawn(
        &mut self,
        peer: Option<Peer>,
        activity: Arc<Activity>,
        connection: impl Future<Output = ()> + Send + 'static,
    ) {
        let task = self.tasks.spawn(connection);
        if let Some(peer) = peer {
            *self.by_peer.entry(peer).or_default() += 1;
        }
        let id = task.id();
        let place = Place {
            peer,
            activity,
            task,
        };
        self.taken.insert(id, place);
        self.count.store(self.taken.len(), Ordering::Relaxed);
    }

    /// Waits until a connection has ended, and frees its place. Waits forever if there is none.
    pub(crate) async fn join_next(&mut self) {
        match self.tasks.join_next_with_id().await {
            Some(ended) => self.release(ended),
            None => std::future::pending().await,
        }
    }

    fn release(&mut self, ended: Result<(Id, ()), JoinError>) {
        let id = match &ended {
            Ok((id, ())) => *id,
            Err(error) => error.id(),
        };
        // A panic ends only its own connection. The panic hook has already reported it.
        if ended.is_err_and(|error| error.is_panic()) {
            if self.panicked.failed() {
                tracing::error!("a connection was closed by a panic");
            }
        } else if let Some(panics) = self.panicked.succeeded() {
            tracing::info!(panics, "connections end without panics again");
        }
        let Some(place) = self.taken.remove(&id) else {
            return;
        };
        self.count.store(self.taken.len(), Ordering::Relaxed);
        if let Some(peer) = place.peer
            && let Some(count) = self.by_peer.get_mut(&peer)
        {
            *count -= 1;
            if *count == 0 {
                self.by_peer.remove(&peer);
            }
        }
    }

    /// Waits for all connections to end, and cuts those that remain at the deadline.
    pub(crate) async fn drain(mut self, deadline: Duration) -> Shutdown {
        let all = async {
            while let Some(ended) = self.tasks.join_next_with_id().await {
                self.release(ended);
            }
        };
        if timeout(deadline, all).await.is_ok() {
            return Shutdown::Drained;
        }
        let connections = self.tasks.len();
        self.tasks.shutdown().await;
        tracing::warn!(
            connections,
            "the drain timeout is over; connections were cut"
        );
        Shutdown::Aborted { connections }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_are_as_many_as_descriptors_allow() {
        let limits = |connections| ConnectionLimits {
            connections,
            per_peer: None,
        };
        assert_eq!(limits(None).connections(1_000_000), CONNECTIONS);
        assert_eq!(limits(None).connections(800), 800);
        assert_eq!(limits(Some(9000)).connections(1_000_000), 9000);
        assert_eq!(limits(Some(9000)).connections(800), 800);
        assert_eq!(limits(Some(0)).connections(800), 1);
        assert_eq!(
            Places::new(limits(Some(100)), 800, Arc::default()).per_peer,
            25
        );
        assert_eq!(
            Places::new(limits(Some(1)), 800, Arc::default()).per_peer,
            1
        );
    }
}
