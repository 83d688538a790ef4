//! The changes that are explored. Clusters and disks are small, so that a
//! change has few sectors and nearly all its states can be judged.

use crate::engine::Patch;
use instar_guest::Format;
use instar_guest::proto::Preallocation::{self, Falloc, Off};

const K: u64 = 1024;
const M: u64 = 1024 * K;

/// An image and a change to it.
pub struct Case {
    /// What the case is about.
    pub name: &'static str,
    /// The image's format.
    pub format: Format,
    /// Options for `qemu-img create -o`.
    pub options: &'static str,
    /// Virtual size in bytes.
    pub size: u64,
    /// Size of a backing image, and the lines that fill it.
    pub backing: Option<(u64, &'static [&'static str])>,
    /// Lines that fill the image.
    pub prepare: &'static [&'static str],
    /// Snapshots that have to stay as they are.
    pub snapshots: &'static [&'static str],
    /// Whether there are bitmaps that have to stay as they are.
    pub bitmaps: bool,
    /// Whether a state with the old disk is grown by qemu-img too, to see that
    /// nothing stale lies beyond the old end. Not where qemu-img itself exposes
    /// what was there before.
    pub foreign_grow: bool,
    /// Whether the commit makes visible what stages before it lay down.
    pub commit_depends: bool,
    /// Whether the change hooks new refcount blocks into the live table.
    pub hooks: bool,
    /// Barriers, counted from 0, that can go without a bad state.
    pub harmless_barriers: &'static [usize],
    /// What is asked.
    pub ask: Ask,
}

/// What is asked of the engine.
pub enum Ask {
    /// A larger size.
    Grow(u64, Preallocation),
    /// Guest writes, then a flush.
    Write(&'static [Patch]),
}

const BASIC: Case = Case {
    name: "",
    format: Format::Qcow2,
    options: "cluster_size=512",
    size: M,
    backing: None,
    prepare: &["io write -P 1 0 64k", "io write -P 2 900k 60k"],
    snapshots: &[],
    bitmaps: false,
    foreign_grow: false,
    commit_depends: false,
    hooks: false,
    harmless_barriers: &[],
    ask: Ask::Grow(4 * M, Off),
};

const fn patch(offset: u64, len: u64, value: u8) -> Patch {
    Patch { offset, len, value }
}

/// Grows: where tables have room, where they move, and what lies at the old end.
pub const GROWS: &[Case] = &[
    Case {
        name: "grow/L1 slack, 512",
        harmless_barriers: &[0],
        ask: Ask::Grow(2 * M, Off),
        ..BASIC
    },
    Case {
        name: "grow/L1 slack, 4K",
        options: "cluster_size=4096",
        harmless_barriers: &[0],
        ask: Ask::Grow(3 * M, Off),
        ..BASIC
    },
    Case {
        name: "grow/L1 slack that holds garbage",
        prepare: &["io write -P 1 0 64k", "slack 165"],
        commit_depends: true,
        ask: Ask::Grow(2 * M, Off),
        ..BASIC
    },
    Case {
        name: "grow/L1 moves",
        foreign_grow: true,
        commit_depends: true,
        ..BASIC
    },
    Case {
        name: "grow/new refblock, 64-bit counts",
        options: "cluster_size=512,refcount_bits=64",
        prepare: &["io write -P 1 0 300k"],
        commit_depends: true,
        ask: Ask::Grow(8 * M, Off),
        ..BASIC
    },
    Case {
        name: "grow/larger refcount table",
        options: "cluster_size=512,refcount_bits=64",
        size: 2 * M,
        prepare: &["io write -P 1 0 1982k"],
        commit_depends: true,
        ask: Ask::Grow(8 * M, Off),
        ..BASIC
    },
    Case {
        name: "grow/1-bit counts",
        options: "cluster_size=512,refcount_bits=1",
        prepare: &["io write -P 1 0 300k"],
        commit_depends: true,
        ask: Ask::Grow(8 * M, Off),
        ..BASIC
    },
    Case {
        name: "grow/2-bit counts",
        options: "cluster_size=512,refcount_bits=2",
        prepare: &["io write -P 1 0 300k"],
        commit_depends: true,
        ..BASIC
    },
    Case {
        name: "grow/4-bit counts",
        options: "cluster_size=512,refcount_bits=4",
        prepare: &["io write -P 1 0 300k"],
        commit_depends: true,
        ..BASIC
    },
    Case {
        name: "grow/8-bit counts",
        options: "cluster_size=512,refcount_bits=8",
        prepare: &["io write -P 1 0 300k"],
        commit_depends: true,
        ..BASIC
    },
    Case {
        name: "grow/32-bit counts",
        options: "cluster_size=512,refcount_bits=32",
        prepare: &["io write -P 1 0 300k"],
        commit_depends: true,
        ..BASIC
    },
    Case {
        name: "grow/4K, 64-bit counts, falloc over a refblock",
        options: "cluster_size=4096,refcount_bits=64",
        size: 2 * M,
        prepare: &["io write -P 1 0 1900k"],
        commit_depends: true,
        ask: Ask::Grow(3 * M, Falloc),
        ..BASIC
    },
    Case {
        name: "grow/version 2",
        options: "cluster_size=512,compat=0.10",
        prepare: &["io write -P 1 0 300k"],
        commit_depends: true,
        ask: Ask::Grow(8 * M, Off),
        ..BASIC
    },
    Case {
        name: "grow/extended L2",
        options: "cluster_size=16384,extended_l2=on",
        foreign_grow: true,
        ask: Ask::Grow(8 * M, Off),
        ..BASIC
    },
    Case {
        name: "grow/snapshot",
        prepare: &[
            "io write -P 1 0 300k",
            "img snapshot -c s1 @",
            "io write -P 2 100k 100k",
        ],
        snapshots: &["s1"],
        commit_depends: true,
        ..BASIC
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
        commit_depends: true,
        ask: Ask::Grow(8 * M, Off),
        ..BASIC
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
        commit_depends: true,
        ask: Ask::Grow(24 * M, Off),
        ..BASIC
    },
    Case {
        name: "grow/data file",
        options: "cluster_size=4096,data_file=data.raw",
        harmless_barriers: &[0],
        ask: Ask::Grow(3 * M, Off),
        ..BASIC
    },
    Case {
        name: "grow/data file, L1 moves",
        options: "cluster_size=512,data_file=data.raw",
        commit_depends: true,
        ..BASIC
    },
];

/// Grows where something lies beyond the old end, or is put there.
pub const ENDS: &[Case] = &[
    Case {
        name: "tail/stale bytes in the last cluster",
        options: "cluster_size=4096",
        prepare: &["io write -P 5 0 1M", "img resize -q --shrink @ 1047040"],
        commit_depends: true,
        ask: Ask::Grow(3 * M, Off),
        ..BASIC
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
        commit_depends: true,
        harmless_barriers: &[2],
        ask: Ask::Grow(3 * M, Off),
        ..BASIC
    },
    Case {
        name: "tail/extended L2",
        options: "cluster_size=16384,extended_l2=on",
        prepare: &["io write -P 5 0 1M", "img resize -q --shrink @ 1047040"],
        commit_depends: true,
        ask: Ask::Grow(3 * M, Off),
        ..BASIC
    },
    Case {
        name: "tail/compressed",
        options: "cluster_size=4096",
        prepare: &[
            "io write -c -P 5 960k 64k",
            "img resize -q --shrink @ 1047040",
        ],
        commit_depends: true,
        harmless_barriers: &[2],
        ask: Ask::Grow(3 * M, Off),
        ..BASIC
    },
    Case {
        name: "tail/entries beyond the end",
        options: "cluster_size=4096",
        size: 2 * M,
        prepare: &[
            "io write -P 1 0 64k",
            "io write -P 5 1040k 64k",
            "size 1048576",
        ],
        commit_depends: true,
        harmless_barriers: &[1],
        ask: Ask::Grow(3 * M, Off),
        ..BASIC
    },
    Case {
        name: "backing/longer than the image",
        options: "cluster_size=4096",
        size: 500 * K,
        backing: Some((2 * M, &["io write -P 9 0 2M"])),
        prepare: &["io write -P 1 0 64k"],
        foreign_grow: true,
        commit_depends: true,
        ask: Ask::Grow(3 * M, Off),
        ..BASIC
    },
    Case {
        name: "backing/longer, unaligned, 512",
        size: 100 * K + 512,
        backing: Some((300 * K, &["io write -P 9 0 300k"])),
        prepare: &["io write -P 1 0 10k"],
        commit_depends: true,
        ask: Ask::Grow(2 * M, Off),
        ..BASIC
    },
    Case {
        name: "backing/longer, unaligned, extended L2",
        options: "cluster_size=16384,extended_l2=on",
        size: 500 * K + 1536,
        backing: Some((2 * M, &["io write -P 9 0 2M"])),
        prepare: &["io write -P 1 0 64k"],
        commit_depends: true,
        ask: Ask::Grow(3 * M, Off),
        ..BASIC
    },
    Case {
        name: "backing/longer, falloc",
        options: "cluster_size=4096",
        size: 500 * K,
        backing: Some((M, &["io write -P 9 0 1M"])),
        prepare: &["io write -P 1 0 64k"],
        foreign_grow: true,
        commit_depends: true,
        ask: Ask::Grow(700 * K, Falloc),
        ..BASIC
    },
    Case {
        name: "falloc/512",
        size: 333 * 512,
        prepare: &["io write -P 1 0 100k", "io write -P 3 160k 5k"],
        foreign_grow: true,
        commit_depends: true,
        ask: Ask::Grow(1500 * K, Falloc),
        ..BASIC
    },
    Case {
        name: "falloc/4K",
        options: "cluster_size=4096",
        harmless_barriers: &[1],
        ask: Ask::Grow(3 * M, Falloc),
        ..BASIC
    },
    Case {
        name: "falloc/new refcount table",
        options: "cluster_size=512,refcount_bits=64",
        size: 600 * K,
        prepare: &["io write -P 1 0 300k"],
        commit_depends: true,
        ask: Ask::Grow(2600 * K, Falloc),
        ..BASIC
    },
    Case {
        name: "falloc/extended L2",
        options: "cluster_size=16384,extended_l2=on",
        harmless_barriers: &[1],
        ask: Ask::Grow(3 * M, Falloc),
        ..BASIC
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
        ..BASIC
    },
    Case {
        name: "write/in place and fresh",
        options: "cluster_size=4096",
        ask: Ask::Write(&[patch(62 * K, 6 * K, 7), patch(100 * K, K, 7)]),
        ..BASIC
    },
    Case {
        name: "write/copy from a snapshot",
        options: "cluster_size=4096",
        prepare: &["io write -P 1 0 300k", "img snapshot -c s1 @"],
        snapshots: &["s1"],
        ask: Ask::Write(&[patch(9 * K, 6 * K, 7), patch(400 * K, K, 7)]),
        ..BASIC
    },
    Case {
        name: "write/copy from a snapshot, 512",
        prepare: &["io write -P 1 0 300k", "img snapshot -c s1 @"],
        snapshots: &["s1"],
        ask: Ask::Write(&[patch(9 * K, 3 * K, 7), patch(100 * K, K, 7)]),
        ..BASIC
    },
    Case {
        name: "write/over compressed clusters",
        options: "cluster_size=4096",
        prepare: &["io write -c -P 1 0 64k"],
        ask: Ask::Write(&[patch(3 * K, 2 * K, 7), patch(16 * K, 8 * K, 7)]),
        ..BASIC
    },
    Case {
        name: "write/over compressed clusters, zstd",
        options: "cluster_size=4096,compression_type=zstd",
        prepare: &["io write -c -P 1 0 64k"],
        ask: Ask::Write(&[patch(3 * K, 2 * K, 7)]),
        ..BASIC
    },
    Case {
        name: "write/new refblocks",
        options: "cluster_size=512,refcount_bits=64",
        prepare: &["io write -P 1 0 100k"],
        hooks: true,
        ask: Ask::Write(&[patch(200 * K, 90 * K, 7)]),
        ..BASIC
    },
    Case {
        name: "write/larger refcount table",
        options: "cluster_size=512,refcount_bits=64",
        size: 3 * M,
        prepare: &["io write -P 1 0 1980k"],
        harmless_barriers: &[0, 3],
        hooks: true,
        ask: Ask::Write(&[patch(2 * M, 90 * K, 7)]),
        ..BASIC
    },
    Case {
        name: "write/1-bit counts",
        options: "cluster_size=512,refcount_bits=1",
        ask: Ask::Write(&[patch(70 * K, 3 * K, 7), patch(500 * K, 2 * K, 7)]),
        ..BASIC
    },
    Case {
        name: "write/over a backing image",
        options: "cluster_size=4096",
        backing: Some((M, &["io write -P 9 0 1M"])),
        ask: Ask::Write(&[patch(100 * K + 512, K, 7), patch(200 * K, 8 * K, 7)]),
        ..BASIC
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
        ..BASIC
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
        ..BASIC
    },
    Case {
        name: "write/version 2",
        options: "cluster_size=512,compat=0.10",
        ask: Ask::Write(&[patch(70 * K, 3 * K, 7), patch(500 * K, 2 * K, 7)]),
        ..BASIC
    },
    Case {
        name: "write/data file",
        options: "cluster_size=4096,data_file=data.raw",
        harmless_barriers: &[0],
        ask: Ask::Write(&[patch(62 * K, 6 * K, 7), patch(100 * K, K, 7)]),
        ..BASIC
    },
];

/// Raw files.
pub const RAW: &[Case] = &[
    Case {
        name: "raw/grow",
        format: Format::Raw,
        prepare: &["io write -P 1 0 64k"],
        ask: Ask::Grow(3 * M, Off),
        ..BASIC
    },
    Case {
        name: "raw/grow, falloc, odd size",
        format: Format::Raw,
        size: 1000,
        prepare: &["io write -P 1 0 512"],
        harmless_barriers: &[0],
        ask: Ask::Grow(5001, Falloc),
        ..BASIC
    },
];
