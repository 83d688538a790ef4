//! Plans that make files, put them in the place of others, and remove those.

mod interrupted;

use super::faulty::Faulty;
use super::{Fixture, Script, facts, lock_elsewhere, told};
use crate::image::{Access, ErrorKind, Image, OpenOptions, ResizeOptions};
use crate::sandbox::{CallError, Files};
use instar_guest::facts::NamedFile;
use instar_guest::plan::{NewName, Plan, Purpose, Stage, Step};
use instar_guest::proto::PlanReply;
use instar_guest::{Extent, ExtentKind, Facts, FileNo, Reply, Request};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::PathBuf;
use xattr::FileExt;

const PART: u64 = 4096;

/// A made-up format: a file that names its extents, one on a line, each with
/// a part of the disk.
fn answer(
    request: &Request,
    files: &mut dyn Files,
    plan: &impl Fn(u64) -> Plan,
) -> Result<Reply, CallError> {
    Ok(match *request {
        Request::Open { .. } | Request::Attach { .. } => Reply::Opened(facts_in(files)),
        Request::Map { offset, len } => {
            let extent = |part| Extent {
                offset: part * PART,
                len: PART,
                kind: ExtentKind::Data {
                    file: FileNo(1 + part as u32),
                    at: 0,
                    in_place: true,
                },
            };
            Reply::Extents((offset / PART..(offset + len) / PART).map(extent).collect())
        }
        Request::Resize { size, .. } => Reply::Plan(PlanReply {
            plan: plan(size),
            ..PlanReply::default()
        }),
        ref other => panic!("{other:?}"),
    })
}

fn facts_in(files: &mut dyn Files) -> Facts {
    let mut content = vec![0; files.len(FileNo::IMAGE).unwrap() as usize];
    files
        .read_at(
            FileNo::IMAGE,
            0,
            vm_memory::VolatileSlice::from(&mut content[..]),
        )
        .unwrap();
    let text = String::from_utf8(content).unwrap();
    let named: Vec<NamedFile> = text
        .lines()
        .map(|line| NamedFile {
            name: line.to_string(),
            format: None,
        })
        .collect();
    Facts {
        files_first: true,
        virtual_size: PART * named.len() as u64,
        files: named,
        ..facts(0, 512)
    }
}

/// `image`, which names `image-1` and `image-2`.
struct Rig {
    fixture: Fixture,
    log: Faulty,
}

const OLD: &str = "image-1\nimage-2\n";

impl Rig {
    fn new() -> Self {
        let fixture = Fixture::new(OLD.as_bytes());
        for number in [1, 2] {
            let name = format!("image-{number}");
            std::fs::write(fixture.path.with_file_name(name), [number; PART as usize]).unwrap();
        }
        Self {
            fixture,
            log: Faulty::default(),
        }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.fixture.path.with_file_name(name)
    }

    fn open(&self, plan: fn(u64) -> Plan) -> Image {
        let mut options = OpenOptions::new(Access::Write);
        options.effects = self.log.hook();
        let script =
            Script(move |request: &Request, files: &mut dyn Files| answer(request, files, &plan));
        self.fixture.open(&options, script)
    }

    /// The names in the directory.
    fn names(&self) -> Vec<String> {
        let dir = std::fs::read_dir(self.fixture.path.parent().unwrap()).unwrap();
        let name = |entry: std::io::Result<std::fs::DirEntry>| entry.unwrap().file_name();
        let mut names: Vec<String> = dir
            .map(|entry| name(entry).to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }

    fn is_as_it_was(&self) {
        assert_eq!(self.names(), ["image", "image-1", "image-2"]);
        assert_eq!(self.fixture.content(), OLD.as_bytes());
        for number in [1, 2] {
            let content = std::fs::read(self.at(&format!("image-{number}"))).unwrap();
            assert!(content == [number; PART as usize]);
        }
    }
}

fn stage(purpose: Purpose, steps: Vec<Step>) -> Stage {
    Stage { purpose, steps }
}

fn replace_by(file: u32, content: &str) -> [Step; 2] {
    let file = FileNo(file);
    [
        Step::Create {
            file,
            name: NewName::Replacement,
        },
        Step::Write {
            file,
            offset: 0,
            data: content.as_bytes().to_vec(),
        },
    ]
}

fn rename(file: u32) -> Stage {
    let step = Step::Rename {
        file: FileNo(file),
        over: FileNo::IMAGE,
    };
    stage(Purpose::Commit, vec![step])
}

/// A third extent, and a descriptor that names it.
fn growing(_size: u64) -> Plan {
    let (file, len) = (FileNo(3), PART);
    let extent = Step::Create {
        file,
        name: NewName::Plain("image-3".to_string()),
    };
    let mut steps = vec![extent, Step::SetLength { file, len }];
    steps.extend(replace_by(4, "image-1\nimage-2\nimage-3\n"));
    Plan {
        stages: vec![stage(Purpose::Prepare, steps), rename(4)],
    }
}

/// A descriptor without the second extent, which goes.
fn shrinking(_size: u64) -> Plan {
    let steps = replace_by(3, "image-1\n").to_vec();
    let unlink = Step::Unlink { file: FileNo(2) };
    Plan {
        stages: vec![
            stage(Purpose::Prepare, steps),
            rename(3),
            stage(Purpose::Release, vec![unlink]),
        ],
    }
}

fn grow(image: &Image) -> Result<(), (ErrorKind, String)> {
    let grown = image.resize(3 * PART, &ResizeOptions::default());
    grown.map(drop).map_err(|error| told(&error))
}

fn shrink(image: &Image) -> Result<(), (ErrorKind, String)> {
    let how = ResizeOptions {
        shrink: true,
        ..ResizeOptions::default()
    };
    let shrunk = image.resize(PART, &how);
    shrunk.map(drop).map_err(|error| told(&error))
}

#[test]
fn an_extent_and_a_new_descriptor_grow_the_disk() {
    let rig = Rig::new();
    let image = rig.open(growing);
    grow(&image).unwrap();
    assert_eq!(
        rig.log.take(),
        [
            "create image-3 of 3",
            "create replacement of 4",
            "set_len 4096 of 3",
            "write 0+24 of 4",
            "sync of 3",
            "sync of 4",
            "sync names",
            "rename over 0 of 4",
            "sync names",
        ]
    );
    assert_eq!(image.counters().fdatasyncs, 4);
    assert_eq!(rig.names(), ["image", "image-1", "image-2", "image-3"]);
    assert_eq!(image.virtual_size(), 3 * PART);
    assert_eq!(image.facts().files.len(), 3);
    let mut content = vec![9; 3 * PART as usize];
    image.read_at(&mut content, 0).unwrap();
    let expected = [1, 2, 0].map(|byte| [byte; PART as usize]).concat();
    assert!(content == expected);
    image.write_at(&[7; 4], 2 * PART).unwrap();
    image.flush().unwrap();
    assert_eq!(std::fs::read(rig.at("image-3")).unwrap()[..4], [7; 4]);
}

#[test]
fn files_that_a_plan_made_are_the_images_own_and_locked() {
    let rig = Rig::new();
    let image = rig.open(growing);
    grow(&image).unwrap();
    for name in rig.names() {
        let error = lock_elsewhere(&rig.at(&name)).unwrap_err();
        assert_eq!(error, ErrorKind::Locked, "{name}");
    }
    image.unlock().unwrap();
    for name in rig.names() {
        drop(lock_elsewhere(&rig.at(&name)).unwrap());
    }
    image.lock().unwrap();
    drop(image);
    for name in rig.names() {
        drop(lock_elsewhere(&rig.at(&name)).unwrap());
    }
}

#[test]
fn an_extent_that_is_not_named_any_more_goes_after_the_commit() {
    let rig = Rig::new();
    let image = rig.open(shrinking);
    shrink(&image).unwrap();
    assert_eq!(
        rig.log.take()[2..],
        [
            "sync of 3",
            "sync names",
            "rename over 0 of 3",
            "sync names",
            "unlink of 2",
            "sync names",
        ]
    );
    assert_eq!(rig.names(), ["image", "image-1"]);
    assert_eq!(image.virtual_size(), PART);
    assert_eq!(image.files.numbers().count(), 2);
    let mut content = vec![9; PART as usize];
    image.read_at(&mut content, 0).unwrap();
    assert!(content == [1; PART as usize]);
}

#[test]
fn a_grown_image_shrinks_again() {
    let rig = Rig::new();
    let image = rig.open(|size| match size > 2 * PART {
        true => growing(size),
        false => {
            let mut plan = shrinking(size);
            // Numbers after the growth: three extents.
            plan.stages[0].steps = replace_by(4, "image-1\n").to_vec();
            plan.stages[1] = rename(4);
            let unlink = |file| Step::Unlink { file: FileNo(file) };
            plan.stages[2].steps = vec![unlink(2), unlink(3)];
            plan
        }
    });
    grow(&image).unwrap();
    shrink(&image).unwrap();
    assert_eq!(rig.names(), ["image", "image-1"]);
    assert_eq!(image.virtual_size(), PART);
}

#[test]
fn a_replacement_looks_like_what_it_replaces() {
    let rig = Rig::new();
    let path = &rig.fixture.path;
    std::fs::set_permissions(path, PermissionsExt::from_mode(0o640)).unwrap();
    let has_attributes = std::fs::File::open(path)
        .unwrap()
        .set_xattr("user.note", b"kept")
        .is_ok();
    if nix::unistd::getuid().is_root() {
        for name in rig.names() {
            chown(rig.at(&name), Some(4242), Some(4343)).unwrap();
        }
        chown(path.parent().unwrap(), Some(4242), None).unwrap();
    }
    let before = std::fs::metadata(path).unwrap();
    let image = rig.open(growing);
    grow(&image).unwrap();
    for name in ["image", "image-3"] {
        let after = std::fs::metadata(rig.at(name)).unwrap();
        assert_ne!(after.ino(), before.ino());
        assert_eq!(
            (after.mode(), after.uid(), after.gid()),
            (before.mode(), before.uid(), before.gid()),
            "{name}"
        );
        if has_attributes {
            let file = std::fs::File::open(rig.at(name)).unwrap();
            assert_eq!(
                file.get_xattr("user.note").unwrap().as_deref(),
                Some(&b"kept"[..])
            );
        }
    }
}

/// An access list (xattr(7), acl(5)): what its owner, user 4242 and the group
/// may do is everything, others nothing.
fn access_list() -> Vec<u8> {
    const NOBODY: u32 = u32::MAX;
    let entry = |(tag, allowed, id): (u16, u16, u32)| {
        [
            &tag.to_le_bytes()[..],
            &allowed.to_le_bytes(),
            &id.to_le_bytes(),
        ]
        .concat()
    };
    let entries = [
        (0x01, 7, NOBODY),
        (0x02, 7, 4242),
        (0x04, 7, NOBODY),
        (0x10, 7, NOBODY),
        (0x20, 0, NOBODY),
    ];
    [2u32.to_le_bytes().to_vec(), entries.map(entry).concat()].concat()
}

#[test]
fn a_replacement_is_open_to_nobody_whom_the_directory_lets_in() {
    let rig = Rig::new();
    let dir = std::fs::File::open(rig.fixture.path.parent().unwrap()).unwrap();
    if dir
        .set_xattr("system.posix_acl_default", &access_list())
        .is_err()
    {
        // The filesystem has no access lists.
        return;
    }
    grow(&rig.open(growing)).unwrap();
    let list = |name| {
        let file = std::fs::File::open(rig.at(name)).unwrap();
        file.get_xattr("system.posix_acl_access").unwrap()
    };
    // The list works: what the directory makes gets it.
    std::fs::write(rig.at("probe"), "").unwrap();
    assert!(list("probe").is_some());
    assert_eq!(["image", "image-3"].map(list), [None, None]);
}

/// An image of one user whose second extent is another's, in a directory of
/// the other's.
fn across_users() -> Rig {
    let rig = Rig::new();
    let sub = rig.at("sub");
    std::fs::create_dir(&sub).unwrap();
    std::fs::rename(rig.at("image-2"), sub.join("image-2")).unwrap();
    std::fs::write(rig.at("image"), "image-1\nsub/image-2\n").unwrap();
    let dir = rig.fixture.path.parent().unwrap().to_path_buf();
    for path in [rig.at("image"), rig.at("image-1"), dir] {
        chown(path, Some(4242), None).unwrap();
    }
    for (path, mode) in [(sub.join("image-2"), 0o666), (sub, 0o755)] {
        std::fs::set_permissions(&path, PermissionsExt::from_mode(mode)).unwrap();
        chown(path, Some(4343), None).unwrap();
    }
    rig
}

#[test]
fn a_file_goes_only_where_the_images_owner_could_remove_it() {
    if !nix::unistd::getuid().is_root() {
        return;
    }
    for (mode, may) in [(0o755, false), (0o777, true), (0o1777, false)] {
        let rig = across_users();
        let sub = rig.at("sub");
        std::fs::set_permissions(&sub, PermissionsExt::from_mode(mode)).unwrap();
        let image = rig.open(shrinking);
        let shrunk = shrink(&image);
        assert_eq!(sub.join("image-2").exists(), !may, "{mode:o}");
        match may {
            true => shrunk.unwrap(),
            false => {
                let (kind, text) = shrunk.unwrap_err();
                assert_eq!(kind, ErrorKind::Forbidden);
                assert!(text.starts_with("'image-2' lies in a directory"), "{text}");
                assert_eq!(rig.log.take(), [] as [&str; 0]);
                assert_eq!(rig.names(), ["image", "image-1", "sub"]);
            }
        }
    }
}

#[test]
fn no_name_is_made_where_the_images_owner_could_not_make_it() {
    if !nix::unistd::getuid().is_root() {
        return;
    }
    let rig = Rig::new();
    for name in rig.names() {
        chown(rig.at(&name), Some(4242), None).unwrap();
    }
    let (kind, text) = grow(&rig.open(growing)).unwrap_err();
    assert_eq!(kind, ErrorKind::Forbidden);
    assert!(text.starts_with("'image' lies in a directory"), "{text}");
    assert_eq!(rig.log.take(), [] as [&str; 0]);
    rig.is_as_it_was();
}
