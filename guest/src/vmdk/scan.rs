//! All grain tables of an extent, from the first to the last, many at a time.

use super::format::entry;
use super::refuse;
use super::sparse::Sparse;
use crate::bytes::{le32, slice};
use crate::engine::{Host, Read};
use crate::error::{Failure, FailureKind};
use crate::plan::SECTOR;
use alloc::collections::BTreeSet;
use alloc::format;
use alloc::vec;
use alloc::vec::Vec;
use core::ops::ControlFlow;

/// Tables that are read at once, of each set.
const TABLES: u64 = 256;
/// Directory entries that are read at once, of each directory.
const ENTRIES: u64 = 4 << 10;
/// Most tables that are remembered where they are not in order.
const MAX_SEEN: usize = 64 << 10;

/// A walk over an extent's tables; the redundant ones beside the others where
/// that is asked for.
pub struct Scan<'a> {
    sparse: &'a Sparse,
    sets: Vec<Set>,
    /// Directory entries that are at hand.
    known: (u64, u64),
    next: u64,
}

/// A directory and its tables.
struct Set {
    /// Host offset of the directory.
    directory: u64,
    /// The directory entries at hand.
    entries: Vec<u8>,
    /// The tables at hand, one behind the other.
    tables: Vec<u8>,
}

/// The tables at hand.
pub struct Batch {
    /// The number of the first.
    pub first: u64,
    /// How many they are.
    pub count: u64,
}

impl<'a> Scan<'a> {
    /// A walk that has not begun. With `redundant` the extent has two sets.
    pub fn new(sparse: &'a Sparse, redundant: bool) -> Self {
        let header = &sparse.header;
        let second = header.redundant.filter(|_| redundant);
        let directories = [Some(header.directory), second];
        Self {
            sparse,
            sets: directories
                .into_iter()
                .flatten()
                .map(|sector| Set {
                    directory: sector * SECTOR,
                    entries: Vec::new(),
                    tables: Vec::new(),
                })
                .collect(),
            known: (0, 0),
            next: 0,
        }
    }

    /// Reads the next tables, if there are more.
    pub fn advance(&mut self, host: &mut dyn Host) -> Result<Option<Batch>, Failure> {
        let total = self.sparse.header.directory_entries();
        let first = self.next;
        if first >= total {
            return Ok(None);
        }
        if first >= self.known.1 {
            self.read_directories(host, first, ENTRIES.min(total - first))?;
        }
        let count = TABLES.min(self.known.1 - first);
        let len = self.sparse.header.table_len();
        let skip = ((first - self.known.0) * entry::LEN) as usize;
        let mut reads = Vec::new();
        for set in &mut self.sets {
            set.tables.clear();
            set.tables.resize((count * len) as usize, 0);
            let entries = slice(&set.entries, skip, (count * entry::LEN) as usize)?;
            read_tables(self.sparse, entries, &mut set.tables, &mut reads)?;
        }
        if !reads.is_empty() {
            host.read(&mut reads)?;
        }
        self.next += count;
        Ok(Some(Batch { first, count }))
    }

    fn read_directories(
        &mut self,
        host: &mut dyn Host,
        first: u64,
        count: u64,
    ) -> Result<(), Failure> {
        let file = self.sparse.file;
        let mut reads: Vec<Read<'_>> = Vec::new();
        for set in &mut self.sets {
            set.entries = vec![0; (count * entry::LEN) as usize];
            reads.push(Read {
                file,
                offset: set.directory + first * entry::LEN,
                buf: &mut set.entries,
            });
        }
        host.read(&mut reads)?;
        self.known = (first, first + count);
        Ok(())
    }

    /// The directory entry and the table with a number that is at hand, of set 0
    /// or, the redundant one, 1. Where the entry leads nowhere, all is zero.
    pub fn table(&self, batch: &Batch, set: usize, number: u64) -> Result<(u32, &[u8]), Failure> {
        let len = self.sparse.header.table_len();
        let set = self.sets.get(set);
        let (entries, tables) = set.map_or((&[][..], &[][..]), |set| {
            (set.entries.as_slice(), set.tables.as_slice())
        });
        let raw = le32(entries, ((number - self.known.0) * entry::LEN) as usize)?;
        let table = slice(
            tables,
            ((number - batch.first) * len) as usize,
            len as usize,
        )?;
        Ok((raw, table))
    }
}

/// The reads that fill a buffer with the tables of directory entries: one where
/// they follow each other.
fn read_tables<'b>(
    sparse: &Sparse,
    entries: &[u8],
    mut buf: &'b mut [u8],
    reads: &mut Vec<Read<'b>>,
) -> Result<(), Failure> {
    let len = sparse.header.table_len() as usize;
    let (entries, _) = entries.as_chunks::<4>();
    let numbers: Vec<u64> = entries
        .iter()
        .map(|raw| u64::from(u32::from_le_bytes(*raw)))
        .collect();
    let mut rest = numbers.as_slice();
    while let Some(&first) = rest.first() {
        let is_there = first != 0 && first * SECTOR + len as u64 <= sparse.file_len;
        let follows = |(nth, &sector): (usize, &u64)| {
            is_there
                && sector * SECTOR == first * SECTOR + (nth * len) as u64
                && sector * SECTOR + len as u64 <= sparse.file_len
        };
        let run = rest
            .iter()
            .enumerate()
            .take_while(|&it| follows(it))
            .count();
        let taken = run.max(1);
        let (tables, later) = buf.split_at_mut_checked(taken * len).unwrap_or_default();
        if run > 0 {
            reads.push(Read {
                file: sparse.file,
                offset: first * SECTOR,
                buf: tables,
            });
        }
        buf = later;
        rest = rest.get(taken..).unwrap_or_default();
    }
    Ok(())
}

/// A grain table that a directory entry leads to.
pub struct Table<'t> {
    /// Its number.
    pub number: u64,
    /// The sector where it lies.
    pub sector: u64,
    /// Its entries.
    pub bytes: &'t [u8],
}

/// Shows the tables of an extent to a change, in order, until it breaks off.
/// Fails where two directory entries lead to one table, and where a table of an
/// extent that no writer has closed differs from its redundant copy.
pub fn tables(
    host: &mut dyn Host,
    sparse: &Sparse,
    mut see: impl FnMut(Table<'_>) -> Result<ControlFlow<()>, Failure>,
) -> Result<(), Failure> {
    let header = &sparse.header;
    let mut order = Order::default();
    let mut scan = Scan::new(sparse, header.unclean);
    while let Some(batch) = scan.advance(host)? {
        for number in batch.first..batch.first + batch.count {
            let (raw, bytes) = scan.table(&batch, 0, number)?;
            if header.unclean && header.redundant.is_some() {
                check_equal(number, bytes, scan.table(&batch, 1, number)?.1)?;
            }
            let Some(sector) = sparse.table(number, raw)? else {
                continue;
            };
            order.check(number, sector)?;
            let table = Table {
                number,
                sector,
                bytes,
            };
            if see(table)?.is_break() {
                return Ok(());
            }
        }
    }
    Ok(())
}

/// The entries of a table, with the numbers of their grains in the extent.
pub fn grains(table: &[u8], number: u64) -> impl Iterator<Item = (u64, u32)> {
    let (entries, _) = table.as_chunks::<4>();
    let first = number * entries.len() as u64;
    (first..).zip(entries.iter().map(|raw| u32::from_le_bytes(*raw)))
}

/// A writer has not closed the extent: its two sets of tables have to agree.
fn check_equal(number: u64, table: &[u8], redundant: &[u8]) -> Result<(), Failure> {
    if table == redundant {
        return Ok(());
    }
    Err(Failure::new(
        FailureKind::Damaged,
        format!(
            "the image was not closed in order (uncleanShutdown), and grain table {number} differs \
             from its redundant copy; repair it with `instar check -r all` first"
        ),
    ))
}

/// Finds tables that two directory entries lead to.
#[derive(Default)]
struct Order {
    last: u64,
    seen: BTreeSet<u64>,
}

impl Order {
    /// Refuses a table's sector that came before.
    fn check(&mut self, number: u64, sector: u64) -> Result<(), Failure> {
        if sector > self.last && self.seen.is_empty() {
            self.last = sector;
            return Ok(());
        }
        if self.seen.len() >= MAX_SEEN {
            return Err(refuse::unsupported(
                "the grain tables are in no order, and too many",
            ));
        }
        if sector == self.last || !self.seen.insert(sector) {
            return Err(refuse::table(format!(
                "grain directory entry {number}: the grain table at sector {sector} is that of \
                 another entry, too"
            )));
        }
        Ok(())
    }
}
