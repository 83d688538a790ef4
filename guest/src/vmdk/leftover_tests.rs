//! The lines that name files which an interrupted resize left: found where they
//! end the descriptor's file, and believed for files of the image alone.

use super::damage_tests::{resize, split};
use super::descriptor::Descriptor;
use super::leftover::{Tail, append};
use crate::plan::{NewName, Plan, Step};
use crate::proto::{FileNo, Format, Reply, Request};
use crate::testing::Session;
use alloc::string::{String, ToString};
use alloc::vec;
use alloc::vec::Vec;

const TEXT: &str = "# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\n\
    createType=\"twoGbMaxExtentSparse\"\nRW 81920 SPARSE \"disk-s001.vmdk\"\n\
    RW 81920 SPARSE \"disk-s002.vmdk\"\n";
const LINE: &str = "# instar: leftover files 2 \"disk-s003.vmdk\"\n";

fn names(area: &[u8]) -> Option<(u64, Vec<String>)> {
    let tail = Tail::find(area);
    let extents = Descriptor::parse(TEXT.as_bytes()).unwrap().extents;
    tail.lines_at().map(|at| (at, tail.names(&extents)))
}

fn area(parts: &[&str]) -> Vec<u8> {
    parts.concat().into_bytes()
}

/// What the line names, where it is found at that byte.
fn found(at: usize) -> Option<(u64, Vec<String>)> {
    let names = ["disk-s003.vmdk", "disk-s004.vmdk"];
    Some((at as u64, names.map(String::from).to_vec()))
}

#[test]
fn the_lines_end_the_file() {
    let len = TEXT.len();
    assert_eq!(names(TEXT.as_bytes()), None);
    assert_eq!(names(&area(&[TEXT, LINE])), found(len));
    assert_eq!(names(&area(&[TEXT, LINE, "\n"])), found(len));
    // QEMU puts zeroes behind a text.
    let zeroes = "\0".repeat(100);
    assert_eq!(names(&area(&[TEXT, &zeroes, LINE])), found(len + 100));
    assert_eq!(names(&area(&[TEXT, LINE, &zeroes])), found(len));
    for behind in ["RW 1 ZERO\n", "# more\n", "CID=1"] {
        assert_eq!(names(&area(&[TEXT, LINE, behind])), None, "{behind}");
    }
}

#[test]
fn a_line_that_was_not_written_whole_names_nothing() {
    let len = TEXT.len();
    for end in 26..LINE.len() {
        let torn = area(&[TEXT, &LINE[..end]]);
        assert_eq!(names(&torn), Some((len as u64, Vec::new())), "{end}");
        let torn = area(&[TEXT, LINE, &LINE[..end]]);
        assert_eq!(names(&torn), found(len), "{end}");
    }
    let torn = area(&[TEXT, LINE, &LINE[..5]]);
    assert_eq!(names(&torn), found(len));
    let torn = area(&[TEXT, &"\0".repeat(20), &LINE[20..]]);
    assert_eq!(names(&torn), None);
}

#[test]
fn only_files_of_the_image_that_it_does_not_have_are_left_over() {
    for (line, left) in [
        ("1 \"disk-s002.vmdk\"", &[][..]),
        ("3 \"disk-s001.vmdk\"", &["disk-s003.vmdk"]),
        ("1 \"other.vmdk\"", &[]),
        ("1 \"other-s003.vmdk\"", &[]),
        ("1 \"disk-s003.raw\"", &[]),
        ("1 \"../disk-s003.vmdk\"", &[]),
        ("1 \"/disk-s003.vmdk\"", &[]),
        ("1 \"disk-f003.vmdk\"", &[]),
        ("1 \"disk.vmdk\"", &[]),
        ("0 \"disk-s003.vmdk\"", &[]),
        ("x \"disk-s003.vmdk\"", &[]),
        ("1 disk-s003.vmdk", &[]),
    ] {
        let area = area(&[TEXT, "# instar: leftover files ", line, "\n"]);
        let (_, names) = names(&area).expect(line);
        assert_eq!(names, left, "{line}");
    }
    let long = area(&[
        TEXT,
        "# instar: leftover files 18446744073709551615 \"disk-s3.vmdk\"\n",
    ]);
    assert_eq!(names(&long).expect("lines").1.len(), 4096);
}

#[test]
fn lines_that_are_added_are_found() {
    let extents = Descriptor::parse(TEXT.as_bytes()).unwrap().extents;
    let added = ["disk-s003.vmdk", "disk-s004.vmdk"];
    for text in [
        TEXT.to_string(),
        TEXT.trim_end().to_string(),
        TEXT.to_string() + &"\0".repeat(100),
        TEXT.to_string() + "# " + &"x".repeat(480 - TEXT.len()),
    ] {
        let tail = Tail::find(text.as_bytes());
        let Some(Step::Write { file, offset, data }) = tail.add(added.into_iter(), &extents) else {
            panic!("no line for {text}");
        };
        assert_eq!(file, FileNo::IMAGE);
        let end = offset as usize + data.len();
        assert_eq!(offset as usize / 512, (end - 1) / 512, "one sector");
        let mut area = text.clone().into_bytes();
        area.resize(end, 0);
        area[offset as usize..].copy_from_slice(&data);
        let (_, left) = names(&area).unwrap();
        assert_eq!(left, added);
    }
    assert_eq!(Tail::find(b"").add(["x"].into_iter(), &extents), None);
}

#[test]
fn a_new_descriptor_names_what_goes_with_it() {
    let goes = ["disk-s003.vmdk", "disk-s004.vmdk", "sub/disk-s005.vmdk"];
    let goes = goes.map(String::from);
    let mut text = TEXT.trim_end().as_bytes().to_vec();
    let kept = append(&mut text, &goes).unwrap();
    assert_eq!(kept, Some(TEXT.len() as u64 - 1));
    assert_eq!(text, area(&[TEXT, LINE]));
    let mut text = TEXT.as_bytes().to_vec();
    assert_eq!(append(&mut text, &goes[2..]), Ok(None));
    assert_eq!(text, TEXT.as_bytes());
}

fn plan(session: &mut Session, request: Request) -> Plan {
    match session.call(request) {
        Ok(Reply::Plan(reply)) => reply.plan,
        other => panic!("not a plan: {other:?}"),
    }
}

#[test]
fn the_image_is_read_as_without_them_and_settled_by_their_removal() {
    let (image, extent) = split();
    let mut session = Session::new(image.clone());
    session.host.others = vec![Some(extent)];
    let facts = session.open(Some(Format::Vmdk)).unwrap();
    assert!(plan(&mut session, Request::Settle).is_empty());
    let line = LINE.replace("s003", "s002");
    session.host.image.extend(line.as_bytes());
    assert_eq!(session.open(Some(Format::Vmdk)).unwrap(), facts);
    assert!(session.call(resize(80 << 20)).is_err());
    let settling = plan(&mut session, Request::Settle);
    let steps = settling.stages.iter().flat_map(|stage| &stage.steps);
    let removed: Vec<&NewName> = steps
        .filter_map(|step| match step {
            Step::Remove { name } => Some(name),
            _ => None,
        })
        .collect();
    let plain = |name: &str| NewName::Plain(name.to_string());
    let expected = [
        NewName::Replacement,
        plain("disk-s002.vmdk"),
        plain("disk-s003.vmdk"),
    ];
    assert!(removed.into_iter().eq(&expected));
    session.host.apply(&settling);
    assert!(session.host.image == image);
}

#[test]
fn a_change_of_the_cid_leaves_them_alone() {
    let (image, extent) = split();
    let text = String::from_utf8(image).unwrap();
    let at = text.find("\nCID=").unwrap() + 5;
    let with_cid = |cid: &str| [&text[..at], cid, &text[at + 8..]].concat();
    for (text, changes) in [(with_cid("fffffffe"), true), (with_cid("1"), false)] {
        let mut session = Session::new(area(&[&text, LINE]));
        session.host.others = vec![Some(extent.clone())];
        let old = session.open(Some(Format::Vmdk)).unwrap().identity;
        let (offset, len) = (0, 65536);
        session.call(Request::Allocate { offset, len }).unwrap();
        let flush = plan(&mut session, Request::Flush);
        session.host.apply(&flush);
        assert!(session.host.image.ends_with(LINE.as_bytes()));
        let new = session.open(Some(Format::Vmdk)).unwrap().identity;
        assert_eq!(new != old, changes);
        assert!(session.call(resize(80 << 20)).is_err());
    }
}
