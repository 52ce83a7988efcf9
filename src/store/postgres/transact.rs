//! Running an operation in a transaction, until its outcome is known.

use std::time::{Duration, Instant};

use tokio_postgres::types::Type;
use uuid::Uuid;

use super::Inner;
use super::fault::{Fault, is_of_full_disk, unreadable};
use super::load::{self, Located, Subject};
use super::loaded::{Happened, Key, Loaded, Missing};
use super::rows::Bug;
use super::session::{Session, Values};
use super::standby;
use super::wall::Scope;
use super::write;
use crate::protocol::EventKind;
use crate::store::StoreError;

/// How long an operation is tried.
const DEADLINE: Duration = Duration::from_secs(10);

/// The longest pause between two attempts.
const MAX_PAUSE: Duration = Duration::from_millis(250);

/// What shows that a transaction was committed: an event of it.
#[derive(Debug, Clone)]
pub(super) struct Proof {
    key: Key,
    number: i32,
    event: Uuid,
    kinds: Vec<EventKind>,
}

impl Proof {
    pub(super) fn of(events: &[Happened]) -> Option<Self> {
        let event = events.first()?;
        Some(Self {
            key: event.key.clone(),
            number: event.number,
            event: event.id,
            kinds: events.iter().map(|event| event.kind).collect(),
        })
    }
}

/// A commit that is not known to be one, and the outcome if it is.
pub(super) struct Doubt<T> {
    pub(super) proof: Proof,
    pub(super) outcome: T,
}

/// How an attempt ended.
enum Attempt<T> {
    Answered(T),
    Failed(Fault),
    /// Whether this outcome is on record is not known. Without a proof it cannot be looked up.
    Doubtful(StoreError, Option<Proof>, T),
}

impl Inner {
    /// Runs an operation on what is on record, until its outcome is durable.
    ///
    /// `doubts` are earlier commits of the same operation that may have happened.
    pub(super) async fn transact<O: Located>(
        &self,
        operation: &O,
        mut doubts: Vec<Doubt<O::Outcome>>,
    ) -> Result<O::Outcome, StoreError> {
        let end = Instant::now() + DEADLINE;
        let mut pause = Duration::from_millis(1);
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let attempt = tokio::time::timeout(left, self.attempt(operation, &mut doubts)).await;
            let error = match attempt {
                // The connection is closed with the attempt, and its transaction ends by itself.
                Err(_) => {
                    self.state.set_unsure();
                    return Err(StoreError::unavailable(
                        "the database did not answer in time",
                    ));
                }
                Ok(Attempt::Answered(outcome)) => return Ok(outcome),
                Ok(Attempt::Failed(Fault::Again(error))) => error,
                Ok(Attempt::Failed(Fault::Refused(error))) => return Err(error),
                Ok(Attempt::Failed(Fault::Unknown(error))) => {
                    self.state.set_unsure();
                    error
                }
                Ok(Attempt::Doubtful(error, proof, outcome)) => {
                    self.state.set_unsure();
                    // Running it again would answer something else than what may be on record.
                    let Some(proof) = proof else {
                        return Err(error);
                    };
                    doubts.push(Doubt { proof, outcome });
                    error
                }
            };
            // Nobody makes room within the patience of a caller.
            if is_of_full_disk(&error) {
                return Err(error);
            }
            tracing::debug!(%error, "an operation is tried again");
            // The jitter keeps those who met apart.
            let jitter =
                pause.mul_f64(f64::from(Uuid::new_v4().as_fields().0) / f64::from(u32::MAX));
            if Instant::now() + jitter >= end || self.state.is_closing() {
                return Err(error);
            }
            tokio::time::sleep(jitter).await;
            pause = (pause * 2).min(MAX_PAUSE);
        }
    }

    async fn attempt<O: Located>(
        &self,
        operation: &O,
        doubts: &mut Vec<Doubt<O::Outcome>>,
    ) -> Attempt<O::Outcome> {
        match self.try_once(operation, doubts).await {
            Ok(attempt) => attempt,
            Err(fault) => {
                self.state.note_obstacle(fault.error());
                Attempt::Failed(fault)
            }
        }
    }

    async fn try_once<O: Located>(
        &self,
        operation: &O,
        doubts: &mut Vec<Doubt<O::Outcome>>,
    ) -> Result<Attempt<O::Outcome>, Fault> {
        let subject = operation.subject();
        let (tenant, endpoint) = match subject {
            Subject::Identity(identity) => (Some(&identity.tenant_id), None),
            Subject::Action(tenant, _) => (Some(tenant), None),
            Subject::Endpoint(name, _) => (None, Some(name)),
        };
        let session = Session::open(&self.pool, Scope::of(&tenant)).await?;
        let (unsure, begun) = (self.state.doubts(), Instant::now());
        let mut read = load::load(&session, &self.state, subject).await?;
        // With the action locked, no earlier transaction on it can still be committed.
        for index in (0..doubts.len()).rev() {
            if holds(&session, &read, &doubts[index].proof).await? {
                session.finish().await?;
                self.state.set_written(unsure, begun);
                let doubt = doubts.swap_remove(index);
                self.count(doubt.proof.kinds.iter().copied());
                return Ok(Attempt::Answered(doubt.outcome));
            }
        }
        let (loaded, outcome) = loop {
            let mut loaded = read.clone();
            match operation.apply(&mut loaded) {
                Ok(outcome) => break (loaded, outcome),
                Err(Missing::Calls(row, call)) => {
                    load::calls(&session, &mut read, row, call).await?
                }
                Err(Missing::Bug(what)) => return Err(Fault::Refused(unreadable(Bug(what)))),
            }
        };
        let has_changed = loaded.has_changed();
        self.follower.expect(&loaded.events);
        let committing = Instant::now();
        match write::write_and_commit(session, &loaded, endpoint).await {
            Ok(()) => {
                if loaded.is_locked || has_changed {
                    self.state.set_written(unsure, begun);
                }
                if has_changed {
                    self.state.commits.add(committing.elapsed());
                }
                self.repeats.add(&loaded.repeated);
                self.recorded(&loaded.events);
                Ok(Attempt::Answered(outcome))
            }
            Err(Fault::Unknown(error)) if has_changed => {
                let proof = Proof::of(&loaded.events);
                // Whoever waits looks again either way.
                self.wake(&loaded.events);
                Ok(Attempt::Doubtful(error, proof, outcome))
            }
            Err(fault) => Err(fault),
        }
    }

    /// Brings up to `limit` records that are due up to the present. Returns whether there may be
    /// more. Other servers do the same at the same time, and each takes what no other has.
    pub(super) async fn settle_due(&self, limit: i64) -> Result<bool, Fault> {
        use super::rows::{columns, record};
        use crate::store::operation::settle;

        const EXPIRED: &str = concat!(
            "SELECT ",
            columns!(),
            " FROM action a WHERE a.status = 'PENDING' AND a.expires_at <= $1 \
             ORDER BY a.expires_at LIMIT $2 FOR UPDATE SKIP LOCKED"
        );
        const OVER: &str = concat!(
            "SELECT ",
            columns!(),
            " FROM claim c JOIN action a ON a.tenant_id = c.tenant_id \
             AND a.request_id = c.request_id WHERE c.until <= $1 ORDER BY c.until LIMIT $2 \
             FOR UPDATE OF a SKIP LOCKED"
        );
        let session = Session::open(&self.pool, Scope::All).await?;
        let (unsure, begun) = (self.state.doubts(), Instant::now());
        let values: &Values<'_> = &[(&self.state.now(), Type::TIMESTAMPTZ), (&limit, Type::INT8)];
        let (started, expired, over, standbys, now) = tokio::join!(
            biased;
            session.begin(),
            session.query(EXPIRED, values),
            session.query(OVER, values),
            session.query(standby::WAITS, &[]),
            session.query(load::NOW, &[]),
        );
        started?;
        self.note_standbys(&standbys?, begun)?;
        let mut loaded = load::at(&self.state, &now?)?;
        let found: Vec<_> = expired?.into_iter().chain(over?).collect();
        if found.is_empty() {
            session.roll_back().await;
            return Ok(false);
        }
        let is_full = found.len() >= usize::try_from(limit).unwrap_or(usize::MAX);
        for row in &found {
            // Nobody else waits for a row that an edit by hand has spoilt.
            match record(row, 0) {
                Ok(_) => load::add(&mut loaded, row)?,
                Err(error) => tracing::warn!(%error, "an action that is due cannot be read"),
            }
        }
        load::leases(&session, &mut loaded).await?;
        let records: Vec<_> = loaded
            .actions
            .iter()
            .map(|action| action.record.clone())
            .collect();
        for record in records {
            settle(record, &mut loaded).map_err(|_| Fault::Refused(unreadable(Bug("a claim"))))?;
        }
        let has_changed = loaded.has_changed();
        self.follower.expect(&loaded.events);
        let written = write::write_and_commit(session, &loaded, None).await;
        match written {
            Ok(()) => {
                self.state.set_written(unsure, begun);
                self.recorded(&loaded.events);
            }
            Err(Fault::Unknown(error)) => {
                self.state.set_unsure();
                // Whoever waits looks again either way.
                self.wake(&loaded.events);
                return Err(Fault::Unknown(error));
            }
            Err(fault) => {
                self.state.note_obstacle(fault.error());
                return Err(fault);
            }
        }
        // A record that an edit by hand keeps due must not keep this busy.
        Ok(is_full && has_changed)
    }
}

/// Whether the transaction with this event was committed.
async fn holds(session: &Session, loaded: &Loaded, proof: &Proof) -> Result<bool, Fault> {
    if !loaded.actions.iter().any(|action| action.key == proof.key) {
        return Ok(false);
    }
    let tenant = proof.key.0.as_str();
    let found = session
        .query(
            "SELECT 1 FROM event e WHERE e.tenant_id = $1 AND e.request_id = $2 AND e.number = $3 AND e.event_id = $4",
            &[
                (&tenant, Type::TEXT),
                (&proof.key.1, Type::UUID),
                (&proof.number, Type::INT4),
                (&proof.event, Type::UUID),
            ],
        )
        .await?;
    Ok(!found.is_empty())
}
