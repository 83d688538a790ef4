//! Resizing images: against recordings of seven qemu-img versions,
//! against the qemu-img that is installed, and every way to be refused.

mod errors;
mod lock;
#[allow(dead_code)] // Shared: not every test binary needs all of it.
#[path = "../support/machine.rs"]
mod machine;
mod matrix;
mod recorded;
mod tools;
#[path = "../support/transcript.rs"]
mod transcript;

use libtest_mimic::{Arguments, Trial};
use machine::{missing_program, sandboxes, trial};
use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let mut trials: Vec<Trial> = Vec::new();
    for case in recorded::cases() {
        let name = format!("qemu-img still says so/{case}");
        trials.push(trial(name, missing_program(&["qemu-img"]), move || {
            recorded::still_says_so(&case)
        }));
    }
    for (sandbox, missing) in sandboxes() {
        for case in recorded::cases() {
            let name = format!("{sandbox}/as recorded/{case}");
            trials.push(trial(name, missing.clone(), move || {
                recorded::as_recorded(&case, sandbox)
            }));
        }
        let no_tools = missing
            .clone()
            .or_else(|| missing_program(&["qemu-img", "qemu-io"]));
        for variant in matrix::VARIANTS {
            for growth in matrix::growths(sandbox) {
                let name = format!("{sandbox}/round trip/{}/{}", variant.name, growth.name);
                trials.push(trial(name, no_tools.clone(), move || {
                    matrix::round_trip(variant, growth, sandbox)
                }));
            }
        }
        for refusal in errors::REFUSALS {
            let name = format!("{sandbox}/refused/{}", refusal.name);
            trials.push(trial(name, missing.clone(), move || {
                errors::refused(refusal, sandbox)
            }));
        }
        for (name, needs, body) in errors::OTHERS {
            let missing = missing.clone().or_else(needs);
            trials.push(trial(format!("{sandbox}/refused/{name}"), missing, || {
                body(sandbox)
            }));
        }
        for (name, body) in lock::CASES {
            let name = format!("{sandbox}/locks/{name}");
            trials.push(trial(name, no_tools.clone(), || body(sandbox)));
        }
        let name = format!("{sandbox}/refused/a full disk leaves the image as it was");
        let missing = no_tools.or_else(errors::missing_small_disk);
        trials.push(trial(name, missing, || errors::full_disk(sandbox)));
    }
    libtest_mimic::run(&arguments, trials).exit_code()
}
