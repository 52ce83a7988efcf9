//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;

use crate::command::Command;

/// Approvals of AI-agent actions, each decided exactly once.
///
/// Every option can also be set by its environment variable or in a configuration file. A flag wins
/// over the environment, the environment over the file, and the file over the default.
///
/// Exit codes: 0 on record (or done); 1 other failure; 2 usage; 3 refused, because another decision
/// or payload is on record or the action is closed; 4 the outcome is unknown, ask
/// again with the same key.
#[derive(Debug, Parser)]
#[command(name = "aegis", version, max_term_width = 100)]
pub(crate) struct Cli {
    /// Reads settings from this TOML file.
    #[arg(long, env = "AEGIS_CONFIG", value_name = "FILE", global = true)]
    pub(crate) config: Option<PathBuf>,

    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Parses a duration in seconds.
pub(crate) fn seconds(text: &str) -> Result<Duration, String> {
    let allowed = "allowed are seconds, more than 0 and up to 86400, such as 10 or 0.5";
    let seconds: f64 = text.parse().map_err(|_| allowed.to_owned())?;
    if seconds > 0.0 && seconds <= 86_400.0 {
        Ok(Duration::from_secs_f64(seconds))
    } else {
        Err(allowed.to_owned())
    }
}
