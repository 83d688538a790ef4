//! qcow2, versions 2 and 3.
//!
//! [`format`] is the format as it lies on disk, [`header`] checks it,
//! [`Qcow2`] is an open image: the checked header, what it leads to, and the
//! cached pieces of its tables. Reading is in `map` and `inflate`.
//!
//! The header is checked when the image is opened, table entries when they are
//! used.

pub mod entry;
pub mod extensions;
pub mod format;
pub mod geometry;
pub mod header;
pub mod refuse;
pub mod regions;
pub mod tables;

mod bitmaps;
mod check;
mod create;
mod facts;
mod fresh;
mod grow;
mod inflate;
mod l2_table;
mod layout;
mod leftover;
mod luks;
mod map;
mod open;
mod options;
mod refcount;
mod shrink;
mod snapshots;
mod table_refs;
mod width;
mod write;

pub use create::create;

#[cfg(test)]
mod check_tests;
#[cfg(test)]
mod damage_tests;
#[cfg(test)]
mod directory_tests;
#[cfg(test)]
mod header_tests;
#[cfg(test)]
mod tables_tests;

use crate::disk::{Disk, Opened, Opening};
use crate::engine::Host;
use crate::error::Failure;
use crate::facts::Facts;
use crate::findings::{Repair, Report};
use crate::proto::{Extent, Format, PlanReply, Reply};
use crate::resize::Wish;
use crate::units::{GuestOffset, HostOffset};
use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::format;
use alloc::vec::Vec;
use bitmaps::Bitmap;
use core::fmt::Display;
use entry::{Cluster, L1Entry, L2Entry, Rules};
use format::entry as bits;
use geometry::Location;
use header::Header;
use regions::Regions;
use snapshots::Snapshot;
use tables::{Kind, Tables};

/// An open image.
#[derive(Debug)]
pub struct Qcow2 {
    /// The checked header, as it is on disk or will be after the next flush.
    pub header: Header,
    /// Length of the image file, data that is being placed included.
    pub file_len: u64,
    /// Length of the data file, once it is attached.
    pub data_len: Option<u64>,
    /// Where the metadata that the header leads to lies.
    pub regions: Regions,
    /// Internal snapshots.
    pub snapshots: Vec<Snapshot>,
    /// Persistent bitmaps; none where the image says that they are stale.
    pub bitmaps: Vec<Bitmap>,
    /// Cached pieces of tables, changed ones included.
    pub tables: Tables,
    /// Which L1 entry led to an L2 table: a second one is damage. Bounded, so
    /// that it finds the loops that would cost most, not every one.
    owners: BTreeMap<HostOffset, u64>,
    /// The file's first sector, as it is on disk or will be after the next
    /// flush: what a commit changes.
    first_sector: Vec<u8>,
    /// What waits for a flush.
    pending: write::Pending,
}

/// Most L2 tables whose owner is remembered.
const MAX_OWNERS: usize = 64 << 10;

impl Qcow2 {
    /// The rules by which L2 entries are decoded.
    pub fn rules(&self) -> Rules {
        Rules {
            geometry: self.header.geometry,
            zero_flag: self.header.version >= 3,
            data_file: self.header.has_data_file(),
        }
    }

    /// The file grew, or is about to by data that is being placed.
    pub fn set_file_len(&mut self, file_len: u64) {
        self.file_len = file_len;
        self.tables.set_file_len(file_len);
    }

    /// The L1 entry at `index`, checked. Past the end of the table nothing is
    /// allocated.
    pub fn l1_entry(&mut self, host: &mut dyn Host, index: u64) -> Result<L1Entry, Failure> {
        if index >= u64::from(self.header.l1.count) {
            return Ok(L1Entry::NONE);
        }
        let at = self.header.l1.offset.plus(index * bits::LEN);
        let raw = self.tables.read(host, Kind::L1, at)?;
        let entry = self.check_l1_entry(index, raw)?;
        if let Some(table) = entry.table {
            self.check_owner(host, index, table)?;
        }
        Ok(entry)
    }

    /// Refuses an L2 table that another L1 entry refers to as well.
    fn check_owner(
        &mut self,
        host: &mut dyn Host,
        index: u64,
        table: HostOffset,
    ) -> Result<(), Failure> {
        match self.owners.get(&table) {
            Some(&owner) if owner == index => return Ok(()),
            Some(&owner) => {
                let at = self.header.l1.offset.plus(owner * bits::LEN);
                let other = self.tables.read(host, Kind::L1, at)?;
                if other & bits::OFFSET == table.0 {
                    return Err(self.refuse_l1(
                        index,
                        &format_args!("the L2 table at {table} is that of entry {owner}, too"),
                    ));
                }
            }
            None if self.owners.len() >= MAX_OWNERS => self.owners.clear(),
            None => {}
        }
        self.owners.insert(table, index);
        Ok(())
    }

    fn refuse_l1(&self, index: u64, why: &dyn Display) -> Failure {
        let guest = GuestOffset(index.saturating_mul(self.header.geometry.l2_coverage()));
        refuse::table(format!(
            "active L1 table, entry {index} (guest offset {guest}): {why}"
        ))
    }

    fn check_l1_entry(&self, index: u64, raw: u64) -> Result<L1Entry, Failure> {
        if raw == 0 {
            return Ok(L1Entry::NONE);
        }
        let entry = L1Entry::decode(raw).map_err(|flaw| self.refuse_l1(index, &flaw))?;
        if let Some(table) = entry.table {
            let len = self.header.geometry.cluster_size();
            if let Some(why) = self.misplaced_table(table, len) {
                let why = format_args!("the L2 table at {table} {why}");
                return Err(self.refuse_l1(index, &why));
            }
        }
        Ok(entry)
    }

    /// Why no table of `len` bytes can lie at a host offset, if so.
    pub fn misplaced_table(&self, at: HostOffset, len: u64) -> Option<&'static str> {
        if let Some(owner) = self.regions.find(at.0, len) {
            return Some(match owner {
                regions::Owner::Header => "overlaps the header",
                regions::Owner::L1 => "overlaps the active L1 table",
                regions::Owner::RefcountTable => "overlaps the refcount table",
                regions::Owner::Snapshots => "overlaps the snapshot table",
                regions::Owner::Bitmaps => "overlaps the bitmap directory",
                regions::Owner::Crypto => "overlaps the encryption header",
            });
        }
        match refuse::misplaced(self.header.geometry, self.file_len, at.0, len)? {
            "past the end of the file" => Some("lies past the end of the file"),
            _ => Some("is not at a multiple of the cluster size"),
        }
    }

    /// Where the entry for `index` of an L2 table lies.
    pub fn l2_entry_place(&self, table: HostOffset, index: u64) -> HostOffset {
        table.plus(index * self.header.geometry.l2_entry_len())
    }

    /// Entry `index` of an L2 table as it stands.
    pub fn l2_entry(
        &mut self,
        host: &mut dyn Host,
        table: HostOffset,
        index: u64,
    ) -> Result<L2Entry, Failure> {
        let at = self.l2_entry_place(table, index);
        let entry = self.tables.read(host, Kind::L2, at)?;
        let bitmap = if self.header.geometry.extended_l2() {
            self.tables.read(host, Kind::L2, at.plus(bits::LEN))?
        } else {
            0
        };
        Ok(L2Entry { entry, bitmap })
    }

    /// Changes an L1 entry until the next flush.
    pub fn set_l1_entry(
        &mut self,
        host: &mut dyn Host,
        index: u64,
        raw: u64,
    ) -> Result<(), Failure> {
        let at = self.header.l1.offset.plus(index * bits::LEN);
        self.tables.write(host, Kind::L1, at, raw)
    }

    /// Changes an L2 entry until the next flush.
    pub fn set_l2_entry(
        &mut self,
        host: &mut dyn Host,
        table: HostOffset,
        index: u64,
        entry: L2Entry,
    ) -> Result<(), Failure> {
        let at = self.l2_entry_place(table, index);
        self.tables.write(host, Kind::L2, at, entry.entry)?;
        if self.header.geometry.extended_l2() {
            self.tables
                .write(host, Kind::L2, at.plus(bits::LEN), entry.bitmap)?;
        }
        Ok(())
    }

    /// What the image says about the cluster that holds a guest offset:
    /// decoded, its place checked.
    pub fn cluster(&mut self, host: &mut dyn Host, at: GuestOffset) -> Result<Cluster, Failure> {
        let Location {
            l1_index, l2_index, ..
        } = self.header.geometry.locate(at);
        let Some(table) = self.l1_entry(host, l1_index)?.table else {
            return Ok(Cluster::Unallocated);
        };
        let raw = self.l2_entry(host, table, l2_index)?;
        self.check_cluster(table, l2_index, at, raw)
    }

    /// Decodes an L2 entry and checks the place that it refers to.
    pub fn check_cluster(
        &self,
        table: HostOffset,
        index: u64,
        at: GuestOffset,
        raw: L2Entry,
    ) -> Result<Cluster, Failure> {
        let refuse = |why: &dyn Display| {
            let guest = GuestOffset(self.header.geometry.cluster_start(at.0));
            refuse::table(format!(
                "L2 table at {table}, entry {index} (guest offset {guest}): {why}"
            ))
        };
        let cluster = raw.decode(self.rules()).map_err(|flaw| refuse(&flaw))?;
        let Some((host, len)) = cluster.host_range(self.header.geometry) else {
            return Ok(cluster);
        };
        if self.header.has_data_file() {
            let guest = self.header.geometry.cluster_start(at.0);
            if host.0 != guest {
                return Err(refuse(&format_args!(
                    "offset {host} in the external data file is not the guest offset"
                )));
            }
            return Ok(cluster);
        }
        if let Some(owner) = self.regions.find(host.0, len) {
            return Err(refuse(&format_args!(
                "the data at {host} overlaps {}",
                owner.name()
            )));
        }
        let own_table = self.header.geometry.cluster_size();
        if host.0 < table.0.saturating_add(own_table) && table.0 < host.0.saturating_add(len) {
            return Err(refuse(&format_args!(
                "the data at {host} overlaps the L2 table itself"
            )));
        }
        if host.0 >= self.file_len {
            return Err(refuse(&format_args!(
                "the data at {host} lies past the end of the file ({} bytes)",
                self.file_len
            )));
        }
        Ok(cluster)
    }
}

/// Opens an image; see [`Qcow2::open`].
pub fn open(host: &mut dyn Host, opening: &Opening<'_>) -> Result<Opened, Failure> {
    let qcow2 = Qcow2::open(host, opening.head, opening.file_len)?;
    let facts = qcow2.facts(host, opening.probed, opening.write)?;
    Ok((Box::new(qcow2), facts))
}

impl Disk for Qcow2 {
    fn format(&self) -> Format {
        Format::Qcow2
    }

    fn virtual_size(&self) -> u64 {
        self.header.size
    }

    fn executed(&mut self) {
        self.tables.executed();
    }

    fn attach(
        &mut self,
        host: &mut dyn Host,
        lens: &[u64],
        facts: &mut Facts,
    ) -> Result<(), Failure> {
        match *lens {
            [data_len] if self.header.has_data_file() => {
                self.data_len = Some(data_len);
                // A reader need not know.
                if facts.no_resize.is_some() && self.is_flagged_and_sound(host)? {
                    self.let_settle(facts);
                }
                Ok(())
            }
            _ => Err(self.refuse("does not have that many other files")),
        }
    }

    fn map(&mut self, host: &mut dyn Host, offset: u64, len: u64) -> Result<Vec<Extent>, Failure> {
        self.extents(host, offset, len)
    }

    fn inflate(&mut self, host: &mut dyn Host, offset: u64, len: u64) -> Result<Vec<u8>, Failure> {
        self.inflated(host, offset, len)
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

    fn flush(&mut self, host: &mut dyn Host) -> Result<PlanReply, Failure> {
        self.plan_flush(host)
    }
}
