//! `aegis wait`.

use std::error::Error as _;
use std::time::Duration;

use aegis_hitl::RequestId;
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};

use super::Context;
use crate::args::seconds;
use crate::connect::Connect;
use crate::failure::Failure;
use crate::print::{print, print_json};
use crate::view;

#[derive(Debug, Args)]
pub(crate) struct Wait {
    /// The server's id of the action.
    pub(crate) id: RequestId,

    /// How long to wait for a decision, in seconds (up to 86400).
    #[arg(long = "for", value_name = "SECONDS", default_value = "3600", value_parser = seconds)]
    pub(crate) limit: Duration,

    #[command(flatten)]
    pub(crate) connect: Connect,
}

/// Waits for a decision and prints the action. Exit code 0 says that there is one.
pub(crate) async fn run(args: Wait, context: Context) -> Result<(), Failure> {
    let json = args.connect.json;
    let service = args.connect.service(&context.config.client)?;
    let progress = progress(&args.id);
    let decided = service.wait_for_decision(args.id, args.limit).await;
    progress.finish_and_clear();
    let action = decided.map_err(|error| {
        // A source tells why the server could not be asked. Somebody may have decided.
        if error.is_timeout() && error.source().is_none() {
            let limit = args.limit.as_secs_f64();
            Failure::other(format!("nobody has decided within {limit} s"))
        } else {
            Failure::of_reading(error)
        }
    })?;
    if json {
        return print_json(&action);
    }
    print(&view::action(&action))
}

/// Shows that the command waits, if stderr is a terminal.
pub(super) fn progress(id: &RequestId) -> ProgressBar {
    let progress = ProgressBar::new_spinner();
    if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} {elapsed}") {
        progress.set_style(style);
    }
    progress.set_message(format!("waiting for a decision on {id}"));
    progress.enable_steady_tick(Duration::from_millis(120));
    progress
}
