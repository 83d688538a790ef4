//! Whether an image is sound: qemu-img does not check this format.
//!
//! A block is the unit that is counted. Blocks that lead nowhere or overlap are
//! corruptions; room for whole blocks that nothing refers to is leaked, as the
//! next block would go to the end of the file. Footers that differ are a
//! corruption that can be repaired.

use super::fixed::Stages;
use super::format::table::FREE;
use super::header::Header;
use super::shrink::{reads_zero, tail_at};
use super::survey::metadata_end;
use super::table::{misplaced, walk};
use super::write::MAX_BATCH;
use super::{Layout, Vhd, parent, plan};
use crate::engine::Host;
use crate::error::Failure;
use crate::findings::{Repair, Report, Severity};
use crate::plan::{SECTOR, Step};
use crate::proto::PlanReply;
use crate::tell::Tell;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

/// Most blocks that are compared with each other: all of a 2040 GiB disk with
/// blocks of 2 MiB.
const MAX_BLOCKS: usize = 1 << 20;
/// Bytes of blocks that a repair moves, besides a part of the file: what one
/// plan may write.
const MOVED: u64 = 32 << 20;

/// A range of the file that is in use: start and end in bytes, and the block's
/// index.
type Used = (u64, u64, Option<u64>);

/// A check under way.
struct Check<'a> {
    host: &'a mut dyn Host,
    tell: Tell,
    used: Vec<(u32, u32)>,
    /// The block that the end of the disk cuts, where it is there.
    cut: Option<u64>,
    /// For how many blocks there is room before the footer at the end.
    kept: u64,
}

impl Vhd {
    /// Checks the image, and plans what repairs it.
    pub(super) fn plan_check(
        &mut self,
        host: &mut dyn Host,
        repair: Option<Repair>,
    ) -> Result<(Report, PlanReply), Failure> {
        let mut check = Check {
            host,
            tell: Tell::default(),
            used: Vec::new(),
            cut: None,
            kept: 0,
        };
        let result = self.check_all(&mut check);
        let planned = result.and_then(|()| self.repair(&mut check, repair));
        check.tell.flush(check.host)?;
        Ok((check.tell.report, planned?))
    }

    fn check_all(&self, check: &mut Check<'_>) -> Result<(), Failure> {
        self.check_footers(check)?;
        match &self.layout {
            Layout::Fixed => {
                check.tell.report.image_end_offset = Some(self.file_len);
                Ok(())
            }
            Layout::Dynamic(dynamic) => {
                self.check_table(check, &dynamic.header)?;
                self.check_space(check, &dynamic.header)?;
                self.check_tail(check, &dynamic.header)
            }
        }
    }

    fn check_footers(&self, check: &mut Check<'_>) -> Result<(), Failure> {
        if let Some(unsettled) = self.unsettled {
            check.corrupt(format!("ERROR: {}", unsettled.text()))?;
        }
        let (said, shown) = (self.footer.current_size(), self.footer.virtual_size());
        if said != shown {
            check.warn(format!(
                "the footer gives the disk {said} bytes; its geometry, which counts, {shown}"
            ))?;
        }
        let disk = self.footer.reach();
        let extra = self.file_len.saturating_sub(disk.saturating_add(SECTOR));
        if matches!(self.layout, Layout::Fixed) && self.unsettled.is_none() && extra > 0 {
            check.leak(
                format!("Leaked {extra} bytes behind the end of the disk"),
                1,
            )?;
        }
        Ok(())
    }

    /// Every entry of the table.
    fn check_table(&self, check: &mut Check<'_>, header: &Header) -> Result<(), Failure> {
        let size = self.footer.reach();
        let count = header.entries_for(size);
        let is_cut = !size.is_multiple_of(header.block_size);
        let (mut stale, mut allocated, mut fragmented) = (0u64, 0u64, 0u64);
        let mut next = None;
        let file_len = self.file_len;
        let Check {
            host,
            tell,
            used,
            cut,
            ..
        } = check;
        walk(*host, header, 0..header.entries, |host, index, entry| {
            if entry == FREE {
                return Ok(());
            }
            if index >= count {
                stale += 1;
                return Ok(());
            }
            let at = u64::from(entry) * SECTOR;
            allocated += 1;
            fragmented += u64::from(next.is_some_and(|next| next != at));
            next = Some(at + header.stride());
            if let Some(why) = misplaced(header, file_len, at) {
                let text = format!("ERROR: block {index} at {at:#x} {why}");
                return tell.add(host, Severity::Corruption, text);
            }
            if used.len() < MAX_BLOCKS {
                used.push((entry, index as u32));
            }
            if is_cut && index + 1 == count {
                *cut = Some(at);
            }
            Ok(())
        })?;
        let report = &mut tell.report;
        report.total_clusters = count;
        report.allocated_clusters = allocated;
        report.fragmented_clusters = fragmented;
        if stale > 0 {
            check.warn(format!(
                "{stale} entries of the table are for blocks behind the end of the disk"
            ))?;
        }
        if header.entries > count {
            check.warn(format!(
                "the table has {} entries, the disk needs {count}",
                header.entries
            ))?;
        }
        Ok(())
    }

    /// Overlaps and holes.
    fn check_space(&self, check: &mut Check<'_>, header: &Header) -> Result<(), Failure> {
        check.used.sort_unstable();
        let stride = header.stride();
        let front = metadata_end(header, header.entries);
        let footer = self.footer_at();
        let mut last: Used = (0, 0, None);
        let blocks = core::mem::take(&mut check.used);
        let locators = parent::located(&self.footer, header)?;
        for &(sector, index) in &blocks {
            let start = u64::from(sector) * SECTOR;
            let block: Used = (start, start + stride, Some(u64::from(index)));
            if let (true, Some(other)) = (start < last.1, last.2) {
                check.corrupt(format!(
                    "ERROR: blocks {other} and {index} overlap at {start:#x}"
                ))?;
            }
            if locators
                .iter()
                .any(|at| at.start < block.1 && start < at.end)
            {
                check.corrupt(format!(
                    "ERROR: block {index} at {start:#x} overlaps the name of the parent"
                ))?;
            }
            check.hole(header, last.1.max(front), start)?;
            last = (start, block.1.max(last.1), block.2);
        }
        if let (true, Some(index)) = (last.1 > footer, last.2) {
            check.corrupt(format!(
                "ERROR: block {index} at {:#x} overlaps the footer at the end of the file",
                last.0
            ))?;
        }
        check.room(header, last.1.max(front), footer)?;
        check.tell.report.image_end_offset = Some(last.1.max(front) + SECTOR);
        if blocks.len() == MAX_BLOCKS && check.tell.report.allocated_clusters > MAX_BLOCKS as u64 {
            check.tell.add(
                check.host,
                Severity::Error,
                format!("only {MAX_BLOCKS} blocks were compared with each other"),
            )?;
        }
        Ok(())
    }

    /// Where the footer at the end is, or would be.
    pub(super) fn footer_at(&self) -> u64 {
        let is_missing = self
            .unsettled
            .is_some_and(|unsettled| unsettled.lacks_end());
        match is_missing {
            true => self.file_len,
            false => self.file_len - SECTOR,
        }
    }

    /// What lies behind the end of the disk in its last block.
    fn check_tail(&self, check: &mut Check<'_>, header: &Header) -> Result<(), Failure> {
        let Some(block) = check.cut else {
            return Ok(());
        };
        let (at, len) = tail_at(header, block, self.footer.reach());
        match reads_zero(check.host, at, len)? {
            true => Ok(()),
            false => check.warn(format!(
                "the last block has data behind the end of the disk, at {at:#x}"
            )),
        }
    }

    /// How many units of leaks the stages cut off.
    fn freed(&self, stages: &Stages) -> u64 {
        let steps = stages.iter().flat_map(|(_, steps)| steps);
        let len = steps.fold(self.file_len, |len, step| match *step {
            Step::SetLength { len, .. } => len,
            _ => len,
        });
        let cut = self.file_len.saturating_sub(len);
        match &self.layout {
            Layout::Fixed => u64::from(cut > 0),
            Layout::Dynamic(dynamic) => cut / dynamic.header.stride(),
        }
    }

    /// The plan that repairs what was asked for, as far as that is safe.
    fn repair(
        &mut self,
        check: &mut Check<'_>,
        repair: Option<Repair>,
    ) -> Result<PlanReply, Failure> {
        let report = check.tell.report;
        let reply = match repair {
            None => return Ok(PlanReply::default()),
            Some(Repair::All) if self.unsettled.is_some() => {
                let reply = self.plan_settle(check.host)?;
                check.tell.report.corruptions -= 1;
                check.tell.report.corruptions_fixed += 1;
                check
                    .tell
                    .add(check.host, Severity::Repaired, "Repairing the footers")?;
                return Ok(reply);
            }
            Some(_) => PlanReply::default(),
        };
        let wasted = report.leaks > 0 || check.kept > 0;
        if report.corruptions > 0 || !wasted || self.no_resize().is_some() {
            return Ok(reply);
        }
        let stages = match &self.layout {
            Layout::Fixed => self.cut_fixed(),
            Layout::Dynamic(dynamic) => {
                let budget = (MOVED + self.file_len / 16) / dynamic.header.stride();
                self.tidy(check.host, &self.footer, false, budget.max(1) as usize)?
            }
        };
        let fixed = self.freed(&stages).min(report.leaks);
        check.tell.report.leaks_fixed = fixed;
        check.tell.report.leaks = report.leaks - fixed;
        if fixed > 0 {
            let text = format!("Repairing {fixed} leaks");
            check.tell.add(check.host, Severity::Repaired, text)?;
        }
        Ok(PlanReply {
            plan: plan(stages),
            ..reply
        })
    }
}

impl Check<'_> {
    fn corrupt(&mut self, text: String) -> Result<(), Failure> {
        self.tell.add(self.host, Severity::Corruption, text)
    }

    fn warn(&mut self, text: String) -> Result<(), Failure> {
        self.tell.add(self.host, Severity::Warning, text)
    }

    /// One finding for so many leaked blocks.
    fn leak(&mut self, text: String, count: u64) -> Result<(), Failure> {
        self.tell.add(self.host, Severity::Leak, text)?;
        self.tell.report.leaks += count - 1;
        Ok(())
    }

    /// Room before the footer at the end: some is made ahead of new blocks.
    fn room(&mut self, header: &Header, start: u64, end: u64) -> Result<(), Failure> {
        self.kept = end.saturating_sub(start) / header.stride();
        match self.kept {
            0 => Ok(()),
            kept if kept <= MAX_BATCH => self.warn(format!(
                "there is room for {kept} new blocks before the footer, at {start:#x}"
            )),
            _ => self.hole(header, start, end),
        }
    }

    /// Room that nothing refers to.
    fn hole(&mut self, header: &Header, start: u64, end: u64) -> Result<(), Failure> {
        match end.saturating_sub(start) / header.stride() {
            0 => Ok(()),
            count => self.leak(
                format!("Leaked room for {count} blocks at {start:#x}"),
                count,
            ),
        }
    }
}
