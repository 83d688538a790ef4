//! A filesystem for tests that passes everything on to a directory, except for
//! one call that it fails or cuts short; and that keeps a tape of all that
//! reaches a file. It lies below SOURCE. Nothing here knows images.
//!
//! Here is what tests ask for: which call fails, and the tape. It makes nothing
//! durable: what a loss of power would leave is worked out from the tape.

mod directory;
mod passthrough;

use directory::Directory;
use fuser::{BackgroundSession, MountOption, Session};
use nix::errno::Errno;
use passthrough::Passthrough;
use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What can fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// `pread`.
    Read,
    /// `pwrite`.
    Write,
    /// `fsync`, `fdatasync`.
    Sync,
    /// `fallocate` in all its modes.
    Allocate,
    /// `ftruncate`.
    SetLength,
}

/// How it fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// With an error and no effect.
    Error(Errno),
    /// Half of the bytes are read or written.
    Short,
}

/// What is to fail.
#[derive(Clone, Debug)]
pub struct Fault {
    /// The name that the file had when it was opened.
    pub file: OsString,
    /// The kind of call.
    pub kind: Kind,
    /// How many of them succeed before.
    pub after: usize,
    /// How it fails.
    pub how: How,
    /// Whether all that come later fail too, until [`Faults::clear`].
    pub lasting: bool,
}

/// What has happened to a file.
#[derive(Clone, Debug)]
pub enum Entry {
    /// These bytes were written.
    Write { offset: u64, data: Vec<u8> },
    /// A range was made to read as zeroes.
    Zero { offset: u64, len: u64 },
    /// The file got another length.
    SetLength { len: u64 },
    /// All before it is durable.
    Synced,
    /// A remark of the test.
    Note(usize),
}

/// The filesystem, mounted; unmounted at the end.
pub struct Faults {
    rules: Arc<Rules>,
    session: Option<BackgroundSession>,
}

/// Which calls fail, and what is taped.
#[derive(Default)]
struct Rules(Mutex<State>);

#[derive(Default)]
struct State {
    fault: Option<Fault>,
    fired: usize,
    counts: HashMap<(OsString, Kind), usize>,
    taped: Option<OsString>,
    tape: Vec<Entry>,
}

impl Faults {
    /// Shows a directory at a mountpoint.
    pub fn mount(directory: &Path, mountpoint: &Path) -> Self {
        let rules = Arc::<Rules>::default();
        let mut config = fuser::Config::default();
        config.mount_options = vec![
            MountOption::FSName("faults".to_owned()),
            MountOption::DefaultPermissions,
        ];
        let filesystem = Passthrough {
            directory: Directory::open(directory).unwrap(),
            rules: Arc::clone(&rules),
        };
        let session = Session::new(filesystem, mountpoint, &config)
            .and_then(Session::spawn)
            .unwrap();
        Self {
            rules,
            session: Some(session),
        }
    }

    /// Makes a call fail from now on; counts from here.
    pub fn arm(&self, fault: Fault) {
        let mut state = self.rules.state();
        state.fault = Some(fault);
        state.fired = 0;
        state.counts.clear();
    }

    /// Nothing fails any more. Answers how many calls have.
    pub fn clear(&self) -> usize {
        let mut state = self.rules.state();
        state.fault = None;
        state.fired
    }

    /// How many calls of a kind there have been on a file from the last
    /// [`arm`](Self::arm) to [`clear`](Self::clear).
    pub fn count(&self, file: &OsStr, kind: Kind) -> usize {
        let counts = &self.rules.state().counts;
        counts.get(&(file.to_owned(), kind)).copied().unwrap_or(0)
    }

    /// Tapes what reaches the file of a name from now on.
    pub fn tape(&self, file: &OsStr) {
        let mut state = self.rules.state();
        state.taped = Some(file.to_owned());
        state.tape.clear();
    }

    /// A remark on the tape.
    pub fn note(&self, remark: usize) {
        self.rules.state().tape.push(Entry::Note(remark));
    }

    /// The tape so far; nothing is taped any more.
    pub fn taped(&self) -> Vec<Entry> {
        let mut state = self.rules.state();
        state.taped = None;
        std::mem::take(&mut state.tape)
    }
}

impl Drop for Faults {
    fn drop(&mut self) {
        if let Some(session) = self.session.take() {
            // A failure of the test may have left users behind.
            let _ = session.umount_and_join();
        }
    }
}

impl Rules {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a call goes on, and how far: `Short` is half of it.
    fn may(&self, name: &OsStr, kind: Kind) -> Result<Option<How>, Errno> {
        let mut state = self.state();
        let Some(fault) = state.fault.clone() else {
            return Ok(None);
        };
        let count = state.counts.entry((name.to_owned(), kind)).or_default();
        let number = *count;
        *count += 1;
        let is_it = number == fault.after || (fault.lasting && number > fault.after);
        if fault.file != name || fault.kind != kind || !is_it {
            return Ok(None);
        }
        let how = fault.how;
        state.fired += 1;
        match how {
            How::Error(errno) => Err(errno),
            How::Short => Ok(Some(how)),
        }
    }

    /// Tapes what has happened to a file, if that is wanted.
    fn note(&self, name: &OsStr, entry: Entry) {
        let mut state = self.state();
        if state.taped.as_deref() == Some(name) {
            state.tape.push(entry);
        }
    }
}
