//! One test per validated field: the header with that field changed, and the
//! whole message.

use crate::error::FailureKind;
use crate::testing::{Blank, Session};
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

const BACKUP: &str = "; the header is damaged: restore the image from a backup";

fn refusal(image: Vec<u8>) -> (FailureKind, String) {
    let failure = Session::new(image)
        .open(Some(crate::Format::Qcow2))
        .expect_err("the header was accepted");
    (failure.kind, failure.message)
}

/// The message for a default image with some bytes changed.
fn changed(blank: Blank, changes: &[(usize, &[u8])]) -> (FailureKind, String) {
    let mut image = blank.build();
    for (at, bytes) in changes {
        let end = at + bytes.len();
        if image.len() < end {
            image.resize(end, 0);
        }
        image[*at..end].copy_from_slice(bytes);
    }
    refusal(image)
}

#[track_caller]
fn damaged(changes: &[(usize, &[u8])], message: &str) {
    assert_eq!(
        changed(Blank::default(), changes),
        (FailureKind::Damaged, format!("{message}{BACKUP}"))
    );
}

fn be32(value: u32) -> [u8; 4] {
    value.to_be_bytes()
}

fn be64(value: u64) -> [u8; 8] {
    value.to_be_bytes()
}

#[test]
fn the_unchanged_image_opens() {
    for version in [2, 3] {
        let blank = Blank {
            version,
            ..Blank::default()
        };
        let facts = Session::new(blank.build()).open(None).unwrap();
        assert_eq!(facts.virtual_size, 1 << 20);
        assert_eq!(facts.cluster_size, Some(512));
        assert_eq!((facts.no_write, facts.no_resize), (None, None));
    }
}

#[test]
pub(super) fn magic() {
    let (kind, message) = changed(Blank::default(), &[(0, b"QFI\0")]);
    assert_eq!(kind, FailureKind::NotThisFormat);
    assert!(message.starts_with("Image is not in qcow2 format"));
}

#[test]
pub(super) fn truncated_header() {
    for len in [5, 71, 72, 103] {
        let (kind, message) = refusal(Blank::default().build()[..len].to_vec());
        assert_eq!(kind, FailureKind::Damaged);
        assert!(
            message.starts_with("the file ends inside the qcow2 header, at byte "),
            "{message}"
        );
    }
}

#[test]
pub(super) fn version() {
    for (value, message) in [
        (
            1,
            "qcow version 1 is not supported; convert the image with `qemu-img convert -O qcow2`",
        ),
        (
            4,
            "Unsupported qcow2 version 4 (header field version must be 2 or 3); use the program \
             that made the image",
        ),
    ] {
        assert_eq!(
            changed(Blank::default(), &[(4, &be32(value))]),
            (FailureKind::Unsupported, message.into())
        );
    }
}

#[test]
pub(super) fn cluster_bits() {
    for bits in [0, 8, 22, u32::MAX] {
        damaged(
            &[(20, &be32(bits))],
            &format!(
                "Unsupported cluster size: 2^{bits} (header field cluster_bits must be 9 to 21)"
            ),
        );
    }
}

#[test]
pub(super) fn cluster_bits_with_extended_l2() {
    damaged(
        &[(20, &be32(13)), (72, &be64(16))],
        "Extended L2 entries are only supported with cluster sizes of at least 16384 bytes \
         (header field cluster_bits is 13)",
    );
}

#[test]
pub(super) fn header_length() {
    for (len, why) in [
        (72, "qcow2 header too short"),
        (520, "qcow2 header exceeds cluster size"),
        (u32::MAX, "qcow2 header exceeds cluster size"),
        (109, "qcow2 header length is not a multiple of 8"),
    ] {
        damaged(
            &[(100, &be32(len))],
            &format!("{why} (header field header_length is {len})"),
        );
    }
}

#[test]
pub(super) fn size_beyond_signed_offsets() {
    damaged(
        &[(24, &be64(1 << 63))],
        "Image is too big (header field size is 9223372036854775808)",
    );
}

#[test]
pub(super) fn size_beyond_the_largest_l1_table() {
    damaged(
        &[(24, &be64(1 << 40))],
        "Image is too big (header field size is 1099511627776, which needs 33554432 L1 entries \
         of at most 4194304)",
    );
}

#[test]
pub(super) fn size_beyond_this_l1_table() {
    damaged(
        &[(24, &be64((1 << 20) + 512))],
        "L1 table is too small (header field l1_size is 32, the virtual size needs 33)",
    );
}

#[test]
fn a_size_that_is_no_multiple_of_a_sector_is_rounded_down() {
    let mut image = Blank::default().build();
    image[24..32].copy_from_slice(&be64((1 << 20) - 1));
    let facts = Session::new(image).open(None).unwrap();
    assert_eq!(facts.virtual_size, (1 << 20) - 512);
}

#[test]
pub(super) fn crypt_method() {
    damaged(
        &[(32, &be32(3))],
        "Unsupported encryption method 3 (header field crypt_method must be 0 to 2)",
    );
}

#[test]
pub(super) fn l1_size() {
    damaged(
        &[(36, &be32(0x7fff_ffff))],
        "Active L1 table too large (header field l1_size is 2147483647, at most 4194304)",
    );
}

#[test]
pub(super) fn l1_table_offset() {
    for (offset, why) in [
        (1000, "not a multiple of the cluster size"),
        (0, "overlaps the header"),
        (0x10_0000, "past the end of the file"),
        (u64::MAX - 511, "past the end of the file"),
    ] {
        damaged(
            &[(40, &be64(offset))],
            &format!(
                "Active L1 table offset invalid (header field l1_table_offset is {offset:#x}, \
                 256 bytes: {why})"
            ),
        );
    }
}

#[test]
pub(super) fn l1_table_over_the_refcount_table() {
    damaged(
        &[(40, &be64(512))],
        "the refcount table at 0x200 (512 bytes) overlaps the active L1 table",
    );
}

#[test]
pub(super) fn refcount_table_clusters() {
    damaged(
        &[(56, &be32(0))],
        "Image does not contain a reference count table (header field refcount_table_clusters \
         is 0)",
    );
    damaged(
        &[(56, &be32(16385))],
        "Reference count table too large (header field refcount_table_clusters is 16385, 8389120 \
         bytes of at most 8388608)",
    );
}

#[test]
pub(super) fn refcount_table_offset() {
    for (offset, why) in [
        (513, "not a multiple of the cluster size"),
        (0, "overlaps the header"),
        (1 << 56, "past the end of the file"),
    ] {
        damaged(
            &[(48, &be64(offset))],
            &format!(
                "Reference count table offset invalid (header field refcount_table_offset is \
                 {offset:#x}, 512 bytes: {why})"
            ),
        );
    }
}

#[test]
pub(super) fn refcount_order() {
    damaged(
        &[(96, &be32(7))],
        "Reference count entry width too large; may not exceed 64 bits (header field \
         refcount_order is 7)",
    );
}

#[test]
pub(super) fn nb_snapshots() {
    damaged(
        &[(60, &be32(65537))],
        "Snapshot table too large (header field nb_snapshots is 65537, at most 65536)",
    );
}

#[test]
pub(super) fn snapshots_offset() {
    for (offset, why) in [
        (0x201, "not a multiple of the cluster size"),
        (0, "overlaps the header"),
        (0x10_0000, "past the end of the file"),
    ] {
        damaged(
            &[(60, &be32(1)), (64, &be64(offset))],
            &format!(
                "Snapshot table offset invalid (header field snapshots_offset is {offset:#x}, 40 \
                 bytes: {why})"
            ),
        );
    }
}

#[test]
pub(super) fn snapshots_over_the_l1_table() {
    let message = changed(
        Blank::default(),
        &[(60, &be32(1)), (64, &be64(Blank::default().l1() as u64))],
    )
    .1;
    assert_eq!(
        message,
        format!("the snapshot table at 0x600 (512 bytes) overlaps the active L1 table{BACKUP}")
    );
}

#[test]
pub(super) fn unknown_incompatible_features_are_listed() {
    assert_eq!(
        changed(Blank::default(), &[(72, &be64(1 << 5 | 1 << 60))]),
        (
            FailureKind::Unsupported,
            "Unsupported qcow2 feature(s): Unknown incompatible feature: 1000000000000020 (header \
             field incompatible_features is 0x1000000000000020); use the program that made the \
             image"
                .into()
        )
    );
}

#[test]
pub(super) fn unknown_incompatible_features_are_named_where_the_image_names_them() {
    let mut record = [0; 48];
    record[1] = 5;
    record[2..8].copy_from_slice(b"frobni");
    let (kind, message) = changed(
        Blank::default(),
        &[
            (72, &be64(1 << 5)),
            (112, &be32(0x6803_f857)),
            (116, &be32(48)),
            (120, &record),
        ],
    );
    assert_eq!(kind, FailureKind::Unsupported);
    assert!(message.starts_with("Unsupported qcow2 feature(s): frobni (header field"));
}

#[test]
fn unknown_compatible_and_autoclear_features_are_accepted() {
    let mut image = Blank::default().build();
    image[80..88].copy_from_slice(&be64(1 << 40));
    image[88..96].copy_from_slice(&be64(1 << 41));
    let facts = Session::new(image).open(None).unwrap();
    assert_eq!((facts.no_write, facts.no_resize), (None, None));
}

#[test]
pub(super) fn compression_type() {
    damaged(
        &[(104, &[1])],
        "Compression type incompatible feature bit must be set (header field compression_type is \
         1)",
    );
    damaged(
        &[(72, &be64(8))],
        "Compression type incompatible feature bit must not be set (header field compression_type \
         is 0)",
    );
    let (kind, message) = changed(Blank::default(), &[(72, &be64(8)), (104, &[2])]);
    assert_eq!(kind, FailureKind::Unsupported);
    assert!(message.starts_with("qcow2: unknown compression type: 2 (header field"));
}

#[test]
pub(super) fn backing_file_offset() {
    for offset in [8, 513, u64::MAX] {
        damaged(
            &[(8, &be64(offset)), (16, &be32(4))],
            &format!(
                "Invalid backing file offset (header field backing_file_offset is {offset:#x}, \
                 outside the first cluster or inside the header)"
            ),
        );
    }
}

#[test]
pub(super) fn backing_file_size() {
    damaged(
        &[(8, &be64(0x100)), (16, &be32(257))],
        "Backing file name too long (header field backing_file_size is 257, at most 256 fit)",
    );
    let blank = Blank {
        cluster_bits: 12,
        ..Blank::default()
    };
    let (_, message) = changed(blank, &[(8, &be64(0x100)), (16, &be32(1024))]);
    assert!(
        message.starts_with(
            "Backing file name too long (header field backing_file_size is 1024, at most 1023 fit)"
        ),
        "{message}"
    );
}

#[test]
pub(super) fn header_extensions_end_with_the_header_cluster() {
    damaged(
        &[(112, &be32(0x1234_5678)), (116, &be32(u32::MAX))],
        "Header extension too large (extension 0x12345678 at byte 112 is 4294967295 bytes long, \
         the header's extensions end at byte 512)",
    );
}

#[test]
pub(super) fn header_extensions_end_at_the_backing_name() {
    damaged(
        &[
            (8, &be64(0x80)),
            (16, &be32(4)),
            (112, &be32(0x1234_5678)),
            (116, &be32(16)),
        ],
        "Header extension too large (extension 0x12345678 at byte 112 is 16 bytes long, the \
         header's extensions end at byte 128)",
    );
}

#[test]
pub(super) fn a_known_header_extension_occurs_once() {
    damaged(
        &[
            (112, &be32(0xe279_2aca)),
            (116, &be32(3)),
            (120, b"raw"),
            (128, &be32(0xe279_2aca)),
            (132, &be32(3)),
            (136, b"raw"),
        ],
        "header extension 0xe2792aca occurs twice",
    );
}

#[test]
pub(super) fn names_in_header_extensions_are_bounded() {
    let blank = Blank {
        cluster_bits: 16,
        ..Blank::default()
    };
    for (kind, len, what) in [
        (0xe279_2acau32, 16, "ext_backing_format too large"),
        (0x4441_5441, 4096, "data file name too large"),
    ] {
        let (_, message) = changed(blank, &[(112, &be32(kind)), (116, &be32(len))]);
        assert_eq!(
            message,
            format!(
                "{what} (extension {kind:#010x} is {len} bytes long, at most {}){BACKUP}",
                len - 1
            )
        );
    }
}

#[test]
pub(super) fn the_encryption_header_belongs_to_luks() {
    let place = |offset: u64| {
        [
            be32(0x0537_be77).as_slice(),
            &be32(16),
            &be64(offset),
            &be64(592),
        ]
        .concat()
    };
    damaged(
        &[(32, &be32(2))],
        "Missing CRYPTO header for crypt method 2 (LUKS)",
    );
    damaged(
        &[(112, &place(0x800))],
        "CRYPTO header extension only expected with LUKS encryption method",
    );
    damaged(
        &[(32, &be32(2)), (112, &place(0x801))],
        "Encryption header offset invalid (crypto header extension: 0x801, 592 bytes: not a \
         multiple of the cluster size)",
    );
    let mut short = place(0x400);
    short[22] = 1;
    damaged(
        &[(32, &be32(2)), (112, &short)],
        "Encryption header offset invalid (crypto header extension: 0x400, 336 bytes: shorter \
         than a LUKS header)",
    );
    damaged(
        &[(32, &be32(2)), (112, &be32(0x0537_be77)), (116, &be32(8))],
        "CRYPTO header extension size 8 but expected size 16",
    );
}

/// An image that is encrypted, with its encryption header behind everything.
fn luks(change: (usize, &[u8])) -> Vec<u8> {
    let mut image = Blank::default().build();
    let at = image.len();
    let mut header = Vec::from(*b"LUKS\xba\xbe\0\x01");
    header.resize(1024, 0);
    header[40..49].copy_from_slice(b"xts-plain");
    for slot in 0..8 {
        header[208 + 48 * slot..][..4].copy_from_slice(&be32(0xdead));
    }
    header[change.0..change.0 + change.1.len()].copy_from_slice(change.1);
    image.extend(header);
    image[32..36].copy_from_slice(&be32(2));
    image[112..116].copy_from_slice(&be32(0x0537_be77));
    image[116..120].copy_from_slice(&be32(16));
    image[120..128].copy_from_slice(&be64(at as u64));
    image[128..136].copy_from_slice(&be64(592));
    image
}

#[test]
pub(super) fn the_encryption_header_is_checked() {
    assert!(Session::new(luks((0, b"L"))).open(None).is_ok());
    for (at, bytes, message) in [
        (
            0,
            &b"L0"[..],
            "Volume is not in LUKS format (encryption header)",
        ),
        (
            40,
            b"none\0\0\0\0\0",
            "Unexpected cipher mode string format 'none' (encryption header)",
        ),
        (
            208 + 48,
            b"\0\0\0\x07",
            "Keyslot 1 state (active/disable) is corrupted (encryption header, 0x00000007)",
        ),
    ] {
        let expected = (FailureKind::Damaged, format!("{message}{BACKUP}"));
        assert_eq!(refusal(luks((at, bytes))), expected);
    }
}

fn facts_with(incompatible: u64) -> crate::facts::Facts {
    let blank = Blank {
        incompatible,
        ..Blank::default()
    };
    Session::new(blank.build()).open(None).unwrap()
}

#[test]
pub(super) fn a_corrupt_image_opens_but_does_not_change() {
    let facts = facts_with(2);
    assert!(facts.corrupt && !facts.dirty);
    for refusal in [facts.no_write, facts.no_resize] {
        let refusal = refusal.expect("corrupt");
        assert_eq!(refusal.kind, FailureKind::Damaged);
        assert!(refusal.message.contains("`qemu-img check -r all`"));
    }
}

#[test]
pub(super) fn a_dirty_image_is_put_in_order_before_it_changes() {
    let facts = facts_with(1);
    assert!(facts.dirty && !facts.corrupt);
    assert_eq!((facts.no_write, facts.no_resize), (None, None));
    let why = facts.unsettled.expect("dirty");
    assert!(why.contains("the dirty bit is set"), "{why}");
    assert_eq!(facts_with(0).unsettled, None);
}

#[test]
fn a_header_longer_than_the_first_read_is_read_whole() {
    let blank = Blank {
        cluster_bits: 17,
        ..Blank::default()
    };
    let mut image = blank.build();
    let unknown = 70_000usize;
    image[112..116].copy_from_slice(&be32(0x1234_5678));
    image[116..120].copy_from_slice(&be32(unknown as u32));
    let format_at = 120 + unknown;
    image[format_at..format_at + 4].copy_from_slice(&be32(0xe279_2aca));
    image[format_at + 4..format_at + 8].copy_from_slice(&be32(3));
    image[format_at + 8..format_at + 11].copy_from_slice(b"raw");
    image[8..16].copy_from_slice(&be64(100_000));
    image[16..20].copy_from_slice(&be32(4));
    image[100_000..100_004].copy_from_slice(b"base");
    let facts = Session::new(image).open(None).unwrap();
    let backing = facts.backing.unwrap();
    assert_eq!(backing.name(), "base");
    assert_eq!(backing.format.as_deref(), Some("raw"));
}
