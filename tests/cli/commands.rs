//! The `aegis` command: what it prints, how it exits, what it reads its settings from, and how its server ends.

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use aegis_hitl::testing::{Act, Peer};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::binary::{Ended, Served, aegis, make_noise, run, run_with_input, serve, signal};
use crate::support::again::again;
use crate::support::h2::{self, H2};
use crate::support::process::{Process, bound};
use crate::support::rows::{counts, edit, integrity, look_at};
use crate::support::{Call, HANG};

/// A server with a store of its own, and the client's commands against it.
struct Place {
    // Dropped in this order: a folder can be removed once nobody writes to it.
    server: Served,
    folder: TempDir,
}

impl Place {
    fn new() -> Self {
        Self::with(|_| {})
    }

    fn with(change: impl FnOnce(&mut Command)) -> Self {
        let folder = TempDir::new().unwrap();
        let mut command = serve(&folder.path().join("aegis.db"));
        change(&mut command);
        Self {
            server: Served::start(command),
            folder,
        }
    }

    fn store(&self) -> PathBuf {
        self.folder.path().join("aegis.db")
    }

    fn file(&self, name: &str, text: &str) -> String {
        let path = self.folder.path().join(name);
        fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    }

    /// A command of tenant `acme`, thread `run-7`.
    fn command(&self, args: &[&str]) -> Command {
        let mut command = aegis(args);
        command.env("AEGIS_URL", self.server.url());
        command.env("AEGIS_TENANT", "acme");
        command.env("AEGIS_THREAD", "run-7");
        command
    }

    fn run(&self, args: &[&str]) -> Ended {
        run(self.command(args))
    }

    /// The payload on record under a key.
    fn payload(&self, key: &str) -> String {
        let sql = "SELECT payload FROM action WHERE idempotency_key = ?1";
        let found = look_at(&self.store()).query_row(sql, [key], |row| row.get(0));
        found.unwrap()
    }
}

fn assert_no_color(ended: &Ended) {
    assert!(!ended.text().contains('\u{1b}'), "{ended:?}");
}

#[test]
fn a_decision_and_its_status_are_printed_for_people() {
    let place = Place::new();
    for (command, outcome) in [("approve", "accepted"), ("approve", "duplicate")] {
        let ended = place.run(&[command, "k-1"]).expect(0);
        let lines: Vec<_> = ended.stdout.lines().collect();
        assert_eq!(lines[0], format!("on record: approve ({outcome})"));
        assert!(lines[1].starts_with("request id: "), "{lines:?}");
        assert_eq!(lines[2..], ["attempts: 1"]);
        assert_eq!(ended.stderr, "");
        assert_no_color(&ended);
    }
    let comment = ["reject", "k-2", "--comment", "no \u{1b}[2J", "--payload"];
    let ended = place.run(&[&comment[..], &[r#"{"to":"a@b.c"}"#]].concat());
    let ended = ended.expect(0);
    let id = ended.stdout.lines().nth(1).unwrap();
    let id = id.strip_prefix("request id: ").unwrap();
    let ended = place.run(&["status", id]).expect(0);
    for line in [
        &*format!("request id: {id}"),
        "status: COMMITTED",
        "decision: reject",
        "tenant: acme",
        "thread: run-7",
        "key: k-2",
        r#"payload: {"to":"a@b.c"}"#,
    ] {
        assert!(
            ended.stdout.lines().any(|found| found == line),
            "{line}: {ended:?}"
        );
    }
    assert!(ended.stdout.contains("comment: \"no "), "{ended:?}");
    assert_no_color(&ended);
    let [decisions, ..] = counts(&look_at(&place.store()));
    assert_eq!(decisions, 2);
}

/// Characters that move, hide or forge what stands around them.
const DECEPTIVE: [char; 14] = [
    '\u{7f}',
    '\u{9b}',
    '\u{ad}',
    '\u{61c}',
    '\u{115f}',
    '\u{200b}',
    '\u{200f}',
    '\u{2028}',
    '\u{202e}',
    '\u{2066}',
    '\u{fe0f}',
    '\u{feff}',
    '\u{e000}',
    '\u{e0041}',
];

fn assert_legible(text: &str) {
    for character in text.chars() {
        let control = character.is_control() && character != '\n';
        assert!(!control && !DECEPTIVE.contains(&character), "{text:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_others_wrote_is_shown_and_not_obeyed() {
    let deceptive: String = DECEPTIVE.iter().collect();
    let place = Place::new();
    let payload = format!("{{\"to\":\"a{deceptive}b ü 字 नि\"}}");
    let comment = format!("{deceptive}\nstatus: PENDING\u{1b}[2J");
    let args = [
        "approve",
        "k-1",
        "--json",
        "--payload",
        &payload,
        "--comment",
        &comment,
    ];
    let receipt = place.run(&args).expect(0);
    assert_legible(&receipt.stdout);
    let id = receipt.json()["request_id"].as_str().unwrap().to_owned();

    let shown = place.run(&["status", &id]).expect(0).stdout;
    assert_legible(&shown);
    let line = shown.lines().find(|line| line.starts_with("payload: "));
    let line = line.unwrap();
    assert!(
        line.starts_with("payload: {\"to\":\"a\\u{7F}\\u{9B}"),
        "{line}"
    );
    assert!(line.contains("\\u{202E}\\u{2066}"), "{line}");
    assert!(line.ends_with("\\u{E0041}b ü 字 नि\"}"), "{line}");
    let forged = shown.lines().filter(|line| line.starts_with("status: "));
    assert_eq!(forged.collect::<Vec<_>>(), ["status: COMMITTED"]);

    // The same text for programs, in escapes that JSON has.
    let json = place.run(&["status", &id, "--json"]).expect(0);
    assert_legible(&json.stdout);
    assert_eq!(
        json.json()["payload"],
        json!({ "to": format!("a{deceptive}b ü 字 नि") })
    );
    assert_eq!(json.json()["comment"], *comment);

    // From a server, in its refusal.
    let detail = format!("no {deceptive}");
    let problem = json!({ "code": "forbidden", "detail": detail }).to_string();
    let refusal = Act::answer(403).header("content-type", "application/problem+json");
    let peer = Peer::start([refusal.body(problem)]).await;
    let refused = place.command(&["approve", "k-2", "--url", &peer.url()]);
    let refused = tokio::task::spawn_blocking(|| run(refused)).await.unwrap();
    let refused = refused.expect(1);
    assert!(refused.stderr.contains("no \\u{7F}\\u{9B}"), "{refused:?}");
    assert_legible(&refused.stderr);

    // In the name of a file, to people and in the log.
    let name = format!("x{deceptive}y");
    let refused = place.run(&["serve", "--config", &name]).expect(2);
    assert!(
        refused.stderr.contains("cannot read x\\u{7F}"),
        "{refused:?}"
    );
    assert_legible(&refused.stderr);
    let keys = place.file(&name, &new_key("alice", "decide").1);
    let server = Place::with(|command| {
        command.args(["--keys", &keys]);
    });
    let ended = server.server.stop().expect(0);
    assert!(ended.stderr.contains("WARN"), "{ended:?}");
    assert!(ended.stderr.contains("\\u{202E}"), "{ended:?}");
    assert_legible(&ended.stderr);
}

#[test]
fn json_is_one_document_on_one_line() {
    let place = Place::new();
    let first = place
        .run(&["approve", "k-1", "--json", "--call-id", "call-1"])
        .expect(0);
    let receipt = first.json();
    assert_eq!(receipt["outcome"], "accepted");
    assert_eq!(receipt["decision"], "approve");
    assert_eq!(receipt["status_code"], 202);
    assert_eq!(receipt["attempts"], 1);
    assert_eq!(receipt["call_id"], "call-1");
    assert_eq!(receipt["action"]["idempotency_key"], "k-1");
    assert_eq!(receipt["action"]["status"], "COMMITTED");
    let id = receipt["request_id"].as_str().unwrap();

    let same_call = place
        .run(&["approve", "k-1", "--json", "--call-id", "call-1"])
        .expect(0);
    assert_eq!(same_call.json()["action"]["replayed"], true);
    let other_call = place.run(&["approve", "k-1", "--json"]).expect(0).json();
    assert_eq!(other_call["outcome"], "duplicate");
    assert_eq!(other_call["status_code"], 409);
    assert_eq!(other_call["request_id"], id);

    let status = place
        .run(&["status", id, "--json", "--wait", "1"])
        .expect(0)
        .json();
    assert_eq!(status["request_id"], id);
    assert_eq!(status["decision"], "approve");
    assert_eq!(status["tenant_id"], "acme");
    let mut bare = aegis(&["status", id, "--json"]);
    bare.env("AEGIS_URL", place.server.url());
    let bare = run(bare).expect(0).json();
    assert_eq!(bare["decision"], "approve");
    assert!(bare.get("tenant_id").is_none_or(Value::is_null), "{bare}");
}

#[test]
fn other_failures_exit_with_1() {
    let place = Place::new();
    let unknown = place
        .run(&["status", "5b7f5d0a-9c1c-4f0e-9d39-2f6b0d6c7a11"])
        .expect(1);
    assert!(unknown.stderr.contains("404"), "{unknown:?}");
    assert_eq!(unknown.stdout, "");
    // This server knows no API keys.
    let mut refused = aegis(&["approve", "k-1", "--thread", "run-7"]);
    refused.env("AEGIS_URL", place.server.url());
    refused.env("AEGIS_TOKEN", "sk_live_1");
    let refused = run(refused).expect(1);
    assert!(refused.stderr.contains("401"), "{refused:?}");

    let mut unreachable = place.command(&["approve", "k-1", "--retries", "0"]);
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", nobody.local_addr().unwrap());
    drop(nobody);
    unreachable.env("AEGIS_URL", url);
    let unreachable = run(unreachable).expect(1);
    assert!(
        unreachable.stderr.contains("could not be sent"),
        "{unreachable:?}"
    );
}

#[test]
fn usage_errors_exit_with_2_and_send_nothing() {
    let place = Place::new();
    let elsewhere = TempDir::new().unwrap();
    // The default address is taken, by this or by somebody else: a wrong option is told before that.
    let _taken = TcpListener::bind("127.0.0.1:8000");
    let bad_key = place.file("bad.toml", "[client]\nthread = \"a\"\ntenannt = \"b\"\n");
    let bad_type = place.file("type.toml", "[serve]\nlisten = 8000\n");
    let cases: &[(&[&str], &str)] = &[
        (&["approve"], "KEY"),
        (&["approve", "k-1", "--payload", "[]"], "not a JSON object"),
        (&["approve", "k-1", "--payload", "{"], "not a JSON object"),
        (
            &["approve", "k-1", "--payload", "@/does/not/exist"],
            "cannot read the payload",
        ),
        (&["approve", "k-1", "--colour"], "--colour"),
        (&["approve", "k 1"], "idempotency key"),
        (&["approve", ""], "idempotency key"),
        (&["approve", "k-1", "--retries", "-1"], "'-1'"),
        (&["approve", "k-1", "--timeout", "0"], "more than 0"),
        (&["approve", "k-1", "--timeout", "NaN"], "more than 0"),
        (&["approve", "k-1", "--url", "localhost"], "base URL"),
        (&["approve", "k-1", "--prefix", "a b"], "prefix"),
        (
            &["approve", "k-1", "--ca", "/does/not/exist"],
            "/does/not/exist",
        ),
        (&["status", "k-1", "--wait", "56"], "0 to 55"),
        (&["aprove", "k-1"], "approve"),
        (&[], "Usage"),
        (&["keys", "new", "--name", "alice smith"], "without spaces"),
        (&["keys", "new"], "--name"),
        (&["keys", "new", "--name", "a"], "--scope"),
        (
            &["keys", "new", "--name", "a", "--scope", "decide,write"],
            "'submit', 'decide', 'claim', 'read' and 'admin'",
        ),
        (
            &[
                "keys",
                "new",
                "--name",
                "a",
                "--scope",
                "read",
                "--expires",
                "90",
            ],
            "such as 90d",
        ),
        (
            &["approve", "k-1", "--config", "/does/not/exist"],
            "/does/not/exist",
        ),
        (
            &["approve", "k-1", "--config", &bad_key],
            "line 3: unknown field `tenannt`",
        ),
        (&["serve", "--config", &bad_type], "line 2"),
        (&["serve", "--listen", "localhost"], "--listen"),
        (&["serve", "--log", "aegis=loud"], "log filter"),
        (&["serve", "--prefix", "a b"], "prefix"),
        (&["serve", "--store", "mysql://u:secret@h/d"], "mysql://…"),
        (
            &["serve", "--store", "postgres://u:secret@h:p/d"],
            "postgres://user@host:5432/database",
        ),
        (&["serve", "--keys", "/does/not/exist"], "/does/not/exist"),
    ];
    for (args, what) in cases {
        let mut command = place.command(args);
        command.current_dir(elsewhere.path());
        let ended = run(command).expect(2);
        assert!(ended.stderr.contains(what), "{args:?} {what}: {ended:?}");
        assert!(!ended.stderr.contains("secret"), "{ended:?}");
        assert_eq!(ended.stdout, "", "{args:?}");
        assert_no_color(&ended);
    }
    assert!(elsewhere.path().read_dir().unwrap().next().is_none());
    let mut no_thread = place.command(&["approve", "k-1"]);
    no_thread.env_remove("AEGIS_THREAD");
    let ended = run(no_thread).expect(2);
    assert!(ended.stderr.contains("--thread"), "{ended:?}");
    let mut no_tenant = place.command(&["approve", "k-1"]);
    no_tenant.env_remove("AEGIS_TENANT");
    let ended = run(no_tenant).expect(2);
    assert!(ended.stderr.contains("--tenant"), "{ended:?}");
    assert_eq!(counts(&look_at(&place.store())), [0; 2]);
}

#[test]
fn a_refusal_by_what_is_on_record_exits_with_3() {
    let place = Place::new();
    place
        .run(&["approve", "k-1", "--payload", r#"{"a":1}"#])
        .expect(0);
    let opposite = place.run(&["reject", "k-1"]).expect(3);
    assert!(
        opposite
            .stderr
            .contains("the decision on record is 'approve'"),
        "{opposite:?}"
    );
    assert_eq!(opposite.stdout, "");
    let payload = place
        .run(&["approve", "k-1", "--payload", r#"{"a":2}"#])
        .expect(3);
    assert!(payload.stderr.contains("another payload"), "{payload:?}");

    place.run(&["reject", "k-2"]).expect(0);
    edit(&place.store(), "closed = 'expired'", "k-2");
    let closed = place.run(&["approve", "k-2", "--json"]).expect(3);
    assert!(closed.stderr.contains("the action is closed"), "{closed:?}");
    assert_eq!(closed.stdout, "");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_outcome_exits_with_4_and_tells_how_to_ask_again() {
    let peer = Peer::start([Act::lose_reply()]).await;
    let ask = |args: &[&str]| {
        let url = peer.url();
        let mut command = aegis(args);
        command.env("AEGIS_URL", url).env("AEGIS_TENANT", "acme");
        run(command)
    };
    let ended = ask(&["approve", "k-1", "--thread", "t", "--retries", "0"]).expect(4);
    assert_eq!(peer.count(), 1);
    assert!(ended.stderr.contains("the outcome is unknown"), "{ended:?}");
    assert_eq!(ended.stdout, "");
    let call_id = peer.requests()[0]
        .header("x-request-id")
        .unwrap()
        .to_owned();
    assert!(
        ended.stderr.contains(&format!("--call-id {call_id}")),
        "{ended:?}"
    );
    ask(&[
        "approve",
        "k-1",
        "--thread",
        "t",
        "--retries",
        "0",
        "--call-id",
        &call_id,
    ])
    .expect(4);
    assert_eq!(peer.requests()[1].header("x-request-id"), Some(&*call_id));
    // A question leaves no decision unknown.
    ask(&["status", "k-1", "--retries", "0"]).expect(1);
}

/// Its first attempt may have been granted what the second one was refused.
#[tokio::test(flavor = "multi_thread")]
async fn a_claim_that_is_refused_on_its_own_retry_exits_with_4_and_tells_how_to_ask_again() {
    let id = "5b7f5d0a-9c1c-4f0e-9d39-2f6b0d6c7a11";
    let refusal = |status: u16, code: &str| {
        let action = json!({"request_id": id, "status": "COMMITTED", "decision": "approve",
                            "execution": "claimed"});
        let problem = json!({"code": code, "detail": "d", "action": action});
        let answer = Act::answer(status).header("content-type", "application/problem+json");
        answer.body(problem.to_string())
    };
    for (status, code) in [(409, "already-claimed"), (422, "not-approved")] {
        let peer = Peer::start([Act::lose_reply(), refusal(status, code)]).await;
        let claim = |retries: &str| {
            let mut command = aegis(&["claim", id, "--retries", retries]);
            command
                .env("AEGIS_URL", peer.url())
                .env("AEGIS_TENANT", "acme");
            run(command)
        };
        let ended = claim("1").expect(4);
        assert_eq!(peer.count(), 2);
        let requests = peer.requests();
        let call_id = requests[0].header("x-request-id").unwrap();
        assert_eq!(requests[1].header("x-request-id"), Some(call_id));
        assert!(ended.stderr.contains("the outcome is unknown"), "{ended:?}");
        assert!(
            ended.stderr.contains(&format!("--call-id {call_id}")),
            "{ended:?}"
        );
        assert_eq!(ended.stdout, "");
        // The peer repeats its last answer. To the only attempt of a call it is a plain refusal.
        let ended = claim("0").expect(3);
        assert!(!ended.stderr.contains("--call-id"), "{ended:?}");
    }
}

/// A question leaves no outcome unknown, but that nobody answered is not that nobody decided.
#[tokio::test(flavor = "multi_thread")]
async fn a_wait_that_no_server_answers_says_so() {
    let silent = Peer::start(std::iter::repeat_with(Act::hang).take(20)).await;
    let away = Peer::start([Act::answer(503)]).await;
    let id = "5b7f5d0a-9c1c-4f0e-9d39-2f6b0d6c7a11";
    for (url, cause) in [
        (silent.url(), "did not answer"),
        (away.url(), "unavailable"),
        ("http://127.0.0.1:1".to_owned(), "could not be sent"),
    ] {
        let mut command = aegis(&["wait", id, "--for", "1.2", "--retries", "0"]);
        command.env("AEGIS_URL", url).env("AEGIS_TENANT", "acme");
        let ended = run(command).expect(1);
        assert!(ended.stderr.contains(cause), "{ended:?}");
        assert!(!ended.stderr.contains("nobody has decided"), "{ended:?}");
    }
}

/// A peer that takes everything.
async fn agreeable() -> Peer {
    let action = json!({"request_id": "5b7f5d0a-9c1c-4f0e-9d39-2f6b0d6c7a11", "status": "COMMITTED",
                        "decision": "approve", "execution": null});
    Peer::start([Act::answer(202).body(action.to_string())]).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flag_wins_over_the_environment_and_that_over_the_file() {
    let (from_file, from_env, from_flag) =
        (agreeable().await, agreeable().await, agreeable().await);
    let folder = TempDir::new().unwrap();
    let config = folder.path().join("aegis.toml");
    let text = format!(
        "[client]\nurl = \"{}\"\nprefix = \"/file\"\ntenant = \"file\"\nthread = \"file\"\nretries = 0\ntimeout = 5.0\n",
        from_file.url()
    );
    fs::write(&config, text).unwrap();
    let check = |command: Command, peer: &Peer, name: &str| {
        run(command).expect(0);
        let seen = peer.requests().pop().unwrap();
        assert_eq!(seen.path(), format!("/{name}/hitl/approve"));
        assert_eq!(seen.header("tenant-id"), Some(name));
        assert_eq!(seen.header("thread-id"), Some(name));
    };
    let config = config.to_str().unwrap();
    let args = ["approve", "k-1", "--config", config];
    check(aegis(&args), &from_file, "file");

    let mut command = aegis(&args);
    let (env_url, flag_url) = (from_env.url(), from_flag.url());
    let env = |command: &mut Command| {
        command
            .env("AEGIS_URL", &env_url)
            .env("AEGIS_PREFIX", "/env");
        command
            .env("AEGIS_TENANT", "env")
            .env("AEGIS_THREAD", "env");
    };
    env(&mut command);
    check(command, &from_env, "env");

    let flags = [
        "--url", &flag_url, "--prefix", "/flag", "--tenant", "flag", "--thread", "flag",
    ];
    let mut command = aegis(&[&args[..], &flags].concat());
    env(&mut command);
    check(command, &from_flag, "flag");

    // The file's name may come from the environment too.
    let mut command = aegis(&["approve", "k-1"]);
    command.env("AEGIS_CONFIG", config);
    check(command, &from_file, "file");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_credential_given_closer_by_wins_whichever_kind_it_is() {
    let peer = agreeable().await;
    let folder = TempDir::new().unwrap();
    let file = |name: &str, line: &str| {
        let path = folder.path().join(name);
        fs::write(&path, format!("[client]\n{line}\n")).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let (tenant_file, token_file) = (
        file("tenant.toml", "tenant = \"file\""),
        file("token.toml", "token = \"sk_file\""),
    );
    type Case<'a> = (
        &'a str,
        &'a [(&'a str, &'a str)],
        &'a [&'a str],
        Result<&'a str, &'a str>,
    );
    let cases: &[Case<'_>] = &[
        (&tenant_file, &[], &[], Ok("file")),
        (&token_file, &[], &[], Err("Bearer sk_file")),
        (&token_file, &[("AEGIS_TENANT", "env")], &[], Ok("env")),
        (
            &tenant_file,
            &[("AEGIS_TOKEN", "sk_env")],
            &[],
            Err("Bearer sk_env"),
        ),
        (
            &token_file,
            &[("AEGIS_TOKEN", "sk_env")],
            &["--tenant", "flag"],
            Ok("flag"),
        ),
        (
            &tenant_file,
            &[("AEGIS_TENANT", "env")],
            &["--token", "sk_flag"],
            Err("Bearer sk_flag"),
        ),
    ];
    let url = peer.url();
    for (config, env, flags, expected) in cases {
        let args = [
            "approve", "k-1", "--thread", "t", "--url", &url, "--config", config,
        ];
        let mut command = aegis(&[&args[..], flags].concat());
        command.envs(env.iter().copied());
        run(command).expect(0);
        let seen = peer.requests().pop().unwrap();
        let told = (seen.header("tenant-id"), seen.header("authorization"));
        match expected {
            Ok(tenant) => assert_eq!(told, (Some(*tenant), None)),
            Err(token) => assert_eq!(told, (None, Some(*token))),
        }
    }
    // Two of the same distance contradict each other.
    let both = [
        "approve", "k-1", "--thread", "t", "--url", &url, "--tenant", "t", "--token", "sk",
    ];
    let count = peer.count();
    run(aegis(&both)).expect(2);
    assert_eq!(peer.count(), count);
}

#[test]
fn the_server_takes_its_settings_in_the_same_order() {
    let folder = TempDir::new().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let config = path("aegis.toml");
    let text = format!(
        "[serve]\nlisten = \"127.0.0.1:0\"\nstore = \"{}\"\nprefix = \"/file\"\nlog = \"warn\"\n\
         require-submission = true\ndrain-timeout = 5.0\n",
        path("file.db")
    );
    fs::write(&config, text).unwrap();
    let decide = |server: &Served, prefix: &str| {
        let mut command = aegis(&["approve", "k-1", "--tenant", "t", "--thread", "h"]);
        command.args(["--url", &server.url(), "--prefix", prefix]);
        run(command)
    };

    let server = Served::start(aegis(&["serve", "--config", &config]));
    let refused = decide(&server, "/file").expect(1);
    assert!(refused.stderr.contains("submitted"), "{refused:?}");
    assert!(server.stop().expect(0).stderr.contains("file.db"));

    let mut command = aegis(&["serve", "--config", &config]);
    command
        .env("AEGIS_STORE", path("env.db"))
        .env("AEGIS_PREFIX", "/env");
    command.env("AEGIS_REQUIRE_SUBMISSION", "false");
    let server = Served::start(command);
    decide(&server, "/env").expect(0);
    assert!(server.stop().expect(0).stderr.contains("env.db"));

    let flags = [
        "--store",
        &path("flag.db"),
        "--prefix",
        "/flag",
        "--require-submission",
    ];
    let mut command = aegis(&[&["serve", "--config", &config], &flags[..]].concat());
    command
        .env("AEGIS_STORE", path("env.db"))
        .env("AEGIS_PREFIX", "/env");
    command.env("AEGIS_REQUIRE_SUBMISSION", "false");
    let server = Served::start(command);
    decide(&server, "/flag").expect(1);
    assert!(server.stop().expect(0).stderr.contains("flag.db"));
    for (name, decisions) in [("file.db", 0), ("env.db", 1), ("flag.db", 0)] {
        assert_eq!(
            counts(&look_at(Path::new(&path(name)))),
            [decisions; 2],
            "{name}"
        );
    }
}

/// The status of a request for a host.
fn status_for(addr: SocketAddr, host: &str) -> String {
    let request = format!("GET /readyz HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
    let (_, answer) = talk(addr, &request, "\r\n");
    answer.split(' ').nth(1).unwrap().to_owned()
}

#[test]
fn the_hosts_that_a_server_answers_for_are_given_as_every_other_setting() {
    let folder = TempDir::new().unwrap();
    let config = folder.path().join("aegis.toml");
    fs::write(&config, "[serve]\nhost = [\"a.file\", \"192.0.2.1\"]\n").unwrap();
    let check = |environment: Option<&str>, flags: &[&str], own: [&str; 2]| {
        let mut command = serve(&folder.path().join("aegis.db"));
        command.arg("--config").arg(&config).args(flags);
        command.envs(environment.map(|hosts| ("AEGIS_HOST", hosts)));
        let server = Served::start(command);
        for host in [
            "a.file",
            "192.0.2.1",
            "a.env",
            "b.env",
            "a.flag",
            "b.flag",
            "127.0.0.1",
        ] {
            let answered = own.contains(&host) || host == "127.0.0.1";
            let status = if answered { "200" } else { "421" };
            assert_eq!(status_for(server.addr, host), status, "{host} {own:?}");
        }
        server.stop().expect(0);
    };
    check(None, &[], ["a.file", "192.0.2.1"]);
    let environment = Some("a.env,b.env");
    check(environment, &[], ["a.env", "b.env"]);
    let flags = ["--host", "a.flag", "--host", "b.flag"];
    check(environment, &flags, ["a.flag", "b.flag"]);

    for flag in ["http://a", "a:80", "*"] {
        let ended = run(aegis(&["serve", "--host", flag])).expect(2);
        assert!(ended.stderr.contains("not a host"), "{ended:?}");
    }
    fs::write(&config, "[serve]\nhost = [\"a:80\"]\n").unwrap();
    let mut command = aegis(&["serve", "--config"]);
    command.arg(&config);
    let ended = run(command).expect(2);
    assert!(ended.stderr.contains("line 2: not a host"), "{ended:?}");
}

#[test]
fn a_payload_comes_from_the_argument_a_file_or_standard_input() {
    let place = Place::new();
    let file = format!("@{}", place.file("payload.json", "{\"from\": \"file\"}\n"));
    place
        .run(&["approve", "k-1", "--payload", r#"{"from":"argument"}"#])
        .expect(0);
    place.run(&["approve", "k-2", "--payload", &file]).expect(0);
    let stdin = place.command(&["approve", "k-3", "--payload", "-"]);
    run_with_input(stdin, "{\"from\": \"stdin\"}\n").expect(0);
    let nothing = place.command(&["approve", "k-4", "--payload", "-"]);
    run_with_input(nothing, "").expect(2);
    for (key, from) in [("k-1", "argument"), ("k-2", "file"), ("k-3", "stdin")] {
        let payload: Value = serde_json::from_str(&place.payload(key)).unwrap();
        assert_eq!(payload, json!({ "from": from }));
    }
}

/// The secret and the line of a new key.
fn new_key(name: &str, scope: &str) -> (String, String) {
    let args = [
        "keys", "new", "--tenant", "acme", "--name", name, "--scope", scope, "--json",
    ];
    let key = run(aegis(&args)).expect(0).json();
    let text = |name: &str| key[name].as_str().unwrap().to_owned();
    (text("secret"), text("line"))
}

#[test]
fn a_new_key_lets_its_holder_do_what_its_scope_allows() {
    let folder = TempDir::new().unwrap();
    let human = run(aegis(&[
        "keys", "new", "--tenant", "acme", "--name", "carol", "--scope", "decide",
    ]))
    .expect(0);
    let lines: Vec<_> = human
        .stdout
        .lines()
        .filter(|line| !line.starts_with('#'))
        .collect();
    let [carol, carol_line] = lines[..] else {
        panic!("{human:?}");
    };
    assert!(carol.starts_with("sk_live_") && carol_line.ends_with(" acme carol decide"));
    assert!(!carol_line.contains(carol));

    let (alice, alice_line) = new_key("alice", "decide");
    let (dashboard, dashboard_line) = new_key("dashboard", "read");
    assert_ne!(alice, dashboard);
    let file = folder.path().join("keys");
    // As it would be pasted: the whole output of `keys new`, but for the secret.
    let text = format!("# for acme\n{carol_line}\n{alice_line}\n\n{dashboard_line}\n");
    fs::write(&file, text).unwrap();
    let place = Place::with(|command| {
        command.env("AEGIS_KEYS", &file);
    });
    let ask = |token: &str, args: &[&str]| {
        let mut command = place.command(args);
        command.env_remove("AEGIS_TENANT").env("AEGIS_TOKEN", token);
        let ended = run(command);
        assert!(!ended.text().contains(token), "{ended:?}");
        ended
    };
    let receipt = ask(&alice, &["approve", "k-1", "--json"]).expect(0).json();
    assert_eq!(receipt["action"]["tenant_id"], "acme");
    let id = receipt["request_id"].as_str().unwrap();
    assert_eq!(
        ask(carol, &["approve", "k-1", "--json"]).expect(0).json()["outcome"],
        "duplicate"
    );
    let refused = ask(&dashboard, &["reject", "k-2"]).expect(1);
    assert!(
        refused.stderr.contains("403") && refused.stderr.contains("'read'"),
        "{refused:?}"
    );
    assert_eq!(
        ask(&dashboard, &["status", id, "--json"]).expect(0).json()["tenant_id"],
        "acme"
    );
    let unknown = ask("sk_live_unknown", &["approve", "k-1"]).expect(1);
    assert!(unknown.stderr.contains("401"), "{unknown:?}");
    // A name in the header is no credential here.
    assert!(
        place
            .run(&["approve", "k-1"])
            .expect(1)
            .stderr
            .contains("401")
    );

    let actor = "SELECT actor FROM event";
    let actor: String = look_at(&place.store())
        .query_row(actor, [], |row| row.get(0))
        .unwrap();
    assert_eq!(actor, "alice");
    let stderr = place.server.stop().expect(0).stderr;
    for secret in [&alice, &dashboard] {
        assert!(!stderr.contains(&**secret), "{stderr}");
    }
}

#[test]
fn a_bad_keys_file_is_refused_by_its_line() {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("keys");
    let (secret, line) = new_key("alice", "decide");
    let cases = [
        (format!("{line}\n{secret} acme alice\n"), "line 2"),
        (format!("# keys\n\n{line}\n{line}\n"), "line 4"),
        (format!("{line} more\n"), "line 1"),
        ("# none yet\n".to_owned(), "holds no keys"),
    ];
    for (text, what) in cases {
        fs::write(&file, text).unwrap();
        let mut command = serve(&folder.path().join("aegis.db"));
        command.arg("--keys").arg(&file);
        let ended = run(command).expect(2);
        let name = file.to_str().unwrap();
        assert!(
            ended.stderr.contains(what) && ended.stderr.contains(name),
            "{ended:?}"
        );
        assert!(!ended.stderr.contains(&secret), "{ended:?}");
    }
}

#[test]
fn a_token_is_never_shown() {
    let place = Place::new();
    let (good, bad) = ("sk_live_5ecret", "sk_live_5ecret and more");
    let config = place.file("aegis.toml", &format!("[client]\ntoken = \"{bad}\"\n"));
    let misplaced = place.file("misplaced.toml", &format!("token = \"{good}\"\n"));
    let broken = place.file("broken.toml", &format!("[client]\ntoken = \"{good}\n"));
    let bare = place.file("bare.toml", &format!("[client]\ntoken = {good}\n"));
    let number = place.file("number.toml", "[client]\ntoken = 8675309\n");
    let float = place.file("float.toml", "[client]\ntoken = 0.8675309\n");
    let table = place.file("table.toml", &format!("client = \"{good}\"\n"));
    let secret = "[[webhook]]\nname = \"a\"\nurl = 8675309\n";
    let secret = place.file("secret.toml", secret);
    let thread = ["--thread", "run-7"];
    for (token, args, code) in [
        (Some(good), &["--help"][..], 0),
        (Some(good), &["approve", "--help"], 0),
        (Some(good), &["status", "-h"], 0),
        (Some(good), &["approve", "k-1"], 1),
        (Some(good), &["approve", "k-1", "--colour"], 2),
        (Some(bad), &["approve", "k-1"], 2),
        (Some(bad), &["status", "k-1"], 2),
        (None, &["approve", "k-1", "--token", bad], 2),
        (None, &["approve", "k-1", "--config", &config], 2),
        (None, &["approve", "k-1", "--config", &misplaced], 2),
        (None, &["approve", "k-1", "--config", &broken], 2),
        (None, &["approve", "k-1", "--config", &bare], 2),
        (None, &["approve", "k-1", "--config", &number], 2),
        (None, &["approve", "k-1", "--config", &float], 2),
        (None, &["approve", "k-1", "--config", &table], 2),
        (None, &["approve", "k-1", "--config", &secret], 2),
    ] {
        let mut command = place.command(args);
        command.env_remove("AEGIS_TENANT").env("AEGIS_LOG", "trace");
        if args[0] == "approve" {
            command.args(thread);
        }
        if let Some(token) = token {
            command.env("AEGIS_TOKEN", token);
        }
        let ended = run(command).expect(code);
        for secret in ["5ecret", "8675309"] {
            assert!(!ended.text().contains(secret), "{args:?}: {ended:?}");
        }
    }
}

#[test]
fn help_names_every_environment_variable() {
    for (args, names) in [
        (
            &["serve"][..],
            &[
                "LISTEN",
                "STORE",
                "PREFIX",
                "KEYS",
                "TRUST_TENANT_HEADER",
                "HOST",
                "REQUIRE_SUBMISSION",
                "DRAIN_TIMEOUT",
                "LOG",
                "CONFIG",
            ][..],
        ),
        (
            &["approve"],
            &[
                "URL", "PREFIX", "TENANT", "TOKEN", "THREAD", "TIMEOUT", "RETRIES", "CA", "CONFIG",
            ],
        ),
        (
            &["reject"],
            &[
                "URL", "PREFIX", "TENANT", "TOKEN", "THREAD", "TIMEOUT", "RETRIES", "CA", "CONFIG",
            ],
        ),
        (
            &["status"],
            &[
                "URL", "PREFIX", "TENANT", "TOKEN", "TIMEOUT", "RETRIES", "CA", "CONFIG",
            ],
        ),
        (&["backup"], &["STORE", "CONFIG"]),
        (&["keys", "new"], &["TENANT", "CONFIG"]),
    ] {
        let help = run(aegis(&[args, &["--help"]].concat())).expect(0);
        for name in names {
            let name = format!("[env: AEGIS_{name}");
            assert!(help.stdout.contains(&name), "{args:?} {name}: {help:?}");
        }
        assert_eq!(help.stderr, "");
        assert_no_color(&help);
    }
    let help = run(aegis(&["--help"])).expect(0).stdout;
    let help = help.split_whitespace().collect::<Vec<_>>().join(" ");
    for what in [
        "Exit codes: 0 on record",
        "2 usage",
        "3 refused",
        "4 the outcome is unknown",
    ] {
        assert!(help.contains(what), "{help}");
    }
}

/// Runs a command whose output finds no room.
fn run_unprinted(mut command: Command) -> (Option<i32>, String) {
    let full = fs::OpenOptions::new().write(true).open("/dev/full");
    command
        .stdin(Stdio::null())
        .stdout(full.unwrap())
        .stderr(Stdio::piped());
    let ended = command.output().unwrap();
    (
        ended.status.code(),
        String::from_utf8(ended.stderr).unwrap(),
    )
}

#[test]
fn an_answer_that_cannot_be_printed_is_a_failure_and_no_panic() {
    let place = Place::new();
    for args in [
        &["keys", "new", "--name", "a", "--scope", "read"][..],
        &["list"],
        &["list", "--json"],
    ] {
        let (code, stderr) = run_unprinted(place.command(args));
        assert_eq!(code, Some(1), "{stderr}");
        assert!(
            stderr.starts_with("aegis: cannot print the answer"),
            "{stderr}"
        );
    }
}

#[test]
fn what_is_on_record_and_cannot_be_printed_is_told_to_be_on_record() {
    let place = Place::new();
    let submitted = |key: &str| {
        let action = place.run(&["submit", key, "--json"]).expect(0).json();
        action["request_id"].as_str().unwrap().to_owned()
    };
    let claimed = |key: &str| {
        let approved = place.run(&["approve", key, "--json"]).expect(0).json();
        let id = approved["request_id"].as_str().unwrap().to_owned();
        let claimed = place.run(&["claim", &id, "--json"]).expect(0).json();
        (id, claimed["claim"]["token"].as_str().unwrap().to_owned())
    };
    let cancelled = submitted("k-2");
    let (one, one_token) = claimed("k-3");
    let (other, other_token) = claimed("k-4");
    for args in [
        &["approve", "k-1"][..],
        &["approve", "k-1", "--json"],
        &["submit", "k-0"],
        &["cancel", &cancelled],
        &["renew", &one, "--claim", &one_token],
        &["complete", &one, "--claim", &one_token],
        &["fail", &other, "--claim", &other_token],
    ] {
        let (code, stderr) = run_unprinted(place.command(args));
        assert_eq!(code, Some(1), "{stderr}");
        assert!(
            stderr.starts_with("aegis: on record; cannot print the answer"),
            "{args:?}: {stderr}"
        );
    }
    let shown = place.run(&["show", &one, "--json"]).expect(0).json();
    assert_eq!(shown["execution"], "completed");
}

#[test]
fn a_claim_that_cannot_be_printed_can_be_repeated() {
    let place = Place::new();
    let approved = place.run(&["approve", "k-1", "--json"]).expect(0).json();
    let id = approved["request_id"].as_str().unwrap();
    let (code, stderr) = run_unprinted(place.command(&["claim", id]));
    assert_eq!(code, Some(4), "{stderr}");
    let (_, call_id) = stderr.split_once("--call-id ").unwrap();
    let call_id = call_id.split_whitespace().next().unwrap();
    place.run(&["claim", id]).expect(3);
    let claimed = place.run(&["claim", id, "--call-id", call_id, "--json"]);
    let claimed = claimed.expect(0).json();
    let token = claimed["claim"]["token"].as_str().unwrap();
    place.run(&["complete", id, "--claim", token]).expect(0);
}

#[test]
fn an_action_without_a_payload_is_not_decided_unseen() {
    let place = Place::new();
    let action = place.run(&["submit", "k-1", "--title", "delete all", "--json"]);
    let action = action.expect(0).json();
    let id = action["request_id"].as_str().unwrap();
    for decision in ["approve", "reject"] {
        let blind = place.run(&[decision, "--id", id]).expect(2);
        assert!(blind.stderr.contains("--digest none"), "{blind:?}");
    }
    let wrong = place.run(&["approve", "--id", id, "--digest", "nothing"]);
    assert!(wrong.expect(2).stderr.contains("or 'none'"));
    let url = place.server.url();
    let on_a_terminal = |answer: &[u8]| {
        let command = aegis(&["approve", "--id", id, "--tenant", "acme", "--url", &url]);
        let mut command = on_a_terminal(&command, true);
        let shown = read_to(command.stdout.as_mut().unwrap(), "[y/N] ");
        assert!(shown.contains("delete all"), "{shown}");
        let mut keyboard = command.stdin.take().unwrap();
        keyboard.write_all(answer).unwrap();
        let mut rest = String::new();
        let stdout = command.stdout.as_mut().unwrap();
        stdout.read_to_string(&mut rest).unwrap();
        (command.wait().unwrap().code(), rest)
    };
    let (code, rest) = on_a_terminal(b"n\n");
    assert_eq!(code, Some(1), "{rest}");
    let shown = place.run(&["show", id, "--json"]).expect(0).json();
    assert_eq!(shown["status"], "PENDING");
    let (code, rest) = on_a_terminal(b"y\n");
    assert_eq!(code, Some(0), "{rest}");
    let again = place.run(&["approve", "--id", id, "--digest", "none"]);
    assert!(again.expect(0).stdout.contains("duplicate"));
    // What has a payload is decided on its digest alone.
    let action = place.run(&["submit", "k-2", "--payload", r#"{"n":1}"#, "--json"]);
    let action = action.expect(0).json();
    let id = action["request_id"].as_str().unwrap();
    place
        .run(&["approve", "--id", id, "--digest", "none"])
        .expect(1);
}

/// A server that is none may show a payload, and nothing that ties a decision to it.
#[tokio::test(flavor = "multi_thread")]
async fn a_payload_that_is_shown_without_a_digest_is_not_decided_on() {
    let id = "5b7f5d0a-9c1c-4f0e-9d39-2f6b0d6c7a11";
    let action = json!({"request_id": id, "status": "PENDING", "payload": {"n": 1}});
    let peer = Peer::start([Act::answer(200).body(action.to_string())]).await;
    let mut command = aegis(&["approve", "--id", id]);
    command
        .env("AEGIS_URL", peer.url())
        .env("AEGIS_TENANT", "acme");
    let ended = run(command).expect(1);
    assert!(ended.stderr.contains("no digest"), "{ended:?}");
    assert_eq!(peer.count(), 1);
}

#[test]
fn an_empty_payload_is_claimed_as_it_is_on_record() {
    let place = Place::new();
    let id = |ended: Ended| {
        ended.expect(0).json()["request_id"]
            .as_str()
            .unwrap()
            .to_owned()
    };
    let empty = id(place.run(&["submit", "k-1", "--payload", "{}", "--json"]));
    place
        .run(&["approve", "--id", &empty, "--digest", "none"])
        .expect(0);
    place
        .run(&["claim", &empty, "--payload", " { } "])
        .expect(0);
    // An edit to nothing is a payload of its own.
    let submit = [
        "submit",
        "k-2",
        "--payload",
        r#"{"n":1}"#,
        "--allow-edit",
        "--json",
    ];
    let submitted = place.run(&submit).expect(0).json();
    let edited = submitted["request_id"].as_str().unwrap();
    let digest = submitted["digest"].as_str().unwrap();
    place
        .run(&[
            "approve", "--id", edited, "--digest", digest, "--edit", "{}",
        ])
        .expect(0);
    place.run(&["claim", edited, "--payload", "{}"]).expect(0);
    // And what has a payload is not claimed as if it had none.
    let full = place.run(&["approve", "k-3", "--payload", r#"{"n":1}"#, "--json"]);
    let refused = place.run(&["claim", &id(full), "--payload", "{}"]);
    refused.expect(3);
}

#[test]
fn a_second_server_on_the_same_file_is_refused() {
    let place = Place::new();
    let ended = run(serve(&place.store())).expect(1);
    let held = format!("is held by process {}", place.server.pid());
    assert!(ended.stderr.contains(&held), "{ended:?}");
    assert!(ended.stderr.contains("aegis.db"), "{ended:?}");
    assert!(ended.stderr.contains("one server at a time"), "{ended:?}");
    assert_eq!(ended.stdout, "");
    place.run(&["approve", "k-1"]).expect(0);
    // Once the first one has ended the file is free.
    let Place { folder, server } = place;
    server.stop().expect(0);
    Served::start(serve(&folder.path().join("aegis.db")))
        .stop()
        .expect(0);
}

#[test]
fn a_backup_of_a_running_server_has_all_that_was_acknowledged() {
    let place = Place::new();
    for key in ["k-1", "k-2", "k-3"] {
        place.run(&["approve", key]).expect(0);
    }
    let (store, to) = (place.store(), place.folder.path().join("copy.db"));
    let [store, to] = [&store, &to].map(|path| path.to_str().unwrap());
    let backup = |args: &[&str]| run(aegis(&[&["backup"], args].concat()));
    let done = backup(&[to, "--store", store]).expect(0);
    assert!(done.stdout.contains("copy.db: 3 actions"), "{done:?}");
    place.run(&["approve", "k-4"]).expect(0);

    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        let mode = fs::metadata(to).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }
    // What is there is never written over.
    let before = fs::read(to).unwrap();
    let again = backup(&[to, "--store", store]).expect(1);
    assert!(again.stderr.contains("a name that is free"), "{again:?}");
    assert_eq!(fs::read(to).unwrap(), before);

    // In a folder of its own, alone: it serves, and knows three of the four.
    let folder = TempDir::new().unwrap();
    let copy = folder.path().join("aegis.db");
    fs::rename(to, &copy).unwrap();
    assert_eq!(integrity(&look_at(&copy)), "ok");
    assert_eq!(counts(&look_at(&copy)), [3; 2]);
    let server = Served::start(serve(&copy));
    for (key, outcome) in [
        ("k-1", "duplicate"),
        ("k-3", "duplicate"),
        ("k-4", "accepted"),
    ] {
        let mut command = place.command(&["approve", key, "--json"]);
        command.env("AEGIS_URL", server.url());
        assert_eq!(run(command).expect(0).json()["outcome"], outcome, "{key}");
    }
    server.stop().expect(0);
    // Without a server too, with the store from the environment.
    let mut command = aegis(&["backup", to]);
    command.env("AEGIS_STORE", &copy);
    run(command).expect(0);
    assert_eq!(counts(&look_at(Path::new(to))), [4; 2]);
}

#[test]
fn what_is_no_database_is_not_backed_up() {
    let folder = TempDir::new().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    fs::write(path("text"), "no database".repeat(100)).unwrap();
    fs::write(path("empty"), "").unwrap();
    let other = rusqlite::Connection::open(path("other.db")).unwrap();
    other.execute_batch("CREATE TABLE t (x)").unwrap();
    let to = path("to.db");
    for name in ["missing", "text", "empty", "other.db"] {
        let ended = run(aegis(&["backup", &to, "--store", &path(name)])).expect(1);
        assert!(ended.stderr.contains(name), "{ended:?}");
        assert!(!Path::new(&to).exists(), "{name}");
    }
    assert!(!Path::new(&path("missing")).exists());
}

#[test]
fn without_keys_only_loopback_is_served() {
    let folder = TempDir::new().unwrap();
    let command = |args: &[&str]| {
        let mut command = aegis(&[&["serve", "--listen", "0.0.0.0:0"], args].concat());
        command.current_dir(folder.path());
        command
    };
    let refused = run(command(&[])).expect(2);
    for what in [
        "not a loopback address",
        "API keys",
        "--trust-tenant-header",
    ] {
        assert!(refused.stderr.contains(what), "{refused:?}");
    }
    assert!(!refused.stderr.contains("listening"), "{refused:?}");
    run(command(&["--trust-tenant-header=false"])).expect(2);
    Served::start(command(&["--trust-tenant-header"]))
        .stop()
        .expect(0);
    let keys = folder.path().join("keys");
    fs::write(&keys, new_key("alice", "decide").1).unwrap();
    Served::start(command(&["--keys", keys.to_str().unwrap()]))
        .stop()
        .expect(0);
}

#[test]
fn without_arguments_it_serves_the_folder_it_is_in() {
    let folder = TempDir::new().unwrap();
    let command = || {
        let mut command = aegis(&["serve"]);
        command.current_dir(folder.path());
        command
    };
    let client = |url: Option<String>| {
        let mut command = aegis(&["approve", "k-1", "--tenant", "t", "--thread", "h"]);
        command.envs(url.map(|url| ("AEGIS_URL", url)));
        run(command).expect(0);
    };
    let server = match Served::try_start(command()) {
        Ok(server) => {
            assert_eq!(server.addr, SocketAddr::from(([127, 0, 0, 1], 8000)));
            client(None);
            server
        }
        // Something else has the port.
        Err(ended) => {
            assert!(
                ended.stderr.contains("cannot listen on 127.0.0.1:8000"),
                "{ended:?}"
            );
            let mut command = command();
            command.env("AEGIS_LISTEN", "127.0.0.1:0");
            let server = Served::start(command);
            client(Some(server.url()));
            server
        }
    };
    let ended = server.stop().expect(0);
    assert!(ended.stderr.contains(", store aegis.db"), "{ended:?}");
    assert_eq!(ended.stdout, "");
    assert_eq!(counts(&look_at(&folder.path().join("aegis.db"))), [1; 2]);
    // The log is emptied into the database: one file, and the lock's.
    let mut files: Vec<_> = fs::read_dir(folder.path()).unwrap().collect();
    files.retain(|file| {
        !file
            .as_ref()
            .unwrap()
            .file_name()
            .to_string_lossy()
            .contains("-")
    });
    assert_eq!(files.len(), 2, "{files:?}");
}

/// Sends this on a connection of its own, and reads until what comes back ends so.
fn talk(addr: SocketAddr, request: &str, until: &str) -> (TcpStream, String) {
    let mut stream = TcpStream::connect(addr).unwrap();
    stream.set_read_timeout(Some(HANG)).unwrap();
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = Vec::new();
    let mut byte = [0];
    while !answer.ends_with(until.as_bytes()) {
        assert_eq!(stream.read(&mut byte).unwrap(), 1, "{answer:?}");
        answer.push(byte[0]);
    }
    (stream, String::from_utf8(answer).unwrap())
}

/// A connection with a request in flight, the body of which does not come.
fn stall(addr: SocketAddr) -> TcpStream {
    let request = "POST /api/v1/hitl/approve HTTP/1.1\r\nHost: localhost\r\nTenant-Id: t\r\nThread-Id: h\r\n\
                   Idempotency-Key: k\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\
                   Expect: 100-continue\r\n\r\n";
    talk(addr, request, "100 Continue\r\n\r\n").0
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signal_drains_and_a_wait_in_flight_is_answered() {
    for signal in ["TERM", "INT"] {
        let place = Place::with(|command| {
            command.env("AEGIS_LOG", "info,aegis_hitl=trace");
        });
        let submit = Call::new(place.server.addr, "POST", "/api/v1/hitl/actions");
        let submit = submit.header("Tenant-Id", "t").header("Thread-Id", "h");
        let id = submit
            .header("Idempotency-Key", "k")
            .send()
            .await
            .request_id();
        let request = format!(
            "GET /api/v1/hitl/status/{id} HTTP/1.1\r\nHost: localhost\r\nPrefer: wait=55\r\n\r\n"
        );
        let (mut wait, _) = talk(place.server.addr, &request, "");
        assert!(place.server.line("waits for a decision").is_some());
        let mut decision = stall(place.server.addr);

        place.server.signal(signal);
        assert!(place.server.line("aegis: draining").is_some());
        let mut answer = String::new();
        wait.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
        assert!(answer.contains("\"status\":\"PENDING\""), "{answer}");
        // What was begun is brought to its end.
        decision.write_all(b"{}").unwrap();
        let mut answer = String::new();
        decision.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 202 "), "{answer}");
        let Place { folder, server } = place;
        let ended = server.ended().expect(0);
        assert_eq!(ended.stdout, "");
        let [decisions, ..] = counts(&look_at(&folder.path().join("aegis.db")));
        assert_eq!(decisions, 1);
    }
}

#[tokio::test]
async fn a_terminated_server_ends_well_whatever_its_clients_do() {
    let folder = TempDir::new().unwrap();
    let served = Served::start(serve(&folder.path().join("aegis.db")));
    let mut stalled = H2::connect(served.addr, 0).await;
    stalled.get("/livez", &[]).await;
    stalled.until(h2::HEADERS).await;
    let _idle = H2::kept(served.addr).await;
    let mut half = TcpStream::connect(served.addr).unwrap();
    half.write_all(b"GET /livez HTTP/1.1\r\nHost: h\r\n")
        .unwrap();
    let asked = std::time::Instant::now();
    let ended = tokio::task::spawn_blocking(|| served.stop()).await.unwrap();
    ended.expect(0);
    // By default a drain may last 30 s.
    let soon = std::time::Duration::from_secs(20);
    assert!(asked.elapsed() < soon, "{:?}", asked.elapsed());
}

#[test]
fn a_drain_has_an_end() {
    let place = Place::with(|command| {
        command.args(["--drain-timeout", "0.1"]);
    });
    let _stalled = stall(place.server.addr);
    let ended = place.server.stop().expect(1);
    assert!(ended.stderr.contains("still in flight"), "{ended:?}");

    let place = Place::new();
    let _stalled = stall(place.server.addr);
    place.server.signal("TERM");
    assert!(place.server.line("aegis: draining").is_some());
    let ended = place.server.stop().expect(1);
    assert!(ended.stderr.contains("second signal"), "{ended:?}");
}

#[test]
fn a_server_goes_on_when_nobody_reads_its_log() {
    let folder = TempDir::new().unwrap();
    let mut command = serve(&folder.path().join("aegis.db"));
    command.env("AEGIS_LOG", "trace").stdin(Stdio::null());
    command.stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = Process::start(command);
    let mut stderr = child.stderr.take().unwrap();
    read_to(&mut stderr, "listening on http://");
    let addr = read_to(&mut stderr, ",");
    let addr: SocketAddr = addr.strip_suffix(',').unwrap().parse().unwrap();
    drop(stderr);
    make_noise(addr);
    for key in ["k-1", "k-2"] {
        let url = format!("http://{addr}");
        let args = [
            "approve", key, "--tenant", "t", "--thread", "h", "--url", &url,
        ];
        run(aegis(&args)).expect(0);
    }
    signal(child.id(), "TERM");
    let status = child.wait().unwrap();
    assert_eq!(status.code(), Some(0), "{status:?}");
}

#[test]
fn a_server_does_not_outlive_a_test_that_is_killed() {
    const ROLE: &str = "TEST_TO_BE_KILLED";
    if let Some(store) = std::env::var_os(ROLE) {
        let server = Served::start(serve(Path::new(&store)));
        println!("serving on {},", server.addr);
        loop {
            std::thread::park();
        }
    }
    let folder = TempDir::new().unwrap();
    let store = folder.path().join("aegis.db");
    let mut test = again(a_server_does_not_outlive_a_test_that_is_killed);
    test.env(ROLE, &store).stdin(Stdio::null());
    test.stdout(Stdio::piped());
    let mut test = Process::start(test);
    let stdout = test.stdout.as_mut().unwrap();
    read_to(stdout, "serving on ");
    let addr = read_to(stdout, ",");
    let addr: SocketAddr = addr.strip_suffix(',').unwrap().parse().unwrap();
    assert!(TcpStream::connect(addr).is_ok());
    drop(test);
    until_gone(addr);
}

/// Waits until nobody listens there any more.
fn until_gone(addr: SocketAddr) {
    let since = std::time::Instant::now();
    while TcpStream::connect(addr).is_ok() {
        assert!(since.elapsed() < HANG, "the server goes on");
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
}

/// A command on a terminal of its own; what it shows comes out of its stdout.
fn on_a_terminal(command: &Command, no_color: bool) -> Process {
    // It does not outlive its terminal either, which a hangup would not see to.
    let command = bound(command);
    let line: Vec<_> = std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|word| format!("'{}'", word.to_str().unwrap()))
        .collect();
    // Not every shell replaces itself by its last command: bash does, dash does not. A shell that
    // stays is killed by Ctrl-C and reports 130 whatever the command does.
    let line = format!("exec {}", line.join(" "));
    let mut terminal = Command::new("script");
    terminal.args(["-qec", &line, "/dev/null"]);
    terminal.env("SHELL", "/bin/sh");
    terminal.env_remove("NO_COLOR").env("TERM", "xterm");
    terminal.env("AEGIS_LOG", "trace");
    if no_color {
        terminal.env("NO_COLOR", "1");
    }
    let mut terminal = bound(&terminal);
    terminal.stdin(Stdio::piped()).stdout(Stdio::piped());
    Process::start(terminal)
}

/// Reads until this has been read.
fn read_to(stream: &mut impl Read, end: &str) -> String {
    let mut seen = Vec::new();
    while !seen.ends_with(end.as_bytes()) {
        let mut byte = [0];
        let len = stream.read(&mut byte).unwrap();
        assert_eq!(len, 1, "no '{end}': {}", String::from_utf8_lossy(&seen));
        seen.push(byte[0]);
    }
    String::from_utf8(seen).unwrap()
}

#[test]
fn color_is_for_terminals_and_no_color_is_obeyed() {
    for no_color in [false, true] {
        let mut help = on_a_terminal(&aegis(&["--help"]), no_color);
        let shown = read_to(help.stdout.as_mut().unwrap(), "--version");
        assert_eq!(shown.contains('\u{1b}'), !no_color, "{shown}");
        help.wait().unwrap();

        let folder = TempDir::new().unwrap();
        let mut server = on_a_terminal(&serve(&folder.path().join("aegis.db")), no_color);
        let stdout = server.stdout.as_mut().unwrap();
        read_to(stdout, "listening on http://");
        let addr = read_to(stdout, ",");
        let addr = addr.strip_suffix(',').unwrap().parse().unwrap();
        make_noise(addr);
        let shown = read_to(stdout, "a connection ended early");
        assert_eq!(shown.contains('\u{1b}'), !no_color, "{shown}");
        // Ctrl-C. The keyboard stays until the terminal has ended.
        let mut keyboard = server.stdin.take().unwrap();
        keyboard.write_all(b"\x03").unwrap();
        read_to(server.stdout.as_mut().unwrap(), "draining");
        let mut rest = String::new();
        let stdout = server.stdout.as_mut().unwrap();
        stdout.read_to_string(&mut rest).unwrap();
        let status = server.wait().unwrap();
        assert!(status.success(), "{status}: {rest}");
        drop(keyboard);
        assert!(TcpStream::connect(addr).is_err());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn logs_hold_no_key_payload_tenant_or_token() {
    let folder = TempDir::new().unwrap();
    let (token, line) = new_key("alice", "decide");
    let keys = folder.path().join("keys");
    fs::write(&keys, line.replace(" acme ", " tenant-Zx81 ")).unwrap();
    let place = Place::with(|command| {
        command.env("AEGIS_LOG", "trace").arg("--keys").arg(&keys);
    });
    let mut command = place.command(&[
        "approve",
        "key-Zx82",
        "--payload",
        r#"{"to":"payload-Zx83"}"#,
    ]);
    command.args(["--comment", "comment-Zx84"]);
    command
        .env_remove("AEGIS_TENANT")
        .env("AEGIS_TOKEN", &token);
    run(command).expect(0);
    // In the ways that fail too, and over HTTP/2.
    for http2 in [false, true] {
        for (action, key, body, status) in [
            ("approve", "key-Zx82", r#"{"to":"payload-Zx83"}"#, 409),
            ("reject", "key-Zx82", "{}", 422),
            ("approve", "key-Zx82", r#"{"to":"payload-Zx85"}"#, 422),
            ("approve", "key Zx82", "{}", 400),
            ("approve", "key-Zx86", "payload-Zx87", 400),
        ] {
            let call = Call::new(place.server.addr, "POST", format!("/api/v1/hitl/{action}"));
            let call = call.header("Authorization", format!("Bearer {token}"));
            let thread = ["run-7", "thread-Zx88"][usize::from(status == 400)];
            let call = call.header("Thread-Id", thread);
            let call = call.header("Idempotency-Key", key).json(body);
            let call = if http2 { call.http2() } else { call };
            assert_eq!(call.send().await.status, status);
        }
        let call = Call::new(place.server.addr, "GET", "/api/v1/hitl/status/Zx90");
        let call = call.header("Authorization", "Bearer sk_live_Zx91");
        let call = call.header("Tenant-Id", "tenant-Zx81");
        let call = if http2 { call.http2() } else { call };
        assert_eq!(call.send().await.status, 401);
    }
    let Place {
        folder: _kept,
        server,
    } = place;
    let ended = server.stop().expect(0);
    assert!(ended.stderr.contains("TRACE"), "{}", ended.stderr);
    assert!(!ended.stderr.contains("Zx"), "{}", ended.stderr);
    assert!(!ended.stderr.contains(&token), "{}", ended.stderr);
    assert!(!ended.stderr.contains(&token[8..]), "{}", ended.stderr);
}
