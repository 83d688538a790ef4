//! The changes of qcow2 images that make them smaller or sound.

use super::case::{Ask, Case, Flag, Judges, K, M};
use super::disk::Files;
use super::qcow2::{JUDGES, QCOW2};
use instar_guest::findings::Repair;

/// What the image of these cases is called.
const IMAGE: &str = "image.qcow2";
/// Where the header has the refcount table, and an L1 table.
const TABLE: u64 = 48;
const L1: u64 = 40;
/// The bits of a table's entry that are an offset.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// The header's incompatible features, and the bit that says that the image is
/// corrupt.
const INCOMPATIBLE: u64 = 72;
const CORRUPT: u64 = 2;

/// The rest of the last cluster in a data file lies right behind what is kept of
/// it, at a fixed place of another file, and no step changes two files at once: it
/// goes after the commit, as it belongs to the old disk until then. In between
/// the image says that it is corrupt, so that nobody grows it.
pub const FLAGGED: Judges = Judges {
    flag: Some(Flag {
        is_set: |files, image| Ok(files.get(image)?.big::<8>(INCOMPATIBLE) & CORRUPT != 0),
        refusal: "Image is corrupt; cannot be opened read/write",
    }),
    ..JUDGES
};

/// Such a grow maps what it adds, as qemu always does in a raw data file, so that
/// the data file's bytes would show.
const GROWN_WITH_METADATA: Judges = Judges {
    grow_with: &["--preallocation=metadata"],
    ..FLAGGED
};

/// A full disk.
const FULL: Case = Case {
    options: "cluster_size=4096",
    prepare: &["io write -P 5 0 1M"],
    ask: Ask::Shrink(500 * K),
    ..QCOW2
};

/// Shrinks: what is cut off, and what lies at the new end.
pub const SHRINKS: &[Case] = &[
    Case {
        name: "shrink/to empty space",
        prepare: &["io write -P 1 0 64k"],
        ..FULL
    },
    Case {
        name: "shrink/through data",
        ..FULL
    },
    Case {
        name: "shrink/through data, 512",
        options: "cluster_size=512",
        ask: Ask::Shrink(300 * K),
        ..FULL
    },
    Case {
        name: "shrink/inside a cluster",
        ask: Ask::Shrink(500 * K + 1536),
        ..FULL
    },
    Case {
        name: "shrink/inside a cluster, shared with a snapshot",
        prepare: &["io write -P 5 0 1M", "img snapshot -c s1 @"],
        snapshots: &["s1"],
        ask: Ask::Shrink(500 * K + 1536),
        ..FULL
    },
    Case {
        name: "shrink/inside a compressed cluster",
        prepare: &["io write -c -P 5 448k 64k", "io write -P 6 600k 64k"],
        ask: Ask::Shrink(500 * K + 1536),
        ..FULL
    },
    Case {
        name: "shrink/inside a subcluster",
        options: "cluster_size=16384,extended_l2=on",
        ask: Ask::Shrink(500 * K + 1536),
        ..FULL
    },
    Case {
        name: "shrink/zero clusters",
        prepare: &["io write -P 5 0 1M", "io write -z 480k 64k"],
        ask: Ask::Shrink(500 * K + 1536),
        ..FULL
    },
    Case {
        name: "shrink/1-bit counts",
        options: "cluster_size=512,refcount_bits=1",
        prepare: &["io write -P 5 0 300k"],
        ask: Ask::Shrink(100 * K + 512),
        ..FULL
    },
    Case {
        name: "shrink/64-bit counts",
        options: "cluster_size=512,refcount_bits=64",
        prepare: &["io write -P 5 0 300k"],
        ask: Ask::Shrink(100 * K + 512),
        ..FULL
    },
    Case {
        name: "shrink/version 2",
        options: "cluster_size=4096,compat=0.10",
        ask: Ask::Shrink(500 * K + 1536),
        ..FULL
    },
    Case {
        name: "shrink/over a backing image",
        backing: Some((M, &["io write -P 9 0 1M"])),
        prepare: &["io write -P 5 400k 200k"],
        ask: Ask::Shrink(500 * K + 1536),
        ..FULL
    },
    Case {
        name: "shrink/bitmaps",
        options: "cluster_size=512",
        prepare: &[
            "io write -P 1 0 300k",
            "img bitmap --add -g 512 @ b0",
            "img bitmap --add -g 1024 @ b1",
            "io write -P 2 100k 100k",
            "img bitmap --disable @ b0",
            "img bitmap --disable @ b1",
        ],
        bitmaps: true,
        ask: Ask::Shrink(150 * K + 512),
        ..FULL
    },
    Case {
        name: "shrink/data file",
        options: "cluster_size=4096,data_file=data.raw",
        ask: Ask::Shrink(500 * K + 1536),
        judges: &FLAGGED,
        ..FULL
    },
    Case {
        name: "shrink/data file, whole clusters",
        options: "cluster_size=4096,data_file=data.raw",
        ask: Ask::Shrink(500 * K),
        judges: &FLAGGED,
        ..FULL
    },
    Case {
        name: "shrink/data file, whole tables",
        options: "cluster_size=512,data_file=data.raw",
        ask: Ask::Shrink(512 * K),
        judges: &GROWN_WITH_METADATA,
        ..FULL
    },
    Case {
        name: "shrink/data file, grown with metadata",
        options: "cluster_size=4096,data_file=data.raw",
        ask: Ask::Shrink(500 * K),
        judges: &GROWN_WITH_METADATA,
        ..FULL
    },
    Case {
        name: "shrink/data file, inside a cluster, grown with metadata",
        options: "cluster_size=4096,data_file=data.raw,preallocation=metadata",
        ask: Ask::Shrink(500 * K + 1536),
        judges: &GROWN_WITH_METADATA,
        ..FULL
    },
    Case {
        name: "shrink/raw data file",
        options: "cluster_size=4096,data_file=data.raw,data_file_raw=on",
        ask: Ask::Shrink(500 * K + 1536),
        judges: &FLAGGED,
        ..FULL
    },
    Case {
        name: "shrink/entries beyond the end",
        prepare: &[
            "io write -P 5 512k 512k",
            "io write -P 5 0 512k",
            "size 800768",
        ],
        ask: Ask::Shrink(500 * K + 1536),
        ..FULL
    },
];

/// Repairs.
pub const REPAIRS: &[Case] = &[
    Case {
        name: "repair/leaks",
        tamper: Some(lose_clusters),
        ask: Ask::Repair(Repair::Leaks),
        ..FULL
    },
    Case {
        name: "repair/all, leaks and counts of nothing",
        tamper: Some(lose_clusters_and_counts),
        ask: Ask::Repair(Repair::All),
        ..FULL
    },
    Case {
        name: "repair/all, flags",
        tamper: Some(lose_flags),
        ask: Ask::Repair(Repair::All),
        ..FULL
    },
    Case {
        name: "repair/all, no refcount block",
        tamper: Some(lose_refcount_block),
        ask: Ask::Repair(Repair::All),
        ..FULL
    },
];

/// The last clusters of the disk are not referred to any more.
fn lose_clusters(files: &mut Files) -> Result<(), String> {
    let l2 = l2_table(files)?;
    let image = files.find(IMAGE).ok_or("no image")?;
    files.bytes_mut(image).write(l2 + 200 * 8, &[0; 56 * 8]);
    Ok(())
}

/// And others are referred to, but not counted.
fn lose_clusters_and_counts(files: &mut Files) -> Result<(), String> {
    lose_clusters(files)?;
    let block = refcount_block(files)?;
    let image = files.find(IMAGE).ok_or("no image")?;
    files.bytes_mut(image).write(block + 2 * 20, &[0; 2 * 30]);
    Ok(())
}

/// Entries do not say that nothing else refers to their clusters.
fn lose_flags(files: &mut Files) -> Result<(), String> {
    let l2 = l2_table(files)?;
    let image = files.find(IMAGE).ok_or("no image")?;
    for entry in (0..100).map(|entry| l2 + 8 * entry) {
        files.bytes_mut(image).write(entry, &[0]);
    }
    Ok(())
}

/// Nothing is counted at all.
fn lose_refcount_block(files: &mut Files) -> Result<(), String> {
    let table = files.get(IMAGE)?.big::<8>(TABLE);
    let image = files.find(IMAGE).ok_or("no image")?;
    files.bytes_mut(image).write(table, &[0; 8]);
    Ok(())
}

fn refcount_block(files: &Files) -> Result<u64, String> {
    let image = files.get(IMAGE)?;
    Ok(image.big::<8>(image.big::<8>(TABLE)) & OFFSET)
}

/// The first L2 table.
fn l2_table(files: &Files) -> Result<u64, String> {
    let image = files.get(IMAGE)?;
    Ok(image.big::<8>(image.big::<8>(L1)) & OFFSET)
}
