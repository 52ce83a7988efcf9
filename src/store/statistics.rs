//! What a store counts while it is open.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::protocol::EventKind;

/// What a store has done since it was opened.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Statistics {
    /// The number of transitions that this store recorded, for each kind of event.
    pub events: Vec<(EventKind, u64)>,
    /// The number of actions that this store removed.
    pub removed: u64,
    /// The state of the writer, if the store has one.
    pub writer: Option<WriterStatistics>,
    /// The state of the connections to a database server, if the store has one.
    pub connections: Option<ConnectionStatistics>,
}

/// The connections of a store to its database server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct ConnectionStatistics {
    /// The most connections, beside the one that listens.
    pub limit: u64,
    /// The connections that are open and free.
    pub idle: u64,
    /// The connections that are in use.
    pub busy: u64,
    /// The requests that wait for a connection. Each is refused after 5 s.
    pub waiting: u64,
}

/// What the writer of an embedded store has done since the store was opened.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct WriterStatistics {
    /// Whether the database takes writes, as far as the writer knows.
    pub is_ready: bool,
    /// The number of requests that wait for the writer.
    pub queued: u64,
    /// The number of requests that the commits below made durable.
    pub requests: u64,
    /// How long each commit took that recorded something, its fsync included.
    pub commits: Durations,
}

/// How long something took, each time: a histogram.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Durations {
    /// How often it happened.
    pub count: u64,
    /// How long it took in total.
    pub total: Duration,
    /// The upper bounds of the buckets, in order, each with the number of times within it and
    /// above the bound before it. What took longer than the last bound is in `count` only.
    pub buckets: Vec<(Duration, u64)>,
}

/// The upper bounds of the buckets, in microseconds: from a fast fsync to the longest wait for a
/// decision.
const BOUNDS: [u64; 16] = [
    100, 250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000,
    1_000_000, 2_500_000, 10_000_000, 60_000_000,
];

/// Counts durations, without a lock.
#[derive(Debug, Default)]
pub(crate) struct DurationCounter {
    nanos: AtomicU64,
    buckets: [AtomicU64; BOUNDS.len()],
    beyond: AtomicU64,
}

impl DurationCounter {
    pub(crate) fn add(&self, duration: Duration) {
        let nanos = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        let index = BOUNDS.partition_point(|bound| bound.saturating_mul(1000) < nanos);
        let bucket = self.buckets.get(index).unwrap_or(&self.beyond);
        bucket.fetch_add(1, Ordering::Relaxed);
        self.nanos.fetch_add(nanos, Ordering::Relaxed);
    }

    pub(crate) fn read(&self) -> Durations {
        let total = Duration::from_nanos(self.nanos.load(Ordering::Relaxed));
        let buckets = BOUNDS.into_iter().map(Duration::from_micros);
        let counts = self
            .buckets
            .iter()
            .map(|count| count.load(Ordering::Relaxed));
        let buckets: Vec<_> = buckets.zip(counts).collect();
        let within: u64 = buckets.iter().map(|(_, count)| count).sum();
        Durations {
            count: within + self.beyond.load(Ordering::Relaxed),
            total,
            buckets,
        }
    }
}

/// The kinds of events that a store records, in the order of the enum.
const KINDS: [EventKind; 9] = [
    EventKind::Submitted,
    EventKind::Approved,
    EventKind::Rejected,
    EventKind::Expired,
    EventKind::Cancelled,
    EventKind::Claimed,
    EventKind::Completed,
    EventKind::Failed,
    EventKind::ClaimLost,
];

/// Counts events by their kind, without a lock.
#[derive(Debug, Default)]
pub(crate) struct EventCounter([AtomicU64; KINDS.len()]);

impl EventCounter {
    pub(crate) fn add(&self, kind: EventKind) {
        if let Some(count) = self.0.get(kind as usize) {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }

    pub(crate) fn read(&self) -> Vec<(EventKind, u64)> {
        let counts = self.0.iter().map(|count| count.load(Ordering::Relaxed));
        KINDS.into_iter().zip(counts).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_duration_is_counted_in_the_bucket_whose_bound_it_reaches() {
        let counter = DurationCounter::default();
        for micros in [0, 100, 101, 60_000_000, 60_000_001] {
            counter.add(Duration::from_micros(micros));
        }
        let read = counter.read();
        assert_eq!(read.count, 5);
        assert_eq!(read.total, Duration::from_micros(120_000_202));
        let counts: Vec<_> = read.buckets.iter().map(|(_, count)| *count).collect();
        assert_eq!(counts[..3], [2, 1, 0]);
        assert_eq!(counts[15], 1);
    }

    #[test]
    fn each_kind_of_event_is_counted_as_itself() {
        let counter = EventCounter::default();
        for (times, kind) in (1..).zip(KINDS) {
            (0..times).for_each(|_| counter.add(kind));
        }
        counter.add(EventKind::Other);
        let expected: Vec<_> = KINDS.into_iter().zip(1..).collect();
        assert_eq!(counter.read(), expected);
    }
}
