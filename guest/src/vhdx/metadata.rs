//! The metadata table and the items that matter.

use super::format::{limit, metadata as on_disk};
use super::geometry::Geometry;
use super::guid::Guid;
use super::refuse::{damaged, unsupported};
use super::region::Region;
use super::source::Source;
use crate::bytes::{self, le16, le32, le64};
use crate::engine::{Host, Read};
use crate::error::Failure;
use crate::proto::FileNo;
use alloc::format;
use alloc::vec;
use alloc::vec::Vec;

/// Name, identifier and length of the items that every image has.
const REQUIRED: [(&str, Guid, u32); 5] = [
    ("file parameters", on_disk::FILE_PARAMETERS, 8),
    ("virtual disk size", on_disk::DISK_SIZE, 8),
    ("virtual disk ID", on_disk::DISK_ID, 16),
    ("logical sector size", on_disk::LOGICAL_SECTOR, 4),
    ("physical sector size", on_disk::PHYSICAL_SECTOR, 4),
];

/// The checked metadata.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Metadata {
    /// Virtual size in bytes.
    pub size: u64,
    /// Host offset of the virtual size: any alignment.
    pub size_at: u64,
    /// Block and sector size, and whether there is a parent.
    pub geometry: Geometry,
    /// Whether the image is fixed: blocks stay allocated.
    pub fixed: bool,
    /// The parent locator's bytes, where there is a parent.
    pub locator: Option<Vec<u8>>,
}

/// Where an item is.
#[derive(Clone, Copy, Debug)]
struct Item {
    offset: u32,
    len: u32,
}

impl Item {
    fn end(self) -> u64 {
        u64::from(self.offset) + u64::from(self.len)
    }
}

impl Metadata {
    /// Reads the metadata: one read, and a second for items that are not right
    /// behind the table.
    pub fn read(host: &mut dyn Host, source: &Source, region: Region) -> Result<Self, Failure> {
        let mut start = vec![0; on_disk::LEN + 4096];
        source.read(
            host,
            &mut [Read {
                file: FileNo::IMAGE,
                offset: region.offset,
                buf: &mut start,
            }],
        )?;
        let table = find_items(&start, region)?;
        let locator = table.locator;
        let mut items = table.required.to_vec();
        items.extend(locator);
        refuse_overlaps(&items)?;
        let mut content: Vec<Vec<u8>> = items
            .iter()
            .map(|item| vec![0; item.len as usize])
            .collect();
        let reads = items.iter().zip(&mut content).map(|(item, buf)| Read {
            file: FileNo::IMAGE,
            offset: region.offset + u64::from(item.offset),
            buf,
        });
        let mut missing = Vec::new();
        for read in reads {
            let at = (read.offset - region.offset) as usize;
            match bytes::slice(&start, at, read.buf.len()) {
                Ok(found) => read.buf.copy_from_slice(found),
                Err(_) => missing.push(read),
            }
        }
        if !missing.is_empty() {
            source.read(host, &mut missing)?;
        }
        let [parameters, size, _, logical, physical, rest @ ..] = content.as_slice() else {
            return Err(damaged("the metadata table has no items"));
        };
        let [_, size_item, ..] = table.required;
        let parameters = Parameters::decode(parameters)?;
        let geometry = Geometry {
            block_size: parameters.block_size,
            sector: sector_size("logical", le32(logical, 0)?)?,
            has_parent: parameters.has_parent,
        };
        sector_size("physical", le32(physical, 0)?)?;
        if parameters.has_parent != locator.is_some() {
            return Err(damaged(match parameters.has_parent {
                true => "the image has a parent, and no parent locator",
                false => "the image has a parent locator, and no parent",
            }));
        }
        let size = le64(size, 0)?;
        check_size(size, geometry)?;
        Ok(Self {
            size,
            size_at: region.offset + u64::from(size_item.offset),
            geometry,
            fixed: parameters.fixed,
            locator: rest.first().cloned(),
        })
    }
}

struct Table {
    required: [Item; 5],
    locator: Option<Item>,
}

/// Finds the items in the table.
fn find_items(start: &[u8], region: Region) -> Result<Table, Failure> {
    if !start.starts_with(on_disk::SIGNATURE) {
        return Err(damaged("the metadata table does not begin with 'metadata'"));
    }
    let count = le16(start, on_disk::COUNT)?;
    if count > on_disk::MAX_COUNT {
        return Err(damaged(format!(
            "the metadata table has {count} entries, more than {}",
            on_disk::MAX_COUNT
        )));
    }
    let mut required = [None; 5];
    let mut locator = None;
    for index in 0..usize::from(count) {
        let at = on_disk::ENTRIES + index * on_disk::ENTRY_LEN;
        let entry = bytes::slice(start, at, on_disk::ENTRY_LEN)?;
        let mut guid = Guid::ZERO;
        guid.0.copy_from_slice(bytes::slice(entry, 0, 16)?);
        let flags = le32(entry, on_disk::ENTRY_FLAGS)?;
        let known = REQUIRED.iter().position(|&(_, id, _)| id == guid);
        let known = known.filter(|_| flags & on_disk::IS_USER == 0);
        let is_locator = guid == on_disk::PARENT_LOCATOR && flags & on_disk::IS_USER == 0;
        let slot = match known {
            Some(which) => required.get_mut(which),
            None if is_locator => Some(&mut locator),
            None => None,
        };
        let Some(slot) = slot else {
            if flags & on_disk::IS_REQUIRED != 0 {
                return Err(unsupported(format!(
                    "the image needs the metadata item {guid}, which is not known; convert the \
                     image with the program that wrote it"
                )));
            }
            continue;
        };
        let name = known
            .and_then(|which| REQUIRED.get(which))
            .map_or("parent locator", |&(name, ..)| name);
        if slot.is_some() {
            return Err(damaged(format!(
                "the metadata table has two entries for the {name}"
            )));
        }
        *slot = Some(check_item(name, entry, region)?);
    }
    let mut found = [Item { offset: 0, len: 0 }; 5];
    for ((place, item), (name, _, len)) in found.iter_mut().zip(required).zip(REQUIRED) {
        let item =
            item.ok_or_else(|| damaged(format!("the metadata table has no entry for the {name}")))?;
        if item.len != len {
            return Err(damaged(format!(
                "the {name} is {} bytes long instead of {len}",
                item.len
            )));
        }
        *place = item;
    }
    Ok(Table {
        required: found,
        locator,
    })
}

fn check_item(name: &str, entry: &[u8], region: Region) -> Result<Item, Failure> {
    let item = Item {
        offset: le32(entry, on_disk::ENTRY_OFFSET)?,
        len: le32(entry, on_disk::ENTRY_LENGTH)?,
    };
    if (item.offset as usize) < on_disk::LEN {
        return Err(damaged(format!(
            "the {name} at {:#x} overlaps the metadata table",
            item.offset
        )));
    }
    if item.len > on_disk::MAX_ITEM || item.end() > region.len {
        return Err(damaged(format!(
            "the {name} at {:#x} ({} bytes) reaches past the end of the metadata region ({} bytes)",
            item.offset, item.len, region.len
        )));
    }
    Ok(item)
}

fn refuse_overlaps(items: &[Item]) -> Result<(), Failure> {
    let mut sorted = items.to_vec();
    sorted.sort_unstable_by_key(|item| item.offset);
    let pair = sorted
        .iter()
        .zip(sorted.iter().skip(1))
        .find(|(one, next)| one.end() > u64::from(next.offset));
    match pair {
        None => Ok(()),
        Some((one, next)) => Err(damaged(format!(
            "the metadata items at {:#x} and {:#x} overlap",
            one.offset, next.offset
        ))),
    }
}

struct Parameters {
    block_size: u64,
    fixed: bool,
    has_parent: bool,
}

impl Parameters {
    fn decode(bytes: &[u8]) -> Result<Self, Failure> {
        let block_size = u64::from(le32(bytes, 0)?);
        let in_range = (limit::MIN_BLOCK..=limit::MAX_BLOCK).contains(&block_size);
        if !in_range || !block_size.is_power_of_two() {
            return Err(damaged(format!(
                "the block size of {block_size} bytes is not a power of two between 1 MiB and 256 \
                 MiB"
            )));
        }
        let flags = le32(bytes, 4)?;
        let unknown = flags & !(on_disk::LEAVE_ALLOCATED | on_disk::HAS_PARENT);
        if unknown != 0 {
            return Err(unsupported(format!(
                "the file parameters have the flags {unknown:#x}, which are not known; convert \
                 the image with the program that wrote it"
            )));
        }
        Ok(Self {
            block_size,
            fixed: flags & on_disk::LEAVE_ALLOCATED != 0,
            has_parent: flags & on_disk::HAS_PARENT != 0,
        })
    }
}

fn sector_size(which: &str, size: u32) -> Result<u64, Failure> {
    match size {
        512 | 4096 => Ok(u64::from(size)),
        _ => Err(damaged(format!(
            "the {which} sector size of {size} bytes is neither 512 nor 4096"
        ))),
    }
}

fn check_size(size: u64, geometry: Geometry) -> Result<(), Failure> {
    if !size.is_multiple_of(geometry.sector) {
        return Err(damaged(format!(
            "the virtual disk size of {size} bytes is not a multiple of the sector size of {}",
            geometry.sector
        )));
    }
    if size > limit::MAX_SIZE {
        return Err(damaged(format!(
            "the virtual disk size of {size} bytes is more than 64 TiB"
        )));
    }
    Ok(())
}

/// A new metadata region's first bytes, as far as they are not zero.
pub fn encode(size: u64, block_size: u64, fixed: bool, disk_id: Guid) -> Result<Vec<u8>, Failure> {
    const SECTOR: u32 = 512;
    let block_size = u32::try_from(block_size).map_err(|_| damaged("blocks are too large"))?;
    let mut parameters = Vec::from(block_size.to_le_bytes());
    parameters.extend(u32::from(fixed).to_le_bytes());
    let items = [
        (on_disk::IS_REQUIRED, parameters),
        (
            on_disk::IS_REQUIRED | on_disk::IS_DISK,
            size.to_le_bytes().to_vec(),
        ),
        (on_disk::IS_REQUIRED | on_disk::IS_DISK, disk_id.0.to_vec()),
        (
            on_disk::IS_REQUIRED | on_disk::IS_DISK,
            SECTOR.to_le_bytes().to_vec(),
        ),
        (
            on_disk::IS_REQUIRED | on_disk::IS_DISK,
            SECTOR.to_le_bytes().to_vec(),
        ),
    ];
    let mut bytes = vec![0; on_disk::LEN];
    bytes::put(&mut bytes, 0, on_disk::SIGNATURE)?;
    bytes::put(&mut bytes, on_disk::COUNT, &[items.len() as u8, 0])?;
    for (index, ((_, guid, len), (flags, content))) in REQUIRED.into_iter().zip(items).enumerate() {
        let at = on_disk::ENTRIES + index * on_disk::ENTRY_LEN;
        let offset = bytes.len() as u32;
        bytes::put(&mut bytes, at, &guid.0)?;
        bytes::put_le32(&mut bytes, at + on_disk::ENTRY_OFFSET, offset)?;
        bytes::put_le32(&mut bytes, at + on_disk::ENTRY_LENGTH, len)?;
        bytes::put_le32(&mut bytes, at + on_disk::ENTRY_FLAGS, flags)?;
        bytes.extend(content);
    }
    Ok(bytes)
}
