//! What the filesystem needs from an image, as traits: the behaviour above
//! them is tested with images that exist in memory only.

use super::error::Result;
use super::source::{FileId, Source, Time};
use crate::image::{Access, Space};
use instar_guest::facts::{Backing, NamedFile};
use instar_guest::proto::{Format, Preallocation};
use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// An image file to look at.
#[derive(Clone, Copy)]
pub struct At<'a> {
    /// The tree in which it lies.
    pub source: &'a Source,
    /// Its path below the root of the tree.
    pub path: &'a Path,
    /// The format it must have; `None` probes.
    pub format: Option<Format>,
}

/// What is known of an image without opening it for use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Portrait {
    /// Its format.
    pub format: Format,
    /// Size of the disk in bytes.
    pub virtual_size: u64,
    /// The backing image that it names.
    pub backing: Option<Backing>,
    /// The other files that hold parts of it.
    pub files: Vec<NamedFile>,
}

/// A file that holds a part of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Part {
    /// Which file it is.
    pub id: FileId,
    /// Length in bytes.
    pub size: u64,
    /// Last change of the content.
    pub mtime: Time,
}

/// A range of a disk that holds data, or that reads as zeroes and takes no
/// space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Offset of the first byte.
    pub offset: u64,
    /// Length in bytes, never 0.
    pub len: u64,
    /// Whether there is data.
    pub data: bool,
}

/// Where images come from.
pub trait Library: Send + Sync {
    /// Looks at an image without any lock and without its backing images.
    fn describe(&self, at: At<'_>, file: File) -> Result<Portrait>;

    /// Everything that `info` says, as JSON.
    fn info(&self, at: At<'_>, file: File) -> Result<String>;

    /// Opens an image for use, with the locks that `access` needs.
    fn open(&self, at: At<'_>, file: File, access: Access) -> Result<Arc<dyn Disk>>;
}

/// An image that is open. Dropping it releases its
/// locks.
pub trait Disk: Send + Sync {
    /// The format it was opened as.
    fn format(&self) -> Format;

    /// Size in bytes.
    fn virtual_size(&self) -> u64;

    /// Sizes are multiples of this.
    fn size_unit(&self) -> u64;

    /// Reads exactly the range, which lies inside the disk.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()>;

    /// The same where it needs no waiting, neither for storage nor for whoever
    /// works with the disk; whether it did. If not, `buf` may hold anything, and
    /// why is for [`read_at`](Self::read_at) to say.
    fn try_read_at(&self, _buf: &mut [u8], _offset: u64) -> bool {
        false
    }

    /// Writes a range inside the disk.
    fn write_at(&self, data: &[u8], offset: u64) -> Result<()>;

    /// Takes what is written at the end of the disk, to grow by it with the next
    /// flush at the latest; `preallocation` is for that. Answers whether it did:
    /// else the disk has to grow first.
    fn append(&self, _data: &[u8], _offset: u64, _preallocation: Preallocation) -> Result<bool> {
        Ok(false)
    }

    /// Whether what is appended may wait in memory: nothing but want of space
    /// can keep it from the disk.
    fn gathers(&self) -> bool {
        false
    }

    /// Allocates a range inside the disk, with disk space behind it.
    fn preallocate(&self, offset: u64, len: u64) -> Result<()>;

    /// Makes a range inside the disk read as zeroes.
    fn zero(&self, offset: u64, len: u64, space: Space) -> Result<()>;

    /// Makes data and mapping durable. Waits for a flush in progress; cheap if
    /// there is nothing to do.
    fn flush(&self) -> Result<()>;

    /// Has long runs of data that were written go to storage, without waiting.
    fn begin_flush(&self) {}

    /// Whether anything waits for a flush.
    fn is_dirty(&self) -> bool;

    /// Gives up what only requests need, where there was none for `after` and
    /// nothing waits for a flush; the next one brings it back. Does not wait.
    fn rest(&self, _after: Duration) {}

    /// Takes note of the length of the image's file, which the kernel has perhaps
    /// changed: the size of a raw disk.
    fn follow(&self) -> Result<()> {
        Ok(())
    }

    /// Gives up the locks and stays open; nothing may be waiting for a flush.
    fn unlock(&self) -> Result<()>;

    /// Takes the locks again: EBUSY if another process has them, ESTALE if the
    /// image changed in between.
    fn lock(&self) -> Result<()>;

    /// The image file, which a change of the size may replace by another.
    fn file(&self) -> Option<FileId>;

    /// The files that have the names of the image's parts, as they are now.
    fn parts(&self) -> Result<Vec<Part>>;

    /// Changes the size, durably; the return value is what the user should be
    /// told. Whether it may become smaller is for the caller to know.
    fn resize(&self, size: u64, preallocation: Preallocation) -> Result<Vec<String>>;

    /// Whether its size can be changed at all.
    fn is_resizable(&self) -> bool;

    /// Whether it was left in the middle of a change and must be put in order
    /// before the next.
    fn is_unsettled(&self) -> bool;

    /// What lies in a range inside the disk: runs without gaps, from `offset`
    /// to at least one byte further.
    fn runs(&self, offset: u64, len: u64) -> Result<Vec<Run>>;
}
