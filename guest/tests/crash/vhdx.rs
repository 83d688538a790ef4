//! The changes of vhdx images that are explored.

use super::case::{Ask, BASIC, Case, Harmless, Judges, K, M, patch};
use super::disk::{Event, Files};
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
    announced: Some(vhdx::announced),
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

/// What is handed over before the rest of a plan is known ends with a barrier.
const STREAMED: Harmless = Harmless::barrier(0, "it is the end of a part that is streamed");

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
        name: "grow/over entries that a shrink left",
        tamper: Some(entries_behind_the_end),
        ask: Ask::Grow(5 * M, Off),
        ..VHDX
    },
    Case {
        name: "grow/by way of the log",
        tamper: Some(size_across_sectors),
        ask: Ask::Grow(4096 * M + 5 * M, Off),
        ..VHDX
    },
    Case {
        name: "grow/with a table that moves",
        harmless: &[STREAMED],
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
        name: "write/new blocks and old ones",
        ask: Ask::Write(&[patch(60 * K, 8 * K, 7), patch(M - 512, K, 8)]),
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

/// A resize up to a write at this place, and with nothing else of its stage. It
/// was not this session's: the identifiers are others.
fn begin(files: &mut Files, size: u64, last: u64) -> Result<(), String> {
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
    let is_last = |event: &Event| matches!(event, Event::Write { offset, .. } if *offset == last);
    for epoch in &planned.epochs {
        if let Some(event) = epoch.iter().find(|event| is_last(event)) {
            files.apply(event);
            return identify(files);
        }
        files.apply_all(std::slice::from_ref(epoch));
    }
    Err(format!("the plan writes nothing at {last:#x}"))
}

/// Gives the file other identifiers.
fn identify(files: &mut Files) -> Result<(), String> {
    let file = files.find(IMAGE).ok_or("no image")?;
    let image = files.bytes_mut(file);
    for at in [64 * K, 128 * K] {
        image.write(at + 16, &[0x77; 16]);
        image.write(at + 4, &[0; 4]);
        let sum = vhdx::CRC.checksum(&image.read(at, 4 * K));
        image.write(at + 4, &sum.to_le_bytes());
    }
    Ok(())
}

/// A shrink that was cut off once its log entry counted, and some of it had been
/// carried out.
fn cut_off_shrink(files: &mut Files) -> Result<(), String> {
    begin(files, 2 * M + 512, BAT)
}

/// A BAT that has moved for readers of the first region table only.
fn stale_second_table(files: &mut Files) -> Result<(), String> {
    begin(files, LARGE_SIZE, 192 * K)
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
