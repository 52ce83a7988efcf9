//! `aegis backup`.

use std::path::PathBuf;

use aegis_hitl::store::Embedded;
use clap::Args;

use super::Context;
use crate::config;
use crate::failure::Failure;
use crate::print::say;

#[derive(Debug, Args)]
pub(crate) struct Backup {
    /// The new file. It is complete once the command has succeeded.
    #[arg(value_name = "FILE")]
    pub(crate) to: PathBuf,

    /// The database file [default: aegis.db].
    #[arg(long, env = "AEGIS_STORE", value_name = "FILE")]
    pub(crate) store: Option<PathBuf>,
}

/// Copies the database into a new file, whether or not a server runs.
pub(crate) async fn run(args: Backup, context: Context) -> Result<(), Failure> {
    let store = args.store.or(context.config.serve.store);
    let store = store.unwrap_or_else(|| PathBuf::from(config::STORE));
    Embedded::backup(&store, &args.to)
        .map_err(|error| Failure::other("cannot back up").because(error))?;
    say(&format!(
        "{} is backed up to {}",
        store.display(),
        args.to.display()
    ));
    Ok(())
}
