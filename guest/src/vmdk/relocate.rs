//! New grain tables from old ones: which entry leads where, and what of the
//! tables is not zero.

use super::format::entry;
use super::fresh::{self, Layout};
use super::restage::{copy, punch};
use super::scan::Scan;
use super::slots::Moves;
use super::sparse::{Grain, Header, Sparse};
use crate::bytes;
use crate::error::Failure;
use crate::plan::{SECTOR, Step};
use crate::prepare::Prepare;
use crate::proto::FileNo;
use alloc::collections::BTreeMap;
use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;

/// Most sectors of tables, of each set, that closing gaps may change: they are
/// part of the plan.
pub const MAX_CHANGED: usize = 1 << 10;
/// Bytes of tables that are looked at for zeroes together.
const BLOCK: usize = 4096;
/// Most ranges of tables that are not zero before they are taken as one.
const MAX_RUNS: usize = 4 << 10;
/// Tables that are made at once.
const AT_ONCE: u64 = 128;

/// Where grains go.
pub struct Placing<'a> {
    /// How many grains of the old disk stay.
    pub keep: u64,
    /// Grains that were in the way: number and old sector, in order.
    pub moved: &'a [(u64, u64)],
    /// Where they went.
    pub moved_to: u64,
    /// Numbers of the grains that are preallocated, where they have no place.
    pub preallocated: Range<u64>,
    /// Where those go.
    pub fresh: u64,
    /// What closes gaps after the first flip.
    pub moves: &'a Moves,
}

/// The tables of a set. Places are bytes from the first table on.
#[derive(Debug, Default)]
pub struct Tables {
    /// What is not zero.
    pub runs: Vec<Range<u64>>,
    /// Sectors that are to differ between the two copies, as they are at last.
    changed: BTreeMap<u64, Vec<u8>>,
}

impl Placing<'_> {
    /// Lays down directories and tables behind the data. `None` where closing
    /// gaps changes too much.
    pub fn lay_down(
        &self,
        prepare: &mut Prepare<'_>,
        sparse: &Sparse,
        header: &Header,
        staged: &Layout,
    ) -> Result<Option<Tables>, Failure> {
        let sets: Vec<u64> = [staged.redundant, Some(staged.directory)]
            .into_iter()
            .flatten()
            .collect();
        for &directory in &sets {
            let len = header.directory_entries() * entry::LEN;
            let first = directory + staged.directory_sectors;
            prepare.fresh_bytes(directory * SECTOR, len, |_, distance, piece| {
                fresh::fill_directory(header, first, distance, piece);
                Ok(())
            })?;
        }
        let bases: Vec<u64> = sets
            .iter()
            .map(|directory| (directory + staged.directory_sectors) * SECTOR)
            .collect();
        let mut found = Tables::default();
        let mut cursor = Cursor {
            placing: self,
            moved: 0,
            preallocated: 0,
        };
        let mut scan = Scan::new(sparse, false);
        let len = header.table_len();
        let mut number = 0;
        while number < header.directory_entries() {
            let batch = scan.advance(prepare.host())?;
            let until = match &batch {
                Some(batch) => (batch.first + batch.count).min(header.directory_entries()),
                None => (number + AT_ONCE).min(header.directory_entries()),
            };
            let mut piece = vec![0; ((until - number) * len) as usize];
            for (at, table) in (number..until).zip(piece.chunks_exact_mut(len as usize)) {
                let old = match &batch {
                    Some(batch) => scan.table(batch, 0, at)?.1,
                    None => &[],
                };
                cursor.table(sparse, at, old, table, &mut found)?;
            }
            if found.changed.len() > MAX_CHANGED {
                return Ok(None);
            }
            found.lay_down(prepare, &bases, number * len, &piece)?;
            number = until;
        }
        Ok(Some(found))
    }
}

/// How far the making of tables has got.
struct Cursor<'a> {
    placing: &'a Placing<'a>,
    /// Grains that were in the way so far.
    moved: usize,
    /// Grains that were preallocated so far.
    preallocated: u64,
}

impl Cursor<'_> {
    /// Fills a table, as it is after the first flip.
    fn table(
        &mut self,
        sparse: &Sparse,
        number: u64,
        old: &[u8],
        table: &mut [u8],
        found: &mut Tables,
    ) -> Result<(), Failure> {
        let placing = self.placing;
        let count = (table.len() as u64) / entry::LEN;
        let first = number * count;
        let is_empty = old.iter().all(|&byte| byte == 0);
        let preallocated = &placing.preallocated;
        if is_empty && (first + count <= preallocated.start || first >= preallocated.end) {
            return Ok(());
        }
        let mut differs = Vec::new();
        for grain in first..first + count {
            let at = (grain - first) as usize * entry::LEN as usize;
            let raw = match grain < placing.keep && !is_empty {
                true => bytes::le32(old, at)?,
                false => entry::NONE,
            };
            let staged = self.place(sparse, grain, raw)?;
            bytes::put_le32(table, at, staged)?;
            let last = placing.moves.target(u64::from(staged));
            if staged > entry::ZEROED && last != u64::from(staged) {
                differs.push((at, last as u32));
            }
        }
        let base = number * table.len() as u64;
        for (at, raw) in differs {
            let start = at - at % SECTOR as usize;
            let now = bytes::slice(table, start, SECTOR as usize)?;
            let sector = found
                .changed
                .entry(base + start as u64)
                .or_insert_with(|| now.to_vec());
            bytes::put_le32(sector, at - start, raw)?;
        }
        Ok(())
    }

    /// Where a grain is after the first flip.
    fn place(&mut self, sparse: &Sparse, grain: u64, raw: u32) -> Result<u32, Failure> {
        let placing = self.placing;
        let length = sparse.header.grain;
        if let Grain::At(_) = sparse.grain(grain, raw)? {
            let is_moved = placing.moved.get(self.moved);
            if is_moved.is_some_and(|&(number, _)| number == grain) {
                let at = placing.moved_to + self.moved as u64 * length;
                self.moved += 1;
                return Ok(at as u32);
            }
            return Ok(raw);
        }
        if placing.preallocated.contains(&grain) {
            let at = placing.fresh + self.preallocated * length;
            self.preallocated += 1;
            return Ok(at as u32);
        }
        Ok(raw)
    }
}

impl Tables {
    /// Adds a piece of the tables to every set, behind the data.
    fn lay_down(
        &mut self,
        prepare: &mut Prepare<'_>,
        bases: &[u64],
        at: u64,
        piece: &[u8],
    ) -> Result<(), Failure> {
        let mut runs: Vec<Range<usize>> = Vec::new();
        let blocks = piece.chunks(BLOCK).enumerate();
        for (nth, block) in blocks.filter(|(_, block)| block.iter().any(|&byte| byte != 0)) {
            let start = nth * BLOCK;
            match runs.last_mut() {
                Some(last) if last.end == start => last.end += block.len(),
                _ => runs.push(start..start + block.len()),
            }
        }
        for run in runs {
            let data = piece.get(run.clone()).unwrap_or_default();
            for base in bases {
                prepare.fresh(Step::Write {
                    file: FileNo::IMAGE,
                    offset: base + at + run.start as u64,
                    data: data.to_vec(),
                })?;
            }
            self.add(at + run.start as u64..at + run.end as u64);
        }
        Ok(())
    }

    fn add(&mut self, run: Range<u64>) {
        let full = self.runs.len() >= MAX_RUNS;
        match self.runs.last_mut() {
            Some(last) if last.end == run.start || full => last.end = run.end,
            _ => self.runs.push(run),
        }
    }

    /// The steps that bring `len` bytes of tables from one place to another, with
    /// the changes that close gaps.
    pub fn put(&self, steps: &mut Vec<Step>, from: u64, to: u64, len: u64) {
        let mut at = 0;
        for run in &self.runs {
            punch(steps, to + at..to + run.start);
            let mut start = run.start;
            for (&changed, sector) in self.changed.range(run.clone()) {
                if start < changed {
                    steps.push(copy(from + start, to + start, changed - start));
                }
                steps.push(Step::Write {
                    file: FileNo::IMAGE,
                    offset: to + changed,
                    data: sector.clone(),
                });
                start = changed + SECTOR;
            }
            if start < run.end {
                steps.push(copy(from + start, to + start, run.end - start));
            }
            at = run.end;
        }
        punch(steps, to + at..to + len);
    }
}
