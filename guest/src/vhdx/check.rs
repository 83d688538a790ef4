//! Checking: what contradicts itself or the specification beyond what keeps an
//! image from being opened.
//!
//! What qemu-img finds is told in its words and counted; what it does not look
//! at and what does no harm is a warning.

use super::Vhdx;
use super::bat::{self, Place};
use super::format::{MIB, bat as on_disk};
use super::region::Owner;
use super::space::Space;
use super::update::HeaderWriter;
use crate::engine::Host;
use crate::error::Failure;
use crate::findings::{Repair, Report, Severity};
use crate::plan::{Plan, Purpose, Stage};
use crate::proto::PlanReply;
use crate::tell::Tell;
use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;
use core::fmt::Display;

/// What has been found so far.
struct Findings {
    tell: Tell,
    /// What blocks and tables use.
    space: Space,
    /// What is kept for blocks that read as zeroes.
    kept: Space,
    /// Host offset of the first block.
    first: u64,
}

impl Findings {
    fn corrupt(
        &mut self,
        host: &mut dyn Host,
        index: u64,
        why: &dyn Display,
    ) -> Result<(), Failure> {
        let text = format!("VHDX BAT entry {index} {why}");
        self.tell.add(host, Severity::Corruption, text)
    }
}

impl Vhdx {
    /// Checks the image; answers the sums and the plan that repairs it.
    pub(super) fn check_all(
        &mut self,
        host: &mut dyn Host,
        repair: Option<Repair>,
    ) -> Result<(Report, PlanReply), Failure> {
        let mut found = Findings {
            tell: Tell::default(),
            space: Space::new(self.source.file_len)?,
            kept: Space::new(self.source.file_len)?,
            first: u64::MAX,
        };
        for region in &self.table.regions {
            found.space.take(region.offset, region.len);
        }
        let reply = self.check_copies(host, &mut found.tell, repair)?;
        let entries = 0..self.bat.entries;
        bat::scan(
            host,
            &self.source,
            self.bat.offset,
            entries,
            |host, index, raw| self.check_entry(host, &mut found, index, raw),
        )?;
        self.check_bitmaps(host, &mut found)?;
        self.check_rest(host, &mut found.tell)?;
        self.check_waste(host, &mut found)?;
        found.tell.flush(host)?;
        Ok((found.tell.report, reply))
    }

    /// The log and the copies of headers and region tables: what a repair puts
    /// in order.
    fn check_copies(
        &mut self,
        host: &mut dyn Host,
        tell: &mut Tell,
        repair: Option<Repair>,
    ) -> Result<PlanReply, Failure> {
        let mut flaws: Vec<(Severity, String)> = Vec::new();
        if self.headers.current.has_log() {
            let text = "the log has to be replayed";
            flaws.push((Severity::Corruption, text.into()));
        }
        if let Some(flaw) = &self.headers.other_flaw {
            let name = ["first", "second"].get(1 - self.headers.slot.min(1));
            let name = name.copied().unwrap_or("other");
            flaws.push((Severity::Warning, format!("the {name} header {flaw}")));
        }
        if let Some((which, flaw)) = &self.stale_table {
            let name = if *which == 0 { "first" } else { "second" };
            flaws.push((Severity::Warning, format!("the {name} region table {flaw}")));
        }
        let mends = repair == Some(Repair::All) && !flaws.is_empty();
        for (severity, text) in flaws {
            if mends {
                let counts = severity == Severity::Corruption;
                tell.report.corruptions_fixed += u64::from(counts);
                tell.add(host, Severity::Repaired, format!("Repairing: {text}"))?;
            } else {
                tell.add(host, severity, text)?;
            }
        }
        match mends {
            true => self.plan_copies(host),
            false => Ok(PlanReply::default()),
        }
    }

    /// The plan that makes all copies valid and equal.
    fn plan_copies(&mut self, host: &mut dyn Host) -> Result<PlanReply, Failure> {
        if self.unsettled().is_some() {
            return self.plan_settle(host);
        }
        let mut headers = HeaderWriter::new(&self.headers, &mut self.chance);
        Ok(PlanReply {
            plan: Plan {
                stages: vec![Stage {
                    purpose: Purpose::Prepare,
                    steps: headers.announce(None)?.into(),
                }],
            },
            ..PlanReply::default()
        })
    }

    /// One entry of the BAT.
    fn check_entry(
        &self,
        host: &mut dyn Host,
        found: &mut Findings,
        index: u64,
        raw: u64,
    ) -> Result<(), Failure> {
        let geometry = self.metadata.geometry;
        let block = geometry.block_at(index);
        if block.is_none() && !geometry.has_parent {
            return match raw {
                0 => Ok(()),
                _ => {
                    let text = format!(
                        "VHDX BAT entry {index} is that of a sector bitmap and not empty, but the \
                         image has no parent"
                    );
                    found.tell.add(host, Severity::Warning, text)
                }
            };
        }
        let place = match Place::decode(raw, geometry.has_parent) {
            Ok(place) => place,
            Err(flaw) => return found.corrupt(host, index, &format_args!("is invalid: {flaw}")),
        };
        let len = block.map_or(MIB, |_| geometry.block_size);
        match place {
            Place::Full(at) | Place::Partial(at) => {
                let used = self.used_of(block, len);
                self.check_place(host, found, index, (at, len, used), block.is_some())
            }
            Place::Zero { .. } if block.is_none() => found.corrupt(
                host,
                index,
                &"is that of a sector bitmap with a block's state",
            ),
            Place::Zero { kept: Some(at) } => {
                found.kept.take(at, len);
                Ok(())
            }
            Place::Absent | Place::Zero { kept: None } => Ok(()),
        }
    }

    /// Bytes of a block that the disk has: the last one may be cut short, as
    /// QEMU cut it.
    fn used_of(&self, block: Option<u64>, len: u64) -> u64 {
        let start = block.map(|block| block * self.metadata.geometry.block_size);
        start.map_or(len, |start| {
            len.min(self.metadata.size.saturating_sub(start))
        })
    }

    /// Where a block is: host offset, length, and how much of that the disk has.
    fn check_place(
        &self,
        host: &mut dyn Host,
        found: &mut Findings,
        index: u64,
        (at, len, used): (u64, u64, u64),
        is_data: bool,
    ) -> Result<(), Failure> {
        let file_len = self.source.file_len;
        let end = at.saturating_add(used);
        if at >= file_len {
            let why = format_args!(
                "start offset {at} points after end of file ({file_len}). Image has probably been \
                 truncated."
            );
            return found.corrupt(host, index, &why);
        }
        if end > file_len {
            let why = format_args!(
                "end offset {} points after end of file ({file_len}). Image has probably been \
                 truncated.",
                end - 1
            );
            return found.corrupt(host, index, &why);
        }
        let checked = match is_data {
            true => self.check_block(at, len),
            false => self.check_bitmap(at, len),
        };
        if let Err(why) = checked {
            return found.corrupt(host, index, &format_args!("is invalid: {why}"));
        }
        found.first = found.first.min(at);
        if !found.space.take(at, len) {
            let why = format_args!("is invalid: the block at {at:#x} overlaps another block");
            return found.corrupt(host, index, &why);
        }
        Ok(())
    }

    /// Each partially present block needs its bitmap.
    fn check_bitmaps(&mut self, host: &mut dyn Host, found: &mut Findings) -> Result<(), Failure> {
        let geometry = self.metadata.geometry;
        if !geometry.has_parent {
            return Ok(());
        }
        let mut partial = None;
        let (bat, entries) = (self.bat.offset, 0..self.bat.entries);
        bat::scan(host, &self.source, bat, entries, |host, index, raw| {
            let state = raw & on_disk::STATE;
            if geometry.block_at(index).is_some() {
                if state == on_disk::PARTIALLY_PRESENT {
                    partial.get_or_insert(index);
                }
                return Ok(());
            }
            match partial.take() {
                Some(first) if state != on_disk::FULLY_PRESENT => found.corrupt(
                    host,
                    first,
                    &"is partially present, but its sector bitmap is not there",
                ),
                _ => Ok(()),
            }
        })
    }

    /// Space between blocks that nothing refers to. Before them, programs keep
    /// room for longer tables; a fixed image keeps space for the blocks that it
    /// has not got yet.
    fn check_waste(&self, host: &mut dyn Host, found: &mut Findings) -> Result<(), Failure> {
        if self.metadata.fixed {
            return Ok(());
        }
        let end = found.space.end();
        found.space.merge(&found.kept);
        match found.space.free_in(found.first..end) {
            0 => Ok(()),
            wasted => found.tell.add(
                host,
                Severity::Warning,
                format!("{wasted} MiB between the blocks are not used"),
            ),
        }
    }

    /// Entries behind those of the disk: a program that only writes a larger
    /// size would show what they lead to.
    fn check_rest(&self, host: &mut dyn Host, tell: &mut Tell) -> Result<(), Failure> {
        let region = self.table.get(Owner::Bat)?;
        let mut stale = 0u64;
        let rest = self.bat.entries..region.len / on_disk::LEN;
        bat::scan(host, &self.source, region.offset, rest, |_, _, raw| {
            stale += u64::from(raw != 0);
            Ok(())
        })?;
        match stale {
            0 => Ok(()),
            _ => tell.add(
                host,
                Severity::Warning,
                format!("{stale} BAT entries behind the end of the disk are not empty"),
            ),
        }
    }
}
