//! What an open image says about itself.

use super::footer::Kind;
use super::{Layout, Vhd, open, parent};
use crate::engine::Host;
use crate::error::{Failure, FailureKind};
use crate::facts::Facts;
use crate::plan::SECTOR;
use crate::proto::Format;
use alloc::vec::Vec;

impl Vhd {
    /// The facts. What forbids changes is filled in for writers only.
    pub fn facts(&self, host: &mut dyn Host, probed: bool, write: bool) -> Result<Facts, Failure> {
        let header = match &self.layout {
            Layout::Fixed => None,
            Layout::Dynamic(dynamic) => Some(&dynamic.header),
        };
        let backing = match header {
            None => None,
            Some(header) => parent::read(host, &self.footer, header, self.file_len)?,
        };
        Ok(Facts {
            format: Format::Vhd,
            probed,
            virtual_size: self.footer.virtual_size(),
            cluster_size: header.map(|header| header.block_size),
            write_unit: SECTOR,
            size_unit: SECTOR,
            backing,
            identity: Some(parent::uuid_text(self.footer.uuid())),
            files: Vec::new(),
            files_first: false,
            encrypted: false,
            dirty: false,
            corrupt: false,
            unsettled: self.unsettled.map(|unsettled| unsettled.text().into()),
            no_write: self.no_resize().filter(|_| write),
            no_resize: self.no_resize().filter(|_| write),
            snapshots: Vec::new(),
            specific: Vec::new(),
        })
    }

    /// Why the image may not be changed, if so.
    pub fn no_resize(&self) -> Option<Failure> {
        self.no_change().or_else(|| {
            (self.footer.kind == Kind::Differencing).then(|| {
                refuse(
                    "the image is a differencing VHD: its size is that of its parent; merge it \
                     into the parent first, or copy its content from a mount to a new image",
                )
            })
        })
    }

    fn no_change(&self) -> Option<Failure> {
        if self.footer.has_saved_state() {
            return Some(refuse(
                "a virtual machine is suspended on the image (saved state); resume it and shut it \
                 down, or discard the saved state",
            ));
        }
        if let Layout::Dynamic(dynamic) = &self.layout {
            if dynamic.has_old_footer {
                return Some(open::old_footer());
            }
            if dynamic.has_batmap {
                return Some(refuse(
                    "the image has a block bitmap of XenServer (tdbatmap) behind its table; \
                     convert it with `qemu-img convert -f vpc -O vpc`",
                ));
            }
        }
        let is_torn = self.unsettled.is_some();
        (!self.file_len.is_multiple_of(SECTOR) && !is_torn).then(|| {
            refuse(
                "the footer is not at a multiple of 512 bytes and cannot be replaced atomically; \
                 convert the image with `qemu-img convert -f vpc -O vpc`",
            )
        })
    }
}

fn refuse(why: &str) -> Failure {
    Failure::new(FailureKind::Unsupported, why)
}
