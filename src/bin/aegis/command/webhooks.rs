//! `aegis webhooks`.

use std::path::PathBuf;
use std::time::SystemTime;

use aegis_hitl::protocol::Escaped;
use aegis_hitl::store::{
    DeadLetter, EndpointState, Forget, Forgotten, Resend, Resent, Resume, Resumed,
};
use clap::{Args, Subcommand};
use comfy_table::{Table, presets};
use serde_json::{Value, json};
use uuid::Uuid;

use super::Context;
use crate::config;
use crate::failure::Failure;
use crate::print::{print, print_json};
use crate::store::Records;
use crate::view;

#[derive(Debug, Subcommand)]
pub(crate) enum Webhooks {
    /// Shows how far each endpoint has come.
    State(State),
    /// Lists dead letters: events that were given up after a day.
    List(List),
    /// Sends dead letters again. A server that runs does it within seconds.
    Resend(ResendDead),
    /// Delivers again to an endpoint that was stopped because it answered 410.
    Resume(ResumeEndpoint),
    /// Removes an endpoint that is not in the configuration file any more: how far it came, and what
    /// it has not received. Retention no longer waits for it.
    ///
    /// Refused while a server delivers to it. An endpoint that is still in the file begins anew.
    Forget(ForgetEndpoint),
}

#[derive(Debug, Args)]
pub(crate) struct Options {
    /// The database: a file, or postgres://user@host:5432/database [default: aegis.db].
    #[arg(
        long,
        env = "AEGIS_STORE",
        value_name = "FILE|URL",
        hide_env_values = true
    )]
    pub(crate) store: Option<PathBuf>,

    /// Prints JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct State {
    #[command(flatten)]
    pub(crate) options: Options,
}

#[derive(Debug, Args)]
pub(crate) struct List {
    /// The endpoint's name.
    #[arg(value_name = "NAME")]
    pub(crate) name: String,

    /// The most dead letters to show.
    #[arg(long, value_name = "NUMBER", default_value = "100")]
    pub(crate) limit: u32,

    #[command(flatten)]
    pub(crate) options: Options,
}

#[derive(Debug, Args)]
pub(crate) struct ResendDead {
    /// The endpoint's name.
    #[arg(value_name = "NAME")]
    pub(crate) name: String,

    /// The ids of the events; see `aegis webhooks list`.
    #[arg(value_name = "EVENT", required_unless_present = "all")]
    pub(crate) events: Vec<Uuid>,

    /// Sends all dead letters of the endpoint.
    #[arg(long, conflicts_with = "events")]
    pub(crate) all: bool,

    #[command(flatten)]
    pub(crate) options: Options,
}

#[derive(Debug, Args)]
pub(crate) struct ResumeEndpoint {
    /// The endpoint's name.
    #[arg(value_name = "NAME")]
    pub(crate) name: String,

    #[command(flatten)]
    pub(crate) options: Options,
}

#[derive(Debug, Args)]
pub(crate) struct ForgetEndpoint {
    /// The endpoint's name.
    #[arg(value_name = "NAME")]
    pub(crate) name: String,

    #[command(flatten)]
    pub(crate) options: Options,
}

pub(crate) async fn run(command: Webhooks, context: Context) -> Result<(), Failure> {
    match command {
        Webhooks::State(args) => state(&args, context).await,
        Webhooks::List(args) => list(&args, context).await,
        Webhooks::Resend(args) => resend(args, context).await,
        Webhooks::Resume(args) => resume(args, context).await,
        Webhooks::Forget(args) => forget(args, context).await,
    }
}

impl Options {
    async fn records(&self, context: Context) -> Result<Records, Failure> {
        let store = self.store.clone().or(context.config.serve.store);
        Records::open(store.unwrap_or_else(|| PathBuf::from(config::STORE))).await
    }
}

fn unknown(name: &str) -> Failure {
    Failure::usage(format!(
        "there is no endpoint '{}' on record; see 'aegis webhooks state'",
        Escaped::line(name)
    ))
}

async fn state(args: &State, context: Context) -> Result<(), Failure> {
    let records = args.options.records(context).await?;
    let endpoints = records.endpoints().await?;
    if args.options.json {
        let endpoints: Vec<_> = endpoints.iter().map(state_json).collect();
        return print_json(&json!({ "endpoints": endpoints }));
    }
    let mut table = table(["NAME", "STATE", "POSITION", "BEHIND", "PARKED", "DEAD"]);
    for endpoint in &endpoints {
        let standing = match (endpoint.stopped_at, endpoint.held_until) {
            (Some(at), _) => format!("stopped {}", view::time(at)),
            (None, Some(until)) if until > SystemTime::now() => "served".to_owned(),
            (None, _) => "not served".to_owned(),
        };
        table.add_row([
            Escaped::line(&endpoint.name).to_string(),
            standing,
            endpoint.position.to_string(),
            endpoint.behind.to_string(),
            endpoint.parked.to_string(),
            endpoint.dead.to_string(),
        ]);
    }
    print(&lines(&table))
}

fn state_json(endpoint: &EndpointState) -> Value {
    json!({
        "name": endpoint.name,
        "position": endpoint.position,
        "behind": endpoint.behind,
        "parked": endpoint.parked,
        "dead": endpoint.dead,
        "stopped_at": endpoint.stopped_at.map(view::time),
        "behind_since": endpoint.behind_since.map(view::time),
        "held_until": endpoint.held_until.map(view::time),
    })
}

async fn list(args: &List, context: Context) -> Result<(), Failure> {
    let records = args.options.records(context).await?;
    require(&records, &args.name).await?;
    let limit = usize::try_from(args.limit).unwrap_or(usize::MAX);
    let letters = records.dead_letters(&args.name, limit).await?;
    if args.options.json {
        let letters: Vec<_> = letters.iter().map(letter_json).collect();
        return print_json(&json!({ "dead_letters": letters }));
    }
    let mut table = table(["EVENT", "TYPE", "ACTION", "GIVEN UP", "ATTEMPTS", "FAILURE"]);
    for letter in &letters {
        let action = letter.event.action.as_ref();
        let action = action.map(|action| action.request_id.to_string());
        table.add_row([
            letter.event.id.to_string(),
            letter.event.kind.to_string(),
            action.unwrap_or_else(|| "-".to_owned()),
            view::time(letter.given_up_at),
            letter.attempts.to_string(),
            Escaped::line(&letter.failure).to_string(),
        ]);
    }
    print(&lines(&table))
}

/// Nothing of the payload: like the events that are sent, it is for those who look at the action.
fn letter_json(letter: &DeadLetter) -> Value {
    let action = letter.event.action.as_ref();
    json!({
        "event": letter.event.id,
        "type": format!("action.{}", letter.event.kind),
        "at": letter.event.at.map(view::time),
        "action": action.map(|action| &action.request_id),
        "tenant_id": action.and_then(|action| action.tenant_id.as_ref()),
        "position": letter.position,
        "attempts": letter.attempts,
        "failure": letter.failure,
        "parked_at": view::time(letter.parked_at),
        "given_up_at": view::time(letter.given_up_at),
    })
}

/// A misspelled name must not look like an endpoint without dead letters.
async fn require(records: &Records, name: &str) -> Result<(), Failure> {
    let endpoints = records.endpoints().await?;
    let is_known = endpoints.iter().any(|endpoint| endpoint.name == name);
    is_known.then_some(()).ok_or_else(|| unknown(name))
}

async fn resend(args: ResendDead, context: Context) -> Result<(), Failure> {
    let records = args.options.records(context).await?;
    let mut events = args.events;
    events.sort_unstable();
    events.dedup();
    let asked_for = events.len();
    let request = Resend {
        endpoint: args.name.clone(),
        events: (!args.all).then_some(events),
    };
    match records.resend(request).await? {
        Resent::NotFound => Err(unknown(&args.name)),
        Resent::Parked(resent) if !args.all && resent < asked_for => Err(Failure::other(format!(
            "{resent} of {asked_for} events are sent again; the others are no dead letters of '{}'",
            Escaped::line(&args.name)
        ))),
        Resent::Parked(resent) if args.options.json => print_json(&json!({ "resent": resent })),
        Resent::Parked(resent) => print(&format!("dead letters to be sent again: {resent}\n")),
    }
}

async fn resume(args: ResumeEndpoint, context: Context) -> Result<(), Failure> {
    let records = args.options.records(context).await?;
    let request = Resume {
        endpoint: args.name.clone(),
    };
    let resumed = match records.resume(request).await? {
        Resumed::NotFound => return Err(unknown(&args.name)),
        resumed => resumed == Resumed::Resumed,
    };
    let name = Escaped::line(&args.name);
    match (args.options.json, resumed) {
        (true, _) => print_json(&json!({ "resumed": resumed })),
        (false, true) => print(&format!("'{name}' is delivered to again\n")),
        (false, false) => print(&format!("'{name}' was not stopped\n")),
    }
}

async fn forget(args: ForgetEndpoint, context: Context) -> Result<(), Failure> {
    let records = args.options.records(context).await?;
    let request = Forget {
        endpoint: args.name.clone(),
    };
    let name = Escaped::line(&args.name);
    match records.forget(request).await? {
        Forgotten::NotFound => Err(unknown(&args.name)),
        Forgotten::Held(until) => Err(Failure::with_code(
            3,
            format!(
                "a server delivers to '{name}', until {} if it is gone; take the endpoint out of its \
             configuration file and send it SIGHUP, or stop it",
                view::time(until)
            ),
        )),
        Forgotten::Removed if args.options.json => print_json(&json!({ "forgotten": true })),
        Forgotten::Removed => print(&format!("'{name}' is forgotten\n")),
    }
}

fn table(header: [&str; 6]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    table.set_header(header);
    table
}

fn lines(table: &Table) -> String {
    let lines = table.to_string();
    let lines = lines.lines().map(|line| format!("{}\n", line.trim()));
    lines.collect()
}
