//! Copies behind the end of the file: what the disk hangs on between the two
//! commits, while the originals are brought to their new content.
//!
//! The copies are referred to by the first commit. After it nobody sees the
//! originals, so they are changed where they are and take their places back
//! with the second. An original that a snapshot refers to as well is no place
//! to go back to; then the first cluster that the shrink frees is, and where
//! there is none, the copy stays.

use super::super::Qcow2;
use super::super::format::{entry, limit};
use super::super::fresh;
use super::super::geometry::Geometry;
use super::super::layout::{Counting, Cursor, Run, counting};
use super::super::refcount::Refcounts;
use super::survey::{Boundary, Kept, Survey, Tail};
use crate::bytes;
use crate::engine::{Host, Read};
use crate::error::{Failure, FailureKind};
use crate::plan::{SECTOR, Step};
use crate::prepare::{Prepare, writes};
use crate::proto::FileNo;
use crate::units::HostOffset;
use alloc::format;
use alloc::vec::Vec;

/// Where the copies are.
#[derive(Clone, Debug, Default)]
pub struct Staging {
    /// The last cluster.
    pub tail: Run,
    /// The L2 table across the new end.
    pub l2: Run,
    /// Bits, tables and directory of the bitmaps.
    pub bitmaps: Run,
    /// Refcount blocks that count the copies, where none does.
    pub blocks: Run,
    /// The refcount table that leads to them.
    pub table: Run,
    /// The L1 table.
    pub l1: Run,
    /// Numbers of those blocks.
    counting: Counting,
    /// Numbers of the blocks from the first copy's on that exist.
    present: Vec<u64>,
}

/// Where things are for good.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Homes {
    /// Host cluster of the last cluster; `None` where it was.
    pub tail: Option<u64>,
    /// Host cluster of the table across the new end; `None` where it was.
    pub l2: Option<u64>,
}

impl Staging {
    /// Decides where the copies go.
    pub fn new(
        image: &Qcow2,
        host: &mut dyn Host,
        refcounts: &mut Refcounts<'_>,
        survey: &Survey,
        bitmaps: u64,
    ) -> Result<Self, Failure> {
        let geometry = image.header.geometry;
        let tables = u64::from(survey.boundary.is_some());
        let l1 = tables * geometry.l1_clusters(survey.l1_kept);
        let tail = u64::from(survey.tail.is_some());
        let total = tail + tables + bitmaps + l1;
        let end = geometry.clusters(image.file_len);
        if total == 0 {
            return Ok(Self::default());
        }
        let present = refcounts.present_from(host, end / geometry.refcounts_per_block())?;
        image.check_settled(host, refcounts)?;
        let first = refcounts.first_unused(host, end, &present)?;
        let table = u64::from(image.header.refcount_table.count);
        let counting = counting(geometry, first, total, &present, table).ok_or_else(too_many)?;
        let mut cursor = Cursor(first);
        Ok(Self {
            tail: cursor.take(tail),
            l2: cursor.take(tables),
            bitmaps: cursor.take(bitmaps),
            blocks: cursor.take(counting.blocks.len() as u64),
            table: cursor.take(counting.table),
            // Last, as its last entry is not zero: the file reaches that far.
            l1: cursor.take(l1),
            counting,
            present,
        })
    }

    /// All copies.
    pub fn all(&self) -> Run {
        Run {
            first: self.tail.first,
            count: self.l1.end() - self.tail.first,
        }
    }

    /// The parts of a run that blocks count which exist.
    pub fn counted(&self, geometry: Geometry, run: Run) -> Vec<Run> {
        let per_block = geometry.refcounts_per_block();
        let part = |&number: &u64| {
            let first = run.first.max(number * per_block);
            let end = run.end().min((number + 1) * per_block);
            (first < end).then(|| Run {
                first,
                count: end - first,
            })
        };
        self.present.iter().filter_map(part).collect()
    }

    /// Lays the copies down, the bitmaps' excepted.
    pub fn lay_down(
        &self,
        image: &Qcow2,
        survey: &Survey,
        prepare: &mut Prepare<'_>,
    ) -> Result<(), Failure> {
        let geometry = image.header.geometry;
        self.lay_down_counts(image, prepare)?;
        if let Some(tail) = &survey.tail {
            let to = geometry.host_offset(self.tail.first);
            match &tail.kept {
                &Kept::At { from, len, .. } => prepare.fresh(Step::Copy {
                    file: FileNo::IMAGE,
                    from,
                    to,
                    len: len.min(image.file_len.saturating_sub(from)),
                })?,
                Kept::Bytes(content) => prepare.fresh_slice(to, content)?,
            }
        }
        let Some(boundary) = &survey.boundary else {
            return Ok(());
        };
        let homes = Homes {
            tail: Some(self.tail.first),
            l2: Some(self.l2.first),
        };
        let table = homes.table(geometry, survey, boundary)?;
        prepare.fresh_slice(geometry.host_offset(self.l2.first), &table)?;
        let to = geometry.host_offset(self.l1.first);
        let at = boundary.index * entry::LEN;
        if at > 0 {
            prepare.fresh(Step::Copy {
                file: FileNo::IMAGE,
                from: image.header.l1.offset.0,
                to,
                len: at,
            })?;
        }
        let pointer = geometry.host_offset(self.l2.first) | entry::COPIED;
        prepare.fresh_slice(to + at, &pointer.to_be_bytes())
    }

    /// New refcount blocks and the table that leads to them.
    fn lay_down_counts(&self, image: &Qcow2, prepare: &mut Prepare<'_>) -> Result<(), Failure> {
        let geometry = image.header.geometry;
        let place = |run: Run| {
            (
                geometry.host_offset(run.first),
                geometry.host_offset(run.count),
            )
        };
        let numbers = &self.counting.blocks;
        let used = self.all().first..self.all().end();
        let (at, len) = place(self.blocks);
        prepare.fresh_bytes(at, len, |_, distance, piece| {
            fresh::fill_blocks(geometry, numbers, &used, distance, piece);
            Ok(())
        })?;
        let old = image.header.refcount_table;
        let old_len = u64::from(old.count) * geometry.cluster_size();
        let (at, len) = place(self.table);
        prepare.fresh_bytes(at, len, |host, distance, piece| {
            let len = old_len.saturating_sub(distance).min(piece.len() as u64);
            if let Some(buf) = piece.get_mut(..len as usize).filter(|buf| !buf.is_empty()) {
                host.read(&mut [Read {
                    file: FileNo::IMAGE,
                    offset: old.offset.0 + distance,
                    buf,
                }])?;
            }
            fresh::fill_table(geometry, numbers, self.blocks.first, distance, piece)
        })
    }

    /// What puts the last cluster, the table and the L1 entry in order that
    /// leads to it, where they are for good. The copies are in use.
    pub fn settle(
        &self,
        image: &Qcow2,
        survey: &Survey,
        homes: &Homes,
    ) -> Result<Vec<Step>, Failure> {
        let geometry = image.header.geometry;
        let file = FileNo::IMAGE;
        let mut steps = Vec::new();
        if let Some(tail) = &survey.tail {
            steps.extend(self.settle_tail(geometry, tail, homes.tail));
        }
        let Some(boundary) = &survey.boundary else {
            return Ok(steps);
        };
        let table = homes.table(geometry, survey, boundary)?;
        match homes.l2 {
            None => steps.extend(changed_sectors(boundary.table, &boundary.old, &table)),
            Some(home) if home == self.l2.first => {}
            Some(home) => steps.push(Step::Write {
                file,
                offset: geometry.host_offset(home),
                data: table,
            }),
        }
        if let Some(home) = homes.l2 {
            let pointer = geometry.host_offset(home) | entry::COPIED;
            steps.push(Step::Write {
                file,
                offset: image.header.l1.offset.0 + boundary.index * entry::LEN,
                data: pointer.to_be_bytes().to_vec(),
            });
        }
        Ok(steps)
    }

    fn settle_tail(&self, geometry: Geometry, tail: &Tail, home: Option<u64>) -> Option<Step> {
        let file = FileNo::IMAGE;
        match (home, &tail.kept) {
            (None, &Kept::At { from, len, rest }) => Some(Step::Zero {
                file,
                offset: from + len,
                len: rest,
            }),
            (Some(home), _) if home != self.tail.first => Some(Step::Copy {
                file,
                from: geometry.host_offset(self.tail.first),
                to: geometry.host_offset(home),
                len: geometry.cluster_size(),
            }),
            _ => None,
        }
    }
}

impl Homes {
    /// The table across the new end, as it leads to the last cluster here.
    fn table(
        &self,
        geometry: Geometry,
        survey: &Survey,
        boundary: &Boundary,
    ) -> Result<Vec<u8>, Failure> {
        let mut table = boundary.new.clone();
        if let (Some(tail), Some(home)) = (&survey.tail, self.tail) {
            let at = (tail.place * geometry.l2_entry_len()) as usize;
            bytes::put_be64(&mut table, at, geometry.host_offset(home) | entry::COPIED)?;
            if geometry.extended_l2() && matches!(tail.kept, Kept::Bytes(_)) {
                bytes::put_be64(&mut table, at + 8, u64::from(u32::MAX))?;
            }
        }
        Ok(table)
    }
}

/// The sectors of a table at `at` that differ, as writes.
fn changed_sectors(at: HostOffset, old: &[u8], new: &[u8]) -> Vec<Step> {
    let sectors = |table| <[u8]>::chunks(table, SECTOR as usize);
    let places = (at.0..).step_by(SECTOR as usize);
    let changed = sectors(old)
        .zip(sectors(new))
        .zip(places)
        .filter(|((old, new), _)| old != new)
        .map(|((_, new), at)| (HostOffset(at), new));
    writes(changed)
}

fn too_many() -> Failure {
    Failure::new(
        FailureKind::TooLarge,
        format!(
            "the shrink needs room to work, and the file would need a reference count table of \
             more than {} bytes for it; copy the image with `qemu-img convert`",
            limit::MAX_REFCOUNT_TABLE_LEN
        ),
    )
}
