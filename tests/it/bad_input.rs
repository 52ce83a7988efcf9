//! What is malformed, hostile or slow is refused in words, and the server goes on.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use aegis_hitl::store::Store;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tracing::Level;

use crate::support::h2::{self, H2};
use crate::support::{
    Call, Disk, Faulty, HANG, Log, Mood, Running, alone, raw, raw_until_closed, read_until, start,
    start_with,
};

/// A whole `POST /hitl/approve` but for what comes behind its identity.
const HEAD: &str = "POST /api/v1/hitl/approve HTTP/1.1\r\nHost: localhost\r\nTenant-Id: t\r\nThread-Id: h\r\n\
                    Idempotency-Key: k\r\nContent-Type: application/json\r\n";

async fn assert_refused(cases: Vec<(Call, u16, &str)>) {
    for (call, status, what) in cases {
        let reply = call.send().await;
        assert_eq!(reply.status, status, "{what}: {reply:?}");
        let media_type = reply.header("content-type");
        assert_eq!(media_type, Some("application/problem+json"), "{reply:?}");
        let detail = reply.text("detail");
        assert!(detail.contains(what), "'{detail}' lacks '{what}'");
    }
}

#[tokio::test]
async fn a_bad_header_is_named_with_its_fault_and_what_is_allowed() {
    let store = Disk::default();
    let server = start(store.clone()).await;
    let s = &server;
    let call = |name: &str, value: &[u8]| s.approve("k").without(name).header(name, value);
    let long = "k".repeat(256);
    let allowed = "allowed are 1 to 255 visible ASCII characters";
    assert_refused(vec![
        (
            s.approve("k").without("tenant-id"),
            400,
            "the Tenant-Id header is missing",
        ),
        (
            s.approve("k").without("thread-id"),
            400,
            "the Thread-Id header is missing",
        ),
        (
            s.approve("k").without("idempotency-key"),
            400,
            "the Idempotency-Key header is missing",
        ),
        (call("tenant-id", b""), 400, "the tenant id is empty"),
        (
            call("tenant-id", b"a b"),
            400,
            "non-ASCII character at byte 1",
        ),
        (
            call("thread-id", "ü".as_bytes()),
            400,
            "the Thread-Id header: the thread id has",
        ),
        (call("thread-id", b"a\xff"), 400, "at byte 1"),
        (call("idempotency-key", "kéy".as_bytes()), 400, "at byte 1"),
        (
            call("idempotency-key", long.as_bytes()),
            400,
            "has 256 characters",
        ),
        (
            call("idempotency-key", format!("\"{long}\"").as_bytes()),
            400,
            "has 256 characters",
        ),
        (call("idempotency-key", long.as_bytes()), 400, allowed),
        (call("idempotency-key", b"\"k"), 400, "opens with a quote"),
        (call("idempotency-key", b"\"\""), 400, "is empty"),
        (
            s.approve("k").header("X-Request-Id", "a b"),
            400,
            "the X-Request-Id header",
        ),
        (
            s.approve("k").header("X-Request-Id", &long),
            400,
            "has 256 characters",
        ),
    ])
    .await;
    let longest = "k".repeat(255);
    assert_eq!(s.approve(&longest).send().await.status, 202);
    assert_eq!(store.totals().await.unwrap().actions, 1);
}

#[tokio::test]
async fn a_repeated_header_is_named() {
    use aegis_hitl::server::HitlService;
    use http_body_util::{BodyExt, Empty};
    use tower::ServiceExt;

    // Not over a socket, as HTTP/1.1 folds equal lengths into one before anyone can see them.
    let store = Disk::default();
    for (path, method) in [
        ("approve", "POST"),
        ("actions", "POST"),
        ("status/x", "GET"),
    ] {
        for name in [
            "Tenant-Id",
            "Thread-Id",
            "Idempotency-Key",
            "X-Request-Id",
            "Authorization",
            "Content-Type",
            "Content-Length",
        ] {
            let request = http::Request::builder()
                .method(method)
                .uri(format!("/api/v1/hitl/{path}"))
                .header(name, "0")
                .header(name, "0")
                .body(Empty::<bytes::Bytes>::new())
                .unwrap();
            let service = HitlService::new(store.clone());
            let answer = service.oneshot(request).await.unwrap();
            assert_eq!(answer.status(), 400, "{path} {name}");
            let body = answer.into_body().collect().await.unwrap().to_bytes();
            let body = String::from_utf8_lossy(&body).into_owned();
            assert!(
                body.contains(&format!("the {name} header is repeated")),
                "{body}"
            );
        }
    }
    assert_eq!(store.totals().await.unwrap().actions, 0);
}

#[tokio::test]
async fn a_valid_x_request_id_is_echoed_whatever_the_answer() {
    let server = start(Disk::default()).await;
    for call in [
        server.approve("k"),
        server.approve("k 1"),
        server.post("aprove", "k"),
        server.get("/nowhere"),
    ] {
        let reply = call.header("X-Request-Id", "call-1").send().await;
        assert_eq!(reply.header("x-request-id"), Some("call-1"), "{reply:?}");
    }
    let invalid = server
        .approve("k")
        .header("X-Request-Id", "a b")
        .send()
        .await;
    assert_eq!(invalid.header("x-request-id"), None);
}

#[tokio::test]
async fn a_bad_body_is_refused_in_words() {
    let store = Disk::default();
    let server = start(store.clone()).await;
    let json = |body: &str| server.approve("k").json(body.to_owned());
    let deep = format!("{{\"a\":{}{}}}", "[".repeat(50_000), "]".repeat(50_000));
    let declared = |media_type: &str| {
        server
            .approve("k")
            .body("{}")
            .header("Content-Type", media_type)
    };
    assert_refused(vec![
        (json("{"), 400, "not valid JSON"),
        (json("{\"a\":1}x"), 400, "not valid JSON"),
        (json("{'a':1}"), 400, "not valid JSON"),
        (json("null"), 400, "null"),
        (json("\"text\""), 400, "a string"),
        (json(&deep), 400, "recursion limit"),
        (json("{\"a\":1,\"a\":1}"), 400, "not valid JSON"),
        (json("{\"aegis\":1}"), 400, "'aegis'"),
        (
            server.approve("k").json(&b"{\"a\":\"\xff\"}"[..]),
            400,
            "not valid JSON",
        ),
        (
            server.approve("k").body("{}"),
            415,
            "allowed are 'application/json'",
        ),
        (
            declared("text/plain"),
            415,
            "allowed are 'application/json'",
        ),
        (
            declared("application/xml"),
            415,
            "allowed are 'application/json'",
        ),
        (
            json("{}").header("Content-Encoding", "gzip"),
            415,
            "allowed is 'identity'",
        ),
        (
            json("{}").header("Content-Encoding", "identity, br"),
            415,
            "allowed is 'identity'",
        ),
    ])
    .await;
    assert_eq!(store.totals().await.unwrap().actions, 0);
    let accepted = [
        declared("Application/JSON; charset=utf-8"),
        server
            .approve("k2")
            .body("{}")
            .header("Content-Type", "application/vnd.a+json"),
        server.approve("k3").header("Content-Type", "text/plain"),
        server
            .approve("k4")
            .json("{}")
            .header("Content-Encoding", "identity"),
        server.approve("k5").json("  \n"),
    ];
    for call in accepted {
        assert_eq!(call.send().await.status, 202);
    }
}

#[tokio::test]
async fn a_body_of_exactly_the_limit_is_taken_and_one_byte_more_is_not() {
    let server = start_with(
        Disk::default(),
        |service| service.body_limit(64),
        |server| server,
    )
    .await;
    let body = |len: usize| format!("{{\"a\":\"{}\"}}", "x".repeat(len - 8));
    assert_eq!(body(64).len(), 64);
    assert_eq!(server.approve("k").json(body(64)).send().await.status, 202);
    for http2 in [false, true] {
        let call = server.approve("k2").json(body(65));
        let call = if http2 { call.http2() } else { call };
        assert_eq!(call.send().await.status, 413);
    }
}

#[tokio::test]
async fn a_client_that_sends_far_too_much_still_reads_the_answer() {
    let server = start(Disk::default()).await;
    let body = vec![b'x'; 8 * 1024 * 1024];
    let with_length = [
        format!("{HEAD}Content-Length: {}\r\n\r\n", body.len()).into_bytes(),
        body.clone(),
    ];
    let chunked = [
        format!(
            "{HEAD}Transfer-Encoding: chunked\r\n\r\n{:x}\r\n",
            body.len()
        )
        .into_bytes(),
        body,
        b"\r\n0\r\n\r\n".to_vec(),
    ];
    for request in [with_length, chunked.concat_pair()] {
        let mut stream = TcpStream::connect(server.addr).await.unwrap();
        // It looks for an answer only once everything is sent, as the simplest clients do.
        for part in &request {
            stream.write_all(part).await.unwrap();
        }
        let answer = read_until(&mut stream, "}").await;
        assert!(answer.starts_with("HTTP/1.1 413 "), "{answer}");
        assert!(answer.contains("payload-too-large"), "{answer}");
    }
    server.still_answers().await;
}

trait ConcatPair {
    fn concat_pair(self) -> [Vec<u8>; 2];
}

impl ConcatPair for [Vec<u8>; 3] {
    fn concat_pair(self) -> [Vec<u8>; 2] {
        let [head, body, end] = self;
        [head, [body, end].concat()]
    }
}

#[tokio::test]
async fn a_client_that_asks_first_is_refused_before_it_sends() {
    let server = start(Disk::default()).await;
    let mut stream = TcpStream::connect(server.addr).await.unwrap();
    let head = format!("{HEAD}Content-Length: 999999\r\nExpect: 100-continue\r\n\r\n");
    stream.write_all(head.as_bytes()).await.unwrap();
    let answer = read_until(&mut stream, "}").await;
    assert!(answer.starts_with("HTTP/1.1 413 "), "{answer}");
    assert!(
        answer.to_lowercase().contains("connection: close"),
        "{answer}"
    );

    let mut stream = TcpStream::connect(server.addr).await.unwrap();
    let head = format!("{HEAD}Content-Length: 2\r\nExpect: 100-continue\r\n\r\n");
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut go_on = [0; 25];
    stream.read_exact(&mut go_on).await.unwrap();
    assert_eq!(&go_on, b"HTTP/1.1 100 Continue\r\n\r\n");
    stream.write_all(b"{}").await.unwrap();
    assert!(
        read_until(&mut stream, "}")
            .await
            .starts_with("HTTP/1.1 202 ")
    );
}

#[tokio::test]
async fn a_body_that_does_not_arrive_is_408() {
    let server = start_with(
        Disk::default(),
        |service| service.body_timeout(Duration::from_millis(50)),
        |server| server,
    )
    .await;
    for head in [
        "Content-Length: 10\r\n\r\n{",
        "Transfer-Encoding: chunked\r\n\r\n5\r\n{",
    ] {
        let answer = raw(server.addr, format!("{HEAD}{head}")).await;
        assert!(answer.starts_with("HTTP/1.1 408 "), "{answer}");
        assert!(
            answer.to_lowercase().contains("connection: close"),
            "{answer}"
        );
    }
    server.still_answers().await;
}

#[tokio::test]
async fn a_body_that_breaks_off_decides_nothing() {
    let store = Disk::default();
    let server = start(store.clone()).await;
    for rest in [
        "Content-Length: 10\r\n\r\n{}",
        "Transfer-Encoding: chunked\r\n\r\nzz\r\n{}",
        "Transfer-Encoding: chunked\r\n\r\n2\r\n{}",
    ] {
        let mut stream = TcpStream::connect(server.addr).await.unwrap();
        let request = format!("{HEAD}{rest}");
        stream.write_all(request.as_bytes()).await.unwrap();
        stream.shutdown().await.unwrap();
        let mut answer = String::new();
        let read = timeout(HANG, stream.read_to_string(&mut answer));
        _ = read.await.unwrap();
        assert!(!answer.contains(" 202 "), "{answer}");
    }
    assert_eq!(store.totals().await.unwrap().actions, 0);
    server.still_answers().await;
}

/// The status line and the head of an answer, and its body.
fn parts(answer: &str) -> (&str, &str) {
    answer.split_once("\r\n\r\n").unwrap_or((answer, ""))
}

/// Sends a request and asserts that it is refused with a problem, and the connection closed.
async fn assert_problem(server: &Running, request: &str, status: &str, what: &str) {
    let answer = raw(server.addr, request).await;
    let (head, body) = parts(&answer);
    let head = head.to_lowercase();
    assert!(head.starts_with(&format!("http/1.1 {status} ")), "{answer}");
    for line in [
        "content-type: application/problem+json",
        "connection: close",
        "x-request-id: r",
    ] {
        assert!(head.contains(line), "{answer}");
    }
    assert!(body.contains(what), "'{body}' lacks '{what}'");
    assert!(body.contains(&format!("\"status\":{status}")), "{body}");
}

#[tokio::test]
async fn http_1_1_names_its_host_once() {
    let store = Disk::default();
    let server = start(store.clone()).await;
    let rest = HEAD.replace("Host: localhost\r\n", "");
    for (host, what) in [
        ("", "the Host header is missing"),
        ("Host: h\r\nHost: h\r\n", "the Host header is repeated"),
        ("Host: h\r\nHost: g\r\n", "the Host header is repeated"),
        ("Host: \r\n", "the Host header is no host"),
        ("Host: a b\r\n", "the Host header is no host"),
        ("Host: u@h\r\n", "the Host header is no host"),
        ("Host: h/x\r\n", "the Host header is no host"),
        ("Host: h, g\r\n", "the Host header is no host"),
        ("Host: h:x\r\n", "the Host header is no host"),
        ("Host: h\u{e9}\r\n", "the Host header is no host"),
    ] {
        let request = format!("{rest}{host}X-Request-Id: r\r\nContent-Length: 2\r\n\r\n{{}}");
        assert_problem(&server, &request, "400", what).await;
    }
    // An absolute target takes the place of the header's value, but not of the header.
    let absolute = "GET http://h/livez HTTP/1.1\r\nX-Request-Id: r\r\n\r\n";
    assert_problem(&server, absolute, "400", "the Host header is missing").await;
    assert_eq!(store.totals().await.unwrap().actions, 0);
    for good in [
        "GET /livez HTTP/1.0\r\n\r\n",
        "GET /livez HTTP/1.1\r\nHost: [::1]:8000\r\nConnection: close\r\n\r\n",
        "GET /livez HTTP/1.1\r\nHost: a.example:80\r\nConnection: close\r\n\r\n",
    ] {
        let answer = raw(server.addr, good).await;
        assert!(answer.contains(" 200 OK\r\n"), "{answer}");
    }
}

#[tokio::test]
async fn a_transfer_coding_that_is_not_known_is_501() {
    let store = Disk::default();
    let server = start(store.clone()).await;
    for (coding, status) in [
        ("gzip, chunked", "501"),
        ("gzip\r\nTransfer-Encoding: chunked", "501"),
        ("identity, chunked", "501"),
        ("chunked;a=b, chunked", "501"),
        ("chunked, chunked", "400"),
    ] {
        let request = format!(
            "{HEAD}X-Request-Id: r\r\nTransfer-Encoding: {coding}\r\n\r\n2\r\n{{}}\r\n0\r\n\r\n"
        );
        assert_problem(&server, &request, status, "transfer coding").await;
    }
    let request = format!("{HEAD}Transfer-Encoding: Chunked\r\n\r\n2\r\n{{}}\r\n0\r\n\r\n");
    let mut stream = TcpStream::connect(server.addr).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    assert!(
        read_until(&mut stream, "}")
            .await
            .starts_with("HTTP/1.1 202 ")
    );
}

#[tokio::test]
async fn headers_of_more_than_32_kib_are_431_in_words() {
    let server = start(Disk::default()).await;
    let large = "b".repeat(33 * 1024);
    let request = format!("{HEAD}X-Request-Id: r\r\nA: {large}\r\nContent-Length: 2\r\n\r\n{{}}");
    assert_problem(&server, &request, "431", "allowed are 32768").await;
    let reply = server.approve("k").header("a", &large).http2().send().await;
    assert_eq!(
        (reply.status, &*reply.text("code")),
        (431, "invalid-request")
    );
    let fits = server.approve("k").header("a", "b".repeat(31 * 1024));
    assert_eq!(fits.send().await.status, 202);
}

// hyper answers these before there is a request, and gives nobody a chance to add a body.
#[tokio::test]
async fn what_is_no_request_is_refused_without_words() {
    let store = Disk::default();
    let server = start(store.clone()).await;
    let large = "b".repeat(100_000);
    let many = "A: b\r\n".repeat(101);
    for (rest, status) in [
        (
            "Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}".to_owned(),
            "400",
        ),
        ("Content-Length: 2, 3\r\n\r\n{}".to_owned(), "400"),
        ("Content-Length: +2\r\n\r\n{}".to_owned(), "400"),
        // A coding that is not chunked at the end has no length: RFC 9112 wants 400, known or not.
        ("Transfer-Encoding: gzip\r\n\r\n{}".to_owned(), "400"),
        (
            "Transfer-Encoding: chunked, gzip\r\n\r\n{}".to_owned(),
            "400",
        ),
        ("A b\r\n\r\n".to_owned(), "400"),
        (" A: b\r\n\r\n".to_owned(), "400"),
        (format!("A: {large}\r\n\r\n"), "431"),
        (format!("{many}\r\n"), "431"),
    ] {
        let answer = raw(server.addr, format!("{HEAD}{rest}")).await;
        let (head, body) = parts(&answer);
        let head = head.to_lowercase();
        assert!(head.starts_with(&format!("http/1.1 {status} ")), "{answer}");
        assert!(head.contains("connection: close"), "{answer}");
        assert!(head.contains("content-length: 0"), "{answer}");
        assert_eq!(body, "");
    }
    assert_eq!(store.totals().await.unwrap().actions, 0);
}

// The length is ignored, as RFC 9112 has it, and nothing else is read from such a connection.
#[tokio::test]
async fn a_length_beside_a_transfer_coding_ends_the_connection() {
    let server = start(Disk::default()).await;
    let smuggled = "GET /livez HTTP/1.1\r\nHost: h\r\n\r\n";
    for lines in [
        "Content-Length: 3\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: chunked\r\nContent-Length: 3",
    ] {
        let request = format!("{HEAD}{lines}\r\n\r\n2\r\n{{}}\r\n0\r\n\r\n{smuggled}");
        let answer = raw(server.addr, request).await;
        assert_eq!(answer.matches("HTTP/1.1 ").count(), 1, "{answer}");
        assert!(
            answer.to_lowercase().contains("connection: close"),
            "{answer}"
        );
    }
}

#[tokio::test]
async fn a_path_has_one_spelling() {
    let store = Disk::default();
    let server = start(store.clone()).await;
    let ask = async |target: &str| {
        let rest = HEAD.split_once("/api/v1/hitl/approve").unwrap().1;
        let answer = raw(
            server.addr,
            format!("POST {target}{rest}Connection: close\r\n\r\n"),
        )
        .await;
        let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
        (
            head.split(' ').nth(1).unwrap_or_default().to_owned(),
            body.to_owned(),
        )
    };
    for target in [
        "//api/v1/hitl/approve",
        "/api/v1//hitl/approve",
        "/api/v1/hitl//approve",
        "/api/v1/hitl/approve//",
        "/api/v1/hitl/./approve",
        "/api/v1/hitl/../hitl/approve",
        "/api/v1/hitl/%61pprove",
        "/api/v1/hitl/%2e%2e/hitl/approve",
        "/api/v1/hitl%2fapprove",
        "/api/v1/hitl/approve%00",
        "/api/v1/hitl/APPROVE",
        "/api/v1/hitl/aprove",
        "/api/v1/hitl/",
        "/api/v1/hitl",
        "/hitl/approve",
        "/",
        "*",
    ] {
        let (status, body) = ask(target).await;
        assert_eq!(status, "404", "{target}");
        assert!(body.contains("\"code\":\"not-found\""), "{target}: {body}");
    }
    let (_, unknown) = ask("/api/v1/hitl/aprove").await;
    assert!(unknown.contains("'approve' and 'reject'"), "{unknown}");
    let (status, _) = ask(&format!("/api/v1/hitl/{}", "a".repeat(60_000))).await;
    assert!(["404", "414", "431"].contains(&&*status), "{status}");
    assert_eq!(store.totals().await.unwrap().actions, 0);

    // One key for all: each of these is the same action, spelt as the protocol allows.
    let mut statuses = Vec::new();
    for target in [
        "/api/v1/hitl/approve",
        "/api/v1/hitl/approve/",
        "/api/v1/hitl/approve?x=1",
        "http://localhost/api/v1/hitl/approve",
    ] {
        statuses.push(ask(target).await.0);
    }
    assert_eq!(statuses, ["202", "409", "409", "409"]);
}

#[tokio::test]
async fn another_prefix_moves_the_endpoints() {
    for (prefix, path) in [("", "/hitl/approve"), ("/a/b/", "/a/b/hitl/approve")] {
        let server = start_with(
            Disk::default(),
            |service| service.prefix(prefix),
            |server| server,
        )
        .await;
        let call = |path: &str| {
            Call::new(server.addr, "POST", path)
                .header("Tenant-Id", "t")
                .header("Thread-Id", "h")
                .header("Idempotency-Key", "k")
        };
        let reply = call(path).send().await;
        assert_eq!(reply.status, 202, "{prefix}");
        let location = reply.header("location").unwrap();
        assert_eq!(server.get(location).send().await.status, 200, "{location}");
        assert_eq!(call("/api/v1/hitl/approve").send().await.status, 404);
    }
    use aegis_hitl::server::HitlService;
    for prefix in ["api", "/a b", "/a?b", "/a//b", "/é", "/%61"] {
        let built = HitlService::builder(Disk::default()).prefix(prefix).build();
        assert!(built.is_err(), "{prefix}");
    }
}

#[tokio::test]
async fn a_wrong_method_is_405_with_the_right_ones() {
    let server = start(Disk::default()).await;
    let status = "/api/v1/hitl/status/x";
    for (method, path, allow) in [
        ("GET", "/api/v1/hitl/approve", "POST"),
        ("HEAD", "/api/v1/hitl/approve", "POST"),
        ("PUT", "/api/v1/hitl/reject", "POST"),
        ("DELETE", "/api/v1/hitl/actions/", "GET, HEAD, POST"),
        ("POST", "/api/v1/hitl/actions/x", "GET, HEAD"),
        ("GET", "/api/v1/hitl/actions/x/approve", "POST"),
        ("GET", "/api/v1/hitl/actions/x/claim", "POST"),
        ("POST", "/api/v1/hitl/events", "GET"),
        ("OPTIONS", "/api/v1/hitl/approve", "POST"),
        ("POST", status, "GET, HEAD"),
        ("DELETE", status, "GET, HEAD"),
        ("BREW", status, "GET, HEAD"),
        ("POST", "/livez", "GET, HEAD"),
    ] {
        let reply = Call::new(server.addr, method, path).send().await;
        assert_eq!(reply.status, 405, "{method} {path}");
        assert_eq!(reply.header("allow"), Some(allow), "{method} {path}");
        assert_eq!(reply.body.is_empty(), method == "HEAD", "{method} {path}");
    }
}

#[tokio::test]
async fn noise_is_no_request_and_harms_nobody() {
    let server = start(Disk::default()).await;
    let many_headers = format!("{HEAD}{}\r\n", "A: b\r\n".repeat(200));
    let big_header = format!("{HEAD}A: {}\r\n\r\n", "b".repeat(100_000));
    for (noise, status) in [
        ("\0\0\0\0\r\n\r\n", "400"),
        ("GET / HTTP/9.9\r\n\r\n", "400"),
        ("GET /\r\n\r\n", "400"),
        ("POST /api/v1/hitl/approve HTTP/1.1\r\nA b\r\n\r\n", "400"),
        (&many_headers, "431"),
        (&big_header, "431"),
    ] {
        let answer = raw(server.addr, noise).await;
        let got = answer.split(' ').nth(1).unwrap_or_default();
        assert_eq!(got, status, "{answer}");
    }
    server.still_answers().await;
}

#[tokio::test]
async fn a_panic_ends_its_own_connection_only() {
    let store = Faulty::new(Disk::default(), Mood::Panics);
    let server = start(store.clone()).await;
    for call in [server.approve("k"), server.approve("k").http2()] {
        let reply = timeout(HANG, call.try_send()).await.expect("no hang");
        assert!(reply.is_err());
    }
    store.set(Mood::Well);
    server.still_answers().await;
}

#[tokio::test]
async fn noise_does_not_fill_the_log() {
    let log = Log::capture(Level::INFO);
    let store = Faulty::new(Disk::default(), Mood::Well);
    let server = start_with(
        store.clone(),
        |service| service,
        |server| server.header_timeout(Duration::from_millis(100)),
    )
    .await;
    let head = HEAD.replace("Host: localhost\r\n", "");
    for noise in [
        "\0\0\0\0\r\n\r\n",
        "POST /api/v1/hitl/approve HTTP/1.1\r\nA b\r\n\r\n",
        &format!("{HEAD}Content-Length: 2\r\n\r\nxx"),
        &format!("{HEAD}Transfer-Encoding: gzip, chunked\r\n\r\n"),
        &format!("{head}\r\n"),
        "GET /livez HT",
        "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x09\0\0\0\0\0",
    ] {
        raw(server.addr, noise).await;
    }
    assert_eq!(log.lines(), Vec::<String>::new());
    // Even what is a fault of the server is said once.
    store.set(Mood::Panics);
    for _ in 0..5 {
        assert!(server.approve("k").try_send().await.is_err());
    }
    store.set(Mood::Well);
    server.still_answers().await;
    let lines = log.lines();
    assert!(lines.len() == 1 && lines[0].contains("ERROR"), "{lines:?}");
}

/// Far below the 20 s after which a silent peer is cut off, and far beyond what any step takes.
const SOON: Duration = Duration::from_secs(15);

/// The beginnings of a connection that never get to a request.
const STALLS: [(&str, &[u8]); 6] = [
    ("nothing at all", b""),
    ("a part of a request line", b"POST /api"),
    (
        "a part of the headers",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nTenant-Id",
    ),
    ("a part of the HTTP/2 preface", b"PRI * HTTP/2.0\r\n"),
    (
        "the HTTP/2 preface alone",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ),
    (
        "a part of an HTTP/2 frame",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0\0\0\x20\x01\x05\0\0\0\x01ab",
    ),
];

async fn assert_cut_off(addr: SocketAddr, within: Duration) {
    let connections: Vec<_> = STALLS
        .map(|(what, bytes)| {
            (
                what,
                tokio::spawn(async move { raw_until_closed(addr, bytes).await }),
            )
        })
        .into();
    let drip = tokio::spawn(drip(addr));
    for (what, connection) in connections {
        let (answer, took) = connection.await.unwrap();
        assert!(took < within, "{what}: {took:?}");
        assert!(
            !answer.contains(" 200 ") && !answer.contains(" 202 "),
            "{answer}"
        );
    }
    let took = drip.await.unwrap();
    assert!(took < within, "a header byte now and then: {took:?}");
}

/// Sends one byte of a header now and then, for as long as the server lets it.
async fn drip(addr: SocketAddr) -> Duration {
    let since = Instant::now();
    let mut stream = TcpStream::connect(addr).await.unwrap();
    stream
        .write_all(b"GET /livez HTTP/1.1\r\nA: ")
        .await
        .unwrap();
    let mut tick = tokio::time::interval(Duration::from_millis(100));
    let mut byte = [0];
    while since.elapsed() < HANG {
        tokio::select! {
            _ = tick.tick() => {
                if stream.write_all(b"b").await.is_err() {
                    break;
                }
            }
            read = stream.read(&mut byte) => {
                if matches!(read, Ok(0) | Err(_)) {
                    break;
                }
            }
        }
    }
    since.elapsed()
}

#[tokio::test]
async fn a_connection_without_a_request_is_cut_off() {
    let server = start_with(
        Disk::default(),
        |service| service,
        |server| server.header_timeout(Duration::from_millis(200)),
    )
    .await;
    assert_cut_off(server.addr, SOON).await;
    server.still_answers().await;
}

#[tokio::test]
async fn by_default_slow_headers_are_cut_off_within_ten_seconds() {
    let _alone = alone().await;
    let server = start(Disk::default()).await;
    assert_cut_off(server.addr, Duration::from_secs(10)).await;
    server.still_answers().await;
}

#[tokio::test]
async fn a_slow_second_request_is_cut_off_too() {
    let server = start_with(
        Disk::default(),
        |service| service,
        |server| server.header_timeout(Duration::from_millis(200)),
    )
    .await;
    let (answer, took) =
        raw_until_closed(server.addr, "GET /livez HTTP/1.1\r\nHost: h\r\n\r\nGET /li").await;
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    assert!(took < SOON, "{took:?}");
}

#[tokio::test]
async fn an_http_2_connection_without_requests_is_closed_as_one_of_http_1_is() {
    let server = start_with(
        Disk::default(),
        |service| service,
        |server| server.header_timeout(Duration::from_millis(300)),
    )
    .await;
    let mut client = H2::connect(server.addr, 65_535).await;
    client.get("/livez", &[]).await;
    // It answers every ping, and is told why it has to go.
    client.until(h2::DATA).await;
    let kinds = client.until_closed(SOON).await;
    assert_eq!(kinds, [h2::GOAWAY, h2::GOAWAY]);
}

#[tokio::test]
async fn an_http_2_connection_with_a_request_is_not_idle() {
    let store = Disk::default();
    let server = start_with(
        store.clone(),
        |service| service,
        |server| server.header_timeout(Duration::from_millis(200)),
    )
    .await;
    let id = server.submit("k").send().await.request_id();
    let mut client = H2::connect(server.addr, 65_535).await;
    let path = format!("/api/v1/hitl/status/{id}");
    client.get(&path, &[("prefer", "wait=2")]).await;
    client.until(h2::DATA).await;
    client.until_closed(SOON).await;
}

#[tokio::test]
async fn half_a_header_block_is_cut_off() {
    let server = start_with(
        Disk::default(),
        |service| service,
        |server| server.header_timeout(Duration::from_millis(200)),
    )
    .await;
    for asked in [false, true] {
        let mut client = H2::connect(server.addr, 65_535).await;
        if asked {
            client.get("/livez", &[]).await;
            client.until(h2::DATA).await;
        }
        client.begin(h2::END_STREAM, "/livez", &[]).await;
        client.until_closed(SOON).await;
    }
    server.still_answers().await;
}

#[tokio::test]
async fn a_connection_over_the_limit_waits_for_its_turn() {
    let server: Running = start_with(
        Disk::default(),
        |service| service,
        |server| server.max_connections(1),
    )
    .await;
    let first = TcpStream::connect(server.addr).await.unwrap();
    // Another client is served as soon as the one before it is gone.
    let second = tokio::spawn(server.approve("k").send());
    drop(first);
    assert_eq!(second.await.unwrap().status, 202);
}
