//! Places for new data, and the entries that lead to it once it is durable.
//!
//! In flat extents every byte has its place. A grain gets one behind the end of
//! its file; the entries of both sets of tables follow with the next flush, when
//! the data is durable. An entry lies within a sector, so that each is old or
//! new.

use super::edit::Edit;
use super::format::{entry, limit};
use super::fresh;
use super::refuse::unsupported;
use super::sparse::{Grain, Sparse};
use super::{Body, Shape, Vmdk};
use crate::disk::Disk;
use crate::engine::Host;
use crate::error::{Failure, FailureKind};
use crate::plan::{Plan, Purpose, SECTOR, Stage, Step};
use crate::proto::{Content, FileNo, Place, PlanReply, Reply};
use alloc::collections::BTreeMap;
use alloc::format;
use alloc::vec::Vec;

/// Most grains that wait for a flush.
const MAX_PENDING: usize = 32 << 10;

/// What waits for a flush.
#[derive(Debug, Default)]
pub struct Pending {
    /// New places: by extent and grain, the sector.
    placed: BTreeMap<(usize, u64), u32>,
    /// Those of the last request.
    last: Vec<(usize, u64)>,
    /// Whether what is there already is overwritten.
    overwrites: bool,
    /// Whether the content has got a new CID in this session.
    has_new_cid: bool,
}

impl Pending {
    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.placed.is_empty()
    }

    /// Whether children know that the content changes, so that data may be
    /// overwritten without asking.
    pub fn is_marked(&self) -> bool {
        self.has_new_cid
    }

    /// The sector of a grain that waits.
    pub fn sector(&self, extent: usize, grain: u64) -> Option<u32> {
        self.placed.get(&(extent, grain)).copied()
    }
}

impl Vmdk {
    /// The places of a guest range, which begins with a grain.
    pub fn places(&mut self, host: &mut dyn Host, offset: u64, len: u64) -> Result<Reply, Failure> {
        if let Some(refusal) = self.no_write() {
            return Err(refusal);
        }
        if self.pending.placed.len() >= MAX_PENDING {
            return Err(Failure::new(
                FailureKind::FlushFirst,
                "too many new grains wait for a flush",
            ));
        }
        self.pending.last.clear();
        let placed = self.place_range(host, offset, offset + len);
        if placed.is_err() {
            self.take_back();
        }
        let nothing_new = placed.is_ok() && self.pending.last.is_empty();
        if nothing_new && self.pending.overwrites && !self.pending.is_marked() {
            return Err(Failure::new(
                FailureKind::FlushFirst,
                "a flush has to tell children first that the content changes",
            ));
        }
        placed.map(Reply::Placed)
    }

    fn place_range(
        &mut self,
        host: &mut dyn Host,
        offset: u64,
        end: u64,
    ) -> Result<Vec<Place>, Failure> {
        let mut places = Vec::new();
        let mut at = offset;
        while at < end {
            let index = self.extent_at(at);
            let Some(extent) = self.extents.get_mut(index) else {
                break;
            };
            let inside = at - extent.start;
            let stop = end.min(extent.end());
            match &mut extent.body {
                Body::Flat {
                    file,
                    at: first,
                    file_len,
                    ..
                } => {
                    self.pending.overwrites = true;
                    let place = Place {
                        offset: at,
                        len: stop - at,
                        file: *file,
                        at: *first + inside,
                        content: Content::Current,
                    };
                    push(&mut places, place, file_len);
                    at = stop;
                }
                Body::Sparse(sparse) => {
                    let length = sparse.header.grain_len();
                    let number = inside / length;
                    let stop = stop.min(extent.start + (number + 1) * length);
                    let len = stop - at;
                    self.place_grain(host, index, number, (at, len), &mut places)?;
                    at = stop;
                }
                Body::Zero => return Err(self.refuse("takes no data where it is zero")),
            }
        }
        Ok(places)
    }

    /// The place of a range inside one grain.
    fn place_grain(
        &mut self,
        host: &mut dyn Host,
        index: usize,
        number: u64,
        (at, len): (u64, u64),
        places: &mut Vec<Place>,
    ) -> Result<(), Failure> {
        let Some((start, sparse)) = self.sparse_at(index) else {
            return Ok(());
        };
        let sparse = sparse.clone();
        let length = sparse.header.grain_len();
        let (table, redundant) = self.entry_places(host, &sparse, number)?;
        let raw = match self.pending.sector(index, number) {
            Some(sector) => sector,
            None => self.tables.entry(host, sparse.file, table)?,
        };
        let (sector, is_new) = match sparse.grain(number, raw)? {
            Grain::At(sector) if sector < sparse.header.overhead => {
                return Err(super::refuse::table(format!(
                    "grain table entry of grain {number}: sector {sector} lies in the metadata"
                )));
            }
            Grain::At(sector) => {
                // After an interrupted flush the other copy may be behind.
                if let Some(at) = redundant
                    && self.tables.entry(host, sparse.file, at)? != raw
                {
                    self.pending.placed.insert((index, number), raw);
                }
                self.pending.overwrites = true;
                (sector, false)
            }
            Grain::None | Grain::Zeroed => {
                let grain = sparse.header.grain;
                let end = sparse.file_len.div_ceil(SECTOR);
                let sector = end.max(sparse.header.overhead).next_multiple_of(grain);
                if sector + grain > limit::MAX_SECTORS {
                    return Err(Failure::new(
                        FailureKind::TooLarge,
                        "the sparse VMDK is full: its grain tables reach no further than 2 TiB",
                    ));
                }
                self.pending.placed.insert((index, number), sector as u32);
                self.pending.last.push((index, number));
                (sector, true)
            }
        };
        let place = Place {
            offset: at,
            len,
            file: sparse.file,
            at: sector * SECTOR + (at - start) % length,
            content: Content::Current,
        };
        let Some(Body::Sparse(sparse)) = self.extents.get_mut(index).map(|e| &mut e.body) else {
            return Ok(());
        };
        push(places, place, &mut sparse.file_len);
        if is_new {
            sparse.file_len = sparse.file_len.max(sector * SECTOR + length);
        }
        Ok(())
    }

    fn sparse_at(&self, index: usize) -> Option<(u64, &Sparse)> {
        let extent = self.extents.get(index)?;
        match &extent.body {
            Body::Sparse(sparse) => Some((extent.start, sparse)),
            _ => None,
        }
    }

    /// Host offsets of a grain's entry and of its redundant entry, if there is
    /// one.
    fn entry_places(
        &mut self,
        host: &mut dyn Host,
        sparse: &Sparse,
        number: u64,
    ) -> Result<(u64, Option<u64>), Failure> {
        let header = &sparse.header;
        let entries = u64::from(header.table_entries);
        let (table, inside) = (number / entries, number % entries * entry::LEN);
        let mut place = |directory: u64| -> Result<u64, Failure> {
            let at = directory * SECTOR + table * entry::LEN;
            let raw = self.tables.entry(host, sparse.file, at)?;
            let sector = sparse.table(table, raw)?.ok_or_else(|| {
                unsupported(format!(
                    "grain directory entry {table} has no grain table for new data"
                ))
            })?;
            if !sparse.is_orderly(directory, table, sector) {
                return Err(unsupported(format!(
                    "the grain table at sector {sector}, of grain directory entry {table}, does \
                     not lie behind its directory in order, so that writing to it might \
                     overwrite something else"
                )));
            }
            Ok(sector * SECTOR + inside)
        };
        let redundant = header.redundant.map(&mut place).transpose()?;
        Ok((place(header.directory)?, redundant))
    }

    /// Forgets the last request. The file counts as long all the same.
    pub fn take_back(&mut self) {
        for key in core::mem::take(&mut self.pending.last) {
            self.pending.placed.remove(&key);
        }
    }

    /// The plan that makes everything placed since the last flush durable.
    pub fn plan_flush(&mut self, host: &mut dyn Host) -> Result<PlanReply, Failure> {
        let is_marked = self.pending.has_new_cid || !self.pending.overwrites;
        if self.pending.is_empty() && is_marked {
            return Ok(PlanReply::default());
        }
        let placed = core::mem::take(&mut self.pending.placed);
        self.pending.last.clear();
        let mut lens: BTreeMap<FileNo, u64> = BTreeMap::new();
        let mut link: Vec<Step> = Vec::new();
        let mut redundant: Vec<Step> = Vec::new();
        for ((index, number), sector) in placed {
            let Some((_, sparse)) = self.sparse_at(index) else {
                continue;
            };
            let sparse = sparse.clone();
            lens.insert(sparse.file, sparse.file_len);
            let (at, second) = self.entry_places(host, &sparse, number)?;
            push_entry(&mut link, sparse.file, at, sector);
            if let Some(at) = second {
                push_entry(&mut redundant, sparse.file, at, sector);
            }
        }
        link.append(&mut redundant);
        let remap = !self.pending.is_marked();
        link.extend(self.new_cid()?);
        self.planned = true;
        let lens = lens.into_iter();
        let mut stages = alloc::vec![
            Stage {
                purpose: Purpose::Prepare,
                steps: lens
                    .map(|(file, len)| Step::SetLength { file, len })
                    .collect(),
            },
            Stage {
                purpose: Purpose::Link,
                steps: link,
            },
        ];
        stages.retain(|stage| !stage.steps.is_empty());
        Ok(PlanReply {
            plan: Plan { stages },
            remap,
            ..PlanReply::default()
        })
    }

    /// The write that tells children that the content has changed, once a
    /// session; none where a longer text would span sectors.
    fn new_cid(&mut self) -> Result<Option<Step>, Failure> {
        if self.pending.has_new_cid {
            return Ok(None);
        }
        self.pending.has_new_cid = true;
        let mut edit = Edit::new(&self.descriptor);
        edit.set_cid(fresh::content_id(&mut self.chance));
        let new = edit.finish();
        let old = &self.descriptor.text;
        let pairs = old.iter().zip(&new);
        let first = pairs.take_while(|(old, new)| old == new).count();
        let same_length = new.len() == old.len();
        let last = match same_length {
            true => {
                let pairs = old.iter().zip(&new).rev();
                new.len() - pairs.take_while(|(old, new)| old == new).count()
            }
            false => new.len(),
        };
        // Of two texts of one length any mixture of sectors can be read, too.
        let one_sector = (first as u64) / SECTOR == (last.max(1) as u64 - 1) / SECTOR;
        // Behind it there may be lines about files.
        let is_safe = same_length || (one_sector && !self.has_leftovers());
        if !is_safe || new.len() < old.len() || first >= last {
            return Ok(None);
        }
        let data = new.get(first..last).unwrap_or_default().to_vec();
        self.descriptor = super::descriptor::Descriptor::parse(&new)?;
        if let Shape::Descriptor { tail, .. } = &mut self.shape {
            tail.reach(new.len() as u64);
        }
        Ok(Some(Step::Write {
            file: FileNo::IMAGE,
            offset: self.descriptor_at + first as u64,
            data,
        }))
    }
}

/// Adds the write of an entry.
fn push_entry(steps: &mut Vec<Step>, file: FileNo, at: u64, sector: u32) {
    match steps.last_mut() {
        Some(Step::Write {
            file: last,
            offset,
            data,
        }) if *last == file && *offset + data.len() as u64 == at => {
            data.extend_from_slice(&sector.to_le_bytes());
        }
        _ => steps.push(Step::Write {
            file,
            offset: at,
            data: sector.to_le_bytes().to_vec(),
        }),
    }
}

/// Adds a place. What lies behind the end of its file is zero.
fn push(places: &mut Vec<Place>, place: Place, file_len: &mut u64) {
    let there = file_len.saturating_sub(place.at).min(place.len);
    let parts = [
        (0, there, place.content),
        (there, place.len - there, Content::Zero),
    ];
    for (skip, len, content) in parts.into_iter().filter(|&(_, len, _)| len > 0) {
        let part = Place {
            offset: place.offset + skip,
            len,
            at: place.at + skip,
            content,
            ..place
        };
        match places.last_mut() {
            Some(last)
                if last.file == part.file
                    && last.content == part.content
                    && last.offset + last.len == part.offset
                    && last.at + last.len == part.at =>
            {
                last.len += part.len;
            }
            _ => places.push(part),
        }
    }
    *file_len = (*file_len).max(place.at + place.len);
}
