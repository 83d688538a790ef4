//! Sparse extents of images of several files: a new one whose grains have their
//! places from the start, and a copy of one that is shorter or longer.
//!
//! An extent's length stands in its own header and in the descriptor, which do
//! not change at once. An extent therefore keeps its length as long as a
//! descriptor names it, and one of another length is another file.

use super::format::entry;
use super::fresh::Fresh;
use super::resize::odd_tables;
use super::scan;
use super::sparse::{Grain, Header, Sparse};
use super::survey::check_place;
use crate::bytes;
use crate::engine::Host;
use crate::error::{Failure, FailureKind};
use crate::plan::{SECTOR, Step};
use crate::proto::FileNo;
use alloc::format;
use alloc::vec;
use alloc::vec::Vec;
use core::ops::{ControlFlow, Range};

/// Most grains of an extent whose tables are part of a plan.
const MAX_GRAINS: u64 = 512 << 10;
/// Most ranges that are copied out of an extent.
const MAX_COPIES: usize = 64 << 10;
/// Bytes of tables that are looked at for zeroes together.
const BLOCK: usize = 4096;

/// A sparse extent that is to be written into an empty file.
pub struct Piece {
    /// Its header.
    fresh: Fresh,
    /// Where its grains lie: grain table entries, one behind the other.
    entries: Vec<u32>,
    /// How many grains have a place.
    grains: u64,
}

impl Piece {
    /// An extent like another, of so many sectors, with a place for each grain.
    pub fn mapped(sectors: u64, model: &Header) -> Result<Self, Failure> {
        let mut piece = Self::empty(sectors, model)?;
        piece.grains = piece.entries.len() as u64;
        let header = &piece.fresh.header;
        let first = header.overhead;
        for (entry, nth) in piece.entries.iter_mut().zip(0..) {
            *entry = place(first + nth * header.grain)?;
        }
        Ok(piece)
    }

    /// An extent with another number of sectors: the new one, and the steps that
    /// copy the data into its file.
    pub fn copied(
        host: &mut dyn Host,
        sparse: &Sparse,
        sectors: u64,
        file: FileNo,
    ) -> Result<(Self, Vec<Step>), Failure> {
        if let Some(odd) = odd_tables(sparse) {
            return Err(odd);
        }
        let mut piece = Self::empty(sectors, &sparse.header)?;
        let mut kept = piece.look(host, sparse)?;
        // In the order of the file, so that neighbours are copied together.
        kept.sort_unstable();
        let steps = piece.take(&kept, sparse, file)?;
        Ok((piece, steps))
    }

    fn empty(sectors: u64, model: &Header) -> Result<Self, Failure> {
        let fresh = Fresh::like(sectors, model)?;
        let grains = fresh.header.grains();
        if grains > MAX_GRAINS {
            return Err(Failure::new(
                FailureKind::TooLarge,
                format!(
                    "the grain tables of an extent of {sectors} sectors are too long for one \
                     change; convert the image with `qemu-img convert -O vmdk`"
                ),
            ));
        }
        Ok(Self {
            fresh,
            entries: vec![entry::NONE; grains as usize],
            grains: 0,
        })
    }

    /// Gives places to all grains that have none, from the one on in which this
    /// sector lies.
    pub fn map_behind(&mut self, sector: u64) -> Result<(), Failure> {
        let header = &self.fresh.header;
        let first = (sector / header.grain) as usize;
        for entry in self.entries.iter_mut().skip(first) {
            if *entry <= entry::ZEROED {
                *entry = place(header.overhead + self.grains * header.grain)?;
                self.grains += 1;
            }
        }
        Ok(())
    }

    /// Goes through the tables of an extent: the sectors and the numbers of its
    /// grains, as far as the new one reaches. Takes over which of them are
    /// zeroes.
    fn look(&mut self, host: &mut dyn Host, sparse: &Sparse) -> Result<Vec<(u64, u64)>, Failure> {
        let header = &sparse.header;
        let mut kept = Vec::new();
        scan::tables(host, sparse, |table| {
            for (grain, raw) in scan::grains(table.bytes, table.number) {
                let Some(entry) = self.entries.get_mut(grain as usize) else {
                    return Ok(ControlFlow::Break(()));
                };
                match sparse.grain(grain, raw)? {
                    Grain::None => {}
                    Grain::Zeroed => *entry = entry::ZEROED,
                    Grain::At(sector) => {
                        check_place(header, grain, sector)?;
                        kept.push((sector, grain));
                    }
                }
            }
            Ok(ControlFlow::Continue(()))
        })?;
        Ok(kept)
    }

    /// Gives grains their places, one behind the other.
    fn take(
        &mut self,
        kept: &[(u64, u64)],
        sparse: &Sparse,
        file: FileNo,
    ) -> Result<Vec<Step>, Failure> {
        let header = &self.fresh.header;
        let whole = header.grain_len();
        let end = header.capacity.min(sparse.header.capacity) * SECTOR;
        // Bytes: from where, to where, how many.
        let mut copies: Vec<(u64, u64, u64)> = Vec::new();
        for (&(sector, grain), nth) in kept.iter().zip(0..) {
            let to = header.overhead + nth * header.grain;
            if let Some(entry) = self.entries.get_mut(grain as usize) {
                *entry = place(to)?;
            }
            let (from, to) = (sector * SECTOR, to * SECTOR);
            // The last grain may end with the disk, or with the file.
            let len = whole
                .min(end - grain * whole)
                .min(sparse.file_len.saturating_sub(from));
            match copies.last_mut() {
                Some((start, _, count)) if *start + *count == from && *count % whole == 0 => {
                    *count += len;
                }
                _ => copies.push((from, to, len)),
            }
        }
        if copies.len() > MAX_COPIES {
            return Err(Failure::new(
                FailureKind::TooLarge,
                "the data of the last extent is too fragmented for one change; convert the image \
                 with `qemu-img convert -O vmdk`",
            ));
        }
        self.grains = kept.len() as u64;
        let source = sparse.file;
        let copy = |(from, to, len)| Step::CopyFrom {
            file,
            source,
            from,
            to,
            len,
        };
        Ok(copies.into_iter().map(copy).collect())
    }

    /// The bytes of its file before the first grain.
    pub fn front(&self) -> u64 {
        self.fresh.header.overhead * SECTOR
    }

    /// The bytes of its file that grains take.
    pub fn data(&self) -> Range<u64> {
        let start = self.front();
        start..start + self.grains * self.fresh.header.grain_len()
    }

    /// The step that gives its file the length.
    pub fn length(&self, file: FileNo) -> Step {
        Step::SetLength {
            file,
            len: self.data().end,
        }
    }

    /// The steps that write header, directories and tables.
    pub fn steps(&self, file: FileNo) -> Result<Vec<Step>, Failure> {
        let mut steps = self.fresh.structures(file)?;
        let mut tables = vec![0; self.entries.len() * entry::LEN as usize];
        for (raw, to) in self.entries.iter().zip(tables.chunks_exact_mut(4)) {
            bytes::put_le32(to, 0, *raw)?;
        }
        for (_, first) in self.fresh.directories() {
            let blocks = tables.chunks(BLOCK).zip(0..);
            for (block, nth) in blocks.filter(|(block, _)| block.iter().any(|&byte| byte != 0)) {
                steps.push(Step::Write {
                    file,
                    offset: first * SECTOR + nth * BLOCK as u64,
                    data: block.to_vec(),
                });
            }
        }
        Ok(steps)
    }
}

/// A grain table entry that leads to a sector.
fn place(sector: u64) -> Result<u32, Failure> {
    u32::try_from(sector).map_err(|_| {
        Failure::new(
            FailureKind::TooLarge,
            format!("a grain cannot lie at sector {sector}"),
        )
    })
}
