//! A transition of an action: its row and its event.

use rusqlite::{Connection, params};
use uuid::Uuid;

use super::calls::{Calls, Confirmation, Named};
use super::rows::{self, CallId, Record};
use crate::protocol::{Action, Decision, RequestId, Status};
use crate::store::rule::{Asked, Recorded, Ruling, canonical_call, payloads_differ, rule};
use crate::store::{Actor, Decide, Decided, Fingerprinted, Identity, Submit, Submitted};

/// An open transaction of the writer.
pub(super) struct Transaction<'a> {
    connection: &'a Connection,
    calls: &'a Calls,
    /// The row of the next new action.
    next: i64,
    /// The call ids of the new events, and the sequence number after the last of these.
    named: Vec<Named>,
    end: i64,
    /// The calls that changed nothing.
    confirmed: Vec<Confirmation>,
}

impl<'a> Transaction<'a> {
    pub(super) fn begin(connection: &'a Connection, calls: &'a Calls) -> rusqlite::Result<Self> {
        // Immediate: a transaction that reads first and writes later fails if another program wrote in between.
        run(connection, "BEGIN IMMEDIATE")?;
        let next = connection
            .prepare_cached("SELECT coalesce(max(id), 0) + 1 FROM action")?
            .query_row([], |row| row.get(0))?;
        Ok(Self {
            connection,
            calls,
            next,
            named: Vec::new(),
            end: 0,
            confirmed: Vec::new(),
        })
    }

    pub(super) fn commit(self) -> rusqlite::Result<()> {
        let is_written = self.calls.write(self.connection, &self.named, self.end)?;
        run(self.connection, "COMMIT")?;
        self.calls.add(&self.named, self.end, is_written);
        self.calls.confirm(&self.confirmed);
        Ok(())
    }

    /// Shows that a write is taken.
    pub(super) fn beat(&self) -> rusqlite::Result<()> {
        self.connection
            .prepare_cached(
                "INSERT INTO heartbeat (id, at) VALUES (1, ?1) ON CONFLICT (id) DO UPDATE SET at = ?1",
            )?
            .execute([rows::now()])?;
        Ok(())
    }

    pub(super) fn decide(&mut self, request: &Decide) -> rusqlite::Result<Decided> {
        if request.require_submission {
            return match rows::by_identity(self.connection, &request.identity)? {
                Some(record) => self.decide_again(record, request),
                None => Ok(Decided::NotFound),
            };
        }
        let new = New {
            identity: &request.identity,
            payload: request.payload.as_ref(),
            call_id: request.call_id.as_ref(),
            decision: Some(request.decision),
            comment: request.comment.as_deref(),
        };
        if let Some((id, at, action)) = self.insert(new)? {
            self.note(&Transition::decided(id, at, None, request))?;
            return Ok(Decided::Recorded(action));
        }
        let record = self.recorded(&request.identity)?;
        self.decide_again(record, request)
    }

    /// Decides on an action that is on record.
    fn decide_again(&mut self, record: Record, request: &Decide) -> rusqlite::Result<Decided> {
        let call_id = request.call_id.as_ref().map(canonical_call);
        let ruling = rule(
            Recorded {
                status: record.action.status,
                decision: record.action.decision,
                closed: record.closed,
                digest: record.digest.as_ref(),
                call_id: record.call_id.as_deref(),
            },
            Asked {
                decision: request.decision,
                digest: request.payload.as_ref().map(Fingerprinted::digest),
                call_id: call_id.as_deref(),
            },
        );
        let mut action = record.action;
        Ok(match ruling {
            Ruling::Record => {
                let record = Record { action, ..record };
                Decided::Recorded(self.update(record, request)?)
            }
            Ruling::Replay => {
                action.replayed = true;
                Decided::Replayed(action)
            }
            Ruling::Duplicate => {
                self.confirm(record.id, request.call_id.as_ref());
                Decided::Duplicate(action)
            }
            Ruling::Conflict => Decided::Conflict(action),
            Ruling::PayloadMismatch => Decided::PayloadMismatch(action),
            Ruling::Closed => Decided::Closed(action),
        })
    }

    pub(super) fn submit(&mut self, request: &Submit) -> rusqlite::Result<Submitted> {
        let new = New {
            identity: &request.identity,
            payload: request.payload.as_ref(),
            call_id: None,
            decision: None,
            comment: None,
        };
        if let Some((id, at, action)) = self.insert(new)? {
            self.note(&Transition {
                action: id,
                at,
                from: None,
                to: Status::Pending,
                decision: None,
                actor: &request.actor,
                call_id: request.call_id.as_ref(),
            })?;
            return Ok(Submitted::Recorded(action));
        }
        let record = self.recorded(&request.identity)?;
        let asked = request.payload.as_ref().map(Fingerprinted::digest);
        Ok(if payloads_differ(record.digest.as_ref(), asked) {
            Submitted::PayloadMismatch(record.action)
        } else {
            self.confirm(record.id, request.call_id.as_ref());
            Submitted::Existing(record.action)
        })
    }

    /// Takes note of a call that changes nothing.
    fn confirm(&mut self, action: i64, call_id: Option<&RequestId>) {
        if let Some(call) = call_id.and_then(RequestId::as_uuid_v4) {
            self.confirmed.push((call, action));
        }
    }

    /// The action that kept one of its identity from being inserted. Were it another identity's, of the same digest, this is
    /// an error, and nothing is answered that is not so.
    fn recorded(&self, identity: &Identity) -> rusqlite::Result<Record> {
        rows::by_identity(self.connection, identity)?.ok_or(rusqlite::Error::QueryReturnedNoRows)
    }

    fn update(&mut self, record: Record, request: &Decide) -> rusqlite::Result<Action> {
        // A clock that was set back does not put the decision before what it is on.
        let created_at = record.action.created_at.map_or(0, rows::micros);
        let at = rows::now().max(created_at);
        self.connection
        .prepare_cached(
            "UPDATE action SET status = 'COMMITTED', decision = ?2, execution = NULL, closed = NULL, decided_at = ?3, \
             call_id = ?4, comment = ?5, payload = coalesce(payload, ?6), digest = coalesce(digest, ?7) WHERE id = ?1",
        )?
        .execute(params![
            record.id,
            request.decision.as_str(),
            at,
            CallId(request.call_id.as_ref()),
            request.comment,
            request.payload.as_ref().map(|payload| payload.payload().as_str()),
            request.payload.as_ref().map(Fingerprinted::digest),
        ])?;
        let from = record.action.status;
        self.note(&Transition::decided(record.id, at, Some(from), request))?;
        let mut action = record.action;
        action.status = Status::Committed;
        action.decision = Some(request.decision);
        action.execution = None;
        action.decided_at = Some(rows::from_micros(at));
        action.comment.clone_from(&request.comment);
        if action.payload.is_none() {
            action.payload = request.payload.as_ref().map(|new| new.payload().clone());
        }
        Ok(action)
    }

    /// Inserts an action, unless its identity is on record. Most are new, so nobody looks before.
    fn insert(&mut self, new: New<'_>) -> rusqlite::Result<Option<(i64, i64, Action)>> {
        let (id, at) = (self.next, rows::now());
        let request_id = self.calls.secret().request_id(id);
        let status = match new.decision {
            Some(_) => Status::Committed,
            None => Status::Pending,
        };
        let decided_at = new.decision.map(|_| at);
        let inserted = self.connection
        .prepare_cached(
            "INSERT INTO action (id, request_id, identity, tenant_id, thread_id, idempotency_key, status, decision, digest, payload, \
             comment, call_id, created_at, decided_at) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14) \
             ON CONFLICT (identity) DO NOTHING",
        )?
        .execute(params![
            id,
            request_id.as_bytes(),
            rows::digest(new.identity),
            new.identity.tenant_id.as_str(),
            new.identity.thread_id.as_str(),
            new.identity.idempotency_key.as_str(),
            status.as_str(),
            new.decision.map(Decision::as_str),
            new.payload.map(Fingerprinted::digest),
            new.payload.map(|payload| payload.payload().as_str()),
            new.comment,
            CallId(new.call_id),
            at,
            decided_at,
        ])?;
        if inserted == 0 {
            return Ok(None);
        }
        self.next += 1;
        let mut action = Action::new(RequestId::from(request_id), status);
        action.tenant_id = Some(new.identity.tenant_id.clone());
        action.thread_id = Some(new.identity.thread_id.clone());
        action.idempotency_key = Some(new.identity.idempotency_key.clone());
        action.decision = new.decision;
        action.created_at = Some(rows::from_micros(at));
        action.decided_at = decided_at.map(rows::from_micros);
        action.payload = new.payload.map(|payload| payload.payload().clone());
        action.comment = new.comment.map(str::to_owned);
        Ok(Some((id, at, action)))
    }

    fn note(&mut self, transition: &Transition<'_>) -> rusqlite::Result<()> {
        let seq = self
            .connection
            .prepare_cached(
                "INSERT INTO event (event_id, at, actor, verb, action, from_status, to_status, decision, call_id) \
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9)",
            )?
            .insert(params![
                Uuid::new_v4().as_bytes(),
                transition.at,
                transition.actor.as_str(),
                transition.decision.map_or("submit", Decision::as_str),
                transition.action,
                transition.from.map(Status::as_str),
                transition.to.as_str(),
                transition.decision.map(Decision::as_str),
                CallId(transition.call_id),
            ])?;
        self.end = seq + 1;
        if let Some(call) = transition.call_id.and_then(RequestId::as_uuid_v4) {
            self.named.push(self.calls.named(call, seq));
        }
        Ok(())
    }
}

fn run(connection: &Connection, sql: &str) -> rusqlite::Result<()> {
    connection.prepare_cached(sql)?.execute([])?;
    Ok(())
}

/// An action that is on record for the first time.
struct New<'a> {
    identity: &'a Identity,
    payload: Option<&'a Fingerprinted>,
    call_id: Option<&'a RequestId>,
    decision: Option<Decision>,
    comment: Option<&'a str>,
}

/// What the event says of a transition.
struct Transition<'a> {
    action: i64,
    at: i64,
    from: Option<Status>,
    to: Status,
    decision: Option<Decision>,
    actor: &'a Actor,
    call_id: Option<&'a RequestId>,
}

impl<'a> Transition<'a> {
    fn decided(action: i64, at: i64, from: Option<Status>, request: &'a Decide) -> Self {
        Self {
            action,
            at,
            from,
            to: Status::Committed,
            decision: Some(request.decision),
            actor: &request.actor,
            call_id: request.call_id.as_ref(),
        }
    }
}
