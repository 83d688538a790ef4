//! VHDX by the specification (MS-VHDX): a writer of dynamic and differencing
//! images with blocks of 1 MiB and sectors of 512 bytes, and a reader. All
//! numbers are little endian.

use super::{Layer, SECTOR, from_utf16, utf16};
use std::path::{Path, PathBuf};

const MIB: usize = 1 << 20;
const BLOCK: usize = MIB;
/// Blocks whose sectors one sector bitmap has bits for: 2^23 sectors.
const CHUNK: usize = (1 << 23) * SECTOR / BLOCK;
const LOG: usize = MIB;
const METADATA: usize = 2 * MIB;
const BAT: usize = 3 * MIB;
const BLOCKS: usize = 4 * MIB;

const FULLY_PRESENT: u64 = 6;
const PARTIALLY_PRESENT: u64 = 7;

const BAT_REGION: &str = "2DC27766F62342009D64115E9BFD4A08";
const METADATA_REGION: &str = "8B7CA20647904B9AB8FE575F050F886E";
const FILE_PARAMETERS: &str = "CAA16737FA364D43B3B633F0AA44E76B";
const DISK_SIZE: &str = "2FA54224CD1B4876B2115DBED83BF4B8";
const LOGICAL_SECTOR: &str = "8141BF1DA96F4709BA47F233A8FAAB5F";
const PHYSICAL_SECTOR: &str = "CDA348C7445D44719CC9E9885251C556";
const DISK_ID: &str = "BECA12ABB2E6452393EFC309E000C746";
const PARENT_LOCATOR: &str = "A8D35F2DB30B454DABF7D3D84834AB0C";
const LOCATOR_TYPE: &str = "B04AEFB7D19E4A81B78925B8E9445913";

/// What an image says about the one below it.
pub struct Parent<'a> {
    /// Its `DataWriteGuid`, as bytes in a file.
    pub data_write: [u8; 16],
    /// Windows spelling, relative to the image.
    pub relative: &'a str,
    /// Windows spelling, with a drive.
    pub absolute: &'a str,
}

/// The bytes of an image: the sectors of `layer` that are its own.
pub fn write(layer: &Layer, data_write: [u8; 16], parent: Option<&Parent<'_>>) -> Vec<u8> {
    let mut image = vec![0; BLOCKS];
    put(&mut image, 0, b"vhdxfile");
    for (number, at) in [64 << 10, 128 << 10].into_iter().enumerate() {
        put(&mut image, at, b"head");
        put(&mut image, at + 8, &(number as u64 + 1).to_le_bytes());
        put(&mut image, at + 16, &[0x11; 16]);
        put(&mut image, at + 32, &data_write);
        put(&mut image, at + 66, &1u16.to_le_bytes());
        put(&mut image, at + 68, &(MIB as u32).to_le_bytes());
        put(&mut image, at + 72, &(LOG as u64).to_le_bytes());
        seal(&mut image, at, 4096);
    }
    for at in [192 << 10, 256 << 10] {
        put(&mut image, at, b"regi");
        put(&mut image, at + 8, &2u32.to_le_bytes());
        let regions = [(BAT_REGION, BAT), (METADATA_REGION, METADATA)];
        for (number, (region, start)) in regions.into_iter().enumerate() {
            let entry = at + 16 + 32 * number;
            put(&mut image, entry, &guid(region));
            put(&mut image, entry + 16, &(start as u64).to_le_bytes());
            put(&mut image, entry + 24, &(MIB as u32).to_le_bytes());
            put(&mut image, entry + 28, &1u32.to_le_bytes());
        }
        seal(&mut image, at, 64 << 10);
    }
    put_metadata(&mut image, layer.content.len() as u64, parent);
    put_blocks(&mut image, layer, parent.is_some());
    image
}

fn put_metadata(image: &mut [u8], size: u64, parent: Option<&Parent<'_>>) {
    const IS_VIRTUAL_DISK: u32 = 2;
    const IS_REQUIRED: u32 = 4;
    let parameters = (BLOCK as u64 | u64::from(parent.is_some()) << 33).to_le_bytes();
    let mut items = vec![
        (FILE_PARAMETERS, IS_REQUIRED, parameters.to_vec()),
        (
            DISK_SIZE,
            IS_VIRTUAL_DISK | IS_REQUIRED,
            size.to_le_bytes().to_vec(),
        ),
        (
            LOGICAL_SECTOR,
            IS_VIRTUAL_DISK | IS_REQUIRED,
            512u32.to_le_bytes().to_vec(),
        ),
        (
            PHYSICAL_SECTOR,
            IS_VIRTUAL_DISK | IS_REQUIRED,
            4096u32.to_le_bytes().to_vec(),
        ),
        (DISK_ID, IS_VIRTUAL_DISK | IS_REQUIRED, vec![0x22; 16]),
    ];
    if let Some(parent) = parent {
        items.push((PARENT_LOCATOR, IS_REQUIRED, locator(parent)));
    }
    put(image, METADATA, b"metadata");
    put(image, METADATA + 10, &(items.len() as u16).to_le_bytes());
    let mut place = 64 << 10;
    for (number, (item, flags, data)) in items.into_iter().enumerate() {
        let entry = METADATA + 32 + 32 * number;
        put(image, entry, &guid(item));
        put(image, entry + 16, &(place as u32).to_le_bytes());
        put(image, entry + 20, &(data.len() as u32).to_le_bytes());
        put(image, entry + 24, &flags.to_le_bytes());
        put(image, METADATA + place, &data);
        place += data.len();
    }
}

fn locator(parent: &Parent<'_>) -> Vec<u8> {
    let pairs = [
        ("parent_linkage", guid_text(&parent.data_write)),
        ("relative_path", parent.relative.to_owned()),
        ("absolute_win32_path", parent.absolute.to_owned()),
    ];
    let mut locator = guid(LOCATOR_TYPE).to_vec();
    locator.extend([0, 0]);
    locator.extend((pairs.len() as u16).to_le_bytes());
    let mut strings = Vec::new();
    let first = locator.len() + 12 * pairs.len();
    for (key, value) in pairs {
        let (key, value) = (
            utf16(key, u16::to_le_bytes),
            utf16(&value, u16::to_le_bytes),
        );
        let at = (first + strings.len()) as u32;
        locator.extend(at.to_le_bytes());
        locator.extend((at + key.len() as u32).to_le_bytes());
        locator.extend((key.len() as u16).to_le_bytes());
        locator.extend((value.len() as u16).to_le_bytes());
        strings.extend(key);
        strings.extend(value);
    }
    locator.extend(strings);
    locator
}

fn put_blocks(image: &mut Vec<u8>, layer: &Layer, differencing: bool) {
    let blocks = layer.content.len().div_ceil(BLOCK);
    assert!(blocks <= CHUNK, "one chunk is enough for these tests");
    let mut bitmap = vec![0; MIB];
    for block in 0..blocks {
        let start = block * BLOCK;
        if !layer.has_any(start, BLOCK) {
            continue;
        }
        let at = image.len();
        let whole = layer.has_all(start, BLOCK);
        image.resize(at + BLOCK, 0);
        for from in (start..layer.content.len().min(start + BLOCK)).step_by(SECTOR) {
            if layer.has(from) {
                put(
                    image,
                    at + from - start,
                    &layer.content[from..from + SECTOR],
                );
                let sector = from / SECTOR;
                bitmap[sector / 8] |= 1 << (sector % 8);
            }
        }
        let state = match whole || !differencing {
            true => FULLY_PRESENT,
            false => PARTIALLY_PRESENT,
        };
        put(image, BAT + 8 * block, &(at as u64 | state).to_le_bytes());
    }
    if differencing {
        let at = image.len() as u64 | FULLY_PRESENT;
        put(image, BAT + 8 * CHUNK, &at.to_le_bytes());
        image.extend(bitmap);
    }
}

/// CRC-32C, bit by bit, into the structure's field.
fn seal(image: &mut [u8], at: usize, len: usize) {
    put(image, at + 4, &[0; 4]);
    let crc = crc32c(&image[at..at + len]);
    put(image, at + 4, &crc.to_le_bytes());
}

fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| {
            crc >> 1 ^ if crc & 1 == 1 { 0x82f6_3b78 } else { 0 }
        })
    })
}

/// A GUID as it lies in a file: its first three fields are little endian.
fn guid(digits: &str) -> [u8; 16] {
    let number = u128::from_str_radix(digits, 16).expect("32 digits");
    let mut bytes = number.to_be_bytes();
    bytes[..4].reverse();
    bytes[4..6].reverse();
    bytes[6..8].reverse();
    bytes
}

fn guid_text(guid: &[u8; 16]) -> String {
    let field = |order: &[usize]| -> String {
        order
            .iter()
            .map(|&at| format!("{:02X}", guid[at]))
            .collect()
    };
    format!(
        "{{{}-{}-{}-{}-{}}}",
        field(&[3, 2, 1, 0]),
        field(&[5, 4]),
        field(&[7, 6]),
        field(&[8, 9]),
        field(&[10, 11, 12, 13, 14, 15])
    )
}

fn put(buf: &mut [u8], at: usize, bytes: &[u8]) {
    buf[at..at + bytes.len()].copy_from_slice(bytes);
}

fn number(image: &[u8], at: usize, len: usize) -> u64 {
    let bytes = image[at..at + len].iter().rev();
    bytes.fold(0, |number, &byte| number << 8 | u64::from(byte))
}

/// The disk that an image holds, the images below it included. Reads the second
/// region table; the writer's peer reads the first.
pub fn read(path: &Path) -> Vec<u8> {
    let image = std::fs::read(path).expect("an image");
    assert_eq!(&image[..8], b"vhdxfile");
    let region = |wanted: &str| {
        let table = 256 << 10;
        assert_eq!(number(&image, table + 4, 4), {
            let mut copy = image[table..table + (64 << 10)].to_vec();
            copy[4..8].fill(0);
            u64::from(crc32c(&copy))
        });
        let entries = (0..number(&image, table + 8, 4) as usize).map(|n| table + 16 + 32 * n);
        let entry = entries
            .into_iter()
            .find(|&at| image[at..at + 16] == guid(wanted));
        number(&image, entry.expect("the region") + 16, 8) as usize
    };
    let (bat, metadata) = (region(BAT_REGION), region(METADATA_REGION));
    let item = |wanted: &str| {
        let entries =
            (0..number(&image, metadata + 10, 2) as usize).map(|n| metadata + 32 + 32 * n);
        let entry = entries
            .into_iter()
            .find(|&at| image[at..at + 16] == guid(wanted))?;
        Some(metadata + number(&image, entry + 16, 4) as usize)
    };
    let size = number(&image, item(DISK_SIZE).expect("a size"), 8) as usize;
    let mut disk = match item(PARENT_LOCATOR) {
        Some(locator) => {
            let mut below = read(&parent_of(&image, locator, path));
            below.resize(size, 0);
            below
        }
        None => vec![0; size],
    };
    let bitmap = number(&image, bat + 8 * CHUNK, 8) as usize & !(MIB - 1);
    for start in (0..size).step_by(BLOCK) {
        let block = start / BLOCK;
        let entry = number(&image, bat + 8 * (block + block / CHUNK), 8);
        let at = entry as usize & !(MIB - 1);
        for from in (start..size.min(start + BLOCK)).step_by(SECTOR) {
            let sector = from / SECTOR;
            let is_own = match entry & 7 {
                FULLY_PRESENT => true,
                PARTIALLY_PRESENT => image[bitmap + sector / 8] >> (sector % 8) & 1 == 1,
                _ => false,
            };
            if is_own {
                let place = at + from - start;
                disk[from..from + SECTOR].copy_from_slice(&image[place..place + SECTOR]);
            }
        }
    }
    disk
}

/// The parent, by the relative path in the locator.
fn parent_of(image: &[u8], locator: usize, path: &Path) -> PathBuf {
    let text = |at: usize, len: usize| from_utf16(&image[locator + at..locator + at + len]);
    let entries = (0..number(image, locator + 18, 2) as usize).map(|n| locator + 20 + 12 * n);
    let name = entries
        .map(|at| {
            let [key, value] = [at, at + 4].map(|at| number(image, at, 4) as usize);
            let [key_len, value_len] = [at + 8, at + 10].map(|at| number(image, at, 2) as usize);
            (text(key, key_len), text(value, value_len))
        })
        .find(|(key, _)| key == "relative_path")
        .expect("a relative path")
        .1;
    path.with_file_name("").join(name.replace('\\', "/"))
}
