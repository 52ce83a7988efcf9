//! Removing what is over: what goes, what stays, and what is answered of it.

use std::collections::HashSet;
use std::time::{Duration, SystemTime};

use uuid::Uuid;

use super::deliveries::{LEASE, failed, mark, take};
use super::{Stores, decision, id, identity, payload, submission};
use crate::protocol::Decision::{Approve, Reject};
use crate::protocol::{Action, Closed, Decision, Execution, RequestId, Status};
use crate::store::{
    Acquire, Acquired, Actor, Cancel, Cancelled, Decide, DecideById, Decided, DeliveryResult,
    Finish, Finished, List, MarkDeliveries, Report, Resume, Resumed, Store, Submission, Submit,
    Submitted, Sweep, TakeEndpoint,
};

const PAYLOAD: &str = r#"{"n": 1}"#;
const OTHER: &str = r#"{"n": 2}"#;

impl<S: Store> Stores<S> {
    /// Removes everything that has been over for a time, and returns how many went.
    async fn swept(&self, retention: Duration) -> usize {
        let mut removed = 0;
        for index in 0.. {
            let sweep = Sweep {
                retention,
                limit: 3,
            };
            let swept = self.at(index).sweep(sweep).await.expect("a sweep");
            assert!(swept.removed <= 3, "{swept:?}");
            removed += swept.removed;
            if !swept.has_more {
                break;
            }
        }
        removed
    }

    /// As [`swept`](Self::swept), after another action has come on record, which stays.
    async fn swept_behind_another(&self) -> usize {
        self.submitted(&Uuid::new_v4().to_string(), None).await;
        self.swept(Duration::ZERO).await
    }

    /// Claims an approved action, and reports on it if there is something to report.
    async fn run(&self, action: &Action, report: Option<Report>) {
        let acquire = Acquire {
            id: id(action),
            tenant_id: action.tenant_id.clone().unwrap(),
            digest: action.digest,
            lease: LEASE,
            call_id: None,
            actor: Actor::new("agent"),
        };
        let Acquired::Claimed(_, claim) = self.acquire(0, acquire).await else {
            panic!("not claimed");
        };
        if let Some(report) = report {
            let finish = Finish {
                id: id(action),
                tenant_id: action.tenant_id.clone().unwrap(),
                token: claim.token,
                report,
                call_id: None,
                actor: Actor::new("agent"),
            };
            unwrap_variant!(self.finish(1, finish).await, Finished::Recorded);
        }
    }

    async fn is_there(&self, action: &Action) -> bool {
        self.find(0, id(action)).await.is_some()
    }

    async fn newest(&self) -> u64 {
        self.at(0).newest_event().await.unwrap()
    }
}

fn reject(key: &str) -> Decide {
    decision(key, Reject)
}

/// What is known of an action that went.
fn left_of(action: &Action) -> Action {
    let mut left = Action::new(action.request_id.clone(), Status::Committed);
    left.tenant_id.clone_from(&action.tenant_id);
    left.thread_id.clone_from(&action.thread_id);
    left.idempotency_key.clone_from(&action.idempotency_key);
    left.decision = action.decision;
    left.closed = action.closed;
    left.execution = action.execution;
    left.digest = action.digest;
    left.created_at = action.created_at;
    left.decided_at = action.decided_at;
    left
}

pub(super) async fn what_is_over_goes_and_all_else_stays<S: Store>(stores: &Stores<S>) {
    let approved = stores.approved("approved").await;
    let rejected = unwrap_variant!(
        stores.decide(0, reject("rejected")).await,
        Decided::Recorded
    );
    let completed = stores.approved("completed").await;
    stores.run(&completed, Some(Report::Completed(None))).await;
    let cancelled = stores.submitted("cancelled", None).await;
    let cancel = Cancel {
        id: id(&cancelled),
        tenant_id: cancelled.tenant_id.clone().unwrap(),
        call_id: None,
        actor: Actor::new("agent"),
        may_cancel_all: false,
    };
    unwrap_variant!(stores.cancel(1, cancel).await, Cancelled::Recorded);
    let claimed = stores.approved("claimed").await;
    stores.run(&claimed, None).await;
    let failed = stores.approved("failed").await;
    stores.run(&failed, Some(Report::Failed(None))).await;
    let pending = stores.submitted("pending", None).await;
    let before = stores.totals().await;

    assert_eq!(stores.swept_behind_another().await, 4);
    for gone in [&approved, &rejected, &completed, &cancelled] {
        assert!(!stores.is_there(gone).await, "{gone:?}");
    }
    for staying in [&claimed, &failed, &pending] {
        assert!(stores.is_there(staying).await, "{staying:?}");
    }
    let totals = stores.totals().await;
    assert_eq!(totals.removed, 4);
    assert_eq!(totals.actions, before.actions + 1 - 4);
    assert_eq!(totals.decisions, before.decisions - 4);
    assert_eq!(totals.events, before.events + 1 - 2 - 1 - 4 - 2);
    let tenant = approved.tenant_id.clone().unwrap();
    let events = stores.at(0).events(&tenant, 0, 100).await.unwrap();
    assert_eq!(events.len() as u64, totals.events);
    assert!(events.iter().all(|(_, event)| event.action.is_some()));
    let removed: u64 = (stores.0.iter())
        .map(|store| store.statistics().removed)
        .max()
        .unwrap_or(0);
    assert!(removed > 0);

    // What is over later goes then.
    let retried = unwrap_variant!(
        stores.decide(0, decision("failed", Reject)).await,
        Decided::Recorded
    );
    assert_eq!(stores.swept_behind_another().await, 1);
    assert!(!stores.is_there(&retried).await);
    assert_eq!(stores.swept_behind_another().await, 0);
}

/// Decided actions in every way in which one can be, without the payload of the first.
async fn decided<S: Store>(stores: &Stores<S>) -> Vec<Action> {
    let keyed = |key: &str, decision: Decision| Decide {
        payload: payload(PAYLOAD),
        ..self::decision(key, decision)
    };
    let mut actions = Vec::new();
    for (key, decision) in [("k-1", Approve), ("k-2", Reject)] {
        let decided = stores.decide(0, keyed(key, decision)).await;
        actions.push(unwrap_variant!(decided, Decided::Recorded));
    }
    let completed = stores.approved("k-3").await;
    stores.run(&completed, Some(Report::Completed(None))).await;
    actions.push(stores.find(0, id(&completed)).await.unwrap());
    let expired = Submit {
        payload: payload(PAYLOAD),
        submission: Submission {
            // It is over soon.
            expires_at: Some(SystemTime::now() + Duration::from_millis(500)),
            title: Some("a title".to_owned()),
            ..Submission::default()
        },
        ..submission("k-4")
    };
    let pending = unwrap_variant!(stores.submit(0, expired).await, Submitted::Recorded);
    let mut watch = stores.at(0).watch(id(&pending));
    let is_over = |action: &Action| action.decision.is_some();
    actions.push(stores.until(0, &mut watch, id(&pending), is_over).await);
    assert_eq!(actions[3].closed, Some(Closed::Expired));
    actions
}

pub(super) async fn what_went_is_never_decided_again<S: Store>(stores: &Stores<S>) {
    let actions = decided(stores).await;
    assert_eq!(stores.swept_behind_another().await, actions.len());
    let totals = stores.totals().await;
    for action in &actions {
        let left = left_of(action);
        let key = action.idempotency_key.as_ref().unwrap().as_str();
        let recorded = action.decision.unwrap();
        for (sent, strict) in [
            (None, false),
            (payload(PAYLOAD), false),
            (payload(PAYLOAD), true),
        ] {
            let asks = |decision: Decision| Decide {
                payload: sent.clone(),
                require_submission: strict,
                ..self::decision(key, decision)
            };
            let same = stores.decide(0, asks(recorded)).await;
            assert_eq!(unwrap_variant!(same, Decided::Duplicate), left);
            let opposite = stores.decide(1, asks(recorded.opposite())).await;
            let opposite = match action.closed {
                Some(_) => unwrap_variant!(opposite, Decided::Closed),
                None => unwrap_variant!(opposite, Decided::Conflict),
            };
            assert_eq!(opposite, left);
            for only_existing in [false, true] {
                let submit = Submit {
                    payload: sent.clone(),
                    only_existing,
                    ..submission(key)
                };
                let submitted = stores.submit(0, submit).await;
                assert_eq!(unwrap_variant!(submitted, Submitted::Existing), left);
            }
        }
        for decision in [recorded, recorded.opposite()] {
            let decide = Decide {
                payload: payload(OTHER),
                ..self::decision(key, decision)
            };
            let decided = stores.decide(0, decide).await;
            assert_eq!(unwrap_variant!(decided, Decided::PayloadMismatch), left);
        }
        let submit = Submit {
            payload: payload(OTHER),
            ..submission(key)
        };
        let submitted = stores.submit(1, submit).await;
        assert_eq!(unwrap_variant!(submitted, Submitted::PayloadMismatch), left);
        by_id_it_is_unknown(stores, action).await;
    }
    assert_eq!(stores.totals().await, totals);
}

async fn by_id_it_is_unknown<S: Store>(stores: &Stores<S>, action: &Action) {
    let tenant_id = action.tenant_id.clone().unwrap();
    assert!(!stores.is_there(action).await);
    let found = stores.at(1).look_up(id(action), &tenant_id).await;
    assert_eq!(found.unwrap(), None);
    let decide = DecideById {
        id: id(action),
        tenant_id: tenant_id.clone(),
        decision: Approve,
        call_id: None,
        digest: action.digest,
        edited: None,
        comment: None,
        actor: Actor::new("reviewer"),
        allow_self_approval: true,
    };
    assert_eq!(stores.decide_by_id(0, decide).await, Decided::NotFound);
    let acquire = Acquire {
        id: id(action),
        tenant_id: tenant_id.clone(),
        digest: action.digest,
        lease: LEASE,
        call_id: None,
        actor: Actor::new("agent"),
    };
    assert_eq!(stores.acquire(0, acquire).await, Acquired::NotFound);
    let list = List {
        tenant_id,
        status: None,
        decision: action.decision,
        execution: None,
        not_picked_up: false,
        thread_id: None,
        after: None,
        limit: 10,
    };
    assert_eq!(stores.at(0).list(list).await.unwrap().actions, []);
}

pub(super) async fn an_edited_payload_is_told_from_the_submitted_one<S: Store>(stores: &Stores<S>) {
    let submit = Submit {
        payload: payload(PAYLOAD),
        submission: Submission {
            allow_edit: true,
            ..Submission::default()
        },
        ..submission("k-1")
    };
    let submitted = unwrap_variant!(stores.submit(0, submit).await, Submitted::Recorded);
    let decide = DecideById {
        id: id(&submitted),
        tenant_id: submitted.tenant_id.clone().unwrap(),
        decision: Approve,
        call_id: None,
        digest: submitted.digest,
        edited: payload(OTHER),
        comment: Some("a comment".to_owned()),
        actor: Actor::new("reviewer"),
        allow_self_approval: true,
    };
    let edited = unwrap_variant!(stores.decide_by_id(0, decide).await, Decided::Recorded);
    assert_eq!(stores.swept_behind_another().await, 1);
    let approve = |json: &str| Decide {
        payload: payload(json),
        ..decision("k-1", Approve)
    };
    let submit = |json: &str| Submit {
        payload: payload(json),
        ..submission("k-1")
    };
    let decided = stores.decide(0, approve(OTHER)).await;
    assert_eq!(
        unwrap_variant!(decided, Decided::Duplicate),
        left_of(&edited)
    );
    unwrap_variant!(
        stores.decide(0, approve(PAYLOAD)).await,
        Decided::PayloadMismatch
    );
    unwrap_variant!(stores.submit(0, submit(PAYLOAD)).await, Submitted::Existing);
    unwrap_variant!(
        stores.submit(0, submit(OTHER)).await,
        Submitted::PayloadMismatch
    );
}

pub(super) async fn a_key_of_two_tenants_goes_for_each_alone<S: Store>(stores: &Stores<S>) {
    let of = |tenant: &str, decision: Decision| Decide {
        identity: identity(tenant, "thread", "k-1"),
        ..self::decision("k-1", decision)
    };
    let one = stores.decide(0, of("tenant-1", Approve)).await;
    let one = unwrap_variant!(one, Decided::Recorded);
    assert_eq!(stores.swept_behind_another().await, 1);
    // The other tenant has not decided yet, and decides otherwise.
    let two = stores.decide(0, of("tenant-2", Reject)).await;
    let two = unwrap_variant!(two, Decided::Recorded);
    assert_ne!(one.request_id, two.request_id);
    assert_eq!(stores.swept_behind_another().await, 1);
    for (tenant, action) in [("tenant-1", &one), ("tenant-2", &two)] {
        let same = stores.decide(0, of(tenant, action.decision.unwrap())).await;
        assert_eq!(unwrap_variant!(same, Decided::Duplicate), left_of(action));
    }
}

pub(super) async fn nothing_goes_before_its_time<S: Store>(stores: &Stores<S>) {
    let action = stores.approved("k-1").await;
    stores.submitted("k-2", None).await;
    for retention in [Duration::from_secs(3600), Duration::MAX] {
        assert_eq!(stores.swept(retention).await, 0);
    }
    assert!(stores.is_there(&action).await);
    assert_eq!(stores.swept_behind_another().await, 1);
}

pub(super) async fn the_newest_stays_so_that_no_number_comes_twice<S: Store>(stores: &Stores<S>) {
    let older = stores.submitted("older", None).await;
    let newest = unwrap_variant!(stores.decide(0, reject("newest")).await, Decided::Recorded);
    assert_eq!(stores.swept(Duration::ZERO).await, 0, "the newest event");
    unwrap_variant!(stores.decide(0, reject("older")).await, Decided::Recorded);
    assert_eq!(stores.swept(Duration::ZERO).await, 0, "the newest of both");
    let position = stores.newest().await;
    let call = Uuid::new_v4();
    let again = Decide {
        call_id: Some(RequestId::from(call)),
        ..reject("newest")
    };
    unwrap_variant!(stores.decide(0, again).await, Decided::Duplicate);
    let next = stores.submitted("next", None).await;
    assert!(stores.newest().await > position);
    // A later sweep comes back to what had to stay.
    assert_eq!(stores.swept(Duration::ZERO).await, 2);
    assert!(!stores.is_there(&older).await && !stores.is_there(&newest).await);
    // The call named an action that went, and names no other one.
    assert_eq!(stores.find(0, call).await, None);
    assert!(stores.is_there(&next).await);
}

pub(super) async fn what_went_makes_no_call_ambiguous<S: Store>(stores: &Stores<S>) {
    let call = Uuid::new_v4();
    for key in ["k-1", "k-2"] {
        stores.submitted(key, None).await;
        // It changes nothing, and so only the server that it came to knows of it.
        let again = Submit {
            call_id: Some(RequestId::from(call)),
            ..submission(key)
        };
        unwrap_variant!(stores.submit(0, again).await, Submitted::Existing);
    }
    assert_eq!(stores.find(0, call).await, None, "it named two");
    unwrap_variant!(stores.decide(0, reject("k-1")).await, Decided::Recorded);
    assert_eq!(stores.swept_behind_another().await, 1);
    let named = stores
        .find(0, call)
        .await
        .and_then(|action| action.idempotency_key);
    assert_eq!(named.unwrap().as_str(), "k-2");
}

pub(super) async fn a_sweep_goes_in_steps<S: Store>(stores: &Stores<S>) {
    for number in 0..20 {
        let decided = stores.decide(0, reject(&format!("k-{number}"))).await;
        unwrap_variant!(decided, Decided::Recorded);
    }
    let sweep = Sweep {
        retention: Duration::ZERO,
        limit: 7,
    };
    let swept = stores.at(0).sweep(sweep).await.unwrap();
    assert!((1..=7).contains(&swept.removed), "{swept:?}");
    assert!(swept.has_more);
    assert_eq!(stores.swept(Duration::ZERO).await, 19 - swept.removed);
}

pub(super) async fn an_event_that_an_endpoint_has_not_had_keeps_its_action<S: Store>(
    stores: &Stores<S>,
) {
    let holder = Uuid::new_v4();
    stores.taken(0, take("a", holder)).await;
    let actions = [stores.approved("k-1").await, stores.approved("k-2").await];
    // The endpoint has had three of the four events.
    let events = stores.at(0).all_events(0, 10).await.unwrap();
    stores.marked(0, mark(holder, events[2].0, vec![])).await;
    assert_eq!(stores.swept_behind_another().await, 1);
    assert!(!stores.is_there(&actions[0]).await);
    assert!(stores.is_there(&actions[1]).await);
    // A second endpoint has had nothing.
    stores.taken(0, take("b", holder)).await;
    let all = stores.newest().await;
    stores.marked(0, mark(holder, all, vec![])).await;
    assert_eq!(stores.swept_behind_another().await, 0);
    let had = MarkDeliveries {
        endpoint: "b".to_owned(),
        ..mark(holder, all, vec![])
    };
    stores.marked(1, had).await;
    assert_eq!(stores.swept_behind_another().await, 1);
    assert!(!stores.is_there(&actions[1]).await);
}

pub(super) async fn a_parked_event_keeps_its_action_and_a_dead_letter_does_not<S: Store>(
    stores: &Stores<S>,
) {
    let holder = Uuid::new_v4();
    stores.taken(0, take("a", holder)).await;
    let parked = stores.approved("parked").await;
    let dead = stores.approved("dead").await;
    let had = stores.approved("had").await;
    let events = stores.at(0).all_events(0, 10).await.unwrap();
    let (first, third, all) = (events[0].0, events[2].0, events[5].0);
    let results = vec![
        (first, failed(1, LEASE)),
        (third, failed(1, Duration::ZERO)),
    ];
    stores.marked(0, mark(holder, all, results)).await;
    let give_up = MarkDeliveries {
        give_up_after: Duration::ZERO,
        ..mark(holder, all, vec![(third, failed(2, Duration::ZERO))])
    };
    assert_eq!(stores.marked(0, give_up).await, [third]);
    assert_eq!(stores.swept_behind_another().await, 2);
    assert!(stores.is_there(&parked).await);
    assert!(!stores.is_there(&dead).await && !stores.is_there(&had).await);
    assert!(stores.dead(0, "a").await.is_empty());
    let delivered = vec![(first, DeliveryResult::Delivered)];
    stores.marked(0, mark(holder, all, delivered)).await;
    assert_eq!(stores.swept_behind_another().await, 1);
    assert!(!stores.is_there(&parked).await);
    // What is said of an event that went changes nothing.
    let late = vec![(first, failed(1, LEASE)), (third, DeliveryResult::Behind)];
    stores.marked(0, mark(holder, all, late)).await;
    let (_, parked) = stores.taken(0, take("a", holder)).await;
    assert_eq!(parked, []);
}

pub(super) async fn an_endpoint_that_is_given_up_keeps_nothing<S: Store>(stores: &Stores<S>) {
    let holder = Uuid::new_v4();
    stores.taken(0, take("a", holder)).await;
    stores.approved("k-1").await;
    assert_eq!(stores.swept_behind_another().await, 0);
    let stop = MarkDeliveries {
        stop: true,
        ..mark(holder, 0, vec![])
    };
    stores.marked(0, stop).await;
    assert_eq!(stores.swept_behind_another().await, 1);
    // It has to be taken again within the retention.
    let resume = Resume {
        endpoint: "a".to_owned(),
    };
    let resumed = stores.at(0).resume(resume).await.unwrap();
    assert_eq!(resumed, Resumed::Resumed);
    stores.taken(1, take("a", holder)).await;
    stores.approved("k-2").await;
    assert_eq!(stores.swept_behind_another().await, 0);
    let release = TakeEndpoint {
        lease: Duration::ZERO,
        ..take("a", holder)
    };
    stores.taken(0, release).await;
    // For an hour, it is kept for whoever comes back.
    assert_eq!(stores.swept(Duration::from_secs(3600)).await, 0);
    assert_eq!(stores.swept_behind_another().await, 1);
}

pub(super) async fn decisions_during_sweeps_are_recorded_once<S: Store>(stores: &Stores<S>) {
    const KEYS: usize = 40;
    const ROUNDS: usize = 6;
    let mut recorded = HashSet::new();
    for _ in 0..ROUNDS {
        let decide = async {
            let mut new = Vec::new();
            for number in 0..KEYS {
                let key = format!("k-{number}");
                let decided = stores.decide(number, decision(&key, Approve)).await;
                match decided {
                    Decided::Recorded(action) => new.push((key, action)),
                    Decided::Duplicate(_) => {}
                    other => panic!("{other:?}"),
                }
            }
            new
        };
        let (new, _) = tokio::join!(decide, stores.swept(Duration::ZERO));
        for (key, action) in new {
            assert_eq!(action.execution, None::<Execution>);
            assert!(recorded.insert(key), "decided twice: {action:?}");
        }
    }
    assert_eq!(recorded.len(), KEYS);
    stores.swept_behind_another().await;
    let totals = stores.totals().await;
    assert_eq!((totals.actions, totals.removed), (1, KEYS as u64));
}
