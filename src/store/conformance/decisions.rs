//! Decisions by key.

use super::{Stores, decision, id, identity, payload, poll_once, submission};
use crate::protocol::Action;
use crate::protocol::Decision::{Approve, Reject};
use crate::protocol::{RequestId, Status};
use crate::store::{Decide, Decided, Store, Submitted, Totals};
use uuid::Uuid;

pub(super) async fn a_first_decision_is_recorded_and_found<S: Store>(stores: &Stores<S>) {
    let mut request = decision("k", Approve);
    request.payload = payload(r#"{"to": "a@b.c"}"#);
    request.comment = Some("fine by me \u{1f44d}".to_owned());
    let action = unwrap_variant!(stores.decide(0, request.clone()).await, Decided::Recorded);
    assert_eq!(action.status, Status::Committed);
    assert_eq!(action.decision, Some(Approve));
    assert_eq!(action.execution, None);
    assert_eq!(action.tenant_id, Some(request.identity.tenant_id));
    assert_eq!(action.thread_id, Some(request.identity.thread_id));
    assert_eq!(
        action.idempotency_key,
        Some(request.identity.idempotency_key)
    );
    assert_eq!(action.comment, request.comment);
    assert_eq!(
        action.payload.as_ref().unwrap().as_str(),
        r#"{"to": "a@b.c"}"#
    );
    assert!(!action.replayed);
    assert!(action.created_at.unwrap() <= action.decided_at.unwrap());
    assert_eq!(stores.find(1, id(&action)).await, Some(action));
    assert_eq!(stores.find(1, Uuid::new_v4()).await, None);
    let totals = stores.totals().await;
    assert_eq!((totals.actions, totals.decisions, totals.events), (1, 1, 1));
}

pub(super) async fn the_same_call_is_replayed_and_another_is_a_duplicate<S: Store>(
    stores: &Stores<S>,
) {
    for (key, decided) in [("k-1", Approve), ("k-2", Reject)] {
        let request = decision(key, decided);
        let recorded = unwrap_variant!(stores.decide(0, request.clone()).await, Decided::Recorded);
        let replayed = unwrap_variant!(stores.decide(1, request.clone()).await, Decided::Replayed);
        assert!(replayed.replayed);
        assert_eq!(
            Action {
                replayed: false,
                ..replayed
            },
            recorded
        );
        for call_id in [None, Some(RequestId::mint())] {
            let request = Decide {
                call_id,
                ..request.clone()
            };
            let duplicate = unwrap_variant!(stores.decide(2, request).await, Decided::Duplicate);
            assert_eq!(duplicate, recorded);
        }
    }
    let unnamed = Decide {
        call_id: None,
        ..decision("k-3", Approve)
    };
    unwrap_variant!(stores.decide(0, unnamed.clone()).await, Decided::Recorded);
    // Two calls without an id are not known to be the same call.
    unwrap_variant!(stores.decide(1, unnamed).await, Decided::Duplicate);
    assert_eq!(stores.totals().await.events, 3);
}

pub(super) async fn the_opposite_decision_is_a_conflict<S: Store>(stores: &Stores<S>) {
    let request = decision("k", Approve);
    let recorded = unwrap_variant!(stores.decide(0, request.clone()).await, Decided::Recorded);
    for call_id in [request.call_id, Some(RequestId::mint()), None] {
        let opposite = Decide {
            call_id,
            comment: Some("no".to_owned()),
            ..decision("k", Reject)
        };
        let conflict = unwrap_variant!(stores.decide(1, opposite).await, Decided::Conflict);
        assert_eq!(conflict, recorded);
    }
    assert_eq!(stores.find(2, id(&recorded)).await, Some(recorded));
    assert_eq!(stores.totals().await.events, 1);
}

pub(super) async fn only_what_was_submitted_is_decided_where_that_is_required<S: Store>(
    stores: &Stores<S>,
) {
    let strict = Decide {
        require_submission: true,
        allow_self_approval: true,
        ..decision("k", Approve)
    };
    assert_eq!(stores.decide(0, strict.clone()).await, Decided::NotFound);
    assert_eq!(stores.totals().await, Totals::default());
    unwrap_variant!(stores.submit(1, submission("k")).await, Submitted::Recorded);
    unwrap_variant!(stores.decide(2, strict.clone()).await, Decided::Recorded);
    unwrap_variant!(stores.decide(0, strict).await, Decided::Replayed);
}

pub(super) async fn another_payload_is_a_mismatch<S: Store>(stores: &Stores<S>) {
    let mut request = decision("k", Approve);
    request.payload = payload(r#"{"amount": 1}"#);
    let recorded = unwrap_variant!(stores.decide(0, request.clone()).await, Decided::Recorded);
    for (asked, call_id) in [
        (Approve, request.call_id.clone()),
        (Approve, None),
        (Reject, None),
    ] {
        let other = Decide {
            payload: payload(r#"{"amount": 2}"#),
            call_id,
            ..decision("k", asked)
        };
        let mismatch = unwrap_variant!(stores.decide(1, other).await, Decided::PayloadMismatch);
        assert_eq!(mismatch, recorded);
    }
    // A pending action has a payload too.
    let mut pending = submission("k-2");
    pending.payload = payload(r#"{"amount": 1}"#);
    unwrap_variant!(stores.submit(0, pending).await, Submitted::Recorded);
    let other = Decide {
        payload: payload(r#"{"amount": 2}"#),
        ..decision("k-2", Approve)
    };
    unwrap_variant!(stores.decide(1, other).await, Decided::PayloadMismatch);
    assert_eq!(stores.totals().await.decisions, 1);
}

pub(super) async fn a_payload_is_kept_as_it_was_sent<S: Store>(stores: &Stores<S>) {
    // Members in the sender's order, digits that no double holds, escapes, and more than a page of
    // text.
    let text = format!(
        r#"{{"z": 12345678901234567890, "a": "\u00e9 ä", "long": "{}"}}"#,
        "x".repeat(20_000)
    );
    let mut request = decision("k-1", Approve);
    request.payload = payload(&text);
    let recorded = unwrap_variant!(stores.decide(0, request.clone()).await, Decided::Recorded);
    let found = stores.find(1, id(&recorded)).await.unwrap();
    assert_eq!(found.payload.unwrap().as_str(), text);
    // A missing payload matches any payload.
    request.payload = None;
    unwrap_variant!(stores.decide(2, request).await, Decided::Replayed);

    // A decision supplies the payload that the submission left out. That payload then holds.
    unwrap_variant!(
        stores.submit(0, submission("k-2")).await,
        Submitted::Recorded
    );
    let mut request = decision("k-2", Approve);
    request.payload = payload(r#"{"n": 1}"#);
    let recorded = unwrap_variant!(stores.decide(1, request).await, Decided::Recorded);
    assert_eq!(recorded.payload.unwrap().as_str(), r#"{"n": 1}"#);
    let mut request = decision("k-2", Approve);
    request.payload = payload(r#"{"n": 2}"#);
    unwrap_variant!(stores.decide(2, request).await, Decided::PayloadMismatch);
}

pub(super) async fn tenants_threads_and_keys_do_not_meet<S: Store>(stores: &Stores<S>) {
    let call_id = Some(RequestId::mint());
    let longest = "~".repeat(255);
    let identities = [
        identity("a", "b", "c"),
        identity("a", "b", "C"),
        identity("a", "bc", "c"),
        identity("ab", "b", "c"),
        identity("ab", "c", "c"),
        identity("b", "a", "c"),
        identity("c", "b", "a"),
        identity("a';--", "b%", "c_"),
        identity(&longest, &longest, &longest),
    ]
    .into_iter();
    let mut ids = Vec::new();
    for (index, identity) in identities.enumerate() {
        let request = Decide {
            identity,
            call_id: call_id.clone(),
            ..decision("unused", if index % 2 == 0 { Approve } else { Reject })
        };
        let action = unwrap_variant!(stores.decide(index, request).await, Decided::Recorded);
        assert!(!ids.contains(&id(&action)));
        ids.push(id(&action));
    }
    assert_eq!(stores.totals().await.decisions, ids.len() as u64);
}

pub(super) async fn of_many_calls_one_is_recorded<S: Store>(stores: &Stores<S>) {
    const CALLS: usize = 16;
    const KEYS: usize = 32;
    let mut calls = Vec::new();
    for call in 0..CALLS {
        for key in 0..KEYS {
            let store = stores.at(call + key).clone();
            let asked = if (call + key) % 3 == 0 {
                Reject
            } else {
                Approve
            };
            let request = decision(&format!("k-{key}"), asked);
            // Half of the keys are also submitted, concurrently.
            let submit = (call == 0 && key % 2 == 0).then(|| submission(&format!("k-{key}")));
            calls.push(tokio::spawn(async move {
                if let Some(submit) = submit {
                    store.submit(submit).await.unwrap();
                }
                (key, asked, store.decide(request).await.unwrap())
            }));
        }
    }
    let mut recorded: [Option<Action>; KEYS] = [const { None }; KEYS];
    let mut others = Vec::new();
    for call in calls {
        match call.await.unwrap() {
            (key, asked, Decided::Recorded(action)) => {
                assert_eq!(action.decision, Some(asked));
                assert!(
                    recorded[key].replace(action).is_none(),
                    "key {key} was decided twice"
                );
            }
            other => others.push(other),
        }
    }
    assert_eq!(others.len(), CALLS * KEYS - KEYS);
    for (key, asked, decided) in others {
        let on_record = recorded[key].as_ref().expect("a key was never decided");
        if on_record.decision == Some(asked) {
            assert_eq!(decided, Decided::Duplicate(on_record.clone()));
        } else {
            assert_eq!(decided, Decided::Conflict(on_record.clone()));
        }
    }
    let totals = stores.totals().await;
    assert_eq!(totals.actions, KEYS as u64);
    assert_eq!(totals.decisions, KEYS as u64);
    // A submission that came before the decision is a transition of its own.
    let submitted = totals.events - totals.decisions;
    assert!(submitted <= KEYS as u64 / 2, "{totals:?}");
}

pub(super) async fn a_dropped_call_is_settled_by_asking_again<S: Store>(stores: &Stores<S>) {
    const KEYS: usize = 64;
    let mut dropped = Vec::new();
    for key in 0..KEYS {
        let request = decision(&format!("k-{key}"), Approve);
        poll_once(stores.at(key).decide(request.clone())).await;
        dropped.push(request);
    }
    for (key, request) in dropped.into_iter().enumerate() {
        match stores.decide(key + 1, request).await {
            Decided::Recorded(_) | Decided::Replayed(_) => {}
            other => panic!("a call met its own decision as {other:?}"),
        }
    }
    let totals = stores.totals().await;
    assert_eq!(
        (totals.decisions, totals.events),
        (KEYS as u64, KEYS as u64)
    );
}
