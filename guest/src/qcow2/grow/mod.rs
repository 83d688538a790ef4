//! Growing a disk, as a plan.
//!
//! New structures go behind everything in the file; old ones are only touched
//! where no reader looks (past the old end of the disk, unused counts). One
//! write to the first sector then switches size, L1 table, refcount table and
//! bitmap directory together, and afterwards the replaced structures are
//! released. Before the commit a crash leaves the old disk, after it the new
//! one, at worst with clusters that are counted and not used.
//!
//! `check` refuses, `survey` and `tail` read what lies around the old end,
//! `place` decides where new structures go, `stages` and `lay_down` turn it into
//! steps, `commit` makes the switch. The session's state is not changed: it
//! opens the image again when the plan has been executed.

mod bitmaps;
mod check;
pub mod commit;
mod lay_down;
mod place;
mod stages;
mod survey;
mod tail;

use super::Qcow2;
use super::refcount::Refcounts;
use super::tables::Tables;
use crate::engine::Host;
use crate::error::{Failure, FailureKind};
use crate::proto::PlanReply;
use crate::resize::{Direction, Wish};
use bitmaps::BitmapNeeds;

impl Qcow2 {
    /// The plan that changes the virtual size. Nothing may wait for a flush.
    pub fn plan_resize(&mut self, host: &mut dyn Host, wish: &Wish) -> Result<PlanReply, Failure> {
        if let Some(failure) = self.no_resize() {
            return Err(failure);
        }
        if self.has_changes() {
            return Err(Failure::new(
                FailureKind::Internal,
                "a resize was asked for before a flush",
            ));
        }
        let direction = wish.direction(self.header.size)?;
        wish.check_sectors()?;
        match direction {
            Direction::Same => self.finish(host, wish.shrink),
            Direction::Shrink => self.shrink(host, wish),
            Direction::Grow => {
                check::check(self, wish)?;
                self.grow(host, wish)
            }
        }
    }

    fn grow(&mut self, host: &mut dyn Host, wish: &Wish) -> Result<PlanReply, Failure> {
        let survey = survey::survey(self, host, wish)?;
        let bitmaps = BitmapNeeds::new(self, wish.size)?;
        // Counts change in a cache of their own, so that the session's agrees
        // with the file whether or not the plan is executed.
        let mut tables = Tables::new(self.tables.slice_len(), self.file_len);
        let mut refcounts = Refcounts {
            geometry: self.header.geometry,
            table: self.header.refcount_table,
            file_len: self.file_len,
            regions: &self.regions,
            tables: &mut tables,
        };
        let placement = place::place(self, host, &mut refcounts, wish.size, &survey, &bitmaps)?;
        let plan = stages::Grow {
            image: self,
            wish,
            survey: &survey,
            bitmaps: &bitmaps,
            placement: &placement,
        }
        .plan(host, &mut refcounts)?;
        Ok(PlanReply {
            plan,
            ..PlanReply::default()
        })
    }
}
