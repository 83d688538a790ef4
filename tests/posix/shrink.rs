//! Shrinking.

use crate::images::DISK;
use crate::rig::Rig;
use crate::tools::{errno, run};
use crate::{Claim, claim};
use nix::errno::Errno;
use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

/// What is proven here, for every variant of image.
pub const CLAIMS: &[Claim] = &[
    claim(
        "truncate_shrinks_it_where_that_is_allowed",
        &["truncate"],
        truncate_shrinks_it,
    ),
    claim(
        "what_was_cut_off_never_comes_back",
        &[],
        what_was_cut_off_never_comes_back,
    ),
    claim(
        "an_odd_smaller_size_is_refused_unless_raw",
        &[],
        an_odd_smaller_size_is_refused,
    ),
];

/// What is proven of images that may be emptied and filled again.
pub const EMPTIED: &[Claim] = &[claim(
    "a_file_can_be_copied_over_it",
    &["cp"],
    a_file_can_be_copied_over_it,
)];

/// A size inside the data, and not at the start of a unit of allocation.
const SMALL: u64 = (9 << 20) + 512;

/// The original up to a size, and zeroes up to another.
fn cut(rig: &Rig, size: u64, then: u64) -> PathBuf {
    let expected = rig.expected();
    let file = File::options().write(true).open(&expected).unwrap();
    file.set_len(size).unwrap();
    file.set_len(then).unwrap();
    expected
}

fn truncate_shrinks_it(rig: &Rig) {
    let mount = rig.mount_with("shrink");
    let reader = File::open(&mount.disk).unwrap();
    run("truncate", &[Path::new("-s9437696"), &mount.disk]);
    assert_eq!(fs::metadata(&mount.disk).unwrap().len(), SMALL);
    assert_eq!(reader.read_at(&mut [0; 512], SMALL).unwrap(), 0);
    let expected = cut(rig, SMALL, SMALL);
    run("cmp", &[&expected, &mount.disk]);
    // Committed by the call: it survives the death of the daemon.
    rig.check();
    assert_eq!(rig.virtual_size(), SMALL);
    drop(reader);
    mount.unmount();
    rig.check();
    rig.compare(&expected);
}

fn what_was_cut_off_never_comes_back(rig: &Rig) {
    let mount = rig.mount_with("shrink");
    let disk = File::options().write(true).open(&mount.disk).unwrap();
    disk.set_len(SMALL).unwrap();
    disk.set_len(DISK).unwrap();
    let expected = cut(rig, SMALL, DISK);
    run("cmp", &[&expected, &mount.disk]);
    drop(disk);
    mount.unmount();
    rig.check();
    rig.compare(&expected);
}

fn an_odd_smaller_size_is_refused(rig: &Rig) {
    let mount = rig.mount_with("shrink");
    let disk = File::options().write(true).open(&mount.disk).unwrap();
    if rig.variant.size_unit == 1 {
        disk.set_len(SMALL + 1).unwrap();
        assert_eq!(fs::metadata(&rig.image).unwrap().len(), SMALL + 1);
        return;
    }
    assert_eq!(errno(disk.set_len(SMALL + 1)), Errno::EINVAL);
    assert_eq!(fs::metadata(&mount.disk).unwrap().len(), DISK);
    drop(disk);
    mount.unmount();
    rig.compare(rig.originals.raw());
}

fn a_file_can_be_copied_over_it(rig: &Rig) {
    let new = rig.path("new");
    fs::write(&new, crate::tools::noise(4, 3 << 20)).unwrap();
    let mount = rig.mount_with("shrink");
    run("cp", &[&new, &mount.disk]);
    run("cmp", &[&new, &mount.disk]);
    mount.unmount();
    rig.check();
    rig.compare(&new);
}
