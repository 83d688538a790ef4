//! The changes of raw files that are explored.

use super::case::{Ask, BASIC, Case, Judges, M};
use instar_guest::Format;
use instar_guest::proto::Preallocation::{Falloc, Off};

/// A raw file is its disk.
const JUDGES: Judges = Judges {
    convert: true,
    ..Judges::NONE
};

/// What the cases of this page have in common.
const RAW: Case = Case {
    format: Format::Raw,
    judges: &JUDGES,
    ..BASIC
};

/// All of them.
pub const CASES: &[Case] = &[
    Case {
        name: "grow/plain",
        prepare: &["io write -P 1 0 64k"],
        ask: Ask::Grow(3 * M, Off),
        ..RAW
    },
    Case {
        name: "grow/falloc, odd size",
        size: 1000,
        prepare: &["io write -P 1 0 512"],
        ask: Ask::Grow(5001, Falloc),
        ..RAW
    },
];
