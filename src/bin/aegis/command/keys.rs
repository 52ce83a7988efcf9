//! `aegis keys`.

use std::time::Duration;

use aegis_hitl::server::{self, Scope};
use aegis_hitl::{ApiKey, TenantId};
use clap::{Args, Subcommand};
use serde_json::json;
use uuid::Uuid;

use super::Context;
use crate::args::lasting;
use crate::failure::Failure;
use crate::print::{print, print_json};

#[derive(Debug, Subcommand)]
pub(crate) enum Keys {
    /// Makes a key: prints the secret for the client, and the line for the server's key file.
    New(NewKey),
}

#[derive(Debug, Args)]
pub(crate) struct NewKey {
    /// The tenant that the key speaks for.
    #[arg(long, env = "AEGIS_TENANT", value_name = "TENANT")]
    pub(crate) tenant: TenantId,

    /// The holder of the key, for the audit trail; without spaces.
    #[arg(long, value_parser = name)]
    pub(crate) name: String,

    /// What the key may do: submit, decide, claim, read or admin; several with commas between.
    #[arg(long, required = true, value_delimiter = ',', value_name = "SCOPE")]
    pub(crate) scope: Vec<Scope>,

    /// How long the key lasts: a number with s, m, h or d, such as 90d [default: for ever].
    #[arg(long, value_parser = lasting, value_name = "DURATION")]
    pub(crate) expires: Option<Duration>,

    /// Prints JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

pub(crate) async fn run(command: Keys, _: Context) -> Result<(), Failure> {
    match command {
        Keys::New(args) => new(&args),
    }
}

/// Makes a key, and prints the secret and its line for the key file. The secret is shown only once.
fn new(args: &NewKey) -> Result<(), Failure> {
    // Two random UUIDs have 244 bits from the system's secure generator.
    let secret = format!(
        "sk_live_{}{}",
        Uuid::new_v4().simple(),
        Uuid::new_v4().simple()
    );
    let key = ApiKey::new(secret.as_str())
        .map_err(|error| Failure::other("cannot make a key").because(error))?;
    let mut scopes: Vec<_> = args.scope.iter().map(|scope| scope.as_str()).collect();
    scopes.dedup();
    let mut line = format!(
        "{} {} {} {}",
        server::Keys::digest(&key),
        args.tenant,
        args.name,
        scopes.join(",")
    );
    if let Some(lasts) = args.expires {
        let end = jiff::Timestamp::now()
            .checked_add(lasts)
            .map_err(|error| Failure::usage("the expiry of the key").because(error))?;
        line.push_str(&format!(" {end:.0}"));
    }
    // A server would refuse its file as a whole.
    server::Keys::parse(&line).map_err(|error| Failure::usage("the key").because(error))?;
    if args.json {
        return print_json(&json!({ "secret": secret, "line": line }));
    }
    print(&format!(
        "# for the client, as AEGIS_TOKEN; it is not shown again\n{secret}\n\
         # for the server's key file\n{line}\n"
    ))
}

fn name(text: &str) -> Result<String, String> {
    if !text.is_empty() && text.len() <= 255 && text.bytes().all(|byte| byte.is_ascii_graphic()) {
        Ok(text.to_owned())
    } else {
        Err("allowed are 1 to 255 visible ASCII characters without spaces".to_owned())
    }
}
