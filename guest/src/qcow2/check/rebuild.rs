//! A new refcount structure behind the end of the file, in place of one that is
//! broken. The header switches to it; the old one is counted no more.
//!
//! Every block that counts anything gets a place, then come the blocks that
//! count these places, then the table. The content follows from the counters,
//! range by range, and is streamed.

use super::super::format::{limit, refcount};
use super::super::geometry::Geometry;
use super::super::header::TableRef;
use super::super::layout::Run;
use super::counters::{Counters, PAGE};
use super::{Check, Severity};
use crate::bytes;
use crate::error::{Failure, FailureKind};
use crate::plan::{Plan, Purpose, Stage, Step};
use crate::prepare::Prepare;
use crate::units::HostOffset;
use alloc::format;
use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;

/// Clusters whose counts are made at once.
const PIECE: u64 = 2 * PAGE;

/// Bytes of collected steps that do not have to be streamed.
const STREAM_AT: usize = 1 << 20;

/// Where the new structure goes.
#[derive(Debug, PartialEq, Eq)]
struct Layout {
    /// Numbers of the blocks, ascending; they lie in this order.
    blocks: Vec<u64>,
    /// The clusters of blocks and table.
    run: Run,
    /// Clusters of the table, which comes last.
    table: u64,
}

impl Check<'_> {
    /// Streams a new refcount structure. Answers the stages up to the commit;
    /// the entries that change are left for after it: a flag that is cleared
    /// while a shared cluster is counted once lets the next writer free it.
    pub(super) fn plan_rebuild(&mut self) -> Result<Vec<Stage>, Failure> {
        let text = "Rebuilding refcount structure";
        self.tell.add(self.host, Severity::Repaired, text)?;
        self.settle_sums();
        self.without_blocks = true;
        self.exact.clear();
        let mut needed = Vec::new();
        let passes = self.pass;
        self.each_pass(|check| {
            check.walk()?;
            check.note_needed(&mut needed);
            check.check_copied(true)
        })?;
        needed.dedup();
        let layout = self.lay_out(needed)?;
        let single = self.pass == passes + 1;
        let mut rest = Vec::new();
        if single {
            self.emit(&layout, &mut rest)?;
        } else {
            self.each_pass(|check| {
                check.walk()?;
                check.emit(&layout, &mut rest)
            })?;
        }
        self.emit_table(&layout, &mut rest)?;
        Ok(vec![Stage {
            purpose: Purpose::Prepare,
            steps: rest,
        }])
    }

    /// What was wrong with counts and blocks is repaired, all of it.
    fn settle_sums(&mut self) {
        let report = &mut self.tell.report;
        let before = (report.corruptions, report.leaks);
        core::mem::take(&mut self.compared).forget(report);
        report.corruptions -= self.broken_blocks;
        report.corruptions_fixed += before.0 - report.corruptions;
        report.leaks_fixed += before.1 - report.leaks;
    }

    /// Adds the numbers of the blocks that have anything to count.
    fn note_needed(&self, needed: &mut Vec<u64>) {
        let per_block = self.image.header.geometry.refcounts_per_block();
        let step = per_block.min(PAGE);
        let end = self.counters.end().min(self.clusters);
        let mut first = self.counters.first();
        while first < end {
            if self.counters.page(first).is_none() {
                first = self.counters.next_page(first);
                continue;
            }
            if (first..first + step).any(|cluster| self.counters.get(cluster) > 0) {
                needed.push(first / per_block);
            }
            first += step;
        }
    }

    /// Gives every block and the table a place behind the end of the file, and
    /// behind what damaged entries take for its end.
    fn lay_out(&mut self, needed: Vec<u64>) -> Result<Layout, Failure> {
        let geometry = self.image.header.geometry;
        let first = self.clusters.max(geometry.clusters(self.farthest));
        let layout = Layout::new(geometry, first, needed).ok_or_else(|| {
            Failure::new(
                FailureKind::TooLarge,
                format!(
                    "the rebuilt refcount table would be larger than {} bytes; use `qemu-img \
                     convert`",
                    limit::MAX_REFCOUNT_TABLE_LEN
                ),
            )
        })?;
        let table = layout.run.end() - layout.table;
        self.new_table = Some(TableRef {
            offset: HostOffset(geometry.host_offset(table)),
            count: layout.table as u32,
        });
        Ok(layout)
    }

    /// Adds the blocks' content as far as this pass has counted.
    fn emit(&mut self, layout: &Layout, rest: &mut Vec<Step>) -> Result<(), Failure> {
        let geometry = self.image.header.geometry;
        let per_block = geometry.refcounts_per_block();
        self.stream(rest)?;
        let counted = self.counters.first()..self.counters.end().min(layout.run.end());
        let Self { host, counters, .. } = self;
        let mut prepare = Prepare::new(&mut **host);
        for (place, &number) in (layout.run.first..).zip(&layout.blocks) {
            let start = number.saturating_mul(per_block);
            let end = start.saturating_add(per_block).min(counted.end);
            let mut first = start.max(counted.start);
            while first < end {
                let next = (first + PIECE).min(end);
                let piece = layout.counts(geometry, counters, first..next);
                let in_block = geometry.width().byte_range(first - start, next - start);
                let at = geometry.host_offset(place) + in_block.start as u64;
                prepare.fresh_slice(at, &piece)?;
                first = next;
            }
        }
        rest.extend(prepare.finish());
        Ok(())
    }

    fn emit_table(&mut self, layout: &Layout, rest: &mut Vec<Step>) -> Result<(), Failure> {
        let geometry = self.image.header.geometry;
        self.stream(rest)?;
        let at = geometry.host_offset(layout.run.end() - layout.table);
        let len = geometry.host_offset(layout.table);
        let mut prepare = Prepare::new(&mut *self.host);
        prepare.fresh_bytes(at, len, |_, distance, piece| {
            layout.fill_table(geometry, distance / refcount::ENTRY_LEN, piece)
        })?;
        rest.extend(prepare.finish());
        Ok(())
    }

    /// Streams what has been collected so far, where it is much: more follows.
    fn stream(&mut self, rest: &mut Vec<Step>) -> Result<(), Failure> {
        let len = rest.iter().map(|step| match step {
            Step::Write { data, .. } => data.len(),
            _ => 0,
        });
        if len.sum::<usize>() < STREAM_AT {
            return Ok(());
        }
        self.host.stream(Plan {
            stages: vec![Stage {
                purpose: Purpose::Prepare,
                steps: core::mem::take(rest),
            }],
        })
    }
}

impl Layout {
    /// From cluster `first` on, for the blocks in `needed`, ascending. `None` if
    /// the table would be too large.
    fn new(geometry: Geometry, first: u64, needed: Vec<u64>) -> Option<Self> {
        let per_block = geometry.refcounts_per_block();
        let mut blocks = needed;
        let mut table = 1;
        loop {
            let count = blocks.len() as u64 + table;
            let own = first / per_block..(first + count).div_ceil(per_block);
            let known = blocks.len();
            let behind = blocks.partition_point(|&number| number < own.start);
            blocks.truncate(behind);
            blocks.extend(own);
            let longer = geometry.table_clusters(blocks.last().map_or(0, |last| last + 1));
            if blocks.len() == known && longer <= table {
                break;
            }
            table = table.max(longer);
        }
        let largest = limit::MAX_REFCOUNT_TABLE_LEN.max(geometry.cluster_size());
        let count = blocks.len() as u64 + table;
        (geometry.host_offset(table) <= largest).then_some(Self {
            blocks,
            run: Run { first, count },
            table,
        })
    }

    /// The counts of clusters as they are packed in a block: their own, and one
    /// for each cluster of the new structure. The range begins with a whole
    /// byte.
    fn counts(&self, geometry: Geometry, counters: &Counters, clusters: Range<u64>) -> Vec<u8> {
        let width = geometry.width();
        let len = clusters.end - clusters.start;
        let mut piece = vec![0; width.byte_range(0, len).end];
        for (index, cluster) in clusters.enumerate() {
            let own = (self.run.first..self.run.end()).contains(&cluster);
            let count = match own {
                true => 1,
                false => counters.get(cluster),
            };
            if count > 0 {
                width.set(&mut piece, index as u64, count);
            }
        }
        piece
    }

    /// A piece of the table, from entry `first` on.
    fn fill_table(&self, geometry: Geometry, first: u64, piece: &mut [u8]) -> Result<(), Failure> {
        let end = first + piece.len() as u64 / refcount::ENTRY_LEN;
        let from = self.blocks.partition_point(|&number| number < first);
        let places = self.run.first + from as u64..;
        for (place, &number) in places.zip(self.blocks.iter().skip(from)) {
            if number >= end {
                break;
            }
            let at = (number - first) * refcount::ENTRY_LEN;
            bytes::put_be64(piece, at as usize, geometry.host_offset(place))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Every cluster of the new structure lies in a block that it has.
        #[test]
        fn a_new_structure_counts_itself(
            cluster_bits in 9u32..=16,
            order in 0u32..=6,
            first in 1u64..100_000,
            needed in prop::collection::btree_set(0u64..400, 1..20),
        ) {
            let geometry = Geometry::new(cluster_bits, false, order);
            let per_block = geometry.refcounts_per_block();
            let last = (first - 1) / per_block;
            let needed: Vec<u64> = needed.into_iter().filter(|&number| number <= last).collect();
            let layout = Layout::new(geometry, first, needed.clone()).unwrap();
            prop_assert!(layout.blocks.is_sorted_by(|a, b| a < b));
            prop_assert!(needed.iter().all(|number| layout.blocks.contains(number)));
            for cluster in layout.run.first..layout.run.end() {
                prop_assert!(layout.blocks.contains(&(cluster / per_block)));
            }
            prop_assert_eq!(layout.run.count, layout.blocks.len() as u64 + layout.table);
            let entries = layout.table * geometry.cluster_size() / refcount::ENTRY_LEN;
            prop_assert!(layout.blocks.iter().all(|&number| number < entries));
        }
    }
}
