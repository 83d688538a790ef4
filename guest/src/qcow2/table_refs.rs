//! Where the header says that tables lie: in range, aligned, inside the file.

use super::extensions::CryptoRef;
use super::format::{limit, snapshot};
use super::geometry::Geometry;
use super::header::{Encryption, RawHeader, TableRef};
use super::{luks, refuse};
use crate::error::Failure;
use crate::units::HostOffset;
use alloc::format;

/// Checks the header's references to tables; what the tables hold is checked
/// when it is used.
pub struct TableRefs<'a> {
    /// Cluster and entry size.
    pub geometry: Geometry,
    /// Length of the image file in bytes.
    pub file_len: u64,
    /// The fields to check.
    pub raw: &'a RawHeader,
}

impl TableRefs<'_> {
    /// The active L1 table, large enough for a disk of `size` bytes.
    pub fn check_l1(&self, size: u64) -> Result<TableRef, Failure> {
        let entries = u64::from(self.raw.l1_size);
        if entries > limit::MAX_L1_ENTRIES {
            return Err(refuse::header(format!(
                "Active L1 table too large (header field l1_size is {entries}, at most {})",
                limit::MAX_L1_ENTRIES
            )));
        }
        let needed = self.geometry.l1_entries_for(size);
        if needed > limit::MAX_L1_ENTRIES {
            return Err(refuse::header(format!(
                "Image is too big (header field size is {size}, which needs {needed} L1 entries \
                 of at most {})",
                limit::MAX_L1_ENTRIES
            )));
        }
        if entries < needed {
            return Err(refuse::header(format!(
                "L1 table is too small (header field l1_size is {entries}, the virtual size \
                 needs {needed})"
            )));
        }
        let offset = self.raw.l1_offset;
        self.check_range("Active L1 table", "l1_table_offset", offset, entries * 8)?;
        Ok(TableRef {
            offset: HostOffset(offset),
            count: self.raw.l1_size,
        })
    }

    /// The refcount table.
    pub fn check_refcount_table(&self) -> Result<TableRef, Failure> {
        let clusters = u64::from(self.raw.refcount_table_clusters);
        if clusters == 0 {
            return Err(refuse::header(
                "Image does not contain a reference count table \
                 (header field refcount_table_clusters is 0)",
            ));
        }
        let len = clusters * self.geometry.cluster_size();
        if len > limit::MAX_REFCOUNT_TABLE_LEN.max(self.geometry.cluster_size()) {
            return Err(refuse::header(format!(
                "Reference count table too large (header field refcount_table_clusters is \
                 {clusters}, {len} bytes of at most {})",
                limit::MAX_REFCOUNT_TABLE_LEN
            )));
        }
        let offset = self.raw.refcount_table_offset;
        self.check_range(
            "Reference count table",
            "refcount_table_offset",
            offset,
            len,
        )?;
        Ok(TableRef {
            offset: HostOffset(offset),
            count: self.raw.refcount_table_clusters,
        })
    }

    /// The snapshot table, as far as its length is known before it is read.
    pub fn check_snapshots(&self) -> Result<TableRef, Failure> {
        let count = u64::from(self.raw.snapshots);
        if count > limit::MAX_SNAPSHOTS {
            return Err(refuse::header(format!(
                "Snapshot table too large (header field nb_snapshots is {count}, at most {})",
                limit::MAX_SNAPSHOTS
            )));
        }
        let least = count * snapshot::LEN as u64;
        let offset = self.raw.snapshots_offset;
        self.check_range("Snapshot table", "snapshots_offset", offset, least)?;
        Ok(TableRef {
            offset: HostOffset(offset),
            count: self.raw.snapshots,
        })
    }

    /// The encryption header's place, which LUKS needs and nothing else has.
    pub fn check_encryption(
        &self,
        place: Option<CryptoRef>,
    ) -> Result<Option<Encryption>, Failure> {
        match (self.raw.crypt_method, place) {
            (0, None) => Ok(None),
            (1, None) => Ok(Some(Encryption::Aes)),
            (2, Some(place)) => self.check_luks(place).map(Some),
            (2, None) => Err(refuse::header(
                "Missing CRYPTO header for crypt method 2 (LUKS)",
            )),
            (0 | 1, Some(_)) => Err(refuse::header(
                "CRYPTO header extension only expected with LUKS encryption method",
            )),
            (other, _) => Err(refuse::header(format!(
                "Unsupported encryption method {other} (header field crypt_method must be 0 to 2)"
            ))),
        }
    }

    fn check_luks(&self, place: CryptoRef) -> Result<Encryption, Failure> {
        let CryptoRef { offset, len } = place;
        let why = if len < luks::LEN as u64 {
            Some("shorter than a LUKS header")
        } else {
            refuse::misplaced(self.geometry, self.file_len, offset.0, len)
        };
        why.map_or(Ok(Encryption::Luks { header: offset }), |why| {
            Err(refuse::header(format!(
                "Encryption header offset invalid (crypto header extension: {offset}, {len} \
                 bytes: {why})"
            )))
        })
    }

    fn check_range(&self, what: &str, field: &str, offset: u64, len: u64) -> Result<(), Failure> {
        if len == 0 {
            return Ok(());
        }
        refuse::misplaced(self.geometry, self.file_len, offset, len).map_or(Ok(()), |why| {
            Err(refuse::header(format!(
                "{what} offset invalid (header field {field} is {offset:#x}, {len} bytes: {why})"
            )))
        })
    }
}
