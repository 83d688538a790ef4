//! The parent locator: how a differencing image names its parent.

use super::format::locator as on_disk;
use super::guid::Guid;
use super::refuse::{damaged, unsupported};
use crate::bytes::{self, le16, le32};
use crate::error::Failure;
use crate::facts::Backing;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

/// The keys that name the parent, in the order in which they are tried.
const NAMES: [&str; 3] = ["relative_path", "volume_path", "absolute_win32_path"];

/// The parent that a locator names.
pub fn parent(bytes: &[u8]) -> Result<Backing, Failure> {
    let pairs = decode(bytes)?;
    let value = |key: &str| {
        let found = pairs.iter().find(|(name, _)| name == key);
        found.map(|(_, value)| value.as_str())
    };
    let linkage = value("parent_linkage")
        .ok_or_else(|| damaged("the parent locator has no key 'parent_linkage'"))?;
    let identity = Guid::parse(linkage).ok_or_else(|| {
        damaged(format!(
            "the parent locator's 'parent_linkage' is no identifier: '{linkage}'"
        ))
    })?;
    let names = candidates(NAMES.iter().filter_map(|key| value(key)));
    if names.is_empty() {
        return Err(damaged("the parent locator names no file"));
    }
    Ok(Backing {
        names,
        format: Some("vhdx".into()),
        identity: Some(identity.to_string()),
    })
}

/// The names to try: as they stand, with `/` between directories; then the last
/// components alone, as the files may lie beside each other.
fn candidates<'a>(paths: impl Iterator<Item = &'a str>) -> Vec<String> {
    let paths: Vec<String> = paths
        .map(|path| path.replace('\\', "/"))
        .map(|path| path.strip_prefix("./").unwrap_or(&path).to_string())
        .filter(|path| !path.is_empty())
        .collect();
    let last = |path: &String| path.rsplit('/').next().unwrap_or("").to_string();
    let files: Vec<String> = paths.iter().map(last).collect();
    let mut names = Vec::new();
    for name in paths.into_iter().chain(files) {
        if !name.is_empty() && !names.contains(&name) {
            names.push(name);
        }
    }
    names
}

/// The pairs of a locator.
fn decode(bytes: &[u8]) -> Result<Vec<(String, String)>, Failure> {
    if bytes.len() < on_disk::ENTRIES {
        return Err(damaged(format!(
            "the parent locator is {} bytes long, less than its header",
            bytes.len()
        )));
    }
    let mut kind = Guid::ZERO;
    kind.0.copy_from_slice(bytes::slice(bytes, 0, 16)?);
    if kind != on_disk::KIND {
        return Err(unsupported(format!(
            "the parent locator is of the kind {kind}, which is not known; merge the image into \
             its parent with the program that wrote it"
        )));
    }
    let count = le16(bytes, on_disk::COUNT)?;
    let mut pairs = Vec::new();
    for index in 0..usize::from(count) {
        let at = on_disk::ENTRIES + index * on_disk::ENTRY_LEN;
        let entry = bytes::slice(bytes, at, on_disk::ENTRY_LEN)
            .map_err(|_| past_end(index, "its entry"))?;
        let text = |offset: usize, len: usize, what| {
            let (offset, len) = (le32(entry, offset)?, le16(entry, len)?);
            bytes::slice(bytes, offset as usize, usize::from(len))
                .map(decode_utf16)
                .map_err(|_| past_end(index, what))
        };
        pairs.push((text(0, 8, "its key")?, text(4, 10, "its value")?));
    }
    Ok(pairs)
}

fn past_end(index: usize, what: &str) -> Failure {
    damaged(format!(
        "parent locator, pair {index}: {what} lies past the locator's end"
    ))
}

fn decode_utf16(bytes: &[u8]) -> String {
    let (units, _) = bytes.as_chunks::<2>();
    let units: Vec<u16> = units.iter().map(|unit| u16::from_le_bytes(*unit)).collect();
    String::from_utf16_lossy(&units)
}
