//! Making, removing and renaming files and directories of the tree.
//!
//! A change is made in the directory that the path leads to without a symbolic
//! link, opened first; the last component is never followed. That directory is
//! compared with the one that was looked up, whose permissions the kernel has
//! asked; and what a name stands for with what the caller looked at, before it
//! is taken away.

use super::error::{Error, Result};
use super::source::{FileId, Kind, Source, Stat};
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, RenameFlags, openat, renameat2};
use nix::sys::stat::{FileStat, Mode, fchmod, fstat, fstatat, mkdirat};
use nix::unistd::{Gid, Uid, UnlinkatFlags, fchown, geteuid, unlinkat};
use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

/// Who owns a new file or directory, and who may do what with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Birth {
    /// Permission bits, the umask applied.
    pub perm: u32,
    /// Owner.
    pub uid: u32,
    /// Group, unless the directory gives its own to all files in it.
    pub gid: u32,
}

/// A name in a directory that was looked up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spot {
    /// Path below SOURCE.
    pub path: PathBuf,
    /// Which directory it has to be in: ESTALE if another has its name by now.
    pub directory: FileId,
}

impl Source {
    /// Makes an empty file where there is nothing.
    pub fn create_file(&self, spot: &Spot, birth: Birth) -> Result<Stat> {
        let (dir, name) = self.place(spot)?;
        let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW;
        let fd = openat(&dir, name, flags | OFlag::O_CLOEXEC, Mode::S_IRUSR)?;
        own(&dir, &fd, birth).inspect_err(|_| {
            // The failure at hand is the one to tell.
            let _ = unlinkat(&dir, name, UnlinkatFlags::NoRemoveDir);
        })
    }

    /// Makes a directory where there is nothing.
    pub fn create_directory(&self, spot: &Spot, birth: Birth) -> Result<Stat> {
        let (dir, name) = self.place(spot)?;
        mkdirat(&dir, name, Mode::S_IRWXU)?;
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let opened = openat(&dir, name, flags, Mode::empty()).map_err(Error::from);
        opened
            .and_then(|fd| own(&dir, &fd, birth))
            .inspect_err(|_| {
                let _ = unlinkat(&dir, name, UnlinkatFlags::RemoveDir);
            })
    }

    /// Removes the name of a file or of an empty directory.
    pub fn remove(&self, spot: &Spot, expected: &Stat) -> Result<()> {
        let (dir, name) = self.place(spot)?;
        check(&dir, name, expected.id)?;
        let how = match expected.kind {
            Kind::Directory => UnlinkatFlags::RemoveDir,
            Kind::File => UnlinkatFlags::NoRemoveDir,
        };
        Ok(unlinkat(&dir, name, how)?)
    }

    /// Gives a file or directory another name: over the file that has it, or
    /// where there is nothing.
    pub fn rename(&self, from: &Spot, of: FileId, to: &Spot, over: Option<FileId>) -> Result<()> {
        let (from_dir, from_name) = self.place(from)?;
        let (to_dir, to_name) = self.place(to)?;
        check(&from_dir, from_name, of)?;
        let flags = match over {
            Some(over) => {
                check(&to_dir, to_name, over)?;
                RenameFlags::empty()
            }
            None => RenameFlags::RENAME_NOREPLACE,
        };
        let rename = |flags| renameat2(&from_dir, from_name, &to_dir, to_name, flags);
        match rename(flags) {
            // Not every file system can look and rename at once.
            Err(Errno::EINVAL) if over.is_none() && is_free(&to_dir, to_name)? => {
                Ok(rename(RenameFlags::empty())?)
            }
            done => Ok(done?),
        }
    }

    /// Makes the names in a directory durable.
    pub fn sync_directory(&self, path: &Path) -> Result<()> {
        let fd = self.openat(path, OFlag::O_RDONLY | OFlag::O_DIRECTORY)?;
        Ok(File::from(fd).sync_all()?)
    }

    /// Whether anything at all has that name.
    pub fn is_taken(&self, spot: &Spot) -> Result<bool> {
        let (dir, name) = self.place(spot)?;
        Ok(!is_free(&dir, name)?)
    }

    /// The directory in which a name is, and the name.
    fn place<'a>(&self, spot: &'a Spot) -> Result<(OwnedFd, &'a OsStr)> {
        let name = spot.path.file_name().ok_or(Errno::EINVAL)?;
        let directory = self.open_parent(&spot.path)?;
        match id_of(&fstat(&directory)?) == spot.directory {
            true => Ok((directory, name)),
            false => Err(Errno::ESTALE.into()),
        }
    }
}

/// Refuses a name that stands for something else by now.
fn check(dir: &OwnedFd, name: &OsStr, expected: FileId) -> Result<()> {
    let found = fstatat(dir, name, AtFlags::AT_SYMLINK_NOFOLLOW)?;
    match id_of(&found) == expected {
        true => Ok(()),
        false => Err(Errno::ESTALE.into()),
    }
}

fn id_of(found: &FileStat) -> FileId {
    FileId {
        dev: found.st_dev,
        ino: found.st_ino,
    }
}

fn is_free(dir: &OwnedFd, name: &OsStr) -> Result<bool> {
    match fstatat(dir, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
        Ok(_) => Ok(false),
        Err(Errno::ENOENT) => Ok(true),
        Err(errno) => Err(errno.into()),
    }
}

/// Gives what was made just now to whom it belongs. A directory with the set-gid
/// bit has given its group, and to directories its bit, already.
fn own(dir: &OwnedFd, made: &OwnedFd, birth: Birth) -> Result<Stat> {
    let inherits = fstat(dir)?.st_mode & libc::S_ISGID != 0;
    let found = Stat::of(&fstat(made)?).ok_or(Errno::EIO)?;
    let uid = (found.uid != birth.uid).then(|| Uid::from_raw(birth.uid));
    let gid = (found.gid != birth.gid && !inherits).then(|| Gid::from_raw(birth.gid));
    if uid.is_some() || gid.is_some() {
        // A group that an ordinary user does not belong to is no reason to fail.
        match fchown(made.as_fd(), uid, gid) {
            Err(Errno::EPERM) if uid.is_none() && !geteuid().is_root() => {}
            done => done?,
        }
    }
    let kept = match (inherits, found.kind) {
        (true, Kind::Directory) => u32::from(found.perm) & libc::S_ISGID,
        _ => 0,
    };
    fchmod(made, Mode::from_bits_truncate(birth.perm | kept))?;
    Ok(Stat::of(&fstat(made)?).ok_or(Errno::EIO)?)
}
