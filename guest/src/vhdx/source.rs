//! The image file as a reader sees it: with the log replayed over it.

use super::overlay::Overlay;
use crate::engine::{Host, Read};
use crate::error::Failure;

/// Where bytes come from.
#[derive(Clone, Debug)]
pub struct Source {
    /// Length of the file in bytes, as it is once the log is replayed.
    pub file_len: u64,
    /// What replaying the log changes; empty where there is nothing to replay.
    pub overlay: Overlay,
}

impl Source {
    /// Reads all the ranges, at once.
    pub fn read(&self, host: &mut dyn Host, reads: &mut [Read<'_>]) -> Result<(), Failure> {
        host.read(reads)?;
        for read in reads {
            self.overlay.apply(read.offset, read.buf);
        }
        Ok(())
    }
}
