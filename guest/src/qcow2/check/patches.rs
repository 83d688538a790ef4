//! Changes inside the file, sector by sector, as many as a plan can hold.

use crate::plan::{SECTOR, Step};
use crate::proto::FileNo;
use alloc::vec::Vec;

/// Bytes of changed refcount blocks in a plan, of those that go up and of those
/// that go down.
pub const MAX_COUNTS: usize = 2 << 20;
/// Bytes of changed L1 and L2 tables in a plan.
pub const MAX_ENTRIES: usize = 1 << 20;
/// What a write weighs besides its bytes.
const STEP_WEIGHT: usize = 32;

/// Writes and zeroes in the image file.
#[derive(Debug)]
pub(super) struct Patches {
    steps: Vec<Step>,
    weight: usize,
    most: usize,
}

impl Patches {
    /// None yet, up to about `most` bytes.
    pub fn new(most: usize) -> Self {
        Self {
            steps: Vec::new(),
            weight: 0,
            most,
        }
    }

    /// Whether another few sectors may be changed.
    pub fn has_room(&self) -> bool {
        self.weight < self.most
    }

    /// Adds a write of a few bytes. Whether there was room for it.
    pub fn write(&mut self, at: u64, data: Vec<u8>) -> bool {
        if !self.has_room() {
            return false;
        }
        self.push(at, data);
        true
    }

    /// Adds what turns `old`, which is at `at`, into `new`: whole sectors,
    /// neighbours together. `at` is a multiple of a sector.
    pub fn difference(&mut self, at: u64, old: &[u8], new: &[u8]) {
        let sectors = old
            .chunks(SECTOR as usize)
            .zip(new.chunks(SECTOR as usize))
            .zip((at..).step_by(SECTOR as usize));
        let mut end = None;
        for ((old, new), at) in sectors {
            if old == new {
                continue;
            }
            let zero = new.iter().all(|&byte| byte == 0);
            match self.steps.last_mut() {
                Some(Step::Zero { len, .. }) if end == Some(at) && zero => {
                    *len += new.len() as u64;
                }
                _ if zero => self.push_zero(at, new.len() as u64),
                Some(Step::Write { data, .. }) if end == Some(at) => {
                    data.extend_from_slice(new);
                    self.weight += new.len();
                }
                _ => self.push(at, new.to_vec()),
            }
            end = Some(at + new.len() as u64);
        }
    }

    fn push(&mut self, offset: u64, data: Vec<u8>) {
        self.weight += STEP_WEIGHT + data.len();
        self.steps.push(Step::Write {
            file: FileNo::IMAGE,
            offset,
            data,
        });
    }

    fn push_zero(&mut self, offset: u64, len: u64) {
        self.weight += STEP_WEIGHT;
        self.steps.push(Step::Zero {
            file: FileNo::IMAGE,
            offset,
            len,
        });
    }

    /// The steps.
    pub fn take(&mut self) -> Vec<Step> {
        self.weight = 0;
        core::mem::take(&mut self.steps)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;

    #[test]
    fn only_sectors_that_differ_are_written_and_neighbours_together() {
        let old = vec![0u8; 2560];
        let mut new = old.clone();
        for at in [0, 600, 2559] {
            if let Some(byte) = new.get_mut(at) {
                *byte = 1;
            }
        }
        let mut patches = Patches::new(4000);
        patches.difference(4096, &old, &new);
        let lens: Vec<_> = patches
            .steps
            .iter()
            .map(|step| match step {
                Step::Write { offset, data, .. } => (*offset, data.len()),
                _ => (0, 0),
            })
            .collect();
        assert_eq!(lens, [(4096, 1024), (4096 + 2048, 512)]);
        assert!(patches.has_room());
        patches.difference(1 << 20, &[0; 4096], &[1; 4096]);
        assert!(!patches.write(0, vec![1]));
    }
}
