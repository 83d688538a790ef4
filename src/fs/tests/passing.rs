//! Images that the kernel uses by itself, and files whose size it keeps.

use super::*;
use crate::fs::passage::{Key, OpenWay, no_way};
use std::cell::Cell;
use std::io;
use std::os::fd::BorrowedFd;

/// The kernel lets us, and counts how often it was asked.
fn ways(asked: &Cell<u32>) -> impl Fn(BorrowedFd<'_>) -> io::Result<Key> {
    |_file| {
        asked.set(asked.get() + 1);
        Ok(Box::new(()))
    }
}

impl Stage {
    fn pass(&self, name: &str, writable: bool, way: OpenWay<'_>) -> (u64, bool) {
        let id = self.lookup(name).unwrap().id;
        let opened = self.fs.open_passing(id, writable, way).unwrap();
        (opened.handle, opened.passage.is_some())
    }

    /// What the kernel does by itself to the file.
    fn kernel_writes(&self, name: &str, text: &str) {
        std::fs::write(self.dir.path().join(name), text).unwrap();
    }

    fn tick(&self) {
        self.fs.tick(&mut Vec::new());
    }
}

fn stage() -> Stage {
    Stage::new(&[("a.raw", "size=512"), ("b.qcow2", "size=512")])
}

#[test]
fn all_handles_of_a_raw_image_go_one_way() {
    let (stage, asked) = (stage(), Cell::new(0));
    let way = ways(&asked);
    let (reader, passes) = stage.pass("a.raw", false, &way);
    assert!(passes);
    let (writer, passes) = stage.pass("a.raw", true, &no_way);
    assert!(passes && asked.get() == 1);
    assert!(!stage.pass("b.qcow2", true, &way).1);
    for handle in [reader, writer] {
        stage.fs.release(handle);
    }
    // The first handle decides, for as long as there is one.
    let (_, passes) = stage.pass("a.raw", false, &no_way);
    assert!(!passes && !stage.pass("a.raw", false, &way).1);
    assert_eq!(asked.get(), 1);
}

#[test]
fn no_image_is_passed_through_where_the_mount_forbids_it() {
    let passthrough = false;
    let options = Options {
        passthrough,
        ..options()
    };
    let stage = Stage::with(&[("a.raw", "size=512")], options);
    assert!(!stage.pass("a.raw", true, &ways(&Cell::new(0))).1);
}

#[test]
fn its_size_is_that_of_the_file() {
    let stage = stage();
    let (_, passes) = stage.pass("a.raw", true, &ways(&Cell::new(0)));
    assert!(passes);
    stage.kernel_writes("a.raw", "size=512 and more");
    assert_eq!(stage.lookup("a.raw").unwrap().size, 17);
}

#[test]
fn its_lock_goes_with_a_close_and_comes_back_for_what_is_left() {
    let stage = stage();
    let (handle, _) = stage.pass("a.raw", true, &ways(&Cell::new(0)));
    // Nothing was written so far: that is still to come.
    stage.fs.flush(handle).unwrap();
    assert_eq!(stage.events(), ["open to write"]);
    stage.kernel_writes("a.raw", "size=512 and more");
    stage.fs.flush(handle).unwrap();
    assert_eq!(stage.events(), ["unlock"]);
    stage.tick();
    assert!(stage.events().is_empty());
    stage.tick();
    assert_eq!(stage.events(), ["lock"]);
    stage.tick();
    assert!(stage.events().is_empty());
    stage.fs.release(handle);
    assert_eq!(stage.events(), ["unlock", "close"]);
}

#[test]
fn its_lock_is_asked_for_until_others_have_let_go() {
    let stage = stage();
    let (handle, _) = stage.pass("a.raw", true, &ways(&Cell::new(0)));
    stage.kernel_writes("a.raw", "size=512 and more");
    stage.fs.flush(handle).unwrap();
    lock(&stage.shelf).locked_by_others = true;
    for _ in 0..3 {
        stage.tick();
    }
    lock(&stage.shelf).locked_by_others = false;
    stage.events();
    stage.tick();
    assert_eq!(stage.events(), ["lock"]);
}

/// A disk whose writes the kernel gathers.
fn gathering() -> Stage {
    let options = Options {
        writeback: true,
        ..options()
    };
    Stage::with(&[("a.qcow2", "size=512")], options)
}

#[test]
fn with_writeback_a_file_that_others_changed_is_another() {
    let stage = gathering();
    let was = stage.lookup("a.qcow2").unwrap().id;
    let handle = stage.open("a.qcow2", true).unwrap();
    stage.kernel_writes("a.qcow2", "size=1024 ");
    // As long as it is open, it is the same.
    assert_eq!(stage.lookup("a.qcow2").unwrap().id, was);
    stage.fs.flush(handle).unwrap();
    stage.fs.release(handle);
    assert_eq!(stage.lookup("a.qcow2").unwrap().id, was);
    stage.kernel_writes("a.qcow2", "size=2048  ");
    assert_eq!(errno(stage.fs.open(was, false)), Errno::ESTALE);
    let now = stage.lookup("a.qcow2").unwrap();
    assert!(now.id != was && now.size == 2048);
    assert_eq!(stage.lookup("a.qcow2").unwrap().id, now.id);
}

#[test]
fn with_writeback_a_size_that_was_rounded_up_is_seen_after_the_close() {
    let stage = gathering();
    let was = stage.lookup("a.qcow2").unwrap().id;
    let handle = stage.open("a.qcow2", true).unwrap();
    stage.fs.write_back(handle, 512, b"x").unwrap();
    stage.fs.release(handle);
    assert_ne!(stage.lookup("a.qcow2").unwrap().id, was);
}
