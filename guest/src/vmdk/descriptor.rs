//! The descriptor: a text that names the disk's extents and describes it.
//!
//! Lines end with LF or CRLF. A line is a comment (`#`), an extent
//! (`access sectors type ["file" [offset]]`) or `key = value`, the value perhaps
//! in quotes; keys are case-insensitive and the first of two equal ones counts.
//! What is not known is left alone. Source: "Virtual Disk Format 5.0", section
//! "The Descriptor File".

use super::format::limit;
use super::refuse::{damaged, unsupported};
use crate::error::Failure;
use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::ops::Range;

/// The longest file name in an extent line, in bytes: QEMU reads no longer ones.
const MAX_NAME: usize = 511;

/// Keys that mean something here, in lower case.
const KEYS: [&str; 13] = [
    "cid",
    "parentcid",
    "createtype",
    "parentfilenamehint",
    "changetrackpath",
    "ddb.geometry.cylinders",
    "ddb.geometry.heads",
    "ddb.geometry.sectors",
    "ddb.geometry.bioscylinders",
    "ddb.geometry.biosheads",
    "ddb.geometry.biossectors",
    "ddb.longcontentid",
    "ddb.adaptertype",
];

/// What may be done with an extent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Read and write.
    ReadWrite,
    /// Read.
    ReadOnly,
}

/// How an extent's bytes lie in its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExtentType {
    /// As they are, from an offset on.
    Flat,
    /// As they are, in a file of an ESX host.
    Vmfs,
    /// In a hosted sparse extent.
    Sparse,
    /// Nowhere: zeroes.
    Zero,
}

impl ExtentType {
    /// The word of the extent line.
    pub fn word(self) -> &'static str {
        match self {
            Self::Flat => "FLAT",
            Self::Vmfs => "VMFS",
            Self::Sparse => "SPARSE",
            Self::Zero => "ZERO",
        }
    }
}

/// An extent line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExtentLine {
    /// What may be done with it.
    pub access: Access,
    /// Its length in sectors, never 0.
    pub sectors: u64,
    /// How its bytes lie.
    pub kind: ExtentType,
    /// The file's name as it stands in the text (lossy); empty for zeroes.
    pub name: String,
    /// Sector of the file at which a flat extent begins.
    pub offset: u64,
    /// Where the number of sectors stands in the text.
    pub sectors_at: Range<usize>,
    /// Where the line stands in the text, its end included.
    pub line_at: Range<usize>,
}

/// A descriptor that has been read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// The text, without the zeroes behind it.
    pub text: Vec<u8>,
    /// What the disk's content is told by; changes with it.
    pub cid: u32,
    /// [`cid`](Self::cid) of the parent, all ones for none.
    pub parent_cid: u32,
    /// What kind of image it is.
    pub create_type: String,
    /// The extents in the order of the disk.
    pub extents: Vec<ExtentLine>,
    values: BTreeMap<&'static str, Range<usize>>,
}

impl Descriptor {
    /// Reads a descriptor; the text ends before the first zero byte.
    pub fn parse(area: &[u8]) -> Result<Self, Failure> {
        let text = area.split(|&byte| byte == 0).next().unwrap_or_default();
        if text.len() as u64 > limit::MAX_DESCRIPTOR {
            return Err(damaged(format!(
                "the descriptor is {} bytes long, at most {} are possible",
                text.len(),
                limit::MAX_DESCRIPTOR
            )));
        }
        let mut descriptor = Self {
            text: text.to_vec(),
            cid: 0,
            parent_cid: 0,
            create_type: String::new(),
            extents: Vec::new(),
            values: BTreeMap::new(),
        };
        let mut at = 0;
        for line in text.split_inclusive(|&byte| byte == b'\n') {
            descriptor.line(at, line)?;
            at += line.len();
        }
        descriptor.create_type = descriptor
            .value("createtype")
            .ok_or_else(|| damaged("invalid VMDK image descriptor: createType is missing"))?;
        descriptor.cid = descriptor.content_id("CID")?;
        descriptor.parent_cid = descriptor.content_id("parentCID")?;
        Ok(descriptor)
    }

    /// Takes note of one line, which begins at `at`.
    fn line(&mut self, at: usize, line: &[u8]) -> Result<(), Failure> {
        let mut words = Words { line, at: 0 };
        let Some(first) = words.next_word() else {
            return Ok(());
        };
        match words.get(&first) {
            word if word.starts_with(b"#") => Ok(()),
            b"RW" => self.extent(at, words, Access::ReadWrite),
            b"RDONLY" => self.extent(at, words, Access::ReadOnly),
            b"NOACCESS" => Err(unsupported(
                "an extent line of the descriptor says NOACCESS",
            )),
            _ => {
                self.key_and_value(at, line);
                Ok(())
            }
        }
    }

    fn key_and_value(&mut self, at: usize, line: &[u8]) {
        let Some(equals) = line.iter().position(|&byte| byte == b'=') else {
            return;
        };
        let key = line.get(..equals).unwrap_or_default().trim_ascii();
        let Some(key) = KEYS
            .iter()
            .find(|known| key.eq_ignore_ascii_case(known.as_bytes()))
        else {
            return;
        };
        let value = line.get(equals + 1..).unwrap_or_default();
        let blank = value.len() - value.trim_ascii_start().len();
        let mut start = equals + 1 + blank;
        let mut value = value.trim_ascii();
        if let Some(quoted) = value.strip_prefix(b"\"") {
            start += 1;
            value = quoted
                .split(|&byte| byte == b'"')
                .next()
                .unwrap_or_default();
        }
        let range = at + start..at + start + value.len();
        self.values.entry(key).or_insert(range);
    }

    fn extent(&mut self, at: usize, mut words: Words<'_>, access: Access) -> Result<(), Failure> {
        let line = words.line;
        let refuse = |why: &str| {
            damaged(format!(
                "Invalid extent line: {} ({why})",
                String::from_utf8_lossy(line.trim_ascii())
            ))
        };
        let count = words.next_word().unwrap_or_default();
        let sectors = number(words.get(&count)).ok_or_else(|| refuse("no number of sectors"))?;
        if sectors == 0 || sectors > i64::MAX as u64 / 512 {
            return Err(refuse("impossible number of sectors"));
        }
        let word = words.next_word().unwrap_or_default();
        let kind = match words.get(&word) {
            b"FLAT" => ExtentType::Flat,
            b"VMFS" => ExtentType::Vmfs,
            b"SPARSE" => ExtentType::Sparse,
            b"ZERO" => ExtentType::Zero,
            b"VMFSSPARSE" | b"SESPARSE" | b"VMFSRDM" | b"VMFSRAW" => {
                return Err(unsupported(format!(
                    "an extent is of type {}, which is not supported",
                    String::from_utf8_lossy(words.get(&word))
                )));
            }
            _ => return Err(refuse("unknown type")),
        };
        let name_at = match kind {
            ExtentType::Zero => 0..0,
            _ => words.quoted().ok_or_else(|| refuse("no file name"))?,
        };
        if kind != ExtentType::Zero && !(1..=MAX_NAME).contains(&name_at.len()) {
            return Err(refuse("a file name that is empty or too long"));
        }
        let offset = words.next_word();
        let offset = match (kind, offset) {
            (ExtentType::Flat, Some(word)) => number(words.get(&word))
                .filter(|&sector| sector <= i64::MAX as u64 / 512 - sectors)
                .ok_or_else(|| refuse("impossible offset"))?,
            (ExtentType::Flat, None) => return Err(refuse("no offset")),
            (_, None) => 0,
            (_, Some(_)) => return Err(refuse("an offset where none is possible")),
        };
        if self.extents.len() == limit::MAX_EXTENTS {
            return Err(unsupported(format!(
                "the descriptor has more than {} extents",
                limit::MAX_EXTENTS
            )));
        }
        let shift = |range: Range<usize>| at + range.start..at + range.end;
        self.extents.push(ExtentLine {
            access,
            sectors,
            kind,
            name: String::from_utf8_lossy(words.get(&name_at)).into_owned(),
            offset,
            sectors_at: shift(count),
            line_at: at..at + line.len(),
        });
        Ok(())
    }

    fn content_id(&self, key: &str) -> Result<u32, Failure> {
        let text = self
            .value(&key.to_ascii_lowercase())
            .ok_or_else(|| damaged(format!("invalid VMDK image descriptor: {key} is missing")))?;
        u32::from_str_radix(&text, 16).map_err(|_| {
            damaged(format!(
                "invalid VMDK image descriptor: {key} is '{text}', not a hexadecimal number of 32 \
                 bits"
            ))
        })
    }

    /// Where the value of a key (in lower case) stands in the text.
    pub fn value_at(&self, key: &str) -> Option<Range<usize>> {
        self.values.get(key).cloned()
    }

    /// The value of a key (in lower case).
    pub fn value(&self, key: &str) -> Option<String> {
        let text = self.text.get(self.value_at(key)?)?;
        Some(String::from_utf8_lossy(text).into_owned())
    }

    /// The value of a key (in lower case) that is a number.
    pub fn number(&self, key: &str) -> Option<u64> {
        number(self.text.get(self.value_at(key)?)?)
    }

    /// The name of the parent image, if one is named.
    pub fn parent(&self) -> Option<String> {
        self.value("parentfilenamehint")
            .filter(|name| !name.is_empty())
    }
}

/// A decimal number.
fn number(digits: &[u8]) -> Option<u64> {
    if !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    core::str::from_utf8(digits).ok()?.parse().ok()
}

/// The words of a line, by their places.
struct Words<'a> {
    line: &'a [u8],
    at: usize,
}

impl<'a> Words<'a> {
    fn get(&self, range: &Range<usize>) -> &'a [u8] {
        self.line.get(range.clone()).unwrap_or_default()
    }

    fn skip_blanks(&mut self) {
        let rest = self.line.get(self.at..).unwrap_or_default();
        self.at += rest.len() - rest.trim_ascii_start().len();
    }

    /// The next word, up to white space.
    fn next_word(&mut self) -> Option<Range<usize>> {
        self.skip_blanks();
        let rest = self.line.get(self.at..)?;
        let len = rest
            .iter()
            .position(u8::is_ascii_whitespace)
            .unwrap_or(rest.len());
        let range = self.at..self.at + len;
        self.at = range.end;
        (len > 0).then_some(range)
    }

    /// The next text in quotes, without them.
    fn quoted(&mut self) -> Option<Range<usize>> {
        self.skip_blanks();
        let rest = self.line.get(self.at..)?.strip_prefix(b"\"")?;
        let len = rest.iter().position(|&byte| byte == b'"')?;
        let start = self.at + 1;
        self.at = start + len + 1;
        Some(start..start + len)
    }
}
