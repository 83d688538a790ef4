//! Zeroing ranges of the disk, with or without giving their space back to the
//! file system below.
//!
//! The mapping stays as it is where data may be overwritten in place: a hole in
//! the image's file reads as zeroes whatever its format is. Only what other
//! layers or snapshots show is placed anew, as zeroes that need no write.

use super::disk::{Image, hold, shared};
use super::error::{Error, Fault, Operation};
use super::extents::slice;
use instar_guest::plan::Step;
use instar_guest::{Extent, ExtentKind};

/// The most bytes that are placed as zeroes at once.
const CHUNK: u64 = 1 << 20;
static ZEROES: [u8; CHUNK as usize] = [0; CHUNK as usize];

/// What becomes of the disk space of a zeroed range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Space {
    /// It stays allocated.
    Kept,
    /// It goes back to the file system, where that can take it.
    Released,
}

impl Image {
    /// Makes a range inside the disk read as zeroes. Durable after the next
    /// [`flush`](Self::flush).
    pub fn zero(&self, offset: u64, len: u64, space: Space) -> Result<(), Error> {
        self.may_write(offset, len)
            .and_then(|()| self.zero_range(offset, offset + len, space))
            .map_err(|fault| fault.at(Operation::Write, &self.path))
    }

    fn zero_range(&self, start: u64, end: u64, space: Space) -> Result<(), Fault> {
        let mut next = start;
        while next < end {
            next += match self.zero_in_place(next, end - next, space)? {
                0 => self.zero_mapping(next, end - next)?,
                n => n,
            };
        }
        Ok(())
    }

    /// Zeroes what may be overwritten at an offset; answers how many bytes.
    fn zero_in_place(&self, offset: u64, len: u64, space: Space) -> Result<u64, Fault> {
        self.alive()?;
        let _traffic = shared(&self.traffic);
        let found = shared(&self.extents).find(offset);
        let Some(Extent {
            kind:
                ExtentKind::Data {
                    file,
                    at,
                    in_place: true,
                },
            len,
            ..
        }) = found.map(|extent| slice(extent, 0, len))
        else {
            return Ok(0);
        };
        let offset = at;
        self.files.step(&match space {
            Space::Kept => Step::Zero { file, offset, len },
            Space::Released => Step::Punch { file, offset, len },
        })?;
        Ok(len)
    }

    /// Sees to the start of a range that is not known to be data of its own:
    /// nothing where it reads as zeroes already. Answers how many bytes are
    /// done; 0 where it may be overwritten after all.
    fn zero_mapping(&self, offset: u64, len: u64) -> Result<u64, Fault> {
        let mut link = hold(&self.session);
        self.catch_up(&mut link)?;
        // The disk may have become smaller while the session was waited for.
        self.inside(offset, len)?;
        let extent = self.look(offset, len, &mut Some(&mut link))?;
        match extent.kind {
            ExtentKind::Data { in_place: true, .. } => return Ok(0),
            _ if self.reads_zero(&mut link, offset, offset + extent.len)? => {
                return Ok(extent.len);
            }
            _ => {}
        }
        drop(link);
        let len = extent.len.min(CHUNK);
        self.store(&ZEROES[..len as usize], offset)?;
        Ok(len)
    }
}
