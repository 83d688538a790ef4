//! The cases against the recordings of every version.

use crate::cases::{CASES, Case, TARGETS};
use crate::info::{self, numbers};
use crate::live::said_by_both;
use crate::machine::{Outcome, qemu_img_version};
use crate::recorded;
use crate::recorder;
use crate::recording::{Record, found_targets, found_versions, load, versions};
use crate::tools::{bytes, equal, folder, instar, instar_as, json, space, success, unchanged};
use crate::transcript;
use std::path::Path;

/// What qemu-img says to a resize in a format that it does not resize.
const NO_RESIZE: &str = "qemu-img: Image format driver does not support resize\n";
/// The version from which on the nodes below the format are listed.
const LISTS_CHILDREN: (u32, u32) = (8, 0);
const INFO: &str = "info --output=json disk";

/// Whether the recordings of a target and the table name the same cases.
pub fn names_the_same(target: &str, version: &str) -> Outcome {
    let of_this = CASES.iter().filter(|case| case.target == target);
    let table: Vec<String> = of_this.map(|case| case.name.to_owned()).collect();
    load(target, version)?.has_exactly(target, version, &table)
}

/// Whether there are recordings of exactly the targets and versions that there
/// have to be.
pub fn every_version() -> Outcome {
    recorded::has_every_version(found_versions())?;
    let targets = TARGETS.iter().map(|&target| target.to_owned());
    equal("recorded targets", targets.collect(), found_targets())
}

/// What every version said to a case.
fn records(case: &Case) -> Result<Vec<(String, Record)>, String> {
    let all = versions().into_iter().map(|version| {
        let record = load(case.target, &version)?.case(case.name)?;
        Ok((version, record))
    });
    match all.collect::<Result<Vec<_>, String>>()? {
        none if none.is_empty() => Err("there are no recordings".to_owned()),
        records => Ok(records),
    }
}

/// Whether the qemu-img that is installed says what was recorded with its
/// version, or with the closest one that has the same keys.
pub fn still_says_so(case: &Case) -> Outcome {
    let live = qemu_img_version()?;
    let distance = |version: &str| {
        let parts =
            |version: &str| -> Vec<i64> { version.split('.').flat_map(str::parse).collect() };
        let pairs = parts(version).into_iter().zip(parts(&live));
        let parts: Vec<i64> = pairs.map(|(a, b)| (a - b).abs()).collect();
        let lists = |version| numbers(version) >= LISTS_CHILDREN;
        (lists(version) != lists(&live), parts)
    };
    let records = records(case)?;
    let closest = records.iter().min_by_key(|(version, _)| distance(version));
    let (_, recorded) = closest.ok_or("nothing is closest")?;
    let asked = recorder::ask(case)?;
    for (expected, got) in [
        (&recorded.create, &asked.create),
        (&recorded.resize, &asked.resize),
    ] {
        equal("length", expected.length, got.length)?;
        // Disk space depends on the filesystem.
        transcript::same(&expected.said.step(), &got.said.step())?;
    }
    match (&recorded.info, &asked.info) {
        (Some(expected), Some(got)) => info::alike(expected, got),
        (expected, got) => equal("info", expected, got),
    }
}

/// Whether instar says and does what every version said and did; and it resizes
/// what qemu-img does not. A rejected resize changes no byte.
pub fn as_recorded(case: &Case, sandbox: &str) -> Outcome {
    let records = records(case)?;
    for (version, record) in &records {
        equal(version, &recorder::meta(case)?, &record.meta)?;
        equal(version, &case.create(), &record.create.said.line)?;
        equal(version, &case.resize(), &record.resize.said.line)?;
    }
    let folder = folder()?;
    let folder = folder.path();
    let created = instar(folder, sandbox, &case.create())?;
    let before = bytes(folder, "disk")?;
    for (version, record) in &records {
        transcript::same(&record.create.said.step(), &created)?;
        equal(version, record.create.length, space(folder, "disk")?.0)?;
    }
    let resized = instar(folder, sandbox, &case.resize())?;
    for (version, record) in &records {
        if record.resize.said.stderr == NO_RESIZE {
            equal(version, false, case.qemu_resizes())?;
            equal(version, "Image resized.\n", &success(resized.clone())?)?;
            continue;
        }
        transcript::same(&record.resize.said.step(), &resized)?;
    }
    if resized.code != 0 {
        unchanged(folder, "disk", &before)?;
    }
    if !case.qemu_resizes() || resized.code != 0 {
        return equal(
            "info",
            0,
            records.iter().filter(|(_, r)| r.info.is_some()).count(),
        );
    }
    said_by_both(case.format(), folder, sandbox)?;
    looks_as_recorded(folder, sandbox, &records)
}

/// Whether instar, as every version, says of the image what that version said.
fn looks_as_recorded(folder: &Path, sandbox: &str, records: &[(String, Record)]) -> Outcome {
    for (version, record) in records {
        let expected = record.info.as_ref();
        let expected = expected.ok_or_else(|| format!("{version}: no info was recorded"))?;
        let got = json(&success(instar_as(version, folder, sandbox, INFO)?)?)?;
        info::alike(expected, &got).map_err(|why| format!("recorded with {version}: {why}"))?;
    }
    Ok(())
}
