//! How long to wait before an attempt.

use std::borrow::Cow;
use std::hash::{BuildHasher, Hasher};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// The Python SDK's waits: 0.5, 1 and 2 seconds, then 2 seconds again.
const SEED: [Duration; 3] = [
    Duration::from_millis(500),
    Duration::from_secs(1),
    Duration::from_secs(2),
];

/// A schedule of waits between attempts.
///
/// It is data rather than a trait, so it can be compared, printed, cloned and configured. A wait
/// that depends on the outcome is up to the classifier, whose [`Verdict`](super::Verdict) may name
/// one.
///
/// The default is [`Backoff::python_sdk`] with up to a quarter of jitter on top, so that clients that
/// failed together do not return together.
#[derive(Debug, Clone, PartialEq)]
pub struct Backoff {
    schedule: Schedule,
    jitter: Jitter,
}

#[derive(Debug, Clone, PartialEq)]
enum Schedule {
    Steps(Cow<'static, [Duration]>),
    Exponential { base: Duration, max: Duration },
    Decorrelated { base: Duration, max: Duration },
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Jitter {
    None,
    /// Between zero and the step.
    Full,
    /// Between half of the step and the step.
    Equal,
    /// The step, and up to this fraction of it on top.
    Above(f64),
}

impl Backoff {
    /// Does not wait.
    pub const fn none() -> Self {
        Self {
            schedule: Schedule::Steps(Cow::Borrowed(&[])),
            jitter: Jitter::None,
        }
    }

    /// Waits like the Python SDK: 0.5, 1 and 2 seconds, then 2 seconds each, without jitter.
    pub const fn python_sdk() -> Self {
        Self {
            schedule: Schedule::Steps(Cow::Borrowed(&SEED)),
            jitter: Jitter::None,
        }
    }

    /// Waits the same time before each retry, without jitter.
    pub fn constant(wait: Duration) -> Self {
        Self::steps([wait])
    }

    /// Waits for each of `waits` in turn, then repeats the last one, without jitter.
    pub fn steps(waits: impl Into<Vec<Duration>>) -> Self {
        Self {
            schedule: Schedule::Steps(Cow::Owned(waits.into())),
            jitter: Jitter::None,
        }
    }

    /// Doubles the wait from `base` up to `max`, with full jitter.
    pub const fn exponential(base: Duration, max: Duration) -> Self {
        Self {
            schedule: Schedule::Exponential { base, max },
            jitter: Jitter::Full,
        }
    }

    /// Waits between `base` and three times the previous wait, up to `max`: decorrelated jitter.
    pub const fn decorrelated(base: Duration, max: Duration) -> Self {
        Self {
            schedule: Schedule::Decorrelated { base, max },
            jitter: Jitter::None,
        }
    }

    /// Removes the jitter. A decorrelated schedule keeps its own.
    #[must_use]
    pub const fn no_jitter(mut self) -> Self {
        self.jitter = Jitter::None;
        self
    }

    /// Waits between zero and the step.
    #[must_use]
    pub const fn full_jitter(mut self) -> Self {
        self.jitter = Jitter::Full;
        self
    }

    /// Waits between half of the step and the step.
    #[must_use]
    pub const fn equal_jitter(mut self) -> Self {
        self.jitter = Jitter::Equal;
        self
    }

    /// Waits the step and up to `fraction` of it on top, never less than the schedule. `fraction`
    /// is clamped to 0 to 1.
    #[must_use]
    pub const fn jitter_above(mut self, fraction: f64) -> Self {
        // `max` comes first because it turns NaN into 0.
        self.jitter = Jitter::Above(fraction.max(0.0).min(1.0));
        self
    }

    /// Returns the longest wait that there can be.
    #[cfg(feature = "server")]
    pub(crate) fn longest(&self) -> Duration {
        let step = match &self.schedule {
            Schedule::Steps(steps) => steps.iter().copied().max().unwrap_or_default(),
            Schedule::Exponential { max, .. } | Schedule::Decorrelated { max, .. } => *max,
        };
        match self.jitter {
            Jitter::None | Jitter::Full | Jitter::Equal => step,
            Jitter::Above(fraction) => step.saturating_add(part(step, fraction)),
        }
    }

    /// Returns the wait before retry number `retry` (0 is the first), given the previous wait.
    pub(crate) fn wait(&self, retry: u32, previous: Duration, random: &Random) -> Duration {
        let step = match &self.schedule {
            Schedule::Steps(steps) => {
                let last = steps.len().saturating_sub(1);
                let at = usize::try_from(retry).unwrap_or(usize::MAX).min(last);
                steps.get(at).copied().unwrap_or_default()
            }
            Schedule::Exponential { base, max } => {
                let factor = 1_u32.checked_shl(retry).unwrap_or(u32::MAX);
                base.saturating_mul(factor).min(*max)
            }
            Schedule::Decorrelated { base, max } => {
                let high = previous.max(*base).saturating_mul(3);
                let wait = base.saturating_add(random.up_to(high.saturating_sub(*base)));
                return wait.min(*max);
            }
        };
        match self.jitter {
            Jitter::None => step,
            Jitter::Full => random.up_to(step),
            Jitter::Equal => step / 2 + random.up_to(step - step / 2),
            Jitter::Above(fraction) => step.saturating_add(random.up_to(part(step, fraction))),
        }
    }
}

/// Returns a fraction of a duration, or all of it if floating point would overflow.
fn part(of: Duration, fraction: f64) -> Duration {
    Duration::try_from_secs_f64(of.as_secs_f64() * fraction)
        .unwrap_or(Duration::MAX)
        .min(of)
}

impl Default for Backoff {
    fn default() -> Self {
        Self::python_sdk().jitter_above(0.25)
    }
}

/// A lock-free source of jitter that repeats itself under the same seed (SplitMix64).
#[derive(Debug, Clone)]
pub(crate) struct Random(Arc<AtomicU64>);

impl Random {
    pub(super) fn seeded(seed: u64) -> Self {
        Self(Arc::new(AtomicU64::new(seed)))
    }

    /// Seeds from the standard library's hasher, whose keys are random. Jitter must differ; it need
    /// not be secret.
    pub(crate) fn new() -> Self {
        let hasher = std::collections::hash_map::RandomState::new().build_hasher();
        Self::seeded(hasher.finish())
    }

    fn next(&self) -> u64 {
        const STEP: u64 = 0x9E37_79B9_7F4A_7C15;
        let mut z = self.0.fetch_add(STEP, Ordering::Relaxed).wrapping_add(STEP);
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Returns a wait of at least `floor`, which the service asked for, and of at least `wait`.
    ///
    /// All clients of a service receive the same `Retry-After`. A spread in proportion, of at most
    /// `limit`, keeps them from returning together.
    pub(crate) fn at_least(&self, floor: Duration, wait: Duration, limit: Duration) -> Duration {
        let spread = (floor.max(wait) / 4).min(limit);
        wait.max(floor.saturating_add(self.up_to(spread)))
    }

    /// Returns a duration between zero and `limit`, inclusive.
    pub(super) fn up_to(&self, limit: Duration) -> Duration {
        if limit.is_zero() {
            return limit;
        }
        let limit = u64::try_from(limit.as_nanos()).unwrap_or(u64::MAX);
        // The high half of the product of a random word and the width. Its bias is below 2^-64 of
        // the width.
        let width = u128::from(limit) + 1;
        let nanos = (u128::from(self.next()) * width) >> 64;
        Duration::from_nanos(nanos as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn waits(backoff: &Backoff, seed: u64) -> Vec<Duration> {
        let random = Random::seeded(seed);
        let mut previous = Duration::ZERO;
        (0..6)
            .map(|retry| {
                previous = backoff.wait(retry, previous, &random);
                previous
            })
            .collect()
    }

    fn millis(values: &[u64]) -> Vec<Duration> {
        values.iter().map(|ms| Duration::from_millis(*ms)).collect()
    }

    #[test]
    fn the_seed_waits_half_a_second_then_one_then_two() {
        assert_eq!(
            waits(&Backoff::python_sdk(), 1),
            millis(&[500, 1000, 2000, 2000, 2000, 2000])
        );
    }

    #[test]
    fn the_default_never_waits_less_than_the_seed_nor_a_quarter_more() {
        for seed in 0..200 {
            for (wait, step) in waits(&Backoff::default(), seed)
                .iter()
                .zip(waits(&Backoff::python_sdk(), 0))
            {
                assert!(
                    *wait >= step && *wait <= step.mul_f64(1.25),
                    "{wait:?} {step:?}"
                );
            }
        }
    }

    #[test]
    fn exponential_doubles_up_to_its_maximum() {
        let backoff =
            Backoff::exponential(Duration::from_millis(100), Duration::from_secs(1)).no_jitter();
        assert_eq!(
            waits(&backoff, 1),
            millis(&[100, 200, 400, 800, 1000, 1000])
        );
        let huge = backoff.wait(u32::MAX, Duration::ZERO, &Random::seeded(0));
        assert_eq!(huge, Duration::from_secs(1));
    }

    #[test]
    fn jitter_stays_in_its_range_and_uses_it() {
        let base = Duration::from_secs(1);
        let step = Backoff::constant(base);
        let decorrelated = Backoff::decorrelated(base, Duration::from_secs(4));
        for (backoff, low, high) in [
            (step.clone().full_jitter(), 0.0, 1.0),
            (step.clone().equal_jitter(), 0.5, 1.0),
            (step.jitter_above(0.5), 1.0, 1.5),
            (decorrelated, 1.0, 4.0),
        ] {
            let all: Vec<f64> = (0..500)
                .flat_map(|seed| waits(&backoff, seed))
                .map(|wait| wait.as_secs_f64())
                .collect();
            assert!(
                all.iter().all(|wait| (low..=high).contains(wait)),
                "{backoff:?}"
            );
            let span = high - low;
            assert!(
                all.iter().any(|wait| *wait < low + span / 10.0),
                "{backoff:?}"
            );
            assert!(
                all.iter().any(|wait| *wait > high - span / 10.0),
                "{backoff:?}"
            );
        }
    }

    #[test]
    fn the_same_seed_gives_the_same_waits() {
        let backoff = Backoff::default();
        assert_eq!(waits(&backoff, 7), waits(&backoff, 7));
        assert_ne!(waits(&backoff, 7), waits(&backoff, 8));
    }

    #[test]
    fn no_setting_makes_a_wait_panic() {
        for wait in [
            Duration::MAX,
            Duration::MAX - Duration::from_nanos(1),
            Duration::ZERO,
        ] {
            for backoff in [
                Backoff::constant(wait).jitter_above(1.0),
                Backoff::constant(wait).full_jitter(),
                Backoff::constant(wait).equal_jitter(),
                Backoff::exponential(wait, wait).jitter_above(0.5),
                Backoff::decorrelated(wait, wait),
                Backoff::steps([]).jitter_above(1.0),
            ] {
                let waits = waits(&backoff, 1);
                assert_eq!(waits.len(), 6, "{backoff:?}");
            }
        }
    }

    // The words for seed 0 that the authors of SplitMix64 publish.
    #[test]
    fn the_source_of_jitter_is_splitmix64() {
        let random = Random::seeded(0);
        let words = [random.next(), random.next(), random.next()];
        assert_eq!(
            words,
            [
                0xE220_A839_7B1D_CDAF,
                0x6E78_9E6A_A1B9_65F4,
                0x06C4_5D18_8009_454F
            ]
        );
    }

    #[test]
    fn both_ends_of_a_range_occur() {
        let random = Random::seeded(0);
        let nano = Duration::from_nanos(1);
        let drawn: Vec<Duration> = (0..64).map(|_| random.up_to(nano)).collect();
        assert!(drawn.iter().all(|wait| *wait <= nano));
        assert!(drawn.contains(&nano) && drawn.contains(&Duration::ZERO));
    }

    #[test]
    fn none_waits_not_at_all() {
        assert_eq!(waits(&Backoff::none(), 1), millis(&[0; 6]));
        assert_eq!(
            waits(&Backoff::none().jitter_above(f64::NAN), 1),
            millis(&[0; 6])
        );
    }
}
