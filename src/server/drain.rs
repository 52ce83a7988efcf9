//! The one signal by which everything learns that the server is to end.

use std::sync::Arc;

use tokio::sync::watch;

/// Whether the server is to end. Clones share it.
#[derive(Debug, Clone)]
pub(super) struct Drain(Arc<watch::Sender<bool>>);

impl Drain {
    pub(super) fn new() -> Self {
        Self(Arc::new(watch::Sender::new(false)))
    }

    pub(super) fn start(&self) {
        self.0.send_replace(true);
    }

    pub(super) fn has_started(&self) -> bool {
        *self.0.borrow()
    }

    /// Waits until it has started; at once if it has.
    pub(super) async fn started(&self) {
        // The sender lives in `self`, so the wait cannot end in an error.
        _ = self.0.subscribe().wait_for(|started| *started).await;
    }
}
