//! What a new sparse extent consists of, and other new things: a line for it, an
//! identifier.

use super::descriptor::ExtentType;
use super::format::{entry, flag, fresh, limit};
use super::sparse::Header;
use crate::bytes;
use crate::chance::Chance;
use crate::error::{Failure, FailureKind};
use crate::plan::{SECTOR, Step};
use crate::proto::FileNo;
use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;

/// A CID: any number but the two that stand for "none".
pub fn content_id(chance: &mut Chance) -> u32 {
    let number = (chance.number() >> 32) as u32;
    number & 0x7fff_ffff
}

/// The line of a new extent, without its end.
pub fn extent_line(kind: ExtentType, name: &str, sectors: u64) -> String {
    let offset = match kind {
        ExtentType::Flat => " 0",
        _ => "",
    };
    format!("RW {sectors} {} \"{name}\"{offset}", kind.word())
}

/// A new, empty sparse extent: header, room for a descriptor, the redundant
/// directory and its tables, the directory and its tables.
pub struct Fresh {
    /// Its header.
    pub header: Header,
}

impl Fresh {
    /// An extent of so many sectors.
    pub fn new(sectors: u64, zeroed_grain: bool) -> Result<Self, Failure> {
        let header = Header {
            version: if zeroed_grain { 2 } else { 1 },
            flags: flag::NEWLINES
                | flag::REDUNDANT
                | if zeroed_grain { flag::ZEROED_GRAINS } else { 0 },
            capacity: sectors,
            grain: fresh::GRAIN,
            descriptor: fresh::DESCRIPTOR,
            descriptor_size: fresh::DESCRIPTOR_SECTORS,
            table_entries: limit::TABLE_ENTRIES,
            redundant: None,
            directory: 0,
            overhead: 0,
            unclean: false,
            compressed: false,
        };
        Self::lay_out(header)
    }

    /// An extent of so many sectors, with the grains of another.
    pub fn like(sectors: u64, model: &Header) -> Result<Self, Failure> {
        let zeroed_grain = model.flags & flag::ZEROED_GRAINS != 0;
        let mut header = Self::new(sectors, zeroed_grain)?.header;
        header.version = header.version.max(model.version);
        header.grain = model.grain;
        Self::lay_out(header)
    }

    /// Directories and tables behind the room for a descriptor.
    fn lay_out(mut header: Header) -> Result<Self, Failure> {
        let front = header.descriptor + header.descriptor_size;
        Layout::new(&header, front, true)?.put(&mut header);
        Ok(Self { header })
    }

    /// The directories: the sector of each, and the sector of its first table.
    pub fn directories(&self) -> [(u64, u64); 2] {
        let header = &self.header;
        let sectors = directory_sectors(header);
        let redundant = header.redundant.unwrap_or(0);
        [redundant, header.directory].map(|at| (at, at + sectors))
    }

    /// The steps that write a small extent into an empty file.
    pub fn steps(&self, file: FileNo) -> Result<Vec<Step>, Failure> {
        let mut steps = self.structures(file)?;
        steps.push(Step::SetLength {
            file,
            len: self.header.overhead * SECTOR,
        });
        Ok(steps)
    }

    /// The steps that write header and directories.
    pub fn structures(&self, file: FileNo) -> Result<Vec<Step>, Failure> {
        let mut steps = vec![Step::Write {
            file,
            offset: 0,
            data: self.header.to_sector()?,
        }];
        for (at, first) in self.directories() {
            let mut data = vec![0; (self.header.directory_entries() * entry::LEN) as usize];
            fill_directory(&self.header, first, 0, &mut data);
            steps.push(Step::Write {
                file,
                offset: at * SECTOR,
                data,
            });
        }
        Ok(steps)
    }
}

/// Where directories and tables lie, one behind the other. Sectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// The redundant grain directory, where there is one.
    pub redundant: Option<u64>,
    /// The grain directory.
    pub directory: u64,
    /// Sectors of a directory.
    pub directory_sectors: u64,
    /// End of the last table.
    pub end: u64,
    /// The first sector behind it at which a grain may lie.
    pub overhead: u64,
}

impl Layout {
    /// Directories and tables for a header's capacity, from `front` on.
    pub fn new(header: &Header, front: u64, redundant: bool) -> Result<Self, Failure> {
        let directory_sectors = directory_sectors(header);
        let tables = header.directory_entries() * header.table_sectors();
        let set = directory_sectors + tables;
        let directory = match redundant {
            true => front + set,
            false => front,
        };
        let end = directory + set;
        let overhead = end.next_multiple_of(header.grain);
        if overhead >= limit::MAX_SECTORS || header.directory_entries() > limit::MAX_DIRECTORY {
            return Err(Failure::new(
                FailureKind::TooLarge,
                format!(
                    "the image size is too large for the format: the grain tables of {} sectors \
                     do not fit",
                    header.capacity
                ),
            ));
        }
        Ok(Self {
            redundant: redundant.then_some(front),
            directory,
            directory_sectors,
            end,
            overhead,
        })
    }

    /// Puts the places into a header.
    pub fn put(&self, header: &mut Header) {
        header.redundant = self.redundant;
        header.directory = self.directory;
        header.overhead = self.overhead;
    }
}

fn directory_sectors(header: &Header) -> u64 {
    (header.directory_entries() * entry::LEN).div_ceil(SECTOR)
}

/// Fills a piece of a grain directory, `distance` bytes behind its start, whose
/// tables follow each other from sector `first` on.
pub fn fill_directory(header: &Header, first: u64, distance: u64, piece: &mut [u8]) {
    let stride = header.table_sectors();
    let index = distance / entry::LEN;
    let entries = piece.chunks_exact_mut(entry::LEN as usize);
    for (index, entry) in (index..).zip(entries) {
        // Layouts end below 2^32 sectors.
        let sector = (first + index * stride) as u32;
        // An exact chunk has room for one.
        let _ = bytes::put_le32(entry, 0, sector);
    }
}
