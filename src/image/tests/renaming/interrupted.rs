//! The same where something fails, was left behind, or stands in the way.

use super::*;

#[test]
fn a_failure_before_the_commit_leaves_nothing_behind() {
    // Everything up to the rename itself.
    for after in 0..8 {
        let rig = Rig::new();
        let image = rig.open(growing);
        rig.log.fail(after, libc::ENOSPC);
        let (kind, text) = grow(&image).unwrap_err();
        assert_eq!(kind, ErrorKind::Os(libc::ENOSPC), "{after}");
        assert!(text.ends_with("; the image is unchanged"), "{text}");
        rig.is_as_it_was();
        if !(4..=6).contains(&after) {
            // No sync has failed: the image is still good.
            let mut content = vec![9; 2 * PART as usize];
            image.read_at(&mut content, 0).unwrap();
            grow(&image).unwrap();
            assert_eq!(image.virtual_size(), 3 * PART);
        }
    }
}

#[test]
fn a_commit_whose_durability_is_unknown_is_told_as_such() {
    let rig = Rig::new();
    let image = rig.open(growing);
    rig.log.fail(8, libc::EIO);
    let (_, text) = grow(&image).unwrap_err();
    let end = "; the image is either unchanged or holds the new size; check it before using it";
    assert!(text.ends_with(end), "{text}");
    // Whatever the name stands for after a crash, its extents are there.
    assert_eq!(rig.names(), ["image", "image-1", "image-2", "image-3"]);
    let error = image.read_at(&mut [0; 4], 0).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Lost);
}

#[test]
fn what_cannot_be_removed_after_the_commit_changes_nothing_in_it() {
    let rig = Rig::new();
    let image = rig.open(shrinking);
    rig.log.fail(6, libc::EACCES);
    let (_, text) = shrink(&image).unwrap_err();
    let end = "; the image holds the new size, but space that it no longer uses is not released";
    assert!(text.ends_with(end), "{text}");
    assert_eq!(rig.names(), ["image", "image-1", "image-2"]);
    // The image goes on with what it is now.
    assert_eq!(image.virtual_size(), PART);
    let mut content = vec![9; PART as usize];
    image.read_at(&mut content, 0).unwrap();
    assert!(content == [1; PART as usize]);
}

#[test]
fn what_an_interrupted_run_left_is_replaced() {
    let rig = Rig::new();
    std::fs::write(rig.at("image.instar-new"), "left over").unwrap();
    let image = rig.open(growing);
    grow(&image).unwrap();
    assert_eq!(rig.names(), ["image", "image-1", "image-2", "image-3"]);
    let expected = b"image-1\nimage-2\nimage-3\n";
    assert_eq!(rig.fixture.content(), expected);
    // A link under the name is removed, not followed.
    let rig = Rig::new();
    std::fs::write(rig.at("image-4"), "precious").unwrap();
    symlink("image-4", rig.at("image.instar-new")).unwrap();
    grow(&rig.open(growing)).unwrap();
    assert_eq!(std::fs::read(rig.at("image-4")).unwrap(), b"precious");
    assert_eq!(rig.fixture.content(), expected);
}

/// Removes what is left under two names, and the replacement.
fn removing(_size: u64) -> Plan {
    let names = ["image-3", "image-4"].map(|name| NewName::Plain(name.to_string()));
    let names = names.into_iter().chain([NewName::Replacement]);
    let steps = names.map(|name| Step::Remove { name }).collect();
    Plan {
        stages: vec![stage(Purpose::Release, steps)],
    }
}

fn clear(image: &Image) -> Result<(), (ErrorKind, String)> {
    let cleared = image.resize(image.virtual_size(), &ResizeOptions::default());
    cleared.map(drop).map_err(|error| told(&error))
}

#[test]
fn other_files_that_it_left_go_by_their_names() {
    let rig = Rig::new();
    std::fs::write(rig.at("image.instar-new"), "left over").unwrap();
    std::fs::write(rig.at("image-3"), "left over, too").unwrap();
    std::fs::write(rig.at("image-5"), "not named").unwrap();
    let image = rig.open(removing);
    clear(&image).unwrap();
    let expected = [
        "remove image-3",
        "remove image-4",
        "remove replacement",
        "sync names",
    ];
    assert_eq!(rig.log.take(), expected);
    assert_eq!(rig.names(), ["image", "image-1", "image-2", "image-5"]);
    // That nothing is there any more is as good.
    clear(&image).unwrap();
    std::fs::remove_file(rig.at("image-5")).unwrap();
    rig.is_as_it_was();
}

#[test]
fn what_was_left_goes_only_where_it_is_a_file_of_its_own_and_in_nobodys_use() {
    let left = |make: &dyn Fn(&Rig)| {
        let rig = Rig::new();
        std::fs::write(rig.at("image.instar-new"), "left over").unwrap();
        make(&rig);
        let before = rig.names();
        let refused = clear(&rig.open(removing)).unwrap_err();
        assert!(rig.log.take().is_empty());
        assert_eq!(rig.names(), before);
        refused
    };
    let precious = |rig: &Rig| std::fs::write(rig.at("image-3"), "precious").unwrap();
    let (kind, text) = left(&|rig| {
        precious(rig);
        std::fs::hard_link(rig.at("image-3"), rig.at("other")).unwrap();
    });
    assert_eq!(kind, ErrorKind::Unsupported);
    assert!(text.starts_with("'image-3' has 2 names"), "{text}");
    left(&|rig| symlink("nowhere", rig.at("image-3")).unwrap());
    left(&|rig| std::fs::create_dir(rig.at("image-3")).unwrap());
    // An extent that is reached by a link.
    let (kind, _) = left(&|rig| {
        std::fs::rename(rig.at("image-2"), rig.at("image-3")).unwrap();
        symlink("image-3", rig.at("image-2")).unwrap();
    });
    assert_eq!(kind, ErrorKind::Locked);
    let held = std::cell::Cell::new(None);
    let (kind, _) = left(&|rig| {
        precious(rig);
        held.set(Some(lock_elsewhere(&rig.at("image-3")).unwrap()));
    });
    assert_eq!(kind, ErrorKind::Locked);
    if nix::unistd::getuid().is_root() {
        for (name, owner) in [("image", 4242), ("image-3", 4343)] {
            let (kind, text) = left(&|rig| {
                precious(rig);
                let dir = rig.fixture.path.parent().unwrap();
                std::fs::set_permissions(dir, PermissionsExt::from_mode(0o1777)).unwrap();
                for own in ["image", "image-1", "image-2", "image-3"] {
                    chown(rig.at(own), Some(4242), None).unwrap();
                }
                chown(rig.at(name), Some(owner), None).unwrap();
                if name == "image" {
                    // The owner of the directory could remove it, and not use it.
                    chown(dir, Some(4242), None).unwrap();
                    chown(rig.at("image-3"), Some(4343), None).unwrap();
                }
            });
            assert_eq!(kind, ErrorKind::Forbidden, "{text}");
        }
    }
}

#[test]
fn a_new_extent_never_takes_the_place_of_a_file() {
    for link in [false, true] {
        let rig = Rig::new();
        std::fs::write(rig.at("image.instar-new"), "left over").unwrap();
        match link {
            false => std::fs::write(rig.at("image-3"), "precious").unwrap(),
            true => symlink("nowhere", rig.at("image-3")).unwrap(),
        }
        let (kind, text) = grow(&rig.open(growing)).unwrap_err();
        assert_eq!(kind, ErrorKind::Unsupported);
        let expected = "the change needs the name 'image-3', and a file has it that is no part of \
                        the image; move it away, or remove it if an earlier change left it there";
        assert_eq!(text, expected);
        assert!(rig.log.take().is_empty());
        std::fs::remove_file(rig.at("image.instar-new")).unwrap();
        assert_eq!(rig.names(), ["image", "image-1", "image-2", "image-3"]);
        assert_eq!(rig.fixture.content(), OLD.as_bytes());
        if !link {
            assert_eq!(std::fs::read(rig.at("image-3")).unwrap(), b"precious");
        }
    }
}

#[test]
fn a_file_with_other_names_is_not_replaced() {
    for (plan, name) in [
        (growing as fn(u64) -> Plan, "image"),
        (shrinking as fn(u64) -> Plan, "image-2"),
    ] {
        let rig = Rig::new();
        std::fs::hard_link(rig.at(name), rig.at("other")).unwrap();
        let image = rig.open(plan);
        let refusal = match name {
            "image" => grow(&image),
            _ => shrink(&image),
        };
        let text = format!(
            "'{name}' has 2 names (hard links), and the change would leave the old file under \
             the others; remove those, or change a copy"
        );
        assert_eq!(refusal, Err((ErrorKind::Unsupported, text)));
        std::fs::remove_file(rig.at("other")).unwrap();
        rig.is_as_it_was();
        assert_eq!(rig.log.take(), [] as [&str; 0]);
    }
}

#[test]
fn a_link_is_not_replaced_by_a_file() {
    let rig = Rig::new();
    std::fs::rename(rig.at("image"), rig.at("real")).unwrap();
    symlink("real", rig.at("image")).unwrap();
    let text = "'image' is a symbolic link, and the change would replace the link; name the \
                file that it leads to";
    assert_eq!(
        grow(&rig.open(growing)),
        Err((ErrorKind::Unsupported, text.to_string()))
    );
    assert_eq!(rig.names(), ["image", "image-1", "image-2", "real"]);
}

#[test]
fn an_image_that_was_replaced_meanwhile_is_not_replaced_again() {
    let rig = Rig::new();
    let image = rig.open(growing);
    std::fs::rename(rig.at("image-1"), rig.at("image")).unwrap();
    assert_eq!(grow(&image).unwrap_err().0, ErrorKind::Stale);
    assert_eq!(rig.names(), ["image", "image-2"]);
}

#[test]
fn an_extent_that_was_replaced_while_unlocked_is_noticed() {
    let rig = Rig::new();
    let image = rig.open(growing);
    image.unlock().unwrap();
    // The open file is as it was, and has lost its name.
    std::fs::rename(rig.at("image-2"), rig.at("aside")).unwrap();
    std::fs::copy(rig.at("aside"), rig.at("image-2")).unwrap();
    assert_eq!(image.lock().unwrap_err().kind(), ErrorKind::Stale);
    std::fs::rename(rig.at("aside"), rig.at("image-2")).unwrap();
    image.lock().unwrap();
}

#[test]
fn two_copies_of_the_metadata_are_two_commits() {
    let plan = |_| {
        let write = |offset| Step::Write {
            file: FileNo::IMAGE,
            offset,
            data: b"i".to_vec(),
        };
        let commit = |offset| stage(Purpose::Commit, vec![write(offset)]);
        Plan {
            stages: vec![commit(0), commit(8)],
        }
    };
    let unknown = "the image is either unchanged or holds the new size; check it before using it";
    let halfway = "the image holds the new size in part; the same request again finishes it";
    // Each commit is a write and a sync; a write that fails may have happened.
    for (after, text) in [unknown, unknown, halfway, halfway].into_iter().enumerate() {
        let rig = Rig::new();
        let image = rig.open(plan);
        rig.log.fail(after, libc::EIO);
        let (_, found) = grow(&image).unwrap_err();
        assert!(found.ends_with(text), "{after}: {found}");
    }
}
