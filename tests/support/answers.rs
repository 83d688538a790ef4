//! Recordings of all versions in one file, `SUBJECT.json`: every part of a case
//! with each answer once, and the versions that gave it. Most gave the same.

use crate::machine::{Outcome, qemu_img_version, trial};
use crate::recorded::{Recording, has_every_version, parse, root, versions, write};
use libtest_mimic::Trial;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

#[derive(Serialize, Deserialize)]
struct Answers {
    #[serde(rename = "target")]
    subject: String,
    cases: BTreeMap<String, Parts>,
}

/// By part and versions, which blanks separate.
type Parts = BTreeMap<String, Map<String, Value>>;

/// The levels of the file that have a line for each key.
const DEPTH: usize = 4;

fn path(subject: &str) -> PathBuf {
    root().0.join(format!("{subject}.json"))
}

/// Why there is nothing recorded of a subject, if that is so. The tests' own
/// set has to have it.
pub fn missing(subject: &str) -> Option<String> {
    let path = path(subject);
    let absent = !root().1 && !path.exists();
    absent.then(|| format!("{} is not there", path.display()))
}

/// Why the qemu-img that is asked cannot be compared with a recording of its own
/// version, if that is so.
pub fn missing_version(subject: &str) -> Option<String> {
    let version = match qemu_img_version() {
        Ok(version) => version,
        Err(why) => return Some(why),
    };
    (!versions_of(subject).contains(&version))
        .then(|| format!("qemu-img {version} is not recorded"))
}

/// Versions that have to be recorded.
pub fn versions_of(subject: &str) -> BTreeSet<String> {
    let found = read(subject).map(|answers| answers.versions());
    versions(found.unwrap_or_default())
}

/// Whether exactly the versions are recorded that have to be, each with exactly
/// the cases of a table.
pub fn tripwires(subject: &'static str, table: &[String]) -> Vec<Trial> {
    let name = format!("recordings/{subject}/every version");
    let mut trials = vec![trial(name, missing(subject), move || {
        has_every_version(read(subject)?.versions())
    })];
    for version in versions_of(subject) {
        let name = format!("recordings/{subject}/{version} has exactly the cases");
        let table = table.to_vec();
        trials.push(trial(name, None, move || {
            let recording = read(subject)?.recording(&version)?;
            recording.has_exactly(subject, &version, &table)
        }));
    }
    trials
}

/// What a version said to a case.
pub fn record<T: DeserializeOwned>(subject: &str, version: &str, case: &str) -> Result<T, String> {
    read(subject)?.recording(version)?.case(case)
}

/// What every version said to a case.
pub fn records<T: DeserializeOwned>(subject: &str, case: &str) -> Result<Vec<(String, T)>, String> {
    let answers = read(subject)?;
    let versions = versions(answers.versions()).into_iter();
    let all = versions.map(|version| {
        let record = answers.recording(&version)?.case(case)?;
        Ok((version, record))
    });
    match all.collect::<Result<Vec<_>, String>>()? {
        none if none.is_empty() => Err("there are no recordings".to_owned()),
        records => Ok(records),
    }
}

/// Writes what a version said in the place of what it said before.
pub fn save(new: Recording) -> Outcome {
    let subject = new.subject.clone();
    let mut recordings = vec![new];
    if path(&subject).exists() {
        let answers = read(&subject)?;
        let mut others = answers.versions();
        others.remove(&recordings[0].version);
        for version in others {
            recordings.push(answers.recording(&version)?);
        }
    }
    recordings.sort_by_key(|recording| numbers(&recording.version));
    let names = recordings.iter().flat_map(|one| one.cases.keys());
    let all = names.map(|name| (name.clone(), merged(&recordings, name)));
    let cases = all.collect();
    write(&path(&subject), &Answers { subject, cases }, DEPTH)
}

/// The parts of a case as some recordings have them.
fn merged(recordings: &[Recording], name: &str) -> Parts {
    let mut parts: BTreeMap<String, Vec<(String, Value)>> = BTreeMap::new();
    for recording in recordings {
        let case = recording.cases.get(name).and_then(Value::as_object);
        for (part, answer) in case.into_iter().flatten() {
            let given = parts.entry(part.clone()).or_default();
            // The order of keys is part of the answer, which equality overlooks.
            let same = |other: &Value| {
                let [one, other] = [answer, other].map(Value::to_string);
                one == other
            };
            match given.iter_mut().find(|(_, other)| same(other)) {
                Some((versions, _)) => *versions += &format!(" {}", recording.version),
                None => given.push((recording.version.clone(), answer.clone())),
            }
        }
    }
    let parts = parts.into_iter();
    parts
        .map(|(part, given)| (part, given.into_iter().collect()))
        .collect()
}

fn numbers(version: &str) -> Vec<u32> {
    version.split('.').flat_map(str::parse).collect()
}

fn read(subject: &str) -> Result<Answers, String> {
    parse(&path(subject))
}

impl Answers {
    /// Versions that gave any answer.
    fn versions(&self) -> BTreeSet<String> {
        let parts = self.cases.values().flat_map(BTreeMap::values);
        let keys = parts.flat_map(Map::keys).flat_map(|key| key.split(' '));
        keys.map(str::to_owned).collect()
    }

    /// What one version said.
    fn recording(&self, version: &str) -> Result<Recording, String> {
        let gave = |key: &str| key.split(' ').any(|one| one == version);
        let mut cases = Map::new();
        for (name, parts) in &self.cases {
            let mut case = Map::new();
            for (part, given) in parts {
                let mut given = given.iter().filter(|(key, _)| gave(key));
                if let Some((_, answer)) = given.next() {
                    case.insert(part.clone(), answer.clone());
                }
                if given.next().is_some() {
                    return Err(format!("{version} {name}: there are two answers"));
                }
            }
            if !case.is_empty() {
                cases.insert(name.clone(), case.into());
            }
        }
        Ok(Recording {
            version: version.to_owned(),
            subject: self.subject.clone(),
            cases,
        })
    }
}
