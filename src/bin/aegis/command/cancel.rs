//! `aegis cancel`.

use aegis_hitl::RequestId;
use clap::Args;

use super::Context;
use super::decide::{print_receipt, unknown};
use crate::connect::Connect;
use crate::failure::Failure;

#[derive(Debug, Args)]
pub(crate) struct Cancel {
    /// The server's id of the action.
    pub(crate) id: RequestId,

    /// The X-Request-Id of the call, to repeat a call whose outcome is unknown [default: a new
    /// one].
    #[arg(long, value_name = "ID")]
    pub(crate) call_id: Option<RequestId>,

    #[command(flatten)]
    pub(crate) connect: Connect,
}

/// Withdraws an action and prints the receipt.
pub(crate) async fn run(args: Cancel, context: Context) -> Result<(), Failure> {
    let json = args.connect.json;
    let service = args.connect.service(&context.config.client)?;
    let call_id = args.call_id.unwrap_or_else(RequestId::mint);
    let receipt = service.cancel(args.id).call_id(&call_id).await;
    print_receipt(&receipt.map_err(|error| unknown(error, &call_id))?, json)
}
