//! The commit: one write inside the file's first sector.

use super::super::Qcow2;
use super::super::format::{autoclear, extension, header};
use super::super::header::Header;
use crate::bytes;
use crate::engine::{Host, Read};
use crate::error::{Failure, FailureKind};
use crate::plan::{SECTOR, Step};
use crate::proto::FileNo;
use alloc::vec;
use alloc::vec::Vec;

/// What the header says after the commit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NewHeader {
    /// Virtual size in bytes.
    pub size: u64,
    /// Entries and place of the L1 table.
    pub l1: (u64, u64),
    /// Clusters and place of the refcount table.
    pub refcount_table: (u64, u64),
    /// Place of the bitmap directory, where it moves.
    pub bitmap_directory: Option<u64>,
}

impl NewHeader {
    /// The write that turns the first sector into this header. It covers only
    /// the bytes that change.
    pub fn commit(&self, image: &Qcow2, host: &mut dyn Host) -> Result<Step, Failure> {
        let mut old = vec![0; SECTOR as usize];
        host.read(&mut [Read {
            file: FileNo::IMAGE,
            offset: 0,
            buf: &mut old,
        }])?;
        let new = self.sector(&image.header, &old)?;
        let differs = |(a, b): (&u8, &u8)| a != b;
        let first = old.iter().zip(&new).position(differs).unwrap_or(0);
        let last = old.iter().zip(&new).rposition(differs).unwrap_or(0);
        Ok(Step::Write {
            file: FileNo::IMAGE,
            offset: first as u64,
            data: bytes::slice(&new, first, last + 1 - first)?.to_vec(),
        })
    }

    fn sector(&self, old: &Header, sector: &[u8]) -> Result<Vec<u8>, Failure> {
        let mut new = sector.to_vec();
        let ((l1_size, l1), (table_clusters, table)) = (self.l1, self.refcount_table);
        bytes::put_be64(&mut new, header::SIZE, self.size)?;
        bytes::put_be32(&mut new, header::L1_SIZE, l1_size as u32)?;
        bytes::put_be64(&mut new, header::L1_OFFSET, l1)?;
        bytes::put_be64(&mut new, header::REFCOUNT_TABLE_OFFSET, table)?;
        bytes::put_be32(
            &mut new,
            header::REFCOUNT_TABLE_CLUSTERS,
            table_clusters as u32,
        )?;
        if old.version >= 3 {
            let known = old.autoclear & autoclear::KNOWN;
            bytes::put_be64(&mut new, header::AUTOCLEAR, known)?;
        }
        if let Some(directory) = self.bitmap_directory {
            put_directory(old, &mut new, directory)?;
        }
        Ok(new)
    }
}

/// Puts the place of the bitmap directory into the sector.
fn put_directory(old: &Header, sector: &mut [u8], directory: u64) -> Result<(), Failure> {
    let Some(present) = old.extensions.find(extension::BITMAPS) else {
        return Ok(());
    };
    let mut data = present.data.clone();
    bytes::put_be64(&mut data, DIRECTORY_OFFSET, directory)?;
    let at = present.at + extension::HEADER_LEN;
    if at + data.len() <= SECTOR as usize {
        return Ok(bytes::put(sector, at, &data)?);
    }
    // The names of feature bits are optional. Without them the extensions that
    // matter move into the first sector.
    let start = old.header_length as usize;
    let mut area = sector.get(..start).unwrap_or_default().to_vec();
    for extension in old.extensions.iter() {
        match extension.kind {
            extension::FEATURE_NAMES => {}
            extension::BITMAPS => push(&mut area, extension::BITMAPS, &data),
            kind => push(&mut area, kind, &extension.data),
        }
    }
    area.extend_from_slice(&[0; extension::HEADER_LEN]);
    if area.len() > SECTOR as usize {
        return Err(no_room());
    }
    Ok(bytes::put(sector, 0, &area)?)
}

/// Offset of the directory's place in the bitmaps extension's data.
const DIRECTORY_OFFSET: usize = 16;

fn push(area: &mut Vec<u8>, kind: u32, data: &[u8]) {
    area.extend_from_slice(&kind.to_be_bytes());
    area.extend_from_slice(&(data.len() as u32).to_be_bytes());
    area.extend_from_slice(data);
    area.resize(area.len().next_multiple_of(8), 0);
}

fn no_room() -> Failure {
    Failure::new(
        FailureKind::Unsupported,
        "the image's persistent bitmaps must change together with its size, but its header \
         extensions do not fit into one sector; remove the bitmaps with `qemu-img bitmap --remove`, \
         or use `qemu-img resize`",
    )
}
