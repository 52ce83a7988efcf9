//! The smallest store there can be, for what the protocol says of a store's answers.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use aegis_hitl::store::{
    Decide, Decided, Identity, Store, StoreError, Submit, Submitted, Totals, Watch, Watchers,
};
use aegis_hitl::{Action, Execution, RequestId, Status};
use uuid::Uuid;

#[derive(Clone, Default)]
pub struct Memory {
    records: Arc<Mutex<HashMap<Identity, Record>>>,
    watchers: Watchers,
}

struct Record {
    action: Action,
    digest: Option<[u8; 32]>,
    /// The call whose decision is on record.
    decided_by: Option<RequestId>,
    calls: Vec<RequestId>,
    closed: bool,
}

impl Record {
    fn new(identity: &Identity) -> Self {
        let mut action = Action::new(RequestId::mint(), Status::Pending);
        action.tenant_id = Some(identity.tenant_id.clone());
        action.thread_id = Some(identity.thread_id.clone());
        action.idempotency_key = Some(identity.idempotency_key.clone());
        action.created_at = Some(SystemTime::now());
        Self {
            action,
            digest: None,
            decided_by: None,
            calls: Vec::new(),
            closed: false,
        }
    }
}

impl Memory {
    /// The same records, whose decisions elsewhere wake nobody here.
    pub fn without_wake_ups(&self) -> Self {
        Self {
            records: Arc::clone(&self.records),
            watchers: Watchers::new(),
        }
    }

    /// Makes an approved action one whose execution failed.
    pub fn fail(&self, key: &str) {
        self.edit(key, |record| {
            record.action.status = Status::Failed;
            record.action.execution = Some(Execution::Failed);
        });
    }

    /// Makes a decided action one that had expired.
    pub fn close(&self, key: &str) {
        self.edit(key, |record| record.closed = true);
    }

    fn edit(&self, key: &str, edit: impl FnOnce(&mut Record)) {
        let mut records = self.records.lock().unwrap();
        let record = records
            .iter_mut()
            .find(|(identity, _)| identity.idempotency_key.as_str() == key);
        edit(record.unwrap().1);
    }
}

impl Store for Memory {
    async fn decide(&self, request: Decide) -> Result<Decided, StoreError> {
        let mut records = self.records.lock().unwrap();
        if request.require_submission && !records.contains_key(&request.identity) {
            return Ok(Decided::NotFound);
        }
        let record = records
            .entry(request.identity.clone())
            .or_insert_with(|| Record::new(&request.identity));
        let digest = request.payload.as_ref().map(|payload| *payload.digest());
        if let (Some(one), Some(other)) = (record.digest, digest)
            && one != other
        {
            return Ok(Decided::PayloadMismatch(record.action.clone()));
        }
        if record.action.status == Status::Committed {
            let action = record.action.clone();
            return Ok(if action.decision != Some(request.decision) {
                if record.closed {
                    Decided::Closed(action)
                } else {
                    Decided::Conflict(action)
                }
            } else if request.call_id.is_some() && request.call_id == record.decided_by {
                Decided::Replayed(action)
            } else {
                Decided::Duplicate(action)
            });
        }
        record.calls.extend(request.call_id.clone());
        record.decided_by = request.call_id;
        record.digest = record.digest.or(digest);
        let action = &mut record.action;
        action.status = Status::Committed;
        action.decision = Some(request.decision);
        action.execution = None;
        action.decided_at = Some(SystemTime::now());
        action.comment = request.comment;
        if action.payload.is_none() {
            action.payload = request.payload.map(|payload| payload.payload().clone());
        }
        let action = action.clone();
        drop(records);
        self.watchers.wake(action.request_id.as_uuid_v4().unwrap());
        Ok(Decided::Recorded(action))
    }

    async fn submit(&self, request: Submit) -> Result<Submitted, StoreError> {
        let mut records = self.records.lock().unwrap();
        let digest = request.payload.as_ref().map(|payload| *payload.digest());
        if let Some(record) = records.get(&request.identity) {
            let action = record.action.clone();
            return Ok(match (record.digest, digest) {
                (Some(one), Some(other)) if one != other => Submitted::PayloadMismatch(action),
                _ => Submitted::Existing(action),
            });
        }
        let mut record = Record::new(&request.identity);
        record.calls.extend(request.call_id);
        record.digest = digest;
        record.action.payload = request.payload.map(|payload| payload.payload().clone());
        let action = record.action.clone();
        records.insert(request.identity, record);
        Ok(Submitted::Recorded(action))
    }

    async fn find(&self, id: Uuid) -> Result<Option<Action>, StoreError> {
        let records = self.records.lock().unwrap();
        let named = |request_id: &RequestId| request_id.as_uuid_v4() == Some(id);
        if let Some(record) = records
            .values()
            .find(|record| named(&record.action.request_id))
        {
            return Ok(Some(record.action.clone()));
        }
        let mut found = records
            .values()
            .filter(|record| record.calls.iter().any(named));
        match (found.next(), found.next()) {
            (Some(record), None) => Ok(Some(record.action.clone())),
            _ => Ok(None),
        }
    }

    fn watch(&self, id: Uuid) -> Watch {
        self.watchers.watch(id)
    }

    async fn check(&self) -> Result<(), StoreError> {
        Ok(())
    }

    async fn totals(&self) -> Result<Totals, StoreError> {
        let records = self.records.lock().unwrap();
        let mut totals = Totals::default();
        totals.actions = records.len() as u64;
        totals.decisions = records
            .values()
            .filter(|record| record.action.decision.is_some())
            .count() as u64;
        Ok(totals)
    }
}
