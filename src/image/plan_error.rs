//! Why a plan is refused.

use super::error::{ErrorKind, Fault};
use instar_guest::FileNo;
use std::fmt;

/// Why a plan is refused. Offsets and lengths are bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PlanError {
    UnknownFile(FileNo),
    Overflow { offset: u64, len: u64 },
    PastCap { end: u64, cap: u64 },
    BelowFloor { offset: u64, floor: u64 },
    Shortens { len: u64, shortest: u64 },
    PastEnd { end: u64, len: u64 },
    CopyOverlaps { from: u64, to: u64, len: u64 },
    Fills { bytes: u64, fill: u64 },
    CommitMissing,
    Commits { count: usize, most: usize },
    CommitNotLast,
    CommitSteps(usize),
    CommitSpansSectors { offset: u64, len: u64 },
    CommitNotAtomic,
    Names,
    WrongNumber(FileNo),
    TooManyFiles(usize),
    BadName,
    ForeignName,
    NameTwice,
    Replacement,
    RenameOutsideCommit,
    Rename { file: FileNo, over: FileNo },
    Unlink(FileNo),
    Gone(FileNo),
}

impl fmt::Display for PlanError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::UnknownFile(FileNo(n)) => write!(f, "a step changes file {n}, which it may not"),
            Self::Overflow { offset, len } => {
                write!(f, "a step's range of {len} bytes at {offset:#x} overflows")
            }
            Self::PastCap { end, cap } => {
                write!(
                    f,
                    "a step reaches up to {end:#x}, the file may grow to {cap:#x}"
                )
            }
            Self::BelowFloor { offset, floor } => write!(
                f,
                "a streamed step changes the file at {offset:#x}, below its old end at {floor:#x}"
            ),
            Self::Shortens { len, shortest } => {
                write!(f, "a step cuts the file to {len} bytes, below {shortest}")
            }
            Self::PastEnd { end, len } => {
                write!(
                    f,
                    "a step uses bytes up to {end:#x} of a file of {len} bytes"
                )
            }
            Self::CopyOverlaps { from, to, len } => write!(
                f,
                "a copy of {len} bytes from {from:#x} to {to:#x} overlaps itself"
            ),
            Self::Fills { bytes, fill } => {
                write!(
                    f,
                    "the steps fill {bytes} bytes of disk space, {fill} are allowed"
                )
            }
            Self::CommitMissing => f.write_str("it has no commit"),
            Self::Commits { count, most: 0 } => {
                write!(f, "it has {count} commits and may not have any")
            }
            Self::Commits { count, most } => {
                write!(f, "it has {count} commits, {most} are allowed")
            }
            Self::CommitNotLast => f.write_str("its commit is not its last stage"),
            Self::CommitSteps(n) => write!(
                f,
                "a commit has {n} steps that are not one, or two that write the same"
            ),
            Self::CommitSpansSectors { offset, len } => write!(
                f,
                "a commit of {len} bytes at {offset:#x} is not inside one sector"
            ),
            Self::Names => f.write_str("it makes or removes files and may not do that"),
            Self::WrongNumber(FileNo(n)) => write!(f, "a file that it makes is called file {n}"),
            Self::TooManyFiles(most) => write!(f, "it makes or removes more than {most} files"),
            Self::BadName => {
                f.write_str("a name that it gives or takes is not one component of a path")
            }
            Self::ForeignName => {
                f.write_str("a name that it gives or takes does not continue the image's own")
            }
            Self::NameTwice => {
                f.write_str("it gives one name to two files, or removes one of its own")
            }
            Self::Replacement => f.write_str(
                "a replacement that it makes does not take a file's place, or is one of two",
            ),
            Self::RenameOutsideCommit => f.write_str("it renames a file outside a commit"),
            Self::Rename {
                file: FileNo(n),
                over: FileNo(m),
            } => write!(f, "it puts file {n} in the place of file {m}"),
            Self::Unlink(FileNo(n)) => write!(
                f,
                "it removes file {n}, which is the image or may still be referred to"
            ),
            Self::Gone(FileNo(n)) => write!(f, "it changes file {n}, which has no name any more"),
            Self::CommitNotAtomic => {
                f.write_str("a commit is neither a write, a set-length nor a rename")
            }
        }
    }
}

impl From<PlanError> for Fault {
    fn from(error: PlanError) -> Self {
        Self::new(
            ErrorKind::BadGuest,
            format!("The sandbox's plan is refused, nothing was changed: {error}"),
        )
    }
}
