//! VHD images with some bits flipped: every request is answered or refused with
//! a reason; nothing panics, hangs or claims a defect of the engine.

use crate::disk::Random;
use crate::lab::{Check, Lab};
use crate::vhd_lab::{M, qemu_io, seal};
use instar_guest::findings::Repair;
use instar_guest::proto::Preallocation;
use instar_guest::testing::Session;
use instar_guest::{Failure, FailureKind, Format, Request};

/// Mutations per image.
const CASES: u64 = 250;

/// All checks by name.
pub fn trials() -> Vec<(String, Check)> {
    [("dynamic", ""), ("fixed", "-o subformat=fixed")]
        .into_iter()
        .map(|(name, options)| {
            let check: Check = Box::new(move || check(options));
            (
                format!("vhd_flipped_bits_are_answered_or_refused::{name}"),
                check,
            )
        })
        .collect()
}

fn check(options: &str) {
    let lab = Lab::new();
    lab.qemu_img(&format!("create -q -f vpc {options} disk.vhd 5M"));
    let writes = ["write -P 1 0 8k", "write -P 2 4500k 8k"].map(str::to_string);
    qemu_io(&lab, &writes);
    let image = lab.bytes("disk.vhd");
    let end = image.len() - 512;
    // Footers up to the saved state, the header's numbers, the table.
    let hot = (0..86).chain(512..560).chain(1088..1120).chain(1536..1552);
    let hot: Vec<usize> = hot.chain(end..end + 86).collect();
    let mut random = Random(options.len() as u64 + 99);
    let mut refused = 0;
    for case in 0..CASES {
        let mut image = image.clone();
        for _ in 0..1 + random.below(4) {
            let at = hot[random.below(hot.len() as u64) as usize];
            image[at] ^= 1 << random.below(8);
        }
        if case % 4 > 0 {
            seal(&mut image[end..], 64);
            if options.is_empty() {
                seal(&mut image[..512], 64);
                seal(&mut image[512..1536], 36);
            }
        }
        refused += u64::from(exercise(image));
    }
    assert!((CASES / 10..CASES).contains(&refused), "{refused} refused");
}

/// Every request on an image. Whether one of them was refused.
fn exercise(image: Vec<u8>) -> bool {
    let before = image.clone();
    let mut session = Session::new(image);
    let facts = match session.open(Some(Format::Vhd)) {
        Err(failure) => return judge::<()>(Err(failure)),
        Ok(facts) => facts,
    };
    let size = facts.virtual_size;
    let mut refused = judge(session.map(0, size.min(64 * M)));
    for (size, preallocation) in [
        (size / 1024 * 512, Preallocation::Off),
        (size + 8 * M, Preallocation::Metadata),
        (size + 300 * M, Preallocation::Off),
    ] {
        refused |= judge(session.call(Request::Resize {
            size,
            preallocation,
            shrink: true,
            backing_size: None,
        }));
    }
    for repair in [None, Some(Repair::Leaks), Some(Repair::All)] {
        refused |= judge(session.call(Request::Check { repair }));
    }
    refused |= judge(session.call(Request::Settle));
    if facts.no_write.is_none() && size >= 1024 {
        let offset = size / 1024 * 512;
        let placed = session.call(Request::Allocate { offset, len: 512 });
        let first = |failure: &Failure| failure.kind == instar_guest::FailureKind::FlushFirst;
        refused |= !placed.as_ref().is_err_and(first) && judge(placed);
        refused |= judge(session.call(Request::Flush));
    }
    assert!(session.host.image == before, "the image has changed");
    refused
}

/// A refusal has a reason that is about the image.
fn judge<T>(answer: Result<T, Failure>) -> bool {
    let Err(failure) = answer else {
        return false;
    };
    assert!(!failure.message.is_empty());
    let ours = matches!(failure.kind, FailureKind::Internal | FailureKind::Io);
    assert!(!ours, "{failure:?}");
    true
}
