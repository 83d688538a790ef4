//! instar beside its peers, in one interleaved run: whole `instar info` and
//! `instar resize` processes against qemu-img, large images of every format
//! grown and checked, and reads through the mount
//! against qemu-storage-daemon's FUSE export of the same image and against a
//! filesystem that does nothing but `pread` (what FUSE itself allows here).
//!
//! `cargo bench --bench peers` prints one table. What counts is the ratio: both
//! programs of a row take turns on the same machine, so its speed of the day
//! cancels out. Nothing here passes or fails.

mod formats;
mod null;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

const INSTAR: &str = env!("CARGO_BIN_EXE_instar");
const MIB: u64 = 1 << 20;
/// Size of the disk that the mounts are read through.
const DISK: u64 = 256 * MIB;
/// Rounds of each process comparison; the median of an odd number is a sample.
const PROCESS_ROUNDS: usize = 61;
/// Rounds of each read comparison.
const READ_ROUNDS: usize = 11;
/// Random reads in one round.
const RANDOM_READS: u64 = 4000;

fn main() -> io::Result<()> {
    for tool in ["qemu-img", "qemu-storage-daemon"] {
        if Command::new(tool).arg("--version").output().is_err() {
            println!("not run: {tool} is not installed (Debian: qemu-utils)");
            return Ok(());
        }
    }
    let dir = tempfile::tempdir()?;
    println!("| whole process | instar | qemu-img | ratio |");
    println!("|---|---|---|---|");
    for (name, size, new) in [("64 MiB", "64M", "128M"), ("1 TiB", "1T", "2T")] {
        info(dir.path(), name, size)?;
        resize(dir.path(), name, size, new)?;
    }
    println!();
    formats::rows(dir.path())?;
    println!();
    println!("| read through the mount | instar | qemu-storage-daemon | ratio | null filesystem |");
    println!("|---|---|---|---|---|");
    reads(dir.path())
}

fn info(dir: &Path, name: &str, size: &str) -> io::Result<()> {
    let image = dir.join("info.qcow2");
    qemu_create(&image, size)?;
    let time = |program: &str| {
        let mut command = Command::new(program);
        command.arg("info").arg(&image);
        timed(&mut command)
    };
    let [ours, theirs] = interleave(PROCESS_ROUNDS, [&|| time(INSTAR), &|| time("qemu-img")])?;
    row(&format!("`info`, {name} qcow2"), ours, theirs);
    Ok(())
}

fn resize(dir: &Path, name: &str, size: &str, new: &str) -> io::Result<()> {
    let template = dir.join("template.qcow2");
    qemu_create(&template, size)?;
    let image = dir.join("resize.qcow2");
    let time = |program: &str| {
        fs::copy(&template, &image)?;
        File::open(&image)?.sync_all()?;
        let mut command = Command::new(program);
        command
            .args(["resize", "-q", "-f", "qcow2"])
            .arg(&image)
            .arg(new);
        timed(&mut command)
    };
    let [ours, theirs] = interleave(PROCESS_ROUNDS, [&|| time(INSTAR), &|| time("qemu-img")])?;
    row(&format!("`resize` to {new}, {name} qcow2"), ours, theirs);
    Ok(())
}

fn reads(dir: &Path) -> io::Result<()> {
    let source = dir.join("images");
    fs::create_dir(&source)?;
    let image = source.join("disk.qcow2");
    filled_image(dir, &image)?;

    let mountpoint = dir.join("mnt");
    fs::create_dir(&mountpoint)?;
    let export = dir.join("export");
    File::create(&export)?;
    let ours = mountpoint.join("disk.qcow2");
    let mut children = Mounts(Vec::new(), vec![mountpoint.clone(), export.clone()]);
    children.0.push(
        Command::new(INSTAR)
            .args(["mount", "-f", "-o", "ro"])
            .args([&source, &mountpoint])
            .stderr(Stdio::inherit())
            .spawn()?,
    );
    let file_node = format!(
        "driver=file,node-name=file,read-only=on,filename={}",
        image.display()
    );
    let fuse = format!(
        "type=fuse,id=e,node-name=disk,mountpoint={},writable=off",
        export.display()
    );
    children.0.push(
        Command::new("qemu-storage-daemon")
            .args(["--blockdev", &file_node])
            .args([
                "--blockdev",
                "driver=qcow2,node-name=disk,file=file,read-only=on",
            ])
            .args(["--export", &fuse])
            .spawn()?,
    );
    for path in [&ours, &export] {
        wait_for_size(path, DISK)?;
    }

    let bare = dir.join("null");
    fs::create_dir(&bare)?;
    let _bare_mount = null::mount(File::open(dir.join("disk.raw"))?, &bare)?;
    let paths = [&ours, &export, &bare.join(null::NAME)];

    read_row("4 KiB random reads, O_DIRECT", paths, random_reads)?;
    read_row("1 MiB sequential reads, O_DIRECT", paths, |path| {
        sequential_read(path, libc::O_DIRECT)
    })?;
    read_row("1 MiB sequential reads, buffered", paths, |path| {
        sequential_read(path, 0)
    })
}

/// Measures one way of reading on all three mounts and prints the row.
fn read_row(
    name: &str,
    [ours, theirs, bare]: [&PathBuf; 3],
    read: impl Fn(&Path) -> io::Result<Duration>,
) -> io::Result<()> {
    let [a, b, c] = interleave(
        READ_ROUNDS,
        [&|| read(ours), &|| read(theirs), &|| read(bare)],
    )?;
    println!(
        "| {name} | {} | {} | {:.2} | {} |",
        ms(a),
        ms(b),
        ratio(a, b),
        ms(c)
    );
    Ok(())
}

/// Runs all in turn, each round starting with another, and returns the medians.
fn interleave<const N: usize>(
    rounds: usize,
    runs: [&dyn Fn() -> io::Result<Duration>; N],
) -> io::Result<[Duration; N]> {
    let mut times = [const { Vec::new() }; N];
    for round in 0..=rounds {
        for turn in 0..N {
            let which = (round + turn) % N;
            let time = runs[which]()?;
            if round > 0 {
                times[which].push(time); // round 0 warms up
            }
        }
    }
    Ok(times.map(median))
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

fn ms(time: Duration) -> String {
    format!("{:.2} ms", time.as_secs_f64() * 1e3)
}

fn ratio(ours: Duration, theirs: Duration) -> f64 {
    ours.as_secs_f64() / theirs.as_secs_f64()
}

fn row(name: &str, ours: Duration, theirs: Duration) {
    println!(
        "| {name} | {} | {} | {:.2} |",
        ms(ours),
        ms(theirs),
        ratio(ours, theirs)
    );
}

fn timed(command: &mut Command) -> io::Result<Duration> {
    command.stdout(Stdio::null()).stdin(Stdio::null());
    let start = Instant::now();
    let status = command.status()?;
    let time = start.elapsed();
    if !status.success() {
        return Err(io::Error::other(format!("{command:?}: {status}")));
    }
    Ok(time)
}

fn run(command: &mut Command) -> io::Result<()> {
    timed(command).map(drop)
}

fn qemu_create(image: &Path, size: &str) -> io::Result<()> {
    run(Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2"])
        .arg(image)
        .arg(size))
}

/// A qcow2 image whose every cluster is allocated and holds data.
fn filled_image(dir: &Path, image: &Path) -> io::Result<()> {
    let raw = dir.join("disk.raw");
    let mut random = File::open("/dev/urandom")?;
    let mut out = File::create(&raw)?;
    let mut block = vec![0; MIB as usize];
    for _ in 0..DISK / MIB {
        random.read_exact(&mut block)?;
        out.write_all(&block)?;
    }
    run(Command::new("qemu-img")
        .args(["convert", "-O", "qcow2"])
        .args([&raw, image]))
}

fn wait_for_size(path: &Path, size: u64) -> io::Result<()> {
    let deadline = Instant::now() + Duration::from_secs(10);
    while fs::metadata(path).map(|meta| meta.len()).unwrap_or(0) != size {
        if Instant::now() > deadline {
            return Err(io::Error::other(format!(
                "{} did not appear",
                path.display()
            )));
        }
        sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// A buffer that O_DIRECT accepts: page aligned inside a larger allocation.
struct Aligned(Vec<u8>, usize);

impl Aligned {
    fn new(len: usize) -> Self {
        let memory = vec![0u8; len + 4096];
        let skip = memory.as_ptr().align_offset(4096);
        Self(memory, skip)
    }

    fn slice(&mut self, len: usize) -> &mut [u8] {
        &mut self.0[self.1..self.1 + len]
    }
}

fn open(path: &Path, flags: i32) -> io::Result<File> {
    let mut file = OpenOptions::new()
        .read(true)
        .custom_flags(flags)
        .open(path)?;
    file.seek(SeekFrom::Start(0))?;
    Ok(file)
}

fn random_reads(path: &Path) -> io::Result<Duration> {
    let file = open(path, libc::O_DIRECT)?;
    let mut buffer = Aligned::new(4096);
    // A fixed linear congruential sequence: both programs read the same blocks.
    let mut state = 12345u64;
    let start = Instant::now();
    for _ in 0..RANDOM_READS {
        state = state
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        let block = (state >> 33) % (DISK / 4096);
        file.read_exact_at(buffer.slice(4096), block * 4096)?;
    }
    Ok(start.elapsed())
}

fn sequential_read(path: &Path, flags: i32) -> io::Result<Duration> {
    let mut file = open(path, flags)?;
    // Reads must reach the filesystem, not the page cache of an earlier round.
    nix::fcntl::posix_fadvise(
        &file,
        0,
        0,
        nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED,
    )?;
    let mut buffer = Aligned::new(MIB as usize);
    let start = Instant::now();
    for _ in 0..DISK / MIB {
        file.read_exact(buffer.slice(MIB as usize))?;
    }
    Ok(start.elapsed())
}

/// The two daemons, stopped and unmounted however the benchmark ends.
struct Mounts(Vec<Child>, Vec<PathBuf>);

impl Drop for Mounts {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let pid = nix::unistd::Pid::from_raw(child.id() as i32);
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
            let _ = child.wait();
        }
        for mountpoint in &self.1 {
            let _ = Command::new("umount")
                .arg(mountpoint)
                .stderr(Stdio::null())
                .status();
        }
    }
}
