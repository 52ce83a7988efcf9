//! What became of attempts to reload a server's settings, for its metrics.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

/// Counts reloads of keys, certificates and whatever else a program replaces while its server runs.
/// Clones share the numbers.
///
/// A failed reload leaves what was in force before, so that only the log and these numbers tell of
/// it. Give it to [`HitlServiceBuilder::reloads`](super::HitlServiceBuilder::reloads).
#[derive(Debug, Clone)]
pub struct Reloads(Arc<Numbers>);

#[derive(Debug)]
struct Numbers {
    failures: AtomicU64,
    /// In seconds since 1970.
    last_success: AtomicU64,
}

impl Reloads {
    /// Begins to count. The settings of the start count as a success.
    pub fn new() -> Self {
        Self(Arc::new(Numbers {
            failures: AtomicU64::new(0),
            last_success: AtomicU64::new(now()),
        }))
    }

    /// Notes a reload after which everything is in force as it was read.
    pub fn succeeded(&self) {
        self.0.last_success.store(now(), Ordering::Relaxed);
    }

    /// Notes a reload of which a part is not in force.
    pub fn failed(&self) {
        self.0.failures.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn failures(&self) -> u64 {
        self.0.failures.load(Ordering::Relaxed)
    }

    /// When the last one succeeded, in seconds since 1970.
    pub(crate) fn last_success(&self) -> u64 {
        self.0.last_success.load(Ordering::Relaxed)
    }
}

impl Default for Reloads {
    fn default() -> Self {
        Self::new()
    }
}

fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.unwrap_or_default().as_secs()
}
