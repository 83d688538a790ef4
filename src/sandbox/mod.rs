//! The sandbox: where image metadata is read.
//!
//! A [`Pool`] hands out [`Session`]s. A session is one guest program that
//! serves one image: in a micro-VM without devices, or, where KVM is missing,
//! in a process without system calls. [`Session::call`] sends it a request,
//! serves what it asks for within [`Limits`], and returns its reply. Everything
//! that the guest says is untrusted: it is copied, bounded, then decoded, and
//! each way to fail has its own [`SandboxError`].
//!
//! What may not enter: knowledge of image formats, of paths and of locks. What a
//! session may read is behind [`Files`].

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
compile_error!("the sandbox is made for Linux on x86-64");

mod error;
mod kvm;
mod limits;
mod machine;
mod pool;
mod process;
mod program;
mod session;
mod text;
mod window;

pub use error::{CallError, Crash, ProgramError, SandboxError};
pub use limits::{Allowance, Limits};
pub use pool::{ChosenIsolation, Config, Isolation, Pool, UnknownIsolation};
pub use program::GuestProgram;
pub use session::{Counters, Session};
pub use text::{escape, escape_deceptive};

use instar_guest::findings::Finding;
use instar_guest::plan::Plan;
use instar_guest::proto::FileNo;
use std::io;
use vm_memory::VolatileSlice;

/// The id of this build of host and guest, in hexadecimal. A guest that was
/// built from other sources is refused.
pub const BUILD_ID: &str = env!("INSTAR_BUILD_ID");

/// What a session may read and, during a streamed plan, change.
pub trait Files {
    /// Length in bytes. An error says that the session has no such file.
    fn len(&mut self, file: FileNo) -> io::Result<u64>;

    /// Fills `dst` with the bytes from `offset` on; past the end of the file
    /// come zeroes. `offset + dst.len()` fits an `i64`.
    fn read_at(&mut self, file: FileNo, offset: u64, dst: VolatileSlice<'_>) -> io::Result<()>;

    /// Executes a first part of a plan.
    fn stream(&mut self, part: Plan) -> io::Result<()>;

    /// Takes what a check has found. Refused where no check was asked for.
    fn tell(&mut self, _findings: Vec<Finding>) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// Why KVM cannot be used on this machine, if it cannot. Creates a VM and enters
/// it, so a positive answer is proven.
pub fn probe_kvm() -> Result<(), SandboxError> {
    probe(Isolation::Kvm)
}

/// Why the process sandbox cannot be used on this machine, if it cannot.
pub fn probe_process() -> Result<(), SandboxError> {
    probe(Isolation::Process)
}

/// Any answer of the guest proves that the sandbox works.
fn probe(isolation: Isolation) -> Result<(), SandboxError> {
    let pool = Pool::new(Config {
        isolation,
        ..Config::default()
    })?;
    match pool
        .session()?
        .call(&instar_guest::Request::Undo, &mut Nothing)
    {
        Ok(_) | Err(CallError::Refused(_)) => Ok(()),
        Err(CallError::Sandbox(error)) => Err(error),
    }
}

/// No files at all.
struct Nothing;

impl Files for Nothing {
    fn len(&mut self, _: FileNo) -> io::Result<u64> {
        Err(io::ErrorKind::NotFound.into())
    }

    fn read_at(&mut self, _: FileNo, _: u64, _: VolatileSlice<'_>) -> io::Result<()> {
        Err(io::ErrorKind::NotFound.into())
    }

    fn stream(&mut self, _: Plan) -> io::Result<()> {
        Err(io::ErrorKind::NotFound.into())
    }
}
