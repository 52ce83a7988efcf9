//! Who takes part: agents that run actions once, executors that claim by hand, and reviewers.

use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use aegis_hitl::client::RunOutcome;
use aegis_hitl::protocol::{ClaimToken, Digest, EventKind};
use aegis_hitl::{Action, Decision, Error, Execution, Receipt, RequestId, Status};
use serde_json::json;
use tokio::time::{sleep, timeout};

use super::super::client::Aegis;
use super::history::{Conclusion, Ended, Fact};
use super::store::{History, epoch};
use crate::support::random::Random;

/// What all know of an action.
#[derive(Clone)]
pub struct Plan {
    pub key: String,
    pub payload: Option<u64>,
    /// When it expires, in the time of the simulation.
    pub expires: Option<Duration>,
    pub allow_edit: bool,
}

/// Someone with a client.
pub struct Person {
    pub name: String,
    pub aegis: Aegis,
    pub history: History,
    pub random: Random,
    pub calls: u64,
    pub sabotage: bool,
}

/// Why a part ended without a conclusion.
pub type Part<T> = Result<T, Gone>;

/// The process ended in the middle, or a call failed.
#[derive(Debug)]
pub struct Gone;

impl From<Error> for Gone {
    fn from(_: Error) -> Self {
        Self
    }
}

impl Person {
    fn call(&mut self) -> String {
        self.calls += 1;
        format!("{}-{}", self.name, self.calls)
    }

    /// Runs a part of a process that may end at any await: after some time, or when it was polled so many times.
    async fn fragile<T>(&mut self, percent: u64, part: impl Future<Output = T>) -> Part<T> {
        if !self.random.percent(percent) {
            return Ok(part.await);
        }
        let polls = match self.random.below(2) {
            0 => u64::MAX,
            _ => 1 + self.random.below(60),
        };
        let lasts = self.random.millis(1, 40_000);
        let mut part = pin!(part);
        let mut polled = 0;
        let counted = std::future::poll_fn(|cx| {
            polled += 1;
            if polled > polls {
                return Poll::Ready(Err(Gone));
            }
            part.as_mut().poll(cx).map(Ok)
        });
        timeout(lasts, counted).await.unwrap_or(Err(Gone))
    }

    /// An agent: runs an action once, ends at times, and starts again with the same key.
    pub async fn run(mut self, plan: Plan) {
        for _ in 0..1 + self.random.below(3) {
            let run = self.history.next_run();
            let history = self.history.clone();
            let step = self.random.millis(1, 4000);
            let steps = self.random.below(10);
            let fails = self.random.percent(40);
            let mut call = self.aegis.action(plan.key.as_str());
            if let Some(amount) = plan.payload {
                call = call.payload(&json!({ "amount": amount }));
            }
            if let Some(expires) = plan.expires {
                call = call.expires_at(epoch() + expires);
            }
            let call = call
                .allow_edit(plan.allow_edit)
                .lease(Duration::from_secs(1 + self.random.below(30)))
                .decide_within(self.random.millis(1000, 90_000));
            let seen = Arc::new(std::sync::Mutex::new(None));
            let (noted, twice) = (Arc::clone(&seen), self.sabotage);
            let running = call.run_once(move |approved| async move {
                let id = approved.request_id().clone();
                *noted.lock().unwrap() = Some(id.clone());
                let fence = approved.fence();
                history.add(&id, Fact::Began { run, fence });
                for _ in 0..steps {
                    sleep(step).await;
                    history.add(&id, Fact::Worked { run, fence });
                }
                if twice {
                    history.add(&id, Fact::Began { run, fence });
                }
                if fails { Err("it failed") } else { Ok(run) }
            });
            // On the heap, as it is large.
            let running: Pin<Box<_>> = Box::pin(running);
            let ended = self.fragile(40, running).await;
            if let Ok(ended) = ended {
                let (id, ended) = match ended {
                    Ok(outcome) => {
                        let (action, ended) = ended_as(outcome);
                        let id = action.map(|action| action.request_id);
                        (id.or(seen.lock().unwrap().clone()), ended)
                    }
                    Err(_) => (seen.lock().unwrap().clone(), Ended::Error),
                };
                if let Some(id) = id {
                    self.history.conclude(&id, Conclusion::Ran { run, ended });
                }
            }
            sleep(self.random.millis(0, 10_000)).await;
        }
    }

    /// An executor of its own making: submits, waits, claims, renews and reports, with its own call ids.
    pub async fn execute(mut self, plan: Plan) {
        // It keeps what it knows where its end does not reach, to come back with an old token.
        let mut token = None;
        let ended = {
            let mut random = self.random.clone();
            random.next();
            let part = std::mem::replace(&mut self.random, random);
            let mut own = Self {
                name: self.name.clone(),
                aegis: self.aegis.clone(),
                history: self.history.clone(),
                random: part,
                calls: 0,
                sabotage: false,
            };
            let part: Pin<Box<_>> = Box::pin(own.execute_once(&plan, &mut token));
            self.fragile(40, part).await
        };
        let (Err(Gone) | Ok(Err(Gone)), Some((id, token))) = (ended, token) else {
            return;
        };
        sleep(self.random.millis(0, 60_000)).await;
        self.calls = 1000;
        _ = self.report(&id, &token).await;
    }

    async fn execute_once(
        &mut self,
        plan: &Plan,
        known: &mut Option<(RequestId, ClaimToken)>,
    ) -> Part<()> {
        let mut submit = self.aegis.submit(plan.key.as_str()).call_id(self.call());
        if let Some(amount) = plan.payload {
            submit = submit.payload(&json!({ "amount": amount }));
        }
        if let Some(expires) = plan.expires {
            submit = submit.expires_at(epoch() + expires);
        }
        let action = submit.allow_edit(plan.allow_edit).await?;
        let id = action.request_id;
        self.history.conclude(&id, Conclusion::Submitted);
        if self.random.percent(10) {
            return self.cancel(&id).await;
        }
        let limit = self.random.millis(1000, 60_000);
        let decided = self.aegis.wait_for_decision(id.clone(), limit).await?;
        if decided.decision != Some(Decision::Approve) {
            return Ok(());
        }
        let look = self.aegis.look(id.clone()).await?;
        let payload = look.effective_payload();
        let digest = payload.map(Digest::of).transpose().map_err(|_| Gone)?;
        let lease = Duration::from_secs(1 + self.random.below(20));
        let claim = self.aegis.claim(id.clone()).digest(digest).lease(lease);
        let claimed = claim.call_id(self.call()).await?;
        let token = claimed.claim.token.clone();
        *known = Some((id.clone(), token.clone()));
        let fence = claimed.claim.fence;
        let name = self.history.token(token.as_str());
        let claimed = Conclusion::Claimed { token: name, fence };
        self.history.conclude(&id, claimed);
        for _ in 0..self.random.below(4) {
            sleep(self.random.millis(0, 12_000)).await;
            let renewed = self.aegis.renew(id.clone(), &token).lease(lease);
            let renewed = renewed.call_id(self.call()).await;
            let name = self.history.token(token.as_str());
            let conclusion = match renewed {
                Ok(_) => Conclusion::Renewed { token: name },
                Err(error) if error.is_claim_lost() => Conclusion::Lost { token: name },
                Err(_) => continue,
            };
            self.history.conclude(&id, conclusion);
        }
        sleep(self.random.millis(0, 12_000)).await;
        self.report(&id, &token).await
    }

    async fn report(&mut self, id: &RequestId, token: &ClaimToken) -> Part<()> {
        for _ in 0..1 + self.random.below(3) {
            let reported = if self.random.percent(60) {
                let complete = self.aegis.complete(id.clone(), token);
                complete.result("done").call_id(self.call()).await
            } else {
                let fail = self.aegis.fail(id.clone(), token);
                fail.reason("it failed").call_id(self.call()).await
            };
            let name = self.history.token(token.as_str());
            let conclusion = match reported {
                Ok(action) => Conclusion::Finished {
                    token: name,
                    execution: action.execution.unwrap(),
                },
                // Lost, or reported otherwise: either way it has ended.
                Err(error) if error.is_claim_lost() => Conclusion::Lost { token: name },
                Err(_) => {
                    sleep(self.random.millis(0, 5000)).await;
                    continue;
                }
            };
            self.history.conclude(id, conclusion);
        }
        Ok(())
    }

    async fn cancel(&mut self, id: &RequestId) -> Part<()> {
        let call = self.call();
        let cancelled = self.aegis.cancel(id.clone()).call_id(call.clone()).await;
        if cancelled.is_ok() {
            self.history.conclude(id, Conclusion::Cancelled);
        }
        self.decided(id, Decision::Reject, &call, cancelled);
        Ok(())
    }

    /// A reviewer: decides on what is pending or has failed, and at times on what is not.
    pub async fn review(mut self, plans: Vec<Plan>, rounds: u64) {
        for _ in 0..rounds {
            sleep(self.random.millis(1, 6000)).await;
            let part = if self.random.percent(5) {
                let plan = plans[self.random.below(plans.len() as u64) as usize].clone();
                self.decide_by_key(&plan).await
            } else {
                self.decide_one().await
            };
            // What failed is tried again in the next round.
            _ = part;
        }
    }

    fn decision(&mut self) -> Decision {
        if self.random.percent(80) {
            Decision::Approve
        } else {
            Decision::Reject
        }
    }

    async fn decide_one(&mut self) -> Part<()> {
        let list = self.aegis.list().limit(200);
        let list = match self.random.below(5) {
            0 => list,
            1 | 2 => list.status(Status::Failed),
            _ => list.status(Status::Pending),
        };
        let actions = list.await?.actions;
        if actions.is_empty() {
            return Ok(());
        }
        let one = self.random.below(actions.len() as u64) as usize;
        let id = actions[one].request_id.clone();
        if self.random.percent(5) {
            return self.cancel(&id).await;
        }
        let seen = self.aegis.look(id.clone()).await?;
        sleep(self.random.millis(0, 4000)).await;
        let (decision, call) = (self.decision(), self.call());
        let mut decide = self.aegis.decide_action(decision, id.clone());
        decide = decide.digest(seen.digest).call_id(call.clone());
        if decision == Decision::Approve && seen.allow_edit == Some(true) && self.random.percent(30)
        {
            let amount = self.random.below(100);
            decide = decide.edited_payload(&json!({ "amount": amount }));
        }
        let limit = self.random.millis(1, 60_000);
        // Reviewers too close their browsers.
        let decided = timeout(limit, decide.into_future()).await;
        self.decided(&id, decision, &call, decided.map_err(|_| Gone)?);
        Ok(())
    }

    async fn decide_by_key(&mut self, plan: &Plan) -> Part<()> {
        let (decision, call) = (self.decision(), self.call());
        let decide = self.aegis.execute(decision, plan.key.as_str());
        let decided = decide.call_id(call.clone()).await;
        let id = match &decided {
            Ok(receipt) => receipt.request_id().cloned(),
            Err(error) => error.recorded().map(|action| action.request_id.clone()),
        };
        self.decided(&id.ok_or(Gone)?, decision, &call, decided);
        Ok(())
    }

    fn decided(
        &self,
        id: &RequestId,
        decision: Decision,
        call: &str,
        decided: Result<Receipt, Error>,
    ) {
        let call = call.to_owned();
        let conclusion = match decided {
            Ok(receipt) => Conclusion::Receipt {
                decision,
                call,
                is_own: !receipt.is_duplicate(),
            },
            Err(error) if !error.is_outcome_unknown() => Conclusion::NotDecided { call },
            Err(_) => return,
        };
        self.history.conclude(id, conclusion);
    }
}

fn ended_as<T, E>(outcome: RunOutcome<T, E>) -> (Option<Action>, Ended) {
    let (action, ended) = match outcome {
        RunOutcome::Completed { action, .. } => (action, Ended::Reported(Execution::Completed)),
        RunOutcome::Failed { action, .. } => (action, Ended::Reported(Execution::Failed)),
        RunOutcome::Unreported { .. } => return (None, Ended::Unreported),
        RunOutcome::Interrupted { action, .. } => (action, Ended::Interrupted),
        RunOutcome::Rejected(action) => (action, Ended::Settled(EventKind::Rejected)),
        RunOutcome::Expired(action) => (action, Ended::Settled(EventKind::Expired)),
        RunOutcome::Cancelled(action) => (action, Ended::Settled(EventKind::Cancelled)),
        RunOutcome::AlreadyRun(action) => {
            let ended = Ended::AlreadyRun(action.execution);
            (action, ended)
        }
        other => panic!(
            "an outcome that is not known: {:?}",
            std::mem::discriminant(&other)
        ),
    };
    (Some(*action), ended)
}
