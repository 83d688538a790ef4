//! An open image: its files and their locks, the gate for the names it holds,
//! the executor of plans, and the cache of extents.
//!
//! What may not enter: parsing of image bytes, any format's magic number or
//! layout. What an image means is asked of the guest, and what the guest says
//! is checked here before it has an effect.

mod create;
mod error;
mod gate;
mod name;
mod open;

pub use create::{Created, create};
pub use error::{Error, ErrorKind, Operation, printable_name};
pub use gate::Tree;
pub use name::{NameRule, format_of_name};
pub use open::{BackingPolicy, Location, OpenOptions};

use instar_guest::proto::{PlanReply, Preallocation};
use instar_guest::{Extent, Facts, FileNo};
use std::io;
use std::path::Path;
use std::sync::Arc;

/// What an image is opened for: which of QEMU's lock sets is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Facts only.
    Info,
    /// Facts and content.
    Read,
    /// Everything.
    Write,
}

/// How to resize.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ResizeOptions {
    /// How much of the added range is allocated.
    pub preallocation: Preallocation,
    /// Whether the disk may become smaller.
    pub shrink: bool,
}

/// What lies behind a guest range, looked up through the whole backing chain
/// and down to the holes of the host's files. Offsets and lengths are bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Guest offset of the first byte.
    pub offset: u64,
    /// Length, never 0.
    pub len: u64,
    /// What is there.
    pub kind: SegmentKind,
    /// Layer that holds it: 0 for the image itself, 1 for its backing image...
    /// For [`SegmentKind::Absent`] the last layer that was asked.
    pub depth: u32,
    /// File and host offset of the first byte, where there is one.
    pub at: Option<(FileNo, u64)>,
}

/// See [`Segment`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SegmentKind {
    /// Bytes of a file.
    Data,
    /// Mapped to bytes of a file, but the file has a hole there: zeroes.
    Hole,
    /// The layer says that the range reads as zeroes.
    Zero,
    /// No layer holds it: zeroes.
    Absent,
    /// Compressed data.
    Compressed,
}

impl SegmentKind {
    /// Whether the range is known to read as zeroes.
    pub fn is_zero(self) -> bool {
        matches!(self, Self::Hole | Self::Zero | Self::Absent)
    }
}

/// What an image has cost since it was opened, its backing chain excluded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Exits from the sandbox.
    pub exits: u64,
    /// Reads from the image's files, those for the guest included.
    pub reads: u64,
    /// Writes to the image's files, all kinds.
    pub writes: u64,
    /// Calls of fdatasync.
    pub fdatasyncs: u64,
}

/// An open image. All methods may be called from many threads at once.
#[derive(Debug)]
pub struct Image {}

pub(crate) fn unfinished() -> Error {
    error::Fault::new(ErrorKind::Unsupported, "unfinished").at(Operation::Open, Path::new(""))
}

impl Image {
    /// What the image says about itself; replaced by a resize.
    pub fn facts(&self) -> Arc<Facts> {
        unreachable!()
    }
    /// The path that texts name.
    pub fn path(&self) -> &Path {
        unreachable!()
    }
    /// Size of the disk in bytes.
    pub fn virtual_size(&self) -> u64 {
        0
    }
    /// The backing image, opened for reading, unless there is none or the
    /// options said not to open it.
    pub fn backing(&self) -> Option<&Image> {
        None
    }
    /// What this layer says about a range inside the disk: extents without
    /// gaps, from `offset` to `offset + len`.
    pub fn map(&self, _offset: u64, _len: u64) -> Result<Vec<Extent>, Error> {
        Err(unfinished())
    }
    /// What lies behind a range inside the disk, through the whole chain.
    pub fn segments(&self, _offset: u64, _len: u64) -> Result<Vec<Segment>, Error> {
        Err(unfinished())
    }
    /// Fills `buf` from the disk. The range must lie inside the disk.
    pub fn read_at(&self, _buf: &mut [u8], _offset: u64) -> Result<(), Error> {
        Err(unfinished())
    }
    /// Writes `buf` to the disk. The range must lie inside the disk. Durable
    /// after the next [`flush`](Self::flush).
    pub fn write_at(&self, _buf: &[u8], _offset: u64) -> Result<(), Error> {
        Err(unfinished())
    }
    /// Gives every byte of a range inside the disk a place with disk space
    /// behind it, content unchanged; durable when it returns.
    pub fn preallocate(&self, _offset: u64, _len: u64) -> Result<(), Error> {
        Err(unfinished())
    }
    /// Makes everything written so far survive a loss of power: data and
    /// mapping.
    pub fn flush(&self) -> Result<(), Error> {
        Err(unfinished())
    }
    /// Whether anything waits for a flush.
    pub fn is_dirty(&self) -> bool {
        false
    }
    /// The plan of a resize, without executing it. Needs the same access.
    pub fn plan_resize(&self, _size: u64, _how: &ResizeOptions) -> Result<PlanReply, Error> {
        Err(unfinished())
    }
    /// Changes the disk's size, durably; answers warnings for the user. The
    /// error says whether the image is unchanged or holds the new size.
    pub fn resize(&self, _size: u64, _how: &ResizeOptions) -> Result<Vec<String>, Error> {
        Err(unfinished())
    }
    /// Gives up the lock, keeping the image open. Everything must have been
    /// flushed. Only [`lock`](Self::lock) may follow a change by another
    /// process; reads in between may see one.
    pub fn unlock(&self) -> Result<(), Error> {
        Err(unfinished())
    }
    /// Takes the lock again. [`ErrorKind::Locked`] if another process holds
    /// the image, [`ErrorKind::Stale`] if the file is not what it was at
    /// [`unlock`](Self::unlock): open the image again.
    pub fn lock(&self) -> Result<(), Error> {
        Err(unfinished())
    }
    /// Disk space that the image's own files take, in bytes.
    pub fn allocated_bytes(&self) -> io::Result<u64> {
        Ok(0)
    }
    /// What the image has cost so far.
    pub fn counters(&self) -> Counters {
        Counters::default()
    }
}
