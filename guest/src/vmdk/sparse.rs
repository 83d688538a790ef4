//! The header of a hosted sparse extent: read, checked, written.

use super::format::{entry, flag, header, limit, marker};
use super::refuse::{damaged, unsupported};
use crate::bytes::{self, byte, le16, le32, le64, slice};
use crate::engine::{Host, Read};
use crate::error::Failure;
use crate::plan::SECTOR;
use crate::proto::FileNo;
use alloc::format;
use alloc::vec;
use alloc::vec::Vec;

/// A header whose fields have been checked. Offsets and lengths are sectors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// 1 to 3.
    pub version: u32,
    /// See [`flag`].
    pub flags: u32,
    /// Length of the extent.
    pub capacity: u64,
    /// Length of a grain: a power of two.
    pub grain: u64,
    /// Where the embedded descriptor lies; 0 for none.
    pub descriptor: u64,
    /// How much room it has.
    pub descriptor_size: u64,
    /// Entries of a grain table, 1 to 512.
    pub table_entries: u32,
    /// Where the redundant grain directory lies, where there is one.
    pub redundant: Option<u64>,
    /// Where the grain directory lies.
    pub directory: u64,
    /// Sectors before the first grain.
    pub overhead: u64,
    /// Whether a writer has not closed the extent.
    pub unclean: bool,
    /// Whether grains are compressed.
    pub compressed: bool,
}

/// A sparse extent in its file.
#[derive(Clone, Debug)]
pub struct Sparse {
    /// The file.
    pub file: FileNo,
    /// Its length in bytes.
    pub file_len: u64,
    /// Its header, or the footer that counts instead.
    pub header: Header,
    /// Whether the header is a footer at the end of the file.
    pub at_end: bool,
}

impl Sparse {
    /// Reads the extent in a file, whose first sector is `head`.
    pub fn open(
        host: &mut dyn Host,
        file: FileNo,
        file_len: u64,
        head: &[u8],
    ) -> Result<Self, Failure> {
        if le32(head, 0).ok() != Some(header::MAGIC_VALUE) {
            return Err(damaged("the sparse extent does not begin with KDMV"));
        }
        let at_end = le64(head, header::DIRECTORY).ok() == Some(header::AT_END);
        let footer = match at_end {
            true => Some(read_footer(host, file, file_len, head)?),
            false => None,
        };
        let sector = footer.as_deref().unwrap_or(head);
        Ok(Self {
            file,
            file_len,
            header: Header::check(sector, file_len)?,
            at_end,
        })
    }

    /// The sector of a grain directory entry's table, checked; `None` for none.
    pub fn table(&self, index: u64, raw: u32) -> Result<Option<u64>, Failure> {
        if raw == entry::NONE {
            return Ok(None);
        }
        let sector = u64::from(raw);
        let len = self.header.table_len();
        if sector * SECTOR + len > self.file_len {
            return Err(super::refuse::table(format!(
                "grain directory entry {index}: the grain table at sector {sector} lies past the \
                 end of the file ({} bytes)",
                self.file_len
            )));
        }
        Ok(Some(sector))
    }

    /// Whether a directory's table lies where nothing else can: in the metadata,
    /// in order behind its directory, apart from the other set.
    pub fn is_orderly(&self, directory: u64, index: u64, sector: u64) -> bool {
        let header = &self.header;
        let stride = header.table_sectors();
        let sectors = (header.directory_entries() * entry::LEN).div_ceil(SECTOR);
        let len = sectors + header.directory_entries() * stride;
        let others = [
            (directory != header.directory).then_some((header.directory, len)),
            header
                .redundant
                .filter(|&redundant| redundant != directory)
                .map(|redundant| (redundant, len)),
            (header.descriptor > 0).then_some((header.descriptor, header.descriptor_size)),
        ];
        header.redundant != Some(header.directory)
            && sector == directory + sectors + index * stride
            && directory + len <= header.overhead
            && others
                .into_iter()
                .flatten()
                .all(|(at, size)| at + size <= directory || directory + len <= at)
    }

    /// What a grain table entry says about grain `index` of the extent.
    pub fn grain(&self, index: u64, raw: u32) -> Result<Grain, Failure> {
        match raw {
            entry::NONE => return Ok(Grain::None),
            entry::ZEROED if self.header.flags & flag::ZEROED_GRAINS != 0 => {
                return Ok(Grain::Zeroed);
            }
            _ => {}
        }
        let at = u64::from(raw) * SECTOR;
        if at >= self.file_len {
            return Err(super::refuse::table(format!(
                "grain table entry of grain {index}: the grain at sector {raw} lies past the end \
                 of the file ({} bytes)",
                self.file_len
            )));
        }
        Ok(Grain::At(u64::from(raw)))
    }
}

/// What a grain table entry says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Grain {
    /// The grain is not in this extent.
    None,
    /// The grain reads as zeroes.
    Zeroed,
    /// The grain lies at this sector of the file, inside it.
    At(u64),
}

impl Header {
    /// Checks a header's fields against the length of its file in bytes.
    pub fn check(sector: &[u8], file_len: u64) -> Result<Self, Failure> {
        slice(sector, 0, header::LEN).map_err(|_| {
            damaged(format!(
                "the sparse extent's header is cut short: the file is {file_len} bytes long"
            ))
        })?;
        let flags = le32(sector, header::FLAGS)?;
        let compression = le16(sector, header::COMPRESSION)?;
        let found = Self {
            version: le32(sector, header::VERSION)?,
            flags,
            capacity: le64(sector, header::CAPACITY)?,
            grain: le64(sector, header::GRAIN_SIZE)?,
            descriptor: le64(sector, header::DESCRIPTOR_OFFSET)?,
            descriptor_size: le64(sector, header::DESCRIPTOR_SIZE)?,
            table_entries: le32(sector, header::TABLE_ENTRIES)?,
            redundant: match flags & flag::REDUNDANT {
                0 => None,
                _ => Some(le64(sector, header::REDUNDANT_DIRECTORY)?),
            },
            directory: le64(sector, header::DIRECTORY)?,
            overhead: le64(sector, header::OVERHEAD)?,
            unclean: byte(sector, header::UNCLEAN)? != 0,
            compressed: compression == header::COMPRESSION_DEFLATE,
        };
        let newlines = slice(sector, header::NEWLINES, header::NEWLINES_VALUE.len())?;
        if flags & flag::NEWLINES != 0 && newlines != header::NEWLINES_VALUE {
            return Err(damaged(format!(
                "the header's newline bytes are {newlines:02x?} instead of {:02x?}: the file was \
                 copied as text",
                header::NEWLINES_VALUE
            )));
        }
        if compression > header::COMPRESSION_DEFLATE {
            return Err(damaged(format!(
                "the header's compressAlgorithm is {compression}, only 0 and 1 are known"
            )));
        }
        found.check_geometry()?;
        found.check_places(file_len)?;
        Ok(found)
    }

    fn check_geometry(&self) -> Result<(), Failure> {
        if !(1..=header::MAX_VERSION).contains(&self.version) {
            return Err(unsupported(format!(
                "Unsupported VMDK version {}",
                self.version
            )));
        }
        if !self.grain.is_power_of_two() || self.grain > limit::MAX_GRAIN {
            return Err(damaged(format!(
                "the header's grainSize is {}, not a power of two up to {}",
                self.grain,
                limit::MAX_GRAIN
            )));
        }
        if !(1..=limit::TABLE_ENTRIES).contains(&self.table_entries) {
            return Err(damaged(format!(
                "the header's numGTEsPerGT is {}, not 1 to {}",
                self.table_entries,
                limit::TABLE_ENTRIES
            )));
        }
        if self.capacity > i64::MAX as u64 / SECTOR {
            return Err(damaged(format!(
                "the header's capacity of {} sectors is impossible",
                self.capacity
            )));
        }
        if self.directory_entries() > limit::MAX_DIRECTORY {
            return Err(damaged(format!(
                "the header's capacity of {} sectors makes a grain directory of {} entries, at \
                 most {} are possible",
                self.capacity,
                self.directory_entries(),
                limit::MAX_DIRECTORY
            )));
        }
        Ok(())
    }

    fn check_places(&self, file_len: u64) -> Result<(), Failure> {
        let sectors = file_len.div_ceil(SECTOR);
        if self.overhead > sectors {
            return Err(damaged(format!(
                "File truncated, expecting at least {} bytes: the header's overHead is {} sectors, \
                 the file is {file_len} bytes long",
                self.overhead.saturating_mul(SECTOR),
                self.overhead
            )));
        }
        let directory = self.directory_entries() * entry::LEN;
        self.inside("gdOffset", self.directory, directory, file_len)?;
        if let Some(redundant) = self.redundant {
            self.inside("rgdOffset", redundant, directory, file_len)?;
        }
        if self.descriptor == 0 {
            return Ok(());
        }
        if self.descriptor_size > limit::MAX_DESCRIPTOR / SECTOR {
            return Err(damaged(format!(
                "the header's descriptorSize is {} sectors, at most {} are possible",
                self.descriptor_size,
                limit::MAX_DESCRIPTOR / SECTOR
            )));
        }
        self.inside("descriptorOffset", self.descriptor, 1, file_len)
    }

    /// Refuses a structure of `len` bytes at a sector where it cannot lie.
    fn inside(&self, field: &str, sector: u64, len: u64, file_len: u64) -> Result<(), Failure> {
        let end = sector
            .checked_mul(SECTOR)
            .and_then(|at| at.checked_add(len));
        let has_room = len == 0 || sector > 0;
        if has_room && end.is_some_and(|end| end <= file_len) {
            return Ok(());
        }
        Err(damaged(format!(
            "the header's {field} is sector {sector}: {len} bytes there are not inside the file of \
             {file_len} bytes, or overlap the header"
        )))
    }

    /// Sectors of the disk that one grain table maps.
    pub fn coverage(&self) -> u64 {
        u64::from(self.table_entries) * self.grain
    }

    /// Bytes of a grain table.
    pub fn table_len(&self) -> u64 {
        u64::from(self.table_entries) * entry::LEN
    }

    /// Sectors from one grain table to the next.
    pub fn table_sectors(&self) -> u64 {
        self.table_len().div_ceil(SECTOR)
    }

    /// Entries of the grain directory.
    pub fn directory_entries(&self) -> u64 {
        self.capacity.div_ceil(self.coverage())
    }

    /// Grains of the extent, the last perhaps cut short.
    pub fn grains(&self) -> u64 {
        self.capacity.div_ceil(self.grain)
    }

    /// Bytes of a grain.
    pub fn grain_len(&self) -> u64 {
        self.grain * SECTOR
    }

    /// Overwrites what a resize changes in a header's sector.
    pub fn put(&self, sector: &mut [u8]) -> Result<(), Failure> {
        bytes::put_le64(sector, header::CAPACITY, self.capacity)?;
        bytes::put_le64(sector, header::DESCRIPTOR_OFFSET, self.descriptor)?;
        bytes::put_le64(sector, header::DESCRIPTOR_SIZE, self.descriptor_size)?;
        if let Some(redundant) = self.redundant {
            bytes::put_le64(sector, header::REDUNDANT_DIRECTORY, redundant)?;
        }
        bytes::put_le64(sector, header::DIRECTORY, self.directory)?;
        bytes::put_le64(sector, header::OVERHEAD, self.overhead)?;
        Ok(())
    }

    /// The sector of a new extent's header.
    pub fn to_sector(&self) -> Result<Vec<u8>, Failure> {
        let mut sector = vec![0; SECTOR as usize];
        bytes::put_le32(&mut sector, 0, header::MAGIC_VALUE)?;
        bytes::put_le32(&mut sector, header::VERSION, self.version)?;
        bytes::put_le32(&mut sector, header::FLAGS, self.flags)?;
        bytes::put_le64(&mut sector, header::GRAIN_SIZE, self.grain)?;
        bytes::put_le32(&mut sector, header::TABLE_ENTRIES, self.table_entries)?;
        bytes::put(&mut sector, header::NEWLINES, &header::NEWLINES_VALUE)?;
        let compression = match self.compressed {
            true => header::COMPRESSION_DEFLATE,
            false => 0,
        };
        bytes::put_le16(&mut sector, header::COMPRESSION, compression)?;
        self.put(&mut sector)?;
        Ok(sector)
    }
}

/// The footer's sector. It takes the header's place where that says so, but for
/// the descriptor, which is where the header has it.
fn read_footer(
    host: &mut dyn Host,
    file: FileNo,
    file_len: u64,
    head: &[u8],
) -> Result<Vec<u8>, Failure> {
    let sectors = file_len.div_ceil(SECTOR);
    let first = sectors
        .checked_sub(marker::FOOTER_SECTORS)
        .ok_or_else(|| damaged("Invalid footer: the file ends before it"))?;
    let mut end = vec![0; (marker::FOOTER_SECTORS * SECTOR) as usize];
    host.read(&mut [Read {
        file,
        offset: first * SECTOR,
        buf: &mut end,
    }])?;
    let sector = SECTOR as usize;
    let kind = |at: usize| -> Result<(u32, u32), Failure> {
        Ok((
            le32(&end, at + marker::SIZE)?,
            le32(&end, at + marker::TYPE)?,
        ))
    };
    if kind(0)? != (0, marker::FOOTER) {
        return Err(damaged("Invalid footer: no marker of a footer precedes it"));
    }
    if le32(&end, sector)? != header::MAGIC_VALUE {
        return Err(damaged("Invalid footer: it does not begin with KDMV"));
    }
    if kind(2 * sector)? != (0, marker::END_OF_STREAM) || le64(&end, 2 * sector + marker::LBA)? != 0
    {
        return Err(damaged(
            "Invalid footer: no end-of-stream marker follows it",
        ));
    }
    let mut footer = slice(&end, sector, sector)?.to_vec();
    let descriptor = slice(head, header::DESCRIPTOR_OFFSET, 16)?;
    bytes::put(&mut footer, header::DESCRIPTOR_OFFSET, descriptor)?;
    Ok(footer)
}
