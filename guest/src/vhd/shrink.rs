//! Shrinking a dynamic image, and what remains to be done after it.
//!
//! First the two footers get the smaller size: from then on nobody sees what is
//! behind the new end. Then its blocks are let go of, in the table and in the
//! header. Blocks at the end of the file move into the holes: all copies are
//! durable before an entry refers to one. At last the footer moves down and the
//! file is cut.

use super::fixed::{Stages, zeroes};
use super::footer::Footer;
use super::grow::{copy_block, entry_bytes, write};
use super::header::{Header, table_end};
use super::room::Room;
use super::settle::write_footer;
use super::survey::{Survey, metadata_end};
use super::table::{entry_at, free_entries};
use super::{Layout, Vhd, commit};
use crate::disk::Disk;
use crate::engine::{Host, Read};
use crate::error::{Failure, FailureKind};
use crate::plan::{Purpose, SECTOR, Step};
use crate::proto::FileNo;
use crate::resize::Wish;
use alloc::format;
use alloc::vec;
use alloc::vec::Vec;

/// Most blocks that one plan moves.
pub(super) const MAX_MOVES: usize = 16 << 10;
/// Most blocks that are looked at for moves: all that a table of 4 MiB has.
const MAX_BLOCKS: usize = 1 << 20;

/// Bytes that are looked at together.
const PIECE: u64 = 256 << 10;

/// A block that is in use: sector, index.
type Block = (u32, u32);

/// How an image gets tidy.
struct Tidy<'a> {
    header: &'a Header,
    survey: &'a Survey,
    /// The footer of the disk.
    footer: &'a Footer,
    /// Entries that the table keeps.
    entries: u64,
    /// Blocks that move: index, from, to.
    moves: Vec<(u64, u64, u64)>,
    /// Length of the file in bytes.
    file_len: u64,
    /// Where the last footer goes.
    end: u64,
}

impl Vhd {
    /// The stages of a shrink.
    pub(super) fn shrink_dynamic(
        &mut self,
        host: &mut dyn Host,
        wish: &Wish,
    ) -> Result<Stages, Failure> {
        let footer = self.footer.resized(wish.size)?;
        let mut stages = vec![commit(&footer, self.file_len - SECTOR)];
        stages.extend(self.tidy(host, &footer, true, MAX_MOVES)?);
        Ok(stages)
    }

    /// The stages that let go of everything that does not belong to the disk of
    /// that footer. `zero_tail` says that there is old data behind its end in the
    /// last block, otherwise that is looked at. At most so many blocks move.
    pub(super) fn tidy(
        &self,
        host: &mut dyn Host,
        footer: &Footer,
        zero_tail: bool,
        most: usize,
    ) -> Result<Stages, Failure> {
        let Layout::Dynamic(dynamic) = &self.layout else {
            return Err(self.refuse("has no blocks"));
        };
        let header = &dynamic.header;
        let size = footer.reach();
        let mut blocks: Vec<Block> = Vec::new();
        let survey = self.survey_with(host, size, 0, |index, sector| {
            if blocks.len() <= MAX_BLOCKS {
                blocks.push((sector, index as u32));
            }
        })?;
        blocks.sort_unstable();
        check_overlaps(header, &blocks)?;
        if blocks.len() > MAX_BLOCKS {
            blocks.clear();
        }
        let tidy = Tidy::new(self, header, &survey, footer, (&blocks, most));
        let tail = match survey.cut {
            Some(block) if !tidy.moves_block(block) => Some(tail_at(header, block, size)),
            _ => None,
        };
        let tail = match tail {
            Some((at, len)) if zero_tail || !reads_zero(host, at, len)? => zeroes(at, at + len),
            _ => None,
        };
        tidy.stages(tail)
    }
}

/// Entries of blocks behind the end of the disk.
fn clear_stale(header: &Header, survey: &Survey) -> Vec<Step> {
    let stale = &survey.stale;
    match stale.is_empty() {
        true => Vec::new(),
        false => vec![write(
            entry_at(header, stale.start),
            free_entries(stale.end - stale.start),
        )],
    }
}

/// Place and length of what lies behind the end of the disk in the block that the
/// end cuts.
pub(super) fn tail_at(header: &Header, block: u64, size: u64) -> (u64, u64) {
    let kept = size % header.block_size;
    let data = block + header.bitmap_len();
    (data + kept, header.block_size - kept)
}

/// Whether a range of the file is zero.
pub(super) fn reads_zero(host: &mut dyn Host, at: u64, len: u64) -> Result<bool, Failure> {
    let mut done = 0;
    while done < len {
        let mut piece = vec![0; (len - done).min(PIECE) as usize];
        host.read(&mut [Read {
            file: FileNo::IMAGE,
            offset: at + done,
            buf: &mut piece,
        }])?;
        if piece.iter().any(|&byte| byte != 0) {
            return Ok(false);
        }
        done += piece.len() as u64;
    }
    Ok(true)
}

impl<'a> Tidy<'a> {
    /// Moves the highest blocks to the lowest holes, as long as that brings
    /// them down. The blocks are sorted.
    fn new(
        vhd: &Vhd,
        header: &'a Header,
        survey: &'a Survey,
        footer: &'a Footer,
        (blocks, most): (&[Block], usize),
    ) -> Self {
        let entries = header.entries_for(footer.reach()).min(header.entries);
        let stride = header.stride();
        let mut holes = Holes::new(header, entries, survey, blocks);
        let mut moves = Vec::new();
        for &(sector, index) in blocks.iter().rev().take(most.min(MAX_MOVES)) {
            let from = u64::from(sector) * SECTOR;
            match holes.next_below(from) {
                Some(to) => moves.push((u64::from(index), from, to)),
                None => break,
            }
        }
        let mut end = survey.blocks_end;
        if let Some(&(_, _, highest)) = moves.last() {
            // The last hole that was filled is the highest.
            let kept = blocks.len() - moves.len();
            let last = blocks.get(..kept).and_then(|kept| kept.last());
            let last = last.map_or(0, |&(sector, _)| u64::from(sector) * SECTOR);
            end = highest.max(last) + stride;
        }
        let start = end.max(metadata_end(header, entries));
        let end = Room::new(header, survey, start).footer();
        Self {
            header,
            survey,
            footer,
            entries,
            moves,
            file_len: vhd.file_len,
            end: end.min(vhd.file_len - SECTOR),
        }
    }

    fn moves_block(&self, at: u64) -> bool {
        self.moves.iter().any(|&(_, from, _)| from == at)
    }

    /// The stages, of which the first may zero the tail of a block.
    fn stages(&self, tail: Option<Step>) -> Result<Stages, Failure> {
        let mut first: Vec<Step> = tail.into_iter().collect();
        first.extend(clear_stale(self.header, self.survey));
        first.extend(self.shorten_table()?);
        let mut copies = self.copies();
        let mut footer: Vec<Step> = self.lower_footer().into_iter().collect();
        let lost = table_end(self.header.table, self.entries)..self.header.table_end();
        let waits = |at: u64, len: u64| at < lost.end && lost.start < at + len;
        let stride = self.header.stride();
        // What was of the table is used only once the header says that it is not.
        if !self.moves.iter().any(|&(_, _, to)| waits(to, stride)) {
            first.append(&mut copies);
        }
        // The footer may lie where a block was until its entry leads elsewhere.
        let moved = self.moves.iter();
        let in_block = moved
            .map(|&(_, from, _)| from..from + stride)
            .any(|block| block.contains(&self.end));
        if !in_block && !waits(self.end, SECTOR) {
            first.append(&mut footer);
        }
        let cut = (self.end + SECTOR < self.file_len).then_some(Step::SetLength {
            file: FileNo::IMAGE,
            len: self.end + SECTOR,
        });
        let stages = [
            first,
            copies,
            self.relink(),
            footer,
            cut.into_iter().collect(),
        ];
        Ok(stages.map(|steps| (Purpose::Release, steps)).into())
    }

    /// The header's sector with as many entries as the disk needs, if it has
    /// more.
    fn shorten_table(&self) -> Result<Option<Step>, Failure> {
        if self.entries == self.header.entries {
            return Ok(None);
        }
        let sector = self.header.first_sector(self.header.table, self.entries)?;
        Ok(Some(write(self.header.at, sector)))
    }

    /// Blocks where they go, without what lies behind the end of the disk.
    fn copies(&self) -> Vec<Step> {
        let size = self.footer.reach();
        let moves = self.moves.iter();
        moves
            .flat_map(|&(index, from, to)| {
                copy_block(self.header, index, size, self.file_len, from, to)
            })
            .collect()
    }

    /// Entries of copied blocks.
    fn relink(&self) -> Vec<Step> {
        let moves = self.moves.iter();
        moves
            .map(|&(index, _, to)| write(entry_at(self.header, index), entry_bytes([to].iter())))
            .collect()
    }

    /// The footer at its new place, where that is another.
    fn lower_footer(&self) -> Option<Step> {
        (self.end + SECTOR < self.file_len).then(|| write_footer(self.footer, self.end))
    }
}

/// Holes between blocks that are large enough for one, from the lowest.
struct Holes<'a> {
    blocks: core::slice::Iter<'a, Block>,
    next: u64,
    end: Option<u64>,
    header: &'a Header,
    /// Where the table ends, with the entries that it keeps.
    table_end: u64,
    aligned: bool,
}

impl<'a> Holes<'a> {
    fn new(header: &'a Header, entries: u64, survey: &Survey, blocks: &'a [Block]) -> Self {
        let mut blocks = blocks.iter();
        let end = blocks.next().map(|&(sector, _)| u64::from(sector) * SECTOR);
        Self {
            blocks,
            next: SECTOR,
            end,
            header,
            table_end: table_end(header.table, entries),
            aligned: survey.aligned,
        }
    }

    /// The next place for a block that ends at or before `limit`.
    fn next_below(&mut self, limit: u64) -> Option<u64> {
        loop {
            let at = self.place();
            let end = at + self.header.stride();
            let next_block = self.end?;
            if end > limit {
                return None;
            }
            if end <= next_block {
                self.next = end;
                return Some(at);
            }
            self.next = next_block + self.header.stride();
            self.end = self
                .blocks
                .next()
                .map(|&(sector, _)| u64::from(sector) * SECTOR);
        }
    }

    /// The next place that overlaps no metadata.
    fn place(&self) -> u64 {
        let header = self.header;
        let mut obstacles = [(header.at, header.end()), (header.table, self.table_end)];
        obstacles.sort_unstable();
        let mut at = self.align(self.next);
        for (start, end) in obstacles {
            if at < end && start < at + header.stride() {
                at = self.align(end);
            }
        }
        at
    }

    fn align(&self, at: u64) -> u64 {
        let head = self.header.bitmap_len();
        match self.aligned {
            true => (at + head).next_multiple_of(super::survey::PAGE) - head,
            false => at,
        }
    }
}

/// Refuses blocks that overlap each other: to let go of one would damage
/// another.
fn check_overlaps(header: &Header, blocks: &[Block]) -> Result<(), Failure> {
    let sectors = header.stride() / SECTOR;
    let overlaps = blocks.windows(2).find_map(|pair| match *pair {
        [(low, one), (high, other)] if u64::from(high) < u64::from(low) + sectors => {
            Some((one, other))
        }
        _ => None,
    });
    match overlaps {
        None => Ok(()),
        Some((one, other)) => Err(Failure::new(
            FailureKind::Damaged,
            format!(
                "blocks {one} and {other} overlap in the file; save what `qemu-img convert -f \
                 vpc` reads"
            ),
        )),
    }
}
