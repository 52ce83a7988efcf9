//! `aegis status`.

use std::time::Duration;

use aegis_hitl::RequestId;
use clap::Args;

use super::Context;
use crate::connect::Connect;
use crate::failure::Failure;
use crate::print::{print, print_json};
use crate::view;

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
    let action = call.await.map_err(Failure::of_reading)?;
    if json {
        return print_json(&action);
    }
    print(&view::action(&action))
}

fn wait(text: &str) -> Result<Duration, String> {
    match text.parse() {
        Ok(seconds @ 0..=55) => Ok(Duration::from_secs(seconds)),
        _ => Err("allowed are whole seconds from 0 to 55".to_owned()),
    }
}
