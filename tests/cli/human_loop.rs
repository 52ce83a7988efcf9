//! The human loop on the command line, and the gate for coding agents.

use std::process::Command;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::binary::{Ended, Served, aegis, run, run_with_input, serve};

/// A server, and commands for it.
pub struct Place {
    pub server: Served,
    _folder: TempDir,
}

impl Place {
    pub fn new() -> Self {
        let folder = TempDir::new().unwrap();
        Self {
            server: Served::start(serve(&folder.path().join("aegis.db"))),
            _folder: folder,
        }
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = aegis(args);
        command.env("AEGIS_URL", self.server.url());
        command
            .env("AEGIS_TENANT", "acme")
            .env("AEGIS_THREAD", "run-7");
        command
    }

    fn run(&self, args: &[&str]) -> Ended {
        run(self.command(args))
    }

    fn json(&self, args: &[&str]) -> Value {
        self.run(&[args, &["--json"]].concat()).expect(0).json()
    }

    fn submitted(&self, key: &str) -> (String, String) {
        let payload = r#"{"to":"a@b.c","amount":12.5}"#;
        let action = self.json(&["submit", key, "--payload", payload, "--title", "Pay a"]);
        let text = |name: &str| action[name].as_str().unwrap().to_owned();
        (text("request_id"), text("digest"))
    }
}

#[test]
fn an_action_goes_the_whole_way_by_commands() {
    let place = Place::new();
    let (id, digest) = place.submitted("k-1");
    let list = place.run(&["list", "--status", "pending"]).expect(0).stdout;
    assert!(
        list.contains(&id) && list.contains("Pay a") && list.contains("pending"),
        "{list}"
    );
    let shown = place.run(&["show", &id]).expect(0).stdout;
    assert!(shown.contains(&format!("digest: {digest}")), "{shown}");
    assert!(
        shown.contains("history: ") && shown.contains("submitted by anonymous"),
        "{shown}"
    );

    // Not on a terminal, so nothing can be confirmed.
    let blind = place.run(&["approve", "--id", &id]).expect(2);
    assert!(blind.stderr.contains("--digest"), "{blind:?}");
    let wrong = "0".repeat(64);
    place
        .run(&["approve", "--id", &id, "--digest", &wrong])
        .expect(3);
    let receipt = place.json(&[
        "approve",
        "--id",
        &id,
        "--digest",
        &digest,
        "--comment",
        "ok",
    ]);
    assert_eq!(receipt["outcome"], "accepted");
    let again = place.json(&["approve", "--id", &id, "--digest", &digest]);
    assert_eq!(again["outcome"], "duplicate");
    place
        .run(&["reject", "--id", &id, "--digest", &digest])
        .expect(3);
    let list = place
        .run(&["list", "--decision", "approve"])
        .expect(0)
        .stdout;
    assert!(list.contains("approved, not picked up"), "{list}");

    let waited = place.json(&["wait", &id]);
    assert_eq!(waited["decision"], "approve");
    place.run(&["claim", &id, "--digest", &wrong]).expect(3);
    let payload = r#"{ "amount": 12.50, "to": "a@b.c" }"#;
    let claimed = place.json(&["claim", &id, "--payload", payload, "--lease", "60"]);
    let token = claimed["claim"]["token"].as_str().unwrap();
    place.run(&["claim", &id, "--digest", &digest]).expect(3);
    let renewed = place.json(&["renew", &id, "--claim", token, "--lease", "90"]);
    assert_eq!(renewed["claim"]["fence"], 1);
    let mut complete = place.command(&["complete", &id, "--result", "[1]", "--json"]);
    complete.env("AEGIS_CLAIM", token);
    assert_eq!(run(complete).expect(0).json()["execution"], "completed");
    place
        .run(&["fail", &id, "--claim", token, "--reason", "no"])
        .expect(3);
    place.run(&["renew", &id, "--claim", "nonsense"]).expect(3);

    let events = place
        .run(&["events", "--after", "0", "--count", "4"])
        .expect(0)
        .stdout;
    let kinds: Vec<_> = events
        .lines()
        .map(|line| line.split(' ').nth(2).unwrap())
        .collect();
    assert_eq!(kinds, ["submitted", "approved", "claimed", "completed"]);
    let (id, _) = place.submitted("k-2");
    place.run(&["cancel", &id]).expect(0);
    let cancelled = place.json(&["show", &id]);
    assert_eq!(cancelled["closed"], "cancelled");
    let late = place
        .run(&["wait", &place.submitted("k-3").0, "--for", "0.2"])
        .expect(1);
    assert!(late.stderr.contains("nobody has decided"), "{late:?}");
    let short = place.json(&["submit", "k-4", "--expires", "1s"]);
    let expired = place.json(&["wait", short["request_id"].as_str().unwrap()]);
    assert_eq!(expired["closed"], "expired");
}

#[test]
fn deceptive_characters_are_shown_as_what_they_are() {
    let place = Place::new();
    let title = "pay \u{202e}0001\u{202c} \u{1b}[31m\u{200b}";
    place.run(&["submit", "k", "--title", title]).expect(0);
    for shown in [
        place.run(&["list"]).expect(0).stdout,
        place
            .run(&["events", "--after", "0", "--count", "1"])
            .expect(0)
            .stdout,
    ] {
        for character in ['\u{202e}', '\u{202c}', '\u{1b}', '\u{200b}'] {
            assert!(!shown.contains(character), "{shown:?}");
        }
        assert!(shown.contains("202E"), "{shown:?}");
    }
}

#[test]
fn completions_and_pages_are_printed() {
    for shell in ["bash", "zsh", "fish"] {
        let text = run(aegis(&["completions", shell])).expect(0).stdout;
        assert!(
            text.contains("approve") && text.contains("aegis"),
            "{shell}"
        );
    }
    let page = run(aegis(&["man"])).expect(0).stdout;
    assert!(
        page.contains(".TH aegis") && page.contains("Exit codes"),
        "{page}"
    );
    let page = run(aegis(&["man", "serve"])).expect(0).stdout;
    assert!(page.contains("aegis") && page.contains("listen"), "{page}");
    run(aegis(&["man", "nonsense"])).expect(2);
}

/// Runs the hook with what the agent says.
fn hook(place: &Place, args: &[&str], input: &Value) -> Ended {
    let command = place.command(&[&["hook", "claude"], args].concat());
    run_with_input(command, &input.to_string())
}

fn call(event: &str, id: &str, input: &Value) -> Value {
    json!({
        "session_id": "s-1",
        "transcript_path": "/tmp/t.jsonl",
        "cwd": "/work",
        "permission_mode": "default",
        "hook_event_name": event,
        "tool_name": "Bash",
        "tool_input": input,
        "tool_use_id": id,
    })
}

/// Decides on what is pending, once there is something.
fn decide(place: &Place, args: &[&str]) -> String {
    for _ in 0..600 {
        let pending = place.json(&["list", "--status", "pending"]);
        if let Some(action) = pending["actions"].get(0) {
            let id = action["request_id"].as_str().unwrap();
            let digest = action["digest"].as_str().unwrap();
            let verb = args[0];
            place
                .run(&[&[verb, "--id", id, "--digest", digest], &args[1..]].concat())
                .expect(0);
            return id.to_owned();
        }
    }
    panic!("nothing is pending");
}

/// Asks before a tool call, while a reviewer decides.
fn asked(place: &Place, input: &Value, decision: &[&str]) -> (Ended, String) {
    let (command, input) = (place.command(&["hook", "claude"]), input.to_string());
    let hook = std::thread::spawn(move || run_with_input(command, &input));
    let id = decide(place, decision);
    (hook.join().unwrap(), id)
}

fn permission(ended: &Ended) -> Value {
    let output: Value = serde_json::from_str(&ended.stdout).unwrap();
    assert_eq!(output["hookSpecificOutput"]["hookEventName"], "PreToolUse");
    output["hookSpecificOutput"].clone()
}

#[test]
fn an_approved_tool_call_passes_once_and_its_outcome_is_on_record() {
    let place = Place::new();
    let input = json!({ "command": "rm -r build", "timeout": 5 });
    let before = call("PreToolUse", "toolu_1", &input);
    let (passed, id) = asked(&place, &before, &["approve", "--comment", "fine"]);
    let output = permission(&passed.expect(0));
    assert_eq!(output["permissionDecision"], "allow");
    assert_eq!(
        output["permissionDecisionReason"],
        "approved by anonymous: fine"
    );
    assert_eq!(output.get("updatedInput"), None);
    let shown = place.json(&["show", &id]);
    assert_eq!(shown["title"], "Bash: rm -r build");
    assert_eq!(shown["thread_id"], "s-1");
    assert_eq!(shown["execution"], "claimed");
    // One approval passes one call.
    let again = hook(&place, &[], &before).expect(2);
    assert!(
        again.stderr.contains("claimed for this tool call before"),
        "{again:?}"
    );
    hook(&place, &[], &call("PostToolUse", "toolu_1", &input)).expect(0);
    assert_eq!(place.json(&["show", &id])["execution"], "completed");
    hook(&place, &[], &before).expect(2);
}

#[test]
fn a_tool_call_that_failed_is_for_a_person_again() {
    let place = Place::new();
    let input = json!({ "command": "false" });
    let (passed, id) = asked(&place, &call("PreToolUse", "toolu_1", &input), &["approve"]);
    passed.expect(0);
    let mut failed = call("PostToolUseFailure", "toolu_1", &input);
    failed["error"] = json!("exit code 1");
    hook(&place, &[], &failed).expect(0);
    let shown = place.json(&["show", &id]);
    assert_eq!(
        (&shown["status"], &shown["reason"]),
        (&json!("FAILED"), &json!("exit code 1"))
    );
}

#[test]
fn a_failure_that_is_told_in_half_a_character_is_on_record() {
    let place = Place::new();
    let input = json!({ "command": "cat" });
    let (passed, id) = asked(&place, &call("PreToolUse", "toolu_1", &input), &["approve"]);
    passed.expect(0);
    let mut failed = call("PostToolUseFailure", "toolu_1", &input);
    failed["error"] = json!("no file HALF");
    let text = failed.to_string().replace("HALF", "\\udc80");
    run_with_input(place.command(&["hook", "claude"]), &text).expect(0);
    let shown = place.json(&["show", &id]);
    assert_eq!(shown["reason"], "\"no file \\udc80\"", "{shown}");
}

#[test]
fn an_edited_tool_call_passes_as_it_was_edited() {
    let place = Place::new();
    let before = call("PreToolUse", "toolu_1", &json!({ "command": "rm -r /" }));
    let edit = r#"{"tool":"Bash","input":{"command":"rm -r build"},"cwd":"/work"}"#;
    let (passed, id) = asked(&place, &before, &["approve", "--edit", edit]);
    let output = permission(&passed.expect(0));
    assert_eq!(output["permissionDecision"], "allow");
    assert_eq!(output["updatedInput"], json!({ "command": "rm -r build" }));
    hook(
        &place,
        &[],
        &call(
            "PostToolUse",
            "toolu_1",
            &json!({ "command": "rm -r build" }),
        ),
    );
    let shown = place.json(&["show", &id]);
    assert_eq!(shown["execution"], "completed", "{shown}");
    let other = r#"{"tool":"Write","input":{"file_path":"/x"}}"#;
    let before = call("PreToolUse", "toolu_2", &json!({ "command": "ls" }));
    let (blocked, _) = asked(&place, &before, &["approve", "--edit", other]);
    assert!(
        blocked
            .expect(2)
            .stderr
            .contains("not that of the same tool")
    );
}

#[test]
fn a_tool_call_that_nobody_approves_does_not_pass() {
    let place = Place::new();
    let input = json!({ "command": "ls" });
    let before = call("PreToolUse", "toolu_1", &input);
    let (rejected, _) = asked(&place, &before, &["reject", "--comment", "no"]);
    let output = permission(&rejected.expect(0));
    assert_eq!(output["permissionDecision"], "deny");
    assert_eq!(
        output["permissionDecisionReason"],
        "rejected by anonymous: no"
    );
    let late = hook(
        &place,
        &["--for", "0.3"],
        &call("PreToolUse", "toolu_2", &input),
    );
    assert!(late.expect(2).stderr.contains("nobody has decided"));
    let mut nameless = before.clone();
    nameless.as_object_mut().unwrap().remove("tool_use_id");
    let mut stop = before.clone();
    stop["hook_event_name"] = json!("Stop");
    for input in [json!({}), json!([]), nameless, stop] {
        hook(&place, &[], &input).expect(2);
    }
    run_with_input(place.command(&["hook", "claude"]), "no JSON").expect(2);
    let mut nowhere = place.command(&["hook", "claude", "--retries", "0"]);
    nowhere.env("AEGIS_URL", "http://127.0.0.1:1");
    run_with_input(nowhere, &before.to_string()).expect(2);
    let mut nobody = place.command(&["hook", "claude"]);
    nobody.env_remove("AEGIS_TENANT");
    run_with_input(nobody, &before.to_string()).expect(2);
}
