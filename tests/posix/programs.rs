//! Programs that use the mounted file in their own ways.

use crate::images::DISK;
use crate::rig::Rig;
use crate::tools::run;
use crate::{Claim, claim};
use std::path::Path;

/// What is proven here, for the plainest image of each format.
pub const CLAIMS: &[Claim] = &[
    claim(
        "a_filesystem_can_be_made_on_it",
        &["e2fsck", "debugfs"],
        a_filesystem_can_be_made_on_it,
    ),
    claim(
        "a_shared_mapping_writes_it",
        &["python3"],
        a_shared_mapping_writes_it,
    ),
];

fn a_filesystem_can_be_made_on_it(rig: &Rig) {
    let format = rig.image.extension().unwrap().to_str().unwrap();
    let (image, size) = (rig.image.to_str().unwrap(), DISK.to_string());
    run("qemu-img", &["create", "-q", "-f", format, image, &size]);
    let mount = rig.mount();
    let files = rig.originals.files();
    let (files, disk) = (files.to_str().unwrap(), mount.disk.to_str().unwrap());
    run("mkfs.ext4", &["-q", "-F", "-d", files, disk]);
    run("e2fsck", &["-fn", disk]);
    mount.unmount();
    rig.check();
    let raw = rig.path("raw");
    let raw = raw.to_str().unwrap();
    run(
        "qemu-img",
        &["convert", "-f", format, "-O", "raw", image, raw],
    );
    run("e2fsck", &["-fn", raw]);
    let said = run("debugfs", &["-R", "ls -p /", raw]);
    assert!(said.contains("/file-299/"), "{said}");
}

/// Changes a file through a shared mapping: unaligned ranges at the start, in
/// the middle and at the end.
const MAP: &str = "
import mmap, sys
with open(sys.argv[1], 'r+b') as file:
    with mmap.mmap(file.fileno(), 0, mmap.MAP_SHARED) as disk:
        for start in (0, (20 << 20) + 1234, len(disk) - 300000):
            disk[start:start + 300000] = bytes(i * 7 % 251 for i in range(300000))
        disk.flush()
";

fn a_shared_mapping_writes_it(rig: &Rig) {
    let expected = rig.expected();
    let mount = rig.mount();
    for file in [&expected, &mount.disk] {
        run("python3", &[Path::new("-c"), Path::new(MAP), file]);
    }
    run("cmp", &[&expected, &mount.disk]);
    mount.unmount();
    rig.check();
    rig.compare(&expected);
}
