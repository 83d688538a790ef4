//! Images of several files: which are opened, how they are read and written,
//! and what is refused.

use super::lock_elsewhere;
use super::{Fixture, Script, facts, told};
use crate::image::{Access, ErrorKind, Image, OpenOptions, Segment, SegmentKind};
use crate::sandbox::{CallError, Files};
use instar_guest::facts::NamedFile;
use instar_guest::plan::{Plan, Purpose, Stage, Step};
use instar_guest::proto::PlanReply;
use instar_guest::{Extent, ExtentKind, Facts, FileNo, Reply, Request};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::sync::{Arc, Mutex};

const PART: u64 = 4096;

fn facts_of(names: &[&str]) -> Facts {
    let named = |name: &&str| NamedFile {
        name: name.to_string(),
        format: None,
    };
    Facts {
        files: names.iter().map(named).collect(),
        files_first: true,
        ..facts(PART * names.len() as u64, 512)
    }
}

/// A guest whose disk is made of these files, one after the other.
fn guest(
    names: &[&str],
) -> Script<impl FnMut(&Request, &mut dyn Files) -> Result<Reply, CallError> + Clone + Send + 'static>
{
    let (facts, count) = (facts_of(names), names.len() as u64);
    Script(move |request: &Request, files: &mut dyn Files| {
        Ok(match request {
            Request::Open { .. } => {
                let mut first = facts.clone();
                first.virtual_size = 0;
                Reply::Opened(first)
            }
            Request::Attach { lens } => {
                assert_eq!(*lens, vec![PART; count as usize]);
                for file in 1..=count {
                    assert_eq!(files.len(FileNo(file as u32)).unwrap(), PART);
                }
                Reply::Opened(facts.clone())
            }
            Request::Map { .. } => {
                let extent = |part| Extent {
                    offset: part * PART,
                    len: PART,
                    kind: ExtentKind::Data {
                        file: FileNo(1 + part as u32),
                        at: 0,
                        in_place: true,
                    },
                };
                Reply::Extents((0..count).map(extent).collect())
            }
            other => panic!("{other:?}"),
        })
    })
}

/// An image and files beside it, each full of a byte of its own.
fn fixture(names: &[&str]) -> Fixture {
    let fixture = Fixture::new(b"descriptor");
    for (index, name) in names.iter().enumerate() {
        let content = [index as u8 + 1; PART as usize];
        std::fs::write(fixture.path.with_file_name(name), content).unwrap();
    }
    fixture
}

const NAMES: [&str; 3] = ["a-1", "a-2", "a-3"];

#[test]
fn a_disk_is_read_and_written_across_its_files() {
    let fixture = fixture(&NAMES);
    let image = fixture.open(&OpenOptions::new(Access::Write), guest(&NAMES));
    assert_eq!(image.virtual_size(), 3 * PART);
    let mut content = vec![0; 3 * PART as usize];
    image.read_at(&mut content, 0).unwrap();
    let expected = [1, 2, 3].map(|byte| [byte; PART as usize]).concat();
    assert!(content == expected);
    image.write_at(&[9; 4], PART - 2).unwrap();
    image.flush().unwrap();
    // One for each of the two files that were changed.
    assert_eq!(image.counters().fdatasyncs, 2);
    let part = |name| std::fs::read(fixture.path.with_file_name(name)).unwrap();
    assert_eq!(part("a-1")[PART as usize - 2..], [9; 2]);
    assert_eq!(part("a-2")[..3], [9, 9, 2]);
    assert_eq!(fixture.content(), b"descriptor");
}

#[test]
fn segments_tell_the_files_apart() {
    let fixture = fixture(&NAMES);
    let image = fixture.open(&OpenOptions::new(Access::Read), guest(&NAMES));
    let segment = |part: u64| Segment {
        offset: part * PART,
        len: PART,
        kind: SegmentKind::Data,
        depth: 0,
        at: Some((FileNo(1 + part as u32), 0)),
    };
    let expected = [0, 1, 2].map(segment);
    assert_eq!(image.segments(0, 3 * PART).unwrap(), expected);
}

#[test]
fn every_file_is_locked_as_the_image_is() {
    let fixture = fixture(&NAMES);
    let image = fixture.open(&OpenOptions::new(Access::Write), guest(&NAMES));
    for name in ["image", "a-1", "a-2", "a-3"] {
        let path = fixture.path.with_file_name(name);
        assert_eq!(
            lock_elsewhere(&path).unwrap_err(),
            ErrorKind::Locked,
            "{name}"
        );
    }
    image.unlock().unwrap();
    let held = lock_elsewhere(&fixture.path.with_file_name("a-3")).unwrap();
    assert_eq!(image.lock().unwrap_err().kind(), ErrorKind::Locked);
    drop(held);
    image.lock().unwrap();
    drop(image);
    lock_elsewhere(&fixture.path.with_file_name("a-2")).unwrap();
    let held = lock_elsewhere(&fixture.path.with_file_name("a-2")).unwrap();
    let options = OpenOptions::new(Access::Read);
    let error = fixture.try_open(&options, guest(&NAMES)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Locked);
    drop(held);
}

#[test]
fn facts_that_need_the_files_get_them_read_only() {
    let fixture = fixture(&NAMES);
    let paths = NAMES.map(|name| fixture.path.with_file_name(name));
    for path in &paths {
        std::fs::set_permissions(path, PermissionsExt::from_mode(0o444)).unwrap();
    }
    let image = fixture.open(&OpenOptions::new(Access::Info), guest(&NAMES));
    assert_eq!(image.virtual_size(), 3 * PART);
    assert_eq!(image.files.numbers().count(), 4);
    assert!(
        image
            .files
            .numbers()
            .all(|file| !image.files.writable(file))
    );
}

#[test]
fn facts_that_do_not_need_a_data_file_leave_it_closed() {
    let fixture = Fixture::new(b"image");
    let facts = Facts {
        files_first: false,
        ..facts_of(&["gone"])
    };
    let guest = Script(move |request: &Request, _: &mut dyn Files| match request {
        Request::Open { .. } => Ok(Reply::Opened(facts.clone())),
        other => panic!("{other:?}"),
    });
    fixture.open(&OpenOptions::new(Access::Info), guest);
}

/// How an image is refused that names these files; `a-1` and `a-2` are there.
fn refusal(names: &[&str], prepare: impl FnOnce(&Fixture)) -> (ErrorKind, String) {
    let fixture = fixture(&["a-1", "a-2"]);
    prepare(&fixture);
    let error = fixture
        .try_open(&OpenOptions::new(Access::Write), guest(names))
        .map(|_: Image| ())
        .unwrap_err();
    told(&error)
}

#[test]
fn a_file_named_twice_is_refused_also_by_another_name() {
    let damaged = |text: &str| (ErrorKind::Damaged, text.to_string());
    let twice = damaged("The extent 'a-1' is named twice");
    assert_eq!(refusal(&["a-1", "a-2", "a-1"], |_| ()), twice);
    let twice = damaged("The extent 'link' is named twice");
    let names = ["a-1", "link"];
    let at = |fixture: &Fixture| fixture.path.with_file_name("link");
    assert_eq!(refusal(&names, |f| symlink("a-1", at(f)).unwrap()), twice);
    let hard = |f: &Fixture| std::fs::hard_link(f.path.with_file_name("a-1"), at(f)).unwrap();
    assert_eq!(refusal(&names, hard), twice);
}

#[test]
fn the_image_is_not_its_own_extent() {
    let text = "The extent 'image' is an image of the chain that names it".to_string();
    assert_eq!(
        refusal(&["a-1", "image"], |_| ()),
        (ErrorKind::Damaged, text)
    );
}

#[test]
fn an_extent_passes_the_gate_or_is_not_opened() {
    let text = "The extent '/etc/passwd' lies outside the directories that the image may use";
    let expected = (ErrorKind::Forbidden, text.to_string());
    assert_eq!(refusal(&["a-1", "/etc/passwd"], |_| ()), expected);
    let text = "Could not open 'gone': No such file or directory".to_string();
    let expected = (ErrorKind::Os(libc::ENOENT), text);
    assert_eq!(refusal(&["a-1", "gone"], |_| ()), expected);
}

#[test]
fn more_files_than_may_be_open_are_refused_before_any_is_opened() {
    let (limit, _) = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE)
        .expect("the limit of open files");
    let names = vec!["a-1"; limit as usize];
    let (most, expected) = (limit - 64, ErrorKind::Os(libc::EMFILE));
    let text =
        format!("The image consists of {limit} files, and at most {most} may be open at once");
    assert_eq!(refusal(&names, |_| ()), (expected, text));
}

#[test]
fn files_that_change_while_they_are_attached_are_refused() {
    let fixture = fixture(&NAMES);
    let guest = Script(|request: &Request, _: &mut dyn Files| {
        Ok(match request {
            Request::Open { .. } => Reply::Opened(facts_of(&NAMES)),
            _ => Reply::Opened(facts_of(&NAMES[..2])),
        })
    });
    let error = fixture
        .try_open(&OpenOptions::new(Access::Read), guest)
        .unwrap_err();
    let text = "The sandbox's facts about the image are refused: the files that it consists of \
                change";
    assert_eq!(told(&error), (ErrorKind::BadGuest, text.to_string()));
}

#[test]
fn each_files_changes_are_durable_before_the_next_stage() {
    let fixture = fixture(&NAMES);
    let opened = Arc::new(Mutex::new(guest(&NAMES)));
    let guest = Script(
        move |request: &Request, files: &mut dyn Files| match request {
            Request::Resize { .. } => Ok(Reply::Plan(grow_third())),
            other => (opened.lock().unwrap().0)(other, files),
        },
    );
    let log = super::faulty::Faulty::default();
    let mut options = OpenOptions::new(Access::Write);
    options.effects = log.hook();
    let image = fixture.open(&options, guest);
    image.resize(4 * PART, &Default::default()).unwrap();
    assert_eq!(
        log.take(),
        ["set_len 8192 of 3", "sync of 3", "write 0+4", "sync",]
    );
    assert_eq!(fixture.content(), b"DESCriptor");
}

/// The third file gets longer, then the descriptor says so.
fn grow_third() -> PlanReply {
    let longer = Step::SetLength {
        file: FileNo(3),
        len: 2 * PART,
    };
    let commit = Step::Write {
        file: FileNo::IMAGE,
        offset: 0,
        data: b"DESC".to_vec(),
    };
    let stage = |purpose, step| Stage {
        purpose,
        steps: vec![step],
    };
    PlanReply {
        plan: Plan {
            stages: vec![
                stage(Purpose::Prepare, longer),
                stage(Purpose::Commit, commit),
            ],
        },
        ..PlanReply::default()
    }
}
