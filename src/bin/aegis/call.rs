//! The commands that ask a server.

use std::fs;
use std::io::{self, Read};
use std::time::Duration;

use aegis_hitl::client::Builder;
use aegis_hitl::protocol::{ErrorChain, Escaped};
use aegis_hitl::{
    Action, AegisService, Decision, DecisionRequest, Outcome, Payload, Receipt, RequestId,
};
use serde_json::json;
use tower_service::Service;

use crate::args;
use crate::config;
use crate::failure::Failure;
use crate::print::{print, print_json, say};

fn builder(connect: args::Connect, config: &config::Client) -> Result<Builder, Failure> {
    let mut builder = AegisService::builder();
    if let Some(url) = connect.url.or_else(|| config.url.clone()) {
        builder = builder.base_url(url);
    }
    if let Some(prefix) = connect.prefix.or_else(|| config.prefix.clone()) {
        builder = builder.api_prefix(prefix);
    }
    // A credential that is given closer by wins over one from farther off, of either kind.
    match (connect.tenant, connect.token, &config.tenant, &config.token) {
        (None, None, tenant, token) => {
            if let Some(tenant) = tenant {
                builder = builder.tenant_id(tenant.as_str());
            }
            if let Some(token) = token {
                builder = builder.api_key(token.as_str());
            }
        }
        (tenant, token, _, _) => {
            if let Some(tenant) = tenant {
                builder = builder.tenant_id(tenant);
            }
            if let Some(token) = token {
                builder = builder.api_key(token.as_str());
            }
        }
    }
    let configured = config.timeout.map(Duration::try_from_secs_f64).transpose();
    let configured = configured
        .map_err(|error| Failure::usage("the timeout of the configuration file").because(error))?;
    if let Some(timeout) = connect.timeout.or(configured) {
        builder = builder.timeout(timeout);
    }
    if let Some(retries) = connect.retries.or(config.retries) {
        builder = builder.max_retries(retries);
    }
    if let Some(path) = connect.ca.or_else(|| config.ca.clone()) {
        let pem = fs::read(&path).map_err(|error| {
            Failure::usage(format!("cannot read {}", path.display())).because(error)
        })?;
        builder = builder.root_certificate_pem(pem);
    }
    Ok(builder)
}

/// Puts a decision on record and prints the receipt.
pub(crate) async fn decide(
    decision: Decision,
    args: args::Decide,
    config: &config::Client,
) -> Result<(), Failure> {
    let json = args.connect.json;
    let anybody = args.connect.tenant.is_some() || args.connect.token.is_some();
    if !anybody && config.tenant.is_none() && config.token.is_none() {
        return Err(Failure::usage(
            "nobody asks; set --tenant or AEGIS_TENANT, or --token or AEGIS_TOKEN, or either in the configuration file",
        ));
    }
    let mut builder = builder(args.connect, config)?;
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
    // Named before the call, so that a call of which the outcome is unknown can be repeated as the same call.
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
    let fault = |error: io::Error| Failure::usage("cannot read the payload").because(error);
    let text = match text.strip_prefix('@') {
        Some(path) => fs::read_to_string(path).map_err(fault)?,
        None if text == "-" => {
            let mut input = String::new();
            io::stdin().read_to_string(&mut input).map_err(fault)?;
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

/// Asks for a status and prints it.
pub(crate) async fn status(args: args::Status, config: &config::Client) -> Result<(), Failure> {
    let json = args.connect.json;
    let service = builder(args.connect, config)?.build()?;
    let mut call = service.status(args.id);
    if let Some(wait) = args.wait {
        call = call.wait(wait);
    }
    let action = call.await.map_err(|error| {
        // A question changes nothing: no failure of it leaves a decision unknown.
        if error.is_config() || error.is_request() {
            Failure::from(error)
        } else {
            Failure::other(ErrorChain(&error).to_string())
        }
    })?;
    if json {
        return print_json(&action);
    }
    print(&rows_of(&action))
}

fn rows_of(action: &Action) -> String {
    let none = "-".to_owned();
    let time = |time: Option<std::time::SystemTime>| time.map(rfc3339);
    let rows = [
        ("request id", Some(action.request_id.to_string())),
        ("status", Some(action.status.to_string())),
        (
            "decision",
            Some(
                action
                    .decision
                    .map_or(none.clone(), |decision| decision.to_string()),
            ),
        ),
        (
            "execution",
            action.execution.map(|execution| execution.to_string()),
        ),
        ("tenant", action.tenant_id.as_ref().map(ToString::to_string)),
        ("thread", action.thread_id.as_ref().map(ToString::to_string)),
        (
            "key",
            action.idempotency_key.as_ref().map(ToString::to_string),
        ),
        ("created", time(action.created_at)),
        ("decided", time(action.decided_at)),
        (
            "comment",
            action
                .comment
                .as_ref()
                .map(|comment| format!("\"{comment}\"")),
        ),
        (
            "payload",
            action
                .payload
                .as_ref()
                .map(|payload| payload.as_str().to_owned()),
        ),
    ];
    let row = |(name, value): (&str, Option<String>)| {
        Some(format!("{name}: {}\n", Escaped::line(&value?)))
    };
    rows.into_iter().filter_map(row).collect()
}

fn rfc3339(time: std::time::SystemTime) -> String {
    jiff::Timestamp::try_from(time).map_or_else(|_| "-".to_owned(), |time| time.to_string())
}
