//! Shrinking VHDX images, and replaying the log that a shrink leaves when it is
//! cut off, judged by qemu-img.

use crate::lab::{Check, Lab};
use crate::vhdx_lab::{G, M, assert_same, create, open, raw, resize, scatter, settle, write};
use instar_guest::plan::{Plan, Purpose};
use instar_guest::proto::Preallocation;
use instar_guest::testing::Session;
use instar_guest::{Failure, FailureKind, Format, Step};

/// All checks by name.
pub fn trials() -> Vec<(String, Check)> {
    let shrunk = CASES.iter().map(|&(name, options, old, new)| {
        let name = format!("vhdx_shrinks::{name}");
        (name, Box::new(move || shrinks(options, old, new)) as Check)
    });
    let one = |name: &str, check: fn()| (name.to_string(), Box::new(check) as Check);
    shrunk
        .chain([
            one("vhdx_shrink_cut_off_after_the_commit_is_replayed", cut_off),
            one(
                "vhdx_shrink_that_clears_much_of_the_table_fits_the_log",
                large,
            ),
            one("vhdx_shrink_moves_blocks_into_gaps", compacts),
            one("vhdx_refuses_to_shrink_without_the_option", refusals),
        ])
        .collect()
}

/// Name, options, old and new size.
const CASES: &[(&str, &str, u64, u64)] = &[
    ("through_data", "block_size=1M", 40 * M, 20 * M),
    ("inside_a_block", "block_size=1M", 40 * M, 40 * M - 512),
    (
        "to_an_odd_size",
        "block_size=2M",
        40 * M + 512,
        13 * M + 1024,
    ),
    ("to_one_sector", "block_size=1M", 40 * M, 512),
    (
        "fixed",
        "subformat=fixed,block_state_zero=off,block_size=1M",
        20 * M,
        7 * M + 512,
    ),
    ("fixed_of_qemu", "subformat=fixed", 40 * M, 10 * M),
    (
        "a_log_of_3_MiB",
        "log_size=3M,block_size=1M",
        30 * M,
        20 * M,
    ),
];

fn shrinks(options: &str, old: u64, new: u64) {
    let lab = Lab::new();
    create(&lab, options, old);
    scatter(&lab, old, 60, 11);
    lab.qemu_img("convert -f vhdx -O raw disk.vhdx old.raw");
    let mut session = open(&lab);
    let before = session.host.image.len();
    let reply = resize(&mut session, new, Preallocation::Off, true).unwrap();
    let commits = reply
        .plan
        .stages
        .iter()
        .filter(|stage| stage.purpose == Purpose::Commit);
    assert_eq!(commits.count(), 1);
    let uncut = session.host.image.clone();
    session.host.apply(&reply.plan);
    assert!(session.host.image.len() <= before);
    finish_each_interruption(&uncut, &reply.plan, new, session.host.image.len());
    let facts = session.open(None).unwrap();
    assert_eq!((facts.virtual_size, facts.unsettled), (new, None));
    lab.write("disk.vhdx", &session.host.image);
    lab.qemu_img("check -f vhdx disk.vhdx");
    let mut expected = lab.bytes("old.raw");
    expected.truncate(new as usize);
    assert_same(&raw(&lab), &expected, "content");
    assert_same(
        &session.read(0, new).unwrap(),
        &expected,
        "content read here",
    );
    // Nothing of what was cut off comes back.
    let reply = resize(&mut session, old, Preallocation::Off, false).unwrap();
    session.host.apply(&reply.plan);
    session.open(None).unwrap();
    lab.write("disk.vhdx", &session.host.image);
    lab.qemu_img("check -f vhdx disk.vhdx");
    expected.resize(old as usize, 0);
    assert_same(&raw(&lab), &expected, "content after growing back");
    write(&lab, &[format!("write -P 9 {} 512", old - 512)]);
}

/// Cut off after any stage behind the commit, the image is settled, and the same
/// request ends in a file of the same length with nothing left to do.
fn finish_each_interruption(uncut: &[u8], plan: &Plan, size: u64, len: usize) {
    let first = up_to_the_commit(plan).stages.len();
    for done in first..plan.stages.len() {
        let mut session = Session::new(uncut.to_vec());
        let stages = plan.stages[..done].to_vec();
        session.host.apply(&Plan { stages });
        if session.open(None).unwrap().unsettled.is_some() {
            let settled = settle(&mut session).unwrap();
            session.host.apply(&settled.plan);
            session.open(None).unwrap();
        }
        let before = session.read(0, size).unwrap();
        let rest = resize(&mut session, size, Preallocation::Off, true).unwrap();
        session.host.apply(&rest.plan);
        assert_eq!(session.host.image.len(), len, "after {done} stages");
        session.open(None).unwrap();
        assert_same(&session.read(0, size).unwrap(), &before, "finished content");
        let none = resize(&mut session, size, Preallocation::Off, true).unwrap();
        assert!(none.plan.is_empty(), "after {done} stages: {:?}", none.plan);
    }
}

/// Stages up to and with the one that commits.
fn up_to_the_commit(plan: &Plan) -> Plan {
    let commit = plan
        .stages
        .iter()
        .position(|stage| stage.purpose == Purpose::Commit);
    Plan {
        stages: plan.stages[..=commit.unwrap()].to_vec(),
    }
}

/// The log is read here without writing, written by a plan, and replayed by
/// QEMU: all three agree.
fn cut_off() {
    let (old, new) = (40 * M, 10 * M + 512);
    let lab = Lab::new();
    create(&lab, "block_size=1M", old);
    scatter(&lab, old, 60, 5);
    lab.qemu_img("convert -f vhdx -O raw disk.vhdx old.raw");
    let mut expected = lab.bytes("old.raw");
    expected.truncate(new as usize);
    let mut session = open(&lab);
    let reply = resize(&mut session, new, Preallocation::Off, true).unwrap();
    session.host.apply(&up_to_the_commit(&reply.plan));
    lab.write("disk.vhdx", &session.host.image);

    let facts = session.open(None).unwrap();
    assert_eq!(facts.virtual_size, new);
    assert_eq!(
        facts.unsettled.as_deref(),
        Some("its log has to be replayed")
    );
    assert_same(
        &session.read(0, new).unwrap(),
        &expected,
        "content under the log",
    );
    let refused = resize(&mut session, old, Preallocation::Off, false).unwrap_err();
    assert_eq!(refused.kind, FailureKind::InvalidRequest);
    let refused = lab.failing("qemu-img", "info -f vhdx disk.vhdx");
    assert!(
        refused.contains("contains a log that needs to be replayed"),
        "{refused}"
    );

    let plan = settle(&mut session).unwrap().plan;
    session.host.apply(&plan);
    assert_eq!(session.open(None).unwrap().unsettled, None);
    assert_same(
        &session.read(0, new).unwrap(),
        &expected,
        "content once settled",
    );
    assert!(settle(&mut session).unwrap().plan.is_empty());
    lab.write("settled.vhdx", &session.host.image);
    lab.qemu_img("check -f vhdx settled.vhdx");
    lab.qemu_img("convert -f vhdx -O raw settled.vhdx settled.raw");
    assert_same(
        &lab.bytes("settled.raw"),
        &expected,
        "content as QEMU reads it",
    );

    lab.qemu_img("check -f vhdx -r all disk.vhdx");
    assert_same(&raw(&lab), &expected, "content that QEMU replayed");
    let theirs = lab.bytes("disk.vhdx");
    let ours = &session.host.image;
    let bat = 3 << 20;
    assert_same(
        &ours[bat - (1 << 20)..bat],
        &theirs[bat - (1 << 20)..bat],
        "BAT",
    );
}

/// Entries for 127 GiB go; the log has room for a hundredth of them.
fn large() {
    let lab = Lab::new();
    create(&lab, "block_size=1M", 127 * G);
    scatter(&lab, 8 * M, 5, 2);
    write(&lab, &[format!("write -P 3 {} 1M", 126 * G)]);
    let mut session = open(&lab);
    let reply = resize(&mut session, G, Preallocation::Off, true).unwrap();
    session.host.apply(&up_to_the_commit(&reply.plan));
    lab.write("disk.vhdx", &session.host.image);
    lab.qemu_img("check -f vhdx -r all disk.vhdx");
    let first = lab.bytes("disk.vhdx");
    let bat = 2 << 20;
    assert!(
        first[bat + 8 * 1024..bat + (1 << 20)]
            .iter()
            .all(|&byte| byte == 0)
    );
    let mut session = open(&lab);
    assert_eq!(session.open(None).unwrap().virtual_size, G);
}

/// Blocks were written from the last to the first: the first lies at the end of
/// the file and moves.
fn compacts() {
    let lab = Lab::new();
    create(&lab, "block_size=1M", 20 * M);
    let backwards: Vec<String> = (0..20)
        .rev()
        .map(|block| format!("write -P {} {} 1M", block + 1, block * M))
        .collect();
    write(&lab, &backwards);
    let mut session = open(&lab);
    let reply = resize(&mut session, 5 * M, Preallocation::Off, true).unwrap();
    let copies = reply.plan.stages.iter().flat_map(|stage| &stage.steps);
    let copies = copies
        .filter(|step| matches!(step, Step::Copy { .. }))
        .count();
    assert_eq!(copies, 5);
    session.host.apply(&reply.plan);
    // Headers, log, BAT, metadata, five blocks: without a gap.
    assert_eq!(session.host.image.len() as u64, 9 * M);
    lab.write("disk.vhdx", &session.host.image);
    lab.qemu_img("check -f vhdx disk.vhdx");
    let expected: Vec<u8> = (0..5 * M).map(|at| (at / M) as u8 + 1).collect();
    assert_same(&raw(&lab), &expected, "content");
}

fn refusals() {
    let lab = Lab::new();
    create(&lab, "", 20 * M);
    let mut session = open(&lab);
    let before = session.host.image.clone();
    let mut refused = |size, preallocation| -> Failure {
        let failure = resize(&mut session, size, preallocation, true).unwrap_err();
        assert_same(&session.host.image, &before, "image");
        assert_eq!(
            session.open(Some(Format::Vhdx)).unwrap().virtual_size,
            20 * M
        );
        failure
    };
    let failure = refused(0, Preallocation::Off);
    assert!(
        failure
            .message
            .starts_with("a VHDX disk cannot shrink to 0 bytes")
    );
    let failure = refused(M, Preallocation::Falloc);
    assert_eq!(failure.kind, FailureKind::InvalidRequest);
    let failure = refused(M + 1, Preallocation::Off);
    assert_eq!(failure.kind, FailureKind::InvalidRequest);
}
