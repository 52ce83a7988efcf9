//! What the server does with the connections of many clients.

use std::net::SocketAddr;

use aegis_hitl::server::HitlService;
use aegis_hitl::store::MemoryStore;
use bytes::Bytes;
use futures_util::stream::{self, StreamExt};
use http_body_util::{BodyExt, Full, StreamBody};
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::json;
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::timeout;
use tower_service::Service;

use crate::support::h2::{self, H2};
use crate::support::{Call, Disk, Faulty, HANG, Mood, Running, SHORT, start_with};

/// A server that closes no connection because it is idle, as long as a test lasts.
async fn patient(
    store: impl aegis_hitl::store::Store,
    settings: impl FnOnce(aegis_hitl::server::Server) -> aegis_hitl::server::Server,
) -> Running {
    start_with(
        store,
        |service| service.store_timeout(10 * HANG),
        |server| settings(server.header_timeout(10 * HANG)),
    )
    .await
}

#[tokio::test]
async fn a_newcomer_takes_the_place_of_the_connection_that_was_idle_longest() {
    let server = patient(Disk::default(), |server| server.max_connections(3)).await;
    let mut first = H2::kept(server.addr).await;
    let mut second = H2::kept(server.addr).await;
    let mut third = H2::kept(server.addr).await;
    // The first is now the one that was used last.
    first.get("/livez", &[]).await;
    first.until(h2::DATA).await;
    let mut newcomer = H2::kept(server.addr).await;
    second.until_closed(HANG).await;
    for kept in [&mut first, &mut third, &mut newcomer] {
        kept.get("/livez", &[]).await;
        kept.until(h2::DATA).await;
    }
}

#[tokio::test]
async fn a_connection_with_a_request_keeps_its_place() {
    let store = Faulty::new(Disk::default(), Mood::Hangs);
    let server = patient(store.clone(), |server| server.max_connections(1)).await;
    let in_flight = tokio::spawn(server.approve("k").http2().send());
    store.arrived().await;
    let waits = tokio::spawn(server.get("/livez").send());
    // Nothing tells when it waits: it is given the time in which it would have been served.
    tokio::time::sleep(SHORT).await;
    assert!(!waits.is_finished());
    store.release();
    assert_eq!(in_flight.await.unwrap().status, 202);
    assert_eq!(waits.await.unwrap().status, 200);
}

/// Connects from this address.
#[cfg(target_os = "linux")]
async fn connect_from(address: &str, to: SocketAddr) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket
        .bind(format!("{address}:0").parse().unwrap())
        .unwrap();
    socket.connect(to).await.unwrap()
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn one_address_has_its_own_places_and_no_more() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    let store = Faulty::new(Disk::default(), Mood::Hangs);
    let server = patient(store.clone(), |server| {
        server.max_connections(8).max_connections_per_peer(2)
    })
    .await;
    let ask = async |address: &str| {
        let mut stream = connect_from(address, server.addr).await;
        let request = "GET /livez HTTP/1.1\r\nHost: h\r\n\r\n";
        // One that is turned away may be gone before it has written.
        _ = stream.write_all(request.as_bytes()).await;
        let mut answer = vec![0; 12];
        let read = timeout(HANG, stream.read_exact(&mut answer)).await.unwrap();
        (read.is_ok().then_some(stream), answer)
    };
    // Both of its places are idle, so there is always one for a newcomer.
    let mut kept = Vec::new();
    for _ in 0..4 {
        let (stream, answer) = ask("127.0.0.1").await;
        assert_eq!(answer, b"HTTP/1.1 200");
        kept.push(stream);
    }
    let busy = [server.approve("k-1"), server.approve("k-2")].map(|call| tokio::spawn(call.send()));
    while store.asked() < 2 {
        store.arrived().await;
    }
    let (stream, _) = ask("127.0.0.1").await;
    assert!(stream.is_none());
    let (stream, answer) = ask("127.0.0.2").await;
    assert!(stream.is_some() && answer == b"HTTP/1.1 200");
    for call in busy {
        store.release();
        assert_eq!(timeout(HANG, call).await.unwrap().unwrap().status, 202);
    }
}

#[tokio::test]
async fn a_proxy_on_this_machine_may_have_all_places() {
    let store = Faulty::new(Disk::default(), Mood::Hangs);
    let server = patient(store.clone(), |server| server.max_connections(4)).await;
    let calls = ["k-1", "k-2", "k-3", "k-4"].map(|key| tokio::spawn(server.approve(key).send()));
    while store.asked() < 4 {
        store.arrived().await;
    }
    for call in calls {
        store.release();
        assert_eq!(timeout(HANG, call).await.unwrap().unwrap().status, 202);
    }
}

// ---- The memory for large bodies ------------------------------------------------------------------

type LongBody = http_body_util::combinators::UnsyncBoxBody<Bytes, std::convert::Infallible>;

/// A request for a decision, whose body never ends.
fn endless(key: &str, body: Vec<u8>) -> http::Request<LongBody> {
    let sent = http_body::Frame::data(Bytes::from(body));
    let body = stream::once(async { Ok(sent) }).chain(stream::pending());
    request(key, StreamBody::new(body).boxed_unsync())
}

fn whole(key: &str, len: usize) -> http::Request<LongBody> {
    let body = format!("{{\"a\":\"{}\"}}", "x".repeat(len));
    request(key, Full::new(Bytes::from(body)).boxed_unsync())
}

fn request(key: &str, body: LongBody) -> http::Request<LongBody> {
    http::Request::post("/api/v1/hitl/approve")
        .header("host", "localhost")
        .header("tenant-id", "t")
        .header("thread-id", "h")
        .header("idempotency-key", key)
        .header("content-type", "application/json")
        .body(body)
        .unwrap()
}

#[tokio::test(start_paused = true)]
async fn large_bodies_of_all_connections_share_64_mib() {
    let mut service = HitlService::new(MemoryStore::new());
    let mut arriving: Vec<_> = (0..300)
        .map(|number| {
            let body = vec![b' '; 255 * 1024];
            tokio_test::task::spawn(service.call(endless(&format!("k-{number}"), body)))
        })
        .collect();
    for call in &mut arriving {
        // Those that are refused still discard what arrives.
        assert!(call.poll().is_pending());
    }
    let large = service.call(whole("large", 200_000)).await.unwrap();
    assert_eq!(large.status(), 503);
    assert_eq!(large.headers()["retry-after"], "1");
    let small = service.call(whole("small", 5_000)).await.unwrap();
    assert_eq!(small.status(), 202);
    let mut late = 0;
    for call in arriving {
        match call.await.unwrap().status().as_u16() {
            408 => late += 1,
            status => assert_eq!(status, 503),
        }
    }
    assert!((200..300).contains(&late), "{late}");
    let large = service.call(whole("large", 200_000)).await.unwrap();
    assert_eq!(large.status(), 202);
}

#[tokio::test]
async fn large_answers_that_nobody_reads_share_64_mib() {
    let mut service = HitlService::new(Disk::default());
    let recorded = service.call(whole("k", 250_000)).await.unwrap();
    let status = recorded.headers()["location"].to_str().unwrap().to_owned();
    let mut ask = || {
        let request = http::Request::get(&status)
            .header("host", "localhost")
            .header("tenant-id", "t");
        service.call(request.body(Full::<Bytes>::default()).unwrap())
    };
    let mut unread = Vec::new();
    for _ in 0..300 {
        let answer = ask().await.unwrap();
        if answer.status() == 200 {
            unread.push(answer);
        } else {
            assert_eq!(answer.status(), 503);
            assert_eq!(answer.headers()["retry-after"], "1");
        }
    }
    assert!((200..300).contains(&unread.len()), "{}", unread.len());
    // What is being sent still takes room.
    let body = unread.pop().unwrap().into_body().collect().await.unwrap();
    let bytes = body.to_bytes();
    assert!(bytes.len() > 250_000);
    assert_eq!(ask().await.unwrap().status(), 503);
    drop(bytes);
    assert_eq!(ask().await.unwrap().status(), 200);
}

#[tokio::test]
async fn a_text_that_is_there_for_all_takes_no_room() {
    let mut service = HitlService::new(MemoryStore::new());
    let mut unread = Vec::new();
    let mut bytes = 0;
    while bytes < 80 * 1024 * 1024 {
        let request = http::Request::get("/openapi.json").header("host", "localhost");
        let request = request.body(Full::<Bytes>::default()).unwrap();
        let answer = service.call(request).await.unwrap();
        assert_eq!(answer.status(), 200);
        let len = http_body::Body::size_hint(answer.body()).exact().unwrap();
        assert!(len > 8 * 1024, "{len}");
        bytes += len;
        unread.push(answer);
    }
}

#[tokio::test]
async fn connections_that_read_nothing_keep_no_other_from_reading_or_sending() {
    let server = patient(MemoryStore::new(), |server| server).await;
    let call = |method: &str, path: &str| {
        let call = Call::new(server.addr, method, path).header("Tenant-Id", "t");
        call.header("Thread-Id", "h")
            .header("Idempotency-Key", "large")
    };
    let body = json!({ "a": "x".repeat(250_000) }).to_string();
    let submit = call("POST", "/api/v1/hitl/actions").json(body);
    let large = submit.send().await;
    assert_eq!(large.status, 201);
    let path = format!("/api/v1/hitl/status/{}", large.request_id());
    let mut unread = Vec::new();
    let mut refused = 0;
    for _ in 0..3 {
        let stream = TcpStream::connect(server.addr).await.unwrap();
        let mut builder = hyper::client::conn::http2::Builder::new(TokioExecutor::new());
        builder.initial_stream_window_size(0);
        let (sender, connection) = builder.handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        for _ in 0..100 {
            let uri = format!("http://{}{path}", server.addr);
            let request = http::Request::get(uri).header("Tenant-Id", "t");
            let request = request.body(Full::<Bytes>::default()).unwrap();
            let answer = sender.clone().send_request(request).await.unwrap();
            if answer.status() == 200 {
                unread.push(answer);
            } else {
                assert_eq!(answer.status(), 503);
                refused += 1;
            }
        }
    }
    // Each connection holds a quarter of the room.
    assert!(refused > 50, "{refused}");
    let read = call("GET", &path).send().await;
    assert_eq!(read.status, 200);
    let body = json!({ "a": "x".repeat(100_000) }).to_string();
    let submit = Call::new(server.addr, "POST", "/api/v1/hitl/actions").header("Tenant-Id", "t");
    let submit = submit
        .header("Thread-Id", "h")
        .header("Idempotency-Key", "other");
    assert_eq!(submit.json(body).send().await.status, 201);
}
