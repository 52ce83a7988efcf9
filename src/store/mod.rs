//! The trait [`Store`], its requests and outcomes, and the stores of this crate.
//!
//! A store guarantees at most one decision per identity, and reports nothing before it is durable.
//! Stores answer with outcomes. The server decides which HTTP status an outcome becomes.

mod audit;
mod clock;
mod delivery;
mod error;
mod identity;
#[cfg(feature = "postgres")]
mod migrate;
mod operation;
#[cfg(feature = "postgres")]
mod postgres;
mod repeats;
mod rule;
mod sqlite;
mod statistics;
mod watch;

#[cfg(feature = "test-util")]
pub mod conformance;
#[cfg(feature = "test-util")]
mod memory;

use std::fmt;
use std::future::Future;
use std::time::Duration;

use uuid::Uuid;

use crate::protocol::{Action, Event, Fingerprint, Payload, TenantId};

pub use self::audit::{
    AuditFault, AuditHead, AuditPage, AuditReport, AuditVerifier, VerifiedChain,
};
pub use self::clock::Clock;
pub use self::delivery::{DeadLetter, DueDeliveries, DueDelivery, EndpointState};
pub use self::error::StoreError;
pub use self::identity::Identity;
#[cfg(feature = "test-util")]
pub use self::memory::MemoryStore;
#[cfg(feature = "postgres")]
pub use self::migrate::{Migrated, MigratedTable, Migration, MigrationProgress, MigrationStep};
pub use self::operation::{
    Acquire, Acquired, Cancel, Cancelled, Cursor, Decide, DecideById, Decided, DeliveryResult,
    EndpointTaken, Finish, Finished, Forget, Forgotten, List, MarkDeliveries, Marked, Page, Renew,
    Renewed, Report, Resend, Resent, Resume, Resumed, Start, Submission, Submit, Submitted, Sweep,
    Swept, TakeEndpoint,
};
#[cfg(feature = "postgres")]
pub use self::postgres::{PostgresAuditTrail, PostgresBuilder, PostgresStore};
pub use self::sqlite::{AuditTrail, SqliteStore, Verified};
pub(crate) use self::statistics::DurationCounter;
pub use self::statistics::{ConnectionStatistics, Durations, Statistics, WriterStatistics};
pub use self::watch::{Watch, Watchers};

/// A payload with its digest, the SHA-256 of its canonical form (RFC 8785). Stores compare payloads
/// by digest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fingerprinted {
    payload: Payload,
    fingerprint: Fingerprint,
}

impl Fingerprinted {
    /// Computes the digest of `payload`.
    ///
    /// # Errors
    ///
    /// If an object in the payload repeats a member name, or the payload is nested more than 128
    /// levels deep.
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

    /// The length of the payload's text, in bytes.
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

/// The name of the credential that made a request, for the audit trail. It never comes from a
/// request body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Actor(String);

impl Actor {
    /// Makes an actor from the name of a credential.
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

/// The number of rows in a store.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Totals {
    /// Actions, in any state.
    pub actions: u64,
    /// Actions with a decision on record.
    pub decisions: u64,
    /// Events: one per transition. Each is also a row of the audit trail.
    pub events: u64,
    /// Actions that were removed, with their events. They are not among the others.
    pub removed: u64,
}

/// What waits in a store: how long the oldest actions of all tenants have waited, and what stays of
/// those that were removed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Backlog {
    /// The time since the submission of the oldest action that is pending, if there is one.
    pub pending: Option<Duration>,
    /// The time since the decision on the action that was approved first, of those that were
    /// submitted and that nobody has claimed, if there is one.
    ///
    /// An action that was decided without a submission does not count: its caller acts on the
    /// answer, and seldom claims it.
    pub unclaimed: Option<Duration>,
    /// The number of events that are not in the audit chain yet, if the store has one.
    pub unchained: Option<u64>,
    /// The number of actions of which only a tombstone is left, if the store removes actions.
    pub tombstones: Option<u64>,
}

/// Keeps actions, and records one decision for each.
///
/// # Contract
///
/// - A transition and its event are written in one transaction. The event is both the audit record
///   and what is delivered.
/// - A method returns `Ok` only when everything it reports is durable. This includes what it read:
///   no answer rests on a transaction that could still be lost.
/// - An `Err` from [`decide`](Self::decide) or [`submit`](Self::submit) does not say whether the
///   request was recorded. Sending it again with the same identity and call id is always safe, and
///   settles the question.
/// - An action whose `expires_at` is over is rejected as expired, and a claim whose lease is over
///   has an unknown outcome. No request that may change them sees them otherwise. Reads and whoever
///   waits learn of it within 2 s.
/// - Dropping a future does not cancel its request.
/// - Any number of tasks may call a store. If the store is a shared database, any number of
///   processes may.
///
/// The suite in `store::conformance` (feature `test-util`) checks an implementation.
pub trait Store: Clone + Send + Sync + 'static {
    /// Records a decision, unless what is on record rules it out.
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

    /// Records a decision on the action with an id, on what the reviewer saw.
    ///
    /// # Errors
    ///
    /// If the store is unavailable.
    fn decide_by_id(
        &self,
        request: DecideById,
    ) -> impl Future<Output = Result<Decided, StoreError>> + Send;

    /// Withdraws a pending action.
    ///
    /// # Errors
    ///
    /// If the store is unavailable.
    fn cancel(&self, request: Cancel)
    -> impl Future<Output = Result<Cancelled, StoreError>> + Send;

    /// Spends an approval: gives one caller the claim on an approved action.
    ///
    /// # Errors
    ///
    /// If the store is unavailable.
    fn acquire(
        &self,
        request: Acquire,
    ) -> impl Future<Output = Result<Acquired, StoreError>> + Send;

    /// Extends a claim.
    ///
    /// # Errors
    ///
    /// If the store is unavailable.
    fn renew(&self, request: Renew) -> impl Future<Output = Result<Renewed, StoreError>> + Send;

    /// Records the outcome of a claimed action.
    ///
    /// # Errors
    ///
    /// If the store is unavailable.
    fn finish(&self, request: Finish) -> impl Future<Output = Result<Finished, StoreError>> + Send;

    /// Removes some of the actions that have been over for a time. What stays of each is a
    /// tombstone, which [`decide`](Self::decide) and [`submit`](Self::submit) answer from: they find
    /// the action as it was left, without what people and agents wrote. Everything else finds
    /// nothing.
    ///
    /// A call takes little of the time of other requests. Call it again while there is
    /// [more](Swept::has_more).
    ///
    /// # Errors
    ///
    /// If the store is unavailable, or keeps everything
    /// ([unsupported](StoreError::is_unsupported)).
    fn sweep(&self, request: Sweep) -> impl Future<Output = Result<Swept, StoreError>> + Send;

    /// Reads a page of a tenant's actions.
    ///
    /// # Errors
    ///
    /// If the store is unavailable.
    fn list(&self, request: List) -> impl Future<Output = Result<Page, StoreError>> + Send;

    /// Reads up to `limit` of the tenants that have actions, in order, behind the tenant `after`.
    ///
    /// # Errors
    ///
    /// If the store is unavailable.
    fn tenants(
        &self,
        after: Option<&TenantId>,
        limit: usize,
    ) -> impl Future<Output = Result<Vec<TenantId>, StoreError>> + Send;

    /// Finds a tenant's action by the id that the store gave it, with its history.
    ///
    /// # Errors
    ///
    /// If the store is unavailable.
    fn look_up(
        &self,
        id: Uuid,
        tenant: &TenantId,
    ) -> impl Future<Output = Result<Option<Action>, StoreError>> + Send;

    /// Reads up to `limit` of a tenant's events behind the position `after`, oldest first, each
    /// with its position. Position 0 is before the oldest event.
    ///
    /// The action of each event has the status, decision and execution that the event left it in;
    /// what else it shows is as of now, without what a [list](Self::list) leaves out.
    ///
    /// # Errors
    ///
    /// If the store is unavailable.
    fn events(
        &self,
        tenant: &TenantId,
        after: u64,
        limit: usize,
    ) -> impl Future<Output = Result<Vec<(u64, Event)>, StoreError>> + Send;

    /// Reads up to `limit` events of all tenants behind the position `after`, as
    /// [`events`](Self::events) does for one.
    ///
    /// No event appears later at or before a position that this has returned.
    ///
    /// # Errors
    ///
    /// If the store is unavailable.
    fn all_events(
        &self,
        after: u64,
        limit: usize,
    ) -> impl Future<Output = Result<Vec<(u64, Event)>, StoreError>> + Send;

    /// Gives one server the right to deliver to a webhook endpoint, for a time.
    ///
    /// # Errors
    ///
    /// If the store is unavailable.
    fn take_endpoint(
        &self,
        request: TakeEndpoint,
    ) -> impl Future<Output = Result<EndpointTaken, StoreError>> + Send;

    /// Reads up to `limit` parked events of an endpoint that are to be attempted now, those that
    /// waited longest first.
    ///
    /// No wait is longer than `longest_wait`. If an event would have to wait for longer than that,
    /// the clock was set back since its last attempt, and it is to be attempted now as well.
    ///
    /// # Errors
    ///
    /// If the store is unavailable.
    fn due_deliveries(
        &self,
        endpoint: &str,
        limit: usize,
        longest_wait: Duration,
    ) -> impl Future<Output = Result<DueDeliveries, StoreError>> + Send;

    /// Records what became of deliveries, and extends the right to deliver.
    ///
    /// # Errors
    ///
    /// If the store is unavailable.
    fn mark_deliveries(
        &self,
        request: MarkDeliveries,
    ) -> impl Future<Output = Result<Marked, StoreError>> + Send;

    /// Lets dead letters be delivered after all.
    ///
    /// # Errors
    ///
    /// If the store is unavailable.
    fn resend(&self, request: Resend) -> impl Future<Output = Result<Resent, StoreError>> + Send;

    /// Lets a stopped endpoint take deliveries again.
    ///
    /// # Errors
    ///
    /// If the store is unavailable.
    fn resume(&self, request: Resume) -> impl Future<Output = Result<Resumed, StoreError>> + Send;

    /// Removes an endpoint from the record, unless a server delivers to it.
    ///
    /// # Errors
    ///
    /// If the store is unavailable.
    fn forget_endpoint(
        &self,
        request: Forget,
    ) -> impl Future<Output = Result<Forgotten, StoreError>> + Send;

    /// Reads the state of every endpoint on record, by name. It must cost little however many events
    /// an endpoint has not received.
    ///
    /// # Errors
    ///
    /// If the store is unavailable.
    fn endpoints(&self) -> impl Future<Output = Result<Vec<EndpointState>, StoreError>> + Send;

    /// Reads up to `limit` dead letters of an endpoint, oldest event first.
    ///
    /// # Errors
    ///
    /// If the store is unavailable.
    fn dead_letters(
        &self,
        endpoint: &str,
        limit: usize,
    ) -> impl Future<Output = Result<Vec<DeadLetter>, StoreError>> + Send;

    /// Returns the position of the newest event of all tenants, or 0.
    ///
    /// # Errors
    ///
    /// If the store is unavailable.
    fn newest_event(&self) -> impl Future<Output = Result<u64, StoreError>> + Send;

    /// Finds an action by the id that the store gave it, or else by a call id (`X-Request-Id`) that
    /// names exactly one action.
    ///
    /// With a tenant, only that tenant's actions count: no other action is found, and none can make
    /// a call id ambiguous. Without a tenant, a call id must be unique among all actions.
    ///
    /// The ids of calls that made a transition are on record. Calls answered [`Decided::Duplicate`]
    /// or [`Submitted::Existing`] changed nothing. Writing their ids down would let a caller who
    /// repeats itself fill the disk, so a store remembers some of them, and may forget them when it
    /// is closed. Such an id never hides one that is on record.
    ///
    /// # Errors
    ///
    /// If the store is unavailable.
    fn find(
        &self,
        id: Uuid,
        tenant: Option<&TenantId>,
    ) -> impl Future<Output = Result<Option<Action>, StoreError>> + Send;

    /// Subscribes to the action that has this id of the store.
    ///
    /// Subscribe first, then read, then wait: this order misses no change. A wake-up is only a
    /// hint, and may be lost where several processes share the store, so a waiter must also poll.
    fn watch(&self, id: Uuid) -> Watch;

    /// Subscribes to the events of a tenant, as [`watch`](Self::watch) does to one action.
    fn watch_tenant(&self, tenant: &TenantId) -> Watch;

    /// Subscribes to the events of all tenants, as [`watch`](Self::watch) does to one action.
    fn watch_all(&self) -> Watch;

    /// Confirms, by a durable write, that decisions can be recorded.
    ///
    /// # Errors
    ///
    /// If they cannot be recorded.
    fn check(&self) -> impl Future<Output = Result<(), StoreError>> + Send;

    /// Reads what waits. It must cost little however many actions are on record.
    ///
    /// # Errors
    ///
    /// If the store is unavailable.
    fn backlog(&self) -> impl Future<Output = Result<Backlog, StoreError>> + Send;

    /// Returns what this store has done since it was opened. It reads numbers that are at hand.
    fn statistics(&self) -> Statistics;

    /// Counts the rows on record.
    ///
    /// # Errors
    ///
    /// If the store is unavailable.
    fn totals(&self) -> impl Future<Output = Result<Totals, StoreError>> + Send;
}
