//! The command line against qemu-img: equal output, equal messages, equal exit
//! codes, in both sandboxes.
//!
//! What qemu-img 10.0 says is recorded in `tests/data/cli`, so the comparison
//! needs no qemu-img; where one is installed, it is asked whether it still says
//! so. Images that are too large to be kept with the tests are made on the spot,
//! if there is a qemu-img; what seven versions say of the damaged ones is recorded
//! as well. `INSTAR_QEMU_IMG` names another qemu-img to ask, of any version: instar
//! then follows that version. `INSTAR_BLESS=1` records what it says.

#[path = "../support/answers.rs"]
mod answers;
mod called;
mod cases;
mod changed;
mod checked;
mod damaged;
mod differential;
mod draw;
mod live;
#[allow(dead_code)] // Shared: not every test binary needs all of it.
#[path = "../support/machine.rs"]
mod machine;
mod own;
#[path = "../support/random.rs"]
mod random;
#[allow(dead_code)] // Shared: not every test binary needs all of it.
#[path = "../support/recording.rs"]
mod recorded;
#[path = "../support/transcript.rs"]
mod transcript;

use cases::Case;
use checked::CHECK;
use libtest_mimic::{Arguments, Trial};
use machine::{
    Outcome, missing_program, missing_qemu_img_10, qemu_img, qemu_img_version, sandboxes, trial,
};
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use transcript::Step;

const INSTAR: &str = env!("CARGO_BIN_EXE_instar");

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    if std::env::var_os("INSTAR_BLESS").is_some() {
        return match bless() {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("{error}");
                ExitCode::FAILURE
            }
        };
    }
    let mut trials: Vec<Trial> = cases::CASES
        .iter()
        .map(|case| {
            let name = format!("qemu-img still says so/{}", case.name);
            trial(name, missing_qemu_img_10(), || still_recorded(case))
        })
        .collect();
    for (sandbox, missing) in sandboxes() {
        for case in cases::CASES {
            let name = format!("{sandbox}/as qemu-img/{}", case.name);
            trials.push(trial(name, missing.clone(), || as_recorded(case, sandbox)));
        }
        for case in live::CASES {
            let name = format!("{sandbox}/as qemu-img today/{}", case.name);
            let missing = missing
                .clone()
                .or_else(|| missing_program(&["qemu-img", "qemu-io"]));
            trials.push(trial(name, missing, || live::as_qemu_img(case, sandbox)));
        }
        for (name, body) in called::CASES {
            let name = format!("{sandbox}/called qemu-img/{name}");
            trials.push(trial(name, missing.clone(), || body(sandbox)));
        }
        for (name, body) in own::CASES {
            let name = format!("{sandbox}/{name}");
            trials.push(trial(name, missing.clone(), || body(sandbox)));
        }
    }
    let (sandbox, missing) = a_sandbox();
    let no_tools = missing.or_else(|| missing_program(&["qemu-img", "qemu-io"]));
    damages(&mut trials, sandbox, &no_tools);
    let name = "recordings/exactly the cases";
    trials.push(trial(name, None, recordings_are_the_cases));
    trials.extend(other_versions());
    trials.extend(differential_runs());
    libtest_mimic::run(&arguments, trials).exit_code()
}

/// Damaged images, as recorded and as by the qemu-img that is installed.
fn damages(trials: &mut Vec<Trial>, sandbox: &'static str, no_tools: &Option<String>) {
    let not_recorded = answers::missing(CHECK);
    trials.extend(checked::tripwires());
    let not_run = not_recorded.or_else(|| no_tools.clone());
    let not_asked = not_run.clone().or_else(|| answers::missing_version(CHECK));
    for damage in damaged::DAMAGES {
        let name = format!("qemu-img still says so/check/{}", damage.name);
        trials.push(trial(name, not_asked.clone(), || {
            checked::still_says_so(damage)
        }));
        let name = format!("{sandbox}/damaged as recorded/{}", damage.name);
        trials.push(trial(name, not_run.clone(), || {
            checked::as_recorded(damage, sandbox)
        }));
        let name = format!("{sandbox}/damaged/{}", damage.name);
        trials.push(trial(name, no_tools.clone(), || {
            damaged::as_qemu_img(damage, sandbox)
        }));
    }
}

/// A sandbox that works here, rather the one that starts at once: what does not
/// depend on it is tried in one.
fn a_sandbox() -> (&'static str, Option<String>) {
    let all = sandboxes();
    let works = all.iter().rfind(|(_, missing)| missing.is_none());
    works.or(all.first()).cloned().unwrap_or(("process", None))
}

/// Every recorded command by a qemu-img of another version, where one is named.
fn other_versions() -> Vec<Trial> {
    if missing_qemu_img_10().is_none() {
        return Vec::new();
    }
    let (sandbox, missing) = a_sandbox();
    let missing = missing.or_else(|| missing_program(&["qemu-img"]));
    let trials = cases::CASES.iter().map(|case| {
        let name = format!("{sandbox}/as another qemu-img/{}", case.name);
        trial(name, missing.clone(), || as_another(case, sandbox))
    });
    trials.collect()
}

/// The shares of a differential run; the seed stands in their names.
fn differential_runs() -> Vec<Trial> {
    const SHARES: u64 = 4;
    let (sandbox, missing) = a_sandbox();
    let missing = missing
        .or_else(|| missing_program(&["qemu-img", "qemu-io"]))
        .or_else(missing_qemu_img_10);
    let seed = differential::seed();
    let rounds = differential::rounds();
    let trials = (0..SHARES).map(|share| {
        let name = format!("{sandbox}/{rounds} random images, seed {seed}/{share}");
        trial(name, missing.clone(), move || {
            differential::run(seed, share, SHARES, sandbox)
        })
    });
    trials.collect()
}

/// A folder with the files of a case.
pub fn folder(files: &[&str]) -> Result<tempfile::TempDir, String> {
    let folder = tempfile::tempdir().map_err(|error| format!("temporary folder: {error}"))?;
    for file in files {
        // Whole bytes: how many holes a copy has must not depend on the machine.
        fs::read(data().join("images").join(file))
            .and_then(|bytes| fs::write(folder.path().join(file), bytes))
            .map_err(|error| format!("{file}: {error}"))?;
    }
    Ok(folder)
}

/// Runs instar in a folder.
pub fn instar(folder: &Path, sandbox: &str, args: &[String]) -> Result<Step, String> {
    transcript::run(folder, INSTAR, args, &[("INSTAR_ISOLATION", sandbox)])
}

/// Runs instar as the qemu-img of the version that is asked.
pub fn instar_now(folder: &Path, sandbox: &str, args: &[String]) -> Result<Step, String> {
    instar_as(&qemu_img_version()?, folder, sandbox, args)
}

/// Runs instar as the qemu-img of a version.
pub fn instar_as(
    version: &str,
    folder: &Path,
    sandbox: &str,
    args: &[String],
) -> Result<Step, String> {
    let environment = [
        ("INSTAR_ISOLATION", sandbox),
        ("INSTAR_QEMU_VERSION", version),
    ];
    transcript::run(folder, INSTAR, args, &environment)
}

fn data() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data")
}

fn recording(case: &Case) -> PathBuf {
    data().join(format!("cli/{}.txt", case.name))
}

/// Whether the recordings and the table name the same cases.
fn recordings_are_the_cases() -> Outcome {
    let files = fs::read_dir(data().join("cli")).map_err(|error| error.to_string())?;
    let names = files
        .flatten()
        .map(|file| file.file_name().display().to_string());
    let recorded: BTreeSet<String> = names.collect();
    let table = cases::CASES.iter().map(|case| format!("{}.txt", case.name));
    let table: BTreeSet<String> = table.collect();
    let different: Vec<&String> = table.symmetric_difference(&recorded).collect();
    match (different.is_empty(), table.len() == cases::CASES.len()) {
        (true, true) => Ok(()),
        (true, false) => Err("two cases have one name".to_owned()),
        (false, _) => Err(format!("in the table or in the folder only: {different:?}")),
    }
}

fn recorded(case: &Case) -> Result<Vec<Step>, String> {
    let path = recording(case);
    let text = fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))?;
    let steps = transcript::parse(&text);
    let commands = steps.iter().map(|step| step.args.clone());
    let wanted = case.commands.iter().map(|line| transcript::words(line));
    match commands.eq(wanted) {
        true => Ok(steps),
        false => Err(format!("{} records other commands", path.display())),
    }
}

fn as_recorded(case: &Case, sandbox: &str) -> Outcome {
    as_recorded_by(case, INSTAR, sandbox)
}

/// By instar under the name of `program`.
pub fn as_recorded_by(case: &Case, program: &str, sandbox: &str) -> Outcome {
    let folder = folder(case.files)?;
    for expected in recorded(case)? {
        let environment = [("INSTAR_ISOLATION", sandbox)];
        let got = transcript::run(folder.path(), program, &expected.args, &environment)?;
        if program != INSTAR && got.stderr.contains("instar") {
            return Err(got.stderr);
        }
        transcript::same(&expected, &got)?;
    }
    Ok(())
}

fn ask_qemu_img(case: &Case) -> Result<Vec<Step>, String> {
    let folder = folder(case.files)?;
    let commands = case.commands.iter();
    commands
        .map(|line| transcript::run(folder.path(), qemu_img(), &transcript::words(line), &[]))
        .collect()
}

fn as_another(case: &Case, sandbox: &str) -> Outcome {
    let version = qemu_img_version()?;
    let (theirs, ours) = (folder(case.files)?, folder(case.files)?);
    let mut differences = String::new();
    for line in case.commands {
        let args = transcript::words(line);
        let expected = transcript::run(theirs.path(), qemu_img(), &args, &[])?;
        let got = instar_now(ours.path(), sandbox, &args)?;
        let known = changed::is_known(&version, case.name, line);
        if let (false, Err(why)) = (known, transcript::same(&expected, &got)) {
            differences.push_str(&why);
        }
    }
    match differences.is_empty() {
        true => Ok(()),
        false => Err(differences),
    }
}

fn still_recorded(case: &Case) -> Outcome {
    let live = ask_qemu_img(case)?;
    let pairs = recorded(case)?.into_iter().zip(live);
    pairs
        .into_iter()
        .try_for_each(|(recorded, live)| transcript::same(&recorded, &live))
}

/// Records what the qemu-img that is asked says: of the damages in any case, and
/// to the commands if it is the version whose texts are kept.
fn bless() -> Outcome {
    let version = qemu_img_version()?;
    if version.starts_with("10.0.") && recorded::root().1 {
        cases::CASES.iter().try_for_each(record)?;
    }
    checked::record()
}

fn record(case: &Case) -> Outcome {
    let steps = ask_qemu_img(case)?;
    fs::write(recording(case), transcript::text(&steps))
        .map_err(|error| format!("{}: {error}", recording(case).display()))
}
