//! Growing VHDX images, judged by qemu-img and qemu-io.

use crate::lab::{Check, Lab};
use crate::vhdx_lab::{G, K, M, assert_same, create, open, raw, resize, scatter, write};
use instar_guest::plan::{Purpose, Stage};
use instar_guest::proto::Preallocation;
use instar_guest::{ExtentKind, FailureKind, Step};

/// All checks by name.
pub fn trials() -> Vec<(String, Check)> {
    let grown = CASES.iter().map(|case| {
        let name = format!("vhdx_grows::{}", case.name);
        (name, Box::new(|| grows(case)) as Check)
    });
    let one = |name: &str, check: fn()| (name.to_string(), Box::new(check) as Check);
    grown
        .chain([
            one("vhdx_refuses_to_grow", refusals),
            one("vhdx_clears_what_lay_behind_the_old_end", tail),
            one("vhdx_streams_a_large_table_past_the_end", streamed),
            one("vhdx_uses_what_an_interrupted_grow_left", leftovers),
        ])
        .collect()
}

/// One grow.
struct Case {
    name: &'static str,
    options: &'static str,
    old: u64,
    new: u64,
    preallocation: Preallocation,
    /// Durability barriers.
    stages: usize,
}

const fn case(
    name: &'static str,
    options: &'static str,
    old: u64,
    new: u64,
    preallocation: Preallocation,
    stages: usize,
) -> Case {
    Case {
        name,
        options,
        old,
        new,
        preallocation,
        stages,
    }
}

use Preallocation::{Falloc, Full, Metadata, Off};

const CASES: &[Case] = &[
    case("in_place", "block_size=1M", 20 * M, 64 * M, Off, 3),
    case("inside_a_block", "", 20 * M, 20 * M + 512, Off, 3),
    case(
        "odd_to_odd",
        "block_size=1M",
        20 * M + 512,
        33 * M + 512,
        Off,
        3,
    ),
    case("metadata", "block_size=1M", 20 * M, 64 * M, Metadata, 3),
    case("falloc", "block_size=1M", 20 * M + 512, 40 * M, Falloc, 3),
    case("full", "block_size=2M", 20 * M, 40 * M, Full, 3),
    case("across_a_chunk", "block_size=1M", 20 * M, 5 * G, Off, 3),
    case("relocated", "block_size=1M", 20 * M, 200 * G, Off, 3),
    case(
        "relocated_with_data",
        "block_size=1M",
        128 * G - 64 * M,
        128 * G + 9 * M,
        Metadata,
        3,
    ),
    case(
        "fixed",
        "subformat=fixed,block_state_zero=off",
        20 * M,
        64 * M,
        Off,
        3,
    ),
    case(
        "fixed_cut_short",
        "subformat=fixed,block_state_zero=off,block_size=1M",
        5 * M / 2,
        7 * M,
        Off,
        3,
    ),
    case(
        "fixed_of_qemu",
        "subformat=fixed",
        20 * M,
        30 * M,
        Falloc,
        3,
    ),
    case(
        "not_present",
        "block_state_zero=off",
        20 * M,
        30 * M,
        Off,
        3,
    ),
];

fn grows(case: &Case) {
    let lab = Lab::new();
    create(&lab, case.options, case.old);
    scatter(&lab, case.old.min(64 * M), 20, 3);
    let last = case.old - 512;
    write(&lab, &[format!("write -P 0x5a {last} 512")]);
    old_raw(&lab);
    let mut session = open(&lab);
    let old_identity = session.open(None).unwrap().identity;
    let reply = resize(&mut session, case.new, case.preallocation, false).unwrap();
    check_shape(&reply.plan.stages, case);
    session.host.apply(&reply.plan);
    lab.write("disk.vhdx", &session.host.image);

    let facts = session.open(None).unwrap();
    assert_eq!(facts.virtual_size, case.new);
    assert_eq!(facts.unsettled, None);
    assert_ne!(facts.identity, old_identity, "the data-write identifier");
    lab.qemu_img("check -f vhdx disk.vhdx");
    let info = lab.json("info -f vhdx --output=json disk.vhdx");
    assert_eq!(info["virtual-size"], case.new);
    if case.new < G {
        lab.qemu_img(&format!("resize -q -f raw old.raw {}", case.new));
        assert_same(&raw(&lab), &lab.bytes("old.raw"), "content");
        let content = session.read(0, case.new).unwrap();
        assert_same(&content, &lab.bytes("old.raw"), "content read here");
    } else {
        compare_ends(&lab, case.old, case.new);
    }
    if case.preallocation != Off {
        let first = case.old.next_multiple_of(256 * M).min(case.new - 1);
        for extent in session.map(first, case.new - first).unwrap() {
            assert!(matches!(extent.kind, ExtentKind::Data { .. }), "{extent:?}");
        }
    }
    // A second time there is nothing to do, and QEMU goes on with the image.
    let again = resize(&mut session, case.new, Off, false).unwrap();
    assert!(again.plan.is_empty());
    let end = case.new - 64 * K;
    write(
        &lab,
        &[
            format!("write -P 0x7e {end} 64k"),
            format!("read -P 0x7e {end} 64k"),
        ],
    );
    lab.qemu_img("check -f vhdx disk.vhdx");
}

/// The first 64 MiB of the image at most.
fn old_raw(lab: &Lab) {
    lab.run(
        "qemu-img",
        &[
            "dd",
            "-f",
            "vhdx",
            "-O",
            "raw",
            "bs=1M",
            "count=64",
            "if=disk.vhdx",
            "of=old.raw",
        ],
    );
}

/// The first 64 MiB and what lies around the old end, where there is more than
/// can be compared.
fn compare_ends(lab: &Lab, old: u64, new: u64) {
    let old_bytes = lab.bytes("old.raw");
    lab.run(
        "qemu-img",
        &[
            "dd",
            "-f",
            "vhdx",
            "-O",
            "raw",
            "bs=1M",
            "count=64",
            "if=disk.vhdx",
            "of=start.raw",
        ],
    );
    let mut expected = old_bytes;
    expected.resize(64 << 20, 0);
    assert_same(&lab.bytes("start.raw"), &expected, "first bytes");
    let zeroes = (new - old).min(64 * M);
    let far = new - zeroes;
    write(
        lab,
        &[
            format!("read -P 0 {old} {zeroes}"),
            format!("read -P 0 {far} {zeroes}"),
        ],
    );
}

/// Nothing visible before the commit, which is the size; few barriers.
fn check_shape(stages: &[Stage], case: &Case) {
    let purposes: Vec<Purpose> = stages.iter().map(|stage| stage.purpose).collect();
    assert_eq!(stages.len(), case.stages, "{purposes:?}");
    let commits: Vec<usize> = (0..stages.len())
        .filter(|&at| stages[at].purpose == Purpose::Commit)
        .collect();
    let [commit] = commits[..] else {
        panic!("{} commits", commits.len());
    };
    let [Step::Write { data, .. }] = &stages[commit].steps[..] else {
        panic!("the commit is no write: {:?}", stages[commit]);
    };
    assert_eq!(data[..], case.new.to_le_bytes());
    for stage in &stages[commit + 1..] {
        assert_eq!(stage.purpose, Purpose::Release);
    }
}

fn refusals() {
    let lab = Lab::new();
    create(&lab, "", 20 * M);
    let before = lab.bytes("disk.vhdx");
    let mut session = open(&lab);
    let mut refused = |size, preallocation, shrink, kind, words: &str| {
        let failure = resize(&mut session, size, preallocation, shrink).unwrap_err();
        assert_eq!(failure.kind, kind, "{failure}");
        assert!(failure.message.starts_with(words), "{failure}");
        assert_same(&session.host.image, &before, "image");
    };
    let sectors = "The new size must be a multiple of 512: 20971521 is not, the nearest that are, \
                   are 20971520 and 20972032";
    refused(20 * M + 1, Off, false, FailureKind::InvalidRequest, sectors);
    let large = "Image size too large; max of 64TB";
    refused((64 << 40) + 512, Off, false, FailureKind::TooLarge, large);
    let option = "Use the --shrink option to perform a shrink operation.";
    refused(10 * M, Off, false, FailureKind::NotPermitted, option);
    let growing = "Preallocation can only be used for growing images";
    refused(
        20 * M,
        Metadata,
        false,
        FailureKind::InvalidRequest,
        growing,
    );
}

/// What a larger disk had there must not come back: QEMU leaves it in the block.
fn tail() {
    for options in [
        "block_size=1M",
        "block_size=1M,subformat=fixed,block_state_zero=off",
    ] {
        let lab = Lab::new();
        create(&lab, options, 3 * M);
        write(&lab, &["write -P 0xaa 0 3M".to_string()]);
        let mut image = lab.bytes("disk.vhdx");
        let size_at = (3 << 20) + (64 << 10) + 8;
        image[size_at..size_at + 8].copy_from_slice(&(5 * M / 2).to_le_bytes());
        lab.write("disk.vhdx", &image);
        let mut session = open(&lab);
        let reply = resize(&mut session, 4 * M, Off, false).unwrap();
        session.host.apply(&reply.plan);
        let mut expected = vec![0xaa; 5 * M as usize / 2];
        expected.resize(4 * M as usize, 0);
        session.open(None).unwrap();
        assert_same(&session.read(0, 4 * M).unwrap(), &expected, "content");
        lab.write("disk.vhdx", &session.host.image);
        assert_same(&raw(&lab), &expected, "content as QEMU reads it");
    }
}

/// More entries than a plan can hold.
fn streamed() {
    let lab = Lab::new();
    create(&lab, "block_size=1M", G);
    scatter(&lab, 64 * M, 5, 8);
    let before = lab.bytes("disk.vhdx").len() as u64;
    let mut session = open(&lab);
    let reply = resize(&mut session, 1 << 40, Off, false).unwrap();
    assert!(!session.host.streamed.is_empty());
    for stage in session.host.streamed.iter().flat_map(|plan| &plan.stages) {
        for step in &stage.steps {
            let at = match step {
                Step::Write { offset, .. } => *offset,
                Step::Copy { to, .. } => *to,
                Step::SetLength { len, .. } => *len,
                other => panic!("streamed: {other:?}"),
            };
            assert!(at >= before);
        }
    }
    session.host.apply(&reply.plan);
    old_raw(&lab);
    lab.write("disk.vhdx", &session.host.image);
    lab.qemu_img("check -f vhdx disk.vhdx");
    compare_ends(&lab, G, 1 << 40);
}

/// Space at the end of the file that nothing refers to is used, and what is in
/// it is not shown.
fn leftovers() {
    for preallocation in [Metadata, Falloc, Full] {
        let lab = Lab::new();
        create(&lab, "block_size=1M", 4 * M);
        write(&lab, &["write -P 1 0 1M".to_string()]);
        let mut image = lab.bytes("disk.vhdx");
        let len = image.len();
        image.resize(len + 3 * M as usize, 0xee);
        lab.write("disk.vhdx", &image);
        let mut session = open(&lab);
        let reply = resize(&mut session, 6 * M, preallocation, false).unwrap();
        session.host.apply(&reply.plan);
        assert_eq!(session.host.image.len(), len + 3 * M as usize);
        session.open(None).unwrap();
        let mut expected = vec![1; M as usize];
        expected.resize(6 * M as usize, 0);
        assert_same(&session.read(0, 6 * M).unwrap(), &expected, "content");
    }
}
