//! `aegis approve` and `aegis reject`.

use std::io::{self, IsTerminal};
use std::str::FromStr;

use aegis_hitl::protocol::Digest;
use aegis_hitl::{
    Action, AegisService, Decision, DecisionRequest, IdempotencyKey, Outcome, Receipt, RequestId,
    ThreadId,
};
use clap::Args;
use serde_json::json;
use tower_service::Service;

use super::Context;
use crate::config;
use crate::connect::Connect;
use crate::failure::Failure;
use crate::input::payload_of;
use crate::print::{print, print_json, say};
use crate::view;

#[derive(Debug, Args)]
pub(crate) struct Decide {
    /// The idempotency key. In its place --id names an action that was submitted.
    #[arg(required_unless_present = "id", conflicts_with = "id")]
    pub(crate) key: Option<IdempotencyKey>,

    /// The server's id of an action that was submitted; see `aegis list`.
    #[arg(long, value_name = "ID")]
    pub(crate) id: Option<RequestId>,

    /// With --id: the digest of what was seen; see `aegis show`. It is 'none' for an action without
    /// a payload. Without it, the action is shown and has to be confirmed on a terminal.
    #[arg(long, requires = "id", value_name = "DIGEST|none")]
    pub(crate) digest: Option<Seen>,

    /// With --id: approves this payload in place of the one that was submitted, if the submission
    /// allows it: a JSON object, @FILE, or - for standard input.
    #[arg(long, requires = "id", value_name = "JSON|@FILE|-")]
    pub(crate) edit: Option<String>,

    /// The thread.
    #[arg(long, env = "AEGIS_THREAD", value_name = "THREAD")]
    pub(crate) thread: Option<ThreadId>,

    /// What the action is about: a JSON object, @FILE, or - for standard input.
    #[arg(long, conflicts_with = "id", value_name = "JSON|@FILE|-")]
    pub(crate) payload: Option<String>,

    /// A comment on the decision.
    #[arg(long)]
    pub(crate) comment: Option<String>,

    /// The X-Request-Id of the call, to repeat a call whose outcome is unknown [default: a new
    /// one].
    #[arg(long, value_name = "ID")]
    pub(crate) call_id: Option<RequestId>,

    #[command(flatten)]
    pub(crate) connect: Connect,
}

/// What the reviewer has seen.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Seen {
    Payload(Digest),
    NoPayload,
}

impl FromStr for Seen {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "none" {
            return Ok(Self::NoPayload);
        }
        let digest = text.parse::<Digest>();
        digest
            .map(Self::Payload)
            .map_err(|error| format!("{error}, or 'none' where there is no payload"))
    }
}

pub(crate) async fn approve(args: Decide, context: Context) -> Result<(), Failure> {
    decide(Decision::Approve, args, &context.config.client).await
}

pub(crate) async fn reject(args: Decide, context: Context) -> Result<(), Failure> {
    decide(Decision::Reject, args, &context.config.client).await
}

/// Records a decision and prints the receipt.
async fn decide(decision: Decision, args: Decide, config: &config::Client) -> Result<(), Failure> {
    if args.id.is_some() {
        return by_id(decision, args, config).await;
    }
    let Some(key) = args.key else {
        return Err(Failure::usage("no key; name an idempotency key, or --id"));
    };
    let json = args.connect.json;
    let mut builder = args.connect.builder_for_caller(config)?;
    match (&args.thread, &config.thread) {
        (Some(_), _) => {}
        (None, Some(thread)) => builder = builder.thread_id(thread.as_str()),
        (None, None) => {
            return Err(Failure::usage(
                "no thread; set --thread, AEGIS_THREAD, or 'thread' in the configuration file",
            ));
        }
    }
    let mut service = builder.build()?;
    let mut request = DecisionRequest::new(decision, key);
    if let Some(thread) = args.thread {
        request = request.thread_id(thread);
    }
    if let Some(payload) = args.payload {
        request = request.payload(payload_of(&payload)?);
    }
    if let Some(comment) = args.comment {
        request = request.comment(comment);
    }
    // The id is chosen before the call, so that the message of a failed call can name it.
    let call_id = args.call_id.unwrap_or_else(RequestId::mint);
    let receipt = service.call(request.call_id(call_id.clone())).await;
    let receipt = receipt.map_err(|error| unknown(error, &call_id))?;
    print_receipt(&receipt, json)
}

/// Decides on an action that was submitted, on what was seen.
async fn by_id(decision: Decision, args: Decide, config: &config::Client) -> Result<(), Failure> {
    let Some(id) = args.id else {
        return Err(Failure::usage("no id"));
    };
    let json = args.connect.json;
    let edited = args.edit.as_deref().map(payload_of).transpose()?;
    if edited.is_some() && decision == Decision::Reject {
        return Err(Failure::usage(
            "a rejection has no --edit; only what is approved can be edited",
        ));
    }
    let service = args.connect.service(config)?;
    let digest = match args.digest {
        Some(Seen::Payload(digest)) => Some(digest),
        Some(Seen::NoPayload) => None,
        None => confirmed(&service, &id, decision, json).await?,
    };
    let call_id = args.call_id.unwrap_or_else(RequestId::mint);
    let mut call = service
        .decide_action(decision, id)
        .digest(digest)
        .call_id(call_id.clone());
    if let Some(payload) = &edited {
        call = call.edited_payload(payload);
    }
    if let Some(comment) = args.comment {
        call = call.comment(comment);
    }
    let receipt = call.await.map_err(|error| unknown(error, &call_id))?;
    print_receipt(&receipt, json)
}

/// Shows an action on the terminal, and asks whether it is to be decided so. Returns the digest of
/// what was shown.
async fn confirmed(
    service: &AegisService,
    id: &RequestId,
    decision: Decision,
    json: bool,
) -> Result<Option<Digest>, Failure> {
    let action = service.look(id).await.map_err(Failure::of_reading)?;
    let shown = action.edited_payload.as_ref().or(action.payload.as_ref());
    let has_payload = action.digest.is_some();
    // Without a digest, what is decided could be another payload than the one that was seen.
    if !has_payload && shown.is_some() {
        return Err(Failure::other(format!(
            "the server shows a payload of {id} and no digest, so that no decision can be bound to it"
        )));
    }
    if json || !io::stdin().is_terminal() {
        let (has, digest) = match has_payload {
            true => ("a payload", "its --digest"),
            false => ("no payload", "--digest none"),
        };
        return Err(Failure::usage(format!(
            "the action has {has}; look at it with 'aegis show {id}' and pass {digest}"
        )));
    }
    print(&view::action(&action))?;
    print(&format!("{decision} this? [y/N] "))?;
    let mut answer = String::new();
    io::stdin()
        .read_line(&mut answer)
        .map_err(|error| Failure::other("cannot read the answer").because(error))?;
    match answer.trim() {
        "y" | "Y" | "yes" => Ok(action.digest),
        _ => Err(Failure::other("nothing was decided")),
    }
}

/// The failure of a call that may be sent again under its own id.
pub(super) fn unknown(error: aegis_hitl::Error, call_id: &RequestId) -> Failure {
    let unknown = error.is_outcome_unknown();
    let failure = Failure::from(error);
    if unknown {
        say(&format!("this call was --call-id {call_id}"));
    }
    failure
}

pub(super) fn print_receipt(receipt: &Receipt, json: bool) -> Result<(), Failure> {
    let outcome = match receipt.outcome() {
        Outcome::Accepted => "accepted",
        Outcome::Duplicate => "duplicate",
    };
    if json {
        let printed = print_json(&json!({
            "outcome": outcome,
            "decision": receipt.decision(),
            "request_id": receipt.request_id(),
            "call_id": receipt.call_id(),
            "attempts": receipt.attempts(),
            "status_code": receipt.status_code().as_u16(),
            "action": receipt.action(),
        }));
        return printed.map_err(Failure::on_record);
    }
    let mut text = format!("on record: {} ({outcome})\n", receipt.decision());
    if let Some(id) = receipt.request_id() {
        text.push_str(&format!("request id: {id}\n"));
    }
    text.push_str(&format!("attempts: {}\n", receipt.attempts()));
    print(&text).map_err(Failure::on_record)
}

/// Prints an action that a call has changed.
pub(super) fn print_changed(action: &Action, json: bool) -> Result<(), Failure> {
    let printed = if json {
        print_json(action)
    } else {
        print(&view::action(action))
    };
    printed.map_err(Failure::on_record)
}
