//! The changes of vhdx images that are explored.

use super::case::{Ask, BASIC, Case, Harmless, Judges, K, M, Part, patch};
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

/// Identifiers are new before anything else changes: programs that remember an
/// image by them are not explored.
const IDENTIFIERS: Harmless = Harmless::barrier(0, "no reader looks at identifiers");
/// The case with entries behind the end shows what this barrier is for.
const ENTRIES: Harmless = Harmless::barrier(1, "new blocks are zero without their entries, too");
/// The barriers between copies of what does not change the disk.
const fn copies(stage: usize) -> Harmless {
    Harmless::barrier(stage, "one of two copies is as good as both")
}
/// Between the header that makes a log entry count, the page that it changes,
/// and the header without it.
const ONE_SECTOR: [Harmless; 2] = [
    Harmless::barrier(3, "these sizes differ in one sector, which is old or new"),
    Harmless::barrier(4, "these sizes differ in one sector, which is old or new"),
];
/// A table is written as a whole.
const REST: Harmless = Harmless {
    part: Part::Zero(2, 0),
    why: "what is damaged lies in the first sector",
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
pub const CASES: &[Case] = &[
    Case {
        name: "grow/inside the tables",
        harmless: &[IDENTIFIERS, ENTRIES],
        ask: Ask::Grow(5 * M, Off),
        ..VHDX
    },
    Case {
        name: "grow/in a block that holds old bytes behind the end",
        harmless: &[IDENTIFIERS],
        size: 3 * M - 512,
        prepare: &["io write -P 1 0 64k", "io write -P 2 2560k 500k"],
        tamper: Some(old_bytes_behind_the_end),
        ask: Ask::Grow(5 * M, Off),
        ..VHDX
    },
    Case {
        name: "grow/over entries that a shrink left",
        harmless: &[IDENTIFIERS],
        tamper: Some(entries_behind_the_end),
        ask: Ask::Grow(5 * M, Off),
        ..VHDX
    },
    Case {
        name: "grow/by way of the log",
        harmless: &[
            IDENTIFIERS,
            ENTRIES,
            ONE_SECTOR[0],
            ONE_SECTOR[1],
            copies(5),
        ],
        tamper: Some(size_across_sectors),
        ask: Ask::Grow(5 * M, Off),
        ..VHDX
    },
    Case {
        name: "grow/with a table that moves",
        harmless: &[
            IDENTIFIERS,
            ENTRIES,
            copies(2),
            Harmless::barrier(4, "neither region table leads to the old place by then"),
        ],
        judges: &LARGE,
        ask: Ask::Grow(LARGE_SIZE, Off),
        ..VHDX
    },
    Case {
        name: "grow/metadata",
        harmless: &[IDENTIFIERS, ENTRIES],
        ask: Ask::Grow(5 * M + 512, Metadata),
        ..VHDX
    },
    Case {
        name: "grow/falloc",
        harmless: &[IDENTIFIERS, ENTRIES],
        ask: Ask::Grow(5 * M, Falloc),
        ..VHDX
    },
    Case {
        name: "grow/full",
        harmless: &[
            IDENTIFIERS,
            ENTRIES,
            Harmless {
                part: Part::Zero(0, 1),
                why: "disk space is taken: the content is the same",
            },
        ],
        ask: Ask::Grow(4 * M, Full),
        ..VHDX
    },
    Case {
        name: "grow/fixed",
        harmless: &[IDENTIFIERS, ENTRIES],
        options: "subformat=fixed,block_state_zero=off,block_size=1M",
        size: 5 * M / 2,
        ask: Ask::Grow(4 * M, Off),
        ..VHDX
    },
    Case {
        name: "shrink/through data",
        harmless: &[IDENTIFIERS, copies(1), copies(5), copies(6)],
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
        harmless: &[IDENTIFIERS, copies(1), copies(5), copies(6)],
        options: "subformat=fixed,block_state_zero=off,block_size=1M",
        size: 4 * M,
        ask: Ask::Shrink(3 * M / 2),
        ..VHDX
    },
    Case {
        name: "write/new blocks and old ones",
        ask: Ask::Write(&[patch(60 * K, 8 * K, 7), patch(M - 512, K, 8)]),
        ..VHDX
    },
    Case {
        name: "settle/a log that has to be replayed",
        harmless: &[IDENTIFIERS, copies(2)],
        size: 5 * M,
        prepare: &["io write -P 1 0 64k", "io write -P 2 4M 512k"],
        tamper: Some(cut_off_shrink),
        ask: Ask::Settle,
        ..VHDX
    },
    Case {
        name: "repair/a header and a region table that are damaged",
        harmless: &[IDENTIFIERS, copies(1), copies(2), REST],
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

/// A copy of the headers and one of the region tables are damaged.
fn damaged_copies(files: &mut Files) -> Result<(), String> {
    let file = files.find(IMAGE).ok_or("no image")?;
    let image = files.bytes_mut(file);
    for at in [64 * K, 256 * K] {
        image.write(at + 20, &[0xff; 4]);
    }
    Ok(())
}

/// Entries behind the end lead to data.
fn entries_behind_the_end(files: &mut Files) -> Result<(), String> {
    let file = files.find(IMAGE).ok_or("no image")?;
    let image = files.bytes_mut(file);
    let first = image.read(BAT, 8);
    image.write(BAT + 3 * 8, &first);
    Ok(())
}

/// The virtual size lies in two sectors.
fn size_across_sectors(files: &mut Files) -> Result<(), String> {
    let file = files.find(IMAGE).ok_or("no image")?;
    let image = files.bytes_mut(file);
    let (metadata, offset) = (BAT + M, 64 * K + 508);
    let size = image.read(metadata + 64 * K + 8, 8);
    image.write(metadata + offset, &size);
    image.write(metadata + 32 + 32 + 16, &(offset as u32).to_le_bytes());
    Ok(())
}
