//! VHDX: Microsoft's virtual hard disk, version 2.
//!
//! [`format`] is the format as it lies on disk. An image leads from its headers
//! to the log, from the region tables to the metadata and the block allocation
//! table (BAT): `header`, `log`, `region`, `metadata` and `bat` decode and check
//! them, each where it is used. A log that has to be replayed lies over
//! everything that is read ([`source`]).

mod bat;
mod check;
mod checksum;
mod create;
mod facts;
mod format;
mod geometry;
mod grow;
mod guid;
mod header;
mod locator;
mod log;
mod map;
mod metadata;
mod open;
mod overlay;
mod refuse;
mod region;
mod resize;
mod settle;
mod shrink;
mod source;
mod space;
mod update;
mod write;

#[cfg(test)]
mod bat_tests;
#[cfg(test)]
mod copy_tests;
#[cfg(test)]
mod damage_tests;
#[cfg(test)]
mod grow_tests;
#[cfg(test)]
mod locator_tests;
#[cfg(test)]
mod log_tests;

pub use create::create;
pub use open::open;

use crate::chance::Chance;
use crate::disk::Disk;
use crate::engine::Host;
use crate::error::Failure;
use crate::findings::{Repair, Report};
use crate::proto::{Extent, Format, PlanReply, Reply};
use crate::resize::Wish;
use alloc::string::String;
use alloc::vec::Vec;
use bat::Bat;
use header::Headers;
use metadata::Metadata;
use region::RegionTable;
use source::Source;
use write::Pending;

/// An open image.
#[derive(Debug)]
pub struct Vhdx {
    /// The file, with the log replayed over it.
    source: Source,
    headers: Headers,
    /// The region table that counts.
    table: RegionTable,
    /// Which region table is to be made equal to it, and why.
    stale_table: Option<(usize, String)>,
    metadata: Metadata,
    bat: Bat,
    /// The piece of a sector bitmap that was used last, by host offset.
    bitmap: Option<(u64, Vec<u8>)>,
    /// Where new identifiers come from.
    chance: Chance,
    /// What waits for a flush.
    pending: Pending,
}

impl Disk for Vhdx {
    fn format(&self) -> Format {
        Format::Vhdx
    }

    fn virtual_size(&self) -> u64 {
        self.metadata.size
    }

    fn map(&mut self, host: &mut dyn Host, offset: u64, len: u64) -> Result<Vec<Extent>, Failure> {
        self.extents(host, offset, len)
    }

    fn settle(&mut self, host: &mut dyn Host) -> Result<PlanReply, Failure> {
        self.plan_settle(host)
    }

    fn check(
        &mut self,
        host: &mut dyn Host,
        repair: Option<Repair>,
    ) -> Result<(Report, PlanReply), Failure> {
        self.check_all(host, repair)
    }

    fn resize(&mut self, host: &mut dyn Host, wish: &Wish) -> Result<PlanReply, Failure> {
        self.plan_resize(host, wish)
    }

    fn allocate(&mut self, host: &mut dyn Host, offset: u64, len: u64) -> Result<Reply, Failure> {
        self.place_range(host, offset, len).map(Reply::Placed)
    }

    fn undo(&mut self) -> Result<(), Failure> {
        self.take_back()
    }

    fn flush(&mut self, _host: &mut dyn Host) -> Result<PlanReply, Failure> {
        self.plan_flush()
    }
}
