//! raw: the disk's bytes and nothing else.

use crate::facts::Facts;
use crate::proto::{Extent, ExtentKind, FileNo, Format};
use alloc::vec::Vec;

/// An open raw image.
#[derive(Clone, Copy, Debug)]
pub struct Raw {
    /// Length of the file, which is the disk's size.
    pub file_len: u64,
}

impl Raw {
    /// The facts. The size is exact, not rounded up to a sector.
    pub fn facts(self, probed: bool) -> Facts {
        Facts {
            format: Format::Raw,
            probed,
            virtual_size: self.file_len,
            cluster_size: None,
            write_unit: 1,
            size_unit: 1,
            backing: None,
            data_file: None,
            encrypted: false,
            dirty: false,
            corrupt: false,
            no_write: None,
            no_resize: None,
            snapshots: Vec::new(),
            specific: Vec::new(),
        }
    }

    /// What lies behind a guest range inside the disk.
    pub fn map(self, offset: u64, len: u64) -> Vec<Extent> {
        let extent = Extent {
            offset,
            len,
            kind: ExtentKind::Data {
                file: FileNo::IMAGE,
                at: offset,
                in_place: true,
            },
        };
        Vec::from_iter((len > 0).then_some(extent))
    }
}
