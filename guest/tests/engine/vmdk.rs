//! VMDK: opened, described, mapped, read and created as qemu-img does.

use crate::lab::{Check, Lab};
use crate::vmdk_lab::{DISK, content, create, make, map, opened, plan_create, qemu_io, tree};
use instar_guest::facts::NamedFile;
use instar_guest::plan::{NewName, Purpose};
use instar_guest::testing::Session;
use instar_guest::{FailureKind, Step};
use serde_json::{Value, json};

const M: u64 = 1 << 20;

/// All checks by name.
pub fn trials() -> Vec<(String, Check)> {
    let mut all: Vec<(String, Check)> = Vec::new();
    for &(options, size) in IMAGES {
        all.push((
            format!("vmdk::describes_maps_and_reads::{options}_{size}"),
            Box::new(move || reads(options, size)),
        ));
    }
    for &(size, options) in CREATED {
        all.push((
            format!("vmdk::creates_the_bytes_of_qemu_img::{size}_{options}"),
            Box::new(move || creates(size, options)),
        ));
    }
    for &options in REFUSED {
        all.push((
            format!("vmdk::refuses_as_qemu_img_does::{options}"),
            Box::new(move || refuses(options)),
        ));
    }
    all.extend([
        (
            "vmdk::reads_a_stream".to_string(),
            Box::new(stream) as Check,
        ),
        (
            "vmdk::reads_a_stream_of_version_3".to_string(),
            Box::new(version_3),
        ),
        (
            "vmdk::creates_the_bytes_of_qemu_img::backing".to_string(),
            Box::new(creates_child),
        ),
        ("vmdk::names_its_parent".to_string(), Box::new(parent)),
        (
            "vmdk::creates_no_stream".to_string(),
            Box::new(no_new_stream),
        ),
    ]);
    all
}

const IMAGES: &[(&str, u64)] = &[
    ("monolithicSparse", 64 * M),
    ("monolithicSparse", 20 * M + 7 * 512),
    ("monolithicSparse,zeroed_grain=on", 64 * M),
    ("monolithicSparse", 5 << 30),
    ("monolithicFlat", 20 * M),
    ("twoGbMaxExtentSparse", 64 * M),
    ("twoGbMaxExtentSparse", (2 << 30) + 5 * M),
    ("twoGbMaxExtentFlat", 20 * M),
];

fn info_agrees(lab: &Lab) {
    let (_, facts) = opened(lab);
    let info = lab.json(&format!("info -f vmdk --output=json {DISK}"));
    assert_eq!(info["virtual-size"], facts.virtual_size);
    assert_eq!(
        info.get("cluster-size").and_then(Value::as_u64),
        facts.cluster_size
    );
    let ours = tree(&facts.specific).to_string();
    assert_eq!(ours, info["format-specific"]["data"].to_string());
}

fn reads(options: &str, size: u64) {
    let lab = Lab::new();
    make(&lab, options, size);
    if options.contains("zeroed") {
        qemu_io(&lab, &["write -z 0 1M".into(), "write -z 10M 1M".into()]);
    }
    info_agrees(&lab);
    let (mut session, facts) = opened(&lab);
    assert_eq!(facts.virtual_size, size);
    assert!(facts.unsettled.is_none() && facts.no_resize.is_none());
    if !options.contains("Flat") {
        let theirs = lab.json(&format!("map -f vmdk --output=json {DISK}"));
        assert_eq!(json!(map(&mut session, size)), theirs);
    }
    if size < 1 << 30 {
        assert!(session.read(0, size).unwrap() == content(&lab));
    }
}

/// The content of an image that qemu-img compressed.
fn stream() {
    let lab = Lab::new();
    make(&lab, "monolithicSparse", 20 * M + 3 * 512);
    lab.qemu_img(&format!(
        "convert -f vmdk -O vmdk -o subformat=streamOptimized {DISK} stream.vmdk"
    ));
    std::fs::rename(lab.path("stream.vmdk"), lab.path(DISK)).unwrap();
    info_agrees(&lab);
    let (mut session, facts) = opened(&lab);
    let theirs = lab.json(&format!("map -f vmdk --output=json {DISK}"));
    assert_eq!(json!(map(&mut session, facts.virtual_size)), theirs);
    assert!(session.read(0, facts.virtual_size).unwrap() == content(&lab));
    let refusal = facts.no_resize.expect("a stream is not resized");
    assert_eq!(refusal.kind, FailureKind::Unsupported);
    assert!(refusal.message.contains("qemu-img convert"), "{refusal}");
}

/// An image that a product of VMware made: version 3, its directory at the end.
fn version_3() {
    let lab = Lab::new();
    let packed = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/tests/data/iotest-version3.vmdk.bz2"
    );
    let image = lab.output_bytes("bzcat", &[packed]);
    lab.write(DISK, &image);
    info_agrees(&lab);
    let (mut session, facts) = opened(&lab);
    assert_eq!(facts.virtual_size, 16 << 30);
    let theirs = lab.json(&format!("map -f vmdk --output=json {DISK}"));
    assert_eq!(json!(map(&mut session, facts.virtual_size)), theirs);
    lab.qemu_img(&format!(
        "dd -f vmdk -O raw if={DISK} of=start.raw bs=1M count=64"
    ));
    let expected = lab.bytes("start.raw");
    assert!(session.read(0, expected.len() as u64).unwrap() == expected);
    assert!(facts.no_resize.is_some() && facts.no_write.is_some());
}

const CREATED: &[(u64, &str)] = &[
    (0, ""),
    (512, ""),
    (10 * M, ""),
    (5 << 30, ""),
    (300 << 30, "zeroed_grain=on"),
    (10 * M + 512, "adapter_type=lsilogic"),
    (10 * M, "hwversion=7"),
    (10 * M, "compat6=on"),
    (10 * M, "toolsversion=5,zeroed_grain=off,adapter_type=ide"),
    (10 * M, "subformat=monolithicSparse"),
    (5 << 30, "subformat=monolithicFlat"),
    (0, "subformat=monolithicFlat"),
    (10 * M, "subformat=twoGbMaxExtentSparse,zeroed_grain=on"),
    ((5 << 30) + 512, "subformat=twoGbMaxExtentSparse"),
    (0, "subformat=twoGbMaxExtentSparse"),
    (
        5 << 30,
        "subformat=twoGbMaxExtentFlat,adapter_type=buslogic",
    ),
    (40 << 30, "subformat=twoGbMaxExtentSparse"),
];

/// The bytes of a descriptor or an image, its CID made nought.
fn without_cid(mut bytes: Vec<u8>) -> Vec<u8> {
    let at = bytes.windows(5).position(|text| text == b"\nCID=");
    if let Some(at) = at.map(|at| at + 5) {
        let end = at + bytes[at..].iter().position(|&byte| byte == b'\n').unwrap();
        let pad = 8 - (end - at);
        bytes.splice(at..end, *b"00000000");
        // The text is as much longer as QEMU left digits out.
        if bytes.starts_with(b"KDMV") {
            bytes.drain(512 * 21 - pad..512 * 21);
        }
    }
    bytes
}

fn same_but_cid(ours: &[u8], theirs: &[u8]) {
    let (ours, theirs) = (without_cid(ours.to_vec()), without_cid(theirs.to_vec()));
    let differs = ours.iter().zip(&theirs).position(|(a, b)| a != b);
    assert_eq!((ours.len(), differs), (theirs.len(), None));
}

fn printed(options: &[(String, String)]) -> String {
    let words = options.iter().map(|(key, value)| format!(" {key}={value}"));
    words.collect()
}

fn creates(size: u64, options: &str) {
    let lab = Lab::new();
    let words = match options {
        "" => String::new(),
        options => format!("-o {options}"),
    };
    let said = lab.qemu_img(&format!("create -f vmdk {words} {DISK} {size}"));
    let mut session = Session::default();
    let reply = plan_create(&mut session, create(size, options)).unwrap();
    assert_eq!(
        format!("Formatting '{DISK}', fmt=vmdk{}", printed(&reply.options)),
        said.trim_end()
    );
    let (last, earlier) = reply.plan.stages.split_last().unwrap();
    assert!(
        earlier
            .iter()
            .all(|stage| stage.purpose == Purpose::Prepare)
    );
    assert!(matches!(&last.steps[..], [Step::Write { offset: 0, data, .. }] if data.len() <= 512));
    let flat = options.contains("Flat");
    let is_content = |step: &Step| !(flat && matches!(step, Step::SetLength { .. }));
    for step in reply.plan.stages.iter().flat_map(|stage| &stage.steps) {
        match step {
            // Gigabytes of nothing are not made in memory.
            Step::SetLength { file, len } if !is_content(step) => {
                let NewName::Plain(name) = &session.host.names[file.0 as usize - 1].1 else {
                    panic!("not a name of its own");
                };
                let theirs = std::fs::metadata(lab.path(name)).unwrap().len();
                assert_eq!(theirs, *len);
            }
            step => session.host.step(step),
        }
    }
    same_but_cid(&session.host.image, &lab.bytes(DISK));
    for (file, name) in session.host.names.clone() {
        let NewName::Plain(name) = name else {
            panic!("not a name of its own");
        };
        if !flat {
            assert!(*session.host.file(file).unwrap() == lab.bytes(&name));
        }
    }
}

fn creates_child() {
    let lab = Lab::new();
    lab.qemu_img("create -q -f vmdk base.vmdk 10M");
    let said = lab.qemu_img(&format!(
        "create -f vmdk -o zeroed_grain=on -b base.vmdk -F vmdk {DISK}"
    ));
    let mut base = Session::new(lab.bytes("base.vmdk"));
    let mut request = create(10 * M, "zeroed_grain=on");
    request.backing = Some(NamedFile {
        name: "base.vmdk".to_string(),
        format: Some("vmdk".to_string()),
    });
    request.backing_size = Some(10 * M);
    request.backing_identity = base.open(None).unwrap().identity;
    let mut session = Session::default();
    let reply = plan_create(&mut session, request).unwrap();
    assert_eq!(
        format!("Formatting '{DISK}', fmt=vmdk{}", printed(&reply.options)),
        said.trim_end()
    );
    session.host.apply(&reply.plan);
    same_but_cid(&session.host.image, &lab.bytes(DISK));
}

fn parent() {
    let lab = Lab::new();
    lab.qemu_img("create -q -f vmdk base.vmdk 10M");
    lab.qemu_img(&format!("create -q -f vmdk -b base.vmdk -F vmdk {DISK}"));
    let base = Session::new(lab.bytes("base.vmdk")).open(None).unwrap();
    let (_, facts) = opened(&lab);
    let backing = facts.backing.expect("a parent");
    assert_eq!(backing.names, ["base.vmdk"]);
    assert_eq!(backing.format.as_deref(), Some("vmdk"));
    assert_eq!(backing.identity, base.identity);
    assert!(base.backing.is_none());
    let refusal = facts.no_resize.expect("a child is not resized");
    assert!(
        refusal
            .message
            .starts_with("the image is the child of another"),
        "{refusal}"
    );
}

/// What qemu-img refuses, and with which words.
const REFUSED: &[&str] = &[
    "subformat=foo",
    "adapter_type=foo",
    "compat6=foo",
    "compat6=on,hwversion=5",
    "subformat=monolithicFlat,zeroed_grain=on",
    "nonsense=1",
];

fn refuses(options: &str) {
    let lab = Lab::new();
    let line = format!("create -q -f vmdk -o {options} {DISK} 1M");
    let said = lab.failing("qemu-img", &line);
    let refusal = plan_create(&mut Session::default(), create(M, options)).unwrap_err();
    assert_eq!(
        format!("qemu-img: {DISK}: {}", refusal.message),
        said.trim_end()
    );
}

fn no_new_stream() {
    let request = create(M, "subformat=streamOptimized");
    let refusal = plan_create(&mut Session::default(), request).unwrap_err();
    assert_eq!(refusal.kind, FailureKind::Unsupported);
    assert!(refusal.message.contains("qemu-img convert"), "{refusal}");
}
