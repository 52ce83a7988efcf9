//! The state that the parts of a store share.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use super::fault;
use super::standby::COVERS;
use crate::store::statistics::{DurationCounter, EventCounter};
use crate::store::{Clock, StoreError};

/// How long a durable write counts as proof that the next one would succeed.
const FRESH: Duration = Duration::from_millis(50);

/// How long a reading of the database's clock is carried on.
const CARRIED: Duration = Duration::from_secs(10);

/// How long what a write met counts as being in the way of the next one. A server without traffic then
/// tries again.
const LASTS: Duration = Duration::from_secs(10);

#[derive(Debug)]
pub(super) struct State {
    /// How often it became unsure whether what can be read is durable, and how often of these a
    /// durable write has settled that.
    unsure: AtomicU64,
    sure: AtomicU64,
    is_closing: AtomicBool,
    /// Whether transactions say which tenants they are about.
    is_walled: AtomicBool,
    written: Mutex<Option<Instant>>,
    obstacle: Mutex<Option<Obstacle>>,
    /// Whether commits wait for standbys, and when that was asked.
    standbys: Mutex<Option<(Instant, bool)>>,
    read: Mutex<Option<Reading>>,
    clock: Clock,
    pub(super) events: EventCounter,
    /// The actions that sweeps of this server removed.
    pub(super) removed: AtomicU64,
    /// The operations that are not answered yet.
    pub(super) running: AtomicU64,
    pub(super) requests: AtomicU64,
    pub(super) commits: DurationCounter,
}

/// What was in the way of a write last.
#[derive(Debug)]
struct Obstacle {
    what: &'static str,
    error: StoreError,
    at: tokio::time::Instant,
    /// Whether something was recorded since.
    is_over: bool,
}

/// A reading of the database's clock.
#[derive(Debug, Clone, Copy)]
struct Reading {
    /// When its answer was here.
    at: Instant,
    time: SystemTime,
}

impl Reading {
    fn carried_on(self) -> SystemTime {
        self.time
            .checked_add(self.at.elapsed())
            .unwrap_or(self.time)
    }
}

/// Whether what was begun then still holds for a read.
fn covers(begun: Instant, read: Instant) -> bool {
    read.saturating_duration_since(begun) < COVERS
}

impl State {
    pub(super) fn new(clock: Clock) -> Self {
        Self {
            unsure: AtomicU64::new(1),
            sure: AtomicU64::new(0),
            is_closing: AtomicBool::new(false),
            is_walled: AtomicBool::new(true),
            written: Mutex::new(None),
            obstacle: Mutex::new(None),
            standbys: Mutex::new(None),
            read: Mutex::new(None),
            clock,
            events: EventCounter::default(),
            removed: AtomicU64::new(0),
            running: AtomicU64::new(0),
            requests: AtomicU64::new(0),
            commits: DurationCounter::default(),
        }
    }

    /// Notes that what can be read may not be durable: after a reconnect, or when a commit is not
    /// known to be.
    pub(super) fn set_unsure(&self) {
        *self.written.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.unsure.fetch_add(1, Ordering::SeqCst);
    }

    /// A number that grows whenever it becomes unsure what is durable.
    pub(super) fn doubts(&self) -> u64 {
        self.unsure.load(Ordering::SeqCst)
    }

    pub(super) fn is_sure(&self) -> bool {
        self.sure.load(Ordering::SeqCst) == self.doubts()
    }

    /// Notes a durable write that began when there were so many doubts. It settles them: the log is
    /// durable up to there.
    pub(super) fn set_written(&self, doubts: u64, begun: Instant) {
        self.sure.fetch_max(doubts, Ordering::SeqCst);
        if self.is_sure() {
            let mut written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
            *written = (*written).max(Some(begun));
        }
    }

    pub(super) fn was_just_written(&self) -> bool {
        let written = *self.written.lock().unwrap_or_else(PoisonError::into_inner);
        written.is_some_and(|written| written.elapsed() < FRESH)
    }

    /// Notes an error of a write, if it says what the database lacks. A heartbeat, which takes no room,
    /// may succeed nevertheless.
    pub(super) fn note_obstacle(&self, error: &StoreError) {
        if let Some(what) = fault::lacking(error) {
            self.set_obstacle(what, error.clone());
        }
    }

    fn set_obstacle(&self, what: &'static str, error: StoreError) {
        let at = tokio::time::Instant::now();
        let new = Obstacle {
            what,
            error,
            at,
            is_over: false,
        };
        let mut obstacle = self.obstacle.lock().unwrap_or_else(PoisonError::into_inner);
        let last = obstacle.replace(new);
        drop(obstacle);
        // Once, and not with each request that meets it.
        if last.is_none_or(|last| last.what != what || last.at + LASTS <= at) {
            tracing::warn!(obstacle = what, "the store is unready");
        }
    }

    /// Notes that something was recorded, which took room.
    pub(super) fn set_recorded(&self) {
        let mut obstacle = self.obstacle.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(obstacle) = obstacle.as_mut() {
            obstacle.is_over = true;
        }
    }

    /// What is in the way of writes, as far as is known.
    pub(super) fn obstacle(&self) -> Option<StoreError> {
        let obstacle = self.obstacle.lock().unwrap_or_else(PoisonError::into_inner);
        let obstacle = obstacle.as_ref()?;
        let lasts = !obstacle.is_over && obstacle.at.elapsed() < LASTS;
        lasts.then(|| obstacle.error.clone())
    }

    /// Notes whether commits wait for standbys, which was asked then.
    pub(super) fn set_standbys(&self, wait: bool, asked: Instant) {
        *self.standbys.lock().unwrap_or_else(PoisonError::into_inner) = Some((asked, wait));
    }

    /// Whether that is known, as of `read`.
    pub(super) fn knows_standbys(&self, read: Instant) -> bool {
        let standbys = *self.standbys.lock().unwrap_or_else(PoisonError::into_inner);
        standbys.is_some_and(|(asked, _)| covers(asked, read))
    }

    /// Whether no failover loses what was read at that time: a durable write covers it, or there are
    /// no standbys.
    pub(super) fn is_covered(&self, read: Instant) -> bool {
        let standbys = *self.standbys.lock().unwrap_or_else(PoisonError::into_inner);
        let written = *self.written.lock().unwrap_or_else(PoisonError::into_inner);
        standbys.is_some_and(|(asked, wait)| !wait && covers(asked, read))
            || written.is_some_and(|begun| covers(begun, read))
    }

    pub(super) fn set_walled(&self, is_walled: bool) {
        self.is_walled.store(is_walled, Ordering::SeqCst);
    }

    pub(super) fn is_walled(&self) -> bool {
        self.is_walled.load(Ordering::SeqCst)
    }

    pub(super) fn set_closing(&self) {
        self.is_closing.store(true, Ordering::SeqCst);
    }

    pub(super) fn is_closing(&self) -> bool {
        self.is_closing.load(Ordering::SeqCst)
    }

    /// Notes what the database's clock showed just now, and returns the time by it.
    pub(super) fn set_time(&self, time: SystemTime) -> SystemTime {
        let new = Reading {
            at: Instant::now(),
            time,
        };
        let mut read = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        // An answer takes its time, so the later of two readings is the closer one. Neither is ahead
        // of the database's clock, unless that was set back.
        if read.is_none_or(|read| read.at.elapsed() > CARRIED || read.carried_on() < time) {
            *read = Some(new);
        }
        self.clock.shown_at(time)
    }

    /// The time by the database's clock, without asking. It is behind by less than an answer takes.
    pub(super) fn now(&self) -> SystemTime {
        let read = *self.read.lock().unwrap_or_else(PoisonError::into_inner);
        let time = read.map_or_else(SystemTime::now, Reading::carried_on);
        self.clock.shown_at(time)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn an_obstacle_is_in_the_way_until_something_is_recorded_or_for_a_while() {
        let state = State::new(Clock::new());
        let meet = || state.set_obstacle("full", StoreError::unavailable("full"));
        assert!(state.obstacle().is_none());
        meet();
        // A heartbeat is no proof of room.
        state.set_written(state.doubts(), Instant::now());
        assert_eq!(state.obstacle().unwrap().to_string(), "full");
        state.set_recorded();
        assert!(state.obstacle().is_none());

        meet();
        tokio::time::advance(LASTS - Duration::from_millis(1)).await;
        assert!(state.obstacle().is_some());
        tokio::time::advance(Duration::from_millis(1)).await;
        assert!(state.obstacle().is_none());
    }
}
