//! What is appended to a disk grows it by and by.

use super::fake::{FakeLibrary, Shelf};
use super::{Stage, errno, options};
use crate::fs::disk::{At, Disk as _, Library as _};
use crate::fs::sync::lock;
use crate::fs::tail::Tailed;
use crate::fs::{NodeId, Options, Seek, Source};
use crate::image::{Access, Space};
use nix::errno::Errno;
use std::ffi::OsStr;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

const SECTOR: usize = 512;

/// An image of one sector whose end may move in memory first, and a handle.
fn stage() -> (Stage, u64) {
    let stage = Stage::new(&[("a.qcow2", "size=512")]);
    lock(&stage.shelf).gathers = true;
    let handle = stage.open("a.qcow2", true).unwrap();
    stage.events();
    (stage, handle)
}

impl Stage {
    fn append(&self, handle: u64, sectors: std::ops::Range<u8>) {
        for number in sectors {
            let offset = u64::from(number) * SECTOR as u64;
            self.fs.write(handle, offset, &[number; SECTOR]).unwrap();
        }
    }

    #[track_caller]
    fn holds(&self, handle: u64, sectors: u8) {
        let mut found = vec![9; usize::from(sectors) * SECTOR];
        assert_eq!(self.fs.read(handle, 0, &mut found).unwrap(), found.len());
        let expected: Vec<u8> = (0..sectors).flat_map(|number| [number; SECTOR]).collect();
        assert!(found == expected);
    }
}

#[test]
fn what_waits_for_space_keeps_the_image_from_resting() {
    let (stage, handle) = stage();
    stage.fs.tick(&mut Vec::new());
    assert_eq!(lock(&stage.shelf).rested, Some(Options::IDLE));
    lock(&stage.shelf).rested = None;
    stage.append(handle, 1..2);
    lock(&stage.shelf).full = true;
    stage.fs.tick(&mut Vec::new());
    assert_eq!(lock(&stage.shelf).rested, None);
    lock(&stage.shelf).full = false;
    stage.fs.tick(&mut Vec::new());
    assert_eq!(lock(&stage.shelf).rested, Some(Options::IDLE));
}

#[test]
fn many_writes_share_one_growth() {
    let (stage, handle) = stage();
    stage.append(handle, 1..5);
    assert_eq!(stage.events(), [] as [&str; 0]);
    assert_eq!(stage.lookup("a.qcow2").unwrap().size, 5 * 512);
    // They are read from memory, alone and together with what was there.
    let mut two = [0; 2 * SECTOR];
    stage.fs.read(handle, 3 * 512 - 100, &mut two).unwrap();
    assert_eq!((two[0], two[100], two[2 * SECTOR - 1]), (2, 3, 4));
    stage.fs.read(handle, 0, &mut two).unwrap();
    assert_eq!((two[0], two[SECTOR]), (0, 1));
    assert_eq!(stage.events(), [] as [&str; 0]);
    stage.fs.flush(handle).unwrap();
    assert_eq!(stage.events(), ["resize", "flush", "unlock"]);
    stage.append(handle, 0..1);
    stage.holds(handle, 5);
}

#[test]
fn any_other_call_finds_what_was_appended() {
    let (stage, handle) = stage();
    stage.append(handle, 0..3);
    stage.holds(handle, 3);
    stage.append(handle, 3..5);
    stage.append(handle, 4..5);
    stage.append(handle, 5..6);
    stage.fs.fallocate(handle, 0, 0, 4096).unwrap();
    assert_eq!(stage.lookup("a.qcow2").unwrap().size, 4096);
    stage.holds(handle, 6);
}

#[test]
fn there_is_an_end_to_what_is_kept_in_memory() {
    let (stage, handle) = stage();
    let piece = vec![7; 1 << 20];
    for number in 0..6 {
        let offset = 512 + (number << 20);
        stage.fs.write(handle, offset, &piece).unwrap();
    }
    assert_eq!(stage.events(), ["resize"]);
    assert!(stage.fs.flush_all());
    assert_eq!(stage.lookup("a.qcow2").unwrap().size, 512 + (6 << 20));
}

#[test]
fn a_disk_that_cannot_grow_says_so_and_keeps_what_was_appended() {
    let (stage, handle) = stage();
    stage.append(handle, 0..4);
    lock(&stage.shelf).full = true;
    for _ in 0..2 {
        assert_eq!(errno(stage.fs.fsync(handle)), Errno::ENOSPC);
    }
    lock(&stage.shelf).full = false;
    lock(&stage.shelf).resizes_halfway = true;
    assert_eq!(errno(stage.fs.fsync(handle)), Errno::EIO);
    stage.events();
    stage.fs.fsync(handle).unwrap();
    assert_eq!(stage.events(), ["resize", "flush"]);
    stage.holds(handle, 4);
}

#[test]
fn without_space_for_what_was_appended_the_rest_goes_on() {
    let shrink = Options {
        shrink: true,
        ..options()
    };
    let stage = Stage::with(&[("a.qcow2", "size=1024")], shrink);
    lock(&stage.shelf).gathers = true;
    let handle = stage.open("a.qcow2", true).unwrap();
    stage.append(handle, 0..6);
    lock(&stage.shelf).full = true;
    let mode = libc::FALLOC_FL_KEEP_SIZE | libc::FALLOC_FL_PUNCH_HOLE;
    stage.fs.fallocate(handle, mode, 0, 512).unwrap();
    let in_tail = stage.fs.fallocate(handle, mode, 512, 1024);
    assert_eq!(errno(in_tail), Errno::ENOSPC);
    for (offset, hole) in [(0, 3072), (1024, 3072), (2000, 3072)] {
        let seek = |whence| stage.fs.lseek(handle, offset, whence).unwrap();
        assert_eq!((seek(Seek::Data), seek(Seek::Hole)), (offset, hole));
    }
    // What is in its place becomes durable.
    stage.events();
    assert_eq!(errno(stage.fs.fsync(handle)), Errno::ENOSPC);
    assert_eq!(stage.events(), ["flush"]);
    // A part of it has no space either, and then all of it is still there.
    assert_eq!(errno(stage.truncate("a.qcow2", 2048)), Errno::ENOSPC);
    stage.holds(handle, 6);
    stage.truncate("a.qcow2", 1024).unwrap();
    stage.fs.fsync(handle).unwrap();
    stage.holds(handle, 2);
    stage.append(handle, 2..6);
    stage.truncate("a.qcow2", 512).unwrap();
    assert_eq!(stage.lookup("a.qcow2").unwrap().size, 512);
}

#[test]
fn a_smaller_size_keeps_what_was_appended_before_it() {
    let shrink = Options {
        shrink: true,
        ..options()
    };
    let stage = Stage::with(&[("a.qcow2", "size=512")], shrink);
    lock(&stage.shelf).gathers = true;
    let handle = stage.open("a.qcow2", true).unwrap();
    stage.append(handle, 1..6);
    stage.truncate("a.qcow2", 3 * 512).unwrap();
    stage.holds(handle, 3);
    stage.fs.fsync(handle).unwrap();
    assert_eq!(stage.lookup("a.qcow2").unwrap().size, 3 * 512);
    stage.holds(handle, 3);
}

#[test]
fn a_flush_does_not_wait_for_a_range_that_is_zeroed() {
    let shelf = Arc::new(Mutex::new(Shelf::default()));
    let directory = tempfile::tempdir().unwrap();
    let path = Path::new("a.qcow2");
    std::fs::write(directory.path().join(path), "size=1024").unwrap();
    let source = Source::open(directory.path()).unwrap();
    let (file, _) = source.open_file(path, true).unwrap();
    let at = At {
        source: &source,
        path,
        format: None,
    };
    let library = FakeLibrary(Arc::clone(&shelf));
    let disk = library.open(at, file, Access::Write).unwrap();
    let tailed = Arc::new(Tailed::new(disk, path.to_path_buf()));
    let flushed = Arc::new(Mutex::new(None));
    let (told, flushing) = (Arc::clone(&flushed), Arc::clone(&tailed));
    lock(&shelf).during_zero = Some(Box::new(move || {
        let (done, is_done) = std::sync::mpsc::channel();
        std::thread::spawn(move || done.send(flushing.flush().is_ok()));
        *lock(&told) = is_done.recv_timeout(Duration::from_secs(5)).ok();
    }));
    tailed.zero(0, 512, Space::Kept).unwrap();
    assert_eq!(*lock(&flushed), Some(true));
}

#[test]
fn what_cannot_wait_grows_the_disk_first() {
    let (stage, handle) = stage();
    // Not at the end, and not a whole sector.
    for (offset, len) in [(1024, SECTOR), (1536, 100)] {
        stage.fs.write(handle, offset, &vec![1; len]).unwrap();
        assert_eq!(stage.events(), ["resize"]);
    }
    lock(&stage.shelf).gathers = false;
    stage.fs.write(handle, 2048, &[1; SECTOR]).unwrap();
    assert_eq!(stage.events(), ["resize"]);
    // Nor where the image has no name any more.
    lock(&stage.shelf).gathers = true;
    stage
        .fs
        .unlink(NodeId::ROOT, OsStr::new("a.qcow2"))
        .unwrap();
    stage.events();
    stage.fs.write(handle, 2560, &[1; SECTOR]).unwrap();
    assert_eq!(stage.events(), ["resize"]);
}
