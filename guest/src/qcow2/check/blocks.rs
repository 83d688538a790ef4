//! The refcount table and its blocks: counted themselves, and read.

use super::super::format::refcount;
use super::{Check, Severity};
use crate::bytes;
use crate::engine::Read;
use crate::error::Failure;
use crate::findings::Repair;
use crate::proto::FileNo;
use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;

/// Bytes of the refcount table, or of a block, that are read at once.
const PIECE: u64 = 64 << 10;

/// Where QEMU's files end at the latest: a multiple of 1 GiB.
const MAX_OFFSET: u64 = i64::MAX as u64 & !((1 << 30) - 1);

/// An entry of the refcount table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BlockRef {
    /// Its index.
    pub number: u64,
    /// The entry, not 0.
    pub raw: u64,
}

impl BlockRef {
    /// Host offset of the block.
    pub fn at(self) -> u64 {
        self.raw & refcount::OFFSET
    }
}

/// The piece of a block that was looked at last, outside of a comparison.
#[derive(Debug, Default)]
pub(super) struct Lookup {
    at: u64,
    piece: Vec<u8>,
}

impl Check<'_> {
    /// Reads the refcount table and keeps what is in it.
    pub(super) fn read_refcount_table(&mut self) -> Result<(), Failure> {
        let table = self.image.header.refcount_table;
        let len = u64::from(table.count) * self.shape.cluster;
        let mut at = 0;
        while at < len {
            let mut piece = vec![0; (len - at).min(PIECE) as usize];
            self.host.read(&mut [Read {
                file: FileNo::IMAGE,
                offset: table.offset.plus(at).0,
                buf: &mut piece,
            }])?;
            let first = at / refcount::ENTRY_LEN;
            for (number, raw) in (first..).zip(piece.chunks_exact(refcount::ENTRY_LEN as usize)) {
                let raw = bytes::be64(raw, 0)?;
                if raw != 0 {
                    self.blocks.push(BlockRef { number, raw });
                }
            }
            at += piece.len() as u64;
        }
        Ok(())
    }

    /// Counts the refcount blocks, which nothing else may refer to.
    pub(super) fn count_blocks(&mut self) -> Result<(), Failure> {
        for at in 0..self.blocks.len() {
            if let Some(&block) = self.blocks.get(at) {
                self.count_block(block)?;
            }
        }
        Ok(())
    }

    fn count_block(&mut self, block: BlockRef) -> Result<(), Failure> {
        let BlockRef { number, raw } = block;
        let offset = block.at();
        let cluster = offset >> self.shape.cluster_bits;
        if raw != offset {
            return self.broken_block(|| {
                format!("ERROR refcount table entry {number} has reserved bits set")
            });
        }
        if offset & (self.shape.cluster - 1) != 0 {
            return self.broken_block(|| {
                format!(
                    "ERROR refcount block {number} is not cluster aligned; refcount table entry \
                     corrupted"
                )
            });
        }
        if cluster >= self.clusters {
            return self.block_outside(number);
        }
        self.refer(offset, self.shape.cluster, 1)?;
        let count = self.counters.get(cluster);
        if self.counters.holds(cluster) && count != 1 {
            self.rebuild = true;
            self.broken_blocks += 1;
            let text = format!("ERROR refcount block {number} refcount={count}");
            self.tell.add(self.host, Severity::Corruption, text)?;
        }
        Ok(())
    }

    fn broken_block(&mut self, text: impl Fn() -> String) -> Result<(), Failure> {
        self.rebuild = true;
        self.broken_blocks += u64::from(self.pass == 0);
        self.corrupt(1, text)
    }

    fn block_outside(&mut self, number: u64) -> Result<(), Failure> {
        if self.repair != Some(Repair::All) {
            return self.corrupt(1, || {
                format!("ERROR refcount block {number} is outside image")
            });
        }
        self.rebuild = true;
        self.tell.report.corruptions_fixed += u64::from(self.pass == 0);
        self.say(Severity::Repaired, || {
            format!("Repairing refcount block {number} is outside image")
        })
    }

    /// The entry for the block that counts a cluster.
    pub(super) fn block_of(&self, cluster: u64) -> Option<BlockRef> {
        let number = cluster / self.image.header.geometry.refcounts_per_block();
        let at = self
            .blocks
            .binary_search_by_key(&number, |block| block.number);
        at.ok().and_then(|at| self.blocks.get(at)).copied()
    }

    /// Whether a block lies where no file can have one.
    pub(super) fn is_unreadable(&self, block: BlockRef) -> bool {
        block.at() & (self.shape.cluster - 1) != 0
            || block.at().saturating_add(self.shape.cluster) > MAX_OFFSET
    }

    /// The count on disk of a cluster, wherever it is; `None` where it cannot
    /// be read. Slow.
    pub(super) fn count_on_disk(&mut self, cluster: u64) -> Result<Option<u64>, Failure> {
        let geometry = self.image.header.geometry;
        let Some(block) = self.block_of(cluster) else {
            return Ok(Some(0));
        };
        if self.is_unreadable(block) {
            return Ok(None);
        }
        let width = geometry.width();
        let index = cluster % geometry.refcounts_per_block();
        let place = width.byte_range(index, index + 1).start as u64;
        let base = place - place % PIECE;
        let at = block.at().saturating_add(base);
        if self.lookup.at != at || self.lookup.piece.is_empty() {
            let len = PIECE.min(self.shape.cluster);
            self.lookup.piece = self.read_pieces(&[(at, len)])?;
            self.lookup.at = at;
        }
        let first = base * 8 / width.bits();
        Ok(Some(width.get(&self.lookup.piece, index - first)))
    }
}
