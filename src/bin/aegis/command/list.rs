//! `aegis list`.

use aegis_hitl::protocol::Escaped;
use aegis_hitl::{Decision, Execution, Status, ThreadId};
use clap::Args;
use serde_json::json;

use super::Context;
use crate::connect::Connect;
use crate::failure::Failure;
use crate::print::{print, print_json};
use crate::view;

#[derive(Debug, Args)]
pub(crate) struct List {
    /// Only actions in this state: pending, committed or failed. Pending ones come oldest first,
    /// all others newest first.
    #[arg(long, value_name = "STATUS", value_parser = status)]
    pub(crate) status: Option<Status>,

    /// Only actions with this decision: approve or reject.
    #[arg(long, value_name = "DECISION")]
    pub(crate) decision: Option<Decision>,

    /// Only actions whose execution has come this far: claimed, completed, failed or unknown.
    #[arg(long, value_name = "EXECUTION")]
    pub(crate) execution: Option<Execution>,

    /// Only actions of this thread.
    #[arg(long, value_name = "THREAD")]
    pub(crate) thread: Option<ThreadId>,

    /// The most actions to show, 1 to 200.
    #[arg(long, value_name = "NUMBER", default_value = "50", value_parser = clap::value_parser!(u32).range(1..=200))]
    pub(crate) limit: u32,

    /// Shows the page that follows another; the cursor is printed below each page.
    #[arg(long, value_name = "CURSOR")]
    pub(crate) cursor: Option<String>,

    #[command(flatten)]
    pub(crate) connect: Connect,
}

/// Prints a page of actions.
pub(crate) async fn run(args: List, context: Context) -> Result<(), Failure> {
    let json = args.connect.json;
    let service = args.connect.service(&context.config.client)?;
    let mut call = service.list().limit(args.limit);
    if let Some(status) = args.status {
        call = call.status(status);
    }
    if let Some(decision) = args.decision {
        call = call.decision(decision);
    }
    if let Some(execution) = args.execution {
        call = call.execution(execution);
    }
    if let Some(thread) = args.thread {
        call = call.thread_id(thread);
    }
    if let Some(cursor) = args.cursor {
        call = call.cursor(cursor);
    }
    let page = call.await.map_err(Failure::of_reading)?;
    if json {
        return print_json(&json!({ "actions": page.actions, "next_cursor": page.next_cursor }));
    }
    let mut text = view::table(&page.actions);
    if let Some(cursor) = &page.next_cursor {
        text.push_str(&format!("more: --cursor {}\n", Escaped::line(cursor)));
    }
    print(&text)
}

/// Takes the words in either case.
fn status(text: &str) -> Result<Status, aegis_hitl::protocol::UnknownName> {
    text.to_uppercase().parse()
}
