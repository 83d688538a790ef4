//! A disk whose end moves in memory first: what is appended to it is gathered,
//! and the disk grows by all of it at once.
//!
//! A program that copies a disk to a new file writes past its end all the time.
//! Each growth is a change of its own, with barriers; so a few mebibytes share
//! one. They are as durable as any other write: with the next flush. A read finds
//! what was gathered, and before anything is done that it stands in the way of, it
//! is put in its place. For as long as there is no space for it, all the rest of
//! the disk is used as ever.

use super::disk::{Disk, Part, Run};
use super::error::Result;
use super::source::FileId;
use super::sync::lock;
use crate::image::Space;
use instar_guest::proto::{Format, Preallocation};
use nix::errno::Errno;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

/// Bytes gathered at most.
const MOST: usize = 4 << 20;

/// See the module.
pub struct Tailed {
    disk: Arc<dyn Disk>,
    path: PathBuf,
    tail: Mutex<Tail>,
    /// Where the disk ends once the tail is in its place; 0 without one. Read
    /// by whoever asks for the size, who must not wait for a change of it.
    end: AtomicU64,
}

/// What was appended and is in memory only.
#[derive(Default)]
struct Tail {
    /// Offset of its first byte: the disk's size before.
    start: u64,
    data: Vec<u8>,
    preallocation: Preallocation,
    /// Whether the last attempt to put it in its place failed, perhaps half
    /// way.
    failed: bool,
}

impl Tailed {
    /// A disk without a tail. The path is for the log.
    pub fn new(disk: Arc<dyn Disk>, path: PathBuf) -> Self {
        Self {
            disk,
            path,
            tail: Mutex::default(),
            end: AtomicU64::new(0),
        }
    }

    /// Puts the tail in its place. After a failure it is kept, to be put there
    /// by the next attempt.
    fn put(&self, tail: &mut Tail) -> Result<()> {
        if tail.data.is_empty() {
            return Ok(());
        }
        let end = tail.start + tail.data.len() as u64;
        if self.disk.virtual_size() < end || tail.failed {
            let resized = self.disk.resize(end, tail.preallocation);
            tail.failed = resized.is_err();
            for warning in resized? {
                log::warn!("{}: {warning}", self.path.display());
            }
        }
        self.disk.write_at(&tail.data, tail.start)?;
        tail.data = Vec::new();
        self.end.store(0, Ordering::Release);
        Ok(())
    }

    /// Puts the tail in its place if it has bytes of a range. What is done with
    /// the range then may take long: whoever wants the tail does not wait for it.
    fn put_range(&self, offset: u64, len: u64) -> Result<()> {
        match self.touched(offset, len) {
            Some(mut tail) => self.put(&mut tail),
            None => Ok(()),
        }
    }

    /// The tail, if it has bytes of a range.
    fn touched(&self, offset: u64, len: u64) -> Option<MutexGuard<'_, Tail>> {
        if self.end.load(Ordering::Acquire) == 0 {
            return None;
        }
        let tail = lock(&self.tail);
        let touched = !tail.data.is_empty() && offset.saturating_add(len) > tail.start;
        touched.then_some(tail)
    }

    /// Changes the size to one at which the tail is gone; it stays if that
    /// fails.
    fn resize_below(
        &self,
        tail: &mut Tail,
        size: u64,
        preallocation: Preallocation,
    ) -> Result<Vec<String>> {
        let end = self.end.swap(0, Ordering::AcqRel);
        let resized = self.disk.resize(size, preallocation);
        match resized.is_err() && self.disk.virtual_size() >= tail.start {
            true => self.end.store(end, Ordering::Release),
            false => *tail = Tail::default(),
        }
        resized
    }

    /// Puts in its place what the tail has before a size; the rest is dropped,
    /// unless that fails.
    fn put_before(&self, tail: &mut Tail, size: u64) -> Result<()> {
        let keep = usize::try_from(size.saturating_sub(tail.start)).unwrap_or(usize::MAX);
        if keep >= tail.data.len() {
            return self.put(tail);
        }
        let rest = tail.data.split_off(keep);
        let put = self.put(tail);
        if put.is_err() {
            tail.data.extend_from_slice(&rest);
        }
        put
    }
}

impl Tail {
    /// Fills a range that the tail reaches into: what is before it is `below`'s.
    fn read(&self, below: &dyn Disk, buf: &mut [u8], offset: u64) -> Result<()> {
        let before = self.start.saturating_sub(offset);
        let before = usize::try_from(before).map_or(buf.len(), |before| before.min(buf.len()));
        let (lower, upper) = buf.split_at_mut(before);
        if !lower.is_empty() {
            below.read_at(lower, offset)?;
        }
        let from = usize::try_from(offset.saturating_sub(self.start)).unwrap_or(usize::MAX);
        let found = self
            .data
            .get(from..)
            .and_then(|data| data.get(..upper.len()));
        upper.copy_from_slice(found.ok_or(Errno::EINVAL)?);
        Ok(())
    }

    /// It is data, what is asked for of it.
    fn runs(&self, offset: u64, len: u64) -> Result<Vec<Run>> {
        let end = self.start + self.data.len() as u64;
        let len = len.min(end.saturating_sub(offset));
        let data = true;
        Ok(vec![Run { offset, len, data }])
    }
}

impl Disk for Tailed {
    fn append(&self, data: &[u8], offset: u64, preallocation: Preallocation) -> Result<bool> {
        let mut tail = lock(&self.tail);
        let fits = offset.is_multiple_of(self.size_unit())
            && (data.len() as u64).is_multiple_of(self.size_unit())
            && data.len() <= MOST;
        if !fits || offset != self.virtual_size() || !self.disk.gathers() {
            return Ok(false);
        }
        if tail.data.len() + data.len() > MOST {
            self.put(&mut tail)?;
        }
        if tail.data.is_empty() {
            *tail = Tail {
                start: offset,
                preallocation,
                ..Tail::default()
            };
        }
        tail.data.extend_from_slice(data);
        let end = tail.start + tail.data.len() as u64;
        self.end.store(end, Ordering::Release);
        Ok(true)
    }

    fn format(&self) -> Format {
        self.disk.format()
    }

    fn virtual_size(&self) -> u64 {
        self.end
            .load(Ordering::Acquire)
            .max(self.disk.virtual_size())
    }

    fn size_unit(&self) -> u64 {
        self.disk.size_unit()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        match self.touched(offset, buf.len() as u64) {
            Some(tail) => tail.read(self.disk.as_ref(), buf, offset),
            None => self.disk.read_at(buf, offset),
        }
    }

    fn write_at(&self, data: &[u8], offset: u64) -> Result<()> {
        self.put_range(offset, data.len() as u64)?;
        self.disk.write_at(data, offset)
    }

    fn preallocate(&self, offset: u64, len: u64) -> Result<()> {
        self.put_range(offset, len)?;
        self.disk.preallocate(offset, len)
    }

    fn zero(&self, offset: u64, len: u64, space: Space) -> Result<()> {
        self.put_range(offset, len)?;
        self.disk.zero(offset, len, space)
    }

    fn flush(&self) -> Result<()> {
        // Whoever has put it in its place may be the one who is flushing it, to
        // be waited for: so not as the holder of the tail. What is in its place
        // becomes durable whatever becomes of the tail.
        let put = self.put(&mut lock(&self.tail));
        let flushed = self.disk.flush();
        put.and(flushed)
    }

    fn is_dirty(&self) -> bool {
        self.end.load(Ordering::Acquire) != 0 || self.disk.is_dirty()
    }

    fn rest(&self, after: Duration) {
        if self.end.load(Ordering::Acquire) == 0 {
            self.disk.rest(after);
        }
    }

    fn unlock(&self) -> Result<()> {
        let mut tail = lock(&self.tail);
        self.put(&mut tail)?;
        self.disk.unlock()
    }

    fn lock(&self) -> Result<()> {
        self.disk.lock()
    }

    fn file(&self) -> Option<FileId> {
        self.disk.file()
    }

    fn parts(&self) -> Result<Vec<Part>> {
        self.disk.parts()
    }

    fn resize(&self, size: u64, preallocation: Preallocation) -> Result<Vec<String>> {
        let mut tail = lock(&self.tail);
        if !tail.data.is_empty() && size <= tail.start {
            return self.resize_below(&mut tail, size, preallocation);
        }
        self.put_before(&mut tail, size)?;
        self.disk.resize(size, preallocation)
    }

    fn is_resizable(&self) -> bool {
        self.disk.is_resizable()
    }

    fn gathers(&self) -> bool {
        self.disk.gathers()
    }

    fn is_unsettled(&self) -> bool {
        self.disk.is_unsettled()
    }

    fn runs(&self, offset: u64, len: u64) -> Result<Vec<Run>> {
        let len = match self.touched(offset, len) {
            Some(tail) if offset >= tail.start => return tail.runs(offset, len),
            Some(tail) => tail.start - offset,
            None => len,
        };
        self.disk.runs(offset, len)
    }
}
