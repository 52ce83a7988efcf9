//! SIGHUP: the server reads its key file and its log filter again, and goes on whatever they hold.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use aegis_hitl::ApiKey;
use aegis_hitl::server::Keys;
use tempfile::TempDir;

use crate::binary::{Served, aegis, make_noise, run, serve};
use crate::support::{Call, HANG};

fn line(secret: &str, name: &str) -> String {
    let key = ApiKey::new(secret).unwrap();
    format!("{} acme {name} submit,decide\n", Keys::digest(&key))
}

fn write(file: &Path, text: &str) {
    // Another file in its place, as one that nobody may write is not overwritten.
    let _ = fs::remove_file(file);
    fs::write(file, text).unwrap();
    set_mode(file, 0o600);
}

fn set_mode(file: &Path, mode: u32) {
    fs::set_permissions(file, fs::Permissions::from_mode(mode)).unwrap();
}

struct Place {
    folder: TempDir,
    keys: PathBuf,
}

impl Place {
    fn new() -> Self {
        let folder = TempDir::new().unwrap();
        let keys = folder.path().join("keys.txt");
        Self { folder, keys }
    }

    fn command(&self) -> Command {
        serve(&self.folder.path().join("aegis.db"))
    }

    fn with_keys(&self, text: &str) -> Command {
        write(&self.keys, text);
        let mut command = self.command();
        command.arg("--keys").arg(&self.keys);
        command
    }
}

/// The status that the holder of a key gets for a decision.
async fn ask(server: &Served, secret: &str) -> u16 {
    let call = Call::new(server.addr, "POST", "/api/v1/hitl/approve");
    let call = call.header("Thread-Id", "h").header("Idempotency-Key", "k");
    let call = call.header("Authorization", format!("Bearer {secret}"));
    let reply = call.send().await;
    // What was decided before is decided for every holder of a key.
    if reply.status == 409 {
        202
    } else {
        reply.status
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hangup_reads_the_key_file_again() {
    let place = Place::new();
    let both = line("sk_a", "alice") + &line("sk_b", "bob");
    let server = Served::start(place.with_keys(&line("sk_a", "alice")));
    assert_eq!(ask(&server, "sk_a").await, 202);
    assert_eq!(ask(&server, "sk_b").await, 401);

    write(&place.keys, &both);
    server.signal("HUP");
    let said = server.line("keys.txt").unwrap();
    assert!(said.contains("INFO") && said.contains("2 keys"), "{said}");
    assert_eq!(ask(&server, "sk_b").await, 202);

    // One that is gone is worth nothing from then on.
    write(&place.keys, &line("sk_b", "bob"));
    server.signal("HUP");
    let said = server.line("keys.txt").unwrap();
    assert!(said.contains("INFO") && said.contains("1 key"), "{said}");
    assert_eq!(ask(&server, "sk_a").await, 401);
    assert_eq!(ask(&server, "sk_b").await, 202);
    server.stop().expect(0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_key_file_leaves_the_keys_in_force() {
    let place = Place::new();
    let good = line("sk_a", "alice");
    let server = Served::start(place.with_keys(&good));
    for (text, what) in [
        (format!("{good}sk_secret acme bob\n"), "line 2"),
        (format!("{good}{good}"), "line 2"),
        (String::new(), "holds no keys"),
    ] {
        write(&place.keys, &text);
        server.signal("HUP");
        let said = server.line("keys.txt").unwrap();
        assert!(said.contains("ERROR") && said.contains(what), "{said}");
        assert!(said.contains("stay in force"), "{said}");
        assert_eq!(ask(&server, "sk_a").await, 202);
        assert_eq!(ask(&server, "sk_secret").await, 401);
    }
    fs::remove_file(&place.keys).unwrap();
    server.signal("HUP");
    let said = server.line("keys.txt").unwrap();
    assert!(said.contains("ERROR"), "{said}");
    assert_eq!(ask(&server, "sk_a").await, 202);
    let ended = server.stop().expect(0);
    assert!(!ended.stderr.contains("sk_secret"), "{ended:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hangup_harms_no_request_in_flight() {
    let place = Place::new();
    let mut command = place.with_keys(&line("sk_a", "alice"));
    command.env("AEGIS_LOG", "info,aegis_hitl=trace");
    command.arg("--allow-self-approval");
    let server = Served::start(command);
    let call = |method: &str, path: &str| {
        let call = Call::new(server.addr, method, format!("/api/v1/hitl/{path}"));
        call.header("Authorization", "Bearer sk_a")
            .header("Thread-Id", "h")
            .header("Idempotency-Key", "k")
    };
    let id = call("POST", "actions").send().await.request_id();
    let request = format!(
        "GET /api/v1/hitl/status/{id} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer sk_a\r\n\
         Prefer: wait=55\r\nConnection: close\r\n\r\n"
    );
    let mut waiting = TcpStream::connect(server.addr).unwrap();
    waiting.set_read_timeout(Some(HANG)).unwrap();
    waiting.write_all(request.as_bytes()).unwrap();
    assert!(server.line("waits for a decision").is_some());
    let decide = call("POST", "reject");

    write(&place.keys, &line("sk_b", "bob"));
    server.signal("HUP");
    assert!(server.line("1 key").is_some());
    assert_eq!(decide.clone().send().await.status, 401);
    write(&place.keys, &line("sk_a", "alice"));
    server.signal("HUP");
    assert!(server.line("1 key").is_some());
    assert_eq!(decide.send().await.status, 202);
    let mut answer = String::new();
    waiting.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    assert!(answer.contains("\"decision\":\"reject\""), "{answer}");
    server.stop().expect(0);
}

#[test]
fn a_hangup_reads_the_log_filter_again() {
    let place = Place::new();
    let config = place.folder.path().join("aegis.toml");
    fs::write(&config, "[serve]\nlog = \"info\"\n").unwrap();
    let mut command = place.command();
    command.arg("--config").arg(&config);
    let server = Served::start(command);
    make_noise(server.addr);
    for (text, what) in [
        ("[serve]\nlog = \"a=b=c\"\n", "log filter"),
        ("[serve]\n\nlogs = \"debug\"\n", "line 3"),
    ] {
        fs::write(&config, text).unwrap();
        server.signal("HUP");
        let said = server.line("the log filter").unwrap();
        assert!(said.contains("ERROR") && said.contains(what), "{said}");
        make_noise(server.addr);
    }
    assert!(!server.stderr().contains("DEBUG"), "{}", server.stderr());
    fs::write(&config, "[serve]\nlog = \"aegis_hitl=debug\"\n").unwrap();
    server.signal("HUP");
    let said = server.line("the log filter").unwrap();
    assert!(said.contains("INFO"), "{said}");
    make_noise(server.addr);
    assert!(server.line("DEBUG").is_some());
    server.stop().expect(0);
}

#[test]
fn a_filter_that_is_a_flag_stays() {
    let place = Place::new();
    let config = place.folder.path().join("aegis.toml");
    fs::write(&config, "[serve]\nlog = \"info\"\n").unwrap();
    let mut command = place.with_keys(&line("sk_a", "alice"));
    command.arg("--config").arg(&config).args(["--log", "info"]);
    let server = Served::start(command);
    fs::write(&config, "[serve]\nlog = \"trace\"\n").unwrap();
    server.signal("HUP");
    assert!(server.line("1 key").is_some());
    make_noise(server.addr);
    let ended = server.stop().expect(0);
    assert!(!ended.stderr.contains("TRACE"), "{ended:?}");
}

/// As under `nohup`, and as when a terminal goes.
#[test]
fn a_hangup_with_nothing_to_read_again_ends_nothing() {
    let place = Place::new();
    let plain = place.command();
    let mut ignoring = Command::new("sh");
    ignoring.args(["-c", "trap '' HUP; exec \"$0\" \"$@\""]);
    ignoring.arg(plain.get_program()).args(plain.get_args());
    for command in [plain, ignoring] {
        let server = Served::start(command);
        for _ in 0..3 {
            server.signal("HUP");
        }
        let url = server.url();
        let decide = ["approve", "k", "--tenant", "t", "--thread", "h", "--url"];
        run(aegis(&[&decide[..], &[&url]].concat())).expect(0);
        server.stop().expect(0);
    }
}

/// Whoever can write it can let anyone in. To read it helps less: it has digests of random keys, and the files of secrets that
/// a container gets are readable by all of it.
#[test]
fn a_key_file_that_others_can_write_is_refused_and_one_that_they_can_read_is_warned_of() {
    let place = Place::new();
    let text = line("sk_a", "alice");
    for (mode, shown) in [(0o620, "0620"), (0o602, "0602"), (0o666, "0666")] {
        let command = place.with_keys(&text);
        set_mode(&place.keys, mode);
        let ended = run(command).expect(2);
        for what in ["keys.txt", shown, "chmod"] {
            assert!(ended.stderr.contains(what), "{ended:?}");
        }
    }
    for (mode, shown) in [(0o640, "0640"), (0o444, "0444"), (0o604, "0604")] {
        let command = place.with_keys(&text);
        set_mode(&place.keys, mode);
        let ended = Served::start(command).stop().expect(0);
        let warning = ended.stderr.lines().find(|line| line.contains("WARN"));
        let warning = warning.unwrap_or_else(|| panic!("{ended:?}"));
        assert!(
            warning.contains("keys.txt") && warning.contains(shown),
            "{warning}"
        );
    }
    for mode in [0o600, 0o400] {
        let command = place.with_keys(&text);
        set_mode(&place.keys, mode);
        let ended = Served::start(command).stop().expect(0);
        assert!(!ended.stderr.contains("WARN"), "{ended:?}");
    }
    let server = Served::start(place.with_keys(&text));
    set_mode(&place.keys, 0o622);
    server.signal("HUP");
    let said = server.line("keys.txt").unwrap();
    assert!(said.contains("ERROR") && said.contains("0622"), "{said}");
    server.stop().expect(0);
}
