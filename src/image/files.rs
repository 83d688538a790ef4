//! The files of one image by number, what is known of each, and what has been
//! done to them.

use super::effects::{DiskEffects, Effects, PlanNames, WrapEffects};
use super::handles::{Handle, Handles};
use super::names::Names;
use super::{lock, volatile};
use instar_guest::FileNo;
use instar_guest::plan::Step;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use vm_memory::VolatileSlice;

/// How often what has been done.
#[derive(Default)]
pub(crate) struct Tally {
    pub reads: AtomicU64,
    pub writes: AtomicU64,
    pub fdatasyncs: AtomicU64,
}

/// The files of one image.
pub(crate) struct FileTable {
    handles: Handles,
    names: PlanNames,
    /// Whether names changed that are not durable.
    names_changed: AtomicBool,
    effects: Box<dyn Effects>,
    /// Whether the files are locked, and so to be unlocked.
    pub locked: bool,
    /// One sync at a time. The kernel tells one caller alone that a change could
    /// not be made durable; whoever syncs next must learn it from `failed`.
    syncing: Mutex<()>,
    /// The errno of a sync that failed, or 0.
    failed: AtomicI32,
    pub tally: Tally,
}

impl FileTable {
    /// The table of an image that so far is one file.
    pub fn new(file: File, writable: bool, wrap: Option<&WrapEffects>) -> io::Result<Self> {
        let handles = Handles::default();
        handles.push(Arc::new(Handle::new(file, writable)?));
        let names = PlanNames::default();
        let real = Box::new(DiskEffects {
            handles: handles.clone(),
            names: Arc::clone(&names),
        });
        Ok(Self {
            handles,
            names,
            names_changed: AtomicBool::new(false),
            effects: match wrap {
                Some(wrap) => wrap(real),
                None => real,
            },
            locked: false,
            syncing: Mutex::default(),
            failed: AtomicI32::new(0),
            tally: Tally::default(),
        })
    }

    /// Adds the next files.
    pub fn add(&self, files: Vec<Arc<Handle>>) {
        files.into_iter().for_each(|file| self.handles.push(file));
    }

    /// All open files, in the order of their numbers.
    pub fn handles(&self) -> Vec<Arc<Handle>> {
        self.handles.all()
    }

    /// Numbers the files anew. Those that are not among them lose their locks.
    pub fn renumber(&self, files: Vec<Arc<Handle>>) {
        let kept = files.clone();
        let gone = self.handles.set(files);
        let is_gone = |file: &&Arc<Handle>| !kept.iter().any(|kept| Arc::ptr_eq(kept, file));
        for handle in gone.iter().filter(is_gone).filter(|_| self.locked) {
            // Closing it, which follows, unlocks as well.
            let _ = lock::release(&handle.file);
        }
    }

    /// From now on names may change: these.
    pub fn allow_names(&self, names: Names) {
        *self.names.lock().unwrap_or_else(PoisonError::into_inner) = Some(names);
    }

    /// From now on no name changes. What a failed plan left without a barrier
    /// are names that nothing refers to: that they last does not matter.
    pub fn forbid_names(&self) {
        self.settle_names();
        *self.names.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    fn settle_names(&self) -> bool {
        let changed = self.names_changed.swap(false, Ordering::AcqRel);
        !changed || self.effects.sync_names().is_ok()
    }

    /// Empties the files that a plan for a new image found and emptied before;
    /// answers their names.
    pub fn empty_again(&self) -> Vec<String> {
        let names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        names.as_ref().map_or_else(Vec::new, Names::empty_again)
    }

    /// Removes the files from the `old`th on, which a plan made that has failed.
    /// Answers whether they are gone: the failure of the plan is the one to tell,
    /// and what stays is space under a name that nothing refers to.
    pub fn remove_made(&self, old: usize) -> bool {
        let files = self.handles.all();
        let mut gone = true;
        for file in self.numbers().skip(old) {
            gone &= match self.effects.unlink(file) {
                Ok(()) => true,
                Err(error) => error.kind() == io::ErrorKind::NotFound,
            };
        }
        gone &= self.settle_names();
        self.renumber(files.into_iter().take(old).collect());
        gone
    }

    /// The open file of a number.
    pub fn file(&self, file: FileNo) -> io::Result<Arc<Handle>> {
        self.get(file).ok_or(io::ErrorKind::NotFound.into())
    }

    fn get(&self, file: FileNo) -> Option<Arc<Handle>> {
        self.handles.get(file)
    }

    /// The numbers of all files.
    pub fn numbers(&self) -> impl Iterator<Item = FileNo> + use<> {
        (0..self.handles.count() as u32).map(FileNo)
    }

    /// Length in bytes; `None` for a file that the image does not have.
    pub fn len(&self, file: FileNo) -> Option<u64> {
        Some(self.get(file)?.len.load(Ordering::Acquire))
    }

    /// The lengths of all files, by number.
    pub fn lens(&self) -> Vec<u64> {
        let files = self.handles.all();
        let len = |file: &Arc<Handle>| file.len.load(Ordering::Acquire);
        files.iter().map(len).collect()
    }

    /// Whether the file may be changed.
    pub fn writable(&self, file: FileNo) -> bool {
        self.get(file).is_some_and(|handle| handle.writable)
    }

    /// Disk space that all files take.
    pub fn allocated(&self) -> io::Result<u64> {
        let files = self.handles.all();
        let blocks = |file: &Arc<Handle>| Ok(file.file.metadata()?.blocks() * 512);
        files.iter().map(blocks).sum()
    }

    /// Fills `buf`; what lies past the end of the file is zero.
    pub fn read(&self, file: FileNo, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let handle = self.file(file)?;
        self.tally.reads.fetch_add(1, Ordering::Relaxed);
        let mut done = 0;
        while done < buf.len() {
            match handle.file.read_at(&mut buf[done..], offset + done as u64) {
                Ok(0) => {
                    buf[done..].fill(0);
                    break;
                }
                Ok(n) => done += n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// The same into guest memory.
    pub fn read_volatile(
        &self,
        file: FileNo,
        offset: u64,
        dst: VolatileSlice<'_>,
    ) -> io::Result<()> {
        self.tally.reads.fetch_add(1, Ordering::Relaxed);
        volatile::read_at(&self.file(file)?.file, offset, dst)
    }

    /// Writes all of `data`.
    pub fn write(&self, file: FileNo, offset: u64, data: &[u8]) -> io::Result<()> {
        let end = offset + data.len() as u64;
        self.change(file, Some(end), |effects| effects.write(file, offset, data))
    }

    /// Sets the length.
    pub fn set_len(&self, file: FileNo, len: u64) -> io::Result<()> {
        self.change(file, None, |effects| effects.set_len(file, len))?;
        self.file(file)?.len.store(len, Ordering::Release);
        Ok(())
    }

    /// Allocates disk space, length and content unchanged.
    pub fn reserve(&self, file: FileNo, offset: u64, len: u64) -> io::Result<()> {
        self.change(file, None, |effects| effects.reserve(file, offset, len))
    }

    /// Executes one step of a plan that has been checked.
    pub fn step(&self, step: &Step) -> io::Result<()> {
        match *step {
            Step::Write {
                offset,
                ref data,
                file,
            } => self.write(file, offset, data),
            Step::Zero { file, offset, len } => self.change(file, Some(offset + len), |effects| {
                effects.zero(file, offset, len)
            }),
            Step::Fill { file, offset, len } => self.change(file, Some(offset + len), |effects| {
                effects.fill(file, offset, len)
            }),
            Step::Copy {
                file,
                from,
                to,
                len,
            } => self.change(file, Some(to + len), |effects| {
                effects.copy(file, from, to, len)
            }),
            Step::CopyFrom {
                file,
                source,
                from,
                to,
                len,
            } => self.change(file, Some(to + len), |effects| {
                effects.copy_from(file, source, from, to, len)
            }),
            Step::Reserve { file, offset, len } => self.reserve(file, offset, len),
            Step::SetLength { file, len } => self.set_len(file, len),
            Step::Punch { file, offset, len } => {
                self.change(file, None, |effects| effects.punch(file, offset, len))
            }
            Step::Create { file, ref name } => {
                self.change_names(|effects| effects.create(file, name))
            }
            Step::Rename { file, over } => self.change_names(|effects| effects.rename(file, over)),
            Step::Unlink { file } => self.change_names(|effects| effects.unlink(file)),
            Step::Remove { ref name } => self.change_names(|effects| effects.remove(name)),
        }
    }

    fn change_names(&self, act: impl FnOnce(&dyn Effects) -> io::Result<()>) -> io::Result<()> {
        self.tally.writes.fetch_add(1, Ordering::Relaxed);
        self.names_changed.store(true, Ordering::Release);
        act(self.effects.as_ref())
    }

    /// Performs a change that may extend the file up to `end`, and takes note
    /// of it, also where it fails half way.
    fn change(
        &self,
        file: FileNo,
        end: Option<u64>,
        act: impl FnOnce(&dyn Effects) -> io::Result<()>,
    ) -> io::Result<()> {
        let handle = self.file(file)?;
        if !handle.writable {
            return Err(io::Error::from_raw_os_error(libc::EROFS));
        }
        self.tally.writes.fetch_add(1, Ordering::Relaxed);
        let done = act(self.effects.as_ref());
        handle.changes.fetch_add(1, Ordering::AcqRel);
        match (&done, end) {
            (Ok(()), Some(end)) => {
                handle.len.fetch_max(end, Ordering::AcqRel);
            }
            (Ok(()), None) => {}
            // How far it got is unknown; a failing fstat leaves the old length.
            (Err(_), _) => {
                if let Ok(metadata) = handle.file.metadata() {
                    handle.len.fetch_max(metadata.len(), Ordering::AcqRel);
                }
            }
        }
        done
    }

    /// Whether anything is not durable.
    pub fn is_unsynced(&self) -> bool {
        let unsynced = self.handles.all().iter().any(|file| file.is_unsynced());
        unsynced || self.names_changed.load(Ordering::Acquire)
    }

    /// Whether a sync has failed: nobody knows what of the changes is durable.
    pub fn is_sync_failed(&self) -> bool {
        self.failed.load(Ordering::Acquire) != 0
    }

    /// Makes every change so far durable. Once that has failed, it fails.
    pub fn sync(&self) -> io::Result<()> {
        let _syncing = self.syncing.lock().unwrap_or_else(PoisonError::into_inner);
        match self.failed.load(Ordering::Acquire) {
            0 => {}
            errno => return Err(io::Error::from_raw_os_error(errno)),
        }
        self.sync_all().inspect_err(|error| {
            let errno = error.raw_os_error().unwrap_or(libc::EIO);
            self.failed.store(errno, Ordering::Release);
        })
    }

    /// Files first: a name is not to lead to a file that is not there yet.
    fn sync_all(&self) -> io::Result<()> {
        for (file, handle) in self.numbers().zip(&self.handles.all()) {
            self.sync_one(file, handle)?;
        }
        if self.names_changed.load(Ordering::Acquire) {
            self.tally.fdatasyncs.fetch_add(1, Ordering::Relaxed);
            self.effects.sync_names()?;
            self.names_changed.store(false, Ordering::Release);
        }
        Ok(())
    }

    fn sync_one(&self, file: FileNo, handle: &Handle) -> io::Result<()> {
        let seen = handle.changes.load(Ordering::Acquire);
        if handle.synced.load(Ordering::Acquire) == seen {
            return Ok(());
        }
        self.tally.fdatasyncs.fetch_add(1, Ordering::Relaxed);
        self.effects.sync(file)?;
        handle.synced.store(seen, Ordering::Release);
        Ok(())
    }
}

impl Drop for FileTable {
    /// Closing alone keeps the locks as long as a child that another thread is
    /// just starting still has the descriptors.
    fn drop(&mut self) {
        for handle in self.handles.all().iter().filter(|_| self.locked) {
            let _ = lock::release(&handle.file);
        }
    }
}

impl std::fmt::Debug for FileTable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let files = self.handles.all();
        f.debug_list()
            .entries(files.iter().map(|handle| &handle.file))
            .finish()
    }
}
