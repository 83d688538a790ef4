//! Random sequences of calls on a mounted disk, each followed on a plain file:
//! whatever is done to both, both hold the same.
//!
//! `INSTAR_MODEL_SEED` repeats a sequence, `INSTAR_MODEL_CALLS` sets its length.

use crate::images::DISK;
use crate::random::Random;
use crate::rig::{Mount, Rig};
use crate::tools::{copy_range, fallocate, mapped, noise, run, seek};
use crate::{Claim, claim};
use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

/// What is proven here, for every variant of image that takes writes.
pub const CLAIMS: &[Claim] = &[claim(
    "any_sequence_of_calls_does_what_it_does_to_a_file",
    &[],
    any_sequence_of_calls,
)
.in_one_sandbox()];

/// Calls of one sequence.
const CALLS: usize = 2_000;
/// How far a disk grows past its size, and how much smaller it may get.
const MARGIN: u64 = 8 << 20;
/// The most bytes of one write or read.
const MOST: u64 = 192 << 10;

/// One call.
#[derive(Clone, Copy, Debug)]
enum Call {
    Write {
        offset: u64,
        len: u64,
    },
    Read {
        offset: u64,
        len: u64,
    },
    MapWrite {
        offset: u64,
        len: u64,
    },
    MapRead {
        offset: u64,
        len: u64,
    },
    Allocate {
        mode: libc::c_int,
        offset: u64,
        len: u64,
    },
    Copy {
        from: u64,
        to: u64,
        len: u64,
    },
    /// Where the disk has data and where it has holes.
    Seek {
        offset: u64,
    },
    Truncate {
        size: u64,
    },
    Sync,
    /// One of the handles is closed and opened again.
    Reopen,
}

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name}: {text}")))
}

fn any_sequence_of_calls(rig: &Rig) {
    let seed = number("INSTAR_MODEL_SEED").unwrap_or_else(|| u64::from(std::process::id()) << 32);
    let calls = number("INSTAR_MODEL_CALLS").map_or(CALLS, |calls| calls as usize);
    let expected = rig.expected();
    let mount = rig.mount_with("shrink");
    let mut pair = Pair::open(&mount, &expected);
    let mut random = Random(seed);
    let mut done = Vec::new();
    for _ in 0..calls {
        if random.below(4) == 0 {
            pair.turn();
        }
        let call = draw(&mut random, pair.size(), rig.variant.size_unit);
        done.push(call);
        if let Err(why) = pair.call(call, random.next(), &mount, &expected) {
            let last = &done[done.len().saturating_sub(20)..];
            panic!("INSTAR_MODEL_SEED={seed}: {why} after\n{last:#?}");
        }
    }
    pair.disk.sync_all().unwrap();
    drop(pair);
    run("cmp", &[&expected, &mount.disk]);
    mount.unmount();
    rig.check();
    rig.compare(&expected);
}

/// A range of a disk: mostly short, often aligned, sometimes in a place that
/// was in use shortly before.
fn range(random: &mut Random, size: u64) -> (u64, u64) {
    let most = match random.below(4) {
        0 => MOST,
        1 => 16 << 10,
        _ => 4 << 10,
    };
    let bound = match random.below(3) {
        0 => size,
        _ => 4 << 20,
    };
    let offset = random.next() % bound.min(size - 1);
    let len = 1 + random.next() % most;
    let unit = [1, 512, 4096][random.below(3)];
    let offset = offset / unit * unit;
    (offset, len.next_multiple_of(unit).min(size - offset))
}

fn draw(random: &mut Random, size: u64, unit: u64) -> Call {
    let (offset, len) = range(random, size);
    let keep = libc::FALLOC_FL_KEEP_SIZE;
    match random.below(100) {
        0..40 => Call::Write { offset, len },
        40..65 => Call::Read { offset, len },
        65..69 => Call::MapWrite { offset, len },
        69..73 => Call::MapRead { offset, len },
        73..76 => Call::Seek { offset },
        76..79 => {
            let to = random.next() % (size - len + 1);
            let apart = to + len <= offset || offset + len <= to;
            let from = offset;
            match apart {
                true => Call::Copy { from, to, len },
                false => Call::Read { offset, len },
            }
        }
        79..91 => {
            let mode = [
                0,
                keep,
                keep | libc::FALLOC_FL_PUNCH_HOLE,
                keep | libc::FALLOC_FL_ZERO_RANGE,
                libc::FALLOC_FL_ZERO_RANGE,
            ][random.below(5)];
            Call::Allocate { mode, offset, len }
        }
        91..93 => {
            let size = DISK - MARGIN + random.next() % (2 * MARGIN);
            Call::Truncate {
                size: size / unit * unit,
            }
        }
        93..97 => Call::Sync,
        _ => Call::Reopen,
    }
}

/// The disk, and the file that does the same; both are used through two handles
/// by turns.
struct Pair {
    disk: File,
    model: File,
    others: [File; 2],
}

impl Pair {
    fn open(mount: &Mount, expected: &Path) -> Self {
        let open = |path: &Path| {
            let mut options = File::options();
            options.read(true).write(true).open(path).unwrap()
        };
        Self {
            disk: open(&mount.disk),
            model: open(expected),
            others: [&mount.disk, expected].map(open),
        }
    }

    /// The handles change their parts.
    fn turn(&mut self) {
        let [disk, model] = &mut self.others;
        std::mem::swap(&mut self.disk, disk);
        std::mem::swap(&mut self.model, model);
    }

    fn size(&self) -> u64 {
        self.model.metadata().unwrap().len()
    }

    fn call(
        &mut self,
        call: Call,
        seed: u64,
        mount: &Mount,
        expected: &Path,
    ) -> Result<(), String> {
        let both = [&self.disk, &self.model];
        let same = |[seen, wanted]: [Vec<u8>; 2]| match seen == wanted {
            true => Ok(()),
            false => {
                let differs = seen.iter().zip(&wanted).position(|(a, b)| a != b);
                Err(format!("byte {differs:?} of a range differs"))
            }
        };
        match call {
            Call::Write { offset, len } => {
                let bytes = noise(seed, len as usize);
                both.iter()
                    .for_each(|file| file.write_all_at(&bytes, offset).unwrap());
            }
            Call::Read { offset, len } => same(both.map(|file| {
                let mut bytes = vec![0; len as usize];
                file.read_exact_at(&mut bytes, offset).unwrap();
                bytes
            }))?,
            Call::MapWrite { offset, len } => {
                let bytes = noise(seed, len as usize);
                both.iter().for_each(|file| {
                    mapped(file, offset, len, |map| map.copy_from_slice(&bytes));
                });
            }
            Call::MapRead { offset, len } => {
                same(both.map(|file| mapped(file, offset, len, |map| map.to_vec())))?;
            }
            Call::Allocate { mode, offset, len } => {
                both.iter()
                    .for_each(|file| fallocate(file, mode, offset, len).unwrap());
            }
            Call::Truncate { size } => {
                both.iter().for_each(|file| file.set_len(size).unwrap());
                let seen = fs::metadata(&mount.disk).unwrap().len();
                if seen != size {
                    return Err(format!("a disk of {seen} bytes instead of {size}"));
                }
            }
            Call::Sync => {
                self.disk.sync_data().unwrap();
            }
            Call::Seek { offset } => self.look_for_data(offset)?,
            Call::Copy { from, to, len } => {
                both.iter()
                    .for_each(|file| copy_range(file, from, to, len).unwrap());
            }
            Call::Reopen => {
                let new = Self::open(mount, expected);
                (self.disk, self.model) = (new.disk, new.model);
            }
        }
        Ok(())
    }

    /// What the disk says about data and holes agrees with itself and with what
    /// there is: nothing but zeroes in a hole.
    fn look_for_data(&self, offset: u64) -> Result<(), String> {
        let size = self.size();
        let data = match seek(&self.disk, offset, libc::SEEK_DATA) {
            Ok(at) => at,
            Err(error) if error.raw_os_error() == Some(libc::ENXIO) => size,
            Err(error) => return Err(format!("SEEK_DATA from {offset}: {error}")),
        };
        let hole = seek(&self.disk, offset, libc::SEEK_HOLE).map_err(|error| error.to_string())?;
        let in_data = data == offset;
        if !(offset..=size).contains(&data)
            || !(offset..=size).contains(&hole)
            || in_data == (hole == offset)
        {
            return Err(format!("from {offset}: data at {data}, a hole at {hole}"));
        }
        let mut wanted = vec![0; (data - offset).min(MOST) as usize];
        self.model.read_exact_at(&mut wanted, offset).unwrap();
        match wanted.iter().all(|&byte| byte == 0) {
            true => Ok(()),
            false => Err(format!("from {offset} to {data} is no hole")),
        }
    }
}
