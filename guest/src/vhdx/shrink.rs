//! Shrinking: the order in which a smaller disk comes about.
//!
//! The size and the entries behind the new end have to change together, or a
//! larger disk would later show what was cut off: one entry of the log carries
//! both, and the header that makes it count commits. Then what the last block
//! holds behind the end is cleared, blocks at the end of the file move into
//! gaps, and the file gets shorter. The last two are finished by the same request
//! where a crash came between.

use super::Vhdx;
use super::format::{MIB, PAGE, bat as on_disk};
use super::guid::Guid;
use super::space::{Space, Used, UsedFor};
use super::update::{Flips, HeaderWriter, Logged, fresh_guid, write};
use crate::engine::Host;
use crate::error::Failure;
use crate::plan::{Plan, Purpose, Stage, Step};
use crate::proto::FileNo;
use alloc::collections::BinaryHeap;
use alloc::vec;
use alloc::vec::Vec;
use core::cmp::Reverse;

/// The most blocks that one plan moves.
const MAX_MOVES: usize = 16 << 10;
/// The most free ranges that one plan punches.
const MAX_PUNCHES: usize = 16 << 10;

/// A block on its way.
#[derive(Clone, Copy, Debug)]
struct Move {
    index: u64,
    from: u64,
    to: u64,
}

impl Vhdx {
    /// The plan that makes the disk smaller.
    pub(super) fn plan_shrink(&mut self, host: &mut dyn Host, size: u64) -> Result<Plan, Failure> {
        let (moves, given_back) = self.compact(host, size)?;
        let (tail, _) = self.clear_tail(host, size)?;
        let mut headers = HeaderWriter::new(&self.headers, &mut self.chance);
        let data_write = fresh_guid(&mut self.chance);
        let mut stages = vec![announce(&mut headers, Some(data_write))?];
        stages.extend(self.cut(host, &mut headers, size, tail)?);
        // Copies wait for nothing but the tail's end, which is zero by now.
        let copies = self.copies(&moves);
        if let Some(last) = stages.last_mut() {
            last.steps.extend(copies);
        }
        stages.extend(self.tidy(&moves, given_back));
        Ok(Plan { stages })
    }

    /// The plan that finishes a shrink to the present size which was interrupted
    /// behind its commit; empty where there is nothing left to do.
    pub(super) fn plan_finish(&mut self, host: &mut dyn Host) -> Result<Plan, Failure> {
        let (moves, given_back) = self.compact(host, self.metadata.size)?;
        if moves.is_empty() && given_back.is_empty() {
            return Ok(Plan::default());
        }
        let mut headers = HeaderWriter::new(&self.headers, &mut self.chance);
        let mut stages = vec![announce(&mut headers, None)?];
        let copies = self.copies(&moves);
        if !copies.is_empty() {
            let purpose = Purpose::Release;
            let steps = copies;
            stages.push(Stage { purpose, steps });
        }
        stages.extend(self.tidy(&moves, given_back));
        Ok(Plan { stages })
    }

    /// Which blocks of a disk of that size move, and what gives the space behind
    /// them back.
    fn compact(
        &mut self,
        host: &mut dyn Host,
        size: u64,
    ) -> Result<(Vec<Move>, Vec<Step>), Failure> {
        let entries = self.metadata.geometry.entries(size);
        let mut highest = Highest::default();
        let mut present = 0;
        let mut space = self.space(host, entries, |used| {
            present += u64::from(used.content == UsedFor::Data);
            highest.add(used);
        })?;
        let moves = self.moves(highest, &mut space);
        let absent = self.metadata.geometry.blocks(size).saturating_sub(present);
        let steps = self.give_back(&space, absent, size);
        Ok((moves, steps))
    }

    /// What gives the space that nothing uses back. Where the size stays and the
    /// end does, what is free before it has been given back already.
    fn give_back(&self, space: &Space, absent: u64, size: u64) -> Vec<Step> {
        let file_len = self.source.file_len;
        let end = self.new_end(space, absent);
        if end >= file_len && size == self.metadata.size {
            return Vec::new();
        }
        let mut steps = Vec::new();
        if end < file_len {
            steps.push(Step::SetLength {
                file: FileNo::IMAGE,
                len: end,
            });
        }
        let runs = space.free_runs(end.min(file_len), MAX_PUNCHES);
        steps.extend(runs.into_iter().map(|(offset, len)| Step::Punch {
            file: FileNo::IMAGE,
            offset,
            len: len.min(file_len - offset),
        }));
        steps
    }

    /// Blocks where they go.
    fn copies(&self, moves: &[Move]) -> Vec<Step> {
        moves.iter().flat_map(|step| self.copy(*step)).collect()
    }

    /// The stages that lead to where blocks have gone, and then give space back.
    fn tidy(&self, moves: &[Move], given_back: Vec<Step>) -> Vec<Stage> {
        let relink = moves.iter().map(|step| self.repoint(*step)).collect();
        let purpose = Purpose::Release;
        let stages = [relink, given_back].into_iter();
        let stages = stages.filter(|steps: &Vec<Step>| !steps.is_empty());
        stages.map(|steps| Stage { purpose, steps }).collect()
    }

    /// The stages up to the smaller disk: the size, nothing in the entries behind
    /// the new end, and nothing behind it in the last block.
    fn cut(
        &mut self,
        host: &mut dyn Host,
        headers: &mut HeaderWriter,
        size: u64,
        tail: Option<Step>,
    ) -> Result<Vec<Stage>, Failure> {
        let geometry = self.metadata.geometry;
        let from = self.bat.entry_at(geometry.entries(size));
        let end = self.bat.entry_at(self.bat.entries);
        let first_page = from.next_multiple_of(PAGE).min(end);
        let mut changes = Flips::default();
        changes.add(self.metadata.size_at, size.to_le_bytes().to_vec());
        changes.add(from, vec![0; (first_page - from) as usize]);
        let change = Logged {
            pages: changes.pages(host, self)?,
            zeroes: (first_page, (end - first_page).next_multiple_of(PAGE)),
            file_len: self.source.file_len,
            besides: tail,
        };
        self.log_stages(headers, change)
    }

    /// Where blocks at the end of the file go, as far as there are gaps before
    /// them. No gap is one that a move leaves: those lie behind all that are
    /// filled.
    fn moves(&self, highest: Highest, space: &mut Space) -> Vec<Move> {
        let len = self.metadata.geometry.block_size;
        let mut moves = Vec::new();
        let mut from = MIB;
        for (at, index) in highest.descending() {
            let Some(to) = space.find(from, at, len) else {
                break;
            };
            space.take(to, len);
            space.give(at, len);
            moves.push(Move {
                index,
                from: at,
                to,
            });
            from = to + len;
        }
        moves
    }

    /// The copy of a block. A block that the file ends in is zero behind that.
    fn copy(&self, step: Move) -> Vec<Step> {
        let len = self.metadata.geometry.block_size;
        let present = self.source.file_len.saturating_sub(step.from).min(len);
        let mut steps = vec![Step::Copy {
            file: FileNo::IMAGE,
            from: step.from,
            to: step.to,
            len: present,
        }];
        if present < len {
            steps.push(Step::Zero {
                file: FileNo::IMAGE,
                offset: step.to + present,
                len: len - present,
            });
        }
        steps
    }

    /// The entry that leads to where a block has gone.
    fn repoint(&self, step: Move) -> Step {
        let raw = step.to | on_disk::FULLY_PRESENT;
        write(self.bat.entry_at(step.index), raw.to_le_bytes().to_vec())
    }

    /// Where the file ends afterwards. A fixed image keeps space for the blocks
    /// that it has not got yet.
    fn new_end(&self, space: &Space, absent: u64) -> u64 {
        match self.metadata.fixed {
            true => space.end() + absent * self.metadata.geometry.block_size,
            false => space.end(),
        }
    }
}

/// The headers that say that the file changes.
fn announce(headers: &mut HeaderWriter, data_write: Option<Guid>) -> Result<Stage, Failure> {
    Ok(Stage {
        purpose: Purpose::Prepare,
        steps: headers.announce(data_write)?.into(),
    })
}

/// The blocks with the greatest host offsets, as many as can be moved.
#[derive(Debug, Default)]
struct Highest {
    heap: BinaryHeap<Reverse<(u64, u64)>>,
}

impl Highest {
    fn add(&mut self, used: Used) {
        if used.content != UsedFor::Data {
            return;
        }
        self.heap.push(Reverse((used.at, used.index)));
        if self.heap.len() > MAX_MOVES {
            self.heap.pop();
        }
    }

    /// Host offset and index of the entry, greatest first.
    fn descending(self) -> impl Iterator<Item = (u64, u64)> {
        let ascending = self.heap.into_sorted_vec();
        ascending.into_iter().map(|Reverse(block)| block)
    }
}
