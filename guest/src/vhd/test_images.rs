//! Images of the tests of this folder.

use super::footer::checksum;
use crate::findings::Report;
use crate::proto::{Create, Preallocation};
use crate::testing::{FRESH, Session};
use crate::{Facts, Failure, Format, Reply, Request};
use alloc::string::ToString;
use alloc::vec::Vec;

/// A mebibyte.
pub const M: u64 = 1 << 20;
/// Where things are in a new dynamic image of 8 MiB.
pub const HEADER: usize = 512;
/// See [`HEADER`].
pub const TABLE: usize = 1536;
/// See [`HEADER`].
pub const END: usize = 2048;

/// A new image.
pub fn made(size: u64, options: &[(&str, &str)]) -> Vec<u8> {
    let options = options.iter();
    let create = Create {
        format: Format::Vhd,
        size,
        options: options
            .map(|(key, value)| (key.to_string(), value.to_string()))
            .collect(),
        backing: None,
        backing_size: None,
        backing_identity: None,
    };
    let mut session = Session::default();
    let request = Request::Create {
        create,
        name: "disk.vhd".to_string(),
        fresh: FRESH,
    };
    match session.call(request) {
        Ok(Reply::Plan(reply)) => session.host.apply(&reply.plan),
        other => panic!("not a plan: {other:?}"),
    }
    session.host.image
}

/// A dynamic image of 8 MiB with blocks 0 and 1.
pub fn dynamic() -> Vec<u8> {
    let mut image = made(8 * M, &[("force_size", "on")]);
    let footer = image.split_off(END);
    for block in 0..2u32 {
        let at = image.len();
        image[TABLE + 4 * block as usize..][..4]
            .copy_from_slice(&((at / 512) as u32).to_be_bytes());
        image.resize(at + 512, 0xff);
        image.resize(at + 512 + (2 << 20), 0x11 * (block + 1) as u8);
    }
    image.extend(footer);
    image
}

/// An image of fixed size, 1 MiB.
pub fn fixed() -> Vec<u8> {
    made(M, &[("force_size", "on"), ("subformat", "fixed")])
}

/// Changes bytes of a header or footer, and its checksum.
pub fn put(image: &mut [u8], start: usize, at: usize, data: &[u8]) {
    image[start + at..][..data.len()].copy_from_slice(data);
    let (len, field) = match start == HEADER {
        true => (1024, 36),
        false => (512, 64),
    };
    let sum = checksum(&image[start..start + len], field).unwrap();
    image[start + field..][..4].copy_from_slice(&sum.to_be_bytes());
}

/// Changes both footers alike.
pub fn put_both(image: &mut [u8], at: usize, data: &[u8]) {
    let end = image.len() - 512;
    put(image, 0, at, data);
    put(image, end, at, data);
}

/// The facts, by an opening that changes nothing.
pub fn opened(image: &[u8]) -> Result<Facts, Failure> {
    let mut session = Session::new(image.to_vec());
    let facts = session.open(Some(Format::Vhd));
    assert!(session.host.image == image, "opening changes nothing");
    facts
}

/// The request for another size.
pub fn resize(size: u64) -> Request {
    Request::Resize {
        size,
        preallocation: Preallocation::Off,
        shrink: true,
        backing_size: None,
    }
}

/// What a check finds.
pub fn checked(session: &mut Session) -> Report {
    match session.call(Request::Check { repair: None }) {
        Ok(Reply::Checked { report, .. }) => report,
        other => panic!("not an answer to Check: {other:?}"),
    }
}
