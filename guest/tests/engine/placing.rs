//! What an allocation and a flush promise, one claim at a time.

use crate::disk::Disk;
use crate::lab::{Check, Lab, purposes};
use instar_guest::plan::{Plan, Purpose};
use instar_guest::proto::{Content, PlanReply};
use instar_guest::testing::{Blank, Session};
use instar_guest::{ExtentKind, FailureKind, FileNo, Reply, Request, Step};

const K: u64 = 1 << 10;
const M: u64 = 1 << 20;

/// All checks by name.
pub fn trials() -> Vec<(String, Check)> {
    let claims: [(&str, fn()); 15] = [
        ("a_common_flush_has_two_stages", two_stages),
        ("neighbours_are_placed_side_by_side", side_by_side),
        ("a_full_refcount_table_moves", table_moves),
        ("unknown_autoclear_bits_are_cleared", autoclear),
        (
            "damaged_counts_are_found_before_anything_changes",
            damaged_counts,
        ),
        (
            "a_count_that_is_too_low_does_not_fail_a_flush",
            count_too_low,
        ),
        (
            "data_behind_a_short_last_cluster_is_read_back",
            past_the_end,
        ),
        ("a_longer_data_file_is_taken_back", data_file_undone),
        ("one_request_moves_a_refcount_table_once", large_requests),
        (
            "scattered_counts_are_written_by_themselves",
            scattered_releases,
        ),
        (
            "a_cluster_of_a_shared_table_is_not_overwritten",
            shared_table,
        ),
        (
            "unknown_autoclear_bits_keep_data_from_being_overwritten",
            autoclear_in_place,
        ),
        ("counts_left_behind_the_end_are_skipped", leftovers),
        (
            "counts_left_too_far_behind_the_end_are_refused",
            far_leftovers,
        ),
        ("too_many_changes_ask_for_a_flush", flush_first),
    ];
    claims
        .map(|(name, check)| (name.to_string(), Box::new(check) as Check))
        .into()
}

fn created(options: &str, size: u64) -> (Lab, Disk) {
    let lab = Lab::new();
    lab.qemu_img(&format!(
        "create -q -f qcow2 -o {options} disk.qcow2 {size}"
    ));
    let disk = Disk::open(&lab);
    (lab, disk)
}

fn two_stages() {
    let (lab, mut disk) = created("compat=1.1", 8 * M);
    disk.write(0, &[1; 512], false).unwrap();
    disk.flush();
    disk.write(M, &[2; 512], false).unwrap();
    let reply = disk.flush();
    assert_eq!(purposes(&reply.plan), [Purpose::Prepare, Purpose::Link]);
    let written = |step: &Step| match step {
        Step::Write { data, .. } => data.len(),
        _ => 0,
    };
    let steps = reply.plan.stages.iter().flat_map(|stage| &stage.steps);
    assert_eq!(steps.map(written).sum::<usize>(), 1024, "one sector each");
    disk.judge(&lab);
}

fn side_by_side() {
    let (_lab, mut disk) = created("compat=1.1", 64 * M);
    let Ok(Reply::Placed(first)) = disk.allocate(0, 8 * M) else {
        panic!("no places");
    };
    let Ok(Reply::Placed(second)) = disk.allocate(8 * M, 8 * M) else {
        panic!("no places");
    };
    assert_eq!((first.len(), second.len()), (1, 1));
    assert_eq!(first[0].at + first[0].len, second[0].at);
    assert_eq!(first[0].content, Content::Zero);
}

fn table_moves() {
    for options in [
        "cluster_size=512",
        "cluster_size=512,refcount_bits=1",
        "cluster_size=512,refcount_bits=64",
        "cluster_size=512,refcount_bits=32",
    ] {
        let (lab, mut disk) = created(options, 16 * M);
        let mut moves = 0;
        for round in 0..15 {
            let data = vec![round as u8 + 1; 1 << 20];
            while let Err(failure) = disk.write(round * M, &data, false) {
                assert_eq!(failure.kind, FailureKind::FlushFirst);
                moves += count_moves(&disk.flush().plan);
            }
            moves += count_moves(&disk.flush().plan);
        }
        disk.judge(&lab);
        let full = options != "cluster_size=512,refcount_bits=1";
        assert_eq!(moves > 0, full, "{options}: {moves} moves");
    }
}

/// Moves of the refcount table: writes to its fields in the header.
fn count_moves(plan: &Plan) -> usize {
    let steps = plan.stages.iter().flat_map(|stage| &stage.steps);
    steps
        .filter(|step| matches!(step, Step::Write { offset: 48, data, .. } if data.len() == 12))
        .count()
}

fn flush_first() {
    let lab = Lab::new();
    lab.qemu_img("create -q -f qcow2 -o cluster_size=2M disk.qcow2 16T");
    let mut session = Session::new(lab.bytes("disk.qcow2"));
    session.open(None).unwrap();
    let mut allocate = |offset| session.call(Request::Allocate { offset, len: 2 * M });
    let refused = (0..32).find_map(|table| allocate(table << 39).err());
    assert_eq!(refused.unwrap().kind, FailureKind::FlushFirst);
    assert!(matches!(session.call(Request::Flush), Ok(Reply::Plan(_))));
    let mut allocate = |offset| session.call(Request::Allocate { offset, len: 2 * M });
    assert!(matches!(allocate(31 << 39), Ok(Reply::Placed(_))));
}

/// Counts in the first refcount block, from cluster `first` on, become 0.
fn forget_counts(image: &mut [u8], first: usize) {
    let table = u64::from_be_bytes(image[48..56].try_into().unwrap()) as usize;
    let block = u64::from_be_bytes(image[table..table + 8].try_into().unwrap()) as usize;
    image[block + 2 * first..block + 4096].fill(0);
}

/// Counts the clusters of a range, which lie behind the end, as used.
fn leave_counts(image: &mut [u8], clusters: std::ops::Range<usize>) {
    let word = |at: usize| u64::from_be_bytes(image[at..at + 8].try_into().unwrap()) as usize;
    let block = word(word(48));
    for count in image[block + 2 * clusters.start..block + 2 * clusters.end].chunks_exact_mut(2) {
        count.copy_from_slice(&1u16.to_be_bytes());
    }
}

fn leftovers() {
    let lab = Lab::new();
    lab.qemu_img("create -q -f qcow2 disk.qcow2 8M");
    lab.qemu_io("disk.qcow2", &["write -P 1 0 512"]);
    let mut image = lab.bytes("disk.qcow2");
    assert!(image.len() <= 22 << 16, "they lie behind the end");
    leave_counts(&mut image, 22..300);
    lab.write("disk.qcow2", &image);
    let mut disk = Disk::open(&lab);
    disk.write(M, &[2; 65536], false).unwrap();
    disk.flush();
    assert_eq!(disk.session.host.image.len(), 301 << 16);
    lab.write("disk.qcow2", &disk.session.host.image);
    lab.qemu_img("check -q -r leaks disk.qcow2");
    disk.session.host.image = lab.bytes("disk.qcow2");
    disk.judge(&lab);
}

fn far_leftovers() {
    let lab = Lab::new();
    lab.qemu_img("create -q -f qcow2 -o cluster_size=2M disk.qcow2 8M");
    let mut image = lab.bytes("disk.qcow2");
    // A block counts 2^20 clusters of 2 MiB: the last lies 2 TiB behind the end.
    leave_counts(&mut image, (1 << 20) - 1..1 << 20);
    let mut session = Session::new(image.clone());
    session.open(None).unwrap();
    let (offset, len) = (0, 2 * M);
    let refused = session.call(Request::Allocate { offset, len }).unwrap_err();
    assert_eq!(refused.kind, FailureKind::TooLarge);
    assert!(
        refused.message.contains("more than 512 GiB behind the end"),
        "{}",
        refused.message
    );
    assert_eq!(
        session.call(Request::Flush),
        Ok(Reply::Plan(PlanReply::default()))
    );
    assert!(session.host.image == image, "nothing was written");
}

fn damaged_counts() {
    let lab = Lab::new();
    lab.qemu_img("create -q -f qcow2 -o cluster_size=4k disk.qcow2 8M");
    lab.qemu_io("disk.qcow2", &["write -P 1 0 1M"]);
    lab.qemu_img("snapshot -c first disk.qcow2");
    let mut image = lab.bytes("disk.qcow2");
    forget_counts(&mut image, 4);
    let mut session = Session::new(image.clone());
    session.open(None).unwrap();
    let refused = session.call(Request::Allocate {
        offset: 0,
        len: 4096,
    });
    let refused = refused.unwrap_err();
    assert_eq!(refused.kind, FailureKind::Damaged);
    assert!(
        refused.message.contains("has reference count 0"),
        "{}",
        refused.message
    );
    assert_eq!(
        session.call(Request::Flush),
        Ok(Reply::Plan(PlanReply::default()))
    );
    assert!(session.host.image == image, "nothing was written");
}

/// Two compressed clusters in one host cluster that is counted once.
fn count_too_low() {
    let blank = Blank::default();
    let mut image = blank.build();
    let (l2, packed) = (blank.free(), blank.free() + blank.cluster());
    image.resize(packed + blank.cluster(), 0);
    let mut put = |at: usize, value: u64| {
        image[at..at + 8].copy_from_slice(&value.to_be_bytes());
    };
    put(blank.l1(), 1 << 63 | l2 as u64);
    put(l2, 1 << 62 | packed as u64);
    put(l2 + 8, 1 << 62 | (packed as u64 + 16));
    let counted = |at: usize| blank.refcount_block() + 2 * (at / blank.cluster());
    image[counted(l2) + 1] = 1;
    image[counted(packed) + 1] = 1;
    let mut session = Session::new(image);
    session.open(None).unwrap();
    let placed = session.call(Request::Allocate { offset: 0, len: K });
    let Ok(Reply::Placed(places)) = placed else {
        panic!("no places: {placed:?}");
    };
    session.host.image.resize(places[0].at as usize, 0);
    session.host.image.extend([7; 1024]);
    let Ok(Reply::Plan(reply)) = session.call(Request::Flush) else {
        panic!("the flush was refused");
    };
    session.host.apply(&reply.plan);
    let count = &session.host.image[counted(packed)..][..2];
    assert_eq!(count, [0, 1], "too low already, so it stays");
    session.open(None).unwrap();
    assert!(session.read(0, K).unwrap() == [7; 1024]);
}

/// An image whose file ends in its only cluster of data, behind subcluster 0.
fn short_last_cluster(bitmap: u64) -> Session {
    let blank = Blank {
        cluster_bits: 14,
        incompatible: 16,
        ..Blank::default()
    };
    let mut image = blank.build();
    let (l2, data) = (blank.free(), blank.free() + blank.cluster());
    image.resize(data + 512, 0x11);
    image[l2..data].fill(0);
    let mut put = |at: usize, value: u64| {
        image[at..at + 8].copy_from_slice(&value.to_be_bytes());
    };
    put(blank.l1(), 1 << 63 | l2 as u64);
    put(l2, 1 << 63 | data as u64);
    put(l2 + 8, bitmap);
    let mut session = Session::new(image);
    session.open(None).unwrap();
    session
}

fn past_the_end() {
    // Subcluster 5 is new, or allocated and never written.
    for bitmap in [1, 1 | 1 << 5] {
        let mut session = short_last_cluster(bitmap);
        let offset = 5 * 512;
        let allocate = Request::Allocate { offset, len: 512 };
        let before = session.map(0, 16 * K).unwrap();
        session.call(allocate.clone()).unwrap();
        session.call(Request::Undo).unwrap();
        assert_eq!(session.map(0, 16 * K).unwrap(), before, "taken back");
        let Ok(Reply::Placed(places)) = session.call(allocate) else {
            panic!("no places");
        };
        session.host.image.resize(places[0].at as usize, 0);
        session.host.image.extend([7; 512]);
        assert!(session.read(offset, 512).unwrap() == [7; 512]);
        let Ok(Reply::Plan(reply)) = session.call(Request::Flush) else {
            panic!("no plan");
        };
        session.host.apply(&reply.plan);
        session.open(None).unwrap();
        assert!(session.read(offset, 512).unwrap() == [7; 512]);
    }
}

/// A data file counts as longer until the allocation is taken back.
fn data_file_undone() {
    let (_lab, mut disk) = created("data_file=disk.data", 8 * M);
    let map = |disk: &mut Disk| disk.session.map(0, 8 * M).unwrap();
    disk.session.host.file(FileNo::DATA).unwrap().truncate(100);
    disk.session
        .call(Request::Attach { lens: vec![100] })
        .unwrap();
    disk.allocate(0, 64 * K).unwrap();
    disk.flush();
    disk.session
        .call(Request::Attach { lens: vec![100] })
        .unwrap();
    let mapped = map(&mut disk);
    disk.allocate(0, 64 * K).unwrap();
    assert_ne!(map(&mut disk), mapped);
    disk.session.call(Request::Undo).unwrap();
    assert_eq!(map(&mut disk), mapped);
}

/// A request is as large as its clusters are many: 16 MiB at most.
fn large_requests() {
    for bits in 9..=12 {
        for order in 0..=6 {
            let options = format!("cluster_size={},refcount_bits={}", 1 << bits, 1 << order);
            let (lab, mut disk) = created(&options, 16 * M);
            let placed = disk.allocate(0, 16 * M);
            assert!(
                matches!(placed, Ok(Reply::Placed(_))),
                "{options}: {placed:?}"
            );
            disk.flush();
            if order == 6 {
                disk.judge(&lab);
            }
        }
    }
}

/// Counts far apart, each in a sector of its own, are written by themselves.
fn scattered_releases() {
    let (lab, mut disk) = created("cluster_size=512,refcount_bits=64", 8 * M);
    disk.allocate(0, 4 * M).unwrap();
    disk.flush();
    disk.judge(&lab);
    lab.qemu_img("snapshot -c first disk.qcow2");
    let mut disk = Disk::open(&lab);
    for part in 0..100 {
        disk.write(part * 64 * 512, &[7; 512], false).unwrap();
    }
    let reply = disk.flush();
    let stage = reply.plan.stages.last().unwrap();
    assert_eq!(stage.purpose, Purpose::Release);
    let written = |step: &Step| match step {
        Step::Write { data, .. } => data.len(),
        _ => 0,
    };
    // A count for each cluster, and for each of the L2 tables.
    assert_eq!(stage.steps.iter().map(written).sum::<usize>(), 2 * 100 * 8);
    disk.judge(&lab);
}

/// A cluster that its entry calls exclusive, in a table that is shared.
fn shared_table() {
    let (lab, mut disk) = created("cluster_size=4k", 8 * M);
    disk.write(0, &[1; 4096], false).unwrap();
    disk.flush();
    disk.judge(&lab);
    let mut image = lab.bytes("disk.qcow2");
    let l1 = u64::from_be_bytes(image[40..48].try_into().unwrap()) as usize;
    image[l1] &= 0x7f;
    let mut session = Session::new(image);
    session.open(None).unwrap();
    let old = session.map(0, 4096).unwrap();
    let placed = session.call(Request::Allocate {
        offset: 0,
        len: 4096,
    });
    let Ok(Reply::Placed(places)) = placed else {
        panic!("no places: {placed:?}");
    };
    let ExtentKind::Data { at, .. } = old[0].kind else {
        panic!("no data: {old:?}");
    };
    assert_ne!(places[0].at, at);
    assert_ne!(places[0].content, Content::Current);
}

/// Data is overwritten in place only once unknown features are cleared.
fn autoclear_in_place() {
    let lab = Lab::new();
    lab.qemu_img("create -q -f qcow2 disk.qcow2 8M");
    lab.qemu_io("disk.qcow2", &["write -P 1 0 64k"]);
    let mut image = lab.bytes("disk.qcow2");
    image[AUTOCLEAR].copy_from_slice(&(1u64 << 40).to_be_bytes());
    let mut session = Session::new(image);
    session.open(None).unwrap();
    let in_place = |session: &mut Session| {
        let kind = session.map(0, 64 * K).unwrap()[0].kind;
        matches!(kind, ExtentKind::Data { in_place: true, .. })
    };
    assert!(!in_place(&mut session));
    let (offset, len) = (0, 64 * K);
    session.call(Request::Allocate { offset, len }).unwrap();
    let Ok(Reply::Plan(reply)) = session.call(Request::Flush) else {
        panic!("no plan");
    };
    session.host.apply(&reply.plan);
    assert_eq!(session.host.image[AUTOCLEAR], [0; 8]);
    assert!(in_place(&mut session));
}

/// The header's autoclear feature bits.
const AUTOCLEAR: std::ops::Range<usize> = 88..96;

fn autoclear() {
    let lab = Lab::new();
    lab.qemu_img("create -q -f qcow2 disk.qcow2 8M");
    let mut image = lab.bytes("disk.qcow2");
    image[AUTOCLEAR].copy_from_slice(&(1u64 << 40).to_be_bytes());
    let changes = [
        vec![
            Request::Allocate {
                offset: 0,
                len: 64 * K,
            },
            Request::Flush,
        ],
        vec![Request::Resize {
            size: 9 * M,
            preallocation: Default::default(),
            shrink: false,
            backing_size: None,
        }],
    ];
    for requests in changes {
        let mut session = Session::new(image.clone());
        session.open(None).unwrap();
        for request in requests {
            if let Reply::Plan(reply) = session.call(request).unwrap() {
                session.host.apply(&reply.plan);
            }
        }
        assert_eq!(session.host.image[AUTOCLEAR], [0; 8]);
        lab.write("disk.qcow2", &session.host.image);
        lab.qemu_img("check -f qcow2 disk.qcow2");
    }
}
