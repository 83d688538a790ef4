//! The changes of vhd images that are explored.

use super::case::{Ask, BASIC, Case, Judges, M};
use super::readers::vhd;
use instar_guest::Format;
use instar_guest::proto::Preallocation::Off;

/// Who judges the states.
const JUDGES: Judges = Judges {
    check: false,
    convert: true,
    readers: &[("the footer at the end", vhd::by_last_footer)],
    may_differ: true,
    naive_grow: Some(vhd::grown_naively),
    ..Judges::NONE
};

/// What the cases of this page have in common.
const VHD: Case = Case {
    format: Format::Vhd,
    options: "force_size=on",
    size: 3 * M,
    prepare: &["io write -P 1 0 64k", "io write -P 2 1900k 60k"],
    judges: &JUDGES,
    ..BASIC
};

/// All of them.
pub const CASES: &[Case] = &[Case {
    name: "grow/inside the tables",
    ask: Ask::Grow(5 * M, Off),
    ..VHD
}];
