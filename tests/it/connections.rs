//! What `AegisService` does with its connections, and what the server does with those of many clients.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod binary;
mod support;

use std::net::SocketAddr;
use std::process::Command;
use std::time::{Duration, Instant};

use aegis_hitl::AegisService;
use aegis_hitl::client::Builder;
use aegis_hitl::layer::{Backoff, Delivery};
use aegis_hitl::testing::{Act, Peer};
use binary::Served;
use http::Version;
use support::h2::{self, H2};
use support::{Call, Disk, Faulty, HANG, Mood, Running, start_with};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::timeout;

const SHORT: Duration = Duration::from_millis(200);

fn builder(url: &str) -> Builder {
    AegisService::builder()
        .base_url(url)
        .tenant_id("acme")
        .thread_id("run-7")
        .backoff(Backoff::none())
}

#[cfg(feature = "tls")]
#[tokio::test]
async fn a_tls_handshake_that_gets_no_answer_was_never_sent_anything() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let silent = tokio::spawn(async move {
        let mut connections = Vec::new();
        loop {
            connections.push(listener.accept().await.unwrap());
        }
    });
    let start = Instant::now();
    let error = builder(&format!("https://{address}"))
        .timeout(2 * SHORT)
        .max_retries(1)
        .build()
        .unwrap()
        .approve("k-1")
        .await
        .unwrap_err();
    silent.abort();
    assert!(
        error.is_connect() && !error.is_outcome_unknown(),
        "{error:?}"
    );
    assert_eq!(
        (error.attempts(), error.delivery()),
        (2, Delivery::NeverSent)
    );
    assert!(start.elapsed() < 10 * SHORT);
}

#[tokio::test]
async fn http_2_is_spoken_by_prior_knowledge() {
    let peer = Peer::start([Act::answer(202)]).await;
    let service = builder(&peer.url())
        .http2_prior_knowledge()
        .build()
        .unwrap();
    for key in ["k-1", "k-2"] {
        service.approve(key).await.unwrap();
    }
    assert_eq!((peer.count(), peer.connections()), (2, 1));
    assert_eq!(peer.requests()[0].version, Version::HTTP_2);
}

// HTTP/2 would put every further attempt on the connection that answers no more.
#[tokio::test]
async fn an_attempt_after_a_timeout_goes_over_a_new_connection() {
    let peer = Peer::start([Act::hang(), Act::answer(202)]).await;
    let service = builder(&peer.url())
        .http2_prior_knowledge()
        .timeout(SHORT)
        .build()
        .unwrap();
    assert_eq!(service.approve("k-1").await.unwrap().attempts(), 2);
    assert_eq!((peer.count(), peer.connections()), (2, 2));
    // The new one is used on.
    service.approve("k-2").await.unwrap();
    assert_eq!((peer.count(), peer.connections()), (3, 2));
}

// The head came in time, so the pool thinks well of the connection.
#[tokio::test]
async fn an_attempt_after_an_answer_that_stalled_goes_over_a_new_connection() {
    let whole = r#"{"request_id":"r-1","status":"PENDING"}"#;
    let peer = Peer::start([
        Act::answer(200).body("{").body_never_ends(),
        Act::answer(200).body(whole),
    ])
    .await;
    let service = builder(&peer.url())
        .http2_prior_knowledge()
        .timeout(SHORT)
        .build()
        .unwrap();
    service.status("r-1").await.unwrap();
    assert_eq!((peer.count(), peer.connections()), (2, 2));
    service.status("r-1").await.unwrap();
    assert_eq!((peer.count(), peer.connections()), (3, 2));
}

/// Passes connections on to a peer, until those that are open go dead: nothing passes any more, and nobody is told.
struct Relay {
    url: String,
    frozen: tokio::sync::watch::Sender<usize>,
    task: tokio::task::JoinHandle<()>,
}

impl Relay {
    async fn before(peer: &Peer) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let target = peer.address();
        let (frozen, watched) = tokio::sync::watch::channel(0);
        let task = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            for number in 1.. {
                let (mut near, _) = listener.accept().await.unwrap();
                let mut watched = watched.clone();
                connections.spawn(async move {
                    let mut far = tokio::net::TcpStream::connect(target).await.unwrap();
                    tokio::select! {
                        _ = tokio::io::copy_bidirectional(&mut near, &mut far) => return,
                        _ = watched.wait_for(|frozen| *frozen >= number) => {}
                    }
                    // Holds both ends open.
                    std::future::pending::<()>().await;
                });
            }
        });
        Self { url, frozen, task }
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[tokio::test]
async fn a_peer_that_is_gone_without_a_word_is_found_out_by_pings() {
    let peer = Peer::start([Act::answer(202)]).await;
    let relay = Relay::before(&peer).await;
    let service = builder(&relay.url)
        .http2_prior_knowledge()
        .http2_keep_alive(SHORT / 4, SHORT / 2)
        // Only the pings end the attempt in time.
        .timeout(Duration::from_secs(600))
        .build()
        .unwrap();
    service.approve("k-1").await.unwrap();
    relay.frozen.send(1).unwrap();
    let call = service.approve("k-2").into_future();
    let receipt = tokio::time::timeout(Duration::from_secs(60), call).await;
    assert_eq!(receipt.unwrap().unwrap().attempts(), 2);
    // The request on the dead connection never arrived.
    assert_eq!((peer.count(), peer.connections()), (2, 2));
}

#[test]
fn a_keep_alive_of_no_time_is_refused() {
    let builder = builder("http://127.0.0.1:1");
    for (interval, timeout) in [(Duration::ZERO, SHORT), (SHORT, Duration::ZERO)] {
        let builder = builder.clone().http2_keep_alive(interval, timeout);
        let error = builder.build().unwrap_err();
        assert!(error.is_config() && error.to_string().contains("keep-alive"));
    }
}

#[tokio::test]
async fn every_request_names_its_user_agent() {
    let peer = Peer::start([Act::answer(202)]).await;
    let default = builder(&peer.url()).build().unwrap();
    default.approve("k-1").await.unwrap();
    let named = builder(&peer.url())
        .user_agent("bot/2 (x)")
        .build()
        .unwrap();
    named.approve("k-1").await.unwrap();
    let _ = named.status("r-1").await;
    let own = concat!("aegis-hitl/", env!("CARGO_PKG_VERSION"));
    let agents: Vec<_> = peer
        .requests()
        .iter()
        .map(|request| request.header("user-agent").map(str::to_owned))
        .collect();
    let expected = [own, "bot/2 (x)", "bot/2 (x)"].map(|agent| Some(agent.to_owned()));
    assert_eq!(agents, expected);
    for wrong in ["", " ", "a\nb", "\u{e9}"] {
        let error = builder(&peer.url()).user_agent(wrong).build().unwrap_err();
        assert!(error.is_config() && error.to_string().contains("user agent"));
    }
}

#[tokio::test]
async fn a_proxy_is_sent_the_requests_to_an_http_server() {
    let proxy = Peer::start([Act::answer(202)]).await;
    let url = proxy.url().replace("http://", "http://user:secret@");
    let through = builder("http://server.test").proxy(url);
    assert!(!format!("{through:?}").contains("secret"));
    let service = through.clone().build().unwrap();
    service.approve("k-1").await.unwrap();
    let seen = &proxy.requests()[0];
    let target = "http://server.test/api/v1/hitl/approve";
    assert_eq!(seen.uri.to_string(), target);
    assert_eq!(seen.header("host"), Some("server.test"));
    // user:secret
    let expected = "Basic dXNlcjpzZWNyZXQ=";
    assert_eq!(seen.header("proxy-authorization"), Some(expected));

    let both = through.http2_prior_knowledge().build().unwrap_err();
    assert!(both.is_config());
    for wrong in [
        "",
        "socks5://secret:1",
        "https://secret",
        "http://a:secret@",
    ] {
        let error = builder("http://server.test").proxy(wrong).build();
        let error = error.unwrap_err();
        assert!(error.is_config() && error.to_string().contains("proxy"));
        assert!(!format!("{error} {error:?}").contains("secret"));
    }
}

// The environment of a process is not to be changed while it runs, so another process has it.
#[tokio::test]
async fn the_environment_names_the_proxy() {
    let proxy = Peer::start([Act::answer(202)]).await;
    let output = tokio::process::Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "calls_under_a_proxy_of_the_environment",
            "--ignored",
        ])
        .env("HTTP_PROXY", proxy.url())
        .env("NO_PROXY", "spared.invalid")
        .output()
        .await
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && said.contains("1 passed"),
        "{said}"
    );
    assert_eq!(proxy.count(), 1);
}

#[tokio::test]
#[ignore = "run by the_environment_names_the_proxy"]
async fn calls_under_a_proxy_of_the_environment() {
    let builder = |url: &str| builder(url).max_retries(0);
    let proxied = builder("http://server.invalid").build().unwrap();
    proxied.approve("k-1").await.unwrap();
    for direct in [
        builder("http://server.invalid").no_proxy(),
        builder("http://spared.invalid"),
        builder("http://localhost:1"),
        builder("http://[::1]:1"),
    ] {
        let error = direct.build().unwrap().approve("k-1").await.unwrap_err();
        assert!(error.is_connect(), "{error:?}");
    }
}

/// Far beyond what any step takes.
const SOON: Duration = Duration::from_secs(15);

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

/// A connection that has had its answer, and is kept.
async fn kept(addr: SocketAddr) -> H2 {
    let mut client = H2::connect(addr, 65_535).await;
    client.get("/livez", &[]).await;
    client.until(h2::DATA).await;
    client
}

#[tokio::test]
async fn a_newcomer_takes_the_place_of_the_connection_that_was_idle_longest() {
    let server = patient(Disk::default(), |server| server.max_connections(3)).await;
    let mut first = kept(server.addr).await;
    let mut second = kept(server.addr).await;
    let mut third = kept(server.addr).await;
    // The first is now the one that was used last.
    first.get("/livez", &[]).await;
    first.until(h2::DATA).await;
    let mut newcomer = kept(server.addr).await;
    second.until_closed(SOON).await;
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

/// `aegis serve` under these limits of open files: `-n` is both, `-S -n` the soft one.
fn limited(limit: &str, store: &std::path::Path) -> Command {
    let serve = binary::serve(store);
    let mut limited = Command::new("sh");
    limited.args(["-c", &format!("ulimit {limit}; exec \"$0\" \"$@\"")]);
    limited.arg(serve.get_program()).args(serve.get_args());
    for (name, _) in serve.get_envs() {
        limited.env_remove(name);
    }
    limited
}

#[tokio::test]
async fn the_number_of_connections_is_set_by_flag_environment_and_file() {
    let folder = tempfile::TempDir::new().unwrap();
    let config = folder.path().join("aegis.toml");
    let settings = "[serve]\nmax-connections = 9\nmax-connections-per-peer = 1\n";
    std::fs::write(&config, settings).unwrap();
    let store = folder.path().join("aegis.db");
    for arguments in [&["--max-connections", "1"][..], &[]] {
        let mut serve = binary::serve(&store);
        serve.args(arguments);
        if arguments.is_empty() {
            serve.env("AEGIS_CONFIG", &config);
        }
        let served = Served::start(serve);
        let mut first = kept(served.addr).await;
        kept(served.addr).await;
        first.until_closed(SOON).await;
    }
    let mut serve = binary::serve(&store);
    serve.env("AEGIS_MAX_CONNECTIONS", "0");
    assert!(
        binary::run(serve)
            .expect(2)
            .stderr
            .contains("--max-connections")
    );
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn idle_connections_leave_the_store_its_descriptors() {
    let folder = tempfile::TempDir::new().unwrap();
    let served = Served::start(limited("-n 200", &folder.path().join("aegis.db")));
    let mut clients = Vec::new();
    for _ in 0..250 {
        clients.push(kept(served.addr).await);
    }
    let post = "/api/v1/hitl/approve";
    let call = Call::new(served.addr, "POST", post)
        .header("Tenant-Id", "t")
        .header("Thread-Id", "h")
        .header("Idempotency-Key", "k");
    assert_eq!(call.send().await.status, 202);
    let ready = Call::new(served.addr, "GET", "/readyz").send().await;
    assert_eq!(ready.status, 200);
    let log = served.stderr();
    assert!(!log.contains("cannot accept"), "{log}");
    // However many had to go: one line.
    let lines = log.lines().filter(|line| line.contains("WARN"));
    assert_eq!(lines.count(), 1, "{log}");
}

#[cfg(target_os = "linux")]
#[test]
fn the_limit_of_open_files_is_raised_as_far_as_it_may() {
    let folder = tempfile::TempDir::new().unwrap();
    let limit = "-n 2000; ulimit -S -n 200";
    let served = Served::start(limited(limit, &folder.path().join("aegis.db")));
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", served.pid())).unwrap();
    let line = limits
        .lines()
        .find(|line| line.starts_with("Max open files"));
    let numbers: Vec<_> = line.unwrap().split_whitespace().skip(3).collect();
    assert_eq!(numbers, ["2000", "2000", "files"]);
}

#[cfg(unix)]
#[test]
fn a_limit_of_open_files_that_is_too_low_is_named_at_the_start() {
    let folder = tempfile::TempDir::new().unwrap();
    let store = folder.path().join("aegis.db");
    let Err(ended) = Served::try_start(limited("-n 100", &store)) else {
        panic!("it serves");
    };
    let ended = ended.expect(1);
    for what in ["100", "144", "ulimit -n"] {
        assert!(ended.stderr.contains(what), "{}", ended.stderr);
    }
    assert!(!store.exists());
}

/// Changes the soft limit of open files of a process that runs.
#[cfg(target_os = "linux")]
fn set_limit(pid: u32, limit: u32) {
    let arguments = [format!("--pid={pid}"), format!("--nofile={limit}:")];
    assert!(
        Command::new("prlimit")
            .args(arguments)
            .status()
            .unwrap()
            .success()
    );
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn a_server_without_descriptors_says_so_once_and_goes_on() {
    let folder = tempfile::TempDir::new().unwrap();
    let served = Served::start(limited("-n 400", &folder.path().join("aegis.db")));
    set_limit(served.pid(), 5);
    let call = tokio::spawn(Call::new(served.addr, "GET", "/livez").send());
    let (served, line) = tokio::task::spawn_blocking(move || {
        let line = served.line("cannot accept connections");
        (served, line)
    })
    .await
    .unwrap();
    assert!(line.is_some_and(|line| line.contains("WARN")));
    // Time for many further failures.
    tokio::time::sleep(Duration::from_secs(1)).await;
    set_limit(served.pid(), 400);
    assert_eq!(timeout(HANG, call).await.unwrap().unwrap().status, 200);
    let log = served.stderr();
    assert_eq!(log.matches("cannot accept").count(), 1, "{log}");
}
