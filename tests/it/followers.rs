//! Those who follow the events of one tenant, and what they cost each other.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use aegis_hitl::server::{HitlService, HitlServiceBuilder, ResponseBody};
use aegis_hitl::store::{MemoryStore, Store};
use bytes::Bytes;
use http::Request;
use http_body_util::{BodyExt, Full};
use serde_json::Value;
use tower::ServiceExt;

use crate::support::{Faulty, Mood, ends};

/// A service that learns of an event by its wake-up alone.
fn service<St: Store>(store: St) -> HitlService<St> {
    with(store, |builder| {
        builder.poll_interval(Duration::from_secs(3600))
    })
}

fn with<St: Store>(
    store: St,
    settings: impl FnOnce(HitlServiceBuilder<St>) -> HitlServiceBuilder<St>,
) -> HitlService<St> {
    settings(HitlService::builder(store)).build().unwrap()
}

fn request(method: &str, path: &str) -> http::request::Builder {
    let uri = format!("http://localhost/api/v1/hitl/{path}");
    Request::builder()
        .method(method)
        .uri(uri)
        .header("tenant-id", "t")
}

/// Makes an event: approves what was not submitted.
async fn approve<St: Store>(service: &HitlService<St>, key: &str) {
    let request = request("POST", "approve")
        .header("thread-id", "h")
        .header("idempotency-key", key)
        .body(Full::<Bytes>::default())
        .unwrap();
    let response = service.clone().oneshot(request).await.unwrap();
    assert_eq!(response.status(), 202);
}

/// One who follows the events, and is at the last of those before.
struct Follower {
    body: ResponseBody,
    text: String,
}

impl Follower {
    async fn new<St: Store>(service: &HitlService<St>, last: Option<u64>) -> Self {
        let mut request = request("GET", "events");
        if let Some(last) = last {
            request = request.header("last-event-id", last);
        }
        let request = request.body(Full::<Bytes>::default()).unwrap();
        let response = ends(service.clone().oneshot(request)).await.unwrap();
        assert_eq!(response.status(), 200);
        let mut follower = Self {
            body: response.into_body(),
            text: String::new(),
        };
        // The place to resume at comes first.
        assert_eq!(follower.block().await, None);
        follower
    }

    /// Takes one frame, which is one block, and returns its event. `None` for any other block.
    async fn block(&mut self) -> Option<(u64, Value)> {
        let frame = ends(self.body.frame()).await.expect("it goes on").unwrap();
        self.text = String::from_utf8(frame.into_data().unwrap().to_vec()).unwrap();
        let value = |name| self.text.lines().find_map(|line| line.strip_prefix(name));
        let data = serde_json::from_str(value("data: ")?).unwrap();
        Some((value("id: ")?.parse().unwrap(), data))
    }

    async fn position(&mut self) -> u64 {
        loop {
            if let Some((position, _)) = self.block().await {
                return position;
            }
        }
    }

    /// Returns the key of the next event's action.
    async fn key(&mut self) -> String {
        loop {
            if let Some((_, event)) = self.block().await {
                let key = &event["action"]["idempotency_key"];
                return key.as_str().unwrap().to_owned();
            }
        }
    }
}

#[tokio::test]
async fn an_event_is_read_once_for_all_who_follow_its_tenant() {
    let store = Faulty::new(MemoryStore::new(), Mood::Well);
    let service = service(store.clone());
    let mut followers = Vec::new();
    for _ in 0..100 {
        followers.push(Follower::new(&service, None).await);
    }
    approve(&service, "first").await;
    for follower in &mut followers {
        assert_eq!(follower.key().await, "first");
    }
    let before = store.asked();
    approve(&service, "second").await;
    for follower in &mut followers {
        assert_eq!(follower.key().await, "second");
    }
    // The decision itself, and the reader of the tenant's events.
    let asked = store.asked() - before;
    assert!(asked <= 3, "the store was asked {asked} times");
}

#[tokio::test(flavor = "multi_thread")]
async fn no_event_is_lost_or_doubled_where_a_follower_joins() {
    const EVENTS: u64 = 160;
    let service = service(MemoryStore::new());
    let joined = Arc::new(AtomicUsize::new(0));
    let mut followers = Vec::new();
    for number in 0..EVENTS {
        approve(&service, &format!("k-{number}")).await;
        if number % 4 == 0 {
            // From the start, from the middle, from here, and from now on.
            for last in [Some(0), Some(number / 2), Some(number), None] {
                let (service, joined) = (service.clone(), joined.clone());
                followers.push(tokio::spawn(async move {
                    let mut follower = Follower::new(&service, last).await;
                    joined.fetch_add(1, Ordering::SeqCst);
                    let first = follower.position().await;
                    if let Some(last) = last {
                        assert_eq!(first, last + 1);
                    }
                    for position in first + 1..=EVENTS + 1 {
                        assert_eq!(follower.position().await, position);
                    }
                }));
            }
        }
    }
    // The last event comes once all have begun, as each waits for it.
    while joined.load(Ordering::SeqCst) < followers.len() {
        tokio::task::yield_now().await;
    }
    approve(&service, "last").await;
    for follower in followers {
        ends(follower).await.unwrap();
    }
}

#[tokio::test]
async fn a_follower_that_does_not_read_costs_the_others_nothing_and_misses_nothing() {
    // More than a feed retains.
    const EVENTS: u64 = 3000;
    let store = Faulty::new(MemoryStore::new(), Mood::Well);
    let service = service(store.clone());
    let mut slow = Follower::new(&service, None).await;
    let mut quick = Follower::new(&service, None).await;
    let before = store.asked();
    for number in 1..=EVENTS {
        approve(&service, &format!("k-{number}")).await;
        assert_eq!(quick.position().await, number);
    }
    // One decision and one read each, with a few reads that found nothing.
    let asked = store.asked() - before;
    assert!(asked <= 2 * EVENTS as usize + 10, "{asked}");
    let before = store.asked();
    for number in 1..=EVENTS {
        assert_eq!(slow.position().await, number);
    }
    // The slow one read pages of its own up to where the feed begins.
    let asked = store.asked() - before;
    assert!((20..=EVENTS as usize / 64 + 10).contains(&asked), "{asked}");
}

#[tokio::test(start_paused = true)]
async fn the_reader_ends_with_its_last_follower() {
    let store = Faulty::new(MemoryStore::new(), Mood::Well);
    let service = with(store.clone(), |service| {
        service.poll_interval(Duration::from_secs(3))
    });
    let first = Follower::new(&service, None).await;
    let second = Follower::new(&service, None).await;
    let minute = Duration::from_secs(60);
    let reads_in_a_minute = async || {
        let before = store.asked();
        tokio::time::sleep(minute).await;
        store.asked() - before
    };
    assert!((18..=22).contains(&reads_in_a_minute().await));
    drop(first);
    assert!((18..=22).contains(&reads_in_a_minute().await));
    drop(second);
    assert!(reads_in_a_minute().await <= 1);
    assert_eq!(reads_in_a_minute().await, 0);
    // The next follower gets a reader of its own.
    let mut next = Follower::new(&service, None).await;
    approve(&service, "k").await;
    assert_eq!(next.key().await, "k");
}

#[tokio::test(start_paused = true)]
async fn followers_outlast_an_outage_of_the_store() {
    let records = MemoryStore::new();
    let store = Faulty::new(records.clone(), Mood::Well);
    let (well, service) = (service(records), service(store.clone()));
    approve(&well, "before").await;
    let mut live = Follower::new(&service, None).await;
    let mut behind = Follower::new(&service, Some(0)).await;
    store.set(Mood::Fails);
    approve(&well, "during").await;
    let comments = async {
        for _ in 0..4 {
            assert_eq!(live.block().await, None);
            assert_eq!(behind.block().await, None);
        }
    };
    comments.await;
    store.set(Mood::Well);
    assert_eq!(live.key().await, "during");
    assert_eq!(behind.key().await, "before");
    assert_eq!(behind.key().await, "during");
}

#[tokio::test(start_paused = true)]
async fn a_panic_of_the_store_ends_the_streams_so_that_they_are_resumed() {
    let store = Faulty::new(MemoryStore::new(), Mood::Well);
    let service = with(store.clone(), |service| {
        service.poll_interval(Duration::from_secs(3))
    });
    let mut follower = Follower::new(&service, None).await;
    store.set(Mood::Panics);
    assert!(ends(follower.body.frame()).await.is_none());
    store.set(Mood::Well);
    // Beside the old one, which is not dropped yet.
    let mut next = Follower::new(&service, None).await;
    drop(follower);
    let mut third = Follower::new(&service, None).await;
    approve(&service, "k").await;
    assert_eq!(next.key().await, "k");
    assert_eq!(third.key().await, "k");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_feed_that_begins_while_another_ends_misses_nothing() {
    let service = service(MemoryStore::new());
    let tasks: Vec<_> = (0..2)
        .map(|task| {
            let service = service.clone();
            tokio::spawn(async move {
                for number in 0..200 {
                    let mut follower = Follower::new(&service, None).await;
                    let key = format!("{task}-{number}");
                    approve(&service, &key).await;
                    while follower.key().await != key {}
                }
            })
        })
        .collect();
    for task in tasks {
        ends(task).await.unwrap();
    }
}
