//! Writing: in place where an extent allows it, else to places that the guest
//! gives, with the rest of the allocation unit brought along.

use super::disk::{Image, Link, exclusive, hold, shared};
use super::error::{Error, ErrorKind, Fault, Operation};
use super::extents::{check_places, placed, slice};
use super::pieces::{Old, Piece, Placement, Units, Widening, is_zero};
use super::read::unexpected;
use instar_guest::plan::{MAX_GAP, Step};
use instar_guest::proto::{Content, Place};
use instar_guest::{Extent, ExtentKind, Reply, Request};
use std::sync::RwLockWriteGuard;
use std::sync::atomic::Ordering;

/// The most bytes that are placed by one request where content is brought
/// along, and so held in memory.
const CHUNK: u64 = 2 << 20;
/// The same where only zeroes are placed.
const ZERO_CHUNK: u64 = 16 << 20;
/// How far past what was placed a place may lie: room for the mapping's own
/// growth, which the guest has planned and not yet written. Four times the data
/// covers a table for each smallest cluster.
const SLACK: u64 = 64 << 20;
const SLACK_FACTOR: u64 = 4;

impl Image {
    /// Writes `buf` to the disk. The range must lie inside the disk. Durable
    /// after the next [`flush`](Self::flush).
    pub fn write_at(&self, buf: &[u8], offset: u64) -> Result<(), Error> {
        self.may_write(offset, buf.len() as u64)
            .and_then(|()| self.store(buf, offset))
            .map_err(|fault| fault.at(Operation::Write, &self.path))
    }

    /// Has long runs of data that were written go to disk, without waiting: the
    /// next [`flush`](Self::flush) has less to do.
    pub fn begin_flush(&self) {
        self.files.begin_sync();
    }

    /// Gives every byte of a range inside the disk a place with disk space
    /// behind it, content unchanged; durable when it returns.
    pub fn preallocate(&self, offset: u64, len: u64) -> Result<(), Error> {
        self.may_write(offset, len)
            .and_then(|()| self.allocate_range(offset, offset + len))
            .and_then(|()| self.flush_all())
            .map_err(|fault| fault.at(Operation::Write, &self.path))
    }

    pub(super) fn may_write(&self, offset: u64, len: u64) -> Result<(), Fault> {
        self.alive()?;
        self.writable()?;
        self.inside(offset, len)?;
        self.content_may_change()?;
        if self.put_in_order()? {
            // What was found meanwhile decides.
            self.inside(offset, len)?;
            self.content_may_change()?;
        }
        Ok(())
    }

    fn content_may_change(&self) -> Result<(), Fault> {
        match &shared(&self.facts).no_write {
            None => Ok(()),
            Some(failure) => Err(Fault::from(failure)),
        }
    }

    pub(super) fn store(&self, buf: &[u8], offset: u64) -> Result<(), Fault> {
        let (mut done, mut patience) = (0, Patience::new());
        while done < buf.len() {
            let (at, rest) = (offset + done as u64, &buf[done..]);
            let n = match self.store_in_place(rest, at)? {
                0 => self.store_placed(rest, at, &mut patience)?,
                n => n,
            };
            if n > 0 {
                patience = Patience::new();
            }
            done += n;
        }
        Ok(())
    }

    /// Writes over what may be overwritten at an offset; answers how many bytes.
    fn store_in_place(&self, buf: &[u8], offset: u64) -> Result<usize, Fault> {
        self.alive()?;
        let traffic = shared(&self.traffic);
        let found = shared(&self.extents).find(offset);
        let n = match found.map(|extent| slice(extent, 0, buf.len() as u64)) {
            Some(Extent {
                kind:
                    ExtentKind::Data {
                        file,
                        at,
                        in_place: true,
                    },
                len,
                ..
            }) => {
                let n = len as usize;
                self.files.write(file, at, &buf[..n])?;
                n
            }
            _ => 0,
        };
        drop(traffic);
        Ok(n)
    }

    /// Writes to new places, from an offset up to the next range that may be
    /// overwritten; answers how many bytes. 0 if by now it may be overwritten
    /// there, too.
    fn store_placed(
        &self,
        buf: &[u8],
        offset: u64,
        patience: &mut Patience,
    ) -> Result<usize, Fault> {
        let mut link = hold(&self.session);
        self.catch_up(&mut link)?;
        // The disk may have become smaller while the session was waited for.
        self.inside(offset, buf.len() as u64)?;
        let end = offset + (buf.len() as u64).min(CHUNK);
        let end = self.end_of_fixed(&mut link, offset, end)?;
        if end == offset {
            return Ok(0);
        }
        let body = &buf[..(end - offset) as usize];
        let mut widening = Widening::new(self.units(offset, end));
        loop {
            let units = widening.now;
            let quiet = self.quiet(&mut link, units)?;
            let head = self.old(&mut link, units.start, offset)?;
            let tail = self.old(&mut link, end, units.end)?;
            let pieces = [head.piece(), Piece::New(body), tail.piece()];
            let placed = self.place(&mut link, widening, &pieces, false);
            drop(quiet);
            match placed {
                Ok(None) => return Ok(body.len()),
                Ok(Some(wider)) => widening = wider,
                Err(fault) => return self.make_room(&mut link, fault, patience).map(|()| 0),
            }
        }
    }

    /// The end of the run of extents from an offset on that cannot be
    /// overwritten where they are.
    fn end_of_fixed(&self, link: &mut Link, offset: u64, limit: u64) -> Result<u64, Fault> {
        let mut end = offset;
        while end < limit {
            let extent = self.look(end, limit - end, &mut Some(&mut *link))?;
            if matches!(extent.kind, ExtentKind::Data { in_place: true, .. }) {
                break;
            }
            end += extent.len;
        }
        Ok(end)
    }

    /// The whole allocation units around a range, clipped at the disk's end.
    pub(super) fn units(&self, start: u64, end: u64) -> Units {
        let unit = shared(&self.facts).write_unit.max(1);
        let up = end.checked_next_multiple_of(unit).unwrap_or(u64::MAX);
        Units {
            start: start / unit * unit,
            end: up.min(self.virtual_size()),
        }
    }

    /// Reads a range before its mapping changes; zeroes take no memory.
    fn old(&self, link: &mut Link, start: u64, end: u64) -> Result<Old, Fault> {
        if self.reads_zero(link, start, end)? {
            return Ok(Old::Zeroes(end - start));
        }
        let mut bytes = vec![0; (end - start) as usize];
        self.fill(&mut bytes, start, &mut Some(link))?;
        Ok(Old::Bytes(bytes))
    }

    /// Whether the mapping alone says that a range reads as zeroes.
    pub(super) fn reads_zero(&self, link: &mut Link, start: u64, end: u64) -> Result<bool, Fault> {
        let mut next = start;
        while next < end {
            let extent = self.look(next, end - next, &mut Some(&mut *link))?;
            let zero = match extent.kind {
                ExtentKind::Zero { .. } => true,
                ExtentKind::Unallocated { .. } => {
                    let layer = self.backing.as_deref();
                    layer.is_none_or(|backing| backing.virtual_size() <= next)
                }
                ExtentKind::Data { .. } | ExtentKind::Compressed => false,
            };
            if !zero {
                return Ok(false);
            }
            next += extent.len;
        }
        Ok(true)
    }

    /// Has whole units placed and writes their content there. The mapping
    /// changes once the data is written, or not at all. Answers the units to
    /// try instead, where these cannot be placed without others.
    fn place(
        &self,
        link: &mut Link,
        widening: Widening,
        pieces: &[Piece<'_>],
        reserve: bool,
    ) -> Result<Option<Widening>, Fault> {
        self.no_backing_skipped()?;
        let places = match self.allocate(link, widening)? {
            Placement::Places(places) => places,
            Placement::Wider(wider) => return Ok(Some(wider)),
        };
        let lens = self.files.lens();
        let written = self.fill_places(&places, widening.now.start, pieces, reserve);
        if let Err(fault) = written {
            self.undo(link, &lens);
            return Err(fault);
        }
        let extents: Vec<Extent> = places.iter().map(placed).collect();
        exclusive(&self.extents).replace(&extents);
        Ok(None)
    }

    /// An overlay whose backing file is not open must not be written: what
    /// surrounds the data would be taken for zeroes.
    fn no_backing_skipped(&self) -> Result<(), Fault> {
        match &self.backing {
            Some(_) => Ok(()),
            None => self.no_backing_named(),
        }
    }

    /// Where a unit can partly be overwritten in place, the guest may still
    /// move it as a whole: keeps everybody else out until that is done.
    fn quiet(
        &self,
        link: &mut Link,
        units: Units,
    ) -> Result<Option<RwLockWriteGuard<'_, ()>>, Fault> {
        let mut next = units.start;
        while next < units.end {
            let extent = self.look(next, units.end - next, &mut Some(&mut *link))?;
            if matches!(extent.kind, ExtentKind::Data { in_place: true, .. }) {
                return Ok(Some(exclusive(&self.traffic)));
            }
            next += extent.len;
        }
        Ok(None)
    }

    /// Asks for places.
    fn allocate(&self, link: &mut Link, widening: Widening) -> Result<Placement, Fault> {
        let (offset, len) = (widening.now.start, widening.now.len());
        let reply = self.ask(link, &Request::Allocate { offset, len })?;
        if let Reply::Wider { offset, len } = reply {
            let wider = widening.widened(offset, len, self.virtual_size());
            return wider.map(Placement::Wider).ok_or_else(|| {
                self.lose();
                unexpected("Allocate")
            });
        }
        // From here on the guest's mapping differs from the file's.
        self.unflushed.store(true, Ordering::Release);
        link.placed += len;
        let room = SLACK + MAX_GAP + link.placed.saturating_mul(SLACK_FACTOR);
        let cap = |file| {
            let writable = self.files.writable(file);
            let len = self.files.len(file).filter(|_| writable)?;
            Some(len.saturating_add(room).min(i64::MAX as u64))
        };
        let checked = match reply {
            Reply::Placed(places) => check_places(&places, offset, len, cap)
                .map(|()| Placement::Places(places))
                .map_err(Fault::from),
            _ => Err(unexpected("Allocate")),
        };
        // A guest that answers nonsense holds nothing that should reach disk.
        checked.inspect_err(|_| self.lose())
    }

    /// Writes pieces without gaps, from guest offset `start` on, to the places.
    fn fill_places(
        &self,
        places: &[Place],
        start: u64,
        pieces: &[Piece<'_>],
        reserve: bool,
    ) -> Result<(), Fault> {
        for place in places {
            if reserve {
                self.files.reserve(place.file, place.at, place.len)?;
            }
            let mut from = start;
            for piece in pieces {
                let to = from + piece.len();
                let (first, last) = (from.max(place.offset), to.min(place.offset + place.len));
                if first < last {
                    let at = place.at + (first - place.offset);
                    self.put(place, at, piece.cut(first - from, last - from))?;
                }
                from = to;
            }
            self.extend(place)?;
        }
        Ok(())
    }

    fn put(&self, place: &Place, at: u64, piece: Piece<'_>) -> Result<(), Fault> {
        let file = place.file;
        match (place.content, piece) {
            (Content::Current, Piece::Old(_) | Piece::OldZeroes(_))
            | (Content::Zero, Piece::OldZeroes(_)) => {}
            (Content::Zero, Piece::Old(bytes) | Piece::New(bytes)) if is_zero(bytes) => {}
            (_, Piece::Old(bytes) | Piece::New(bytes)) => self.files.write(file, at, bytes)?,
            (Content::Stale, Piece::OldZeroes(len)) => {
                self.files.step(&Step::Zero {
                    file,
                    offset: at,
                    len,
                })?;
            }
        }
        Ok(())
    }

    /// Lets the file end no earlier than the place does.
    fn extend(&self, place: &Place) -> Result<(), Fault> {
        let end = place.at + place.len;
        let short = self.files.len(place.file).is_some_and(|len| len < end);
        if short && place.content != Content::Current {
            self.files.set_len(place.file, end)?;
        }
        Ok(())
    }

    /// Takes back an allocation whose data could not be written.
    fn undo(&self, link: &mut Link, lens: &[u64]) {
        if self.ask(link, &Request::Undo).is_err() {
            self.lose();
            return;
        }
        // The failure at hand is the one to tell; a longer file is harmless.
        let _ = super::execute::truncate_back(&self.files, lens);
    }

    /// Gives every unit of a range a place with disk space behind it.
    fn allocate_range(&self, start: u64, end: u64) -> Result<(), Fault> {
        if start == end {
            return Ok(());
        }
        let Units { start, end } = self.units(start, end);
        let (mut next, mut patience) = (start, Patience::new());
        while next < end {
            let mut link = hold(&self.session);
            self.catch_up(&mut link)?;
            let reached = self.allocate_some(&mut link, next, end, &mut patience)?;
            if reached > next {
                patience = Patience::new();
            }
            next = reached;
        }
        Ok(())
    }

    /// Does that for the first part of a range; answers where it ends.
    fn allocate_some(
        &self,
        link: &mut Link,
        start: u64,
        end: u64,
        patience: &mut Patience,
    ) -> Result<u64, Fault> {
        let extent = self.look(start, end - start, &mut Some(&mut *link))?;
        if let ExtentKind::Data {
            file,
            at,
            in_place: true,
        } = extent.kind
        {
            self.files.reserve(file, at, extent.len)?;
            return Ok(start + extent.len);
        }
        let chunk = match self.reads_zero(link, start, start + extent.len)? {
            true => ZERO_CHUNK,
            false => CHUNK,
        };
        let wanted = self.units(start, start + extent.len.min(chunk));
        match self.place_old(link, wanted, true) {
            Ok(units) => Ok(units.end),
            Err(fault) => self.make_room(link, fault, patience).map(|()| start),
        }
    }

    /// Has units placed with the content that they have; answers which, those
    /// that had to be placed together with them included.
    pub(super) fn place_old(
        &self,
        link: &mut Link,
        wanted: Units,
        reserve: bool,
    ) -> Result<Units, Fault> {
        let mut widening = Widening::new(wanted);
        loop {
            let units = widening.now;
            let quiet = self.quiet(link, units)?;
            let old = self.old(link, units.start, units.end)?;
            let placed = self.place(link, widening, &[old.piece()], reserve);
            drop(quiet);
            match placed? {
                None => return Ok(units),
                Some(wider) => widening = wider,
            }
        }
    }

    /// Where the guest wants a flush first, one makes room and the request is
    /// worth another try; any other failure stays one.
    fn make_room(
        &self,
        link: &mut Link,
        fault: Fault,
        patience: &mut Patience,
    ) -> Result<(), Fault> {
        if fault.kind != ErrorKind::GuestMemory || !patience.is_left() {
            return Err(fault);
        }
        // What the flush is for waits in the guest, even where nothing was placed.
        self.unflushed.store(true, Ordering::Release);
        self.flush_held(link)
    }
}

/// How often a request that gets nowhere may be tried again after a flush. Once
/// is enough for a guest that keeps its word, unless another request takes what
/// the flush was for: a resize has the guest read the image again.
struct Patience(u32);

impl Patience {
    const fn new() -> Self {
        Self(4)
    }

    fn is_left(&mut self) -> bool {
        let left = self.0;
        self.0 = left.saturating_sub(1);
        left > 0
    }
}
