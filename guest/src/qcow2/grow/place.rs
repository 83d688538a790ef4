//! Where everything new goes.
//!
//! All of it lies in one run of clusters behind everything that is counted, so
//! that nothing a reader can see is overwritten: refcount table and blocks,
//! bitmap tables and directory, L1 table, L2 tables, then data.

use super::super::Qcow2;
use super::super::format::limit;
use super::super::geometry::Geometry;
use super::super::layout::{Counting, Cursor, Run, counting};
use super::super::refcount::Refcounts;
use super::bitmaps::BitmapNeeds;
use super::survey::{Content, Survey};
use super::tail::Tail;
use crate::engine::Host;
use crate::error::{Failure, FailureKind};
use alloc::vec::Vec;
use core::ops::Range;

/// Where everything new goes, and which of the old structures it replaces.
#[derive(Clone, Debug, Default)]
pub struct Placement {
    /// L1 entries that the new size needs.
    pub l1_entries: u64,
    /// Whether the L1 table moves to `l1`.
    pub l1_moves: bool,
    /// L1 entries whose L2 tables are new, in order.
    pub fresh_tables: Range<u64>,
    /// Whether the first of those replaces the boundary table.
    pub boundary_moves: bool,
    /// New refcount blocks and their table.
    pub counting: Counting,
    /// Numbers of the existing refcount blocks from the first new cluster's on.
    pub present: Vec<u64>,
    /// Place of the new refcount blocks.
    pub blocks: Run,
    /// Place of the new refcount table.
    pub table: Run,
    /// Place of new bitmap tables and the new bitmap directory.
    pub bitmaps: Run,
    /// Place of the new L1 table.
    pub l1: Run,
    /// Place of the new L2 tables.
    pub l2: Run,
    /// Place of the last cluster, where it moves.
    pub tail: Run,
    /// Place of new data clusters in the image file.
    pub data: Run,
}

impl Placement {
    /// All new clusters.
    pub fn all(&self) -> Run {
        let first = self.table.first;
        Run {
            first,
            count: self.data.end() - first,
        }
    }

    /// Length that the image file must have so that all parts are in it.
    pub fn end(&self, geometry: Geometry) -> u64 {
        let whole = |run: Run| match run.count {
            0 => 0,
            _ => geometry.host_offset(run.end()),
        };
        let l1 = match self.l1.count {
            0 => 0,
            _ => geometry.host_offset(self.l1.first) + self.l1_entries * 8,
        };
        [
            self.blocks,
            self.table,
            self.bitmaps,
            self.l2,
            self.tail,
            self.data,
        ]
        .into_iter()
        .map(whole)
        .fold(l1, u64::max)
    }
}

/// Decides where everything new goes.
pub fn place(
    image: &Qcow2,
    host: &mut dyn Host,
    refcounts: &mut Refcounts<'_>,
    size: u64,
    survey: &Survey,
    bitmaps: &BitmapNeeds,
) -> Result<Placement, Failure> {
    let geometry = image.header.geometry;
    let entries = geometry.l1_entries_for(size);
    let owned = geometry.l1_clusters(u64::from(image.header.l1.count)) * geometry.cluster_size();
    let mut placement = Placement {
        l1_entries: entries,
        l1_moves: entries * 8 > owned || survey.drops(),
        ..Placement::default()
    };
    let mut cursor = None;
    loop {
        placement.choose_tables(image, survey);
        // The entry in use would lose its reference to the present one.
        placement.l1_moves |= placement.boundary_moves;
        let needs = Needs::new(image, survey, bitmaps, &placement);
        if needs.total() == 0 {
            return Ok(placement);
        }
        let first = match cursor {
            Some(first) => first,
            None => *cursor.insert(placement.find_room(image, host, refcounts)?),
        };
        placement.counting = counting(
            geometry,
            first,
            needs.total(),
            &placement.present,
            u64::from(image.header.refcount_table.count),
        )
        .ok_or_else(too_many_counts)?;
        // A live table may not refer to a cluster whose count appears only with
        // the commit; then the L1 table moves, and everything hangs off the
        // commit.
        let counted_late = !placement.counting.blocks.is_empty();
        if counted_late && !placement.l1_moves && placement.links_live(image, survey) {
            placement.l1_moves = true;
            continue;
        }
        placement.assign(first, &needs);
        return Ok(placement);
    }
}

impl Placement {
    /// Which L2 tables are new.
    fn choose_tables(&mut self, image: &Qcow2, survey: &Survey) {
        let geometry = image.header.geometry;
        let per_table = geometry.l2_entries();
        let filled = if survey.fill.is_empty() {
            let none = geometry.l1_entries_for(image.header.size);
            none..none
        } else {
            survey.fill.start / per_table..survey.fill.end.div_ceil(per_table)
        };
        let Some(boundary) = &survey.boundary else {
            self.fresh_tables = filled;
            return;
        };
        let changes = survey.changes_boundary(geometry);
        let hangs = survey.boundary_refers_to_new(per_table) || survey.stale_entries;
        self.boundary_moves = changes && (!boundary.copied || (self.l1_moves && hangs));
        let first = boundary.index + u64::from(!self.boundary_moves);
        self.fresh_tables = first..filled.end.max(first);
    }

    /// Whether a table that is in use gets a reference to a new cluster before
    /// the commit.
    pub fn links_live(&self, image: &Qcow2, survey: &Survey) -> bool {
        if self.l1_moves {
            return false;
        }
        let per_table = image.header.geometry.l2_entries();
        let in_boundary = !self.boundary_moves && survey.boundary_refers_to_new(per_table);
        let in_l1 = !self.fresh_tables.is_empty()
            && self.fresh_tables.start < u64::from(image.header.l1.count);
        in_boundary || in_l1
    }

    /// The first cluster behind everything in the file and everything counted.
    fn find_room(
        &mut self,
        image: &Qcow2,
        host: &mut dyn Host,
        refcounts: &mut Refcounts<'_>,
    ) -> Result<u64, Failure> {
        let geometry = image.header.geometry;
        let end = geometry.clusters(image.file_len);
        let number = end / geometry.refcounts_per_block();
        self.present = refcounts.present_from(host, number)?;
        image.check_settled(host, refcounts)?;
        refcounts.first_unused(host, end, &self.present)
    }

    fn assign(&mut self, first: u64, needs: &Needs) {
        let mut cursor = Cursor(first);
        // Before the blocks: a later shrink may take those out.
        self.table = cursor.take(self.counting.table);
        self.blocks = cursor.take(self.counting.blocks.len() as u64);
        self.bitmaps = cursor.take(needs.bitmaps);
        self.l1 = cursor.take(needs.l1);
        self.l2 = cursor.take(needs.l2);
        self.tail = cursor.take(needs.tail);
        self.data = cursor.take(needs.data);
    }
}

/// Clusters that each part takes.
struct Needs {
    bitmaps: u64,
    l1: u64,
    l2: u64,
    tail: u64,
    data: u64,
}

impl Needs {
    fn new(image: &Qcow2, survey: &Survey, bitmaps: &BitmapNeeds, placement: &Placement) -> Self {
        let geometry = image.header.geometry;
        let in_image = survey.content == Content::Data && !image.header.has_data_file();
        Self {
            bitmaps: bitmaps.clusters,
            l1: match placement.l1_moves {
                true => geometry.l1_clusters(placement.l1_entries),
                false => 0,
            },
            l2: placement.fresh_tables.end - placement.fresh_tables.start,
            tail: u64::from(matches!(survey.tail, Tail::Move { .. })),
            data: match in_image {
                true => survey.fill.end - survey.fill.start,
                false => 0,
            },
        }
    }

    fn total(&self) -> u64 {
        self.bitmaps + self.l1 + self.l2 + self.tail + self.data
    }
}

fn too_many_counts() -> Failure {
    Failure::new(
        FailureKind::TooLarge,
        alloc::format!(
            "the file would need a reference count table of more than {} bytes; use larger clusters \
             (`qemu-img convert -o cluster_size=...`)",
            limit::MAX_REFCOUNT_TABLE_LEN
        ),
    )
}
