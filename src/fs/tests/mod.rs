//! The behaviour of the mount over images that exist in memory only.

mod appending;
mod fake;
mod locks;
mod namespace;
mod passing;
mod sizes;

use super::attributes::Changes;
use super::error::Result;
use super::filesystem::{Filesystem, OpenedHandle, Options};
use super::names::FormatRules;
use super::nodes::NodeId;
use super::source::Source;
use super::sync::lock;
use super::{Attributes, Seek, Stale};
use crate::image::{Access, Space};
use fake::{FakeLibrary, MIB, Shelf};
use instar_guest::proto::Preallocation;
use nix::errno::Errno;
use std::ffi::OsStr;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::sync::{Arc, Mutex};
use tempfile::TempDir;

struct Stage {
    dir: TempDir,
    shelf: Arc<Mutex<Shelf>>,
    fs: Filesystem,
}

fn options() -> Options {
    Options {
        read_only: false,
        grow: true,
        shrink: false,
        rw_backing: false,
        idle: Options::IDLE,
        preallocation: Preallocation::Off,
        formats: FormatRules::default(),
        passthrough: true,
        writeback: false,
    }
}

impl Stage {
    fn new(files: &[(&str, &str)]) -> Self {
        Self::with(files, options())
    }

    fn with(files: &[(&str, &str)], options: Options) -> Self {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        let shelf = Arc::default();
        let library = Box::new(FakeLibrary(Arc::clone(&shelf)));
        let source = Source::open(dir.path()).unwrap();
        let fs = Filesystem::new(source, library, options).unwrap();
        Self { dir, shelf, fs }
    }

    fn lookup(&self, name: &str) -> Result<Attributes> {
        let mut id = NodeId::ROOT;
        let mut found = self.fs.getattr(id);
        for part in name.split('/') {
            found = self.fs.lookup(id, OsStr::new(part));
            id = found.clone()?.id;
        }
        found
    }

    /// Opens an image, looked up again where it has become another file.
    fn open_as_the_kernel_does(&self, name: &str, writable: bool) -> (NodeId, OpenedHandle) {
        let id = self.lookup(name).unwrap().id;
        match self.fs.open(id, writable) {
            Err(error) if error.errno == Errno::ESTALE => {
                let id = self.lookup(name).unwrap().id;
                (id, self.fs.open(id, writable).unwrap())
            }
            opened => (id, opened.unwrap()),
        }
    }

    fn open(&self, name: &str, writable: bool) -> Result<u64> {
        Ok(self.fs.open(self.lookup(name)?.id, writable)?.handle)
    }

    fn listing(&self) -> Vec<String> {
        let handle = self.fs.opendir(NodeId::ROOT).unwrap();
        let listing = self.fs.listing(handle).unwrap();
        let mut names: Vec<_> = listing
            .iter()
            .map(|line| line.name.clone().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    /// What happened since the last call; looks without locks and flushes of
    /// nothing are left out.
    fn events(&self) -> Vec<&'static str> {
        let mut events = std::mem::take(&mut lock(&self.shelf).events);
        events.retain(|event| !["describe", "flush nothing"].contains(event));
        events
    }

    fn truncate(&self, name: &str, size: u64) -> Result<Attributes> {
        let changes = Changes {
            size: Some(size),
            ..Changes::default()
        };
        self.fs.setattr(self.lookup(name)?.id, None, &changes)
    }
}

fn errno<T: std::fmt::Debug>(result: Result<T>) -> Errno {
    result.unwrap_err().errno
}

#[test]
fn only_images_are_shown_and_a_name_decides_what_is_one() {
    let stage = Stage::new(&[
        ("a.qcow2", "size=1048576"),
        ("noname", "size=2097152"),
        ("notes", "hello"),
        ("d.img", "size=1048576"),
        ("x.vmdk", "hello"),
        ("bad.qcow2", "hello"),
        ("new.qcow2", ""),
        ("sub/b.qcow2", "size=512"),
    ]);
    assert_eq!(
        stage.listing(),
        [
            "a.qcow2",
            "bad.qcow2",
            "d.img",
            "new.qcow2",
            "noname",
            "sub",
            "x.vmdk"
        ]
    );
    // Empty: no image yet.
    assert_eq!(stage.lookup("new.qcow2").unwrap().size, 0);
    assert!(stage.open("new.qcow2", false).is_ok());
    assert_eq!(stage.lookup("a.qcow2").unwrap().size, MIB);
    assert_eq!(stage.lookup("noname").unwrap().size, 2 * MIB);
    assert_eq!(stage.lookup("sub/b.qcow2").unwrap().size, 512);
    assert_eq!(errno(stage.lookup("notes")), Errno::ENOENT);
    // Raw by name: the length of the file, whatever is in it.
    assert_eq!(stage.lookup("d.img").unwrap().size, 12);
    for unusable in ["x.vmdk", "bad.qcow2"] {
        assert_eq!(stage.lookup(unusable).unwrap().size, 0);
        assert_eq!(errno(stage.open(unusable, false)), Errno::EIO);
    }
}

#[test]
fn an_unusable_image_says_why_and_disturbs_no_other() {
    let stage = Stage::new(&[("bad.qcow2", "size=1 damaged"), ("a.qcow2", "size=512")]);
    let bad = stage.lookup("bad.qcow2").unwrap().id;
    let name = OsStr::new("user.instar.error");
    assert_eq!(stage.fs.getxattr(bad, name).unwrap(), b"damaged");
    assert_eq!(stage.fs.listxattr(bad).unwrap(), ["user.instar.error"]);
    let good = stage.lookup("a.qcow2").unwrap().id;
    assert_eq!(errno(stage.fs.getxattr(good, name)), Errno::ENODATA);
    assert_eq!(
        stage
            .fs
            .getxattr(good, OsStr::new("user.instar.format"))
            .unwrap(),
        b"qcow2"
    );
    assert!(stage.open("a.qcow2", true).is_ok());
}

#[test]
fn a_truncate_by_name_refuses_what_an_open_refuses() {
    let stage = Stage::new(&[
        ("x.vmdk", "hello"),
        ("bad.qcow2", "size=1 damaged"),
        ("was", "size=512"),
    ]);
    for unusable in ["x.vmdk", "bad.qcow2"] {
        assert_eq!(errno(stage.truncate(unusable, MIB)), Errno::EIO);
    }
    let was = stage.lookup("was").unwrap().id;
    std::fs::write(stage.dir.path().join("was"), "no image any more").unwrap();
    let changes = Changes {
        size: Some(MIB),
        ..Changes::default()
    };
    assert_eq!(errno(stage.fs.setattr(was, None, &changes)), Errno::ENOENT);
    assert_eq!(errno(stage.fs.open(was, true)), Errno::ENOENT);
    assert_eq!(stage.events(), [] as [&str; 0]);
}

#[test]
fn what_is_opened_without_a_format_is_never_raw() {
    let stage = Stage::new(&[("noname", "size=512"), ("d.img", "content")]);
    lock(&stage.shelf).opens_as_raw = true;
    assert_eq!(errno(stage.open("noname", true)), Errno::EIO);
    assert_eq!(errno(stage.truncate("noname", MIB)), Errno::EIO);
    assert!(stage.open("d.img", true).is_ok());
}

#[test]
fn an_image_that_does_not_change_is_looked_at_once() {
    let stage = Stage::new(&[("a.qcow2", "size=512")]);
    let id = stage.lookup("a.qcow2").unwrap().id;
    // An old file: its time stamps tell every further change.
    std::thread::sleep(std::time::Duration::from_millis(30));
    stage.fs.getattr(id).unwrap();
    lock(&stage.shelf).events.clear();
    for _ in 0..10 {
        stage.fs.getattr(id).unwrap();
    }
    assert_eq!(lock(&stage.shelf).events.len(), 0);
    std::fs::write(stage.dir.path().join("a.qcow2"), "size=1024").unwrap();
    stage.fs.getattr(id).unwrap();
    assert_eq!(lock(&stage.shelf).events, ["describe"]);
}

#[test]
fn a_look_that_fails_for_want_of_memory_is_no_verdict() {
    let stage = Stage::new(&[("a.qcow2", "size=512"), ("b.qcow2", "size=1024")]);
    let id = |name| stage.lookup(name).unwrap().id;
    let (idle, open) = (id("a.qcow2"), id("b.qcow2"));
    stage.fs.open(open, false).unwrap();
    lock(&stage.shelf).fail_describe = Some(Errno::ENOMEM);
    // Also once the time stamps tell every further change.
    std::thread::sleep(std::time::Duration::from_millis(30));
    touch(&stage, &["a.qcow2", "b.qcow2"]);
    assert_eq!(errno(stage.fs.getattr(idle)), Errno::ENOMEM);
    assert_eq!(errno(stage.lookup("a.qcow2")), Errno::ENOMEM);
    assert_eq!(stage.fs.getattr(open).unwrap().size, 1024);
    lock(&stage.shelf).fail_describe = None;
    assert_eq!(stage.fs.getattr(idle).unwrap().size, 512);
}

#[test]
fn an_image_is_looked_at_again_after_the_disk_below_has_failed() {
    for below in [true, false] {
        let stage = Stage::new(&[("a.qcow2", "size=512")]);
        lock(&stage.shelf).fail_describe = Some(Errno::EIO);
        lock(&stage.shelf).fails_below = below;
        std::thread::sleep(std::time::Duration::from_millis(30));
        assert_eq!(stage.lookup("a.qcow2").unwrap().size, 0);
        lock(&stage.shelf).fail_describe = None;
        let size = stage.lookup("a.qcow2").unwrap().size;
        assert_eq!(size, if below { 512 } else { 0 });
    }
}

#[test]
fn the_size_of_an_open_image_is_its_own_whatever_its_file_looks_like() {
    let stage = Stage::new(&[("a.qcow2", "size=512")]);
    let id = stage.lookup("a.qcow2").unwrap().id;
    stage.fs.open(id, true).unwrap();
    lock(&stage.shelf).fail_describe = Some(Errno::EIO);
    touch(&stage, &["a.qcow2"]);
    assert_eq!(stage.fs.getattr(id).unwrap().size, 512);
}

/// Gives files new times, as a change of their content does.
fn touch(stage: &Stage, names: &[&str]) {
    for name in names {
        let file = std::fs::File::options()
            .write(true)
            .open(stage.dir.path().join(name));
        let then = std::time::SystemTime::UNIX_EPOCH;
        file.unwrap().set_modified(then).unwrap();
    }
}

#[test]
fn a_truncate_by_name_grows_and_leaves_no_lock() {
    let stage = Stage::new(&[("a.qcow2", "size=1048576")]);
    stage.truncate("a.qcow2", 2 * MIB).unwrap();
    assert_eq!(
        stage.events(),
        ["open to write", "resize", "unlock", "close"]
    );
}

#[test]
fn nogrow_keeps_writes_inside_the_disk() {
    let nogrow = Options {
        grow: false,
        ..options()
    };
    let stage = Stage::with(&[("a.qcow2", "size=512")], nogrow);
    let handle = stage.open("a.qcow2", true).unwrap();
    assert_eq!(errno(stage.fs.write(handle, 510, b"end")), Errno::EFBIG);
    assert_eq!(errno(stage.fs.write(handle, u64::MAX, b"e")), Errno::EFBIG);
    assert!(stage.fs.write(handle, 509, b"end").is_ok());
    let zero = |offset, len| {
        let mode = libc::FALLOC_FL_ZERO_RANGE;
        stage.fs.fallocate(handle, mode, offset, len)
    };
    assert_eq!(errno(zero(0, 513)), Errno::EFBIG);
    zero(0, 512).unwrap();
    assert_eq!(stage.lookup("a.qcow2").unwrap().size, 512);
}

#[test]
fn fallocate_grows_and_allocates_the_whole_range_durably() {
    let stage = Stage::new(&[("a.qcow2", "size=1048576")]);
    let handle = stage.open("a.qcow2", true).unwrap();
    stage.fs.fallocate(handle, 0, MIB - 512, MIB).unwrap();
    assert_eq!(
        lock(&stage.shelf).allocated,
        [(MIB - 512, 512), (MIB, MIB - 512)]
    );
    assert_eq!(stage.events(), ["open to write", "resize", "flush"]);
    assert_eq!(stage.lookup("a.qcow2").unwrap().size, 2 * MIB - 512);
}

#[test]
fn a_fallocate_that_fails_inside_the_disk_does_not_grow_it() {
    let stage = Stage::new(&[("a.qcow2", "size=1048576")]);
    let handle = stage.open("a.qcow2", true).unwrap();
    lock(&stage.shelf).full = true;
    let failed = stage.fs.fallocate(handle, 0, MIB - 512, MIB);
    assert_eq!(errno(failed), Errno::ENOSPC);
    assert_eq!(stage.lookup("a.qcow2").unwrap().size, MIB);
}

#[test]
fn fallocate_refuses_what_it_cannot_do() {
    let stage = Stage::new(&[("a.qcow2", "size=1048576")]);
    let handle = stage.open("a.qcow2", true).unwrap();
    let keep_size = libc::FALLOC_FL_KEEP_SIZE;
    let collapse = libc::FALLOC_FL_COLLAPSE_RANGE;
    let fallocate = |mode, offset, len| stage.fs.fallocate(handle, mode, offset, len);
    assert!(fallocate(keep_size, 0, MIB).is_ok());
    assert_eq!(errno(fallocate(keep_size, 0, MIB + 512)), Errno::EOPNOTSUPP);
    assert_eq!(errno(fallocate(collapse, 0, 512)), Errno::EOPNOTSUPP);
    assert_eq!(errno(fallocate(0, 0, MIB + 1)), Errno::EINVAL);
    assert_eq!(errno(fallocate(0, 0, 0)), Errno::EINVAL);
    assert_eq!(lock(&stage.shelf).allocated, [(0, MIB)]);
    assert_eq!(stage.lookup("a.qcow2").unwrap().size, MIB);
}

#[test]
fn fallocate_zeroes_with_space_and_without() {
    let stage = Stage::new(&[("a.qcow2", "size=1048576")]);
    let handle = stage.open("a.qcow2", true).unwrap();
    let keep_size = libc::FALLOC_FL_KEEP_SIZE;
    let punch = keep_size | libc::FALLOC_FL_PUNCH_HOLE;
    let zero = libc::FALLOC_FL_ZERO_RANGE;
    let fallocate = |mode, offset, len| stage.fs.fallocate(handle, mode, offset, len);
    fallocate(punch, 3, 7).unwrap();
    fallocate(punch, MIB - 512, MIB).unwrap();
    fallocate(punch, MIB, MIB).unwrap();
    fallocate(zero | keep_size, MIB - 5, MIB).unwrap();
    assert_eq!(stage.lookup("a.qcow2").unwrap().size, MIB);
    fallocate(zero, MIB - 5, 512).unwrap();
    assert_eq!(stage.lookup("a.qcow2").unwrap().size, MIB + 512);
    assert_eq!(
        lock(&stage.shelf).zeroed,
        [
            (3, 7, Space::Released),
            (MIB - 512, 512, Space::Released),
            (MIB - 5, 5, Space::Kept),
            (MIB - 5, 512, Space::Kept),
        ]
    );
}

#[test]
fn holes_are_found_and_the_end_is_one() {
    let stage = Stage::new(&[("a.qcow2", "size=2097152")]);
    let handle = stage.open("a.qcow2", false).unwrap();
    let seek = |offset, whence| stage.fs.lseek(handle, offset, whence);
    assert_eq!(seek(5, Seek::Data).unwrap(), 5);
    assert_eq!(seek(5, Seek::Hole).unwrap(), MIB);
    assert_eq!(seek(MIB + 5, Seek::Hole).unwrap(), MIB + 5);
    assert_eq!(errno(seek(MIB + 5, Seek::Data)), Errno::ENXIO);
    assert_eq!(errno(seek(2 * MIB, Seek::Hole)), Errno::ENXIO);
}

#[test]
fn a_disk_without_holes_has_one_at_its_end() {
    let stage = Stage::new(&[("a.qcow2", "size=1048576")]);
    let handle = stage.open("a.qcow2", false).unwrap();
    assert_eq!(stage.fs.lseek(handle, 0, Seek::Hole).unwrap(), MIB);
}

#[test]
fn a_backing_image_is_read_only_unless_asked_for() {
    let files = [
        ("base.raw", "content"),
        ("sub/over.qcow2", "size=512 backing=../base.raw"),
    ];
    let stage = Stage::new(&files);
    assert_eq!(errno(stage.open("base.raw", true)), Errno::EROFS);
    assert_eq!(errno(stage.truncate("base.raw", 512)), Errno::EROFS);
    let allowed = Options {
        rw_backing: true,
        ..options()
    };
    let stage = Stage::with(&files, allowed);
    // The fake library knows no raw images; what counts is that it was asked.
    assert_ne!(errno_of(stage.open("base.raw", true)), Some(Errno::EROFS));
}

fn errno_of<T>(result: Result<T>) -> Option<Errno> {
    result.err().map(|error| error.errno)
}

#[test]
fn a_data_file_is_part_of_its_image_and_not_shown() {
    let stage = Stage::new(&[
        ("a.qcow2", "size=512 data=a.raw"),
        ("a.raw", "content"),
        ("b.raw", "content"),
    ]);
    assert_eq!(errno(stage.lookup("a.raw")), Errno::ENOENT);
    assert_eq!(stage.listing(), ["a.qcow2", "b.raw"]);
    std::fs::remove_file(stage.dir.path().join("a.qcow2")).unwrap();
    assert_eq!(stage.listing(), ["a.raw", "b.raw"]);
}

/// Makes another user the owner of an image; only root can.
fn give_away(stage: &Stage, name: &str) -> bool {
    std::os::unix::fs::chown(stage.dir.path().join(name), Some(4242), None).is_ok()
}

fn permit(stage: &Stage, name: &str, mode: u32) {
    let mode = std::fs::Permissions::from_mode(mode);
    std::fs::set_permissions(stage.dir.path().join(name), mode).unwrap();
}

#[test]
fn an_image_hides_no_data_file_that_its_owner_may_not_write() {
    let stage = Stage::new(&[("a.qcow2", "size=512 data=a.raw"), ("a.raw", "content")]);
    let foreign = give_away(&stage, "a.qcow2");
    for (mode, hidden) in [(0o600, !foreign), (0o644, !foreign), (0o666, true)] {
        permit(&stage, "a.raw", mode);
        assert_eq!(stage.lookup("a.raw").is_err(), hidden, "{mode:o}");
    }
}

#[test]
fn a_moved_image_still_names_its_files_and_a_deleted_one_does_not() {
    let stage = Stage::new(&[
        ("base.qcow2", "size=512"),
        ("over.qcow2", "size=512 backing=base.qcow2"),
    ]);
    let is_frozen = || errno_of(stage.open("base.qcow2", true)) == Some(Errno::EROFS);
    assert!(is_frozen());
    let at = |name| stage.dir.path().join(name);
    std::fs::rename(at("over.qcow2"), at("moved.qcow2")).unwrap();
    assert!(is_frozen());
    // The name under which it was known is gone, and found to be gone.
    assert!(is_frozen());
    std::fs::remove_file(at("moved.qcow2")).unwrap();
    assert!(!is_frozen());
}

#[test]
fn what_cannot_be_looked_at_for_the_moment_still_names_its_files() {
    let stage = Stage::new(&[
        ("base.raw", "content"),
        ("over.qcow2", "size=512 backing=base.raw"),
    ]);
    assert_eq!(errno(stage.open("base.raw", true)), Errno::EROFS);
    lock(&stage.shelf).fail_describe = Some(Errno::ENOMEM);
    touch(&stage, &["over.qcow2"]);
    assert_eq!(errno(stage.open("base.raw", true)), Errno::EROFS);
}

#[test]
fn an_image_freezes_no_backing_file_that_its_owner_may_not_read() {
    let stage = Stage::new(&[
        ("base.qcow2", "size=512"),
        ("over.qcow2", "size=512 backing=base.qcow2"),
    ]);
    let foreign = give_away(&stage, "over.qcow2");
    for (mode, frozen) in [(0o600, !foreign), (0o604, true)] {
        permit(&stage, "base.qcow2", mode);
        let opened = errno_of(stage.open("base.qcow2", true));
        assert_eq!(opened == Some(Errno::EROFS), frozen, "{mode:o}");
    }
}

#[test]
fn a_read_only_mount_refuses_every_change() {
    let read_only = Options {
        read_only: true,
        ..options()
    };
    let stage = Stage::with(&[("a.qcow2", "size=512")], read_only);
    assert_eq!(errno(stage.open("a.qcow2", true)), Errno::EROFS);
    assert_eq!(errno(stage.truncate("a.qcow2", MIB)), Errno::EROFS);
    assert!(stage.open("a.qcow2", false).is_ok());
}

#[test]
fn a_replaced_image_is_another_file() {
    let stage = Stage::new(&[("a.qcow2", "size=512")]);
    let old = stage.lookup("a.qcow2").unwrap().id;
    let path = stage.dir.path();
    std::fs::write(path.join("new"), "size=1024").unwrap();
    std::fs::rename(path.join("new"), path.join("a.qcow2")).unwrap();
    assert_eq!(errno(stage.fs.getattr(old)), Errno::ESTALE);
    let new = stage.lookup("a.qcow2").unwrap();
    assert_ne!(new.id, old);
    assert_eq!(new.size, 1024);
}

#[test]
fn attributes_go_to_the_source() {
    let stage = Stage::new(&[("a.qcow2", "size=512")]);
    let id = stage.lookup("a.qcow2").unwrap().id;
    let changes = Changes {
        perm: Some(0o640),
        mtime: Some(super::NewTime::At(super::Time { sec: 7, nsec: 9 })),
        ..Changes::default()
    };
    let changed = stage.fs.setattr(id, None, &changes).unwrap();
    assert_eq!(changed.stat.perm, 0o640);
    let metadata = std::fs::metadata(stage.dir.path().join("a.qcow2")).unwrap();
    assert_eq!(metadata.mode() & 0o7777, 0o640);
    assert_eq!((metadata.mtime(), metadata.mtime_nsec()), (7, 9));
}

#[test]
fn what_the_kernel_has_cached_is_kept_unless_somebody_else_changed_it() {
    let stage = Stage::new(&[("a.qcow2", "size=512")]);
    let opens = || {
        let (id, opened) = stage.open_as_the_kernel_does("a.qcow2", false);
        stage.fs.flush(opened.handle).unwrap();
        stage.fs.release(opened.handle);
        assert!(opened.keep_cache, "its file has no cache that is wrong");
        id
    };
    let first = opens();
    assert_eq!(opens(), first, "nothing has happened in between");
    let path = stage.dir.path().join("a.qcow2");
    std::fs::write(&path, "size=1024").unwrap();
    let second = opens();
    assert_ne!(second, first, "the image has changed");
    let busy = stage.fs.open(second, true).unwrap();
    stage.fs.write(busy.handle, 0, b"x").unwrap();
    assert_eq!(opens(), second, "all changes come through the mount");
}

#[test]
fn a_time_that_is_given_to_a_closed_image_is_no_change_of_somebody_else() {
    let stage = Stage::new(&[("a.qcow2", "size=512")]);
    let open_and_close = || {
        let (id, opened) = stage.open_as_the_kernel_does("a.qcow2", true);
        stage.fs.flush(opened.handle).unwrap();
        stage.fs.release(opened.handle);
        id
    };
    let id = open_and_close();
    let changes = Changes {
        mtime: Some(super::NewTime::At(super::Time { sec: 7, nsec: 9 })),
        ..Changes::default()
    };
    stage.fs.setattr(id, None, &changes).unwrap();
    assert_eq!(open_and_close(), id);
}

#[test]
fn a_change_of_an_image_that_is_open_and_idle_drops_what_is_cached() {
    let stage = Stage::new(&[("a.qcow2", "size=512")]);
    let (id, opened) = stage.open_as_the_kernel_does("a.qcow2", false);
    stage.fs.flush(opened.handle).unwrap();
    let path = stage.dir.path().join("a.qcow2");
    std::fs::write(&path, "size=1024").unwrap();
    let (same, again) = stage.open_as_the_kernel_does("a.qcow2", false);
    assert_eq!((same, again.keep_cache), (id, false));
}

#[test]
fn a_change_of_an_idle_image_reaches_the_kernel() {
    let stage = Stage::new(&[("a.qcow2", "size=512")]);
    let told: Arc<Mutex<Vec<(NodeId, Stale)>>> = Arc::default();
    let tell = Arc::clone(&told);
    stage
        .fs
        .set_invalidate(Box::new(move |id, what| lock(&tell).push((id, what))));
    let handle = stage.open("a.qcow2", false).unwrap();
    stage.fs.flush(handle).unwrap();
    assert!(stage.fs.flush_all());
    assert_eq!(*lock(&told), []);
    std::fs::write(stage.dir.path().join("a.qcow2"), "size=1024").unwrap();
    let id = stage.lookup("a.qcow2").unwrap().id;
    assert!(stage.fs.flush_all());
    assert!(stage.fs.flush_all());
    assert_eq!(*lock(&told), [(id, Stale::Content)]);
}
