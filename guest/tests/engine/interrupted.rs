//! What an interrupted qcow2 resize leaves and a later request finds: room that
//! is not counted, and an image that is marked as corrupt until its data file has
//! been cut.

use crate::lab::{Check, Lab, purposes};
use instar_guest::findings::Repair;
use instar_guest::plan::{Plan, Purpose, Stage};
use instar_guest::proto::{PlanReply, Preallocation};
use instar_guest::testing::Session;
use instar_guest::{Facts, Failure, FailureKind, FileNo, Reply, Request, Step};

const K: usize = 1 << 10;
const M: usize = 1 << 20;
/// Where the header has its incompatible features, the last byte of them.
const FEATURES: usize = 79;
const CORRUPT: u8 = 2;

/// All checks by name.
pub fn trials() -> Vec<(String, Check)> {
    let checks: [(&str, fn()); 6] = [
        ("room_behind_what_is_counted_is_cut_off", room),
        ("room_that_something_refers_to_stays", room_in_use),
        ("a_file_that_ends_inside_a_cluster_stays", part_of_a_cluster),
        ("a_shrink_of_a_data_file_is_finished", flagged),
        ("a_repair_finishes_it_as_well", repaired),
        ("an_image_that_is_corrupt_stays_refused", corrupt),
    ];
    let named = checks.into_iter();
    named
        .map(|(name, check)| (format!("interrupted::{name}"), Box::new(check) as Check))
        .collect()
}

fn plan(session: &mut Session, request: Request) -> Result<PlanReply, Failure> {
    match session.call(request)? {
        Reply::Plan(reply) | Reply::Checked { repair: reply, .. } => Ok(reply),
        reply => panic!("not a plan: {reply:?}"),
    }
}

fn resize(session: &mut Session, size: usize) -> Result<PlanReply, Failure> {
    let request = Request::Resize {
        size: size as u64,
        preallocation: Preallocation::Off,
        shrink: false,
        backing_size: None,
    };
    plan(session, request)
}

/// An image of 1 MiB with some data and a session on it.
fn some_data(lab: &Lab) -> Session {
    lab.qemu_img("create -q -f qcow2 -o cluster_size=4096 disk.qcow2 1M");
    lab.qemu_io("disk.qcow2", &["write -P 1 0 64k"]);
    Session::new(lab.bytes("disk.qcow2"))
}

/// Both the request for the present size and one that counts more find it.
fn room() {
    let lab = Lab::new();
    let clean = some_data(&lab).host.image;
    for added in [1, 4096, 10 * M + 7] {
        let mut session = Session::new(clean.clone());
        session.host.image.resize(clean.len() + added, 0xa5);
        session.open(None).unwrap();
        let refused = resize(&mut session, 4096 * M).unwrap_err();
        assert_eq!(refused.kind, FailureKind::SettleFirst);
        for request in [
            Request::Settle,
            Request::Resize {
                size: M as u64,
                preallocation: Preallocation::Off,
                shrink: false,
                backing_size: None,
            },
        ] {
            session.open(None).unwrap();
            let reply = plan(&mut session, request).unwrap();
            let mut settled = session.host.clone();
            settled.apply(&reply.plan);
            assert!(settled.image == clean, "{added} bytes: {:?}", reply.plan);
        }
        // One that counts nothing leaves it alone.
        session.open(None).unwrap();
        let reply = resize(&mut session, 3 * M).unwrap();
        assert!(!reply.plan.stages.iter().any(changes_length));
    }
}

fn changes_length(stage: &Stage) -> bool {
    let is_length = |step: &Step| matches!(step, Step::SetLength { .. });
    stage.steps.iter().any(is_length)
}

/// Where the last data clusters are not counted, nothing is cut off.
fn room_in_use() {
    let lab = Lab::new();
    let mut session = some_data(&lab);
    let word = |image: &[u8], at: usize| {
        u64::from_be_bytes(image[at..at + 8].try_into().unwrap()) as usize
    };
    let image = &mut session.host.image;
    let block = word(image, word(image, 48));
    let clusters = image.len() / 4096;
    image[block + 2 * (clusters - 3)..block + 2 * clusters].fill(0);
    let len = image.len();
    for size in [M, 4096 * M] {
        session.open(None).unwrap();
        let reply = resize(&mut session, size).unwrap();
        let cuts = reply.plan.stages.iter().flat_map(|stage| &stage.steps);
        let cuts =
            cuts.filter(|step| matches!(step, Step::SetLength { len: to, .. } if *to < len as u64));
        assert_eq!(cuts.count(), 0, "{:?}", reply.plan);
    }
    session.open(None).unwrap();
    let reply = plan(&mut session, Request::Settle).unwrap();
    assert!(reply.plan.is_empty(), "{:?}", reply.plan);
}

fn part_of_a_cluster() {
    let lab = Lab::new();
    let mut session = some_data(&lab);
    let len = session.host.image.len() - 1000;
    session.host.image.truncate(len);
    session.open(None).unwrap();
    assert!(resize(&mut session, M).unwrap().plan.is_empty());
    session.open(None).unwrap();
    resize(&mut session, 4096 * M).expect("nothing to settle");
}

/// A shrink to 500 KiB and a half that was cut off between its commit and the cut of the data
/// file.
fn cut_off(lab: &Lab) -> Session {
    let options = "cluster_size=4096,data_file=disk.data";
    lab.qemu_img(&format!("create -q -f qcow2 -o {options} disk.qcow2 1M"));
    lab.qemu_io("disk.qcow2", &["write -P 5 0 1M"]);
    let mut session = Session::new(lab.bytes("disk.qcow2"));
    session.host.others = vec![Some(lab.bytes("disk.data"))];
    session.open(None).unwrap();
    let shrink = Request::Resize {
        size: NEW as u64,
        preallocation: Preallocation::Off,
        shrink: true,
        backing_size: None,
    };
    let stages = plan(&mut session, shrink).unwrap().plan.stages;
    let is_cut = |step: &Step| step.file() == FileNo::DATA;
    let cut = stages
        .iter()
        .position(|stage| stage.steps.iter().any(is_cut));
    let stages = stages[..cut.expect("the data file is cut")].to_vec();
    session.host.apply(&Plan { stages });
    assert_eq!(session.host.image[FEATURES] & CORRUPT, CORRUPT);
    assert_eq!(session.host.data().unwrap().len(), M);
    session
}

const NEW: usize = 500 * K + 512;

fn save(lab: &Lab, session: &Session) {
    lab.write("disk.qcow2", &session.host.image);
    lab.write("disk.data", session.host.data().unwrap());
}

/// It is the new disk, not marked any more, and shows nothing of the old one.
fn judge(lab: &Lab, session: &mut Session) {
    let facts = session.open(None).unwrap();
    assert_eq!(blockers(&facts), (None, None, None));
    assert_eq!(session.host.image[FEATURES] & CORRUPT, 0);
    save(lab, session);
    let grow = "resize -q -f qcow2 --preallocation=metadata disk.qcow2 1M";
    lab.qemu_img(grow);
    lab.qemu_img("convert -f qcow2 -O raw disk.qcow2 disk.raw");
    let mut wanted = vec![5; NEW];
    wanted.resize(M, 0);
    assert!(lab.bytes("disk.raw") == wanted, "the disk after a grow");
}

type Blockers<'a> = (Option<&'a str>, Option<&'a str>, Option<&'a str>);

fn blockers(facts: &Facts) -> Blockers<'_> {
    let message = |why: &Option<Failure>| why.as_ref().map(|why| why.message.clone());
    let leak = |text: Option<String>| text.map(|text| &*text.leak());
    (
        facts.unsettled.as_deref(),
        leak(message(&facts.no_write)),
        leak(message(&facts.no_resize)),
    )
}

fn flagged() {
    let lab = Lab::new();
    let mut session = cut_off(&lab);
    save(&lab, &session);
    let refusal = lab.failing("qemu-img", "resize -q -f qcow2 disk.qcow2 1M");
    assert!(refusal.contains("Image is corrupt"), "{refusal}");
    let facts = session.open(None).unwrap();
    assert_eq!(facts.virtual_size, NEW as u64);
    let (unsettled, no_write, no_resize) = blockers(&facts);
    assert!(unsettled.is_some_and(|why| why.contains("data file")));
    assert_eq!((no_write, no_resize), (None, None));
    // Nothing is changed before that.
    let refused = resize(&mut session, 2 * M).unwrap_err();
    assert!(refused.message.starts_with("Image is corrupt"));
    let reply = plan(&mut session, Request::Settle).unwrap();
    assert_eq!(purposes(&reply.plan), [Purpose::Release, Purpose::Commit]);
    session.host.apply(&reply.plan);
    assert_eq!(session.host.data().unwrap().len(), NEW);
    judge(&lab, &mut session);
}

/// The data file is cut in a stage before the one that clears the bit.
fn repaired() {
    for repair in [Repair::Leaks, Repair::All] {
        let lab = Lab::new();
        let mut session = cut_off(&lab);
        session.open(None).unwrap();
        let repair = Some(repair);
        let reply = plan(&mut session, Request::Check { repair }).unwrap();
        let (clearing, before) = reply.plan.stages.split_last().unwrap();
        assert_eq!(clearing.purpose, Purpose::Commit);
        let mut steps = before.iter().flat_map(|stage| &stage.steps);
        assert!(steps.any(|step| step.file() == FileNo::DATA));
        session.host.apply(&reply.plan);
        judge(&lab, &mut session);
        lab.qemu_img("check -q -f qcow2 disk.qcow2");
    }
}

/// Where anything else is wrong, or where there is no data file, the bit means
/// what it says.
fn corrupt() {
    let lab = Lab::new();
    let mut damaged = cut_off(&lab);
    let image = &mut damaged.host.image;
    let table = u64::from_be_bytes(image[48..56].try_into().unwrap()) as usize;
    let block = u64::from_be_bytes(image[table..table + 8].try_into().unwrap()) as usize;
    image[block..block + 2].fill(0);
    let mut alone = some_data(&lab);
    alone.host.image[FEATURES] |= CORRUPT;
    for mut session in [damaged, alone] {
        let before = session.host.image.clone();
        let facts = session.open(None).unwrap();
        let (unsettled, no_write, no_resize) = blockers(&facts);
        assert_eq!(unsettled, None);
        let refusal = "Image is corrupt; cannot be opened read/write (the corrupt bit is set); \
                       repair a copy with `qemu-img check -r all`";
        assert_eq!((no_write, no_resize), (Some(refusal), Some(refusal)));
        for request in [
            Request::Settle,
            Request::Resize {
                size: 2 * M as u64,
                preallocation: Preallocation::Off,
                shrink: false,
                backing_size: None,
            },
        ] {
            let refused = plan(&mut session, request).unwrap_err();
            assert_eq!(
                (refused.kind, &*refused.message),
                (FailureKind::Damaged, refusal)
            );
        }
        assert!(session.host.image == before, "nothing was written");
    }
}
