//! Refusals, and what to do instead.

use crate::error::{Failure, FailureKind};
use alloc::format;
use alloc::string::String;
use core::fmt::Display;

/// A field of a sparse extent's header, or of its descriptor, that contradicts
/// the format.
#[track_caller]
pub fn damaged(what: impl Display) -> Failure {
    Failure::new(
        FailureKind::Damaged,
        format!(
            "{what}; restore the image from a copy, or read what is left with `qemu-img convert`"
        ),
    )
}

/// Something that the format has and instar does not handle.
#[track_caller]
pub fn unsupported(what: impl Display) -> Failure {
    Failure::new(
        FailureKind::Unsupported,
        format!("{what}; convert the image with `qemu-img convert -O vmdk`"),
    )
}

/// An entry of a table that leads nowhere.
#[track_caller]
pub fn table(what: impl Into<String>) -> Failure {
    Failure::new(
        FailureKind::Damaged,
        format!("{}; `instar check` tells what is damaged", what.into()),
    )
}
