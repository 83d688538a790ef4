//! Places behind everything that is in use.

use super::header::Header;
use super::survey::{PAGE, Survey};
use crate::plan::SECTOR;

/// Hands out places, one behind the other.
#[derive(Clone, Copy, Debug)]
pub struct Room {
    next: u64,
    aligned: bool,
    bitmap_len: u64,
    stride: u64,
}

impl Room {
    /// From `start` on.
    pub fn new(header: &Header, survey: &Survey, start: u64) -> Self {
        Self {
            next: start,
            aligned: survey.aligned,
            bitmap_len: header.bitmap_len(),
            stride: header.stride(),
        }
    }

    /// The same behind so many more blocks.
    pub fn behind(mut self, count: u64) -> Self {
        for _ in 0..count {
            self.block();
        }
        self
    }

    /// Place of a block.
    pub fn block(&mut self) -> u64 {
        let at = self.place(self.bitmap_len);
        self.next = at + self.stride;
        at
    }

    /// Place of so many bytes, in whole sectors.
    pub fn bytes(&mut self, len: u64) -> u64 {
        let at = self.next;
        self.next = at + len.next_multiple_of(SECTOR);
        at
    }

    /// Place of the footer behind all that.
    pub fn footer(&self) -> u64 {
        self.place(SECTOR)
    }

    /// The next place such that what follows `head` bytes is as aligned as the
    /// data of the image's blocks.
    fn place(&self, head: u64) -> u64 {
        match self.aligned {
            true => (self.next + head).next_multiple_of(PAGE) - head,
            false => self.next,
        }
    }
}
