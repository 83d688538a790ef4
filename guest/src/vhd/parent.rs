//! The parent of a differencing image: its names and its identity.

use super::footer::{Footer, Kind};
use super::format::{MAX_NAME, header as field};
use super::header::Header;
use super::refuse::damaged;
use crate::bytes;
use crate::engine::{Host, Read};
use crate::error::Failure;
use crate::facts::Backing;
use crate::proto::{FileNo, Format};
use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;

/// The text of a UUID.
pub fn uuid_text(uuid: [u8; 16]) -> String {
    let mut text = String::new();
    for (at, byte) in uuid.iter().enumerate() {
        if matches!(at, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        text.push_str(&format!("{byte:02x}"));
    }
    text
}

/// The parent as a differencing image names it.
pub fn read(
    host: &mut dyn Host,
    footer: &Footer,
    header: &Header,
    file_len: u64,
) -> Result<Option<Backing>, Failure> {
    if footer.kind != Kind::Differencing {
        return Ok(None);
    }
    let raw = header.bytes();
    let located = located_names(host, raw, file_len)?;
    let plain = bytes::slice(raw, field::PARENT_NAME, field::PARENT_NAME_LEN)?;
    let [relative, absolute] = located;
    let mut names = Vec::new();
    for name in [relative, absolute, utf16(plain, u16::from_be_bytes)] {
        offer(&mut names, &name);
    }
    if names.is_empty() {
        return Err(damaged(
            "the image is based on another one and does not name it: the dynamic header has \
             neither a parent name nor a Windows parent locator",
        ));
    }
    let uuid = bytes::slice(raw, field::PARENT_UUID, 16)?;
    Ok(Some(Backing {
        names,
        format: Some(Format::Vhd.name().into()),
        identity: uuid.try_into().ok().map(uuid_text),
    }))
}

/// The names of the relative and of the absolute Windows locator; empty where
/// there is none.
fn located_names(host: &mut dyn Host, raw: &[u8], file_len: u64) -> Result<[String; 2], Failure> {
    let mut found: [Vec<u8>; 2] = [Vec::new(), Vec::new()];
    let mut reads = Vec::new();
    let kinds = [field::RELATIVE, field::ABSOLUTE];
    for (kind, buf) in kinds.into_iter().zip(&mut found) {
        if let Some((offset, len)) = locator(raw, kind, file_len)? {
            *buf = vec![0; len];
            reads.push(Read {
                file: FileNo::IMAGE,
                offset,
                buf,
            });
        }
    }
    if !reads.is_empty() {
        host.read(&mut reads)?;
    }
    Ok(found.map(|name| utf16(&name, u16::from_le_bytes)))
}

/// Where the names of the parent are in the file, as far as they are given.
pub fn located(footer: &Footer, header: &Header) -> Result<Vec<Range<u64>>, Failure> {
    let mut places = Vec::new();
    if footer.kind != Kind::Differencing {
        return Ok(places);
    }
    for number in 0..field::LOCATOR_COUNT {
        let at = field::LOCATORS + number * field::LOCATOR_LEN;
        let entry = bytes::slice(header.bytes(), at, field::LOCATOR_LEN)?;
        let len = bytes::be32(entry, field::LOCATOR_DATA_LEN)?;
        let offset = bytes::be64(entry, field::LOCATOR_OFFSET)?;
        if bytes::be32(entry, field::LOCATOR_PLATFORM)? != 0 && len > 0 {
            places.push(offset..offset.saturating_add(u64::from(len)));
        }
    }
    Ok(places)
}

/// Offset and length of the name that the first locator of a kind leads to.
fn locator(raw: &[u8], kind: &[u8; 4], file_len: u64) -> Result<Option<(u64, usize)>, Failure> {
    for number in 0..field::LOCATOR_COUNT {
        let at = field::LOCATORS + number * field::LOCATOR_LEN;
        let entry = bytes::slice(raw, at, field::LOCATOR_LEN)?;
        if bytes::slice(entry, field::LOCATOR_PLATFORM, 4)? != kind {
            continue;
        }
        let len = bytes::be32(entry, field::LOCATOR_DATA_LEN)?;
        let offset = bytes::be64(entry, field::LOCATOR_OFFSET)?;
        let end = offset.checked_add(u64::from(len));
        if len > MAX_NAME || end.is_none_or(|end| end > file_len) {
            return Err(damaged(format!(
                "parent locator {number} has {len} bytes at {offset:#x}: at most {MAX_NAME} bytes \
                 inside the file are possible"
            )));
        }
        return Ok(Some((offset, len as usize)));
    }
    Ok(None)
}

/// A name in UTF-16, up to its end or a zero; `/` between directories.
fn utf16(raw: &[u8], order: fn([u8; 2]) -> u16) -> String {
    let (units, _) = raw.as_chunks::<2>();
    let units = units.iter().map(|&unit| order(unit));
    let units: Vec<u16> = units.take_while(|&unit| unit != 0).collect();
    String::from_utf16_lossy(&units).replace('\\', "/")
}

/// Adds a name, and for a path of another system the file beside the image.
fn offer(names: &mut Vec<String>, name: &str) {
    let is_windows = name.get(1..3) == Some(":/") || name.starts_with("//");
    let beside = name.rsplit('/').next().filter(|_| is_windows);
    for name in [Some(name), beside].into_iter().flatten() {
        if !name.is_empty() && !names.iter().any(|known| known == name) {
            names.push(name.into());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_offered_once_and_windows_paths_beside_the_image_too() {
        let mut names = Vec::new();
        for name in ["./base.vhd", "C:/vm/base.vhd", "", "base.vhd"] {
            offer(&mut names, name);
        }
        assert_eq!(names, ["./base.vhd", "C:/vm/base.vhd", "base.vhd"]);
    }

    #[test]
    fn utf16_ends_at_a_zero_and_separators_are_slashes() {
        let name = [b'.', 0, b'\\', 0, b'a', 0, 0, 0, b'x', 0];
        assert_eq!(utf16(&name, u16::from_le_bytes), "./a");
        assert_eq!(utf16(&[0, b'a', 0], u16::from_be_bytes), "a");
    }

    #[test]
    fn a_uuid_is_written_as_everywhere() {
        let uuid = core::array::from_fn(|at| at as u8);
        assert_eq!(uuid_text(uuid), "00010203-0405-0607-0809-0a0b0c0d0e0f");
    }
}
