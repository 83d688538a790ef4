//! Writing through the whole stack.

use crate::lab::{Case, Lab, Random, Variant, content, equal, open, run, same, text};
use crate::machine::Outcome;
use instar::image::{Access, Image, ResizeOptions, SegmentKind};
use instar::sandbox::Pool;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

pub const CASES: &[Case] = &[
    ("writes cost what they must", costs),
    ("what is not flushed is not in the file", unflushed),
    (
        "counts left behind the end stop neither writes nor resizes",
        leftovers,
    ),
];

/// What mounts a filesystem.
pub const AS_ROOT: &[Case] = &[("a full disk stops a write and nothing else", full_disk)];

/// Writes of all lengths, some of them zeroes, flushes and a resize in between.
pub fn random_writes(pool: &Arc<Pool>, variant: &'static Variant) -> Outcome {
    let lab = Lab::new(variant)?;
    let mut model = lab.content.clone();
    let image = lab.open(pool, Access::Write)?;
    let mut random = Random(0x5eed);
    for round in 0..80 {
        let len = match random.below(4) {
            0 => 1 + random.below(200),
            1 => 512 * (1 + random.below(8)),
            2 => 4096,
            _ => 1 + random.below(300_000),
        };
        let offset = random.below(model.len() as u64 - len);
        let data = match random.below(5) {
            0 => vec![0; len as usize],
            _ => random.bytes(len as usize),
        };
        image.write_at(&data, offset).map_err(text)?;
        model[offset as usize..][..data.len()].copy_from_slice(&data);
        match round {
            40 => {
                same(&content(&image)?, &model, "read before a flush")?;
            }
            60 => {
                let size = model.len() + (3 << 20);
                image
                    .resize(size as u64, &ResizeOptions::default())
                    .map_err(text)?;
                model.resize(size, 0);
            }
            _ if random.below(8) == 0 => image.flush().map_err(text)?,
            _ => {}
        }
    }
    same(&content(&image)?, &model, "read at the end")?;
    image.flush().map_err(text)?;
    drop(image);
    lab.judge(&model)
}

/// Threads write the parts of one range that are theirs, at once.
pub fn concurrent_writers(pool: &Arc<Pool>, variant: &'static Variant) -> Outcome {
    const THREADS: u64 = 4;
    const STRIPE: u64 = 3000;
    let lab = Lab::new(variant)?;
    let mut model = lab.content.clone();
    let image = lab.open(pool, Access::Write)?;
    let stripes = model.len() as u64 / STRIPE;
    let wrote: Result<Vec<()>, String> = thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS)
            .map(|thread| {
                let image = &image;
                scope.spawn(move || write_stripes(image, thread, THREADS, stripes, STRIPE))
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().map_err(text)?)
            .collect()
    });
    wrote?;
    for stripe in 0..stripes {
        let at = (stripe * STRIPE) as usize;
        model[at..at + STRIPE as usize].fill(1 + (stripe % THREADS) as u8);
    }
    same(&content(&image)?, &model, "read at the end")?;
    image.flush().map_err(text)?;
    drop(image);
    lab.judge(&model)
}

fn write_stripes(image: &Image, first: u64, step: u64, stripes: u64, len: u64) -> Outcome {
    let data = vec![1 + first as u8; len as usize];
    let mut buf = data.clone();
    for stripe in (first..stripes).step_by(step as usize) {
        image.write_at(&data, stripe * len).map_err(text)?;
        image.read_at(&mut buf, stripe * len).map_err(text)?;
        same(&buf, &data, "read after write")?;
        if stripe % 97 == first {
            image.flush().map_err(text)?;
        }
    }
    Ok(())
}

/// One thread writes the disk from start to end, twice, and looks back at what it
/// wrote, while others flush and make the disk larger, as a filesystem on a loop
/// device and its administrator do.
pub fn beside_flushes_and_resizes(pool: &Arc<Pool>, variant: &'static Variant) -> Outcome {
    let lab = Lab::new(variant)?;
    let image = lab.open(pool, Access::Write)?;
    let mut model = lab.content.clone();
    let done = AtomicBool::new(false);
    let mut larger = model.len() as u64;
    thread::scope(|scope| {
        let (image, stop) = (&image, &done);
        let flushing = scope.spawn(move || repeat(stop, || image.flush().map_err(text)));
        let growing = scope.spawn(move || {
            repeat(stop, || {
                larger += 100 * 512;
                image
                    .resize(larger, &ResizeOptions::default())
                    .map_err(text)
                    .map(drop)
            })
        });
        let wrote = write_through(image, &mut model);
        done.store(true, Ordering::Relaxed);
        wrote?;
        flushing.join().map_err(text)??;
        growing.join().map_err(text)?
    })?;
    model.resize(image.virtual_size() as usize, 0);
    same(&content(&image)?, &model, "read at the end")?;
    image.flush().map_err(text)?;
    drop(image);
    lab.judge(&model)
}

/// Does something again and again, with a pause each time, until it is told to
/// stop.
fn repeat(done: &AtomicBool, mut act: impl FnMut() -> Outcome) -> Outcome {
    while !done.load(Ordering::Relaxed) {
        act()?;
        thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

fn write_through(image: &Image, model: &mut [u8]) -> Outcome {
    let mut random = Random(0x10af);
    let mut buf = Vec::new();
    for _ in 0..2 {
        let mut at = 0;
        while at < model.len() {
            let len = (1 + random.below(200_000) as usize).min(model.len() - at);
            let piece = random.bytes(len);
            image.write_at(&piece, at as u64).map_err(text)?;
            model[at..at + len].copy_from_slice(&piece);
            at += len;
            let from = at.saturating_sub(300_000);
            buf.resize(at - from, 0);
            image.read_at(&mut buf, from as u64).map_err(text)?;
            same(&buf, &model[from..at], "read after write")?;
        }
    }
    Ok(())
}

pub fn preallocation(pool: &Arc<Pool>, variant: &'static Variant) -> Outcome {
    let lab = Lab::new(variant)?;
    let image = lab.open(pool, Access::Write)?;
    let size = image.virtual_size();
    image.preallocate(100, size - 100).map_err(text)?;
    same(&content(&image)?, &lab.content, "read")?;
    let segments = image.segments(0, size).map_err(text)?;
    let placed = |kind| matches!(kind, SegmentKind::Data | SegmentKind::Hole);
    let mut outside = segments.iter().filter(|segment| !placed(segment.kind));
    equal(outside.next(), None, "a segment without a place")?;
    let allocated = image.allocated_bytes().map_err(text)?;
    equal(
        allocated >= size,
        true,
        &format!("{allocated} bytes are allocated"),
    )?;
    drop(image);
    lab.judge(&lab.content)
}

fn blank() -> Result<(tempfile::TempDir, std::path::PathBuf), String> {
    let dir = tempfile::tempdir().map_err(text)?;
    let path = dir.path().join("disk");
    run(
        "qemu-img",
        &[
            "create",
            "-q",
            "-f",
            "qcow2",
            &path.to_string_lossy(),
            "64M",
        ],
    )?;
    Ok((dir, path))
}

fn costs(pool: &Arc<Pool>) -> Outcome {
    let (_dir, path) = blank()?;
    let image = open(pool, &path, "qcow2", Access::Write)?;
    let data = vec![7; 65536];
    image.write_at(&data, 0).map_err(text)?;
    image.flush().map_err(text)?;
    // The first flush wrote a new table; a flush into one takes two barriers.
    let before = image.counters();
    image.write_at(&data, 65536).map_err(text)?;
    image.flush().map_err(text)?;
    let after = image.counters();
    equal(
        after.fdatasyncs - before.fdatasyncs,
        2,
        "fdatasyncs of an allocating write",
    )?;
    // In place: no exit, one write, one sync, and nothing for a second flush.
    let before = image.counters();
    image.write_at(&data[..4096], 65536).map_err(text)?;
    image.flush().map_err(text)?;
    image.flush().map_err(text)?;
    let after = image.counters();
    let cost = (
        after.exits - before.exits,
        after.writes - before.writes,
        after.fdatasyncs - before.fdatasyncs,
    );
    equal(
        cost,
        (0, 1, 1),
        "exits, writes and fdatasyncs of a write in place",
    )
}

fn unflushed(pool: &Arc<Pool>) -> Outcome {
    let (_dir, path) = blank()?;
    let image = open(pool, &path, "qcow2", Access::Write)?;
    image.write_at(&[7; 65536], 0).map_err(text)?;
    equal(image.is_dirty(), true, "dirty")?;
    drop(image);
    run("qemu-img", &["check", &path.to_string_lossy()])?;
    let image = open(pool, &path, "qcow2", Access::Read)?;
    same(&content(&image)?, &vec![0; 64 << 20], "read")
}

/// As a loss of power leaves an image while it grows: clusters are counted that
/// the file does not reach, here 1.9 GB of them.
fn leftovers(pool: &Arc<Pool>) -> Outcome {
    const COUNTED: std::ops::Range<u64> = 22..30_000;
    let (_dir, path) = blank()?;
    let name = path.to_string_lossy().into_owned();
    run("qemu-io", &["-f", "qcow2", "-c", "write -P 1 0 64k", &name])?;
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .open(&path)
        .map_err(text)?;
    let word = |at| {
        let mut word = [0; 8];
        file.read_exact_at(&mut word, at)
            .map(|()| u64::from_be_bytes(word))
            .map_err(text)
    };
    let block = word(word(48)?)?;
    let counts: Vec<u8> = COUNTED.flat_map(|_| 1u16.to_be_bytes()).collect();
    file.write_all_at(&counts, block + 2 * COUNTED.start)
        .map_err(text)?;
    drop(file);
    let resized = path.with_extension("resized");
    std::fs::copy(&path, &resized).map_err(text)?;
    let mut disk = vec![0; 64 << 20];
    disk[..65536].fill(1);

    let image = open(pool, &path, "qcow2", Access::Write)?;
    image.write_at(&[2; 65536], 1 << 20).map_err(text)?;
    disk[1 << 20..][..65536].fill(2);
    image.flush().map_err(text)?;
    same(&content(&image)?, &disk, "read")?;
    drop(image);
    run("qemu-img", &["check", "-q", "-r", "leaks", &name])?;
    run("qemu-img", &["check", "-q", &name])?;
    let image = open(pool, &path, "qcow2", Access::Read)?;
    same(&content(&image)?, &disk, "read after the repair of leaks")?;
    drop(image);

    let image = open(pool, &resized, "qcow2", Access::Write)?;
    // More than one L1 cluster maps: the table moves behind what is counted.
    let size = (8192 + 1) * (512 << 20);
    image
        .resize(size, &ResizeOptions::default())
        .map_err(text)?;
    drop(image);
    let name = resized.to_string_lossy();
    run("qemu-img", &["check", "-q", "-r", "leaks", &name])?;
    run("qemu-img", &["check", "-q", &name]).map(|_| ())
}

/// A small filesystem of its own, unmounted at the end.
struct Small(tempfile::TempDir);

impl Small {
    fn new() -> Result<Self, String> {
        let dir = tempfile::tempdir().map_err(text)?;
        let at = dir.path().to_string_lossy().into_owned();
        run("mount", &["-t", "tmpfs", "-o", "size=4m", "none", &at])?;
        Ok(Self(dir))
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = run("umount", &[&self.0.path().to_string_lossy()]);
    }
}

fn full_disk(pool: &Arc<Pool>) -> Outcome {
    let small = Small::new()?;
    let path = small.0.path().join("disk");
    run(
        "qemu-img",
        &[
            "create",
            "-q",
            "-f",
            "qcow2",
            &path.to_string_lossy(),
            "64M",
        ],
    )?;
    let image = open(pool, &path, "qcow2", Access::Write)?;
    let data = vec![7; 300_000];
    image.write_at(&data, 0).map_err(text)?;
    image.flush().map_err(text)?;
    let mut offset = data.len() as u64;
    let error = loop {
        match image.write_at(&data, offset) {
            Ok(()) => offset += data.len() as u64,
            Err(error) => break error,
        }
    };
    equal(error.errno(), libc::ENOSPC, "errno")?;
    // What was written before is kept, what failed is as it was.
    let mut disk = vec![0; 64 << 20];
    disk[..offset as usize].fill(7);
    let mut found = content(&image)?;
    found[offset as usize..offset as usize + data.len()].fill(0);
    same(&found, &disk, "read after the failure")?;
    image.flush().map_err(text)?;
    drop(image);
    run("qemu-img", &["check", &path.to_string_lossy()]).map(|_| ())
}
