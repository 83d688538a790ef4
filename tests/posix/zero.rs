//! Ranges that are zeroed, and holes that are punched.

use crate::images::DISK;
use crate::rig::Rig;
use crate::tools::{errno, fallocate, noise, run};
use crate::{Claim, claim};
use libc::{FALLOC_FL_KEEP_SIZE as KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE as ZERO};
use nix::errno::Errno;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};

/// What is proven here, for every variant of image that takes writes.
pub const CLAIMS: &[Claim] = &[
    claim(
        "ranges_are_zeroed_like_those_of_a_file",
        &[],
        ranges_are_zeroed_like_those_of_a_file,
    ),
    claim(
        "holes_give_their_space_back",
        &[],
        holes_give_their_space_back,
    ),
];

const PUNCH: libc::c_int = FALLOC_FL_PUNCH_HOLE | KEEP_SIZE;

/// Inside sectors, across clusters, across the end, past it.
const RANGES: &[(libc::c_int, u64, u64)] = &[
    (PUNCH, 3, 100),
    (PUNCH, 65_000, 3_000),
    (ZERO | KEEP_SIZE, 1_048_570, 700_000),
    (PUNCH, 5 << 20, 4 << 20),
    (ZERO, 20 << 20, (6 << 20) + 1),
    (PUNCH, DISK - 1_000, 1 << 20),
    (ZERO | KEEP_SIZE, DISK - 5_000, 1 << 20),
    (PUNCH, DISK + 512, 1 << 20),
];

fn ranges_are_zeroed_like_those_of_a_file(rig: &Rig) {
    let expected = rig.expected();
    let model = File::options().write(true).open(&expected).unwrap();
    let mount = rig.mount();
    let disk = File::options().write(true).open(&mount.disk).unwrap();
    for (number, &(mode, offset, len)) in RANGES.iter().enumerate() {
        for file in [&disk, &model] {
            fallocate(file, mode, offset, len).unwrap();
        }
        // What is written there afterwards is there.
        let bytes = noise(number as u64, 700);
        for file in [&disk, &model] {
            let offset = (offset + len / 2).min(DISK - 700);
            file.write_all_at(&bytes, offset).unwrap();
        }
    }
    let odd = libc::FALLOC_FL_INSERT_RANGE;
    assert_eq!(errno(fallocate(&disk, odd, 0, 1 << 20)), Errno::EOPNOTSUPP);
    disk.sync_all().unwrap();
    run("cmp", &[&expected, &mount.disk]);
    drop(disk);
    mount.unmount();
    rig.check();
    rig.compare(&expected);
}

fn holes_give_their_space_back(rig: &Rig) {
    let bytes = noise(11, 8 << 20);
    let mount = rig.mount();
    let disk = File::options().write(true).open(&mount.disk).unwrap();
    disk.write_all_at(&bytes, 32 << 20).unwrap();
    disk.sync_all().unwrap();
    let space = || {
        let files = fs::read_dir(rig.source()).unwrap();
        let blocks = files.map(|file| file.unwrap().metadata().unwrap().blocks());
        blocks.sum::<u64>() * 512
    };
    let before = space();
    fallocate(&disk, PUNCH, 32 << 20, 8 << 20).unwrap();
    disk.sync_all().unwrap();
    let after = space();
    // Clusters of 2 MiB and their tables may stay.
    assert!(after + (7 << 20) <= before, "{before} {after}");
    drop(disk);
    let expected = rig.expected();
    let model = File::options().write(true).open(&expected).unwrap();
    fallocate(&model, PUNCH, 32 << 20, 8 << 20).unwrap();
    run("cmp", &[&expected, &mount.disk]);
    mount.unmount();
    rig.check();
    rig.compare(&expected);
}
