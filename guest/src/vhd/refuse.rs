//! Refusals.

use crate::error::{Failure, FailureKind};
use alloc::format;
use core::fmt::Display;

/// What the image says cannot be.
#[track_caller]
pub fn damaged(what: impl Display) -> Failure {
    Failure::new(
        FailureKind::Damaged,
        format!(
            "{what}; restore the image from a backup, or save what `qemu-img convert -f vpc` reads"
        ),
    )
}

/// A table entry that cannot be.
#[track_caller]
pub fn table(what: impl Display) -> Failure {
    Failure::new(
        FailureKind::Damaged,
        format!("{what}; `instar check` lists all such entries"),
    )
}

/// What the image has that is not handled.
#[track_caller]
pub fn unsupported(what: impl Display) -> Failure {
    Failure::new(
        FailureKind::Unsupported,
        format!("{what}; convert the image with `qemu-img convert -f vpc`"),
    )
}

/// What has to be put in order first.
#[track_caller]
pub fn unsettled(what: &str) -> Failure {
    Failure::new(
        FailureKind::Damaged,
        format!("{what}; put it in order with `instar check -r all` first"),
    )
}

/// A grow that would cut the disk off for other programs.
pub fn inside_the_field(said: u64) -> Failure {
    Failure::new(
        FailureKind::InvalidRequest,
        format!(
            "the footer gives the disk {said} bytes and a geometry of fewer: the programs that go \
             by the former would lose data; grow to at least {said} bytes"
        ),
    )
}

/// A disk without a size.
pub fn no_size() -> Failure {
    Failure::new(
        FailureKind::InvalidRequest,
        "a VHD disk cannot shrink to 0 bytes: no program opens such an image; choose a larger \
         size, or delete the image",
    )
}
