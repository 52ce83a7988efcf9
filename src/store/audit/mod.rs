//! The audit trail: the events of a tenant as a hash chain, which is verified without the database.
//!
//! - An *entry* is what an event says that never changes later, as canonical JSON (RFC 8785).
//! - A *leaf* is the SHA-256 of an entry.
//! - The hash of a *link* is the SHA-256 of the hash before it and its leaf. The first link follows
//!   on the SHA-256 of a text with the tenant's name, so no chain passes for another tenant's.
//! - The *head* is the hash of the last link.
//!
//! The manual's page on auditing has the format in full.

mod comparison;
mod entry;
pub(crate) mod history;
pub(crate) mod line;
mod pace;
mod run;
mod verifier;

use sha2::{Digest as _, Sha256};

pub(crate) use self::comparison::{Comparison, Faults};
pub(crate) use self::entry::Entry;
pub(crate) use self::pace::{GATHER, Pace};
pub(crate) use self::run::{Run, links};
pub use self::verifier::{AuditFault, AuditVerifier, VerifiedChain};

/// What is hashed before a tenant's first link, in front of the tenant's name.
const DOMAIN: &str = "aegis-audit-1:";

/// A SHA-256.
pub(crate) type Hash = [u8; 32];

/// The hash on which a tenant's first link follows.
pub(crate) fn origin(tenant: &str) -> Hash {
    let digest = Sha256::new().chain_update(DOMAIN).chain_update(tenant);
    digest.finalize().into()
}

/// The hash of a link: its leaf behind the hash before it.
pub(crate) fn link(before: &Hash, leaf: &Hash) -> Hash {
    let digest = Sha256::new().chain_update(before).chain_update(leaf);
    digest.finalize().into()
}

/// The leaf of an entry.
pub(crate) fn leaf(entry: &str) -> Hash {
    Sha256::digest(entry).into()
}

/// Lines of an export.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct AuditPage {
    /// The lines, without line feeds.
    pub lines: Vec<String>,
    /// The number of the last link.
    pub seq: u64,
}

/// The result of verifying chains against the events on record.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct AuditReport {
    /// The ends of the chains.
    pub heads: Vec<AuditHead>,
    /// The number of events of which only the leaves are left, as retention removed them.
    pub removed: u64,
    /// The first 100 faults, in words. Empty if every event is the one that was chained.
    pub faults: Vec<String>,
}

/// The end of a tenant's chain.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct AuditHead {
    /// The tenant.
    pub tenant_id: String,
    /// The number of the last link, or 0. The first link has number 1.
    pub seq: u64,
    /// The hash of the last link.
    pub hash: [u8; 32],
    /// The number of events that are not chained yet.
    pub unchained: u64,
}

impl AuditHead {
    pub(crate) fn new(tenant_id: impl Into<String>, seq: u64, hash: Hash, unchained: u64) -> Self {
        Self {
            tenant_id: tenant_id.into(),
            seq,
            hash,
            unchained,
        }
    }

    /// Returns the line with which an export of the tenant ends, without a line feed.
    pub fn line(&self) -> String {
        line::head(self)
    }
}
