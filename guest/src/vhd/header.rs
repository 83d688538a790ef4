//! The dynamic header, checked.

use super::footer::checksum;
use super::format::header as field;
use super::format::table;
use super::refuse::{damaged, unsupported};
use crate::bytes;
use crate::error::Failure;
use crate::plan::SECTOR;
use alloc::format;
use alloc::vec::Vec;

/// A checked dynamic header. What is not looked at is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    raw: Vec<u8>,
    /// Where the header is, in bytes.
    pub at: u64,
    /// Where the block allocation table is, in bytes: a sector.
    pub table: u64,
    /// How many entries it has.
    pub entries: u64,
    /// Size of a block, in bytes: a power of two, a sector at least.
    pub block_size: u64,
}

impl Header {
    /// Checks the bytes of a header that is at `at`, in a file of so many bytes.
    pub fn read(raw: Vec<u8>, at: u64, file_len: u64) -> Result<Self, Failure> {
        if !raw.starts_with(field::COOKIE_VALUE) {
            return Err(damaged(format!(
                "the dynamic header at {at:#x} does not start with `cxsparse`"
            )));
        }
        let found = bytes::be32(&raw, field::CHECKSUM)?;
        let sum = checksum(&raw, field::CHECKSUM)?;
        if found != sum {
            return Err(damaged(format!(
                "the dynamic header at {at:#x} has the checksum {found:#010x}, its bytes give \
                 {sum:#010x}"
            )));
        }
        let version = bytes::be32(&raw, field::VERSION)?;
        if version != field::VERSION_VALUE {
            return Err(unsupported(format!(
                "the dynamic header is of version {}.{}, only 1.0 is known",
                version >> 16,
                version & 0xffff
            )));
        }
        let header = Self {
            at,
            table: bytes::be64(&raw, field::TABLE_OFFSET)?,
            entries: u64::from(bytes::be32(&raw, field::MAX_ENTRIES)?),
            block_size: u64::from(bytes::be32(&raw, field::BLOCK_SIZE)?),
            raw,
        };
        header.check_blocks()?;
        header.check_table(file_len)?;
        Ok(header)
    }

    fn check_blocks(&self) -> Result<(), Failure> {
        match self.block_size.is_power_of_two() && self.block_size >= SECTOR {
            true => Ok(()),
            false => Err(damaged(format!(
                "the dynamic header says that a block has {} bytes, which is not a power of two \
                 of at least {SECTOR}",
                self.block_size
            ))),
        }
    }

    fn check_table(&self, file_len: u64) -> Result<(), Failure> {
        let (at, len) = (self.table, self.entries * table::ENTRY_LEN);
        let overlaps = |start: u64, len: u64| at < start + len && start < self.table_end();
        let end = at.checked_add(len);
        let why = if !at.is_multiple_of(SECTOR) {
            "is not at a sector"
        } else if end.is_none_or(|end| end > file_len) {
            "lies past the end of the file"
        } else if overlaps(0, SECTOR) {
            "overlaps the footer copy"
        } else if overlaps(self.at, field::LEN as u64) {
            "overlaps the dynamic header"
        } else {
            return Ok(());
        };
        Err(damaged(format!(
            "the block allocation table ({len} bytes at {at:#x}) {why}"
        )))
    }

    /// Entries that a disk of so many bytes needs.
    pub fn entries_for(&self, size: u64) -> u64 {
        size.div_ceil(self.block_size)
    }

    /// Bytes of a block's bitmap: a bit for each sector, in whole sectors.
    pub fn bitmap_len(&self) -> u64 {
        (self.block_size / SECTOR)
            .div_ceil(8)
            .next_multiple_of(SECTOR)
    }

    /// Bytes of a block in the file: its bitmap, then its data.
    pub fn stride(&self) -> u64 {
        self.bitmap_len() + self.block_size
    }

    /// Where the table ends, in whole sectors.
    pub fn table_end(&self) -> u64 {
        table_end(self.table, self.entries)
    }

    /// Where the header ends.
    pub fn end(&self) -> u64 {
        self.at.saturating_add(field::LEN as u64)
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.raw
    }

    /// The first sector of the same header with the table elsewhere, or of
    /// another length: all that changes lies in it.
    pub fn first_sector(&self, table: u64, entries: u64) -> Result<Vec<u8>, Failure> {
        let mut raw = self.raw.clone();
        bytes::put_be64(&mut raw, field::TABLE_OFFSET, table)?;
        bytes::put_be32(&mut raw, field::MAX_ENTRIES, entries as u32)?;
        let sum = checksum(&raw, field::CHECKSUM)?;
        bytes::put_be32(&mut raw, field::CHECKSUM, sum)?;
        raw.truncate(SECTOR as usize);
        Ok(raw)
    }

    /// A new image's header: the table follows it.
    pub fn new(entries: u64) -> Result<Self, Failure> {
        let mut raw = alloc::vec![0; field::LEN];
        let at = SECTOR;
        let table = at + field::LEN as u64;
        bytes::put(&mut raw, field::COOKIE, field::COOKIE_VALUE)?;
        bytes::put_be64(&mut raw, field::DATA_OFFSET, super::format::NO_OFFSET)?;
        bytes::put_be32(&mut raw, field::VERSION, field::VERSION_VALUE)?;
        bytes::put_be32(&mut raw, field::BLOCK_SIZE, field::DEFAULT_BLOCK_SIZE)?;
        bytes::put_be64(&mut raw, field::TABLE_OFFSET, table)?;
        bytes::put_be32(&mut raw, field::MAX_ENTRIES, entries as u32)?;
        let sum = checksum(&raw, field::CHECKSUM)?;
        bytes::put_be32(&mut raw, field::CHECKSUM, sum)?;
        Ok(Self {
            raw,
            at,
            table,
            entries,
            block_size: u64::from(field::DEFAULT_BLOCK_SIZE),
        })
    }
}

/// Where a table of so many entries ends, in whole sectors.
pub fn table_end(table: u64, entries: u64) -> u64 {
    table
        .saturating_add(entries * table::ENTRY_LEN)
        .checked_next_multiple_of(SECTOR)
        .unwrap_or(u64::MAX)
}
