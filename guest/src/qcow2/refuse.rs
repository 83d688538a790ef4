//! How damage is reported: what is wrong, where, and what to do about it.

use super::geometry::Geometry;
use crate::error::{Failure, FailureKind};
use alloc::format;
use core::fmt::Display;

/// A header that contradicts itself or the specification.
#[track_caller]
pub fn header(what: impl Display) -> Failure {
    Failure::new(
        FailureKind::Damaged,
        format!("{what}; the header is damaged: restore the image from a backup"),
    )
}

/// A table behind the header that contradicts itself or the specification.
#[track_caller]
pub fn table(what: impl Display) -> Failure {
    Failure::new(
        FailureKind::Damaged,
        format!("{what}; run `qemu-img check -r all` on a copy of the image"),
    )
}

/// Why a table cannot lie at `offset`: it must be aligned, behind the header
/// and begin inside the file. The last cluster of a file may be cut short, so
/// the end may lie in the cluster that the file ends in.
pub fn misplaced(geometry: Geometry, file_len: u64, offset: u64, len: u64) -> Option<&'static str> {
    if !geometry.is_aligned(offset) {
        return Some("not a multiple of the cluster size");
    }
    if offset < geometry.cluster_size() {
        return Some("overlaps the header");
    }
    let file_end = geometry.cluster_end(file_len);
    let end = offset.checked_add(len);
    match (end, file_end) {
        (Some(end), Some(file_end)) if end <= file_end => None,
        _ => Some("past the end of the file"),
    }
}
