//! New images against the recordings of every version.

use crate::answers;
use crate::creation::{CREATIONS, Creation, cluster, files};
use crate::info;
use crate::live::is_no_larger;
use crate::machine::{Outcome, qemu_img_version};
use crate::recorded::{Recording, Said};
use crate::tools::{equal, folder, instar_as, json, must, run, space, success};
use crate::transcript::{self, QEMU_IMG};
use libtest_mimic::Trial;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;

/// What the recordings are called.
pub const CREATE: &str = "create";
/// The random number of a VMDK, which gives nothing to compare.
const CID: &str = "/format-specific/data/cid";

/// A row of the table.
#[derive(Serialize, Deserialize)]
struct Record {
    create: Said,
    /// Length and allocated bytes of every file afterwards.
    files: Files,
    /// What `info --output=json` said, which a rejected `create` does not come to.
    info: Option<Value>,
}

/// What a VMDK is longer than that is no mere text.
const DESCRIPTOR: u64 = 512;

type Files = BTreeMap<String, (u64, u64)>;

/// Writes what qemu-img says to the whole table.
pub fn record() -> Outcome {
    let rows = CREATIONS.iter();
    let asked = rows.map(|row| Ok((row.name(), ask(row)?)));
    answers::save(Recording::of(CREATE, asked)?)
}

fn ask(creation: &Creation) -> Result<Record, String> {
    let folder = folder()?;
    let folder = folder.path();
    let line = creation.line();
    let create = Said::new(&line, run(folder, QEMU_IMG, &line)?);
    let mut info = match create.code {
        0 => Some(json(&must(folder, QEMU_IMG, &creation.info())?)?),
        _ => None,
    };
    if let Some(cid) = info.as_mut().and_then(|info| info.pointer_mut(CID)) {
        // A leading zero is not written, and makes the file shorter.
        if cid.as_u64().is_some_and(|cid| cid < 1 << 28) {
            return ask(creation);
        }
        *cid = Value::Null;
    }
    Ok(Record {
        create,
        files: sizes(folder)?,
        info,
    })
}

fn sizes(folder: &Path) -> Result<Files, String> {
    let files = files(folder)?.into_iter();
    files
        .map(|file| Ok((file.clone(), space(folder, &file)?)))
        .collect()
}

/// Whether the recordings and the table name the same rows.
pub fn tripwires() -> Vec<Trial> {
    let table: Vec<String> = CREATIONS.iter().map(Creation::name).collect();
    answers::tripwires(CREATE, &table)
}

/// Whether the qemu-img that is installed says what was recorded with its version.
pub fn still_says_so(creation: &Creation) -> Outcome {
    let version = qemu_img_version()?;
    let expected: Record = answers::record(CREATE, &version, &creation.name())?;
    let got = ask(creation)?;
    equal("command", &expected.create.line, &got.create.line)?;
    transcript::same(&expected.create.step(), &got.create.step())?;
    // Disk space depends on the filesystem.
    let lengths = |files: Files| -> Vec<(String, u64)> {
        let files = files.into_iter();
        files.map(|(file, (length, _))| (file, length)).collect()
    };
    equal("files", lengths(expected.files), lengths(got.files))?;
    match (&expected.info, &got.info) {
        (Some(expected), Some(got)) => info::alike(expected, got),
        (expected, got) => equal("info", expected, got),
    }
}

/// Whether instar, as every version, says and does what that version said and
/// did; and something else where the version came too early.
pub fn as_recorded(creation: &Creation, sandbox: &str) -> Outcome {
    for (version, record) in answers::records(CREATE, &creation.name())? {
        let outcome = like(&version, &record, creation, sandbox);
        match (creation.too_early(&version), outcome) {
            (None, outcome) => outcome.map_err(|why| format!("recorded with {version}: {why}"))?,
            (Some(_), Err(_)) => {}
            (Some(why), Ok(())) => return Err(format!("{why}, but instar differs in nothing")),
        }
    }
    Ok(())
}

fn like(version: &str, record: &Record, creation: &Creation, sandbox: &str) -> Outcome {
    let folder = folder()?;
    let folder = folder.path();
    equal("command", &record.create.line, &creation.line())?;
    let created = instar_as(version, folder, sandbox, &creation.line())?;
    transcript::same(&record.create.step(), &created)?;
    let expected = record.info.as_ref().ok_or("no info was recorded")?;
    let info = success(instar_as(version, folder, sandbox, &creation.info())?)?;
    info::alike(expected, &json(&info)?)?;
    let ours = sizes(folder)?;
    let names = |files: &Files| -> Vec<String> { files.keys().cloned().collect() };
    equal("files", names(&record.files), names(&ours))?;
    for ((file, &theirs), &ours) in record.files.iter().zip(ours.values()) {
        // The text that describes a VMDK grew with time.
        if creation.format != "vmdk" || theirs.0 >= DESCRIPTOR {
            equal(file, theirs.0, ours.0)?;
        }
        is_no_larger(file, theirs, ours, cluster(expected))?;
    }
    let allocated: u64 = ours.values().map(|(_, allocated)| allocated).sum();
    let wanted = match creation.is_allocated() {
        true => expected["virtual-size"]
            .as_u64()
            .ok_or("no size is recorded")?,
        false => 0,
    };
    match allocated >= wanted {
        true => Ok(()),
        false => Err(format!("{allocated} bytes are allocated, and not {wanted}")),
    }
}
