//! The command line.

use std::path::PathBuf;
use std::sync::LazyLock;
use std::time::Duration;

use aegis_hitl::store::SqliteStore;
use clap::Parser;

use crate::command::Command;

/// Approvals of AI-agent actions, each decided exactly once.
///
/// Every option can also be set by its environment variable or in a configuration file. A flag wins
/// over the environment, the environment over the file, and the file over the default.
///
/// Exit codes: 0 on record (or done); 1 other failure; 2 usage; 3 refused, because another decision
/// or payload is on record or the action is closed; 4 the outcome is unknown, ask
/// again with the same key, `--call-id` or token.
#[derive(Debug, Parser)]
#[command(name = "aegis", version, long_version = version(), max_term_width = 100)]
pub(crate) struct Cli {
    /// Reads settings from this TOML file.
    #[arg(long, env = "AEGIS_CONFIG", value_name = "FILE", global = true)]
    pub(crate) config: Option<PathBuf>,

    #[command(subcommand)]
    pub(crate) command: Command,
}

/// The version with what else is needed to tell two binaries apart: the commit, if the build was
/// given it in `AEGIS_COMMIT`, and the version of SQLite.
fn version() -> &'static str {
    static VERSION: LazyLock<String> = LazyLock::new(|| {
        format!(
            "{}\ncommit {}\nSQLite {}",
            env!("CARGO_PKG_VERSION"),
            option_env!("AEGIS_COMMIT").unwrap_or("unknown"),
            SqliteStore::engine_version()
        )
    });
    &VERSION
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

/// Parses a duration with its unit, such as `90d`.
pub(crate) fn lasting(text: &str) -> Result<Duration, String> {
    let refused =
        || "allowed is a whole number with s, m, h or d behind it, such as 90d".to_owned();
    let (number, unit) = text
        .char_indices()
        .last()
        .map(|(at, unit)| (&text[..at], unit))
        .ok_or_else(refused)?;
    let seconds = match unit {
        's' => 1,
        'm' => 60,
        'h' => 3600,
        'd' => 86_400,
        _ => return Err(refused()),
    };
    let number: u64 = number.parse().map_err(|_| refused())?;
    // A hundred years are more than any of these lasts, and no clock overflows by them.
    let most = 36_500 * 86_400;
    let seconds = number.checked_mul(seconds);
    let seconds = seconds.filter(|seconds| (1..=most).contains(seconds));
    seconds.map(Duration::from_secs).ok_or_else(refused)
}
