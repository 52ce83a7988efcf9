//! The in-memory store.

use std::collections::HashMap;
use std::convert::Infallible;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use uuid::Uuid;

use super::operation::{Event, Inserted, Ledger, New, Operation, Record};
use super::{
    Decide, Decided, Identity, Store, StoreError, Submit, Submitted, Totals, Watch, Watchers,
};
use crate::protocol::{Action, RequestId, TenantId, uuid_v7};

/// A store in memory, for tests. It follows the rules of every store, and loses its records with
/// its last handle.
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
    /// Indexed by row.
    records: Vec<Record>,
    ids: HashMap<Uuid, i64>,
    identities: HashMap<Identity, i64>,
    /// The rows that a call id names, from calls that made a transition.
    calls: HashMap<Uuid, Vec<i64>>,
    /// The rows that a call id names, from calls that changed nothing.
    repeats: HashMap<Uuid, Vec<i64>>,
    events: u64,
}

impl MemoryStore {
    /// Makes an empty store.
    pub fn new() -> Self {
        Self::default()
    }

    /// Makes every request fail as unavailable, or lets requests work again.
    pub fn set_unavailable(&self, fails: bool) {
        self.shared.fails.store(fails, Ordering::SeqCst);
    }

    fn records(&self) -> Result<MutexGuard<'_, Records>, StoreError> {
        if self.shared.fails.load(Ordering::SeqCst) {
            return Err(StoreError::unavailable("the store was made to fail"));
        }
        let records = self.shared.records.lock();
        Ok(records.unwrap_or_else(PoisonError::into_inner))
    }

    fn run<O: Operation>(&self, operation: &O) -> Result<O::Outcome, StoreError> {
        let outcome = match operation.apply(&mut *self.records()?) {
            Ok(outcome) => outcome,
            Err(never) => match never {},
        };
        if let Some(id) = O::changed(&outcome).and_then(|action| action.request_id.as_uuid()) {
            self.shared.watchers.wake(id);
        }
        Ok(outcome)
    }
}

impl Ledger for Records {
    type Error = Infallible;

    /// The time in microseconds, the resolution of every store.
    fn now(&self) -> SystemTime {
        let since = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let rest = Duration::from_nanos(u64::from(since.subsec_nanos() % 1000));
        UNIX_EPOCH + (since - rest)
    }

    fn find(&self, identity: &Identity) -> Result<Option<Record>, Infallible> {
        let row = self.identities.get(identity);
        Ok(row.and_then(|row| self.record(*row)).cloned())
    }

    fn insert(&mut self, new: New<'_>) -> Result<Inserted, Infallible> {
        if let Some(record) = self.find(new.identity)? {
            return Ok(Inserted::Existing(record));
        }
        let (row, id) = (self.records.len() as i64, uuid_v7());
        let record = new.record(row, id.into());
        self.ids.insert(id, row);
        self.identities.insert(new.identity.clone(), row);
        self.records.push(record.clone());
        Ok(Inserted::New(record))
    }

    fn update(&mut self, record: &Record) -> Result<(), Infallible> {
        let place = usize::try_from(record.row).ok();
        if let Some(place) = place.and_then(|row| self.records.get_mut(row)) {
            *place = record.clone();
        }
        Ok(())
    }

    fn append(&mut self, event: Event<'_>) -> Result<(), Infallible> {
        self.events += 1;
        name(&mut self.calls, event.call_id, event.row);
        Ok(())
    }

    fn remember(&mut self, record: &Record, call_id: Option<&RequestId>) {
        name(&mut self.repeats, call_id, record.row);
    }
}

impl Records {
    fn record(&self, row: i64) -> Option<&Record> {
        self.records.get(usize::try_from(row).ok()?)
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

    async fn check(&self) -> Result<(), StoreError> {
        self.records().map(drop)
    }

    async fn totals(&self) -> Result<Totals, StoreError> {
        let records = self.records()?;
        let decided = |record: &&Record| record.action.decision.is_some();
        Ok(Totals {
            actions: records.records.len() as u64,
            decisions: records.records.iter().filter(decided).count() as u64,
            events: records.events,
        })
    }
}

impl fmt::Debug for MemoryStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryStore").finish_non_exhaustive()
    }
}
