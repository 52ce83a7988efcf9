//! The log: lines on stderr, by a filter that can be replaced.

use std::fmt;
use std::io::{self, IsTerminal};

use tracing_subscriber::EnvFilter;
use tracing_subscriber::reload::Error;

use crate::failure::Failure;

/// The log of this process.
pub(crate) struct Log {
    replace: Box<dyn Fn(EnvFilter) -> Result<(), Error> + Send + Sync>,
}

impl Log {
    /// Starts to log what passes the filter.
    pub(crate) fn start(filter: Option<&str>) -> Result<Self, Failure> {
        let color = io::stderr().is_terminal()
            && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        let subscriber = tracing_subscriber::fmt()
            .with_writer(io::stderr)
            .with_ansi(color)
            // They would be told on stderr by `eprintln!`, which panics where stderr is what failed.
            .log_internal_errors(false)
            .with_env_filter(parse(filter)?)
            .with_filter_reloading();
        let handle = subscriber.reload_handle();
        subscriber.init();
        Ok(Self {
            replace: Box::new(move |filter| handle.reload(filter)),
        })
    }

    /// Replaces the filter. A bad one leaves the old one in force.
    pub(crate) fn set_filter(&self, filter: Option<&str>) -> Result<(), Failure> {
        let filter = parse(filter)?;
        (self.replace)(filter)
            .map_err(|error| Failure::other("cannot replace the log filter").because(error))
    }
}

impl fmt::Debug for Log {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Log").finish_non_exhaustive()
    }
}

fn parse(filter: Option<&str>) -> Result<EnvFilter, Failure> {
    EnvFilter::try_new(filter.unwrap_or("info"))
        .map_err(|error| Failure::usage("the log filter").because(error))
}
