//! Promises that are tested from outside: what operations cost, and that only
//! the guest knows formats.

mod costs;
mod source;
#[path = "../support/tools.rs"]
mod tools;

use instar::sandbox::{Config, Isolation, Pool};
use libtest_mimic::{Arguments, Completion, Failed, Trial};
use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let mut trials = vec![
        plain(
            "source/the host knows no magic number",
            source::host_knows_no_magic,
        ),
        plain(
            "source/the search finds the guest's",
            source::search_finds_the_guests_magic,
        ),
        plain("costs/limits are kept", costs::limits_are_kept),
    ];
    for isolation in [Isolation::Kvm, Isolation::Process] {
        let name = format!("costs/documented costs are real/{isolation}");
        trials.push(Trial::ignorable_test(name, move || {
            if let Some(reason) = tools::missing_oracle() {
                return Ok(Completion::ignored_with(reason));
            }
            let pool = match Pool::new(Config {
                isolation,
                ..Config::default()
            }) {
                Ok(pool) => pool,
                Err(error) => return Ok(Completion::ignored_with(error)),
            };
            costs::documented_costs_are_real(&pool)?;
            Ok(Completion::Completed)
        }));
    }
    libtest_mimic::run(&arguments, trials).exit_code()
}

fn plain(name: &str, body: fn() -> Result<(), String>) -> Trial {
    Trial::test(name, move || body().map_err(Failed::from))
}
