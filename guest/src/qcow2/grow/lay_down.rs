//! What a grow lays down before its commit: space, then new tables behind the
//! old end of the file, and the last cluster made fit for what follows it.

use super::super::format::entry;
use super::super::fresh;
use super::stages::Grow;
use super::survey::Content;
use super::tail::{Kept, Tail};
use crate::engine::Read;
use crate::error::Failure;
use crate::plan::Step;
use crate::prepare::Prepare;
use crate::proto::{FileNo, Preallocation};

impl Grow<'_> {
    /// Space first, then the length: a full disk is found before anything else
    /// happens.
    pub(super) fn reserve(&self, prepare: &mut Prepare<'_>) -> Result<(), Failure> {
        let geometry = self.geometry();
        let data = self.placement.data;
        if !data.is_empty() {
            let (offset, len) = (
                geometry.host_offset(data.first),
                geometry.host_offset(data.count),
            );
            if let Some(step) = self.allocation(FileNo::IMAGE, offset, len) {
                prepare.fresh(step)?;
            }
        }
        let end = self.placement.end(geometry);
        if end > self.image.file_len {
            prepare.fresh(Step::SetLength {
                file: FileNo::IMAGE,
                len: end,
            })?;
        }
        if let Some(data_len) = self.image.data_len {
            self.grow_data_file(prepare, data_len);
        }
        Ok(())
    }

    /// What gives new data its disk space, where it was asked for.
    fn allocation(&self, file: FileNo, offset: u64, len: u64) -> Option<Step> {
        match self.wish.preallocation {
            Preallocation::Off | Preallocation::Metadata => None,
            Preallocation::Falloc => Some(Step::Reserve { file, offset, len }),
            Preallocation::Full => Some(Step::Fill { file, offset, len }),
        }
    }

    /// The external data file grows before the image says so. What it already
    /// has behind the old end may not show.
    fn grow_data_file(&self, prepare: &mut Prepare<'_>, data_len: u64) {
        let file = FileNo::DATA;
        let (old, new) = (self.image.header.size, self.wish.size);
        let mapped = self.fill().clusters.start * self.geometry().cluster_size();
        // Written zeroes replace the mapped bytes behind the old end as well.
        let zeroed = self.wish.preallocation != Preallocation::Full;
        let first = if zeroed { old } else { mapped.min(new) };
        let allocation = self.allocation(file, first, new - first);
        if let Some(step) = allocation.filter(|_| first < new) {
            prepare.inside(step);
        }
        let behind = data_len.min(new).saturating_sub(mapped);
        if behind > 0 && zeroed && self.survey.content == Content::Data {
            prepare.inside(Step::Zero {
                file,
                offset: mapped,
                len: behind,
            });
        }
        if data_len < new {
            prepare.inside(Step::SetLength { file, len: new });
        }
    }

    /// New refcount blocks and table.
    pub(super) fn lay_down_counts(&self, prepare: &mut Prepare<'_>) -> Result<(), Failure> {
        let geometry = self.geometry();
        let all = self.placement.all();
        let used = all.first..all.end();
        let numbers = &self.placement.counting.blocks;
        let blocks = self.placement.blocks;
        prepare.fresh_bytes(
            geometry.host_offset(blocks.first),
            geometry.host_offset(blocks.count),
            |_, distance, piece| {
                fresh::fill_blocks(geometry, numbers, &used, distance, piece);
                Ok(())
            },
        )?;
        let table = self.placement.table;
        let old = self.image.header.refcount_table;
        let old_len = u64::from(old.count) * geometry.cluster_size();
        prepare.fresh_bytes(
            geometry.host_offset(table.first),
            geometry.host_offset(table.count),
            |host, distance, piece| {
                let len = old_len.saturating_sub(distance).min(piece.len() as u64);
                if let Some(buf) = piece.get_mut(..len as usize).filter(|buf| !buf.is_empty()) {
                    host.read(&mut [Read {
                        file: FileNo::IMAGE,
                        offset: old.offset.0 + distance,
                        buf,
                    }])?;
                }
                fresh::fill_table(geometry, numbers, blocks.first, distance, piece)
            },
        )
    }

    /// A new L1 table: the old one's entries up to the first that changes, then
    /// the new ones. The rest reads as zero.
    pub(super) fn lay_down_l1(&self, prepare: &mut Prepare<'_>) -> Result<(), Failure> {
        if !self.placement.l1_moves {
            return Ok(());
        }
        let geometry = self.geometry();
        let to = geometry.host_offset(self.placement.l1.first);
        let from = self.image.header.l1.offset.0;
        let fresh = &self.placement.fresh_tables;
        let kept = match fresh.is_empty() {
            true => geometry.l1_entries_for(self.image.header.size),
            false => fresh.start,
        };
        let len = (kept * entry::LEN).min(self.image.file_len.saturating_sub(from));
        if len > 0 {
            prepare.fresh(Step::Copy {
                file: FileNo::IMAGE,
                from,
                to,
                len,
            })?;
        }
        prepare.fresh_bytes(
            to + fresh.start * entry::LEN,
            (fresh.end - fresh.start) * entry::LEN,
            |_, distance, piece| fresh::fill_l1(geometry, self.placement.l2.first, distance, piece),
        )
    }

    pub(super) fn lay_down_l2(
        &self,
        prepare: &mut Prepare<'_>,
        boundary: Option<&[u8]>,
    ) -> Result<(), Failure> {
        let geometry = self.geometry();
        let cluster = geometry.cluster_size();
        let mut at = geometry.host_offset(self.placement.l2.first);
        let mut tables = self.placement.fresh_tables.clone();
        if let Some(content) = boundary.filter(|_| self.placement.boundary_moves) {
            prepare.fresh_slice(at, content)?;
            at += cluster;
            tables.start += 1;
        }
        let fill = self.fill();
        prepare.fresh_bytes(
            at,
            (tables.end - tables.start) * cluster,
            |_, distance, piece| fill.fill_l2(geometry, tables.start, distance, piece),
        )
    }

    pub(super) fn settle_tail(&self, prepare: &mut Prepare<'_>) -> Result<(), Failure> {
        let to = self.geometry().host_offset(self.placement.tail.first);
        match &self.survey.tail {
            Tail::Fine => Ok(()),
            &Tail::Zero { file, at, len } => {
                prepare.inside(Step::Zero {
                    file,
                    offset: at,
                    len,
                });
                Ok(())
            }
            Tail::Move {
                kept: Kept::At { from, len },
                ..
            } => prepare.fresh(Step::Copy {
                file: FileNo::IMAGE,
                from: *from,
                to,
                len: *len,
            }),
            Tail::Move {
                kept: Kept::Bytes(content),
                ..
            } => prepare.fresh_slice(to, content),
        }
    }
}
