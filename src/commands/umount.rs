//! `instar umount`: unmounts, and waits for what umount(8) does not wait for:
//! that the daemon has flushed and released every image.
#![allow(unsafe_code)]

use super::{Error, warn};
use instar::fs::device::{self, Mounted};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd as _, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

/// Arguments of `umount`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Where the images are mounted
    #[arg(value_name = "MOUNTPOINT")]
    mountpoint: PathBuf,
}

/// Runs `umount`.
pub fn run(args: &Args) -> Result<(), Error> {
    let name = args.mountpoint.display();
    let fail = || Error::system(format!("{name}"));
    let mountpoint = device::absolute_mountpoint(&args.mountpoint).map_err(fail())?;
    let mounted = device::mounted_at(&mountpoint).map_err(fail())?;
    let Some(mounted) = mounted.filter(|mounted| mounted.kind == device::TYPE) else {
        return Err(Error::Refused(format!(
            "{name}: no images are mounted there"
        )));
    };
    match daemon_of(&mountpoint) {
        Err(error) if device::is_dead(&error) => device::detach(&mountpoint, true).map_err(fail()),
        daemon => {
            device::detach(&mountpoint, false).map_err(|error| match error.raw_os_error() {
                Some(libc::EBUSY) => {
                    Error::Refused(format!("{name}: in use; 'fuser -vm {name}' shows by whom"))
                }
                _ => fail()(error),
            })?;
            await_end(daemon, &mounted, &mountpoint)
        }
    }
}

/// Waits for the end of the daemon, unless it goes on serving another mount of
/// the same filesystem.
fn await_end(
    daemon: io::Result<OwnedFd>,
    mounted: &Mounted,
    mountpoint: &Path,
) -> Result<(), Error> {
    let name = mountpoint.display();
    let elsewhere = device::mounts()
        .unwrap_or_default()
        .into_iter()
        .find(|other| other.device == mounted.device);
    if let Some(other) = elsewhere {
        warn(&format!(
            "{name} is unmounted, but its images are mounted on {} too",
            other.mountpoint.display()
        ));
        return Ok(());
    }
    let daemon = match daemon {
        Ok(daemon) => daemon,
        Err(error) => {
            warn(&format!(
                "{name} is unmounted, but its daemon could not be waited for: {error}"
            ));
            return Ok(());
        }
    };
    let mut ends = [PollFd::new(daemon.as_fd(), PollFlags::POLLIN)];
    loop {
        match poll(&mut ends, PollTimeout::NONE) {
            Err(Errno::EINTR) => {}
            Err(errno) => {
                return Err(Error::system(format!("{name}"))(errno.into()));
            }
            Ok(_) => return Ok(()),
        }
    }
}

/// A descriptor of the process behind a mount, which says itself who it is.
fn daemon_of(mountpoint: &Path) -> io::Result<OwnedFd> {
    let pid = daemon_pid(mountpoint)?;
    // SAFETY: the call takes two numbers and answers a new descriptor.
    let descriptor = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let descriptor = Errno::result(descriptor)?;
    let descriptor = RawFd::try_from(descriptor).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made this descriptor for us.
    let daemon = unsafe { OwnedFd::from_raw_fd(descriptor) };
    // It still answers, so nobody else has its number.
    if daemon_pid(mountpoint)? == pid {
        Ok(daemon)
    } else {
        Err(io::Error::other("it was mounted anew meanwhile"))
    }
}

fn daemon_pid(mountpoint: &Path) -> io::Result<libc::pid_t> {
    let path = CString::new(mountpoint.as_os_str().as_bytes())?;
    let mut value = [0_u8; 16];
    // SAFETY: both strings end with a zero byte, and the length is that of the
    // buffer.
    let len = unsafe {
        libc::getxattr(
            path.as_ptr(),
            c"user.instar.pid".as_ptr(),
            value.as_mut_ptr().cast(),
            value.len(),
        )
    };
    let len = usize::try_from(Errno::result(len)?).unwrap_or(0);
    value
        .get(..len)
        .and_then(|value| std::str::from_utf8(value).ok())
        .and_then(|value| value.parse().ok())
        .ok_or_else(|| io::Error::other("the mount does not say who serves it"))
}
