//! Promises that are tested from outside: only the guest knows formats, the
//! host believes no guest, and operations cost what the document says.

mod costs;
#[allow(dead_code)] // Shared: not every test binary needs all of it.
#[path = "../support/machine.rs"]
mod machine;
#[expect(dead_code, reason = "shared; not every test binary needs all of it")]
#[path = "../support/random.rs"]
mod random;
mod script;
mod script_mount;
#[path = "../support/scripted.rs"]
mod scripted;
mod source;
#[expect(dead_code, reason = "shared; not every test binary needs all of it")]
#[path = "../support/tools.rs"]
mod tools;

use instar::sandbox::{Config, Isolation, Pool};
use libtest_mimic::{Arguments, Trial};
use machine::{Outcome, trial};
use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let mut trials = vec![
        trial(
            "source/the host knows no magic number",
            None,
            source::host_knows_no_magic,
        ),
        trial(
            "source/the search finds the guest's",
            None,
            source::search_finds_the_guests_magic,
        ),
        trial("costs/limits are kept", None, costs::limits_are_kept),
    ];
    for (name, missing) in machine::sandboxes() {
        let isolation = match name {
            "kvm" => Isolation::Kvm,
            _ => Isolation::Process,
        };
        trials.extend(sandboxed(isolation, missing));
    }
    libtest_mimic::run(&arguments, trials).exit_code()
}

/// The trials that need a sandbox.
fn sandboxed(isolation: Isolation, missing: Option<String>) -> Vec<Trial> {
    let with = |name: &str, also: Option<String>, body: fn(Isolation) -> Outcome| {
        let missing = missing.clone().or(also);
        trial(format!("{isolation}/{name}"), missing, move || {
            body(isolation)
        })
    };
    vec![
        with(
            "costs/documented costs are real",
            tools::missing_oracle(),
            documented_costs_are_real,
        ),
        with(
            "script/open, facts, read and resize act on it alone",
            None,
            script::the_script_decides,
        ),
        with(
            "script/a mount acts on it alone",
            machine::missing_for_mounts(),
            script_mount::the_script_decides,
        ),
        with(
            "script/plans that reach too far are refused",
            None,
            script::misdeeds_are_refused,
        ),
        with(
            "script/extents that reach too far are refused",
            None,
            script::extents_are_checked,
        ),
    ]
}

fn documented_costs_are_real(isolation: Isolation) -> Outcome {
    let config = Config {
        isolation,
        ..Config::default()
    };
    let pool = Pool::new(config).map_err(|error| error.to_string())?;
    costs::documented_costs_are_real(&pool)
}
