//! VHD by the specification ("Virtual Hard Disk Image Format Specification",
//! version 1.0): a writer of dynamic and differencing images, and a reader.
//! All numbers are big endian.

use super::{Layer, SECTOR, utf16};
use std::path::Path;

const BLOCK: usize = 512 << 10;
/// One bit per sector, rounded up to a sector.
const BITMAP: usize = SECTOR;
const HEADER: usize = 512;
const BAT: usize = 1536;
const DYNAMIC: u32 = 3;
const DIFFERENCING: u32 = 4;
const UNUSED: u32 = u32::MAX;

/// What an image says about the one below it.
pub struct Parent<'a> {
    pub uuid: [u8; 16],
    /// Windows spelling, relative to the image.
    pub relative: &'a str,
    /// Windows spelling, with a drive.
    pub absolute: &'a str,
}

/// The bytes of an image: the sectors of `layer` that are its own.
pub fn write(layer: &Layer, uuid: [u8; 16], parent: Option<&Parent<'_>>) -> Vec<u8> {
    let blocks = layer.content.len().div_ceil(BLOCK);
    let bat_len = (4 * blocks).next_multiple_of(SECTOR);
    let mut image = vec![0; BAT + bat_len];
    let mut header = header(blocks as u32);
    if let Some(parent) = parent {
        put(&mut header, 40, &parent.uuid);
        put(&mut header, 56, &1u32.to_be_bytes());
        put(&mut header, 64, &utf16(parent.absolute, u16::to_be_bytes));
        let names = [(*b"W2ru", parent.relative), (*b"W2ku", parent.absolute)];
        for (number, (platform, name)) in names.into_iter().enumerate() {
            let data = utf16(name, u16::to_le_bytes);
            let at = 576 + 24 * number;
            put(&mut header, at, &platform);
            put(&mut header, at + 4, &(SECTOR as u32).to_be_bytes());
            put(&mut header, at + 8, &(data.len() as u32).to_be_bytes());
            put(&mut header, at + 16, &(image.len() as u64).to_be_bytes());
            let end = image.len() + SECTOR;
            image.extend(data);
            image.resize(end, 0);
        }
    }
    let sum = checksum(&header);
    put(&mut header, 36, &sum.to_be_bytes());
    put(&mut image, HEADER, &header);
    for block in 0..blocks {
        let entry = match layer.has_any(block * BLOCK, BLOCK) {
            true => (image.len() / SECTOR) as u32,
            false => UNUSED,
        };
        put(&mut image, BAT + 4 * block, &entry.to_be_bytes());
        if entry != UNUSED {
            append_block(&mut image, layer, block * BLOCK);
        }
    }
    let kind = parent.map_or(DYNAMIC, |_| DIFFERENCING);
    let footer = footer(layer.content.len() as u64, kind, uuid);
    put(&mut image, 0, &footer);
    image.extend(footer);
    image
}

fn append_block(image: &mut Vec<u8>, layer: &Layer, start: usize) {
    let bitmap = image.len();
    image.resize(bitmap + BITMAP + BLOCK, 0);
    for sector in 0..BLOCK / SECTOR {
        let from = start + sector * SECTOR;
        if layer.has(from) {
            image[bitmap + sector / 8] |= 0x80 >> (sector % 8);
            let to = bitmap + BITMAP + sector * SECTOR;
            image[to..to + SECTOR].copy_from_slice(&layer.content[from..from + SECTOR]);
        }
    }
}

fn header(entries: u32) -> Vec<u8> {
    let mut header = vec![0; 1024];
    put(&mut header, 0, b"cxsparse");
    put(&mut header, 8, &u64::MAX.to_be_bytes());
    put(&mut header, 16, &(BAT as u64).to_be_bytes());
    put(&mut header, 24, &0x0001_0000u32.to_be_bytes());
    put(&mut header, 28, &entries.to_be_bytes());
    put(&mut header, 32, &(BLOCK as u32).to_be_bytes());
    header
}

fn footer(size: u64, kind: u32, uuid: [u8; 16]) -> Vec<u8> {
    let mut footer = vec![0; SECTOR];
    put(&mut footer, 0, b"conectix");
    put(&mut footer, 8, &2u32.to_be_bytes());
    put(&mut footer, 12, &0x0001_0000u32.to_be_bytes());
    put(&mut footer, 16, &(HEADER as u64).to_be_bytes());
    put(&mut footer, 24, &1u32.to_be_bytes());
    put(&mut footer, 28, b"win \0\x06\0\x01Wi2k");
    put(&mut footer, 40, &size.to_be_bytes());
    put(&mut footer, 48, &size.to_be_bytes());
    // 16 heads of 63 sectors.
    let cylinders = (size / SECTOR as u64 / (16 * 63)) as u16;
    put(&mut footer, 56, &cylinders.to_be_bytes());
    put(&mut footer, 58, &[16, 63]);
    put(&mut footer, 60, &kind.to_be_bytes());
    put(&mut footer, 68, &uuid);
    let sum = checksum(&footer);
    put(&mut footer, 64, &sum.to_be_bytes());
    footer
}

/// The one's complement of the sum of all bytes, the field itself as zero.
fn checksum(bytes: &[u8]) -> u32 {
    !bytes.iter().map(|&byte| u32::from(byte)).sum::<u32>()
}

fn put(buf: &mut [u8], at: usize, bytes: &[u8]) {
    buf[at..at + bytes.len()].copy_from_slice(bytes);
}

fn be32(image: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(image[at..at + 4].try_into().expect("four bytes"))
}

fn be64(image: &[u8], at: usize) -> usize {
    u64::from_be_bytes(image[at..at + 8].try_into().expect("eight bytes")) as usize
}

/// The disk that an image holds, the images below it included. Reads the footer
/// at the end of the file, which is the one that counts.
pub fn read(path: &Path) -> Vec<u8> {
    let image = std::fs::read(path).expect("an image");
    let footer = image.len() - SECTOR;
    assert_eq!(&image[footer..footer + 8], b"conectix");
    let size = be64(&image, footer + 48);
    let header = be64(&image, footer + 16);
    assert_eq!(&image[header..header + 8], b"cxsparse");
    let (bat, block) = (
        be64(&image, header + 16),
        be32(&image, header + 32) as usize,
    );
    let mut disk = match be32(&image, footer + 60) {
        DIFFERENCING => {
            let mut below = read(&parent_of(&image, header, path));
            below.resize(size, 0);
            below
        }
        _ => vec![0; size],
    };
    let bitmap_len = (block / SECTOR / 8).next_multiple_of(SECTOR);
    for start in (0..size).step_by(block) {
        let entry = be32(&image, bat + 4 * (start / block));
        if entry == UNUSED {
            continue;
        }
        let bitmap = entry as usize * SECTOR;
        for (sector, from) in (start..size.min(start + block)).step_by(SECTOR).enumerate() {
            if image[bitmap + sector / 8] & 0x80 >> (sector % 8) != 0 {
                let at = bitmap + bitmap_len + sector * SECTOR;
                disk[from..from + SECTOR].copy_from_slice(&image[at..at + SECTOR]);
            }
        }
    }
    disk
}

/// The parent, by the locator with its relative path.
fn parent_of(image: &[u8], header: usize, path: &Path) -> std::path::PathBuf {
    let locator = (0..8)
        .map(|number| header + 576 + 24 * number)
        .find(|&at| &image[at..at + 4] == b"W2ru")
        .expect("a relative path");
    let (len, at) = (be32(image, locator + 8) as usize, be64(image, locator + 16));
    let name = super::from_utf16(&image[at..at + len]).replace('\\', "/");
    path.with_file_name("").join(name)
}
