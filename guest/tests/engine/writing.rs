//! Writing inside the disk: random writes against a model, judged by qemu-img
//! after every flush.

use crate::disk::{Disk, Random};
use crate::lab::{Check, Lab};
use instar_guest::plan::{Plan, Purpose};
use instar_guest::proto::{Content, PlanReply};
use instar_guest::testing::Session;
use instar_guest::{FailureKind, Reply, Request, Step};

/// An image to make and to write to.
struct Case {
    name: &'static str,
    options: &'static str,
    size: u64,
    then: fn(&Lab, &Case),
}

/// All checks by name.
pub fn trials() -> Vec<(String, Check)> {
    let random = cases().into_iter().map(|case| {
        let name = format!("random_writes_are_read_back::{}", case.name);
        (name, Box::new(move || random_writes(&case)) as Check)
    });
    random
        .chain([
            (
                "a_common_flush_has_two_stages".to_string(),
                Box::new(two_stages) as Check,
            ),
            (
                "neighbours_are_placed_side_by_side".to_string(),
                Box::new(side_by_side) as Check,
            ),
            (
                "a_full_refcount_table_moves".to_string(),
                Box::new(table_moves) as Check,
            ),
            (
                "unknown_autoclear_bits_are_cleared".to_string(),
                Box::new(autoclear) as Check,
            ),
            (
                "damaged_counts_are_found_before_anything_changes".to_string(),
                Box::new(damaged_counts) as Check,
            ),
            (
                "counts_left_behind_the_end_are_skipped".to_string(),
                Box::new(leftovers) as Check,
            ),
            (
                "counts_left_too_far_behind_the_end_are_refused".to_string(),
                Box::new(far_leftovers) as Check,
            ),
            (
                "too_many_changes_ask_for_a_flush".to_string(),
                Box::new(flush_first) as Check,
            ),
        ])
        .collect()
}

const K: u64 = 1 << 10;
const M: u64 = 1 << 20;

fn cases() -> Vec<Case> {
    let case = |name, options, size, then| Case {
        name,
        options,
        size,
        then,
    };
    vec![
        case("fresh", "compat=1.1", 8 * M, nothing),
        case("odd_size", "cluster_size=4k", 3 * M + 512, nothing),
        case("version_2", "compat=0.10", 8 * M, scribble),
        case("clusters_512", "cluster_size=512", 2 * M, scribble),
        case("clusters_4k", "cluster_size=4k", 8 * M, scribble),
        case("clusters_2m", "cluster_size=2M", 16 * M, scribble),
        case(
            "refcount_bits_1",
            "cluster_size=512,refcount_bits=1",
            2 * M,
            scribble,
        ),
        case(
            "refcount_bits_2",
            "cluster_size=512,refcount_bits=2",
            2 * M,
            scribble,
        ),
        case(
            "refcount_bits_64",
            "cluster_size=512,refcount_bits=64",
            2 * M,
            scribble,
        ),
        case(
            "refcount_bits_64_4k",
            "cluster_size=4k,refcount_bits=64",
            8 * M,
            scribble,
        ),
        case("extended_l2", "extended_l2=on", 8 * M, scribble),
        case(
            "extended_l2_16k",
            "extended_l2=on,cluster_size=16k",
            8 * M,
            scribble,
        ),
        case("snapshots", "cluster_size=4k", 8 * M, snapshots),
        case("snapshots_64k", "compat=1.1", 8 * M, snapshots),
        case(
            "snapshots_v2",
            "compat=0.10,cluster_size=512",
            2 * M,
            snapshots,
        ),
        case("snapshots_extended", "extended_l2=on", 8 * M, snapshots),
        case("compressed", "cluster_size=4k", 8 * M, compressed),
        case("compressed_64k", "compat=1.1", 8 * M, compressed),
        case(
            "compressed_zstd",
            "compression_type=zstd",
            8 * M,
            compressed,
        ),
        case("compressed_extended", "extended_l2=on", 8 * M, compressed),
        case(
            "compressed_snapshot",
            "cluster_size=4k",
            8 * M,
            |lab, case| {
                compressed(lab, case);
                lab.qemu_img("snapshot -c first disk.qcow2");
            },
        ),
        case("over_backing", "compat=1.1", 8 * M, backing),
        case(
            "over_backing_4k",
            "cluster_size=4k,compat=0.10",
            8 * M,
            backing,
        ),
        case("over_backing_extended", "extended_l2=on", 8 * M, backing),
        case("preallocated", "preallocation=metadata", 8 * M, scribble),
        case(
            "preallocated_extended",
            "preallocation=metadata,extended_l2=on",
            8 * M,
            scribble,
        ),
        case("lazy_refcounts", "lazy_refcounts=on", 8 * M, scribble),
        case("data_file", "data_file=disk.data", 8 * M, scribble),
        case(
            "data_file_extended",
            "data_file=disk.data,extended_l2=on",
            8 * M,
            scribble,
        ),
        case(
            "raw_data_file",
            "data_file=disk.data,data_file_raw=on",
            8 * M,
            scribble,
        ),
        case("disabled_bitmap", "compat=1.1", 8 * M, |lab, case| {
            lab.qemu_img("bitmap --add --disable disk.qcow2 off");
            scribble(lab, case);
        }),
    ]
}

fn nothing(_: &Lab, _: &Case) {}

fn scribble(lab: &Lab, case: &Case) {
    let mut commands = Vec::new();
    for part in 0..8 {
        let at = case.size / 8 * part / 512 * 512;
        commands.push(format!("write -P {} {at} {}", 0x10 + part, 50 * K));
    }
    if !case.options.contains("0.10") {
        commands.push(format!("write -z {} 128k", case.size / 4));
        commands.push(format!("write -z -u {} 128k", case.size / 2));
    }
    let commands: Vec<&str> = commands.iter().map(String::as_str).collect();
    lab.qemu_io("disk.qcow2", &commands);
}

fn snapshots(lab: &Lab, case: &Case) {
    scribble(lab, case);
    lab.qemu_img("snapshot -c first disk.qcow2");
    lab.qemu_io("disk.qcow2", &["write -P 0x66 64k 200k"]);
    lab.qemu_img("snapshot -c second disk.qcow2");
    lab.qemu_io("disk.qcow2", &["write -P 0x77 300k 100k"]);
}

fn compressed(lab: &Lab, case: &Case) {
    scribble(lab, case);
    lab.qemu_img(&format!(
        "convert -c -O qcow2 -o {} disk.qcow2 packed.qcow2",
        case.options
    ));
    std::fs::rename(lab.path("packed.qcow2"), lab.path("disk.qcow2")).unwrap();
}

fn backing(lab: &Lab, case: &Case) {
    lab.qemu_img("create -q -f qcow2 base.qcow2 6M");
    lab.qemu_io("base.qcow2", &["write -P 0x99 1M 4M"]);
    lab.qemu_img("rebase -q -u -f qcow2 -F qcow2 -b base.qcow2 disk.qcow2");
    scribble(lab, case);
}

fn random_writes(case: &Case) {
    for seed in 1..=2 {
        let lab = Lab::new();
        lab.qemu_img(&format!(
            "create -q -f qcow2 -o {} disk.qcow2 {}",
            case.options, case.size
        ));
        (case.then)(&lab, case);
        let mut disk = Disk::open(&lab);
        let mut random = Random(0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(seed));
        for _ in 0..3 {
            for _ in 0..40 {
                one_write(&mut disk, &mut random);
                disk.check_mapping(&mut random);
            }
            disk.flush();
            assert!(
                disk.flush().plan.is_empty(),
                "a second flush has nothing to do"
            );
            disk.check_mapping(&mut random);
            disk.judge(&lab);
        }
        check_snapshots(&lab, case);
    }
}

fn one_write(disk: &mut Disk, random: &mut Random) {
    let at = random.below(disk.size());
    let most = [700, 5 * K, 40 * K, 300 * K][random.below(4) as usize];
    let len = (1 + random.below(most)).min(disk.size() - at);
    let data: Vec<u8> = match random.below(6) {
        0 => vec![0; len as usize],
        _ => (0..len).map(|_| random.below(255) as u8 + 1).collect(),
    };
    let undo = random.below(8) == 0;
    match disk.write(at, &data, undo) {
        Ok(()) => {}
        Err(failure) if failure.kind == FailureKind::FlushFirst => {
            disk.flush();
            disk.write(at, &data, false).expect("room after a flush");
        }
        Err(failure) => panic!("{failure}"),
    }
}

/// Snapshots hold what they held.
fn check_snapshots(lab: &Lab, case: &Case) {
    if !case.name.starts_with("snapshots") {
        return;
    }
    let fresh = Lab::new();
    fresh.qemu_img(&format!(
        "create -q -f qcow2 -o {} disk.qcow2 {}",
        case.options, case.size
    ));
    snapshots(&fresh, case);
    for name in ["first", "second"] {
        for lab in [lab, &fresh] {
            lab.qemu_img(&format!("convert -O raw -l {name} disk.qcow2 snapshot.raw"));
        }
        assert!(
            lab.bytes("snapshot.raw") == fresh.bytes("snapshot.raw"),
            "{name}"
        );
    }
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
    let purposes: Vec<Purpose> = reply
        .plan
        .stages
        .iter()
        .map(|stage| stage.purpose)
        .collect();
    assert_eq!(purposes, [Purpose::Prepare, Purpose::Link]);
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
