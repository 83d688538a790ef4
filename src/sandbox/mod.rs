//! The sandbox's interface.

use instar_guest::{Failure, FileNo, Plan, Reply, Request};
use std::io;
use std::sync::Arc;

/// What a session may read.
pub trait Files {
    /// Length of a file in bytes.
    fn len(&mut self, file: FileNo) -> io::Result<u64>;
    /// Reads into guest memory; zeroes past the end of the file.
    fn read_at(
        &mut self,
        file: FileNo,
        offset: u64,
        dst: vm_memory::VolatileSlice<'_>,
    ) -> io::Result<()>;
    /// Executes a streamed part of a plan.
    fn stream(&mut self, part: Plan) -> io::Result<()>;
}

/// Why a call failed.
#[derive(Debug)]
pub enum CallError {
    /// The engine refused the request.
    Refused(Failure),
    /// The sandbox ended the session.
    Sandbox(SandboxError),
}

/// Why the sandbox ended a session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SandboxError {
    /// The guest program crashed.
    Crashed,
}

impl std::fmt::Display for SandboxError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the guest crashed on this image")
    }
}

impl std::error::Error for SandboxError {}

/// What a session has cost so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Exits from the guest.
    pub exits: u64,
}

/// Sandboxes to take sessions from.
pub struct Pool {}

impl Pool {
    /// A session for one image.
    pub fn session(self: &Arc<Self>) -> Result<Session, SandboxError> {
        Err(SandboxError::Crashed)
    }
}

/// A guest that serves one image.
pub struct Session {}

impl Session {
    /// Sends one request.
    pub fn call(&mut self, _request: &Request, _files: &mut dyn Files) -> Result<Reply, CallError> {
        Err(CallError::Sandbox(SandboxError::Crashed))
    }

    /// What the session has cost so far.
    pub fn counters(&self) -> Counters {
        Counters::default()
    }
}
