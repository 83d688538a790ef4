//! The header: as it was read, and as it was found to be valid.
//!
//! [`RawHeader`] is bytes turned into numbers. [`Header`] can only be made by
//! checking one, so whoever holds it need not check again.

use super::extensions::Extensions;
use super::format::{autoclear, compatible, header, incompatible, limit, refcount};
use super::geometry::Geometry;
use super::refuse;
use super::table_refs::TableRefs;
use crate::bytes::{self, OutOfBounds, be32, be64};
use crate::error::{Failure, FailureKind};
use crate::units::HostOffset;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

/// The fields as they stand in the file. Version 2 has no fields from
/// `incompatible` on; they get the values that mean the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RawHeader {
    pub version: u32,
    pub backing_offset: u64,
    pub backing_len: u32,
    pub cluster_bits: u32,
    pub size: u64,
    pub crypt_method: u32,
    pub l1_size: u32,
    pub l1_offset: u64,
    pub refcount_table_offset: u64,
    pub refcount_table_clusters: u32,
    pub snapshots: u32,
    pub snapshots_offset: u64,
    pub incompatible: u64,
    pub compatible: u64,
    pub autoclear: u64,
    pub refcount_order: u32,
    pub header_length: u32,
    pub compression_type: u8,
}

impl RawHeader {
    /// Reads the fields from the file's first bytes.
    pub fn read(head: &[u8]) -> Result<Self, Failure> {
        if be32(head, 0) != Ok(header::MAGIC_VALUE) {
            return Err(Failure::new(
                FailureKind::NotThisFormat,
                "Image is not in qcow2 format: it does not begin with the magic number QFI\\xfb; \
                 name its real format with -f",
            ));
        }
        Self::read_fields(head).map_err(|OutOfBounds { at }| {
            refuse::header(format!(
                "the file ends inside the qcow2 header, at byte {at}"
            ))
        })
    }

    fn read_fields(head: &[u8]) -> Result<Self, OutOfBounds> {
        let mut raw = Self {
            version: be32(head, header::VERSION)?,
            backing_offset: be64(head, header::BACKING_OFFSET)?,
            backing_len: be32(head, header::BACKING_LEN)?,
            cluster_bits: be32(head, header::CLUSTER_BITS)?,
            size: be64(head, header::SIZE)?,
            crypt_method: be32(head, header::CRYPT_METHOD)?,
            l1_size: be32(head, header::L1_SIZE)?,
            l1_offset: be64(head, header::L1_OFFSET)?,
            refcount_table_offset: be64(head, header::REFCOUNT_TABLE_OFFSET)?,
            refcount_table_clusters: be32(head, header::REFCOUNT_TABLE_CLUSTERS)?,
            snapshots: be32(head, header::SNAPSHOTS)?,
            snapshots_offset: be64(head, header::SNAPSHOTS_OFFSET)?,
            incompatible: 0,
            compatible: 0,
            autoclear: 0,
            refcount_order: refcount::V2_ORDER,
            header_length: header::V2_LEN as u32,
            compression_type: 0,
        };
        if raw.version >= 3 {
            raw.incompatible = be64(head, header::INCOMPATIBLE)?;
            raw.compatible = be64(head, header::COMPATIBLE)?;
            raw.autoclear = be64(head, header::AUTOCLEAR)?;
            raw.refcount_order = be32(head, header::REFCOUNT_ORDER)?;
            raw.header_length = be32(head, header::HEADER_LENGTH)?;
            if raw.header_length as usize > header::COMPRESSION_TYPE {
                raw.compression_type = bytes::byte(head, header::COMPRESSION_TYPE)?;
            }
        }
        Ok(raw)
    }
}

/// How compressed clusters are packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// A raw deflate stream, window 4 KiB.
    Deflate,
    /// zstd frames.
    Zstd,
}

/// How data clusters are encrypted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encryption {
    /// QEMU's old AES-CBC.
    Aes,
    /// LUKS.
    Luks {
        /// Where its header lies: cluster aligned, inside the file.
        header: HostOffset,
    },
}

/// A table that the header refers to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TableRef {
    /// Cluster aligned, behind the header, inside the file.
    pub offset: HostOffset,
    /// Length in the header field's own unit: entries of the L1 table,
    /// clusters of the refcount table, snapshots of the snapshot table.
    pub count: u32,
}

/// A header that passed every check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// Cluster size, entry size, refcount width.
    pub geometry: Geometry,
    /// Virtual size in bytes, rounded down to a sector as QEMU does.
    pub size: u64,
    /// Name of the backing image as it stands in the file.
    pub backing_name: Option<Vec<u8>>,
    /// Encryption of the data, if any.
    pub encryption: Option<Encryption>,
    /// The active L1 table; the offset has no meaning if it has no entries.
    pub l1: TableRef,
    /// The refcount table.
    pub refcount_table: TableRef,
    /// The snapshot table; the offset has no meaning if there are none.
    pub snapshots: TableRef,
    /// Incompatible feature bits, all known.
    pub incompatible: u64,
    /// Compatible feature bits, unknown ones included.
    pub compatible: u64,
    /// Autoclear feature bits, unknown ones included.
    pub autoclear: u64,
    /// Length of the header; the extensions follow.
    pub header_length: u32,
    /// How compressed clusters are packed.
    pub compression: Compression,
    /// The header extensions, unknown ones included, in file order.
    pub extensions: Extensions,
}

impl Header {
    /// Checks a header. `cluster` is the beginning of the file at least as far
    /// as [`Extensions::area_len`] says; bytes past the end of the file are
    /// zero or missing.
    pub fn validate(raw: &RawHeader, cluster: &[u8], file_len: u64) -> Result<Self, Failure> {
        check_version(raw)?;
        let geometry = check_geometry(raw)?;
        check_header_length(raw, geometry)?;
        let extensions = Extensions::parse(cluster, raw, geometry)?;
        check_features(raw, &extensions)?;
        let compression = check_compression(raw)?;
        let size = check_size(raw)?;
        let backing_name = check_backing(raw, cluster, geometry)?;
        let tables = TableRefs {
            geometry,
            file_len,
            raw,
        };
        Ok(Self {
            version: raw.version,
            geometry,
            size,
            backing_name,
            encryption: tables.check_encryption(extensions.crypto()?)?,
            l1: tables.check_l1(size)?,
            refcount_table: tables.check_refcount_table()?,
            snapshots: tables.check_snapshots()?,
            incompatible: raw.incompatible,
            compatible: raw.compatible,
            autoclear: raw.autoclear,
            header_length: raw.header_length,
            compression,
            extensions,
        })
    }

    /// Whether refcounts may be wrong.
    pub fn is_dirty(&self) -> bool {
        self.incompatible & incompatible::DIRTY != 0
    }

    /// Whether the image is marked as corrupt.
    pub fn is_corrupt(&self) -> bool {
        self.incompatible & incompatible::CORRUPT != 0
    }

    /// Whether data lies in a separate file.
    pub fn has_data_file(&self) -> bool {
        self.incompatible & incompatible::DATA_FILE != 0
    }

    /// Whether the data file alone is the whole disk.
    pub fn has_raw_data_file(&self) -> bool {
        self.has_data_file() && self.autoclear & autoclear::RAW_DATA_FILE != 0
    }

    /// Whether refcounts may be written late, under the dirty bit.
    pub fn has_lazy_refcounts(&self) -> bool {
        self.compatible & compatible::LAZY_REFCOUNTS != 0
    }
}

/// The cluster size, where it is valid: what must be known before the header
/// can be read whole.
pub fn check_geometry(raw: &RawHeader) -> Result<Geometry, Failure> {
    let bits = raw.cluster_bits;
    if !(limit::MIN_CLUSTER_BITS..=limit::MAX_CLUSTER_BITS).contains(&bits) {
        return Err(refuse::header(format!(
            "Unsupported cluster size: 2^{bits} (header field cluster_bits must be 9 to 21)"
        )));
    }
    let extended = raw.incompatible & incompatible::EXTENDED_L2 != 0;
    if extended && bits < limit::MIN_EXTENDED_CLUSTER_BITS {
        return Err(refuse::header(format!(
            "Extended L2 entries are only supported with cluster sizes of at least 16384 bytes \
             (header field cluster_bits is {bits})"
        )));
    }
    if raw.refcount_order > refcount::MAX_ORDER {
        return Err(refuse::header(format!(
            "Reference count entry width too large; may not exceed 64 bits \
             (header field refcount_order is {})",
            raw.refcount_order
        )));
    }
    Ok(Geometry::new(bits, extended, raw.refcount_order))
}

/// The version, which decides which fields exist.
pub fn check_version(raw: &RawHeader) -> Result<(), Failure> {
    match raw.version {
        2 | 3 => Ok(()),
        1 => Err(Failure::new(
            FailureKind::Unsupported,
            "qcow version 1 is not supported; convert the image with `qemu-img convert -O qcow2`",
        )),
        version => Err(Failure::new(
            FailureKind::Unsupported,
            format!(
                "Unsupported qcow2 version {version} (header field version must be 2 or 3); \
                 use the program that made the image"
            ),
        )),
    }
}

fn check_header_length(raw: &RawHeader, geometry: Geometry) -> Result<(), Failure> {
    let len = raw.header_length;
    if raw.version == 2 {
        return Ok(());
    }
    let why = if (len as usize) < header::V3_MIN_LEN {
        "qcow2 header too short"
    } else if u64::from(len) > geometry.cluster_size() {
        "qcow2 header exceeds cluster size"
    } else if !len.is_multiple_of(8) {
        "qcow2 header length is not a multiple of 8"
    } else {
        return Ok(());
    };
    Err(refuse::header(format!(
        "{why} (header field header_length is {len})"
    )))
}

fn check_features(raw: &RawHeader, extensions: &Extensions) -> Result<(), Failure> {
    let unknown = raw.incompatible & !incompatible::KNOWN;
    if unknown == 0 {
        return Ok(());
    }
    let mut names: Vec<String> = Vec::new();
    let mut unnamed = unknown;
    for (bit, name) in extensions.incompatible_feature_names() {
        let mask = 1u64.checked_shl(u32::from(bit)).unwrap_or(0);
        if unnamed & mask != 0 {
            names.push(name);
            unnamed &= !mask;
        }
    }
    if unnamed != 0 {
        names.push(format!("Unknown incompatible feature: {unnamed:x}"));
    }
    Err(Failure::new(
        FailureKind::Unsupported,
        format!(
            "Unsupported qcow2 feature(s): {} (header field incompatible_features is {:#x}); \
             use the program that made the image",
            names.join(", "),
            raw.incompatible
        ),
    ))
}

fn check_compression(raw: &RawHeader) -> Result<Compression, Failure> {
    let flagged = raw.incompatible & incompatible::COMPRESSION != 0;
    match (raw.compression_type, flagged) {
        (0, false) => Ok(Compression::Deflate),
        (1, true) => Ok(Compression::Zstd),
        (0, true) => Err(refuse::header(
            "Compression type incompatible feature bit must not be set \
             (header field compression_type is 0)",
        )),
        (1, false) => Err(refuse::header(
            "Compression type incompatible feature bit must be set \
             (header field compression_type is 1)",
        )),
        (other, _) => Err(Failure::new(
            FailureKind::Unsupported,
            format!(
                "qcow2: unknown compression type: {other} (header field compression_type must be \
                 0 for zlib or 1 for zstd); use the program that made the image"
            ),
        )),
    }
}

/// The size as QEMU sees it: whole sectors, below 2^63.
fn check_size(raw: &RawHeader) -> Result<u64, Failure> {
    if i64::try_from(raw.size).is_err() {
        return Err(refuse::header(format!(
            "Image is too big (header field size is {})",
            raw.size
        )));
    }
    Ok(raw.size - raw.size % crate::plan::SECTOR)
}

fn check_backing(
    raw: &RawHeader,
    cluster: &[u8],
    geometry: Geometry,
) -> Result<Option<Vec<u8>>, Failure> {
    if raw.backing_offset == 0 {
        return Ok(None);
    }
    let room = geometry.cluster_size().checked_sub(raw.backing_offset);
    let Some(room) = room.filter(|_| raw.backing_offset >= u64::from(raw.header_length)) else {
        return Err(refuse::header(format!(
            "Invalid backing file offset (header field backing_file_offset is {:#x}, outside \
             the first cluster or inside the header)",
            raw.backing_offset
        )));
    };
    let len = u64::from(raw.backing_len);
    if len > room.min(limit::MAX_BACKING_NAME) {
        return Err(refuse::header(format!(
            "Backing file name too long (header field backing_file_size is {len}, at most {} \
             fit)",
            room.min(limit::MAX_BACKING_NAME)
        )));
    }
    if len == 0 {
        return Ok(None);
    }
    bytes::slice(cluster, raw.backing_offset as usize, len as usize)
        .map(|name| Some(name.to_vec()))
        .map_err(|_| refuse::header("the file ends inside the name of the backing file"))
}
