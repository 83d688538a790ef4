//! Files that images name: which are opened, as what, and under which locks.

use super::{Fixture, Script, facts, lock_elsewhere, told};
use crate::image::{Access, BackingPolicy, ErrorKind, OpenOptions};
use crate::sandbox::Files;
use instar_guest::facts::{Backing, NamedFile};
use instar_guest::{Facts, Format, Reply, Request};
use std::sync::{Arc, Mutex};

const SIZE: u64 = 8192;
const UNIT: u64 = 4096;

fn named(name: &str) -> NamedFile {
    NamedFile {
        name: name.to_string(),
        format: None,
    }
}

/// Facts of an image that names this data file.
fn with_data(name: &str) -> Facts {
    Facts {
        files: vec![named(name)],
        ..facts(SIZE, UNIT)
    }
}

/// A guest whose image has these facts.
fn guest(
    facts: Facts,
) -> Script<
    impl FnMut(&Request, &mut dyn Files) -> Result<Reply, crate::sandbox::CallError> + Clone + Send,
> {
    Script(move |request: &Request, _: &mut dyn Files| match request {
        Request::Open { .. } => Ok(Reply::Opened(facts.clone())),
        Request::Attach { .. } => Ok(Reply::Opened(facts.clone())),
        other => panic!("{other:?}"),
    })
}

#[test]
fn where_no_file_may_be_named_a_data_file_is_refused() {
    let fixture = Fixture::new(&[1; SIZE as usize]);
    std::fs::write(fixture.path.with_file_name("data"), [2; SIZE as usize]).unwrap();
    for access in [Access::Info, Access::Read, Access::Write] {
        let mut options = OpenOptions::new(access);
        fixture.open(&options, guest(with_data("data")));
        options.backing = BackingPolicy::Refuse;
        let error = fixture
            .try_open(&options, guest(with_data("data")))
            .unwrap_err();
        let text = "The image names the data file 'data', and data files are not allowed here";
        assert_eq!(told(&error), (ErrorKind::Forbidden, text.to_string()));
    }
}

/// Opens an overlay over a file of this name; answers the format that the file
/// is read as, `None` where it is probed.
fn format_of_backing(
    name: &str,
    stated: Option<Format>,
    trust_names: bool,
) -> Result<Option<Format>, (ErrorKind, String)> {
    let fixture = Fixture::new(&[1; SIZE as usize]);
    std::fs::write(fixture.path.with_file_name(name), [2; SIZE as usize]).unwrap();
    let backing = Backing::named(NamedFile {
        name: name.to_string(),
        format: stated.map(|format| format.name().to_string()),
    });
    let opened = Arc::new(Mutex::new(Vec::new()));
    let log = Arc::clone(&opened);
    let guest = Script(move |request: &Request, _: &mut dyn Files| {
        let Request::Open { format, .. } = request else {
            panic!("{request:?}")
        };
        let mut log = log.lock().unwrap();
        log.push(*format);
        Ok(Reply::Opened(Facts {
            backing: Some(backing.clone()).filter(|_| log.len() == 1),
            ..facts(SIZE, UNIT)
        }))
    });
    let mut options = OpenOptions::new(Access::Read);
    options.trust_names = trust_names;
    fixture
        .try_open(&options, guest)
        .map_err(|error| told(&error))?;
    let opened = opened.lock().unwrap();
    assert_eq!(opened[0], None);
    Ok(opened[1])
}

#[test]
fn where_names_are_trusted_they_decide_what_a_backing_file_is() {
    let trusted = |name| format_of_backing(name, None, true);
    assert_eq!(trusted("base.raw"), Ok(Some(Format::Raw)));
    assert_eq!(trusted("base.img"), Ok(Some(Format::Raw)));
    assert_eq!(trusted("base.qcow2"), Ok(Some(Format::Qcow2)));
    assert_eq!(trusted("base.vmdk"), Ok(Some(Format::Vmdk)));
    assert_eq!(trusted("base"), Ok(None));
    // What the image states goes before its name.
    let stated = format_of_backing("base.img", Some(Format::Qcow2), true);
    assert_eq!(stated, Ok(Some(Format::Qcow2)));
    assert_eq!(format_of_backing("base.raw", None, false), Ok(None));
}

#[test]
fn a_lock_that_cannot_be_taken_whole_is_not_taken() {
    let fixture = Fixture::new(&[1; SIZE as usize]);
    let data = fixture.path.with_file_name("data");
    std::fs::write(&data, [2; SIZE as usize]).unwrap();
    let image = fixture.open(&OpenOptions::new(Access::Write), guest(with_data("data")));
    image.unlock().unwrap();
    let held = lock_elsewhere(&data).unwrap();
    assert_eq!(image.lock().unwrap_err().kind(), ErrorKind::Locked);
    drop(lock_elsewhere(&fixture.path).unwrap());
    drop(held);
    image.lock().unwrap();
    for path in [&fixture.path, &data] {
        assert_eq!(lock_elsewhere(path).unwrap_err(), ErrorKind::Locked);
    }
}

#[test]
fn an_unlocked_image_gives_up_its_backing_chain_too() {
    let fixture = Fixture::new(&[1; SIZE as usize]);
    let base = fixture.path.with_file_name("base");
    std::fs::write(&base, [2; SIZE as usize]).unwrap();
    let overlay = Script(move |request: &Request, _: &mut dyn Files| {
        let Request::Open { write, .. } = request else {
            panic!("{request:?}")
        };
        Ok(Reply::Opened(Facts {
            backing: Some(Backing::named(named("base"))).filter(|_| *write),
            ..facts(SIZE, UNIT)
        }))
    });
    let image = fixture.open(&OpenOptions::new(Access::Write), overlay);
    assert_eq!(lock_elsewhere(&base).unwrap_err(), ErrorKind::Locked);
    image.unlock().unwrap();
    let held = lock_elsewhere(&base).unwrap();
    // Neither without the other.
    assert_eq!(image.lock().unwrap_err().kind(), ErrorKind::Locked);
    drop(lock_elsewhere(&fixture.path).unwrap());
    drop(held);
    image.lock().unwrap();
    assert_eq!(lock_elsewhere(&base).unwrap_err(), ErrorKind::Locked);
    // What was changed meanwhile in the chain is noticed as in the image.
    image.unlock().unwrap();
    std::fs::write(&base, [3; 2 * SIZE as usize]).unwrap();
    assert_eq!(image.lock().unwrap_err().kind(), ErrorKind::Stale);
    drop(lock_elsewhere(&fixture.path).unwrap());
}

/// Opens an overlay over `base` and `other`, which are there, by these names;
/// answers which of the two is its backing image.
fn backing_by(
    names: &[&str],
    wanted: Option<&str>,
    found: Option<&str>,
) -> Result<String, (ErrorKind, String, Option<String>)> {
    let fixture = Fixture::new(&[1; SIZE as usize]);
    for name in ["base", "other"] {
        std::fs::write(fixture.path.with_file_name(name), [2; SIZE as usize]).unwrap();
    }
    let backing = Backing {
        names: names.iter().map(ToString::to_string).collect(),
        format: Some("vpc".to_string()),
        identity: wanted.map(str::to_string),
    };
    let found = found.map(str::to_string);
    let guest = Script(move |request: &Request, _: &mut dyn Files| {
        let Request::Open { format, .. } = request else {
            panic!("{request:?}")
        };
        let is_base = *format == Some(Format::Vhd);
        Ok(Reply::Opened(Facts {
            backing: Some(backing.clone()).filter(|_| !is_base),
            identity: found.clone().filter(|_| is_base),
            ..facts(SIZE, UNIT)
        }))
    });
    let image = fixture
        .try_open(&OpenOptions::new(Access::Read), guest)
        .map_err(|error| {
            let (kind, text) = told(&error);
            (kind, text, error.hint().map(str::to_string))
        })?;
    let path = image.backing().unwrap().path();
    Ok(path.file_name().unwrap().to_string_lossy().into_owned())
}

#[test]
fn a_backing_files_names_are_tried_in_their_order() {
    let found = |names: &[&str]| backing_by(names, None, None);
    assert_eq!(found(&["base", "other"]).unwrap(), "base");
    assert_eq!(found(&["gone", "other", "base"]).unwrap(), "other");
    assert_eq!(found(&["/etc/passwd", "C:/base", "base"]).unwrap(), "base");
}

#[test]
fn where_none_leads_to_a_file_the_first_is_told() {
    let refused = backing_by(&["gone", "C:/a\x1b", "/etc/passwd"], None, None).unwrap_err();
    let text = "Could not open backing file: Could not open 'gone': No such file or directory";
    let hint = "Nor does any other name of it lead to a file that may be used: 'C:/a\\u{1b}', \
                '/etc/passwd'.";
    let expected = (
        ErrorKind::Os(libc::ENOENT),
        text.to_string(),
        Some(hint.to_string()),
    );
    assert_eq!(refused, expected);
    let refused = backing_by(&[], None, None).unwrap_err();
    assert_eq!(refused.0, ErrorKind::BadGuest);
}

#[test]
fn a_backing_file_that_the_image_was_not_made_on_is_refused() {
    let told = |wanted, found| backing_by(&["base"], wanted, found).map_err(|told| told.1);
    assert_eq!(told(Some("a"), Some("a")).unwrap(), "base");
    assert_eq!(told(None, Some("a")).unwrap(), "base");
    let refusal = |found: &str| {
        format!(
            "The backing file 'base' is not the one that the image was made on: it is identified \
             by {found}, the image wants 'a'"
        )
    };
    assert_eq!(told(Some("a"), Some("b")), Err(refusal("'b'")));
    assert_eq!(told(Some("a"), None), Err(refusal("nothing")));
}
