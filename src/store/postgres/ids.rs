//! Ids of actions whose order is the order in which they were minted.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use uuid::Uuid;

/// The last time that was used, in 1/4096 of a millisecond.
static LAST: AtomicU64 = AtomicU64::new(0);

/// Mints a UUIDv7. It has the time in 1/4096 of a millisecond (RFC 9562, section 6.2, method 3) and
/// 62 random bits.
///
/// An embedded store lists its actions by the numbers of their rows. Several servers have no such
/// numbers in common, so there the id is the place in a list. In one process it always grows.
pub(super) fn ordered() -> Uuid {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let part = |since: Duration| {
        let rest = u64::from(since.subsec_nanos() % 1_000_000);
        since.as_millis() as u64 * 4096 + rest * 4096 / 1_000_000
    };
    let now = part(since);
    let last = LAST.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |last| {
        Some(now.max(last + 1))
    });
    let time = now.max(last.unwrap_or_default() + 1);
    let random = Uuid::new_v4().as_u128() & ((1 << 62) - 1);
    let (millis, rest) = (u128::from(time / 4096), u128::from(time % 4096));
    Uuid::from_u128(millis << 80 | 7 << 76 | rest << 64 | 0b10 << 62 | random)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_grow_and_show_their_time() {
        let ids: Vec<_> = (0..10_000).map(|_| ordered()).collect();
        assert!(ids.is_sorted_by(|one, next| one < next));
        for id in [ids[0], ids[9_999]] {
            assert_eq!(
                (id.get_version_num(), id.get_variant()),
                (7, uuid::Variant::RFC4122)
            );
            let (seconds, _) = id.get_timestamp().unwrap().to_unix();
            let now = SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .unwrap()
                .as_secs();
            assert!(now.abs_diff(seconds) < 60);
        }
    }
}
