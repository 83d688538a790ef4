//! Sizes of disks that are all there: the footer moves.
//!
//! To grow, an unchanged footer is appended first: a file may be longer than
//! its footer says. Then everything between the old end and the new one is made
//! zero, the former footer included, and the last footer gets the new size. To
//! shrink, the footer gets the smaller size where it is; then it moves down.
//!
//! Where the footer's geometry gives a smaller disk than its size field, what
//! lies between is the disk's for programs that go by the field: it keeps its
//! content, also when a grow makes it visible to all.

use super::Vhd;
use super::settle::write_footer;
use crate::error::Failure;
use crate::plan::{Purpose, SECTOR, Step};
use crate::proto::{FileNo, Preallocation};
use crate::resize::Wish;
use alloc::vec;
use alloc::vec::Vec;

/// Stages of a plan; some may be empty.
pub(super) type Stages = Vec<(Purpose, Vec<Step>)>;

impl Vhd {
    /// The stages of a grow.
    pub(super) fn grow_fixed(&self, wish: &Wish) -> Result<Stages, Failure> {
        let old_end = self.file_len;
        // What an interrupted change left behind may be longer than what is needed.
        let last = wish.size.max(old_end - SECTOR);
        let footer = self.footer.resized(wish.size)?;
        let mut append = Vec::new();
        let mut zero = vec![blank(wish, self.footer.reach(), old_end.min(last))];
        if last >= old_end {
            if matches!(
                wish.preallocation,
                Preallocation::Falloc | Preallocation::Full
            ) {
                append.push(Step::Reserve {
                    file: FileNo::IMAGE,
                    offset: old_end,
                    len: last + SECTOR - old_end,
                });
            }
            append.push(write_footer(&self.footer, last));
            if wish.preallocation == Preallocation::Full {
                zero.push((old_end < last).then(|| Step::Fill {
                    file: FileNo::IMAGE,
                    offset: old_end,
                    len: last - old_end,
                }));
            }
        }
        Ok(vec![
            (Purpose::Prepare, append),
            (Purpose::Prepare, zero.into_iter().flatten().collect()),
            (Purpose::Commit, vec![write_footer(&footer, last)]),
        ])
    }

    /// The stages of a shrink.
    pub(super) fn shrink_fixed(&self, wish: &Wish) -> Result<Stages, Failure> {
        let footer = self.footer.resized(wish.size)?;
        Ok(vec![
            (
                Purpose::Commit,
                vec![write_footer(&footer, self.file_len - SECTOR)],
            ),
            (Purpose::Release, vec![write_footer(&footer, wish.size)]),
            (Purpose::Release, vec![cut(wish.size)]),
        ])
    }

    /// The stages that cut off what lies behind the disk, where there is more
    /// than the footer.
    pub(super) fn cut_fixed(&self) -> Stages {
        let size = self.footer.reach().next_multiple_of(SECTOR);
        match self.file_len > size + SECTOR {
            false => Vec::new(),
            true => vec![
                (Purpose::Release, vec![write_footer(&self.footer, size)]),
                (Purpose::Release, vec![cut(size)]),
            ],
        }
    }
}

/// The end of a file whose footer is at `size`.
fn cut(size: u64) -> Step {
    Step::SetLength {
        file: FileNo::IMAGE,
        len: size + SECTOR,
    }
}

/// The same inside the file, with disk space where that is asked for.
pub(super) fn blank(wish: &Wish, start: u64, end: u64) -> Option<Step> {
    let zero = zeroes(start, end)?;
    match wish.preallocation {
        Preallocation::Off | Preallocation::Metadata => Some(zero),
        Preallocation::Falloc | Preallocation::Full => Some(Step::Fill {
            file: FileNo::IMAGE,
            offset: start,
            len: end - start,
        }),
    }
}

/// Zeroes from one offset to another, if there is anything between them.
pub(super) fn zeroes(start: u64, end: u64) -> Option<Step> {
    (start < end).then(|| Step::Zero {
        file: FileNo::IMAGE,
        offset: start,
        len: end - start,
    })
}
