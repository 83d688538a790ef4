//! A bounded cache of table pieces ("slices"): L1, L2, refcount table and
//! refcount blocks alike.
//!
//! A slice is as long as a cluster, at most [`MAX_SLICE_LEN`], and is known by
//! its host offset. Changed slices are kept until they are declared written;
//! clean ones go when room is needed. Which bytes mean what is not known here.
//!
//! [`MAX_SLICE_LEN`]: super::geometry::MAX_SLICE_LEN

use crate::bytes;
use crate::engine::{Host, Read};
use crate::error::Failure;
use crate::plan::SECTOR;
use crate::proto::FileNo;
use crate::units::HostOffset;
use alloc::collections::{BTreeMap, VecDeque};
use alloc::vec;
use alloc::vec::Vec;

/// Most bytes of clean slices that are kept.
pub const CLEAN_LIMIT: u64 = 16 << 20;

/// What a slice is a part of. Changes are written in an order that depends on
/// it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// The active L1 table.
    L1,
    /// An L2 table.
    L2,
    /// The refcount table.
    RefcountTable,
    /// A refcount block.
    RefcountBlock,
}

#[derive(Debug)]
struct Slice {
    kind: Kind,
    bytes: Vec<u8>,
    /// Bit i: sector i differs from the file. 128 sectors are the longest
    /// slice.
    dirty: u128,
    /// Changes are in a plan that is not executed yet: the file does not have
    /// them.
    planned: bool,
    /// Used since the cache last looked for something to drop.
    used: bool,
}

/// The cache.
#[derive(Debug)]
pub struct Tables {
    slice_len: u64,
    file_len: u64,
    slices: BTreeMap<u64, Slice>,
    /// Every slice once, in the order in which they are considered for
    /// dropping.
    queue: VecDeque<u64>,
    /// Slices that are changed.
    dirty_slices: u64,
    /// Sectors that are changed.
    dirty_sectors: u64,
    /// Whether any slice is marked as planned.
    any_planned: bool,
    /// How to take changes back, newest last, while somebody may ask for it.
    journal: Option<Vec<Undo>>,
}

/// What takes one change back.
#[derive(Debug)]
enum Undo {
    /// Put these bytes back, which lie in one slice that had these changes.
    Bytes {
        at: HostOffset,
        old: Vec<u8>,
        dirty: u128,
    },
    /// Drop the slice that begins there.
    Inserted(u64),
}

impl Tables {
    /// A cache of slices of `slice_len` bytes, a power of two of at most
    /// 64 KiB, over a file of `file_len` bytes.
    pub fn new(slice_len: u64, file_len: u64) -> Self {
        Self {
            slice_len,
            file_len,
            slices: BTreeMap::new(),
            queue: VecDeque::new(),
            dirty_slices: 0,
            dirty_sectors: 0,
            any_planned: false,
            journal: None,
        }
    }

    /// Length of a slice in bytes.
    pub fn slice_len(&self) -> u64 {
        self.slice_len
    }

    /// The file has grown (or is about to, by data that is being placed).
    pub fn set_file_len(&mut self, file_len: u64) {
        self.file_len = file_len;
    }

    /// Start of the slice that holds an offset.
    pub fn slice_start(&self, at: HostOffset) -> u64 {
        at.0 & !(self.slice_len - 1)
    }

    /// Whether the slice that holds an offset is cached.
    pub fn holds(&self, at: HostOffset) -> bool {
        self.slices.contains_key(&self.slice_start(at))
    }

    /// The number at `at`, a multiple of 8.
    pub fn read(
        &mut self,
        host: &mut dyn Host,
        kind: Kind,
        at: HostOffset,
    ) -> Result<u64, Failure> {
        let in_slice = (at.0 & (self.slice_len - 1)) as usize;
        Ok(bytes::be64(self.slice(host, kind, at)?, in_slice)?)
    }

    /// Changes the number at `at`, a multiple of 8, until it is written.
    pub fn write(
        &mut self,
        host: &mut dyn Host,
        kind: Kind,
        at: HostOffset,
        value: u64,
    ) -> Result<(), Failure> {
        self.change(host, kind, at, &value.to_be_bytes())
    }

    /// Changes bytes that lie in one slice, until they are written.
    pub fn change(
        &mut self,
        host: &mut dyn Host,
        kind: Kind,
        at: HostOffset,
        data: &[u8],
    ) -> Result<(), Failure> {
        let in_slice = at.0 & (self.slice_len - 1);
        let journaled = self.journal.is_some();
        let slice = self.load(host, kind, at)?;
        let old = match journaled {
            true => bytes::slice(&slice.bytes, in_slice as usize, data.len())?.to_vec(),
            false => Vec::new(),
        };
        bytes::put(&mut slice.bytes, in_slice as usize, data)?;
        let before = slice.dirty;
        for sector in in_slice / SECTOR..=(in_slice + (data.len() as u64).max(1) - 1) / SECTOR {
            slice.dirty |= 1 << sector;
        }
        let after = slice.dirty;
        self.dirty_slices += u64::from(before == 0);
        self.dirty_sectors += u64::from(after.count_ones() - before.count_ones());
        if let Some(journal) = &mut self.journal {
            journal.push(Undo::Bytes {
                at,
                old,
                dirty: before,
            });
        }
        Ok(())
    }

    /// From now on changes can be taken back with [`rollback`](Self::rollback).
    pub fn begin(&mut self) {
        self.journal = Some(Vec::new());
    }

    /// What has changed so far stays.
    pub fn keep(&mut self) {
        self.journal = None;
    }

    /// Takes back what has changed since [`begin`](Self::begin).
    pub fn rollback(&mut self) {
        for undo in self.journal.take().unwrap_or_default().into_iter().rev() {
            match undo {
                Undo::Inserted(start) => self.forget(HostOffset(start), self.slice_len),
                Undo::Bytes { at, old, dirty } => self.put_back(at, &old, dirty),
            }
        }
    }

    fn put_back(&mut self, at: HostOffset, old: &[u8], dirty: u128) {
        let start = self.slice_start(at);
        let in_slice = (at.0 - start) as usize;
        // A changed slice is never dropped, so it is still there.
        let Some(slice) = self.slices.get_mut(&start) else {
            return;
        };
        if let Some(target) = slice.bytes.get_mut(in_slice..in_slice + old.len()) {
            target.copy_from_slice(old);
        }
        self.dirty_slices -= u64::from(slice.dirty != 0 && dirty == 0);
        self.dirty_sectors -= u64::from((slice.dirty & !dirty).count_ones());
        slice.dirty = dirty;
    }

    /// The whole slice that holds `at`.
    pub fn slice(
        &mut self,
        host: &mut dyn Host,
        kind: Kind,
        at: HostOffset,
    ) -> Result<&[u8], Failure> {
        self.load(host, kind, at).map(|slice| &*slice.bytes)
    }

    /// Puts a new table of zeroes at `at`, `len` bytes, both multiples of the
    /// slice length. Nothing is read; all of it has to be written.
    pub fn insert_zeroed(&mut self, kind: Kind, at: HostOffset, len: u64) {
        for start in (at.0..at.0.saturating_add(len)).step_by(self.slice_len as usize) {
            self.insert(
                start,
                kind,
                vec![0; self.slice_len as usize],
                self.all_dirty(),
            );
            if let Some(journal) = &mut self.journal {
                journal.push(Undo::Inserted(start));
            }
        }
    }

    /// Drops what is cached of `len` bytes at `at`, changes included: the place
    /// is used for something else now.
    pub fn forget(&mut self, at: HostOffset, len: u64) {
        let end = at.0.saturating_add(len);
        let gone: Vec<u64> = self
            .slices
            .range(at.0..end)
            .map(|(&start, _)| start)
            .collect();
        if gone.is_empty() {
            return;
        }
        for start in gone {
            self.remove(start);
        }
        let slices = &self.slices;
        self.queue.retain(|start| slices.contains_key(start));
    }

    /// The changed bytes of a kind: runs of whole sectors with their places, in
    /// order.
    pub fn dirty(&self, kind: Kind) -> impl Iterator<Item = (HostOffset, &[u8])> {
        self.slices
            .iter()
            .filter(move |(_, slice)| slice.kind == kind && slice.dirty != 0)
            .flat_map(|(&start, slice)| runs(start, slice))
    }

    /// Whether anything is changed.
    pub fn is_dirty(&self) -> bool {
        self.dirty_slices != 0
    }

    /// Bytes of the slices that are changed and must be kept.
    pub fn dirty_len(&self) -> u64 {
        self.dirty_slices * self.slice_len
    }

    /// Bytes that are changed, in whole sectors.
    pub fn changed_len(&self) -> u64 {
        self.dirty_sectors * SECTOR
    }

    /// Declares all changes of a kind planned. They stay in the cache until
    /// [`executed`](Self::executed), as the file has them only then.
    pub fn mark_planned(&mut self, kind: Kind) {
        self.any_planned = true;
        for slice in self.slices.values_mut().filter(|slice| slice.kind == kind) {
            self.dirty_slices -= u64::from(slice.dirty != 0);
            self.dirty_sectors -= u64::from(slice.dirty.count_ones());
            slice.planned |= slice.dirty != 0;
            slice.dirty = 0;
        }
    }

    /// Everything planned so far is in the file.
    pub fn executed(&mut self) {
        if self.any_planned {
            self.any_planned = false;
            self.slices
                .values_mut()
                .for_each(|slice| slice.planned = false);
        }
    }

    /// Reads the slices that hold the offsets and are not cached, all at once.
    pub fn prefetch(
        &mut self,
        host: &mut dyn Host,
        kind: Kind,
        offsets: &[HostOffset],
    ) -> Result<(), Failure> {
        let mut missing: Vec<u64> = offsets
            .iter()
            .filter(|&&at| !self.holds(at))
            .map(|&at| self.slice_start(at))
            .collect();
        missing.sort_unstable();
        missing.dedup();
        let mut fresh: Vec<(u64, Vec<u8>)> = missing
            .into_iter()
            .map(|start| (start, vec![0; self.slice_len as usize]))
            .collect();
        let mut reads: Vec<Read<'_>> = fresh
            .iter_mut()
            .filter_map(|(start, buf)| {
                let len = self.file_len.saturating_sub(*start).min(self.slice_len);
                let buf = buf.get_mut(..len as usize)?;
                (!buf.is_empty()).then_some(Read {
                    file: FileNo::IMAGE,
                    offset: *start,
                    buf,
                })
            })
            .collect();
        if !reads.is_empty() {
            host.read(&mut reads)?;
        }
        for (start, bytes) in fresh {
            self.insert(start, kind, bytes, 0);
        }
        Ok(())
    }

    fn load(
        &mut self,
        host: &mut dyn Host,
        kind: Kind,
        at: HostOffset,
    ) -> Result<&mut Slice, Failure> {
        let start = self.slice_start(at);
        if !self.slices.contains_key(&start) {
            self.prefetch(host, kind, &[at])?;
        }
        let slice = self
            .slices
            .get_mut(&start)
            .ok_or(bytes::OutOfBounds { at: start as usize })?;
        slice.used = true;
        slice.kind = kind;
        Ok(slice)
    }

    fn insert(&mut self, start: u64, kind: Kind, bytes: Vec<u8>, dirty: u128) {
        self.make_room();
        let slice = Slice {
            kind,
            bytes,
            dirty,
            planned: false,
            used: true,
        };
        self.dirty_slices += u64::from(dirty != 0);
        self.dirty_sectors += u64::from(dirty.count_ones());
        match self.slices.insert(start, slice) {
            None => self.queue.push_back(start),
            Some(old) => self.uncount(&old),
        }
    }

    fn remove(&mut self, start: u64) {
        if let Some(old) = self.slices.remove(&start) {
            self.uncount(&old);
        }
    }

    fn uncount(&mut self, old: &Slice) {
        self.dirty_slices -= u64::from(old.dirty != 0);
        self.dirty_sectors -= u64::from(old.dirty.count_ones());
    }

    /// Second chance: a slice that was used since it was last looked at stays
    /// for another round, a changed one always.
    fn make_room(&mut self) {
        let most = (CLEAN_LIMIT / self.slice_len) as usize;
        let mut looks = 2 * self.queue.len();
        while self.slices.len() >= most && looks > 0 {
            looks -= 1;
            let Some(start) = self.queue.pop_front() else {
                return;
            };
            match self.slices.get_mut(&start) {
                Some(slice) if slice.used || slice.dirty != 0 || slice.planned => {
                    slice.used = false;
                    self.queue.push_back(start);
                }
                _ => self.remove(start),
            }
        }
    }

    fn all_dirty(&self) -> u128 {
        u128::MAX >> (128 - (self.slice_len / SECTOR).clamp(1, 128))
    }
}

/// The runs of changed sectors of a slice.
fn runs(start: u64, slice: &Slice) -> impl Iterator<Item = (HostOffset, &[u8])> {
    let mut rest = slice.dirty;
    core::iter::from_fn(move || {
        if rest == 0 {
            return None;
        }
        let first = rest.trailing_zeros();
        let count = (rest >> first).trailing_ones();
        let run = (u128::MAX >> (128 - count)) << first;
        rest &= !run;
        let from = u64::from(first) * SECTOR;
        let len = u64::from(count) * SECTOR;
        let bytes = bytes::slice(&slice.bytes, from as usize, len as usize).unwrap_or(&[]);
        Some((HostOffset(start + from), bytes))
    })
}
