//! The steps of a shrink, stage by stage.

use super::super::Qcow2;
use super::super::format::{header as fields, incompatible};
use super::super::grow::commit::{NewHeader, change};
use super::super::layout::Run;
use super::super::refcount::Refcounts;
use super::super::refuse;
use super::super::tables::Kind;
use super::bitmaps::Cuts;
use super::release::{Emptied, Release, Released};
use super::staging::{Homes, Staging};
use super::survey::Survey;
use crate::bytes;
use crate::engine::Host;
use crate::error::Failure;
use crate::plan::{Plan, Purpose, Stage, Step};
use crate::prepare::{Prepare, writes};
use crate::proto::FileNo;
use alloc::format;
use alloc::vec;
use alloc::vec::Vec;

/// Refuses to cut the file where the counts say that nothing is: they leave the
/// table of the counts itself out.
fn check_end(image: &Qcow2, end: u64) -> Result<(), Failure> {
    let table = image.header.refcount_table;
    let len = u64::from(table.count) * image.header.geometry.cluster_size();
    match end < table.offset.0.saturating_add(len).min(image.file_len) {
        false => Ok(()),
        true => Err(refuse::table(format!(
            "the refcount table at {:#x} is in use but has reference count 0",
            table.offset.0
        ))),
    }
}

/// Everything that is known about a shrink.
pub struct Shrink<'a> {
    /// What lies around the new end.
    pub survey: &'a Survey,
    /// What becomes of the bitmaps.
    pub cuts: &'a Cuts,
    /// Whether their directory moves with the commit. Otherwise they are marked
    /// as in use meanwhile.
    pub moves_bitmaps: bool,
    /// Where the copies are.
    pub staging: &'a Staging,
}

/// The first sector as the first commit writes it, and at last.
struct Sectors {
    /// Where a data file has to be cut, with the corrupt bit: what is cut off
    /// lies where a larger disk would show it, and whoever sees the bit does not
    /// grow the disk before.
    staged: Vec<u8>,
    last: Vec<u8>,
    /// Whether that bit is all that they differ in.
    same_places: bool,
}

/// Whether the place of the bitmap directory can change with the commit.
pub fn moves_bitmaps(image: &Qcow2, cuts: &Cuts) -> Result<bool, Failure> {
    if cuts.clusters == 0 {
        return Ok(false);
    }
    let header = header(image.header.size, present(image), present_table(image));
    let moved = NewHeader {
        bitmap_directory: Some(0),
        ..header
    };
    Ok(moved.first_sector(image)?.1.is_none())
}

/// Counts the copies in blocks that exist.
pub fn count_copies(
    image: &Qcow2,
    host: &mut dyn Host,
    refcounts: &mut Refcounts<'_>,
    staging: &Staging,
) -> Result<Vec<Step>, Failure> {
    for run in staging.counted(image.header.geometry, staging.all()) {
        refcounts.set_ones(host, run)?;
    }
    Ok(writes(refcounts.tables.dirty(Kind::RefcountBlock)))
}

impl Shrink<'_> {
    /// The plan. `counts` are the writes that count the copies.
    pub fn plan(
        &self,
        image: &mut Qcow2,
        mut prepare: Prepare<'_>,
        counts: Vec<Step>,
    ) -> Result<Plan, Failure> {
        let geometry = image.header.geometry;
        let stays = self.stays();
        let release = self.release(image, stays)?;
        let released = release.run(image, &mut prepare)?;
        let homes = self.homes(stays, &released);
        for step in counts {
            prepare.inside(step);
        }
        self.staging.lay_down(image, self.survey, &mut prepare)?;
        let directory = match self.moves_bitmaps {
            true => Some(
                self.cuts
                    .lay_down(image, self.staging.bitmaps, &mut prepare)?,
            ),
            false => None,
        };
        let copies_end = geometry.host_offset(self.staging.all().end());
        // What is staged lies behind all copies.
        if copies_end > image.file_len && !released.staged {
            prepare.fresh(Step::SetLength {
                file: FileNo::IMAGE,
                len: copies_end,
            })?;
        }
        let mut settled = Vec::new();
        if !stays {
            settled = self.staging.settle(image, self.survey, &homes)?;
        }
        let mut unmarked = Vec::new();
        if self.cuts.clusters > 0 && !self.moves_bitmaps {
            let (set, clear) = self.cuts.marks(image)?;
            for step in set {
                prepare.inside(step);
            }
            unmarked = clear;
        }
        if self.cuts.clusters > 0 && !(stays && self.moves_bitmaps) {
            settled.extend(self.cuts.settle(image)?);
        }
        let sectors = self.sectors(image, directory, stays)?;
        let commit = change(&image.first_sector, &sectors.staged)?;
        let mut back = match sectors.last == sectors.staged {
            true => Vec::new(),
            false => vec![change(&sectors.staged, &sectors.last)?],
        };
        let mut end = self.end(image, &released, stays);
        check_end(image, end)?;
        if !released.frees(geometry, end..image.file_len) {
            // What is in use there is not counted: it stays.
            let reach = image.reach(prepare.host(), self.survey.size)?;
            end = end.max(geometry.host_offset(reach).min(image.file_len));
        }
        let cut = self.cut(image, &released, end);
        let mut lowered = released.counts;
        lowered.extend(unmarked);
        settled.extend(self.cut_data_file(image));
        if sectors.same_places {
            // Nothing relies on the bit being gone.
            lowered.append(&mut back);
        }
        let mut stages = vec![
            (Purpose::Prepare, prepare.finish()),
            (Purpose::Commit, vec![commit]),
            (Purpose::Release, settled),
            (Purpose::Commit, back),
        ];
        stages.extend(give_back(lowered, released.emptied, cut, released.staged));
        Ok(Plan {
            stages: stages
                .into_iter()
                .filter(|(_, steps)| !steps.is_empty())
                .map(|(purpose, steps)| Stage { purpose, steps })
                .collect(),
        })
    }

    /// Copies of originals that cannot be gone back to.
    fn homeless(&self) -> Vec<Run> {
        let survey = self.survey;
        let table = survey.boundary.as_ref().filter(|table| !table.own);
        let tail = survey.tail.as_ref().filter(|tail| !tail.own);
        let copies = [
            table.map(|_| self.staging.l2),
            tail.map(|_| self.staging.tail),
        ];
        copies.into_iter().flatten().collect()
    }

    /// Whether all copies stay for good: one of them may have to, and what
    /// counts it is among them.
    fn stays(&self) -> bool {
        !self.homeless().is_empty() && !self.staging.table.is_empty()
    }

    fn release(&self, image: &Qcow2, stays: bool) -> Result<Release<'_>, Failure> {
        let geometry = image.header.geometry;
        let cluster = geometry.cluster_size();
        let survey = self.survey;
        let mut dropped = Vec::new();
        if let Some(table) = survey.boundary.as_ref().filter(|table| stays || !table.own) {
            dropped.push(Run {
                first: table.table.0 / cluster,
                count: 1,
            });
        }
        if let Some(tail) = survey.tail.as_ref().filter(|tail| stays || !tail.own) {
            dropped.push(tail.held);
        }
        if stays {
            let header = &image.header;
            dropped.push(Run {
                first: header.l1.offset.0 / cluster,
                count: geometry.l1_clusters(survey.l1_kept),
            });
            dropped.push(Run {
                first: header.refcount_table.offset.0 / cluster,
                count: u64::from(header.refcount_table.count),
            });
        }
        if stays && self.moves_bitmaps {
            dropped.extend(self.cuts.replaced(image)?);
        }
        let staged = self.staging.counted(geometry, self.staging.all());
        let behind = geometry.host_offset(self.staging.all().end());
        Ok(Release {
            survey,
            cuts: self.cuts,
            dropped,
            staged,
            stays,
            homeless: if stays { Vec::new() } else { self.homeless() },
            stage_at: behind.max(image.file_len.next_multiple_of(cluster)),
        })
    }

    /// Where things are for good: freed clusters for what has no place to go
    /// back to, the table first; where there are none, the copies.
    fn homes(&self, stays: bool, released: &Released) -> Homes {
        let mut free = released.reused.iter().copied();
        let mut home = |own: bool, copy: Run| match own && !stays {
            true => None,
            false => Some(free.next().unwrap_or(copy.first)),
        };
        let survey = self.survey;
        let l2 = survey.boundary.as_ref();
        let l2 = l2.and_then(|table| home(table.own, self.staging.l2));
        let tail = survey.tail.as_ref();
        let tail = tail.and_then(|tail| home(tail.own, self.staging.tail));
        Homes { tail, l2 }
    }

    fn sectors(
        &self,
        image: &Qcow2,
        directory: Option<u64>,
        stays: bool,
    ) -> Result<Sectors, Failure> {
        let geometry = image.header.geometry;
        let (size, kept) = (self.survey.size, self.survey.l1_kept);
        let own_l1 = match kept {
            0 => (0, 0),
            _ => (kept, image.header.l1.offset.0),
        };
        let l1 = match self.staging.l1.count {
            0 => own_l1,
            _ => (kept, geometry.host_offset(self.staging.l1.first)),
        };
        let table = match self.staging.table.count {
            0 => present_table(image),
            count => (count, geometry.host_offset(self.staging.table.first)),
        };
        let staged = NewHeader {
            bitmap_directory: directory,
            ..header(size, l1, table)
        };
        let unflagged = staged.first_sector(image)?.0;
        let mut staged = unflagged.clone();
        if self.cut_data_file(image).is_some() {
            let flags = image.header.incompatible | incompatible::CORRUPT;
            bytes::put_be64(&mut staged, fields::INCOMPATIBLE, flags)?;
        }
        if stays {
            return Ok(Sectors {
                staged,
                last: unflagged,
                same_places: true,
            });
        }
        let own = match (directory, image.header.extensions.bitmaps()?) {
            (Some(_), Some(place)) => Some(place.directory.0),
            _ => None,
        };
        let last = NewHeader {
            bitmap_directory: own,
            ..header(size, own_l1, present_table(image))
        };
        let last = last.first_sector(image)?.0;
        Ok(Sectors {
            staged,
            same_places: last == unflagged,
            last,
        })
    }

    /// The length of the file in the end.
    fn end(&self, image: &Qcow2, released: &Released, stays: bool) -> u64 {
        let geometry = image.header.geometry;
        if stays {
            return geometry.host_offset(self.staging.all().end());
        }
        let homeless = self.homeless();
        let staying = homeless.iter().skip(released.reused.len());
        let copies = staying.map(|copy| copy.end()).max();
        if let Some(end) = copies {
            return geometry.host_offset(end);
        }
        // The file may have ended inside a cluster that is used anew.
        let reused = released.reused.iter().max().map_or(0, |last| last + 1);
        let end = geometry.host_offset(released.end).min(image.file_len);
        end.max(geometry.host_offset(reused))
    }

    /// Gives disk space back, in the file and at its end.
    fn cut(&self, image: &Qcow2, released: &Released, end: u64) -> Vec<Step> {
        let geometry = image.header.geometry;
        let file = FileNo::IMAGE;
        let mut steps = Vec::new();
        for run in &released.freed {
            let offset = geometry.host_offset(run.first);
            let stop = geometry.host_offset(run.end()).min(end);
            if offset < stop {
                let len = stop - offset;
                steps.push(Step::Punch { file, offset, len });
            }
        }
        let grown = !self.staging.all().is_empty() || released.staged;
        if end < image.file_len || grown {
            steps.push(Step::SetLength { file, len: end });
        }
        steps
    }

    /// The same in the data file, where it is longer than the new disk.
    fn cut_data_file(&self, image: &Qcow2) -> Option<Step> {
        let len = self.survey.size;
        let longer = image.data_len.is_some_and(|present| present > len);
        let file = FileNo::DATA;
        longer.then_some(Step::SetLength { file, len })
    }
}

/// The stages that follow the commits. Counts are lowered and space is given
/// back at once; but where counts are copied from behind the end, the file is
/// cut once they have been, and where refcount blocks are taken out, a cluster
/// of theirs is given back, and not counted any more, once nothing leads to it.
fn give_back(
    mut lowered: Vec<Step>,
    emptied: Emptied,
    cut: Vec<Step>,
    staged: bool,
) -> Vec<(Purpose, Vec<Step>)> {
    let mut last = emptied.uncounted;
    last.extend(cut);
    let mut rounds = emptied.rounds.into_iter();
    let first = rounds.next();
    if first.is_none() && !staged {
        lowered.extend(last);
        return vec![(Purpose::Release, lowered)];
    }
    lowered.extend(first.into_iter().flatten());
    let stages = [lowered].into_iter().chain(rounds).chain([last]);
    stages.map(|steps| (Purpose::Release, steps)).collect()
}

fn present(image: &Qcow2) -> (u64, u64) {
    let l1 = image.header.l1;
    (u64::from(l1.count), l1.offset.0)
}

fn present_table(image: &Qcow2) -> (u64, u64) {
    let table = image.header.refcount_table;
    (u64::from(table.count), table.offset.0)
}

fn header(size: u64, l1: (u64, u64), table: (u64, u64)) -> NewHeader {
    NewHeader {
        size,
        l1,
        refcount_table: table,
        bitmap_directory: None,
    }
}
