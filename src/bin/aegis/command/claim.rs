//! `aegis claim`, `aegis renew`, `aegis complete` and `aegis fail`.

use std::time::Duration;

use aegis_hitl::protocol::{self, ClaimToken, Digest, Escaped};
use aegis_hitl::{AegisService, Payload, RequestId};
use clap::Args;
use serde_json::{Map, Value, json};

use super::Context;
use super::decide::{print_changed, unknown};
use crate::args::seconds;
use crate::connect::{Connect, Secret};
use crate::failure::Failure;
use crate::input::{json_of, payload_of};
use crate::print::{print, print_json};
use crate::view;

#[derive(Debug, Args)]
pub(crate) struct Claim {
    /// The server's id of the action.
    pub(crate) id: RequestId,

    /// The digest of what is about to be run.
    #[arg(long, value_name = "DIGEST")]
    pub(crate) digest: Option<Digest>,

    /// What is about to be run, in place of its digest: a JSON object, @FILE, or - for standard
    /// input.
    #[arg(long, conflicts_with = "digest", value_name = "JSON|@FILE|-")]
    pub(crate) payload: Option<String>,

    /// How long the claim lasts, in whole seconds (1 to 86400), unless it is renewed.
    #[arg(long, value_name = "SECONDS", default_value = "300", value_parser = seconds)]
    pub(crate) lease: Duration,

    /// The X-Request-Id of the call, to repeat a call whose outcome is unknown [default: a new
    /// one].
    #[arg(long, value_name = "ID")]
    pub(crate) call_id: Option<RequestId>,

    #[command(flatten)]
    pub(crate) connect: Connect,
}

/// Names a claim.
#[derive(Debug, Args)]
pub(crate) struct Held {
    /// The server's id of the action.
    pub(crate) id: RequestId,

    /// The claim's token. The environment variable keeps it out of the process list.
    #[arg(
        long,
        env = "AEGIS_CLAIM",
        value_name = "TOKEN",
        hide_env_values = true
    )]
    pub(crate) claim: Secret,

    #[command(flatten)]
    pub(crate) connect: Connect,
}

impl Held {
    fn token(&self) -> Result<ClaimToken, Failure> {
        let token = self.claim.as_str().parse();
        token.map_err(|error| Failure::usage("the claim").because(error))
    }
}

#[derive(Debug, Args)]
pub(crate) struct Renew {
    #[command(flatten)]
    pub(crate) held: Held,

    /// How long the claim lasts from now on, in whole seconds (1 to 86400).
    #[arg(long, value_name = "SECONDS", default_value = "300", value_parser = seconds)]
    pub(crate) lease: Duration,
}

#[derive(Debug, Args)]
pub(crate) struct Complete {
    #[command(flatten)]
    pub(crate) held: Held,

    /// The result, up to 64 KiB: JSON, @FILE, or - for standard input.
    #[arg(long, value_name = "JSON|@FILE|-")]
    pub(crate) result: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Fail {
    #[command(flatten)]
    pub(crate) held: Held,

    /// Why it failed, for the person who decides again.
    #[arg(long)]
    pub(crate) reason: Option<String>,
}

/// Claims an approved action, and prints the claim and what is to be run.
pub(crate) async fn claim(args: Claim, context: Context) -> Result<(), Failure> {
    let json = args.connect.json;
    let payload = args.payload.as_deref().map(payload_of).transpose()?;
    let service = args.connect.service(&context.config.client)?;
    let digest = match &payload {
        Some(payload) => digest_of(payload, &service, &args.id).await?,
        None => args.digest,
    };
    let call_id = args.call_id.unwrap_or_else(RequestId::mint);
    let call = service.claim(args.id).digest(digest).lease(args.lease);
    let claimed = call.call_id(&call_id).await;
    let claimed = claimed.map_err(|error| unknown(error, &call_id))?;
    let claim = &claimed.claim;
    let printed = if json {
        print_json(&json!({ "action": claimed.action, "claim": claim }))
    } else {
        print(&format!(
            "claim: {}\nfence: {}\nlease ends: {}\n{}",
            Escaped::line(claim.token.as_str()),
            claim.fence,
            end(claim),
            view::action(&claimed.action)
        ))
    };
    // The token is lost with the output. The same call gets it again while the lease lasts.
    printed.map_err(|failure| {
        let message = failure.message();
        Failure::with_code(
            4,
            format!("claimed; {message}; claim again with --call-id {call_id} to get the token"),
        )
    })
}

/// The digest that is on record for a payload. `{}` is no payload, and has none, unless a reviewer
/// has edited another payload to it.
async fn digest_of(
    payload: &Payload,
    service: &AegisService,
    id: &RequestId,
) -> Result<Option<Digest>, Failure> {
    let digest = Digest::of(payload);
    let digest = digest.map_err(|error| Failure::usage("the payload").because(error))?;
    let members = payload.parse::<Map<String, Value>>();
    if !members.is_ok_and(|members| members.is_empty()) {
        return Ok(Some(digest));
    }
    let action = service.status(id).await.map_err(Failure::of_reading)?;
    Ok(action.digest.map(|_| digest))
}

/// Shows when a lease ends.
fn end(claim: &protocol::Claim) -> String {
    claim.expires_at.map_or_else(|| "-".to_owned(), view::time)
}

/// Extends a claim and prints its new end.
pub(crate) async fn renew(args: Renew, context: Context) -> Result<(), Failure> {
    let token = args.held.token()?;
    let json = args.held.connect.json;
    let service = args.held.connect.service(&context.config.client)?;
    let claim = service
        .renew(args.held.id, &token)
        .lease(args.lease)
        .await?;
    let printed = if json {
        print_json(&json!({ "claim": claim }))
    } else {
        print(&format!("lease ends: {}\n", end(&claim)))
    };
    printed.map_err(Failure::on_record)
}

/// Reports success and prints the action.
pub(crate) async fn complete(args: Complete, context: Context) -> Result<(), Failure> {
    let token = args.held.token()?;
    let json = args.held.connect.json;
    let result = args.result.as_deref().map(json_of).transpose()?;
    let service = args.held.connect.service(&context.config.client)?;
    let mut call = service.complete(args.held.id, &token);
    if let Some(result) = &result {
        call = call.result(result);
    }
    print_changed(&call.await?, json)
}

/// Reports failure and prints the action.
pub(crate) async fn fail(args: Fail, context: Context) -> Result<(), Failure> {
    let token = args.held.token()?;
    let json = args.held.connect.json;
    let service = args.held.connect.service(&context.config.client)?;
    let mut call = service.fail(args.held.id, &token);
    if let Some(reason) = args.reason {
        call = call.reason(reason);
    }
    print_changed(&call.await?, json)
}
