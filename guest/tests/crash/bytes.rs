//! The bytes of a file: sparse, cheap to copy, quick to name by their digest.
//! Thousands of states differ in a sector each.

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, OnceLock};

/// Bytes that are stored, copied and named together.
const CHUNK: usize = 4096;

/// A file's content. What no chunk holds is zero; what a chunk holds past the
/// end is zero too.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Bytes {
    len: u64,
    chunks: BTreeMap<u64, Arc<Chunk>>,
}

#[derive(Clone)]
struct Chunk {
    bytes: [u8; CHUNK],
    /// A name for them, once it was asked for.
    digest: OnceLock<u64>,
}

impl PartialEq for Chunk {
    fn eq(&self, other: &Self) -> bool {
        self.bytes == other.bytes
    }
}

impl Eq for Chunk {}

impl Chunk {
    fn digest(&self) -> u64 {
        *self.digest.get_or_init(|| {
            let mut digest = Digest::new();
            digest.mix_bytes(&self.bytes);
            digest.0
        })
    }
}

/// Mixes words into a name for them.
#[derive(Clone, Copy)]
pub struct Digest(pub u64);

impl Digest {
    const ODD: u64 = 0x9e37_79b9_7f4a_7c15;

    /// Of nothing yet.
    pub fn new() -> Self {
        Self(Self::ODD)
    }

    /// Adds a word.
    pub fn mix(&mut self, word: u64) {
        self.0 = (self.0 ^ word).wrapping_mul(Self::ODD).rotate_left(29);
        self.0 ^= self.0 >> 32;
    }

    /// Adds bytes.
    pub fn mix_bytes(&mut self, bytes: &[u8]) {
        let (words, rest) = bytes.as_chunks::<8>();
        words
            .iter()
            .for_each(|word| self.mix(u64::from_le_bytes(*word)));
        rest.iter().for_each(|&byte| self.mix(u64::from(byte)));
    }
}

impl Bytes {
    /// `len` zeroes.
    pub fn zeroes(len: u64) -> Self {
        Self {
            len,
            chunks: BTreeMap::new(),
        }
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// A name for the content.
    pub fn digest(&self) -> u64 {
        let mut digest = Digest::new();
        digest.mix(self.len);
        for (at, chunk) in &self.chunks {
            digest.mix(*at);
            digest.mix(chunk.digest());
        }
        digest.0
    }

    /// Cuts the file, or adds zeroes.
    pub fn set_len(&mut self, len: u64) {
        if len < self.len {
            self.chunks.split_off(&len.div_ceil(CHUNK as u64));
            let end = len.next_multiple_of(CHUNK as u64).min(self.len);
            self.put(len, &vec![0; (end - len) as usize]);
        }
        self.len = len;
    }

    /// Puts bytes at an offset; the file becomes longer where it ends before
    /// them.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        self.len = self.len.max(offset + data.len() as u64);
        self.put(offset, data);
    }

    fn put(&mut self, offset: u64, mut data: &[u8]) {
        let mut at = offset;
        while !data.is_empty() {
            let inside = (at % CHUNK as u64) as usize;
            let (piece, rest) = data.split_at(data.len().min(CHUNK - inside));
            self.put_in_chunk(at / CHUNK as u64, inside, piece);
            at += piece.len() as u64;
            data = rest;
        }
    }

    fn put_in_chunk(&mut self, number: u64, inside: usize, piece: &[u8]) {
        let zero = piece.iter().all(|&byte| byte == 0);
        if zero && !self.chunks.contains_key(&number) {
            return;
        }
        let chunk = self.chunks.entry(number).or_insert_with(|| {
            Arc::new(Chunk {
                bytes: [0; CHUNK],
                digest: OnceLock::new(),
            })
        });
        let chunk = Arc::make_mut(chunk);
        chunk.bytes[inside..inside + piece.len()].copy_from_slice(piece);
        chunk.digest = OnceLock::new();
        if zero && chunk.bytes == [0; CHUNK] {
            self.chunks.remove(&number);
        }
    }

    /// Fills a buffer from an offset on; zeroes past the end.
    pub fn read_into(&self, offset: u64, buf: &mut [u8]) {
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            let inside = (at % CHUNK as u64) as usize;
            let len = (buf.len() - done).min(CHUNK - inside);
            match self.chunks.get(&(at / CHUNK as u64)) {
                Some(chunk) => {
                    buf[done..done + len].copy_from_slice(&chunk.bytes[inside..inside + len]);
                }
                None => buf[done..done + len].fill(0),
            }
            done += len;
        }
    }

    /// `len` bytes from an offset on; zeroes past the end.
    pub fn read(&self, offset: u64, len: u64) -> Vec<u8> {
        let mut buf = vec![0; len as usize];
        self.read_into(offset, &mut buf);
        buf
    }

    /// Copies a range of another file to an offset of this one; what lies past
    /// that file's end is zero.
    pub fn copy(&mut self, from: &Self, offset: u64, to: u64, len: u64) {
        self.zero(to, len);
        let (end, unit) = ((offset + len).min(from.len), CHUNK as u64);
        let aligned = offset % unit == to % unit;
        let numbers = offset / unit..end.div_ceil(unit).max(offset / unit);
        for (number, chunk) in from.chunks.range(numbers) {
            let start = (number * unit).max(offset);
            let stop = ((number + 1) * unit).min(end);
            let at = to + (start - offset);
            if aligned && stop - start == unit {
                self.chunks.insert(at / unit, Arc::clone(chunk));
            } else {
                let inside = (start % unit) as usize..(stop - number * unit) as usize;
                self.put(at, &chunk.bytes[inside]);
            }
        }
    }

    /// Makes a range zero; the file becomes longer where it ends before it.
    pub fn zero(&mut self, offset: u64, len: u64) {
        let (end, unit) = (offset + len, CHUNK as u64);
        self.len = self.len.max(end);
        let whole = offset.div_ceil(unit)..(end / unit).max(offset.div_ceil(unit));
        let inside: Vec<u64> = self
            .chunks
            .range(whole.clone())
            .map(|(at, _)| *at)
            .collect();
        for number in inside {
            self.chunks.remove(&number);
        }
        let head = (whole.start * unit).min(end) - offset;
        self.put(offset, &vec![0; head as usize]);
        let tail = (whole.end * unit).clamp(offset + head, end);
        self.put(tail, &vec![0; (end - tail) as usize]);
    }

    /// A big-endian number of `N` bytes, at most 8.
    pub fn big<const N: usize>(&self, offset: u64) -> u64 {
        let mut bytes = [0; N];
        self.read_into(offset, &mut bytes);
        let bytes = bytes.iter();
        bytes.fold(0, |number, &byte| number << 8 | u64::from(byte))
    }

    /// A little-endian number of `N` bytes, at most 8.
    pub fn little<const N: usize>(&self, offset: u64) -> u64 {
        let mut bytes = [0; N];
        self.read_into(offset, &mut bytes);
        let bytes = bytes.iter().rev();
        bytes.fold(0, |number, &byte| number << 8 | u64::from(byte))
    }

    /// The first offset at which two files differ.
    pub fn difference(&self, other: &Self) -> Option<u64> {
        let numbers = self.chunks.keys().chain(other.chunks.keys());
        let differs = |number: &&u64| self.chunks.get(number) != other.chunks.get(number);
        let number = numbers.filter(differs).min()?;
        let at = number * CHUNK as u64;
        let (one, two) = (self.read(at, CHUNK as u64), other.read(at, CHUNK as u64));
        let inside = one.iter().zip(&two).position(|(one, two)| one != two)?;
        Some(at + inside as u64)
    }

    /// Whether every sector is that of one file or that of the other.
    pub fn mixes(&self, one: &Self, other: &Self) -> bool {
        let numbers = [self, one, other].map(|bytes| bytes.chunks.keys());
        let sectors = |bytes: &Self, number: u64| bytes.read(number * CHUNK as u64, CHUNK as u64);
        numbers.into_iter().flatten().all(|&number| {
            let [own, one, other] = [self, one, other].map(|bytes| sectors(bytes, number));
            let pairs = one.chunks(512).zip(other.chunks(512));
            own.chunks(512)
                .zip(pairs)
                .all(|(own, (one, other))| own == one || own == other)
        })
    }

    /// Writes a file of this content.
    pub fn store(&self, path: &Path) -> Result<(), String> {
        let stored = || {
            let file = File::create(path)?;
            file.set_len(self.len)?;
            for (number, chunk) in &self.chunks {
                let at = number * CHUNK as u64;
                let len = (self.len - at).min(CHUNK as u64) as usize;
                file.write_all_at(&chunk.bytes[..len], at)?;
            }
            Ok(())
        };
        stored().map_err(|error: std::io::Error| format!("{}: {error}", path.display()))
    }

    /// Reads a file, but not its holes.
    pub fn load(path: &Path) -> Result<Self, String> {
        let load = || {
            let file = File::open(path)?;
            let mut bytes = Self::zeroes(file.metadata()?.len());
            let mut end = 0;
            while let Some(start) = seek(&file, end, Whence::SeekData)? {
                end = seek(&file, start, Whence::SeekHole)?.unwrap_or(bytes.len);
                bytes.load_range(&file, start, end)?;
            }
            Ok(bytes)
        };
        load().map_err(|error: std::io::Error| format!("{}: {error}", path.display()))
    }

    fn load_range(&mut self, file: &File, start: u64, end: u64) -> std::io::Result<()> {
        let mut buf = vec![0; (end - start).min(1 << 20) as usize];
        let mut at = start;
        while at < end {
            let piece = &mut buf[..(end - at).min(1 << 20) as usize];
            file.read_exact_at(piece, at)?;
            for (number, chunk) in piece.chunks(CHUNK).enumerate() {
                if chunk.iter().any(|&byte| byte != 0) {
                    self.put(at + (number * CHUNK) as u64, chunk);
                }
            }
            at += piece.len() as u64;
        }
        Ok(())
    }
}

/// The next data or hole from an offset on; `None` past the last data.
fn seek(file: &File, offset: u64, whence: Whence) -> std::io::Result<Option<u64>> {
    match lseek(file, offset as i64, whence) {
        Ok(at) => Ok(Some(at as u64)),
        Err(Errno::ENXIO) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

impl From<&[u8]> for Bytes {
    fn from(bytes: &[u8]) -> Self {
        let mut made = Self::zeroes(bytes.len() as u64);
        let pieces = bytes.chunks(CHUNK).enumerate();
        for (number, piece) in pieces.filter(|(_, piece)| piece.iter().any(|&byte| byte != 0)) {
            made.put_in_chunk(number as u64, 0, piece);
        }
        made
    }
}

impl std::fmt::Debug for Bytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bytes, digest {:x}", self.len, self.digest())
    }
}
