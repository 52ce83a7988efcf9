//! The shutdown of a server: the signal that starts it, and how it ended.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::sleep;

/// How long a client may do nothing once its connection is to be closed. A live client needs less
/// time, and can send its request again.
pub(crate) const CLOSE_GRACE: Duration = Duration::from_secs(2);

/// How long a connection is read when the drain starts. A request may have arrived of which the
/// runtime does not know yet.
pub(crate) const READ_GRACE: Duration = Duration::from_millis(5);

/// How long a client may take from connecting to its first request when the drain starts: a round
/// trip, and some time for a busy client. Closed before, it would not know what became of the request.
pub(crate) const FIRST_GRACE: Duration = Duration::from_secs(1);

/// The signal that the server is shutting down. Clones share it.
#[derive(Debug, Clone)]
pub(crate) struct Drain(Arc<watch::Sender<bool>>);

impl Drain {
    pub(crate) fn new() -> Self {
        Self(Arc::new(watch::Sender::new(false)))
    }

    pub(crate) fn start(&self) {
        self.0.send_replace(true);
    }

    pub(crate) fn has_started(&self) -> bool {
        *self.0.borrow()
    }

    /// Waits until the drain has started; returns at once if it has.
    pub(crate) async fn started(&self) {
        // `self` keeps the sender alive, so the wait cannot fail.
        _ = self.0.subscribe().wait_for(|started| *started).await;
    }

    /// Waits until clients have had time to finish the requests they were sending when the drain
    /// started.
    pub(crate) async fn grace_is_over(&self) {
        self.started().await;
        sleep(CLOSE_GRACE).await;
    }
}

/// How a server ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
#[non_exhaustive]
pub enum Shutdown {
    /// Every request in flight was answered, as far as its client read the response.
    Drained,
    /// The drain timeout expired, and the connections still open were cut.
    Aborted {
        /// The number of connections that were cut.
        connections: usize,
    },
}

impl Shutdown {
    /// Returns whether every request in flight was answered.
    pub fn is_drained(self) -> bool {
        self == Self::Drained
    }
}
