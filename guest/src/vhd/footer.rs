//! The footer, checked.

use super::chs::Chs;
use super::format::footer as field;
use super::format::{MAX_SECTORS, NO_OFFSET};
use super::refuse::{damaged, unsupported};
use crate::bytes;
use crate::error::{Failure, FailureKind};
use crate::plan::SECTOR;
use alloc::format;

/// What kind of disk an image holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// All of the disk is in the file.
    Fixed,
    /// Blocks are added as they are written.
    Dynamic,
    /// The same, over a parent.
    Differencing,
}

/// Where a footer was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// The first sector.
    Start,
    /// The last sector.
    End,
}

impl Place {
    fn name(self) -> &'static str {
        match self {
            Self::Start => "footer copy at the start of the file",
            Self::End => "footer at the end of the file",
        }
    }
}

/// A checked footer. What is not looked at is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Footer {
    raw: [u8; field::LEN],
    /// What kind of disk it is.
    pub kind: Kind,
}

/// Programs whose images have the size that the footer names, whatever its
/// geometry says: known to every version of QEMU. Since 10.0 it takes that size
/// for all programs but [`BY_GEOMETRY`].
const BY_SIZE: [&[u8; 4]; 6] = [b"qem2", b"win ", b"d2v ", b"tap\0", b"CTXS", b"wa\0\0"];
/// Programs whose images have the size that the geometry gives.
const BY_GEOMETRY: [&[u8; 4]; 2] = [b"vpc ", b"qemu"];

impl Footer {
    /// Checks the bytes of a footer.
    pub fn read(buf: &[u8], place: Place) -> Result<Self, Failure> {
        let raw: [u8; field::LEN] = buf.try_into().map_err(|_| missing(place))?;
        let footer = Self {
            raw,
            kind: Kind::Fixed,
        };
        if !raw.starts_with(field::COOKIE_VALUE) {
            return Err(missing(place));
        }
        footer.check_fields(place)
    }

    fn check_fields(self, place: Place) -> Result<Self, Failure> {
        let name = place.name();
        let (found, sum) = (
            self.be32(field::CHECKSUM)?,
            checksum(&self.raw, field::CHECKSUM)?,
        );
        if found != sum {
            return Err(damaged(format!(
                "the {name} has the checksum {found:#010x}, its bytes give {sum:#010x}"
            )));
        }
        let version = self.be32(field::VERSION)?;
        if version != field::VERSION_VALUE {
            return Err(unsupported(format!(
                "the {name} is of version {}.{}, only 1.0 is known",
                version >> 16,
                version & 0xffff
            )));
        }
        let kind = match self.be32(field::KIND)? {
            field::FIXED => Kind::Fixed,
            field::DYNAMIC => Kind::Dynamic,
            field::DIFFERENCING => Kind::Differencing,
            other => {
                return Err(unsupported(format!(
                    "the {name} says that the disk is of type {other}; known are 2 (fixed), 3 \
                     (dynamic) and 4 (differencing)"
                )));
            }
        };
        let footer = Self { kind, ..self };
        footer.check_size(name)?;
        footer.check_data_offset(name)?;
        Ok(footer)
    }

    fn check_size(&self, name: &str) -> Result<(), Failure> {
        let most = MAX_SECTORS * SECTOR;
        match self.current_size() > most || self.virtual_size() > most {
            false => Ok(()),
            true => Err(Failure::new(
                FailureKind::TooLarge,
                format!(
                    "the {name} says that the disk has {} bytes, the format has at most {most}",
                    self.virtual_size().max(self.current_size())
                ),
            )),
        }
    }

    fn check_data_offset(&self, name: &str) -> Result<(), Failure> {
        let at = self.data_offset();
        let fine = match self.kind {
            Kind::Fixed => return Ok(()),
            Kind::Dynamic | Kind::Differencing => {
                at >= SECTOR && at.is_multiple_of(SECTOR) && at != NO_OFFSET
            }
        };
        match fine {
            true => Ok(()),
            false => Err(damaged(format!(
                "the {name} says that the dynamic header is at {at:#x}, which is not a sector \
                 behind the first"
            ))),
        }
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8; field::LEN] {
        &self.raw
    }

    /// Where the dynamic header is, in bytes.
    pub fn data_offset(&self) -> u64 {
        self.be64(field::DATA_OFFSET)
    }

    /// Size of the disk that the footer names, in bytes.
    pub fn current_size(&self) -> u64 {
        self.be64(field::CURRENT_SIZE)
    }

    /// The geometry.
    pub fn geometry(&self) -> Chs {
        let [high, low, heads, sectors] = self.array(field::GEOMETRY);
        Chs {
            cylinders: u16::from_be_bytes([high, low]),
            heads,
            sectors,
        }
    }

    /// Size of the disk that a guest sees, in bytes, by QEMU's rule: two
    /// programs mean the geometry, unless it is the largest.
    pub fn virtual_size(&self) -> u64 {
        let geometry = self.geometry();
        match self.is_of(&BY_GEOMETRY) && geometry.total() != Chs::MAX.total() {
            true => geometry.size(),
            false => self.current_size() / SECTOR * SECTOR,
        }
    }

    /// How far the disk reaches for any program, in bytes: what one that goes by
    /// the geometry does not see, others do. Nothing before this is let go of.
    pub fn reach(&self) -> u64 {
        self.current_size().max(self.virtual_size())
    }

    /// The UUID.
    pub fn uuid(&self) -> [u8; 16] {
        self.array(field::UUID)
    }

    /// Whether a virtual machine is suspended on the disk.
    pub fn has_saved_state(&self) -> bool {
        let [flag] = self.array(field::SAVED_STATE);
        flag != 0
    }

    /// The footer of the same image with another size, in bytes. The geometry
    /// is the largest where a reader would go by it and it would not give the
    /// size exactly.
    pub fn resized(&self, size: u64) -> Result<Self, Failure> {
        let mut geometry = Chs::of(size / SECTOR);
        if !self.is_of(&BY_SIZE) && geometry.size() != size {
            geometry = Chs::MAX;
        }
        let mut footer = self.clone();
        footer.put_size(size, geometry)?;
        footer.seal()
    }

    /// A new image's footer.
    pub fn new(new: &New) -> Result<Self, Failure> {
        let mut footer = Self {
            raw: [0; field::LEN],
            kind: new.kind,
        };
        let (kind, data_offset) = match new.kind {
            Kind::Fixed => (field::FIXED, NO_OFFSET),
            Kind::Dynamic => (field::DYNAMIC, SECTOR),
            Kind::Differencing => (field::DIFFERENCING, SECTOR),
        };
        let time = new.time.saturating_sub(field::EPOCH) as u32;
        let raw = &mut footer.raw;
        bytes::put(raw, field::COOKIE, field::COOKIE_VALUE)?;
        bytes::put_be32(raw, field::FEATURES, field::FEATURES_VALUE)?;
        bytes::put_be32(raw, field::VERSION, field::VERSION_VALUE)?;
        bytes::put_be64(raw, field::DATA_OFFSET, data_offset)?;
        bytes::put_be32(raw, field::TIMESTAMP, time)?;
        bytes::put(raw, field::CREATOR, new.creator)?;
        // Virtual PC 2007 on Windows: what QEMU says of its images.
        bytes::put_be32(raw, field::CREATOR_VERSION, 0x0005_0003)?;
        bytes::put(raw, field::CREATOR_SYSTEM, b"Wi2k")?;
        bytes::put_be64(raw, field::ORIGINAL_SIZE, new.size)?;
        bytes::put_be32(raw, field::KIND, kind)?;
        bytes::put(raw, field::UUID, &new.uuid)?;
        footer.put_size(new.size, new.geometry)?;
        footer.seal()
    }

    fn put_size(&mut self, size: u64, geometry: Chs) -> Result<(), Failure> {
        let [high, low] = geometry.cylinders.to_be_bytes();
        let geometry = [high, low, geometry.heads, geometry.sectors];
        bytes::put_be64(&mut self.raw, field::CURRENT_SIZE, size)?;
        Ok(bytes::put(&mut self.raw, field::GEOMETRY, &geometry)?)
    }

    fn seal(mut self) -> Result<Self, Failure> {
        let sum = checksum(&self.raw, field::CHECKSUM)?;
        bytes::put_be32(&mut self.raw, field::CHECKSUM, sum)?;
        Ok(self)
    }

    fn is_of(&self, creators: &[&[u8; 4]]) -> bool {
        creators.contains(&&self.array(field::CREATOR))
    }

    fn be32(&self, at: usize) -> Result<u32, Failure> {
        Ok(bytes::be32(&self.raw, at)?)
    }

    fn be64(&self, at: usize) -> u64 {
        u64::from_be_bytes(self.array(at))
    }

    /// Bytes at a constant offset inside the footer.
    fn array<const N: usize>(&self, at: usize) -> [u8; N] {
        self.raw
            .get(at..)
            .and_then(|rest| rest.first_chunk())
            .copied()
            .unwrap_or([0; N])
    }
}

/// What distinguishes a new image's footer.
pub struct New<'a> {
    /// What kind of disk it is.
    pub kind: Kind,
    /// Four characters that name the program.
    pub creator: &'a [u8; 4],
    /// Size in bytes.
    pub size: u64,
    /// Geometry.
    pub geometry: Chs,
    /// UUID.
    pub uuid: [u8; 16],
    /// Seconds since 1970.
    pub time: u64,
}

/// One's complement of the sum of all bytes but the four of the checksum at
/// `at`.
pub fn checksum(buf: &[u8], at: usize) -> Result<u32, Failure> {
    let add = |sum: u32, &byte: &u8| sum.wrapping_add(u32::from(byte));
    let all = buf.iter().fold(0, add);
    let own = bytes::slice(buf, at, 4)?.iter().fold(0, add);
    Ok(!all.wrapping_sub(own))
}

fn missing(place: Place) -> Failure {
    Failure::new(
        FailureKind::NotThisFormat,
        format!(
            "invalid VPC image: there is no {}; name the image's real format with -f",
            place.name()
        ),
    )
}
