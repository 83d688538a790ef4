//! Names made, changed and removed through the mount.

use crate::images::DISK;
use crate::rig::{INSTAR, Mount, Rig};
use crate::tools::{errno, fallocate, noise, run, xattr};
use crate::{Claim, ROOT, claim};
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

/// What is proven here, for an image of every format.
pub const CLAIMS: &[Claim] = &[
    claim(
        "a_removed_image_stays_with_its_handles",
        &[],
        a_removed_image_stays_with_its_handles,
    )
    .in_one_sandbox(),
    claim(
        "a_renamed_image_stays_with_its_handles",
        &[],
        a_renamed_image_stays_with_its_handles,
    )
    .in_one_sandbox(),
    claim(
        "an_image_moves_to_another_directory_or_stays",
        &[],
        an_image_moves_to_another_directory,
    )
    .in_one_sandbox(),
    claim(
        "a_name_of_another_format_is_refused",
        &[],
        a_name_of_another_format_is_refused,
    )
    .in_one_sandbox(),
    claim(
        "an_image_takes_the_place_of_another",
        &[],
        an_image_takes_the_place_of_another,
    )
    .in_one_sandbox(),
    claim(
        "a_new_file_becomes_an_image_with_its_first_size",
        &["truncate"],
        a_new_file_becomes_an_image,
    ),
    claim(
        "an_emptied_image_becomes_a_fresh_one",
        &["truncate"],
        an_emptied_image_becomes_a_fresh_one,
    ),
];

/// What is proven of images that can be written.
pub const WRITTEN: &[Claim] = &[
    claim("a_copy_is_converted", &["cp"], a_copy_is_converted),
    claim(
        "a_new_file_is_allocated_by_fallocate",
        &[],
        a_new_file_is_allocated,
    ),
];

/// What is proven once.
pub const ONCE: &[Claim] = &[
    claim("directories_come_and_go", &[], directories_come_and_go),
    claim(
        "rename_replaces_only_where_it_may",
        &[],
        rename_replaces_only_where_it_may,
    ),
    claim("what_is_not_shown_stays", &[], what_is_not_shown_stays),
    claim(
        "a_backing_image_keeps_its_name",
        &["qemu-img"],
        a_backing_image_keeps_its_name,
    ),
    claim(
        "a_data_file_stays_when_its_image_goes",
        &["qemu-img"],
        a_data_file_stays,
    ),
    claim(
        "an_extent_that_another_image_uses_stays",
        &[],
        an_extent_of_another_stays,
    ),
    claim(
        "a_new_file_belongs_to_whoever_makes_it",
        &[ROOT, "setpriv"],
        a_new_file_belongs_to_its_maker,
    ),
    claim(
        "a_new_file_may_be_one_that_nobody_may_write",
        &[ROOT, "setpriv", "cp"],
        a_new_file_may_be_read_only,
    ),
    claim(
        "one_image_alone_keeps_its_name",
        &[],
        one_image_alone_keeps_its_name,
    ),
];

/// Names in a directory, sorted.
fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).unwrap();
    let mut names: Vec<_> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// The rig's image with another name.
fn named(rig: &Rig, stem: &str) -> String {
    let extension = Path::new(rig.variant.file).extension().unwrap();
    format!("{stem}.{}", extension.to_str().unwrap())
}

/// A handle that may write, and does where the image can be written.
fn writer(disk: &Path) -> (File, bool) {
    let file = File::options().read(true).write(true).open(disk).unwrap();
    let written = file.write_all_at(b"through an open handle", 4096);
    let is_written = written.is_ok();
    if !is_written {
        assert_eq!(errno(written), Errno::EOPNOTSUPP);
    }
    (file, is_written)
}

#[track_caller]
fn holds_the_disk(rig: &Rig, file: &File, is_written: bool) {
    let mut expected = fs::read(rig.originals.raw()).unwrap();
    if is_written {
        let text = b"through an open handle";
        expected[4096..4096 + text.len()].copy_from_slice(text);
    }
    let mut found = vec![0; expected.len()];
    file.read_exact_at(&mut found, 0).unwrap();
    assert!(found == expected, "the disk has changed");
}

/// Whether the image consists of one file that names no other.
fn is_alone(rig: &Rig) -> bool {
    names(&rig.source()).len() == 1
}

fn a_removed_image_stays_with_its_handles(rig: &Rig) {
    let mount = rig.mount();
    let is_overlay = rig.source().join("bases").exists();
    let grows = is_alone(rig) || is_overlay;
    let (file, is_written) = writer(&mount.disk);
    // Idle: without a lock, and so without anything but its name to be found by.
    drop(file.try_clone().unwrap());
    fs::remove_file(&mount.disk).unwrap();
    assert_eq!(errno(fs::metadata(&mount.disk)), Errno::ENOENT);
    let left = if is_overlay { vec!["bases"] } else { vec![] };
    assert_eq!(names(&rig.source()), left);
    assert_eq!(file.metadata().unwrap().nlink(), 0);
    assert_eq!(file.metadata().unwrap().len(), DISK);
    holds_the_disk(rig, &file, is_written);
    file.sync_all().unwrap();
    // The name is free.
    File::create(&mount.disk).unwrap();
    assert_eq!(fs::metadata(&mount.disk).unwrap().len(), 0);
    holds_the_disk(rig, &file, is_written);
    if grows {
        file.set_len(DISK + (1 << 20)).unwrap();
        assert_eq!(file.metadata().unwrap().len(), DISK + (1 << 20));
        holds_the_disk(rig, &file, is_written);
    }
    drop(file);
    mount.unmount();
    assert_eq!(fs::metadata(&rig.image).unwrap().len(), 0);
}

fn a_renamed_image_stays_with_its_handles(rig: &Rig) {
    const GROWTH: u64 = 1 << 20;
    let mount = rig.mount();
    let (file, is_written) = writer(&mount.disk);
    let moved = mount.at.join(named(rig, "moved"));
    fs::rename(&mount.disk, &moved).unwrap();
    assert_eq!(errno(fs::metadata(&mount.disk)), Errno::ENOENT);
    holds_the_disk(rig, &file, is_written);
    file.set_len(DISK + GROWTH).unwrap();
    assert_eq!(fs::metadata(&moved).unwrap().len(), DISK + GROWTH);
    // Idle and used again.
    drop(file.try_clone().unwrap());
    holds_the_disk(rig, &file, is_written);
    file.sync_all().unwrap();
    drop(file);
    fs::rename(&moved, &mount.disk).unwrap();
    mount.unmount();
    rig.check();
    assert_eq!(rig.virtual_size(), DISK + GROWTH);
}

fn an_image_moves_to_another_directory(rig: &Rig) {
    let mount = rig.mount();
    let sub = mount.at.join("sub");
    fs::create_dir(&sub).unwrap();
    let moved = sub.join(rig.variant.file);
    let names_others = names(&rig.source()).len() > 2;
    let renamed = fs::rename(&mount.disk, &moved);
    if names_others {
        // Its files are named relative to it.
        assert_eq!(errno(renamed), Errno::EINVAL);
        let why = xattr(&mount.at, "user.instar.error").unwrap();
        assert!(why.contains("would not find it any more"), "{why}");
        run("cmp", &[rig.originals.raw(), &mount.disk]);
        return;
    }
    renamed.unwrap();
    // So does what lies in a directory.
    let file = File::options().read(true).write(true).open(&moved).unwrap();
    fs::rename(&sub, mount.at.join("other")).unwrap();
    holds_the_disk(rig, &file, false);
    run(
        "cmp",
        &[
            rig.originals.raw(),
            &mount.at.join("other").join(rig.variant.file),
        ],
    );
}

fn a_name_of_another_format_is_refused(rig: &Rig) {
    let mount = rig.mount();
    for name in ["x.raw", "x.qcow2", "x.vmdk", "x.vhd", "x.vhdx", "x"] {
        if Path::new(name).extension() == Path::new(rig.variant.file).extension() {
            continue;
        }
        let renamed = fs::rename(&mount.disk, mount.at.join(name));
        assert_eq!(errno(renamed), Errno::EINVAL, "{name}");
    }
    run("cmp", &[rig.originals.raw(), &mount.disk]);
}

fn an_image_takes_the_place_of_another(rig: &Rig) {
    if !is_alone(rig) {
        return replaces_all_its_files(rig);
    }
    let other = named(rig, "other");
    fs::copy(&rig.image, rig.source().join(&other)).unwrap();
    let mount = rig.mount();
    let (replaced, _) = writer(&mount.at.join(&other));
    let (file, is_written) = writer(&mount.disk);
    fs::rename(&mount.disk, mount.at.join(&other)).unwrap();
    assert_eq!(names(&mount.at), std::slice::from_ref(&other));
    assert_eq!(replaced.metadata().unwrap().nlink(), 0);
    replaced.read_exact_at(&mut [0; 512], DISK - 512).unwrap();
    holds_the_disk(rig, &file, is_written);
    drop((replaced, file));
    mount.unmount();
    assert_eq!(names(&rig.source()), [other]);
}

/// The extents of a VMDK go with it, a backing file does not.
fn replaces_all_its_files(rig: &Rig) {
    let mount = rig.mount();
    let new = mount.at.join(named(rig, "new"));
    File::create(&new).unwrap().set_len(DISK).unwrap();
    let keeps = rig.source().join("bases").exists();
    fs::rename(&new, &mount.disk).unwrap();
    let mut left = vec![rig.variant.file];
    if keeps {
        left.insert(0, "bases");
    }
    assert_eq!(names(&rig.source()), left);
    mount.unmount();
    rig.check();
}

fn a_new_file_becomes_an_image(rig: &Rig) {
    let mount = rig.mount();
    let name = named(rig, "new");
    let (new, source) = (mount.at.join(&name), rig.source().join(&name));
    let file = File::create_new(&new).unwrap();
    assert_eq!(file.metadata().unwrap().len(), 0);
    assert_eq!(fs::metadata(&source).unwrap().len(), 0);
    let format = rig.variant.format();
    assert_eq!(xattr(&new, "user.instar.format").unwrap(), format);
    if rig.variant.size_unit > 1 {
        assert_eq!(errno(file.set_len(1000)), Errno::EINVAL);
    }
    assert_eq!(fs::metadata(&source).unwrap().len(), 0);
    file.set_len(DISK).unwrap();
    assert_eq!(file.metadata().unwrap().len(), DISK);
    let mut end = [1; 512];
    file.read_exact_at(&mut end, DISK - 512).unwrap();
    assert_eq!(end, [0; 512]);
    // By name, and not through a handle.
    run("truncate", &[Path::new("-s+64M"), &new]);
    drop(file);
    mount.unmount();
    let new = rig.with_image(source);
    new.check();
    let zeroes = rig.path("zeroes");
    let model = File::create(&zeroes).unwrap();
    model.set_len(DISK + (64 << 20)).unwrap();
    new.compare(&zeroes);
}

fn an_emptied_image_becomes_a_fresh_one(rig: &Rig) {
    if !is_alone(rig) {
        return;
    }
    let mount = rig.mount_with("shrink");
    let reader = File::open(&mount.disk).unwrap();
    run("truncate", &[Path::new("-s0"), &mount.disk]);
    assert_eq!(fs::metadata(&mount.disk).unwrap().len(), 0);
    assert_eq!(fs::metadata(&rig.image).unwrap().len(), 0);
    assert_eq!(reader.read_at(&mut [0; 512], 0).unwrap(), 0);
    run("truncate", &[Path::new("-s64M"), &mount.disk]);
    drop(reader);
    mount.unmount();
    rig.check();
    let zeroes = rig.path("zeroes");
    File::create(&zeroes).unwrap().set_len(DISK).unwrap();
    rig.compare(&zeroes);
}

fn a_copy_is_converted(rig: &Rig) {
    let mount = rig.mount();
    let name = named(rig, "new");
    let new = mount.at.join(&name);
    run("cp", &[rig.originals.raw(), &new]);
    run("cmp", &[rig.originals.raw(), &new]);
    mount.unmount();
    let copy = rig.with_image(rig.source().join(&name));
    copy.check();
    copy.compare(rig.originals.raw());
}

fn a_new_file_is_allocated(rig: &Rig) {
    const SIZE: u64 = 8 << 20;
    let mount = rig.mount();
    let new = mount.at.join(named(rig, "new"));
    let file = File::create_new(&new).unwrap();
    fallocate(&file, 0, 0, SIZE).unwrap();
    assert_eq!(file.metadata().unwrap().len(), SIZE);
    assert!(file.metadata().unwrap().blocks() * 512 >= SIZE);
    file.write_all_at(&noise(3, 4096), SIZE).unwrap();
    assert_eq!(file.metadata().unwrap().len(), SIZE + 4096);
}

fn directories_come_and_go(rig: &Rig) {
    let mount = rig.mount();
    let directory = mount.at.join("d");
    fs::create_dir(&directory).unwrap();
    assert!(rig.source().join("d").is_dir());
    assert_eq!(errno(fs::create_dir(&directory)), Errno::EEXIST);
    fs::rename(&mount.disk, directory.join("disk.qcow2")).unwrap();
    assert_eq!(errno(fs::remove_dir(&directory)), Errno::ENOTEMPTY);
    fs::remove_file(directory.join("disk.qcow2")).unwrap();
    File::open(&mount.at).unwrap().sync_all().unwrap();
    fs::write(rig.source().join("d/notes.txt"), "hello").unwrap();
    assert_eq!(errno(fs::remove_dir(&directory)), Errno::ENOTEMPTY);
    fs::remove_file(rig.source().join("d/notes.txt")).unwrap();
    fs::remove_dir(&directory).unwrap();
    assert!(names(&rig.source()).is_empty());
    assert_eq!(errno(fs::remove_dir(&directory)), Errno::ENOENT);
}

fn rename_how(from: &Path, to: &Path, flags: RenameFlags) -> std::io::Result<()> {
    Ok(renameat2(AT_FDCWD, from, AT_FDCWD, to, flags)?)
}

fn rename_replaces_only_where_it_may(rig: &Rig) {
    fs::copy(&rig.image, rig.source().join("other.qcow2")).unwrap();
    let mount = rig.mount();
    let other = mount.at.join("other.qcow2");
    let keep = rename_how(&mount.disk, &other, RenameFlags::RENAME_NOREPLACE);
    assert_eq!(errno(keep), Errno::EEXIST);
    let swap = rename_how(&mount.disk, &other, RenameFlags::RENAME_EXCHANGE);
    assert_eq!(errno(swap), Errno::EINVAL);
    let new = mount.at.join("new.qcow2");
    rename_how(&mount.disk, &new, RenameFlags::RENAME_NOREPLACE).unwrap();
    assert_eq!(names(&mount.at), ["new.qcow2", "other.qcow2"]);
    assert_eq!(errno(fs::hard_link(&new, &mount.disk)), Errno::EPERM);
    let link = std::os::unix::fs::symlink("new.qcow2", &mount.disk);
    assert_eq!(errno(link), Errno::EPERM);
}

fn what_is_not_shown_stays(rig: &Rig) {
    let source = rig.source();
    fs::create_dir(source.join("d")).unwrap();
    fs::write(source.join("link-target"), "hello").unwrap();
    for link in ["link.qcow2", "link.raw"] {
        std::os::unix::fs::symlink("link-target", source.join(link)).unwrap();
    }
    let mount = rig.mount();
    let link = mount.at.join("link.qcow2");
    assert_eq!(errno(fs::rename(&mount.disk, &link)), Errno::EEXIST);
    assert_eq!(errno(File::create(&link)), Errno::EEXIST);
    assert_eq!(errno(fs::remove_file(&link)), Errno::ENOENT);
    assert_eq!(
        errno(fs::rename(mount.at.join("d"), mount.at.join("link-target"))),
        Errno::EEXIST
    );
    for name in ["new", "new.txt", "new.vdi", "new.qcow2.instar-new"] {
        assert_eq!(errno(File::create(mount.at.join(name))), Errno::EINVAL);
    }
    let left = ["d", "disk.qcow2", "link-target", "link.qcow2", "link.raw"];
    assert_eq!(names(&source), left);
}

fn create(arguments: &[&str], path: &Path) {
    let mut words: Vec<PathBuf> = ["create", "-q", "-f"].map(PathBuf::from).to_vec();
    words.extend(arguments.iter().map(PathBuf::from));
    words.push(path.into());
    run("qemu-img", &words);
}

fn a_backing_image_keeps_its_name(rig: &Rig) {
    let over = rig.source().join("over.qcow2");
    create(&["qcow2", "-b", "disk.qcow2", "-F", "qcow2"], &over);
    let mount = rig.mount();
    assert_eq!(errno(fs::remove_file(&mount.disk)), Errno::EROFS);
    let renamed = fs::rename(&mount.disk, mount.at.join("x.qcow2"));
    assert_eq!(errno(renamed), Errno::EROFS);
    fs::remove_file(mount.at.join("over.qcow2")).unwrap();
    fs::remove_file(&mount.disk).unwrap();
    assert!(names(&rig.source()).is_empty());
}

fn a_data_file_stays(rig: &Rig) {
    let image = rig.source().join("split.qcow2");
    let data = rig.source().join("split.raw");
    let option = format!("data_file={},data_file_raw=on", data.display());
    run(
        "qemu-img",
        &[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            &option,
            image.to_str().unwrap(),
            "1M",
        ],
    );
    let mount = rig.mount();
    assert_eq!(names(&mount.at), ["disk.qcow2", "split.qcow2"]);
    fs::remove_file(mount.at.join("split.qcow2")).unwrap();
    assert_eq!(names(&mount.at), ["disk.qcow2", "split.raw"]);
    assert_eq!(
        fs::metadata(mount.at.join("split.raw")).unwrap().len(),
        1 << 20
    );
}

fn an_extent_of_another_stays(rig: &Rig) {
    let image = rig.source().join("a.vmdk");
    run(
        "qemu-img",
        &[
            "create",
            "-q",
            "-f",
            "vmdk",
            "-o",
            "subformat=monolithicFlat",
            image.to_str().unwrap(),
            "1M",
        ],
    );
    fs::copy(&image, rig.source().join("b.vmdk")).unwrap();
    let mount = rig.mount();
    assert_eq!(names(&mount.at), ["a.vmdk", "b.vmdk", "disk.qcow2"]);
    fs::remove_file(mount.at.join("b.vmdk")).unwrap();
    let all = ["a-flat.vmdk", "a.vmdk", "disk.qcow2"];
    assert_eq!(names(&rig.source()), all);
    fs::remove_file(mount.at.join("a.vmdk")).unwrap();
    assert_eq!(names(&rig.source()), ["disk.qcow2"]);
}

fn a_new_file_belongs_to_its_maker(rig: &Rig) {
    fs::set_permissions(rig.source(), fs::Permissions::from_mode(0o777)).unwrap();
    for above in rig.mountpoint().ancestors().skip(1).take(1) {
        fs::set_permissions(above, fs::Permissions::from_mode(0o755)).unwrap();
    }
    let mount = rig.mount_with("allow_other");
    let script = format!(
        "umask 027 && mkdir {0}/d && truncate -s 1M {0}/d/new.qcow2 && rm -f {0}/disk.qcow2",
        mount.at.display()
    );
    let who = ["--reuid=65534", "--regid=65533", "--clear-groups"];
    run("setpriv", &[&who[..], &["sh", "-c", &script]].concat());
    let directory = fs::metadata(rig.source().join("d")).unwrap();
    let file = fs::metadata(rig.source().join("d/new.qcow2")).unwrap();
    for (metadata, mode) in [(&directory, 0o750), (&file, 0o640)] {
        assert_eq!((metadata.uid(), metadata.gid()), (65534, 65533));
        assert_eq!(metadata.mode() & 0o7777, mode);
    }
    assert_eq!(names(&rig.source()), ["d"]);
    let again = File::create_new(mount.at.join("d/new.qcow2"));
    assert_eq!(errno(again), Errno::EEXIST);
}

/// Also where the daemon is subject to permissions like any other program.
fn a_new_file_may_be_read_only(rig: &Rig) {
    let without = ["--bounding-set", "-dac_override,-dac_read_search", INSTAR];
    let mut words: Vec<OsString> = without.map(OsString::from).to_vec();
    words.extend(rig.mount_command(""));
    words.extend([rig.source().into(), rig.mountpoint().into()]);
    run("setpriv", &words);
    let mount = Mount::found(rig.mountpoint(), rig.variant.file);
    let disk = rig.expected();
    fs::set_permissions(&disk, fs::Permissions::from_mode(0o444)).unwrap();
    let how = Path::new("--preserve=mode");
    run("cp", &[how, &disk, &mount.at.join("new.qcow2")]);
    mount.unmount();
    let new = rig.source().join("new.qcow2");
    assert_eq!(fs::metadata(&new).unwrap().mode() & 0o7777, 0o444);
    let new = rig.with_image(new);
    new.check();
    new.compare(&disk);
}

fn one_image_alone_keeps_its_name(rig: &Rig) {
    let mount = rig.mount_source(&rig.image, "");
    assert_eq!(errno(fs::remove_file(&mount.disk)), Errno::EROFS);
    let renamed = fs::rename(&mount.disk, mount.at.join("x.qcow2"));
    assert_eq!(errno(renamed), Errno::EROFS);
    assert_eq!(errno(File::create(mount.at.join("y.raw"))), Errno::EROFS);
    assert_eq!(errno(fs::create_dir(mount.at.join("d"))), Errno::EROFS);
}
