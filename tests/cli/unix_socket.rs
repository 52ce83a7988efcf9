//! A server on a Unix socket: what it takes the place of, who may connect, and what it leaves.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::os::unix::fs::{FileTypeExt, PermissionsExt, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Barrier;
use std::time::Instant;

use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::binary::{Ended, Served, aegis, run};
use crate::support::process::Process;
use crate::support::tls::Certified;
use crate::support::{Call, HANG, Reply, ends};

struct Place {
    folder: TempDir,
    socket: PathBuf,
}

impl Place {
    fn new() -> Self {
        let folder = TempDir::new().unwrap();
        let socket = folder.path().join("aegis.sock");
        Self { folder, socket }
    }

    /// A server on the socket, with a database of this name.
    fn serve(&self, store: &str) -> Command {
        let mut command = aegis(&["serve"]);
        let listen = format!("unix:{}", self.socket.display());
        command.args(["--listen", &listen, "--store"]);
        command.arg(self.folder.path().join(store));
        command
    }

    fn mode(&self) -> u32 {
        let metadata = fs::symlink_metadata(&self.socket).unwrap();
        assert!(metadata.file_type().is_socket());
        metadata.permissions().mode() & 0o7777
    }

    async fn send(&self, call: Call) -> Reply {
        let stream = tokio::net::UnixStream::connect(&self.socket).await.unwrap();
        ends(call.send_over("http", stream)).await.unwrap()
    }

    async fn still_answers(&self) {
        let key = uuid::Uuid::new_v4().to_string();
        assert_eq!(self.send(approve(&key)).await.status, 202);
    }
}

fn call(method: &str, path: &str) -> Call {
    Call::new(SocketAddr::from(([0; 4], 0)), method, path).host("localhost")
}

fn approve(key: &str) -> Call {
    Call::post(SocketAddr::from(([0; 4], 0)), "approve", key).host("localhost")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_listens_on_a_unix_socket_and_takes_it_away_again() {
    let place = Place::new();
    let server = Served::start(place.serve("aegis.db"));
    assert_eq!(server.url(), format!("unix:{}", place.socket.display()));
    assert!(
        server
            .line("inbox: http://localhost/sign-in?code=")
            .is_some()
    );
    assert_eq!(place.mode(), 0o600);
    place.still_answers().await;
    assert_eq!(place.send(approve("h2").http2()).await.status, 202);
    // As on a loopback address: local names only, and no web pages of others.
    for (host, status) in [
        ("127.0.0.1", 202),
        ("aegis.localhost", 202),
        ("a.example", 421),
    ] {
        assert_eq!(place.send(approve(host).host(host)).await.status, status);
    }
    let foreign = approve("foreign").header("Origin", "http://a.example");
    assert_eq!(place.send(foreign).await.status, 403);
    for path in ["/readyz", "/metrics"] {
        assert_eq!(place.send(call("GET", path)).await.status, 200);
        let rebound = call("GET", path).host("a.example");
        assert_eq!(place.send(rebound).await.status, 421);
    }
    server.stop().expect(0);
    assert!(!place.socket.exists());
}

#[test]
fn the_mode_of_the_socket_is_set_and_the_umask_changes_nothing() {
    let place = Place::new();
    for (mode, shown) in [("0660", 0o660), ("666", 0o666), ("0600", 0o600)] {
        let plain = place.serve("aegis.db");
        let mut command = Command::new("sh");
        command.args(["-c", "umask 077; exec \"$0\" \"$@\""]);
        command.arg(plain.get_program()).args(plain.get_args());
        command.args(["--socket-mode", mode]);
        let server = Served::start(command);
        assert_eq!(place.mode(), shown);
        server.stop().expect(0);
    }
    for mode in ["", "8", "rw", "1777", "0x1ff", "+660", "-1"] {
        let mut command = place.serve("other.db");
        command.arg(format!("--socket-mode={mode}"));
        let ended = run(command).expect(2);
        assert!(ended.stderr.contains("0660"), "{mode}: {ended:?}");
    }
    let mut command = aegis(&["serve", "--listen", "127.0.0.1:0", "--socket-mode", "0660"]);
    command
        .arg("--store")
        .arg(place.folder.path().join("other.db"));
    let ended = run(command).expect(2);
    assert!(ended.stderr.contains("--listen"), "{ended:?}");
    assert!(!place.folder.path().join("other.db").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_socket_of_a_server_that_was_killed_is_replaced() {
    let place = Place::new();
    Served::start(place.serve("aegis.db")).kill();
    assert!(place.socket.exists());
    let server = Served::start(place.serve("aegis.db"));
    place.still_answers().await;
    server.stop().expect(0);
    assert!(!place.socket.exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_socket_of_a_server_that_runs_is_left_alone() {
    let place = Place::new();
    let server = Served::start(place.serve("aegis.db"));
    for store in ["aegis.db", "other.db"] {
        let ended = run(place.serve(store)).expect(1);
        assert!(
            ended.stderr.contains("another server listens on"),
            "{ended:?}"
        );
        assert!(ended.stderr.contains("aegis.sock"), "{ended:?}");
    }
    assert!(!place.folder.path().join("other.db").exists());
    place.still_answers().await;
    server.stop().expect(0);
}

/// One that hangs takes no connections, and yet it listens.
#[tokio::test(flavor = "multi_thread")]
async fn the_socket_of_a_server_with_a_full_queue_is_left_alone() {
    let place = Place::new();
    let socket = tokio::net::UnixSocket::new_stream().unwrap();
    socket.bind(&place.socket).unwrap();
    let listener = socket.listen(0).unwrap();
    let waiting = UnixStream::connect(&place.socket).unwrap();
    let ended = run(place.serve("aegis.db")).expect(1);
    assert!(
        ended.stderr.contains("another server listens on"),
        "{ended:?}"
    );
    drop((waiting, listener));
}

#[test]
fn a_file_that_is_no_socket_is_left_alone() {
    let place = Place::new();
    let refused = |place: &Place| {
        let ended = run(place.serve("aegis.db")).expect(2);
        assert!(ended.stderr.contains("is no socket"), "{ended:?}");
        assert!(!place.folder.path().join("aegis.db").exists());
    };
    fs::write(&place.socket, "precious").unwrap();
    refused(&place);
    assert_eq!(fs::read_to_string(&place.socket).unwrap(), "precious");
    fs::remove_file(&place.socket).unwrap();
    fs::create_dir(&place.socket).unwrap();
    refused(&place);
    fs::remove_dir(&place.socket).unwrap();
    symlink(place.folder.path().join("elsewhere"), &place.socket).unwrap();
    refused(&place);
    assert!(fs::symlink_metadata(&place.socket).unwrap().is_symlink());
}

#[test]
fn a_path_that_cannot_be_bound_is_named() {
    let place = Place::new();
    let missing = place.folder.path().join("missing/aegis.sock");
    let long = place.folder.path().join("x".repeat(120));
    for path in [&missing, &long] {
        let mut command = aegis(&["serve", "--store"]);
        command.arg(place.folder.path().join("aegis.db"));
        command.env("AEGIS_LISTEN", format!("unix:{}", path.display()));
        let ended = run(command).expect(1);
        assert!(ended.stderr.contains(path.to_str().unwrap()), "{ended:?}");
    }
    for listen in ["unix:", "/run/aegis.sock", "localhost:8000", "8000", ""] {
        let ended = run(aegis(&["serve", "--listen", listen])).expect(2);
        assert!(ended.stderr.contains("unix:"), "{listen}: {ended:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_socket_that_another_program_put_in_its_place_is_left() {
    let place = Place::new();
    let server = Served::start(place.serve("aegis.db"));
    fs::remove_file(&place.socket).unwrap();
    let listener = UnixListener::bind(&place.socket).unwrap();
    server.stop().expect(0);
    assert!(place.socket.exists());
    UnixStream::connect(&place.socket).unwrap();
    drop(listener);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_fails_to_start_takes_its_socket_away() {
    let place = Place::new();
    let holder = Served::start({
        let mut command = aegis(&["serve", "--listen", "127.0.0.1:0", "--store"]);
        command.arg(place.folder.path().join("aegis.db"));
        command
    });
    run(place.serve("aegis.db")).expect(1);
    assert!(!place.socket.exists());
    holder.stop().expect(0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_gives_the_path_away_and_answers_what_is_in_flight() {
    let place = Place::new();
    let mut command = place.serve("aegis.db");
    command.env("AEGIS_LOG", "info,aegis_hitl=trace");
    let old = Served::start(command);
    let submit = Call::post(SocketAddr::from(([0; 4], 0)), "actions", "k").host("localhost");
    let id = place.send(submit).await.request_id();
    let mut waiting = tokio::net::UnixStream::connect(&place.socket)
        .await
        .unwrap();
    let request = format!(
        "GET /api/v1/hitl/status/{id} HTTP/1.1\r\nHost: localhost\r\nTenant-Id: t\r\n\
         Prefer: wait=55\r\n\r\n"
    );
    waiting.write_all(request.as_bytes()).await.unwrap();
    assert!(old.line("waits for a decision").is_some());
    old.signal("TERM");
    let begun = Instant::now();
    while place.socket.exists() {
        assert!(begun.elapsed() < HANG);
    }
    let new = Served::start(place.serve("other.db"));
    let mut answer = String::new();
    ends(waiting.read_to_string(&mut answer)).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    old.ended().expect(0);
    place.still_answers().await;
    new.stop().expect(0);
    assert!(!place.socket.exists());
}

#[test]
fn a_server_waits_while_another_one_makes_its_socket() {
    let place = Place::new();
    Served::start(place.serve("aegis.db")).kill();
    let folder = fs::File::open(place.folder.path()).unwrap();
    folder.lock().unwrap();
    let mut command = place.serve("aegis.db");
    command.stderr(Stdio::piped());
    let mut server = Process::start(command);
    let mut stderr = BufReader::new(server.stderr.take().unwrap());
    let mut said = String::new();
    while !said.contains("is making a socket") {
        assert_ne!(stderr.read_line(&mut said).unwrap(), 0, "{said}");
    }
    fs::remove_file(&place.socket).unwrap();
    let listener = UnixListener::bind(&place.socket).unwrap();
    folder.unlock().unwrap();
    stderr.read_to_string(&mut said).unwrap();
    assert_eq!(server.wait().unwrap().code(), Some(1), "{said}");
    assert!(said.contains("another server listens on"), "{said}");
    drop(listener);
}

/// Each sees that nobody listens, and only one may take the path.
#[test]
fn of_servers_that_start_at_once_one_has_the_socket() {
    let place = Place::new();
    Served::start(place.serve("aegis.db")).kill();
    // A server ends with the thread that started it, so the threads end together.
    let all = Barrier::new(4);
    let started: Vec<Result<Served, Ended>> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4)
            .map(|number| {
                let (command, all) = (place.serve(&format!("{number}.db")), &all);
                scope.spawn(move || {
                    let started = Served::try_start(command);
                    all.wait();
                    started
                })
            })
            .collect();
        threads.into_iter().map(|it| it.join().unwrap()).collect()
    });
    let served = started.iter().filter(|it| it.is_ok()).count();
    assert_eq!(served, 1);
    for ended in started.into_iter().filter_map(Result::err) {
        let ended = ended.expect(1);
        assert!(
            ended.stderr.contains("another server listens on"),
            "{ended:?}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_limit_per_peer_does_not_apply() {
    let place = Place::new();
    let mut command = place.serve("aegis.db");
    command.args(["--max-connections-per-peer", "1"]);
    command.env("AEGIS_LOG", "info,aegis_hitl=trace");
    let server = Served::start(command);
    let submit = Call::post(SocketAddr::from(([0; 4], 0)), "actions", "k").host("localhost");
    let id = place.send(submit).await.request_id();
    let request = format!(
        "GET /api/v1/hitl/status/{id} HTTP/1.1\r\nHost: localhost\r\nTenant-Id: t\r\n\
         Prefer: wait=55\r\n\r\n"
    );
    let mut waiting = Vec::new();
    for _ in 0..3 {
        let mut stream = tokio::net::UnixStream::connect(&place.socket)
            .await
            .unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        assert!(server.line("waits for a decision").is_some());
        waiting.push(stream);
    }
    assert_eq!(place.send(approve("k")).await.status, 202);
    for mut stream in waiting {
        let mut answer = [0; 12];
        ends(stream.read_exact(&mut answer)).await.unwrap();
        assert_eq!(&answer, b"HTTP/1.1 200");
    }
}

#[test]
fn a_unix_socket_takes_no_certificate() {
    let place = Place::new();
    let (certificate, key) = Certified::new().write(place.folder.path());
    let mut command = place.serve("aegis.db");
    command.arg("--tls-cert").arg(certificate);
    command.arg("--tls-key").arg(key);
    let ended = run(command).expect(2);
    assert!(ended.stderr.contains("--tls-cert"), "{ended:?}");
    assert!(!place.socket.exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_configuration_file_names_the_socket() {
    let place = Place::new();
    let config = place.folder.path().join("aegis.toml");
    let text = format!(
        "[serve]\nlisten = \"unix:{}\"\nsocket-mode = \"0660\"\nstore = {:?}\n",
        place.socket.display(),
        place.folder.path().join("aegis.db")
    );
    fs::write(&config, text).unwrap();
    let mut command = aegis(&["serve", "--config"]);
    command.arg(&config);
    let server = Served::start(command);
    assert_eq!(place.mode(), 0o660);
    place.still_answers().await;
    server.stop().expect(0);
    for (setting, shown) in [
        ("listen = \"unix:\"", "line 2: no path"),
        ("socket-mode = \"rw\"", "line 2: no mode"),
    ] {
        fs::write(&config, format!("[serve]\n{setting}\n")).unwrap();
        let mut command = aegis(&["serve", "--config"]);
        command.arg(&config);
        let ended = run(command).expect(2);
        assert!(ended.stderr.contains(shown), "{ended:?}");
    }
}

#[test]
fn the_client_reaches_the_socket() {
    let place = Place::new();
    let server = Served::start(place.serve("aegis.db"));
    let client = |args: &[&str]| {
        let mut command = aegis(args);
        command.args(["--tenant", "t", "--url", &server.url()]);
        // A proxy is on the network.
        command.env("HTTP_PROXY", "http://127.0.0.1:1");
        run(command)
    };
    client(&["submit", "k", "--thread", "h", "--title", "Pay"]).expect(0);
    client(&["approve", "k", "--thread", "h"]).expect(0);
    let ended = client(&["list", "--json"]).expect(0);
    assert!(ended.stdout.contains("Pay"), "{ended:?}");
    server.stop().expect(0);

    let missing = format!("unix:{}", place.socket.display());
    for (url, code, shown) in [(&*missing, 1, "no connection"), ("unix:", 2, "unix:/run")] {
        let mut command = aegis(&["approve", "k", "--thread", "h", "--tenant", "t"]);
        command.args(["--retries", "0", "--url", url]);
        let ended = run(command).expect(code);
        assert!(ended.stderr.contains(shown), "{ended:?}");
    }
}

fn has(program: &str) -> bool {
    let found = Command::new(program).arg("--version").output();
    found.is_ok_and(|found| found.status.success())
}

#[test]
fn curl_reaches_the_socket() {
    if !has("curl") {
        return;
    }
    let place = Place::new();
    let server = Served::start(place.serve("aegis.db"));
    let curl = |args: &[&str]| {
        let mut command = Command::new("curl");
        command.args(["--silent", "--fail-with-body", "--unix-socket"]);
        command.arg(Path::new(&place.socket)).args(args);
        run(command)
    };
    let ready = curl(&["http://localhost/readyz"]).expect(0);
    assert!(ready.stdout.contains("ok"), "{ready:?}");
    let url = "http://localhost/api/v1/hitl/approve";
    let headers = ["Tenant-Id: t", "Thread-Id: h", "Idempotency-Key: k"];
    let headers = headers.map(|header| ["-H", header]).concat();
    let approved = curl(&[&["-X", "POST", url], &headers[..]].concat()).expect(0);
    assert!(approved.stdout.contains("request_id"), "{approved:?}");
    server.stop().expect(0);
}
