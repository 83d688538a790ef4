//! The real executor under the crash explorer: what reaches the files through
//! an open image, sandbox and all, leaves the old disk or the new one too.
//!
//! The explorer itself lives beside the engine, which has a test program of its
//! own for the plans.

#[expect(dead_code, reason = "the plans' own program uses all of it")]
#[path = "../../guest/tests/crash/explorer.rs"]
mod explorer;
mod recorded;

use explorer::case::Ask;
use explorer::{cases, full_name, seed, tools};
use libtest_mimic::{Arguments, Completion, Failed, Trial};
use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let seed = seed();
    // Settling and repairs are commands of their own, not changes of an open image.
    let made = cases().filter(|case| !matches!(case.ask, Ask::Settle | Ask::Repair(_)));
    let trials = made.map(|case| {
        let name = format!("executor/{}", full_name(case));
        Trial::ignorable_test(name, move || match tools::missing_oracle() {
            Some(reason) => Ok(Completion::ignored_with(reason)),
            None => recorded::is_as_good_as_the_plan(case, seed)
                .map(|()| Completion::Completed)
                .map_err(Failed::from),
        })
    });
    libtest_mimic::run(&arguments, trials.collect()).exit_code()
}
