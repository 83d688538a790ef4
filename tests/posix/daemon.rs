//! Mounting, unmounting, and the life of the daemon.

use crate::rig::{INSTAR, Mount, Rig, is_running};
use crate::tools::{assert_dead, errno, eventually, fails, noise, run, xattr};
use crate::{Claim, claim};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::Read as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// What is proven here.
pub const CLAIMS: &[Claim] = &[
    claim(
        "umount_waits_for_the_daemon",
        &[],
        umount_waits_for_the_daemon,
    ),
    claim(
        "umount_refuses_while_in_use",
        &[],
        umount_refuses_while_in_use,
    ),
    claim(
        "umount_says_what_is_not_mounted",
        &[],
        umount_says_what_is_not_mounted,
    ),
    claim(
        "umount_cleans_a_dead_mount",
        &[],
        umount_cleans_a_dead_mount,
    ),
    claim(
        "sigterm_flushes_and_unmounts",
        &[],
        sigterm_flushes_and_unmounts,
    ),
    claim(
        "a_busy_mount_is_served_to_the_end",
        &[],
        a_busy_mount_is_served_to_the_end,
    ),
    claim(
        "a_second_signal_ends_it_at_once",
        &[],
        a_second_signal_ends_it_at_once,
    ),
    claim(
        "what_was_written_reaches_the_disk_by_itself",
        &[],
        it_reaches_the_disk_by_itself,
    ),
    claim(
        "the_foreground_logs_to_stderr",
        &[],
        the_foreground_logs_to_stderr,
    ),
    claim(
        "mistakes_are_told_before_anything_is_mounted",
        &[],
        mistakes_are_told,
    ),
    claim(
        "mount_helper_follows_mount_8",
        &[],
        mount_helper_follows_mount_8,
    ),
    claim(
        "the_kernel_lists_it_by_source_and_type",
        &[],
        the_kernel_lists_it,
    ),
];

fn umount_waits_for_the_daemon(rig: &Rig) {
    let mount = rig.mount();
    let pid = mount.pid;
    let disk = File::options().write(true).open(&mount.disk).unwrap();
    disk.write_all_at(&noise(1, 1 << 20), 0).unwrap();
    drop(disk);
    mount.unmount();
    assert!(!is_running(pid));
    assert!(rig.log().contains("is unmounted"), "{}", rig.log());
    rig.check();
}

fn umount_refuses_while_in_use(rig: &Rig) {
    let mount = rig.mount();
    let disk = File::open(&mount.disk).unwrap();
    let said = fails(1, INSTAR, &[Path::new("umount"), &mount.at]);
    assert!(said.contains("in use"), "{said}");
    assert_eq!(disk.read_at(&mut [0; 512], 0).unwrap(), 512);
    drop(disk);
    mount.unmount();
}

fn umount_says_what_is_not_mounted(rig: &Rig) {
    let said = fails(1, INSTAR, &[Path::new("umount"), &rig.mountpoint()]);
    assert!(said.contains("no images are mounted there"), "{said}");
    let said = fails(1, INSTAR, &["umount", "/proc"]);
    assert!(said.contains("no images are mounted there"), "{said}");
}

fn umount_cleans_a_dead_mount(rig: &Rig) {
    let mount = rig.mount();
    kill(mount.pid, Signal::SIGKILL).unwrap();
    eventually("the daemon is gone", || !mount.is_running());
    eventually("the mount is dead", || {
        fs::metadata(&mount.at).is_err_and(|error| error.raw_os_error() == Some(libc::ENOTCONN))
    });
    run(INSTAR, &[Path::new("umount"), &mount.at]);
    assert!(fs::metadata(&mount.at).unwrap().is_dir());
}

fn sigterm_flushes_and_unmounts(rig: &Rig) {
    let expected = rig.expected();
    let model = File::options().write(true).open(&expected).unwrap();
    let mount = rig.mount();
    let disk = File::options().write(true).open(&mount.disk).unwrap();
    disk.write_all_at(&noise(4, 50_000), 77).unwrap();
    model.write_all_at(&noise(4, 50_000), 77).unwrap();
    drop(disk);
    kill(mount.pid, Signal::SIGTERM).unwrap();
    eventually("the daemon has ended", || !mount.is_running());
    assert_eq!(fs::read_dir(&mount.at).unwrap().count(), 0);
    rig.check();
    rig.compare(&expected);
}

fn a_busy_mount_is_served_to_the_end(rig: &Rig) {
    let expected = rig.expected();
    let model = File::options().write(true).open(&expected).unwrap();
    let mount = rig.mount();
    let disk = File::options().write(true).open(&mount.disk).unwrap();
    kill(mount.pid, Signal::SIGTERM).unwrap();
    eventually("the mount is gone for new users", || {
        fs::read_dir(&mount.at).is_ok_and(|entries| entries.count() == 0)
    });
    disk.write_all_at(&noise(5, 50_000), 99).unwrap();
    model.write_all_at(&noise(5, 50_000), 99).unwrap();
    assert!(mount.is_running());
    drop(disk);
    eventually("the daemon has ended", || !mount.is_running());
    rig.check();
    rig.compare(&expected);
}

fn a_second_signal_ends_it_at_once(rig: &Rig) {
    let mount = rig.mount();
    let disk = File::open(&mount.disk).unwrap();
    kill(mount.pid, Signal::SIGTERM).unwrap();
    eventually("the mount is gone for new users", || {
        fs::read_dir(&mount.at).is_ok_and(|entries| entries.count() == 0)
    });
    kill(mount.pid, Signal::SIGINT).unwrap();
    eventually("the daemon has ended", || !mount.is_running());
    assert_dead(disk.read_at(&mut [0; 512], 0));
}

fn it_reaches_the_disk_by_itself(rig: &Rig) {
    let mount = rig.mount();
    let disk = File::options().write(true).open(&mount.disk).unwrap();
    let bytes = noise(6, 65_536);
    // Past everything that the original uses: a new cluster.
    disk.write_all_at(&bytes, 60 << 20).unwrap();
    eventually("the timer has flushed", || {
        let copy = rig.path("copy");
        let how = ["convert", "-U", "-f", "qcow2", "-O", "raw"];
        let paths = [rig.image.to_str().unwrap(), copy.to_str().unwrap()];
        run("qemu-img", &[&how[..], &paths[..]].concat());
        let mut seen = vec![0; bytes.len()];
        let file = File::open(copy).unwrap();
        file.read_exact_at(&mut seen, 60 << 20).unwrap();
        seen == bytes
    });
    drop(disk);
}

fn the_foreground_logs_to_stderr(rig: &Rig) {
    let mut daemon = Command::new(INSTAR)
        .args(["mount", "-f"])
        .args([rig.source(), rig.mountpoint()])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let at = rig.mountpoint();
    eventually("the mount answers", || {
        xattr(&at, "user.instar.pid").is_ok()
    });
    let mount = Mount::found(at, rig.variant.file);
    assert_eq!(
        mount.pid,
        Pid::from_raw(i32::try_from(daemon.id()).unwrap())
    );
    run("cmp", &[rig.originals.raw(), &mount.disk]);
    kill(mount.pid, Signal::SIGINT).unwrap();
    assert!(daemon.wait().unwrap().success());
    let mut said = String::new();
    daemon
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut said)
        .unwrap();
    assert!(said.contains("is mounted on"), "{said}");
    assert!(said.contains("is unmounted"), "{said}");
}

fn mistakes_are_told(rig: &Rig) {
    let (source, at) = (rig.source(), rig.mountpoint());
    let inside = source.join("inside");
    fs::create_dir(&inside).unwrap();
    let cases: [(&str, &Path, &Path, &str); 9] = [
        ("", Path::new("/nowhere"), &at, "/nowhere"),
        ("", &source, Path::new("/nowhere"), "/nowhere"),
        (
            "",
            Path::new("/dev/null"),
            &at,
            "neither a directory nor a regular file",
        ),
        ("", &source, &rig.image, "Not a directory"),
        ("", &source, &inside, "lies inside"),
        ("bogus", &source, &at, "unknown mount option 'bogus'"),
        ("format=x", &source, &at, "expected GLOB:FORMAT"),
        (
            "preallocation=all",
            &source,
            &at,
            "expected 'off', 'metadata'",
        ),
        ("log=/nowhere/log", &source, &at, "/nowhere/log"),
    ];
    for (options, source, at, reason) in cases {
        let mut words = rig.mount_command(options);
        words.extend([source.into(), at.into()]);
        let said = fails(1, INSTAR, &words);
        assert!(said.contains(reason), "{options}: {said}");
    }
    let mount = rig.mount();
    let mut words = rig.mount_command("");
    words.extend([source.into(), at.into()]);
    let said = fails(1, INSTAR, &words);
    assert!(said.contains("mounted there already"), "{said}");
    assert!(mount.is_running());
}

/// The helper, built beside the program: cargo does not do that for tests.
fn build_helper() -> PathBuf {
    let beside = Path::new(INSTAR).parent().unwrap();
    let target = beside.parent().unwrap();
    let mut words: Vec<&OsStr> = ["build", "-q", "-p", "mount-helper", "--target-dir"]
        .map(OsStr::new)
        .to_vec();
    words.push(target.as_os_str());
    if beside.ends_with("release") {
        words.push(OsStr::new("--release"));
    }
    run(env!("CARGO"), &words);
    beside.join("mount-instar")
}

fn mount_helper_follows_mount_8(rig: &Rig) {
    let helper = build_helper();
    let words = |options: &str| -> Vec<OsString> {
        vec![
            rig.source().into(),
            rig.mountpoint().into(),
            "-n".into(),
            "-o".into(),
            options.into(),
        ]
    };
    let program = helper.to_str().unwrap();
    run(
        program,
        &words("ro,nofail,x-systemd.automount,_netdev,noexec"),
    );
    let mount = Mount::found(rig.mountpoint(), rig.variant.file);
    let writing = File::options().write(true).open(&mount.disk);
    assert_eq!(errno(writing), Errno::EROFS);
    mount.unmount();
    let said = fails(32, program, &words("bogus"));
    assert!(said.contains("unknown mount option 'bogus'"), "{said}");
    fails(1, program, &["only-one"]);
    let mut dry = words("bogus");
    dry.push("-f".into());
    run(program, &dry);
}

fn the_kernel_lists_it(rig: &Rig) {
    let mount = rig.mount_with("noexec");
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let line = mounts
        .lines()
        .find(|line| line.contains(mount.at.to_str().unwrap()))
        .expect("the mount is listed");
    let fields: Vec<&str> = line.split(' ').collect();
    assert_eq!(fields[0], rig.source().to_str().unwrap());
    assert_eq!(fields[2], "fuse.instar");
    for option in ["rw", "nosuid", "nodev", "noexec", "default_permissions"] {
        assert!(fields[3].split(',').any(|word| word == option), "{line}");
    }
}
