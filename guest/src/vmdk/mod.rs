//! VMDK: VMware's virtual disk.
//!
//! [`format`] is the format as it lies on disk, [`sparse`] checks the header of
//! a sparse extent, [`descriptor`] reads the text that names the extents and
//! [`edit`] changes it. [`Vmdk`] is an open image: one sparse file, or a
//! descriptor and its extents. Headers are checked when the image is opened,
//! table entries when they are used.

pub mod descriptor;
pub mod edit;
pub mod format;
pub mod refuse;
pub mod sparse;
pub mod tables;

mod check;
mod create;
mod facts;
mod files;
mod fresh;
mod inflate;
mod leftover;
mod map;
mod numbered;
mod open;
mod options;
mod pieces;
mod relocate;
mod resize;
mod restage;
mod scan;
mod slots;
mod survey;
mod write;

#[cfg(test)]
mod change_tests;
#[cfg(test)]
mod damage_tests;
#[cfg(test)]
mod leftover_tests;

pub use create::create;
pub use open::open;

use crate::chance::Chance;
use crate::disk::Disk;
use crate::engine::Host;
use crate::error::Failure;
use crate::facts::Facts;
use crate::findings::{Repair, Report};
use crate::proto::{Extent, FileNo, Format, PlanReply, Reply};
use crate::resize::Wish;
use alloc::vec::Vec;
use descriptor::Descriptor;
use leftover::Tail;
use sparse::Sparse;
use tables::Tables;
use write::Pending;

/// An open image.
#[derive(Debug)]
pub struct Vmdk {
    /// What the image's file is.
    pub shape: Shape,
    /// The descriptor.
    pub descriptor: Descriptor,
    /// Where the descriptor lies in the image's file, in bytes.
    descriptor_at: u64,
    /// The extents, in the order of the disk; none while their files are not
    /// attached.
    pub extents: Vec<DiskExtent>,
    /// Whether the session may be asked for changes.
    write: bool,
    /// Whether the format forbids changes of content in place.
    pub read_only: bool,
    /// Cached pieces of tables.
    pub tables: Tables,
    /// Whether the host has been given a plan, which changes the tables.
    planned: bool,
    /// What waits for a flush.
    pending: Pending,
    /// Where new identifiers come from.
    pub chance: Chance,
}

/// What an image's own file is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Shape {
    /// One sparse extent with a descriptor in it. Its first sector.
    Embedded {
        /// What a resize changes some fields of.
        first_sector: Vec<u8>,
    },
    /// A descriptor alone. For each of its extents the number of its file, the
    /// image's own where it has none.
    Descriptor {
        /// By extent.
        numbers: Vec<FileNo>,
        /// How many other files there are.
        files: usize,
        /// How its file ends.
        tail: Tail,
    },
}

/// An extent of the disk. Offsets and lengths are guest bytes.
#[derive(Clone, Debug)]
pub struct DiskExtent {
    /// Where it begins.
    pub start: u64,
    /// How long it is.
    pub len: u64,
    /// Where its bytes lie.
    pub body: Body,
}

/// Where an extent's bytes lie.
#[derive(Clone, Debug)]
pub enum Body {
    /// In a sparse extent.
    Sparse(Sparse),
    /// In a file as they are.
    Flat {
        /// The file.
        file: FileNo,
        /// Host offset of the first byte.
        at: u64,
        /// Length of the file in bytes.
        file_len: u64,
        /// Whether they may be overwritten.
        in_place: bool,
    },
    /// Nowhere: zeroes.
    Zero,
}

impl DiskExtent {
    /// Where it ends.
    pub fn end(&self) -> u64 {
        self.start + self.len
    }
}

impl Vmdk {
    /// Size of the disk in bytes.
    pub fn size(&self) -> u64 {
        self.extents.last().map_or(0, DiskExtent::end)
    }

    /// The index of the extent that holds a guest offset.
    fn extent_at(&self, offset: u64) -> usize {
        self.extents
            .partition_point(|extent| extent.end() <= offset)
    }
}

impl Disk for Vmdk {
    fn format(&self) -> Format {
        Format::Vmdk
    }

    fn virtual_size(&self) -> u64 {
        self.size()
    }

    fn executed(&mut self) {
        if core::mem::take(&mut self.planned) {
            self.tables.clear();
        }
    }

    fn attach(
        &mut self,
        host: &mut dyn Host,
        lens: &[u64],
        facts: &mut Facts,
    ) -> Result<(), Failure> {
        self.attach_extents(host, lens)?;
        self.complete(facts);
        Ok(())
    }

    fn map(&mut self, host: &mut dyn Host, offset: u64, len: u64) -> Result<Vec<Extent>, Failure> {
        self.extents(host, offset, len)
    }

    fn inflate(&mut self, host: &mut dyn Host, offset: u64, len: u64) -> Result<Vec<u8>, Failure> {
        self.inflated(host, offset, len)
    }

    fn settle(&mut self, host: &mut dyn Host) -> Result<PlanReply, Failure> {
        self.planned = true;
        self.plan_settle(host)
    }

    fn check(
        &mut self,
        host: &mut dyn Host,
        repair: Option<Repair>,
    ) -> Result<(Report, PlanReply), Failure> {
        self.planned = true;
        self.plan_check(host, repair)
    }

    fn resize(&mut self, host: &mut dyn Host, wish: &Wish) -> Result<PlanReply, Failure> {
        self.planned = true;
        self.plan_resize(host, wish)
    }

    fn allocate(&mut self, host: &mut dyn Host, offset: u64, len: u64) -> Result<Reply, Failure> {
        self.places(host, offset, len)
    }

    fn undo(&mut self) -> Result<(), Failure> {
        self.take_back();
        Ok(())
    }

    fn flush(&mut self, host: &mut dyn Host) -> Result<PlanReply, Failure> {
        self.plan_flush(host)
    }
}
