//! The dispatcher: one open image, one request at a time.

use crate::error::{Failure, FailureKind};
use crate::plan::Plan;
use crate::proto::{FileNo, Reply, Request};

/// One range to read. The buffer's length is the range's; bytes past the end of
/// the file read as zero.
pub struct Read<'a> {
    /// The file.
    pub file: FileNo,
    /// Host offset of the first byte.
    pub offset: u64,
    /// Where the bytes go.
    pub buf: &'a mut [u8],
}

/// What the engine may ask of the world.
pub trait Host {
    /// Reads all the ranges. One call is one exit from the sandbox, so callers
    /// batch.
    fn read(&mut self, reads: &mut [Read<'_>]) -> Result<(), Failure>;

    /// Executes the first stages of a plan that is too large for memory. They
    /// may write only past the old end of the file.
    fn stream(&mut self, part: Plan) -> Result<(), Failure>;
}

/// The engine: the state of one image between requests.
#[derive(Default)]
pub struct Engine {}

impl Engine {
    /// Answers one request.
    pub fn handle(&mut self, host: &mut dyn Host, request: Request) -> Result<Reply, Failure> {
        let _ = (host, request);
        Err(Failure::new(FailureKind::Internal, "no engine yet"))
    }
}
