//! Damage in the BAT, which is found when an entry is used, and entries behind the
//! end of the disk.

use super::damage_tests::{BAT, check, image, put};
use super::format::bat;
use crate::Failure;
use crate::error::FailureKind::Damaged;
use crate::proto::{Preallocation, Reply, Request};
use crate::testing::Session;
use alloc::vec;

/// Damage in the first entry of the BAT, found when it is used.
pub(super) const ENTRIES: &[(&str, u64, &str)] = &[
    ("state", 4, "the state 4 is not known"),
    ("reserved bits", 2 | 1 << 3, "reserved bits are set"),
    (
        "no parent",
        (8 << 20) | 7,
        "partially present, but the image has no parent",
    ),
    ("headers", 6, "the block at 0x0 overlaps the headers"),
    (
        "tables",
        (3 << 20) | 6,
        "the block at 0x300000 overlaps the metadata region",
    ),
    (
        "past the end",
        (9 << 20) | 6,
        "the block at 0x900000 lies past the end of the file",
    ),
    (
        "far past the end",
        !0xf_ffff | 6,
        "the block at 0xfffffffffff00000 lies past the end",
    ),
];

fn grow(session: &mut Session, size: u64) -> Result<Reply, Failure> {
    session.call(Request::Resize {
        size,
        preallocation: Preallocation::Metadata,
        shrink: true,
        backing_size: None,
    })
}

#[test]
fn every_entry_of_the_table_is_checked_where_it_is_used() {
    for (name, raw, words) in ENTRIES {
        let mut damaged = image();
        put(&mut damaged, BAT, *raw);
        let mut session = Session::new(damaged.clone());
        session.open(None).unwrap();
        let mapped = session.map(0, 1 << 20).expect_err(name);
        let place = alloc::format!("BAT entry 0 (guest offset 0x0): {words}");
        assert!(mapped.message.starts_with(&place), "{name}: {mapped}");
        assert_eq!(mapped.kind, Damaged);
        let grown = grow(&mut session, 8 << 20).expect_err(name);
        assert!(grown.message.contains(words), "{name}: {grown}");
        let (corruptions, _) = check(&mut session);
        assert_eq!(corruptions, 1, "{name}");
        assert!(session.host.image == damaged, "{name}");
    }
}

#[test]
pub(super) fn blocks_that_share_their_place_are_found() {
    let mut damaged = image();
    put(&mut damaged, BAT + 8, (8 << 20) | bat::FULLY_PRESENT);
    let mut session = Session::new(damaged);
    session.open(None).unwrap();
    let found = check(&mut session);
    let text = "VHDX BAT entry 1 is invalid: the block at 0x800000 overlaps another block";
    assert_eq!(found, (1, vec![text.into()]));
    let shrunk = session.call(Request::Resize {
        size: 2 << 20,
        preallocation: Preallocation::Off,
        shrink: true,
        backing_size: None,
    });
    assert_eq!(shrunk.unwrap_err().kind, Damaged);
}

#[test]
fn entries_behind_the_end_are_worth_a_warning_and_cleared_by_a_grow() {
    let mut stale = image();
    put(&mut stale, BAT + 3 * 8, (8 << 20) | bat::FULLY_PRESENT);
    let mut session = Session::new(stale);
    session.open(None).unwrap();
    let text = "1 BAT entries behind the end of the disk are not empty";
    assert_eq!(check(&mut session), (0, vec![text.into()]));
    let Ok(Reply::Plan(reply)) = grow(&mut session, 5 << 20) else {
        panic!("no plan");
    };
    session.host.apply(&reply.plan);
    session.open(None).unwrap();
    let content = session.read(3 << 20, 2 << 20).unwrap();
    assert!(content.iter().all(|&byte| byte == 0));
}
