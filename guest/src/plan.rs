//! A change to an image as a value: stages of steps, with a durability barrier
//! between the stages.
//!
//! Within a stage order is free. Between two stages the executor makes
//! everything durable (`fdatasync`, and the directory where names changed), and
//! once more after the last. A *commit* stage holds one single step that is
//! atomic by nature: a write inside one aligned 512-byte sector, one set-length,
//! or one rename. Where a format has two authoritative copies of that sector,
//! it holds the same write for each, as each reader goes by one of them. What
//! comes before the first commit is invisible to every reader, what comes after
//! the last only tidies up. Files are created before anything else of their
//! stage.

use crate::proto::FileNo;
use alloc::string::String;
use alloc::vec::Vec;
use serde::{Deserialize, Serialize};

/// A sector is written whole or not at all: the atomic unit of every plan.
pub const SECTOR: u64 = 512;

/// How far behind a file's end the first new byte may lie at most, in bytes:
/// what an interrupted change counted as used there is skipped and stays a
/// hole. Such space may not be handed out: nobody has looked whether a table
/// that has not been read yet refers to it.
pub const MAX_GAP: u64 = 512 << 30;

/// The most commits in a plan.
pub const MAX_COMMITS: usize = 4;

/// The most copies that a commit writes.
pub const MAX_COPIES: usize = 2;

/// How a file that a plan makes is called, in the directory of the image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum NewName {
    /// As the image, with `.instar-new` behind it: it takes the place of a file
    /// later in the plan. What an interrupted plan left under the name goes.
    Replacement,
    /// A name of its own, without a directory, that no file has yet.
    Plain(String),
}

/// One effect on one file. Offsets and lengths are bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Step {
    /// Write `data` at `offset`. Extends the file where it ends before that.
    Write {
        /// The file to write.
        file: FileNo,
        /// Host offset of the first byte.
        offset: u64,
        /// What to write.
        #[serde(with = "serde_bytes")]
        data: Vec<u8>,
    },
    /// Make a range read as zeroes. Extends the file if needed.
    Zero {
        /// The file to change.
        file: FileNo,
        /// Host offset of the first byte.
        offset: u64,
        /// Length of the range.
        len: u64,
    },
    /// Write zeroes, so that the range has disk space of its own. Extends the
    /// file if needed.
    Fill {
        /// The file to change.
        file: FileNo,
        /// Host offset of the first byte.
        offset: u64,
        /// Length of the range.
        len: u64,
    },
    /// Copy a range within a file; source and destination do not overlap. Holes
    /// stay holes, and space that is only reserved becomes one.
    Copy {
        /// The file to change.
        file: FileNo,
        /// Host offset to copy from.
        from: u64,
        /// Host offset to copy to.
        to: u64,
        /// Length of both ranges.
        len: u64,
    },
    /// Copy a range of another file into a file; extends that if needed.
    CopyFrom {
        /// The file to change.
        file: FileNo,
        /// The file to copy from, another one.
        source: FileNo,
        /// Offset in it to copy from.
        from: u64,
        /// Host offset to copy to.
        to: u64,
        /// Length of both ranges.
        len: u64,
    },
    /// Allocate disk space for a range without changing length or content, so
    /// that a full disk is found before anything is committed.
    Reserve {
        /// The file to change.
        file: FileNo,
        /// Host offset of the first byte.
        offset: u64,
        /// Length of the range.
        len: u64,
    },
    /// Set the file's length.
    SetLength {
        /// The file to change.
        file: FileNo,
        /// The new length.
        len: u64,
    },
    /// Give the disk space of a range back; it reads as zeroes afterwards.
    Punch {
        /// The file to change.
        file: FileNo,
        /// Host offset of the first byte.
        offset: u64,
        /// Length of the range.
        len: u64,
    },
    /// Make an empty file with the owner, mode and attributes of the image. It
    /// gets the lowest number that no file has had.
    Create {
        /// That number.
        file: FileNo,
        /// What it is called.
        name: NewName,
    },
    /// Give a created file the name of another, atomically: the other loses it.
    Rename {
        /// The created file.
        file: FileNo,
        /// The file whose name it takes.
        over: FileNo,
    },
    /// Remove a file's name. Nothing refers to the file any more.
    Unlink {
        /// The file; not the image itself.
        file: FileNo,
    },
    /// Remove what an interrupted plan left under a name, if it is there: a file
    /// that the image does not consist of.
    Remove {
        /// The name.
        name: NewName,
    },
}

impl Step {
    /// The file that the step changes; where that is none by number, the image.
    pub fn file(&self) -> FileNo {
        match *self {
            Step::Write { file, .. }
            | Step::Zero { file, .. }
            | Step::Fill { file, .. }
            | Step::Copy { file, .. }
            | Step::CopyFrom { file, .. }
            | Step::Reserve { file, .. }
            | Step::SetLength { file, .. }
            | Step::Punch { file, .. }
            | Step::Create { file, .. }
            | Step::Rename { file, .. }
            | Step::Unlink { file } => file,
            Step::Remove { .. } => FileNo::IMAGE,
        }
    }
}

/// What a stage is for: what `--dry-run` prints, and what tells the commit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Purpose {
    /// Lay down new structures that nothing refers to yet.
    Prepare,
    /// Make new reference counts visible before anything relies on them.
    Count,
    /// Refer to what earlier stages laid down, invisibly to a reader.
    Link,
    /// The atomic step that makes the change visible.
    Commit,
    /// Release what is no longer referred to.
    Release,
}

/// Steps between two durability barriers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stage {
    /// What the stage is for.
    pub purpose: Purpose,
    /// The steps, in any order but that files are created first.
    pub steps: Vec<Step>,
}

/// An ordered change to an image.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// The stages, in order; each is durable before the next begins.
    pub stages: Vec<Stage>,
}

impl Plan {
    /// Whether the plan changes nothing.
    pub fn is_empty(&self) -> bool {
        self.stages.iter().all(|stage| stage.steps.is_empty())
    }
}
