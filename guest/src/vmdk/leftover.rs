//! Files that a resize leaves behind where it is cut off: those that it had made
//! before its commit, and those that it had not removed yet.
//!
//! The end of the descriptor's file names them, in comments, for as long as they
//! may be there and belong to nothing. Programs that read the descriptor skip
//! that. A resize adds the lines before it makes files; its new descriptor comes
//! with lines for those that it removes. What belongs to the image is never taken
//! for left over, whatever the lines say.

use super::descriptor::{Descriptor, ExtentLine};
use super::format::limit;
use super::numbered::Numbered;
use crate::error::Failure;
use crate::plan::{NewName, Plan, Purpose, SECTOR, Stage, Step};
use crate::proto::FileNo;
use alloc::collections::BTreeSet;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec;
use alloc::vec::Vec;

/// What a line begins with. The number of files and the first one's name follow,
/// in quotes; the others continue that name.
const MARK: &str = "# instar: leftover files ";

/// The longest name of a file, in bytes.
const MAX_NAME: usize = 255;

/// The end of a descriptor's file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tail {
    /// Length of the file in bytes.
    len: u64,
    /// Whether what is put behind it begins a line.
    ends_line: bool,
    /// Where the lines begin, if there are any, and what they name.
    lines: Option<(u64, Vec<Run>)>,
}

/// Files whose names continue each other.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Run {
    first: String,
    count: u64,
}

impl Tail {
    /// Looks for the lines: nothing of meaning may follow them. They may stand
    /// behind the zeroes that QEMU puts behind a text.
    pub fn find(area: &[u8]) -> Self {
        let text = area.split(|&byte| byte == 0).next().unwrap_or_default();
        let mut lines: Option<(u64, Vec<Run>)> = None;
        let mut at = 0;
        for line in area.split_inclusive(|&byte| byte == b'\n' || byte == 0) {
            if line.starts_with(MARK.as_bytes()) {
                let (_, runs) = lines.get_or_insert((at as u64, Vec::new()));
                runs.extend(Run::read(line));
            } else if at < text.len()
                && !line.trim_ascii().is_empty()
                // What was not written whole is none of the text either.
                && !(lines.is_some() && MARK.as_bytes().starts_with(line))
            {
                lines = None;
            }
            at += line.len();
        }
        Self {
            len: area.len() as u64,
            ends_line: matches!(area.last(), None | Some(b'\n' | 0)),
            lines,
        }
    }

    /// The file has become at least this long, by a text that ends like the old one.
    pub fn reach(&mut self, len: u64) {
        self.len = self.len.max(len);
    }

    /// Where the lines begin, if there are any: a byte of the file.
    pub fn lines_at(&self) -> Option<u64> {
        self.lines.as_ref().map(|&(at, _)| at)
    }

    /// The files that the lines name, as far as they may be removed: those of an
    /// image with these extents, and no part of it.
    pub fn names(&self, extents: &[ExtentLine]) -> Vec<String> {
        let runs = self.lines.iter().flat_map(|(_, runs)| runs);
        let names = runs.flat_map(Run::names).take(limit::MAX_EXTENTS);
        let family = Family::of(extents);
        names.filter(|name| family.has_lost(name)).collect()
    }

    /// The write that adds lines for files that an image with these extents does
    /// not have yet, if there are any.
    pub fn add<'a>(
        &self,
        names: impl Iterator<Item = &'a str>,
        extents: &[ExtentLine],
    ) -> Option<Step> {
        let lines = lines(names, extents)?;
        let data = match self.ends_line {
            true => lines.into_bytes(),
            false => [b"\n", lines.as_bytes()].concat(),
        };
        // What fits into a sector is written whole or not at all.
        let fits = self.len % SECTOR + data.len() as u64 <= SECTOR;
        let offset = match fits {
            true => self.len,
            false => self.len.next_multiple_of(SECTOR),
        };
        Some(Step::Write {
            file: FileNo::IMAGE,
            offset,
            data,
        })
    }

    /// The plan that removes the files, and then the lines. Empty without lines.
    pub fn plan(&self, extents: &[ExtentLine]) -> Plan {
        let Some(len) = self.lines_at() else {
            return Plan::default();
        };
        let names = self.names(extents).into_iter().map(NewName::Plain);
        let names = core::iter::once(NewName::Replacement).chain(names);
        let stage = |purpose, steps| Stage { purpose, steps };
        let file = FileNo::IMAGE;
        Plan {
            stages: vec![
                stage(
                    Purpose::Release,
                    names.map(|name| Step::Remove { name }).collect(),
                ),
                stage(Purpose::Commit, vec![Step::SetLength { file, len }]),
            ],
        }
    }
}

/// Puts lines behind a new descriptor's text, for files that the image loses with
/// it. Answers the length of the text without them, where there are any.
pub fn append(text: &mut Vec<u8>, names: &[String]) -> Result<Option<u64>, Failure> {
    let extents = Descriptor::parse(text)?.extents;
    let Some(lines) = lines(names.iter().map(String::as_str), &extents) else {
        return Ok(None);
    };
    let len = text.len() as u64;
    if !text.ends_with(b"\n") {
        text.push(b'\n');
    }
    text.extend_from_slice(lines.as_bytes());
    Ok(Some(len))
}

fn lines<'a>(names: impl Iterator<Item = &'a str>, extents: &[ExtentLine]) -> Option<String> {
    let family = Family::of(extents);
    let mut runs: Vec<Run> = Vec::new();
    for name in names.filter(|name| family.has_lost(name)) {
        match runs.last_mut() {
            Some(run) if run.nth(run.count).as_deref() == Some(name) => run.count += 1,
            _ => runs.push(Run {
                first: name.to_string(),
                count: 1,
            }),
        }
    }
    let line = |run: &Run| format!("{MARK}{} \"{}\"\n", run.count, run.first);
    (!runs.is_empty()).then(|| runs.iter().map(line).collect())
}

impl Run {
    /// Reads a line that is there as a whole.
    fn read(line: &[u8]) -> Option<Self> {
        let line = core::str::from_utf8(line).ok()?;
        let rest = line.strip_prefix(MARK)?.strip_suffix("\"\n")?;
        let (count, first) = rest.split_once(" \"")?;
        Some(Self {
            first: first.to_string(),
            count: count.parse().ok()?,
        })
    }

    fn nth(&self, nth: u64) -> Option<String> {
        Numbered::read(&self.first)?.nth(nth)
    }

    fn names(&self) -> impl Iterator<Item = String> {
        (0..self.count).map_while(|nth| self.nth(nth))
    }
}

/// The names of an image's extents.
struct Family<'a> {
    names: BTreeSet<&'a str>,
    families: BTreeSet<(&'a str, &'a str)>,
}

impl<'a> Family<'a> {
    fn of(extents: &'a [ExtentLine]) -> Self {
        let names = || extents.iter().map(|line| line.name.as_str());
        let numbered = names().filter_map(Numbered::read);
        Self {
            names: names().collect(),
            families: numbered.map(|name| name.family()).collect(),
        }
    }

    /// Whether a file of this name is one of the image's that it does not have.
    fn has_lost(&self, name: &str) -> bool {
        let family = Numbered::read(name).map(|name| name.family());
        name.len() <= MAX_NAME
            && family.is_some_and(|family| self.families.contains(&family))
            && !self.names.contains(name)
    }
}
