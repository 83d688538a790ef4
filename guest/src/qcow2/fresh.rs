//! The content of tables that did not exist before: refcount blocks that count
//! one contiguous run of new clusters, the refcount table entries for them, and
//! L2 tables that map a contiguous guest range.
//!
//! Pure functions that fill a window of such a table, so that a table of any
//! size is made in pieces. No I/O, nothing that is read from an image.

use super::format::{entry, refcount};
use super::geometry::Geometry;
use crate::bytes;
use crate::error::Failure;
use core::ops::Range;

/// Fills `window`, which lies `distance` bytes into a run of refcount blocks.
/// The blocks have the numbers `numbers`, in that order; clusters in `used`
/// count 1.
pub fn fill_blocks(
    geometry: Geometry,
    numbers: &[u64],
    used: &Range<u64>,
    distance: u64,
    window: &mut [u8],
) {
    let per_block = geometry.refcounts_per_block();
    let mut at = distance;
    let mut rest = window;
    while !rest.is_empty() {
        let within = at % geometry.cluster_size();
        let len = ((geometry.cluster_size() - within) as usize).min(rest.len());
        let (piece, tail) = rest.split_at_mut(len);
        let number = usize::try_from(at / geometry.cluster_size())
            .ok()
            .and_then(|slot| numbers.get(slot));
        if let Some(number) = number {
            // Windows begin and end on byte boundaries, so counts narrower than
            // a byte are never cut.
            let base = number * per_block + within * 8 / geometry.width().bits();
            let end = base + piece.len() as u64 * 8 / geometry.width().bits();
            let first = used.start.clamp(base, end);
            let last = used.end.clamp(first, end);
            geometry.width().set_ones(piece, first - base, last - base);
        }
        at += len as u64;
        rest = tail;
    }
}

/// Fills `window`, which lies `distance` bytes into a refcount table, with the
/// entries of new blocks: `numbers[k]` lies at cluster `first + k`. Other
/// entries keep their value.
pub fn fill_table(
    geometry: Geometry,
    numbers: &[u64],
    first: u64,
    distance: u64,
    window: &mut [u8],
) -> Result<(), Failure> {
    let start = distance / refcount::ENTRY_LEN;
    let end = start + window.len() as u64 / refcount::ENTRY_LEN;
    let skipped = numbers.partition_point(|&number| number < start);
    for (slot, &number) in numbers.iter().enumerate().skip(skipped) {
        if number >= end {
            break;
        }
        let at = ((number - start) * refcount::ENTRY_LEN) as usize;
        bytes::put_be64(window, at, geometry.host_offset(first + slot as u64))?;
    }
    Ok(())
}

/// What new extended L2 entries with host clusters say of their subclusters, as
/// the second half of the entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Subclusters {
    /// All unallocated: the host clusters are there for later, and what is behind
    /// the image shows through.
    Unallocated = 0,
    /// All allocated.
    Allocated = u32::MAX as u64,
    /// All read as zeroes, whatever is behind the image.
    Zero = (u32::MAX as u64) << 32,
}

/// What new L2 entries say about a contiguous run of guest clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fill {
    /// Data at consecutive host clusters.
    Data {
        /// Host offset of the first cluster's data.
        at: u64,
        /// What extended L2 entries say of the subclusters.
        subclusters: Subclusters,
    },
    /// Reads as zeroes (version 3).
    Zero,
}

impl Fill {
    /// Writes the entry of the `index`-th cluster of the run.
    fn put(self, geometry: Geometry, index: u64, slot: &mut [u8]) -> Result<(), Failure> {
        let data = |at: u64| at.saturating_add(geometry.host_offset(index)) | entry::COPIED;
        let (word, subclusters) = match self {
            Self::Data { at, subclusters } => (data(at), subclusters),
            Self::Zero if geometry.extended_l2() => (0, Subclusters::Zero),
            Self::Zero => (entry::ZERO, Subclusters::Unallocated),
        };
        bytes::put_be64(slot, 0, word)?;
        if geometry.extended_l2() {
            bytes::put_be64(slot, 8, subclusters as u64)?;
        }
        Ok(())
    }
}

/// A contiguous run of guest clusters and what their L2 entries are to say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FillRange {
    /// Guest cluster numbers.
    pub clusters: Range<u64>,
    /// What the entries say.
    pub fill: Fill,
}

impl FillRange {
    /// Fills `window`, which lies `distance` bytes into a run of consecutive L2
    /// tables whose first is number `table`. Entries outside the range keep
    /// their value.
    pub fn fill_l2(
        &self,
        geometry: Geometry,
        table: u64,
        distance: u64,
        window: &mut [u8],
    ) -> Result<(), Failure> {
        let entry_len = geometry.l2_entry_len();
        let start = table * geometry.l2_entries() + distance / entry_len;
        let end = start + window.len() as u64 / entry_len;
        let first = self.clusters.start.clamp(start, end);
        let last = self.clusters.end.clamp(first, end);
        let slots = window
            .chunks_exact_mut(entry_len as usize)
            .skip((first - start) as usize);
        for (cluster, slot) in (first..last).zip(slots) {
            self.fill
                .put(geometry, cluster - self.clusters.start, slot)?;
        }
        Ok(())
    }
}

/// Fills `window`, which lies `distance` bytes into a run of L1 entries, with
/// pointers to consecutive tables from cluster `first` on.
pub fn fill_l1(
    geometry: Geometry,
    first: u64,
    distance: u64,
    window: &mut [u8],
) -> Result<(), Failure> {
    let start = distance / entry::LEN;
    for (slot, word) in window.chunks_exact_mut(entry::LEN as usize).enumerate() {
        let at = geometry.host_offset(first + start + slot as u64);
        bytes::put_be64(word, 0, at | entry::COPIED)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A table that is filled through windows of `step` bytes.
    fn windows(len: u64, step: usize, mut fill: impl FnMut(u64, &mut [u8])) -> Vec<u8> {
        let mut table = vec![0; len as usize];
        let mut at = 0;
        for window in table.chunks_mut(step) {
            fill(at, window);
            at += window.len() as u64;
        }
        table
    }

    proptest! {
        #[test]
        fn blocks_count_the_used_clusters_and_no_other(
            order in 0u32..=6, start in 0u64..9000, len in 0u64..9000, step in 1usize..20
        ) {
            let geometry = Geometry::new(9, false, order);
            let per_block = geometry.refcounts_per_block();
            let numbers = [0, 1, 3];
            let used = start..start + len;
            let blocks = windows(3 * 512, step * 64, |at, window| {
                fill_blocks(geometry, &numbers, &used, at, window);
            });
            for (block, number) in blocks.chunks(512).zip(numbers) {
                for index in 0..per_block {
                    let cluster = number * per_block + index;
                    let count = geometry.width().get(block, index);
                    prop_assert_eq!(count, u64::from(used.contains(&cluster)));
                }
            }
        }

        #[test]
        fn l2_tables_map_the_range_and_nothing_else(
            extended: bool, kind in 0usize..3,
            start in 0u64..100, len in 0u64..3000, step in 1usize..9
        ) {
            let (subclusters, bits) = [
                (Subclusters::Unallocated, 0),
                (Subclusters::Allocated, 0xffff_ffff),
                (Subclusters::Zero, 0xffff_ffff << 32),
            ][kind];
            let geometry = Geometry::new(14, extended, 4);
            let per_table = geometry.l2_entries();
            let table = start / per_table;
            let range = FillRange {
                clusters: start..start + len,
                fill: Fill::Data { at: 1 << 30, subclusters },
            };
            let tables = windows(3 * 16384, step * 512, |at, window| {
                range.fill_l2(geometry, table, at, window).unwrap();
            });
            let entry_len = geometry.l2_entry_len() as usize;
            for (cluster, slot) in (table * per_table..).zip(tables.chunks(entry_len)) {
                let expected = match range.clusters.contains(&cluster) {
                    true => ((1 << 30) + (cluster - start) * 16384) | entry::COPIED,
                    false => 0,
                };
                prop_assert_eq!(bytes::be64(slot, 0).unwrap(), expected);
                if extended {
                    let bits = if expected == 0 { 0 } else { bits };
                    prop_assert_eq!(bytes::be64(slot, 8).unwrap(), bits);
                }
            }
        }
    }

    #[test]
    fn a_zero_range_refers_to_nothing() {
        for (extended, entry) in [(false, [1, 0]), (true, [0, u64::from(u32::MAX) << 32])] {
            let geometry = Geometry::new(14, extended, 4);
            let range = FillRange {
                clusters: 0..1,
                fill: Fill::Zero,
            };
            let mut table = vec![0; 16384];
            range.fill_l2(geometry, 0, 0, &mut table).unwrap();
            let found = [0, 8].map(|at| bytes::be64(&table, at).unwrap());
            assert_eq!(found, entry);
        }
    }

    #[test]
    fn table_entries_and_l1_entries_lead_to_consecutive_clusters() {
        let geometry = Geometry::new(9, false, 4);
        let mut table = vec![0; 512];
        fill_table(geometry, &[2, 65, 70], 10, 512, &mut table).unwrap();
        assert_eq!(bytes::be64(&table, 8), Ok(11 * 512));
        assert_eq!(bytes::be64(&table, 6 * 8), Ok(12 * 512));
        assert_eq!(table.iter().filter(|&&byte| byte != 0).count(), 2);
        let mut l1 = vec![0; 16];
        fill_l1(geometry, 10, 8, &mut l1).unwrap();
        assert_eq!(bytes::be64(&l1, 0), Ok((11 * 512) | entry::COPIED));
        assert_eq!(bytes::be64(&l1, 8), Ok((12 * 512) | entry::COPIED));
    }
}
