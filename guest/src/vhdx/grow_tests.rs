//! Growing images that QEMU does not make: a size across two sectors, sectors
//! of 4096 bytes, space that blocks keep, regions that are not known.

use super::checksum::seal;
use super::damage_tests::image;
use super::format::{bat, header, metadata, region};
use crate::error::FailureKind;
use crate::plan::{Plan, Purpose, Step};
use crate::proto::{Preallocation, Reply, Request};
use crate::testing::Session;
use crate::{Failure, FileNo};
use alloc::vec::Vec;

const TABLES: [usize; 2] = [192 << 10, 256 << 10];
const BAT: usize = 2 << 20;
const METADATA: usize = 3 << 20;
const ITEMS: usize = METADATA + (64 << 10);

/// The most barriers of a grow.
const MAX_STAGES: usize = 8;

fn put(image: &mut [u8], at: usize, value: u64) {
    image[at..at + 8].copy_from_slice(&value.to_le_bytes());
}

fn resize(session: &mut Session, size: u64, preallocation: Preallocation) -> Result<Plan, Failure> {
    let reply = session.call(Request::Resize {
        size,
        preallocation,
        shrink: true,
        backing_size: None,
    })?;
    match reply {
        Reply::Plan(reply) => Ok(reply.plan),
        other => panic!("not a plan: {other:?}"),
    }
}

/// An image whose virtual disk size lies across two sectors, or two pages.
fn straddling(offset: usize) -> Vec<u8> {
    let mut image = image();
    let entry = METADATA + metadata::ENTRIES + metadata::ENTRY_LEN + metadata::ENTRY_OFFSET;
    image[entry..entry + 4].copy_from_slice(&(offset as u32).to_le_bytes());
    put(&mut image, METADATA + offset, 3 << 20);
    image
}

#[test]
fn a_size_across_sectors_is_changed_by_way_of_the_log() {
    for offset in [(64 << 10) + 508, (64 << 10) + 4092] {
        for size in [5u64 << 20, 130 << 30] {
            let mut session = Session::new(straddling(offset));
            session.open(None).unwrap();
            let plan = resize(&mut session, size, Preallocation::Off).unwrap();
            assert!(plan.stages.len() <= MAX_STAGES, "{}", plan.stages.len());
            let commit = plan
                .stages
                .iter()
                .find(|stage| stage.purpose == Purpose::Commit);
            let [
                Step::Write {
                    offset: at, data, ..
                },
            ] = &commit.unwrap().steps[..]
            else {
                panic!("not one write");
            };
            assert!(header::SLOTS.contains(at) && data.len() == 512);
            for stage in &plan.stages {
                // Whatever has been done, the disk is the old one or the new one.
                let facts = session.open(None).unwrap();
                assert!([3 << 20, size].contains(&facts.virtual_size));
                stage.steps.iter().for_each(|step| session.host.step(step));
            }
            let facts = session.open(None).unwrap();
            assert_eq!((facts.virtual_size, facts.unsettled), (size, None));
            let content = session.read(0, 2 << 20).unwrap();
            assert!(content[..1 << 20].iter().all(|&byte| byte == 0x11));
        }
    }
}

#[test]
fn without_a_log_a_size_across_sectors_stays() {
    let mut image = straddling((64 << 10) + 508);
    for at in header::SLOTS {
        let header = &mut image[at as usize..at as usize + header::LEN];
        header[header::LOG_LEN..header::LOG_LEN + 4].fill(0);
        seal(header, header::CHECKSUM);
    }
    let mut session = Session::new(image.clone());
    session.open(None).unwrap();
    let failure = resize(&mut session, 5 << 20, Preallocation::Off).unwrap_err();
    assert_eq!(failure.kind, FailureKind::Unsupported);
    assert!(
        failure
            .message
            .starts_with("the image has no log, which this change needs")
    );
    assert!(session.host.image == image);
}

#[test]
fn sizes_are_multiples_of_the_sector() {
    let mut image = image();
    image[ITEMS + 32..ITEMS + 36].copy_from_slice(&4096u32.to_le_bytes());
    let mut session = Session::new(image);
    assert_eq!(session.open(None).unwrap().size_unit, 4096);
    let failure = resize(&mut session, (4 << 20) + 512, Preallocation::Off).unwrap_err();
    assert_eq!(
        failure.message,
        "The new size must be a multiple of 4096: 4194816 is not, the nearest that are, are \
         4194304 and 4198400"
    );
    let plan = resize(&mut session, (4 << 20) + 4096, Preallocation::Off).unwrap();
    session.host.apply(&plan);
    assert_eq!(session.open(None).unwrap().virtual_size, (4 << 20) + 4096);
}

/// Where the data of new blocks goes.
fn new_block(session: &mut Session) -> u64 {
    let plan = resize(session, 4 << 20, Preallocation::Metadata).unwrap();
    session.host.apply(&plan);
    session.open(None).unwrap();
    let entry = &session.host.image[BAT + 3 * 8..BAT + 4 * 8];
    u64::from_le_bytes(entry.try_into().unwrap()) & bat::OFFSET
}

#[test]
fn space_that_a_block_keeps_is_not_given_away() {
    let mut image = image();
    put(&mut image, BAT + 8, (9 << 20) | bat::UNMAPPED);
    image.resize(10 << 20, 0x33);
    let mut session = Session::new(image);
    session.open(None).unwrap();
    assert_eq!(new_block(&mut session), 10 << 20);
    assert!(
        session.host.image[9 << 20..10 << 20]
            .iter()
            .all(|&byte| byte == 0x33)
    );
}

#[test]
fn a_region_that_is_not_known_is_left_alone() {
    let mut image = image();
    image.resize(11 << 20, 0x44);
    for at in TABLES {
        let table = &mut image[at..at + region::LEN];
        let entry = region::ENTRIES + 2 * region::ENTRY_LEN;
        table[entry] = 1;
        put(table, entry + region::ENTRY_OFFSET, 10 << 20);
        table[entry + region::ENTRY_LENGTH + 2] = 0x10;
        table[region::COUNT] = 3;
        seal(table, region::CHECKSUM);
    }
    let mut session = Session::new(image);
    session.open(None).unwrap();
    assert_eq!(new_block(&mut session), 11 << 20);
    let plan = resize(&mut session, 1 << 20, Preallocation::Off).unwrap();
    session.host.apply(&plan);
    assert_eq!(session.host.image.len(), 11 << 20);
    assert!(
        session.host.image[10 << 20..]
            .iter()
            .all(|&byte| byte == 0x44)
    );
}

#[test]
fn a_plan_writes_to_the_image_alone() {
    let mut session = Session::new(image());
    session.open(None).unwrap();
    for (size, preallocation) in [
        (5u64 << 20, Preallocation::Full),
        (130 << 30, Preallocation::Off),
        (512, Preallocation::Off),
    ] {
        let plan = resize(&mut session, size, preallocation).unwrap();
        let steps = plan.stages.iter().flat_map(|stage| &stage.steps);
        assert!(steps.clone().count() > 0);
        assert!(steps.clone().all(|step| step.file() == FileNo::IMAGE));
    }
}
