//! The changes of vhdx images that are explored.

use super::case::{Ask, BASIC, Case, Judges, M};
use super::readers::vhdx;
use instar_guest::Format;
use instar_guest::proto::Preallocation::Off;

/// Who judges the states.
const JUDGES: Judges = Judges {
    check: true,
    convert: true,
    replay: true,
    readers: &[("the second region table", vhdx::by_second_regions)],
    naive_grow: Some(vhdx::grown_naively),
    ..Judges::NONE
};

/// What the cases of this page have in common.
const VHDX: Case = Case {
    format: Format::Vhdx,
    options: "block_size=1M",
    size: 3 * M,
    prepare: &["io write -P 1 0 64k", "io write -P 2 1900k 60k"],
    judges: &JUDGES,
    ..BASIC
};

/// All of them.
pub const CASES: &[Case] = &[Case {
    name: "grow/inside the tables",
    ask: Ask::Grow(5 * M, Off),
    ..VHDX
}];
