//! The files of one image by number, what is known of each, and what has been
//! done to them.

use super::effects::{DiskEffects, Effects, WrapEffects};
use super::{lock, volatile};
use instar_guest::FileNo;
use instar_guest::plan::Step;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use vm_memory::VolatileSlice;

/// One file of an image.
struct Disk {
    file: Arc<File>,
    writable: bool,
    /// Length in bytes. Changed only by whoever holds the image's session.
    len: AtomicU64,
    /// How many changes were made; counted after the change.
    changes: AtomicU64,
    /// How many of them are durable; set after the sync to what had been
    /// counted before it: a change is never taken for durable.
    synced: AtomicU64,
}

impl Disk {
    fn is_unsynced(&self) -> bool {
        self.synced.load(Ordering::Acquire) != self.changes.load(Ordering::Acquire)
    }
}

/// How often what has been done.
#[derive(Default)]
pub(crate) struct Tally {
    pub reads: AtomicU64,
    pub writes: AtomicU64,
    pub fdatasyncs: AtomicU64,
}

/// The files of one image.
pub(crate) struct FileTable {
    disks: Vec<Disk>,
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
        let disks = vec![Disk::new(file, writable)?];
        Ok(Self {
            effects: effects(&disks, wrap),
            disks,
            locked: false,
            syncing: Mutex::default(),
            failed: AtomicI32::new(0),
            tally: Tally::default(),
        })
    }

    /// The table with the next file.
    pub fn and(
        mut self,
        file: File,
        writable: bool,
        wrap: Option<&WrapEffects>,
    ) -> io::Result<Self> {
        self.disks.push(Disk::new(file, writable)?);
        self.effects = effects(&self.disks, wrap);
        Ok(self)
    }

    fn disk(&self, file: FileNo) -> io::Result<&Disk> {
        self.get(file).ok_or(io::ErrorKind::NotFound.into())
    }

    fn get(&self, file: FileNo) -> Option<&Disk> {
        self.disks.get(usize::try_from(file.0).ok()?)
    }

    /// The numbers of all files.
    pub fn numbers(&self) -> impl Iterator<Item = FileNo> {
        (0..self.disks.len() as u32).map(FileNo)
    }

    /// Length in bytes; `None` for a file that the image does not have.
    pub fn len(&self, file: FileNo) -> Option<u64> {
        Some(self.get(file)?.len.load(Ordering::Acquire))
    }

    /// The lengths of all files, by number.
    pub fn lens(&self) -> Vec<u64> {
        let len = |disk: &Disk| disk.len.load(Ordering::Acquire);
        self.disks.iter().map(len).collect()
    }

    /// Whether the file may be changed.
    pub fn writable(&self, file: FileNo) -> bool {
        self.get(file).is_some_and(|disk| disk.writable)
    }

    /// The descriptor.
    pub fn file(&self, file: FileNo) -> io::Result<&File> {
        Ok(&self.disk(file)?.file)
    }

    /// Disk space that all files take.
    pub fn allocated(&self) -> io::Result<u64> {
        let blocks = |disk: &Disk| Ok(disk.file.metadata()?.blocks() * 512);
        self.disks.iter().map(blocks).sum()
    }

    /// Fills `buf`; what lies past the end of the file is zero.
    pub fn read(&self, file: FileNo, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let disk = self.disk(file)?;
        self.tally.reads.fetch_add(1, Ordering::Relaxed);
        let mut done = 0;
        while done < buf.len() {
            match disk.file.read_at(&mut buf[done..], offset + done as u64) {
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
        volatile::read_at(&self.disk(file)?.file, offset, dst)
    }

    /// Writes all of `data`.
    pub fn write(&self, file: FileNo, offset: u64, data: &[u8]) -> io::Result<()> {
        let end = offset + data.len() as u64;
        self.change(file, Some(end), |effects| effects.write(file, offset, data))
    }

    /// Sets the length.
    pub fn set_len(&self, file: FileNo, len: u64) -> io::Result<()> {
        self.change(file, None, |effects| effects.set_len(file, len))?;
        self.disk(file)?.len.store(len, Ordering::Release);
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
            Step::Reserve { file, offset, len } => self.reserve(file, offset, len),
            Step::SetLength { file, len } => self.set_len(file, len),
            Step::Punch { file, offset, len } => {
                self.change(file, None, |effects| effects.punch(file, offset, len))
            }
            Step::Create { .. } | Step::Rename { .. } | Step::Unlink { .. } => {
                Err(io::ErrorKind::Unsupported.into())
            }
        }
    }

    /// Performs a change that may extend the file up to `end`, and takes note
    /// of it, also where it fails half way.
    fn change(
        &self,
        file: FileNo,
        end: Option<u64>,
        act: impl FnOnce(&dyn Effects) -> io::Result<()>,
    ) -> io::Result<()> {
        let disk = self.disk(file)?;
        if !disk.writable {
            return Err(io::Error::from_raw_os_error(libc::EROFS));
        }
        self.tally.writes.fetch_add(1, Ordering::Relaxed);
        let done = act(self.effects.as_ref());
        disk.changes.fetch_add(1, Ordering::AcqRel);
        match (&done, end) {
            (Ok(()), Some(end)) => {
                disk.len.fetch_max(end, Ordering::AcqRel);
            }
            (Ok(()), None) => {}
            // How far it got is unknown; a failing fstat leaves the old length.
            (Err(_), _) => {
                if let Ok(metadata) = disk.file.metadata() {
                    disk.len.fetch_max(metadata.len(), Ordering::AcqRel);
                }
            }
        }
        done
    }

    /// Whether anything is not durable.
    pub fn is_unsynced(&self) -> bool {
        self.disks.iter().any(Disk::is_unsynced)
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
        for (file, disk) in self.numbers().zip(&self.disks) {
            self.sync_disk(file, disk).inspect_err(|error| {
                let errno = error.raw_os_error().unwrap_or(libc::EIO);
                self.failed.store(errno, Ordering::Release);
            })?;
        }
        Ok(())
    }

    fn sync_disk(&self, file: FileNo, disk: &Disk) -> io::Result<()> {
        let seen = disk.changes.load(Ordering::Acquire);
        if disk.synced.load(Ordering::Acquire) == seen {
            return Ok(());
        }
        self.tally.fdatasyncs.fetch_add(1, Ordering::Relaxed);
        self.effects.sync(file)?;
        disk.synced.store(seen, Ordering::Release);
        Ok(())
    }
}

fn effects(disks: &[Disk], wrap: Option<&WrapEffects>) -> Box<dyn Effects> {
    let files = disks.iter().map(|disk| Arc::clone(&disk.file)).collect();
    let real = Box::new(DiskEffects(files));
    match wrap {
        Some(wrap) => wrap(real),
        None => real,
    }
}

impl Disk {
    fn new(file: File, writable: bool) -> io::Result<Self> {
        let len = AtomicU64::new(file.metadata()?.len());
        Ok(Self {
            file: Arc::new(file),
            writable,
            len,
            changes: AtomicU64::new(0),
            synced: AtomicU64::new(0),
        })
    }
}

impl Drop for FileTable {
    /// Closing alone keeps the locks as long as a child that another thread is
    /// just starting still has the descriptors.
    fn drop(&mut self) {
        for disk in self.disks.iter().filter(|_| self.locked) {
            let _ = lock::release(&disk.file);
        }
    }
}

impl std::fmt::Debug for FileTable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let files = self.disks.iter().map(|disk| &disk.file);
        f.debug_list().entries(files).finish()
    }
}
