//! Shrinking: what is kept stays, what is cut off is gone for good, and qemu-img
//! finds nothing wrong.

use crate::lab::{Check, Lab};
use crate::shrink_cases::{Case, cases};
use instar_guest::plan::{Plan, Purpose, Stage};
use instar_guest::proto::{PlanReply, Preallocation};
use instar_guest::testing::Session;
use instar_guest::{Failure, FailureKind, FileNo, Reply, Request, Step};

/// All checks by name.
pub fn trials() -> Vec<(String, Check)> {
    let shrink = cases().into_iter().map(|case| {
        let name = format!("shrinks::{}", case.name);
        (name, Box::new(move || check(&case)) as Check)
    });
    let name = "a_shrunk_image_is_as_long_as_qemu_img_leaves_it".to_string();
    shrink
        .chain([(name, Box::new(same_length) as Check)])
        .collect()
}

/// Of a default image nothing is left but its tables.
fn same_length() {
    let lab = Lab::new();
    lab.qemu_img("create -q -f qcow2 disk.qcow2 64M");
    lab.qemu_io("disk.qcow2", &["write -P 1 48M 64k"]);
    let mut session = opened(&lab);
    let reply = session.call(Request::Resize {
        size: 32 << 20,
        preallocation: Preallocation::Off,
        shrink: true,
        backing_size: None,
    });
    let Ok(Reply::Plan(reply)) = reply else {
        panic!("not a plan: {reply:?}");
    };
    session.host.apply(&reply.plan);
    lab.qemu_img("resize -q -f qcow2 --shrink disk.qcow2 32M");
    assert_eq!(lab.bytes("disk.qcow2").len(), 327_680);
    assert_eq!(session.host.image.len(), 327_680);
}

fn make(lab: &Lab, case: &Case) {
    let backing = match case.backing {
        None => String::new(),
        Some(len) => {
            lab.qemu_img(&format!("create -q -f qcow2 base.qcow2 {len}"));
            lab.qemu_io("base.qcow2", &[&format!("write -P 0x99 0 {len}")]);
            "-b base.qcow2 -F qcow2".to_string()
        }
    };
    lab.qemu_img(&format!(
        "create -q -f qcow2 -o {} {backing} disk.qcow2 {}",
        case.options, case.old
    ));
    (case.then)(lab, case);
}

fn opened(lab: &Lab) -> Session {
    let mut session = Session::new(lab.bytes("disk.qcow2"));
    let data = lab.path("disk.data");
    let data = data.exists().then(|| Some(lab.bytes("disk.data")));
    session.host.others = data.into_iter().collect();
    session.open(None).expect("the image opens");
    session
}

fn resize(session: &mut Session, case: &Case, size: u64) -> Result<PlanReply, Failure> {
    let reply = session.call(Request::Resize {
        size,
        preallocation: Preallocation::Off,
        shrink: true,
        backing_size: case.backing,
    })?;
    match reply {
        Reply::Plan(reply) => Ok(reply),
        other => panic!("not an answer to Resize: {other:?}"),
    }
}

fn check(case: &Case) {
    let lab = Lab::new();
    make(&lab, case);
    // Sizes that fit into no file of the lab are compared by qemu-img alone.
    let small = case.old <= 1 << 30;
    if small {
        lab.qemu_img("convert -O raw disk.qcow2 expected.raw");
        for size in [case.new, case.old] {
            let file = std::fs::File::options()
                .write(true)
                .open(lab.path("expected.raw"));
            file.and_then(|file| file.set_len(size)).unwrap();
        }
    }
    let snapshots = snapshots_of(&lab, "before");
    let bitmaps = bitmaps_of(&lab);
    let mut session = opened(&lab);
    let old_len = session.host.image.len();
    lab.run("cp", &["--sparse=always", "disk.qcow2", "ours.qcow2"]);
    let reply = resize(&mut session, case, case.new).expect("a plan");
    check_shape(&reply.plan, case.commits);
    // Every one of these is another image in memory.
    if small && old_len <= 8 << 20 {
        finish_each_interruption(&lab, case, &session, &reply.plan);
    }
    session.host.apply(&reply.plan);
    let facts = session.open(None).expect("the shrunk image opens");
    assert_eq!(facts.virtual_size, case.new);
    if session.host.data().is_none() && small {
        compare_with_qemu(&lab, case, &reply.plan);
    }
    save(&lab, &session);
    lab.qemu_img("check -f qcow2 disk.qcow2");
    let info = lab.json("info -f qcow2 --output=json disk.qcow2");
    assert_eq!(info["virtual-size"], case.new);
    assert_eq!(bitmaps_of(&lab), bitmaps);
    assert!(session.host.image.len() <= old_len + 3 * (2 << 20));
    if let Some(data) = session.host.data() {
        assert_eq!(data.len() as u64, case.new);
    }
    assert!(snapshots_of(&lab, "after") == snapshots, "the snapshots");
    assert!(
        resize(&mut session, case, case.new)
            .expect("a plan")
            .plan
            .is_empty()
    );
    // The disk grows again, by whoever's hand.
    if case.new > 0 {
        lab.run("cp", &["--sparse=always", "disk.qcow2", "theirs.qcow2"]);
        lab.qemu_img(&format!("resize -q -f qcow2 theirs.qcow2 {}", case.old));
        judge(&lab, "theirs.qcow2", small);
        if session.host.data().is_some() {
            lab.write("disk.data", session.host.data().unwrap());
        }
    }
    let back = resize(&mut session, case, case.old).expect("a plan");
    session.host.apply(&back.plan);
    save(&lab, &session);
    judge(&lab, "disk.qcow2", small);
}

/// Cut off after any stage, the same request ends in the disk that was asked
/// for, without leaks, and then has nothing left to do.
fn finish_each_interruption(lab: &Lab, case: &Case, before: &Session, plan: &Plan) {
    let commit = |stage: &Stage| stage.purpose == Purpose::Commit;
    let first = plan.stages.iter().position(commit).expect("a commit");
    let mut whole = before.host.clone();
    whole.apply(plan);
    let untouched = lab.bytes("disk.qcow2");
    lab.run("cp", &["--sparse=always", "expected.raw", "cut.raw"]);
    let cut = std::fs::File::options()
        .write(true)
        .open(lab.path("cut.raw"));
    cut.and_then(|file| file.set_len(case.new)).unwrap();
    for done in 1..plan.stages.len() {
        let mut session = Session::new(before.host.image.clone());
        session.host.others = before.host.others.clone();
        let stages = plan.stages[..done].to_vec();
        session.host.apply(&Plan { stages });
        let facts = session.open(None).expect("an interrupted shrink opens");
        let cluster = facts.cluster_size.unwrap_or(1) as usize;
        if facts.unsettled.is_some() {
            assert!(done > first, "marked before the commit");
            settle(&mut session);
        }
        let rest = match resize(&mut session, case, case.new) {
            Err(failure) if failure.kind == FailureKind::SettleFirst => {
                assert!(done <= first, "settles behind the commit");
                settle(&mut session);
                resize(&mut session, case, case.new)
            }
            rest => rest,
        };
        session.host.apply(&rest.expect("a plan").plan);
        session.open(None).expect("the shrunk image opens");
        save(lab, &session);
        lab.qemu_img("check -q -f qcow2 disk.qcow2");
        lab.qemu_img("compare -q -f qcow2 -F raw disk.qcow2 cut.raw");
        if let Some(data) = session.host.data() {
            assert_eq!(data.len() as u64, case.new);
        }
        if done <= first {
            // The file may have ended inside a cluster.
            let len = session.host.image.len();
            let most = whole.image.len().next_multiple_of(cluster);
            assert!(len <= most, "{len} instead of {most} after {done} stages");
        }
        let none = resize(&mut session, case, case.new).expect("a plan");
        assert!(none.plan.is_empty(), "after {done} stages: {:?}", none.plan);
    }
    lab.write("disk.qcow2", &untouched);
}

fn settle(session: &mut Session) {
    let Ok(Reply::Plan(reply)) = session.call(Request::Settle) else {
        panic!("not a plan");
    };
    session.host.apply(&reply.plan);
    session.open(None).expect("a settled image opens");
}

fn save(lab: &Lab, session: &Session) {
    lab.write("disk.qcow2", &session.host.image);
    if let Some(data) = session.host.data() {
        lab.write("disk.data", data);
    }
}

fn judge(lab: &Lab, image: &str, small: bool) {
    lab.qemu_img(&format!("check -f qcow2 {image}"));
    if small {
        lab.qemu_img(&format!("compare -f qcow2 -F raw {image} expected.raw"));
    }
}

/// The content of the snapshots.
fn snapshots_of(lab: &Lab, prefix: &str) -> Option<Vec<u8>> {
    let info = lab.json("info -f qcow2 --output=json disk.qcow2");
    info["snapshots"].as_array()?;
    // Where a snapshot is read without going back to it, the disk's present
    // size cuts it.
    lab.run("cp", &["--sparse=always", "disk.qcow2", "back.qcow2"]);
    lab.qemu_img("snapshot -a first back.qcow2");
    lab.qemu_img("check -f qcow2 back.qcow2");
    lab.qemu_img(&format!("convert -O raw back.qcow2 {prefix}.raw"));
    Some(lab.bytes(&format!("{prefix}.raw")))
}

fn bitmaps_of(lab: &Lab) -> serde_json::Value {
    let info = lab.json("info -f qcow2 --output=json disk.qcow2");
    info["format-specific"]["data"]["bitmaps"].clone()
}

/// Commits are writes inside one sector; nothing is changed before the first
/// that a reader could see.
fn check_shape(plan: &Plan, commits: usize) {
    let found = plan
        .stages
        .iter()
        .filter(|stage| stage.purpose == Purpose::Commit);
    let found: Vec<_> = found.collect();
    assert_eq!(found.len(), commits, "commits");
    for commit in found {
        assert!(
            matches!(&commit.steps[..], [Step::Write { file: FileNo::IMAGE, offset, data }]
                if *offset as usize + data.len() <= 512 && !data.is_empty())
        );
    }
}

/// The file is no longer than qemu-img leaves it, and takes no more disk space,
/// a cluster excepted.
fn compare_with_qemu(lab: &Lab, case: &Case, plan: &Plan) {
    lab.carry_out(std::slice::from_ref(plan), "ours.qcow2");
    if case.new == 0 {
        return;
    }
    lab.run("cp", &["--sparse=always", "disk.qcow2", "theirs.qcow2"]);
    lab.qemu_img(&format!(
        "resize -q -f qcow2 --shrink theirs.qcow2 {}",
        case.new
    ));
    let cluster = lab.json("info --output=json disk.qcow2")["cluster-size"].as_u64();
    let cluster = cluster.expect("a qcow2 image").max(4096);
    let (ours, theirs) = (lab.size_of("ours.qcow2"), lab.size_of("theirs.qcow2"));
    // A cluster that compressed ones share is not put to a new use.
    let shared = if case.name.starts_with("packed") {
        cluster
    } else {
        0
    };
    let most = theirs.0.next_multiple_of(cluster) + cluster + shared;
    assert!(ours.0 <= most, "length {} and QEMU's {}", ours.0, theirs.0);
    assert!(
        ours.1 <= theirs.1 + cluster + shared,
        "{} bytes and QEMU's {}",
        ours.1,
        theirs.1
    );
}
