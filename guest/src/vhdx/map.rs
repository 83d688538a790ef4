//! From guest offsets to places in the file.

use super::Vhdx;
use super::bat::{PIECE, Place};
use super::format::{MIB, bat as on_disk};
use super::refuse::damaged;
use crate::bytes::byte;
use crate::engine::{Host, Read};
use crate::error::Failure;
use crate::extents::Extents;
use crate::proto::{Extent, ExtentKind, FileNo};
use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;
use core::fmt::Display;

/// Blocks whose entries are read at once.
const BATCH: u64 = 128 << 10;
/// Bytes of a sector bitmap that are read at once.
const BITMAP_PIECE: u64 = 64 << 10;
/// Extents that one block adds at most, but for a partially present one.
const PER_BLOCK: usize = 2;

impl Vhdx {
    /// What lies behind a guest range.
    pub(super) fn extents(
        &mut self,
        host: &mut dyn Host,
        offset: u64,
        len: u64,
    ) -> Result<Vec<Extent>, Failure> {
        let geometry = self.metadata.geometry;
        let end = offset + len;
        let mut extents = Extents::default();
        let mut at = offset;
        let mut loaded = 0;
        while at < end && !extents.is_full(PER_BLOCK) {
            let block = at / geometry.block_size;
            if block >= loaded {
                loaded = geometry.blocks(end).min(block + BATCH);
                self.load_blocks(host, block..loaded)?;
            }
            let next = ((block + 1) * geometry.block_size).min(end);
            self.push_block(host, &mut extents, at, next - at)?;
            match extents.end() {
                Some(reached) if reached < next => break,
                _ => at = next,
            }
        }
        Ok(extents.list)
    }

    /// Brings the entries of blocks into memory.
    pub(super) fn load_blocks(
        &mut self,
        host: &mut dyn Host,
        blocks: core::ops::Range<u64>,
    ) -> Result<(), Failure> {
        let geometry = self.metadata.geometry;
        let last = blocks.end.saturating_sub(1).max(blocks.start);
        // One entry in each piece is enough.
        let indexes = (geometry.index(blocks.start)..=geometry.index(last)).step_by(PIECE as usize);
        let indexes = indexes.chain([geometry.index(last)]);
        self.bat.load(host, &self.source, indexes)
    }

    /// Where a block is: its entry, decoded and checked.
    pub(super) fn place(&mut self, host: &mut dyn Host, block: u64) -> Result<Place, Failure> {
        let geometry = self.metadata.geometry;
        let index = geometry.index(block);
        let raw = self.bat.get(host, &self.source, index)?;
        let place = Place::decode(raw, geometry.has_parent)
            .map_err(|flaw| self.refuse(index, block, &flaw))?;
        match place {
            Place::Full(at) | Place::Partial(at) => {
                self.check_block(at, geometry.block_size)
                    .map_err(|why| self.refuse(index, block, &why))?;
            }
            Place::Absent | Place::Zero { .. } => {}
        }
        Ok(place)
    }

    fn refuse(&self, index: u64, block: u64, why: &dyn Display) -> Failure {
        let guest = block.saturating_mul(self.metadata.geometry.block_size);
        damaged(format!(
            "BAT entry {index} (guest offset {guest:#x}): {why}"
        ))
    }

    /// Refuses a place where no block of data can be: the log changes none.
    pub(super) fn check_block(&self, at: u64, len: u64) -> Result<(), String> {
        self.check_bitmap(at, len)?;
        match self.source.overlay.first_in(at, len) {
            None => Ok(()),
            Some(_) => Err(format!("the log changes the block at {at:#x}")),
        }
    }

    /// Refuses a place where no sector bitmap can be: those are metadata, which
    /// the log may change.
    pub(super) fn check_bitmap(&self, at: u64, len: u64) -> Result<(), String> {
        if at < MIB {
            return Err(format!("the block at {at:#x} overlaps the headers"));
        }
        if let Some(owner) = self.table.overlapping(at, len) {
            return Err(format!("the block at {at:#x} overlaps {}", owner.name()));
        }
        if at >= self.source.file_len {
            return Err(format!(
                "the block at {at:#x} lies past the end of the file ({} bytes)",
                self.source.file_len
            ));
        }
        Ok(())
    }

    /// Adds a guest range inside one block.
    fn push_block(
        &mut self,
        host: &mut dyn Host,
        extents: &mut Extents,
        offset: u64,
        len: u64,
    ) -> Result<(), Failure> {
        let geometry = self.metadata.geometry;
        let block = offset / geometry.block_size;
        let inside = offset % geometry.block_size;
        match self.place(host, block)? {
            Place::Absent => extents.push(offset, len, ExtentKind::Unallocated { at: None }),
            Place::Zero { kept } => {
                let at = kept.map(|kept| kept.saturating_add(inside));
                extents.push(offset, len, ExtentKind::Zero { at });
            }
            Place::Full(at) => self.push_data(extents, offset, len, at + inside),
            Place::Partial(at) => self.push_partial(host, extents, offset, len, at + inside)?,
        }
        Ok(())
    }

    /// Adds data. What lies past the end of the file reads as zeroes.
    fn push_data(&self, extents: &mut Extents, offset: u64, len: u64, at: u64) {
        let present = self.source.file_len.saturating_sub(at).min(len);
        let data = ExtentKind::Data {
            file: FileNo::IMAGE,
            at,
            in_place: self.may_write_in_place(),
        };
        extents.push(offset, present, data);
        let zero = ExtentKind::Zero {
            at: Some(at + present),
        };
        extents.push(offset + present, len - present, zero);
    }

    /// Adds a range of a block whose sectors are partly in the file, as far as
    /// there is room.
    fn push_partial(
        &mut self,
        host: &mut dyn Host,
        extents: &mut Extents,
        offset: u64,
        len: u64,
        at: u64,
    ) -> Result<(), Failure> {
        let sector = self.metadata.geometry.sector;
        let end = offset + len;
        let mut from = offset;
        while from < end && !extents.is_full(PER_BLOCK) {
            let next = (from - from % sector + sector).min(end);
            match self.is_present(host, from)? {
                true => self.push_data(extents, from, next - from, at + (from - offset)),
                false => extents.push(from, next - from, ExtentKind::Unallocated { at: None }),
            }
            from = next;
        }
        Ok(())
    }

    /// Whether a sector of a partially present block is in the file.
    fn is_present(&mut self, host: &mut dyn Host, offset: u64) -> Result<bool, Failure> {
        let geometry = self.metadata.geometry;
        let block = offset / geometry.block_size;
        let index = geometry.bitmap_index(block);
        let raw = self.bat.get(host, &self.source, index)?;
        let at = raw & on_disk::OFFSET;
        if raw & on_disk::STATE != on_disk::FULLY_PRESENT {
            return Err(self.refuse(
                index,
                block,
                &"a block is partially present, but its sector bitmap is not there",
            ));
        }
        self.check_bitmap(at, MIB)
            .map_err(|why| self.refuse(index, block, &why))?;
        let bit = offset % geometry.block_size / geometry.sector;
        let place = geometry.bitmap_offset(block) + bit / 8;
        let piece = at + place - place % BITMAP_PIECE;
        if !matches!(&self.bitmap, Some((loaded, _)) if *loaded == piece) {
            let mut bytes = vec![0; BITMAP_PIECE as usize];
            self.source.read(
                host,
                &mut [Read {
                    file: FileNo::IMAGE,
                    offset: piece,
                    buf: &mut bytes,
                }],
            )?;
            self.bitmap = Some((piece, bytes));
        }
        let bytes = self.bitmap.as_ref().map_or(&[][..], |(_, bytes)| bytes);
        Ok(byte(bytes, (place % BITMAP_PIECE) as usize)? >> (bit % 8) & 1 == 1)
    }
}
