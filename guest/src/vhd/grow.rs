//! Growing a dynamic image.
//!
//! The table gets as many entries as the new size needs. What is behind it and
//! in the way goes to the end of the file first: blocks one by one, or the
//! table itself where something else is there, or too much. A footer is
//! appended behind all of it before anything overwrites the old one, so that
//! the file never ends without one. Entries for the added range are behind the
//! end of the disk, invisible, until the two footers get the new size.

use super::fixed::{Stages, blank, zeroes};
use super::format::table::{ENTRY_LEN, FREE};
use super::header::{Header, table_end};
use super::room::Room;
use super::settle::write_footer;
use super::survey::{MAX_MOVES, Survey};
use super::table::{entry_at, free_entries};
use super::{Layout, Vhd, commit, create};
use crate::disk::Disk;
use crate::engine::Host;
use crate::error::{Failure, FailureKind};
use crate::plan::{Plan, Purpose, SECTOR, Stage, Step};
use crate::proto::{FileNo, Preallocation};
use crate::resize::Wish;
use alloc::format;
use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;

/// Most bytes of table entries in one plan.
const MAX_TABLE: u64 = 4 << 20;
/// Most bytes of bitmaps in one part of a plan.
const MAX_BITMAPS: u64 = 2 << 20;

/// Everything that is known about a grow. Offsets are bytes, ranges of blocks
/// are indices.
struct Grow<'a> {
    vhd: &'a Vhd,
    header: &'a Header,
    wish: &'a Wish,
    survey: &'a Survey,
    /// Entries that the table gets.
    entries: u64,
    /// Where the table goes.
    table: u64,
    /// Blocks that move: index, from, to.
    moves: Vec<(u64, u64, u64)>,
    /// Blocks that are added.
    added: Range<u64>,
    /// Where they go.
    places: Vec<u64>,
    /// Where the last footer goes.
    footer: u64,
}

impl Vhd {
    /// The stages of a grow.
    pub(super) fn grow_dynamic(
        &mut self,
        host: &mut dyn Host,
        wish: &Wish,
    ) -> Result<Stages, Failure> {
        let Layout::Dynamic(dynamic) = &self.layout else {
            return Err(self.refuse("has no blocks"));
        };
        let header = &dynamic.header;
        let entries = header.entries_for(wish.size).max(header.entries);
        if (entries - header.entries) * ENTRY_LEN > MAX_TABLE {
            return Err(grow_in_steps(header));
        }
        let survey = self.survey(host, table_end(header.table, entries))?;
        let grow = Grow::place(self, header, wish, &survey, entries)?;
        if grow.moves_table() && (entries - grow.kept()) * ENTRY_LEN > MAX_TABLE {
            return Err(grow_in_steps(header));
        }
        let streamed = grow.stream(host)?;
        grow.stages(streamed)
    }
}

impl<'a> Grow<'a> {
    fn place(
        vhd: &'a Vhd,
        header: &'a Header,
        wish: &'a Wish,
        survey: &'a Survey,
        entries: u64,
    ) -> Result<Self, Failure> {
        let end = table_end(header.table, entries);
        let in_the_way = header.at < end && header.table_end() < header.end();
        let moves_table = in_the_way || survey.overlapping.len() > MAX_MOVES;
        let start = survey.used_end.max(if moves_table { 0 } else { end });
        let mut room = Room::new(header, survey, start);
        let (table, moving): (u64, &[_]) = match moves_table {
            true => (room.bytes(entries * ENTRY_LEN), &[]),
            false => (header.table, &survey.overlapping),
        };
        let moves = moving
            .iter()
            .map(|&(index, from)| (index, from, room.block()));
        let moves = moves.collect();
        let added = added_blocks(vhd, header, survey, wish);
        let places: Vec<u64> = added.clone().map(|_| room.block()).collect();
        let footer = room.footer().max(vhd.file_len - SECTOR);
        if footer / SECTOR >= u64::from(FREE) {
            return Err(create::too_large());
        }
        Ok(Self {
            vhd,
            header,
            wish,
            survey,
            entries,
            table,
            moves,
            added,
            places,
            footer,
        })
    }

    fn moves_table(&self) -> bool {
        self.table != self.header.table
    }

    fn stages(&self, streamed: bool) -> Result<Stages, Failure> {
        let footer = self.vhd.footer.resized(self.wish.size)?;
        let mut first = self.clear_stale();
        first.extend(self.zero_tail());
        if !streamed {
            first.extend(self.lengthen());
        }
        let relink = self.moves.iter().map(|&(index, _, to)| {
            let at = entry_at(self.header, index);
            write(at, entry_bytes([to].iter()))
        });
        let (mut lay_down, mut link) = (self.lay_down(streamed), self.link());
        // Entries behind the end are invisible: they wait for a block to go out
        // of their way, or the footer, and not for the blocks that they name.
        let shows_block = self.added.start < self.old_count() && !self.added.is_empty();
        if self.moves.is_empty() && !shows_block {
            lay_down.append(&mut link);
        }
        // Nothing is written behind the footer, or over it, before there is
        // another at the new end.
        if !self.lengthens() {
            first.append(&mut lay_down);
        }
        Ok(vec![
            (Purpose::Prepare, first),
            (Purpose::Prepare, lay_down),
            (Purpose::Link, relink.collect()),
            (Purpose::Link, link),
            (Purpose::Link, self.switch_table()?),
            commit(&footer, self.footer),
        ])
    }

    /// Whether the file gets longer.
    fn lengthens(&self) -> bool {
        self.footer >= self.vhd.file_len
    }

    /// Entries that the disk of the old size needs.
    fn old_count(&self) -> u64 {
        self.header.entries_for(self.vhd.footer.reach())
    }

    /// Space for what is added, and a footer behind it.
    fn lengthen(&self) -> Vec<Step> {
        let old = self.vhd.file_len;
        let mut steps = Vec::new();
        if !self.lengthens() {
            return steps;
        }
        if matches!(
            self.wish.preallocation,
            Preallocation::Falloc | Preallocation::Full
        ) {
            steps.push(Step::Reserve {
                file: FileNo::IMAGE,
                offset: old,
                len: self.footer + SECTOR - old,
            });
        }
        steps.push(write_footer(&self.vhd.footer, self.footer));
        steps
    }

    /// Entries that an interrupted shrink has left behind the end of the disk,
    /// but for those of added blocks.
    fn clear_stale(&self) -> Vec<Step> {
        let Range { start, end } = self.survey.stale;
        let start = match self.added.is_empty() {
            true => start,
            false => start.max(self.added.end),
        };
        match start >= end || self.moves_table() {
            true => Vec::new(),
            false => vec![write(
                entry_at(self.header, start),
                free_entries(end - start),
            )],
        }
    }

    /// The rest of the block that the old end cuts, where it stays.
    fn zero_tail(&self) -> Option<Step> {
        let block = self.survey.cut?;
        if self.moves.iter().any(|&(_, from, _)| from == block) {
            return None;
        }
        let data = block + self.header.bitmap_len();
        let kept = self.vhd.footer.reach() % self.header.block_size;
        zeroes(data + kept, data + self.header.block_size)
    }

    /// What nothing refers to yet: copies, bitmaps, a table.
    fn lay_down(&self, streamed: bool) -> Vec<Step> {
        let (stride, old_len) = (self.header.stride(), self.vhd.file_len);
        let size = self.vhd.footer.reach();
        let mut steps: Vec<Step> = self
            .moves
            .iter()
            .flat_map(|&(index, from, to)| copy_block(self.header, index, size, old_len, from, to))
            .collect();
        steps.extend(self.lay_down_table());
        for &at in &self.places {
            let data = at + self.header.bitmap_len();
            // What lies inside the old file is not zero by itself.
            steps.extend(blank(self.wish, data, (at + stride).min(old_len)));
            if !streamed {
                steps.extend(self.fill(data.max(old_len), at + stride));
            }
            if at < old_len || !streamed {
                steps.push(self.bitmap(at));
            }
        }
        steps
    }

    fn bitmap(&self, at: u64) -> Step {
        write(at, vec![0xff; self.header.bitmap_len() as usize])
    }

    /// The table at its new place: what it has of the disk, then the rest.
    fn lay_down_table(&self) -> Vec<Step> {
        if !self.moves_table() {
            return Vec::new();
        }
        let kept = self.kept();
        let mut steps = Vec::new();
        if kept > 0 {
            steps.push(copy(self.header.table, self.table, kept * ENTRY_LEN));
        }
        let at = self.table + kept * ENTRY_LEN;
        steps.push(write(at, self.entries_from(kept)));
        steps
    }

    /// Entries of the disk that a table which moves takes along.
    fn kept(&self) -> u64 {
        let kept = self.old_count().min(self.added.start);
        kept.min(self.header.entries)
    }

    /// The bytes of all entries from `first` on, to the end of the table's last
    /// sector: those of added blocks, and free ones.
    fn entries_from(&self, first: u64) -> Vec<u8> {
        let end = (self.entries * ENTRY_LEN).next_multiple_of(SECTOR) / ENTRY_LEN;
        let before = free_entries(self.added.start.saturating_sub(first));
        let skipped = first.saturating_sub(self.added.start) as usize;
        let mut entries = before;
        entries.extend(entry_bytes(self.places.iter().skip(skipped)));
        entries.resize(((end - first) * ENTRY_LEN) as usize, 0xff);
        entries
    }

    /// The entries of a table that stays: those that it did not have, and those
    /// of added blocks.
    fn link(&self) -> Vec<Step> {
        if self.moves_table() {
            return Vec::new();
        }
        let mut steps = Vec::new();
        let known = self.header.entries;
        if self.added.start < known && !self.added.is_empty() {
            let count = known.min(self.added.end) - self.added.start;
            let places = self.places.iter().take(count as usize);
            let at = entry_at(self.header, self.added.start);
            steps.push(write(at, entry_bytes(places)));
        }
        if self.entries > known {
            let at = entry_at(self.header, known);
            steps.push(write(at, self.entries_from(known)));
        }
        steps
    }

    /// The header's first sector, if it changes.
    fn switch_table(&self) -> Result<Vec<Step>, Failure> {
        if self.entries == self.header.entries && !self.moves_table() {
            return Ok(Vec::new());
        }
        let sector = self.header.first_sector(self.table, self.entries)?;
        Ok(vec![write(self.header.at, sector)])
    }

    /// Zeroes behind the old end of the file, written if that is wanted.
    fn fill(&self, start: u64, end: u64) -> Option<Step> {
        let wanted = self.wish.preallocation == Preallocation::Full;
        (wanted && start < end).then(|| Step::Fill {
            file: FileNo::IMAGE,
            offset: start,
            len: end - start,
        })
    }

    /// Hands bitmaps over that are too many for one message, footer and disk
    /// space first; whether it did.
    fn stream(&self, host: &mut dyn Host) -> Result<bool, Failure> {
        let bitmap_len = self.header.bitmap_len();
        if self.places.len() as u64 * bitmap_len <= MAX_BITMAPS {
            return Ok(false);
        }
        stream(host, self.lengthen())?;
        let first = self.places.first().copied().unwrap_or(self.footer);
        let fill = self.fill(first.max(self.vhd.file_len), self.footer);
        stream(host, fill.into_iter().collect())?;
        let fresh = self.places.iter().filter(|&&at| at >= self.vhd.file_len);
        let fresh: Vec<u64> = fresh.copied().collect();
        for part in fresh.chunks((MAX_BITMAPS / bitmap_len).max(1) as usize) {
            stream(host, part.iter().map(|&at| self.bitmap(at)).collect())?;
        }
        Ok(true)
    }
}

/// The blocks of the added range that get a place at once.
fn added_blocks(vhd: &Vhd, header: &Header, survey: &Survey, wish: &Wish) -> Range<u64> {
    let old = header.entries_for(vhd.footer.reach());
    let end = header.entries_for(wish.size);
    let is_cut = !vhd.footer.reach().is_multiple_of(header.block_size);
    let start = match is_cut && survey.cut.is_none() {
        true => old.saturating_sub(1),
        false => old,
    };
    match wish.preallocation {
        Preallocation::Off => old..old,
        Preallocation::Metadata | Preallocation::Falloc | Preallocation::Full => start..end,
    }
}

fn stream(host: &mut dyn Host, steps: Vec<Step>) -> Result<(), Failure> {
    if steps.is_empty() {
        return Ok(());
    }
    host.stream(Plan {
        stages: vec![Stage {
            purpose: Purpose::Prepare,
            steps,
        }],
    })
}

/// Entries for blocks at these places.
pub(super) fn entry_bytes<'a>(places: impl Iterator<Item = &'a u64>) -> Vec<u8> {
    places
        .flat_map(|at| ((at / SECTOR) as u32).to_be_bytes())
        .collect()
}

pub(super) fn write(offset: u64, data: Vec<u8>) -> Step {
    Step::Write {
        file: FileNo::IMAGE,
        offset,
        data,
    }
}

/// The copy of a block of a disk of `size` bytes, without what lies behind the
/// disk's end: that is zero where the block goes. The file is `file_len` bytes
/// long, and behind that zero by itself.
pub(super) fn copy_block(
    header: &Header,
    index: u64,
    size: u64,
    file_len: u64,
    from: u64,
    to: u64,
) -> impl Iterator<Item = Step> {
    let kept = size.saturating_sub(index * header.block_size);
    let len = header.bitmap_len() + kept.min(header.block_size);
    let rest = zeroes(to + len, (to + header.stride()).min(file_len));
    [Some(copy(from, to, len)), rest].into_iter().flatten()
}

fn copy(from: u64, to: u64, len: u64) -> Step {
    Step::Copy {
        file: FileNo::IMAGE,
        from,
        to,
        len,
    }
}

fn grow_in_steps(header: &Header) -> Failure {
    let step = MAX_TABLE / ENTRY_LEN * header.block_size;
    Failure::new(
        FailureKind::TooLarge,
        format!(
            "with blocks of {} bytes the table would become too long at once; grow in steps of at \
             most {step} bytes",
            header.block_size
        ),
    )
}
