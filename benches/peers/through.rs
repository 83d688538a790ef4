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
const ROUNDS: usize = 5;
/// Random accesses in one round.
const ACCESSES: u64 = 4000;
pub const PAGE: u64 = 4096;

/// A format, and what it is called elsewhere.
pub struct Format {
    pub name: &'static str,
    /// The ending of its images' names.
    ending: &'static str,
    /// qemu's name of its driver, and the options of an image whose disk has
    /// exactly the size asked for.
    driver: &'static str,
    options: &'static [&'static str],
}

/// All of which images are written.
pub const FORMATS: [Format; 4] = [
    format("qcow2", "qcow2", "qcow2", &[]),
    format("VMDK", "vmdk", "vmdk", &[]),
    format("VHD", "vhd", "vpc", &["-o", "force_size=on"]),
    format("VHDX", "vhdx", "vhdx", &[]),
];

const fn format(
    name: &'static str,
    ending: &'static str,
    driver: &'static str,
    options: &'static [&'static str],
) -> Format {
    Format {
        name,
        ending,
        driver,
        options,
    }
}

/// What is done in each round with the file of a path, from an offset on that
/// only writes to new places go by.
type Act = fn(&Path, u64) -> io::Result<Duration>;

/// Whether something is done with the first format only, as the others read and
/// write by the same paths.
const FIRST: bool = true;
const ALL: bool = false;

const ACTS: [(&str, bool, Act); 10] = [
    ("4000 random reads of 4 KiB, `O_DIRECT`", ALL, |path, _| {
        random(path, libc::O_DIRECT, 1, Do::Read)
    }),
    (
        "4000 random reads of 4 KiB by 4 threads, `O_DIRECT`",
        FIRST,
        |path, _| random(path, libc::O_DIRECT, 4, Do::Read),
    ),
    ("256 MiB in reads of 1 MiB, `O_DIRECT`", ALL, |path, _| {
        sequential_reads(path, libc::O_DIRECT)
    }),
    ("256 MiB in reads of 1 MiB, buffered", FIRST, |path, _| {
        sequential_reads(path, 0)
    }),
    ("4000 random writes of 4 KiB, `O_DIRECT`", ALL, |path, _| {
        random(path, libc::O_DIRECT, 1, Do::Write)
    }),
    (
        "4000 random writes of 4 KiB by 4 threads, `O_DIRECT`",
        FIRST,
        |path, _| random(path, libc::O_DIRECT, 4, Do::Write),
    ),
    ("4000 random writes of 4 KiB, buffered", FIRST, |path, _| {
        random(path, 0, 1, Do::Write)
    }),
    (
        "64 MiB in writes of 1 MiB, allocated, `O_DIRECT`",
        ALL,
        |path, _| sequential_writes(path, libc::O_DIRECT, 0),
    ),
    (
        "64 MiB in writes of 1 MiB, new space, `O_DIRECT`",
        ALL,
        |path, new| sequential_writes(path, libc::O_DIRECT, new),
    ),
    (
        "64 MiB in writes of 1 MiB, new space, buffered",
        FIRST,
        |path, new| sequential_writes(path, 0, new),
    ),
];

/// What was done, and the medians of instar's, qemu-storage-daemon's and the
/// null filesystem's times.
pub type Row = (&'static str, [Duration; 3]);

/// Measures and prints the rows of a format.
pub fn rows(dir: &Path, format: &Format) -> io::Result<Vec<Row>> {
    println!(
        "| through the mount, {} | instar | qemu-storage-daemon | instar is | null filesystem | \
         of its speed |",
        format.name
    );
    println!("|---|---|---|---|---|---|");
    let mounts = Mounts::start(dir, format)?;
    // Each program gets to a part of its own file that is new to it.
    let next = [const { AtomicU64::new(FILLED) }; 3];
    let is_first = format.name == FORMATS[0].name;
    ACTS.iter()
        .filter(|(_, only_first, _)| is_first || !only_first)
        .map(|&(name, _, act)| {
            let run = |which: usize| {
                let new = next[which].fetch_add(FRESH, Ordering::Relaxed);
                act(&mounts.paths[which], new)
            };
            let times = interleave(ROUNDS, [&|| run(0), &|| run(1), &|| run(2)])?;
            let [ours, theirs, null] = times;
            println!(
                "| {name} | {} | {} | {:.2} × as fast | {} | {:.0} % |",
                ms(ours),
                ms(theirs),
                ratio(theirs, ours),
                ms(null),
                100.0 * ratio(null, ours)
            );
            Ok((name, times))
        })
        .collect()
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
    fn start(dir: &Path, format: &Format) -> io::Result<Self> {
        let source = dir.join("images");
        let [mountpoint, bare] = [dir.join("mnt"), dir.join("null")];
        for made in [&source, &mountpoint, &bare] {
            fs::create_dir(made)?;
        }
        let raw = dir.join("disk.raw");
        filled(&raw)?;
        let name = format!("disk.{}", format.ending);
        let [image, theirs] = [source.join(&name), dir.join("theirs")];
        for image in [&image, &theirs] {
            let mut convert = Command::new("qemu-img");
            convert.args(["convert", "-f", "raw", "-O", format.driver]);
            run(convert.args(format.options).args([&raw, image]))?;
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
                mountpoint.join(&name),
                export.clone(),
                bare.join(null::NAME),
            ],
            children: vec![ours, storage_daemon(format.driver, &theirs, &export)?],
            mountpoints: vec![mountpoint, export],
            _null: null,
        };
        for path in &mounts.paths {
            wait_for_size(path, DISK)?;
        }
        Ok(mounts)
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

pub fn storage_daemon(driver: &str, image: &Path, export: &Path) -> io::Result<Child> {
    let file = format!("driver=file,node-name=file,filename={}", image.display());
    let fuse = format!(
        "type=fuse,id=e,node-name=disk,mountpoint={},writable=on",
        export.display()
    );
    Command::new("qemu-storage-daemon")
        .args(["--blockdev", &file])
        .args([
            "--blockdev",
            &format!("driver={driver},node-name=disk,file=file"),
        ])
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

/// What is done with a page.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Do {
    Read,
    Write,
}

fn random(path: &Path, flags: i32, threads: u64, what: Do) -> io::Result<Duration> {
    let file = open(path, flags)?;
    let access = |seed: u64| -> io::Result<()> {
        let mut buffer = Aligned::new(PAGE, 7);
        for at in pages(seed).take((ACCESSES / threads) as usize) {
            match what {
                Do::Read => file.read_exact_at(buffer.slice(PAGE), at)?,
                Do::Write => file.write_all_at(buffer.slice(PAGE), at)?,
            }
        }
        Ok(())
    };
    let start = Instant::now();
    scope(|scope| {
        let started: Vec<_> = (0..threads)
            .map(|seed| {
                scope.spawn({
                    let access = &access;
                    move || access(seed)
                })
            })
            .collect();
        started.into_iter().try_for_each(|thread| {
            let ended = thread.join();
            ended.unwrap_or_else(|_| Err(io::Error::other("a thread failed")))
        })
    })?;
    if what == Do::Write {
        file.sync_data()?;
    }
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

fn sequential_writes(path: &Path, flags: i32, offset: u64) -> io::Result<Duration> {
    let file = open(path, flags)?;
    let mut buffer = Aligned::new(MIB, 9);
    let start = Instant::now();
    for at in (offset..offset + FRESH).step_by(MIB as usize) {
        file.write_all_at(buffer.slice(MIB), at)?;
    }
    file.sync_data()?;
    Ok(start.elapsed())
}
