//! What one step of a sweep looks at, and what it changes.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::SystemTime;

use crate::store::operation::{Aged, Endpoint, Undelivered};

#[derive(Debug, Default, Clone)]
pub(in crate::store::postgres) struct Step {
    /// The position up to which sweeps have come.
    pub(in crate::store::postgres) position: u64,
    /// The position of the last event that was read in order, if there are more.
    end: Option<u64>,
    endpoints: Vec<Endpoint>,
    names: HashMap<String, i64>,
    /// The times of events by position.
    events: BTreeMap<u64, SystemTime>,
    /// The newest events of actions that may be over.
    aged: HashMap<u64, Aged>,
    /// What the endpoint in a row has parked of the action in a row.
    parked: HashMap<(i64, i64), Undelivered>,
    /// The position up to which events are in the audit chain.
    pub(in crate::store::postgres) chained: u64,
    /// The row of the newest action, if that was read.
    pub(in crate::store::postgres) newest_action: Option<i64>,
    /// What is looked at again, as it was read, and as it is changed.
    before: BTreeSet<(SystemTime, u64)>,
    postponed: BTreeSet<(SystemTime, u64)>,
    /// The rows of the actions that go.
    removed: Vec<i64>,
    has_moved: bool,
}

impl Step {
    /// Begins behind this position, with these events, of which up to `looks` were read in order.
    /// Another one is the newest of all.
    pub(super) fn new(position: u64, looks: usize, events: BTreeMap<u64, SystemTime>) -> Self {
        let mut behind = events.range(position.saturating_add(1)..);
        let end = behind.nth(looks.saturating_sub(1)).map(|(end, _)| *end);
        Self {
            position,
            end: end.filter(|_| behind.next().is_some()),
            events,
            ..Self::default()
        }
    }

    /// The position of the last event that may have to be looked at: it is old enough, and not the
    /// newest. No chain need be longer.
    pub(super) fn last_old(&self, before: SystemTime, newest: u64) -> u64 {
        let mut events = self.events.range(..newest).rev();
        let last = events.find(|(_, at)| **at <= before);
        last.map_or(0, |(position, _)| *position)
    }

    pub(super) fn add_endpoint(&mut self, name: String, endpoint: Endpoint) {
        self.names.insert(name, endpoint.row);
        self.endpoints.push(endpoint);
    }

    pub(super) fn add_postponed(&mut self, until: SystemTime, position: u64) {
        self.before.insert((until, position));
        self.postponed.insert((until, position));
    }

    pub(super) fn add_parked(&mut self, endpoint: &str, action: i64, parked: Undelivered) {
        if let Some(endpoint) = self.names.get(endpoint) {
            self.parked.entry((*endpoint, action)).or_insert(parked);
        }
    }

    pub(super) fn set_aged(&mut self, position: u64, aged: Aged) {
        self.aged.insert(position, aged);
    }

    /// Takes the event at a position for one that is of no interest.
    pub(super) fn leave(&mut self, position: u64) {
        self.aged.remove(&position);
    }

    /// Whether it has looked at all that was read, and there is more.
    pub(super) fn is_at_its_end(&self) -> bool {
        self.end == Some(self.position)
    }

    pub(in crate::store::postgres) fn has_changed(&self) -> bool {
        self.has_moved || !self.removed.is_empty() || self.before != self.postponed
    }

    /// The rows of the actions that go.
    pub(super) fn removed(&self) -> &[i64] {
        &self.removed
    }

    /// What is looked at again at a time, and was not before.
    pub(super) fn newly_postponed(&self) -> impl Iterator<Item = (SystemTime, u64)> {
        self.postponed.difference(&self.before).copied()
    }

    /// What is not looked at again any more, or at another time.
    pub(super) fn looked_at(&self) -> impl Iterator<Item = (SystemTime, u64)> {
        self.before.difference(&self.postponed).copied()
    }
}

/// What [`Ledger`](crate::store::operation::Ledger) asks of a sweep.
impl Step {
    pub(in crate::store::postgres) fn endpoints(&self) -> &[Endpoint] {
        &self.endpoints
    }

    pub(in crate::store::postgres) fn events_between(
        &self,
        after: u64,
        last: u64,
        limit: usize,
    ) -> Vec<(u64, SystemTime)> {
        let behind = self.events.range(after.saturating_add(1)..);
        let between = behind.take_while(|(position, _)| **position <= last);
        between
            .take(limit)
            .map(|(position, at)| (*position, *at))
            .collect()
    }

    pub(in crate::store::postgres) fn aged(&self, position: u64) -> Option<Aged> {
        self.aged.get(&position).copied()
    }

    pub(in crate::store::postgres) fn first_parked(
        &self,
        endpoint: &Endpoint,
        position: u64,
    ) -> Option<&Undelivered> {
        match self.aged(position)? {
            Aged::Free { row, .. } => self.parked.get(&(endpoint.row, row)),
            Aged::Busy => None,
        }
    }

    pub(in crate::store::postgres) fn remove(&mut self, row: i64) {
        self.removed.push(row);
    }

    pub(in crate::store::postgres) fn set_position(&mut self, position: u64) {
        self.position = position;
        self.has_moved = true;
    }

    pub(in crate::store::postgres) fn postpone(&mut self, until: SystemTime, position: u64) {
        self.postponed.insert((until, position));
    }

    pub(in crate::store::postgres) fn postponed(
        &self,
        time: SystemTime,
        limit: usize,
    ) -> Vec<(SystemTime, u64)> {
        let due = self
            .postponed
            .iter()
            .take_while(|(until, _)| *until <= time);
        due.take(limit).copied().collect()
    }

    pub(in crate::store::postgres) fn remove_postponed(
        &mut self,
        until: SystemTime,
        position: u64,
    ) {
        self.postponed.remove(&(until, position));
    }
}
