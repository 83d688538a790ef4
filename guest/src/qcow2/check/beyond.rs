//! What qemu-img does not look at: worth a warning, not counted.

use super::super::Qcow2;
use super::super::entry::Cluster;
use super::super::tables::Tables;
use super::{Check, Severity};
use crate::engine::{Host, Read};
use crate::error::Failure;
use crate::proto::FileNo;
use crate::units::{GuestOffset, HostOffset};
use alloc::format;
use alloc::string::String;
use alloc::vec;

/// Most warnings about tables that overlap something.
const MAX_OVERLAPS: usize = 64;

impl Check<'_> {
    /// Notes L2 tables, of the clusters of this pass, that something else claims
    /// as well: with counts that agree, qemu-img finds nothing wrong with them.
    pub(super) fn note_overlaps(&mut self) {
        for (&cluster, &references) in &self.tables {
            if self.counters.get(cluster) > references && self.warnings.len() < MAX_OVERLAPS {
                let at = self.image.header.geometry.host_offset(cluster);
                self.warnings.push(format!(
                    "the L2 table at {at:#x} is in use as something else, too"
                ));
            }
        }
    }

    /// Warns of what would come to light with a larger disk, and of bitmaps
    /// that nobody can use.
    pub(super) fn warn(&mut self) -> Result<(), Failure> {
        let size = self.image.header.size;
        if self.sums.beyond > 0 {
            let text = format!(
                "{} clusters are mapped beyond the end of the disk ({size} bytes)",
                self.sums.beyond
            );
            self.tell.add(self.host, Severity::Warning, text)?;
        }
        for bitmap in self.image.bitmaps.iter().filter(|bitmap| bitmap.in_use()) {
            let text = format!(
                "bitmap '{}' was not closed cleanly (flag in_use) and cannot be used",
                bitmap.name
            );
            self.tell.add(self.host, Severity::Warning, text)?;
        }
        for text in core::mem::take(&mut self.warnings) {
            self.tell.add(self.host, Severity::Warning, text)?;
        }
        Ok(())
    }
}

impl Qcow2 {
    /// Why no L2 table can lie at a host offset, if so.
    pub(super) fn misplaced_table_at(&self, at: u64) -> Option<&'static str> {
        self.misplaced_table(HostOffset(at), self.header.geometry.cluster_size())
    }

    /// Whether there are stale bytes in the last cluster, behind the end of the
    /// disk. Where the tables are damaged nothing is said.
    pub(super) fn stale_tail(&mut self, host: &mut dyn Host) -> Result<Option<String>, Failure> {
        let geometry = self.header.geometry;
        let size = self.header.size;
        if geometry.is_aligned(size) || self.header.encryption.is_some() {
            return Ok(None);
        }
        let start = geometry.cluster_start(size);
        let cluster = self.cluster(host, GuestOffset(start));
        self.tables = Tables::new(self.tables.slice_len(), self.file_len);
        let (Ok(Cluster::Data { host: at, .. }), false) = (cluster, self.header.has_data_file())
        else {
            return Ok(None);
        };
        let mut rest = vec![0; (geometry.cluster_size() - (size - start)) as usize];
        host.read(&mut [Read {
            file: FileNo::IMAGE,
            offset: at.plus(size - start).0,
            buf: &mut rest,
        }])?;
        let stale = rest.iter().any(|&byte| byte != 0);
        Ok(stale.then(|| {
            format!("the last cluster holds stale bytes beyond the end of the disk ({size} bytes)")
        }))
    }
}
