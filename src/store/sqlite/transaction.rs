//! A transaction of the writer: the ledger that operations change.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use rusqlite::{Connection, params};
use uuid::Uuid;

use super::chain::{self, Extension};
use super::fault::is_fatal;
use super::repeats::{Repeat, Repeats};
use super::rows::{self, CallId};
use super::{deliveries, list, sweep};
use crate::protocol::{Action, Closed, Decision, Digest, EventKind, Execution, Payload, RequestId};
use crate::protocol::{JsonText, Status, TenantId, uuid_v7};
use crate::store::operation::{
    Aged, Endpoint, Inserted, Lease, Ledger, New, Record, Tombstone, Transition, Undelivered,
    settle,
};
use crate::store::statistics::EventCounter;
use crate::store::{Clock, Identity, Watchers};

/// An open transaction.
pub(super) struct Transaction<'a> {
    connection: &'a Connection,
    repeats: &'a Repeats,
    clock: &'a Clock,
    /// Remembered once the transaction is committed.
    repeated: Vec<Repeat>,
    has_beaten: bool,
    is_behind: bool,
    changes: Changes,
    /// The number of actions that were removed, and of those that the database counts.
    removed: u64,
    counted: u64,
    /// Whether there is a tombstone, once that was looked for.
    has_tombstones: Option<bool>,
    /// The number of requests in the writer's queue, if there is one and no other request shares
    /// the transaction.
    queued: Option<&'a AtomicU64>,
}

/// The actions that a transaction changed, and how.
#[derive(Debug, Default)]
pub(super) struct Changes(Vec<(Uuid, TenantId, EventKind)>);

/// What a transaction wrote.
pub(super) struct Written {
    pub(super) has_written: bool,
    /// Whether more records are due.
    pub(super) is_behind: bool,
    /// How long the commit took.
    pub(super) took: Duration,
    pub(super) changes: Changes,
    /// The number of actions that were removed.
    pub(super) removed: u64,
}

impl Changes {
    /// Wakes whoever waits for one of the actions, or for an event of their tenants.
    pub(super) fn wake(self, watchers: &Watchers) {
        for (id, tenant, _) in self.0 {
            watchers.wake(id, &tenant);
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn count(&self, events: &EventCounter) {
        for (_, _, kind) in &self.0 {
            events.add(*kind);
        }
    }

    fn add(&mut self, action: &Action, kind: EventKind) {
        if let (Some(id), Some(tenant)) = (action.request_id.as_uuid(), &action.tenant_id) {
            self.0.push((id, tenant.clone(), kind));
        }
    }
}

impl<'a> Transaction<'a> {
    pub(super) fn begin(
        connection: &'a Connection,
        repeats: &'a Repeats,
        clock: &'a Clock,
    ) -> rusqlite::Result<Self> {
        // Immediate, because a transaction that reads first and writes later fails if another
        // program wrote in between.
        run(connection, "BEGIN IMMEDIATE")?;
        Ok(Self {
            connection,
            repeats,
            clock,
            repeated: Vec::new(),
            has_beaten: false,
            is_behind: false,
            changes: Changes::default(),
            removed: 0,
            counted: 0,
            has_tombstones: None,
            queued: None,
        })
    }

    /// Notes that this transaction has a single request, and how many others are in the queue.
    pub(super) fn set_alone(&mut self, queued: &'a AtomicU64) {
        self.queued = Some(queued);
    }

    pub(super) fn commit(self) -> rusqlite::Result<Written> {
        let begun = Instant::now();
        run(self.connection, "COMMIT")?;
        let took = begun.elapsed();
        self.repeats.add(&self.repeated);
        Ok(Written {
            has_written: self.has_beaten || !self.changes.0.is_empty() || self.removed > 0,
            is_behind: self.is_behind,
            took,
            changes: self.changes,
            removed: self.removed,
        })
    }

    /// Brings up to `limit` records that are due up to the present: pending ones whose time is over,
    /// and claimed ones whose lease has ended. It stops sooner after `bytes` of payloads, each of
    /// which is written anew with its row.
    pub(super) fn settle_due(&mut self, limit: usize, bytes: usize) -> rusqlite::Result<()> {
        let due = rows::due(self.connection, self.now(), limit)?;
        let mut is_full = due.len() >= limit;
        let before = self.changes.0.len();
        let mut left = bytes;
        for row in due {
            if left == 0 {
                is_full = true;
                break;
            }
            let record = match rows::by_row(self.connection, row) {
                Ok(record) => record,
                // Nobody else waits for a row that an edit by hand has spoilt.
                Err(error) if !is_fatal(&error) => {
                    tracing::warn!(row, %error, "an action that is due cannot be read");
                    None
                }
                Err(error) => return Err(error),
            };
            if let Some(record) = record {
                left = left.saturating_sub(record.size());
                settle(record, self)?;
            }
        }
        // A record that an edit by hand keeps due must not keep the writer busy.
        self.is_behind |= is_full && self.changes.0.len() > before;
        Ok(())
    }

    /// Inserts links of the audit chain.
    pub(super) fn extend_chain(&mut self, extension: &Extension) -> rusqlite::Result<()> {
        extension.insert(self.connection)
    }

    fn has_tombstones(&mut self) -> rusqlite::Result<bool> {
        if let Some(known) = self.has_tombstones {
            return Ok(known);
        }
        let found = sweep::has_tombstones(self.connection)?;
        self.has_tombstones = Some(found);
        Ok(found)
    }

    /// Writes the heartbeat, which shows that the database takes writes.
    pub(super) fn beat(&mut self) -> rusqlite::Result<()> {
        if self.has_beaten {
            return Ok(());
        }
        self.connection
            .prepare_cached(
                "INSERT INTO heartbeat (id, at) VALUES (1, ?1) \
                 ON CONFLICT (id) DO UPDATE SET at = ?1",
            )?
            .execute([rows::micros(SystemTime::now())])?;
        self.has_beaten = true;
        Ok(())
    }
}

impl Ledger for Transaction<'_> {
    type Error = rusqlite::Error;

    fn now(&self) -> SystemTime {
        self.clock.now()
    }

    fn others_wait(&self) -> bool {
        self.queued
            .is_none_or(|queued| queued.load(Ordering::Relaxed) > 0)
    }

    fn find(&self, identity: &Identity) -> rusqlite::Result<Option<Record>> {
        rows::by_identity(self.connection, identity)
    }

    fn find_by_id(&self, id: Uuid, tenant: &TenantId) -> rusqlite::Result<Option<Record>> {
        rows::by_request_id(self.connection, id, tenant)
    }

    fn insert(&mut self, new: New<'_>) -> rusqlite::Result<Inserted> {
        let request_id = uuid_v7();
        // The number of the row is known only afterwards.
        let mut record = new.record(0, request_id.into());
        let action = &record.action;
        let inserted = self
            .connection
            .prepare_cached(
                "INSERT INTO action (request_id, identity, tenant_id, thread_id, idempotency_key, \
                 status, decision, digest, payload, comment, title, expires_at, allow_edit, \
                 submitted_by, decided_by, call_id, created_at, decided_at) \
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16, ?17, ?18) \
                 ON CONFLICT (identity) DO NOTHING",
            )?
            .execute(params![
                request_id.as_bytes(),
                new.identity.digest(),
                new.identity.tenant_id.as_str(),
                new.identity.thread_id.as_str(),
                new.identity.idempotency_key.as_str(),
                action.status.as_str(),
                action.decision.map(Decision::as_str),
                record.submitted_digest.as_ref().map(Digest::as_bytes),
                action.payload.as_ref().map(Payload::as_str),
                action.comment,
                action.title,
                action.expires_at.map(rows::micros),
                action.allow_edit,
                record.submitted_by,
                action.decided_by,
                CallId::of(record.call_id.as_deref()),
                rows::micros(new.at),
                action.decided_at.map(rows::micros),
            ])?;
        if inserted == 1 {
            record.row = self.connection.last_insert_rowid();
            // This comes second, so that it costs nothing where the action is on record. It is a
            // statement of its own: as a condition of the insert it took 5 % of all decisions, of
            // those without a tombstone too.
            if self.has_tombstones()?
                && let Some(tombstone) = self.tombstone(new.identity)?
            {
                sweep::take_back(self.connection, record.row)?;
                return Ok(Inserted::Removed(tombstone));
            }
            return Ok(Inserted::New(record));
        }
        // If the row belongs to another identity with the same digest, nothing is found. That is an
        // error, so that no other identity's action is answered.
        let record = self.find(new.identity)?;
        let record = record.ok_or(rusqlite::Error::QueryReturnedNoRows)?;
        Ok(Inserted::Existing(record))
    }

    fn update(&mut self, record: &Record) -> rusqlite::Result<()> {
        let action = &record.action;
        let edited = action.edited_payload.as_ref();
        self.connection
            .prepare_cached(
                "UPDATE action SET status = ?2, decision = ?3, execution = ?4, closed = ?5, \
                 digest = ?6, payload = ?7, edited_digest = ?8, edited_payload = ?9, comment = ?10, \
                 decided_by = ?11, result = ?12, reason = ?13, call_id = ?14, decided_at = ?15 \
                 WHERE id = ?1",
            )?
            .execute(params![
                record.row,
                action.status.as_str(),
                action.decision.map(Decision::as_str),
                action.execution.map(Execution::as_str),
                action.closed.map(Closed::as_str),
                record.submitted_digest.as_ref().map(Digest::as_bytes),
                action.payload.as_ref().map(Payload::as_str),
                edited.and(action.digest.as_ref()).map(Digest::as_bytes),
                edited.map(Payload::as_str),
                action.comment,
                action.decided_by,
                action.result.as_ref().map(JsonText::as_str),
                action.reason,
                CallId::of(record.call_id.as_deref()),
                action.decided_at.map(rows::micros),
            ])?;
        Ok(())
    }

    fn append(&mut self, record: &Record, transition: Transition<'_>) -> rusqlite::Result<()> {
        let (action, digest) = (&record.action, transition.digest(record));
        // The action has this one, for good. A decision writes a tenth less without a copy.
        let digest = digest
            .as_ref()
            .map(|digest| match &record.submitted_digest {
                Some(submitted) if submitted == digest => rows::AS_SUBMITTED,
                _ => &digest.as_bytes()[..],
            });
        self.connection
            .prepare_cached(
                "INSERT INTO event (event_id, at, actor, kind, tenant_id, action, from_status, \
                 to_status, decision, execution, call_id, digest) \
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12)",
            )?
            .execute(params![
                uuid_v7().as_bytes(),
                rows::micros(transition.at),
                transition.actor,
                transition.kind.as_str(),
                action.tenant_id.as_ref().map(TenantId::as_str),
                record.row,
                transition.from.map(Status::as_str),
                action.status.as_str(),
                action.decision.map(Decision::as_str),
                action.execution.map(Execution::as_str),
                CallId::of(transition.call_id.map(RequestId::as_str)),
                digest,
            ])?;
        self.changes.add(action, transition.kind);
        Ok(())
    }

    fn has_made(&self, row: i64, kind: EventKind, call_id: &RequestId) -> rusqlite::Result<bool> {
        self.connection
            .prepare_cached(rows::HAS_MADE)?
            .exists(params![
                row,
                kind.as_str(),
                CallId::of(Some(call_id.as_str()))
            ])
    }

    fn lease(&self, row: i64) -> rusqlite::Result<Option<Lease>> {
        rows::lease(self.connection, row)
    }

    fn set_lease(&mut self, row: i64, lease: &Lease) -> rusqlite::Result<()> {
        self.connection
            .prepare_cached(
                "INSERT OR REPLACE INTO claim (action, token, fence, until, actor, call_id) \
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
            )?
            .execute(params![
                row,
                lease.token.as_bytes(),
                lease.fence,
                lease.until.map(rows::micros),
                lease.actor,
                CallId::of(lease.call_id.as_deref()),
            ])?;
        Ok(())
    }

    fn remember(&mut self, record: &Record, call_id: Option<&RequestId>) {
        if let Some(call) = call_id.and_then(RequestId::as_uuid) {
            self.repeated.push((call, record.row));
        }
    }

    fn newest_event(&self) -> rusqlite::Result<u64> {
        list::newest_event(self.connection)
    }

    fn endpoint(&self, name: &str) -> rusqlite::Result<Option<Endpoint>> {
        deliveries::endpoint(self.connection, name)
    }

    fn insert_endpoint(&mut self, name: &str, position: u64) -> rusqlite::Result<Endpoint> {
        deliveries::insert_endpoint(self.connection, name, position)
    }

    fn update_endpoint(&mut self, endpoint: &Endpoint) -> rusqlite::Result<()> {
        deliveries::update_endpoint(self.connection, endpoint)
    }

    fn remove_endpoint(&mut self, endpoint: &Endpoint) -> rusqlite::Result<()> {
        deliveries::remove_endpoint(self.connection, endpoint)
    }

    fn parked(&self, endpoint: &Endpoint) -> rusqlite::Result<Vec<(u64, Uuid)>> {
        deliveries::parked(self.connection, endpoint)
    }

    fn dead(&self, endpoint: &Endpoint) -> rusqlite::Result<Vec<(u64, Uuid)>> {
        deliveries::dead(self.connection, endpoint)
    }

    fn undelivered(
        &self,
        endpoint: &Endpoint,
        position: u64,
    ) -> rusqlite::Result<Option<Undelivered>> {
        deliveries::undelivered_at(self.connection, endpoint, position)
    }

    fn first_parked(
        &self,
        endpoint: &Endpoint,
        position: u64,
    ) -> rusqlite::Result<Option<Undelivered>> {
        deliveries::first_parked(self.connection, endpoint, position)
    }

    fn set_undelivered(
        &mut self,
        endpoint: &Endpoint,
        undelivered: &Undelivered,
    ) -> rusqlite::Result<()> {
        deliveries::set_undelivered(self.connection, endpoint, undelivered)
    }

    fn remove_undelivered(&mut self, endpoint: &Endpoint, position: u64) -> rusqlite::Result<()> {
        deliveries::remove_undelivered(self.connection, endpoint, position)
    }

    fn tombstone(&self, identity: &Identity) -> rusqlite::Result<Option<Tombstone>> {
        sweep::tombstone(self.connection, identity)
    }

    fn remove(&mut self, record: &Record) -> rusqlite::Result<()> {
        self.removed += 1;
        self.has_tombstones = Some(true);
        sweep::remove(self.connection, record.row)
    }

    fn newest_action(&self) -> rusqlite::Result<Option<i64>> {
        sweep::newest_action(self.connection)
    }

    fn endpoints(&self) -> rusqlite::Result<Vec<Endpoint>> {
        deliveries::all_endpoints(self.connection)
    }

    fn events_between(
        &self,
        after: u64,
        last: u64,
        limit: usize,
    ) -> rusqlite::Result<Vec<(u64, SystemTime)>> {
        sweep::events_between(self.connection, after, last, limit)
    }

    fn chain_towards(&mut self, position: u64) -> rusqlite::Result<u64> {
        let reached = chain::extend_towards(self.connection, deliveries::seq(position))?;
        Ok(reached.unsigned_abs())
    }

    fn aged(&self, position: u64) -> rusqlite::Result<Option<Aged>> {
        sweep::aged(self.connection, position)
    }

    fn outline(&self, row: i64) -> rusqlite::Result<Option<Record>> {
        sweep::outline(self.connection, row)
    }

    fn swept(&self) -> rusqlite::Result<u64> {
        sweep::swept(self.connection)
    }

    fn set_swept(&mut self, position: u64) -> rusqlite::Result<()> {
        let uncounted = self.removed - self.counted;
        sweep::set_swept(self.connection, position, uncounted as i64)?;
        self.counted = self.removed;
        Ok(())
    }

    fn postpone(&mut self, position: u64, until: SystemTime) -> rusqlite::Result<()> {
        sweep::postpone(self.connection, position, until)
    }

    fn postponed(
        &self,
        time: SystemTime,
        limit: usize,
    ) -> rusqlite::Result<Vec<(SystemTime, u64)>> {
        sweep::postponed(self.connection, time, limit)
    }

    fn remove_postponed(&mut self, until: SystemTime, position: u64) -> rusqlite::Result<()> {
        sweep::remove_postponed(self.connection, until, position)
    }
}

fn run(connection: &Connection, sql: &str) -> rusqlite::Result<()> {
    connection.prepare_cached(sql)?.execute([])?;
    Ok(())
}
