//! Starting the guest process.
#![allow(unsafe_code)]

use super::errno;
use crate::sandbox::error::SandboxError;
use crate::sandbox::program::GuestProgram;
use instar_guest::layout::WINDOW;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::resource::rlim_t;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::unistd::Pid;
use std::ffi::CStr;
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use vm_memory::{FileOffset, MmapRegion};

/// A child that is on its way into the sandbox.
pub(super) struct Started {
    pub(super) child: Child,
    pub(super) socket: OwnedFd,
    pub(super) window: MmapRegion,
}

/// Starts the program with a socket as descriptor 0 and its memory as 1.
pub(super) fn start(program: &GuestProgram, memory: u64) -> Result<Started, SandboxError> {
    let (socket, theirs) = socketpair(
        AddressFamily::Unix,
        SockType::Stream,
        None,
        SockFlag::SOCK_CLOEXEC,
    )
    .map_err(|errno| SandboxError::Host("make a socket", errno))?;
    let (memory, window) = window(memory - WINDOW)?;
    let executable = program.executable()?;
    let child = Command::new(format!("/proc/self/fd/{}", executable.as_raw_fd()))
        .arg0("instar-guest")
        .env_clear()
        .stdin(theirs)
        .stdout(memory)
        .stderr(Stdio::null())
        .spawn()
        .map_err(|error| SandboxError::Host("start the guest's process", errno(&error)))?;
    Ok(Started {
        child,
        socket,
        window,
    })
}

/// Memory to share with the child: its length can never change, so that no
/// access to the mapping can fail.
fn window(len: u64) -> Result<(File, MmapRegion), SandboxError> {
    let failed = |errno| SandboxError::Host("reserve memory for the guest", errno);
    let file = File::from(memfd(c"instar-window", libc::MFD_NOEXEC_SEAL).map_err(failed)?);
    file.set_len(len).map_err(|error| failed(errno(&error)))?;
    seal(&file, SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW).map_err(failed)?;
    let shared = file.try_clone().map_err(|error| failed(errno(&error)))?;
    let region = MmapRegion::from_file(FileOffset::new(shared, 0), len as usize)
        .map_err(|_| failed(Errno::ENOMEM))?;
    Ok((file, region))
}

/// A program in memory that can be executed and never changed.
pub(in crate::sandbox) fn executable(elf: &[u8]) -> Result<OwnedFd, SandboxError> {
    let failed = |errno| SandboxError::Host("keep the program in memory", errno);
    let mut file = File::from(memfd(c"instar-guest", libc::MFD_EXEC).map_err(failed)?);
    file.write_all(elf).map_err(|error| failed(errno(&error)))?;
    let all = SealFlag::F_SEAL_SHRINK
        | SealFlag::F_SEAL_GROW
        | SealFlag::F_SEAL_WRITE
        | SealFlag::F_SEAL_SEAL;
    seal(&file, all).map_err(failed)?;
    Ok(file.into())
}

fn seal(file: &File, seals: SealFlag) -> Result<(), Errno> {
    fcntl(file, FcntlArg::F_ADD_SEALS(seals)).map(|_| ())
}

/// An anonymous file. Linux before 6.3 does not know `exec`, which says whether
/// the file may be executed.
fn memfd(name: &CStr, exec: libc::c_uint) -> Result<OwnedFd, Errno> {
    let base = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    let create = |flags| {
        // SAFETY: the name is a terminated string.
        let fd = Errno::result(unsafe { libc::memfd_create(name.as_ptr(), flags) })?;
        // SAFETY: a new descriptor that nobody else owns.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    };
    match create(base | exec) {
        Err(Errno::EINVAL) => create(base),
        result => result,
    }
}

/// Sets the CPU time after which the kernel kills the process.
pub(super) fn limit_cpu(pid: Pid, seconds: rlim_t) -> Result<(), SandboxError> {
    let limit = libc::rlimit {
        rlim_cur: seconds,
        rlim_max: seconds,
    };
    // SAFETY: the new limit is a local; the old one is not asked for.
    let result = unsafe {
        libc::prlimit(
            pid.as_raw(),
            libc::RLIMIT_CPU,
            &raw const limit,
            std::ptr::null_mut(),
        )
    };
    Errno::result(result)
        .map(|_| ())
        .map_err(|errno| SandboxError::Host("limit the process's CPU time", errno))
}
