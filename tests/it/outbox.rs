//! Webhooks: everything arrives at least once, in order per action, whatever the receiver does.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use aegis_hitl::layer::Backoff;
use aegis_hitl::outbox::{Deliveries, Endpoint, Outbox, PublicUrl, Secret, Start};
use aegis_hitl::protocol::EventKind;
use aegis_hitl::store::{
    Actor, Clock, Decide, Decided, EndpointState, Identity, MemoryStore, Resend, Resent, Resume,
    SqliteStore, Store, Submission, Submit, Submitted,
};
use aegis_hitl::{Decision, RequestId, TenantId};
use standardwebhooks::Webhook;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::sleep;

#[cfg(feature = "tls")]
use crate::support::raw::Raw;
use crate::support::receiver::{Receiver, Reply};
#[cfg(feature = "tls")]
use crate::support::tls::Certified;
use crate::support::{Faulty, HANG, Log, Mood, ends};

const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
const OTHER_SECRET: &str = "whsec_AAECAwQFBgcICQoLDA0ODxAREhMUFRYX";

const DAY: Duration = Duration::from_secs(24 * 3600);

fn secret(text: &str) -> Secret {
    text.parse().unwrap()
}

fn endpoint(receiver: &Receiver) -> Endpoint {
    let endpoint = Endpoint::standard("a", &receiver.url(), vec![secret(SECRET)]);
    endpoint.unwrap().start(Start::Oldest)
}

/// An outbox that loses no time.
fn outbox(endpoint: Endpoint) -> Outbox {
    Outbox::new(vec![endpoint])
        .backoff(Backoff::constant(Duration::from_millis(30)))
        .poll_interval(Duration::from_millis(50))
}

async fn deliver<St: Store>(store: &St, endpoint: Endpoint) -> Deliveries {
    outbox(endpoint).start(store.clone()).await.unwrap()
}

fn identity(tenant: &str, key: &str) -> Identity {
    Identity {
        tenant_id: tenant.parse().unwrap(),
        thread_id: "run-7".parse().unwrap(),
        idempotency_key: key.parse().unwrap(),
    }
}

async fn submit_to<St: Store>(store: &St, tenant: &str, key: &str, title: &str) {
    let submit = Submit {
        identity: identity(tenant, key),
        call_id: None,
        payload: None,
        submission: Submission {
            title: Some(title.to_owned()),
            ..Submission::default()
        },
        only_existing: false,
        actor: Actor::new("agent"),
    };
    let submitted = store.submit(submit).await.unwrap();
    assert!(matches!(submitted, Submitted::Recorded(_)), "{submitted:?}");
}

async fn submit<St: Store>(store: &St, key: &str) {
    submit_to(store, "acme", key, "Pay").await;
}

async fn approve<St: Store>(store: &St, key: &str) {
    let decide = Decide {
        identity: identity("acme", key),
        decision: Decision::Approve,
        call_id: Some(RequestId::mint()),
        payload: None,
        comment: None,
        actor: Actor::new("reviewer"),
        require_submission: false,
        allow_self_approval: true,
    };
    let decided = store.decide(decide).await.unwrap();
    assert!(matches!(decided, Decided::Recorded(_)), "{decided:?}");
}

/// Two events of one action.
async fn two_events<St: Store>(store: &St, key: &str) {
    submit(store, key).await;
    approve(store, key).await;
}

async fn state<St: Store>(store: &St) -> EndpointState {
    let mut states = store.endpoints().await.unwrap();
    states.pop().unwrap()
}

/// Waits for what is recorded.
async fn until<St: Store>(store: &St, is: impl Fn(&EndpointState) -> bool) {
    let begun = Instant::now();
    while !store.endpoints().await.unwrap().last().is_some_and(&is) {
        assert!(begun.elapsed() < HANG, "{:?}", store.endpoints().await);
        sleep(Duration::from_millis(10)).await;
    }
}

async fn until_all_marked<St: Store>(store: &St) {
    until(store, |state| state.behind == 0 && state.parked == 0).await;
}

async fn stop(deliveries: Deliveries) {
    ends(deliveries.stop(HANG)).await;
}

fn assert_in_order(receiver: &Receiver, actions: usize) {
    let histories = receiver.histories();
    assert_eq!(histories.len(), actions);
    for (key, history) in histories {
        assert_eq!(history, ["submitted", "approved"], "{key}");
    }
}

fn sqlite() -> (TempDir, SqliteStore) {
    let folder = TempDir::new().unwrap();
    let store = SqliteStore::open(folder.path().join("aegis.db")).unwrap();
    (folder, store)
}

#[tokio::test]
async fn each_event_arrives_once_signed_and_in_order() {
    let receiver = Receiver::accepting().await;
    let (_folder, store) = sqlite();
    two_events(&store, "before").await;
    let deliveries = deliver(&store, endpoint(&receiver)).await;
    for number in 0..20 {
        two_events(&store, &format!("k-{number}")).await;
    }
    receiver.until_accepted(42).await;
    until_all_marked(&store).await;
    stop(deliveries).await;
    assert_in_order(&receiver, 21);
    let received = receiver.received();
    assert_eq!(received.len(), 42, "no event came twice");
    let verifier = Webhook::new(SECRET).unwrap();
    let stranger = Webhook::new(OTHER_SECRET).unwrap();
    let events = store.all_events(0, 100).await.unwrap();
    let ids: HashSet<_> = events
        .iter()
        .map(|(_, event)| event.id.to_string())
        .collect();
    for message in &received {
        let body = message.body.as_bytes();
        verifier.verify(body, &message.headers).unwrap();
        assert!(stranger.verify(body, &message.headers).is_err());
        assert!(ids.contains(message.id()));
        let json = message.json();
        assert_eq!(json["data"]["id"], message.id());
        assert_eq!(json["data"]["type"], json["type"]);
        assert_eq!(json["data"]["at"], json["timestamp"]);
        assert!(json["data"]["action"].get("payload").is_none());
        assert_eq!(message.header("content-type"), "application/json");
    }
}

#[tokio::test]
async fn the_body_is_the_data_of_server_sent_events() {
    let receiver = Receiver::accepting().await;
    let store = MemoryStore::new();
    let server = crate::support::start(store.clone()).await;
    let reply = server
        .submit("k")
        .json(r#"{"payload":{"n":1}}"#)
        .send()
        .await;
    assert_eq!(reply.status, 201);
    let deliveries = deliver(&store, endpoint(&receiver)).await;
    receiver.until_accepted(1).await;
    stop(deliveries).await;
    let request = format!(
        "GET /api/v1/hitl/events HTTP/1.1\r\nhost: {}\r\ntenant-id: t\r\nlast-event-id: 0\r\n\r\n",
        server.addr
    );
    let mut stream = tokio::net::TcpStream::connect(server.addr).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut text = String::new();
    while !text
        .split("data: ")
        .nth(1)
        .is_some_and(|data| data.contains('\n'))
    {
        let mut bytes = [0; 4096];
        let length = ends(stream.read(&mut bytes)).await.unwrap();
        assert!(length > 0, "{text}");
        text.push_str(std::str::from_utf8(&bytes[..length]).unwrap());
    }
    drop(stream);
    let data = text.split("data: ").nth(1).unwrap().lines().next().unwrap();
    let sent: serde_json::Value = serde_json::from_str(data).unwrap();
    assert_eq!(receiver.received()[0].json()["data"], sent);
    _ = server.stop().await;
}

#[tokio::test]
async fn while_a_secret_is_replaced_both_verify() {
    let receiver = Receiver::accepting().await;
    let store = MemoryStore::new();
    let secrets = vec![secret(SECRET), secret(OTHER_SECRET)];
    let both = Endpoint::standard("a", &receiver.url(), secrets).unwrap();
    let deliveries = deliver(&store, both.start(Start::Oldest)).await;
    submit(&store, "k").await;
    receiver.until_accepted(1).await;
    stop(deliveries).await;
    let message = &receiver.received()[0];
    for secret in [SECRET, OTHER_SECRET] {
        let verifier = Webhook::new(secret).unwrap();
        verifier
            .verify(message.body.as_bytes(), &message.headers)
            .unwrap();
    }
}

#[tokio::test]
async fn tenants_and_kinds_of_events_are_filtered() {
    let receiver = Receiver::accepting().await;
    let store = MemoryStore::new();
    for tenant in ["acme", "other", "third"] {
        submit_to(&store, tenant, "k", "T").await;
    }
    approve(&store, "k").await;
    let tenants: Vec<TenantId> = vec!["acme".parse().unwrap(), "third".parse().unwrap()];
    let filtered = endpoint(&receiver)
        .tenants(tenants)
        .events(vec![EventKind::Submitted]);
    let deliveries = deliver(&store, filtered).await;
    receiver.until_accepted(2).await;
    until_all_marked(&store).await;
    stop(deliveries).await;
    let tenant = |message: &crate::support::receiver::Received| {
        assert_eq!(message.kind(), "submitted");
        message.json()["data"]["action"]["tenant_id"]
            .as_str()
            .unwrap()
            .to_owned()
    };
    let received: HashSet<_> = receiver.received().iter().map(tenant).collect();
    assert_eq!(
        received,
        HashSet::from(["acme".to_owned(), "third".to_owned()])
    );
}

#[tokio::test]
async fn a_new_endpoint_begins_now_and_a_known_one_where_it_was() {
    let receiver = Receiver::accepting().await;
    let store = MemoryStore::new();
    two_events(&store, "before").await;
    let from_now = || endpoint(&receiver).start(Start::Now);
    let deliveries = deliver(&store, from_now()).await;
    submit(&store, "k-1").await;
    receiver.until_accepted(1).await;
    stop(deliveries).await;
    // What happens while it is not configured waits.
    submit(&store, "k-2").await;
    let deliveries = deliver(&store, from_now()).await;
    receiver.until_accepted(2).await;
    until_all_marked(&store).await;
    stop(deliveries).await;
    let keys: Vec<_> = receiver
        .received()
        .iter()
        .map(|message| message.key())
        .collect();
    assert_eq!(keys, ["k-1", "k-2"]);
}

/// What fails for some messages, the first times that they come.
fn fails(times: usize, reply: Reply) -> impl Fn(&crate::support::receiver::Received) -> Reply {
    let seen = std::sync::Mutex::new(HashMap::new());
    move |message| {
        let mut seen = seen.lock().unwrap();
        let seen = seen.entry(message.id().to_owned()).or_insert(0);
        *seen += 1;
        match message.key().starts_with("bad") && *seen <= times {
            true => reply.clone(),
            false => Reply::Status(200),
        }
    }
}

async fn arrives_in_order_although(times: usize, reply: Reply) {
    let receiver = Receiver::start(fails(times, reply)).await;
    let (_folder, store) = sqlite();
    let quick = outbox(endpoint(&receiver)).request_timeout(Duration::from_millis(300));
    let deliveries = quick.start(store.clone()).await.unwrap();
    for number in 0..4 {
        two_events(&store, &format!("bad-{number}")).await;
        two_events(&store, &format!("good-{number}")).await;
    }
    receiver.until_accepted(16).await;
    until_all_marked(&store).await;
    stop(deliveries).await;
    assert_in_order(&receiver, 8);
    let received = receiver.received();
    let good = received
        .iter()
        .filter(|message| message.key().starts_with("good"));
    assert_eq!(good.count(), 8, "what did not fail came once");
    assert_eq!(received.len(), 16 + 8 * times);
}

#[tokio::test]
async fn what_fails_is_sent_again_in_order() {
    arrives_in_order_although(3, Reply::Status(500)).await;
}

#[tokio::test]
async fn what_comes_later_waits_behind_what_failed() {
    let is_bad = Arc::new(AtomicBool::new(true));
    let bad = is_bad.clone();
    let receiver = Receiver::start(move |message| {
        match bad.load(Ordering::SeqCst) && message.kind() == "submitted" && message.key() == "bad"
        {
            true => Reply::Status(500),
            false => Reply::Status(200),
        }
    })
    .await;
    let (_folder, store) = sqlite();
    let deliveries = deliver(&store, endpoint(&receiver)).await;
    submit(&store, "bad").await;
    until(&store, |state| state.parked == 1).await;
    approve(&store, "bad").await;
    two_events(&store, "good").await;
    receiver.until_accepted(2).await;
    until(&store, |state| state.parked == 2 && state.behind == 0).await;
    // Also after another start, which knows of it from the store.
    stop(deliveries).await;
    let deliveries = deliver(&store, endpoint(&receiver)).await;
    two_events(&store, "again").await;
    receiver.until_accepted(4).await;
    assert!(
        receiver
            .accepted()
            .iter()
            .all(|message| message.key() != "bad")
    );
    is_bad.store(false, Ordering::SeqCst);
    receiver.until_accepted(6).await;
    until_all_marked(&store).await;
    stop(deliveries).await;
    assert_in_order(&receiver, 3);
}

#[tokio::test]
async fn a_redirect_is_a_failure_and_is_not_followed() {
    let elsewhere = Receiver::accepting().await;
    let redirect = Reply::With(307, "location", elsewhere.url());
    arrives_in_order_although(1, redirect).await;
    assert_eq!(elsewhere.received().len(), 0);
}

#[tokio::test]
async fn a_receiver_that_closes_before_its_answer_gets_it_again() {
    arrives_in_order_although(2, Reply::Close).await;
}

#[tokio::test]
async fn a_receiver_that_hangs_gets_it_again() {
    arrives_in_order_although(1, Reply::Hang).await;
}

#[tokio::test]
async fn a_good_answer_that_is_cut_off_or_endless_is_good() {
    for reply in [Reply::Cut, Reply::Endless] {
        let answer = reply.clone();
        let receiver = Receiver::start(move |_| answer.clone()).await;
        let store = MemoryStore::new();
        let deliveries = deliver(&store, endpoint(&receiver)).await;
        for number in 0..3 {
            two_events(&store, &format!("k-{number}")).await;
        }
        receiver.until_accepted(6).await;
        until_all_marked(&store).await;
        stop(deliveries).await;
        assert_in_order(&receiver, 3);
        assert_eq!(receiver.received().len(), 6, "{reply:?}");
    }
}

#[tokio::test]
async fn a_receiver_that_was_down_gets_everything_in_order() {
    let is_down = Arc::new(AtomicBool::new(true));
    let down = is_down.clone();
    let receiver = Receiver::start(move |_| match down.load(Ordering::SeqCst) {
        true => Reply::Status(503),
        false => Reply::Status(200),
    })
    .await;
    let (_folder, store) = sqlite();
    let deliveries = deliver(&store, endpoint(&receiver)).await;
    for number in 0..30 {
        two_events(&store, &format!("k-{number}")).await;
    }
    until(&store, |state| state.parked == 60 && state.behind == 0).await;
    is_down.store(false, Ordering::SeqCst);
    receiver.until_accepted(60).await;
    until_all_marked(&store).await;
    stop(deliveries).await;
    assert_in_order(&receiver, 30);
}

#[tokio::test]
async fn an_action_that_hangs_holds_up_no_other() {
    let receiver = Receiver::start(|message| match message.key().starts_with("bad") {
        true => Reply::Hang,
        false => Reply::Status(200),
    })
    .await;
    let store = MemoryStore::new();
    let deliveries = outbox(endpoint(&receiver))
        .request_timeout(Duration::from_secs(20))
        .start(store.clone())
        .await
        .unwrap();
    // More than may be sent at once, and ahead of all others.
    for number in 0..20 {
        submit(&store, &format!("bad-{number}")).await;
    }
    let begun = Instant::now();
    for number in 0..600 {
        two_events(&store, &format!("k-{number}")).await;
    }
    receiver.until_accepted(1200).await;
    // The hanging ones would take 40 s.
    assert!(
        begun.elapsed() < Duration::from_secs(18),
        "{:?}",
        begun.elapsed()
    );
    until(&store, |state| state.behind == 0 && state.parked == 20).await;
    drop(deliveries);
}

#[tokio::test]
async fn what_failed_is_sent_again_although_others_are_slow() {
    let failed = AtomicBool::new(false);
    let receiver = Receiver::start(move |message| match message.key().as_str() {
        "failing" if !failed.swap(true, Ordering::SeqCst) => Reply::Status(500),
        "failing" => Reply::Status(204),
        _ => Reply::Hang,
    });
    let receiver = receiver.await;
    let store = MemoryStore::new();
    submit(&store, "failing").await;
    let outbox = outbox(endpoint(&receiver))
        .backoff(Backoff::constant(Duration::from_secs(3)))
        .request_timeout(Duration::from_secs(20))
        // What hangs is given up once its time is over, and not before.
        .give_up_after(Duration::ZERO);
    let deliveries = outbox.start(store.clone()).await.unwrap();
    receiver.until(|received| received.len() == 1).await;
    for number in 0..40 {
        submit(&store, &format!("slow-{number}")).await;
    }
    receiver.until_accepted(1).await;
    assert_eq!(state(&store).await.dead, 0);
    drop(deliveries);
}

/// A receiver that never comes to its answer. Returns its URL, and how many bytes it was rid of.
fn interim_answers() -> (String, Arc<AtomicUsize>) {
    use std::io::{Read, Write};

    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/hook", listener.local_addr().unwrap());
    let sent = Arc::new(AtomicUsize::new(0));
    let count = sent.clone();
    // On a thread of its own: what is tested is that the other side's threads are left alone.
    std::thread::spawn(move || {
        // So many at once that there is always more to be read.
        let answers = b"HTTP/1.1 102 Processing\r\n\r\n".repeat(40_000);
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let _ = stream.read(&mut [0; 16 * 1024]);
            while let Ok(bytes) = stream.write(&answers) {
                count.fetch_add(bytes, Ordering::SeqCst);
            }
        }
    });
    (url, sent)
}

#[tokio::test]
async fn interim_answers_without_end_neither_hold_a_thread_nor_outlast_the_attempt() {
    let store = MemoryStore::new();
    submit(&store, "k").await;
    let (url, sent) = interim_answers();
    let endpoint = Endpoint::standard("a", &url, vec![secret(SECRET)]).unwrap();
    let outbox = outbox(endpoint.start(Start::Oldest))
        .backoff(Backoff::constant(DAY))
        .request_timeout(Duration::from_millis(100));
    let deliveries = outbox.start(store.clone()).await.unwrap();
    until(&store, |state| state.parked == 1).await;
    // Had they all been taken that were there, the timeout would have had no turn.
    let sent = sent.load(Ordering::SeqCst);
    assert!(sent < 30 << 20, "{sent}");
    stop(deliveries).await;
}

#[tokio::test]
async fn retry_after_is_a_floor() {
    let seen = AtomicUsize::new(0);
    let receiver = Receiver::start(move |_| match seen.fetch_add(1, Ordering::SeqCst) {
        0 => Reply::With(429, "retry-after", "1".to_owned()),
        _ => Reply::Status(200),
    })
    .await;
    let store = MemoryStore::new();
    let deliveries = deliver(&store, endpoint(&receiver)).await;
    submit(&store, "k").await;
    receiver.until_accepted(1).await;
    stop(deliveries).await;
    let received = receiver.received();
    assert_eq!(received.len(), 2);
    let waited = received[1].at - received[0].at;
    assert!(waited >= Duration::from_secs(1), "{waited:?}");
}

#[tokio::test]
async fn gone_stops_the_endpoint_until_it_is_resumed() {
    let is_gone = Arc::new(AtomicBool::new(true));
    let gone = is_gone.clone();
    let receiver = Receiver::start(move |message| {
        match gone.load(Ordering::SeqCst) && message.key() == "k-2" {
            true => Reply::Status(410),
            false => Reply::Status(200),
        }
    })
    .await;
    let (_folder, store) = sqlite();
    let deliveries = deliver(&store, endpoint(&receiver)).await;
    submit(&store, "k-1").await;
    receiver.until_accepted(1).await;
    submit(&store, "k-2").await;
    until(&store, |state| state.stopped_at.is_some()).await;
    submit(&store, "k-3").await;
    sleep(Duration::from_millis(300)).await;
    assert_eq!(receiver.received().len(), 2, "nothing more is sent");
    is_gone.store(false, Ordering::SeqCst);
    let endpoint = "a".to_owned();
    store.resume(Resume { endpoint }).await.unwrap();
    receiver.until_accepted(3).await;
    until_all_marked(&store).await;
    stop(deliveries).await;
}

#[tokio::test]
async fn a_clock_that_was_set_back_delays_no_attempt_by_more_than_the_longest_wait() {
    let is_bad = Arc::new(AtomicBool::new(true));
    let bad = is_bad.clone();
    let receiver = Receiver::start(move |_| match bad.swap(false, Ordering::SeqCst) {
        true => Reply::Status(500),
        false => Reply::Status(200),
    })
    .await;
    let (clock, folder) = (Clock::new(), TempDir::new().unwrap());
    let path = folder.path().join("aegis.db");
    let store = SqliteStore::open_with(&path, clock.clone()).unwrap();
    clock.advance(30 * DAY);
    let outbox = outbox(endpoint(&receiver)).backoff(Backoff::constant(DAY));
    let deliveries = outbox.start(store.clone()).await.unwrap();
    submit(&store, "k").await;
    until(&store, |state| state.parked == 1).await;
    sleep(Duration::from_millis(300)).await;
    assert_eq!(receiver.received().len(), 1, "it is due in a day");
    clock.set_back(30 * DAY);
    receiver.until_accepted(1).await;
    until_all_marked(&store).await;
    stop(deliveries).await;
}

#[tokio::test]
async fn endpoints_that_are_replaced_begin_end_and_go_on() {
    let [old, new, other] = [
        Receiver::accepting().await,
        Receiver::accepting().await,
        Receiver::accepting().await,
    ];
    let named = |name: &str, receiver: &Receiver, text: &str| {
        let made = Endpoint::standard(name, &receiver.url(), vec![secret(text)]);
        made.unwrap().start(Start::Oldest)
    };
    let store = MemoryStore::new();
    let (sender, endpoints) = tokio::sync::watch::channel(vec![named("a", &old, SECRET)]);
    let outbox = Outbox::watched(endpoints).poll_interval(Duration::from_millis(50));
    let deliveries = outbox.start(store.clone()).await.unwrap();
    submit(&store, "k-1").await;
    old.until_accepted(1).await;
    until_all_marked(&store).await;

    // Another URL and another secret, and a new endpoint.
    sender.send_replace(vec![
        named("a", &new, OTHER_SECRET),
        named("b", &other, SECRET),
    ]);
    other.until_accepted(1).await;
    until(&store, |state| state.name == "b" && state.behind == 0).await;
    submit(&store, "k-2").await;
    new.until_accepted(1).await;
    other.until_accepted(2).await;
    let message = &new.received()[0];
    assert_eq!(message.key(), "k-2", "it goes on where it was");
    let verifier = Webhook::new(OTHER_SECRET).unwrap();
    verifier
        .verify(message.body.as_bytes(), &message.headers)
        .unwrap();

    // One that is gone is left to others.
    sender.send_replace(vec![named("b", &other, SECRET)]);
    let begun = Instant::now();
    while store.endpoints().await.unwrap()[0].held_until.is_some() {
        assert!(begun.elapsed() < HANG);
        sleep(Duration::from_millis(10)).await;
    }
    submit(&store, "k-3").await;
    other.until_accepted(3).await;
    assert_eq!((old.received().len(), new.received().len()), (1, 1));
    // It goes on where it was.
    sender.send_replace(vec![named("a", &new, SECRET), named("b", &other, SECRET)]);
    new.until_accepted(2).await;
    assert_eq!(new.received()[1].key(), "k-3");
    // The last sender is gone, and deliveries go on.
    drop(sender);
    submit(&store, "k-4").await;
    new.until_accepted(3).await;
    other.until_accepted(4).await;
    stop(deliveries).await;
    let held = store.endpoints().await.unwrap();
    assert!(held.iter().all(|state| state.held_until.is_none()));
}

#[tokio::test]
async fn endpoints_that_cannot_be_leave_those_before_in_force() {
    let log = Log::capture(tracing::Level::ERROR);
    let receiver = Receiver::accepting().await;
    let store = MemoryStore::new();
    let (sender, endpoints) = tokio::sync::watch::channel(vec![endpoint(&receiver)]);
    let outbox = Outbox::watched(endpoints).poll_interval(Duration::from_millis(50));
    let deliveries = outbox.start(store.clone()).await.unwrap();
    let twice = vec![endpoint(&receiver), endpoint(&receiver)];
    let chat = Endpoint::slack("chat", "http://127.0.0.1:9/token").unwrap();
    for (wrong, shown) in [
        (twice, "has the name of another one"),
        (vec![chat], "need the server's public URL"),
    ] {
        let before = receiver.received().len();
        sender.send_replace(wrong);
        let begun = Instant::now();
        while !log.text().contains(shown) {
            assert!(begun.elapsed() < HANG, "{}", log.text());
            sleep(Duration::from_millis(10)).await;
        }
        submit(&store, &format!("k-{before}")).await;
        receiver.until_accepted(before + 1).await;
    }
    assert!(log.text().contains("stay in force"), "{}", log.text());
    assert!(!log.text().contains("token"), "{}", log.text());
    stop(deliveries).await;
}

#[tokio::test]
async fn an_endpoint_that_is_replaced_ends_its_requests_first() {
    let receiver = Receiver::start(|_| Reply::Hang).await;
    let next = Receiver::accepting().await;
    let store = MemoryStore::new();
    let (sender, endpoints) = tokio::sync::watch::channel(vec![endpoint(&receiver)]);
    let outbox = Outbox::watched(endpoints)
        .backoff(Backoff::constant(Duration::from_millis(30)))
        .poll_interval(Duration::from_millis(50))
        .request_timeout(Duration::from_secs(1));
    let deliveries = outbox.start(store.clone()).await.unwrap();
    submit(&store, "k").await;
    receiver.until(|received| received.len() == 1).await;
    // Of two changes in a row, the last one counts.
    sender.send_replace(vec![]);
    sender.send_replace(vec![endpoint(&next)]);
    next.until_accepted(1).await;
    assert_eq!(receiver.received()[0].id(), next.received()[0].id());
    let waited = next.received()[0].at - receiver.received()[0].at;
    assert!(waited >= Duration::from_secs(1), "{waited:?}");
    stop(deliveries).await;
}

#[tokio::test]
async fn after_a_day_an_event_is_a_dead_letter_and_can_be_resent() {
    let is_bad = Arc::new(AtomicBool::new(true));
    let bad = is_bad.clone();
    let receiver = Receiver::start(move |message| {
        match bad.load(Ordering::SeqCst) && message.kind() == "submitted" && message.key() == "bad"
        {
            true => Reply::Status(400),
            false => Reply::Status(200),
        }
    })
    .await;
    let folder = TempDir::new().unwrap();
    let clock = Clock::new();
    let path = folder.path().join("aegis.db");
    let store = SqliteStore::open_with(&path, clock.clone()).unwrap();
    let deliveries = deliver(&store, endpoint(&receiver)).await;
    two_events(&store, "bad").await;
    two_events(&store, "good").await;
    receiver.until(|received| received.len() > 5).await;
    until(&store, |state| state.parked == 2 && state.behind == 0).await;
    clock.advance(DAY - Duration::from_secs(60));
    let before = receiver.received().len();
    receiver.until(|received| received.len() > before + 2).await;
    assert_eq!(state(&store).await.dead, 0, "the day is not over");
    clock.advance(Duration::from_secs(60));
    // Its successor goes on without it.
    receiver.until_accepted(3).await;
    until(&store, |state| state.dead == 1 && state.parked == 0).await;
    let letters = store.dead_letters("a", 10).await.unwrap();
    assert_eq!(letters[0].failure, "status 400");
    assert!(letters[0].attempts > 5);
    let attempts = receiver.received().len();
    sleep(Duration::from_millis(300)).await;
    assert_eq!(receiver.received().len(), attempts);

    is_bad.store(false, Ordering::SeqCst);
    let resend = Resend {
        endpoint: "a".to_owned(),
        events: None,
    };
    // By a command beside the server.
    let resent = SqliteStore::resend_beside(&path, &resend).unwrap();
    assert_eq!(resent, Resent::Parked(1));
    receiver.until_accepted(4).await;
    until(&store, |state| state.dead == 0 && state.parked == 0).await;
    let last = receiver.received().pop().unwrap();
    assert_eq!(last.id(), letters[0].event.id.as_str());
    stop(deliveries).await;
}

#[tokio::test]
async fn what_was_delivered_and_not_marked_is_delivered_again_under_its_id() {
    let (folder, store) = sqlite();
    let faulty = Faulty::new(store.clone(), Mood::Well);
    let failing = faulty.clone();
    let receiver = Receiver::start(move |_| {
        failing.set(Mood::Fails);
        Reply::Status(200)
    })
    .await;
    let deliveries = deliver(&faulty, endpoint(&receiver)).await;
    two_events(&store, "k").await;
    receiver.until_accepted(1).await;
    let asked = faulty.asked();
    while faulty.asked() < asked + 1 {
        sleep(Duration::from_millis(10)).await;
    }
    // As a kill: nothing is marked, and nothing is given up.
    drop(deliveries);
    assert_eq!(state(&store).await.position, 0);
    store.close().await;
    let before = receiver.received();

    let store = SqliteStore::open(folder.path().join("aegis.db")).unwrap();
    let deliveries = deliver(&store, endpoint(&receiver)).await;
    receiver.until_accepted(2).await;
    until_all_marked(&store).await;
    stop(deliveries).await;
    assert_in_order(&receiver, 1);
    let received = receiver.received();
    let again = &received[before.len()];
    assert_eq!(again.id(), before[0].id(), "the first is sent again");
    assert_eq!(again.json()["data"]["id"], before[0].id());
    let verifier = Webhook::new(SECRET).unwrap();
    verifier
        .verify(again.body.as_bytes(), &again.headers)
        .unwrap();
}

#[tokio::test]
async fn a_store_that_fails_for_a_while_loses_nothing() {
    let receiver = Receiver::start(fails(1, Reply::Status(500))).await;
    let store = MemoryStore::new();
    let faulty = Faulty::new(store.clone(), Mood::Well);
    let deliveries = deliver(&faulty, endpoint(&receiver)).await;
    for number in 0..5 {
        two_events(&store, &format!("bad-{number}")).await;
        faulty.set(Mood::Fails);
        two_events(&store, &format!("k-{number}")).await;
        faulty.arrived().await;
        faulty.set(Mood::Well);
    }
    receiver.until_accepted(20).await;
    until_all_marked(&store).await;
    stop(deliveries).await;
    assert_in_order(&receiver, 10);
}

#[tokio::test]
async fn of_two_servers_on_one_store_one_delivers_and_the_other_takes_over() {
    let receiver = Receiver::accepting().await;
    let store = MemoryStore::new();
    let one = deliver(&store, endpoint(&receiver)).await;
    until(&store, |state| state.held_until.is_some()).await;
    let other = deliver(&store, endpoint(&receiver)).await;
    for number in 0..20 {
        two_events(&store, &format!("k-{number}")).await;
    }
    receiver.until_accepted(40).await;
    stop(one).await;
    two_events(&store, "later").await;
    receiver.until_accepted(42).await;
    stop(other).await;
    assert_eq!(receiver.received().len(), 42, "no event came twice");
    assert_in_order(&receiver, 21);
}

#[tokio::test]
async fn requests_in_flight_end_within_the_time_of_a_stop() {
    let receiver = Receiver::start(|_| Reply::Hang).await;
    let store = MemoryStore::new();
    let deliveries = deliver(&store, endpoint(&receiver)).await;
    submit(&store, "k").await;
    receiver.until(|received| received.len() == 1).await;
    let begun = Instant::now();
    ends(deliveries.stop(Duration::from_millis(400))).await;
    // A request may take 10 s.
    assert!(begun.elapsed() < Duration::from_secs(8));
    // What was abandoned is not done, and the endpoint is free for the next server.
    let state = state(&store).await;
    assert_eq!((state.position, state.parked), (0, 0));
    assert_eq!(state.held_until, None);
}

#[tokio::test]
async fn what_a_stop_lets_end_is_not_sent_again() {
    let receiver = Receiver::accepting().await;
    let store = MemoryStore::new();
    for round in 0..5 {
        let deliveries = deliver(&store, endpoint(&receiver)).await;
        two_events(&store, &format!("k-{round}")).await;
        receiver.until(|received| received.len() > 2 * round).await;
        stop(deliveries).await;
    }
    let deliveries = deliver(&store, endpoint(&receiver)).await;
    receiver.until_accepted(10).await;
    stop(deliveries).await;
    assert_eq!(receiver.received().len(), 10);
    assert_in_order(&receiver, 5);
}

#[tokio::test]
async fn an_endpoint_that_is_down_parks_no_more_than_the_limit() {
    let is_down = Arc::new(AtomicBool::new(true));
    let down = is_down.clone();
    let receiver = Receiver::start(move |_| match down.load(Ordering::SeqCst) {
        true => Reply::Status(503),
        false => Reply::Status(200),
    })
    .await;
    let store = MemoryStore::new();
    let deliveries = outbox(endpoint(&receiver)).parked_limit(20);
    let deliveries = deliveries.start(store.clone()).await.unwrap();
    for number in 0..600 {
        two_events(&store, &format!("k-{number}")).await;
    }
    until(&store, |state| state.parked >= 20).await;
    receiver.until(|received| received.len() > 1500).await;
    let state = state(&store).await;
    // 512 may be read before the first failure.
    assert!(state.parked <= 20 + 512 && state.behind > 600, "{state:?}");
    is_down.store(false, Ordering::SeqCst);
    receiver.until_accepted(1200).await;
    until_all_marked(&store).await;
    stop(deliveries).await;
    assert_in_order(&receiver, 600);
}

/// What the receiver does is drawn, the store fails now and then, and the server is killed in the
/// middle, again and again.
#[tokio::test]
async fn whatever_fails_everything_arrives_in_order() {
    for seed in 1..=2_u64 {
        let state = std::sync::Mutex::new(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15));
        let draw = move |sides: u64| {
            let mut state = state.lock().unwrap();
            // xorshift64
            *state ^= *state << 13;
            *state ^= *state >> 7;
            *state ^= *state << 17;
            *state % sides
        };
        let draw = Arc::new(draw);
        let drawn = draw.clone();
        let receiver = Receiver::start(move |_| match drawn(12) {
            0 => Reply::Status(500),
            1 => Reply::Close,
            2 => Reply::Hang,
            3 => Reply::With(429, "retry-after", "0".to_owned()),
            4 => Reply::Cut,
            _ => Reply::Status(200),
        })
        .await;
        let (folder, mut store) = sqlite();
        let path = folder.path().join("aegis.db");
        for life in 0..6 {
            let faulty = Faulty::new(store.clone(), Mood::Well);
            let outbox = outbox(endpoint(&receiver)).request_timeout(Duration::from_millis(200));
            let deliveries = outbox.start(faulty.clone()).await.unwrap();
            for number in 0..10 {
                two_events(&store, &format!("k-{life}-{number}")).await;
                if draw(4) == 0 {
                    faulty.set(Mood::Fails);
                }
                sleep(Duration::from_millis(draw(30))).await;
                faulty.set(Mood::Well);
            }
            if draw(2) == 0 {
                drop(deliveries);
            } else {
                stop(deliveries).await;
            }
            store.close().await;
            store = SqliteStore::open(&path).unwrap();
        }
        let outbox = outbox(endpoint(&receiver)).request_timeout(Duration::from_millis(200));
        let deliveries = outbox.start(store.clone()).await.unwrap();
        receiver.until_accepted(120).await;
        until_all_marked(&store).await;
        stop(deliveries).await;
        store.close().await;
        assert_in_order(&receiver, 60);
        let verified = SqliteStore::verify(&path).unwrap();
        assert_eq!(verified.faults, Vec::<String>::new(), "seed {seed}");
    }
}

#[tokio::test]
async fn notifications_link_to_the_page_and_need_its_url() {
    let receiver = Receiver::accepting().await;
    let store = MemoryStore::new();
    let slack = Endpoint::slack("chat", &receiver.url()).unwrap();
    let error = outbox(slack.clone())
        .start(store.clone())
        .await
        .unwrap_err();
    assert!(error.to_string().contains("'chat'"), "{error}");
    let public = PublicUrl::new("https://aegis.example.com/").unwrap();
    let ntfy = Endpoint::ntfy("phone", &receiver.url()).unwrap();
    let both = vec![slack.start(Start::Oldest), ntfy.start(Start::Oldest)];
    let outbox = Outbox::new(both).public_url(public);
    let deliveries = outbox.start(store.clone()).await.unwrap();
    submit_to(&store, "acme", "k", "Pay <https://evil.example|Approve>").await;
    approve(&store, "k").await;
    receiver.until(|received| received.len() == 2).await;
    stop(deliveries).await;
    let received = receiver.received();
    assert_eq!(received.len(), 2, "an approval asks nobody for anything");
    let events = store.all_events(0, 10).await.unwrap();
    let id = &events[0].1.action.as_ref().unwrap().request_id;
    let page = format!("https://aegis.example.com/actions/{id}");
    let is_chat = |body: &str| body.starts_with('{');
    let chat = received
        .iter()
        .find(|message| is_chat(&message.body))
        .unwrap();
    let text = chat.json()["text"].as_str().unwrap().to_owned();
    assert!(text.ends_with(&page) && !text.contains('<'), "{text}");
    let phone = received
        .iter()
        .find(|message| !is_chat(&message.body))
        .unwrap();
    assert_eq!(phone.header("click"), page);
    assert!(!phone.body.contains("://"), "{}", phone.body);
}

#[cfg(feature = "tls")]
#[tokio::test]
async fn a_receiver_without_tls_gets_nothing_by_https() {
    let plain = Raw::start(|_, mut stream| async move {
        let _ = stream
            .write_all(b"HTTP/1.1 400 no\r\ncontent-length: 0\r\n\r\n")
            .await;
        let _ = stream.read_to_end(&mut Vec::new()).await;
    })
    .await;
    let store = MemoryStore::new();
    let url = format!("https://{}/", plain.address);
    let endpoint = Endpoint::standard("a", &url, vec![secret(SECRET)]).unwrap();
    let deliveries = outbox(endpoint.start(Start::Oldest)).give_up_after(Duration::ZERO);
    let deliveries = deliveries.start(store.clone()).await.unwrap();
    submit(&store, "k").await;
    until(&store, |state| state.dead == 1).await;
    let letters = store.dead_letters("a", 1).await.unwrap();
    assert!(
        letters[0].failure.starts_with("no connection: TLS failed"),
        "{letters:?}"
    );
    stop(deliveries).await;
}

#[cfg(feature = "tls")]
#[tokio::test]
async fn a_receiver_with_a_private_ca_is_trusted_once_that_ca_is() {
    let (identity, other) = (Certified::new(), Certified::new());
    let both = format!("{}{}", other.certificate, identity.certificate);
    for (roots, accepted) in [
        (Some(&identity.certificate), 1),
        (Some(&both), 1),
        (Some(&other.certificate), 0),
        (None, 0),
    ] {
        let receiver = Receiver::accepting_by_tls(&identity).await;
        let store = MemoryStore::new();
        let url = receiver.https_url();
        let mut endpoint = Endpoint::standard("a", &url, vec![secret(SECRET)]).unwrap();
        if let Some(roots) = roots {
            endpoint = endpoint.root_certificates_pem(roots.as_bytes()).unwrap();
        }
        let deliveries = outbox(endpoint.start(Start::Oldest)).give_up_after(Duration::ZERO);
        let deliveries = deliveries.start(store.clone()).await.unwrap();
        submit(&store, "k").await;
        match accepted {
            0 => until(&store, |state| state.dead == 1).await,
            _ => until_all_marked(&store).await,
        };
        assert_eq!(receiver.accepted().len(), accepted);
        for letter in store.dead_letters("a", 1).await.unwrap() {
            assert!(letter.failure.contains("TLS failed"), "{letter:?}");
        }
        stop(deliveries).await;
    }
}

#[cfg(feature = "tls")]
#[test]
fn roots_that_are_none_are_refused() {
    let pem = Certified::new().certificate;
    let endpoint = |url| Endpoint::standard("a", url, vec![secret(SECRET)]).unwrap();
    for (url, pem, shown) in [
        ("https://h/", "", "no certificate"),
        ("https://h/", "hello", "no certificate"),
        (
            "https://h/",
            "-----BEGIN CERTIFICATE-----\n???\n-----END CERTIFICATE-----\n",
            "not valid PEM",
        ),
        (
            "https://h/",
            "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
            "no valid certificate",
        ),
        ("http://h/", &pem, "https://"),
    ] {
        let error = endpoint(url).root_certificates_pem(pem.as_bytes());
        let error = error.unwrap_err().to_string();
        assert!(error.contains(shown), "{shown}: {error}");
    }
}

#[tokio::test]
async fn a_receiver_that_is_not_there_is_a_failure() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/", listener.local_addr().unwrap());
    drop(listener);
    let store = MemoryStore::new();
    let endpoint = Endpoint::standard("a", &url, vec![secret(SECRET)]).unwrap();
    let deliveries = outbox(endpoint.start(Start::Oldest)).give_up_after(Duration::ZERO);
    let deliveries = deliveries.start(store.clone()).await.unwrap();
    submit(&store, "k").await;
    until(&store, |state| state.dead == 1).await;
    let letters = store.dead_letters("a", 1).await.unwrap();
    assert_eq!(letters[0].failure, "no connection: connection refused");
    stop(deliveries).await;
}

#[tokio::test]
async fn two_endpoints_of_one_name_are_refused() {
    let receiver = Receiver::accepting().await;
    let both = vec![endpoint(&receiver), endpoint(&receiver)];
    let error = Outbox::new(both).check().unwrap_err();
    assert!(error.to_string().contains("'a'"), "{error}");
}

#[tokio::test]
async fn the_log_names_endpoint_status_and_attempt_and_nothing_secret() {
    let log = Log::capture(tracing::Level::TRACE);
    let receiver = Receiver::start(fails(1, Reply::Status(500))).await;
    let store = MemoryStore::new();
    let url = format!("{}/path-token?query-token", receiver.url());
    let endpoint = Endpoint::standard("billing", &url, vec![secret(SECRET)]).unwrap();
    let deliveries = deliver(&store, endpoint.start(Start::Oldest)).await;
    submit_to(&store, "acme", "bad", "the-title").await;
    receiver.until_accepted(1).await;
    until_all_marked(&store).await;
    stop(deliveries).await;
    let text = log.text();
    let ours: Vec<_> = text
        .lines()
        .filter(|line| line.contains("aegis_hitl"))
        .collect();
    let ours = ours.join("\n");
    for shown in [
        "endpoint=\"billing\"",
        "status 500",
        "attempt=1",
        "attempt=2",
        "status=200",
    ] {
        assert!(ours.contains(shown), "{shown}: {ours}");
    }
    for secret in [
        "path-token",
        "query-token",
        "the-title",
        &SECRET[6..],
        "/hook",
    ] {
        assert!(!ours.contains(secret), "{secret}: {ours}");
    }
}
