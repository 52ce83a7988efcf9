//! JSON from the command line, a file or standard input.

use std::fs;
use std::io::{self, Read};

use aegis_hitl::Payload;
use aegis_hitl::protocol::JsonText;

use crate::failure::Failure;

/// Reads what an argument stands for: itself, a file (`@FILE`) or standard input (`-`).
pub(crate) fn text_of(argument: &str) -> Result<String, Failure> {
    let unreadable = |error: io::Error| Failure::usage("cannot read the payload").because(error);
    match argument.strip_prefix('@') {
        Some(path) => fs::read_to_string(path).map_err(unreadable),
        None if argument == "-" => {
            let mut input = String::new();
            io::stdin().read_to_string(&mut input).map_err(unreadable)?;
            Ok(input)
        }
        None => Ok(argument.to_owned()),
    }
}

/// Reads a payload.
pub(crate) fn payload_of(argument: &str) -> Result<Payload, Failure> {
    Payload::from_json(&text_of(argument)?).map_err(|error| {
        Failure::usage("the payload is not a JSON object; allowed are JSON, @FILE and -")
            .because(error)
    })
}

/// Reads a JSON value.
pub(crate) fn json_of(argument: &str) -> Result<JsonText, Failure> {
    JsonText::from_json(&text_of(argument)?).map_err(|error| {
        Failure::usage("the result is not JSON; allowed are JSON, @FILE and -").because(error)
    })
}
