//! The identity of an action.

use sha2::{Digest as _, Sha256};

use crate::protocol::{IdempotencyKey, TenantId, ThreadId};

/// The identity of an action: tenant, thread and idempotency key.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[allow(clippy::exhaustive_structs)]
pub struct Identity {
    /// The tenant that the action belongs to.
    pub tenant_id: TenantId,
    /// The conversation or agent run.
    pub thread_id: ThreadId,
    /// The key that the caller gave the action.
    pub idempotency_key: IdempotencyKey,
}

impl Identity {
    /// The digest that keeps an identity from being recorded twice: 8 bytes for its [thread], then 8
    /// for all of it. An index on the texts would be three times as large.
    ///
    /// So the actions of a thread are neighbours in the index, and a thread at work keeps to a few of
    /// its pages.
    pub(crate) fn digest(&self) -> [u8; 16] {
        let [start, rest] = [
            thread(&self.tenant_id, &self.thread_id),
            first_bytes(&[
                self.tenant_id.as_str(),
                self.thread_id.as_str(),
                self.idempotency_key.as_str(),
            ]),
        ];
        let mut digest = [0; 16];
        digest[..8].copy_from_slice(&start);
        digest[8..].copy_from_slice(&rest);
        digest
    }
}

/// The part of the digests of identities that those of one thread share. Others may share it too,
/// so the texts have to be compared.
pub(crate) fn thread(tenant: &TenantId, thread: &ThreadId) -> [u8; 8] {
    first_bytes(&[tenant.as_str(), thread.as_str()])
}

/// The first bytes of SHA-256 over texts, each behind a byte with its length.
fn first_bytes(texts: &[&str]) -> [u8; 8] {
    let mut digest = Sha256::new();
    for text in texts {
        // No text is longer than 255 bytes.
        digest.update([text.len() as u8]);
        digest.update(text);
    }
    let mut start = [0; 8];
    start.copy_from_slice(&digest.finalize()[..8]);
    start
}
