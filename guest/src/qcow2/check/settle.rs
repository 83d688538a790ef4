//! Putting an image in order that was not closed in order: its counts were
//! written late, under the dirty bit, and never caught up; or a resize was cut
//! off before its commit.

use super::super::Qcow2;
use super::super::tables::Tables;
use super::{COUNTERS, Check};
use crate::engine::Host;
use crate::error::{Failure, FailureKind};
use crate::findings::Repair;
use crate::proto::PlanReply;
use crate::tell::Tell;
use alloc::format;

impl Qcow2 {
    /// Plans the repair that clears the dirty bit, or what gives back what a
    /// resize has left. Nothing is told: what is
    /// repaired is what a writer that was interrupted had still to do.
    pub(in super::super) fn plan_settle(
        &mut self,
        host: &mut dyn Host,
    ) -> Result<PlanReply, Failure> {
        if !self.header.is_dirty() {
            return self.plan_leftover(host);
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
}
