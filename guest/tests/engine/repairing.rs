//! Repairs against `qemu-img check -r`: after the same damage the same
//! counters and nothing wrong that is not wrong there, too. What a reader sees
//! does not change.

use crate::checking::{IMAGES, Kind, Verdict, check};
use crate::lab::{Check, Lab};
use instar_guest::findings::Repair;
use instar_guest::plan::{Plan, Purpose, SECTOR, Step};
use instar_guest::proto::PlanReply;
use instar_guest::testing::Session;
use instar_guest::{Reply, Request};
use std::process::Command;

/// All checks by name.
pub fn trials() -> Vec<(String, Check)> {
    let repairs = [("leaks", Repair::Leaks), ("all", Repair::All)];
    let kinds = IMAGES
        .iter()
        .filter(|kind| REPAIRED.contains(&kind.name))
        .flat_map(|kind| repairs.map(|repair| (kind, repair)));
    let settled = LEFT.map(|(name, options, prepare)| {
        let run: Check = Box::new(move || settle(options, prepare));
        (format!("what_a_killed_writer_left_is_settled::{name}"), run)
    });
    kinds
        .map(|(kind, (name, repair))| {
            let run: Check = Box::new(move || all_damages(kind, name, repair));
            let name = format!("repairs_end_as_those_of_qemu_img::{name}::{}", kind.name);
            (name, run)
        })
        .chain(settled)
        .collect()
}

/// Images with lazy refcounts that a writer leaves without closing them.
const LEFT: [(&str, &str, &[&str]); 4] = [
    ("clusters_512", "cluster_size=512", &[]),
    ("clusters_64k", "cluster_size=64k", &[]),
    (
        "snapshot",
        "cluster_size=4k",
        &["snapshot -c s1 disk.qcow2"],
    ),
    ("refcounts_64", "cluster_size=512,refcount_bits=64", &[]),
];

/// The image is dirty, reads as before when it is settled, and is sound then.
fn settle(options: &str, prepare: &[&str]) {
    let lab = Lab::new();
    let line = format!("create -q -f qcow2 -o lazy_refcounts=on,{options} disk.qcow2 4M");
    lab.qemu_img(&line);
    lab.qemu_io("disk.qcow2", &["write -P 0x11 0 200k"]);
    prepare.iter().for_each(|line| drop(lab.qemu_img(line)));
    let killed = "qemu-io -f qcow2 -c 'write -P 0x22 100k 300k' -c 'write -P 0x33 3M 64k' -c flush \
                  -c abort disk.qcow2 >&- 2>&-";
    let status = Command::new("sh")
        .args(["-c", &format!("ulimit -c 0; {killed}")])
        .current_dir(lab.path(""))
        .status();
    assert!(!status.unwrap().success(), "nobody was killed");
    let image = lab.bytes("disk.qcow2");
    lab.write("before.qcow2", &image);
    assert_eq!(Verdict::of_qemu(&lab, "").exit, 2, "no count is missing");

    let mut session = Session::new(image.clone());
    assert!(session.open(None).unwrap().unsettled.is_some());
    let reply = match session.call(Request::Settle) {
        Ok(Reply::Plan(reply)) => reply,
        other => panic!("not an answer to Settle: {other:?}"),
    };
    assert_eq!(session.host.findings, []);
    check_plan(&reply.plan, image.len() as u64);
    session.host.apply(&reply.plan);
    lab.write("disk.qcow2", &session.host.image);
    let after = Verdict::of_qemu(&lab, "");
    assert_eq!((after.exit, after.lines), (0, Vec::new()));
    same_content(&lab).unwrap();
    let facts = session.open(None).unwrap();
    assert_eq!((facts.unsettled, facts.dirty), (None, false));
    assert_eq!(
        session.call(Request::Settle),
        Ok(Reply::Plan(PlanReply::default()))
    );
}

/// Damage after which an L2 table is guest data, too: qemu-img repairs its
/// entries all the same, the engine leaves it alone.
const UNTOUCHED: [&str; 2] = [
    "an L1 entry that is not aligned",
    "an L2 entry for its own table",
];

/// The images whose damage is repaired: one of each kind.
const REPAIRED: [&str; 6] = [
    "clusters_512",
    "refcounts_1",
    "refcounts_64",
    "version_2",
    "extended_l2",
    "bitmaps",
];

fn all_damages(kind: &Kind, option: &str, repair: Repair) {
    let lab = Lab::new();
    let mut wrong = String::new();
    for (name, image) in kind.damaged(&lab) {
        if let Err(why) = one_damage(&lab, name, &image, option, repair) {
            wrong += &format!("{name}: {why}\n");
        }
    }
    assert!(wrong.is_empty(), "ours, then qemu-img's\n{wrong}");
}

fn one_damage(
    lab: &Lab,
    name: &str,
    image: &[u8],
    option: &str,
    repair: Repair,
) -> Result<(), String> {
    lab.write("disk.qcow2", image);
    let mut theirs = Verdict::of_qemu(lab, &format!("-r {option}"));
    // Theirs is not always what it was: qemu-img writes bitmaps on closing,
    // maybe over data that is counted 0.
    lab.write("before.qcow2", image);
    let rebuilt = theirs.lines.iter().any(|line| line.starts_with("Rebuil"));

    let mut session = Session::new(image.to_vec());
    if lab.path("disk.data").exists() {
        session.host.others = vec![Some(lab.bytes("disk.data"))];
    }
    let answer = check(&mut session, Some(repair));
    let mut ours = Verdict::new(
        &answer.clone().map(|(report, _)| report),
        &session.host.findings,
    );
    if let Ok((report, reply)) = &answer {
        check_plan(&reply.plan, image.len() as u64);
        for part in &session.host.streamed {
            check_streamed(part, image.len() as u64);
        }
        session.host.apply(&reply.plan);
        if report.corruptions_fixed + report.leaks_fixed > 0 {
            let again = check(&mut session, None).map(|(report, _)| report);
            let after = Verdict::new(&again, &session.host.findings);
            let lines = core::mem::take(&mut ours.lines);
            ours = after;
            ours.lines.splice(0..0, lines);
            ours.fixed(report.corruptions_fixed, report.leaks_fixed);
        }
    } else {
        assert!(session.host.image == image, "changed without a plan");
    }
    lab.write("disk.qcow2", &session.host.image);
    let judged = Verdict::of_qemu(lab, "");
    if answer.is_ok() && judged.exit != ours.exit {
        return Err(format!("{}\njudged {}", ours.short(), judged.short()));
    }
    if name == "a refcount block behind the end" {
        // qemu-img makes the file longer to have the block, and then repairs
        // the count of that.
        ours.sums.remove("corruptions-fixed");
        theirs.sums.remove("corruptions-fixed");
    }
    if UNTOUCHED.contains(&name) && option == "all" {
        return match judged.exit {
            2 => same_content(lab),
            _ => Err(format!("judged {}", judged.short())),
        };
    }
    // qemu-img marks the image as corrupt where it cannot read a block.
    ours.lines.retain(|line| !line.starts_with("qcow2: "));
    theirs.lines.retain(|line| !line.starts_with("qcow2: "));
    // Where qemu-img gives up on the image, a better end is welcome.
    let gave_up = theirs.exit == 1 && option == "all" && judged.exit != 1;
    // A new refcount structure lies elsewhere.
    if rebuilt {
        ours.lines.clear();
    }
    if rebuilt {
        theirs.lines.clear();
        theirs.sums.remove("image-end-offset");
        ours.sums.remove("image-end-offset");
    }
    if ours != theirs && !gave_up {
        return Err(format!("\n{}\n{}", ours.short(), theirs.short()));
    }
    // Guest data that is a refcount block at the same time changes with it.
    match name {
        "an L2 entry for the refcount block" => Ok(()),
        _ => same_content(lab),
    }
}

/// What can be read reads as before the repair.
fn same_content(lab: &Lab) -> Result<(), String> {
    let output = Command::new("qemu-img")
        .args("compare -f qcow2 -F qcow2 disk.qcow2 before.qcow2".split(' '))
        .current_dir(lab.path(""))
        .output()
        .unwrap();
    match output.status.code() {
        Some(0) => Ok(()),
        Some(1) => Err(String::from_utf8_lossy(&output.stdout).into_owned()),
        _ => Ok(()),
    }
}

/// What is streamed lies behind the end of the file.
fn check_streamed(part: &Plan, len: u64) {
    let steps = part.stages.iter().flat_map(|stage| &stage.steps);
    for step in steps {
        assert!(
            matches!(step, Step::Write { offset, .. } if *offset >= len),
            "{step:?}"
        );
    }
}

/// Only a new refcount structure lies behind the end of the file, and nothing
/// before it is changed until the header leads there; commits are atomic.
fn check_plan(plan: &Plan, len: u64) {
    let mut commits = 0;
    for stage in &plan.stages {
        assert!(!stage.steps.is_empty());
        for step in &stage.steps {
            let &Step::Write {
                offset, ref data, ..
            } = step
            else {
                panic!("a repair writes: {step:?}");
            };
            match stage.purpose {
                Purpose::Prepare => assert!(offset >= len || is_autoclear(offset, data)),
                Purpose::Commit => {
                    assert!(offset + data.len() as u64 <= SECTOR && stage.steps.len() == 1);
                    commits += 1;
                }
                _ => assert!(offset + data.len() as u64 <= len.next_multiple_of(SECTOR)),
            }
        }
    }
    assert!(commits <= 2);
}

/// Whether a write only clears what unknown features rely on.
fn is_autoclear(offset: u64, data: &[u8]) -> bool {
    (offset, data.len()) == (88, 8)
}
