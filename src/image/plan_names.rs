//! The check of the names that a plan changes.
//!
//! A plan may make files that belong to the image, put them in the place of the
//! image's own, and remove those. It cannot choose a name that means something
//! to another program: new names continue those that the image has.

use super::plan_error::PlanError;
use instar_guest::FileNo;
use instar_guest::plan::NewName;

/// The longest name of a file, in bytes (`NAME_MAX`).
const MAX_NAME: usize = 255;

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
    made: Vec<&'a str>,
    /// Whether a commit has passed.
    pub committed: bool,
}

impl<'a> Names<'a> {
    /// Before the plan, with so many files.
    pub fn new(limits: Option<&'a NameLimits>, files: usize) -> Self {
        Self {
            limits,
            standing: vec![Standing::Old; files],
            made: Vec::new(),
            committed: false,
        }
    }

    /// A file is made; answers how long it may get.
    pub fn create(&mut self, file: FileNo, name: &'a NewName) -> Result<u64, PlanError> {
        let limits = self.limits.ok_or(PlanError::Names)?;
        if file.0 as usize != self.standing.len() {
            return Err(PlanError::WrongNumber(file));
        }
        if self.made.len() >= limits.most {
            return Err(PlanError::TooManyFiles(limits.most));
        }
        let standing = match name {
            NewName::Replacement => {
                if limits.has.is_none() || self.standing.contains(&Standing::Waiting) {
                    return Err(PlanError::Replacement);
                }
                self.made.push("");
                Standing::Waiting
            }
            NewName::Plain(name) => {
                check_name(name)?;
                let known = limits.has.as_ref();
                if known.is_some_and(|has| !continues(name, has)) {
                    return Err(PlanError::ForeignName);
                }
                if known.is_some_and(|has| has.contains(name)) {
                    return Err(PlanError::NameTwice);
                }
                if self.made.contains(&name.as_str()) {
                    return Err(PlanError::NameTwice);
                }
                self.made.push(name);
                Standing::Made
            }
        };
        self.standing.push(standing);
        Ok(limits.cap)
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

/// Whether a new name continues one that the image has: it differs from it in
/// numbers only, or puts something before the extension of it.
fn continues(name: &str, has: &[String]) -> bool {
    has.iter().any(|known| {
        let (stem, extension) = match known.rfind('.') {
            Some(dot) if dot > 0 => known.split_at(dot),
            _ => (known.as_str(), ""),
        };
        let longer = name
            .strip_prefix(stem)
            .and_then(|rest| rest.strip_suffix(extension))
            .is_some_and(|middle| middle.starts_with('-'));
        longer || (name != known && numberless(name) == numberless(known))
    })
}

/// A name with each run of digits as one mark.
fn numberless(name: &str) -> String {
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
        for name in [
            "old-s002.vmdk",
            "old-s1000.vmdk",
            "disk-s001.vmdk",
            "disk-flat.vmdk",
            "plain-1",
        ] {
            assert!(continues(name, &has), "{name}");
        }
        for name in [
            "disk.vmdk",
            "disk.txt",
            "diskette.vmdk",
            ".bashrc",
            "old-t001.vmdk",
            "plainer",
        ] {
            assert!(!continues(name, &has), "{name}");
        }
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
