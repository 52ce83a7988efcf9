//! `aegis`: arguments in, the library does it, an exit code out.

mod args;
mod backup;
mod call;
mod config;
mod failure;
mod key_file;
mod keys;
mod log;
mod print;
mod reload;
mod serve;
mod signals;

use std::process::ExitCode;

use aegis_hitl::Decision;

use self::args::{Cli, Command, Keys};
use self::config::Config;
use self::failure::Failure;

/// The target of what the server's command logs: one filter, such as `aegis_hitl=debug`, holds for the library and for it.
const LOG: &str = "aegis_hitl";

fn main() -> ExitCode {
    let cli = Cli::read();
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            print::say(failure.message());
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
            Command::Serve(args) => serve::run(args, config.serve, cli.config).await,
            Command::Status(args) => call::status(args, &config.client).await,
            Command::Keys(Keys::New(args)) => keys::new(&args),
            Command::Backup(args) => backup::run(args, config.serve),
            Command::Check(args) => backup::check(&args),
            Command::Approve(args) => call::decide(Decision::Approve, args, &config.client).await,
            Command::Reject(args) => call::decide(Decision::Reject, args, &config.client).await,
        }
    })
}
