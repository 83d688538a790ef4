//! Every check of an engine has a damaged image that it refuses.
//!
//! The checks are found in the source: every place that makes a refusal is one.
//! The damaged images are those of the formats' own tests, which are run for
//! that. A place that no image came upon fails the test, unless it is named as
//! one that none can come upon; so does a name without such a place.
//!
//! An image of the tables goes through every request, too: it is answered or
//! refused without a change, with words of its own, within a budget of reads.

use crate::error::{Failure, FailureKind};
use crate::findings::Repair;
use crate::proto::{Format, Preallocation, Request};
use crate::testing::{self, Session};
use alloc::collections::{BTreeMap, BTreeSet};
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use std::path::Path;

const M: u64 = 1 << 20;

/// A damaged image.
pub struct Variant {
    /// What is wrong with it.
    pub name: String,
    /// The image.
    pub image: Vec<u8>,
    /// The other files that it names.
    pub others: Vec<Vec<u8>>,
}

impl Variant {
    /// An image of one file.
    pub fn new(name: impl ToString, image: Vec<u8>) -> Self {
        Self {
            name: name.to_string(),
            image,
            others: Vec::new(),
        }
    }
}

/// A place in the source: file below `src`, line.
type Site = (String, u32);

/// A check that no image can come upon, or that is about the request: file, a
/// text of its lines, the reason.
pub type Exception = (&'static str, &'static str, &'static str);

/// Sends every damaged image through every request. Each is refused with words
/// of its own.
pub fn refuse_all(format: Format, variants: Vec<Variant>) {
    let mut said: BTreeMap<String, String> = BTreeMap::new();
    for variant in variants {
        let refusals = exercise(&variant, format);
        let name = variant.name;
        let first = refusals.into_iter().next();
        let first = first.unwrap_or_else(|| panic!("{name}: nothing was refused"));
        if let Some(other) = said.insert(first.message.clone(), name.clone()) {
            panic!("{name} and {other} are refused with the same words: {first}");
        }
    }
}

/// Holds the damaged images that tests use against the checks of a format's
/// engine: all that are in its folder.
pub fn every_check_refuses(folder: &str, tests: &[fn()], exceptions: &[Exception]) {
    testing::noted();
    tests.iter().for_each(|test| test());
    let sites = testing::noted().into_iter().filter_map(|place| {
        let (_, file) = place.file().rsplit_once("src/")?;
        Some((file.to_string(), place.line()))
    });
    let hit: BTreeSet<Site> = sites.collect();
    let mut unused: Vec<&Exception> = exceptions.iter().collect();
    let mut missing = Vec::new();
    for (site, text) in checks(folder) {
        let excepted = |it: &&Exception| site.0.ends_with(it.0) && text.contains(it.1);
        let found = exceptions.iter().find(excepted);
        unused.retain(|&it| Some(it) != found);
        match (hit.contains(&site), found) {
            (false, None) => missing.push(format!("{}:{}: {text}", site.0, site.1)),
            (true, Some(it)) => panic!("{it:?} is refused"),
            _ => {}
        }
    }
    assert!(missing.is_empty(), "no image for:\n{}", missing.join("\n"));
    assert!(unused.is_empty(), "no such checks: {unused:?}");
}

/// The places of a format's engine that make refusals, each with its words.
fn checks(folder: &str) -> Vec<(Site, String)> {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = Vec::new();
    let mut folders = alloc::vec![src.join(folder)];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.strip_prefix(&src).unwrap().to_str().unwrap();
            if path.is_dir() {
                folders.push(path);
            } else if !name.ends_with("tests.rs") && !name.ends_with("refuse.rs") {
                let text = std::fs::read_to_string(&path).unwrap();
                let sites = checks_of(&text).into_iter();
                found.extend(sites.map(|(line, text)| ((name.to_string(), line), text)));
            }
        }
    }
    assert!(found.len() > 10, "the source is not where it was");
    found
}

/// Calls of the constructors of refusals about images.
fn checks_of(text: &str) -> Vec<(u32, String)> {
    let code = text.split("\n#[cfg(test)]").next().unwrap_or_default();
    let lines: Vec<&str> = code.lines().collect();
    let imports: String = lines
        .iter()
        .filter(|line| line.starts_with("use super::") && line.contains("refuse::"))
        .copied()
        .collect();
    let mut calls: Vec<String> = Vec::new();
    for name in ["damaged", "unsupported", "table", "header"] {
        calls.push(format!("refuse::{name}("));
        if imports.contains(name) {
            calls.push(format!("{name}("));
        }
    }
    let is_call = |line: &str| {
        calls.iter().any(|call| {
            line.match_indices(call.as_str()).any(|(at, _)| {
                let before = line[..at].chars().next_back();
                !before.is_some_and(|c| c.is_alphanumeric() || "_.:".contains(c))
                    || call.starts_with("refuse") && line[..at].ends_with("super::")
            })
        })
    };
    let calls = lines.iter().enumerate().filter(|(_, line)| {
        let line = line.trim_start();
        is_call(line) && !line.starts_with("//") && !line.contains("fn ")
    });
    let words = |at: usize| {
        let part = lines[at..].iter().take(4).map(|line| line.trim());
        part.collect::<Vec<_>>().join(" ")
    };
    calls.map(|(at, _)| (at as u32 + 1, words(at))).collect()
}

/// Every request on an image. What was refused.
pub fn exercise(variant: &Variant, format: Format) -> Vec<Failure> {
    let Variant {
        name,
        image,
        others,
    } = variant;
    let mut session = Session::new(image.clone());
    session.host.others = others.iter().cloned().map(Some).collect();
    let mut refused = Vec::new();
    let mut note = |session: &mut Session, failure: Option<Failure>| {
        let len: usize = image.len() + others.iter().map(Vec::len).sum::<usize>();
        let host = &mut session.host;
        let (reads, bytes) = (host.reads, host.bytes_read);
        (host.reads, host.bytes_read) = (0, 0);
        assert!(reads <= 64 + len as u64 / 512, "{name}: {reads} reads");
        assert!(
            bytes <= 4 * len as u64 + 4 * M,
            "{name}: {bytes} bytes read"
        );
        assert!(host.image == *image, "{name}: the image has changed");
        let same = host.others.iter().flatten().eq(others);
        assert!(same, "{name}: a file has changed");
        if let Some(failure) = failure {
            let ours = matches!(failure.kind, FailureKind::Internal | FailureKind::Io);
            assert!(!ours && !failure.message.is_empty(), "{name}: {failure:?}");
            refused.push(failure);
        }
    };
    let facts = match session.open(Some(format)) {
        Ok(facts) => facts,
        Err(failure) => {
            note(&mut session, Some(failure));
            return refused;
        }
    };
    note(&mut session, None);
    let size = facts.virtual_size;
    let read = session.read(0, size.min(4 * M)).err();
    note(&mut session, read);
    let resize = |size| Request::Resize {
        size,
        preallocation: Preallocation::Off,
        shrink: true,
        backing_size: None,
    };
    let sizes = [size / 2 / M * M, size - size % M + 800 * M, M];
    let unit = facts.write_unit.min(size);
    let requests = sizes.map(resize).into_iter().chain([
        Request::Check { repair: None },
        Request::Check {
            repair: Some(Repair::All),
        },
        Request::Settle,
        Request::Allocate {
            offset: 0,
            len: unit,
        },
        Request::Allocate {
            offset: size.saturating_sub(M) / M * M,
            len: unit,
        },
        Request::Flush,
    ]);
    for request in requests {
        let failure = session.call(request).err();
        note(&mut session, failure);
    }
    refused
}
