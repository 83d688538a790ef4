//! Shrinks of full qcow2 images: what lies at the new end.

use super::case::{Ask, Case, K};
use super::qcow2::QCOW2;

/// A full disk.
const FULL: Case = Case {
    options: "cluster_size=4096",
    prepare: &["io write -P 5 0 1M"],
    ask: Ask::Shrink(500 * K),
    ..QCOW2
};

/// All of them.
pub const SHRINKS: &[Case] = &[
    Case {
        name: "shrink/to empty space",
        prepare: &["io write -P 1 0 64k"],
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
        name: "shrink/64-bit counts",
        options: "cluster_size=512,refcount_bits=64",
        prepare: &["io write -P 5 0 300k"],
        ask: Ask::Shrink(100 * K + 512),
        ..FULL
    },
    Case {
        name: "shrink/entries beyond the end",
        prepare: &["io write -P 5 0 1M", "size 800768"],
        ask: Ask::Shrink(500 * K + 1536),
        ..FULL
    },
];
