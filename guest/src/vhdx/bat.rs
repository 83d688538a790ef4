//! The block allocation table: its entries, and pieces of it in memory.

use super::format::bat as on_disk;
use super::source::Source;
use crate::bytes::{self, le64};
use crate::engine::{Host, Read};
use crate::error::Failure;
use crate::proto::FileNo;
use alloc::collections::{BTreeMap, BTreeSet};
use alloc::vec;
use alloc::vec::Vec;

/// Entries of a piece.
pub const PIECE: u64 = 8 << 10;
/// The most pieces in memory.
const MAX_PIECES: usize = 64;

/// Where a block is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Nowhere: for a differencing image the parent has it, else zeroes.
    Absent,
    /// Nowhere, reads as zeroes. May keep space in the file.
    Zero {
        /// Host offset of that space, if any.
        kept: Option<u64>,
    },
    /// All of it at this host offset.
    Full(u64),
    /// At this host offset, where the bitmap says so; else the parent has it.
    Partial(u64),
}

/// What is wrong with an entry as such.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flaw {
    /// The state is none.
    State(u64),
    /// Bits are set that must not be.
    Reserved,
    /// A state that only differencing images have.
    NoParent,
}

impl core::fmt::Display for Flaw {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::State(state) => write!(f, "the state {state} is not known"),
            Self::Reserved => f.write_str("reserved bits are set"),
            Self::NoParent => f.write_str("partially present, but the image has no parent"),
        }
    }
}

impl Place {
    /// Decodes the entry of a block.
    pub fn decode(raw: u64, has_parent: bool) -> Result<Self, Flaw> {
        if raw & on_disk::RESERVED != 0 {
            return Err(Flaw::Reserved);
        }
        let offset = raw & on_disk::OFFSET;
        let kept = (offset != 0).then_some(offset);
        match raw & on_disk::STATE {
            on_disk::NOT_PRESENT => Ok(Self::Absent),
            on_disk::UNDEFINED | on_disk::ZERO | on_disk::UNMAPPED | on_disk::UNMAPPED_DRAFT => {
                Ok(Self::Zero { kept })
            }
            on_disk::FULLY_PRESENT => Ok(Self::Full(offset)),
            on_disk::PARTIALLY_PRESENT if has_parent => Ok(Self::Partial(offset)),
            on_disk::PARTIALLY_PRESENT => Err(Flaw::NoParent),
            state => Err(Flaw::State(state)),
        }
    }
}

/// Pieces of the table in memory.
#[derive(Clone, Debug)]
pub struct Bat {
    /// Host offset of the table.
    pub offset: u64,
    /// Number of entries that the disk needs.
    pub entries: u64,
    pieces: BTreeMap<u64, Vec<u8>>,
    /// Entries that wait for a flush.
    changed: BTreeMap<u64, u64>,
}

impl Bat {
    /// A table of which nothing is in memory.
    pub fn new(offset: u64, entries: u64) -> Self {
        Self {
            offset,
            entries,
            pieces: BTreeMap::new(),
            changed: BTreeMap::new(),
        }
    }

    /// Brings entries into memory, all missing ones with one read, at most as
    /// many as there is room for; what is past the end of the table is left.
    pub fn load(
        &mut self,
        host: &mut dyn Host,
        source: &Source,
        indexes: impl Iterator<Item = u64>,
    ) -> Result<(), Failure> {
        let wanted: BTreeSet<u64> = indexes
            .filter(|&index| index < self.entries)
            .map(|index| index / PIECE)
            .collect();
        let missing: Vec<u64> = wanted
            .iter()
            .copied()
            .take(MAX_PIECES)
            .filter(|number| !self.pieces.contains_key(number))
            .collect();
        if missing.is_empty() {
            return Ok(());
        }
        if self.pieces.len() + missing.len() > MAX_PIECES {
            self.pieces.retain(|number, _| wanted.contains(number));
        }
        let mut loaded: Vec<(u64, Vec<u8>)> = missing
            .into_iter()
            .map(|number| {
                let entries = (self.entries - number * PIECE).min(PIECE);
                (number, vec![0; (entries * on_disk::LEN) as usize])
            })
            .collect();
        let mut reads: Vec<Read<'_>> = loaded
            .iter_mut()
            .map(|(number, buf)| Read {
                file: FileNo::IMAGE,
                offset: self.offset + *number * PIECE * on_disk::LEN,
                buf,
            })
            .collect();
        source.read(host, &mut reads)?;
        self.pieces.extend(loaded);
        Ok(())
    }

    /// The entry at an index as it stands, waiting changes included.
    pub fn get(
        &mut self,
        host: &mut dyn Host,
        source: &Source,
        index: u64,
    ) -> Result<u64, Failure> {
        if let Some(&raw) = self.changed.get(&index) {
            return Ok(raw);
        }
        if index >= self.entries {
            return Ok(0);
        }
        if !self.pieces.contains_key(&(index / PIECE)) {
            self.load(host, source, core::iter::once(index))?;
        }
        let piece = self.pieces.get(&(index / PIECE));
        let at = (index % PIECE * on_disk::LEN) as usize;
        Ok(le64(piece.map_or(&[], Vec::as_slice), at)?)
    }

    /// Changes an entry until the next flush. Answers the change that it takes
    /// the place of, if any.
    pub fn set(&mut self, index: u64, raw: u64) -> Option<u64> {
        self.changed.insert(index, raw)
    }

    /// Takes a change back.
    pub fn reset(&mut self, index: u64, earlier: Option<u64>) {
        match earlier {
            Some(raw) => self.changed.insert(index, raw),
            None => self.changed.remove(&index),
        };
    }

    /// The changes that wait, which from now on count as made.
    pub fn take_changes(&mut self) -> Result<BTreeMap<u64, u64>, Failure> {
        let changed = core::mem::take(&mut self.changed);
        for (&index, &raw) in &changed {
            if let Some(piece) = self.pieces.get_mut(&(index / PIECE)) {
                bytes::put_le64(piece, (index % PIECE * on_disk::LEN) as usize, raw)?;
            }
        }
        Ok(changed)
    }

    /// How many changes wait.
    pub fn changes(&self) -> usize {
        self.changed.len()
    }

    /// Host offset of an entry.
    pub fn entry_at(&self, index: u64) -> u64 {
        self.offset + index * on_disk::LEN
    }
}

/// Entries that are read at once where all of a table is looked at.
const BATCH: u64 = 128 << 10;

/// Looks at all entries of a range of the table in order, in large pieces.
/// `each` gets an index and what stands there.
pub fn scan(
    host: &mut dyn Host,
    source: &Source,
    offset: u64,
    range: core::ops::Range<u64>,
    mut each: impl FnMut(&mut dyn Host, u64, u64) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let mut from = range.start;
    let mut buf = Vec::new();
    while from < range.end {
        let count = (range.end - from).min(BATCH);
        buf.clear();
        buf.resize((count * on_disk::LEN) as usize, 0);
        source.read(
            host,
            &mut [Read {
                file: FileNo::IMAGE,
                offset: offset + from * on_disk::LEN,
                buf: &mut buf,
            }],
        )?;
        let (entries, _) = buf.as_chunks::<{ on_disk::LEN as usize }>();
        for (index, entry) in (from..).zip(entries) {
            each(host, index, u64::from_le_bytes(*entry))?;
        }
        from += count;
    }
    Ok(())
}
