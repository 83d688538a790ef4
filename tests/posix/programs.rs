//! Programs that use the mounted file in their own ways.

use crate::images::DISK;
use crate::rig::Rig;
use crate::tools::{noise, run};
use crate::{Claim, claim};
use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
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

/// And here, for one image of each format.
pub const USUAL: &[Claim] = &[
    claim(
        "fio_verifies_what_it_wrote",
        &["fio"],
        fio_verifies_what_it_wrote,
    )
    .in_one_sandbox(),
    claim(
        "dd_and_rsync_change_it_in_place",
        &["dd", "rsync"],
        dd_and_rsync_change_it_in_place,
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

/// Random writes of many sizes, several at a time, buffered and direct, each with
/// a checksum that is verified by reading it again.
fn fio_verifies_what_it_wrote(rig: &Rig) {
    let mount = rig.mount();
    let file = format!("--filename={}", mount.disk.display());
    for direct in ["--direct=0", "--direct=1"] {
        let how = "--name=verify --rw=randwrite --bsrange=4k-128k --size=16m --offset=8m \
                   --ioengine=psync --numjobs=1 --verify=crc32c --do_verify=1 --verify_fatal=1 \
                   --fsync=32 --allow_file_create=0 --verify_state_save=0";
        let mut words: Vec<&str> = how.split_whitespace().collect();
        words.extend([file.as_str(), direct]);
        run("fio", &words);
    }
    let copy = rig.path("copy");
    run("cp", &[&mount.disk, &copy]);
    mount.unmount();
    rig.check();
    rig.compare(&copy);
}

fn dd_and_rsync_change_it_in_place(rig: &Rig) {
    let expected = rig.expected();
    let piece = rig.path("piece");
    fs::write(&piece, noise(8, 3 << 20)).unwrap();
    let mount = rig.mount();
    for file in [&expected, &mount.disk] {
        let (from, to) = (piece.display(), file.display());
        let words = format!("if={from} of={to} bs=64k seek=77 conv=notrunc,fsync status=none");
        run("dd", &words.split(' ').collect::<Vec<_>>());
    }
    run("cmp", &[&expected, &mount.disk]);
    let file = File::options().write(true).open(&expected).unwrap();
    for place in 0..20 {
        file.write_all_at(&noise(place, 5000), place * 3_000_017)
            .unwrap();
    }
    let how = ["--inplace", "--no-whole-file", "--ignore-times"].map(Path::new);
    run("rsync", &[&how[..], &[&expected, &mount.disk]].concat());
    run("cmp", &[&expected, &mount.disk]);
    mount.unmount();
    rig.check();
    rig.compare(&expected);
}
