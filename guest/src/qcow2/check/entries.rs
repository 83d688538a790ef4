//! The entries of an L2 table: counts what they refer to and judges them.

use super::super::format::entry;
use super::{Check, Severity};
use crate::bytes;
use crate::error::Failure;
use crate::findings::Repair;
use alloc::format;
use alloc::vec::Vec;

/// Bits of an entry for an uncompressed cluster that must be zero, as QEMU sees
/// it: without the zero flag.
const RESERVED: u64 = !(entry::OFFSET | entry::COPIED | entry::COMPRESSED | entry::ZERO);
/// All subclusters' allocation bits.
const ALL_ALLOCATED: u64 = u32::MAX as u64;

/// What an L2 entry stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// No cluster, and no zeroes.
    Unallocated,
    /// Zeroes, in no cluster.
    Zero,
    /// A cluster that reads as zeroes.
    ZeroAllocated,
    /// A cluster.
    Normal,
    /// Compressed data.
    Compressed,
}

/// Where an L2 entry is.
#[derive(Clone, Copy, Debug)]
struct Slot {
    /// Host offset of the table.
    table_at: u64,
    /// Its index in the table.
    index: u64,
}

/// Sums over the active tree.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Sums {
    pub allocated: u64,
    pub fragmented: u64,
    pub compressed: u64,
    /// Entries for clusters beyond the end of the disk.
    pub beyond: u64,
}

impl Check<'_> {
    pub(super) fn kind(&self, raw: u64) -> Kind {
        let offset = raw & entry::OFFSET;
        if raw & entry::COMPRESSED != 0 {
            Kind::Compressed
        } else if raw & entry::ZERO != 0 && !self.shape.extended {
            match offset {
                0 => Kind::Zero,
                _ => Kind::ZeroAllocated,
            }
        } else if offset == 0 && !(self.shape.data_file && raw & entry::COPIED != 0) {
            Kind::Unallocated
        } else {
            Kind::Normal
        }
    }

    /// Counts what an L2 table refers to, `references` times. `index` is that
    /// of the L1 entry in the active tree, which alone is summed up.
    pub(super) fn l2_table(
        &mut self,
        table_at: u64,
        table: &[u8],
        references: u64,
        index: Option<u64>,
    ) -> Result<(), Failure> {
        if let Some(index) = index {
            self.note_beyond(index, table);
        }
        let sums = index.is_some() && self.pass == 0;
        let entry_len = self.shape.entry_len;
        let mut next = 0;
        for (at, raw) in (0u64..).zip(table.chunks_exact(entry_len)) {
            let (words, _) = raw.as_chunks::<8>();
            let (entry, bitmap) = match *words {
                [entry] => (u64::from_be_bytes(entry), 0),
                [entry, bitmap] => (u64::from_be_bytes(entry), u64::from_be_bytes(bitmap)),
                _ => continue,
            };
            if entry | bitmap == 0 {
                continue;
            }
            let offset = entry & entry::OFFSET;
            let plain = entry & !(entry::OFFSET | entry::COPIED) == 0
                && offset & (self.shape.cluster - 1) == 0
                && (1..self.shape.file_len).contains(&offset)
                && (bitmap >> 32) & bitmap == 0
                && !self.shape.data_file
                && references == 1;
            if !plain {
                let slot = Slot {
                    table_at,
                    index: at,
                };
                self.l2_entry(slot, (entry, bitmap), references, sums, &mut next)?;
                continue;
            }
            if sums {
                self.sums.allocated += 1;
                self.sums.fragmented += u64::from(next != 0 && offset != next);
                next = offset + self.shape.cluster;
            }
            if !self.counters.add_one(offset >> self.shape.cluster_bits) {
                self.overflow(offset, 1)?;
            }
        }
        Ok(())
    }

    /// An entry that is not a plain reference to a cluster.
    fn l2_entry(
        &mut self,
        slot: Slot,
        (raw, bitmap): (u64, u64),
        references: u64,
        sums: bool,
        next: &mut u64,
    ) -> Result<(), Failure> {
        let kind = self.kind(raw);
        if kind != Kind::Compressed && raw & RESERVED != 0 {
            self.corrupt(references, || {
                format!("ERROR found l2 entry with reserved bits set: {raw:x}")
            })?;
        }
        match kind {
            Kind::Compressed => self.compressed(slot.index, raw, bitmap, references, sums),
            Kind::Normal | Kind::ZeroAllocated => {
                self.allocated(slot, (raw, bitmap), references, sums, next)
            }
            Kind::Unallocated if bitmap & ALL_ALLOCATED != 0 => self.corrupt(references, || {
                "ERROR: Unallocated cluster has non-zero subcluster allocation map".into()
            }),
            Kind::Unallocated | Kind::Zero => Ok(()),
        }
    }

    fn compressed(
        &mut self,
        at: u64,
        raw: u64,
        bitmap: u64,
        references: u64,
        sums: bool,
    ) -> Result<(), Failure> {
        let offset_bits = 62 - (self.shape.cluster_bits - 8);
        let offset = raw & ((1 << offset_bits) - 1);
        if raw & entry::COPIED != 0 {
            self.corrupt(references, || {
                format!(
                    "ERROR: coffset=0x{offset:x}: copied flag must never be set for compressed \
                     clusters"
                )
            })?;
        }
        let raw = raw & !entry::COPIED;
        let flaw = match bitmap {
            _ if self.shape.data_file => "with data file",
            0 => "",
            _ => "with non-zero subcluster allocation bitmap",
        };
        if !flaw.is_empty() {
            return self.corrupt(references, || {
                format!("ERROR compressed cluster {at} {flaw}, entry=0x{raw:x}")
            });
        }
        let sectors = ((raw & !entry::COMPRESSED) >> offset_bits) + 1;
        let len = sectors * entry::COMPRESSED_SECTOR - offset % entry::COMPRESSED_SECTOR;
        self.refer(offset, len, references)?;
        if sums {
            self.sums.allocated += 1;
            self.sums.compressed += 1;
            self.sums.fragmented += 1;
        }
        Ok(())
    }

    fn allocated(
        &mut self,
        slot: Slot,
        (raw, bitmap): (u64, u64),
        references: u64,
        sums: bool,
        next: &mut u64,
    ) -> Result<(), Failure> {
        let offset = raw & entry::OFFSET;
        if (bitmap >> 32) & bitmap != 0 {
            self.corrupt(references, || {
                format!(
                    "ERROR offset={offset:x}: Allocated cluster has corrupted subcluster \
                     allocation bitmap"
                )
            })?;
        }
        if offset & (self.shape.cluster - 1) != 0 {
            if self.is_misplaced_zero(raw, bitmap) {
                if self.repair == Some(Repair::All) && self.is_only_table(slot.table_at) {
                    return self.zero_entry(slot, offset, bitmap);
                }
                self.corrupt(references, || {
                    format!(
                        "ERROR offset={offset:x}: Preallocated cluster is not properly aligned; L2 \
                         entry corrupted."
                    )
                })?;
            } else {
                self.corrupt(references, || {
                    format!(
                        "ERROR offset={offset:x}: Data cluster is not properly aligned; L2 entry \
                         corrupted."
                    )
                })?;
            }
        }
        if sums {
            self.sums.allocated += 1;
            self.sums.fragmented += u64::from(*next != 0 && offset != *next);
            *next = offset + self.shape.cluster;
        }
        match self.shape.data_file {
            true => Ok(()),
            false => self.refer(offset, self.shape.cluster, references),
        }
    }

    /// Whether an entry keeps a cluster at an impossible offset for zeroes: it
    /// can do without.
    pub(super) fn is_misplaced_zero(&self, raw: u64, bitmap: u64) -> bool {
        let reads_as_zero = match self.shape.extended {
            true => bitmap & ALL_ALLOCATED == 0,
            false => raw & entry::ZERO != 0,
        };
        reads_as_zero && raw & entry::OFFSET & (self.shape.cluster - 1) != 0
    }

    /// The entry for zeroes in no cluster.
    fn zeroes(&self, bitmap: u64) -> Vec<u8> {
        match self.shape.extended {
            true => {
                let zeroes = (bitmap | bitmap << 32) & !ALL_ALLOCATED;
                [0u64.to_be_bytes(), zeroes.to_be_bytes()].concat()
            }
            false => entry::ZERO.to_be_bytes().to_vec(),
        }
    }

    /// Makes entry `index` of an L2 table one for zeroes in no cluster.
    pub(super) fn put_zero_entry(&self, table: &mut [u8], index: usize) -> Result<(), Failure> {
        let at = index * self.shape.entry_len;
        let bitmap = bytes::be64(table, at + entry::LEN as usize).unwrap_or(0);
        Ok(bytes::put(table, at, &self.zeroes(bitmap))?)
    }

    /// Makes an entry one for zeroes in no cluster.
    fn zero_entry(&mut self, slot: Slot, offset: u64, bitmap: u64) -> Result<(), Failure> {
        if self.pass > 0 {
            return Ok(());
        }
        let place = slot.table_at + slot.index * self.shape.entry_len as u64;
        if !self.entries.write(place, self.zeroes(bitmap)) {
            return self.corrupt(1, || {
                format!(
                    "ERROR offset={offset:x}: Preallocated cluster is not properly aligned; L2 \
                     entry corrupted."
                )
            });
        }
        self.tell.report.corruptions_fixed += 1;
        self.say(Severity::Repaired, || {
            format!(
                "Repairing offset={offset:x}: Preallocated cluster is not properly aligned; L2 \
                 entry corrupted."
            )
        })
    }

    /// Notes entries for clusters beyond the end of the disk.
    fn note_beyond(&mut self, index: u64, table: &[u8]) {
        if self.pass > 0 {
            return;
        }
        let geometry = self.image.header.geometry;
        let start = index.saturating_mul(geometry.l2_coverage());
        let inside = self.image.header.size.saturating_sub(start);
        let entries = inside.div_ceil(self.shape.cluster);
        if entries < geometry.l2_entries() {
            let len = self.shape.entry_len;
            let behind = table.chunks_exact(len).skip(entries as usize);
            let used = behind.filter(|entry| entry.iter().any(|&byte| byte != 0));
            self.sums.beyond += used.count() as u64;
        }
    }
}
