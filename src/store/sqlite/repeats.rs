//! The calls that changed nothing.
//!
//! Such a call has no event. Writing each of them down would let a caller that repeats itself fill
//! the disk, so only the newest [`MOST`] are kept, and only in memory.

use std::collections::{HashSet, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};

use uuid::Uuid;

/// The most calls that are remembered. They take about 1 MiB.
pub(super) const MOST: usize = if cfg!(test) { 64 } else { 16_384 };

/// A call, and the row of the action in its answer.
pub(super) type Repeat = (Uuid, i64);

/// The newest calls that changed nothing, each once.
#[derive(Debug, Default)]
pub(super) struct Repeats(Mutex<Newest>);

#[derive(Debug, Default)]
struct Newest {
    order: VecDeque<Repeat>,
    known: HashSet<Repeat>,
}

impl Repeats {
    pub(super) fn add(&self, repeats: &[Repeat]) {
        if repeats.is_empty() {
            return;
        }
        let mut newest = self.newest();
        for repeat in repeats {
            newest.add(*repeat);
        }
    }

    /// The rows of the actions in the answers to a call.
    pub(super) fn of(&self, call: Uuid) -> Vec<i64> {
        let newest = self.newest();
        let of = newest.order.iter().filter(|(named, _)| *named == call);
        of.map(|(_, row)| *row).collect()
    }

    fn newest(&self) -> MutexGuard<'_, Newest> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Newest {
    fn add(&mut self, repeat: Repeat) {
        if !self.known.insert(repeat) {
            return;
        }
        if self.order.len() == MOST
            && let Some(oldest) = self.order.pop_front()
        {
            self.known.remove(&oldest);
        }
        self.order.push_back(repeat);
    }
}
