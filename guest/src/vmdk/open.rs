//! Opening: from the first bytes of the files to a checked [`Vmdk`].

use super::descriptor::{Access, Descriptor, ExtentLine, ExtentType};
use super::format::{fresh, header, limit};
use super::leftover::Tail;
use super::refuse::{damaged, unsupported};
use super::sparse::Sparse;
use super::tables::Tables;
use super::write::Pending;
use super::{Body, DiskExtent, Shape, Vmdk};
use crate::bytes::{le32, slice};
use crate::disk::{Opened, Opening};
use crate::engine::{Host, Read};
use crate::error::Failure;
use crate::plan::SECTOR;
use crate::proto::{FileNo, MAX_INFLATE};
use alloc::boxed::Box;
use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;

/// Kinds of images that a descriptor file can describe here.
const CREATE_TYPES: [&str; 4] = [
    "monolithicFlat",
    "vmfs",
    "twoGbMaxExtentSparse",
    "twoGbMaxExtentFlat",
];

/// Opens an image.
pub fn open(host: &mut dyn Host, opening: Opening<'_>) -> Result<Opened, Failure> {
    let head = opening.head;
    if head.starts_with(b"COWD") {
        return Err(unsupported(
            "the image is an ESX sparse extent (COWD), which is not supported",
        ));
    }
    let vmdk = match le32(head, 0) {
        Ok(header::MAGIC_VALUE) => Vmdk::open_embedded(host, &opening)?,
        _ => Vmdk::open_descriptor(host, &opening)?,
    };
    let facts = vmdk.facts(opening.probed);
    Ok((Box::new(vmdk), facts))
}

impl Vmdk {
    /// Opens a sparse extent with its descriptor inside.
    fn open_embedded(host: &mut dyn Host, opening: &Opening<'_>) -> Result<Self, Failure> {
        let sparse = Sparse::open(host, FileNo::IMAGE, opening.file_len, opening.head)?;
        let (descriptor, descriptor_at) = read_embedded(host, opening, &sparse)?;
        if sparse.header.capacity == 0 && descriptor.create_type != "monolithicSparse" {
            return Err(unsupported(format!(
                "Unsupported image type '{}' in a descriptor that is embedded",
                descriptor.create_type
            )));
        }
        let grain = sparse.header.grain_len();
        if sparse.header.compressed && grain > MAX_INFLATE {
            return Err(unsupported(format!(
                "the header's grainSize makes compressed grains of {grain} bytes, at most \
                 {MAX_INFLATE} are supported"
            )));
        }
        let first_sector = slice(opening.head, 0, SECTOR as usize)
            .map_err(|_| damaged("the file ends inside the header's sector"))?;
        Ok(Self {
            shape: Shape::Embedded {
                first_sector: first_sector.to_vec(),
            },
            descriptor,
            descriptor_at,
            read_only: sparse.header.compressed || sparse.header.version > 2,
            extents: vec![DiskExtent {
                start: 0,
                len: sparse.header.capacity * SECTOR,
                body: Body::Sparse(sparse),
            }],
            tables: Tables::default(),
            write: opening.write,
            planned: false,
            pending: Pending::default(),
            chance: opening.chance.clone(),
        })
    }

    /// Opens a file that is a descriptor and no more.
    fn open_descriptor(host: &mut dyn Host, opening: &Opening<'_>) -> Result<Self, Failure> {
        if opening.file_len > limit::MAX_DESCRIPTOR {
            return Err(damaged(format!(
                "the descriptor is {} bytes long, at most {} are possible",
                opening.file_len,
                limit::MAX_DESCRIPTOR
            )));
        }
        let mut area = read_area(host, opening, 0, opening.file_len)?;
        let tail = Tail::find(&area);
        if let Some(at) = tail.lines_at() {
            area.truncate(at as usize);
        }
        let descriptor = Descriptor::parse(&area)?;
        if !CREATE_TYPES.contains(&descriptor.create_type.as_str()) {
            return Err(unsupported(format!(
                "Unsupported image type '{}'",
                descriptor.create_type
            )));
        }
        let mut names: Vec<&str> = Vec::new();
        let mut numbers = Vec::new();
        for line in &descriptor.extents {
            numbers.push(number_of(line, &mut names)?);
        }
        let mut vmdk = Self {
            shape: Shape::Descriptor {
                files: names.len(),
                numbers,
                tail,
            },
            read_only: is_read_only(&descriptor),
            descriptor,
            descriptor_at: 0,
            extents: Vec::new(),
            tables: Tables::default(),
            write: opening.write,
            planned: false,
            pending: Pending::default(),
            chance: opening.chance.clone(),
        };
        if vmdk.file_names().is_empty() {
            vmdk.attach_extents(host, &[])?;
        }
        Ok(vmdk)
    }

    /// The names of the other files, in the order of their numbers.
    pub fn file_names(&self) -> Vec<String> {
        let Shape::Descriptor { numbers, files, .. } = &self.shape else {
            return Vec::new();
        };
        let mut names = vec![String::new(); *files];
        for (line, number) in self.descriptor.extents.iter().zip(numbers) {
            let name = (number.0 as usize)
                .checked_sub(1)
                .and_then(|index| names.get_mut(index));
            if let Some(name) = name {
                name.clone_from(&line.name);
            }
        }
        names
    }

    /// The files of the extents are open: reads their headers.
    pub fn attach_extents(&mut self, host: &mut dyn Host, lens: &[u64]) -> Result<(), Failure> {
        let Shape::Descriptor { numbers, files, .. } = &self.shape else {
            return Err(crate::disk::Disk::refuse(self, "has no other files"));
        };
        if lens.len() != *files {
            return Err(crate::disk::Disk::refuse(
                self,
                "does not have that many other files",
            ));
        }
        let heads = read_heads(host, &self.descriptor, numbers)?;
        let mut heads = heads.iter();
        let mut extents = Vec::with_capacity(numbers.len());
        let mut start = 0u64;
        for (line, &file) in self.descriptor.extents.iter().zip(numbers) {
            let file_len = match (file.0 as usize).checked_sub(1) {
                Some(index) => lens.get(index).copied().unwrap_or(0),
                None => 0,
            };
            let body = match line.kind {
                ExtentType::Zero => Body::Zero,
                ExtentType::Flat | ExtentType::Vmfs => Body::Flat {
                    file,
                    at: line.offset * SECTOR,
                    file_len,
                    in_place: !self.read_only && line.access == Access::ReadWrite,
                },
                ExtentType::Sparse => {
                    let head = heads.next().map_or(&[][..], Vec::as_slice);
                    let sparse = open_extent(host, file, file_len, head)
                        .map_err(|failure| in_extent(&line.name, failure))?;
                    Body::Sparse(sparse)
                }
            };
            let len = match &body {
                // QEMU believes the extent's header, not the line.
                Body::Sparse(sparse) => sparse.header.capacity * SECTOR,
                _ => line.sectors * SECTOR,
            };
            if start
                .checked_add(len)
                .is_none_or(|end| end > i64::MAX as u64)
            {
                return Err(damaged(
                    "the extents of the descriptor are too long together",
                ));
            }
            extents.push(DiskExtent { start, len, body });
            start += len;
        }
        self.extents = extents;
        self.tables.clear();
        Ok(())
    }
}

/// Whether something in a descriptor forbids changes.
fn is_read_only(descriptor: &Descriptor) -> bool {
    descriptor.value("changetrackpath").is_some()
        || descriptor
            .extents
            .iter()
            .any(|line| line.access == Access::ReadOnly)
}

/// The number of an extent's file; the names so far are those of 1 and up.
fn number_of<'a>(line: &'a ExtentLine, names: &mut Vec<&'a str>) -> Result<FileNo, Failure> {
    if line.kind == ExtentType::Zero {
        return Ok(FileNo::IMAGE);
    }
    let known = names.iter().position(|name| *name == line.name);
    if known.is_some() && line.kind == ExtentType::Sparse {
        return Err(damaged(format!(
            "the descriptor names the sparse extent '{}' twice",
            line.name
        )));
    }
    let index = known.unwrap_or_else(|| {
        names.push(&line.name);
        names.len() - 1
    });
    Ok(FileNo(index as u32 + 1))
}

/// The first sectors of the sparse extents, in their order.
fn read_heads(
    host: &mut dyn Host,
    descriptor: &Descriptor,
    numbers: &[FileNo],
) -> Result<Vec<Vec<u8>>, Failure> {
    let files: Vec<FileNo> = descriptor
        .extents
        .iter()
        .zip(numbers)
        .filter(|(line, _)| line.kind == ExtentType::Sparse)
        .map(|(_, &file)| file)
        .collect();
    let mut heads = vec![vec![0; SECTOR as usize]; files.len()];
    let mut reads: Vec<Read<'_>> = files
        .iter()
        .zip(&mut heads)
        .map(|(&file, buf)| Read {
            file,
            offset: 0,
            buf,
        })
        .collect();
    if !reads.is_empty() {
        host.read(&mut reads)?;
    }
    Ok(heads)
}

fn open_extent(
    host: &mut dyn Host,
    file: FileNo,
    file_len: u64,
    head: &[u8],
) -> Result<Sparse, Failure> {
    if head.starts_with(b"COWD") {
        return Err(unsupported("it is an ESX sparse extent (COWD)"));
    }
    let sparse = Sparse::open(host, file, file_len, head)?;
    if sparse.header.compressed {
        return Err(unsupported("its grains are compressed"));
    }
    if sparse.header.capacity == 0 {
        return Err(damaged("its capacity is 0"));
    }
    Ok(sparse)
}

fn in_extent(name: &str, failure: Failure) -> Failure {
    Failure::new(
        failure.kind,
        format!("extent '{name}': {}", failure.message),
    )
}

/// The descriptor in a sparse extent: where the header says, or where QEMU
/// looks if it says nothing; and the byte of the file at which it begins.
fn read_embedded(
    host: &mut dyn Host,
    opening: &Opening<'_>,
    sparse: &Sparse,
) -> Result<(Descriptor, u64), Failure> {
    let (sector, sectors) = match sparse.header.descriptor {
        0 => (fresh::DESCRIPTOR, 0),
        sector => (sector, sparse.header.descriptor_size),
    };
    let sectors = match sectors {
        0 => fresh::DESCRIPTOR_SECTORS,
        sectors => sectors,
    };
    let area = read_area(host, opening, sector * SECTOR, sectors * SECTOR)?;
    Ok((Descriptor::parse(&area)?, sector * SECTOR))
}

/// Bytes of the image's file, from its head if they are there.
fn read_area(
    host: &mut dyn Host,
    opening: &Opening<'_>,
    at: u64,
    len: u64,
) -> Result<Vec<u8>, Failure> {
    let len = len.min(opening.file_len.saturating_sub(at));
    let in_head = usize::try_from(at)
        .ok()
        .and_then(|at| slice(opening.head, at, len as usize).ok());
    if let Some(bytes) = in_head {
        return Ok(bytes.to_vec());
    }
    let mut area = vec![0; len as usize];
    host.read(&mut [Read {
        file: FileNo::IMAGE,
        offset: at,
        buf: &mut area,
    }])?;
    Ok(area)
}
