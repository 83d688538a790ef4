//! The two region tables, and who owns which part of the file.

use super::checksum::{checksum, seal};
use super::format::{MIB, region as on_disk};
use super::guid::Guid;
use super::refuse::{damaged, unsupported};
use crate::bytes::{self, le32, le64};
use crate::error::Failure;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

/// A part of the file that is not a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Whose it is.
    pub owner: Owner,
    /// Host offset, a multiple of 1 MiB.
    pub offset: u64,
    /// Length in bytes, a multiple of 1 MiB.
    pub len: u64,
}

/// See [`Region`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// The first MiB.
    Headers,
    /// The log.
    Log,
    /// The block allocation table.
    Bat,
    /// The metadata.
    Metadata,
    /// A region that is not known and need not be.
    Other,
}

impl Owner {
    /// The name that messages use.
    pub fn name(self) -> &'static str {
        match self {
            Self::Headers => "the headers",
            Self::Log => "the log",
            Self::Bat => "the block allocation table",
            Self::Metadata => "the metadata region",
            Self::Other => "an unknown region",
        }
    }
}

impl Region {
    /// Host offset of the first byte behind it.
    pub fn end(self) -> u64 {
        self.offset.saturating_add(self.len)
    }

    /// Whether the range has a byte in it.
    pub fn overlaps(self, offset: u64, len: u64) -> bool {
        offset < self.end() && self.offset < offset.saturating_add(len)
    }
}

/// A valid region table.
#[derive(Clone, Debug)]
pub struct RegionTable {
    /// All regions, in order, those of headers and log first.
    pub regions: Vec<Region>,
    /// Offset in the table of the BAT's entry.
    bat_entry: usize,
    /// All 64 KiB as they are on disk, or will be.
    pub bytes: Vec<u8>,
}

/// Both region tables.
#[derive(Clone, Debug)]
pub struct Tables {
    /// The one that counts.
    pub table: RegionTable,
    /// Which of the two is to be made equal to it, and why.
    pub stale: Option<(usize, String)>,
}

impl Tables {
    /// Chooses the table that counts: the first, where it is valid.
    pub fn choose(first: &[u8], second: &[u8], log: Region) -> Result<Self, Failure> {
        let (table, stale) = match (check_sum(first), check_sum(second)) {
            (Err(flaw), Err(other)) => {
                return Err(damaged(format!(
                    "no valid region table: the first {flaw}, the second {other}"
                )));
            }
            (Ok(()), Ok(())) if first == second => (first, None),
            (Ok(()), Ok(())) => (first, Some((1, String::from("differs from the first")))),
            (Ok(()), Err(flaw)) => (first, Some((1, flaw))),
            (Err(flaw), Ok(())) => (second, Some((0, flaw))),
        };
        Ok(Self {
            table: RegionTable::decode(table, log)?,
            stale,
        })
    }
}

/// What is wrong with a table as such, if anything.
fn check_sum(bytes: &[u8]) -> Result<(), String> {
    if !bytes.starts_with(on_disk::SIGNATURE) {
        return Err("does not begin with 'regi'".into());
    }
    let stored = le32(bytes, on_disk::CHECKSUM).map_err(|_| String::from("is cut short"))?;
    let computed = checksum(bytes, on_disk::CHECKSUM);
    match stored == computed {
        true => Ok(()),
        false => Err(format!(
            "has the checksum {stored:#010x} instead of {computed:#010x}"
        )),
    }
}

impl RegionTable {
    fn decode(bytes: &[u8], log: Region) -> Result<Self, Failure> {
        let count = le32(bytes, on_disk::COUNT)?;
        if count > on_disk::MAX_COUNT {
            return Err(damaged(format!(
                "the region table has {count} entries, more than {}",
                on_disk::MAX_COUNT
            )));
        }
        let headers = Region {
            owner: Owner::Headers,
            offset: 0,
            len: MIB,
        };
        let mut table = Self {
            regions: Vec::new(),
            bat_entry: 0,
            bytes: bytes.to_vec(),
        };
        table.add(headers)?;
        table.add(log)?;
        for index in 0..count as usize {
            let at = on_disk::ENTRIES + index * on_disk::ENTRY_LEN;
            let region = decode_entry(index, bytes::slice(bytes, at, on_disk::ENTRY_LEN)?)?;
            let known = matches!(region.owner, Owner::Bat | Owner::Metadata);
            if known && table.find(region.owner).is_some() {
                return Err(damaged(format!(
                    "the region table has two entries for {}",
                    region.owner.name()
                )));
            }
            if region.owner == Owner::Bat {
                table.bat_entry = at;
            }
            table.add(region)?;
        }
        for owner in [Owner::Bat, Owner::Metadata] {
            table.get(owner)?;
        }
        Ok(table)
    }

    fn add(&mut self, region: Region) -> Result<(), Failure> {
        if region.len == 0 {
            return Ok(());
        }
        if let Some(other) = self.overlapping(region.offset, region.len) {
            return Err(damaged(format!(
                "{} at {:#x} ({} bytes) overlaps {}",
                region.owner.name(),
                region.offset,
                region.len,
                other.name()
            )));
        }
        self.regions.push(region);
        Ok(())
    }

    /// What the range overlaps, if anything.
    pub fn overlapping(&self, offset: u64, len: u64) -> Option<Owner> {
        self.regions
            .iter()
            .find(|region| region.overlaps(offset, len))
            .map(|region| region.owner)
    }

    fn find(&self, owner: Owner) -> Option<Region> {
        self.regions
            .iter()
            .copied()
            .find(|region| region.owner == owner)
    }

    /// The region of an owner that every image has.
    pub fn get(&self, owner: Owner) -> Result<Region, Failure> {
        self.find(owner).ok_or_else(|| {
            damaged(format!(
                "the region table has no entry for {}",
                owner.name()
            ))
        })
    }

    /// The table with another place for the BAT.
    pub fn with_bat(&self, offset: u64, len: u64) -> Result<Vec<u8>, Failure> {
        let mut bytes = self.bytes.clone();
        let len = u32::try_from(len).map_err(|_| damaged("the BAT is too long"))?;
        let at = self.bat_entry;
        bytes::put_le64(&mut bytes, at + on_disk::ENTRY_OFFSET, offset)?;
        bytes::put_le32(&mut bytes, at + on_disk::ENTRY_LENGTH, len)?;
        seal(&mut bytes, on_disk::CHECKSUM);
        Ok(bytes)
    }
}

fn decode_entry(index: usize, entry: &[u8]) -> Result<Region, Failure> {
    let mut guid = Guid::ZERO;
    guid.0.copy_from_slice(bytes::slice(entry, 0, 16)?);
    let flags = le32(entry, on_disk::ENTRY_FLAGS)?;
    let owner = match guid {
        on_disk::BAT => Owner::Bat,
        on_disk::METADATA => Owner::Metadata,
        _ if flags & 1 != 0 => {
            return Err(unsupported(format!(
                "the image needs the region {guid}, which is not known; convert the image with \
                 the program that wrote it"
            )));
        }
        _ => Owner::Other,
    };
    let region = Region {
        owner,
        offset: le64(entry, on_disk::ENTRY_OFFSET)?,
        len: u64::from(le32(entry, on_disk::ENTRY_LENGTH)?),
    };
    let refuse = |what: &str, value: u64| {
        damaged(format!(
            "region table, entry {index} ({}): the {what} {value:#x} is not a multiple of 1 MiB, \
             at least 1 MiB",
            owner.name()
        ))
    };
    if region.offset < MIB || !region.offset.is_multiple_of(MIB) {
        return Err(refuse("offset", region.offset));
    }
    if region.len < MIB || !region.len.is_multiple_of(MIB) {
        return Err(refuse("length", region.len));
    }
    Ok(region)
}

/// A new table with the places of the BAT and of the metadata.
pub fn encode(bat: (u64, u64), metadata: (u64, u64)) -> Result<Vec<u8>, Failure> {
    let mut bytes = alloc::vec![0; on_disk::LEN];
    bytes::put(&mut bytes, 0, on_disk::SIGNATURE)?;
    bytes::put_le32(&mut bytes, on_disk::COUNT, 2)?;
    let entries = [(on_disk::BAT, bat), (on_disk::METADATA, metadata)];
    for (index, (guid, (offset, len))) in entries.into_iter().enumerate() {
        let at = on_disk::ENTRIES + index * on_disk::ENTRY_LEN;
        let len = u32::try_from(len).map_err(|_| damaged("a region is too long"))?;
        bytes::put(&mut bytes, at, &guid.0)?;
        bytes::put_le64(&mut bytes, at + on_disk::ENTRY_OFFSET, offset)?;
        bytes::put_le32(&mut bytes, at + on_disk::ENTRY_LENGTH, len)?;
    }
    seal(&mut bytes, on_disk::CHECKSUM);
    Ok(bytes)
}
