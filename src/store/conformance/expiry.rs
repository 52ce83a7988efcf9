//! What time does. A store's clock cannot be set from here, so these cases take a second.

use std::time::{Duration, Instant, SystemTime};

use super::claims::claim;
use super::reviews::review;
use super::{Stores, decision, id, submission};
use crate::protocol::Decision::{Approve, Reject};
use crate::protocol::{Action, Closed, EventKind, Status};
use crate::store::{Acquire, Acquired, Decided, Store, Submission, Submit, Submitted, Watch};

/// A promise of 2 s, with room for a slow machine.
const SOON: Duration = Duration::from_secs(15);

fn expiring(key: &str, after: Duration) -> Submit {
    Submit {
        submission: Submission {
            title: Some("Pay a bill".to_owned()),
            expires_at: Some(SystemTime::now() + after),
            allow_edit: true,
        },
        ..submission(key)
    }
}

impl<S: Store> Stores<S> {
    /// Waits until an action is as it must become, by wake-ups and by polling.
    pub(super) async fn until(
        &self,
        index: usize,
        watch: &mut Watch,
        id: uuid::Uuid,
        is_done: impl Fn(&Action) -> bool,
    ) -> Action {
        let begun = Instant::now();
        loop {
            let action = self.find(index, id).await.expect("the action is there");
            if is_done(&action) {
                return action;
            }
            assert!(begun.elapsed() < SOON, "still as it was: {action:?}");
            let poll = Duration::from_millis(100);
            drop(tokio::time::timeout(poll, watch.changed()).await);
        }
    }
}

pub(super) async fn an_action_expires_by_itself<S: Store>(stores: &Stores<S>) {
    let request = expiring("k", Duration::from_millis(500));
    let pending = unwrap_variant!(stores.submit(0, request).await, Submitted::Recorded);
    assert_eq!(pending.status, Status::Pending);
    let tenant = pending.tenant_id.clone().unwrap();
    let mut watch = stores.at(1).watch_tenant(&tenant);
    let expired = stores
        .until(1, &mut watch, id(&pending), |action| {
            action.decision.is_some()
        })
        .await;
    assert_eq!(expired.status, Status::Committed);
    assert_eq!(expired.decision, Some(Reject));
    assert_eq!(expired.closed, Some(Closed::Expired));
    assert_eq!(expired.decided_by.as_deref(), Some("system:expiry"));
    assert!(expired.decided_at >= expired.expires_at);
    for (index, decided) in [
        stores.decide(0, decision("k", Approve)).await,
        stores.decide_by_id(1, review(&pending, Approve)).await,
    ]
    .into_iter()
    .enumerate()
    {
        let closed = unwrap_variant!(decided, Decided::Closed);
        assert_eq!(closed, expired, "{index}");
    }
    let rejected = stores.decide(2, decision("k", Reject)).await;
    unwrap_variant!(rejected, Decided::Duplicate);
    let claimed = stores.acquire(0, claim(&pending)).await;
    unwrap_variant!(claimed, Acquired::NotApproved);
    assert_eq!(stores.totals().await.events, 2);
}

pub(super) async fn what_the_first_submission_said_holds<S: Store>(stores: &Stores<S>) {
    // A store may keep less of a time than the system has, but then says so from the start.
    let request = expiring("k", Duration::new(3600, 123_456_789));
    let pending = stores.submit(0, request.clone()).await;
    let pending = unwrap_variant!(pending, Submitted::Recorded);
    assert_eq!(pending.title, request.submission.title);
    assert_eq!(pending.allow_edit, Some(true));
    assert_eq!(stores.find(1, id(&pending)).await, Some(pending.clone()));
    let other = Submit {
        submission: Submission::default(),
        ..request
    };
    let existing = stores.submit(2, other).await;
    assert_eq!(unwrap_variant!(existing, Submitted::Existing), pending);
}

pub(super) async fn a_submission_behind_its_end_is_not_recorded<S: Store>(stores: &Stores<S>) {
    let late = || Submit {
        submission: Submission {
            expires_at: Some(SystemTime::now() - Duration::from_secs(60)),
            ..Submission::default()
        },
        ..submission("k")
    };
    let refused = stores.submit(0, late()).await;
    assert!(matches!(refused, Submitted::NotFound), "{refused:?}");
    assert_eq!(stores.totals().await.actions, 0);
    // A retry may come after the end of what was submitted in time.
    let request = expiring("k", Duration::from_secs(3600));
    let pending = unwrap_variant!(stores.submit(1, request).await, Submitted::Recorded);
    let again = unwrap_variant!(stores.submit(0, late()).await, Submitted::Existing);
    assert_eq!(again, pending);
}

pub(super) async fn a_claim_shows_its_end_as_it_is_kept<S: Store>(stores: &Stores<S>) {
    let action = stores.approved("k").await;
    let request = Acquire {
        lease: Duration::new(60, 123_456_789),
        ..claim(&action)
    };
    let (_, held) = stores.claimed(0, request.clone()).await;
    match stores.acquire(1, request).await {
        Acquired::Replayed(_, again) => assert_eq!(again, held),
        other => panic!("a claim's own retry met {other:?}"),
    }
}

pub(super) async fn a_decision_and_an_expiry_race_and_one_wins<S: Store>(stores: &Stores<S>) {
    const ACTIONS: usize = 48;
    let mut racing = Vec::new();
    for key in 0..ACTIONS {
        let name = format!("k-{key}");
        // Some are decided before their end, and some after it.
        let after = Duration::from_millis(100 + 20 * key as u64);
        let submitted = stores.submit(key, expiring(&name, after)).await;
        let pending = unwrap_variant!(submitted, Submitted::Recorded);
        let store = stores.at(key + 1).clone();
        racing.push(tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis(500)).await;
            let decided = store.decide(decision(&name, Approve)).await.unwrap();
            (pending, decided)
        }));
    }
    for raced in racing {
        let (pending, decided) = raced.await.unwrap();
        let tenant = pending.tenant_id.as_ref().unwrap();
        let kind = match decided {
            Decided::Recorded(_) => EventKind::Approved,
            Decided::Closed(_) => EventKind::Expired,
            other => panic!("a decision met {other:?}"),
        };
        let found = stores.at(0).look_up(id(&pending), tenant).await.unwrap();
        let found = found.unwrap();
        let was_approved = kind == EventKind::Approved;
        assert_eq!(found.decision == Some(Approve), was_approved);
        let kinds = found.history.unwrap().into_iter().map(|event| event.kind);
        let kinds: Vec<_> = kinds.collect();
        assert_eq!(kinds, [EventKind::Submitted, kind]);
    }
    let totals = stores.totals().await;
    assert_eq!(totals.events, 2 * ACTIONS as u64);
}
