//! The adapter between [`Filesystem`] and the `fuser` crate: it translates
//! types and decides nothing but how long the kernel may remember.

mod convert;
mod crew;
mod reply;

use super::attributes::Changes;
use super::content::Seek;
use super::error::Error;
use super::filesystem::{Filesystem, OpenedHandle};
use super::namespace::Creation;
use super::nodes::NodeId;
use super::passage::Key;
use convert::{birth, file_attr, file_type, new_time};
use crew::{Crew, Turn};
use fuser::{
    BackingId, BsdFileFlags, Errno, FileHandle, FopenFlags, Generation, INodeNo, InitFlags,
    KernelConfig, LockOwner, OpenAccMode, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate,
    ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyLseek,
    ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};
use reply::{send_xattr, with_buffer};
use std::ffi::OsStr;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, SystemTime};

/// How long the kernel may believe what it was told about names and
/// attributes. Changes through the mount are seen at once; this is for changes
/// of the source behind it.
const TTL: Duration = Duration::from_secs(1);
/// The largest request in bytes: what the kernel sends at most.
const MAX_REQUEST: u32 = 1 << 20;
/// Requests that the kernel sends ahead without waiting (readahead, direct I/O
/// in parallel).
const MAX_BACKGROUND: u16 = 64;

/// Writes of so many bytes belong to long runs of data, which are written back
/// at once.
const LONG_WRITE: usize = 128 << 10;
/// The least number of threads that listen: while one answers, another one takes
/// the next request.
const LISTENERS: usize = 2;

/// See the module.
pub struct Adapter {
    filesystem: Arc<Filesystem>,
    /// Whether the kernel may be asked for ways of its own to files.
    passes: AtomicBool,
    crew: Crew,
}

impl Adapter {
    /// Answers requests with so many threads.
    pub fn new(filesystem: Arc<Filesystem>, threads: usize) -> Self {
        let processors = thread::available_parallelism().map_or(1, usize::from);
        Self {
            passes: AtomicBool::new(filesystem.options().passthrough),
            filesystem,
            crew: Crew::new(threads, processors.max(LISTENERS)),
        }
    }

    /// Begins to answer a request that may take long.
    fn begin(&self) -> Turn<'_> {
        let turn = self.crew.turn();
        turn.may_wait();
        turn
    }

    /// Opens a way to a file for the kernel. If it says that this is not for us,
    /// it is not asked again.
    fn way(&self, open: impl FnOnce() -> io::Result<BackingId>) -> io::Result<Key> {
        if !self.passes.load(Ordering::Relaxed) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let opened = open().inspect_err(|error| {
            if matches!(error.raw_os_error(), Some(libc::EPERM | libc::ENOTTY)) {
                self.passes.store(false, Ordering::Relaxed);
            }
        });
        Ok(Box::new(opened?))
    }

    /// Logs a failure of a call on a node and turns it into what goes to the
    /// kernel.
    fn errno(&self, ino: INodeNo, call: &str, error: &Error) -> Errno {
        log::trace!("{call} {}: {error}", ino.0);
        if error.message.is_some() {
            self.filesystem.report_for(NodeId(ino.0), error);
        }
        Errno::from_i32(error.errno as i32)
    }
}

/// The kernel's own way to what was opened.
fn backing(opened: &OpenedHandle) -> Option<&BackingId> {
    opened.passage.as_ref()?.key().downcast_ref()
}

/// Answers with the value, or with the failure's errno.
macro_rules! answer {
    ($self:ident, $ino:ident, $call:literal, $reply:ident, $result:expr, |$value:pat_param| $ok:expr) => {
        match $result {
            Ok($value) => $ok,
            Err(error) => $reply.error($self.errno($ino, $call, &error)),
        }
    };
}

impl fuser::Filesystem for Adapter {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let wanted = InitFlags::FUSE_DO_READDIRPLUS
            | InitFlags::FUSE_READDIRPLUS_AUTO
            | InitFlags::FUSE_PARALLEL_DIROPS
            // A new time of modification is no reason to drop the page cache:
            // mostly it comes from a write through this mount.
            | InitFlags::FUSE_EXPLICIT_INVAL_DATA
            | InitFlags::FUSE_ASYNC_DIO
            // Set-id bits mean nothing here, the mount is always nosuid; said
            // so, the kernel does not look for security.capability before
            // every write.
            | InitFlags::FUSE_HANDLE_KILLPRIV_V2;
        for flag in wanted {
            // A kernel without one of these works all the same.
            let _ = config.add_capabilities(flag);
        }
        if self.filesystem.options().writeback
            && config
                .add_capabilities(InitFlags::FUSE_WRITEBACK_CACHE)
                .is_err()
        {
            return Err(io::Error::other("this kernel has no writeback cache"));
        }
        if self.filesystem.options().passthrough {
            // The files lie on a file system that is not stacked itself.
            let able = config.add_capabilities(InitFlags::FUSE_PASSTHROUGH).is_ok()
                && config.set_max_stack_depth(1).is_ok();
            self.passes.store(able, Ordering::Relaxed);
        }
        let _ = config.set_max_write(MAX_REQUEST);
        let _ = config.set_max_background(MAX_BACKGROUND);
        Ok(())
    }

    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let _turn = self.begin();
        let found = self.filesystem.lookup(NodeId(parent.0), name);
        answer!(self, parent, "lookup", reply, found, |attributes| {
            reply.entry(&TTL, &file_attr(&attributes), Generation(0));
        });
    }

    fn forget(&self, _req: &Request, ino: INodeNo, count: u64) {
        self.filesystem.forget(NodeId(ino.0), count);
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        let _turn = self.begin();
        let found = self.filesystem.getattr(NodeId(ino.0));
        self.send_attributes(ino, "getattr", found, reply);
    }

    fn setattr(
        &self,
        _req: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let _turn = self.begin();
        let changes = Changes {
            size,
            perm: mode.map(|mode| mode & 0o7777),
            uid,
            gid,
            atime: atime.map(new_time),
            mtime: mtime.map(new_time),
        };
        let changed = self
            .filesystem
            .setattr(NodeId(ino.0), fh.map(|fh| fh.0), &changes);
        self.send_attributes(ino, "setattr", changed, reply);
    }

    fn open(&self, _req: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let _turn = self.begin();
        let writable = flags.acc_mode() != OpenAccMode::O_RDONLY;
        let way = |file: BorrowedFd<'_>| self.way(|| reply.open_backing(file));
        let opened = self.filesystem.open_passing(NodeId(ino.0), writable, &way);
        answer!(self, ino, "open", reply, opened, |opened| {
            let handle = FileHandle(opened.handle);
            if let Some(way) = backing(&opened) {
                return reply.opened_passthrough(handle, FopenFlags::empty(), way);
            }
            let keep = match opened.keep_cache {
                true => FopenFlags::FOPEN_KEEP_CACHE,
                false => FopenFlags::empty(),
            };
            reply.opened(handle, keep);
        });
    }

    fn read(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let turn = self.crew.turn();
        with_buffer(size, |buffer| {
            let read = match self.filesystem.try_read(fh.0, offset, buffer) {
                Some(len) => Ok(len),
                None => {
                    turn.may_wait();
                    self.filesystem.read(fh.0, offset, buffer)
                }
            };
            answer!(self, ino, "read", reply, read, |len| {
                reply.data(&buffer[..len]);
            });
        });
    }

    fn write(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        data: &[u8],
        write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let _turn = self.begin();
        let written = match write_flags.contains(WriteFlags::FUSE_WRITE_CACHE) {
            true => self.filesystem.write_back(fh.0, offset, data),
            false => self.filesystem.write(fh.0, offset, data),
        };
        answer!(self, ino, "write", reply, written, |()| {
            reply.written(u32::try_from(data.len()).unwrap_or(u32::MAX));
            if data.len() >= LONG_WRITE {
                self.filesystem.begin_flush(fh.0);
            }
        });
    }

    fn flush(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        _lock_owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        let _turn = self.begin();
        let flushed = self.filesystem.flush(fh.0);
        answer!(self, ino, "flush", reply, flushed, |()| reply.ok());
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
        let _turn = self.begin();
        self.filesystem.release(fh.0);
        reply.ok();
    }

    fn fsync(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        let _turn = self.begin();
        let synced = self.filesystem.fsync(fh.0);
        answer!(self, ino, "fsync", reply, synced, |()| reply.ok());
    }

    fn fallocate(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let _turn = self.begin();
        let allocated = self.filesystem.fallocate(fh.0, mode, offset, length);
        answer!(self, ino, "fallocate", reply, allocated, |()| reply.ok());
    }

    fn lseek(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        let _turn = self.begin();
        if self.filesystem.options().writeback {
            // There may be data in the kernel's cache that is a hole here. To
            // the kernel this says that everything is data.
            return reply.error(Errno::ENOSYS);
        }
        let whence = match whence {
            libc::SEEK_DATA => Seek::Data,
            libc::SEEK_HOLE => Seek::Hole,
            _ => return reply.error(Errno::EINVAL),
        };
        let Ok(offset) = u64::try_from(offset) else {
            return reply.error(Errno::ENXIO);
        };
        let found = self.filesystem.lseek(fh.0, offset, whence);
        answer!(self, ino, "lseek", reply, found, |found| {
            reply.offset(i64::try_from(found).unwrap_or(i64::MAX));
        });
    }

    fn opendir(&self, _req: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        let _turn = self.begin();
        let opened = self.filesystem.opendir(NodeId(ino.0));
        answer!(self, ino, "opendir", reply, opened, |handle| {
            reply.opened(FileHandle(handle), FopenFlags::empty());
        });
    }

    fn readdir(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let _turn = self.begin();
        let listed = self.list(ino, fh, offset, |id, next, kind, name, _path| {
            Some(reply.add(INodeNo(id.0), next, file_type(kind), name))
        });
        answer!(self, ino, "readdir", reply, listed, |()| reply.ok());
    }

    fn readdirplus(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        let _turn = self.begin();
        let listed = self.list(ino, fh, offset, |id, next, _kind, name, path| {
            let Some(path) = path else {
                // The kernel counts no reference for these two.
                let attributes = self.filesystem.getattr(id).ok()?;
                let attr = file_attr(&attributes);
                return Some(reply.add(attr.ino, next, name, &TTL, &attr, Generation(0)));
            };
            let attributes = self.filesystem.hold(path.to_path_buf()).ok()?;
            let attr = file_attr(&attributes);
            let full = reply.add(attr.ino, next, name, &TTL, &attr, Generation(0));
            if full {
                self.filesystem.forget(attributes.id, 1);
            }
            Some(full)
        });
        answer!(self, ino, "readdirplus", reply, listed, |()| reply.ok());
    }

    fn releasedir(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        reply: ReplyEmpty,
    ) {
        let _turn = self.begin();
        self.filesystem.releasedir(fh.0);
        reply.ok();
    }

    fn fsyncdir(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        let _turn = self.begin();
        let synced = self.filesystem.fsyncdir(NodeId(ino.0));
        answer!(self, ino, "fsyncdir", reply, synced, |()| reply.ok());
    }

    fn statfs(&self, _req: &Request, ino: INodeNo, reply: ReplyStatfs) {
        let _turn = self.begin();
        answer!(
            self,
            ino,
            "statfs",
            reply,
            self.filesystem.statfs(),
            |vfs| {
                reply.statfs(
                    vfs.blocks(),
                    vfs.blocks_free(),
                    vfs.blocks_available(),
                    vfs.files(),
                    vfs.files_free(),
                    u32::try_from(vfs.block_size()).unwrap_or(4096),
                    u32::try_from(vfs.name_max()).unwrap_or(255),
                    u32::try_from(vfs.fragment_size()).unwrap_or(4096),
                );
            }
        );
    }

    fn getxattr(&self, _req: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        let _turn = self.begin();
        let value = self.filesystem.getxattr(NodeId(ino.0), name);
        answer!(self, ino, "getxattr", reply, value, |value| {
            send_xattr(&value, size, reply);
        });
    }

    fn listxattr(&self, _req: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        let _turn = self.begin();
        let names = self.filesystem.listxattr(NodeId(ino.0));
        answer!(self, ino, "listxattr", reply, names, |names| {
            let mut list = Vec::new();
            for name in names {
                list.extend_from_slice(name.as_bytes());
                list.push(0);
            }
            send_xattr(&list, size, reply);
        });
    }

    fn setxattr(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _name: &OsStr,
        _value: &[u8],
        _flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::EOPNOTSUPP);
    }

    fn removexattr(&self, _req: &Request, _ino: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EOPNOTSUPP);
    }

    fn readlink(&self, _req: &Request, _ino: INodeNo, reply: ReplyData) {
        reply.error(Errno::EINVAL);
    }

    fn mknod(
        &self,
        _req: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _mode: u32,
        _umask: u32,
        _rdev: u32,
        reply: ReplyEntry,
    ) {
        reply.error(Errno::EPERM);
    }

    fn mkdir(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        reply: ReplyEntry,
    ) {
        let _turn = self.begin();
        let made = self
            .filesystem
            .mkdir(NodeId(parent.0), name, birth(req, mode));
        answer!(self, parent, "mkdir", reply, made, |attributes| {
            reply.entry(&TTL, &file_attr(&attributes), Generation(0));
        });
    }

    fn create(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let _turn = self.begin();
        let how = Creation {
            birth: birth(req, mode),
            exclusive: flags & libc::O_EXCL != 0,
            writable: flags & libc::O_ACCMODE != libc::O_RDONLY,
        };
        let way = |file: BorrowedFd<'_>| self.way(|| reply.open_backing(file));
        let made = self
            .filesystem
            .create_passing(NodeId(parent.0), name, how, &way);
        answer!(self, parent, "create", reply, made, |(
            attributes,
            opened,
        )| {
            let attr = file_attr(&attributes);
            let (first, none) = (Generation(0), FopenFlags::empty());
            let handle = FileHandle(opened.handle);
            match backing(&opened) {
                Some(way) => reply.created_passthrough(&TTL, &attr, first, handle, none, way),
                None => reply.created(&TTL, &attr, first, handle, none),
            }
        });
    }

    fn unlink(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let _turn = self.begin();
        let removed = self.filesystem.unlink(NodeId(parent.0), name);
        answer!(self, parent, "unlink", reply, removed, |()| reply.ok());
    }

    fn rmdir(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let _turn = self.begin();
        let removed = self.filesystem.rmdir(NodeId(parent.0), name);
        answer!(self, parent, "rmdir", reply, removed, |()| reply.ok());
    }

    fn rename(
        &self,
        _req: &Request,
        parent: INodeNo,
        name: &OsStr,
        newparent: INodeNo,
        newname: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let _turn = self.begin();
        if !RenameFlags::RENAME_NOREPLACE.contains(flags) {
            return reply.error(Errno::EINVAL);
        }
        let (from, to) = (NodeId(parent.0), NodeId(newparent.0));
        let renamed = self
            .filesystem
            .rename(from, name, to, newname, flags.is_empty());
        answer!(self, parent, "rename", reply, renamed, |()| reply.ok());
    }

    fn symlink(
        &self,
        _req: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _target: &Path,
        reply: ReplyEntry,
    ) {
        reply.error(Errno::EPERM);
    }

    fn link(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _newparent: INodeNo,
        _newname: &OsStr,
        reply: ReplyEntry,
    ) {
        reply.error(Errno::EPERM);
    }

    fn ioctl(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _flags: fuser::IoctlFlags,
        _cmd: u32,
        _in_data: &[u8],
        _out_size: u32,
        reply: ReplyIoctl,
    ) {
        reply.error(Errno::ENOTTY);
    }
}
