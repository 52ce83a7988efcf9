//! How the server ends, its health, and whom it may trust.

use std::time::Duration;

use aegis_hitl::ApiKey;
use aegis_hitl::server::{Auth, HitlService, Keys, Server, Shutdown};
use aegis_hitl::store::Store;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tracing::Level;

use crate::support::h2::{self, H2};
use crate::support::{Disk, Faulty, HANG, Log, Mood, read_until, start, start_with};

#[tokio::test]
async fn a_server_without_requests_drains_at_once() {
    let server = start(Disk::default()).await;
    let addr = server.addr;
    server.still_answers().await;
    // One connection is idle, and one has sent nothing yet.
    let mut idle = TcpStream::connect(addr).await.unwrap();
    idle.write_all(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
        .await
        .unwrap();
    let mut answer = [0; 12];
    idle.read_exact(&mut answer).await.unwrap();
    let _silent = TcpStream::connect(addr).await.unwrap();
    let ended = timeout(HANG, server.stop()).await.unwrap();
    assert!(ended.is_drained());
    assert!(TcpStream::connect(addr).await.is_err());
}

#[tokio::test]
async fn a_request_in_flight_is_answered_and_its_connection_closed() {
    for http2 in [false, true] {
        let disk = Disk::default();
        let store = Faulty::new(disk.clone(), Mood::Hangs);
        let server = start_with(
            store.clone(),
            |service| service.store_timeout(HANG),
            |server| server,
        )
        .await;
        let addr = server.addr;
        let call = server.approve("k");
        let call = tokio::spawn(if http2 { call.http2() } else { call }.send());
        store.arrived().await;
        let ended = server.begin_stop();
        until_refused(addr).await;
        assert!(!ended.is_finished());
        store.release();
        let reply = call.await.unwrap();
        assert_eq!(reply.status, 202);
        if !http2 {
            assert_eq!(reply.header("connection"), Some("close"));
        }
        let ended = timeout(HANG, ended).await.unwrap();
        assert_eq!(ended.unwrap().unwrap(), Shutdown::Drained);
        assert_eq!(disk.totals().await.unwrap().decisions, 1);
    }
}

/// Waits until the listener is closed: the shutdown has begun.
async fn until_refused(addr: std::net::SocketAddr) {
    let refused = async {
        while TcpStream::connect(addr).await.is_ok() {
            tokio::task::yield_now().await;
        }
    };
    timeout(HANG, refused).await.unwrap();
}

#[tokio::test]
async fn what_is_in_flight_at_the_deadline_is_cut() {
    let store = Faulty::new(Disk::default(), Mood::Hangs);
    let server = start_with(
        store.clone(),
        |service| service.store_timeout(HANG),
        |server| server.drain_timeout(Duration::from_millis(50)),
    )
    .await;
    let call = tokio::spawn(server.approve("k").try_send());
    store.arrived().await;
    assert_eq!(server.stop().await, Shutdown::Aborted { connections: 1 });
    assert!(call.await.unwrap().is_err());
}

#[tokio::test]
async fn a_wait_ends_with_the_present_state() {
    let store = Faulty::new(Disk::default(), Mood::Well);
    let server = start(store.clone()).await;
    let id = server.submit("k").send().await.request_id();
    let before = store.asked();
    let wait = tokio::spawn(server.status(&id).header("Prefer", "wait=55").send());
    while store.asked() < before + 2 {
        store.arrived().await;
    }
    assert!(timeout(HANG, server.stop()).await.unwrap().is_drained());
    let reply = wait.await.unwrap();
    assert_eq!((reply.status, &*reply.text("status")), (200, "PENDING"));
    assert_eq!(reply.header("connection"), Some("close"));
}

#[tokio::test]
async fn a_request_that_comes_while_the_server_drains_is_503() {
    let store = Faulty::new(Disk::default(), Mood::Hangs);
    let server = start_with(
        store.clone(),
        |service| service.store_timeout(HANG),
        |server| server,
    )
    .await;
    let addr = server.addr;
    let in_flight = tokio::spawn(server.approve("k").send());
    store.arrived().await;
    // Connections in the middle of their first headers are served to their end.
    let mut kept = TcpStream::connect(addr).await.unwrap();
    let head = "POST /api/v1/hitl/approve HTTP/1.1\r\nHost: localhost\r\nTenant-Id: t\r\n\
                Thread-Id: h\r\nIdempotency-Key: k2\r\n";
    kept.write_all(head.as_bytes()).await.unwrap();
    let mut ready = TcpStream::connect(addr).await.unwrap();
    ready
        .write_all(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\n")
        .await
        .unwrap();
    // Once a later connection is answered, the server has read what these have sent.
    server.get("/livez").send().await;
    let ended = server.begin_stop();
    until_refused(addr).await;
    kept.write_all(b"\r\n").await.unwrap();
    let answer = read_until(&mut kept, "}").await;
    assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
    let lower = answer.to_lowercase();
    assert!(
        lower.contains("retry-after: 1") && lower.contains("connection: close"),
        "{answer}"
    );
    assert!(answer.contains("\"unavailable\""), "{answer}");
    ready.write_all(b"\r\n").await.unwrap();
    let answer = read_until(&mut ready, "}").await;
    assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
    assert_eq!(store.asked(), 1);
    store.release();
    assert_eq!(in_flight.await.unwrap().status, 202);
    assert!(
        timeout(HANG, ended)
            .await
            .unwrap()
            .unwrap()
            .unwrap()
            .is_drained()
    );
}

/// Connects without letting the server run meanwhile, and sends this.
fn connect_meanwhile(addr: std::net::SocketAddr, bytes: &[u8]) -> TcpStream {
    use std::io::Write as _;
    let mut stream = std::net::TcpStream::connect(addr).unwrap();
    stream.write_all(bytes).unwrap();
    stream.set_nonblocking(true).unwrap();
    TcpStream::from_std(stream).unwrap()
}

const DECISION: &[u8] =
    b"POST /api/v1/hitl/approve HTTP/1.1\r\nHost: localhost\r\nTenant-Id: t\r\n\
                          Thread-Id: h\r\nIdempotency-Key: k\r\n\r\n";

async fn is_turned_away(stream: &mut TcpStream) {
    let answer = read_until(stream, "}").await.to_lowercase();
    assert!(answer.starts_with("http/1.1 503 "), "{answer}");
    assert!(answer.contains("connection: close"), "{answer}");
}

#[tokio::test]
async fn a_request_that_waits_to_be_accepted_at_the_shutdown_is_503() {
    let server = start(Disk::default()).await;
    let addr = server.addr;
    server.still_answers().await;
    let mut waiting = [(); 3].map(|()| connect_meanwhile(addr, DECISION));
    let ended = server.begin_stop();
    for stream in &mut waiting {
        is_turned_away(stream).await;
    }
    assert!(ended.await.unwrap().unwrap().is_drained());
}

#[tokio::test]
async fn a_request_of_a_connection_that_was_just_made_at_the_shutdown_is_503() {
    let server = start(Disk::default()).await;
    let addr = server.addr;
    let mut new = TcpStream::connect(addr).await.unwrap();
    // Once a later connection is answered, the server has accepted this one.
    server.still_answers().await;
    let ended = server.begin_stop();
    until_refused(addr).await;
    new.write_all(DECISION).await.unwrap();
    is_turned_away(&mut new).await;
    assert!(ended.await.unwrap().unwrap().is_drained());
}

#[tokio::test]
async fn a_request_that_has_arrived_on_an_idle_connection_at_the_shutdown_is_503() {
    let server = start(Disk::default()).await;
    let mut idle = TcpStream::connect(server.addr).await.unwrap();
    idle.write_all(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
        .await
        .unwrap();
    read_until(&mut idle, "}").await;
    assert_eq!(idle.try_write(DECISION).unwrap(), DECISION.len());
    let ended = server.begin_stop();
    is_turned_away(&mut idle).await;
    assert!(ended.await.unwrap().unwrap().is_drained());
}

#[tokio::test]
async fn a_client_that_reads_no_answer_is_cut_off() {
    let store = Disk::default();
    let server = start_with(
        store,
        |service| service,
        |server| {
            let server = server.write_timeout(Duration::from_millis(100));
            server.max_connections(1)
        },
    )
    .await;
    let payload = format!("{{\"a\":\"{}\"}}", "x".repeat(200_000));
    let id = server.submit("k").json(payload).send().await.request_id();
    // Many large answers, more than any socket's buffer holds.
    let ask =
        format!("GET /api/v1/hitl/status/{id} HTTP/1.1\r\nHost: localhost\r\nTenant-Id: t\r\n\r\n");
    let mut stream = TcpStream::connect(server.addr).await.unwrap();
    stream.write_all(ask.repeat(200).as_bytes()).await.unwrap();
    // The first bytes of the first answer: it has the one connection that there may be.
    stream.read_exact(&mut [0; 12]).await.unwrap();
    let next = timeout(HANG, server.approve("k").send());
    assert_eq!(next.await.unwrap().status, 202);
}

/// Far below the 20 s after which a silent peer is cut off, and far beyond what any step takes.
const SOON: Duration = Duration::from_secs(15);

#[tokio::test]
async fn an_http_2_client_that_takes_no_answer_is_cut_off() {
    // With a window of 1 the first byte of each answer is let through, and nothing else.
    for window in [0, 1] {
        let server = start_with(
            Disk::default(),
            |service| service,
            |server| server.write_timeout(Duration::from_millis(200)),
        )
        .await;
        let mut client = H2::connect(server.addr, window).await;
        for _ in 0..128 {
            client.get("/livez", &[]).await;
        }
        let kinds = client.until_closed(SOON).await;
        let headers = kinds.iter().filter(|kind| **kind == h2::HEADERS).count();
        assert_eq!(headers, 128, "{kinds:?}");
        server.still_answers().await;
    }
}

#[tokio::test]
async fn an_http_2_client_that_takes_its_answer_slowly_gets_all_of_it() {
    let server = start_with(
        Disk::default(),
        |service| service,
        |server| {
            let server = server.write_timeout(Duration::from_secs(2));
            server.header_timeout(Duration::from_millis(100))
        },
    )
    .await;
    let mut client = H2::connect(server.addr, 0).await;
    let stream = client.get("/livez", &[]).await;
    client.until(h2::HEADERS).await;
    let mut body = Vec::new();
    loop {
        // For the whole answer that takes longer than the client may do nothing.
        tokio::time::sleep(Duration::from_millis(300)).await;
        client
            .write(h2::WINDOW_UPDATE, 0, stream, &1_u32.to_be_bytes())
            .await;
        let frame = client.until(h2::DATA).await;
        body.extend(frame.payload);
        if frame.flags & h2::END_STREAM != 0 {
            break;
        }
    }
    assert_eq!(body, br#"{"status":"ok"}"#);
}

#[tokio::test]
async fn a_drain_does_not_wait_for_clients_that_do_nothing() {
    let store = Disk::default();
    let server = start(store.clone()).await;
    // One takes no answer, one is idle and lets the server's farewell go by, and one has sent half a request.
    let mut stalled = H2::connect(server.addr, 0).await;
    stalled.get("/livez", &[]).await;
    stalled.until(h2::HEADERS).await;
    let mut deaf = H2::connect(server.addr, 65_535).await;
    deaf.get("/livez", &[]).await;
    deaf.until(h2::DATA).await;
    let mut half = TcpStream::connect(server.addr).await.unwrap();
    half.write_all(b"GET /livez HTTP/1.1\r\nHost: h\r\n")
        .await
        .unwrap();
    let mut half_headers = H2::connect(server.addr, 65_535).await;
    half_headers.get("/livez", &[]).await;
    half_headers.until(h2::DATA).await;
    half_headers.begin(h2::END_STREAM, "/livez", &[]).await;
    server.still_answers().await;
    let ended = timeout(SOON, server.stop()).await;
    assert_eq!(ended.unwrap(), Shutdown::Drained);
}

#[tokio::test]
async fn a_drain_does_not_wait_for_half_a_body() {
    let server = start_with(
        Disk::default(),
        |service| service.body_timeout(HANG),
        |server| server,
    )
    .await;
    let mut half = TcpStream::connect(server.addr).await.unwrap();
    let head = "POST /api/v1/hitl/approve HTTP/1.1\r\nHost: localhost\r\nTenant-Id: t\r\nThread-Id: h\r\n\
                Idempotency-Key: k\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\
                Expect: 100-continue\r\n\r\n";
    half.write_all(head.as_bytes()).await.unwrap();
    // It is waited for: the request is in flight.
    read_until(&mut half, "Continue\r\n\r\n").await;
    half.write_all(b"{").await.unwrap();
    let ended = timeout(SOON, server.stop()).await;
    assert_eq!(ended.unwrap(), Shutdown::Drained);
    let answer = read_until(&mut half, "}").await;
    assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
}

#[tokio::test]
async fn health_says_whether_the_store_takes_a_write() {
    let store = Faulty::new(Disk::default(), Mood::Fails);
    let server = start(store.clone()).await;
    let live = server.get("/livez").send().await;
    assert_eq!((live.status, &*live.text("status")), (200, "ok"));
    assert_eq!(store.asked(), 0);
    let red = server.get("/readyz").send().await;
    assert_eq!((red.status, &*red.text("code")), (503, "unavailable"));
    assert_eq!(red.header("retry-after"), Some("1"));
    assert!(!red.text("detail").contains("secret"), "{red:?}");
    store.set(Mood::Well);
    assert_eq!(server.get("/readyz/").send().await.status, 200);
    let head = server.get("/readyz").method("HEAD").send().await;
    assert_eq!((head.status, head.body.len()), (200, 0));
    assert_eq!(server.get("/api/v1/livez").send().await.status, 404);
}

#[tokio::test]
async fn a_store_that_fails_is_logged_once_whoever_asks() {
    let log = Log::capture(Level::INFO);
    let store = Faulty::new(Disk::default(), Mood::Fails);
    let server = start(store.clone()).await;
    for _ in 0..20 {
        assert_eq!(server.approve("k").send().await.status, 503);
        assert_eq!(server.get("/readyz").send().await.status, 503);
    }
    let lines = log.lines();
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert!(lines[0].contains("WARN") && lines[0].contains("the store cannot answer"));
}

#[tokio::test]
async fn a_store_that_hangs_is_not_ready_after_two_seconds() {
    let store = Faulty::new(Disk::default(), Mood::Hangs);
    let server = start(store.clone()).await;
    let reply = timeout(HANG, server.get("/readyz").send());
    assert_eq!(reply.await.unwrap().status, 503);
}

#[tokio::test]
async fn the_tenant_header_is_trusted_on_loopback_only() {
    let bind = || async { Server::bind("0.0.0.0:0").await.unwrap() };
    let trusting = || HitlService::new(Disk::default());
    let refused = bind().await.serve(trusting(), async {}).await.unwrap_err();
    assert!(refused.is_untrusted_address());
    let text = refused.to_string();
    for what in ["0.0.0.0:", "API keys", "--trust-tenant-header"] {
        assert!(text.contains(what), "{text}");
    }

    let told = bind().await.trust_tenant_header(true);
    assert!(told.serve(trusting(), async {}).await.unwrap().is_drained());

    let line = format!(
        "{} acme alice decide",
        Keys::digest(&ApiKey::new("sk").unwrap())
    );
    let with_keys = HitlService::builder(Disk::default())
        .auth(Auth::keys(Keys::parse(&line).unwrap()))
        .build()
        .unwrap();
    let ended = bind().await.serve(with_keys, async {}).await.unwrap();
    assert!(ended.is_drained());

    if let Ok(server) = Server::bind("[::1]:0").await {
        assert!(server.serve(trusting(), async {}).await.is_ok());
    }
}
