//! Writing inside the disk: random writes against a model, judged by qemu-img
//! after every flush.

use crate::disk::{Disk, Random};
use crate::lab::{Check, Lab};
use instar_guest::FailureKind;

/// An image to make and to write to.
struct Case {
    name: &'static str,
    options: &'static str,
    size: u64,
    then: fn(&Lab, &Case),
}

/// All checks by name.
pub fn trials() -> Vec<(String, Check)> {
    let trial = |case: Case| {
        let name = format!("random_writes_are_read_back::{}", case.name);
        (name, Box::new(move || random_writes(&case)) as Check)
    };
    cases().into_iter().map(trial).collect()
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
