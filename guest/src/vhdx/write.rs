//! Writing inside the disk: places for data, and what they change.
//!
//! New blocks go behind everything that is in use, where the file reads as
//! zeroes; their entries change in the session at once and on disk with the next
//! flush, once the data is durable. Before a session hands out its first place,
//! a flush gives the image new identifiers, as what a guest sees is about to
//! change; until then nothing may be overwritten without asking.

use super::Vhdx;
use super::bat::Place as Block;
use super::format::{MIB, bat as on_disk};
use super::refuse::no_writing;
use super::update::{HeaderWriter, fresh_guid};
use crate::engine::Host;
use crate::error::{Failure, FailureKind};
use crate::plan::{Plan, Purpose, Stage, Step};
use crate::prepare::writes;
use crate::proto::{Content, FileNo, Place, PlanReply};
use crate::units::HostOffset;
use alloc::format;
use alloc::vec::Vec;

/// Changed entries from which on a flush is asked for: a plan is one message.
const MAX_CHANGES: usize = 32 << 10;

/// What waits for a flush.
#[derive(Debug, Default)]
pub struct Pending {
    /// Whether the identifiers are those of this session.
    marked: bool,
    /// Whether the guest's data changes.
    writes: bool,
    /// Where the next block goes, once that was looked for.
    next: Option<u64>,
    /// Length of the file when it was last flushed, once it may be longer.
    flushed_len: Option<u64>,
    /// Entries before the last allocation, where it changed them.
    undo: Option<Vec<(u64, Option<u64>)>>,
}

impl Vhdx {
    /// Whether data may be overwritten without asking.
    pub(super) fn may_write_in_place(&self) -> bool {
        self.pending.marked
    }

    /// Places for the data of a guest range.
    pub(super) fn place_range(
        &mut self,
        host: &mut dyn Host,
        offset: u64,
        len: u64,
    ) -> Result<Vec<Place>, Failure> {
        let geometry = self.metadata.geometry;
        if geometry.has_parent {
            return Err(no_writing());
        }
        if let Some(why) = self.unsettled() {
            return Err(Failure::new(
                FailureKind::InvalidRequest,
                format!("the image has to be settled first: {why}"),
            ));
        }
        if !self.pending.marked {
            self.pending.writes = true;
            return Err(Failure::new(
                FailureKind::FlushFirst,
                "a flush has to give the image new identifiers first",
            ));
        }
        let end = offset + len;
        let blocks = offset / geometry.block_size..geometry.blocks(end);
        let changes = self.bat.changes();
        if changes > 0 && changes as u64 + (blocks.end - blocks.start) > MAX_CHANGES as u64 {
            return Err(Failure::new(
                FailureKind::FlushFirst,
                "too many changes of the mapping wait for a flush",
            ));
        }
        self.load_blocks(host, blocks.clone())?;
        // All that can be refused is refused before anything changes.
        let found: Vec<(u64, Block)> = blocks
            .map(|block| Ok((block, self.place(host, block)?)))
            .collect::<Result<_, Failure>>()?;
        let mut next = match self.pending.next {
            Some(next) => next,
            None => self.first_free(host)?,
        };
        let mut places = Vec::new();
        let mut undo = Vec::new();
        self.pending.flushed_len.get_or_insert(self.source.file_len);
        for (block, place) in found {
            let start = (block * geometry.block_size).max(offset);
            let stop = ((block + 1) * geometry.block_size).min(end);
            let (at, content) = match place {
                Block::Full(at) | Block::Partial(at) => (at, Content::Current),
                Block::Absent | Block::Zero { .. } => {
                    let at = next;
                    next += geometry.block_size;
                    let index = geometry.index(block);
                    let raw = at | on_disk::FULLY_PRESENT;
                    undo.push((index, self.bat.set(index, raw)));
                    (at, Content::Zero)
                }
            };
            let file_len = self.source.file_len;
            self.source.file_len = file_len.max(at + geometry.block_size);
            places.push(Place {
                offset: start,
                len: stop - start,
                file: FileNo::IMAGE,
                at: at + start % geometry.block_size,
                content,
            });
        }
        self.pending.next = Some(next);
        self.pending.writes = true;
        self.pending.undo = Some(undo);
        Ok(places)
    }

    /// Where blocks can go that nothing refers to: behind all that is in use and
    /// behind the end of the file.
    fn first_free(&self, host: &mut dyn Host) -> Result<u64, Failure> {
        let end = self.used_end(host)?.max(self.source.file_len);
        Ok(end.next_multiple_of(MIB))
    }

    /// Takes the last allocation back. Its space stays unused: nobody knows what
    /// of the data has reached it.
    pub(super) fn take_back(&mut self) -> Result<(), Failure> {
        let undo = self.pending.undo.take().ok_or_else(|| {
            Failure::new(
                FailureKind::InvalidRequest,
                "there is no allocation to take back",
            )
        })?;
        for (index, earlier) in undo {
            self.bat.reset(index, earlier);
        }
        Ok(())
    }

    /// The plan that makes all allocations durable.
    pub(super) fn plan_flush(&mut self) -> Result<PlanReply, Failure> {
        let file_len = self.source.file_len;
        let flushed = self.pending.flushed_len.take();
        let mut first = Vec::new();
        if flushed.is_some_and(|len| len < file_len) {
            first.push(Step::SetLength {
                file: FileNo::IMAGE,
                len: file_len,
            });
        }
        let mut stages = Vec::new();
        let remap = self.pending.writes && !self.pending.marked;
        if remap {
            let mut headers = HeaderWriter::new(&self.headers, &mut self.chance);
            let data_write = fresh_guid(&mut self.chance);
            first.extend(headers.announce(Some(data_write))?);
            self.headers = headers.finish();
            self.pending.marked = true;
        }
        if !first.is_empty() {
            stages.push(Stage {
                purpose: Purpose::Prepare,
                steps: first,
            });
        }
        let changed = self.bat.take_changes()?;
        let changed: Vec<(HostOffset, [u8; 8])> = changed
            .into_iter()
            .map(|(index, raw)| (HostOffset(self.bat.entry_at(index)), raw.to_le_bytes()))
            .collect();
        if !changed.is_empty() {
            let pieces = changed.iter().map(|(at, raw)| (*at, raw.as_slice()));
            stages.push(Stage {
                purpose: Purpose::Link,
                steps: writes(pieces),
            });
        }
        self.pending.writes = false;
        self.pending.undo = None;
        Ok(PlanReply {
            plan: Plan { stages },
            remap,
            ..PlanReply::default()
        })
    }
}
