//! The pace of chaining: behind the decisions, which have the machine.

use std::time::Duration;

/// How long the chainer waits for further events before it chains them together.
pub(crate) const GATHER: Duration = Duration::from_secs(1);

/// The chainer rests this many times as long as it has worked while requests wait, so that decisions
/// have the machine: an event takes it 2 to 4 us, a twentieth of what its decision takes the server.
const BUSY_REST: u32 = 99;

/// The same while no request waits.
const REST: u32 = 9;

/// How long the chainer rests after a step that took so long. `has_more` tells whether events may be
/// left that could be chained at once.
pub(crate) fn rest(took: Duration, has_more: bool, is_busy: bool) -> Duration {
    match (has_more, is_busy) {
        (true, true) => took * BUSY_REST,
        (true, false) => took * REST,
        (false, _) => GATHER,
    }
}
