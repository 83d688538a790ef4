//! The check of the names that a plan changes.
//!
//! A plan may make files that belong to the image, put them in the place of the
//! image's own, and remove those, and what an interrupted one made. It cannot
//! choose a name that means something to another program: new names continue
//! those that the image has.

use super::plan_error::PlanError;
use instar_guest::FileNo;
use instar_guest::plan::NewName;
use std::collections::{BTreeMap, BTreeSet};

/// The longest name of a file, in bytes (`NAME_MAX`).
const MAX_NAME: usize = 255;
/// The most files that a plan may make, however many may be open, and the most
/// that it may remove by name.
const MAX_MADE: usize = 4096;

/// Which names a plan may change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NameLimits {
    /// How many files it may make.
    pub most: usize,
    /// The greatest length that one of them may get, in bytes.
    pub cap: u64,
    /// Names that the image has, without directories. `None` where it is only
    /// being made, and new names are the business of whoever has it made.
    pub has: Option<Vec<String>>,
}

/// How a file stands to its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    /// It had the name before the plan.
    Old,
    /// The plan made it, under a name of its own.
    Made,
    /// The plan made it to take another's place.
    Waiting,
    /// It has taken another's place.
    Placed,
    /// It has no name any more.
    Gone,
}

/// The names of a plan's files as its steps change them.
pub(super) struct Names<'a> {
    limits: Option<&'a NameLimits>,
    standing: Vec<Standing>,
    /// Names that the image has.
    known: Option<Known<'a>>,
    /// How many files the plan makes, and under which plain names.
    count: usize,
    made: BTreeSet<&'a str>,
    /// How many files, that are none of the image's, it removes, and which.
    removed: BTreeSet<&'a str>,
    /// Whether a commit has passed.
    pub committed: bool,
}

impl<'a> Names<'a> {
    /// Before the plan, with so many files.
    pub fn new(limits: Option<&'a NameLimits>, files: usize) -> Self {
        Self {
            limits,
            standing: vec![Standing::Old; files],
            known: limits
                .and_then(|limits| limits.has.as_deref())
                .map(Known::new),
            count: 0,
            made: BTreeSet::new(),
            removed: BTreeSet::new(),
            committed: false,
        }
    }

    /// A file is made; answers how long it may get.
    pub fn create(&mut self, file: FileNo, name: &'a NewName) -> Result<u64, PlanError> {
        let limits = self.limits.ok_or(PlanError::Names)?;
        if file.0 as usize != self.standing.len() {
            return Err(PlanError::WrongNumber(file));
        }
        let most = limits.most.min(MAX_MADE);
        if self.count >= most {
            return Err(PlanError::TooManyFiles(most));
        }
        self.count += 1;
        let standing = match name {
            NewName::Replacement => {
                if limits.has.is_none() || self.standing.contains(&Standing::Waiting) {
                    return Err(PlanError::Replacement);
                }
                Standing::Waiting
            }
            NewName::Plain(name) => {
                self.check_new(name)?;
                if !self.made.insert(name) {
                    return Err(PlanError::NameTwice);
                }
                Standing::Made
            }
        };
        self.standing.push(standing);
        Ok(limits.cap)
    }

    /// A name that a file of the image could have, and none has.
    fn check_new(&self, name: &str) -> Result<(), PlanError> {
        check_name(name)?;
        let known = self.known.as_ref();
        if known.is_some_and(|known| !known.is_continued_by(name)) {
            return Err(PlanError::ForeignName);
        }
        let has = self.limits.and_then(|limits| limits.has.as_ref());
        match has.is_some_and(|has| has.iter().any(|known| known == name)) {
            true => Err(PlanError::NameTwice),
            false => Ok(()),
        }
    }

    /// What an interrupted plan left under a name goes: under one that the plan
    /// could give to a file, and does not.
    pub fn remove(&mut self, name: &'a NewName) -> Result<(), PlanError> {
        if self.limits.is_none_or(|limits| limits.has.is_none()) {
            return Err(PlanError::Names);
        }
        match name {
            NewName::Replacement if self.standing.contains(&Standing::Waiting) => {
                Err(PlanError::Replacement)
            }
            NewName::Replacement => Ok(()),
            NewName::Plain(name) => {
                self.check_new(name)?;
                if self.made.contains(name.as_str()) || !self.removed.insert(name) {
                    return Err(PlanError::NameTwice);
                }
                match self.removed.len() <= MAX_MADE {
                    true => Ok(()),
                    false => Err(PlanError::TooManyFiles(MAX_MADE)),
                }
            }
        }
    }

    /// A made file takes the place of another, in a commit.
    pub fn rename(&mut self, file: FileNo, over: FileNo, commit: bool) -> Result<(), PlanError> {
        if !commit {
            return Err(PlanError::RenameOutsideCommit);
        }
        // A new image takes nobody's place.
        let may = self.limits.is_some_and(|limits| limits.has.is_some());
        match (self.of(file), self.of(over)) {
            (Some(Standing::Made | Standing::Waiting), Some(Standing::Old)) if may => {
                self.standing[file.0 as usize] = Standing::Placed;
                self.standing[over.0 as usize] = Standing::Gone;
                Ok(())
            }
            _ => Err(PlanError::Rename { file, over }),
        }
    }

    /// A file's name is removed: nothing refers to it any more.
    pub fn unlink(&mut self, file: FileNo) -> Result<(), PlanError> {
        let old = self.of(file) == Some(Standing::Old);
        match old && self.committed && file != FileNo::IMAGE {
            true => {
                self.standing[file.0 as usize] = Standing::Gone;
                Ok(())
            }
            false => Err(PlanError::Unlink(file)),
        }
    }

    /// A file's content changes.
    pub fn touch(&self, file: FileNo) -> Result<(), PlanError> {
        match self.of(file) {
            Some(Standing::Gone) => Err(PlanError::Gone(file)),
            _ => Ok(()),
        }
    }

    /// The plan is over.
    pub fn finish(&self) -> Result<(), PlanError> {
        match self.standing.contains(&Standing::Waiting) {
            true => Err(PlanError::Replacement),
            false => Ok(()),
        }
    }

    fn of(&self, file: FileNo) -> Option<Standing> {
        self.standing.get(file.0 as usize).copied()
    }
}

/// One component of a path, and a plain one.
fn check_name(name: &str) -> Result<(), PlanError> {
    let plain = !name.is_empty()
        && name.len() <= MAX_NAME
        && name != "."
        && name != ".."
        && !name.contains(['/', '\0']);
    match plain {
        true => Ok(()),
        false => Err(PlanError::BadName),
    }
}

/// Names that new ones may continue, ready to be looked up: a plan may make
/// thousands of files in an image that has thousands.
struct Known<'a> {
    /// Each in two, before its extension.
    parts: BTreeSet<(&'a str, &'a str)>,
    /// By what they are but for numbers: the one name, or `None` for several.
    numberless: BTreeMap<String, Option<&'a str>>,
}

impl<'a> Known<'a> {
    fn new(has: &'a [String]) -> Self {
        let mut numberless = BTreeMap::new();
        for name in has.iter().map(String::as_str) {
            let only = numberless
                .entry(without_numbers(name))
                .or_insert(Some(name));
            *only = only.filter(|only| *only == name);
        }
        Self {
            parts: has.iter().map(|name| split_extension(name)).collect(),
            numberless,
        }
    }

    /// Whether a new name differs from one of these in numbers only, or puts
    /// something that starts with a dash before the extension of it.
    fn is_continued_by(&self, name: &str) -> bool {
        let (_, extension) = split_extension(name);
        let longer = name.match_indices('-').any(|(dash, _)| {
            let (stem, rest) = name.split_at(dash);
            let has =
                |extension| rest.ends_with(extension) && self.parts.contains(&(stem, extension));
            has("") || has(extension)
        });
        let other = |only: &Option<&str>| only.is_none_or(|only| only != name);
        longer
            || self
                .numberless
                .get(&without_numbers(name))
                .is_some_and(other)
    }
}

/// A name before its extension, and that with its dot. A leading dot starts
/// none.
fn split_extension(name: &str) -> (&str, &str) {
    match name.rfind('.') {
        Some(dot) if dot > 0 => name.split_at(dot),
        _ => (name, ""),
    }
}

/// A name with each run of digits as one mark.
fn without_numbers(name: &str) -> String {
    let mut out = String::new();
    for c in name.chars() {
        match c.is_ascii_digit() {
            true if out.ends_with('0') => {}
            true => out.push('0'),
            false => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn new_names_continue_those_that_the_image_has() {
        let has = ["disk.vmdk", "old-s001.vmdk", "plain"].map(String::from);
        let known = Known::new(&has);
        for name in [
            "old-s002.vmdk",
            "old-s1000.vmdk",
            "disk-s001.vmdk",
            "disk-flat.vmdk",
            "plain-1",
        ] {
            assert!(known.is_continued_by(name), "{name}");
        }
        for name in [
            "disk.vmdk",
            "disk.txt",
            "diskette.vmdk",
            ".bashrc",
            "old-t001.vmdk",
            "plainer",
        ] {
            assert!(!known.is_continued_by(name), "{name}");
        }
    }

    #[test]
    fn a_plan_makes_so_many_files_and_no_more() {
        let has = vec!["disk-s0.vmdk".to_string()];
        let limits = NameLimits {
            most: usize::MAX,
            cap: 0,
            has: Some(has),
        };
        let new: Vec<NewName> = (1..=MAX_MADE + 1)
            .map(|number| NewName::Plain(format!("disk-s{number}.vmdk")))
            .collect();
        let mut names = Names::new(Some(&limits), 0);
        let made = |(number, name)| names.create(FileNo(number), name);
        let results: Vec<_> = (0..).zip(&new).map(made).collect();
        let (last, others) = results.split_last().unwrap();
        assert!(others.iter().all(|made| *made == Ok(0)));
        assert_eq!(*last, Err(PlanError::TooManyFiles(MAX_MADE)));
    }

    #[test]
    fn a_name_is_one_plain_component() {
        let long = "n".repeat(256);
        for name in ["", ".", "..", "a/b", "/", "a\0b", &long] {
            assert_eq!(check_name(name), Err(PlanError::BadName));
        }
        for name in ["a", "..a", "a b.c", &long[1..]] {
            assert_eq!(check_name(name), Ok(()));
        }
    }
}
