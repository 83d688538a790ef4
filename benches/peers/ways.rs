//! The ways between the kernel and a file: raw images that the kernel uses by
//! itself beside the plain file, and its cache for what is written, beside
//! qemu-storage-daemon, which has none, and the null filesystem with the same.

use crate::through::{
    Aligned, DISK, FILLED, PAGE, filled, open, pages, sequential_reads, storage_daemon,
    wait_for_size,
};
use crate::{INSTAR, MIB, interleave, ms, null, ratio, run};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Rounds of each comparison; the median of an odd number is a sample.
const ROUNDS: usize = 5;
/// Accesses in one round.
const ACCESSES: u64 = 4000;

/// What is done in each round with the file of a path.
type Act = fn(&Path) -> io::Result<Duration>;

const RAW: [(&str, Act); 6] = [
    ("4000 random reads of 4 KiB, `O_DIRECT`", |path| {
        let mut buffer = Aligned::new(PAGE, 0);
        timed(path, libc::O_DIRECT, |file| {
            pages(1)
                .take(ACCESSES as usize)
                .try_for_each(|at| file.read_exact_at(buffer.slice(PAGE), at))
        })
    }),
    ("256 MiB in reads of 1 MiB, `O_DIRECT`", |path| {
        sequential_reads(path, libc::O_DIRECT)
    }),
    ("256 MiB in reads of 1 MiB, buffered", |path| {
        sequential_reads(path, 0)
    }),
    ("4000 random writes of 4 KiB, `O_DIRECT`", |path| {
        writes(path, libc::O_DIRECT, PAGE, pages(1))
    }),
    ("4000 random writes of 4 KiB, buffered", |path| {
        writes(path, 0, PAGE, pages(1))
    }),
    ("64 MiB in writes of 1 MiB, `O_DIRECT`", |path| {
        writes(path, libc::O_DIRECT, MIB, in_turn(MIB).take(64))
    }),
];

const GATHERED: [(&str, Act); 2] = [
    ("4000 random writes of 4 KiB, buffered", |path| {
        writes(path, 0, PAGE, pages(1))
    }),
    ("the same in turn", |path| {
        writes(path, 0, PAGE, in_turn(PAGE))
    }),
];

/// Offsets one after the other.
fn in_turn(step: u64) -> impl Iterator<Item = u64> {
    (0..FILLED).step_by(step as usize)
}

fn timed(
    path: &Path,
    flags: i32,
    act: impl FnOnce(&File) -> io::Result<()>,
) -> io::Result<Duration> {
    let file = open(path, flags)?;
    let start = Instant::now();
    act(&file)?;
    Ok(start.elapsed())
}

fn writes(
    path: &Path,
    flags: i32,
    len: u64,
    offsets: impl Iterator<Item = u64>,
) -> io::Result<Duration> {
    let mut buffer = Aligned::new(len, 7);
    timed(path, flags, |file| {
        for at in offsets.take(ACCESSES as usize) {
            file.write_all_at(buffer.slice(len), at)?;
        }
        file.sync_data()
    })
}

/// Prints the rows.
pub fn rows(dir: &Path) -> io::Result<()> {
    let [images, plain] = ["images", "plain"].map(|name| dir.join(name));
    for made in [&images, &plain] {
        fs::create_dir(made)?;
    }
    let [image, file] = [images.join("disk.raw"), plain.join("disk.raw")];
    filled(&image)?;
    filled(&file)?;
    {
        let ours = Served::instar(&images, dir.join("raw"), "")?;
        let [image, file] = [&ours.at.join("disk.raw"), &file];
        wait_for_size(image, DISK)?;
        println!("| raw, passthrough | instar | plain file | instar is |");
        println!("|---|---|---|---|");
        for (name, act) in RAW {
            let [a, b] = interleave(ROUNDS, [&|| act(image), &|| act(file)])?;
            println!(
                "| {name} | {} | {} | {:.2} × as fast |",
                ms(a),
                ms(b),
                ratio(b, a)
            );
        }
    }
    println!();
    gathered(dir, &image, &file)
}

fn gathered(dir: &Path, raw: &Path, file: &Path) -> io::Result<()> {
    let images = dir.join("gathered");
    fs::create_dir(&images)?;
    let [ours, theirs] = [images.join("disk.qcow2"), dir.join("theirs.qcow2")];
    for image in [&ours, &theirs] {
        let convert = ["convert", "-f", "raw", "-O", "qcow2"];
        run(Command::new("qemu-img").args(convert).args([raw, image]))?;
    }
    let export = dir.join("export.qcow2");
    File::create(&export)?;
    let instar = Served::instar(&images, dir.join("mnt-writeback"), "writeback")?;
    let bare = dir.join("null-writeback");
    fs::create_dir(&bare)?;
    let _daemon = Served {
        process: storage_daemon("qcow2", &theirs, &export)?,
        at: export.clone(),
    };
    let file = File::options().read(true).write(true).open(file)?;
    let _null = null::mount_gathering(file, &bare)?;
    let paths = [
        &instar.at.join("disk.qcow2"),
        &export,
        &bare.join(null::NAME),
    ];
    for path in paths {
        wait_for_size(path, DISK)?;
    }
    println!(
        "| qcow2, `-o writeback` | instar | qemu-storage-daemon | instar is | null filesystem, \
         the same | of its speed |"
    );
    println!("|---|---|---|---|---|---|");
    for (name, act) in GATHERED {
        let [a, b, c] = interleave(
            ROUNDS,
            [&|| act(paths[0]), &|| act(paths[1]), &|| act(paths[2])],
        )?;
        println!(
            "| {name} | {} | {} | {:.2} × as fast | {} | {:.0} % |",
            ms(a),
            ms(b),
            ratio(b, a),
            ms(c),
            100.0 * ratio(c, a)
        );
    }
    Ok(())
}

/// A mount, ended and unmounted however the benchmark ends.
struct Served {
    process: Child,
    at: PathBuf,
}

impl Served {
    fn instar(images: &Path, at: PathBuf, options: &str) -> io::Result<Self> {
        fs::create_dir(&at)?;
        let process = Command::new(INSTAR)
            .args(["mount", "-f", "-o", options])
            .args([images, &at])
            .stderr(Stdio::null())
            .spawn()?;
        Ok(Self { process, at })
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let pid = nix::unistd::Pid::from_raw(self.process.id() as i32);
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
        let _ = self.process.wait();
        let _ = Command::new("umount")
            .arg(&self.at)
            .stderr(Stdio::null())
            .status();
    }
}
