//! Damaged and unusual images: each field that is looked at has its own answer,
//! and the image stays as it is.

use super::footer::checksum;
use crate::proto::{Create, Preallocation};
use crate::testing::{FRESH, Session};
use crate::{Facts, Failure, FailureKind, Format, Reply, Request};
use alloc::format;
use alloc::string::ToString;
use alloc::vec;
use alloc::vec::Vec;

const M: u64 = 1 << 20;
/// Where things are in a new dynamic image of 8 MiB.
const HEADER: usize = 512;
const TABLE: usize = 1536;
const END: usize = 2048;

fn made(size: u64, options: &[(&str, &str)]) -> Vec<u8> {
    let options = options.iter();
    let create = Create {
        format: Format::Vhd,
        size,
        options: options
            .map(|(key, value)| (key.to_string(), value.to_string()))
            .collect(),
        backing: None,
        backing_size: None,
        backing_identity: None,
    };
    let mut session = Session::default();
    let request = Request::Create {
        create,
        name: "disk.vhd".to_string(),
        fresh: FRESH,
    };
    match session.call(request) {
        Ok(Reply::Plan(reply)) => session.host.apply(&reply.plan),
        other => panic!("not a plan: {other:?}"),
    }
    session.host.image
}

/// A dynamic image of 8 MiB with blocks 0 and 1.
fn dynamic() -> Vec<u8> {
    let mut image = made(8 * M, &[("force_size", "on")]);
    let footer = image.split_off(END);
    for block in 0..2u32 {
        let at = image.len();
        image[TABLE + 4 * block as usize..][..4]
            .copy_from_slice(&((at / 512) as u32).to_be_bytes());
        image.resize(at + 512, 0xff);
        image.resize(at + 512 + (2 << 20), 0x11 * (block + 1) as u8);
    }
    image.extend(footer);
    image
}

fn fixed() -> Vec<u8> {
    made(M, &[("force_size", "on"), ("subformat", "fixed")])
}

/// Changes bytes of a header or footer, and its checksum.
fn put(image: &mut [u8], start: usize, at: usize, data: &[u8]) {
    image[start + at..][..data.len()].copy_from_slice(data);
    let (len, field) = match start == HEADER {
        true => (1024, 36),
        false => (512, 64),
    };
    let sum = checksum(&image[start..start + len], field).unwrap();
    image[start + field..][..4].copy_from_slice(&sum.to_be_bytes());
}

/// Changes both footers alike.
fn put_both(image: &mut [u8], at: usize, data: &[u8]) {
    let end = image.len() - 512;
    put(image, 0, at, data);
    put(image, end, at, data);
}

fn opened(image: &[u8]) -> Result<Facts, Failure> {
    let mut session = Session::new(image.to_vec());
    let facts = session.open(Some(Format::Vhd));
    assert!(session.host.image == image, "opening changes nothing");
    facts
}

type Damage = fn(&mut Vec<u8>);

#[test]
fn each_field_has_its_own_error() {
    use FailureKind::{Damaged, NotThisFormat, TooLarge, Unsupported};
    let cases: [(&str, Damage, FailureKind, &str); 21] = [
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
    ];
    for (name, damage, kind, words) in cases {
        let mut image = dynamic();
        damage(&mut image);
        let failure = opened(&image).expect_err(name);
        assert_eq!(failure.kind, kind, "{name}: {failure}");
        assert!(failure.message.contains(words), "{name}: {failure}");
    }
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

fn resize(size: u64) -> Request {
    Request::Resize {
        size,
        preallocation: Preallocation::Off,
        shrink: true,
        backing_size: None,
    }
}

#[test]
fn entries_that_lead_nowhere_are_refused_where_they_are_used() {
    let cases: [(u32, &str); 4] = [
        (0, "overlaps the footer copy"),
        (1, "overlaps the dynamic header"),
        (3, "overlaps the block allocation table"),
        (0x00ff_0000, "reaches past the end of the file"),
    ];
    for (entry, words) in cases {
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

fn checked(session: &mut Session) -> crate::findings::Report {
    match session.call(Request::Check { repair: None }) {
        Ok(Reply::Checked { report, .. }) => report,
        other => panic!("not an answer to Check: {other:?}"),
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
    assert_eq!((report.corruptions, report.leaks), (1, 1));
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

/// A differencing image over a parent of 4 MiB: sector 1 of block 0 is here.
fn differencing(locators: &[(&[u8; 4], &str)]) -> Vec<u8> {
    let mut image = dynamic();
    put_both(&mut image, 60, &[0, 0, 0, 4]);
    let mut bitmap = vec![0; 512];
    bitmap[0] = 0x40;
    image[END..END + 512].copy_from_slice(&bitmap);
    put(&mut image, HEADER, 40, &[7; 16]);
    let name: Vec<u8> = "parent.vhd"
        .encode_utf16()
        .flat_map(u16::to_be_bytes)
        .collect();
    put(&mut image, HEADER, 64, &name);
    for (number, (kind, name)) in locators.iter().enumerate() {
        let footer = image.split_off(image.len() - 512);
        let at = image.len() as u64;
        let name: Vec<u8> = name.encode_utf16().flat_map(u16::to_le_bytes).collect();
        let mut locator = kind.to_vec();
        locator.extend(512u32.to_be_bytes());
        locator.extend((name.len() as u32).to_be_bytes());
        locator.extend([0; 4]);
        locator.extend(at.to_be_bytes());
        image.extend(name);
        image.resize(at as usize + 512, 0);
        image.extend(footer);
        put(&mut image, HEADER, 576 + 24 * number, &locator);
    }
    image
}

#[test]
fn a_differencing_image_names_its_parent_and_has_single_sectors() {
    use crate::ExtentKind::{Data, Unallocated};
    let image = differencing(&[(b"W2ku", "C:\\vm\\base.vhd"), (b"W2ru", ".\\base.vhd")]);
    let mut session = Session::new(image);
    let facts = session.open(None).unwrap();
    let backing = facts.backing.unwrap();
    let names = ["./base.vhd", "C:/vm/base.vhd", "base.vhd", "parent.vhd"];
    assert_eq!(backing.names, names);
    assert_eq!(backing.format.as_deref(), Some("vpc"));
    let uuid = "07070707-0707-0707-0707-070707070707";
    assert_eq!(backing.identity.as_deref(), Some(uuid));
    let kinds: Vec<_> = session.map(0, 8 * M).unwrap();
    let kinds: Vec<_> = kinds
        .iter()
        .map(|extent| match extent.kind {
            Data { at, .. } => (extent.offset, extent.len, Some(at)),
            Unallocated => (extent.offset, extent.len, None),
            other => panic!("{other:?}"),
        })
        .collect();
    let block_0 = END as u64 + 512;
    let expected = [
        (0, 512, None),
        (512, 512, Some(block_0 + 512)),
        (1024, 2 * M - 1024, None),
        (2 * M, 2 * M, Some(block_0 + 2 * M + 512)),
        (4 * M, 4 * M, None),
    ];
    assert_eq!(kinds, expected);
    assert_eq!(checked(&mut session).corruptions, 0);
}

#[test]
fn a_parent_without_a_name_or_with_one_that_is_too_long_is_refused() {
    let mut image = differencing(&[]);
    put(&mut image, HEADER, 64, &[0, 0]);
    let failure = opened(&image).unwrap_err();
    assert!(failure.message.contains("does not name it"), "{failure}");
    let mut image = differencing(&[(b"W2ru", "a")]);
    put(&mut image, HEADER, 576 + 8, &[0, 1, 0, 0]);
    let failure = opened(&image).unwrap_err();
    assert!(
        failure.message.contains("parent locator 0 has 65536 bytes"),
        "{failure}"
    );
}
