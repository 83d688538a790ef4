//! A source file by a descriptor that names it and can do nothing with its
//! content: it is the same file whatever becomes of its name.

use super::error::Result;
use super::source::{NewTime, Stat};
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags};
use nix::sys::stat::{FchmodatFlags, Mode, UtimensatFlags};
use nix::sys::stat::{fchmodat, fstat, utimensat};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, Uid};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::PathBuf;

/// See the module.
#[derive(Debug)]
pub struct Reached(OwnedFd);

impl Reached {
    /// What an `O_PATH` descriptor names.
    pub(super) fn new(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// Its attributes; anything but a directory or a regular file does not
    /// exist.
    pub fn stat(&self) -> Result<Stat> {
        Ok(Stat::of(&fstat(&self.0)?).ok_or(Errno::ENOENT)?)
    }

    /// Sets the permission bits.
    pub fn chmod(&self, perm: u32) -> Result<()> {
        let mode = Mode::from_bits_truncate(perm);
        Ok(fchmodat(
            AT_FDCWD,
            &self.proc_path(),
            mode,
            FchmodatFlags::FollowSymlink,
        )?)
    }

    /// Sets owner and group; `None` leaves one as it is.
    pub fn chown(&self, uid: Option<u32>, gid: Option<u32>) -> Result<()> {
        Ok(nix::unistd::fchownat(
            self.0.as_fd(),
            "",
            uid.map(Uid::from_raw),
            gid.map(Gid::from_raw),
            AtFlags::AT_EMPTY_PATH,
        )?)
    }

    /// Sets the times of access and modification.
    pub fn utimens(&self, atime: Option<NewTime>, mtime: Option<NewTime>) -> Result<()> {
        Ok(utimensat(
            AT_FDCWD,
            &self.proc_path(),
            &time_spec(atime),
            &time_spec(mtime),
            UtimensatFlags::FollowSymlink,
        )?)
    }

    /// A path by which calls that take no descriptor reach what this one names.
    fn proc_path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.0.as_raw_fd()))
    }
}

fn time_spec(time: Option<NewTime>) -> TimeSpec {
    match time {
        None => TimeSpec::UTIME_OMIT,
        Some(NewTime::Now) => TimeSpec::UTIME_NOW,
        Some(NewTime::At(time)) => TimeSpec::new(time.sec, i64::from(time.nsec)),
    }
}
