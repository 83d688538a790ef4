//! Logs that have to be replayed, and logs that cannot be.

use super::checksum::seal;
use super::damage_tests::image;
use super::format::{PAGE, header, log as on_disk};
use super::guid::Guid;
use super::log;
use crate::error::FailureKind::{Damaged, Unsupported};
use crate::proto::{Reply, Request};
use crate::testing::Session;
use alloc::vec;
use alloc::vec::Vec;

const LOG: usize = 1 << 20;
const LOG_LEN: usize = 1 << 20;
const GUID: Guid = Guid([7; 16]);
/// The page of the metadata that holds the items.
const ITEMS: u64 = (3 << 20) + (64 << 10);
/// Offset in it of the virtual disk size.
const SIZE: usize = 8;

/// The metadata page of an image with another disk size.
fn page(image: &[u8], size: u64) -> Vec<u8> {
    let mut page = image[ITEMS as usize..][..PAGE as usize].to_vec();
    page[SIZE..SIZE + 8].copy_from_slice(&size.to_le_bytes());
    page
}

/// An entry with a number and a tail.
fn entry(pages: &[(u64, Vec<u8>)], sequence: u8, tail: u32, file_len: usize) -> Vec<u8> {
    let encoded = log::encode(pages, (0, 0), GUID, file_len as u64, LOG_LEN as u64);
    let mut entry = encoded.unwrap().unwrap();
    entry[on_disk::SEQUENCE] = sequence;
    entry[on_disk::TAIL..on_disk::TAIL + 4].copy_from_slice(&tail.to_le_bytes());
    for nth in 0..pages.len() {
        let descriptor = on_disk::HEADER_LEN + nth * on_disk::DESCRIPTOR_LEN;
        entry[descriptor + on_disk::DESCRIPTOR_SEQUENCE] = sequence;
        entry[(nth + 1) * PAGE as usize + on_disk::DATA_LOW] = sequence;
    }
    seal(&mut entry, on_disk::CHECKSUM);
    entry
}

/// Puts an entry into the ring.
fn place(image: &mut [u8], at: usize, entry: &[u8]) {
    for (nth, byte) in entry.iter().enumerate() {
        image[LOG + (at + nth) % LOG_LEN] = *byte;
    }
}

/// Marks the log as in use.
fn mark(image: &mut [u8]) {
    for at in header::SLOTS {
        let header = &mut image[at as usize..at as usize + header::LEN];
        header[header::LOG..header::LOG + 16].copy_from_slice(&GUID.0);
        seal(header, header::CHECKSUM);
    }
}

/// An image whose log changes the disk size by one entry.
fn pending(size: u64) -> Vec<u8> {
    let mut image = image();
    let entry = entry(&[(ITEMS, page(&image, size))], 1, 0, image.len());
    place(&mut image, 0, &entry);
    mark(&mut image);
    image
}

fn settled(image: Vec<u8>) -> Session {
    let mut session = Session::new(image);
    let facts = session.open(None).unwrap();
    assert_eq!(
        facts.unsettled.as_deref(),
        Some("its log has to be replayed")
    );
    let Ok(Reply::Plan(reply)) = session.call(Request::Settle) else {
        panic!("no plan");
    };
    session.host.apply(&reply.plan);
    let after = session.open(None).unwrap();
    assert_eq!(after.unsettled, None);
    assert_eq!(after.virtual_size, facts.virtual_size);
    session
}

#[test]
fn an_entry_is_seen_before_it_is_replayed_and_is_there_afterwards() {
    let mut session = settled(pending(2 << 20));
    assert_eq!(session.open(None).unwrap().virtual_size, 2 << 20);
    let reply = session.call(Request::Settle);
    assert!(matches!(reply, Ok(Reply::Plan(reply)) if reply.plan.is_empty()));
}

#[test]
fn the_newest_entry_of_a_sequence_that_wraps_around_wins() {
    let mut image = image();
    let len = image.len();
    // Two pages an entry: the second begins in the last page of the ring.
    let first = LOG_LEN - 3 * PAGE as usize;
    let tail = first as u32;
    let one = entry(&[(ITEMS, page(&image, 1 << 20))], 4, tail, len);
    place(&mut image, first, &one);
    let two = entry(&[(ITEMS, page(&image, 2 << 20))], 5, tail, len);
    place(&mut image, first + one.len(), &two);
    mark(&mut image);
    assert_eq!(settled(image).open(None).unwrap().virtual_size, 2 << 20);
}

#[test]
fn entries_before_the_tail_are_not_replayed_again() {
    let mut image = image();
    let (len, step) = (image.len(), 2 * PAGE as usize);
    let other = ITEMS + PAGE;
    let old = entry(&[(other, vec![9; PAGE as usize])], 1, 0, len);
    place(&mut image, 0, &old);
    let new = entry(&[(ITEMS, page(&image, 2 << 20))], 2, step as u32, len);
    place(&mut image, step, &new);
    mark(&mut image);
    let session = settled(image);
    assert_eq!(session.host.image[other as usize], 0);
}

#[test]
fn a_sequence_with_smaller_numbers_is_a_leftover() {
    let mut image = pending(2 << 20);
    let stale = entry(&[(ITEMS, page(&image, 1 << 20))], 9, 0x40000, image.len());
    place(&mut image, 0x40000, &stale);
    assert_eq!(settled(image).open(None).unwrap().virtual_size, 1 << 20);
}

#[test]
fn zeroes_of_an_entry_are_written() {
    let mut image = image();
    let bat = 2 << 20;
    let encoded = log::encode(
        &[],
        (bat, 2 * PAGE),
        GUID,
        image.len() as u64,
        LOG_LEN as u64,
    );
    place(&mut image, 0, &encoded.unwrap().unwrap());
    mark(&mut image);
    let mut session = settled(image);
    assert!(
        session.host.image[bat as usize..][..2 * PAGE as usize]
            .iter()
            .all(|&byte| byte == 0)
    );
    let content = session.read(0, 3 << 20).unwrap();
    assert!(content.iter().all(|&byte| byte == 0));
}

#[test]
fn a_file_becomes_as_long_as_the_log_says() {
    let mut image = image();
    let len = image.len();
    let one = entry(&[(ITEMS, page(&image, 2 << 20))], 1, 0, len + (1 << 19));
    place(&mut image, 0, &one);
    mark(&mut image);
    assert_eq!(settled(image).host.image.len(), len + (1 << 20));
}

/// Why a log is not replayed.
type Case = (&'static str, fn(&mut Vec<u8>), &'static str);

const NONE: &str = "the log is in use, but holds no valid sequence of entries";
const CASES: &[Case] = &[
    ("checksum", |image| image[LOG + 4] ^= 1, NONE),
    (
        "content",
        |image| image[LOG + PAGE as usize + 100] ^= 1,
        NONE,
    ),
    ("identifier", |image| image[LOG + on_disk::GUID] ^= 1, NONE),
    ("signature", |image| image[LOG] = b'L', NONE),
    ("length", |image| image[LOG + on_disk::LEN] = 1, NONE),
    (
        "sequence",
        |image| resealed(image, on_disk::SEQUENCE, 0),
        NONE,
    ),
    (
        "tail",
        |image| resealed(image, on_disk::TAIL + 1, 0x20),
        NONE,
    ),
    ("count", |image| resealed(image, on_disk::COUNT, 2), NONE),
    (
        "too many descriptors",
        |image| resealed(image, on_disk::COUNT + 3, 0xff),
        NONE,
    ),
    (
        "descriptor",
        |image| resealed(image, on_disk::HEADER_LEN, b'D'),
        NONE,
    ),
    (
        "descriptor sequence",
        |image| resealed(image, on_disk::HEADER_LEN + on_disk::DESCRIPTOR_SEQUENCE, 2),
        NONE,
    ),
    (
        "descriptor offset between pages",
        |image| resealed(image, on_disk::HEADER_LEN + on_disk::OFFSET, 1),
        NONE,
    ),
    (
        "page signature",
        |image| resealed(image, PAGE as usize, b'D'),
        NONE,
    ),
    (
        "page sequence",
        |image| resealed(image, PAGE as usize + on_disk::DATA_LOW, 2),
        NONE,
    ),
    (
        "changes headers",
        |image| resealed(image, on_disk::HEADER_LEN + on_disk::OFFSET + 2, 0),
        "the log cannot be replayed: a change at 0x0 (4096 bytes) changes the headers",
    ),
    (
        "changes the log",
        |image| resealed(image, on_disk::HEADER_LEN + on_disk::OFFSET + 2, 0x11),
        "the log cannot be replayed: a change at 0x110000 (4096 bytes) changes the log itself",
    ),
    (
        "past the end",
        |image| resealed(image, on_disk::HEADER_LEN + on_disk::OFFSET + 7, 1),
        "the log cannot be replayed: a change at 0x100000000310000 (4096 bytes) reaches past",
    ),
    (
        "file cut off",
        |image| image.truncate(8 << 20),
        "the file is 8388608 bytes long, and its log says that it had 9437184 bytes",
    ),
];

/// Changes a byte of the entry, whose checksum stays right. The third byte of
/// the offset goes with its neighbour.
fn resealed(image: &mut [u8], at: usize, value: u8) {
    let entry = &mut image[LOG..LOG + 2 * PAGE as usize];
    entry[at] = value;
    if at == on_disk::HEADER_LEN + on_disk::OFFSET + 2 && value == 0 {
        entry[at - 1] = 0;
    }
    seal(entry, on_disk::CHECKSUM);
}

/// The damaged logs that are refused for reasons of their own.
pub(super) fn damaged() -> Vec<(&'static str, Vec<u8>)> {
    let own = CASES.iter().filter(|(_, _, words)| *words != NONE);
    let damaged = own.map(|(name, damage, _)| {
        let mut image = pending(2 << 20);
        damage(&mut image);
        (*name, image)
    });
    damaged.collect()
}

#[test]
pub(super) fn a_log_that_changes_too_much_is_not_replayed() {
    let mut image = image();
    let (mut at, mut nth) = (0, 0);
    image.resize(24 << 20, 0);
    for header_at in header::SLOTS {
        let header = &mut image[header_at as usize..header_at as usize + header::LEN];
        header[header::LOG_LEN..][..4].copy_from_slice(&(8u32 << 20).to_le_bytes());
        header[header::LOG_OFFSET..][..8].copy_from_slice(&(12u64 << 20).to_le_bytes());
    }
    mark(&mut image);
    // As many descriptors as go into one page.
    let pages_in_one = 126;
    while nth < 13 {
        let first = (3 << 20) + (1 << 16) + (nth * pages_in_one + 1) * PAGE;
        let pages: Vec<(u64, Vec<u8>)> = (0..pages_in_one)
            .map(|page| (first + page * PAGE, vec![1; PAGE as usize]))
            .collect();
        let entry = entry(&pages, nth as u8 + 1, 0, image.len());
        let start = (12 << 20) + at;
        image[start..start + entry.len()].copy_from_slice(&entry);
        at += entry.len();
        nth += 1;
    }
    let failure = Session::new(image).open(None).unwrap_err();
    let words = "the log changes more than can be replayed at once";
    assert!(failure.message.starts_with(words), "{failure}");
}

#[test]
fn a_log_that_does_not_replay_is_refused_and_nothing_is_changed() {
    for (name, damage, words) in CASES {
        let mut damaged = pending(2 << 20);
        damage(&mut damaged);
        let mut session = Session::new(damaged.clone());
        let failure = session.open(None).expect_err(name);
        assert_eq!(failure.kind, Damaged, "{name}: {failure}");
        assert!(failure.message.starts_with(words), "{name}: {failure}");
        assert!(session.host.image == damaged, "{name}");
    }
}

#[test]
pub(super) fn entries_that_claim_each_other_are_refused_without_reading_them_all() {
    let mut image = image();
    let pages = LOG_LEN / PAGE as usize;
    for nth in 0..pages {
        let at = LOG + nth * PAGE as usize;
        image[at..at + 4].copy_from_slice(on_disk::ENTRY);
        image[at + on_disk::LEN..][..4].copy_from_slice(&(LOG_LEN as u32).to_le_bytes());
        image[at + on_disk::GUID..][..16].copy_from_slice(&GUID.0);
    }
    mark(&mut image);
    let mut session = Session::new(image);
    let failure = session.open(None).unwrap_err();
    assert!(
        failure
            .message
            .starts_with("the entries of the log overlap each other")
    );
    assert!(session.host.bytes_read < 4 << 20);
}

#[test]
pub(super) fn an_entry_that_does_not_fit_into_memory_is_refused() {
    let mut image = image();
    image.truncate(1 << 20);
    image.resize(20 << 20, 0);
    for at in header::SLOTS {
        let header = &mut image[at as usize..at as usize + header::LEN];
        header[header::LOG..header::LOG + 16].copy_from_slice(&GUID.0);
        header[header::LOG_LEN..][..4].copy_from_slice(&(16u32 << 20).to_le_bytes());
        seal(header, header::CHECKSUM);
    }
    image[LOG..LOG + 4].copy_from_slice(on_disk::ENTRY);
    image[LOG + on_disk::LEN..][..4].copy_from_slice(&(5u32 << 20).to_le_bytes());
    image[LOG + on_disk::GUID..][..16].copy_from_slice(&GUID.0);
    let failure = Session::new(image).open(None).unwrap_err();
    assert_eq!(failure.kind, Unsupported);
    assert!(
        failure
            .message
            .starts_with("the log has an entry of 5242880 bytes")
    );
}

#[test]
pub fn a_log_that_names_an_impossible_length_is_refused() {
    for len in [u64::MAX, (1 << 20) + 1, u64::MAX << 20] {
        let mut image = image();
        let mut entry = entry(&[(ITEMS, page(&image, 2 << 20))], 1, 0, image.len());
        entry[on_disk::LAST_LEN..on_disk::LAST_LEN + 8].copy_from_slice(&len.to_le_bytes());
        seal(&mut entry, on_disk::CHECKSUM);
        place(&mut image, 0, &entry);
        mark(&mut image);
        let failure = Session::new(image).open(None).unwrap_err();
        assert_eq!(failure.kind, Damaged);
        assert!(failure.message.contains("bytes afterwards"), "{failure}");
    }
}
