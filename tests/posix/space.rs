//! A disk below SOURCE that is full.

use crate::images::DISK;
use crate::kill::sound_but_for_leaks;
use crate::rig::{Mount, Rig};
use crate::tools::{LoopDevice, Mounted, errno, fallocate, noise, run};
use crate::{Claim, ROOT, claim};
use nix::errno::Errno;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

const NEEDS: &[&str] = &[ROOT, "/dev/loop-control", "losetup", "mount"];

/// What is proven here, for one image of each format.
pub const CLAIMS: &[Claim] = &[
    claim(
        "a_full_disk_refuses_a_grow_and_changes_nothing",
        NEEDS,
        a_full_disk_refuses_a_grow,
    ),
    claim(
        "a_full_disk_refuses_writes_and_keeps_what_was_synced",
        NEEDS,
        a_full_disk_refuses_writes,
    ),
];

/// Size of the small filesystem, less than that of the disks in it, in bytes.
const SMALL: u64 = 24 << 20;
/// Bytes written and synced at a time.
const CHUNK: usize = 1 << 20;

/// A small filesystem with two new images, mounted.
struct Small {
    mount: Mount,
    /// The image that is used up to the last byte.
    image: PathBuf,
    /// The disk of the other image.
    neighbour: PathBuf,
    _filesystem: Mounted,
    _device: LoopDevice,
}

impl Small {
    fn new(rig: &Rig, options: &str) -> Self {
        let file = rig.path("filesystem");
        File::create(&file).unwrap().set_len(SMALL).unwrap();
        let how = ["-q", "-O", "^has_journal", file.to_str().unwrap()];
        run("mkfs.ext4", &how);
        let device = LoopDevice::attach(&file);
        let filesystem = Mounted::new(&device.0, rig.path("small"));
        let image = filesystem.0.join(rig.variant.file);
        let other = format!("neighbour.{}", rig.variant.file);
        let empty = rig.path("empty");
        File::create(&empty).unwrap().set_len(DISK).unwrap();
        for path in [&image, &filesystem.0.join(&other)] {
            rig.variant.convert(&empty, path);
        }
        let mount = rig.mount_source(&filesystem.0, options);
        let neighbour = mount.at.join(other);
        write(&neighbour, &noise(1, CHUNK), 0).unwrap();
        Self {
            mount,
            image,
            neighbour,
            _filesystem: filesystem,
            _device: device,
        }
    }

    /// The other image reads as it should and takes what needs no space.
    #[track_caller]
    fn neighbour_works(&self) {
        for seed in [1, 2, 1] {
            write(&self.neighbour, &noise(seed, CHUNK), 0).unwrap();
            let mut seen = vec![0; CHUNK];
            let disk = File::open(&self.neighbour).unwrap();
            disk.read_exact_at(&mut seen, 0).unwrap();
            assert!(seen == noise(seed, CHUNK));
        }
    }
}

/// Writes and syncs.
fn write(path: &Path, bytes: &[u8], offset: u64) -> io::Result<()> {
    let disk = File::options().write(true).open(path)?;
    disk.write_all_at(bytes, offset)?;
    disk.sync_all()
}

fn a_full_disk_refuses_a_grow(rig: &Rig) {
    let small = Small::new(rig, "preallocation=falloc");
    write(&small.mount.disk, &noise(3, CHUNK), 0).unwrap();
    let before = fs::read(&small.image).unwrap();
    let disk = File::options().write(true).open(&small.mount.disk).unwrap();
    assert_eq!(errno(disk.set_len(DISK + (256 << 20))), Errno::ENOSPC);
    assert_eq!(errno(fallocate(&disk, 0, DISK, 256 << 20)), Errno::ENOSPC);
    assert_eq!(disk.metadata().unwrap().len(), DISK);
    drop(disk);
    assert!(fs::read(&small.image).unwrap() == before);
    small.neighbour_works();
    // What was reserved for the refused wishes is free again.
    let growth = 8 << 20;
    for path in [&small.mount.disk, &small.neighbour] {
        let disk = File::options().write(true).open(path).unwrap();
        disk.set_len(DISK + growth).unwrap();
        assert_eq!(disk.metadata().unwrap().len(), DISK + growth);
    }
    let image = small.image.clone();
    small.mount.unmount();
    sound_but_for_leaks(&rig.with_image(image));
}

fn a_full_disk_refuses_writes(rig: &Rig) {
    let small = Small::new(rig, "");
    let chunk = |number: u64| noise(number + 10, CHUNK);
    let mut synced = 0;
    let error = loop {
        assert!(synced < SMALL / CHUNK as u64, "all of it fits");
        match write(&small.mount.disk, &chunk(synced), synced * CHUNK as u64) {
            Ok(()) => synced += 1,
            error => break error,
        }
    };
    assert_eq!(errno(error), Errno::ENOSPC);
    assert!(synced > 0);
    small.neighbour_works();
    small.mount.unmount();
    sound_but_for_leaks(&rig.with_image(small.image.clone()));
    let raw = rig.path("raw");
    let (image, out) = (small.image.to_str().unwrap(), raw.to_str().unwrap());
    run(
        "qemu-img",
        &[
            "convert",
            "-f",
            rig.variant.format(),
            "-O",
            "raw",
            image,
            out,
        ],
    );
    let raw = File::open(raw).unwrap();
    assert_eq!(raw.metadata().unwrap().len(), DISK);
    for number in 0..synced {
        let mut seen = vec![0; CHUNK];
        raw.read_exact_at(&mut seen, number * CHUNK as u64).unwrap();
        assert!(seen == chunk(number), "chunk {number} of {synced}");
    }
}
