//! Coding agents: how each describes a tool call to its hooks, and how it reads the answer.

use serde::Deserialize;
use serde::de::Error as _;
use serde_json::value::RawValue;
use serde_json::{Value, json};

/// A coding agent whose hooks are documented.
///
/// All of these read exit code 2 of the hook before a tool call, with a reason on stderr, as "the
/// call is blocked". On code 0 the output decides, and on any other the call passes. All name each
/// tool call by an id, which the hook after the call gets again. An agent without such an id is not
/// supported: two equal calls could not be told apart, and one approval would stand for both.
#[derive(Debug)]
pub(crate) struct Agent {
    /// The name on the command line. It is part of the keys.
    pub(crate) name: &'static str,
    before: &'static str,
    succeeded: &'static str,
    failed: Option<&'static str>,
    /// Whether the agent runs the input of the answer in place of its own.
    pub(crate) takes_edits: bool,
    read: fn(&str) -> serde_json::Result<ToolCall>,
    answer: fn(Answer<'_>) -> Option<Value>,
}

/// "Hooks reference" of Claude Code's documentation.
pub(crate) const CLAUDE: Agent = Agent {
    name: "claude",
    before: "PreToolUse",
    succeeded: "PostToolUse",
    failed: Some("PostToolUseFailure"),
    takes_edits: true,
    read: read_claude,
    answer: answer_claude,
};

/// "Hooks" of Codex's documentation, and `codex-rs/hooks` in openai/codex.
///
/// Codex up to 0.130 runs the original call if the answer has an `updatedInput`. The input does not
/// tell the version, so no edit is ever answered.
pub(crate) const CODEX: Agent = Agent {
    name: "codex",
    before: "PreToolUse",
    succeeded: "PostToolUse",
    failed: None,
    takes_edits: false,
    read: read_claude,
    answer: answer_codex,
};

/// "Hooks" of Cursor's documentation.
pub(crate) const CURSOR: Agent = Agent {
    name: "cursor",
    before: "preToolUse",
    succeeded: "postToolUse",
    failed: Some("postToolUseFailure"),
    takes_edits: true,
    read: read_cursor,
    answer: answer_cursor,
};

/// "Qwen Code Hooks", `docs/users/features/hooks.md` in QwenLM/qwen-code.
///
/// The page has an `updatedInput`, but `packages/core/src/core/toolHookTriggers.ts` ignores it: the
/// original call runs.
pub(crate) const QWEN: Agent = Agent {
    name: "qwen",
    before: "PreToolUse",
    succeeded: "PostToolUse",
    failed: Some("PostToolUseFailure"),
    takes_edits: false,
    read: read_claude,
    answer: answer_claude,
};

/// What an agent says of a tool call, as far as it is used.
#[derive(Debug)]
pub(crate) struct ToolCall {
    pub(crate) session: String,
    event: String,
    pub(crate) tool: String,
    pub(crate) input: Box<RawValue>,
    pub(crate) id: String,
    pub(crate) cwd: Option<String>,
    error: Option<Box<RawValue>>,
}

/// When the hook runs.
#[derive(Debug)]
pub(crate) enum Moment {
    Before,
    /// After the call, with the error it failed with.
    After(Result<(), String>),
}

/// The answer to a call that is not blocked by the exit code.
#[derive(Debug)]
pub(crate) enum Answer<'a> {
    Deny {
        reason: &'a str,
    },
    /// The call passes, with another input if there is one.
    Allow {
        reason: &'a str,
        input: Option<Value>,
    },
}

impl Agent {
    pub(crate) fn read(&self, input: &str) -> serde_json::Result<ToolCall> {
        (self.read)(input)
    }

    /// Returns what to print on standard output, or `None` to print nothing.
    pub(crate) fn answer(&self, answer: Answer<'_>) -> Option<Value> {
        (self.answer)(answer)
    }

    /// Returns when the hook runs, or `None` if it is not for such an event.
    pub(crate) fn moment(&self, call: &ToolCall) -> Option<Moment> {
        let event = call.event.as_str();
        if event == self.before {
            Some(Moment::Before)
        } else if event == self.succeeded {
            Some(Moment::After(Ok(())))
        } else if Some(event) == self.failed {
            Some(Moment::After(Err(call.error())))
        } else {
            None
        }
    }

    /// Returns the names of the events that the hook is for.
    pub(crate) fn events(&self) -> String {
        let names = [Some(self.before), Some(self.succeeded), self.failed];
        names.into_iter().flatten().collect::<Vec<_>>().join(", ")
    }
}

impl ToolCall {
    pub(crate) fn event(&self) -> &str {
        &self.event
    }

    fn error(&self) -> String {
        // A text that is no string, or holds half a character, is told as it came.
        let error = self.error.as_ref().map(|error| {
            let text = serde_json::from_str::<String>(error.get());
            text.unwrap_or_else(|_| error.get().to_owned())
        });
        error.unwrap_or_else(|| "the tool call failed".to_owned())
    }
}

/// The members of every agent. The session and the error have a name of each agent's own.
#[derive(Deserialize)]
struct Members {
    session_id: Option<String>,
    conversation_id: Option<String>,
    hook_event_name: String,
    tool_name: String,
    tool_input: Box<RawValue>,
    tool_use_id: String,
    cwd: Option<String>,
    error: Option<Box<RawValue>>,
    error_message: Option<Box<RawValue>>,
}

/// Claude Code's names, which Codex and Qwen Code use too.
fn read_claude(input: &str) -> serde_json::Result<ToolCall> {
    read(input, "session_id", |it| {
        (it.session_id.take(), it.error.take())
    })
}

fn read_cursor(input: &str) -> serde_json::Result<ToolCall> {
    read(input, "conversation_id", |it| {
        (it.conversation_id.take(), it.error_message.take())
    })
}

/// Reads a tool call whose session is in the member of that name.
fn read(
    input: &str,
    session: &'static str,
    own: impl FnOnce(&mut Members) -> (Option<String>, Option<Box<RawValue>>),
) -> serde_json::Result<ToolCall> {
    let mut members = serde_json::from_str::<Members>(input)?;
    let (own_session, error) = own(&mut members);
    Ok(ToolCall {
        session: own_session.ok_or_else(|| serde_json::Error::missing_field(session))?,
        event: members.hook_event_name,
        tool: members.tool_name,
        input: members.tool_input,
        id: members.tool_use_id,
        cwd: members.cwd,
        error,
    })
}

fn answer_claude(answer: Answer<'_>) -> Option<Value> {
    let (permission, reason, input) = match answer {
        Answer::Deny { reason } => ("deny", reason, None),
        Answer::Allow { reason, input } => ("allow", reason, input),
    };
    let mut output = json!({
        "hookEventName": "PreToolUse",
        "permissionDecision": permission,
        "permissionDecisionReason": reason,
    });
    if let (Some(input), Some(members)) = (input, output.as_object_mut()) {
        members.insert("updatedInput".to_owned(), input);
    }
    Some(json!({ "hookSpecificOutput": output }))
}

/// To Codex, "allow" without an edit is a failed hook. Printing nothing lets the call pass.
fn answer_codex(answer: Answer<'_>) -> Option<Value> {
    match answer {
        Answer::Deny { .. } => answer_claude(answer),
        Answer::Allow { .. } => None,
    }
}

fn answer_cursor(answer: Answer<'_>) -> Option<Value> {
    Some(match answer {
        Answer::Deny { reason } => json!({
            "permission": "deny",
            "user_message": reason,
            "agent_message": reason,
        }),
        Answer::Allow { input: None, .. } => json!({ "permission": "allow" }),
        Answer::Allow {
            input: Some(input), ..
        } => json!({ "permission": "allow", "updated_input": input }),
    })
}
