//! `aegis completions` and `aegis man`.

use clap::{Args, CommandFactory};
use clap_complete::Shell;

use super::Context;
use crate::args::Cli;
use crate::failure::Failure;
use crate::print::print;

#[derive(Debug, Args)]
pub(crate) struct Completions {
    /// The shell.
    pub(crate) shell: Shell,
}

#[derive(Debug, Args)]
pub(crate) struct Man {
    /// The command whose page is printed, such as serve [default: aegis itself].
    pub(crate) command: Option<String>,
}

/// Prints completions for a shell.
pub(crate) async fn completions(args: Completions, _: Context) -> Result<(), Failure> {
    let mut text = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "aegis", &mut text);
    print(&String::from_utf8_lossy(&text))
}

/// Prints a man page.
pub(crate) async fn man(args: Man, _: Context) -> Result<(), Failure> {
    let mut command = Cli::command();
    command.build();
    if let Some(name) = args.command {
        let found = command.find_subcommand(&name).cloned();
        command = found
            .ok_or_else(|| Failure::usage("there is no such command; see 'aegis --help'"))?
            .display_name(format!("aegis-{name}"));
    }
    let mut text = Vec::new();
    clap_mangen::Man::new(command)
        .render(&mut text)
        .map_err(|error| Failure::other("cannot write the page").because(error))?;
    print(&String::from_utf8_lossy(&text))
}
