//! Bad input and broken images: a clear error, and nothing else changes.

use crate::images::DISK;
use crate::rig::Rig;
use crate::tools::{assert_dead, errno, eventually, noise, run, xattr};
use crate::{Claim, claim};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::path::Path;

/// What is proven here, for the plainest image of each format.
pub const CLAIMS: &[Claim] = &[
    claim(
        "a_read_only_mount_refuses_changes",
        &[],
        a_read_only_mount_refuses_changes,
    ),
    claim(
        "a_damaged_neighbour_disturbs_nobody",
        &["truncate"],
        a_damaged_neighbour,
    ),
    claim(
        "a_backing_file_is_read_only",
        &[],
        a_backing_file_is_read_only,
    ),
    claim(
        "backing_none_refuses_overlays",
        &[],
        backing_none_refuses_overlays,
    ),
    claim(
        "a_backing_file_outside_the_tree_is_refused",
        &[],
        outside_the_tree,
    ),
    claim(
        "chmod_and_touch_reach_the_image",
        &["touch"],
        chmod_and_touch_reach_the_image,
    ),
    claim(
        "a_read_only_mount_keeps_its_names",
        &[],
        a_read_only_mount_keeps_its_names,
    ),
    claim(
        "a_killed_daemon_loses_nothing_that_was_synced",
        &[],
        a_killed_daemon,
    ),
];

/// And here, for one image of each format.
pub const USUAL: &[Claim] = &[
    claim(
        "an_image_damaged_while_mounted_disturbs_nobody",
        &[],
        an_image_damaged_while_mounted,
    ),
    claim(
        "a_backing_file_that_disappears_is_missed_by_name",
        &[],
        a_backing_file_that_disappears,
    ),
];

fn a_read_only_mount_refuses_changes(rig: &Rig) {
    let before = fs::read(&rig.image).unwrap();
    let mount = rig.mount_with("ro");
    let writing = File::options().write(true).open(&mount.disk);
    assert_eq!(errno(writing), Errno::EROFS);
    let chmod = fs::set_permissions(&mount.disk, fs::Permissions::from_mode(0o600));
    assert_eq!(errno(chmod), Errno::EROFS);
    run("cmp", &[rig.originals.raw(), &mount.disk]);
    mount.unmount();
    assert!(fs::read(&rig.image).unwrap() == before);
}

fn a_damaged_neighbour(rig: &Rig) {
    let broken = rig.source().join("broken.qcow2");
    let mut bytes = b"QFI\xfb\x00\x00\x00\x63".to_vec();
    bytes.resize(65_536, 0xff);
    fs::write(&broken, &bytes).unwrap();
    fs::write(rig.source().join("text.qcow2"), b"text").unwrap();
    let mount = rig.mount();
    for name in ["broken.qcow2", "text.qcow2"] {
        let shown = mount.at.join(name);
        assert_eq!(fs::metadata(&shown).unwrap().len(), 0, "{name}");
        assert_eq!(errno(File::open(&shown)), Errno::EIO, "{name}");
        let reason = xattr(&shown, "user.instar.error").unwrap();
        assert!(reason.contains(name), "{reason}");
        assert!(rig.log().contains(&reason), "{}", rig.log());
    }
    run("truncate", &[Path::new("-s+1M"), &mount.disk]);
    assert_eq!(fs::metadata(&mount.disk).unwrap().len(), DISK + (1 << 20));
    mount.unmount();
    assert!(fs::read(&broken).unwrap() == bytes);
    rig.check();
}

/// Puts an overlay over the rig's image beside it.
fn overlay(rig: &Rig, backing: &Path) {
    let format = rig.variant.format();
    let overlay = rig.source().join("overlay.qcow2");
    let how = ["create", "-q", "-f", "qcow2", "-F", format, "-b"];
    let paths = [backing.to_str().unwrap(), overlay.to_str().unwrap()];
    run("qemu-img", &[&how[..], &paths[..]].concat());
}

fn a_backing_file_is_read_only(rig: &Rig) {
    overlay(rig, Path::new(rig.variant.file));
    let mount = rig.mount();
    let writing = File::options().write(true).open(&mount.disk);
    assert_eq!(errno(writing), Errno::EROFS);
    run(
        "cmp",
        &[rig.originals.raw(), &mount.at.join("overlay.qcow2")],
    );
    mount.unmount();
    let mount = rig.mount_with("rw_backing");
    let disk = File::options().write(true).open(&mount.disk).unwrap();
    disk.set_len(DISK + (1 << 20)).unwrap();
    drop(disk);
    mount.unmount();
    rig.check();
}

fn backing_none_refuses_overlays(rig: &Rig) {
    overlay(rig, Path::new(rig.variant.file));
    let mount = rig.mount_with("backing=none");
    let shown = mount.at.join("overlay.qcow2");
    assert_eq!(errno(File::open(&shown)), Errno::EPERM);
    run("cmp", &[rig.originals.raw(), &mount.disk]);
}

fn outside_the_tree(rig: &Rig) {
    let secret = rig.path("secret");
    fs::copy(&rig.image, &secret).unwrap();
    overlay(rig, &secret);
    let mount = rig.mount();
    let shown = mount.at.join("overlay.qcow2");
    assert_eq!(errno(File::open(&shown)), Errno::EPERM);
    let reason = xattr(&shown, "user.instar.error").unwrap();
    assert!(reason.contains("secret"), "{reason}");
    mount.unmount();
    let elsewhere = rig.path("");
    let mount = rig.mount_with(&format!("allow_path={}", elsewhere.display()));
    run(
        "cmp",
        &[rig.originals.raw(), &mount.at.join("overlay.qcow2")],
    );
}

fn chmod_and_touch_reach_the_image(rig: &Rig) {
    let mount = rig.mount();
    fs::set_permissions(&mount.disk, fs::Permissions::from_mode(0o640)).unwrap();
    run("touch", &[Path::new("-d2001-02-03 04:05:06Z"), &mount.disk]);
    let metadata = fs::metadata(&rig.image).unwrap();
    assert_eq!(metadata.permissions().mode() & 0o7777, 0o640);
    let expected = std::time::UNIX_EPOCH + std::time::Duration::from_secs(981_173_106);
    assert_eq!(metadata.modified().unwrap(), expected);
}

fn a_read_only_mount_keeps_its_names(rig: &Rig) {
    let mount = rig.mount_with("ro");
    let new = mount.at.join("new.qcow2");
    assert_eq!(errno(File::create(&new)), Errno::EROFS);
    assert_eq!(errno(fs::rename(&mount.disk, &new)), Errno::EROFS);
    assert_eq!(errno(fs::remove_file(&mount.disk)), Errno::EROFS);
    assert_eq!(errno(fs::create_dir(&new)), Errno::EROFS);
    assert_eq!(errno(fs::hard_link(&mount.disk, &new)), Errno::EROFS);
    assert_eq!(errno(std::os::unix::fs::symlink("x", &new)), Errno::EROFS);
    assert!(rig.image.exists());
    mount.unmount();
    rig.compare(rig.originals.raw());
}

/// All that the file holds, data and metadata, is overwritten below while the
/// image is open: whatever its reader gets, the others and the daemon go on.
fn an_image_damaged_while_mounted(rig: &Rig) {
    let extension = rig.image.extension().unwrap().to_str().unwrap();
    let victim = rig.source().join(format!("victim.{extension}"));
    fs::copy(&rig.image, &victim).unwrap();
    let mount = rig.mount();
    let shown = mount.at.join(victim.file_name().unwrap());
    let disk = File::options().read(true).write(true).open(&shown).unwrap();
    let mut start = vec![0; 64 << 10];
    disk.read_exact_at(&mut start, 0).unwrap();
    let sound = fs::read(&victim).unwrap();
    let below = File::options().write(true).open(&victim).unwrap();
    below
        .write_all_at(&noise(9, sound.len().min(16 << 20)), 0)
        .unwrap();
    for at in (0..DISK).step_by(1 << 20) {
        match disk.read_at(&mut start, at) {
            Ok(len) => assert_eq!(len, start.len()),
            error => assert_eq!(errno(error), Errno::EIO),
        }
    }
    for change in [disk.write_all_at(&start, 60 << 20), disk.sync_all()] {
        if change.is_err() {
            // The second where the image had been unlocked and is locked again.
            let errno = errno(change);
            assert!([Errno::EIO, Errno::ESTALE].contains(&errno), "{errno}");
        }
    }
    drop(disk);
    if extension != "raw" {
        eventually("the damage is seen", || {
            File::open(&shown).is_err_and(|error| error.raw_os_error() == Some(libc::EIO))
        });
        let reason = xattr(&shown, "user.instar.error").unwrap();
        assert!(reason.contains("victim"), "{reason}");
    }
    run("cmp", &[rig.originals.raw(), &mount.disk]);
    below.set_len(0).unwrap();
    below.write_all_at(&sound, 0).unwrap();
    eventually("the image is sound again", || {
        File::open(&shown).is_ok_and(|disk| {
            let mut seen = vec![0; 64 << 10];
            disk.read_exact_at(&mut seen, 0).is_ok()
        })
    });
    mount.unmount();
    rig.check();
    rig.compare(rig.originals.raw());
}

fn a_backing_file_that_disappears(rig: &Rig) {
    overlay(rig, Path::new(rig.variant.file));
    let other = format!("other.{}", rig.variant.file);
    fs::copy(&rig.image, rig.source().join(&other)).unwrap();
    let mount = rig.mount();
    let shown = mount.at.join("overlay.qcow2");
    let disk = File::open(&shown).unwrap();
    let away = rig.path("away");
    fs::rename(&rig.image, &away).unwrap();
    // Who has it open goes on with it, unless the image was closed meanwhile.
    let disk_before = fs::read(rig.originals.raw()).unwrap();
    let mut seen = vec![0; DISK as usize];
    match disk.read_exact_at(&mut seen, 0) {
        Ok(()) => assert!(seen == disk_before),
        error => assert_eq!(errno(error), Errno::EIO),
    }
    drop(disk);
    eventually("it is missed", || {
        File::open(&shown).is_err_and(|error| error.raw_os_error() == Some(libc::EIO))
    });
    let reason = xattr(&shown, "user.instar.error").unwrap();
    assert!(reason.contains(rig.variant.file), "{reason}");
    run("cmp", &[rig.originals.raw(), &mount.at.join(&other)]);
    fs::rename(&away, &rig.image).unwrap();
    eventually("it is found again", || {
        fs::read(&shown).is_ok_and(|now| now == disk_before)
    });
}

fn a_killed_daemon(rig: &Rig) {
    let expected = rig.expected();
    let model = File::options().write(true).open(&expected).unwrap();
    let mount = rig.mount();
    let disk = File::options().write(true).open(&mount.disk).unwrap();
    let bytes = noise(3, 200_000);
    disk.write_all_at(&bytes, 10 << 20).unwrap();
    model.write_all_at(&bytes, 10 << 20).unwrap();
    disk.sync_all().unwrap();
    kill(mount.pid, Signal::SIGKILL).unwrap();
    eventually("the daemon is gone", || !mount.is_running());
    match rig.variant.is_passed_through() {
        // The kernel can write without the daemon, and make nothing durable.
        true => assert_dead(disk.sync_all()),
        false => assert_dead(disk.write_all_at(&[0; 512], 0)),
    }
    drop((disk, mount));
    rig.compare(&expected);
    // The mountpoint that it left is cleaned by the next mount.
    assert_dead(fs::metadata(rig.mountpoint()));
    let mount = rig.mount();
    run("cmp", &[&expected, &mount.disk]);
    mount.unmount();
    rig.check();
}
