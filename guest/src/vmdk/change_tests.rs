//! Changes of images that are damaged, or laid out as few programs do: nothing
//! that is in use is overwritten, and no copy is trusted that leads elsewhere.

use super::damage_tests::*;
use super::format::header;
use crate::error::{Failure, FailureKind};
use crate::findings::{Repair, Severity};
use crate::plan::Step;
use crate::proto::{ExtentKind, Format, Preallocation, Reply, Request};
use crate::testing::Session;
use alloc::vec;
use alloc::vec::Vec;

/// The image with a CID that no new one equals.
fn with_cid() -> Vec<u8> {
    let mut image = image();
    let at = image.windows(5).position(|text| text == b"\nCID=").unwrap();
    put(&mut image, at + 5, b"fffffffe");
    image
}

/// Asks for places and flushes; the writes of the flush.
fn written(session: &mut Session, offset: u64, len: u64) -> Result<Vec<(u64, Vec<u8>)>, Failure> {
    match session.call(Request::Allocate { offset, len }) {
        Err(failure) if failure.kind == FailureKind::FlushFirst => {}
        other => drop(other?),
    }
    let Reply::Plan(reply) = session.call(Request::Flush)? else {
        panic!("not a plan");
    };
    session.host.apply(&reply.plan);
    let steps = reply.plan.stages.into_iter().flat_map(|stage| stage.steps);
    Ok(steps
        .filter_map(|step| match step {
            Step::Write { offset, data, .. } => Some((offset, data)),
            _ => None,
        })
        .collect())
}

#[test]
fn a_descriptor_that_the_header_does_not_place_gets_its_cid_where_it_was_read() {
    let mut image = with_cid();
    put(&mut image, header::DESCRIPTOR_OFFSET, &[0; 16]);
    let before = image.clone();
    let mut session = Session::new(image);
    let old = session.open(Some(Format::Vmdk)).unwrap().identity;
    written(&mut session, 1 << 20, 65536).unwrap();
    assert_eq!(session.host.image[..512], before[..512], "the header");
    let new = session.open(Some(Format::Vmdk)).unwrap().identity;
    assert_ne!(new, old);
}

#[test]
fn a_file_is_cut_off_only_where_shrinking_is_allowed() {
    let mut longer = image();
    longer.resize(longer.len() + 2 * GRAIN, 7);
    let plan = |shrink| {
        let mut session = Session::new(longer.clone());
        session.open(Some(Format::Vmdk)).unwrap();
        let request = Request::Resize {
            size: 40 << 20,
            preallocation: Preallocation::Off,
            shrink,
            backing_size: None,
        };
        match session.call(request) {
            Ok(Reply::Plan(reply)) => reply.plan,
            other => panic!("not a plan: {other:?}"),
        }
    };
    assert!(plan(false).is_empty());
    assert!(!plan(true).is_empty());
}

#[test]
fn every_compressed_grain_that_is_wrong_is_told_of() {
    let mut image = image();
    put(&mut image, header::FLAGS, &0x30003u32.to_le_bytes());
    put(&mut image, header::COMPRESSION, &[1, 0]);
    for directory in [48, 56] {
        let table = table(&image, directory);
        let sector = ((image.len() - GRAIN) / 512) as u32;
        for grain in 1..3 {
            put(&mut image, table + 4 * grain, &sector.to_le_bytes());
        }
    }
    let mut session = Session::new(image);
    session.open(Some(Format::Vmdk)).unwrap();
    session.call(Request::Check { repair: None }).unwrap();
    let wrong = session.host.findings.iter();
    let wrong = wrong.filter(|found| found.text.contains("the compressed grain"));
    assert_eq!(wrong.count(), 3);
}

#[test]
fn overwriting_a_grain_changes_the_cid_before_that_is_done_without_asking() {
    let in_place = |session: &mut Session| {
        let extents = session.map(0, 65536).unwrap();
        matches!(extents[0].kind, ExtentKind::Data { in_place: true, .. })
    };
    let mut session = Session::new(with_cid());
    let old = session.open(Some(Format::Vmdk)).unwrap().identity;
    assert!(!in_place(&mut session));
    let writes = written(&mut session, 4096, 512).unwrap();
    assert!(!writes.is_empty());
    assert!(in_place(&mut session));
    assert!(written(&mut session, 4096, 512).unwrap().is_empty());
    let new = session.open(Some(Format::Vmdk)).unwrap().identity;
    assert_ne!(new, old);
}

#[test]
fn a_shrink_moves_no_grain_onto_one_that_the_old_disk_has() {
    let mut foreign = image();
    foreign.truncate(64 * 512);
    foreign.resize(256 * 512, 7);
    foreign.resize(384 * 512, 8);
    put(&mut foreign, header::OVERHEAD, &64u64.to_le_bytes());
    for directory in [48, 56] {
        let first = table(&foreign, directory);
        put(&mut foreign, first, &64u32.to_le_bytes());
        let second = first + 2048;
        put(&mut foreign, second, &256u32.to_le_bytes());
    }
    let end = foreign.len() as u64;
    let mut session = Session::new(foreign);
    session.open(Some(Format::Vmdk)).unwrap();
    let Ok(Reply::Plan(reply)) = session.call(resize(32 << 20)) else {
        panic!("not a plan");
    };
    let copies = reply.plan.stages[0].steps.iter();
    let copies: Vec<u64> = copies
        .filter_map(|step| match step {
            Step::Copy { to, .. } => Some(*to),
            _ => None,
        })
        .collect();
    assert!(matches!(copies[..], [to] if to >= end), "{copies:?}");
    session.host.apply(&reply.plan);
    session.open(Some(Format::Vmdk)).unwrap();
    assert!(session.read(0, GRAIN as u64).unwrap() == vec![7; GRAIN]);
    assert_eq!(session.host.image.len(), 256 * 512);
}

/// What is repaired: the image afterwards, and how many entries were told of.
fn repaired(image: &[u8]) -> (Vec<u8>, usize) {
    let mut session = Session::new(image.to_vec());
    session.open(Some(Format::Vmdk)).unwrap();
    let repair = Some(Repair::All);
    let Ok(Reply::Checked { repair, .. }) = session.call(Request::Check { repair }) else {
        panic!("not checked");
    };
    session.host.apply(&repair.plan);
    let told = session.host.findings.iter();
    let told = told.filter(|found| found.severity == Severity::Repaired);
    (session.host.image.clone(), told.count())
}

#[test]
fn neither_a_repair_nor_a_flush_trusts_a_redundant_directory_that_leads_elsewhere() {
    let grain = image().len() - GRAIN;
    let sound = image();
    let other = table(&sound, header::DIRECTORY) + 2048;
    for place in [grain, other, 21 * 512] {
        let mut damaged = sound.clone();
        let directory = le32(&damaged, 48) * 512;
        put(&mut damaged, directory, &(place as u32 / 512).to_le_bytes());
        assert_eq!(repaired(&damaged), (damaged.clone(), 0), "{place}");
        let mut session = Session::new(damaged);
        session.open(Some(Format::Vmdk)).unwrap();
        let failure = written(&mut session, 1 << 20, 512).unwrap_err();
        assert!(failure.message.contains("in order"), "{failure}");
    }
}

#[test]
fn the_entry_that_leads_to_a_grain_repairs_the_one_that_does_not() {
    let sound = image();
    let grain = ((sound.len() - GRAIN) / 512) as u32;
    let (first, second) = (table(&sound, header::DIRECTORY), table(&sound, 48));
    for (at, raw) in [(first, 0), (second, 0), (first, 1 << 28), (second, 1 << 28)] {
        let mut damaged = sound.clone();
        put(&mut damaged, at, &u32::to_le_bytes(raw));
        assert_eq!(repaired(&damaged), (sound.clone(), 1), "{at} {raw}");
    }
    // Another grain lies there, or neither leads to one.
    for (one, two) in [(0, grain), (0, 1 << 28), (1 << 28, 0)] {
        let mut damaged = sound.clone();
        put(&mut damaged, first + 4, &u32::to_le_bytes(one));
        put(&mut damaged, second + 4, &u32::to_le_bytes(two));
        assert_eq!(repaired(&damaged), (damaged.clone(), 0), "{one} {two}");
    }
}
