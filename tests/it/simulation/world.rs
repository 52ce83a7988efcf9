//! What happened in a simulation, and whether it keeps the promises.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard};

use aegis_hitl::layer::Delivery;
use aegis_hitl::store::{Decide, Decided};
use aegis_hitl::{Action, Decision, Outcome, Status};
use tokio::time::Instant;

use super::network::{Direction, Fingerprint};

/// The trace, the model of the store, and what was seen at the far end. Clones share it.
#[derive(Clone)]
pub struct World(Arc<Mutex<Inner>>);

struct Inner {
    started: Instant,
    trace: Vec<String>,
    bytes: Fingerprint,
    violations: Vec<String>,
    /// What the store has to have on record, by key: tenant and thread are the same for all.
    records: BTreeMap<String, Record>,
    /// How many requests of each call the server's code has seen.
    arrivals: BTreeMap<String, u32>,
    /// Which calls were told that theirs is the decision on record.
    accepted: BTreeMap<String, BTreeSet<String>>,
    /// Calls of which it was said that they were never sent.
    never_sent: BTreeSet<String>,
    /// Calls of which it was said that they are not on record.
    not_recorded: BTreeSet<String>,
    /// Calls that may not be sent again.
    unsafe_calls: BTreeSet<String>,
    counts: Counts,
}

/// What came about, to show that the simulation reaches what it is made for.
#[derive(Default, Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counts {
    pub accepted: u64,
    pub duplicates: u64,
    pub conflicts: u64,
    pub retried: u64,
    pub replays: u64,
    pub never_sent: u64,
    pub unknown: u64,
    pub timeouts: u64,
    pub unkeyed_arrivals: u64,
    pub restarts: u64,
}

impl Counts {
    pub fn add(&mut self, more: &Self) {
        self.accepted += more.accepted;
        self.duplicates += more.duplicates;
        self.conflicts += more.conflicts;
        self.retried += more.retried;
        self.replays += more.replays;
        self.never_sent += more.never_sent;
        self.unknown += more.unknown;
        self.timeouts += more.timeouts;
        self.unkeyed_arrivals += more.unkeyed_arrivals;
        self.restarts += more.restarts;
    }
}

/// A decision on record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    pub decision: Decision,
    pub call: Option<String>,
    pub digest: Option<[u8; 32]>,
    /// The server's id of the action.
    pub id: String,
}

/// What a call was.
#[derive(Clone, Debug)]
pub struct Asked {
    pub client: usize,
    pub key: String,
    pub decision: Decision,
    pub call: String,
    /// Whether another call has the same id.
    pub is_shared: bool,
}

/// What a client was told of its decision.
#[derive(Debug)]
pub enum Told {
    OnRecord {
        outcome: Outcome,
        /// The action, if the client read it.
        action: Option<Box<Action>>,
        attempts: u32,
    },
    Refused {
        /// The action on record, where the server told it.
        recorded: Option<Box<Action>>,
        is_unknown: bool,
        delivery: Delivery,
        attempts: u32,
        status: Option<u16>,
        is_timeout: bool,
    },
}

impl World {
    pub fn new() -> Self {
        Self(Arc::new(Mutex::new(Inner {
            started: Instant::now(),
            trace: Vec::new(),
            bytes: Fingerprint::default(),
            violations: Vec::new(),
            records: BTreeMap::new(),
            arrivals: BTreeMap::new(),
            accepted: BTreeMap::new(),
            never_sent: BTreeSet::new(),
            not_recorded: BTreeSet::new(),
            unsafe_calls: BTreeSet::new(),
            counts: Counts::default(),
        })))
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap()
    }

    pub fn note(&self, what: fmt::Arguments<'_>) {
        self.inner().note(what);
    }

    pub fn violation(&self, what: fmt::Arguments<'_>) {
        self.inner().violation(what);
    }

    pub fn bytes(&self, connection: usize, direction: Direction, bytes: &[u8]) {
        self.inner().bytes.add(connection, direction, bytes);
    }

    pub fn restarted(&self) {
        self.inner().counts.restarts += 1;
    }

    /// A request has reached the server's code.
    pub fn arrived(&self, call: &str, what: &str) {
        let mut inner = self.inner();
        let arrivals = inner.arrivals.entry(call.to_owned()).or_default();
        *arrivals += 1;
        let arrivals = *arrivals;
        inner.note(format_args!("server: arrival {arrivals} of {call}, {what}"));
        if inner.unsafe_calls.contains(call) {
            inner.counts.unkeyed_arrivals += 1;
            if arrivals > 1 {
                inner.violation(format_args!("{call} is not safe to repeat and came twice"));
            }
        }
        if inner.never_sent.contains(call) {
            inner.violation(format_args!("{call} was said to be never sent and came"));
        }
    }

    /// The store has ruled. Says what the model says.
    pub fn decided(&self, asked: &Decide, decided: &Decided) {
        let mut inner = self.inner();
        let key = asked.identity.idempotency_key.as_str().to_owned();
        let call = asked.call_id.as_ref().map(|id| id.as_str().to_owned());
        let digest = asked.payload.as_ref().map(|payload| *payload.digest());
        let (what, action) = match decided {
            Decided::Recorded(action) => ("recorded", action),
            Decided::Replayed(action) => ("replayed", action),
            Decided::Duplicate(action) => ("duplicate", action),
            Decided::Conflict(action) => ("conflict", action),
            Decided::PayloadMismatch(action) => ("payload mismatch", action),
            Decided::Closed(action) => ("closed", action),
            Decided::SelfApproval(_) | Decided::DigestMissing(_) | Decided::EditNotAllowed(_) => {
                return inner.violation(format_args!("{key} is refused"));
            }
            Decided::NotFound => return inner.violation(format_args!("{key} is not found")),
        };
        let on_record = inner.records.get(&key).cloned();
        let expected = match &on_record {
            None => "recorded",
            Some(record) if matches!((record.digest, digest), (Some(a), Some(b)) if a != b) => {
                "payload mismatch"
            }
            Some(record) if record.decision != asked.decision => "conflict",
            Some(record) if call.is_some() && record.call == call => "replayed",
            Some(_) => "duplicate",
        };
        let decision = asked.decision;
        inner.note(format_args!(
            "store: {decision} of {key} by {call:?} is {what}"
        ));
        if what != expected {
            inner.violation(format_args!(
                "the store takes {decision} of {key} for {what}; the model says {expected}"
            ));
        }
        match (what, on_record) {
            ("recorded", Some(_)) => {
                inner.violation(format_args!("{key} has a second decision on record"));
            }
            ("recorded", None) => {
                let id = action.request_id.as_str().to_owned();
                if let Some(call) = &call
                    && inner.not_recorded.contains(call)
                {
                    inner.violation(format_args!("{call} was said not to be on record and is"));
                }
                let record = Record {
                    decision,
                    call,
                    digest,
                    id,
                };
                inner.records.insert(key, record);
            }
            ("replayed", _) => inner.counts.replays += 1,
            _ => {}
        }
    }

    /// This call may not be sent again.
    pub fn must_not_repeat(&self, call: &str) {
        self.inner().unsafe_calls.insert(call.to_owned());
    }

    pub fn told_never_sent(&self, call: &str) {
        let mut inner = self.inner();
        inner.counts.never_sent += 1;
        inner.never_sent.insert(call.to_owned());
        let arrivals = inner.arrivals.get(call).copied().unwrap_or_default();
        if arrivals > 0 {
            inner.violation(format_args!(
                "{call} is said to be never sent and came {arrivals} times"
            ));
        }
    }

    /// A client was told what became of its decision.
    pub fn told(&self, asked: &Asked, told: &Told) {
        let mut inner = self.inner();
        let Asked {
            client,
            key,
            decision,
            call,
            is_shared,
        } = asked;
        let record = inner.records.get(key).cloned();
        match told {
            Told::OnRecord {
                outcome,
                action,
                attempts,
            } => {
                inner.note(format_args!(
                    "client {client}: {call} is on record as {outcome:?} after {attempts} attempts"
                ));
                inner.counts.retried += u64::from(*attempts > 1);
                let Some(record) = record else {
                    return inner.violation(format_args!(
                        "{call} has a receipt and {key} has no decision on record"
                    ));
                };
                if record.decision != *decision {
                    inner.violation(format_args!(
                        "{call} has a receipt for {decision} and {} is on record for {key}",
                        record.decision
                    ));
                }
                if let Some(action) = action {
                    inner.agree(call, key, action);
                }
                let is_own = record.call.as_ref() == Some(call);
                match outcome {
                    Outcome::Accepted => {
                        inner.counts.accepted += 1;
                        if !is_own {
                            inner.violation(format_args!(
                                "{call} was accepted and {:?} is the call on record",
                                record.call
                            ));
                        }
                        let name = format!("{key} {decision}");
                        let calls = inner.accepted.entry(name).or_default();
                        calls.insert(call.clone());
                        if calls.len() > 1 {
                            let calls = calls.clone();
                            inner.violation(format_args!("{key} was accepted for {calls:?}"));
                        }
                    }
                    Outcome::Duplicate => {
                        inner.counts.duplicates += 1;
                        if is_own {
                            inner.violation(format_args!("{call} is a duplicate of itself"));
                        }
                    }
                }
            }
            Told::Refused {
                recorded,
                is_unknown,
                delivery,
                attempts,
                status,
                is_timeout,
            } => {
                inner.note(format_args!(
                    "client {client}: {call} failed after {attempts} attempts, delivery {delivery}, status {status:?}, \
                     unknown {is_unknown}"
                ));
                inner.counts.retried += u64::from(*attempts > 1);
                inner.counts.unknown += u64::from(*is_unknown);
                inner.counts.timeouts += u64::from(*is_timeout);
                if let Some(action) = recorded {
                    inner.counts.conflicts += 1;
                    inner.agree(call, key, action);
                }
                if !is_unknown && !is_shared {
                    inner.not_recorded.insert(call.clone());
                    if record.is_some_and(|record| record.call.as_ref() == Some(call)) {
                        inner.violation(format_args!(
                            "{call} is said not to be on record and is the call on record"
                        ));
                    }
                }
                if *delivery == Delivery::NeverSent && !is_shared {
                    drop(inner);
                    self.told_never_sent(call);
                }
            }
        }
    }

    /// Every decision that has to be on record, by key.
    pub fn records(&self) -> BTreeMap<String, Record> {
        self.inner().records.clone()
    }

    /// Ends the simulation.
    pub fn end(&self) -> (String, Vec<String>, Counts) {
        let mut inner = self.inner();
        let bytes = inner.bytes.finish();
        inner.note(format_args!("the bytes of all connections: {bytes:016x}"));
        let trace = inner.trace.join("\n");
        (trace, std::mem::take(&mut inner.violations), inner.counts)
    }
}

impl Inner {
    fn note(&mut self, what: fmt::Arguments<'_>) {
        let at = self.started.elapsed().as_millis();
        self.trace.push(format!("{at:>7} ms  {what}"));
    }

    fn violation(&mut self, what: fmt::Arguments<'_>) {
        self.note(format_args!("VIOLATION: {what}"));
        self.violations.push(what.to_string());
    }

    /// What a client was told of an action has to be what is on record.
    fn agree(&mut self, call: &str, key: &str, action: &Action) {
        let Some(record) = self.records.get(key).cloned() else {
            return self.violation(format_args!(
                "{call} was told of an action and {key} has none"
            ));
        };
        let named = action.idempotency_key.as_ref().map(|key| key.as_str());
        if action.status != Status::Committed
            || action.decision != Some(record.decision)
            || action.request_id.as_str() != record.id
            || named != Some(key)
        {
            self.violation(format_args!(
                "{call} was told {action:?} of {key}, and {record:?} is on record"
            ));
        }
    }
}
