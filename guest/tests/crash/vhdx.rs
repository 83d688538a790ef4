//! The changes of vhdx images that are explored.

use super::case::{Ask, BASIC, Case, Judges, K, M};
use super::disk::Files;
use super::engine::{Change, Session};
use super::readers::vhdx;
use instar_guest::Format;
use instar_guest::findings::Repair;
use instar_guest::proto::Preallocation::{Falloc, Full, Metadata, Off};

/// Who judges the states.
const JUDGES: Judges = Judges {
    check: true,
    convert: true,
    replay: true,
    readers: &[("the second region table", vhdx::by_second_regions)],
    naive_grow: Some(vhdx::grown_naively),
    ..Judges::NONE
};

/// For a disk that is too large to be converted for each state.
const LARGE: Judges = Judges {
    convert: false,
    ..JUDGES
};

/// For an image whose second region table counts for nothing.
const FIRST_TABLE: Judges = Judges {
    readers: &[],
    ..JUDGES
};

/// The first size whose BAT needs more than the one MiB that it has.
const LARGE_SIZE: u64 = 130 << 30;
/// The file.
const IMAGE: &str = "image.vhdx";
/// Where the BAT is that QEMU makes.
const BAT: u64 = 2 * M;

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
pub const CASES: &[Case] = &[
    Case {
        name: "grow/inside the tables",
        ask: Ask::Grow(5 * M, Off),
        ..VHDX
    },
    Case {
        name: "grow/in a block that holds old bytes behind the end",
        size: 3 * M - 512,
        prepare: &["io write -P 1 0 64k", "io write -P 2 2560k 500k"],
        tamper: Some(old_bytes_behind_the_end),
        ask: Ask::Grow(5 * M, Off),
        ..VHDX
    },
    Case {
        name: "grow/with a table that moves",
        judges: &LARGE,
        ask: Ask::Grow(LARGE_SIZE, Off),
        ..VHDX
    },
    Case {
        name: "grow/metadata",
        ask: Ask::Grow(5 * M + 512, Metadata),
        ..VHDX
    },
    Case {
        name: "grow/falloc",
        ask: Ask::Grow(5 * M, Falloc),
        ..VHDX
    },
    Case {
        name: "grow/full",
        ask: Ask::Grow(4 * M, Full),
        ..VHDX
    },
    Case {
        name: "grow/fixed",
        options: "subformat=fixed,block_state_zero=off,block_size=1M",
        size: 5 * M / 2,
        ask: Ask::Grow(4 * M, Off),
        ..VHDX
    },
    Case {
        name: "shrink/through data",
        size: 5 * M,
        prepare: &[
            "io write -P 3 4M 1M",
            "io write -P 2 1900k 600k",
            "io write -P 1 0 64k",
        ],
        ask: Ask::Shrink(2 * M + 512),
        ..VHDX
    },
    Case {
        name: "shrink/fixed",
        options: "subformat=fixed,block_state_zero=off,block_size=1M",
        size: 4 * M,
        ask: Ask::Shrink(3 * M / 2),
        ..VHDX
    },
    Case {
        name: "settle/a log that has to be replayed",
        size: 5 * M,
        prepare: &["io write -P 1 0 64k", "io write -P 2 4M 512k"],
        tamper: Some(cut_off_shrink),
        ask: Ask::Settle,
        ..VHDX
    },
    Case {
        name: "settle/region tables that differ",
        tamper: Some(stale_second_table),
        ask: Ask::Settle,
        ..VHDX
    },
    Case {
        name: "repair/a header and a region table that are damaged",
        judges: &FIRST_TABLE,
        tamper: Some(damaged_copies),
        ask: Ask::Repair(Repair::All),
        ..VHDX
    },
];

/// The sector behind the old end is not zero, as a shrink by another program may
/// leave it.
fn old_bytes_behind_the_end(files: &mut Files) -> Result<(), String> {
    let file = files.find(IMAGE).ok_or("no image")?;
    let image = files.bytes_mut(file);
    let block = image.little::<8>(BAT + 2 * 8) >> 20 << 20;
    image.write(block + M - 512, &[0xaa; 512]);
    Ok(())
}

/// The stages of a resize, as far as `count` says.
fn begin(files: &mut Files, size: u64, count: usize) -> Result<(), String> {
    let planned = {
        let mut session = Session::open(files, IMAGE, Format::Vhdx)?;
        let disk = session.disk(None)?;
        let change = Change::Resize {
            size,
            preallocation: Off,
            backing_size: None,
        };
        session.plan(&change, &disk)?
    };
    let epochs = planned.epochs.get(..count);
    files.apply_all(epochs.ok_or("the plan has fewer stages")?);
    Ok(())
}

/// A shrink that was cut off once its log entry counted.
fn cut_off_shrink(files: &mut Files) -> Result<(), String> {
    begin(files, 2 * M + 512, 4)
}

/// A BAT that has moved for readers of the first region table only.
fn stale_second_table(files: &mut Files) -> Result<(), String> {
    begin(files, LARGE_SIZE, 3)
}

/// A copy of the headers and one of the region tables are damaged.
fn damaged_copies(files: &mut Files) -> Result<(), String> {
    let file = files.find(IMAGE).ok_or("no image")?;
    let image = files.bytes_mut(file);
    for at in [64 * K, 256 * K] {
        image.write(at + 20, &[0xff; 4]);
    }
    Ok(())
}
