//! The block allocation table, read in pieces.

use super::format::table::{ENTRY_LEN, FREE};
use super::header::Header;
use super::refuse;
use crate::bytes;
use crate::engine::{Host, Read};
use crate::error::Failure;
use crate::plan::SECTOR;
use crate::proto::FileNo;
use alloc::collections::BTreeMap;
use alloc::format;
use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;

/// Entries of a cached piece.
const PIECE: u64 = 16 << 10;
/// Most pieces that are cached: 2 MiB.
const MAX_PIECES: usize = 32;
/// Entries that a walk reads at once.
const STEP: u64 = 64 << 10;

/// Pieces of the table by number.
#[derive(Debug)]
pub struct Table {
    at: u64,
    entries: u64,
    pieces: BTreeMap<u64, Vec<u32>>,
}

impl Table {
    /// Nothing read yet.
    pub fn new(header: &Header) -> Self {
        Self {
            at: header.table,
            entries: header.entries,
            pieces: BTreeMap::new(),
        }
    }

    /// The entries from `first` on that lie in one cached piece: at least one,
    /// where there is one.
    pub fn from(&mut self, host: &mut dyn Host, first: u64) -> Result<&[u32], Failure> {
        let number = first / PIECE;
        if !self.pieces.contains_key(&number) {
            if self.pieces.len() >= MAX_PIECES {
                self.pieces.clear();
            }
            let start = number * PIECE;
            let end = self.entries.min(start + PIECE);
            let piece = read(host, self.at, start..end)?;
            self.pieces.insert(number, piece);
        }
        let piece = self.pieces.get(&number);
        let rest = piece.and_then(|piece| piece.get((first % PIECE) as usize..));
        Ok(rest.unwrap_or(&[]))
    }

    /// One entry.
    pub fn entry(&mut self, host: &mut dyn Host, index: u64) -> Result<u32, Failure> {
        let entries = self.from(host, index)?;
        Ok(entries.first().copied().unwrap_or(FREE))
    }

    /// Changes an entry in the cache.
    pub fn set(&mut self, index: u64, entry: u32) {
        let piece = self.pieces.get_mut(&(index / PIECE));
        if let Some(known) = piece.and_then(|piece| piece.get_mut((index % PIECE) as usize)) {
            *known = entry;
        }
    }
}

/// Calls `visit` with every entry of a range and its index, in order.
pub fn walk(
    host: &mut dyn Host,
    header: &Header,
    range: Range<u64>,
    mut visit: impl FnMut(&mut dyn Host, u64, u32) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let mut next = range.start;
    while next < range.end {
        let end = range.end.min(next + STEP);
        for (index, entry) in (next..end).zip(read(host, header.table, next..end)?) {
            visit(host, index, entry)?;
        }
        next = end;
    }
    Ok(())
}

fn read(host: &mut dyn Host, table: u64, range: Range<u64>) -> Result<Vec<u32>, Failure> {
    let mut raw = vec![0; ((range.end.saturating_sub(range.start)) * ENTRY_LEN) as usize];
    host.read(&mut [Read {
        file: FileNo::IMAGE,
        offset: table + range.start * ENTRY_LEN,
        buf: &mut raw,
    }])?;
    let (words, _) = raw.as_chunks::<4>();
    Ok(words.iter().map(|&word| u32::from_be_bytes(word)).collect())
}

/// Where the block of an entry that is not free starts, in bytes: its bitmap.
/// It lies behind the metadata and inside the file.
pub fn block_at(header: &Header, file_len: u64, index: u64, entry: u32) -> Result<u64, Failure> {
    let at = u64::from(entry) * SECTOR;
    match misplaced(header, file_len, at) {
        None => Ok(at),
        Some(why) => Err(refuse::table(format!(
            "block {index} at {at:#x} (guest offset {:#x}) {why}",
            index.saturating_mul(header.block_size)
        ))),
    }
}

/// Why no block can start at an offset, if so.
pub fn misplaced(header: &Header, file_len: u64, at: u64) -> Option<&'static str> {
    let end = at.saturating_add(header.stride());
    let overlaps = |range: Range<u64>| at < range.end && range.start < end;
    if end > file_len {
        Some("reaches past the end of the file")
    } else if overlaps(0..SECTOR) {
        Some("overlaps the footer copy")
    } else if overlaps(header.at..header.end()) {
        Some("overlaps the dynamic header")
    } else if header.entries > 0 && overlaps(header.table..header.table_end()) {
        Some("overlaps the block allocation table")
    } else {
        None
    }
}

/// The bytes of so many free entries.
pub fn free_entries(count: u64) -> Vec<u8> {
    vec![0xff; (count * ENTRY_LEN) as usize]
}

/// The write of an entry.
pub fn entry_at(header: &Header, index: u64) -> u64 {
    header.table + index * ENTRY_LEN
}

/// The bits of a bitmap from sector `first` on: how many sectors up to `end`
/// have the same bit, and which.
pub fn run(bitmap: &[u8], first: u64, end: u64) -> Result<(u64, bool), Failure> {
    let bit = |sector: u64| -> Result<bool, Failure> {
        let byte = bytes::byte(bitmap, (sector / 8) as usize)?;
        Ok(byte & (0x80 >> (sector % 8)) != 0)
    };
    let set = bit(first)?;
    let mut next = first + 1;
    while next < end && bit(next)? == set {
        next += 1;
    }
    Ok((next - first, set))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_counted_from_the_highest() {
        let bitmap = [0b1100_0000, 0xff];
        assert_eq!(run(&bitmap, 0, 16), Ok((2, true)));
        assert_eq!(run(&bitmap, 2, 16), Ok((6, false)));
        assert_eq!(run(&bitmap, 8, 10), Ok((2, true)));
        assert!(run(&bitmap, 16, 17).is_err());
    }
}
