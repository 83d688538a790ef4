//! How damage is reported: what is wrong, where, and what to do about it.

use crate::error::{Failure, FailureKind};
use alloc::format;
use core::fmt::Display;

/// What contradicts itself or the specification.
#[track_caller]
pub fn damaged(what: impl Display) -> Failure {
    Failure::new(
        FailureKind::Damaged,
        format!("{what}; the image is damaged: restore it from a backup"),
    )
}

/// What instar does not handle.
#[track_caller]
pub fn unsupported(what: impl Display) -> Failure {
    Failure::new(FailureKind::Unsupported, format!("{what}"))
}

/// The refusal of a guest's writes.
#[track_caller]
pub fn no_writing() -> Failure {
    unsupported(
        "a differencing image is read-only: merge it into its parent (Merge-VHD), and write to \
         that",
    )
}
