//! Shrinking a dynamic image, and what remains to be done after it.
//!
//! First the two footers get the smaller size, the authoritative one before its
//! copy: from then on nobody sees what is behind the new end. Then its blocks
//! are let go of, in the table, then in the header. Blocks at the end of the
//! file move into the holes: all copies are durable before an entry refers to
//! one. At last the footer moves down and the file is cut.

use super::fixed::{Stages, zeroes};
use super::footer::Footer;
use super::grow::{copy, entry_bytes, write};
use super::header::Header;
use super::room::Room;
use super::settle::write_footer;
use super::survey::{Survey, metadata_end};
use super::table::{entry_at, free_entries};
use super::{Layout, Vhd};
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

/// What a tidy image looks like.
#[derive(Debug)]
struct Tidy {
    /// Blocks that move: index, from, to.
    moves: Vec<(u64, u64, u64)>,
    /// Where the last footer goes.
    footer: u64,
}

impl Vhd {
    /// The stages of a shrink.
    pub(super) fn shrink_dynamic(
        &mut self,
        host: &mut dyn Host,
        wish: &Wish,
    ) -> Result<Stages, Failure> {
        let footer = self.footer.resized(wish.size)?;
        let end = self.file_len - SECTOR;
        let mut stages = vec![
            (Purpose::Commit, vec![write_footer(&footer, end)]),
            (Purpose::Commit, vec![write_footer(&footer, 0)]),
        ];
        stages.extend(self.tidy(host, &footer, true, MAX_MOVES)?);
        Ok(stages)
    }

    /// The stages that let go of everything that does not belong to the disk of
    /// that footer. `zero_tail` says that
    /// there is old data behind its end in the last block, otherwise that is
    /// looked at. At most so many blocks move.
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
        let mut tail = Vec::new();
        if let Some(block) = survey.cut {
            let (at, len) = tail_at(header, block, size);
            if zero_tail || !reads_zero(host, at, len)? {
                tail.extend(zeroes(at, at + len));
            }
        }
        let entries = header.entries_for(size).min(header.entries);
        let tidy = Tidy::new(self.file_len, header, entries, &survey, (&blocks, most));
        tail.extend(clear_stale(header, &survey));
        // The block with the tail may move: it is zeroed before it is copied.
        // Nothing refers to what copies overwrite, or lies behind a shorter table.
        let mut stages = vec![
            (Purpose::Release, tail),
            (Purpose::Release, tidy.lay_down(header, entries)?),
            (Purpose::Release, tidy.relink(header)),
        ];
        stages.extend(cut(footer, self.file_len, tidy.footer));
        Ok(stages)
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

/// The last footer moves down, then the file is cut behind it.
fn cut(footer: &Footer, file_len: u64, at: u64) -> Stages {
    let len = at + SECTOR;
    match len < file_len {
        false => Vec::new(),
        true => vec![
            (Purpose::Release, vec![write_footer(footer, at)]),
            (
                Purpose::Release,
                vec![Step::SetLength {
                    file: FileNo::IMAGE,
                    len,
                }],
            ),
        ],
    }
}

impl Tidy {
    /// The header gets as many entries as the disk needs, blocks are copied.
    fn lay_down(&self, header: &Header, entries: u64) -> Result<Vec<Step>, Failure> {
        let mut steps = Vec::new();
        if entries < header.entries {
            let sector = header.first_sector(header.table, entries)?;
            steps.push(write(header.at, sector));
        }
        let copies = self.moves.iter();
        steps.extend(copies.map(|&(_, from, to)| copy(from, to, header.stride())));
        Ok(steps)
    }

    /// Entries of copied blocks.
    fn relink(&self, header: &Header) -> Vec<Step> {
        let moves = self.moves.iter();
        moves
            .map(|&(index, _, to)| write(entry_at(header, index), entry_bytes([to].iter())))
            .collect()
    }

    /// Moves the highest blocks to the lowest holes, as long as that brings
    /// them down. The blocks are sorted.
    fn new(
        file_len: u64,
        header: &Header,
        entries: u64,
        survey: &Survey,
        (blocks, most): (&[Block], usize),
    ) -> Self {
        let stride = header.stride();
        let mut holes = Holes::new(header, survey, blocks);
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
        let footer = Room::new(header, survey, start).footer();
        Self {
            moves,
            footer: footer.min(file_len - SECTOR),
        }
    }
}

/// Holes between blocks that are large enough for one, from the lowest.
struct Holes<'a> {
    blocks: core::slice::Iter<'a, Block>,
    next: u64,
    end: Option<u64>,
    header: &'a Header,
    aligned: bool,
}

impl<'a> Holes<'a> {
    fn new(header: &'a Header, survey: &Survey, blocks: &'a [Block]) -> Self {
        let mut blocks = blocks.iter();
        let end = blocks.next().map(|&(sector, _)| u64::from(sector) * SECTOR);
        Self {
            blocks,
            next: SECTOR,
            end,
            header,
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
        let mut obstacles = [
            (header.at, header.end()),
            (header.table, header.table_end()),
        ];
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
