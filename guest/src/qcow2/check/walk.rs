//! From L1 tables to data clusters: counts what they refer to.
//!
//! L2 tables are read many at once. The active tree is walked in its order;
//! snapshots share most of their tables with it and with each other, so theirs
//! are collected first and each is looked at once, for as many references as
//! lead to it.

use super::super::format::entry;
use super::super::header::TableRef;
use super::{Check, Severity};
use crate::bytes;
use crate::engine::Read;
use crate::error::{Failure, FailureKind};
use crate::proto::FileNo;
use alloc::format;
use alloc::vec;
use alloc::vec::Vec;

/// Bytes of an L1 table that are read at once.
pub const L1_PIECE: u64 = 64 << 10;
/// Bytes of L2 tables or refcount blocks that are read at once.
pub const BATCH: u64 = 2 << 20;
/// Most ranges in one read.
pub const MAX_RANGES: usize = 4 << 10;
/// L2 tables of snapshots that are collected before they are looked at.
const COLLECTED: usize = 128 << 10;
/// Most entries of all snapshots' L1 tables together: 2 GiB of tables.
const MAX_SNAPSHOT_ENTRIES: u64 = 256 << 20;

/// Bits of an L1 entry that must be zero.
const L1_RESERVED: u64 = !(entry::OFFSET | entry::COPIED);

impl Check<'_> {
    /// The active L1 table and everything behind it.
    pub(super) fn walk_active(&mut self) -> Result<(), Failure> {
        let l1 = self.image.header.l1;
        if l1.count == 0 {
            return Ok(());
        }
        self.refer(l1.offset.0, u64::from(l1.count) * entry::LEN, 1)?;
        let mut visits = Visits::default();
        let mut index = 0;
        while let Some(piece) = self.l1_piece(l1, index)? {
            let batch_len = self.tables_per_batch();
            let mut batch: Vec<(u64, u64)> = Vec::new();
            for raw in piece.chunks_exact(entry::LEN as usize) {
                let raw = bytes::be64(raw, 0)?;
                if raw != 0 {
                    batch.push((index, raw));
                }
                if batch.len() == batch_len {
                    self.visit_active(&batch, &mut visits)?;
                    batch.clear();
                }
                index += 1;
            }
            self.visit_active(&batch, &mut visits)?;
        }
        Ok(())
    }

    /// The next piece of an L1 table, from entry `index` on.
    pub(super) fn l1_piece(
        &mut self,
        l1: TableRef,
        index: u64,
    ) -> Result<Option<Vec<u8>>, Failure> {
        let rest = u64::from(l1.count).saturating_sub(index) * entry::LEN;
        if rest == 0 {
            return Ok(None);
        }
        let mut piece = vec![0; rest.min(L1_PIECE) as usize];
        self.host.read(&mut [Read {
            file: FileNo::IMAGE,
            offset: l1.offset.plus(index * entry::LEN).0,
            buf: &mut piece,
        }])?;
        Ok(Some(piece))
    }

    /// L2 tables that one read takes.
    pub(super) fn tables_per_batch(&self) -> usize {
        (BATCH / self.shape.cluster).clamp(1, MAX_RANGES as u64) as usize
    }

    /// L2 tables of the active tree, with the L1 entries that lead to them.
    fn visit_active(&mut self, batch: &[(u64, u64)], visits: &mut Visits) -> Result<(), Failure> {
        let places: Vec<u64> = batch.iter().map(|&(_, raw)| raw & entry::OFFSET).collect();
        let content = self.read_clusters(&places)?;
        let tables = content.chunks_exact(self.shape.cluster as usize);
        for (&(index, raw), table) in batch.iter().zip(tables) {
            let offset = raw & entry::OFFSET;
            let seen = self.counters.get(offset >> self.shape.cluster_bits) > 0;
            self.l1_entry(raw, 1)?;
            if !visits.may_go_on(seen, self.clusters) {
                let text = "ERROR: too many L1 entries refer to the same L2 tables";
                if visits.stop() {
                    self.say(Severity::Error, || text.into())?;
                }
                continue;
            }
            self.l2_table(offset, table, 1, Some(index))?;
        }
        Ok(())
    }

    /// Judges an L1 entry and counts the table that it refers to.
    fn l1_entry(&mut self, raw: u64, references: u64) -> Result<(), Failure> {
        if raw & L1_RESERVED != 0 {
            self.corrupt(references, || {
                format!("ERROR found L1 entry with reserved bits set: {raw:x}")
            })?;
        }
        let offset = raw & entry::OFFSET;
        self.note_table(offset, references);
        self.refer(offset, self.shape.cluster, references)?;
        if offset & (self.shape.cluster - 1) != 0 {
            self.corrupt(references, || {
                format!(
                    "ERROR l2_offset={offset:x}: Table is not cluster aligned; L1 entry corrupted"
                )
            })?;
        }
        Ok(())
    }

    /// The L1 tables of all snapshots and everything behind them.
    pub(super) fn walk_snapshots(&mut self) -> Result<(), Failure> {
        let image = self.image;
        let entries = image.snapshots.iter().map(|s| u64::from(s.l1.count));
        if entries.sum::<u64>() > MAX_SNAPSHOT_ENTRIES {
            return Err(Failure::new(
                FailureKind::TooLarge,
                format!(
                    "the L1 tables of all snapshots together have more than {MAX_SNAPSHOT_ENTRIES} \
                     entries, which is too many for a check"
                ),
            ));
        }
        let count = image.snapshots.len();
        if self.shape.data_file && count > 0 {
            self.corrupt(1, || {
                format!("ERROR {count} snapshots in image with data file")
            })?;
        }
        let mut collected = Collected::default();
        for snapshot in &image.snapshots {
            let l1 = snapshot.l1;
            if !image.header.geometry.is_aligned(l1.offset.0) {
                let (id, name) = (&snapshot.facts.id, &snapshot.facts.name);
                self.corrupt(1, || {
                    format!(
                        "ERROR snapshot {id} ({name}) l1_offset={:#x}: L1 table is not cluster \
                         aligned; snapshot table entry corrupted",
                        l1.offset.0
                    )
                })?;
                continue;
            }
            if l1.count == 0 {
                continue;
            }
            self.refer(l1.offset.0, u64::from(l1.count) * entry::LEN, 1)?;
            let mut index = 0;
            while let Some(piece) = self.l1_piece(l1, index)? {
                for raw in piece.chunks_exact(entry::LEN as usize) {
                    let raw = bytes::be64(raw, 0)?;
                    if raw != 0 {
                        self.l1_entry(raw, 1)?;
                        if collected.is_full(raw & entry::OFFSET) {
                            self.visit_collected(&mut collected)?;
                        }
                    }
                    index += 1;
                }
            }
        }
        self.visit_collected(&mut collected)
    }

    fn visit_collected(&mut self, collected: &mut Collected) -> Result<(), Failure> {
        let tables = collected.take();
        for batch in tables.chunks(self.tables_per_batch()) {
            let places: Vec<u64> = batch.iter().map(|&(offset, _)| offset).collect();
            let content = self.read_clusters(&places)?;
            let tables = content.chunks_exact(self.shape.cluster as usize);
            for (&(offset, references), table) in batch.iter().zip(tables) {
                self.l2_table(offset, table, references, None)?;
            }
        }
        Ok(())
    }

    /// The clusters at these offsets, one behind the other; neighbours are read
    /// as one. What lies past the end of the file is zero.
    pub(super) fn read_clusters(&mut self, places: &[u64]) -> Result<Vec<u8>, Failure> {
        let pieces: Vec<(u64, u64)> = places.iter().map(|&at| (at, self.shape.cluster)).collect();
        self.read_pieces(&pieces)
    }

    /// Ranges of the image file, one behind the other.
    pub(super) fn read_pieces(&mut self, pieces: &[(u64, u64)]) -> Result<Vec<u8>, Failure> {
        let total: u64 = pieces.iter().map(|&(_, len)| len).sum();
        let mut content = vec![0; total as usize];
        let mut reads: Vec<Read<'_>> = Vec::new();
        let mut rest = content.as_mut_slice();
        let mut pieces = pieces.iter().copied().peekable();
        while let Some((at, mut len)) = pieces.next() {
            while let Some(&(next, more)) = pieces.peek()
                && Some(next) == at.checked_add(len)
            {
                len += more;
                pieces.next();
            }
            let (piece, behind) = rest.split_at_mut(len.min(rest.len() as u64) as usize);
            rest = behind;
            let inside = self.shape.file_len.saturating_sub(at).min(len);
            if let Some(buf) = piece.get_mut(..inside as usize)
                && inside > 0
            {
                reads.push(Read {
                    file: FileNo::IMAGE,
                    offset: at,
                    buf,
                });
            }
        }
        if !reads.is_empty() {
            self.host.read(&mut reads)?;
        }
        Ok(content)
    }
}

/// How often L2 tables of the active tree were looked at. A sound image leads
/// to each once; a damaged one might lead to a few for ever.
#[derive(Default)]
struct Visits {
    all: u64,
    again: u64,
    stopped: bool,
}

impl Visits {
    /// Visits of tables that something else refers to as well.
    const MAX_AGAIN: u64 = 4 << 10;

    fn may_go_on(&mut self, seen: bool, clusters: u64) -> bool {
        self.all += 1;
        self.again += u64::from(seen);
        self.all <= clusters + Self::MAX_AGAIN && self.again <= Self::MAX_AGAIN
    }

    /// Whether this is the first table that is left out.
    fn stop(&mut self) -> bool {
        !core::mem::replace(&mut self.stopped, true)
    }
}

/// L2 tables with the number of references to each.
#[derive(Default)]
struct Collected {
    tables: Vec<(u64, u64)>,
}

impl Collected {
    /// Adds a reference. Whether there is no room for another.
    fn is_full(&mut self, offset: u64) -> bool {
        self.tables.push((offset, 1));
        if self.tables.len() < COLLECTED {
            return false;
        }
        self.merge();
        self.tables.len() > COLLECTED / 2
    }

    fn merge(&mut self) {
        self.tables.sort_unstable();
        self.tables.dedup_by(|next, kept| {
            let same = next.0 == kept.0;
            kept.1 += if same { next.1 } else { 0 };
            same
        });
    }

    /// All that were collected, in the order of the file.
    fn take(&mut self) -> Vec<(u64, u64)> {
        self.merge();
        core::mem::take(&mut self.tables)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_to_the_same_table_are_added_up() {
        let mut collected = Collected::default();
        for offset in [512, 1024, 512, 512] {
            assert!(!collected.is_full(offset));
        }
        assert_eq!(collected.take(), [(512, 3), (1024, 1)]);
        for at in 0..4 * COLLECTED as u64 {
            assert!(!collected.is_full(at % 1000));
        }
        assert_eq!(collected.take().len(), 1000);
        let full = (0..).find(|&at| collected.is_full(at));
        assert_eq!(full, Some(COLLECTED as u64 - 1));
    }

    #[test]
    fn visits_of_the_same_tables_end() {
        let mut visits = Visits::default();
        assert!((0..1000).all(|_| visits.may_go_on(false, 1000)));
        let more = (0..).find(|_| !visits.may_go_on(true, 1000));
        assert_eq!(more, Some(Visits::MAX_AGAIN));
        assert!(visits.stop());
        assert!(!visits.stop());
    }
}
