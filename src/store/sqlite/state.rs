//! The state that the writer, the readers and the callers share.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::StoreError;
use crate::store::statistics::{DurationCounter, EventCounter};

/// How long a durable write counts as proof that the next one would succeed.
const FRESH: Duration = Duration::from_millis(50);

#[derive(Debug)]
pub(super) struct State {
    /// Even while the store is ready. It grows with every change, so a reader notices a fault that
    /// came and went.
    epoch: AtomicU64,
    /// Whether the store refuses new requests.
    closing: AtomicBool,
    life: watch::Sender<Life>,
    written: Mutex<Option<Instant>>,
    pub(super) counters: Counters,
}

/// What the store has done since it was opened.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) events: EventCounter,
    /// The actions that were removed.
    pub(super) removed: AtomicU64,
    /// The requests that were sent to the writer, and that it has not taken.
    pub(super) queued: AtomicU64,
    /// The requests of the commits.
    pub(super) requests: AtomicU64,
    pub(super) commits: DurationCounter,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Life {
    Open,
    Closed,
    /// The writer panicked.
    Failed,
}

/// A period in which the store was ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Epoch(u64);

impl State {
    pub(super) fn new() -> Self {
        Self {
            epoch: AtomicU64::new(0),
            closing: AtomicBool::new(false),
            life: watch::Sender::new(Life::Open),
            written: Mutex::new(None),
            counters: Counters::default(),
        }
    }

    /// Returns the current epoch.
    ///
    /// # Errors
    ///
    /// If the store is not ready.
    pub(super) fn epoch(&self) -> Result<Epoch, StoreError> {
        if self.is_closing() {
            return Err(self.closed_error());
        }
        let epoch = self.epoch.load(Ordering::SeqCst);
        if epoch.is_multiple_of(2) {
            Ok(Epoch(epoch))
        } else {
            Err(StoreError::unavailable(
                "the store is recovering from a fault",
            ))
        }
    }

    pub(super) fn is_in(&self, epoch: Epoch) -> bool {
        self.epoch.load(Ordering::SeqCst) == epoch.0
    }

    /// Only the writer calls this and [`set_ready`](Self::set_ready).
    pub(super) fn set_unready(&self) {
        *self.written.lock().unwrap_or_else(PoisonError::into_inner) = None;
        if self.epoch.load(Ordering::SeqCst).is_multiple_of(2) {
            self.epoch.fetch_add(1, Ordering::SeqCst);
        }
    }

    pub(super) fn set_ready(&self) {
        if self.epoch.load(Ordering::SeqCst) % 2 == 1 {
            self.epoch.fetch_add(1, Ordering::SeqCst);
        }
    }

    /// Notes a durable write that began at `begun`.
    pub(super) fn set_written(&self, begun: Instant) {
        *self.written.lock().unwrap_or_else(PoisonError::into_inner) = Some(begun);
    }

    pub(super) fn was_just_written(&self) -> bool {
        let written = *self.written.lock().unwrap_or_else(PoisonError::into_inner);
        written.is_some_and(|written| written.elapsed() < FRESH)
    }

    pub(super) fn set_closing(&self) {
        self.closing.store(true, Ordering::SeqCst);
    }

    pub(super) fn is_closing(&self) -> bool {
        self.closing.load(Ordering::SeqCst)
    }

    pub(super) fn set_closed(&self) {
        self.set_closing();
        self.life.send_if_modified(|life| {
            let is_open = *life == Life::Open;
            if is_open {
                *life = Life::Closed;
            }
            is_open
        });
    }

    /// Notes that the writer panicked.
    pub(super) fn set_failed(&self) {
        self.set_closing();
        self.life.send_replace(Life::Failed);
    }

    pub(super) async fn closed(&self) {
        // The sender is in `self`, so this cannot fail.
        let _ = self
            .life
            .subscribe()
            .wait_for(|life| *life != Life::Open)
            .await;
    }

    pub(super) async fn failed(&self) {
        let _ = self
            .life
            .subscribe()
            .wait_for(|life| *life == Life::Failed)
            .await;
    }

    /// The error for every request that comes too late.
    pub(super) fn closed_error(&self) -> StoreError {
        StoreError::unavailable(match *self.life.borrow() {
            Life::Failed => "the store's writer has failed",
            Life::Open | Life::Closed => "the store is closed",
        })
    }
}
