//! What a disk may hold after something has gone wrong, as the writer knows it:
//! what an `fsync` has returned for, and what has been asked for since.

use crate::random::Random;
use crate::tools::{fallocate, noise};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

/// What is old or new as a whole.
pub const SECTOR: u64 = 512;

/// One call that changes a disk.
#[derive(Clone, Copy, Debug)]
pub enum Call {
    /// Noise of this seed.
    Write { offset: u64, len: u64, seed: u64 },
    /// A hole.
    Punch { offset: u64, len: u64 },
    /// A larger disk.
    Grow { size: u64 },
    /// All before it is durable.
    Sync,
}

impl Call {
    /// A random change of a disk of so many bytes, that ends no later.
    pub fn draw(random: &mut Random, size: u64) -> Self {
        let len = (1 + random.below(200) as u64) * SECTOR;
        let offset = random.next() % ((size - len) / SECTOR) * SECTOR;
        let seed = random.next();
        match random.below(20) {
            0 => Self::Punch { offset, len },
            _ => Self::Write { offset, len, seed },
        }
    }

    /// Makes the call.
    pub fn make(self, disk: &File) -> io::Result<()> {
        match self {
            // A short write tells as much as an error would.
            Self::Write { offset, len, .. } => match disk.write_at(&self.bytes(), offset)? {
                all if all as u64 == len => Ok(()),
                _ => Err(io::Error::from_raw_os_error(libc::EIO)),
            },
            Self::Punch { offset, len } => {
                let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
                fallocate(disk, mode, offset, len)
            }
            Self::Grow { size } => disk.set_len(size),
            Self::Sync => disk.sync_data(),
        }
    }

    fn bytes(self) -> Vec<u8> {
        match self {
            Self::Write { len, seed, .. } => noise(seed, len as usize),
            Self::Punch { len, .. } => vec![0; len as usize],
            Self::Grow { .. } | Self::Sync => Vec::new(),
        }
    }
}

/// What has been written since the last `fsync`, and may be there or not, sector
/// by sector.
#[derive(Clone)]
struct Since {
    offset: u64,
    bytes: Vec<u8>,
    /// Whether the call has succeeded, so that the next `fsync` covers it.
    done: bool,
}

/// What a disk may hold.
#[derive(Clone)]
pub struct Record {
    /// What is there for sure, unless it has been overwritten since.
    pub durable: Vec<u8>,
    since: Vec<Since>,
    /// A size that has been asked for.
    growing: Option<u64>,
}

impl Record {
    /// Of a disk that holds this.
    pub fn new(durable: Vec<u8>) -> Self {
        Self {
            durable,
            since: Vec::new(),
            growing: None,
        }
    }

    /// Size of the disk in bytes.
    pub fn size(&self) -> u64 {
        self.durable.len() as u64
    }

    /// Makes a call and keeps account of it.
    pub fn call(&mut self, call: Call, disk: &File) -> io::Result<()> {
        self.begin(call);
        call.make(disk)?;
        self.done(call);
        Ok(())
    }

    /// A call is about to be made.
    pub fn begin(&mut self, call: Call) {
        match call {
            Call::Write { offset, .. } | Call::Punch { offset, .. } => self.since.push(Since {
                offset,
                bytes: call.bytes(),
                done: false,
            }),
            Call::Grow { size } => self.growing = Some(size),
            Call::Sync => {}
        }
    }

    /// The call that was begun last has succeeded.
    pub fn done(&mut self, call: Call) {
        match call {
            Call::Write { .. } | Call::Punch { .. } => {
                self.since.last_mut().expect("one was begun").done = true;
            }
            Call::Grow { size } => {
                self.growing = None;
                self.durable.resize(size as usize, 0);
            }
            Call::Sync => self.synced(),
        }
    }

    fn synced(&mut self) {
        let (done, failed) = std::mem::take(&mut self.since)
            .into_iter()
            .partition(|since: &Since| since.done);
        self.since = failed;
        for Since { offset, bytes, .. } in done {
            self.durable[offset as usize..][..bytes.len()].copy_from_slice(&bytes);
        }
    }

    /// Why a disk is not what it may be, if that is so.
    pub fn fault(&self, disk: &[u8]) -> Option<String> {
        const BLOCK: usize = 1 << 16;
        let sizes = [Some(self.size()), self.growing];
        let size = disk.len() as u64;
        if !sizes.contains(&Some(size)) {
            return Some(format!("{size} bytes instead of {sizes:?}"));
        }
        let added = vec![0; disk.len().saturating_sub(self.durable.len())];
        let durable = [&self.durable, &added].map(|part| part.chunks(BLOCK));
        let blocks = durable.into_iter().flatten();
        let mut start = 0;
        for block in blocks {
            let found = &disk[start..start + block.len()];
            if found != block
                && let Some(at) = self.foreign_sector(start as u64, found, block)
            {
                return Some(format!(
                    "the sector at {at:#x} is neither what was durable nor what came later"
                ));
            }
            start += block.len();
        }
        None
    }

    fn foreign_sector(&self, start: u64, found: &[u8], durable: &[u8]) -> Option<u64> {
        let step = SECTOR as usize;
        let sectors = found.chunks(step).zip(durable.chunks(step));
        let mut placed = sectors.zip((start..).step_by(step));
        let foreign = placed.find(|&((found, durable), at)| {
            let later = |since: &Since| since.part(at, found.len()) == Some(found);
            found != durable && !self.since.iter().any(later)
        });
        foreign.map(|(_, at)| at)
    }

    /// Takes what the disk holds for durable.
    pub fn settle(&mut self, disk: Vec<u8>) {
        *self = Self::new(disk);
    }
}

impl Since {
    /// What it has put at an offset.
    fn part(&self, at: u64, len: usize) -> Option<&[u8]> {
        let start = at.checked_sub(self.offset)? as usize;
        self.bytes.get(start..start + len)
    }
}
