//! `aegis hook`: a gate before the tool calls of coding agents.

use std::io::{self, Read};
use std::thread;
use std::time::{Duration, SystemTime};

use aegis_hitl::client::Claimed;
use aegis_hitl::protocol::{Closed, Digest};
use aegis_hitl::{Action, AegisService, Decision, IdempotencyKey, Payload, RequestId, ThreadId};
use clap::{Args, Subcommand};
use serde::Serialize;
use serde_json::value::RawValue;
use serde_json::{Map, Value};
use sha2::Digest as _;
use tokio::sync::oneshot;
use tokio::time::Instant;
use uuid::Uuid;

use super::Context;
use crate::agent::{Agent, Answer, CLAUDE, CODEX, CURSOR, Moment, QWEN, ToolCall};
use crate::args::seconds;
use crate::connect::Connect;
use crate::failure::Failure;
use crate::print::print_json;
use crate::signals::Endings;

/// What every agent here reads as "the call is blocked". Any other code but 0 lets the call pass.
///
/// It cannot be part of an agent's description: a panic blocks before the agent is known.
const BLOCKED: u8 = 2;

/// How long an action outlives the hook that waits for it. Nobody is to approve what no hook waits for.
const MARGIN: Duration = Duration::from_secs(2);

/// How long the claim may take after the decision.
const CLAIM_WITHIN: Duration = Duration::from_secs(10);

/// The largest input, in bytes. That after a call has all that the tool gave.
const MAX_INPUT: usize = 16 << 20;

/// The largest input before a call, in bytes.
const MAX_CALL: usize = 1 << 20;

/// The most characters of a title.
const MAX_TITLE: usize = 200;

/// The most characters of a reason.
const MAX_REASON: usize = 2000;

#[derive(Debug, Subcommand)]
pub(crate) enum Hook {
    /// For Claude Code: as a hook on PreToolUse, PostToolUse and PostToolUseFailure.
    Claude(Settings),
    /// For Codex: as a hook on PreToolUse and PostToolUse. The payload cannot be edited.
    Codex(Settings),
    /// For Cursor: as a hook on preToolUse, postToolUse and postToolUseFailure.
    Cursor(Settings),
    /// For Qwen Code: as a hook on PreToolUse, PostToolUse and PostToolUseFailure. The payload
    /// cannot be edited.
    Qwen(Settings),
}

#[derive(Debug, Args)]
pub(crate) struct Settings {
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

/// A tool call, and the agent that makes it.
#[derive(Debug)]
struct Gated {
    agent: &'static Agent,
    call: ToolCall,
}

pub(crate) async fn run(command: Hook, context: Context) -> Result<(), Failure> {
    let (agent, args) = match command {
        Hook::Claude(args) => (&CLAUDE, args),
        Hook::Codex(args) => (&CODEX, args),
        Hook::Cursor(args) => (&CURSOR, args),
        Hook::Qwen(args) => (&QWEN, args),
    };
    let mut endings = Endings::new().map_err(Failure::blocks)?;
    tokio::select! {
        ended = gate(agent, args, context) => ended,
        // A process that a signal ends lets the call pass.
        () = endings.next() => Err(Failure::blocked("it was told to end before it was done")),
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

async fn gate(agent: &'static Agent, args: Settings, context: Context) -> Result<(), Failure> {
    let input = input().await?;
    let call = agent.read(&input).map_err(|error| {
        Failure::blocked("standard input is not the JSON of a tool hook").because(error)
    })?;
    let moment = agent.moment(&call).ok_or_else(|| {
        let (events, event) = (agent.events(), call.event());
        Failure::blocked(format!("the hook is for {events}, not for '{event}'"))
    })?;
    if call.id.is_empty() {
        return Err(Failure::blocked("the tool call has an empty id"));
    }
    let call = Gated { agent, call };
    match moment {
        Moment::Before if input.len() > MAX_CALL => Err(Failure::blocked(
            "standard input is longer than a tool call may be, which is 1 MiB",
        )),
        Moment::Before => before(args, &call, context).await,
        // The call has run. The code that blocks would hide its result from the agent.
        Moment::After(outcome) => after(args, &call, outcome, context)
            .await
            .map_err(|failure| Failure::other(failure.message())),
    }
}

/// Reads standard input on a thread of its own, which the end of the process does not wait for.
async fn input() -> Result<String, Failure> {
    let unread = || Failure::blocked("cannot read standard input");
    let (sender, read) = oneshot::channel();
    thread::Builder::new()
        .spawn(move || {
            let mut input = Vec::new();
            let mut stdin = io::stdin().take(MAX_INPUT as u64 + 1);
            let read = stdin.read_to_end(&mut input);
            drop(sender.send(read.map(|_| input)));
        })
        .map_err(|error| unread().because(error))?;
    let read = read.await.map_err(|error| unread().because(error))?;
    let input = read.map_err(|error| unread().because(error))?;
    if input.len() > MAX_INPUT {
        return Err(Failure::blocked("standard input has more than 16 MiB"));
    }
    String::from_utf8(input).map_err(|error| unread().because(error.utf8_error()))
}

/// What a person approves.
#[derive(Serialize)]
struct Shown<'a> {
    tool: &'a str,
    input: &'a RawValue,
    cwd: Option<&'a str>,
}

impl Gated {
    /// 16 bytes that stand for this tool call of this session of this agent.
    ///
    /// If an agent gives two calls one id, at most one passes. Another payload under the same key
    /// is refused, and the claim of an equal one is a replay, which blocks the call.
    fn digest(&self, purpose: &str) -> Uuid {
        let mut hash = sha2::Sha256::new();
        for text in [self.agent.name, purpose, &self.call.session, &self.call.id] {
            hash.update((text.len() as u64).to_be_bytes());
            hash.update(text);
        }
        let mut bytes = [0; 16];
        bytes.copy_from_slice(&hash.finalize()[..16]);
        uuid::Builder::from_custom_bytes(bytes).into_uuid()
    }

    fn key(&self) -> Result<IdempotencyKey, Failure> {
        let key = format!("{}-{}", self.agent.name, self.digest("key").simple());
        IdempotencyKey::new(key).map_err(|error| Failure::blocked("the key").because(error))
    }

    /// The id of the claim's call. With it the hook after the tool call gets the token again, which
    /// is kept nowhere else.
    fn claim_call(&self) -> RequestId {
        RequestId::from(self.digest("claim"))
    }

    fn thread(&self) -> Result<ThreadId, Failure> {
        ThreadId::new(&*self.call.session)
            .map_err(|error| Failure::blocked("the session id").because(error))
    }

    fn payload(&self) -> Result<Payload, Failure> {
        Payload::new(&Shown {
            tool: &self.call.tool,
            input: &self.call.input,
            cwd: self.call.cwd.as_deref(),
        })
        .map_err(|error| Failure::blocked("the tool call").because(error))
    }

    /// The tool, and the first of its arguments that says most.
    fn title(&self) -> String {
        let input: Value = serde_json::from_str(self.call.input.get()).unwrap_or_default();
        let telling = ["command", "file_path", "url", "pattern", "prompt"]
            .iter()
            .find_map(|name| input.get(name)?.as_str());
        let title = match telling {
            Some(text) => format!("{}: {text}", self.call.tool),
            None => self.call.tool.clone(),
        };
        title.chars().take(MAX_TITLE).collect()
    }

    async fn submit(
        &self,
        service: &AegisService,
        payload: &Payload,
        limit: Duration,
    ) -> Result<Action, Failure> {
        service
            .submit(self.key()?)
            .thread_id(self.thread()?)
            .payload(payload)
            .title(self.title())
            .expires_at(SystemTime::now() + limit + MARGIN)
            .allow_edit(self.agent.takes_edits)
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
async fn before(args: Settings, call: &Gated, context: Context) -> Result<(), Failure> {
    let payload = call.payload()?;
    // Without a digest nothing tells what was approved from what runs.
    let digest = Digest::of(&payload);
    let digest = digest.map_err(|error| Failure::blocked("the tool call").because(error))?;
    let limit = args.limit;
    let until = Instant::now() + limit;
    let service = args.connect.service(&context.config.client);
    let service = service.map_err(Failure::blocks)?;
    let action = call.submit(&service, &payload, limit).await?;
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
    match decided.decision {
        Some(Decision::Approve) => {}
        Some(Decision::Reject) => {
            let reason = match decided.closed {
                Some(Closed::Expired) => "nobody decided in time".to_owned(),
                Some(Closed::Cancelled) => "the action was cancelled".to_owned(),
                _ => format!("rejected by {by}{comment}"),
            };
            return answer(call.agent, Answer::Deny { reason: &reason });
        }
        None => return Err(undecided()),
    }
    let claimed = call.claim(&service, &decided, args.lease).await;
    let claimed = claimed.map_err(Failure::blocking)?;
    // The claim's own retry. Most likely a hook has been here before, and the call may have passed.
    // It may also be this one, whose first answer was lost: the id of the claim cannot tell, as the
    // hook after the call derives it too.
    if claimed.action.replayed {
        return Err(Failure::blocked(format!(
            "the approval of {id} was claimed for this tool call before, or the answer to the claim \
             was lost; a person decides again when the lease ends"
        )));
    }
    let edited = claimed.action.edited_payload.as_ref();
    let input = match edited {
        None => None,
        // The server takes no edit of such an action. If it did, the original must not run.
        Some(_) if !call.agent.takes_edits => {
            return Err(Failure::blocked(format!(
                "the payload of {id} was edited, and {} cannot run an edited tool call",
                call.agent.name
            )));
        }
        Some(edited) => Some(edited_input(&payload, edited)?),
    };
    // What passes is what was approved: the digest of the claim is of this very payload.
    let passes = match edited {
        Some(edited) => Digest::of(edited)
            .map_err(|error| Failure::blocked("the edited payload").because(error))?,
        None => digest,
    };
    if claimed.action.digest != Some(passes) {
        return Err(Failure::blocked(format!(
            "what was approved as {id} is not this tool call"
        )));
    }
    let reason = format!("approved by {by}{comment}");
    let reason = reason.as_str();
    answer(call.agent, Answer::Allow { reason, input })
}

/// The tool's input as the reviewer edited it. The agent takes no other change, so a change of
/// anything else would be lost.
fn edited_input(submitted: &Payload, edited: &Payload) -> Result<Value, Failure> {
    let members = |payload: &Payload| {
        let members = payload.parse::<Map<String, Value>>();
        members.map_err(|error| Failure::blocked("the edited payload").because(error))
    };
    let (mut submitted, mut edited) = (members(submitted)?, members(edited)?);
    submitted.remove("input");
    let Some(input @ Value::Object(_)) = edited.remove("input") else {
        return Err(Failure::blocked(
            "the edited payload has no JSON object as 'input'",
        ));
    };
    let mut names = submitted.keys().chain(edited.keys());
    match names.find(|name| submitted.get(*name) != edited.get(*name)) {
        None => Ok(input),
        Some(name) => Err(Failure::blocked(format!(
            "the edited payload has another '{name}'; only 'input' can be edited"
        ))),
    }
}

fn answer(agent: &Agent, answer: Answer<'_>) -> Result<(), Failure> {
    match agent.answer(answer) {
        Some(output) => print_json(&output).map_err(Failure::blocks),
        None => Ok(()),
    }
}

/// After the tool call: reports its outcome.
async fn after(
    args: Settings,
    call: &Gated,
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
