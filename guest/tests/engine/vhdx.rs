//! VHDX images that qemu-img made are opened and read; images made here are
//! those that qemu-img makes.

use crate::lab::{Check, Lab};
use crate::vhdx_lab::{G, K, M, assert_same, create, creation, open, plan, raw, scatter, write};
use instar_guest::plan::Purpose;
use instar_guest::testing::Session;
use instar_guest::{ExtentKind, FailureKind, Format, Step};

/// All checks by name.
pub fn trials() -> Vec<(String, Check)> {
    let equal = EQUAL.iter().map(|&(size, options)| {
        let name = format!("vhdx_creates_the_bytes_of_qemu_img::{size}_{options}");
        (name, Box::new(move || equals_qemu(size, options)) as Check)
    });
    let refused = REFUSED.iter().map(|&(size, options)| {
        let name = format!("vhdx_refuses_as_qemu_img_does::{size}_{options}");
        (name, Box::new(move || refuses(size, options)) as Check)
    });
    let read = READ.iter().map(|&(options, size)| {
        let name = format!("vhdx_reads_what_qemu_reads::{size}_{options}");
        (name, Box::new(move || reads(options, size)) as Check)
    });
    let one = |name: &str, check: fn()| (name.to_string(), Box::new(check) as Check);
    equal
        .chain(refused)
        .chain(read)
        .chain([
            one("vhdx_creates_an_image_of_no_bytes", empty),
            one("vhdx_maps_a_64_TiB_disk_with_few_reads", huge),
        ])
        .collect()
}

/// Size and options of images that must be equal but for identifiers.
const EQUAL: &[(u64, &str)] = &[
    (512, ""),
    (20 * M, ""),
    (G, ""),
    (G + 512, ""),
    (100 * G, ""),
    (100 * G + 512, ""),
    (32 << 40, ""),
    ((32 << 40) + 512, ""),
    (20 * M, "subformat=dynamic"),
    (20 * M, "subformat=fixed"),
    (
        5 * M / 2,
        "subformat=fixed,block_size=1M,block_state_zero=off",
    ),
    (20 * M, "block_state_zero=off"),
    (20 * M, "block_state_zero=yes"),
    (20 * M, "log_size=1"),
    (20 * M, "log_size=1500k"),
    (20 * M, "log_size=2M,log_size=3M"),
    (20 * M, "block_size=0"),
    (20 * M, "block_size=1"),
    (20 * M, "block_size=1536k"),
    (20 * M, "block_size=256M"),
    (20 * M, "block_size=257M"),
    (20 * M, "block_size=5G"),
    (5 * G, "block_size=1M"),
    (300 * G, "block_size=1M"),
];

/// What qemu-img refuses, and with which words.
const REFUSED: &[(u64, &str)] = &[
    (65 << 40, ""),
    (20 * M, "log_size=0"),
    (20 * M, "log_size=4G"),
    (20 * M, "log_size=a"),
    (20 * M, "block_size=3M"),
    (20 * M, "subformat=differencing"),
    (20 * M, "block_state_zero=1"),
    (20 * M, "foo=1"),
];

/// Options and size of images that are filled with scattered data.
const READ: &[(&str, u64)] = &[
    ("block_size=1M", 40 * M),
    ("block_size=1M", 5 * M / 2),
    ("", 40 * M + 512),
    ("subformat=fixed", 20 * M),
    (
        "subformat=fixed,block_state_zero=off,block_size=1M",
        5 * M / 2,
    ),
    ("block_size=2M,block_state_zero=off", 30 * M),
];

fn option_words(options: &str) -> String {
    match options {
        "" => String::new(),
        options => format!("-o {options}"),
    }
}

/// Zeroes what is random: sequence numbers, identifiers, their checksums and
/// the name of the program.
fn anonymous(mut image: Vec<u8>) -> Vec<u8> {
    image[8..512].fill(0);
    for header in [64 << 10, 128 << 10] {
        image[header + 4..header + 48].fill(0);
    }
    let entry = (192 << 10) + 16 + 32 + 16;
    let metadata = u64::from_le_bytes(image[entry..entry + 8].try_into().unwrap()) as usize;
    let disk_id = metadata + (64 << 10) + 16;
    image[disk_id..disk_id + 16].fill(0);
    image
}

fn equals_qemu(size: u64, options: &str) {
    let lab = Lab::new();
    let words = option_words(options);
    let said = lab.qemu_img(&format!("create -f vhdx {words} disk.vhdx {size}"));
    let mut session = Session::default();
    let reply = plan(session.call(creation(size, options)).unwrap());
    let (last, earlier) = reply.plan.stages.split_last().unwrap();
    assert_eq!(last.purpose, Purpose::Commit);
    assert!(
        earlier
            .iter()
            .all(|stage| stage.purpose == Purpose::Prepare)
    );
    assert!(matches!(&last.steps[..], [Step::Write { offset: 0, data, .. }] if data.len() == 512));
    session.host.apply(&reply.plan);
    let printed = reply
        .options
        .iter()
        .map(|(key, value)| format!(" {key}={value}"));
    assert_eq!(
        format!(
            "Formatting 'disk.vhdx', fmt=vhdx{}",
            printed.collect::<String>()
        ),
        said.trim_end()
    );
    lab.write("ours.vhdx", &session.host.image);
    lab.qemu_img("check -q -f vhdx ours.vhdx");
    let ours = anonymous(std::mem::take(&mut session.host.image));
    assert_same(&ours, &anonymous(lab.bytes("disk.vhdx")), "image");
}

fn refuses(size: u64, options: &str) {
    let lab = Lab::new();
    let words = option_words(options);
    let said = lab.failing(
        "qemu-img",
        &format!("create -q -f vhdx {words} disk.vhdx {size}"),
    );
    let refusal = Session::default()
        .call(creation(size, options))
        .unwrap_err();
    assert_eq!(
        format!("qemu-img: disk.vhdx: {}", refusal.message),
        said.trim_end()
    );
}

/// QEMU takes an empty disk to have a BAT of 64 MiB, and so must we, or it does
/// not open the image.
fn empty() {
    let lab = Lab::new();
    let mut session = Session::default();
    let reply = plan(session.call(creation(0, "")).unwrap());
    session.host.apply(&reply.plan);
    assert_eq!(session.open(None).unwrap().virtual_size, 0);
    lab.write("disk.vhdx", &session.host.image);
    let info = lab.json("info -f vhdx --output=json disk.vhdx");
    assert_eq!(info["virtual-size"], 0);
    assert_eq!(session.map(0, 0).unwrap(), []);
}

fn reads(options: &str, size: u64) {
    let lab = Lab::new();
    create(&lab, options, size);
    scatter(&lab, size, 30, size);
    let mut session = open(&lab);
    let facts = session.open(None).unwrap();
    let info = lab.json("info -f vhdx --output=json disk.vhdx");
    assert_eq!(facts.format, Format::Vhdx);
    assert_eq!(facts.virtual_size, info["virtual-size"]);
    assert_eq!(facts.cluster_size.unwrap(), info["cluster-size"]);
    assert_eq!(facts.unsettled, None);
    assert_eq!((facts.no_resize, facts.backing), (None, None));
    assert_same(&session.read(0, size).unwrap(), &raw(&lab), "content");
    // Pieces that neither begin nor end at blocks.
    let whole = lab.bytes("disk.raw");
    for (at, len) in [(511, 3), (M - 1, M + 2), (size - 5, 5)] {
        let piece = session.read(at, len).unwrap();
        assert_same(&piece, &whole[at as usize..][..len as usize], "piece");
    }
}

/// A disk as large as can be, with a few blocks far apart.
fn huge() {
    let lab = Lab::new();
    let size = 64u64 << 40;
    create(&lab, "", size);
    let written = [0, size / 3 / M * M, size - M];
    let commands: Vec<String> = written
        .iter()
        .map(|at| format!("write -P 7 {at} {}", 64 * K))
        .collect();
    write(&lab, &commands);
    let mut session = open(&lab);
    let reads = session.host.reads;
    let extents = session.map(0, size).unwrap();
    let data = |kind| matches!(kind, ExtentKind::Data { .. });
    let found: Vec<_> = extents.iter().filter(|extent| data(extent.kind)).collect();
    assert_eq!(found.len(), 3);
    for (extent, at) in found.iter().zip(written) {
        assert!((extent.offset..extent.offset + extent.len).contains(&at));
    }
    let reads = session.host.reads - reads;
    assert!(reads <= 20, "{reads} reads for 1 Mi blocks");
    let failure = session.map(size - 1, 2).unwrap_err();
    assert_eq!(failure.kind, FailureKind::InvalidRequest);
}
