//! A web page must not act through the browser of whoever opened it: which hosts and origins a server answers.

use aegis_hitl::ApiKey;
use aegis_hitl::server::{Auth, HitlService, Host, Keys, Server};
use aegis_hitl::store::Store;
use http::Request;
use http_body_util::{BodyExt, Full};
use tower::ServiceExt;

use crate::support::{Disk, Running, raw, start, start_with};

async fn keyless() -> (Disk, Running) {
    let disk = Disk::default();
    let server = start(disk.clone()).await;
    (disk, server)
}

async fn decisions(disk: &Disk) -> u64 {
    disk.totals().await.unwrap().decisions
}

#[tokio::test]
async fn a_keyless_server_does_not_answer_for_a_foreign_host() {
    let (disk, server) = keyless().await;
    let port = server.addr.port();
    for (host, http2) in [
        ("evil.example", false),
        ("evil.example", true),
        ("evil.example:8000", false),
        ("evil.example:8000", true),
        ("localhost.evil.example", false),
        ("notlocalhost", false),
        ("127.0.0.1.nip.io", false),
        ("10.0.0.1", false),
        ("[2001:db8::1]:8000", true),
        ("0.0.0.0", false),
    ] {
        let call = server.approve("k-1").host(host);
        let reply = if http2 { call.http2() } else { call }.send().await;
        assert_eq!(reply.status, 421, "{host}: {reply:?}");
        assert_eq!(
            reply.header("content-type"),
            Some("application/problem+json"),
            "{host}"
        );
        assert_eq!(reply.text("code"), "misdirected-request", "{host}");
    }
    // These are no hosts at all.
    for host in [
        "localhost:8000, evil.example",
        "localhost@evil.example",
        "localhost:port",
        "localhost:99999",
        "[::1",
        "::1",
        "",
    ] {
        let reply = server.approve("k-1").host(host).send().await;
        assert!([400, 421].contains(&reply.status), "{host}: {reply:?}");
    }
    for host in [
        format!("localhost:{port}"),
        "localhost".to_owned(),
        "LocalHost:1".to_owned(),
        "localhost.:8000".to_owned(),
        "inbox.localhost:8000".to_owned(),
        format!("127.0.0.1:{port}"),
        "127.9.8.7".to_owned(),
        "[::1]:8000".to_owned(),
        "[::ffff:127.0.0.1]".to_owned(),
    ] {
        let reply = server.approve("k-2").host(&host).send().await;
        assert!([202, 409].contains(&reply.status), "{host}: {reply:?}");
        let reply = server.approve("k-2").host(&host).http2().send().await;
        assert_eq!(reply.status, 409, "{host}: {reply:?}");
    }
    assert_eq!(decisions(&disk).await, 1);
}

#[tokio::test]
async fn the_host_is_checked_on_everything_but_the_liveness_check() {
    let (_disk, server) = keyless().await;
    for path in [
        "/readyz",
        "/readyz/",
        "/api/v1/hitl/status/x",
        "/",
        "/nothing",
        "/livez/x",
    ] {
        let reply = server.get(path).host("evil.example").send().await;
        assert_eq!(reply.status, 421, "{path}: {reply:?}");
    }
    for path in ["/livez", "/livez/"] {
        let reply = server.get(path).host("evil.example").send().await;
        assert_eq!(reply.status, 200, "{path}: {reply:?}");
    }
    let reply = server.get("/readyz").send().await;
    assert_eq!(reply.status, 200, "{reply:?}");
}

#[tokio::test]
async fn every_host_that_a_request_names_is_checked() {
    let (_disk, server) = keyless().await;
    let rest = "Tenant-Id: t\r\nThread-Id: h\r\nIdempotency-Key: k\r\nConnection: close\r\n\r\n";
    for (target, host, status) in [
        ("/api/v1/hitl/approve", "Host: localhost\r\n", "202"),
        (
            "http://localhost/api/v1/hitl/approve",
            "Host: localhost\r\n",
            "409",
        ),
        (
            "http://evil.example/api/v1/hitl/approve",
            "Host: localhost\r\n",
            "421",
        ),
        (
            "http://localhost/api/v1/hitl/approve",
            "Host: evil.example\r\n",
            "421",
        ),
    ] {
        let request = format!("POST {target} HTTP/1.1\r\n{host}{rest}");
        let answer = raw(server.addr, &request).await;
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status}")),
            "{request}{answer}"
        );
    }
    // HTTP allows one alone; of two, each is read by somebody.
    for hosts in [["localhost", "evil.example"], ["evil.example", "localhost"]] {
        let hosts = hosts.map(|host| format!("Host: {host}\r\n")).concat();
        let request = format!("POST /api/v1/hitl/approve HTTP/1.1\r\n{hosts}{rest}");
        let answer = raw(server.addr, &request).await;
        assert!(answer.starts_with("HTTP/1.1 4"), "{request}{answer}");
    }
}

#[tokio::test]
async fn what_changes_something_is_refused_from_a_foreign_page() {
    let (disk, server) = keyless().await;
    let own = format!("http://{}", server.addr);
    for (name, value) in [
        ("Origin", "http://evil.example"),
        ("Origin", "null"),
        ("Origin", ""),
        ("Origin", "http://127.0.0.1:1"),
        ("Origin", "http://127.0.0.1"),
        ("Origin", "file://"),
        ("Origin", "http://evil.example http://127.0.0.1"),
        ("Sec-Fetch-Site", "cross-site"),
        ("Sec-Fetch-Site", "same-site"),
        ("Sec-Fetch-Site", "a-new-word"),
    ] {
        for http2 in [false, true] {
            for call in [
                server.approve("k-1").header(name, value),
                server.submit("k-1").header(name, value),
                // Whatever is not known to change nothing.
                server.approve("k-1").method("PURGE").header(name, value),
            ] {
                let reply = if http2 { call.http2() } else { call }.send().await;
                assert_eq!(reply.status, 403, "{name}: {value}: {reply:?}");
                assert_eq!(reply.text("code"), "forbidden", "{reply:?}");
                let media_type = reply.header("content-type");
                assert_eq!(media_type, Some("application/problem+json"));
            }
        }
    }
    // One that is its own and one that is foreign.
    let call = server.approve("k-1").header("Origin", &own);
    let reply = call.header("Origin", "http://evil.example").send().await;
    assert_eq!(reply.status, 403);
    assert_eq!(decisions(&disk).await, 0);
    for (key, name, value) in [
        ("k-1", "Origin", &*own),
        ("k-2", "Sec-Fetch-Site", "same-origin"),
        ("k-3", "Sec-Fetch-Site", "none"),
    ] {
        for status in [202, 409] {
            let call = server.approve(key).header(name, value);
            let call = if status == 409 { call.http2() } else { call };
            let reply = call.send().await;
            assert_eq!(reply.status, status, "{name}: {value}: {reply:?}");
        }
    }
    // To read is no change; a page of another origin does not get to see the answer.
    let reply = server
        .status("x")
        .header("Origin", "http://evil.example")
        .header("Sec-Fetch-Site", "cross-site")
        .send()
        .await;
    assert_eq!(reply.status, 404);
}

#[tokio::test]
async fn a_default_port_is_the_same_written_or_not() {
    let (_disk, server) = keyless().await;
    for (host, origin, status) in [
        ("localhost", "http://localhost", 202),
        ("localhost:80", "http://localhost", 409),
        ("localhost", "https://localhost", 409),
        ("localhost:443", "https://localhost", 409),
        ("LOCALHOST:443", "https://localhost:443", 409),
        ("localhost:80", "https://localhost", 403),
        ("localhost", "http://localhost:8080", 403),
        ("localhost", "http://127.0.0.1", 403),
    ] {
        let call = server.approve("k-1").host(host).header("Origin", origin);
        let reply = call.send().await;
        assert_eq!(reply.status, status, "{host} {origin}: {reply:?}");
    }
}

#[tokio::test]
async fn a_host_that_is_set_is_answered_for_beside_the_loopback_names() {
    let disk = Disk::default();
    let hosts = ["aegis.example.com", "192.0.2.7", "2001:db8::1"].map(|host| {
        let host: Host = host.parse().unwrap();
        host
    });
    let server = start_with(
        disk.clone(),
        |service| {
            hosts
                .into_iter()
                .fold(service, |service, host| service.host(host))
        },
        |server| server,
    )
    .await;
    for (host, origin, status) in [
        ("aegis.example.com", "https://aegis.example.com", 202),
        (
            "Aegis.Example.Com.:8443",
            "https://aegis.example.com:8443",
            409,
        ),
        // As behind a proxy that names the server by its address.
        ("127.0.0.1:8000", "https://aegis.example.com", 409),
        ("192.0.2.7:8000", "http://192.0.2.7:8000", 409),
        ("[2001:DB8:0::1]", "http://[2001:db8::1]", 409),
        ("localhost:8000", "http://localhost:8000", 409),
        ("192.0.2.8", "http://192.0.2.8", 421),
        ("example.com", "https://example.com", 421),
        ("a.aegis.example.com", "https://aegis.example.com", 421),
    ] {
        let call = server.approve("k-1").host(host).header("Origin", origin);
        let reply = call.send().await;
        assert_eq!(reply.status, status, "{host} {origin}: {reply:?}");
    }
}

/// A page cannot name an address that it was not loaded from: rebinding takes a name.
#[tokio::test]
async fn a_server_on_every_address_answers_for_every_address_and_for_no_name() {
    let disk = Disk::default();
    let service = HitlService::new(disk.clone());
    let server = Server::bind("0.0.0.0:0").await.unwrap();
    let addr = ([127, 0, 0, 1], server.local_addr().unwrap().port()).into();
    let (_stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let server = server.trust_tenant_header(true);
    tokio::spawn(server.serve(service, async { _ = stopped.await }));
    for (host, status) in [
        ("192.0.2.7:8000", 200),
        ("[2001:db8::1]", 200),
        ("localhost", 200),
        ("evil.example", 421),
    ] {
        let reply = crate::support::Call::new(addr, "GET", "/readyz").host(host);
        assert_eq!(reply.send().await.status, status, "{host}");
    }
}

/// A page has no API key that a browser would add by itself, so there is nothing to gain by rebinding.
#[tokio::test]
async fn with_keys_hosts_are_checked_only_where_they_are_set() {
    let key = ApiKey::new("sk").unwrap();
    let keys = Keys::parse(&format!("{} t alice decide", Keys::digest(&key))).unwrap();
    for (hosts, status) in [(None, [202, 202]), (Some("own.example"), [421, 403])] {
        let disk = Disk::default();
        let server = start_with(
            disk.clone(),
            |service| {
                let service = service.auth(Auth::keys(keys.clone()));
                match hosts {
                    Some(host) => service.host(host.parse().unwrap()),
                    None => service,
                }
            },
            |server| server,
        )
        .await;
        let call = |key: &str, host: &str, origin: &str| {
            let call = server.approve(key).host(host).header("Origin", origin);
            call.header("Authorization", "Bearer sk").send()
        };
        let reply = call("k-1", "evil.example", "https://evil.example").await;
        assert_eq!(reply.status, status[0], "{reply:?}");
        let reply = call("k-2", "localhost", "https://evil.example").await;
        assert_eq!(reply.status, status[1], "{reply:?}");
        let reply = call("k-3", "own.example", "https://own.example").await;
        assert_eq!(reply.status, 202, "{reply:?}");
    }
}

/// As when it is mounted in a router: it does not know the address, and a call in the process names no host.
#[tokio::test]
async fn the_service_alone_checks_too() {
    let disk = Disk::default();
    let service = HitlService::new(disk.clone());
    for (host, status) in [
        (None, 404),
        (Some("localhost"), 404),
        (Some("192.0.2.7"), 421),
        (Some("evil.example"), 421),
    ] {
        let mut request = Request::get("/api/v1/hitl/status/x");
        if let Some(host) = host {
            request = request.header("Host", host);
        }
        let request = request.body(Full::<bytes::Bytes>::default()).unwrap();
        let answer = service.clone().oneshot(request).await.unwrap();
        assert_eq!(answer.status(), status, "{host:?}");
        answer.into_body().collect().await.unwrap();
    }
}

#[test]
fn a_host_is_a_name_or_an_address_without_a_port() {
    for (text, shown) in [
        ("localhost", "localhost"),
        ("Aegis.Example.COM.", "aegis.example.com"),
        ("under_score.x-1", "under_score.x-1"),
        ("192.0.2.7", "192.0.2.7"),
        ("::1", "[::1]"),
        ("[2001:DB8::1]", "[2001:db8::1]"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
    ] {
        assert_eq!(text.parse::<Host>().unwrap().to_string(), shown);
    }
    let long = format!("{}.example", "a".repeat(250));
    for text in [
        "",
        ".",
        "..",
        "a..b",
        ".a",
        "*",
        "*.example.com",
        "a:80",
        "192.0.2.7:80",
        "[::1]:80",
        "[::1",
        "http://a",
        "a/b",
        "a b",
        "u@a",
        "a,b",
        "exämple.com",
        "a\u{202e}b",
        &long,
    ] {
        let error = text.parse::<Host>().unwrap_err().to_string();
        assert!(error.contains("allowed"), "{error}");
        assert!(!error.contains('\u{202e}'), "{error}");
    }
}
