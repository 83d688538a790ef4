//! Growing.

use crate::images::DISK;
use crate::rig::{Mount, Rig};
use crate::tools::{LoopDevice, Mounted, errno, fallocate, noise, run};
use crate::{Claim, claim};
use nix::errno::Errno;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::Path;

/// By how much a disk grows, in bytes.
const GROWTH: u64 = 64 << 20;

/// What needs no write into the disk.
pub const SIZES: &[Claim] = &[
    claim(
        "truncate_grows_it_with_zeroes",
        &["truncate"],
        truncate_grows_it_with_zeroes,
    ),
    claim(
        "ftruncate_grows_it_while_it_is_open",
        &[],
        ftruncate_grows_it_while_it_is_open,
    ),
    claim(
        "a_smaller_size_changes_nothing",
        &[],
        a_smaller_size_changes_nothing,
    ),
    claim(
        "an_odd_size_is_refused_unless_raw",
        &[],
        an_odd_size_is_refused_unless_raw,
    ),
];

/// What is proven of an image that can be allocated as it grows.
pub const SPACE: &[Claim] = &[claim(
    "a_truncate_can_allocate",
    &["truncate"],
    a_truncate_can_allocate,
)];

/// What is proven of an image whose writes are seen before they are taken.
pub const BOUNDS: &[Claim] = &[claim(
    "nogrow_stops_writes_at_the_end",
    &[],
    nogrow_stops_writes_at_the_end,
)];

/// What else is proven here, for qcow2 and raw.
pub const CLAIMS: &[Claim] = &[
    claim(
        "fallocate_grows_it_with_space",
        &[],
        fallocate_grows_it_with_space,
    ),
    claim(
        "a_write_past_the_end_grows_it",
        &[],
        a_write_past_the_end_grows_it,
    ),
    claim(
        "its_filesystem_grows_with_it",
        &[
            "/dev/loop-control",
            "losetup",
            "resize2fs",
            "e2fsck",
            "diff",
        ],
        its_filesystem_grows_with_it,
    ),
];

/// The original, followed by zeroes up to a size.
fn longer(rig: &Rig, size: u64) -> std::path::PathBuf {
    let expected = rig.expected();
    let file = File::options().write(true).open(&expected).unwrap();
    file.set_len(size).unwrap();
    expected
}

/// After the mount: the image is clean and holds the original and zeroes.
#[track_caller]
fn unmount_and_check(rig: &Rig, mount: Mount, size: u64) {
    mount.unmount();
    rig.check();
    assert_eq!(rig.virtual_size(), size);
    rig.compare(&longer(rig, size));
}

fn truncate_grows_it_with_zeroes(rig: &Rig) {
    let mount = rig.mount();
    run("truncate", &[Path::new("-s+64M"), &mount.disk]);
    assert_eq!(fs::metadata(&mount.disk).unwrap().len(), DISK + GROWTH);
    run("cmp", &[&longer(rig, DISK + GROWTH), &mount.disk]);
    // Committed by the call: it survives the death of the daemon.
    rig.check();
    assert_eq!(rig.virtual_size(), DISK + GROWTH);
    unmount_and_check(rig, mount, DISK + GROWTH);
}

fn ftruncate_grows_it_while_it_is_open(rig: &Rig) {
    let mount = rig.mount();
    let disk = File::options()
        .read(true)
        .write(true)
        .open(&mount.disk)
        .unwrap();
    let reader = File::open(&mount.disk).unwrap();
    disk.set_len(DISK + GROWTH).unwrap();
    assert_eq!(reader.metadata().unwrap().len(), DISK + GROWTH);
    let mut end = [9; 512];
    reader.read_exact_at(&mut end, DISK + GROWTH - 512).unwrap();
    assert_eq!(end, [0; 512]);
    disk.set_len(DISK + GROWTH).unwrap();
    drop((disk, reader));
    unmount_and_check(rig, mount, DISK + GROWTH);
}

fn fallocate_grows_it_with_space(rig: &Rig) {
    let mount = rig.mount();
    let disk = File::options().write(true).open(&mount.disk).unwrap();
    fallocate(&disk, 0, DISK - (1 << 20), (1 << 20) + (8 << 20)).unwrap();
    drop(disk);
    unmount_and_check(rig, mount, DISK + (8 << 20));
    let allocated = fs::metadata(&rig.image).unwrap().blocks() * 512;
    assert!(allocated >= 9 << 20, "{allocated}");
}

fn a_truncate_can_allocate(rig: &Rig) {
    let mut size = DISK;
    for mode in ["metadata", "falloc", "full"] {
        let mount = rig.mount_with(&format!("preallocation={mode}"));
        if (mode, rig.variant.format()) == ("metadata", "raw") {
            // There is none.
            let disk = File::options().write(true).open(&mount.disk).unwrap();
            assert_eq!(errno(disk.set_len(size + 512)), Errno::EINVAL);
            drop(disk);
            unmount_and_check(rig, mount, size);
            continue;
        }
        let space = || fs::metadata(&mount.disk).unwrap().blocks() * 512;
        let before = space();
        run("truncate", &[Path::new("-s+8M"), &mount.disk]);
        size += 8 << 20;
        let added = space() - before;
        assert!(added >= 8 << 20 || mode == "metadata", "{mode}: {added}");
        unmount_and_check(rig, mount, size);
    }
}

fn a_write_past_the_end_grows_it(rig: &Rig) {
    let mount = rig.mount();
    let disk = File::options().write(true).open(&mount.disk).unwrap();
    let offset = DISK + 70_000;
    let bytes = noise(5, 1000);
    disk.write_all_at(&bytes, offset).unwrap();
    disk.sync_all().unwrap();
    let unit = rig.variant.size_unit;
    let end = offset + 1000;
    let size = end.next_multiple_of(unit);
    // With a cache of its own the kernel knows where the write ended.
    let shown = match rig.variant.mounted {
        "writeback" => end,
        _ => size,
    };
    assert_eq!(fs::metadata(&mount.disk).unwrap().len(), shown);
    drop(disk);
    mount.unmount();
    rig.check();
    let expected = longer(rig, size);
    let model = File::options().write(true).open(&expected).unwrap();
    model.write_all_at(&bytes, offset).unwrap();
    rig.compare(&expected);
}

fn nogrow_stops_writes_at_the_end(rig: &Rig) {
    let mount = rig.mount_with("nogrow");
    let disk = File::options().write(true).open(&mount.disk).unwrap();
    assert_eq!(errno(disk.write_all_at(&[1; 512], DISK)), Errno::EFBIG);
    assert_eq!(fs::metadata(&mount.disk).unwrap().len(), DISK);
    // A truncate says what it wants.
    disk.set_len(DISK + GROWTH).unwrap();
    drop(disk);
    unmount_and_check(rig, mount, DISK + GROWTH);
}

fn a_smaller_size_changes_nothing(rig: &Rig) {
    let before = fs::read(&rig.image).unwrap();
    let mount = rig.mount();
    let disk = File::options().write(true).open(&mount.disk).unwrap();
    assert_eq!(errno(disk.set_len(DISK - 512)), Errno::EPERM);
    let emptied = File::options().write(true).truncate(true).open(&mount.disk);
    assert_eq!(errno(emptied), Errno::EPERM);
    assert_eq!(fs::metadata(&mount.disk).unwrap().len(), DISK);
    drop(disk);
    mount.unmount();
    assert!(fs::read(&rig.image).unwrap() == before);
}

fn an_odd_size_is_refused_unless_raw(rig: &Rig) {
    let before = fs::read(&rig.image).unwrap();
    let mount = rig.mount();
    let disk = File::options().write(true).open(&mount.disk).unwrap();
    if rig.variant.size_unit == 1 {
        disk.set_len(DISK + 1).unwrap();
        assert_eq!(fs::metadata(&rig.image).unwrap().len(), DISK + 1);
        return;
    }
    assert_eq!(errno(disk.set_len(DISK + 1)), Errno::EINVAL);
    assert_eq!(errno(fallocate(&disk, 0, DISK, 513)), Errno::EINVAL);
    drop(disk);
    mount.unmount();
    assert!(fs::read(&rig.image).unwrap() == before);
}

/// Says which blocks differ, and how, and whether the device is still ours.
#[track_caller]
fn assert_same(found: &[u8], expected: &[u8], rig: &Rig, device: &LoopDevice) {
    const BLOCK: usize = 4096;
    let blocks = found.chunks(BLOCK).zip(expected.chunks(BLOCK)).enumerate();
    let wrong = blocks.filter(|(_, (found, expected))| found != expected);
    let wrong = wrong.map(|(block, (found, _))| {
        let head = &found[..found.len().min(16)];
        format!("{block}: {head:02x?}")
    });
    // The slices first: an iterator is slow in a build for debugging.
    assert!(
        found == expected,
        "{} bytes of {}, from {}; blocks of {BLOCK} bytes: {:?}\n{}",
        found.len(),
        expected.len(),
        device.backing_file(),
        wrong.collect::<Vec<_>>(),
        rig.log()
    );
}

fn its_filesystem_grows_with_it(rig: &Rig) {
    let mount = rig.mount();
    let device = LoopDevice::attach(&mount.disk);
    run("truncate", &[Path::new("-s+64M"), &mount.disk]);
    run("losetup", &[Path::new("-c"), &device.0]);
    assert_eq!(device.size(), DISK + GROWTH);
    run("e2fsck", &[Path::new("-fp"), &device.0]);
    run("resize2fs", &[&device.0]);
    let inner = Mounted::new(&device.0, rig.path("inner"));
    fs::remove_dir(inner.0.join("lost+found")).unwrap();
    let files = rig.originals.files();
    run("diff", &[Path::new("-r"), &files, &inner.0]);
    let new = noise(1, 80 << 20);
    fs::write(inner.0.join("new"), &new).unwrap();
    inner.unmount();
    let inner = Mounted::new(&device.0, rig.path("inner"));
    let found = fs::read(inner.0.join("new")).unwrap();
    assert_same(&found, &new, rig, &device);
    inner.unmount();
    device.detach();
    run("e2fsck", &[Path::new("-fn"), &mount.disk]);
    mount.unmount();
    rig.check();
    assert_eq!(rig.virtual_size(), DISK + GROWTH);
}
