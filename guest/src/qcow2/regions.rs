//! The places of the metadata that the header leads to, so that nothing else
//! can claim them.

use super::refuse;
use crate::error::Failure;
use alloc::format;
use alloc::vec::Vec;

/// What occupies a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// The first cluster.
    Header,
    /// The active L1 table.
    L1,
    /// The refcount table.
    RefcountTable,
    /// The snapshot table.
    Snapshots,
    /// The bitmap directory.
    Bitmaps,
    /// The encryption header.
    Crypto,
}

impl Owner {
    /// The name that messages use.
    pub fn name(self) -> &'static str {
        match self {
            Self::Header => "the header",
            Self::L1 => "the active L1 table",
            Self::RefcountTable => "the refcount table",
            Self::Snapshots => "the snapshot table",
            Self::Bitmaps => "the bitmap directory",
            Self::Crypto => "the encryption header",
        }
    }
}

/// Disjoint ranges of the image file, in whole clusters.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Regions {
    list: Vec<(Owner, u64, u64)>,
}

impl Regions {
    /// Adds `len` bytes at `start`; nothing for no bytes. Ranges may not
    /// overlap.
    pub fn add(&mut self, owner: Owner, start: u64, len: u64) -> Result<(), Failure> {
        if len == 0 {
            return Ok(());
        }
        if let Some(other) = self.find(start, len) {
            return Err(refuse::header(format!(
                "{} at {start:#x} ({len} bytes) overlaps {}",
                owner.name(),
                other.name()
            )));
        }
        self.list.push((owner, start, start.saturating_add(len)));
        Ok(())
    }

    /// What the range overlaps, if anything.
    pub fn find(&self, start: u64, len: u64) -> Option<Owner> {
        let end = start.saturating_add(len);
        self.list
            .iter()
            .find(|&&(_, from, to)| start < to && from < end)
            .map(|&(owner, _, _)| owner)
    }

    /// Where the last of them ends.
    pub fn end(&self) -> u64 {
        let ends = self.list.iter().map(|&(_, _, end)| end);
        ends.max().unwrap_or(0)
    }

    /// Where the region of an owner lies: offset and length in bytes.
    pub fn of(&self, owner: Owner) -> Option<(u64, u64)> {
        let found = self.list.iter().find(|&&(other, _, _)| other == owner);
        found.map(|&(_, start, end)| (start, end - start))
    }

    /// Replaces the place of a region whose owner has moved.
    pub fn replace(&mut self, owner: Owner, start: u64, len: u64) -> Result<(), Failure> {
        self.list.retain(|&(other, _, _)| other != owner);
        self.add(owner, start, len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_overlap_names_both_sides() {
        let mut regions = Regions::default();
        regions.add(Owner::Header, 0, 512).unwrap();
        regions.add(Owner::L1, 512, 1024).unwrap();
        let failure = regions.add(Owner::RefcountTable, 1024, 512).unwrap_err();
        assert!(
            failure.message.starts_with(
                "the refcount table at 0x400 (512 bytes) overlaps the active L1 table"
            )
        );
    }

    #[test]
    fn neighbours_do_not_overlap() {
        let mut regions = Regions::default();
        regions.add(Owner::Header, 0, 512).unwrap();
        assert_eq!(regions.find(512, 512), None);
        assert_eq!(regions.find(511, 1), Some(Owner::Header));
    }
}
