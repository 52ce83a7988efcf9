//! What happened, in order, and whether it keeps the promises.
//!
//! The check is a pure function over a list of facts, so that each promise has a test with a history that breaks it.

use std::collections::{BTreeMap, BTreeSet};

use aegis_hitl::protocol::EventKind;
use aegis_hitl::{Decision, Execution};

/// In microseconds, both of the simulation and of the store's clock.
pub type Time = u64;

/// How late what is due may come.
const LATE: Time = 2_000_000;

/// A fact about an action.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub at: Time,
    pub action: usize,
    pub fact: Fact,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fact {
    /// The store's feed has one more event.
    Event { id: String, kind: EventKind },
    /// When the action expires, as the store has it.
    Expires(Time),
    /// The store recorded the decision of a call.
    Decided { decision: Decision, call: String },
    /// The store granted a claim, granted it again to the same call, or extended it.
    Granted {
        token: String,
        fence: u64,
        until: Time,
    },
    /// The store took a report, or said that it had taken it.
    Reported { token: String, execution: Execution },
    /// A closure began. The run is one call of `run_once`, or one executor of our own.
    Began { run: usize, fence: u64 },
    /// A closure still did something outside.
    Worked { run: usize, fence: u64 },
    /// What a client concluded.
    Concluded(Conclusion),
    /// The history on record at the end.
    OnRecord(Vec<EventKind>),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Conclusion {
    Submitted,
    /// A receipt, and whether it says that this call put the decision on record.
    Receipt {
        decision: Decision,
        call: String,
        is_own: bool,
    },
    /// The decision of this call is not the one on record.
    NotDecided {
        call: String,
    },
    Cancelled,
    Claimed {
        token: String,
        fence: u64,
    },
    Renewed {
        token: String,
    },
    Finished {
        token: String,
        execution: Execution,
    },
    Lost {
        token: String,
    },
    /// What `run_once` returned.
    Ran {
        run: usize,
        ended: Ended,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// Completed or failed, and reported.
    Reported(Execution),
    Unreported,
    Interrupted,
    /// Rejected, expired or cancelled.
    Settled(EventKind),
    AlreadyRun(Option<Execution>),
    /// An error, with which nothing was run.
    Error,
}

#[derive(Default)]
struct Model {
    kinds: Vec<EventKind>,
    submitted: Time,
    expires: Option<Time>,
    /// The round that the last decision began.
    round: usize,
    /// Every decision that a call put on record, the newest last.
    decisions: Vec<(String, Decision)>,
    claims: Vec<Claim>,
    /// The runs that began, with their fences.
    began: BTreeMap<usize, u64>,
    /// The rounds whose approval was run.
    spent: BTreeSet<usize>,
}

struct Claim {
    token: String,
    fence: u64,
    until: Time,
    round: usize,
    end: Option<EventKind>,
}

fn kind_of(execution: Execution) -> EventKind {
    match execution {
        Execution::Completed => EventKind::Completed,
        Execution::Failed => EventKind::Failed,
        Execution::Claimed => EventKind::Claimed,
        _ => EventKind::ClaimLost,
    }
}

impl Model {
    /// Whether an event may follow what is on record.
    fn allows(&self, kind: EventKind) -> bool {
        use EventKind::*;
        matches!(
            (self.kinds.last(), kind),
            (None, Submitted | Approved | Rejected)
                | (Some(Submitted), Approved | Rejected | Expired | Cancelled)
                | (Some(Failed | ClaimLost), Approved | Rejected)
                | (Some(Approved), Claimed)
                | (Some(Claimed), Completed | Failed | ClaimLost)
        )
    }

    fn claim(&self, token: &str) -> Option<&Claim> {
        self.claims.iter().find(|claim| claim.token == token)
    }

    fn fenced(&self, fence: u64) -> Option<&Claim> {
        self.claims.iter().find(|claim| claim.fence == fence)
    }

    /// Whether a decision, as an answer may tell it, has been on record.
    fn has(&self, decision: Decision) -> bool {
        use EventKind::*;
        self.kinds.iter().any(|kind| match decision {
            Decision::Approve => *kind == Approved,
            Decision::Reject => matches!(kind, Rejected | Expired | Cancelled),
        })
    }

    /// What has not happened in time.
    fn overdue(&self, at: Time) -> Option<&'static str> {
        let is_over = |end: Time| end + LATE < at;
        match self.kinds.last() {
            // A submission may arrive when its action's time is over.
            Some(EventKind::Submitted)
                if self
                    .expires
                    .is_some_and(|end| is_over(end.max(self.submitted))) =>
            {
                Some("has not expired in time")
            }
            Some(EventKind::Claimed) => {
                let newest = self.claims.last().filter(|claim| claim.end.is_none());
                newest
                    .is_some_and(|claim| is_over(claim.until))
                    .then_some("is claimed after its lease ended")
            }
            _ => None,
        }
    }

    fn apply(&mut self, at: Time, fact: &Fact) -> Result<(), String> {
        match fact {
            Fact::Event { kind, .. } => return self.event(at, *kind),
            Fact::Expires(end) => self.expires = Some(*end),
            Fact::Decided { decision, call } => {
                let is_known = self.decisions.iter().any(|(known, _)| known == call);
                self.decisions.push((call.clone(), *decision));
                if is_known {
                    return Err(format!("was decided twice by {call}"));
                }
            }
            Fact::Granted {
                token,
                fence,
                until,
            } => return self.granted(at, token, *fence, *until),
            Fact::Reported { token, execution } => {
                let claim = self.claim(token).ok_or("took a report without a claim")?;
                if claim.end != Some(kind_of(*execution)) {
                    return Err(format!(
                        "took a report of {execution} that is not on record"
                    ));
                }
            }
            Fact::Began { run, fence } => {
                let claim = self.fenced(*fence).ok_or("was run without a claim")?;
                let (round, until) = (claim.round, claim.until);
                self.began.insert(*run, *fence);
                if !self.spent.insert(round) {
                    return Err(format!("was run twice in round {round}"));
                }
                if at > until {
                    return Err("was begun after its lease ended".to_owned());
                }
            }
            Fact::Worked { fence, .. } => {
                let claim = self.fenced(*fence).ok_or("was run without a claim")?;
                if at > claim.until {
                    return Err("was still run after its lease ended".to_owned());
                }
            }
            Fact::Concluded(conclusion) => {
                if !self.agrees(conclusion) {
                    return Err(format!("does not agree with {conclusion:?}"));
                }
            }
            Fact::OnRecord(kinds) => {
                if *kinds != self.kinds {
                    return Err(format!("has {kinds:?} on record and had {:?}", self.kinds));
                }
            }
        }
        Ok(())
    }

    fn event(&mut self, at: Time, kind: EventKind) -> Result<(), String> {
        let is_legal = self.allows(kind);
        let last = self.kinds.last().copied();
        self.kinds.push(kind);
        match kind {
            EventKind::Submitted => self.submitted = at,
            EventKind::Approved | EventKind::Rejected => self.round += 1,
            EventKind::Completed | EventKind::Failed | EventKind::ClaimLost => {
                let Some(claim) = self.claims.last_mut() else {
                    return Err(format!("has {kind} without a claim"));
                };
                claim.end = Some(kind);
                let until = claim.until;
                match kind {
                    EventKind::ClaimLost if at < until => {
                        return Err("lost its claim before the lease ended".to_owned());
                    }
                    EventKind::ClaimLost => {}
                    _ if at >= until => {
                        return Err(format!("took {kind} after the lease ended"));
                    }
                    _ => {}
                }
            }
            EventKind::Expired if self.expires.is_none_or(|end| at < end) => {
                return Err("expired before its time".to_owned());
            }
            _ => {}
        }
        if !is_legal {
            return Err(format!("has {kind} after {last:?}"));
        }
        Ok(())
    }

    fn granted(&mut self, at: Time, token: &str, fence: u64, until: Time) -> Result<(), String> {
        let round = self.round;
        let is_claimed = self.kinds.last() == Some(&EventKind::Claimed);
        let newest = self.claims.last().map(|claim| claim.fence);
        let Some(claim) = self.claims.iter_mut().find(|claim| claim.token == token) else {
            self.claims.push(Claim {
                token: token.to_owned(),
                fence,
                until,
                round,
                end: None,
            });
            if newest.is_some_and(|newest| newest >= fence) {
                return Err(format!("has fence {fence} after {newest:?}"));
            }
            if !is_claimed {
                return Err("granted a claim that is not on record".to_owned());
            }
            let in_round = self.claims.iter().filter(|claim| claim.round == round);
            if in_round.count() > 1 {
                return Err(format!("was claimed twice in round {round}"));
            }
            return Ok(());
        };
        let was_live = claim.end.is_none() && at < claim.until;
        claim.until = until;
        if claim.fence != fence {
            return Err("has a claim with another fence".to_owned());
        }
        if !was_live {
            return Err("took a token after its lease ended".to_owned());
        }
        Ok(())
    }

    fn agrees(&self, conclusion: &Conclusion) -> bool {
        match conclusion {
            Conclusion::Submitted => !self.kinds.is_empty(),
            Conclusion::Receipt {
                decision,
                call,
                is_own,
            } => {
                let own = (call.clone(), *decision);
                self.has(*decision) && (!is_own || self.decisions.contains(&own))
            }
            Conclusion::NotDecided { call } => self
                .decisions
                .last()
                .is_none_or(|(newest, _)| newest != call),
            Conclusion::Cancelled => self.kinds.contains(&EventKind::Cancelled),
            Conclusion::Claimed { token, fence } => {
                self.claim(token).is_some_and(|claim| claim.fence == *fence)
            }
            Conclusion::Renewed { token } => self.claim(token).is_some(),
            Conclusion::Finished { token, execution } => self
                .claim(token)
                .is_some_and(|claim| claim.end == Some(kind_of(*execution))),
            Conclusion::Lost { token } => self.claim(token).is_none_or(|claim| claim.end.is_some()),
            Conclusion::Ran { run, ended } => self.agrees_with_run(*run, *ended),
        }
    }

    fn agrees_with_run(&self, run: usize, ended: Ended) -> bool {
        let fence = self.began.get(&run);
        let claim = fence.and_then(|fence| self.fenced(*fence));
        match ended {
            Ended::Reported(execution) => {
                claim.is_some_and(|claim| claim.end == Some(kind_of(execution)))
            }
            Ended::Unreported => claim.is_some(),
            Ended::Interrupted => claim.is_some_and(|claim| {
                !matches!(claim.end, Some(EventKind::Completed | EventKind::Failed))
            }),
            Ended::Settled(kind) => claim.is_none() && self.kinds.contains(&kind),
            Ended::AlreadyRun(execution) => {
                let kind = execution.map_or(EventKind::Claimed, kind_of);
                claim.is_none() && self.kinds.contains(&kind)
            }
            Ended::Error => claim.is_none(),
        }
    }
}

/// Returns what breaks a promise.
pub fn check(history: &[Entry]) -> Vec<String> {
    let mut models: BTreeMap<usize, Model> = BTreeMap::new();
    let mut events = BTreeSet::new();
    let mut wrong = Vec::new();
    for Entry { at, action, fact } in history {
        let mut add = |action: usize, what: &str| {
            let line = format!("action {action} {what}, at {} ms", at / 1000);
            // What is overdue stays overdue.
            let is_known = |known: &String| known.starts_with(&format!("action {action} {what},"));
            if !wrong.iter().any(is_known) {
                wrong.push(line);
            }
        };
        if let Fact::Event { id, .. } = fact
            && !events.insert(id)
        {
            add(*action, "has an event twice");
        }
        if let Err(what) = models.entry(*action).or_default().apply(*at, fact) {
            add(*action, &what);
        }
        for (action, model) in &models {
            if let Some(what) = model.overdue(*at) {
                add(*action, what);
            }
        }
    }
    wrong
}

#[cfg(test)]
mod tests {
    use super::*;
    use EventKind::*;

    const SECOND: Time = 1_000_000;

    /// A history of one action, a fact a second.
    fn history(facts: impl IntoIterator<Item = Fact>) -> Vec<Entry> {
        let at = (0..).map(|number| number * SECOND);
        let entries = at.zip(facts);
        entries
            .map(|(at, fact)| Entry {
                at,
                action: 0,
                fact,
            })
            .collect()
    }

    fn event(kind: EventKind) -> Fact {
        use std::sync::atomic::{AtomicU64, Ordering};
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let id = NEXT.fetch_add(1, Ordering::Relaxed).to_string();
        Fact::Event { id, kind }
    }

    fn granted(token: &str, fence: u64, until: Time) -> Fact {
        Fact::Granted {
            token: token.to_owned(),
            fence,
            until: until * SECOND,
        }
    }

    fn reported(token: &str, execution: Execution) -> Fact {
        Fact::Reported {
            token: token.to_owned(),
            execution,
        }
    }

    fn began(run: usize, fence: u64) -> Fact {
        Fact::Began { run, fence }
    }

    /// An action that is claimed for a minute.
    fn claimed() -> Vec<Fact> {
        vec![
            event(Submitted),
            event(Approved),
            event(Claimed),
            granted("a", 1, 60),
        ]
    }

    fn after_claim(more: impl IntoIterator<Item = Fact>) -> Vec<String> {
        check(&history(claimed().into_iter().chain(more)))
    }

    #[track_caller]
    fn finds(found: &[String], what: &str) {
        assert!(found.iter().any(|found| found.contains(what)), "{found:?}");
    }

    fn concluded(conclusion: Conclusion) -> Fact {
        Fact::Concluded(conclusion)
    }

    fn ran(run: usize, ended: Ended) -> Fact {
        concluded(Conclusion::Ran { run, ended })
    }

    #[test]
    fn a_history_that_keeps_every_promise_is_accepted() {
        let token = "b".to_owned();
        let execution = Execution::Completed;
        let found = after_claim([
            began(1, 1),
            event(Failed),
            reported("a", Execution::Failed),
            ran(1, Ended::Reported(Execution::Failed)),
            event(Approved),
            event(Claimed),
            granted("b", 2, 60),
            granted("b", 2, 90),
            began(2, 2),
            event(Completed),
            reported("b", execution),
            concluded(Conclusion::Finished { token, execution }),
            ran(2, Ended::Reported(execution)),
            Fact::OnRecord(vec![
                Submitted, Approved, Claimed, Failed, Approved, Claimed, Completed,
            ]),
        ]);
        assert_eq!(found, Vec::<String>::new());
    }

    #[test]
    fn a_second_decision_in_a_round_is_found() {
        for second in [Approved, Rejected, Expired, Cancelled] {
            for first in [Approved, Rejected] {
                let facts = [
                    Fact::Expires(0),
                    event(Submitted),
                    event(first),
                    event(second),
                ];
                finds(&check(&history(facts)), "after Some");
            }
        }
        for end in [Completed, Claimed] {
            let facts = [
                event(Submitted),
                event(Approved),
                event(end),
                event(Approved),
            ];
            finds(&check(&history(facts)), "has approved after");
        }
    }

    #[test]
    fn a_call_that_decides_two_rounds_is_found() {
        let decided = || Fact::Decided {
            decision: Decision::Approve,
            call: "call".to_owned(),
        };
        let found = after_claim([decided(), event(Failed), event(Approved), decided()]);
        finds(&found, "was decided twice by call");
    }

    #[test]
    fn a_closure_that_runs_twice_in_a_round_is_found() {
        finds(&after_claim([began(1, 1), began(2, 1)]), "was run twice");
        finds(&after_claim([granted("b", 2, 60)]), "was claimed twice");
        finds(&after_claim([began(1, 2)]), "was run without a claim");
    }

    #[test]
    fn a_fence_that_does_not_grow_is_found() {
        for fence in [0, 1] {
            let found = after_claim([
                event(Failed),
                event(Approved),
                event(Claimed),
                granted("b", fence, 60),
            ]);
            finds(&found, "has fence");
        }
    }

    #[test]
    fn a_token_that_is_accepted_after_its_lease_is_found() {
        let late = |fact| {
            let mut history = history(claimed());
            history.push(Entry {
                at: 60 * SECOND,
                action: 0,
                fact,
            });
            check(&history)
        };
        finds(&late(granted("a", 1, 90)), "took a token after");
        finds(&late(event(Completed)), "took completed after the lease");
        finds(&late(reported("a", Execution::Completed)), "not on record");
        let lost = after_claim([event(Failed), granted("a", 1, 90)]);
        finds(&lost, "took a token after");
    }

    #[test]
    fn a_closure_that_outlives_its_lease_is_found() {
        let mut history = history(claimed().into_iter().chain([began(1, 1)]));
        history.push(Entry {
            at: 61 * SECOND,
            action: 0,
            fact: Fact::Worked { run: 1, fence: 1 },
        });
        finds(&check(&history), "was still run after");
    }

    #[test]
    fn what_comes_too_late_or_too_early_is_found() {
        let overdue = |facts: Vec<Fact>| {
            let mut history = history(facts);
            // Another action's fact shows the time.
            history.push(Entry {
                at: 63 * SECOND,
                action: 1,
                fact: event(Submitted),
            });
            check(&history)
        };
        finds(&overdue(claimed()), "is claimed after its lease ended");
        let facts = vec![event(Submitted), Fact::Expires(60 * SECOND)];
        finds(&overdue(facts), "has not expired in time");
        finds(&after_claim([event(ClaimLost)]), "before the lease ended");
        let early = [event(Submitted), Fact::Expires(60 * SECOND), event(Expired)];
        finds(&check(&history(early)), "expired before its time");
    }

    #[test]
    fn a_wrong_conclusion_is_found() {
        let token = || "a".to_owned();
        let call = || "call".to_owned();
        let lost = || {
            let mut history = history(claimed().into_iter().chain([began(1, 1)]));
            history.push(Entry {
                at: 60 * SECOND,
                action: 0,
                fact: event(ClaimLost),
            });
            history
        };
        let wrong = [
            Conclusion::Receipt {
                decision: Decision::Reject,
                call: call(),
                is_own: false,
            },
            Conclusion::Receipt {
                decision: Decision::Approve,
                call: call(),
                is_own: true,
            },
            Conclusion::Cancelled,
            Conclusion::Claimed {
                token: token(),
                fence: 2,
            },
            Conclusion::Renewed {
                token: "b".to_owned(),
            },
            Conclusion::Finished {
                token: token(),
                execution: Execution::Completed,
            },
            Conclusion::Ran {
                run: 1,
                ended: Ended::Reported(Execution::Completed),
            },
            Conclusion::Ran {
                run: 1,
                ended: Ended::Error,
            },
            Conclusion::Ran {
                run: 1,
                ended: Ended::AlreadyRun(Some(Execution::Unknown)),
            },
            Conclusion::Ran {
                run: 2,
                ended: Ended::AlreadyRun(Some(Execution::Completed)),
            },
            Conclusion::Ran {
                run: 2,
                ended: Ended::Settled(Rejected),
            },
        ];
        for conclusion in wrong {
            let mut history = lost();
            history.push(Entry {
                at: 60 * SECOND,
                action: 0,
                fact: concluded(conclusion.clone()),
            });
            finds(&check(&history), &format!("{conclusion:?}"));
        }
        let completed = |conclusion| {
            let ends = [began(1, 1), event(Completed), concluded(conclusion)];
            after_claim(ends)
        };
        let interrupted = Conclusion::Ran {
            run: 1,
            ended: Ended::Interrupted,
        };
        finds(&completed(interrupted), "does not agree");
        let is_lost = concluded(Conclusion::Lost { token: token() });
        finds(&after_claim([is_lost]), "does not agree");
        let decided = Fact::Decided {
            decision: Decision::Approve,
            call: call(),
        };
        let denied = concluded(Conclusion::NotDecided { call: call() });
        finds(&after_claim([decided, denied]), "does not agree");
        let nothing = [concluded(Conclusion::Submitted)];
        finds(&check(&history(nothing)), "does not agree");
    }

    #[test]
    fn an_event_that_is_missing_or_there_twice_is_found() {
        let missing = Fact::OnRecord(vec![Submitted, Approved]);
        finds(&after_claim([missing]), "on record and had");
        let twice = Fact::Event {
            id: "twice".to_owned(),
            kind: Submitted,
        };
        finds(&check(&history([twice.clone(), twice])), "an event twice");
    }
}
