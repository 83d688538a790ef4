//! Putting right what a check has found.
//!
//! Counts are changed where they are, unless the refcount structure itself is
//! broken: then a new one is made behind the end of the file. Counts that are
//! too low go up before anything else, so that no state in between is worse than
//! the one before. Clearing the header's dirty and corrupt bits commits. With a
//! new structure the switch to it comes first, then what the entries say about
//! its counts, then those bits.

use super::super::Qcow2;
use super::super::format::{autoclear, header, incompatible};
use super::super::grow::commit::change;
use super::patches::MAX_COUNTS;
use super::{Check, Severity};
use crate::bytes;
use crate::error::{Failure, FailureKind};
use crate::findings::{Repair, Report};
use crate::plan::{Plan, Purpose, SECTOR, Stage, Step};
use crate::proto::FileNo;
use alloc::vec;
use alloc::vec::Vec;

/// What the comparison of counts has added to the sums.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Compared {
    corruptions: u64,
    leaks: u64,
    errors: u64,
}

impl Compared {
    /// Adds the difference between two states of the sums.
    pub fn add(&mut self, before: &Report, after: &Report) {
        self.corruptions += after.corruptions - before.corruptions;
        self.leaks += after.leaks - before.leaks;
        self.errors += after.check_errors - before.check_errors;
    }

    /// Takes what was added away again.
    pub fn forget(self, report: &mut Report) {
        report.corruptions -= self.corruptions;
        report.leaks -= self.leaks;
        report.check_errors -= self.errors;
    }
}

impl Check<'_> {
    /// Plans the repair of what was found.
    pub(super) fn plan_repair(&mut self, repair: Repair) -> Result<Plan, Failure> {
        if self.rebuild && repair == Repair::Leaks {
            let text = "ERROR need to rebuild refcount structures";
            self.tell.add(self.host, Severity::Error, text)?;
            return Err(Failure::new(
                FailureKind::Damaged,
                "Check failed: Input/output error: the reference counts cannot be repaired \
                 without all being rebuilt; use -r all",
            ));
        }
        // All counts are written anew where those that change are too many.
        let many = self.differing > MAX_COUNTS as u64 / (2 * SECTOR);
        let rebuild = self.rebuild || (many && repair == Repair::All);
        let before = match rebuild {
            true => self.plan_rebuild()?,
            false => self.fix_in_place(repair)?,
        };
        self.complete(before, rebuild)
    }

    /// Repairs counts and flags where they are. A flag that is cleared says that
    /// a cluster is shared, and whoever changes such a one lowers its count: the
    /// count has to be high enough before.
    fn fix_in_place(&mut self, repair: Repair) -> Result<Vec<Stage>, Failure> {
        let sound = self.tell.report.corruptions == 0 && self.tell.report.check_errors == 0;
        core::mem::take(&mut self.compared).forget(&mut self.tell.report);
        let flags = repair == Repair::All || sound;
        self.each_pass_again(|check| {
            check.compare(Some(repair), true)?;
            check.check_copied(flags)
        })?;
        if !self.raised.has_room() || !self.lowered.has_room() {
            self.warnings
                .push("there is more to repair than fits into one go: repair again".into());
        }
        // Flags that are set and counts that go down need no order: what is
        // counted too often may be changed in place.
        let mut rest = self.entries.take();
        let purpose = match rest.is_empty() {
            true => Purpose::Release,
            false => Purpose::Link,
        };
        rest.extend(self.lowered.take());
        let raised = Stage {
            purpose: Purpose::Count,
            steps: self.raised.take(),
        };
        let rest = Stage {
            purpose,
            steps: rest,
        };
        Ok(vec![raised, rest])
    }

    /// Does something for each range of clusters once more. The counters are
    /// filled again where one pass was not enough.
    pub(super) fn each_pass_again(
        &mut self,
        mut with: impl FnMut(&mut Self) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        if self.pass == 1 {
            return with(self);
        }
        self.each_pass(|check| {
            check.walk()?;
            with(check)
        })
    }

    /// The whole plan: what comes before, and the commits. Entries that are left
    /// by now rely on counts that the first commit makes visible; before them
    /// the header's flags do not say that all is well.
    fn complete(&mut self, mut stages: Vec<Stage>, rebuilt: bool) -> Result<Plan, Failure> {
        let report = &self.tell.report;
        let sound = report.corruptions == 0 && report.check_errors == 0;
        let entries = self.entries.take();
        if !rebuilt
            && let Some(step) = clear_unknown(self.image)
            && stages.iter().any(|stage| !stage.steps.is_empty())
        {
            // Before anything is changed in place that an unknown feature may
            // depend on.
            let steps = vec![step];
            let purpose = Purpose::Prepare;
            stages.insert(0, Stage { purpose, steps });
        }
        let old = &self.image.first_sector;
        let switched = self.header_after(sound && entries.is_empty(), rebuilt)?;
        let last = self.header_after(sound, rebuilt)?;
        if sound && let Some(step) = self.image.flagged_cut() {
            let steps = vec![step];
            let purpose = Purpose::Release;
            stages.push(Stage { purpose, steps });
        }
        stages.extend(commit(old, &switched)?);
        let purpose = Purpose::Release;
        let steps = entries;
        stages.push(Stage { purpose, steps });
        stages.extend(commit(&switched, &last)?);
        stages.retain(|stage| !stage.steps.is_empty());
        Ok(Plan { stages })
    }

    /// The first sector with the rebuilt table, where there is one, and, where
    /// the image is sound, without the flags that say otherwise.
    fn header_after(&self, sound: bool, rebuilt: bool) -> Result<Vec<u8>, Failure> {
        let old = &self.image.first_sector;
        let mut new = old.clone();
        if let Some(table) = self.new_table.filter(|_| rebuilt) {
            bytes::put_be64(&mut new, header::REFCOUNT_TABLE_OFFSET, table.offset.0)?;
            bytes::put_be32(&mut new, header::REFCOUNT_TABLE_CLUSTERS, table.count)?;
        }
        let flags = self.image.header.incompatible;
        let cleared = flags & !(incompatible::DIRTY | incompatible::CORRUPT);
        if self.image.header.version >= 3 {
            if sound {
                bytes::put_be64(&mut new, header::INCOMPATIBLE, cleared)?;
            }
            if new != *old {
                let known = self.image.header.autoclear & autoclear::KNOWN;
                bytes::put_be64(&mut new, header::AUTOCLEAR, known)?;
            }
        }
        Ok(new)
    }
}

/// The stage that turns one first sector into another, where they differ.
fn commit(old: &[u8], new: &[u8]) -> Result<Option<Stage>, Failure> {
    if old == new {
        return Ok(None);
    }
    let steps = vec![change(old, new)?];
    let purpose = Purpose::Commit;
    Ok(Some(Stage { purpose, steps }))
}

/// The write that clears the autoclear bits that mean nothing here.
fn clear_unknown(image: &Qcow2) -> Option<Step> {
    let flags = image.header.autoclear;
    (flags & !autoclear::KNOWN != 0).then(|| Step::Write {
        file: FileNo::IMAGE,
        offset: header::AUTOCLEAR as u64,
        data: (flags & autoclear::KNOWN).to_be_bytes().to_vec(),
    })
}
