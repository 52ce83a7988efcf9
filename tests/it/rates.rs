//! The limits of rates: whose requests count, and what the others get.

use aegis_hitl::ApiKey;
use aegis_hitl::server::{Auth, Keys, Rate};
use aegis_hitl::store::Store;

use super::inbox::desk_with;
use super::support::{Call, Disk, Reply, start_with};

fn rate(text: &str) -> Rate {
    text.parse().unwrap()
}

/// Checks that an answer is a refusal that says when to come back.
#[track_caller]
fn assert_refused(reply: &Reply, least: u64) {
    assert_eq!(reply.status, 429);
    assert_eq!(reply.text("code"), "quota-exceeded");
    let seconds: u64 = reply.header("retry-after").unwrap().parse().unwrap();
    assert!((least - 60..=least).contains(&seconds), "{seconds}");
}

#[tokio::test]
async fn a_tenant_beyond_its_rate_is_refused_and_nothing_is_recorded() {
    let store = Disk::default();
    let service = |service: aegis_hitl::server::HitlServiceBuilder<_>| {
        service.max_rate_per_tenant(rate("2/h"))
    };
    let server = start_with(store.clone(), service, |server| server).await;
    let approved = server.approve("k-1").send().await;
    assert_eq!(approved.status, 202);
    assert_eq!(server.approve("k-2").send().await.status, 202);
    for _ in 0..3 {
        let refused = server.approve("k-3").send().await;
        assert_refused(&refused, 1800);
        assert!(refused.text("detail").contains("2/h"));
    }
    assert_eq!(store.totals().await.unwrap().decisions, 2);
    // Whoever asks without a tenant, and another tenant, is not refused.
    let status = server.status(&approved.request_id()).send().await;
    assert_eq!(status.status, 200);
    let other = server.approve("k-3").without("tenant-id");
    assert_eq!(other.header("Tenant-Id", "u").send().await.status, 202);
}

#[tokio::test]
async fn every_endpoint_counts_for_the_tenant_it_serves() {
    let one = |service: aegis_hitl::server::HitlServiceBuilder<_>| {
        service.max_rate_per_tenant(rate("1/h"))
    };
    let id = uuid::Uuid::now_v7();
    let by_id = [
        "approve", "reject", "cancel", "claim", "renew", "complete", "fail",
    ];
    let by_id = by_id.map(|verb| ("POST", format!("/api/v1/hitl/actions/{id}/{verb}")));
    let others = [
        ("POST", "/api/v1/hitl/approve".to_owned()),
        ("POST", "/api/v1/hitl/reject".to_owned()),
        ("POST", "/api/v1/hitl/actions".to_owned()),
        ("GET", "/api/v1/hitl/actions".to_owned()),
        ("GET", format!("/api/v1/hitl/actions/{id}")),
        ("GET", format!("/api/v1/hitl/status/{id}")),
        ("GET", "/api/v1/hitl/events".to_owned()),
    ];
    for (method, path) in by_id.into_iter().chain(others) {
        let server = start_with(Disk::default(), one, |server| server).await;
        let ask = || {
            Call::new(server.addr, method, &*path)
                .header("Tenant-Id", "t")
                .header("Thread-Id", "h")
                .header("Idempotency-Key", "k")
        };
        // The first one is answered in whatever way. A stream of events would not end.
        let first = server.get("/api/v1/hitl/actions").header("Tenant-Id", "t");
        assert_eq!(first.send().await.status, 200);
        let refused = ask().send().await;
        assert_eq!(refused.status, 429, "{method} {path}");
    }
}

#[tokio::test]
async fn who_has_no_key_of_a_tenant_cannot_spend_its_rate() {
    let key = ApiKey::new("sk-acme").unwrap();
    let keys = Keys::parse(&format!("{} acme alice decide", Keys::digest(&key))).unwrap();
    let service = |service: aegis_hitl::server::HitlServiceBuilder<_>| {
        let service = service.auth(Auth::keys(keys));
        service.max_rate_per_tenant(rate("1/h"))
    };
    let server = start_with(Disk::default(), service, |server| server).await;
    let ask = |key: &str| {
        let call = server.approve("k").without("tenant-id");
        let call = call.header("Tenant-Id", "acme");
        call.header("Authorization", format!("Bearer {key}"))
    };
    for _ in 0..3 {
        assert_eq!(ask("sk-guessed").send().await.status, 401);
    }
    assert_eq!(ask("sk-acme").send().await.status, 202);
    assert_refused(&ask("sk-acme").send().await, 3600);
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn an_address_beyond_its_rate_is_refused_whatever_it_asks_for() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    let service =
        |service: aegis_hitl::server::HitlServiceBuilder<_>| service.max_rate_per_peer(rate("3/h"));
    let server = start_with(Disk::default(), service, |server| server).await;
    assert_eq!(server.approve("k").send().await.status, 202);
    // What is malformed, or meant for nothing here, costs as much.
    assert_eq!(server.get("/nothing").send().await.status, 404);
    assert_eq!(
        server.approve("k").without("tenant-id").send().await.status,
        400
    );
    for path in ["/api/v1/hitl/status/x", "/openapi.json", "/nothing"] {
        assert_refused(&server.get(path).send().await, 1200);
    }
    assert_refused(
        &server.approve("k").header("Tenant-Id", "u").send().await,
        1200,
    );
    // Who watches the server is not a client of it.
    for path in ["/livez", "/readyz", "/metrics"] {
        assert_eq!(server.get(path).send().await.status, 200, "{path}");
    }
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.2:0".parse().unwrap()).unwrap();
    let mut stream = socket.connect(server.addr).await.unwrap();
    let request = format!(
        "POST /api/v1/hitl/approve HTTP/1.1\r\nHost: {}\r\nTenant-Id: t\r\nThread-Id: h\r\n\
         Idempotency-Key: k-2\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
        server.addr
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 202"), "{answer}");
}

#[tokio::test]
async fn a_reviewer_is_shown_a_page_and_is_not_held_up_by_an_agent() {
    let desk = desk_with(Disk::default(), |service| {
        service
            .max_rate_per_tenant(rate("1/h"))
            .max_rate_per_peer(rate("6/h"))
    })
    .await;
    let link = desk.service.issue_sign_in_path().unwrap();
    let code = link.split_once("code=").unwrap().1.to_owned();
    let sign_in = Call::new(desk.addr, "POST", "/sign-in")
        .header("Content-Type", "application/x-www-form-urlencoded")
        .body(format!("code={code}"));
    let signed_in = sign_in.send().await;
    assert_eq!(signed_in.status, 303);
    let cookie = signed_in.header("set-cookie").unwrap();
    let cookie = cookie.split(';').next().unwrap().to_owned();
    let page = || Call::new(desk.addr, "GET", "/").header("Cookie", &cookie);
    assert_eq!(
        Call::post(desk.addr, "actions", "k").send().await.status,
        201
    );
    assert_eq!(
        Call::post(desk.addr, "actions", "l").send().await.status,
        429
    );
    // The agent's rate is spent, and the reviewer still sees the page.
    for _ in 0..3 {
        assert_eq!(page().send().await.status, 200);
    }
    let refused = page().send().await;
    assert_eq!(refused.status, 429);
    assert_eq!(
        refused.header("content-type"),
        Some("text/html; charset=utf-8")
    );
    assert!(refused.header("retry-after").is_some());
}
