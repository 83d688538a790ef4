//! What interruptions leave, and what comes of it.

use super::test_images::{M, checked, dynamic, fixed, made, opened, put, resize};
use crate::testing::Session;
use crate::{Format, Reply, Request};
use alloc::vec::Vec;

/// What a settled image is: facts without a reason, and the disk of that size.
fn settled(image: Vec<u8>, why: &str, size: u64) {
    let mut session = Session::new(image);
    let facts = session.open(Some(Format::Vhd)).unwrap();
    assert_eq!(facts.virtual_size, size);
    let reason = facts.unsettled.expect(why);
    assert!(reason.contains(why), "{reason}");
    let refusal = session.call(resize(16 * M)).unwrap_err();
    assert!(refusal.message.contains("instar check -r all"), "{refusal}");
    match session.call(Request::Settle) {
        Ok(Reply::Plan(reply)) => session.host.apply(&reply.plan),
        other => panic!("not a plan: {other:?}"),
    }
    let facts = session.open(Some(Format::Vhd)).unwrap();
    assert_eq!((facts.virtual_size, facts.unsettled), (size, None));
    assert_eq!(checked(&mut session).corruptions, 0);
}

#[test]
fn footers_that_differ_get_the_larger_size_that_the_table_covers() {
    let smaller = (5 * M).to_be_bytes();
    let larger = (9 * M).to_be_bytes();
    let mut image = dynamic();
    put(&mut image, 0, 48, &smaller);
    settled(image, "differ", 8 * M);
    let mut image = dynamic();
    let end = image.len() - 512;
    put(&mut image, end, 48, &smaller);
    settled(image, "differ", 8 * M);
    let mut image = dynamic();
    put(&mut image, 0, 48, &larger);
    settled(image, "differ", 8 * M);
}

#[test]
fn a_footer_that_is_missing_is_written_again() {
    let mut image = dynamic();
    image[8] ^= 1;
    settled(image, "at the start of the file is missing", 8 * M);
    let mut image = dynamic();
    let end = image.len() - 512;
    image[end + 8] ^= 1;
    settled(image, "at the end of the file is missing", 8 * M);
    for cut in [512, 100] {
        let mut image = dynamic();
        image.truncate(image.len() - cut);
        settled(image, "at the end of the file is missing", 8 * M);
    }
}

#[test]
fn a_torn_append_is_cut_off() {
    let mut image = fixed();
    image.resize(3 << 20, 0);
    settled(image, "is not at the end of the file", M);
}

#[test]
fn a_guest_cannot_turn_its_fixed_disk_into_another_image() {
    let mut image = fixed();
    let dynamic = made(M, &[]);
    image[..dynamic.len()].copy_from_slice(&dynamic);
    let facts = opened(&image).unwrap();
    assert_eq!((facts.virtual_size, facts.cluster_size), (M, None));
    assert_eq!(facts.unsettled, None);
}
