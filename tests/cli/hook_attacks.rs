//! The gate for coding agents against whatever goes wrong: it blocks, with exit code 2.

use std::io::Write;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use aegis_hitl::Payload;
use aegis_hitl::protocol::Digest;
use aegis_hitl::testing::{Act, Peer};
use serde_json::{Value, json};

use crate::binary::{Ended, aegis, run_with_input};
use crate::hook::{AGENTS, Agent, CLAUDE};
use crate::support::HANG;
use crate::support::process::{Process, bound};

fn hook(agent: Agent, url: &str, args: &[&str]) -> Command {
    let mut command = aegis(&[&["hook", agent.name], args].concat());
    command
        .env("AEGIS_URL", url)
        .env("AEGIS_TENANT", "acme")
        .env_remove("AEGIS_THREAD");
    command
}

fn call(agent: Agent) -> Value {
    agent.call(agent.before, "toolu_1", &json!({ "command": "rm -r /" }))
}

fn pending() -> Value {
    json!({
        "request_id": "01890a5d-ac96-774b-bcce-b302099a8057", "tenant_id": "acme",
        "status": "PENDING", "decision": null, "execution": null,
    })
}

fn submitted() -> Act {
    Act::answer(201).body(pending().to_string())
}

/// Blocks, and says nothing that could be read as a permission.
fn assert_blocks(ended: Ended) -> Ended {
    let ended = ended.expect(2);
    assert_eq!(ended.stdout, "");
    ended
}

/// A process that has the hook's input, and waits for a decision.
fn waiting(agent: Agent, peer: &Peer) -> Process {
    let mut command = bound(&hook(agent, &peer.url(), &[]));
    command.stdin(Stdio::piped()).stdout(Stdio::null());
    command.stderr(Stdio::null());
    let mut hook = Process::start(command);
    let mut stdin = hook.stdin.take().unwrap();
    stdin.write_all(call(agent).to_string().as_bytes()).unwrap();
    drop(stdin);
    let since = Instant::now();
    while peer.count() < 2 {
        assert!(since.elapsed() < HANG, "it does not wait");
        std::thread::sleep(Duration::from_millis(20));
    }
    hook
}

fn kill(process: &Process, signal: &str) {
    let killed = Command::new("kill")
        .args([signal, &process.id().to_string()])
        .status();
    assert!(killed.unwrap().success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hook_that_is_told_to_end_while_it_waits_blocks_the_call() {
    for agent in AGENTS {
        for signal in ["-TERM", "-INT", "-HUP"] {
            let peer = Peer::start([submitted(), Act::hang()]).await;
            let mut hook = waiting(agent, &peer);
            kill(&hook, signal);
            assert_eq!(hook.wait().unwrap().code(), Some(2), "{agent:?} {signal}");
        }
    }
}

#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread")]
async fn no_signal_that_can_be_handled_lets_a_call_pass() {
    // The last two are the first and the last that programs can give a meaning of their own.
    for signal in [
        "-QUIT", "-ABRT", "-USR1", "-USR2", "-ALRM", "-VTALRM", "-PROF", "-XCPU", "-XFSZ", "-IO",
        "-PWR", "-STKFLT", "-34", "-64",
    ] {
        let peer = Peer::start([submitted(), Act::hang()]).await;
        let mut hook = waiting(CLAUDE, &peer);
        kill(&hook, signal);
        assert_eq!(hook.wait().unwrap().code(), Some(2), "{signal}");
    }
}

#[test]
fn a_hook_that_is_told_to_end_before_it_has_its_input_blocks_the_call() {
    let mut command = bound(&hook(CLAUDE, "http://127.0.0.1:1", &[]));
    command.stdin(Stdio::piped()).stdout(Stdio::null());
    command.stderr(Stdio::piped());
    let mut hook = Process::start(command);
    let stdin = hook.stdin.take().unwrap();
    // It cannot be seen from outside when it begins to read, so it is told until it ends.
    let since = Instant::now();
    std::thread::sleep(Duration::from_millis(500));
    let ended = loop {
        kill(&hook, "-TERM");
        if let Some(ended) = hook.try_wait().unwrap() {
            break ended;
        }
        assert!(since.elapsed() < HANG, "it does not end");
        std::thread::sleep(Duration::from_millis(20));
    };
    assert_eq!(ended.code(), Some(2));
    drop(stdin);
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_answers_in_place_of_the_server_lets_nothing_pass() {
    for agent in AGENTS {
        for (number, script) in scripts(agent).into_iter().enumerate() {
            let peer = Peer::start(script).await;
            let hook = hook(agent, &peer.url(), &["--for", "2", "--retries", "0"]);
            let ended = run_with_input(hook, &call(agent).to_string());
            assert!(
                ended.code() == 2 && ended.stdout.is_empty(),
                "{agent:?} {number}: {ended:?}"
            );
        }
    }
}

/// The payload of `call`, as a server has it on record.
fn digest(agent: Agent) -> String {
    let shown = json!({ "tool": agent.tool, "input": { "command": "rm -r /" }, "cwd": "/work" });
    let payload = Payload::new(&shown).unwrap();
    Digest::of(&payload).unwrap().to_string()
}

/// The scripts below are refused for their faults: without one the call passes.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_server_answers_lets_the_call_pass() {
    for agent in AGENTS {
        let digest = digest(agent);
        let approved = json!({ "status": "COMMITTED", "decision": "approve", "digest": digest });
        let claimed = with(
            &with(&pending(), &approved),
            &json!({"execution": "claimed"}),
        );
        let script = [
            submitted(),
            Act::answer(200).body(with(&pending(), &approved).to_string()),
            Act::answer(200).body(
                json!({ "action": claimed, "claim": { "token": "t", "fence": 1 } }).to_string(),
            ),
        ];
        let peer = Peer::start(script).await;
        let hook = hook(agent, &peer.url(), &["--for", "2", "--retries", "0"]);
        run_with_input(hook, &call(agent).to_string()).expect(0);
    }
}

/// Nothing tells the claim of this hook from that of an earlier one, whose call may have passed.
#[tokio::test(flavor = "multi_thread")]
async fn a_hook_whose_claim_is_on_record_already_blocks_the_call() {
    let approved =
        json!({ "status": "COMMITTED", "decision": "approve", "digest": digest(CLAUDE) });
    let approved = with(&pending(), &approved);
    let claimed = with(
        &approved,
        &json!({ "execution": "claimed", "replayed": true }),
    );
    let claim = json!({ "action": claimed, "claim": { "token": "t", "fence": 1 } });
    let peer = Peer::start([
        submitted(),
        Act::answer(200).body(approved.to_string()),
        Act::lose_reply(),
        Act::answer(200).body(claim.to_string()),
    ])
    .await;
    let hook = hook(CLAUDE, &peer.url(), &["--for", "5"]);
    let ended = assert_blocks(run_with_input(hook, &call(CLAUDE).to_string()));
    assert!(ended.stderr.contains("was lost"), "{ended:?}");
    assert_eq!(peer.count(), 4);
}

/// An action with other members.
fn with(action: &Value, more: &Value) -> Value {
    let mut action = action.clone();
    for (name, value) in more.as_object().unwrap() {
        action[name] = value.clone();
    }
    action
}

/// A server that is none may have no digest on record, and agree with everything.
#[tokio::test(flavor = "multi_thread")]
async fn a_call_whose_digest_cannot_be_computed_is_not_even_submitted() {
    for agent in AGENTS {
        let deep = format!("{}{}", "[".repeat(200), "]".repeat(200));
        for hostile in ["\"ls\",\"command\":\"rm\"", "\"\\ud800\"", "1e999", &deep] {
            let text = call(agent).to_string().replace("\"rm -r /\"", hostile);
            let decided = json!({ "status": "COMMITTED", "decision": "approve" });
            let decided = with(&pending(), &decided);
            let claimed = with(&decided, &json!({ "execution": "claimed" }));
            let claim = json!({ "action": claimed, "claim": { "token": "t", "fence": 1 } });
            let peer = Peer::start([
                submitted(),
                Act::answer(200).body(decided.to_string()),
                Act::answer(200).body(claim.to_string()),
            ])
            .await;
            let hook = hook(agent, &peer.url(), &["--for", "2", "--retries", "0"]);
            let ended = assert_blocks(run_with_input(hook, &text));
            assert!(ended.stderr.contains("the tool call"), "{ended:?}");
            assert_eq!(peer.count(), 0, "{agent:?} {hostile}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_of_more_than_a_mebibyte_blocks_and_so_does_input_without_end() {
    for (size, named) in [(1 << 20, "1 MiB"), (17 << 20, "16 MiB")] {
        let peer = Peer::start([submitted()]).await;
        let mut large = call(CLAUDE);
        large["tool_input"]["command"] = json!("x".repeat(size));
        let hook = hook(CLAUDE, &peer.url(), &["--for", "2"]);
        let ended = assert_blocks(run_with_input(hook, &large.to_string()));
        assert!(ended.stderr.contains(named), "{ended:?}");
        assert_eq!(peer.count(), 0);
    }
}

/// What a server would not answer.
fn scripts(agent: Agent) -> Vec<Vec<Act>> {
    let approved = |more: Value| {
        let decided = json!({ "status": "COMMITTED", "decision": "approve" });
        with(&with(&pending(), &decided), &more)
    };
    let other = "f".repeat(64);
    let claimed = |action: Value, claim: Value| {
        Act::answer(200).body(json!({ "action": action, "claim": claim }).to_string())
    };
    let token = json!({ "token": "t", "fence": 1 });
    let ok = Act::answer(200).body(approved(json!({})).to_string());
    let mut scripts: Vec<Vec<Act>> = vec![
        vec![
            Act::answer(200)
                .header("content-type", "text/html")
                .body("<html>"),
        ],
        vec![Act::answer(200).body("{}")],
        vec![Act::answer(200).body("[]")],
        vec![Act::answer(302).header("location", "/elsewhere")],
        vec![Act::answer(307).header("location", "/elsewhere")],
        vec![Act::answer(409).body(approved(json!({})).to_string())],
        vec![Act::answer(429), Act::answer(429)],
        vec![
            Act::answer(502)
                .header("content-type", "text/html")
                .body("<html>"),
        ],
        vec![Act::lose_reply()],
        // Approved at once, and the claim goes wrong.
        vec![submitted(), ok.clone(), Act::answer(200).body("{}")],
        vec![submitted(), ok.clone(), Act::answer(409).body("{}")],
        vec![
            submitted(),
            ok.clone(),
            Act::answer(202).body(approved(json!({})).to_string()),
        ],
        // No claim, no token, not claimed, or on something else.
        vec![
            submitted(),
            ok.clone(),
            claimed(approved(json!({"execution": "claimed"})), json!({})),
        ],
        vec![
            submitted(),
            ok.clone(),
            claimed(approved(json!({})), token.clone()),
        ],
        vec![
            submitted(),
            ok.clone(),
            claimed(approved(json!({"execution": "claimed"})), token.clone()),
        ],
        vec![
            submitted(),
            ok.clone(),
            claimed(
                approved(json!({"execution": "claimed", "digest": other})),
                token.clone(),
            ),
        ],
        vec![
            submitted(),
            ok.clone(),
            claimed(
                approved(json!({"execution": "claimed", "tenant_id": "other"})),
                token.clone(),
            ),
        ],
        // The decision is of another action, or none.
        vec![
            submitted(),
            Act::answer(200).body(
                json!({"request_id": "x", "status": "COMMITTED", "decision": "approve"})
                    .to_string(),
            ),
            claimed(approved(json!({"execution": "claimed"})), token.clone()),
        ],
    ];
    // The decision is of another action, or is no known word, and the rest is sound.
    let digest = digest(agent);
    let sound = approved(json!({ "digest": digest }));
    let other = json!({ "request_id": "01890a5d-ac96-774b-bcce-b302099a8058" });
    let rejected = json!({ "decision": "reject" });
    for (decided, about) in [
        (with(&sound, &other), with(&sound, &other)),
        (with(&sound, &other), sound.clone()),
        (with(&with(&sound, &other), &rejected), sound.clone()),
        (with(&sound, &json!({ "decision": null })), sound.clone()),
        (
            with(&sound, &json!({ "decision": "escalate" })),
            sound.clone(),
        ),
        (
            with(&sound, &json!({ "status": "QUEUED", "decision": null })),
            sound.clone(),
        ),
    ] {
        let claim = claimed(
            with(&about, &json!({ "execution": "claimed" })),
            token.clone(),
        );
        let decided = Act::answer(200).body(decided.to_string());
        scripts.push(vec![submitted(), decided, claim]);
    }
    // An edit of what cannot be edited, and otherwise sound.
    if !agent.takes_edits {
        let edited = json!({ "tool": agent.tool, "input": { "command": "ls" }, "cwd": "/work" });
        let digest = Digest::of(&Payload::new(&edited).unwrap()).unwrap();
        let edited = json!({
            "execution": "claimed", "digest": digest.to_string(), "edited_payload": edited,
        });
        let decided = Act::answer(200).body(approved(edited.clone()).to_string());
        scripts.push(vec![submitted(), decided, claimed(approved(edited), token)]);
    }
    scripts
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hook_ends_within_its_time_whatever_the_server_does() {
    // A server that takes every request and answers none.
    let peer = Peer::start(std::iter::repeat_with(Act::hang).take(20)).await;
    let since = Instant::now();
    let ended = run_with_input(
        hook(CLAUDE, &peer.url(), &["--for", "3"]),
        &call(CLAUDE).to_string(),
    );
    assert_blocks(ended);
    assert!(
        since.elapsed() < Duration::from_secs(30),
        "{:?}",
        since.elapsed()
    );
    // One that hangs when the claim comes.
    let mut action = pending();
    action["status"] = json!("COMMITTED");
    action["decision"] = json!("approve");
    let script = [submitted(), Act::answer(200).body(action.to_string())];
    let hangs = std::iter::repeat_with(Act::hang).take(20);
    let peer = Peer::start(script.into_iter().chain(hangs)).await;
    let since = Instant::now();
    let ended = run_with_input(
        hook(CLAUDE, &peer.url(), &["--for", "3"]),
        &call(CLAUDE).to_string(),
    );
    assert_blocks(ended);
    assert!(
        since.elapsed() < Duration::from_secs(30),
        "{:?}",
        since.elapsed()
    );
}

#[test]
fn hostile_input_lets_nothing_pass() {
    let place = crate::human_loop::Place::new();
    for agent in AGENTS {
        for input in hostile(agent) {
            let shown: String = String::from_utf8_lossy(&input).chars().take(200).collect();
            let hook = hook(agent, &place.server.url(), &["--for", "1"]);
            let ended = crate::binary::run_with_bytes(hook, &input);
            assert!(
                ended.code() == 2 && ended.stdout.is_empty(),
                "{agent:?} {shown}: {ended:?}"
            );
        }
    }
}

fn hostile(agent: Agent) -> Vec<Vec<u8>> {
    let mut inputs: Vec<Vec<u8>> = vec![
        b"".to_vec(),
        b"null".to_vec(),
        b"\xff\xfe".to_vec(),
        b"{\"session_id\":\"s\"".to_vec(),
        "[".repeat(200_000).into_bytes(),
    ];
    for (name, value) in [
        (agent.session, json!(7)),
        (agent.session, json!("")),
        (agent.session, json!("a b")),
        (agent.session, json!("é")),
        ("tool_name", json!(null)),
        ("tool_use_id", json!([])),
        ("tool_use_id", json!("")),
        ("tool_input", json!("x".repeat(1 << 20))),
        ("cwd", json!(7)),
        ("hook_event_name", json!("pretooluse")),
        ("hook_event_name", json!("beforeShellExecution")),
    ] {
        let mut call = call(agent);
        call[name] = value;
        inputs.push(call.to_string().into_bytes());
    }
    // Two members of one name, and JSON that parsers read differently.
    let text = call(agent).to_string();
    let tool = format!("\"tool_name\":\"{}\"", agent.tool);
    let two_tools = format!("{tool},\"tool_name\":\"Read\"");
    for (from, to) in [
        (&*tool, &*two_tools),
        ("\"rm -r /\"", "\"\\ud800\""),
        ("\"rm -r /\"", "\"ls\",\"command\":\"rm -r /\""),
    ] {
        assert!(text.contains(from));
        inputs.push(text.replace(from, to).into_bytes());
    }
    inputs
}
