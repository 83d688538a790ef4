//! Recordings of qemu-img, below `tests/data/qemu-img` or below
//! `INSTAR_TESTDATA_PATH`.

use crate::machine::{Outcome, qemu_img_version};
use crate::transcript::{Step, words};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Map, Value, json};
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// The qemu-img versions whose recordings are kept with the tests.
pub const VERSIONS: &[&str] = &[
    "5.2.0", "7.2.18", "7.2.22", "10.0.2", "10.0.13", "11.1.2", "11.1.3",
];

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

/// A command and what it said.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub struct Said {
    /// The command line without the program.
    pub line: String,
    pub code: i32,
    pub stdout: String,
    #[serde(serialize_with = "folded", deserialize_with = "unfolded")]
    pub stderr: String,
}

impl Said {
    pub fn new(line: &str, step: Step) -> Self {
        Self {
            line: line.to_owned(),
            code: step.code,
            stdout: step.stdout,
            stderr: step.stderr,
        }
    }

    pub fn step(&self) -> Step {
        Step {
            args: words(&self.line),
            stdout: self.stdout.clone(),
            stderr: self.stderr.clone(),
            code: self.code,
        }
    }
}

/// The folder of the recordings, and whether it is the tests' own.
pub fn root() -> (PathBuf, bool) {
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

/// Versions that have to be recorded: in another set than the tests' own those
/// that are.
pub fn versions(found: BTreeSet<String>) -> BTreeSet<String> {
    match root() {
        (_, true) => VERSIONS.iter().map(|&version| version.into()).collect(),
        (_, false) => found,
    }
}

/// Whether exactly the versions are recorded that have to be.
pub fn has_every_version(found: BTreeSet<String>) -> Outcome {
    let wanted = versions(found.clone());
    match (wanted == found, wanted.is_empty()) {
        (true, false) => Ok(()),
        (true, true) => Err("there are no recordings".to_owned()),
        (false, _) => Err(format!("there are {found:?} and not {wanted:?}")),
    }
}

impl Recording {
    /// What the qemu-img that is asked says: name and answer of every case.
    pub fn of<T: Serialize>(
        subject: &str,
        cases: impl Iterator<Item = Result<(String, T), String>>,
    ) -> Result<Self, String> {
        let mut recording = Self {
            version: qemu_img_version()?,
            subject: subject.to_owned(),
            cases: Map::new(),
        };
        for case in cases {
            let (name, answer) = case?;
            let answer = serde_json::to_value(answer).map_err(|error| error.to_string())?;
            recording.cases.insert(name, answer);
        }
        Ok(recording)
    }

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
}

pub fn read(path: &Path) -> Result<String, String> {
    fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))
}

pub fn parse<T: DeserializeOwned>(path: &Path) -> Result<T, String> {
    serde_json::from_str(&read(path)?).map_err(|error| format!("{}: {error}", path.display()))
}

/// Writes a file whose outer `depth` objects have a line for each key.
pub fn write(path: &Path, value: &impl Serialize, depth: usize) -> Outcome {
    let value = serde_json::to_value(value).map_err(|error| error.to_string())?;
    let folder = path.parent().unwrap_or(path);
    fs::create_dir_all(folder)
        .and_then(|()| fs::write(path, text(&value, 0, depth) + "\n"))
        .map_err(|error| format!("{}: {error}", path.display()))?;
    println!("{}", path.display());
    Ok(())
}

fn text(value: &Value, level: usize, depth: usize) -> String {
    let Some(all) = value.as_object().filter(|_| level < depth) else {
        return value.to_string();
    };
    let entry = |(key, value): (&String, &Value)| {
        let value = text(value, level + 1, depth);
        format!("{}{}: {value}", " ".repeat(level), json!(key))
    };
    let entries: Vec<String> = all.iter().map(entry).collect();
    let end = " ".repeat(level.saturating_sub(1));
    format!("{{\n{}\n{end}}}", entries.join(",\n"))
}

/// A text, or how often each of its passages is repeated.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Text {
    Plain(String),
    Folded(Vec<(usize, String)>),
}

/// The longest passage in lines whose repetition is looked for, and how often
/// it has to be there.
const PASSAGE: usize = 4;
const OFTEN: usize = 3;

/// Damage that is in every entry of a table is complained of in hundreds of
/// equal lines.
fn folded<S: Serializer>(text: &str, serializer: S) -> Result<S::Ok, S::Error> {
    let lines: Vec<&str> = text.split_inclusive('\n').collect();
    let mut passages: Vec<(usize, String)> = Vec::new();
    let mut rest = lines.as_slice();
    while !rest.is_empty() {
        let times = |length: usize| {
            let passages = rest.chunks_exact(length);
            (
                passages
                    .take_while(|lines| *lines == &rest[..length])
                    .count(),
                length,
            )
        };
        let mut found = (1..=PASSAGE.min(rest.len())).map(times);
        let (count, length) = found.find(|(count, _)| *count >= OFTEN).unwrap_or((1, 1));
        let passage = rest[..length].concat();
        rest = &rest[count * length..];
        match passages.last_mut() {
            Some((1, last)) if count == 1 => last.push_str(&passage),
            _ => passages.push((count, passage)),
        }
    }
    let folded = match passages.iter().any(|(count, _)| *count > 1) {
        true => Text::Folded(passages),
        false => Text::Plain(text.to_owned()),
    };
    folded.serialize(serializer)
}

fn unfolded<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    Ok(match Text::deserialize(deserializer)? {
        Text::Plain(text) => text,
        Text::Folded(passages) => passages
            .iter()
            .map(|(count, passage)| passage.repeat(*count))
            .collect(),
    })
}
