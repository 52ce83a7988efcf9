//! `aegis events`.

use std::future::poll_fn;
use std::pin::Pin;

use aegis_hitl::client::EventCursor;
use aegis_hitl::protocol::Escaped;
use clap::Args;
use futures_core::Stream;
use serde_json::json;

use super::Context;
use crate::connect::Connect;
use crate::failure::Failure;
use crate::print::{print, print_json};
use crate::view;

#[derive(Debug, Args)]
pub(crate) struct Events {
    /// Begins after the event with this cursor; 0 is before the oldest [default: from now on].
    #[arg(long, value_name = "CURSOR")]
    pub(crate) after: Option<EventCursor>,

    /// Ends after this many events.
    #[arg(long, value_name = "NUMBER")]
    pub(crate) count: Option<u64>,

    #[command(flatten)]
    pub(crate) connect: Connect,
}

/// Prints events as they come, a line each.
pub(crate) async fn run(args: Events, context: Context) -> Result<(), Failure> {
    let json = args.connect.json;
    let service = args.connect.service(&context.config.client)?;
    let mut events = service.events().after(args.after).stream();
    let mut left = args.count;
    while left != Some(0) {
        let next = poll_fn(|cx| Pin::new(&mut events).poll_next(cx)).await;
        let Some(streamed) = next else {
            return Err(Failure::other("the server has ended the events"));
        };
        let streamed = streamed.map_err(Failure::of_reading)?;
        let cursor = streamed.cursor.as_ref().map(EventCursor::as_str);
        if json {
            print_json(&json!({ "cursor": cursor, "event": streamed.event }))?;
        } else {
            let about = streamed.event.action.as_ref().map_or_else(
                || "-".to_owned(),
                |action| {
                    let title = action.title.as_deref().unwrap_or("-");
                    format!("{} {title}", action.request_id)
                },
            );
            print(&format!(
                "{} {} {}\n",
                Escaped::line(cursor.unwrap_or("-")),
                view::event(&streamed.event),
                Escaped::line(&about)
            ))?;
        }
        left = left.map(|left| left - 1);
    }
    Ok(())
}
