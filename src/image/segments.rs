//! Where a disk's bytes are, through the whole backing chain and down to the
//! holes of the host's files.

use super::disk::{Image, shared};
use super::error::{Error, Fault, Operation};
use instar_guest::plan::SECTOR;
use instar_guest::{ExtentKind, FileNo};
use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use std::fs::File;
use std::io;

/// What lies behind a guest range. Offsets and lengths are bytes.
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
    /// File of that layer and host offset of the first byte, if there is one.
    /// For [`SegmentKind::Absent`] the place where it would be.
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

impl Image {
    /// What lies behind a range inside the disk, through the whole chain:
    /// segments without gaps from `offset` to `offset + len`, neighbours of a
    /// kind joined.
    pub fn segments(&self, offset: u64, len: u64) -> Result<Vec<Segment>, Error> {
        self.first_segments(offset, len, usize::MAX)
    }

    /// The same, but no more than the first `most`, at least one: they may end
    /// before the range does. A range of any length costs bounded memory.
    pub fn first_segments(
        &self,
        offset: u64,
        len: u64,
        most: usize,
    ) -> Result<Vec<Segment>, Error> {
        let mut out = Collected {
            segments: Vec::new(),
            most: most.max(1),
        };
        self.inside(offset, len)
            .and_then(|()| self.collect(offset, offset + len, 0, &mut out))
            .map_err(|fault| fault.at(Operation::Map, &self.path))?;
        Ok(out.segments)
    }

    fn collect(&self, offset: u64, end: u64, depth: u32, out: &mut Collected) -> Result<(), Fault> {
        let mut next = offset;
        while next < end && !out.is_full() {
            let extent = self.look(next, end - next, &mut None)?;
            let segment = |kind, at| Segment {
                offset: next,
                len: extent.len,
                kind,
                depth,
                at,
            };
            match extent.kind {
                ExtentKind::Data { file, at, .. } => {
                    let whole = segment(SegmentKind::Data, Some((file, at)));
                    split_holes(&self.files.file(file)?.file, whole, out)?;
                }
                ExtentKind::Zero { at } => {
                    let reserved = at.and_then(|at| Some((self.data_file()?, at)));
                    out.push(segment(SegmentKind::Zero, reserved));
                }
                ExtentKind::Compressed => out.push(segment(SegmentKind::Compressed, None)),
                ExtentKind::Unallocated { at } => {
                    let beside = at.and_then(|at| Some((self.data_file()?, at)));
                    let absent = segment(SegmentKind::Absent, beside);
                    match self.backing() {
                        Some(backing) => backing.collect_below(absent, out)?,
                        None => out.push(absent),
                    }
                }
            }
            next += extent.len;
        }
        Ok(())
    }

    /// The one file that holds data, if there is one.
    fn data_file(&self) -> Option<FileNo> {
        match shared(&self.facts).files.len() {
            0 => Some(FileNo::IMAGE),
            1 => Some(FileNo::DATA),
            _ => None,
        }
    }

    /// The same for what the layer above does not hold. It may be past the end,
    /// where that layer decides, but for the rest of this one's last sector.
    fn collect_below(&self, absent: Segment, out: &mut Collected) -> Result<(), Fault> {
        let (start, stop) = (absent.offset, absent.offset + absent.len);
        let end = self.virtual_size().clamp(start, stop);
        let sectors_end = self.virtual_size().checked_next_multiple_of(SECTOR);
        let sectors_end = sectors_end.unwrap_or(stop).clamp(start, stop);
        self.collect(start, end, absent.depth + 1, out)?;
        let rest = Segment {
            offset: end,
            len: sectors_end - end,
            depth: absent.depth + 1,
            at: None,
            ..absent
        };
        let past = Segment {
            offset: sectors_end,
            len: stop - sectors_end,
            at: absent.at.map(|(file, at)| (file, at + sectors_end - start)),
            ..absent
        };
        for segment in [rest, past] {
            if segment.len > 0 && !out.is_full() {
                out.push(segment);
            }
        }
        Ok(())
    }
}

/// Segments so far, and how many there may be.
struct Collected {
    segments: Vec<Segment>,
    most: usize,
}

impl Collected {
    fn is_full(&self) -> bool {
        self.segments.len() >= self.most
    }

    /// Adds a segment, joined with the last one where they continue each other.
    fn push(&mut self, segment: Segment) {
        if let Some(last) = self.segments.last_mut() {
            let next_at = last.at.map(|(file, at)| (file, at + last.len));
            if last.kind == segment.kind && last.depth == segment.depth && next_at == segment.at {
                last.len += segment.len;
                return;
            }
        }
        self.segments.push(segment);
    }
}

/// Adds a data segment in the parts that the filesystem tells apart.
fn split_holes(file: &File, whole: Segment, out: &mut Collected) -> Result<(), Fault> {
    let Some((number, start)) = whole.at else {
        return Ok(());
    };
    let end = start + whole.len;
    let mut next = start;
    while next < end && !out.is_full() {
        let data = seek(file, next, Whence::SeekData)?.unwrap_or(end).min(end);
        let (stop, kind) = match data > next {
            true => (data, SegmentKind::Hole),
            false => {
                let hole = seek(file, next, Whence::SeekHole)?.unwrap_or(end);
                (hole.clamp(next + 1, end), SegmentKind::Data)
            }
        };
        let part = Segment {
            offset: whole.offset + (next - start),
            len: stop - next,
            kind,
            depth: whole.depth,
            at: Some((number, next)),
        };
        out.push(part);
        next = stop;
    }
    Ok(())
}

/// Where the next data or hole starts; `None` past the last.
fn seek(file: &File, from: u64, whence: Whence) -> io::Result<Option<u64>> {
    match lseek(file, from as i64, whence) {
        Ok(at) => Ok(Some(at as u64)),
        Err(Errno::ENXIO) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}
