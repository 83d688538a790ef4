//! Smaller sizes, and images of several files.

use super::fake::MIB;
use super::*;
use crate::fs::disk::Part;
use crate::fs::source::{FileId, Time};
use std::sync::atomic::Ordering;

fn shrinking() -> Options {
    Options {
        shrink: true,
        preallocation: Preallocation::Falloc,
        ..options()
    }
}

#[test]
fn a_write_past_the_end_grows_to_a_whole_sector() {
    let stage = Stage::new(&[("a.qcow2", "size=512")]);
    let handle = stage.open("a.qcow2", true).unwrap();
    stage.fs.write(handle, 1000, b"end").unwrap();
    let mut content = vec![9; 4096];
    assert_eq!(stage.fs.read(handle, 0, &mut content).unwrap(), 1024);
    assert_eq!(&content[1000..1003], b"end");
    assert!(content[..1000].iter().all(|&byte| byte == 0));
    assert_eq!(stage.lookup("a.qcow2").unwrap().size, 1024);
}

#[test]
fn a_write_whose_range_a_shrink_takes_away_grows_the_disk_again() {
    let stage = Stage::with(&[("a.qcow2", "size=1048576")], shrinking());
    let handle = stage.open("a.qcow2", true).unwrap();
    lock(&stage.shelf).shrinks_to = Some(512);
    stage.fs.write(handle, 1000, b"end").unwrap();
    let mut content = vec![9; 4096];
    assert_eq!(stage.fs.read(handle, 0, &mut content).unwrap(), 1024);
    assert_eq!(&content[1000..1003], b"end");
}

#[test]
fn the_size_that_a_disk_has_finishes_a_resize_that_failed_half_way() {
    for tells_unsettled in [false, true] {
        let stage = Stage::new(&[("a.qcow2", "size=512")]);
        lock(&stage.shelf).tells_unsettled = tells_unsettled;
        let handle = stage.open("a.qcow2", true).unwrap();
        lock(&stage.shelf).resizes_halfway = true;
        assert_eq!(errno(stage.truncate("a.qcow2", MIB)), Errno::EIO);
        let id = stage.lookup("a.qcow2").unwrap().id;
        if tells_unsettled {
            // Nobody but the image remembers.
            stage.fs.release(handle);
            stage.fs.forget(id, u64::MAX);
        }
        assert!(lock(&stage.shelf).unsettled);
        stage.truncate("a.qcow2", MIB).unwrap();
        assert!(!lock(&stage.shelf).unsettled);
        // Once it has succeeded there is nothing left to do.
        stage.events();
        stage.truncate("a.qcow2", MIB).unwrap();
        assert!(!stage.events().contains(&"resize"));
    }
}

#[test]
fn the_size_that_a_disk_has_goes_to_the_image_once() {
    for (fixed, asked) in [(false, true), (true, false)] {
        let stage = Stage::with(&[("a.qcow2", "size=512")], shrinking());
        lock(&stage.shelf).fixed = fixed;
        stage.truncate("a.qcow2", 512).unwrap();
        assert_eq!(stage.events().contains(&"resize"), asked);
        stage.truncate("a.qcow2", 512).unwrap();
        assert!(!stage.events().contains(&"resize"));
    }
}

#[test]
fn a_smaller_or_odd_size_is_refused_and_nothing_changes() {
    let stage = Stage::new(&[("a.qcow2", "size=1048576")]);
    assert_eq!(errno(stage.truncate("a.qcow2", 512)), Errno::EPERM);
    assert_eq!(errno(stage.truncate("a.qcow2", 0)), Errno::EPERM);
    assert_eq!(errno(stage.truncate("a.qcow2", 2 * MIB + 1)), Errno::EINVAL);
    let handle = stage.open("a.qcow2", true).unwrap();
    let changes = Changes {
        size: Some(512),
        perm: Some(0o600),
        ..Changes::default()
    };
    let before = stage.lookup("a.qcow2").unwrap();
    assert_eq!(
        errno(stage.fs.setattr(before.id, Some(handle), &changes)),
        Errno::EPERM
    );
    assert_eq!(stage.lookup("a.qcow2").unwrap(), before);
    assert!(stage.truncate("a.qcow2", MIB).is_ok());
}

#[test]
fn a_disk_shrinks_by_name_and_by_handle_where_that_is_allowed() {
    let stage = Stage::with(&[("a.qcow2", "size=1048576")], shrinking());
    stage.truncate("a.qcow2", MIB / 2).unwrap();
    let handle = stage.open("a.qcow2", true).unwrap();
    let changes = Changes {
        size: Some(0),
        ..Changes::default()
    };
    let id = stage.lookup("a.qcow2").unwrap().id;
    let changed = stage.fs.setattr(id, Some(handle), &changes).unwrap();
    assert_eq!(changed.size, 0);
    assert_eq!(stage.fs.read(handle, 0, &mut [1; 512]).unwrap(), 0);
    // The range of a shrink is not allocated; that of the next growth is.
    stage.fs.write(handle, 0, &[7; 512]).unwrap();
    assert_eq!(lock(&stage.shelf).allocated, [(0, 512)]);
}

#[test]
fn an_odd_smaller_size_is_refused_all_the_same() {
    let stage = Stage::with(&[("a.qcow2", "size=1048576")], shrinking());
    assert_eq!(errno(stage.truncate("a.qcow2", 513)), Errno::EINVAL);
    assert_eq!(stage.lookup("a.qcow2").unwrap().size, MIB);
}

#[test]
fn an_image_whose_file_a_resize_replaces_stays_the_same_node() {
    let stage = Stage::with(&[("a.qcow2", "size=1048576")], shrinking());
    let before = stage.lookup("a.qcow2").unwrap();
    let handle = stage.open("a.qcow2", true).unwrap();
    replace(&stage, "a.qcow2", "size=2097152");
    // While the resize is going on, and by name.
    assert_eq!(stage.fs.getattr(before.id).unwrap().id, before.id);
    assert_eq!(stage.lookup("a.qcow2").unwrap().id, before.id);
    replace(&stage, "a.qcow2", "size=4194304");
    assert_eq!(stage.lookup("a.qcow2").unwrap().id, before.id);
    stage.fs.write(handle, 0, b"x").unwrap();
    assert_eq!(stage.fs.getattr(before.id).unwrap().id, before.id);
}

#[test]
fn an_image_that_others_replace_is_another() {
    let stage = Stage::new(&[("a.qcow2", "size=1048576")]);
    let before = stage.lookup("a.qcow2").unwrap();
    stage.open("a.qcow2", true).unwrap();
    replace(&stage, "a.qcow2", "size=2097152");
    lock(&stage.shelf).replaced_by = None;
    assert_eq!(errno(stage.fs.getattr(before.id)), Errno::ESTALE);
    assert_ne!(stage.lookup("a.qcow2").unwrap().id, before.id);
}

/// Puts a new file in the place of an image, as a resize that commits with a
/// rename does.
fn replace(stage: &Stage, name: &str, text: &str) {
    let (new, old) = (stage.dir.path().join("new"), stage.dir.path().join(name));
    std::fs::write(&new, text).unwrap();
    std::fs::rename(&new, &old).unwrap();
    lock(&stage.shelf).replaced_by = Some(old.metadata().unwrap().ino());
}

#[test]
fn the_files_of_an_image_are_hidden_whatever_they_look_like() {
    let stage = Stage::new(&[
        ("a.qcow2", "size=512 data=a-flat.vmdk"),
        ("a-flat.vmdk", "no image of its own"),
        ("b.qcow2", "size=512 data=b.raw"),
        ("b.raw", "content"),
        ("a.qcow2.instar-new", "size=512"),
        (".instar-new-x7", "size=512"),
    ]);
    for part in ["a-flat.vmdk", "b.raw", "a.qcow2.instar-new"] {
        assert_eq!(errno(stage.lookup(part)), Errno::ENOENT, "{part}");
    }
    assert_eq!(stage.listing(), ["a.qcow2", "b.qcow2"]);
}

#[test]
fn a_new_image_hides_its_files_at_once() {
    let stage = Stage::new(&[("a.raw", "content")]);
    stage.lookup("a.raw").unwrap();
    std::thread::sleep(std::time::Duration::from_millis(30));
    stage.lookup("a.raw").unwrap();
    let write = |name, text| std::fs::write(stage.dir.path().join(name), text).unwrap();
    write("b.qcow2", "size=512 data=b.raw");
    write("b.raw", "content");
    assert_eq!(errno(stage.lookup("b.raw")), Errno::ENOENT);
}

/// Images of many files each, and other files, long enough ago for their time
/// stamps to tell every change.
fn crowd(images: usize, parts: usize) -> Stage {
    let mut files = Vec::new();
    for image in 0..images {
        let names = (0..parts).map(|part| format!("p{image}-{part}.raw"));
        files.extend(names.clone().map(|name| (name, String::new())));
        let data: String = names.map(|name| format!(" data={name}")).collect();
        files.push((format!("i{image}.qcow2"), format!("size=512{data}")));
    }
    let files: Vec<_> = files.iter().map(|(a, b)| (&**a, &**b)).collect();
    let stage = Stage::new(&files);
    std::thread::sleep(std::time::Duration::from_millis(30));
    stage
}

/// How often the kernel is asked to follow a path while all is listed and every
/// image looked up.
fn asked_by_ls(images: usize, parts: usize) -> usize {
    let stage = crowd(images, parts);
    let shown = stage.listing();
    assert_eq!(shown.len(), images);
    for name in &shown {
        stage.lookup(name).unwrap();
    }
    stage.fs.source.asked.load(Ordering::Relaxed)
}

#[test]
fn a_listing_asks_for_each_part_a_few_times_however_many_there_are() {
    for (images, parts) in [(1, 200), (20, 10), (40, 5)] {
        let (asked, files) = (asked_by_ls(images, parts), images * (parts + 1));
        assert!(asked < 12 * files, "{asked} for {images} times {parts}");
    }
}

/// How often the kernel is asked to follow a path while one of so many images is
/// removed and another renamed, all of them known.
fn asked_by_changes_of_names(images: usize) -> usize {
    let stage = crowd(images, 0);
    stage.listing();
    lock(&stage.shelf).events.clear();
    stage.fs.source.asked.store(0, Ordering::Relaxed);
    let name = OsStr::new;
    stage.fs.unlink(NodeId::ROOT, name("i0.qcow2")).unwrap();
    let (root, new) = (NodeId::ROOT, name("j1.qcow2"));
    let renamed = stage.fs.rename(root, name("i1.qcow2"), root, new, false);
    renamed.unwrap();
    assert!(!lock(&stage.shelf).events.contains(&"describe"));
    stage.fs.source.asked.load(Ordering::Relaxed)
}

#[test]
fn a_change_of_names_looks_into_no_other_image_and_follows_no_path_to_it() {
    for images in [20, 200] {
        let asked = asked_by_changes_of_names(images);
        assert!(asked < 40, "{asked} for {images}");
    }
}

#[test]
fn a_name_that_leads_out_of_the_directory_is_followed_again_after_a_while() {
    let stage = Stage::new(&[
        ("a.qcow2", "size=512 data=sub/a.raw"),
        ("sub/a.raw", ""),
        ("sub/b.raw", ""),
    ]);
    stage.lookup("a.qcow2").unwrap();
    assert_eq!(errno(stage.lookup("sub/a.raw")), Errno::ENOENT);
    assert!(stage.lookup("sub/b.raw").is_ok());
    let at = |name| stage.dir.path().join(name);
    std::fs::rename(at("sub/b.raw"), at("sub/a.raw")).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(1100));
    assert_eq!(errno(stage.lookup("sub/a.raw")), Errno::ENOENT);
}

#[test]
fn an_image_takes_the_space_of_all_its_files() {
    let stage = Stage::new(&[("a.qcow2", "size=512 data=a.raw"), ("a.raw", "")]);
    std::fs::write(stage.dir.path().join("a.raw"), [1; 1 << 16]).unwrap();
    assert!(stage.lookup("a.qcow2").unwrap().stat.blocks >= 128);
}

#[test]
fn a_change_of_any_of_its_files_drops_what_the_kernel_has_cached() {
    let stage = Stage::new(&[("a.qcow2", "size=512")]);
    let part = |ino, sec| Part {
        id: FileId { dev: 1, ino },
        size: 512,
        mtime: Time::new(sec, 0),
    };
    let far = 1 << 40;
    lock(&stage.shelf).parts = vec![part(1, 0), part(2, far)];
    let reopened = || {
        let (id, opened) = stage.open_as_the_kernel_does("a.qcow2", false);
        stage.fs.release(opened.handle);
        assert!(opened.keep_cache);
        id
    };
    let mut id = reopened();
    assert_eq!(reopened(), id);
    let changed = [
        vec![part(1, 0), part(2, far + 1)],
        // Not the one that changed last.
        vec![part(1, 1), part(2, far + 1)],
        // A file that another has replaced, which keeps its times.
        vec![part(3, 1), part(2, far + 1)],
        vec![part(3, 1)],
    ];
    for parts in changed {
        lock(&stage.shelf).parts = parts;
        let other = reopened();
        assert_ne!(other, id);
        assert_eq!(reopened(), other);
        id = other;
    }
}

#[test]
fn who_asks_for_the_size_during_a_resize_does_not_bring_the_old_one_back() {
    let stage = Stage::new(&[("a.qcow2", "size=512")]);
    let id = stage.lookup("a.qcow2").unwrap().id;
    stage.fs.open(id, false).unwrap();
    let file = stage.fs.open_files().remove(0);
    let (resized, shelf) = (Arc::clone(&file), Arc::clone(&stage.shelf));
    lock(&stage.shelf).after_size = Some(Box::new(move || {
        let mut shelf = lock(&shelf);
        let contents = shelf.content.values_mut();
        contents.for_each(|content| content.resize(1024, 0));
        resized.note_size(1024);
    }));
    assert_eq!(file.virtual_size(), Some(512));
    // Whoever cannot wait for the image gets the size that was noted.
    let (seen, asked) = (Arc::new(Mutex::new(None)), Arc::clone(&file));
    let told = Arc::clone(&seen);
    lock(&stage.shelf).during_open = Some(Box::new(move || {
        *lock(&told) = Some(asked.virtual_size());
    }));
    stage.fs.open(id, true).unwrap();
    assert_eq!(*lock(&seen), Some(Some(1024)));
}
