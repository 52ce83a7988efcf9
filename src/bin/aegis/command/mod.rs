//! The commands, one file each. A new command is one file and one line in `commands!`.

mod audit;
mod backup;
mod cancel;
mod check;
mod claim;
mod decide;
mod documents;
mod events;
pub(crate) mod hook;
mod keys;
mod list;
mod migrate;
mod serve;
mod show;
mod status;
mod submit;
mod wait;
mod webhooks;

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
    /// Submits an action for a decision.
    Submit(submit::Submit) => submit::run,
    /// Lists actions.
    List(list::List) => list::run,
    /// Shows all that is on record of an action.
    Show(show::Show) => show::run,
    /// Approves an action.
    Approve(decide::Decide) => decide::approve,
    /// Rejects an action.
    Reject(decide::Decide) => decide::reject,
    /// Shows where an action stands.
    Status(status::Status) => status::run,
    /// Withdraws an action that nobody has decided.
    Cancel(cancel::Cancel) => cancel::run,
    /// Waits for a decision.
    Wait(wait::Wait) => wait::run,
    /// Claims an approved action, so that nobody else runs it.
    Claim(claim::Claim) => claim::claim,
    /// Extends a claim.
    Renew(claim::Renew) => claim::renew,
    /// Reports that a claimed action was carried out.
    Complete(claim::Complete) => claim::complete,
    /// Reports that carrying out a claimed action failed.
    Fail(claim::Fail) => claim::fail,
    /// Prints events as they come.
    Events(events::Events) => events::run,
    /// Asks for approval before the tool calls of a coding agent.
    ///
    /// Reads the JSON of the agent's hook from standard input. Before a tool call it submits an
    /// action, waits for the decision, claims the approval, and lets the call pass. After the call
    /// it reports the outcome. Whatever goes wrong before the call blocks it (exit code 2).
    #[command(subcommand)]
    Hook(hook::Hook) => hook::run,
    /// Copies the database into a new file, even while a server has it open.
    Backup(backup::Backup) => backup::run,
    /// Moves a database file into a PostgreSQL database, or brings the schema of a database up to date.
    Migrate(migrate::Migrate) => migrate::run,
    /// Reads a whole database, and says whether it is sound (exit code 0) or not (1).
    Check(check::Check) => check::run,
    /// Exports and verifies the audit trail, even while a server has the database open.
    #[command(subcommand)]
    Audit(audit::Audit) => audit::run,
    /// Shows and repairs deliveries to webhooks, even while a server has the database open.
    #[command(subcommand)]
    Webhooks(webhooks::Webhooks) => webhooks::run,
    /// Makes API keys for the server's key file.
    #[command(subcommand)]
    Keys(keys::Keys) => keys::run,
    /// Prints completions for a shell.
    Completions(documents::Completions) => documents::completions,
    /// Prints a man page.
    Man(documents::Man) => documents::man,
}
