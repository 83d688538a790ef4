//! Reading and writing through the mount, beside qemu-storage-daemon's FUSE
//! export of the same kind of image and a filesystem that does nothing else.

use crate::{INSTAR, MIB, interleave, ms, null, ratio, run};
use fuser::BackgroundSession;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{scope, sleep};
use std::time::{Duration, Instant};

/// The part of the disk that holds data, and is read and overwritten.
pub const FILLED: u64 = 256 * MIB;
/// Size of the disk: the rest of it is written for the first time.
pub const DISK: u64 = 16 << 30;
/// Bytes that are written for the first time in one round.
const FRESH: u64 = 64 * MIB;
/// Rounds of each comparison; the median of an odd number is a sample.
const ROUNDS: usize = 11;
/// Random accesses in one round.
const ACCESSES: u64 = 4000;
pub const PAGE: u64 = 4096;

/// Prints the rows.
pub fn rows(dir: &Path) -> io::Result<()> {
    println!(
        "| through the mount, qcow2 | instar | qemu-storage-daemon | ratio | null filesystem | ratio |"
    );
    println!("|---|---|---|---|---|---|");
    let mounts = Mounts::start(dir)?;
    mounts.row("4 KiB random reads, O_DIRECT", |path| random_reads(path, 1))?;
    mounts.row("the same by 4 threads", |path| random_reads(path, 4))?;
    mounts.row("1 MiB sequential reads, O_DIRECT", |path| {
        sequential_reads(path, libc::O_DIRECT)
    })?;
    mounts.row("1 MiB sequential reads, buffered", |path| {
        sequential_reads(path, 0)
    })?;
    mounts.row("4 KiB random writes, O_DIRECT", |path| {
        random_writes(path, libc::O_DIRECT)
    })?;
    mounts.row("4 KiB random writes, buffered", |path| {
        random_writes(path, 0)
    })?;
    mounts.row("1 MiB sequential writes, allocated, O_DIRECT", |path| {
        sequential_writes(path, 0, FRESH)
    })?;
    // Each program gets to a part of its own file that is new to it.
    let next = [const { AtomicU64::new(FILLED) }; 3];
    mounts.row("1 MiB sequential writes, new clusters, O_DIRECT", |path| {
        let which = mounts
            .paths
            .iter()
            .position(|known| known == path)
            .unwrap_or(0);
        sequential_writes(path, next[which].fetch_add(FRESH, Ordering::Relaxed), FRESH)
    })
}

/// The three mounts, stopped and unmounted however the benchmark ends.
struct Mounts {
    /// instar's, qemu-storage-daemon's, the null filesystem's.
    paths: [PathBuf; 3],
    children: Vec<Child>,
    mountpoints: Vec<PathBuf>,
    _null: BackgroundSession,
}

impl Mounts {
    fn start(dir: &Path) -> io::Result<Self> {
        let source = dir.join("images");
        let [mountpoint, bare] = [dir.join("mnt"), dir.join("null")];
        for made in [&source, &mountpoint, &bare] {
            fs::create_dir(made)?;
        }
        let raw = dir.join("disk.raw");
        filled(&raw)?;
        let [image, theirs] = [source.join("disk.qcow2"), dir.join("theirs.qcow2")];
        for image in [&image, &theirs] {
            let convert = ["convert", "-O", "qcow2"];
            run(Command::new("qemu-img").args(convert).args([&raw, image]))?;
        }
        let export = dir.join("export");
        File::create(&export)?;
        let ours = Command::new(INSTAR)
            .args(["mount", "-f"])
            .args([&source, &mountpoint])
            .stderr(Stdio::null())
            .spawn()?;
        let null = null::mount(File::options().read(true).write(true).open(&raw)?, &bare)?;
        let mounts = Self {
            paths: [
                mountpoint.join("disk.qcow2"),
                export.clone(),
                bare.join(null::NAME),
            ],
            children: vec![ours, storage_daemon(&theirs, &export)?],
            mountpoints: vec![mountpoint, export],
            _null: null,
        };
        for path in &mounts.paths {
            wait_for_size(path, DISK)?;
        }
        Ok(mounts)
    }

    /// Measures one thing on all three mounts and prints the row.
    fn row(&self, name: &str, act: impl Fn(&Path) -> io::Result<Duration>) -> io::Result<()> {
        let [ours, theirs, bare] = &self.paths;
        let runs: [&dyn Fn() -> io::Result<Duration>; 3] =
            [&|| act(ours), &|| act(theirs), &|| act(bare)];
        let [a, b, c] = interleave(ROUNDS, runs)?;
        println!(
            "| {name} | {} | {} | {:.2} | {} | {:.2} |",
            ms(a),
            ms(b),
            ratio(a, b),
            ms(c),
            ratio(a, c)
        );
        Ok(())
    }
}

impl Drop for Mounts {
    fn drop(&mut self) {
        for child in &mut self.children {
            let pid = nix::unistd::Pid::from_raw(child.id() as i32);
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
            let _ = child.wait();
        }
        for mountpoint in &self.mountpoints {
            let _ = Command::new("umount")
                .arg(mountpoint)
                .stderr(Stdio::null())
                .status();
        }
    }
}

pub fn storage_daemon(image: &Path, export: &Path) -> io::Result<Child> {
    let file = format!("driver=file,node-name=file,filename={}", image.display());
    let fuse = format!(
        "type=fuse,id=e,node-name=disk,mountpoint={},writable=on",
        export.display()
    );
    Command::new("qemu-storage-daemon")
        .args(["--blockdev", &file])
        .args(["--blockdev", "driver=qcow2,node-name=disk,file=file"])
        .args(["--export", &fuse])
        .spawn()
}

/// A raw disk whose beginning holds data.
pub fn filled(raw: &Path) -> io::Result<()> {
    let mut random = File::open("/dev/urandom")?;
    let mut out = File::create(raw)?;
    let mut block = vec![0; MIB as usize];
    for _ in 0..FILLED / MIB {
        random.read_exact(&mut block)?;
        out.write_all(&block)?;
    }
    out.set_len(DISK)
}

pub fn wait_for_size(path: &Path, size: u64) -> io::Result<()> {
    let deadline = Instant::now() + Duration::from_secs(10);
    while fs::metadata(path).map_or(0, |meta| meta.len()) != size {
        if Instant::now() > deadline {
            let what = format!("{} did not appear", path.display());
            return Err(io::Error::other(what));
        }
        sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// A buffer that `O_DIRECT` accepts: page aligned inside a larger allocation.
pub struct Aligned(Vec<u8>, usize);

impl Aligned {
    pub fn new(len: u64, byte: u8) -> Self {
        let memory = vec![byte; (len + PAGE) as usize];
        let skip = memory.as_ptr().align_offset(PAGE as usize);
        Self(memory, skip)
    }

    pub fn slice(&mut self, len: u64) -> &mut [u8] {
        &mut self.0[self.1..self.1 + len as usize]
    }
}

/// A file whose accesses reach the filesystem, not the page cache of an earlier
/// round.
pub fn open(path: &Path, flags: i32) -> io::Result<File> {
    let mut options = OpenOptions::new();
    let file = options
        .read(true)
        .write(true)
        .custom_flags(flags)
        .open(path)?;
    let forget = nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED;
    nix::fcntl::posix_fadvise(&file, 0, 0, forget)?;
    Ok(file)
}

/// Pages of the filled part, the same ones in each round: a fixed linear
/// congruential sequence.
pub fn pages(seed: u64) -> impl Iterator<Item = u64> {
    let mut state = seed;
    std::iter::repeat_with(move || {
        state = state
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (state >> 33) % (FILLED / PAGE) * PAGE
    })
}

fn random_reads(path: &Path, threads: u64) -> io::Result<Duration> {
    let file = open(path, libc::O_DIRECT)?;
    let read = |seed: u64| -> io::Result<()> {
        let mut buffer = Aligned::new(PAGE, 0);
        for at in pages(seed).take((ACCESSES / threads) as usize) {
            file.read_exact_at(buffer.slice(PAGE), at)?;
        }
        Ok(())
    };
    let start = Instant::now();
    scope(|scope| {
        let started: Vec<_> = (0..threads)
            .map(|seed| scope.spawn(move || read(seed)))
            .collect();
        started.into_iter().try_for_each(|thread| {
            let ended = thread.join();
            ended.unwrap_or_else(|_| Err(io::Error::other("a thread failed")))
        })
    })?;
    Ok(start.elapsed())
}

fn random_writes(path: &Path, flags: i32) -> io::Result<Duration> {
    let file = open(path, flags)?;
    let mut buffer = Aligned::new(PAGE, 7);
    let start = Instant::now();
    for at in pages(12345).take(ACCESSES as usize) {
        file.write_all_at(buffer.slice(PAGE), at)?;
    }
    file.sync_data()?;
    Ok(start.elapsed())
}

pub fn sequential_reads(path: &Path, flags: i32) -> io::Result<Duration> {
    let file = open(path, flags)?;
    let mut buffer = Aligned::new(MIB, 0);
    let start = Instant::now();
    for at in (0..FILLED).step_by(MIB as usize) {
        file.read_exact_at(buffer.slice(MIB), at)?;
    }
    Ok(start.elapsed())
}

fn sequential_writes(path: &Path, offset: u64, len: u64) -> io::Result<Duration> {
    let file = open(path, libc::O_DIRECT)?;
    let mut buffer = Aligned::new(MIB, 9);
    let start = Instant::now();
    for at in (offset..offset + len).step_by(MIB as usize) {
        file.write_all_at(buffer.slice(MIB), at)?;
    }
    file.sync_data()?;
    Ok(start.elapsed())
}
