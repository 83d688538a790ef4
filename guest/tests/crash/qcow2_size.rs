//! Shrinks of qcow2 images, and grows with every preallocation mode.

use super::case::{Ask, Case, K};
use super::qcow2::QCOW2;
use instar_guest::proto::Preallocation::{Full, Metadata};

/// Shrinks of what counts the clusters, and of what snapshots share.
pub const COUNTED: &[Case] = &[
    Case {
        name: "shrink/whole tables",
        ask: Ask::Shrink(512 * K),
        ..QCOW2
    },
    Case {
        name: "shrink/empty refcount blocks",
        options: "cluster_size=512,refcount_bits=64",
        prepare: &["io write -P 1 0 200k"],
        ask: Ask::Shrink(10 * K),
        ..QCOW2
    },
    Case {
        name: "shrink/empty refcount blocks that count others",
        options: "cluster_size=512,refcount_bits=64",
        size: 200 * K,
        prepare: &[
            "io write -P 1 0 20k",
            "img resize -q --preallocation=falloc @ 400k",
        ],
        ask: Ask::Shrink(21 * K),
        ..QCOW2
    },
    Case {
        name: "shrink/no room in the refcount blocks",
        options: "cluster_size=512,refcount_bits=64",
        size: 200 * K,
        prepare: &["io write -P 1 0 52k"],
        ask: Ask::Shrink(30 * K),
        ..QCOW2
    },
    Case {
        name: "shrink/compressed, one cluster of the file each",
        options: "cluster_size=4096",
        prepare: &["io write -c -P 1 0 64k", "io write -c -P 2 64k 64k"],
        ask: Ask::Shrink(65 * K),
        ..QCOW2
    },
    Case {
        name: "shrink/snapshot that shares all",
        options: "cluster_size=4096",
        prepare: &["io write -P 1 0 200k", "img snapshot -c s1 @"],
        snapshots: &["s1"],
        ask: Ask::Shrink(110 * K + 512),
        ..QCOW2
    },
    Case {
        name: "shrink/snapshot that shares the start",
        options: "cluster_size=4096",
        prepare: &[
            "io write -P 1 0 112k",
            "img snapshot -c s1 @",
            "io write -P 2 112k 100k",
        ],
        snapshots: &["s1"],
        ask: Ask::Shrink(110 * K + 512),
        ..QCOW2
    },
];

/// Grows that allocate what they add.
pub const ALLOCATES: &[Case] = &[
    Case {
        name: "allocate/metadata, 512",
        size: 333 * 512,
        prepare: &["io write -P 1 0 100k", "io write -P 3 160k 5k"],
        ask: Ask::Grow(1500 * K, Metadata),
        ..QCOW2
    },
    Case {
        name: "allocate/full, 4K",
        options: "cluster_size=4096",
        ask: Ask::Grow(1200 * K, Full),
        ..QCOW2
    },
    Case {
        name: "allocate/full, data file",
        options: "cluster_size=4096,data_file=data.raw",
        ask: Ask::Grow(1200 * K, Full),
        ..QCOW2
    },
];
