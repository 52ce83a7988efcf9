//! The calls that changed nothing.
//!
//! Such a call has no event. Writing each of them down would let a caller that repeats itself fill
//! the disk, so only the newest [`MOST`] are kept, and only in memory.

use std::collections::{HashSet, VecDeque};
use std::hash::Hash;
use std::sync::{Mutex, MutexGuard, PoisonError};

use uuid::Uuid;

/// The most calls that are remembered. They take about 1 MiB.
pub(crate) const MOST: usize = if cfg!(test) { 64 } else { 16_384 };

/// A call, and the action in its answer: the number of its row, or another key of a store.
pub(crate) type Repeat<A = i64> = (Uuid, A);

/// The newest calls that changed nothing, each once.
#[derive(Debug)]
pub(crate) struct Repeats<A = i64>(Mutex<Newest<A>>);

#[derive(Debug)]
struct Newest<A> {
    order: VecDeque<Repeat<A>>,
    known: HashSet<Repeat<A>>,
}

impl<A> Default for Repeats<A> {
    fn default() -> Self {
        Self(Mutex::new(Newest {
            order: VecDeque::new(),
            known: HashSet::new(),
        }))
    }
}

impl<A: Clone + Eq + Hash> Repeats<A> {
    pub(crate) fn add(&self, repeats: &[Repeat<A>]) {
        if repeats.is_empty() {
            return;
        }
        let mut newest = self.newest();
        for repeat in repeats {
            newest.add(repeat.clone());
        }
    }

    /// The actions in the answers to a call.
    pub(crate) fn of(&self, call: Uuid) -> Vec<A> {
        let newest = self.newest();
        let of = newest.order.iter().filter(|(named, _)| *named == call);
        of.map(|(_, action)| action.clone()).collect()
    }

    fn newest(&self) -> MutexGuard<'_, Newest<A>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<A: Clone + Eq + Hash> Newest<A> {
    fn add(&mut self, repeat: Repeat<A>) {
        if !self.known.insert(repeat.clone()) {
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
