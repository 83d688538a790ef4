//! The flags that say that a cluster has one reference only, so that a writer
//! may change it in place.

use super::super::format::entry;
use super::counters::Stored;
use super::entries::Kind;
use super::{Check, Severity};
use crate::bytes;
use crate::error::Failure;
use crate::findings::Repair;
use alloc::format;
use alloc::vec::Vec;

impl Check<'_> {
    /// Compares the flags of the active tree with the counts on disk, of the
    /// clusters of this pass.
    pub(super) fn check_copied(&mut self, repair: bool) -> Result<(), Failure> {
        let l1 = self.image.header.l1;
        let mut index = 0;
        let mut left = self.clusters + (4 << 10);
        while let Some(piece) = self.l1_piece(l1, index)? {
            let mut batch: Vec<(u64, u64)> = Vec::new();
            let batch_len = self.tables_per_batch();
            for raw in piece.chunks_exact(entry::LEN as usize) {
                let raw = bytes::be64(raw, 0)?;
                if raw & entry::OFFSET != 0 && left > 0 {
                    left -= 1;
                    batch.push((index, raw));
                }
                if batch.len() == batch_len {
                    self.check_copied_batch(&batch, repair)?;
                    batch.clear();
                }
                index += 1;
            }
            self.check_copied_batch(&batch, repair)?;
        }
        Ok(())
    }

    fn check_copied_batch(&mut self, batch: &[(u64, u64)], repair: bool) -> Result<(), Failure> {
        let places: Vec<u64> = batch.iter().map(|&(_, raw)| raw & entry::OFFSET).collect();
        let content = self.read_clusters(&places)?;
        let tables = content.chunks_exact(self.shape.cluster as usize);
        for (&(index, raw), table) in batch.iter().zip(tables) {
            let block = self.block_of((raw & entry::OFFSET) >> self.shape.cluster_bits);
            if block.is_some_and(|block| self.is_unreadable(block)) && !self.without_blocks {
                continue;
            }
            self.check_copied_l1(index, raw, repair)?;
            self.check_copied_l2(raw & entry::OFFSET, table, repair)?;
        }
        Ok(())
    }

    fn check_copied_l1(&mut self, index: u64, raw: u64, repair: bool) -> Result<(), Failure> {
        let cluster = (raw & entry::OFFSET) >> self.shape.cluster_bits;
        if !self.is_due(cluster) {
            return Ok(());
        }
        let Some(one) = self.is_one(cluster)? else {
            return Ok(());
        };
        if one == (raw & entry::COPIED != 0) {
            return Ok(());
        }
        let count = self.exact_count(cluster)?;
        let at = self.image.header.l1.offset.plus(index * entry::LEN).0;
        let new = (raw ^ entry::COPIED).to_be_bytes().to_vec();
        let holder = at >> self.shape.cluster_bits;
        let only_l1 = !self.counters.holds(holder) || self.counters.get(holder) == 1;
        let repaired = repair && only_l1 && self.entries.write(at, new);
        self.wrong_flag(repaired, |word| {
            format!(
                "{word} OFLAG_COPIED L2 cluster: l1_index={index} l1_entry={raw:x} refcount={count}"
            )
        })
    }

    fn check_copied_l2(&mut self, at: u64, table: &[u8], repair: bool) -> Result<(), Failure> {
        let mut changed: Option<Vec<u8>> = None;
        let mut gone = Vec::new();
        if self.mended.contains(&at) {
            // Another L1 entry leads to the table, too.
            return Ok(());
        }
        let repair = repair && self.is_only_table(at);
        for (place, words) in (0usize..).zip(table.chunks_exact(self.shape.entry_len)) {
            let Some(raw) = words.first_chunk::<8>() else {
                continue;
            };
            let raw = u64::from_be_bytes(*raw);
            if raw == 0 || !matches!(self.kind(raw), Kind::Normal | Kind::ZeroAllocated) {
                continue;
            }
            let cluster = (raw & entry::OFFSET) >> self.shape.cluster_bits;
            let copied = raw & entry::COPIED != 0;
            match self.shape.data_file {
                true if self.pass_is_first() && !copied => {}
                true => continue,
                false => match self.counters.stored(cluster) {
                    Some(stored) if self.counters.holds(cluster) => match stored {
                        Stored::One if copied => continue,
                        Stored::None | Stored::More if !copied => continue,
                        Stored::Unknown => continue,
                        _ => {}
                    },
                    _ => {
                        let one = match self.is_due(cluster) {
                            true => self.is_one(cluster)?,
                            false => None,
                        };
                        if one.is_none_or(|one| one == copied) {
                            continue;
                        }
                    }
                },
            }
            if self.is_gone(at, raw, words) {
                gone.push(place);
                continue;
            }
            let repaired = repair && self.entries.has_room();
            if repaired {
                let table = changed.get_or_insert_with(|| table.to_vec());
                let new = (raw ^ entry::COPIED).to_be_bytes();
                bytes::put(table, place * self.shape.entry_len, &new)?;
            }
            let count = match self.shape.data_file {
                true => 1,
                false => self.exact_count(cluster)?,
            };
            self.wrong_flag(repaired, |word| {
                format!("{word} OFLAG_COPIED data cluster: l2_entry={raw:x} refcount={count}")
            })?;
        }
        if let Some(mut changed) = changed {
            for place in gone {
                self.put_zero_entry(&mut changed, place)?;
            }
            self.entries.difference(at, table, &changed);
            self.mended.insert(at);
        }
        Ok(())
    }

    /// Whether the repair turns the entry into one without a cluster.
    fn is_gone(&self, table_at: u64, raw: u64, words: &[u8]) -> bool {
        let bitmap = bytes::be64(words, entry::LEN as usize).unwrap_or(0);
        self.repair == Some(Repair::All)
            && self.is_misplaced_zero(raw, bitmap)
            && self.is_only_table(table_at)
    }

    /// Whether a cluster's flags are checked in this pass.
    fn is_due(&self, cluster: u64) -> bool {
        match cluster < self.clusters {
            true => self.counters.holds(cluster),
            false => self.pass_is_first(),
        }
    }

    fn pass_is_first(&self) -> bool {
        self.counters.first() == 0
    }

    /// Whether a cluster's count on disk is one; `None` if it cannot be read.
    fn is_one(&mut self, cluster: u64) -> Result<Option<bool>, Failure> {
        match self.counters.stored(cluster) {
            Some(Stored::Unknown) => Ok(None),
            Some(stored) if cluster < self.clusters => Ok(Some(stored == Stored::One)),
            _ => Ok(self.count_on_disk(cluster)?.map(|count| count == 1)),
        }
    }

    /// A cluster's count as it is on disk, or will be after the repair.
    fn exact_count(&mut self, cluster: u64) -> Result<u64, Failure> {
        if let Some(&count) = self.exact.get(&cluster) {
            return Ok(count);
        }
        match cluster < self.clusters {
            true => Ok(self.counters.get(cluster)),
            false => Ok(self.count_on_disk(cluster)?.unwrap_or(0)),
        }
    }

    fn wrong_flag(
        &mut self,
        repaired: bool,
        text: impl Fn(&str) -> alloc::string::String,
    ) -> Result<(), Failure> {
        let (severity, word) = match repaired {
            true => (Severity::Repaired, "Repairing"),
            false => (Severity::Corruption, "ERROR"),
        };
        self.tell.report.corruptions_fixed += u64::from(repaired);
        self.tell.add(self.host, severity, text(word))
    }
}
