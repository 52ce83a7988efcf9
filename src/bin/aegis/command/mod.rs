//! The commands, one file each. A new command is one file and one line in `commands!`.

mod backup;
mod check;
mod decide;
mod keys;
mod serve;
mod status;

use std::path::PathBuf;

use clap::Subcommand;

use crate::config::Config;
use crate::failure::Failure;

/// What every command receives in addition to its own arguments.
pub(crate) struct Context {
    pub(crate) config: Config,
    /// The file that `config` was read from.
    pub(crate) file: Option<PathBuf>,
}

/// Lists the commands: the arguments of each, and the function that runs it.
macro_rules! commands {
    ($($(#[$attribute:meta])* $name:ident($args:path) => $run:path,)*) => {
        #[derive(Debug, Subcommand)]
        pub(crate) enum Command {
            $($(#[$attribute])* $name($args),)*
        }

        impl Command {
            pub(crate) async fn run(self, context: Context) -> Result<(), Failure> {
                match self {
                    $(Self::$name(args) => $run(args, context).await,)*
                }
            }
        }
    };
}

commands! {
    /// Runs the server.
    Serve(serve::Serve) => serve::run,
    /// Approves an action.
    Approve(decide::Decide) => decide::approve,
    /// Rejects an action.
    Reject(decide::Decide) => decide::reject,
    /// Shows where an action stands.
    Status(status::Status) => status::run,
    /// Copies the database into a new file, even while a server has it open.
    Backup(backup::Backup) => backup::run,
    /// Reads a whole database, and says whether it is sound (exit code 0) or not (1).
    Check(check::Check) => check::run,
    /// Makes API keys for the server's key file.
    #[command(subcommand)]
    Keys(keys::Keys) => keys::run,
}
