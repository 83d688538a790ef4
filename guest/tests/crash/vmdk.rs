//! The changes of vmdk images that are explored.

use super::case::{Ask, BASIC, Case, Judges, K, M, patch};
use super::readers::vmdk;
use instar_guest::Format;
use instar_guest::proto::Preallocation::{Falloc, Full, Metadata, Off};

/// Who judges the states.
const JUDGES: Judges = Judges {
    check: true,
    convert: true,
    readers: &[("a strict reader", vmdk::strictly)],
    naive_grow: Some(vmdk::grown_naively),
    ..Judges::NONE
};

/// What the cases of this page have in common.
const VMDK: Case = Case {
    format: Format::Vmdk,
    size: 3 * M,
    prepare: &["io write -P 1 0 64k", "io write -P 2 1900k 60k"],
    judges: &JUDGES,
    ..BASIC
};

/// Who judges guest writes: an entry and its redundant copy lie in two sectors,
/// and each leads to durable data or to none.
const WRITES: Judges = Judges {
    may_differ: true,
    ..JUDGES
};

/// A disk that ends inside a grain that holds data.
const ODD: Case = Case {
    size: 3 * M + 3 * 512,
    prepare: &[
        "io write -P 1 0 64k",
        "io write -P 2 1900k 60k",
        "io write -P 3 3072k 1536",
    ],
    ..VMDK
};

/// A disk whose last grains in the file belong to its beginning.
const BACKWARDS: Case = Case {
    size: 40 * M,
    prepare: &[
        "io write -P 2 39M 200k",
        "io write -P 3 20M 64k",
        "io write -P 4 5M 64k",
        "io write -P 5 1M 100k",
    ],
    ..VMDK
};

/// All of them.
pub const CASES: &[Case] = &[
    Case {
        name: "grow/inside the tables",
        ask: Ask::Grow(5 * M, Off),
        ..VMDK
    },
    Case {
        name: "grow/tables over grains",
        ask: Ask::Grow(900 * M, Off),
        ..VMDK
    },
    Case {
        name: "grow/from inside a grain",
        ask: Ask::Grow(5 * M, Off),
        ..ODD
    },
    Case {
        name: "grow/from inside a grain that is in the way",
        ask: Ask::Grow(900 * M, Off),
        ..ODD
    },
    Case {
        name: "grow/with zeroed grains",
        options: "zeroed_grain=on",
        prepare: &["io write -P 1 0 256k", "io write -z 64k 64k"],
        ask: Ask::Grow(900 * M + 512, Off),
        ..VMDK
    },
    Case {
        name: "grow/metadata",
        ask: Ask::Grow(5 * M, Metadata),
        ..ODD
    },
    Case {
        name: "grow/falloc",
        ask: Ask::Grow(40 * M, Falloc),
        ..VMDK
    },
    Case {
        name: "grow/full",
        ask: Ask::Grow(4 * M, Full),
        ..ODD
    },
    Case {
        name: "shrink/to empty space",
        ask: Ask::Shrink(2 * M),
        ..VMDK
    },
    Case {
        name: "shrink/through data",
        ask: Ask::Shrink(6 * M),
        ..BACKWARDS
    },
    Case {
        name: "shrink/through a grain",
        ask: Ask::Shrink(M + 3 * 512),
        ..BACKWARDS
    },
    Case {
        name: "shrink/through a grain that stays",
        ask: Ask::Shrink(39 * M + 5 * 512),
        ..BACKWARDS
    },
    Case {
        name: "write/into new grains and old ones",
        ask: Ask::Write(&[
            patch(100 * K, 200 * K, 7),
            patch(512, 1024, 8),
            patch(3 * M, 1536, 9),
        ]),
        judges: &WRITES,
        ..ODD
    },
    Case {
        name: "write/over zeroed grains",
        options: "zeroed_grain=on",
        prepare: &["io write -P 1 0 256k", "io write -z 64k 64k"],
        ask: Ask::Write(&[patch(70 * K, 1024, 7)]),
        judges: &WRITES,
        ..VMDK
    },
    Case {
        name: "write/into an extent",
        options: "subformat=twoGbMaxExtentSparse",
        ask: Ask::Write(&[patch(100 * K, 200 * K, 7)]),
        judges: &WRITES,
        ..VMDK
    },
    Case {
        name: "files/a flat one grows",
        options: "subformat=monolithicFlat",
        ask: Ask::Grow(5 * M, Off),
        ..VMDK
    },
    Case {
        name: "files/a flat one shrinks",
        options: "subformat=monolithicFlat",
        ask: Ask::Shrink(2 * M),
        ..VMDK
    },
    Case {
        name: "files/a split flat one grows",
        options: "subformat=twoGbMaxExtentFlat",
        ask: Ask::Grow(5 * M, Falloc),
        ..VMDK
    },
    Case {
        name: "files/a split sparse one grows",
        options: "subformat=twoGbMaxExtentSparse",
        ask: Ask::Grow(5 * M, Off),
        ..VMDK
    },
    Case {
        name: "files/a split sparse one grows from inside a grain",
        options: "subformat=twoGbMaxExtentSparse",
        ask: Ask::Grow(5 * M, Off),
        ..ODD
    },
    Case {
        name: "files/a split sparse one grows from inside a grain, full",
        options: "subformat=twoGbMaxExtentSparse",
        ask: Ask::Grow(4 * M, Full),
        ..ODD
    },
    Case {
        name: "files/a split sparse one grows, full",
        options: "subformat=twoGbMaxExtentSparse",
        ask: Ask::Grow(4 * M, Full),
        ..VMDK
    },
    Case {
        name: "files/a split sparse one shrinks inside an extent",
        size: 3 * M,
        options: "subformat=twoGbMaxExtentSparse",
        prepare: &[
            "io write -P 3 2M 64k",
            "io write -P 1 0 64k",
            "io write -P 2 1000k 200k",
        ],
        ask: Ask::Shrink(M + 37 * 512),
        ..VMDK
    },
];
