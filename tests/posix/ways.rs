//! The ways between the kernel and instar: raw images that the kernel reads and
//! writes by itself (passthrough), and its cache for what is written
//! (`-o writeback`). That the content is the same on each of them is proven by
//! the claims of other files, which run on all.

use crate::images::DISK;
use crate::locks::{Holder, qemu_writes};
use crate::rig::{INSTAR, Mount, Rig};
use crate::tools::{eventually, noise, run};
use crate::{Claim, PASSTHROUGH, claim};
use nix::fcntl::{FcntlArg, fcntl};
use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::{Command, Stdio};

/// What is proven here of a raw image.
pub const PASSED: &[Claim] = &[
    claim(
        "the_kernel_uses_it_by_itself_unless_told_not_to",
        &[PASSTHROUGH],
        the_kernel_uses_it_by_itself,
    ),
    claim(
        "without_the_right_to_passthrough_it_goes_the_ordinary_way",
        &["unshare"],
        without_the_right,
    )
    .in_one_sandbox(),
    claim(
        "what_outlives_a_close_gets_the_lock_back",
        &[PASSTHROUGH, "qemu-io"],
        what_outlives_a_close_gets_the_lock_back,
    )
    .in_one_sandbox(),
];

/// And of a qcow2 image whose writes the kernel gathers.
pub const GATHERED: &[Claim] = &[
    claim("writes_are_gathered", &[], writes_are_gathered),
    claim(
        "one_that_changed_while_it_was_closed_is_known_anew",
        &[],
        one_that_changed_is_known_anew,
    ),
    claim(
        "a_size_that_was_rounded_up_is_seen_after_the_close",
        &[],
        a_size_that_was_rounded_up,
    ),
    claim(
        "what_cannot_be_written_any_more_fails_the_fsync",
        &["qemu-io"],
        what_cannot_be_written_fails_the_fsync,
    ),
];

/// Why the kernel cannot use raw images by itself here, if that is so.
pub fn missing_passthrough() -> Option<String> {
    let output = Command::new(INSTAR)
        .args(["doctor", "--output=json"])
        .output()
        .ok()?;
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).ok()?;
    let checks = report["checks"].as_array()?;
    let check = checks.iter().find(|check| check["name"] == "passthrough")?;
    let found = check["found"].as_str()?;
    Some(format!("no passthrough: {found}"))
}

/// What a daemon has read and written so far, in bytes and in calls.
struct Traffic {
    bytes: u64,
    writes: u64,
}

impl Traffic {
    fn of(mount: &Mount) -> Self {
        let io = fs::read_to_string(format!("/proc/{}/io", mount.pid)).unwrap();
        let field = |name: &str| -> u64 {
            let line = io.lines().find_map(|line| line.strip_prefix(name)).unwrap();
            line.trim().parse().unwrap()
        };
        Self {
            bytes: field("rchar:") + field("wchar:"),
            writes: field("syscw:"),
        }
    }
}

/// Writes and reads some of the disk; answers how many bytes went through the
/// daemon.
fn bytes_through_the_daemon(rig: &Rig, options: &str, seed: u64) -> u64 {
    let bytes = noise(seed, 8 << 20);
    let mount = rig.mount_with(options);
    let before = Traffic::of(&mount).bytes;
    let disk = File::options().read(true).write(true).open(&mount.disk);
    let disk = disk.unwrap();
    disk.write_all_at(&bytes, 1 << 20).unwrap();
    disk.sync_all().unwrap();
    let mut seen = vec![0; bytes.len()];
    disk.read_exact_at(&mut seen, 1 << 20).unwrap();
    assert!(seen == bytes);
    drop(disk);
    let passed = Traffic::of(&mount).bytes - before;
    mount.unmount();
    let mut seen = vec![0; bytes.len()];
    let image = File::open(&rig.image).unwrap();
    image.read_exact_at(&mut seen, 1 << 20).unwrap();
    assert!(seen == bytes);
    passed
}

fn the_kernel_uses_it_by_itself(rig: &Rig) {
    const MIB: u64 = 1 << 20;
    let by_itself = bytes_through_the_daemon(rig, "", 1);
    // What the sandbox needs is part of it.
    assert!(by_itself < 4 * MIB, "{by_itself}");
    for (seed, options) in ["nopassthrough", "nogrow"].into_iter().enumerate() {
        let served = bytes_through_the_daemon(rig, options, 2 + seed as u64);
        assert!(served > 16 * MIB, "{options}: {served}");
    }
}

/// Root of a user namespace of its own may mount and may not open ways. What is
/// unmounted outside meanwhile goes there, too, where it can.
fn without_the_right(rig: &Rig) {
    let bytes = rig.path("bytes");
    fs::write(&bytes, noise(4, 1 << 20)).unwrap();
    let script = "set -e; instar=$1 at=$2 source=$3 bytes=$4 log=$5 sandbox=$6
        INSTAR_LOG=debug,fuser=off $instar --isolation $sandbox mount -o log=$log $source $at
        dd if=$bytes of=$at/disk.raw bs=64k seek=3 conv=notrunc status=none
        truncate -s +1M $at/disk.raw
        tail -c 1M $at/disk.raw | cmp -n 1048576 - /dev/zero
        $instar umount $at";
    let own = [
        "--user",
        "--map-root-user",
        "--mount",
        "--propagation=slave",
        "sh",
        "-c",
        script,
        "sh",
    ];
    let mut words: Vec<&Path> = own.map(Path::new).to_vec();
    let (at, source, log) = (rig.mountpoint(), rig.source(), rig.path("log"));
    words.extend([Path::new(INSTAR), &at, &source, &bytes, &log]);
    words.push(Path::new(rig.sandbox));
    run("unshare", &words);
    assert!(rig.log().contains("no passthrough: "), "{}", rig.log());
    let expected = rig.expected();
    let model = File::options().write(true).open(&expected).unwrap();
    model
        .write_all_at(&fs::read(&bytes).unwrap(), 3 << 16)
        .unwrap();
    model.set_len(DISK + (1 << 20)).unwrap();
    rig.compare(&expected);
}

fn what_outlives_a_close_gets_the_lock_back(rig: &Rig) {
    let mount = rig.mount();
    // A shell that writes, starts a process, which closes its copy of the
    // descriptor, and waits. A process of its own, since each that a test starts
    // does the same.
    let script = r#"exec 3<>"$0"; echo changed >&3; (:); echo; read -r line"#;
    let mut shell = Command::new("sh")
        .args(["-c", script])
        .arg(&mount.disk)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut out = shell.stdout.take().unwrap();
    out.read_exact(&mut [0]).unwrap();
    eventually("the lock is taken again", || is_locked(&rig.image));
    assert!(!qemu_writes(rig));
    shell.stdin.take().unwrap().write_all(b"go\n").unwrap();
    assert!(shell.wait().unwrap().success());
    assert!(qemu_writes(rig));
    mount.unmount();
}

/// Whether somebody has announced to use an image; nothing is announced here,
/// which could keep others out.
fn is_locked(image: &Path) -> bool {
    let file = File::options().read(true).write(true).open(image).unwrap();
    let mut lock = libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 100,
        l_len: 104,
        l_pid: 0,
    };
    fcntl(&file, FcntlArg::F_OFD_GETLK(&mut lock)).unwrap();
    lock.l_type != libc::F_UNLCK as libc::c_short
}

fn writes_are_gathered(rig: &Rig) {
    const PIECES: u64 = 1024;
    let mount = rig.mount();
    let disk = File::options().write(true).open(&mount.disk).unwrap();
    let before = Traffic::of(&mount).writes;
    for piece in 0..PIECES {
        disk.write_all_at(&noise(piece, 4096), piece * 4096)
            .unwrap();
    }
    disk.sync_all().unwrap();
    let writes = Traffic::of(&mount).writes - before;
    assert!(writes < PIECES / 4, "{writes}");
    drop(disk);
    mount.unmount();
    rig.check();
}

fn one_that_changed_is_known_anew(rig: &Rig) {
    let mount = rig.mount();
    assert_eq!(fs::metadata(&mount.disk).unwrap().len(), DISK);
    let disk = File::options().write(true).open(&mount.disk).unwrap();
    disk.write_all_at(&[1; 4096], 0).unwrap();
    drop(disk);
    let size = DISK + (1 << 20);
    let image = rig.image.to_str().unwrap();
    run("qemu-img", &["resize", "-q", "-f", "qcow2", image, "+1M"]);
    eventually("the new size is seen", || {
        fs::metadata(&mount.disk).unwrap().len() == size
    });
    let disk = File::options().read(true).write(true).open(&mount.disk);
    let disk = disk.unwrap();
    disk.write_all_at(&[2; 512], size - 512).unwrap();
    let mut seen = [0; 512];
    disk.read_exact_at(&mut seen, 0).unwrap();
    assert_eq!(seen, [1; 512]);
    drop(disk);
    mount.unmount();
    rig.check();
    assert_eq!(rig.virtual_size(), size);
}

fn a_size_that_was_rounded_up(rig: &Rig) {
    let mount = rig.mount();
    let disk = File::options().write(true).open(&mount.disk).unwrap();
    disk.write_all_at(&[5; 100], DISK).unwrap();
    drop(disk);
    eventually("the disk's size is seen", || {
        fs::metadata(&mount.disk).unwrap().len() == DISK + 512
    });
    let end = fs::read(&mount.disk).unwrap().split_off(DISK as usize);
    assert_eq!(end, [&[5; 100][..], &[0; 412]].concat());
    mount.unmount();
    rig.check();
    assert_eq!(rig.virtual_size(), DISK + 512);
}

fn what_cannot_be_written_fails_the_fsync(rig: &Rig) {
    let mount = rig.mount();
    let disk = File::options().write(true).open(&mount.disk).unwrap();
    disk.write_all_at(&[1; 4096], 0).unwrap();
    // A close of a copy: the image is clean, and free.
    drop(disk.try_clone().unwrap());
    let qemu = Holder::new(rig);
    disk.write_all_at(&[2; 4096], 0).unwrap();
    assert!(disk.sync_all().is_err());
    drop((disk, qemu));
    mount.unmount();
    rig.check();
    let image = rig.image.to_str().unwrap();
    let read = ["-r", "-f", "qcow2", "-c", "read -q -P 1 0 4k", image];
    run("qemu-io", &read);
}
