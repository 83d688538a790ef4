//! The side that the kernel sees: a call is held against the rules, done in the
//! directory below, and taped. What is to fail is decided elsewhere.

use super::directory::{Directory, errno};
use super::{Entry, Kind, Rules};
use fuser::{
    FileHandle, FileType, FopenFlags, Generation, INodeNo, LockOwner, OpenFlags, RenameFlags,
    ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyLseek,
    ReplyOpen, ReplyStatfs, ReplyWrite, Request, TimeOrNow, WriteFlags,
};
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, OFlag, fallocate, open, openat, renameat};
use nix::sys::stat::{Mode, mkdirat};
use nix::unistd::{UnlinkatFlags, Whence, lseek64, unlinkat};
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::os::fd::AsFd as _;
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// What the kernel is told lasts no longer than the call: all that a program
/// does arrives here.
const TTL: Duration = Duration::ZERO;

/// The directory under the rules.
pub struct Passthrough {
    pub directory: Directory,
    pub rules: Arc<Rules>,
}

impl Passthrough {
    fn set_len(&self, ino: INodeNo, fh: Option<FileHandle>, len: u64) -> Result<(), Errno> {
        let (file, name) = match fh {
            Some(fh) => {
                let handle = self.directory.handle(fh)?;
                (handle.file, handle.name)
            }
            None => {
                let (path, name) = self.directory.path(ino)?;
                let file = File::options().write(true).open(path).map_err(errno)?;
                (Arc::new(file), name)
            }
        };
        self.rules.may(&name, Kind::SetLength)?;
        file.set_len(len).map_err(errno)?;
        self.rules.note(&name, Entry::SetLength { len });
        Ok(())
    }
}

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
        answer!(reply, self.directory.lookup(parent, name), |attr| {
            reply.entry(&TTL, &attr, Generation(0));
        });
    }

    fn forget(&self, _req: &Request, ino: INodeNo, count: u64) {
        self.directory.forget(ino, count);
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        answer!(reply, self.directory.getattr(ino), |attr| {
            reply.attr(&TTL, &attr);
        });
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
            let (path, _) = self.directory.path(ino)?;
            if let Some(mode) = mode {
                fs::set_permissions(&path, fs::Permissions::from_mode(mode)).map_err(errno)?;
            }
            if uid.is_some() || gid.is_some() {
                std::os::unix::fs::chown(&path, uid, gid).map_err(errno)?;
            }
            if let Some(size) = size {
                self.set_len(ino, fh, size)?;
            }
            self.directory.getattr(ino)
        };
        answer!(reply, set(), |attr| {
            reply.attr(&TTL, &attr);
        });
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
        let made = self
            .directory
            .in_directory(parent, |dir| mkdirat(dir, name, mode));
        let made = made.and_then(|()| self.directory.lookup(parent, name));
        answer!(reply, made, |attr| reply.entry(&TTL, &attr, Generation(0)));
    }

    fn unlink(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let how = UnlinkatFlags::NoRemoveDir;
        let gone = self
            .directory
            .in_directory(parent, |dir| unlinkat(dir, name, how));
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
        let renamed = self.directory.path(newparent).and_then(|(to, _)| {
            let to = open(&to, OFlag::O_PATH, Mode::empty())?;
            self.directory
                .in_directory(parent, |from| renameat(from, name, &to, newname))
        });
        answer!(reply, renamed, |()| reply.ok());
    }

    fn open(&self, _req: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let opened = self.directory.path(ino).and_then(|(path, name)| {
            let flags = OFlag::from_bits_truncate(flags.0) & OFlag::O_ACCMODE;
            Ok(self
                .directory
                .add_handle(open(&path, flags, Mode::empty())?, &name))
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
                .directory
                .in_directory(parent, |dir| openat(dir, name, flags, mode))?;
            Ok((
                self.directory.lookup(parent, name)?,
                self.directory.add_handle(file, name),
            ))
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
            let handle = self.directory.handle(fh)?;
            let short = self.rules.may(&handle.name, Kind::Read)?.is_some();
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
            let handle = self.directory.handle(fh)?;
            let short = self.rules.may(&handle.name, Kind::Write)?.is_some();
            let data = &data[..data.len() >> u32::from(short)];
            handle.file.write_all_at(data, offset).map_err(errno)?;
            let copy = data.to_vec();
            self.rules
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
            let handle = self.directory.handle(fh)?;
            self.rules.may(&handle.name, Kind::Sync)?;
            self.rules.note(&handle.name, Entry::Synced);
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
            let handle = self.directory.handle(fh)?;
            self.rules.may(&handle.name, Kind::Allocate)?;
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
                self.rules.note(&handle.name, zero);
            }
            if before != after {
                self.rules
                    .note(&handle.name, Entry::SetLength { len: after });
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
        let found = self.directory.handle(fh).and_then(|handle| {
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
        self.directory.release(fh);
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
        let listed = self.directory.path(ino).and_then(|(path, _)| {
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
