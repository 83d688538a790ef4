//! The commit: one write inside the file's first sector.
//!
//! Size, L1 table, refcount table and, where its header extension can be moved
//! there, the bitmap directory lie in that sector. Where the extension cannot,
//! the bitmaps are marked as in use before the commit and the extension is
//! changed after it: a crash in between costs the bitmaps, not the disk.

use super::super::Qcow2;
use super::super::format::{autoclear, extension, header};
use super::super::header::Header;
use crate::bytes;
use crate::error::Failure;
use crate::plan::{SECTOR, Step};
use crate::proto::FileNo;
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

/// The writes that make the change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Commit {
    /// The commit.
    pub step: Step,
    /// The switch to the new bitmap directory, where it is not part of the
    /// commit.
    pub directory: Option<Step>,
}

impl NewHeader {
    /// The write that turns the first sector into this header. It covers only
    /// the bytes that change.
    pub fn commit(&self, image: &Qcow2) -> Result<Commit, Failure> {
        let (new, directory) = self.first_sector(image)?;
        let step = change(&image.first_sector, &new)?;
        Ok(Commit { step, directory })
    }

    /// The first sector as this header has it. Where the bitmap directory's
    /// place cannot be changed in it, also the write that changes it elsewhere.
    pub fn first_sector(&self, image: &Qcow2) -> Result<(Vec<u8>, Option<Step>), Failure> {
        let mut new = self.sector(&image.header, &image.first_sector)?;
        let directory = match self.bitmap_directory {
            Some(directory) => put_directory(&image.header, &mut new, directory)?,
            None => None,
        };
        Ok((new, directory))
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
        Ok(new)
    }
}

/// The write that turns one first sector into another. It covers only the bytes
/// that change.
pub fn change(old: &[u8], new: &[u8]) -> Result<Step, Failure> {
    let differs = |(a, b): (&u8, &u8)| a != b;
    let first = old.iter().zip(new).position(differs).unwrap_or(0);
    let last = old.iter().zip(new).rposition(differs).unwrap_or(0);
    Ok(Step::Write {
        file: FileNo::IMAGE,
        offset: first as u64,
        data: bytes::slice(new, first, last + 1 - first)?.to_vec(),
    })
}

/// Puts the place of the bitmap directory into the sector. Where it does not
/// fit, answers the write that changes it elsewhere.
fn put_directory(old: &Header, sector: &mut [u8], directory: u64) -> Result<Option<Step>, Failure> {
    let Some(present) = old.extensions.find(extension::BITMAPS) else {
        return Ok(None);
    };
    let mut data = present.data.clone();
    bytes::put_be64(&mut data, DIRECTORY_OFFSET, directory)?;
    let at = present.at + extension::HEADER_LEN;
    if at + data.len() <= SECTOR as usize {
        bytes::put(sector, at, &data)?;
        return Ok(None);
    }
    let area = compact(old, &data);
    let start = old.header_length as usize;
    if start + area.len() <= SECTOR as usize {
        bytes::put(sector, start, &area)?;
        return Ok(None);
    }
    // Header and extensions are multiples of 8 long: the number lies in one
    // sector.
    Ok(Some(Step::Write {
        file: FileNo::IMAGE,
        offset: (at + DIRECTORY_OFFSET) as u64,
        data: directory.to_be_bytes().to_vec(),
    }))
}

/// Offset of the directory's place in the bitmaps extension's data.
const DIRECTORY_OFFSET: usize = 16;

/// The extensions without the names of feature bits, which are optional, and
/// with new data for the bitmaps.
fn compact(old: &Header, bitmaps: &[u8]) -> Vec<u8> {
    let mut area = Vec::new();
    for ext in old.extensions.iter() {
        match ext.kind {
            extension::FEATURE_NAMES => {}
            extension::BITMAPS => push(&mut area, ext.kind, bitmaps),
            kind => push(&mut area, kind, &ext.data),
        }
    }
    area.extend_from_slice(&[0; extension::HEADER_LEN]);
    area
}

fn push(area: &mut Vec<u8>, kind: u32, data: &[u8]) {
    area.extend_from_slice(&kind.to_be_bytes());
    area.extend_from_slice(&(data.len() as u32).to_be_bytes());
    area.extend_from_slice(data);
    area.resize(area.len().next_multiple_of(8), 0);
}
