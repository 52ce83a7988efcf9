//! `aegis`: parses arguments, calls the library, and returns an exit code.

mod agent;
mod args;
mod command;
mod config;
mod connect;
mod failure;
mod file;
mod input;
mod key_file;
mod listen;
mod log;
mod print;
mod reload;
mod signals;
mod stderr;
mod store;
mod tls_files;
mod trail;
#[cfg(unix)]
mod unix_socket;
mod view;
mod webhook;

use std::process::ExitCode;

use clap::Parser;

use self::args::Cli;
use self::command::Context;
use self::config::Config;
use self::failure::Failure;

/// The target of the binary's own events. It is the library's, so that one filter, such as
/// `aegis_hitl=debug`, covers both.
const LOG: &str = "aegis_hitl";

fn main() -> ExitCode {
    let cli = Cli::parse();
    let code = match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            print::say(failure.message());
            failure.code()
        }
    };
    stderr::flush();
    code
}

fn run(cli: Cli) -> Result<(), Failure> {
    let is_hook = matches!(cli.command, command::Command::Hook(_));
    if is_hook {
        command::hook::block_on_panic();
    }
    let config = Config::read(cli.config.as_deref())?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::other("cannot start").because(error))
        .map_err(|failure| if is_hook { failure.blocks() } else { failure })?;
    let context = Context {
        config,
        file: cli.config,
    };
    let done = runtime.block_on(cli.command.run(context));
    // A name that is being resolved must not keep the process alive.
    runtime.shutdown_background();
    done
}
