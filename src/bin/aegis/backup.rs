//! The command that copies the database.

use std::path::PathBuf;

use aegis_hitl::store::Embedded;

use crate::args;
use crate::config;
use crate::failure::Failure;
use crate::print::say;

/// Copies the database into a new file, while a server runs or not.
pub(crate) fn run(args: args::Backup, config: config::Serve) -> Result<(), Failure> {
    let store = args.store.or(config.store);
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
