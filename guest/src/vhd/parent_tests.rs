//! Differencing images.

use super::test_images::{END, HEADER, M, checked, dynamic, opened, put, put_both};
use crate::testing::Session;
use alloc::vec;
use alloc::vec::Vec;

/// A differencing image over a parent of 4 MiB: sector 1 of block 0 is here.
fn differencing(locators: &[(&[u8; 4], &str)]) -> Vec<u8> {
    let mut image = dynamic();
    put_both(&mut image, 60, &[0, 0, 0, 4]);
    let mut bitmap = vec![0; 512];
    bitmap[0] = 0x40;
    image[END..END + 512].copy_from_slice(&bitmap);
    put(&mut image, HEADER, 40, &[7; 16]);
    let name: Vec<u8> = "parent.vhd"
        .encode_utf16()
        .flat_map(u16::to_be_bytes)
        .collect();
    put(&mut image, HEADER, 64, &name);
    for (number, (kind, name)) in locators.iter().enumerate() {
        let footer = image.split_off(image.len() - 512);
        let at = image.len() as u64;
        let name: Vec<u8> = name.encode_utf16().flat_map(u16::to_le_bytes).collect();
        let mut locator = kind.to_vec();
        locator.extend(512u32.to_be_bytes());
        locator.extend((name.len() as u32).to_be_bytes());
        locator.extend([0; 4]);
        locator.extend(at.to_be_bytes());
        image.extend(name);
        image.resize(at as usize + 512, 0);
        image.extend(footer);
        put(&mut image, HEADER, 576 + 24 * number, &locator);
    }
    image
}

#[test]
fn a_differencing_image_names_its_parent_and_has_single_sectors() {
    use crate::ExtentKind::{Data, Unallocated};
    let image = differencing(&[(b"W2ku", "C:\\vm\\base.vhd"), (b"W2ru", ".\\base.vhd")]);
    let mut session = Session::new(image);
    let facts = session.open(None).unwrap();
    let backing = facts.backing.unwrap();
    let names = ["./base.vhd", "C:/vm/base.vhd", "base.vhd", "parent.vhd"];
    assert_eq!(backing.names, names);
    assert_eq!(backing.format.as_deref(), Some("vpc"));
    let uuid = "07070707-0707-0707-0707-070707070707";
    assert_eq!(backing.identity.as_deref(), Some(uuid));
    let kinds: Vec<_> = session.map(0, 8 * M).unwrap();
    let kinds: Vec<_> = kinds
        .iter()
        .map(|extent| match extent.kind {
            Data { at, .. } => (extent.offset, extent.len, Some(at)),
            Unallocated { .. } => (extent.offset, extent.len, None),
            other => panic!("{other:?}"),
        })
        .collect();
    let block_0 = END as u64 + 512;
    let expected = [
        (0, 512, None),
        (512, 512, Some(block_0 + 512)),
        (1024, 2 * M - 1024, None),
        (2 * M, 2 * M, Some(block_0 + 2 * M + 512)),
        (4 * M, 4 * M, None),
    ];
    assert_eq!(kinds, expected);
    assert_eq!(checked(&mut session).corruptions, 0);
}

#[test]
pub(super) fn a_parent_without_a_name_or_with_one_that_is_too_long_is_refused() {
    let mut image = differencing(&[]);
    put(&mut image, HEADER, 64, &[0, 0]);
    let failure = opened(&image).unwrap_err();
    assert!(failure.message.contains("does not name it"), "{failure}");
    let mut image = differencing(&[(b"W2ru", "a")]);
    put(&mut image, HEADER, 576 + 8, &[0, 1, 0, 0]);
    let failure = opened(&image).unwrap_err();
    assert!(
        failure.message.contains("parent locator 0 has 65536 bytes"),
        "{failure}"
    );
}

#[test]
fn a_footer_that_is_written_again_spares_the_name_of_the_parent() {
    let mut image = differencing(&[(b"W2ru", "a.vhd")]);
    image.truncate(image.len() - 512);
    let before = image.clone();
    let mut session = Session::new(image);
    session.open(None).unwrap();
    match session.call(crate::Request::Settle) {
        Ok(crate::Reply::Plan(reply)) => session.host.apply(&reply.plan),
        other => panic!("not a plan: {other:?}"),
    }
    assert!(session.host.image[..before.len()] == before);
    assert_eq!(session.host.image.len(), before.len() + 512);
}
