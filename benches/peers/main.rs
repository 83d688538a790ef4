//! instar beside its peers, in one interleaved run: whole `instar info` and
//! `instar resize` processes against qemu-img, large images of every format
//! grown and checked, and reads and writes through the mount against
//! qemu-storage-daemon's FUSE export and against a filesystem that does nothing
//! but `pread` and `pwrite` (what FUSE itself allows here).
//!
//! `cargo bench --bench peers` prints tables of medians. What counts is the
//! ratio: all programs of a row take turns on the same machine, so its speed of
//! the day cancels out. Nothing here passes or fails. Words behind `--` choose
//! the tables whose names have one of them; `--plot` draws what was measured
//! through the mount into `doc/speed.svg`.

mod formats;
mod listing;
mod null;
mod plot;
mod through;
mod ways;

use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const INSTAR: &str = env!("CARGO_BIN_EXE_instar");
const MIB: u64 = 1 << 20;
/// Rounds of each process comparison; the median of an odd number is a sample.
const PROCESS_ROUNDS: usize = 61;

/// A table by its name, and what prints it.
type Table = (&'static str, fn(&Path) -> io::Result<()>);

const TABLES: [Table; 4] = [
    ("commands", commands),
    ("large", formats::rows),
    ("listing", listing::rows),
    ("ways", ways::rows),
];

fn main() -> io::Result<()> {
    for tool in ["qemu-img", "qemu-storage-daemon"] {
        if Command::new(tool).arg("--version").output().is_err() {
            println!("not run: {tool} is not installed (Debian: qemu-utils)");
            return Ok(());
        }
    }
    let (options, words): (Vec<String>, Vec<String>) = std::env::args()
        .skip(1)
        .partition(|argument| argument.starts_with("--"));
    let chosen = |name: &str| words.is_empty() || words.iter().any(|word| name.contains(word));
    for (_, print) in TABLES.iter().filter(|(name, _)| chosen(name)) {
        print(tempfile::tempdir()?.path())?;
        println!();
    }
    let mut measured = Vec::new();
    for format in &through::FORMATS {
        if chosen(&format!("mount {}", format.name)) {
            let rows = through::rows(tempfile::tempdir()?.path(), format)?;
            measured.push((format.name, rows));
            println!();
        }
    }
    match options.iter().any(|option| option == "--plot") {
        true => plot::draw(&measured),
        false => Ok(()),
    }
}

/// Whole processes on usual images.
fn commands(dir: &Path) -> io::Result<()> {
    println!("| whole process | instar | qemu-img | ratio |");
    println!("|---|---|---|---|");
    for (name, size, new) in [("64 MiB", "64M", "128M"), ("1 TiB", "1T", "2T")] {
        info(dir, name, size)?;
        resize(dir, name, size, new)?;
    }
    Ok(())
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
