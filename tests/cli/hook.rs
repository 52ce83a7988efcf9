//! The gate for coding agents, as each of them calls it.

use std::thread;

use serde_json::{Value, json};

use crate::binary::{Ended, run, run_with_input};
use crate::human_loop::Place;

/// A coding agent, with input as its documentation shows it.
#[derive(Debug, Clone, Copy)]
pub struct Agent {
    pub name: &'static str,
    pub before: &'static str,
    pub after: &'static str,
    pub failed: Option<&'static str>,
    pub session: &'static str,
    pub takes_edits: bool,
    error: &'static str,
    pub tool: &'static str,
}

pub const CLAUDE: Agent = Agent {
    name: "claude",
    before: "PreToolUse",
    after: "PostToolUse",
    failed: Some("PostToolUseFailure"),
    session: "session_id",
    takes_edits: true,
    error: "error",
    tool: "Bash",
};

pub const AGENTS: [Agent; 4] = [
    CLAUDE,
    Agent {
        name: "codex",
        failed: None,
        takes_edits: false,
        ..CLAUDE
    },
    Agent {
        name: "cursor",
        before: "preToolUse",
        after: "postToolUse",
        failed: Some("postToolUseFailure"),
        session: "conversation_id",
        error: "error_message",
        tool: "Shell",
        ..CLAUDE
    },
    Agent {
        name: "qwen",
        takes_edits: false,
        tool: "run_shell_command",
        ..CLAUDE
    },
];

impl Agent {
    pub fn call(&self, event: &str, id: &str, input: &Value) -> Value {
        let mut call = json!({
            "hook_event_name": event,
            "transcript_path": "/tmp/t.jsonl",
            "cwd": "/work",
            "tool_name": self.tool,
            "tool_input": input,
            "tool_use_id": id,
        });
        let more = match self.name {
            "claude" => json!({ "session_id": "s-1", "permission_mode": "default" }),
            "codex" => json!({
                "session_id": "s-1", "turn_id": "turn-1", "model": "gpt-5-codex",
                "transcript_path": null, "permission_mode": "default",
            }),
            "cursor" => json!({
                "conversation_id": "s-1", "generation_id": "g-1", "cursor_version": "2.4.0",
                "workspace_roots": ["/work"], "user_email": null,
                "model": "claude-sonnet-4-20250514", "agent_message": "Installing dependencies...",
            }),
            "qwen" => json!({
                "session_id": "s-1", "permission_mode": "yolo", "tool_call_id": "call_1",
                "timestamp": "2026-11-24T12:00:00.000Z",
            }),
            name => panic!("no input of {name}"),
        };
        for (name, value) in more.as_object().unwrap() {
            call[name] = value.clone();
        }
        if event == self.after {
            match self.name {
                "cursor" => call["tool_output"] = json!("{\"exitCode\":0,\"stdout\":\"done\"}"),
                "codex" => call["tool_response"] = json!("done"),
                _ => call["tool_response"] = json!({ "stdout": "done" }),
            }
        }
        call
    }

    fn hook(&self, place: &Place, args: &[&str], input: &Value) -> Ended {
        let command = place.command(&[&["hook", self.name], args].concat());
        run_with_input(command, &input.to_string())
    }

    /// Asks before a tool call, while a reviewer decides.
    fn asked(&self, place: &Place, input: &Value, decision: &[&str]) -> (Ended, String) {
        let hook = self.waiting(place, input);
        let id = decide(place, decision);
        (hook.join().unwrap(), id)
    }

    fn waiting(&self, place: &Place, input: &Value) -> thread::JoinHandle<Ended> {
        let command = place.command(&["hook", self.name]);
        let input = input.to_string();
        thread::spawn(move || run_with_input(command, &input))
    }

    /// The output that lets a call pass, by the agent's documentation.
    fn allowed(&self, reason: &str, input: Option<&Value>) -> Value {
        match self.name {
            "codex" => Value::Null,
            "cursor" => match input {
                None => json!({ "permission": "allow" }),
                Some(input) => json!({ "permission": "allow", "updated_input": input }),
            },
            _ => {
                let mut output = json!({
                    "hookEventName": "PreToolUse",
                    "permissionDecision": "allow",
                    "permissionDecisionReason": reason,
                });
                if let Some(input) = input {
                    output["updatedInput"] = input.clone();
                }
                json!({ "hookSpecificOutput": output })
            }
        }
    }

    /// The output that refuses a call.
    fn denied(&self, reason: &str) -> Value {
        match self.name {
            "cursor" => json!({
                "permission": "deny", "user_message": reason, "agent_message": reason,
            }),
            _ => json!({ "hookSpecificOutput": {
                "hookEventName": "PreToolUse",
                "permissionDecision": "deny",
                "permissionDecisionReason": reason,
            }}),
        }
    }
}

/// Decides on what is pending, once there is something.
fn decide(place: &Place, args: &[&str]) -> String {
    let (id, digest) = pending(place);
    place
        .run(&[&[args[0], "--id", &id, "--digest", &digest], &args[1..]].concat())
        .expect(0);
    id
}

fn pending(place: &Place) -> (String, String) {
    for _ in 0..600 {
        let pending = place.json(&["list", "--status", "pending"]);
        if let Some(action) = pending["actions"].get(0) {
            let text = |name: &str| action[name].as_str().unwrap().to_owned();
            return (text("request_id"), text("digest"));
        }
    }
    panic!("nothing is pending");
}

/// What the agent reads. Nothing is `null`.
fn output(ended: &Ended) -> Value {
    if ended.stdout.is_empty() {
        return Value::Null;
    }
    serde_json::from_str(&ended.stdout).unwrap()
}

#[test]
fn the_help_names_the_agents() {
    let help = run(crate::binary::aegis(&["hook", "--help"])).expect(0);
    for name in ["Claude Code", "Codex", "Cursor", "Qwen Code"] {
        assert!(help.stdout.contains(name), "{name}: {help:?}");
    }
}

/// The settings of the manual are JSON, and name each agent's command and every event of it.
#[test]
fn the_manual_has_the_settings_of_each_agent() {
    let page = include_str!("../../src/manual/agents.md");
    let blocks = page.split("```json\n").skip(1);
    let blocks: Vec<_> = blocks
        .map(|block| block.split("```").next().unwrap())
        .collect();
    for agent in AGENTS {
        let command = format!("aegis hook {}", agent.name);
        let mut of_agent = blocks.iter().filter(|block| block.contains(&command));
        let settings: Value = serde_json::from_str(of_agent.next().unwrap()).unwrap();
        assert!(of_agent.next().is_none(), "{command}");
        let events = settings["hooks"].as_object().unwrap();
        let mut expected = vec![agent.before, agent.after];
        expected.extend(agent.failed);
        assert_eq!(events.len(), expected.len(), "{command}");
        for event in expected {
            let hook = &events[event][0];
            let hook = hook.get("hooks").map_or(hook, |hooks| &hooks[0]);
            assert_eq!(hook["command"], command, "{event}");
        }
    }
}

#[test]
fn an_approved_tool_call_passes_once_and_its_outcome_is_on_record() {
    for agent in AGENTS {
        let place = Place::new();
        let input = json!({ "command": "rm -r build", "timeout": 5 });
        let before = agent.call(agent.before, "toolu_1", &input);
        let (passed, id) = agent.asked(&place, &before, &["approve", "--comment", "fine"]);
        let allowed = agent.allowed("approved by anonymous: fine", None);
        assert_eq!(output(&passed.expect(0)), allowed, "{agent:?}");
        let shown = place.json(&["show", &id]);
        assert_eq!(shown["title"], format!("{}: rm -r build", agent.tool));
        assert_eq!(shown["thread_id"], "s-1");
        assert_eq!(shown["execution"], "claimed");
        // One approval passes one call.
        let again = agent.hook(&place, &[], &before).expect(2);
        assert!(
            again.stderr.contains("claimed for this tool call before"),
            "{again:?}"
        );
        let after = agent.hook(&place, &[], &agent.call(agent.after, "toolu_1", &input));
        assert_eq!(after.expect(0).stdout, "", "{agent:?}");
        assert_eq!(place.json(&["show", &id])["execution"], "completed");
        agent.hook(&place, &[], &before).expect(2);
    }
}

#[test]
fn two_tool_calls_of_one_id_never_share_an_approval() {
    for agent in AGENTS {
        let place = Place::new();
        let input = json!({ "command": "make" });
        let before = agent.call(agent.before, "call_0", &input);
        let hooks = [(); 2].map(|()| agent.waiting(&place, &before));
        decide(&place, &["approve"]);
        let codes = hooks.map(|hook| hook.join().unwrap().code());
        assert!(codes == [0, 2] || codes == [2, 0], "{agent:?}: {codes:?}");
        let other = agent.call(agent.before, "call_0", &json!({ "command": "make clean" }));
        let other = agent.hook(&place, &["--for", "5"], &other).expect(2);
        assert_eq!(other.stdout, "", "{agent:?}");
    }
}

#[test]
fn agents_do_not_share_an_approval() {
    let place = Place::new();
    let input = json!({ "command": "make" });
    let [claude, codex, ..] = AGENTS;
    let before = claude.call(claude.before, "call_0", &input);
    let (passed, _) = claude.asked(&place, &before, &["approve"]);
    passed.expect(0);
    let before = codex.call(codex.before, "call_0", &input);
    let late = codex.hook(&place, &["--for", "0.3"], &before).expect(2);
    assert!(late.stderr.contains("nobody has decided"), "{late:?}");
}

#[test]
fn a_tool_call_that_failed_is_for_a_person_again() {
    for agent in AGENTS {
        let Some(event) = agent.failed else { continue };
        let place = Place::new();
        let input = json!({ "command": "false" });
        let before = agent.call(agent.before, "toolu_1", &input);
        let (passed, id) = agent.asked(&place, &before, &["approve"]);
        passed.expect(0);
        let mut failed = agent.call(event, "toolu_1", &input);
        failed[agent.error] = json!("exit code 1");
        agent.hook(&place, &[], &failed).expect(0);
        let shown = place.json(&["show", &id]);
        assert_eq!(
            (&shown["status"], &shown["reason"]),
            (&json!("FAILED"), &json!("exit code 1")),
            "{agent:?}"
        );
    }
}

#[test]
fn an_outcome_with_a_large_output_is_on_record() {
    let (place, agent) = (Place::new(), CLAUDE);
    let input = json!({ "command": "cat" });
    let before = agent.call(agent.before, "toolu_1", &input);
    let (passed, id) = agent.asked(&place, &before, &["approve"]);
    passed.expect(0);
    let mut after = agent.call(agent.after, "toolu_1", &input);
    after["tool_response"] = json!("x".repeat(3 << 20));
    agent.hook(&place, &[], &after).expect(0);
    assert_eq!(place.json(&["show", &id])["execution"], "completed");
}

#[test]
fn a_failure_that_is_told_in_half_a_character_is_on_record() {
    for agent in AGENTS {
        let Some(event) = agent.failed else { continue };
        let place = Place::new();
        let input = json!({ "command": "cat" });
        let before = agent.call(agent.before, "toolu_1", &input);
        let (passed, id) = agent.asked(&place, &before, &["approve"]);
        passed.expect(0);
        let mut failed = agent.call(event, "toolu_1", &input);
        failed[agent.error] = json!("no file HALF");
        let text = failed.to_string().replace("HALF", "\\udc80");
        run_with_input(place.command(&["hook", agent.name]), &text).expect(0);
        let shown = place.json(&["show", &id]);
        assert_eq!(shown["reason"], "\"no file \\udc80\"", "{shown}");
    }
}

#[test]
fn an_edited_tool_call_passes_as_it_was_edited() {
    for agent in AGENTS.into_iter().filter(|agent| agent.takes_edits) {
        let place = Place::new();
        let input = json!({ "command": "rm -r build" });
        let before = agent.call(agent.before, "toolu_1", &json!({ "command": "rm -r /" }));
        let edit = json!({ "tool": agent.tool, "input": input, "cwd": "/work" }).to_string();
        let (passed, id) = agent.asked(&place, &before, &["approve", "--edit", &edit]);
        let allowed = agent.allowed("approved by anonymous", Some(&input));
        assert_eq!(output(&passed.expect(0)), allowed, "{agent:?}");
        agent
            .hook(&place, &[], &agent.call(agent.after, "toolu_1", &input))
            .expect(0);
        let shown = place.json(&["show", &id]);
        assert_eq!(shown["execution"], "completed", "{shown}");
    }
}

#[test]
fn an_edit_of_anything_but_the_input_blocks_the_call() {
    for agent in AGENTS.into_iter().filter(|agent| agent.takes_edits) {
        let place = Place::new();
        let command = json!({ "command": "ls" });
        let sound = json!({ "tool": agent.tool, "input": command, "cwd": "/work" });
        for (number, (member, value)) in [
            ("tool", Some(json!("Other"))),
            ("cwd", Some(json!("/staging"))),
            ("cwd", Some(Value::Null)),
            ("cwd", None),
            ("dry_run", Some(json!(true))),
            ("input", Some(json!("ls"))),
            ("input", None),
        ]
        .into_iter()
        .enumerate()
        {
            let mut edit = sound.clone();
            match &value {
                Some(value) => edit[member] = value.clone(),
                None => drop(edit.as_object_mut().unwrap().remove(member)),
            }
            let before = agent.call(agent.before, &format!("toolu_{number}"), &command);
            let edit = edit.to_string();
            let (blocked, _) = agent.asked(&place, &before, &["approve", "--edit", &edit]);
            let blocked = blocked.expect(2);
            assert_eq!(blocked.stdout, "");
            let named = format!("'{member}'");
            assert!(blocked.stderr.contains(&named), "{edit}: {blocked:?}");
        }
    }
}

#[test]
fn the_call_of_an_agent_that_takes_no_edits_cannot_be_edited() {
    for agent in AGENTS.into_iter().filter(|agent| !agent.takes_edits) {
        let place = Place::new();
        let before = agent.call(agent.before, "toolu_1", &json!({ "command": "rm -r /" }));
        let hook = agent.waiting(&place, &before);
        let (id, digest) = pending(&place);
        let edit = json!({ "tool": agent.tool, "input": { "command": "ls" } }).to_string();
        let refused = place.run(&["approve", "--id", &id, "--digest", &digest, "--edit", &edit]);
        refused.expect(3);
        place
            .run(&["reject", "--id", &id, "--digest", &digest])
            .expect(0);
        let denied = agent.denied("rejected by anonymous");
        assert_eq!(output(&hook.join().unwrap().expect(0)), denied, "{agent:?}");
    }
}

#[test]
fn a_tool_call_that_nobody_approves_does_not_pass() {
    for agent in AGENTS {
        let place = Place::new();
        let input = json!({ "command": "ls" });
        let before = agent.call(agent.before, "toolu_1", &input);
        let (rejected, _) = agent.asked(&place, &before, &["reject", "--comment", "no"]);
        let denied = agent.denied("rejected by anonymous: no");
        assert_eq!(output(&rejected.expect(0)), denied, "{agent:?}");
        let late = agent.call(agent.before, "toolu_2", &input);
        let late = agent.hook(&place, &["--for", "0.3"], &late);
        assert!(late.expect(2).stderr.contains("nobody has decided"));
        let mut nameless = before.clone();
        nameless.as_object_mut().unwrap().remove("tool_use_id");
        let mut empty = before.clone();
        empty["tool_use_id"] = json!("");
        let mut stop = before.clone();
        stop["hook_event_name"] = json!("Stop");
        for input in [json!({}), json!([]), nameless, empty, stop] {
            agent.hook(&place, &[], &input).expect(2);
        }
        run_with_input(place.command(&["hook", agent.name]), "no JSON").expect(2);
        let mut nowhere = place.command(&["hook", agent.name, "--retries", "0"]);
        nowhere.env("AEGIS_URL", "http://127.0.0.1:1");
        run_with_input(nowhere, &before.to_string()).expect(2);
        let mut nobody = place.command(&["hook", agent.name]);
        nobody.env_remove("AEGIS_TENANT");
        run_with_input(nobody, &before.to_string()).expect(2);
    }
}

#[test]
fn the_input_of_another_agent_blocks_the_call() {
    let place = Place::new();
    let [claude, _, cursor, _] = AGENTS;
    let input = json!({ "command": "ls" });
    for (agent, other) in [(claude, cursor), (cursor, claude)] {
        let before = other.call(other.before, "toolu_1", &input);
        assert_eq!(agent.hook(&place, &[], &before).expect(2).stdout, "");
    }
}

#[test]
fn a_hook_after_the_call_never_ends_as_one_that_blocks() {
    for agent in AGENTS {
        let place = Place::new();
        let after = agent.call(agent.after, "toolu_1", &json!({ "command": "ls" }));
        // Nothing was claimed for this call.
        agent.hook(&place, &[], &after).expect(1);
        let mut nobody = place.command(&["hook", agent.name]);
        nobody.env_remove("AEGIS_TENANT");
        run_with_input(nobody, &after.to_string()).expect(1);
    }
}
