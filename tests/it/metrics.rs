//! What operators read of a server, over real sockets.

use std::net::{SocketAddr, TcpListener};

use aegis_hitl::server::{Auth, Keys, Server};
use aegis_hitl::store::Store;
use aegis_hitl::{ApiKey, Payload, protocol::Digest};
use serde_json::json;

use super::support::{Call, Disk, Faulty, Mood, Reply, Running, start, start_with};

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
