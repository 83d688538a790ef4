//! Writing inside VHDX images as the host does it, judged by qemu-img; and real
//! images with some bits flipped.

use crate::disk::Random;
use crate::lab::{Check, Lab, purposes};
use crate::vhdx_lab::{M, assert_same, create, open, plan, raw, resize, scatter};
use instar_guest::plan::Purpose;
use instar_guest::proto::{Content, Place, Preallocation};
use instar_guest::testing::Session;
use instar_guest::{ExtentKind, Failure, FailureKind, Format, Reply, Request, Step};

/// All checks by name.
pub fn trials() -> Vec<(String, Check)> {
    let written = WRITTEN.iter().map(|&(options, size)| {
        let name = format!("vhdx_holds_what_was_written::{size}_{options}");
        (name, Box::new(move || holds(options, size)) as Check)
    });
    let one = |name: &str, check: fn()| (name.to_string(), Box::new(check) as Check);
    written
        .chain([
            one("vhdx_flushes_data_before_what_refers_to_it", order),
            one("vhdx_takes_an_allocation_back", takes_back),
            one("vhdx_flipped_bits_are_answered_or_refused", flips),
        ])
        .collect()
}

/// Options and size of images that are written to.
const WRITTEN: &[(&str, u64)] = &[
    ("block_size=1M", 20 * M + 512),
    ("block_size=2M,block_state_zero=off", 20 * M),
    (
        "subformat=fixed,block_state_zero=off,block_size=2M",
        5 * M / 2,
    ),
    ("subformat=fixed", 20 * M),
];

fn allocate(session: &mut Session, offset: u64, len: u64) -> Vec<Place> {
    let request = || Request::Allocate { offset, len };
    let mut reply = session.call(request());
    if let Err(FailureKind::FlushFirst) = reply.as_ref().map_err(|failure| failure.kind) {
        flush(session);
        reply = session.call(request());
    }
    match reply.unwrap() {
        Reply::Placed(places) => places,
        other => panic!("not placed: {other:?}"),
    }
}

/// Writes whole sectors as the host does.
fn write(session: &mut Session, offset: u64, data: &[u8]) {
    let mut done = 0;
    for place in allocate(session, offset, data.len() as u64) {
        assert_eq!(place.offset, offset + done);
        let piece = &data[done as usize..][..place.len as usize];
        if place.content == Content::Zero {
            let image = &session.host.image;
            let old = image.get(place.at as usize..).unwrap_or(&[]);
            let old = &old[..old.len().min(place.len as usize)];
            assert!(
                old.iter().all(|&byte| byte == 0),
                "not zero at {:#x}",
                place.at
            );
        }
        session.host.step(&Step::Write {
            file: place.file,
            offset: place.at,
            data: piece.to_vec(),
        });
        done += place.len;
    }
    assert_eq!(done, data.len() as u64);
}

fn flush(session: &mut Session) {
    let reply = plan(session.call(Request::Flush).unwrap());
    assert!(
        reply
            .plan
            .stages
            .iter()
            .all(|stage| stage.purpose != Purpose::Commit)
    );
    session.host.apply(&reply.plan);
}

fn holds(options: &str, size: u64) {
    let lab = Lab::new();
    create(&lab, options, size);
    scatter(&lab, size / 2 / 512 * 512, 6, 9);
    let mut expected = raw(&lab);
    let mut session = open(&lab);
    assert_eq!(session.open(None).unwrap().no_write, None);
    let mut random = Random(size);
    for round in 0..6 {
        for _ in 0..6 {
            let at = random.below(size / 512) * 512;
            let len = ((1 + random.below(5000)) * 512).min(size - at);
            let data = vec![1 + random.below(255) as u8; len as usize];
            write(&mut session, at, &data);
            expected[at as usize..][..data.len()].copy_from_slice(&data);
            let seen = session.read(at, len).unwrap();
            assert_same(&seen, &data, "what was just written");
        }
        flush(&mut session);
        if round % 2 == 0 {
            continue;
        }
        lab.write("disk.vhdx", &session.host.image);
        lab.qemu_img("check -f vhdx disk.vhdx");
        assert_same(&raw(&lab), &expected, "content after a flush");
        session.open(None).unwrap();
    }
    let reply = resize(&mut session, size + 4 * M, Preallocation::Off, false).unwrap();
    session.host.apply(&reply.plan);
    lab.write("disk.vhdx", &session.host.image);
    lab.qemu_img("check -f vhdx disk.vhdx");
    expected.resize(expected.len() + 4 * M as usize, 0);
    assert_same(&raw(&lab), &expected, "content after a grow");
}

/// New identifiers and the file's length first, entries last; once only.
fn order() {
    let lab = Lab::new();
    create(&lab, "block_size=1M", 8 * M);
    let mut session = open(&lab);
    let identity = session.open(None).unwrap().identity;
    let in_place = |session: &mut Session| {
        let extents = session.map(0, 512).unwrap();
        matches!(extents[0].kind, ExtentKind::Data { in_place: true, .. })
    };
    let refused = session.call(Request::Allocate {
        offset: 0,
        len: 512,
    });
    assert_eq!(refused.unwrap_err().kind, FailureKind::FlushFirst);
    assert!(!in_place(&mut session), "before the identifiers are new");
    let identifiers = plan(session.call(Request::Flush).unwrap());
    assert_eq!(identifiers.plan.stages.len(), 1);
    session.host.apply(&identifiers.plan);
    write(&mut session, 0, &[1; 512]);
    let reply = plan(session.call(Request::Flush).unwrap());
    assert_eq!(purposes(&reply.plan), [Purpose::Prepare, Purpose::Link]);
    let [Step::Write { offset, data, .. }] = &reply.plan.stages[1].steps[..] else {
        panic!("not one entry");
    };
    assert_eq!((*offset, data.len()), (2 << 20, 8));
    session.host.apply(&reply.plan);
    assert!(in_place(&mut session));
    write(&mut session, 4 * M, &[1; 1024]);
    let reply = plan(session.call(Request::Flush).unwrap());
    assert_eq!(reply.plan.stages.len(), 2);
    session.host.apply(&reply.plan);
    assert!(plan(session.call(Request::Flush).unwrap()).plan.is_empty());
    assert_ne!(session.open(None).unwrap().identity, identity);
}

fn takes_back() {
    let lab = Lab::new();
    create(&lab, "block_size=1M", 8 * M);
    let mut session = open(&lab);
    let [first] = allocate(&mut session, 0, 512)[..] else {
        panic!("not one place");
    };
    session.call(Request::Undo).unwrap();
    let extents = session.map(0, 512).unwrap();
    assert_eq!(extents[0].kind, ExtentKind::Zero { at: None });
    let refused = session.call(Request::Undo).unwrap_err();
    assert_eq!(refused.kind, FailureKind::InvalidRequest);
    // What of the data has reached the file is not handed out as zeroes.
    let [second] = allocate(&mut session, 0, 512)[..] else {
        panic!("not one place");
    };
    assert!(second.at >= first.at + M);
}

/// Each request on an image in which bits are flipped is answered or refused.
fn flips() {
    let lab = Lab::new();
    create(&lab, "block_size=1M", 5 * M);
    scatter(&lab, 3 * M, 6, 4);
    let mut session = open(&lab);
    let shrink = resize(&mut session, 2 * M, Preallocation::Off, true).unwrap();
    let whole = session.host.image.clone();
    for stage in &shrink.plan.stages[..4] {
        stage.steps.iter().for_each(|step| session.host.step(step));
    }
    let mut random = Random(77);
    let mut refused = 0;
    for image in [whole, session.host.image.clone()] {
        let hot: Vec<usize> = (0..5 << 20).filter(|&at| image[at] != 0).collect();
        for _ in 0..60 {
            let mut damaged = image.clone();
            for _ in 0..=random.below(3) {
                let at = hot[random.below(hot.len() as u64) as usize];
                damaged[at] ^= 1 << random.below(8);
                reseal(&mut damaged, at);
            }
            refused += u32::from(exercise(damaged).is_err());
        }
    }
    assert!((12..120).contains(&refused), "{refused} refused");
}

/// Makes the checksum of a header or region table right again, so that what it
/// says is looked at.
fn reseal(image: &mut [u8], at: usize) {
    let found = [
        (64 << 10, 4096),
        (128 << 10, 4096),
        (192 << 10, 65536),
        (256 << 10, 65536),
    ]
    .into_iter()
    .find(|&(start, len)| (start..start + len).contains(&at));
    let Some((start, len)) = found else {
        return;
    };
    image[start + 4..start + 8].fill(0);
    let mut crc = !0u32;
    for byte in &image[start..start + len] {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = crc >> 1 ^ if crc & 1 == 1 { 0x82f6_3b78 } else { 0 };
        }
    }
    image[start + 4..start + 8].copy_from_slice(&(!crc).to_le_bytes());
}

fn exercise(image: Vec<u8>) -> Result<(), ()> {
    let judge = |failure: instar_guest::Failure| {
        let kind = failure.kind;
        assert!(!failure.message.is_empty());
        assert!(
            !matches!(kind, FailureKind::Internal | FailureKind::Io),
            "{failure:?}"
        );
    };
    let before = image.clone();
    let mut session = Session::new(image);
    let facts = session.open(Some(Format::Vhdx)).map_err(judge)?;
    let size = facts.virtual_size;
    let mut bad = session.read(0, size.min(6 << 20)).map_err(judge).is_err();
    bad |= session
        .call(Request::Check { repair: None })
        .map_err(judge)
        .is_err();
    bad |= session.call(Request::Settle).map_err(judge).is_err();
    for (size, shrink) in [(9 * M, false), (M, true)] {
        let resized = resize(&mut session, size, Preallocation::Off, shrink);
        bad |= resized.map_err(judge).is_err();
    }
    if size >= M {
        let allocated = session.call(Request::Allocate { offset: 0, len: M });
        let first = |failure: &Failure| failure.kind == FailureKind::FlushFirst;
        bad |= !allocated.as_ref().is_err_and(first) && allocated.map_err(judge).is_err();
        bad |= session.call(Request::Flush).map_err(judge).is_err();
    }
    if session.host.streamed.is_empty() {
        assert!(session.host.image == before, "the image has changed");
    }
    if bad { Err(()) } else { Ok(()) }
}
