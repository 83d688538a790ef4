//! Which parts of the file are in use: a bit for each MiB.

use super::Vhdx;
use super::bat::{self, Place};
use super::format::{MIB, limit};
use super::refuse::damaged;
use crate::engine::Host;
use crate::error::{Failure, FailureKind};
use alloc::format;
use alloc::vec;
use alloc::vec::Vec;
use core::fmt::Display;
use core::ops::Range;

/// Bits of a word.
const WORD: u64 = 64;

/// The use of the file, in MiB from its start.
#[derive(Clone, Debug)]
pub struct Space {
    words: Vec<u64>,
    units: u64,
}

impl Space {
    /// A file of that length, all of it free.
    pub fn new(file_len: u64) -> Result<Self, Failure> {
        if file_len > limit::MAX_TRACKED {
            return Err(Failure::new(
                FailureKind::TooLarge,
                format!(
                    "the file is {file_len} bytes long, and the use of at most {} can be \
                     followed; convert the image with `qemu-img convert`",
                    limit::MAX_TRACKED
                ),
            ));
        }
        let units = file_len.div_ceil(MIB);
        Ok(Self {
            words: vec![0; units.div_ceil(WORD) as usize],
            units,
        })
    }

    /// The units of a range of bytes, as far as they are inside the file.
    fn range(&self, offset: u64, len: u64) -> Range<u64> {
        let end = offset.saturating_add(len).div_ceil(MIB);
        (offset / MIB).min(self.units)..end.min(self.units)
    }

    fn is_used(&self, unit: u64) -> bool {
        let word = self.words.get((unit / WORD) as usize);
        word.is_none_or(|word| word >> (unit % WORD) & 1 == 1)
    }

    /// Counts a range as used. Answers whether all of it was free.
    pub fn take(&mut self, offset: u64, len: u64) -> bool {
        let mut free = true;
        for unit in self.range(offset, len) {
            free &= !self.is_used(unit);
            if let Some(word) = self.words.get_mut((unit / WORD) as usize) {
                *word |= 1 << (unit % WORD);
            }
        }
        free
    }

    /// Counts a range as free.
    pub fn give(&mut self, offset: u64, len: u64) {
        for unit in self.range(offset, len) {
            if let Some(word) = self.words.get_mut((unit / WORD) as usize) {
                *word &= !(1 << (unit % WORD));
            }
        }
    }

    /// The first free run of `len` bytes at or behind `from` that ends at or
    /// before `end`.
    pub fn find(&self, from: u64, end: u64, len: u64) -> Option<u64> {
        let (wanted, end) = (len.div_ceil(MIB), (end / MIB).min(self.units));
        let mut start = from.div_ceil(MIB);
        let mut at = start;
        while at < end {
            let full =
                at.is_multiple_of(WORD) && self.words.get((at / WORD) as usize) == Some(&u64::MAX);
            if full {
                at += WORD;
                start = at;
                continue;
            }
            at += 1;
            if self.is_used(at - 1) {
                start = at;
            } else if at - start == wanted {
                return Some(start * MIB);
            }
        }
        None
    }

    /// Counts as used what is used in the other.
    pub fn merge(&mut self, other: &Self) {
        for (word, other) in self.words.iter_mut().zip(&other.words) {
            *word |= other;
        }
    }

    /// Host offset behind everything that is used.
    pub fn end(&self) -> u64 {
        let last = self.words.iter().rposition(|&word| word != 0);
        last.map_or(0, |at| {
            let word = self.words.get(at).copied().unwrap_or(0);
            (at as u64 * WORD + WORD - u64::from(word.leading_zeros())) * MIB
        })
    }

    /// How many MiB of a range of bytes nothing uses.
    pub fn free_in(&self, range: Range<u64>) -> u64 {
        let units = range.start / MIB..(range.end / MIB).min(self.units);
        units.filter(|&unit| !self.is_used(unit)).count() as u64
    }

    /// The free runs below `end`, as offset and length, at most `most`.
    pub fn free_runs(&self, end: u64, most: usize) -> Vec<(u64, u64)> {
        let mut runs: Vec<(u64, u64)> = Vec::new();
        for unit in 0..(end / MIB).min(self.units) {
            if self.is_used(unit) {
                continue;
            }
            let count = runs.len();
            match runs.last_mut() {
                Some((start, len)) if *start + *len == unit * MIB => *len += MIB,
                _ if count == most => break,
                _ => runs.push((unit * MIB, MIB)),
            }
        }
        runs
    }
}

/// A block that has space in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    /// Index of its entry.
    pub index: u64,
    /// Where it is.
    pub at: u64,
    /// Length of the space.
    pub len: u64,
    /// What is there.
    pub content: UsedFor,
}

/// See [`Used`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UsedFor {
    /// A block's data.
    Data,
    /// A sector bitmap.
    Bitmap,
    /// Nothing: the space is kept for a block that reads as zeroes.
    Nothing,
}

impl Vhdx {
    /// What the regions and the blocks of the first `entries` entries use. Two
    /// that use the same are damage. `each` sees every block.
    pub(super) fn space(
        &self,
        host: &mut dyn Host,
        entries: u64,
        mut each: impl FnMut(Used),
    ) -> Result<Space, Failure> {
        let mut space = Space::new(self.source.file_len)?;
        let mut kept: Option<Space> = None;
        for region in &self.table.regions {
            space.take(region.offset, region.len);
        }
        self.each_used(host, entries, |used| {
            let Used { index, at, len, .. } = used;
            if used.content == UsedFor::Nothing {
                let all = match kept.take() {
                    Some(kept) => kept,
                    None => Space::new(self.source.file_len)?,
                };
                kept.insert(all).take(at, len);
            } else if !space.take(at, len) {
                return Err(damaged(format!(
                    "BAT entry {index}: the block at {at:#x} overlaps another block or a table"
                )));
            }
            each(used);
            Ok(())
        })?;
        if let Some(kept) = kept {
            space.merge(&kept);
        }
        Ok(space)
    }

    /// Looks at every block that has space in the file, checked as such. Space
    /// that is kept where none can be is not looked at.
    pub(super) fn each_used(
        &self,
        host: &mut dyn Host,
        entries: u64,
        mut each: impl FnMut(Used) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let geometry = self.metadata.geometry;
        let (bat, range) = (self.bat.offset, 0..entries);
        bat::scan(host, &self.source, bat, range, |_, index, raw| {
            let refuse = |why: &dyn Display| damaged(format!("BAT entry {index}: {why}"));
            let (len, data) = match geometry.block_at(index) {
                Some(_) => (geometry.block_size, UsedFor::Data),
                None => (MIB, UsedFor::Bitmap),
            };
            let place = Place::decode(raw, geometry.has_parent).map_err(|flaw| refuse(&flaw))?;
            let (at, content) = match place {
                Place::Absent | Place::Zero { kept: None } => return Ok(()),
                Place::Zero { kept: Some(at) } => (at, UsedFor::Nothing),
                Place::Full(at) | Place::Partial(at) => (at, data),
            };
            let checked = match content {
                UsedFor::Bitmap => self.check_bitmap(at, len),
                UsedFor::Data | UsedFor::Nothing => self.check_block(at, len),
            };
            match checked {
                Err(_) if content == UsedFor::Nothing => return Ok(()),
                checked => checked.map_err(|why| refuse(&why))?,
            }
            each(Used {
                index,
                at,
                len,
                content,
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_found_where_nothing_is_used() {
        let mut space = Space::new(200 * MIB + 1).unwrap();
        assert!(space.take(0, 70 * MIB));
        assert!(space.take(72 * MIB, MIB));
        assert!(!space.take(72 * MIB, 2 * MIB));
        assert_eq!(space.find(0, 201 * MIB, MIB), Some(70 * MIB));
        assert_eq!(space.find(0, 201 * MIB, 3 * MIB), Some(74 * MIB));
        assert_eq!(space.find(0, 76 * MIB, 3 * MIB), None);
        assert_eq!(space.find(198 * MIB, u64::MAX, 3 * MIB), Some(198 * MIB));
        assert_eq!(space.find(199 * MIB, u64::MAX, 3 * MIB), None);
        assert_eq!(space.end(), 74 * MIB);
        let runs = [(70 * MIB, 2 * MIB), (74 * MIB, 26 * MIB)];
        assert_eq!(space.free_runs(100 * MIB, 9), runs);
        assert_eq!(space.free_runs(100 * MIB, 1), runs[..1]);
        assert_eq!(space.free_in(60 * MIB..74 * MIB), 2);
        space.give(72 * MIB, 2 * MIB);
        assert_eq!(space.end(), 70 * MIB);
    }

    #[test]
    fn a_file_that_is_too_long_to_follow_is_refused() {
        let failure = Space::new(limit::MAX_TRACKED + 1).unwrap_err();
        assert_eq!(failure.kind, FailureKind::TooLarge);
    }
}
