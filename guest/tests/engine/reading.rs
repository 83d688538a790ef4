//! Facts, map and content of images of every kind.

use crate::lab::{Check, Lab};
use instar_guest::facts::{Fact, FactValue};
use instar_guest::testing::Session;
use instar_guest::{Extent, ExtentKind, Facts, FailureKind, FileNo, Format};
use serde_json::{Map, Value, json};

/// An image to make: `qemu-img create` options, and what happens to it then.
struct Case {
    name: &'static str,
    options: &'static str,
    size: &'static str,
    then: fn(&Lab),
}

/// All checks by name.
pub fn trials() -> Vec<(String, Check)> {
    let read = cases().into_iter().map(|case| {
        let name = format!("reads_as_qemu_does::{}", case.name);
        (name, Box::new(move || check(&case)) as Check)
    });
    let encrypted = ENCRYPTED.iter().map(|&(name, options)| {
        let name = format!("facts_of_encrypted_images::{name}");
        (name, Box::new(move || check_encrypted(options)) as Check)
    });
    read.chain(encrypted).collect()
}

/// Small and large writes, aligned and not, zeroes and discards.
fn scribble(lab: &Lab) {
    lab.qemu_io(
        "disk.qcow2",
        &[
            "write -P 0x11 0 3M",
            "write -P 0x22 4097k 1k",
            "write -P 0x33 5000000 70000",
            "write -z 1M 512k",
            "write -z 6M 1M",
            "discard 2M 256k",
            "write -P 0x44 8191k 1k",
        ],
    );
}

fn nothing(_: &Lab) {}

/// The content of `disk.qcow2` compressed into an image of the same name.
fn compress(lab: &Lab, options: &str) {
    scribble(lab);
    lab.qemu_img("convert -O raw disk.qcow2 plain.raw");
    lab.qemu_img(&format!(
        "convert -c -O qcow2 -o {options} plain.raw disk.qcow2"
    ));
    lab.qemu_io("disk.qcow2", &["write -P 0x55 100k 10k"]);
}

fn snapshots(lab: &Lab) {
    scribble(lab);
    lab.qemu_img("snapshot -c first disk.qcow2");
    lab.qemu_io("disk.qcow2", &["write -P 0x66 64k 200k"]);
    lab.qemu_img("snapshot -c second disk.qcow2");
    lab.qemu_io("disk.qcow2", &["write -P 0x77 7M 100k"]);
}

fn bitmaps(lab: &Lab) {
    lab.qemu_img("bitmap --add disk.qcow2 on");
    lab.qemu_img("bitmap --add -g 4096 --disable disk.qcow2 off");
    scribble(lab);
}

fn with_base(lab: &Lab) {
    lab.qemu_img("create -q -f qcow2 base.qcow2 6M");
    lab.qemu_io("base.qcow2", &["write -P 0x99 1M 4M"]);
    lab.qemu_img("rebase -q -u -f qcow2 -F qcow2 -b base.qcow2 disk.qcow2");
    lab.qemu_io(
        "disk.qcow2",
        &[
            "write -P 0x88 2M 64k",
            "write -P 0x89 3333333 4444",
            "write -z 4M 128k",
        ],
    );
}

fn cases() -> Vec<Case> {
    fn case(name: &'static str, options: &'static str, size: &'static str, then: fn(&Lab)) -> Case {
        Case {
            name,
            options,
            size,
            then,
        }
    }
    vec![
        case("empty", "compat=1.1", "0", nothing),
        case("fresh", "compat=1.1", "8M", nothing),
        case("large_and_sparse", "compat=1.1", "1T", |lab| {
            lab.qemu_io("disk.qcow2", &["write -P 1 1023G 1M", "write -P 2 4G 1k"]);
        }),
        case("default", "compat=1.1", "8M", scribble),
        case("version_2", "compat=0.10", "8M", scribble),
        case("clusters_512", "cluster_size=512", "8M", scribble),
        case("clusters_4k", "cluster_size=4k", "8M", scribble),
        case("clusters_2m", "cluster_size=2M", "8M", scribble),
        case(
            "v2_clusters_512",
            "compat=0.10,cluster_size=512",
            "8M",
            scribble,
        ),
        case("odd_size", "cluster_size=4k", "8389120", scribble),
        case("refcount_bits_1", "refcount_bits=1", "8M", scribble),
        case("refcount_bits_2", "refcount_bits=2", "8M", scribble),
        case("refcount_bits_4", "refcount_bits=4", "8M", scribble),
        case("refcount_bits_8", "refcount_bits=8", "8M", scribble),
        case("refcount_bits_32", "refcount_bits=32", "8M", scribble),
        case("refcount_bits_64", "refcount_bits=64", "8M", scribble),
        case("lazy_refcounts", "lazy_refcounts=on", "8M", scribble),
        case(
            "extended_l2_16k",
            "extended_l2=on,cluster_size=16k",
            "8M",
            scribble,
        ),
        case("extended_l2_64k", "extended_l2=on", "8M", scribble),
        case(
            "extended_l2_2m",
            "extended_l2=on,cluster_size=2M",
            "8M",
            scribble,
        ),
        case(
            "preallocated_metadata",
            "preallocation=metadata",
            "8M",
            scribble,
        ),
        case(
            "preallocated_falloc",
            "preallocation=falloc",
            "8M",
            scribble,
        ),
        case(
            "preallocated_extended_l2",
            "preallocation=metadata,extended_l2=on",
            "8M",
            scribble,
        ),
        case("compressed_zlib", "compat=1.1", "8M", |lab| {
            compress(lab, "compat=1.1")
        }),
        case("compressed_v2", "compat=1.1", "8M", |lab| {
            compress(lab, "compat=0.10")
        }),
        case("compressed_512", "compat=1.1", "8M", |lab| {
            compress(lab, "cluster_size=512");
        }),
        case("compressed_2m", "compat=1.1", "8M", |lab| {
            compress(lab, "cluster_size=2M");
        }),
        case("compressed_extended_l2", "compat=1.1", "8M", |lab| {
            compress(lab, "extended_l2=on");
        }),
        case("compressed_zstd", "compat=1.1", "8M", |lab| {
            compress(lab, "compression_type=zstd");
        }),
        case("compressed_zstd_4k", "compat=1.1", "8M", |lab| {
            compress(lab, "compression_type=zstd,cluster_size=4k");
        }),
        case("compressed_zstd_2m", "compat=1.1", "8M", |lab| {
            compress(lab, "compression_type=zstd,cluster_size=2M");
        }),
        case("compressed_odd_size", "compat=1.1", "8389120", |lab| {
            compress(lab, "compat=1.1");
        }),
        case("snapshots", "compat=1.1", "8M", snapshots),
        case("snapshots_v2", "compat=0.10", "8M", snapshots),
        case("bitmaps", "compat=1.1", "8M", bitmaps),
        case("backing", "compat=1.1", "8M", with_base),
        case("backing_extended_l2", "extended_l2=on", "8M", with_base),
        case("data_file", "data_file=disk.data", "8M", scribble),
        case(
            "raw_data_file",
            "data_file=disk.data,data_file_raw=on",
            "8M",
            scribble,
        ),
    ]
}

fn check(case: &Case) {
    let lab = Lab::new();
    lab.qemu_img(&format!(
        "create -q -f qcow2 -o {} disk.qcow2 {}",
        case.options, case.size
    ));
    (case.then)(&lab);
    let mut session = session(&lab, "disk.qcow2");
    let facts = session.open(None).expect("the image opens");
    check_facts(&lab, &facts);
    check_map(&lab, &mut session, &facts);
    if facts.virtual_size <= 16 << 20 {
        check_content(&lab, &mut session, &facts);
    }
}

/// Encrypted images: facts work, reading is refused.
const ENCRYPTED: [(&str, &str); 4] = [
    ("aes", "encrypt.format=aes"),
    ("luks", "encrypt.format=luks,encrypt.iter-time=10"),
    (
        "luks_essiv",
        "encrypt.format=luks,encrypt.iter-time=10,encrypt.cipher-alg=serpent-256,\
         encrypt.cipher-mode=cbc,encrypt.ivgen-alg=essiv,encrypt.ivgen-hash-alg=sha256",
    ),
    (
        "luks_v2",
        "compat=0.10,encrypt.format=luks,encrypt.iter-time=10",
    ),
];

fn check_encrypted(options: &str) {
    let lab = Lab::new();
    let secret = "--object secret,id=key,data=geheim";
    lab.qemu_img(&format!(
        "create -q -f qcow2 {secret} -o {options},encrypt.key-secret=key disk.qcow2 8M"
    ));
    let mut session = session(&lab, "disk.qcow2");
    let facts = session.open(None).expect("the image opens");
    assert!(facts.encrypted);
    check_facts(&lab, &facts);
    for refusal in [facts.no_write.unwrap(), session.map(0, 512).unwrap_err()] {
        assert_eq!(refusal.kind, FailureKind::Unsupported);
        assert!(refusal.message.starts_with("the image is encrypted"));
    }
}

fn session(lab: &Lab, name: &str) -> Session {
    let mut session = Session::new(lab.bytes(name));
    let data = lab.path("disk.data");
    session.host.others = data
        .exists()
        .then(|| Some(lab.bytes("disk.data")))
        .into_iter()
        .collect();
    session
}

/// Facts against `qemu-img info`, the order of `format-specific` included.
fn check_facts(lab: &Lab, facts: &Facts) {
    let info = lab.json("info -f qcow2 --output=json disk.qcow2");
    assert_eq!(facts.format, Format::Qcow2);
    assert!(facts.probed);
    assert_eq!(json!(facts.virtual_size), info["virtual-size"]);
    assert_eq!(json!(facts.cluster_size), info["cluster-size"]);
    assert_eq!(
        json!(facts.backing.as_ref().map(|backing| backing.name())),
        info["backing-filename"]
    );
    assert_eq!(
        json!(facts.backing.as_ref().map(|backing| &backing.format)),
        info["backing-filename-format"]
    );
    let expected = &info["format-specific"]["data"];
    let found = tree(&mut facts.specific.iter().peekable(), 0);
    assert_eq!(
        serde_json::to_string_pretty(&found).unwrap(),
        serde_json::to_string_pretty(expected).unwrap()
    );
    check_snapshots(facts, &info["snapshots"]);
}

/// The flattened tree as JSON again.
fn tree<'a>(lines: &mut std::iter::Peekable<impl Iterator<Item = &'a Fact>>, depth: u8) -> Value {
    let mut object = Map::new();
    let mut list = Vec::new();
    while let Some(line) = lines.next_if(|line| line.depth == depth) {
        let value = match &line.value {
            FactValue::Bool(value) => json!(value),
            FactValue::Number(value) => json!(value),
            FactValue::Text(value) => json!(value),
            FactValue::Object => tree(lines, depth + 1),
            FactValue::List => match tree(lines, depth + 1) {
                Value::Object(_) => json!([]),
                list => list,
            },
        };
        if line.key.is_empty() {
            list.push(value);
        } else {
            object.insert(line.key.clone(), value);
        }
    }
    if list.is_empty() {
        Value::Object(object)
    } else {
        Value::Array(list)
    }
}

fn check_snapshots(facts: &Facts, expected: &Value) {
    let found: Vec<Value> = facts
        .snapshots
        .iter()
        .map(|snapshot| {
            json!({
                "icount": snapshot.icount,
                "vm-clock-nsec": snapshot.vm_clock_nsec % 1_000_000_000,
                "name": snapshot.name,
                "date-sec": snapshot.date_sec,
                "date-nsec": snapshot.date_nsec,
                "vm-clock-sec": snapshot.vm_clock_nsec / 1_000_000_000,
                "id": snapshot.id,
                "vm-state-size": snapshot.vm_state_size,
            })
        })
        .collect();
    let expected: Vec<Value> = expected
        .as_array()
        .into_iter()
        .flatten()
        .map(|snapshot| {
            let mut snapshot = snapshot.clone();
            if snapshot.get("icount").is_none() {
                snapshot["icount"] = Value::Null;
            }
            snapshot
        })
        .collect();
    assert_eq!(found, expected);
}

/// What `qemu-img map` says about a range, per byte range: what kind of extent
/// it is and where its data lies.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Piece {
    start: u64,
    len: u64,
    kind: Kind,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Kind {
    Data(u64),
    Zero(Option<u64>),
    Compressed,
    Absent,
}

impl Kind {
    fn of_extent(kind: ExtentKind) -> Self {
        match kind {
            ExtentKind::Data { at, .. } => Self::Data(at),
            ExtentKind::Zero { at } => Self::Zero(at),
            ExtentKind::Compressed => Self::Compressed,
            ExtentKind::Unallocated { .. } => Self::Absent,
        }
    }

    fn of_qemu(entry: &Value) -> Self {
        let is = |key: &str| entry[key].as_bool().unwrap();
        let here = entry["depth"] == 0 && is("present");
        match (here, is("compressed"), is("data"), is("zero")) {
            (false, ..) => Self::Absent,
            (true, true, ..) => Self::Compressed,
            (true, false, true, _) => Self::Data(entry["offset"].as_u64().unwrap()),
            (true, false, false, _) => Self::Zero(entry["offset"].as_u64()),
        }
    }

    /// The place of the byte `by` further on.
    fn advanced(&self, by: u64) -> Self {
        match self {
            Self::Data(at) => Self::Data(at + by),
            Self::Zero(Some(at)) => Self::Zero(Some(at + by)),
            other => other.clone(),
        }
    }
}

/// Neighbours that continue each other made one.
fn joined(pieces: impl IntoIterator<Item = Piece>) -> Vec<Piece> {
    let mut list: Vec<Piece> = Vec::new();
    for piece in pieces {
        match list.last_mut() {
            Some(last) if last.kind.advanced(last.len) == piece.kind => last.len += piece.len,
            _ => list.push(piece),
        }
    }
    list
}

fn check_map(lab: &Lab, session: &mut Session, facts: &Facts) {
    let extents = session
        .map(0, facts.virtual_size)
        .expect("the image can be mapped");
    for extent in &extents {
        if let ExtentKind::Data { file, at, .. } = extent.kind {
            let data_file = !facts.files.is_empty();
            assert_eq!(file == FileNo::DATA, data_file);
            assert!(!data_file || at == extent.offset);
        }
    }
    let found = joined(extents.iter().map(|&Extent { offset, len, kind }| Piece {
        start: offset,
        len,
        kind: Kind::of_extent(kind),
    }));
    let map = lab.json("map -f qcow2 --output=json disk.qcow2");
    let expected = map.as_array().unwrap().iter().map(|entry| Piece {
        start: entry["start"].as_u64().unwrap(),
        len: entry["length"].as_u64().unwrap(),
        kind: Kind::of_qemu(entry),
    });
    let expected = joined(expected.filter(|piece| piece.len > 0));
    assert_eq!(found, expected);
}

/// The content against `qemu-img convert`, the backing image beneath.
fn check_content(lab: &Lab, session: &mut Session, facts: &Facts) {
    lab.qemu_img("convert -f qcow2 -O raw disk.qcow2 expected.raw");
    let expected = lab.bytes("expected.raw");
    assert_eq!(expected.len() as u64, facts.virtual_size);
    let mut content = session
        .read(0, facts.virtual_size)
        .expect("a readable image");
    if let Some(backing) = &facts.backing {
        let mut base = self::session(lab, backing.name());
        let size = base.open(None).unwrap().virtual_size;
        let base = base.read(0, size).unwrap();
        for extent in session.map(0, facts.virtual_size).unwrap() {
            if matches!(extent.kind, ExtentKind::Unallocated { .. }) {
                let from = extent.offset.min(size) as usize;
                let to = (extent.offset + extent.len).min(size) as usize;
                content[from..to].copy_from_slice(&base[from..to]);
            }
        }
    }
    let differs = content.iter().zip(&expected).position(|(a, b)| a != b);
    assert_eq!(differs, None, "the content differs at this byte");
}
