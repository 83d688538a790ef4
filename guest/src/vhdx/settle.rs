//! Putting an image in order that was not closed in order: replaying its log,
//! making its region tables equal.

use super::Vhdx;
use super::format::region as region_at;
use super::guid::Guid;
use super::update::{HeaderWriter, stage, write};
use crate::bytes;
use crate::engine::Host;
use crate::error::{Failure, FailureKind};
use crate::plan::{Plan, Purpose, SECTOR, Stage, Step};
use crate::proto::{FileNo, PlanReply};
use alloc::vec;
use alloc::vec::Vec;

impl Vhdx {
    /// The plan that leaves nothing to be settled.
    pub(super) fn plan_settle(&mut self, host: &mut dyn Host) -> Result<PlanReply, Failure> {
        let mut stages = Vec::new();
        if self.unsettled().is_some() {
            let mut headers = HeaderWriter::new(&self.headers, &mut self.chance);
            stages.push(stage(Purpose::Prepare, headers.write(None, None)?));
            match self.headers.current.has_log() {
                true => self.replay(host, &mut headers, &mut stages)?,
                false => stages.push(stage(Purpose::Prepare, headers.write(None, None)?)),
            }
            self.equal_tables(&mut stages)?;
        }
        Ok(PlanReply {
            plan: Plan { stages },
            ..PlanReply::default()
        })
    }

    /// What the log changes, and the headers without it: the first of them
    /// commits. Doing it again changes nothing.
    fn replay(
        &mut self,
        host: &mut dyn Host,
        headers: &mut HeaderWriter,
        stages: &mut Vec<Stage>,
    ) -> Result<(), Failure> {
        let mut steps = vec![Step::SetLength {
            file: FileNo::IMAGE,
            len: self.source.file_len.max(self.source.overlay.end()),
        }];
        steps.extend(self.source.overlay.steps());
        steps.extend(self.cut_off_tail(host)?);
        stages.push(Stage {
            purpose: Purpose::Prepare,
            steps,
        });
        let none = Some(Guid::ZERO);
        stages.push(stage(Purpose::Commit, headers.write(None, none)?));
        stages.push(stage(Purpose::Release, headers.write(None, none)?));
        Ok(())
    }

    /// The log may be that of a shrink, which clears the end of the last block
    /// before it gives the log up. A block that is not where it can be is left to
    /// a check.
    fn cut_off_tail(&mut self, host: &mut dyn Host) -> Result<Option<Step>, Failure> {
        if self.metadata.geometry.has_parent {
            return Ok(None);
        }
        match self.clear_tail(host, self.metadata.size) {
            Ok((step, _)) => Ok(step),
            Err(failure) if failure.kind == FailureKind::Damaged => Ok(None),
            Err(failure) => Err(failure),
        }
    }

    /// The region table that counts over the other: its first sector last, as
    /// the signature and the checksum are there.
    fn equal_tables(&self, stages: &mut Vec<Stage>) -> Result<(), Failure> {
        let Some((which, _)) = &self.stale_table else {
            return Ok(());
        };
        let at = region_at::TABLES.get(*which).copied().unwrap_or(0);
        let replays = self.headers.current.has_log();
        let sector = SECTOR as usize;
        let table = &self.table.bytes;
        let rest = bytes::slice(table, sector, table.len() - sector)?;
        let first = bytes::slice(table, 0, sector)?;
        let (before, last) = match replays {
            true => (Purpose::Release, Purpose::Release),
            false => (Purpose::Prepare, Purpose::Commit),
        };
        stages.push(stage(before, write(at + SECTOR, rest.to_vec())));
        stages.push(stage(last, write(at, first.to_vec())));
        Ok(())
    }
}
