//! Lists, histories and events, and tenants that do not see each other's.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use uuid::Uuid;

use super::claims::{claim, renewal, report};
use super::reviews::{cancellation, review};
use super::{Stores, decision, id, identity, payload, poll_once, submission};
use crate::protocol::Decision::{Approve, Reject};
use crate::protocol::{Action, Decision, EventKind, Execution, Status, TenantId};
use crate::store::{
    Acquire, Acquired, Cancel, Cancelled, Decide, DecideById, Decided, Finish, Finished, List,
    Renew, Renewed, Report, Store, Submit,
};

fn tenant() -> TenantId {
    identity("tenant", "thread", "unused").tenant_id
}

fn everything() -> List {
    List {
        tenant_id: tenant(),
        status: None,
        decision: None,
        execution: None,
        not_picked_up: false,
        thread_id: None,
        after: None,
        limit: 3,
    }
}

/// Reads a list page by page, over all stores.
async fn pages<S: Store>(stores: &Stores<S>, mut list: List) -> Vec<Action> {
    let mut actions = Vec::new();
    for index in 0.. {
        let page = stores.at(index).list(list.clone()).await.unwrap();
        assert!(page.actions.len() <= list.limit);
        actions.extend(page.actions);
        list.after = page.next;
        if list.after.is_none() {
            break;
        }
    }
    actions
}

fn keys(actions: &[Action]) -> Vec<&str> {
    let keys = actions.iter().map(|action| &action.idempotency_key);
    keys.map(|key| key.as_ref().unwrap().as_str()).collect()
}

pub(super) async fn a_list_is_filtered_and_in_order<S: Store>(stores: &Stores<S>) {
    assert_eq!(pages(stores, everything()).await, []);
    stores.submitted("pending-1", None).await;
    let rejected = stores.decide(0, decision("rejected", Reject)).await;
    unwrap_variant!(rejected, Decided::Recorded);
    stores.approved("approved").await;
    let action = stores.approved("claimed").await;
    stores.claimed(1, claim(&action)).await;
    for (key, outcome) in [
        ("completed", Report::Completed(None)),
        ("failed", Report::Failed(None)),
    ] {
        let action = stores.approved(key).await;
        let (_, held) = stores.claimed(2, claim(&action)).await;
        let done = stores.finish(0, report(&action, &held, outcome)).await;
        unwrap_variant!(done, Finished::Recorded);
    }
    let elsewhere = Submit {
        identity: identity("tenant", "thread-2", "pending-2"),
        ..submission("unused")
    };
    stores.submit(1, elsewhere).await;
    stores.submitted("pending-3", None).await;
    let all = [
        "pending-3",
        "pending-2",
        "failed",
        "completed",
        "claimed",
        "approved",
        "rejected",
        "pending-1",
    ];
    for limit in [3, usize::MAX] {
        let list = List {
            limit,
            ..everything()
        };
        assert_eq!(keys(&pages(stores, list).await), all);
    }
    // A page does not grow with the payloads of its actions.
    let listed = pages(stores, everything()).await;
    assert!(listed.iter().any(|action| action.digest.is_some()));
    assert!(listed.iter().all(|action| action.payload.is_none()));
    let approved: Option<Decision> = Some(Approve);
    let filters: [(_, Option<Decision>, _, &[&str]); 10] = [
        (
            Some(Status::Pending),
            None,
            None,
            &["pending-1", "pending-2", "pending-3"],
        ),
        (
            Some(Status::Committed),
            None,
            None,
            &["completed", "claimed", "approved", "rejected"],
        ),
        (Some(Status::Failed), None, None, &["failed"]),
        (None, Some(Reject), None, &["rejected"]),
        (
            None,
            approved,
            None,
            &["failed", "completed", "claimed", "approved"],
        ),
        (None, None, Some(Execution::Claimed), &["claimed"]),
        (None, None, Some(Execution::Completed), &["completed"]),
        (None, approved, Some(Execution::Failed), &["failed"]),
        (None, None, Some(Execution::Unknown), &[]),
        (Some(Status::Pending), approved, None, &[]),
    ];
    let list = List {
        not_picked_up: true,
        ..everything()
    };
    assert_eq!(keys(&pages(stores, list).await), ["approved"]);
    for (status, decision, execution, expected) in filters {
        let list = List {
            status,
            decision,
            execution,
            ..everything()
        };
        let found = pages(stores, list.clone()).await;
        assert_eq!(keys(&found), expected, "{list:?}");
        let list = List {
            thread_id: Some(identity("tenant", "thread", "unused").thread_id),
            ..list
        };
        let expected = expected.iter().filter(|key| **key != "pending-2");
        let expected: Vec<_> = expected.copied().collect();
        assert_eq!(keys(&pages(stores, list).await), expected);
    }
}

pub(super) async fn tenants_are_read_in_order_once_each<S: Store>(stores: &Stores<S>) {
    let all = ["Tenant", "tenant", "tenant-2", "tenant/3", "zebra"];
    assert_eq!(stores.at(0).tenants(None, 9).await.unwrap(), []);
    for key in ["k-1", "k-2"] {
        for name in all.iter().rev() {
            let mut submit = submission(key);
            submit.identity.tenant_id = name.parse().unwrap();
            stores.at(0).submit(submit).await.unwrap();
        }
    }
    for limit in 1..=6 {
        let mut found: Vec<TenantId> = Vec::new();
        loop {
            let tenants = stores.at(limit).tenants(found.last(), limit).await.unwrap();
            assert!(tenants.len() <= limit);
            if tenants.is_empty() {
                break;
            }
            found.extend(tenants);
        }
        let names: Vec<_> = found.iter().map(TenantId::as_str).collect();
        assert_eq!(names, all);
    }
}

pub(super) async fn pages_stay_right_while_actions_come_and_go<S: Store>(stores: &Stores<S>) {
    const ACTIONS: usize = 40;
    for key in 0..ACTIONS {
        stores.submitted(&format!("k-{key}"), None).await;
    }
    let is_over = Arc::new(AtomicBool::new(false));
    let adding = tokio::spawn({
        let (store, is_over) = (stores.at(1).clone(), is_over.clone());
        async move {
            for key in 0.. {
                let key = format!("new-{key}");
                if is_over.load(Ordering::SeqCst) {
                    break;
                }
                store.submit(submission(&key)).await.unwrap();
                store.decide(decision(&key, Reject)).await.unwrap();
                tokio::task::yield_now().await;
            }
        }
    });
    for status in [None, Some(Status::Pending), None, Some(Status::Pending)] {
        let list = List {
            status,
            ..everything()
        };
        let found = pages(stores, list).await;
        let ids: HashSet<_> = found.iter().map(|action| &action.request_id).collect();
        assert_eq!(ids.len(), found.len(), "an action is on two pages");
        let mut found = keys(&found);
        found.retain(|key| !key.starts_with("new"));
        let mut expected: Vec<_> = (0..ACTIONS).map(|key| format!("k-{key}")).collect();
        if status.is_none() {
            expected.reverse();
        }
        assert_eq!(found, expected);
    }
    is_over.store(true, Ordering::SeqCst);
    adding.await.unwrap();
}

pub(super) async fn each_transition_has_one_event_in_order<S: Store>(stores: &Stores<S>) {
    use EventKind::{Approved, Cancelled, Claimed, Completed, Failed, Rejected, Submitted};
    let start = stores.at(0).newest_event().await.unwrap();
    let mut watch = stores.at(0).watch_tenant(&tenant());
    let action = stores.approved("k-1").await;
    let woken = tokio::time::timeout(super::PATIENCE, watch.changed()).await;
    woken.expect("an event wakes who waits for its tenant");
    let (_, held) = stores.claimed(0, claim(&action)).await;
    let failed = report(&action, &held, Report::Failed(None));
    unwrap_variant!(stores.finish(0, failed).await, Finished::Recorded);
    stores.approve("k-1").await;
    let (_, held) = stores.claimed(0, claim(&action)).await;
    let done = report(&action, &held, Report::Completed(None));
    unwrap_variant!(stores.finish(0, done).await, Finished::Recorded);
    let withdrawn = stores.submitted("k-2", None).await;
    let cancelled = stores.cancel(0, cancellation(&withdrawn)).await;
    unwrap_variant!(cancelled, self::Cancelled::Recorded);
    let other = Decide {
        identity: identity("tenant-2", "thread", "k"),
        ..decision("unused", Reject)
    };
    let other = unwrap_variant!(stores.decide(1, other).await, Decided::Recorded);
    // What changes nothing has no event.
    let again = stores.decide(1, decision("k-1", Approve)).await;
    unwrap_variant!(again, Decided::Duplicate);

    let mut events = Vec::new();
    let mut after = start;
    loop {
        let page = stores.at(1).events(&tenant(), after, 4).await.unwrap();
        let Some((newest, _)) = page.last() else {
            break;
        };
        assert!(page.len() <= 4 && page.is_sorted_by_key(|(position, _)| *position));
        assert!(page[0].0 > after);
        after = *newest;
        events.extend(page.into_iter().map(|(_, event)| event));
    }
    let kinds: Vec<_> = events.iter().map(|event| event.kind).collect();
    let expected = [
        Submitted, Approved, Claimed, Failed, Approved, Claimed, Completed, Submitted, Cancelled,
    ];
    assert_eq!(kinds, expected);
    let ids: HashSet<_> = events.iter().map(|event| &event.id).collect();
    assert_eq!(ids.len(), events.len());
    let states = events.iter().map(|event| {
        let action = event.action.as_ref().unwrap();
        (action.status, action.decision, action.execution)
    });
    let states: Vec<_> = states.take(4).collect();
    let mut shown = events.iter().filter_map(|event| event.action.as_ref());
    assert!(shown.all(|action| action.payload.is_none()));
    let expected = [
        (Status::Pending, None, None),
        (Status::Committed, Some(Approve), None),
        (Status::Committed, Some(Approve), Some(Execution::Claimed)),
        (Status::Failed, Some(Approve), Some(Execution::Failed)),
    ];
    assert_eq!(states, expected);
    // A history holds the same events.
    for (action, from, to) in [(&action, 0, 7), (&withdrawn, 7, 9)] {
        let found = stores.at(2).look_up(id(action), &tenant()).await.unwrap();
        let history = found.unwrap().history.unwrap();
        let shown = |event: &crate::protocol::Event| {
            (event.id.clone(), event.kind, event.at, event.actor.clone())
        };
        let expected: Vec<_> = events[from..to].iter().map(shown).collect();
        assert_eq!(history.iter().map(shown).collect::<Vec<_>>(), expected);
        assert!(history.iter().all(|event| event.action.is_none()));
    }
    let of_other = other.tenant_id.as_ref().unwrap();
    let events = stores.at(0).events(of_other, start, 100).await.unwrap();
    let kinds: Vec<_> = events.iter().map(|(_, event)| event.kind).collect();
    assert_eq!(kinds, [Rejected]);
    let newest = stores.at(2).newest_event().await.unwrap();
    assert!(newest >= after && newest >= events[0].0);
    let later = stores.at(0).events(&tenant(), newest, 100).await.unwrap();
    assert_eq!(later, []);
}

pub(super) async fn tenants_do_not_meet_in_any_operation<S: Store>(stores: &Stores<S>) {
    let action = stores.approved("k-1").await;
    let (claimed, held) = stores.claimed(0, claim(&action)).await;
    let pending = stores.submitted("k-2", payload(r#"{"n": 1}"#)).await;
    let totals = stores.totals().await;
    let stranger: TenantId = "tenant-2".parse().unwrap();
    let mut watch = stores.at(0).watch_tenant(&stranger);
    for target in [&action, &pending] {
        let tenant_id = stranger.clone();
        let decided = stores.decide_by_id(
            0,
            DecideById {
                tenant_id: tenant_id.clone(),
                ..review(target, Approve)
            },
        );
        assert_eq!(decided.await, Decided::NotFound);
        let cancelled = stores.cancel(
            1,
            Cancel {
                tenant_id: tenant_id.clone(),
                may_cancel_all: true,
                ..cancellation(target)
            },
        );
        assert_eq!(cancelled.await, Cancelled::NotFound);
        let acquired = stores.acquire(
            2,
            Acquire {
                tenant_id: tenant_id.clone(),
                ..claim(target)
            },
        );
        assert_eq!(acquired.await, Acquired::NotFound);
        let renewed = stores.renew(
            0,
            Renew {
                tenant_id: tenant_id.clone(),
                ..renewal(target, &held)
            },
        );
        assert_eq!(renewed.await, Renewed::NotFound);
        let finished = stores.finish(
            1,
            Finish {
                tenant_id: tenant_id.clone(),
                ..report(target, &held, Report::Completed(None))
            },
        );
        assert_eq!(finished.await, Finished::NotFound);
        let found = stores.at(2).look_up(id(target), &stranger).await.unwrap();
        assert_eq!(found, None);
        let found = stores.at(0).find(id(target), Some(&stranger)).await;
        assert_eq!(found.unwrap(), None);
    }
    let list = List {
        tenant_id: stranger.clone(),
        ..everything()
    };
    assert_eq!(pages(stores, list).await, []);
    let events = stores.at(1).events(&stranger, 0, 100).await.unwrap();
    assert_eq!(events, []);
    // Nor by the token of one action on another.
    let crossed = stores.renew(2, renewal(&pending, &held)).await;
    assert_eq!(unwrap_variant!(crossed, Renewed::Lost), pending);
    let unknown = Renew {
        id: Uuid::new_v4(),
        ..renewal(&action, &held)
    };
    assert_eq!(stores.renew(0, unknown).await, Renewed::NotFound);
    assert_eq!(stores.find(1, id(&action)).await, Some(claimed));
    assert_eq!(stores.totals().await, totals);
    let woken = poll_once(watch.changed()).await.is_some();
    assert!(!woken, "a tenant was woken by another's events");
}
