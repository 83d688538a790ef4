//! Lowering the counts of what a shrink drops.
//!
//! Counts are changed in a cache of their own, a window of clusters at a time,
//! so that memory is bounded however large the image is: each window looks at
//! everything that is dropped once more. What changes goes to disk after the
//! commits; where that is more than a plan should hold, it is staged behind the
//! end of the file before them and copied afterwards.

use super::super::Qcow2;
use super::super::geometry::Geometry;
use super::super::header::TableRef;
use super::super::layout::Run;
use super::super::refcount::Refcounts;
use super::super::refuse;
use super::super::regions::Regions;
use super::super::tables::{Kind, Tables};
use super::bitmaps::Cuts;
use super::blocks::{self, Empty};
use super::dropped::each_dropped;
use super::survey::Survey;
use crate::error::{Failure, FailureKind};
use crate::plan::{SECTOR, Step};
use crate::prepare::{Prepare, writes, zeroes};
use crate::proto::FileNo;
use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;

/// Released clusters that are looked at for a new use.
const MANY: usize = 4096;
/// Bytes of refcount blocks that one window changes at most.
const WINDOW: u64 = 4 << 20;
/// Most windows: what is dropped is read once for each.
const MAX_WINDOWS: usize = 512;
/// Bytes of changed counts that are part of the plan; more is staged.
const INLINE: usize = 2 << 20;
/// Most steps that change counts.
const MAX_STEPS: usize = 64 << 10;
/// Most runs of clusters whose disk space is given back.
const MAX_PUNCHED: usize = 64 << 10;

/// What is to be released.
pub struct Release<'a> {
    /// The new end.
    pub survey: &'a Survey,
    /// The bitmaps.
    pub cuts: &'a Cuts,
    /// What else loses a reference.
    pub dropped: Vec<Run>,
    /// Copies in blocks that exist: counted before the first commit.
    pub staged: Vec<Run>,
    /// Whether all of them stay.
    pub stays: bool,
    /// Those of them that would rather have a freed cluster, and stay where
    /// there is none.
    pub homeless: Vec<Run>,
    /// Where changed counts may be staged: behind all copies.
    pub stage_at: u64,
}

/// What releasing takes.
#[derive(Debug, Default)]
pub struct Released {
    /// The changed counts.
    pub counts: Vec<Step>,
    /// What takes empty refcount blocks out.
    pub emptied: Emptied,
    /// Clusters that nothing refers to any more.
    pub freed: Vec<Run>,
    /// Freed clusters that are put to use, still counted once.
    pub reused: Vec<u64>,
    /// The cluster behind the last that is counted.
    pub end: u64,
    /// Whether anything was staged.
    pub staged: bool,
}

impl Released {
    /// Whether all clusters of a range of the file, in bytes, are freed.
    pub fn frees(&self, geometry: Geometry, range: Range<u64>) -> bool {
        let first = geometry.clusters(range.start);
        let window = Run {
            first,
            count: geometry.clusters(range.end).saturating_sub(first),
        };
        let parts = self.freed.iter().filter_map(|&run| clip(run, window));
        parts.map(|part| part.count).sum::<u64>() == window.count
    }
}

/// What takes empty refcount blocks out.
#[derive(Debug, Default)]
pub struct Emptied {
    /// The entries for them, one stage after the other.
    pub rounds: Vec<Vec<Step>>,
    /// Then the counts of their clusters in blocks that stay.
    pub uncounted: Vec<Step>,
}

impl Release<'_> {
    /// Finds out. What has to be staged is handed to `prepare`.
    pub fn run(&self, image: &mut Qcow2, prepare: &mut Prepare<'_>) -> Result<Released, Failure> {
        let geometry = image.header.geometry;
        let counts = Counts {
            geometry,
            table: image.header.refcount_table,
            file_len: image.file_len,
            regions: image.regions.clone(),
        };
        let mut tables = counts.tables();
        let present = counts.over(&mut tables).present_from(prepare.host(), 0)?;
        let windows = windows(geometry, &present);
        if windows.len() > MAX_WINDOWS {
            return Err(too_scattered());
        }
        let mut output = Output {
            released: Released::default(),
            cluster: geometry.cluster_size(),
            inline: 0,
            stage_at: self.stage_at,
        };
        for (number, window) in windows.iter().enumerate() {
            let pass = Pass {
                release: self,
                counts: &counts,
                present: &present,
                window: *window,
                first: number == 0,
            };
            pass.run(image, prepare, &mut output)?;
        }
        Ok(output.released)
    }
}

/// The windows in which blocks exist, ascending: runs of clusters.
fn windows(geometry: Geometry, present: &[u64]) -> Vec<Run> {
    let per_block = geometry.refcounts_per_block();
    let blocks = (WINDOW / geometry.cluster_size()).max(1);
    let mut numbers: Vec<u64> = present.iter().map(|number| number / blocks).collect();
    numbers.dedup();
    let count = blocks * per_block;
    let run = |number: u64| Run {
        first: number.saturating_mul(count),
        count,
    };
    numbers.into_iter().map(run).collect()
}

/// Where the counts are.
pub struct Counts {
    geometry: Geometry,
    table: TableRef,
    file_len: u64,
    regions: Regions,
}

impl Counts {
    fn tables(&self) -> Tables {
        Tables::new(self.geometry.slice_len(), self.file_len)
    }

    fn over<'a>(&'a self, tables: &'a mut Tables) -> Refcounts<'a> {
        Refcounts {
            geometry: self.geometry,
            table: self.table,
            file_len: self.file_len,
            regions: &self.regions,
            tables,
        }
    }
}

/// One look at everything that is dropped.
struct Pass<'a> {
    release: &'a Release<'a>,
    counts: &'a Counts,
    present: &'a [u64],
    window: Run,
    first: bool,
}

impl Pass<'_> {
    fn run(
        &self,
        image: &mut Qcow2,
        prepare: &mut Prepare<'_>,
        output: &mut Output,
    ) -> Result<(), Failure> {
        let mut tables = self.counts.tables();
        let mut refcounts = self.counts.over(&mut tables);
        let mut freed = Marks::new(self.window);
        let per_block = self.counts.geometry.refcounts_per_block();
        let mut visit = |host: &mut dyn crate::engine::Host, run: Run| {
            if self.first {
                self.check_counted(run, per_block)?;
            }
            match clip(run, self.window) {
                Some(part) => refcounts.release_noting(host, part, |cluster| freed.set(cluster)),
                None => Ok(()),
            }
        };
        for &run in &self.release.dropped {
            visit(prepare.host(), run)?;
        }
        let (survey, cuts) = (self.release.survey, self.release.cuts);
        each_dropped(image, prepare.host(), survey, cuts, &mut visit)?;
        let released = &mut output.released;
        let wanted = self.release.homeless.len();
        let mut as_it_is = self.counts.tables();
        let mut before = self.counts.over(&mut as_it_is);
        for cluster in freed.first(MANY) {
            // Until it is released, its count has to be that of its new use.
            if released.reused.len() == wanted || before.count(prepare.host(), cluster)? != 1 {
                continue;
            }
            let (first, count) = (cluster, 1);
            refcounts.set_ones(prepare.host(), Run { first, count })?;
            freed.clear(cluster);
            released.reused.push(cluster);
        }
        freed.runs(&mut released.freed);
        let stay = match self.release.stays {
            true => &self.release.staged,
            false => self
                .release
                .homeless
                .get(released.reused.len()..)
                .unwrap_or(&[]),
        };
        self.settle_staged(prepare, &mut refcounts, stay)?;
        let numbers = self.numbers();
        let empty = match self.release.stays {
            true => Empty::default(),
            false => blocks::empty(prepare.host(), &mut refcounts, &numbers)?,
        };
        output.emit(&mut tables, &empty, prepare)?;
        self.take_out(
            &mut tables,
            prepare,
            (&empty, &numbers),
            &mut output.released,
        )
    }

    /// The numbers of the blocks of the window.
    fn numbers(&self) -> Vec<u64> {
        let per_block = self.counts.geometry.refcounts_per_block();
        let inside = |&number: &u64| clip(of_block(number, per_block), self.window).is_some();
        self.present.iter().copied().filter(inside).collect()
    }

    /// Copies are counted by now; most are not any more in the end.
    fn settle_staged(
        &self,
        prepare: &mut Prepare<'_>,
        refcounts: &mut Refcounts<'_>,
        stay: &[Run],
    ) -> Result<(), Failure> {
        let clipped = |runs: &[Run]| -> Vec<Run> {
            runs.iter()
                .filter_map(|&run| clip(run, self.window))
                .collect()
        };
        let staged = clipped(&self.release.staged);
        for &run in &staged {
            refcounts.set_ones(prepare.host(), run)?;
        }
        for &run in &staged {
            refcounts.release(prepare.host(), run)?;
        }
        for run in clipped(stay) {
            refcounts.set_ones(prepare.host(), run)?;
        }
        Ok(())
    }

    /// Refuses what no refcount block counts.
    fn check_counted(&self, run: Run, per_block: u64) -> Result<(), Failure> {
        let mut number = run.first / per_block;
        while number * per_block < run.end() {
            if self.present.binary_search(&number).is_err() {
                let at = self.counts.geometry.host_offset(run.first);
                return Err(refuse::table(alloc::format!(
                    "the cluster at {at:#x} is in use but has reference count 0"
                )));
            }
            number += 1;
        }
        Ok(())
    }

    fn take_out(
        &self,
        tables: &mut Tables,
        prepare: &mut Prepare<'_>,
        (empty, numbers): (&Empty, &[u64]),
        released: &mut Released,
    ) -> Result<(), Failure> {
        let mut refcounts = self.counts.over(tables);
        empty.uncount(prepare.host(), &mut refcounts)?;
        for &first in &empty.clusters {
            add_run(&mut released.freed, Run { first, count: 1 });
        }
        let end = blocks::end(prepare.host(), &mut refcounts, numbers, empty)?;
        released.end = released.end.max(end);
        for (round, numbers) in empty.rounds.iter().enumerate() {
            let rounds = &mut released.emptied.rounds;
            if rounds.len() <= round {
                rounds.push(Vec::new());
            }
            let entries = numbers.iter().map(|&number| refcounts.entry_at(number));
            if let Some(steps) = rounds.get_mut(round) {
                zeroes(entries.map(|at| (at.0, 8)), steps);
            }
        }
        let uncounted = writes(tables.dirty(Kind::RefcountBlock));
        released.emptied.uncounted.extend(uncounted);
        Ok(())
    }
}

fn of_block(number: u64, per_block: u64) -> Run {
    Run {
        first: number.saturating_mul(per_block),
        count: per_block,
    }
}

fn clip(run: Run, window: Run) -> Option<Run> {
    let first = run.first.max(window.first);
    let end = run.end().min(window.end());
    (first < end).then(|| Run {
        first,
        count: end - first,
    })
}

/// Which clusters of a window are marked.
struct Marks {
    window: Run,
    words: Vec<u64>,
}

impl Marks {
    fn new(window: Run) -> Self {
        Self {
            window,
            words: vec![0; window.count.div_ceil(64) as usize],
        }
    }

    fn set(&mut self, cluster: u64) {
        let at = cluster.wrapping_sub(self.window.first);
        if let Some(word) = self.words.get_mut((at / 64) as usize) {
            *word |= 1 << (at % 64);
        }
    }

    fn clear(&mut self, cluster: u64) {
        let at = cluster.wrapping_sub(self.window.first);
        if let Some(word) = self.words.get_mut((at / 64) as usize) {
            *word &= !(1 << (at % 64));
        }
    }

    /// The first marked clusters, `most` at most.
    fn first(&self, most: usize) -> Vec<u64> {
        let words = (0u64..).zip(&self.words).filter(|(_, word)| **word != 0);
        let marked = words.flat_map(|(at, &word)| {
            let bits = (0..64).filter(move |bit| word & (1 << bit) != 0);
            bits.map(move |bit| self.window.first + at * 64 + bit)
        });
        marked.take(most).collect()
    }

    /// The marked runs, behind those that are known, up to a limit.
    fn runs(&self, runs: &mut Vec<Run>) {
        for (at, &word) in (0..).zip(&self.words) {
            let mut rest = word;
            while rest != 0 {
                let bit = rest.trailing_zeros();
                let len = (rest >> bit).trailing_ones();
                rest &= !((u64::MAX >> (64 - len)) << bit);
                let first = self.window.first + at * 64 + u64::from(bit);
                let count = u64::from(len);
                add_run(runs, Run { first, count });
            }
        }
    }
}

/// Adds a run behind those that are known, up to a limit.
fn add_run(runs: &mut Vec<Run>, run: Run) {
    let full = runs.len() == MAX_PUNCHED;
    match runs.last_mut().filter(|last| last.end() == run.first) {
        Some(last) => last.count += run.count,
        None if full => {}
        None => runs.push(run),
    }
}

/// Turns changed counts into steps.
struct Output {
    released: Released,
    /// Bytes of a cluster.
    cluster: u64,
    inline: usize,
    stage_at: u64,
}

impl Output {
    /// What blocks say that are taken out is of no meaning.
    fn emit(
        &mut self,
        tables: &mut Tables,
        empty: &Empty,
        prepare: &mut Prepare<'_>,
    ) -> Result<(), Failure> {
        for (at, run) in tables.dirty(Kind::RefcountBlock) {
            let mut at = at.0;
            if empty.lies_at(at / self.cluster) {
                continue;
            }
            let sectors: Vec<&[u8]> = run.chunks(SECTOR as usize).collect();
            let is_zero = |sector: &&[u8]| sector.iter().all(|&byte| byte == 0);
            for group in sectors.chunk_by(|a, b| is_zero(a) == is_zero(b)) {
                let len = group.iter().map(|sector| sector.len()).sum::<usize>();
                match group.first().is_some_and(is_zero) {
                    true => zeroes([(at, len as u64)].into_iter(), &mut self.released.counts),
                    false => self.write(at, group.concat(), prepare)?,
                }
                at += len as u64;
            }
        }
        tables.mark_planned(Kind::RefcountBlock);
        match self.released.counts.len() <= MAX_STEPS {
            true => Ok(()),
            false => Err(too_scattered()),
        }
    }

    fn write(&mut self, to: u64, data: Vec<u8>, prepare: &mut Prepare<'_>) -> Result<(), Failure> {
        let file = FileNo::IMAGE;
        let len = data.len() as u64;
        if self.inline + data.len() <= INLINE {
            self.inline += data.len();
            self.released.counts.push(Step::Write {
                file,
                offset: to,
                data,
            });
            return Ok(());
        }
        let from = self.stage_at;
        self.stage_at += len;
        self.released.staged = true;
        prepare.fresh(Step::Write {
            file,
            offset: from,
            data,
        })?;
        match self.released.counts.last_mut() {
            Some(Step::Copy {
                from: last_from,
                to: last_to,
                len: last,
                ..
            }) if *last_from + *last == from && *last_to + *last == to => *last += len,
            _ => self.released.counts.push(Step::Copy {
                file,
                from,
                to,
                len,
            }),
        }
        Ok(())
    }
}

fn too_scattered() -> Failure {
    Failure::new(
        FailureKind::TooLarge,
        "what the shrink would release lies too scattered in the file for one step; copy the image \
         with `qemu-img convert` after shrinking the copy's size, or shrink it in smaller steps",
    )
}
