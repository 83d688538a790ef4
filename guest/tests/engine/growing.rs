//! Growing: old content, then zeroes, and qemu-img finds nothing wrong.

use crate::grow_cases::{Case, M, case, cases};
use crate::lab::{Check, Lab};
use instar_guest::plan::{Plan, Purpose};
use instar_guest::proto::{PlanReply, Preallocation};
use instar_guest::testing::{MemHost, Session};
use instar_guest::{Failure, FailureKind, FileNo, Reply, Request, Step};

/// All checks by name.
pub fn trials() -> Vec<(String, Check)> {
    let grow = cases().into_iter().map(|case| {
        let name = format!("grows::{}", case.name);
        (name, Box::new(move || check(&case)) as Check)
    });
    let lengths = FRUGAL.iter().flat_map(|&(options, old, new)| {
        MODES.into_iter().map(move |mode| {
            let name = format!("grows_as_frugally_as_qemu_img::{options}_{}", mode.1);
            let check = move || as_frugal_as_qemu(options, old, new, mode);
            (name, Box::new(check) as Check)
        })
    });
    grow.chain(lengths)
        .chain([
            ("refuses_to_grow".to_string(), Box::new(refusals) as Check),
            (
                "a_longer_data_file_stays_unless_the_disk_may_shrink".to_string(),
                Box::new(longer_data_file) as Check,
            ),
            (
                "refuses_damaged_counts_before_anything".to_string(),
                Box::new(damaged_counts) as Check,
            ),
        ])
        .collect()
}

fn made(lab: &Lab, case: &Case) -> Session {
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
    opened(lab)
}

fn opened(lab: &Lab) -> Session {
    let mut session = Session::new(lab.bytes("disk.qcow2"));
    let data = lab.path("disk.data");
    session.host.others = data
        .exists()
        .then(|| Some(lab.bytes("disk.data")))
        .into_iter()
        .collect();
    session.open(None).expect("the image opens");
    session
}

fn resize(session: &mut Session, case: &Case) -> Result<PlanReply, Failure> {
    let reply = session.call(Request::Resize {
        size: case.new,
        preallocation: case.preallocation,
        shrink: false,
        backing_size: case.backing,
    })?;
    match reply {
        Reply::Plan(reply) => Ok(reply),
        other => panic!("not an answer to Resize: {other:?}"),
    }
}

fn check(case: &Case) {
    let lab = Lab::new();
    let mut session = made(&lab, case);
    let raw = [
        "convert -O raw disk.qcow2 old.raw",
        "resize -q -f raw old.raw",
    ];
    lab.qemu_img(raw[0]);
    let bitmaps = bitmaps_of(&lab);
    let mut old_len = session.host.image.len();
    let mut reply = resize(&mut session, case);
    if settles_first(&mut session, &reply) {
        assert!(case.name.starts_with("stopped_shrink"));
        old_len = session.host.image.len();
        reply = resize(&mut session, case);
    }
    let reply = reply.expect("a plan");
    check_shape(&reply, old_len as u64, &session, case);
    // Every one of these is another image in memory.
    // Where bitmaps are marked meanwhile, they have to go after a crash.
    let small = session.host.streamed.is_empty() && old_len <= 4 << 20;
    if small && case.name != "bitmaps_crowded" {
        finish_each_interruption(case, &session.host, &reply.plan);
    }
    session.host.apply(&reply.plan);
    let facts = session.open(None).expect("the grown image opens");
    assert_eq!(facts.virtual_size, case.new);
    lab.write("disk.qcow2", &session.host.image);
    if let Some(data) = session.host.data() {
        lab.write("disk.data", data);
    }
    lab.qemu_img("check -f qcow2 disk.qcow2");
    assert_eq!(bitmaps_of(&lab), bitmaps);
    lab.qemu_img(&format!("{} {}", raw[1], case.new));
    lab.qemu_img("compare -f qcow2 -F raw disk.qcow2 old.raw");
    if case.preallocation != Preallocation::Off {
        check_allocated(&lab, case);
    }
    let again = resize(&mut session, case);
    match case.preallocation {
        Preallocation::Off => assert!(again.expect("a plan").plan.is_empty()),
        _ => assert_eq!(again.unwrap_err().kind, FailureKind::InvalidRequest),
    }
    // QEMU can go on with it.
    let end = case.new - 512;
    lab.qemu_io("disk.qcow2", &[&format!("write -P 0x7e {end} 512")]);
    lab.qemu_img("check -f qcow2 disk.qcow2");
}

/// Cut off after any step, the same request ends in a disk of that size, without
/// leaks, and then has nothing left to do.
fn finish_each_interruption(case: &Case, before: &MemHost, plan: &Plan) {
    let mut whole = before.clone();
    whole.apply(plan);
    let steps: Vec<&Step> = plan.stages.iter().flat_map(|stage| &stage.steps).collect();
    for done in 0..=steps.len() {
        let mut session = Session::new(before.image.clone());
        session.host.others = before.others.clone();
        steps
            .iter()
            .take(done)
            .for_each(|step| session.host.step(step));
        let facts = session.open(None).expect("an interrupted grow opens");
        let mut rest = ask(&mut session, case, facts.virtual_size);
        if settles_first(&mut session, &rest) {
            rest = ask(&mut session, case, facts.virtual_size);
        }
        session.host.apply(&rest.expect("a plan").plan);
        let facts = session.open(None).expect("the grown image opens");
        assert_eq!(facts.virtual_size, case.new, "after {done} steps");
        let checked = session.call(Request::Check { repair: None });
        let Ok(Reply::Checked { report, .. }) = checked else {
            panic!("not a report: {checked:?}");
        };
        let wrong = (report.corruptions, report.check_errors, report.leaks);
        assert_eq!(wrong, (0, 0, 0), "after {done} steps");
        let none = ask(&mut session, case, facts.virtual_size).expect("a plan");
        assert!(none.plan.is_empty(), "after {done} steps: {:?}", none.plan);
    }
}

/// Puts the image in order where that is wanted first; answers whether it was.
fn settles_first(session: &mut Session, reply: &Result<PlanReply, Failure>) -> bool {
    match reply {
        Err(failure) if failure.kind == FailureKind::SettleFirst => {
            let Ok(Reply::Plan(reply)) = session.call(Request::Settle) else {
                panic!("not a plan");
            };
            session.host.apply(&reply.plan);
            session.open(None).expect("a settled image opens");
            true
        }
        _ => false,
    }
}

/// Asks for the new size; nothing is allocated where nothing is added.
fn ask(session: &mut Session, case: &Case, virtual_size: u64) -> Result<PlanReply, Failure> {
    let mut case = case.clone();
    if virtual_size == case.new {
        case.preallocation = Preallocation::Off;
    }
    resize(session, &case)
}

/// What qemu-img says about persistent bitmaps.
fn bitmaps_of(lab: &Lab) -> serde_json::Value {
    let info = lab.json("info -f qcow2 --output=json disk.qcow2");
    info["format-specific"]["data"]["bitmaps"].clone()
}

/// One commit, one write of at most a sector; streamed parts past the old end.
fn check_shape(reply: &PlanReply, old_len: u64, session: &Session, case: &Case) {
    let stages = &reply.plan.stages;
    assert!(
        stages.len() <= case.stages,
        "{} stages: {stages:?}",
        stages.len()
    );
    let commits: Vec<_> = stages
        .iter()
        .filter(|stage| stage.purpose == Purpose::Commit)
        .collect();
    let [commit] = &commits[..] else {
        panic!("{} commits", commits.len());
    };
    assert!(
        matches!(&commit.steps[..], [Step::Write { file: FileNo::IMAGE, offset, data }]
            if *offset as usize + data.len() <= 512)
    );
    let streams = !session.host.streamed.is_empty();
    assert_eq!(streams, case.name.starts_with("streamed"));
    for step in session
        .host
        .streamed
        .iter()
        .flat_map(|plan| &plan.stages[0].steps)
    {
        let at = match step {
            Step::Write { offset, .. } | Step::Zero { offset, .. } => *offset,
            Step::Reserve { offset, .. } | Step::Fill { offset, .. } => *offset,
            Step::Copy { to, .. } => *to,
            Step::SetLength { len, .. } => *len,
            _ => panic!("not past the end: {step:?}"),
        };
        assert!(at >= old_len, "{step:?} before {old_len}");
    }
}

/// Every cluster of the added range has its place, none of them twice.
fn check_allocated(lab: &Lab, case: &Case) {
    let map = lab.json("map -f qcow2 --output=json disk.qcow2");
    let first_whole = case.old.next_multiple_of(2 << 20);
    for extent in map.as_array().unwrap() {
        let start = extent["start"].as_u64().unwrap();
        if start >= first_whole {
            assert!(extent["offset"].is_u64(), "{extent}");
            assert_eq!(extent["depth"], 0);
        }
    }
}

/// Options, old and new size of images whose file may not get longer than QEMU
/// makes it, nor take more disk space, but for two clusters.
const FRUGAL: &[(&str, u64, u64)] = &[
    ("compat=1.1", M, 64 * M),
    ("compat=0.10", M, 4 * M),
    ("cluster_size=512", M, 16 * M),
    ("cluster_size=4k", M, 64 * M),
    ("extended_l2=on", M, 4 * M),
    ("refcount_bits=64", M, 4 * M),
];

const MODES: [(Preallocation, &str); 4] = [
    (Preallocation::Off, "off"),
    (Preallocation::Metadata, "metadata"),
    (Preallocation::Falloc, "falloc"),
    (Preallocation::Full, "full"),
];

fn as_frugal_as_qemu(options: &'static str, old: u64, new: u64, mode: (Preallocation, &str)) {
    let lab = Lab::new();
    let (preallocation, mode) = mode;
    let case = case("", options, old, new)
        .then(|_, _| {})
        .preallocated(preallocation, mode);
    let mut session = made(&lab, &case);
    lab.run("cp", &["--sparse=always", "disk.qcow2", "ours.qcow2"]);
    let reply = resize(&mut session, &case).unwrap();
    lab.carry_out(&session.host.streamed, "ours.qcow2");
    lab.carry_out(&[reply.plan], "ours.qcow2");
    lab.qemu_img("check -f qcow2 ours.qcow2");
    lab.qemu_img(&format!(
        "resize -q -f qcow2 --preallocation={mode} disk.qcow2 {new}"
    ));
    let (ours, theirs) = (lab.size_of("ours.qcow2"), lab.size_of("disk.qcow2"));
    let cluster = lab.json("info --output=json disk.qcow2")["cluster-size"].as_u64();
    let cluster = cluster.expect("a qcow2 image");
    // Where counts need more blocks, the tables that lead to them move: what
    // they were stays behind as free clusters.
    let most = theirs.0 + 2 * cluster;
    assert!(ours.0 <= most, "length {} and QEMU's {}", ours.0, theirs.0);
    let most = theirs.1 + (2 * cluster).max(4096);
    assert!(ours.1 <= most, "{} bytes and QEMU's {}", ours.1, theirs.1);
    if mode == "falloc" || mode == "full" {
        assert!(ours.1 >= new - old, "{} bytes for {}", ours.1, new - old);
    }
}

/// It may have been longer from the beginning, and hold what is somebody's.
fn longer_data_file() {
    for (shrink, len) in [(false, 3 * M), (true, M)] {
        let lab = Lab::new();
        lab.qemu_img("create -q -f qcow2 -o data_file=disk.data disk.qcow2 1M");
        lab.write("disk.data", &vec![0x7a; 3 * M as usize]);
        let mut session = opened(&lab);
        let request = Request::Resize {
            size: M,
            preallocation: Preallocation::Off,
            shrink,
            backing_size: None,
        };
        let Reply::Plan(reply) = session.call(request).expect("a plan") else {
            panic!("not an answer to Resize");
        };
        session.host.apply(&reply.plan);
        let data = session.host.data().expect("a data file");
        assert_eq!(data.len() as u64, len);
        assert!(data.iter().all(|&byte| byte == 0x7a));
    }
}

/// Requests that are refused, and with which words.
fn refusals() {
    use FailureKind::{InvalidRequest, NotPermitted, TooLarge};
    use Preallocation::{Falloc, Off};
    let refused = |options: &str, size: u64, preallocation, shrink, kind, words: &str| {
        let lab = Lab::new();
        lab.qemu_img(&format!("create -q -f qcow2 -o {options} disk.qcow2 64M"));
        let mut session = opened(&lab);
        let failure = session
            .call(Request::Resize {
                size,
                preallocation,
                shrink,
                backing_size: None,
            })
            .unwrap_err();
        assert_eq!(failure.kind, kind, "{failure}");
        assert!(failure.message.starts_with(words), "{failure}");
        assert!(session.host.image == lab.bytes("disk.qcow2"));
        assert!(session.host.streamed.is_empty());
    };
    let v3 = "compat=1.1";
    let multiple = "The new size must be a multiple of 512";
    refused(v3, 64 * M + 1, Off, false, InvalidRequest, multiple);
    let too_large = "Failed to grow the L1 table: File too large";
    refused(v3, 3 << 50, Off, false, TooLarge, too_large);
    refused("cluster_size=512", 1 << 40, Off, false, TooLarge, too_large);
    refused(v3, u64::MAX - 511, Off, false, TooLarge, too_large);
    let option = "Use the --shrink option to perform a shrink operation.";
    refused(v3, 32 * M, Off, false, NotPermitted, option);
    let growing = "Preallocation can only be used for growing images";
    refused(v3, 64 * M, Falloc, false, InvalidRequest, growing);
    refused(v3, 32 * M, Falloc, true, InvalidRequest, growing);
}

/// The L1 table that a grow replaces has reference count 0.
fn damaged_counts() {
    let lab = Lab::new();
    let large = case("", "cluster_size=512", M, 256 * M).then(|_, _| {});
    let case = large.falloc();
    let mut session = made(&lab, &case);
    let image = &mut session.host.image;
    let table = u64::from_be_bytes(image[48..56].try_into().unwrap()) as usize;
    let block = u64::from_be_bytes(image[table..table + 8].try_into().unwrap()) as usize;
    image[block + 6..block + 8].fill(0);
    let before = session.host.image.clone();
    session.open(None).unwrap();
    let refused = resize(&mut session, &case).unwrap_err();
    assert_eq!(refused.kind, FailureKind::Damaged);
    assert!(
        refused
            .message
            .starts_with("the cluster at 0x600 is in use but has reference count 0"),
        "{refused}"
    );
    assert!(session.host.image == before);
}
