//! The pace of chaining: behind the decisions, which have the machine.

use std::time::Duration;

/// How long the chainer waits for further events before it chains them together.
pub(crate) const GATHER: Duration = Duration::from_secs(1);

/// How many times as long as it has worked the chainer rests, while more events can be chained at
/// once.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pace {
    /// While requests wait.
    pub(crate) busy: u32,
    /// While none does.
    pub(crate) idle: u32,
}

impl Pace {
    /// How long the chainer rests after a step that took so long.
    pub(crate) fn rest(self, took: Duration, has_more: bool, is_busy: bool) -> Duration {
        match (has_more, is_busy) {
            (true, true) => took * self.busy,
            (true, false) => took * self.idle,
            (false, _) => GATHER,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decisions_have_the_machine_and_a_chain_that_is_whole_waits_for_company() {
        let (pace, took) = (Pace { busy: 9, idle: 1 }, Duration::from_millis(20));
        assert_eq!(pace.rest(took, true, true), Duration::from_millis(180));
        assert_eq!(pace.rest(took, true, false), took);
        for is_busy in [true, false] {
            assert_eq!(pace.rest(took, false, is_busy), GATHER);
        }
    }
}
