//! What goes out: data to stdout, messages to stderr.
//!
//! Not by `println!` and `eprintln!`: they panic where nobody reads any more, and that must end neither a command in the
//! middle of its work nor a server.

use std::io::{self, Write};

use aegis_hitl::protocol::Escaped;

use crate::failure::Failure;

/// Prints data.
pub(crate) fn print(text: &str) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush())
        .map_err(|error| Failure::other("cannot print the answer").because(error))
}

pub(crate) fn print_json(value: &impl serde::Serialize) -> Result<(), Failure> {
    let text = serde_json::to_string(value)
        .map_err(|error| Failure::other("cannot print the answer").because(error))?;
    print(&format!("{}\n", Escaped::json(&text)))
}

/// Tells people something, if they listen.
pub(crate) fn say(message: &str) {
    let line = format!("aegis: {}\n", Escaped::line(message));
    // In one piece, so that a line of the log does not get in between.
    let _ = io::stderr().write_all(line.as_bytes());
}
