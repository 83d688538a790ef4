//! The directory below: the files that the kernel knows, and those that are open.
//! No fault, no tape and no reply is known here.
//!
//! Whoever serves it uses the directory only, never a mount, so that it cannot
//! wait for itself.

use fuser::{FileAttr, FileHandle, FileType, INodeNo};
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, open, openat};
use nix::sys::stat::{FileStat, Mode, fstatat};
use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The directory, as far as it is in use.
pub struct Directory(Mutex<State>);

#[derive(Default)]
struct State {
    nodes: HashMap<u64, Node>,
    handles: HashMap<u64, Handle>,
    last_handle: u64,
}

/// A file that the kernel knows.
struct Node {
    path: OwnedFd,
    name: OsString,
    lookups: u64,
}

/// A handle of the kernel.
#[derive(Clone)]
pub struct Handle {
    /// The open file.
    pub file: Arc<File>,
    /// The name that it had when it was opened.
    pub name: OsString,
}

impl Directory {
    /// A directory of which nothing but itself is known.
    pub fn open(directory: &Path) -> Result<Self, Errno> {
        let root = Node {
            path: open(directory, OFlag::O_PATH, Mode::empty())?,
            name: OsString::new(),
            lookups: 1,
        };
        let mut state = State::default();
        state.nodes.insert(INodeNo::ROOT.0, root);
        Ok(Self(Mutex::new(state)))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The open file of a handle.
    pub fn handle(&self, fh: FileHandle) -> Result<Handle, Errno> {
        let state = self.state();
        state.handles.get(&fh.0).cloned().ok_or(Errno::EBADF)
    }

    /// Gives an open file a handle.
    pub fn add_handle(&self, file: OwnedFd, name: &OsStr) -> FileHandle {
        let mut state = self.state();
        state.last_handle += 1;
        let (file, name) = (Arc::new(File::from(file)), name.to_owned());
        let number = state.last_handle;
        state.handles.insert(number, Handle { file, name });
        FileHandle(number)
    }

    /// Forgets a handle; a call that still uses its file keeps that open.
    pub fn release(&self, fh: FileHandle) {
        self.state().handles.remove(&fh.0);
    }

    /// Where a node can be opened, whatever its name is by now.
    pub fn path(&self, ino: INodeNo) -> Result<(PathBuf, OsString), Errno> {
        let state = self.state();
        let node = state.nodes.get(&ino.0).ok_or(Errno::ESTALE)?;
        let number = node.path.as_raw_fd();
        Ok((format!("/proc/self/fd/{number}").into(), node.name.clone()))
    }

    /// Does something in a directory.
    pub fn in_directory<T>(
        &self,
        parent: INodeNo,
        act: impl FnOnce(&OwnedFd) -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        let state = self.state();
        act(&state.nodes.get(&parent.0).ok_or(Errno::ESTALE)?.path)
    }

    /// Finds a file by its name; the kernel knows it from then on.
    pub fn lookup(&self, parent: INodeNo, name: &OsStr) -> Result<FileAttr, Errno> {
        let how = OFlag::O_PATH | OFlag::O_NOFOLLOW;
        let path = self.in_directory(parent, |dir| openat(dir, name, how, Mode::empty()))?;
        let stat = stat(&path)?;
        let mut state = self.state();
        let node = state.nodes.entry(stat.st_ino).or_insert(Node {
            path,
            name: OsString::new(),
            lookups: 0,
        });
        node.name = name.to_owned();
        node.lookups += 1;
        Ok(attributes(&stat))
    }

    /// The kernel has forgotten so many lookups of a file.
    pub fn forget(&self, ino: INodeNo, count: u64) {
        let mut state = self.state();
        if let Some(node) = state.nodes.get_mut(&ino.0) {
            node.lookups = node.lookups.saturating_sub(count);
            if node.lookups == 0 && ino != INodeNo::ROOT {
                state.nodes.remove(&ino.0);
            }
        }
    }

    /// What a file is like.
    pub fn getattr(&self, ino: INodeNo) -> Result<FileAttr, Errno> {
        let stat = self.in_directory(ino, stat)?;
        let ino = match ino {
            INodeNo::ROOT => INodeNo::ROOT,
            _ => INodeNo(stat.st_ino),
        };
        Ok(FileAttr {
            ino,
            ..attributes(&stat)
        })
    }
}

/// The number of an error of the standard library.
pub fn errno(error: io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO))
}

fn stat(path: &OwnedFd) -> Result<FileStat, Errno> {
    fstatat(path, "", AtFlags::AT_EMPTY_PATH)
}

fn attributes(stat: &FileStat) -> FileAttr {
    let time = |sec: i64, nsec: i64| -> SystemTime {
        UNIX_EPOCH + Duration::new(u64::try_from(sec).unwrap(), u32::try_from(nsec).unwrap())
    };
    FileAttr {
        ino: INodeNo(stat.st_ino),
        size: u64::try_from(stat.st_size).unwrap(),
        blocks: u64::try_from(stat.st_blocks).unwrap(),
        atime: time(stat.st_atime, stat.st_atime_nsec),
        mtime: time(stat.st_mtime, stat.st_mtime_nsec),
        ctime: time(stat.st_ctime, stat.st_ctime_nsec),
        crtime: UNIX_EPOCH,
        kind: match stat.st_mode & libc::S_IFMT {
            libc::S_IFDIR => FileType::Directory,
            libc::S_IFLNK => FileType::Symlink,
            _ => FileType::RegularFile,
        },
        perm: (stat.st_mode & 0o7777) as u16,
        nlink: u32::try_from(stat.st_nlink).unwrap(),
        uid: stat.st_uid,
        gid: stat.st_gid,
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}
