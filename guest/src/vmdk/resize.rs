//! Changes of size, and putting in order what one left behind: which kind of
//! image takes which way.

use super::format::limit;
use super::refuse::unsupported;
use super::sparse::Sparse;
use super::survey::{Keep, Survey};
use super::{Body, Shape, Vmdk};
use crate::engine::Host;
use crate::error::{Failure, FailureKind};
use crate::plan::{Plan, Purpose, SECTOR, Stage, Step};
use crate::proto::{FileNo, PlanReply, Preallocation};
use crate::resize::{Direction, Wish};
use alloc::format;
use alloc::vec;

impl Vmdk {
    /// The plan that changes the size.
    pub fn plan_resize(&mut self, host: &mut dyn Host, wish: &Wish) -> Result<PlanReply, Failure> {
        if let Some(refusal) = self.no_resize() {
            return Err(refusal);
        }
        let direction = wish.direction(self.size())?;
        wish.check_sectors()?;
        if wish.size == 0 {
            return Err(Failure::new(
                FailureKind::InvalidRequest,
                "a VMDK image of size 0 can be opened by nobody; the smallest size is 512",
            ));
        }
        if self.has_leftovers() {
            return Err(Failure::new(
                FailureKind::SettleFirst,
                "a resize was interrupted, and files that it left have to be removed first",
            ));
        }
        let plan = match direction {
            Direction::Same if !wish.shrink => Plan::default(),
            _ if !matches!(self.shape, Shape::Embedded { .. }) => {
                self.resize_files(host, wish, direction)?
            }
            Direction::Same => self.trim(host)?,
            Direction::Grow | Direction::Shrink => self.resize_sparse(host, wish)?,
        };
        Ok(reply(plan))
    }

    /// The plan that finishes what an interrupted resize began.
    pub fn plan_settle(&mut self, host: &mut dyn Host) -> Result<PlanReply, Failure> {
        if let Shape::Descriptor { tail, .. } = &self.shape {
            return Ok(reply(tail.plan(&self.descriptor.extents)));
        }
        if self.unsettled().is_none() {
            return Ok(PlanReply::default());
        }
        let sparse = self.only_sparse()?.clone();
        let capacity = sparse.header.capacity;
        let plan = self.restage(host, &sparse, capacity, Preallocation::Off)?;
        Ok(reply(plan))
    }

    /// Why the image has to be put in order before it is changed, if so: its
    /// tables or its descriptor lie behind the grains, where only an
    /// interrupted resize leaves them.
    pub fn unsettled(&self) -> Option<&'static str> {
        if self.no_resize().is_some() || !matches!(self.shape, Shape::Embedded { .. }) {
            return None;
        }
        let header = &self.only_sparse().ok()?.header;
        let places = [
            header.descriptor,
            header.directory,
            header.redundant.unwrap_or(0),
        ];
        let staged = places.into_iter().any(|sector| sector >= header.overhead);
        (staged && header.capacity > 0)
            .then_some("a resize was interrupted: the grain tables lie behind the data")
    }

    /// Whether the descriptor's file names files that an interrupted resize left.
    pub fn has_leftovers(&self) -> bool {
        match &self.shape {
            Shape::Descriptor { tail, .. } => tail.lines_at().is_some(),
            Shape::Embedded { .. } => false,
        }
    }

    /// The sparse extent of an image of one file.
    fn only_sparse(&self) -> Result<&Sparse, Failure> {
        match self.extents.first().map(|extent| &extent.body) {
            Some(Body::Sparse(sparse)) => Ok(sparse),
            _ => Err(Failure::new(
                FailureKind::Internal,
                "an image of one file has no sparse extent",
            )),
        }
    }

    fn resize_sparse(&mut self, host: &mut dyn Host, wish: &Wish) -> Result<Plan, Failure> {
        let sparse = self.only_sparse()?.clone();
        let capacity = wish.size / SECTOR;
        if capacity > sparse.header.capacity && capacity > limit::MAX_SECTORS {
            return Err(Failure::new(
                FailureKind::TooLarge,
                format!(
                    "a hosted sparse VMDK holds at most {} bytes, its grain tables reach no \
                     further; use the subformat monolithicFlat",
                    limit::MAX_SECTORS * SECTOR
                ),
            ));
        }
        self.restage(host, &sparse, capacity, wish.preallocation)
    }

    /// What a finished resize of this size would still have done: the file ends
    /// with its last grain.
    fn trim(&mut self, host: &mut dyn Host) -> Result<Plan, Failure> {
        let sparse = self.only_sparse()?.clone();
        let header = &sparse.header;
        let keep = Keep {
            grains: header.grains(),
            front: header.overhead,
        };
        let survey = Survey::take(host, &sparse, keep)?;
        let end = survey.data_end.max(survey.tables_end);
        if end.next_multiple_of(header.grain) * SECTOR >= sparse.file_len {
            return Ok(Plan::default());
        }
        Ok(Plan {
            stages: vec![Stage {
                purpose: Purpose::Commit,
                steps: vec![Step::SetLength {
                    file: FileNo::IMAGE,
                    len: end * SECTOR,
                }],
            }],
        })
    }
}

/// Why tables of this length are read, but not made, if so.
pub fn odd_tables(sparse: &Sparse) -> Option<Failure> {
    match sparse.header.table_entries {
        limit::TABLE_ENTRIES => None,
        entries => Some(unsupported(format!(
            "the header's numGTEsPerGT is {entries}; only images with {} are resized",
            limit::TABLE_ENTRIES
        ))),
    }
}

fn reply(plan: Plan) -> PlanReply {
    PlanReply {
        plan,
        ..PlanReply::default()
    }
}
