//! What an outbox delivered, for the metrics of a server.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The endpoints that an [`Outbox`](super::Outbox) delivers to, and what became of the deliveries
/// since it was started. Clones share the numbers.
///
/// Give it to [`HitlServiceBuilder::webhooks`](crate::server::HitlServiceBuilder::webhooks), and the
/// metrics of the server have these endpoints.
#[derive(Debug, Clone, Default)]
pub struct Tally(Arc<Mutex<BTreeMap<String, Arc<Counters>>>>);

/// What became of the deliveries to one endpoint.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    delivered: AtomicU64,
    failed: AtomicU64,
    dead: AtomicU64,
}

impl Counters {
    /// Counts an attempt.
    pub(super) fn attempted(&self, is_delivered: bool) {
        let count = if is_delivered {
            &self.delivered
        } else {
            &self.failed
        };
        count.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a dead letter.
    pub(super) fn gave_up(&self) {
        self.dead.fetch_add(1, Ordering::Relaxed);
    }

    /// The numbers of attempts that were accepted and of those that failed, and of dead letters,
    /// each under its name.
    pub(crate) fn outcomes(&self) -> [(&'static str, u64); 3] {
        [
            ("delivered", self.delivered.load(Ordering::Relaxed)),
            ("failed", self.failed.load(Ordering::Relaxed)),
            ("dead", self.dead.load(Ordering::Relaxed)),
        ]
    }
}

impl Tally {
    /// Returns the counters of an endpoint that is delivered to from now on.
    pub(super) fn add(&self, endpoint: &str) -> Arc<Counters> {
        self.lock().entry(endpoint.to_owned()).or_default().clone()
    }

    /// Forgets an endpoint that is not delivered to any more.
    pub(super) fn remove(&self, endpoint: &str) {
        self.lock().remove(endpoint);
    }

    /// The endpoints, by name.
    pub(crate) fn read(&self) -> BTreeMap<String, Arc<Counters>> {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Counters>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
