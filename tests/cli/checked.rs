//! Checks and repairs of damaged images against the recordings of every version.

use crate::answers;
use crate::damaged::{DAMAGES, Damage, same};
use crate::live::copy;
use crate::machine::{Outcome, qemu_img, qemu_img_version};
use crate::recorded::{Recording, Said};
use crate::transcript::{self, Step, words};
use libtest_mimic::Trial;
use std::collections::BTreeMap;
use std::path::Path;

/// What the recordings are called.
pub const CHECK: &str = "check";

/// What was said to each list of commands, by the first of them.
type Record = BTreeMap<String, Vec<Said>>;

/// Writes what qemu-img says of every damage.
pub fn record() -> Outcome {
    let all = DAMAGES.iter();
    let asked = all.map(|damage| Ok((damage.name.to_owned(), ask(damage)?)));
    answers::save(Recording::of(CHECK, asked)?)
}

fn ask(damage: &Damage) -> Result<Record, String> {
    all_said(damage, damage.made()?.path(), |folder, line| {
        transcript::run(folder, qemu_img(), &words(line), &[])
    })
}

/// What a program says; each list of commands has a copy of its own.
fn all_said(
    damage: &Damage,
    damaged: &Path,
    run: impl Fn(&Path, &str) -> Result<Step, String>,
) -> Result<Record, String> {
    let mut record = Record::new();
    for commands in damage.asked {
        let folder = copy(damaged)?;
        let said = |line: &&str| Ok(Said::new(line, run(folder.path(), line)?));
        let said: Vec<Said> = commands.iter().map(said).collect::<Result<_, String>>()?;
        let first = commands.first().ok_or("a list has no commands")?;
        if record.insert((*first).to_owned(), said).is_some() {
            return Err(format!("two lists begin with {first}"));
        }
    }
    Ok(record)
}

/// Goes through two records, which have to be of the same commands.
fn compare(
    expected: &Record,
    got: &Record,
    alike: impl Fn(&str, Step, Step) -> Outcome,
) -> Outcome {
    let lines = |record: &Record| -> Vec<String> {
        let said = record.values().flatten();
        said.map(|said| said.line.clone()).collect()
    };
    if lines(expected) != lines(got) {
        return Err(format!(
            "other commands are recorded: {:?}",
            lines(expected)
        ));
    }
    let pairs = expected.values().flatten().zip(got.values().flatten());
    pairs
        .into_iter()
        .try_for_each(|(expected, got)| alike(&expected.line, expected.step(), got.step()))
}

/// Whether the recordings and the table name the same damages.
pub fn tripwires() -> Vec<Trial> {
    let names = DAMAGES.iter().map(|damage| damage.name.to_owned());
    let table: Vec<String> = names.collect();
    answers::tripwires(CHECK, &table)
}

/// Whether the qemu-img that is asked says what was recorded with its version.
pub fn still_says_so(damage: &Damage) -> Outcome {
    let recorded = answers::record(CHECK, &qemu_img_version()?, damage.name)?;
    compare(&recorded, &ask(damage)?, |_, expected, got| {
        transcript::same(&expected, &got)
    })
}

/// Whether instar, as every version, says what that version said of the damage
/// and of what was left of it; and does not where it is known to differ.
pub fn as_recorded(damage: &Damage, sandbox: &str) -> Outcome {
    let damaged = damage.made()?;
    for (version, record) in answers::records::<Record>(CHECK, damage.name)? {
        let ours = all_said(damage, damaged.path(), |folder, line| {
            crate::instar_as(&version, folder, sandbox, &words(line))
        })?;
        let known = |line: &str| damage.is_known(&version, line);
        compare(&record, &ours, |line, expected, got| match known(line) {
            true => Ok(()),
            false => same(expected, got),
        })
        .map_err(|why| format!("recorded with {version}: {why}"))?;
        let all_the_same = || compare(&record, &ours, |_, expected, got| same(expected, got));
        if damage.asked.concat().into_iter().any(known) && all_the_same().is_ok() {
            return Err(format!("{version} is said to differ, and does in nothing"));
        }
    }
    Ok(())
}
