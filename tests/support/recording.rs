//! Recordings of qemu-img: `SUBJECT/VERSION.json` below `tests/data/qemu-img`, or
//! below `INSTAR_TESTDATA_PATH`. A subject is what one version was asked about.

use crate::machine::{Outcome, qemu_img_version};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// The qemu-img versions whose recordings are kept with the tests.
pub const VERSIONS: &[&str] = &[
    "5.2.0", "7.2.18", "7.2.22", "10.0.2", "10.0.13", "11.1.2", "11.1.3",
];

/// The subject of new images, and that of damaged ones. All others are resized.
pub const CREATE: &str = "create";
pub const CHECK: &str = "check";

/// Where the recordings of another set may be.
const FOLDER: &str = "expected-outputs/resize-info-json";

/// What one version said to all cases of one subject.
#[derive(Debug, Serialize, Deserialize)]
pub struct Recording {
    pub version: String,
    #[serde(rename = "target")]
    pub subject: String,
    /// By the name of the case.
    pub cases: Map<String, Value>,
}

/// The folder of the recordings, and whether it is the tests' own.
fn root() -> (PathBuf, bool) {
    let Some(other) = std::env::var_os("INSTAR_TESTDATA_PATH") else {
        let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/qemu-img");
        return (own, true);
    };
    let below = Path::new(&other).join(FOLDER);
    match below.is_dir() {
        true => (below, false),
        false => (other.into(), false),
    }
}

/// Whether the recordings are the tests' own.
pub fn are_own() -> bool {
    root().1
}

/// The folder of a subject's recordings.
pub fn folder_of(subject: &str) -> PathBuf {
    root().0.join(subject)
}

/// Why there is nothing recorded of a subject, if that is so. The tests' own
/// set has to have it.
pub fn missing(subject: &str) -> Option<String> {
    let folder = folder_of(subject);
    let why = || format!("{} is not there", folder.display());
    (!are_own() && !folder.is_dir()).then(why)
}

/// Subjects that are recorded.
pub fn found_subjects() -> BTreeSet<String> {
    let files = fs::read_dir(root().0).into_iter().flatten().flatten();
    let folders = files.filter(|file| file.path().is_dir());
    folders
        .map(|folder| folder.file_name().display().to_string())
        .collect()
}

/// Versions that some of these subjects is recorded with.
pub fn found_versions(subjects: &[&str]) -> BTreeSet<String> {
    let folders = subjects
        .iter()
        .map(|subject| fs::read_dir(folder_of(subject)));
    let names = folders.flatten().flatten().flatten();
    let names = names.map(|file| file.file_name().display().to_string());
    names
        .map(|name| name.strip_suffix(".json").unwrap_or(&name).to_owned())
        .collect()
}

/// Versions that each of these subjects has to be recorded with.
pub fn versions(subjects: &[&str]) -> BTreeSet<String> {
    match are_own() {
        true => VERSIONS.iter().map(|&version| version.into()).collect(),
        false => found_versions(subjects),
    }
}

/// Whether these subjects are recorded with exactly the versions that they have
/// to be recorded with.
pub fn has_every_version(subjects: &[&str]) -> Outcome {
    let (wanted, found) = (versions(subjects), found_versions(subjects));
    match (wanted == found, wanted.is_empty()) {
        (true, false) => Ok(()),
        (true, true) => Err("there are no recordings".to_owned()),
        (false, _) => Err(format!("there are {found:?} and not {wanted:?}")),
    }
}

/// Reads what a version said about a subject.
pub fn load(subject: &str, version: &str) -> Result<Recording, String> {
    // The version has dots of its own.
    let path = folder_of(subject).join(format!("{version}.json"));
    serde_json::from_str(&read(&path)?).map_err(|error| format!("{}: {error}", path.display()))
}

/// Writes what the qemu-img that is asked says about a subject: name and answer
/// of every case.
pub fn save<T: Serialize>(
    subject: &str,
    cases: impl Iterator<Item = Result<(String, T), String>>,
) -> Outcome {
    let version = qemu_img_version()?;
    let folder = folder_of(subject);
    let path = folder.join(format!("{version}.json"));
    let mut recording = Recording {
        version,
        subject: subject.to_owned(),
        cases: Map::new(),
    };
    for case in cases {
        let (name, answer) = case?;
        let answer = serde_json::to_value(answer).map_err(|error| error.to_string())?;
        recording.cases.insert(name, answer);
    }
    fs::create_dir_all(&folder)
        .and_then(|()| fs::write(&path, recording.text()))
        .map_err(|error| format!("{}: {error}", path.display()))?;
    println!("{}", path.display());
    Ok(())
}

/// What every version said to a case.
pub fn records<T: DeserializeOwned>(subject: &str, case: &str) -> Result<Vec<(String, T)>, String> {
    let all = versions(&[subject]).into_iter().map(|version| {
        let record = load(subject, &version)?.case(case)?;
        Ok((version, record))
    });
    match all.collect::<Result<Vec<_>, String>>()? {
        none if none.is_empty() => Err("there are no recordings".to_owned()),
        records => Ok(records),
    }
}

/// Why the qemu-img that is asked cannot be compared with a recording of its own
/// version, if that is so.
pub fn missing_version(subject: &str) -> Option<String> {
    let version = match qemu_img_version() {
        Ok(version) => version,
        Err(why) => return Some(why),
    };
    let recorded = versions(&[subject]).contains(&version);
    (!recorded).then(|| format!("qemu-img {version} is not recorded"))
}

impl Recording {
    /// One case of it.
    pub fn case<T: DeserializeOwned>(&self, name: &str) -> Result<T, String> {
        let what = format!("{} {}/{name}", self.version, self.subject);
        let case = self.cases.get(name);
        let case = case.ok_or_else(|| format!("{what} is not recorded"))?;
        T::deserialize(case).map_err(|error| format!("{what}: {error}"))
    }

    /// Whether it is what its place says, and has exactly the cases of a table.
    pub fn has_exactly(&self, subject: &str, version: &str, table: &[String]) -> Outcome {
        if (subject, version) != (&*self.subject, &*self.version) {
            return Err(format!("it is of {} {}", self.subject, self.version));
        }
        let recorded: BTreeSet<&String> = self.cases.keys().collect();
        let names: BTreeSet<&String> = table.iter().collect();
        let different: Vec<&&String> = names.symmetric_difference(&recorded).collect();
        match (different.is_empty(), names.len() == table.len()) {
            (true, true) => Ok(()),
            (true, false) => Err("two cases have one name".to_owned()),
            (false, _) => Err(format!("in the table or recorded only: {different:?}")),
        }
    }

    /// The text of the file: a line for each part of a case.
    fn text(&self) -> String {
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
            json!(self.subject),
            cases.join(",\n")
        )
    }
}

pub fn read(path: &Path) -> Result<String, String> {
    fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))
}
