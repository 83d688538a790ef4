//! From guest ranges to extents.
//!
//! A block of a dynamic disk is all there or not at all: like QEMU, and unlike
//! the specification's letter, this does not look at its bitmap. In a
//! differencing image the bitmap says for each sector whether it is here or in
//! the parent.

use super::footer::Kind;
use super::format::table::FREE;
use super::table::{self, block_at};
use super::{Dynamic, Layout, Vhd};
use crate::engine::{Host, Read};
use crate::error::Failure;
use crate::extents::continues;
use crate::plan::SECTOR;
use crate::proto::{Extent, ExtentKind, FileNo, MAX_EXTENTS};
use alloc::vec;
use alloc::vec::Vec;

/// Most bitmaps that are read for one answer.
const MAX_BITMAPS: usize = 256;
/// Most bytes of bitmaps that are read for one answer, but for the first.
const MAX_BITMAP_BYTES: u64 = 1 << 20;

impl Vhd {
    /// What lies behind a guest range inside the disk; see
    /// [`Reply::Extents`](crate::Reply::Extents).
    pub fn extents(
        &mut self,
        host: &mut dyn Host,
        offset: u64,
        len: u64,
    ) -> Result<Vec<Extent>, Failure> {
        let differencing = self.footer.kind == Kind::Differencing;
        let file_len = self.file_len;
        let mut list = List::new(offset, offset + len);
        match &mut self.layout {
            Layout::Fixed => list.add(offset + len, data_at(offset, true)),
            Layout::Dynamic(dynamic) if differencing => {
                dynamic.add_sectors(host, file_len, &mut list)?;
            }
            Layout::Dynamic(dynamic) => dynamic.add_blocks(host, file_len, &mut list)?,
        }
        Ok(list.extents)
    }
}

impl Dynamic {
    /// Whole blocks, until the list is full.
    fn add_blocks(
        &mut self,
        host: &mut dyn Host,
        file_len: u64,
        list: &mut List,
    ) -> Result<(), Failure> {
        while list.wants_more() {
            let first = list.next / self.header.block_size;
            let blocks = self.blocks_ahead(host, file_len, list, self.write)?;
            if self.write {
                let places: Vec<u64> = blocks.iter().flatten().copied().collect();
                self.learn_bitmaps(host, &places)?;
            }
            let header = &self.header;
            for (index, block) in (first..).zip(blocks) {
                let inside = list.next - index * header.block_size;
                let kind = match block {
                    None => ExtentKind::Zero { at: None },
                    Some(at) => {
                        let data = at + header.bitmap_len() + inside;
                        // What is written in place changes no bitmap.
                        data_at(data, self.pending.is_full(at))
                    }
                };
                list.add((index + 1) * header.block_size, kind);
                if !list.wants_more() {
                    break;
                }
            }
        }
        Ok(())
    }

    /// Sectors by the blocks' bitmaps, for as many blocks as are looked at
    /// together.
    fn add_sectors(
        &mut self,
        host: &mut dyn Host,
        file_len: u64,
        list: &mut List,
    ) -> Result<(), Failure> {
        let header = self.header.clone();
        let blocks = self.blocks_ahead(host, file_len, list, true)?;
        let len = header.bitmap_len() as usize;
        let mut bitmaps = vec![0; len * blocks.iter().flatten().count()];
        let places = blocks.iter().flatten();
        let mut reads: Vec<Read<'_>> = bitmaps
            .chunks_mut(len)
            .zip(places)
            .map(|(buf, &offset)| Read {
                file: FileNo::IMAGE,
                offset,
                buf,
            })
            .collect();
        if !reads.is_empty() {
            host.read(&mut reads)?;
        }
        let mut bitmaps = bitmaps.chunks(len);
        for block in blocks {
            let start = list.next / header.block_size * header.block_size;
            match block.and_then(|at| Some((at, bitmaps.next()?))) {
                None => list.add(
                    start + header.block_size,
                    ExtentKind::Unallocated { at: None },
                ),
                Some((at, bitmap)) => {
                    let data = at + header.bitmap_len();
                    add_by_bits(list, bitmap, start, header.block_size, data)?;
                }
            }
        }
        Ok(())
    }

    /// Where the next blocks of a list start: as many as bitmaps are read for.
    fn blocks_ahead(
        &mut self,
        host: &mut dyn Host,
        file_len: u64,
        list: &List,
        with_bitmaps: bool,
    ) -> Result<Vec<Option<u64>>, Failure> {
        let header = &self.header;
        let most = match with_bitmaps {
            true => (MAX_BITMAP_BYTES / header.bitmap_len()).clamp(1, MAX_BITMAPS as u64),
            false => MAX_EXTENTS as u64,
        };
        let pending = &self.pending;
        let first = list.next / header.block_size;
        let end = list.end.div_ceil(header.block_size);
        let entries = self.table.from(host, first)?;
        let mut blocks = Vec::new();
        let mut present = 0;
        for (index, &entry) in (first..end).zip(entries) {
            if present == most || blocks.len() == MAX_EXTENTS {
                break;
            }
            let block = match (pending.block(index), entry) {
                (Some(at), _) => Some(at),
                (None, FREE) => None,
                (None, entry) => Some(block_at(header, file_len, index, entry)?),
            };
            present += u64::from(block.is_some());
            blocks.push(block);
        }
        Ok(blocks)
    }
}

/// The rest of a block whose data is at `data`, sector by sector.
fn add_by_bits(
    list: &mut List,
    bitmap: &[u8],
    start: u64,
    block_size: u64,
    data: u64,
) -> Result<(), Failure> {
    let end = list.end.min(start + block_size);
    while list.next < end && list.wants_more() {
        let first = (list.next - start) / SECTOR;
        let (count, here) = table::run(bitmap, first, (end - start).div_ceil(SECTOR))?;
        let kind = match here {
            true => data_at(data + list.next - start, false),
            false => ExtentKind::Unallocated { at: None },
        };
        list.add(start + (first + count) * SECTOR, kind);
    }
    Ok(())
}

fn data_at(at: u64, in_place: bool) -> ExtentKind {
    ExtentKind::Data {
        file: FileNo::IMAGE,
        at,
        in_place,
    }
}

/// Extents without gaps up to a guest offset.
struct List {
    extents: Vec<Extent>,
    next: u64,
    end: u64,
}

impl List {
    fn new(start: u64, end: u64) -> Self {
        Self {
            extents: Vec::new(),
            next: start,
            end,
        }
    }

    fn wants_more(&self) -> bool {
        self.next < self.end && self.extents.len() < MAX_EXTENTS
    }

    /// Adds what lies between the last extent and `to`, if there is room.
    fn add(&mut self, to: u64, kind: ExtentKind) {
        let to = to.min(self.end);
        if to <= self.next {
            return;
        }
        let len = to - self.next;
        let is_full = self.extents.len() >= MAX_EXTENTS;
        match self.extents.last_mut() {
            Some(last) if continues(last, kind) => last.len += len,
            _ if is_full => return,
            _ => self.extents.push(Extent {
                offset: self.next,
                len,
                kind,
            }),
        }
        self.next = to;
    }
}
