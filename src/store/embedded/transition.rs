//! A transition of an action: its row, its event and its audit row.

use rusqlite::{Connection, params};
use uuid::Uuid;

use super::rows::{self, CallId, Record};
use crate::protocol::{Action, Decision, RequestId, Status};
use crate::store::rule::{Asked, Recorded, Ruling, canonical_call, payloads_differ, rule};
use crate::store::{Actor, Decide, Decided, Fingerprinted, Identity, Submit, Submitted};

/// Decides, within the transaction that is open.
pub(super) fn decide(connection: &Connection, request: &Decide) -> rusqlite::Result<Decided> {
    let Some(record) = rows::by_identity(connection, &request.identity)? else {
        if request.require_submission {
            return Ok(Decided::NotFound);
        }
        return insert_decided(connection, request).map(Decided::Recorded);
    };
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
            Decided::Recorded(update(connection, record, request)?)
        }
        Ruling::Replay => {
            action.replayed = true;
            Decided::Replayed(action)
        }
        Ruling::Duplicate => Decided::Duplicate(action),
        Ruling::Conflict => Decided::Conflict(action),
        Ruling::PayloadMismatch => Decided::PayloadMismatch(action),
        Ruling::Closed => Decided::Closed(action),
    })
}

/// Submits, within the transaction that is open.
pub(super) fn submit(connection: &Connection, request: &Submit) -> rusqlite::Result<Submitted> {
    if let Some(record) = rows::by_identity(connection, &request.identity)? {
        let asked = request.payload.as_ref().map(Fingerprinted::digest);
        return Ok(if payloads_differ(record.digest.as_ref(), asked) {
            Submitted::PayloadMismatch(record.action)
        } else {
            Submitted::Existing(record.action)
        });
    }
    let new = New {
        identity: &request.identity,
        payload: request.payload.as_ref(),
        call_id: None,
        decision: None,
        comment: None,
    };
    let (id, at, action) = insert(connection, new)?;
    let transition = Transition {
        action: id,
        at,
        from: None,
        to: Status::Pending,
        decision: None,
        actor: &request.actor,
        call_id: request.call_id.as_ref(),
    };
    transition.note(connection)?;
    Ok(Submitted::Recorded(action))
}

/// Shows that a write is taken.
pub(super) fn beat(connection: &Connection) -> rusqlite::Result<()> {
    connection
        .prepare_cached(
            "INSERT INTO heartbeat (id, at) VALUES (1, ?1) ON CONFLICT (id) DO UPDATE SET at = ?1",
        )?
        .execute([rows::now()])?;
    Ok(())
}

pub(super) fn run(connection: &Connection, sql: &str) -> rusqlite::Result<()> {
    connection.prepare_cached(sql)?.execute([])?;
    Ok(())
}

fn insert_decided(connection: &Connection, request: &Decide) -> rusqlite::Result<Action> {
    let new = New {
        identity: &request.identity,
        payload: request.payload.as_ref(),
        call_id: request.call_id.as_ref(),
        decision: Some(request.decision),
        comment: request.comment.as_deref(),
    };
    let (id, at, action) = insert(connection, new)?;
    Transition::decided(id, at, None, request).note(connection)?;
    Ok(action)
}

fn update(connection: &Connection, record: Record, request: &Decide) -> rusqlite::Result<Action> {
    let at = rows::now();
    connection
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
    Transition::decided(record.id, at, Some(from), request).note(connection)?;
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

/// An action that is on record for the first time.
struct New<'a> {
    identity: &'a Identity,
    payload: Option<&'a Fingerprinted>,
    call_id: Option<&'a RequestId>,
    decision: Option<Decision>,
    comment: Option<&'a str>,
}

fn insert(connection: &Connection, new: New<'_>) -> rusqlite::Result<(i64, i64, Action)> {
    let (request_id, at) = (Uuid::new_v4(), rows::now());
    let status = match new.decision {
        Some(_) => Status::Committed,
        None => Status::Pending,
    };
    let decided_at = new.decision.map(|_| at);
    let id = connection
        .prepare_cached(
            "INSERT INTO action (request_id, tenant_id, thread_id, idempotency_key, status, decision, digest, payload, \
             comment, call_id, created_at, decided_at) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12)",
        )?
        .insert(params![
            request_id.as_bytes(),
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
    let mut action = Action::new(RequestId::from(request_id), status);
    action.tenant_id = Some(new.identity.tenant_id.clone());
    action.thread_id = Some(new.identity.thread_id.clone());
    action.idempotency_key = Some(new.identity.idempotency_key.clone());
    action.decision = new.decision;
    action.created_at = Some(rows::from_micros(at));
    action.decided_at = decided_at.map(rows::from_micros);
    action.payload = new.payload.map(|payload| payload.payload().clone());
    action.comment = new.comment.map(str::to_owned);
    Ok((id, at, action))
}

/// What the outbox and the audit trail say of a transition.
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

    fn note(&self, connection: &Connection) -> rusqlite::Result<()> {
        let kind = match self.to {
            Status::Pending => "action.pending",
            Status::Committed => "action.committed",
            Status::Failed => "action.failed",
        };
        connection
            .prepare_cached(
                "INSERT INTO outbox (event_id, action, kind, decision, created_at) VALUES (?1, ?2, ?3, ?4, ?5)",
            )?
            .execute(params![
                Uuid::new_v4().as_bytes(),
                self.action,
                kind,
                self.decision.map(Decision::as_str),
                self.at,
            ])?;
        connection
            .prepare_cached(
                "INSERT INTO audit (at, actor, verb, action, from_status, to_status, call_id) \
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
            )?
            .execute(params![
                self.at,
                self.actor.as_str(),
                self.decision.map_or("submit", Decision::as_str),
                self.action,
                self.from.map(Status::as_str),
                self.to.as_str(),
                CallId(self.call_id),
            ])?;
        Ok(())
    }
}
