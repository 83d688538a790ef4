//! When an image is flushed, and when its lock goes and comes back.

use super::*;

#[test]
fn closing_flushes_and_unlocks_without_waiting_for_release() {
    let stage = Stage::new(&[("a.qcow2", "size=512")]);
    let handle = stage.open("a.qcow2", true).unwrap();
    stage.fs.write(handle, 0, b"x").unwrap();
    stage.fs.flush(handle).unwrap();
    assert_eq!(stage.events(), ["open to write", "flush", "unlock"]);
    // A loop device goes on after its opener's close.
    stage.fs.write(handle, 1, b"y").unwrap();
    stage.fs.fsync(handle).unwrap();
    assert_eq!(stage.events(), ["lock", "flush"]);
    stage.fs.release(handle);
    assert_eq!(stage.events(), ["unlock", "close"]);
}

#[test]
fn fsync_and_close_ask_also_an_image_that_seems_clean() {
    let stage = Stage::new(&[("a.qcow2", "size=512")]);
    let handle = stage.open("a.qcow2", true).unwrap();
    for call in [Filesystem::fsync, Filesystem::flush] {
        lock(&stage.shelf).events.clear();
        call(&stage.fs, handle).unwrap();
        // It may be in the middle of a flush, and that flush may fail.
        assert!(lock(&stage.shelf).events.contains(&"flush nothing"));
        lock(&stage.shelf).fail_flush = true;
        assert_eq!(errno(call(&stage.fs, handle)), Errno::ENOSPC);
        lock(&stage.shelf).fail_flush = false;
    }
}

#[test]
fn a_handle_in_use_keeps_the_lock_when_another_closes() {
    let stage = Stage::new(&[("a.qcow2", "size=512")]);
    let first = stage.open("a.qcow2", true).unwrap();
    let second = stage.open("a.qcow2", true).unwrap();
    stage.fs.flush(second).unwrap();
    assert_eq!(stage.events(), ["open to write"]);
    stage.fs.flush(first).unwrap();
    assert_eq!(stage.events(), ["unlock"]);
}

#[test]
fn a_late_release_of_another_handle_does_not_keep_the_lock() {
    let stage = Stage::new(&[("a.qcow2", "size=512")]);
    let late = stage.open("a.qcow2", true).unwrap();
    stage.fs.flush(late).unwrap();
    let second = stage.open("a.qcow2", false).unwrap();
    stage.events();
    stage.fs.flush(second).unwrap();
    assert_eq!(stage.events(), ["unlock"]);
}

#[test]
fn the_last_writer_leaves_readers_with_a_lock_for_reading() {
    let stage = Stage::new(&[("a.qcow2", "size=512")]);
    let reader = stage.open("a.qcow2", false).unwrap();
    let writer = stage.open("a.qcow2", true).unwrap();
    assert_eq!(stage.events(), ["open to read", "close", "open to write"]);
    stage.fs.flush(writer).unwrap();
    stage.fs.read(reader, 0, &mut [0; 8]).unwrap();
    assert_eq!(stage.events(), ["close", "open to read"]);
}

#[test]
fn a_writer_whose_image_changed_meanwhile_must_open_it_again() {
    let stage = Stage::new(&[("a.qcow2", "size=512")]);
    let handle = stage.open("a.qcow2", true).unwrap();
    stage.fs.flush(handle).unwrap();
    lock(&stage.shelf).changed_by_others = true;
    assert_eq!(errno(stage.fs.write(handle, 0, b"x")), Errno::ESTALE);
    assert_eq!(errno(stage.fs.write(handle, 0, b"x")), Errno::ESTALE);
    let fresh = stage.open("a.qcow2", true).unwrap();
    assert!(stage.fs.write(fresh, 0, b"x").is_ok());
}

#[test]
fn a_change_after_the_lock_for_writing_went_is_seen_by_an_idle_writer() {
    let stage = Stage::new(&[("a.qcow2", "size=512")]);
    let _reader = stage.open("a.qcow2", false).unwrap();
    let writer = stage.open("a.qcow2", true).unwrap();
    stage.fs.flush(writer).unwrap();
    touch(&stage, &["a.qcow2"]);
    assert_eq!(errno(stage.fs.write(writer, 0, b"x")), Errno::ESTALE);
}

#[test]
fn a_change_before_a_reader_becomes_a_writer_is_seen_by_an_idle_writer() {
    let stage = Stage::new(&[("a.qcow2", "size=512")]);
    let writer = stage.open("a.qcow2", true).unwrap();
    stage.fs.flush(writer).unwrap();
    let reader = stage.open("a.qcow2", false).unwrap();
    stage.fs.flush(reader).unwrap();
    touch(&stage, &["a.qcow2"]);
    assert_eq!(errno(stage.fs.write(writer, 0, b"x")), Errno::ESTALE);
}

#[test]
fn a_change_is_seen_also_after_an_attempt_that_found_the_image_locked() {
    let stage = Stage::new(&[("a.qcow2", "size=512")]);
    let reader = stage.open("a.qcow2", false).unwrap();
    let writer = stage.open("a.qcow2", true).unwrap();
    stage.fs.flush(writer).unwrap();
    lock(&stage.shelf).locked_by_others = true;
    assert_eq!(errno(stage.fs.write(writer, 0, b"x")), Errno::EBUSY);
    touch(&stage, &["a.qcow2"]);
    lock(&stage.shelf).locked_by_others = false;
    stage.fs.read(reader, 0, &mut [0; 8]).unwrap();
    assert_eq!(errno(stage.fs.write(writer, 0, b"x")), Errno::ESTALE);
}

#[test]
fn without_a_change_an_idle_writer_goes_on() {
    let stage = Stage::new(&[("a.qcow2", "size=512")]);
    let _reader = stage.open("a.qcow2", false).unwrap();
    let writer = stage.open("a.qcow2", true).unwrap();
    stage.fs.flush(writer).unwrap();
    lock(&stage.shelf).locked_by_others = true;
    assert_eq!(errno(stage.fs.write(writer, 0, b"x")), Errno::EBUSY);
    lock(&stage.shelf).locked_by_others = false;
    stage.fs.write(writer, 0, b"x").unwrap();
}

#[test]
fn a_locked_image_is_busy_and_says_why() {
    let stage = Stage::new(&[("a.qcow2", "size=512")]);
    lock(&stage.shelf).locked_by_others = true;
    assert_eq!(errno(stage.open("a.qcow2", true)), Errno::EBUSY);
    let id = stage.lookup("a.qcow2").unwrap().id;
    let name = OsStr::new("user.instar.error");
    assert_eq!(stage.fs.getxattr(id, name).unwrap(), b"locked by qemu");
    lock(&stage.shelf).locked_by_others = false;
    stage.open("a.qcow2", true).unwrap();
    assert_eq!(errno(stage.fs.getxattr(id, name)), Errno::ENODATA);
}

#[test]
fn a_flush_that_fails_is_reported_and_the_lock_stays() {
    let stage = Stage::new(&[("a.qcow2", "size=512")]);
    let handle = stage.open("a.qcow2", true).unwrap();
    stage.fs.write(handle, 0, b"x").unwrap();
    lock(&stage.shelf).fail_flush = true;
    assert_eq!(errno(stage.fs.flush(handle)), Errno::ENOSPC);
    assert_eq!(errno(stage.fs.fsync(handle)), Errno::ENOSPC);
    assert!(!stage.fs.flush_all());
    lock(&stage.shelf).fail_flush = false;
    assert!(stage.fs.flush_all());
    assert_eq!(stage.events(), ["open to write", "flush", "unlock"]);
}

#[test]
fn after_the_last_close_a_failed_flush_leaves_neither_lock_nor_cache() {
    let stage = Stage::new(&[("a.qcow2", "size=512")]);
    let handle = stage.open("a.qcow2", true).unwrap();
    stage.fs.write(handle, 0, b"x").unwrap();
    lock(&stage.shelf).fail_flush = true;
    // The timer remembers what it has complained about.
    let mut failing = Vec::new();
    stage.fs.tick(&mut failing);
    assert_eq!(failing.len(), 1);
    assert_eq!(errno(stage.fs.flush(handle)), Errno::ENOSPC);
    stage.fs.release(handle);
    assert_eq!(stage.events(), ["open to write", "close"]);
    lock(&stage.shelf).fail_flush = false;
    // What is cached and got lost is not seen again.
    let was = stage.lookup("a.qcow2").unwrap().id;
    let (id, _) = stage.open_as_the_kernel_does("a.qcow2", true);
    assert_ne!(id, was);
}

#[test]
fn the_timer_flushes_an_image_in_use() {
    let stage = Stage::new(&[("a.qcow2", "size=512")]);
    let handle = stage.open("a.qcow2", true).unwrap();
    stage.fs.write(handle, 0, b"x").unwrap();
    stage.fs.tick(&mut Vec::new());
    stage.fs.tick(&mut Vec::new());
    // The second time there was nothing to do, and nobody was asked to.
    assert!(!lock(&stage.shelf).events.contains(&"flush nothing"));
    assert_eq!(stage.events(), ["open to write", "flush"]);
}

#[test]
fn neither_the_timer_nor_stat_waits_for_who_works_with_an_image() {
    let stage = Stage::new(&[("a.qcow2", "size=512")]);
    stage.open("a.qcow2", false).unwrap();
    let file = stage.fs.open_files().remove(0);
    file.with(stage.fs.context(), Access::Read, |_| {
        let mut failing = Vec::new();
        stage.fs.tick(&mut failing);
        assert!(failing.is_empty());
        assert_eq!(stage.fs.getattr(file.node.id)?.size, 512);
        Ok(())
    })
    .unwrap();
}
