//! What a resize left that was cut off before its commit.
//!
//! It counts what it adds behind everything in the file, and at most entries
//! beyond the end of the disk lead there until the commit. So the last cluster
//! that is counted tells: nothing of the disk refers to it, and then to nothing
//! behind the last one that something does refer to. The search for that begins
//! where the file was changed last and ends with the first hit, so that it costs
//! little where all is in order. What is counted and not used elsewhere is
//! nothing that a resize leaves, and stays to be found by a check.
//!
//! A file that goes on behind the last cluster that is counted has room there
//! that a change added and did not come to count. It is cut off, once the whole
//! search has shown that nothing refers to it: where something does, the counts
//! are wrong, and nothing is left as far as anybody can tell.

use super::Qcow2;
use super::check::leftovers::or_damaged;
use super::entry::L2Entry;
use super::format::entry;
use super::header::TableRef;
use super::layout::Run;
use super::refcount::Refcounts;
use super::tables::Tables;
use crate::engine::{Host, Read};
use crate::error::{Failure, FailureKind};
use crate::plan::{Plan, Purpose, Stage, Step};
use crate::prepare::zeroes;
use crate::proto::{FileNo, PlanReply};
use crate::units::HostOffset;
use alloc::vec;
use alloc::vec::Vec;
use core::cmp::Reverse;

/// Bytes of an L1 table or of a bitmap's table that are read at once.
const PIECE: u64 = 512 << 10;
/// Bytes of L2 tables that are read at once.
const BATCH: u64 = 1 << 20;
/// Most L2 tables of snapshots that are looked at.
const MAX_TABLES: usize = 1 << 20;
/// Most entries beyond the end of the disk that are kept.
const MAX_BEYOND: usize = 256 << 10;

/// What nothing of the disk refers to.
#[derive(Debug)]
struct Leftover {
    /// Zeroes the entries beyond the end of the disk that lead there.
    entries: Vec<Step>,
    /// Behind everything that is referred to, up to the last that is counted;
    /// empty where there is only room that is not counted.
    clusters: Run,
}

impl Qcow2 {
    /// Refuses to count anything more while there is something left.
    pub fn check_settled(
        &self,
        host: &mut dyn Host,
        refcounts: &mut Refcounts<'_>,
    ) -> Result<(), Failure> {
        match self.leftover(host, refcounts)? {
            None => Ok(()),
            Some(_) => Err(Failure::new(
                FailureKind::SettleFirst,
                "the file holds room that nothing uses, as an interrupted change leaves it, which \
                 has to be given back first",
            )),
        }
    }

    /// The plan that gives back what is left. A crash during it leaves less, in
    /// the same place.
    pub fn plan_leftover(&self, host: &mut dyn Host) -> Result<PlanReply, Failure> {
        let mut tables = Tables::new(self.tables.slice_len(), self.file_len);
        let mut refcounts = self.counts_in(&mut tables);
        let Some(left) = self.leftover(host, &mut refcounts)? else {
            return Ok(PlanReply::default());
        };
        let mut released = refcounts.zero_counts(host, left.clusters)?;
        let len = self.header.geometry.host_offset(left.clusters.first);
        if len < self.file_len {
            let file = FileNo::IMAGE;
            released.push(Step::SetLength { file, len });
        }
        let stages = [(Purpose::Link, left.entries), (Purpose::Release, released)];
        let stages = stages.into_iter().filter(|(_, steps)| !steps.is_empty());
        Ok(PlanReply {
            plan: Plan {
                stages: stages
                    .map(|(purpose, steps)| Stage { purpose, steps })
                    .collect(),
            },
            ..PlanReply::default()
        })
    }

    /// Looks for it. Nothing is left where something is damaged, or where
    /// features that nobody here knows may refer to something.
    fn leftover(
        &self,
        host: &mut dyn Host,
        refcounts: &mut Refcounts<'_>,
    ) -> Result<Option<Leftover>, Failure> {
        let found = or_damaged(self.look_for_leftover(host, refcounts))?;
        Ok(found.flatten())
    }

    fn look_for_leftover(
        &self,
        host: &mut dyn Host,
        refcounts: &mut Refcounts<'_>,
    ) -> Result<Option<Leftover>, Failure> {
        if self.has_unknown_features() {
            return Ok(None);
        }
        let present = refcounts.present_from(host, 0)?;
        let counted = refcounts.behind_counted(host, 0, &present)?;
        // Only what refers to room behind that shows that it is in use.
        let has_room = self.header.geometry.clusters(self.file_len) > counted;
        let search = Search::new(self, self.header.size, counted + u64::from(has_room));
        let search = search.run_all(host, refcounts, &present)?;
        Ok(search.leftover(counted))
    }

    /// The cluster behind the last of the file that anything would refer to if
    /// the disk had `size` bytes, whether it is counted or not; all of the file
    /// where that cannot be made out.
    pub fn reach(&self, host: &mut dyn Host, size: u64) -> Result<u64, Failure> {
        let clusters = self.header.geometry.clusters(self.file_len);
        let mut tables = Tables::new(self.tables.slice_len(), self.file_len);
        let mut refcounts = self.counts_in(&mut tables);
        let mut search = Search::new(self, size, clusters);
        search.keeps_beyond = false;
        let found = refcounts
            .present_from(host, 0)
            .and_then(|present| search.run_all(host, &mut refcounts, &present));
        Ok(match or_damaged(found)? {
            Some(search) if !search.is_over() => search.end,
            _ => clusters,
        })
    }

    fn counts_in<'a>(&'a self, tables: &'a mut Tables) -> Refcounts<'a> {
        Refcounts {
            geometry: self.header.geometry,
            table: self.header.refcount_table,
            file_len: self.file_len,
            regions: &self.regions,
            tables,
        }
    }
}

/// An entry beyond the end of the disk, in a table that is the disk's alone.
struct Beyond {
    place: u64,
    held: Run,
    /// Whether it leads to a table, which may lead to more.
    leads_on: bool,
}

/// An L2 table.
#[derive(Clone, Copy)]
struct Table {
    at: HostOffset,
    /// Entries that count as references; those behind are beyond the end.
    inside: u64,
}

/// Entries of a table with their indexes.
type Entries<'a> = dyn Iterator<Item = (u64, u64)> + 'a;

/// The search for what refers to the last clusters of the file.
struct Search<'a> {
    image: &'a Qcow2,
    /// The cluster behind the one that is looked for: a reference to that or to a
    /// later one ends the search.
    behind: u64,
    /// Size of the disk in bytes, and the L1 entries that lead to something of
    /// it.
    size: u64,
    inside: u64,
    /// The cluster behind the last that something refers to, so far.
    end: u64,
    beyond: Vec<Beyond>,
    keeps_beyond: bool,
    unclear: bool,
}

impl<'a> Search<'a> {
    fn new(image: &'a Qcow2, size: u64, behind: u64) -> Self {
        Self {
            image,
            behind,
            size,
            inside: image.header.geometry.l1_entries_for(size),
            end: 0,
            beyond: Vec::new(),
            keeps_beyond: true,
            unclear: false,
        }
    }

    fn run_all(
        mut self,
        host: &mut dyn Host,
        refcounts: &mut Refcounts<'_>,
        present: &[u64],
    ) -> Result<Self, Failure> {
        self.metadata(host, refcounts, present)?;
        self.bitmaps(host)?;
        self.active(host)?;
        self.snapshots(host)?;
        Ok(self)
    }

    fn is_over(&self) -> bool {
        self.unclear || self.end >= self.behind
    }

    fn run(&self, at: u64, len: u64) -> Run {
        let geometry = self.image.header.geometry;
        let first = at / geometry.cluster_size();
        Run {
            first,
            count: geometry.clusters(at.saturating_add(len)) - first,
        }
    }

    fn refer(&mut self, at: u64, len: u64) {
        if len > 0 {
            self.end = self.end.max(self.run(at, len).end());
        }
    }

    fn note_beyond(&mut self, entry: Beyond) {
        if self.keeps_beyond {
            self.unclear |= self.beyond.len() == MAX_BEYOND;
            self.beyond.push(entry);
        }
    }

    /// What the header leads to, and the refcount blocks.
    fn metadata(
        &mut self,
        host: &mut dyn Host,
        refcounts: &mut Refcounts<'_>,
        present: &[u64],
    ) -> Result<(), Failure> {
        let image = self.image;
        let cluster = image.header.geometry.cluster_size();
        self.refer(0, image.regions.end());
        for snapshot in &image.snapshots {
            self.refer(
                snapshot.l1.offset.0,
                u64::from(snapshot.l1.count) * entry::LEN,
            );
        }
        for bitmap in &image.bitmaps {
            self.refer(
                bitmap.table.offset.0,
                u64::from(bitmap.table.count) * entry::LEN,
            );
        }
        for &number in present {
            if let Some(at) = refcounts.block(host, number)? {
                self.refer(at.0, cluster);
            }
        }
        Ok(())
    }

    fn bitmaps(&mut self, host: &mut dyn Host) -> Result<(), Failure> {
        let image = self.image;
        let cluster = image.header.geometry.cluster_size();
        for bitmap in &image.bitmaps {
            self.each_piece(host, bitmap.table, |search, _, piece| {
                for (_, raw) in piece {
                    let at = raw & entry::OFFSET;
                    search.refer(at, if at == 0 { 0 } else { cluster });
                }
                Ok(())
            })?;
        }
        Ok(())
    }

    /// Visits the entries of a table with their indexes, the last piece of it
    /// first, until the search is over.
    fn each_piece(
        &mut self,
        host: &mut dyn Host,
        table: TableRef,
        mut visit: impl FnMut(&mut Self, &mut dyn Host, &mut Entries<'_>) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let mut end = u64::from(table.count);
        while end > 0 && !self.is_over() {
            let first = (end - 1) / (PIECE / entry::LEN) * (PIECE / entry::LEN);
            let mut piece = vec![0; ((end - first) * entry::LEN) as usize];
            host.read(&mut [Read {
                file: FileNo::IMAGE,
                offset: table.offset.plus(first * entry::LEN).0,
                buf: &mut piece,
            }])?;
            let (words, _) = piece.as_chunks::<8>();
            let words = words.iter().map(|word| u64::from_be_bytes(*word));
            visit(self, host, &mut (first..).zip(words))?;
            end = first;
        }
        Ok(())
    }

    /// The active disk. Newer tables tend to lie behind older ones.
    fn active(&mut self, host: &mut dyn Host) -> Result<(), Failure> {
        let l1 = self.image.header.l1;
        self.each_piece(host, l1, |search, host, piece| {
            let tables = piece.filter_map(|(index, raw)| search.l1_entry(index, raw));
            let tables = tables.collect();
            search.visit(host, tables)
        })
    }

    /// The table that an entry of the active L1 table leads to, unless that is
    /// beyond the end of the disk.
    fn l1_entry(&mut self, index: u64, raw: u64) -> Option<Table> {
        let geometry = self.image.header.geometry;
        let at = raw & entry::OFFSET;
        if at == 0 {
            return None;
        }
        let own = raw & entry::COPIED != 0;
        if own && index >= self.inside {
            self.note_beyond(Beyond {
                place: self.image.header.l1.offset.0 + index * entry::LEN,
                held: self.run(at, geometry.cluster_size()),
                leads_on: true,
            });
            return None;
        }
        self.refer(at, geometry.cluster_size());
        let per_table = geometry.l2_entries();
        let kept = geometry.clusters(self.size);
        Some(Table {
            at: HostOffset(at),
            inside: match own && index + 1 == self.inside {
                true => kept - index * per_table,
                false => per_table,
            },
        })
    }

    fn snapshots(&mut self, host: &mut dyn Host) -> Result<(), Failure> {
        let image = self.image;
        let geometry = image.header.geometry;
        let mut tables: Vec<Table> = Vec::new();
        for snapshot in &image.snapshots {
            self.each_piece(host, snapshot.l1, |search, _, piece| {
                let places = piece.map(|(_, raw)| raw & entry::OFFSET);
                for at in places.filter(|&at| at != 0) {
                    search.refer(at, geometry.cluster_size());
                    tables.push(Table {
                        at: HostOffset(at),
                        inside: geometry.l2_entries(),
                    });
                }
                search.unclear |= tables.len() > MAX_TABLES;
                Ok(())
            })?;
        }
        self.visit(host, tables)
    }

    /// Looks into tables, the last of the file first, more and more at once.
    fn visit(&mut self, host: &mut dyn Host, mut tables: Vec<Table>) -> Result<(), Failure> {
        if self.image.header.has_data_file() {
            return Ok(());
        }
        tables.sort_unstable_by_key(|table| Reverse(table.at));
        tables.dedup_by_key(|table| table.at);
        let most = (BATCH / self.image.header.geometry.cluster_size()).max(1) as usize;
        let (mut rest, mut count) = (tables.as_slice(), 1);
        while !rest.is_empty() && !self.is_over() {
            let (batch, behind) = rest.split_at(count.min(rest.len()));
            let places: Vec<HostOffset> = batch.iter().map(|table| table.at).collect();
            let contents = self.image.whole_tables(host, &places)?;
            for (table, content) in batch.iter().zip(&contents) {
                self.look_into(*table, content)?;
            }
            (rest, count) = (behind, (2 * count).min(most));
        }
        Ok(())
    }

    fn look_into(&mut self, table: Table, content: &[u8]) -> Result<(), Failure> {
        let geometry = self.image.header.geometry;
        for place in 0..geometry.l2_entries() {
            let raw = self.image.raw_entry(content, place)?;
            if raw == L2Entry::default() {
                continue;
            }
            let Ok(cluster) = raw.decode(self.image.rules()) else {
                self.unclear = true;
                return Ok(());
            };
            match cluster.host_range(geometry) {
                None => {}
                Some((at, len)) if place < table.inside => self.refer(at.0, len),
                Some((at, len)) => self.note_beyond(Beyond {
                    place: self.image.l2_entry_place(table.at, place).0,
                    held: self.run(at.0, len),
                    leads_on: false,
                }),
            }
        }
        Ok(())
    }

    /// What was found, where the clusters before `counted` are counted. Entries
    /// beyond the end that lead to what something else refers to are older than
    /// what is left.
    fn leftover(self, counted: u64) -> Option<Leftover> {
        if self.is_over() {
            return None;
        }
        let geometry = self.image.header.geometry;
        let mut entries = Vec::new();
        for Beyond {
            place,
            held,
            leads_on,
        } in self.beyond
        {
            let len = match leads_on {
                true => entry::LEN,
                false => geometry.l2_entry_len(),
            };
            if held.end() > counted {
                return None;
            }
            match held.first >= self.end {
                true => zeroes([(place, len)].into_iter(), &mut entries),
                false if leads_on || held.end() > self.end => return None,
                false => {}
            }
        }
        Some(Leftover {
            entries,
            clusters: Run {
                first: self.end,
                count: counted.saturating_sub(self.end),
            },
        })
    }
}

impl Refcounts<'_> {
    /// The steps that set the counts of a run of clusters to 0, where there are
    /// any.
    fn zero_counts(&mut self, host: &mut dyn Host, run: Run) -> Result<Vec<Step>, Failure> {
        let (per_block, width) = (self.geometry.refcounts_per_block(), self.geometry.width());
        let mut steps = Vec::new();
        for number in self.present_from(host, run.first / per_block)? {
            let Some(block) = self.block(host, number)? else {
                continue;
            };
            let base = number * per_block;
            let first = run.first.max(base) - base;
            let end = run.end().min(base + per_block).saturating_sub(base);
            if first >= end {
                continue;
            }
            let place = width.byte_range(first, end);
            let (mut at, end) = (place.start as u64, place.end as u64);
            if width.byte_range(0, first).end as u64 > at {
                // Counts narrower than a byte: the first of it are kept.
                let mut byte = [0];
                host.read(&mut [Read {
                    file: FileNo::IMAGE,
                    offset: block.plus(at).0,
                    buf: &mut byte,
                }])?;
                let kept = first - width.index_range(place.start).start;
                for index in kept..width.index_range(0).end {
                    width.set(&mut byte, index, 0);
                }
                steps.push(Step::Write {
                    file: FileNo::IMAGE,
                    offset: block.plus(at).0,
                    data: byte.to_vec(),
                });
                at += 1;
            }
            if at < end {
                zeroes([(block.plus(at).0, end - at)].into_iter(), &mut steps);
            }
        }
        Ok(steps)
    }
}
