//! How far an endpoint has come: events end in any order, and the position follows.

use std::collections::VecDeque;

/// The events that were read and may not be done, in order.
#[derive(Debug)]
pub(super) struct Window {
    position: u64,
    events: VecDeque<(u64, bool)>,
}

impl Window {
    /// Begins behind a position.
    pub(super) fn new(position: u64) -> Self {
        Self {
            position,
            events: VecDeque::new(),
        }
    }

    /// Adds an event that was read, behind all others.
    pub(super) fn add(&mut self, position: u64) {
        self.events.push_back((position, false));
    }

    /// Notes that an event is delivered, parked, or not the endpoint's.
    pub(super) fn done(&mut self, position: u64) {
        if let Ok(at) = self.events.binary_search_by_key(&position, |event| event.0)
            && let Some(event) = self.events.get_mut(at)
        {
            event.1 = true;
        }
        while let Some((position, true)) = self.events.front() {
            self.position = *position;
            self.events.pop_front();
        }
    }

    /// The position up to which every event is done.
    pub(super) fn position(&self) -> u64 {
        self.position
    }

    /// The position up to which events were read.
    pub(super) fn read(&self) -> u64 {
        self.events.back().map_or(self.position, |event| event.0)
    }

    /// The number of events from the first on that is not done.
    pub(super) fn len(&self) -> usize {
        self.events.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_position_stays_before_the_first_event_that_is_not_done() {
        let mut window = Window::new(4);
        for position in [5, 7, 8, 11] {
            window.add(position);
        }
        window.done(7);
        window.done(11);
        assert_eq!((window.position(), window.read(), window.len()), (4, 11, 4));
        window.done(5);
        assert_eq!((window.position(), window.len()), (7, 2));
        // What is not in it, or is done already, changes nothing.
        for position in [0, 5, 6, 7, 12] {
            window.done(position);
        }
        assert_eq!((window.position(), window.len()), (7, 2));
        window.done(8);
        assert_eq!(
            (window.position(), window.read(), window.len()),
            (11, 11, 0)
        );
    }
}
