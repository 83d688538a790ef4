//! The changes of vhd images that are explored.

use super::bytes::Bytes;
use super::case::{Ask, BASIC, Case, Judges, K, M, patch};
use super::disk::Files;
use super::readers::vhd;
use instar_guest::Format;
use instar_guest::findings::Repair;
use instar_guest::proto::Preallocation::{Falloc, Full, Metadata, Off};

/// Who judges the states.
const JUDGES: Judges = Judges {
    check: false,
    convert: true,
    readers: &[("the footer at the end", vhd::by_last_footer)],
    may_differ: true,
    naive_grow: Some(vhd::grown_naively),
    ..Judges::NONE
};

/// Who judges what begins with a footer that is not as it should be.
const JUDGES_OF_DAMAGE: Judges = Judges {
    convert: true,
    may_differ: true,
    ..Judges::NONE
};

/// Who judges guest writes.
const JUDGES_OF_WRITES: Judges = Judges {
    check: false,
    convert: true,
    readers: &[("the footer at the end", vhd::by_last_footer)],
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

/// Blocks of 16 KiB, so that there are more of them and a sector of the table
/// is for 2 MiB. Half of the blocks are there, in no order.
const SMALL: Case = Case {
    size: M,
    prepare: &[],
    tamper: Some(small_blocks),
    ..VHD
};

const FIXED: Case = Case {
    options: "subformat=fixed,force_size=on",
    size: 64 * K,
    prepare: &["io write -P 1 0 16k", "io write -P 2 60k 4k"],
    ..VHD
};

/// All of them.
pub const CASES: &[Case] = &[
    Case {
        name: "grow/inside the tables",
        ask: Ask::Grow(5 * M, Off),
        ..VHD
    },
    Case {
        name: "grow/inside the last block",
        ask: Ask::Grow(3 * M + 512, Off),
        prepare: &["io write -P 1 0 64k", "io write -P 2 2100k 60k"],
        tamper: Some(dirty_tail),
        ..VHD
    },
    Case {
        name: "grow/a size by geometry",
        options: "force_size=off",
        prepare: &["io write -P 1 0 64k", "io write -P 2 2100k 60k"],
        ask: Ask::Grow(5 * M, Off),
        ..VHD
    },
    Case {
        name: "grow/blocks out of the table's way",
        ask: Ask::Grow(9 * M, Off),
        ..SMALL
    },
    Case {
        name: "grow/a block of 2 MiB out of the table's way",
        ask: Ask::Grow(600 * M, Off),
        ..VHD
    },
    Case {
        name: "grow/the footer out of the table's way",
        prepare: &[],
        ask: Ask::Grow(260 * M, Off),
        ..VHD
    },
    Case {
        name: "grow/the table moves",
        tamper: Some(table_first),
        ask: Ask::Grow(9 * M, Off),
        ..SMALL
    },
    Case {
        name: "grow/entries behind the end",
        tamper: Some(stale_entries),
        judges: &JUDGES_OF_DAMAGE,
        ask: Ask::Grow(M + 300 * K, Off),
        ..SMALL
    },
    Case {
        name: "grow/metadata",
        ask: Ask::Grow(M + 80 * K, Metadata),
        ..SMALL
    },
    Case {
        name: "grow/falloc, blocks move",
        ask: Ask::Grow(2 * M + 64 * K, Falloc),
        ..SMALL
    },
    Case {
        name: "grow/full, a larger file than needed",
        tamper: Some(longer),
        ask: Ask::Grow(M + 40 * K, Full),
        ..SMALL
    },
    Case {
        name: "grow/metadata, the table moves",
        tamper: Some(table_first),
        ask: Ask::Grow(2 * M + 64 * K, Metadata),
        ..SMALL
    },
    Case {
        name: "grow/fixed",
        ask: Ask::Grow(160 * K, Off),
        ..FIXED
    },
    Case {
        name: "grow/fixed, by a sector",
        ask: Ask::Grow(64 * K + 512, Off),
        ..FIXED
    },
    Case {
        name: "grow/fixed, full",
        ask: Ask::Grow(80 * K, Full),
        ..FIXED
    },
    Case {
        name: "shrink/fixed",
        ask: Ask::Shrink(40 * K),
        ..FIXED
    },
    Case {
        name: "shrink/fixed, to nothing but a sector",
        ask: Ask::Shrink(512),
        ..FIXED
    },
    Case {
        name: "shrink/fixed, a larger file than needed",
        tamper: Some(longer_fixed),
        ask: Ask::Shrink(40 * K),
        ..FIXED
    },
    Case {
        name: "shrink/through data, blocks move down",
        ask: Ask::Shrink(600 * K),
        ..SMALL
    },
    Case {
        name: "shrink/inside a block",
        ask: Ask::Shrink(500 * K + 512),
        ..SMALL
    },
    Case {
        name: "shrink/by a sector",
        ask: Ask::Shrink(M - 512),
        ..SMALL
    },
    Case {
        name: "shrink/a table in the middle",
        tamper: Some(table_first),
        ask: Ask::Shrink(300 * K),
        ..SMALL
    },
    Case {
        name: "shrink/blocks of 2 MiB",
        size: 7 * M,
        prepare: &["io write -P 1 6M 64k", "io write -P 2 100k 2k"],
        ask: Ask::Shrink(3 * M),
        ..VHD
    },
    Case {
        name: "shrink/empty",
        size: 600 * M,
        prepare: &[],
        ask: Ask::Shrink(3 * M),
        ..VHD
    },
    Case {
        name: "write/new blocks",
        judges: &JUDGES_OF_WRITES,
        ask: Ask::Write(&[patch(2 * M, 4 * K, 9), patch(5 * M - K, 2 * K, 8)]),
        size: 7 * M,
        ..VHD
    },
    Case {
        name: "write/new and old blocks",
        judges: &JUDGES_OF_WRITES,
        ask: Ask::Write(&[
            patch(0, 2 * K, 9),
            patch(16 * K, K, 8),
            patch(31 * K, 40 * K, 7),
            patch(M - 512, 512, 6),
        ]),
        ..SMALL
    },
    Case {
        name: "settle/an interrupted grow",
        tamper: Some(smaller_at_the_end),
        judges: &JUDGES_OF_DAMAGE,
        ask: Ask::Settle,
        ..SMALL
    },
    Case {
        name: "settle/no footer at the end",
        tamper: Some(no_footer),
        judges: &JUDGES_OF_DAMAGE,
        ask: Ask::Settle,
        ..SMALL
    },
    Case {
        name: "repair/no footer at the end",
        tamper: Some(no_footer),
        judges: &JUDGES_OF_DAMAGE,
        ask: Ask::Repair(Repair::All),
        ..SMALL
    },
    Case {
        name: "repair/leaks",
        tamper: Some(longer),
        ask: Ask::Repair(Repair::Leaks),
        ..SMALL
    },
    Case {
        name: "repair/leaks of an interrupted shrink",
        tamper: Some(interrupted_shrink),
        ask: Ask::Repair(Repair::Leaks),
        ..SMALL
    },
    Case {
        name: "repair/leaks, fixed",
        tamper: Some(longer_fixed),
        ask: Ask::Repair(Repair::Leaks),
        ..FIXED
    },
];

/// Bytes of a small block and of its bitmap.
const BLOCK: u64 = 16 * K;
const BITMAP: u64 = 512;
/// Where a table is that follows the dynamic header.
const TABLE: u64 = 1536;

fn image(files: &mut Files) -> Result<&mut Bytes, String> {
    let file = files.find("image.vhd").ok_or("no image")?;
    Ok(files.bytes_mut(file))
}

/// Writes the checksum of a footer or a header.
fn seal(file: &mut Bytes, offset: u64, len: u64, field: u64) {
    file.write(offset + field, &[0; 4]);
    let bytes = file.read(offset, len);
    let sum: u32 = bytes.iter().map(|&byte| u32::from(byte)).sum();
    file.write(offset + field, &(!sum).to_be_bytes());
}

/// Makes the image anew with the header and the table at these places.
fn build(files: &mut Files, header: u64, table: u64) -> Result<(), String> {
    let file = image(files)?;
    let (mut footer, head) = (file.read(0, 512), file.read(512, 1024));
    let size = file.big::<8>(48);
    footer[16..24].copy_from_slice(&header.to_be_bytes());
    file.set_len(0);
    file.write(header, &head);
    file.write(header + 16, &table.to_be_bytes());
    let blocks = size / BLOCK;
    file.write(header + 28, &(blocks as u32).to_be_bytes());
    file.write(header + 32, &(BLOCK as u32).to_be_bytes());
    seal(file, header, 1024, 36);
    file.write(
        table,
        &vec![0xff; (blocks * 4).next_multiple_of(512) as usize],
    );
    let mut at = file.len();
    for number in 0..blocks {
        // 5 and the number of blocks have no common divisor.
        let block = (number * 5 + 3) % blocks;
        if block.is_multiple_of(2) && !block.is_multiple_of(7) {
            continue;
        }
        file.write(table + block * 4, &((at / 512) as u32).to_be_bytes());
        file.write(at, &[0xff; BITMAP as usize]);
        file.write(at + BITMAP, &vec![block as u8 + 1; BLOCK as usize]);
        at += BITMAP + BLOCK;
    }
    file.write(at, &footer);
    file.write(0, &footer);
    seal(file, at, 512, 64);
    seal(file, 0, 512, 64);
    Ok(())
}

/// Small blocks behind header and table.
fn small_blocks(files: &mut Files) -> Result<(), String> {
    build(files, 512, TABLE)
}

/// Small blocks, and a table that cannot grow: the header follows it.
fn table_first(files: &mut Files) -> Result<(), String> {
    build(files, 1024, 512)
}

/// Bytes behind the end of the disk in the last block.
fn dirty_tail(files: &mut Files) -> Result<(), String> {
    let file = image(files)?;
    let last = file.big::<4>(TABLE + 4) * 512 + BITMAP;
    file.write(last + M, &[0xee; 4096]);
    Ok(())
}

/// Entries behind the end of the disk that refer to a block before it.
fn stale_entries(files: &mut Files) -> Result<(), String> {
    small_blocks(files)?;
    let file = image(files)?;
    let count = M / BLOCK;
    let block = file.read(TABLE + 4, 4);
    for entry in count..count + 20 {
        file.write(TABLE + 4 * entry, &block);
    }
    file.write(512 + 28, &(count as u32 + 20).to_be_bytes());
    seal(file, 512, 1024, 36);
    Ok(())
}

/// Sizes of both footers, as a shrink leaves them that was cut short.
fn interrupted_shrink(files: &mut Files) -> Result<(), String> {
    small_blocks(files)?;
    let file = image(files)?;
    for footer in [0, file.len() - 512] {
        file.write(footer + 48, &(600 * K + 512).to_be_bytes());
        seal(file, footer, 512, 64);
    }
    Ok(())
}

/// Room for three blocks before the footer, full of what was there once.
fn longer(files: &mut Files) -> Result<(), String> {
    small_blocks(files)?;
    let file = image(files)?;
    let at = file.len() - 512;
    let footer = file.read(at, 512);
    file.write(at, &vec![0xdd; 3 * (BLOCK + BITMAP) as usize]);
    let at = file.len();
    file.write(at, &footer);
    Ok(())
}

/// The footer farther behind the disk than needed.
fn longer_fixed(files: &mut Files) -> Result<(), String> {
    let file = image(files)?;
    let at = file.len() - 512;
    let footer = file.read(at, 512);
    file.write(at + 20 * K, &footer);
    file.write(at, &[0xdd; 4096]);
    Ok(())
}

/// The footers between the two commits of a grow.
fn smaller_at_the_end(files: &mut Files) -> Result<(), String> {
    small_blocks(files)?;
    let file = image(files)?;
    let footer = file.len() - 512;
    file.write(footer + 48, &(600 * K).to_be_bytes());
    seal(file, footer, 512, 64);
    Ok(())
}

fn no_footer(files: &mut Files) -> Result<(), String> {
    small_blocks(files)?;
    let file = image(files)?;
    let footer = file.len() - 512;
    file.write(footer, &[0; 512]);
    Ok(())
}
