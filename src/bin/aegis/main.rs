//! `aegis`: arguments in, the library does it, an exit code out.

#![forbid(unsafe_code)]
// Data goes to stdout and messages to stderr; that is what a command does.
#![allow(clippy::print_stdout, clippy::print_stderr)]

mod args;
mod call;
mod config;
mod failure;
mod keys;
mod serve;

use std::process::ExitCode;

use aegis_hitl::Decision;
use clap::Parser;

use self::args::{Cli, Command, Keys};
use self::config::Config;
use self::failure::Failure;

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("aegis: {}", failure.message());
            failure.code()
        }
    }
}

fn run(cli: Cli) -> Result<(), Failure> {
    let config = Config::read(cli.config.as_deref())?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::other("cannot start").because(error))?;
    runtime.block_on(async {
        match cli.command {
            Command::Serve(args) => serve::run(args, config.serve).await,
            Command::Status(args) => call::status(args, &config.client).await,
            Command::Keys(Keys::New(args)) => keys::new(&args),
            Command::Approve(args) => call::decide(Decision::Approve, args, &config.client).await,
            Command::Reject(args) => call::decide(Decision::Reject, args, &config.client).await,
        }
    })
}
