//! The `instar` command.

mod commands;

use std::process::ExitCode;

fn main() -> ExitCode {
    env_logger::Builder::from_env(env_logger::Env::new().filter_or("INSTAR_LOG", "warn")).init();
    let cli = match commands::parse() {
        Ok(cli) => cli,
        Err(error) => return commands::report(&error).into(),
    };
    match commands::run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            if !error.is_closed_pipe() {
                eprintln!("instar: {error}");
            }
            ExitCode::FAILURE
        }
    }
}
