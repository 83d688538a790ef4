//! What an image says about itself.

use super::refuse::no_writing;
use super::{Vhdx, locator};
use crate::disk::Opening;
use crate::error::Failure;
use crate::facts::Facts;
use crate::proto::Format;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

impl Vhdx {
    /// The facts.
    pub(super) fn facts(&self, opening: &Opening<'_>) -> Result<Facts, Failure> {
        let geometry = self.metadata.geometry;
        let locator = self.metadata.locator.as_deref();
        let child = geometry.has_parent.then(super::resize::is_child);
        let no_write = geometry.has_parent.then(no_writing);
        Ok(Facts {
            format: Format::Vhdx,
            probed: opening.probed,
            virtual_size: self.metadata.size,
            cluster_size: Some(geometry.block_size),
            write_unit: geometry.sector,
            size_unit: geometry.sector,
            backing: locator.map(locator::parent).transpose()?,
            identity: Some(self.headers.current.data_write.to_string()),
            files: Vec::new(),
            files_first: false,
            encrypted: false,
            dirty: false,
            corrupt: false,
            unsettled: self.unsettled(),
            no_write: no_write.filter(|_| opening.write),
            no_resize: child.filter(|_| opening.write),
            snapshots: Vec::new(),
            specific: Vec::new(),
        })
    }

    /// Why the image must be put in order before it is changed, if so.
    pub(super) fn unsettled(&self) -> Option<String> {
        if self.headers.current.has_log() {
            return Some("its log has to be replayed".into());
        }
        let (which, why) = self.stale_table.as_ref()?;
        let name = match which {
            0 => "first",
            _ => "second",
        };
        Some(format!("its {name} region table {why}"))
    }
}
