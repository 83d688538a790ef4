//! What a change that was cut off behind its commit has still to do: clusters
//! that nothing refers to are counted, or hold disk space.

use super::super::Qcow2;
use super::super::layout::Run;
use super::super::refcount::Refcounts;
use super::super::tables::Tables;
use super::{COUNTERS, Check};
use crate::engine::Host;
use crate::error::{Failure, FailureKind};
use crate::findings::Repair;
use crate::plan::{Plan, Purpose, Stage, Step};
use crate::proto::{FileNo, PlanReply};
use crate::tell::Tell;
use alloc::vec;
use alloc::vec::Vec;

/// Most runs of clusters whose disk space is given back.
const MAX_RUNS: usize = 64 << 10;

/// Clusters that a repair frees.
#[derive(Debug, Default)]
pub(super) struct Freed {
    /// Runs of them, ascending, up to a limit.
    runs: Vec<Run>,
    /// The cluster behind the last that stays counted.
    end: u64,
}

impl Freed {
    /// A cluster that stays counted.
    pub fn keep(&mut self, cluster: u64) {
        self.end = self.end.max(cluster + 1);
    }

    /// A cluster that is counted no more, behind those that are known.
    pub fn add(&mut self, cluster: u64) {
        let full = self.runs.len() == MAX_RUNS;
        match self.runs.last_mut().filter(|last| last.end() == cluster) {
            Some(last) => last.count += 1,
            None if full => {}
            None => self.runs.push(Run {
                first: cluster,
                count: 1,
            }),
        }
    }
}

impl Qcow2 {
    /// The plan that finishes an interrupted change to the present size; empty
    /// where there is nothing left to do. What is damaged otherwise is left to a
    /// check, and what features that nobody here knows may refer to is left
    /// alone. Room at the end of the file that is not counted goes. A data file
    /// is cut to the size of the disk only where it may `shrink`: it may have been
    /// longer from the beginning.
    pub(in super::super) fn finish(
        &mut self,
        host: &mut dyn Host,
        shrink: bool,
    ) -> Result<PlanReply, Failure> {
        let mut reply = PlanReply::default();
        let mut steps = Vec::new();
        if let Some(leftovers) = or_damaged(self.leftovers(host))?.flatten() {
            steps = leftovers.steps;
            let len = self.header.size;
            if shrink && self.data_len.is_some_and(|present| present > len) {
                let file = FileNo::DATA;
                steps.push(Step::SetLength { file, len });
            }
            if leftovers.more {
                reply.warnings.push(
                    "there is more to give back than fits into one go: ask for it again".into(),
                );
            }
        }
        if !steps.is_empty() {
            let purpose = Purpose::Release;
            let stages = vec![Stage { purpose, steps }];
            reply.plan = Plan { stages };
        }
        Ok(reply)
    }

    fn leftovers(&mut self, host: &mut dyn Host) -> Result<Option<Leftovers>, Failure> {
        if self.has_unknown_features() {
            return Ok(None);
        }
        // The cache gives way to counters.
        self.tables = Tables::new(self.tables.slice_len(), self.file_len);
        let counted = self.counted(host)?;
        let check = Check::new(self, host, Some(Repair::Leaks), Tell::silent(), COUNTERS)?;
        check.leftovers(counted)
    }

    /// The cluster behind the last that is counted, wherever the file ends.
    fn counted(&mut self, host: &mut dyn Host) -> Result<u64, Failure> {
        let mut refcounts = Refcounts {
            geometry: self.header.geometry,
            table: self.header.refcount_table,
            file_len: self.file_len,
            regions: &self.regions,
            tables: &mut self.tables,
        };
        let present = refcounts.present_from(host, 0)?;
        refcounts.behind_counted(host, 0, &present)
    }
}

/// What came out of a search, where it did not meet with damage.
pub fn or_damaged<T>(found: Result<T, Failure>) -> Result<Option<T>, Failure> {
    match found {
        Err(failure) if matches!(failure.kind, FailureKind::Damaged | FailureKind::TooLarge) => {
            Ok(None)
        }
        found => found.map(Some),
    }
}

/// What gives back what nothing refers to.
struct Leftovers {
    steps: Vec<Step>,
    /// Whether some is left for another time.
    more: bool,
}

impl Check<'_> {
    /// What nothing refers to up to the last cluster that is counted; `None`
    /// where anything else is wrong.
    fn leftovers(mut self, counted: u64) -> Result<Option<Leftovers>, Failure> {
        self.clusters = self.clusters.max(counted);
        self.read_refcount_table()?;
        self.check_snapshot_table()?;
        self.each_pass(|check| {
            check.walk()?;
            check.compare(None, false)
        })?;
        let report = &self.tell.report;
        if self.rebuild || report.corruptions + report.check_errors > 0 {
            return Ok(None);
        }
        self.each_pass_again(|check| check.compare(Some(Repair::Leaks), false))?;
        let more = !self.lowered.has_room();
        let mut steps = self.lowered.take();
        steps.extend(self.give_back(!more));
        Ok(Some(Leftovers { steps, more }))
    }

    /// Gives disk space back, in the file and at its end.
    fn give_back(&self, may_cut: bool) -> Vec<Step> {
        let geometry = self.image.header.geometry;
        let (file, file_len) = (FileNo::IMAGE, self.shape.file_len);
        let end = match may_cut {
            true => geometry.host_offset(self.freed.end).min(file_len),
            false => file_len,
        };
        let mut steps = Vec::new();
        for run in &self.freed.runs {
            let offset = geometry.host_offset(run.first);
            let stop = geometry.host_offset(run.end()).min(end);
            if offset < stop {
                let len = stop - offset;
                steps.push(Step::Punch { file, offset, len });
            }
        }
        if end < file_len {
            steps.push(Step::SetLength { file, len: end });
        }
        steps
    }
}
