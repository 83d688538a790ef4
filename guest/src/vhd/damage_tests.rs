//! Damaged and unusual images: each field that is looked at has its own answer,
//! and the image stays as it is.

use super::parent_tests;
use super::test_images::{
    END, HEADER, M, TABLE, checked, dynamic, fixed, opened, put, put_both, resize,
};
use crate::field_tests::{self, Variant};
use crate::findings::Repair;
use crate::testing::Session;
use crate::{FailureKind, Format, Reply, Request};
use alloc::format;
use alloc::vec::Vec;

type Damage = fn(&mut Vec<u8>);
type Case = (&'static str, Damage, FailureKind, &'static str);

/// Damage that keeps an image from being opened: what it is, what it does, how
/// it is refused.
fn closed() -> [Case; 21] {
    use FailureKind::{Damaged, NotThisFormat, TooLarge, Unsupported};
    [
        (
            "cookies",
            |i| {
                put_both(i, 0, b"connectix");
            },
            NotThisFormat,
            "no footer at the end",
        ),
        (
            "checksums",
            |i| {
                i[70] ^= 1;
                let n = i.len();
                i[n - 512 + 70] ^= 1;
            },
            Damaged,
            "the checksum",
        ),
        (
            "footer version",
            |i| put_both(i, 12, &[0, 2, 0, 1]),
            Unsupported,
            "of version 2.1",
        ),
        (
            "type",
            |i| put_both(i, 60, &[0, 0, 0, 5]),
            Unsupported,
            "of type 5",
        ),
        (
            "size",
            |i| put_both(i, 48, &[1; 8]),
            TooLarge,
            "the format has at most",
        ),
        (
            "data offset 0",
            |i| put_both(i, 16, &[0; 8]),
            Damaged,
            "dynamic header is at 0x0",
        ),
        (
            "data offset odd",
            |i| put_both(i, 16, &[0, 0, 0, 0, 0, 0, 2, 1]),
            Damaged,
            "dynamic header is at 0x201",
        ),
        (
            "data offset far",
            |i| put_both(i, 16, &[0, 0, 1, 0, 0, 0, 0, 0]),
            Damaged,
            "past the end of the file",
        ),
        (
            "data offsets differ",
            |i| put(i, 0, 16, &[0, 0, 0, 0, 0, 0, 4, 0]),
            Damaged,
            "do not agree on where",
        ),
        (
            "header cookie",
            |i| put(i, HEADER, 0, b"cxspaces"),
            Damaged,
            "does not start with `cxsparse`",
        ),
        (
            "header checksum",
            |i| i[HEADER + 50] ^= 1,
            Damaged,
            "dynamic header at 0x200 has the checksum",
        ),
        (
            "header version",
            |i| put(i, HEADER, 24, &[0, 1, 0, 1]),
            Unsupported,
            "dynamic header is of version 1.1",
        ),
        (
            "table odd",
            |i| put(i, HEADER, 16, &[0, 0, 0, 0, 0, 0, 6, 4]),
            Damaged,
            "is not at a sector",
        ),
        (
            "table far",
            |i| put(i, HEADER, 16, &[0x7f; 8]),
            Damaged,
            "is not at a sector",
        ),
        (
            "table at the end",
            |i| put(i, HEADER, 16, &[0, 0, 1, 0, 0, 0, 0, 0]),
            Damaged,
            "lies past the end of the file",
        ),
        (
            "table on the footer",
            |i| put(i, HEADER, 16, &[0; 8]),
            Damaged,
            "overlaps the footer copy",
        ),
        (
            "table on the header",
            |i| put(i, HEADER, 16, &[0, 0, 0, 0, 0, 0, 4, 0]),
            Damaged,
            "overlaps the dynamic header",
        ),
        (
            "entries many",
            |i| put(i, HEADER, 28, &[0xff; 4]),
            Damaged,
            "lies past the end of the file",
        ),
        (
            "entries few",
            |i| put(i, HEADER, 28, &[0, 0, 0, 3]),
            Damaged,
            "too few for a disk of 8388608 bytes",
        ),
        (
            "block size odd",
            |i| put(i, HEADER, 32, &[0, 0x30, 0, 0]),
            Damaged,
            "not a power of two",
        ),
        (
            "block size small",
            |i| put(i, HEADER, 32, &[0, 0, 1, 0]),
            Damaged,
            "not a power of two of at least 512",
        ),
    ]
}

#[test]
fn each_field_has_its_own_error() {
    for (name, damage, kind, words) in closed() {
        let mut image = dynamic();
        damage(&mut image);
        let failure = opened(&image).expect_err(name);
        assert_eq!(failure.kind, kind, "{name}: {failure}");
        assert!(failure.message.contains(words), "{name}: {failure}");
    }
}

#[test]
fn every_request_on_a_damaged_image_is_answered_or_refused() {
    let damaged = |(name, damage, ..): Case| {
        let mut image = dynamic();
        damage(&mut image);
        Variant::new(name, image)
    };
    let mut variants: Vec<Variant> = closed().into_iter().map(damaged).collect();
    let mut cut = fixed();
    cut.drain(..512);
    variants.push(Variant::new("fixed disk cut off", cut));
    for entry in ENTRIES {
        let mut image = dynamic();
        image[TABLE + 4..TABLE + 8].copy_from_slice(&entry.0.to_be_bytes());
        variants.push(Variant::new(entry.1, image));
    }
    field_tests::refuse_all(Format::Vhd, variants);
}

#[test]
fn every_check_has_a_damaged_image() {
    let tests: &[fn()] = &[
        every_request_on_a_damaged_image_is_answered_or_refused,
        a_block_over_the_footer_is_refused_before_a_change,
        parent_tests::a_parent_without_a_name_or_with_one_that_is_too_long_is_refused,
    ];
    field_tests::every_check_refuses("vhd", tests, &[]);
}

#[test]
fn a_file_that_is_cut_off_is_refused() {
    let mut image = fixed();
    image.drain(..512);
    let failure = opened(&image).unwrap_err();
    assert!(failure.message.contains("the file is cut off"), "{failure}");
    for len in [0, 100, 510] {
        let failure = opened(&dynamic()[..len]).unwrap_err();
        assert_eq!(failure.kind, FailureKind::NotThisFormat);
    }
}

#[test]
fn what_forbids_changes_is_said_at_once() {
    let batmap: Damage = |image| {
        image.truncate(END);
        image.extend(b"tdbatmap");
        image.resize(END + 1024, 0);
        let footer = image[..512].to_vec();
        image[TABLE..END].fill(0xff);
        image.extend(footer);
    };
    let cases: [(Damage, &str); 5] = [
        (|image| put_both(image, 84, &[1]), "saved state"),
        (batmap, "tdbatmap"),
        (|image| image.truncate(image.len() - 1), "511 bytes"),
        (
            |image| drop(image.drain(5000..5001)),
            "not at a multiple of 512",
        ),
        (
            |image| {
                put_both(image, 60, &[0, 0, 0, 4]);
                put(image, HEADER, 64, &[0, b'a']);
            },
            "differencing",
        ),
    ];
    for (damage, words) in cases {
        let mut image = dynamic();
        damage(&mut image);
        let facts = opened(&image).unwrap();
        for refusal in [&facts.no_resize, &facts.no_write] {
            let refusal = refusal.as_ref().expect(words);
            assert_eq!(refusal.kind, FailureKind::Unsupported);
            assert!(refusal.message.contains(words), "{refusal}");
        }
        let mut session = Session::new(image.clone());
        session.open(Some(Format::Vhd)).unwrap();
        let refusal = session.call(resize(16 * M)).unwrap_err();
        assert_eq!(Some(refusal), facts.no_resize);
    }
}

/// Entries that lead nowhere, and what is said about them.
const ENTRIES: [(u32, &str); 4] = [
    (0, "overlaps the footer copy"),
    (1, "overlaps the dynamic header"),
    (3, "overlaps the block allocation table"),
    (0x00ff_0000, "reaches past the end of the file"),
];

#[test]
fn entries_that_lead_nowhere_are_refused_where_they_are_used() {
    for (entry, words) in ENTRIES {
        let mut image = dynamic();
        image[TABLE + 4..TABLE + 8].copy_from_slice(&entry.to_be_bytes());
        let mut session = Session::new(image);
        session.open(None).unwrap();
        let words = format!(
            "block 1 at {:#x} (guest offset 0x200000) {words}",
            u64::from(entry) * 512
        );
        let refused = [
            session.read(2 * M, 512).unwrap_err(),
            session.call(resize(16 * M)).unwrap_err(),
            session.call(resize(5 * M)).unwrap_err(),
        ];
        for failure in refused {
            assert_eq!(failure.kind, FailureKind::Damaged);
            assert!(failure.message.contains(&words), "{failure}");
        }
        assert!(session.read(0, 512).is_ok(), "the rest is there");
        assert_eq!(checked(&mut session).corruptions, 1);
    }
}

#[test]
fn blocks_that_overlap_are_found() {
    let mut image = dynamic();
    let place = image[TABLE..TABLE + 4].to_vec();
    image[TABLE + 4..TABLE + 8].copy_from_slice(&place);
    let mut session = Session::new(image);
    session.open(None).unwrap();
    let failure = session.call(resize(5 * M)).unwrap_err();
    assert!(
        failure.message.contains("blocks 0 and 1 overlap"),
        "{failure}"
    );
    let report = checked(&mut session);
    assert_eq!((report.corruptions, report.leaks), (1, 0));
    assert!(
        session.host.findings[0]
            .text
            .contains("blocks 0 and 1 overlap"),
        "{:?}",
        session.host.findings
    );
}

#[test]
fn a_sound_image_has_no_findings() {
    for image in [dynamic(), fixed()] {
        let mut session = Session::new(image);
        session.open(None).unwrap();
        let report = checked(&mut session);
        assert!(
            session.host.findings.is_empty(),
            "{:?}",
            session.host.findings
        );
        assert_eq!(
            (report.corruptions, report.leaks, report.check_errors),
            (0, 0, 0)
        );
    }
}

#[test]
fn sizes_are_refused_that_the_format_does_not_have() {
    let mut session = Session::new(dynamic());
    session.open(None).unwrap();
    let odd = session.call(resize(8 * M + 100)).unwrap_err();
    assert!(odd.message.contains("multiple of 512"), "{odd}");
    let large = session.call(resize((2040 << 30) + 512)).unwrap_err();
    assert_eq!(large.kind, FailureKind::TooLarge);
    assert!(session.call(resize(2040 << 30)).is_ok());
}

/// Virtual PC goes by the geometry, others by the size: 17 sectors, and 2 MiB.
const SMALL_GEOMETRY: [u8; 4] = [0, 1, 1, 17];

#[test]
fn what_only_other_programs_see_of_a_fixed_disk_is_kept() {
    let mut image = fixed();
    let end = image.len() - 512;
    image[..end].fill(7);
    put(&mut image, end, 28, b"vpc ");
    put(&mut image, end, 56, &SMALL_GEOMETRY);
    let mut session = Session::new(image.clone());
    assert_eq!(session.open(None).unwrap().virtual_size, 17 * 512);
    for repair in [Repair::Leaks, Repair::All] {
        let check = Request::Check {
            repair: Some(repair),
        };
        let Ok(Reply::Checked { report, repair }) = session.call(check) else {
            panic!("no report");
        };
        assert_eq!((report.leaks, repair.plan.is_empty()), (0, true));
    }
    match session.call(resize(17 * 512)) {
        Ok(Reply::Plan(reply)) => assert!(reply.plan.is_empty()),
        other => panic!("not a plan: {other:?}"),
    }
    let refusal = session.call(resize(18 * 512)).unwrap_err();
    assert!(refusal.message.contains("at least 1048576"), "{refusal}");
    match session.call(resize(3 * M)) {
        Ok(Reply::Plan(reply)) => session.host.apply(&reply.plan),
        other => panic!("not a plan: {other:?}"),
    }
    assert_eq!(session.open(None).unwrap().virtual_size, 3 * M);
    assert!(session.host.image[..end] == image[..end]);
    let added = &session.host.image[end..3 * M as usize];
    assert!(added.iter().all(|&byte| byte == 0));
}

#[test]
fn what_only_other_programs_see_of_a_dynamic_disk_is_kept() {
    let mut image = dynamic();
    put_both(&mut image, 28, b"vpc ");
    put_both(&mut image, 56, &SMALL_GEOMETRY);
    let mut session = Session::new(image);
    assert_eq!(session.open(None).unwrap().virtual_size, 17 * 512);
    match session.call(resize(17 * 512)) {
        Ok(Reply::Plan(reply)) => assert!(reply.plan.is_empty()),
        other => panic!("not a plan: {other:?}"),
    }
    assert_eq!(checked(&mut session).leaks, 0);
    match session.call(resize(9 * M)) {
        Ok(Reply::Plan(reply)) => session.host.apply(&reply.plan),
        other => panic!("not a plan: {other:?}"),
    }
    session.open(None).unwrap();
    let content = session.read(0, 9 * M).unwrap();
    let expected = [(0x11, 2 * M), (0x22, 2 * M), (0, 5 * M)];
    let expected = expected.map(|(byte, len)| alloc::vec![byte; len as usize]);
    assert!(content == expected.concat());
}

#[test]
fn a_disk_cannot_shrink_to_nothing() {
    for image in [dynamic(), fixed()] {
        let mut session = Session::new(image);
        session.open(None).unwrap();
        let refusal = session.call(resize(0)).unwrap_err();
        assert_eq!(refusal.kind, FailureKind::InvalidRequest);
    }
}

#[test]
fn a_block_over_the_footer_is_refused_before_a_change() {
    let mut image = dynamic();
    image[TABLE + 7] += 1;
    let mut session = Session::new(image);
    session.open(None).unwrap();
    for size in [5 * M, 16 * M] {
        let refusal = session.call(resize(size)).unwrap_err();
        assert!(refusal.message.contains("overlaps the footer"), "{refusal}");
    }
}
