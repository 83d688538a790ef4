//! Shrinking a disk, as a plan.
//!
//! A crash may leave the old disk or the new one, and nothing of what was cut
//! off may come back when the disk grows again, whoever grows it. So nothing
//! behind the new end may hang on the header that the commit writes: where a
//! table has to change for that, copies behind the end of the file are what the
//! commit leads to. A second commit leads back to the originals, changed where
//! they were while nobody saw them; then the file can be cut. Counts are lowered
//! last: a crash leaves at worst clusters that are counted and not used.
//!
//! In an external data file a guest offset has one place only, so nothing can be
//! copied away. There the first commit also marks the image as corrupt, until the
//! data file has been cut: everybody reads the image meanwhile, and nobody grows
//! it. `check/settle` finishes that where it was cut off.
//!
//! `check` refuses, `survey` reads what lies around the new end, `bitmaps` what
//! persistent bitmaps need, `staging` makes the copies, `dropped` walks through
//! what nothing refers to any more, `release` and `blocks` lower its counts,
//! `stages` puts the plan together. The session's state is not changed: it opens
//! the image again when the plan has been executed.

mod bitmaps;
mod blocks;
mod check;
mod dropped;
mod release;
mod stages;
mod staging;
mod survey;

use super::Qcow2;
use super::refcount::Refcounts;
use super::tables::Tables;
use crate::engine::Host;
use crate::error::Failure;
use crate::prepare::Prepare;
use crate::proto::PlanReply;
use crate::resize::Wish;
use bitmaps::Cuts;
use staging::Staging;

impl Qcow2 {
    /// The plan that makes the disk smaller.
    pub(super) fn shrink(
        &mut self,
        host: &mut dyn Host,
        wish: &Wish,
    ) -> Result<PlanReply, Failure> {
        check::check(self, wish)?;
        let regions = self.regions.clone();
        let mut tables = Tables::new(self.tables.slice_len(), self.file_len);
        let mut refcounts = Refcounts {
            geometry: self.header.geometry,
            table: self.header.refcount_table,
            file_len: self.file_len,
            regions: &regions,
            tables: &mut tables,
        };
        let survey = survey::survey(self, host, &mut refcounts, wish.size)?;
        let cuts = Cuts::new(self, host, wish.size)?;
        let moves_bitmaps = stages::moves_bitmaps(self, &cuts)?;
        let copies = if moves_bitmaps { cuts.clusters } else { 0 };
        let staging = Staging::new(self, host, &mut refcounts, &survey, copies)?;
        let counts = stages::count_copies(self, host, &mut refcounts, &staging)?;
        drop(tables);
        let shrink = stages::Shrink {
            survey: &survey,
            cuts: &cuts,
            moves_bitmaps,
            staging: &staging,
        };
        let plan = shrink.plan(self, Prepare::new(host), counts)?;
        let mut warnings = alloc::vec::Vec::new();
        if !self.snapshots.is_empty() {
            warnings
                .push("disk space that internal snapshots still refer to is not given back".into());
        }
        Ok(PlanReply {
            plan,
            warnings,
            ..PlanReply::default()
        })
    }
}
