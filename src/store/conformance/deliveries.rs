//! Deliveries to webhook endpoints: who may deliver, and what became of it.

use std::time::Duration;

use uuid::Uuid;

use super::{Stores, decision, id, identity, submission};
use crate::protocol::Decision::Approve;
use crate::protocol::EventKind;
use crate::store::{
    Decided, DeliveryResult, EndpointTaken, Forget, Forgotten, MarkDeliveries, Marked, Resend,
    Resent, Resume, Resumed, Start, Store, Submit, Submitted, TakeEndpoint,
};

const NOTHING: [u64; 0] = [];

pub(super) const LEASE: Duration = Duration::from_secs(600);

/// Longer than the suite takes.
const LATER: Duration = Duration::from_secs(3600);

/// The longest wait of those that deliver.
const LONGEST: Duration = Duration::from_secs(2 * 3600);

pub(super) fn take(endpoint: &str, holder: Uuid) -> TakeEndpoint {
    TakeEndpoint {
        endpoint: endpoint.to_owned(),
        start: Start::Oldest,
        holder,
        lease: LEASE,
    }
}

pub(super) fn mark(
    holder: Uuid,
    position: u64,
    results: Vec<(u64, DeliveryResult)>,
) -> MarkDeliveries {
    MarkDeliveries {
        endpoint: "a".to_owned(),
        holder,
        lease: LEASE,
        position,
        results,
        give_up_after: LATER,
        stop: false,
    }
}

pub(super) fn failed(attempts: u32, wait: Duration) -> DeliveryResult {
    DeliveryResult::Failed {
        attempts,
        wait,
        failure: "status 500".to_owned(),
    }
}

impl<S: Store> Stores<S> {
    pub(super) async fn taken(
        &self,
        index: usize,
        request: TakeEndpoint,
    ) -> (u64, Vec<(u64, Uuid)>) {
        match self.at(index).take_endpoint(request).await {
            Ok(EndpointTaken::Taken { position, parked }) => (position, parked),
            other => panic!("not taken: {other:?}"),
        }
    }

    /// Records a mark, and returns what became dead letters.
    pub(super) async fn marked(&self, index: usize, request: MarkDeliveries) -> Vec<u64> {
        match self.at(index).mark_deliveries(request).await {
            Ok(Marked::Recorded { dead }) => dead,
            other => panic!("not recorded: {other:?}"),
        }
    }

    /// The positions and attempts of what is due at an endpoint.
    async fn due(&self, index: usize, endpoint: &str) -> Vec<(u64, u32)> {
        let due = self
            .at(index)
            .due_deliveries(endpoint, 100, LONGEST)
            .await
            .unwrap();
        let due = due.deliveries.into_iter();
        due.map(|due| (due.position, due.attempts)).collect()
    }

    /// The positions of an endpoint's dead letters.
    pub(super) async fn dead(&self, index: usize, endpoint: &str) -> Vec<u64> {
        let dead = self.at(index).dead_letters(endpoint, 100).await.unwrap();
        dead.iter().map(|letter| letter.position).collect()
    }
}

/// Two actions with two events each; the positions of those of the first and of the second.
async fn two_actions<S: Store>(stores: &Stores<S>) -> ([u64; 2], [u64; 2], Uuid) {
    let first = stores.submitted("k-1", None).await;
    stores.submitted("k-2", None).await;
    for key in ["k-1", "k-2"] {
        let decided = stores.decide(1, decision(key, Approve)).await;
        unwrap_variant!(decided, Decided::Recorded);
    }
    let events = stores.at(0).all_events(0, 100).await.unwrap();
    let positions: Vec<_> = events.iter().map(|(position, _)| *position).collect();
    let [a, b, c, d] = positions[..] else {
        panic!("four events: {events:?}");
    };
    ([a, c], [b, d], id(&first))
}

pub(super) async fn events_of_all_tenants_come_in_order<S: Store>(stores: &Stores<S>) {
    assert_eq!(stores.at(0).all_events(0, 10).await.unwrap(), []);
    for tenant in ["tenant-1", "tenant-2", "tenant-1"] {
        let key = Uuid::new_v4().to_string();
        let submit = Submit {
            identity: identity(tenant, "thread", &key),
            ..submission(&key)
        };
        unwrap_variant!(stores.submit(0, submit).await, Submitted::Recorded);
    }
    let events = stores.at(1).all_events(0, 10).await.unwrap();
    let tenant = |event: &crate::protocol::Event| {
        let action = event.action.as_ref().unwrap();
        action.tenant_id.as_ref().unwrap().to_string()
    };
    let tenants: Vec<_> = events.iter().map(|(_, event)| tenant(event)).collect();
    assert_eq!(tenants, ["tenant-1", "tenant-2", "tenant-1"]);
    assert!(events.is_sorted_by(|one, next| one.0 < next.0));
    assert!(
        events
            .iter()
            .all(|(_, event)| event.kind == EventKind::Submitted)
    );
    let rest = stores.at(2).all_events(events[0].0, 1).await.unwrap();
    assert_eq!(rest, events[1..2]);
    // Each is the event that its tenant sees.
    let own = "tenant-2".parse().unwrap();
    assert_eq!(
        stores.at(0).events(&own, 0, 10).await.unwrap(),
        events[1..2]
    );
}

pub(super) async fn a_new_endpoint_begins_now_or_at_the_oldest_event<S: Store>(stores: &Stores<S>) {
    two_actions(stores).await;
    let newest = stores.at(0).newest_event().await.unwrap();
    let holder = Uuid::new_v4();
    let now = TakeEndpoint {
        start: Start::Now,
        ..take("new", holder)
    };
    assert_eq!(stores.taken(0, now).await, (newest, vec![]));
    assert_eq!(stores.taken(1, take("a", holder)).await, (0, vec![]));
    // Only a new one begins anywhere.
    let again = TakeEndpoint {
        start: Start::Now,
        ..take("a", holder)
    };
    assert_eq!(stores.taken(2, again).await, (0, vec![]));
    let states = stores.at(1).endpoints().await.unwrap();
    let states = states.iter().map(|state| {
        assert!(state.held_until.is_some() && state.stopped_at.is_none());
        let since = state.behind_since.is_some();
        (&*state.name, state.position, state.behind, since)
    });
    assert!(states.eq([("a", 0, 4, true), ("new", newest, 0, false)]));
}

pub(super) async fn one_holder_at_a_time_delivers<S: Store>(stores: &Stores<S>) {
    two_actions(stores).await;
    let [one, other] = [Uuid::new_v4(), Uuid::new_v4()];
    stores.taken(0, take("a", one)).await;
    let held = stores.at(1).take_endpoint(take("a", other)).await.unwrap();
    assert_eq!(held, EndpointTaken::Held);
    let refused = stores.at(1).mark_deliveries(mark(other, 1, vec![])).await;
    assert_eq!(refused.unwrap(), Marked::Lost);
    stores.marked(0, mark(one, 2, vec![])).await;
    assert_eq!(stores.taken(1, take("a", one)).await.0, 2);
    // The position never moves back.
    stores.marked(0, mark(one, 1, vec![])).await;
    assert_eq!(stores.taken(1, take("a", one)).await.0, 2);
    // Whoever gives it up leaves it to others, and cannot mark any more.
    let release = MarkDeliveries {
        lease: Duration::ZERO,
        ..mark(one, 3, vec![])
    };
    stores.marked(0, release).await;
    assert_eq!(stores.taken(1, take("a", other)).await.0, 3);
    let late = stores.at(0).mark_deliveries(mark(one, 4, vec![])).await;
    assert_eq!(late.unwrap(), Marked::Lost);
    assert_eq!(stores.taken(1, take("a", other)).await.0, 3);
    // A lease that is over keeps nobody out.
    let short = TakeEndpoint {
        lease: Duration::from_millis(1),
        ..take("a", other)
    };
    stores.taken(1, short).await;
    tokio::time::sleep(Duration::from_millis(20)).await;
    stores.taken(0, take("a", one)).await;
    let unknown = MarkDeliveries {
        endpoint: "unknown".to_owned(),
        ..mark(one, 4, vec![])
    };
    let unknown = stores.at(0).mark_deliveries(unknown).await.unwrap();
    assert_eq!(unknown, Marked::Lost);
}

pub(super) async fn what_fails_is_parked_and_its_successors_wait<S: Store>(stores: &Stores<S>) {
    let ([submitted, approved], [other, last], action) = two_actions(stores).await;
    let holder = Uuid::new_v4();
    stores.taken(0, take("a", holder)).await;
    let results = vec![
        (submitted, failed(1, LATER)),
        (approved, DeliveryResult::Behind),
    ];
    assert_eq!(stores.marked(0, mark(holder, last, results)).await, NOTHING);
    let (position, parked) = stores.taken(1, take("a", holder)).await;
    assert_eq!(position, last);
    assert_eq!(parked, [(submitted, action), (approved, action)]);
    // Nothing is due before the wait is over, and what is behind it never is.
    let due = stores.at(2).due_deliveries("a", 10, LONGEST).await.unwrap();
    assert_eq!(due.deliveries, []);
    let next = due.next.expect("one is due later");
    assert!(next <= LATER && next > LATER / 2, "{next:?}");
    let results = vec![(submitted, failed(2, Duration::ZERO))];
    stores.marked(0, mark(holder, last, results)).await;
    assert_eq!(stores.due(1, "a").await, [(submitted, 2)]);
    let due = stores.at(2).due_deliveries("a", 10, LONGEST).await.unwrap();
    let event = &due.deliveries[0].event;
    let events = stores.at(0).all_events(0, 100).await.unwrap();
    assert_eq!(*event, events[0].1, "it is the event as it was");
    assert_eq!(due.next, None);
    // What was behind it is next.
    let results = vec![(submitted, DeliveryResult::Delivered)];
    stores.marked(1, mark(holder, last, results)).await;
    assert_eq!(stores.due(0, "a").await, [(approved, 0)]);
    // What waits for something that is done by now is due.
    let results = vec![
        (approved, DeliveryResult::Delivered),
        (other, DeliveryResult::Behind),
    ];
    stores.marked(1, mark(holder, last, results)).await;
    assert_eq!(stores.due(2, "a").await, [(other, 0)]);
    let states = stores.at(0).endpoints().await.unwrap();
    assert_eq!((states[0].parked, states[0].dead), (1, 0));
}

pub(super) async fn a_mark_that_is_sent_again_changes_nothing_more<S: Store>(stores: &Stores<S>) {
    let ([submitted, approved], [other, last], _) = two_actions(stores).await;
    let holder = Uuid::new_v4();
    stores.taken(0, take("a", holder)).await;
    let first = mark(
        holder,
        last,
        vec![
            (submitted, failed(1, Duration::ZERO)),
            (approved, DeliveryResult::Behind),
            (other, failed(1, LATER)),
        ],
    );
    for index in 0..2 {
        assert_eq!(stores.marked(index, first.clone()).await, NOTHING);
        assert_eq!(stores.due(0, "a").await, [(submitted, 1)]);
    }
    let then = mark(
        holder,
        last,
        vec![
            (submitted, DeliveryResult::Delivered),
            (approved, failed(1, LATER)),
        ],
    );
    let and_then = mark(
        holder,
        last,
        vec![
            (approved, failed(2, LATER)),
            (approved, DeliveryResult::Delivered),
        ],
    );
    for (index, mark) in [&then, &then, &and_then, &and_then].into_iter().enumerate() {
        assert_eq!(stores.marked(index, mark.clone()).await, NOTHING);
    }
    let (_, parked) = stores.taken(1, take("a", holder)).await;
    let parked: Vec<_> = parked.iter().map(|(position, _)| *position).collect();
    assert_eq!(parked, [other]);
}

pub(super) async fn what_is_given_up_is_a_dead_letter_until_it_is_resent<S: Store>(
    stores: &Stores<S>,
) {
    let ([submitted, approved], [other, last], action) = two_actions(stores).await;
    let holder = Uuid::new_v4();
    stores.taken(0, take("a", holder)).await;
    let give_up = |results| MarkDeliveries {
        give_up_after: Duration::ZERO,
        ..mark(holder, last, results)
    };
    let results = vec![
        (submitted, failed(1, Duration::ZERO)),
        (approved, DeliveryResult::Behind),
        (other, failed(1, LATER)),
    ];
    // A first failure never is the last attempt.
    assert_eq!(stores.marked(0, give_up(results)).await, NOTHING);
    let results = vec![(submitted, failed(2, LATER))];
    assert_eq!(stores.marked(0, give_up(results)).await, [submitted]);
    assert_eq!(stores.dead(1, "a").await, [submitted]);
    assert_eq!(stores.due(1, "a").await, [(approved, 0)]);
    // Nothing that is said of a dead letter later changes it.
    let results = vec![
        (submitted, DeliveryResult::Delivered),
        (submitted, failed(3, Duration::ZERO)),
        (submitted, DeliveryResult::Behind),
        (approved, failed(1, LATER)),
    ];
    assert_eq!(stores.marked(0, give_up(results)).await, [approved]);
    assert_eq!(stores.dead(1, "a").await, [submitted, approved]);
    let letters = stores.at(2).dead_letters("a", 1).await.unwrap();
    let [letter] = &letters[..] else {
        panic!("one letter: {letters:?}");
    };
    assert_eq!((letter.attempts, &*letter.failure), (2, "status 500"));
    assert!(letter.parked_at <= letter.given_up_at);
    assert_eq!(letter.event.kind, EventKind::Submitted);
    let states = stores.at(0).endpoints().await.unwrap();
    assert_eq!((states[0].parked, states[0].dead), (1, 2));

    let resend = |events| Resend {
        endpoint: "a".to_owned(),
        events,
    };
    let other_event = stores.at(0).all_events(other - 1, 1).await.unwrap();
    let nobodys = vec![Uuid::new_v4(), other_event[0].1.id.as_uuid().unwrap()];
    let resent = stores.at(0).resend(resend(Some(nobodys))).await.unwrap();
    assert_eq!(resent, Resent::Parked(0));
    let one = letter.event.id.as_uuid().unwrap();
    let resent = stores.at(1).resend(resend(Some(vec![one]))).await.unwrap();
    assert_eq!(resent, Resent::Parked(1));
    assert_eq!(stores.dead(1, "a").await, [approved]);
    assert_eq!(stores.due(1, "a").await, [(submitted, 0)]);
    let resent = stores.at(1).resend(resend(None)).await.unwrap();
    assert_eq!(resent, Resent::Parked(1));
    // In the order of their action.
    assert_eq!(stores.due(1, "a").await, [(submitted, 0)]);
    let (_, parked) = stores.taken(0, take("a", holder)).await;
    assert_eq!(parked[0], (submitted, action));
    assert_eq!(parked.len(), 3);
    let unknown = Resend {
        endpoint: "unknown".to_owned(),
        events: None,
    };
    let unknown = stores.at(1).resend(unknown).await.unwrap();
    assert_eq!(unknown, Resent::NotFound);
}

pub(super) async fn a_stopped_endpoint_takes_nothing_until_it_is_resumed<S: Store>(
    stores: &Stores<S>,
) {
    two_actions(stores).await;
    let holder = Uuid::new_v4();
    stores.taken(0, take("a", holder)).await;
    let stop = MarkDeliveries {
        stop: true,
        ..mark(holder, 2, vec![])
    };
    stores.marked(0, stop).await;
    let taken = stores.at(1).take_endpoint(take("a", holder)).await.unwrap();
    assert_eq!(taken, EndpointTaken::Stopped);
    let late = stores.at(0).mark_deliveries(mark(holder, 3, vec![])).await;
    assert_eq!(late.unwrap(), Marked::Lost);
    let states = stores.at(0).endpoints().await.unwrap();
    assert!(states[0].stopped_at.is_some() && states[0].held_until.is_none());
    let resume = |name: &str| Resume {
        endpoint: name.to_owned(),
    };
    for (index, name, expected) in [
        (0, "a", Resumed::Resumed),
        (1, "a", Resumed::NotStopped),
        (2, "unknown", Resumed::NotFound),
    ] {
        let resumed = stores.at(index).resume(resume(name)).await.unwrap();
        assert_eq!(resumed, expected);
    }
    assert_eq!(stores.taken(1, take("a", holder)).await.0, 2);
}

pub(super) async fn endpoints_do_not_meet<S: Store>(stores: &Stores<S>) {
    let ([submitted, _], [_, last], _) = two_actions(stores).await;
    let holder = Uuid::new_v4();
    stores.taken(0, take("a", holder)).await;
    stores.taken(0, take("b", holder)).await;
    let results = vec![(submitted, failed(1, Duration::ZERO))];
    stores.marked(0, mark(holder, last, results)).await;
    assert_eq!(stores.due(0, "b").await, []);
    assert_eq!(stores.due(0, "unknown").await, []);
    assert_eq!(stores.taken(1, take("b", holder)).await, (0, vec![]));
    assert_eq!(stores.due(1, "a").await, [(submitted, 1)]);
}

pub(super) async fn what_would_wait_for_longer_than_any_wait_is_due<S: Store>(stores: &Stores<S>) {
    let ([submitted, _], [other, last], _) = two_actions(stores).await;
    let holder = Uuid::new_v4();
    stores.taken(0, take("a", holder)).await;
    let results = vec![
        (submitted, failed(1, LONGEST + LATER)),
        (other, failed(1, LATER)),
    ];
    stores.marked(0, mark(holder, last, results)).await;
    assert_eq!(stores.due(1, "a").await, [(submitted, 1)]);
    let due = stores.at(2).due_deliveries("a", 10, LONGEST).await.unwrap();
    let next = due.next.expect("the other one is due later");
    assert!(next <= LATER && next > LATER / 2, "{next:?}");
    // A limit counts both kinds.
    let none = stores.at(0).due_deliveries("a", 0, LONGEST).await.unwrap();
    assert_eq!(none.deliveries, []);
    let all = stores.at(0).due_deliveries("a", 10, Duration::MAX).await;
    assert_eq!(all.unwrap().deliveries, []);
}

pub(super) async fn an_endpoint_is_forgotten_unless_it_is_held<S: Store>(stores: &Stores<S>) {
    let ([submitted, approved], [other, last], _) = two_actions(stores).await;
    let holder = Uuid::new_v4();
    let results = || {
        vec![
            (submitted, failed(1, LATER)),
            (approved, DeliveryResult::Behind),
            (other, failed(1, LATER)),
        ]
    };
    for endpoint in ["a", "b"] {
        stores.taken(0, take(endpoint, holder)).await;
        let mark = MarkDeliveries {
            endpoint: endpoint.to_owned(),
            ..mark(holder, last, results())
        };
        stores.marked(1, mark).await;
    }
    let dead = MarkDeliveries {
        give_up_after: Duration::ZERO,
        ..mark(holder, last, vec![(submitted, failed(2, LATER))])
    };
    assert_eq!(stores.marked(0, dead).await, [submitted]);
    let forget = |endpoint: &str| Forget {
        endpoint: endpoint.to_owned(),
    };
    let unknown = stores
        .at(0)
        .forget_endpoint(forget("unknown"))
        .await
        .unwrap();
    assert_eq!(unknown, Forgotten::NotFound);
    let held = stores.at(1).forget_endpoint(forget("a")).await.unwrap();
    assert!(matches!(held, Forgotten::Held(_)), "{held:?}");
    assert_eq!(stores.taken(2, take("a", holder)).await.1.len(), 2);
    let release = MarkDeliveries {
        lease: Duration::ZERO,
        ..mark(holder, last, vec![])
    };
    stores.marked(0, release).await;
    let forgotten = stores.at(1).forget_endpoint(forget("a")).await.unwrap();
    assert_eq!(forgotten, Forgotten::Removed);
    let again = stores.at(2).forget_endpoint(forget("a")).await.unwrap();
    assert_eq!(again, Forgotten::NotFound);
    let late = stores.at(0).mark_deliveries(mark(holder, last, results()));
    assert_eq!(late.await.unwrap(), Marked::Lost);
    // The other one has lost nothing, and a new one has nothing of the old one.
    stores.taken(0, take("c", holder)).await;
    assert_eq!(stores.taken(1, take("b", holder)).await.1.len(), 3);
    assert_eq!(stores.taken(0, take("a", holder)).await, (0, vec![]));
    let states = stores.at(2).endpoints().await.unwrap();
    let states = states.iter();
    let states = states.map(|state| (&*state.name, state.parked, state.dead));
    assert!(states.eq([("a", 0, 0), ("b", 3, 0), ("c", 0, 0)]));
    // A stopped one is held by nobody.
    let stop = MarkDeliveries {
        stop: true,
        ..mark(holder, 0, vec![])
    };
    stores.marked(1, stop).await;
    let forgotten = stores.at(0).forget_endpoint(forget("a")).await.unwrap();
    assert_eq!(forgotten, Forgotten::Removed);
}
