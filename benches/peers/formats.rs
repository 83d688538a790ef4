//! Growing and checking large images, beside what qemu-img takes to look at
//! them: it does not resize three of these formats.

use crate::{INSTAR, MIB, interleave, row, run, timed};
use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// Rounds of each comparison.
const ROUNDS: usize = 5;
/// Allocation units that hold data, spread over the disk.
const BLOCKS: u64 = 5000;
/// Size of the disks, in MiB.
const DISK: u64 = 100 << 10;
/// Commands of one `qemu-io`.
const BATCH: u64 = 1000;

/// A format, what its file is called, and whether `check` is part of what
/// growing is compared with.
const FORMATS: [(&str, &str, bool); 4] = [
    ("qcow2", "disk.qcow2", true),
    ("vmdk", "disk.vmdk", true),
    ("vpc", "disk.vhd", false),
    ("vhdx", "disk.vhdx", false),
];

/// Prints the rows.
pub fn rows(dir: &Path) -> io::Result<()> {
    println!("| 100 GiB with 5,000 blocks of data, grown to 200 GiB | instar | qemu-img | ratio |");
    println!("|---|---|---|---|");
    for (format, file, with_check) in FORMATS {
        grow(dir, format, file, with_check)?;
    }
    println!();
    println!("| whole process | instar | qemu-img | ratio |");
    println!("|---|---|---|---|");
    check(dir)
}

fn grow(dir: &Path, format: &str, file: &str, with_check: bool) -> io::Result<()> {
    let template = dir.join(format!("template-{file}"));
    let image = dir.join(file);
    run(Command::new("qemu-img")
        .args(["create", "-q", "-f", format])
        .arg(&template)
        .arg(format!("{DISK}M")))?;
    fill(&template, format)?;
    let ours = || {
        copy(&template, &image)?;
        let mut command = Command::new(INSTAR);
        command.args(["resize", "-q", "-f", format]).arg(&image);
        timed(command.arg("200G"))
    };
    let theirs = || {
        let look = |what: &str| {
            let mut command = Command::new("qemu-img");
            timed(command.args([what, "-f", format]).arg(&template))
        };
        let info = look("info")?;
        Ok(info
            + if with_check {
                look("check")?
            } else {
                Duration::ZERO
            })
    };
    let [ours, theirs] = interleave(ROUNDS, [&ours, &theirs])?;
    let against = match with_check {
        true => "`info` and `check`",
        false => "`info`",
    };
    row(
        &format!("{format}: `resize` against {against}"),
        ours,
        theirs,
    );
    fs::remove_file(&template)?;
    fs::remove_file(&image)
}

/// Data in every 20th MiB.
fn fill(image: &Path, format: &str) -> io::Result<()> {
    for batch in 0..BLOCKS / BATCH {
        let mut command = Command::new("qemu-io");
        command.args(["-f", format]);
        for block in batch * BATCH..(batch + 1) * BATCH {
            let at = block * (DISK / BLOCKS) * MIB;
            command.args(["-c", &format!("write -q -P 7 {at} 4k")]);
        }
        run(command.arg(image))?;
    }
    Ok(())
}

/// A copy with the same holes, durable before anything is measured.
fn copy(from: &Path, to: &Path) -> io::Result<()> {
    run(Command::new("cp").arg("--sparse=always").args([from, to]))?;
    File::open(to)?.sync_all()
}

/// 1,048,576 clusters, all allocated.
fn check(dir: &Path) -> io::Result<()> {
    let image = dir.join("full.qcow2");
    run(Command::new("qemu-img")
        .args([
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            "preallocation=metadata",
        ])
        .arg(&image)
        .arg("64G"))?;
    let time = |program: &str| {
        let mut command = Command::new(program);
        timed(command.args(["check", "-q", "-f", "qcow2"]).arg(&image))
    };
    let [ours, theirs] = interleave(ROUNDS, [&|| time(INSTAR), &|| time("qemu-img")])?;
    row("`check`, 1,048,576 clusters allocated, qcow2", ours, theirs);
    fs::remove_file(&image)
}
