//! The commands that copy and check a database file.

use std::path::PathBuf;

use aegis_hitl::store::{Embedded, Verified};
use serde_json::json;

use crate::args;
use crate::config;
use crate::failure::Failure;
use crate::print::{print, print_json};

/// Copies a database, and says how much is in the copy.
pub(crate) fn run(args: args::Backup, config: config::Serve) -> Result<(), Failure> {
    let store = args.store.or(config.store);
    let store = store.unwrap_or_else(|| PathBuf::from(config::STORE));
    let verified = Embedded::back_up(&store, &args.to)
        .map_err(|error| Failure::other("no backup was made").because(error))?;
    if args.json {
        return print_json(&json(&verified));
    }
    print(&format!(
        "{} is backed up to {}: {}\n",
        store.display(),
        args.to.display(),
        amount(&verified)
    ))
}

/// Looks at a database, and says what is wrong with it.
pub(crate) fn check(args: &args::Check) -> Result<(), Failure> {
    let file = args.file.display();
    let verified = Embedded::verify(&args.file)
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

fn amount(verified: &Verified) -> String {
    let totals = verified.totals;
    format!(
        "{} actions, {} decisions, {} events",
        totals.actions, totals.decisions, totals.events
    )
}

fn json(verified: &Verified) -> serde_json::Value {
    json!({
        "sound": verified.faults.is_empty(),
        "actions": verified.totals.actions,
        "decisions": verified.totals.decisions,
        "events": verified.totals.events,
        "faults": verified.faults,
    })
}
