//! `aegis hook`: a gate before the tool calls of coding agents.

use std::io::{self, Read};
use std::thread;
use std::time::{Duration, SystemTime};

use aegis_hitl::client::Claimed;
use aegis_hitl::protocol::{Closed, Digest};
use aegis_hitl::{Action, AegisService, Decision, IdempotencyKey, Payload, RequestId, ThreadId};
use clap::{Args, Subcommand};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use serde_json::{Value, json};
use sha2::Digest as _;
use tokio::sync::oneshot;
use tokio::time::Instant;
use uuid::Uuid;

use super::Context;
use crate::args::seconds;
use crate::connect::Connect;
use crate::failure::Failure;
use crate::print::print_json;
use crate::signals::Signals;

/// What the agent reads as "the call is blocked". Any other code but 0 lets the call pass.
const BLOCKED: u8 = 2;

/// How long an action outlives the hook that waits for it. Nobody is to approve what no hook waits for.
const MARGIN: Duration = Duration::from_secs(2);

/// How long the claim may take after the decision.
const CLAIM_WITHIN: Duration = Duration::from_secs(10);

/// The most characters of a title.
const MAX_TITLE: usize = 200;

/// The most characters of a reason.
const MAX_REASON: usize = 2000;

#[derive(Debug, Subcommand)]
pub(crate) enum Hook {
    /// For Claude Code: as a hook on PreToolUse, PostToolUse and PostToolUseFailure.
    ///
    /// Reads the hook's JSON from standard input. Before a tool call it submits an action, waits
    /// for the decision, claims the approval, and answers with the permission. After the call it
    /// reports the outcome. Whatever goes wrong before the call blocks it (exit code 2).
    Claude(Claude),
}

#[derive(Debug, Args)]
pub(crate) struct Claude {
    /// How long to wait for a decision, in seconds. The hook ends at most 10 seconds later, and must
    /// do so before its own timeout.
    #[arg(long = "for", value_name = "SECONDS", default_value = "540", value_parser = seconds)]
    pub(crate) limit: Duration,

    /// How long the tool call may take, in whole seconds. After that its outcome is unknown, and a
    /// person decides.
    #[arg(long, value_name = "SECONDS", default_value = "3600", value_parser = seconds)]
    pub(crate) lease: Duration,

    #[command(flatten)]
    pub(crate) connect: Connect,
}

/// What the agent says of a tool call, as far as it is used.
#[derive(Debug, Deserialize)]
struct ToolCall {
    session_id: String,
    hook_event_name: String,
    tool_name: String,
    tool_input: Box<RawValue>,
    tool_use_id: String,
    #[serde(default)]
    cwd: Option<String>,
    #[serde(default)]
    error: Option<Box<RawValue>>,
}

pub(crate) async fn run(command: Hook, context: Context) -> Result<(), Failure> {
    let Hook::Claude(args) = command;
    let mut signals = Signals::new().map_err(Failure::blocks)?;
    tokio::select! {
        ended = gate(args, context) => ended,
        // A process that a signal ends lets the call pass.
        _ = signals.next() => Err(Failure::blocked("it was told to end before it was done")),
    }
}

/// Makes a panic, on any thread, block the tool call: the exit code would let it pass otherwise.
pub(crate) fn block_on_panic() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        report(panic);
        std::process::exit(i32::from(BLOCKED));
    }));
}

async fn gate(args: Claude, context: Context) -> Result<(), Failure> {
    let input = input().await?;
    let call = serde_json::from_str::<ToolCall>(&input).map_err(|error| {
        Failure::blocked("standard input is not the JSON of a tool hook").because(error)
    })?;
    match call.hook_event_name.as_str() {
        "PreToolUse" => before(args, &call, context).await,
        "PostToolUse" => after(args, &call, Ok(()), context).await,
        "PostToolUseFailure" => {
            // A text that is no string, or holds half a character, is told as it came.
            let error = call.error.as_ref().map(|error| {
                let text = serde_json::from_str::<String>(error.get());
                text.unwrap_or_else(|_| error.get().to_owned())
            });
            let error = error.unwrap_or_else(|| "the tool call failed".to_owned());
            after(args, &call, Err(error), context).await
        }
        other => Err(Failure::blocked(format!(
            "the hook is for PreToolUse, PostToolUse and PostToolUseFailure, not for '{other}'"
        ))),
    }
}

/// Reads standard input on a thread of its own, which the end of the process does not wait for.
async fn input() -> Result<String, Failure> {
    let unread = || Failure::blocked("cannot read standard input");
    let (sender, read) = oneshot::channel();
    thread::Builder::new()
        .spawn(move || {
            let mut input = String::new();
            let read = io::stdin().read_to_string(&mut input);
            drop(sender.send(read.map(|_| input)));
        })
        .map_err(|error| unread().because(error))?;
    let read = read.await.map_err(|error| unread().because(error))?;
    read.map_err(|error| unread().because(error))
}

/// What a person approves.
#[derive(Serialize)]
struct Shown<'a> {
    tool: &'a str,
    input: &'a RawValue,
    cwd: Option<&'a str>,
}

impl ToolCall {
    /// 16 bytes that stand for this tool call of this session.
    fn digest(&self, purpose: &str) -> Uuid {
        let mut hash = sha2::Sha256::new();
        for text in [purpose, &self.session_id, &self.tool_use_id] {
            hash.update((text.len() as u64).to_be_bytes());
            hash.update(text);
        }
        let mut bytes = [0; 16];
        bytes.copy_from_slice(&hash.finalize()[..16]);
        uuid::Builder::from_custom_bytes(bytes).into_uuid()
    }

    fn key(&self) -> Result<IdempotencyKey, Failure> {
        let key = format!("claude-{}", self.digest("key").simple());
        IdempotencyKey::new(key).map_err(|error| Failure::blocked("the key").because(error))
    }

    /// The id of the claim's call. With it the hook after the tool call gets the token again, which
    /// is kept nowhere else.
    fn claim_call(&self) -> RequestId {
        RequestId::from(self.digest("claim"))
    }

    fn thread(&self) -> Result<ThreadId, Failure> {
        ThreadId::new(&*self.session_id)
            .map_err(|error| Failure::blocked("the session id").because(error))
    }

    fn payload(&self) -> Result<Payload, Failure> {
        Payload::new(&Shown {
            tool: &self.tool_name,
            input: &self.tool_input,
            cwd: self.cwd.as_deref(),
        })
        .map_err(|error| Failure::blocked("the tool call").because(error))
    }

    /// The tool, and the first of its arguments that says most.
    fn title(&self) -> String {
        let input: Value = serde_json::from_str(self.tool_input.get()).unwrap_or_default();
        let telling = ["command", "file_path", "url", "pattern", "prompt"]
            .iter()
            .find_map(|name| input.get(name)?.as_str());
        let title = match telling {
            Some(text) => format!("{}: {text}", self.tool_name),
            None => self.tool_name.clone(),
        };
        title.chars().take(MAX_TITLE).collect()
    }

    async fn submit(&self, service: &AegisService, limit: Duration) -> Result<Action, Failure> {
        service
            .submit(self.key()?)
            .thread_id(self.thread()?)
            .payload(&self.payload()?)
            .title(self.title())
            .expires_at(SystemTime::now() + limit + MARGIN)
            .allow_edit(true)
            .deadline(limit)
            .await
            .map_err(Failure::blocking)
    }

    async fn claim(
        &self,
        service: &AegisService,
        action: &Action,
        lease: Duration,
    ) -> Result<Claimed, aegis_hitl::Error> {
        service
            .claim(&action.request_id)
            .digest(action.digest)
            .lease(lease)
            .call_id(self.claim_call())
            .deadline(CLAIM_WITHIN)
            .await
    }
}

/// Before the tool call: lets it pass once, if it is approved.
async fn before(args: Claude, call: &ToolCall, context: Context) -> Result<(), Failure> {
    let limit = args.limit;
    let until = Instant::now() + limit;
    let service = args.connect.service(&context.config.client);
    let service = service.map_err(Failure::blocks)?;
    let action = call.submit(&service, limit).await?;
    let left = until.saturating_duration_since(Instant::now());
    let wait = service.wait_for_decision(&action.request_id, left);
    let waited = tokio::time::timeout_at(until, wait).await;
    let id = &action.request_id;
    let undecided = || Failure::blocked(format!("nobody has decided on {id} yet; try again later"));
    let decided = match waited {
        Ok(Ok(decided)) => decided,
        Ok(Err(error)) if !error.is_timeout() => return Err(Failure::blocking(error)),
        _ => return Err(undecided()),
    };
    let by = decided.decided_by.clone();
    let by = by.unwrap_or_else(|| "a reviewer".to_owned());
    let comment = decided.comment.clone().map(|text| format!(": {text}"));
    let comment = comment.unwrap_or_default();
    if decided.decision != Some(Decision::Approve) {
        let reason = match decided.closed {
            Some(Closed::Expired) => "nobody decided in time".to_owned(),
            Some(Closed::Cancelled) => "the action was cancelled".to_owned(),
            _ => format!("rejected by {by}{comment}"),
        };
        return answer("deny", &reason, None);
    }
    let claimed = call.claim(&service, &decided, args.lease).await;
    let claimed = claimed.map_err(Failure::blocking)?;
    // The claim's own retry: this hook has been here before, and the call may have passed.
    if claimed.action.replayed {
        return Err(Failure::blocked(format!(
            "the approval of {id} was claimed for this tool call before"
        )));
    }
    let edited = claimed.action.edited_payload.as_ref();
    let input = match edited {
        None => None,
        Some(edited) => Some(edited_input(call, edited)?),
    };
    // What passes is what was approved: the digest of the claim is of this very payload.
    let passes = match edited {
        Some(edited) => Digest::of(edited),
        None => Digest::of(&call.payload()?),
    };
    if passes.ok() != claimed.action.digest {
        return Err(Failure::blocked(format!(
            "what was approved as {id} is not this tool call"
        )));
    }
    answer("allow", &format!("approved by {by}{comment}"), input)
}

/// The tool's input as the reviewer edited it. The tool itself stays.
fn edited_input(call: &ToolCall, edited: &Payload) -> Result<Value, Failure> {
    let refused = || Failure::blocked("the edited payload is not that of the same tool");
    let edited: Value = edited.parse().map_err(|_| refused())?;
    if edited.get("tool").and_then(Value::as_str) != Some(&*call.tool_name) {
        return Err(refused());
    }
    match edited.get("input") {
        Some(input @ Value::Object(_)) => Ok(input.clone()),
        _ => Err(refused()),
    }
}

fn answer(permission: &str, reason: &str, input: Option<Value>) -> Result<(), Failure> {
    let mut output = json!({
        "hookEventName": "PreToolUse",
        "permissionDecision": permission,
        "permissionDecisionReason": reason,
    });
    if let (Some(input), Some(members)) = (input, output.as_object_mut()) {
        members.insert("updatedInput".to_owned(), input);
    }
    print_json(&json!({ "hookSpecificOutput": output })).map_err(Failure::blocks)
}

/// After the tool call: reports its outcome. It has run, so nothing is blocked any more: what goes
/// wrong here has another exit code.
async fn after(
    args: Claude,
    call: &ToolCall,
    outcome: Result<(), String>,
    context: Context,
) -> Result<(), Failure> {
    let service = args.connect.service(&context.config.client)?;
    // The claim's call names the action. Submitting again would make a new one where there is none.
    let action = service.status(call.claim_call()).await?;
    let claimed = call.claim(&service, &action, args.lease).await?;
    let (id, token) = (&action.request_id, &claimed.claim.token);
    match outcome {
        Ok(()) => service.complete(id, token).await?,
        Err(error) => {
            let reason: String = error.chars().take(MAX_REASON).collect();
            service.fail(id, token).reason(reason).await?
        }
    };
    Ok(())
}

impl Failure {
    fn blocked(message: impl Into<String>) -> Self {
        Self::with_code(BLOCKED, message)
    }

    fn blocking(error: aegis_hitl::Error) -> Self {
        Self::from(error).blocks()
    }

    /// The same failure, which blocks the tool call.
    pub(crate) fn blocks(self) -> Self {
        Self::with_code(BLOCKED, self.message())
    }
}
