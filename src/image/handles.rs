//! The open files of one image, by number.
//!
//! The list is shared by the table of files and the effects on them. Whoever
//! changes it holds the image's session and keeps `traffic` to himself.

use super::home::Home;
use super::syscalls;
use instar_guest::FileNo;
use std::fs::{File, Metadata};
use std::io;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};

/// What tells files apart.
pub(crate) type Id = (u64, u64);

/// What tells the file of these attributes apart.
pub(crate) fn id(metadata: &Metadata) -> Id {
    (metadata.dev(), metadata.ino())
}

/// What tells an open file apart.
pub(crate) fn id_of(file: &File) -> io::Result<Id> {
    file.metadata().map(|metadata| id(&metadata))
}

/// One open file of an image.
pub(crate) struct Handle {
    pub file: File,
    pub writable: bool,
    /// Whether a plan made it: then its attributes have to be durable, too.
    pub made: bool,
    /// Where its name is, for a file that the image names.
    pub home: OnceLock<Home>,
    /// Length in bytes. Changed only by whoever holds the image's session.
    pub len: AtomicU64,
    /// How many changes were made; counted after the change.
    pub changes: AtomicU64,
    /// Long runs of data that were written and are to go to disk soon.
    runs: Mutex<Range<u64>>,
    /// Held by whoever sends them there: one at a time may have to wait for it.
    sending: Mutex<()>,
    /// Whether its filesystem does not know reads without waiting.
    only_waits: AtomicBool,
    /// How many of them are durable; set after the sync to what had been
    /// counted before it: a change is never taken for durable.
    pub synced: AtomicU64,
}

impl Handle {
    pub fn new(file: File, writable: bool) -> io::Result<Self> {
        let len = AtomicU64::new(file.metadata()?.len());
        Ok(Self {
            file,
            writable,
            made: false,
            home: OnceLock::new(),
            len,
            changes: AtomicU64::new(0),
            runs: Mutex::default(),
            sending: Mutex::default(),
            only_waits: AtomicBool::new(false),
            synced: AtomicU64::new(0),
        })
    }

    /// A file that was made just now.
    pub fn made(file: File) -> io::Result<Self> {
        Ok(Self {
            made: true,
            // The file itself is not durable.
            changes: AtomicU64::new(1),
            ..Self::new(file, true)?
        })
    }

    /// Fills `buf` if all of it is in memory; whether it was.
    pub fn try_read_at(&self, offset: u64, buf: &mut [u8]) -> bool {
        if self.only_waits.load(Ordering::Relaxed) {
            return false;
        }
        match syscalls::read_at_once(&self.file, offset, buf) {
            Ok(len) => len == buf.len(),
            Err(error) => {
                let unknown = matches!(
                    error.raw_os_error(),
                    Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL)
                );
                self.only_waits.fetch_or(unknown, Ordering::Relaxed);
                false
            }
        }
    }

    /// Remembers a long run of data that was written. One that another one does not
    /// continue goes to disk with the next flush.
    pub fn note_run(&self, run: Range<u64>) {
        let mut runs = self.runs.lock().unwrap_or_else(PoisonError::into_inner);
        let start = match runs.end == run.start {
            true => runs.start,
            false => run.start,
        };
        *runs = start..run.end;
    }

    /// Sends such runs to disk, and those that come meanwhile.
    pub fn begin_sync(&self) {
        let Ok(_sending) = self.sending.try_lock() else {
            return;
        };
        let next = || {
            let mut runs = self.runs.lock().unwrap_or_else(PoisonError::into_inner);
            let run = std::mem::replace(&mut *runs, 0..0);
            Some(run).filter(|run| !run.is_empty())
        };
        while let Some(run) = next() {
            syscalls::begin_sync(&self.file, run);
        }
    }

    /// Whether the file is as long as it is known to be.
    pub fn has_its_length(&self) -> io::Result<bool> {
        Ok(self.file.metadata()?.len() == self.len.load(Ordering::Acquire))
    }

    /// Takes note of the length that the file has.
    pub fn measure(&self) -> io::Result<()> {
        let len = self.file.metadata()?.len();
        self.len.store(len, Ordering::Release);
        Ok(())
    }

    pub fn is_unsynced(&self) -> bool {
        self.synced.load(Ordering::Acquire) != self.changes.load(Ordering::Acquire)
    }
}

/// Open files by number.
#[derive(Clone, Default)]
pub(crate) struct Handles(Arc<RwLock<Vec<Arc<Handle>>>>);

impl Handles {
    /// The file of a number, if the image has one.
    pub fn get(&self, file: FileNo) -> Option<Arc<Handle>> {
        let list = self.0.read().unwrap_or_else(PoisonError::into_inner);
        list.get(usize::try_from(file.0).ok()?).map(Arc::clone)
    }

    /// All files, in the order of their numbers.
    pub fn all(&self) -> Vec<Arc<Handle>> {
        self.0
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.0.read().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// Puts other files in the place of all; answers those that were there.
    pub fn set(&self, files: Vec<Arc<Handle>>) -> Vec<Arc<Handle>> {
        let mut list = self.0.write().unwrap_or_else(PoisonError::into_inner);
        std::mem::replace(&mut list, files)
    }

    /// Adds a file; it gets the next number.
    pub fn push(&self, handle: Arc<Handle>) {
        let mut list = self.0.write().unwrap_or_else(PoisonError::into_inner);
        list.push(handle);
    }
}

impl std::fmt::Debug for Handle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.file.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_that_follow_each_other_go_to_disk_as_one() {
        let handle = Handle::new(tempfile::tempfile().unwrap(), true).unwrap();
        let runs = || handle.runs.lock().unwrap().clone();
        handle.note_run(100..200);
        handle.note_run(200..300);
        assert_eq!(runs(), 100..300);
        handle.note_run(700..800);
        assert_eq!(runs(), 700..800);
        let sending = handle.sending.lock().unwrap();
        handle.begin_sync();
        assert_eq!(runs(), 700..800, "one at a time");
        drop(sending);
        handle.begin_sync();
        assert!(runs().is_empty());
    }
}
