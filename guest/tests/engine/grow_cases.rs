//! Images to grow: how they come about, and how far they go.

use crate::lab::Lab;
use instar_guest::proto::Preallocation;

/// An image to make and to grow.
#[derive(Clone)]
pub struct Case {
    pub name: String,
    pub options: &'static str,
    pub old: u64,
    pub new: u64,
    pub preallocation: Preallocation,
    pub backing: Option<u64>,
    pub then: fn(&Lab, &Case),
    /// Most barriers that the plan may take.
    pub stages: usize,
}

pub const K: u64 = 1 << 10;
pub const M: u64 = 1 << 20;
pub const G: u64 = 1 << 30;

pub fn case(name: &str, options: &'static str, old: u64, new: u64) -> Case {
    Case {
        name: name.to_string(),
        options,
        old,
        new,
        preallocation: Preallocation::Off,
        backing: None,
        then: scribble,
        stages: 4,
    }
}

impl Case {
    pub fn falloc(self) -> Self {
        self.preallocated(Preallocation::Falloc, "falloc")
    }

    fn metadata(self) -> Self {
        self.preallocated(Preallocation::Metadata, "metadata")
    }

    fn full(self) -> Self {
        self.preallocated(Preallocation::Full, "full")
    }

    pub fn preallocated(self, preallocation: Preallocation, mode: &str) -> Self {
        Self {
            name: format!("{}_{mode}", self.name),
            preallocation,
            ..self
        }
    }

    fn over(self, backing: u64) -> Self {
        Self {
            backing: Some(backing),
            ..self
        }
    }

    pub fn then(self, then: fn(&Lab, &Case)) -> Self {
        Self { then, ..self }
    }

    fn stages(self, stages: usize) -> Self {
        Self { stages, ..self }
    }
}

/// Writes here and there, to the last byte.
fn scribble(lab: &Lab, case: &Case) {
    let size = case.old;
    let mut commands = vec!["write -P 0x11 0 64k".to_string()];
    for (pattern, part) in [(0x22, 3), (0x33, 5), (0x44, 7)] {
        let at = size / 8 * part / 512 * 512;
        let len = (20 * K).min(size - at) / 512 * 512;
        commands.push(format!("write -P {pattern} {at} {len}"));
    }
    commands.push(format!("write -P 0x55 {} 512", size - 512));
    let commands: Vec<&str> = commands.iter().map(String::as_str).collect();
    lab.qemu_io("disk.qcow2", &commands);
}

fn snapshots(lab: &Lab, case: &Case) {
    scribble(lab, case);
    lab.qemu_img("snapshot -c first disk.qcow2");
    lab.qemu_io("disk.qcow2", &["write -P 0x66 64k 64k"]);
}

/// The last cluster is shared with a snapshot, and was longer once.
fn shared_stale_tail(lab: &Lab, case: &Case) {
    stale_tail(lab, case);
    lab.qemu_img("snapshot -c first disk.qcow2");
}

/// Data behind the end, in the last cluster.
fn stale_tail(lab: &Lab, case: &Case) {
    let longer = case.old + 40 * K;
    lab.qemu_img(&format!("resize -q disk.qcow2 {longer}"));
    lab.qemu_io("disk.qcow2", &["write -P 0x77 0 1M"]);
    let last = format!("write -P 0x78 {} 64k", case.old - 24 * K);
    lab.qemu_io("disk.qcow2", &[&last]);
    lab.qemu_img(&format!("resize -q --shrink disk.qcow2 {}", case.old));
}

/// The same, compressed.
fn compressed_tail(lab: &Lab, case: &Case) {
    let longer = case.old + 40 * K;
    lab.qemu_img(&format!("resize -q disk.qcow2 {longer}"));
    let last = format!("write -P 0x78 {} 64k", case.old - 24 * K);
    lab.qemu_io("disk.qcow2", &[&last]);
    lab.qemu_img(&format!(
        "convert -c -O qcow2 -o {} disk.qcow2 packed.qcow2",
        case.options
    ));
    lab.qemu_img("convert -O raw disk.qcow2 unpacked.raw");
    std::fs::rename(lab.path("packed.qcow2"), lab.path("disk.qcow2")).unwrap();
    lab.qemu_img(&format!("resize -q --shrink disk.qcow2 {}", case.old));
}

/// What a shrink that stopped after the header leaves: the size alone is less.
fn stopped_shrink(lab: &Lab, case: &Case) {
    let longer = case.old + 6 * M;
    lab.qemu_img(&format!("resize -q disk.qcow2 {longer}"));
    let whole = format!("write -P 0x79 0 {longer}");
    let zeroes = format!("write -z {} 64k", case.old + 128 * K);
    lab.qemu_io("disk.qcow2", &[&whole, &zeroes]);
    let mut image = lab.bytes("disk.qcow2");
    image[24..32].copy_from_slice(&case.old.to_be_bytes());
    lab.write("disk.qcow2", &image);
}

/// The same, with a snapshot that shares everything.
fn stopped_shrink_snapshot(lab: &Lab, case: &Case) {
    stopped_shrink(lab, case);
    let mut image = lab.bytes("disk.qcow2");
    image[24..32].copy_from_slice(&(case.old + 6 * M).to_be_bytes());
    lab.write("disk.qcow2", &image);
    lab.qemu_img("snapshot -c first disk.qcow2");
    let mut image = lab.bytes("disk.qcow2");
    image[24..32].copy_from_slice(&case.old.to_be_bytes());
    lab.write("disk.qcow2", &image);
}

fn bitmaps(lab: &Lab, case: &Case) {
    lab.qemu_img("bitmap --add -g 512 disk.qcow2 fine");
    lab.qemu_img("bitmap --add -g 65536 disk.qcow2 coarse");
    lab.qemu_img("bitmap --add -g 512 disk.qcow2 off");
    scribble(lab, case);
    lab.qemu_img("bitmap --disable disk.qcow2 off");
}

/// Header extensions that leave no room for the bitmaps' in the first sector.
fn crowded_bitmaps(lab: &Lab, case: &Case) {
    bitmaps(lab, case);
    let mut image = lab.bytes("disk.qcow2");
    assert_eq!(
        image[112..116],
        [0x68, 0x03, 0xf8, 0x57],
        "the feature names"
    );
    image[112..116].copy_from_slice(b"what");
    lab.write("disk.qcow2", &image);
}

/// A data file that goes on behind the end of the disk.
fn longer_data_file(lab: &Lab, case: &Case) {
    scribble(lab, case);
    let mut data = lab.bytes("disk.data");
    data.resize(3 * M as usize, 0x7a);
    lab.write("disk.data", &data);
}

/// All of them.
pub fn cases() -> Vec<Case> {
    let mut cases = vec![
        case("in_place", "compat=1.1", M, 64 * M).stages(1),
        case("in_place_v2", "compat=0.10", M, 64 * M).stages(1),
        case("l1_slack", "compat=1.1", M, G).stages(2),
        case("l1_slack_4k", "cluster_size=4k", M, 64 * M).stages(2),
        case("l1_moves", "cluster_size=512", M, 64 * M).stages(3),
        case("l1_moves_v2", "cluster_size=512,compat=0.10", M, 64 * M).stages(3),
        case("from_nothing", "compat=1.1", 0, M)
            .then(|_, _| {})
            .stages(2),
        case("to_1_tib", "compat=1.1", G, 1 << 40).stages(2),
        case("1_tib_to_2", "compat=1.1", 1 << 40, 2 << 40)
            .then(|_, _| {})
            .stages(2),
        case("512_to_8_gib", "cluster_size=512", 64 * M, 8 * G).stages(3),
        case("2m_clusters", "cluster_size=2M", 5 * M, 50 * M).stages(2),
        case("odd_sizes", "compat=1.1", M + 512, 3 * M + 1024).stages(2),
        case("odd_sizes_ext", "extended_l2=on", M + 512, 3 * M + 1024).stages(2),
        case("sector_more", "compat=1.1", M + 512, M + 1024).stages(2),
        case("extended_l2", "extended_l2=on", M, 300 * M).stages(2),
        case("snapshots", "compat=1.1", M, 64 * M)
            .then(snapshots)
            .stages(1),
        case("snapshots_moves", "cluster_size=512", M, 64 * M).then(snapshots),
        case("stale_tail", "compat=1.1", M + 24 * K, 8 * M)
            .then(stale_tail)
            .stages(2),
        case("stale_tail_ext", "extended_l2=on", M + 24 * K, 8 * M).then(stale_tail),
        case("stale_tail_4k", "cluster_size=4k", M + 512, 8 * M).then(stale_tail),
        case("shared_stale_tail", "compat=1.1", M + 24 * K, 8 * M).then(shared_stale_tail),
        case("shared_stale_tail_ext", "extended_l2=on", M + 24 * K, 8 * M).then(shared_stale_tail),
        case("compressed_tail", "compat=1.1", M + 24 * K, 8 * M).then(compressed_tail),
        case("compressed_tail_ext", "extended_l2=on", M + 24 * K, 8 * M).then(compressed_tail),
        case("stopped_shrink", "compat=1.1", M, 8 * M).then(stopped_shrink),
        case("stopped_shrink_512", "cluster_size=512", M, 3 * M).then(stopped_shrink),
        case("stopped_shrink_512_far", "cluster_size=512", M, 20 * M).then(stopped_shrink),
        case("stopped_shrink_odd", "cluster_size=4k", M + K, 8 * M).then(stopped_shrink),
        case("stopped_shrink_ext", "extended_l2=on", M, 8 * M).then(stopped_shrink),
        case("stopped_shrink_snapshot", "cluster_size=4k", M, 8 * M).then(stopped_shrink_snapshot),
        case("stopped_shrink_over", "cluster_size=4k", M, 8 * M)
            .over(3 * M)
            .then(stopped_shrink),
        case("bitmaps", "compat=1.1", 64 * M, G).then(bitmaps),
        case("bitmaps_far", "compat=1.1", 64 * M, 100 * G).then(bitmaps),
        case("bitmaps_4k", "cluster_size=4k", 64 * M, G).then(bitmaps),
        case("bitmaps_crowded", "compat=1.1", 64 * M, 100 * G).then(crowded_bitmaps),
        case("bitmaps_same", "compat=1.1", M, 2 * M).then(bitmaps),
        case("over_longer", "compat=1.1", M, 64 * M).over(8 * M),
        case("over_longer_same_table", "compat=1.1", M, 2 * M)
            .over(8 * M)
            .stages(2),
        case("over_longer_4k", "cluster_size=4k", M, 64 * M).over(8 * M),
        case("over_longer_512", "cluster_size=512", M, 4 * M).over(8 * M),
        case("over_longer_ext", "extended_l2=on", M, 64 * M).over(8 * M),
        case("over_longer_odd", "compat=1.1", M + 512, 64 * M).over(8 * M),
        case("over_longer_odd_ext", "extended_l2=on", M + 2 * K, 64 * M).over(8 * M),
        case("over_shorter", "compat=0.10", M, 64 * M).over(512 * K),
        case("over_longer_snapshot", "compat=1.1", M, 64 * M)
            .over(8 * M)
            .then(snapshots),
        case("over_longer_snapshot_4k", "cluster_size=4k", M, 64 * M)
            .over(8 * M)
            .then(snapshots),
        case("data_file", "data_file=disk.data", M, 64 * M),
        case("data_file_odd", "data_file=disk.data", M + 512, 64 * M),
        case(
            "raw_data_file",
            "data_file=disk.data,data_file_raw=on",
            M,
            64 * M,
        ),
    ];
    for (bits, name) in [
        ("cluster_size=512,refcount_bits=1", "1"),
        ("cluster_size=512,refcount_bits=2", "2"),
        ("cluster_size=512,refcount_bits=4", "4"),
        ("cluster_size=512,refcount_bits=8", "8"),
        ("cluster_size=512,refcount_bits=16", "16"),
        ("cluster_size=512,refcount_bits=32", "32"),
        ("cluster_size=512,refcount_bits=64", "64"),
    ] {
        cases.push(case(&format!("refcount_bits_{name}"), bits, M, 40 * M));
        cases.push(case(&format!("refcount_bits_{name}"), bits, 3 * M, 9 * M).falloc());
    }
    cases.extend([
        case("v3", "compat=1.1", M, 4 * M).falloc().stages(3),
        case("v2", "compat=0.10", M, 4 * M).falloc(),
        case("l1_slack", "cluster_size=4k", M, 20 * M).falloc(),
        case("4k", "cluster_size=4k", M, 64 * M).falloc(),
        case("512", "cluster_size=512", M, 16 * M).falloc(),
        case("512_small", "cluster_size=512", 333 * 512, 1500 * K).falloc(),
        case("2m", "cluster_size=2M", 5 * M, 50 * M).falloc(),
        case("odd", "compat=1.1", M + 512, 3 * M + 1024).falloc(),
        case("odd_unwritten", "compat=1.1", M + 512, 3 * M)
            .falloc()
            .then(|_, _| {}),
        case("ext", "extended_l2=on,cluster_size=16k", M, 40 * M).falloc(),
        case("over_longer", "compat=1.1", M, 64 * M)
            .falloc()
            .over(8 * M),
        case("over_longer_ext", "extended_l2=on", M, 64 * M)
            .falloc()
            .over(8 * M),
        case("snapshots", "compat=1.1", M, 64 * M)
            .falloc()
            .then(snapshots),
        case("snapshots_512", "cluster_size=512", M, 16 * M)
            .falloc()
            .then(snapshots),
        case("bitmaps", "cluster_size=4k", 8 * M, 64 * M)
            .falloc()
            .then(bitmaps),
        case("shared_tail", "compat=1.1", M + 24 * K, 8 * M)
            .falloc()
            .then(shared_stale_tail),
        case("compressed_tail", "cluster_size=16k", M + 24 * K, 8 * M)
            .falloc()
            .then(compressed_tail),
        case("stopped_shrink", "compat=1.1", M, 8 * M)
            .falloc()
            .then(stopped_shrink),
        case("stopped_shrink_512", "cluster_size=512", M, 9 * M)
            .falloc()
            .then(stopped_shrink),
        case("stopped_shrink_snapshot", "cluster_size=4k", M, 8 * M)
            .falloc()
            .then(stopped_shrink_snapshot),
        case("data_file", "data_file=disk.data", M, 64 * M).falloc(),
        case(
            "raw_data_file",
            "data_file=disk.data,data_file_raw=on",
            M,
            64 * M,
        )
        .falloc(),
        case("data_file_odd", "data_file=disk.data", M + 512, 64 * M)
            .falloc()
            .then(|_, _| {}),
        case("streamed", "cluster_size=512", M, 256 * M).falloc(),
    ]);
    cases.extend(
        [
            case("v3", "compat=1.1", M, 4 * M).stages(3),
            case("v2", "compat=0.10", M, 4 * M),
            case("512", "cluster_size=512", M, 16 * M),
            case("2m", "cluster_size=2M", 5 * M, 50 * M),
            case("odd", "compat=1.1", M + 512, 3 * M + 1024),
            case("ext", "extended_l2=on,cluster_size=16k", M, 40 * M),
            case("over_longer_ext", "extended_l2=on", M, 64 * M).over(8 * M),
            case("snapshots", "compat=1.1", M, 64 * M).then(snapshots),
            case("bitmaps", "cluster_size=4k", 8 * M, 64 * M).then(bitmaps),
            case("stale_tail", "compat=1.1", M + 24 * K, 8 * M).then(stale_tail),
            case("stopped_shrink", "compat=1.1", M, 8 * M).then(stopped_shrink),
            case("data_file", "data_file=disk.data", M, 64 * M),
            case("data_file_odd", "data_file=disk.data", M + 512, 64 * M).then(|_, _| {}),
            case("data_file_longer", "data_file=disk.data", M, 8 * M).then(longer_data_file),
            case(
                "raw_data_file",
                "data_file=disk.data,data_file_raw=on",
                M,
                64 * M,
            ),
            case(
                "raw_data_file_longer",
                "data_file=disk.data,data_file_raw=on",
                M + 512,
                8 * M,
            )
            .then(longer_data_file),
        ]
        .into_iter()
        .flat_map(|case| [case.clone().metadata(), case.full()]),
    );
    cases
}
