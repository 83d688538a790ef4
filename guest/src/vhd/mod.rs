//! VHD: Microsoft's virtual hard disk, version 1, of fixed size, dynamic and
//! differencing.
//!
//! [`format`] is the format as it lies on disk, [`footer`] and [`header`] check
//! it, [`Vhd`] is an open image. What the table says is checked where it is
//! used. Every change of size is the replacement of a footer, which is one
//! sector: the one of a disk of fixed size, or the two of a dynamic one, each
//! of which some readers go by.

pub mod chs;
pub mod footer;
pub mod format;
pub mod header;
pub mod refuse;
pub mod table;

mod check;
mod create;
mod facts;
mod fixed;
mod grow;
mod map;
mod open;
mod parent;
mod room;
mod settle;
mod shrink;
mod survey;
mod write;

pub use create::create;

#[cfg(test)]
mod damage_tests;
#[cfg(test)]
mod parent_tests;
#[cfg(test)]
mod settle_tests;
#[cfg(test)]
mod test_images;

use crate::disk::{Disk, Opened, Opening};
use crate::engine::Host;
use crate::error::Failure;
use crate::findings::{Repair, Report};
use crate::plan::{Plan, Purpose, Stage, Step};
use crate::proto::{Extent, Format, PlanReply, Reply};
use crate::resize::{Direction, Wish};
use alloc::boxed::Box;
use alloc::vec::Vec;
use footer::Footer;
use header::Header;
use settle::Unsettled;
use table::Table;
use write::Pending;

/// An open image.
#[derive(Debug)]
pub struct Vhd {
    /// Length of the file in bytes.
    file_len: u64,
    /// The footer that counts.
    footer: Footer,
    /// Where the data is.
    layout: Layout,
    /// What has to be put in order before a change.
    unsettled: Option<Unsettled>,
}

/// Where the data is.
#[derive(Debug)]
enum Layout {
    /// At the guest's offsets.
    Fixed,
    /// In blocks.
    Dynamic(Dynamic),
}

/// What leads to the blocks.
#[derive(Debug)]
struct Dynamic {
    header: Header,
    table: Table,
    pending: Pending,
    /// Whether the image was opened for changes.
    write: bool,
    /// Whether a bitmap of XenServer follows the table; looked at for writers.
    has_batmap: bool,
    /// Whether the last footer is the short one of old programs.
    has_old_footer: bool,
}

/// Opens an image.
pub fn open(host: &mut dyn Host, opening: Opening<'_>) -> Result<Opened, Failure> {
    let mut vhd = Vhd::open(host, &opening)?;
    if opening.write {
        vhd.look_for_batmap(host)?;
    }
    let facts = vhd.facts(host, opening.probed, opening.write)?;
    Ok((Box::new(vhd), facts))
}

impl Vhd {
    /// The plan that changes the size.
    fn plan_resize(&mut self, host: &mut dyn Host, wish: &Wish) -> Result<PlanReply, Failure> {
        wish.check_sectors()?;
        let direction = wish.direction(self.footer.virtual_size())?;
        if let Some(refusal) = self.no_resize() {
            return Err(refusal);
        }
        if let (Some(unsettled), true) = (self.unsettled, direction != Direction::Same) {
            return Err(refuse::unsettled(unsettled.text()));
        }
        if wish.size > format::MAX_SECTORS * crate::plan::SECTOR {
            return Err(create::too_large());
        }
        if direction == Direction::Shrink && wish.size == 0 {
            return Err(refuse::no_size());
        }
        let said = self.footer.current_size();
        if direction == Direction::Grow && wish.size < said {
            return Err(refuse::inside_the_field(said));
        }
        let stages = match (&self.layout, direction) {
            (Layout::Fixed, Direction::Grow) => self.grow_fixed(wish)?,
            (Layout::Fixed, Direction::Shrink) => self.shrink_fixed(wish)?,
            (Layout::Dynamic(_), Direction::Grow) => self.grow_dynamic(host, wish)?,
            (Layout::Dynamic(_), Direction::Shrink) => self.shrink_dynamic(host, wish)?,
            // An interrupted shrink that has committed ends with the same request.
            (Layout::Fixed, Direction::Same) if wish.shrink => self.cut_fixed(),
            (Layout::Dynamic(_), Direction::Same) if wish.shrink => {
                self.tidy(host, &self.footer, false, shrink::MAX_MOVES)?
            }
            (_, Direction::Same) => Vec::new(),
        };
        Ok(PlanReply {
            plan: plan(stages),
            ..PlanReply::default()
        })
    }
}

/// The commit of a dynamic image: the footer, and its copy at the start. Each is
/// what some programs go by, and none sees more than one disk.
fn commit(footer: &Footer, at: u64) -> (Purpose, Vec<Step>) {
    let copies = [0, at].map(|at| settle::write_footer(footer, at));
    (Purpose::Commit, copies.into())
}

/// A plan without its empty stages.
fn plan(stages: Vec<(Purpose, Vec<Step>)>) -> Plan {
    let stages = stages.into_iter().filter(|(_, steps)| !steps.is_empty());
    Plan {
        stages: stages
            .map(|(purpose, steps)| Stage { purpose, steps })
            .collect(),
    }
}

impl Disk for Vhd {
    fn format(&self) -> Format {
        Format::Vhd
    }

    fn virtual_size(&self) -> u64 {
        self.footer.virtual_size()
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
        self.plan_check(host, repair)
    }

    fn resize(&mut self, host: &mut dyn Host, wish: &Wish) -> Result<PlanReply, Failure> {
        self.plan_resize(host, wish)
    }

    fn allocate(&mut self, host: &mut dyn Host, offset: u64, len: u64) -> Result<Reply, Failure> {
        self.place_range(host, offset, len)
    }

    fn undo(&mut self) -> Result<(), Failure> {
        self.take_back()
    }

    fn flush(&mut self, _: &mut dyn Host) -> Result<PlanReply, Failure> {
        self.plan_flush()
    }
}
