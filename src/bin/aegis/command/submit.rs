//! `aegis submit`.

use std::time::{Duration, SystemTime};

use aegis_hitl::{IdempotencyKey, RequestId, ThreadId};
use clap::Args;

use super::Context;
use super::decide::{print_changed, unknown};
use crate::args::lasting;
use crate::connect::Connect;
use crate::failure::Failure;
use crate::input::payload_of;

#[derive(Debug, Args)]
pub(crate) struct Submit {
    /// The idempotency key.
    pub(crate) key: IdempotencyKey,

    /// The thread.
    #[arg(long, env = "AEGIS_THREAD", value_name = "THREAD")]
    pub(crate) thread: Option<ThreadId>,

    /// What the action is about: a JSON object, @FILE, or - for standard input.
    #[arg(long, value_name = "JSON|@FILE|-")]
    pub(crate) payload: Option<String>,

    /// What the action is about, in a line for people.
    #[arg(long)]
    pub(crate) title: Option<String>,

    /// When the action expires if nobody has decided: a number with s, m, h or d, such as 30m
    /// [default: never].
    #[arg(long, value_name = "DURATION", value_parser = lasting)]
    pub(crate) expires: Option<Duration>,

    /// Lets the reviewer edit the payload.
    #[arg(long)]
    pub(crate) allow_edit: bool,

    /// The X-Request-Id of the call, to repeat a call whose outcome is unknown [default: a new
    /// one].
    #[arg(long, value_name = "ID")]
    pub(crate) call_id: Option<RequestId>,

    #[command(flatten)]
    pub(crate) connect: Connect,
}

/// Submits an action and prints it.
pub(crate) async fn run(args: Submit, context: Context) -> Result<(), Failure> {
    let config = &context.config.client;
    let json = args.connect.json;
    let configured = config.thread.as_deref().map(str::parse).transpose();
    let configured = configured
        .map_err(|error| Failure::usage("the thread of the configuration file").because(error))?;
    let Some(thread) = args.thread.or(configured) else {
        return Err(Failure::usage(
            "no thread; set --thread, AEGIS_THREAD, or 'thread' in the configuration file",
        ));
    };
    let payload = args.payload.as_deref().map(payload_of).transpose()?;
    let service = args.connect.service(config)?;
    let call_id = args.call_id.unwrap_or_else(RequestId::mint);
    let mut call = service.submit(args.key).thread_id(thread).call_id(&call_id);
    if let Some(payload) = &payload {
        call = call.payload(payload);
    }
    if let Some(title) = args.title {
        call = call.title(title);
    }
    if let Some(lasts) = args.expires {
        call = call.expires_at(SystemTime::now() + lasts);
    }
    if args.allow_edit {
        call = call.allow_edit(true);
    }
    let action = call.await.map_err(|error| unknown(error, &call_id))?;
    print_changed(&action, json)
}
