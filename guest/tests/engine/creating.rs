//! New images against those that qemu-img makes.

use crate::lab::{Check, Lab};
use instar_guest::facts::NamedFile;
use instar_guest::plan::{NewName, Purpose};
use instar_guest::proto::{Create, PlanReply};
use instar_guest::testing::{FRESH, Session};
use instar_guest::{Failure, FailureKind, FileNo, Format, Reply, Request, Step};

/// All checks by name.
pub fn trials() -> Vec<(String, Check)> {
    let equal = EQUAL.iter().map(|&(size, options)| {
        let name = format!("creates_the_bytes_of_qemu_img::{size}_{options}");
        (name, Box::new(move || equals_qemu(size, options)) as Check)
    });
    let sound = SOUND.iter().map(|&(size, options)| {
        let name = format!("creates_sound_images::{size}_{options}");
        (name, Box::new(move || is_sound(size, options)) as Check)
    });
    let refused = REFUSED.iter().map(|&(size, options)| {
        let name = format!("refuses_as_qemu_img_does::{size}_{options}");
        (name, Box::new(move || refuses(size, options)) as Check)
    });
    equal
        .chain(sound)
        .chain(refused)
        .chain([
            (
                "creates_the_bytes_of_qemu_img::backing".to_string(),
                Box::new(backing_equals_qemu) as Check,
            ),
            ("creates_raw_images".to_string(), Box::new(raw) as Check),
        ])
        .collect()
}

/// Images that must be equal to the byte.
const EQUAL: &[(&str, &str)] = &[
    ("1M", ""),
    ("0", ""),
    ("512", ""),
    ("64G", ""),
    ("1T", ""),
    ("1T", "cluster_size=2M"),
    ("8T", "cluster_size=4k,refcount_bits=1"),
    ("64M", "cluster_size=512"),
    ("64M", "cluster_size=4k"),
    ("64M", "compat=0.10"),
    ("64M", "compat=v2,cluster_size=512"),
    ("64M", "compat=v3"),
    ("64M", "refcount_bits=1"),
    ("64M", "refcount_bits=2"),
    ("64M", "refcount_bits=4"),
    ("64M", "refcount_bits=8"),
    ("64M", "refcount_bits=32"),
    ("64M", "refcount_bits=64"),
    ("64M", "lazy_refcounts=on"),
    ("64M", "lazy_refcounts=yes"),
    ("64M", "extended_l2=on"),
    ("64M", "extended_l2=on,cluster_size=16k"),
    ("64M", "compression_type=zstd"),
    ("64M", "cluster_size=0x1000,cluster_size=1k"),
    ("64M", "preallocation=off"),
    ("64M", "preallocation=metadata"),
    ("64M", "preallocation=metadata,compat=v2"),
    ("1M", "preallocation=metadata,cluster_size=4k"),
    ("64M", "data_file=data"),
    ("64M", "data_file=data,data_file_raw=on"),
    ("64M", "data_file=data,data_file_raw=on,preallocation=off"),
    ("64M", "data_file=data,preallocation=metadata"),
    ("64M", "data_file=data,preallocation=falloc"),
    ("64M", "data_file=data,preallocation=full"),
    ("64M", "data_file=data,data_file_raw=off,extended_l2=on"),
    ("64M", "data_file=data,data_file_raw=on,cluster_size=4k"),
    ("64M", "nocow=on,extent_size_hint=1M,encryption=off"),
    (
        "64M",
        "data_file=data,lazy_refcounts=on,compat=1.1,refcount_bits=8",
    ),
];

/// Images whose layout is our own.
const SOUND: &[(&str, &str)] = &[
    ("64M", "preallocation=falloc"),
    ("64M", "preallocation=full"),
    ("1M", "preallocation=full,cluster_size=4k"),
    ("20M", "preallocation=metadata,cluster_size=512"),
    ("520M", "preallocation=metadata"),
    ("20M", "preallocation=falloc,cluster_size=512"),
    (
        "16M",
        "preallocation=falloc,cluster_size=512,refcount_bits=64",
    ),
    ("64M", "preallocation=falloc,extended_l2=on"),
    ("64M", "preallocation=falloc,compat=0.10,cluster_size=4k"),
    ("5000704", "preallocation=falloc,refcount_bits=1"),
    ("4G", "cluster_size=512"),
];

/// What qemu-img refuses, and with which words.
const REFUSED: &[(&str, &str)] = &[
    ("1M", "cluster_size=100"),
    ("1M", "cluster_size=256"),
    ("1M", "cluster_size=4M"),
    ("1M", "cluster_size=4kb"),
    ("1M", "cluster_size="),
    ("1M", "foo=1"),
    ("1M", "compat=3"),
    ("1M", "compat=0.10,lazy_refcounts=on"),
    ("1M", "compat=0.10,refcount_bits=1"),
    ("1M", "compat=0.10,extended_l2=on"),
    ("1M", "compat=0.10,compression_type=zstd"),
    ("1M", "refcount_bits=3"),
    ("1M", "refcount_bits=128"),
    ("1M", "refcount_bits=a"),
    ("1M", "extended_l2=on,cluster_size=8k"),
    ("1M", "compression_type=foo"),
    ("1M", "lazy_refcounts=1"),
    ("1M", "preallocation=foo"),
    ("1M", "data_file_raw=on"),
    ("1M", "data_file_raw=maybe"),
    ("1M", "data_file=data,compat=0.10"),
    ("1M", "data_file=data,compat=0.10,compression_type=zstd"),
    ("1M", "data_file=data,refcount_bits=3"),
    ("1M", "nocow=2"),
    ("1M", "extent_size_hint=x"),
    ("200G", "cluster_size=512"),
    ("3P", ""),
];

fn create_request(create: Create) -> Request {
    Request::Create {
        create,
        name: "disk.qcow2".to_string(),
        fresh: FRESH,
    }
}

fn request(size: u64, options: &str) -> Create {
    Create {
        format: Format::Qcow2,
        size: size.next_multiple_of(512),
        options: options
            .split(',')
            .filter_map(|option| option.split_once('='))
            .map(|(key, value)| (key.to_string(), value.to_string()))
            .collect(),
        backing: None,
        backing_size: None,
        backing_identity: None,
    }
}

fn bytes_of(size: &str) -> u64 {
    let (number, unit) = match size.strip_suffix(|c: char| c.is_ascii_alphabetic()) {
        Some(number) => (number, &size[number.len()..]),
        None => (size, ""),
    };
    let bits = match unit {
        "M" => 20,
        "G" => 30,
        "T" => 40,
        "P" => 50,
        _ => 0,
    };
    number.parse::<u64>().unwrap() << bits
}

fn plan(session: &mut Session, create: Create) -> Result<PlanReply, Failure> {
    match session.call(create_request(create))? {
        Reply::Plan(reply) => Ok(reply),
        other => panic!("not an answer to Create: {other:?}"),
    }
}

/// The words of `Formatting 'name', fmt=qcow2 ...`.
fn printed(reply: &PlanReply) -> String {
    let words = reply
        .options
        .iter()
        .map(|(key, value)| format!(" {key}={value}"));
    words.collect()
}

/// The new image, whose plan's only commit is its last step.
fn made(create: Create) -> (Session, PlanReply) {
    let mut session = Session::default();
    let reply = plan(&mut session, create).unwrap();
    let (last, earlier) = reply.plan.stages.split_last().unwrap();
    assert_eq!(last.purpose, Purpose::Commit);
    assert!(
        earlier
            .iter()
            .all(|stage| stage.purpose == Purpose::Prepare)
    );
    assert!(
        matches!(&last.steps[..], [Step::Write { offset: 0, data, .. }] if data.len() <= 512),
        "the commit is one write to the first sector"
    );
    session.host.apply(&reply.plan);
    (session, reply)
}

fn option_words(options: &str) -> String {
    match options {
        "" => String::new(),
        options => format!("-o {options}"),
    }
}

fn equals_qemu(size: &str, options: &str) {
    let lab = Lab::new();
    let words = option_words(options);
    let said = lab.qemu_img(&format!("create -f qcow2 {words} disk.qcow2 {size}"));
    let (session, reply) = made(request(bytes_of(size), options));
    assert_eq!(
        format!("Formatting 'disk.qcow2', fmt=qcow2{}", printed(&reply)),
        said.trim_end()
    );
    let expected = lab.bytes("disk.qcow2");
    assert_eq!(session.host.image.len(), expected.len());
    let differs = session
        .host
        .image
        .iter()
        .zip(&expected)
        .position(|(a, b)| a != b);
    assert_eq!(differs, None, "first byte that differs");
    let data = lab.path("data");
    let theirs = data.exists().then(|| lab.bytes("data"));
    assert!(session.host.data() == theirs.as_ref(), "the data file");
    let plain = NewName::Plain("data".to_string());
    let names = theirs.map(|_| (FileNo::DATA, plain));
    assert_eq!(session.host.names, names.into_iter().collect::<Vec<_>>());
}

fn backing_equals_qemu() {
    for (options, name) in [
        ("compat=1.1", "base.raw".to_string()),
        ("compat=0.10", "base.raw".to_string()),
        ("cluster_size=512", "base.raw".to_string()),
        ("extended_l2=on", "b".repeat(200)),
        ("cluster_size=512", "b".repeat(200)),
    ] {
        let lab = Lab::new();
        lab.qemu_img(&format!("create -q -f raw {name} 5M"));
        let said = lab.qemu_img(&format!(
            "create -f qcow2 -o {options} -b {name} -F raw disk.qcow2"
        ));
        let mut create = request(5 << 20, options);
        create.backing = Some(NamedFile {
            name,
            format: Some("raw".to_string()),
        });
        create.backing_size = Some(5 << 20);
        let (session, reply) = made(create);
        assert_eq!(
            format!("Formatting 'disk.qcow2', fmt=qcow2{}", printed(&reply)),
            said.trim_end()
        );
        assert!(session.host.image == lab.bytes("disk.qcow2"), "{options}");
    }
}

fn is_sound(size: &str, options: &str) {
    let lab = Lab::new();
    let bytes = bytes_of(size);
    let (session, _) = made(request(bytes, options));
    lab.write("disk.qcow2", &session.host.image);
    lab.qemu_img("check -f qcow2 disk.qcow2");
    lab.qemu_img(&format!("create -q -f raw zero.raw {size}"));
    lab.qemu_img("compare -f qcow2 -F raw disk.qcow2 zero.raw");
    if options.contains("preallocation") {
        let words = option_words(options);
        lab.qemu_img(&format!("create -q -f qcow2 {words} theirs.qcow2 {size}"));
        let theirs = lab.bytes("theirs.qcow2").len();
        assert!(session.host.image.len() <= theirs, "no longer than theirs");
        let map = lab.json("map -f qcow2 --output=json disk.qcow2");
        let allocated = |extent: &serde_json::Value| extent["offset"].is_u64();
        assert!(map.as_array().unwrap().iter().all(allocated), "{map}");
    }
}

fn refuses(size: &str, options: &str) {
    let lab = Lab::new();
    let words = option_words(options);
    let said = lab.failing(
        "qemu-img",
        &format!("create -q -f qcow2 {words} disk.qcow2 {size}"),
    );
    let refusal = plan(&mut Session::default(), request(bytes_of(size), options)).unwrap_err();
    assert_eq!(
        format!("qemu-img: disk.qcow2: {}", refusal.message),
        said.trim_end()
    );
}

fn raw() {
    let raw = |options| Create {
        format: Format::Raw,
        ..request(3 << 20, options)
    };
    let mut session = Session::default();
    let reply = plan(&mut session, raw("preallocation=falloc")).unwrap();
    assert_eq!(printed(&reply), " size=3145728 preallocation=falloc");
    session.host.apply(&reply.plan);
    assert!(session.host.image == vec![0; 3 << 20]);
    let refusal = plan(&mut session, raw("preallocation=metadata")).unwrap_err();
    assert_eq!(refusal.message, "Unsupported preallocation mode: metadata");
    let refusal = plan(&mut session, raw("cluster_size=4k")).unwrap_err();
    assert_eq!(refusal.kind, FailureKind::InvalidRequest);
    assert_eq!(refusal.message, "Invalid parameter 'cluster_size'");
}
