//! The calls that concern the content and the size of a disk.

use super::disk::{Disk, Run};
use super::error::{Error, Result};
use super::filesystem::Filesystem;
use super::memory::Stale;
use super::nodes::Node;
use super::open::{Context, Handle, OpenFile};
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
            self.resize(file, disk, &sizing, size, self.options.preallocation)
        })?;
        // The kernel takes the end of the write for the new size.
        self.memory.invalidate(file.node.id, Stale::Attributes);
        Ok(())
    }

    /// Makes everything written durable.
    pub fn fsync(&self, handle: u64) -> Result<()> {
        self.handle(handle)?.file.flush()
    }

    /// A descriptor of the handle was closed: everything becomes durable, and
    /// the locks go unless another handle is in use.
    pub fn flush(&self, handle: u64) -> Result<()> {
        let handle = self.handle(handle)?;
        handle.rest();
        handle.file.settle(self.context())
    }

    /// Makes every image durable that waits for it, and has idle ones give their
    /// sandboxes back; to be called every second. An image that fails is
    /// reported the first time and tried again; one that somebody is opening or
    /// closing is left to the next time.
    pub fn tick(&self, failing: &mut Vec<Arc<OpenFile>>) {
        self.settle_all(failing, OpenFile::tick);
        for file in self.open_files() {
            file.rest(self.options.idle);
        }
    }

    /// Makes every image durable; whether that worked for all of them.
    pub fn flush_all(&self) -> bool {
        let mut failing = Vec::new();
        self.settle_all(&mut failing, OpenFile::settle);
        failing.is_empty()
    }

    fn settle_all(
        &self,
        failing: &mut Vec<Arc<OpenFile>>,
        settle: fn(&OpenFile, Context<'_>) -> Result<()>,
    ) {
        let before = std::mem::take(failing);
        for file in self.open_files() {
            file.refresh(self.context());
            if let Err(error) = settle(&file, self.context()) {
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

    /// The next data or hole at or after `offset`.
    pub fn lseek(&self, handle: u64, offset: u64, whence: Seek) -> Result<u64> {
        let handle = self.handle(handle)?;
        handle.read(self.context(), |disk| {
            let size = disk.virtual_size();
            if offset >= size {
                return Err(Errno::ENXIO.into());
            }
            let mut at = offset;
            let mut look = FIRST_LOOK;
            while at < size {
                let runs = disk.runs(at, look.min(size - at))?;
                if let Some(found) = first_match(&runs, at, whence) {
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

/// Where the first run of the kind looked for starts, not before `at`.
fn first_match(runs: &[Run], at: u64, whence: Seek) -> Option<u64> {
    runs.iter()
        .find(|run| run.data == (whence == Seek::Data))
        .map(|run| run.offset.max(at))
}

fn end_of(runs: &[Run]) -> Option<u64> {
    runs.last().map(|run| run.offset + run.len)
}
