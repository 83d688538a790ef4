//! Shell completions and manual pages, from the same definitions as the parser.

use super::{Cli, Error, say};
use clap::{Command, CommandFactory};
use clap_complete::Shell;

/// Arguments of `completions`.
#[derive(Debug, clap::Args)]
pub struct CompletionsArgs {
    /// The shell
    #[arg(value_enum)]
    shell: Shell,
}

/// Arguments of `man`.
#[derive(Debug, clap::Args)]
pub struct ManArgs {
    /// The command, instead of instar as a whole
    #[arg(value_name = "COMMAND")]
    command: Option<String>,
}

/// Prints completions.
pub fn completions(args: &CompletionsArgs) -> Result<(), Error> {
    let mut text = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "instar", &mut text);
    say(&String::from_utf8_lossy(&text))
}

/// Prints a manual page.
pub fn man(args: &ManArgs) -> Result<(), Error> {
    let mut text = Vec::new();
    clap_mangen::Man::new(page(args)?)
        .render(&mut text)
        .map_err(Error::Output)?;
    say(&String::from_utf8_lossy(&text))
}

fn page(args: &ManArgs) -> Result<Command, Error> {
    let mut whole = Cli::command().disable_help_subcommand(true);
    whole.build();
    let Some(name) = &args.command else {
        return Ok(whole);
    };
    match whole.find_subcommand(name) {
        Some(command) => Ok(command.clone()),
        None => Err(Error::Refused(format!("Command not found: {name}"))),
    }
}
