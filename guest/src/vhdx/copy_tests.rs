//! Headers and region tables of which only one copy is valid, or that differ.

use super::checksum::seal;
use super::damage_tests::{HEADER, OTHER_HEADER, OTHER_TABLE, TABLE, check, entry, image, put};
use super::format::region;
use crate::findings::Repair;
use crate::proto::{Reply, Request};
use crate::testing::Session;
use alloc::vec;

#[test]
fn one_valid_copy_is_enough_and_the_other_is_repaired() {
    let cases: [(usize, Option<&str>); 4] = [
        (HEADER, None),
        (OTHER_HEADER, None),
        (TABLE, Some("its first region table has the checksum")),
        (
            OTHER_TABLE,
            Some("its second region table has the checksum"),
        ),
    ];
    for (at, unsettled) in cases {
        let mut damaged = image();
        damaged[at + 20] ^= 0xff;
        let mut session = Session::new(damaged);
        let facts = session.open(None).unwrap();
        match (facts.unsettled, unsettled) {
            (Some(why), Some(words)) => assert!(why.starts_with(words), "{why}"),
            (why, words) => assert_eq!(why.as_deref(), words),
        }
        assert_eq!(check(&mut session).0, 0);
        let reply = session.call(Request::Check {
            repair: Some(Repair::All),
        });
        let Ok(Reply::Checked { report, repair }) = reply else {
            panic!("not checked: {reply:?}");
        };
        // Readers go by the other copy: that is a warning.
        assert_eq!(report.corruptions_fixed, 0);
        session.host.apply(&repair.plan);
        assert_eq!(session.open(None).unwrap().unsettled, None);
        assert_eq!(check(&mut session), (0, vec![]));
    }
}

#[test]
fn tables_that_differ_are_made_equal_by_the_first() {
    let mut differs = image();
    let table = &mut differs[OTHER_TABLE..OTHER_TABLE + region::LEN];
    put(table, entry(0) + region::ENTRY_OFFSET, 5 << 20);
    seal(table, region::CHECKSUM);
    let mut session = Session::new(differs);
    let facts = session.open(None).unwrap();
    let why = "its second region table differs from the first";
    assert_eq!(facts.unsettled.as_deref(), Some(why));
    let Ok(Reply::Plan(reply)) = session.call(Request::Settle) else {
        panic!("no plan");
    };
    session.host.apply(&reply.plan);
    let image = &session.host.image;
    assert!(image[TABLE..TABLE + region::LEN] == image[OTHER_TABLE..OTHER_TABLE + region::LEN]);
    assert_eq!(session.open(None).unwrap().unsettled, None);
}
