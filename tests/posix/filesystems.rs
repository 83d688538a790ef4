//! A whole life of a disk: a filesystem is made on it, mounted, filled, grown
//! with the disk while it is mounted, and everything is still there.

use crate::rig::Rig;
use crate::tools::{LoopDevice, Mounted, noise, run};
use crate::{Claim, ROOT, claim};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use tempfile::TempDir;

/// What is proven here, for every variant of image but those of qcow2.
pub const CLAIMS: &[Claim] = &[claim(
    "ext4_lives_on_it_and_grows",
    &[
        ROOT,
        "/dev/loop-control",
        "losetup",
        "tar",
        "resize2fs",
        "e2fsck",
    ],
    |rig| lives_on(rig, &EXT4),
)
.in_one_sandbox()];

/// And here, for one image of each format.
pub const USUAL: &[Claim] = &[claim(
    "xfs_lives_on_it_and_grows",
    &[
        ROOT,
        "/dev/loop-control",
        "losetup",
        "tar",
        "mkfs.xfs",
        "xfs_growfs",
        "xfs_repair",
    ],
    |rig| lives_on(rig, &XFS),
)
.in_one_sandbox()];

/// The least that XFS accepts, and a little.
const SIZE: u64 = 320 << 20;
const GROWTH: &str = "-s+1G";
/// Copies of 32 MiB that are written after it has grown: more than there was room
/// for before.
const COPIES: usize = 10;
/// Files of the tree.
const FILES: usize = 3_000;

/// The programs of a filesystem.
struct Programs {
    make: &'static [&'static str],
    grow: &'static str,
    /// Whether we may grow it while it is mounted.
    online: fn() -> bool,
    /// Whether that takes the mountpoint and not the device.
    by_mountpoint: bool,
    check: &'static [&'static str],
}

const EXT4: Programs = Programs {
    make: &["mkfs.ext4", "-q", "-F"],
    grow: "resize2fs",
    online: may_override_reserves,
    by_mountpoint: false,
    check: &["e2fsck", "-fn"],
};
const XFS: Programs = Programs {
    make: &["mkfs.xfs", "-q", "-f"],
    grow: "xfs_growfs",
    online: || true,
    by_mountpoint: true,
    check: &["xfs_repair", "-n"],
};

/// What a mounted ext4 asks of whoever grows it: `CAP_SYS_RESOURCE`, which root
/// in a container may not have.
fn may_override_reserves() -> bool {
    const SYS_RESOURCE: u32 = 24;
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let effective = u64::from_str_radix(effective.unwrap().trim(), 16).unwrap();
    effective & (1 << SYS_RESOURCE) != 0
}

fn with(command: &[&str], path: &Path) {
    let mut words: Vec<&Path> = command[1..].iter().map(Path::new).collect();
    words.push(path);
    run(command[0], &words);
}

/// A tree of files, and the archive of it, once per run.
fn tree() -> (PathBuf, PathBuf) {
    static TREE: OnceLock<TempDir> = OnceLock::new();
    let dir = TREE.get_or_init(|| {
        let dir = tempfile::tempdir().unwrap();
        for number in 0..FILES {
            let below = dir.path().join(format!("tree/{:02}", number % 40));
            fs::create_dir_all(&below).unwrap();
            let bytes = noise(number as u64, number * 7919 % 30_000);
            fs::write(below.join(format!("{number}")), bytes).unwrap();
        }
        let (root, archive) = (dir.path(), dir.path().join("tree.tar"));
        run(
            "tar",
            &[
                Path::new("-C"),
                root,
                Path::new("-cf"),
                &archive,
                Path::new("tree"),
            ],
        );
        dir
    });
    (dir.path().join("tree"), dir.path().join("tree.tar"))
}

fn lives_on(rig: &Rig, programs: &Programs) {
    let (tree, archive) = tree();
    empty_image(rig);
    let mount = rig.mount();
    with(programs.make, &mount.disk);
    let device = LoopDevice::attach(&mount.disk);
    let inner = Mounted::new(&device.0, rig.path("inner"));
    run(
        "tar",
        &[Path::new("-C"), &inner.0, Path::new("-xf"), &archive],
    );
    run("truncate", &[Path::new(GROWTH), &mount.disk]);
    run("losetup", &[Path::new("-c"), &device.0]);
    assert_eq!(device.size(), SIZE + (1 << 30));
    let inner = match (programs.online)() {
        true => {
            let by = match programs.by_mountpoint {
                true => &inner.0,
                false => &device.0,
            };
            run(programs.grow, &[by]);
            inner
        }
        false => {
            inner.unmount();
            run("e2fsck", &[Path::new("-fp"), &device.0]);
            run(programs.grow, &[&device.0]);
            Mounted::new(&device.0, rig.path("inner"))
        }
    };
    let more = noise(5, 32 << 20);
    for copy in 0..COPIES {
        fs::write(inner.0.join(format!("more-{copy}")), &more).unwrap();
    }
    inner.unmount();
    let inner = Mounted::new(&device.0, rig.path("inner"));
    run("diff", &[Path::new("-r"), &tree, &inner.0.join("tree")]);
    for copy in 0..COPIES {
        assert!(fs::read(inner.0.join(format!("more-{copy}"))).unwrap() == more);
    }
    inner.unmount();
    device.detach();
    with(programs.check, &mount.disk);
    let copy = rig.path("copy");
    run("cp", &[Path::new("--sparse=always"), &mount.disk, &copy]);
    mount.unmount();
    rig.check();
    let (image, raw) = (&rig.image, rig.path("raw"));
    let how = ["convert", "-f", rig.variant.format(), "-O", "raw"].map(Path::new);
    run("qemu-img", &[&how[..], &[image, &raw]].concat());
    run("cmp", &[copy, raw]);
}

/// Puts an image of an empty disk in the place of the rig's.
fn empty_image(rig: &Rig) {
    for entry in fs::read_dir(rig.source()).unwrap() {
        fs::remove_file(entry.unwrap().path()).unwrap();
    }
    let empty = rig.path("empty");
    File::create(&empty).unwrap().set_len(SIZE).unwrap();
    rig.variant.convert(&empty, &rig.image);
}
