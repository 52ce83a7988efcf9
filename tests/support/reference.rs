//! What a store is to answer, written from the protocol alone: plain vectors, and time in steps.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{Hash, Hasher};

use aegis_hitl::protocol::{Closed, EventKind};
use aegis_hitl::{Decision, Execution, Status};

/// The actions that requests are about: every combination of two tenants, threads and keys.
pub const SLOTS: usize = 8;

pub fn tenant(slot: usize) -> usize {
    slot % 2
}

pub fn thread(slot: usize) -> usize {
    slot / 2 % 2
}

/// A request, with numbers in the place of payloads, calls and actors.
#[derive(Debug, Clone)]
pub enum Request {
    Submit {
        slot: usize,
        call: Option<usize>,
        payload: Option<usize>,
        title: Option<String>,
        expires: Option<i64>,
        allow_edit: bool,
        actor: usize,
        only_existing: bool,
    },
    Decide {
        slot: usize,
        decision: Decision,
        call: Option<usize>,
        payload: Option<usize>,
        comment: Option<String>,
        actor: usize,
        strict: bool,
        self_approval: bool,
    },
    DecideById {
        to: Target,
        decision: Decision,
        call: Option<usize>,
        digest: Option<usize>,
        edited: Option<usize>,
        comment: Option<String>,
        actor: usize,
        self_approval: bool,
    },
    Cancel {
        to: Target,
        call: Option<usize>,
        actor: usize,
        may_cancel_all: bool,
    },
    Acquire {
        to: Target,
        digest: Option<usize>,
        lease: i64,
        call: Option<usize>,
        actor: usize,
    },
    Renew {
        to: Target,
        token: Token,
        lease: i64,
    },
    Finish {
        to: Target,
        token: Token,
        /// The result of a success, or the reason of a failure.
        report: Result<Option<String>, Option<String>>,
        call: Option<usize>,
        actor: usize,
    },
}

/// The action that a request names by its id, maybe as another tenant.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    pub slot: usize,
    pub foreign: bool,
}

/// The token of the claim with this fence, or one of no claim.
#[derive(Debug, Clone, Copy)]
pub enum Token {
    Fence(u64),
    Unknown,
}

/// An answer, as far as it can be foretold.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    pub word: &'static str,
    pub shown: Option<Shown>,
    pub claim: Option<ShownClaim>,
}

/// The claim with this fence, until this step.
#[derive(Debug, Clone, PartialEq)]
pub struct ShownClaim {
    pub fence: u64,
    pub until: i64,
}

/// All of an action that callers see.
#[derive(Debug, Clone, PartialEq)]
pub struct Shown {
    pub slot: usize,
    pub status: Status,
    pub decision: Option<Decision>,
    pub closed: Option<Closed>,
    pub execution: Option<Execution>,
    pub digest: Option<usize>,
    pub payload: Option<usize>,
    pub edited: Option<usize>,
    pub title: Option<String>,
    pub comment: Option<String>,
    pub result: Option<String>,
    pub reason: Option<String>,
    pub allow_edit: Option<bool>,
    pub created: i64,
    pub expires: Option<i64>,
    pub decided: Option<i64>,
    pub decided_by: Option<String>,
    pub replayed: bool,
}

/// A transition.
#[derive(Debug, Clone, PartialEq)]
pub struct Happened {
    pub slot: usize,
    pub kind: EventKind,
    pub actor: String,
    pub at: i64,
    pub status: Status,
    pub decision: Option<Decision>,
    pub execution: Option<Execution>,
}

#[derive(Debug, Clone)]
struct Item {
    shown: Shown,
    submitter: Option<usize>,
    /// The call that made the decision in force.
    decided_by_call: Option<usize>,
    /// The calls that made a decision, in any round.
    decisions: Vec<(Decision, usize)>,
    claims: Vec<Claimed>,
}

#[derive(Debug, Clone)]
struct Claimed {
    until: i64,
    call: Option<usize>,
    actor: usize,
}

#[derive(Debug, Default, Clone)]
pub struct Reference {
    pub now: i64,
    items: BTreeMap<usize, Item>,
    /// Slots in the order in which they came on record.
    order: Vec<usize>,
    pub events: Vec<Happened>,
    /// What is still known of the actions that were removed.
    removed: BTreeMap<usize, Shown>,
    /// The payloads of these as they were submitted.
    submitted: BTreeMap<usize, Option<usize>>,
    /// The number of events that were removed.
    removed_events: usize,
    /// The number of sweeps. Each comes behind the submission of an action that is in no slot.
    sweeps: usize,
    /// What a call changed.
    changed: BTreeMap<usize, BTreeSet<usize>>,
    /// What a call found as it was asked to be.
    repeated: BTreeMap<usize, BTreeSet<usize>>,
    repeated_since_restart: BTreeMap<usize, BTreeSet<usize>>,
}

pub fn actor(number: usize) -> String {
    ["ada", "bob"][number].to_owned()
}

fn answer(word: &'static str, shown: Shown) -> Answer {
    Answer {
        word,
        shown: Some(shown),
        claim: None,
    }
}

fn not_found() -> Answer {
    Answer {
        word: "not found",
        shown: None,
        claim: None,
    }
}

impl Item {
    /// What is to be run.
    fn content(&self) -> Option<usize> {
        self.shown.edited.or(self.shown.payload)
    }

    fn is_live(&self) -> bool {
        self.shown.execution == Some(Execution::Claimed)
    }

    fn is_retry(&self, decision: Decision, call: Option<usize>, by: usize) -> bool {
        call.is_some()
            && call == self.decided_by_call
            && self.shown.decision == Some(decision)
            && self.shown.decided_by.as_deref() == Some(&*actor(by))
    }

    fn replayed(&self) -> Answer {
        let mut shown = self.shown.clone();
        shown.replayed = true;
        answer("replayed", shown)
    }
}

impl Reference {
    pub fn shown(&self, slot: usize) -> Option<Shown> {
        self.items.get(&slot).map(|item| item.shown.clone())
    }

    /// What is to be run, by its number.
    pub fn content(&self, slot: usize) -> Option<usize> {
        self.items.get(&slot).and_then(Item::content)
    }

    pub fn fence(&self, slot: usize) -> u64 {
        let item = self.items.get(&slot);
        item.map_or(0, |item| item.claims.len() as u64)
    }

    pub fn slots(&self) -> &[usize] {
        &self.order
    }

    /// The numbers of actions, decisions, events and removed actions, and of all events ever.
    pub fn totals(&self) -> [u64; 5] {
        let decided = |item: &&Item| item.shown.decision.is_some();
        let events = self.events.len() + self.sweeps;
        [
            self.items.len() + self.sweeps,
            self.items.values().filter(decided).count(),
            events,
            self.removed.len(),
            events + self.removed_events,
        ]
        .map(|count| count as u64)
    }

    /// Removes what is over and has no event of a time to come. Returns how many went.
    pub fn sweep(&mut self) -> usize {
        self.sweeps += 1;
        let before = self.order.len();
        for slot in std::mem::take(&mut self.order) {
            let shown = &self.items[&slot].shown;
            let is_over = shown.status == Status::Committed
                && matches!(shown.execution, None | Some(Execution::Completed));
            let of_it = |event: &&Happened| event.slot == slot;
            let last = self.events.iter().rev().find(of_it).unwrap().at;
            if !is_over || last > self.now {
                self.order.push(slot);
                continue;
            }
            let item = self.items.remove(&slot).unwrap();
            let left = Shown {
                payload: None,
                edited: None,
                title: None,
                comment: None,
                result: None,
                reason: None,
                allow_edit: None,
                expires: None,
                decided_by: None,
                digest: item.content(),
                ..item.shown.clone()
            };
            self.removed.insert(slot, left);
            self.submitted.insert(slot, item.shown.payload);
            let events = self.events.len();
            self.events.retain(|event| event.slot != slot);
            self.removed_events += events - self.events.len();
            let named = self.changed.values_mut();
            let named = named.chain(self.repeated.values_mut());
            for slots in named.chain(self.repeated_since_restart.values_mut()) {
                slots.remove(&slot);
            }
        }
        before - self.order.len()
    }

    /// Answers a request about an action that was removed.
    fn answer_removed(&self, request: &Request) -> Option<Answer> {
        let differs = |sent: &Option<usize>, known: Option<usize>| {
            sent.is_some() && known.is_some() && *sent != known
        };
        match request {
            Request::Submit { slot, payload, .. } => {
                let shown = self.removed.get(slot)?.clone();
                Some(if differs(payload, self.submitted[slot]) {
                    answer("payload mismatch", shown)
                } else {
                    answer("existing", shown)
                })
            }
            Request::Decide {
                slot,
                decision,
                payload,
                ..
            } => {
                let shown = self.removed.get(slot)?.clone();
                Some(if differs(payload, shown.digest) {
                    answer("payload mismatch", shown)
                } else if shown.decision == Some(*decision) {
                    answer("duplicate", shown)
                } else if shown.closed.is_some() {
                    answer("closed", shown)
                } else {
                    answer("conflict", shown)
                })
            }
            _ => None,
        }
    }

    pub fn restart(&mut self) {
        self.repeated_since_restart.clear();
    }

    /// Moves the clock. Returns the slots where something was due.
    pub fn step(&mut self, by: i64) -> Vec<usize> {
        self.now += by;
        let mut due = Vec::new();
        for slot in self.order.clone() {
            if self.due_at(slot).is_some_and(|end| end <= self.now) {
                self.settle(slot);
                due.push(slot);
            }
        }
        due
    }

    /// When time alone changes the action in a slot.
    pub fn due_at(&self, slot: usize) -> Option<i64> {
        let item = self.items.get(&slot)?;
        match item.shown.status {
            Status::Pending => item.shown.expires,
            _ if item.is_live() => item.claims.last().map(|claim| claim.until),
            _ => None,
        }
    }

    /// Makes the change that is due.
    pub fn settle(&mut self, slot: usize) {
        if self.items[&slot].is_live() {
            self.executed(slot, Execution::Unknown, "system:lease", None);
        } else {
            let expired = Some(Closed::Expired);
            self.decided(slot, Decision::Reject, expired, "system:expiry", None, None);
        }
    }

    /// What the answers to come depend on, but for the time.
    pub fn hash_into(&self, hasher: &mut impl Hasher) {
        let kinds: Vec<_> = self.events.iter().map(|event| event.kind).collect();
        format!("{:?} {kinds:?}", self.items).hash(hasher);
    }

    /// Sets the end of the newest claim to what an answer told.
    pub fn set_lease_end(&mut self, slot: usize, until: i64) {
        let item = self.items.get_mut(&slot);
        if let Some(claim) = item.and_then(|item| item.claims.last_mut()) {
            claim.until = until;
        }
    }

    pub fn apply(&mut self, request: &Request) -> Answer {
        if let Some(answer) = self.answer_removed(request) {
            return answer;
        }
        match request.clone() {
            Request::Submit {
                slot,
                call,
                payload,
                title,
                expires,
                allow_edit,
                actor: by,
                only_existing,
            } => {
                let Some(item) = self.items.get(&slot) else {
                    if only_existing {
                        return not_found();
                    }
                    let item = self.insert(slot, payload);
                    item.submitter = Some(by);
                    item.shown.title = title;
                    item.shown.expires = expires;
                    item.shown.allow_edit = Some(allow_edit);
                    self.happened(slot, EventKind::Submitted, &actor(by), call);
                    return answer("recorded", self.items[&slot].shown.clone());
                };
                let shown = item.shown.clone();
                if payload.is_some() && shown.payload.is_some() && payload != shown.payload {
                    return answer("payload mismatch", shown);
                }
                self.repeat(slot, call);
                answer("existing", shown)
            }
            Request::Decide {
                slot,
                decision,
                call,
                payload,
                comment,
                actor: by,
                strict,
                self_approval,
            } => {
                let Some(item) = self.items.get(&slot) else {
                    if strict {
                        return not_found();
                    }
                    self.insert(slot, payload);
                    self.decided(slot, decision, None, &actor(by), call, comment);
                    return answer("recorded", self.items[&slot].shown.clone());
                };
                if payload.is_some() && item.content().is_some() && payload != item.content() {
                    return answer("payload mismatch", item.shown.clone());
                }
                let supplied = payload.filter(|_| item.content().is_none());
                let judged = self.judge(slot, decision, call, by, self_approval);
                judged.unwrap_or_else(|| {
                    let shown = &mut self.items.get_mut(&slot).unwrap().shown;
                    shown.payload = shown.payload.or(supplied);
                    shown.digest = shown.digest.or(supplied);
                    self.decided(slot, decision, None, &actor(by), call, comment);
                    answer("recorded", self.items[&slot].shown.clone())
                })
            }
            Request::DecideById {
                to,
                decision,
                call,
                digest,
                edited,
                comment,
                actor: by,
                self_approval,
            } => {
                let Some(item) = self.target(to) else {
                    return not_found();
                };
                let asks_for_this = match edited {
                    Some(_) => edited == item.content(),
                    None => item.shown.edited.is_none() || digest == item.content(),
                };
                if item.is_retry(decision, call, by) && item.shown.closed.is_none() {
                    return match asks_for_this {
                        true => item.replayed(),
                        false => answer("payload mismatch", item.shown.clone()),
                    };
                }
                if digest != item.content() {
                    let word = match digest {
                        None => "digest missing",
                        Some(_) => "payload mismatch",
                    };
                    return answer(word, item.shown.clone());
                }
                if edited.is_some() && item.shown.allow_edit != Some(true) {
                    return answer("edit not allowed", item.shown.clone());
                }
                let asks_for_another = edited.is_some() && edited != item.content();
                let is_decided_so =
                    item.shown.status == Status::Committed && item.shown.decision == Some(decision);
                if asks_for_another && is_decided_so {
                    return answer("payload mismatch", item.shown.clone());
                }
                let shown = item.shown.clone();
                let judged = self.judge(to.slot, decision, call, by, self_approval);
                let judged = judged.map(|judged| match judged.word {
                    "replayed" if !asks_for_this => answer("payload mismatch", shown),
                    _ => judged,
                });
                judged.unwrap_or_else(|| {
                    let shown = &mut self.items.get_mut(&to.slot).unwrap().shown;
                    shown.edited = edited.or(shown.edited);
                    shown.digest = edited.or(shown.digest);
                    self.decided(to.slot, decision, None, &actor(by), call, comment);
                    answer("recorded", self.items[&to.slot].shown.clone())
                })
            }
            Request::Cancel {
                to,
                call,
                actor: by,
                may_cancel_all,
            } => {
                let Some(item) = self.target(to) else {
                    return not_found();
                };
                if item.submitter != Some(by) && !may_cancel_all {
                    return Answer {
                        word: "forbidden",
                        shown: None,
                        claim: None,
                    };
                }
                let shown = item.shown.clone();
                if shown.status == Status::Pending {
                    let cancelled = Some(Closed::Cancelled);
                    let reject = Decision::Reject;
                    self.decided(to.slot, reject, cancelled, &actor(by), call, None);
                    return answer("recorded", self.items[&to.slot].shown.clone());
                }
                if shown.closed != Some(Closed::Cancelled) {
                    return answer("decided", shown);
                }
                if item.is_retry(Decision::Reject, call, by) {
                    return item.replayed();
                }
                self.repeat(to.slot, call);
                answer("duplicate", shown)
            }
            Request::Acquire {
                to,
                digest,
                lease,
                call,
                actor: by,
            } => {
                let Some(item) = self.target(to) else {
                    return not_found();
                };
                let shown = item.shown.clone();
                let is_approved =
                    shown.status == Status::Committed && shown.decision == Some(Decision::Approve);
                if !is_approved {
                    return answer("not approved", shown);
                }
                if shown.execution.is_some() {
                    let claim = item.claims.last().unwrap();
                    let is_own = call.is_some() && claim.call == call && claim.actor == by;
                    if item.is_live() && is_own && digest == item.content() {
                        let claim = ShownClaim {
                            fence: item.claims.len() as u64,
                            until: claim.until,
                        };
                        return Answer {
                            claim: Some(claim),
                            ..item.replayed()
                        };
                    }
                    if !item.is_live() || !is_own {
                        return answer("already claimed", shown);
                    }
                }
                if digest != item.content() {
                    let word = match digest {
                        None => "digest missing",
                        Some(_) => "payload mismatch",
                    };
                    return answer(word, shown);
                }
                let has_claimed = |claim: &Claimed| call.is_some() && claim.call == call;
                if item.claims.iter().any(has_claimed) {
                    return answer("lost", shown);
                }
                let until = self.now + lease;
                let claims = &mut self.items.get_mut(&to.slot).unwrap().claims;
                claims.push(Claimed {
                    until,
                    call,
                    actor: by,
                });
                let fence = claims.len() as u64;
                self.executed(to.slot, Execution::Claimed, &actor(by), call);
                Answer {
                    claim: Some(ShownClaim { fence, until }),
                    ..answer("claimed", self.items[&to.slot].shown.clone())
                }
            }
            Request::Renew { to, token, lease } => {
                let until = self.now + lease;
                let Some(item) = self.target(to) else {
                    return not_found();
                };
                if !item.is_live() || !self.is_newest(to.slot, token) {
                    return answer("lost", item.shown.clone());
                }
                let claims = &mut self.items.get_mut(&to.slot).unwrap().claims;
                let fence = claims.len() as u64;
                claims.last_mut().unwrap().until = until;
                Answer {
                    word: "extended",
                    shown: None,
                    claim: Some(ShownClaim { fence, until }),
                }
            }
            Request::Finish {
                to,
                token,
                report,
                call,
                actor: by,
            } => {
                let Some(item) = self.target(to) else {
                    return not_found();
                };
                let execution = match report {
                    Ok(_) => Execution::Completed,
                    Err(_) => Execution::Failed,
                };
                if !self.is_newest(to.slot, token) {
                    return answer("lost", item.shown.clone());
                }
                if item.shown.execution == Some(execution) {
                    return item.replayed();
                }
                if !item.is_live() {
                    return answer("lost", item.shown.clone());
                }
                let shown = &mut self.items.get_mut(&to.slot).unwrap().shown;
                match report {
                    Ok(result) => shown.result = result,
                    Err(reason) => shown.reason = reason,
                }
                self.executed(to.slot, execution, &actor(by), call);
                answer("recorded", self.items[&to.slot].shown.clone())
            }
        }
    }

    /// Judges a decision on an action that is on record. `None` means that it is to be recorded.
    fn judge(
        &mut self,
        slot: usize,
        decision: Decision,
        call: Option<usize>,
        by: usize,
        self_approval: bool,
    ) -> Option<Answer> {
        let item = &self.items[&slot];
        let shown = item.shown.clone();
        if item.is_retry(decision, call, by) && shown.closed.is_none() {
            return Some(item.replayed());
        }
        if shown.status != Status::Committed {
            let has_decided = |call| item.decisions.contains(&(decision, call));
            if call.is_some_and(has_decided) {
                return Some(item.replayed());
            }
            let is_own = item.submitter == Some(by) && !self_approval;
            return is_own.then(|| answer("self approval", shown));
        }
        Some(if shown.decision == Some(decision) {
            self.repeat(slot, call);
            answer("duplicate", shown)
        } else if shown.closed.is_some() {
            answer("closed", shown)
        } else {
            answer("conflict", shown)
        })
    }

    fn target(&self, to: Target) -> Option<&Item> {
        self.items.get(&to.slot).filter(|_| !to.foreign)
    }

    fn is_newest(&self, slot: usize, token: Token) -> bool {
        matches!(token, Token::Fence(fence) if fence > 0 && fence == self.fence(slot))
    }

    fn insert(&mut self, slot: usize, payload: Option<usize>) -> &mut Item {
        self.order.push(slot);
        self.items.entry(slot).or_insert(Item {
            shown: Shown {
                slot,
                status: Status::Pending,
                decision: None,
                closed: None,
                execution: None,
                digest: payload,
                payload,
                edited: None,
                title: None,
                comment: None,
                result: None,
                reason: None,
                allow_edit: None,
                created: self.now,
                expires: None,
                decided: None,
                decided_by: None,
                replayed: false,
            },
            submitter: None,
            decided_by_call: None,
            decisions: Vec::new(),
            claims: Vec::new(),
        })
    }

    fn decided(
        &mut self,
        slot: usize,
        decision: Decision,
        closed: Option<Closed>,
        by: &str,
        call: Option<usize>,
        comment: Option<String>,
    ) {
        let item = self.items.get_mut(&slot).unwrap();
        item.decided_by_call = call;
        item.decisions.extend(call.map(|call| (decision, call)));
        let shown = &mut item.shown;
        shown.status = Status::Committed;
        shown.decision = Some(decision);
        shown.closed = closed;
        shown.execution = None;
        shown.decided = Some(self.now.max(shown.created));
        shown.decided_by = Some(by.to_owned());
        shown.comment = comment;
        shown.result = None;
        shown.reason = None;
        let kind = match (closed, decision) {
            (Some(Closed::Expired), _) => EventKind::Expired,
            (Some(_), _) => EventKind::Cancelled,
            (None, Decision::Approve) => EventKind::Approved,
            (None, Decision::Reject) => EventKind::Rejected,
        };
        self.happened(slot, kind, by, call);
    }

    fn executed(&mut self, slot: usize, execution: Execution, by: &str, call: Option<usize>) {
        let shown = &mut self.items.get_mut(&slot).unwrap().shown;
        shown.execution = Some(execution);
        let (status, kind) = match execution {
            Execution::Claimed => (Status::Committed, EventKind::Claimed),
            Execution::Completed => (Status::Committed, EventKind::Completed),
            Execution::Failed => (Status::Failed, EventKind::Failed),
            _ => (Status::Failed, EventKind::ClaimLost),
        };
        shown.status = status;
        self.happened(slot, kind, by, call);
    }

    fn happened(&mut self, slot: usize, kind: EventKind, by: &str, call: Option<usize>) {
        let shown = &self.items[&slot].shown;
        self.events.push(Happened {
            slot,
            kind,
            actor: by.to_owned(),
            at: self.now.max(shown.created),
            status: shown.status,
            decision: shown.decision,
            execution: shown.execution,
        });
        if let Some(call) = call {
            self.changed.entry(call).or_default().insert(slot);
        }
    }

    fn repeat(&mut self, slot: usize, call: Option<usize>) {
        if let Some(call) = call {
            self.repeated.entry(call).or_default().insert(slot);
            let since_restart = self.repeated_since_restart.entry(call).or_default();
            since_restart.insert(slot);
        }
    }

    /// The slot of the one action that a call names, within a tenant or among all.
    pub fn named(&self, call: usize, of: Option<usize>, forgets: bool) -> Option<usize> {
        let within = |named: &BTreeMap<usize, BTreeSet<usize>>| -> Vec<usize> {
            let slots = named.get(&call).into_iter().flatten().copied();
            slots
                .filter(|slot| of.is_none_or(|of| tenant(*slot) == of))
                .collect()
        };
        let mut named = within(&self.changed);
        if named.is_empty() {
            named = within(if forgets {
                &self.repeated_since_restart
            } else {
                &self.repeated
            });
        }
        match *named {
            [one] => Some(one),
            _ => None,
        }
    }
}
