//! Extents under construction: neighbours of one kind become one.

use crate::proto::{Extent, ExtentKind, MAX_EXTENTS};
use alloc::vec::Vec;

/// See the module.
#[derive(Debug, Default)]
pub struct Extents {
    /// The extents so far.
    pub list: Vec<Extent>,
}

impl Extents {
    /// Whether `more` further extents might not fit.
    pub fn is_full(&self, more: usize) -> bool {
        self.list.len() + more > MAX_EXTENTS
    }

    /// Guest offset of the first byte behind them.
    pub fn end(&self) -> Option<u64> {
        self.list.last().map(|extent| extent.offset + extent.len)
    }

    /// Adds an extent behind the last.
    pub fn push(&mut self, offset: u64, len: u64, kind: ExtentKind) {
        if len == 0 {
            return;
        }
        if let Some(last) = self.list.last_mut()
            && continues(last, kind)
        {
            last.len += len;
            return;
        }
        self.list.push(Extent { offset, len, kind });
    }
}

/// Whether what follows an extent, of the given kind, is more of the same.
pub fn continues(last: &Extent, kind: ExtentKind) -> bool {
    match (last.kind, kind) {
        (
            ExtentKind::Data { file, at, in_place },
            ExtentKind::Data {
                file: next_file,
                at: next_at,
                in_place: next_in_place,
            },
        ) => file == next_file && in_place == next_in_place && at + last.len == next_at,
        (ExtentKind::Zero { at: Some(at) }, ExtentKind::Zero { at: Some(next) })
        | (ExtentKind::Unallocated { at: Some(at) }, ExtentKind::Unallocated { at: Some(next) }) => {
            at.checked_add(last.len) == Some(next)
        }
        (last, next) => last == next,
    }
}
