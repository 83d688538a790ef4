//! What an open image says about itself, in qemu-img's words and order.

use super::format::{flag, fresh};
use super::refuse::unsupported;
use super::resize::odd_tables;
use super::{Body, DiskExtent, Shape, Vmdk};
use crate::error::{Failure, FailureKind};
use crate::facts::{Backing, Fact, FactValue, Facts, NamedFile};
use crate::plan::SECTOR;
use crate::proto::Format;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec;
use alloc::vec::Vec;

impl Vmdk {
    /// The facts. What forbids changes is filled in for writers only.
    pub fn facts(&self, probed: bool) -> Facts {
        let files: Vec<NamedFile> = self
            .file_names()
            .into_iter()
            .map(|name| NamedFile { name, format: None })
            .collect();
        let mut facts = Facts {
            format: Format::Vmdk,
            probed,
            virtual_size: 0,
            cluster_size: None,
            write_unit: 1,
            size_unit: SECTOR,
            backing: self.descriptor.parent().map(|name| Backing {
                names: vec![name],
                format: Some(Format::Vmdk.name().to_string()),
                identity: Some(identity(self.descriptor.parent_cid)),
            }),
            identity: Some(identity(self.descriptor.cid)),
            files_first: !files.is_empty(),
            files,
            encrypted: false,
            dirty: false,
            corrupt: false,
            unsettled: None,
            no_write: None,
            no_resize: None,
            snapshots: Vec::new(),
            specific: Vec::new(),
        };
        self.complete(&mut facts);
        facts
    }

    /// Fills in what the extents say.
    pub fn complete(&self, facts: &mut Facts) {
        facts.virtual_size = match self.extents.is_empty() {
            true => {
                let sectors = self.descriptor.extents.iter().map(|line| line.sectors);
                sectors.fold(0, u64::saturating_add).saturating_mul(SECTOR)
            }
            false => self.size(),
        };
        facts.cluster_size = self.cluster_size();
        facts.write_unit = self.grains().max().unwrap_or(1);
        facts.specific = self.specific();
        if self.write {
            facts.unsettled = self.unsettled().map(ToString::to_string);
            facts.no_write = self.no_write();
            facts.no_resize = self.no_resize();
        }
    }

    /// The grain sizes of the sparse extents, in bytes.
    fn grains(&self) -> impl Iterator<Item = u64> {
        self.extents.iter().filter_map(|extent| match &extent.body {
            Body::Sparse(sparse) => Some(sparse.header.grain_len()),
            _ => None,
        })
    }

    /// The grain size, where all extents have the same.
    fn cluster_size(&self) -> Option<u64> {
        let first = self.grains().next()?;
        let same = self.grains().filter(|&grain| grain == first).count();
        (same == self.extents.len()).then_some(first)
    }

    /// `format-specific`, in the order in which qemu-img prints it.
    fn specific(&self) -> Vec<Fact> {
        let mut list = Vec::new();
        let mut add = |depth, key: &str, value| {
            list.push(Fact {
                depth,
                key: key.to_string(),
                value,
            });
        };
        let number = |value: u32| FactValue::Number(value.into());
        add(0, "cid", number(self.descriptor.cid));
        add(0, "parent-cid", number(self.descriptor.parent_cid));
        add(0, "create-type", FactValue::Text(self.create_type()));
        add(0, "extents", FactValue::List);
        for (index, extent) in self.extents.iter().enumerate() {
            add(1, "", FactValue::Object);
            let sparse = match &extent.body {
                Body::Sparse(sparse) => Some(&sparse.header),
                _ => None,
            };
            if sparse.is_some_and(|header| header.compressed) {
                add(2, "compressed", FactValue::Bool(true));
            }
            add(2, "virtual-size", FactValue::Number(extent.len));
            // Empty stands for the image's own file, whose name only the host
            // knows.
            let (name, kind) = match (&self.shape, self.descriptor.extents.get(index)) {
                (Shape::Descriptor { .. }, Some(line)) => (line.name.clone(), line.kind.word()),
                _ => (String::new(), ""),
            };
            add(2, "filename", FactValue::Text(name));
            if let Some(header) = sparse {
                add(2, "cluster-size", FactValue::Number(header.grain_len()));
            }
            add(2, "format", FactValue::Text(kind.to_string()));
        }
        list
    }

    /// The kind of image as QEMU understands it.
    fn create_type(&self) -> String {
        match (&self.shape, self.extents.first().map(|extent| &extent.body)) {
            (Shape::Embedded { .. }, Some(Body::Sparse(sparse))) => {
                match sparse.header.compressed {
                    true => "streamOptimized".to_string(),
                    false => "monolithicSparse".to_string(),
                }
            }
            _ => self.descriptor.create_type.clone(),
        }
    }

    /// Why the content may not be written, if so.
    pub fn no_write(&self) -> Option<Failure> {
        self.no_change().or_else(|| {
            let unit = self.grains().max().unwrap_or(1);
            let odd = self.extents.iter().any(|extent| match &extent.body {
                Body::Sparse(sparse) => {
                    sparse.header.grain_len() != unit || !extent.start.is_multiple_of(unit)
                }
                Body::Flat { .. } => false,
                Body::Zero => true,
            });
            odd.then(|| {
                unsupported(
                    "writing into extents that differ in their grains, or do not begin with one, \
                     is not supported",
                )
            })
        })
    }

    /// Why the image may not be resized, if so.
    pub fn no_resize(&self) -> Option<Failure> {
        self.no_change().or_else(|| self.has_parent()).or_else(|| {
            match (&self.shape, self.extents.first()) {
                (
                    Shape::Embedded { .. },
                    Some(DiskExtent {
                        body: Body::Sparse(sparse),
                        ..
                    }),
                ) => odd_tables(sparse),
                _ => None,
            }
        })
    }

    fn has_parent(&self) -> Option<Failure> {
        let is_named = self.descriptor.parent().is_some();
        (is_named || self.descriptor.parent_cid != fresh::NO_PARENT).then(|| {
            Failure::new(
                FailureKind::Unsupported,
                format!(
                    "the image is the child of another (parentCID {:08x}), whose size it has to \
                     keep; merge the two with `qemu-img convert -O vmdk`, or delete the snapshot \
                     in the program that made it",
                    self.descriptor.parent_cid
                ),
            )
        })
    }

    /// Why nothing may be changed, if so.
    pub fn no_change(&self) -> Option<Failure> {
        if self.descriptor.value("changetrackpath").is_some() {
            return Some(unsupported(
                "the descriptor names a file of changed blocks (changeTrackPath), which would go \
                 stale",
            ));
        }
        if self.read_only && matches!(self.shape, Shape::Descriptor { .. }) {
            return Some(unsupported("an extent line of the descriptor says RDONLY"));
        }
        self.extents.iter().find_map(no_change_of)
    }
}

fn no_change_of(extent: &DiskExtent) -> Option<Failure> {
    let Body::Sparse(sparse) = &extent.body else {
        return None;
    };
    let header = &sparse.header;
    if header.compressed || header.flags & (flag::COMPRESSED | flag::MARKERS) != 0 || sparse.at_end
    {
        return Some(unsupported(
            "a streamOptimized image is written once, in one go, and cannot be changed",
        ));
    }
    (header.version > 2).then(|| {
        unsupported("VMDK version 3 must be read only (its changes are tracked in another file)")
    })
}

/// The text by which images tell their parents apart.
fn identity(cid: u32) -> String {
    format!("{cid:08x}")
}
