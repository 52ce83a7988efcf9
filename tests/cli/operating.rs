//! What an operator sees of a server: its log, its version, and what it tells the service manager.

use std::os::unix::net::UnixDatagram;
use std::process::Command;

use aegis_hitl::server::Keys;
use aegis_hitl::{ApiKey, protocol::TENANT_ID};
use serde_json::Value;
use tempfile::TempDir;

use crate::binary::{Served, aegis, run, serve};
use crate::support::{Call, HANG};

fn with_log(folder: &TempDir, filter: &str, format: &str) -> Command {
    let mut command = serve(&folder.path().join("aegis.db"));
    command.env("AEGIS_LOG", filter);
    command.args(["--log-format", format]);
    command
}

/// Sends a decision whose every part is a secret.
async fn decide(server: &Served) -> u16 {
    let call = Call::new(server.addr, "POST", "/api/v1/hitl/approve")
        .header(TENANT_ID.as_str(), "tenant-Zx81")
        .header("Thread-Id", "thread-Zx82")
        .header("Idempotency-Key", "key-Zx83")
        .json(r#"{"payload":"payload-Zx84"}"#);
    call.send().await.status
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_of_json_has_an_object_on_each_line() {
    let folder = TempDir::new().unwrap();
    let server = Served::start(with_log(&folder, "info,aegis_hitl::access=debug", "json"));
    assert_eq!(decide(&server).await, 202);
    let line = server.line("answered").unwrap();
    let event: Value = serde_json::from_str(&line).unwrap();
    assert_eq!(event["message"], "answered");
    assert_eq!(event["endpoint"], "approve");
    assert_eq!(event["status"], 202);
    assert_eq!(event["method"], "POST");
    assert_eq!(event["peer"], "127.0.0.1");
    assert!(!line.contains("Zx8"), "{line}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_access_log_is_off_by_default_and_names_no_path() {
    let folder = TempDir::new().unwrap();
    let server = Served::start(with_log(&folder, "info", "text"));
    assert_eq!(decide(&server).await, 202);
    let stderr = server.stop().stderr;
    assert!(!stderr.contains("answered"), "{stderr}");

    let filter = "info,aegis_hitl::access=debug";
    let server = Served::start(with_log(&folder, filter, "text"));
    for path in ["/api/v1/hitl/status/id-Zx85?query-Zx86", "/actions/id-Zx87"] {
        Call::new(server.addr, "GET", path).send().await;
        let line = server.line("answered").unwrap();
        assert!(!line.contains("Zx8"), "{line}");
    }
    // Nor what a client wrote where the method belongs.
    let method = "METHOD-Zx88".repeat(1000);
    let call = Call::new(server.addr, "GET", "/").method(&method);
    assert_eq!(call.send().await.status, 405);
    let line = server.line("answered").unwrap();
    assert!(
        line.contains("method=other") && !line.contains("Zx8"),
        "{line}"
    );
}

#[test]
fn an_unknown_log_format_is_a_usage_error_that_names_those_there_are() {
    let folder = TempDir::new().unwrap();
    let ended = run(with_log(&folder, "info", "xml")).expect(2);
    assert!(ended.stderr.contains("text, json"), "{ended:?}");
}

#[test]
fn the_version_tells_two_binaries_apart() {
    let version = run(aegis(&["--version"])).expect(0).stdout;
    assert!(version.starts_with(&format!("aegis {}\n", env!("CARGO_PKG_VERSION"))));
    assert!(version.contains("\ncommit ") && version.contains("\nSQLite 3."));
    assert_eq!(run(aegis(&["-V"])).expect(0).stdout.lines().count(), 1);
}

#[test]
fn the_service_manager_is_told_when_the_server_is_ready_and_when_it_drains() {
    let folder = TempDir::new().unwrap();
    let socket = folder.path().join("notify");
    let manager = UnixDatagram::bind(&socket).unwrap();
    manager.set_read_timeout(Some(HANG)).unwrap();
    let mut command = serve(&folder.path().join("aegis.db"));
    command.env("NOTIFY_SOCKET", &socket);
    let server = Served::start(command);
    let told = || {
        let mut message = [0; 256];
        let len = manager.recv(&mut message).unwrap();
        String::from_utf8(message[..len].to_vec()).unwrap()
    };
    assert_eq!(told().trim(), "READY=1");
    server.stop().expect(0);
    assert_eq!(told().trim(), "STOPPING=1");
    // A manager that is gone changes nothing.
    drop(manager);
    let mut command = serve(&folder.path().join("aegis.db"));
    command.env("NOTIFY_SOCKET", &socket);
    Served::start(command).stop().expect(0);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_inbox_of_a_server_is_set_by_its_flags() {
    let folder = TempDir::new().unwrap();
    let place = folder.path().join("aegis.db");
    for (flags, wrong) in [
        (&["--public-url", "aegis.example.com"][..], "public URL"),
        (&["--public-url", "https://a.example/path"], "public URL"),
        (&["--trust-user-header", "X-User"], "--trusted-proxy"),
        (&["--trusted-proxy", "127.0.0.1"], "--trust-user-header"),
    ] {
        let mut command = serve(&place);
        command.args(flags);
        let ended = run(command).expect(2);
        assert!(ended.stderr.contains(wrong), "{flags:?}: {ended:?}");
        assert!(!place.exists());
    }
    let keys = folder.path().join("keys");
    let key = ApiKey::new("sk_1").unwrap();
    let line = format!("{} acme alice decide,read\n", Keys::digest(&key));
    std::fs::write(&keys, line).unwrap();
    let mut command = serve(&place);
    command.args(["--public-url", "https://aegis.example.com/"]);
    command.args([
        "--trust-user-header",
        "X-User",
        "--trusted-proxy",
        "::1,127.0.0.1",
    ]);
    command.arg("--keys").arg(&keys);
    let server = Served::start(command);
    let sign_in = Call::new(server.addr, "POST", "/sign-in")
        .header("Content-Type", "application/x-www-form-urlencoded")
        .body("key=sk_1");
    let reply = sign_in.send().await;
    let cookie = reply.header("set-cookie").unwrap();
    assert!(cookie.starts_with("__Host-aegis="), "{cookie}");
    let by_proxy = Call::new(server.addr, "GET", "/tenants").header("X-User", "bob");
    assert_eq!(by_proxy.send().await.status, 200);
    let ended = server.stop();
    // There are keys, so no link is printed.
    assert!(!ended.stderr.contains("sign-in"), "{ended:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hangup_prints_another_one_time_link() {
    let folder = TempDir::new().unwrap();
    let mut command = serve(&folder.path().join("aegis.db"));
    command.args(["--public-url", "http://aegis.test:8080"]);
    let server = Served::start(command);
    let first = server.line("inbox: http://aegis.test:8080/sign-in?code=");
    server.signal("HUP");
    let second = server.line("inbox: http://aegis.test:8080/sign-in?code=");
    let code = |line: Option<String>| {
        let line = line.unwrap();
        let code = line.split_once("code=").unwrap().1;
        code.split(' ').next().unwrap().to_owned()
    };
    let (first, second) = (code(first), code(second));
    for (code, status) in [(first, 403), (second.clone(), 303), (second, 403)] {
        let sign_in = Call::new(server.addr, "POST", "/sign-in")
            .header("Content-Type", "application/x-www-form-urlencoded")
            .body(format!("code={code}"));
        assert_eq!(sign_in.send().await.status, status);
    }
}
