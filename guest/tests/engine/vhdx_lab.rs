//! What the tests of VHDX have in common.

use crate::disk::Random;
use crate::lab::Lab;
use instar_guest::proto::{Create, PlanReply, Preallocation};
use instar_guest::testing::{FRESH, Session};
use instar_guest::{Failure, Format, Reply, Request};

pub const K: u64 = 1 << 10;
pub const M: u64 = 1 << 20;
pub const G: u64 = 1 << 30;

/// Makes `disk.vhdx` with qemu-img.
pub fn create(lab: &Lab, options: &str, size: u64) {
    let words = match options {
        "" => String::new(),
        options => format!("-o {options}"),
    };
    lab.qemu_img(&format!("create -q -f vhdx {words} disk.vhdx {size}"));
}

/// Writes to `disk.vhdx` with qemu-io.
pub fn write(lab: &Lab, commands: &[String]) {
    let mut words = vec!["-f", "vhdx"];
    for command in commands {
        words.extend(["-c", command]);
    }
    words.push("disk.vhdx");
    let output = lab.run("qemu-io", &words);
    assert!(!output.contains("failed"), "qemu-io {commands:?}: {output}");
}

/// Writes pieces of random length in random order over the first `size` bytes.
pub fn scatter(lab: &Lab, size: u64, pieces: u64, seed: u64) {
    let mut random = Random(seed);
    let commands: Vec<String> = (0..pieces)
        .map(|_| {
            let at = random.below(size / 512) * 512;
            let len = ((1 + random.below(600)) * 512).min(size - at);
            let byte = 1 + random.below(255);
            format!("write -P {byte} {at} {len}")
        })
        .collect();
    write(lab, &commands);
}

/// Opens `disk.vhdx`.
pub fn open(lab: &Lab) -> Session {
    let mut session = Session::new(lab.bytes("disk.vhdx"));
    session.open(Some(Format::Vhdx)).expect("the image opens");
    session
}

/// What qemu-img reads from `disk.vhdx`.
pub fn raw(lab: &Lab) -> Vec<u8> {
    lab.qemu_img("convert -f vhdx -O raw disk.vhdx disk.raw");
    lab.bytes("disk.raw")
}

/// The answer to a resize.
pub fn resize(
    session: &mut Session,
    size: u64,
    preallocation: Preallocation,
    shrink: bool,
) -> Result<PlanReply, Failure> {
    let reply = session.call(Request::Resize {
        size,
        preallocation,
        shrink,
        backing_size: None,
    })?;
    Ok(plan(reply))
}

/// The plan that settles the image.
pub fn settle(session: &mut Session) -> Result<PlanReply, Failure> {
    session.call(Request::Settle).map(plan)
}

/// The request for a new image.
pub fn creation(size: u64, options: &str) -> Request {
    Request::Create {
        create: Create {
            format: Format::Vhdx,
            size,
            options: options
                .split(',')
                .filter_map(|option| option.split_once('='))
                .map(|(key, value)| (key.to_string(), value.to_string()))
                .collect(),
            backing: None,
            backing_size: None,
            backing_identity: None,
        },
        name: "disk.vhdx".to_string(),
        fresh: FRESH,
    }
}

pub fn plan(reply: Reply) -> PlanReply {
    match reply {
        Reply::Plan(reply) => reply,
        other => panic!("not an answer with a plan: {other:?}"),
    }
}

/// Refuses bytes that differ, without printing them.
pub fn assert_same(ours: &[u8], theirs: &[u8], what: &str) {
    assert_eq!(ours.len(), theirs.len(), "{what}: lengths");
    let differs = ours.iter().zip(theirs).position(|(a, b)| a != b);
    assert_eq!(differs, None, "{what}: first byte that differs");
}
