//! VMDK: larger and smaller, with the old content, then zeroes, and nothing
//! that qemu-img finds wrong.

use crate::lab::{Check, Lab};
use crate::vmdk_lab::{DISK, content, make, opened, plan, qemu_io, resize, scattered, store};
use instar_guest::findings::Finding;
use instar_guest::plan::{NewName, Plan, Purpose};
use instar_guest::proto::Preallocation::{self, Falloc, Full, Metadata, Off};
use instar_guest::testing::{FRESH, MemHost, Session};
use instar_guest::{Engine, Failure, FailureKind, Host, Read, Reply, Request, Step};

const M: u64 = 1 << 20;

/// All checks by name.
pub fn trials() -> Vec<(String, Check)> {
    let mut all: Vec<(String, Check)> = Vec::new();
    for &(options, old, new, preallocation) in CASES {
        all.push((
            format!("vmdk::resizes::{options}_{old}_to_{new}_{preallocation:?}"),
            Box::new(move || resizes(options, old, new, preallocation)),
        ));
    }
    all.extend([
        (
            "vmdk::refuses_to_resize".to_string(),
            Box::new(refusals) as Check,
        ),
        (
            "vmdk::streams_tables_of_a_large_disk".to_string(),
            Box::new(large),
        ),
        (
            "vmdk::a_shrunk_file_is_no_longer_than_a_new_one".to_string(),
            Box::new(shrunk_file),
        ),
        (
            "vmdk::keeps_what_it_does_not_know_of_a_descriptor".to_string(),
            Box::new(foreign_descriptor),
        ),
    ]);
    all
}

const SPARSE: &str = "monolithicSparse";
const ZEROED: &str = "monolithicSparse,zeroed_grain=on";
const FLAT: &str = "monolithicFlat";
const SPLIT: &str = "twoGbMaxExtentSparse";
const SPLIT_ZEROED: &str = "twoGbMaxExtentSparse,zeroed_grain=on";
const SPLIT_FLAT: &str = "twoGbMaxExtentFlat";
const PIECES: &str = "extents of 5 MiB, sparse";
const PIECES_FLAT: &str = "extents of 5 MiB, flat";
const TWO_G: u64 = 2 << 30;

/// Options, old size, new size, preallocation.
const CASES: &[(&str, u64, u64, Preallocation)] = &[
    (SPARSE, 20 * M, 21 * M, Off),
    (SPARSE, 20 * M, 20 * M, Off),
    (SPARSE, 20 * M, 900 * M, Off),
    (SPARSE, 20 * M + 7 * 512, 40 * M, Off),
    (SPARSE, 20 * M + 7 * 512, 600 * M + 512, Off),
    (SPARSE, 20 * M + 7 * 512, 40 * M, Metadata),
    (SPARSE, 20 * M, 300 * M, Metadata),
    (SPARSE, 20 * M, 60 * M, Falloc),
    (SPARSE, 20 * M + 512, 60 * M + 512, Full),
    (SPARSE, 400 * M, 60 * M, Off),
    (SPARSE, 400 * M, 60 * M + 5 * 512, Off),
    (SPARSE, 20 * M, 512, Off),
    (ZEROED, 20 * M, 300 * M, Falloc),
    (ZEROED, 100 * M, 10 * M, Off),
    (FLAT, 20 * M, 30 * M, Off),
    (FLAT, 20 * M, 30 * M, Full),
    (FLAT, 20 * M, 10 * M + 512, Off),
    (SPLIT_FLAT, 20 * M, 40 * M, Falloc),
    (PIECES_FLAT, 15 * M, 22 * M, Off),
    (PIECES_FLAT, 13 * M, 22 * M, Full),
    (PIECES_FLAT, 15 * M, 5 * M + 512, Off),
    (PIECES_FLAT, 15 * M, 10 * M, Off),
    (SPLIT, 20 * M, 40 * M, Off),
    (SPLIT, 20 * M, 20 * M + TWO_G + 5 * M, Off),
    (PIECES, 15 * M, 21 * M, Off),
    (PIECES, 15 * M, 5 * M, Off),
    (PIECES, 15 * M, 7 * M, Off),
    (PIECES, 15 * M, 3 * M + 5 * 512, Off),
    (PIECES, 13 * M, 22 * M, Metadata),
    (PIECES, 15 * M, 27 * M, Falloc),
    (PIECES, 15 * M, 22 * M + 512, Full),
    (SPLIT, 20 * M, 10 * M + 512, Off),
    (SPLIT, 20 * M, 512, Off),
    (SPLIT, 20 * M, 21 * M, Metadata),
    (SPLIT_ZEROED, 20 * M, 7 * M, Off),
    (SPLIT_ZEROED, 20 * M, 25 * M, Falloc),
];

/// Commits are alone in their stages, and atomic.
fn check_shape(plan: &Plan) {
    let commits = plan
        .stages
        .iter()
        .filter(|stage| stage.purpose == Purpose::Commit);
    for commit in commits {
        match &commit.steps[..] {
            [Step::Write { offset, data, .. }] => {
                assert!(offset % 512 + data.len() as u64 <= 512);
            }
            [Step::SetLength { .. } | Step::Rename { .. }] => {}
            steps => panic!("not a commit: {steps:?}"),
        }
    }
}

/// What the disk shows as a hash, as large disks are mostly empty.
fn expected(lab: &Lab, old: u64, new: u64) {
    lab.qemu_img(&format!("convert -f vmdk -O raw {DISK} expected.raw"));
    let verb = if new < old { "--shrink" } else { "-q" };
    lab.qemu_img(&format!("resize -f raw {verb} expected.raw {new}"));
}

/// The names of the files that the host numbers.
fn names(session: &Session, mut named: Vec<String>) -> Vec<String> {
    for (_, name) in &session.host.names {
        named.push(match name {
            NewName::Plain(name) => name.clone(),
            NewName::Replacement => format!("{DISK}.instar-new"),
        });
    }
    named
}

/// A split image whose extents have 5 MiB, the last one perhaps less.
fn pieces(lab: &Lab, flat: bool, size: u64) {
    let mut lines = String::new();
    for nth in 0..size.div_ceil(5 * M) {
        let len = (size - nth * 5 * M).min(5 * M);
        let letter = if flat { 'f' } else { 's' };
        let name = format!("disk-{letter}{:03}.vmdk", nth + 1);
        let kind = match flat {
            true => {
                lab.write(&name, &vec![0; len as usize]);
                "FLAT"
            }
            false => {
                lab.qemu_img(&format!("create -q -f vmdk {name} {len}"));
                "SPARSE"
            }
        };
        let offset = if flat { " 0" } else { "" };
        lines += &format!("RW {} {kind} \"{name}\"{offset}\n", len / 512);
    }
    let create_type = if flat { SPLIT_FLAT } else { SPLIT };
    let text = format!(
        "# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\n\
         createType=\"{create_type}\"\n\n# Extent description\n{lines}"
    );
    lab.write(DISK, text.as_bytes());
    qemu_io(lab, &scattered(size, 40, 7));
}

fn resizes(options: &str, old: u64, new: u64, preallocation: Preallocation) {
    let lab = Lab::new();
    match options {
        PIECES | PIECES_FLAT => pieces(&lab, options == PIECES_FLAT, old),
        _ => make(&lab, options, old),
    }
    expected(&lab, old, new);
    let (mut session, facts) = opened(&lab);
    assert_eq!(facts.no_resize, None);
    let reply = plan(&mut session, resize(new, preallocation, true)).expect("a plan");
    check_shape(&reply.plan);
    assert_eq!(reply.plan.is_empty(), old == new, "{:?}", reply.plan);
    session.host.apply(&reply.plan);
    let named = facts.files.into_iter().map(|file| file.name).collect();
    store(&lab, &session.host, &names(&session, named));
    let (mut session, facts) = opened(&lab);
    assert_eq!((facts.virtual_size, facts.unsettled), (new, None));
    lab.qemu_img(&format!("check -q -f vmdk {DISK}"));
    assert_eq!(
        lab.json(&format!("info -f vmdk --output=json {DISK}"))["virtual-size"],
        new
    );
    lab.qemu_img(&format!("compare -f vmdk -F raw {DISK} expected.raw"));
    match preallocation {
        Off => {
            let again = plan(&mut session, resize(new, Off, true)).expect("a plan");
            assert!(again.plan.is_empty(), "{:?}", again.plan);
        }
        _ => assert!(
            session
                .map(old, new - old)
                .unwrap()
                .iter()
                .all(|extent| matches!(extent.kind, instar_guest::ExtentKind::Data { .. }))
        ),
    }
    // QEMU can go on with it.
    qemu_io(&lab, &[format!("write -P 0x7e {} 512", new - 512)]);
    lab.qemu_img(&format!("check -q -f vmdk {DISK}"));
}

fn refusals() {
    use FailureKind::{InvalidRequest, NotPermitted, TooLarge};
    let refused = |options: &str, size: u64, mode, shrink, kind, words: &str| {
        let lab = Lab::new();
        lab.qemu_img(&format!(
            "create -q -f vmdk -o subformat={options} {DISK} 64M"
        ));
        let (mut session, _) = opened(&lab);
        let before = session.host.clone();
        let failure = plan(&mut session, resize(size, mode, shrink)).unwrap_err();
        assert_eq!(failure.kind, kind, "{failure}");
        assert!(failure.message.contains(words), "{failure}");
        assert!(session.host.image == before.image && session.host.others == before.others);
    };
    let multiple = "The new size must be a multiple of 512";
    refused(SPARSE, 64 * M + 1, Off, false, InvalidRequest, multiple);
    let option = "Use the --shrink option to perform a shrink operation.";
    refused(SPARSE, 32 * M, Off, false, NotPermitted, option);
    refused(FLAT, 32 * M, Off, false, NotPermitted, option);
    let growing = "Preallocation can only be used for growing images";
    refused(SPARSE, 32 * M, Falloc, true, InvalidRequest, growing);
    let most = "a hosted sparse VMDK holds at most 2199023255552 bytes";
    refused(SPARSE, (2 << 40) + 512, Off, false, TooLarge, most);
    let fit = "do not fit";
    refused(SPARSE, 2 << 40, Metadata, false, TooLarge, fit);
    refused(SPARSE, 0, Off, true, InvalidRequest, "size 0");
    refused(FLAT, 1 << 63, Off, false, TooLarge, "a file cannot be");
    refused(
        SPLIT,
        9 << 40,
        Off,
        false,
        TooLarge,
        "more than 4096 extents",
    );
}

/// A host that takes note of what is streamed and performs none of it.
struct Noting {
    files: MemHost,
    streamed: Vec<Plan>,
}

impl Host for Noting {
    fn read(&mut self, reads: &mut [Read<'_>]) -> Result<(), Failure> {
        self.files.read(reads)
    }

    fn stream(&mut self, part: Plan) -> Result<(), Failure> {
        self.streamed.push(part);
        Ok(())
    }

    fn tell(&mut self, findings: Vec<Finding>) -> Result<(), Failure> {
        self.files.tell(findings)
    }
}

/// Tables that no plan could hold.
fn large() {
    let lab = Lab::new();
    make(&lab, SPARSE, 20 * M);
    let image = lab.bytes(DISK);
    let old_len = image.len() as u64;
    let mut host = Noting {
        files: MemHost::new(image),
        streamed: Vec::new(),
    };
    let mut engine = Engine::default();
    let open = Request::Open {
        format: None,
        file_len: old_len,
        write: true,
        fresh: FRESH,
    };
    engine.handle(&mut host, open).unwrap();
    let reply = engine.handle(&mut host, resize(200 << 30, Metadata, false));
    let Ok(Reply::Plan(reply)) = reply else {
        panic!("not a plan: {reply:?}");
    };
    check_shape(&reply.plan);
    let weight = |plan: &Plan| -> usize {
        let steps = plan.stages.iter().flat_map(|stage| &stage.steps);
        let bytes = steps.map(|step| match step {
            Step::Write { data, .. } => data.len() + 32,
            _ => 32,
        });
        bytes.sum()
    };
    assert!(weight(&reply.plan) < 7 << 20);
    assert!(host.streamed.len() > 5, "tables are streamed");
    assert!(host.streamed.iter().all(|part| weight(part) < 5 << 20));
    for stage in host.streamed.iter().flat_map(|plan| &plan.stages) {
        for step in &stage.steps {
            let at = match step {
                Step::Write { offset, .. } => *offset,
                Step::SetLength { len, .. } => *len,
                step => panic!("not past the end: {step:?}"),
            };
            assert!(at >= old_len, "{step:?} before {old_len}");
        }
    }
}

/// A disk that is written once and shrunk leaves no gap behind.
fn shrunk_file() {
    let lab = Lab::new();
    lab.qemu_img(&format!("create -q -f vmdk {DISK} 100M"));
    let back_to_front: Vec<String> = (0..50)
        .rev()
        .map(|nth| format!("write -P {} {nth}M 1M", nth + 1))
        .collect();
    qemu_io(&lab, &["write -P 99 60M 30M".to_string()]);
    qemu_io(&lab, &back_to_front);
    let (mut session, _) = opened(&lab);
    let reply = plan(&mut session, resize(50 * M, Off, true)).unwrap();
    session.host.apply(&reply.plan);
    store(&lab, &session.host, &[]);
    lab.qemu_img(&format!("check -q -f vmdk {DISK}"));
    let data = content(&lab);
    assert!((0..50).all(|nth| data[nth << 20..(nth + 1) << 20] == vec![nth as u8 + 1; 1 << 20]));
    let len = lab.bytes(DISK).len() as u64;
    assert_eq!(len, 50 * M + 64 * 1024);
}

/// A descriptor as other programs write it: other line ends, cases, unknown
/// lines, a long content ID.
fn foreign_descriptor() {
    let lab = Lab::new();
    lab.write("data-flat.vmdk", &[7; 1 << 20]);
    let text = "# Disk DescriptorFile\r\nversion=1\r\nencoding=\"windows-1252\"\r\nCID=0badcafe\r\n\
                parentCID=ffffffff\r\nisNativeSnapshot=\"no\"\r\ncreateType=\"vmfs\"\r\n\r\n\
                # Extent description\r\nRW 2048 VMFS \"data-flat.vmdk\"\r\n\r\n# mine: keep it\r\n\
                ddb.geometry.Cylinders = \"2\"\r\nddb.geometry.heads = \"16\"\r\n\
                ddb.geometry.sectors = \"63\"\r\nddb.longContentID = \
                \"00112233445566778899aabb0badcafe\"\r\nddb.uuid = \"60 00 C2 9d\"\r\n";
    lab.write(DISK, text.as_bytes());
    let (mut session, facts) = opened(&lab);
    assert_eq!(facts.virtual_size, M);
    let reply = plan(&mut session, resize(5 * M, Off, false)).unwrap();
    session.host.apply(&reply.plan);
    let new = String::from_utf8(session.host.image.clone()).unwrap();
    let cid = &new[new.find("CID=").unwrap() + 4..][..8];
    assert_ne!(cid, "0badcafe");
    let expected = text
        .replace("0badcafe", cid)
        .replace("RW 2048 ", "RW 10240 ")
        .replace("Cylinders = \"2\"", "Cylinders = \"10\"");
    assert_eq!(new, expected);
    store(&lab, &session.host, &["data-flat.vmdk".to_string()]);
    assert!(content(&lab)[..1 << 20] == [7; 1 << 20]);
}
