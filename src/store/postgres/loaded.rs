//! The ledger of one transaction: what was read of the database, and what an operation changes of
//! it.
//!
//! Operations run on this in memory, without any wait. So all stores share one set of rules.

use std::collections::{BTreeMap, HashMap};
use std::time::SystemTime;

use uuid::Uuid;

use super::ids;
use super::sweep::Step;
use crate::protocol::{Digest, EventKind, RequestId, Status, TenantId, uuid_v7};
use crate::store::Identity;
use crate::store::operation::{
    Aged, Endpoint, Inserted, Lease, Ledger, New, Record, Standing, Tombstone, Transition,
    Undelivered,
};
use crate::store::rule::canonical_call;

/// What an operation needs beyond what was read.
#[derive(Debug)]
pub(super) enum Missing {
    /// The kinds of the transitions that a call made of the action in a row.
    Calls(i64, String),
    /// What should have been read before the operation ran.
    Bug(&'static str),
}

/// Which action a row is.
pub(super) type Key = (TenantId, Uuid);

#[derive(Debug, Default, Clone)]
pub(super) struct Loaded {
    /// The time of the transaction.
    pub(super) now: Option<SystemTime>,
    /// Indexed by row.
    pub(super) actions: Vec<Loading>,
    /// The kinds of the transitions that calls made of the action in a row.
    pub(super) calls: HashMap<(i64, String), Vec<EventKind>>,
    /// What stayed of the action that was looked for, if it was removed.
    pub(super) tombstone: Option<Tombstone>,
    /// Whether a row of an action was locked, which the commit makes durable, and all before it.
    pub(super) is_locked: bool,
    pub(super) delivery: Delivery,
    pub(super) step: Option<Step>,
    /// In their order.
    pub(super) events: Vec<Happened>,
    /// Calls that changed nothing, each with its action.
    pub(super) repeated: Vec<(Uuid, Key)>,
}

/// An action, as it was read and as it is changed.
#[derive(Debug, Clone)]
pub(super) struct Loading {
    pub(super) key: Key,
    pub(super) record: Record,
    /// The number of its events.
    pub(super) events: i32,
    pub(super) lease: Option<Lease>,
    pub(super) has_payload: bool,
    pub(super) is_new: bool,
    pub(super) is_changed: bool,
    pub(super) is_leased: bool,
}

/// What was read of one endpoint, and changed.
#[derive(Debug, Default, Clone)]
pub(super) struct Delivery {
    pub(super) newest: Option<u64>,
    pub(super) endpoint: Option<Endpoint>,
    /// The action and the id of the event at a position.
    pub(super) places: BTreeMap<u64, (Key, Uuid)>,
    pub(super) undelivered: BTreeMap<u64, Undelivered>,
    pub(super) is_new: bool,
    pub(super) is_changed: bool,
    pub(super) is_removed: bool,
    /// What was set, or removed.
    pub(super) changes: BTreeMap<u64, Option<Undelivered>>,
}

/// An event to be written.
#[derive(Debug, Clone)]
pub(super) struct Happened {
    pub(super) key: Key,
    pub(super) number: i32,
    pub(super) id: Uuid,
    pub(super) kind: EventKind,
    pub(super) at: SystemTime,
    pub(super) actor: String,
    pub(super) from: Option<Status>,
    pub(super) to: Status,
    pub(super) decision: Option<&'static str>,
    pub(super) execution: Option<&'static str>,
    /// In the form of [`canonical_call`].
    pub(super) call_id: Option<String>,
    /// What was submitted or decided on.
    pub(super) digest: Option<Digest>,
}

impl Loaded {
    pub(super) fn at(now: SystemTime) -> Self {
        Self {
            now: Some(now),
            ..Self::default()
        }
    }

    /// Adds an action that was read.
    pub(super) fn add(&mut self, key: Key, record: Record, events: i32) {
        self.actions.push(Loading {
            key,
            has_payload: record.action.payload.is_some(),
            record,
            events,
            lease: None,
            is_new: false,
            is_changed: false,
            is_leased: false,
        });
    }

    pub(super) fn has_changed(&self) -> bool {
        !self.events.is_empty()
            || self
                .actions
                .iter()
                .any(|action| action.is_changed || action.is_leased)
            || self.delivery.is_changed
            || self.delivery.is_removed
            || !self.delivery.changes.is_empty()
            || self.step.as_ref().is_some_and(Step::has_changed)
    }

    /// The actions that are new, each with its event. It has one: an operation that finds nothing on
    /// record does one thing.
    pub(super) fn new_actions(&self) -> impl Iterator<Item = (&Loading, &Happened)> {
        let new = self.actions.iter().filter(|action| action.is_new);
        new.filter_map(|action| {
            debug_assert_eq!(action.events, 1, "the database counts one");
            let mut events = self.events.iter();
            Some((action, events.find(|event| event.key == action.key)?))
        })
    }

    /// The number of an action's row.
    pub(super) fn row_of(&self, key: &Key) -> Option<i64> {
        let mut actions = (0..).zip(&self.actions);
        actions
            .find(|(_, action)| action.key == *key)
            .map(|(row, _)| row)
    }

    fn step(&self) -> Result<&Step, Missing> {
        self.step.as_ref().ok_or(Missing::Bug("a sweep"))
    }

    fn step_mut(&mut self) -> Result<&mut Step, Missing> {
        self.step.as_mut().ok_or(Missing::Bug("a sweep"))
    }

    fn action(&self, row: i64) -> Result<&Loading, Missing> {
        let found = usize::try_from(row)
            .ok()
            .and_then(|row| self.actions.get(row));
        found.ok_or(Missing::Bug("an action"))
    }

    fn action_mut(&mut self, row: i64) -> Result<&mut Loading, Missing> {
        let found = usize::try_from(row)
            .ok()
            .and_then(|row| self.actions.get_mut(row));
        found.ok_or(Missing::Bug("an action"))
    }

    /// What is parked or dead, in order, each with its place.
    fn of_endpoint(&self) -> impl Iterator<Item = (&Undelivered, &(Key, Uuid))> {
        let all = self.delivery.undelivered.iter();
        all.filter_map(|(position, of_it)| Some((of_it, self.delivery.places.get(position)?)))
    }
}

fn is_parked(undelivered: &Undelivered) -> bool {
    !matches!(undelivered.standing, Standing::Dead(_))
}

fn is_of(record: &Record, identity: &Identity) -> bool {
    let action = &record.action;
    action.tenant_id.as_ref() == Some(&identity.tenant_id)
        && action.thread_id.as_ref() == Some(&identity.thread_id)
        && action.idempotency_key.as_ref() == Some(&identity.idempotency_key)
}

impl Ledger for Loaded {
    type Error = Missing;

    fn now(&self) -> SystemTime {
        self.now.unwrap_or(SystemTime::UNIX_EPOCH)
    }

    /// All that a transaction looks at is here.
    fn others_wait(&self) -> bool {
        false
    }

    fn find(&self, identity: &Identity) -> Result<Option<Record>, Missing> {
        let found = self
            .actions
            .iter()
            .find(|action| is_of(&action.record, identity));
        Ok(found.map(|action| action.record.clone()))
    }

    fn find_by_id(&self, id: Uuid, tenant: &TenantId) -> Result<Option<Record>, Missing> {
        let mut actions = self.actions.iter();
        let found = actions.find(|action| action.key.1 == id && action.key.0 == *tenant);
        Ok(found.map(|action| action.record.clone()))
    }

    fn insert(&mut self, new: New<'_>) -> Result<Inserted, Missing> {
        if let Some(record) = self.find(new.identity)? {
            return Ok(Inserted::Existing(record));
        }
        if let Some(tombstone) = self.tombstone(new.identity)? {
            return Ok(Inserted::Removed(tombstone));
        }
        let id = ids::ordered();
        let row = i64::try_from(self.actions.len()).unwrap_or(i64::MAX);
        let record = new.record(row, id.into());
        self.add((new.identity.tenant_id.clone(), id), record.clone(), 0);
        let action = self.action_mut(row)?;
        action.is_new = true;
        Ok(Inserted::New(record))
    }

    fn update(&mut self, record: &Record) -> Result<(), Missing> {
        let action = self.action_mut(record.row)?;
        action.record = record.clone();
        action.is_changed = true;
        Ok(())
    }

    fn append(&mut self, record: &Record, transition: Transition<'_>) -> Result<(), Missing> {
        let action = self.action_mut(record.row)?;
        action.events += 1;
        action.is_changed = true;
        let happened = Happened {
            key: action.key.clone(),
            number: action.events,
            id: uuid_v7(),
            kind: transition.kind,
            at: transition.at,
            actor: transition.actor.to_owned(),
            from: transition.from,
            to: record.action.status,
            decision: record.action.decision.map(|decision| decision.as_str()),
            execution: record.action.execution.map(|execution| execution.as_str()),
            call_id: transition.call_id.map(|id| canonical_call(id).into_owned()),
            digest: transition.digest(record),
        };
        self.events.push(happened);
        Ok(())
    }

    fn remember(&mut self, record: &Record, call_id: Option<&RequestId>) {
        if let Some(call) = call_id.and_then(RequestId::as_uuid)
            && let Ok(action) = self.action(record.row)
        {
            let key = action.key.clone();
            self.repeated.push((call, key));
        }
    }

    fn has_made(&self, row: i64, kind: EventKind, call_id: &RequestId) -> Result<bool, Missing> {
        let key = (row, canonical_call(call_id).into_owned());
        match self.calls.get(&key) {
            Some(kinds) => Ok(kinds.contains(&kind)),
            None => Err(Missing::Calls(key.0, key.1)),
        }
    }

    fn lease(&self, row: i64) -> Result<Option<Lease>, Missing> {
        Ok(self.action(row)?.lease.clone())
    }

    fn set_lease(&mut self, row: i64, lease: &Lease) -> Result<(), Missing> {
        let action = self.action_mut(row)?;
        action.lease = Some(lease.clone());
        action.is_leased = true;
        Ok(())
    }

    fn newest_event(&self) -> Result<u64, Missing> {
        self.delivery.newest.ok_or(Missing::Bug("the newest event"))
    }

    fn endpoint(&self, _: &str) -> Result<Option<Endpoint>, Missing> {
        Ok(self.delivery.endpoint.clone())
    }

    fn insert_endpoint(&mut self, _: &str, position: u64) -> Result<Endpoint, Missing> {
        let endpoint = Endpoint {
            row: 0,
            position,
            held: None,
            stopped_at: None,
            left_at: None,
        };
        self.delivery.endpoint = Some(endpoint.clone());
        self.delivery.is_new = true;
        self.delivery.is_changed = true;
        Ok(endpoint)
    }

    fn update_endpoint(&mut self, endpoint: &Endpoint) -> Result<(), Missing> {
        self.delivery.endpoint = Some(endpoint.clone());
        self.delivery.is_changed = true;
        Ok(())
    }

    fn remove_endpoint(&mut self, _: &Endpoint) -> Result<(), Missing> {
        self.delivery.endpoint = None;
        self.delivery.is_removed = true;
        Ok(())
    }

    fn parked(&self, _: &Endpoint) -> Result<Vec<(u64, Uuid)>, Missing> {
        let parked = self.of_endpoint().filter(|(of_it, _)| is_parked(of_it));
        Ok(parked
            .map(|(of_it, ((_, action), _))| (of_it.position, *action))
            .collect())
    }

    fn dead(&self, _: &Endpoint) -> Result<Vec<(u64, Uuid)>, Missing> {
        let dead = self.of_endpoint().filter(|(of_it, _)| !is_parked(of_it));
        Ok(dead
            .map(|(of_it, (_, event))| (of_it.position, *event))
            .collect())
    }

    fn undelivered(&self, _: &Endpoint, position: u64) -> Result<Option<Undelivered>, Missing> {
        Ok(self.delivery.undelivered.get(&position).cloned())
    }

    fn first_parked(
        &self,
        endpoint: &Endpoint,
        position: u64,
    ) -> Result<Option<Undelivered>, Missing> {
        if let Some(step) = &self.step {
            return Ok(step.first_parked(endpoint, position).cloned());
        }
        let Some((action, _)) = self.delivery.places.get(&position) else {
            return Ok(None);
        };
        let mut parked = self.of_endpoint().filter(|(of_it, _)| is_parked(of_it));
        Ok(parked
            .find(|(_, (of_it, _))| of_it == action)
            .map(|(of_it, _)| of_it.clone()))
    }

    fn set_undelivered(&mut self, _: &Endpoint, undelivered: &Undelivered) -> Result<(), Missing> {
        // There is no event at any other position.
        if self.delivery.places.contains_key(&undelivered.position) {
            let (position, undelivered) = (undelivered.position, undelivered.clone());
            self.delivery
                .undelivered
                .insert(position, undelivered.clone());
            self.delivery.changes.insert(position, Some(undelivered));
        }
        Ok(())
    }

    fn remove_undelivered(&mut self, _: &Endpoint, position: u64) -> Result<(), Missing> {
        self.delivery.undelivered.remove(&position);
        self.delivery.changes.insert(position, None);
        Ok(())
    }

    fn tombstone(&self, _: &Identity) -> Result<Option<Tombstone>, Missing> {
        Ok(self.tombstone.clone())
    }

    fn remove(&mut self, record: &Record) -> Result<(), Missing> {
        self.step_mut()?.remove(record.row);
        Ok(())
    }

    fn newest_action(&self) -> Result<Option<i64>, Missing> {
        Ok(self.step()?.newest_action)
    }

    fn endpoints(&self) -> Result<Vec<Endpoint>, Missing> {
        Ok(self.step()?.endpoints().to_vec())
    }

    fn events_between(
        &self,
        after: u64,
        last: u64,
        limit: usize,
    ) -> Result<Vec<(u64, SystemTime)>, Missing> {
        Ok(self.step()?.events_between(after, last, limit))
    }

    fn chain_towards(&mut self, _: u64) -> Result<u64, Missing> {
        Ok(self.step()?.chained)
    }

    fn aged(&self, position: u64) -> Result<Option<Aged>, Missing> {
        Ok(self.step()?.aged(position))
    }

    fn outline(&self, row: i64) -> Result<Option<Record>, Missing> {
        Ok(Some(self.action(row)?.record.clone()))
    }

    fn swept(&self) -> Result<u64, Missing> {
        Ok(self.step()?.position)
    }

    fn set_swept(&mut self, position: u64) -> Result<(), Missing> {
        self.step_mut()?.set_position(position);
        Ok(())
    }

    fn postpone(&mut self, position: u64, until: SystemTime) -> Result<(), Missing> {
        self.step_mut()?.postpone(until, position);
        Ok(())
    }

    fn postponed(&self, time: SystemTime, limit: usize) -> Result<Vec<(SystemTime, u64)>, Missing> {
        Ok(self.step()?.postponed(time, limit))
    }

    fn remove_postponed(&mut self, until: SystemTime, position: u64) -> Result<(), Missing> {
        self.step_mut()?.remove_postponed(until, position);
        Ok(())
    }
}
