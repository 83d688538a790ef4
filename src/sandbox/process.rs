//! The sandbox where KVM is missing: the same program as a process of its own,
//! which gives up all system calls but `read`, `write` and `exit` before it sees
//! a byte of an image.
//!
//! It is started from sealed memory by `posix_spawn`, without a copy of the
//! caller's memory, with a socket, the window's memory and nothing else. The
//! doorbell is one byte on the socket in each direction.

mod spawn;

pub(super) use spawn::executable;

use super::error::{Crash, SandboxError};
use super::machine::Machine;
use super::program::GuestProgram;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::resource::rlim_t;
use nix::sys::socket::{MsgFlags, recv, send};
use nix::time::{ClockId, clock_getcpuclockid, clock_gettime};
use nix::unistd::Pid;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ExitStatus};
use std::time::Duration;
use vm_memory::{MmapRegion, VolatileMemory, VolatileSlice};

/// A running guest process.
pub(super) struct Process {
    child: Child,
    socket: OwnedFd,
    window: MmapRegion,
    clock: ClockId,
    /// Seconds of CPU time after which the kernel kills the child, even if this
    /// process is gone by then.
    fuse: rlim_t,
}

impl Process {
    /// Starts a process for the program, with as much memory as a VM of
    /// `memory` bytes has.
    pub(super) fn new(program: &GuestProgram, memory: u64) -> Result<Self, SandboxError> {
        let spawn::Started {
            child,
            socket,
            window,
        } = spawn::start(program, memory)?;
        // From here on a failure must not leave the child behind.
        let mut process = Self {
            child,
            socket,
            window,
            clock: ClockId::CLOCK_MONOTONIC,
            fuse: 0,
        };
        process.clock = clock_getcpuclockid(process.pid())
            .map_err(|errno| SandboxError::Host("find the process's clock", errno))?;
        Ok(process)
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().cast_signed())
    }

    fn cpu_time(&self) -> Result<Duration, SandboxError> {
        clock_gettime(self.clock)
            .map(Duration::from)
            .map_err(|errno| SandboxError::Host("read the CPU clock", errno))
    }

    /// Lets the child continue.
    fn wake(&mut self) -> Result<(), SandboxError> {
        match recv(self.socket.as_raw_fd(), &mut [0], MsgFlags::MSG_DONTWAIT) {
            Err(Errno::EAGAIN) => {}
            Ok(0) => return Err(self.ended()),
            Ok(_) => return Err(SandboxError::RangUnasked),
            Err(_) => return Err(self.ended()),
        }
        send(self.socket.as_raw_fd(), &[0], MsgFlags::MSG_NOSIGNAL)
            .map(|_| ())
            .map_err(|_| self.ended())
    }

    /// Waits for the child to ring, for `cpu` of its CPU time.
    fn wait(&mut self, cpu: Duration) -> Result<u32, SandboxError> {
        let start = self.cpu_time()?;
        let mut used = Duration::ZERO;
        loop {
            if self.readable(cpu.saturating_sub(used))? {
                return self.take_ring();
            }
            let now = self.cpu_time()?.saturating_sub(start);
            if now >= cpu {
                return Err(SandboxError::CpuBudget(cpu));
            }
            if now == used && self.is_asleep() && !self.readable(Duration::ZERO)? {
                return Err(SandboxError::Stalled);
            }
            used = now;
        }
    }

    fn readable(&self, timeout: Duration) -> Result<bool, SandboxError> {
        // Rounded up, so that the last wait is not a busy one.
        let millis = timeout.as_micros().div_ceil(1000).min(i32::MAX as u128);
        let timeout = PollTimeout::try_from(millis).unwrap_or(PollTimeout::MAX);
        let mut sockets = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
        match poll(&mut sockets, timeout) {
            Ok(ready) => Ok(ready > 0),
            Err(Errno::EINTR) => Ok(false),
            Err(errno) => Err(SandboxError::Host("wait for the guest", errno)),
        }
    }

    fn take_ring(&mut self) -> Result<u32, SandboxError> {
        let mut byte = [0];
        match recv(self.socket.as_raw_fd(), &mut byte, MsgFlags::MSG_DONTWAIT) {
            Ok(1) => Ok(byte[0].into()),
            _ => Err(self.ended()),
        }
    }

    /// Whether the child waits in a system call: with no byte on its way, for
    /// ever.
    fn is_asleep(&self) -> bool {
        let stat = format!("/proc/{}/stat", self.child.id());
        // The state follows the name, which is in parentheses.
        std::fs::read_to_string(stat)
            .ok()
            .and_then(|stat| Some(stat.rsplit_once(") ")?.1.starts_with('S')))
            .unwrap_or(false)
    }

    /// Why the child has closed its socket.
    fn ended(&mut self) -> SandboxError {
        match self.child.wait() {
            Ok(status) => explain(status),
            Err(error) => SandboxError::Host("wait for the guest", errno(&error)),
        }
    }

    /// Moves the kernel's own limit of the child's CPU time ahead of the budget.
    /// It matters only when this process dies while the child computes.
    fn extend_fuse(&mut self, cpu: Duration) -> Result<(), SandboxError> {
        let end = (self.cpu_time()? + cpu).as_secs() + 1;
        if end > self.fuse {
            self.fuse = end;
            spawn::limit_cpu(self.pid(), self.fuse)?;
        }
        Ok(())
    }
}

impl Machine for Process {
    fn window(&self) -> VolatileSlice<'_> {
        self.window.as_volatile_slice()
    }

    fn run(&mut self, cpu: Duration) -> Result<u32, SandboxError> {
        self.extend_fuse(cpu)?;
        self.wake()?;
        self.wait(cpu)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may be gone already; either way it must be reaped.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// What a child's end means. The statuses are those of the guest's start-up.
fn explain(status: ExitStatus) -> SandboxError {
    match (status.signal(), status.code()) {
        (Some(libc::SIGKILL), _) => SandboxError::Crashed(Crash::Killed),
        (Some(signal), _) => SandboxError::Crashed(Crash::Signal(signal)),
        (None, Some(101)) => SandboxError::Confine("map its memory"),
        (None, Some(102)) => SandboxError::Confine("close its descriptors"),
        (None, Some(103)) => SandboxError::Confine("limit its resources"),
        (None, Some(104)) => SandboxError::Confine("give up its privileges"),
        (None, Some(105)) => SandboxError::Confine("enter strict seccomp"),
        (None, code) => SandboxError::Crashed(Crash::Exited(code.unwrap_or(-1))),
    }
}

fn errno(error: &std::io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}
