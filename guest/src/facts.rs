//! What an image says about itself, once it has been checked.

use crate::proto::Format;
use alloc::string::String;
use alloc::vec::Vec;
use serde::{Deserialize, Serialize};

/// The facts of an opened image. Lengths and offsets are bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Facts {
    /// The format of the image.
    pub format: Format,
    /// Whether the format was found by probing rather than named by the caller.
    pub probed: bool,
    /// Size of the disk that a guest sees.
    pub virtual_size: u64,
    /// Allocation unit that `info` reports, if the format has one.
    pub cluster_size: Option<u64>,
    /// Granularity of [`Allocate`](crate::Request::Allocate): requests for
    /// placing data are made in multiples of this (cluster or subcluster; 1 for
    /// raw). A power of two.
    pub write_unit: u64,
    /// Sizes that a resize accepts are multiples of this (512, or 1 for raw).
    pub size_unit: u64,
    /// The image that holds what this one does not, if one is named.
    pub backing: Option<Backing>,
    /// What tells the image from others for those that are based on it; opaque
    /// to the host, which compares it with [`Backing::identity`].
    pub identity: Option<String>,
    /// The other files that hold parts of the image: qcow2's external data
    /// file, VMDK's extents.
    pub files: Vec<NamedFile>,
    /// Whether the facts are complete only once those files are
    /// [attached](crate::Request::Attach).
    pub files_first: bool,
    /// Whether data is encrypted: facts and resizes work, reading does not.
    pub encrypted: bool,
    /// Whether the image was not closed cleanly (qcow2's dirty bit).
    pub dirty: bool,
    /// Whether the image is marked as corrupt.
    pub corrupt: bool,
    /// Why the image must be put in order ([`Settle`](crate::Request::Settle))
    /// before it is changed, where it must: a log to replay, counts to rebuild,
    /// copies that differ since an interruption.
    pub unsettled: Option<String>,
    /// Why the guest-visible content may not be written, where it may not.
    /// (A resize has its own conditions, checked when it is asked for.)
    pub no_write: Option<crate::Failure>,
    /// Why the image may not be resized, where that is known at open.
    pub no_resize: Option<crate::Failure>,
    /// Internal snapshots, in table order.
    pub snapshots: Vec<Snapshot>,
    /// The format's own facts as qemu's `format-specific` object has them, in
    /// that order: a tree, flattened so that decoding it cannot recurse.
    pub specific: Vec<Fact>,
}

/// The image below, as an image names it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Backing {
    /// The names to try, in this order, as they stand in the image (lossy where
    /// one is not UTF-8), `/` between directories. Never empty.
    pub names: Vec<String>,
    /// The format that the image says the file has.
    pub format: Option<String>,
    /// The [`identity`](Facts::identity) that the file must have, where the
    /// format records one.
    pub identity: Option<String>,
}

impl Backing {
    /// A backing image with one name and nothing to tell it from others.
    pub fn named(file: NamedFile) -> Self {
        Self {
            names: alloc::vec![file.name],
            format: file.format,
            identity: None,
        }
    }

    /// The first of the names: the one that texts show.
    pub fn name(&self) -> &str {
        self.names.first().map_or("", String::as_str)
    }
}

/// A file that an image names. The guest never opens it; the host decides.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NamedFile {
    /// The name as it stands in the image (lossy where it is not UTF-8).
    pub name: String,
    /// The format that the image says the file has.
    pub format: Option<String>,
}

/// One internal snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// Unique id, a number in practice.
    pub id: String,
    /// Name.
    pub name: String,
    /// Size of the saved VM state.
    pub vm_state_size: u64,
    /// Creation time, seconds since the epoch.
    pub date_sec: u32,
    /// Creation time, nanoseconds part.
    pub date_nsec: u32,
    /// Running time of the VM in nanoseconds.
    pub vm_clock_nsec: u64,
    /// Instruction count, where recorded.
    pub icount: Option<u64>,
}

/// One line of a flattened tree: `depth` counts the objects and lists around
/// it. A line with an [`Object`](FactValue::Object) or
/// [`List`](FactValue::List) owns the deeper lines that follow. Elements of a
/// list have an empty key. An empty text under `filename` stands for the image's
/// own file, whose name the host fills in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fact {
    /// 0 for the top level of `format-specific`'s `data`.
    pub depth: u8,
    /// Key, as qemu spells it in JSON (with dashes).
    pub key: String,
    /// Value.
    pub value: FactValue,
}

/// The value of a [`Fact`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FactValue {
    /// A truth value.
    Bool(bool),
    /// A number.
    Number(u64),
    /// A string.
    Text(String),
    /// An object whose members follow one level deeper.
    Object,
    /// A list whose elements follow one level deeper.
    List,
}
