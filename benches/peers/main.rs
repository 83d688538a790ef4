//! instar beside its peers, in one interleaved run: whole `instar info` and
//! `instar resize` processes against qemu-img, large images of every format
//! grown and checked, and reads and writes through the mount against
//! qemu-storage-daemon's FUSE export and against a filesystem that does nothing
//! but `pread` and `pwrite` (what FUSE itself allows here).
//!
//! `cargo bench --bench peers` prints one table. What counts is the ratio: both
//! programs of a row take turns on the same machine, so its speed of the day
//! cancels out. Nothing here passes or fails.

mod formats;
mod listing;
mod null;
mod through;

use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const INSTAR: &str = env!("CARGO_BIN_EXE_instar");
const MIB: u64 = 1 << 20;
/// Rounds of each process comparison; the median of an odd number is a sample.
const PROCESS_ROUNDS: usize = 61;

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
    listing::rows(dir.path())?;
    println!();
    through::rows(dir.path())
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
