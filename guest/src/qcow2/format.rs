//! qcow2 as it lies on disk: field offsets, bits, limits. No logic.
//!
//! Sections are those of QEMU's `docs/interop/qcow2.rst`. Every number is big
//! endian. Where a limit is not the specification's, the comment says whose it
//! is and why it is kept.

/// "Header": the fields and their byte offsets in the file.
pub mod header {
    /// `QFI\xfb`.
    pub const MAGIC_VALUE: u32 = 0x5146_49fb;
    /// u32, 2 or 3.
    pub const VERSION: usize = 4;
    /// u64, offset of the backing file's name, 0 for none.
    pub const BACKING_OFFSET: usize = 8;
    /// u32, length of the name in bytes, at most 1023.
    pub const BACKING_LEN: usize = 16;
    /// u32.
    pub const CLUSTER_BITS: usize = 20;
    /// u64, virtual size in bytes.
    pub const SIZE: usize = 24;
    /// u32: 0 none, 1 AES, 2 LUKS.
    pub const CRYPT_METHOD: usize = 32;
    /// u32, entries of the active L1 table.
    pub const L1_SIZE: usize = 36;
    /// u64, cluster aligned.
    pub const L1_OFFSET: usize = 40;
    /// u64, cluster aligned.
    pub const REFCOUNT_TABLE_OFFSET: usize = 48;
    /// u32, clusters that the refcount table occupies.
    pub const REFCOUNT_TABLE_CLUSTERS: usize = 56;
    /// u32, internal snapshots.
    pub const SNAPSHOTS: usize = 60;
    /// u64, cluster aligned.
    pub const SNAPSHOTS_OFFSET: usize = 64;
    /// Length of a version 2 header, which ends here.
    pub const V2_LEN: usize = 72;
    /// u64, version 3 from here on.
    pub const INCOMPATIBLE: usize = 72;
    /// u64.
    pub const COMPATIBLE: usize = 80;
    /// u64.
    pub const AUTOCLEAR: usize = 88;
    /// u32, log2 of the refcount's width in bits.
    pub const REFCOUNT_ORDER: usize = 96;
    /// u32, length of the header, where the extensions begin.
    pub const HEADER_LENGTH: usize = 100;
    /// Shortest version 3 header.
    pub const V3_MIN_LEN: usize = 104;
    /// u8: 0 deflate, 1 zstd. Present if the header is longer than 104 bytes.
    pub const COMPRESSION_TYPE: usize = 104;
    /// Length of the header that QEMU writes today.
    pub const V3_LEN: usize = 112;
}

/// "Header": incompatible feature bits.
pub mod incompatible {
    /// Refcounts may be wrong.
    pub const DIRTY: u64 = 1 << 0;
    /// Some metadata is known to be wrong.
    pub const CORRUPT: u64 = 1 << 1;
    /// Data lies in a separate file.
    pub const DATA_FILE: u64 = 1 << 2;
    /// The compression type is not deflate.
    pub const COMPRESSION: u64 = 1 << 3;
    /// L2 entries are 128 bits wide and have subclusters.
    pub const EXTENDED_L2: u64 = 1 << 4;
    /// Every bit that instar knows.
    pub const KNOWN: u64 = DIRTY | CORRUPT | DATA_FILE | COMPRESSION | EXTENDED_L2;
}

/// "Header": compatible feature bits.
pub mod compatible {
    /// Refcounts may be written late, under the dirty bit.
    pub const LAZY_REFCOUNTS: u64 = 1 << 0;
}

/// "Header": autoclear feature bits. A writer clears those it does not know.
pub mod autoclear {
    /// The bitmaps extension is consistent.
    pub const BITMAPS: u64 = 1 << 0;
    /// The data file can be read as a raw image.
    pub const RAW_DATA_FILE: u64 = 1 << 1;
    /// Every bit that instar knows.
    pub const KNOWN: u64 = BITMAPS | RAW_DATA_FILE;
}

/// "Header extensions": type u32, length u32, data padded to 8 bytes.
pub mod extension {
    /// Ends the list.
    pub const END: u32 = 0;
    /// Name of the backing file's format.
    pub const BACKING_FORMAT: u32 = 0xe279_2aca;
    /// Names of feature bits: 48-byte records.
    pub const FEATURE_NAMES: u32 = 0x6803_f857;
    /// The bitmap directory's place.
    pub const BITMAPS: u32 = 0x2385_2875;
    /// The encryption header's place.
    pub const CRYPTO: u32 = 0x0537_be77;
    /// Name of the data file.
    pub const DATA_FILE: u32 = 0x4441_5441;
    /// Type and length.
    pub const HEADER_LEN: usize = 8;
    /// Data length of [`BITMAPS`]: count u32, 0 u32, directory size u64 and
    /// offset u64.
    pub const BITMAPS_LEN: usize = 24;
    /// Data length of [`CRYPTO`]: offset u64, length u64.
    pub const CRYPTO_LEN: usize = 16;
    /// One record of [`FEATURE_NAMES`]: type u8, bit u8, name.
    pub const FEATURE_NAME_LEN: usize = 48;
}

/// "L1 table", "L2 table": entries.
pub mod entry {
    /// Bytes of an L1 entry, and of an L2 entry without subclusters.
    pub const LEN: u64 = 8;
    /// Bytes of an extended L2 entry: the entry, then the subclusters' bits.
    pub const EXTENDED_LEN: u64 = 16;
    /// The refcount of what the entry refers to is exactly one.
    pub const COPIED: u64 = 1 << 63;
    /// The rest of the entry describes compressed data.
    pub const COMPRESSED: u64 = 1 << 62;
    /// The cluster reads as zeroes (version 3, not with extended L2).
    pub const ZERO: u64 = 1;
    /// Bits 9 to 55: a host offset.
    pub const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
    /// Subclusters of a cluster with extended L2.
    pub const SUBCLUSTERS: u64 = 32;
    /// Unit in which the length of compressed data is counted.
    pub const COMPRESSED_SECTOR: u64 = 512;
}

/// "Refcount table": entries.
pub mod refcount {
    /// Bytes of a refcount table entry.
    pub const ENTRY_LEN: u64 = 8;
    /// Bits 9 to 63: offset of a refcount block.
    pub const OFFSET: u64 = 0xffff_ffff_ffff_fe00;
    /// Width of version 2: 16 bits.
    pub const V2_ORDER: u32 = 4;
    /// Widest: 64 bits.
    pub const MAX_ORDER: u32 = 6;
}

/// "Snapshots": the entry, 8-byte aligned, followed by extra data, id, name.
pub mod snapshot {
    /// u64.
    pub const L1_OFFSET: usize = 0;
    /// u32, entries.
    pub const L1_SIZE: usize = 8;
    /// u16, length of the id.
    pub const ID_LEN: usize = 12;
    /// u16, length of the name.
    pub const NAME_LEN: usize = 14;
    /// u32, seconds since the epoch.
    pub const DATE_SEC: usize = 16;
    /// u32.
    pub const DATE_NSEC: usize = 20;
    /// u64, nanoseconds that the machine had run.
    pub const VM_CLOCK: usize = 24;
    /// u32, bytes of VM state; the extra data has the same in 64 bits.
    pub const VM_STATE_SIZE: usize = 32;
    /// u32, length of the extra data.
    pub const EXTRA_LEN: usize = 36;
    /// Length of the fixed part.
    pub const LEN: usize = 40;
    /// u64 in the extra data: bytes of VM state.
    pub const EXTRA_VM_STATE_SIZE: usize = 0;
    /// u64 in the extra data: virtual size when the snapshot was taken.
    pub const EXTRA_DISK_SIZE: usize = 8;
    /// u64 in the extra data: instruction count, all ones for none.
    pub const EXTRA_ICOUNT: usize = 16;
}

/// "Bitmaps": the directory entry, 8-byte aligned, followed by extra data and
/// name.
pub mod bitmap {
    /// u64, cluster aligned.
    pub const TABLE_OFFSET: usize = 0;
    /// u32, entries of the bitmap table.
    pub const TABLE_SIZE: usize = 8;
    /// u32.
    pub const FLAGS: usize = 12;
    /// u8, 1 for a dirty-tracking bitmap.
    pub const TYPE: usize = 16;
    /// u8, log2 of the bytes that one bit stands for.
    pub const GRANULARITY_BITS: usize = 17;
    /// u16, length of the name.
    pub const NAME_LEN: usize = 18;
    /// u32, length of the extra data.
    pub const EXTRA_LEN: usize = 20;
    /// Length of the fixed part.
    pub const LEN: usize = 24;
    /// Flag: was not saved correctly, or is in use by a writer.
    pub const IN_USE: u32 = 1 << 0;
    /// Flag: every writer has to track its writes in the bitmap.
    pub const AUTO: u32 = 1 << 1;
    /// Flag: unknown extra data may be ignored.
    pub const EXTRA_COMPATIBLE: u32 = 1 << 2;
    /// Every flag that the specification defines.
    pub const KNOWN_FLAGS: u32 = IN_USE | AUTO | EXTRA_COMPATIBLE;
    /// The only type.
    pub const DIRTY_TRACKING: u8 = 1;
}

/// Limits. Where they are QEMU's, an image past them opens nowhere else either.
pub mod limit {
    /// 512 bytes, the specification's minimum.
    pub const MIN_CLUSTER_BITS: u32 = 9;
    /// 2 MiB, QEMU's maximum.
    pub const MAX_CLUSTER_BITS: u32 = 21;
    /// 16 KiB: a subcluster is at least a sector.
    pub const MIN_EXTENDED_CLUSTER_BITS: u32 = 14;
    /// 32 MiB of active L1 table, QEMU's.
    pub const MAX_L1_ENTRIES: u64 = 4 << 20;
    /// 8 MiB of refcount table, QEMU's.
    pub const MAX_REFCOUNT_TABLE_LEN: u64 = 8 << 20;
    /// The specification's.
    pub const MAX_BACKING_NAME: u64 = 1023;
    /// QEMU's, of the name of the backing file's format.
    pub const MAX_BACKING_FORMAT: usize = 15;
    /// The longest path that a host can open.
    pub const MAX_DATA_FILE_NAME: usize = 4095;
    /// QEMU's.
    pub const MAX_SNAPSHOTS: u64 = 65536;
    /// QEMU's, of extra data per snapshot.
    pub const MAX_SNAPSHOT_EXTRA: u64 = 1024;
    /// QEMU's.
    pub const MAX_BITMAPS: u64 = 65535;
    /// The specification's.
    pub const MAX_BITMAP_NAME: u64 = 1023;
    /// QEMU's, of entries of one bitmap table.
    pub const MAX_BITMAP_TABLE: u64 = 0x800_0000;
    /// QEMU's.
    pub const MIN_GRANULARITY_BITS: u32 = 9;
    /// QEMU's.
    pub const MAX_GRANULARITY_BITS: u32 = 31;
    /// Bytes of a snapshot table or bitmap directory. QEMU's limit is 64 MiB,
    /// which neither fits into a reply nor occurs: this is 6 MiB, 96 bytes for
    /// each of the most snapshots.
    pub const MAX_DIRECTORY_LEN: u64 = 6 << 20;
    /// Bytes of names in a snapshot table or bitmap directory, so that the
    /// facts fit into a reply: 32 for each of the most snapshots.
    pub const MAX_NAMES_LEN: usize = 2 << 20;
}

const _: () = {
    assert!(header::V2_LEN == header::SNAPSHOTS_OFFSET + 8);
    assert!(header::V3_MIN_LEN == header::HEADER_LENGTH + 4);
    assert!(header::V3_LEN.is_multiple_of(8));
    assert!(snapshot::LEN == snapshot::EXTRA_LEN + 4);
    assert!(bitmap::LEN == bitmap::EXTRA_LEN + 4);
    assert!(entry::LEN * limit::MAX_L1_ENTRIES == 32 << 20);
    assert!(1u64 << (limit::MIN_EXTENDED_CLUSTER_BITS) == 512 * entry::SUBCLUSTERS);
};
