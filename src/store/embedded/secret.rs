//! The database's secret, and what is made with it: request ids that say where their action is, to this store alone.
//!
//! A request id is a UUIDv4 that nobody can guess, and an index on random ids costs every new action a page of its own in the
//! log. So an id carries the number of its action's row, masked: of its 122 free bits 66 are random, and 56 are that number
//! combined by XOR with the start of SHA-256(secret, random bits). Whoever lacks the secret cannot tell the mask from random
//! bits: a guess hits one of N actions with a chance of N in 2^122,
//! and known ids say nothing of others. No two ids are alike, as each leads to one row.
//!
//! An id that was made elsewhere leads to some row too, if to any, so the whole id is compared with the row's.

use std::fmt;

use rusqlite::types::{FromSql, FromSqlResult, ValueRef};
use sha2::{Digest, Sha256};
use uuid::Uuid;

/// The bytes of an id before the masked ones: its random bits, its version and its variant.
const RANDOM: usize = 9;

/// 32 random bytes that are made with the database and never leave it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Secret([u8; 32]);

impl Secret {
    /// Mints a secret, from the cryptographically secure generator that mints ids.
    pub(super) fn mint() -> Self {
        let mut digest = Sha256::new();
        // 122 random bits each.
        for _ in 0..3 {
            digest.update(Uuid::new_v4().as_bytes());
        }
        Self(digest.finalize().into())
    }

    pub(super) fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// Mints the id of the action in a row.
    pub(super) fn request_id(&self, row: i64) -> Uuid {
        let mut id = Uuid::new_v4().into_bytes();
        let (random, masked) = id.split_at_mut(RANDOM);
        let number = row.to_be_bytes();
        for ((masked, mask), byte) in masked.iter_mut().zip(self.mask(random)).zip(&number[1..]) {
            *masked = mask ^ byte;
        }
        Uuid::from_bytes(id)
    }

    /// The row whose action has this id, if any has.
    pub(super) fn row(&self, id: Uuid) -> i64 {
        let (random, masked) = id.as_bytes().split_at(RANDOM);
        let bytes = masked.iter().zip(self.mask(random));
        bytes.fold(0, |row, (masked, mask)| row << 8 | i64::from(masked ^ mask))
    }

    /// A short name for a call id: 48 bits, which nobody can choose.
    pub(super) fn tag(&self, call: Uuid) -> u64 {
        let digest = self.digest(call.as_bytes());
        digest[..6]
            .iter()
            .fold(0, |tag, byte| tag << 8 | u64::from(*byte))
    }

    fn mask(&self, random: &[u8]) -> impl Iterator<Item = u8> + use<> {
        self.digest(random).into_iter()
    }

    /// Masks are of 9 bytes and tags of 16, so that no digest serves for both, and what is digested can be read in one way.
    fn digest(&self, bytes: &[u8]) -> [u8; 32] {
        let digest = Sha256::new().chain_update(self.0).chain_update(bytes);
        digest.finalize().into()
    }
}

impl FromSql for Secret {
    fn column_result(value: ValueRef<'_>) -> FromSqlResult<Self> {
        <[u8; 32]>::column_result(value).map(Self)
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use uuid::{Variant, Version};

    use super::*;

    #[test]
    fn an_id_leads_to_its_row_and_is_a_random_uuid() {
        let secret = Secret::mint();
        for row in [0, 1, 255, 256, 10_000_000, (1 << 56) - 1] {
            let id = secret.request_id(row);
            assert_eq!(secret.row(id), row);
            assert_eq!(id.get_version(), Some(Version::Random));
            assert_eq!(id.get_variant(), Variant::RFC4122);
        }
    }

    #[test]
    fn no_two_ids_are_alike_even_of_one_row() {
        let secret = Secret::mint();
        let ids: HashSet<_> = (0..20_000).map(|n| secret.request_id(n / 2)).collect();
        assert_eq!(ids.len(), 20_000);
    }

    #[test]
    fn every_free_bit_is_set_in_half_of_the_ids() {
        const IDS: i64 = 20_000;
        let secret = Secret::mint();
        let mut set = [0; 128];
        for row in 1..=IDS {
            let id = secret.request_id(row).as_u128();
            for (bit, set) in set.iter_mut().enumerate() {
                *set += id >> bit & 1;
            }
        }
        let fixed = (62..64).chain(76..80);
        for (bit, set) in set.into_iter().enumerate() {
            // Ten standard deviations.
            let is_even = (9_293..=10_707).contains(&set);
            assert_eq!(is_even, !fixed.clone().any(|at| at == bit), "{bit}: {set}");
        }
    }

    #[test]
    fn an_id_of_another_secret_leads_elsewhere() {
        let [one, other] = [Secret::mint(), Secret::mint()];
        assert!((1..1000).all(|row| other.row(one.request_id(row)) != row));
    }

    #[test]
    fn any_other_id_leads_to_a_row_number_that_an_id_can_have() {
        let secret = Secret::mint();
        for id in (0..1000)
            .map(|_| Uuid::new_v4())
            .chain([Uuid::nil(), Uuid::max()])
        {
            assert!((0..1 << 56).contains(&secret.row(id)));
        }
    }

    #[test]
    fn it_is_not_shown() {
        assert_eq!(format!("{:?}", Secret::mint()), "Secret(..)");
    }
}
