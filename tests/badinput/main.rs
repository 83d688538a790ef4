//! Hostile images through the real program and the mount: one case for each
//! validated field, names that reach for other files, compressed garbage and
//! bombs, and random damage.
//!
//! A refusal says what is wrong, ends with exit status 1 (EIO and the like on
//! the mount) and leaves the image byte-identical. Nothing panics, hangs or
//! takes memory without bound. `INSTAR_ISOLATION` restricts the sandboxes that
//! are tried; `INSTAR_FLIP_SEED` repeats or varies the random damage.

mod bombs;
mod bytes;
mod damage;
mod flips;
mod inprocess;
#[allow(dead_code)] // Shared: not every test binary needs all of it.
#[path = "../support/machine.rs"]
mod machine;
mod mounted;
mod names;
mod pool;
mod program;
#[path = "../support/random.rs"]
mod random;
mod refusals;
#[path = "../support/tools.rs"]
mod tools;
#[path = "../support/xattr.rs"]
mod xattr;

use damage::Damage;
use libtest_mimic::{Arguments, Trial};
use machine::{missing_for_mounts, trial};
use std::process::ExitCode;
use std::sync::{Arc, Mutex};

/// The seed where the environment names none: runs are alike by default.
const SEED: u64 = 0x5eed;

/// Characters of a note that are shown.
const NOTE: usize = 240;

/// Where the two programs disagree, for review.
type Notes = Arc<Mutex<Vec<String>>>;

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let notes = Notes::default();
    let seed = std::env::var("INSTAR_FLIP_SEED").ok();
    let seed = seed.and_then(|text| text.parse().ok()).unwrap_or(SEED);
    let mut trials = engine_trials(seed, &notes);
    for (isolation, missing) in machine::sandboxes() {
        let missing = missing.or_else(tools::missing_oracle);
        trials.extend(program_trials(isolation, &missing, seed, &notes));
    }
    let conclusion = libtest_mimic::run(&arguments, trials);
    if let Ok(notes) = notes.lock()
        && !notes.is_empty()
    {
        println!("for review, qemu-img and instar disagree:");
        for note in notes.iter() {
            let short: String = note.chars().take(NOTE).collect();
            println!("  {short}");
        }
    }
    conclusion.exit_code()
}

/// Every damage that is known by name.
fn all_damage() -> Vec<&'static Damage> {
    let lists = [damage::HEADER, damage::LISTS, damage::TABLES];
    lists.into_iter().flatten().collect()
}

/// The engine in this process.
fn engine_trials(seed: u64, notes: &Notes) -> Vec<Trial> {
    let missing = tools::missing_oracle();
    let mut trials = Vec::new();
    for damage in all_damage() {
        let name = format!("engine/field/{}", damage.name);
        trials.push(trial(name, missing.clone(), || inprocess::damaged(damage)));
    }
    for kind in pool::KINDS {
        let name = format!("engine/random damage/{}", kind.name);
        trials.push(trial(name, missing.clone(), move || {
            inprocess::answers_whatever_is_hit(kind, seed)
        }));
        let notes = Arc::clone(notes);
        let name = format!("engine/random damage, read like qemu/{}", kind.name);
        trials.push(trial(name, missing.clone(), move || {
            let found = inprocess::reads_like_qemu(kind, seed)?;
            notes.lock().map_err(|_| "poisoned")?.extend(found);
            Ok(())
        }));
    }
    trials
}

/// The program and the mount, in one of the sandboxes.
fn program_trials(
    isolation: &'static str,
    missing: &Option<String>,
    seed: u64,
    notes: &Notes,
) -> Vec<Trial> {
    let mut trials = Vec::new();
    for damage in all_damage() {
        let name = format!("{isolation}/field/{}", damage.name);
        trials.push(trial(name, missing.clone(), || {
            refusals::damaged(damage, isolation)
        }));
    }
    for hostile in names::NAMES {
        let name = format!("{isolation}/name/{}", hostile.name);
        let missing = missing.clone().or_else(|| names::missing(hostile));
        trials.push(trial(name, missing, || names::check(hostile, isolation)));
    }
    let name = format!("{isolation}/name/files that are called left over");
    trials.push(trial(name, missing.clone(), || names::left_over(isolation)));
    for kind in pool::KINDS {
        let notes = Arc::clone(notes);
        let name = format!("{isolation}/random damage/{}", kind.name);
        trials.push(trial(name, missing.clone(), move || {
            let found = flips::check(kind, isolation, seed)?;
            notes.lock().map_err(|_| "poisoned")?.extend(found);
            Ok(())
        }));
    }
    trials.extend(mounting(
        isolation,
        missing.clone().or_else(missing_for_mounts),
    ));
    trials
}

/// What needs a mount.
fn mounting(isolation: &'static str, missing: Option<String>) -> Vec<Trial> {
    let mut trials = Vec::new();
    let name = format!("{isolation}/mount/every damaged image is refused, the sound one lives");
    trials.push(trial(name, missing.clone(), || {
        mounted::check(&all_damage(), isolation)
    }));
    for hostile in names::NAMES {
        let name = format!("{isolation}/mount/name/{}", hostile.name);
        let missing = missing.clone().or_else(|| names::missing(hostile));
        trials.push(trial(name, missing, || mounted::name(hostile, isolation)));
    }
    let name = format!("{isolation}/mount/compressed garbage and bombs");
    trials.push(trial(name, missing, || mounted::compressed(isolation)));
    trials
}
