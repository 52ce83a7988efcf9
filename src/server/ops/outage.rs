//! Reports the beginning and the end of an outage, each once, so that repeated failures do not fill
//! the log.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// How long nothing may fail before the outage is over. Occasional failures are one outage, not
/// many.
const QUIET: Duration = Duration::from_secs(10);

/// Something that can fail.
#[derive(Debug, Default)]
pub(crate) struct Outage(Mutex<Option<Ongoing>>);

#[derive(Debug)]
struct Ongoing {
    failures: u64,
    last: Instant,
}

impl Outage {
    /// Counts a failure. Returns whether it is the first of an outage, which is the one to log.
    pub(crate) fn failed(&self) -> bool {
        let mut ongoing = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let failures = ongoing.as_ref().map_or(0, |outage| outage.failures);
        *ongoing = Some(Ongoing {
            failures: failures + 1,
            last: Instant::now(),
        });
        failures == 0
    }

    /// Records a success. Returns the number of failures if the outage has ended.
    pub(crate) fn succeeded(&self) -> Option<u64> {
        let mut ongoing = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let over = ongoing.take_if(|outage| outage.last.elapsed() >= QUIET);
        over.map(|outage| outage.failures)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn an_outage_begins_once_and_ends_once() {
        let outage = Outage::default();
        assert_eq!(outage.succeeded(), None);
        assert!(outage.failed());
        // Successes in between do not end it.
        for _ in 0..5 {
            tokio::time::advance(QUIET / 2).await;
            assert_eq!(outage.succeeded(), None);
            assert!(!outage.failed());
        }
        tokio::time::advance(QUIET).await;
        assert_eq!(outage.succeeded(), Some(6));
        assert_eq!(outage.succeeded(), None);
        assert!(outage.failed());
    }
}
