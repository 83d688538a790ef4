//! Changes to a descriptor: single values and lines; every other byte stays as
//! it is, known or not.

use super::descriptor::{Descriptor, ExtentLine};
use super::refuse::unsupported;
use crate::error::Failure;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::ops::Range;

/// Changes to a descriptor, collected.
pub struct Edit<'a> {
    descriptor: &'a Descriptor,
    changes: Vec<(Range<usize>, Vec<u8>)>,
}

impl<'a> Edit<'a> {
    /// No changes yet.
    pub fn new(descriptor: &'a Descriptor) -> Self {
        Self {
            descriptor,
            changes: Vec::new(),
        }
    }

    fn replace(&mut self, at: Range<usize>, text: impl Into<Vec<u8>>) {
        self.changes.push((at, text.into()));
    }

    /// The content has changed: another CID, also where the long one ends with
    /// it.
    pub fn set_cid(&mut self, cid: u32) {
        if let Some(at) = self.descriptor.value_at("cid") {
            self.replace(at, format!("{cid:08x}"));
        }
        if let Some(at) = self.descriptor.value_at("ddb.longcontentid")
            && at.len() >= 8
        {
            self.replace(at.end - 8..at.end, format!("{cid:08x}"));
        }
    }

    /// The disk is `sectors` long now: the geometry's cylinders follow, heads and
    /// sectors stay.
    pub fn set_geometry(&mut self, sectors: u64) {
        for prefix in ["ddb.geometry.", "ddb.geometry.bios"] {
            let number = |key: &str| self.descriptor.number(&format!("{prefix}{key}"));
            let at = self.descriptor.value_at(&format!("{prefix}cylinders"));
            let per_cylinder = number("heads")
                .and_then(|heads| heads.checked_mul(number("sectors")?))
                .filter(|&count| count > 0);
            if let (Some(at), Some(per_cylinder)) = (at, per_cylinder) {
                self.replace(at, format!("{}", sectors / per_cylinder));
            }
        }
    }

    /// An extent is `sectors` long now.
    pub fn set_sectors(&mut self, extent: &ExtentLine, sectors: u64) {
        self.replace(extent.sectors_at.clone(), format!("{sectors}"));
    }

    /// An extent is no longer there.
    pub fn remove(&mut self, extent: &ExtentLine) {
        self.replace(extent.line_at.clone(), "");
    }

    /// Lines for extents behind the last one; each without its end.
    pub fn append(&mut self, lines: &[String]) -> Result<(), Failure> {
        let text = &self.descriptor.text;
        let before = match self.descriptor.extents.last() {
            Some(extent) => Some(extent.line_at.clone()),
            None => heading(text),
        };
        let Some(before) = before else {
            return Err(unsupported(
                "the descriptor has neither extents nor a place for them",
            ));
        };
        let line = text.get(before.clone()).unwrap_or_default();
        let end = match line {
            [.., b'\r', b'\n'] => "\r\n",
            _ => "\n",
        };
        let mut new = String::new();
        if !line.ends_with(b"\n") {
            new.push_str(end);
        }
        for line in lines {
            new.push_str(line);
            new.push_str(end);
        }
        self.replace(before.end..before.end, new);
        Ok(())
    }

    /// The changed text.
    pub fn finish(mut self) -> Vec<u8> {
        self.changes
            .sort_by_key(|(range, _)| (range.start, range.end));
        let old = &self.descriptor.text;
        let mut new = Vec::with_capacity(old.len() + 64);
        let mut at = 0;
        for (range, text) in self.changes {
            new.extend_from_slice(old.get(at..range.start).unwrap_or_default());
            new.extend_from_slice(&text);
            at = range.end;
        }
        new.extend_from_slice(old.get(at..).unwrap_or_default());
        new
    }
}

/// The comment under which extents stand.
fn heading(text: &[u8]) -> Option<Range<usize>> {
    let mut at = 0;
    for line in text.split_inclusive(|&byte| byte == b'\n') {
        let range = at..at + line.len();
        if line
            .trim_ascii()
            .eq_ignore_ascii_case(b"# Extent description")
        {
            return Some(range);
        }
        at = range.end;
    }
    None
}
