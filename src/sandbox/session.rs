//! One guest program, one image: requests in, replies out, and in between what
//! the guest asks for, within its budgets.

use super::error::{CallError, SandboxError};
use super::limits::{Allowance, Limits};
use super::machine::Machine;
use super::pool::Pool;
use super::text::escape;
use super::window::Window;
use super::{BUILD_ID, Files};
use instar_guest::layout::ring;
use instar_guest::proto::{FileNo, HEAD, MAX_READS, MAX_REQUEST, ReadOp, TAIL};
use instar_guest::proto::{Reply, Request, ToGuest, ToHost};
use instar_guest::{Failure, FailureKind};
use std::io;
use std::mem;
use std::sync::Arc;

/// What a session has cost so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Times that the guest left the sandbox.
    pub exits: u64,
    /// Ranges that it read.
    pub reads: u64,
    /// Bytes that it read.
    pub bytes_read: u64,
    /// Messages that it sent.
    pub messages: u64,
}

/// A guest program that serves one image. Made by [`Pool::session`].
pub struct Session {
    /// The sandbox, or what it died of.
    machine: Result<Box<dyn Machine>, SandboxError>,
    /// Where the sandbox goes afterwards.
    pool: Option<Arc<Pool>>,
    limits: Limits,
    counters: Counters,
    greeted: bool,
}

impl Session {
    pub(super) fn new(machine: Box<dyn Machine>, limits: Limits, pool: Option<Arc<Pool>>) -> Self {
        Self {
            machine: Ok(machine),
            pool,
            limits,
            counters: Counters::default(),
            greeted: false,
        }
    }

    /// What the session has cost so far.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Sends a request and serves the guest until it replies.
    ///
    /// # Errors
    /// [`CallError::Refused`] is the guest's answer, and the session lives on.
    /// After [`CallError::Sandbox`] every further call answers the same error.
    pub fn call(&mut self, request: &Request, files: &mut dyn Files) -> Result<Reply, CallError> {
        let machine = match &mut self.machine {
            Ok(machine) => machine.as_mut(),
            Err(died_of) => return Err(died_of.clone().into()),
        };
        let message = encode(&ToGuest::Request(request.clone())).ok_or_else(too_long)?;
        let mut exchange = Exchange {
            machine,
            files,
            limits: &self.limits,
            counters: &mut self.counters,
            greeted: &mut self.greeted,
            exits: 0,
            bytes_read: 0,
        };
        exchange
            .place_ends(request)
            .map_err(|error| CallError::Refused(io_failure(&error)))?;
        match exchange.run(&message) {
            Ok(answer) => answer.map_err(CallError::Refused),
            Err(error) => {
                self.machine = Err(error.clone());
                Err(error.into())
            }
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let gone = Err(SandboxError::Stalled);
        if let (Some(pool), Ok(machine)) = (&self.pool, mem::replace(&mut self.machine, gone)) {
            pool.give_back(machine);
        }
    }
}

/// One request and all that belongs to it.
struct Exchange<'a> {
    machine: &'a mut dyn Machine,
    files: &'a mut dyn Files,
    limits: &'a Limits,
    counters: &'a mut Counters,
    greeted: &'a mut bool,
    exits: u64,
    bytes_read: u64,
}

impl Exchange<'_> {
    /// Serves the guest until it replies.
    fn run(&mut self, request: &[u8]) -> Result<Result<Reply, Failure>, SandboxError> {
        self.window().set_request(request);
        loop {
            let done = match self.next_message()? {
                ToHost::Reply(reply) => return Ok(reply),
                ToHost::Read(ops) => self.read(&ops)?,
                ToHost::Stream(part) => self.files.stream(part),
                ToHost::Findings(findings) => self.files.tell(findings),
            };
            let answer = ToGuest::Resume(done.map_err(|error| io_failure(&error)));
            let answer = encode(&answer).expect("an I/O error's text is short");
            self.window().set_request(&answer);
        }
    }

    fn window(&self) -> Window<'_> {
        Window::new(self.machine.window())
    }

    /// Runs the guest until it rings with a message.
    fn next_message(&mut self) -> Result<ToHost, SandboxError> {
        let rung = self.machine.run(self.limits.cpu)?;
        self.counters.exits += 1;
        self.exits += 1;
        self.greet()?;
        let bytes = self.window().message(self.limits.message)?;
        match rung {
            ring::MESSAGE => {}
            ring::PANIC => {
                let text = escape(&String::from_utf8_lossy(&bytes));
                return Err(SandboxError::Panicked(text));
            }
            ring::OUT_OF_MEMORY => return Err(SandboxError::OutOfMemory(self.limits.memory)),
            other => return Err(SandboxError::UnknownRing(other)),
        }
        self.within(self.limits.exits, self.exits)
            .map_err(SandboxError::ExitBudget)?;
        self.counters.messages += 1;
        decode(&bytes)
    }

    /// The guest is from the same build as the host, so that both mean the same
    /// by the same bytes.
    fn greet(&mut self) -> Result<(), SandboxError> {
        if !*self.greeted && format!("{:016x}", self.window().build_id()) != BUILD_ID {
            return Err(SandboxError::WrongBuild);
        }
        *self.greeted = true;
        Ok(())
    }

    /// Reads all the ranges, once all of them have been found to be in order.
    fn read(&mut self, ops: &[ReadOp]) -> Result<io::Result<()>, SandboxError> {
        if ops.len() > MAX_READS {
            return Err(SandboxError::TooManyReads(ops.len()));
        }
        for op in ops {
            self.check(op)?;
            self.bytes_read += u64::from(op.len);
        }
        self.within(self.limits.bytes_read, self.bytes_read)
            .map_err(SandboxError::ReadBudget)?;
        let window = Window::new(self.machine.window());
        for op in ops {
            self.counters.reads += 1;
            self.counters.bytes_read += u64::from(op.len);
            let buffer = window.buffer(op)?;
            if let Err(error) = self.files.read_at(op.file, op.offset, buffer) {
                return Ok(Err(error));
            }
        }
        Ok(Ok(()))
    }

    fn check(&mut self, op: &ReadOp) -> Result<(), SandboxError> {
        let ReadOp { offset, len, .. } = *op;
        let end = offset.checked_add(u64::from(len));
        if end.is_none_or(|end| end > i64::MAX as u64) {
            return Err(SandboxError::ReadBeyond { offset, len });
        }
        self.window().buffer(op)?;
        match self.files.len(op.file) {
            Ok(_) => Ok(()),
            Err(_) => Err(SandboxError::UnknownFile(op.file)),
        }
    }

    /// Whether a budget covers what is used; the error is the budget. The files'
    /// lengths are asked for only when its base is used up.
    fn within(&mut self, allowance: Allowance, used: u64) -> Result<(), u64> {
        if used <= allowance.base {
            return Ok(());
        }
        let len = (0..)
            .map_while(|file| self.files.len(FileNo(file)).ok())
            .fold(0, u64::saturating_add);
        match allowance.for_length(len) {
            budget if used <= budget => Ok(()),
            budget => Err(budget),
        }
    }

    /// Places the file's first and last bytes in guest memory before an open,
    /// and takes them away before any other request: they may have changed.
    fn place_ends(&mut self, request: &Request) -> io::Result<()> {
        let window = Window::new(self.machine.window());
        let Request::Open { file_len, .. } = *request else {
            window.set_placed(0, 0, 0);
            return Ok(());
        };
        let head_len = usize::try_from(file_len).map_or(HEAD, |len| len.min(HEAD));
        let tail_len = if file_len > HEAD as u64 { TAIL } else { 0 };
        if head_len > 0 {
            self.files
                .read_at(FileNo::IMAGE, 0, window.head(head_len))?;
        }
        if tail_len > 0 {
            let offset = file_len - tail_len as u64;
            self.files
                .read_at(FileNo::IMAGE, offset, window.tail(tail_len))?;
        }
        window.set_placed(head_len, tail_len, file_len);
        Ok(())
    }
}

/// Encodes a message if it fits the request area.
fn encode(message: &ToGuest) -> Option<Vec<u8>> {
    let bytes = postcard::to_allocvec(message).ok()?;
    (bytes.len() <= MAX_REQUEST).then_some(bytes)
}

fn decode(bytes: &[u8]) -> Result<ToHost, SandboxError> {
    let (message, rest) =
        postcard::take_from_bytes(bytes).map_err(|_| SandboxError::Undecodable)?;
    if rest.is_empty() {
        Ok(message)
    } else {
        Err(SandboxError::TrailingBytes(rest.len()))
    }
}

fn io_failure(error: &io::Error) -> Failure {
    Failure::new(FailureKind::Io, escape(&error.to_string()))
}

fn too_long() -> CallError {
    CallError::Refused(Failure::new(
        FailureKind::InvalidRequest,
        format!("names and options are longer than {MAX_REQUEST} bytes together"),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_bytes_are_decoded_or_refused(bytes: Vec<u8>) {
            match decode(&bytes) {
                Ok(message) => {
                    let again = postcard::to_allocvec(&message).expect("memory for a message");
                    prop_assert_eq!(decode(&again), Ok(message));
                }
                Err(SandboxError::TrailingBytes(len)) => {
                    prop_assert!(len > 0 && len < bytes.len());
                    decode(&bytes[..bytes.len() - len]).expect("without them it is whole");
                }
                Err(error) => prop_assert_eq!(error, SandboxError::Undecodable),
            }
        }
    }
}
