//! The plan of a flush.

use super::super::Qcow2;
use super::super::format::{autoclear, header, refcount};
use super::super::header::TableRef;
use super::super::layout::Run;
use super::super::tables::Kind;
use crate::engine::Host;
use crate::error::Failure;
use crate::plan::{Plan, Purpose, SECTOR, Stage, Step};
use crate::proto::{FileNo, PlanReply};
use crate::units::HostOffset;
use alloc::collections::BTreeSet;
use alloc::vec;
use alloc::vec::Vec;

impl Qcow2 {
    /// The plan that makes everything since the last flush durable. The host
    /// has written the data; the first stage's barrier makes it durable, so
    /// there is a first stage even where it has no steps. For the session the
    /// changes are on disk from here on.
    pub fn flush(&mut self, host: &mut dyn Host) -> Result<PlanReply, Failure> {
        self.tables.keep();
        self.pending.undo = None;
        if !self.has_changes() {
            return Ok(PlanReply::default());
        }
        let mut stages = vec![stage(Purpose::Prepare, self.lay_down())];
        stages.extend(non_empty(Purpose::Count, self.hook_blocks(host)?));
        stages.extend(non_empty(Purpose::Count, self.switch_table()));
        stages.extend(non_empty(Purpose::Link, self.link()));
        self.settle();
        stages.extend(non_empty(Purpose::Release, self.release(host)?));
        Ok(PlanReply {
            plan: Plan { stages },
            ..PlanReply::default()
        })
    }

    /// New tables and counts: nothing on disk refers to the former, and counts
    /// that are too high harm nobody.
    fn lay_down(&self) -> Vec<Step> {
        let mut steps = Vec::new();
        if self
            .pending
            .flushed_len
            .is_some_and(|len| len < self.file_len)
        {
            steps.push(Step::SetLength {
                file: FileNo::IMAGE,
                len: self.file_len,
            });
        }
        if let Some(old) = self.pending.old_table {
            steps.extend(self.move_table(old));
        }
        if self.header.autoclear & !autoclear::KNOWN != 0 {
            let known = self.header.autoclear & autoclear::KNOWN;
            let at = HostOffset(header::AUTOCLEAR as u64);
            steps.push(write(at, known.to_be_bytes().to_vec()));
        }
        let fresh = self.fresh_tables();
        let tables = self
            .tables
            .dirty(Kind::L2)
            .filter(|(at, _)| fresh.contains(&self.table_of(*at)));
        let blocks = self.tables.dirty(Kind::RefcountBlock);
        for (at, data) in tables.chain(blocks) {
            match self.is_untouched(at) {
                true => steps.extend(nonzero_sectors(at, data)),
                false => steps.push(write(at, data.to_vec())),
            }
        }
        steps
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
        let mut numbers = core::mem::take(&mut self.pending.new_blocks);
        numbers.sort_unstable();
        let mut steps: Vec<Step> = Vec::new();
        for number in numbers {
            let at = self.refcounts().entry_at(number);
            let entry = self.tables.read(host, Kind::RefcountTable, at)?;
            let entry = entry.to_be_bytes();
            match steps.last_mut() {
                Some(Step::Write { offset, data, .. }) if *offset + data.len() as u64 == at.0 => {
                    data.extend_from_slice(&entry);
                }
                _ => steps.push(write(at, entry.to_vec())),
            }
        }
        Ok(steps)
    }

    /// The switch to a refcount table that has moved: its place and length lie
    /// side by side in the first sector.
    fn switch_table(&self) -> Vec<Step> {
        if self.pending.old_table.is_none() {
            return Vec::new();
        }
        let table = self.header.refcount_table;
        let mut data = table.offset.0.to_be_bytes().to_vec();
        data.extend_from_slice(&table.count.to_be_bytes());
        let at = HostOffset(header::REFCOUNT_TABLE_OFFSET as u64);
        vec![write(at, data)]
    }

    /// Entries of tables that are in use.
    fn link(&self) -> Vec<Step> {
        let fresh = self.fresh_tables();
        let tables = self
            .tables
            .dirty(Kind::L2)
            .filter(|(at, _)| !fresh.contains(&self.table_of(*at)));
        tables
            .chain(self.tables.dirty(Kind::L1))
            .map(|(at, data)| write(at, data.to_vec()))
            .collect()
    }

    /// From here on the session takes its tables for what is on disk.
    fn settle(&mut self) {
        for kind in [Kind::L1, Kind::L2, Kind::RefcountTable, Kind::RefcountBlock] {
            self.tables.mark_clean(kind);
        }
        self.header.autoclear &= autoclear::KNOWN;
        self.pending.fresh_tables.clear();
        self.pending.flushed_len = Some(self.file_len);
        if let Some(old) = self.pending.old_table.take() {
            let len = self.header.geometry.host_offset(u64::from(old.count));
            self.tables.forget(old.offset, len);
        }
    }

    /// Counts down what was replaced. Clusters that nothing refers to any more
    /// can be used again.
    fn release(&mut self, host: &mut dyn Host) -> Result<Vec<Step>, Failure> {
        let runs = core::mem::take(&mut self.pending.released);
        for &run in &runs {
            self.refcounts().release(host, run)?;
        }
        let clusters: BTreeSet<u64> = runs.iter().flat_map(|run| run.first..run.end()).collect();
        for cluster in clusters {
            if self.refcounts().count(host, cluster)? == 0 {
                let at = HostOffset(self.header.geometry.host_offset(cluster));
                self.tables.forget(at, self.header.geometry.cluster_size());
                self.space(host)?.add_free(Run {
                    first: cluster,
                    count: 1,
                });
            }
        }
        let steps = self
            .tables
            .dirty(Kind::RefcountBlock)
            .map(|(at, data)| write(at, data.to_vec()))
            .collect();
        self.tables.mark_clean(Kind::RefcountBlock);
        Ok(steps)
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

fn write(at: HostOffset, data: Vec<u8>) -> Step {
    Step::Write {
        file: FileNo::IMAGE,
        offset: at.0,
        data,
    }
}

/// The writes of those sectors that are not all zeroes, neighbours together.
fn nonzero_sectors(at: HostOffset, data: &[u8]) -> Vec<Step> {
    let mut steps: Vec<Step> = Vec::new();
    let mut offset = at.0;
    for sector in data.chunks(SECTOR as usize) {
        if sector.iter().any(|&byte| byte != 0) {
            match steps.last_mut() {
                Some(Step::Write {
                    offset: first,
                    data,
                    ..
                }) if *first + data.len() as u64 == offset => data.extend_from_slice(sector),
                _ => steps.push(write(HostOffset(offset), sector.to_vec())),
            }
        }
        offset += SECTOR;
    }
    steps
}

const _: () = {
    assert!(header::REFCOUNT_TABLE_CLUSTERS == header::REFCOUNT_TABLE_OFFSET + 8);
    assert!(refcount::ENTRY_LEN == 8);
};
