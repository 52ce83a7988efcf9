//! The one signal by which everything learns that the server is to end.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::sleep;

/// How long a client that the server waits for may do nothing once its connection is to be closed. One that is alive needs
/// less, and what it had to say can be said again.
pub(crate) const CLOSE_GRACE: Duration = Duration::from_secs(2);

/// Whether the server is to end. Clones share it.
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

    /// Waits until it has started; at once if it has.
    pub(crate) async fn started(&self) {
        // The sender lives in `self`, so the wait cannot end in an error.
        _ = self.0.subscribe().wait_for(|started| *started).await;
    }

    /// Waits until clients have had the time to send the rest of what they were sending when it started.
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
    /// Every request in flight was answered, as far as its client took the answer.
    Drained,
    /// The drain timeout was over, and the connections that were still open were cut.
    Aborted {
        /// How many.
        connections: usize,
    },
}

impl Shutdown {
    /// Whether every request in flight was answered.
    pub fn is_drained(self) -> bool {
        self == Self::Drained
    }
}
