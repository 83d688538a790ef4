//! Changes of names, and what becomes of those who have the image open.

use super::{Stage, errno, options};
use crate::fs::error::Result;
use crate::fs::sync::lock;
use crate::fs::{Birth, Creation, FormatRules, NodeId, Options};
use nix::errno::Errno;
use nix::unistd::{getegid, geteuid};
use std::ffi::OsStr;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::Path;
use std::sync::mpsc::channel;
use std::time::Duration;

impl Stage {
    fn unlink(&self, name: &str) -> Result<()> {
        self.fs.unlink(NodeId::ROOT, OsStr::new(name))
    }

    fn rename(&self, from: &str, to: &str) -> Result<()> {
        self.rename_how(from, to, true)
    }

    fn rename_how(&self, from: &str, to: &str, replace: bool) -> Result<()> {
        let place = |path: &str| match path.rsplit_once('/') {
            Some((directory, name)) => (self.lookup(directory).unwrap().id, name.to_owned()),
            None => (NodeId::ROOT, path.to_owned()),
        };
        let ((from, name), (to, new_name)) = (place(from), place(to));
        self.fs
            .rename(from, OsStr::new(&name), to, OsStr::new(&new_name), replace)
    }

    fn create(&self, name: &str) -> Result<(NodeId, u64)> {
        self.create_how(name, 0o640, true)
    }

    fn create_how(&self, name: &str, perm: u32, exclusive: bool) -> Result<(NodeId, u64)> {
        let how = Creation {
            birth: birth(perm),
            exclusive,
            writable: true,
        };
        let made = self.fs.create(NodeId::ROOT, OsStr::new(name), how);
        made.map(|(attributes, opened)| (attributes.id, opened.handle))
    }
}

fn birth(perm: u32) -> Birth {
    Birth {
        perm,
        uid: geteuid().as_raw(),
        gid: getegid().as_raw(),
    }
}

#[test]
fn a_handle_of_an_unlinked_image_goes_on_working_and_keeps_its_lock() {
    let stage = Stage::new(&[("a.qcow2", "size=1048576")]);
    let id = stage.lookup("a.qcow2").unwrap().id;
    let handle = stage.open("a.qcow2", true).unwrap();
    stage.fs.flush(handle).unwrap();
    stage.unlink("a.qcow2").unwrap();
    assert_eq!(errno(stage.lookup("a.qcow2")), Errno::ENOENT);
    stage.events();
    stage.fs.write(handle, 0, b"still here").unwrap();
    stage.fs.flush(handle).unwrap();
    let mut read = [0; 10];
    stage.fs.read(handle, 0, &mut read).unwrap();
    assert_eq!(&read, b"still here");
    let left = stage.fs.getattr(id).unwrap();
    assert_eq!((left.size, left.stat.nlink), (1 << 20, 0));
    assert_eq!(stage.events(), ["flush"]);
    stage.fs.release(handle);
    assert_eq!(stage.events(), ["close"]);
    assert_eq!(errno(stage.fs.open(id, false)), Errno::ESTALE);
}

#[test]
fn an_image_that_another_program_uses_is_not_taken_from_its_handles() {
    let stage = Stage::new(&[("a.qcow2", "size=512")]);
    let handle = stage.open("a.qcow2", true).unwrap();
    stage.fs.flush(handle).unwrap();
    lock(&stage.shelf).locked_by_others = true;
    assert_eq!(errno(stage.unlink("a.qcow2")), Errno::EBUSY);
    lock(&stage.shelf).locked_by_others = false;
    stage.fs.write(handle, 0, b"x").unwrap();
    stage.fs.flush(handle).unwrap();
    assert_eq!(stage.events().last(), Some(&"unlock"));
}

#[test]
fn an_image_that_cannot_be_opened_for_the_moment_is_not_taken_from_its_handles() {
    for (fails, taken) in [
        (Errno::ENOMEM, false),
        (Errno::EMFILE, false),
        (Errno::EIO, true),
    ] {
        let stage = Stage::new(&[("a.qcow2", "size=512")]);
        let handle = stage.open("a.qcow2", true).unwrap();
        stage.fs.flush(handle).unwrap();
        lock(&stage.shelf).fail_open = Some(fails);
        let removed = stage.unlink("a.qcow2");
        assert_eq!(removed.is_ok(), taken, "{fails}");
        lock(&stage.shelf).fail_open = None;
        assert_eq!(stage.fs.write(handle, 0, b"x").is_ok(), !taken, "{fails}");
    }
}

#[test]
fn the_next_file_of_that_name_is_another_one() {
    let stage = Stage::new(&[("a.qcow2", "size=512")]);
    let old = stage.lookup("a.qcow2").unwrap().id;
    let handle = stage.open("a.qcow2", true).unwrap();
    stage.unlink("a.qcow2").unwrap();
    let (new, other) = stage.create("a.qcow2").unwrap();
    assert_ne!(new, old);
    assert_eq!(stage.fs.getattr(new).unwrap().size, 0);
    assert_eq!(stage.fs.getattr(old).unwrap().size, 512);
    for handle in [handle, other] {
        stage.fs.release(handle);
    }
}

#[test]
fn a_handle_follows_its_image_to_another_name() {
    let stage = Stage::new(&[("a.qcow2", "size=1048576"), ("d/x.qcow2", "size=512")]);
    let id = stage.lookup("a.qcow2").unwrap().id;
    let handle = stage.open("a.qcow2", true).unwrap();
    stage.fs.write(handle, 0, b"before").unwrap();
    stage.events();
    stage.rename("a.qcow2", "d/b.qcow2").unwrap();
    assert_eq!(stage.events(), ["flush", "close"]);
    assert_eq!(stage.lookup("d/b.qcow2").unwrap().id, id);
    assert_eq!(errno(stage.lookup("a.qcow2")), Errno::ENOENT);
    stage.fs.write(handle, 6, b" after").unwrap();
    let mut read = [0; 12];
    stage.fs.read(handle, 0, &mut read).unwrap();
    assert_eq!(&read, b"before after");
    stage.fs.flush(handle).unwrap();
    stage.rename("d", "e").unwrap();
    stage.fs.write(handle, 0, b"B").unwrap();
    assert_eq!(stage.lookup("e/b.qcow2").unwrap().id, id);
}

#[test]
fn a_name_is_looked_for_where_its_directory_is_once_it_is_its_turn() {
    let stage = Stage::new(&[("d/a.qcow2", "size=512"), ("x/a.qcow2", "size=1024")]);
    let directory = stage.lookup("d").unwrap().id;
    std::thread::scope(|scope| {
        let naming = lock(&stage.fs.naming);
        let unlinking = scope.spawn(|| stage.fs.unlink(directory, OsStr::new("a.qcow2")));
        std::thread::sleep(Duration::from_millis(100));
        // What a rename does: the directory moves, and another gets its name.
        for (from, to) in [("d", "e"), ("x", "d")] {
            let at = |name| stage.dir.path().join(name);
            std::fs::rename(at(from), at(to)).unwrap();
            stage.fs.nodes.rename(Path::new(from), Path::new(to));
        }
        drop(naming);
        unlinking.join().unwrap().unwrap();
    });
    assert_eq!(errno(stage.lookup("e/a.qcow2")), Errno::ENOENT);
    assert_eq!(stage.lookup("d/a.qcow2").unwrap().size, 1024);
}

#[test]
fn a_directory_that_others_put_in_the_place_of_another_keeps_its_names() {
    let stage = Stage::new(&[("d/a.qcow2", "size=512"), ("b.qcow2", "size=512")]);
    let directory = stage.lookup("d").unwrap().id;
    let at = |name| stage.dir.path().join(name);
    std::fs::rename(at("d"), at("was")).unwrap();
    std::fs::create_dir(at("d")).unwrap();
    std::fs::write(at("d/a.qcow2"), "size=1024").unwrap();
    let (a, b) = (OsStr::new("a.qcow2"), OsStr::new("b.qcow2"));
    let how = Creation {
        birth: birth(0o640),
        exclusive: true,
        writable: true,
    };
    let fs = &stage.fs;
    assert_eq!(errno(fs.unlink(directory, a)), Errno::ESTALE);
    assert_eq!(errno(fs.create(directory, b, how)), Errno::ESTALE);
    let made = fs.mkdir(directory, OsStr::new("e"), birth(0o755));
    assert_eq!(errno(made), Errno::ESTALE);
    for (from, to) in [
        ((directory, a), (NodeId::ROOT, b)),
        ((NodeId::ROOT, b), (directory, a)),
    ] {
        let renamed = fs.rename(from.0, from.1, to.0, to.1, true);
        assert_eq!(errno(renamed), Errno::ESTALE);
    }
    assert_eq!(stage.lookup("d/a.qcow2").unwrap().size, 1024);
    assert_eq!(stage.lookup("b.qcow2").unwrap().size, 512);
}

#[test]
fn a_name_does_not_wait_for_the_image_of_another() {
    let stage = Stage::new(&[("a.qcow2", "size=1024"), ("b.qcow2", "size=512")]);
    let handle = stage.open("a.qcow2", true).unwrap();
    let (begun, has_begun) = channel();
    let (go_on, may_go_on) = channel::<()>();
    lock(&stage.shelf).during_zero = Some(Box::new(move || {
        begun.send(()).unwrap();
        may_go_on.recv_timeout(Duration::from_secs(10)).ok();
    }));
    let removed = std::thread::scope(|scope| {
        let fs = &stage.fs;
        let mode = libc::FALLOC_FL_ZERO_RANGE;
        let zeroing = scope.spawn(move || fs.fallocate(handle, mode, 0, 512));
        has_begun.recv().unwrap();
        let (done, is_done) = channel();
        for name in ["a.qcow2", "b.qcow2"] {
            let done = done.clone();
            scope.spawn(move || {
                let removed = fs.unlink(NodeId::ROOT, OsStr::new(name));
                done.send((name, removed.is_ok())).unwrap();
            });
            // The first one waits for the image by then.
            std::thread::sleep(Duration::from_millis(100));
        }
        let first = is_done.recv_timeout(Duration::from_secs(5)).ok();
        go_on.send(()).unwrap();
        zeroing.join().unwrap().unwrap();
        [first, is_done.recv_timeout(Duration::from_secs(5)).ok()]
    });
    assert_eq!(removed, [Some(("b.qcow2", true)), Some(("a.qcow2", true))]);
}

#[test]
fn an_image_that_is_replaced_stays_with_its_handles() {
    let stage = Stage::new(&[("a.qcow2", "size=512"), ("b.qcow2", "size=1024")]);
    let (a, b) = (
        stage.open("a.qcow2", true).unwrap(),
        stage.open("b.qcow2", true).unwrap(),
    );
    assert_eq!(
        errno(stage.rename_how("a.qcow2", "b.qcow2", false)),
        Errno::EEXIST
    );
    stage.rename("a.qcow2", "b.qcow2").unwrap();
    assert_eq!(stage.listing(), ["b.qcow2"]);
    assert_eq!(stage.lookup("b.qcow2").unwrap().size, 512);
    stage.fs.write(a, 0, b"a").unwrap();
    stage.fs.write(b, 1000, b"b").unwrap();
}

#[test]
fn a_name_that_says_another_format_is_refused() {
    let stage = Stage::new(&[
        ("a.qcow2", "size=512"),
        ("noname", "size=512"),
        ("r.raw", "content"),
    ]);
    for (from, to) in [
        ("a.qcow2", "a.vhdx"),
        ("a.qcow2", "a.raw"),
        ("a.qcow2", "a"),
        ("noname", "n.raw"),
        ("noname", "n.vmdk"),
        ("r.raw", "r"),
        ("a.qcow2", "b.qcow2.instar-new"),
    ] {
        assert_eq!(errno(stage.rename(from, to)), Errno::EINVAL, "{from} {to}");
    }
    stage.rename("noname", "n.qcow2").unwrap();
    stage.rename("r.raw", "r.img").unwrap();
    assert_eq!(stage.listing(), ["a.qcow2", "n.qcow2", "r.img"]);
}

#[test]
fn what_is_not_shown_is_not_replaced() {
    let stage = Stage::new(&[("a.qcow2", "size=512"), ("notes", "hello")]);
    symlink("/etc/passwd", stage.dir.path().join("link.qcow2")).unwrap();
    let hidden = "link.qcow2";
    assert_eq!(errno(stage.rename("a.qcow2", hidden)), Errno::EEXIST);
    assert_eq!(errno(stage.create(hidden)), Errno::EEXIST);
    assert_eq!(errno(stage.unlink("notes")), Errno::ENOENT);
    let made = stage
        .fs
        .mkdir(NodeId::ROOT, OsStr::new("notes"), birth(0o755));
    assert_eq!(errno(made), Errno::EEXIST);
}

#[test]
fn an_image_that_others_build_on_keeps_its_name() {
    let files = [
        ("base.qcow2", "size=512"),
        ("over.qcow2", "size=512 backing=base.qcow2"),
        ("d/x.qcow2", "size=512"),
    ];
    let stage = Stage::new(&files);
    assert_eq!(errno(stage.unlink("base.qcow2")), Errno::EROFS);
    assert_eq!(errno(stage.rename("base.qcow2", "b.qcow2")), Errno::EROFS);
    assert_eq!(
        errno(stage.rename("over.qcow2", "base.qcow2")),
        Errno::EROFS
    );
    // It would not find its backing file.
    assert_eq!(
        errno(stage.rename("over.qcow2", "d/over.qcow2")),
        Errno::EINVAL
    );
    stage.rename("over.qcow2", "o.qcow2").unwrap();
    stage.unlink("o.qcow2").unwrap();
    stage.unlink("base.qcow2").unwrap();
    assert_eq!(stage.listing(), ["d"]);
}

#[test]
fn a_vmdk_takes_only_extents_with_it_that_are_called_after_it() {
    let extents = [
        "a-flat.vmdk",
        "a-s001.vmdk",
        "a-f12.vmdk",
        "a-s.vmdk",
        "a-s001.vmdk.raw",
        "a-2.vmdk",
        "b-flat.vmdk",
        "precious.raw",
    ];
    let named: Vec<String> = extents.iter().map(|name| format!("data={name}")).collect();
    let descriptor = format!("size=512 as=vmdk {}", named.join(" "));
    let mut files = vec![("a.vmdk", descriptor.as_str())];
    files.extend(extents.iter().map(|name| (*name, "size=512")));
    let stage = Stage::new(&files);
    stage.unlink("a.vmdk").unwrap();
    let left = std::fs::read_dir(stage.dir.path()).unwrap();
    let mut left: Vec<_> = left.map(|entry| entry.unwrap().file_name()).collect();
    left.sort();
    let expected = [
        "a-2.vmdk",
        "a-s.vmdk",
        "a-s001.vmdk.raw",
        "b-flat.vmdk",
        "precious.raw",
    ];
    assert_eq!(left, expected);
}

#[test]
fn an_extent_that_an_image_elsewhere_builds_on_stays() {
    for rw_backing in [false, true] {
        let options = Options {
            rw_backing,
            ..options()
        };
        let files = [
            (
                "a.vmdk",
                "size=512 as=vmdk data=a-flat.vmdk data=a-s001.vmdk",
            ),
            ("a-flat.vmdk", "content"),
            ("a-s001.vmdk", "content"),
            ("d/over.qcow2", "size=512 backing=../a-flat.vmdk"),
            ("e/other.qcow2", "size=512 data=../a-s001.vmdk"),
        ];
        let stage = Stage::with(&files, options);
        stage.unlink("a.vmdk").unwrap();
        for (name, stays) in [
            ("a.vmdk", false),
            ("a-flat.vmdk", true),
            ("a-s001.vmdk", true),
        ] {
            assert_eq!(stage.dir.path().join(name).exists(), stays, "{name}");
        }
    }
}

#[test]
fn a_directory_is_renamed_if_every_image_still_finds_its_files() {
    let stage = Stage::new(&[
        ("d/base.qcow2", "size=512"),
        ("d/over.qcow2", "size=512 backing=base.qcow2"),
        ("e/base.qcow2", "size=512"),
        ("over.qcow2", "size=512 backing=e/base.qcow2"),
    ]);
    stage.rename("d", "f").unwrap();
    assert_eq!(errno(stage.rename("e", "g")), Errno::EINVAL);
    assert_eq!(stage.listing(), ["e", "f", "over.qcow2"]);
    let mut by_path = FormatRules::default();
    by_path.add("f/*.disk:raw").unwrap();
    let formats = Options {
        formats: by_path,
        ..options()
    };
    let stage = Stage::with(&[("f/a.disk", "size=512")], formats);
    assert_eq!(errno(stage.rename("f", "g")), Errno::EINVAL);
}

#[test]
fn a_new_file_belongs_to_its_maker_and_has_a_name_that_says_its_format() {
    let stage = Stage::new(&[("a.qcow2", "size=512 data=b.raw")]);
    let (id, _) = stage.create("new.vhdx").unwrap();
    assert_eq!(stage.fs.getattr(id).unwrap().size, 0);
    let path = stage.dir.path().join("new.vhdx");
    let metadata = std::fs::metadata(path).unwrap();
    assert_eq!(metadata.permissions().mode() & 0o7777, 0o640);
    assert_eq!(metadata.len(), 0);
    let (id, _) = stage.create_how("mine.vhdx", 0o444, true).unwrap();
    assert_eq!(stage.fs.getattr(id).unwrap().stat.perm, 0o444);
    // Nothing is left of one that cannot be opened.
    lock(&stage.shelf).fail_open = Some(Errno::EMFILE);
    assert_eq!(errno(stage.create("none.vhdx")), Errno::EMFILE);
    lock(&stage.shelf).fail_open = None;
    assert_eq!(stage.listing(), ["a.qcow2", "mine.vhdx", "new.vhdx"]);
    assert_eq!(errno(stage.create("new.vhdx")), Errno::EEXIST);
    // The kernel is to look whether it may open it.
    let again = stage.create_how("new.vhdx", 0o640, false);
    assert_eq!(errno(again), Errno::ESTALE);
    for name in ["new", "new.txt", "b.raw", "x.qcow2.instar-new"] {
        assert_eq!(errno(stage.create(name)), Errno::EINVAL, "{name}");
    }
}

#[test]
fn directories_come_and_go() {
    let stage = Stage::new(&[("a.qcow2", "size=512")]);
    let made = stage
        .fs
        .mkdir(NodeId::ROOT, OsStr::new("d"), birth(0o750))
        .unwrap();
    assert_eq!(made.stat.perm, 0o750);
    stage.rename("a.qcow2", "d/a.qcow2").unwrap();
    let rmdir = |name| stage.fs.rmdir(NodeId::ROOT, OsStr::new(name));
    assert_eq!(errno(rmdir("d")), Errno::ENOTEMPTY);
    assert_eq!(errno(stage.unlink("d")), Errno::EISDIR);
    stage.rename("d/a.qcow2", "a.qcow2").unwrap();
    assert_eq!(errno(rmdir("a.qcow2")), Errno::ENOTDIR);
    rmdir("d").unwrap();
    // Whoever is in it finds nothing.
    let inside = stage.fs.opendir(made.id).unwrap();
    assert!(stage.fs.listing(inside).unwrap().is_empty());
    let name = OsStr::new("x.raw");
    let how = Creation {
        birth: birth(0o600),
        exclusive: false,
        writable: false,
    };
    assert_eq!(errno(stage.fs.create(made.id, name, how)), Errno::ENOENT);
}

#[test]
fn a_read_only_mount_keeps_its_names() {
    let read_only = Options {
        read_only: true,
        ..options()
    };
    let stage = Stage::with(&[("a.qcow2", "size=512"), ("d/x.raw", "")], read_only);
    assert_eq!(errno(stage.unlink("a.qcow2")), Errno::EROFS);
    assert_eq!(errno(stage.rename("a.qcow2", "b.qcow2")), Errno::EROFS);
    assert_eq!(errno(stage.create("b.qcow2")), Errno::EROFS);
    assert_eq!(
        errno(stage.fs.rmdir(NodeId::ROOT, OsStr::new("d"))),
        Errno::EROFS
    );
    assert_eq!(stage.listing(), ["a.qcow2", "d"]);
}
