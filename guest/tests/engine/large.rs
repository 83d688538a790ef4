//! Images that are too large for one plan, and for memory: on sparse files.

use crate::lab::{Check, Lab};
use instar_guest::findings::Finding;
use instar_guest::plan::{Plan, Purpose, Step};
use instar_guest::proto::{MAX_MESSAGE, PlanReply, Preallocation};
use instar_guest::testing::FRESH;
use instar_guest::{Engine, Failure, FailureKind, Format, Host, Read, Reply, Request};
use std::fs::File;
use std::os::unix::fs::FileExt;

const G: u64 = 1 << 30;
const M: u64 = 1 << 20;

/// All checks by name.
pub fn trials() -> Vec<(String, Check)> {
    let checks: [(&str, fn()); 5] = [
        ("maps_100_gib_at_once", grow),
        ("cuts_what_two_windows_count", shrink),
        ("cuts_64_tib_of_nothing", shrink_nothing),
        ("stages_scattered_counts", shrink_scattered),
        ("grows_and_shrinks_back", there_and_back),
    ];
    let checks = checks.into_iter();
    checks
        .map(|(name, check)| (format!("large::{name}"), Box::new(check) as Check))
        .collect()
}

/// A sparse file as the engine's world.
struct World<'l> {
    lab: &'l Lab,
    file: File,
    bytes_read: u64,
    streamed: usize,
    largest: usize,
}

impl<'l> World<'l> {
    fn new(lab: &'l Lab) -> Self {
        let file = File::open(lab.path("disk.qcow2")).expect("the image");
        Self {
            lab,
            file,
            bytes_read: 0,
            streamed: 0,
            largest: 0,
        }
    }

    /// Asks for another size and carries the plan out.
    fn resize(&mut self, size: u64, preallocation: Preallocation) -> PlanReply {
        let mut engine = Engine::default();
        let open = Request::Open {
            format: Some(Format::Qcow2),
            file_len: self.file.metadata().expect("the image").len(),
            write: true,
            fresh: FRESH,
        };
        engine.handle(self, open).expect("the image opens");
        let request = Request::Resize {
            size,
            preallocation,
            shrink: true,
            backing_size: None,
        };
        match engine.handle(self, request).expect("a plan") {
            Reply::Plan(reply) => {
                self.weigh(&reply.plan);
                self.lab
                    .carry_out(std::slice::from_ref(&reply.plan), "disk.qcow2");
                reply
            }
            other => panic!("not an answer to Resize: {other:?}"),
        }
    }

    fn weigh(&mut self, plan: &Plan) {
        let len = postcard::to_allocvec(plan).expect("a plan").len();
        assert!(len < MAX_MESSAGE, "a plan of {len} bytes");
        self.largest = self.largest.max(len);
    }
}

impl Host for World<'_> {
    fn read(&mut self, reads: &mut [Read<'_>]) -> Result<(), Failure> {
        for read in reads {
            self.bytes_read += read.buf.len() as u64;
            read.buf.fill(0);
            let mut done = 0;
            while let Some(rest) = read.buf.get_mut(done..).filter(|rest| !rest.is_empty()) {
                match self.file.read_at(rest, read.offset + done as u64) {
                    Ok(0) => break,
                    Ok(more) => done += more,
                    Err(error) => return Err(Failure::new(FailureKind::Io, error.to_string())),
                }
            }
        }
        Ok(())
    }

    fn stream(&mut self, part: Plan) -> Result<(), Failure> {
        self.streamed += 1;
        self.weigh(&part);
        self.lab.carry_out(&[part], "disk.qcow2");
        Ok(())
    }

    fn tell(&mut self, _: Vec<Finding>) -> Result<(), Failure> {
        Ok(())
    }
}

fn judge(lab: &Lab, size: u64) {
    lab.qemu_img("check -f qcow2 disk.qcow2");
    let info = lab.json("info -f qcow2 --output=json disk.qcow2");
    assert_eq!(info["virtual-size"], size);
}

fn grow() {
    let lab = Lab::new();
    lab.qemu_img("create -q -f qcow2 disk.qcow2 1M");
    let mut world = World::new(&lab);
    world.resize(100 * G, Preallocation::Metadata);
    assert!(world.streamed > 1, "{} parts", world.streamed);
    judge(&lab, 100 * G);
    let (len, allocated) = lab.size_of("disk.qcow2");
    assert!(
        len >= 100 * G && allocated < 32 * M,
        "{allocated} of {len} bytes"
    );
}

fn shrink() {
    let lab = Lab::new();
    lab.qemu_img("create -q -f qcow2 -o preallocation=metadata,refcount_bits=64 disk.qcow2 40G");
    lab.run("cp", &["--sparse=always", "disk.qcow2", "theirs.qcow2"]);
    let mut world = World::new(&lab);
    world.resize(G, Preallocation::Off);
    judge(&lab, G);
    assert!(world.largest < 1 << 20, "a plan of {} bytes", world.largest);
    lab.qemu_img("resize -q -f qcow2 --shrink theirs.qcow2 1G");
    let (ours, theirs) = (lab.size_of("disk.qcow2"), lab.size_of("theirs.qcow2"));
    assert!(
        ours.0 <= theirs.0 + (64 << 10),
        "{} and {}",
        ours.0,
        theirs.0
    );
    assert!(
        ours.1 <= theirs.1 + (64 << 10),
        "{} and {}",
        ours.1,
        theirs.1
    );
}

fn shrink_nothing() {
    let lab = Lab::new();
    lab.qemu_img("create -q -f qcow2 disk.qcow2 64T");
    let mut world = World::new(&lab);
    world.resize(10 * G, Preallocation::Off);
    judge(&lab, 10 * G);
    assert!(world.bytes_read < 4 * M, "{} bytes read", world.bytes_read);
}

/// Every second cluster of the file is kept.
fn shrink_scattered() {
    let lab = Lab::new();
    lab.qemu_img("create -q -f qcow2 -o cluster_size=512,refcount_bits=64 disk.qcow2 512");
    let mut world = World::new(&lab);
    world.resize(160 * M, Preallocation::Metadata);
    interleave(&lab, 160 * M / 512);
    lab.qemu_img("check -f qcow2 disk.qcow2");
    let plan = world.resize(80 * M, Preallocation::Off).plan;
    let steps = plan
        .stages
        .iter()
        .filter(|stage| stage.purpose == Purpose::Release);
    let mut steps = steps.flat_map(|stage| &stage.steps);
    assert!(
        steps.any(|step| matches!(step, Step::Copy { .. })),
        "nothing is staged"
    );
    judge(&lab, 80 * M);
    lab.qemu_img("resize -q -f qcow2 disk.qcow2 160M");
    judge(&lab, 160 * M);
}

/// Gives the clusters of the first half and those of the second the places of
/// each other, every second one.
fn interleave(lab: &Lab, clusters: u64) {
    let file = File::options()
        .read(true)
        .write(true)
        .open(lab.path("disk.qcow2"));
    let file = file.expect("the image");
    let word = |at: u64| {
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, at)
            .expect("inside the image");
        u64::from_be_bytes(bytes)
    };
    let l1 = word(40);
    let place = |cluster: u64| (word(l1 + cluster / 64 * 8) & !(1 << 63)) + cluster % 64 * 8;
    for cluster in (1..clusters / 2).step_by(2) {
        let (a, b) = (place(cluster), place(clusters / 2 + cluster));
        let (first, second) = (word(a), word(b));
        for (at, value) in [(a, second), (b, first)] {
            file.write_all_at(&value.to_be_bytes(), at).expect("room");
        }
    }
}

fn there_and_back() {
    let lab = Lab::new();
    lab.qemu_img("create -q -f qcow2 disk.qcow2 3G");
    lab.qemu_io("disk.qcow2", &["write -P 1 0 1M", "write -P 2 2500M 10M"]);
    lab.run("cp", &["--sparse=always", "disk.qcow2", "before.qcow2"]);
    let before = lab.size_of("disk.qcow2");
    let mut world = World::new(&lab);
    for preallocation in [Preallocation::Off, Preallocation::Metadata] {
        world.resize(40 * G, preallocation);
        judge(&lab, 40 * G);
        world.resize(3 * G, Preallocation::Off);
        judge(&lab, 3 * G);
        lab.qemu_img("compare -f qcow2 -F qcow2 disk.qcow2 before.qcow2");
    }
    let after = lab.size_of("disk.qcow2");
    assert!(
        after.0 <= before.0 + 4 * (64 << 10),
        "{} from {}",
        after.0,
        before.0
    );
}
