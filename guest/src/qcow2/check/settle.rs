//! Putting an image in order that was not closed in order: its counts were
//! written late, under the dirty bit, and never caught up; a shrink was cut off
//! before it had cut the data file, under the corrupt bit; or a resize was cut off
//! before its commit.

use super::super::Qcow2;
use super::super::facts::corrupt;
use super::super::format::{header, incompatible};
use super::super::grow::commit::change;
use super::super::tables::Tables;
use super::leftovers::or_damaged;
use super::{COUNTERS, Check};
use crate::bytes;
use crate::engine::Host;
use crate::error::{Failure, FailureKind};
use crate::findings::Repair;
use crate::plan::{Plan, Purpose, Stage, Step};
use crate::proto::{FileNo, PlanReply};
use crate::tell::Tell;
use alloc::format;
use alloc::vec;

impl Qcow2 {
    /// Plans the repair that clears the dirty bit, what finishes a shrink of the
    /// data file, or what gives back what a resize has left. Nothing is told: what
    /// is repaired is what a writer that was interrupted had still to do.
    pub(in super::super) fn plan_settle(
        &mut self,
        host: &mut dyn Host,
    ) -> Result<PlanReply, Failure> {
        match (self.header.is_dirty(), self.header.is_corrupt()) {
            (false, false) => return self.plan_leftover(host),
            (false, true) => return self.plan_unflag(host),
            (true, _) => {}
        }
        self.tables = Tables::new(self.tables.slice_len(), self.file_len);
        let check = Check::new(self, host, Some(Repair::All), Tell::silent(), COUNTERS)?;
        let (report, reply) = check.run()?;
        let wrong = report.corruptions + report.check_errors;
        if wrong == 0 {
            return Ok(reply);
        }
        Err(Failure::new(
            FailureKind::Damaged,
            format!(
                "Could not repair dirty image: {wrong} errors are left that no repair mends; see \
                 what they are with a check, and restore the image from a backup or copy it with \
                 `qemu-img convert`"
            ),
        ))
    }
    /// Whether the image is marked as corrupt and sound, as a shrink that was cut
    /// off before it had cut the data file leaves it.
    pub(in super::super) fn is_flagged_and_sound(
        &mut self,
        host: &mut dyn Host,
    ) -> Result<bool, Failure> {
        let header = &self.header;
        if !header.is_corrupt() || header.is_dirty() || !header.has_data_file() {
            return Ok(false);
        }
        self.tables = Tables::new(self.tables.slice_len(), self.file_len);
        let check = Check::new(self, host, None, Tell::silent(), COUNTERS);
        let found = or_damaged(check.and_then(Check::run))?;
        Ok(found.is_some_and(|(report, _)| report.corruptions + report.check_errors == 0))
    }

    /// Plans what such a shrink had still to do to the data file, and clears the
    /// bit.
    fn plan_unflag(&mut self, host: &mut dyn Host) -> Result<PlanReply, Failure> {
        if !self.is_flagged_and_sound(host)? {
            return Err(corrupt());
        }
        let mut unflagged = self.first_sector.clone();
        let flags = self.header.incompatible & !incompatible::CORRUPT;
        bytes::put_be64(&mut unflagged, header::INCOMPATIBLE, flags)?;
        let cut = self.flagged_cut().map(|step| Stage {
            purpose: Purpose::Release,
            steps: vec![step],
        });
        let clear = Stage {
            purpose: Purpose::Commit,
            steps: vec![change(&self.first_sector, &unflagged)?],
        };
        Ok(PlanReply {
            plan: Plan {
                stages: cut.into_iter().chain([clear]).collect(),
            },
            ..PlanReply::default()
        })
    }

    /// What has to be done before the corrupt bit is cleared: what a data file
    /// holds behind the end of the disk would show in a larger one.
    pub(super) fn flagged_cut(&self) -> Option<Step> {
        let (file, len) = (FileNo::DATA, self.header.size);
        let longer = self.data_len.is_some_and(|present| present > len);
        let cuts = longer && self.header.is_corrupt();
        cuts.then_some(Step::SetLength { file, len })
    }
}
