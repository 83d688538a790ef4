//! The resize matrix: every kind of image, every change of its size, every way
//! of preallocation, asked for on the command line and through a mount.
//!
//! With it go images that qemu cannot make: samples of other programs, and
//! differencing images.
//!
//! The cells are generated from tables: [`kinds`] are the images, [`cells`]
//! what is done to them. Images are made and filled by qemu's programs, which
//! judge the result as well.

mod cells;
mod differencing;
mod judge;
mod kinds;
#[allow(dead_code)] // Shared: not every test binary needs all of it.
#[path = "../support/machine.rs"]
mod machine;
#[path = "../support/random.rs"]
mod random;
mod samples;
mod stage;
#[allow(dead_code)] // Shared: not every test binary needs all of it.
#[path = "../support/transcript.rs"]
mod transcript;

use cells::{Cell, Surface};
use libtest_mimic::{Arguments, Trial};
use machine::{missing_for_mounts, missing_program, trial};
use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let no_tools = missing_program(&["qemu-img", "qemu-io"]);
    let no_mounts = no_tools.clone().or_else(missing_for_mounts);
    let mut trials: Vec<Trial> = Cell::all(kinds::KINDS)
        .into_iter()
        .map(|cell| {
            let missing = match cell.surface {
                Surface::Command => no_tools.clone(),
                Surface::Truncate | Surface::Fallocate => no_mounts.clone(),
            };
            trial(cell.name(), missing, move || judge::cell(cell))
        })
        .collect();
    for extension in ["vhd", "vhdx"] {
        for (claim, body) in differencing::CLAIMS {
            let name = format!("differencing {extension}/{claim}");
            trials.push(trial(name, missing_for_mounts(), || body(extension)));
        }
    }
    let no_samples = no_mounts.or_else(|| missing_program(&["bzip2"]));
    for sample in samples::SAMPLES {
        let name = format!("sample/{}", sample.name);
        trials.push(trial(name, no_samples.clone(), || {
            samples::is_what_qemu_sees(sample)
        }));
    }
    libtest_mimic::run(&arguments, trials).exit_code()
}
