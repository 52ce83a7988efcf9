//! What operators read of a server, over real sockets.

use std::net::{SocketAddr, TcpListener};
use std::time::{Duration, Instant};

use aegis_hitl::layer::Backoff;
use aegis_hitl::outbox::{Endpoint, Outbox, Start};
use aegis_hitl::server::{Auth, Keys, Reloads, Server};
use aegis_hitl::store::{Clock, MemoryStore, SqliteStore, Store, Sweep, TakeEndpoint};
use aegis_hitl::{ApiKey, Payload, protocol::Digest};
use serde_json::json;
use tempfile::TempDir;
use uuid::Uuid;

use super::support::receiver::{Receiver, Reply as Answer};
use super::support::{Call, Disk, Faulty, HANG, Mood, Reply, Running, start, start_with};

const PAYLOAD: &str = r#"{"to":"a@b.c"}"#;

async fn scrape(addr: SocketAddr) -> String {
    let reply = Call::new(addr, "GET", "/metrics").send().await;
    assert_eq!(reply.status, 200, "{reply:?}");
    assert_eq!(
        reply.header("content-type"),
        Some("text/plain; version=0.0.4; charset=utf-8")
    );
    String::from_utf8(reply.body.to_vec()).unwrap()
}

/// The value of one line.
fn value(text: &str, series: &str) -> f64 {
    let mut lines = text.lines().filter_map(|line| line.rsplit_once(' '));
    let found = lines.find(|(name, _)| *name == series);
    let (_, value) = found.unwrap_or_else(|| panic!("no {series}: {text}"));
    value.parse().unwrap()
}

async fn about(server: &Running, id: &str, verb: &str) -> Reply {
    let digest = Digest::of(&Payload::from_json(PAYLOAD).unwrap()).unwrap();
    let path = format!("/api/v1/hitl/actions/{id}/{verb}");
    let call = Call::new(server.addr, "POST", path).header("Tenant-Id", "t");
    let body = json!({ "digest": digest.to_string() });
    call.json(body.to_string()).send().await
}

/// A server with an address of its own for metrics.
async fn start_with_metrics<St: Store>(store: St, auth: Auth) -> (Running, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let addr = listener.local_addr().unwrap();
    let listener = tokio::net::TcpListener::from_std(listener).unwrap();
    let with_metrics = |server: Server| server.metrics_listener(listener);
    let server = start_with(store, |service| service.auth(auth), with_metrics).await;
    (server, addr)
}

fn keys() -> Auth {
    let digest = Keys::digest(&ApiKey::new("sk-acme").unwrap());
    Auth::keys(Keys::parse(&format!("{digest} acme alice decide")).unwrap())
}

#[tokio::test]
async fn the_numbers_are_those_of_what_happened() {
    let server = start(Disk::default()).await;
    let before = scrape(server.addr).await;
    assert_eq!(value(&before, "aegis_store_ready"), 1.0);
    assert_eq!(value(&before, "aegis_oldest_pending_seconds"), 0.0);
    assert_eq!(value(&before, "aegis_oldest_unclaimed_seconds"), 0.0);
    assert!(!before.contains("aegis_requests_total{"));

    assert_eq!(server.approve("k-1").send().await.status, 202);
    assert_eq!(server.approve("k-1").send().await.status, 409);
    assert_eq!(server.reject("k-2").send().await.status, 202);
    let submit = |key: &str| server.submit(key).json(PAYLOAD);
    let claimed = submit("k-3").send().await.request_id();
    assert_eq!(about(&server, &claimed, "approve").await.status, 202);
    assert_eq!(about(&server, &claimed, "claim").await.status, 200);
    let unclaimed = submit("k-4").send().await.request_id();
    assert_eq!(about(&server, &unclaimed, "approve").await.status, 202);
    submit("k-5").send().await;
    assert_eq!(server.get("/nowhere").send().await.status, 404);

    let text = scrape(server.addr).await;
    for (series, expected) in [
        (
            r#"aegis_requests_total{endpoint="approve",status="202"}"#,
            1.0,
        ),
        (
            r#"aegis_requests_total{endpoint="approve",status="409"}"#,
            1.0,
        ),
        (
            r#"aegis_requests_total{endpoint="submit",status="201"}"#,
            3.0,
        ),
        (
            r#"aegis_requests_total{endpoint="claim",status="200"}"#,
            1.0,
        ),
        (r#"aegis_requests_total{endpoint="none",status="404"}"#, 1.0),
        (
            r#"aegis_request_duration_seconds_count{endpoint="approve"}"#,
            2.0,
        ),
        (
            r#"aegis_request_duration_seconds_bucket{endpoint="approve",le="+Inf"}"#,
            2.0,
        ),
        (r#"aegis_decisions_total{decision="approve"}"#, 3.0),
        (r#"aegis_decisions_total{decision="reject"}"#, 1.0),
        ("aegis_claims_total", 1.0),
        (r#"aegis_events_total{event="submitted"}"#, 3.0),
        (r#"aegis_events_total{event="expired"}"#, 0.0),
        ("aegis_store_queued_requests", 0.0),
    ] {
        assert_eq!(value(&text, series), expected, "{series}: {text}");
    }
    assert!(value(&text, "aegis_connections") >= 1.0);
    assert!(value(&text, "aegis_oldest_pending_seconds") > 0.0);
    assert!(value(&text, "aegis_oldest_unclaimed_seconds") > 0.0);
    let commits = value(&text, "aegis_store_commit_duration_seconds_count");
    let requests = value(&text, "aegis_store_committed_requests_total");
    assert!(commits >= 1.0 && requests >= commits, "{text}");
    assert!(value(&text, "aegis_store_commit_duration_seconds_sum") > 0.0);
    let version = format!(
        r#"aegis_build_info{{version="{}"}}"#,
        env!("CARGO_PKG_VERSION")
    );
    assert_eq!(value(&text, &version), 1.0);
}

#[tokio::test]
async fn no_tenant_key_or_id_is_in_the_metrics() {
    let server = start(Disk::default()).await;
    let call = Call::new(server.addr, "POST", "/api/v1/hitl/approve");
    let call = call.header("Tenant-Id", "tenant-secret");
    let call = call.header("Thread-Id", "thread-secret");
    let call = call.header("Idempotency-Key", "key-secret");
    let call = call.header("X-Request-Id", "call-secret");
    let id = call
        .json(r#"{"payload":"secret"}"#)
        .send()
        .await
        .request_id();
    let call = server.get("/api/v1/hitl/status/path-secret?query-secret");
    assert_eq!(call.send().await.status, 404);
    let call = server.get("/api/v1/hitl/method-secret").method("SECRET");
    call.send().await;
    let text = scrape(server.addr).await.to_lowercase();
    assert!(!text.contains("secret") && !text.contains(&id), "{text}");
}

#[tokio::test]
async fn without_keys_metrics_are_served_to_own_hosts_by_get_alone() {
    let server = start(Disk::default()).await;
    let call = || server.get("/metrics");
    assert_eq!(call().host("evil.example").send().await.status, 421);
    assert_eq!(call().method("POST").send().await.status, 405);
    let head = call().method("HEAD").send().await;
    assert_eq!((head.status, head.body.len()), (200, 0));
    assert_eq!(server.get("/metrics/").send().await.status, 200);
}

#[tokio::test]
async fn with_keys_metrics_have_an_address_of_their_own() {
    let (server, metrics) = start_with_metrics(Disk::default(), keys()).await;
    for call in [
        server.get("/metrics"),
        server
            .get("/metrics")
            .header("Authorization", "Bearer sk-acme"),
    ] {
        assert_eq!(call.send().await.status, 404);
    }
    let call = server.approve("k").without("Tenant-Id");
    let call = call.header("Authorization", "Bearer sk-acme");
    assert_eq!(call.send().await.status, 202);
    let text = scrape(metrics).await;
    assert_eq!(
        value(&text, r#"aegis_decisions_total{decision="approve"}"#),
        1.0
    );
    assert!(!text.contains("acme") && !text.contains("alice"), "{text}");

    // Nothing else is served there, under any credential, and the scraper may use any name.
    let call = Call::new(metrics, "GET", "/metrics").host("metrics.internal");
    assert_eq!(call.send().await.status, 200);
    assert_eq!(Call::new(metrics, "GET", "/livez").send().await.status, 200);
    let call = Call::post(metrics, "approve", "k").without("Tenant-Id");
    let call = call.header("Authorization", "Bearer sk-acme");
    assert_eq!(call.send().await.status, 404);
    for path in ["/", "/readyz", "/api/v1/hitl/actions"] {
        assert_eq!(Call::new(metrics, "GET", path).send().await.status, 404);
    }

    // It is closed with the server.
    assert!(server.stop().await.is_drained());
    assert!(tokio::net::TcpStream::connect(metrics).await.is_err());
}

#[tokio::test(start_paused = true)]
async fn a_scrape_is_answered_while_the_store_is_out() {
    let store = Faulty::new(aegis_hitl::store::MemoryStore::new(), Mood::Well);
    let (server, metrics) = start_with_metrics(store.clone(), Auth::tenant_header()).await;
    assert_eq!(server.approve("k").send().await.status, 202);
    for mood in [Mood::Fails, Mood::Hangs] {
        store.set(mood);
        let text = scrape(metrics).await;
        assert_eq!(value(&text, "aegis_store_ready"), 0.0, "{mood:?}");
        assert_eq!(
            value(&text, r#"aegis_decisions_total{decision="approve"}"#),
            1.0
        );
        assert!(!text.contains("aegis_oldest"), "{text}");
    }
    store.set(Mood::Well);
    let text = scrape(metrics).await;
    assert_eq!(value(&text, "aegis_store_ready"), 1.0);
}

/// Scrapes until it is so.
async fn until(addr: SocketAddr, is: impl Fn(&str) -> bool) -> String {
    let begun = Instant::now();
    loop {
        let text = scrape(addr).await;
        if is(&text) {
            return text;
        }
        assert!(begun.elapsed() < HANG, "{text}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn the_endpoints_of_this_server_are_shown_and_those_of_others_are_not() {
    let good = Receiver::accepting().await;
    let bad = Receiver::start(|_| Answer::Status(500)).await;
    let gone = Receiver::start(|_| Answer::Status(410)).await;
    let store = MemoryStore::new();
    let left = TakeEndpoint {
        endpoint: "left".to_owned(),
        start: Start::Oldest,
        holder: Uuid::new_v4(),
        lease: Duration::from_secs(60),
    };
    store.take_endpoint(left).await.unwrap();
    let endpoints = [("good", &good), ("bad", &bad), ("gone", &gone)];
    let secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
    let endpoints = endpoints.map(|(name, receiver)| {
        let secrets = vec![secret.parse().unwrap()];
        Endpoint::standard(name, &receiver.url(), secrets).unwrap()
    });
    let outbox = Outbox::new(endpoints.to_vec())
        .poll_interval(Duration::from_millis(50))
        .backoff(Backoff::constant(Duration::from_millis(20)))
        .give_up_after(Duration::from_millis(1));
    let tally = outbox.tally();
    let server = start_with(store.clone(), |service| service.webhooks(tally), |it| it).await;
    let deliveries = outbox.start(store).await.unwrap();
    assert_eq!(server.approve("k").send().await.status, 202);
    let of = |metric: &str, labels: &str| format!("{metric}{{webhook={labels}}}");
    let text = until(server.addr, |text| {
        value(text, &of("aegis_webhook_stopped", r#""gone""#)) == 1.0
            && value(text, &of("aegis_webhook_dead_events", r#""bad""#)) == 1.0
            && value(text, &of("aegis_webhook_behind_events", r#""good""#)) == 0.0
    })
    .await;
    for (labels, expected) in [
        (r#""good",outcome="delivered""#, 1.0),
        (r#""good",outcome="failed""#, 0.0),
        (r#""good",outcome="dead""#, 0.0),
        (r#""bad",outcome="delivered""#, 0.0),
        (r#""bad",outcome="dead""#, 1.0),
        (r#""gone",outcome="failed""#, 1.0),
    ] {
        let series = of("aegis_webhook_deliveries_total", labels);
        assert_eq!(value(&text, &series), expected, "{series}: {text}");
    }
    let failed = of(
        "aegis_webhook_deliveries_total",
        r#""bad",outcome="failed""#,
    );
    assert!(value(&text, &failed) >= 2.0, "{text}");
    let age = |name| value(&text, &of("aegis_webhook_behind_seconds", name));
    assert_eq!((age(r#""good""#), age(r#""bad""#)), (0.0, 0.0));
    assert!(age(r#""gone""#) > 0.0, "{text}");
    assert_eq!(
        value(&text, &of("aegis_webhook_behind_events", r#""gone""#)),
        1.0
    );
    assert!(!text.contains("left"), "{text}");
    deliveries.stop(HANG).await;
}

#[tokio::test]
async fn without_an_outbox_and_reloads_the_metrics_have_none() {
    let server = start(MemoryStore::new()).await;
    let text = scrape(server.addr).await;
    for absent in ["aegis_webhook", "aegis_reload", "aegis_tls", "aegis_audit"] {
        assert!(!text.contains(absent), "{absent}: {text}");
    }
}

#[tokio::test]
async fn reloads_are_counted_by_how_they_ended() {
    let reloads = Reloads::new();
    let shown = reloads.clone();
    let server = start_with(
        MemoryStore::new(),
        |service| service.reloads(shown),
        |it| it,
    )
    .await;
    let text = scrape(server.addr).await;
    assert_eq!(value(&text, "aegis_reload_failures_total"), 0.0);
    let start = value(&text, "aegis_reload_last_success_timestamp_seconds");
    let now = std::time::UNIX_EPOCH.elapsed().unwrap().as_secs_f64();
    assert!((now - HANG.as_secs_f64()..=now).contains(&start), "{start}");
    reloads.failed();
    reloads.succeeded();
    let text = scrape(server.addr).await;
    assert_eq!(value(&text, "aegis_reload_failures_total"), 1.0);
    let last = value(&text, "aegis_reload_last_success_timestamp_seconds");
    assert!(last >= start, "{last}");
}

#[tokio::test]
async fn tombstones_and_what_is_not_chained_are_counted() {
    let (clock, folder) = (Clock::new(), TempDir::new().unwrap());
    let path = folder.path().join("aegis.db");
    let store = SqliteStore::open_with(&path, clock.clone()).unwrap();
    let server = start(store.clone()).await;
    for key in ["k-1", "k-2", "k-3"] {
        assert_eq!(server.approve(key).send().await.status, 202);
    }
    let unchained = |text: &str| value(text, "aegis_audit_unchained_events");
    // Events are chained behind the decisions, so that the number may be any by now.
    assert!(unchained(&scrape(server.addr).await) <= 3.0);
    let text = until(server.addr, |text| unchained(text) == 0.0).await;
    assert_eq!(value(&text, "aegis_tombstones"), 0.0);
    clock.advance(Duration::from_secs(7200));
    let sweep = Sweep {
        retention: Duration::from_secs(3600),
        limit: 10,
    };
    while store.sweep(sweep.clone()).await.unwrap().has_more {}
    assert_eq!(value(&scrape(server.addr).await, "aegis_tombstones"), 2.0);
    let kept = server.approve("k-3").send().await;
    assert_eq!(kept.status, 409);
    store.close().await;
}

#[cfg(feature = "tls")]
#[tokio::test]
async fn the_end_of_the_certificate_is_that_of_new_connections() {
    use aegis_hitl::server::Tls;

    let certified = |day: u8| super::support::tls::Certified::until(2049, 5, day);
    let tls = |it: &super::support::tls::Certified| {
        Tls::from_pem(it.certificate.as_bytes(), it.key.as_bytes()).unwrap()
    };
    let (first, second) = (certified(6), certified(7));
    let (sender, watched) = tokio::sync::watch::channel(tls(&first));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let metrics = listener.local_addr().unwrap();
    let change = |server: Server| server.watched_tls(watched).metrics_listener(listener);
    let server = start_with(MemoryStore::new(), |service| service, change).await;
    let end = |text: &str| value(text, "aegis_tls_certificate_expiry_timestamp_seconds");
    // date -u -d 2049-05-06 +%s
    assert_eq!(end(&scrape(metrics).await), 2_503_872_000.0);
    sender.send_replace(tls(&second));
    until(metrics, |text| end(text) == 2_503_958_400.0).await;
    assert!(server.stop().await.is_drained());
}

#[cfg(feature = "tls")]
#[tokio::test(start_paused = true)]
async fn a_certificate_that_ends_soon_is_reported_each_day() {
    use super::support::tls::Certified;
    use super::support::{Log, ends};
    use aegis_hitl::server::Tls;

    let log = Log::capture(tracing::Level::WARN);
    let day = Duration::from_secs(24 * 3600);
    let serve = async |identity: &Certified, days: u32| {
        let tls = Tls::from_pem(identity.certificate.as_bytes(), identity.key.as_bytes());
        let tls = tls.unwrap();
        let before = log.lines().len();
        let server = start_with(MemoryStore::new(), |it| it, |server| server.tls(tls)).await;
        tokio::time::sleep(day * days + day / 2).await;
        assert!(ends(server.stop()).await.is_drained());
        log.lines().split_off(before)
    };
    let now = std::time::SystemTime::now();
    let soon = serve(&Certified::until_time(now + day * 14 - day / 2), 2).await;
    assert_eq!(soon.len(), 3, "at the start, and each day: {soon:?}");
    for line in &soon {
        assert!(
            line.contains("WARN") && line.contains("ends soon"),
            "{line}"
        );
        assert!(line.contains("days=13"), "{line}");
    }
    let later = serve(&Certified::until_time(now + day * 15), 2).await;
    assert_eq!(later, Vec::<String>::new());
    let over = serve(&Certified::until(2001, 1, 1), 0).await;
    assert_eq!(over.len(), 1, "{over:?}");
    assert!(over[0].contains("ERROR") && over[0].contains("has ended"));
}
