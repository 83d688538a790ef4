//! The steps of a grow, stage by stage.

use super::super::Qcow2;
use super::super::format::{entry, refcount};
use super::super::fresh::{Fill, FillRange, Subclusters};
use super::super::geometry::Geometry;
use super::super::layout::Run;
use super::super::refcount::Refcounts;
use super::super::tables::Kind;
use super::bitmaps::BitmapNeeds;
use super::commit::NewHeader;
use super::place::Placement;
use super::survey::{Boundary, Content, Survey};
use super::tail::Tail;
use crate::bytes;
use crate::engine::Host;
use crate::error::Failure;
use crate::plan::{Plan, Purpose, SECTOR, Stage, Step};
use crate::prepare::{Prepare, writes};
use crate::proto::{FileNo, Preallocation};
use crate::resize::Wish;
use crate::units::HostOffset;
use alloc::vec;
use alloc::vec::Vec;

/// Everything that is known about a grow.
pub struct Grow<'a> {
    /// The image, as it is.
    pub image: &'a Qcow2,
    /// What was asked for.
    pub wish: &'a Wish,
    /// What lies around the old end.
    pub survey: &'a Survey,
    /// What the bitmaps need.
    pub bitmaps: &'a BitmapNeeds,
    /// Where everything new goes.
    pub placement: &'a Placement,
}

impl Grow<'_> {
    /// The plan.
    pub fn plan(
        &self,
        host: &mut dyn Host,
        refcounts: &mut Refcounts<'_>,
    ) -> Result<Plan, Failure> {
        let mut new_boundary = self.new_boundary()?;
        if let Some(table) = &mut new_boundary {
            self.settle_copied(host, refcounts, table)?;
        }
        // Whatever may still be found damaged is read before the first part of
        // the plan can be streamed.
        let counts = self.count_new(host, refcounts)?;
        let release = self.release(host, refcounts)?;
        let mut prepare = Prepare::new(host);
        self.reserve(&mut prepare)?;
        self.lay_down_counts(&mut prepare)?;
        for step in counts {
            prepare.inside(step);
        }
        let directory = match self.bitmaps.clusters {
            0 => None,
            _ => Some(
                self.bitmaps
                    .lay_down(self.image, self.placement.bitmaps, &mut prepare)?,
            ),
        };
        self.lay_down_l1(&mut prepare)?;
        self.lay_down_l2(&mut prepare, new_boundary.as_deref())?;
        self.settle_tail(&mut prepare)?;
        self.settle_l1(&mut prepare);
        let mut link = self.change_boundary(&mut prepare, new_boundary.as_deref());
        link.extend(self.link_l1());
        if self.placement.all().is_empty() {
            // They refer to nothing that has to be counted before.
            link.drain(..).for_each(|step| prepare.inside(step));
        }
        let commit = self.header(directory).commit(self.image)?;
        if commit.directory.is_some() {
            for step in BitmapNeeds::mark_in_use(self.image)? {
                prepare.inside(step);
            }
        }
        let stages = [
            (Purpose::Prepare, prepare.finish()),
            (Purpose::Link, link),
            (Purpose::Commit, vec![commit.step]),
            (Purpose::Release, commit.directory.into_iter().collect()),
            (Purpose::Release, release),
        ];
        Ok(Plan {
            stages: stages
                .into_iter()
                .filter(|(_, steps)| !steps.is_empty())
                .map(|(purpose, steps)| Stage { purpose, steps })
                .collect(),
        })
    }

    pub(super) fn geometry(&self) -> Geometry {
        self.image.header.geometry
    }

    fn per_table(&self) -> u64 {
        self.geometry().l2_entries()
    }

    /// What the new entries are to say, now that places are known.
    pub(super) fn fill(&self) -> FillRange {
        let cluster = self.geometry().cluster_size();
        let first = match self.image.header.has_data_file() {
            true => self.survey.fill.start,
            false => self.placement.data.first,
        };
        let at = first * cluster;
        let hides = self.wish.backing_size.unwrap_or(0) > self.image.header.size;
        let subclusters = match self.wish.preallocation {
            _ if !hides => Subclusters::Unallocated,
            Preallocation::Off | Preallocation::Metadata => Subclusters::Zero,
            Preallocation::Falloc | Preallocation::Full => Subclusters::Allocated,
        };
        let fill = match self.survey.content {
            Content::Zero => Fill::Zero,
            Content::Data => Fill::Data { at, subclusters },
        };
        FillRange {
            clusters: self.survey.fill.clone(),
            fill,
        }
    }

    /// The boundary table's new content.
    fn new_boundary(&self) -> Result<Option<Vec<u8>>, Failure> {
        let Some(boundary) = &self.survey.boundary else {
            return Ok(None);
        };
        let geometry = self.geometry();
        let place = |cluster: u64| {
            ((cluster - boundary.index * self.per_table()) * geometry.l2_entry_len()) as usize
        };
        let mut new = boundary.old.clone();
        if let Some(beyond) = new.get_mut(place(self.survey.kept)..) {
            beyond.fill(0);
        }
        self.fill().fill_l2(geometry, boundary.index, 0, &mut new)?;
        let last = self.survey.kept.checked_sub(1).map(place).unwrap_or(0);
        if let Tail::Move { bitmap, .. } = self.survey.tail {
            let at = geometry.host_offset(self.placement.tail.first);
            bytes::put_be64(&mut new, last, at | entry::COPIED)?;
            if geometry.extended_l2() {
                bytes::put_be64(&mut new, last + 8, bitmap)?;
            }
        }
        if self.survey.tail_zero_bits != 0 {
            let bits = bytes::be64(&new, last + 8)?;
            bytes::put_be64(&mut new, last + 8, bits | self.survey.tail_zero_bits)?;
        }
        Ok(Some(new))
    }

    /// The copy of a boundary table that a snapshot has.
    fn settle_copied(
        &self,
        host: &mut dyn Host,
        refcounts: &mut Refcounts<'_>,
        table: &mut [u8],
    ) -> Result<(), Failure> {
        let shared = |boundary: &&Boundary| self.placement.boundary_moves && !boundary.copied;
        let Some(boundary) = self.survey.boundary.as_ref().filter(shared) else {
            return Ok(());
        };
        let moved = u64::from(matches!(self.survey.tail, Tail::Move { .. }));
        let kept = self.survey.kept - boundary.index * self.per_table();
        let entries = kept.saturating_sub(moved);
        self.image
            .clear_stale_copied(host, refcounts, table, entries)
    }

    /// A boundary table that stays. Entries that refer to new clusters wait for
    /// the counts of those to be durable: they are returned.
    fn change_boundary(&self, prepare: &mut Prepare<'_>, new: Option<&[u8]>) -> Vec<Step> {
        let (Some(boundary), Some(new)) = (&self.survey.boundary, new) else {
            return Vec::new();
        };
        if self.placement.boundary_moves {
            return Vec::new();
        }
        let sectors = changed_sectors(boundary, new);
        if self.survey.boundary_refers_to_new(self.per_table()) {
            return sectors;
        }
        for step in sectors {
            prepare.inside(step);
        }
        Vec::new()
    }

    /// Counts of new clusters in blocks that exist.
    fn count_new(
        &self,
        host: &mut dyn Host,
        refcounts: &mut Refcounts<'_>,
    ) -> Result<Vec<Step>, Failure> {
        let per_block = self.geometry().refcounts_per_block();
        let all = self.placement.all();
        for &number in &self.placement.present {
            let first = all.first.max(number * per_block);
            let end = all.end().min((number + 1) * per_block);
            if first < end {
                let run = Run {
                    first,
                    count: end - first,
                };
                refcounts.set_ones(host, run)?;
            }
        }
        Ok(take_changes(refcounts))
    }

    /// An L1 table that stays: what lies behind its present end, which nobody
    /// reads yet.
    fn settle_l1(&self, prepare: &mut Prepare<'_>) {
        if self.placement.l1_moves {
            return;
        }
        let at = self.image.header.l1.offset.0;
        let count = u64::from(self.image.header.l1.count);
        let fresh = &self.placement.fresh_tables;
        let slack = count..self.placement.l1_entries.max(count);
        let linked = fresh.start.clamp(slack.start, slack.end)..fresh.end.min(slack.end);
        let zeroed = [
            slack.start..linked.start,
            linked.end.max(linked.start)..slack.end,
        ];
        for range in zeroed.into_iter().filter(|range| !range.is_empty()) {
            prepare.inside(Step::Zero {
                file: FileNo::IMAGE,
                offset: at + range.start * entry::LEN,
                len: (range.end - range.start) * entry::LEN,
            });
        }
        if !linked.is_empty() {
            prepare.inside(self.l1_pointers(linked));
        }
    }

    /// Entries of an L1 table that stays which refer to new tables and are in
    /// use already.
    fn link_l1(&self) -> Option<Step> {
        let count = u64::from(self.image.header.l1.count);
        let fresh = &self.placement.fresh_tables;
        let live = fresh.start..fresh.end.min(count);
        if self.placement.l1_moves || live.is_empty() {
            return None;
        }
        Some(self.l1_pointers(live))
    }

    /// The write of pointers to new L2 tables into the present L1 table.
    fn l1_pointers(&self, range: core::ops::Range<u64>) -> Step {
        let geometry = self.geometry();
        let first = self.placement.l2.first + range.start - self.placement.fresh_tables.start;
        let data = (first..)
            .take((range.end - range.start) as usize)
            .flat_map(|table| (geometry.host_offset(table) | entry::COPIED).to_be_bytes())
            .collect();
        Step::Write {
            file: FileNo::IMAGE,
            offset: self.image.header.l1.offset.0 + range.start * entry::LEN,
            data,
        }
    }

    fn header(&self, bitmap_directory: Option<u64>) -> NewHeader {
        let geometry = self.geometry();
        let header = &self.image.header;
        let l1 = match self.placement.l1_moves {
            true => (
                self.placement.l1_entries,
                geometry.host_offset(self.placement.l1.first),
            ),
            false => (
                self.placement.l1_entries.max(u64::from(header.l1.count)),
                header.l1.offset.0,
            ),
        };
        let refcount_table = match self.placement.table.count {
            0 => (
                u64::from(header.refcount_table.count),
                header.refcount_table.offset.0,
            ),
            count => (count, geometry.host_offset(self.placement.table.first)),
        };
        NewHeader {
            size: self.wish.size,
            l1,
            refcount_table,
            bitmap_directory,
        }
    }

    /// Lowers the counts of everything that was replaced.
    fn release(
        &self,
        host: &mut dyn Host,
        refcounts: &mut Refcounts<'_>,
    ) -> Result<Vec<Step>, Failure> {
        let geometry = self.geometry();
        let header = &self.image.header;
        let cluster = geometry.cluster_size();
        let mut runs = self.survey.released.clone();
        if let Some(boundary) = &self.survey.boundary
            && self.placement.boundary_moves
        {
            runs.push(Run {
                first: boundary.table.0 / cluster,
                count: 1,
            });
        }
        if self.placement.l1_moves && header.l1.count > 0 {
            runs.push(Run {
                first: header.l1.offset.0 / cluster,
                count: geometry.l1_clusters(u64::from(header.l1.count)),
            });
        }
        if !self.placement.table.is_empty() {
            runs.push(Run {
                first: header.refcount_table.offset.0 / cluster,
                count: u64::from(header.refcount_table.count),
            });
        }
        runs.extend(self.bitmaps.released(self.image)?);
        for run in runs {
            refcounts.release(host, run)?;
        }
        Ok(take_changes(refcounts))
    }
}

impl Survey {
    /// Whether any entry of the boundary table changes.
    pub fn changes_boundary(&self, geometry: Geometry) -> bool {
        let Some(boundary) = &self.boundary else {
            return false;
        };
        let per_table = geometry.l2_entries();
        let beyond = (self.kept - boundary.index * per_table) * geometry.l2_entry_len();
        let stale = boundary
            .old
            .get(beyond as usize..)
            .is_some_and(|entries| entries.iter().any(|&byte| byte != 0));
        let moves = matches!(self.tail, Tail::Move { .. });
        stale || moves || self.tail_zero_bits != 0 || self.fills_boundary(per_table)
    }
}

/// The counts that have changed in blocks that exist, as writes.
fn take_changes(refcounts: &mut Refcounts<'_>) -> Vec<Step> {
    let steps = writes(refcounts.tables.dirty(Kind::RefcountBlock));
    refcounts.tables.mark_planned(Kind::RefcountBlock);
    steps
}

/// The sectors of a boundary table that differ, as writes.
fn changed_sectors(boundary: &Boundary, new: &[u8]) -> Vec<Step> {
    let sectors = |table| <[u8]>::chunks(table, SECTOR as usize);
    let places = (boundary.table.0..).step_by(SECTOR as usize);
    let changed = sectors(&boundary.old)
        .zip(sectors(new))
        .zip(places)
        .filter(|((old, new), _)| old != new)
        .map(|((_, new), at)| (HostOffset(at), new));
    writes(changed)
}

const _: () = assert!(entry::LEN == refcount::ENTRY_LEN);
