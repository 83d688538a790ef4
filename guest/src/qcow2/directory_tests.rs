//! The snapshot table and the bitmap directory: one test per validated field,
//! with the whole message.

use crate::error::FailureKind;
use crate::proto::{Preallocation, Request};
use crate::testing::{Blank, Session};
use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;

const CHECK: &str = "; run `qemu-img check -r all` on a copy of the image";
const BACKUP: &str = "; the header is damaged: restore the image from a backup";

/// A default image with a snapshot table or bitmap directory behind it.
struct Small {
    image: Vec<u8>,
    at: usize,
}

impl Small {
    fn new(entries: &[&[u8]]) -> Self {
        let mut image = Blank::default().build();
        let at = image.len();
        for entry in entries {
            image.extend(*entry);
            image.resize(image.len().next_multiple_of(8), 0);
        }
        Self { image, at }
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.image[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn with_snapshots(entries: &[&[u8]]) -> Self {
        let mut small = Self::new(entries);
        small.put(60, &(entries.len() as u32).to_be_bytes());
        small.put(64, &(small.at as u64).to_be_bytes());
        small
    }

    fn with_bitmaps(entries: &[&[u8]]) -> Self {
        let mut small = Self::new(entries);
        let len = (small.image.len() - small.at) as u64;
        small.put(95, &[1]);
        small.put(112, &0x2385_2875u32.to_be_bytes());
        small.put(116, &24u32.to_be_bytes());
        small.put(120, &(entries.len() as u32).to_be_bytes());
        small.put(128, &len.to_be_bytes());
        small.put(136, &(small.at as u64).to_be_bytes());
        small
    }

    fn refusal(self) -> String {
        let failure = Session::new(self.image)
            .open(None)
            .expect_err("the table was accepted");
        assert_eq!(failure.kind, FailureKind::Damaged);
        failure.message
    }
}

/// A snapshot entry: L1 place and entries, extra data, id "1", name "now".
fn snapshot(l1: u64, entries: u32, extra: &[u8]) -> Vec<u8> {
    let mut entry = Vec::new();
    entry.extend(l1.to_be_bytes());
    entry.extend(entries.to_be_bytes());
    entry.extend(1u16.to_be_bytes());
    entry.extend(3u16.to_be_bytes());
    entry.extend(1_700_000_000u32.to_be_bytes());
    entry.extend(5u32.to_be_bytes());
    entry.extend(6u64.to_be_bytes());
    entry.extend(7u32.to_be_bytes());
    entry.extend((extra.len() as u32).to_be_bytes());
    entry.extend(extra);
    entry.extend(b"1now");
    entry
}

/// A bitmap entry named "b", valid but for the fields that are passed.
fn bitmap(table: u64, entries: u32, flags: u32, kind: u8, granularity_bits: u8) -> Vec<u8> {
    let mut entry = Vec::new();
    entry.extend(table.to_be_bytes());
    entry.extend(entries.to_be_bytes());
    entry.extend(flags.to_be_bytes());
    entry.push(kind);
    entry.push(granularity_bits);
    entry.extend(1u16.to_be_bytes());
    entry.extend(0u32.to_be_bytes());
    entry.push(b'b');
    entry
}

#[test]
fn a_snapshot_is_read_with_and_without_extra_data() {
    let extra = [
        9u64.to_be_bytes(),
        (1u64 << 20).to_be_bytes(),
        8u64.to_be_bytes(),
    ]
    .concat();
    let entries = [&snapshot(0, 0, &[])[..], &snapshot(0x600, 32, &extra)];
    let facts = Session::new(Small::with_snapshots(&entries).image)
        .open(None)
        .unwrap();
    let expected = crate::facts::Snapshot {
        id: "1".into(),
        name: "now".into(),
        vm_state_size: 7,
        date_sec: 1_700_000_000,
        date_nsec: 5,
        vm_clock_nsec: 6,
        icount: None,
    };
    assert_eq!(
        facts.snapshots,
        [
            expected.clone(),
            crate::facts::Snapshot {
                vm_state_size: 9,
                icount: Some(8),
                ..expected
            }
        ]
    );
}

#[test]
pub(super) fn snapshot_l1_table() {
    for (l1, entries, why) in [
        (
            0x600,
            5 << 20,
            "Snapshot L1 table too large (5242880 entries, at most 4194304)",
        ),
        (
            0x601,
            1,
            "Snapshot L1 table offset invalid (0x601, 1 entries: not a multiple of the cluster \
             size)",
        ),
        (
            0,
            1,
            "Snapshot L1 table offset invalid (0x0, 1 entries: overlaps the header)",
        ),
        (
            0x10000,
            1,
            "Snapshot L1 table offset invalid (0x10000, 1 entries: past the end of the file)",
        ),
    ] {
        assert_eq!(
            Small::with_snapshots(&[&snapshot(l1, entries, &[])]).refusal(),
            format!("Snapshot table entry 0: {why}{CHECK}")
        );
    }
}

#[test]
pub(super) fn snapshot_extra_data() {
    assert_eq!(
        Small::with_snapshots(&[&snapshot(0, 0, &[0; 1025])]).refusal(),
        format!(
            "Snapshot table entry 0: too much extra metadata (1025 bytes, at most 1024){CHECK}"
        )
    );
}

#[test]
pub(super) fn snapshots_end_with_the_file() {
    let mut small = Small::with_snapshots(&[&snapshot(0, 0, &[]), &snapshot(0, 0, &[])]);
    small.image.truncate(small.image.len() - 8);
    assert_eq!(
        small.refusal(),
        format!(
            "Snapshot table: entry 1 reaches past the end of the file or past 6291456 bytes of \
             table{CHECK}"
        )
    );
}

#[test]
pub(super) fn snapshot_names_are_bounded() {
    let mut long = snapshot(0, 0, &[]);
    long[14..16].copy_from_slice(&u16::MAX.to_be_bytes());
    long.resize(long.len() - 3 + usize::from(u16::MAX), b'n');
    let entries = vec![&long[..]; 33];
    let failure = Session::new(Small::with_snapshots(&entries).image)
        .open(None)
        .unwrap_err();
    assert_eq!(failure.kind, FailureKind::Unsupported);
    assert_eq!(
        failure.message,
        "Snapshot table: the names are more than 2097152 bytes long, which is not supported; use \
         qemu-img to remove some"
    );
}

#[test]
pub(super) fn version_2_with_snapshots_is_not_resized() {
    let mut small = Small::with_snapshots(&[&snapshot(0, 0, &[])]);
    small.put(4, &2u32.to_be_bytes());
    let facts = Session::new(small.image).open(None).unwrap();
    assert_eq!(facts.no_write, None);
    assert!(
        facts
            .no_resize
            .unwrap()
            .message
            .starts_with("Can't resize a v2 image which has snapshots")
    );
}

#[test]
pub(super) fn bitmaps_are_listed_and_hinder_writers() {
    let enabled = bitmap(0x600, 1, 2, 1, 16);
    let facts = Session::new(Small::with_bitmaps(&[&enabled]).image)
        .open(None)
        .unwrap();
    assert!(facts.no_write.unwrap().message.contains("bitmap 'b'"));
    assert_eq!(facts.no_resize, None);

    let in_use = bitmap(0x600, 1, 3, 1, 16);
    let facts = Session::new(Small::with_bitmaps(&[&in_use]).image)
        .open(None)
        .unwrap();
    assert_eq!(facts.no_write, None);
    assert!(
        facts
            .no_resize
            .unwrap()
            .message
            .starts_with("Bitmap 'b' is inconsistent and cannot be used")
    );
}

#[test]
fn bitmaps_without_their_autoclear_bit_are_ignored() {
    let mut small = Small::with_bitmaps(&[&bitmap(1, 0, 0xff, 9, 99)]);
    small.put(95, &[0]);
    let facts = Session::new(small.image).open(None).unwrap();
    assert!(facts.specific.iter().all(|fact| fact.key != "bitmaps"));
}

#[test]
pub(super) fn bitmap_directory_entry() {
    for (entry, why) in [
        (bitmap(0x600, 1, 0, 2, 16), "unknown bitmap type 2"),
        (bitmap(0x600, 1, 8, 1, 16), "reserved flags are set (0x8)"),
    ] {
        assert_eq!(
            Small::with_bitmaps(&[&entry]).refusal(),
            format!("bitmap directory entry 0: {why}{CHECK}")
        );
    }
    let mut extra = bitmap(0x600, 1, 0, 1, 16);
    extra[23] = 1;
    extra.push(0);
    assert_eq!(
        Small::with_bitmaps(&[&extra]).refusal(),
        format!("bitmap directory entry 0: extra data is not supported (1 bytes){CHECK}")
    );
    let mut nameless = bitmap(0x600, 1, 0, 1, 16);
    nameless[19] = 0;
    assert_eq!(
        Small::with_bitmaps(&[&nameless]).refusal(),
        format!("bitmap directory entry 0: the name is 0 bytes long, 1 to 1023 are allowed{CHECK}")
    );
}

#[test]
pub(super) fn bitmap_constraints() {
    for (entry, why) in [
        (
            bitmap(0x600, 1, 0, 1, 8),
            "its granularity is 2^8 bytes, 2^9 to 2^31 are allowed",
        ),
        (
            bitmap(0x600, 1, 0, 1, 32),
            "its granularity is 2^32 bytes, 2^9 to 2^31 are allowed",
        ),
        (
            bitmap(0x600, 0, 0, 1, 16),
            "its table has 0 entries, 1 to 134217728 are allowed",
        ),
        (
            bitmap(0x600, 2, 0, 1, 16),
            "its table has 2 entries, the virtual size needs 1",
        ),
        (
            bitmap(0x601, 1, 0, 1, 16),
            "its table at 0x601 (1 entries) is not a multiple of the cluster size",
        ),
        (
            bitmap(0x10000, 1, 0, 1, 16),
            "its table at 0x10000 (1 entries) is past the end of the file",
        ),
    ] {
        assert_eq!(
            Small::with_bitmaps(&[&entry]).refusal(),
            format!("Bitmap 'b' doesn't satisfy the constraints: {why}{CHECK}")
        );
    }
}

#[test]
pub(super) fn bitmaps_header_extension() {
    let valid = bitmap(0x600, 1, 0, 1, 16);
    for (at, bytes, message) in [
        (
            116,
            &16u32.to_be_bytes()[..],
            "bitmaps_ext: Invalid extension length (the bitmaps extension is 16 bytes long instead \
             of 24)",
        ),
        (
            124,
            &[1],
            "bitmaps_ext: Reserved field is not zero (in the bitmaps header extension)",
        ),
        (
            120,
            &[0; 4],
            "bitmaps_ext: found bitmaps extension with zero bitmaps (field nb_bitmaps)",
        ),
        (
            120,
            &65536u32.to_be_bytes(),
            "bitmaps_ext: image has 65536 bitmaps (field nb_bitmaps), at most 65535",
        ),
        (
            128,
            &23u64.to_be_bytes(),
            "bitmaps_ext: bitmap directory size (23) is too large or too small for 1 bitmaps \
             (field bitmap_directory_size, at most 6291456)",
        ),
        (
            136,
            &0x601u64.to_be_bytes(),
            "bitmaps_ext: invalid bitmap directory offset (field bitmap_directory_offset is 0x601, \
             32 bytes: not a multiple of the cluster size)",
        ),
        (
            136,
            &0x600u64.to_be_bytes(),
            "the bitmap directory at 0x600 (512 bytes) overlaps the active L1 table",
        ),
    ] {
        let mut small = Small::with_bitmaps(&[&valid]);
        small.put(at, bytes);
        assert_eq!(small.refusal(), format!("{message}{BACKUP}"));
    }
}

#[test]
pub(super) fn a_bitmap_directory_has_the_length_of_its_entries() {
    let mut small = Small::with_bitmaps(&[&bitmap(0x600, 1, 0, 1, 16)]);
    small.image.extend([0; 8]);
    small.put(128, &40u64.to_be_bytes());
    assert_eq!(
        small.refusal(),
        format!(
            "bitmap directory: 40 bytes (field bitmap_directory_size), its 1 entries take \
             32{CHECK}"
        )
    );
}

#[test]
pub(super) fn a_bitmap_directory_does_not_end_inside_an_entry() {
    let valid = bitmap(0x600, 1, 0, 1, 16);
    let mut small = Small::with_bitmaps(&[&valid, &valid]);
    small.image.truncate(small.at + 56);
    small.put(128, &56u64.to_be_bytes());
    assert_eq!(
        small.refusal(),
        format!("bitmap directory: entry 1 reaches past its end{CHECK}")
    );
}

#[test]
pub(super) fn bits_of_a_bitmap_past_the_end_are_refused_by_a_shrink() {
    let mut small = Small::with_bitmaps(&[&bitmap(0xa00, 1, 0, 1, 9)]);
    small.image.resize(0xa00, 0);
    small.image.extend((1u64 << 40).to_be_bytes());
    small.image.resize(0xc00, 0);
    // The directory and the table are counted.
    for cluster in 3..6 {
        small.put(0x400 + 2 * cluster, &[0, 1]);
    }
    let mut session = Session::new(small.image);
    session.open(None).unwrap();
    let failure = session.call(Request::Resize {
        size: 600 << 10,
        preallocation: Preallocation::Off,
        shrink: true,
        backing_size: None,
    });
    let text = "Bitmap 'b': its bits at 0x10000000000 are past the end of the file";
    assert_eq!(failure.unwrap_err().message, format!("{text}{CHECK}"));
}
