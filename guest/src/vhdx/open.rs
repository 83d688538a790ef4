//! Opening: from the first bytes of the file to a checked [`Vhdx`].

use super::Vhdx;
use super::bat::Bat;
use super::format::{MIB, header as header_at, region as region_at};
use super::header::{self, Headers};
use super::log;
use super::metadata::Metadata;
use super::overlay::Overlay;
use super::refuse::damaged;
use super::region::{Owner, Region, Tables};
use super::source::Source;
use super::write::Pending;
use crate::disk::{Opened, Opening};
use crate::engine::{Host, Read};
use crate::error::Failure;
use crate::proto::FileNo;
use alloc::boxed::Box;
use alloc::format;
use alloc::vec;
use alloc::vec::Vec;

/// Opens an image: one read for headers and region tables, more for a log that
/// has to be replayed, one for the metadata.
pub fn open(host: &mut dyn Host, opening: Opening<'_>) -> Result<Opened, Failure> {
    header::check_file_id(opening.head)?;
    if opening.file_len < MIB {
        return Err(damaged(format!(
            "the file is {} bytes long, less than the 1 MiB of its headers",
            opening.file_len
        )));
    }
    let [first, second, table, other] = read_start(host)?;
    let headers = Headers::choose(&first, &second)?;
    let current = &headers.current;
    let log = Region {
        owner: Owner::Log,
        offset: current.log_offset,
        len: current.log_len,
    };
    let mut source = Source {
        file_len: opening.file_len,
        overlay: Overlay::default(),
    };
    if current.has_log() {
        let replay = log::replay(host, current, opening.file_len)?;
        source.overlay = replay.overlay;
        source.file_len = replay.file_len;
    }
    let [table, other] = [(0, table), (1, other)].map(|(which, mut bytes)| {
        let at = region_at::TABLES.get(which).copied().unwrap_or(0);
        source.overlay.apply(at, &mut bytes);
        bytes
    });
    let tables = Tables::choose(&table, &other, log)?;
    for region in &tables.table.regions {
        if region.end() > source.file_len.next_multiple_of(MIB) {
            return Err(damaged(format!(
                "{} at {:#x} ({} bytes) reaches past the end of the file ({} bytes)",
                region.owner.name(),
                region.offset,
                region.len,
                source.file_len
            )));
        }
    }
    let metadata = Metadata::read(host, &source, tables.table.get(Owner::Metadata)?)?;
    let bat = tables.table.get(Owner::Bat)?;
    let needed = metadata.geometry.bat_len(metadata.size);
    if needed > bat.len {
        return Err(damaged(format!(
            "the block allocation table is {} bytes long, a disk of {} bytes needs {needed}",
            bat.len, metadata.size
        )));
    }
    let entries = metadata.geometry.entries(metadata.size);
    let vhdx = Vhdx {
        bat: Bat::new(bat.offset, entries),
        source,
        headers,
        table: tables.table,
        stale_table: tables.stale,
        metadata,
        bitmap: None,
        chance: opening.chance.clone(),
        pending: Pending::default(),
    };
    let facts = vhdx.facts(&opening)?;
    Ok((Box::new(vhdx), facts))
}

/// Both headers and both region tables as they are on disk.
fn read_start(host: &mut dyn Host) -> Result<[Vec<u8>; 4], Failure> {
    let [header1, header2] = header_at::SLOTS;
    let [table1, table2] = region_at::TABLES;
    let mut parts = [
        vec![0; header_at::LEN],
        vec![0; header_at::LEN],
        vec![0; region_at::LEN],
        vec![0; region_at::LEN],
    ];
    let offsets = [header1, header2, table1, table2];
    let mut reads: Vec<Read<'_>> = parts
        .iter_mut()
        .zip(offsets)
        .map(|(buf, offset)| Read {
            file: FileNo::IMAGE,
            offset,
            buf,
        })
        .collect();
    host.read(&mut reads)?;
    Ok(parts)
}
