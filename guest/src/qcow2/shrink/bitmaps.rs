//! Persistent bitmaps: their tables must fit the new size in the moment of the
//! commit, and bits behind the new end may not come back with a later grow.
//!
//! A table that gets shorter stays where it is: the directory says how long it
//! is. A copy of the directory with the new lengths takes its place with the
//! commit, with a copy of the last cluster of bits where bits behind the end
//! are set; afterwards the originals are brought to the same content and take
//! their places back.

use super::super::Qcow2;
use super::super::bitmaps::{Bitmap, table_entries};
use super::super::format::{bitmap, entry};
use super::super::l2_table::Visit;
use super::super::layout::{Cursor, Run};
use super::super::refuse;
use crate::bytes;
use crate::engine::{Host, Read};
use crate::error::Failure;
use crate::plan::Step;
use crate::prepare::Prepare;
use crate::proto::FileNo;
use crate::units::HostOffset;
use alloc::format;
use alloc::vec;
use alloc::vec::Vec;

/// Bytes of a bitmap table that are read at once.
const CHUNK: u64 = 64 << 10;

/// The last cluster of bits of a bitmap, where bits behind the new end are set.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Bits {
    /// Where it is.
    at: u64,
    /// Bytes of it that are kept, the last with its high bits cleared.
    kept: u64,
    /// What the last of those becomes.
    last: u8,
}

/// What becomes of one bitmap.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Cut {
    /// Entries that its table will have.
    entries: u64,
    /// Its last cluster of bits, where that has to change.
    bits: Option<Bits>,
}

/// What becomes of the bitmaps.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cuts {
    list: Vec<Cut>,
    /// Clusters for copies; 0 if everything fits as it is.
    pub clusters: u64,
}

impl Cuts {
    /// Finds out.
    pub fn new(image: &Qcow2, host: &mut dyn Host, size: u64) -> Result<Self, Failure> {
        let geometry = image.header.geometry;
        let mut list = Vec::new();
        for bitmap in &image.bitmaps {
            let entries = table_entries(size, bitmap.granularity_bits, geometry)
                .min(u64::from(bitmap.table.count));
            let bits = stale_bits(image, host, bitmap, entries, size)?;
            list.push(Cut { entries, bits });
        }
        let mut cuts = Self { list, clusters: 0 };
        let changes = |(bitmap, cut): (&Bitmap, &Cut)| {
            cut.bits.is_some() || cut.entries != u64::from(bitmap.table.count)
        };
        if image.bitmaps.iter().zip(&cuts.list).any(changes) {
            let copies = cuts.list.iter().filter(|cut| cut.bits.is_some());
            let tables: u64 = copies
                .map(|cut| 1 + geometry.l1_clusters(cut.entries))
                .sum();
            cuts.clusters = tables + geometry.clusters(directory_len(image));
        }
        Ok(cuts)
    }

    /// Lays down the copies in `run`. Returns the place of the directory.
    pub fn lay_down(
        &self,
        image: &Qcow2,
        run: Run,
        prepare: &mut Prepare<'_>,
    ) -> Result<u64, Failure> {
        let geometry = image.header.geometry;
        let mut cursor = Cursor(run.first);
        let mut directory = Vec::new();
        for (bitmap, cut) in image.bitmaps.iter().zip(&self.list) {
            let mut at = bitmap.table.offset.0;
            if let Some(bits) = &cut.bits {
                let copy = geometry.host_offset(cursor.take(1).first);
                lay_down_bits(bits, copy, prepare)?;
                let table = cursor.take(geometry.l1_clusters(cut.entries));
                let from = core::mem::replace(&mut at, geometry.host_offset(table.first));
                let last = (cut.entries - 1) * entry::LEN;
                if last > 0 {
                    prepare.fresh(Step::Copy {
                        file: FileNo::IMAGE,
                        from,
                        to: at,
                        len: last,
                    })?;
                }
                prepare.fresh_slice(at + last, &copy.to_be_bytes())?;
            }
            let start = directory.len();
            directory.extend_from_slice(&bitmap.raw);
            bytes::put_be64(&mut directory, start + bitmap::TABLE_OFFSET, at)?;
            let entries = cut.entries as u32;
            bytes::put_be32(&mut directory, start + bitmap::TABLE_SIZE, entries)?;
            directory.resize(directory.len().next_multiple_of(8), 0);
        }
        let at = geometry.host_offset(cursor.take(0).first);
        prepare.fresh_slice(at, &directory)?;
        Ok(at)
    }

    /// Brings the originals to what their copies say.
    pub fn settle(&self, image: &Qcow2) -> Result<Vec<Step>, Failure> {
        let file = FileNo::IMAGE;
        let mut steps = Vec::new();
        self.each(image, |bitmap, cut, entry_at| {
            let old = u64::from(bitmap.table.count);
            if cut.entries != old {
                steps.push(Step::Write {
                    file,
                    offset: entry_at + bitmap::TABLE_SIZE as u64,
                    data: (cut.entries as u32).to_be_bytes().to_vec(),
                });
            }
            if let Some(bits) = &cut.bits {
                let cluster = image.header.geometry.cluster_size();
                if let Some(last) = bits.kept.checked_sub(1) {
                    steps.push(Step::Write {
                        file,
                        offset: bits.at + last,
                        data: vec![bits.last],
                    });
                }
                if bits.kept < cluster {
                    steps.push(Step::Zero {
                        file,
                        offset: bits.at + bits.kept,
                        len: cluster - bits.kept,
                    });
                }
            }
        })?;
        Ok(steps)
    }

    /// The writes that mark every bitmap as in use, and those that take the
    /// mark off again.
    pub fn marks(&self, image: &Qcow2) -> Result<(Vec<Step>, Vec<Step>), Failure> {
        let (mut set, mut clear) = (Vec::new(), Vec::new());
        let write = |entry_at: u64, flags: u32| Step::Write {
            file: FileNo::IMAGE,
            offset: entry_at + bitmap::FLAGS as u64,
            data: flags.to_be_bytes().to_vec(),
        };
        self.each(image, |bitmap, _, entry_at| {
            set.push(write(entry_at, bitmap.flags | bitmap::IN_USE));
            clear.push(write(entry_at, bitmap.flags));
        })?;
        Ok((set, clear))
    }

    fn each(
        &self,
        image: &Qcow2,
        mut visit: impl FnMut(&Bitmap, &Cut, u64),
    ) -> Result<(), Failure> {
        let Some(place) = image.header.extensions.bitmaps()? else {
            return Ok(());
        };
        let mut entry_at = place.directory.0;
        for (bitmap, cut) in image.bitmaps.iter().zip(&self.list) {
            visit(bitmap, cut, entry_at);
            entry_at += bitmap.raw.len().next_multiple_of(8) as u64;
        }
        Ok(())
    }

    /// The clusters that nothing refers to afterwards: bits behind the end and
    /// what tables no longer need.
    pub fn dropped(
        &self,
        image: &Qcow2,
        host: &mut dyn Host,
        visit: &mut Visit<'_>,
    ) -> Result<(), Failure> {
        let geometry = image.header.geometry;
        for (bitmap, cut) in image.bitmaps.iter().zip(&self.list) {
            let old = u64::from(bitmap.table.count);
            let mut index = cut.entries;
            while index < old {
                let count = (old - index).min(CHUNK / entry::LEN);
                let at = bitmap.table.offset.plus(index * entry::LEN);
                for word in read(host, at, count * entry::LEN)?.chunks_exact(8) {
                    if let Some(at) = place_of(image, bitmap, bytes::be64(word, 0)?)? {
                        let first = at / geometry.cluster_size();
                        visit(host, Run { first, count: 1 })?;
                    }
                }
                index += count;
            }
            let (clusters, kept) = (geometry.l1_clusters(old), geometry.l1_clusters(cut.entries));
            if kept < clusters {
                let first = bitmap.table.offset.0 / geometry.cluster_size() + kept;
                let count = clusters - kept;
                visit(host, Run { first, count })?;
            }
        }
        Ok(())
    }

    /// The originals that copies replace for good.
    pub fn replaced(&self, image: &Qcow2) -> Result<Vec<Run>, Failure> {
        let geometry = image.header.geometry;
        let Some(place) = image.header.extensions.bitmaps()? else {
            return Ok(Vec::new());
        };
        let cluster = |at: u64| at / geometry.cluster_size();
        let mut runs = vec![Run {
            first: cluster(place.directory.0),
            count: geometry.clusters(place.directory_len),
        }];
        for (bitmap, cut) in image.bitmaps.iter().zip(&self.list) {
            if let Some(bits) = &cut.bits {
                runs.push(Run {
                    first: cluster(bits.at),
                    count: 1,
                });
                runs.push(Run {
                    first: cluster(bitmap.table.offset.0),
                    count: geometry.l1_clusters(cut.entries),
                });
            }
        }
        Ok(runs)
    }
}

/// The last cluster of bits that is kept, where bits behind the end are set.
fn stale_bits(
    image: &Qcow2,
    host: &mut dyn Host,
    bitmap: &Bitmap,
    entries: u64,
    size: u64,
) -> Result<Option<Bits>, Failure> {
    let geometry = image.header.geometry;
    let cluster = geometry.cluster_size();
    let Some(last) = entries.checked_sub(1) else {
        return Ok(None);
    };
    let bits = size.div_ceil(1 << bitmap.granularity_bits) - last * cluster * 8;
    if bits >= cluster * 8 {
        return Ok(None);
    }
    let word = read(
        host,
        bitmap.table.offset.plus(last * entry::LEN),
        entry::LEN,
    )?;
    let Some(at) = place_of(image, bitmap, bytes::be64(&word, 0)?)? else {
        return Ok(None);
    };
    let kept = bits.div_ceil(8);
    let content = read(host, HostOffset(at), cluster)?;
    let last_at = kept.saturating_sub(1) as usize;
    let found = bytes::byte(&content, last_at)?;
    let last = match bits % 8 {
        0 => found,
        used => found & ((1 << used) - 1),
    };
    let behind = bytes::slice(&content, kept as usize, (cluster - kept) as usize)?;
    let stale = found != last || behind.iter().any(|&byte| byte != 0);
    Ok(stale.then_some(Bits { at, kept, last }))
}

/// Where a table entry's bits are; `None` for all zeroes and all ones.
fn place_of(image: &Qcow2, bitmap: &Bitmap, word: u64) -> Result<Option<u64>, Failure> {
    let geometry = image.header.geometry;
    let at = word & entry::OFFSET;
    if at == 0 {
        return Ok(None);
    }
    let why = refuse::misplaced(geometry, image.file_len, at, geometry.cluster_size());
    match why {
        None => Ok(Some(at)),
        Some(why) => Err(refuse::table(format!(
            "Bitmap '{}': its bits at {at:#x} are {why}",
            bitmap.name
        ))),
    }
}

/// A copy of bits without those behind the end. What follows reads as zeroes.
fn lay_down_bits(bits: &Bits, to: u64, prepare: &mut Prepare<'_>) -> Result<(), Failure> {
    let Some(last) = bits.kept.checked_sub(1) else {
        return Ok(());
    };
    if last > 0 {
        prepare.fresh(Step::Copy {
            file: FileNo::IMAGE,
            from: bits.at,
            to,
            len: last,
        })?;
    }
    prepare.fresh_slice(to + last, &[bits.last])
}

fn read(host: &mut dyn Host, at: HostOffset, len: u64) -> Result<Vec<u8>, Failure> {
    let mut buf = vec![0; len as usize];
    host.read(&mut [Read {
        file: FileNo::IMAGE,
        offset: at.0,
        buf: &mut buf,
    }])?;
    Ok(buf)
}

fn directory_len(image: &Qcow2) -> u64 {
    let entries = image.bitmaps.iter();
    entries
        .map(|bitmap| bitmap.raw.len().next_multiple_of(8) as u64)
        .sum()
}
