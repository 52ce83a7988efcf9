//! One of the stores under test, in the terms of the reference.

use std::collections::HashMap;
use std::fmt::Debug;
use std::time::{Duration, SystemTime};

use aegis_hitl::protocol::{Claim, ClaimToken, Digest, Event, EventKind, JsonText};
use aegis_hitl::store::{
    Acquire, Acquired, Actor, Cancel, Cancelled, Clock, Decide, DecideById, Decided, Fingerprinted,
    Finish, Finished, Identity, List, Renew, Renewed, Report, Store, Submission, Submit, Submitted,
    Sweep,
};
use aegis_hitl::{
    Action, Decision, Execution, IdempotencyKey, Payload, RequestId, Status, TenantId,
};
use proptest::prelude::*;
use proptest::test_runner::TestCaseError;
use uuid::Uuid;

use crate::support::reference::{
    Answer, Happened, Reference, Request, SLOTS, Shown, ShownClaim, Target, Token, actor, tenant,
    thread,
};

/// One step of the clock. Far more than a case takes, so real time decides nothing.
pub const STEP: Duration = Duration::from_secs(1000);

pub const PAYLOADS: [&str; 3] = [r#"{"n":1}"#, r#"{"n":2}"#, r#"{"n":3}"#];

/// Call ids: UUIDs of several versions, in two spellings, and one that is no UUID.
pub const CALLS: [&str; 4] = [
    "9f1b2c3d-0000-4000-8000-00000000abcd",
    "C232AB00-9414-11EC-B3C8-9F6BDECED846",
    "01940000-0000-7000-8000-000000000001",
    "call-1",
];

const TENANTS: [&str; 2] = ["acme", "globex"];

pub struct Side<S> {
    name: &'static str,
    pub store: S,
    /// Half a step before the clock's first time, so that times stay away from the bounds of steps.
    origin: SystemTime,
    ids: HashMap<usize, Uuid>,
    tokens: HashMap<(usize, u64), ClaimToken>,
}

/// The action that a request is about.
pub fn slot(request: &Request) -> usize {
    match request {
        Request::Submit { slot, .. } | Request::Decide { slot, .. } => *slot,
        Request::DecideById { to, .. }
        | Request::Cancel { to, .. }
        | Request::Acquire { to, .. }
        | Request::Renew { to, .. }
        | Request::Finish { to, .. } => to.slot,
    }
}

fn tenant_id(number: usize) -> TenantId {
    TENANTS[number].parse().unwrap()
}

fn identity(slot: usize) -> Identity {
    Identity {
        tenant_id: tenant_id(tenant(slot)),
        thread_id: ["run-1", "run-2"][thread(slot)].parse().unwrap(),
        idempotency_key: ["k-1", "k-2"][slot / 4].parse().unwrap(),
    }
}

fn call_id(call: Option<usize>) -> Option<RequestId> {
    call.map(|call| CALLS[call].parse().unwrap())
}

fn payload(number: Option<usize>) -> Option<Fingerprinted> {
    let payload = number.map(|number| Payload::from_json(PAYLOADS[number]).unwrap());
    payload.map(|payload| Fingerprinted::new(payload).unwrap())
}

fn digest(number: Option<usize>) -> Option<Digest> {
    payload(number).map(|payload| Digest::from(*payload.digest()))
}

fn number_of(payload: &Payload) -> usize {
    let number = PAYLOADS.iter().position(|text| *text == payload.as_str());
    number.expect("a payload that nobody sent")
}

fn is_system(happened: &Happened) -> bool {
    happened.actor.starts_with("system:")
}

/// Events that time alone caused since the same request may come in any order.
fn in_one_order(mut events: Vec<Happened>) -> Vec<Happened> {
    for run in events.chunk_by_mut(|one, other| is_system(one) && is_system(other)) {
        run.sort_by_key(|happened| happened.slot);
    }
    events
}

/// Whether an action may go this way, judged by the kinds of its events alone.
fn is_a_way(kinds: &[EventKind]) -> bool {
    use EventKind::{
        Approved, Cancelled, ClaimLost, Claimed, Completed, Expired, Failed, Rejected, Submitted,
    };
    let begins = matches!(kinds.first(), Some(Submitted | Approved | Rejected));
    begins
        && kinds.windows(2).all(|pair| {
            matches!(
                (pair[0], pair[1]),
                (Submitted, Approved | Rejected | Expired | Cancelled)
                    | (Approved, Claimed)
                    | (Claimed, Completed | Failed | ClaimLost)
                    | (Failed | ClaimLost, Approved | Rejected)
            )
        })
}

impl<S: Store> Side<S> {
    pub fn new(name: &'static str, store: S, clock: &Clock) -> Self {
        Self {
            name,
            store,
            origin: clock.now() - STEP / 2,
            ids: HashMap::new(),
            tokens: HashMap::new(),
        }
    }

    fn time(&self, step: i64) -> SystemTime {
        let distance = STEP * u32::try_from(step.unsigned_abs()).unwrap();
        if step < 0 {
            self.origin - distance
        } else {
            self.origin + distance
        }
    }

    fn step(&self, time: SystemTime) -> i64 {
        let micros = match time.duration_since(self.origin) {
            Ok(since) => since.as_micros() as i64,
            Err(before) => -(before.duration().as_micros() as i64),
        };
        micros.div_euclid(STEP.as_micros() as i64)
    }

    fn id(&self, slot: usize) -> Uuid {
        self.ids.get(&slot).copied().unwrap_or(Uuid::from_u128(7))
    }

    fn target(&self, to: Target) -> (Uuid, TenantId) {
        let tenant = tenant(to.slot) ^ usize::from(to.foreign);
        (self.id(to.slot), tenant_id(tenant))
    }

    fn token(&self, to: Target, token: Token) -> ClaimToken {
        match token {
            Token::Fence(fence) => self.tokens[&(to.slot, fence)].clone(),
            Token::Unknown => Uuid::from_u128(7).into(),
        }
    }

    fn slot_of(&self, action: &Action) -> usize {
        let is_it = |slot: &usize| {
            let identity = identity(*slot);
            action.tenant_id == Some(identity.tenant_id)
                && action.thread_id == Some(identity.thread_id)
                && action.idempotency_key == Some(identity.idempotency_key)
        };
        (0..SLOTS).find(is_it).expect("an action of another case")
    }

    fn shown(&self, action: &Action) -> Shown {
        let of_digest = |digest: Digest| {
            let numbers = (0..PAYLOADS.len()).map(Some);
            let mut numbers = numbers.filter(|number| self::digest(*number) == Some(digest));
            numbers.next().flatten().expect("a digest of no payload")
        };
        Shown {
            slot: self.slot_of(action),
            status: action.status,
            decision: action.decision,
            closed: action.closed,
            execution: action.execution,
            digest: action.digest.map(of_digest),
            payload: action.payload.as_ref().map(number_of),
            edited: action.edited_payload.as_ref().map(number_of),
            title: action.title.clone(),
            comment: action.comment.clone(),
            result: action
                .result
                .as_ref()
                .map(|result| result.as_str().to_owned()),
            reason: action.reason.clone(),
            allow_edit: action.allow_edit,
            created: self.step(action.created_at.unwrap()),
            expires: action.expires_at.map(|time| self.step(time)),
            decided: action.decided_at.map(|time| self.step(time)),
            decided_by: action.decided_by.clone(),
            replayed: action.replayed,
        }
    }

    fn happened(&self, slot: usize, event: &Event) -> Happened {
        let action = event.action.as_deref();
        Happened {
            slot,
            kind: event.kind,
            actor: event.actor.clone(),
            at: self.step(event.at.unwrap()),
            status: action.map_or(Status::Pending, |action| action.status),
            decision: action.and_then(|action| action.decision),
            execution: action.and_then(|action| action.execution),
        }
    }

    fn answer(&self, word: &'static str, action: &Action) -> Answer {
        Answer {
            word,
            shown: Some(self.shown(action)),
            claim: None,
        }
    }

    /// Notes the token of a claim, and holds that it is always the same.
    fn claim(&mut self, slot: usize, claim: &Claim) -> Result<ShownClaim, TestCaseError> {
        let newest = self.tokens.keys().filter(|key| key.0 == slot);
        let newest = newest.map(|key| key.1).max().unwrap_or(0);
        let known = self.tokens.entry((slot, claim.fence));
        let known = known.or_insert_with(|| claim.token.clone());
        prop_assert_eq!(known.as_str(), claim.token.as_str());
        prop_assert!(claim.fence >= newest, "a fence that does not grow");
        Ok(ShownClaim {
            fence: claim.fence,
            until: self.step(claim.expires_at.unwrap()),
        })
    }

    /// Removes whatever is over, behind a new action of another tenant, as the newest one stays.
    /// Returns how many went.
    pub async fn sweep(&mut self) -> usize {
        let submit = Submit {
            identity: Identity {
                tenant_id: "initech".parse().unwrap(),
                idempotency_key: IdempotencyKey::mint(),
                ..identity(0)
            },
            call_id: None,
            payload: None,
            submission: Submission::default(),
            actor: Actor::new(actor(0)),
            only_existing: false,
        };
        let submitted = self.store.submit(submit).await.unwrap();
        assert!(matches!(submitted, Submitted::Recorded(_)));
        let mut removed = 0;
        loop {
            let sweep = Sweep {
                retention: Duration::ZERO,
                limit: 2,
            };
            let swept = self.store.sweep(sweep).await.unwrap();
            removed += swept.removed;
            if !swept.has_more {
                return removed;
            }
        }
    }

    /// Makes what is due happen, and changes nothing else.
    pub async fn touch(&mut self, slot: usize) {
        let to = Target {
            slot,
            foreign: false,
        };
        let renew = Request::Renew {
            to,
            token: Token::Unknown,
            lease: 1,
        };
        assert_eq!(self.apply(&renew).await.unwrap().word, "lost");
    }

    pub async fn apply(&mut self, request: &Request) -> Result<Answer, TestCaseError> {
        let nothing = |word| Answer {
            word,
            shown: None,
            claim: None,
        };
        Ok(match request.clone() {
            Request::Submit {
                slot,
                call,
                payload: sent,
                title,
                expires,
                allow_edit,
                actor: by,
                only_existing,
            } => {
                let submit = Submit {
                    identity: identity(slot),
                    call_id: call_id(call),
                    payload: payload(sent),
                    submission: Submission {
                        title,
                        expires_at: expires.map(|step| self.time(step)),
                        allow_edit,
                    },
                    actor: Actor::new(actor(by)),
                    only_existing,
                };
                match self.store.submit(submit).await.unwrap() {
                    Submitted::Recorded(action) => {
                        self.ids.insert(slot, action.request_id.as_uuid().unwrap());
                        self.answer("recorded", &action)
                    }
                    Submitted::Existing(action) => self.answer("existing", &action),
                    Submitted::PayloadMismatch(action) => self.answer("payload mismatch", &action),
                    Submitted::NotFound => nothing("not found"),
                }
            }
            Request::Decide {
                slot,
                decision,
                call,
                payload: sent,
                comment,
                actor: by,
                strict,
                self_approval,
            } => {
                let decide = Decide {
                    identity: identity(slot),
                    decision,
                    call_id: call_id(call),
                    payload: payload(sent),
                    comment,
                    actor: Actor::new(actor(by)),
                    require_submission: strict,
                    allow_self_approval: self_approval,
                };
                let decided = self.store.decide(decide).await.unwrap();
                if let Decided::Recorded(action) = &decided {
                    self.ids.insert(slot, action.request_id.as_uuid().unwrap());
                }
                self.decided(decided)
            }
            Request::DecideById {
                to,
                decision,
                call,
                digest: seen,
                edited,
                comment,
                actor: by,
                self_approval,
            } => {
                let (id, tenant_id) = self.target(to);
                let decide = DecideById {
                    id,
                    tenant_id,
                    decision,
                    call_id: call_id(call),
                    digest: digest(seen),
                    edited: payload(edited),
                    comment,
                    actor: Actor::new(actor(by)),
                    allow_self_approval: self_approval,
                };
                let decided = self.store.decide_by_id(decide).await.unwrap();
                self.decided(decided)
            }
            Request::Cancel {
                to,
                call,
                actor: by,
                may_cancel_all,
            } => {
                let (id, tenant_id) = self.target(to);
                let cancel = Cancel {
                    id,
                    tenant_id,
                    call_id: call_id(call),
                    actor: Actor::new(actor(by)),
                    may_cancel_all,
                };
                match self.store.cancel(cancel).await.unwrap() {
                    Cancelled::Recorded(action) => self.answer("recorded", &action),
                    Cancelled::Replayed(action) => self.answer("replayed", &action),
                    Cancelled::Duplicate(action) => self.answer("duplicate", &action),
                    Cancelled::Decided(action) => self.answer("decided", &action),
                    Cancelled::Forbidden => nothing("forbidden"),
                    Cancelled::NotFound => nothing("not found"),
                }
            }
            Request::Acquire {
                to,
                digest: seen,
                lease,
                call,
                actor: by,
            } => {
                let (id, tenant_id) = self.target(to);
                let acquire = Acquire {
                    id,
                    tenant_id,
                    digest: digest(seen),
                    lease: STEP * u32::try_from(lease).unwrap(),
                    call_id: call_id(call),
                    actor: Actor::new(actor(by)),
                };
                match self.store.acquire(acquire).await.unwrap() {
                    Acquired::Claimed(action, claim) => {
                        let is_new = !self.tokens.contains_key(&(to.slot, claim.fence));
                        prop_assert!(is_new, "a fence was given twice");
                        Answer {
                            claim: Some(self.claim(to.slot, &claim)?),
                            ..self.answer("claimed", &action)
                        }
                    }
                    Acquired::Replayed(action, claim) => Answer {
                        claim: Some(self.claim(to.slot, &claim)?),
                        ..self.answer("replayed", &action)
                    },
                    Acquired::AlreadyClaimed(action) => self.answer("already claimed", &action),
                    Acquired::NotApproved(action) => self.answer("not approved", &action),
                    Acquired::PayloadMismatch(action) => self.answer("payload mismatch", &action),
                    Acquired::DigestMissing(action) => self.answer("digest missing", &action),
                    Acquired::Lost(action) => self.answer("lost", &action),
                    Acquired::NotFound => nothing("not found"),
                }
            }
            Request::Renew { to, token, lease } => {
                let (id, tenant_id) = self.target(to);
                let renew = Renew {
                    id,
                    tenant_id,
                    token: self.token(to, token),
                    lease: STEP * u32::try_from(lease).unwrap(),
                };
                match self.store.renew(renew).await.unwrap() {
                    Renewed::Extended(claim) => Answer {
                        claim: Some(self.claim(to.slot, &claim)?),
                        ..nothing("extended")
                    },
                    Renewed::Lost(action) => self.answer("lost", &action),
                    Renewed::NotFound => nothing("not found"),
                }
            }
            Request::Finish {
                to,
                token,
                report,
                call,
                actor: by,
            } => {
                let (id, tenant_id) = self.target(to);
                let result = |text: String| JsonText::from_json(&text).unwrap();
                let finish = Finish {
                    id,
                    tenant_id,
                    token: self.token(to, token),
                    report: match report {
                        Ok(text) => Report::Completed(text.map(result)),
                        Err(reason) => Report::Failed(reason),
                    },
                    call_id: call_id(call),
                    actor: Actor::new(actor(by)),
                };
                match self.store.finish(finish).await.unwrap() {
                    Finished::Recorded(action) => self.answer("recorded", &action),
                    Finished::Replayed(action) => self.answer("replayed", &action),
                    Finished::Lost(action) => self.answer("lost", &action),
                    Finished::NotFound => nothing("not found"),
                }
            }
        })
    }

    fn decided(&self, decided: Decided) -> Answer {
        match decided {
            Decided::Recorded(action) => self.answer("recorded", &action),
            Decided::Replayed(action) => self.answer("replayed", &action),
            Decided::Duplicate(action) => self.answer("duplicate", &action),
            Decided::Conflict(action) => self.answer("conflict", &action),
            Decided::PayloadMismatch(action) => self.answer("payload mismatch", &action),
            Decided::Closed(action) => self.answer("closed", &action),
            Decided::SelfApproval(action) => self.answer("self approval", &action),
            Decided::DigestMissing(action) => self.answer("digest missing", &action),
            Decided::EditNotAllowed(action) => self.answer("edit not allowed", &action),
            Decided::NotFound => Answer {
                word: "not found",
                shown: None,
                claim: None,
            },
        }
    }

    fn equal<T: PartialEq + Debug>(
        &self,
        what: &str,
        found: &T,
        expected: &T,
    ) -> Result<(), TestCaseError> {
        prop_assert_eq!(found, expected, "{}: {}", self.name, what);
        Ok(())
    }

    /// Compares an action with its history.
    pub async fn compare(&self, reference: &Reference, slot: usize) -> Result<(), TestCaseError> {
        let tenant = tenant_id(tenant(slot));
        let found = self.store.look_up(self.id(slot), &tenant).await.unwrap();
        let shown = found.as_ref().map(|action| self.shown(action));
        self.equal("an action", &shown, &reference.shown(slot))?;
        let Some(action) = found else { return Ok(()) };
        let history = action.history.as_deref().unwrap();
        let of_it = reference.events.iter().filter(|event| event.slot == slot);
        let expected: Vec<_> = of_it
            .map(|event| (event.kind, event.actor.clone(), event.at))
            .collect();
        let found: Vec<_> = history
            .iter()
            .map(|event| {
                let event = self.happened(slot, event);
                (event.kind, event.actor, event.at)
            })
            .collect();
        self.equal("a history", &found, &expected)?;
        let kinds: Vec<_> = history.iter().map(|event| event.kind).collect();
        prop_assert!(is_a_way(&kinds), "{:?}", kinds);
        prop_assert!(
            action
                .decided_at
                .is_none_or(|at| at >= action.created_at.unwrap())
        );
        Ok(())
    }

    /// Compares everything that a store can be asked.
    pub async fn compare_all(
        &self,
        reference: &Reference,
        forgets: bool,
    ) -> Result<(), TestCaseError> {
        for slot in 0..SLOTS {
            self.compare(reference, slot).await?;
            for (of, found) in [(None, true), (Some(0), tenant(slot) == 0)] {
                let of = of.map(tenant_id);
                let action = self.store.find(self.id(slot), of.as_ref()).await.unwrap();
                let shown = action.map(|action| self.shown(&action));
                let expected = reference.shown(slot).filter(|_| found);
                self.equal("by id", &shown, &expected)?;
            }
        }
        for (call, text) in CALLS.iter().enumerate() {
            let Ok(id) = text.parse() else { continue };
            for of in [None, Some(0), Some(1)] {
                let named = reference.named(call, of, forgets);
                let action = self.store.find(id, of.map(tenant_id).as_ref()).await;
                let slot = action.unwrap().map(|action| self.slot_of(&action));
                self.equal("by call", &slot, &named)?;
            }
        }
        for of in 0..TENANTS.len() {
            self.compare_events(reference, of).await?;
            self.compare_lists(reference, of).await?;
        }
        let totals = self.store.totals().await.unwrap();
        let found = [
            totals.actions,
            totals.decisions,
            totals.events,
            totals.removed,
            self.store.newest_event().await.unwrap(),
        ];
        self.equal("totals", &found, &reference.totals())
    }

    async fn compare_events(&self, reference: &Reference, of: usize) -> Result<(), TestCaseError> {
        let mut events = Vec::new();
        let mut ids = std::collections::HashSet::new();
        let mut after = 0;
        loop {
            let page = self.store.events(&tenant_id(of), after, 7).await.unwrap();
            let Some(last) = page.last() else { break };
            prop_assert!(last.0 > after && page.len() <= 7);
            after = last.0;
            for (_, event) in page {
                prop_assert!(ids.insert(event.id.clone()), "an event id was given twice");
                let slot = self.slot_of(event.action.as_deref().unwrap());
                events.push(self.happened(slot, &event));
            }
        }
        let expected = reference.events.iter().cloned();
        let expected = expected.filter(|event| tenant(event.slot) == of).collect();
        self.equal("events", &in_one_order(events), &in_one_order(expected))
    }

    async fn compare_lists(&self, reference: &Reference, of: usize) -> Result<(), TestCaseError> {
        let statuses = [
            None,
            Some(Status::Pending),
            Some(Status::Committed),
            Some(Status::Failed),
        ];
        let decisions = [None, Some(Decision::Approve), Some(Decision::Reject)];
        let executions = [
            None,
            Some(Execution::Claimed),
            Some(Execution::Completed),
            Some(Execution::Failed),
            Some(Execution::Unknown),
        ];
        let threads = [None, Some(0), Some(1)];
        let all = statuses
            .iter()
            .flat_map(|status| decisions.map(|decision| (*status, decision)))
            .flat_map(|(status, decision)| executions.map(|ran| (status, decision, ran)))
            .flat_map(|(status, decision, ran)| threads.map(|of| (status, decision, ran, of)));
        // Each case takes some of the filters, and all cases take all.
        let some = reference.events.len() % 8;
        for (status, decision, execution, of_thread) in all.skip(some).step_by(8) {
            let shown = reference.slots().iter().filter_map(|slot| {
                let shown = reference.shown(*slot)?;
                let is_in = tenant(*slot) == of
                    && of_thread.is_none_or(|of| thread(*slot) == of)
                    && status.is_none_or(|status| shown.status == status)
                    && decision.is_none_or(|decision| shown.decision == Some(decision))
                    && execution.is_none_or(|ran| shown.execution == Some(ran));
                // A list leaves out what can be large.
                is_in.then_some(Shown {
                    payload: None,
                    edited: None,
                    comment: None,
                    result: None,
                    reason: None,
                    ..shown
                })
            });
            let mut expected: Vec<_> = shown.collect();
            if status != Some(Status::Pending) {
                expected.reverse();
            }
            let mut list = List {
                tenant_id: tenant_id(of),
                status,
                decision,
                execution,
                not_picked_up: false,
                thread_id: of_thread.map(|of| identity(of * 2).thread_id),
                after: None,
                limit: 2,
            };
            let mut found = Vec::new();
            loop {
                let page = self.store.list(list.clone()).await.unwrap();
                prop_assert!(page.actions.len() <= 2);
                found.extend(page.actions.iter().map(|action| self.shown(action)));
                list.after = page.next;
                if list.after.is_none() {
                    break;
                }
            }
            self.equal(&format!("{list:?}"), &found, &expected)?;
        }
        Ok(())
    }
}
