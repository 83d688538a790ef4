//! The steps before a commit, collected under a bound.
//!
//! Most plans are a few kilobytes and go to the host in one piece. Tables for a
//! preallocated range can be larger than guest memory; their steps are handed
//! to the host as soon as enough of them have piled up. That is allowed only
//! for steps past the old end of the file, which is why there are two doors.

use crate::bytes;
use crate::engine::Host;
use crate::error::Failure;
use crate::plan::{Plan, Purpose, Stage, Step};
use crate::proto::FileNo;
use crate::units::HostOffset;
use alloc::vec;
use alloc::vec::Vec;

/// Bytes of collected steps from which on they are streamed.
const STREAM_AT: usize = 1 << 20;
/// Bytes of a table that are made at once.
const CHUNK: usize = 256 << 10;
/// What a step weighs besides its data.
const STEP_WEIGHT: usize = 32;

/// Collects the steps of the stage that prepares a commit.
pub struct Prepare<'h> {
    host: &'h mut dyn Host,
    fresh: Vec<Step>,
    weight: usize,
    inside: Vec<Step>,
}

impl<'h> Prepare<'h> {
    /// Nothing collected yet.
    pub fn new(host: &'h mut dyn Host) -> Self {
        Self {
            host,
            fresh: Vec::new(),
            weight: 0,
            inside: Vec::new(),
        }
    }

    /// The host, to read from.
    pub fn host(&mut self) -> &mut dyn Host {
        self.host
    }

    /// Adds a step that touches bytes inside the old file: it stays in the plan.
    pub fn inside(&mut self, step: Step) {
        self.inside.push(step);
    }

    /// Adds a step past the old end of the file. Such steps keep their order,
    /// so that space reserved first is reserved before anything else happens.
    pub fn fresh(&mut self, step: Step) -> Result<(), Failure> {
        self.weight += weight(&step);
        self.fresh.push(step);
        if self.weight < STREAM_AT {
            return Ok(());
        }
        self.weight = 0;
        self.host.stream(Plan {
            stages: vec![Stage {
                purpose: Purpose::Prepare,
                steps: core::mem::take(&mut self.fresh),
            }],
        })
    }

    /// Adds `len` bytes of the image file at `at`, past its old end, where
    /// everything reads as zero. `fill` makes them piece by piece: it gets the
    /// host, the distance from `at` and a zeroed buffer. Zeroes around a piece
    /// are left out.
    pub fn fresh_bytes(
        &mut self,
        at: u64,
        len: u64,
        mut fill: impl FnMut(&mut dyn Host, u64, &mut [u8]) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let mut done = 0;
        while done < len {
            let mut piece = vec![0; (len - done).min(CHUNK as u64) as usize];
            fill(self.host, done, &mut piece)?;
            let next = done + piece.len() as u64;
            if let Some(step) = write_of_nonzero(at + done, piece) {
                self.fresh(step)?;
            }
            done = next;
        }
        Ok(())
    }

    /// Adds bytes of the image file at `at`, past its old end, as
    /// [`fresh_bytes`](Self::fresh_bytes) does.
    pub fn fresh_slice(&mut self, at: u64, content: &[u8]) -> Result<(), Failure> {
        self.fresh_bytes(at, content.len() as u64, |_, distance, piece| {
            piece.copy_from_slice(bytes::slice(content, distance as usize, piece.len())?);
            Ok(())
        })
    }

    /// Everything that was not streamed, steps past the old end first.
    pub fn finish(self) -> Vec<Step> {
        let mut steps = self.fresh;
        steps.extend(self.inside);
        steps
    }
}

/// Writes to the image file, neighbours together. The pieces come in order.
pub fn writes<'a>(pieces: impl Iterator<Item = (HostOffset, &'a [u8])>) -> Vec<Step> {
    let mut steps: Vec<Step> = Vec::new();
    for (at, piece) in pieces {
        match steps.last_mut() {
            Some(Step::Write { offset, data, .. }) if *offset + data.len() as u64 == at.0 => {
                data.extend_from_slice(piece);
            }
            _ => steps.push(Step::Write {
                file: FileNo::IMAGE,
                offset: at.0,
                data: piece.to_vec(),
            }),
        }
    }
    steps
}

/// Adds ranges of the image file that are to be zero, offset and length each,
/// neighbours together.
pub fn zeroes(ranges: impl Iterator<Item = (u64, u64)>, steps: &mut Vec<Step>) {
    for (at, more) in ranges {
        match steps.last_mut() {
            Some(Step::Zero { offset, len, .. }) if *offset + *len == at => *len += more,
            _ => steps.push(Step::Zero {
                file: FileNo::IMAGE,
                offset: at,
                len: more,
            }),
        }
    }
}

/// The write of `data` at `at` in the image file, without the zeroes around it;
/// `None` where there is nothing else.
fn write_of_nonzero(at: u64, mut data: Vec<u8>) -> Option<Step> {
    let first = data.iter().position(|&byte| byte != 0)?;
    let last = data.iter().rposition(|&byte| byte != 0)?;
    data.truncate(last + 1);
    data.drain(..first);
    Some(Step::Write {
        file: FileNo::IMAGE,
        offset: at + first as u64,
        data,
    })
}

fn weight(step: &Step) -> usize {
    match step {
        Step::Write { data, .. } => STEP_WEIGHT + data.len(),
        _ => STEP_WEIGHT,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::MemHost;

    #[test]
    fn small_plans_are_not_streamed_and_zeroes_are_left_out() {
        let mut host = MemHost::default();
        let mut prepare = Prepare::new(&mut host);
        prepare.fresh_slice(100, &[0, 0, 7, 0, 8, 0]).unwrap();
        prepare.fresh_slice(200, &[0; 6]).unwrap();
        let inside = Step::SetLength {
            file: FileNo::IMAGE,
            len: 1,
        };
        prepare.inside(inside.clone());
        let write = Step::Write {
            file: FileNo::IMAGE,
            offset: 102,
            data: vec![7, 0, 8],
        };
        assert_eq!(prepare.finish(), [write, inside]);
        assert!(host.streamed.is_empty());
    }

    #[test]
    fn what_is_too_much_is_streamed_in_order_and_what_is_inside_never() {
        let mut host = MemHost::default();
        let mut prepare = Prepare::new(&mut host);
        prepare.inside(Step::SetLength {
            file: FileNo::IMAGE,
            len: 1,
        });
        let content: Vec<u8> = (0..10u32 << 20).map(|at| (at % 251) as u8 + 1).collect();
        prepare.fresh_slice(512, &content).unwrap();
        let rest = prepare.finish();
        assert_eq!(host.streamed.len(), 10);
        assert!(matches!(rest.last(), Some(Step::SetLength { .. })));
        rest.iter()
            .rev()
            .skip(1)
            .rev()
            .for_each(|step| host.step(step));
        assert!(host.image[512..] == content);
    }
}
