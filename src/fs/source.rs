//! The files below SOURCE, reached from one descriptor that was opened before
//! the mount.
//!
//! Every access starts at that descriptor and follows no symbolic link, so
//! neither a mount on top of SOURCE nor a link planted inside it can lead
//! elsewhere. Only directories and regular files exist here. No image is
//! opened or interpreted in this module.

use super::error::Result;
use super::reached::Reached;
use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat, fstatat};
use nix::sys::statvfs::{Statvfs, fstatvfs};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

/// Which file it is, whatever its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FileId {
    /// Device number.
    pub dev: u64,
    /// Inode number.
    pub ino: u64,
}

/// The two kinds of files that are walked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A directory.
    Directory,
    /// A regular file.
    File,
}

/// A point in time as the source file system records it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Time {
    /// Seconds since the epoch.
    pub sec: i64,
    /// Nanoseconds, below 1 000 000 000.
    pub nsec: u32,
}

/// The attributes of a source file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stat {
    /// Which file it is.
    pub id: FileId,
    /// Directory or regular file.
    pub kind: Kind,
    /// Length in bytes.
    pub size: u64,
    /// Allocated 512-byte blocks.
    pub blocks: u64,
    /// Preferred unit of I/O in bytes.
    pub blksize: u32,
    /// Permission bits, with set-id and sticky bits.
    pub perm: u16,
    /// Hard links.
    pub nlink: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Last access.
    pub atime: Time,
    /// Last change of the content.
    pub mtime: Time,
    /// Last change of content or attributes.
    pub ctime: Time,
}

/// One name in a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Name {
    /// The name.
    pub name: OsString,
    /// What it is.
    pub kind: Kind,
}

/// New times for a file; `None` leaves one as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NewTime {
    /// The current time.
    Now,
    /// That time.
    At(Time),
}

/// The tree below SOURCE, or the one image that SOURCE is.
pub struct Source {
    root: OwnedFd,
    path: PathBuf,
    only: Option<OsString>,
    /// Paths that the kernel has been asked to follow.
    #[cfg(test)]
    pub(super) asked: std::sync::atomic::AtomicUsize,
}

impl Source {
    /// Opens SOURCE: a directory, or one image, which then is the only file of
    /// its directory that exists here.
    pub fn open(path: &Path) -> std::io::Result<Self> {
        let path = path.canonicalize()?;
        let metadata = path.metadata()?;
        let (path, only) = if metadata.is_dir() {
            (path, None)
        } else if metadata.is_file() {
            let name = path.file_name().map(OsStr::to_os_string);
            let parent = path.parent().map_or(PathBuf::from("/"), Path::to_path_buf);
            (parent, name)
        } else {
            return Err(std::io::Error::other(
                "neither a directory nor a regular file",
            ));
        };
        let root = nix::fcntl::open(
            &path,
            OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC,
            Mode::empty(),
        )?;
        Ok(Self {
            root,
            path,
            only,
            #[cfg(test)]
            asked: Default::default(),
        })
    }

    /// Canonical path of the directory at the root.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Descriptor of the directory at the root.
    pub fn root(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }

    /// Another handle of the same tree.
    pub fn try_clone(&self) -> std::io::Result<Self> {
        Ok(Self {
            root: self.root.try_clone()?,
            path: self.path.clone(),
            only: self.only.clone(),
            #[cfg(test)]
            asked: Default::default(),
        })
    }

    /// Whether SOURCE is a directory, and not one image.
    pub fn is_directory(&self) -> bool {
        self.only.is_none()
    }

    /// Where a file below the root lies, for messages.
    pub fn display(&self, relative: &Path) -> PathBuf {
        self.path.join(relative)
    }

    /// Attributes of a directory or regular file; anything else does not exist.
    pub fn stat(&self, relative: &Path) -> Result<Stat> {
        self.reach(relative)?.stat()
    }

    /// Opens a regular file without waiting for anything.
    pub fn open_file(&self, relative: &Path, write: bool) -> Result<(File, Stat)> {
        let mode = if write {
            OFlag::O_RDWR
        } else {
            OFlag::O_RDONLY
        };
        let fd = self.openat(relative, mode | OFlag::O_NONBLOCK | OFlag::O_NOCTTY)?;
        let stat = Stat::of(&fstat(&fd)?).ok_or(Errno::ENOENT)?;
        match stat.kind {
            Kind::File => Ok((File::from(fd), stat)),
            Kind::Directory => Err(Errno::EISDIR.into()),
        }
    }

    /// Opens the directory in which a file lies.
    pub fn open_parent(&self, relative: &Path) -> Result<OwnedFd> {
        let parent = relative.parent().unwrap_or(Path::new(""));
        self.openat(parent, OFlag::O_RDONLY | OFlag::O_DIRECTORY)
    }

    /// The directories and regular files of a directory, in no order.
    pub fn list(&self, relative: &Path) -> Result<Vec<Name>> {
        let fd = self.openat(relative, OFlag::O_RDONLY | OFlag::O_DIRECTORY)?;
        let mut names = Vec::new();
        for entry in Dir::from_fd(fd)?.iter() {
            let entry = entry?;
            let name = OsStr::from_bytes(entry.file_name().to_bytes());
            if name == "." || name == ".." || !self.admits(&relative.join(name)) {
                continue;
            }
            let kind = match entry.file_type() {
                Some(nix::dir::Type::Directory) => Some(Kind::Directory),
                Some(nix::dir::Type::File) => Some(Kind::File),
                Some(_) => None,
                None => self.stat(&relative.join(name)).ok().map(|stat| stat.kind),
            };
            if let Some(kind) = kind {
                names.push(Name {
                    name: name.to_os_string(),
                    kind,
                });
            }
        }
        Ok(names)
    }

    /// Attributes of names of one directory, at one call each; `None` where
    /// there is neither a file nor a directory any more.
    pub fn stat_in(&self, directory: &Path, names: &[Name]) -> Result<Vec<Option<Stat>>> {
        let fd = self.openat(directory, OFlag::O_PATH | OFlag::O_DIRECTORY)?;
        let stat = |name: &Name| {
            let raw = fstatat(&fd, name.name.as_os_str(), AtFlags::AT_SYMLINK_NOFOLLOW);
            raw.ok().and_then(|raw| Stat::of(&raw))
        };
        Ok(names.iter().map(stat).collect())
    }

    /// The file of this tree that an image at `relative` names, if it names one
    /// and the file exists. Nothing is opened for reading.
    pub fn resolve(&self, relative: &Path, name: &str) -> Option<Stat> {
        let target = self.named(relative, name)?;
        self.target(&target, ResolveFlag::empty()).ok()?
    }

    /// The same, and whether it takes a change of the image's directory to make
    /// the name lead elsewhere.
    pub fn resolve_in(&self, relative: &Path, name: &str) -> (Option<Stat>, bool) {
        let Some(target) = self.named(relative, name) else {
            return (None, true);
        };
        match self.target(&target, ResolveFlag::RESOLVE_NO_SYMLINKS) {
            Err(Errno::ELOOP) => (self.resolve(relative, name), false),
            found => {
                let stays = target.parent() == relative.parent();
                (found.ok().flatten(), stays)
            }
        }
    }

    /// Where below the root the file is that an image at `relative` names.
    pub(super) fn named(&self, relative: &Path, name: &str) -> Option<PathBuf> {
        let name = name.strip_prefix("file:").unwrap_or(name);
        match Path::new(name).strip_prefix(&self.path) {
            Ok(below) => Some(below.to_path_buf()),
            Err(_) if name.starts_with('/') => None,
            Err(_) => Some(relative.parent()?.join(name)),
        }
    }

    fn target(&self, target: &Path, also: ResolveFlag) -> nix::Result<Option<Stat>> {
        let beneath = ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_MAGICLINKS;
        let how = OpenHow::new()
            .flags(OFlag::O_PATH | OFlag::O_CLOEXEC)
            .resolve(beneath | also);
        let fd = self.resolved(target, how)?;
        Ok(Stat::of(&fstat(fd)?))
    }

    /// Space and files of the file system that holds the root.
    pub fn statvfs(&self) -> Result<Statvfs> {
        Ok(fstatvfs(&self.root)?)
    }

    /// A descriptor that names the file and can do nothing with its content.
    pub fn reach(&self, relative: &Path) -> Result<Reached> {
        if !self.admits(relative) {
            return Err(Errno::ENOENT.into());
        }
        Ok(Reached::new(self.openat(relative, OFlag::O_PATH)?))
    }

    pub(super) fn openat(&self, relative: &Path, flags: OFlag) -> Result<OwnedFd> {
        let how = OpenHow::new()
            .flags(flags | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC)
            .resolve(
                ResolveFlag::RESOLVE_BENEATH
                    | ResolveFlag::RESOLVE_NO_SYMLINKS
                    | ResolveFlag::RESOLVE_NO_MAGICLINKS,
            );
        let path = if relative.as_os_str().is_empty() {
            Path::new(".")
        } else {
            relative
        };
        match self.resolved(path, how) {
            Err(Errno::ELOOP) => Err(Errno::ENOENT.into()),
            other => Ok(other?),
        }
    }

    fn resolved(&self, path: &Path, how: OpenHow) -> nix::Result<OwnedFd> {
        #[cfg(test)]
        self.asked
            .fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        loop {
            match openat2(&self.root, path, how) {
                // A rename somewhere in the tree while it was resolved, which
                // says nothing about the path.
                Err(Errno::EAGAIN | Errno::EINTR) => {}
                other => return other,
            }
        }
    }

    /// Whether the path is part of what SOURCE offers.
    fn admits(&self, relative: &Path) -> bool {
        let Some(only) = &self.only else {
            return true;
        };
        let mut parts = relative.components();
        match (parts.next(), parts.next()) {
            (None, _) => true,
            (Some(Component::Normal(name)), None) => name == only,
            _ => false,
        }
    }
}

impl Stat {
    /// The attributes, unless it is neither a directory nor a regular file.
    pub fn of(raw: &FileStat) -> Option<Self> {
        let kind = match SFlag::from_bits_truncate(raw.st_mode & SFlag::S_IFMT.bits()) {
            SFlag::S_IFDIR => Kind::Directory,
            SFlag::S_IFREG => Kind::File,
            _ => return None,
        };
        Some(Self {
            id: FileId {
                dev: raw.st_dev,
                ino: raw.st_ino,
            },
            kind,
            size: u64::try_from(raw.st_size).ok()?,
            blocks: u64::try_from(raw.st_blocks).ok()?,
            blksize: u32::try_from(raw.st_blksize).unwrap_or(4096),
            perm: u16::try_from(raw.st_mode & 0o7777).unwrap_or(0),
            nlink: u32::try_from(raw.st_nlink).unwrap_or(u32::MAX),
            uid: raw.st_uid,
            gid: raw.st_gid,
            atime: Time::new(raw.st_atime, raw.st_atime_nsec),
            mtime: Time::new(raw.st_mtime, raw.st_mtime_nsec),
            ctime: Time::new(raw.st_ctime, raw.st_ctime_nsec),
        })
    }
}

impl Time {
    /// A time as stat(2) gives it.
    pub fn new(sec: i64, nsec: i64) -> Self {
        Self {
            sec,
            nsec: u32::try_from(nsec).unwrap_or(0),
        }
    }
}

#[cfg(test)]
#[path = "source_tests.rs"]
mod tests;
