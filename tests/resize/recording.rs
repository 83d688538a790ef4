//! Recordings of qemu-img: `TARGET/VERSION.json` below `tests/data/qemu-img`, or
//! below `INSTAR_TESTDATA_PATH`. There the same may be in three files for each
//! case, `TARGET/VERSION/CASE.{meta.json,stdout.txt,stderr.txt}`.

use crate::cases::{TARGETS, VERSIONS};
use crate::tools::data;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Where the recordings of another set may be.
const FOLDER: &str = "expected-outputs/resize-info-json";
/// The image, where the recorder did not call it `disk`.
const FILENAME: &str = "$FILENAME";

/// What one version said to all cases of one target.
#[derive(Debug, Serialize, Deserialize)]
pub struct Recording {
    pub version: String,
    pub target: String,
    /// By the name of the case.
    pub cases: Map<String, Value>,
}

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
    /// The command line without the program.
    pub line: String,
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
    /// Length and allocated bytes of the image file afterwards.
    pub length: u64,
    pub allocated: u64,
}

/// The folder of the recordings, and whether it is the tests' own.
fn root() -> (PathBuf, bool) {
    let Some(other) = std::env::var_os("INSTAR_TESTDATA_PATH") else {
        return (data().join("qemu-img"), true);
    };
    let below = Path::new(&other).join(FOLDER);
    match below.is_dir() {
        true => (below, false),
        false => (other.into(), false),
    }
}

/// The folder of a target's recordings.
pub fn folder_of(target: &str) -> PathBuf {
    root().0.join(target)
}

/// Targets that are recorded.
pub fn found_targets() -> BTreeSet<String> {
    let files = fs::read_dir(root().0).into_iter().flatten().flatten();
    let folders = files.filter(|file| file.path().is_dir());
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
    match root() {
        (_, true) => VERSIONS.iter().map(|&version| version.into()).collect(),
        (_, false) => found_versions(),
    }
}

/// Reads what a version said to the cases of a target.
pub fn load(target: &str, version: &str) -> Result<Recording, String> {
    let folder = folder_of(target).join(version);
    if folder.is_dir() {
        return load_folder(&folder, target, version);
    }
    // The version has dots of its own.
    let path = folder_of(target).join(format!("{version}.json"));
    serde_json::from_str(&read(&path)?).map_err(|error| format!("{}: {error}", path.display()))
}

impl Recording {
    /// One case of it.
    pub fn case(&self, name: &str) -> Result<Record, String> {
        let what = format!("{} {}/{name}", self.version, self.target);
        let case = self.cases.get(name);
        let case = case.ok_or_else(|| format!("{what} is not recorded"))?;
        Record::deserialize(case).map_err(|error| format!("{what}: {error}"))
    }

    /// The text of the file: a line for each part of a case.
    pub fn text(&self) -> String {
        let cases: Vec<String> = self
            .cases
            .iter()
            .map(|(name, case)| {
                let parts = case.as_object().into_iter().flatten();
                let parts: Vec<String> = parts
                    .map(|(key, value)| format!("  {}: {value}", json!(key)))
                    .collect();
                format!(" {}: {{\n{}\n }}", json!(name), parts.join(",\n"))
            })
            .collect();
        format!(
            "{{\n\"version\": {},\n\"target\": {},\n\"cases\": {{\n{}\n}}\n}}\n",
            json!(self.version),
            json!(self.target),
            cases.join(",\n")
        )
    }
}

fn read(path: &Path) -> Result<String, String> {
    fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))
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
        target: target.to_owned(),
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
