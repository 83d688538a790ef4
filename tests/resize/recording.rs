//! Recordings of resizes: `TARGET/VERSION.json`. Below `INSTAR_TESTDATA_PATH` the
//! same may be in three files for each case,
//! `TARGET/VERSION/CASE.{meta.json,stdout.txt,stderr.txt}`.

use crate::cases::TARGETS;
use crate::machine::Outcome;
use crate::recorded::{self, Recording, Said, read};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// The image, where the recorder did not call it `disk`.
const FILENAME: &str = "$FILENAME";

/// The levels of a file that have a line for each key: a line for each part of
/// a case.
const DEPTH: usize = 3;

/// One case.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    pub meta: Meta,
    pub create: Ran,
    pub resize: Ran,
    /// What `info --output=json` said, which a rejected resize does not come to.
    pub info: Option<Value>,
}

/// What was asked for.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub struct Meta {
    pub start: String,
    pub end: String,
    pub options: Option<String>,
    pub preallocation: Option<String>,
    pub shrink: bool,
    /// The new size in bytes, if the disk begins with exactly `start`.
    pub size: u64,
}

/// A command, what it said and what it left.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub struct Ran {
    #[serde(flatten)]
    pub said: Said,
    /// Length and allocated bytes of the image file afterwards.
    pub length: u64,
    pub allocated: u64,
}

/// The folder of a target's recordings.
fn folder_of(target: &str) -> PathBuf {
    recorded::root().0.join(target)
}

/// Targets that are recorded.
pub fn found_targets() -> BTreeSet<String> {
    let files = fs::read_dir(recorded::root().0).into_iter();
    let folders = files
        .flatten()
        .flatten()
        .filter(|file| file.path().is_dir());
    folders
        .map(|folder| folder.file_name().display().to_string())
        .collect()
}

/// Versions that some target is recorded with.
pub fn found_versions() -> BTreeSet<String> {
    let folders = TARGETS.iter().map(|target| fs::read_dir(folder_of(target)));
    let names = folders.flatten().flatten().flatten();
    let names = names.map(|file| file.file_name().display().to_string());
    names
        .map(|name| name.strip_suffix(".json").unwrap_or(&name).to_owned())
        .collect()
}

/// Versions that every target has to be recorded with.
pub fn versions() -> BTreeSet<String> {
    recorded::versions(found_versions())
}

fn path(target: &str, version: &str) -> PathBuf {
    // The version has dots of its own.
    folder_of(target).join(format!("{version}.json"))
}

/// Writes what a version said to the cases of a target.
pub fn save(recording: &Recording) -> Outcome {
    let path = path(&recording.subject, &recording.version);
    recorded::write(&path, recording, DEPTH)
}

/// Reads what a version said to the cases of a target.
pub fn load(target: &str, version: &str) -> Result<Recording, String> {
    let folder = folder_of(target).join(version);
    if folder.is_dir() {
        return load_folder(&folder, target, version);
    }
    recorded::parse(&path(target, version))
}

fn load_folder(folder: &Path, target: &str, version: &str) -> Result<Recording, String> {
    let files = fs::read_dir(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    let names = files
        .flatten()
        .map(|file| file.file_name().display().to_string());
    let names = names.filter_map(|name| name.split_once('.').map(|(case, _)| case.to_owned()));
    let names: BTreeSet<String> = names.collect();
    let mut recording = Recording {
        version: version.to_owned(),
        subject: target.to_owned(),
        cases: Map::new(),
    };
    for name in names {
        let case = load_files(folder, &name)?;
        let of = |key: &str| case.0[key].as_str().unwrap_or_default().to_owned();
        if (of("qemu_img_version"), of("target"), of("case"))
            != (version.to_owned(), target.to_owned(), name.clone())
        {
            return Err(format!("{}: {name} is another case", folder.display()));
        }
        recording.cases.insert(name, case.1);
    }
    Ok(recording)
}

/// Reads the three files of a case: the meta data, and all of it as a record.
fn load_files(folder: &Path, name: &str) -> Result<(Value, Value), String> {
    let file = |kind: &str| read(&folder.join(format!("{name}.{kind}")));
    let text = file("meta.json")?.replace(FILENAME, "disk");
    let meta: Value =
        serde_json::from_str(&text).map_err(|error| format!("{name}.meta.json: {error}"))?;
    let said = file("stdout.txt")?.replace(FILENAME, "disk");
    let complaints = file("stderr.txt")?;
    let part = |step: &str| {
        let (_, rest) = complaints
            .split_once(&format!("--- {step} stderr ---\n"))
            .unwrap_or_default();
        rest.split("--- ").next().unwrap_or_default().to_owned()
    };
    let ran = |step: &str| {
        let argv = meta["argv"][step].as_array().into_iter().flatten();
        let argv: Vec<&str> = argv.skip(1).filter_map(Value::as_str).collect();
        let left = &meta["files"][format!("after_{step}")];
        json!({
            "line": argv.join(" "),
            "code": meta[format!("{step}_return_code")],
            "stdout": meta[format!("{step}_stdout")],
            "stderr": part(step),
            "length": left["file_length"],
            "allocated": left["file_allocated"],
        })
    };
    let options = meta["options_list"].as_array().into_iter().flatten();
    let options: Vec<&str> = options.filter_map(Value::as_str).collect();
    let info = match said.as_str() {
        "" => Value::Null,
        text => serde_json::from_str(text).map_err(|error| format!("{name}: {error}"))?,
    };
    let record = json!({
        "meta": {
            "start": meta["start_size"],
            "end": meta["end_spec"],
            "options": (!options.is_empty()).then(|| options.join(",")),
            "preallocation": meta["preallocation"],
            "shrink": meta["applied_shrink_flag"],
            "size": meta["expected_final_size"],
        },
        "create": ran("create"),
        "resize": ran("resize"),
        "info": info,
    });
    Ok((meta, record))
}
