//! New clusters: behind the end of the file, or released earlier in the
//! session. Every cluster is counted when it is handed out, with refcount
//! blocks and a larger refcount table where that takes them.

use super::super::Qcow2;
use super::super::header::TableRef;
use super::super::layout::{Cursor, Run, counting};
use super::super::refcount::Refcounts;
use super::super::regions::Owner;
use super::super::tables::Kind;
use crate::engine::Host;
use crate::error::{Failure, FailureKind};
use crate::units::HostOffset;
use alloc::vec::Vec;

/// Host offsets have 56 bits ("L2 table": bits 9 to 55).
const MAX_FILE_LEN: u64 = 1 << 55;

/// Where new clusters come from.
#[derive(Debug)]
pub struct Space {
    /// The first cluster behind everything in the file and handed out.
    pub next: u64,
    /// Clusters from here on have never held anything: they read as zeroes.
    zero_from: u64,
    /// Clusters that were released, durably, and are counted 0.
    free: Vec<Run>,
}

impl Space {
    /// Whether a cluster that is handed out reads as zeroes.
    pub fn reads_zero(&self, cluster: u64) -> bool {
        cluster >= self.zero_from
    }

    /// Adds clusters that may be used again.
    pub fn add_free(&mut self, run: Run) {
        match self.free.last_mut().filter(|last| last.end() == run.first) {
            Some(last) => last.count += run.count,
            None => self.free.push(run),
        }
    }

    /// Takes clusters back, which may have been written.
    pub fn give_back(&mut self, next: u64, taken: Vec<Run>) {
        if next > 0 {
            self.zero_from = self.zero_from.max(self.next);
            self.next = next;
        }
        self.free.extend(taken);
    }

    /// Takes `count` free clusters that lie side by side.
    fn take_free(&mut self, count: u64) -> Option<Run> {
        let place = self.free.iter().position(|run| run.count >= count)?;
        let run = self.free.get_mut(place)?;
        let taken = Run {
            first: run.first,
            count,
        };
        run.first += count;
        run.count -= count;
        if run.is_empty() {
            self.free.swap_remove(place);
        }
        Some(taken)
    }
}

impl Qcow2 {
    /// The image's reference counts.
    pub(super) fn refcounts(&mut self) -> Refcounts<'_> {
        Refcounts {
            geometry: self.header.geometry,
            table: self.header.refcount_table,
            file_len: self.file_len,
            regions: &self.regions,
            tables: &mut self.tables,
        }
    }

    /// Where new clusters come from.
    pub(super) fn space(&mut self, host: &mut dyn Host) -> Result<&mut Space, Failure> {
        if self.pending.space.is_none() {
            let end = self.header.geometry.clusters(self.file_len);
            let number = end / self.header.geometry.refcounts_per_block();
            let mut refcounts = self.refcounts();
            let present = refcounts.present_from(host, number)?;
            let next = refcounts.first_unused(host, end, &present)?;
            if let Some(undo) = &mut self.pending.undo {
                undo.next = next;
            }
            self.pending.space = Some(Space {
                next,
                zero_from: next,
                free: Vec::new(),
            });
        }
        self.pending.space.as_mut().ok_or_else(no_space)
    }

    /// Takes `count` clusters, counted 1: side by side where that is possible.
    pub(super) fn take_clusters(
        &mut self,
        host: &mut dyn Host,
        count: u64,
    ) -> Result<Vec<Run>, Failure> {
        if count == 0 {
            return Ok(Vec::new());
        }
        if let Some(run) = self.space(host)?.take_free(count) {
            if let Some(undo) = &mut self.pending.undo {
                undo.taken.push(run);
            }
            self.refcounts().set_ones(host, run)?;
            return Ok(Vec::from([run]));
        }
        let mut runs: Vec<Run> = Vec::new();
        let mut left = count;
        while left > 0 {
            let run = self.take_fresh(host, left)?;
            left -= run.count;
            match runs.last_mut().filter(|last| last.end() == run.first) {
                Some(last) => last.count += run.count,
                None => runs.push(run),
            }
        }
        Ok(runs)
    }

    /// Takes some clusters behind the end, at most `most`, all counted by one
    /// block.
    fn take_fresh(&mut self, host: &mut dyn Host, most: u64) -> Result<Run, Failure> {
        let per_block = self.header.geometry.refcounts_per_block();
        loop {
            let next = self.space(host)?.next;
            let number = next / per_block;
            if self.refcounts().block(host, number)?.is_none() {
                self.add_block(host, number)?;
                continue;
            }
            let count = most.min((number + 1) * per_block - next);
            let run = self.advance(host, count)?;
            self.refcounts().set_ones(host, run)?;
            return Ok(run);
        }
    }

    /// Moves the end of what is handed out.
    fn advance(&mut self, host: &mut dyn Host, count: u64) -> Result<Run, Failure> {
        let geometry = self.header.geometry;
        let space = self.space(host)?;
        let run = Run {
            first: space.next,
            count,
        };
        let end = geometry.host_offset(run.end());
        if end > MAX_FILE_LEN {
            return Err(no_space());
        }
        space.next = run.end();
        self.set_file_len(self.file_len.max(end));
        Ok(run)
    }

    /// Adds a refcount block in the first free cluster of the range that it
    /// counts, so that it counts itself: it can be hooked before anything else.
    fn add_block(&mut self, host: &mut dyn Host, number: u64) -> Result<(), Failure> {
        if number >= self.refcounts().table_entries() {
            return self.grow_refcount_table(host);
        }
        let run = self.advance(host, 1)?;
        self.hook_block(host, number, run.first)?;
        self.refcounts().set_ones(host, run)
    }

    fn hook_block(
        &mut self,
        host: &mut dyn Host,
        number: u64,
        cluster: u64,
    ) -> Result<(), Failure> {
        let geometry = self.header.geometry;
        let at = HostOffset(geometry.host_offset(cluster));
        self.tables
            .insert_zeroed(Kind::RefcountBlock, at, geometry.cluster_size());
        let entry = self.refcounts().entry_at(number);
        self.tables.write(host, Kind::RefcountTable, entry, at.0)?;
        self.pending.new_blocks.push(number);
        Ok(())
    }

    /// Moves the refcount table to where it has at least twice as much room, and
    /// enough for the allocation under way, with the blocks that its new place
    /// needs. The next flush switches to it: until then it does not move again.
    fn grow_refcount_table(&mut self, host: &mut dyn Host) -> Result<(), Failure> {
        if self.pending.old_table.is_some() {
            return Err(super::flush_first());
        }
        let geometry = self.header.geometry;
        let old = self.header.refcount_table;
        let old_len = geometry.host_offset(u64::from(old.count));
        let replaced = Run {
            first: old.offset.0 / geometry.cluster_size(),
            count: u64::from(old.count),
        };
        self.release_later(host, replaced)?;
        let next = self.space(host)?.next;
        let number = next / geometry.refcounts_per_block();
        let present = self.refcounts().present_from(host, number)?;
        let least = u64::from(old.count);
        let least = counting(geometry, next, self.pending.wanted.max(1), &present, least)
            .ok_or_else(no_space)?
            .table
            .max(least);
        let needs = counting(
            geometry,
            next,
            1,
            &present,
            least.max(2 * u64::from(old.count)),
        )
        .or_else(|| counting(geometry, next, 1, &present, least))
        .ok_or_else(no_space)?;
        let all = self.advance(host, needs.blocks.len() as u64 + needs.table)?;
        let mut cursor = Cursor(all.first);
        let blocks = cursor.take(needs.blocks.len() as u64);
        let table = TableRef {
            offset: HostOffset(geometry.host_offset(cursor.take(needs.table).first)),
            count: needs.table as u32,
        };
        let new_len = geometry.host_offset(needs.table);
        self.tables
            .insert_zeroed(Kind::RefcountTable, table.offset, new_len);
        self.copy_table(host, Kind::RefcountTable, old.offset, table.offset, old_len)?;
        self.regions
            .replace(Owner::RefcountTable, table.offset.0, new_len)?;
        self.header.refcount_table = table;
        self.pending.old_table = Some(old);
        for (number, cluster) in needs.blocks.into_iter().zip(blocks.first..) {
            self.hook_block(host, number, cluster)?;
        }
        self.refcounts().set_ones(host, all)
    }

    /// Copies a table in the cache.
    pub(super) fn copy_table(
        &mut self,
        host: &mut dyn Host,
        kind: Kind,
        from: HostOffset,
        to: HostOffset,
        len: u64,
    ) -> Result<(), Failure> {
        let step = self.tables.slice_len();
        for distance in (0..len).step_by(step as usize) {
            let slice = self.tables.slice(host, kind, from.plus(distance))?.to_vec();
            self.tables.change(host, kind, to.plus(distance), &slice)?;
        }
        Ok(())
    }
}

fn no_space() -> Failure {
    Failure::new(
        FailureKind::TooLarge,
        "the image file cannot get larger with its cluster size; copy it with `qemu-img convert -o \
         cluster_size=...`",
    )
}
