//! `aegis status`.

use std::time::Duration;

use aegis_hitl::protocol::{ErrorChain, Escaped};
use aegis_hitl::{Action, RequestId};
use clap::Args;

use super::Context;
use crate::connect::Connect;
use crate::failure::Failure;
use crate::print::{print, print_json};

#[derive(Debug, Args)]
pub(crate) struct Status {
    /// The server's id of the action, or the X-Request-Id of the call that decided it.
    pub(crate) id: RequestId,

    /// Waits for a decision, up to this many seconds (0 to 55).
    #[arg(long, value_name = "SECONDS", value_parser = wait)]
    pub(crate) wait: Option<Duration>,

    #[command(flatten)]
    pub(crate) connect: Connect,
}

/// Requests a status and prints it.
pub(crate) async fn run(args: Status, context: Context) -> Result<(), Failure> {
    let json = args.connect.json;
    let service = args.connect.builder(&context.config.client)?.build()?;
    let mut call = service.status(args.id);
    if let Some(wait) = args.wait {
        call = call.wait(wait);
    }
    let action = call.await.map_err(|error| {
        // A status request changes nothing, so its failure never leaves a decision unknown.
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

fn wait(text: &str) -> Result<Duration, String> {
    match text.parse() {
        Ok(seconds @ 0..=55) => Ok(Duration::from_secs(seconds)),
        _ => Err("allowed are whole seconds from 0 to 55".to_owned()),
    }
}
