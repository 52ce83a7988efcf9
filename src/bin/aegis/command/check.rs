//! `aegis check`.

use std::path::PathBuf;

use aegis_hitl::store::{SqliteStore, Verified};
use clap::Args;
use serde_json::json;

use super::Context;
use crate::failure::Failure;
use crate::print::{print, print_json};
use crate::store;

#[derive(Debug, Args)]
pub(crate) struct Check {
    /// The database file. A server may have it open.
    #[arg(value_name = "FILE")]
    pub(crate) file: PathBuf,

    /// Prints JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Reads a whole database, and says what is wrong with it.
pub(crate) async fn run(args: Check, _: Context) -> Result<(), Failure> {
    let path = store::file(args.file)?;
    let file = path.display();
    let verified = SqliteStore::verify(&path)
        .map_err(|error| Failure::other(format!("{file} was not checked")).because(error))?;
    if args.json {
        print_json(&json(&verified))?;
    } else if verified.faults.is_empty() {
        print(&format!("{file} is sound: {}\n", amount(&verified)))?;
    } else {
        print(&(verified.faults.join("\n") + "\n"))?;
    }
    match verified.faults.len() {
        0 => Ok(()),
        _ => Err(Failure::other(format!("{file} is not sound"))),
    }
}

pub(super) fn amount(verified: &Verified) -> String {
    let totals = verified.totals;
    let removed = match totals.removed {
        0 => String::new(),
        removed => format!(", {removed} removed"),
    };
    format!(
        "{} actions, {} decisions, {} events{removed}",
        totals.actions, totals.decisions, totals.events
    )
}

pub(super) fn json(verified: &Verified) -> serde_json::Value {
    json!({
        "sound": verified.faults.is_empty(),
        "actions": verified.totals.actions,
        "decisions": verified.totals.decisions,
        "events": verified.totals.events,
        "removed": verified.totals.removed,
        "faults": verified.faults,
    })
}
