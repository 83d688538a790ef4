//! Reads a VMDK as strictly as the programs that know it best: the descriptor
//! and the headers of the extents agree on every size, grain tables follow
//! their directory in order, and the redundant tables say what the others say.
//! Reads by the redundant tables where there are any. (qemu compares none of
//! this, and looks at no redundant table.)

use super::super::bytes::Bytes;
use super::super::disk::Files;
use super::{SECTOR, Uses, hold};
use std::collections::BTreeMap;

/// Entries of a grain table.
const ENTRIES: u64 = 512;
/// Sectors of a grain table.
const TABLE: u64 = ENTRIES * 4 / SECTOR;
/// Header flags: a redundant directory is used; entries of 1 read as zeroes.
const REDUNDANT: u64 = 2;
const ZERO_GRAINS: u64 = 4;

/// The disk, by the strictest rules.
pub fn strictly(files: &Files, image: &str) -> Result<Bytes, String> {
    read(files, image, None)
}

/// The disk of a program that writes a larger size and touches nothing else.
pub fn grown_naively(files: &Files, image: &str, size: u64) -> Result<Bytes, String> {
    read(files, image, Some(size / SECTOR))
}

/// The files that a descriptor names.
pub fn parts(files: &Files, image: &str) -> Result<Vec<String>, String> {
    let file = files.get(image)?;
    if file.read(0, 4) == b"KDMV" {
        return Ok(Vec::new());
    }
    let descriptor = Descriptor::parse(&file.read(0, file.len()))?;
    Ok(descriptor
        .extents
        .into_iter()
        .map(|extent| extent.file)
        .collect())
}

/// Reads all extents, the last one up to another size of the disk in sectors if
/// one is given.
fn read(files: &Files, image: &str, grown: Option<u64>) -> Result<Bytes, String> {
    let file = files.get(image)?;
    let sparse = file.read(0, 4) == b"KDMV";
    let text = if sparse {
        let (offset, len) = (file.little::<8>(28), file.little::<8>(36));
        file.read(offset * SECTOR, len * SECTOR)
    } else {
        file.read(0, file.len())
    };
    let descriptor = Descriptor::parse(&text)?;
    let count = descriptor.extents.len();
    let mut disk = Bytes::default();
    for (number, extent) in descriptor.extents.iter().enumerate() {
        let start = disk.len();
        let len = match grown {
            Some(grown) if number + 1 == count => grown - start / SECTOR,
            _ => extent.sectors,
        };
        let file = if sparse {
            file
        } else {
            files.get(&extent.file)?
        };
        let content = match extent.kind.as_str() {
            "FLAT" | "VMFS" => flat(file, extent, len)?,
            "SPARSE" => sparse_extent(file, extent.sectors, len)?,
            other => return Err(format!("an extent of type {other}")),
        };
        disk.copy(&content, 0, start, len * SECTOR);
    }
    Ok(disk)
}

struct Descriptor {
    extents: Vec<Extent>,
}

struct Extent {
    sectors: u64,
    kind: String,
    file: String,
    offset: u64,
}

impl Descriptor {
    fn parse(text: &[u8]) -> Result<Self, String> {
        let end = text.iter().position(|&byte| byte == 0);
        let text = std::str::from_utf8(&text[..end.unwrap_or(text.len())]);
        let text = text.map_err(|_| "the descriptor is not text")?;
        hold(text.starts_with("# Disk DescriptorFile"), || {
            "no descriptor".to_owned()
        })?;
        let mut values = BTreeMap::new();
        let mut extents = Vec::new();
        for line in text.lines().map(str::trim) {
            let access = ["RW ", "RDONLY ", "NOACCESS "];
            if access.iter().any(|access| line.starts_with(access)) {
                extents.push(Extent::parse(line).ok_or_else(|| format!("extent line {line}"))?);
            } else if let Some((key, value)) = line.split_once('=') {
                values.insert(key.trim().to_lowercase(), value.trim());
            }
        }
        for key in ["version", "cid", "parentcid", "createtype"] {
            hold(values.contains_key(key), || {
                format!("the descriptor has no {key}")
            })?;
        }
        hold(values["parentcid"] == "ffffffff", || {
            "the disk has a parent".to_owned()
        })?;
        let cid = u32::from_str_radix(values["cid"], 16);
        hold(cid.is_ok(), || format!("CID {}", values["cid"]))?;
        hold(!extents.is_empty(), || "no extent".to_owned())?;
        Ok(Self { extents })
    }
}

impl Extent {
    /// `RW 4192256 SPARSE "disk-s001.vmdk"`, with an offset behind it if flat.
    fn parse(line: &str) -> Option<Self> {
        let (head, rest) = line.split_once('"')?;
        let (file, offset) = rest.split_once('"')?;
        let mut words = head.split_whitespace().skip(1);
        let offset = offset.trim();
        Some(Self {
            sectors: words.next()?.parse().ok()?,
            kind: words.next()?.to_owned(),
            file: file.to_owned(),
            offset: match offset {
                "" => 0,
                offset => offset.parse().ok()?,
            },
        })
    }
}

fn flat(file: &Bytes, extent: &Extent, sectors: u64) -> Result<Bytes, String> {
    let end = (extent.offset + extent.sectors) * SECTOR;
    hold(file.len() >= end, || {
        format!("{} has {} bytes of {end}", extent.file, file.len())
    })?;
    let mut content = Bytes::zeroes(sectors * SECTOR);
    content.copy(file, extent.offset * SECTOR, 0, sectors * SECTOR);
    Ok(content)
}

/// A directory with its tables.
struct Tables {
    directory: u64,
    first: u64,
}

impl Tables {
    /// Those that a directory at a sector leads to, in a row and in order.
    fn at(file: &Bytes, directory: u64, count: u64) -> Result<Self, String> {
        let entry = |number: u64| file.little::<4>(directory * SECTOR + 4 * number);
        let first = directory + (count * 4).div_ceil(SECTOR);
        for number in 0..count {
            hold(entry(number) == first + number * TABLE, || {
                format!(
                    "the directory at sector {directory} has {} as entry {number}",
                    entry(number)
                )
            })?;
        }
        Ok(Self { directory, first })
    }

    fn entry(&self, file: &Bytes, grain: u64) -> u64 {
        file.little::<4>(self.first * SECTOR + 4 * grain)
    }
}

/// An extent with tables, up to `len` sectors; the descriptor says how many it
/// has.
fn sparse_extent(file: &Bytes, described: u64, len: u64) -> Result<Bytes, String> {
    let (version, flags) = (file.little::<4>(4), file.little::<4>(8));
    hold(file.read(0, 4) == b"KDMV" && version <= 2, || {
        format!("no extent of version 1 or 2: {version}")
    })?;
    hold(file.read(72, 5) == b"\0\n \r\n", || {
        format!("line ends and state {:x?}", file.read(72, 5))
    })?;
    let (capacity, grain) = (file.little::<8>(12), file.little::<8>(20));
    hold(capacity == described, || {
        format!("{capacity} sectors in the header, {described} in the descriptor")
    })?;
    hold(
        grain.is_power_of_two() && file.little::<4>(44) == ENTRIES,
        || format!("grains of {grain} sectors"),
    )?;
    let count = capacity.div_ceil(grain * ENTRIES);
    let grains = Tables::at(file, file.little::<8>(56), count)?;
    let redundant = match flags & REDUNDANT {
        0 => None,
        _ => Some(Tables::at(file, file.little::<8>(48), count)?),
    };
    let extent = SparseExtent {
        file,
        grain,
        zero_grains: flags & ZERO_GRAINS != 0,
        count,
        grains,
        redundant,
    };
    extent.check(capacity)?;
    Ok(extent.read(len))
}

struct SparseExtent<'a> {
    file: &'a Bytes,
    grain: u64,
    zero_grains: bool,
    /// Tables of each set.
    count: u64,
    grains: Tables,
    redundant: Option<Tables>,
}

impl SparseExtent<'_> {
    /// The sector of a grain; `None` reads as zeroes.
    fn place(&self, tables: &Tables, grain: u64) -> Option<u64> {
        match tables.entry(self.file, grain) {
            0 => None,
            1 if self.zero_grains => None,
            sector => Some(sector),
        }
    }

    /// Everything has a place of its own, and both sets of tables lead to the
    /// same data: while a grain moves or is being allocated, one set may still
    /// lead to its copy, or to nothing.
    fn check(&self, capacity: u64) -> Result<(), String> {
        let mut uses = Uses::default();
        uses.add(0, SECTOR, "the header");
        let (offset, len) = (self.file.little::<8>(28), self.file.little::<8>(36));
        uses.add(offset * SECTOR, len * SECTOR, "the descriptor");
        let sets = [Some(&self.grains), self.redundant.as_ref()];
        for tables in sets.into_iter().flatten() {
            let start = tables.directory;
            let len = tables.first - start + self.count * TABLE;
            uses.add(start * SECTOR, len * SECTOR, "grain tables");
        }
        for grain in 0..capacity.div_ceil(self.grain) {
            let place = self.place(&self.grains, grain);
            let other = match &self.redundant {
                Some(redundant) => self.place(redundant, grain),
                None => place,
            };
            hold(self.agree(place, other), || {
                format!("grain {grain} is at sector {place:?}, or at {other:?}")
            })?;
            let others = other.filter(|_| place != other);
            for sector in place.into_iter().chain(others) {
                let (at, len) = (sector * SECTOR, self.grain * SECTOR);
                uses.add(at, len, format!("grain {grain}"));
            }
        }
        uses.check(self.file.len())
    }

    fn agree(&self, one: Option<u64>, other: Option<u64>) -> bool {
        let (Some(one), Some(other)) = (one, other) else {
            return true;
        };
        let bytes = |sector: u64| self.file.read(sector * SECTOR, self.grain * SECTOR);
        one == other || bytes(one) == bytes(other)
    }

    fn read(&self, sectors: u64) -> Bytes {
        let mut content = Bytes::zeroes(sectors * SECTOR);
        let tables = self.redundant.as_ref().unwrap_or(&self.grains);
        let room = self.count * ENTRIES;
        for grain in 0..sectors.div_ceil(self.grain).min(room) {
            if let Some(sector) = self.place(tables, grain) {
                let (from, len) = (sector * SECTOR, self.grain * SECTOR);
                content.copy(self.file, from, grain * len, len);
            }
        }
        content.set_len(sectors * SECTOR);
        content
    }
}
