//! How often a peer or a tenant may send requests.

use std::collections::HashMap;
use std::fmt;
use std::hash::Hash;
use std::num::NonZeroU32;
use std::str::FromStr;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// A rate: a number of requests per second, minute or hour.
///
/// As many may come at once, after a time without any. Those that follow are spread evenly: `60/m`
/// lets 60 through at once and then one per second.
///
/// ```
/// use std::num::NonZeroU32;
/// use aegis_hitl::server::Rate;
///
/// # fn main() -> Result<(), aegis_hitl::server::InvalidRate> {
/// let rate: Rate = "100/s".parse()?;
/// assert_eq!(rate, Rate::per_second(NonZeroU32::new(100).unwrap()));
/// assert_eq!(rate.to_string(), "100/s");
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    requests: NonZeroU32,
    unit: Unit,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Unit {
    Second,
    Minute,
    Hour,
}

impl Rate {
    /// So many requests per second.
    pub const fn per_second(requests: NonZeroU32) -> Self {
        Self {
            requests,
            unit: Unit::Second,
        }
    }

    /// So many requests per minute.
    pub const fn per_minute(requests: NonZeroU32) -> Self {
        Self {
            requests,
            unit: Unit::Minute,
        }
    }

    /// So many requests per hour.
    pub const fn per_hour(requests: NonZeroU32) -> Self {
        Self {
            requests,
            unit: Unit::Hour,
        }
    }

    const fn period(self) -> Duration {
        Duration::from_secs(match self.unit {
            Unit::Second => 1,
            Unit::Minute => 60,
            Unit::Hour => 3600,
        })
    }

    /// The time between two requests that are spread evenly.
    fn interval(self) -> Duration {
        self.period() / self.requests.get()
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unit = match self.unit {
            Unit::Second => 's',
            Unit::Minute => 'm',
            Unit::Hour => 'h',
        };
        write!(f, "{}/{unit}", self.requests)
    }
}

/// The error of a text that is not a [`Rate`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InvalidRate(());

impl fmt::Display for InvalidRate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(
            "a rate is a whole number from 1 to 4294967295 with /s, /m or /h behind it, such as 100/s",
        )
    }
}

impl std::error::Error for InvalidRate {}

impl FromStr for Rate {
    type Err = InvalidRate;

    fn from_str(text: &str) -> Result<Self, InvalidRate> {
        let (requests, unit) = text.split_once('/').ok_or(InvalidRate(()))?;
        // `parse` would take a plus sign.
        if !requests.starts_with(|first: char| first.is_ascii_digit()) {
            return Err(InvalidRate(()));
        }
        let requests = requests.parse().map_err(|_| InvalidRate(()))?;
        match unit {
            "s" => Ok(Self::per_second(requests)),
            "m" => Ok(Self::per_minute(requests)),
            "h" => Ok(Self::per_hour(requests)),
            _ => Err(InvalidRate(())),
        }
    }
}

/// The most keys that are told apart. A server without API keys takes any tenant, and one host may
/// have many addresses; neither may fill the memory.
const MAX_KEYS: usize = 1 << 16;

/// The number of keys below which none is looked for that can be forgotten.
const FEW_KEYS: usize = 1 << 10;

/// How often those that can be forgotten are looked for while there are as many keys as possible.
const FORGET_INTERVAL: Duration = Duration::from_secs(1);

/// Limits the rate of each key by the generic cell rate algorithm (GCRA, ITU-T I.371): of a key it
/// keeps one time, at which its whole burst is allowed again.
#[derive(Debug)]
pub(crate) struct RateLimiter<K> {
    rate: Rate,
    keys: Mutex<Keys<K>>,
}

#[derive(Debug)]
struct Keys<K> {
    rested_at: HashMap<K, Instant>,
    /// For all keys for which there is no room.
    others: Option<Instant>,
    /// The number of keys at which those that have rested are forgotten.
    forget_at: usize,
    forgot: Option<Instant>,
}

impl<K: Hash + Eq> RateLimiter<K> {
    pub(crate) fn new(rate: Rate) -> Self {
        Self {
            rate,
            keys: Mutex::new(Keys {
                rested_at: HashMap::new(),
                others: None,
                forget_at: FEW_KEYS,
                forgot: None,
            }),
        }
    }

    /// The rate that each key may have.
    pub(crate) fn rate(&self) -> Rate {
        self.rate
    }

    /// Counts a request, or returns the time after which the next would be allowed.
    pub(crate) fn count(&self, key: K) -> Result<(), Duration> {
        let now = Instant::now();
        let mut keys = self.keys.lock().unwrap_or_else(PoisonError::into_inner);
        let rested_at = keys.of(key, now);
        let next = (*rested_at).max(now) + self.rate.interval();
        match next.checked_duration_since(now + self.rate.period()) {
            Some(excess) if !excess.is_zero() => Err(excess),
            _ => {
                *rested_at = next;
                Ok(())
            }
        }
    }
}

impl<K: Hash + Eq> Keys<K> {
    /// The time at which a key has rested.
    fn of(&mut self, key: K, now: Instant) -> &mut Instant {
        if self.rested_at.len() >= self.forget_at && !self.rested_at.contains_key(&key) {
            self.forget(now);
        }
        if self.rested_at.len() >= MAX_KEYS && !self.rested_at.contains_key(&key) {
            return self.others.get_or_insert(now);
        }
        self.rested_at.entry(key).or_insert(now)
    }

    /// Forgets the keys that have rested, as they are like new ones. With twice as many keys each
    /// time, or at most once in an interval, this costs little per request.
    fn forget(&mut self, now: Instant) {
        let is_full = self.forget_at == MAX_KEYS;
        let is_too_soon = self
            .forgot
            .is_some_and(|before| now < before + FORGET_INTERVAL);
        if is_full && is_too_soon {
            return;
        }
        self.rested_at.retain(|_, rested_at| *rested_at > now);
        self.forget_at = (2 * self.rested_at.len()).clamp(FEW_KEYS, MAX_KEYS);
        self.forgot = Some(now);
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    fn limiter(rate: &str) -> RateLimiter<u32> {
        RateLimiter::new(rate.parse().unwrap())
    }

    #[test]
    fn a_rate_has_one_spelling() {
        for text in ["1/s", "100/s", "60/m", "4294967295/h"] {
            assert_eq!(text.parse::<Rate>().unwrap().to_string(), text);
        }
        for text in [
            "",
            "/",
            "/s",
            "0/s",
            "+1/s",
            "-1/s",
            "1",
            "1/",
            "1/d",
            "1/S",
            "1 /s",
            "1.5/s",
            "4294967296/s",
            "1/s/s",
            "١/s",
        ] {
            assert!(text.parse::<Rate>().is_err(), "{text}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_burst_is_allowed_and_then_one_per_interval() {
        let limiter = limiter("60/m");
        for _ in 0..60 {
            assert_eq!(limiter.count(1), Ok(()));
        }
        assert_eq!(limiter.count(1), Err(Duration::from_secs(1)));
        advance(Duration::from_millis(999)).await;
        assert_eq!(limiter.count(1), Err(Duration::from_millis(1)));
        advance(Duration::from_millis(1)).await;
        assert_eq!(limiter.count(1), Ok(()));
        assert_eq!(limiter.count(1), Err(Duration::from_secs(1)));
        // What was refused is not counted.
        advance(Duration::from_secs(60)).await;
        for _ in 0..60 {
            assert_eq!(limiter.count(1), Ok(()));
        }
        assert!(limiter.count(1).is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn keys_are_limited_apart() {
        let limiter = limiter("1/h");
        assert_eq!(limiter.count(1), Ok(()));
        assert_eq!(limiter.count(1), Err(Duration::from_secs(3600)));
        assert_eq!(limiter.count(2), Ok(()));
    }

    #[tokio::test(start_paused = true)]
    async fn the_highest_rate_limits_nothing_and_overflows_nothing() {
        let limiter = limiter("4294967295/s");
        for _ in 0..1000 {
            assert_eq!(limiter.count(1), Ok(()));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn keys_that_have_rested_make_room_and_the_others_share_a_rate() {
        let limiter = limiter("1/s");
        let most = u32::try_from(MAX_KEYS).unwrap();
        for key in 0..most {
            assert_eq!(limiter.count(key), Ok(()));
        }
        // There is no room for these two, so they share one rate.
        assert_eq!(limiter.count(most), Ok(()));
        assert_eq!(limiter.count(most + 1), Err(Duration::from_secs(1)));
        assert!(limiter.count(0).is_err(), "a known key keeps its own");
        advance(Duration::from_secs(1)).await;
        for key in most..2 * most {
            assert_eq!(limiter.count(key), Ok(()));
        }
        let keys = limiter.keys.lock().unwrap();
        assert!(keys.rested_at.len() <= MAX_KEYS);
    }
}
