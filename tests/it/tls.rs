//! The server's own TLS.

use std::time::Duration;

use aegis_hitl::server::{HitlService, Inbox, Server, Tls};
use aegis_hitl::store::MemoryStore;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::watch;

use crate::support::tls::Certified;
use crate::support::{Call, Disk, Reply, Running, ends, raw, start_with};

/// Longer than any test may take: what ends only by this hangs.
const NEVER: Duration = Duration::from_secs(3600);

fn tls(identity: &Certified) -> Tls {
    Tls::from_pem(identity.certificate.as_bytes(), identity.key.as_bytes()).unwrap()
}

async fn start(identity: &Certified, server: impl FnOnce(Server) -> Server) -> Running {
    let tls = tls(identity);
    start_with(Disk::default(), |service| service, |it| server(it.tls(tls))).await
}

/// Sends a call over a connection of its own.
async fn send(identity: &Certified, call: Call, addr: std::net::SocketAddr) -> Reply {
    let stream = identity.connect(addr, &[]).await.unwrap();
    ends(call.send_over("https", stream)).await.unwrap()
}

async fn still_answers(identity: &Certified, server: &Running) {
    let call = server.approve(&uuid::Uuid::new_v4().to_string());
    assert_eq!(send(identity, call, server.addr).await.status, 202);
}

/// A time that ends what would never end by itself, and that a whole request fits in on a machine
/// with much to do.
const SOON: Duration = Duration::from_secs(2);

/// The first bytes of a client's handshake, and not all of it.
const HALF_A_HELLO: [u8; 11] = [22, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3];

#[tokio::test]
async fn the_protocol_is_settled_in_the_handshake() {
    let identity = Certified::new();
    let server = start(&identity, |server| server).await;
    for (number, (offered, settled)) in [
        (&["h2", "http/1.1"][..], Some("h2")),
        (&["h2"], Some("h2")),
        (&["http/1.1"], Some("http/1.1")),
        (&[], None),
    ]
    .into_iter()
    .enumerate()
    {
        let stream = identity.connect(server.addr, offered).await.unwrap();
        let protocol = stream.get_ref().1.alpn_protocol();
        assert_eq!(protocol, settled.map(str::as_bytes));
        let call = server.approve(&format!("k-{number}"));
        let call = if settled == Some("h2") {
            call.http2()
        } else {
            call
        };
        let reply = ends(call.send_over("https", stream)).await.unwrap();
        assert_eq!(reply.status, 202);
    }
    // A client that speaks nothing of these is refused in the handshake.
    let refused = identity.connect(server.addr, &["acme-tls/1"]).await;
    assert!(refused.is_err());
    assert!(server.stop().await.is_drained());
}

#[tokio::test]
async fn a_handshake_that_stalls_is_cut_off() {
    let identity = Certified::new();
    let server = start(&identity, |server| server.header_timeout(SOON)).await;
    let mut stalled = Vec::new();
    for hello in [&[][..], &HALF_A_HELLO[..1], &HALF_A_HELLO] {
        let mut stream = TcpStream::connect(server.addr).await.unwrap();
        stream.write_all(hello).await.unwrap();
        stalled.push(stream);
    }
    // So is one that sends no request behind its handshake.
    let mut silent = identity.connect(server.addr, &[]).await.unwrap();
    for mut stream in stalled {
        let _ = ends(stream.read_to_end(&mut Vec::new())).await;
    }
    let _ = ends(silent.read_to_end(&mut Vec::new())).await;
    still_answers(&identity, &server).await;
}

#[tokio::test]
async fn a_drain_does_not_wait_for_handshakes() {
    let identity = Certified::new();
    let server = start(&identity, |server| {
        server.header_timeout(NEVER).drain_timeout(NEVER)
    })
    .await;
    let mut stalled = Vec::new();
    for hello in [&[][..], &HALF_A_HELLO[..1], &HALF_A_HELLO] {
        let mut stream = TcpStream::connect(server.addr).await.unwrap();
        stream.write_all(hello).await.unwrap();
        stalled.push(stream);
    }
    let mut refused = TcpStream::connect(server.addr).await.unwrap();
    refused.write_all(b"GET / HTTP/1.1\r\n").await.unwrap();
    refused.read_exact(&mut [0; 12]).await.unwrap();
    // Connections are accepted in order, so the server has all of these once it answers this one.
    still_answers(&identity, &server).await;
    assert!(server.stop().await.is_drained());
}

#[tokio::test]
async fn a_handshake_that_stalls_makes_room_for_a_newcomer() {
    let identity = Certified::new();
    for per_peer in [false, true] {
        let server = start(&identity, |server| {
            let server = server.header_timeout(NEVER);
            match per_peer {
                false => server.max_connections(1),
                true => server.max_connections_per_peer(1),
            }
        })
        .await;
        let mut stalled = TcpStream::connect(server.addr).await.unwrap();
        stalled.write_all(&HALF_A_HELLO).await.unwrap();
        still_answers(&identity, &server).await;
        let _ = ends(stalled.read_to_end(&mut Vec::new())).await;
    }
}

#[tokio::test]
async fn plain_http_is_told_that_the_port_speaks_tls() {
    let identity = Certified::new();
    let server = start(&identity, |server| server.header_timeout(NEVER)).await;
    let body = "x".repeat(60_000);
    for request in [
        "GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n".to_owned(),
        format!("POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 60000\r\n\r\n{body}"),
        "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_owned(),
    ] {
        let mut stream = TcpStream::connect(server.addr).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        let reading = async {
            // The server has closed its side only.
            stream.read_to_string(&mut answer).await.unwrap();
            stream.shutdown().await.unwrap();
        };
        ends(reading).await;
        assert!(answer.starts_with("HTTP/1.1 400 "), "{answer}");
        assert!(answer.contains("https://"), "{answer}");
        let body = answer.split_once("\r\n\r\n").unwrap().1;
        let problem: serde_json::Value = serde_json::from_str(body).unwrap();
        assert_eq!(problem["code"], "invalid-request");
        assert!(answer.contains(&format!("content-length: {}\r\n", body.len())));
    }
    still_answers(&identity, &server).await;
}

#[tokio::test]
async fn what_is_no_tls_of_today_ends_its_own_connection_alone() {
    let identity = Certified::new();
    let server = start(&identity, |server| server.header_timeout(NEVER)).await;
    let mut ssl_2 = vec![0x80, 0x2e, 1, 0, 2, 0, 0x15, 0, 0, 0, 0x10];
    ssl_2.extend([0; 37]);
    let mut ssl_3 = vec![22, 3, 0, 0, 0x2d, 1, 0, 0, 0x29, 3, 0];
    ssl_3.extend([0; 39]);
    for bytes in [&ssl_2[..], &ssl_3, &[0; 64], &[22; 64], &[0xff; 4096]] {
        let answer = raw(server.addr, bytes).await;
        assert!(!answer.contains("HTTP"), "{answer}");
    }
    // A health check of a balancer connects and closes.
    drop(TcpStream::connect(server.addr).await.unwrap());
    still_answers(&identity, &server).await;
    assert!(server.stop().await.is_drained());
}

#[tokio::test]
async fn a_client_that_reads_no_answer_over_tls_is_cut_off() {
    let identity = Certified::new();
    let server = start(&identity, |server| {
        let server = server.write_timeout(Duration::from_millis(100));
        server.header_timeout(NEVER).max_connections(1)
    })
    .await;
    let payload = format!("{{\"a\":\"{}\"}}", "x".repeat(200_000));
    let submit = server.submit("k").json(payload);
    let id = send(&identity, submit, server.addr).await.request_id();
    let ask =
        format!("GET /api/v1/hitl/status/{id} HTTP/1.1\r\nHost: localhost\r\nTenant-Id: t\r\n\r\n");
    let mut stream = identity.connect(server.addr, &[]).await.unwrap();
    stream.write_all(ask.repeat(200).as_bytes()).await.unwrap();
    stream.read_exact(&mut [0; 12]).await.unwrap();
    // There is one connection, and it is not idle: the newcomer waits until it is cut off.
    still_answers(&identity, &server).await;
}

/// What TLS holds of an answer is not yet sent, although hyper has no more of it.
#[tokio::test]
async fn a_client_that_reads_slowly_over_tls_gets_all_of_its_answer() {
    let identity = Certified::new();
    let socket = TcpSocket::new_v4().unwrap();
    // Accepted sockets have it too.
    socket.set_send_buffer_size(4096).unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let listener: TcpListener = socket.listen(16).unwrap();
    let addr = listener.local_addr().unwrap();
    let server = Server::from_listener(listener)
        .tls(tls(&identity))
        .header_timeout(SOON)
        .write_timeout(NEVER);
    let service = HitlService::new(MemoryStore::new());
    let server = tokio::spawn(server.serve(service, std::future::pending()));
    let payload = format!("{{\"a\":\"{}\"}}", "x".repeat(60_000));
    let submit = Call::post(addr, "actions", "k").json(payload);
    let id = send(&identity, submit, addr).await.request_id();
    let mut stream = identity.connect_with_buffer(addr, 4096).await.unwrap();
    let ask = format!(
        "GET /api/v1/hitl/actions/{id} HTTP/1.1\r\nHost: localhost\r\nTenant-Id: t\r\n\
         Connection: close\r\n\r\n"
    );
    stream.write_all(ask.as_bytes()).await.unwrap();
    let mut answer = vec![0; 8192];
    ends(stream.read_exact(&mut answer)).await.unwrap();
    // Longer than the connection may be idle, and than it has to end then.
    tokio::time::sleep(3 * SOON).await;
    let rest = ends(stream.read_to_end(&mut answer)).await;
    rest.unwrap_or_else(|error| panic!("cut off after {} bytes: {error}", answer.len()));
    assert!(answer.len() > 60_000, "{}", answer.len());
    assert!(answer.ends_with(b"}"));
    server.abort();
}

#[tokio::test]
async fn a_new_certificate_is_for_new_connections() {
    let (old, new) = (Certified::new(), Certified::new());
    let (sender, certificate) = watch::channel(tls(&old));
    let server = start_with(
        Disk::default(),
        |service| service,
        |server| server.watched_tls(certificate),
    )
    .await;
    let mut kept = old.connect(server.addr, &[]).await.unwrap();
    sender.send_replace(tls(&new));
    still_answers(&new, &server).await;
    assert!(old.connect(server.addr, &[]).await.is_err());
    kept.write_all(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
        .await
        .unwrap();
    let mut answer = [0; 12];
    ends(kept.read_exact(&mut answer)).await.unwrap();
    assert_eq!(&answer, b"HTTP/1.1 200");
    // Whoever can no longer send a new one leaves the last.
    drop(sender);
    still_answers(&new, &server).await;
}

#[tokio::test]
async fn the_servers_own_pages_are_https() {
    let identity = Certified::new();
    let tls = tls(&identity);
    let server = start_with(
        Disk::default(),
        |service| {
            let host = "aegis.example.com".parse().unwrap();
            service.inbox(Inbox::new()).host(host)
        },
        |server| server.tls(tls),
    )
    .await;
    let own = format!("localhost:{}", server.addr.port());
    for (origin, status) in [
        (format!("https://{own}"), 202),
        (format!("http://{own}"), 403),
        ("https://aegis.example.com".to_owned(), 202),
        ("http://aegis.example.com".to_owned(), 403),
        ("https://evil.example.com".to_owned(), 403),
    ] {
        let key = origin.replace("http://", "plain-");
        let call = server.approve(&key).host(&own).header("Origin", &origin);
        let reply = send(&identity, call, server.addr).await;
        assert_eq!(reply.status, status, "{origin}");
    }
    let sign_out = Call::new(server.addr, "POST", "/sign-out").host(&own);
    let reply = send(&identity, sign_out, server.addr).await;
    let cookie = reply.header("set-cookie").unwrap();
    assert!(cookie.starts_with("__Host-aegis=;"), "{cookie}");
    assert!(cookie.contains("; Secure"), "{cookie}");
}

#[test]
fn a_certificate_or_a_key_that_cannot_be_used_is_named() {
    let (one, other) = (Certified::new(), Certified::new());
    let broken = "-----BEGIN CERTIFICATE-----\n???\n-----END CERTIFICATE-----\n";
    let empty = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
    let broken_key = "-----BEGIN PRIVATE KEY-----\n???\n-----END PRIVATE KEY-----\n";
    let empty_key = "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n";
    let encrypted =
        "-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n";
    let (chain, key) = (&*one.certificate, &*one.key);
    for (chain, key, is_key, shown) in [
        ("", key, false, "no certificate"),
        (key, key, false, "no certificate"),
        (broken, key, false, "certificate is not valid PEM"),
        (empty, key, false, "certificate cannot be used"),
        (chain, "", true, "no private key"),
        (chain, chain, true, "no private key"),
        (chain, encrypted, true, "not encrypted"),
        (chain, broken_key, true, "key is not valid PEM"),
        (chain, empty_key, true, "key cannot be used"),
    ] {
        let error = Tls::from_pem(chain.as_bytes(), key.as_bytes()).unwrap_err();
        assert!(error.to_string().contains(shown), "{shown}: {error}");
        assert_eq!(
            (error.is_key(), error.is_mismatch()),
            (is_key, false),
            "{shown}"
        );
    }
    let error = Tls::from_pem(chain.as_bytes(), other.key.as_bytes()).unwrap_err();
    assert!(error.is_mismatch() && !error.is_key(), "{error}");
    // Both in one file, the key first.
    let both = format!("{key}{chain}");
    assert!(Tls::from_pem(both.as_bytes(), both.as_bytes()).is_ok());
}

/// Records that carry no bytes of a request are no activity.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_floods_a_connection_with_key_updates_is_cut_off() {
    let identity = Certified::new();
    let server = start(&identity, |server| server.header_timeout(SOON)).await;
    let stream = identity.connect(server.addr, &[]).await.unwrap();
    let (mut socket, mut session) = stream.into_inner();
    let flood = async {
        loop {
            let mut records = Vec::new();
            while records.len() < 64 * 1024 {
                session.refresh_traffic_keys().unwrap();
                session.write_tls(&mut records).unwrap();
            }
            if socket.write_all(&records).await.is_err() {
                return;
            }
        }
    };
    ends(flood).await;
    still_answers(&identity, &server).await;
}
