//! Output: data to stdout, messages to stderr.
//!
//! `println!` and `eprintln!` panic when the reader is gone. That must not end a command in the
//! middle of its work, nor a server.

use std::io::{self, Write};

use aegis_hitl::protocol::Escaped;

use crate::failure::Failure;
use crate::stderr;

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

/// Shows a message to the user. It is lost if nobody reads stderr.
pub(crate) fn say(message: &str) {
    stderr::write(format!("aegis: {}\n", Escaped::line(message)));
}
