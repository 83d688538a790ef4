//! A change to an image as a value: stages of steps, with a durability barrier
//! between the stages.
//!
//! Within a stage order is free. Between two stages the executor makes
//! everything durable (`fdatasync`), and once more after the last. A *commit*
//! stage holds one single step that is atomic by nature: a write inside one
//! aligned 512-byte sector, or one set-length. What comes before the commit is
//! invisible to every reader, what comes after it only tidies up.

use crate::proto::FileNo;
use alloc::vec::Vec;
use serde::{Deserialize, Serialize};

/// A sector is written whole or not at all: the atomic unit of every plan.
pub const SECTOR: u64 = 512;

/// How far behind a file's end the first new byte may lie at most, in bytes:
/// what an interrupted change counted as used there is skipped and stays a
/// hole. Such space may not be handed out: nobody has looked whether a table
/// that has not been read yet refers to it.
pub const MAX_GAP: u64 = 512 << 30;

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
    /// Copy a range within a file; source and destination do not overlap.
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
}

impl Step {
    /// The file that the step changes.
    pub fn file(&self) -> FileNo {
        match *self {
            Step::Write { file, .. }
            | Step::Zero { file, .. }
            | Step::Copy { file, .. }
            | Step::Reserve { file, .. }
            | Step::SetLength { file, .. }
            | Step::Punch { file, .. } => file,
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
    /// The one atomic step that makes the change visible.
    Commit,
    /// Release what is no longer referred to.
    Release,
}

/// Steps between two durability barriers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stage {
    /// What the stage is for.
    pub purpose: Purpose,
    /// The steps, in any order.
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
