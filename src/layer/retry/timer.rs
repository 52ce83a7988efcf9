//! A call's single timer, started when something first has to be waited for.

use std::future::Future;
use std::pin::{Pin, pin};
use std::task::{Context, Poll};

use tokio::time::{Instant, Sleep};

/// Polls the timer, which starts on the first poll. Without a time it never fires.
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
        // Otherwise a service that is always busy, and uses up the task's budget in each poll,
        // would keep it from firing.
        Some(timer) => pin!(tokio::task::unconstrained(timer)).poll(cx),
        None => Poll::Pending,
    }
}
