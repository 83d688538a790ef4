//! A sparse image of one file gets another size: its tables and its descriptor
//! are laid down behind the data, the header flips to them, they are laid down
//! where they belong, the header flips back.
//!
//! Every field that counts lies in the header's sector, so that each flip is
//! atomic. A descriptor or a table never changes while the header leads to it,
//! and the tables of a set follow their directory in order in every state, as
//! programs expect that do not look at the directory. Grains that lie where the
//! larger tables go are copied away before the first flip. After it, whatever a
//! smaller disk has lost is free, and grains from the end close the gaps.

use super::edit::Edit;
use super::format::{entry, fresh, limit};
use super::fresh::{self as new, Layout};
use super::relocate::{Placing, Tables};
use super::resize::odd_tables;
use super::slots::Moves;
use super::sparse::{Header, Sparse};
use super::survey::{Keep, Survey};
use super::{Shape, Vmdk, refuse};
use crate::engine::Host;
use crate::error::{Failure, FailureKind};
use crate::plan::{Plan, Purpose, SECTOR, Stage, Step};
use crate::prepare::Prepare;
use crate::proto::{FileNo, Preallocation};
use alloc::format;
use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;

/// Bytes of the longest directory whose image is resized: two of them are part
/// of the plan.
const MAX_DIRECTORY: u64 = 512 << 10;
/// Most grains that close gaps, at first and where their entries are spread
/// over too many sectors of the tables.
const MAX_CLOSING: [usize; 2] = [16 << 10, super::relocate::MAX_CHANGED];

const FILE: FileNo = FileNo::IMAGE;

/// Where everything goes. Places are sectors.
struct Places {
    /// The header at last.
    header: Header,
    /// Tables at last.
    layout: Layout,
    /// Tables in between, behind everything.
    staged: Layout,
    /// The descriptor in between.
    staged_descriptor: u64,
    /// Where grains that are in the way go.
    moved: u64,
    /// Where preallocated grains go.
    fresh: Range<u64>,
    /// The end of what stays: data or tables.
    data_end: u64,
    /// The end of everything in between.
    end: u64,
}

impl Vmdk {
    /// The plan that makes the disk `capacity` sectors long; with the same
    /// capacity, what brings tables and descriptor to where they belong.
    pub fn restage(
        &mut self,
        host: &mut dyn Host,
        sparse: &Sparse,
        capacity: u64,
        preallocation: Preallocation,
    ) -> Result<Plan, Failure> {
        if let Some(refusal) = odd_tables(sparse) {
            return Err(refusal);
        }
        let text = self.resized_text(capacity)?;
        let mut header = sparse.header.clone();
        header.capacity = capacity;
        header.descriptor = fresh::DESCRIPTOR;
        header.descriptor_size = header
            .descriptor_size
            .max(fresh::DESCRIPTOR_SECTORS)
            .max((text.len() as u64).div_ceil(SECTOR));
        let front = header.descriptor + header.descriptor_size;
        let layout = Layout::new(&header, front, header.redundant.is_some())?;
        layout.put(&mut header);
        if header.directory_entries() * entry::LEN > MAX_DIRECTORY {
            return Err(too_large(capacity));
        }
        let grows = capacity > sparse.header.capacity;
        let keep = Keep {
            grains: header.grains().min(sparse.header.grains()),
            front: header.overhead,
        };
        let mut survey = Survey::take(host, sparse, keep)?;
        let preallocated = match preallocation {
            Preallocation::Off => 0..0,
            // The grain that the old end cuts may have its place.
            _ => {
                let cut = sparse.header.capacity.is_multiple_of(header.grain);
                let has_place = !cut && survey.last.is_some();
                let first = sparse.header.capacity / header.grain;
                first + u64::from(has_place)..header.grains()
            }
        };
        let places = Places::new(header, layout, sparse, &survey, &preallocated)?;
        survey.slots.reach(places.data_end);
        for (at, _) in (places.moved..)
            .step_by(sparse.header.grain as usize)
            .zip(&survey.moved)
        {
            survey.slots.take(at);
        }
        let mut job = Job {
            sparse,
            survey: &survey,
            places: &places,
            preallocation,
            preallocated,
            grows,
            text: &text,
        };
        for most in MAX_CLOSING {
            let moves = match grows {
                true => None,
                false => survey.slots.close(most),
            };
            let moves = moves.unwrap_or_else(|| Moves {
                end: places.data_end,
                ..Moves::default()
            });
            if let Some(stages) = job.stages(host, &moves, &self.shape)? {
                return Ok(Plan { stages });
            }
        }
        Err(too_large(capacity))
    }

    /// The descriptor of the disk with another size.
    fn resized_text(&mut self, sectors: u64) -> Result<Vec<u8>, Failure> {
        let [line] = self.descriptor.extents.as_slice() else {
            return Err(refuse::damaged(format!(
                "the descriptor in the image has {} extents instead of one",
                self.descriptor.extents.len()
            )));
        };
        let mut edit = Edit::new(&self.descriptor);
        edit.set_cid(new::content_id(&mut self.chance));
        edit.set_sectors(line, sectors);
        edit.set_geometry(sectors);
        Ok(edit.finish())
    }
}

impl Places {
    fn new(
        header: Header,
        layout: Layout,
        sparse: &Sparse,
        survey: &Survey,
        preallocated: &Range<u64>,
    ) -> Result<Self, Failure> {
        let grain = header.grain;
        let file_end = sparse.file_len.div_ceil(SECTOR);
        let kept = survey.data_end.max(header.overhead).next_multiple_of(grain);
        let fresh_len = (preallocated.end - preallocated.start) * grain;
        let moved_len = survey.moved.len() as u64 * grain;
        let (moved, data_end) = match moved_len + fresh_len {
            0 => (kept, kept),
            // Tables in front of the data end with it; staged ones do not.
            len => {
                // Up to the first flip the old disk is whole, with the grains
                // that the new one does not have.
                let alive = match header.capacity < sparse.header.capacity {
                    true => file_end.max(survey.tables_end),
                    false => survey.tables_end,
                };
                let moved = kept.max(alive.next_multiple_of(grain));
                (moved, moved + len)
            }
        };
        let staging = data_end
            .max(file_end)
            .max(survey.tables_end)
            .next_multiple_of(grain);
        if staging >= limit::MAX_SECTORS {
            return Err(too_large(header.capacity));
        }
        let staged = Layout::new(&header, staging, header.redundant.is_some())?;
        Ok(Self {
            end: staged.end + header.descriptor_size,
            staged_descriptor: staged.end,
            moved,
            fresh: moved + moved_len..moved + moved_len + fresh_len,
            data_end,
            staged,
            layout,
            header,
        })
    }
}

/// A change of size that is being planned.
struct Job<'a> {
    sparse: &'a Sparse,
    survey: &'a Survey,
    places: &'a Places,
    preallocation: Preallocation,
    /// Numbers of the grains that get a place.
    preallocated: Range<u64>,
    grows: bool,
    text: &'a [u8],
}

impl Job<'_> {
    /// The stages; `None` where the moves change too much of the tables.
    fn stages(
        &mut self,
        host: &mut dyn Host,
        moves: &Moves,
        shape: &Shape,
    ) -> Result<Option<Vec<Stage>>, Failure> {
        let placing = Placing {
            keep: self.places.header.grains().min(self.sparse.header.grains()),
            moved: &self.survey.moved,
            moved_to: self.places.moved,
            preallocated: self.preallocated.clone(),
            fresh: self.places.fresh.start,
            moves,
        };
        let mut prepare = Prepare::new(host);
        prepare.fresh(Step::SetLength {
            file: FILE,
            len: self.places.end * SECTOR,
        })?;
        let Some(tables) = placing.lay_down(
            &mut prepare,
            self.sparse,
            &self.places.header,
            &self.places.staged,
        )?
        else {
            return Ok(None);
        };
        prepare.fresh_slice(self.places.staged_descriptor * SECTOR, self.text)?;
        self.clear_the_way(&mut prepare);
        self.reserve(&mut prepare, &tables)?;
        let mut staged = self.places.header.clone();
        self.places.staged.put(&mut staged);
        staged.descriptor = self.places.staged_descriptor;
        staged.overhead = self.sparse.header.overhead;
        let mut stages = vec![
            stage(Purpose::Prepare, prepare.finish()),
            flip(shape, &staged)?,
            stage(Purpose::Release, self.canonical(&tables, moves)?),
            flip(shape, &self.places.header)?,
        ];
        let mut last = vec![Step::SetLength {
            file: FILE,
            len: self.end(moves) * SECTOR,
        }];
        if self.preallocation == Preallocation::Full
            && let Some(fill) = self.fresh_bytes()
        {
            last.push(Step::Fill {
                file: FILE,
                offset: fill.start,
                len: fill.end - fill.start,
            });
        }
        stages.push(stage(Purpose::Release, last));
        Ok(Some(stages))
    }

    /// The sector at which the file ends at last.
    fn end(&self, moves: &Moves) -> u64 {
        match self.grows {
            true => self.places.data_end,
            false => moves.end,
        }
    }

    /// Host bytes of the preallocated grains, if there are any.
    fn fresh_bytes(&self) -> Option<Range<u64>> {
        let range = &self.places.fresh;
        (!range.is_empty()).then_some(range.start * SECTOR..range.end * SECTOR)
    }

    /// What lies behind the old end in the last grain must read as zeroes, and
    /// grains in the way are copied away.
    fn clear_the_way(&self, prepare: &mut Prepare<'_>) {
        let old = &self.sparse.header;
        let tail = old.capacity % old.grain;
        let last = old
            .grains()
            .checked_sub(1)
            .filter(|_| self.grows && tail > 0);
        let mut place = self.places.moved;
        let mut runs: Vec<(u64, u64, u64)> = Vec::new();
        for &(number, sector) in &self.survey.moved {
            let file_end = self.sparse.file_len.div_ceil(SECTOR);
            let there = old.grain.min(file_end - sector);
            let len = match last {
                Some(last) if last == number => there.min(tail),
                _ => there,
            };
            match runs.last_mut() {
                Some((from, to, count)) if *from + *count == sector && *to + *count == place => {
                    *count += len;
                }
                _ => runs.push((sector, place, len)),
            }
            let rest = (place + len) * SECTOR..(place + old.grain) * SECTOR;
            self.zero_inside(prepare, rest);
            place += old.grain;
        }
        for (from, to, len) in runs {
            prepare.inside(copy(from * SECTOR, to * SECTOR, len * SECTOR));
        }
        if let Some(sector) = self.survey.last
            && last.is_some()
            && sector >= self.places.header.overhead
        {
            let rest = (sector + tail) * SECTOR..(sector + old.grain) * SECTOR;
            self.zero_inside(prepare, rest);
        }
        if let Some(range) = self.fresh_bytes() {
            self.zero_inside(prepare, range);
        }
    }

    /// Zeroes what of a range lies inside the old file; behind it all is zero.
    fn zero_inside(&self, prepare: &mut Prepare<'_>, range: Range<u64>) {
        let end = range.end.min(self.sparse.file_len);
        if range.start < end {
            prepare.inside(Step::Zero {
                file: FILE,
                offset: range.start,
                len: end - range.start,
            });
        }
    }

    /// Disk space for what is written after the first flip, and for
    /// preallocated data.
    fn reserve(&self, prepare: &mut Prepare<'_>, tables: &Tables) -> Result<(), Failure> {
        let mut ranges = vec![self.descriptor_bytes()];
        for (directory, tables_at) in self.sets(&self.places.layout) {
            ranges.push(directory * SECTOR..tables_at * SECTOR);
            let runs = tables.runs.iter();
            ranges.extend(runs.map(|run| shifted(run, tables_at * SECTOR)));
        }
        if matches!(
            self.preallocation,
            Preallocation::Falloc | Preallocation::Full
        ) {
            ranges.extend(self.fresh_bytes());
        }
        for range in ranges.into_iter().filter(|range| !range.is_empty()) {
            prepare.inside(Step::Reserve {
                file: FILE,
                offset: range.start,
                len: range.end - range.start,
            });
        }
        Ok(())
    }

    fn descriptor_bytes(&self) -> Range<u64> {
        let header = &self.places.header;
        let start = header.descriptor * SECTOR;
        start..start + header.descriptor_size * SECTOR
    }

    /// The sets of a layout: the sector of the directory, and of its tables.
    fn sets(&self, layout: &Layout) -> Vec<(u64, u64)> {
        [layout.redundant, Some(layout.directory)]
            .into_iter()
            .flatten()
            .map(|sector| (sector, sector + layout.directory_sectors))
            .collect()
    }

    /// Everything to where it belongs, while the header leads to the copies
    /// behind the data.
    fn canonical(&self, tables: &Tables, moves: &Moves) -> Result<Vec<Step>, Failure> {
        let header = &self.places.header;
        let mut text = self.text.to_vec();
        text.resize((header.descriptor_size * SECTOR) as usize, 0);
        let mut steps = vec![write(header.descriptor * SECTOR, text)];
        let len = header.directory_entries() * header.table_len();
        let staged = self.sets(&self.places.staged);
        for ((directory, to), (_, from)) in self.sets(&self.places.layout).into_iter().zip(staged) {
            let sectors = self.places.layout.directory_sectors;
            let mut data = vec![0; (sectors * SECTOR) as usize];
            let used = (header.directory_entries() * entry::LEN) as usize;
            new::fill_directory(header, to, 0, data.get_mut(..used).unwrap_or_default());
            steps.push(write(directory * SECTOR, data));
            tables.put(&mut steps, from * SECTOR, to * SECTOR, len);
        }
        punch(
            &mut steps,
            self.places.layout.end * SECTOR..self.places.layout.overhead * SECTOR,
        );
        if !self.grows {
            self.close_gaps(&mut steps, moves);
        }
        Ok(steps)
    }

    /// Moves grains from the end into gaps, gives other gaps back, and zeroes
    /// what lies behind the end in the last grain.
    fn close_gaps(&self, steps: &mut Vec<Step>, moves: &Moves) {
        let header = &self.places.header;
        let tail = header.capacity % header.grain;
        let last = self.survey.last.filter(|_| tail > 0).map(|sector| {
            let nth = self
                .survey
                .moved
                .iter()
                .position(|&(_, from)| from == sector);
            nth.map_or(sector, |nth| self.places.moved + nth as u64 * header.grain)
        });
        for &(from, to) in &moves.list {
            let len = match last {
                Some(last) if last == from => tail,
                _ => header.grain,
            };
            match steps.last_mut() {
                Some(Step::Copy {
                    from: last_from,
                    to: last_to,
                    len: count,
                    ..
                }) if *last_from + *count == from * SECTOR
                    && *last_to + *count == to * SECTOR
                    && *count % header.grain_len() == 0 =>
                {
                    *count += len * SECTOR;
                }
                _ => steps.push(copy(from * SECTOR, to * SECTOR, len * SECTOR)),
            }
        }
        for range in &moves.freed {
            punch(steps, range.start * SECTOR..range.end * SECTOR);
        }
        if let Some(last) = last {
            let at = moves.target(last);
            steps.push(Step::Zero {
                file: FILE,
                offset: (at + tail) * SECTOR,
                len: (header.grain - tail) * SECTOR,
            });
        }
    }
}

fn stage(purpose: Purpose, steps: Vec<Step>) -> Stage {
    Stage { purpose, steps }
}

/// The write of the header's sector with other fields.
fn flip(shape: &Shape, header: &Header) -> Result<Stage, Failure> {
    let Shape::Embedded { first_sector } = shape else {
        return Err(Failure::new(
            FailureKind::Internal,
            "an image of one file has no header",
        ));
    };
    let mut sector = first_sector.clone();
    header.put(&mut sector)?;
    Ok(stage(Purpose::Commit, vec![write(0, sector)]))
}

fn write(offset: u64, data: Vec<u8>) -> Step {
    Step::Write {
        file: FILE,
        offset,
        data,
    }
}

/// A copy inside the image's file.
pub fn copy(from: u64, to: u64, len: u64) -> Step {
    Step::Copy {
        file: FILE,
        from,
        to,
        len,
    }
}

/// Gives a range of the image's file back, where there is one.
pub fn punch(steps: &mut Vec<Step>, range: Range<u64>) {
    if !range.is_empty() {
        steps.push(Step::Punch {
            file: FILE,
            offset: range.start,
            len: range.end - range.start,
        });
    }
}

fn shifted(range: &Range<u64>, by: u64) -> Range<u64> {
    range.start + by..range.end + by
}

fn too_large(capacity: u64) -> Failure {
    Failure::new(
        FailureKind::TooLarge,
        format!(
            "the grain tables of a disk of {capacity} sectors, or its data, do not fit into a \
             sparse VMDK of this grain size; convert the image with `qemu-img convert -O vmdk`"
        ),
    )
}
