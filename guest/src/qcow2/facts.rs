//! What an open image says about itself, in qemu-img's words and order.

use super::Qcow2;
use super::format::bitmap;
use super::header::{Compression, Encryption};
use super::luks::Luks;
use crate::engine::Host;
use crate::error::{Failure, FailureKind};
use crate::facts::{Backing, Fact, FactValue, Facts, NamedFile};
use crate::plan::SECTOR;
use crate::proto::Format;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec;
use alloc::vec::Vec;

/// A flattened tree under construction.
#[derive(Default)]
pub struct Tree {
    list: Vec<Fact>,
    depth: u8,
}

impl Tree {
    /// Adds a line.
    pub fn add(&mut self, key: &str, value: FactValue) {
        self.list.push(Fact {
            depth: self.depth,
            key: key.to_string(),
            value,
        });
    }

    /// Adds an object or list whose members are what `fill` adds.
    pub fn nest<E>(
        &mut self,
        key: &str,
        value: FactValue,
        fill: impl FnOnce(&mut Self) -> Result<(), E>,
    ) -> Result<(), E> {
        self.add(key, value);
        self.depth += 1;
        let result = fill(self);
        self.depth -= 1;
        result
    }
}

impl Qcow2 {
    /// The facts. What forbids changes is filled in for writers only.
    pub fn facts(&self, host: &mut dyn Host, probed: bool, write: bool) -> Result<Facts, Failure> {
        let header = &self.header;
        let geometry = header.geometry;
        Ok(Facts {
            format: Format::Qcow2,
            probed,
            virtual_size: header.size,
            cluster_size: Some(geometry.cluster_size()),
            write_unit: geometry.subcluster_size(),
            size_unit: SECTOR,
            backing: header.backing_name.as_ref().map(|name| Backing {
                names: vec![String::from_utf8_lossy(name).into_owned()],
                format: header.extensions.backing_format(),
                identity: None,
            }),
            identity: None,
            files: self.data_file_name().into_iter().collect(),
            files_first: false,
            encrypted: header.encryption.is_some(),
            dirty: header.is_dirty(),
            corrupt: header.is_corrupt(),
            unsettled: if write { self.unsettled() } else { None },
            no_write: if write { self.no_write() } else { None },
            no_resize: if write { self.no_resize() } else { None },
            snapshots: self.snapshots.iter().map(|s| s.facts.clone()).collect(),
            specific: self.specific(host)?,
        })
    }

    fn data_file_name(&self) -> Option<NamedFile> {
        self.header.has_data_file().then(|| NamedFile {
            name: self.header.extensions.data_file().unwrap_or_default(),
            format: Some(Format::Raw.name().to_string()),
        })
    }

    /// `format-specific`, in the order in which qemu-img prints it.
    fn specific(&self, host: &mut dyn Host) -> Result<Vec<Fact>, Failure> {
        let header = &self.header;
        let v3 = header.version >= 3;
        let mut tree = Tree::default();
        let compat = if v3 { "1.1" } else { "0.10" };
        tree.add("compat", FactValue::Text(compat.to_string()));
        let compression = match header.compression {
            Compression::Deflate => "zlib",
            Compression::Zstd => "zstd",
        };
        tree.add("compression-type", FactValue::Text(compression.to_string()));
        if v3 {
            tree.add(
                "lazy-refcounts",
                FactValue::Bool(header.has_lazy_refcounts()),
            );
            self.add_bitmaps(&mut tree)?;
        }
        let refcount_bits = header.geometry.refcount_bits();
        tree.add("refcount-bits", FactValue::Number(refcount_bits));
        if let Some(data_file) = self.data_file_name() {
            tree.add("data-file", FactValue::Text(data_file.name));
        }
        self.add_encryption(host, &mut tree)?;
        if header.has_data_file() {
            let raw = header.has_raw_data_file();
            tree.add("data-file-raw", FactValue::Bool(raw));
        }
        if v3 {
            tree.add("corrupt", FactValue::Bool(header.is_corrupt()));
            let extended = header.geometry.extended_l2();
            tree.add("extended-l2", FactValue::Bool(extended));
        }
        Ok(tree.list)
    }

    fn add_bitmaps(&self, tree: &mut Tree) -> Result<(), Failure> {
        if self.bitmaps.is_empty() {
            return Ok(());
        }
        tree.nest("bitmaps", FactValue::List, |tree| {
            self.bitmaps.iter().try_for_each(|bitmap| {
                tree.nest("", FactValue::Object, |tree| add_bitmap(tree, bitmap))
            })
        })
    }

    fn add_encryption(&self, host: &mut dyn Host, tree: &mut Tree) -> Result<(), Failure> {
        match self.header.encryption {
            None => Ok(()),
            Some(Encryption::Aes) => tree.nest("encrypt", FactValue::Object, |tree| {
                tree.add("format", FactValue::Text("aes".to_string()));
                Ok(())
            }),
            Some(Encryption::Luks { header }) => {
                let luks = Luks::read(host, header)?;
                tree.nest("encrypt", FactValue::Object, |tree| luks.add_to(tree))
            }
        }
    }

    /// Why the content may not be written, if so.
    pub fn no_write(&self) -> Option<Failure> {
        self.no_change().or_else(|| self.no_write_in_order())
    }

    /// The same once the image is in order.
    fn no_write_in_order(&self) -> Option<Failure> {
        if self.header.encryption.is_some() {
            return Some(encrypted("written"));
        }
        let tracking = self.bitmaps.iter().find(|b| b.auto() && !b.in_use())?;
        Some(Failure::new(
            FailureKind::Unsupported,
            format!(
                "the persistent bitmap '{name}' is enabled and would have to record every \
                 write, which is not supported; disable it with `qemu-img bitmap --disable` \
                 (and start a new backup chain), or remove it",
                name = tracking.name
            ),
        ))
    }

    /// Why the image may not be resized, if so.
    pub fn no_resize(&self) -> Option<Failure> {
        self.no_change().or_else(|| {
            if self.header.version < 3 && !self.snapshots.is_empty() {
                return Some(Failure::new(
                    FailureKind::Unsupported,
                    "Can't resize a v2 image which has snapshots; run `qemu-img amend -o \
                     compat=1.1` first, or delete the snapshots",
                ));
            }
            let stale = self.bitmaps.iter().find(|bitmap| bitmap.in_use())?;
            Some(Failure::new(
                FailureKind::Unsupported,
                format!(
                    "Bitmap '{name}' is inconsistent and cannot be used (flag in_use); remove it \
                     with `qemu-img bitmap --remove`",
                    name = stale.name
                ),
            ))
        })
    }

    fn no_change(&self) -> Option<Failure> {
        self.header.is_corrupt().then(corrupt)
    }

    /// The facts for a writer of an image that is marked as corrupt and is sound:
    /// it can be put in order, and then the resize is judged.
    pub fn let_settle(&self, facts: &mut Facts) {
        facts.unsettled = Some(
            "the image is marked as corrupt and nothing in it is: a shrink was interrupted before \
             its data file was cut"
                .into(),
        );
        facts.no_write = self.no_write_in_order();
        facts.no_resize = None;
    }

    /// Why the image must be put in order first, if so.
    fn unsettled(&self) -> Option<String> {
        self.header.is_dirty().then(|| {
            "the image was not closed cleanly (the dirty bit is set) and its reference counts may \
             be wrong"
                .into()
        })
    }
}

fn add_bitmap(tree: &mut Tree, bitmap: &super::bitmaps::Bitmap) -> Result<(), Failure> {
    const SHOWN: [(u32, &str); 2] = [(bitmap::IN_USE, "in-use"), (bitmap::AUTO, "auto")];
    tree.nest("flags", FactValue::List, |tree| {
        for (flag, name) in SHOWN {
            if bitmap.flags & flag != 0 {
                tree.add("", FactValue::Text(name.to_string()));
            }
        }
        Ok::<(), Failure>(())
    })?;
    tree.add("name", FactValue::Text(bitmap.name.clone()));
    let granularity = 1u64 << bitmap.granularity_bits;
    tree.add("granularity", FactValue::Number(granularity));
    Ok(())
}

/// The refusal of an image that is marked as corrupt.
pub fn corrupt() -> Failure {
    Failure::new(
        FailureKind::Damaged,
        "Image is corrupt; cannot be opened read/write (the corrupt bit is set); repair a copy \
         with `qemu-img check -r all`",
    )
}

/// The refusal of what needs a key.
pub fn encrypted(done: &str) -> Failure {
    Failure::new(
        FailureKind::Unsupported,
        format!(
            "the image is encrypted and cannot be {done} without its key, which is not supported; \
             decrypt it with `qemu-img convert`"
        ),
    )
}
