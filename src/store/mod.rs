//! Where decisions are kept: [`Store`], its outcomes, and the stores.
//!
//! A store makes the promise that everything rests on: at most one decision for an identity, and nothing reported before
//! it is durable. What an outcome means for a caller (its HTTP status) is the server's business; a store speaks in
//! outcomes.

mod embedded;
mod error;
mod operation;
mod rule;
mod watch;

#[cfg(feature = "test-util")]
pub mod conformance;
#[cfg(feature = "test-util")]
mod memory;

use std::fmt;
use std::future::Future;

use uuid::Uuid;

use crate::protocol::{Action, Fingerprint, IdempotencyKey, Payload, TenantId, ThreadId};

pub use self::embedded::{Embedded, Verified};
pub use self::error::StoreError;
#[cfg(feature = "test-util")]
pub use self::memory::Memory;
pub use self::operation::{Decide, Decided, Submit, Submitted};
pub use self::watch::{Watch, Watchers};

/// What names an action: tenant, thread and idempotency key.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[allow(clippy::exhaustive_structs)]
pub struct Identity {
    /// Whose action it is.
    pub tenant_id: TenantId,
    /// The conversation or agent run.
    pub thread_id: ThreadId,
    /// The key under which it is asked for.
    pub idempotency_key: IdempotencyKey,
}

/// A payload with the SHA-256 digest of its canonical form (RFC 8785), by which stores compare payloads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fingerprinted {
    payload: Payload,
    fingerprint: Fingerprint,
}

impl Fingerprinted {
    /// Digests `payload`.
    ///
    /// # Errors
    ///
    /// If an object in the payload names a member twice, or the payload is nested more than 128 levels deep.
    pub fn new(payload: Payload) -> Result<Self, serde_json::Error> {
        let fingerprint = Fingerprint::of_payload(&payload)?;
        Ok(Self {
            payload,
            fingerprint,
        })
    }

    /// Returns the payload.
    pub fn payload(&self) -> &Payload {
        &self.payload
    }

    /// How long the payload's text is, in bytes.
    pub(crate) fn len(&self) -> usize {
        self.payload.as_str().len()
    }

    /// Returns the digest.
    pub fn digest(&self) -> &[u8; 32] {
        &self.fingerprint.0
    }
}

impl From<(Payload, Fingerprint)> for Fingerprinted {
    fn from((payload, fingerprint): (Payload, Fingerprint)) -> Self {
        Self {
            payload,
            fingerprint,
        }
    }
}

/// Who asks: the name of a credential, for the audit trail. Never a name from a body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Actor(String);

impl Actor {
    /// Names the credential.
    pub fn new(name: impl Into<String>) -> Self {
        Self(name.into())
    }

    /// Returns the name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Actor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// How many rows a store holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Totals {
    /// Actions, in any state.
    pub actions: u64,
    /// Actions with a decision on record.
    pub decisions: u64,
    /// Events, each of which is a row of the audit trail too: one for each transition.
    pub events: u64,
}

/// Keeps actions and decides each of them once.
///
/// # Contract
///
/// - The transition and its event, which is to be delivered and is the audit trail too, are written in one transaction.
/// - A method returns `Ok` only after what it reports is durable, and the same holds for what it read: an answer never
///   rests on a transaction that could still be lost.
/// - An `Err` from [`decide`](Self::decide) or [`submit`](Self::submit) leaves open whether the request was recorded. To ask
///   again with the same identity and call id is always safe and settles it.
/// - Dropping a future does not take back what it asked for.
/// - Calls may come from any number of tasks, and where the store is a shared database, from any number of processes.
///
/// The suite in `store::conformance` (feature `test-util`) checks an implementation.
pub trait Store: Clone + Send + Sync + 'static {
    /// Records a decision, unless what is on record speaks against it.
    ///
    /// # Errors
    ///
    /// If the store is unavailable.
    fn decide(&self, request: Decide) -> impl Future<Output = Result<Decided, StoreError>> + Send;

    /// Records a pending action.
    ///
    /// # Errors
    ///
    /// If the store is unavailable.
    fn submit(&self, request: Submit)
    -> impl Future<Output = Result<Submitted, StoreError>> + Send;

    /// Finds an action by the id that the store gave it, or else by a call id (`X-Request-Id`) that names one action only.
    ///
    /// With a tenant, no other tenant's action is found, and none keeps a call id from naming one of this tenant's. Without, a call
    /// id must name one action of all.
    ///
    /// The ids of calls that made a transition are on record. Those of calls that were answered [`Decided::Duplicate`] or
    /// [`Submitted::Existing`] changed nothing, and a write for each would let a caller who repeats itself fill the disk: a store
    /// remembers some, and may forget them when it is closed. Such an id never hides one that is on record.
    ///
    /// # Errors
    ///
    /// If the store is unavailable.
    fn find(
        &self,
        id: Uuid,
        tenant: Option<&TenantId>,
    ) -> impl Future<Output = Result<Option<Action>, StoreError>> + Send;

    /// Subscribes to an action, by the id that the store gave it.
    ///
    /// Subscribe, then read, then wait: a change between the two is not missed. The wake-up is a hint and may be lost where
    /// several processes share the store, so a waiter also polls.
    fn watch(&self, id: Uuid) -> Watch;

    /// Takes a write, durably, to show that decisions can be recorded.
    ///
    /// # Errors
    ///
    /// If they cannot.
    fn check(&self) -> impl Future<Output = Result<(), StoreError>> + Send;

    /// Counts what is on record.
    ///
    /// # Errors
    ///
    /// If the store is unavailable.
    fn totals(&self) -> impl Future<Output = Result<Totals, StoreError>> + Send;
}
