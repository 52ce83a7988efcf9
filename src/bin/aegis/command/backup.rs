//! `aegis backup`.

use std::path::PathBuf;

use aegis_hitl::store::SqliteStore;
use clap::Args;

use super::{Context, check};
use crate::config;
use crate::failure::Failure;
use crate::print::{print, print_json};
use crate::store;

#[derive(Debug, Args)]
pub(crate) struct Backup {
    /// The copy: a file that does not exist yet. It gets this name once it is whole, verified and
    /// synced.
    #[arg(value_name = "TO")]
    pub(crate) to: PathBuf,

    /// The database file [default: aegis.db].
    #[arg(long, env = "AEGIS_STORE", value_name = "FILE")]
    pub(crate) store: Option<PathBuf>,

    /// Prints JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Copies the database into a new file, whether or not a server runs.
pub(crate) async fn run(args: Backup, context: Context) -> Result<(), Failure> {
    let store = args.store.or(context.config.serve.store);
    let store = store::file(store.unwrap_or_else(|| PathBuf::from(config::STORE)))?;
    let verified = SqliteStore::back_up(&store, &args.to)
        .map_err(|error| Failure::other("no backup was made").because(error))?;
    if args.json {
        return print_json(&check::json(&verified));
    }
    print(&format!(
        "{} is backed up to {}: {}\n",
        store.display(),
        args.to.display(),
        check::amount(&verified)
    ))
}
