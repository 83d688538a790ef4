//! Random sequences of calls on a mounted disk, each followed on a plain file:
//! whatever is done to both, both hold the same.
//!
//! `INSTAR_MODEL_SEED` repeats a sequence, `INSTAR_MODEL_CALLS` sets its length.

use crate::images::DISK;
use crate::random::Random;
use crate::rig::{Mount, Rig};
use crate::tools::{fallocate, mapped, noise, run};
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
const CALLS: usize = 1_000;
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
    Truncate {
        size: u64,
    },
    Sync,
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
        65..70 => Call::MapWrite { offset, len },
        70..75 => Call::MapRead { offset, len },
        75..91 => {
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

/// The disk, and the file that does the same.
struct Pair {
    disk: File,
    model: File,
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
        }
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
            Call::Reopen => *self = Self::open(mount, expected),
        }
        Ok(())
    }
}
