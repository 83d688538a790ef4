//! The log: finding the entries that count, and what replaying them changes.
//!
//! The log is a ring of entries with consecutive numbers. Those that count are
//! the sequence that ends in the greatest number and that contains the entry
//! which its last one names as its tail (2.3.1.4).

use super::checksum::{checksum, seal};
use super::format::{MIB, PAGE, limit, log as on_disk, region};
use super::guid::Guid;
use super::header::Header;
use super::overlay::Overlay;
use super::refuse::{damaged, unsupported};
use crate::bytes::{self, OutOfBounds, le32, le64};
use crate::engine::{Host, Read};
use crate::error::Failure;
use crate::proto::FileNo;
use alloc::collections::BTreeMap;
use alloc::format;
use alloc::vec;
use alloc::vec::Vec;

/// Bytes of the ring that are in memory at once.
const WINDOW: u64 = 4 << 20;
/// How many times the ring's length entries may claim altogether. Those of one
/// round do not overlap; what is left of earlier rounds is less each time.
const MAX_CLAIMED: u64 = 8;
/// The most steps from entry to entry while sequences are compared.
const MAX_STEPS: u32 = 1 << 20;

/// The log with a piece of it in memory.
struct Ring {
    offset: u64,
    len: u64,
    start: u64,
    window: Vec<u8>,
}

/// A valid entry, where it begins in the ring.
#[derive(Clone, Copy, Debug)]
struct Entry {
    at: u64,
    len: u64,
    sequence: u64,
    tail: u64,
    flushed_len: u64,
    last_len: u64,
}

/// What replaying a log comes to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replay {
    /// What it writes.
    pub overlay: Overlay,
    /// Length of the file afterwards.
    pub file_len: u64,
}

/// Replays the log in memory.
pub fn replay(host: &mut dyn Host, header: &Header, file_len: u64) -> Result<Replay, Failure> {
    let mut ring = Ring {
        offset: header.log_offset,
        len: header.log_len,
        start: 0,
        window: Vec::new(),
    };
    if ring.offset.saturating_add(ring.len) > file_len {
        return Err(damaged(format!(
            "the log at {:#x} ({} bytes) reaches past the end of the file ({file_len} bytes)",
            ring.offset, ring.len
        )));
    }
    let entries = find_entries(host, &mut ring, header.log)?;
    let active = active(&entries, ring.len)?;
    let head = active.last().ok_or_else(no_entries)?;
    if file_len < head.flushed_len {
        return Err(damaged(format!(
            "the file is {file_len} bytes long, and its log says that it had {} bytes: it has \
             been cut off",
            head.flushed_len
        )));
    }
    if !head.last_len.is_multiple_of(MIB) || head.last_len > limit::MAX_TRACKED {
        return Err(damaged(format!(
            "the log says that the file has {} bytes afterwards, which is no multiple of 1 MiB or \
             more than {}",
            head.last_len,
            limit::MAX_TRACKED
        )));
    }
    let file_len = file_len.max(head.last_len);
    let mut changes = Changes {
        overlay: Overlay::default(),
        bytes: 0,
        file_len,
        log: (header.log_offset, header.log_len),
    };
    for entry in active.iter().rev() {
        let bytes = ring.get(host, entry.at, entry.len)?;
        changes.add(&bytes)?;
    }
    Ok(Replay {
        overlay: changes.overlay,
        file_len,
    })
}

fn no_entries() -> Failure {
    damaged(
        "the log is in use, but holds no valid sequence of entries; `qemu-img convert` may still \
         read the image",
    )
}

impl Ring {
    /// Bytes of the ring, which go on at its start after its end.
    fn get(&mut self, host: &mut dyn Host, at: u64, len: u64) -> Result<Vec<u8>, Failure> {
        let mut bytes = vec![0; len as usize];
        let (front, back) = bytes.split_at_mut(len.min(self.len - at) as usize);
        self.copy(host, at, front)?;
        self.copy(host, 0, back)?;
        Ok(bytes)
    }

    fn copy(&mut self, host: &mut dyn Host, at: u64, buf: &mut [u8]) -> Result<(), Failure> {
        let inside = at.checked_sub(self.start);
        let inside = inside.and_then(|at| bytes::slice(&self.window, at as usize, buf.len()).ok());
        match inside {
            Some(found) => buf.copy_from_slice(found),
            None if buf.is_empty() => {}
            None => host.read(&mut [Read {
                file: FileNo::IMAGE,
                offset: self.offset + at,
                buf,
            }])?,
        }
        Ok(())
    }

    /// Brings a piece into memory.
    fn load(&mut self, host: &mut dyn Host, at: u64) -> Result<(), Failure> {
        self.window.clear();
        self.window.resize(WINDOW.min(self.len - at) as usize, 0);
        self.start = at;
        host.read(&mut [Read {
            file: FileNo::IMAGE,
            offset: self.offset + at,
            buf: &mut self.window,
        }])
    }
}

/// All valid entries, by where they begin.
fn find_entries(
    host: &mut dyn Host,
    ring: &mut Ring,
    guid: Guid,
) -> Result<BTreeMap<u64, Entry>, Failure> {
    let mut entries = BTreeMap::new();
    let mut claimed = 0u64;
    for start in (0..ring.len).step_by(WINDOW as usize) {
        ring.load(host, start)?;
        for at in (start..(start + WINDOW).min(ring.len)).step_by(PAGE as usize) {
            let page = ring.get(host, at, PAGE)?;
            let Some(len) = claimed_len(&page, ring.len, guid)? else {
                continue;
            };
            claimed += len;
            if claimed > MAX_CLAIMED.saturating_mul(ring.len) {
                return Err(damaged("the entries of the log overlap each other"));
            }
            if len > on_disk::MAX_ENTRY {
                return Err(unsupported(format!(
                    "the log has an entry of {len} bytes, which is more than {}; replay it with \
                     `qemu-img check -r all`",
                    on_disk::MAX_ENTRY
                )));
            }
            let bytes = ring.get(host, at, len)?;
            if let Some(entry) = decode(&bytes, at)? {
                entries.insert(at, entry);
            }
        }
    }
    Ok(entries)
}

/// The length of the entry that a page may begin.
fn claimed_len(page: &[u8], ring_len: u64, guid: Guid) -> Result<Option<u64>, OutOfBounds> {
    let len = u64::from(le32(page, on_disk::LEN)?);
    let plausible = page.starts_with(on_disk::ENTRY)
        && bytes::slice(page, on_disk::GUID, 16)? == guid.0
        && len != 0
        && len.is_multiple_of(PAGE)
        && len <= ring_len;
    Ok(plausible.then_some(len))
}

/// The entry, if it is valid as a whole.
fn decode(bytes: &[u8], at: u64) -> Result<Option<Entry>, OutOfBounds> {
    let stored = le32(bytes, on_disk::CHECKSUM)?;
    let sequence = le64(bytes, on_disk::SEQUENCE)?;
    if sequence == 0 || stored != checksum(bytes, on_disk::CHECKSUM) {
        return Ok(None);
    }
    let entry = Entry {
        at,
        len: bytes.len() as u64,
        sequence,
        tail: u64::from(le32(bytes, on_disk::TAIL)?),
        flushed_len: le64(bytes, on_disk::FLUSHED_LEN)?,
        last_len: le64(bytes, on_disk::LAST_LEN)?,
    };
    Ok(descriptors(bytes)?.map(|_| entry))
}

/// One change that an entry describes.
#[derive(Clone, Copy, Debug)]
enum Descriptor<'a> {
    Page { offset: u64, parts: [&'a [u8]; 3] },
    Zeroes { offset: u64, len: u64 },
}

/// What an entry describes, if all of that is valid.
fn descriptors(bytes: &[u8]) -> Result<Option<Vec<Descriptor<'_>>>, OutOfBounds> {
    let sequence = le64(bytes, on_disk::SEQUENCE)?;
    let count = u64::from(le32(bytes, on_disk::COUNT)?);
    let area = on_disk::HEADER_LEN as u64 + count * on_disk::DESCRIPTOR_LEN as u64;
    let data_at = area.next_multiple_of(PAGE);
    if data_at > bytes.len() as u64 {
        return Ok(None);
    }
    let mut pages = bytes
        .get(data_at as usize..)
        .unwrap_or(&[])
        .chunks(PAGE as usize);
    let mut found = Vec::new();
    for index in 0..count as usize {
        let at = on_disk::HEADER_LEN + index * on_disk::DESCRIPTOR_LEN;
        let descriptor = bytes::slice(bytes, at, on_disk::DESCRIPTOR_LEN)?;
        let offset = le64(descriptor, on_disk::OFFSET)?;
        let own = le64(descriptor, on_disk::DESCRIPTOR_SEQUENCE)? == sequence;
        if !own || !offset.is_multiple_of(PAGE) {
            return Ok(None);
        }
        if descriptor.starts_with(on_disk::ZERO_DESCRIPTOR) {
            let len = le64(descriptor, on_disk::LEADING)?;
            if !len.is_multiple_of(PAGE) {
                return Ok(None);
            }
            found.push(Descriptor::Zeroes { offset, len });
            continue;
        }
        let page = pages
            .next()
            .filter(|_| descriptor.starts_with(on_disk::DATA_DESCRIPTOR));
        let Some(page) = page else {
            return Ok(None);
        };
        let halves = (
            u64::from(le32(page, on_disk::DATA_HIGH)?),
            u64::from(le32(page, on_disk::DATA_LOW)?),
        );
        if !page.starts_with(on_disk::DATA) || halves.0 << 32 | halves.1 != sequence {
            return Ok(None);
        }
        let body = page.get(on_disk::DATA_BODY);
        let parts = [
            bytes::slice(descriptor, on_disk::LEADING, 8)?,
            body.ok_or(OutOfBounds { at: 0 })?,
            bytes::slice(descriptor, on_disk::TRAILING, 4)?,
        ];
        found.push(Descriptor::Page { offset, parts });
    }
    Ok(pages.next().is_none().then_some(found))
}

/// The entries that count, oldest first.
fn active(entries: &BTreeMap<u64, Entry>, ring_len: u64) -> Result<Vec<Entry>, Failure> {
    let successor = |entry: &Entry| {
        let next = entries.get(&((entry.at + entry.len) % ring_len));
        next.filter(|next| Some(next.sequence) == entry.sequence.checked_add(1))
    };
    let mut heads: Vec<&Entry> = entries
        .values()
        .filter(|entry| successor(entry).is_none())
        .collect();
    heads.sort_unstable_by_key(|entry| core::cmp::Reverse(entry.sequence));
    let mut steps = 0;
    for head in heads {
        let mut sequence = Vec::new();
        let mut at = entries.get(&head.tail);
        let mut len = 0;
        while let Some(entry) = at {
            steps += 1;
            len += entry.len;
            if steps > MAX_STEPS || len > ring_len {
                break;
            }
            sequence.push(*entry);
            if entry.at == head.at {
                return Ok(sequence);
            }
            at = successor(entry);
        }
    }
    Err(no_entries())
}

/// What entries change, collected from the newest to the oldest.
struct Changes {
    overlay: Overlay,
    bytes: usize,
    file_len: u64,
    log: (u64, u64),
}

impl Changes {
    fn add(&mut self, entry: &[u8]) -> Result<(), Failure> {
        let found = descriptors(entry)?.ok_or_else(no_entries)?;
        for descriptor in found.into_iter().rev() {
            match descriptor {
                Descriptor::Zeroes { offset, len } => {
                    self.check(offset, len)?;
                    self.overlay.add_zeroes(offset, len);
                }
                Descriptor::Page { offset, parts } => {
                    self.check(offset, PAGE)?;
                    if self.overlay.add_data(offset, parts.concat()) {
                        self.bytes += PAGE as usize;
                    }
                }
            }
            let ranges = self.overlay.ranges();
            if self.bytes > on_disk::MAX_CHANGE || ranges > on_disk::MAX_RANGES {
                return Err(unsupported(
                    "the log changes more than can be replayed at once; replay it with `qemu-img \
                     check -r all`",
                ));
            }
        }
        Ok(())
    }

    /// The log changes neither headers nor itself, nor what is past the end.
    fn check(&self, offset: u64, len: u64) -> Result<(), Failure> {
        let end = offset.saturating_add(len);
        let (log, log_len) = self.log;
        let [tables, _] = region::TABLES;
        let what = if offset < tables {
            "changes the headers"
        } else if offset < log.saturating_add(log_len) && log < end {
            "changes the log itself"
        } else if end > self.file_len {
            "reaches past the length of the file that the log names"
        } else {
            return Ok(());
        };
        Err(damaged(format!(
            "the log cannot be replayed: a change at {offset:#x} ({len} bytes) {what}"
        )))
    }
}

/// A log entry of its own, at the start of the log, that changes whole pages and
/// zeroes others. `file_len` is the length that the file has by then, durably.
/// `None` if it does not fit.
pub fn encode(
    pages: &[(u64, Vec<u8>)],
    (zero_at, zero_len): (u64, u64),
    guid: Guid,
    file_len: u64,
    log_len: u64,
) -> Result<Option<Vec<u8>>, Failure> {
    const SEQUENCE: u64 = 1;
    let count = pages.len() + usize::from(zero_len > 0);
    let area = on_disk::HEADER_LEN + count * on_disk::DESCRIPTOR_LEN;
    let data_at = area.next_multiple_of(PAGE as usize);
    let len = data_at + pages.len() * PAGE as usize;
    if len as u64 > log_len {
        return Ok(None);
    }
    let mut entry = vec![0; len];
    bytes::put(&mut entry, 0, on_disk::ENTRY)?;
    bytes::put_le32(&mut entry, on_disk::LEN, len as u32)?;
    bytes::put_le64(&mut entry, on_disk::SEQUENCE, SEQUENCE)?;
    bytes::put_le32(&mut entry, on_disk::COUNT, count as u32)?;
    bytes::put(&mut entry, on_disk::GUID, &guid.0)?;
    let flushed = file_len - file_len % MIB;
    bytes::put_le64(&mut entry, on_disk::FLUSHED_LEN, flushed)?;
    let last = file_len.next_multiple_of(MIB);
    bytes::put_le64(&mut entry, on_disk::LAST_LEN, last)?;
    for (index, (offset, page)) in pages.iter().enumerate() {
        let at = on_disk::HEADER_LEN + index * on_disk::DESCRIPTOR_LEN;
        let data = data_at + index * PAGE as usize;
        bytes::put(&mut entry, at, on_disk::DATA_DESCRIPTOR)?;
        let trailing = bytes::slice(page, on_disk::DATA_LOW, 4)?;
        bytes::put(&mut entry, at + on_disk::TRAILING, trailing)?;
        bytes::put(&mut entry, at + on_disk::LEADING, bytes::slice(page, 0, 8)?)?;
        bytes::put_le64(&mut entry, at + on_disk::OFFSET, *offset)?;
        bytes::put_le64(&mut entry, at + on_disk::DESCRIPTOR_SEQUENCE, SEQUENCE)?;
        bytes::put(&mut entry, data, page)?;
        bytes::put(&mut entry, data, on_disk::DATA)?;
        bytes::put_le32(&mut entry, data + on_disk::DATA_HIGH, 0)?;
        bytes::put_le32(&mut entry, data + on_disk::DATA_LOW, SEQUENCE as u32)?;
    }
    if zero_len > 0 {
        let at = area - on_disk::DESCRIPTOR_LEN;
        bytes::put(&mut entry, at, on_disk::ZERO_DESCRIPTOR)?;
        bytes::put_le64(&mut entry, at + on_disk::LEADING, zero_len)?;
        bytes::put_le64(&mut entry, at + on_disk::OFFSET, zero_at)?;
        bytes::put_le64(&mut entry, at + on_disk::DESCRIPTOR_SEQUENCE, SEQUENCE)?;
    }
    seal(&mut entry, on_disk::CHECKSUM);
    Ok(Some(entry))
}
