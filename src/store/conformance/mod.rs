//! The suite that every [`Store`] must pass.
//!
//! ```
//! # #[tokio::main] async fn main() {
//! use aegis_hitl::store::{MemoryStore, conformance};
//!
//! conformance::run(|| async { MemoryStore::new() }).await;
//! # }
//! ```

// A failed case panics, as a failed test does.
#![allow(
    clippy::expect_used,
    clippy::missing_panics_doc,
    clippy::panic,
    clippy::unwrap_used
)]

use std::future::Future;
use std::task::Poll;
use std::time::Duration;

use uuid::Uuid;

use super::{
    Actor, Decide, Decided, Fingerprinted, Identity, Store, Submission, Submit, Submitted, Totals,
};
use crate::protocol::Decision::{Approve, Reject};
use crate::protocol::{Action, Decision, Payload, RequestId, Status};

/// Far longer than any case takes. It only keeps a lost wake-up from hanging the suite.
const PATIENCE: Duration = Duration::from_secs(60);

/// Runs every case against a store.
///
/// `open` opens an empty store, which nothing else may use. The suite needs a tokio runtime whose
/// clock is not paused.
///
/// # Panics
///
/// If the store breaks the contract of [`Store`]. The panic's message and location name the case.
pub async fn run<S, F, Fut>(open: F)
where
    S: Store,
    F: Fn() -> Fut,
    Fut: Future<Output = S>,
{
    run_together(|| async { vec![open().await] }).await;
}

/// Runs every case against several stores that share their records, as servers on one database do.
///
/// `open` opens stores on the same records, which must be empty. The cases spread their calls over
/// all of these stores.
///
/// # Panics
///
/// As [`run`].
pub async fn run_together<S, F, Fut>(open: F)
where
    S: Store,
    F: Fn() -> Fut,
    Fut: Future<Output = Vec<S>>,
{
    macro_rules! cases {
        ($($case:ident),+ $(,)?) => {
            $({
                let stores = Stores(open().await);
                assert!(!stores.0.is_empty(), "there is no store to test");
                $case(&stores).await;
                stores.agree().await;
            })+
        };
    }
    cases!(
        a_first_decision_is_recorded_and_found,
        the_same_call_is_replayed_and_another_is_a_duplicate,
        the_opposite_decision_is_a_conflict,
        a_submitted_action_is_pending_until_it_is_decided,
        a_second_submission_finds_the_first,
        only_what_was_submitted_is_decided_where_that_is_required,
        another_payload_is_a_mismatch,
        a_payload_is_kept_as_it_was_sent,
        tenants_threads_and_keys_do_not_meet,
        a_call_id_finds_the_one_action_that_it_names,
        a_tenants_call_id_is_its_own,
        a_call_id_of_any_form_tells_a_retry,
        a_decision_wakes_who_waits_for_it,
        of_many_calls_one_is_recorded,
        a_dropped_call_is_settled_by_asking_again,
        a_check_passes_and_leaves_nothing_on_record,
    );
}

struct Stores<S>(Vec<S>);

impl<S: Store> Stores<S> {
    fn at(&self, index: usize) -> &S {
        &self.0[index % self.0.len()]
    }

    async fn decide(&self, index: usize, request: Decide) -> Decided {
        let decided = self.at(index).decide(request).await;
        decided.expect("a decision was answered")
    }

    async fn submit(&self, index: usize, request: Submit) -> Submitted {
        let submitted = self.at(index).submit(request).await;
        submitted.expect("a submission was answered")
    }

    async fn find(&self, index: usize, id: Uuid) -> Option<Action> {
        self.at(index)
            .find(id, None)
            .await
            .expect("a read was answered")
    }

    async fn totals(&self) -> Totals {
        self.at(0).totals().await.expect("totals were answered")
    }

    /// Holds after every case: each transition has an event, and all stores see the same records.
    async fn agree(&self) {
        let totals = self.totals().await;
        assert!(totals.events >= totals.actions, "{totals:?}");
        for store in &self.0 {
            assert_eq!(store.totals().await.unwrap(), totals);
        }
    }
}

fn identity(tenant: &str, thread: &str, key: &str) -> Identity {
    Identity {
        tenant_id: tenant.parse().unwrap(),
        thread_id: thread.parse().unwrap(),
        idempotency_key: key.parse().unwrap(),
    }
}

fn payload(json: &str) -> Option<Fingerprinted> {
    Some(Fingerprinted::new(Payload::from_json(json).unwrap()).unwrap())
}

fn decision(key: &str, decision: Decision) -> Decide {
    Decide {
        identity: identity("tenant", "thread", key),
        decision,
        call_id: Some(RequestId::mint()),
        payload: None,
        comment: None,
        actor: Actor::new("reviewer"),
        require_submission: false,
        allow_self_approval: true,
    }
}

fn submission(key: &str) -> Submit {
    Submit {
        identity: identity("tenant", "thread", key),
        call_id: Some(RequestId::mint()),
        payload: None,
        submission: Submission::default(),
        only_existing: false,
        actor: Actor::new("agent"),
    }
}

fn id(action: &Action) -> Uuid {
    let id = action.request_id.as_uuid();
    id.expect("the store's id is a UUID")
}

macro_rules! unwrap_variant {
    ($value:expr, $variant:path) => {
        match $value {
            $variant(action) => action,
            other => panic!("not {}: {other:?}", stringify!($variant)),
        }
    };
}

async fn a_first_decision_is_recorded_and_found<S: Store>(stores: &Stores<S>) {
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

async fn the_same_call_is_replayed_and_another_is_a_duplicate<S: Store>(stores: &Stores<S>) {
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

async fn the_opposite_decision_is_a_conflict<S: Store>(stores: &Stores<S>) {
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

async fn a_submitted_action_is_pending_until_it_is_decided<S: Store>(stores: &Stores<S>) {
    let mut request = submission("k");
    request.payload = payload(r#"{"n": 1}"#);
    let submitted = unwrap_variant!(stores.submit(0, request).await, Submitted::Recorded);
    assert_eq!(submitted.status, Status::Pending);
    assert_eq!((submitted.decision, submitted.decided_at), (None, None));
    assert_eq!(
        stores.find(1, id(&submitted)).await,
        Some(submitted.clone())
    );
    let totals = stores.totals().await;
    assert_eq!((totals.actions, totals.decisions, totals.events), (1, 0, 1));

    let decided = unwrap_variant!(
        stores.decide(1, decision("k", Reject)).await,
        Decided::Recorded
    );
    assert_eq!(decided.request_id, submitted.request_id);
    assert_eq!(decided.created_at, submitted.created_at);
    assert_eq!(decided.payload, submitted.payload);
    assert_eq!(decided.status, Status::Committed);
    assert_eq!(decided.decision, Some(Reject));
    assert_eq!(stores.find(2, id(&submitted)).await, Some(decided));
    let totals = stores.totals().await;
    assert_eq!((totals.actions, totals.decisions, totals.events), (1, 1, 2));
}

async fn a_second_submission_finds_the_first<S: Store>(stores: &Stores<S>) {
    let mut request = submission("k");
    request.payload = payload(r#"{"a": 1, "b": 2}"#);
    let recorded = unwrap_variant!(stores.submit(0, request.clone()).await, Submitted::Recorded);
    for same in [r#"{"a": 1, "b": 2}"#, r#"{ "b": 2.0, "a": 1 }"#] {
        request.payload = payload(same);
        let existing =
            unwrap_variant!(stores.submit(1, request.clone()).await, Submitted::Existing);
        assert_eq!(existing, recorded);
    }
    request.payload = None;
    unwrap_variant!(stores.submit(2, request.clone()).await, Submitted::Existing);
    request.payload = payload(r#"{"a": 1}"#);
    let other = unwrap_variant!(stores.submit(0, request).await, Submitted::PayloadMismatch);
    assert_eq!(other, recorded);

    let decided = unwrap_variant!(
        stores.decide(1, decision("k", Approve)).await,
        Decided::Recorded
    );
    let existing = unwrap_variant!(stores.submit(2, submission("k")).await, Submitted::Existing);
    assert_eq!(existing, decided);
    assert_eq!(stores.totals().await.events, 2);
}

async fn only_what_was_submitted_is_decided_where_that_is_required<S: Store>(stores: &Stores<S>) {
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

async fn another_payload_is_a_mismatch<S: Store>(stores: &Stores<S>) {
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

async fn a_payload_is_kept_as_it_was_sent<S: Store>(stores: &Stores<S>) {
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

async fn tenants_threads_and_keys_do_not_meet<S: Store>(stores: &Stores<S>) {
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

async fn a_call_id_finds_the_one_action_that_it_names<S: Store>(stores: &Stores<S>) {
    let call = |uuid: Uuid| Some(RequestId::from(uuid));
    let [submitting, deciding, twice] = [Uuid::new_v4(), Uuid::new_v4(), Uuid::new_v4()];
    let submit = Submit {
        call_id: call(submitting),
        ..submission("k")
    };
    unwrap_variant!(stores.submit(0, submit).await, Submitted::Recorded);
    let request = Decide {
        call_id: call(deciding),
        ..decision("k", Approve)
    };
    let action = unwrap_variant!(stores.decide(1, request.clone()).await, Decided::Recorded);
    for id in [submitting, deciding, id(&action)] {
        assert_eq!(stores.find(2, id).await.as_ref(), Some(&action));
    }

    // A call that changed nothing also names its action, at the store that answered it.
    let [confirmed, existing] = [Uuid::new_v4(), Uuid::new_v4()];
    for call_id in [call(confirmed), call(twice)] {
        let duplicate = Decide {
            call_id,
            ..request.clone()
        };
        unwrap_variant!(stores.decide(0, duplicate).await, Decided::Duplicate);
    }
    let again = Submit {
        call_id: call(existing),
        ..submission("k")
    };
    unwrap_variant!(stores.submit(0, again).await, Submitted::Existing);
    for id in [confirmed, existing, twice] {
        assert_eq!(stores.find(0, id).await.as_ref(), Some(&action));
    }
    // It does not count once the id is on record for another action.
    for (key, found) in [("k-1", true), ("k-2", false)] {
        let request = Decide {
            call_id: call(twice),
            ..decision(key, Reject)
        };
        unwrap_variant!(stores.decide(2, request).await, Decided::Recorded);
        let named = stores.find(0, twice).await;
        let named = named.map(|action| action.idempotency_key.unwrap().as_str() == key);
        assert_eq!(named, found.then_some(true), "{key}");
    }

    // The store's own id comes first, so no call id can hide an action.
    let request = Decide {
        call_id: call(id(&action)),
        ..decision("k-3", Reject)
    };
    unwrap_variant!(stores.decide(1, request).await, Decided::Recorded);
    assert_eq!(stores.find(2, id(&action)).await, Some(action));
}

async fn a_tenants_call_id_is_its_own<S: Store>(stores: &Stores<S>) {
    let [recorded, confirmed] = [Uuid::new_v4(), Uuid::new_v4()];
    let mut actions = Vec::new();
    for tenant in ["tenant-1", "tenant-2"] {
        let request = |key: &str, call: Uuid| Decide {
            identity: identity(tenant, "thread", key),
            call_id: Some(RequestId::from(call)),
            ..decision(key, Approve)
        };
        let decided = stores.decide(0, request("k", recorded)).await;
        let action = unwrap_variant!(decided, Decided::Recorded);
        let decided = stores.decide(0, request("k", confirmed)).await;
        unwrap_variant!(decided, Decided::Duplicate);
        actions.push(action);
    }
    for (action, other) in [(&actions[0], &actions[1]), (&actions[1], &actions[0])] {
        let tenant = action.tenant_id.as_ref();
        for call in [recorded, confirmed, id(action)] {
            let found = stores.at(0).find(call, tenant).await.unwrap();
            assert_eq!(found.as_ref(), Some(action));
        }
        // Another tenant's id finds nothing.
        assert_eq!(stores.at(1).find(id(other), tenant).await.unwrap(), None);
    }
    let stranger = "tenant-3".parse().unwrap();
    for call in [recorded, confirmed] {
        // Without a tenant, the id is ambiguous.
        assert_eq!(stores.find(0, call).await, None);
        let found = stores.at(0).find(call, Some(&stranger)).await;
        assert_eq!(found.unwrap(), None);
    }
}

async fn a_call_id_of_any_form_tells_a_retry<S: Store>(stores: &Stores<S>) {
    let version_1 = "c232ab00-9414-11ec-b3c8-9f6bdeced846";
    for (key, call_id) in [("k-1", "call-1"), ("k-2", version_1)] {
        let request = Decide {
            call_id: Some(call_id.parse().unwrap()),
            ..decision(key, Approve)
        };
        unwrap_variant!(stores.decide(0, request.clone()).await, Decided::Recorded);
        unwrap_variant!(stores.decide(1, request).await, Decided::Replayed);
    }
    assert!(stores.find(2, version_1.parse().unwrap()).await.is_some());
    // Two spellings of one id are the same id.
    let spellings = [
        "9f1b2c3d-0000-4000-8000-00000000abcd",
        "9F1B2C3D-0000-4000-8000-00000000ABCD",
    ];
    let [one, other] = spellings.map(|call_id| Decide {
        call_id: Some(call_id.parse().unwrap()),
        ..decision("k-3", Approve)
    });
    let recorded = unwrap_variant!(stores.decide(0, one).await, Decided::Recorded);
    unwrap_variant!(stores.decide(1, other).await, Decided::Replayed);
    let found = stores.find(2, spellings[0].parse().unwrap()).await;
    assert_eq!(found, Some(recorded));
}

async fn a_decision_wakes_who_waits_for_it<S: Store>(stores: &Stores<S>) {
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

/// Polls a future once and drops it.
async fn poll_once<F: Future>(future: F) -> Option<F::Output> {
    let mut future = std::pin::pin!(future);
    std::future::poll_fn(|context| {
        Poll::Ready(match future.as_mut().poll(context) {
            Poll::Ready(output) => Some(output),
            Poll::Pending => None,
        })
    })
    .await
}

async fn of_many_calls_one_is_recorded<S: Store>(stores: &Stores<S>) {
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

async fn a_dropped_call_is_settled_by_asking_again<S: Store>(stores: &Stores<S>) {
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

async fn a_check_passes_and_leaves_nothing_on_record<S: Store>(stores: &Stores<S>) {
    for store in &stores.0 {
        store.check().await.expect("a check passed");
    }
    assert_eq!(stores.totals().await, Totals::default());
}
