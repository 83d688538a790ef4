//! The daemon is killed at any moment under a writer. What the writer knew to be
//! durable is there afterwards, and the image is sound but for leaks.
//!
//! The writer keeps its own record, outside the mount: what an `fsync` has
//! returned for, and what has been written since.

use crate::images::DISK;
use crate::random::Random;
use crate::rig::{INSTAR, Rig};
use crate::tools::{eventually, fallocate, noise, run};
use crate::{Claim, claim};
use nix::sys::signal::{Signal, kill};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

/// What is proven here, for every variant of image that takes writes.
pub const CLAIMS: &[Claim] = &[claim(
    "nothing_durable_is_lost_when_the_daemon_is_killed",
    &[],
    nothing_durable_is_lost,
)
.in_one_sandbox()];

/// How often the daemon is killed over one image.
const KILLS: usize = 2;
/// Most milliseconds from the first durable write until then.
const PATIENCE: usize = 60;
const SECTOR: u64 = 512;
/// The most that a disk grows.
const GROWTH: u64 = 4 << 20;

/// What a disk may hold.
struct Record {
    /// What is there for sure, unless it has been overwritten since.
    durable: Vec<u8>,
    /// What has been written since, and may be there or not, sector by sector.
    since: Vec<(u64, Vec<u8>)>,
    /// A size that has been asked for.
    growing: Option<u64>,
}

impl Record {
    fn write(&mut self, disk: &File, offset: u64, bytes: Vec<u8>) -> io::Result<()> {
        self.since.push((offset, bytes));
        let (_, bytes) = self.since.last().expect("just pushed");
        disk.write_all_at(bytes, offset)
    }

    fn punch(&mut self, disk: &File, offset: u64, len: u64) -> io::Result<()> {
        self.since.push((offset, vec![0; len as usize]));
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        fallocate(disk, mode, offset, len)
    }

    fn grow(&mut self, disk: &File, size: u64) -> io::Result<()> {
        self.growing = Some(size);
        disk.set_len(size)?;
        self.growing = None;
        self.durable.resize(size as usize, 0);
        Ok(())
    }

    fn sync(&mut self, disk: &File) -> io::Result<()> {
        disk.sync_data()?;
        for (offset, bytes) in self.since.drain(..) {
            self.durable[offset as usize..][..bytes.len()].copy_from_slice(&bytes);
        }
        Ok(())
    }

    /// Writes until that fails, which it does once the daemon is gone.
    fn fill(&mut self, disk: &Path, random: &mut Random, synced: &AtomicBool) -> io::Result<()> {
        let disk = File::options().write(true).open(disk)?;
        loop {
            for _ in 0..=random.below(5) {
                let size = self.durable.len() as u64;
                let len = (1 + random.below(200) as u64) * SECTOR;
                let offset = random.next() % ((size - len) / SECTOR) * SECTOR;
                match random.below(20) {
                    0 => self.punch(&disk, offset, len)?,
                    1 if size < DISK + GROWTH => self.grow(&disk, size + 64 * SECTOR)?,
                    _ => self.write(&disk, offset, noise(random.next(), len as usize))?,
                }
            }
            self.sync(&disk)?;
            synced.store(true, Ordering::Release);
        }
    }

    /// Takes what the disk holds for durable; it has to be what it may be.
    fn judge(&mut self, disk: Vec<u8>, seed: u64) {
        let sizes = [Some(self.durable.len() as u64), self.growing.take()];
        let size = disk.len() as u64;
        assert!(sizes.contains(&Some(size)), "{size} instead of {sizes:?}");
        self.durable.resize(disk.len(), 0);
        let sectors = disk
            .chunks(SECTOR as usize)
            .zip(self.durable.chunks(SECTOR as usize));
        for ((found, durable), at) in sectors.zip((0u64..).step_by(SECTOR as usize)) {
            let later = |write| part(write, at, found.len());
            let may_be =
                found == durable || self.since.iter().filter_map(later).any(|now| now == found);
            assert!(
                may_be,
                "seed {seed}: the sector at {at:#x} is neither what was durable nor what came later"
            );
        }
        self.since.clear();
        self.durable = disk;
    }
}

/// What a write has put at an offset.
fn part((offset, bytes): &(u64, Vec<u8>), at: u64, len: usize) -> Option<&[u8]> {
    let start = at.checked_sub(*offset)? as usize;
    bytes.get(start..start + len)
}

fn nothing_durable_is_lost(rig: &Rig) {
    let seed = u64::from(std::process::id()) << 32;
    let mut random = Random(seed);
    let mut record = Record {
        durable: fs::read(rig.originals.raw()).unwrap(),
        since: Vec::new(),
        growing: None,
    };
    for _ in 0..KILLS {
        let mount = rig.mount();
        let synced = AtomicBool::new(false);
        let wait = Duration::from_millis(random.below(PATIENCE) as u64);
        thread::scope(|scope| {
            let writer = scope.spawn(|| record.fill(&mount.disk, &mut random, &synced));
            eventually("something is durable", || {
                synced.load(Ordering::Acquire) || writer.is_finished()
            });
            thread::sleep(wait);
            assert!(!writer.is_finished(), "{}", rig.log());
            kill(mount.pid, Signal::SIGKILL).unwrap();
            let ended = writer.join().unwrap().unwrap_err().raw_os_error();
            // The last is that of pages that cannot be written any more.
            let gone = [libc::ENOTCONN, libc::ECONNABORTED, libc::EIO].map(Some);
            assert!(gone.contains(&ended), "{ended:?}");
        });
        eventually("the daemon is gone", || !mount.is_running());
        assert!(synced.load(Ordering::Acquire));
        drop(mount);
        sound_but_for_leaks(rig);
        let mount = rig.mount();
        record.judge(fs::read(&mount.disk).unwrap(), seed);
        mount.unmount();
    }
    rig.check();
    let expected = rig.path("expected");
    fs::write(&expected, &record.durable).unwrap();
    rig.compare(&expected);
}

/// A check finds leaks at most, and a repair of leaks cleans them up.
fn sound_but_for_leaks(rig: &Rig) {
    let check = |arguments: &[&str]| {
        let output = Command::new("timeout")
            .args(["60", INSTAR, "check", "-f", rig.variant.format()])
            .args(arguments)
            .arg(&rig.image)
            .output()
            .unwrap();
        (
            output.status.code(),
            String::from_utf8_lossy(&output.stderr).into_owned(),
        )
    };
    if rig.variant.format() == "raw" {
        return;
    }
    let (code, said) = check(&[]);
    assert!(matches!(code, Some(0 | 3)), "{code:?}: {said}");
    if code == Some(3) {
        let (code, said) = check(&["-r", "leaks"]);
        assert_eq!(code, Some(0), "{said}");
    }
    if rig.variant.format() == "qcow2" {
        run("qemu-img", &[Path::new("check"), &rig.image]);
    }
}
