//! Growing: the order in which a larger disk comes about.
//!
//! First come space and new identifiers in both headers, then the entries of the
//! new blocks behind the old end of the BAT, where no reader of the old size
//! looks. A BAT that does not fit into its region gets a new one, to which both
//! region tables then lead: with the old size it says what the old one said.
//! Last the virtual size changes, which commits.

use super::Vhdx;
use super::bat::Place;
use super::format::{MIB, bat as on_disk};
use super::region::{Owner, Region};
use super::update::{Flips, HeaderWriter, fresh_guid, stage, write};
use crate::engine::Host;
use crate::error::Failure;
use crate::plan::{Plan, Purpose, Stage, Step};
use crate::prepare::Prepare;
use crate::proto::{FileNo, Preallocation};
use crate::resize::Wish;
use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;

/// Bytes of new entries from which on they are streamed, which can be done past
/// the end of the file only.
const STREAM_AT: u64 = 1 << 20;
/// The longest range of a fixed image that is zeroed rather than punched.
const MAX_ZEROED: u64 = 32 << 20;

/// What a grow adds, and where.
#[derive(Debug)]
struct Growth {
    /// Indexes of the entries to add.
    indexes: Range<u64>,
    /// The first block to add.
    first_block: u64,
    /// Where the first block goes, where blocks are allocated.
    data: Option<u64>,
    /// The new region of the BAT: where it has to move.
    bat: Option<Region>,
    /// First byte of the space that is taken.
    start: u64,
    /// First byte behind that space.
    end: u64,
}

impl Vhdx {
    /// The plan that makes the disk larger.
    pub(super) fn plan_grow(&mut self, host: &mut dyn Host, wish: &Wish) -> Result<Plan, Failure> {
        let growth = self.growth(host, wish)?;
        let (tail, tail_end) = self.clear_tail(host, self.metadata.size)?;
        let old_len = self.source.file_len;
        let file_len = old_len.max(growth.end).max(tail_end);
        let mut headers = HeaderWriter::new(&self.headers, &mut self.chance);
        let data_write = fresh_guid(&mut self.chance);

        let mut prepare = Prepare::new(host);
        if growth.data.is_some() && file_len > old_len {
            allocate(
                wish.preallocation,
                growth.start.max(old_len),
                file_len,
                &mut prepare,
            )?;
        }
        if file_len > old_len {
            prepare.fresh(Step::SetLength {
                file: FileNo::IMAGE,
                len: file_len,
            })?;
        }
        let past_end = growth.start >= old_len;
        if growth.bat.is_some() && past_end {
            self.stream_bat(&growth, &mut prepare)?;
        }
        for header in headers.announce(Some(data_write))? {
            prepare.inside(header);
        }
        let first = Stage {
            purpose: Purpose::Prepare,
            steps: prepare.finish(),
        };

        let mut steps = Vec::from_iter(tail);
        steps.extend(self.clear_space(&growth, wish.preallocation));
        let mut flips = Flips::default();
        let mut release = None;
        if let Some(region) = growth.bat {
            self.bat_flips(region.offset, region.len, &mut flips)?;
            release = self.give_back_bat()?;
        }
        let lies_inside = growth.bat.is_none() || !past_end;
        if lies_inside {
            steps.extend(self.lay_down_bat(&growth));
        }
        flips.add(self.metadata.size_at, wish.size.to_le_bytes().to_vec());
        let mut rest = self.flip_stages(host, &mut headers, flips, file_len)?;
        // A log entry waits for nothing, a BAT that has moved for its new place.
        let joins = |stage: &&mut Stage| match stage.purpose {
            Purpose::Prepare => true,
            Purpose::Link => !lies_inside,
            _ => false,
        };
        if let Some(next) = rest.first_mut().filter(joins) {
            next.steps.append(&mut steps);
        }
        let second = Stage {
            purpose: Purpose::Prepare,
            steps,
        };
        let mut stages = vec![first];
        stages.extend(Some(second).filter(|second| !second.steps.is_empty()));
        stages.append(&mut rest);
        stages.extend(release.map(|step| stage(Purpose::Release, step)));
        Ok(Plan { stages })
    }

    /// The step that makes space inside the file read as zeroes, as far as no
    /// table is written there.
    fn clear_space(&self, growth: &Growth, preallocation: Preallocation) -> Option<Step> {
        let start = match growth.bat {
            Some(region) => region.offset + growth.indexes.end * on_disk::LEN,
            None => growth.start,
        };
        let end = growth.end.min(self.source.file_len);
        let len = end.checked_sub(start).filter(|&len| len > 0)?;
        Some(match preallocation {
            Preallocation::Off | Preallocation::Metadata => self.clear(start, len),
            Preallocation::Falloc => zero(start, len),
            Preallocation::Full => fill(start, len),
        })
    }

    /// The step that gives the space of a BAT that has moved back, where there is
    /// enough of it for a barrier.
    fn give_back_bat(&self) -> Result<Option<Step>, Failure> {
        let old = self.table.get(Owner::Bat)?;
        Ok((old.len > MIB).then_some(Step::Punch {
            file: FileNo::IMAGE,
            offset: old.offset,
            len: old.len,
        }))
    }

    /// What is added and where it goes.
    fn growth(&self, host: &mut dyn Host, wish: &Wish) -> Result<Growth, Failure> {
        let (geometry, old) = (self.metadata.geometry, self.metadata.size);
        let mut growth = Growth {
            indexes: geometry.entries(old)..geometry.entries(wish.size),
            first_block: geometry.blocks(old),
            data: None,
            bat: None,
            start: 0,
            end: 0,
        };
        let added = geometry.blocks(wish.size) - growth.first_block;
        let allocates = self.metadata.fixed || wish.preallocation != Preallocation::Off;
        let new_bytes = (growth.indexes.end - growth.indexes.start) * on_disk::LEN;
        let needed = geometry.bat_len(wish.size);
        let moves = needed > self.table.get(Owner::Bat)?.len || new_bytes > STREAM_AT;
        if !moves && (!allocates || added == 0) {
            return Ok(growth);
        }
        let mut at = self.used_end(host)?.next_multiple_of(MIB);
        if new_bytes > STREAM_AT {
            at = at.max(self.source.file_len.next_multiple_of(MIB));
        }
        growth.start = at;
        if moves {
            let len = needed.next_multiple_of(MIB);
            growth.bat = Some(Region {
                owner: Owner::Bat,
                offset: at,
                len,
            });
            at += len;
        }
        if allocates {
            growth.data = Some(at);
            at += added * geometry.block_size;
        }
        growth.end = at;
        Ok(growth)
    }

    /// Host offset behind everything that is in use.
    pub(super) fn used_end(&self, host: &mut dyn Host) -> Result<u64, Failure> {
        let regions = self.table.regions.iter().map(|region| region.end());
        let mut end = regions.max().unwrap_or(MIB);
        self.each_used(host, self.bat.entries, |used| {
            end = end.max(used.at.saturating_add(used.len));
            Ok(())
        })?;
        Ok(end)
    }

    /// The step that clears what the last block of a disk of that size holds
    /// behind the end, and where that block ends in the file: with a larger size
    /// a guest would see it.
    pub(super) fn clear_tail(
        &mut self,
        host: &mut dyn Host,
        size: u64,
    ) -> Result<(Option<Step>, u64), Failure> {
        let geometry = self.metadata.geometry;
        let inside = size % geometry.block_size;
        if inside == 0 {
            return Ok((None, 0));
        }
        let Place::Full(at) = self.place(host, size / geometry.block_size)? else {
            return Ok((None, 0));
        };
        let end = at + geometry.block_size;
        let len = self.source.file_len.min(end).saturating_sub(at + inside);
        let step = (len > 0).then(|| self.clear(at + inside, len));
        Ok((step, end))
    }

    /// The step that makes a range inside the file read as zeroes. What a fixed
    /// image has allocated stays so, unless that is a lot.
    pub(super) fn clear(&self, offset: u64, len: u64) -> Step {
        match self.metadata.fixed && len <= MAX_ZEROED {
            true => zero(offset, len),
            false => Step::Punch {
                file: FileNo::IMAGE,
                offset,
                len,
            },
        }
    }

    /// The entry at an index, for a block that is added.
    fn new_entry(&self, growth: &Growth, index: u64) -> u64 {
        let geometry = self.metadata.geometry;
        match (geometry.block_at(index), growth.data) {
            (None, _) => on_disk::NOT_PRESENT,
            (Some(_), None) => on_disk::ZERO,
            (Some(block), Some(data)) => {
                let nth = block - growth.first_block;
                (data + nth * geometry.block_size) | on_disk::FULLY_PRESENT
            }
        }
    }

    /// Entries that are added, from an index on.
    fn fill(&self, growth: &Growth, from: u64, buf: &mut [u8]) {
        let (entries, _) = buf.as_chunks_mut::<{ on_disk::LEN as usize }>();
        for (index, entry) in (from..).zip(entries) {
            *entry = self.new_entry(growth, index).to_le_bytes();
        }
    }

    /// The copy of the present entries to the new region, if there are any.
    fn copy_bat(&self, growth: &Growth) -> Option<Step> {
        let len = growth.indexes.start * on_disk::LEN;
        let region = growth.bat.filter(|_| len > 0)?;
        Some(Step::Copy {
            file: FileNo::IMAGE,
            from: self.bat.offset,
            to: region.offset,
            len,
        })
    }

    /// A new BAT past the end of the file, in pieces.
    fn stream_bat(&self, growth: &Growth, prepare: &mut Prepare<'_>) -> Result<(), Failure> {
        let Some(region) = growth.bat else {
            return Ok(());
        };
        if let Some(copy) = self.copy_bat(growth) {
            prepare.fresh(copy)?;
        }
        let Range { start, end } = growth.indexes;
        let at = region.offset + start * on_disk::LEN;
        prepare.fresh_bytes(at, (end - start) * on_disk::LEN, |_, done, piece| {
            self.fill(growth, start + done / on_disk::LEN, piece);
            Ok(())
        })
    }

    /// The new entries inside the file: in the present region, or in a new one
    /// together with the old ones.
    fn lay_down_bat(&self, growth: &Growth) -> Vec<Step> {
        let Range { start, end } = growth.indexes;
        let region = growth.bat.map_or(self.bat.offset, |region| region.offset);
        let mut steps = Vec::from_iter(self.copy_bat(growth));
        if end > start {
            let mut data = vec![0; ((end - start) * on_disk::LEN) as usize];
            self.fill(growth, start, &mut data);
            steps.push(write(region + start * on_disk::LEN, data));
        }
        steps
    }
}

/// Allocates disk space past the end of the file, as far as that is asked for.
fn allocate(
    preallocation: Preallocation,
    offset: u64,
    end: u64,
    prepare: &mut Prepare<'_>,
) -> Result<(), Failure> {
    let len = end - offset;
    if let Preallocation::Falloc | Preallocation::Full = preallocation {
        prepare.fresh(Step::Reserve {
            file: FileNo::IMAGE,
            offset,
            len,
        })?;
    }
    match preallocation {
        Preallocation::Full => prepare.fresh(fill(offset, len)),
        _ => Ok(()),
    }
}

fn zero(offset: u64, len: u64) -> Step {
    Step::Zero {
        file: FileNo::IMAGE,
        offset,
        len,
    }
}

fn fill(offset: u64, len: u64) -> Step {
    Step::Fill {
        file: FileNo::IMAGE,
        offset,
        len,
    }
}
