//! Reads a VHDX by its second region table, and replays the log as the
//! specification says, from the tail of its active sequence. (qemu looks at the
//! first table only.)

use super::super::bytes::Bytes;
use super::super::disk::Files;
use super::{SECTOR, Uses, hold};
use crc::{CRC_32_ISCSI, Crc};

/// The checksum of all structures.
pub const CRC: Crc<u32> = Crc::<u32>::new(&CRC_32_ISCSI);

const K: u64 = 1024;
const M: u64 = 1024 * K;
const HEADERS: [u64; 2] = [64 * K, 128 * K];
const REGIONS: u64 = 256 * K;
/// Pages of the log.
const PAGE: u64 = 4 * K;

const BAT: u128 = 0x2dc27766_f623_4200_9d64_115e9bfd4a08;
const METADATA: u128 = 0x8b7ca206_4790_4b9a_b8fe_575f050f886e;
const FILE_PARAMETERS: u128 = 0xcaa16737_fa36_4d43_b3b6_33f0aa44e76b;
const DISK_SIZE: u128 = 0x2fa54224_cd1b_4876_b211_5dbed83bf4b8;
const SECTOR_SIZE: u128 = 0x8141bf1d_a96f_4709_ba47_f233a8faab5f;

/// The disk that the second region table leads to.
pub fn by_second_regions(files: &Files, image: &str) -> Result<Bytes, String> {
    let file = replayed(files.get(image)?)?;
    let layout = Layout::of(&file)?;
    layout.check(&file)?;
    layout.read(&file, layout.size)
}

/// The disk of a program that writes a larger size and touches nothing else.
pub fn grown_naively(files: &Files, image: &str, size: u64) -> Result<Bytes, String> {
    let file = replayed(files.get(image)?)?;
    Layout::of(&file)?.read(&file, size)
}

/// An identifier as the specification prints it: the first three parts are
/// little endian on disk.
fn guid(file: &Bytes, offset: u64) -> u128 {
    let head = u128::from(file.little::<4>(offset)) << 96
        | u128::from(file.little::<2>(offset + 4)) << 80
        | u128::from(file.little::<2>(offset + 6)) << 64;
    head | u128::from(file.big::<8>(offset + 8))
}

/// CRC-32C of a range whose own checksum field counts as zero.
fn checksum(file: &Bytes, offset: u64, len: u64, field: usize) -> u64 {
    let mut bytes = file.read(offset, len);
    bytes[field..field + 4].fill(0);
    u64::from(CRC.checksum(&bytes))
}

/// Whether a structure has its signature and its checksum.
fn is_whole(file: &Bytes, offset: u64, len: u64, signature: &[u8]) -> bool {
    file.read(offset, 4) == signature
        && checksum(file, offset, len, 4) == file.little::<4>(offset + 4)
}

/// Where the header is that counts.
fn current_header(file: &Bytes) -> Result<u64, String> {
    let whole = HEADERS
        .into_iter()
        .filter(|&at| is_whole(file, at, PAGE, b"head"));
    let header = whole.max_by_key(|at| file.little::<8>(at + 8));
    header.ok_or_else(|| "both headers are damaged".to_owned())
}

/// Whoever remembers an image by the identifiers in its header learns of every
/// change: the file gets a new one before anything in it changes but the
/// headers. It may become longer before.
pub fn announced(before: &Files, now: &Files, image: &str) -> Result<(), String> {
    let (old, new) = (before.get(image)?, now.get(image)?);
    let file_write = |file: &Bytes| Ok::<_, String>(guid(file, current_header(file)? + 16));
    if file_write(old)? != file_write(new)? {
        return Ok(());
    }
    let mut new = new.clone();
    new.set_len(old.len());
    for at in HEADERS {
        new.copy(old, at, at, PAGE);
    }
    match new.difference(old) {
        None => Ok(()),
        Some(at) => Err(format!(
            "the file changed at {at:#x} under the identifier that it had"
        )),
    }
}

/// The file as it is once its log is replayed.
fn replayed(file: &Bytes) -> Result<Bytes, String> {
    hold(file.read(0, 8) == b"vhdxfile", || "not a VHDX".to_owned())?;
    let header = current_header(file)?;
    hold(file.little::<2>(header + 66) == 1, || {
        "another version".to_owned()
    })?;
    let log = guid(file, header + 48);
    let len = file.little::<4>(header + 68);
    if log == 0 {
        return Ok(file.clone());
    }
    let offset = file.little::<8>(header + 72);
    let log = Log {
        id: log,
        ring: file.read(offset, len).as_slice().into(),
    };
    log.replay(file)
}

struct Log {
    id: u128,
    ring: Bytes,
}

/// An entry of the log, unrolled from the ring.
struct Entry {
    bytes: Bytes,
    tail: u64,
    sequence: u64,
    descriptors: u64,
}

impl Log {
    /// A range that may go past the end of the ring and on at its start.
    fn unroll(&self, offset: u64, len: u64) -> Bytes {
        let mut bytes = Bytes::zeroes(len);
        let first = len.min(self.ring.len() - offset);
        bytes.copy(&self.ring, offset, 0, first);
        bytes.copy(&self.ring, 0, first, len - first);
        bytes
    }

    /// The valid entry at an offset of the ring.
    fn entry(&self, offset: u64) -> Option<Entry> {
        let len = self.unroll(offset, PAGE).little::<4>(8);
        if len == 0 || !len.is_multiple_of(PAGE) || len > self.ring.len() {
            return None;
        }
        let bytes = self.unroll(offset, len);
        let entry = Entry {
            tail: bytes.little::<4>(12),
            sequence: bytes.little::<8>(16),
            descriptors: bytes.little::<4>(24),
            bytes,
        };
        let whole = is_whole(&entry.bytes, 0, len, b"loge");
        let ours = guid(&entry.bytes, 32) == self.id && entry.sequence > 0;
        (whole && ours && entry.parts().is_some()).then_some(entry)
    }

    /// The entries from an offset on that follow each other, with their offsets.
    fn sequence(&self, start: u64) -> Vec<(u64, Entry)> {
        let mut found: Vec<(u64, Entry)> = Vec::new();
        let (mut at, mut total) = (start, 0);
        while let Some(entry) = self.entry(at) {
            let follows = found
                .last()
                .is_none_or(|(_, last)| entry.sequence == last.sequence + 1);
            total += entry.bytes.len();
            if !follows || total > self.ring.len() {
                break;
            }
            let next = (at + entry.bytes.len()) % self.ring.len();
            found.push((at, entry));
            at = next;
        }
        found
    }

    fn replay(&self, file: &Bytes) -> Result<Bytes, String> {
        let starts = (0..self.ring.len()).step_by(PAGE as usize);
        let sequences = starts.map(|start| self.sequence(start));
        let closed = sequences.filter(|sequence| {
            let tail = sequence.last().map(|(_, head)| head.tail);
            sequence.iter().any(|(at, _)| Some(*at) == tail)
        });
        let active = closed.max_by_key(|sequence| sequence.last().map(|(_, head)| head.sequence));
        let active = active.ok_or("the log has no valid sequence")?;
        let (_, head) = active.last().ok_or("the log is empty")?;
        let durable = head.bytes.little::<8>(48);
        hold(file.len() >= durable, || {
            format!("{} bytes of a file that had {durable}", file.len())
        })?;
        let mut file = file.clone();
        let first = active.iter().position(|(at, _)| *at == head.tail);
        for (_, entry) in &active[first.unwrap_or(0)..] {
            for part in entry.parts().into_iter().flatten() {
                part.apply(&mut file);
            }
        }
        file.set_len(file.len().max(head.bytes.little::<8>(56)));
        Ok(file)
    }
}

/// What a descriptor of an entry does to the file.
struct Part {
    offset: u64,
    bytes: Bytes,
}

impl Part {
    fn apply(&self, file: &mut Bytes) {
        file.copy(&self.bytes, 0, self.offset, self.bytes.len());
    }
}

impl Entry {
    /// What the descriptors say; `None` where one is not valid.
    fn parts(&self) -> Option<Vec<Part>> {
        let header = (64 + 32 * self.descriptors).next_multiple_of(PAGE);
        let mut data = header;
        let mut parts = Vec::new();
        for at in (0..self.descriptors).map(|number| 64 + 32 * number) {
            let offset = self.bytes.little::<8>(at + 16);
            if self.bytes.little::<8>(at + 24) != self.sequence || !offset.is_multiple_of(PAGE) {
                return None;
            }
            let bytes = match &*self.bytes.read(at, 4) {
                b"zero" => Bytes::zeroes(self.bytes.little::<8>(at + 8)),
                b"desc" => {
                    let page = self.page(at, data)?;
                    data += PAGE;
                    page
                }
                _ => return None,
            };
            parts.push(Part { offset, bytes });
        }
        (data <= self.bytes.len()).then_some(parts)
    }

    /// A page of the file, put together from its descriptor and data sector.
    fn page(&self, descriptor: u64, data: u64) -> Option<Bytes> {
        let high = self.bytes.little::<4>(data + 4) << 32;
        let sequence = high | self.bytes.little::<4>(data + PAGE - 4);
        if self.bytes.read(data, 4) != b"data" || sequence != self.sequence {
            return None;
        }
        let mut page = Bytes::zeroes(PAGE);
        page.copy(&self.bytes, descriptor + 8, 0, 8);
        page.copy(&self.bytes, data + 8, 8, PAGE - 12);
        page.copy(&self.bytes, descriptor + 4, PAGE - 4, 4);
        Some(page)
    }
}

/// Where everything is.
struct Layout {
    bat: (u64, u64),
    metadata: (u64, u64),
    block: u64,
    size: u64,
    /// Payload blocks for each block of sector bitmaps.
    chunk: u64,
}

impl Layout {
    fn of(file: &Bytes) -> Result<Self, String> {
        hold(is_whole(file, REGIONS, 64 * K, b"regi"), || {
            "the second region table is damaged".to_owned()
        })?;
        let count = file.little::<4>(REGIONS + 8);
        let region = |wanted: u128| {
            let mut entries = (0..count).map(|entry| REGIONS + 16 + 32 * entry);
            let at = entries.find(|&at| guid(file, at) == wanted)?;
            Some((file.little::<8>(at + 16), file.little::<4>(at + 24)))
        };
        let bat = region(BAT).ok_or("no region for the allocation table")?;
        let metadata = region(METADATA).ok_or("no region for the metadata")?;
        hold(file.read(metadata.0, 8) == b"metadata", || {
            "no metadata table".to_owned()
        })?;
        let count = file.little::<2>(metadata.0 + 10);
        let item = |wanted: u128| {
            let mut entries = (0..count).map(|entry| metadata.0 + 32 + 32 * entry);
            let at = entries.find(|&at| guid(file, at) == wanted);
            let at = at.ok_or_else(|| format!("no metadata item {wanted:x}"))?;
            Ok::<_, String>(metadata.0 + file.little::<4>(at + 16))
        };
        let parameters = item(FILE_PARAMETERS)?;
        let block = file.little::<4>(parameters);
        hold(file.little::<4>(parameters + 4) & 2 == 0, || {
            "the disk has a parent".to_owned()
        })?;
        let sector = file.little::<4>(item(SECTOR_SIZE)?);
        let size = file.little::<8>(item(DISK_SIZE)?);
        hold(block.is_power_of_two() && block >= M, || {
            format!("blocks of {block} bytes")
        })?;
        hold(sector >= SECTOR && size.is_multiple_of(sector), || {
            format!("size {size}, sectors of {sector}")
        })?;
        Ok(Self {
            bat,
            metadata,
            block,
            size,
            chunk: (sector << 23) / block,
        })
    }

    /// The first payload blocks: the number of each, its state, and where it is.
    fn entries(&self, file: &Bytes, blocks: u64) -> impl Iterator<Item = (u64, u64, u64)> {
        let table = file.read(self.bat.0, 8 * (blocks + blocks / self.chunk));
        let chunk = self.chunk;
        (0..blocks).map(move |block| {
            let at = 8 * (block + block / chunk) as usize;
            let entry = table[at..at + 8].iter().rev();
            let entry = entry.fold(0, |number, &byte| number << 8 | u64::from(byte));
            (block, entry & 7, (entry >> 20) * M)
        })
    }

    /// Payload blocks that the table has room for.
    fn room(&self) -> u64 {
        let entries = self.bat.1 / 8;
        entries - entries / (self.chunk + 1)
    }

    /// Everything that the disk needs has a place of its own. A file may end
    /// inside its last block, which reads as zeroes then.
    fn check(&self, file: &Bytes) -> Result<(), String> {
        let blocks = self.size.div_ceil(self.block);
        hold(blocks <= self.room(), || {
            format!("{blocks} blocks do not fit into a table of {:?}", self.bat)
        })?;
        let mut uses = Uses::default();
        uses.add(0, M, "the headers");
        let header = HEADERS
            .into_iter()
            .max_by_key(|at| file.little::<8>(at + 8));
        let header = header.unwrap_or_default();
        let (log, log_len) = (file.little::<8>(header + 72), file.little::<4>(header + 68));
        let regions = [
            (self.bat, "the allocation table"),
            (self.metadata, "the metadata"),
            ((log, log_len), "the log"),
        ];
        for ((offset, len), what) in regions {
            hold(offset % M == 0 && len % M == 0 && offset > 0, || {
                format!("{what} at {offset:#x}+{len:#x}")
            })?;
            uses.add(offset, len, what);
        }
        for (block, state, at) in self.entries(file, blocks) {
            hold(matches!(state, 0..=3 | 6), || {
                format!("block {block} has the state {state}")
            })?;
            if state == 6 {
                hold(at < file.len(), || format!("block {block} is at {at:#x}"))?;
                uses.add(at, self.block, format!("block {block}"));
            }
        }
        uses.check(file.len().next_multiple_of(M) + self.block)
    }

    fn read(&self, file: &Bytes, size: u64) -> Result<Bytes, String> {
        let mut disk = Bytes::zeroes(size);
        let blocks = size.div_ceil(self.block).min(self.room());
        for (block, state, at) in self.entries(file, blocks) {
            if state == 6 {
                disk.copy(file, at, block * self.block, self.block);
            }
        }
        disk.set_len(size);
        Ok(disk)
    }
}
