//! The kernel's own way to the file of a raw image (FUSE passthrough): it reads,
//! writes and maps that file itself, and nobody here sees it.
//!
//! So nothing that is kept in memory says what such an image is: its size is
//! that of the file, and what was written is made durable whether or not
//! anything here knows of it. The kernel wants all handles of a file to go the
//! same way, and to be told of it by the same key as long as one is open.

use super::error::Result;
use super::sync::lock;
use nix::errno::Errno;
use std::any::Any;
use std::fmt;
use std::fs::{File, Metadata};
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::fs::MetadataExt as _;
use std::sync::Mutex;

/// What the kernel knows an open way by; closed when it is dropped.
pub type Key = Box<dyn Any + Send + Sync>;

/// Asks the kernel to open a way to a file.
pub type OpenWay<'a> = &'a dyn Fn(BorrowedFd<'_>) -> io::Result<Key>;

/// For whoever asks no kernel.
pub fn no_way(_file: BorrowedFd<'_>) -> io::Result<Key> {
    Err(io::ErrorKind::Unsupported.into())
}

/// See the module.
pub struct Passage {
    key: Key,
    /// An opening of its own: the kernel holds it for as long as it likes, and
    /// the image's lock must not last as long.
    file: File,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// What the file was like before it was last made durable.
    synced: Option<Version>,
    /// A failure to do so. The kernel tells it once, and nobody knows what has
    /// become of the data.
    failed: Option<Errno>,
}

/// What tells whether a file was written.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Version {
    len: u64,
    /// Nobody can set it back, unlike the time of modification.
    ctime: (i64, i64),
}

impl Passage {
    /// Opens the way to a file, of which this must be the only descriptor of its
    /// opening.
    pub fn open(file: File, open: OpenWay<'_>) -> io::Result<Self> {
        let synced = Some(Version::of(&file.metadata()?));
        Ok(Self {
            key: open(file.as_fd())?,
            file,
            state: Mutex::new(State {
                synced,
                failed: None,
            }),
        })
    }

    /// What the kernel knows it by.
    pub fn key(&self) -> &(dyn Any + Send + Sync) {
        self.key.as_ref()
    }

    /// What the file is like, as far as that can be found out.
    pub fn version(&self) -> Option<Version> {
        self.file.metadata().ok().as_ref().map(Version::of)
    }

    /// Makes everything that the kernel has written durable. Once that has
    /// failed, it fails.
    pub fn sync(&self) -> Result<()> {
        self.sync_if(|_, _| true)
    }

    /// The same where the file shows that something was written since.
    pub fn sync_changes(&self) -> Result<()> {
        self.sync_if(|state, now| state.failed.is_none() && state.synced != now)
    }

    fn sync_if(&self, needed: impl FnOnce(&State, Option<Version>) -> bool) -> Result<()> {
        let mut state = lock(&self.state);
        let now = self.version();
        if !needed(&state, now) {
            return Ok(());
        }
        if let Some(errno) = state.failed {
            return Err(errno.into());
        }
        state.synced = now;
        self.file.sync_data().map_err(|error| {
            let errno = error.raw_os_error().map_or(Errno::EIO, Errno::from_raw);
            state.failed = Some(errno);
            errno.into()
        })
    }
}

impl fmt::Debug for Passage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Passage")
            .field("file", &self.file)
            .finish_non_exhaustive()
    }
}

impl Version {
    fn of(metadata: &Metadata) -> Self {
        Self {
            len: metadata.len(),
            ctime: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}
