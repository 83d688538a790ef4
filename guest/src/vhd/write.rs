//! Data for blocks that are not there yet, and for blocks whose bitmap does not
//! say that all of them is.
//!
//! New blocks go behind everything that is in use. Before any place is handed
//! out, a flush appends another footer behind room for some blocks: the file
//! ends with a footer at all times. The same flush clears the room that an
//! earlier session has left, so that what the host does not write of a new block
//! is zero. Once the data and the bitmaps of new blocks are durable, their
//! entries follow.

use super::footer::Kind;
use super::format::table::FREE;
use super::grow::{entry_bytes, write};
use super::header::Header;
use super::room::Room;
use super::settle::write_footer;
use super::table::{block_at, entry_at};
use super::{Dynamic, Layout, Vhd, plan, refuse};
use crate::disk::Disk;
use crate::engine::{Host, Read};
use crate::error::{Failure, FailureKind};
use crate::plan::{Purpose, SECTOR, Step};
use crate::proto::{Content, FileNo, Place, PlanReply, Reply};
use alloc::collections::{BTreeMap, BTreeSet};
use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;

/// Most blocks that wait for a flush.
const MAX_WAITING: usize = 4096;
/// Most bytes of bitmaps that wait for a flush.
const MAX_BITMAPS: u64 = 4 << 20;
/// Most blocks for which room is made at once, but for an allocation of more.
pub const MAX_BATCH: u64 = 16;
/// Most bytes of room that is made at once, likewise.
const MAX_ROOM: u64 = 64 << 20;
/// Most blocks that are known to have full bitmaps.
const MAX_KNOWN: usize = 64 << 10;

/// What waits for a flush.
#[derive(Debug, Default)]
pub struct Pending {
    room: Option<Room>,
    /// Where the room may hold something: an earlier session has made it. It
    /// ends where the footer is that this one found.
    unclean: Range<u64>,
    /// Up to where the next flush clears it.
    clear_to: u64,
    /// That footer, where it may not be at the end of a block. It must not be in
    /// the data of one once there is another.
    odd_footer: Option<u64>,
    /// New blocks by index: where they are.
    blocks: BTreeMap<u64, u64>,
    /// Blocks by place whose bitmaps are to be filled.
    bitmaps: BTreeSet<u64>,
    /// Blocks by place whose bitmaps are full on disk.
    full: BTreeSet<u64>,
    /// For how many blocks the next flush has to make room.
    wanted: u64,
    /// For how many blocks room was made last.
    batch: u64,
    /// Blocks and bitmaps of the last allocation.
    last: Option<(Vec<u64>, Vec<u64>)>,
}

impl Pending {
    /// Where a block is that waits for a flush.
    pub fn block(&self, index: u64) -> Option<u64> {
        self.blocks.get(&index).copied()
    }

    /// Whether the bitmap of a block is full, or will be after a flush.
    pub fn is_full(&self, at: u64) -> bool {
        self.full.contains(&at) || self.bitmaps.contains(&at)
    }

    /// Asks for a flush that makes room for so many new blocks, where there is
    /// none before the footer at the end, which is at `footer`.
    fn check_room(&mut self, header: &Header, footer: u64, count: u64) -> Result<(), Failure> {
        let behind = |count| {
            self.room
                .map_or(u64::MAX, |room| room.behind(count).footer())
        };
        let fits = behind(count) <= footer;
        let clean = self.unclean.is_empty() || behind(count) <= self.unclean.start;
        if count == 0 || (fits && clean) {
            return Ok(());
        }
        let most = MAX_BATCH.min(MAX_ROOM / header.stride()).max(count);
        self.batch = (self.batch * 4).clamp(count, most);
        self.clear_to = behind(self.batch).min(self.unclean.end);
        if !fits {
            self.wanted = self.batch;
        }
        Err(Failure::new(
            FailureKind::FlushFirst,
            "a flush has to make room for new blocks first",
        ))
    }

    /// Whether the bitmap of a block is full on disk.
    fn learn(&mut self, at: u64, bitmap: &[u8], sectors: u64) {
        if self.full.len() >= MAX_KNOWN {
            self.full.clear();
        }
        let (whole, rest) = (sectors / 8, sectors % 8);
        let mask = !(0xff_u16 >> rest) as u8;
        let is_full = bitmap.iter().take(whole as usize).all(|&byte| byte == 0xff)
            && bitmap
                .get(whole as usize)
                .is_none_or(|byte| byte & mask == mask);
        if is_full {
            self.full.insert(at);
        }
    }
}

impl Vhd {
    /// Places for a guest range inside the disk.
    pub(super) fn place_range(
        &mut self,
        host: &mut dyn Host,
        offset: u64,
        len: u64,
    ) -> Result<Reply, Failure> {
        let refusal = self.refuse("takes no new data");
        if let Some(unsettled) = self.unsettled {
            return Err(refuse::unsettled(unsettled.text()));
        }
        let differencing = self.footer.kind == Kind::Differencing;
        if let Layout::Dynamic(dynamic) = &self.layout
            && dynamic.pending.room.is_none()
        {
            let survey = self.survey(host, 0)?;
            let footer = self.file_len - SECTOR;
            // A bitmap of XenServer's may lie before the footer, or a block that
            // an interrupted shrink has left an entry for.
            let start = match dynamic.has_batmap || !survey.stale.is_empty() {
                true => survey.used_end.max(footer),
                false => survey.used_end,
            };
            let room = Room::new(&dynamic.header, &survey, start);
            if let Layout::Dynamic(dynamic) = &mut self.layout {
                dynamic.pending.room = Some(room);
                dynamic.pending.odd_footer = (start < footer).then_some(footer);
                dynamic.pending.unclean = start..footer;
            }
        }
        let file_len = self.file_len;
        match &mut self.layout {
            Layout::Fixed => {
                let place = Place {
                    offset,
                    len,
                    file: FileNo::IMAGE,
                    at: offset,
                    content: Content::Current,
                };
                Ok(Reply::Placed(Vec::from_iter((len > 0).then_some(place))))
            }
            Layout::Dynamic(_) if differencing => Err(refusal),
            Layout::Dynamic(dynamic) => {
                let places = dynamic.place_range(host, file_len, offset, len)?;
                Ok(Reply::Placed(places))
            }
        }
    }

    /// Forgets the last allocation.
    pub(super) fn take_back(&mut self) -> Result<(), Failure> {
        let Layout::Dynamic(Dynamic { pending, .. }) = &mut self.layout else {
            return Ok(());
        };
        let Some((blocks, bitmaps)) = pending.last.take() else {
            return Err(Failure::new(
                FailureKind::InvalidRequest,
                "there is no allocation to take back",
            ));
        };
        // Their places may hold anything by now: they are not used again.
        for index in blocks {
            if let Some(at) = pending.blocks.remove(&index) {
                pending.bitmaps.remove(&at);
            }
        }
        for at in bitmaps {
            pending.bitmaps.remove(&at);
        }
        Ok(())
    }

    /// The plan that makes everything since the last flush durable. For the
    /// session it is on disk from here on.
    pub(super) fn plan_flush(&mut self) -> Result<PlanReply, Failure> {
        let Layout::Dynamic(dynamic) = &mut self.layout else {
            return Ok(PlanReply::default());
        };
        let Dynamic {
            header,
            table,
            pending,
            ..
        } = dynamic;
        pending.last = None;
        let clears = pending.clear_to > pending.unclean.start;
        let (Some(room), true) = (
            pending.room,
            pending.wanted > 0 || clears || !pending.bitmaps.is_empty(),
        ) else {
            return Ok(PlanReply::default());
        };
        let fresh: BTreeSet<u64> = pending.blocks.values().copied().collect();
        let len = header.bitmap_len() as usize;
        let fill = |&at: &u64| write(at, vec![0xff; len]);
        // Nobody looks at the bitmap of a block without an entry.
        let mut first: Vec<Step> = fresh.iter().map(fill).collect();
        let mut link: Vec<Step> = pending.bitmaps.difference(&fresh).map(fill).collect();
        link.extend(pending.blocks.iter().map(|(&index, &at)| {
            table.set(index, (at / SECTOR) as u32);
            write(entry_at(header, index), entry_bytes([at].iter()))
        }));
        if clears {
            first.push(Step::Punch {
                file: FileNo::IMAGE,
                offset: pending.unclean.start,
                len: pending.clear_to - pending.unclean.start,
            });
            pending.unclean.start = pending.clear_to;
        }
        let mut odd_footer = None;
        if pending.wanted > 0 {
            let at = room.behind(pending.wanted).footer().max(self.file_len);
            first.push(write_footer(&self.footer, at));
            self.file_len = at + SECTOR;
            odd_footer = pending.odd_footer.take();
        }
        let cleared = odd_footer.map(|at| write(at, vec![0; SECTOR as usize]));
        pending.wanted = 0;
        pending.full.append(&mut pending.bitmaps);
        pending.blocks.clear();
        let mut plan = plan(vec![
            (Purpose::Prepare, cleared.into_iter().collect()),
            (Purpose::Link, link),
        ]);
        // The first barrier is for the data, even where there are no steps.
        plan.stages.insert(
            0,
            crate::plan::Stage {
                purpose: Purpose::Prepare,
                steps: first,
            },
        );
        Ok(PlanReply {
            plan,
            ..PlanReply::default()
        })
    }
}

impl Dynamic {
    fn place_range(
        &mut self,
        host: &mut dyn Host,
        file_len: u64,
        offset: u64,
        len: u64,
    ) -> Result<Vec<Place>, Failure> {
        let block_size = self.header.block_size;
        let range = offset / block_size..(offset + len).div_ceil(block_size);
        self.check_changes(range.end - range.start)?;
        let mut known = Vec::new();
        for index in range {
            known.push((index, self.find(host, file_len, index)?));
        }
        let places: Vec<u64> = known.iter().filter_map(|&(_, at)| at).collect();
        let count = (known.len() - places.len()) as u64;
        let footer = file_len - SECTOR;
        self.pending.check_room(&self.header, footer, count)?;
        self.learn_bitmaps(host, &places)?;
        let (mut blocks, mut bitmaps, mut list) = (Vec::new(), Vec::new(), Vec::new());
        for (index, found) in known {
            let at = match found {
                Some(at) => at,
                None => self.new_block(index)?,
            };
            if found.is_none() {
                blocks.push(index);
            }
            if !self.pending.is_full(at) {
                self.pending.bitmaps.insert(at);
                bitmaps.push(at);
            }
            let start = offset.max(index * block_size);
            let end = (offset + len).min((index + 1) * block_size);
            list.push(Place {
                offset: start,
                len: end - start,
                file: FileNo::IMAGE,
                at: at + self.header.bitmap_len() + start % block_size,
                content: match found {
                    Some(_) => Content::Current,
                    None => Content::Zero,
                },
            });
        }
        self.pending.last = Some((blocks, bitmaps));
        Ok(list)
    }

    /// Refuses what would make the plan of a flush too long.
    fn check_changes(&self, count: u64) -> Result<(), Failure> {
        let pending = &self.pending;
        let waiting = (pending.blocks.len() + pending.bitmaps.len()) as u64;
        let bytes = (pending.bitmaps.len() as u64 + count) * self.header.bitmap_len();
        let kind = match waiting {
            _ if waiting + count <= MAX_WAITING as u64 && bytes <= MAX_BITMAPS => return Ok(()),
            0 => FailureKind::TooLarge,
            _ => FailureKind::FlushFirst,
        };
        Err(Failure::new(
            kind,
            "too many changes of the mapping wait for a flush",
        ))
    }

    /// Where a block is, flushed or not.
    fn find(
        &mut self,
        host: &mut dyn Host,
        file_len: u64,
        index: u64,
    ) -> Result<Option<u64>, Failure> {
        if let Some(at) = self.pending.block(index) {
            return Ok(Some(at));
        }
        match self.table.entry(host, index)? {
            FREE => Ok(None),
            entry => block_at(&self.header, file_len, index, entry).map(Some),
        }
    }

    fn new_block(&mut self, index: u64) -> Result<u64, Failure> {
        let room = self.pending.room.as_mut();
        let at = room
            .map(Room::block)
            .filter(|at| at / SECTOR < u64::from(FREE));
        let at = at.ok_or_else(super::create::too_large)?;
        self.pending.blocks.insert(index, at);
        Ok(at)
    }

    /// Reads bitmaps of blocks on disk that nothing is known of.
    pub(super) fn learn_bitmaps(
        &mut self,
        host: &mut dyn Host,
        places: &[u64],
    ) -> Result<(), Failure> {
        let unknown = places.iter().filter(|&&at| !self.pending.is_full(at));
        let unknown: Vec<u64> = unknown.copied().collect();
        if unknown.is_empty() {
            return Ok(());
        }
        let len = self.header.bitmap_len() as usize;
        let mut bitmaps = vec![0; len * unknown.len()];
        let mut reads: Vec<Read<'_>> = bitmaps
            .chunks_mut(len)
            .zip(&unknown)
            .map(|(buf, &offset)| Read {
                file: FileNo::IMAGE,
                offset,
                buf,
            })
            .collect();
        host.read(&mut reads)?;
        let sectors = sectors(&self.header);
        for (bitmap, at) in bitmaps.chunks(len).zip(unknown) {
            self.pending.learn(at, bitmap, sectors);
        }
        Ok(())
    }
}

fn sectors(header: &Header) -> u64 {
    header.block_size / SECTOR
}
