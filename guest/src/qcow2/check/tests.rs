//! The check under little memory: several passes say what one says.

use super::*;
use crate::findings::Finding;
use crate::proto::{Create, Format, Reply, Request};
use crate::testing::{FRESH, MemHost, Session};
use alloc::vec;
use counters::PAGE;

/// An image with clusters of 512 bytes, `clusters` of which hold data.
fn image(clusters: u64) -> Vec<u8> {
    let mut session = Session::default();
    let created = session.call(Request::Create {
        create: Create {
            format: Format::Qcow2,
            size: clusters * 512,
            options: vec![("cluster_size".into(), "512".into())],
            backing: None,
            backing_size: None,
            backing_identity: None,
        },
        name: "disk.qcow2".into(),
        fresh: FRESH,
    });
    apply(&mut session, created);
    session.open(None).unwrap();
    for first in (0..clusters).step_by(8192) {
        let len = (clusters - first).min(8192) * 512;
        let offset = first * 512;
        let placed = session.call(Request::Allocate { offset, len });
        assert!(matches!(placed, Ok(Reply::Placed(_))), "{placed:?}");
        let flushed = session.call(Request::Flush);
        apply(&mut session, flushed);
    }
    session.host.image
}

fn apply(session: &mut Session, reply: Result<Reply, Failure>) {
    let Ok(Reply::Plan(PlanReply { plan, .. })) = reply else {
        panic!("not a plan: {reply:?}");
    };
    session.host.apply(&plan);
}

/// Sums and findings under a memory budget, and how many passes it took.
fn check(image: &[u8], memory: usize) -> (Report, Vec<Finding>, u64) {
    let mut host = MemHost::new(image.to_vec());
    let head = &image[..image.len().min(64 << 10)];
    let qcow2 = Qcow2::open(&mut host, head, image.len() as u64).unwrap();
    let mut check = Check::new(&qcow2, &mut host, None, Tell::default(), memory).unwrap();
    check.check().unwrap();
    let (report, passes) = (check.report(), check.pass);
    let mut tell = core::mem::take(&mut check.tell);
    drop(check);
    tell.flush(&mut host).unwrap();
    host.findings.sort_by(|a, b| a.text.cmp(&b.text));
    (report, host.findings, passes)
}

#[test]
fn several_passes_find_what_one_finds() {
    let mut image = image(60_000);
    let sound = check(&image, COUNTERS);
    assert_eq!(sound.2, 1);
    assert_eq!(sound.1, []);
    assert_eq!(sound.0.allocated_clusters, 60_000);
    // Entries near both ends of the disk change places, two of them to the same
    // cluster, some counts change, and one entry leads out of the file.
    let qcow2 = Qcow2::open(&mut MemHost::default(), &image[..65536], image.len() as u64).unwrap();
    let l1 = qcow2.header.l1;
    let be64 = |image: &[u8], at: usize| crate::bytes::be64(image, at).unwrap();
    let table = |image: &[u8], index: usize| {
        (be64(image, l1.offset.0 as usize + 8 * index) << 8 >> 8) as usize
    };
    let (low, high) = (table(&image, 3), table(&image, 900));
    for at in 0..20 {
        let far = image[high + 8 * at..][..8].to_vec();
        image[low + 8 * at..][..8].copy_from_slice(&far);
    }
    image[high..][..8].copy_from_slice(&(1u64 << 63 | 1 << 50).to_be_bytes());
    let found = check(&image, COUNTERS);
    assert!(
        found.0.corruptions > 20 && found.0.leaks >= 20,
        "{:?}",
        found.0
    );
    for pages in [1, 2] {
        let again = check(&image, pages * PAGE as usize);
        assert_eq!((&again.0, &again.1), (&found.0, &found.1));
        assert!(again.2 > 1, "one pass only");
    }
}

#[test]
fn a_table_that_is_data_too_is_warned_of() {
    let mut image = image(100);
    let mut host = MemHost::new(image.clone());
    let qcow2 = Qcow2::open(&mut host, &image[..1024], image.len() as u64).unwrap();
    let l1 = qcow2.header.l1.offset.0 as usize;
    let offset = |at: usize| crate::bytes::be64(&image, at).unwrap() << 8 >> 8;
    let (first, second) = (offset(l1), offset(l1 + 8));
    image[first as usize..][..8].copy_from_slice(&second.to_be_bytes());
    let (_, findings, _) = check(&image, COUNTERS);
    let text = format!("the L2 table at {second:#x} is in use as something else, too");
    let warnings: Vec<&Finding> = findings
        .iter()
        .filter(|finding| finding.severity == Severity::Warning)
        .collect();
    assert!(
        matches!(warnings[..], [it] if it.text == text),
        "{warnings:?}"
    );
}
