//! The log: escaped lines on stderr, with a filter that can be replaced.

use std::fmt;
use std::io::{self, IsTerminal, Write};

use aegis_hitl::protocol::Escaped;
use clap::ValueEnum;
use serde::Deserialize;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::reload::Error;

use crate::failure::Failure;
use crate::stderr;

/// The log of this process.
pub(crate) struct Log {
    replace: Replace,
}

type Replace = Box<dyn Fn(EnvFilter) -> Result<(), Error> + Send + Sync>;

impl Log {
    /// Starts to log the events that pass the filter. From now on nothing that is written to stderr
    /// blocks.
    pub(crate) fn start(filter: Option<&str>, format: Format) -> Result<Self, Failure> {
        let filter = parse(filter)?;
        stderr::start_queue().map_err(|error| Failure::other("cannot start").because(error))?;
        let color = format == Format::Text
            && io::stderr().is_terminal()
            && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        let subscriber = tracing_subscriber::fmt()
            .with_writer(move || EscapedStderr { format, color })
            .with_ansi(color)
            // The subscriber reports its errors by `eprintln!`, which panics if stderr is what
            // failed.
            .log_internal_errors(false)
            .with_env_filter(filter);
        // Each format makes another type of the subscriber, and so of its handle.
        let replace: Replace = match format {
            Format::Text => {
                let subscriber = subscriber.with_filter_reloading();
                let handle = subscriber.reload_handle();
                subscriber.init();
                Box::new(move |filter| handle.reload(filter))
            }
            Format::Json => {
                let subscriber = subscriber.json().flatten_event(true);
                let subscriber = subscriber.with_filter_reloading();
                let handle = subscriber.reload_handle();
                subscriber.init();
                Box::new(move |filter| handle.reload(filter))
            }
        };
        Ok(Self { replace })
    }

    /// Replaces the filter. An invalid filter leaves the old one in force.
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

/// The format of the lines of a log.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Format {
    /// For people.
    #[default]
    Text,
    /// A JSON object on each line.
    Json,
}

/// Stderr for events. Their text is escaped, whoever logged them: paths and messages of other
/// programs can hold control characters.
struct EscapedStderr {
    format: Format,
    /// Whether to keep colors. They are the subscriber's own; it escapes those in an event.
    color: bool,
}

impl Write for EscapedStderr {
    /// Writes one event; the subscriber passes each event in one call.
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        let text = String::from_utf8_lossy(event);
        let mut rest = text.strip_suffix('\n').unwrap_or(&text);
        if self.format == Format::Json {
            stderr::write(format!("{}\n", Escaped::json(rest)));
            return Ok(event.len());
        }
        let mut line = String::with_capacity(text.len());
        while let Some((before, color, after)) = next_color(rest).filter(|_| self.color) {
            line.push_str(&Escaped::line(before).to_string());
            line.push_str(color);
            rest = after;
        }
        line.push_str(&Escaped::line(rest).to_string());
        line.push('\n');
        stderr::write(line);
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Splits at the first sequence that sets a color or a style: `ESC [ digits and semicolons m`.
fn next_color(text: &str) -> Option<(&str, &str, &str)> {
    let mut from = 0;
    loop {
        let start = from + text.get(from..)?.find("\u{1b}[")?;
        from = start + 2;
        let parameters = text.get(from..)?;
        let end = from + parameters.find(|digit: char| !digit.is_ascii_digit() && digit != ';')?;
        if text.get(end..)?.starts_with('m') {
            let (before, rest) = text.split_at_checked(start)?;
            let (color, after) = rest.split_at_checked(end + 1 - start)?;
            return Some((before, color, after));
        }
    }
}

/// h2 warns of each connection that resets too many streams, so that any peer could fill the log.
const DEFAULT: &str = "info,h2=error";

fn parse(filter: Option<&str>) -> Result<EnvFilter, Failure> {
    EnvFilter::try_new(filter.unwrap_or(DEFAULT))
        .map_err(|error| Failure::usage("the log filter").because(error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_color_is_told_from_what_else_a_terminal_obeys() {
        for (text, split) in [
            ("a\u{1b}[1;31mb", Some(("a", "\u{1b}[1;31m", "b"))),
            ("\u{1b}[m", Some(("", "\u{1b}[m", ""))),
            ("\u{1b}[2J\u{1b}[0mé", Some(("\u{1b}[2J", "\u{1b}[0m", "é"))),
            ("\u{1b}[2", None),
            ("\u{1b}]0;m", None),
            ("é", None),
        ] {
            assert_eq!(next_color(text), split, "{text:?}");
        }
    }
}
