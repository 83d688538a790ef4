//! The `instar` command.

mod commands;

use std::process::ExitCode;

fn main() -> ExitCode {
    let cli = match commands::parse() {
        Ok(cli) => cli,
        Err(error) => return commands::report(&error).into(),
    };
    // A mount chooses where its log goes, once it is in the background.
    if !matches!(cli.command, commands::Command::Mount(_)) {
        let choice = env_logger::Env::new().filter_or("INSTAR_LOG", "warn");
        env_logger::Builder::from_env(choice).init();
    }
    match commands::run(cli) {
        Ok(code) => code.into(),
        Err(error) => {
            if !error.is_closed_pipe() {
                commands::complain(&format!("{}: {error}\n", commands::program::name()));
            }
            error.exit_code().into()
        }
    }
}
