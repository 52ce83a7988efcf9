//! A store in memory.

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use uuid::Uuid;

use super::rule::{Asked, Recorded, Ruling, canonical_call, payloads_differ, rule};
use super::{
    Decide, Decided, Fingerprinted, Identity, Store, StoreError, Submit, Submitted, Totals, Watch,
    Watchers,
};
use crate::protocol::{Action, RequestId, Status, TenantId};

/// A store in memory, for tests: it rules as every store does, and forgets all with its last handle.
#[derive(Clone, Default)]
pub struct Memory {
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
    actions: HashMap<Uuid, Record>,
    identities: HashMap<Identity, Uuid>,
    /// The actions that a call id names, by calls that made a transition.
    calls: HashMap<Uuid, Vec<Uuid>>,
    /// The same, by calls that changed nothing.
    confirmed: HashMap<Uuid, Vec<Uuid>>,
    transitions: u64,
}

struct Record {
    action: Action,
    digest: Option<[u8; 32]>,
    call_id: Option<String>,
}

impl Memory {
    /// Makes an empty store.
    pub fn new() -> Self {
        Self::default()
    }

    /// Makes every request fail as unavailable, or work again.
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

    fn wake(&self, action: &Action) {
        if let Some(id) = action.request_id.as_uuid_v4() {
            self.shared.watchers.wake(id);
        }
    }
}

impl Records {
    fn insert(
        &mut self,
        identity: Identity,
        payload: Option<Fingerprinted>,
    ) -> (Uuid, &mut Record) {
        let id = Uuid::new_v4();
        let mut action = Action::new(RequestId::from(id), Status::Pending);
        action.tenant_id = Some(identity.tenant_id.clone());
        action.thread_id = Some(identity.thread_id.clone());
        action.idempotency_key = Some(identity.idempotency_key.clone());
        action.created_at = Some(now());
        self.identities.insert(identity, id);
        let record = self.actions.entry(id).or_insert(Record {
            action,
            digest: None,
            call_id: None,
        });
        record.fill_in(payload);
        (id, record)
    }

    fn note(&mut self, id: Uuid, call_id: Option<&RequestId>) {
        self.transitions += 1;
        name(&mut self.calls, call_id, id);
    }

    /// The one action that a call id names, of a tenant or of all.
    fn named(&self, call: Uuid, tenant: Option<&TenantId>) -> Option<&Record> {
        let of = |calls: &HashMap<Uuid, Vec<Uuid>>| -> Vec<&Record> {
            let named = calls.get(&call).into_iter().flatten();
            let named = named.filter_map(|id| self.actions.get(id));
            named.filter(|record| record.is_of(tenant)).collect()
        };
        let recorded = of(&self.calls);
        let named = if recorded.is_empty() {
            of(&self.confirmed)
        } else {
            recorded
        };
        match *named {
            [one] => Some(one),
            _ => None,
        }
    }

    fn decide(&mut self, request: Decide) -> Decided {
        let call_id = request.call_id.as_ref();
        let canonical = call_id.map(canonical_call);
        let (id, record) = match self.identities.get(&request.identity) {
            None if request.require_submission => return Decided::NotFound,
            None => self.insert(request.identity, None),
            Some(&id) => match self.actions.get_mut(&id) {
                Some(record) => (id, record),
                None => return Decided::NotFound,
            },
        };
        let ruling = rule(
            Recorded {
                status: record.action.status,
                decision: record.action.decision,
                closed: false,
                digest: record.digest.as_ref(),
                call_id: record.call_id.as_deref(),
            },
            Asked {
                decision: request.decision,
                digest: request.payload.as_ref().map(Fingerprinted::digest),
                call_id: canonical.as_deref(),
            },
        );
        match ruling {
            Ruling::Record => {}
            Ruling::Replay => {
                let mut action = record.action.clone();
                action.replayed = true;
                return Decided::Replayed(action);
            }
            Ruling::Duplicate => {
                let action = record.action.clone();
                name(&mut self.confirmed, call_id, id);
                return Decided::Duplicate(action);
            }
            Ruling::Conflict => return Decided::Conflict(record.action.clone()),
            Ruling::PayloadMismatch => return Decided::PayloadMismatch(record.action.clone()),
            Ruling::Closed => return Decided::Closed(record.action.clone()),
        }
        record.action.status = Status::Committed;
        record.action.decision = Some(request.decision);
        record.action.decided_at = record.action.created_at.max(Some(now()));
        record.action.comment = request.comment;
        record.call_id = canonical.map(Into::into);
        record.fill_in(request.payload);
        let action = record.action.clone();
        self.note(id, call_id);
        Decided::Recorded(action)
    }

    fn submit(&mut self, request: Submit) -> Submitted {
        let on_record = self.identities.get(&request.identity).copied();
        if let Some(id) = on_record
            && let Some(record) = self.actions.get(&id)
        {
            let asked = request.payload.as_ref().map(Fingerprinted::digest);
            let action = record.action.clone();
            if payloads_differ(record.digest.as_ref(), asked) {
                return Submitted::PayloadMismatch(action);
            }
            name(&mut self.confirmed, request.call_id.as_ref(), id);
            return Submitted::Existing(action);
        }
        let (id, record) = self.insert(request.identity, request.payload);
        let action = record.action.clone();
        self.note(id, request.call_id.as_ref());
        Submitted::Recorded(action)
    }
}

/// Takes note that a call names an action.
fn name(calls: &mut HashMap<Uuid, Vec<Uuid>>, call_id: Option<&RequestId>, id: Uuid) {
    if let Some(call) = call_id.and_then(RequestId::as_uuid_v4) {
        let named = calls.entry(call).or_default();
        if !named.contains(&id) {
            named.push(id);
        }
    }
}

impl Record {
    fn is_of(&self, tenant: Option<&TenantId>) -> bool {
        tenant.is_none() || self.action.tenant_id.as_ref() == tenant
    }

    fn fill_in(&mut self, payload: Option<Fingerprinted>) {
        if let (None, Some(payload)) = (&self.digest, payload) {
            self.digest = Some(*payload.digest());
            self.action.payload = Some(payload.payload);
        }
    }
}

impl Store for Memory {
    async fn decide(&self, request: Decide) -> Result<Decided, StoreError> {
        let decided = self.records()?.decide(request);
        if let Decided::Recorded(action) = &decided {
            self.wake(action);
        }
        Ok(decided)
    }

    async fn submit(&self, request: Submit) -> Result<Submitted, StoreError> {
        let submitted = self.records()?.submit(request);
        if let Submitted::Recorded(action) = &submitted {
            self.wake(action);
        }
        Ok(submitted)
    }

    async fn find(
        &self,
        id: Uuid,
        tenant: Option<&TenantId>,
    ) -> Result<Option<Action>, StoreError> {
        let records = self.records()?;
        let found = records.actions.get(&id);
        let found = found.filter(|record| record.is_of(tenant));
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
            actions: records.actions.len() as u64,
            decisions: records.actions.values().filter(decided).count() as u64,
            events: records.transitions,
        })
    }
}

impl fmt::Debug for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Memory").finish_non_exhaustive()
    }
}

/// Now, in microseconds, as every store keeps times.
fn now() -> SystemTime {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let rest = Duration::from_nanos(u64::from(since.subsec_nanos() % 1000));
    UNIX_EPOCH + (since - rest)
}
