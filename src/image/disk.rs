//! The open image itself: its parts, and the rules by which threads share them.
//!
//! Three locks, always taken in this order:
//!
//! 1. `flushing`: one flush or resize at a time. Whoever waits for it waits for
//!    a flush that covers what it wants to be durable.
//! 2. `session`: one request to the guest at a time. Its holder alone changes
//!    the mapping, moves the files' ends and adds to the extent cache.
//! 3. `traffic`: held shared from the look into the extent cache until the bytes
//!    are read or written, so that its exclusive holder knows that nobody uses
//!    an extent from before. A flush takes it before clusters that it released
//!    can be used again, a resize for its whole duration. It is never held
//!    while waiting for one of the other two.
//!
//! `extents` and `inflated` are held for single look-ups and updates only.
//! An extent that may be written in place stays where it is until a resize;
//! that is why writes in place need no more than shared traffic.

use super::effects::WrapEffects;
use super::error::{Error, ErrorKind, Fault, Operation};
use super::extents::ExtentCache;
use super::files::FileTable;
use super::home::Home;
use super::inflated::Inflated;
use super::lock::{self, LockSet};
use super::reach::Reach;
use super::rest::Seat;
use super::{Access, Counters};
use instar_guest::{Facts, FileNo, Plan};
use std::fmt;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// An open image. All methods may be called from many threads at once.
pub struct Image {
    pub(super) path: PathBuf,
    pub(super) home: Home,
    pub(super) access: Access,
    pub(super) force_share: bool,
    pub(super) files: FileTable,
    pub(super) backing: Option<Box<Image>>,
    pub(super) facts: RwLock<Arc<Facts>>,
    pub(super) size: AtomicU64,
    pub(super) extents: RwLock<ExtentCache>,
    pub(super) inflated: Mutex<Inflated>,
    pub(super) flushing: Mutex<()>,
    pub(super) session: Mutex<Link>,
    pub(super) traffic: RwLock<()>,
    /// Whether the guest's mapping differs from the file's.
    pub(super) unflushed: AtomicBool,
    /// Whether unflushed changes were lost.
    pub(super) lost: AtomicBool,
    pub(super) unlocked: Mutex<Option<Identity>>,
}

/// The guest, and what has been asked of it since the last flush.
pub(super) struct Link {
    pub seat: Seat,
    pub reach: Reach,
    /// Bytes for which places were given.
    pub placed: u64,
    /// Whether the guest has to read the image again before it is asked
    /// anything else.
    pub stale: bool,
    /// The plan of a flush that found the disk full.
    pub postponed: Option<Plan>,
}

/// What tells that files were not changed.
pub(super) type Identity = Vec<(u64, u64, u64, i64, i64)>;

/// A failed thread leaves these values whole: they are changed by single
/// assignments, or rebuilt from the guest's.
pub(super) fn hold<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(super) fn shared<T>(lock: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

pub(super) fn exclusive<T>(lock: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(PoisonError::into_inner)
}

impl Image {
    /// What the image says about itself; replaced by a resize.
    pub fn facts(&self) -> Arc<Facts> {
        Arc::clone(&shared(&self.facts))
    }

    /// The path that texts name.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What the image was opened for.
    pub fn access(&self) -> Access {
        self.access
    }

    /// Size of the disk in bytes.
    pub fn virtual_size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    /// The backing image, opened for reading, unless there is none or the
    /// options said not to open it.
    pub fn backing(&self) -> Option<&Image> {
        self.backing.as_deref()
    }

    /// Whether anything waits for a flush.
    pub fn is_dirty(&self) -> bool {
        self.unflushed.load(Ordering::Acquire) || self.files.is_unsynced()
    }

    /// Disk space that the image's own files take, in bytes.
    pub fn allocated_bytes(&self) -> io::Result<u64> {
        self.files.allocated()
    }

    /// Length of the image file in bytes.
    pub fn file_len(&self) -> u64 {
        self.files.len(FileNo::IMAGE).unwrap_or(0)
    }

    /// What the image has cost so far, its backing chain excluded.
    pub fn counters(&self) -> Counters {
        let tally = &self.files.tally;
        Counters {
            exits: hold(&self.session).seat.exits(),
            reads: tally.reads.load(Ordering::Relaxed),
            writes: tally.writes.load(Ordering::Relaxed),
            fdatasyncs: tally.fdatasyncs.load(Ordering::Relaxed),
        }
    }

    /// Gives up the lock and those of the backing chain, keeping the images
    /// open. Refused with
    /// [`ErrorKind::InvalidRequest`] while something waits for a flush. What is
    /// read before [`lock`](Self::lock) may be what another process writes.
    pub fn unlock(&self) -> Result<(), Error> {
        self.release_lock()
            .map_err(|fault| fault.at(Operation::Lock, &self.path))
    }

    fn release_lock(&self) -> Result<(), Fault> {
        let _flushing = hold(&self.flushing);
        if self.is_dirty() {
            return Err(Fault::new(
                ErrorKind::InvalidRequest,
                "The image has changes that are not flushed",
            ));
        }
        let identity = self.identity()?;
        self.release_files()?;
        *hold(&self.unlocked) = Some(identity);
        match &self.backing {
            Some(backing) => backing.release_lock(),
            None => Ok(()),
        }
    }

    /// Takes the locks again. [`ErrorKind::Locked`] if another process holds
    /// the image, [`ErrorKind::Stale`] if a file is not what it was at
    /// [`unlock`](Self::unlock): open the image again.
    pub fn lock(&self) -> Result<(), Error> {
        self.take_lock()
            .map_err(|fault| fault.at(Operation::Lock, &self.path))
    }

    fn take_lock(&self) -> Result<(), Fault> {
        let mut unlocked = hold(&self.unlocked);
        let Some(identity) = unlocked.as_ref() else {
            return Ok(());
        };
        let backing = self.backing.as_deref();
        let locked = self
            .lock_unchanged(identity)
            .and_then(|()| backing.map_or(Ok(()), Image::take_lock));
        match locked {
            Ok(()) => *unlocked = None,
            // Why there is no lock is the news; that one of those already taken
            // cannot be given up changes nothing in it.
            Err(_) => drop(self.release_files()),
        }
        locked
    }

    /// Locks every file, and finds them as they were. A failure leaves some of
    /// them locked.
    fn lock_unchanged(&self, identity: &Identity) -> Result<(), Fault> {
        for file in self.files.numbers().filter(|_| !self.force_share) {
            LockSet::of(self.access).take(&self.files.file(file)?.file, &self.path)?;
        }
        let unchanged =
            self.identity().is_ok_and(|now| now == *identity) && self.have_their_names()?;
        match unchanged {
            true => Ok(()),
            false => Err(changed()),
        }
    }

    /// Whether every file still has the name under which it was opened.
    fn have_their_names(&self) -> io::Result<bool> {
        let image = self.files.file(FileNo::IMAGE)?;
        let others = self.files.handles().into_iter().skip(1);
        others.fold(self.home.holds(&image.file), |so_far, file| {
            let home = file.home.get();
            Ok(so_far? && home.map_or(Ok(true), |home| home.holds(&file.file))?)
        })
    }

    fn release_files(&self) -> io::Result<()> {
        let release = |file| lock::release(&self.files.file(file)?.file);
        let released = self.files.numbers().map(release);
        // Each of them, also where one fails.
        released.fold(Ok(()), io::Result::and)
    }

    fn identity(&self) -> io::Result<Identity> {
        let stamp = |file| {
            let metadata = self.files.file(file)?.file.metadata()?;
            Ok((
                metadata.dev(),
                metadata.ino(),
                metadata.len(),
                metadata.mtime(),
                metadata.mtime_nsec(),
            ))
        };
        self.files.numbers().map(stamp).collect()
    }

    /// Refuses everything once unflushed changes are lost, or may be: a sync
    /// that failed, be it a flush's or a resize's, is not tried again.
    pub(super) fn alive(&self) -> Result<(), Fault> {
        match self.lost.load(Ordering::Acquire) || self.files.is_sync_failed() {
            false => Ok(()),
            true => Err(Fault::new(
                ErrorKind::Lost,
                "Changes were lost that had not been flushed; close the image and open it again",
            )),
        }
    }

    /// Refuses ranges that are not inside the disk.
    pub(super) fn inside(&self, offset: u64, len: u64) -> Result<(), Fault> {
        let size = self.virtual_size();
        match offset.checked_add(len) {
            Some(end) if end <= size => Ok(()),
            _ => Err(Fault::new(
                ErrorKind::InvalidRequest,
                format!("{len} bytes at {offset} are not inside the disk of {size} bytes"),
            )),
        }
    }

    /// Refuses changes to an image that was opened for reading.
    pub(super) fn writable(&self) -> Result<(), Fault> {
        match self.access {
            Access::Write => Ok(()),
            Access::Info | Access::Read => Err(Fault::new(
                ErrorKind::ReadOnly,
                "The image was opened for reading only",
            )),
        }
    }
}

/// A file that is not what it was.
pub(super) fn changed() -> Fault {
    Fault::new(
        ErrorKind::Stale,
        "The file was changed or replaced by another program",
    )
}

impl fmt::Debug for Image {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Image")
            .field("path", &self.path)
            .field("access", &self.access)
            .field("files", &self.files)
            .field("backing", &self.backing)
            .finish_non_exhaustive()
    }
}

/// How to wrap effects, as [`OpenOptions`](super::OpenOptions) carries it.
#[derive(Clone, Default)]
pub struct EffectsHook(pub Option<WrapEffects>);

impl fmt::Debug for EffectsHook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() { "wrapped" } else { "real" })
    }
}
