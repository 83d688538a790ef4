//! Persistent bitmaps: their tables must fit the new size in the moment of the
//! commit, or nobody opens the image any more.
//!
//! A bitmap's table has one entry per cluster of bits. Where a table gets
//! longer, the directory says so, and as the directory is not written
//! atomically, a new one goes to a new place; the header extension that leads to
//! it changes with the commit.

use super::super::Qcow2;
use super::super::bitmaps::{Bitmap, table_entries};
use super::super::format::{bitmap, entry, limit};
use super::super::geometry::Geometry;
use super::super::layout::{Cursor, Run};
use crate::bytes;
use crate::error::{Failure, FailureKind};
use crate::plan::Step;
use crate::prepare::Prepare;
use crate::proto::FileNo;
use alloc::format;
use alloc::vec::Vec;

/// What the bitmaps need for the new size.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BitmapNeeds {
    /// New clusters, directory included; 0 if everything fits as it is.
    pub clusters: u64,
    /// Entries that each bitmap's table will have.
    entries: Vec<u64>,
}

impl BitmapNeeds {
    /// Finds out.
    pub fn new(image: &Qcow2, size: u64) -> Result<Self, Failure> {
        let geometry = image.header.geometry;
        let entries: Vec<u64> = image
            .bitmaps
            .iter()
            .map(|bitmap| table_entries(size, bitmap.granularity_bits, geometry))
            .collect();
        let pairs = || image.bitmaps.iter().zip(&entries);
        if let Some((bitmap, entries)) = pairs().find(|(_, n)| **n > limit::MAX_BITMAP_TABLE) {
            return Err(Failure::new(
                FailureKind::TooLarge,
                format!(
                    "Bitmap '{}' would need a table of {entries} entries for the new size, at most \
                     {} are allowed; remove it with `qemu-img bitmap --remove`",
                    bitmap.name,
                    limit::MAX_BITMAP_TABLE
                ),
            ));
        }
        if pairs().all(|(bitmap, &entries)| entries == u64::from(bitmap.table.count)) {
            return Ok(Self::default());
        }
        let tables: u64 = pairs()
            .filter(|(bitmap, entries)| moves(geometry, bitmap, **entries))
            .map(|(_, &entries)| geometry.l1_clusters(entries))
            .sum();
        let directory = geometry.clusters(directory_len(&image.bitmaps));
        Ok(Self {
            clusters: tables + directory,
            entries,
        })
    }

    /// Lays down new tables and the new directory in `run`. Returns the place
    /// of the directory.
    pub fn lay_down(
        &self,
        image: &Qcow2,
        run: Run,
        prepare: &mut Prepare<'_>,
    ) -> Result<u64, Failure> {
        let geometry = image.header.geometry;
        let mut cursor = Cursor(run.first);
        let mut directory = Vec::new();
        for (bitmap, &entries) in image.bitmaps.iter().zip(&self.entries) {
            let old_len = u64::from(bitmap.table.count) * entry::LEN;
            let mut at = bitmap.table.offset.0;
            if moves(geometry, bitmap, entries) {
                let place = cursor.take(geometry.l1_clusters(entries));
                at = geometry.host_offset(place.first);
                prepare.fresh(Step::Copy {
                    file: FileNo::IMAGE,
                    from: bitmap.table.offset.0,
                    to: at,
                    len: old_len.min(image.file_len.saturating_sub(bitmap.table.offset.0)),
                })?;
            } else if entries * entry::LEN > old_len {
                prepare.inside(Step::Zero {
                    file: FileNo::IMAGE,
                    offset: at + old_len,
                    len: entries * entry::LEN - old_len,
                });
            }
            let start = directory.len();
            directory.extend_from_slice(&bitmap.raw);
            bytes::put_be64(&mut directory, start + bitmap::TABLE_OFFSET, at)?;
            bytes::put_be32(&mut directory, start + bitmap::TABLE_SIZE, entries as u32)?;
            directory.resize(directory.len().next_multiple_of(8), 0);
        }
        let at = geometry.host_offset(cursor.take(0).first);
        prepare.fresh_slice(at, &directory)?;
        Ok(at)
    }

    /// The writes that mark every bitmap of the present directory as in use:
    /// whoever finds it after a crash will not trust them.
    pub fn mark_in_use(image: &Qcow2) -> Result<Vec<Step>, Failure> {
        let Some(place) = image.header.extensions.bitmaps()? else {
            return Ok(Vec::new());
        };
        let mut entry_at = place.directory.0;
        let mut steps = Vec::new();
        for bitmap in &image.bitmaps {
            steps.push(Step::Write {
                file: FileNo::IMAGE,
                offset: entry_at + bitmap::FLAGS as u64,
                data: (bitmap.flags | bitmap::IN_USE).to_be_bytes().to_vec(),
            });
            entry_at += bitmap.raw.len().next_multiple_of(8) as u64;
        }
        Ok(steps)
    }

    /// The clusters that are not used any more: old tables that moved and the
    /// old directory.
    pub fn released(&self, image: &Qcow2) -> Result<Vec<Run>, Failure> {
        let geometry = image.header.geometry;
        let Some(place) = image.header.extensions.bitmaps()? else {
            return Ok(Vec::new());
        };
        if self.clusters == 0 {
            return Ok(Vec::new());
        }
        let run = |at: u64, clusters| Run {
            first: at / geometry.cluster_size(),
            count: clusters,
        };
        let tables = image
            .bitmaps
            .iter()
            .zip(&self.entries)
            .filter(|(bitmap, entries)| moves(geometry, bitmap, **entries))
            .map(|(bitmap, _)| {
                let clusters = geometry.l1_clusters(u64::from(bitmap.table.count));
                run(bitmap.table.offset.0, clusters)
            });
        let directory = run(place.directory.0, geometry.clusters(place.directory_len));
        Ok(tables.chain([directory]).collect())
    }
}

/// Whether a table with that many entries is longer than the clusters that the
/// present one has.
fn moves(geometry: Geometry, bitmap: &Bitmap, entries: u64) -> bool {
    geometry.l1_clusters(entries) > geometry.l1_clusters(u64::from(bitmap.table.count))
}

fn directory_len(bitmaps: &[Bitmap]) -> u64 {
    bitmaps
        .iter()
        .map(|bitmap| bitmap.raw.len().next_multiple_of(8) as u64)
        .sum()
}
