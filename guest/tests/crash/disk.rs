//! Files as bytes in a directory, and a change to them as epochs of events.
//!
//! An epoch is what happens between two durability barriers. Its events may
//! reach the disk in any order, all, some or none, and so may names.
//! Nothing here knows a format.

use super::bytes::{Bytes, Digest};
use instar_guest::plan::{NewName, SECTOR};
use instar_guest::{FileNo, Plan, Step};
use std::collections::BTreeMap;
use std::path::Path;

/// A file apart from its names.
pub type Inode = usize;

/// The files that a case may change: what they hold, and what they are called.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Files {
    inodes: Vec<Bytes>,
    names: BTreeMap<String, Inode>,
}

/// One effect on one file that reaches the disk whole or not at all, once it
/// has been [split](Event::split).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Event {
    /// Bytes at an offset; extends the file where it ends before them.
    Write {
        file: Inode,
        offset: u64,
        data: Vec<u8>,
    },
    /// The file's length. Journalled by the filesystem, so atomic.
    SetLength { file: Inode, len: u64 },
    /// A new file; one that has the name already loses it.
    Create { file: Inode, name: String },
    /// A file changes its name, and takes it from the file that has it.
    Rename { from: String, to: String },
    /// A name goes.
    Unlink { name: String },
}

/// The events between two barriers.
pub type Epoch = Vec<Event>;

impl Files {
    /// Files with these names.
    pub fn named(files: impl IntoIterator<Item = (String, Bytes)>) -> Self {
        let mut made = Self::default();
        for (name, bytes) in files {
            made.names.insert(name, made.inodes.len());
            made.inodes.push(bytes);
        }
        made
    }

    /// A name for this content, to recognise a state that was judged before.
    pub fn digest(&self) -> u64 {
        let mut digest = Digest::new();
        for (name, &file) in &self.names {
            digest.mix_bytes(name.as_bytes());
            digest.mix(self.bytes(file).digest());
        }
        digest.0
    }

    /// The names, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.names.keys().map(String::as_str)
    }

    /// The file of that name.
    pub fn find(&self, name: &str) -> Option<Inode> {
        self.names.get(name).copied()
    }

    /// The content of the file of that name.
    pub fn get(&self, name: &str) -> Result<&Bytes, String> {
        let file = self.find(name).ok_or_else(|| format!("no file {name}"))?;
        Ok(self.bytes(file))
    }

    /// A file's content.
    pub fn bytes(&self, file: Inode) -> &Bytes {
        &self.inodes[file]
    }

    /// A file's content, to change it; the file is there from now on.
    pub fn bytes_mut(&mut self, file: Inode) -> &mut Bytes {
        let count = self.inodes.len().max(file + 1);
        self.inodes.resize_with(count, Bytes::default);
        &mut self.inodes[file]
    }

    /// How many files there are and have been.
    pub fn count(&self) -> usize {
        self.inodes.len()
    }

    fn name_of(&self, file: Inode) -> Result<String, String> {
        let mut named = self.names.iter().filter(|&(_, &of)| of == file);
        let (name, _) = named.next().ok_or("a file that has no name")?;
        Ok(name.clone())
    }

    /// Performs an event.
    pub fn apply(&mut self, event: &Event) {
        match event {
            Event::Write { file, offset, data } => self.bytes_mut(*file).write(*offset, data),
            Event::SetLength { file, len } => self.bytes_mut(*file).set_len(*len),
            Event::Create { file, name } => {
                self.bytes_mut(*file);
                self.names.insert(name.clone(), *file);
            }
            Event::Rename { from, to } => {
                if let Some(file) = self.names.remove(from) {
                    self.names.insert(to.clone(), file);
                }
            }
            Event::Unlink { name } => drop(self.names.remove(name)),
        }
    }

    /// Performs every event of every epoch.
    pub fn apply_all(&mut self, epochs: &[Epoch]) {
        for event in epochs.iter().flatten() {
            self.apply(event);
        }
    }

    /// Writes the files into a directory that holds nothing else but `kept`.
    pub fn store(&self, dir: &Path, kept: &[&str]) -> Result<(), String> {
        let listing = std::fs::read_dir(dir).map_err(|error| format!("{}: {error}", dir.display()));
        for entry in listing?.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if !kept.contains(&name.as_str()) {
                std::fs::remove_file(entry.path()).map_err(|error| format!("{name}: {error}"))?;
            }
        }
        let mut all = self.names.iter();
        all.try_for_each(|(name, &file)| self.bytes(file).store(&dir.join(name)))
    }

    /// Reads all files of a directory but `kept`.
    pub fn load(dir: &Path, kept: &[&str]) -> Result<Self, String> {
        let listing = std::fs::read_dir(dir).map_err(|error| format!("{}: {error}", dir.display()));
        let mut files = BTreeMap::new();
        for entry in listing?.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if !kept.contains(&name.as_str()) {
                files.insert(name, Bytes::load(&entry.path())?);
            }
        }
        Ok(Self::named(files))
    }
}

impl Event {
    /// The event as pieces that do not cross a sector boundary.
    pub fn split(&self) -> Vec<Event> {
        let Event::Write { file, offset, data } = self else {
            return vec![self.clone()];
        };
        let mut pieces = Vec::new();
        let mut done = 0;
        while done < data.len() {
            let at = offset + done as u64;
            let len = ((SECTOR - at % SECTOR) as usize).min(data.len() - done);
            pieces.push(Event::Write {
                file: *file,
                offset: at,
                data: data[done..done + len].to_vec(),
            });
            done += len;
        }
        pieces
    }
}

/// Files by the numbers that a plan has for them.
#[derive(Clone, Debug, Default)]
pub struct Numbers {
    /// The file of each number.
    pub files: Vec<Inode>,
    /// The name of the image.
    pub image: String,
}

impl Numbers {
    /// The file of a number.
    pub fn file(&self, number: FileNo) -> Result<Inode, String> {
        let found = self.files.get(number.0 as usize).copied();
        found.ok_or_else(|| format!("no file has the number {}", number.0))
    }

    /// A name beside the image.
    fn name(&self, name: &NewName) -> String {
        match name {
            NewName::Replacement => format!("{}.instar-new", self.image),
            NewName::Plain(name) => name.clone(),
        }
    }
}

/// A plan as epochs, one per stage, against the files it is made for.
///
/// Fails where the plan relies on an order inside a stage: two steps of one
/// stage that touch the same bytes, or a copy from bytes that its stage writes.
pub fn epochs_of(plan: &Plan, start: &Files, numbers: &Numbers) -> Result<Vec<Epoch>, String> {
    let mut files = start.clone();
    let mut numbers = numbers.clone();
    let mut epochs = Vec::new();
    for (number, stage) in plan.stages.iter().enumerate() {
        let at = |clash| format!("stage {number}: {clash}");
        check_order_free(&stage.steps).map_err(at)?;
        let before = files.clone();
        let mut epoch = Epoch::new();
        for step in &stage.steps {
            let event = event_of(step, &before, &files, &mut numbers).map_err(at)?;
            event.iter().for_each(|event| files.apply(event));
            epoch.extend(event);
        }
        epochs.push(epoch);
    }
    Ok(epochs)
}

/// What a step does, if anything that can be seen: to files that are `files`
/// now, and were `before` when the stage began.
pub fn event_of(
    step: &Step,
    before: &Files,
    files: &Files,
    numbers: &mut Numbers,
) -> Result<Option<Event>, String> {
    if let Step::Create { file, ref name } = *step {
        if file.0 as usize != numbers.files.len() {
            return Err(format!("{} is not the next number", file.0));
        }
        let new = files.count();
        numbers.files.push(new);
        return created(new, name, files, numbers).map(Some);
    }
    if let Step::Remove { ref name } = *step {
        let name = numbers.name(name);
        let is_there = files.find(&name).is_some();
        return Ok(is_there.then_some(Event::Unlink { name }));
    }
    let file = numbers.file(step.file())?;
    let write = |offset, data| Event::Write { file, offset, data };
    Ok(Some(match *step {
        Step::Write {
            offset, ref data, ..
        } => write(offset, data.clone()),
        Step::Zero { offset, len, .. } | Step::Fill { offset, len, .. } => {
            write(offset, vec![0; len as usize])
        }
        Step::Copy { from, to, len, .. } => {
            if before.count() <= file || before.bytes(file).len() < from + len {
                return Err(format!(
                    "a copy of {len} bytes from {from:#x}: past the end"
                ));
            }
            write(to, before.bytes(file).read(from, len))
        }
        Step::CopyFrom {
            source,
            from,
            to,
            len,
            ..
        } => {
            let source = numbers.file(source)?;
            if before.count() <= source || before.bytes(source).len() < from + len {
                return Err(format!(
                    "a copy of {len} bytes from {from:#x} of another file: past the end"
                ));
            }
            write(to, before.bytes(source).read(from, len))
        }
        Step::Punch { offset, len, .. } => {
            let end = (offset + len).min(files.bytes(file).len());
            write(offset, vec![0; end.saturating_sub(offset) as usize])
        }
        Step::SetLength { len, .. } => Event::SetLength { file, len },
        Step::Rename { over, .. } => {
            let to = files.name_of(numbers.file(over)?)?;
            numbers.files[over.0 as usize] = file;
            let from = files.name_of(file)?;
            Event::Rename { from, to }
        }
        Step::Unlink { .. } => Event::Unlink {
            name: files.name_of(file)?,
        },
        Step::Reserve { .. } | Step::Create { .. } | Step::Remove { .. } => return Ok(None),
    }))
}

/// A new file: what an interrupted change left under the name of a replacement
/// goes, any other name has to be free.
fn created(file: Inode, name: &NewName, files: &Files, numbers: &Numbers) -> Result<Event, String> {
    let plain = numbers.name(name);
    match name {
        NewName::Plain(name) if files.find(name).is_some() => {
            Err(format!("there is a file {name} already"))
        }
        _ => Ok(Event::Create { file, name: plain }),
    }
}

/// The bytes that a step writes: file, start, end.
fn target(step: &Step) -> Option<(FileNo, u64, u64)> {
    match *step {
        Step::Write {
            file,
            offset,
            ref data,
        } => Some((file, offset, offset + data.len() as u64)),
        Step::Zero { file, offset, len }
        | Step::Fill { file, offset, len }
        | Step::Punch { file, offset, len } => Some((file, offset, offset + len)),
        Step::Copy { file, to, len, .. } | Step::CopyFrom { file, to, len, .. } => {
            Some((file, to, to + len))
        }
        _ => None,
    }
}

fn check_order_free(steps: &[Step]) -> Result<(), String> {
    let overlap =
        |a: (FileNo, u64, u64), b: (FileNo, u64, u64)| a.0 == b.0 && a.1 < b.2 && b.1 < a.2;
    for (i, step) in steps.iter().enumerate() {
        let Some(written) = target(step) else {
            continue;
        };
        for (j, other) in steps.iter().enumerate() {
            if j > i && target(other).is_some_and(|range| overlap(written, range)) {
                return Err(format!("steps {i} and {j} write the same bytes"));
            }
            let copied = match *other {
                Step::Copy {
                    file, from, len, ..
                }
                | Step::CopyFrom {
                    source: file,
                    from,
                    len,
                    ..
                } => Some((file, from, from + len)),
                _ => None,
            };
            if copied.is_some_and(|copied| overlap(written, copied)) {
                return Err(format!("step {j} copies what step {i} writes"));
            }
        }
    }
    Ok(())
}
