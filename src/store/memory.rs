//! The in-memory store.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::convert::Infallible;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use uuid::Uuid;

use super::delivery::COUNTED;
use super::operation::{
    Aged, Endpoint, Inserted, Lease, Ledger, LeftIn, New, Operation, Order, Record, Standing,
    State, Tombstone, Transition, Undelivered, settle,
};
use super::rule::canonical_call;
use super::statistics::{EventCounter, Statistics};
use super::{
    Acquire, Acquired, Backlog, Cancel, Cancelled, Clock, Cursor, DeadLetter, Decide, DecideById,
    Decided, DueDeliveries, DueDelivery, EndpointState, EndpointTaken, Finish, Finished, Forget,
    Forgotten, Identity, List, MarkDeliveries, Marked, Page, Renew, Renewed, Resend, Resent,
    Resume, Resumed, Store, StoreError, Submit, Submitted, Sweep, Swept, TakeEndpoint, Totals,
    Watch, Watchers,
};
use crate::protocol::{Action, Event, EventKind, RequestId, Status, TenantId, uuid_v7};

/// A store in memory, for tests. It follows the rules of every store, and loses its records with
/// its last handle.
///
/// It has no thread of its own, so what is due happens when it is next used.
#[derive(Clone, Default)]
pub struct MemoryStore {
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    records: Mutex<Records>,
    watchers: Watchers,
    fails: AtomicBool,
}

#[derive(Default)]
struct Records {
    /// By row.
    records: BTreeMap<i64, Record>,
    ids: HashMap<Uuid, i64>,
    identities: HashMap<Identity, i64>,
    /// What stayed of actions that were removed.
    tombstones: HashMap<Identity, Tombstone>,
    /// The position up to which sweeps have come.
    swept: u64,
    /// The events that sweeps look at again.
    postponed: BTreeSet<(SystemTime, u64)>,
    /// The rows that a call id names, from calls that made a transition.
    calls: HashMap<Uuid, Vec<i64>>,
    /// The rows that a call id names, from calls that changed nothing.
    repeats: HashMap<Uuid, Vec<i64>>,
    /// The newest claim on the action in a row.
    leases: HashMap<i64, Lease>,
    /// When the action in a row may be due: expires, or its lease ends.
    dues: BTreeSet<(SystemTime, i64)>,
    /// By position.
    events: BTreeMap<u64, Happened>,
    counter: EventCounter,
    endpoints: BTreeMap<String, Endpoint>,
    /// By the row of the endpoint and the position of the event.
    undelivered: BTreeMap<(i64, u64), Undelivered>,
    clock: Clock,
    /// The actions that the present transaction changed.
    changed: Vec<(Uuid, TenantId)>,
}

/// An event of the action in a row.
struct Happened {
    row: i64,
    tenant: Option<TenantId>,
    event: Event,
    left_in: LeftIn,
    /// The call, in the form of [`canonical_call`].
    call_id: Option<String>,
}

impl MemoryStore {
    /// Makes an empty store.
    pub fn new() -> Self {
        Self::default()
    }

    /// Makes an empty store with a clock that may show another time than the system's.
    pub fn with_clock(clock: Clock) -> Self {
        let store = Self::new();
        store.lock().clock = clock;
        store
    }

    /// Makes every request fail as unavailable, or lets requests work again.
    pub fn set_unavailable(&self, fails: bool) {
        self.shared.fails.store(fails, Ordering::SeqCst);
    }

    fn lock(&self) -> MutexGuard<'_, Records> {
        let records = self.shared.records.lock();
        records.unwrap_or_else(PoisonError::into_inner)
    }

    /// The records, brought up to the present.
    fn records(&self) -> Result<MutexGuard<'_, Records>, StoreError> {
        if self.shared.fails.load(Ordering::SeqCst) {
            return Err(StoreError::unavailable("the store was made to fail"));
        }
        let mut records = self.lock();
        // What is over from now on is looked at again.
        let now = records.now();
        let due = records.due();
        records.dues = records.dues.split_off(&(now, i64::MAX));
        for record in due {
            let Ok(_) = settle(record, &mut *records);
        }
        self.wake(&mut records);
        Ok(records)
    }

    fn wake(&self, records: &mut Records) {
        for (id, tenant) in std::mem::take(&mut records.changed) {
            self.shared.watchers.wake(id, &tenant);
        }
    }

    fn run<O: Operation>(&self, operation: &O) -> Result<O::Outcome, StoreError> {
        let mut records = self.records()?;
        let Ok(outcome) = operation.apply(&mut *records);
        self.wake(&mut records);
        Ok(outcome)
    }
}

impl Ledger for Records {
    type Error = Infallible;

    fn now(&self) -> SystemTime {
        self.clock.now()
    }

    fn find(&self, identity: &Identity) -> Result<Option<Record>, Infallible> {
        let row = self.identities.get(identity);
        Ok(row.and_then(|row| self.record(*row)).cloned())
    }

    fn find_by_id(&self, id: Uuid, tenant: &TenantId) -> Result<Option<Record>, Infallible> {
        let record = self.ids.get(&id).and_then(|row| self.record(*row));
        Ok(record.filter(|record| is_of(record, Some(tenant))).cloned())
    }

    fn insert(&mut self, new: New<'_>) -> Result<Inserted, Infallible> {
        if let Some(record) = self.find(new.identity)? {
            return Ok(Inserted::Existing(record));
        }
        if let Some(tombstone) = self.tombstones.get(new.identity) {
            return Ok(Inserted::Removed(tombstone.clone()));
        }
        let newest = self.records.last_key_value();
        let (row, id) = (newest.map_or(0, |(row, _)| row + 1), uuid_v7());
        let record = new.record(row, id.into());
        self.ids.insert(id, row);
        self.dues
            .extend(record.action.expires_at.map(|end| (end, row)));
        self.identities.insert(new.identity.clone(), row);
        self.records.insert(row, record.clone());
        Ok(Inserted::New(record))
    }

    fn update(&mut self, record: &Record) -> Result<(), Infallible> {
        self.records.insert(record.row, record.clone());
        Ok(())
    }

    fn append(&mut self, record: &Record, transition: Transition<'_>) -> Result<(), Infallible> {
        let action = &record.action;
        let happened = Happened {
            row: record.row,
            tenant: action.tenant_id.clone(),
            event: Event::new(
                RequestId::from(uuid_v7()),
                transition.kind,
                transition.at,
                transition.actor,
            ),
            left_in: LeftIn {
                status: action.status,
                decision: action.decision,
                execution: action.execution,
            },
            call_id: transition.call_id.map(|id| canonical_call(id).into()),
        };
        self.counter.add(transition.kind);
        self.events.insert(self.newest() + 1, happened);
        name(&mut self.calls, transition.call_id, record.row);
        if let (Some(id), Some(tenant)) = (action.request_id.as_uuid(), &action.tenant_id) {
            self.changed.push((id, tenant.clone()));
        }
        Ok(())
    }

    fn has_made(&self, row: i64, kind: EventKind, call_id: &RequestId) -> Result<bool, Infallible> {
        let call_id = canonical_call(call_id);
        Ok(self.events.values().any(|happened| {
            happened.row == row
                && happened.event.kind == kind
                && happened.call_id.as_deref() == Some(&call_id)
        }))
    }

    fn lease(&self, row: i64) -> Result<Option<Lease>, Infallible> {
        Ok(self.leases.get(&row).cloned())
    }

    fn set_lease(&mut self, row: i64, lease: &Lease) -> Result<(), Infallible> {
        self.dues.extend(lease.until.map(|until| (until, row)));
        self.leases.insert(row, lease.clone());
        Ok(())
    }

    fn remember(&mut self, record: &Record, call_id: Option<&RequestId>) {
        name(&mut self.repeats, call_id, record.row);
    }

    fn newest_event(&self) -> Result<u64, Infallible> {
        Ok(self.newest())
    }

    fn endpoint(&self, name: &str) -> Result<Option<Endpoint>, Infallible> {
        Ok(self.endpoints.get(name).cloned())
    }

    fn insert_endpoint(&mut self, name: &str, position: u64) -> Result<Endpoint, Infallible> {
        let rows = self.endpoints.values().map(|endpoint| endpoint.row);
        let endpoint = Endpoint {
            row: rows.max().map_or(0, |row| row + 1),
            position,
            held: None,
            stopped_at: None,
            left_at: None,
        };
        self.endpoints.insert(name.to_owned(), endpoint.clone());
        Ok(endpoint)
    }

    fn update_endpoint(&mut self, endpoint: &Endpoint) -> Result<(), Infallible> {
        let mut known = self.endpoints.values_mut();
        if let Some(known) = known.find(|known| known.row == endpoint.row) {
            *known = endpoint.clone();
        }
        Ok(())
    }

    fn remove_endpoint(&mut self, endpoint: &Endpoint) -> Result<(), Infallible> {
        self.undelivered.retain(|(row, _), _| *row != endpoint.row);
        self.endpoints.retain(|_, known| known.row != endpoint.row);
        Ok(())
    }

    fn parked(&self, endpoint: &Endpoint) -> Result<Vec<(u64, Uuid)>, Infallible> {
        let parked = self
            .undelivered_of(endpoint)
            .filter(|of_it| is_parked(of_it));
        let parked = parked.filter_map(|of_it| {
            let record = self.record(self.happened(of_it.position)?.row)?;
            Some((of_it.position, record.action.request_id.as_uuid()?))
        });
        Ok(parked.collect())
    }

    fn dead(&self, endpoint: &Endpoint) -> Result<Vec<(u64, Uuid)>, Infallible> {
        let dead = self
            .undelivered_of(endpoint)
            .filter(|of_it| !is_parked(of_it));
        let dead = dead.filter_map(|of_it| {
            let event = &self.happened(of_it.position)?.event;
            Some((of_it.position, event.id.as_uuid()?))
        });
        Ok(dead.collect())
    }

    fn undelivered(
        &self,
        endpoint: &Endpoint,
        position: u64,
    ) -> Result<Option<Undelivered>, Infallible> {
        Ok(self.undelivered.get(&(endpoint.row, position)).cloned())
    }

    fn first_parked(
        &self,
        endpoint: &Endpoint,
        position: u64,
    ) -> Result<Option<Undelivered>, Infallible> {
        let row = |position| self.happened(position).map(|happened| happened.row);
        let mut parked = self
            .undelivered_of(endpoint)
            .filter(|of_it| is_parked(of_it));
        Ok(parked
            .find(|of_it| row(of_it.position) == row(position))
            .cloned())
    }

    fn set_undelivered(
        &mut self,
        endpoint: &Endpoint,
        undelivered: &Undelivered,
    ) -> Result<(), Infallible> {
        if self.events.contains_key(&undelivered.position) {
            let key = (endpoint.row, undelivered.position);
            self.undelivered.insert(key, undelivered.clone());
        }
        Ok(())
    }

    fn remove_undelivered(&mut self, endpoint: &Endpoint, position: u64) -> Result<(), Infallible> {
        self.undelivered.remove(&(endpoint.row, position));
        Ok(())
    }

    fn tombstone(&self, identity: &Identity) -> Result<Option<Tombstone>, Infallible> {
        Ok(self.tombstones.get(identity).cloned())
    }

    fn remove(&mut self, record: &Record) -> Result<(), Infallible> {
        let Some(record) = self.records.remove(&record.row) else {
            return Ok(());
        };
        self.events.retain(|_, happened| happened.row != record.row);
        let events = &self.events;
        self.undelivered
            .retain(|(_, position), _| events.contains_key(position));
        self.leases.remove(&record.row);
        let action = record.action;
        let id = action.request_id.as_uuid().unwrap_or_default();
        self.ids.remove(&id);
        let identity = action
            .tenant_id
            .zip(action.thread_id)
            .zip(action.idempotency_key);
        let identity = identity.map(|((tenant_id, thread_id), idempotency_key)| Identity {
            tenant_id,
            thread_id,
            idempotency_key,
        });
        let decided = action.decision.zip(action.decided_at);
        if let (Some(identity), Some((decision, decided_at))) = (identity, decided) {
            self.identities.remove(&identity);
            let tombstone = Tombstone {
                request_id: id,
                decision,
                execution: action.execution,
                closed: action.closed,
                submitted_digest: record.submitted_digest,
                edited_digest: action.edited_payload.and(action.digest),
                created_at: action.created_at.unwrap_or(decided_at),
                decided_at,
            };
            self.tombstones.insert(identity, tombstone);
        }
        Ok(())
    }

    fn newest_action(&self) -> Result<Option<i64>, Infallible> {
        Ok(self.records.last_key_value().map(|(row, _)| *row))
    }

    fn endpoints(&self) -> Result<Vec<Endpoint>, Infallible> {
        Ok(self.endpoints.values().cloned().collect())
    }

    fn events_between(
        &self,
        after: u64,
        last: u64,
        limit: usize,
    ) -> Result<Vec<(u64, SystemTime)>, Infallible> {
        let between = self.behind(after).filter(|(position, _)| *position <= last);
        let times = between.filter_map(|(position, happened)| Some((position, happened.event.at?)));
        Ok(times.take(limit).collect())
    }

    /// This store has no audit chain.
    fn chain_towards(&mut self, position: u64) -> Result<u64, Infallible> {
        Ok(position)
    }

    fn aged(&self, position: u64) -> Result<Option<Aged>, Infallible> {
        let row = self.happened(position).map(|happened| happened.row);
        let newest = row.filter(|row| !self.behind(position).any(|(_, later)| later.row == *row));
        Ok(newest.map(|row| Aged::Free {
            row,
            size: self.record(row).map_or(0, Record::size),
        }))
    }

    fn outline(&self, row: i64) -> Result<Option<Record>, Infallible> {
        Ok(self.record(row).cloned())
    }

    fn swept(&self) -> Result<u64, Infallible> {
        Ok(self.swept)
    }

    fn set_swept(&mut self, position: u64) -> Result<(), Infallible> {
        self.swept = position;
        Ok(())
    }

    fn postpone(&mut self, position: u64, until: SystemTime) -> Result<(), Infallible> {
        self.postponed.insert((until, position));
        Ok(())
    }

    fn postponed(
        &self,
        time: SystemTime,
        limit: usize,
    ) -> Result<Vec<(SystemTime, u64)>, Infallible> {
        let due = self.postponed.range(..=(time, u64::MAX));
        Ok(due.take(limit).copied().collect())
    }

    fn remove_postponed(&mut self, until: SystemTime, position: u64) -> Result<(), Infallible> {
        self.postponed.remove(&(until, position));
        Ok(())
    }
}

fn is_parked(undelivered: &Undelivered) -> bool {
    !matches!(undelivered.standing, Standing::Dead(_))
}

impl Records {
    /// The records that are due: pending ones whose time is over, and claimed ones whose lease has
    /// ended.
    fn due(&self) -> Vec<Record> {
        let now = self.now();
        // A renewed claim has several times, but is due once.
        let over = self.dues.range(..=(now, i64::MAX)).map(|(_, row)| *row);
        let over: BTreeSet<_> = over.collect();
        over.into_iter()
            .filter_map(|row| self.record(row).cloned())
            .collect()
    }

    fn record(&self, row: i64) -> Option<&Record> {
        self.records.get(&row)
    }

    /// The position of the newest event.
    fn newest(&self) -> u64 {
        let newest = self.events.last_key_value();
        newest.map_or(0, |(position, _)| *position)
    }

    /// The event at a position.
    fn happened(&self, position: u64) -> Option<&Happened> {
        self.events.get(&position)
    }

    /// The events behind a position, in order.
    fn behind(&self, position: u64) -> impl Iterator<Item = (u64, &Happened)> {
        let behind = self.events.range(position.saturating_add(1)..);
        behind.map(|(position, happened)| (*position, happened))
    }

    /// The event at a position with its action, as it is shown.
    fn shown(&self, position: u64) -> Option<Event> {
        let happened = self.happened(position)?;
        let mut event = happened.event.clone();
        event.action = self
            .record(happened.row)
            .map(|record| record.action.clone().listed())
            .map(|action| Box::new(happened.left_in.shown(action, &event)));
        Some(event)
    }

    /// What an endpoint has not received, in order.
    fn undelivered_of(&self, endpoint: &Endpoint) -> impl Iterator<Item = &Undelivered> {
        let all = (endpoint.row, 0)..=(endpoint.row, u64::MAX);
        self.undelivered.range(all).map(|(_, of_it)| of_it)
    }

    /// The one action that a call id names, within a tenant or among all.
    fn named(&self, call: Uuid, tenant: Option<&TenantId>) -> Option<&Record> {
        let of = |calls: &HashMap<Uuid, Vec<i64>>| -> Vec<&Record> {
            let named = calls.get(&call).into_iter().flatten();
            let named = named.filter_map(|row| self.record(*row));
            named.filter(|record| is_of(record, tenant)).collect()
        };
        let recorded = of(&self.calls);
        let named = if recorded.is_empty() {
            of(&self.repeats)
        } else {
            recorded
        };
        match *named {
            [one] => Some(one),
            _ => None,
        }
    }
}

fn is_of(record: &Record, tenant: Option<&TenantId>) -> bool {
    tenant.is_none() || record.action.tenant_id.as_ref() == tenant
}

/// Notes that a call id names the action in this row.
fn name(calls: &mut HashMap<Uuid, Vec<i64>>, call_id: Option<&RequestId>, row: i64) {
    if let Some(call) = call_id.and_then(RequestId::as_uuid) {
        let named = calls.entry(call).or_default();
        if !named.contains(&row) {
            named.push(row);
        }
    }
}

impl Store for MemoryStore {
    async fn decide(&self, request: Decide) -> Result<Decided, StoreError> {
        self.run(&request)
    }

    async fn submit(&self, request: Submit) -> Result<Submitted, StoreError> {
        self.run(&request)
    }

    async fn decide_by_id(&self, request: DecideById) -> Result<Decided, StoreError> {
        self.run(&request)
    }

    async fn cancel(&self, request: Cancel) -> Result<Cancelled, StoreError> {
        self.run(&request)
    }

    async fn acquire(&self, request: Acquire) -> Result<Acquired, StoreError> {
        self.run(&request)
    }

    async fn renew(&self, request: Renew) -> Result<Renewed, StoreError> {
        self.run(&request)
    }

    async fn finish(&self, request: Finish) -> Result<Finished, StoreError> {
        self.run(&request)
    }

    async fn sweep(&self, request: Sweep) -> Result<Swept, StoreError> {
        self.run(&request)
    }

    async fn list(&self, request: List) -> Result<Page, StoreError> {
        let records = self.records()?;
        let states: Vec<_> = request.states().collect();
        let matches = |record: &&Record| {
            is_of(record, Some(&request.tenant_id))
                && State::of(&record.action).is_some_and(|state| states.contains(&state))
                && request
                    .thread_id
                    .as_ref()
                    .is_none_or(|thread| record.action.thread_id.as_ref() == Some(thread))
        };
        // Rows count from 0, positions from 1.
        let position = |record: &Record| u128::from(record.row.unsigned_abs()) + 1;
        let after = request.after.map(Cursor::position);
        let all = records.records.values().filter(matches);
        let mut found: Vec<&Record> = match request.order() {
            Order::OldestFirst => all
                .filter(|record| after.is_none_or(|after| position(record) > after))
                .take(request.limit.saturating_add(1))
                .collect(),
            Order::NewestFirst => all
                .rev()
                .filter(|record| after.is_none_or(|after| position(record) < after))
                .take(request.limit.saturating_add(1))
                .collect(),
        };
        let has_more = found.len() > request.limit;
        found.truncate(request.limit);
        let next = found.last().filter(|_| has_more);
        Ok(Page {
            next: next.map(|record| Cursor::new(position(record))),
            actions: found
                .into_iter()
                .map(|record| record.action.clone().listed())
                .collect(),
        })
    }

    async fn tenants(
        &self,
        after: Option<&TenantId>,
        limit: usize,
    ) -> Result<Vec<TenantId>, StoreError> {
        let records = self.records()?;
        let tenants = records.records.values();
        let tenants = tenants.filter_map(|record| record.action.tenant_id.as_ref());
        let tenants: BTreeSet<&str> = tenants.map(TenantId::as_str).collect();
        let behind = tenants
            .into_iter()
            .filter(|tenant| after.is_none_or(|after| *tenant > after.as_str()));
        Ok(behind
            .take(limit)
            .filter_map(|tenant| tenant.parse().ok())
            .collect())
    }

    async fn look_up(&self, id: Uuid, tenant: &TenantId) -> Result<Option<Action>, StoreError> {
        let records = self.records()?;
        let Ok(found) = records.find_by_id(id, tenant);
        Ok(found.map(|record| {
            let mut action = record.action;
            let of_it = records
                .events
                .values()
                .filter(|happened| happened.row == record.row);
            action.history = Some(of_it.map(|happened| happened.event.clone()).collect());
            action
        }))
    }

    async fn events(
        &self,
        tenant: &TenantId,
        after: u64,
        limit: usize,
    ) -> Result<Vec<(u64, Event)>, StoreError> {
        let records = self.records()?;
        let events = records.behind(after);
        let of_tenant = events.filter(|(_, happened)| happened.tenant.as_ref() == Some(tenant));
        let positions = of_tenant.map(|(position, _)| position).take(limit);
        Ok(positions
            .filter_map(|position| Some((position, records.shown(position)?)))
            .collect())
    }

    async fn all_events(&self, after: u64, limit: usize) -> Result<Vec<(u64, Event)>, StoreError> {
        let records = self.records()?;
        let positions = records.behind(after).map(|(position, _)| position);
        Ok(positions
            .take(limit)
            .filter_map(|position| Some((position, records.shown(position)?)))
            .collect())
    }

    async fn take_endpoint(&self, request: TakeEndpoint) -> Result<EndpointTaken, StoreError> {
        self.run(&request)
    }

    async fn due_deliveries(
        &self,
        endpoint: &str,
        limit: usize,
        longest_wait: Duration,
    ) -> Result<DueDeliveries, StoreError> {
        let records = self.records()?;
        let now = records.now();
        let latest = now.checked_add(longest_wait);
        let parked = records.endpoints.get(endpoint).into_iter();
        let parked = parked.flat_map(|endpoint| records.undelivered_of(endpoint));
        let mut all: Vec<_> = parked
            .filter_map(|of_it| match of_it.standing {
                Standing::Due(due) => Some((due, of_it)),
                _ => None,
            })
            .collect();
        all.sort_by_key(|(due, of_it)| (*due, of_it.position));
        let is_over = |due: &SystemTime| *due <= now || latest.is_some_and(|latest| *due > latest);
        let next = all.iter().map(|(due, _)| *due).find(|due| !is_over(due));
        let due = all.iter().filter(|(due, _)| is_over(due)).take(limit);
        Ok(DueDeliveries {
            deliveries: due
                .filter_map(|(_, of_it)| {
                    Some(DueDelivery {
                        position: of_it.position,
                        event: records.shown(of_it.position)?,
                        attempts: of_it.attempts,
                    })
                })
                .collect(),
            next: next.and_then(|next| next.duration_since(now).ok()),
        })
    }

    async fn mark_deliveries(&self, request: MarkDeliveries) -> Result<Marked, StoreError> {
        self.run(&request)
    }

    async fn resend(&self, request: Resend) -> Result<Resent, StoreError> {
        self.run(&request)
    }

    async fn resume(&self, request: Resume) -> Result<Resumed, StoreError> {
        self.run(&request)
    }

    async fn forget_endpoint(&self, request: Forget) -> Result<Forgotten, StoreError> {
        self.run(&request)
    }

    async fn endpoints(&self) -> Result<Vec<EndpointState>, StoreError> {
        let records = self.records()?;
        let endpoints = records.endpoints.iter().map(|(name, endpoint)| {
            let of_it = records.undelivered_of(endpoint);
            let (parked, dead): (Vec<_>, Vec<_>) = of_it.partition(|of_it| is_parked(of_it));
            EndpointState {
                name: name.clone(),
                position: endpoint.position,
                behind: records.newest().saturating_sub(endpoint.position),
                behind_since: records
                    .behind(endpoint.position)
                    .find_map(|(_, happened)| happened.event.at),
                parked: parked.len().min(COUNTED) as u64,
                dead: dead.len().min(COUNTED) as u64,
                stopped_at: endpoint.stopped_at,
                held_until: endpoint.held.map(|(_, until)| until),
            }
        });
        Ok(endpoints.collect())
    }

    async fn dead_letters(
        &self,
        endpoint: &str,
        limit: usize,
    ) -> Result<Vec<DeadLetter>, StoreError> {
        let records = self.records()?;
        let of_it = records.endpoints.get(endpoint).into_iter();
        let of_it = of_it.flat_map(|endpoint| records.undelivered_of(endpoint));
        let dead = of_it.filter_map(|of_it| match of_it.standing {
            Standing::Dead(given_up_at) => Some(DeadLetter {
                position: of_it.position,
                event: records.shown(of_it.position)?,
                attempts: of_it.attempts,
                parked_at: of_it.since,
                given_up_at,
                failure: of_it.failure.clone().unwrap_or_default(),
            }),
            _ => None,
        });
        Ok(dead.take(limit).collect())
    }

    async fn newest_event(&self) -> Result<u64, StoreError> {
        Ok(self.records()?.newest())
    }

    async fn find(
        &self,
        id: Uuid,
        tenant: Option<&TenantId>,
    ) -> Result<Option<Action>, StoreError> {
        let records = self.records()?;
        let found = records.ids.get(&id).and_then(|row| records.record(*row));
        let found = found.filter(|record| is_of(record, tenant));
        let found = found.or_else(|| records.named(id, tenant));
        Ok(found.map(|record| record.action.clone()))
    }

    fn watch(&self, id: Uuid) -> Watch {
        self.shared.watchers.watch(id)
    }

    fn watch_tenant(&self, tenant: &TenantId) -> Watch {
        self.shared.watchers.watch_tenant(tenant)
    }

    fn watch_all(&self) -> Watch {
        self.shared.watchers.watch_all()
    }

    async fn check(&self) -> Result<(), StoreError> {
        self.records().map(drop)
    }

    async fn backlog(&self) -> Result<Backlog, StoreError> {
        let records = self.records()?;
        let now = records.now();
        let actions = || records.records.values();
        let oldest = |times: &mut dyn Iterator<Item = SystemTime>| {
            times
                .min()
                .map(|at| now.duration_since(at).unwrap_or_default())
        };
        let pending = actions().filter(|record| record.action.status == Status::Pending);
        let unclaimed = actions().filter(|record| {
            State::of(&record.action).is_some_and(State::is_not_picked_up)
                && record.submitted_by.is_some()
        });
        Ok(Backlog {
            pending: oldest(&mut pending.filter_map(|record| record.action.created_at)),
            unclaimed: oldest(&mut unclaimed.filter_map(|record| record.action.decided_at)),
            unchained: None,
            tombstones: Some(records.tombstones.len() as u64),
        })
    }

    fn statistics(&self) -> Statistics {
        let records = self.lock();
        Statistics {
            events: records.counter.read(),
            removed: records.tombstones.len() as u64,
            writer: None,
            connections: None,
        }
    }

    async fn totals(&self) -> Result<Totals, StoreError> {
        let records = self.records()?;
        let decided = |record: &&Record| record.action.decision.is_some();
        Ok(Totals {
            actions: records.records.len() as u64,
            decisions: records.records.values().filter(decided).count() as u64,
            events: records.events.len() as u64,
            removed: records.tombstones.len() as u64,
        })
    }
}

impl fmt::Debug for MemoryStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryStore").finish_non_exhaustive()
    }
}
