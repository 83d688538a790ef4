//! Images of every format: what the mount does with them beyond growing and
//! shrinking, and what it refuses.

use crate::images::DISK;
use crate::rig::Rig;
use crate::tools::{errno, fallocate, run, xattr};
use crate::{Claim, QEMU_IMG_10, claim};
use nix::errno::Errno;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::Path;

/// What is proven here, for the formats in which disks are resized.
pub const CLAIMS: &[Claim] = &[
    claim("it_reads_like_the_original", &["cp"], it_reads),
    claim(
        "its_attributes_say_what_it_is",
        &[QEMU_IMG_10],
        its_attributes_say_what_it_is,
    ),
    claim("only_the_image_is_shown", &[], only_the_image_is_shown),
    claim(
        "a_write_is_kept_or_refused_with_the_reason",
        &[],
        a_write_is_kept_or_refused,
    ),
];

/// What is proven of an image that can be allocated as it grows.
pub const SPACE: &[Claim] = &[claim("fallocate_grows_it", &[], fallocate_grows_it)];

/// What is proven of an image that can only be read.
pub const READ_ONLY: &[Claim] = &[
    claim("it_reads_like_the_original", &["cp"], it_reads),
    claim(
        "it_is_not_opened_for_writing",
        &["truncate"],
        it_is_not_opened_for_writing,
    ),
];

fn it_reads(rig: &Rig) {
    let mount = rig.mount();
    run("cmp", &[rig.originals.raw(), &mount.disk]);
    let copy = rig.path("copy");
    let how = Path::new("--sparse=always");
    run("cp", &[how, &mount.disk, &copy]);
    run("cmp", &[rig.originals.raw(), &copy]);
}

fn its_attributes_say_what_it_is(rig: &Rig) {
    let mount = rig.mount();
    let format = rig.variant.format();
    assert_eq!(xattr(&mount.disk, "user.instar.format").unwrap(), format);
    let info = xattr(&mount.disk, "user.instar.info").unwrap();
    let info: serde_json::Value = serde_json::from_str(&info).unwrap();
    let image = rig.image.to_str().unwrap();
    let expected = run("qemu-img", &["info", "--output=json", "-f", format, image]);
    let expected: serde_json::Value = serde_json::from_str(&expected).unwrap();
    assert_eq!(info, expected);
    let allocated = fs::metadata(&mount.disk).unwrap().blocks() * 512;
    assert_eq!(Some(allocated), expected["actual-size"].as_u64());
}

fn only_the_image_is_shown(rig: &Rig) {
    let mount = rig.mount();
    for entry in fs::read_dir(rig.source()).unwrap() {
        let path = entry.unwrap().path();
        let shown = fs::metadata(mount.at.join(path.file_name().unwrap()));
        assert_eq!(shown.is_ok(), path == rig.image, "{}", path.display());
    }
    assert_eq!(fs::read_dir(&mount.at).unwrap().count(), 1);
}

fn fallocate_grows_it(rig: &Rig) {
    const GROWTH: u64 = 8 << 20;
    let mount = rig.mount();
    let before = fs::metadata(&mount.disk).unwrap().blocks() * 512;
    let disk = File::options().write(true).open(&mount.disk).unwrap();
    fallocate(&disk, 0, DISK, GROWTH).unwrap();
    assert_eq!(disk.metadata().unwrap().len(), DISK + GROWTH);
    drop(disk);
    let after = fs::metadata(&mount.disk).unwrap().blocks() * 512;
    assert!(after >= before + GROWTH, "{before} {after}");
    mount.unmount();
    rig.check();
    let expected = rig.expected();
    let model = File::options().write(true).open(&expected).unwrap();
    model.set_len(DISK + GROWTH).unwrap();
    rig.compare(&expected);
}

fn a_write_is_kept_or_refused(rig: &Rig) {
    let expected = rig.expected();
    let mount = rig.mount();
    let disk = File::options().write(true).open(&mount.disk).unwrap();
    let bytes = crate::tools::noise(6, 70_000);
    let written = disk
        .write_all_at(&bytes, 20_000)
        .and_then(|()| disk.sync_all());
    match written {
        Ok(()) => {
            let model = File::options().write(true).open(&expected).unwrap();
            model.write_all_at(&bytes, 20_000).unwrap();
        }
        refused => {
            let errno = errno(refused);
            assert!(
                [Errno::EROFS, Errno::EOPNOTSUPP].contains(&errno),
                "{errno}"
            );
            assert!(!xattr(&mount.disk, "user.instar.error").unwrap().is_empty());
        }
    }
    drop(disk);
    run("cmp", &[&expected, &mount.disk]);
    mount.unmount();
    rig.check();
    rig.compare(&expected);
}

fn it_is_not_opened_for_writing(rig: &Rig) {
    let mount = rig.mount_with("shrink");
    let opened = File::options().write(true).open(&mount.disk);
    assert_eq!(errno(opened), Errno::EROFS);
    let why = xattr(&mount.disk, "user.instar.error").unwrap();
    assert!(why.contains("convert"), "{why}");
    assert_eq!(fs::metadata(&mount.disk).unwrap().len(), DISK);
}
