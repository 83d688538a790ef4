//! Images of several files get another size: the extents that are added or made
//! longer come first, then a new descriptor takes the old one's name, and only
//! then what it no longer names is cut off or removed.
//!
//! A flat extent is as long as the descriptor says, so that a longer file changes
//! nothing. A sparse extent has its length in its header, too, and therefore
//! never changes: sparse images grow by extents, and where they are to end inside
//! one, a copy of its beginning takes its place. A longer copy takes the place of
//! one that ends inside a grain, as extents begin with a grain.

use super::descriptor::{ExtentLine, ExtentType};
use super::edit::Edit;
use super::format::limit;
use super::fresh::{self, Fresh};
use super::leftover;
use super::numbered::Numbered;
use super::pieces::Piece;
use super::refuse::{damaged, unsupported};
use super::sparse::{Header, Sparse};
use super::{Body, Shape, Vmdk};
use crate::engine::Host;
use crate::error::{Failure, FailureKind};
use crate::plan::{NewName, Plan, Purpose, SECTOR, Stage, Step};
use crate::proto::{FileNo, Preallocation};
use crate::resize::{Direction, Wish};
use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;

/// A change of the files that is being planned.
struct Job {
    /// Files that come into being.
    create: Vec<Step>,
    /// What is written into new files, and behind the disk's end in others.
    fill: Vec<Step>,
    /// What is copied from one new file into others.
    copies: Vec<Step>,
    /// What is done after the commit.
    after: Vec<Step>,
    /// Names of the files that are removed then.
    removed: Vec<String>,
    /// The number of the next new file.
    next: u32,
    preallocation: Preallocation,
}

/// What the extents have in common.
struct Kind {
    /// Sectors that an extent has at most, where there is a bound.
    split: Option<u64>,
    /// Number of the image's other files.
    files: u32,
}

impl Vmdk {
    /// The plan that changes the size of an image of several files.
    pub fn resize_files(
        &mut self,
        host: &mut dyn Host,
        wish: &Wish,
        direction: Direction,
    ) -> Result<Plan, Failure> {
        let kind = self.kind()?;
        let mut job = Job {
            create: Vec::new(),
            fill: Vec::new(),
            copies: Vec::new(),
            after: Vec::new(),
            removed: Vec::new(),
            next: kind.files + 1,
            preallocation: wish.preallocation,
        };
        let replacement = job.create(NewName::Replacement);
        let cid = fresh::content_id(&mut self.chance);
        let mut edit = Edit::new(&self.descriptor);
        edit.set_cid(cid);
        edit.set_geometry(wish.size / SECTOR);
        match direction {
            Direction::Same => return self.trim_files(),
            Direction::Grow => self.grow(host, &kind, wish.size, &mut job, &mut edit)?,
            Direction::Shrink => self.shrink(host, wish.size, &mut job, &mut edit)?,
        }
        let mut text = edit.finish();
        let kept = leftover::append(&mut text, &job.removed)?;
        job.fill.push(Step::Write {
            file: replacement,
            offset: 0,
            data: text,
        });
        let note = self.note_made(&job);
        job.check_descriptors(note.as_ref())?;
        Ok(job.plan(replacement, note, kept))
    }

    /// The lines about the files that are made.
    fn note_made(&self, job: &Job) -> Option<Step> {
        let Shape::Descriptor { tail, .. } = &self.shape else {
            return None;
        };
        let made = job.create.iter().filter_map(|step| match step {
            Step::Create {
                name: NewName::Plain(name),
                ..
            } => Some(name.as_str()),
            _ => None,
        });
        tail.add(made, &self.descriptor.extents)
    }

    /// What the extents have in common; refuses those that have not.
    fn kind(&self) -> Result<Kind, Failure> {
        let lines = &self.descriptor.extents;
        let Shape::Descriptor { files, .. } = &self.shape else {
            return Err(damaged("the image has no descriptor of its own"));
        };
        let Some(first) = lines.first() else {
            return Err(unsupported(
                "the image has no extents whose kind and names a new one could follow",
            ));
        };
        if lines.iter().any(|line| line.kind != first.kind) || first.kind == ExtentType::Zero {
            return Err(unsupported("the extents of the image are not of one kind"));
        }
        if *files != lines.len() {
            return Err(unsupported("two extents of the image lie in one file"));
        }
        for (line, extent) in lines.iter().zip(&self.extents) {
            if line.sectors * SECTOR != extent.len {
                return Err(damaged(format!(
                    "extent '{}': the descriptor says {} sectors, the extent's header {}",
                    line.name,
                    line.sectors,
                    extent.len / SECTOR
                )));
            }
        }
        let is_split = self.descriptor.create_type.starts_with("twoGbMaxExtent");
        let largest = lines.iter().map(|line| line.sectors).max().unwrap_or(0);
        let split = match lines.len() {
            1 => limit::SPLIT_SECTORS.max(largest),
            _ => largest,
        };
        // Sparse extents do not get longer: a long one sets no measure, and none
        // does that ends inside a grain.
        let split = match self.extents.last().map(|extent| &extent.body) {
            Some(Body::Sparse(sparse)) => split
                .min(limit::SPLIT_SECTORS)
                .next_multiple_of(sparse.header.grain),
            _ => split,
        };
        Ok(Kind {
            split: is_split.then_some(split),
            files: *files as u32,
        })
    }

    fn grow(
        &self,
        host: &mut dyn Host,
        kind: &Kind,
        size: u64,
        job: &mut Job,
        edit: &mut Edit<'_>,
    ) -> Result<(), Failure> {
        let (Some(line), Some(extent)) = (self.descriptor.extents.last(), self.extents.last())
        else {
            return Ok(());
        };
        let mut rest = (size - self.size()) / SECTOR;
        if let &Body::Flat {
            file, at, file_len, ..
        } = &extent.body
        {
            let room = kind.split.map_or(u64::MAX, |split| split - line.sectors);
            let added = rest.min(room);
            if added > 0 {
                let old = at + extent.len;
                // Too long a file is refused there.
                job.lengthen(file, file_len, old, old.saturating_add(added * SECTOR))?;
                edit.set_sectors(line, line.sectors + added);
                rest -= added;
            }
        }
        let split = kind.split.unwrap_or(limit::SPLIT_SECTORS);
        let mut lines = Vec::new();
        if let Body::Sparse(sparse) = &extent.body
            && !line.sectors.is_multiple_of(sparse.header.grain)
        {
            let most = split.max(line.sectors.next_multiple_of(sparse.header.grain));
            let sectors = (line.sectors + rest).min(most);
            lines.push(self.replace(host, sparse, sectors, job)?);
            edit.remove(line);
            job.remove(line, sparse.file);
            rest -= sectors - line.sectors;
        }
        let count = rest.div_ceil(split);
        if self.extents.len() as u64 + count > limit::MAX_EXTENTS as u64 {
            return Err(Failure::new(
                FailureKind::TooLarge,
                format!(
                    "the image would have more than {} extents; use the subformat monolithicFlat",
                    limit::MAX_EXTENTS
                ),
            ));
        }
        let mut first = None;
        let begin = 1 + lines.len() as u64;
        for nth in begin..begin + count {
            let name = next_name(line, nth)?;
            let sectors = rest.min(split);
            lines.push(fresh::extent_line(line.kind, &name, sectors));
            let file = job.create(NewName::Plain(name));
            match &extent.body {
                Body::Sparse(sparse) => {
                    job.extent(&mut first, file, sectors, &sparse.header)?;
                }
                _ => job.lengthen(file, 0, 0, sectors * SECTOR)?,
            }
            rest -= sectors;
        }
        edit.append(&lines)
    }

    fn shrink(
        &self,
        host: &mut dyn Host,
        size: u64,
        job: &mut Job,
        edit: &mut Edit<'_>,
    ) -> Result<(), Failure> {
        for (line, extent) in self.descriptor.extents.iter().zip(&self.extents) {
            if extent.end() <= size {
                continue;
            }
            let left = size.saturating_sub(extent.start);
            let file = match &extent.body {
                Body::Flat { file, .. } => *file,
                Body::Sparse(sparse) => sparse.file,
                Body::Zero => continue,
            };
            if left == 0 || matches!(extent.body, Body::Sparse(_)) {
                edit.remove(line);
                job.remove(line, file);
            }
            match &extent.body {
                _ if left == 0 => {}
                Body::Flat { at, file_len, .. } => {
                    edit.set_sectors(line, left / SECTOR);
                    let end = at + left;
                    if *file_len > end {
                        job.after.push(Step::SetLength { file, len: end });
                    }
                }
                Body::Sparse(sparse) => {
                    let line = self.replace(host, sparse, left / SECTOR, job)?;
                    edit.append(&[line])?;
                }
                Body::Zero => {}
            }
        }
        Ok(())
    }

    /// A copy of a sparse extent with another length, in a file of its own; the
    /// line for it.
    fn replace(
        &self,
        host: &mut dyn Host,
        sparse: &Sparse,
        sectors: u64,
        job: &mut Job,
    ) -> Result<String, Failure> {
        let Some(last) = self.descriptor.extents.last() else {
            return Err(damaged("the image has no extents"));
        };
        let name = next_name(last, 1)?;
        let line = fresh::extent_line(last.kind, &name, sectors);
        let file = job.create(NewName::Plain(name));
        let (mut piece, copies) = Piece::copied(host, sparse, sectors, file)?;
        let kept = piece.data().end;
        if job.preallocation != Preallocation::Off {
            piece.map_behind(sparse.header.capacity)?;
        }
        job.fill.push(piece.length(file));
        job.fill.extend(piece.steps(file)?);
        job.fill.extend(copies);
        job.allocate(file, kept..piece.data().end);
        Ok(line)
    }

    /// What a finished shrink would still have done: a flat file ends with its
    /// extent.
    fn trim_files(&self) -> Result<Plan, Failure> {
        let Some(extent) = self.extents.last() else {
            return Ok(Plan::default());
        };
        match extent.body {
            Body::Flat {
                file, at, file_len, ..
            } if file_len > at + extent.len => Ok(Plan {
                stages: vec![stage(
                    Purpose::Commit,
                    vec![Step::SetLength {
                        file,
                        len: at + extent.len,
                    }],
                )],
            }),
            _ => Ok(Plan::default()),
        }
    }
}

impl Job {
    /// A new file; its number.
    fn create(&mut self, name: NewName) -> FileNo {
        let file = FileNo(self.next);
        self.next += 1;
        self.create.push(Step::Create { file, name });
        file
    }

    /// The file of an extent goes once nothing refers to it.
    fn remove(&mut self, line: &ExtentLine, file: FileNo) {
        self.after.push(Step::Unlink { file });
        self.removed.push(line.name.clone());
    }

    /// Refuses descriptors that nobody could read.
    fn check_descriptors(&self, note: Option<&Step>) -> Result<(), Failure> {
        let too_long = |step: &Step| match step {
            Step::Write { offset, data, .. } => offset + data.len() as u64 > limit::MAX_DESCRIPTOR,
            _ => false,
        };
        match self.fill.last().into_iter().chain(note).any(too_long) {
            false => Ok(()),
            true => Err(Failure::new(
                FailureKind::TooLarge,
                "the descriptor would be longer than 1 MiB; use the subformat monolithicFlat",
            )),
        }
    }

    /// A flat file gets longer, from the end of its extent to another end; what
    /// lies in between must read as zeroes.
    fn lengthen(&mut self, file: FileNo, len: u64, old: u64, new: u64) -> Result<(), Failure> {
        if i64::try_from(new).is_err() {
            return Err(Failure::new(
                FailureKind::TooLarge,
                format!("a file cannot be {new} bytes long"),
            ));
        }
        let steps = &mut self.fill;
        if len > old {
            steps.push(Step::Zero {
                file,
                offset: old,
                len: len.min(new) - old,
            });
        }
        if len != new {
            steps.push(Step::SetLength { file, len: new });
        }
        let (offset, len) = (old, new - old);
        if matches!(
            self.preallocation,
            Preallocation::Falloc | Preallocation::Full
        ) {
            steps.push(Step::Reserve { file, offset, len });
        }
        if self.preallocation == Preallocation::Full {
            self.after.push(Step::Fill { file, offset, len });
        }
        Ok(())
    }

    /// A new sparse extent, like another. Those of one length are the same:
    /// `first` is the file of one, with its sectors.
    fn extent(
        &mut self,
        first: &mut Option<(FileNo, u64)>,
        file: FileNo,
        sectors: u64,
        model: &Header,
    ) -> Result<(), Failure> {
        if self.preallocation == Preallocation::Off {
            self.fill.extend(Fresh::like(sectors, model)?.steps(file)?);
            return Ok(());
        }
        let piece = Piece::mapped(sectors, model)?;
        self.fill.push(piece.length(file));
        match *first {
            Some((source, same)) if same == sectors => self.copies.push(Step::CopyFrom {
                file,
                source,
                from: 0,
                to: 0,
                len: piece.front(),
            }),
            _ => {
                self.fill.extend(piece.steps(file)?);
                *first = Some((file, sectors));
            }
        }
        self.allocate(file, piece.data());
        Ok(())
    }

    /// Disk space for a range of a new file, as far as that is asked for.
    fn allocate(&mut self, file: FileNo, range: Range<u64>) {
        let (offset, len) = (range.start, range.end - range.start);
        let wanted = self.preallocation;
        if len > 0 && matches!(wanted, Preallocation::Falloc | Preallocation::Full) {
            self.fill.push(Step::Reserve { file, offset, len });
        }
        if len > 0 && wanted == Preallocation::Full {
            self.fill.push(Step::Fill { file, offset, len });
        }
    }

    /// The new descriptor's file comes first, and with it `note`, by which
    /// whoever finds the other files knows that they belong to nothing. Once
    /// those that go are gone, the descriptor is cut to `kept` bytes, where it
    /// names them.
    fn plan(mut self, replacement: FileNo, note: Option<Step>, kept: Option<u64>) -> Plan {
        let mut first = Vec::new();
        if self.create.len() > 1 {
            let others = self.create.split_off(1);
            first = core::mem::replace(&mut self.create, others);
            first.extend(note);
        }
        self.create.append(&mut self.fill);
        let rename = Step::Rename {
            file: replacement,
            over: FileNo::IMAGE,
        };
        let file = replacement;
        let cut = kept.map(|len| Step::SetLength { file, len });
        let mut stages = vec![
            stage(Purpose::Prepare, first),
            stage(Purpose::Prepare, self.create),
            stage(Purpose::Prepare, self.copies),
            stage(Purpose::Commit, vec![rename]),
            stage(Purpose::Release, self.after),
            stage(Purpose::Release, cut.into_iter().collect()),
        ];
        stages.retain(|stage| !stage.steps.is_empty());
        Plan { stages }
    }
}

fn stage(purpose: Purpose, steps: Vec<Step>) -> Stage {
    Stage { purpose, steps }
}

/// The name of the `nth` extent behind the last one, whose name ends with a
/// number.
fn next_name(last: &ExtentLine, nth: u64) -> Result<String, Failure> {
    let name = Numbered::read(&last.name).and_then(|name| name.nth(nth));
    name.ok_or_else(|| {
        unsupported(format!(
            "the name of the last extent, '{}', does not end with a number that could go on",
            last.name
        ))
    })
}
