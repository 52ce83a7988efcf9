//! Wake-ups.

use std::time::Duration;

use super::{PATIENCE, Stores, decision, id, poll_once, submission};
use crate::protocol::Decision::Approve;
use crate::store::{Decided, Store, Submitted};

pub(super) async fn a_decision_wakes_who_waits_for_it<S: Store>(stores: &Stores<S>) {
    let pending = unwrap_variant!(stores.submit(0, submission("k")).await, Submitted::Recorded);
    let other = unwrap_variant!(
        stores.submit(0, submission("k-2")).await,
        Submitted::Recorded
    );
    // Within one store the wake-up is certain, and comes once the decision can be read.
    let store = stores.at(0).clone();
    let mut waiting = Vec::new();
    for _ in 0..8 {
        let (store, id) = (store.clone(), id(&pending));
        let mut watch = store.watch(id);
        waiting.push(tokio::spawn(async move {
            watch.changed().await;
            store.find(id, None).await.unwrap().unwrap()
        }));
    }
    // Between stores the wake-up may be lost, so the waiter polls.
    let elsewhere = stores.at(1).clone();
    let far_id = id(&pending);
    let far = tokio::spawn(async move {
        loop {
            let mut watch = elsewhere.watch(far_id);
            let action = elsewhere.find(far_id, None).await.unwrap().unwrap();
            if action.decision.is_some() {
                return action;
            }
            let poll = Duration::from_millis(100);
            drop(tokio::time::timeout(poll, watch.changed()).await);
        }
    });
    let mut unmoved = store.watch(id(&other));
    let decided = unwrap_variant!(
        stores.decide(0, decision("k", Approve)).await,
        Decided::Recorded
    );
    waiting.push(far);
    for waiting in waiting {
        let found = tokio::time::timeout(PATIENCE, waiting).await;
        let found = found.expect("a waiter was never woken").unwrap();
        assert_eq!(found, decided);
    }
    let woken = poll_once(unmoved.changed()).await.is_some();
    assert!(!woken, "a decision woke who waits for another action");
}

pub(super) async fn every_event_wakes_who_waits_for_all<S: Store>(stores: &Stores<S>) {
    let store = stores.at(0);
    let mut watch = store.watch_all();
    assert!(
        poll_once(watch.changed()).await.is_none(),
        "nothing happened"
    );
    for key in ["k-1", "k-2"] {
        unwrap_variant!(stores.submit(0, submission(key)).await, Submitted::Recorded);
        let woken = tokio::time::timeout(PATIENCE, watch.changed()).await;
        woken.expect("who waits for all events was never woken");
    }
}
