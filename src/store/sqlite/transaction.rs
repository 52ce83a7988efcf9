//! A transaction of the writer: the ledger that operations change.

use std::time::SystemTime;

use rusqlite::{Connection, params};
use uuid::Uuid;

use super::repeats::{Repeat, Repeats};
use super::rows::{self, CallId};
use crate::protocol::{Decision, RequestId, Status, uuid_v7};
use crate::store::Identity;
use crate::store::operation::{Event, Inserted, Ledger, New, Record};

/// An open transaction.
pub(super) struct Transaction<'a> {
    connection: &'a Connection,
    repeats: &'a Repeats,
    /// Remembered once the transaction is committed.
    repeated: Vec<Repeat>,
    has_beaten: bool,
}

impl<'a> Transaction<'a> {
    pub(super) fn begin(
        connection: &'a Connection,
        repeats: &'a Repeats,
    ) -> rusqlite::Result<Self> {
        // Immediate, because a transaction that reads first and writes later fails if another
        // program wrote in between.
        run(connection, "BEGIN IMMEDIATE")?;
        Ok(Self {
            connection,
            repeats,
            repeated: Vec::new(),
            has_beaten: false,
        })
    }

    pub(super) fn commit(self) -> rusqlite::Result<()> {
        run(self.connection, "COMMIT")?;
        self.repeats.add(&self.repeated);
        Ok(())
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
        rows::from_micros(rows::micros(SystemTime::now()))
    }

    fn find(&self, identity: &Identity) -> rusqlite::Result<Option<Record>> {
        rows::by_identity(self.connection, identity)
    }

    fn insert(&mut self, new: New<'_>) -> rusqlite::Result<Inserted> {
        let request_id = uuid_v7();
        let at = rows::micros(new.at);
        let inserted = self
            .connection
            .prepare_cached(
                "INSERT INTO action (request_id, identity, tenant_id, thread_id, idempotency_key, \
                 status, decision, digest, payload, comment, call_id, created_at, decided_at) \
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13) \
                 ON CONFLICT (identity) DO NOTHING",
            )?
            .execute(params![
                request_id.as_bytes(),
                rows::digest(new.identity),
                new.identity.tenant_id.as_str(),
                new.identity.thread_id.as_str(),
                new.identity.idempotency_key.as_str(),
                new.status().as_str(),
                new.decision.map(Decision::as_str),
                new.payload.map(|payload| payload.digest()),
                new.payload.map(|payload| payload.payload().as_str()),
                new.comment,
                CallId(new.call_id),
                at,
                new.decision.map(|_| at),
            ])?;
        if inserted == 1 {
            let row = self.connection.last_insert_rowid();
            return Ok(Inserted::New(new.record(row, request_id.into())));
        }
        // If the row belongs to another identity with the same digest, nothing is found. That is an
        // error, so that no other identity's action is answered.
        let record = self.find(new.identity)?;
        let record = record.ok_or(rusqlite::Error::QueryReturnedNoRows)?;
        Ok(Inserted::Existing(record))
    }

    fn update(&mut self, record: &Record) -> rusqlite::Result<()> {
        let action = &record.action;
        let call_id = record.call_id.as_deref().map(RequestId::new);
        self.connection
            .prepare_cached(
                "UPDATE action SET status = ?2, decision = ?3, execution = ?4, \
                 closed = CASE WHEN ?5 THEN closed END, digest = ?6, payload = ?7, comment = ?8, \
                 call_id = ?9, decided_at = ?10 WHERE id = ?1",
            )?
            .execute(params![
                record.row,
                action.status.as_str(),
                action.decision.map(Decision::as_str),
                action.execution.map(crate::protocol::Execution::as_str),
                record.closed,
                record.digest,
                action.payload.as_ref().map(|payload| payload.as_str()),
                action.comment,
                CallId(call_id.as_ref().and_then(|id| id.as_ref().ok())),
                action.decided_at.map(rows::micros),
            ])?;
        Ok(())
    }

    fn append(&mut self, event: Event<'_>) -> rusqlite::Result<()> {
        self.connection
            .prepare_cached(
                "INSERT INTO event (event_id, at, actor, verb, action, from_status, to_status, \
                 decision, call_id) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9)",
            )?
            .execute(params![
                Uuid::new_v4().as_bytes(),
                rows::micros(event.at),
                event.actor.as_str(),
                event.verb,
                event.row,
                event.from.map(Status::as_str),
                event.to.as_str(),
                event.decision.map(Decision::as_str),
                CallId(event.call_id),
            ])?;
        Ok(())
    }

    fn remember(&mut self, record: &Record, call_id: Option<&RequestId>) {
        if let Some(call) = call_id.and_then(RequestId::as_uuid) {
            self.repeated.push((call, record.row));
        }
    }
}

fn run(connection: &Connection, sql: &str) -> rusqlite::Result<()> {
    connection.prepare_cached(sql)?.execute([])?;
    Ok(())
}
