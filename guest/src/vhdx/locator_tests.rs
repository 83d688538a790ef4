//! Differencing images: what they name, and what of the disk they hold.

use super::damage_tests::image;
use super::format::{bat, locator, metadata};
use crate::error::FailureKind;
use crate::proto::{Preallocation, Request};
use crate::testing::Session;
use crate::{ExtentKind, FileNo};
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec;
use alloc::vec::Vec;

const METADATA: usize = 3 << 20;
const ITEMS: usize = METADATA + (64 << 10);
/// Offset of the parent locator from the start of the region.
const LOCATOR: usize = (64 << 10) + 4096;
const BAT: usize = 2 << 20;
/// Entry of the bitmap of the first chunk.
const BITMAP_ENTRY: usize = BAT + 4096 * 8;
const LINKAGE: &str = "{83ED9E5D-7C2C-4A1F-8A36-1D3A1B2C3D4E}";

/// A parent locator with these pairs.
fn encode(pairs: &[(&str, &str)]) -> Vec<u8> {
    let mut bytes = vec![0; locator::ENTRIES + pairs.len() * locator::ENTRY_LEN];
    bytes[..16].copy_from_slice(&locator::KIND.0);
    bytes[locator::COUNT] = pairs.len() as u8;
    for (nth, (key, value)) in pairs.iter().enumerate() {
        let entry = locator::ENTRIES + nth * locator::ENTRY_LEN;
        for (text, offset, len) in [(key, 0, 8), (value, 4, 10)] {
            let utf16: Vec<u8> = text.encode_utf16().flat_map(u16::to_le_bytes).collect();
            let at = bytes.len() as u32;
            bytes[entry + offset..][..4].copy_from_slice(&at.to_le_bytes());
            bytes[entry + len..][..2].copy_from_slice(&(utf16.len() as u16).to_le_bytes());
            bytes.extend(utf16);
        }
    }
    bytes
}

/// A differencing image of three blocks: the first all here, the second partly,
/// the third not.
fn child(locator: &[u8]) -> Vec<u8> {
    let mut image = image();
    image[ITEMS + 4] = metadata::HAS_PARENT as u8;
    image[METADATA + metadata::COUNT] = 6;
    let entry = METADATA + metadata::ENTRIES + 5 * metadata::ENTRY_LEN;
    image[entry..entry + 16].copy_from_slice(&metadata::PARENT_LOCATOR.0);
    for (at, value) in [(16, LOCATOR as u32), (20, locator.len() as u32), (24, 4)] {
        image[entry + at..entry + at + 4].copy_from_slice(&value.to_le_bytes());
    }
    image[METADATA + LOCATOR..][..locator.len()].copy_from_slice(locator);
    let mut put = |at: usize, raw: u64| image[at..at + 8].copy_from_slice(&raw.to_le_bytes());
    put(BAT + 8, (9 << 20) | bat::PARTIALLY_PRESENT);
    put(BAT + 16, bat::NOT_PRESENT);
    put(BITMAP_ENTRY, (10 << 20) | bat::FULLY_PRESENT);
    image.resize(10 << 20, 0x22);
    image.resize(11 << 20, 0);
    // Sectors 1, 2 and the last of the second block.
    image[(10 << 20) + 256] = 0b110;
    image[(10 << 20) + 511] = 0x80;
    image
}

fn usual() -> Vec<u8> {
    encode(&[
        ("parent_linkage", LINKAGE),
        ("relative_path", ".\\base.vhdx"),
        ("volume_path", "\\\\?\\Volume{1}\\vm\\base.vhdx"),
        ("absolute_win32_path", "C:\\vm\\base.vhdx"),
    ])
}

#[test]
fn the_parent_is_named_in_the_order_in_which_names_are_tried() {
    let mut session = Session::new(child(&usual()));
    let facts = session.open(None).unwrap();
    let backing = facts.backing.unwrap();
    let names = ["base.vhdx", "//?/Volume{1}/vm/base.vhdx", "C:/vm/base.vhdx"];
    assert_eq!(backing.names, names);
    assert_eq!(backing.format.as_deref(), Some("vhdx"));
    let identity = LINKAGE.trim_matches(['{', '}']).to_lowercase();
    assert_eq!(backing.identity, Some(identity));
}

#[test]
fn a_name_elsewhere_is_also_tried_beside_the_image() {
    let locator = encode(&[
        ("relative_path", "..\\golden\\disk.vhdx"),
        ("parent_linkage", LINKAGE),
    ]);
    let mut session = Session::new(child(&locator));
    let backing = session.open(None).unwrap().backing.unwrap();
    assert_eq!(backing.names, ["../golden/disk.vhdx", "disk.vhdx"]);
}

#[test]
fn an_identity_is_what_a_child_of_the_image_records() {
    let mut session = Session::new(image());
    let identity = session.open(None).unwrap().identity.unwrap();
    let locator = encode(&[
        (
            "parent_linkage",
            &format!("{{{}}}", identity.to_uppercase()),
        ),
        ("relative_path", "disk.vhdx"),
    ]);
    let backing = Session::new(child(&locator)).open(None).unwrap().backing;
    assert_eq!(backing.unwrap().identity, Some(identity));
}

#[test]
fn a_bitmap_says_which_sectors_are_here() {
    let mut session = Session::new(child(&usual()));
    session.open(None).unwrap();
    let extents = session.map(0, 3 << 20).unwrap();
    let data = |at| ExtentKind::Data {
        file: FileNo::IMAGE,
        at,
        in_place: false,
    };
    let found: Vec<_> = extents
        .iter()
        .map(|extent| (extent.len, extent.kind))
        .collect();
    let none = ExtentKind::Unallocated { at: None };
    let expected = [
        (1 << 20, data(8 << 20)),
        (512, none),
        (1024, data((9 << 20) + 512)),
        ((1 << 20) - 2048, none),
        (512, data((10 << 20) - 512)),
        (1 << 20, none),
    ];
    assert_eq!(found, expected);
    // Neither end of the range is at a sector.
    let inside = session.map((1 << 20) + 700, 1000).unwrap();
    let found: Vec<_> = inside
        .iter()
        .map(|extent| (extent.len, extent.kind))
        .collect();
    assert_eq!(found, [(836, data((9 << 20) + 700)), (164, none)]);
}

#[test]
pub(super) fn a_child_is_neither_resized_nor_written() {
    let before = child(&usual());
    let mut session = Session::new(before.clone());
    let facts = session.open(None).unwrap();
    let words = "a differencing image cannot be resized";
    assert!(facts.no_resize.unwrap().message.starts_with(words));
    assert!(
        facts
            .no_write
            .unwrap()
            .message
            .starts_with("a differencing image is read-only")
    );
    let failure = session.call(Request::Resize {
        size: 8 << 20,
        preallocation: Preallocation::Off,
        shrink: true,
        backing_size: None,
    });
    assert_eq!(failure.unwrap_err().kind, FailureKind::Unsupported);
    assert!(session.host.image == before);
}

#[test]
pub(super) fn a_locator_that_names_nothing_is_refused() {
    let cut = |len: usize| usual()[..len].to_vec();
    let mut unknown = usual();
    unknown[0] ^= 1;
    let mut outside = usual();
    outside[locator::ENTRIES..][..4].copy_from_slice(&u32::MAX.to_le_bytes());
    let mut many = usual();
    many[locator::COUNT + 1] = 1;
    let cases: [(Vec<u8>, &str); 7] = [
        (cut(10), "the parent locator is 10 bytes long"),
        (unknown, "the parent locator is of the kind b04aefb6-"),
        (
            cut(30),
            "parent locator, pair 0: its entry lies past the locator's end",
        ),
        (
            outside,
            "parent locator, pair 0: its key lies past the locator's end",
        ),
        (many, "parent locator, pair 4"),
        (
            encode(&[("relative_path", "a")]),
            "the parent locator has no key 'parent_linkage'",
        ),
        (
            encode(&[("parent_linkage", "x"), ("relative_path", "a")]),
            "the parent locator's 'parent_linkage' is no identifier: 'x'",
        ),
    ];
    for (locator, words) in cases {
        let failure = Session::new(child(&locator)).open(None).unwrap_err();
        let text: String = failure.to_string();
        assert!(text.starts_with(words), "{text}");
    }
    let nameless = child(&encode(&[("parent_linkage", LINKAGE)]));
    let failure = Session::new(nameless).open(None).unwrap_err();
    assert!(
        failure
            .message
            .starts_with("the parent locator names no file")
    );
}

#[test]
pub(super) fn a_partial_block_without_a_bitmap_is_damage() {
    let mut damaged = child(&usual());
    damaged[BITMAP_ENTRY..BITMAP_ENTRY + 8].fill(0);
    let mut session = Session::new(damaged);
    session.open(None).unwrap();
    let failure = session.map(1 << 20, 512).unwrap_err();
    let words = "BAT entry 4096 (guest offset 0x100000): a block is partially present";
    assert!(failure.message.starts_with(words), "{failure}");
    let reply = session.call(Request::Check { repair: None });
    assert!(reply.is_ok());
    let [finding] = &session.host.findings[..] else {
        panic!("{:?}", session.host.findings);
    };
    let words = "VHDX BAT entry 1 is partially present, but its sector bitmap is not there";
    assert_eq!(finding.text, words);
}

#[test]
fn sectors_of_4096_bytes_have_sizes_and_bits_of_their_own() {
    let mut large = child(&usual());
    large[ITEMS + 32..ITEMS + 36].copy_from_slice(&4096u32.to_le_bytes());
    // The chunk is eight times as long, its bitmap's entry further behind.
    let entry = BAT + 32768 * 8;
    large.copy_within(BITMAP_ENTRY..BITMAP_ENTRY + 8, entry);
    large[BITMAP_ENTRY..BITMAP_ENTRY + 8].fill(0);
    large[(10 << 20) + 32] = 1;
    let mut session = Session::new(large);
    let facts = session.open(None).unwrap();
    assert_eq!((facts.size_unit, facts.write_unit), (4096, 4096));
    let extents = session.map(1 << 20, 1 << 20).unwrap();
    assert_eq!(extents[0].len, 4096);
    assert_eq!(extents[1].kind, ExtentKind::Unallocated { at: None });
}
