//! Damaged images in a mounted directory, next to a sound one.

use crate::bombs;
use crate::damage::{Damage, Refused};
use crate::names::Name;
use crate::pool;
use crate::refusals::IMAGE;
use crate::tools::{must, qemu_img, read, scratch, write};
use crate::xattr::xattr;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// How long a mount may take to appear.
const PATIENCE: Duration = Duration::from_secs(20);
/// Bytes that the sound image grows by.
const ADDED: u64 = 4 << 20;

/// A mounted directory; unmounted when dropped.
struct Mount {
    daemon: Child,
    at: PathBuf,
}

impl Mount {
    fn new(source: &Path, at: &Path, isolation: &str) -> Result<Self, String> {
        let log = File::create(at.with_extension("log")).map_err(|error| error.to_string())?;
        let daemon = Command::new(env!("CARGO_BIN_EXE_instar"))
            .args(["mount", "-f"])
            .args([source, at])
            .env("INSTAR_ISOLATION", isolation)
            .stdin(Stdio::null())
            .stderr(log)
            .spawn()
            .map_err(|error| error.to_string())?;
        let mut mount = Self {
            daemon,
            at: at.to_owned(),
        };
        let start = Instant::now();
        while !mount.is_up() {
            if start.elapsed() > PATIENCE || !mount.is_alive() {
                return Err("the mount does not appear".to_owned());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(mount)
    }

    fn is_up(&self) -> bool {
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        let at = self.at.to_string_lossy();
        mounts
            .lines()
            .any(|line| line.split(' ').nth(1) == Some(&at))
    }

    fn is_alive(&mut self) -> bool {
        matches!(self.daemon.try_wait(), Ok(None))
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.at).output();
        let start = Instant::now();
        while self.is_alive() {
            if start.elapsed() > PATIENCE {
                let _ = self.daemon.kill();
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Every damaged image answers its own error, none is changed, and the sound
/// image beside them reads and grows as if it were alone.
pub fn check(damages: &[&'static Damage], isolation: &str) -> Result<(), String> {
    let dir = scratch()?;
    let (source, at) = (dir.path().join("source"), dir.path().join("mount"));
    for new in [&source, &at] {
        std::fs::create_dir(new).map_err(|error| error.to_string())?;
    }
    let mut images = Vec::new();
    for (number, damage) in damages.iter().enumerate() {
        let mut image = pool::named(damage.kind, dir.path())?;
        (damage.edit)(&mut image);
        let name = format!("bad{number}.qcow2");
        write(&source.join(&name), &image)?;
        images.push((name, damage, image));
    }
    let sound = pool::named("plain", dir.path())?;
    write(&source.join("good.qcow2"), &sound)?;
    let arguments = ["convert", "-O", "raw", "plain.qcow2", "plain.raw"];
    must(dir.path(), "qemu-img", &arguments)?;
    let mut disk = read(&dir.path().join("plain.raw"))?;

    let mut mount = Mount::new(&source, &at, isolation)?;
    let mut faults = Vec::new();
    for (name, damage, image) in &images {
        let fault = use_damaged(&at.join(name), damage);
        faults.extend(fault.map(|fault| format!("{}: {fault}", damage.name)));
        if read(&source.join(name))? != *image {
            faults.push(format!("{}: the image has changed", damage.name));
        }
        if !mount.is_alive() {
            return Err(format!("{}: the daemon is gone", damage.name));
        }
    }
    if read(&at.join("good.qcow2"))? != disk {
        faults.push("the sound image reads wrong".to_owned());
    }
    let grown = OpenOptions::new().write(true).open(at.join("good.qcow2"));
    let grown = grown.and_then(|file| file.set_len(pool::SIZE + ADDED));
    grown.map_err(|error| format!("growing the sound image: {error}"))?;
    disk.resize((pool::SIZE + ADDED) as usize, 0);
    if read(&at.join("good.qcow2"))? != disk {
        faults.push("the sound image reads wrong after it has grown".to_owned());
    }
    drop(mount);
    let verdict = qemu_img(&source, &["check", "good.qcow2"])?;
    if verdict.code != 0 {
        faults.push(format!("the sound image: {}", verdict.brief()));
    }
    match faults.is_empty() {
        true => Ok(()),
        false => Err(faults.join("\n")),
    }
}

/// What is wrong with how a damaged image answers on the mount, if anything.
fn use_damaged(path: &Path, damage: &Damage) -> Option<String> {
    let read = read_start(path);
    let (failed, wanted): (_, &[i32]) = match damage.refused {
        Refused::Everything | Refused::Mapping | Refused::Reading => (read, &[libc::EIO]),
        Refused::Resizing => {
            if let Err(error) = read {
                return Some(format!("reading: {error}"));
            }
            let opened = OpenOptions::new().write(true).open(path);
            let grown = opened.and_then(|file| file.set_len(pool::LARGE));
            // EROFS where nothing at all of the image can be changed.
            (
                grown,
                &[libc::EIO, libc::EPERM, libc::EOPNOTSUPP, libc::EROFS],
            )
        }
    };
    refused(path, failed, wanted, damage.says)
}

fn read_start(path: &Path) -> std::io::Result<()> {
    File::open(path)?.read_exact_at(&mut [0; 4096], 0)
}

/// What is wrong with a refusal, if anything: the errno, or what the mount says
/// about it. `says` is in lower case.
fn refused(path: &Path, result: std::io::Result<()>, wanted: &[i32], says: &str) -> Option<String> {
    match result {
        Err(error) if wanted.contains(&error.raw_os_error().unwrap_or(0)) => {}
        Err(error) => return Some(format!("{error} instead of errno {wanted:?}")),
        Ok(()) => return Some("is not refused".to_owned()),
    }
    match xattr(path, "user.instar.error") {
        Ok(reason) if reason.to_lowercase().contains(says) => None,
        Ok(reason) => Some(format!("{reason}; the text has to name {says:?}")),
        Err(error) => Some(format!("user.instar.error: {error}")),
    }
}

/// An image that names what it may not have is refused and says why; the sound
/// image beside it reads as if it were alone.
pub fn name(name: &Name, isolation: &str) -> Result<(), String> {
    let dir = scratch()?;
    let (source, at) = (dir.path().join("source"), dir.path().join("mount"));
    for new in [&source, &at] {
        std::fs::create_dir(new).map_err(|error| error.to_string())?;
    }
    (name.make)(&source)?;
    let image = read(&source.join(IMAGE))?;
    write(&source.join("good.raw"), &[7; 4096])?;
    let mut mount = Mount::new(&source, &at, isolation)?;
    let shown = at.join(IMAGE);
    let wanted = [libc::EIO, libc::EPERM];
    let fault = refused(
        &shown,
        read_start(&shown),
        &wanted,
        &name.says.to_lowercase(),
    );
    if let Some(fault) = fault {
        return Err(fault);
    }
    if read(&at.join("good.raw"))? != [7; 4096] {
        return Err("the sound image reads wrong".to_owned());
    }
    if !mount.is_alive() {
        return Err("the daemon is gone".to_owned());
    }
    drop(mount);
    match read(&source.join(IMAGE))? == image {
        true => Ok(()),
        false => Err("the image has changed".to_owned()),
    }
}

/// Compressed clusters of garbage, and bombs: reading them fails or gives a
/// cluster, in bounded time, and the daemon's memory stays bounded.
pub fn compressed(isolation: &str) -> Result<(), String> {
    const MOST_MEMORY: u64 = 256 << 20;
    let dir = scratch()?;
    let (source, at) = (dir.path().join("source"), dir.path().join("mount"));
    for new in [&source, &at] {
        std::fs::create_dir(new).map_err(|error| error.to_string())?;
    }
    for kind in ["deflate", "zstd"] {
        let image = pool::named(kind, dir.path())?;
        let mut garbage = image.clone();
        let range = bombs::compressed(&garbage);
        garbage[range].fill(0xff);
        write(&source.join(format!("garbage-{kind}.qcow2")), &garbage)?;
        let mut bomb = image;
        let stream = match kind {
            "zstd" => bombs::zstd_bomb(),
            _ => bombs::deflate_bomb(),
        };
        bombs::plant(&mut bomb, &stream);
        write(&source.join(format!("bomb-{kind}.qcow2")), &bomb)?;
    }
    let mut mount = Mount::new(&source, &at, isolation)?;
    let first_cluster = |name: &str| {
        let mut cluster = vec![1; 64 << 10];
        let file = File::open(at.join(name)).map_err(|error| error.to_string())?;
        let read = file.read_exact_at(&mut cluster, 0);
        Ok::<_, String>(read.map(|()| cluster).map_err(|error| error.raw_os_error()))
    };
    for kind in ["deflate", "zstd"] {
        let garbage = first_cluster(&format!("garbage-{kind}.qcow2"))?;
        if garbage != Err(Some(libc::EIO)) {
            return Err(format!("{kind}: garbage is not EIO: {:?}", garbage.err()));
        }
    }
    let zeroes = vec![0; 64 << 10];
    let deflate = first_cluster("bomb-deflate.qcow2")?;
    if deflate != Ok(zeroes) {
        return Err(format!(
            "deflate: the first cluster is wrong: {:?}",
            deflate.err()
        ));
    }
    let zstd = first_cluster("bomb-zstd.qcow2")?;
    if zstd != Err(Some(libc::EIO)) {
        return Err(format!(
            "zstd: a frame that goes on is not EIO: {:?}",
            zstd.err()
        ));
    }
    if !mount.is_alive() {
        return Err("the daemon is gone".to_owned());
    }
    match peak_memory(mount.daemon.id())? {
        peak if peak > MOST_MEMORY => Err(format!("the daemon took {peak} bytes of memory")),
        _ => Ok(()),
    }
}

/// The most memory that a process has had resident, in bytes.
fn peak_memory(process: u32) -> Result<u64, String> {
    let status = std::fs::read_to_string(format!("/proc/{process}/status"))
        .map_err(|error| error.to_string())?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.trim().split(' ').next()?.parse::<u64>().ok());
    kib.map(|kib| kib << 10)
        .ok_or_else(|| "no VmHWM".to_owned())
}
