//! The references that were counted against the counts on disk.

use super::super::layout::Run;
use super::blocks::BlockRef;
use super::counters::{PAGE, Page, Stored};
use super::walk::{BATCH, MAX_RANGES};
use super::{Check, Severity};
use crate::error::Failure;
use crate::findings::Repair;
use crate::plan::SECTOR;
use alloc::format;
use alloc::vec::Vec;

/// Longest piece of a block that is looked at at once, in bytes.
const PIECE: u64 = 64 << 10;
/// Most counts that are remembered because they differ from the references.
const MAX_EXACT: usize = 16 << 10;

/// A run of clusters and where its counts are.
#[derive(Clone, Copy, Debug)]
struct Segment {
    run: Run,
    counts: Counts,
}

#[derive(Clone, Copy, Debug)]
enum Counts {
    /// Nowhere: they are 0.
    None,
    /// In the image file, this range.
    At { at: u64, len: u64 },
    /// In a block at an impossible offset.
    Unreadable(BlockRef),
}

/// The counts of a piece of a block, and what becomes of them.
struct Piece<'a> {
    on_disk: &'a [u8],
    /// With those that are too low raised, and with all of them right.
    changed: Option<(Vec<u8>, Vec<u8>)>,
}

impl Check<'_> {
    /// Compares the counts of the clusters of this pass. `fix` is what is
    /// repaired on the way. With `keep` the counters hold what is known about
    /// the counts on disk afterwards.
    pub(super) fn compare(&mut self, fix: Option<Repair>, keep: bool) -> Result<(), Failure> {
        let mut segments = Vec::new();
        let mut bytes = 0;
        let mut next = self.counters.first();
        let end = self.counters.end().min(self.clusters);
        while next < end {
            let segment = self.segment(next, end);
            next = segment.run.end();
            if let Counts::At { len, .. } = segment.counts {
                bytes += len;
            }
            segments.push(segment);
            if bytes >= BATCH || segments.len() >= MAX_RANGES {
                self.compare_segments(&segments, fix, keep)?;
                segments.clear();
                bytes = 0;
            }
        }
        self.compare_segments(&segments, fix, keep)
    }

    /// The clusters from `first` on whose counts are in one place.
    fn segment(&self, first: u64, end: u64) -> Segment {
        let geometry = self.image.header.geometry;
        let per_block = geometry.refcounts_per_block();
        let number = first / per_block;
        let run = |stop: u64| Run {
            first,
            count: stop.min(end) - first,
        };
        let at = self.blocks.partition_point(|block| block.number < number);
        let block = self.blocks.get(at).copied();
        let Some(block) = block.filter(|block| block.number == number) else {
            let stop = block.map_or(end, |block| block.number.saturating_mul(per_block));
            return Segment {
                run: run(stop),
                counts: Counts::None,
            };
        };
        let stop = (number + 1).saturating_mul(per_block);
        if self.is_unreadable(block) {
            return Segment {
                run: run(stop),
                counts: Counts::Unreadable(block),
            };
        }
        let width = geometry.width();
        let run = run(stop.min(first + PIECE * 8 / width.bits()));
        let index = first % per_block;
        let place = width.byte_range(index, index + run.count);
        Segment {
            run,
            counts: Counts::At {
                at: block.at().saturating_add(place.start as u64),
                len: place.len() as u64,
            },
        }
    }

    fn compare_segments(
        &mut self,
        segments: &[Segment],
        fix: Option<Repair>,
        keep: bool,
    ) -> Result<(), Failure> {
        let pieces: Vec<(u64, u64)> = segments
            .iter()
            .filter_map(|segment| match segment.counts {
                Counts::At { at, len } => Some((at, len)),
                _ => None,
            })
            .collect();
        let content = self.read_pieces(&pieces)?;
        let mut rest = content.as_slice();
        for segment in segments {
            match segment.counts {
                Counts::None => self.compare_run(segment.run, &mut Piece::of(&[]), fix, keep)?,
                Counts::Unreadable(block) => self.unreadable(segment.run, block, keep)?,
                Counts::At { at, len } => {
                    let (on_disk, behind) = rest.split_at((len as usize).min(rest.len()));
                    rest = behind;
                    let mut piece = Piece::of(on_disk);
                    self.compare_run(segment.run, &mut piece, fix, keep)?;
                    if let Some((raised, right)) = piece.changed {
                        self.raised.difference(at, on_disk, &raised);
                        self.lowered.difference(at, &raised, &right);
                    }
                }
            }
        }
        Ok(())
    }

    /// Compares page by page.
    fn compare_run(
        &mut self,
        run: Run,
        piece: &mut Piece<'_>,
        fix: Option<Repair>,
        keep: bool,
    ) -> Result<(), Failure> {
        let mut first = run.first;
        while first < run.end() {
            let end = (first / PAGE + 1).saturating_mul(PAGE).min(run.end());
            let place = first - run.first..end - run.first;
            if self.counters.page(first).is_none() && piece.on_disk.is_empty() {
                // Far behind the last page there may be very many clusters.
                first = self.counters.next_page(first).min(run.end());
                continue;
            }
            let width = self.image.header.geometry.width();
            let page = self.counters.page(first);
            if let Some(used) = width.equal(piece.on_disk, place.clone(), page, first % PAGE) {
                if let Some(last) = used {
                    self.highest = self.highest.max(first + last);
                    self.freed.keep(first + last);
                }
            } else {
                self.compare_each(run.first, first..end, piece, fix, keep)?;
            }
            first = end;
        }
        Ok(())
    }

    fn compare_each(
        &mut self,
        base: u64,
        clusters: core::ops::Range<u64>,
        piece: &mut Piece<'_>,
        fix: Option<Repair>,
        keep: bool,
    ) -> Result<(), Failure> {
        let width = self.image.header.geometry.width();
        for cluster in clusters {
            let index = cluster - base;
            let count = width.get(piece.on_disk, index);
            let references = self.counters.get(cluster);
            if count | references == 0 {
                continue;
            }
            self.highest = self.highest.max(cluster);
            if count == references {
                self.freed.keep(cluster);
                continue;
            }
            let repaired = self.differs(cluster, count, references, fix)?;
            match repaired && references == 0 {
                true => self.freed.add(cluster),
                false if fix.is_some() => self.freed.keep(cluster),
                false => {}
            }
            if repaired {
                let (raised, right) = piece.change();
                width.set(right, index, references);
                if references > count {
                    width.set(raised, index, references);
                }
            } else if keep {
                let stored = match count {
                    0 => Stored::None,
                    1 => Stored::One,
                    _ => Stored::More,
                };
                self.counters.store(cluster, stored);
                if self.exact.len() < MAX_EXACT {
                    self.exact.insert(cluster, count);
                }
            }
        }
        Ok(())
    }

    /// A count that is not the number of references. Whether it is repaired.
    fn differs(
        &mut self,
        cluster: u64,
        count: u64,
        references: u64,
        fix: Option<Repair>,
    ) -> Result<bool, Failure> {
        let too_low = count < references;
        self.rebuild |= count == 0;
        let width = self.image.header.geometry.refcount_bits();
        let sector = Some(cluster.saturating_mul(width) / (8 * SECTOR));
        if fix.is_none() && sector != self.differing_last {
            self.differing += 1;
            self.differing_last = sector;
        }
        let wanted = match fix {
            None => false,
            Some(_) if count == 0 => false,
            Some(Repair::Leaks) => !too_low,
            Some(Repair::All) => true,
        };
        let repaired = wanted && self.raised.has_room() && self.lowered.has_room();
        let (word, severity) = match (repaired, too_low) {
            (true, _) => ("Repairing", Severity::Repaired),
            (false, true) => ("ERROR", Severity::Corruption),
            (false, false) => ("Leaked", Severity::Leak),
        };
        match (repaired, too_low) {
            (true, true) => self.tell.report.corruptions_fixed += 1,
            (true, false) => self.tell.report.leaks_fixed += 1,
            _ => {}
        }
        let text = format!("{word} cluster {cluster} refcount={count} reference={references}");
        self.tell.add(self.host, severity, text)?;
        Ok(repaired)
    }

    /// Clusters whose counts are in a block that cannot be read.
    fn unreadable(&mut self, run: Run, block: BlockRef, keep: bool) -> Result<(), Failure> {
        let unaligned = !self.image.header.geometry.is_aligned(block.at());
        if unaligned && !self.told_unreadable {
            self.told_unreadable = true;
            // C's `%#x` has no prefix for 0.
            let index = match block.number {
                0 => "0".into(),
                number => format!("{number:#x}"),
            };
            let text = format!(
                "qcow2: Image is corrupt: Refblock offset {:#x} unaligned (reftable index: {}); \
                 further non-fatal corruption events will be suppressed",
                block.at(),
                index
            );
            self.tell.add(self.host, Severity::Warning, text)?;
        }
        for cluster in run.first..run.end() {
            let text = format!("Can't get refcount for cluster {cluster}: Input/output error");
            self.tell.add(self.host, Severity::Error, text)?;
            if keep {
                self.counters.store(cluster, Stored::Unknown);
            }
        }
        Ok(())
    }
}

impl<'a> Piece<'a> {
    fn of(on_disk: &'a [u8]) -> Self {
        Self {
            on_disk,
            changed: None,
        }
    }

    fn change(&mut self) -> (&mut [u8], &mut [u8]) {
        let on_disk = self.on_disk;
        let (raised, right) = self
            .changed
            .get_or_insert_with(|| (on_disk.to_vec(), on_disk.to_vec()));
        (raised, right)
    }
}

impl super::super::width::Width {
    /// Whether the counts at `place` in a piece of a block are those of a page
    /// from its index `from` on. If so, answers the index in `place` of the last
    /// that is not 0, if any is.
    fn equal(
        self,
        on_disk: &[u8],
        place: core::ops::Range<u64>,
        page: Option<&Page>,
        from: u64,
    ) -> Option<Option<u64>> {
        let range = self.byte_range(place.start, place.end);
        let bytes = on_disk.get(range).unwrap_or(&[]);
        let count = (place.end - place.start) as usize;
        let Some(page) = page else {
            return bytes.iter().all(|&byte| byte == 0).then_some(None);
        };
        let Page::Narrow(counts) = page else {
            return None;
        };
        let counts = counts.get(from as usize..)?.get(..count)?;
        let equal = match self.bits() {
            8 => bytes == counts,
            16 => {
                let (words, _) = bytes.as_chunks::<2>();
                words.len() == count
                    && words
                        .iter()
                        .zip(counts)
                        .all(|(word, &count)| *word == [0, count])
            }
            _ => {
                let mut indexes = (place.start..).zip(counts);
                indexes.all(|(index, &count)| self.get(on_disk, index) == u64::from(count))
            }
        };
        let last = counts.iter().rposition(|&count| count != 0);
        equal.then_some(last.map(|last| last as u64))
    }
}
