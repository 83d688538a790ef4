//! The calls that concern the content and the size of a disk.

use super::attributes;
use super::disk::{Disk, Run};
use super::error::{Error, Result};
use super::filesystem::Filesystem;
use super::memory::Stale;
use super::nodes::Node;
use super::open::{Context, Handle, OpenFile, needed};
use super::passage::Passage;
use crate::image::{Access, Space};
use instar_guest::proto::Preallocation;
use nix::errno::Errno;
use nix::fcntl::FallocateFlags;
use std::sync::Arc;
use std::sync::MutexGuard;

/// Bytes that the first look for a hole covers; the next ones double it.
const FIRST_LOOK: u64 = 16 << 20;
/// The most bytes that one look covers.
const LAST_LOOK: u64 = 64 << 30;

/// What a hole has whole ones of, in bytes.
const BLOCK: u64 = attributes::BLOCK as u64;

/// Where `lseek` is to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seek {
    /// `SEEK_DATA`.
    Data,
    /// `SEEK_HOLE`.
    Hole,
}

impl Filesystem {
    /// Fills the start of `buf` with what the disk holds from `offset` on, and
    /// answers how much that is: less than `buf` only at the end of the disk.
    pub fn read(&self, handle: u64, offset: u64, buf: &mut [u8]) -> Result<usize> {
        let handle = self.handle(handle)?;
        handle.read(self.context(), |disk| {
            loop {
                let size = disk.virtual_size();
                let left = size.saturating_sub(offset);
                let len = usize::try_from(left).unwrap_or(usize::MAX).min(buf.len());
                match disk.read_at(&mut buf[..len], offset) {
                    // The end has moved over the range meanwhile.
                    Err(_) if disk.virtual_size() < size => {}
                    read => return read.map(|()| len),
                }
            }
        })
    }

    /// The same if it needs no waiting, neither for a disk nor for anybody else;
    /// `None` says nothing about the range.
    pub fn try_read(&self, handle: u64, offset: u64, buf: &mut [u8]) -> Option<usize> {
        let handle = self.handle(handle).ok()?;
        handle.try_read(|disk| {
            let left = disk.virtual_size().saturating_sub(offset);
            let len = usize::try_from(left).unwrap_or(usize::MAX).min(buf.len());
            disk.try_read_at(&mut buf[..len], offset).then_some(len)
        })
    }

    /// Has long runs of data that were written go to disk, without waiting for it:
    /// the next flush has less to do.
    pub fn begin_flush(&self, handle: u64) {
        if let Ok(handle) = self.handle(handle) {
            handle.file.begin_flush();
        }
    }

    /// Writes `data`, all of it or nothing. Past the end the disk grows.
    pub fn write(&self, handle: u64, offset: u64, data: &[u8]) -> Result<()> {
        let handle = self.handle(handle)?;
        let end = offset.checked_add(data.len() as u64).ok_or(Errno::EFBIG)?;
        loop {
            let written = handle.write(self.context(), |disk| {
                if disk.virtual_size() < end {
                    return Ok(false);
                }
                match disk.write_at(data, offset) {
                    // The end has moved over the range meanwhile.
                    Err(_) if disk.virtual_size() < end => Ok(false),
                    written => written.map(|()| true),
                }
            })?;
            if written {
                return Ok(());
            }
            if self.append(&handle, offset, data)? {
                return Ok(());
            }
            self.grow_for_write(&handle, end)?;
        }
    }

    /// The same for what the kernel has taken from a program before. A failure
    /// comes too late for it to know the size.
    pub fn write_back(&self, handle: u64, offset: u64, data: &[u8]) -> Result<()> {
        self.write(handle, offset, data).inspect_err(|_| {
            if let Ok(handle) = self.handle(handle) {
                handle.file.node.note_misjudged();
            }
        })
    }

    /// Writes at the end, where that may make the disk larger by and by. Without
    /// a name it may not be able to grow, which the caller has to hear.
    fn append(&self, handle: &Handle, offset: u64, data: &[u8]) -> Result<bool> {
        let file = &handle.file;
        if !self.options.grow || file.node.orphan().is_some() {
            return Ok(false);
        }
        let _sizing = file.sizing();
        handle.write(self.context(), |disk| {
            let appended = disk.append(data, offset, self.options.preallocation)?;
            file.note_size(disk.virtual_size());
            Ok(appended)
        })
    }

    fn grow_for_write(&self, handle: &Handle, end: u64) -> Result<()> {
        let file = &handle.file;
        let sizing = file.sizing();
        handle.write(self.context(), |disk| {
            if disk.virtual_size() >= end {
                return Ok(());
            }
            if !self.options.grow {
                return Err(Error::new(
                    Errno::EFBIG,
                    "a write past the end of the disk, which -o nogrow forbids",
                ));
            }
            let size = end
                .checked_next_multiple_of(disk.size_unit())
                .ok_or(Errno::EFBIG)?;
            if size != end {
                file.node.note_misjudged();
            }
            self.resize(file, disk, &sizing, size, self.options.preallocation)
        })?;
        // The kernel takes the end of the write for the new size.
        self.memory.invalidate(file.node.id, Stale::Attributes);
        Ok(())
    }

    /// Makes everything written durable.
    pub fn fsync(&self, handle: u64) -> Result<()> {
        let handle = self.handle(handle)?;
        handle.file.passage().map_or(Ok(()), Passage::sync)?;
        handle.file.flush()
    }

    /// A descriptor of the handle was closed: everything becomes durable, and
    /// the locks go unless another handle is in use.
    pub fn flush(&self, handle: u64) -> Result<()> {
        let handle = self.handle(handle)?;
        let goes_on = handle.is_about_to_write();
        if !goes_on {
            handle.rest();
        }
        if handle.is_writable() {
            handle.file.passage().map_or(Ok(()), Passage::sync)?;
        }
        match goes_on {
            true => Ok(()),
            false => handle.file.settle(self.context()),
        }
    }

    /// Makes every image durable that waits for it, and has idle ones give their
    /// sandboxes back; to be called every second. An image that fails is
    /// reported the first time and tried again; one that somebody is opening or
    /// closing is left to the next time.
    pub fn tick(&self, failing: &mut Vec<Arc<OpenFile>>) {
        self.settle_all(failing, |file, context| {
            self.take_up_again(file)?;
            file.tick(context)
        });
        for file in self.open_files() {
            file.rest(self.options.idle);
        }
    }

    /// The kernel goes on using the content for what is left of a handle after a
    /// close (fork, dup, losetup), and no call tells: so the lock is taken again
    /// where something is left.
    fn take_up_again(&self, file: &Arc<OpenFile>) -> Result<()> {
        if !file.lacks_its_lock() {
            return Ok(());
        }
        let handles = self.handles_of(file);
        if handles.is_empty() {
            return Ok(());
        }
        handles.iter().for_each(|handle| handle.touch());
        let writable = handles.iter().any(|handle| handle.is_writable());
        file.with(self.context(), needed(writable), |_| Ok(()))
    }

    /// Makes every image durable; whether that worked for all of them.
    pub fn flush_all(&self) -> bool {
        let mut failing = Vec::new();
        self.settle_all(&mut failing, |file, context| file.settle(context));
        failing.is_empty()
    }

    fn settle_all(
        &self,
        failing: &mut Vec<Arc<OpenFile>>,
        settle: impl Fn(&Arc<OpenFile>, Context<'_>) -> Result<()>,
    ) {
        let before = std::mem::take(failing);
        for file in self.open_files() {
            file.refresh(self.context());
            let synced = file.passage().map_or(Ok(()), Passage::sync_changes);
            if let Err(error) = synced.and_then(|()| settle(&file, self.context())) {
                if !before.iter().any(|known| Arc::ptr_eq(known, &file)) {
                    self.report(&file.node, &error);
                }
                failing.push(file);
            }
        }
    }

    /// Allocates, zeroes or discards a range. `mode` is that of fallocate(2).
    pub fn fallocate(&self, handle: u64, mode: i32, offset: u64, len: u64) -> Result<()> {
        let mode = FallocateFlags::from_bits(mode).ok_or(Errno::EOPNOTSUPP)?;
        let keep_size = mode.contains(FallocateFlags::FALLOC_FL_KEEP_SIZE);
        let what = mode - FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let handle = self.handle(handle)?;
        let end = offset.checked_add(len).ok_or(Errno::EFBIG)?;
        if len == 0 {
            return Err(Errno::EINVAL.into());
        }
        if what.is_empty() {
            return self.allocate(&handle, offset, end, keep_size);
        }
        let space = match what {
            FallocateFlags::FALLOC_FL_PUNCH_HOLE if keep_size => Space::Released,
            FallocateFlags::FALLOC_FL_ZERO_RANGE => Space::Kept,
            _ => return Err(Errno::EOPNOTSUPP.into()),
        };
        if !keep_size {
            self.grow_for_write(&handle, end)?;
        }
        handle.write(self.context(), |disk| {
            let end = end.min(disk.virtual_size());
            match end.checked_sub(offset) {
                None | Some(0) => Ok(()),
                Some(len) => disk.zero(offset, len, space),
            }
        })
    }

    fn allocate(&self, handle: &Handle, offset: u64, end: u64, keep_size: bool) -> Result<()> {
        let file = &handle.file;
        let sizing = file.sizing();
        handle.write(self.context(), |disk| {
            let size = disk.virtual_size();
            if end > size && keep_size {
                return Err(Error::new(
                    Errno::EOPNOTSUPP,
                    "space past the end of a disk cannot be allocated without growing it",
                ));
            }
            if end > size {
                self.whole_units(file, disk, end)?;
            }
            // The part that may fail without a trace in the size comes first.
            if offset < size {
                disk.preallocate(offset, end.min(size) - offset)?;
            }
            if end > size {
                self.resize(file, disk, &sizing, end, Preallocation::Falloc)?;
            }
            disk.flush()
        })
    }

    /// Sets the size, through a handle or by name.
    pub(super) fn truncate(&self, node: &Arc<Node>, handle: Option<u64>, size: u64) -> Result<()> {
        let preallocation = self.options.preallocation;
        if let Some(handle) = handle {
            let handle = self.handle(handle)?;
            let sizing = handle.file.sizing();
            return handle.write(self.context(), |disk| {
                self.resize(&handle.file, disk, &sizing, size, preallocation)
            });
        }
        let _settled = node.settled();
        let stat = self.stat_now(node)?;
        self.no_backing_image(&node.path(), &stat)?;
        self.usable(node, &stat)?;
        let file = self.file(node);
        let resized = {
            let sizing = file.sizing();
            file.with(self.context(), Access::Write, |disk| {
                self.resize(&file, disk, &sizing, size, preallocation)
            })
        };
        let settled = file.settle(self.context());
        self.leave(&file);
        resized.and(settled)
    }

    /// Makes a disk larger or, where that is allowed, smaller, durably. The
    /// guard says that nobody else changes its size meanwhile.
    fn resize(
        &self,
        file: &OpenFile,
        disk: &dyn Disk,
        _sizing: &MutexGuard<'_, ()>,
        size: u64,
        preallocation: Preallocation,
    ) -> Result<()> {
        let path = self.source.display(&file.node.path());
        let old = disk.virtual_size();
        self.whole_units(file, disk, size)?;
        if size == old && !Self::is_unfinished(file, disk) {
            return Ok(());
        }
        if size < old && !self.options.shrink {
            return Err(Error::new(
                Errno::EPERM,
                format!(
                    "{}: {size} bytes is less than the disk has ({old}): mount with -o shrink to \
                     make disks smaller",
                    path.display()
                ),
            ));
        }
        let preallocation = match size > old {
            true => preallocation,
            false => Preallocation::Off,
        };
        let resized = disk.resize(size, preallocation);
        file.node.note_resize(resized.is_ok());
        // Also after a failure: the new size may be on disk.
        self.follow(file, disk);
        file.note_size(disk.virtual_size());
        for warning in resized? {
            log::warn!("{}: {warning}", path.display());
        }
        log::debug!("{}: resized to {size} bytes", path.display());
        Ok(())
    }

    /// Whether the image may have something left to do for the size that it
    /// has: a change that failed half way, or one that was cut off before it
    /// gave back its space, which the image is asked for once.
    fn is_unfinished(file: &OpenFile, disk: &dyn Disk) -> bool {
        let may_be = !file.node.is_size_whole() || disk.is_unsettled();
        may_be && disk.is_resizable()
    }

    /// Refuses a size that the format cannot express.
    fn whole_units(&self, file: &OpenFile, disk: &dyn Disk, size: u64) -> Result<()> {
        let unit = disk.size_unit();
        if size.is_multiple_of(unit) {
            return Ok(());
        }
        let path = self.source.display(&file.node.path());
        Err(Error::new(
            Errno::EINVAL,
            format!(
                "{}: a size of {size} bytes is not a multiple of {unit}",
                path.display()
            ),
        ))
    }

    /// The next data or hole at or after `offset`. A hole has whole blocks, or
    /// reaches to the end.
    pub fn lseek(&self, handle: u64, offset: u64, whence: Seek) -> Result<u64> {
        let handle = self.handle(handle)?;
        handle.read(self.context(), |disk| {
            let size = disk.virtual_size();
            if offset >= size {
                return Err(Errno::ENXIO.into());
            }
            let mut search = Search::new(offset, size, whence);
            let mut at = offset / BLOCK * BLOCK;
            let mut look = FIRST_LOOK;
            while at < size {
                let runs = disk.runs(at, look.min(size - at))?;
                if let Some(found) = search.go_on(&runs) {
                    return Ok(found);
                }
                at = end_of(&runs).filter(|&end| end > at).ok_or(Errno::EIO)?;
                look = (look * 2).min(LAST_LOOK);
            }
            match whence {
                Seek::Hole => Ok(size),
                Seek::Data => Err(Errno::ENXIO.into()),
            }
        })
    }
}

/// What `lseek` looks for in runs that follow each other from the block of
/// `offset` on.
struct Search {
    offset: u64,
    size: u64,
    whence: Seek,
    /// Where the last block with data ends.
    covered: u64,
}

impl Search {
    fn new(offset: u64, size: u64, whence: Seek) -> Self {
        Self {
            offset,
            size,
            whence,
            covered: 0,
        }
    }

    fn go_on(&mut self, runs: &[Run]) -> Option<u64> {
        runs.iter().find_map(|run| {
            let end = run.offset + run.len;
            match (run.data, self.whence) {
                (true, Seek::Data) => Some((run.offset / BLOCK * BLOCK).max(self.offset)),
                (false, Seek::Data) => None,
                (true, Seek::Hole) => {
                    self.covered = end.next_multiple_of(BLOCK);
                    None
                }
                (false, Seek::Hole) => {
                    let start = self.covered.max(self.offset);
                    let whole = match end == self.size {
                        true => end,
                        false => end / BLOCK * BLOCK,
                    };
                    (whole > start).then_some(start)
                }
            }
        })
    }
}

fn end_of(runs: &[Run]) -> Option<u64> {
    runs.last().map(|run| run.offset + run.len)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lengths of data and holes in turns, data first.
    fn runs(lens: &[u64]) -> Vec<Run> {
        let mut offset = 0;
        let runs = lens.iter().enumerate().map(|(index, &len)| {
            let run = Run {
                offset,
                len,
                data: index % 2 == 0,
            };
            offset += len;
            run
        });
        runs.filter(|run| run.len > 0).collect()
    }

    fn found(lens: &[u64], offset: u64, whence: Seek) -> Option<u64> {
        let runs = runs(lens);
        let size = end_of(&runs).unwrap_or(0);
        // As if each run were a look of its own.
        let mut search = Search::new(offset, size, whence);
        let later = runs
            .iter()
            .filter(|run| run.offset + run.len > offset / BLOCK * BLOCK);
        later.cloned().find_map(|run| search.go_on(&[run]))
    }

    #[test]
    fn a_hole_has_whole_blocks() {
        let hole = |lens: &[u64], offset| found(lens, offset, Seek::Hole);
        assert_eq!(hole(&[4096, 4096, 4096], 0), Some(4096));
        assert_eq!(hole(&[4096, 4096, 4096], 5000), Some(5000));
        assert_eq!(hole(&[4096, 4096, 4096], 8192), None);
        assert_eq!(hole(&[4608, 4096, 4096], 0), None);
        assert_eq!(hole(&[4608, 7680, 4096], 0), Some(8192));
        assert_eq!(hole(&[4608, 7680, 4096], 4608), Some(8192));
        // Up to the end of the disk.
        assert_eq!(hole(&[4608, 4096], 0), Some(8192));
        assert_eq!(hole(&[512, 512], 0), None);
        assert_eq!(hole(&[0, 512], 0), Some(0));
        // In several runs.
        assert_eq!(hole(&[512, 4000, 0, 5000, 512], 0), Some(4096));
    }

    #[test]
    fn data_begins_with_its_block() {
        let data = |lens: &[u64], offset| found(lens, offset, Seek::Data);
        assert_eq!(data(&[0, 4608, 512], 0), Some(4096));
        assert_eq!(data(&[0, 4608, 512], 4100), Some(4100));
        assert_eq!(data(&[512, 8192], 600), Some(600));
        assert_eq!(data(&[512, 8192], 4096), None);
    }
}
