//! The one timer of a call, which is set when something first has to be waited for.

use std::future::Future;
use std::pin::{Pin, pin};
use std::task::{Context, Poll};

use tokio::time::{Instant, Sleep};

/// Polls the timer, which is set on the first poll; without a time it never fires.
pub(super) fn poll_timer(
    mut timer: Pin<&mut Option<Sleep>>,
    cx: &mut Context<'_>,
    until: impl FnOnce() -> Option<Instant>,
) -> Poll<()> {
    if timer.is_none() {
        let Some(until) = until() else {
            return Poll::Pending;
        };
        timer.set(Some(tokio::time::sleep_until(until)));
    }
    match timer.as_pin_mut() {
        // Else a service that is busy without an end, and so spends the task's budget in each poll, would never let it fire.
        Some(timer) => pin!(tokio::task::unconstrained(timer)).poll(cx),
        None => Poll::Pending,
    }
}
