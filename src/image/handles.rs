//! The open files of one image, by number.
//!
//! The list is shared by the table of files and the effects on them. Whoever
//! changes it holds the image's session and keeps `traffic` to himself.

use super::home::Home;
use instar_guest::FileNo;
use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, PoisonError, RwLock};

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
