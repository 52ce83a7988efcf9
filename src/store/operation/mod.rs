//! The operations of a store. Each file holds one: its request, its outcome, and what it does to
//! the records.
//!
//! A new operation is a new file here, a line in this one, and a method of [`Store`](super::Store).
//! Stores that implement [`Ledger`] need nothing else.

mod acquire;
mod cancel;
mod decide;
mod decide_by_id;
mod finish;
mod forget;
mod list;
mod mark_deliveries;
mod renew;
mod resend;
mod settle;
mod submit;
mod sweep;
mod take_endpoint;

use std::time::{Duration, SystemTime};

use uuid::Uuid;

use crate::protocol::{
    Action, Claim, Closed, Decision, Digest, Event, EventKind, Execution, RequestId, Status,
    TenantId,
};
use crate::store::clock::whole_micros;
use crate::store::{Actor, Fingerprinted, Identity};

pub use self::acquire::{Acquire, Acquired};
pub use self::cancel::{Cancel, Cancelled};
pub use self::decide::{Decide, Decided};
pub use self::decide_by_id::DecideById;
pub use self::finish::{Finish, Finished, Report};
pub use self::forget::{Forget, Forgotten};
pub(crate) use self::list::Order;
#[cfg(feature = "test-util")]
pub(crate) use self::list::State;
pub use self::list::{Cursor, List, Page};
pub use self::mark_deliveries::{DeliveryResult, MarkDeliveries, Marked};
pub(crate) use self::mark_deliveries::{Standing, Undelivered};
pub use self::renew::{Renew, Renewed};
pub use self::resend::{Resend, Resent, Resume, Resumed};
pub(crate) use self::settle::settle;
pub use self::submit::{Submission, Submit, Submitted};
pub(crate) use self::sweep::{Aged, Tombstone};
pub use self::sweep::{Sweep, Swept};
pub(crate) use self::take_endpoint::Endpoint;
pub use self::take_endpoint::{EndpointTaken, Start, TakeEndpoint};

/// A request that may change records, and the way it is carried out in one transaction.
pub(crate) trait Operation: Send + 'static {
    /// The result for the caller.
    type Outcome: Send + 'static;

    /// The size of the request in bytes, without its names, which have a limit of their own.
    fn size(&self) -> usize;

    /// Carries out the request.
    fn apply<L: Ledger>(&self, ledger: &mut L) -> Result<Self::Outcome, L::Error>;
}

/// The records of a store within one transaction.
pub(crate) trait Ledger {
    type Error;

    /// The current time, in the resolution in which times are kept.
    fn now(&self) -> SystemTime;

    /// Whether other requests may wait for the end of this transaction.
    fn others_wait(&self) -> bool {
        true
    }

    /// Finds the record of an identity.
    fn find(&self, identity: &Identity) -> Result<Option<Record>, Self::Error>;

    /// Finds a tenant's record by the id that the store gave it.
    fn find_by_id(&self, id: Uuid, tenant: &TenantId) -> Result<Option<Record>, Self::Error>;

    /// Inserts an action, unless its identity is on record or has a tombstone.
    fn insert(&mut self, new: New<'_>) -> Result<Inserted, Self::Error>;

    /// Writes all of a record except its identity and what its submission said.
    fn update(&mut self, record: &Record) -> Result<(), Self::Error>;

    /// Appends the event of a transition that led to this record. Once the transaction is
    /// committed, whoever waits for the action is woken.
    fn append(&mut self, record: &Record, transition: Transition<'_>) -> Result<(), Self::Error>;

    /// Remembers a call that changed nothing, with the record it was answered with.
    fn remember(&mut self, record: &Record, call_id: Option<&RequestId>);

    /// Whether this call made a transition of this kind, of the action in a row, at any time.
    fn has_made(&self, row: i64, kind: EventKind, call_id: &RequestId)
    -> Result<bool, Self::Error>;

    /// Finds the newest claim on the action in a row.
    fn lease(&self, row: i64) -> Result<Option<Lease>, Self::Error>;

    /// Writes the newest claim on the action in a row.
    fn set_lease(&mut self, row: i64, lease: &Lease) -> Result<(), Self::Error>;

    /// The position of the newest event of all tenants, or 0.
    fn newest_event(&self) -> Result<u64, Self::Error>;

    /// Finds a webhook endpoint.
    fn endpoint(&self, name: &str) -> Result<Option<Endpoint>, Self::Error>;

    /// Inserts an endpoint that is not on record.
    fn insert_endpoint(&mut self, name: &str, position: u64) -> Result<Endpoint, Self::Error>;

    /// Writes all of an endpoint except its name.
    fn update_endpoint(&mut self, endpoint: &Endpoint) -> Result<(), Self::Error>;

    /// Removes an endpoint, and what it has not received.
    fn remove_endpoint(&mut self, endpoint: &Endpoint) -> Result<(), Self::Error>;

    /// Finds the endpoint's parked events in order: their positions, and the ids of their actions.
    fn parked(&self, endpoint: &Endpoint) -> Result<Vec<(u64, Uuid)>, Self::Error>;

    /// Finds the endpoint's dead letters in order: the positions and ids of their events.
    fn dead(&self, endpoint: &Endpoint) -> Result<Vec<(u64, Uuid)>, Self::Error>;

    /// Finds what the endpoint has not received of an event, parked or dead.
    fn undelivered(
        &self,
        endpoint: &Endpoint,
        position: u64,
    ) -> Result<Option<Undelivered>, Self::Error>;

    /// Finds the first parked event of the same action as the event at `position`.
    fn first_parked(
        &self,
        endpoint: &Endpoint,
        position: u64,
    ) -> Result<Option<Undelivered>, Self::Error>;

    /// Writes an event that the endpoint has not received.
    fn set_undelivered(
        &mut self,
        endpoint: &Endpoint,
        undelivered: &Undelivered,
    ) -> Result<(), Self::Error>;

    /// Removes an event that the endpoint has received.
    fn remove_undelivered(&mut self, endpoint: &Endpoint, position: u64)
    -> Result<(), Self::Error>;

    /// Finds what stayed of an action that was removed.
    fn tombstone(&self, identity: &Identity) -> Result<Option<Tombstone>, Self::Error>;

    /// Removes an action that is over, with its events, its claim and what endpoints have not
    /// received of it, and leaves a tombstone.
    fn remove(&mut self, record: &Record) -> Result<(), Self::Error>;

    /// The row of the newest action.
    fn newest_action(&self) -> Result<Option<i64>, Self::Error>;

    /// Finds the webhook endpoints.
    fn endpoints(&self) -> Result<Vec<Endpoint>, Self::Error>;

    /// The positions and times of up to `limit` events behind `after` and up to `last`, in order.
    fn events_between(
        &self,
        after: u64,
        last: u64,
        limit: usize,
    ) -> Result<Vec<(u64, SystemTime)>, Self::Error>;

    /// Returns the position up to which events are in the audit chain: only these may be removed.
    /// If it is before `position`, the chain is extended first, by a few events.
    fn chain_towards(&mut self, position: u64) -> Result<u64, Self::Error>;

    /// Finds what a sweep has to know of an event, if that is the newest of its action.
    fn aged(&self, position: u64) -> Result<Option<Aged>, Self::Error>;

    /// Finds the record in a row, without what can be large. A record that cannot be read is none.
    fn outline(&self, row: i64) -> Result<Option<Record>, Self::Error>;

    /// The position up to which sweeps have come.
    fn swept(&self) -> Result<u64, Self::Error>;

    /// Writes the position up to which sweeps have come, and counts the actions that this
    /// transaction removed.
    fn set_swept(&mut self, position: u64) -> Result<(), Self::Error>;

    /// Notes an event that a sweep is to look at again, once this time is past the retention.
    fn postpone(&mut self, position: u64, until: SystemTime) -> Result<(), Self::Error>;

    /// Finds up to `limit` of the events that were postponed until `time` or before, those of the
    /// earliest times first.
    fn postponed(
        &self,
        time: SystemTime,
        limit: usize,
    ) -> Result<Vec<(SystemTime, u64)>, Self::Error>;

    /// Removes the note of an event that was postponed.
    fn remove_postponed(&mut self, until: SystemTime, position: u64) -> Result<(), Self::Error>;
}

/// An action as it is on record.
#[derive(Debug, Clone)]
pub(crate) struct Record {
    /// The number of the action's row.
    pub(crate) row: i64,
    pub(crate) action: Action,
    /// The digest of the payload as it was submitted. The action's own is that of what is to be
    /// run.
    pub(crate) submitted_digest: Option<Digest>,
    /// The owner of the credential that submitted the action. `None` if it was decided without a
    /// submission.
    pub(crate) submitted_by: Option<String>,
    /// The call that made the recorded decision, in the form of
    /// [`canonical_call`](super::rule::canonical_call).
    pub(crate) call_id: Option<String>,
}

impl Record {
    /// The size of its payloads, in bytes.
    pub(crate) fn size(&self) -> usize {
        let payloads = [&self.action.payload, &self.action.edited_payload];
        let texts = payloads.into_iter().flatten();
        texts.map(|payload| payload.as_str().len()).sum()
    }

    /// The time of a change that is made now. If the clock was set back, a change still does not
    /// come before the action's creation.
    fn time_of_change(&self, now: SystemTime) -> SystemTime {
        self.action
            .created_at
            .map_or(now, |created| now.max(created))
    }

    /// Records a decision, and appends its event.
    fn decide<L: Ledger>(&mut self, verdict: Verdict<'_>, ledger: &mut L) -> Result<(), L::Error> {
        let at = self.time_of_change(ledger.now());
        let from = self.action.status;
        let action = &mut self.action;
        action.status = Status::Committed;
        action.decision = Some(verdict.decision);
        action.closed = verdict.closed;
        action.execution = None;
        action.decided_at = Some(at);
        action.decided_by = Some(verdict.actor.to_owned());
        action.comment = verdict.comment.map(str::to_owned);
        action.result = None;
        action.reason = None;
        self.call_id = verdict
            .call_id
            .map(|id| super::rule::canonical_call(id).into());
        ledger.update(self)?;
        let kind = match verdict.closed {
            Some(Closed::Expired) => EventKind::Expired,
            Some(_) => EventKind::Cancelled,
            None => verdict.decision.into(),
        };
        ledger.append(
            self,
            Transition {
                kind,
                at,
                actor: verdict.actor,
                from: Some(from),
                call_id: verdict.call_id,
            },
        )
    }

    /// Records how an execution stands, and appends its event.
    fn execute<L: Ledger>(
        &mut self,
        execution: Execution,
        actor: &str,
        call_id: Option<&RequestId>,
        ledger: &mut L,
    ) -> Result<(), L::Error> {
        let from = self.action.status;
        let (status, kind) = match execution {
            Execution::Claimed => (Status::Committed, EventKind::Claimed),
            Execution::Completed => (Status::Committed, EventKind::Completed),
            Execution::Failed => (Status::Failed, EventKind::Failed),
            // What a store does not know it takes for unknown.
            Execution::Unknown | Execution::Other => (Status::Failed, EventKind::ClaimLost),
        };
        self.action.status = status;
        self.action.execution = Some(execution);
        ledger.update(self)?;
        if execution != Execution::Claimed
            && let Some(mut lease) = ledger.lease(self.row)?
        {
            lease.until = None;
            ledger.set_lease(self.row, &lease)?;
        }
        let at = self.time_of_change(ledger.now());
        ledger.append(
            self,
            Transition {
                kind,
                at,
                actor,
                from: Some(from),
                call_id,
            },
        )
    }
}

/// What is recorded as a decision.
#[derive(Debug, Clone, Copy)]
struct Verdict<'a> {
    decision: Decision,
    closed: Option<Closed>,
    actor: &'a str,
    comment: Option<&'a str>,
    call_id: Option<&'a RequestId>,
}

/// An action that is not on record yet.
#[derive(Debug, Clone, Copy)]
pub(crate) struct New<'a> {
    pub(crate) identity: &'a Identity,
    pub(crate) at: SystemTime,
    pub(crate) payload: Option<&'a Fingerprinted>,
    pub(crate) actor: &'a Actor,
    pub(crate) origin: Origin<'a>,
}

/// How an action comes on record.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Origin<'a> {
    Submitted(&'a Submission),
    /// Decided without a submission.
    Decided {
        decision: Decision,
        /// The call that made the decision.
        call_id: Option<&'a RequestId>,
        comment: Option<&'a str>,
    },
}

impl New<'_> {
    /// The record of the action, with its row and its id.
    pub(crate) fn record(&self, row: i64, id: RequestId) -> Record {
        let digest = self.payload.map(|payload| Digest::from(*payload.digest()));
        let mut action = Action::new(id, Status::Pending);
        action.tenant_id = Some(self.identity.tenant_id.clone());
        action.thread_id = Some(self.identity.thread_id.clone());
        action.idempotency_key = Some(self.identity.idempotency_key.clone());
        action.digest = digest;
        action.created_at = Some(self.at);
        action.payload = self.payload.map(|payload| payload.payload().clone());
        let mut record = Record {
            row,
            action,
            submitted_digest: digest,
            submitted_by: None,
            call_id: None,
        };
        let action = &mut record.action;
        match self.origin {
            Origin::Submitted(submission) => {
                action.title.clone_from(&submission.title);
                action.expires_at = submission.expires_at.map(whole_micros);
                action.allow_edit = Some(submission.allow_edit);
                record.submitted_by = Some(self.actor.as_str().to_owned());
            }
            Origin::Decided {
                decision,
                call_id,
                comment,
            } => {
                action.status = Status::Committed;
                action.decision = Some(decision);
                action.decided_at = Some(self.at);
                action.decided_by = Some(self.actor.as_str().to_owned());
                action.comment = comment.map(str::to_owned);
                record.call_id = call_id.map(|id| super::rule::canonical_call(id).into());
            }
        }
        record
    }
}

#[derive(Debug)]
pub(crate) enum Inserted {
    New(Record),
    /// The record that was there before.
    Existing(Record),
    /// The action was removed. Nothing was inserted.
    Removed(Tombstone),
}

/// A transition, without the state that it led to.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Transition<'a> {
    pub(crate) kind: EventKind,
    pub(crate) at: SystemTime,
    pub(crate) actor: &'a str,
    pub(crate) from: Option<Status>,
    pub(crate) call_id: Option<&'a RequestId>,
}

impl Transition<'_> {
    /// The digest of what was submitted or decided on. Other events are about what the decision
    /// before them was on, and have none.
    pub(crate) fn digest(&self, record: &Record) -> Option<Digest> {
        let is_about_payload = matches!(
            self.kind,
            EventKind::Submitted | EventKind::Approved | EventKind::Rejected
        );
        record.action.digest.filter(|_| is_about_payload)
    }
}

/// The state that an event left its action in.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LeftIn {
    pub(crate) status: Status,
    pub(crate) decision: Option<Decision>,
    pub(crate) execution: Option<Execution>,
}

impl LeftIn {
    /// Shows an action as the event left it, as far as the event tells.
    pub(crate) fn shown(self, mut action: Action, event: &Event) -> Action {
        action.status = self.status;
        action.decision = self.decision;
        action.execution = self.execution;
        action.closed = match event.kind {
            EventKind::Expired => Some(Closed::Expired),
            EventKind::Cancelled => Some(Closed::Cancelled),
            _ => None,
        };
        match event.kind {
            EventKind::Submitted => {
                action.decided_at = None;
                action.decided_by = None;
            }
            EventKind::Approved
            | EventKind::Rejected
            | EventKind::Expired
            | EventKind::Cancelled => {
                action.decided_at = event.at;
                action.decided_by = Some(event.actor.clone());
            }
            _ => {}
        }
        action
    }
}

/// The newest claim on an action. It is live while the action's execution is `claimed`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Lease {
    pub(crate) token: Uuid,
    pub(crate) fence: i64,
    /// When the lease ends. `None` once the claim has ended.
    pub(crate) until: Option<SystemTime>,
    /// The owner of the credential that claimed.
    pub(crate) actor: String,
    /// The call that claimed, in the form of [`canonical_call`](super::rule::canonical_call).
    pub(crate) call_id: Option<String>,
}

impl Lease {
    /// The end of a lease that begins now.
    fn end(now: SystemTime, lease: Duration) -> SystemTime {
        now.checked_add(lease).map_or(now, whole_micros)
    }

    fn claim(&self) -> Claim {
        let mut claim = Claim::new(self.token.into(), self.fence.unsigned_abs());
        claim.expires_at = self.until;
        claim
    }
}
