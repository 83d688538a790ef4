//! Reads a VHD as the specification says: the footer at the end of the file is
//! the authoritative one, and the bitmap of a block says which sectors it has.
//! (qemu looks at the copy at the start, and at no bitmap.)

use super::super::bytes::Bytes;
use super::super::disk::Files;
use super::{SECTOR, Uses, hold};

/// Entry of a block that has no space.
const FREE: u64 = 0xffff_ffff;

/// The disk that the footer at the end describes.
pub fn by_last_footer(files: &Files, image: &str) -> Result<Bytes, String> {
    let file = files.get(image)?;
    let footer = Footer::at(file, file.len().wrapping_sub(SECTOR))?;
    footer.read(file, footer.size)
}

/// The disk of a program that writes a larger size and touches nothing else.
pub fn grown_naively(files: &Files, image: &str, size: u64) -> Result<Bytes, String> {
    let file = files.get(image)?;
    let footer = Footer::at(file, file.len().wrapping_sub(SECTOR))?;
    let mut disk = match footer.table {
        None => footer.read(file, footer.size)?,
        Some(_) => footer.read(file, size)?,
    };
    disk.set_len(size);
    Ok(disk)
}

struct Footer {
    size: u64,
    /// Where the dynamic header is; a fixed disk has none.
    table: Option<u64>,
}

impl Footer {
    fn at(file: &Bytes, offset: u64) -> Result<Self, String> {
        hold(
            file.len() >= SECTOR && file.len().is_multiple_of(SECTOR),
            || format!("a file of {} bytes has no footer", file.len()),
        )?;
        let text = file.read(offset, 8);
        hold(text == b"conectix", || {
            format!("no footer at {offset:#x}: {text:x?}")
        })?;
        hold(
            sum(file, offset, 512, 64) == file.big::<4>(offset + 64),
            || format!("wrong checksum of the footer at {offset:#x}"),
        )?;
        let (version, saved) = (file.big::<4>(offset + 12), file.big::<1>(offset + 84));
        hold(version == 0x1_0000 && saved == 0, || {
            format!("footer version {version:#x}, saved state {saved}")
        })?;
        let (kind, table) = (file.big::<4>(offset + 60), file.big::<8>(offset + 16));
        let table = match (kind, table) {
            (2, u64::MAX) => None,
            (3, table) => Some(table),
            other => return Err(format!("footer of kind and header {other:x?}")),
        };
        let size = file.big::<8>(offset + 48);
        hold(size > 0 && size.is_multiple_of(SECTOR), || {
            format!("size {size}")
        })?;
        Ok(Self { size, table })
    }

    fn read(&self, file: &Bytes, size: u64) -> Result<Bytes, String> {
        let mut disk = Bytes::zeroes(size);
        let Some(header) = self.table else {
            hold(file.len() >= size + SECTOR, || {
                format!("{} bytes of a disk of {size}", file.len())
            })?;
            disk.copy(file, 0, 0, size);
            return Ok(disk);
        };
        let table = Table::at(file, header)?;
        hold(table.entries * table.block >= self.size, || {
            format!("{} entries for a disk of {}", table.entries, self.size)
        })?;
        table.check(file, header)?;
        for block in 0..size.div_ceil(table.block).min(table.entries) {
            table.read(file, block, &mut disk);
        }
        disk.set_len(size);
        Ok(disk)
    }
}

/// One's complement of the sum of all bytes but the checksum's own.
fn sum(file: &Bytes, offset: u64, len: u64, field: usize) -> u64 {
    let bytes = file.read(offset, len);
    let others = bytes.iter().enumerate();
    let others = others.filter(|(at, _)| !(field..field + 4).contains(at));
    let sum: u32 = others.map(|(_, &byte)| u32::from(byte)).sum();
    u64::from(!sum)
}

/// The block allocation table.
struct Table {
    offset: u64,
    entries: u64,
    /// Bytes of a block's data, and of the bitmap before it.
    block: u64,
    bitmap: u64,
}

impl Table {
    fn at(file: &Bytes, header: u64) -> Result<Self, String> {
        hold(file.read(header, 8) == b"cxsparse", || {
            format!("no dynamic header at {header:#x}")
        })?;
        hold(
            sum(file, header, 1024, 36) == file.big::<4>(header + 36),
            || "wrong checksum of the dynamic header".to_owned(),
        )?;
        let block = file.big::<4>(header + 32);
        hold(block.is_power_of_two() && block >= SECTOR, || {
            format!("blocks of {block} bytes")
        })?;
        Ok(Self {
            offset: file.big::<8>(header + 16),
            entries: file.big::<4>(header + 28),
            block,
            bitmap: (block / SECTOR).div_ceil(8).next_multiple_of(SECTOR),
        })
    }

    fn entry(&self, file: &Bytes, block: u64) -> Option<u64> {
        let sector = file.big::<4>(self.offset + 4 * block);
        (sector != FREE).then_some(sector * SECTOR)
    }

    /// Everything has a place of its own before the footer at the end.
    fn check(&self, file: &Bytes, header: u64) -> Result<(), String> {
        let mut uses = Uses::default();
        uses.add(0, SECTOR, "the copy of the footer");
        uses.add(header, 1024, "the dynamic header");
        uses.add(self.offset, self.entries * 4, "the allocation table");
        for block in 0..self.entries {
            if let Some(at) = self.entry(file, block) {
                uses.add(at, self.bitmap + self.block, format!("block {block}"));
            }
        }
        uses.check(file.len() - SECTOR)
    }

    fn read(&self, file: &Bytes, block: u64, disk: &mut Bytes) {
        let Some(at) = self.entry(file, block) else {
            return;
        };
        let bitmap = file.read(at, self.bitmap);
        let has = |sector: u64| bitmap[sector as usize / 8] & 0x80 >> (sector % 8) != 0;
        let count = self.block / SECTOR;
        let mut sector = 0;
        while sector < count {
            let end = (sector..count).find(|&next| has(next) != has(sector));
            let end = end.unwrap_or(count);
            if has(sector) {
                let (from, len) = (at + self.bitmap + sector * SECTOR, (end - sector) * SECTOR);
                disk.copy(file, from, block * self.block + sector * SECTOR, len);
            }
            sector = end;
        }
    }
}
