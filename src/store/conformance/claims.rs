//! Claims: an approval is spent once.

use std::time::{Duration, SystemTime};

use uuid::Uuid;

use super::{Stores, digest, id, payload};
use crate::protocol::Decision::{Approve, Reject};
use crate::protocol::{Action, Claim, Execution, JsonText, RequestId, Status};
use crate::store::{
    Acquire, Acquired, Actor, Decide, DecideById, Decided, Finish, Finished, Renew, Renewed,
    Report, Store, Submit, Submitted,
};

const LEASE: Duration = Duration::from_secs(300);

pub(super) fn claim(action: &Action) -> Acquire {
    Acquire {
        id: id(action),
        tenant_id: action.tenant_id.clone().unwrap(),
        digest: action.digest,
        lease: LEASE,
        call_id: Some(RequestId::mint()),
        actor: Actor::new("worker"),
    }
}

pub(super) fn renewal(action: &Action, claim: &Claim) -> Renew {
    Renew {
        id: id(action),
        tenant_id: action.tenant_id.clone().unwrap(),
        token: claim.token.clone(),
        lease: LEASE,
    }
}

pub(super) fn report(action: &Action, claim: &Claim, report: Report) -> Finish {
    Finish {
        id: id(action),
        tenant_id: action.tenant_id.clone().unwrap(),
        token: claim.token.clone(),
        report,
        call_id: Some(RequestId::mint()),
        actor: Actor::new("worker"),
    }
}

fn success() -> Report {
    Report::Completed(Some(JsonText::from_json(r#"{"sent": [1, null]}"#).unwrap()))
}

pub(super) fn failure() -> Report {
    Report::Failed(Some("the mail server refused it".to_owned()))
}

impl<S: Store> Stores<S> {
    pub(super) async fn claimed(&self, index: usize, request: Acquire) -> (Action, Claim) {
        match self.acquire(index, request).await {
            Acquired::Claimed(action, claim) => (action, claim),
            other => panic!("not claimed: {other:?}"),
        }
    }
}

pub(super) async fn an_approval_is_spent_once<S: Store>(stores: &Stores<S>) {
    let approved = stores.approved("k").await;
    let before = SystemTime::now();
    let request = claim(&approved);
    let (action, first) = stores.claimed(0, request.clone()).await;
    assert_eq!(action.status, Status::Committed);
    assert_eq!(action.execution, Some(Execution::Claimed));
    assert_eq!(action.payload, approved.payload);
    assert!(first.fence > 0);
    let until = first.expires_at.unwrap();
    // The store may be on another machine, with another clock.
    assert!(until > before && until < before + 2 * LEASE);
    match stores.acquire(1, request.clone()).await {
        Acquired::Replayed(again, claim) => {
            assert_eq!(claim, first);
            assert!(again.replayed);
        }
        other => panic!("a claim's own retry met {other:?}"),
    }
    let others = [
        claim(&approved),
        Acquire {
            call_id: None,
            ..request.clone()
        },
        Acquire {
            actor: Actor::new("another worker"),
            ..request.clone()
        },
    ];
    for (index, other) in others.into_iter().enumerate() {
        let taken = stores.acquire(index, other).await;
        assert_eq!(
            unwrap_variant!(taken, Acquired::AlreadyClaimed),
            action.clone()
        );
    }
    let done = stores.finish(1, report(&approved, &first, success())).await;
    let done = unwrap_variant!(done, Finished::Recorded);
    for request in [request, claim(&approved)] {
        let spent = stores.acquire(2, request).await;
        assert_eq!(
            unwrap_variant!(spent, Acquired::AlreadyClaimed),
            done.clone()
        );
    }
}

pub(super) async fn only_what_was_approved_is_claimed<S: Store>(stores: &Stores<S>) {
    let pending = stores.submitted("k-1", payload(r#"{"n": 1}"#)).await;
    let refused = stores.acquire(0, claim(&pending)).await;
    assert_eq!(
        unwrap_variant!(refused, Acquired::NotApproved),
        pending.clone()
    );
    let rejected = stores.decide(1, super::decision("k-1", Reject)).await;
    let rejected = unwrap_variant!(rejected, Decided::Recorded);
    let refused = stores.acquire(2, claim(&pending)).await;
    assert_eq!(unwrap_variant!(refused, Acquired::NotApproved), rejected);

    let approved = stores.approved("k-2").await;
    let blind = Acquire {
        digest: None,
        ..claim(&approved)
    };
    unwrap_variant!(stores.acquire(0, blind).await, Acquired::DigestMissing);
    let other = Acquire {
        digest: digest(r#"{"n": 2}"#),
        ..claim(&approved)
    };
    unwrap_variant!(stores.acquire(1, other).await, Acquired::PayloadMismatch);
    stores.claimed(2, claim(&approved)).await;

    // What was decided without a submission is claimed as well.
    let bare = stores.decide(0, super::decision("k-3", Approve)).await;
    let bare = unwrap_variant!(bare, Decided::Recorded);
    let other = Acquire {
        digest: digest(r#"{"n": 2}"#),
        ..claim(&bare)
    };
    unwrap_variant!(stores.acquire(1, other).await, Acquired::PayloadMismatch);
    stores.claimed(2, claim(&bare)).await;
}

pub(super) async fn the_holder_alone_renews_and_reports<S: Store>(stores: &Stores<S>) {
    let action = stores.approved("k").await;
    let (claimed, held) = stores.claimed(0, claim(&action)).await;
    let stranger = Claim::new(Uuid::new_v4().into(), held.fence);
    let lost = stores.renew(1, renewal(&action, &stranger)).await;
    assert_eq!(unwrap_variant!(lost, Renewed::Lost), claimed.clone());
    for report in [success(), failure()] {
        let lost = stores.finish(2, self::report(&action, &stranger, report));
        assert_eq!(unwrap_variant!(lost.await, Finished::Lost), claimed.clone());
    }
    let longer = Renew {
        lease: 3 * LEASE,
        ..renewal(&action, &held)
    };
    let renewed = unwrap_variant!(stores.renew(0, longer).await, Renewed::Extended);
    assert_eq!((&renewed.token, renewed.fence), (&held.token, held.fence));
    assert!(renewed.expires_at > held.expires_at);
    assert_eq!(stores.find(1, id(&action)).await, Some(claimed));

    let done = stores.finish(1, report(&action, &held, success())).await;
    let done = unwrap_variant!(done, Finished::Recorded);
    assert_eq!(done.status, Status::Committed);
    assert_eq!(done.execution, Some(Execution::Completed));
    assert_eq!(
        done.result.as_ref().unwrap().as_str(),
        r#"{"sent": [1, null]}"#
    );
    let again = stores.finish(2, report(&action, &held, success())).await;
    let again = unwrap_variant!(again, Finished::Replayed);
    assert!(again.replayed);
    let otherwise = stores.finish(0, report(&action, &held, failure())).await;
    unwrap_variant!(otherwise, Finished::Lost);
    unwrap_variant!(
        stores.renew(1, renewal(&action, &held)).await,
        Renewed::Lost
    );
    assert_eq!(stores.find(2, id(&action)).await, Some(done));
    // Submitted, approved, claimed and completed.
    assert_eq!(stores.totals().await.events, 4);
}

pub(super) async fn what_failed_is_decided_and_claimed_again<S: Store>(stores: &Stores<S>) {
    let action = stores.approved("k").await;
    let mut fence = 0;
    let mut ended: Vec<Claim> = Vec::new();
    for round in 0..3 {
        let (_, held) = stores.claimed(round, claim(&action)).await;
        assert!(held.fence > fence);
        fence = held.fence;
        for old in &ended {
            let lost = stores.finish(round, report(&action, old, success())).await;
            unwrap_variant!(lost, Finished::Lost);
            unwrap_variant!(
                stores.renew(round, renewal(&action, old)).await,
                Renewed::Lost
            );
        }
        let failed = stores
            .finish(round, report(&action, &held, failure()))
            .await;
        let failed = unwrap_variant!(failed, Finished::Recorded);
        assert_eq!(failed.status, Status::Failed);
        assert_eq!(failed.execution, Some(Execution::Failed));
        assert_eq!(failed.reason.as_deref(), Some("the mail server refused it"));
        let again = stores
            .finish(round + 1, report(&action, &held, failure()))
            .await;
        unwrap_variant!(again, Finished::Replayed);
        let unapproved = stores.acquire(round, claim(&action)).await;
        assert_eq!(unwrap_variant!(unapproved, Acquired::NotApproved), failed);
        let approved = stores
            .decide(round + 1, super::decision("k", Approve))
            .await;
        let approved = unwrap_variant!(approved, Decided::Recorded);
        assert_eq!((approved.execution, approved.reason), (None, None));
        ended.push(held);
    }
}

pub(super) async fn a_late_copy_of_an_approval_does_not_approve_again<S: Store>(
    stores: &Stores<S>,
) {
    for call in [RequestId::mint(), RequestId::new("not-a-uuid").unwrap()] {
        let key = call.as_str().to_owned();
        let first = Decide {
            call_id: Some(call),
            ..super::decision(&key, Approve)
        };
        let action = stores.decide(0, first.clone()).await;
        let action = unwrap_variant!(action, Decided::Recorded);
        for round in 0..2 {
            let (_, held) = stores.claimed(round, claim(&action)).await;
            let failed = stores
                .finish(round, report(&action, &held, failure()))
                .await;
            let failed = unwrap_variant!(failed, Finished::Recorded);
            // By now another call has approved, and what the first one asked for is long over.
            let late = stores.decide(round + 1, first.clone()).await;
            let late = unwrap_variant!(late, Decided::Replayed);
            assert_eq!(late.status, Status::Failed);
            let by_id = DecideById {
                id: id(&action),
                tenant_id: action.tenant_id.clone().unwrap(),
                decision: Approve,
                call_id: first.call_id.clone(),
                digest: None,
                edited: None,
                comment: None,
                actor: Actor::new("reviewer"),
                allow_self_approval: true,
            };
            let late = stores.decide_by_id(round, by_id).await;
            unwrap_variant!(late, Decided::Replayed);
            assert_eq!(stores.find(0, id(&action)).await, Some(failed));
            stores.approve(&key).await;
        }
    }
}

pub(super) async fn a_lease_that_ends_leaves_the_outcome_unknown<S: Store>(stores: &Stores<S>) {
    let action = stores.approved("k").await;
    let request = Acquire {
        lease: Duration::from_millis(300),
        ..claim(&action)
    };
    let mut watch = stores.at(0).watch(id(&action));
    let (_, held) = stores.claimed(0, request.clone()).await;
    let lost = stores
        .until(0, &mut watch, id(&action), |action| {
            action.execution == Some(Execution::Unknown)
        })
        .await;
    assert_eq!(lost.status, Status::Failed);
    assert_eq!(lost.decision, Some(Approve));
    for report in [success(), failure()] {
        let late = stores.finish(1, self::report(&action, &held, report)).await;
        unwrap_variant!(late, Finished::Lost);
    }
    unwrap_variant!(
        stores.renew(2, renewal(&action, &held)).await,
        Renewed::Lost
    );
    unwrap_variant!(stores.acquire(0, request).await, Acquired::NotApproved);
    let decided = stores.decide(1, super::decision("k", Approve)).await;
    unwrap_variant!(decided, Decided::Recorded);
    let (_, next) = stores.claimed(2, claim(&action)).await;
    assert!(next.fence > held.fence && next.token != held.token);
}

pub(super) async fn a_call_of_an_earlier_round_spends_nothing<S: Store>(stores: &Stores<S>) {
    let submit = Submit {
        payload: payload(r#"{"n": 1}"#),
        ..super::submission("k")
    };
    unwrap_variant!(stores.submit(0, submit).await, Submitted::Recorded);
    // The calls of each round, as the network may deliver them once more.
    let mut approvals = Vec::new();
    let mut claims = Vec::new();
    for round in 0..3 {
        let approval = super::decision("k", Approve);
        approvals.push(approval.clone());
        let approved = unwrap_variant!(stores.decide(round, approval).await, Decided::Recorded);
        for old in &claims {
            let old: Acquire = Acquire::clone(old);
            let lost = stores.acquire(round, old).await;
            assert_eq!(unwrap_variant!(lost, Acquired::Lost), approved.clone());
        }
        claims.push(claim(&approved));
        let request = claims.last().unwrap().clone();
        let (_, held) = stores.claimed(round, request).await;
        let failed = stores.finish(round, report(&approved, &held, failure()));
        let failed = unwrap_variant!(failed.await, Finished::Recorded);
        for old in &approvals {
            let again = stores.decide(round + 1, old.clone()).await;
            let again = unwrap_variant!(again, Decided::Replayed);
            assert_eq!(
                (again.status, again.execution),
                (failed.status, failed.execution)
            );
        }
        for old in &claims {
            let refused = stores.acquire(round, old.clone()).await;
            assert_eq!(
                unwrap_variant!(refused, Acquired::NotApproved),
                failed.clone()
            );
        }
    }
    // A call that asks for the opposite is another decision.
    let opposite = super::Decide {
        decision: Reject,
        ..approvals[0].clone()
    };
    unwrap_variant!(stores.decide(0, opposite).await, Decided::Recorded);
}

pub(super) async fn a_claims_own_retry_is_about_the_same_payload<S: Store>(stores: &Stores<S>) {
    let approved = stores.approved("k").await;
    let request = claim(&approved);
    stores.claimed(0, request.clone()).await;
    let blind = Acquire {
        digest: None,
        ..request.clone()
    };
    unwrap_variant!(stores.acquire(1, blind).await, Acquired::DigestMissing);
    let other = Acquire {
        digest: digest(r#"{"n": 2}"#),
        ..request.clone()
    };
    unwrap_variant!(stores.acquire(2, other).await, Acquired::PayloadMismatch);
    match stores.acquire(0, request).await {
        Acquired::Replayed(..) => {}
        other => panic!("a claim's own retry met {other:?}"),
    }
}

pub(super) async fn of_many_claimants_one_wins<S: Store>(stores: &Stores<S>) {
    const CLAIMANTS: usize = 24;
    const ACTIONS: usize = 8;
    let mut actions = Vec::new();
    for key in 0..ACTIONS {
        let submit = Submit {
            payload: payload(r#"{"n": 1}"#),
            ..super::submission(&format!("k-{key}"))
        };
        unwrap_variant!(stores.submit(key, submit).await, Submitted::Recorded);
        actions.push(stores.approve(&format!("k-{key}")).await);
    }
    for round in 0..3 {
        let mut claims = Vec::new();
        for claimant in 0..CLAIMANTS {
            for (number, action) in actions.iter().enumerate() {
                let store = stores.at(claimant + number).clone();
                let request = claim(action);
                claims.push(tokio::spawn(async move {
                    (number, store.acquire(request).await.unwrap())
                }));
            }
        }
        let mut won: [Option<Claim>; ACTIONS] = [const { None }; ACTIONS];
        for claim in claims {
            match claim.await.unwrap() {
                (number, Acquired::Claimed(_, claim)) => {
                    // Each round had its own claim, and fences begin behind 0.
                    assert!(claim.fence > round);
                    let other = won[number].replace(claim);
                    assert!(other.is_none(), "an action was claimed twice");
                }
                (_, Acquired::AlreadyClaimed(_)) => {}
                (_, other) => panic!("a claimant met {other:?}"),
            }
        }
        for (number, action) in actions.iter().enumerate() {
            let won = won[number].as_ref().expect("nobody claimed an action");
            let failed = stores.finish(number, report(action, won, failure())).await;
            unwrap_variant!(failed, Finished::Recorded);
            stores.approve(&format!("k-{number}")).await;
        }
    }
}
