//! How many retries all calls together may make.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::Instant;

/// One retry, in fixed point. Ratios count in millionths, so that they are not rounded coarsely.
const RETRY: u64 = 1_000_000;

/// The number of retries that calls can save up.
const RESERVE: u32 = 100;

/// A limit on retries in proportion to calls, shared by all clones.
///
/// Every call adds `ratio` of a retry, and every retry takes one. An outage therefore costs the
/// service at most `1 + ratio` times its usual load, whatever each call's own limit. At most 100
/// retries are saved up, or the burst if that is more. [`floor`](Self::floor) allows some retries
/// per second to a client that makes few calls, and [`burst`](Self::burst) some at once to a new
/// one.
///
/// The default is a ratio of 0.1, a burst of 100 retries and a floor of 1 per second: 1,000 calls
/// to a dead service within 10 seconds cause at most 1.3 times as many attempts.
///
/// A retry is paid for when it is sent. One that is cancelled while it waits costs nothing.
///
/// ```
/// use aegis_hitl::layer::{Budget, RetryLayer};
///
/// // One for the calls of two services.
/// let budget = Budget::new(0.2).floor(10);
/// let one = RetryLayer::new().budget(budget.clone());
/// let other = RetryLayer::new().budget(budget);
/// ```
#[derive(Clone)]
pub struct Budget {
    shared: Arc<Shared>,
}

struct Shared {
    /// What each call adds, in millionths of a retry.
    ratio: u64,
    /// The balance, in millionths of a retry.
    balance: AtomicU64,
    /// The initial balance, in retries.
    burst: u32,
    /// The time between two retries of the floor, in nanoseconds, or 0 for no floor.
    floor_interval: u64,
    /// When the floor will have recovered completely, in nanoseconds after `start`. This is a leaky
    /// bucket as a meter (ITU-T I.371's theoretical arrival time).
    floor_recovered: AtomicU64,
    start: Instant,
}

impl Budget {
    /// Allows `ratio` retries per call: 0.2 is one retry for five calls. `ratio` is clamped to 0 to
    /// 1.
    pub fn new(ratio: f64) -> Self {
        // Between 0 and 1,000,000; NaN becomes 0 in the cast.
        let ratio = (ratio.clamp(0.0, 1.0) * RETRY as f64).round() as u64;
        Self::with(ratio, 0, 0)
    }

    /// Allows another `retries` per second, of which up to one second's worth may come at once.
    ///
    /// The result shares nothing with this budget or its clones.
    #[must_use]
    pub fn floor(self, retries: u32) -> Self {
        let interval = match retries {
            0 => 0,
            // More than one per nanosecond becomes one per nanosecond, not none.
            retries => (1_000_000_000 / u64::from(retries)).max(1),
        };
        Self::with(self.shared.ratio, interval, self.shared.burst)
    }

    /// Starts with `retries` saved up, which may be sent before any call has earned one. This also
    /// raises the limit on savings if it is more than 100.
    ///
    /// The result shares nothing with this budget or its clones.
    #[must_use]
    pub fn burst(self, retries: u32) -> Self {
        Self::with(self.shared.ratio, self.shared.floor_interval, retries)
    }

    fn with(ratio: u64, floor_interval: u64, burst: u32) -> Self {
        Self {
            shared: Arc::new(Shared {
                ratio,
                balance: AtomicU64::new(u64::from(burst) * RETRY),
                burst,
                floor_interval,
                floor_recovered: AtomicU64::new(0),
                start: Instant::now(),
            }),
        }
    }

    /// Adds what one call earns.
    pub(super) fn deposit(&self) {
        self.add(self.shared.ratio);
    }

    fn add(&self, amount: u64) {
        let most = u64::from(RESERVE.max(self.shared.burst)) * RETRY;
        let add = |balance: u64| Some((balance + amount).min(most));
        // The closure never declines, so this cannot fail.
        let _ = self
            .shared
            .balance
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, add);
    }

    /// Takes one retry, or returns `None` if there is none. A withdrawal dropped before it is spent
    /// returns to the budget.
    pub(super) fn withdraw(&self) -> Option<Withdrawal> {
        let taken =
            self.shared
                .balance
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |balance| {
                    balance.checked_sub(RETRY)
                });
        let from = match taken {
            Ok(_) => Purse::Balance,
            Err(_) if self.withdraw_from_floor() => Purse::Floor,
            Err(_) => return None,
        };
        Some(Withdrawal {
            budget: self.clone(),
            from: Some(from),
        })
    }

    fn withdraw_from_floor(&self) -> bool {
        const BURST: u64 = 1_000_000_000;
        let interval = self.shared.floor_interval;
        if interval == 0 {
            return false;
        }
        let now = u64::try_from(self.shared.start.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.shared
            .floor_recovered
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |recovered| {
                let recovered = recovered.max(now).saturating_add(interval);
                (recovered <= now.saturating_add(BURST)).then_some(recovered)
            })
            .is_ok()
    }
}

impl Default for Budget {
    fn default() -> Self {
        Self::new(0.1).burst(100).floor(1)
    }
}

impl fmt::Debug for Budget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let millionths = |value: u64| value as f64 / RETRY as f64;
        f.debug_struct("Budget")
            .field("ratio", &millionths(self.shared.ratio))
            .field(
                "balance",
                &millionths(self.shared.balance.load(Ordering::Relaxed)),
            )
            .field(
                "floor_interval",
                &Duration::from_nanos(self.shared.floor_interval),
            )
            .finish()
    }
}

#[derive(Debug, Clone, Copy)]
enum Purse {
    Balance,
    Floor,
}

/// A retry taken from a budget but not sent yet.
#[derive(Debug)]
pub(super) struct Withdrawal {
    budget: Budget,
    /// Where it returns to, or `None` once it is spent.
    from: Option<Purse>,
}

impl Withdrawal {
    /// Keeps the retry, because it is being sent.
    pub(super) fn spend(mut self) {
        self.from = None;
    }
}

impl Drop for Withdrawal {
    fn drop(&mut self) {
        match self.from.take() {
            Some(Purse::Balance) => self.budget.add(RETRY),
            Some(Purse::Floor) => {
                let shared = &self.budget.shared;
                shared
                    .floor_recovered
                    .fetch_sub(shared.floor_interval, Ordering::Relaxed);
            }
            None => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spend(budget: &Budget) -> bool {
        budget.withdraw().map(Withdrawal::spend).is_some()
    }

    // tower's `TpsBudget` rounds: 0.6 and 0.9 both act as 1, 0.4 acts as 0.5.
    #[tokio::test(start_paused = true)]
    async fn every_ratio_holds_within_one_percent() {
        for ratio in [0.01, 0.1, 0.2, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9, 0.99, 1.0] {
            let budget = Budget::new(ratio);
            let calls = 100_000;
            let retries = (0..calls)
                .filter(|_| {
                    budget.deposit();
                    spend(&budget)
                })
                .count();
            let measured = retries as f64 / f64::from(calls);
            assert!((measured / ratio - 1.0).abs() < 0.01, "{ratio}: {measured}");
        }
    }

    // In other crates a cancelled backoff keeps what it took.
    #[tokio::test(start_paused = true)]
    async fn a_withdrawal_that_is_not_spent_goes_back() {
        let budget = Budget::new(1.0);
        budget.deposit();
        for _ in 0..3 {
            let withdrawal = budget.withdraw().unwrap();
            assert!(budget.withdraw().is_none());
            drop(withdrawal);
        }
        assert!(spend(&budget));
        assert!(!spend(&budget));

        let floor = Budget::new(0.0).floor(1);
        drop(floor.withdraw().unwrap());
        assert!(spend(&floor));
        assert!(!spend(&floor));
    }

    #[tokio::test(start_paused = true)]
    async fn the_floor_gives_its_retries_each_second_and_no_more() {
        let budget = Budget::new(0.0).floor(10);
        let mut spent = 0;
        for _ in 0..1000 {
            while spend(&budget) {
                spent += 1;
            }
            tokio::time::advance(Duration::from_millis(10)).await;
        }
        assert!((100..=111).contains(&spent), "{spent}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_floor_beyond_the_clocks_resolution_is_not_none() {
        let budget = Budget::new(0.0).floor(u32::MAX);
        assert!((0..1000).all(|_| spend(&budget)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_burst_may_be_spent_at_once_and_is_saved_up_again() {
        let budget = Budget::new(1.0).burst(150);
        for _ in 0..2 {
            assert_eq!((0..1000).filter(|_| spend(&budget)).count(), 150);
            for _ in 0..1000 {
                budget.deposit();
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_default_lets_a_burst_through_and_then_binds() {
        let budget = Budget::default();
        let mut retries = (0..1000).filter(|_| spend(&budget)).count();
        assert_eq!(retries, 101);
        for _ in 0..1000 {
            budget.deposit();
            retries += usize::from(spend(&budget));
            tokio::time::advance(Duration::from_millis(10)).await;
        }
        assert!((200..=300).contains(&retries), "{retries}");
    }

    #[tokio::test(start_paused = true)]
    async fn savings_are_limited() {
        let budget = Budget::new(1.0);
        for _ in 0..10_000 {
            budget.deposit();
        }
        assert_eq!((0..10_000).filter(|_| spend(&budget)).count(), 100);
    }

    #[tokio::test(start_paused = true)]
    async fn clones_share_one_budget() {
        let budget = Budget::new(0.5);
        let clone = budget.clone();
        budget.deposit();
        clone.deposit();
        assert!(spend(&budget));
        assert!(!spend(&clone));
    }

    #[tokio::test(start_paused = true)]
    async fn a_ratio_out_of_range_acts_as_the_nearer_bound() {
        for (ratio, allowed) in [
            (f64::NAN, false),
            (-1.0, false),
            (f64::INFINITY, true),
            (7.0, true),
        ] {
            let budget = Budget::new(ratio);
            budget.deposit();
            assert_eq!(spend(&budget), allowed, "{ratio}");
        }
    }
}
