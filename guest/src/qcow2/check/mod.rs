//! Whether an image is sound: every reference to a host cluster is counted and
//! compared with what the refcount blocks say.
//!
//! The order of the steps and the words are those of `qemu-img check`, whose
//! users know them. What goes beyond it is a warning. The counters take a byte
//! per cluster; where that is more than the memory at hand, the tables are
//! walked again for each further range of clusters ("pass"). Nothing here
//! trusts a table: an entry that leads nowhere is a finding, not a failure.

mod beyond;
mod blocks;
mod compare;
mod copied;
mod counters;
mod entries;
pub(super) mod leftovers;
mod patches;
mod places;
mod rebuild;
mod repair;
mod settle;
mod walk;

#[cfg(test)]
mod tests;

use super::Qcow2;
use super::header::TableRef;
use super::tables::Tables;
use crate::engine::Host;
use crate::error::{Failure, FailureKind};
use crate::findings::{Repair, Report, Severity};
use crate::plan::Plan;
use crate::proto::PlanReply;
use crate::tell::Tell;
use alloc::collections::{BTreeMap, BTreeSet};
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use blocks::{BlockRef, Lookup};
use counters::Counters;
use entries::Sums;
use leftovers::Freed;
use patches::Patches;
use repair::Compared;

/// Bytes that counters may take: one pass for 24 million clusters in use.
const COUNTERS: usize = 24 << 20;
/// Most clusters of a file that is checked: what QEMU can check.
const MAX_CLUSTERS: u64 = i32::MAX as u64;

/// How far behind the end of the file a reference matters, in bytes: a new
/// refcount structure is smaller.
const NEAR: u64 = 1 << 30;

/// Sizes that every entry is judged by.
#[derive(Clone, Copy, Debug)]
struct Shape {
    /// Bytes of a cluster.
    cluster: u64,
    /// log2 of it.
    cluster_bits: u32,
    /// Bytes of an L2 entry.
    entry_len: usize,
    /// Whether L2 entries have subclusters.
    extended: bool,
    /// Whether data lies in a file of its own.
    data_file: bool,
    /// Bytes of the image file.
    file_len: u64,
}

/// A check under way.
struct Check<'a> {
    image: &'a Qcow2,
    host: &'a mut dyn Host,
    shape: Shape,
    repair: Option<Repair>,
    tell: Tell,
    counters: Counters,
    /// Clusters of the file; one more where something reaches behind its end.
    clusters: u64,
    /// How often the tables have been walked before.
    pass: u64,
    /// The entries of the refcount table that are not 0.
    blocks: Vec<BlockRef>,
    lookup: Lookup,
    sums: Sums,
    /// The highest cluster that anything counts or refers to.
    highest: u64,
    /// End of the farthest reference a little behind the end of the file, in
    /// bytes: no new table may lie before it.
    farthest: u64,
    /// Whether the refcount structure itself is broken.
    rebuild: bool,
    /// Contradictions in the refcount table.
    broken_blocks: u64,
    /// Sectors of counts that differ from the references.
    differing: u64,
    /// The last of them.
    differing_last: Option<u64>,
    /// What comparing the counts has added to the sums.
    compared: Compared,
    /// Whether the old refcount structure is counted no more.
    without_blocks: bool,
    /// The refcount table that takes the place of the old one.
    new_table: Option<TableRef>,
    /// Counts on disk that differ from the references, as far as they are to be
    /// told again.
    exact: BTreeMap<u64, u64>,
    /// Whether an unreadable refcount block has been told.
    told_unreadable: bool,
    /// What is told at the end, uncounted.
    warnings: Vec<String>,
    /// How often L1 entries lead to each L2 table, by cluster; complete up to
    /// [`MAX_TABLES`] tables.
    tables: BTreeMap<u64, u64>,
    /// L2 tables whose flags are repaired; no more than patches have room for.
    mended: BTreeSet<u64>,
    /// New L2 entries.
    entries: Patches,
    /// Counts that go up.
    raised: Patches,
    /// Counts that go down.
    lowered: Patches,
    /// What nothing refers to any more once the repair is done.
    freed: Freed,
}

impl Qcow2 {
    /// Checks the image, and plans what repairs it.
    pub(super) fn plan_check(
        &mut self,
        host: &mut dyn Host,
        repair: Option<Repair>,
    ) -> Result<(Report, PlanReply), Failure> {
        // The cache gives way to counters; they read the tables themselves.
        self.tables = Tables::new(self.tables.slice_len(), self.file_len);
        let stale = self.stale_tail(host)?;
        let mut check = Check::new(self, host, repair, Tell::default(), COUNTERS)?;
        check.warnings.extend(stale);
        check.run()
    }
}

impl<'a> Check<'a> {
    fn new(
        image: &'a Qcow2,
        host: &'a mut dyn Host,
        repair: Option<Repair>,
        tell: Tell,
        memory: usize,
    ) -> Result<Self, Failure> {
        let geometry = image.header.geometry;
        let shape = Shape {
            cluster: geometry.cluster_size(),
            cluster_bits: geometry.cluster_bits(),
            entry_len: geometry.l2_entry_len() as usize,
            extended: geometry.extended_l2(),
            data_file: image.header.has_data_file(),
            file_len: image.file_len,
        };
        let clusters = geometry.clusters(image.file_len);
        if clusters > MAX_CLUSTERS {
            return Err(Failure::new(
                FailureKind::TooLarge,
                format!(
                    "Check failed: File too large: {clusters} clusters, at most {MAX_CLUSTERS} can \
                     be checked"
                ),
            ));
        }
        Ok(Self {
            image,
            host,
            shape,
            repair,
            tell,
            counters: Counters::new(geometry.width().max(), memory),
            clusters,
            pass: 0,
            blocks: Vec::new(),
            lookup: Lookup::default(),
            sums: Sums::default(),
            highest: 0,
            farthest: 0,
            rebuild: false,
            broken_blocks: 0,
            differing: 0,
            differing_last: None,
            compared: Compared::default(),
            without_blocks: false,
            new_table: None,
            exact: BTreeMap::new(),
            told_unreadable: false,
            warnings: Vec::new(),
            tables: BTreeMap::new(),
            mended: BTreeSet::new(),
            entries: Patches::new(patches::MAX_ENTRIES),
            raised: Patches::new(patches::MAX_COUNTS),
            lowered: Patches::new(patches::MAX_COUNTS),
            freed: Freed::default(),
        })
    }

    fn run(mut self) -> Result<(Report, PlanReply), Failure> {
        let result = self.check();
        self.tell.flush(self.host)?;
        let plan = result?;
        let reply = PlanReply {
            plan,
            ..PlanReply::default()
        };
        Ok((self.report(), reply))
    }

    fn check(&mut self) -> Result<Plan, Failure> {
        self.read_refcount_table()?;
        self.check_snapshot_table()?;
        let repair = self.repair;
        self.each_pass(|check| {
            check.walk()?;
            check.note_overlaps();
            let before = check.tell.report;
            check.compare(None, repair.is_none())?;
            check.compared.add(&before, &check.tell.report);
            match repair {
                None => check.check_copied(false),
                Some(_) => Ok(()),
            }
        })?;
        let plan = match repair {
            None => Plan::default(),
            Some(repair) => self.plan_repair(repair)?,
        };
        self.warn()?;
        Ok(plan)
    }

    /// Does something for each range of clusters that the counters can hold.
    fn each_pass(
        &mut self,
        mut with: impl FnMut(&mut Self) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let mut first = 0;
        while first < self.clusters || first == 0 {
            self.counters.restart(first);
            with(self)?;
            first = self.counters.end();
            self.pass += 1;
        }
        Ok(())
    }

    /// Counts every reference to a host cluster.
    fn walk(&mut self) -> Result<(), Failure> {
        self.refer(0, self.shape.cluster, 1)?;
        self.walk_active()?;
        self.walk_snapshots()?;
        self.count_places()?;
        match self.without_blocks {
            true => Ok(()),
            false => self.count_blocks(),
        }
    }

    fn report(&self) -> Report {
        Report {
            image_end_offset: Some(self.image.header.geometry.host_offset(self.highest + 1)),
            total_clusters: self.image.header.size.div_ceil(self.shape.cluster),
            allocated_clusters: self.sums.allocated,
            fragmented_clusters: self.sums.fragmented,
            compressed_clusters: self.sums.compressed,
            ..self.tell.report
        }
    }

    /// Counts references to a range of the image file.
    fn refer(&mut self, at: u64, len: u64, references: u64) -> Result<(), Failure> {
        if len == 0 {
            return Ok(());
        }
        let end = at.saturating_add(len);
        if end.saturating_sub(self.shape.file_len) >= self.shape.cluster {
            if at < self.shape.file_len.saturating_add(NEAR) {
                self.farthest = self.farthest.max(end);
            }
            return self.corrupt(references, || {
                format!(
                    "ERROR: counting reference for region exceeding the end of the file by one \
                     cluster or more: offset 0x{at:x} size 0x{len:x}"
                )
            });
        }
        let first = at >> self.shape.cluster_bits;
        let last = (end - 1) >> self.shape.cluster_bits;
        self.clusters = self.clusters.max(last + 1);
        for cluster in first..=last {
            let excess = self.counters.add(cluster, references);
            if excess > 0 {
                self.overflow(cluster << self.shape.cluster_bits, excess)?;
            }
        }
        Ok(())
    }

    /// Notes that an L1 entry leads to a table.
    fn note_table(&mut self, at: u64, references: u64) {
        let cluster = at >> self.shape.cluster_bits;
        if self.pass > 0 {
            return;
        }
        if let Some(count) = self.tables.get_mut(&cluster) {
            *count += references;
        } else if self.tables.len() < MAX_TABLES {
            self.tables.insert(cluster, references);
        }
    }

    /// Whether entries of an L2 table may be repaired: it is a table and, as far
    /// as the counters say by now, nothing else. Of very many tables the last
    /// ones are trusted.
    fn is_only_table(&self, at: u64) -> bool {
        let cluster = at >> self.shape.cluster_bits;
        let references = self.tables.get(&cluster);
        self.image.misplaced_table_at(at).is_none()
            && references.is_none_or(|&references| {
                !self.counters.holds(cluster) || self.counters.get(cluster) == references
            })
    }

    /// More references to a cluster than its count can hold.
    #[cold]
    fn overflow(&mut self, at: u64, excess: u64) -> Result<(), Failure> {
        let cluster = at >> self.shape.cluster_bits;
        if self.counters.told(cluster, self.pass) {
            return Ok(());
        }
        for _ in 0..excess.min(MAX_SAME) {
            let text = format!("ERROR: overflow cluster offset=0x{at:x}");
            self.tell.add(self.host, Severity::Corruption, text)?;
            let hint = "Use qemu-img amend to increase the refcount entry width or qemu-img \
                        convert to create a clean copy if the image cannot be opened for writing";
            self.tell.add(self.host, Severity::Warning, hint)?;
        }
        self.tell.report.corruptions += excess.saturating_sub(MAX_SAME);
        Ok(())
    }

    /// A contradiction that the walk over the tables has found, as many times
    /// as something refers to it. Later passes meet it again.
    #[cold]
    fn corrupt(&mut self, times: u64, text: impl Fn() -> String) -> Result<(), Failure> {
        if self.pass > 0 {
            return Ok(());
        }
        for _ in 0..times.min(MAX_SAME) {
            self.tell.add(self.host, Severity::Corruption, text())?;
        }
        self.tell.report.corruptions += times.saturating_sub(MAX_SAME);
        Ok(())
    }

    /// Something that the first walk over the tables has found.
    #[cold]
    fn say(&mut self, severity: Severity, text: impl Fn() -> String) -> Result<(), Failure> {
        match self.pass {
            0 => self.tell.add(self.host, severity, text()),
            _ => Ok(()),
        }
    }
}

/// Most L2 tables whose references are counted apart from others.
const MAX_TABLES: usize = 128 << 10;

/// How often the same line is told; all are counted.
const MAX_SAME: u64 = 64;
