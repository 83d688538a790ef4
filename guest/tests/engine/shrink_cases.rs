//! Images to shrink: how they come about, and how far they go.

use crate::disk::Random;
use crate::grow_cases::{G, K, M};
use crate::lab::Lab;

/// An image to make and to shrink.
#[derive(Clone)]
pub struct Case {
    pub name: String,
    pub options: &'static str,
    pub old: u64,
    pub new: u64,
    pub backing: Option<u64>,
    pub then: fn(&Lab, &Case),
    /// How many commits the plan has.
    pub commits: usize,
}

fn case(name: &str, options: &'static str, old: u64, new: u64) -> Case {
    Case {
        name: name.to_string(),
        options,
        old,
        new,
        backing: None,
        then: scatter,
        commits: 2,
    }
}

impl Case {
    fn over(self, backing: u64) -> Self {
        Self {
            backing: Some(backing),
            ..self
        }
    }

    fn then(self, then: fn(&Lab, &Case)) -> Self {
        Self { then, ..self }
    }

    fn commits(self, commits: usize) -> Self {
        Self { commits, ..self }
    }
}

fn nothing(_: &Lab, _: &Case) {}

fn run(lab: &Lab, commands: &[String]) {
    let commands: Vec<&str> = commands.iter().map(String::as_str).collect();
    lab.qemu_io("disk.qcow2", &commands);
}

/// Writes that leave clusters in no order, some of them cut by the new end.
fn scatter(lab: &Lab, case: &Case) {
    let mut random = Random(0x5eed ^ case.old ^ case.new);
    let mut commands: Vec<String> = (0..40)
        .map(|number| {
            let at = random.below(case.old / 512) * 512;
            let len = ((random.below(200) + 1) * 512).min(case.old - at);
            format!("write -P {} {at} {len}", number + 1)
        })
        .collect();
    let at = case.new.saturating_sub(20 * K);
    commands.push(format!("write -P 77 {at} {}", (40 * K).min(case.old - at)));
    commands.push(format!("write -P 78 {} 512", case.old - 512));
    run(lab, &commands);
}

/// Every cluster, in order.
fn fill(lab: &Lab, case: &Case) {
    run(lab, &[format!("write -P 1 0 {}", case.old)]);
}

/// Every cluster, from the end to the start.
fn fill_backwards(lab: &Lab, case: &Case) {
    let piece = case.old / 32;
    let commands: Vec<String> = (0..32)
        .rev()
        .map(|number| format!("write -P {} {} {piece}", number + 1, number * piece))
        .collect();
    run(lab, &commands);
}

fn zeroes(lab: &Lab, case: &Case) {
    scatter(lab, case);
    let at = case.new.saturating_sub(64 * K) / (64 * K) * (64 * K);
    run(
        lab,
        &[
            format!("write -z {at} 192k"),
            "write -z 0 64k".to_string(),
            "discard 64k 64k".to_string(),
        ],
    );
}

fn packed(lab: &Lab, case: &Case) {
    scatter(lab, case);
    lab.qemu_img(&format!(
        "convert -c -O qcow2 -o {} disk.qcow2 packed.qcow2",
        case.options
    ));
    std::fs::rename(lab.path("packed.qcow2"), lab.path("disk.qcow2")).unwrap();
}

/// The last cluster of the file, which is cut short, is freed.
fn packed_apart(lab: &Lab, _: &Case) {
    lab.qemu_io("disk.qcow2", &["write -c -P 1 0 64k"]);
    lab.qemu_io("disk.qcow2", &["write -c -P 2 64k 64k"]);
}

fn snapshot(lab: &Lab, case: &Case) {
    scatter(lab, case);
    lab.qemu_img("snapshot -c first disk.qcow2");
    run(
        lab,
        &[
            format!("write -P 91 {} 64k", case.old / 2),
            "write -P 92 64k 64k".to_string(),
        ],
    );
}

/// A snapshot that shares everything.
fn shared(lab: &Lab, case: &Case) {
    fill(lab, case);
    lab.qemu_img("snapshot -c first disk.qcow2");
}

/// A snapshot that has the start, and much behind it.
fn shared_start(lab: &Lab, case: &Case) {
    let half = case.new.next_multiple_of(64 * K);
    run(lab, &[format!("write -P 1 0 {half}")]);
    lab.qemu_img("snapshot -c first disk.qcow2");
    run(lab, &[format!("write -P 2 {half} {}", case.old - half)]);
}

fn packed_snapshot(lab: &Lab, case: &Case) {
    packed(lab, case);
    lab.qemu_img("snapshot -c first disk.qcow2");
}

fn bitmaps(lab: &Lab, case: &Case) {
    lab.qemu_img("bitmap --add -g 512 disk.qcow2 fine");
    lab.qemu_img("bitmap --add -g 65536 disk.qcow2 coarse");
    lab.qemu_img("bitmap --add -g 512 disk.qcow2 off");
    scatter(lab, case);
    lab.qemu_img("bitmap --disable disk.qcow2 off");
}

fn crowded_bitmaps(lab: &Lab, case: &Case) {
    bitmaps(lab, case);
    let mut image = lab.bytes("disk.qcow2");
    image[112..116].copy_from_slice(b"what");
    lab.write("disk.qcow2", &image);
}

/// Preallocated by QEMU: its refcount table lies behind the old one.
fn preallocated(lab: &Lab, case: &Case) {
    lab.qemu_img(&format!("resize -q --shrink disk.qcow2 {}", case.old / 4));
    scatter_to(lab, case.old / 4);
    lab.qemu_img(&format!(
        "resize -q --preallocation=falloc disk.qcow2 {}",
        case.old
    ));
}

fn scatter_to(lab: &Lab, size: u64) {
    run(lab, &[format!("write -P 3 {} 512", size - 512)]);
}

/// All of them.
pub fn cases() -> Vec<Case> {
    let mut cases = vec![
        case("empty", "compat=1.1", 64 * M, 32 * M)
            .then(nothing)
            .commits(1),
        case("v3", "compat=1.1", 64 * M, 32 * M),
        case("v2", "compat=0.10", 64 * M, 32 * M),
        case("full", "compat=1.1", 64 * M, 32 * M).then(fill),
        case("backwards", "compat=1.1", 64 * M, 32 * M).then(fill_backwards),
        case("odd", "compat=1.1", 64 * M, 32 * M + 512 * 77),
        case("odd_full", "compat=1.1", 64 * M, 32 * M + 512).then(fill),
        case("odd_both", "compat=1.1", 8 * M + 512, 3 * M + 1024),
        case("to_a_sector", "compat=1.1", 64 * M, 512).then(fill),
        case("to_nothing", "compat=1.1", 64 * M, 0)
            .then(fill)
            .commits(1),
        case("within_a_cluster", "compat=1.1", M, M - 512).then(fill),
        case("a_cluster", "compat=1.1", M, M - 64 * K).then(fill),
        case("whole_tables", "cluster_size=4k", 16 * M, 8 * M)
            .then(fill)
            .commits(1),
        case("4k", "cluster_size=4k", 64 * M, 5 * M),
        case("4k_odd", "cluster_size=4k", 64 * M, 5 * M + 512).then(fill),
        case("512", "cluster_size=512", 16 * M, 3 * M).commits(1),
        case("512_full", "cluster_size=512", 4 * M, M + 512).then(fill),
        case("512_backwards", "cluster_size=512", 4 * M, M + 512).then(fill_backwards),
        case("512_whole", "cluster_size=512", 4 * M, M)
            .then(fill)
            .commits(1),
        case("2m", "cluster_size=2M", 50 * M, 9 * M),
        case("2m_full", "cluster_size=2M", 50 * M, 8 * M).then(fill),
        case("far", "compat=1.1", 64 << 40, 10 * G)
            .then(nothing)
            .commits(1),
        case("far_scattered", "compat=1.1", 800 * G, 10 * G)
            .then(scatter)
            .commits(1),
        case("ext", "extended_l2=on", 64 * M, 32 * M),
        case("ext_odd", "extended_l2=on", 64 * M, 32 * M + 2 * K),
        case(
            "ext_odd_full",
            "extended_l2=on,cluster_size=16k",
            64 * M,
            3 * M + 512,
        )
        .then(fill),
        case("zeroes", "compat=1.1", 64 * M, 32 * M + 512).then(zeroes),
        case("zeroes_ext", "extended_l2=on", 64 * M, 32 * M + 512).then(zeroes),
        case("packed", "compat=1.1", 8 * M, 3 * M).then(packed),
        case("packed_odd", "compat=1.1", 8 * M, 3 * M + 512).then(packed),
        case("packed_4k", "cluster_size=4k", 8 * M, 3 * M + 512).then(packed),
        case("packed_apart", "cluster_size=4k", M, 65 * K).then(packed_apart),
        case("packed_512", "cluster_size=512", 4 * M, M + 512).then(packed),
        case("packed_ext", "extended_l2=on", 8 * M, 3 * M + 512).then(packed),
        case("packed_zstd", "compression_type=zstd", 8 * M, 3 * M + 512).then(packed),
        case("snapshot", "compat=1.1", 64 * M, 32 * M).then(snapshot),
        case("snapshot_odd", "compat=1.1", 64 * M, 32 * M + 512).then(snapshot),
        case("snapshot_4k", "cluster_size=4k", 64 * M, 5 * M + 512).then(snapshot),
        case("snapshot_512", "cluster_size=512", 8 * M, 2 * M)
            .then(snapshot)
            .commits(1),
        case("shared", "compat=1.1", 64 * M, 32 * M).then(shared),
        case("shared_odd", "compat=1.1", 64 * M, 32 * M + 512).then(shared),
        case("shared_512", "cluster_size=512", 4 * M, M + 512).then(shared),
        case("shared_512_full", "cluster_size=512", 130 * K, 64 * K + 512).then(shared),
        case("shared_start", "compat=1.1", 64 * M, 10 * M + 512).then(shared_start),
        case("shared_start_4k", "cluster_size=4k", 64 * M, M + 512).then(shared_start),
        case("packed_snapshot", "compat=1.1", 8 * M, 3 * M + 512).then(packed_snapshot),
        case("bitmaps", "compat=1.1", G, 64 * M + 512).then(bitmaps),
        case("bitmaps_far", "compat=1.1", 100 * G, 64 * M).then(bitmaps),
        case("bitmaps_same", "compat=1.1", 2 * M, M).then(bitmaps),
        case("bitmaps_4k", "cluster_size=4k", G, 64 * M + 512 * 3).then(bitmaps),
        case("bitmaps_512", "cluster_size=512", 64 * M, 3 * M + 512).then(bitmaps),
        case("bitmaps_crowded", "compat=1.1", 100 * G, 64 * M + 512).then(crowded_bitmaps),
        case("over", "compat=1.1", 64 * M, 32 * M + 512).over(8 * M),
        case("over_longer", "compat=1.1", 16 * M, 4 * M).over(8 * M),
        case("over_ext", "extended_l2=on", 64 * M, 32 * M + 512).over(64 * M),
        case("data_file", "data_file=disk.data", 64 * M, 32 * M),
        case("data_file_odd", "data_file=disk.data", 64 * M, 32 * M + 512),
        case(
            "raw_data_file",
            "data_file=disk.data,data_file_raw=on",
            64 * M,
            32 * M + 512,
        ),
        case("preallocated", "compat=1.1", 64 * M, 8 * M + 512).then(preallocated),
        case("preallocated_512", "cluster_size=512", 16 * M, M)
            .then(preallocated)
            .commits(1),
    ];
    for (options, name) in [
        ("cluster_size=512,refcount_bits=1", "1"),
        ("cluster_size=512,refcount_bits=2", "2"),
        ("cluster_size=512,refcount_bits=4", "4"),
        ("cluster_size=512,refcount_bits=8", "8"),
        ("cluster_size=512,refcount_bits=32", "32"),
        ("cluster_size=512,refcount_bits=64", "64"),
    ] {
        let name = |then| format!("refcount_bits_{name}_{then}");
        cases.push(case(&name("scattered"), options, 4 * M, M + 512));
        cases.push(case(&name("full"), options, 4 * M, M + 512).then(fill));
    }
    cases
}
