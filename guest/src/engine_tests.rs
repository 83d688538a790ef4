//! The dispatcher: which requests an image answers, and how often it asks the
//! host for bytes.

use crate::error::FailureKind;
use crate::proto::{HEAD, Request, TAIL};
use crate::testing::{Blank, Session};
use crate::{ExtentKind, FileNo, Format};
use alloc::vec;

fn refusal(session: &mut Session, request: Request) -> alloc::string::String {
    let failure = session.call(request).unwrap_err();
    assert_eq!(failure.kind, FailureKind::InvalidRequest);
    failure.message
}

#[test]
fn opening_asks_once_for_both_ends_of_the_file() {
    let blank = Blank {
        cluster_bits: 16,
        size: 1 << 40,
        ..Blank::default()
    };
    let mut session = Session::new(blank.build());
    session.open(None).unwrap();
    assert_eq!(session.host.reads, 1);
    assert_eq!(session.host.bytes_read, (HEAD + TAIL) as u64);
}

#[test]
fn mapping_asks_once_for_the_l1_table_and_once_for_l2_tables() {
    let blank = Blank {
        cluster_bits: 12,
        size: 64 << 20,
        ..Blank::default()
    };
    let mut image = blank.build();
    let tables = blank.l1_entries();
    let free = blank.free();
    image.resize(free + tables * blank.cluster(), 0);
    for index in 0..tables {
        let entry = (1u64 << 63) | (free + index * blank.cluster()) as u64;
        let at = blank.l1() + 8 * index;
        image[at..at + 8].copy_from_slice(&entry.to_be_bytes());
    }
    let mut session = Session::new(image);
    session.open(None).unwrap();
    let extents = session.map(0, blank.size).unwrap();
    assert_eq!(extents.len(), 1);
    assert_eq!(session.host.reads, 3);
    session.map(0, blank.size).unwrap();
    assert_eq!(session.host.reads, 3);
}

#[test]
fn an_empty_l1_table_of_a_large_disk_is_read_in_pieces() {
    let blank = Blank {
        cluster_bits: 9,
        size: 1 << 34,
        ..Blank::default()
    };
    let mut session = Session::new(blank.build());
    session.open(None).unwrap();
    let extents = session.map(0, blank.size).unwrap();
    assert_eq!(extents.len(), 1);
    assert_eq!(extents[0].kind, ExtentKind::Unallocated { at: None });
    assert_eq!(session.host.reads, 1 + (4 << 20) / (64 << 10));
}

#[test]
fn raw_is_the_file_itself() {
    let mut session = Session::new(vec![7; 1500]);
    let facts = session.open(None).unwrap();
    assert_eq!((facts.format, facts.probed), (Format::Raw, true));
    assert_eq!((facts.virtual_size, facts.size_unit), (1500, 1));
    let extents = session.map(100, 1400).unwrap();
    assert_eq!(extents.len(), 1);
    assert_eq!(
        extents[0].kind,
        ExtentKind::Data {
            file: FileNo::IMAGE,
            at: 100,
            in_place: true
        }
    );
    assert_eq!(session.map(100, 0), Ok(vec![]));
}

#[test]
fn a_forced_raw_image_is_not_looked_at() {
    let mut session = Session::new(Blank::default().build());
    let facts = session.open(Some(Format::Raw)).unwrap();
    assert_eq!((facts.format, facts.probed), (Format::Raw, false));
    assert_eq!(session.host.reads, 0);
}

#[test]
fn a_range_outside_the_disk_is_refused() {
    let mut session = Session::new(Blank::default().build());
    session.open(None).unwrap();
    for (offset, len) in [(1 << 20, 1), (0, (1 << 20) + 1), (u64::MAX, 2)] {
        let why =
            alloc::format!("{len} bytes at {offset:#x} are not inside a disk of 1048576 bytes");
        assert_eq!(refusal(&mut session, Request::Map { offset, len }), why);
        assert_eq!(refusal(&mut session, Request::Inflate { offset, len }), why);
    }
}

#[test]
fn requests_that_make_no_sense_are_refused() {
    let mut session = Session::default();
    let map = Request::Map { offset: 0, len: 1 };
    assert_eq!(
        refusal(&mut session, map),
        "no image is open in this session"
    );
    session.host.image = vec![0; 8 << 20];
    session.open(None).unwrap();
    for (request, why) in [
        (
            Request::Attach { lens: vec![1] },
            "the raw image has no other files",
        ),
        (
            Request::Inflate { offset: 0, len: 1 },
            "the raw image has no compressed clusters",
        ),
        (
            Request::Inflate {
                offset: 0,
                len: (4 << 20) + 1,
            },
            "4194305 bytes are too many to inflate at once, at most 4194304",
        ),
    ] {
        assert_eq!(refusal(&mut session, request), why);
    }
    session.host.image = Blank::default().build();
    session.open(None).unwrap();
    assert_eq!(
        refusal(&mut session, Request::Attach { lens: vec![1] }),
        "the qcow2 image does not have that many other files"
    );
}

#[test]
fn a_failed_open_leaves_no_image_behind() {
    let mut session = Session::new(Blank::default().build());
    session.open(None).unwrap();
    session.host.image = b"KDMV".to_vec();
    session.open(None).unwrap_err();
    let map = Request::Map { offset: 0, len: 1 };
    assert_eq!(
        refusal(&mut session, map),
        "no image is open in this session"
    );
}
