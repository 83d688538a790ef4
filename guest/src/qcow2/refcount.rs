//! Reference counts of an open image: the refcount table and its blocks, read
//! and changed through the table cache.
//!
//! A count says how often a host cluster is referred to. Here counts are looked
//! up and changed; which of the changes go to disk in which order is decided by
//! whoever turns the cache into a plan.

use super::format::refcount;
use super::geometry::Geometry;
use super::header::TableRef;
use super::layout::Run;
use super::refuse;
use super::regions::Regions;
use super::tables::{Kind, Tables};
use crate::bytes;
use crate::engine::Host;
use crate::error::{Failure, FailureKind};
use crate::plan::MAX_GAP;
use crate::units::HostOffset;
use alloc::format;
use alloc::vec::Vec;
use core::ops::Range;

/// Slices that a scan reads with one exit from the sandbox, in bytes.
const SCAN_BATCH: u64 = 256 << 10;

/// The reference counts of an image.
pub struct Refcounts<'a> {
    /// Cluster size and count width.
    pub geometry: Geometry,
    /// The refcount table.
    pub table: TableRef,
    /// Length of the image file in bytes.
    pub file_len: u64,
    /// What no refcount block may overlap.
    pub regions: &'a Regions,
    /// Where table pieces are cached.
    pub tables: &'a mut Tables,
}

impl Refcounts<'_> {
    /// Entries of the refcount table.
    pub fn table_entries(&self) -> u64 {
        u64::from(self.table.count) * (self.geometry.cluster_size() / refcount::ENTRY_LEN)
    }

    /// Where the entry for a block is.
    pub fn entry_at(&self, number: u64) -> HostOffset {
        self.table
            .offset
            .plus(number.saturating_mul(refcount::ENTRY_LEN))
    }

    /// Where a block is, if it exists.
    pub fn block(
        &mut self,
        host: &mut dyn Host,
        number: u64,
    ) -> Result<Option<HostOffset>, Failure> {
        if number >= self.table_entries() {
            return Ok(None);
        }
        let at = self.entry_at(number);
        let raw = self.tables.read(host, Kind::RefcountTable, at)?;
        self.check_block(number, raw)
    }

    fn check_block(&self, number: u64, raw: u64) -> Result<Option<HostOffset>, Failure> {
        if raw == 0 {
            return Ok(None);
        }
        let offset = raw & refcount::OFFSET;
        let len = self.geometry.cluster_size();
        let why = if raw != offset {
            Some("reserved bits are set")
        } else {
            refuse::misplaced(self.geometry, self.file_len, offset, len)
                .or_else(|| self.regions.find(offset, len).map(|owner| owner.name()))
        };
        match why {
            None => Ok(Some(HostOffset(offset))),
            Some(why) => Err(refuse::table(format!(
                "refcount table entry {number} is {raw:#x}: {why}"
            ))),
        }
    }

    /// The count of a cluster; 0 where nothing counts it.
    pub fn count(&mut self, host: &mut dyn Host, cluster: u64) -> Result<u64, Failure> {
        let Some(at) = self.slice_of(host, cluster)? else {
            return Ok(0);
        };
        let index = self.index_in_slice(cluster);
        let slice = self.tables.slice(host, Kind::RefcountBlock, at)?;
        Ok(self.geometry.width().get(slice, index))
    }

    /// Refuses a cluster that is in use and counted 0.
    pub fn check_counted(&mut self, host: &mut dyn Host, cluster: u64) -> Result<(), Failure> {
        match self.count(host, cluster)? {
            0 => Err(self.uncounted(cluster)),
            _ => Ok(()),
        }
    }

    /// Sets the counts of a run of clusters that all have blocks to 1.
    pub fn set_ones(&mut self, host: &mut dyn Host, run: Run) -> Result<(), Failure> {
        self.change(host, run, |geometry, piece, first, end| {
            geometry.width().set_ones(piece, first, end);
            None
        })
    }

    /// Lowers the counts of a run of clusters by one.
    pub fn release(&mut self, host: &mut dyn Host, run: Run) -> Result<(), Failure> {
        self.change(host, run, |geometry, piece, first, end| {
            for index in first..end {
                let Some(less) = geometry.width().get(piece, index).checked_sub(1) else {
                    return Some(index);
                };
                geometry.width().set(piece, index, less);
            }
            None
        })
    }

    /// Lowers the counts of a run of clusters by one and tells which of them
    /// nothing refers to any more.
    pub fn release_noting(
        &mut self,
        host: &mut dyn Host,
        run: Run,
        mut freed: impl FnMut(u64),
    ) -> Result<(), Failure> {
        let base = core::cell::Cell::new(run.first);
        self.change(host, run, |geometry, piece, first, end| {
            for index in first..end {
                let Some(less) = geometry.width().get(piece, index).checked_sub(1) else {
                    return Some(index);
                };
                geometry.width().set(piece, index, less);
                if less == 0 {
                    freed(base.get() + index - first);
                }
            }
            base.set(base.get() + end - first);
            None
        })
    }

    /// Lowers a cluster's count by `less`. Answers what is left, or `None` where
    /// the count is too low for that: it stays as it is.
    pub fn lower(
        &mut self,
        host: &mut dyn Host,
        cluster: u64,
        less: u64,
    ) -> Result<Option<u64>, Failure> {
        let Some(left) = self.count(host, cluster)?.checked_sub(less) else {
            return Ok(None);
        };
        let run = Run {
            first: cluster,
            count: 1,
        };
        self.change(host, run, |geometry, piece, first, _| {
            geometry.width().set(piece, first, left);
            None
        })?;
        Ok(Some(left))
    }

    /// Where the bytes are that hold a cluster's count.
    pub fn bytes_of(&mut self, host: &mut dyn Host, cluster: u64) -> Option<Range<u64>> {
        let slice = self.slice_of(host, cluster).ok()??;
        let index = self.index_in_slice(cluster);
        let bytes = self.geometry.width().byte_range(index, index + 1);
        Some(slice.0 + bytes.start as u64..slice.0 + bytes.end as u64)
    }

    /// Changes the counts of a run slice by slice. `with` gets the bytes that
    /// hold a part of the run and the range of indexes in them, and answers the
    /// index of a count that it cannot change.
    fn change(
        &mut self,
        host: &mut dyn Host,
        run: Run,
        mut with: impl FnMut(Geometry, &mut [u8], u64, u64) -> Option<u64>,
    ) -> Result<(), Failure> {
        let width = self.geometry.width();
        let mut cluster = run.first;
        let mut at_hand = cluster;
        while cluster < run.end() {
            if cluster >= at_hand {
                at_hand = self.prefetch(host, cluster, run.end())?;
            }
            let Some(slice) = self.slice_of(host, cluster)? else {
                return Err(self.uncounted(cluster));
            };
            let first = self.index_in_slice(cluster);
            let end = (first + run.end() - cluster).min(self.counts_per_slice());
            let place = width.byte_range(first, end);
            let cached = self.tables.slice(host, Kind::RefcountBlock, slice)?;
            let mut piece = bytes::slice(cached, place.start, place.len())?.to_vec();
            // Counts narrower than a byte: the piece begins with a whole byte.
            let base = place.start as u64 * 8 / width.bits();
            if let Some(index) = with(self.geometry, &mut piece, first - base, end - base) {
                return Err(self.uncounted(cluster + base + index - first));
            }
            let at = slice.plus(place.start as u64);
            self.tables.change(host, Kind::RefcountBlock, at, &piece)?;
            cluster += end - first;
        }
        Ok(())
    }

    /// Reads the slices that count the clusters from `cluster` on, some at once.
    /// Returns the cluster up to which counts are at hand.
    fn prefetch(&mut self, host: &mut dyn Host, cluster: u64, end: u64) -> Result<u64, Failure> {
        let step = self.counts_per_slice();
        let slices = SCAN_BATCH.div_ceil(self.tables.slice_len());
        let first = cluster / step * step;
        let stop = end.min(first.saturating_add(slices * step));
        let per_block = self.geometry.refcounts_per_block();
        let numbers = cluster / per_block..stop.div_ceil(per_block);
        let entries: Vec<HostOffset> = numbers
            .filter(|&number| number < self.table_entries())
            .map(|number| self.entry_at(number))
            .collect();
        self.tables.prefetch(host, Kind::RefcountTable, &entries)?;
        let mut places = Vec::new();
        for cluster in (first..stop).step_by(step as usize) {
            places.extend(self.slice_of(host, cluster)?);
        }
        self.tables.prefetch(host, Kind::RefcountBlock, &places)?;
        Ok(stop)
    }

    /// Numbers of the blocks from `number` on that exist, ascending.
    pub fn present_from(&mut self, host: &mut dyn Host, number: u64) -> Result<Vec<u64>, Failure> {
        let mut present = Vec::new();
        let mut number = number;
        let end = self.table_entries();
        let per_slice = self.tables.slice_len() / refcount::ENTRY_LEN;
        let mut read_to = number;
        while number < end {
            if number >= read_to {
                read_to = number + (SCAN_BATCH / refcount::ENTRY_LEN).max(per_slice);
                let places: Vec<HostOffset> = (number..end.min(read_to))
                    .step_by(per_slice as usize)
                    .map(|number| self.entry_at(number))
                    .collect();
                self.tables.prefetch(host, Kind::RefcountTable, &places)?;
            }
            let stop = (number / per_slice + 1).saturating_mul(per_slice).min(end);
            let at = self.entry_at(number);
            let slice = self.tables.slice(host, Kind::RefcountTable, at)?;
            for (number, word) in (number..stop).zip(
                slice
                    .chunks_exact(refcount::ENTRY_LEN as usize)
                    .skip((number % per_slice) as usize),
            ) {
                if word.iter().any(|&byte| byte != 0) {
                    present.push(number);
                }
            }
            number = stop;
        }
        Ok(present)
    }

    /// The first cluster at or behind `end`, where the file ends, such that
    /// neither it nor any later one is counted. Refused where that is more than
    /// [`MAX_GAP`] away. `present` are the blocks from `end`'s on.
    pub fn first_unused(
        &mut self,
        host: &mut dyn Host,
        end: u64,
        present: &[u64],
    ) -> Result<u64, Failure> {
        let next = self.behind_counted(host, end, present)?;
        match self.geometry.host_offset(next - end) <= MAX_GAP {
            true => Ok(next),
            false => Err(Failure::new(
                FailureKind::TooLarge,
                format!(
                    "the image counts clusters as used up to {:#x}, more than {} GiB behind the \
                     end of its file, and new ones can only lie behind those; copy it with \
                     `qemu-img convert`",
                    self.geometry.host_offset(next),
                    MAX_GAP >> 30
                ),
            )),
        }
    }

    /// The clusters that a block counts, where they are at most `most`.
    pub fn few_counted(
        &mut self,
        host: &mut dyn Host,
        number: u64,
        most: usize,
    ) -> Result<Option<Vec<u64>>, Failure> {
        let mut found: Vec<u64> = Vec::new();
        let Some(block) = self.block(host, number)? else {
            return Ok(Some(found));
        };
        let width = self.geometry.width();
        let base = number * self.geometry.refcounts_per_block();
        for slice in 0..self.geometry.cluster_size() / self.tables.slice_len() {
            let first = base + slice * self.counts_per_slice();
            let at = block.plus(slice * self.tables.slice_len());
            let cached = self.tables.slice(host, Kind::RefcountBlock, at)?;
            let bytes = cached.iter().enumerate().filter(|(_, byte)| **byte != 0);
            for index in bytes.flat_map(|(place, _)| width.index_range(place)) {
                let cluster = first + index;
                if width.get(cached, index) == 0 || found.last() == Some(&cluster) {
                    continue;
                }
                if found.len() == most {
                    return Ok(None);
                }
                found.push(cluster);
            }
        }
        Ok(Some(found))
    }

    /// The cluster behind the last that is counted, at least `from`. `present`
    /// are the blocks to look at.
    pub fn behind_counted(
        &mut self,
        host: &mut dyn Host,
        from: u64,
        present: &[u64],
    ) -> Result<u64, Failure> {
        let per_block = self.geometry.refcounts_per_block();
        for &number in present.iter().rev() {
            let Some(block) = self.block(host, number)? else {
                continue;
            };
            let base = number * per_block;
            let slices = per_block / self.counts_per_slice();
            let places: Vec<HostOffset> = (0..slices)
                .filter(|slice| base + (slice + 1) * self.counts_per_slice() > from)
                .map(|slice| block.plus(slice * self.tables.slice_len()))
                .collect();
            self.tables.prefetch(host, Kind::RefcountBlock, &places)?;
            for slice in (0..slices).rev() {
                let first = base + slice * self.counts_per_slice();
                if first + self.counts_per_slice() <= from {
                    break;
                }
                let at = block.plus(slice * self.tables.slice_len());
                let cached = self.tables.slice(host, Kind::RefcountBlock, at)?;
                let Some(last) = cached.iter().rposition(|&byte| byte != 0) else {
                    continue;
                };
                let width = self.geometry.width();
                let counts = width.index_range(last);
                let used = counts.rev().find(|&index| width.get(cached, index) != 0);
                let end = first + used.map_or(0, |index| index + 1);
                return Ok(end.max(from));
            }
        }
        Ok(from)
    }

    /// Where the slice is that holds a cluster's count.
    fn slice_of(
        &mut self,
        host: &mut dyn Host,
        cluster: u64,
    ) -> Result<Option<HostOffset>, Failure> {
        let per_block = self.geometry.refcounts_per_block();
        let block = self.block(host, cluster / per_block)?;
        let slice = cluster % per_block / self.counts_per_slice();
        Ok(block.map(|block| block.plus(slice * self.tables.slice_len())))
    }

    fn counts_per_slice(&self) -> u64 {
        self.tables.slice_len() * 8 / self.geometry.refcount_bits()
    }

    fn index_in_slice(&self, cluster: u64) -> u64 {
        cluster % self.counts_per_slice()
    }

    fn uncounted(&self, cluster: u64) -> Failure {
        refuse::table(format!(
            "the cluster at {:#x} is in use but has reference count 0",
            self.geometry.host_offset(cluster)
        ))
    }
}
