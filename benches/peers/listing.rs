//! Listing a directory of images for the first time, beside asking `qemu-img
//! info` of each.

use crate::{INSTAR, interleave, qemu_create, row, run, timed};
use std::fs;
use std::io;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// Rounds of the comparison.
const ROUNDS: usize = 5;
/// Images in the directory.
const IMAGES: usize = 1000;

/// Prints the row.
pub fn rows(dir: &Path) -> io::Result<()> {
    println!("| a directory of {IMAGES} images | instar | qemu-img | ratio |");
    println!("|---|---|---|---|");
    let (source, mountpoint) = (dir.join("listed"), dir.join("shown"));
    fs::create_dir(&source)?;
    fs::create_dir(&mountpoint)?;
    let image = |number: usize| source.join(format!("{number}.qcow2"));
    qemu_create(&image(0), "64M")?;
    for number in 1..IMAGES {
        fs::copy(image(0), image(number))?;
    }
    let ours = || {
        let mount = ["mount".as_ref(), source.as_os_str(), mountpoint.as_os_str()];
        run(Command::new(INSTAR).args(mount))?;
        let listed = timed(Command::new("ls").arg("-l").arg(&mountpoint));
        run(Command::new(INSTAR).arg("umount").arg(&mountpoint))?;
        listed
    };
    let theirs = || {
        let info = |number| timed(Command::new("qemu-img").arg("info").arg(image(number)));
        (0..IMAGES).map(info).sum::<io::Result<Duration>>()
    };
    let [ours, theirs] = interleave(ROUNDS, [&ours, &theirs])?;
    row(
        "`ls -l` on a new mount against `info` of each",
        ours,
        theirs,
    );
    fs::remove_dir_all(&source)
}
