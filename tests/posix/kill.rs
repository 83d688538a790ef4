//! The daemon is killed at any moment under a writer. What the writer knew to be
//! durable is there afterwards, and the image is sound but for leaks.
//!
//! The writer keeps its own record, outside the mount: what an `fsync` has
//! returned for, and what has been written since.

use crate::images::DISK;
use crate::random::Random;
use crate::record::{Call, Record, SECTOR};
use crate::rig::{INSTAR, Rig};
use crate::tools::{eventually, run};
use crate::{Claim, claim};
use nix::sys::signal::{Signal, kill};
use std::fs::{self, File};
use std::io;
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
pub const KILLS: usize = 3;
/// Most milliseconds from the first durable write until then.
const PATIENCE: usize = 60;
/// The most that a disk grows.
const GROWTH: u64 = 4 << 20;

/// Writes until that fails, which it does once the daemon is gone.
fn fill(
    record: &mut Record,
    disk: &Path,
    random: &mut Random,
    synced: &AtomicBool,
) -> io::Result<()> {
    let disk = File::options().write(true).open(disk)?;
    loop {
        for _ in 0..=random.below(5) {
            let size = record.size();
            let call = match random.below(20) {
                0 if size < DISK + GROWTH => Call::Grow {
                    size: size + 64 * SECTOR,
                },
                _ => Call::draw(random, size),
            };
            record.call(call, &disk)?;
        }
        record.call(Call::Sync, &disk)?;
        synced.store(true, Ordering::Release);
    }
}

fn nothing_durable_is_lost(rig: &Rig) {
    let seed = u64::from(std::process::id()) << 32;
    let mut random = Random(seed);
    let mut record = Record::new(fs::read(rig.originals.raw()).unwrap());
    for _ in 0..KILLS {
        let mount = rig.mount();
        let synced = AtomicBool::new(false);
        let wait = Duration::from_millis(random.below(PATIENCE) as u64);
        thread::scope(|scope| {
            let writer = scope.spawn(|| fill(&mut record, &mount.disk, &mut random, &synced));
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
        // The dead mount is left for the next one to clean.
        drop(mount);
        sound_but_for_leaks(rig);
        let mount = rig.mount();
        let disk = fs::read(&mount.disk).unwrap();
        let fault = record.fault(&disk);
        assert_eq!(fault, None, "seed {seed}");
        record.settle(disk);
        mount.unmount();
    }
    rig.check();
    let expected = rig.path("expected");
    fs::write(&expected, &record.durable).unwrap();
    rig.compare(&expected);
}

/// A check finds leaks at most, and a repair of leaks cleans them up.
pub fn sound_but_for_leaks(rig: &Rig) {
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
