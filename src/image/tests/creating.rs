//! Making images: of several files, over what is there, and from plans that
//! come in parts.

use super::{Fixture, Script, lock_elsewhere, told};
use crate::image::create::create_with;
use crate::image::{Error, ErrorKind, Operation};
use crate::sandbox::{CallError, Files};
use instar_guest::facts::NamedFile;
use instar_guest::plan::{NewName, Plan, Purpose, Stage, Step};
use instar_guest::proto::{Create, PlanReply};
use instar_guest::{FileNo, Format, Reply, Request};
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};

/// More than any disk has. More than a file of ext4 may be long, too: it would
/// fill the disk before it says so.
const HUGE: u64 = 1 << 60;
const SIZE: u64 = HUGE;

struct Rig(Fixture);

impl Rig {
    /// A directory with these files in it.
    fn new(names: &[&str]) -> Self {
        let rig = Self(Fixture::new(b""));
        std::fs::remove_file(&rig.0.path).unwrap();
        for name in names {
            std::fs::write(rig.at(name), "old").unwrap();
        }
        rig
    }

    fn at(&self, name: &str) -> PathBuf {
        self.0.path.with_file_name(name)
    }

    fn create(
        &self,
        answer: impl FnMut(&Request, &mut dyn Files) -> Result<Reply, CallError> + Send,
    ) -> Result<(), Error> {
        create_with(&mut Script(answer), &self.0.path, &request())
            .map(drop)
            .map_err(|fault| fault.at(Operation::Create, &self.0.path))
    }

    /// Makes an image by this plan.
    fn plan(&self, stages: Vec<Stage>) -> Result<(), Error> {
        self.create(move |request, _| {
            assert!(matches!(request, Request::Create { name, .. } if name == "image"));
            Ok(planned(stages.clone()))
        })
    }

    /// Names and contents of all files.
    fn files(&self) -> Vec<(String, String)> {
        let dir = std::fs::read_dir(self.0.path.parent().unwrap()).unwrap();
        let mut files: Vec<_> = dir
            .map(|entry| {
                let path = entry.unwrap().path();
                let name = path.file_name().unwrap().to_string_lossy().into_owned();
                (name, std::fs::read_to_string(&path).unwrap_or_default())
            })
            .collect();
        files.sort();
        files
    }
}

fn request() -> Create {
    Create {
        format: Format::Vmdk,
        size: SIZE,
        options: vec![("preallocation".to_string(), "falloc".to_string())],
        backing: None,
        backing_size: None,
        backing_identity: None,
    }
}

fn files(expected: &[(&str, &str)]) -> Vec<(String, String)> {
    let owned = |&(name, content): &(&str, &str)| (name.to_string(), content.to_string());
    expected.iter().map(owned).collect()
}

fn planned(stages: Vec<Stage>) -> Reply {
    Reply::Plan(PlanReply {
        plan: Plan { stages },
        ..PlanReply::default()
    })
}

fn prepare(steps: Vec<Step>) -> Stage {
    let purpose = Purpose::Prepare;
    Stage { purpose, steps }
}

fn commit(content: &str) -> Stage {
    Stage {
        purpose: Purpose::Commit,
        steps: vec![write(0, 0, content)],
    }
}

fn write(file: u32, offset: u64, content: &str) -> Step {
    Step::Write {
        file: FileNo(file),
        offset,
        data: content.as_bytes().to_vec(),
    }
}

fn extent(file: u32, name: &str) -> Step {
    let (file, name) = (FileNo(file), NewName::Plain(name.to_string()));
    Step::Create { file, name }
}

/// `one` and `two`, and an image that names them.
fn two() -> Vec<Stage> {
    vec![
        prepare(vec![
            extent(1, "one"),
            extent(2, "two"),
            write(1, 0, "1"),
            write(2, 0, "2"),
        ]),
        commit("one two"),
    ]
}

#[test]
fn extents_are_made_beside_the_image() {
    let rig = Rig::new(&[]);
    rig.plan(two()).unwrap();
    let expected = files(&[("image", "one two"), ("one", "1"), ("two", "2")]);
    assert_eq!(rig.files(), expected);
    for name in ["image", "one", "two"] {
        drop(lock_elsewhere(&rig.at(name)).unwrap());
    }
}

#[test]
fn files_that_are_there_are_emptied_and_written_in_place() {
    use std::os::unix::fs::MetadataExt;
    let rig = Rig::new(&["image", "one", "three"]);
    let inode = |name| std::fs::metadata(rig.at(name)).unwrap().ino();
    let before = ["image", "one"].map(inode);
    rig.plan(two()).unwrap();
    assert_eq!(["image", "one"].map(inode), before);
    let expected = [
        ("image", "one two"),
        ("one", "1"),
        ("three", "old"),
        ("two", "2"),
    ];
    assert_eq!(rig.files(), files(&expected));
}

#[test]
fn a_file_in_use_is_found_before_anything_is_touched() {
    for name in ["image", "two"] {
        let rig = Rig::new(&["image", "one", "two"]);
        let before = rig.files();
        let held = lock_elsewhere(&rig.at(name)).unwrap();
        assert_eq!(rig.plan(two()).unwrap_err().kind(), ErrorKind::Locked);
        drop(held);
        assert_eq!(rig.files(), before);
    }
}

#[test]
fn a_directory_or_a_link_under_an_extents_name_is_found_as_early() {
    let rig = Rig::new(&["image"]);
    std::fs::create_dir(rig.at("two")).unwrap();
    let error = rig.plan(two()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Os(libc::EISDIR));
    assert_eq!(rig.files(), files(&[("image", "old"), ("two", "")]));
    let rig = Rig::new(&["image", "three"]);
    std::os::unix::fs::symlink("three", rig.at("two")).unwrap();
    let error = rig.plan(two()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Os(libc::ELOOP));
    let expected = [("image", "old"), ("three", "old"), ("two", "old")];
    assert_eq!(rig.files(), files(&expected));
}

#[test]
fn the_image_is_not_made_from_itself() {
    let text = "'image' would be a part of the image, and is the image itself or its backing file"
        .to_string();
    let stages = || vec![prepare(vec![extent(1, "image")]), commit("x")];
    for there in [&["image"][..], &[]] {
        let rig = Rig::new(there);
        let before = rig.files();
        let error = rig.plan(stages()).unwrap_err();
        assert_eq!(told(&error), (ErrorKind::InvalidRequest, text.clone()));
        assert_eq!(rig.files(), before);
    }
}

/// Two extents, of which the second takes more than any disk has.
fn too_large() -> Vec<Stage> {
    let mut stages = two();
    let (file, offset, len) = (FileNo(2), 0, HUGE);
    stages[0].steps.push(Step::Reserve { file, offset, len });
    stages
}

/// Disk space is short, or the filesystem has no files of that length.
fn is_full(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::Os(libc::ENOSPC | libc::EFBIG))
}

#[test]
fn what_fails_in_the_middle_leaves_nothing_half_made() {
    let rig = Rig::new(&[]);
    let error = rig.plan(too_large()).unwrap_err();
    assert!(is_full(&error), "{error}");
    assert_eq!(rig.files(), []);
    let rig = Rig::new(&["image", "three"]);
    let error = rig.plan(too_large()).unwrap_err();
    assert!(
        error.message().ends_with("; the file is empty now"),
        "{error}"
    );
    assert_eq!(rig.files(), files(&[("image", ""), ("three", "old")]));
}

#[test]
fn what_was_there_beside_a_failed_image_is_told_to_be_empty() {
    let rig = Rig::new(&["one"]);
    let mut stages = too_large();
    stages[0].steps.push(write(1, 0, "half"));
    let error = rig.plan(stages).unwrap_err();
    let end = "; 'one' is empty now";
    assert!(error.message().ends_with(end), "{error}");
    assert_eq!(rig.files(), files(&[("one", "")]));
}

#[test]
fn the_backing_file_is_no_part_of_the_image_on_it() {
    for there in [&["two"][..], &["image", "two"]] {
        let rig = Rig::new(there);
        let before = rig.files();
        let mut create = request();
        create.backing = Some(NamedFile {
            name: "two".to_string(),
            format: Some("raw".to_string()),
        });
        let mut guest = Script(|_: &Request, _: &mut dyn Files| Ok(planned(two())));
        let fault = create_with(&mut guest, &rig.0.path, &create).unwrap_err();
        assert_eq!(fault.kind, ErrorKind::InvalidRequest);
        let text =
            "'two' would be a part of the image, and is the image itself or its backing file";
        assert_eq!(fault.message, text);
        assert_eq!(rig.files(), before);
    }
}

#[test]
fn a_plan_that_makes_no_image_is_refused_before_anything_is_made() {
    let (file, over) = (FileNo(1), FileNo::IMAGE);
    let rename = Stage {
        purpose: Purpose::Commit,
        steps: vec![Step::Rename { file, over }],
    };
    let replacement = Step::Create {
        file,
        name: NewName::Replacement,
    };
    let lies = [
        (
            vec![prepare(vec![extent(1, "one")]), rename],
            "it puts file 1 in the place of file 0",
        ),
        (
            vec![prepare(vec![replacement]), commit("x")],
            "a replacement that it makes does not take a file's place, or is one of two",
        ),
        (
            vec![prepare(vec![extent(1, "a/b")]), commit("x")],
            "a name that it gives or takes is not one component of a path",
        ),
        (
            vec![
                prepare(vec![extent(1, "one"), extent(2, "one")]),
                commit("x"),
            ],
            "it gives one name to two files, or removes one of its own",
        ),
        (vec![prepare(vec![extent(1, "one")])], "it has no commit"),
    ];
    for (stages, why) in lies {
        let rig = Rig::new(&["image"]);
        let text = format!("The sandbox's plan is refused, nothing was changed: {why}");
        assert_eq!(
            told(&rig.plan(stages).unwrap_err()),
            (ErrorKind::BadGuest, text)
        );
        assert_eq!(rig.files(), files(&[("image", "old")]));
    }
}

/// Bytes in one part of a long plan.
const PART: usize = 4 << 20;

/// Streams `parts` parts, and then a commit.
fn in_parts(
    parts: u64,
    calls: &AtomicUsize,
) -> impl FnMut(&Request, &mut dyn Files) -> Result<Reply, CallError> + Send {
    move |_, files| {
        calls.fetch_add(1, Ordering::Relaxed);
        for part in 0..parts {
            let data = vec![part as u8 + 1; PART];
            let step = Step::Write {
                file: FileNo::IMAGE,
                offset: 512 + part * PART as u64,
                data,
            };
            files
                .stream(Plan {
                    stages: vec![prepare(vec![step])],
                })
                .unwrap();
        }
        Ok(planned(vec![commit("header")]))
    }
}

#[test]
fn a_plan_of_many_parts_is_made_once_and_a_longer_one_twice() {
    for (parts, times, there) in [(3, 1, false), (20, 2, false), (20, 2, true)] {
        let rig = Rig::new(if there { &["image"] } else { &[] });
        let calls = AtomicUsize::new(0);
        rig.create(in_parts(parts, &calls)).unwrap();
        assert_eq!(calls.into_inner(), times);
        let content = std::fs::read(&rig.0.path).unwrap();
        assert_eq!(content.len(), 512 + parts as usize * PART);
        assert!(content.starts_with(b"header\0"));
        for part in 0..parts as usize {
            let start = 512 + part * PART;
            let byte = part as u8 + 1;
            assert!(content[start..start + PART].iter().all(|&b| b == byte));
        }
    }
}

#[test]
fn a_long_plan_that_breaks_a_rule_in_the_end_leaves_nothing() {
    let calls = AtomicUsize::new(0);
    let lie = |answer: &mut dyn FnMut(&Request, &mut dyn Files) -> Result<Reply, CallError>,
               request: &Request,
               files: &mut dyn Files| {
        answer(request, files)?;
        Ok(planned(vec![commit("x"), commit("y")]))
    };
    for there in [false, true] {
        let rig = Rig::new(if there { &["image"] } else { &[] });
        let mut parts = in_parts(20, &calls);
        let created = rig.create(|request, files| lie(&mut parts, request, files));
        assert_eq!(created.unwrap_err().kind(), ErrorKind::BadGuest);
        let expected: &[_] = if there { &[("image", "")] } else { &[] };
        assert_eq!(rig.files(), files(expected));
    }
}
