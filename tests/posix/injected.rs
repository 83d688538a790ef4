//! Calls on the files of SOURCE that fail, one after the other: whoever uses the
//! disk is told, what was durable stays, and no other image is disturbed.
//!
//! One workload is run once for each call that it causes below, and each way in
//! which that call can fail, on a fresh copy of the image each time.

use crate::explorer::bytes::Bytes;
use crate::faults::{Fault, Faults, How, Kind};
use crate::kill::sound_but_for_leaks;
use crate::record::{Call, Record};
use crate::rig::{Mount, Rig};
use crate::tools::{eventually, noise, run};
use crate::{Claim, claim};
use nix::errno::Errno;
use nix::unistd::close;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

/// What is proven here, for one image of each format.
pub const CLAIMS: &[Claim] = &[claim(
    "a_failing_call_below_is_told_and_loses_nothing_durable",
    &[],
    a_failing_call_is_told,
)
.in_one_sandbox()];

/// Size of the disk in bytes, and of what it holds at first.
const SIZE: u64 = 4 << 20;
const FILLED: usize = 1 << 20;

/// Allocates, overwrites, grows and gives back; what comes after the last sync
/// is left to `close`.
const WORKLOAD: &[Call] = &[
    write(1 << 20, 64 << 10),
    Call::Sync,
    write((2 << 20) + 1536, 99_840),
    write(4096, 8192),
    Call::Sync,
    Call::Grow {
        size: SIZE + (1 << 20),
    },
    write(SIZE + 4096, 30_720),
    Call::Punch {
        offset: 1 << 20,
        len: 128 << 10,
    },
    Call::Sync,
    write(3 << 20, 4096),
];

const fn write(offset: u64, len: u64) -> Call {
    let seed = offset;
    Call::Write { offset, len, seed }
}

/// How the calls of each kind are made to fail, and whether all later ones are.
/// The calls take turns at these; `INSTAR_FAULTS_ALL` has each fail in every way.
const FAILURES: &[(Kind, &[(How, bool)])] = &[
    (
        Kind::Read,
        &[(How::Error(Errno::EIO), false), (How::Short, false)],
    ),
    (
        Kind::Write,
        &[
            (How::Error(Errno::ENOSPC), true),
            (How::Error(Errno::EIO), false),
            (How::Short, false),
            (How::Error(Errno::ENOSPC), false),
            (How::Error(Errno::EIO), true),
        ],
    ),
    (
        Kind::Sync,
        &[
            (How::Error(Errno::EIO), false),
            (How::Error(Errno::EIO), true),
            (How::Error(Errno::ENOSPC), false),
        ],
    ),
    (
        Kind::Allocate,
        &[
            (How::Error(Errno::ENOSPC), false),
            (How::Error(Errno::EIO), false),
        ],
    ),
    (
        Kind::SetLength,
        &[
            (How::Error(Errno::EIO), false),
            (How::Error(Errno::ENOSPC), true),
        ],
    ),
];

/// A directory whose calls can fail, mounted, and images in it.
struct Bench<'a> {
    rig: &'a Rig,
    below: PathBuf,
    mount: Mount,
    faults: Faults,
    base: Bytes,
    /// What its disk holds.
    content: Vec<u8>,
    /// Images of trials, with what each showed last.
    images: Vec<(OsString, Vec<u8>)>,
}

impl<'a> Bench<'a> {
    fn new(rig: &'a Rig) -> Self {
        let [below, shown, used] = ["below", "shown", "used"].map(|name| rig.path(name));
        for new in [&below, &shown, &used] {
            fs::create_dir(new).unwrap();
        }
        let base = rig
            .path("base")
            .with_extension(rig.image.extension().unwrap());
        let content = convert_small(rig, &base);
        let base = Bytes::load(&base).unwrap();
        base.store(&below.join(neighbour(rig))).unwrap();
        let faults = Faults::mount(&below, &shown);
        Self {
            rig,
            mount: rig.mount_source(&shown, ""),
            below,
            faults,
            base,
            content,
            images: Vec::new(),
        }
    }

    /// Runs the workload while a call fails. Answers what went wrong, and how
    /// many calls did fail below.
    fn trial(&mut self, fault: Option<(Kind, usize, How, bool)>) -> usize {
        let number = self.images.len();
        let mut name = OsString::from(format!("trial-{number}."));
        name.push(self.rig.image.extension().unwrap());
        self.base.store(&self.below.join(&name)).unwrap();
        let never = (Kind::Sync, usize::MAX, How::Short, false);
        let (kind, after, how, lasting) = fault.unwrap_or(never);
        self.faults.arm(Fault {
            file: name.clone(),
            kind,
            after,
            how,
            lasting,
        });
        let disk = self.mount.at.join(&name);
        let mut record = Record::new(self.content.clone());
        let (told, synced_after) = work(&disk, &mut record);
        self.neighbour_works(number as u64);
        let fired = self.faults.clear();
        let what = || format!("{fault:?} of {}: {told:?}", self.rig.variant.name);
        for errno in &told {
            let honest = matches!(how, How::Error(injected) if injected == *errno);
            assert!(fired > 0 && (honest || *errno == Errno::EIO), "{}", what());
        }
        if fired > 0 && must_be_told(kind, how) {
            assert!(!told.is_empty(), "{}", what());
        }
        let shown = self.used_again(&disk, &record, &what);
        // What a barrier has failed for may be gone from the cache below.
        let forgotten = kind == Kind::Sync && how != How::Short && synced_after;
        assert!(!forgotten, "{}", what());
        fs::rename(self.below.join(&name), self.rig.path("used").join(&name)).unwrap();
        self.images.push((name, shown));
        fired
    }

    /// The image can be used again once its last handle is closed; answers what
    /// its disk holds in the end.
    fn used_again(&self, disk: &Path, record: &Record, what: &dyn Fn() -> String) -> Vec<u8> {
        let what_then = || format!("the image can be opened again after {}", what());
        // For a moment the kernel may remember the size 0 of an unusable one.
        let mut shown = Vec::new();
        eventually(&what_then(), || {
            shown = fs::read(disk).unwrap_or_default();
            !shown.is_empty()
        });
        assert_eq!(record.fault(&shown), None, "{}", what());
        let bytes = noise(7, 20_000);
        let file = File::options().write(true).open(disk).unwrap();
        file.write_all_at(&bytes, (3 << 20) + (512 << 10))
            .and_then(|()| file.sync_all())
            .unwrap_or_else(|error| panic!("{error} after {}", what()));
        shown[(3 << 20) + (512 << 10)..][..bytes.len()].copy_from_slice(&bytes);
        shown
    }

    fn neighbour_works(&self, number: u64) {
        let path = self.mount.at.join(neighbour(self.rig));
        let disk = File::options().read(true).write(true).open(path).unwrap();
        let bytes = noise(number, 4096);
        let offset = number % 512 * 4096;
        disk.write_all_at(&bytes, offset).unwrap();
        disk.sync_all().unwrap();
        let mut seen = vec![0; bytes.len()];
        disk.read_exact_at(&mut seen, offset).unwrap();
        assert!(seen == bytes);
    }

    /// Unmounts, and has programs that know nothing of the faults look at every
    /// image.
    fn judge(self) {
        self.mount.unmount();
        drop(self.faults);
        let raw = self.rig.path("raw");
        for (name, shown) in self.images {
            let rig = self.rig.with_image(self.rig.path("used").join(&name));
            sound_but_for_leaks(&rig);
            let paths = [rig.image.to_str().unwrap(), raw.to_str().unwrap()];
            let how = ["convert", "-f", rig.variant.format(), "-O", "raw"];
            run("qemu-img", &[&how[..], &paths].concat());
            assert!(
                fs::read(&raw).unwrap() == shown,
                "{name:?} holds other bytes"
            );
        }
    }
}

fn neighbour(rig: &Rig) -> OsString {
    let mut name = OsString::from("neighbour.");
    name.push(rig.image.extension().unwrap());
    name
}

/// Makes a small image; answers what its disk holds.
fn convert_small(rig: &Rig, image: &Path) -> Vec<u8> {
    let mut content = noise(1, FILLED);
    content.resize(SIZE as usize, 0);
    let raw = rig.path("small");
    fs::write(&raw, &content).unwrap();
    rig.variant.convert(&raw, image);
    content
}

/// Whether a failure has to reach the caller: a short call is simply gone on
/// with, and what could not be read may not have been needed.
fn must_be_told(kind: Kind, how: How) -> bool {
    how != How::Short && kind != Kind::Read
}

/// Runs the workload to its end, whatever fails; answers what did, and whether a
/// call that makes things durable succeeded after that.
fn work(path: &Path, record: &mut Record) -> (Vec<Errno>, bool) {
    let (mut told, mut synced_after) = (Vec::new(), false);
    let disk = match File::options().read(true).write(true).open(path) {
        Ok(disk) => disk,
        Err(error) => return (vec![errno(&error)], false),
    };
    for &call in WORKLOAD {
        let end = match call {
            Call::Write { offset, len, .. } => offset + len,
            _ => 0,
        };
        if end > record.size() {
            continue;
        }
        match record.call(call, &disk) {
            Err(error) => told.push(errno(&error)),
            Ok(()) => synced_after |= matches!(call, Call::Sync) && !told.is_empty(),
        }
    }
    match close(disk) {
        Err(error) => told.push(error),
        Ok(()) => {
            synced_after |= !told.is_empty();
            record.done(Call::Sync);
        }
    }
    (told, synced_after)
}

fn errno(error: &io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().expect("a system call's error"))
}

fn a_failing_call_is_told(rig: &Rig) {
    let mut bench = Bench::new(rig);
    bench.trial(None);
    let name = bench.images[0].0.clone();
    let calls = FAILURES
        .iter()
        .map(|&(kind, _)| bench.faults.count(&name, kind));
    let calls: Vec<usize> = calls.collect();
    let all = std::env::var_os("INSTAR_FAULTS_ALL").is_some();
    let mut failed = 0;
    for (&(kind, ways), calls) in FAILURES.iter().zip(calls) {
        for after in 0..calls {
            let turn = [ways[after % ways.len()]];
            for &(how, lasting) in if all { ways } else { &turn } {
                failed += bench.trial(Some((kind, after, how, lasting))).min(1);
            }
        }
    }
    println!(
        "{}: a call below failed in {failed} of {} runs of the workload",
        rig.variant.name,
        bench.images.len() - 1
    );
    assert!(failed > 0);
    bench.judge();
}
