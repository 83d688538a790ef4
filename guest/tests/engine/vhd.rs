//! Reading VHD images as qemu reads them, and changing their size.

use crate::lab::{Check, Lab};
use crate::vhd_lab::{G, K, M, opened, qemu_io, qemu_reads, sample, scatter, specification_reads};
use instar_guest::plan::Purpose;
use instar_guest::proto::{PlanReply, Preallocation};
use instar_guest::testing::Session;
use instar_guest::{ExtentKind, Failure, Format, Reply, Request, Step};

/// All checks by name.
pub fn trials() -> Vec<(String, Check)> {
    let resize = resizes().into_iter().map(|case| {
        let name = format!("vhd_resizes::{}", case.name());
        (name, Box::new(move || check(&case)) as Check)
    });
    let facts = FACTS.iter().map(|&(size, options)| {
        let name = format!("vhd_says_what_qemu_img_says::{size}_{options}");
        (name, Box::new(move || facts_of(size, options)) as Check)
    });
    let samples = SAMPLES.iter().map(|&(image, new)| {
        let name = format!("vhd_grows_what_others_made::{image}_{new}");
        (name, Box::new(move || grow_sample(image, new)) as Check)
    });
    resize.chain(facts).chain(samples).collect()
}

/// Images whose facts and mapping are compared.
const FACTS: &[(u64, &str)] = &[
    (M, ""),
    (20 * M, ""),
    (20 * M, "force_size=on"),
    (20 * M, "subformat=fixed"),
    (64 * M, ""),
];

fn facts_of(size: u64, options: &str) {
    let lab = Lab::new();
    let option = if options.is_empty() { "" } else { "-o" };
    lab.qemu_img(&format!(
        "create -q -f vpc {option} {options} disk.vhd {size}"
    ));
    qemu_io(&lab, &scatter(size, 10, 7));
    let mut session = opened(lab.bytes("disk.vhd"));
    let facts = session.open(None).unwrap();
    assert_eq!(facts.format, Format::Vhd);
    let info = lab.json("info -f vpc --output=json disk.vhd");
    assert_eq!(facts.virtual_size, info["virtual-size"]);
    assert_eq!(facts.cluster_size, info["cluster-size"].as_u64());
    assert_eq!(facts.unsettled, None);
    assert!(facts.specific.is_empty() && info["format-specific"].is_null());
    let content = session.read(0, facts.virtual_size).unwrap();
    assert!(content == qemu_reads(&lab, &session.host.image));
    if facts.cluster_size.is_some() {
        compare_map(&lab, &mut session, facts.virtual_size);
    }
}

fn compare_map(lab: &Lab, session: &mut Session, size: u64) {
    let theirs = lab.json("map -f vpc --output=json disk.vhd");
    let theirs: Vec<_> = theirs
        .as_array()
        .unwrap()
        .iter()
        .map(|extent| (extent["start"].as_u64().unwrap(), extent["offset"].as_u64()))
        .collect();
    let ours: Vec<_> = session
        .map(0, size)
        .unwrap()
        .iter()
        .map(|extent| match extent.kind {
            ExtentKind::Data { at, .. } => (extent.offset, Some(at)),
            ExtentKind::Zero { at: None } => (extent.offset, None),
            other => panic!("{other:?} in a dynamic image"),
        })
        .collect();
    assert_eq!(ours, theirs);
}

/// A change of size.
struct Case {
    options: &'static str,
    old: u64,
    new: u64,
    /// How many writes fill the disk.
    writes: u64,
    preallocation: Preallocation,
    /// Most stages, and so barriers.
    stages: usize,
}

impl Case {
    fn name(&self) -> String {
        format!(
            "{}_{}_{}_{}_{:?}",
            self.options, self.old, self.new, self.writes, self.preallocation
        )
    }
}

fn resizes() -> Vec<Case> {
    use Preallocation::{Falloc, Full, Metadata, Off};
    let case = |options, old, new, writes, preallocation, stages| Case {
        options,
        old,
        new,
        writes,
        preallocation,
        stages,
    };
    const FIXED: &str = "subformat=fixed,force_size=on";
    const EXACT: &str = "force_size=on";
    const ROUNDED: &str = "subformat=dynamic";
    vec![
        // In the table's last sector, past it, far past it.
        case(EXACT, 8 * M, 20 * M, 6, Off, 5),
        case(EXACT, 8 * M, 20 * M, 0, Off, 5),
        case(EXACT, 5 * M + 512, 20 * M, 6, Off, 5),
        case(EXACT, 8 * M, 260 * M, 6, Off, 7),
        case(EXACT, 8 * M, 270 * M, 0, Off, 7),
        case(EXACT, 5 * M + 512, 600 * M, 9, Off, 7),
        case(EXACT, 0, 3 * M, 0, Off, 7),
        case(ROUNDED, 8 * M, 20 * M, 6, Off, 5),
        case(ROUNDED, 64 * M, 270 * M, 20, Off, 7),
        // Within one block.
        case(EXACT, 5 * M, 5 * M + 512, 6, Off, 3),
        // Preallocation: within the table, past it.
        case(EXACT, 5 * M + 512, 20 * M, 6, Metadata, 6),
        case(EXACT, 5 * M + 512, 20 * M, 0, Metadata, 6),
        case(EXACT, 5 * M, 20 * M, 6, Falloc, 6),
        case(EXACT, 5 * M, 20 * M, 6, Full, 7),
        case(EXACT, 5 * M, 260 * M, 6, Metadata, 7),
        case(EXACT, 5 * M, 260 * M, 0, Falloc, 7),
        case(FIXED, 4 * M, 9 * M, 6, Off, 3),
        case(FIXED, 4 * M, 4 * M + 512, 6, Off, 3),
        case(FIXED, 4 * M, 9 * M, 6, Falloc, 3),
        case(FIXED, 4 * M, 9 * M, 6, Metadata, 3),
        case(FIXED, 4 * M, 9 * M, 6, Full, 3),
        case("subformat=fixed", 4 * M, 9 * M, 6, Off, 3),
        case("subformat=fixed", 0, 9 * M, 0, Off, 3),
        // Smaller.
        case(FIXED, 9 * M, 5 * M, 9, Off, 3),
        case(EXACT, 20 * M, 9 * M, 20, Off, 7),
        case(EXACT, 20 * M, 9 * M, 4, Off, 7),
        case(EXACT, 20 * M, 9 * M, 0, Off, 7),
        case(EXACT, 64 * M, 16 * M + 512, 40, Off, 7),
        case(EXACT, 20 * M, 512, 20, Off, 7),
        case(ROUNDED, 264 * M, 64 * M, 60, Off, 7),
        case(EXACT, 5 * M + 1024, 5 * M + 512, 6, Off, 7),
    ]
}

fn resize(session: &mut Session, case: &Case) -> Result<PlanReply, Failure> {
    let request = Request::Resize {
        size: case.new,
        preallocation: case.preallocation,
        shrink: true,
        backing_size: None,
    };
    match session.call(request)? {
        Reply::Plan(reply) => Ok(reply),
        other => panic!("not an answer to Resize: {other:?}"),
    }
}

fn check(case: &Case) {
    let lab = Lab::new();
    lab.qemu_img(&format!(
        "create -q -f vpc -o {} disk.vhd {}",
        case.options, case.old
    ));
    if case.writes > 0 {
        qemu_io(&lab, &scatter(case.old, case.writes, case.new + 3));
    }
    let image = lab.bytes("disk.vhd");
    let mut expected = match case.old {
        0 => Vec::new(),
        _ => qemu_reads(&lab, &image),
    };
    expected.resize(case.new as usize, 0);
    let mut session = opened(image.clone());
    let reply = resize(&mut session, case).expect("a plan");
    check_shape(&reply, case);
    session.host.apply(&reply.plan);
    let image = session.host.image.clone();
    let facts = session.open(None).expect("the image opens");
    assert_eq!(facts.virtual_size, case.new);
    assert_eq!(facts.unsettled, None);
    assert!(session.read(0, case.new).unwrap() == expected, "instar");
    assert!(specification_reads(&image) == expected, "specification");
    if case.new > 0 {
        assert!(qemu_reads(&lab, &image) == expected, "qemu");
        check_use(&lab, &image, case.new);
    }
    check_length(&mut session, case, &image);
    if case.preallocation == Preallocation::Off {
        assert!(resize(&mut session, case).unwrap().plan.is_empty(), "again");
    }
}

/// A commit at the footers, and no more barriers than needed.
fn check_shape(reply: &PlanReply, case: &Case) {
    let stages = &reply.plan.stages;
    let purposes: Vec<_> = stages.iter().map(|stage| stage.purpose).collect();
    assert!(stages.len() <= case.stages, "{purposes:?}");
    let commits = stages
        .iter()
        .filter(|stage| stage.purpose == Purpose::Commit);
    let commits: Vec<_> = commits.flat_map(|stage| &stage.steps).collect();
    let places: Vec<u64> = commits
        .iter()
        .map(|step| match step {
            Step::Write { offset, data, .. } => {
                assert!(offset.is_multiple_of(512) && data.len() == 512);
                *offset
            }
            step => panic!("a commit of {step:?}"),
        })
        .collect();
    match case.options.contains("fixed") {
        true => assert_eq!(places.len(), 1),
        false => assert!(places.len() == 2 && places[0] == 0),
    }
}

/// The file is as long as the disk needs.
fn check_length(session: &mut Session, case: &Case, image: &[u8]) {
    let facts = session.open(None).unwrap();
    let Some(block) = facts.cluster_size else {
        assert_eq!(image.len() as u64, case.new + 512);
        return;
    };
    let extents = session.map(0, case.new).unwrap();
    let ends = extents.iter().filter_map(|extent| match extent.kind {
        ExtentKind::Data { at, .. } => Some(at + extent.len.next_multiple_of(block)),
        _ => None,
    });
    let data: u64 = extents
        .iter()
        .filter(|extent| matches!(extent.kind, ExtentKind::Data { .. }))
        .map(|extent| extent.len.div_ceil(block) * (block + 512))
        .sum();
    let end = ends.max().unwrap_or(0);
    let len = image.len() as u64;
    assert!(
        end == 0 || len == end + 512,
        "{len} bytes, data up to {end}"
    );
    let table = case.new.max(case.old).div_ceil(block) * 4;
    let front = 1536 + table.next_multiple_of(512);
    if case.new < case.old {
        assert!(len <= front + data + 512, "{len} bytes for {data} of data");
    } else {
        assert!(
            len <= front + data + 512 + block,
            "{len} bytes for {data} of data"
        );
    }
}

/// qemu writes to the image and reads it back.
fn check_use(lab: &Lab, image: &[u8], size: u64) {
    lab.write("disk.vhd", image);
    let at = size - 512;
    let middle = size / 1024 * 512;
    qemu_io(
        lab,
        &[
            format!("write -P 0x7e {at} 512"),
            format!("write -P 0x7f {} 512", middle.min(at)),
            format!("read -P 0x7f {} 512", middle.min(at)),
        ],
    );
    let image = lab.bytes("disk.vhd");
    assert!(qemu_reads(lab, &image) == specification_reads(&image));
}

/// Images of other programs, and sizes that they get.
const SAMPLES: &[(&str, u64)] = &[
    ("hyperv2012r2-dynamic.vhd", 200 * G),
    ("hyperv2012r2-dynamic.vhd", 2040 * G),
    ("virtualpc-dynamic.vhd", 127 * G + 512 * K),
    ("virtualpc-dynamic.vhd", 200 * G),
];

fn grow_sample(name: &str, new: u64) {
    let lab = Lab::new();
    let mut session = opened(sample(&lab, name));
    let facts = session.open(None).unwrap();
    let info = lab.json(&format!("info -f vpc --output=json {name}"));
    assert_eq!(facts.virtual_size, info["virtual-size"]);
    assert_eq!(facts.cluster_size, info["cluster-size"].as_u64());
    let request = Request::Resize {
        size: new,
        preallocation: Preallocation::Off,
        shrink: false,
        backing_size: None,
    };
    let Reply::Plan(reply) = session.call(request).unwrap() else {
        panic!("not an answer to Resize");
    };
    session.host.apply(&reply.plan);
    assert_eq!(session.open(None).unwrap().virtual_size, new);
    lab.write("disk.vhd", &session.host.image);
    let info = lab.json("info -f vpc --output=json disk.vhd");
    assert_eq!(info["virtual-size"], new);
    let end = new - 512;
    qemu_io(
        &lab,
        &[
            "write -P 1 0 512".to_string(),
            format!("write -P 2 {end} 512"),
            format!("read -P 2 {end} 512"),
            "read -P 1 0 512".to_string(),
        ],
    );
}
