//! The plan of a flush.

use super::super::Qcow2;
use super::super::format::{autoclear, header, refcount};
use super::super::header::TableRef;
use super::super::layout::Run;
use super::super::tables::Kind;
use crate::bytes;
use crate::engine::Host;
use crate::error::Failure;
use crate::plan::{Plan, Purpose, SECTOR, Stage, Step};
use crate::prepare::writes;
use crate::proto::{FileNo, PlanReply};
use crate::units::HostOffset;
use alloc::collections::{BTreeMap, BTreeSet};
use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;

/// Bytes between two counts that are written along with them.
const MAX_GAP: u64 = 32;

impl Qcow2 {
    /// The plan that makes everything since the last flush durable. The host
    /// has written the data; the first stage's barrier makes it durable, so
    /// there is a first stage even where it has no steps. For the session the
    /// changes are on disk from here on.
    pub fn plan_flush(&mut self, host: &mut dyn Host) -> Result<PlanReply, Failure> {
        self.tables.keep();
        self.pending.undo = None;
        if !self.has_changes() {
            return Ok(PlanReply::default());
        }
        let mut prepare = self.lay_down();
        prepare.extend(self.clear_unknown_features()?);
        let mut hooks = self.hook_blocks(host)?;
        if self.are_hidden(&hooks) {
            prepare.append(&mut hooks);
        }
        let mut stages = vec![stage(Purpose::Prepare, prepare)];
        stages.extend(non_empty(Purpose::Count, hooks));
        stages.extend(non_empty(Purpose::Count, self.switch_table()?));
        let mut link = self.link();
        let waits = self.release_waits();
        // From here on nothing may fail: what is settled is never planned again.
        self.settle();
        let mut release = self.release(host);
        if !waits {
            link.append(&mut release);
        }
        stages.extend(non_empty(Purpose::Link, link));
        stages.extend(non_empty(Purpose::Release, release));
        Ok(PlanReply {
            plan: Plan { stages },
            ..PlanReply::default()
        })
    }

    /// New tables and counts: nothing on disk refers to the former, and counts
    /// that are too high harm nobody.
    fn lay_down(&self) -> Vec<Step> {
        let mut steps = Vec::new();
        if self.is_longer() {
            steps.push(Step::SetLength {
                file: FileNo::IMAGE,
                len: self.file_len,
            });
        }
        if let Some(old) = self.pending.old_table {
            steps.extend(self.move_table(old));
        }
        let fresh = self.fresh_tables();
        let tables = self
            .tables
            .dirty(Kind::L2)
            .filter(|(at, _)| fresh.contains(&self.table_of(*at)));
        let blocks = self.tables.dirty(Kind::RefcountBlock);
        steps.extend(writes(tables.flat_map(|piece| self.needed(piece))));
        steps.extend(writes(blocks.flat_map(|piece| self.needed(piece))));
        steps
    }

    /// The sectors of a changed piece that have to be written: where the file
    /// reads as zeroes, those that are not.
    fn needed<'a>(
        &self,
        (at, data): (HostOffset, &'a [u8]),
    ) -> impl Iterator<Item = (HostOffset, &'a [u8])> {
        let untouched = self.is_untouched(at);
        let places = (at.0..).step_by(SECTOR as usize).map(HostOffset);
        places
            .zip(data.chunks(SECTOR as usize))
            .filter(move |(_, sector)| !untouched || sector.iter().any(|&byte| byte != 0))
    }

    /// Whether a place reads as zeroes on disk.
    fn is_untouched(&self, at: HostOffset) -> bool {
        let cluster = at.0 / self.header.geometry.cluster_size();
        let flushed = self.pending.flushed_len.unwrap_or(0);
        let space = self.pending.space.as_ref();
        at.0 >= flushed && space.is_some_and(|space| space.reads_zero(cluster))
    }

    /// The new place of the refcount table gets what the old one has on disk,
    /// then zeroes.
    fn move_table(&self, old: TableRef) -> Vec<Step> {
        let geometry = self.header.geometry;
        let new = self.header.refcount_table;
        let len = geometry.host_offset(u64::from(old.count));
        let new_len = geometry.host_offset(u64::from(new.count));
        let mut steps = vec![Step::Copy {
            file: FileNo::IMAGE,
            from: old.offset.0,
            to: new.offset.0,
            len,
        }];
        if new_len > len && !self.is_untouched(new.offset) {
            steps.push(Step::Zero {
                file: FileNo::IMAGE,
                offset: new.offset.0 + len,
                len: new_len - len,
            });
        }
        steps
    }

    /// Entries of the refcount table for new blocks. Each block counts itself,
    /// so it does not matter which of them reach the disk.
    fn hook_blocks(&mut self, host: &mut dyn Host) -> Result<Vec<Step>, Failure> {
        let mut numbers = self.pending.new_blocks.clone();
        numbers.sort_unstable();
        let mut entries = Vec::new();
        for number in numbers {
            let at = self.refcounts().entry_at(number);
            let entry = self.tables.read(host, Kind::RefcountTable, at)?;
            entries.push((at, entry.to_be_bytes()));
        }
        Ok(writes(entries.iter().map(|(at, entry)| (*at, &entry[..]))))
    }

    /// Whether entries for new blocks lie in a refcount table that is still to be
    /// switched to, where nothing else is laid down.
    fn are_hidden(&self, hooks: &[Step]) -> bool {
        let Some(old) = self.pending.old_table else {
            return false;
        };
        let new = self.header.refcount_table.offset;
        let copied = new.plus(self.header.geometry.host_offset(u64::from(old.count)));
        let behind =
            |step: &Step| matches!(step, Step::Write { offset, .. } if *offset >= copied.0);
        self.is_untouched(new) && hooks.iter().all(behind)
    }

    /// Whether anything is released that entries may still refer to: all but a
    /// refcount table that has been switched from.
    fn release_waits(&self) -> bool {
        let geometry = self.header.geometry;
        let table = self.pending.old_table.map(|old| Run {
            first: old.offset.0 / geometry.cluster_size(),
            count: u64::from(old.count),
        });
        self.pending.released.iter().any(|run| Some(*run) != table)
    }

    /// The switch to a refcount table that has moved: its place and length lie
    /// side by side in the first sector.
    fn switch_table(&mut self) -> Result<Vec<Step>, Failure> {
        if self.pending.old_table.is_none() {
            return Ok(Vec::new());
        }
        let table = self.header.refcount_table;
        let mut data = table.offset.0.to_be_bytes().to_vec();
        data.extend_from_slice(&table.count.to_be_bytes());
        let step = self.change_header(header::REFCOUNT_TABLE_OFFSET, data)?;
        Ok(vec![step])
    }

    /// A writer that does not know a feature says so by clearing its autoclear
    /// bit.
    fn clear_unknown_features(&mut self) -> Result<Option<Step>, Failure> {
        let known = self.header.autoclear & autoclear::KNOWN;
        if self.header.autoclear == known {
            return Ok(None);
        }
        self.header.autoclear = known;
        self.change_header(header::AUTOCLEAR, known.to_be_bytes().to_vec())
            .map(Some)
    }

    fn change_header(&mut self, at: usize, data: Vec<u8>) -> Result<Step, Failure> {
        bytes::put(&mut self.first_sector, at, &data)?;
        Ok(Step::Write {
            file: FileNo::IMAGE,
            offset: at as u64,
            data,
        })
    }

    /// Entries of tables that are in use.
    fn link(&self) -> Vec<Step> {
        let fresh = self.fresh_tables();
        let tables = self
            .tables
            .dirty(Kind::L2)
            .filter(|(at, _)| !fresh.contains(&self.table_of(*at)));
        let mut steps = writes(tables);
        steps.extend(writes(self.tables.dirty(Kind::L1)));
        steps
    }

    /// From here on the session takes its tables for what is on disk.
    fn settle(&mut self) {
        for kind in [Kind::L1, Kind::L2, Kind::RefcountTable, Kind::RefcountBlock] {
            self.tables.mark_planned(kind);
        }
        self.pending.fresh_tables.clear();
        self.pending.outdates_features = false;
        self.pending.new_blocks.clear();
        self.pending.flushed_len = Some(self.file_len);
        if let Some(old) = self.pending.old_table.take() {
            let len = self.header.geometry.host_offset(u64::from(old.count));
            self.tables.forget(old.offset, len);
        }
    }

    /// Counts down what was replaced. Clusters that nothing refers to any more
    /// can be used again. It is too late to refuse anything: a count that is too
    /// low or cannot be read stays as it is, and its cluster is left alone.
    fn release(&mut self, host: &mut dyn Host) -> Vec<Step> {
        let mut times: BTreeMap<u64, u64> = BTreeMap::new();
        self.pending.released_weight = 0;
        for run in core::mem::take(&mut self.pending.released) {
            for cluster in run.first..run.end() {
                *times.entry(cluster).or_default() += 1;
            }
        }
        let mut changed = Vec::new();
        for (cluster, times) in times {
            if let Ok(Some(left)) = self.refcounts().lower(host, cluster, times) {
                changed.extend(self.refcounts().bytes_of(host, cluster));
                if left == 0 {
                    self.use_again(cluster);
                }
            }
        }
        let steps = self.write_back(host, changed);
        self.tables.mark_planned(Kind::RefcountBlock);
        steps
    }

    /// Writes of ranges of refcount blocks, in order. Only what lies close
    /// together becomes one: whole sectors of counts far apart could make a
    /// plan longer than a message.
    fn write_back(&mut self, host: &mut dyn Host, ranges: Vec<Range<u64>>) -> Vec<Step> {
        let mut joined: Vec<Range<u64>> = Vec::new();
        let slice_len = self.tables.slice_len();
        for range in ranges {
            let near = |last: &&mut Range<u64>| {
                last.end <= range.start + 1
                    && range.start <= last.end + MAX_GAP
                    && last.start / slice_len == range.start / slice_len
            };
            match joined.last_mut().filter(near) {
                Some(last) => last.end = last.end.max(range.end),
                None => joined.push(range),
            }
        }
        let mut pieces = Vec::new();
        for range in joined {
            let at = HostOffset(range.start);
            let in_slice = (range.start % slice_len) as usize;
            let len = (range.end - range.start) as usize;
            let slice = self.tables.slice(host, Kind::RefcountBlock, at);
            let piece = slice
                .ok()
                .and_then(|slice| slice.get(in_slice..in_slice + len));
            pieces.extend(piece.map(|piece| (at, piece.to_vec())));
        }
        writes(pieces.iter().map(|(at, piece)| (*at, &piece[..])))
    }

    fn use_again(&mut self, cluster: u64) {
        let geometry = self.header.geometry;
        let at = HostOffset(geometry.host_offset(cluster));
        self.tables.forget(at, geometry.cluster_size());
        if let Some(space) = &mut self.pending.space {
            space.add_free(Run {
                first: cluster,
                count: 1,
            });
        }
    }

    fn fresh_tables(&self) -> BTreeSet<u64> {
        self.pending.fresh_tables.iter().map(|at| at.0).collect()
    }

    /// Start of the table that a slice is a part of.
    fn table_of(&self, at: HostOffset) -> u64 {
        self.header.geometry.cluster_start(at.0)
    }
}

fn stage(purpose: Purpose, steps: Vec<Step>) -> Stage {
    Stage { purpose, steps }
}

fn non_empty(purpose: Purpose, steps: Vec<Step>) -> Option<Stage> {
    (!steps.is_empty()).then(|| stage(purpose, steps))
}

const _: () = {
    assert!(header::REFCOUNT_TABLE_CLUSTERS == header::REFCOUNT_TABLE_OFFSET + 8);
    assert!(refcount::ENTRY_LEN == 8);
};
