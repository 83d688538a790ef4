//! Putting an image in order that was not closed in order: replaying its log,
//! making its region tables equal.

use super::Vhdx;
use super::format::region as region_at;
use super::update::{HeaderWriter, stage, write};
use crate::engine::Host;
use crate::error::{Failure, FailureKind};
use crate::plan::{Plan, Purpose, Stage, Step};
use crate::proto::{FileNo, PlanReply};
use alloc::vec;
use alloc::vec::Vec;

impl Vhdx {
    /// The plan that leaves nothing to be settled.
    pub(super) fn plan_settle(&mut self, host: &mut dyn Host) -> Result<PlanReply, Failure> {
        let mut stages = Vec::new();
        if self.unsettled().is_some() {
            let mut headers = HeaderWriter::new(&self.headers, &mut self.chance);
            match self.headers.current.has_log() {
                true => self.replay(host, &mut headers, &mut stages)?,
                false => stages.push(Stage {
                    purpose: Purpose::Prepare,
                    steps: headers.announce(None)?.into(),
                }),
            }
            self.equal_tables(&mut stages)?;
        }
        Ok(PlanReply {
            plan: Plan { stages },
            ..PlanReply::default()
        })
    }

    /// What the log changes, and then the headers without it. Doing it again
    /// changes nothing.
    fn replay(
        &mut self,
        host: &mut dyn Host,
        headers: &mut HeaderWriter,
        stages: &mut Vec<Stage>,
    ) -> Result<(), Failure> {
        stages.push(stage(Purpose::Prepare, headers.write(None, None)?));
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
        stages.push(Stage {
            purpose: Purpose::Release,
            steps: headers.give_log_up()?.into(),
        });
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

    /// The region table that counts over the other, which nobody goes by while
    /// it is written: its checksum is wrong then.
    fn equal_tables(&self, stages: &mut Vec<Stage>) -> Result<(), Failure> {
        let Some((which, _)) = &self.stale_table else {
            return Ok(());
        };
        let at = region_at::TABLES.get(*which).copied().unwrap_or(0);
        let table = write(at, self.table.bytes.clone());
        match stages.last_mut().filter(|_| self.headers.current.has_log()) {
            Some(last) => last.steps.push(table),
            None => stages.push(stage(Purpose::Prepare, table)),
        }
        Ok(())
    }
}
