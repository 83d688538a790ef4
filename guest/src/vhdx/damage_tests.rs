//! One damaged image for each field that is checked: each is refused with its
//! own words, and nothing is changed.

use super::checksum::seal;
use super::format::{MIB, bat, header, metadata, region};
use super::{bat_tests, locator_tests, log_tests};
use crate::Format;
use crate::error::FailureKind::{self, Damaged, NotThisFormat, Unsupported};
use crate::field_tests::{self, Variant};
use crate::proto::{Create, Preallocation, Reply, Request};
use crate::testing::{FRESH, Session};
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;

pub(super) const HEADER: usize = 64 << 10;
pub(super) const OTHER_HEADER: usize = 128 << 10;
pub(super) const TABLE: usize = 192 << 10;
pub(super) const OTHER_TABLE: usize = 256 << 10;
pub(super) const BAT: usize = 2 << 20;
const METADATA: usize = 3 << 20;
const ITEMS: usize = METADATA + (64 << 10);
/// Offset of an item's entry in the metadata table.
const fn item(nth: usize) -> usize {
    METADATA + metadata::ENTRIES + nth * metadata::ENTRY_LEN
}
/// Offset of a region's entry in the region table.
pub(super) const fn entry(nth: usize) -> usize {
    region::ENTRIES + nth * region::ENTRY_LEN
}

/// An image of three blocks of 1 MiB, of which the first has data.
pub(super) fn image() -> Vec<u8> {
    let mut session = Session::default();
    let create = Create {
        format: Format::Vhdx,
        size: 3 << 20,
        options: vec![("block_size".into(), "1M".into())],
        backing: None,
        backing_size: None,
        backing_identity: None,
    };
    let reply = session.call(Request::Create {
        create,
        name: "disk.vhdx".into(),
        fresh: FRESH,
    });
    let Ok(Reply::Plan(reply)) = reply else {
        panic!("no plan: {reply:?}");
    };
    session.host.apply(&reply.plan);
    let mut image = session.host.image;
    put(&mut image, BAT, (8 << 20) | bat::FULLY_PRESENT);
    image.resize(9 << 20, 0x11);
    image
}

pub(super) fn put(image: &mut [u8], at: usize, value: u64) {
    image[at..at + 8].copy_from_slice(&value.to_le_bytes());
}

fn put32(image: &mut [u8], at: usize, value: u32) {
    image[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

/// Changes both headers alike.
fn headers(image: &mut [u8], change: impl Fn(&mut [u8])) {
    for at in [HEADER, OTHER_HEADER] {
        let header = &mut image[at..at + header::LEN];
        change(header);
        seal(header, header::CHECKSUM);
    }
}

/// Changes both region tables alike.
fn tables(image: &mut [u8], change: impl Fn(&mut [u8])) {
    for at in [TABLE, OTHER_TABLE] {
        let table = &mut image[at..at + region::LEN];
        change(table);
        seal(table, region::CHECKSUM);
    }
}

/// What the damage is, what it does, how it is refused.
type Case = (&'static str, fn(&mut Vec<u8>), FailureKind, &'static str);

/// Damage that keeps the image from being opened.
const CLOSED: &[Case] = &[
    (
        "file identifier",
        |image| image[0] = b'V',
        NotThisFormat,
        "the image is not in VHDX format",
    ),
    (
        "file length",
        |image| image.truncate(MIB as usize - 1),
        Damaged,
        "the file is 1048575 bytes long",
    ),
    (
        "header signature",
        |image| headers(image, |header| header[0] = b'H'),
        Damaged,
        "no valid header: the first does not begin with 'head'",
    ),
    (
        "header checksum",
        |image| {
            image[HEADER + 16] ^= 1;
            image[OTHER_HEADER + 16] ^= 1;
        },
        Damaged,
        "no valid header: the first has the checksum",
    ),
    (
        "header version",
        |image| headers(image, |header| header[header::VERSION] = 2),
        Damaged,
        "no valid header: the first has version 2 instead of 1",
    ),
    (
        "header sequence",
        |image| {
            headers(image, |header| put(header, header::SEQUENCE, 7));
            image[HEADER + header::DATA_WRITE] ^= 1;
            seal(&mut image[HEADER..HEADER + header::LEN], header::CHECKSUM);
        },
        Damaged,
        "both headers have the sequence number 7 and differ",
    ),
    (
        "log length",
        |image| headers(image, |header| put32(header, header::LOG_LEN, 4096)),
        Damaged,
        "the log's length of 4096 bytes is no multiple of 1 MiB",
    ),
    (
        "log offset",
        |image| headers(image, |header| put(header, header::LOG_OFFSET, 4096)),
        Damaged,
        "the log's offset 0x1000 is not a multiple of 1 MiB",
    ),
    (
        "log place",
        |image| headers(image, |header| put(header, header::LOG_OFFSET, 2 << 20)),
        Damaged,
        "the block allocation table at 0x200000 (1048576 bytes) overlaps the log",
    ),
    (
        "log past the end",
        |image| headers(image, |header| put(header, header::LOG_OFFSET, 20 << 20)),
        Damaged,
        "the log at 0x1400000 (1048576 bytes) reaches past the end of the file",
    ),
    (
        "log version",
        |image| {
            headers(image, |header| {
                header[header::LOG] = 1;
                header[header::LOG_VERSION] = 1;
            });
        },
        Unsupported,
        "the log has version 1, which is not known",
    ),
    (
        "log too long to replay",
        |image| {
            headers(image, |header| {
                header[header::LOG] = 1;
                put32(header, header::LOG_LEN, 65 << 20);
            });
        },
        Unsupported,
        "the log is 68157440 bytes long and has to be replayed",
    ),
    (
        "log without entries",
        |image| headers(image, |header| header[header::LOG] = 1),
        Damaged,
        "the log is in use, but holds no valid sequence of entries",
    ),
    (
        "region table signature",
        |image| tables(image, |table| table[0] = b'R'),
        Damaged,
        "no valid region table: the first does not begin with 'regi'",
    ),
    (
        "region table checksum",
        |image| {
            image[TABLE + 4] ^= 1;
            image[OTHER_TABLE + 4] ^= 1;
        },
        Damaged,
        "no valid region table: the first has the checksum",
    ),
    (
        "region table count",
        |image| tables(image, |table| put32(table, region::COUNT, 2048)),
        Damaged,
        "the region table has 2048 entries, more than 2047",
    ),
    (
        "region missing",
        |image| tables(image, |table| put32(table, region::COUNT, 1)),
        Damaged,
        "the region table has no entry for the metadata region",
    ),
    (
        "region twice",
        |image| {
            tables(image, |table| {
                table.copy_within(entry(0)..entry(1), entry(2));
                put32(table, region::COUNT, 3);
            });
        },
        Damaged,
        "the region table has two entries for the block allocation table",
    ),
    (
        "region unknown and required",
        |image| {
            tables(image, |table| {
                put(table, entry(2) + region::ENTRY_OFFSET, 5 << 20);
                put32(table, entry(2) + region::ENTRY_LENGTH, 1 << 20);
                put32(table, entry(2) + region::ENTRY_FLAGS, 1);
                put32(table, region::COUNT, 3);
            });
        },
        Unsupported,
        "the image needs the region 00000000-0000-0000-0000-000000000000",
    ),
    (
        "region offset",
        |image| {
            tables(image, |table| {
                put(table, entry(0) + region::ENTRY_OFFSET, 12345)
            })
        },
        Damaged,
        "region table, entry 0 (the block allocation table): the offset 0x3039 is not a multiple",
    ),
    (
        "region length",
        |image| {
            tables(image, |table| {
                put32(table, entry(1) + region::ENTRY_LENGTH, 0)
            })
        },
        Damaged,
        "region table, entry 1 (the metadata region): the length 0x0 is not a multiple",
    ),
    (
        "region overlap",
        |image| {
            tables(image, |table| {
                put(table, entry(1) + region::ENTRY_OFFSET, 2 << 20)
            })
        },
        Damaged,
        "the metadata region at 0x200000 (1048576 bytes) overlaps the block allocation table",
    ),
    (
        "region past the end",
        |image| {
            tables(image, |table| {
                put(table, entry(0) + region::ENTRY_OFFSET, 9 << 20)
            })
        },
        Damaged,
        "the block allocation table at 0x900000 (1048576 bytes) reaches past the end of the file",
    ),
    (
        "metadata signature",
        |image| image[METADATA] = b'M',
        Damaged,
        "the metadata table does not begin with 'metadata'",
    ),
    (
        "metadata count",
        |image| image[METADATA + metadata::COUNT..][..2].fill(0xff),
        Damaged,
        "the metadata table has 65535 entries, more than 2047",
    ),
    (
        "metadata item missing",
        |image| image[METADATA + metadata::COUNT] = 4,
        Damaged,
        "the metadata table has no entry for the physical sector size",
    ),
    (
        "metadata item twice",
        |image| image.copy_within(item(0)..item(1), item(1)),
        Damaged,
        "the metadata table has two entries for the file parameters",
    ),
    (
        "metadata item unknown and required",
        |image| image[item(2)] ^= 0xff,
        Unsupported,
        "the image needs the metadata item beca1254-b2e6-4523-93ef-c309e000c746",
    ),
    (
        "metadata item in the table",
        |image| put32(image, item(1) + metadata::ENTRY_OFFSET, 4096),
        Damaged,
        "the virtual disk size at 0x1000 overlaps the metadata table",
    ),
    (
        "metadata item past the end",
        |image| put32(image, item(1) + metadata::ENTRY_OFFSET, u32::MAX),
        Damaged,
        "the virtual disk size at 0xffffffff (8 bytes) reaches past the end of the metadata region",
    ),
    (
        "metadata item length",
        |image| put32(image, item(1) + metadata::ENTRY_LENGTH, 4),
        Damaged,
        "the virtual disk size is 4 bytes long instead of 8",
    ),
    (
        "metadata item overlap",
        |image| put32(image, item(1) + metadata::ENTRY_OFFSET, (64 << 10) + 4),
        Damaged,
        "the metadata items at 0x10000 and 0x10004 overlap",
    ),
    (
        "block size",
        |image| put32(image, ITEMS, 3 << 20),
        Damaged,
        "the block size of 3145728 bytes is not a power of two",
    ),
    (
        "block size too small",
        |image| put32(image, ITEMS, 1 << 19),
        Damaged,
        "the block size of 524288 bytes is not a power of two between 1 MiB and 256 MiB",
    ),
    (
        "file flags",
        |image| image[ITEMS + 4] = 4,
        Unsupported,
        "the file parameters have the flags 0x4, which are not known",
    ),
    (
        "parent without a locator",
        |image| image[ITEMS + 4] = 2,
        Damaged,
        "the image has a parent, and no parent locator",
    ),
    (
        "disk size between sectors",
        |image| put(image, ITEMS + 8, 1000),
        Damaged,
        "the virtual disk size of 1000 bytes is not a multiple of the sector size of 512",
    ),
    (
        "disk size too large",
        |image| put(image, ITEMS + 8, (64 << 40) + 512),
        Damaged,
        "the virtual disk size of 70368744178176 bytes is more than 64 TiB",
    ),
    (
        "disk size past the BAT",
        |image| put(image, ITEMS + 8, 1 << 40),
        Damaged,
        "the block allocation table is 1048576 bytes long, a disk of 1099511627776 bytes needs",
    ),
    (
        "logical sector size",
        |image| put32(image, ITEMS + 32, 1024),
        Damaged,
        "the logical sector size of 1024 bytes is neither 512 nor 4096",
    ),
    (
        "physical sector size",
        |image| put32(image, ITEMS + 36, 0),
        Damaged,
        "the physical sector size of 0 bytes is neither 512 nor 4096",
    ),
];

#[test]
fn the_image_is_sound_before_it_is_damaged() {
    let mut session = Session::new(image());
    let facts = session.open(None).unwrap();
    assert_eq!((facts.virtual_size, facts.unsettled), (3 << 20, None));
    let content = session.read(0, 3 << 20).unwrap();
    assert!(content[..1 << 20].iter().all(|&byte| byte == 0x11));
    assert!(content[1 << 20..].iter().all(|&byte| byte == 0));
}

#[test]
fn every_field_has_its_own_refusal() {
    for (name, damage, kind, words) in CLOSED {
        let mut damaged = image();
        damage(&mut damaged);
        let mut session = Session::new(damaged.clone());
        let refused = session.open(Some(Format::Vhdx));
        let failure = refused.expect_err(name);
        assert_eq!(failure.kind, *kind, "{name}: {failure}");
        assert!(failure.message.starts_with(words), "{name}: {failure}");
        assert!(session.host.image == damaged, "{name}");
    }
}

#[test]
fn every_request_on_a_damaged_image_is_answered_or_refused() {
    let closed = CLOSED.iter().map(|(name, damage, ..)| {
        let mut damaged = image();
        damage(&mut damaged);
        Variant::new(name, damaged)
    });
    let entries = bat_tests::ENTRIES.iter().map(|(name, raw, _)| {
        let mut damaged = image();
        put(&mut damaged, BAT, *raw);
        Variant::new(name, damaged)
    });
    let logs = log_tests::damaged().into_iter();
    let logs = logs.map(|(name, image)| Variant::new(name, image));
    let variants = closed.chain(entries).chain(logs).collect();
    field_tests::refuse_all(Format::Vhdx, variants);
}

#[test]
fn a_log_past_the_end_is_not_replayed() {
    let mut damaged = image();
    headers(&mut damaged, |header| {
        header[header::LOG] = 1;
        put(header, header::LOG_OFFSET, 20 << 20);
    });
    let failure = Session::new(damaged).open(None).unwrap_err();
    let words = "the log at 0x1400000 (1048576 bytes) reaches past the end of the file";
    assert!(failure.message.starts_with(words), "{failure}");
}

#[test]
fn an_image_without_a_log_cannot_change() {
    let mut bare = image();
    headers(&mut bare, |header| put32(header, header::LOG_LEN, 0));
    let mut session = Session::new(bare.clone());
    session.open(None).unwrap();
    let failure = session.call(Request::Resize {
        size: 1 << 20,
        preallocation: Preallocation::Off,
        shrink: true,
        backing_size: None,
    });
    let failure = failure.expect_err("a shrink goes through the log");
    let words = "the image has no log, which this change needs";
    assert!(failure.message.starts_with(words), "{failure}");
    assert!(session.host.image == bare);
}

#[test]
fn every_check_has_a_damaged_image() {
    let tests: &[fn()] = &[
        every_request_on_a_damaged_image_is_answered_or_refused,
        a_log_past_the_end_is_not_replayed,
        an_image_without_a_log_cannot_change,
        bat_tests::blocks_that_share_their_place_are_found,
        log_tests::entries_that_claim_each_other_are_refused_without_reading_them_all,
        log_tests::an_entry_that_does_not_fit_into_memory_is_refused,
        log_tests::a_log_that_names_an_impossible_length_is_refused,
        log_tests::a_log_that_changes_too_much_is_not_replayed,
        locator_tests::a_locator_that_names_nothing_is_refused,
        locator_tests::a_child_is_neither_resized_nor_written,
        locator_tests::a_partial_block_without_a_bitmap_is_damage,
    ];
    let exceptions = [
        (
            "update.rs",
            "could not be replayed after",
            "such a log is longer than a test can hold",
        ),
        (
            "region.rs",
            "the BAT is too long",
            "at most 64 TiB have one",
        ),
        ("region.rs", "a region is too long", "only new images"),
        ("metadata.rs", "blocks are too large", "only new images"),
        (
            "metadata.rs",
            "the metadata table has no items",
            "each is missed by its name before",
        ),
    ];
    field_tests::every_check_refuses("vhdx", tests, &exceptions);
}

/// Corruptions, and what was said.
pub(super) fn check(session: &mut Session) -> (u64, Vec<String>) {
    session.host.findings.clear();
    let reply = session.call(Request::Check { repair: None });
    let Ok(Reply::Checked { report, .. }) = reply else {
        panic!("not checked: {reply:?}");
    };
    let texts = session.host.findings.drain(..).map(|finding| finding.text);
    (report.corruptions, texts.collect())
}
