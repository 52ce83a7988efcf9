//! The clock that a store takes its times from.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The system's clock, which tests can set forward and back.
///
/// Clones share their setting.
#[derive(Debug, Clone, Default)]
pub struct Clock {
    /// Where a clock stands that only tests move. The system's time without one.
    stands_at: Option<SystemTime>,
    /// In microseconds.
    offset: Arc<AtomicI64>,
}

impl Clock {
    /// Makes a clock that shows the system's time.
    pub fn new() -> Self {
        Self::default()
    }

    /// Makes a clock that stands still unless it is set, for a test.
    #[cfg(any(test, feature = "test-util"))]
    pub fn standing_at(time: SystemTime) -> Self {
        Self {
            stands_at: Some(time),
            ..Self::default()
        }
    }

    /// Sets the clock forward, for a test.
    #[cfg(any(test, feature = "test-util"))]
    pub fn advance(&self, by: Duration) {
        self.offset.fetch_add(micros(by), Ordering::SeqCst);
    }

    /// Sets the clock back, for a test.
    #[cfg(any(test, feature = "test-util"))]
    pub fn set_back(&self, by: Duration) {
        self.offset.fetch_sub(micros(by), Ordering::SeqCst);
    }

    /// Returns the time in whole microseconds, the resolution of every store.
    pub fn now(&self) -> SystemTime {
        self.shown_at(SystemTime::now())
    }

    /// Returns what this clock shows when the true time, by the clock of a database, is `time`.
    pub(crate) fn shown_at(&self, time: SystemTime) -> SystemTime {
        let now = whole_micros(self.stands_at.unwrap_or(time));
        let offset = self.offset.load(Ordering::SeqCst);
        let distance = Duration::from_micros(offset.unsigned_abs());
        let moved = if offset < 0 {
            now.checked_sub(distance)
        } else {
            now.checked_add(distance)
        };
        moved.unwrap_or(now)
    }
}

/// Cuts a time to the resolution of every store, so that what is answered first is what is on
/// record. A time before 1970 becomes 1970.
pub(crate) fn whole_micros(time: SystemTime) -> SystemTime {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let rest = Duration::from_nanos(u64::from(since.subsec_nanos() % 1000));
    UNIX_EPOCH + (since - rest)
}

#[cfg(any(test, feature = "test-util"))]
fn micros(by: Duration) -> i64 {
    i64::try_from(by.as_micros()).unwrap_or(i64::MAX)
}
