//! Resizing images: one table of cases against the recordings of seven qemu-img
//! versions and against the qemu-img that is installed, in six ways; images with
//! every feature; new images over the options of every format, against the same
//! versions; and every way to be refused.
//!
//! `INSTAR_QEMU_IMG` names another qemu-img to ask, `INSTAR_TESTDATA_PATH` another
//! set of recordings, and `INSTAR_BLESS=1` has that qemu-img recorded there.

#[path = "../support/answers.rs"]
mod answers;
mod baseline;
mod cases;
mod consistency;
mod created;
mod creation;
mod errors;
mod info;
mod live;
mod lock;
#[allow(dead_code)] // Shared: not every test binary needs all of it.
#[path = "../support/machine.rs"]
mod machine;
mod matrix;
#[allow(dead_code)] // Shared: not every test binary needs all of it.
#[path = "../support/recording.rs"]
mod recorded;
mod recorder;
mod recording;
mod tools;
#[allow(dead_code)] // Shared: not every test binary needs all of it.
#[path = "../support/transcript.rs"]
mod transcript;

use cases::{CASES, Case, TARGETS};
use created::CREATE;
use libtest_mimic::{Arguments, Trial};
use machine::{Outcome, missing_program, sandboxes, trial};
use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    if std::env::var_os("INSTAR_BLESS").is_some() {
        return match recorder::record() {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("{error}");
                ExitCode::FAILURE
            }
        };
    }
    let mut trials = recordings();
    let sandboxes = sandboxes();
    // What the engine says and does is the same in every sandbox.
    let (first, missing) = match sandboxes.iter().find(|(_, missing)| missing.is_none()) {
        Some(&(sandbox, _)) => (sandbox, None),
        None => sandboxes.first().cloned().unwrap_or_default(),
    };
    let with = |programs: &[&str]| missing.clone().or_else(|| missing_program(programs));
    let no_tools = with(&["qemu-img", "qemu-io"]);
    for way in WAYS {
        for case in CASES.iter().filter(|case| (way.of)(case)) {
            let name = format!("{first}/{}/{}/{}", way.name, case.target, case.name);
            trials.push(trial(name, no_tools.clone(), move || {
                (way.body)(case, first)
            }));
        }
    }
    creations(&mut trials, first, &missing, &no_tools);
    refusals(&mut trials, first, &missing, &no_tools);
    for (sandbox, missing) in sandboxes {
        let no_tools = missing.or_else(|| missing_program(&["qemu-img", "qemu-io"]));
        for variant in matrix::VARIANTS {
            for growth in matrix::growths(sandbox) {
                let name = format!("{sandbox}/growth/{}/{}", variant.name, growth.name);
                trials.push(trial(name, no_tools.clone(), move || {
                    matrix::round_trip(variant, growth, sandbox)
                }));
            }
        }
    }
    libtest_mimic::run(&arguments, trials).exit_code()
}

/// A way to look at every case.
struct Way {
    name: &'static str,
    /// Which cases it is about.
    of: fn(&Case) -> bool,
    /// The body gets the sandbox.
    body: fn(&Case, &str) -> Outcome,
}

const WAYS: &[Way] = &[
    Way {
        name: "as recorded",
        of: |_| true,
        body: baseline::as_recorded,
    },
    Way {
        name: "as qemu-img today",
        of: Case::qemu_resizes,
        body: live::as_qemu_img,
    },
    Way {
        name: "round trip",
        of: |_| true,
        body: live::stays_sound,
    },
    Way {
        name: "size and content",
        of: |case| !case.qemu_resizes(),
        body: consistency::size_and_content,
    },
];

/// Whether the recordings are what they are said to be.
fn recordings() -> Vec<Trial> {
    let name = "recordings/every version of every target";
    let mut trials = vec![trial(name, None, baseline::every_version)];
    for &target in TARGETS {
        for version in recording::versions() {
            let name = format!("recordings/{target}/{version} has exactly the cases");
            trials.push(trial(name, None, move || {
                baseline::names_the_same(target, &version)
            }));
        }
    }
    for case in CASES {
        let name = format!("qemu-img still says so/{}/{}", case.target, case.name);
        trials.push(trial(name, missing_program(&["qemu-img"]), || {
            baseline::still_says_so(case)
        }));
    }
    trials
}

/// New images, as recorded and as by the qemu-img that is installed.
fn creations(
    trials: &mut Vec<Trial>,
    sandbox: &'static str,
    missing: &Option<String>,
    no_tools: &Option<String>,
) {
    let version = machine::qemu_img_version().unwrap_or_default();
    let not_recorded = answers::missing(CREATE);
    trials.extend(created::tripwires());
    let not_asked = not_recorded
        .clone()
        .or_else(|| missing_program(&["qemu-img"]))
        .or_else(|| answers::missing_version(CREATE));
    for creation in creation::CREATIONS {
        let row = creation.name();
        let name = format!("qemu-img still says so/create/{row}");
        trials.push(trial(name, not_asked.clone(), || {
            created::still_says_so(creation)
        }));
        let not_run = not_recorded.clone().or_else(|| missing.clone());
        let name = format!("{sandbox}/new as recorded/{row}");
        trials.push(trial(name, not_run, move || {
            created::as_recorded(creation, sandbox)
        }));
        let name = format!("{sandbox}/new as by qemu-img/{row}");
        let other = no_tools.clone().or_else(|| creation.too_early(&version));
        trials.push(trial(name, other, move || {
            creation::as_qemu_img(creation, sandbox)
        }));
    }
}

/// What is refused, and images that others use.
fn refusals(
    trials: &mut Vec<Trial>,
    sandbox: &'static str,
    missing: &Option<String>,
    no_tools: &Option<String>,
) {
    for refusal in errors::REFUSALS {
        let name = format!("{sandbox}/refused/{}", refusal.name);
        trials.push(trial(name, missing.clone(), move || {
            errors::refused(refusal, sandbox)
        }));
    }
    for wish in errors::WISHES {
        for format in wish.formats {
            let name = format!("{sandbox}/refused/{format}, {}", wish.name);
            trials.push(trial(name, missing.clone(), move || {
                errors::as_wished(wish, format, sandbox)
            }));
            if wish.as_qemu_img {
                let name = format!("{sandbox}/refused as by qemu-img/{format}, {}", wish.name);
                trials.push(trial(name, no_tools.clone(), move || {
                    errors::as_by_qemu_img(wish, format, sandbox)
                }));
            }
        }
    }
    for (name, needs, body) in errors::OTHERS {
        let missing = missing.clone().or_else(needs);
        trials.push(trial(
            format!("{sandbox}/refused/{name}"),
            missing,
            move || body(sandbox),
        ));
    }
    for (name, body) in lock::CASES {
        let name = format!("{sandbox}/locks/{name}");
        trials.push(trial(name, no_tools.clone(), move || body(sandbox)));
    }
    let name = format!("{sandbox}/refused/a full disk leaves the image as it was");
    let missing = no_tools.clone().or_else(errors::missing_small_disk);
    trials.push(trial(name, missing, move || errors::full_disk(sandbox)));
}
