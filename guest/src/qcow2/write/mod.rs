//! Writing inside the disk: places for data, and what they change.
//!
//! [`Qcow2::allocate`] gives places at once and changes tables in the session's
//! cache only; [`Qcow2::flush`] turns all changes since the last flush into a
//! plan. New data, tables and counts go where nothing on disk refers to; then
//! new refcount blocks are hooked, then entries are changed, then what was
//! replaced is released. Whatever a crash cuts off is at worst counted and not
//! used.
//!
//! `space` finds clusters, `place` decides what a range needs, `plan` writes
//! back.

mod place;
mod plan;
mod space;

use super::Qcow2;
use super::format::autoclear;
use super::header::TableRef;
use super::layout::Run;
use super::regions::Regions;
use crate::error::{Failure, FailureKind};
use crate::units::HostOffset;
use alloc::vec::Vec;
use space::Space;

/// Changed bytes from which on a flush is asked for: a plan is one message, and
/// one more request may add as much again.
const MAX_CHANGED: u64 = 3 << 20;
/// Bytes of changed table slices from which on a flush is asked for: they stay
/// in memory until then.
const MAX_DIRTY: u64 = 12 << 20;

/// Bytes that a run of released clusters adds to a plan, besides its counts.
const RELEASE_WEIGHT: u64 = 64;

/// What waits for a flush.
#[derive(Debug, Default)]
pub struct Pending {
    /// Where new clusters come from, once the first was asked for.
    space: Option<Space>,
    /// L2 tables that nothing on disk refers to.
    fresh_tables: Vec<HostOffset>,
    /// Numbers of refcount blocks that the table on disk does not have.
    new_blocks: Vec<u64>,
    /// The most clusters that the allocation under way takes.
    wanted: u64,
    /// Where the refcount table is on disk, if it has moved since.
    old_table: Option<TableRef>,
    /// Clusters to count down once nothing on disk refers to them.
    released: Vec<Run>,
    /// Bytes that counting those down adds to a plan, at most.
    released_weight: u64,
    /// The image has unknown autoclear features and was written to.
    outdates_features: bool,
    /// Length of the image file when it was last flushed.
    flushed_len: Option<u64>,
    /// How to take the last allocation back.
    undo: Option<Undo>,
}

/// The state before an allocation.
#[derive(Debug)]
struct Undo {
    next: u64,
    taken: Vec<Run>,
    fresh_tables: usize,
    new_blocks: usize,
    old_table: Option<TableRef>,
    released: usize,
    released_weight: u64,
    refcount_table: TableRef,
    regions: Regions,
    file_len: u64,
    data_len: Option<u64>,
}

impl Qcow2 {
    /// Whether changes wait for a flush.
    pub fn has_changes(&self) -> bool {
        self.tables.is_dirty()
            || !self.pending.released.is_empty()
            || self.pending.outdates_features
            || self.is_longer()
    }

    /// Whether autoclear bits are set that mean nothing here.
    pub(super) fn has_unknown_features(&self) -> bool {
        self.header.autoclear & !autoclear::KNOWN != 0
    }

    /// Whether the image file counts as longer than the last flush made it.
    fn is_longer(&self) -> bool {
        let flushed = self.pending.flushed_len;
        flushed.is_some_and(|len| len < self.file_len)
    }

    /// Takes the last allocation back.
    pub fn take_back(&mut self) -> Result<(), Failure> {
        if self.pending.undo.is_none() {
            return Err(Failure::new(
                FailureKind::InvalidRequest,
                "there is no allocation to take back",
            ));
        }
        self.roll_back();
        Ok(())
    }

    /// Notes the state, so that everything from here on can be taken back.
    fn begin(&mut self) {
        self.tables.begin();
        self.pending.outdates_features |= self.has_unknown_features();
        self.pending.flushed_len.get_or_insert(self.file_len);
        let pending = &self.pending;
        let undo = Undo {
            next: pending.space.as_ref().map_or(0, |space| space.next),
            taken: Vec::new(),
            fresh_tables: pending.fresh_tables.len(),
            new_blocks: pending.new_blocks.len(),
            old_table: pending.old_table,
            released: pending.released.len(),
            released_weight: pending.released_weight,
            refcount_table: self.header.refcount_table,
            regions: self.regions.clone(),
            file_len: self.file_len,
            data_len: self.data_len,
        };
        self.pending.undo = Some(undo);
    }

    fn roll_back(&mut self) {
        let Some(undo) = self.pending.undo.take() else {
            return;
        };
        self.tables.rollback();
        let pending = &mut self.pending;
        for table in pending.fresh_tables.drain(undo.fresh_tables..) {
            self.owners.remove(&table);
        }
        pending.new_blocks.truncate(undo.new_blocks);
        pending.old_table = undo.old_table;
        pending.released.truncate(undo.released);
        pending.released_weight = undo.released_weight;
        if let Some(space) = &mut pending.space {
            space.give_back(undo.next, undo.taken);
        }
        self.header.refcount_table = undo.refcount_table;
        self.regions = undo.regions;
        self.set_file_len(undo.file_len);
        self.data_len = undo.data_len;
    }
}

/// What waits for a flush has reached its bound.
fn flush_first() -> Failure {
    Failure::new(
        FailureKind::FlushFirst,
        "too many changes of the mapping wait for a flush",
    )
}
