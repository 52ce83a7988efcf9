//! `aegis approve` and `aegis reject`.

use std::fs;
use std::io::{self, Read};

use aegis_hitl::{
    Decision, DecisionRequest, IdempotencyKey, Outcome, Payload, Receipt, RequestId, ThreadId,
};
use clap::Args;
use serde_json::json;
use tower_service::Service;

use super::Context;
use crate::config;
use crate::connect::Connect;
use crate::failure::Failure;
use crate::print::{print, print_json, say};

#[derive(Debug, Args)]
pub(crate) struct Decide {
    /// The idempotency key.
    pub(crate) key: IdempotencyKey,

    /// The thread.
    #[arg(long, env = "AEGIS_THREAD", value_name = "THREAD")]
    pub(crate) thread: Option<ThreadId>,

    /// What the action is about: a JSON object, @FILE, or - for standard input.
    #[arg(long, value_name = "JSON|@FILE|-")]
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

pub(crate) async fn approve(args: Decide, context: Context) -> Result<(), Failure> {
    decide(Decision::Approve, args, &context.config.client).await
}

pub(crate) async fn reject(args: Decide, context: Context) -> Result<(), Failure> {
    decide(Decision::Reject, args, &context.config.client).await
}

/// Records a decision and prints the receipt.
async fn decide(decision: Decision, args: Decide, config: &config::Client) -> Result<(), Failure> {
    let json = args.connect.json;
    let anybody = args.connect.credential.is_some();
    if !anybody && config.tenant.is_none() && config.token.is_none() {
        return Err(Failure::usage(
            "nobody asks; set --tenant or AEGIS_TENANT, or --token or AEGIS_TOKEN, or either in \
             the configuration file",
        ));
    }
    let mut builder = args.connect.builder(config)?;
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
    let mut request = DecisionRequest::new(decision, args.key);
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
    let receipt = receipt.map_err(|error| {
        let unknown = error.is_outcome_unknown();
        let failure = Failure::from(error);
        if unknown {
            say(&format!("this call was --call-id {call_id}"));
        }
        failure
    })?;
    print_receipt(&receipt, json)
}

fn payload_of(text: &str) -> Result<Payload, Failure> {
    let unreadable = |error: io::Error| Failure::usage("cannot read the payload").because(error);
    let text = match text.strip_prefix('@') {
        Some(path) => fs::read_to_string(path).map_err(unreadable)?,
        None if text == "-" => {
            let mut input = String::new();
            io::stdin().read_to_string(&mut input).map_err(unreadable)?;
            input
        }
        None => text.to_owned(),
    };
    Payload::from_json(&text).map_err(|error| {
        Failure::usage("the payload is not a JSON object; allowed are JSON, @FILE and -")
            .because(error)
    })
}

fn print_receipt(receipt: &Receipt, json: bool) -> Result<(), Failure> {
    let outcome = match receipt.outcome() {
        Outcome::Accepted => "accepted",
        Outcome::Duplicate => "duplicate",
    };
    if json {
        return print_json(&json!({
            "outcome": outcome,
            "decision": receipt.decision(),
            "request_id": receipt.request_id(),
            "call_id": receipt.call_id(),
            "attempts": receipt.attempts(),
            "status_code": receipt.status_code().as_u16(),
            "action": receipt.action(),
        }));
    }
    let mut text = format!("on record: {} ({outcome})\n", receipt.decision());
    if let Some(id) = receipt.request_id() {
        text.push_str(&format!("request id: {id}\n"));
    }
    text.push_str(&format!("attempts: {}\n", receipt.attempts()));
    print(&text)
}
