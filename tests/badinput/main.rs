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
mod mounted;
mod names;
mod pool;
mod program;
#[path = "../support/random.rs"]
mod random;
mod refusals;
#[path = "../support/tools.rs"]
mod tools;

use damage::Damage;
use libtest_mimic::{Arguments, Completion, Failed, Trial};
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
    for isolation in isolations() {
        trials.extend(program_trials(isolation, seed, &notes));
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

/// The sandboxes to try, all unless the environment names one.
fn isolations() -> Vec<&'static str> {
    let only = std::env::var("INSTAR_ISOLATION").unwrap_or_default();
    ["kvm", "process"]
        .into_iter()
        .filter(|isolation| !matches!(only.as_str(), "kvm" | "process") || only == *isolation)
        .collect()
}

/// Every damage that is known by name.
fn all_damage() -> Vec<&'static Damage> {
    let lists = [damage::HEADER, damage::LISTS, damage::TABLES];
    lists.into_iter().flatten().collect()
}

/// The engine in this process.
fn engine_trials(seed: u64, notes: &Notes) -> Vec<Trial> {
    let mut trials = Vec::new();
    for damage in all_damage() {
        let name = format!("engine/field/{}", damage.name);
        trials.push(trial(name, "", || inprocess::damaged(damage)));
    }
    for kind in pool::KINDS {
        let name = format!("engine/random damage/{}", kind.name);
        trials.push(trial(name, "", move || {
            inprocess::answers_whatever_is_hit(kind, seed)
        }));
        let notes = Arc::clone(notes);
        let name = format!("engine/random damage, read like qemu/{}", kind.name);
        trials.push(trial(name, "", move || {
            let found = inprocess::reads_like_qemu(kind, seed)?;
            notes.lock().map_err(|_| "poisoned")?.extend(found);
            Ok(())
        }));
    }
    trials
}

/// The program and the mount, in one of the sandboxes.
fn program_trials(isolation: &'static str, seed: u64, notes: &Notes) -> Vec<Trial> {
    let mut trials = Vec::new();
    for damage in all_damage() {
        let name = format!("{isolation}/field/{}", damage.name);
        trials.push(trial(name, isolation, || {
            refusals::damaged(damage, isolation)
        }));
    }
    for hostile in names::NAMES {
        let name = format!("{isolation}/name/{}", hostile.name);
        trials.push(trial(name, isolation, || names::check(hostile, isolation)));
    }
    for kind in pool::KINDS {
        let notes = Arc::clone(notes);
        let name = format!("{isolation}/random damage/{}", kind.name);
        trials.push(trial(name, isolation, move || {
            let found = flips::check(kind, isolation, seed)?;
            notes.lock().map_err(|_| "poisoned")?.extend(found);
            Ok(())
        }));
    }
    let name = format!("{isolation}/mount/every damaged image is refused, the sound one lives");
    trials.push(mounting(name, isolation, || {
        mounted::check(&all_damage(), isolation)
    }));
    let name = format!("{isolation}/mount/compressed garbage and bombs");
    trials.push(mounting(name, isolation, || mounted::compressed(isolation)));
    trials
}

/// A trial that reports itself as ignored, with the reason, where the machine
/// lacks something.
fn trial(
    name: String,
    isolation: &'static str,
    body: impl FnOnce() -> Result<(), String> + Send + 'static,
) -> Trial {
    Trial::ignorable_test(name, move || {
        let missing = tools::missing_oracle().or_else(|| missing_sandbox(isolation));
        match missing {
            Some(reason) => Ok(Completion::ignored_with(reason)),
            None => body().map(|()| Completion::Completed).map_err(Failed::from),
        }
    })
}

fn mounting(
    name: String,
    isolation: &'static str,
    body: impl FnOnce() -> Result<(), String> + Send + 'static,
) -> Trial {
    match mounted::missing() {
        Some(reason) => Trial::ignorable_test(name, || Ok(Completion::ignored_with(reason))),
        None => trial(name, isolation, body),
    }
}

fn missing_sandbox(isolation: &str) -> Option<String> {
    let kvm = || {
        std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/kvm")
    };
    match isolation {
        "kvm" => kvm().err().map(|error| format!("/dev/kvm: {error}")),
        _ => None,
    }
}
