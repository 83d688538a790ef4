//! A filesystem for tests that passes everything on to a directory, except for
//! one call that it fails or cuts short; and that keeps a tape of all that
//! reaches a file. It lies below SOURCE. Nothing here knows images.
//!
//! The thread that serves it uses the directory below only, never a mount, so
//! that it cannot wait for itself. It makes nothing durable: what a loss of power
//! would leave is worked out from the tape.

use fuser::{
    BackgroundSession, FileAttr, FileHandle, FileType, FopenFlags, Generation, INodeNo, LockOwner,
    MountOption, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory,
    ReplyEmpty, ReplyEntry, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite, Request, Session,
    TimeOrNow, WriteFlags,
};
use nix::errno::Errno;
use nix::fcntl::{AtFlags, FallocateFlags, OFlag, fallocate, open, openat, renameat};
use nix::sys::stat::{FileStat, Mode, fstatat, mkdirat};
use nix::unistd::{UnlinkatFlags, Whence, lseek64, unlinkat};
use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

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
    shared: Arc<Shared>,
    session: Option<BackgroundSession>,
}

#[derive(Default)]
struct Shared(Mutex<State>);

#[derive(Default)]
struct State {
    nodes: HashMap<u64, Node>,
    handles: HashMap<u64, Handle>,
    last_handle: u64,
    fault: Option<Fault>,
    fired: usize,
    counts: HashMap<(OsString, Kind), usize>,
    taped: Option<OsString>,
    tape: Vec<Entry>,
}

/// A file that the kernel knows.
struct Node {
    path: OwnedFd,
    name: OsString,
    lookups: u64,
}

#[derive(Clone)]
struct Handle {
    file: Arc<File>,
    name: OsString,
}

impl Faults {
    /// Shows a directory at a mountpoint.
    pub fn mount(directory: &Path, mountpoint: &Path) -> Self {
        let shared = Arc::<Shared>::default();
        let root = open(directory, OFlag::O_PATH, Mode::empty()).unwrap();
        shared.state().nodes.insert(
            INodeNo::ROOT.0,
            Node {
                path: root,
                name: OsString::new(),
                lookups: 1,
            },
        );
        let mut config = fuser::Config::default();
        config.mount_options = vec![
            MountOption::FSName("faults".to_owned()),
            MountOption::DefaultPermissions,
        ];
        let filesystem = Passthrough(Arc::clone(&shared));
        let session = Session::new(filesystem, mountpoint, &config)
            .and_then(Session::spawn)
            .unwrap();
        Self {
            shared,
            session: Some(session),
        }
    }

    /// Makes a call fail from now on; counts from here.
    pub fn arm(&self, fault: Fault) {
        let mut state = self.shared.state();
        state.fault = Some(fault);
        state.fired = 0;
        state.counts.clear();
    }

    /// Nothing fails any more. Answers how many calls have.
    pub fn clear(&self) -> usize {
        let mut state = self.shared.state();
        state.fault = None;
        state.fired
    }

    /// How many calls of a kind there have been on a file from the last
    /// [`arm`](Self::arm) to [`clear`](Self::clear).
    pub fn count(&self, file: &OsStr, kind: Kind) -> usize {
        let counts = &self.shared.state().counts;
        counts.get(&(file.to_owned(), kind)).copied().unwrap_or(0)
    }

    /// Tapes what reaches the file of a name from now on.
    pub fn tape(&self, file: &OsStr) {
        let mut state = self.shared.state();
        state.taped = Some(file.to_owned());
        state.tape.clear();
    }

    /// A remark on the tape.
    pub fn note(&self, remark: usize) {
        self.shared.state().tape.push(Entry::Note(remark));
    }

    /// The tape so far; nothing is taped any more.
    pub fn taped(&self) -> Vec<Entry> {
        let mut state = self.shared.state();
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

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn handle(&self, fh: FileHandle) -> Result<Handle, Errno> {
        let state = self.state();
        state.handles.get(&fh.0).cloned().ok_or(Errno::EBADF)
    }

    fn add_handle(&self, file: OwnedFd, name: &OsStr) -> FileHandle {
        let mut state = self.state();
        state.last_handle += 1;
        let (file, name) = (Arc::new(File::from(file)), name.to_owned());
        let number = state.last_handle;
        state.handles.insert(number, Handle { file, name });
        FileHandle(number)
    }

    /// Where a node can be opened, whatever its name is by now.
    fn path(&self, ino: INodeNo) -> Result<(PathBuf, OsString), Errno> {
        let state = self.state();
        let node = state.nodes.get(&ino.0).ok_or(Errno::ESTALE)?;
        let number = node.path.as_raw_fd();
        Ok((format!("/proc/self/fd/{number}").into(), node.name.clone()))
    }

    fn in_directory<T>(
        &self,
        parent: INodeNo,
        act: impl FnOnce(&OwnedFd) -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        let state = self.state();
        act(&state.nodes.get(&parent.0).ok_or(Errno::ESTALE)?.path)
    }

    fn lookup(&self, parent: INodeNo, name: &OsStr) -> Result<FileAttr, Errno> {
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

    fn getattr(&self, ino: INodeNo) -> Result<FileAttr, Errno> {
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

    fn set_len(&self, ino: INodeNo, fh: Option<FileHandle>, len: u64) -> Result<(), Errno> {
        let (file, name) = match fh {
            Some(fh) => {
                let handle = self.handle(fh)?;
                (handle.file, handle.name)
            }
            None => {
                let (path, name) = self.path(ino)?;
                let file = File::options().write(true).open(path).map_err(errno)?;
                (Arc::new(file), name)
            }
        };
        self.may(&name, Kind::SetLength)?;
        file.set_len(len).map_err(errno)?;
        self.note(&name, Entry::SetLength { len });
        Ok(())
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

    fn note(&self, name: &OsStr, entry: Entry) {
        let mut state = self.state();
        if state.taped.as_deref() == Some(name) {
            state.tape.push(entry);
        }
    }
}

fn errno(error: io::Error) -> Errno {
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

/// What the kernel is told lasts no longer than the call: all that a program
/// does arrives here.
const TTL: Duration = Duration::ZERO;

/// The side that the kernel sees.
struct Passthrough(Arc<Shared>);

/// Answers with the value, or with the error.
macro_rules! answer {
    ($reply:ident, $result:expr, |$value:pat_param| $ok:expr) => {
        match $result {
            Ok($value) => $ok,
            Err(error) => {
                let error: Errno = error;
                $reply.error(fuser::Errno::from_i32(error as i32))
            }
        }
    };
}

impl fuser::Filesystem for Passthrough {
    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        answer!(reply, self.0.lookup(parent, name), |attr| {
            reply.entry(&TTL, &attr, Generation(0));
        });
    }

    fn forget(&self, _req: &Request, ino: INodeNo, count: u64) {
        let mut state = self.0.state();
        if let Some(node) = state.nodes.get_mut(&ino.0) {
            node.lookups = node.lookups.saturating_sub(count);
            if node.lookups == 0 && ino != INodeNo::ROOT {
                state.nodes.remove(&ino.0);
            }
        }
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        answer!(reply, self.0.getattr(ino), |attr| reply.attr(&TTL, &attr));
    }

    fn setattr(
        &self,
        _req: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<fuser::BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let set = || {
            let (path, _) = self.0.path(ino)?;
            if let Some(mode) = mode {
                fs::set_permissions(&path, fs::Permissions::from_mode(mode)).map_err(errno)?;
            }
            if uid.is_some() || gid.is_some() {
                std::os::unix::fs::chown(&path, uid, gid).map_err(errno)?;
            }
            if let Some(size) = size {
                self.0.set_len(ino, fh, size)?;
            }
            self.0.getattr(ino)
        };
        answer!(reply, set(), |attr| reply.attr(&TTL, &attr));
    }

    fn mkdir(
        &self,
        _req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        reply: ReplyEntry,
    ) {
        let mode = Mode::from_bits_truncate(mode);
        let made = self.0.in_directory(parent, |dir| mkdirat(dir, name, mode));
        let made = made.and_then(|()| self.0.lookup(parent, name));
        answer!(reply, made, |attr| reply.entry(&TTL, &attr, Generation(0)));
    }

    fn unlink(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let how = UnlinkatFlags::NoRemoveDir;
        let gone = self.0.in_directory(parent, |dir| unlinkat(dir, name, how));
        answer!(reply, gone, |()| reply.ok());
    }

    fn rename(
        &self,
        _req: &Request,
        parent: INodeNo,
        name: &OsStr,
        newparent: INodeNo,
        newname: &OsStr,
        _flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let renamed = self.0.path(newparent).and_then(|(to, _)| {
            let to = open(&to, OFlag::O_PATH, Mode::empty())?;
            self.0
                .in_directory(parent, |from| renameat(from, name, &to, newname))
        });
        answer!(reply, renamed, |()| reply.ok());
    }

    fn open(&self, _req: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let opened = self.0.path(ino).and_then(|(path, name)| {
            let flags = OFlag::from_bits_truncate(flags.0) & OFlag::O_ACCMODE;
            Ok(self.0.add_handle(open(&path, flags, Mode::empty())?, &name))
        });
        // So that each call arrives as it was made.
        answer!(reply, opened, |fh| {
            reply.opened(fh, FopenFlags::FOPEN_DIRECT_IO);
        });
    }

    fn create(
        &self,
        _req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let made = || {
            let flags = OFlag::from_bits_truncate(flags) & (OFlag::O_ACCMODE | OFlag::O_EXCL);
            let (flags, mode) = (flags | OFlag::O_CREAT, Mode::from_bits_truncate(mode));
            let file = self
                .0
                .in_directory(parent, |dir| openat(dir, name, flags, mode))?;
            Ok((self.0.lookup(parent, name)?, self.0.add_handle(file, name)))
        };
        answer!(reply, made(), |(attr, fh)| {
            reply.created(&TTL, &attr, Generation(0), fh, FopenFlags::FOPEN_DIRECT_IO);
        });
    }

    fn read(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let read = || {
            let handle = self.0.handle(fh)?;
            let short = self.0.may(&handle.name, Kind::Read)?.is_some();
            let mut bytes = vec![0; size as usize >> u32::from(short)];
            let len = handle.file.read_at(&mut bytes, offset).map_err(errno)?;
            bytes.truncate(len);
            Ok(bytes)
        };
        answer!(reply, read(), |bytes| reply.data(&bytes));
    }

    fn write(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let written = || {
            let handle = self.0.handle(fh)?;
            let short = self.0.may(&handle.name, Kind::Write)?.is_some();
            let data = &data[..data.len() >> u32::from(short)];
            handle.file.write_all_at(data, offset).map_err(errno)?;
            let copy = data.to_vec();
            self.0
                .note(&handle.name, Entry::Write { offset, data: copy });
            Ok(data.len())
        };
        answer!(reply, written(), |len| reply.written(len as u32));
    }

    fn fsync(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        let synced = || {
            let handle = self.0.handle(fh)?;
            self.0.may(&handle.name, Kind::Sync)?;
            self.0.note(&handle.name, Entry::Synced);
            Ok(())
        };
        answer!(reply, synced(), |()| reply.ok());
    }

    fn fallocate(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        len: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let allocated = || {
            let handle = self.0.handle(fh)?;
            self.0.may(&handle.name, Kind::Allocate)?;
            let mode = FallocateFlags::from_bits_truncate(mode);
            let before = handle.file.metadata().map_err(errno)?.len();
            fallocate(handle.file.as_fd(), mode, offset as i64, len as i64)?;
            let after = handle.file.metadata().map_err(errno)?.len();
            let zeroes =
                FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_ZERO_RANGE;
            let inside = before.saturating_sub(offset).min(len);
            if mode.intersects(zeroes) && inside > 0 {
                let zero = Entry::Zero {
                    offset,
                    len: inside,
                };
                self.0.note(&handle.name, zero);
            }
            if before != after {
                self.0.note(&handle.name, Entry::SetLength { len: after });
            }
            Ok(())
        };
        answer!(reply, allocated(), |()| reply.ok());
    }

    fn lseek(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        let found = self.0.handle(fh).and_then(|handle| {
            let whence = match whence {
                libc::SEEK_DATA => Whence::SeekData,
                _ => Whence::SeekHole,
            };
            lseek64(handle.file.as_fd(), offset, whence)
        });
        answer!(reply, found, |at| reply.offset(at));
    }

    fn flush(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _lock_owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        reply.ok();
    }

    fn release(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        self.0.state().handles.remove(&fh.0);
        reply.ok();
    }

    fn readdir(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let listed = self.0.path(ino).and_then(|(path, _)| {
            let mut names: Vec<OsString> = fs::read_dir(path)
                .and_then(|entries| entries.map(|entry| Ok(entry?.file_name())).collect())
                .map_err(errno)?;
            names.sort();
            Ok(names)
        });
        answer!(reply, listed, |names| {
            for (name, next) in names.iter().zip(1..).skip(offset as usize) {
                // The number is asked for by a lookup.
                if reply.add(INodeNo(u64::MAX), next, FileType::RegularFile, name) {
                    break;
                }
            }
            reply.ok();
        });
    }

    fn fsyncdir(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        reply.ok();
    }

    fn statfs(&self, _req: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        let size = 4096;
        reply.statfs(1 << 20, 1 << 20, 1 << 20, 1 << 20, 1 << 20, size, 255, size);
    }
}
