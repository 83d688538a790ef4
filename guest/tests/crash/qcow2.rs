//! The changes of qcow2 images that are explored.

use super::case::{Ask, BASIC, Case, Judges, K, M, patch};
use super::disk::Files;
use super::readers::qcow2::nothing_beyond;
use instar_guest::Format;
use instar_guest::proto::Preallocation::{Falloc, Metadata, Off};

/// qemu-img checks and reads the format, and grows it.
pub const JUDGES: Judges = Judges {
    check: true,
    convert: true,
    foreign_grow: true,
    beyond: Some(nothing_beyond),
    counts: true,
    length: true,
    ..Judges::NONE
};

/// What the cases of this page have in common.
pub const QCOW2: Case = Case {
    format: Format::Qcow2,
    options: "cluster_size=512",
    size: M,
    prepare: &["io write -P 1 0 64k", "io write -P 2 900k 60k"],
    judges: &JUDGES,
    ask: Ask::Grow(4 * M, Off),
    ..BASIC
};

/// Grows: where tables have room, where they move, and what lies at the old end.
pub const GROWS: &[Case] = &[
    Case {
        name: "grow/L1 slack, 512",
        ask: Ask::Grow(2 * M, Off),
        ..QCOW2
    },
    Case {
        name: "grow/L1 slack, 4K",
        options: "cluster_size=4096",
        ask: Ask::Grow(3 * M, Off),
        ..QCOW2
    },
    Case {
        name: "grow/L1 slack that holds garbage",
        prepare: &["io write -P 1 0 64k", "slack 165"],
        ask: Ask::Grow(2 * M, Off),
        ..QCOW2
    },
    Case {
        name: "grow/L1 moves",
        ..QCOW2
    },
    Case {
        name: "grow/new refblock, 64-bit counts",
        options: "cluster_size=512,refcount_bits=64",
        prepare: &["io write -P 1 0 300k"],
        ask: Ask::Grow(8 * M, Off),
        ..QCOW2
    },
    Case {
        name: "grow/larger refcount table",
        options: "cluster_size=512,refcount_bits=64",
        size: 2 * M,
        prepare: &["io write -P 1 0 1982k"],
        ask: Ask::Grow(8 * M, Off),
        ..QCOW2
    },
    Case {
        name: "grow/1-bit counts",
        options: "cluster_size=512,refcount_bits=1",
        prepare: &["io write -P 1 0 300k"],
        ask: Ask::Grow(8 * M, Off),
        ..QCOW2
    },
    Case {
        name: "grow/2-bit counts",
        options: "cluster_size=512,refcount_bits=2",
        prepare: &["io write -P 1 0 300k"],
        ..QCOW2
    },
    Case {
        name: "grow/4-bit counts",
        options: "cluster_size=512,refcount_bits=4",
        prepare: &["io write -P 1 0 300k"],
        ..QCOW2
    },
    Case {
        name: "grow/8-bit counts",
        options: "cluster_size=512,refcount_bits=8",
        prepare: &["io write -P 1 0 300k"],
        ..QCOW2
    },
    Case {
        name: "grow/32-bit counts",
        options: "cluster_size=512,refcount_bits=32",
        prepare: &["io write -P 1 0 300k"],
        ..QCOW2
    },
    Case {
        name: "grow/4K, 64-bit counts, falloc over a refblock",
        options: "cluster_size=4096,refcount_bits=64",
        size: 2 * M,
        prepare: &["io write -P 1 0 1900k"],
        ask: Ask::Grow(3 * M, Falloc),
        ..QCOW2
    },
    Case {
        name: "grow/version 2",
        options: "cluster_size=512,compat=0.10",
        prepare: &["io write -P 1 0 300k"],
        ask: Ask::Grow(8 * M, Off),
        ..QCOW2
    },
    Case {
        name: "grow/extended L2",
        options: "cluster_size=16384,extended_l2=on",
        ask: Ask::Grow(8 * M, Off),
        ..QCOW2
    },
    Case {
        name: "grow/snapshot",
        prepare: &[
            "io write -P 1 0 300k",
            "img snapshot -c s1 @",
            "io write -P 2 100k 100k",
        ],
        snapshots: &["s1"],
        ..QCOW2
    },
    Case {
        name: "grow/bitmaps",
        prepare: &[
            "io write -P 1 0 300k",
            "img bitmap --add -g 512 @ b0",
            "img bitmap --add -g 1024 @ b1",
            "io write -P 2 100k 100k",
            "img bitmap --disable @ b0",
            "img bitmap --disable @ b1",
        ],
        bitmaps: true,
        ask: Ask::Grow(8 * M, Off),
        ..QCOW2
    },
    Case {
        name: "grow/bitmaps, L1 slack",
        options: "cluster_size=4096",
        prepare: &[
            "io write -P 1 0 300k",
            "img bitmap --add -g 512 @ b0",
            "img bitmap --disable @ b0",
        ],
        bitmaps: true,
        ask: Ask::Grow(24 * M, Off),
        ..QCOW2
    },
    Case {
        name: "grow/data file",
        options: "cluster_size=4096,data_file=data.raw",
        ask: Ask::Grow(3 * M, Off),
        ..QCOW2
    },
    Case {
        name: "grow/data file, L1 moves",
        options: "cluster_size=512,data_file=data.raw",
        ..QCOW2
    },
];

/// Grows where something lies beyond the old end, or is put there.
pub const ENDS: &[Case] = &[
    Case {
        name: "tail/stale bytes in the last cluster",
        options: "cluster_size=4096",
        prepare: &["io write -P 5 0 1M", "img resize -q --shrink @ 1047040"],
        ask: Ask::Grow(3 * M, Off),
        ..QCOW2
    },
    Case {
        name: "tail/stale bytes, shared with a snapshot",
        options: "cluster_size=4096",
        prepare: &[
            "io write -P 5 0 1M",
            "img resize -q --shrink @ 1047040",
            "img snapshot -c s1 @",
        ],
        snapshots: &["s1"],
        ask: Ask::Grow(3 * M, Off),
        ..QCOW2
    },
    Case {
        name: "tail/extended L2",
        options: "cluster_size=16384,extended_l2=on",
        prepare: &["io write -P 5 0 1M", "img resize -q --shrink @ 1047040"],
        ask: Ask::Grow(3 * M, Off),
        ..QCOW2
    },
    Case {
        name: "tail/compressed",
        options: "cluster_size=4096",
        prepare: &[
            "io write -c -P 5 960k 64k",
            "img resize -q --shrink @ 1047040",
        ],
        ask: Ask::Grow(3 * M, Off),
        ..QCOW2
    },
    Case {
        name: "tail/entries beyond the end",
        options: "cluster_size=4096",
        size: 2 * M,
        prepare: &[
            "io write -P 5 1040k 64k",
            "io write -P 1 0 64k",
            "size 1048576",
        ],
        ask: Ask::Grow(3 * M, Off),
        ..QCOW2
    },
    Case {
        name: "backing/longer than the image",
        options: "cluster_size=4096",
        size: 500 * K,
        backing: Some((2 * M, &["io write -P 9 0 2M"])),
        prepare: &["io write -P 1 0 64k"],
        ask: Ask::Grow(3 * M, Off),
        ..QCOW2
    },
    Case {
        name: "backing/longer, unaligned, 512",
        size: 100 * K + 512,
        backing: Some((300 * K, &["io write -P 9 0 300k"])),
        prepare: &["io write -P 1 0 10k"],
        ask: Ask::Grow(2 * M, Off),
        ..QCOW2
    },
    Case {
        name: "backing/longer, unaligned, extended L2",
        options: "cluster_size=16384,extended_l2=on",
        size: 500 * K + 1536,
        backing: Some((2 * M, &["io write -P 9 0 2M"])),
        prepare: &["io write -P 1 0 64k"],
        ask: Ask::Grow(3 * M, Off),
        ..QCOW2
    },
    Case {
        name: "backing/longer, falloc",
        options: "cluster_size=4096",
        size: 500 * K,
        backing: Some((M, &["io write -P 9 0 1M"])),
        prepare: &["io write -P 1 0 64k"],
        ask: Ask::Grow(700 * K, Falloc),
        ..QCOW2
    },
    Case {
        name: "backing/longer, metadata, extended L2",
        options: "cluster_size=16384,extended_l2=on",
        size: 512 * K,
        backing: Some((2 * M, &["io write -P 9 0 2M"])),
        prepare: &["io write -P 1 0 64k"],
        ask: Ask::Grow(3 * M, Metadata),
        ..QCOW2
    },
    Case {
        name: "falloc/512",
        size: 333 * 512,
        prepare: &["io write -P 1 0 100k", "io write -P 3 160k 5k"],
        ask: Ask::Grow(1500 * K, Falloc),
        ..QCOW2
    },
    Case {
        name: "falloc/4K",
        options: "cluster_size=4096",
        ask: Ask::Grow(3 * M, Falloc),
        ..QCOW2
    },
    Case {
        name: "falloc/new refcount table",
        options: "cluster_size=512,refcount_bits=64",
        size: 600 * K,
        prepare: &["io write -P 1 0 300k"],
        ask: Ask::Grow(2600 * K, Falloc),
        ..QCOW2
    },
    Case {
        name: "falloc/extended L2",
        options: "cluster_size=16384,extended_l2=on",
        ask: Ask::Grow(3 * M, Falloc),
        ..QCOW2
    },
];

/// Guest writes that need new clusters, with one flush.
pub const WRITES: &[Case] = &[
    Case {
        name: "write/fresh clusters and L2 tables",
        ask: Ask::Write(&[
            patch(70 * K, 3 * K, 7),
            patch(200 * K, K, 7),
            patch(500 * K, 2 * K, 7),
        ]),
        ..QCOW2
    },
    Case {
        name: "write/in place and fresh",
        options: "cluster_size=4096",
        ask: Ask::Write(&[patch(62 * K, 6 * K, 7), patch(100 * K, K, 7)]),
        ..QCOW2
    },
    Case {
        name: "write/copy from a snapshot",
        options: "cluster_size=4096",
        prepare: &["io write -P 1 0 300k", "img snapshot -c s1 @"],
        snapshots: &["s1"],
        ask: Ask::Write(&[patch(9 * K, 6 * K, 7), patch(400 * K, K, 7)]),
        ..QCOW2
    },
    Case {
        name: "write/copy from a snapshot, 512",
        prepare: &["io write -P 1 0 300k", "img snapshot -c s1 @"],
        snapshots: &["s1"],
        ask: Ask::Write(&[patch(9 * K, 3 * K, 7), patch(100 * K, K, 7)]),
        ..QCOW2
    },
    Case {
        name: "write/over compressed clusters",
        options: "cluster_size=4096",
        prepare: &["io write -c -P 1 0 64k"],
        ask: Ask::Write(&[patch(3 * K, 2 * K, 7), patch(16 * K, 8 * K, 7)]),
        ..QCOW2
    },
    Case {
        name: "write/over compressed clusters, zstd",
        options: "cluster_size=4096,compression_type=zstd",
        prepare: &["io write -c -P 1 0 64k"],
        ask: Ask::Write(&[patch(3 * K, 2 * K, 7)]),
        ..QCOW2
    },
    Case {
        name: "write/new refblocks",
        options: "cluster_size=512,refcount_bits=64",
        prepare: &["io write -P 1 0 100k"],
        ask: Ask::Write(&[patch(200 * K, 90 * K, 7)]),
        ..QCOW2
    },
    Case {
        name: "write/larger refcount table",
        options: "cluster_size=512,refcount_bits=64",
        size: 3 * M,
        prepare: &["io write -P 1 0 1980k"],
        ask: Ask::Write(&[patch(2 * M, 90 * K, 7)]),
        ..QCOW2
    },
    Case {
        name: "write/1-bit counts",
        options: "cluster_size=512,refcount_bits=1",
        ask: Ask::Write(&[patch(70 * K, 3 * K, 7), patch(500 * K, 2 * K, 7)]),
        ..QCOW2
    },
    Case {
        name: "write/over a backing image",
        options: "cluster_size=4096",
        backing: Some((M, &["io write -P 9 0 1M"])),
        ask: Ask::Write(&[patch(100 * K + 512, K, 7), patch(200 * K, 8 * K, 7)]),
        ..QCOW2
    },
    Case {
        name: "write/extended L2",
        options: "cluster_size=16384,extended_l2=on",
        backing: Some((M, &["io write -P 9 0 1M"])),
        ask: Ask::Write(&[
            patch(100 * K, K, 7),
            patch(200 * K + 512, K, 7),
            patch(62 * K, 6 * K, 7),
        ]),
        ..QCOW2
    },
    Case {
        name: "write/zero clusters",
        options: "cluster_size=4096",
        prepare: &[
            "io write -P 1 0 64k",
            "io write -z 0 16k",
            "io write -z -u 16k 16k",
        ],
        ask: Ask::Write(&[patch(6 * K, K, 7), patch(18 * K, 4 * K, 7)]),
        ..QCOW2
    },
    Case {
        name: "write/version 2",
        options: "cluster_size=512,compat=0.10",
        ask: Ask::Write(&[patch(70 * K, 3 * K, 7), patch(500 * K, 2 * K, 7)]),
        ..QCOW2
    },
    Case {
        name: "write/data file",
        options: "cluster_size=4096,data_file=data.raw",
        tamper: Some(garbage_in_data_file),
        ask: Ask::Write(&[patch(62 * K, 6 * K, 7), patch(100 * K, K, 7)]),
        ..QCOW2
    },
];

/// What nothing refers to yet holds garbage.
fn garbage_in_data_file(files: &mut Files) -> Result<(), String> {
    let data = files.find("data.raw").ok_or("no data file")?;
    let garbage = vec![0xa5; (128 * K) as usize];
    files.bytes_mut(data).write(64 * K, &garbage);
    Ok(())
}
