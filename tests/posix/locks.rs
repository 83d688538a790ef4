//! Living together with QEMU.

use crate::images::DISK;
use crate::rig::Rig;
use crate::tools::{LoopDevice, errno, eventually, noise, run, xattr};
use crate::{Claim, claim};
use nix::errno::Errno;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::thread;

/// What is proven here, for the plainest image of each format.
pub const CLAIMS: &[Claim] = &[
    claim(
        "is_busy_while_qemu_writes_it",
        &["qemu-io"],
        is_busy_while_qemu_writes_it,
    ),
    claim(
        "keeps_qemu_out_while_it_is_open",
        &["qemu-io"],
        keeps_qemu_out_while_it_is_open,
    ),
    claim(
        "is_free_the_moment_it_is_closed",
        &["qemu-io"],
        is_free_the_moment_it_is_closed,
    ),
    claim(
        "its_users_never_lock_each_other_out",
        &[],
        its_users_never_lock_each_other_out,
    ),
    claim("stat_needs_no_lock", &["qemu-io"], stat_needs_no_lock),
    claim(
        "a_loop_device_writes_after_its_opener_closed",
        &["/dev/loop-control", "losetup"],
        a_loop_device_writes_after_its_opener_closed,
    ),
    claim(
        "a_writer_notices_that_the_image_changed",
        &["qemu-io"],
        a_writer_notices_that_the_image_changed,
    ),
    claim(
        "a_touch_is_no_change_of_the_image",
        &["touch"],
        a_touch_is_no_change_of_the_image,
    ),
];

/// `qemu-io` holding the image open for writing.
struct Holder {
    process: Child,
    _commands: ChildStdin,
}

impl Holder {
    fn new(rig: &Rig) -> Self {
        let mut process = Command::new("qemu-io")
            .arg("-f")
            .arg(rig.image.extension().unwrap())
            .arg(&rig.image)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let commands = process.stdin.take().unwrap();
        // It asks for commands once it has the lock.
        let mut prompt = [0; 8];
        let mut out = process.stdout.take().unwrap();
        out.read_exact(&mut prompt).unwrap();
        assert_eq!(&prompt, b"qemu-io>");
        Self {
            process,
            _commands: commands,
        }
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// `dd` in the middle of writing a disk. A process of its own: whoever starts
/// another one closes copies of its descriptors, which for the kernel is a
/// close, and the tests all start processes.
pub struct Writer {
    process: Child,
    input: ChildStdin,
}

impl Writer {
    /// Writes one block of ones at the start, and waits for more.
    pub fn hold(disk: &Path) -> Self {
        let mut process = Command::new("dd")
            .arg(format!("of={}", disk.display()))
            .args(["bs=4096", "conv=notrunc", "iflag=fullblock", "status=none"])
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        let mut input = process.stdin.take().unwrap();
        input.write_all(&[1; 4096]).unwrap();
        eventually("dd has written", || {
            let mut seen = [0; 4096];
            let file = File::open(disk).unwrap();
            file.read_exact_at(&mut seen, 0).unwrap();
            seen == [1; 4096]
        });
        Self { process, input }
    }

    /// Has it close the disk and end.
    fn end(mut self) {
        drop(self.input);
        assert!(self.process.wait().unwrap().success());
    }
}

/// Has qemu-io write a pattern at the start of the image; whether it could.
fn qemu_writes(rig: &Rig) -> bool {
    Command::new("timeout")
        .args(["60", "qemu-io", "-f"])
        .arg(rig.image.extension().unwrap())
        .args(["-c", "write -q -P 0x5a 0 4k"])
        .arg(&rig.image)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .unwrap()
        .success()
}

fn is_busy_while_qemu_writes_it(rig: &Rig) {
    let mount = rig.mount();
    let qemu = Holder::new(rig);
    let writing = File::options().write(true).open(&mount.disk);
    assert_eq!(errno(writing), Errno::EBUSY);
    let reason = xattr(&mount.disk, "user.instar.error").unwrap();
    assert!(reason.contains("lock"), "{reason}");
    assert!(rig.log().contains(&reason), "{}", rig.log());
    drop(qemu);
    File::options().write(true).open(&mount.disk).unwrap();
    assert_eq!(
        errno(xattr(&mount.disk, "user.instar.error")),
        Errno::ENODATA
    );
}

fn keeps_qemu_out_while_it_is_open(rig: &Rig) {
    let mount = rig.mount();
    let writer = Writer::hold(&mount.disk);
    assert!(!qemu_writes(rig));
    writer.end();
    assert!(qemu_writes(rig));
}

fn is_free_the_moment_it_is_closed(rig: &Rig) {
    let mount = rig.mount();
    for round in 0..20 {
        let disk = File::options()
            .read(true)
            .write(true)
            .open(&mount.disk)
            .unwrap();
        disk.write_all_at(&noise(round, 8192), 1 << 20).unwrap();
        drop(disk);
        assert!(qemu_writes(rig), "round {round}");
        let mut seen = [0; 4096];
        let disk = File::open(&mount.disk).unwrap();
        disk.read_exact_at(&mut seen, 0).unwrap();
        assert_eq!(seen, [0x5a; 4096]);
        drop(disk);
        assert!(qemu_writes(rig), "after reading, round {round}");
    }
}

fn its_users_never_lock_each_other_out(rig: &Rig) {
    const ROUNDS: u64 = 40;
    let mount = rig.mount();
    let path = &mount.disk;
    thread::scope(|scope| {
        for writer in 0..3 {
            scope.spawn(move || {
                for round in 0..ROUNDS {
                    let disk = File::options().write(true).open(path).unwrap();
                    let at = (writer * ROUNDS + round) * 512;
                    disk.write_all_at(&[u8::try_from(writer).unwrap() + 1; 512], at)
                        .unwrap();
                }
            });
        }
        scope.spawn(move || {
            for round in 1..=ROUNDS {
                let size = i64::try_from(DISK + round * 4096).unwrap();
                nix::unistd::truncate(path, size).unwrap();
            }
        });
        scope.spawn(move || {
            for _ in 0..ROUNDS {
                let disk = File::open(path).unwrap();
                disk.read_exact_at(&mut [0; 512], DISK - 512).unwrap();
            }
        });
    });
    let disk = File::open(path).unwrap();
    for writer in 0..3 {
        let mut seen = vec![0; usize::try_from(ROUNDS).unwrap() * 512];
        disk.read_exact_at(&mut seen, writer * ROUNDS * 512)
            .unwrap();
        let mark = u8::try_from(writer).unwrap() + 1;
        assert!(seen.iter().all(|&byte| byte == mark));
    }
    drop(disk);
    mount.unmount();
    rig.check();
    assert_eq!(rig.virtual_size(), DISK + ROUNDS * 4096);
}

fn stat_needs_no_lock(rig: &Rig) {
    let qemu = Holder::new(rig);
    let mount = rig.mount();
    assert_eq!(std::fs::metadata(&mount.disk).unwrap().len(), DISK);
    drop(qemu);
}

fn a_loop_device_writes_after_its_opener_closed(rig: &Rig) {
    let mount = rig.mount();
    let device = LoopDevice::attach(&mount.disk);
    let bytes = noise(2, 8192);
    let block = File::options().write(true).open(&device.0).unwrap();
    block.write_all_at(&bytes, 8192).unwrap();
    block.sync_all().unwrap();
    let mut seen = vec![0; bytes.len()];
    let disk = File::open(&mount.disk).unwrap();
    disk.read_exact_at(&mut seen, 8192).unwrap();
    assert!(seen == bytes);
    drop((block, disk));
    device.detach();
    // The kernel tells nobody when a loop device lets go; the daemon notices.
    eventually("the image is free", || qemu_writes(rig));
    mount.unmount();
    rig.check();
}

fn a_writer_notices_that_the_image_changed(rig: &Rig) {
    let mount = rig.mount();
    let disk = File::options().write(true).open(&mount.disk).unwrap();
    disk.write_all_at(&[1; 512], 0).unwrap();
    // A descriptor is closed, and another one of the same file stays: what
    // fork, dup and losetup do.
    drop(disk.try_clone().unwrap());
    disk.write_all_at(&[2; 512], 512).unwrap();
    drop(disk.try_clone().unwrap());
    assert!(qemu_writes(rig));
    assert_eq!(errno(disk.write_all_at(&[3; 512], 512)), Errno::ESTALE);
    let again = File::options().write(true).open(&mount.disk).unwrap();
    again.write_all_at(&[4; 512], 4096).unwrap();
    drop((disk, again));
    mount.unmount();
    rig.check();
    let format = rig.image.extension().unwrap().to_str().unwrap();
    let image = rig.image.to_str().unwrap();
    let reads = ["-c", "read -q -P 0x5a 0 4k", "-c", "read -q -P 4 4k 512"];
    run(
        "qemu-io",
        &[&["-r", "-f", format][..], &reads[..], &[image][..]].concat(),
    );
}

fn a_touch_is_no_change_of_the_image(rig: &Rig) {
    let mount = rig.mount();
    let disk = File::options().write(true).open(&mount.disk).unwrap();
    disk.write_all_at(&[1; 512], 0).unwrap();
    drop(disk.try_clone().unwrap());
    run("touch", &["-d2001-02-03", mount.disk.to_str().unwrap()]);
    disk.write_all_at(&[2; 512], 512).unwrap();
    drop(disk);
    mount.unmount();
    rig.check();
}
