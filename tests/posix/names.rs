//! Which files appear, and as what.

use crate::images::DISK;
use crate::rig::Rig;
use crate::tools::{errno, run, xattr};
use crate::{Claim, QEMU_IMG_10, claim};
use nix::errno::Errno;
use nix::sys::stat::Mode;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, symlink};
use std::path::Path;

/// What is proven here.
pub const CLAIMS: &[Claim] = &[
    claim("only_images_appear", &[], only_images_appear),
    claim(
        "new_images_appear_by_themselves",
        &[],
        new_images_appear_by_themselves,
    ),
    claim(
        "what_a_guest_writes_changes_no_format",
        &[],
        what_a_guest_writes_changes_no_format,
    ),
    claim(
        "the_format_option_overrides_names",
        &[],
        the_format_option_overrides_names,
    ),
    claim(
        "attributes_say_what_an_image_is",
        &[QEMU_IMG_10],
        attributes_say_what_an_image_is,
    ),
    claim("a_changed_image_is_seen", &[], a_changed_image_is_seen),
    claim(
        "one_image_can_be_mounted_alone",
        &[],
        one_image_can_be_mounted_alone,
    ),
    claim(
        "it_can_be_mounted_over_its_source",
        &[],
        it_can_be_mounted_over_its_source,
    ),
    claim(
        "free_space_is_that_of_the_source",
        &[],
        free_space_is_that_of_the_source,
    ),
];

/// Names and sizes of everything in a directory.
pub fn listing(directory: &Path) -> BTreeMap<String, u64> {
    fs::read_dir(directory)
        .unwrap()
        .map(|entry| {
            let entry = entry.unwrap();
            let size = match entry.file_type().unwrap().is_dir() {
                true => 0,
                false => entry.metadata().unwrap().len(),
            };
            (entry.file_name().into_string().unwrap(), size)
        })
        .collect()
}

fn only_images_appear(rig: &Rig) {
    let source = rig.source();
    fs::copy(&rig.image, source.join("no-extension")).unwrap();
    fs::write(source.join("notes.txt"), "hello").unwrap();
    fs::write(source.join("boot.iso"), [7; 1000]).unwrap();
    fs::write(source.join("other.vmdk"), "text").unwrap();
    fs::create_dir(source.join("sub")).unwrap();
    fs::copy(&rig.image, source.join("sub/deep.qcow2")).unwrap();
    symlink("/etc/passwd", source.join("passwd.raw")).unwrap();
    symlink(&rig.image, source.join("link.qcow2")).unwrap();
    nix::unistd::mkfifo(&source.join("pipe.raw"), Mode::S_IRWXU).unwrap();
    let mount = rig.mount();
    let expected = [
        ("boot.iso", 1000),
        ("disk.qcow2", DISK),
        ("no-extension", DISK),
        ("other.vmdk", 0),
        ("sub", 0),
    ];
    let expected: BTreeMap<String, u64> = expected
        .into_iter()
        .map(|(name, size)| (name.to_string(), size))
        .collect();
    assert_eq!(listing(&mount.at), expected);
    run(
        "cmp",
        &[rig.originals.raw(), &mount.at.join("sub/deep.qcow2")],
    );
    assert_eq!(errno(File::open(mount.at.join("other.vmdk"))), Errno::EIO);
    for hidden in ["notes.txt", "passwd.raw", "link.qcow2", "pipe.raw"] {
        let found = fs::symlink_metadata(mount.at.join(hidden));
        assert_eq!(errno(found), Errno::ENOENT, "{hidden}");
    }
}

fn new_images_appear_by_themselves(rig: &Rig) {
    let mount = rig.mount();
    let new = mount.at.join("new.qcow2");
    assert_eq!(errno(fs::metadata(&new)), Errno::ENOENT);
    fs::copy(&rig.image, rig.source().join("new.qcow2")).unwrap();
    run("cmp", &[rig.originals.raw(), &new]);
    assert_eq!(listing(&mount.at).len(), 2);
    fs::remove_file(rig.source().join("new.qcow2")).unwrap();
    assert_eq!(listing(&mount.at).len(), 1);
}

fn what_a_guest_writes_changes_no_format(rig: &Rig) {
    let raw = rig.source().join("guest.raw");
    File::create(&raw).unwrap().set_len(1 << 20).unwrap();
    let mount = rig.mount();
    let disk = mount.at.join("guest.raw");
    let header = fs::read(&rig.image).unwrap();
    let writer = File::options().write(true).open(&disk).unwrap();
    writer.write_all_at(&header[..65_536], 0).unwrap();
    drop(writer);
    mount.unmount();
    let mount = rig.mount();
    assert_eq!(fs::metadata(&disk).unwrap().len(), 1 << 20);
    assert_eq!(xattr(&disk, "user.instar.format").unwrap(), "raw");
    run("cmp", &[raw, disk]);
    mount.unmount();
}

fn the_format_option_overrides_names(rig: &Rig) {
    let raw = rig.source().join("data.qcow2.raw");
    fs::copy(&rig.image, &raw).unwrap();
    let disk = rig.source().join("disk.bin");
    fs::write(&disk, [1; 512]).unwrap();
    let mount = rig.mount_with("format=*.bin:raw,format=data*:qcow2");
    assert_eq!(fs::metadata(mount.at.join("disk.bin")).unwrap().len(), 512);
    let data = mount.at.join("data.qcow2.raw");
    run("cmp", &[rig.originals.raw(), &data]);
}

fn attributes_say_what_an_image_is(rig: &Rig) {
    let mount = rig.mount();
    assert_eq!(xattr(&mount.disk, "user.instar.format").unwrap(), "qcow2");
    let info = xattr(&mount.disk, "user.instar.info").unwrap();
    let info: serde_json::Value = serde_json::from_str(&info).unwrap();
    let arguments = ["info", "--output=json", rig.image.to_str().unwrap()];
    let expected = run("qemu-img", &arguments);
    let expected: serde_json::Value = serde_json::from_str(&expected).unwrap();
    assert_eq!(info, expected);
    assert_eq!(
        errno(xattr(&mount.disk, "user.instar.error")),
        Errno::ENODATA
    );
    assert_eq!(errno(xattr(&mount.disk, "user.other")), Errno::ENODATA);
}

fn a_changed_image_is_seen(rig: &Rig) {
    let mount = rig.mount();
    run("cmp", &[rig.originals.raw(), &mount.disk]);
    run(
        "qemu-img",
        &["resize", "-q", rig.image.to_str().unwrap(), "+1M"],
    );
    let disk = File::open(&mount.disk).unwrap();
    let mut end = [1; 512];
    crate::tools::eventually("the kernel asks again for the size", || {
        disk.metadata().unwrap().len() == DISK + (1 << 20)
    });
    disk.read_exact_at(&mut end, DISK + (1 << 20) - 512)
        .unwrap();
    assert_eq!(end, [0; 512]);
}

fn one_image_can_be_mounted_alone(rig: &Rig) {
    fs::copy(&rig.image, rig.source().join("other.qcow2")).unwrap();
    let mount = rig.mount_source(&rig.image, "");
    assert_eq!(
        listing(&mount.at),
        BTreeMap::from([("disk.qcow2".to_string(), DISK)])
    );
    let other = fs::metadata(mount.at.join("other.qcow2"));
    assert_eq!(errno(other), Errno::ENOENT);
    run("cmp", &[rig.originals.raw(), &mount.disk]);
}

fn it_can_be_mounted_over_its_source(rig: &Rig) {
    let mut words = rig.mount_command("");
    words.extend([rig.source().into(), rig.source().into()]);
    run(crate::rig::INSTAR, &words);
    let mount = crate::rig::Mount::found(rig.source(), rig.variant.file);
    run("cmp", &[rig.originals.raw(), &mount.disk]);
    mount.unmount();
    rig.compare(rig.originals.raw());
}

fn free_space_is_that_of_the_source(rig: &Rig) {
    let mount = rig.mount();
    let shown = nix::sys::statvfs::statvfs(&mount.at).unwrap();
    let source = nix::sys::statvfs::statvfs(&rig.source()).unwrap();
    assert_eq!(shown.blocks(), source.blocks());
    assert_eq!(shown.fragment_size(), source.fragment_size());
    assert!(shown.blocks_available() > 0);
}
