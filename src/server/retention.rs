//! Removing actions that have been over for a time, beside everything else that a server does.

use std::convert::Infallible;
use std::fmt;
use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::ops::outage::Outage;
use crate::store::{Store, Sweep};

/// The shortest retention.
const LEAST: Duration = Duration::from_secs(1);

/// The most actions of one step. The store ends it sooner, by its time.
const STEP: usize = 1024;

/// The longest pause while there is something to remove.
const LONGEST_PAUSE_WITH_WORK: Duration = Duration::from_millis(250);

/// The longest time without a step.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// The pause after the store failed.
const AFTER_FAILURE: Duration = Duration::from_secs(5);

/// How long a store keeps actions that are [over](Sweep). What stays of each is a tombstone, so that
/// no key is decided twice.
///
/// Nothing is removed unless [`run`](Self::run) is.
///
/// ```no_run
/// use std::time::Duration;
///
/// use aegis_hitl::server::Retention;
/// use aegis_hitl::store::Store;
///
/// # async fn example(store: impl Store) -> Result<(), Box<dyn std::error::Error>> {
/// let retention = Retention::new(Duration::from_secs(30 * 24 * 3600))?;
/// let sweeping = tokio::spawn(async move { retention.run(store).await });
/// // Until the server drains.
/// sweeping.abort();
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Retention(Duration);

impl Retention {
    /// Makes a retention of at least a second. It should be far longer than any caller repeats
    /// itself, any webhook is down, and any approved action waits to be claimed.
    ///
    /// # Errors
    ///
    /// If it is shorter than a second.
    pub fn new(retention: Duration) -> Result<Self, InvalidRetention> {
        if retention < LEAST {
            return Err(InvalidRetention(retention));
        }
        Ok(Self(retention))
    }

    /// Removes what has been over for longer than the retention, in small steps, for as long as this
    /// future is polled. It may be dropped at any time.
    ///
    /// With an outbox, run it once its endpoints are [taken](crate::outbox::Deliveries::taken): an
    /// endpoint that nobody has taken for as long as the retention keeps no events.
    pub async fn run<St: Store>(self, store: St) -> Infallible {
        let sweep = Sweep {
            retention: self.0,
            limit: STEP,
        };
        let outage = Outage::default();
        loop {
            let begun = Instant::now();
            let pause = match store.sweep(sweep.clone()).await {
                Ok(swept) => {
                    if let Some(failures) = outage.succeeded() {
                        tracing::info!(failures, "actions that are over are removed again");
                    }
                    match swept.has_more {
                        // As long as the step waited and took: the more decisions there are, the
                        // longer it is.
                        true => begun.elapsed().min(LONGEST_PAUSE_WITH_WORK),
                        // A sixtieth later than it could is early enough for anything.
                        false => (self.0 / 60).min(LONGEST_PAUSE),
                    }
                }
                Err(error) => {
                    if outage.failed() {
                        tracing::warn!(%error, "actions that are over are not removed");
                    }
                    AFTER_FAILURE
                }
            };
            sleep(pause).await;
        }
    }
}

/// The error of a retention that is too short.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InvalidRetention(Duration);

impl fmt::Display for InvalidRetention {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "the retention is {:?}; allowed is {LEAST:?} or more",
            self.0
        )
    }
}

impl std::error::Error for InvalidRetention {}
