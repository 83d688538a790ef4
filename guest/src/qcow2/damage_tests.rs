//! Table entries that contradict the file: each is refused where it is used,
//! with the whole message.

use crate::error::FailureKind;
use crate::proto::{Preallocation, Request};
use crate::testing::{Blank, Session};
use crate::{ExtentKind, FileNo, Reply};
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

const CHECK: &str = "; run `qemu-img check -r all` on a copy of the image";
const COPIED: u64 = 1 << 63;

/// An image with an L2 table and a data cluster: guest cluster 0 is there.
struct Small {
    blank: Blank,
    image: Vec<u8>,
}

impl Small {
    fn new(blank: Blank) -> Self {
        let image = blank.build();
        let mut small = Self { blank, image };
        small.image.resize(small.data() + blank.cluster(), 0x5a);
        let l2 = small.l2();
        small.image[l2..l2 + blank.cluster()].fill(0);
        small.put(blank.l1(), COPIED | l2 as u64);
        small.put(l2, COPIED | small.data() as u64);
        small
    }

    fn l2(&self) -> usize {
        self.blank.free()
    }

    fn data(&self) -> usize {
        self.blank.free() + self.blank.cluster()
    }

    fn put(&mut self, at: usize, value: u64) {
        self.image[at..at + 8].copy_from_slice(&value.to_be_bytes());
    }

    /// The refusal to map the first cluster.
    fn refusal(self) -> String {
        let mut session = Session::new(self.image);
        session.open(None).expect("the header is valid");
        let failure = session
            .map(0, self.blank.cluster() as u64)
            .expect_err("the entry was accepted");
        assert_eq!(failure.kind, FailureKind::Damaged);
        failure.message
    }
}

#[track_caller]
fn l1_refused(entry: u64, why: &str) {
    let mut small = Small::new(Blank::default());
    small.put(small.blank.l1(), entry);
    assert_eq!(
        small.refusal(),
        format!("active L1 table, entry 0 (guest offset 0x0): {why}{CHECK}")
    );
}

#[track_caller]
fn l2_refused(blank: Blank, entry: u64, bitmap: Option<u64>, why: &str) {
    let mut small = Small::new(blank);
    let l2 = small.l2();
    small.put(l2, entry);
    if let Some(bitmap) = bitmap {
        small.put(l2 + 8, bitmap);
    }
    assert_eq!(
        small.refusal(),
        format!("L2 table at {l2:#x}, entry 0 (guest offset 0x0): {why}{CHECK}")
    );
}

#[test]
fn the_undamaged_image_maps() {
    let small = Small::new(Blank::default());
    let data = small.data() as u64;
    let mut session = Session::new(small.image);
    session.open(None).unwrap();
    let extents = session.map(0, 1 << 20).unwrap();
    assert_eq!(extents.len(), 2);
    assert_eq!(
        extents[0].kind,
        ExtentKind::Data {
            file: FileNo::IMAGE,
            at: data,
            in_place: true
        }
    );
    assert_eq!(extents[1].kind, ExtentKind::Unallocated { at: None });
}

#[test]
pub(super) fn l1_entries() {
    l1_refused(0x1001, "reserved bits are set (0x1)");
    l1_refused(
        1 << 57 | 0x1000,
        "reserved bits are set (0x200000000000000)",
    );
    l1_refused(
        COPIED | 0x10_0000,
        "the L2 table at 0x100000 lies past the end of the file",
    );
    l1_refused(
        0x00ff_ffff_ffff_fe00,
        "the L2 table at 0xfffffffffffe00 lies past the end of the file",
    );
    l1_refused(0x600, "the L2 table at 0x600 overlaps the active L1 table");
    l1_refused(0x200, "the L2 table at 0x200 overlaps the refcount table");
}

#[test]
pub(super) fn an_l2_table_with_two_owners() {
    let mut small = Small::new(Blank::default());
    let (l1, l2) = (small.blank.l1(), small.l2());
    small.put(l1 + 8 * 3, COPIED | l2 as u64);
    let mut session = Session::new(small.image);
    session.open(None).unwrap();
    session.map(0, 32 << 10).unwrap();
    assert_eq!(
        session.map(0, 1 << 20).unwrap_err().message,
        format!(
            "active L1 table, entry 3 (guest offset 0x18000): the L2 table at {l2:#x} is that of \
             entry 0, too{CHECK}"
        )
    );
}

#[test]
pub(super) fn an_l2_table_in_the_header_or_between_clusters() {
    let blank = Blank {
        cluster_bits: 12,
        ..Blank::default()
    };
    for (entry, why) in [
        (0x200, "the L2 table at 0x200 overlaps the header"),
        (
            0x4200,
            "the L2 table at 0x4200 is not at a multiple of the cluster size",
        ),
    ] {
        let mut small = Small::new(blank);
        small.put(blank.l1(), entry);
        assert_eq!(
            small.refusal(),
            format!("active L1 table, entry 0 (guest offset 0x0): {why}{CHECK}")
        );
    }
}

#[test]
pub(super) fn l2_entries() {
    let blank = Blank::default();
    let refused = |entry, why| l2_refused(blank, entry, None, why);
    refused(0x1002, "reserved bits are set (0x2)");
    refused(
        0x10_0000,
        "the data at 0x100000 lies past the end of the file (3072 bytes)",
    );
    refused(
        0x10_0001,
        "the data at 0x100000 lies past the end of the file (3072 bytes)",
    );
    refused(0x600, "the data at 0x600 overlaps the active L1 table");
    refused(0x200, "the data at 0x200 overlaps the refcount table");
    refused(0x800, "the data at 0x800 overlaps the L2 table itself");
    refused(1 << 62 | 0x100, "the data at 0x100 overlaps the header");
    refused(
        1 << 62 | 0x10_0000,
        "the data at 0x100000 lies past the end of the file (3072 bytes)",
    );
    refused(
        3 << 62 | 0xa00,
        "the copied flag is set on a compressed cluster",
    );
}

#[test]
pub(super) fn an_l2_entry_between_clusters() {
    let blank = Blank {
        cluster_bits: 12,
        ..Blank::default()
    };
    l2_refused(
        blank,
        0x5200,
        None,
        "offset 0x5200 is not a multiple of the cluster size",
    );
}

#[test]
pub(super) fn the_zero_flag_in_version_2() {
    let blank = Blank {
        version: 2,
        ..Blank::default()
    };
    l2_refused(
        blank,
        1,
        None,
        "the zero flag is set, which version 2 does not have",
    );
}

#[test]
pub(super) fn extended_l2_entries() {
    let blank = Blank {
        cluster_bits: 14,
        incompatible: 16,
        ..Blank::default()
    };
    let refused = |entry, bitmap, why| l2_refused(blank, entry, Some(bitmap), why);
    let data = Small::new(blank).data() as u64;
    refused(
        data,
        0x1_0000_0001,
        "invalid subcluster allocation bits (0x100000001)",
    );
    refused(0, 1, "invalid subcluster allocation bits (0x1)");
    refused(
        1 << 62 | data,
        1,
        "a compressed cluster has subcluster allocation bits (0x1)",
    );
}

#[test]
fn data_files_are_mapped_one_to_one() {
    let blank = Blank {
        incompatible: 4,
        ..Blank::default()
    };
    for (entry, why) in [
        (
            COPIED | 0x400,
            "offset 0x400 in the external data file is not the guest offset",
        ),
        (
            1 << 62 | 0x400,
            "a compressed cluster in an image with an external data file",
        ),
    ] {
        let mut small = Small::new(blank);
        let l2 = small.l2();
        small.put(l2, entry);
        let mut session = Session::new(small.image);
        session.host.others = vec![Some(Vec::new())];
        session.open(None).unwrap();
        assert_eq!(
            session.map(0, 512).unwrap_err().message,
            format!("L2 table at {l2:#x}, entry 0 (guest offset 0x0): {why}{CHECK}")
        );
    }
}

#[test]
pub(super) fn nothing_is_read_before_the_data_file_is_open() {
    let blank = Blank {
        incompatible: 4,
        ..Blank::default()
    };
    let mut session = Session::new(blank.build());
    session.open(None).unwrap();
    assert_eq!(
        session.map(0, 512).unwrap_err().message,
        "the external data file is not open"
    );
}

#[test]
pub(super) fn garbage_in_a_compressed_cluster_names_the_cluster() {
    let mut small = Small::new(Blank::default());
    let (l2, data) = (small.l2(), small.data());
    small.image[data..].fill(0xff);
    small.put(l2, 1 << 62 | data as u64);
    let mut session = Session::new(small.image);
    session.open(None).unwrap();
    let failure = session.call(Request::Inflate {
        offset: 0,
        len: 512,
    });
    assert_eq!(
        failure.unwrap_err().message,
        format!(
            "the compressed cluster at guest offset 0x0 (host offset {data:#x}, 512 bytes): \
             invalid deflate data{CHECK}"
        )
    );
}

#[test]
pub(super) fn only_whole_compressed_clusters_are_inflated() {
    let mut session = Session::new(Small::new(Blank::default()).image);
    session.open(None).unwrap();
    for (offset, len, why) in [
        (0, 512, "the cluster at guest offset 0x0 is not compressed"),
        (1, 511, "511 bytes at 0x1 are not whole clusters"),
        (0, 100, "100 bytes at 0x0 are not whole clusters"),
    ] {
        let failure = session.call(Request::Inflate { offset, len }).unwrap_err();
        assert_eq!(failure.kind, FailureKind::InvalidRequest);
        assert_eq!(failure.message, why);
    }
}

#[test]
fn data_past_the_end_of_the_file_reads_as_zeroes() {
    let mut small = Small::new(Blank::default());
    let data = small.data();
    small.image.truncate(data + 100);
    let mut session = Session::new(small.image);
    session.open(None).unwrap();
    let extents = session.map(0, 512).unwrap();
    assert_eq!(extents.len(), 2);
    assert_eq!(extents[0].len, 100);
    assert_eq!(
        extents[1].kind,
        ExtentKind::Zero {
            at: Some(data as u64 + 100)
        }
    );
}

#[test]
pub(super) fn shared_clusters_are_not_overwritten_in_place() {
    for (l1_copied, l2_copied) in [(0, COPIED), (COPIED, 0), (0, 0)] {
        let mut small = Small::new(Blank::default());
        let (l1, l2, data) = (small.blank.l1(), small.l2(), small.data());
        small.put(l1, l1_copied | l2 as u64);
        small.put(l2, l2_copied | data as u64);
        let mut session = Session::new(small.image);
        session.open(None).unwrap();
        assert_eq!(
            session.map(0, 512).unwrap()[0].kind,
            ExtentKind::Data {
                file: FileNo::IMAGE,
                at: data as u64,
                in_place: false
            }
        );
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
pub(super) fn entries_of_the_refcount_table_are_checked_before_a_change() {
    for (entry, why) in [
        (0x401, "0x401: reserved bits are set"),
        (0x100_0000, "0x1000000: past the end of the file"),
        (0x600, "0x600: the active L1 table"),
    ] {
        let mut small = Small::new(Blank::default());
        small.put(small.blank.refcount_table(), entry);
        let mut session = Session::new(small.image.clone());
        session.open(None).unwrap();
        let refused = [
            resize(1 << 30),
            Request::Allocate {
                offset: 0x10000,
                len: 512,
            },
        ];
        for request in refused {
            let failure = session.call(request).unwrap_err();
            let text = format!("refcount table entry 0 is {why}{CHECK}");
            assert_eq!(failure.message, text);
        }
        assert!(session.host.image == small.image);
    }
}

#[test]
pub(super) fn a_cluster_in_use_that_nothing_counts_is_not_changed() {
    let mut small = Small::new(Blank::default());
    let data = small.data();
    let counts = small.blank.refcount_block();
    let text = format!("the cluster at {data:#x} is in use but has reference count 0{CHECK}");
    let (l1, l2) = (small.blank.l1(), small.l2());
    // The mapping is there for the last part of the disk alone.
    let last = 8 * (small.blank.l1_entries() - 1);
    small.put(l1, 0);
    small.put(l1 + last, COPIED | l2 as u64);
    small.image[counts + 2 * l2 / 512 + 1] = 1;
    let before = small.image.clone();
    let mut session = Session::new(small.image);
    session.open(None).unwrap();
    let failure = session.call(resize(512 << 10)).unwrap_err();
    assert_eq!(failure.message, text);
    assert!(session.host.image == before);
    // The block that would count the data is not there.
    let mut far = before.clone();
    far[l2..l2 + 8].copy_from_slice(&(COPIED | 0x28000).to_be_bytes());
    far.resize(0x28200, 0);
    shrink_refused(
        far,
        "the cluster at 0x28000 is in use but has reference count 0",
    );
    let mut bare = before;
    let table = Blank::default().refcount_table();
    bare[table..table + 8].fill(0);
    shrink_refused(
        bare,
        "the refcount table at 0x200 is in use but has reference count 0",
    );
}

/// Neither behind everything that is counted nor between what is dropped.
#[test]
fn a_shrink_does_not_cut_off_what_nothing_counts() {
    for dropped_behind in [false, true] {
        let mut small = Small::new(Blank::default());
        let counts = small.blank.refcount_block();
        let (l1, l2, end) = (small.blank.l1(), small.l2(), small.data());
        small.image[counts + 2 * l2 / 512 + 1] = 1;
        let len = end + 3 * 512;
        small.image.resize(len, 0x5a);
        small.put(l2, COPIED | (end + 512) as u64);
        if dropped_behind {
            let last = 8 * (small.blank.l1_entries() - 1);
            small.image[end + 1024..].fill(0);
            small.put(l1 + last, COPIED | (end + 1024) as u64);
            small.image[counts + 2 * (end + 1024) / 512 + 1] = 1;
        }
        let mut session = Session::new(small.image);
        session.open(None).unwrap();
        let Ok(Reply::Plan(reply)) = session.call(resize(512 << 10)) else {
            panic!("no plan");
        };
        session.host.apply(&reply.plan);
        session.open(None).unwrap();
        assert_eq!(session.read(0, 512).unwrap(), [0x5a; 512]);
        assert!(session.host.image.len() >= end + 1024);
    }
}

#[track_caller]
fn shrink_refused(image: Vec<u8>, why: &str) {
    let mut session = Session::new(image.clone());
    session.open(None).unwrap();
    match session.call(resize(512 << 10)) {
        Err(failure) => assert_eq!(failure.message, format!("{why}{CHECK}")),
        Ok(_) => panic!("accepted: {why}"),
    }
    assert!(session.host.image == image);
}
