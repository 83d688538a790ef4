//! What the image holds around its old end, and what has to become of it.
//!
//! Three things can make old bytes visible in the range that a grow adds: the
//! rest of the last cluster, entries beyond the end (left by an interrupted
//! shrink), and a backing image that is longer than the disk was. Reads, and
//! decides nothing about places.

use super::super::Qcow2;
use super::super::format::entry;
use super::super::layout::Run;
use super::super::tables::Kind;
use super::tail::Tail;
use crate::engine::Host;
use crate::error::{Failure, FailureKind};
use crate::proto::Preallocation;
use crate::resize::Wish;
use crate::units::HostOffset;
use alloc::vec::Vec;
use core::ops::Range;

/// Most runs of clusters that entries beyond the end may hold.
const MAX_STALE_RUNS: usize = 64 << 10;

/// Most bytes of L2 tables beyond the end.
const MAX_STALE_TABLES: u64 = 1 << 30;

/// What the L2 entries of added clusters are to say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Data clusters, which read as zeroes.
    Data,
    /// The zero flag.
    Zero,
}

/// The L2 table that maps the last cluster before the old end, where it maps
/// clusters beyond it as well, or where that cluster ends beyond it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Boundary {
    /// Its L1 entry.
    pub index: u64,
    /// Where it is.
    pub table: HostOffset,
    /// Whether it may be changed in place.
    pub copied: bool,
    /// Its content.
    pub old: Vec<u8>,
}

/// What was found and what has to be done.
#[derive(Clone, Debug)]
pub struct Survey {
    /// Clusters whose entries are kept: all that hold a byte of the old disk.
    pub kept: u64,
    /// Clusters that get new entries, from `kept` or the one before on.
    pub fill: Range<u64>,
    /// What those say.
    pub content: Content,
    /// The table across the old end.
    pub boundary: Option<Boundary>,
    /// The last cluster.
    pub tail: Tail,
    /// With extended L2: subclusters of the last cluster that get the zero bit.
    pub tail_zero_bits: u64,
    /// Whether entries of the boundary table beyond the old end hold clusters.
    pub stale_entries: bool,
    /// L1 entries beyond the old end that are not 0.
    pub stale_tables: u64,
    /// Clusters that nothing will refer to after the commit, with repetitions.
    pub released: Vec<Run>,
}

/// Looks at the old end of the image.
pub fn survey(image: &mut Qcow2, host: &mut dyn Host, wish: &Wish) -> Result<Survey, Failure> {
    let geometry = image.header.geometry;
    let kept = geometry.clusters(image.header.size);
    let (fill, content) = fill_of(image, wish, kept);
    let mut survey = Survey {
        kept,
        fill,
        content,
        boundary: None,
        tail: Tail::Fine,
        tail_zero_bits: 0,
        stale_entries: false,
        stale_tables: 0,
        released: Vec::new(),
    };
    survey.read_boundary(image, host)?;
    survey.judge_tail(image, host, wish)?;
    survey.find_stale_entries(image, host)?;
    survey.find_stale_tables(image, host)?;
    Ok(survey)
}

/// Which clusters get new entries, and which.
fn fill_of(image: &Qcow2, wish: &Wish, kept: u64) -> (Range<u64>, Content) {
    let geometry = image.header.geometry;
    let end = geometry.clusters(wish.size);
    if wish.preallocation != Preallocation::Off || image.header.has_raw_data_file() {
        return (kept..end, Content::Data);
    }
    let hidden = geometry.clusters(wish.backing_size.unwrap_or(0));
    (kept..end.min(hidden).max(kept), Content::Zero)
}

impl Survey {
    /// Whether the boundary table's entries change so that they refer to new
    /// clusters.
    pub fn boundary_refers_to_new(&self, per_table: u64) -> bool {
        let moves = matches!(self.tail, Tail::Move { .. });
        moves || (self.content == Content::Data && self.fills_boundary(per_table))
    }

    /// Whether something that is counted loses its last reference. That has to
    /// happen with the commit and no table in use may change before, or a crash
    /// would leave what a later resize does not find.
    pub fn drops(&self) -> bool {
        let moves = matches!(self.tail, Tail::Move { .. });
        moves || self.stale_entries || self.stale_tables > 0
    }

    /// Whether new entries go into the boundary table.
    pub fn fills_boundary(&self, per_table: u64) -> bool {
        self.boundary.as_ref().is_some_and(|boundary| {
            !self.fill.is_empty() && self.fill.start / per_table == boundary.index
        })
    }

    fn read_boundary(&mut self, image: &mut Qcow2, host: &mut dyn Host) -> Result<(), Failure> {
        let geometry = image.header.geometry;
        let whole_tables = self.kept.is_multiple_of(geometry.l2_entries());
        if whole_tables && geometry.is_aligned(image.header.size) {
            return Ok(());
        }
        let index = (self.kept - 1) / geometry.l2_entries();
        let entry = image.l1_entry(host, index)?;
        let Some(table) = entry.table else {
            return Ok(());
        };
        self.boundary = Some(Boundary {
            index,
            table,
            copied: entry.copied,
            old: image
                .whole_tables(host, &[table])?
                .pop()
                .unwrap_or_default(),
        });
        Ok(())
    }

    /// Entries of the boundary table beyond the old end that hold clusters.
    fn find_stale_entries(&mut self, image: &Qcow2, host: &mut dyn Host) -> Result<(), Failure> {
        let Some(boundary) = self.boundary.take() else {
            return Ok(());
        };
        let per_table = image.header.geometry.l2_entries();
        let first = self.kept - boundary.index * per_table;
        let entries = first..per_table;
        let found = image.held_runs(
            host,
            &boundary.old,
            boundary.index,
            entries,
            &mut |_, run| {
                self.stale_entries = true;
                self.release(run)
            },
        );
        self.boundary = Some(boundary);
        found
    }

    /// L1 entries beyond the old end, with all that hangs off them.
    fn find_stale_tables(&mut self, image: &mut Qcow2, host: &mut dyn Host) -> Result<(), Failure> {
        let geometry = image.header.geometry;
        let first = geometry.l1_entries_for(image.header.size);
        let end = u64::from(image.header.l1.count);
        let step = image.tables.slice_len() / entry::LEN;
        for index in first..end {
            if (index - first).is_multiple_of(64 * step) {
                let places: Vec<HostOffset> = (index..end.min(index + 64 * step))
                    .step_by(step as usize)
                    .map(|index| image.header.l1.offset.plus(index * entry::LEN))
                    .collect();
                image.tables.prefetch(host, Kind::L1, &places)?;
            }
            let Some(table) = image.l1_entry(host, index)?.table else {
                continue;
            };
            self.stale_tables += 1;
            if self.stale_tables * geometry.cluster_size() > MAX_STALE_TABLES {
                return Err(too_much_stale());
            }
            let content = image.whole_tables(host, &[table])?;
            let entries = 0..geometry.l2_entries();
            for content in &content {
                image.held_runs(host, content, index, entries.clone(), &mut |_, run| {
                    self.release(run)
                })?;
            }
            self.release(Run {
                first: table.0 / geometry.cluster_size(),
                count: 1,
            })?;
        }
        Ok(())
    }

    /// Notes a run, together with the one before where they touch.
    fn release(&mut self, run: Run) -> Result<(), Failure> {
        if let Some(last) = self
            .released
            .last_mut()
            .filter(|last| last.end() == run.first)
        {
            last.count += run.count;
            return Ok(());
        }
        if self.released.len() >= MAX_STALE_RUNS {
            return Err(too_much_stale());
        }
        self.released.push(run);
        Ok(())
    }
}

fn too_much_stale() -> Failure {
    Failure::new(
        FailureKind::Unsupported,
        "the image holds too much data beyond its end (left by an interrupted shrink); copy it with \
         `qemu-img convert`",
    )
}
