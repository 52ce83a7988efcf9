//! `aegis show`.

use aegis_hitl::RequestId;
use clap::Args;

use super::Context;
use crate::connect::Connect;
use crate::failure::Failure;
use crate::print::{print, print_json};
use crate::view;

#[derive(Debug, Args)]
pub(crate) struct Show {
    /// The server's id of the action.
    pub(crate) id: RequestId,

    #[command(flatten)]
    pub(crate) connect: Connect,
}

/// Prints all that is on record of an action.
pub(crate) async fn run(args: Show, context: Context) -> Result<(), Failure> {
    let json = args.connect.json;
    let service = args.connect.service(&context.config.client)?;
    let action = service.look(args.id).await.map_err(Failure::of_reading)?;
    if json {
        return print_json(&action);
    }
    print(&view::action(&action))
}
