//! Real images with some bits flipped: every request is answered or refused
//! with a reason; nothing panics, hangs or claims a defect of the engine.

use crate::checking;
use crate::lab::Lab;
use instar_guest::findings::{Repair, Report};
use instar_guest::proto::Preallocation;
use instar_guest::testing::Session;
use instar_guest::{Failure, FailureKind, Reply, Request};
use proptest::prelude::*;
use proptest::test_runner::{Config, RngSeed, TestCaseError, TestRunner};
use std::cell::Cell;

/// Mutations per image.
const CASES: u32 = 400;

type Check = Box<dyn FnOnce() + Send>;

/// All checks by name.
pub fn trials() -> Vec<(String, Check)> {
    IMAGES
        .iter()
        .map(|&(name, options, convert)| {
            let check: Check = Box::new(move || check(options, convert));
            (
                format!("flipped_bits_are_answered_or_refused::{name}"),
                check,
            )
        })
        .collect()
}

/// Options of the first image, and of the image that it is converted to.
const IMAGES: [(&str, &str, &str); 6] = [
    ("small_clusters", "cluster_size=512", ""),
    ("version_2", "compat=0.10,cluster_size=4k", ""),
    ("extended_l2", "extended_l2=on,cluster_size=16k", ""),
    ("refcount_bits_64", "refcount_bits=64,cluster_size=1k", ""),
    ("deflate", "cluster_size=4k", "-c -o cluster_size=4k"),
    (
        "zstd",
        "cluster_size=4k",
        "-c -o cluster_size=4k,compression_type=zstd",
    ),
];

fn image(options: &str, convert: &str) -> Vec<u8> {
    let lab = Lab::new();
    lab.qemu_img(&format!("create -q -f qcow2 -o {options} disk.qcow2 1M"));
    lab.qemu_io(
        "disk.qcow2",
        &["write -P 0x11 0 20k", "write -P 0x22 300k 33k"],
    );
    if !convert.is_empty() {
        lab.qemu_img(&format!("convert -O qcow2 {convert} disk.qcow2 new.qcow2"));
        lab.qemu_img("bitmap --add -g 4096 new.qcow2 b0");
        return lab.bytes("new.qcow2");
    }
    lab.qemu_img("snapshot -c first disk.qcow2");
    lab.qemu_io("disk.qcow2", &["write -z 100k 50k", "write -P 0x33 0 5k"]);
    lab.bytes("disk.qcow2")
}

fn check(options: &str, convert: &str) {
    let image = image(options, convert);
    let hot = hot_bytes(&image);
    let flips = prop::collection::vec((prop::sample::select(hot), 0..8u32), 1..6);
    let mut runner = TestRunner::new(Config {
        cases: CASES,
        failure_persistence: None,
        rng_seed: RngSeed::Fixed(20),
        ..Config::default()
    });
    let refused = Cell::new(0);
    let result = runner.run(&flips, |flips| {
        let mut image = image.clone();
        for (at, bit) in flips {
            image[at] ^= 1 << bit;
        }
        refused.set(refused.get() + u32::from(exercise(image)?));
        Ok(())
    });
    if let Err(error) = result {
        panic!("{error}");
    }
    let refused = refused.get();
    assert!((CASES / 10..CASES).contains(&refused), "{refused} refused");
}

/// Bytes that are worth changing: the header, and whatever is not data.
fn hot_bytes(image: &[u8]) -> Vec<usize> {
    let is_data = |byte: u8| matches!(byte, 0x11 | 0x22 | 0x33);
    (0..image.len())
        .filter(|&at| at < 256 || (image[at] != 0 && !is_data(image[at])))
        .collect()
}

/// Every request on an image. Whether one of them was refused.
fn exercise(image: Vec<u8>) -> Result<bool, TestCaseError> {
    let before = image.clone();
    let mut session = Session::new(image);
    let facts = match session.open(None) {
        Err(failure) => return judge::<()>(Err(failure)),
        Ok(facts) => facts,
    };
    let size = facts.virtual_size;
    let read = judge(session.read(0, size.min(4 << 20)))?;
    let grown = judge(session.call(Request::Resize {
        size: size + (8 << 20),
        preallocation: Preallocation::Off,
        shrink: false,
        backing_size: None,
    }))?;
    let mut placed = false;
    if facts.no_write.is_none() && size > 0 {
        for offset in [0, 128 << 10, 304 << 10] {
            let offset = offset % size / facts.write_unit * facts.write_unit;
            let len = facts.write_unit.min(size - offset);
            placed |= judge(place(&mut session, offset, len))?;
        }
        placed |= judge(session.call(Request::Flush))?;
    }
    prop_assert!(session.host.image == before, "the image has changed");
    for repair in [None, Some(Repair::Leaks), Some(Repair::All)] {
        check_and_repair(&before, repair)?;
    }
    Ok(read | grown | placed)
}

/// A check ends soon, and where its repair leaves nothing, nothing is left.
fn check_and_repair(image: &[u8], repair: Option<Repair>) -> Result<(), TestCaseError> {
    let mut session = Session::new(image.to_vec());
    let Ok((report, reply)) = checking::check(&mut session, repair) else {
        return Ok(());
    };
    let (reads, bytes) = (session.host.reads, session.host.bytes_read);
    prop_assert!(reads < 20_000, "{reads} reads");
    prop_assert!(
        bytes < 64 * image.len() as u64 + (64 << 20),
        "{bytes} bytes read"
    );
    session.host.apply(&reply.plan);
    if repair.is_some() {
        let again = checking::check(&mut session, None);
        let (after, _) = again.map_err(|failure| TestCaseError::fail(failure.message))?;
        let left = |it: Report| it.corruptions + it.leaks + it.check_errors;
        let sound = left(report) > 0 || left(after) == 0;
        prop_assert!(sound, "{report:?} {after:?} {:?}", session.host.findings);
    } else {
        prop_assert!(reply.plan.is_empty());
    }
    Ok(())
}

/// Asks for a place, and again for a wider one where that is the answer.
fn place(session: &mut Session, offset: u64, len: u64) -> Result<Reply, Failure> {
    match session.call(Request::Allocate { offset, len })? {
        Reply::Wider { offset, len } => session.call(Request::Allocate { offset, len }),
        reply => Ok(reply),
    }
}

/// A refusal has a reason that is about the image.
fn judge<T>(answer: Result<T, Failure>) -> Result<bool, TestCaseError> {
    let Err(failure) = answer else {
        return Ok(false);
    };
    prop_assert!(!failure.message.is_empty());
    let about_the_image = match failure.kind {
        FailureKind::Internal | FailureKind::Io => false,
        FailureKind::InvalidRequest => failure.message == "the external data file is not open",
        _ => true,
    };
    prop_assert!(about_the_image, "{failure:?}");
    Ok(true)
}
