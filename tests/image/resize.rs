//! Growing disks through the whole stack.

use crate::lab::{Case, Lab, Variant, content, equal, open, run, same, text};
use crate::machine::Outcome;
use instar::image::{Access, Effects, EffectsHook, ErrorKind, OpenOptions, ResizeOptions};
use instar::sandbox::{Config, Limits, Pool};
use instar_guest::FileNo;
use instar_guest::proto::Preallocation;
use std::fs;
use std::io::{self, Write as _};
use std::sync::Arc;

pub const CASES: &[Case] = &[
    (
        "a dry run touches nothing and shows what a resize does",
        dry_run,
    ),
    ("a refused resize leaves every byte", refused),
    ("growing to the same size costs nothing", no_op),
    (
        "1 TiB grows to 2 TiB in the sandbox's least memory",
        large_in_little_memory,
    ),
    (
        "growing hides what a longer backing image holds behind the end",
        over_longer_backing,
    ),
    (
        "a full disk before the commit leaves every byte of the disk",
        full_disk,
    ),
    ("a raw disk follows the length of its file", follows),
];

pub fn grows(pool: &Arc<Pool>, variant: &'static Variant) -> Outcome {
    let lab = Lab::new(variant)?;
    let image = lab.open(pool, Access::Write)?;
    let mut expected = lab.content.clone();
    for size in [expected.len() + 512, 9 << 20, 20 << 20] {
        image
            .resize(size as u64, &ResizeOptions::default())
            .map_err(text)?;
        expected.resize(size, 0);
        equal(image.virtual_size(), size as u64, "virtual size")?;
        same(&content(&image)?, &expected, "read after growing")?;
    }
    drop(image);
    lab.judge(&expected)
}

/// Whoever shares the lock, as the kernel does for a mount, may change a raw
/// image's file.
fn follows(pool: &Arc<Pool>) -> Outcome {
    let dir = tempfile::tempdir().map_err(text)?;
    let path = dir.path().join("disk.raw");
    fs::write(&path, [1; 1000]).map_err(text)?;
    let image = open(pool, &path, "raw", Access::Write)?;
    let file = fs::File::options().append(true).open(&path);
    let mut file = file.map_err(text)?;
    file.write_all(&[2; 500]).map_err(text)?;
    image.follow_length().map_err(text)?;
    equal(image.virtual_size(), 1500, "virtual size")?;
    same(
        &content(&image)?,
        &[vec![1; 1000], vec![2; 500]].concat(),
        "read",
    )?;
    let how = ResizeOptions {
        preallocation: Preallocation::Falloc,
        ..ResizeOptions::default()
    };
    image.resize(2000, &how).map_err(text)?;
    file.set_len(700).map_err(text)?;
    image.follow_length().map_err(text)?;
    equal(image.virtual_size(), 700, "virtual size after a truncate")?;
    same(&content(&image)?, &[1; 700], "read after a truncate")
}

/// The L1 tables are of 8 MiB afterwards with small clusters.
fn large_in_little_memory(pool: &Arc<Pool>) -> Outcome {
    const TIB: u64 = 1 << 40;
    for (options, memory) in [
        ("cluster_size=64k", 16 << 20),
        ("cluster_size=64k", 64 << 20),
        ("cluster_size=4k", 16 << 20),
        ("cluster_size=4k", 64 << 20),
    ] {
        let dir = tempfile::tempdir().map_err(text)?;
        let path = dir.path().join("large.qcow2");
        let file = path.to_string_lossy();
        let create = ["create", "-q", "-f", "qcow2", "-o", options, &file, "1T"];
        run("qemu-img", &create)?;
        run("qemu-io", &["-c", "write -P 5 1023G 64k", &file])?;
        let limits = Limits {
            memory,
            ..Limits::default()
        };
        let config = Config {
            isolation: pool.isolation().to_string().parse().map_err(text)?,
            limits,
            ..Config::default()
        };
        let pool = Pool::new(config).map_err(text)?;
        let image = open(&pool, &path, "qcow2", Access::Write)?;
        let grown = image.resize(2 * TIB, &ResizeOptions::default());
        grown.map_err(|error| format!("{options}, {memory} bytes: {error}"))?;
        image.write_at(&[6; 512], 2 * TIB - 512).map_err(text)?;
        image.flush().map_err(text)?;
        drop(image);
        run("qemu-img", &["check", "-q", "-f", "qcow2", &file])?;
        for read in [
            "read -P 5 1023G 64k".to_string(),
            format!("read -P 0 {TIB} 64k"),
            format!("read -P 6 {} 512", 2 * TIB - 512),
        ] {
            let said = run("qemu-io", &["-r", "-f", "qcow2", "-c", &read, &file])?;
            equal(said.contains("failed"), false, &read)?;
        }
    }
    Ok(())
}

fn over_longer_backing(pool: &Arc<Pool>) -> Outcome {
    for options in ["cluster_size=64k", "cluster_size=4k", "extended_l2=on"] {
        let dir = tempfile::tempdir().map_err(text)?;
        let path = |name: &str| dir.path().join(name).to_string_lossy().into_owned();
        let (base, top) = (path("base.qcow2"), path("top.qcow2"));
        run("qemu-img", &["create", "-q", "-f", "qcow2", &base, "8M"])?;
        run("qemu-io", &["-c", "write -P 9 0 8M", &base])?;
        let old = (1 << 20) + 3 * 512;
        let create = ["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"];
        let last = [base.as_str(), "-o", options, &top, &old.to_string()];
        run("qemu-img", &[&create[..], &last[..]].concat())?;
        let before = std::fs::read(&top).map_err(text)?;
        let image = open(pool, top.as_ref(), "qcow2", Access::Write)?;
        // More than the format can express: nothing of the disk is copied.
        let refused = image.resize(1 << 62, &ResizeOptions::default());
        equal(refused.is_err(), true, "a disk of 4 EiB is refused")?;
        let plan = image.plan_resize(3 << 20, &ResizeOptions::default());
        let warnings = plan.map_err(text)?.warnings;
        let copied = |text: &String| text.contains("are copied from the backing file first");
        equal(warnings.iter().any(copied), true, "the copy is told")?;
        image.flush().map_err(text)?;
        same(&std::fs::read(&top).map_err(text)?, &before, "refused, dry")?;
        image
            .resize(3 << 20, &ResizeOptions::default())
            .map_err(text)?;
        let mut expected = vec![9; old as usize];
        expected.resize(3 << 20, 0);
        same(&content(&image)?, &expected, options)?;
        drop(image);
        run("qemu-img", &["check", "-q", "-f", "qcow2", &top])?;
        let zeroes = format!("read -P 0 {old} {}", (3 << 20) - old);
        let said = run("qemu-io", &["-r", "-f", "qcow2", "-c", &zeroes, &top])?;
        equal(said.contains("failed"), false, "the added range")?;
    }
    Ok(())
}

fn qcow2(name: &str) -> Result<(tempfile::TempDir, std::path::PathBuf), String> {
    let dir = tempfile::tempdir().map_err(text)?;
    let path = dir.path().join(name);
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
    run(
        "qemu-io",
        &["-c", "write -P 5 1M 3M", &path.to_string_lossy()],
    )?;
    Ok((dir, path))
}

fn dry_run(pool: &Arc<Pool>) -> Outcome {
    let (_dir, path) = qcow2("disk")?;
    let before = fs::read(&path).map_err(text)?;
    let image = open(pool, &path, "qcow2", Access::Write)?;
    let how = ResizeOptions::default();
    let shown = image.plan_resize(1 << 40, &how).map_err(text)?;
    equal(fs::read(&path).map_err(text)?, before, "file")?;
    equal(
        image.plan_resize(1 << 40, &how).map_err(text)?,
        shown,
        "second plan",
    )?;
    image.resize(1 << 40, &how).map_err(text)?;
    equal(image.virtual_size(), 1 << 40, "size")
}

fn refused(pool: &Arc<Pool>) -> Outcome {
    let (_dir, path) = qcow2("disk")?;
    let before = fs::read(&path).map_err(text)?;
    let image = open(pool, &path, "qcow2", Access::Write)?;
    let plain = ResizeOptions::default();
    let falloc = ResizeOptions {
        preallocation: Preallocation::Falloc,
        ..plain
    };
    let cases = [
        ((64 << 20) + 1, plain, ErrorKind::InvalidRequest),
        (32 << 20, plain, ErrorKind::NotPermitted),
        (64 << 20, falloc, ErrorKind::InvalidRequest),
        (1 << 62, plain, ErrorKind::TooLarge),
    ];
    for (size, how, kind) in cases {
        let error = image
            .resize(size, &how)
            .err()
            .ok_or(format!("{size} was accepted"))?;
        equal(error.kind(), kind, &format!("{size}: {error}"))?;
        equal(fs::read(&path).map_err(text)?, before.clone(), "file")?;
        same(
            &content(&image)?[1 << 20..4 << 20],
            &vec![5; 3 << 20],
            "read",
        )?;
    }
    Ok(())
}

fn no_op(pool: &Arc<Pool>) -> Outcome {
    let (_dir, path) = qcow2("disk")?;
    let image = open(pool, &path, "qcow2", Access::Write)?;
    image
        .resize(64 << 20, &ResizeOptions::default())
        .map_err(text)?;
    let counters = image.counters();
    equal(
        (counters.writes, counters.fdatasyncs),
        (0, 0),
        "writes and syncs",
    )
}

/// Effects on a disk that has no more space for anything new.
struct Full(Box<dyn Effects>);

fn no_space() -> io::Result<()> {
    Err(io::Error::from_raw_os_error(libc::ENOSPC))
}

impl Effects for Full {
    fn write(&self, file: FileNo, offset: u64, data: &[u8]) -> io::Result<()> {
        match offset >= 4 << 20 {
            true => no_space(),
            false => self.0.write(file, offset, data),
        }
    }

    fn zero(&self, _file: FileNo, _offset: u64, _len: u64) -> io::Result<()> {
        no_space()
    }

    fn copy(&self, _file: FileNo, _from: u64, _to: u64, _len: u64) -> io::Result<()> {
        no_space()
    }

    fn copy_from(&self, _: FileNo, _: FileNo, _: u64, _: u64, _: u64) -> io::Result<()> {
        no_space()
    }

    fn reserve(&self, _file: FileNo, _offset: u64, _len: u64) -> io::Result<()> {
        no_space()
    }

    fn punch(&self, file: FileNo, offset: u64, len: u64) -> io::Result<()> {
        self.0.punch(file, offset, len)
    }

    fn set_len(&self, file: FileNo, len: u64) -> io::Result<()> {
        self.0.set_len(file, len)
    }

    fn sync(&self, file: FileNo) -> io::Result<()> {
        self.0.sync(file)
    }
}

fn full_disk(pool: &Arc<Pool>) -> Outcome {
    for preallocation in [Preallocation::Off, Preallocation::Falloc] {
        let (_dir, path) = qcow2("disk")?;
        let len = fs::metadata(&path).map_err(text)?.len();
        let mut options = OpenOptions::new(Access::Write);
        options.effects = EffectsHook(Some(Arc::new(|real| Box::new(Full(real)))));
        let image = options.open(pool, &path).map_err(text)?;
        let how = ResizeOptions {
            preallocation,
            shrink: false,
        };
        // Falloc has data to place; without it only a new L1 table needs space.
        let size = match preallocation {
            Preallocation::Falloc => 128 << 20,
            _ => 1 << 50,
        };
        let error = image.resize(size, &how).err().ok_or("it grew")?;
        equal(
            error.kind(),
            ErrorKind::Os(libc::ENOSPC),
            &error.to_string(),
        )?;
        equal(
            error.message().ends_with("the image is unchanged"),
            true,
            error.message(),
        )?;
        equal(fs::metadata(&path).map_err(text)?.len(), len, "file length")?;
        same(
            &content(&image)?[1 << 20..4 << 20],
            &vec![5; 3 << 20],
            "read",
        )?;
        equal(image.virtual_size(), 64 << 20, "virtual size")?;
        drop(image);
        run("qemu-img", &["check", &path.to_string_lossy()])?;
    }
    Ok(())
}
