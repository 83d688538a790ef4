//! VMDK: checked in qemu-img's words, redundant tables repaired.

use crate::lab::{Check, Lab};
use crate::vmdk_lab::{DISK, content, make, opened, store};
use instar_guest::findings::{Finding, Repair, Report, Severity};
use instar_guest::proto::PlanReply;
use instar_guest::testing::Session;
use instar_guest::{Failure, FailureKind, Reply, Request};

const M: u64 = 1 << 20;

/// All checks by name.
pub fn trials() -> Vec<(String, Check)> {
    let mut all: Vec<(String, Check)> = Vec::new();
    for options in [
        "monolithicSparse",
        "monolithicSparse,zeroed_grain=on",
        "monolithicFlat",
        "twoGbMaxExtentSparse",
        "twoGbMaxExtentFlat",
    ] {
        all.push((
            format!("vmdk::finds_nothing_wrong::{options}"),
            Box::new(move || sound(options)),
        ));
    }
    all.extend([
        (
            "vmdk::finds_what_qemu_img_finds".to_string(),
            Box::new(after_end) as Check,
        ),
        (
            "vmdk::repairs_entries_from_their_copies".to_string(),
            Box::new(repaired),
        ),
        (
            "vmdk::warns_of_what_qemu_img_does_not_see".to_string(),
            Box::new(warnings),
        ),
    ]);
    all
}

fn check(session: &mut Session, repair: Option<Repair>) -> Result<(Report, PlanReply), Failure> {
    session.host.findings.clear();
    match session.call(Request::Check { repair })? {
        Reply::Checked { report, repair } => Ok((report, repair)),
        other => panic!("not an answer to Check: {other:?}"),
    }
}

fn sound(options: &str) {
    let lab = Lab::new();
    make(&lab, options, 40 * M + 512);
    lab.qemu_img(&format!("check -q -f vmdk {DISK}"));
    let (mut session, _) = opened(&lab);
    let (report, reply) = check(&mut session, Some(Repair::All)).unwrap();
    assert_eq!(session.host.findings, []);
    assert_eq!(report, Report::default());
    assert!(reply.plan.is_empty());
}

/// Host offset of the first entry of the table that a directory leads to.
fn table(image: &[u8], field: usize) -> usize {
    let number = |at: usize| u32::from_le_bytes(image[at..at + 4].try_into().unwrap()) as usize;
    number(number(field) * 512) * 512
}

const REDUNDANT: usize = 48;
const DIRECTORY: usize = 56;

/// Entries of grains 3 and 100 lead behind the end.
fn after_end() {
    let lab = Lab::new();
    make(&lab, "monolithicSparse", 40 * M);
    let mut image = lab.bytes(DISK);
    for field in [REDUNDANT, DIRECTORY] {
        let at = table(&image, field);
        for grain in [3, 100] {
            image[at + 4 * grain..at + 4 * grain + 4].copy_from_slice(&[0, 0, 0, 0x10]);
        }
    }
    lab.write(DISK, &image);
    let said = lab.failing("qemu-img", &format!("check -f vmdk {DISK}"));
    let (mut session, _) = opened(&lab);
    let failure = check(&mut session, None).unwrap_err();
    assert_eq!(failure.kind, FailureKind::Damaged);
    let found = &session.host.findings;
    let texts: Vec<&str> = found.iter().map(|found| found.text.as_str()).collect();
    assert_eq!(
        texts,
        [
            "ERROR: cluster offset for sector 384 points after EOF",
            "ERROR: cluster offset for sector 12800 points after EOF",
        ]
    );
    // qemu-img stops with the first.
    assert_eq!(
        said,
        format!("{}\nqemu-img: {}\n", texts[0], failure.message)
    );
    let (report, reply) = check(&mut session, Some(Repair::All)).unwrap();
    assert_eq!((report.corruptions, report.corruptions_fixed), (2, 0));
    assert!(reply.plan.is_empty());
    assert!(session.host.image == image);
}

/// An entry that leads nowhere, and redundant ones that were not written.
fn repaired() {
    let lab = Lab::new();
    make(&lab, "monolithicSparse", 40 * M);
    let before = content(&lab);
    let sound = lab.bytes(DISK);
    let mut image = sound.clone();
    let (first, second) = (table(&image, DIRECTORY), table(&image, REDUNDANT));
    let used: Vec<usize> = (0..512)
        .filter(|grain| image[first + 4 * grain..first + 4 * grain + 4] != [0; 4])
        .collect();
    let [one, two, .., three] = used[..] else {
        panic!("the image holds data");
    };
    image[first + 4 * one + 3] = 0x10;
    image[second + 4 * two..second + 4 * two + 4].fill(0);
    image[second + 4 * three + 3] = 0x10;
    lab.write(DISK, &image);
    lab.failing("qemu-img", &format!("check -f vmdk {DISK}"));
    let (mut session, _) = opened(&lab);
    let (report, reply) = check(&mut session, Some(Repair::All)).unwrap();
    assert_eq!((report.corruptions, report.corruptions_fixed), (0, 1));
    let is_told = |found: &Finding| found.severity == Severity::Repaired;
    assert!(session.host.findings.iter().all(is_told));
    session.host.apply(&reply.plan);
    assert!(session.host.image == sound);
    store(&lab, &session.host, &[]);
    lab.qemu_img(&format!("check -q -f vmdk {DISK}"));
    assert!(content(&lab) == before);
}

fn warnings() {
    let lab = Lab::new();
    make(&lab, "monolithicSparse", 40 * M);
    let mut image = lab.bytes(DISK);
    let (first, second) = (table(&image, DIRECTORY), table(&image, REDUNDANT));
    let used = |grain: &usize| image[first + 4 * grain..first + 4 * grain + 4] != [0; 4];
    let used = (0..512).find(used).expect("the image holds data");
    // A redundant entry is missing; the file goes on; nobody closed it.
    image[second + 4 * used..second + 4 * used + 4].fill(0);
    image[72] = 1;
    let len = image.len() + (128 << 10);
    image.resize(len, 0xee);
    lab.write(DISK, &image);
    lab.qemu_img(&format!("check -q -f vmdk {DISK}"));
    let (mut session, _) = opened(&lab);
    let (report, _) = check(&mut session, None).unwrap();
    assert_eq!(report, Report::default());
    let found = session.host.findings.iter();
    let texts: Vec<&str> = found
        .map(|found| {
            assert_eq!(found.severity, Severity::Warning);
            found.text.as_str()
        })
        .collect();
    assert_eq!(
        texts,
        [
            "grain table 0 differs from its redundant copy in 1 entries",
            "the extent was not closed in order",
            "131072 bytes behind the last grain are not used",
        ]
    );
}
