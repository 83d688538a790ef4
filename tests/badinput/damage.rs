//! One hostile image per field that is validated, and what is said about it.

use crate::bytes::{bitmaps, directory, field, get64, l1, l2, put32, put64, reftable, snapshots};

/// Which uses of the image are refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// Every use.
    Everything,
    /// Using the mapping; facts are given.
    Mapping,
    /// Reading the disk; facts and mapping are given.
    Reading,
    /// Changing the size; facts and mapping are given.
    Resizing,
}

/// A hostile image.
pub struct Damage {
    /// What is wrong.
    pub name: &'static str,
    /// The kind of image that is damaged.
    pub kind: &'static str,
    /// The damage.
    pub edit: fn(&mut Vec<u8>),
    /// Which uses are refused.
    pub refused: Refused,
    /// What the refusal says, in lower case.
    pub says: &'static str,
}

const fn damage(
    name: &'static str,
    kind: &'static str,
    refused: Refused,
    says: &'static str,
    edit: fn(&mut Vec<u8>),
) -> Damage {
    Damage {
        name,
        kind,
        edit,
        refused,
        says,
    }
}

/// Damage that every use of the image comes upon.
const fn header(name: &'static str, says: &'static str, edit: fn(&mut Vec<u8>)) -> Damage {
    damage(name, "plain", Refused::Everything, says, edit)
}

/// An offset past the end of every image of the pool, aligned.
const FAR: u64 = 1 << 40;
/// The flag of an entry whose cluster nothing else refers to.
const COPIED: u64 = 1 << 63;
/// The flag of an L2 entry for a compressed cluster.
const COMPRESSED: u64 = 1 << 62;

/// Fields of the header.
pub const HEADER: &[Damage] = &[
    header("cut inside version 2's fields", "ends inside", |i| {
        i.truncate(71)
    }),
    header("cut inside version 3's fields", "ends inside", |i| {
        i.truncate(103)
    }),
    header("cut inside the L1 table", "l1_table_offset", |i| {
        let end = l1(i) - 1;
        i.truncate(end);
    }),
    header("version 0", "version", |i| put32(i, field::VERSION, 0)),
    header("version 1", "version", |i| put32(i, field::VERSION, 1)),
    header("version 4", "version", |i| put32(i, field::VERSION, 4)),
    header("version at its maximum", "version", |i| {
        put32(i, field::VERSION, u32::MAX)
    }),
    header("clusters of 256 bytes", "cluster_bits", |i| {
        put32(i, field::CLUSTER_BITS, 8)
    }),
    header("clusters of 4 MiB", "cluster_bits", |i| {
        put32(i, field::CLUSTER_BITS, 22)
    }),
    header("cluster_bits at its maximum", "cluster_bits", |i| {
        put32(i, field::CLUSTER_BITS, u32::MAX);
    }),
    damage(
        "extended L2 with 4 KiB clusters",
        "small",
        Refused::Everything,
        "cluster_bits",
        |i| {
            put64(i, field::INCOMPATIBLE, 1 << 4);
        },
    ),
    header("size above 2^63", "size", |i| {
        put64(i, field::SIZE, u64::MAX)
    }),
    header("size that the L1 table does not cover", "l1_size", |i| {
        put64(i, field::SIZE, 1 << 40);
    }),
    header("unknown encryption", "crypt_method", |i| {
        put32(i, field::CRYPT_METHOD, 3)
    }),
    header("L1 table of 16 GiB", "l1_size", |i| {
        put32(i, field::L1_SIZE, 0x7fff_ffff)
    }),
    header("L1 table without entries", "l1_size", |i| {
        put32(i, field::L1_SIZE, 0)
    }),
    header(
        "L1 table that does not fit into the file",
        "l1_table_offset",
        |i| {
            put32(i, field::L1_SIZE, 4 << 20);
        },
    ),
    header("L1 table misaligned", "l1_table_offset", |i| {
        let offset = l1(i) as u64 + 512;
        put64(i, field::L1_OFFSET, offset);
    }),
    header("L1 table past the end", "l1_table_offset", |i| {
        put64(i, field::L1_OFFSET, FAR)
    }),
    header(
        "L1 table at the end of the address space",
        "l1_table_offset",
        |i| {
            put64(i, field::L1_OFFSET, u64::MAX << 16);
        },
    ),
    header("L1 table on the header", "l1_table_offset", |i| {
        put64(i, field::L1_OFFSET, 0)
    }),
    header("L1 table on the refcount table", "overlaps", |i| {
        let offset = reftable(i) as u64;
        put64(i, field::L1_OFFSET, offset);
    }),
    header("refcount table misaligned", "refcount_table_offset", |i| {
        let offset = reftable(i) as u64 + 512;
        put64(i, field::REFTABLE_OFFSET, offset);
    }),
    header(
        "refcount table past the end",
        "refcount_table_offset",
        |i| {
            put64(i, field::REFTABLE_OFFSET, FAR);
        },
    ),
    header(
        "refcount table on the header",
        "refcount_table_offset",
        |i| {
            put64(i, field::REFTABLE_OFFSET, 0);
        },
    ),
    header(
        "refcount table without clusters",
        "refcount_table_clusters",
        |i| {
            put32(i, field::REFTABLE_CLUSTERS, 0);
        },
    ),
    header(
        "refcount table of 256 TiB",
        "refcount_table_clusters",
        |i| {
            put32(i, field::REFTABLE_CLUSTERS, u32::MAX);
        },
    ),
    header(
        "refcount table that does not fit into the file",
        "refcount_table_offset",
        |i| {
            put32(i, field::REFTABLE_CLUSTERS, 128);
        },
    ),
    header(
        "unknown incompatible feature",
        "incompatible_features",
        |i| {
            put64(i, field::INCOMPATIBLE, 1 << 5);
        },
    ),
    header(
        "the last incompatible feature",
        "incompatible_features",
        |i| {
            put64(i, field::INCOMPATIBLE, 1 << 63);
        },
    ),
    header("refcounts of 128 bits", "refcount_order", |i| {
        put32(i, field::REFCOUNT_ORDER, 7)
    }),
    header("refcount_order at its maximum", "refcount_order", |i| {
        put32(i, field::REFCOUNT_ORDER, u32::MAX);
    }),
    header("header shorter than version 3's", "header_length", |i| {
        put32(i, field::HEADER_LENGTH, 96);
    }),
    header("header longer than a cluster", "header_length", |i| {
        put32(i, field::HEADER_LENGTH, 0xffff_fff8);
    }),
    header("header of an odd length", "header_length", |i| {
        put32(i, field::HEADER_LENGTH, 109)
    }),
    header("unknown compression", "compression_type", |i| {
        i[field::COMPRESSION_TYPE] = 2
    }),
    header("zstd without its feature bit", "compression_type", |i| {
        i[field::COMPRESSION_TYPE] = 1;
    }),
    header("zlib with zstd's feature bit", "compression_type", |i| {
        put64(i, field::INCOMPATIBLE, 1 << 3);
    }),
    header("extension longer than the cluster", "extension", |i| {
        put32(i, field::EXTENSIONS + 4, 0xffff_fff0);
    }),
    header(
        "name of the backing file inside the header",
        "backing_file_offset",
        |i| {
            put64(i, field::BACKING_OFFSET, 64);
            put32(i, field::BACKING_SIZE, 8);
        },
    ),
    header(
        "name of the backing file behind the cluster",
        "backing_file_offset",
        |i| {
            put64(i, field::BACKING_OFFSET, 1 << 20);
            put32(i, field::BACKING_SIZE, 8);
        },
    ),
    header(
        "name of the backing file too long",
        "backing_file_size",
        |i| {
            put64(i, field::BACKING_OFFSET, 4096);
            put32(i, field::BACKING_SIZE, 1024);
        },
    ),
    header(
        "name of the backing file of 4 GiB",
        "backing_file_size",
        |i| {
            put64(i, field::BACKING_OFFSET, 4096);
            put32(i, field::BACKING_SIZE, u32::MAX);
        },
    ),
    damage(
        "the corrupt bit",
        "plain",
        Refused::Resizing,
        "corrupt",
        |i| {
            put64(i, field::INCOMPATIBLE, 1 << 1);
        },
    ),
];

/// Snapshot table and bitmap directory.
pub const LISTS: &[Damage] = &[
    header("4 billion snapshots", "nb_snapshots", |i| {
        put32(i, field::SNAPSHOTS, u32::MAX)
    }),
    header("snapshot table past the end", "snapshots_offset", |i| {
        put32(i, field::SNAPSHOTS, 1);
        put64(i, field::SNAPSHOTS_OFFSET, FAR);
    }),
    damage(
        "snapshot table misaligned",
        "snapshot",
        Refused::Everything,
        "snapshots_offset",
        |i| {
            let offset = snapshots(i) as u64 + 512;
            put64(i, field::SNAPSHOTS_OFFSET, offset);
        },
    ),
    damage(
        "snapshot with a name of 64 KiB",
        "snapshot",
        Refused::Everything,
        "snapshot",
        |i| {
            let at = snapshots(i) + 12;
            put32(i, at, u32::MAX);
        },
    ),
    damage(
        "snapshot with extra data of 4 GiB",
        "snapshot",
        Refused::Everything,
        "snapshot",
        |i| {
            let at = snapshots(i) + 36;
            put32(i, at, u32::MAX);
        },
    ),
    damage(
        "snapshot with its L1 table misaligned",
        "snapshot",
        Refused::Everything,
        "snapshot",
        |i| {
            let at = snapshots(i);
            put64(i, at, 513);
        },
    ),
    damage(
        "snapshot with an L1 table of 16 GiB",
        "snapshot",
        Refused::Everything,
        "snapshot",
        |i| {
            let at = snapshots(i) + 8;
            put32(i, at, 0x7fff_ffff);
        },
    ),
    damage(
        "bitmaps extension of another length",
        "bitmap",
        Refused::Everything,
        "bitmap",
        |i| {
            let at = bitmaps(i) - 4;
            put32(i, at, 16);
        },
    ),
    damage(
        "bitmaps extension, reserved field",
        "bitmap",
        Refused::Everything,
        "bitmap",
        |i| {
            let at = bitmaps(i) + 4;
            put32(i, at, 1);
        },
    ),
    damage(
        "bitmaps extension without bitmaps",
        "bitmap",
        Refused::Everything,
        "bitmap",
        |i| {
            let at = bitmaps(i);
            put32(i, at, 0);
        },
    ),
    damage(
        "4 billion bitmaps",
        "bitmap",
        Refused::Everything,
        "bitmap",
        |i| {
            let at = bitmaps(i);
            put32(i, at, u32::MAX);
        },
    ),
    damage(
        "bitmap directory misaligned",
        "bitmap",
        Refused::Everything,
        "bitmap",
        |i| {
            let at = bitmaps(i) + 16;
            let offset = directory(i) as u64 + 8;
            put64(i, at, offset);
        },
    ),
    damage(
        "bitmap directory past the end",
        "bitmap",
        Refused::Everything,
        "bitmap",
        |i| {
            let at = bitmaps(i) + 16;
            put64(i, at, FAR);
        },
    ),
    damage(
        "bitmap directory of 2^60 bytes",
        "bitmap",
        Refused::Everything,
        "bitmap",
        |i| {
            let at = bitmaps(i) + 8;
            put64(i, at, 1 << 60);
        },
    ),
    damage(
        "bitmap with a name of 64 KiB",
        "bitmap",
        Refused::Everything,
        "bitmap",
        |i| {
            let at = directory(i) + 16;
            let word = get64(i, at) | 0xffff << 32;
            put64(i, at, word);
        },
    ),
];

/// What tables hold: found when it is first used.
pub const TABLES: &[Damage] = &[
    damage(
        "L1 entry past the end",
        "plain",
        Refused::Mapping,
        "l2 table",
        |i| {
            let at = l1(i);
            put64(i, at, FAR | COPIED);
        },
    ),
    damage(
        "L1 entry misaligned",
        "plain",
        Refused::Mapping,
        "l2 table",
        |i| {
            let (at, entry) = (l1(i), l2(i) as u64 + 512);
            put64(i, at, entry | COPIED);
        },
    ),
    damage(
        "L1 entry that names the L1 table",
        "plain",
        Refused::Mapping,
        "l2 table",
        |i| {
            let at = l1(i);
            put64(i, at, at as u64 | COPIED);
        },
    ),
    damage(
        "L1 entry that names the refcount table",
        "plain",
        Refused::Mapping,
        "l2 table",
        |i| {
            let (at, entry) = (l1(i), reftable(i) as u64);
            put64(i, at, entry | COPIED);
        },
    ),
    damage(
        "L2 entry past the end",
        "plain",
        Refused::Mapping,
        "guest offset",
        |i| {
            let at = l2(i);
            put64(i, at, FAR | COPIED);
        },
    ),
    damage(
        "L2 entry misaligned",
        "plain",
        Refused::Mapping,
        "guest offset",
        |i| {
            let at = l2(i);
            let entry = get64(i, at) + 512;
            put64(i, at, entry);
        },
    ),
    damage(
        "L2 entry that names the L1 table",
        "plain",
        Refused::Mapping,
        "guest offset",
        |i| {
            let (at, entry) = (l2(i), l1(i) as u64);
            put64(i, at, entry | COPIED);
        },
    ),
    damage(
        "L2 entry that names its own table",
        "plain",
        Refused::Mapping,
        "guest offset",
        |i| {
            let at = l2(i);
            put64(i, at, at as u64 | COPIED);
        },
    ),
    damage(
        "L2 entry that names the refcount table",
        "plain",
        Refused::Mapping,
        "guest offset",
        |i| {
            let (at, entry) = (l2(i), reftable(i) as u64);
            put64(i, at, entry | COPIED);
        },
    ),
    damage(
        "compressed cluster past the end",
        "deflate",
        Refused::Reading,
        "guest offset",
        |i| {
            let at = l2(i);
            put64(i, at, COMPRESSED | FAR);
        },
    ),
    damage(
        "subcluster both allocated and zero",
        "extended",
        Refused::Mapping,
        "guest offset",
        |i| {
            let at = l2(i) + 8;
            put64(i, at, u64::MAX);
        },
    ),
    damage(
        "refcount block past the end",
        "small",
        Refused::Resizing,
        "refcount",
        |i| {
            let at = reftable(i);
            put64(i, at, FAR);
        },
    ),
    damage(
        "refcount block misaligned",
        "small",
        Refused::Resizing,
        "refcount",
        |i| {
            let at = reftable(i);
            let entry = get64(i, at) + 512;
            put64(i, at, entry);
        },
    ),
    damage(
        "refcount block that is the refcount table",
        "small",
        Refused::Resizing,
        "refcount",
        |i| {
            let at = reftable(i);
            put64(i, at, at as u64);
        },
    ),
];
